#!/bin/sh
# The long fault and fuzz campaigns of one process (reliability.md 5 and 6), with one table at the end:
#   overhead     the journal and the check of the logits in percent of a job's time
#   on-off       saving, the watchdog and a profile likewise: jobs with and without, in turn, on a machine with nothing else to do
#   crash        every state in which a crash may leave the journal
#   nth          the n-th allocation, open, read, write, sync, truncation, rename fails, for every n; the same under the address
#   nth-asan     sanitizer, where a leak counts too
#   nth-ranks    the n-th allocation of one rank of two
#   kill         kill -9 at random moments, in independent series
#   kill-ranks   the same of a random rank of two
#   profile-kill the same of 100 runs with a profile, each killed one's file then made readable
#   slurm        jobs on a Slurm of this machine's own: 100 time limits, 20 lost nodes
#   fuzz         every parser's target
# Exit status: 0 nothing found; 1 a finding; 2 usage.
#
# usage: tests/run_campaign.sh [-j JOBS] [-t SECONDS] [-n EXECUTIONS] [-k KILLS] [-s STEPS] [-b DIR | -x DIR]
#   -j   so many processes at a time (default: the cores)   -t   the fuzzers end after so many seconds in all (default: none)
#   -n   executions of each fuzz target (default 10000000)  -k   kills (default 1000)    -s   steps, comma-separated (default: all)
#   -b   only build, into DIR                               -x   run what -b has built in DIR, on another machine, say
# Environment: TR_BUILDDIR, a configured build (for building; make check-campaign sets it). Logs are in DIR/log.
# shellcheck disable=SC2317 # functions are called by name
set -u
jobs=$(getconf _NPROCESSORS_ONLN) seconds=0 executions=10000000 kills=1000 steps=overhead,on-off,crash,nth,nth-asan,nth-ranks,kill,kill-ranks,profile-kill,slurm,fuzz
dir='' build=yes run=yes
usage()
{
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
}
while getopts j:t:n:k:s:b:x: option; do
    case $option in
    j) jobs=$OPTARG ;;
    t) seconds=$OPTARG ;;
    n) executions=$OPTARG ;;
    k) kills=$OPTARG ;;
    s) steps=$OPTARG ;;
    b) dir=$OPTARG run='' ;;
    x) dir=$OPTARG build='' ;;
    *) usage ;;
    esac
done
top=$(cd "$(dirname "$0")/.." && pwd)
[ -n "$dir" ] || dir=${TR_BUILDDIR:?it says where to build}/long/campaign
mkdir -p "$dir/log" "$dir/tmp"
dir=$(cd "$dir" && pwd)
begun=$(date +%s)
export PYTHON="${PYTHON:-python3}" TR_SHIM="$dir/shim.so"
export OMP_WAIT_POLICY=passive

# ---- building

build_all()
{
    make -s -C "${TR_BUILDDIR:?}" -j "$jobs" trireme tests/fault/resume_state tests/fault/nan_check \
        tests/compare_records || return 1
    cp "$TR_BUILDDIR/trireme" "$TR_BUILDDIR/tests/fault/resume_state" "$TR_BUILDDIR/tests/fault/nan_check" \
        "$TR_BUILDDIR/tests/compare_records" "$dir" || return 1
    mkdir -p "$dir/address" && cd "$dir/address" || return 1
    [ -f Makefile ] || "$top/configure" -q --enable-sanitize=address,undefined CFLAGS='-O2 -g' || return 1
    make -s -j "$jobs" trireme && cp trireme "$dir/trireme-asan" || return 1
    cd "$top" || return 1
    mkdir -p "$dir/include" && : >"$dir/include/config.h"
    ${CC:-cc} -std=gnu17 -D_GNU_SOURCE -U_FORTIFY_SOURCE -O2 -fno-omit-frame-pointer -fPIC -shared -I"$dir/include" \
        tests/fault/shim.c -o "$TR_SHIM" || return 1
    tests/fuzz/run.sh -b -j "$jobs" -w "$dir/fuzz"
    status=$?
    [ "$status" -eq 77 ] || return "$status"
}

if [ -n "$build" ]; then
    build_all >"$dir/log/build" 2>&1 || { tail -n 30 "$dir/log/build" >&2; echo "campaign: the build failed" >&2; exit 1; }
    [ -n "$run" ] || exit 0
fi

# ---- the steps

overhead_step()
{
    TMPDIR=$dir/tmp "$PYTHON" "$top/tests/fault/overhead.py" "$dir/trireme" "$top/models/tiny" "$TR_SHIM" "$dir/nan_check" 5 1 --wide
}

on_off_step()
{
    TMPDIR=$dir/tmp "$PYTHON" "$top/tests/fault/on_off.py" "$dir/trireme" "$top/models/tiny" --jobs $(((jobs + 1) / 2)) --pairs 60
}

crash_step()
{
    "$top/tests/test_crash_states.sh" "$dir/resume_state"
}

nth_step()
{
    "$top/tests/run_nth.sh" "$dir/trireme" "$top/models/tiny" -j "$jobs"
}

nth_ranks_step()
{
    "$top/tests/run_rank_nth.sh" "$dir/trireme" "$top/models/tiny" 150
}

nth_asan_step()
{
    "$top/tests/run_nth.sh" "$dir/trireme-asan" "$top/models/tiny" -j "$jobs" --again "$dir/trireme"
}

kill_step()
{
    TMPDIR=$dir/tmp "$top/tests/run_kill.sh" "$dir/trireme" "$top/models/tiny" "$kills" "$(date +%j)" "$jobs"
}

kill_ranks_step()
{
    TMPDIR=$dir/tmp "$top/tests/run_kill.sh" "$dir/trireme" "$top/models/tiny" "$kills" "$(date +%j)" $(((jobs + 1) / 2)) '--tp 2'
}

profile_kill_step()
{
    TMPDIR=$dir/tmp "$top/tests/run_profile_kill.sh" "$dir/trireme" "$top/models/tiny" 100
}

slurm_step()
{
    COMPARE=$dir/compare_records "$top/tests/run_slurm_campaign.sh" "$dir/trireme" "$top/models/tiny"
}

fuzz_step()
{
    left=0
    if [ "$seconds" -gt 0 ]; then
        left=$((seconds - $(date +%s) + begun))
        [ "$left" -gt 0 ] || { echo "no time is left"; return 77; }
    fi
    if [ ! -x "$dir/fuzz/fuzz_request" ]; then
        echo "no compiler with libFuzzer (Debian: clang)"
        return 77
    fi
    "$top/tests/fuzz/run.sh" -x -n "$executions" -t "$left" -j "$jobs" -w "$dir/fuzz"
}

all_good=0
: >"$dir/log/table"
for name in $(echo "$steps" | tr , ' '); do
    at=$(date +%s)
    "$(echo "$name" | tr - _)_step" >"$dir/log/$name" 2>&1
    status=$?
    case $status in
    0) word='no finding' ;;
    77) word=skipped ;;
    *) word=FINDING all_good=1 ;;
    esac
    echo "$name: $word, $(($(date +%s) - at)) s" | tee -a "$dir/log/table"
    # What counts of each step; of a finding, enough to begin with.
    case $status,$name in
    0,nth | 0,nth-asan) grep -E ' reaches |no memory and say|faults, ' "$dir/log/$name" ;;
    0,crash | 0,kill | 0,kill-ranks | 0,slurm) tail -n 2 "$dir/log/$name" ;;
    0,* | 77,*) cat "$dir/log/$name" ;;
    *) grep -E -A 12 'FAILED|^series|not so' "$dir/log/$name" | head -n 40 && tail -n 12 "$dir/log/$name" ;;
    esac | sed 's/^/    /' | tee -a "$dir/log/table"
done
echo "campaign: $([ "$all_good" -eq 0 ] && echo 'no finding' || echo 'FINDINGS'), $(($(date +%s) - begun)) s, $jobs jobs; logs: $dir/log"
exit "$all_good"
