#!/bin/sh
# Communicators and shares over MPI on 2, 3 and 4 ranks, more than there are cores or not.
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
status=0
for ranks in 2 3 4; do
    for program in test_comm_mpi test_share; do
        echo "$program on $ranks ranks"
        timeout "$patience_s" "$mpiexec" -n "$ranks" "${TR_BUILDDIR:?}/tests/$program" || status=1
    done
done
exit "$status"
