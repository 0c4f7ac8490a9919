/* This rank's weights: slices in the checkpoint's number format, packed once into the backend's order. Plain structs:
 * model/layer.c reads them by name. Owned by tr_weights; freed with it. */
#ifndef TR_MODEL_WEIGHTS_H
#define TR_MODEL_WEIGHTS_H

#include <stdbool.h>

#include "base/log.h"
#include "base/region.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/slice.h"

typedef struct tr_attention_weights { /* heads: this rank's */
    float *input_norm;                /* [hidden] */
    tr_linear q_a;                    /* [q_lora, hidden] */
    float *q_a_norm;                  /* [q_lora] */
    tr_linear q_b;                    /* [heads * (nope + rope), q_lora] */
    tr_linear kv_a;                   /* [kv_lora + rope, hidden] */
    float *kv_a_norm;                 /* [kv_lora] */
    tr_linear w_uk, w_uk_t,
        w_uv;                   /* heads x [nope, kv_lora], [kv_lora, nope], [v, kv_lora] of kv_b */
    tr_linear o;                /* [hidden, heads * v] */
    tr_linear index_q, index_k; /* [index_heads * index_dim, q_lora], [index_dim, hidden] */
    float *index_k_norm, *index_k_bias; /* [index_dim] */
    tr_linear index_w;                  /* [index_heads, hidden] */
} tr_attention_weights;

typedef struct tr_mlp_weights { /* dense MLP or shared expert */
    tr_linear gate_up;          /* [2 inner, hidden], gate rows first */
    tr_linear down;             /* [hidden, inner] */
    int inner;                  /* this rank's part */
} tr_mlp_weights;

typedef struct tr_moe_weights {
    tr_linear gate;          /* [n_routed_experts, hidden] */
    float *gate_bias;        /* [n_routed_experts] or NULL */
    tr_linear gate_up, down; /* local experts x [2 inner, hidden], [hidden, inner] */
    tr_mlp_weights shared;
    int e_first, n_local, inner;
} tr_moe_weights;

typedef struct tr_layer_weights {
    tr_attention_weights attention;
    float *post_norm; /* [hidden] */
    bool is_moe;
    tr_mlp_weights mlp; /* !is_moe */
    tr_moe_weights moe; /* is_moe */
} tr_layer_weights;

typedef struct tr_mtp_weights {       /* layer num_hidden_layers: loaded, not yet used */
    float *enorm, *hnorm, *head_norm; /* [hidden] */
    tr_linear eh;                     /* [hidden, 2 hidden] */
    tr_layer_weights layer;
} tr_mtp_weights;

typedef struct tr_weights {
    void *embed; /* [vocab, hidden] bf16 (or f32), row-major */
    tr_dtype embed_dtype;
    tr_layer_weights *layer; /* [slice.layers.n] */
    float *norm;             /* [hidden] */
    tr_linear head;          /* [vocab, hidden] */
    tr_mtp_weights *mtp;     /* NULL: none */
    tr_slice slice;
    size_t bytes; /* device memory held */
    uint64_t bytes_read;
    struct tr_weights_memory *memory; /* private: what to release */
} tr_weights;

typedef enum tr_load_format { TR_LOAD_SAFETENSORS, TR_LOAD_DUMMY } tr_load_format;

/* Load from a checkpoint (checked: every tensor the config asks for is there with its shape and class, and none is left
 * over; every mismatch in one message), or make deterministic random weights of the config (checkpoint NULL). */
tr_status tr_weights_load(tr_weights **out, const tr_config *config, const tr_slice *slice,
                          const tr_checkpoint *checkpoint, tr_load_format format, uint64_t seed,
                          tr_device *device, const tr_ops *ops, tr_log *log, tr_regions *regions,
                          tr_err *err);
void tr_weights_free(tr_weights *w, tr_device *device, const tr_ops *ops);

#endif
