#!/bin/bash
# How a job ends early, and what the next one finds: graces, the time budget, a second signal, a signal that reaches one rank of
# two, OUT.saved that is damaged or of another run, shards.
set -u
: "${TRIREME:?}" "${TR_SRCDIR:?}" "${TR_BUILDDIR:?}"
compare=$TR_BUILDDIR/tests/compare_records
model=$TR_SRCDIR/models/tiny
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
unset SLURM_JOB_END_TIME SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_MIN SLURM_ARRAY_TASK_MAX SLURM_ARRAY_TASK_COUNT \
    SLURM_ARRAY_TASK_STEP
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-stop.XXXXXX") || exit 1
job=
budgets=
# shellcheck disable=SC2086 # two process ids
trap '[ -z "$job$budgets" ] || kill -9 $job $budgets 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir" || exit 1
failed=0

# is WHAT WANTED GOT
is() {
    [ "$2" = "$3" ] && return
    echo "$1: $3 instead of $2"
    sed 's/^/    /' log
    failed=1
}

# says WHAT WORDS
says() {
    grep -q -- "$2" log || is "$1: \"$2\"" said 'not said'
}

requests() { # N TOKENS MORE
    local i
    for ((i = 0; i < $1; i++)); do
        printf '{"custom_id":"r%d","method":"POST","url":"/v1/completions","body":{"prompt":"The code of %d","max_tokens":%d,"return_token_ids":true,%s}}\n' \
            "$i" "$i" $(($2 + i % 7)) "$3"
    done
}

requests 40 40 '"temperature":1,"ignore_eos":true' >in
requests 3 4000 '"temperature":1,"ignore_eos":true' >long
# What may end at any token, but does not: nobody can say that it will not fit.
requests 3 4000 '"temperature":1,"logit_bias":{"2026":-100}' >open

batch=("$TRIREME" batch -m "$model" --kv-dtype f32 --max-sequences 4 --max-model-len 4500)

# Start a job and wait until it generates.
begin() { # ARGUMENT...
    : >log
    "$@" >log 2>&1 &
    job=$!
    for ((i = 0; i < 1200; i++)); do
        grep -q 'GB of weights' log && break
        kill -0 "$job" 2>/dev/null || break
        sleep 0.05
    done
    sleep 0.3
}

ended() {
    wait "$job" 2>/dev/null
    status=$?
    job=
}

# The same command to its end: the records of a job that nobody stopped.
completes() { # WHAT WHOLE OUT
    "${batch[@]}" -i "${4-in}" -o "$3" >log 2>&1
    is "$1: going on" 0 $?
    "$compare" "$2" "$3" >said || { cat said; is "$1: its records" same other; }
    is "$1: OUT.saved" gone "$([ -e "$3.saved" ] && echo there || echo gone)"
}

"${batch[@]}" -i in -o whole >log 2>&1
is 'a whole job' 0 $?

# ---- the time budget, and Slurm's end: beside what follows
budget() { # NAME COMMAND...: its exit status and how long it took
    local name=$1 begun
    begun=$(date +%s)
    shift
    "$@" >"$name.log" 2>&1
    echo "$? $(($(date +%s) - begun))" >"$name.end"
}
budget option "${batch[@]}" -i open -o option.out --time-budget 0:08 &
budgets=$!
budget slurm env SLURM_JOB_END_TIME=$(($(date +%s) + 8)) "${batch[@]}" -i open -o slurm.out &
budgets="$budgets $!"

# ---- what runs fits into the grace: nothing is left over
begin "${batch[@]}" -i in -o fits --grace 300
kill -USR1 "$job"
ended
is 'a grace that does' 75 "$status"
says 'a grace that does' 'USR1: nothing new is begun; 4 requests have 300 s to finish'
is 'a grace that does: OUT.saved' gone "$([ -e fits.saved ] && echo there || echo gone)"
is 'a grace that does: records' yes "$([ "$(wc -l <fits)" -ge 4 ] && [ "$(wc -l <fits)" -lt 40 ] && echo yes)"
completes 'a grace that does' whole fits

# ---- what surely does not fit is not waited for
begin "${batch[@]}" -i long -o late --grace 1
kill -INT "$job"
ended
is 'no grace would do' 75 "$status"
says 'no grace would do' 'INT: nothing new is begun; 0 requests have 1 s'
says 'no grace would do' '3 requests have no record yet, 3 of them begun, with [1-9][0-9]* tokens saved; the same command'

# ---- what may fit is waited for; a second signal ends that
begin "${batch[@]}" -i open -o open.out --grace 600 --save-every 1
kill -TERM "$job"
for ((i = 0; i < 200; i++)); do
    grep -q 'nothing new is begun' log && break
    sleep 0.05
done
says 'TERM' 'TERM: nothing new is begun; 3 requests have 5 s'
kill -USR1 "$job"
ended
is 'a second signal' 75 "$status"
is 'a second signal: no summary' '' "$(grep 'no record yet' log)"

# ---- a budget that is over at once, an end that has passed
"${batch[@]}" -i in -o none.out --time-budget 0 >log 2>&1
is 'no time at all' 75 $?
says 'no time at all' 'stopped by the time budget'
SLURM_JOB_END_TIME=5 "${batch[@]}" -i in -o stale.out >log 2>&1
is 'an end that has passed' 0 $?
says 'an end that has passed' 'SLURM_JOB_END_TIME is 5'

# shellcheck disable=SC2086 # two process ids
wait $budgets
for how in option slurm; do
    cp "$how.log" log
    read -r status seconds <"$how.end"
    is "time budget by $how" 75 "$status"
    is "time budget by $how: in time" yes "$([ "$seconds" -lt 8 ] && echo yes || echo "$seconds s")"
    says "time budget by $how" 'stopped by the time budget'
    is "time budget by $how: saved" yes "$([ -s "$how.out.saved" ] && echo yes)"
done
budgets=

# ---- OUT.saved in other states than it was left in
sed 's/4000/600/g; s/400[1-9]/600/g' long >short
tried=0
"${batch[@]}" -i short -o short.whole >log 2>&1
is 'three requests' 0 $?
for what in whole cut flipped foreign; do
    rm -f s.out*
    begin "${batch[@]}" -i short -o s.out --grace 0
    kill -USR1 "$job"
    ended
    if [ "$status" -eq 0 ]; then # it was faster than the signal
        rm -f s.out*
        continue
    fi
    tried=$((tried + 1))
    is "OUT.saved $what: the first job" 75 "$status"
    case $what in
    cut) truncate -s -4 s.out.saved ;;
    flipped) printf '\377' | dd of=s.out.saved bs=1 seek=200 conv=notrunc status=none ;;
    foreign) cp late.saved s.out.saved ;;
    esac
    completes "OUT.saved $what" short.whole s.out short
    [ "$what" != cut ] || says 'OUT.saved cut' 'is damaged: of 3 requests it has 2'
    [ "$what" != flipped ] || says 'OUT.saved flipped' 'is damaged: of 3 requests it has 2'
    [ "$what" != foreign ] || says 'OUT.saved of another run' 'belongs to another run'
    [ "$what" != whole ] || says 'OUT.saved whole' '3 went on from their saved tokens'
done
is 'OUT.saved in other states: some jobs were stopped in time' yes "$([ "$tried" -gt 0 ] && echo yes)"

# ---- answers that cannot be recorded: what was saved of them stays
if command -v prlimit >/dev/null; then
    requests 5 1200 '"temperature":1,"ignore_eos":true' >full
    begin "${batch[@]}" -i full -o full.out --save-every 1
    for ((i = 0; i < 600; i++)); do
        [ -s full.out.saved ] && break
        sleep 0.05
    done
    prlimit --pid "$job" --fsize=8192 # room for the log, not for an answer
    for ((i = 0; i < 2400; i++)); do
        grep -q 'trying again' log && break
        sleep 0.05
    done
    says 'no room for records' 'full.out: cannot write: File too large; trying again'
    kill -USR1 "$job"
    ended
    is 'no room for records' 74 "$status"
    begin "${batch[@]}" -i full -o full.out
    kill -9 "$job"
    ended
    says 'room again' 'full.out.saved: 4 requests have saved tokens'
fi

# ---- shards
for i in 0 1 2; do
    SLURM_ARRAY_TASK_ID=$((i + 5)) SLURM_ARRAY_TASK_MIN=5 SLURM_ARRAY_TASK_MAX=7 SLURM_ARRAY_TASK_COUNT=3 \
        "${batch[@]}" -i in -o "part.$i" --shard auto >log 2>&1
    is "shard $i" 0 $?
done
is 'shards: records' '14 13 13' "$(wc -l <part.0) $(wc -l <part.1) $(wc -l <part.2)"
"${batch[@]}" -i in -o part.1 --shard 2/3 >log 2>&1
is 'another shard on one output' 2 $?
says 'another shard on one output' 'begun with shard 1/3, now it is 2/3'
"$TRIREME" batch --merge -i in -o merged part.0 part.1 part.2 >log 2>&1
is 'merged' 0 $?
"$compare" whole merged >said || { cat said; is 'merged: its records' same other; }
"$TRIREME" batch --merge -i in -o lost part.0 part.2 >log 2>&1
is 'merged without a shard' 65 $?
says 'merged without a shard' '13 of 40 requests have no record; the first is line 2'
"$TRIREME" batch --merge -i in -o doubled part.0 part.1 part.2 whole >log 2>&1
is 'merged with one twice' 65 $?

# ---- two ranks: a signal that only rank 1 gets
if [ -n "${MPIEXEC-}" ]; then
    begin "$MPIEXEC" -n 2 "${batch[@]}" -i long -o two.out --grace 0 --pp 2
    for pid in $(pgrep -P "$job" -x trireme); do
        tr '\0' '\n' <"/proc/$pid/environ" | grep -qE '^(OMPI_COMM_WORLD_RANK|PMI_RANK)=1$' && kill -USR1 "$pid"
    done
    ended
    is 'a signal to rank 1' 75 "$status"
    says 'a signal to rank 1' 'USR1: nothing new is begun'
    says 'a signal to rank 1' '3 of them begun, with [1-9][0-9]* tokens saved'
    says 'a signal to rank 1' 'rank 0 on .*: stopped by USR1 (and 1 more rank)'
fi
exit "$failed"
