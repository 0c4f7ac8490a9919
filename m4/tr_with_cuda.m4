# SYNOPSIS
#   TR_WITH_CUDA
#   TR_WITH_NCCL
#
# DESCRIPTION
#   The CUDA backend and its communicator.  This version has the CPU backend only: asking for the other
#   one is refused here instead of being ignored.
#
# USAGE
#   (absent), --without-cuda, --without-nccl   build the CPU backend alone
#   --with-cuda[=DIR], --with-nccl[=DIR]       an error in this version
#
# VARIABLES
#   tr_found_cuda, tr_found_nccl

AC_DEFUN([TR_WITH_CUDA], [
  AC_ARG_WITH([cuda], [AS_HELP_STRING([--with-cuda=DIR], [CUDA toolkit; refused by this version @<:@no@:>@])],
    [], [with_cuda=no])
  AS_IF([test "$with_cuda" != no],
    [AC_MSG_ERROR([--with-cuda: trireme AC_PACKAGE_VERSION has no CUDA backend; configure without it])])
  tr_found_cuda="no (this version runs on CPUs)"
])

AC_DEFUN([TR_WITH_NCCL], [
  AC_ARG_WITH([nccl], [AS_HELP_STRING([--with-nccl=DIR], [NCCL; refused by this version @<:@no@:>@])],
    [], [with_nccl=no])
  AS_IF([test "$with_nccl" != no],
    [AC_MSG_ERROR([--with-nccl: trireme AC_PACKAGE_VERSION has no CUDA backend; configure without it])])
  tr_found_nccl="no (comes with CUDA)"
])
