/* Hidden rows from one pipeline stage to the next (parallel.md 2.5): the residual stream after the last sub-layer's output has been
 * added; the receiver begins with its norm. The ranks of an attention group have the same rows: each sends its part to the rank
 * in its own place, and the receivers gather the parts, so that the wire carries every byte once. */
#include <config.h>

#include "model/model_priv.h"

/* Rows [*begin, *begin + n) that member i of n_members carries. */
static int part(int n_rows, int i, int n_members, int *begin)
{
    *begin = (int)((int64_t)n_rows * i / n_members);
    return (int)((int64_t)n_rows * (i + 1) / n_members) - *begin;
}

tr_status tr_stage_receive(tr_model *m, const tr_pass *p, tr_err *err)
{
    const size_t row = (size_t)m->config->hidden_size * sizeof(float);
    tr_comm *tp = m->groups.attn_tp, *pp = m->groups.pp;
    size_t bytes[TR_MEMBERS_MAX];
    tr_ticket ticket = {0};
    int begin;

    if (p->n == 0) return TR_OK;
    const int n = part(p->n, tr_comm_rank(tp), tr_comm_size(tp), &begin);
    /* f32 of a member's share of the rows: no more than block_out has room for, of bf16 of all. */
    float *own = tr_comm_size(tp) > 1 ? m->ws.block_out : m->ws.hidden;
    tr_status st = TR_OK;
    if (n > 0) {
        st = tr_comm_recv(pp, tr_comm_rank(pp) - 1, own, (size_t)n * row, &ticket, err);
        st = tr_model_await(m, pp, st, ticket, (double)n * (double)row, err);
    }
    if (st != TR_OK || tr_comm_size(tp) == 1) return st;
    for (int i = 0; i < tr_comm_size(tp); i++)
        bytes[i] = (size_t)part(p->n, i, tr_comm_size(tp), &begin) * row;
    st = tr_comm_all_gather(tp, own, m->ws.hidden, bytes, &ticket, err);
    return tr_model_await(m, tp, st, ticket, (double)n * (double)row, err);
}

/* The send stays in flight while the next step runs, which gets the other of two buffers. */
tr_status tr_stage_send(tr_model *m, const tr_pass *p, tr_err *err)
{
    const size_t d = (size_t)m->config->hidden_size, row = d * sizeof(float);
    tr_comm *tp = m->groups.attn_tp, *pp = m->groups.pp;
    tr_status st = TR_OK;
    int begin;

    if (m->sending) {
        m->sending = false;
        st = tr_model_await(m, pp, TR_OK, m->sent, 0, err);
    }
    const int n = part(p->n, tr_comm_rank(tp), tr_comm_size(tp), &begin);
    if (st != TR_OK || n == 0) return st;
    float *sent = m->ws.hidden;
    st = tr_comm_send(pp, tr_comm_rank(pp) + 1, sent + (size_t)begin * d, (size_t)n * row, &m->sent,
                      err);
    m->sending = st == TR_OK;
    m->ws.hidden = m->ws.handoff;
    m->ws.handoff = sent;
    return st;
}
