# SYNOPSIS
#   TR_SANITIZE
#
# DESCRIPTION
#   Sanitizer builds, for the project's own tests: everything is compiled and linked with
#   -fsanitize=LIST, and the first finding ends the program.
#
# USAGE
#   (absent)                                no sanitizer
#   --enable-sanitize                       address,undefined
#   --enable-sanitize=LIST                  address,undefined or thread, say
#
# VARIABLES
#   SANITIZE_CFLAGS, SANITIZE_LDFLAGS
#   TR_ASAN        Automake conditional: the address sanitizer is on, see tests/noop_dlclose.c
#   tr_sanitize    LIST or "no"

AC_DEFUN([TR_SANITIZE], [
  AC_ARG_ENABLE([sanitize],
    [AS_HELP_STRING([--enable-sanitize=LIST], [build with -fsanitize=LIST @<:@address,undefined@:>@])],
    [], [enable_sanitize=no])
  AS_IF([test "$enable_sanitize" = yes], [enable_sanitize=address,undefined])
  tr_sanitize=$enable_sanitize
  SANITIZE_CFLAGS= SANITIZE_LDFLAGS=
  AS_IF([test "$tr_sanitize" != no], [
    AC_MSG_CHECKING([whether $CC takes -fsanitize=$tr_sanitize])
    SANITIZE_CFLAGS="-fsanitize=$tr_sanitize -fno-sanitize-recover=all"
    SANITIZE_LDFLAGS="-fsanitize=$tr_sanitize"
    tr_save_CFLAGS=$CFLAGS
    CFLAGS="$CFLAGS $SANITIZE_CFLAGS"
    AC_LINK_IFELSE([AC_LANG_PROGRAM([], [])], [AC_MSG_RESULT([yes])],
      [AC_MSG_RESULT([no])
       AC_MSG_ERROR([--enable-sanitize=$tr_sanitize: $CC does not link such a program])])
    CFLAGS=$tr_save_CFLAGS
  ])
  AC_SUBST([SANITIZE_CFLAGS])
  AC_SUBST([SANITIZE_LDFLAGS])
  AM_CONDITIONAL([TR_ASAN], [echo ",$tr_sanitize," | grep -q ',address,'])
])
