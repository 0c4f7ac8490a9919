# shellcheck shell=sh disable=SC2034,SC2154 # variables of the scripts that source it
# What the test scripts share: . "$(dirname "$0")/lib.sh"
#
# Nothing here depends on how fast the machine is. What must come is waited for as long as anybody would (patience_s), and what
# must not have gone on meanwhile is held: SIGSTOP to every rank as soon as the awaited thing is there, SIGCONT when the test has
# done its part. $job is the process in the background, the program itself or its launcher; $dir the folder of the test.

job='' dir='' cases=0 failed=0
patience_s=600

# skip REASON...: nothing can be tested here.
skip() {
    echo "$*"
    exit 77
}

# mpi_environment: more ranks than cores, of one thread each, by root or not. $mpiexec is the launcher.
mpi_environment() {
    mpiexec=${MPIEXEC-mpirun}
    export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
    if [ "$(id -u)" -eq 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}

# need_mpi: the same, skipped without a launcher.
need_mpi() {
    mpi_environment
    command -v "${mpiexec:-none}" >/dev/null || skip 'no MPI launcher was found'
}

# one_rank: one that is started bare talks to nobody: no daemon that outlives a killed job, no networks to look for, a start of
# 20 ms instead of 300.
one_rank() {
    export OMP_WAIT_POLICY=passive
    export OMPI_MCA_ess_singleton_isolated=1 OMPI_MCA_pml=ob1 OMPI_MCA_btl=self OMPI_MCA_mtl=^ofi
}

# scratch NAME: $dir, MPI's scratch folders in it (killed jobs leave them behind). With the script go folder and job.
scratch() {
    dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-$1.XXXXXX") || exit 1
    export TMPDIR="$dir"
    trap clean EXIT
    trap 'exit 1' HUP INT TERM
}

# shellcheck disable=SC2046 # process ids
clean() {
    if [ -n "$job" ]; then
        kill -9 $(below "$job") "$job" 2>/dev/null
        wait "$job" 2>/dev/null
    fi
    rm -rf "$dir"
}

below() { # PID: all processes that came of it, the last first
    for below in $(pgrep -P "$1"); do
        (below "$below")
        echo "$below"
    done
}

# ---- what came of it

# is NAME WANTED GOT: one check; where it fails, with the log of the job.
is() {
    cases=$((cases + 1))
    if [ "$2" = "$3" ]; then
        echo "ok      $1"
    else
        echo "FAILED  $1: $3 instead of $2"
        [ ! -s "$dir/log" ] || sed 's/^/        /' "$dir/log"
        failed=$((failed + 1))
    fi
}

# has NAME WORDS: the log says it.
has() {
    if grep -q -- "$2" "$dir/log"; then is "$1" yes yes; else is "$1: \"$2\"" said 'not said'; fi
}

# holds NAME COMMAND...: it succeeds.
holds() {
    holds_name=$1
    shift
    if "$@"; then is "$holds_name" yes yes; else is "$holds_name" yes "no ($*)"; fi
}

# done_checking: the exit status of the script.
done_checking() {
    echo "$cases checks, $failed failed"
    [ "$failed" -eq 0 ]
}

# lines FILE: how many, 0 where there is no file.
lines() {
    if [ -s "$1" ]; then wc -l <"$1" | tr -d ' '; else echo 0; fi
}

# more_than N FILE: it has more lines than N.
more_than() {
    [ -s "$2" ] && [ "$(wc -l <"$2")" -gt "$1" ]
}

now_ms() {
    echo $(($(date +%s%N) / 1000000))
}

# slack_ms RANKS: what a limit in seconds may be exceeded by on this machine: ten times what it takes to start and end so many
# processes that do nothing.
slack_ms() {
    slack_from_ms=$(now_ms)
    "$mpiexec" -n "$1" true >/dev/null 2>&1
    echo $((10 * ($(now_ms) - slack_from_ms)))
}

nap() { # MILLISECONDS
    sleep "$(($1 / 1000)).$(printf %03d $(($1 % 1000)))"
}

# ---- jobs in the background

# await COMMAND...: until it succeeds; fails where it does not.
await() {
    await_end_ms=$(($(now_ms) + patience_s * 1000))
    until "$@"; do
        [ "$(now_ms)" -lt "$await_end_ms" ] || return 1
        sleep 0.01
    done
}

# The same, only while the job runs.
await_in_job() {
    await_end_ms=$(($(now_ms) + patience_s * 1000))
    until "$@"; do
        if ! kill -0 "$job" 2>/dev/null || [ "$(now_ms)" -ge "$await_end_ms" ]; then
            "$@" # it may have been the last thing the job did
            return
        fi
        sleep 0.01
    done
}

logged() { # WORDS
    grep -q -- "$1" "$dir/log"
}

# ranks: the process ids of the job's ranks; the job itself where nobody launched it.
ranks() {
    if [ "$(cat "/proc/$job/comm" 2>/dev/null)" = trireme ]; then echo "$job"; else pgrep -P "$job" -x trireme; fi
}

rank_pid() { # RANK
    for rank_pid in $(ranks); do
        tr '\0' '\n' 2>/dev/null <"/proc/$rank_pid/environ" | grep -qE "^(OMPI_COMM_WORLD_RANK|PMI_RANK)=$1\$" || continue
        echo "$rank_pid"
        return
    done
}

# shellcheck disable=SC2046 # process ids
held() {
    kill -STOP $(ranks)
}

# shellcheck disable=SC2046
released() {
    kill -CONT $(ranks)
}

# ended: the job's exit status in $status.
ended() {
    wait "$job" 2>/dev/null
    status=$?
    job=
}
