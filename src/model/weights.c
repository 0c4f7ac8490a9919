#include <config.h>

#include "model/weights.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "model/weights_priv.h"

enum { CHUNK_BYTES = 32 << 20 };

/* Run a step; the first that fails leaves the function. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        tr_status try_status = (call);                                                             \
        if (try_status != TR_OK) return try_status;                                                \
    } while (0)

/* Rows and columns of one stored matrix. */
static tr_status load_part(tr_loader *l, tr_linear *dst, tr_role role, int layer, tr_range rows,
                           tr_range columns, tr_err *err)
{
    tr_piece p = {.rows = rows, .columns = columns};
    p.finite = role == TR_ROLE_ROUTER || role == TR_ROLE_INDEX_W; /* of those that only choose */
    tr_wanted_get(&p.w, l->config, role, layer, 0);
    TRY(tr_loader_linear(l, dst, &p.w, 1, rows.n, columns.n, err));
    return tr_loader_pack(l, dst, &p, 1, err);
}

static tr_status load_whole(tr_loader *l, tr_linear *dst, tr_role role, int layer, tr_err *err)
{
    tr_wanted w;
    tr_wanted_get(&w, l->config, role, layer, 0);
    return load_part(l, dst, role, layer, tr_whole(w.shape[0]), tr_whole(w.shape[1]), err);
}

/* Pieces of one linear on their way, and the room for them; those that are put in go when it is full. */
typedef struct pieces {
    tr_linear *dst;
    int n;
    tr_piece piece[TR_PIECES_MAX];
} pieces;

static tr_status pieces_go(tr_loader *l, pieces *p, tr_err *err)
{
    const int n = p->n;
    p->n = 0;
    return n > 0 ? tr_loader_pack(l, p->dst, p->piece, n, err) : TR_OK;
}

/* The piece to be filled in; NULL: *st says why not. */
static tr_piece *next_piece(tr_loader *l, pieces *p, tr_status *st, tr_err *err)
{
    *st = p->n == TR_PIECES_MAX ? pieces_go(l, p, err) : TR_OK;
    return *st == TR_OK ? &p->piece[p->n++] : NULL;
}

/* One matrix [2 inner, hidden] per expert: gate rows, then up rows. A dense MLP is a single expert 0; for_moe: whether the
 * moe operation is what runs them. */
static tr_status load_gate_up(tr_loader *l, tr_linear *dst, tr_role gate, tr_role up, int layer,
                              tr_range experts, tr_range inner, int for_moe, tr_err *err)
{
    tr_range hidden = tr_whole(l->config->hidden_size);
    pieces all = {.dst = dst};
    tr_status st;
    tr_wanted w;

    tr_wanted_get(&w, l->config, gate, layer, experts.begin);
    TRY(tr_loader_linear(l, dst, &w, experts.n, 2 * inner.n, hidden.n, err));
    dst->gate_up = for_moe;
    for (int i = 0; i < 2 * experts.n; i++) {
        tr_piece *p = next_piece(l, &all, &st, err);
        if (!p) return st;
        *p = (tr_piece){.rows = inner, .columns = hidden, .i_mat = i / 2};
        p->o_begin = i % 2 * inner.n;
        tr_wanted_get(&p->w, l->config, i % 2 ? up : gate, layer, experts.begin + i / 2);
    }
    return pieces_go(l, &all, err);
}

/* One matrix [hidden, inner] per expert. */
static tr_status load_down(tr_loader *l, tr_linear *dst, tr_role role, int layer, tr_range experts,
                           tr_range inner, tr_err *err)
{
    tr_range hidden = tr_whole(l->config->hidden_size);
    pieces all = {.dst = dst};
    tr_status st;
    tr_wanted w;

    tr_wanted_get(&w, l->config, role, layer, experts.begin);
    TRY(tr_loader_linear(l, dst, &w, experts.n, hidden.n, inner.n, err));
    for (int e = 0; e < experts.n; e++) {
        tr_piece *p = next_piece(l, &all, &st, err);
        if (!p) return st;
        *p = (tr_piece){.rows = hidden, .columns = inner, .i_mat = e};
        tr_wanted_get(&p->w, l->config, role, layer, experts.begin + e);
    }
    return pieces_go(l, &all, err);
}

static tr_status load_mlp(tr_loader *l, tr_mlp_weights *mlp, tr_role gate, tr_role up, tr_role down,
                          int layer, tr_range inner, tr_err *err)
{
    mlp->inner = inner.n;
    TRY(load_gate_up(l, &mlp->gate_up, gate, up, layer, tr_whole(1), inner, 0, err));
    return load_down(l, &mlp->down, down, layer, tr_whole(1), inner, err);
}

/* kv_b [heads (nope + v), kv_lora]: the rows of head h are W_UK[h], needed as they are (multi-head form) and transposed
 * (absorbed form), then W_UV[h] (model.md 3.4). */
static tr_status load_kv_b(tr_loader *l, tr_attention_weights *a, int layer, tr_err *err)
{
    const tr_config *c = l->config;
    tr_range heads = l->slice->heads, latent = tr_whole(c->kv_lora_rank);
    int d_nope = c->qk_nope_head_dim, d_v = c->v_head_dim, d_head = d_nope + d_v;
    tr_range uk = {.begin = 0, .n = d_nope}, uv = {.begin = d_nope, .n = d_v};
    tr_wanted w;

    tr_wanted_get(&w, c, TR_ROLE_KV_B, layer, 0);
    TRY(tr_loader_linear(l, &a->w_uk, &w, heads.n, d_nope, latent.n, err));
    TRY(tr_loader_linear(l, &a->w_uk_t, &w, heads.n, latent.n, d_nope, err));
    TRY(tr_loader_linear(l, &a->w_uv, &w, heads.n, d_v, latent.n, err));
    for (int h = 0; h < heads.n; h++) {
        tr_range rows = {.begin = (heads.begin + h) * d_head, .n = d_head};
        TRY(tr_loader_fetch(l, &w, rows, latent, err));
        TRY(tr_loader_pack_fetched(l, &a->w_uk, &w, rows, latent, uk, 0, h, 0, err));
        TRY(tr_loader_pack_fetched(l, &a->w_uk_t, &w, rows, latent, uk, 1, h, 0, err));
        TRY(tr_loader_pack_fetched(l, &a->w_uv, &w, rows, latent, uv, 0, h, 0, err));
    }
    return TR_OK;
}

/* The rows (or columns) of this rank's heads, `d` each. */
static tr_range heads_of(const tr_loader *l, int d)
{
    return (tr_range){.begin = l->slice->heads.begin * d, .n = l->slice->heads.n * d};
}

static tr_status load_attention(tr_loader *l, tr_attention_weights *a, int layer, tr_err *err)
{
    const tr_config *c = l->config;
    int d_qk = c->qk_nope_head_dim + c->qk_rope_head_dim;

    TRY(tr_loader_vector(l, &a->input_norm, TR_ROLE_INPUT_NORM, layer, err));
    TRY(load_whole(l, &a->q_a, TR_ROLE_Q_A, layer, err));
    TRY(tr_loader_vector(l, &a->q_a_norm, TR_ROLE_Q_A_NORM, layer, err));
    TRY(load_part(l, &a->q_b, TR_ROLE_Q_B, layer, heads_of(l, d_qk), tr_whole(c->q_lora_rank),
                  err));
    TRY(load_whole(l, &a->kv_a, TR_ROLE_KV_A, layer, err));
    TRY(tr_loader_vector(l, &a->kv_a_norm, TR_ROLE_KV_A_NORM, layer, err));
    TRY(load_kv_b(l, a, layer, err));
    TRY(load_part(l, &a->o, TR_ROLE_O, layer, tr_whole(c->hidden_size), heads_of(l, c->v_head_dim),
                  err));
    TRY(load_whole(l, &a->index_q, TR_ROLE_INDEX_Q, layer, err));
    TRY(load_whole(l, &a->index_k, TR_ROLE_INDEX_K, layer, err));
    TRY(tr_loader_vector(l, &a->index_k_norm, TR_ROLE_INDEX_K_NORM, layer, err));
    TRY(tr_loader_vector(l, &a->index_k_bias, TR_ROLE_INDEX_K_BIAS, layer, err));
    return load_whole(l, &a->index_w, TR_ROLE_INDEX_W, layer, err);
}

static tr_status load_moe(tr_loader *l, tr_moe_weights *m, int layer, tr_err *err)
{
    tr_range experts = l->slice->experts, inner = l->slice->expert_inner;

    m->e_first = experts.begin;
    m->n_local = experts.n;
    m->inner = inner.n;
    TRY(load_whole(l, &m->gate, TR_ROLE_ROUTER, layer, err));
    TRY(tr_loader_vector(l, &m->gate_bias, TR_ROLE_ROUTER_BIAS, layer, err));
    TRY(load_gate_up(l, &m->gate_up, TR_ROLE_EXPERT_GATE, TR_ROLE_EXPERT_UP, layer, experts, inner,
                     1, err));
    TRY(load_down(l, &m->down, TR_ROLE_EXPERT_DOWN, layer, experts, inner, err));
    return load_mlp(l, &m->shared, TR_ROLE_SHARED_GATE, TR_ROLE_SHARED_UP, TR_ROLE_SHARED_DOWN,
                    layer, l->slice->shared_inner, err);
}

static tr_status load_layer(tr_loader *l, tr_layer_weights *w, int layer, tr_err *err)
{
    l->i_layer++;
    w->is_moe = tr_layer_is_moe(l->config, layer);
    TRY(load_attention(l, &w->attention, layer, err));
    TRY(tr_loader_vector(l, &w->post_norm, TR_ROLE_POST_NORM, layer, err));
    if (w->is_moe) return load_moe(l, &w->moe, layer, err);
    return load_mlp(l, &w->mlp, TR_ROLE_GATE_PROJ, TR_ROLE_UP_PROJ, TR_ROLE_DOWN_PROJ, layer,
                    l->slice->dense_inner, err);
}

/* Its embed_tokens and shared_head.head are copies of the main model's: not loaded twice. */
static tr_status load_mtp(tr_loader *l, tr_err *err)
{
    int layer = l->config->num_hidden_layers;
    tr_mtp_weights *m = tr_calloc(1, sizeof *m);

    if (!m) return tr_fail(err, TR_E_MEMORY, "out of memory");
    l->weights->mtp = m;
    TRY(tr_loader_vector(l, &m->enorm, TR_ROLE_ENORM, layer, err));
    TRY(tr_loader_vector(l, &m->hnorm, TR_ROLE_HNORM, layer, err));
    TRY(load_whole(l, &m->eh, TR_ROLE_EH, layer, err));
    TRY(load_layer(l, &m->layer, layer, err));
    return tr_loader_vector(l, &m->head_norm, TR_ROLE_MTP_NORM, layer, err);
}

/* In the order of the network, which is roughly that of the files. */
static tr_status load_all(tr_loader *l, tr_err *err)
{
    tr_weights *w = l->weights;
    const tr_slice *s = l->slice;
    bool mtp = s->head && l->config->num_nextn_predict_layers > 0;
    tr_wanted table;

    l->n_layers = s->layers.n + mtp;
    /* The MTP layer embeds the token it starts from: the last stage has the table too (parallel.md 1.4). */
    if (s->embed || mtp) {
        tr_wanted_get(&table, l->config, TR_ROLE_EMBED, 0, 0);
        TRY(tr_loader_table(l, &w->embed, &w->embed_dtype, &table, err));
    }
    w->layer = tr_calloc((size_t)s->layers.n, sizeof *w->layer);
    if (!w->layer) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < s->layers.n; i++)
        TRY(load_layer(l, &w->layer[i], s->layers.begin + i, err));
    if (s->head) {
        TRY(tr_loader_vector(l, &w->norm, TR_ROLE_NORM, 0, err));
        TRY(load_part(l, &w->head, TR_ROLE_HEAD, 0, s->vocab, tr_whole(l->config->hidden_size),
                      err));
    }
    return mtp ? load_mtp(l, err) : TR_OK;
}

tr_status tr_weights_load(tr_weights **out, const tr_config *config, const tr_slice *slice,
                          const tr_checkpoint *checkpoint, tr_load_format format, uint64_t seed,
                          tr_device *device, const tr_ops *ops, tr_log *log, tr_regions *regions,
                          tr_err *err)
{
    tr_status st = TR_OK;
    tr_dummy *dummy = NULL;
    tr_loader l = {.config = config,
                   .slice = slice,
                   .device = device,
                   .ops = ops,
                   .log = log,
                   .regions = regions,
                   .chunk_bytes = CHUNK_BYTES,
                   .read_region = regions ? tr_region_id(regions, "load/read") : -1,
                   .pack_region = regions ? tr_region_id(regions, "load/pack") : -1,
                   .fill_region =
                       regions && ops->linear_fill ? tr_region_id(regions, "load/fill") : -1,
                   .begun_ns = tr_now_ns()};

    *out = NULL;
    tr_weights *w = tr_calloc(1, sizeof *w);
    if (!w || !(w->memory = tr_calloc(1, sizeof *w->memory))) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    w->slice = *slice;
    l.weights = w;
    if (format == TR_LOAD_DUMMY) {
        l.dummy = dummy = tr_dummy_create(seed);
        if (!dummy) {
            st = tr_fail(err, TR_E_MEMORY, "out of memory");
            goto done;
        }
    } else {
        l.checkpoint = checkpoint;
        if ((st = tr_wanted_check(config, checkpoint, err)) != TR_OK) goto done;
    }
    if ((st = load_all(&l, err)) != TR_OK) goto done;
    *out = w;
    w = NULL; /* ownership has moved to the caller */

done:
    tr_loader_done(&l);
    tr_dummy_free(dummy);
    tr_weights_free(w, device, ops);
    return st;
}

void tr_weights_free(tr_weights *w, tr_device *device, const tr_ops *ops)
{
    if (!w) return;
    for (size_t i = 0; w->memory && i < w->memory->n; i++)
        ops->release(device, w->memory->block[i]);
    if (w->memory) free(w->memory->block);
    free(w->memory);
    free(w->layer);
    free(w->mtp);
    free(w);
}
