# SYNOPSIS
#   TR_WITH_MPI
#
# DESCRIPTION
#   MPI, required.  CC stays the plain compiler (a wrapper as CC stands in the way of sanitizers and of
#   linking with nvcc); the flags are asked from the wrapper, in Open MPI's or MPICH's way, and proved by
#   a link.
#
# USAGE
#   (absent)        mpicc from PATH, or MPICC
#   --with-mpi=DIR  DIR/bin/mpicc and DIR/bin/mpirun, and no others
#   --without-mpi   an error
#
# VARIABLES
#   MPICC, MPIEXEC         the wrapper asked, the launcher for tests (may be empty)
#   MPI_CFLAGS, MPI_LIBS   flags
#   tr_found_mpi           for the summary

AC_DEFUN([TR_WITH_MPI], [
  AC_ARG_VAR([MPICC], [MPI C compiler wrapper, asked for flags only])
  AC_ARG_VAR([MPIEXEC], [MPI launcher for make check])
  AC_ARG_WITH([mpi], [AS_HELP_STRING([--with-mpi=DIR], [where MPI is installed @<:@mpicc in PATH@:>@])],
    [], [with_mpi=yes])
  tr_path=$PATH
  AS_CASE([$with_mpi],
    [no], [AC_MSG_ERROR([trireme cannot be built without MPI])],
    [yes], [],
    [tr_path=$with_mpi/bin
     AS_IF([test ! -x "$with_mpi/bin/mpicc"], [AC_MSG_ERROR([--with-mpi: there is no $with_mpi/bin/mpicc])])])
  AC_PATH_PROG([MPICC], [mpicc], [], [$tr_path])
  AC_PATH_PROGS([MPIEXEC], [mpirun mpiexec], [], [$tr_path])
  AS_IF([test -z "$MPICC"], [AC_MSG_ERROR([mpicc not found; give --with-mpi=DIR or MPICC=])])

  AC_CACHE_CHECK([for MPI compile flags], [tr_cv_mpi_cflags],
    [tr_cv_mpi_cflags=`$MPICC --showme:compile 2>/dev/null ||
       $MPICC -compile-info 2>/dev/null | sed 's/^[[^ ]]* *//; s/ -c\b//'`])
  AC_CACHE_CHECK([for MPI link flags], [tr_cv_mpi_libs],
    [tr_cv_mpi_libs=`$MPICC --showme:link 2>/dev/null ||
       $MPICC -link-info 2>/dev/null | sed 's/^[[^ ]]* *//'`])
  AC_SUBST([MPI_CFLAGS], [$tr_cv_mpi_cflags])
  AC_SUBST([MPI_LIBS], [$tr_cv_mpi_libs])

  AC_MSG_CHECKING([whether a program with MPI links])
  tr_save_CFLAGS=$CFLAGS tr_save_LIBS=$LIBS
  CFLAGS="$MPI_CFLAGS $CFLAGS" LIBS="$MPI_LIBS $LIBS"
  AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <mpi.h>]],
      [[int level; return MPI_Init_thread(0, 0, MPI_THREAD_FUNNELED, &level);]])],
    [AC_MSG_RESULT([yes])],
    [AC_MSG_RESULT([no])
     AC_MSG_ERROR([MPI is not usable with the flags of $MPICC; config.log has the details])])
  CFLAGS=$tr_save_CFLAGS LIBS=$tr_save_LIBS
  tr_found_mpi=`$MPICC --showme:version 2>/dev/null | sed 's/^[[^:]]*: //; s/ (.*//'`
  AS_IF([test -z "$tr_found_mpi"], [tr_found_mpi="as $MPICC says"])
])
