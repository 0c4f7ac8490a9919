#!/bin/sh
# Communicators and shares over MPI on 2, 3 and 4 ranks, more than there are cores or not.
set -u
if [ -z "${MPIEXEC-}" ]; then
    echo 'no MPI launcher was found'
    exit 77
fi
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
status=0
for ranks in 2 3 4; do
    for program in test_comm_mpi test_share; do
        echo "$program on $ranks ranks"
        timeout 100 "$MPIEXEC" -n "$ranks" "${TR_BUILDDIR:?}/tests/$program" || status=1
    done
done
exit "$status"
