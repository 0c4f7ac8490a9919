# SYNOPSIS
#   TR_WITH_OPENBLAS
#
# DESCRIPTION
#   OpenBLAS, optional: the yardstick that the bench command measures trireme's own CPU kernels against.
#   No result that a user gets is computed with it.
#
# USAGE
#   (absent)             used where pkg-config or the compiler finds it
#   --with-openblas=DIR  use DIR/include and DIR/lib; an error where it is not there
#   --without-openblas   do without it
#
# VARIABLES
#   OPENBLAS_CFLAGS, OPENBLAS_LIBS, tr_found_openblas; HAVE_OPENBLAS in config.h and for Automake

AC_DEFUN([TR_WITH_OPENBLAS], [
  TR_WITH_PKG_OPTIONAL([openblas], [openblas], [cblas.h], [openblas], [cblas_sgemm])
])
