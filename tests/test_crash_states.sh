#!/bin/sh
# What a crash may leave of OUT, in every form: tests/fault/replay.py. Seconds.
#
# usage: tests/test_crash_states.sh [RESUME_STATE]     default: tests/fault/resume_state of the build
set -u
program=${1:-${TR_BUILDDIR:?}/tests/fault/resume_state}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "skipped: no $python"; exit 77; }
if grep -q '__[a-z]*san_init' "$program"; then
    echo "skipped: a sanitizer's program cannot be preloaded"
    exit 77
fi
dir=$(mktemp -d /dev/shm/trireme-crash.XXXXXX 2>/dev/null || mktemp -d) || exit 1
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
"$python" "$here/fault/replay.py" "$program" "$dir/shim.so" "$dir"
