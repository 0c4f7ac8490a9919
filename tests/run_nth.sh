#!/bin/sh
# The n-th allocation, open, read, write, sync, truncation or rename of a small batch job fails, for every n the job reaches. The
# exit status must be the documented one, no record may be torn, and the same command must then finish the job with the records
# of an undisturbed run. tests/fault/nth.py has the details.
#
# usage: tests/run_nth.sh TRIREME MODEL [--quick]     --quick: allocations and reads in strides, a minute or two
set -u
if [ $# -lt 2 ]; then
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "skipped: no $python"; exit 77; }
if grep -q '__[a-z]*san_init' "$1"; then
    echo "skipped: a sanitizer's program cannot be preloaded"
    exit 77
fi
dir=$(mktemp -d /dev/shm/trireme-nth.XXXXXX 2>/dev/null || mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
: >"$dir/config.h"
if ! ${CC:-cc} -std=gnu17 -D_GNU_SOURCE -O2 -fPIC -shared -I"$dir" "$here/fault/shim.c" -o "$dir/shim.so" 2>"$dir/log"; then
    cat "$dir/log"
    echo "skipped: the preloaded library cannot be built here"
    exit 77
fi
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
"$python" "$here/fault/nth.py" "$dir" "$@"
