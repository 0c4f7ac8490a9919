# SYNOPSIS
#   TR_WITH_PKG(NAME, MODULES, HEADER, LIBRARY, FUNCTION, [PROLOGUE])
#   TR_WITH_PKG_OPTIONAL(NAME, MODULES, HEADER, LIBRARY, FUNCTION, [PROLOGUE])
#
# DESCRIPTION
#   Find a library and prove that a program with <HEADER> and FUNCTION links.  MODULES is a
#   comma-separated list of pkg-config modules, tried in order ("hwloc >= 2.0"); where pkg-config knows
#   none of them, plain -lLIBRARY is tried.  PROLOGUE is C text in front of the #include.
#
#   The first form ends configure where the library is missing; the second one only reports it.
#
# USAGE
#   (absent)         ask pkg-config
#   --with-NAME=DIR  use DIR/include and DIR/lib (or lib64); pkg-config is not asked, DIR/lib becomes a
#                    run path of the program
#   --without-NAME   do without; an error for a required library
#   --with-NAME      as absent, but an optional library must be there
#
# VARIABLES (NAME in capitals)
#   NAME_CFLAGS, NAME_LIBS    compiler and linker flags; set on the command line they are taken as they are
#   tr_found_NAME             for the summary: a version, a folder or "no"
#   HAVE_NAME                 defined in config.h and an Automake conditional (optional libraries)

AC_DEFUN([TR_WITH_PKG], [_TR_WITH_PKG([$1], [$2], [$3], [$4], [$5], [$6], [yes])])

AC_DEFUN([TR_WITH_PKG_OPTIONAL], [
  _TR_WITH_PKG([$1], [$2], [$3], [$4], [$5], [$6], [check])
  AS_IF([test "$tr_found_[]m4_translit([$1], [-], [_])" != no],
    [AC_DEFINE([HAVE_]m4_translit([$1], [a-z-], [A-Z_]), [1], [Define to 1 if $1 was found.])])
  AM_CONDITIONAL([HAVE_]m4_translit([$1], [a-z-], [A-Z_]),
    [test "$tr_found_[]m4_translit([$1], [-], [_])" != no])
])

AC_DEFUN([_TR_WITH_PKG], [
  AC_REQUIRE([PKG_PROG_PKG_CONFIG])
  m4_pushdef([TR_VAR], m4_translit([$1], [a-z-], [A-Z_]))
  m4_pushdef([TR_WITH], [with_]m4_translit([$1], [-], [_]))
  m4_pushdef([TR_FOUND], [tr_found_]m4_translit([$1], [-], [_]))
  AC_ARG_VAR(TR_VAR[_CFLAGS], [C compiler flags for $1, overriding pkg-config])
  AC_ARG_VAR(TR_VAR[_LIBS], [linker flags for $1, overriding pkg-config])
  AC_ARG_WITH([$1],
    [AS_HELP_STRING([--with-$1=DIR], [where $1 is installed @<:@ask pkg-config@:>@])],
    [], [TR_WITH=$7])

  AC_MSG_CHECKING([for $1])
  TR_FOUND=no
  AS_CASE([$TR_WITH],
    [no], [m4_if([$7], [yes],
      [AC_MSG_RESULT([refused])
       AC_MSG_ERROR([trireme cannot be built without $1])])],
    [yes|check], [_TR_PKG_ASK([$2], [$4])],
    [_TR_PKG_DIR([$1], [$3], [$4])])

  AS_IF([test "$TR_FOUND" != no], [
    tr_save_CFLAGS=$CFLAGS tr_save_LIBS=$LIBS
    CFLAGS="$TR_VAR[]_CFLAGS $CFLAGS" LIBS="$TR_VAR[]_LIBS $LIBS"
    AC_LINK_IFELSE([AC_LANG_PROGRAM([$6
#include <$3>], [[return (void *)$5 == (void *)0;]])], [], [TR_FOUND=no])
    CFLAGS=$tr_save_CFLAGS LIBS=$tr_save_LIBS
  ])
  AC_MSG_RESULT([$TR_FOUND])
  AS_CASE([$TR_WITH:$TR_FOUND],
    [no:no], [],
    [check:no], [TR_VAR[]_CFLAGS= TR_VAR[]_LIBS=],
    [*:no], [AC_MSG_ERROR([$1 is not usable (a program with <$3> and $5 does not link): install its dnl
development package or give --with-$1=DIR; config.log has the details])])
  m4_popdef([TR_FOUND])
  m4_popdef([TR_WITH])
  m4_popdef([TR_VAR])
])

# Absent or a bare --with: the user's variables, else pkg-config, else the compiler's own search path.
m4_define([_TR_PKG_ASK], [
  AS_IF([test -n "$TR_VAR[]_CFLAGS$TR_VAR[]_LIBS"], [TR_FOUND="as told by TR_VAR[]_LIBS"], [
    m4_foreach([tr_module], [$1], [
      AS_IF([test "$TR_FOUND" = no && test -n "$PKG_CONFIG" && dnl
$PKG_CONFIG --exists 'tr_module' 2>/dev/null], [
        TR_FOUND=`$PKG_CONFIG --modversion 'm4_bpatsubst(tr_module, [ .*])'`
        TR_VAR[]_CFLAGS=`$PKG_CONFIG --cflags 'tr_module'`
        TR_VAR[]_LIBS=`$PKG_CONFIG --libs 'tr_module'`
      ])])
    AS_IF([test "$TR_FOUND" = no], [TR_FOUND="version unknown" TR_VAR[]_LIBS=-l$2])
  ])
])

# --with-NAME=DIR.
m4_define([_TR_PKG_DIR], [
  AS_IF([test ! -f "$TR_WITH/include/$2"], [
    AC_MSG_RESULT([no])
    AC_MSG_ERROR([--with-$1: there is no $TR_WITH/include/$2])])
  tr_lib=$TR_WITH/lib
  AS_IF([test -d "$TR_WITH/lib64" && test ! -e "$tr_lib/lib$3.so" && test ! -e "$tr_lib/lib$3.a"],
    [tr_lib=$TR_WITH/lib64])
  TR_FOUND="in $TR_WITH"
  TR_VAR[]_CFLAGS="-I$TR_WITH/include"
  TR_VAR[]_LIBS="-L$tr_lib -Wl,-rpath,$tr_lib -l$3"
])
