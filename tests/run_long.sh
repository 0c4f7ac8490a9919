#!/bin/sh
# What make check-long runs, from Makefile.am, which sets TRIREME, TR_SRCDIR and TR_BUILDDIR (the long campaigns are
# run_campaign.sh's). Each step is one line on stdout; its output is in TR_BUILDDIR/long/STEP.log, its counts are in
# TR_BUILDDIR/long/results as "STEP PASSED FAILED SKIPPED". Builds are kept there, so that a second run is short.
# make check-long STEPS='thread plain' runs these alone.
# shellcheck disable=SC2317 # functions are called by name
set -u
: "${TRIREME:?run it as make check-long}" "${TR_SRCDIR:?}" "${TR_BUILDDIR:?}"
long=$TR_BUILDDIR/long
model=$TR_SRCDIR/models/tiny
mkdir -p "$long"
: >"$long/results"
all_good=0

case ${MAKEFLAGS-} in
*j*) parallel= ;;
*) parallel=-j$(getconf _NPROCESSORS_ONLN) ;;
esac

# step NAME COMMAND...: run it; 0 is good, 77 is skipped with the last line of output as the reason. COMMAND may leave its own
# counts in long/counts.
step()
{
    name=$1
    shift
    case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
    rm -f "$long/counts"
    begun=$(date +%s)
    "$@" >"$long/$name.log" 2>&1
    status=$?
    seconds=$(($(date +%s) - begun))
    case $status in
    0) word=PASS counts='1 0 0' ;;
    77) word="SKIP ($(tail -n 1 "$long/$name.log"))" counts='0 0 1' ;;
    *) word=FAIL counts='0 1 0' all_good=1 ;;
    esac
    if [ -f "$long/counts" ]; then
        read -r p f s <"$long/counts"
        # A build that failed before its tests still is a failure.
        [ "$status" -eq 0 ] || [ "$f" -gt 0 ] || f=1
        counts="$p $f $s"
    fi
    echo "$name $counts" >>"$long/results"
    echo "$name: $word, $seconds s"
    if [ "$word" = FAIL ]; then
        tail -n 30 "$long/$name.log" | sed 's/^/    /'
        echo "    (all of it: $long/$name.log)"
    fi
}

# sub_make NAME TARGETS -- CONFIGURE-ARGUMENTS...: build in long/NAME and make TARGETS there.
sub_make()
{
    dir=$long/$1
    targets=$2
    shift 3
    mkdir -p "$dir" && cd "$dir" || return 1
    [ -f Makefile ] || "$TR_SRCDIR/configure" "$@" || return 1
    rm -f tests/*.trs
    # shellcheck disable=SC2086 # lists of words
    make $parallel all && make $parallel $targets
    made=$?
    [ "$made" -eq 0 ] || cat test-suite.log 2>/dev/null
    sh "$TR_SRCDIR/tests/count.sh" . >"$long/counts"
    [ "$(cat "$long/counts")" != '0 0 0' ] || rm "$long/counts"
    return "$made"
}

# whole_job NAME: the quickstart's requests with the program of long/NAME.
whole_job()
{
    rm -f "$long/$1"/job.jsonl*
    "$long/$1/trireme" batch -m "$model" -i "$TR_SRCDIR/jobs/quickstart.jsonl" -o "$long/$1/job.jsonl"
}

need()
{
    command -v "$1" >/dev/null && return 0
    echo "$1 is not installed"
    return 1
}

style_step()
{
    cd "$TR_SRCDIR" || return 1
    complaints=$(find src kernels mpi tests -name '*.[ch]' -exec awk '
        FNR == 801 { print FILENAME ": more than 800 lines" }
        /^#include/ && FILENAME ~ /c$/ && !seen[FILENAME]++ && $2 != "<config.h>" {
            print FILENAME ": the first #include is not <config.h>"
        }' {} +)
    # A program and a script of one name have one log: make would run one of them.
    complaints="$complaints$(for f in tests/test_*.sh; do [ ! -e "${f%.sh}.c" ] || echo "$f: there is a ${f%.sh}.c"; done)"
    [ -z "$complaints" ] || { echo "$complaints" && return 1; }
    need shellcheck || return 77
    shellcheck -x bootstrap jobs/install-deps jobs/quickstart jobs/*.sbatch tests/run tests/*.sh tests/fuzz/run.sh || return 1
    need clang-format-14 || return 77
    complaints=$(find src kernels mpi tests -name '*.[ch]' -exec clang-format-14 --dry-run {} + 2>&1 |
        sed -n 's/:.* code should be clang-formatted .*/: not as clang-format-14 writes it/p' | sort -u)
    [ -z "$complaints" ] || { echo "$complaints" && return 1; }
}

clang_step()
{
    need clang || return 77
    sub_make clang 'check TESTS=' -- --without-cuda CC=clang --enable-werror
}

address_step()
{
    sub_make address check -- --without-cuda --enable-sanitize=address,undefined CFLAGS='-O2 -g' && whole_job address
}

# The team's threads are not the ones under test, and the thread sanitizer does not see libgomp's locks.
thread_step()
{
    export OMP_NUM_THREADS=1
    sub_make thread check-threads -- --without-cuda --enable-sanitize=thread CFLAGS='-O2 -g' && whole_job thread
    status=$?
    unset OMP_NUM_THREADS
    return "$status"
}

# Without SIMD the kernels differ and nothing else does.
plain_step()
{
    sub_make plain check-kernels -- --without-cuda --disable-simd --enable-werror
}

kill_step()
{
    "$TR_SRCDIR/tests/run_kill.sh" "$TRIREME" "$model" "$1"
}

# The same of a run with a profile: every killed one's file must be readable.
profile_kill_step()
{
    "$TR_SRCDIR/tests/run_profile_kill.sh" "$TRIREME" "$model" "$1"
}

# What several ranks give, on many grids, on two hosts, and when one of them is killed or stopped.
compare=$TR_BUILDDIR/tests/compare_records

grids_step()
{
    "$TR_SRCDIR/tests/run_grids.sh" "$TRIREME" "$model" "$compare"
}

two_hosts_step()
{
    COMPARE=$compare "$TR_SRCDIR/tests/run_two_hosts.sh" "$TRIREME" "$model"
}

rank_kill_step()
{
    COMPARE=$compare "$TR_SRCDIR/tests/run_rank_kill.sh" "$TRIREME" "$model" "$1"
}

slurm_step()
{
    COMPARE=$compare "$TR_SRCDIR/tests/run_slurm.sh" "$TRIREME" "$model"
}

# What stops and faults leave, on two ranks too.
stop_step()
{
    COMPARE=$compare "$TR_SRCDIR/tests/run_stop.sh" "$TRIREME" "$model" 1500 4
}

rank_faults_step()
{
    COMPARE=$compare "$TR_SRCDIR/tests/run_rank_faults.sh" "$TRIREME" "$model"
}

straggler_step()
{
    MPIEXEC=${MPIEXEC-mpirun} "$TR_SRCDIR/tests/run_straggler.sh"
}

faults_step()
{
    "$TR_SRCDIR/tests/run_faults.sh" "$TRIREME" "$model"
}

# The n-th allocation, read, write, ... fails; "--quick": in strides.
nth_step()
{
    "$TR_SRCDIR/tests/run_nth.sh" "$TRIREME" "$model" "$@"
}

# The n-th allocation of one rank of two.
nth_ranks_step()
{
    "$TR_SRCDIR/tests/run_rank_nth.sh" "$TRIREME" "$model" "$1"
}

fuzz_step()
{
    "$TR_SRCDIR/tests/fuzz/run.sh" -n 20000 -t 30 -w "$long/fuzz"
}

distcheck_step()
{
    # All tests but those that wait: whatever they need must be in the tarball.
    # shellcheck disable=SC2016,SC2086 # for make; a list
    make -C "$TR_BUILDDIR" $parallel distcheck 'TESTS=$(test_programs) $(quick_scripts)'
}

step style style_step
step kill-20 kill_step 20
step profile-kill-5 profile_kill_step 5
step grids grids_step
step two-hosts two_hosts_step
step rank-kill-3 rank_kill_step 3
step slurm slurm_step
step stop stop_step
step rank-faults rank_faults_step
step straggler straggler_step
step faults faults_step
step nth nth_step --quick
step nth-ranks-10 nth_ranks_step 5
step fuzz fuzz_step
step clang clang_step
step address address_step
step thread thread_step
step plain plain_step
step distcheck distcheck_step
exit "$all_good"
