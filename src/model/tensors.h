/* The tensors a config asks for (model.md 2): names, shapes and classes, in one table. The checkpoint is matched against
 * it, the loader asks it for names, dummy weights are made from it. Pure functions of the config. */
#ifndef TR_MODEL_TENSORS_H
#define TR_MODEL_TENSORS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "model/checkpoint.h"
#include "model/config.h"

enum { TR_SCALE_BLOCK = 128 }; /* rows and columns of a class Q tensor that share a scale */

typedef enum tr_class {
    TR_CLASS_Q, /* F8_E4M3 with <name>_scale_inv; BF16 or F32 in a model without quantization_config */
    TR_CLASS_B, /* BF16, F32 accepted */
    TR_CLASS_F, /* F32, BF16 accepted */
} tr_class;

/* What dummy weights are like, so that activations keep their size from layer to layer. */
typedef enum tr_init {
    TR_INIT_MATRIX, /* normal, std n_in^-0.5 */
    TR_INIT_EMBED,  /* normal, std 1 */
    TR_INIT_GAIN,   /* 1 + small */
    TR_INIT_SMALL,  /* small */
    TR_INIT_ZERO,
} tr_init;

typedef enum tr_role {
    TR_ROLE_EMBED,
    TR_ROLE_NORM,
    TR_ROLE_HEAD,
    /* every layer */
    TR_ROLE_INPUT_NORM,
    TR_ROLE_POST_NORM,
    TR_ROLE_Q_A,
    TR_ROLE_Q_A_NORM,
    TR_ROLE_Q_B,
    TR_ROLE_KV_A,
    TR_ROLE_KV_A_NORM,
    TR_ROLE_KV_B,
    TR_ROLE_O,
    TR_ROLE_INDEX_Q,
    TR_ROLE_INDEX_K,
    TR_ROLE_INDEX_K_NORM,
    TR_ROLE_INDEX_K_BIAS,
    TR_ROLE_INDEX_W,
    /* dense layers */
    TR_ROLE_GATE_PROJ,
    TR_ROLE_UP_PROJ,
    TR_ROLE_DOWN_PROJ,
    /* MoE layers */
    TR_ROLE_ROUTER,
    TR_ROLE_ROUTER_BIAS,
    TR_ROLE_SHARED_GATE,
    TR_ROLE_SHARED_UP,
    TR_ROLE_SHARED_DOWN,
    /* every expert of a MoE layer */
    TR_ROLE_EXPERT_GATE,
    TR_ROLE_EXPERT_UP,
    TR_ROLE_EXPERT_DOWN,
    /* the MTP layer */
    TR_ROLE_MTP_EMBED,
    TR_ROLE_ENORM,
    TR_ROLE_HNORM,
    TR_ROLE_EH,
    TR_ROLE_MTP_NORM,
    TR_ROLE_MTP_HEAD,
    TR_N_ROLES
} tr_role;

typedef struct tr_wanted { /* one tensor the config asks for */
    char name[112];
    tr_class class;
    tr_init init;
    bool optional; /* may be absent: a copy of another */
    int rank;      /* 1 or 2 */
    int64_t shape[2];
} tr_wanted;

/* layer: the MTP layer is num_hidden_layers; unused by the first three roles. expert: of the expert roles. */
void tr_wanted_get(tr_wanted *out, const tr_config *config, tr_role role, int layer, int expert);

/* The MTP layer is a MoE layer whatever moe_layer_freq says (model.md 7.1). */
bool tr_layer_is_moe(const tr_config *config, int layer);

/* Every tensor in turn, layer by layer, until see returns false; returns what see last returned. */
bool tr_wanted_each(const tr_config *config, bool (*see)(void *ctx, const tr_wanted *w), void *ctx);

/* Everything asked for is there with its shape and class, and nothing else (but for an MTP layer where the config has none); all
 * mismatches in one TR_E_INPUT. */
tr_status tr_wanted_check(const tr_config *config, const tr_checkpoint *checkpoint, tr_err *err);

#endif
