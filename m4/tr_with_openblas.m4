# SYNOPSIS
#   TR_WITH_OPENBLAS
#
# DESCRIPTION
#   OpenBLAS, optional: the yardstick that the bench command measures trireme's own CPU kernels against.
#   No result that a user gets is computed with it. The program is not linked with it: bench opens it when it runs, so that
#   no other command loads it and has its threads.
#
# USAGE
#   (absent)             used where pkg-config or the compiler finds it
#   --with-openblas=DIR  use DIR/include and DIR/lib; an error where it is not there
#   --without-openblas   do without it
#
# VARIABLES
#   TR_OPENBLAS in config.h: the name that is opened; OPENBLAS_CFLAGS, OPENBLAS_LIBS, tr_found_openblas; HAVE_OPENBLAS in config.h and for Automake

AC_DEFUN([TR_WITH_OPENBLAS], [
  TR_WITH_PKG_OPTIONAL([openblas], [openblas], [cblas.h], [openblas], [cblas_sgemm])
  AS_CASE([$with_openblas],
    [*/*], [tr_openblas=$with_openblas/lib/libopenblas.so],
    [tr_openblas=libopenblas.so.0])
  AC_DEFINE_UNQUOTED([TR_OPENBLAS], ["$tr_openblas"],
    [What bench opens as its yardstick where HAVE_OPENBLAS is defined.])
])
