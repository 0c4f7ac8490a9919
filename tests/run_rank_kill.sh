#!/bin/bash
# Kill (-9) a rank of a job of 4 at a random moment, run the same command again, and so on N times; then the same with SIGSTOP,
# which only the watchdog ends. Whenever a job gets through, OUT must hold the records of an uninterrupted run, each once and
# to the last digit of every log-probability. Grids take turns. After a
# kill the job must be over within 10 s, with the launcher's 137 and the rank's number in its message; after a stop within the
# step timeout and 5 s more, with 86 and a message that names the rank; a slow machine has ten starts of a job besides. No process
# of the job may be left.
#
# usage: run_rank_kill.sh TRIREME MODEL N [SEED]      needs COMPARE (tests/compare_records)
set -u

if [ $# -lt 3 ]; then
    echo "usage: $0 TRIREME MODEL N [SEED]" >&2
    exit 2
fi
trireme=$1 model=$2 wanted=$3
RANDOM=${4:-1}
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
need_mpi
scratch rank-kill
timeout_s=5
slack=$(slack_ms 4)
kill_limit_ms=$((10000 + slack)) stop_limit_ms=$((timeout_s * 1000 + 5000 + slack))
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
    exit 1
}

# Wait for what the job leaves: its launcher's status into $status, the time since $begun_ms into $took_ms.
await_end() {
    await_in_job false
    ! kill -0 "$job" 2>/dev/null || fail "$what: the job does not end"
    took_ms=$(($(now_ms) - begun_ms))
    ended
}

# hit_rank SIGNAL RANK: at a random moment, as far as that takes this machine no longer than the job. False where it came too late.
hit_rank() {
    local before pid
    before=$(lines "$dir/out")
    if [ "$1" = STOP ]; then # starting is not watched: some record must have been written
        await_in_job more_than "$before" "$dir/out"
        nap $((RANDOM % (whole_ms / 4 + 1)))
    else
        nap $((RANDOM % whole_ms))
    fi
    pid=$(rank_pid "$2")
    if [ -z "$pid" ] || ! kill "-$1" "$pid" 2>/dev/null; then return 1; fi
    begun_ms=$(now_ms)
    # Nor is ending: a rank that has nothing left to do is not missed.
    if [ "$1" = KILL ] || ! more_than 60 "$dir/out"; then return 0; fi
    kill -CONT "$pid"
    return 1
}

check_whole() { # OUT GRID
    "$COMPARE" "$dir/whole.$2" "$1" >"$dir/said" || { cat "$dir/said"; fail "$what: the records are not those of an uninterrupted run"; }
}

whole_ms=1000000
for g in "${!grids[@]}"; do
    begun_ms=$(now_ms)
    # shellcheck disable=SC2086 # a list of options
    start "$dir/whole.$g" ${grids[$g]}
    what="uninterrupted, ${grids[$g]}"
    ended
    [ "$status" -eq 0 ] || fail "$what: exit status $status"
    took_ms=$(($(now_ms) - begun_ms))
    [ "$took_ms" -ge "$whole_ms" ] || whole_ms=$took_ms
done

# check_end KILL|STOP RANK: the launcher's status, who is named, and how long it took.
check_end() {
    if [ "$1" = KILL ]; then
        [ "$status" -eq 137 ] || fail "$what: exit status $status"
        grep -q "rank $2 with PID" "$dir/log" || fail "$what: nobody names rank $2"
        [ "$took_ms" -le "$kill_limit_ms" ] || late=$((late + 1))
    else
        [ "$status" -eq 86 ] || fail "$what: exit status $status"
        grep -q "rank $2 on .* does not respond" "$dir/log" || fail "$what: nobody names rank $2"
        [ "$took_ms" -le "$stop_limit_ms" ] || late=$((late + 1))
    fi
}

# campaign KILL|STOP
campaign() {
    local signal=$1 n=0 g=0 runs=0 finished=0 late=0 worst_ms=0 sum_ms=0 rank pid
    local -a hit=(0 0 0 0)
    rm -f "$dir/out" "$dir/out".*
    while :; do
        # shellcheck disable=SC2086
        start "$dir/out" --step-timeout "$timeout_s" ${grids[$g]}
        what="$signal $((n + 1)), ${grids[$g]}"
        runs=$((runs + 1)) rank=$((RANDOM % 4)) pid=$job
        if [ "$n" -lt "$wanted" ] && hit_rank "$signal" "$rank"; then
            await_end
            if [ "$status" -ne 0 ]; then # 0: it had written everything
                n=$((n + 1))
                hit[rank]=$((hit[rank] + 1))
                sum_ms=$((sum_ms + took_ms))
                [ "$took_ms" -le "$worst_ms" ] || worst_ms=$took_ms
                check_end "$signal" "$rank"
                for pid in $(pgrep -P "$pid"); do
                    fail "$what: process $pid is left"
                done
                continue
            fi
        else
            ended
        fi
        [ "$status" -eq 0 ] || fail "$what: exit status $status where it should have finished"
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
