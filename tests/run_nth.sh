#!/bin/sh
# The n-th allocation, open, read, write, sync, truncation or rename of a small batch job fails, for every n the job reaches. The
# exit status must be the documented one, no record may be torn, and the same command must then finish the job with the records
# of an undisturbed run. tests/fault/nth.py has the details. The job's model is made by tests/fault/small_model.py.
# With a program of an address sanitizer build a leak or any other report of it counts as a failure too.
#
# usage: tests/run_nth.sh TRIREME MODEL [--quick] [-j JOBS] [--kinds LIST] [--part I/N] [--again PROGRAM]
#   MODEL     its tokenizer and configuration are the pattern for the small model
#   --quick   allocations and reads in strides, a minute or two        -j   so many runs at a time (default 1)
#   --part    every N-th case, from I (from 0): what several machines share
#   --again   the program that finishes the job afterwards (default TRIREME): a faster build of the same source
# Environment: TR_SHIM, tests/fault/shim.c as a shared library (default: it is built)
set -u
if [ $# -lt 2 ]; then
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
trireme=$1 model=$2
shift 2
command -v "$python" >/dev/null || { echo "skipped: no $python"; exit 77; }
if grep -q '__tsan_init' "$trireme"; then
    echo "skipped: a thread sanitizer's program cannot be preloaded"
    exit 77
fi
dir=$(mktemp -d /dev/shm/trireme-nth.XXXXXX 2>/dev/null || mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
: >"$dir/config.h"
if [ -n "${TR_SHIM-}" ]; then # built elsewhere
    cp "$TR_SHIM" "$dir/shim.so" || exit 1
elif ! ${CC:-cc} -std=gnu17 -D_GNU_SOURCE -U_FORTIFY_SOURCE -O2 -fno-omit-frame-pointer -fPIC -shared -I"$dir" "$here/fault/shim.c" \
    -o "$dir/shim.so" 2>"$dir/log"; then
    cat "$dir/log"
    echo "skipped: the preloaded library cannot be built here"
    exit 77
fi
"$python" "$here/fault/small_model.py" "$model" "$dir/model" || exit 1
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
# One rank talks to nobody: no daemon, no networks to look for. A start takes 20 ms instead of 300.
export OMPI_MCA_ess_singleton_isolated=1 OMPI_MCA_pml=ob1 OMPI_MCA_btl=self OMPI_MCA_mtl=^ofi
: "${LSAN_OPTIONS:=suppressions=$here/lsan.supp:print_suppressions=0}"
export LSAN_OPTIONS ASAN_OPTIONS="verify_asan_link_order=0:detect_leaks=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
"$python" "$here/fault/nth.py" "$dir" "$trireme" "$dir/model" "$@"
