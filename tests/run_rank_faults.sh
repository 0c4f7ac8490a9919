#!/bin/bash
# Faults of reliability.md 4 on two ranks, as far as they concern stopping and recording: signals (rows 4, 5), a full disk (6), an
# output that is taken away (7), poisoned weights (10), ranks that were started in another way (20), closed descriptors (22), a
# second job on one output (23), an input that changes (24). Every rank must end, with the one exit status that is promised.
#
# usage: run_rank_faults.sh TRIREME MODEL      needs COMPARE (tests/compare_records)
set -u

if [ $# -lt 2 ]; then
    echo "usage: $0 TRIREME MODEL" >&2
    exit 2
fi
trireme=$1 model=$2
mpiexec=${MPIEXEC-mpirun} python=${PYTHON:-python3}
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
command -v "${mpiexec:-none}" >/dev/null || { echo 'no MPI launcher was found'; exit 77; }
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-rank-faults.XXXXXX") || exit 1
job=
trap '[ -z "$job" ] || kill -9 "$job" 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir" || exit 1
failed=0 cases=0

# is NAME EXPECTED GOT
is() {
    cases=$((cases + 1))
    if [ "$2" = "$3" ]; then
        echo "ok      $1"
    else
        echo "FAILED  $1: $3 instead of $2"
        [ -s log ] && sed 's/^/        /' log
        failed=$((failed + 1))
    fi
}

# has NAME WORD: the log says it
has() {
    if grep -q -- "$2" log; then is "$1" yes yes; else is "$1: \"$2\"" yes no; fi
}

requests() { # N FILE
    local i
    for ((i = 0; i < $1; i++)); do
        printf '{"custom_id":"r%d","method":"POST","url":"/v1/completions","body":{"prompt":[41,%d],"max_tokens":%d,"return_token_ids":true}}\n' \
            "$i" $((50 + i % 1500)) $((6 + i % 9))
    done >"$2"
}

batch=("$mpiexec" -n 2 "$trireme" batch --kv-dtype f32 --max-sequences 8 --max-model-len 512 -m)
two() { # MODEL ARGUMENT...
    "${batch[@]}" "$@"
}

# Start and wait until OUT has grown beyond LINES.
begin() { # LINES IN OUT ARGUMENT...
    local lines=$1 in=$2 out=$3
    shift 3
    : >log
    "${batch[@]}" "$model" -i "$in" -o "$out" --tp 2 "$@" >log 2>&1 & # not a function: $! is the launcher's
    job=$!
    for ((i = 0; i < 1200; i++)); do
        [ -e "$out" ] && [ "$(wc -l <"$out")" -gt "$lines" ] && break
        kill -0 "$job" 2>/dev/null || break
        sleep 0.05
    done
}

rank_pid() { # RANK
    local pid
    for pid in $(pgrep -P "$job" -x trireme); do
        if tr '\0' '\n' <"/proc/$pid/environ" | grep -qE "^(OMPI_COMM_WORLD_RANK|PMI_RANK)=$1\$"; then
            echo "$pid"
            return
        fi
    done
}

# Ranks that stand still, while something is done that takes as long as the whole job.
held() { kill -STOP $(pgrep -P "$job" -x trireme); }

released() { kill -CONT $(pgrep -P "$job" -x trireme); }

ended() {
    wait "$job" 2>/dev/null
    status=$?
    job=
}

lines() {
    wc -l <"$1" | tr -d ' '
}

requests 150 in
two "$model" -i in -o whole --tp 2 >log 2>&1
is 'a whole job' 0 $?
requests 800 many

# ---- 4, 5: the launcher passes a signal on to all; one that reaches rank 1 alone; a second one
begin 0 many many.out --grace 20
kill -USR1 "$job"
ended
is 'USR1 to the launcher' 75 "$status"
has 'USR1 to the launcher: why' 'stopped by USR1: .* requests have no record yet'
n=$(lines many.out)
begin "$n" many many.out --grace 20
kill -TERM "$(rank_pid 1)"
ended
is 'TERM to rank 1' 75 "$status"
has 'TERM to rank 1: why' 'TERM: nothing new is begun; [0-9]* requests have 5 s'
is 'TERM to rank 1: records went on' yes "$([ "$(lines many.out)" -gt "$n" ] && echo yes)"
n=$(lines many.out)
sed 's/"max_tokens":[0-9]*/"max_tokens":400,"logit_bias":{"2026":-100}/' in >slow
begin -1 slow slow.out --grace 600 --save-every 1
for ((i = 0; i < 1200; i++)); do # until it generates
    [ -s slow.out.saved ] && break
    sleep 0.05
done
pid=$(rank_pid 1)
kill -USR1 "$pid"
for ((i = 0; i < 400; i++)); do
    grep -q 'nothing new is begun' log && break
    sleep 0.05
done
has 'a signal to rank 1' 'USR1: nothing new is begun; 8 requests have 600 s'
kill -USR1 "$pid"
ended
is 'a second signal to rank 1' 75 "$status"

# ---- 6: the disk is full for rank 0, which alone writes
if command -v prlimit >/dev/null; then
    begin "$n" many many.out
    prlimit --pid "$(rank_pid 0)" --fsize=$(($(wc -c <many.out) + 3000)):
    for ((i = 0; i < 1200; i++)); do
        grep -q 'trying again' log && break
        sleep 0.05
    done
    has 'full disk: said so' 'trying again'
    kill -USR1 "$(rank_pid 0)"
    ended
    is 'full disk: exit status' 74 "$status"
    is 'full disk: whole lines' '' "$(tail -c 1 many.out | tr -d '\n')"
else
    echo 'skipped full disk: no prlimit'
fi
n=$(lines many.out)

# ---- 23, 24 and 7: a second job; the input changes; OUT is taken away (seen at the end at the latest)
begin "$n" many many.out --grace 0
held
two "$model" -i many -o many.out --tp 2 >log2 2>&1
is 'a second job on one output' 2 $?
mv log log1 && cp log2 log
has 'a second job: who has it' "many.out.run is locked by pid $(rank_pid 0)"
cp log1 log
echo >>many
kill -USR1 "$(rank_pid 0)"
released
ended
is 'the input changed' 65 "$status"
truncate -s -1 many
requests 600 more
begin 0 more more.out --grace 0
held
mv more.out away
kill -USR1 "$(rank_pid 0)"
released
ended
is 'OUT was taken away' 74 "$status"

# ---- and what is left of all that is whole
two "$model" -i many -o many.out --tp 2 >log 2>&1
is 'going on after all of it' 0 $?
two "$model" -i many -o many.whole --tp 2 >log 2>&1
is 'the same in one job' 0 $?
"$COMPARE" many.whole many.out >said
is 'the same records' 0 $?

# ---- 20: rank 1 was started with another seed
cat >rank <<'RANK'
rank=${OMPI_COMM_WORLD_RANK-${PMI_RANK-${PMIX_RANK-}}}
[ "$rank" = 0 ] || set -- "$@" --seed 5
exec "$@"
RANK
"$mpiexec" -n 2 sh rank "$trireme" batch -m "$model" -i in -o seed.out --tp 2 --max-model-len 512 >log 2>&1
is 'another seed on rank 1' 2 $?
has 'another seed on rank 1: named' 'rank 1 on .*: started with another --seed than rank 0: 5, not 0'

# ---- 22: nobody listens
two "$model" -i in -o deaf.out --tp 2 >&- 2>&- <&-
is 'closed stdin, stdout, stderr' 0 $?
"$COMPARE" whole deaf.out >said
is 'closed descriptors: the records' 0 $?
begin 0 many hup.out --grace 0
for rank in 0 1; do
    kill -HUP "$(rank_pid $rank)"
done
n=$(lines hup.out)
for ((i = 0; i < 400; i++)); do
    [ "$(lines hup.out)" -gt $((n + 20)) ] && break
    sleep 0.05
done
is 'SIGHUP: the job goes on' yes "$([ "$(lines hup.out)" -gt $((n + 20)) ] && echo yes)"
kill -USR1 "$(rank_pid 1)"
ended
is 'SIGHUP, then USR1' 75 "$status"

# ---- 10: one token's embedding is not a number: whoever has it in the prompt fails, alone
if command -v "$python" >/dev/null; then
    cp -r "$model" poisoned && chmod -R u+w poisoned
    "$python" - <<'PY' || exit 1
import glob, json, struct

TOKEN = 1777
for path in glob.glob("poisoned/*.safetensors"):
    with open(path, "r+b") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        head = json.loads(f.read(n))
        t = head.get("model.embed_tokens.weight")
        if not t:
            continue
        assert t["dtype"] == "BF16", t
        hidden = t["shape"][1]
        f.seek(8 + n + t["data_offsets"][0] + TOKEN * 2 * hidden)
        f.write(struct.pack("<H", 0x7FC0) * hidden)
lines = open("in").read().splitlines()[:150]
r = json.loads(lines[70])
r["body"]["prompt"] = [41, TOKEN, 60]
lines[70] = json.dumps(r)
open("poison", "w").write("\n".join(lines) + "\n")
r["body"]["prompt"] = [41, 61, 60]  # what the others get must not depend on it
lines[70] = json.dumps(r)
open("clean", "w").write("\n".join(lines) + "\n")
many = [json.loads(l) for l in lines]
for r in many[:5]:
    r["body"]["prompt"] = [41, TOKEN]
open("suspect", "w").write("\n".join(json.dumps(r) for r in many) + "\n")
PY
    for grid in '--tp 2' '--dp 2' '--pp 2'; do
        # shellcheck disable=SC2086 # options
        {
            two "$model" -i clean -o clean.out $grid >log 2>&1
            is "$grid: without poison" 0 $?
            two poisoned -i poison -o poison.out $grid >log 2>&1
            is "$grid: a poisoned weight" 0 $?
        }
        has "$grid: a poisoned weight: counted" '149 answered, 0 refused, 1 failed'
        "$python" - <<'PY'
import json

def records(path):
    return {r["custom_id"]: r for r in map(json.loads, open(path))}

clean, poison = records("clean.out"), records("poison.out")
assert len(clean) == len(poison) == 150
code = poison["r70"]["error"] or poison["r70"]["response"]["body"]["error"]
assert code["code"] == "numerical_error", poison["r70"]
for k in clean:
    if k != "r70":
        a, b = (x[k]["response"]["body"]["choices"] for x in (clean, poison))
        assert a == b, k
PY
        is "$grid: a poisoned weight: that request alone" 0 $?
        rm -f clean.out* poison.out*
    done
    two poisoned -i suspect -o suspect.out --tp 2 >log 2>&1
    is 'more than 1 % poisoned' 70 $?
    has 'more than 1 % poisoned: why' 'suspect device'
else
    echo "skipped poisoned weights: no $python"
fi

echo "$cases checks, $failed failed"
[ "$failed" -eq 0 ]
