/* Feed-forward blocks (model.md 3.5, 6): the dense MLP of the first layers, and experts plus shared expert of the others. */
#include <config.h>

#include "model/model_priv.h"
#include "model/note.h"

/* down(silu(gate x) * up x): [n, hidden] -> [n, hidden]. */
static tr_status mlp(tr_model *m, const tr_pass *p, const tr_mlp_weights *w, tr_act *out,
                     tr_err *err)
{
    tr_status st =
        tr_model_linear(m, p, &w->gate_up, m->ws.normed, m->ws.gate_up, err); /* [n, 2 inner] */
    if (st != TR_OK) return st;
    const tr_quantised codes = tr_model_codes(m, &w->down, m->ws.inner);
    tr_note(m, tr_work_swiglu(p->n, w->inner));
    st = TR_RUN(m, swiglu, err, .n = p->rows.n, .n_max = p->n_max, .d = w->inner,
                .gate_up = m->ws.gate_up, .out = m->ws.inner, .q = codes.q, .q_scale = codes.scale,
                .scale_pow2 = m->config->scale_ue8m0);
    return st == TR_OK ? tr_model_linear(m, p, &w->down, m->ws.inner, out, err) : st;
}

/* block_out = 0: another member of the attention group brings the same part into the sum. */
static tr_status nothing(tr_model *m, const tr_pass *p, tr_err *err)
{
    tr_note(m, tr_work_rows_zero(p->n, m->config->hidden_size));
    return TR_RUN(m, rows_zero, err, .n = p->rows.n, .n_max = p->n_max, .d = m->config->hidden_size,
                  .out = m->ws.block_out);
}

tr_status tr_dense_forward(tr_model *m, const tr_pass *p, const tr_mlp_weights *w, tr_err *err)
{
    const tr_slice *s = &m->weights->slice;
    tr_status st = !s->dense_partial || s->dense_adds ? mlp(m, p, w, m->ws.block_out, err)
                                                      : nothing(m, p, err);
    if (st == TR_OK && s->dense_partial) st = tr_model_owe(m, p, m->groups.attn_tp, err);
    return st;
}

/* The experts each row goes to: expert [n, k], weight [n, k]. */
static tr_status route(tr_model *m, const tr_pass *p, const tr_moe_weights *w, int layer,
                       tr_err *err)
{
    const tr_config *c = m->config;
    const int k = c->num_experts_per_tok;
    tr_status st =
        tr_model_scores(m, p, &w->gate, m->ws.normed, m->ws.router, err); /* [n, experts], fp32 */
    tr_note(m, tr_work_router(p->n, c->n_routed_experts, k));
    if (st == TR_OK)
        st = TR_RUN(m, router, err, .n = p->rows.n, .n_max = p->n_max,
                    .n_experts = c->n_routed_experts, .n_group = c->n_group,
                    .topk_group = c->topk_group, .k = k, .norm_topk = c->norm_topk_prob,
                    .logits = m->ws.router, .bias = w->gate_bias,
                    .scaling = (float)c->routed_scaling_factor, .expert = m->ws.expert,
                    .weight = m->ws.weight);
    if (st != TR_OK) return st;
    tr_model_show(m, "router_experts", layer, 0, p->n, k, (size_t)k, m->ws.expert);
    tr_model_show(m, "router_weights", layer, 0, p->n, k, (size_t)k, m->ws.weight);
    return TR_OK;
}

/* block_out = this member's part of the shared expert's output. */
static tr_status shared(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_err *err)
{
    if (!m->weights->slice.shared_adds || w->shared.inner == 0) return nothing(m, p, err);
    return mlp(m, p, &w->shared, m->ws.block_out, err);
}

tr_status tr_model_experts(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_err *err)
{
    const int d = m->config->hidden_size, k = m->config->num_experts_per_tok;

    tr_note(m, tr_work_moe_pack(p->n, k));
    tr_status st =
        TR_RUN(m, moe_pack, err, .n = p->rows.n, .n_max = p->n_max, .k = k, .e_first = w->e_first,
               .n_local = w->n_local, .expert = m->ws.expert, .start = m->ws.start,
               .pair = m->ws.pair, .rows = tr_model_expert_rows(m));
    tr_note(m, tr_work_moe((double)p->n * k * w->n_local / m->config->n_routed_experts,
                           tr_expected_hits(m->config, w->n_local, p->n), m->ops, &w->gate_up,
                           &w->down));
    if (st == TR_OK)
        st = TR_RUN(m, moe, err, .n = p->rows.n, .n_max = p->n_max, .k = k, .n_local = w->n_local,
                    .gate_up = &w->gate_up, .down = &w->down,
                    .in = tr_model_acts(m, p, m->ws.normed, d), .start = m->ws.start,
                    .pair = m->ws.pair, .out = m->ws.expert_out, .workspace = m->ws.scratch,
                    .workspace_bytes = m->ws.scratch_bytes);
    return st;
}

/* Every rank of the MoE group has these rows, so each computes what its own experts make of all of them. */
static tr_status own_experts(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_err *err)
{
    const int d = m->config->hidden_size, k = m->config->num_experts_per_tok;
    tr_status st = tr_model_experts(m, p, w, err);
    if (st == TR_OK && !tr_model_forks(m, p)) st = shared(m, p, w, err);
    if (st == TR_OK) st = tr_model_join(m, p, err);
    tr_note(m, tr_work_moe_combine(p->n, k, d));
    if (st == TR_OK)
        st = TR_RUN(m, moe_combine, err, .n = p->rows.n, .n_max = p->n_max, .k = k, .d = d,
                    .e_first = w->e_first, .n_local = w->n_local, .expert = m->ws.expert,
                    .weight = m->ws.weight, .y = m->ws.expert_out, .shared = m->ws.block_out,
                    .out = m->ws.block_out);
    return st;
}

tr_status tr_moe_forward(tr_model *m, const tr_pass *p, const tr_moe_weights *w, int layer,
                         tr_err *err)
{
    const bool beside = (!m->moe_exchange || p->each > 0) && tr_model_forks(m, p);
    tr_status st = TR_OK;

    if (beside) st = tr_model_fork(m, p, err);
    if (beside && st == TR_OK) st = shared(m, p, w, err);
    tr_model_back(m);
    if (st == TR_OK) st = route(m, p, w, layer, err);
    if (st != TR_OK) return st;
    if (p->each > 0) return tr_moe_tell(m, p, w, m->ws.block_out, shared, err);
    if (m->moe_exchange) return tr_moe_exchange(m, p, w, m->ws.block_out, shared, err);
    st = own_experts(m, p, w, err);
    /* Partial sums of the shared expert and of each member's experts. */
    return st == TR_OK ? tr_model_owe(m, p, m->groups.attn_tp, err) : st;
}
