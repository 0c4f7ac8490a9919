# SYNOPSIS
#   TR_WARNINGS
#
# DESCRIPTION
#   The project's warnings, as far as the compiler knows them, in WARN_CFLAGS.
#
# USAGE
#   (absent)          warnings are shown; a newer compiler's warning does not end a user's build
#   --enable-werror   a warning is an error: for the project's own tests

AC_DEFUN([TR_WARNINGS], [
  AC_ARG_ENABLE([werror], [AS_HELP_STRING([--enable-werror], [make warnings errors])],
    [], [enable_werror=no])
  WARN_CFLAGS=
  TR_CHECK_CFLAGS([WARN_CFLAGS], [-Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes
    -Wvla -Wformat=2 -Wconversion -Wno-sign-conversion])
  AS_IF([test "$enable_werror" != no], [AS_VAR_APPEND([WARN_CFLAGS], [" -Werror"])])
  AC_SUBST([WARN_CFLAGS])
])
