/* One decoder layer, and the order of the network (model.md 3.1):
 *
 *     h = embed[token]                                              model.c
 *     for each layer:
 *         a = RMSNorm(h) ; h += Attention(a)                        attention.c: MLA over the indexer's selection
 *         m = RMSNorm(h) ; h += FFN(m)                              ffn.c: dense MLP, or experts + shared expert
 *     logits = RMSNorm(h) lm_head^T                                 model.c
 *
 * The residual sums are made by the norm that follows them, from the unrounded sum. */
#include <config.h>

#include "model/model_priv.h"
#include "model/note.h"

/* hidden += add; normed = RMSNorm(hidden) * weight. All [n, hidden_size]. */
static tr_status norm(tr_model *m, const tr_pass *p, const tr_act *add, const float *weight,
                      tr_err *err)
{
    return tr_model_norm(m, p, m->config->hidden_size, TR_QUANT_HIDDEN, add, m->ws.hidden, weight,
                         m->ws.normed, err);
}

static void add_cost(tr_share_cost *to, tr_share_cost c, uint64_t sign)
{
    to->flown_ns += sign * c.flown_ns;
    to->waited_ns += sign * c.waited_ns;
    to->bytes += sign * c.bytes;
    to->calls += sign * c.calls;
}

/* What the gathers of the context-parallel group have cost so far, less (-1) before a layer's attention, more (1) after. */
static void note_gathers(tr_model *m, int i_layer, int sign)
{
    if (!m->overlap) return;
    add_cost(&m->overlap[i_layer].key, tr_share_costs(m->share_key), (uint64_t)sign);
    add_cost(&m->overlap[i_layer].latent, tr_share_costs(m->share_latent), (uint64_t)sign);
}

tr_status tr_layer_forward(tr_model *m, const tr_pass *p, int i_layer, int layer, const tr_act *add,
                           tr_err *err)
{
    const tr_layer_weights *w = &m->weights->layer[i_layer];
    const int d = m->config->hidden_size;
    tr_status st;

    /* h is complete for the layer before only now; a probe may look at it, and change it. */
    st = norm(m, p, add, w->attention.input_norm, err);
    if (st == TR_OK && m->probe && add) {
        tr_model_show(m, "hidden", layer - 1, 0, p->n, d, (size_t)d, m->ws.hidden);
        st = norm(m, p, NULL, w->attention.input_norm, err);
    }
    if (st == TR_OK && add) st = tr_finite_layer(m, p, layer - 1, err);
    if (st != TR_OK) return st;

    tr_region_begin(m->regions, m->region_attention);
    tr_model_joins(m);
    tr_watchdog_enter(m->watch, "attention", layer);
    note_gathers(m, i_layer, -1);
    st = tr_attention_forward(m, p, &w->attention, tr_cache_layer(m->cache, i_layer), layer, err);
    note_gathers(m, i_layer, 1);
    if (st == TR_OK && m->weights->slice.attention_partial)
        st = tr_model_owe(m, p, m->groups.attn_tp, err);
    tr_watchdog_leave(m->watch);
    tr_region_end(m->regions, 0, 0);
    tr_model_joins(m);
    if (st != TR_OK) return st;

    st = norm(m, p, m->ws.block_out, w->post_norm, err);
    if (st != TR_OK) return st;

    tr_region_begin(m->regions, w->is_moe ? m->region_moe : m->region_dense);
    tr_model_joins(m);
    tr_watchdog_enter(m->watch, w->is_moe ? "experts" : "dense", layer);
    st = w->is_moe ? tr_moe_forward(m, p, &w->moe, layer, err)
                   : tr_dense_forward(m, p, &w->mlp, err);
    tr_watchdog_leave(m->watch);
    tr_region_end(m->regions, 0, 0);
    tr_model_joins(m);
    return st;
}
