/* The published model's sizes (model.md 1), for tests of what is computed from them. */
#ifndef TRIREME_TESTS_PUBLISHED_MODEL_H
#define TRIREME_TESTS_PUBLISHED_MODEL_H

#include "model/config.h"

static const tr_config real = {
    .vocab_size = 129280,
    .hidden_size = 7168,
    .num_hidden_layers = 61,
    .num_nextn_predict_layers = 1,
    .first_k_dense_replace = 3,
    .moe_layer_freq = 1,
    .intermediate_size = 18432,
    .moe_intermediate_size = 2048,
    .n_routed_experts = 256,
    .n_shared_experts = 1,
    .num_experts_per_tok = 8,
    .n_group = 8,
    .topk_group = 4,
    .num_attention_heads = 128,
    .q_lora_rank = 1536,
    .kv_lora_rank = 512,
    .qk_nope_head_dim = 128,
    .qk_rope_head_dim = 64,
    .v_head_dim = 128,
    .index_n_heads = 64,
    .index_head_dim = 128,
    .index_topk = 2048,
    .max_position_embeddings = 163840,
    .fp8 = true,
};

#endif
