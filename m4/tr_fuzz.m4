# SYNOPSIS
#   TR_FUZZ
#
# DESCRIPTION
#   The compiler that `make fuzz` builds the libFuzzer targets of tests/fuzz with. The program itself is
#   built as always; the targets' corpora are replayed by `make check` without a fuzzer.
#
# USAGE
#   (absent)             make fuzz looks for clang when it runs
#   --enable-fuzz        find clang now; an error where there is none
#
# VARIABLES
#   FUZZ_CC

AC_DEFUN([TR_FUZZ], [
  AC_ARG_VAR([FUZZ_CC], [clang with libFuzzer, for make fuzz])
  AC_ARG_ENABLE([fuzz], [AS_HELP_STRING([--enable-fuzz], [insist on a compiler for make fuzz])])
  AS_IF([test "x$enable_fuzz" = xyes && test -z "$FUZZ_CC"],
    [AC_PATH_PROGS([FUZZ_CC], [clang-14 clang])
     AS_IF([test -z "$FUZZ_CC"], [AC_MSG_ERROR([--enable-fuzz: no clang found; set FUZZ_CC])])])
])
