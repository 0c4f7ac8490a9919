#!/bin/sh
# Test programs that mean something on several ranks: on 2 and on 4, more than there are cores or not.
set -u
if [ -z "${MPIEXEC-}" ]; then
    echo 'no MPI launcher was found'
    exit 77
fi
export OMPI_MCA_rmaps_base_oversubscribe=1 OMP_NUM_THREADS=1
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
status=0
for ranks in 2 4; do
    echo "$ranks ranks"
    timeout 60 "$MPIEXEC" -n "$ranks" "${TR_BUILDDIR:?}/tests/test_agree" || status=1
done
exit "$status"
