#!/bin/bash
# Kill a batch job with -9 at random moments, run the same command again, and so on, until it was killed often enough; then
# let it finish. OUT must then hold exactly one record for every request, the same ones as an uninterrupted run's but for
# `created` and `cached_tokens`.
#
# Some answers are long enough that what running requests have generated is saved and gone on with (OUT.saved).
#
# usage: run_kill.sh TRIREME MODEL N_KILLS [SEED [SERIES [GRID]]]
#   SERIES   so many independent series at a time (default 1), with seeds SEED, SEED + 1, ..., one thread each; together they
#            kill N_KILLS times
#   GRID     options of two ranks, such as "--tp 2": the launcher starts them, and a random rank is killed (default: alone)
# (A series is told by a seventh argument where the requests and an uninterrupted run's records are.)
set -u

if [ $# -lt 3 ]; then
    echo "usage: $0 TRIREME MODEL N_KILLS [SEED [SERIES [GRID]]]" >&2
    exit 2
fi
trireme=$1 model=$2 wanted=$3 seed=${4:-1} series=${5:-1} grid=${6:-} given=${7:-}
RANDOM=$seed
python=${PYTHON:-python3}
comm=$(basename "$trireme") comm=${comm:0:15} # as the system calls it
export OMP_WAIT_POLICY=passive
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
if [ -z "$grid" ]; then
    one_rank
else
    need_mpi
fi
command -v "$python" >/dev/null || { echo "skipped: no $python to compare records with" >&2; exit 77; }

scratch kill

[ -n "$given" ] || "$python" - "$dir/in.jsonl" <<'PY' || exit 1
import json, random, sys

random.seed(5)
names = ["amber falcon", "gilded raven", "stone ferry", "quick walnut", "solid pine"]
out = open(sys.argv[1], "w")
for i in range(200):
    facts = [(n, random.randrange(1000, 9999)) for n in names]
    random.shuffle(facts)
    text = "\n".join("The code of %s is %d." % f for f in facts[: random.randrange(1, 6)])
    text += "\nWhat is the code of %s?" % facts[0][0]
    kind = i % 10
    line = {"custom_id": "request-%03d" % i, "method": "POST", "url": "/v1/chat/completions"}
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": random.randrange(8, 60)}
    if kind == 1:
        body["chat_template_kwargs"] = {"thinking": True}
    if kind == 2:
        body.update(temperature=0, logprobs=True, top_logprobs=3)
    if kind == 3:
        body.update(n=2, stop=["is"], return_token_ids=True)
    if kind in (4, 5):
        line["url"] = "/v1/completions"
        body = {"prompt": text, "max_tokens": random.randrange(8, 60), "seed": i}
    if kind == 5:
        body.update(echo=True, logprobs=1, max_tokens=random.choice([0, 4]))
    if kind == 6:
        line["url"] = "/v1/completions"
        body = {"prompt": [random.randrange(2000) for _ in range(random.randrange(1, 200))], "max_tokens": 12, "prompt_logprobs": 1}
    if kind == 9:
        body.update(max_tokens=300, n=1 + i % 3, stop_token_ids=[], min_tokens=250)
    if kind == 7 and i % 20 == 7:
        body["temperature"] = 7  # refused
    line["body"] = body
    if kind == 8 and i % 40 == 8:
        out.write("this is not a request\n")
    else:
        out.write(json.dumps(line, ensure_ascii=bool(i % 2)) + "\n")
PY

# A rank says who it is: looking through all processes again and again takes more time than the job.
# shellcheck disable=SC2016 # for the shell of the rank
announce='echo $$ >"$0.$$" && exec "$@"'
job() { # OUT; in a shell of its own, which it replaces: the process to kill is the job itself
    local run=("$trireme" batch -m "$model" -i "$dir/in.jsonl" -o "$1" --max-sequences 8 --max-model-len 512 --save-every 1)
    # shellcheck disable=SC2206 # a list of options
    [ -z "$grid" ] || run=("$mpiexec" -n 2 sh -c "$announce" "$dir/pid" "${run[@]}" $grid)
    exec "${run[@]}"
}

victim() { # the process to kill, into $hit: a rank that is there; nothing: there is none yet
    local at=("$dir"/pid.*) name=''
    hit=$job
    [ -n "$grid" ] || return 0
    hit=
    [ ! -s "${at[0]}" ] || read -r hit <"${at[RANDOM % ${#at[@]}]}"
    # One that has ended is nobody's number any more, or somebody else's.
    read -r name 2>/dev/null <"/proc/${hit:-none}/comm"
    [ "$name" = "$comm" ] || hit=
}

# Wait for the job after the kill. A rank that outlives the other by a minute is a finding. A launcher that does so when all
# ranks are gone is not ours: Open MPI 4.1's waits for ever when a rank dies just as it connects to it; it is ended and counted.
await_end() {
    local clock=''
    if [ -n "$grid" ]; then
        (
            sleep 60
            for rank in "$dir"/pid.*; do
                read -r rank <"$rank"
                grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$rank/status" && touch "$dir/outlived"
            done
            touch "$dir/stuck"
            kill -9 "$job"
        ) >/dev/null 2>&1 &
        clock=$!
    fi
    wait "$job" 2>/dev/null
    status=$?
    [ -n "$clock" ] || return 0
    pkill -P "$clock" -x sleep
    kill "$clock" 2>/dev/null
    wait "$clock" 2>/dev/null
    [ ! -e "$dir/outlived" ] || { echo "a rank outlived the other by a minute:" && cat "$dir/log" && exit 1; }
    [ ! -e "$dir/stuck" ] || stuck=$((stuck + 1))
    rm -f "$dir/stuck"
}

# Records of both files as sets, without created and cached_tokens; every request exactly once.
compare() {
    "$python" - "$dir/in.jsonl" "$dir/whole.jsonl" "$1" <<'PY'
import json, sys

def records(path):
    found = {}
    data = open(path, "rb").read()
    assert data.endswith(b"\n"), path + ": a torn end"
    for line in data.split(b"\n")[:-1]:
        r = json.loads(line)
        if r["response"] and "created" in r["response"]["body"]:
            del r["response"]["body"]["created"]
            r["response"]["body"]["usage"].pop("prompt_tokens_details", None)  # what ran before decides cached_tokens
        key = r["custom_id"] or "line %d" % r["error"]["line"]
        assert key not in found, path + ": two records of " + key
        found[key] = json.dumps(r, sort_keys=True)
    return found

wanted = set()
for number, line in enumerate(open(sys.argv[1]), 1):
    try:
        wanted.add(json.loads(line)["custom_id"])
    except ValueError:
        wanted.add("line %d" % number)
whole, killed = records(sys.argv[2]), records(sys.argv[3])
assert set(whole) == wanted, "the uninterrupted run has other records than requests"
lost, more = wanted - set(killed), set(killed) - wanted
altered = [k for k in killed if k in whole and killed[k] != whole[k]]
print("%d records: %d lost, %d too many, %d altered" % (len(killed), len(lost), len(more), len(altered)))
for k in altered[:3]:
    print(whole[k], killed[k], sep="\n")
sys.exit(bool(lost or more or altered))
PY
}

# One series or many: the same requests.
if [ -n "$given" ]; then
    cp "$given/in.jsonl" "$given/whole.jsonl" "$given/whole.ms" "$dir" || exit 1
else
    echo "uninterrupted run"
    from_ms=$(now_ms)
    job "$dir/whole.jsonl" 2>"$dir/log" &
    job=$!
    ended
    [ "$status" -eq 0 ] || { cat "$dir/log"; exit 1; }
    echo $(($(now_ms) - from_ms)) >"$dir/whole.ms"
fi
# A kill comes within a third of the time that a whole run takes.
most_ms=$(($(cat "$dir/whole.ms") / 3 + 50))

if [ "$series" -gt 1 ]; then
    export OMP_NUM_THREADS=1
    pids=() bad=0
    for ((i = 0; i < series; i++)); do
        share=$(((wanted + series - 1 - i) / series))
        [ "$share" -gt 0 ] || continue
        "$0" "$trireme" "$model" "$share" $((seed + i)) 1 "$grid" "$dir" >"$dir/$i.log" 2>&1 &
        pids+=($!)
    done
    for ((i = 0; i < ${#pids[@]}; i++)); do
        wait "${pids[i]}" || { bad=$((bad + 1)); sed "s/^/series $i: /" "$dir/$i.log"; }
    done
    awk -v bad="$bad" -v series="${#pids[@]}" '
        / records: / { lost += $3; more += $5; altered += $8; checked += $1 }
        / kills in / { kills += $1; runs += $4; jobs += $6; torn += $9; saved += $14; stuck += $19 }
        END {
            printf "%d records compared: %d lost, %d too many, %d altered\n", checked, lost, more, altered
            printf "%d kills in %d runs, %d jobs finished, %d torn ends met, %d runs had saved tokens, %d launchers did not end by themselves; %d series, %d failed\n",
                kills, runs, jobs, torn, saved, stuck, series, bad
        }' "$dir"/*.log
    exit $((bad > 0))
fi

kills=0 runs=0 finished=0 torn=0 saved=0 stuck=0
rm -f "$dir"/killed.jsonl*
while :; do
    rm -f "$dir"/pid.*
    job "$dir/killed.jsonl" 2>"$dir/log" &
    job=$!
    runs=$((runs + 1))
    if [ "$kills" -lt "$wanted" ]; then
        ms=$(((RANDOM * 32768 + RANDOM) % most_ms))
        sleep "$((ms / 1000)).$(printf %03d $((ms % 1000)))"
        until victim && [ -n "$hit" ] || ! kill -0 "$job" 2>/dev/null; do
            sleep 0.02 # the launcher is still at it
        done
        if [ -n "$hit" ] && kill -9 "$hit" 2>/dev/null; then
            kills=$((kills + 1))
            await_end
            grep -q 'requests have saved tokens' "$dir/log" && saved=$((saved + 1))
            [ "$status" -eq 137 ] || { [ "$status" -eq 0 ] && kills=$((kills - 1)); }
            if [ -s "$dir/killed.jsonl" ] && [ -n "$(tail -c 1 "$dir/killed.jsonl")" ]; then
                torn=$((torn + 1))
            fi
            [ "$status" -eq 0 ] || continue
        fi
    fi
    wait "$job" 2>/dev/null
    status=$?
    if [ "$status" -ne 0 ] && [ "$status" -ne 127 ]; then
        echo "exit status $status instead of 0:"
        cat "$dir/log"
        exit 1
    fi
    finished=$((finished + 1))
    grep -q 'requests have saved tokens' "$dir/log" && saved=$((saved + 1))
    [ ! -e "$dir/killed.jsonl.saved" ] || { echo "a finished job left OUT.saved"; exit 1; }
    compare "$dir/killed.jsonl" || exit 1
    [ "$kills" -ge "$wanted" ] && break
    rm -f "$dir"/killed.jsonl*
done
job=
echo "$kills kills in $runs runs, $finished jobs finished, $torn torn ends met and $saved runs had saved tokens; $stuck launchers did not end by themselves"
