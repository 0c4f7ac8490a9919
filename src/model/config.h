/* config.json of a DeepSeek-V3.2 checkpoint (model.md 1): read, completed with defaults, checked, every mismatch in one
 * message. Plain numbers afterwards; sizes come from the file (models/tiny and the vectors have others than 671B). */
#ifndef TR_MODEL_CONFIG_H
#define TR_MODEL_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

enum {
    TR_ROPE_DIM_MAX = 1024, /* largest qk_rope_head_dim */
    TR_LAYERS_MAX = 4096,   /* num_hidden_layers */
};

typedef struct tr_config {
    int vocab_size, hidden_size, num_hidden_layers, num_nextn_predict_layers;
    int first_k_dense_replace, moe_layer_freq, intermediate_size, moe_intermediate_size;
    int n_routed_experts, n_shared_experts, num_experts_per_tok, n_group, topk_group;
    double routed_scaling_factor;
    bool norm_topk_prob;
    int num_attention_heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim,
        v_head_dim;
    int index_n_heads, index_head_dim, index_topk;
    double rms_norm_eps, rope_theta;
    struct { /* rope_scaling; present false: no YaRN, no mscale */
        bool present;
        double factor, beta_fast, beta_slow, mscale, mscale_all_dim;
        int original_max_position_embeddings;
    } yarn;
    int max_position_embeddings;
    int bos_token_id, eos_token_id;
    bool fp8; /* quantization_config is there: class Q tensors are F8_E4M3 + weight_scale_inv */
    bool scale_ue8m0; /* scale_fmt "ue8m0": concerns W8A8 activations only */
} tr_config;

/* overrides: n strings "key=value" put into the JSON object before it is checked (--override; nested keys by dots).
 * TR_E_INPUT: missing, not JSON, or refused, with every reason; TR_E_USAGE: a bad override. */
tr_status tr_config_load(tr_config *out, const char *model_dir, const char *const *overrides, int n,
                         tr_err *err);

static inline bool tr_config_is_moe(const tr_config *c, int layer)
{
    return layer >= c->first_k_dense_replace && layer % c->moe_layer_freq == 0;
}

/* Attention scale with YaRN's mscale^2 (model.md 3.2). */
double tr_config_attention_scale(const tr_config *c);

/* Rope table [n_positions, d/2, 2]: cos, sin in fp32 (model.md 3.2), d = qk_rope_head_dim. */
void tr_config_rope_table(const tr_config *c, int n_positions, float *table);
/* The d/2 inverse frequencies the table is made of. */
void tr_config_inv_freq(const tr_config *c, float *inv_freq);

#endif
