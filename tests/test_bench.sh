#!/bin/sh
# trireme bench prints a table and JSON lines that add up: every line parses, ceilings and rates are positive, one line per
# configuration, and loading reads no more than the checkpoint holds. No speed is demanded here.
set -u
: "${TRIREME:?}" "${TR_SRCDIR:?}"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "skipped: no $python to read JSON with"; exit 77; }
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
scratch bench
model=$TR_SRCDIR/models/tiny

"$TRIREME" bench step -m "$model" --context 70,140 --sequences 1,3 --prefill 130 --steps 3 --regions >"$dir/step" || exit 1
"$TRIREME" bench step -m "$model" --context 70 --sequences 1 --prefill 64 --prefill-at 0,200 --chunk 40 --steps 2 --threads 1 \
    --isa plain --sync-check >"$dir/at" || exit 1
"$TRIREME" bench load -m "$model" >"$dir/load" || exit 1
"$TRIREME" bench kernels -m "$model" >"$dir/kernels" || exit 1
"$TRIREME" bench kernels -m "$model" --only topk,norm >"$dir/only" || exit 1
"$TRIREME" bench step -m "$model" --context 70 --sequences 2 --prefill 130 --steps 3 --profile "$dir/step.h5" >/dev/null || exit 1
"$TRIREME" bench profile -m "$model" --context 70 --sequences 2 --pairs 3 --steps 10 --profile "$dir/pairs.h5" >"$dir/profile" || exit 1
# It has the steps of two ways of four, and no others: 3 pairs of blocks of 10, and as many with PAPI.
"$TRIREME" profile show "$dir/pairs.h5" >"$dir/show" || exit 1
grep -q ' 60 steps' "$dir/show" || { cat "$dir/show"; exit 1; }
"$TRIREME" profile show "$dir/step.h5" >"$dir/show" || exit 1
grep -q ', complete$' "$dir/show" || { cat "$dir/show"; exit 1; }
for what in "step -m $model --context 5 --sequences 1 --prefill 0 --steps 1" "load -m $model" "kernels -m $model --only norm"; do
    # shellcheck disable=SC2086 # options
    "$TRIREME" bench $what >/dev/full 2>"$dir/err"
    if [ $? -ne 74 ] || ! grep -q 'standard output: ' "$dir/err"; then echo "bench $what: a full disk was not noticed"; exit 1; fi
done
"$TRIREME" bench load -m "$model" --profile x.h5 >/dev/null 2>&1 && { echo "bench load accepted --profile"; exit 1; }
"$TRIREME" bench step -m "$model" --profile "$dir/none/x.h5" >/dev/null 2>&1 && { echo "a folder that is not there was accepted"; exit 1; }
echo notes >"$dir/notes"
"$TRIREME" bench step -m "$model" --profile "$dir/notes" >/dev/null 2>&1 && { echo "a file that is no profile was replaced"; exit 1; }
"$TRIREME" bench kernels -m "$model" --only topk,nothing >/dev/null 2>&1 && { echo "an unknown operation was accepted"; exit 1; }
"$TRIREME" bench step -m "$model" --only norm >/dev/null 2>&1 && { echo "bench step accepted --only"; exit 1; }
"$TRIREME" bench step >/dev/null 2>&1 && { echo "bench without a model was accepted"; exit 1; }
"$TRIREME" bench nothing -m "$model" >/dev/null 2>&1 && { echo "an unknown bench was accepted"; exit 1; }
# refused TEXT WHAT...: bench WHAT is exit code 2, and TEXT is in its line.
refused() {
    text=$1
    shift
    "$TRIREME" bench "$@" >/dev/null 2>"$dir/err"
    if [ $? -ne 2 ] || ! grep -qe "$text" "$dir/err"; then echo "bench $*: $(cat "$dir/err")"; exit 1; fi
}
refused 'step: -m MODEL is missing' step --profile "$dir/new.h5"
refused '--only: an option of' profile -m "$model" --only norm --profile "$dir/new.h5"
refused '--only: no operation is named' kernels -m "$model" --only ,
refused 'step: more is left over' step more -m "$model"

"$python" - "$dir/step" "$dir/load" "$dir/kernels" "$dir/only" "$TR_SRCDIR/kernels/kernels.h" "$dir/at" "$dir/profile" <<'PY'
import json, re, sys

def lines(path):
    return [json.loads(l) for l in open(path) if l.startswith("{")]

step, load = lines(sys.argv[1]), lines(sys.argv[2])
ceilings = [l for l in step if l["bench"] == "ceilings"]
assert len(ceilings) == 1 and ceilings[0]["read_bytes_per_s"] > 0 and ceilings[0]["fma_flops_per_s"] > 0, ceilings
timed = [l for l in step if l["bench"] == "step"]
want = {("decode", 1, 70), ("decode", 3, 70), ("decode", 1, 140), ("decode", 3, 140), ("prefill", 1, 130)}
assert {(l["kind"], l["sequences"], l["context"]) for l in timed} == want, timed
for l in timed:
    assert 0 < l["min_s"] <= l["median_s"] <= l["max_s"], l
    tokens = l["context"] if l["kind"] == "prefill" else l["sequences"]
    assert abs(l["tokens_per_s"] * l["median_s"] / tokens - 1) < 1e-3, l
plain, kept, loaded = load
assert [l["kind"] for l in load] == ["read, one buffer", "read, new memory", "load"], load
assert 0 < loaded["bytes"] <= plain["bytes"] == kept["bytes"] and all(l["bytes_per_s"] > 0 for l in load), load
text = open(sys.argv[1]).read()
for op in "linear norm kv_write mla_query topk sparse_mla dense_mha router moe sample".split():
    assert "  %s " % op in text, op

# Steps: bytes and flops of the same work, whatever its time; what a step touches is less than all weights and cache.
step = {(l["kind"], l["sequences"], l["context"]): l for l in timed}
for l in timed:
    assert l["bytes"] > 0 and l["flops"] > 0 and l["read_fraction"] > 0 and l["fma_fraction"] > 0, l
    assert abs(l["read_fraction"] * l["median_s"] * ceilings[0]["read_bytes_per_s"] / l["bytes"] - 1) < 0.01, l
assert step["decode", 1, 140]["flops"] < step["decode", 3, 140]["flops"] < 3.01 * step["decode", 1, 140]["flops"]
assert step["decode", 1, 70]["bytes"] < step["decode", 1, 140]["bytes"] < step["decode", 3, 140]["bytes"] < 30e6, step
for line in text.splitlines():  # every region that is an operation says what it moved
    f = line.split()
    if len(f) == 6 and f[0] in ("linear", "norm", "embed", "swiglu", "router", "sample", "kv_write", "sparse_mla"):
        assert f[4] != "-", line

# Rows behind others: the same number of them, with more keys to look at; in the plain form, one thread.
at = {l["context"]: l for l in lines(sys.argv[6]) if l["bench"] == "step" and l["kind"] == "prefill"}
assert set(at) == {64, 264} and at[64]["flops"] < at[264]["flops"], at
assert ", 1 thread, plain" in open(sys.argv[6]).read()

# Kernels: every operation of the table has lines, and what is looked at is right.
ops = re.findall(r"X\((\w+)\)", re.search(r"#define TR_OPS\(X\)((?:.*\\\n)*.*)", open(sys.argv[5]).read()).group(1))
kernels = [l for l in lines(sys.argv[3]) if l["bench"] == "kernel"]
assert len(ops) > 20 and set(ops) == {l["op"] for l in kernels}, set(ops) ^ {l["op"] for l in kernels}
for l in kernels:
    assert l["reps"] >= 5 and 0 < l["min_s"] <= l["median_s"] and l["bytes"] > 0, l
    assert l.get("error", 0) < 1e-5, l
checked = {l["op"] for l in kernels if "error" in l}
assert checked >= {"linear", "moe", "norm", "swiglu", "sparse_mla", "dense_mha", "index_logits", "topk", "mla_query", "mla_value"}
# Profile: a line for each thing that costs; the overhead is what its medians say, and no verdict.
costs = {l["what"]: l for l in lines(sys.argv[7]) if l["bench"] == "profile"}
assert list(costs) == ["regions", "profile", "with PAPI"], list(costs)
for l in costs.values():
    assert l["pairs"] == 3 and l["steps"] == 10 and l["off_median_s"] > 0 and l["on_median_s"] > 0, l
    assert l["overhead"] > -1 and l["overhead_error"] >= 0 and l["overhead_cpu_error"] >= 0 and l["flushes"] >= 2 and l["bytes"] > 0, l
    assert 0 <= l["thread_cpu_s"] < l["on_s"] and -1 < l["overhead_cpu"], l
assert costs["profile"]["off_median_s"] == costs["with PAPI"]["off_median_s"] == costs["regions"]["on_median_s"]
assert costs["regions"]["papi_events"] == costs["profile"]["papi_events"] == 0 <= costs["with PAPI"]["papi_events"]
assert {l["op"] for l in lines(sys.argv[4]) if l["bench"] == "kernel"} == {"topk", "norm"}
PY
