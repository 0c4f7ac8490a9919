#!/bin/sh
# What the CUDA backend asks of a GPU, without one: the program linked with a CUDA runtime that does nothing, but refuses what a real one
# refuses (tests/fault/cuda_shim_check.h): launches, shared memory, tensor maps, captures that lanes have not come back to. At the real
# model's widths and at odd ones, every job must end well.
set -u
: "${TR_BUILDDIR:?}" "${TR_SRCDIR:?}"
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
program=$TR_BUILDDIR/tests/trireme_on_shim
[ -x "$program" ] || skip 'the CUDA backend was not built'
one_rank
scratch cuda-shapes
export OMP_NUM_THREADS=1 CUDA_SHIM_GIB=139
mkdir "$dir/real" || exit 1
cp "$TR_SRCDIR/jobs/deepseek-v3.2.config.json" "$dir/real/config.json" || exit 1

# Prompts of all kinds of lengths, and what the answers are to tell.
awk 'BEGIN {
    n = split("1 2 63 64 65 127 128 129 1000 2047 2048 2049 2050 4095 4096 4097 9000 33000", length_of, " ")
    k = split("\"temperature\":0;\"temperature\":1,\"top_p\":0.9;\"temperature\":0.7,\"top_k\":20,\"logprobs\":5;\"n\":3;" \
        "\"echo\":true,\"logprobs\":2;\"presence_penalty\":1.0;\"min_p\":0.1;\"seed\":4", extra, ";")
    for (i = 0; i < 90; i++) {
        printf "{\"custom_id\":\"r%d\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{\"prompt\":[", i
        rows = i < n ? length_of[i + 1] : i * 7919 % 900 + 1
        for (j = 0; j < rows; j++) printf "%s%d", j ? "," : "", 5 + (i * 31 + j * 7) % 1900
        printf "],\"max_tokens\":%d,\"ignore_eos\":true,%s}}\n", 1 + i % 20, extra[i % k + 1]
    }
}' >"$dir/in"
head -n 12 "$dir/in" >"$dir/few"

# run MODEL INPUT OPTION...: a job, which ends well and answers all.
run() {
    model=$1 input=$dir/$2
    shift 2
    rm -f "$dir"/out*
    "$program" batch -m "$model" --load-format dummy --device cuda -i "$input" -o "$dir/out" "$@" >"$dir/log" 2>&1
    is "$*: exit status" 0 "$?"
    is "$*: answers" "$(lines "$input")" "$(grep -c '"choices"' "$dir/out")"
}

real() { # 3 dense layers and 2 of experts
    run "$dir/real" in --override num_hidden_layers=5 --max-model-len 40000 "$@"
}
real --max-sequences 200 --max-batch-tokens 4096
real --max-sequences 33 --max-batch-tokens 16384 --kv-dtype bf16
real --max-sequences 9 --max-batch-tokens 515 --no-overlap
# What a member of 8, of 4 and of 2 has of the heads.
for heads in 16 32 64; do
    real --max-sequences 64 --max-batch-tokens 2048 --override "num_attention_heads=$heads" --override n_routed_experts=32
done
# Heads that neither form on the tensor cores takes, and widths off the grid of scales.
for heads in 1 33 40 63 65 96; do
    run "$TR_SRCDIR/models/tiny" few --override "num_attention_heads=$heads" --max-sequences 5 --max-batch-tokens 100 --max-model-len 4200
done
for width in moe_intermediate_size=72 intermediate_size=200 q_lora_rank=192 index_n_heads=3 hidden_size=320; do
    run "$TR_SRCDIR/models/tiny" few --override "$width" --max-sequences 5 --max-batch-tokens 100 --max-model-len 4200
done
# Each size at its limit (kernels/limits.h); one above it is refused before anything is loaded.
small() { # SETTING...
    # shellcheck disable=SC2046 # an option each
    run "$TR_SRCDIR/models/tiny" few --override num_hidden_layers=2 $(printf -- '--override %s ' "$@") --max-sequences 5 --max-batch-tokens 100 \
        --max-model-len 4200
}
small n_routed_experts=1024 index_topk=2048 q_lora_rank=8192
small hidden_size=8192 qk_rope_head_dim=128
small qk_nope_head_dim=192 v_head_dim=64 kv_lora_rank=508
# Rows of kv_b whose heads begin each elsewhere in a scale block.
small qk_nope_head_dim=64
small qk_nope_head_dim=126 v_head_dim=33
for above in n_routed_experts=1028 index_topk=2049 q_lora_rank=8320 hidden_size=8320 kv_lora_rank=516 kv_lora_rank=510 qk_nope_head_dim=127 \
    qk_nope_head_dim=194 v_head_dim=129; do
    "$program" batch -m "$TR_SRCDIR/models/tiny" --load-format dummy --device cuda --override "$above" --prompt hello >"$dir/log" 2>&1
    is "$above: exit status" 2 "$?"
    has "$above" 'trireme: --override: config.json: .*: the CUDA backend takes '
done
done_checking
