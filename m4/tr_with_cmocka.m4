# SYNOPSIS
#   TR_WITH_CMOCKA
#
# DESCRIPTION
#   CMocka, optional: the unit testing library.  Without it the tests are not built and make check says so.
#
# USAGE
#   (absent)           used where pkg-config or the compiler finds it
#   --with-cmocka=DIR  use DIR/include and DIR/lib; an error where it is not there
#   --without-cmocka   do without it
#
# VARIABLES
#   CMOCKA_CFLAGS, CMOCKA_LIBS, tr_found_cmocka; HAVE_CMOCKA in config.h and for Automake

AC_DEFUN([TR_WITH_CMOCKA], [
  TR_WITH_PKG_OPTIONAL([cmocka], [cmocka], [cmocka.h], [cmocka], [_cmocka_run_group_tests],
    [[#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>]])
])
