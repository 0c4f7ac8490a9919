# SYNOPSIS
#   TR_WITH_SDE
#
# DESCRIPTION
#   libsde, optional: trireme's own counters as software-defined events of PAPI.  Only its header is needed
#   here: the library is opened when a profile begins, so that the program runs where there is none.
#
# USAGE
#   (absent)       used where the compiler finds sde_lib.h, which comes with PAPI 7
#   --with-sde     an error where it is not there
#   --without-sde  do without it
#
# VARIABLES
#   tr_found_sde; HAVE_SDE in config.h

AC_DEFUN([TR_WITH_SDE], [
  AC_ARG_WITH([sde], [AS_HELP_STRING([--with-sde], [own counters as PAPI events @<:@if sde_lib.h is found@:>@])],
    [], [with_sde=check])
  tr_found_sde=no
  tr_save_CPPFLAGS=$CPPFLAGS
  CPPFLAGS="$CPPFLAGS $PAPI_CFLAGS"
  AS_IF([test "$with_sde" != no], [AC_CHECK_HEADER([sde_lib.h], [tr_found_sde=yes])])
  CPPFLAGS=$tr_save_CPPFLAGS
  AS_CASE([$with_sde:$tr_found_sde],
    [*:yes], [AC_DEFINE([HAVE_SDE], [1], [Define to 1 if sde_lib.h was found.])],
    [yes:no], [AC_MSG_ERROR([--with-sde: there is no sde_lib.h; it comes with PAPI 7])])
])
