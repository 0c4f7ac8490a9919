#!/bin/bash
# trireme doctor on 1, 2 and 4 ranks, with two builds in one job, with an output that is not fit, and after a real hang.
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch doctor

complain() {
    echo "$*"
    cat "$dir/said" "$dir/err"
    failed=1
}
doctor() { # CODE COMMAND...: what it says, and 0 or 2
    want=$1
    shift
    timeout "$patience_s" "$@" >"$dir/said" 2>"$dir/err"
    code=$?
    [ "$code" -eq "$want" ] || complain "exit status $code, not $want: $*"
}
says() {
    grep -qF -- "$1" "$dir/said" || complain "nobody says: $1"
}

cores=$(nproc --all)
for ranks in 1 2 4; do
    if [ "$ranks" -gt "$cores" ]; then want=2; else want=0; fi
    doctor "$want" "$mpiexec" -n "$ranks" "${TRIREME:?}" doctor -o "$dir/out"
    says "trireme doctor: $ranks rank"
    says "through PMIx, $ranks rank"
    says "$(hostname -s): $ranks rank"
    says "output     $dir/out: "
    [ "$ranks" -eq 1 ] || says "ranks 0 and $((ranks - 1)), one host: "
    if [ "$want" -eq 0 ]; then
        says 'Nothing must be changed.'
    else
        says "is oversubscribed: $ranks ranks on $cores CPUs"
        grep -q 'trireme: doctor: 1 thing is to be changed' "$dir/err" || complain 'no last word'
    fi
    [ "$(find "$dir" -name 'out*' | wc -l)" -eq 0 ] || complain "files are left: $(ls "$dir")"
done

# Two builds: the same program with another byte behind it.
cp "$TRIREME" "$dir/other" && echo >>"$dir/other"
doctor 2 "$mpiexec" -n 1 "$TRIREME" doctor : -n 1 "$dir/other" doctor
says "rank 1 on $(hostname -s) runs another build of trireme"

# Nobody started it, and srun without a plug-in.
doctor 0 "$TRIREME" doctor
says 'nobody (started bare), 1 rank'
doctor 2 env SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=4 SLURM_JOB_ID=7 "$TRIREME" doctor --time-budget 3600
says 'srun started 4 processes, but each is a job of 1 rank'
doctor 2 env SLURM_JOB_ID=7 "$TRIREME" doctor
says 'job 7 ends without a word to trireme'
doctor 0 env SLURM_JOB_ID=7 SLURM_JOB_END_TIME=$(($(date +%s) + 3655)) "$TRIREME" doctor
says '60 min left of job 7'

# Outputs that are not fit, or in use.
doctor 2 "$TRIREME" doctor -o "$dir/missing/out"
says "$dir/missing"
doctor 2 "$TRIREME" doctor -o -
"$TRIREME" doctor >/dev/full 2>"$dir/err"
[ $? -eq 74 ] || complain 'a page that cannot be written was not noticed'
doctor 2 "$TRIREME" doctor --speed
# An end that has passed is another job's, for batch as well.
doctor 2 env SLURM_JOB_ID=7 SLURM_JOB_END_TIME=1700000000 "$TRIREME" doctor
says 'limit not known'
for budget in x INVALID 1:2:3:4 ''; do
    doctor 2 "$TRIREME" doctor --time-budget "$budget"
    grep -q -e "--time-budget $budget" "$dir/err" || complain "--time-budget '$budget'"
done
doctor 65 "$TRIREME" doctor "$dir/none.json"

# A real hang: a rank is stopped, the watchdog ends the job, the reports say who is missing.
awk 'BEGIN {
    for (i = 0; i < 2000; i++)
        printf "{\"custom_id\": \"r%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": [%d, 77], " \
            "\"max_tokens\": 100, \"ignore_eos\": true, \"temperature\": 0}}\n", i, 40 + i % 900
}' >"$dir/in"
echo '{}' | tee "$dir/hung.hang.rank00002.json" >"$dir/hung.hang.rank00002.json.mine"
"$mpiexec" -n 2 "$TRIREME" batch -m "${TR_SRCDIR:?}/models/tiny" -i "$dir/in" -o "$dir/hung" --tp 2 --step-timeout 3 \
    --max-model-len 128 --max-sequences 8 >/dev/null 2>"$dir/err" &
job=$!
await_in_job test -s "$dir/hung"
[ ! -e "$dir/hung.hang.rank00002.json" ] || complain 'the report of a rank of an earlier, larger job is still there'
[ -e "$dir/hung.hang.rank00002.json.mine" ] || complain 'a file of another name was removed'
doctor 2 "$TRIREME" doctor -o "$dir/hung"
says "another job is writing $dir/hung"
kill -STOP "$(rank_pid 1)"
ended
doctor 0 "$TRIREME" doctor "$dir"/hung.hang.rank*.json
says 'A hang of a job of 2 ranks; reports of 1'
says 'rank 1: does not respond; last seen by rank 0: step '
says 'The first collective on which ranks disagree: '
says 'missing: 1 member of which no report says anything'
exit "$failed"
