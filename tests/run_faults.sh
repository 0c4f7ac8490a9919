#!/bin/bash
# Faults of a whole job: a full disk, two jobs on one output, an input that changes, duplicates, malformed lines, closed
# descriptors, signals. Prints one line per case.
#
# usage: run_faults.sh TRIREME MODEL [--slow]     --slow: also wait the whole minute for a disk that stays full
set -u

if [ $# -lt 2 ]; then
    echo "usage: $0 TRIREME MODEL [--slow]" >&2
    exit 2
fi
trireme=$1 model=$2 slow=${3:-}
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "skipped: no $python to read records with" >&2; exit 77; }
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
export OMP_WAIT_POLICY=passive
scratch faults
cd "$dir" || exit 1

# What a job of these tests is started with; -i and -o follow.
batch=("$trireme" batch -m "$model" --max-sequences 8 --max-model-len 512)

# Start a job, held when COMMAND succeeds.
begin() { # IN OUT COMMAND...
    "${batch[@]}" -i "$1" -o "$2" 2>log &
    job=$!
    shift 2
    await_in_job "$@"
    kill -STOP "$job"
}

requests() { # N FILE
    for ((i = 0; i < $1; i++)); do
        printf '{"custom_id":"r%d","method":"POST","url":"/v1/completions","body":{"prompt":"The code of %d","max_tokens":%d}}\n' \
            "$i" "$i" $((8 + i % 9))
    done >"$2"
}

# Every line a whole record, none twice; prints how many.
records() {
    "$python" - "$1" <<'PY'
import json, sys
data = open(sys.argv[1], "rb").read()
lines = data.split(b"\n")
keys = set()
for line in lines[:-1]:
    r = json.loads(line)
    keys.add(r["custom_id"] or r["error"]["line"])
print(len(keys) if lines[-1] == b"" and len(keys) == len(lines) - 1 else "damaged")
PY
}

requests 120 in.jsonl

# ---- a full disk
"${batch[@]}" -i in.jsonl -o whole.jsonl 2>log
is "a whole job" 0 $?
is "its records" 120 "$(records whole.jsonl)"
# The limit comes once the job runs (MPI's own files need room too) and holds for files of this process alone.
requests 1000 long.jsonl

# fill OUT: start a job and limit OUT's size to a little more than it has
fill() {
    begin long.jsonl "$1" more_than 0 "$1"
    prlimit --pid "$job" --fsize=$(($(wc -c <"$1") + 5000)):
    kill -CONT "$job"
    await_in_job logged 'trying again'
}

if ! command -v prlimit >/dev/null; then
    echo "skipped full disk: no prlimit"
else
    fill full.jsonl
    has "full disk: said so" "trying again"
    n=$(records full.jsonl)
    is "full disk: no torn line while it waits" yes "$([ "$n" != damaged ] && [ "$n" -gt 0 ] && [ "$n" -lt 1000 ] && echo yes)"
    kill -USR1 "$job" # give up now rather than in a minute
    ended
    is "full disk: exit status" 74 "$status"
    has "full disk: why" "File too large"
    n=$(records full.jsonl)
    "${batch[@]}" -i long.jsonl -o full.jsonl --resume 2>log
    is "full disk: resumed" 0 $?
    has "full disk: what was there counts" "$n had a record before"
    is "full disk: all records" 1000 "$(records full.jsonl)"
    fill again.jsonl
    prlimit --pid "$job" --fsize=unlimited:
    ended
    is "full disk that is cleared: exit status" 0 "$status"
    has "full disk that is cleared: said so" "going on"
    is "full disk that is cleared: all records" 1000 "$(records again.jsonl)"
    if [ "$slow" = --slow ]; then
        fill slow.jsonl
        ended
        is "full disk for a minute" 74 "$status"
    fi
fi

# ---- two jobs on one output: the first is held meanwhile
requests 2000 many.jsonl
begin many.jsonl many.out more_than 0 many.out
"${batch[@]}" -i many.jsonl -o many.out 2>log2
is "second job on one output" 2 $?
mv log log1 && cp log2 log
has "second job: who has it" "pid $job"
mv log1 log

# ---- stopped by a signal, and the output taken away
kill -USR1 "$job"
kill -CONT "$job"
ended
is "USR1" 75 "$status"
has "USR1: said so" "stopped by USR1"
before=$(records many.out)
is "USR1: whole records" yes "$([ "$before" != damaged ] && echo yes)"
begin many.jsonl many.out more_than "$(lines many.out)" many.out
kill -TERM "$job"
kill -CONT "$job"
ended
is "TERM" 75 "$status"
mv many.out away
touch many.out
rm many.out.run
"${batch[@]}" -i many.jsonl -o many.out 2>log
is "OUT without OUT.run" 2 $?
is "OUT without OUT.run: left alone" 0 "$(wc -c <many.out | tr -d ' ')"
rm many.out

# ---- another input, another option
sed 's/code of 7/code of 8/' in.jsonl >changed.jsonl
cp in.jsonl kept.jsonl
cp changed.jsonl in.jsonl
"${batch[@]}" -i in.jsonl -o whole.jsonl 2>log
is "changed input" 2 $?
has "changed input: named" "input"
cp kept.jsonl in.jsonl
"${batch[@]}" -i in.jsonl -o whole.jsonl --seed 5 2>log
is "changed seed" 2 $?
has "changed seed: named" "seed"
"${batch[@]}" -i in.jsonl -o whole.jsonl --kv-dtype f32 2>log
is "changed cache" 2 $?
"${batch[@]}" -i in.jsonl -o none.jsonl --resume 2>log
is "--resume of nothing" 2 $?
is "--resume of nothing: made nothing" no "$([ -e none.jsonl.run ] && echo yes || echo no)"

# ---- an input that changes while the job runs
cp many.jsonl moving.jsonl
begin moving.jsonl moving.out more_than 0 moving.out
echo >>moving.jsonl
kill -USR1 "$job"
kill -CONT "$job"
ended
is "input changed while running" 65 "$status"
requests 1000 growing.jsonl
begin growing.jsonl growing.out test -e growing.out.run # its requests are counted
tail -n 3 many.jsonl >>growing.jsonl
kill -CONT "$job"
ended
is "input grows while running" 65 "$status"
is "input grows: no number of what is left" no "$(grep -q 'no record yet' log && echo yes || echo no)"
is "input changed: output kept" yes "$([ "$(records moving.out)" != damaged ] && echo yes)"

# ---- bad inputs
{ cat in.jsonl; head -n 1 in.jsonl; } >twice.jsonl
"${batch[@]}" -i twice.jsonl -o twice.out 2>log
is "duplicate custom_id" 65 $?
has "duplicate custom_id: both lines" "lines 1 and 121"
is "duplicate custom_id: nothing begun" no "$([ -e twice.out ] && echo yes || echo no)"
"${batch[@]}" -i missing.jsonl -o missing.out 2>log
is "missing input" 65 $?
: >empty.jsonl
"${batch[@]}" -i empty.jsonl -o empty.out 2>log
is "empty input" 0 $?

"$python" - <<'PY'
good = '{"custom_id":"g%d","method":"POST","url":"/v1/completions","body":{"prompt":"x","max_tokens":2}}'
bad = [b"{", b"}", b"[]", b"null", b"\xff\xfe", b"a\0b", b"{\"custom_id\":\"\"}", b"{\"custom_id\":5}", b"x" * 100000,
       b"[" * 3000, b"{\"custom_id\":\"a\"", b"\"", b"{\"custom_id\":\"\xc3\"}", b"\0", b"nan", b"{}" * 5]
with open("mixed.jsonl", "wb") as f:
    f.write(b"\xef\xbb\xbf")
    for i, b in enumerate(bad):
        f.write((good % i).encode() + (b"\r\n" if i % 2 else b"\n") + (b" \t\n" if i % 3 else b"\n") + b + b"\n")
    f.write((good % len(bad)).encode())
PY
"${batch[@]}" -i mixed.jsonl -o mixed.out 2>log
is "malformed lines" 0 $?
is "malformed lines: all records" 33 "$(records mixed.out)"
has "malformed lines: counted" "17 answered, 0 refused, 0 failed, 16 invalid"

# ---- closed descriptors
requests 10 ten.jsonl
"${batch[@]}" -i ten.jsonl -o ten.out >&- 2>&- <&-
is "closed stdin, stdout, stderr" 0 $?
is "closed descriptors: all records" 10 "$(records ten.out)"
"${batch[@]}" -i ten.jsonl -o - 2>log | head -c 0
is "a reader of stdout that goes away" 74 "${PIPESTATUS[0]}"
"${batch[@]}" -i - -o - <ten.jsonl 2>log >ten.stdout
is "a pipe" 0 $?
is "a pipe: all records" 10 "$(records ten.stdout)"

# ---- more threads than OpenMP's library has room for on its stack: a slip in a batch script
echo '{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x","max_tokens":1}}' >one.jsonl
OMP_NUM_THREADS=100000 "${batch[@]}" -i one.jsonl -o threads.out 2>log
is "100,000 threads" 0 $?
is "100,000 threads: its record" 1 "$(records threads.out)"

# ---- the input is a file that the job writes
cp one.jsonl same.out.saved
"${batch[@]}" -i same.out.saved -o same.out 2>log
is "input that is OUT.saved" 2 $?
cp one.jsonl same.out.run
"${batch[@]}" -i ten.jsonl -o same.out 2>log
is "an OUT.run of somebody's" 2 $?
"${batch[@]}" -i ten.jsonl -o other.out --profile one.jsonl 2>log
is "--profile over a file that is none" 2 $?
cp ten.out all.tmp
"$trireme" batch --merge -i ten.jsonl -o all all.tmp 2>log
is "merge: a part that would be written over" 2 $?
is "files that are refused stay as they are" yes "$(cmp -s one.jsonl same.out.saved && cmp -s one.jsonl same.out.run &&
    cmp -s ten.out all.tmp && echo yes)"

# ---- merge
"${batch[@]}" -i ten.jsonl -o ten2.out 2>log
head -n 4 ten.out >part1
tail -n 6 ten.out >part2
"$trireme" batch --merge -i ten.jsonl -o merged part1 part2 2>log
is "merge" 0 $?
is "merge: in input order" "$(seq -s ' ' 0 9)" "$(sed 's/.*"custom_id":"r\([0-9]*\)".*/\1/' merged | tr '\n' ' ' | sed 's/ $//')"
"$trireme" batch --merge -i ten.jsonl -o lost part1 2>log
is "merge: a lost record" 65 $?
"$trireme" batch --merge -i ten.jsonl -o doubled part1 part2 part1 2>log
is "merge: a doubled record" 65 $?

done_checking
