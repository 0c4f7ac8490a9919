# SYNOPSIS
#   TR_SUMMARY
#
# DESCRIPTION
#   What configure found, on one screen, at its end.

AC_DEFUN([TR_SUMMARY], [
  test "$silent" = yes || cat <<TR_END

$PACKAGE_NAME $PACKAGE_VERSION
    compiler        $CC $CFLAGS
    MPI             $tr_found_mpi
    HDF5            $tr_found_hdf5
    jansson         $tr_found_jansson
    PCRE2           $tr_found_pcre2
    hwloc           $tr_found_hwloc
    xxhash          $tr_found_xxhash
    CUDA            $tr_found_cuda
    NCCL            $tr_found_nccl
    PAPI            $tr_found_papi
    libsde          $tr_found_sde
    libmicrohttpd   $tr_found_microhttpd
    OpenBLAS        $tr_found_openblas
    CMocka          $tr_found_cmocka
    SIMD kernels    $tr_simd
    hardening       $tr_hardening
    sanitizers      $tr_sanitize
    install in      $prefix

TR_END
])
