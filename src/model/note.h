/* What the next operation of a step moves and computes, for its region: kernels/work.h with the sums over the step's rows
 * that the plan tells. A row whose position only the device knows counts as the plan's largest context. */
#ifndef TR_MODEL_NOTE_H
#define TR_MODEL_NOTE_H

#include <math.h>

#include "kernels/work.h"
#include "model/model_priv.h"

static inline void tr_note(tr_model *m, tr_work work)
{
    m->note_bytes = work.bytes;
    m->note_flops = work.flops;
}

static inline tr_row_sums tr_pass_sums(const tr_model *m, const tr_pass *p)
{
    const tr_span *span = tr_plan_spans(p->plan);
    tr_row_sums s = {0};

    for (int i = 0; i < p->plan->n_spans; i++) {
        const int position = span[i].position >= 0 ? span[i].position : p->plan->max_context - 1;
        const int k = m->config->index_topk, stride = 1 + span[i].skip; /* of a part's rows */
        int n_dense = span[i].flags & TR_SPAN_DENSE ? (k - position + stride - 1) / stride : 0;
        if (n_dense < 0) n_dense = 0; /* a part that lies behind */
        if (n_dense > span[i].n_rows) n_dense = span[i].n_rows;
        if (n_dense > 0) tr_row_sums_add(&s, position, n_dense, 1, k);
        if (n_dense < span[i].n_rows)
            tr_row_sums_add(&s, position + n_dense * stride, span[i].n_rows - n_dense, 0, k);
    }
    return s;
}

/* Experts out of n_local that n rows reach when all experts are as likely: the routes are on the device. */
static inline double tr_expected_hits(const tr_config *c, double n_local, double n)
{
    return n_local * (1 - pow(1 - (double)c->num_experts_per_tok / c->n_routed_experts, n));
}

#endif
