# SYNOPSIS
#   TR_WITH_HDF5
#
# DESCRIPTION
#   HDF5's C library, required.  One rank writes a profile, so the serial build is enough and preferred.
#   Debian ships hdf5-serial and hdf5-openmpi side by side, and its plain name hdf5 follows an
#   alternative: it is asked last, for other systems.  Needs TR_WITH_MPI before it, since the header of a
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
  CPPFLAGS=$tr_hdf5_save
])
