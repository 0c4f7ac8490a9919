#!/bin/sh
# Build every fuzz target with libFuzzer and the address and undefined-behaviour sanitizers, straight from the sources, and
# run each for a number of executions. Prints a table; a finding is kept in the work folder, and the exit status is 1.
#
# usage: tests/fuzz/run.sh [-n EXECUTIONS] [-t SECONDS] [-w FOLDER] [TARGET...]
#   -n   executions of each target (default 100000)       -t   at most so many seconds each (default: no limit)
#   -w   objects, grown corpora and findings (default ./fuzz-work; kept, so that a second run is short and goes on)
# Environment: FUZZ_CC (default: clang-14 or clang), FUZZ_CFLAGS, FUZZ_LIBS (default: by pkg-config).
# shellcheck disable=SC2086 # lists of flags and of files are split
set -eu
executions=100000 seconds=0 work=fuzz-work
usage()
{
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
}
while getopts n:t:w: option; do
    case $option in
    n) executions=$OPTARG ;;
    t) seconds=$OPTARG ;;
    w) work=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
top=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$work"
work=$(cd "$work" && pwd)
if [ -z "${FUZZ_CC-}" ]; then
    FUZZ_CC=$(command -v clang-14 || command -v clang || true)
fi
probe='int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n); int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { (void)d; (void)n; return 0; }'
if [ -z "$FUZZ_CC" ] || ! echo "$probe" | "$FUZZ_CC" -fsanitize=fuzzer,address -x c - -o "$work/probe" 2>/dev/null; then
    echo "skipped: no compiler with libFuzzer (Debian: clang)"
    exit 77
fi
packages='jansson libpcre2-8 libxxhash'
: "${FUZZ_LIBS:=$(pkg-config --libs $packages 2>/dev/null || echo -ljansson -lpcre2-8 -lxxhash)}"

# The layers that take bytes from outside; what needs MPI or kernels is not linked.
cd "$top"
sources='src/engine/request.c'
for f in src/base/*.c src/text/*.c src/batch/*.c src/model/*.c; do
    case $f in
    src/batch/job.c | src/batch/prompt.c) ;; # the engine's callers
    src/model/attention.c | src/model/cache.c | src/model/dummy.c | src/model/ffn.c | src/model/layer.c) ;;
    src/model/memory.c | src/model/model.c | src/model/slice.c | src/model/weights*.c) ;;
    *) sources="$sources $f" ;;
    esac
done
if [ $# -eq 0 ]; then
    for f in tests/fuzz/fuzz_*.c; do
        f=${f#tests/fuzz/fuzz_}
        set -- "$@" "${f%.c}"
    done
fi

mkdir -p "$work/include" "$work/obj"
echo '#define _GNU_SOURCE 1' >"$work/include/config.h"
echo '#define PACKAGE_VERSION "fuzz"' >>"$work/include/config.h"
cflags="-std=c17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
    -I$work/include -Isrc -I. ${FUZZ_CFLAGS-} $(pkg-config --cflags $packages 2>/dev/null || true)"

# compile SOURCE OBJECT FLAGS...: where it, or any header, is newer
newest=$(find src kernels tests/fuzz tests/vectors.h tests/scratch.h -name '*.h' -newer "$work/obj" 2>/dev/null | head -n 1)
[ -z "$newest" ] || rm -f "$work"/obj/*.o
compile()
{
    source=$1 object=$2
    shift 2
    [ -n "$(find "$object" -newer "$source" 2>/dev/null)" ] && return 0
    "$FUZZ_CC" $cflags "$@" -DTR_SOURCE_DIR="\"$top\"" -c "$source" -o "$object"
}
objects=
for f in $sources; do
    o=$work/obj/$(echo "$f" | tr / _ | sed 's/\.c$/.o/')
    compile "$f" "$o" -fsanitize=fuzzer-no-link
    objects="$objects $o"
done
touch "$work/obj"

TMPDIR=$(mktemp -d /dev/shm/trireme-fuzz.XXXXXX 2>/dev/null || mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
status=0
printf '%-16s %12s %8s %14s %9s\n' target executions seconds 'corpus (bytes)' findings
for name in "$@"; do
    compile "tests/fuzz/fuzz_$name.c" "$work/obj/fuzz_$name.o" -fsanitize=fuzzer-no-link
    "$FUZZ_CC" -fsanitize=fuzzer,address,undefined "$work/obj/fuzz_$name.o" $objects $FUZZ_LIBS -lm -lpthread -o "$work/fuzz_$name"
    mkdir -p "$work/corpus/$name" "$work/findings"
    begun=$(date +%s)
    dict=
    [ ! -f "tests/fuzz/$name.dict" ] || dict=-dict=tests/fuzz/$name.dict
    "$work/fuzz_$name" -runs="$executions" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 -print_final_stats=1 \
        -artifact_prefix="$work/findings/$name-" ${dict:+"$dict"} "$work/corpus/$name" "tests/fuzz/corpus/$name" \
        >"$work/$name.log" 2>&1 || status=1
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$name.log")
    found=$(find "$work/findings" -name "$name-*" | wc -l)
    printf '%-16s %12s %8s %14s %9s\n' "$name" "${runs:-?}" $(($(date +%s) - begun)) \
        "$(cat tests/fuzz/corpus/"$name"/* | wc -c)" "$found"
    [ "$found" -eq 0 ] || status=1
done
exit "$status"
