#!/bin/sh
# The n-th allocation of one rank of a small job of two fails: the job must end with the exit code of a lack of memory or of lost
# communication, or do without, never hang, say why, and the same command must then finish it with the records of an undisturbed
# run. The other rank waits in a collective wherever the one has failed alone. tests/fault/rank_nth.py has the details.
#
# usage: tests/run_rank_nth.sh TRIREME MODEL CASES
#   MODEL   its tokenizer and configuration are the pattern for the small model
#   CASES   so many allocations of each rank, spread over its last 1,200: what comes before is the vocabulary
# Environment: MPIEXEC (default mpirun); TR_SHIM, tests/fault/shim.c as a shared library (default: it is built)
set -u
if [ $# -ne 3 ]; then
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3} mpiexec=${MPIEXEC:-mpirun}
command -v "$mpiexec" >/dev/null || { echo "skipped: no MPI launcher"; exit 77; }
command -v "$python" >/dev/null || { echo "skipped: no $python"; exit 77; }
if grep -q -e '__tsan_init' -e '__asan_init' "$1"; then
    echo "skipped: a sanitizer's program cannot be preloaded on one rank alone"
    exit 77
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-rank-nth.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
: >"$dir/config.h"
if [ -n "${TR_SHIM-}" ]; then # built elsewhere
    cp "$TR_SHIM" "$dir/shim.so" || exit 1
elif ! ${CC:-cc} -std=gnu17 -D_GNU_SOURCE -U_FORTIFY_SOURCE -O2 -fPIC -shared -I"$dir" "$here/fault/shim.c" -o "$dir/shim.so" \
    2>"$dir/log"; then
    cat "$dir/log"
    echo "skipped: the preloaded library cannot be built here"
    exit 77
fi
"$python" "$here/fault/small_model.py" "$2" "$dir/model" || exit 1
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
"$python" "$here/fault/rank_nth.py" "$dir" "$1" "$dir/model" "$mpiexec" "$3"
