"""A checkpoint so small that a whole job takes hundredths of a second: 2 layers (one dense, one of 4 experts) of width 32, two
shards, random finite weights (the same ones each time), a vocabulary of the 256 bytes, four merges and MODEL's added tokens.

usage: small_model.py MODEL FOLDER     MODEL: a model folder whose tokenizer.json is the pattern; FOLDER is made
"""
import json
import os
import random
import struct
import sys

HIDDEN, Q_LORA, KV_LORA, HEADS, NOPE, ROPE, V = 32, 16, 16, 2, 8, 4, 8
INDEX_HEADS, INDEX_DIM, WIDTH, EXPERT_WIDTH, EXPERTS = 2, 8, 32, 16, 4
numbers = random.Random(1)


def fp8(shape):
    """e4m3, magnitudes of 1/4 to 15/8: never NaN."""
    n = shape[0] * shape[1]
    return "F8_E4M3", shape, bytes(numbers.randrange(0x28, 0x40) | numbers.choice((0, 0x80)) for _ in range(n))


def bf16(shape, constant=None):
    n = shape[0] * (shape[1] if len(shape) > 1 else 1)
    values = [constant if constant is not None else numbers.uniform(-0.5, 0.5) for _ in range(n)]
    return "BF16", shape, b"".join(struct.pack("<f", v)[2:] for v in values)


def f32(shape, constant):
    n = shape[0] * (shape[1] if len(shape) > 1 else 1)
    return "F32", shape, struct.pack("<%df" % n, *[constant] * n)


def quantised(tensors, name, rows, columns):
    tensors[name + ".weight"] = fp8([rows, columns])
    tensors[name + ".weight_scale_inv"] = f32([-(-rows // 128), -(-columns // 128)], 0.25)


def feed_forward(tensors, name, width):
    quantised(tensors, name + ".gate_proj", width, HIDDEN)
    quantised(tensors, name + ".up_proj", width, HIDDEN)
    quantised(tensors, name + ".down_proj", HIDDEN, width)


def layer(i):
    t, at, attention = {}, "model.layers.%d." % i, "model.layers.%d.self_attn." % i
    t[at + "input_layernorm.weight"] = bf16([HIDDEN], 1.0)
    t[at + "post_attention_layernorm.weight"] = bf16([HIDDEN], 1.0)
    quantised(t, attention + "q_a_proj", Q_LORA, HIDDEN)
    t[attention + "q_a_layernorm.weight"] = bf16([Q_LORA], 1.0)
    quantised(t, attention + "q_b_proj", HEADS * (NOPE + ROPE), Q_LORA)
    quantised(t, attention + "kv_a_proj_with_mqa", KV_LORA + ROPE, HIDDEN)
    t[attention + "kv_a_layernorm.weight"] = bf16([KV_LORA], 1.0)
    quantised(t, attention + "kv_b_proj", HEADS * (NOPE + V), KV_LORA)
    quantised(t, attention + "o_proj", HIDDEN, HEADS * V)
    quantised(t, attention + "indexer.wq_b", INDEX_HEADS * INDEX_DIM, Q_LORA)
    quantised(t, attention + "indexer.wk", INDEX_DIM, HIDDEN)
    t[attention + "indexer.k_norm.weight"] = f32([INDEX_DIM], 1.0)
    t[attention + "indexer.k_norm.bias"] = f32([INDEX_DIM], 0.0)
    t[attention + "indexer.weights_proj.weight"] = bf16([INDEX_HEADS, HIDDEN])
    if i == 0:
        feed_forward(t, at + "mlp", WIDTH)
        return t
    t[at + "mlp.gate.weight"] = bf16([EXPERTS, HIDDEN])
    t[at + "mlp.gate.e_score_correction_bias"] = f32([EXPERTS], 0.0)
    for e in range(EXPERTS):
        feed_forward(t, at + "mlp.experts.%d" % e, EXPERT_WIDTH)
    feed_forward(t, at + "mlp.shared_experts", EXPERT_WIDTH)
    return t


def write_shard(path, tensors):
    header, data = {}, b""
    for name, (dtype, shape, raw) in sorted(tensors.items(), key=lambda item: -{"F32": 4, "BF16": 2, "F8_E4M3": 1}[item[1][0]]):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def tokenizer(pattern):
    """The pattern's frame around a vocabulary of bytes; returns it and the first id behind."""
    with open(os.path.join(pattern, "tokenizer.json"), encoding="utf-8") as f:
        t = json.load(f)
    plain = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    characters = [chr(b) for b in plain] + [chr(0x100 + i) for i in range(256 - len(plain))]
    merges = ["T h", "Th e", "o f", "c o"]
    words = characters + [m.replace(" ", "") for m in merges]
    t["model"]["vocab"] = {w: i for i, w in enumerate(words)}
    t["model"]["merges"] = merges
    for i, a in enumerate(t["added_tokens"]):
        a["id"] = len(words) + i
    return t, len(words) + len(t["added_tokens"])


def main():
    pattern, folder = sys.argv[1:]
    os.makedirs(folder)
    t, n_vocab = tokenizer(pattern)
    ids = {a["content"]: a["id"] for a in t["added_tokens"]}
    with open(os.path.join(pattern, "config.json")) as f:
        config = json.load(f)
    config.update(
        vocab_size=n_vocab, hidden_size=HIDDEN, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, q_lora_rank=Q_LORA, kv_lora_rank=KV_LORA, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
        v_head_dim=V, intermediate_size=WIDTH, moe_intermediate_size=EXPERT_WIDTH, n_routed_experts=EXPERTS,
        num_experts_per_tok=2, n_group=2, topk_group=1, index_n_heads=INDEX_HEADS, index_head_dim=INDEX_DIM, index_topk=64,
        num_nextn_predict_layers=0, bos_token_id=ids["<｜begin▁of▁sentence｜>"], eos_token_id=ids["<｜end▁of▁sentence｜>"])
    shards = [dict(layer(0), **{"model.embed_tokens.weight": bf16([n_vocab, HIDDEN])}),
              dict(layer(1), **{"model.norm.weight": bf16([HIDDEN], 1.0), "lm_head.weight": bf16([n_vocab, HIDDEN])})]
    weight_map, total = {}, 0
    for i, tensors in enumerate(shards, 1):
        name = "model-%05d-of-%05d.safetensors" % (i, len(shards))
        write_shard(os.path.join(folder, name), tensors)
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(len(raw) for _, _, raw in tensors.values())
    for name, value in (("config.json", config), ("tokenizer.json", t),
                        ("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}),
                        ("generation_config.json", {"temperature": 0.0})):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(value, f, ensure_ascii=False)


main()
