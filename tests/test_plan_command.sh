#!/bin/sh
# trireme plan: a folder with nothing but config.json, table and JSON, the table of resident weights, rules, thousands of
# ranks at once. test_estimate has the numbers one by one; here it is the command.
set -u
: "${TRIREME:?}" "${TR_SRCDIR:?}"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "skipped: no $python to read JSON with"; exit 77; }
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
scratch plan
model=$dir/model
mkdir "$model" && cp "$TR_SRCDIR/jobs/deepseek-v3.2.config.json" "$model/config.json" || exit 1

fail()
{
    echo "$*"
    exit 1
}

# refused CODE WORD ARGUMENTS...: plan ends with this code, one line on stderr that has the word, nothing on stdout.
refused()
{
    code=$1 word=$2
    shift 2
    "$TRIREME" plan "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    [ "$got" -eq "$code" ] || fail "plan $*: exit $got, not $code"
    [ ! -s "$dir/out" ] || fail "plan $*: it was refused and printed something"
    [ "$(wc -l <"$dir/err")" -eq 1 ] || fail "plan $*: not one line: $(cat "$dir/err")"
    grep -qF -e "$word" "$dir/err" || fail "plan $*: '$(cat "$dir/err")' does not say '$word'"
}

refused 2 '-m MODEL is missing' --ranks 8
refused 2 '--ranks N is missing' -m "$model"
refused 2 'belongs to no option' -m "$model" --ranks 8 more
refused 2 '--ranks 0' -m "$model" --ranks 0
refused 2 '--gpu abacus' -m "$model" --ranks 8 --gpu abacus
refused 2 '--max-model-len 163841: the model allows 163840' -m "$model" --ranks 8 --max-model-len 163841
refused 65 config.json -m "$dir" --ranks 8
refused 2 'tp 3 is not the number of ranks, 8; 128 attention heads do not divide by tp 3' -m "$model" --ranks 8 --tp 3
refused 2 'Legal for this number of ranks: --tp 8 --ep 8' -m "$model" --ranks 8 --tp 7
refused 2 'expert width 2048 does not divide by moe-tp 3' -m "$model" --ranks 24 --dp 3 --ep 8 --moe-tp 3
refused 2 'ep 8 * moe-tp 2 does not divide the stage' -m "$model" --ranks 8 --ep 8 --moe-tp 2
refused 2 '61 layers are fewer than the 64 pipeline stages' -m "$model" --ranks 64 --pp 64
refused 2 'adds up to 60 layers' -m "$model" --ranks 32 --pp 4 --pp-layers 16,16,16,12
refused 2 'stage 1 owns 0 layers' -m "$model" --ranks 16 --pp-layers 61,0
refused 2 '--pp-layers has 4 stages, pp is 2' -m "$model" --ranks 16 --pp 2 --pp-layers 16,16,16,13
for list in '' ',' '1,,2' '1,' ',1' '-1,62' 16x 99999999999999999999; do
    refused 2 '--pp-layers' -m "$model" --ranks 8 --pp-layers "$list"
done

# runs GPU SETTING... / stops GPU TEXT SETTING...: the model with these put into its config.json is one that the device of the plan
# computes, or a warning says why not.
runs()
{
    gpu=$1
    shift
    # shellcheck disable=SC2046 # an option each
    "$TRIREME" plan -m "$model" --ranks 1 --gpu "$gpu" $(printf -- '--override %s ' "$@") >"$dir/out" || fail "plan $* failed"
    ! grep -F 'it does not run' "$dir/out" || fail "plan --gpu $gpu $*: a warning too many"
}
stops()
{
    gpu=$1 text=$2
    shift 2
    # shellcheck disable=SC2046 # an option each
    "$TRIREME" plan -m "$model" --ranks 1 --gpu "$gpu" $(printf -- '--override %s ' "$@") >"$dir/out" || fail "plan $* failed"
    grep -qxF "Warning: it does not run: config.json: $text" "$dir/out" || fail "plan --gpu $gpu $*: not '$text': $(cat "$dir/out")"
}
runs none n_routed_experts=1024 kv_lora_rank=960 qk_nope_head_dim=448 v_head_dim=512 index_topk=4096 hidden_size=16384
stops none 'n_routed_experts 1032: the CPU backend takes at most 1024' n_routed_experts=1032
stops none 'kv_lora_rank + qk_rope_head_dim 1028: the CPU backend takes at most 1024' kv_lora_rank=964
stops none 'kv_lora_rank 514: the CPU backend takes multiples of 4' kv_lora_rank=514
stops none 'qk_nope_head_dim + qk_rope_head_dim 513: the CPU backend takes at most 512' qk_nope_head_dim=449
stops none 'v_head_dim 513: the CPU backend takes at most 512' v_head_dim=513
runs h200 n_routed_experts=1024 kv_lora_rank=512 qk_rope_head_dim=128 qk_nope_head_dim=128 v_head_dim=128 index_topk=2048 \
    hidden_size=8192 q_lora_rank=8192
runs h200 qk_nope_head_dim=192 v_head_dim=64
runs h200 qk_nope_head_dim=64
stops h200 'n_routed_experts 1032: the CUDA backend takes at most 1024' n_routed_experts=1032
stops h200 'hidden_size 8320: the CUDA backend takes at most 8192' hidden_size=8320
stops h200 'q_lora_rank 8320: the CUDA backend takes at most 8192' q_lora_rank=8320
stops h200 'kv_lora_rank 516: the CUDA backend takes at most 512' kv_lora_rank=516
stops h200 'kv_lora_rank 510: the CUDA backend takes multiples of 4' kv_lora_rank=510
stops h200 'qk_nope_head_dim 127: the CUDA backend takes multiples of 2' qk_nope_head_dim=127
stops h200 'qk_nope_head_dim + qk_rope_head_dim 258: the CUDA backend takes at most 256' qk_nope_head_dim=194 v_head_dim=64
stops h200 'qk_nope_head_dim + v_head_dim 258: the CUDA backend takes at most 256' qk_nope_head_dim=130
stops h200 'v_head_dim 129: the CUDA backend takes at most 128' v_head_dim=129 qk_nope_head_dim=64
"$TRIREME" plan -m "$model" --ranks 8 --kv-dtype f32 | grep -qxF 'Warning: it does not run: --kv-dtype f32: GPUs have caches of fp8 and bf16 only' ||
    fail 'caches of f32 on GPUs are not warned of'
stops h200 'index_topk 2049: the CUDA backend takes at most 2048' index_topk=2049

# json NAME ARGUMENTS...: the forecast into $dir/NAME.
json()
{
    name=$1
    shift
    "$TRIREME" plan -m "$model" --json "$@" >"$dir/$name" || fail "plan $* failed"
}

json tp8 --ranks 8
json xt8 --ranks 8 --ep 1 --moe-tp 8
json dp8 --ranks 8 --dp 8
json dp16 --ranks 16 --dp 16
json dp32 --ranks 32 --dp 32
json cp8 --ranks 8 --cp 8 --max-batch-tokens 8192
json pp4 --ranks 32 --pp 4 --pp-layers 16,16,16,13
json balanced --ranks 32 --pp 4
json uneven --ranks 32 --pp 4 --pp-layers 40,7,7,7
json gather --ranks 8 --dp 8 --ep 1 --moe-tp 8
json odd --ranks 128
json dense --ranks 8 --override num_hidden_layers=3
json one --ranks 1
json ten --ranks 10
json copies --ranks 8 --ep 1
json cpu --ranks 4 --dp 2 --gpu none --kv-dtype f32
json many --ranks 7680 --pp 60
"$TRIREME" plan -m "$model" --ranks 4096 >"$dir/table" || fail "4096 ranks failed"
[ "$(wc -l <"$dir/table")" -lt 80 ] || fail "a line for every rank"
[ "$(awk 'length > 130' "$dir/table" | grep -cv '^Default\|^Warning\|ranks: ')" -eq 0 ] || fail "long lines"
for word in 'x tp 128;' 'Warning: self_attn.q_b_proj.weight' 'over nodes' 'Time of a step' 'Rates of h200'; do
    grep -qF -e "$word" "$dir/table" || fail "the table does not say '$word'"
done
"$TRIREME" plan -m "$model" --ranks 8 >/dev/full 2>"$dir/err"
[ $? -eq 74 ] || fail "a full disk was not noticed"

"$python" - "$dir" <<'PY'
import json, sys

def load(name):
    return json.load(open(sys.argv[1] + "/" + name))

def near(got, want, slack):
    assert abs(got - want) <= slack, (got, want)

# parallel.md 1.4: attention, MoE and dense, total. Its vocabulary column cuts embedding and head over 8 in the first rows
# and has both whole in the others; here the embedding is whole, the head is cut over tp. It has no MTP layer, no second form.
for name, attention, moe, vocab, total in [
    ("tp8", 3.1, 82.4, 1 / 8, 86.0), ("xt8", 3.1, 82.4, 1 / 8, 86.0), ("dp8", 12.3, 85.7, 1 / 8, 98.5),
    ("dp16", 12.3, 44.8, 1, 60.8), ("dp32", 12.3, 24.4, 1, 40.4)]:
    f = load(name)
    assert len(f["classes"]) == 1 and f["classes"][0]["ranks"] == f["ranks"], f["classes"]
    w = f["classes"][0]["weights"]
    near(w["attention"] / 1e9, attention, 0.051)
    near(sum(w[k] for k in ("dense", "shared", "routed", "router")) / 1e9, moe, 0.051)
    both = 2 * 2 * 129280 * 7168
    near((w["attention"] + w["dense"] + w["shared"] + w["routed"] + w["router"] + both * vocab) / 1e9, total, 0.08)
    near(w["embed"], both / 2, 1)
    near(w["head"], both / 2 / f["grid"]["tp"], 30000)
    assert f["classes"][0]["weight_bytes"] == sum(w.values())
    assert f["classes"][0]["cache_bytes_per_token"] == 48068
    left = f["rates"]["memory_bytes"] - f["rates"]["reserve_bytes"] - f["classes"][0]["weight_bytes"]
    left -= f["classes"][0]["workspace_bytes"]
    near(f["tokens_per_replica"], left / 48068, 64)
    for s in f["steps"]:
        assert 0 < s["slowest_stage_s"] <= s["latency_s"] < 10 and 0 < s["roofline_s"] < s["latency_s"], s
        near(s["tokens_per_s"] * s["slowest_stage_s"] / s["rows"] / f["grid"]["dp"], 1, 1e-9)
    assert {s["step"] for s in f["steps"]} == {"decode", "prefill"} and len(f["steps"]) == 4

def traffic(f, where):
    return {t["what"]: t for t in f["traffic"] if t["where"] == where}

# parallel.md 2.7 at n = 8: 50 176 B a token and layer
layer = traffic(load("tp8"), "decode, MoE layer")
near(sum(t["sent_bytes"] for t in layer.values()) / 32, 50176, 0.01)
assert layer["o_proj"]["layers"] == 58 and layer["o_proj"]["group"] == "ATTN_TP"
keys = traffic(load("cp8"), "prefill, MoE layer")
near(keys["index keys"]["sent_bytes"], 7 / 8 * 8192 * 132, 1)
near(keys["latents"]["sent_bytes"], 7 / 8 * 8192 * 656, 1)
assert "index keys" not in traffic(load("cp8"), "decode, MoE layer")

f = load("tp8")
assert f["grid"] == dict(pp=1, dp=1, cp=1, tp=8, moe_dp=1, ep=8, moe_tp=1) and "tp 8: all ranks" in f["defaults"]
assert not f["warnings"], f["warnings"]
f = load("pp4")
assert f["stage_layers"] == [16, 16, 16, 13] and sum(c["ranks"] for c in f["classes"]) == 32
assert [c["layers"] for c in f["classes"]] == [16, 16, 13] and f["classes"][1]["ranks"] == 16
f = load("balanced")
assert sum(f["stage_layers"]) == 61 and not any("uneven" in w for w in f["warnings"]), f
even = load("pp4")["steps"][0]["slowest_stage_s"]
assert f["steps"][0]["slowest_stage_s"] <= even
assert any("uneven" in w for w in load("uneven")["warnings"])
assert any("gathers the rows of all ranks" in w for w in load("gather")["warnings"])
assert any("q_b_proj" in w and "192 each" in w for w in load("odd")["warnings"])
assert "it does not run: --tp 128: the CUDA backend takes at most 64" in load("odd")["warnings"], load("odd")["warnings"]
assert all("MoE" not in t["where"] for t in load("dense")["traffic"])
f = load("one")
assert f["traffic"] == [] and f["tokens_per_replica"] == 0 and any("does not fit" in w for w in f["warnings"])
assert not any("would halve" in w for w in load("ten")["warnings"])
assert any("--ep 2 would halve" in w for w in load("copies")["warnings"]), load("copies")["warnings"]
f = load("cpu")
assert f["rates"] is None and f["steps"] == [] and f["tokens_per_replica"] == -1
near(traffic(f, "decode, MoE layer")["o_proj"]["given_bytes"], 32 * 7168 * 4, 0.1)
f = load("many")
assert sum(c["ranks"] for c in f["classes"]) == 7680 and len(f["classes"]) < 10 and len(f["stage_layers"]) == 60
PY
