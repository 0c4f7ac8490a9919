#!/bin/sh
# Build every fuzz target with libFuzzer and the address and undefined-behaviour sanitizers, straight from the sources, and
# run each for a number of executions. Prints a table; a finding is kept in the work folder, and the exit status is 1.
#
# Each target is built twice. One of 32 executions traces comparisons and takes inputs as long as the corpus has (slow, finds
# the way to new branches); the others count branches alone and take short inputs (fast, walks the branches found).
#
# usage: tests/fuzz/run.sh [-n EXECUTIONS] [-t SECONDS] [-j JOBS] [-w FOLDER] [-b] [-x] [TARGET...]
#   -n   executions of each target (default 100000)       -t   about so many seconds in all, the same for each target, of
#                                                               which at least a second's part runs (default: no limit)
#   -j   so many processes at a time (default 1)
#   -w   objects, grown corpora and findings (default ./fuzz-work; kept, so that a second run is short and goes on)
#   -b   only build        -x   run what -b has built in FOLDER, on a machine without the compiler, say
# Environment: FUZZ_CC (default: clang-14 or clang), FUZZ_CFLAGS, FUZZ_LIBS (default: by pkg-config).
# shellcheck disable=SC2086 # lists of flags and of files are split
set -eu
executions=100000 seconds=0 work=fuzz-work jobs=1 only_build='' built=''
usage()
{
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
}
while getopts n:t:j:w:bx option; do
    case $option in
    n) executions=$OPTARG ;;
    t) seconds=$OPTARG ;;
    j) jobs=$OPTARG ;;
    w) work=$OPTARG ;;
    b) only_build=yes ;;
    x) built=yes ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
top=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$work"
work=$(cd "$work" && pwd)
cd "$top"
if [ $# -eq 0 ]; then # the slow ones last
    slow='config tokenize tokenizer_json resume'
    for f in tests/fuzz/fuzz_*.c; do
        f=${f#tests/fuzz/fuzz_}
        case " $slow " in *" ${f%.c} "*) ;; *) set -- "$@" "${f%.c}" ;; esac
    done
    set -- "$@" $slow
fi

# ---- building

# The layers that take bytes from outside; what needs MPI or kernels is not linked.
list_sources()
{
    printf '%s\n' src/engine/progress.c src/engine/request.c
    for f in src/base/*.c src/text/*.c src/batch/*.c src/model/*.c; do
        case $f in
        src/batch/job.c | src/batch/prompt.c) ;; # the engine's callers
        src/model/attention.c | src/model/cache.c | src/model/dummy.c | src/model/ffn.c | src/model/graph.c) ;;
        src/model/layer.c | src/model/memory.c | src/model/model.c | src/model/slice.c | src/model/weights*.c) ;;
        src/model/estimate*.c | src/model/exchange.c | src/model/head.c | src/model/part.c | src/model/stage.c) ;;
        *) echo "$f" ;;
        esac
    done
}

# compile SOURCE OBJECT FLAGS...: where the source is newer
compile()
{
    source=$1 object=$2
    shift 2
    [ -n "$(find "$object" -newer "$source" 2>/dev/null)" ] && return 0
    "$FUZZ_CC" $cflags "$@" -c "$source" -o "$object"
}

# build SUFFIX FLAGS... -- TARGETS...: every target as fuzz_TARGET SUFFIX
build()
{
    suffix=$1 flags=
    shift
    while [ "$1" != -- ]; do
        flags="$flags $1"
        shift
    done
    shift
    obj=$work/obj$suffix objects=
    mkdir -p "$obj"
    newest=$(find src kernels tests/fuzz tests/vectors.h tests/scratch.h -name '*.h' -newer "$obj" 2>/dev/null | head -n 1)
    [ -z "$newest" ] || rm -f "$obj"/*.o
    running=0
    for f in $sources; do
        o=$obj/$(echo "$f" | tr / _ | sed 's/\.c$/.o/')
        compile "$f" "$o" $flags &
        objects="$objects $o" running=$((running + 1))
        [ $((running % jobs)) -ne 0 ] || wait
    done
    for name in "$@"; do
        compile "tests/fuzz/fuzz_$name.c" "$obj/fuzz_$name.o" $flags &
        running=$((running + 1))
        [ $((running % jobs)) -ne 0 ] || wait
    done
    wait
    touch "$obj"
    # A target takes what it needs; a source that wants MPI or kernels is in nobody's way.
    rm -f "$obj/parsers.a"
    ar rcs "$obj/parsers.a" $objects
    for name in "$@"; do
        "$FUZZ_CC" -fsanitize=fuzzer,address,undefined "$obj/fuzz_$name.o" "$obj/parsers.a" $FUZZ_LIBS -lm -lpthread \
            -o "$work/fuzz_$name$suffix"
    done
}

if [ -z "$built" ]; then
    if [ -z "${FUZZ_CC-}" ]; then
        FUZZ_CC=$(command -v clang-14 || command -v clang || true)
    fi
    probe='int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n);
        int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { (void)d; (void)n; return 0; }'
    if [ -z "$FUZZ_CC" ] || ! echo "$probe" | "$FUZZ_CC" -fsanitize=fuzzer,address -x c - -o "$work/probe" 2>/dev/null; then
        echo "skipped: no compiler with libFuzzer (Debian: clang)"
        exit 77
    fi
    packages='jansson libpcre2-8 libxxhash'
    : "${FUZZ_LIBS:=$(pkg-config --libs $packages 2>/dev/null || echo -ljansson -lpcre2-8 -lxxhash)}"
    mkdir -p "$work/include"
    echo '#define _GNU_SOURCE 1' >"$work/include/config.h"
    echo '#define PACKAGE_VERSION "fuzz"' >>"$work/include/config.h"
    cflags="-std=c17 -O2 -g -fno-omit-frame-pointer -fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=all
        -I$work/include -Isrc -I. -DTR_SOURCE_DIR=\"$top\" ${FUZZ_CFLAGS-} $(pkg-config --cflags $packages 2>/dev/null || true)"
    sources=$(list_sources)
    build '' -fno-sanitize-coverage=trace-cmp -- "$@"
    build -cmp -- "$@"
    [ -z "$only_build" ] || exit 0
fi

# ---- running

TMPDIR=$(mktemp -d /dev/shm/trireme-fuzz.XXXXXX 2>/dev/null || mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
: "${TRIREME_VECTORS:=$top/tests/vectors}"
# Short stacks, a small quarantine and no filling: twice as fast, and a report is made again with the full ones.
fast='malloc_context_size=1:quarantine_size_mb=4:thread_local_quarantine_size_kb=64:max_malloc_fill_size=0'
ASAN_OPTIONS=$fast:allocator_release_to_os_interval_ms=-1:${ASAN_OPTIONS-}
export TRIREME_VECTORS ASAN_OPTIONS
mkdir -p "$work/findings" "$work/log"
rm -f "$work"/log/*
begun=$(date +%s)

longest() # TARGET PART: bytes of an input of the fast runs
{
    case $1 in
    tokenizer_json) echo $(($2 % 3 ? 4500 : 1000)) ;; # the 256 bytes have to be in a good one
    config) echo 1400 ;;
    resume | safetensors) echo 1000 ;;
    request) echo 700 ;;
    chat | plan) echo 500 ;;
    jtext) echo 250 ;;
    *) echo 150 ;;
    esac
}

# one TARGET PART RUNS PLACE: one process of a target, the PLACE-th of n_targets; part 0 traces comparisons
one()
{
    name=$1 part=$2 runs=$3 place=$4 program=$work/fuzz_$1 limit=0 dict='' at=$(date +%s)
    length=-max_len=$(longest "$name" "$part")
    [ "$part" -ne 0 ] || program=$program-cmp length=
    [ ! -f "tests/fuzz/$name.dict" ] || dict=-dict=tests/fuzz/$name.dict
    if [ "$seconds" -gt 0 ]; then
        # This target's share ends when those of the targets before it and its own have passed.
        limit=$((begun + seconds * place / n_targets - at))
        [ "$limit" -gt 0 ] || [ "$part" -eq 0 ] || return 0
        [ "$limit" -gt 0 ] || limit=1
    fi
    mkdir -p "$work/corpus/$name"
    "$program" -runs="$runs" -max_total_time="$limit" -seed=$((at + part)) -timeout=20 -rss_limit_mb=3000 -print_final_stats=1 \
        $length -artifact_prefix="$work/findings/$name-" ${dict:+"$dict"} "$work/corpus/$name" "tests/fuzz/corpus/$name" \
        >"$work/log/$name.$part" 2>&1 || echo "exit status $?" >>"$work/log/$name.$part.failed"
    echo $(($(date +%s) - at)) >"$work/log/$name.$part.seconds"
}

# A target is 32 parts. As many workers as jobs take the next part that none of them has taken: mkdir succeeds once.
parts=32 n_targets=$# place=0
for name in "$@"; do
    part=0 place=$((place + 1))
    while [ "$part" -lt "$parts" ]; do
        echo "$name $part $place"
        part=$((part + 1))
    done
done >"$TMPDIR/queue"
worker=0
while [ "$worker" -lt "$jobs" ]; do
    while read -r name part place; do
        ! mkdir "$TMPDIR/taken-$name-$part" 2>/dev/null || one "$name" "$part" $((executions / parts)) "$place"
    done <"$TMPDIR/queue" &
    worker=$((worker + 1))
done
wait

# ---- grown corpora: above a megabyte only what the covered branches need is kept

bytes_of() # FOLDER
{
    find "$1" -type f -exec cat {} + 2>/dev/null | wc -c
}

minimise() # TARGET
{
    grown=$work/corpus/$1
    [ "$(bytes_of "$grown")" -gt 1000000 ] || return 0
    rm -rf "$grown.less" && mkdir "$grown.less"
    "$work/fuzz_$1" -set_cover_merge=1 -timeout=20 -rss_limit_mb=3000 -artifact_prefix="$work/findings/$1-" "$grown.less" \
        "tests/fuzz/corpus/$1" "$grown" >"$work/log/$1.merge" 2>&1 || echo "exit status $?" >>"$work/log/$1.merge.failed"
    [ -n "$(ls "$grown.less")" ] || return 0
    rm -rf "$grown"
    mv "$grown.less" "$grown"
}

for name in "$@"; do
    minimise "$name"
done

# ---- the table

status=0
printf '%-16s %11s %12s %9s %15s %13s %9s\n' target executions 'processor s' inputs/s 'corpus (bytes)' grown findings
for name in "$@"; do
    runs=$(cat "$work/log/$name".[0-9]* | sed -n 's/^stat::number_of_executed_units: *//p' | awk '{ n += $1 } END { print n + 0 }')
    spent=$(cat "$work/log/$name".*.seconds 2>/dev/null | awk '{ n += $1 } END { print n + 0 }')
    found=$(find "$work/findings" -name "$name-*" | wc -l)
    failed=$(find "$work/log" -name "$name.*.failed" | wc -l)
    [ "$found" -ge "$failed" ] || found=$failed
    printf '%-16s %11s %12s %9s %15s %13s %9s\n' "$name" "$runs" "$spent" "$((runs / (spent > 0 ? spent : 1)))" \
        "$(bytes_of "tests/fuzz/corpus/$name")" "$(bytes_of "$work/corpus/$name")" "$found"
    [ "$found" -eq 0 ] && [ "$runs" -gt 0 ] || status=1
done
exit "$status"
