# SYNOPSIS
#   TR_OPENMP
#
# DESCRIPTION
#   OpenMP, required: the CPU backend computes on one team per rank.  (Clang needs its own run-time
#   library for it, Debian's libomp-dev.)
#
# VARIABLES
#   OPENMP_CFLAGS   for compiling and linking

AC_DEFUN([TR_OPENMP], [
  AC_OPENMP
  tr_save_CFLAGS=$CFLAGS
  CFLAGS="$CFLAGS $OPENMP_CFLAGS"
  AC_MSG_CHECKING([whether a program with OpenMP links])
  AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <omp.h>
#ifndef _OPENMP
#error "no OpenMP"
#endif]], [[return omp_get_max_threads() < 1;]])],
    [AC_MSG_RESULT([yes])],
    [AC_MSG_RESULT([no])
     AC_MSG_ERROR([$CC has no usable OpenMP; for Clang install its run-time library (libomp-dev)])])
  CFLAGS=$tr_save_CFLAGS
])
