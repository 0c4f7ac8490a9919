# SYNOPSIS
#   TR_WITH_HDF5
#
# DESCRIPTION
#   HDF5's C library, required.  One rank writes a profile, so the serial build is enough and preferred.
#   Debian ships hdf5-serial and hdf5-openmpi side by side, and its plain name hdf5 follows an
#   alternative: it is asked last, for other systems.  Its high-level library (dimension scales) is needed too.  Needs TR_WITH_MPI before it, since the header of a
#   parallel build includes mpi.h.
#
# USAGE
#   (absent)         ask pkg-config for hdf5-serial, hdf5-openmpi, hdf5-mpich, hdf5
#   --with-hdf5=DIR  use DIR/include and DIR/lib
#   --without-hdf5   an error
#
# VARIABLES
#   HDF5_CFLAGS, HDF5_LIBS, tr_found_hdf5

AC_DEFUN([TR_WITH_HDF5], [
  AC_REQUIRE([TR_WITH_MPI])
  tr_hdf5_save=$CPPFLAGS
  CPPFLAGS="$CPPFLAGS $MPI_CFLAGS"
  TR_WITH_PKG([hdf5], [[hdf5-serial], [hdf5-openmpi], [hdf5-mpich], [hdf5]], [hdf5.h], [hdf5],
    [H5get_libversion])
  dnl Dimension scales are in the high-level library, which no .pc file of Debian names.
  AS_CASE([$HDF5_LIBS],
    [*-lhdf5_hl*], [],
    [HDF5_LIBS=`echo "$HDF5_LIBS" | sed 's/-lhdf5/-lhdf5_hl -lhdf5/'`])
  tr_save_CFLAGS=$CFLAGS tr_save_LIBS=$LIBS
  CFLAGS="$HDF5_CFLAGS $CFLAGS" LIBS="$HDF5_LIBS $LIBS"
  AC_MSG_CHECKING([for HDF5's high-level library])
  AC_LINK_IFELSE([AC_LANG_PROGRAM([#include <hdf5.h>
#include <hdf5_hl.h>], [[return (void *)H5DSset_scale == (void *)0;]])],
    [AC_MSG_RESULT([yes])],
    [AC_MSG_RESULT([no])
     AC_MSG_ERROR([libhdf5_hl (hdf5_hl.h, H5DSset_scale) does not link: it comes with HDF5's development package])])
  CFLAGS=$tr_save_CFLAGS LIBS=$tr_save_LIBS
  CPPFLAGS=$tr_hdf5_save
])
