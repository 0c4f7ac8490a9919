#!/bin/sh
# trireme bench step on several ranks: one table whatever the grid, a time for each line, and the work of rank 0 what its slice of
# the model makes it. What does not fit the replicas is refused by one line. No speed is demanded here.
set -u
: "${TRIREME:?}" "${TR_SRCDIR:?}"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "skipped: no $python to read JSON with"; exit 77; }
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch bench-ranks
model=$TR_SRCDIR/models/tiny

step() { # NAME RANKS OPTION...
    name=$1 n=$2
    shift 2
    timeout "$patience_s" "$mpiexec" -n "$n" "$TRIREME" bench step -m "$model" --device cpu --isa plain --context 140 \
        --sequences 2,4 --prefill 130 --chunk 200 --steps 3 "$@" >"$dir/$name" 2>"$dir/log" ||
        { echo "bench step $*: exit status $? (124: after $patience_s s)"; cat "$dir/log"; exit 1; }
}
step one 1
step tp2 2 --tp 2
step dp2 2 --dp 2 --ep 2
step cp2 2 --cp 2 --no-overlap --regions
step cp2.own 2 --cp 2 --regions --own-rows
# The last row of three prompts, and in front of it keys and latents of four layers of each.
gathers() { awk '$1 == "attn_cp/all_gather" { n += $2 } END { print n + 0 }' "$1"; }
[ "$(gathers "$dir/cp2") $(gathers "$dir/cp2.own")" = '27 3' ] || { echo 'rows that stay are gathered'; cat "$dir/cp2.own"; exit 1; }
step pp2 4 --pp 2 --tp 2 --regions
step halves 2 --tp 2 --halves --sequences 2 --prefill 70 --context 70

refused() { # TEXT RANKS ARGUMENT...
    text=$1 n=$2
    shift 2
    timeout "$patience_s" "$mpiexec" -n "$n" "$TRIREME" bench "$@" -m "$model" >"$dir/stdout" 2>"$dir/stderr" &&
        { echo "accepted: $*"; exit 1; }
    [ "$(grep -c -- "$text" "$dir/stderr")" -eq 1 ] || { echo "not once '$text': $*"; cat "$dir/stderr"; exit 1; }
}
refused 'sequences 3: 2 replicas' 2 step --dp 2 --sequences 3
refused 'tp 3' 2 step --tp 3
refused 'a bench step of one rank' 2 step --tp 2 --profile "$dir/x.h5"
refused 'trireme: rank 0 on .*config.json: n_routed_experts 1028: the CPU backend takes at most 1024 (and 1 more rank)' 2 step --tp 2 \
    --device cpu --override n_routed_experts=1028
refused 'config.json: n_routed_experts 1028: the CPU backend takes at most 1024' 1 load --device cpu --override n_routed_experts=1028
refused 'options of bench step' 1 load --tp 1
refused 'halves: an option of bench step' 1 load --halves
refused 'without --profile' 1 step --halves --profile "$dir/x.h5"
refused 'own-rows: an option of bench step' 1 watchdog --own-rows
refused 'cp-mode odd' 1 step --cp-mode odd
refused 'one rank has none' 1 watchdog
refused '10000 are too many' 2 watchdog --tp 2 --pairs 10000 --steps 10000

# What the watchdog costs: blocks with one and without, in turn.
timeout "$patience_s" "$mpiexec" -n 2 "$TRIREME" bench watchdog -m "$model" --tp 2 --context 70 --sequences 1,2 --pairs 3 --steps 5 \
    >"$dir/watchdog" || { echo "bench watchdog: exit status $? (124: after $patience_s s)"; exit 1; }

"$python" - "$dir" <<'PY'
import json, sys

def lines(name):
    all = [json.loads(l) for l in open(sys.argv[1] + "/" + name) if l.startswith("{")]
    timed = [l for l in all if l["bench"] == "step"]
    assert len(all) == 4 and len(timed) == 3, (name, all)  # rank 0 alone speaks
    for l in timed:
        assert 0 < l["min_s"] <= l["median_s"] <= l["max_s"] and l["bytes"] > 0 and l["flops"] > 0, (name, l)
    return {(l["kind"], l["sequences"]): l for l in timed}

# A half is timed in every layer of every step, and has a least time, which its part of the step's is.
halves = [json.loads(l) for l in open(sys.argv[1] + "/halves") if l.startswith("{")]
steps = {(l["kind"], l["sequences"]): l for l in halves if l["bench"] == "step"}
of_step = {}
for l in [l for l in halves if l["bench"] == "half"]:
    assert 0 < l["roofline_s"] and 0 < l["layer_s"] and l["timed"] % 3 == 0, l  # 3 steps
    of_step.setdefault((l["kind"], l["sequences"]), {})[l["half"]] = l
assert set(of_step) == set(steps), (set(of_step), set(steps))
for key, half in of_step.items():
    assert set(half) == {"attention", "dense", "experts"}, half
    assert half["attention"]["timed"] == half["dense"]["timed"] + half["experts"]["timed"], half
    parts = sum(l["roofline_s"] * l["timed"] / 3 for l in half.values())
    assert 0.3 * steps[key]["roofline_s"] < parts < 1.5 * steps[key]["roofline_s"], (half, steps[key])

guarded = [json.loads(l) for l in open(sys.argv[1] + "/watchdog") if l.startswith("{")]
assert [(l["ranks"], l["sequences"], l["pairs"], l["steps"]) for l in guarded] == [(2, 1, 3, 5), (2, 2, 3, 5)], guarded
assert all(l["off_median_s"] > 0 and l["on_median_s"] > 0 and l["overhead"] > -1 and l["overhead_error"] >= 0 for l in guarded), guarded

one = lines("one")
for name, prompts in (("tp2", 1), ("dp2", 2), ("cp2", 1), ("pp2", 1)):
    other = lines(name)
    assert set(other) == {("decode", 2), ("decode", 4), ("prefill", prompts)}, (name, set(other))
    prefill = other["prefill", prompts]
    assert abs(prefill["tokens_per_s"] * prefill["median_s"] / (130 * prompts) - 1) < 1e-3, (name, prefill)
    # What rank 0 reads and computes is less than what one rank alone does, and not nothing. With cp every rank decodes.
    for kind in (("decode", 4), ("prefill", prompts)):
        if name == "cp2" and kind[0] == "decode": continue
        if name == "dp2" and kind[0] == "prefill": continue
        whole = one[kind[0], kind[1] if kind[0] == "decode" else 1]
        assert 0.1 * whole["flops"] < other[kind]["flops"] < 0.85 * whole["flops"], (name, kind, other[kind], whole)
    assert "4 ranks: " in open(sys.argv[1] + "/pp2").read()
PY
