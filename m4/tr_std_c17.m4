# SYNOPSIS
#   TR_STD_C17
#
# DESCRIPTION
#   Put the flag for strict C17 into STD_CFLAGS; end configure where the compiler has no such mode.

AC_DEFUN([TR_STD_C17], [
  AC_REQUIRE([AC_PROG_CC])
  AC_CACHE_CHECK([whether $CC takes -std=c17], [tr_cv_std_c17], [
    tr_save_CFLAGS=$CFLAGS
    CFLAGS="$CFLAGS -std=c17"
    AC_COMPILE_IFELSE([AC_LANG_PROGRAM([[
#if __STDC_VERSION__ < 201710L
#error "older than C17"
#endif
_Static_assert(sizeof(long) == 8, "64-bit systems only");]], [])], [tr_cv_std_c17=yes], [tr_cv_std_c17=no])
    CFLAGS=$tr_save_CFLAGS
  ])
  AS_IF([test "$tr_cv_std_c17" != yes],
    [AC_MSG_ERROR([a C17 compiler for a 64-bit system is needed: GCC 8, Clang 7 or newer])])
  AC_SUBST([STD_CFLAGS], [-std=c17])
])
