#!/bin/bash
# Kill (-9) a rank of a job of 4 at a random moment, run the same command again, and so on N times; then the same with SIGSTOP,
# which only the watchdog ends. Whenever a job gets through, OUT must hold the records of an uninterrupted run, each once and
# to the last digit of every log-probability. Grids take turns. After a
# kill the job must be over within 10 s, with the launcher's 137 and the rank's number in its message; after a stop within the
# step timeout and 5 s more, with 86 and a message that names the rank. No process of the job may be left.
#
# usage: run_rank_kill.sh TRIREME MODEL N [SEED]      needs COMPARE (tests/compare_records)
set -u

if [ $# -lt 3 ]; then
    echo "usage: $0 TRIREME MODEL N [SEED]" >&2
    exit 2
fi
trireme=$1 model=$2 wanted=$3
RANDOM=${4:-1}
mpiexec=${MPIEXEC-mpirun}
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
command -v "${mpiexec:-none}" >/dev/null || { echo 'no MPI launcher was found'; exit 77; }
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_hwloc_base_binding_policy=none
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-rank-kill.XXXXXX") || exit 1
job=
trap '[ -z "$job" ] || kill "$job" 2>/dev/null; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
timeout_s=5 kill_limit_ms=10000 stop_limit_ms=10000
grids=('--tp 2 --dp 2' '--pp 2 --cp 2 --ep 1' '--pp 2 --tp 2' '--dp 4' '--cp 2 --tp 2 --cp-mode in-seq-split')

awk 'function next_id() { seed = (seed * 1103515245 + 12345) % 2147483648; return int(seed / 65536) }
BEGIN {
    seed = 17
    for (i = 0; i < 72; i++) {
        prompt = 40 + next_id() % 1800
        for (n = next_id() % 160; n > 0; n--) prompt = prompt ", " 40 + next_id() % 1800
        more = i % 3 ? "\"temperature\": 0.9, \"top_p\": 0.97, \"n\": 2" : "\"temperature\": 0, \"logprobs\": 2"
        printf "{\"custom_id\": \"request-%03d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": [%s], " \
            "\"max_tokens\": %d, \"return_token_ids\": true, %s}}\n", i, prompt, 8 + next_id() % 40, more
    }
}' >"$dir/in"

# The launcher in the background; its process id in $job.
start() { # OUT OPTION...
    local out=$1
    shift
    "$mpiexec" -n 4 "$trireme" batch -m "$model" -i "$dir/in" -o "$out" --kv-dtype f32 --max-model-len 512 \
        --max-batch-tokens 128 --max-sequences 6 "$@" >"$dir/log" 2>&1 &
    job=$!
}

fail() {
    echo "$*"
    sed 's/^/    /' "$dir/log"
    kill -9 "$job" 2>/dev/null
    exit 1
}

now_ms() {
    local t=$EPOCHREALTIME
    echo $(((${t%.*} * 1000000 + 10#${t#*.}) / 1000))
}

pids() { # of the ranks that there are
    pgrep -P "$job" -x trireme
}

rank_pid() { # RANK
    local pid
    for pid in $(pids); do
        if tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$1"; then
            echo "$pid"
            return
        fi
    done
}

# Wait for what the job leaves: its launcher's status into $status, the time since $begun_ms into $took_ms.
await_end() {
    local limit_ms=$1
    while kill -0 "$job" 2>/dev/null; do
        [ $(($(now_ms) - begun_ms)) -le $((limit_ms + 20000)) ] || fail "$what: the job does not end"
        sleep 0.02
    done
    wait "$job"
    status=$?
    took_ms=$(($(now_ms) - begun_ms))
}

check_whole() { # OUT GRID
    "$COMPARE" "$dir/whole.$2" "$1" >"$dir/said" || { cat "$dir/said"; fail "$what: the records are not those of an uninterrupted run"; }
}

for g in "${!grids[@]}"; do
    # shellcheck disable=SC2086 # a list of options
    start "$dir/whole.$g" ${grids[$g]}
    what="uninterrupted, ${grids[$g]}"
    wait "$job" || fail "$what: exit status $?"
done

# campaign KILL|STOP
campaign() {
    local signal=$1 n=0 g=0 runs=0 finished=0 late=0 worst_ms=0 sum_ms=0 lines
    local -a hit=(0 0 0 0)
    rm -f "$dir/out" "$dir/out".*
    while :; do
        # shellcheck disable=SC2086
        start "$dir/out" --step-timeout "$timeout_s" ${grids[$g]}
        what="$signal $((n + 1)), ${grids[$g]}"
        runs=$((runs + 1))
        if [ "$n" -lt "$wanted" ]; then
            local rank=$((RANDOM % 4)) pid='' before=0
            [ -s "$dir/out" ] && before=$(wc -l <"$dir/out")
            if [ "$signal" = STOP ]; then # starting is not watched: some record must have been written
                while kill -0 "$job" 2>/dev/null; do
                    [ -s "$dir/out" ] && [ "$(wc -l <"$dir/out")" -gt "$before" ] && break
                    sleep 0.02
                done
                sleep "0.$((RANDOM % 8))"
            else
                sleep "$((RANDOM % 3)).$((RANDOM % 10))"
            fi
            pid=$(rank_pid "$rank")
            lines=0
            [ -s "$dir/out" ] && lines=$(wc -l <"$dir/out")
            # Nor is ending: a rank that has nothing left to do is not missed.
            if [ -n "$pid" ] && { [ "$signal" = KILL ] || [ "$lines" -lt 60 ]; } && kill "-$signal" "$pid" 2>/dev/null; then
                begun_ms=$(now_ms)
                if [ "$signal" = KILL ]; then
                    await_end "$kill_limit_ms"
                else
                    await_end $((timeout_s * 1000 + stop_limit_ms))
                fi
                if [ "$status" -ne 0 ]; then # 0: it had written everything
                    n=$((n + 1))
                    hit[rank]=$((hit[rank] + 1))
                    sum_ms=$((sum_ms + took_ms))
                    [ "$took_ms" -le "$worst_ms" ] || worst_ms=$took_ms
                    if [ "$signal" = KILL ]; then
                        [ "$status" -eq 137 ] || fail "$what: exit status $status"
                        grep -q "rank $rank with PID" "$dir/log" || fail "$what: nobody names rank $rank"
                        [ "$took_ms" -le "$kill_limit_ms" ] || late=$((late + 1))
                    else
                        [ "$status" -eq 86 ] || fail "$what: exit status $status"
                        grep -q "rank $rank on .* does not respond" "$dir/log" || fail "$what: nobody names rank $rank"
                        [ "$took_ms" -le $((timeout_s * 1000 + 5000)) ] || late=$((late + 1))
                    fi
                    for pid in $(pids); do
                        fail "$what: process $pid is left"
                    done
                    continue
                fi
            fi
        fi
        wait "$job" 2>/dev/null
        status=$?
        [ "$status" -eq 0 ] || [ "$status" -eq 127 ] || fail "$what: exit status $status where it should have finished"
        finished=$((finished + 1))
        check_whole "$dir/out" "$g"
        [ "$n" -ge "$wanted" ] && break
        rm -f "$dir/out" "$dir/out".*
        g=$(((g + 1) % ${#grids[@]}))
    done
    echo "$signal: $n times (ranks 0 to 3: ${hit[*]}) in $runs runs, $finished jobs finished, each with the records of an" \
        "uninterrupted one; to the end of the job $((sum_ms / (n ? n : 1))) ms on average, $worst_ms ms at most, $late too late"
    [ "$late" -eq 0 ]
}

campaign KILL || exit 1
campaign STOP
