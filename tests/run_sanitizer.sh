#!/bin/bash
# For a machine with a GPU and a build with --with-cuda: the tests of the CUDA backend under compute-sanitizer, each test in a
# process of its own (racecheck keeps what a process did in memory: a program of many tests ends for want of it), a line for each.
#
#   memcheck    addresses and leaks. Calls that fail are the tests' own business: some fail on purpose
#   racecheck   hazards in shared memory. For a build with NVCC_FLAGS=-DTR_CUDA_EVERY_LANE: what it says otherwise of hand-overs by
#               one lane is explained in kernels/cuda/hopper.cuh, and tests/cuda/race_pattern.cu shows it
#   synccheck   barriers
#
# usage: run_sanitizer.sh [-j JOBS] TOOL [PROGRAM...]
# Programs: tests/test_cuda_* of the build by default. -j: tests at a time (default 1). Exit status 1 if a line is FAIL, 77 where
# there is nothing to run on. TR_BUILDDIR, TR_SRCDIR as in make check; TR_JOB_S: seconds for a test (default 300); TR_KEEP: a
# folder for the reports; TR_LAUNCHES: kernels of a test that the tool looks at, from the first on (default: all). racecheck keeps
# all that it sees: test_real_* of test_cuda_attention takes 100 GB of the host's memory in 100 launches, one at a time; of
# test_cuda_model test_recorded_ahead alone came to an end, the others ran out of 125 GB, and with TR_LAUNCHES=500 had no verdict
# either (an error, or killed). Where the tool looks at some kernels by name alone it fails itself. synccheck takes all of the
# GPU's memory where a whole model runs: one at a time, and test_cuda_model without a verdict.
set -u

jobs=1
while getopts j: option; do
    case $option in
    j) jobs=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
tool=${1-}
options=()
case $tool in
memcheck) options=(--leak-check full --report-api-errors no) && shift ;;
racecheck | synccheck) shift ;;
*) echo "usage: ${0##*/} [-j JOBS] memcheck|racecheck|synccheck [PROGRAM...]" >&2; exit 2 ;;
esac
[ -z "${TR_LAUNCHES-}" ] || options+=(--launch-count "$TR_LAUNCHES")
build=${TR_BUILDDIR:-$PWD}
src=${TR_SRCDIR:-$(cd "$(dirname "$0")/.." && pwd)}
export TR_GPUS=${TR_GPUS-all} TRIREME_VECTORS=${TRIREME_VECTORS-$src/tests/vectors}
command -v compute-sanitizer >/dev/null || { echo 'skipped: no compute-sanitizer in PATH'; exit 77; }
nvidia-smi -L 2>/dev/null | grep -q . || { echo 'skipped: no GPU'; exit 77; }
if [ $# -eq 0 ]; then
    set -- attention dummy head many model ops vectors
    set -- "${@/#/$build/tests/test_cuda_}"
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-sanitizer.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT

# Reports of a log: its last summary, or none if the tool did not come to its end.
reports() { # LOG
    sed -n -E 's/^=+ (ERROR|RACECHECK) SUMMARY: ([0-9]+) (errors?|hazards?).*/\2/p' "$1" | tail -n 1
}

one() { # PROGRAM TEST
    local log=$dir/${1##*/}.$2 begun=$SECONDS status found verdict=PASS
    timeout -k 5 "${TR_JOB_S:-300}" compute-sanitizer --tool "$tool" "${options[@]}" --print-limit 20 "$1" "$2" >"$log" 2>&1
    status=$?
    found=$(reports "$log")
    if [ "$status" -ne 0 ] || [ "${found:-x}" != 0 ] || ! grep -q 'PASSED.* 1 test' "$log"; then
        verdict=FAIL
        [ -z "${TR_KEEP-}" ] || cp "$log" "$TR_KEEP"
    fi
    printf '%-4s  %-20s %-28s %3d s  %s reports, status %d\n' "$verdict" "${1##*/}" "$2" $((SECONDS - begun)) "${found:-no end:}" \
        "$status" | tee -a "$dir/rows"
}

for program; do
    for name in $("$program" -l); do
        while [ "$(jobs -pr | wc -l)" -ge "$jobs" ]; do
            wait -n
        done
        one "$program" "$name" &
    done
done
wait
[ -s "$dir/rows" ] || { echo "no tests in $*"; exit 1; }
printf '%s: %d tests, %d FAIL\n' "$tool" "$(wc -l <"$dir/rows")" "$(grep -c '^FAIL' "$dir/rows")"
! grep -q '^FAIL' "$dir/rows"
