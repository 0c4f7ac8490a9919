/* Attention of one layer (model.md 3.4, 4): multi-head latent attention over the tokens that the lightning indexer selects.
 *
 *     keys      kv_a, index_k  -> cache rows of these tokens         first, so that their exchange hides behind the queries
 *     queries   q_a -> q_b -> rope, absorb W_UK ; index queries
 *     select    index scores -> the index_topk best positions        only rows that see more than index_topk keys
 *     attend    absorbed rows over their selection ; dense rows over everything up to themselves
 *     output    W_UV, o_proj
 *
 * Rows whose context fits index_topk select everything, so a prompt's first index_topk rows may take the cheaper multi-head
 * form ("dense"); the scheduler says which (kernels/plan_block.h). */
#include <config.h>

#include "model/model_priv.h"

/* Latent and index key of every row into the cache; peers of a context-parallel group get them too. */
static tr_status write_keys(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                            tr_kv_layer kv, tr_err *err)
{
    const tr_config *c = m->config;
    const int d_kv = c->kv_lora_rank + c->qk_rope_head_dim;
    tr_push push_key = {0}, push_latent = {0};
    tr_status st;

    st = tr_model_linear(m, p, &w->index_k, m->ws.normed, m->ws.index_k, err); /* [n, index_dim] */
    if (st == TR_OK)
        st = tr_model_linear(m, p, &w->kv_a, m->ws.normed, m->ws.kv_a,
                             err); /* [n, kv_lora + rope] */
    if (st == TR_OK) st = tr_share_begin(m->share_key, &p->rows, kv.index, &push_key, err);
    if (st != TR_OK) return st;

    st = TR_RUN(m, kv_write, err, .rows = &p->rows, .index_k = m->ws.index_k,
                .ld_index_k = (size_t)c->index_head_dim, .k_norm = w->index_k_norm,
                .k_bias = w->index_k_bias, .rope = m->rope, .eps = (float)c->rms_norm_eps, .kv = kv,
                .push = push_key);
    if (st == TR_OK) st = tr_share_sent(m->share_key, TR_LANE_MAIN, err);
    if (st == TR_OK) st = tr_share_begin(m->share_latent, &p->rows, kv.latent, &push_latent, err);
    if (st != TR_OK) return st;

    st = TR_RUN(m, kv_write, err, .rows = &p->rows, .kv_a = m->ws.kv_a, .ld_kv_a = (size_t)d_kv,
                .norm = w->kv_a_norm, .rope = m->rope, .eps = (float)c->rms_norm_eps, .kv = kv,
                .push = push_latent);
    return st == TR_OK ? tr_share_sent(m->share_latent, TR_LANE_MAIN, err) : st;
}

/* q [n, heads, nope + rope] with rope; q_absorbed [n, heads, kv_lora + rope] of absorbed rows; leaves the normed q latent. */
static tr_status make_queries(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                              tr_err *err)
{
    const tr_config *c = m->config;
    const int heads = m->heads, d_q = c->q_lora_rank;
    tr_status st;

    st = tr_model_linear(m, p, &w->q_a, m->ws.normed, m->ws.q_latent, err); /* [n, q_lora] */
    if (st != TR_OK) return st;
    st = TR_RUN(m, norm, err, .n = p->rows.n, .n_max = m->max_rows, .d = d_q,
                .residual = m->ws.q_latent, .ld_residual = (size_t)d_q, .weight = w->q_a_norm,
                .eps = (float)c->rms_norm_eps, .out = m->ws.q_latent, .ld_out = (size_t)d_q);
    if (st == TR_OK) st = tr_model_linear(m, p, &w->q_b, m->ws.q_latent, m->ws.q, err);
    if (st != TR_OK) return st;

    m->note_flops = 2.0 * p->n * heads * c->qk_nope_head_dim * c->kv_lora_rank;
    return TR_RUN(m, mla_query, err, .rows = &p->rows, .q = m->ws.q, .n_heads = heads,
                  .d_nope = c->qk_nope_head_dim, .d_rope = c->qk_rope_head_dim,
                  .d_latent = c->kv_lora_rank, .rope = m->rope, .w_uk_t = &w->w_uk_t,
                  .q_absorbed = m->ws.q_absorbed);
}

/* Index scores and selection, in stripes of rows so that the scores stay within their buffer. Dense rows select nothing: a
 * step of dense rows alone needs no lists, but the keys' exchange ends here all the same. */
static tr_status select_keys(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                             tr_kv_layer kv, int layer, tr_err *err)
{
    const tr_config *c = m->config;
    const int k = c->index_topk, scored = (p->plan->flags & TR_PLAN_HAS_SELECTION) != 0;
    tr_await keys = {0};
    tr_status st = TR_OK;

    if (scored) {
        st = tr_model_linear(m, p, &w->index_q, m->ws.q_latent, m->ws.index_q,
                             err); /* [n, index_heads, index_dim] */
        if (st == TR_OK) st = tr_model_linear(m, p, &w->index_w, m->ws.normed, m->ws.index_w, err);
        if (st == TR_OK)
            st = TR_RUN(m, index_query, err, .rows = &p->rows, .q = m->ws.index_q,
                        .w = m->ws.index_w, .n_heads = c->index_n_heads,
                        .d_index = c->index_head_dim, .d_rope = c->qk_rope_head_dim,
                        .cache_dtype = kv.dtype, .rope = m->rope, .out = m->ws.index_q8);
    }
    if (st == TR_OK) st = tr_share_ready(m->share_key, TR_LANE_MAIN, &keys, err);
    if (!(p->plan->flags & TR_PLAN_HAS_ABSORBED)) return st;

    for (int i = 0; i < p->n && st == TR_OK; i += m->n_stripe) {
        const int n_row = p->n - i < m->n_stripe ? p->n - i : m->n_stripe;
        const size_t ld = (size_t)m->max_model_len;
        if (scored) {
            m->note_flops =
                2.0 * n_row * p->plan->max_context * c->index_n_heads * c->index_head_dim;
            st = TR_RUN(m, index_logits, err, .rows = &p->rows, .q = m->ws.index_q8,
                        .w = m->ws.index_w, .n_heads = c->index_n_heads, .k = k, .kv = kv,
                        .i_row = i, .n_row = n_row, .score = m->ws.score, .ld = ld, .keys = keys);
            if (st != TR_OK) return st;
            tr_model_show(m, "index_logits", layer, i, n_row, p->plan->max_context, ld,
                          m->ws.score);
        }
        st = TR_RUN(m, topk, err, .rows = &p->rows, .score = scored ? m->ws.score : NULL, .ld = ld,
                    .k = k, .i_row = i, .n_row = n_row, .position = m->ws.top_position,
                    .cache_row = m->ws.top_row, .n_selected = m->ws.n_selected);
    }
    if (st == TR_OK)
        tr_model_show(m, "index_topk", layer, 0, p->n, k, (size_t)k, m->ws.top_position);
    return st;
}

/* attended [n, heads, v]: absorbed rows over their selection, dense rows over all keys up to their own. */
static tr_status attend(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                        tr_kv_layer kv, tr_err *err)
{
    const tr_config *c = m->config;
    const int heads = m->heads, d_latent = c->kv_lora_rank, d_v = c->v_head_dim;
    tr_await latents = {0};
    tr_status st = tr_share_ready(m->share_latent, TR_LANE_MAIN, &latents, err);

    if (st == TR_OK && (p->plan->flags & TR_PLAN_HAS_ABSORBED)) {
        st = TR_RUN(m, sparse_mla, err, .rows = &p->rows, .q = m->ws.q_absorbed, .n_heads = heads,
                    .scale = m->attention_scale, .cache_row = m->ws.top_row, .k = c->index_topk,
                    .kv = kv, .latents = latents, .out = m->ws.u, .workspace = m->ws.scratch,
                    .workspace_bytes = m->ws.scratch_bytes);
        if (st == TR_OK)
            st = TR_RUN(m, mla_value, err, .rows = &p->rows, .u = m->ws.u, .n_heads = heads,
                        .d_latent = d_latent, .d_v = d_v, .w_uv = &w->w_uv, .out = m->ws.attended);
    }
    if (st == TR_OK && (p->plan->flags & TR_PLAN_HAS_DENSE))
        st = TR_RUN(m, dense_mha, err, .rows = &p->rows, .q = m->ws.q, .n_heads = heads,
                    .d_nope = c->qk_nope_head_dim, .d_rope = c->qk_rope_head_dim, .d_v = d_v,
                    .scale = m->attention_scale, .w_uk = &w->w_uk, .w_uv = &w->w_uv, .kv = kv,
                    .latents = latents, .out = m->ws.attended);
    return st;
}

tr_status tr_attention_forward(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                               tr_kv_layer kv, int layer, tr_err *err)
{
    tr_status st = write_keys(m, p, w, kv, err);
    if (st == TR_OK) st = make_queries(m, p, w, err);
    if (st == TR_OK) st = select_keys(m, p, w, kv, layer, err);
    if (st == TR_OK) st = attend(m, p, w, kv, err);
    if (st == TR_OK)
        st = tr_model_linear(m, p, &w->o, m->ws.attended, m->ws.block_out, err); /* [n, hidden] */
    return st;
}
