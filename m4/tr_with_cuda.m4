# SYNOPSIS
#   TR_WITH_CUDA
#   TR_WITH_NCCL
#
# DESCRIPTION
#   The CUDA backend, and its communicator.  The backend needs nvcc 12.4 or later and the runtime library, which is linked
#   statically; the driver is looked for when the program runs, so that one binary serves nodes with and without GPUs.
#   NCCL does not come with this version: asking for it is refused here instead of being ignored.
#
# USAGE
#   (absent)               built where nvcc is found: on PATH, in CUDA_HOME or in /usr/local/cuda
#   --with-cuda=DIR        the toolkit in DIR; an error where it is not there
#   --without-cuda         build the CPU backend alone
#   --with-cuda-arch=ARCH  the GPUs it is for (default sm_90a, Hopper; nothing else in this version)
#
# VARIABLES
#   NVCC, NVCC_FLAGS, CUDA_CFLAGS, CUDA_LIBS; set on the command line they are taken as they are
#   tr_found_cuda, tr_found_nccl; HAVE_CUDA in config.h and for Automake; TR_CUDA_ARCH in config.h

AC_DEFUN([TR_WITH_CUDA], [
  AC_ARG_VAR([NVCC], [CUDA compiler])
  AC_ARG_VAR([NVCC_FLAGS], [more flags for the CUDA compiler])
  AC_ARG_VAR([CUDA_CFLAGS], [C compiler flags for the CUDA runtime's headers])
  AC_ARG_VAR([CUDA_LIBS], [linker flags for the CUDA runtime])
  AC_ARG_WITH([cuda], [AS_HELP_STRING([--with-cuda=DIR], [CUDA toolkit in DIR @<:@where nvcc is found@:>@])],
    [], [with_cuda=check])
  AC_ARG_WITH([cuda-arch], [AS_HELP_STRING([--with-cuda-arch=ARCH], [GPUs to build for @<:@sm_90a@:>@])],
    [], [with_cuda_arch=sm_90a])
  tr_found_cuda=no
  AS_IF([test "$with_cuda" != no], [
    AS_CASE([$with_cuda],
      [*/*], [tr_cuda_path=$with_cuda/bin],
      [tr_cuda_path=$PATH$PATH_SEPARATOR${CUDA_HOME:-/usr/local/cuda}/bin])
    AC_PATH_PROG([NVCC], [nvcc], [], [$tr_cuda_path])
    AS_IF([test -n "$NVCC"], [_TR_CUDA_TOOLKIT])
    AS_IF([test "$with_cuda:$tr_found_cuda" != check:no && test "$tr_found_cuda" = no],
      [AC_MSG_ERROR([--with-cuda: no nvcc that works in $tr_cuda_path])])
  ])
  AS_IF([test "$tr_found_cuda" != no], [
    AC_DEFINE([HAVE_CUDA], [1], [Define to 1 if the CUDA backend is built.])
    AC_DEFINE_UNQUOTED([TR_CUDA_ARCH], ["$with_cuda_arch"], [The GPUs that the CUDA backend is built for.])
  ])
  AM_CONDITIONAL([HAVE_CUDA], [test "$tr_found_cuda" != no])
])

# nvcc compiles for the architecture, and a C program links with what it made.
AC_DEFUN([_TR_CUDA_TOOLKIT], [
  AS_CASE([$with_cuda_arch],
    [sm_90a], [],
    [AC_MSG_ERROR([--with-cuda-arch=$with_cuda_arch: trireme AC_PACKAGE_VERSION has kernels for sm_90a])])
  tr_cuda_root=`AS_DIRNAME(["$NVCC"])`
  tr_cuda_root=`cd "$tr_cuda_root/.." && pwd`
  AS_VAR_SET_IF([CUDA_CFLAGS], [], [CUDA_CFLAGS="-isystem $tr_cuda_root/include"])
  AS_VAR_SET_IF([CUDA_LIBS], [], [CUDA_LIBS="-L$tr_cuda_root/lib64 -lcudart_static -ldl -lrt -lpthread"])
  AC_SUBST([NVCC_ARCH], ["-gencode arch=compute_${with_cuda_arch@%:@sm_},code=$with_cuda_arch"])
  AC_MSG_CHECKING([whether $NVCC and $CC build for $with_cuda_arch])
  echo 'extern "C" __global__ void tr_kernel(int *x) { *x = 1; }
extern "C" int tr_launch(int *x) { tr_kernel<<<1, 1>>>(x); return (int)cudaGetLastError(); }' >conftest.cu
  tr_save_LIBS=$LIBS
  AS_IF([$NVCC -std=c++17 $NVCC_ARCH $NVCC_FLAGS -Xcompiler -fPIC,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics -c -o conftest_cuda.$OBJEXT conftest.cu >&AS_MESSAGE_LOG_FD 2>&1], [
    LIBS="conftest_cuda.$OBJEXT $CUDA_LIBS $LIBS"
    AC_LINK_IFELSE([AC_LANG_PROGRAM([[int tr_launch(int *x);]], [[return tr_launch(0);]])],
      [tr_found_cuda="`$NVCC --version | sed -n 's/.*release \(@<:@0-9.@:>@*\).*/\1/p'` for $with_cuda_arch ($NVCC)"])
  ])
  LIBS=$tr_save_LIBS
  rm -f conftest.cu conftest_cuda.$OBJEXT
  AS_IF([test "$tr_found_cuda" = no], [AC_MSG_RESULT([no])], [AC_MSG_RESULT([yes])])
])

AC_DEFUN([TR_WITH_NCCL], [
  AC_ARG_WITH([nccl], [AS_HELP_STRING([--with-nccl=DIR], [NCCL; refused by this version @<:@no@:>@])],
    [], [with_nccl=no])
  AS_IF([test "$with_nccl" != no],
    [AC_MSG_ERROR([--with-nccl: trireme AC_PACKAGE_VERSION has no NCCL communicator; configure without it])])
  tr_found_nccl="no (this version has ranks on CPUs)"
])
