# SYNOPSIS
#   TR_WITH_CUDA
#   TR_WITH_NCCL
#
# DESCRIPTION
#   The CUDA backend, and its communicator.  The backend needs nvcc 12.4 or later and the runtime library, which is linked
#   statically; the driver is looked for when the program runs, so that one binary serves nodes with and without GPUs.
#   NCCL, 2.28 or later, is what several ranks with a GPU each need.
#
# USAGE
#   (absent)               built where nvcc is found: on PATH, in CUDA_HOME or in /usr/local/cuda
#   --with-cuda=DIR        the toolkit in DIR; an error where it is not there
#   --without-cuda         build the CPU backend alone
#   --with-cuda-arch=ARCH  the GPUs it is for (default sm_90a, Hopper; nothing else in this version)
#   --with-nccl=DIR        NCCL in DIR (include/nccl.h, lib or lib64); an error where it is not there, or without CUDA
#   --with-nccl            where the compiler finds it
#   neither                likewise, or beside CUDA; where there is none one rank has a GPU, and any number are on CPUs
#   --without-nccl         that, whatever there is
#
# VARIABLES
#   NVCC, NVCC_FLAGS, CUDA_CFLAGS, CUDA_LIBS, NCCL_CFLAGS, NCCL_LIBS; set on the command line they are taken as they are
#   tr_found_cuda, tr_found_nccl; HAVE_CUDA, HAVE_NCCL in config.h and for Automake; TR_CUDA_ARCH in config.h

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
  AC_ARG_VAR([NCCL_CFLAGS], [C compiler flags for NCCL])
  AC_ARG_VAR([NCCL_LIBS], [linker flags for NCCL])
  AC_ARG_WITH([nccl],
    [AS_HELP_STRING([--with-nccl=DIR], [NCCL in DIR, for several ranks with a GPU each @<:@where CUDA and NCCL are found@:>@])],
    [], [with_nccl=auto])
  tr_found_nccl="no (several ranks are on CPUs)"
  AS_CASE([$with_nccl,$tr_found_cuda],
    [no,*|auto,no], [],
    [*,no], [AC_MSG_ERROR([--with-nccl: there is no CUDA backend for it to serve])],
    [auto,*], [
      # where the compiler looks, then beside CUDA
      _TR_NCCL_LIBRARY([])
      AS_IF([test $tr_nccl_links = no && test -e "$tr_cuda_root/include/nccl.h"],
        [_TR_NCCL_LIBRARY([$tr_cuda_root])])],
    [_TR_NCCL_LIBRARY([$with_nccl])
     AS_CASE([$tr_found_nccl],
       [no*], [AC_MSG_ERROR([--with-nccl=$with_nccl: no NCCL of 2.28 or later that can be linked with; config.log says why])])])
  AS_CASE([$tr_found_nccl],
    [no*], [with_nccl=no],
    [AC_DEFINE([HAVE_NCCL], [1], [Define to 1 if communicators over NCCL are built.])])
  AM_CONDITIONAL([HAVE_NCCL], [test "$with_nccl" != no])
])

# _TR_NCCL_LIBRARY(DIR): tr_found_nccl, NCCL_CFLAGS and NCCL_LIBS where NCCL in DIR can be linked with; else they are as before.
AC_DEFUN([_TR_NCCL_LIBRARY], [
  tr_nccl_dir="$1"
  tr_given_nccl_cflags=$NCCL_CFLAGS
  tr_given_nccl_libs=$NCCL_LIBS
  AS_CASE([$tr_nccl_dir],
    [*/*], [
      AS_VAR_SET_IF([NCCL_CFLAGS], [], [NCCL_CFLAGS="-isystem $tr_nccl_dir/include"])
      tr_nccl_lib=$tr_nccl_dir/lib
      AS_IF([test -e "$tr_nccl_dir/lib64/libnccl.so"], [tr_nccl_lib=$tr_nccl_dir/lib64])
      AS_VAR_SET_IF([NCCL_LIBS], [], [NCCL_LIBS="-L$tr_nccl_lib -Wl,-rpath,$tr_nccl_lib -lnccl"])],
    [AS_VAR_SET_IF([NCCL_LIBS], [], [NCCL_LIBS=-lnccl])])
  AS_CASE([$tr_nccl_dir],
    [*/*], [AC_MSG_CHECKING([for NCCL 2.28 or later in $tr_nccl_dir])],
    [AC_MSG_CHECKING([for NCCL 2.28 or later])])
  tr_save_LIBS=$LIBS
  tr_save_CFLAGS=$CFLAGS
  CFLAGS="$CFLAGS $CUDA_CFLAGS $NCCL_CFLAGS"
  LIBS="$NCCL_LIBS $CUDA_LIBS $LIBS"
  AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <nccl.h>
#if NCCL_VERSION_CODE < NCCL_VERSION(2, 28, 0)
#error "older than 2.28"
#endif]], [[ncclConfig_t c = NCCL_CONFIG_INITIALIZER; int v; c.commName = ""; return (int)ncclGetVersion(&v);]])],
    [tr_nccl_links=yes], [tr_nccl_links=no])
  AS_CASE([$tr_nccl_dir],
    [*/*], [AS_IF([test ! -e "$tr_nccl_dir/include/nccl.h"], [tr_nccl_links=no])])
  AC_MSG_RESULT([$tr_nccl_links])
  tr_nccl_version=`printf '#include <nccl.h>\nTR NCCL_MAJOR NCCL_MINOR NCCL_PATCH\n' >conftest.c
    $CC -E -P $CFLAGS conftest.c 2>/dev/null | tr '\n' ' ' |
      sed -n 's/.*TR  *\(@<:@0-9@:>@*\)  *\(@<:@0-9@:>@*\)  *\(@<:@0-9@:>@*\).*/\1.\2.\3/p'`
  AS_IF([test $tr_nccl_links = yes], [tr_found_nccl="$tr_nccl_version ($NCCL_LIBS)"], [
    NCCL_CFLAGS=$tr_given_nccl_cflags
    NCCL_LIBS=$tr_given_nccl_libs])
  rm -f conftest.c
  LIBS=$tr_save_LIBS
  CFLAGS=$tr_save_CFLAGS
])
