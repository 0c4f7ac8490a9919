#!/bin/bash
# A rank that gets its core an eighth of the time at most (SIGSTOP and SIGCONT in turns, reliability.md 4, row 17): the leader names
# it, its host and how much slower it is. (That nobody else is named is for tests/test_pace.c: here other jobs may take a core away.)
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch straggler

awk 'BEGIN {
    for (i = 0; i < 30000; i++) # more than a fast machine has done by then
        printf "{\"custom_id\": \"r%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": [%d, %d, 77], " \
            "\"max_tokens\": 100, \"ignore_eos\": true, \"temperature\": 0}}\n", i, 40 + i % 900, 50 + i % 700
}' >"$dir/in"
"$mpiexec" -n 3 "${TRIREME:?}" batch -m "${TR_SRCDIR:?}/models/tiny" -i "$dir/in" -o "$dir/out" --dp 3 --ep 1 --max-model-len 128 \
    --max-sequences 8 >"$dir/log" 2>&1 &
job=$!

await_in_job test -s "$dir/out" # it is under way
victim=$(rank_pid 2)
[ -n "$victim" ] || { echo 'no rank 2'; cat "$dir/log"; exit 1; }

# Longer and longer: on a busy machine the others do not get their cores all the time either.
stop_ms=700
held_up() {
    kill -STOP "$victim" 2>/dev/null
    nap "$stop_ms"
    kill -CONT "$victim" 2>/dev/null
    nap 100
    stop_ms=$((stop_ms + 100))
    logged 'rank 2 .* is slow'
}
await_in_job held_up
logged "warning: rank 2 on $(hostname -s) is slow and holds up the others: [0-9.]* times the median" ||
    { echo 'nobody names rank 2'; cat "$dir/log"; exit 1; }
