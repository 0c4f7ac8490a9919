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
python=${PYTHON:-python3}
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
need_mpi
scratch rank-faults
cd "$dir" || exit 1

requests() { # N FILE
    local i
    for ((i = 0; i < $1; i++)); do
        printf '{"custom_id":"r%d","method":"POST","url":"/v1/completions","body":{"prompt":[41,%d],"max_tokens":%d,"return_token_ids":true}}\n' \
            "$i" $((50 + i % 1500)) $((6 + i % 9))
    done >"$2"
}

two() { # MODEL ARGUMENT...
    "$mpiexec" -n 2 "$trireme" batch --kv-dtype f32 --max-sequences 8 --max-model-len "${room:-512}" -m "$@"
}

start() { # IN OUT ARGUMENT...
    local in=$1 out=$2
    shift 2
    : >log
    "$mpiexec" -n 2 "$trireme" batch --kv-dtype f32 --max-sequences 8 --max-model-len "${room:-512}" -m "$model" -i "$in" -o "$out" \
        --tp 2 "$@" >log 2>&1 & # not a function: $! is the launcher's
    job=$!
}

# The same, held when OUT has more lines than it had.
begin() { # IN OUT ARGUMENT...
    begun_at=$(lines "$2")
    start "$@"
    await_in_job more_than "$begun_at" "$2"
    held
}

requests 150 in
two "$model" -i in -o whole --tp 2 >log 2>&1
is 'a whole job' 0 $?
requests 800 many

# ---- 4, 5: the launcher passes a signal on to all; one that reaches rank 1 alone; a second one
begin many many.out --grace 20
kill -USR1 "$job"
released
ended
is 'USR1 to the launcher' 75 "$status"
has 'USR1 to the launcher: why' 'stopped by USR1: .* requests have no record yet'
begin many many.out --grace 20
n=$(lines many.out)
kill -TERM "$(rank_pid 1)"
released
ended
is 'TERM to rank 1' 75 "$status"
has 'TERM to rank 1: why' 'TERM: nothing new is begun; [0-9]* requests have 5 s'
holds 'TERM to rank 1: what ran was finished' more_than "$n" many.out
# Answers that no machine finishes before a second signal comes.
sed 's/"max_tokens":[0-9]*/"max_tokens":8000,"logit_bias":{"2026":-100}/' in >slow
room=8192
start slow slow.out --grace 600 --save-every 1
room=
await_in_job test -s slow.out.saved # it generates
pid=$(rank_pid 1)
kill -USR1 "$pid"
await_in_job logged 'nothing new is begun'
has 'a signal to rank 1' 'USR1: nothing new is begun; 8 requests have 600 s'
kill -USR1 "$pid"
ended
is 'a second signal to rank 1' 75 "$status"

# ---- 6: the disk is full for rank 0, which alone writes
if command -v prlimit >/dev/null; then
    begin many many.out
    prlimit --pid "$(rank_pid 0)" --fsize=$(($(wc -c <many.out) + 3000)):
    released
    await_in_job logged 'trying again'
    has 'full disk: said so' 'trying again'
    kill -USR1 "$(rank_pid 0)"
    ended
    is 'full disk: exit status' 74 "$status"
    is 'full disk: whole lines' '' "$(tail -c 1 many.out | tr -d '\n')"
else
    echo 'skipped full disk: no prlimit'
fi

# ---- 23, 24 and 7: a second job; the input changes; OUT is taken away (seen at the end at the latest)
begin many many.out --grace 0
two "$model" -i many -o many.out --tp 2 >log2 2>&1
is 'a second job on one output' 2 $?
mv log log1 && cp log2 log
has 'a second job: who has it' "many.out.run is locked by pid $(rank_pid 0)"
mv log1 log
echo >>many
kill -USR1 "$(rank_pid 0)"
released
ended
is 'the input changed' 65 "$status"
truncate -s -1 many
requests 600 more
begin more more.out --grace 0
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

# ---- 20: rank 1 was started with another seed, or it alone with --sync-check
cat >rank <<'RANK'
rank=${OMPI_COMM_WORLD_RANK-${PMI_RANK-${PMIX_RANK-}}}
[ "$rank" = 0 ] || set -- "$@" $OTHER
exec "$@"
RANK
export OTHER='--seed 5'
"$mpiexec" -n 2 sh rank "$trireme" batch -m "$model" -i in -o seed.out --tp 2 --max-model-len 512 >log 2>&1
is 'another seed on rank 1' 2 $?
has 'another seed on rank 1: named' 'rank 1 on .*: started with another --seed than rank 0: 5, not 0'
OTHER=--sync-check
"$mpiexec" -n 2 sh rank "$trireme" batch -m "$model" -i in -o seed.out --pp 2 --max-model-len 512 >log 2>&1
is '--sync-check on rank 1 alone' 2 $?
has '--sync-check on rank 1 alone: named' 'started with another --sync-check than rank 0: on, not off'

# ---- 22: nobody listens
two "$model" -i in -o deaf.out --tp 2 >&- 2>&- <&-
is 'closed stdin, stdout, stderr' 0 $?
"$COMPARE" whole deaf.out >said
is 'closed descriptors: the records' 0 $?
begin many hup.out --grace 0
for rank in 0 1; do
    kill -HUP "$(rank_pid $rank)"
done
n=$(lines hup.out)
released
await_in_job more_than $((n + 20)) hup.out
holds 'SIGHUP: the job goes on' more_than $((n + 20)) hup.out
held
kill -USR1 "$(rank_pid 1)"
released
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

    # The same told where (--sync-check), and an expert of one layer that is not a number: whoever comes by it fails, in that layer.
    # With --pp 2 layer 1 is the last one of the first stage.
    "$python" - "$model" <<'PY' || exit 1
import glob, json, shutil, struct, sys

for layer, expert in (1, 4), (2, 3):  # that some of the prompts come by
    name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    shutil.copytree(sys.argv[1], f"layer{layer}", copy_function=shutil.copyfile)
    done = 0
    for path in glob.glob(f"layer{layer}/*.safetensors"):
        with open(path, "r+b") as f:
            n = struct.unpack("<Q", f.read(8))[0]
            t = json.loads(f.read(n)).get(name)
            if not t:
                continue
            assert t["dtype"] == "F8_E4M3", t
            begin, end = t["data_offsets"]
            f.seek(8 + n + begin)
            f.write(b"\x7f" * (end - begin))  # NaN
            done += 1
    assert done == 1, name
PY
    head -n 20 suspect >few
    one() { # MODEL ARGUMENT...
        "$mpiexec" -n 1 "$trireme" batch --kv-dtype f32 --max-sequences 8 --max-model-len 512 -m "$@"
    }
    said_where() { # WHAT OUT PLACE [N]: all that failed, N of them if given, say so; others were answered
        "$python" - "$2" "$3" "${4-}" <<'PY'
import json, sys

out, place, n = sys.argv[1:]
records = [json.loads(l) for l in open(out)]
failed = [r["response"]["body"]["error"] for r in records if r["response"]["status_code"] != 200]
assert len(records) == 20 and 0 < len(failed) < 20, len(failed)
assert not n or len(failed) == int(n), len(failed)
for e in failed:
    assert e["code"] == "numerical_error" and e["message"].endswith(" are not finite" + place), e
PY
        is "$1: where" 0 $?
    }
    for grid in one '--tp 2' '--dp 2' '--cp 2' '--pp 2'; do
        run=two
        [ "$grid" != one ] || run=one
        options=${grid#one}
        # shellcheck disable=SC2086 # options
        "$run" poisoned -i few -o where.out $options --sync-check >log 2>&1
        is "$grid: a poisoned embedding, --sync-check" 70 $?
        said_where "$grid: a poisoned embedding, --sync-check" where.out ', first in the embedding' 5
        rm -f where.out*
        for layer in 1 2; do
            # shellcheck disable=SC2086 # options
            "$run" "layer$layer" -i few -o where.out $options --sync-check >log 2>&1
            is "$grid: a poisoned expert of layer $layer" 70 $?
            said_where "$grid: a poisoned expert of layer $layer" where.out ", first in layer $layer"
            rm -f where.out*
        done
    done
    two layer2 -i few -o where.out --tp 2 >log 2>&1
    is 'a poisoned expert, nobody looks' 70 $?
    said_where 'a poisoned expert, nobody looks' where.out ''
else
    echo "skipped poisoned weights: no $python"
fi

done_checking
