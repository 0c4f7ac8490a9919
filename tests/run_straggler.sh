#!/bin/bash
# A rank that gets its core an eighth of the time only (SIGSTOP and SIGCONT in turns, reliability.md 4, row 17): the leader names
# it, its host and how much slower it is. (That nobody else is named is for tests/test_pace.c: here other jobs may take a core away.)
set -u
if [ -z "${MPIEXEC-}" ]; then
    echo 'no MPI launcher was found'
    exit 77
fi
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMP_NUM_THREADS=1
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-straggler.XXXXXX") || exit 1
job='' victim=''
trap '[ -z "$victim" ] || kill -CONT "$victim" 2>/dev/null; [ -z "$job" ] || kill "$job" 2>/dev/null; wait; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

awk 'BEGIN {
    for (i = 0; i < 4000; i++)
        printf "{\"custom_id\": \"r%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": [%d, %d, 77], " \
            "\"max_tokens\": 100, \"ignore_eos\": true, \"temperature\": 0}}\n", i, 40 + i % 900, 50 + i % 700
}' >"$dir/in"
"$MPIEXEC" -n 3 "${TRIREME:?}" batch -m "${TR_SRCDIR:?}/models/tiny" -i "$dir/in" -o "$dir/out" --dp 3 --ep 1 --max-model-len 128 \
    --max-sequences 8 >"$dir/log" 2>&1 &
job=$!

for _ in $(seq 300); do # some records: it is under way
    [ -s "$dir/out" ] && break
    kill -0 "$job" 2>/dev/null || break
    sleep 0.1
done
for pid in $(pgrep -P "$job" -x trireme); do
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qx 'OMPI_COMM_WORLD_RANK=2' && victim=$pid
done
[ -n "$victim" ] || { echo 'no rank 2'; cat "$dir/log"; exit 1; }

for _ in $(seq 75); do
    kill -STOP "$victim" 2>/dev/null
    sleep 0.7
    kill -CONT "$victim" 2>/dev/null
    sleep 0.1
    grep -q 'rank 2 .* is slow' "$dir/log" && break
    kill -0 "$job" 2>/dev/null || break
done
host=$(hostname -s)
grep -q "warning: rank 2 on $host is slow and holds up the others: [0-9.]* times the median" "$dir/log" ||
    { echo 'nobody names rank 2'; cat "$dir/log"; exit 1; }
