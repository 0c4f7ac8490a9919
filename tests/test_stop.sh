#!/bin/bash
# How a job ends early, and what the next one finds: graces, the time budget, a second signal, a signal that reaches one rank of
# two, OUT.saved that is damaged or of another run, shards.
set -u
: "${TRIREME:?}" "${TR_SRCDIR:?}" "${TR_BUILDDIR:?}"
compare=$TR_BUILDDIR/tests/compare_records
model=$TR_SRCDIR/models/tiny
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
mpi_environment
unset SLURM_JOB_END_TIME SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_MIN SLURM_ARRAY_TASK_MAX SLURM_ARRAY_TASK_COUNT \
    SLURM_ARRAY_TASK_STEP
scratch stop
budgets=
# shellcheck disable=SC2086 # two process ids
trap '[ -z "$budgets" ] || kill -9 $budgets 2>/dev/null; clean' EXIT
cd "$dir" || exit 1

requests() { # N TOKENS MORE
    local i
    for ((i = 0; i < $1; i++)); do
        printf '{"custom_id":"r%d","method":"POST","url":"/v1/completions","body":{"prompt":"The code of %d","max_tokens":%d,"return_token_ids":true,%s}}\n' \
            "$i" "$i" $(($2 + i % 7)) "$3"
    done
}

# What a test waits for goes on long enough to be met: half a second or more here, a tenth of that on a machine ten times as fast.
n_in=100
requests $n_in 40 '"temperature":1,"ignore_eos":true' >in
# Nobody waits for the ends of these: minutes.
requests 3 15000 '"temperature":1,"ignore_eos":true' >long
# What may end at any token, but does not: nobody can say that it will not fit.
requests 3 15000 '"temperature":1,"logit_bias":{"2026":-100}' >open

batch=("$TRIREME" batch -m "$model" --kv-dtype f32 --max-sequences 4 --max-model-len 16000)

start() { # ARGUMENT...
    : >log
    "$@" >log 2>&1 &
    job=$!
}

# Start a job of `long` or `open` and wait until it has saved what it generated.
begin_long() { # OUT ARGUMENT...
    local out=$1
    shift
    start "$@" -o "$out" --save-every 1
    await_in_job test -s "$out.saved"
}

# stop_midway OUT WHOLE-MS COMMAND...: start it, stop it with USR1 on its way, so that OUT.saved is left with some tokens of
# each request. Sooner and sooner, where it was faster than that: WHOLE-MS is how long it generates.
stop_midway() {
    local out=$1 ms=$2 i
    shift 2
    for ((i = 2; i < 12; i++)); do
        rm -f "$out"*
        start "$@" -o "$out" --grace 0
        await_in_job logged 'GB of weights'
        nap $((ms / i))
        kill -USR1 "$job" 2>/dev/null
        ended
        [ "$status" -ne 75 ] || [ "$(wc -c <"$out.saved")" -lt 1000 ] || return 0
    done
    is "a job that is stopped midway" 75 "$status"
}

# The same command to its end: the records of a job that nobody stopped.
completes() { # WHAT WHOLE OUT [INPUT]
    "${batch[@]}" -i "${4-in}" -o "$3" >log 2>&1
    is "$1: going on" 0 $?
    "$compare" "$2" "$3" >said || { cat said; is "$1: its records" same other; }
    is "$1: OUT.saved" gone "$([ -e "$3.saved" ] && echo there || echo gone)"
}

from_ms=$(now_ms)
"${batch[@]}" -i in -o whole >log 2>&1
is 'a whole job' 0 $?
took_ms=$(($(now_ms) - from_ms))

# ---- the time budget, and Slurm's end: beside what follows. A start and an end of a job must fit into it.
budget_s=$((4 + 2 * took_ms / 1000))
budget() { # NAME COMMAND...: its exit status and how long it took
    local name=$1 begun
    begun=$(now_ms)
    shift
    "$@" >"$name.log" 2>&1
    echo "$? $(($(now_ms) - begun))" >"$name.end"
}
budget option "${batch[@]}" -i open -o option.out --time-budget "$budget_s" &
budgets=$!
budget slurm env SLURM_JOB_END_TIME=$(($(date +%s) + budget_s)) "${batch[@]}" -i open -o slurm.out &
budgets="$budgets $!"

# ---- what runs fits into the grace: nothing is left over
start "${batch[@]}" -i in -o fits --grace 300
await_in_job more_than 0 fits
held
kill -USR1 "$job"
released
ended
is 'a grace that does' 75 "$status"
has 'a grace that does' 'USR1: nothing new is begun; [1-4] requests have 300 s to finish'
is 'a grace that does: OUT.saved' gone "$([ -e fits.saved ] && echo there || echo gone)"
holds 'a grace that does: records' test "$(lines fits)" -lt $n_in
completes 'a grace that does' whole fits

# ---- what surely does not fit is not waited for
begin_long late "${batch[@]}" -i long --grace 1
kill -INT "$job"
ended
is 'no grace would do' 75 "$status"
has 'no grace would do' 'INT: nothing new is begun; 0 requests have 1 s'
has 'no grace would do' '3 requests have no record yet, 3 of them begun, with [1-9][0-9]* tokens saved; the same command'

# ---- what may fit is waited for; a second signal ends that
begin_long open.out "${batch[@]}" -i open --grace 600
kill -TERM "$job"
await_in_job logged 'nothing new is begun'
has 'TERM' 'TERM: nothing new is begun; 3 requests have 5 s'
kill -USR1 "$job"
ended
is 'a second signal' 75 "$status"
is 'a second signal: no summary' '' "$(grep 'no record yet' log)"

# ---- a budget that is over at once, an end that has passed
"${batch[@]}" -i in -o none.out --time-budget 0 >log 2>&1
is 'no time at all' 75 $?
has 'no time at all' 'stopped by the time budget'
SLURM_JOB_END_TIME=5 "${batch[@]}" -i in -o stale.out >log 2>&1
is 'an end that has passed' 0 $?
has 'an end that has passed' 'SLURM_JOB_END_TIME is 5'

# shellcheck disable=SC2086 # two process ids
wait $budgets
for how in option slurm; do
    cp "$how.log" log
    read -r status took_ms <"$how.end"
    is "time budget by $how" 75 "$status"
    is "time budget by $how: in time" yes "$([ "$took_ms" -lt $((budget_s * 1000)) ] && echo yes || echo "$took_ms ms of $budget_s s")"
    has "time budget by $how" 'stopped by the time budget'
    is "time budget by $how: saved" yes "$([ -s "$how.out.saved" ] && echo yes)"
done
budgets=

# ---- OUT.saved in other states than it was left in
sed "s/1500[0-9]/700/g" long >short
start "${batch[@]}" -i short -o short.whole
await_in_job logged 'GB of weights'
from_ms=$(now_ms)
ended
is 'three requests' 0 "$status"
short_ms=$(($(now_ms) - from_ms))
for what in whole cut flipped foreign; do
    stop_midway s.out "$short_ms" "${batch[@]}" -i short
    case $what in
    cut) truncate -s -4 s.out.saved ;;
    flipped) printf '\377' | dd of=s.out.saved bs=1 seek=200 conv=notrunc status=none ;;
    foreign) cp late.saved s.out.saved ;;
    esac
    completes "OUT.saved $what" short.whole s.out short
    [ "$what" != cut ] || has 'OUT.saved cut' 'is damaged: of 3 requests it has 2'
    [ "$what" != flipped ] || has 'OUT.saved flipped' 'is damaged: of 3 requests it has 2'
    [ "$what" != foreign ] || has 'OUT.saved of another run' 'belongs to another run'
    [ "$what" != whole ] || has 'OUT.saved whole' '3 went on from their saved tokens'
done

# ---- answers that cannot be recorded: what was saved of them stays
if command -v prlimit >/dev/null; then
    requests 5 1000 '"temperature":1,"ignore_eos":true' >full
    stop_midway full.out "$short_ms" "${batch[@]}" -i full
    start "${batch[@]}" -i full -o full.out --save-every 1
    await_in_job logged 'GB of weights'
    held
    prlimit --pid "$job" --fsize=8192 # room for the log, not for an answer
    released
    await_in_job logged 'trying again'
    has 'no room for records' 'full.out: cannot write: File too large; trying again'
    kill -USR1 "$job"
    ended
    is 'no room for records' 74 "$status"
    start "${batch[@]}" -i full -o full.out
    await_in_job logged 'requests have saved tokens'
    kill -9 "$job"
    ended
    has 'room again' 'full.out.saved: 4 requests have saved tokens'
fi

# ---- shards
for i in 0 1 2; do
    SLURM_ARRAY_TASK_ID=$((i + 5)) SLURM_ARRAY_TASK_MIN=5 SLURM_ARRAY_TASK_MAX=7 SLURM_ARRAY_TASK_COUNT=3 \
        "${batch[@]}" -i in -o "part.$i" --shard auto >log 2>&1
    is "shard $i" 0 $?
done
is 'shards: records' '34 33 33' "$(wc -l <part.0) $(wc -l <part.1) $(wc -l <part.2)"
"${batch[@]}" -i in -o part.1 --shard 2/3 >log 2>&1
is 'another shard on one output' 2 $?
has 'another shard on one output' 'begun with shard 1/3, now it is 2/3'
"$TRIREME" batch --merge -i in -o merged part.0 part.1 part.2 >log 2>&1
is 'merged' 0 $?
"$compare" whole merged >said || { cat said; is 'merged: its records' same other; }
"$TRIREME" batch --merge -i in -o lost part.0 part.2 >log 2>&1
is 'merged without a shard' 65 $?
has 'merged without a shard' '33 of 100 requests have no record; the first is line 2'
"$TRIREME" batch --merge -i in -o doubled part.0 part.1 part.2 whole >log 2>&1
is 'merged with one twice' 65 $?

# ---- two ranks: a watchdog each, and none with --step-timeout 0; a signal that only rank 1 gets
watchdogs() {
    for pid in $(ranks); do
        cat "/proc/$pid"/task/*/comm
    done | grep -cx watchdog
}
if [ -n "$mpiexec" ]; then
    for timeout_s in 100 0; do
        begin_long "guarded.$timeout_s" "$mpiexec" -n 2 "${batch[@]}" -i long --grace 0 --pp 2 --step-timeout "$timeout_s"
        held
        is "watchdogs with --step-timeout $timeout_s" $((timeout_s ? 2 : 0)) "$(watchdogs)"
        released
        kill -USR1 "$(rank_pid 0)"
        ended
        is "stopped with --step-timeout $timeout_s" 75 "$status"
    done
    begin_long two.out "$mpiexec" -n 2 "${batch[@]}" -i long --grace 0 --pp 2
    kill -USR1 "$(rank_pid 1)"
    ended
    is 'a signal to rank 1' 75 "$status"
    has 'a signal to rank 1' 'USR1: nothing new is begun'
    has 'a signal to rank 1' '3 of them begun, with [1-9][0-9]* tokens saved'
    has 'a signal to rank 1' 'rank 0 on .*: stopped by USR1 (and 1 more rank)'
fi
done_checking
