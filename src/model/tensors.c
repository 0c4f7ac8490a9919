#include <config.h>

#include "model/tensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "model/problems.h"

typedef enum place { TOP, LAYER, DENSE, MOE, EXPERT, MTP } place;

typedef enum axis {      /* what a dimension is, see extent() */
                    ONE, /* no second dimension */
                    VOCAB,
                    HIDDEN,
                    HIDDEN_2,
                    Q_LORA,
                    Q_ROWS,
                    KV_LORA,
                    KV_A_ROWS,
                    KV_B_ROWS,
                    O_COLS,
                    INDEX_ROWS,
                    INDEX_DIM,
                    INDEX_HEADS,
                    DENSE_INNER,
                    EXPERT_INNER,
                    SHARED_INNER,
                    EXPERTS
} axis;

typedef struct row {
    place place;
    const char *name; /* behind "model.layers.N." but for TOP; behind "...experts.E." for EXPERT */
    axis rows, columns;
    tr_class class;
    tr_init init;
    bool optional;
} row;

/* clang-format off */
static const row table[TR_N_ROLES] = {
    [TR_ROLE_EMBED]        = {TOP, "model.embed_tokens.weight", VOCAB, HIDDEN, TR_CLASS_B, TR_INIT_EMBED, false},
    [TR_ROLE_NORM]         = {TOP, "model.norm.weight", HIDDEN, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_HEAD]         = {TOP, "lm_head.weight", VOCAB, HIDDEN, TR_CLASS_B, TR_INIT_MATRIX, false},

    [TR_ROLE_INPUT_NORM]   = {LAYER, "input_layernorm.weight", HIDDEN, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_POST_NORM]    = {LAYER, "post_attention_layernorm.weight", HIDDEN, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_Q_A]          = {LAYER, "self_attn.q_a_proj.weight", Q_LORA, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_Q_A_NORM]     = {LAYER, "self_attn.q_a_layernorm.weight", Q_LORA, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_Q_B]          = {LAYER, "self_attn.q_b_proj.weight", Q_ROWS, Q_LORA, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_KV_A]         = {LAYER, "self_attn.kv_a_proj_with_mqa.weight", KV_A_ROWS, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_KV_A_NORM]    = {LAYER, "self_attn.kv_a_layernorm.weight", KV_LORA, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_KV_B]         = {LAYER, "self_attn.kv_b_proj.weight", KV_B_ROWS, KV_LORA, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_O]            = {LAYER, "self_attn.o_proj.weight", HIDDEN, O_COLS, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_INDEX_Q]      = {LAYER, "self_attn.indexer.wq_b.weight", INDEX_ROWS, Q_LORA, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_INDEX_K]      = {LAYER, "self_attn.indexer.wk.weight", INDEX_DIM, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_INDEX_K_NORM] = {LAYER, "self_attn.indexer.k_norm.weight", INDEX_DIM, ONE, TR_CLASS_F, TR_INIT_GAIN, false},
    [TR_ROLE_INDEX_K_BIAS] = {LAYER, "self_attn.indexer.k_norm.bias", INDEX_DIM, ONE, TR_CLASS_F, TR_INIT_SMALL, false},
    [TR_ROLE_INDEX_W]      = {LAYER, "self_attn.indexer.weights_proj.weight", INDEX_HEADS, HIDDEN, TR_CLASS_B, TR_INIT_MATRIX, false},

    [TR_ROLE_GATE_PROJ]    = {DENSE, "mlp.gate_proj.weight", DENSE_INNER, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_UP_PROJ]      = {DENSE, "mlp.up_proj.weight", DENSE_INNER, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_DOWN_PROJ]    = {DENSE, "mlp.down_proj.weight", HIDDEN, DENSE_INNER, TR_CLASS_Q, TR_INIT_MATRIX, false},

    [TR_ROLE_ROUTER]       = {MOE, "mlp.gate.weight", EXPERTS, HIDDEN, TR_CLASS_B, TR_INIT_MATRIX, false},
    /* Without the bias a router with topk_method noaux_tc would choose other experts: never optional. */
    [TR_ROLE_ROUTER_BIAS]  = {MOE, "mlp.gate.e_score_correction_bias", EXPERTS, ONE, TR_CLASS_F, TR_INIT_ZERO, false},
    [TR_ROLE_SHARED_GATE]  = {MOE, "mlp.shared_experts.gate_proj.weight", SHARED_INNER, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_SHARED_UP]    = {MOE, "mlp.shared_experts.up_proj.weight", SHARED_INNER, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_SHARED_DOWN]  = {MOE, "mlp.shared_experts.down_proj.weight", HIDDEN, SHARED_INNER, TR_CLASS_Q, TR_INIT_MATRIX, false},

    [TR_ROLE_EXPERT_GATE]  = {EXPERT, "gate_proj.weight", EXPERT_INNER, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_EXPERT_UP]    = {EXPERT, "up_proj.weight", EXPERT_INNER, HIDDEN, TR_CLASS_Q, TR_INIT_MATRIX, false},
    [TR_ROLE_EXPERT_DOWN]  = {EXPERT, "down_proj.weight", HIDDEN, EXPERT_INNER, TR_CLASS_Q, TR_INIT_MATRIX, false},

    [TR_ROLE_MTP_EMBED]    = {MTP, "embed_tokens.weight", VOCAB, HIDDEN, TR_CLASS_B, TR_INIT_EMBED, true},
    [TR_ROLE_ENORM]        = {MTP, "enorm.weight", HIDDEN, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_HNORM]        = {MTP, "hnorm.weight", HIDDEN, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_EH]           = {MTP, "eh_proj.weight", HIDDEN, HIDDEN_2, TR_CLASS_B, TR_INIT_MATRIX, false},
    [TR_ROLE_MTP_NORM]     = {MTP, "shared_head.norm.weight", HIDDEN, ONE, TR_CLASS_B, TR_INIT_GAIN, false},
    [TR_ROLE_MTP_HEAD]     = {MTP, "shared_head.head.weight", VOCAB, HIDDEN, TR_CLASS_B, TR_INIT_MATRIX, true},
};
/* clang-format on */

static int64_t extent(const tr_config *c, axis a)
{
    switch (a) {
    case ONE:
        return 1;
    case VOCAB:
        return c->vocab_size;
    case HIDDEN:
        return c->hidden_size;
    case HIDDEN_2:
        return 2 * c->hidden_size;
    case Q_LORA:
        return c->q_lora_rank;
    case Q_ROWS:
        return c->num_attention_heads * (c->qk_nope_head_dim + c->qk_rope_head_dim);
    case KV_LORA:
        return c->kv_lora_rank;
    case KV_A_ROWS:
        return c->kv_lora_rank + c->qk_rope_head_dim;
    case KV_B_ROWS:
        return c->num_attention_heads * (c->qk_nope_head_dim + c->v_head_dim);
    case O_COLS:
        return c->num_attention_heads * c->v_head_dim;
    case INDEX_ROWS:
        return c->index_n_heads * c->index_head_dim;
    case INDEX_DIM:
        return c->index_head_dim;
    case INDEX_HEADS:
        return c->index_n_heads;
    case DENSE_INNER:
        return c->intermediate_size;
    case EXPERT_INNER:
        return c->moe_intermediate_size;
    case SHARED_INNER:
        return c->n_shared_experts * c->moe_intermediate_size;
    case EXPERTS:
        return c->n_routed_experts;
    }
    return 0;
}

void tr_wanted_get(tr_wanted *out, const tr_config *config, tr_role role, int layer, int expert)
{
    const row *r = &table[role];
    if (r->place == TOP)
        snprintf(out->name, sizeof out->name, "%s", r->name);
    else if (r->place == EXPERT)
        snprintf(out->name, sizeof out->name, "model.layers.%d.mlp.experts.%d.%s", layer, expert,
                 r->name);
    else
        snprintf(out->name, sizeof out->name, "model.layers.%d.%s", layer, r->name);
    out->class = r->class;
    out->init = r->init;
    out->optional = r->optional;
    out->rank = r->columns == ONE ? 1 : 2;
    out->shape[0] = extent(config, r->rows);
    out->shape[1] = extent(config, r->columns);
}

bool tr_layer_is_moe(const tr_config *config, int layer)
{
    return layer >= config->num_hidden_layers || tr_config_is_moe(config, layer);
}

typedef bool see_fn(void *ctx, const tr_wanted *w);

/* All roles of one place, for one layer. */
static bool each_of(const tr_config *c, place p, int layer, int expert, see_fn *see, void *ctx)
{
    tr_wanted w;
    for (int role = 0; role < TR_N_ROLES; role++) {
        if (table[role].place != p) continue;
        tr_wanted_get(&w, c, (tr_role)role, layer, expert);
        if (!see(ctx, &w)) return false;
    }
    return true;
}

bool tr_wanted_each(const tr_config *config, see_fn *see, void *ctx)
{
    int n_layers = config->num_hidden_layers + (config->num_nextn_predict_layers > 0);

    if (!each_of(config, TOP, 0, 0, see, ctx)) return false;
    for (int l = 0; l < n_layers; l++) {
        bool moe = tr_layer_is_moe(config, l);
        if (!each_of(config, LAYER, l, 0, see, ctx)) return false;
        if (!each_of(config, moe ? MOE : DENSE, l, 0, see, ctx)) return false;
        for (int e = 0; moe && e < config->n_routed_experts; e++)
            if (!each_of(config, EXPERT, l, e, see, ctx)) return false;
        if (l == config->num_hidden_layers && !each_of(config, MTP, l, 0, see, ctx)) return false;
    }
    return true;
}

/* ---- the match with a checkpoint ---------------------------------------------------------------------------------- */

enum {
    PROBLEMS_ENOUGH = 100000
}; /* a config of another model: no need to name 200 million tensors */

typedef struct match {
    const tr_checkpoint *checkpoint;
    bool fp8;
    bool *seen; /* [tensors of the checkpoint] */
    tr_problems problems;
} match;

static const char *file_of(const match *m, const tr_tensor *t)
{
    const char *path = tr_checkpoint_path(m->checkpoint, t), *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static const char *shape_text(char *text, size_t n, int rank, const int64_t *shape)
{
    size_t used = (size_t)snprintf(text, n, "[");
    for (int i = 0; i < rank && used < n; i++)
        used += (size_t)snprintf(text + used, n - used, "%s%jd", i ? ", " : "", (intmax_t)shape[i]);
    if (used < n) snprintf(text + used, n - used, "]");
    return text;
}

/* `stored` is wanted, or any of BF16 and F32 when it is TR_STORED_BF16. */
static void match_one(match *m, const char *name, int rank, const int64_t *shape, tr_stored stored,
                      bool optional)
{
    char has[192], wants[64];
    const tr_tensor *t = tr_checkpoint_find(m->checkpoint, name);
    if (!t) {
        if (!optional) tr_problem(&m->problems, "%s is missing", name);
        return;
    }
    m->seen[t - tr_checkpoint_tensor(m->checkpoint, 0)] = true;
    if (t->rank != rank || memcmp(t->shape, shape, (size_t)rank * sizeof *shape) != 0)
        tr_problem(&m->problems, "%s: %s has shape %s, not %s", file_of(m, t), name,
                   shape_text(has, sizeof has, t->rank, t->shape),
                   shape_text(wants, sizeof wants, rank, shape));
    if (t->stored != stored && !(stored == TR_STORED_BF16 && t->stored == TR_STORED_F32))
        tr_problem(&m->problems, "%s: %s is not stored as %s", file_of(m, t), name,
                   stored == TR_STORED_F8_E4M3 ? "F8_E4M3"
                   : stored == TR_STORED_BF16  ? "BF16 or F32"
                                               : "F32");
}

static bool match_wanted(void *ctx, const tr_wanted *w)
{
    match *m = ctx;
    bool quantised = w->class == TR_CLASS_Q && m->fp8;

    match_one(m, w->name, w->rank, w->shape, quantised ? TR_STORED_F8_E4M3 : TR_STORED_BF16,
              w->optional);
    if (quantised) {
        char scale[sizeof w->name + 16];
        int64_t blocks[2];
        for (int i = 0; i < 2; i++)
            blocks[i] = (w->shape[i] + TR_SCALE_BLOCK - 1) / TR_SCALE_BLOCK;
        snprintf(scale, sizeof scale, "%s_scale_inv", w->name);
        match_one(m, scale, 2, blocks, TR_STORED_F32, w->optional);
    }
    return m->problems.n < PROBLEMS_ENOUGH;
}

/* Of the MTP layer of a checkpoint, which a config without one leaves out. What has no eh_proj is none. */
static bool left_out(const tr_config *c, const tr_checkpoint *checkpoint, const char *name)
{
    char layer[64];
    tr_wanted eh;

    snprintf(layer, sizeof layer, "model.layers.%d.", c->num_hidden_layers);
    if (c->num_nextn_predict_layers > 0 || strncmp(name, layer, strlen(layer)) != 0) return false;
    tr_wanted_get(&eh, c, TR_ROLE_EH, c->num_hidden_layers, 0);
    return tr_checkpoint_find(checkpoint, eh.name) != NULL;
}

tr_status tr_wanted_check(const tr_config *config, const tr_checkpoint *checkpoint, tr_err *err)
{
    size_t n = tr_checkpoint_count(checkpoint);
    match m = {.checkpoint = checkpoint, .fp8 = config->fp8};

    m.seen = tr_calloc(n, sizeof *m.seen);
    if (!m.seen) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_wanted_each(config, match_wanted, &m);
    for (size_t i = 0; i < n && m.problems.n < PROBLEMS_ENOUGH; i++) {
        const tr_tensor *t = tr_checkpoint_tensor(checkpoint, i);
        if (!m.seen[i] && !left_out(config, checkpoint, t->name))
            tr_problem(&m.problems, "%s: %s is not part of this model", file_of(&m, t), t->name);
    }
    free(m.seen);
    return tr_problems_end(&m.problems, TR_E_INPUT, "the checkpoint does not match config.json",
                           err);
}
