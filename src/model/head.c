/* The head (model.md 8): logits of the rows that asked for them, in chunks, and a token or a score of each.
 *
 * Under context parallelism the head rows of a step lie with the members that computed them; every member gets all of them, so that
 * all sample alike and know each slot's newest token. The vocabulary is cut over the attention group. */
#include <config.h>

#include "model/model_priv.h"

enum { MOST_MEMBERS = 1024 };

/* ws.head_all: the normed head rows of all members, member after member. */
static tr_status gather_rows(tr_model *m, const tr_pass *p, tr_err *err)
{
    const int d = m->config->hidden_size, members = tr_comm_size(m->groups.attn_cp);
    const int *n = tr_part_heads(m->part), own = n[tr_comm_rank(m->groups.attn_cp)];
    size_t bytes[MOST_MEMBERS];
    tr_status st = TR_OK;
    tr_ticket ticket;

    if (own > 0)
        st = TR_RUN(m, rows_gather, err, .index = p->rows.head_row, .n_index = p->rows.n_head,
                    .i0 = 0, .n_rows = own, .d = d, .in = m->ws.normed, .out = m->ws.head_own,
                    .n_out = m->ws.n_head);
    for (int i = 0; i < members; i++)
        bytes[i] = (size_t)n[i] * (size_t)d * sizeof(float);
    if (st == TR_OK)
        st = tr_comm_all_gather(m->groups.attn_cp, m->ws.head_own, m->ws.head_all, bytes, &ticket,
                                err);
    return tr_model_await(m, m->groups.attn_cp, st, ticket, (double)own * d * 4, err);
}

/* Logits of all members of the attention group into rows of the whole vocabulary. */
static tr_status gather_logits(tr_model *m, int n_rows, tr_err *err)
{
    const size_t vocab = (size_t)m->config->vocab_size,
                 width = (size_t)m->weights->slice.vocab.n;
    const int members = tr_comm_size(m->groups.attn_tp);
    size_t bytes[MOST_MEMBERS];
    tr_status st = TR_OK;
    tr_ticket ticket;

    for (int i = 0; i < members; i++)
        bytes[i] = (size_t)tr_slice_vocab(m->config, i, members).n * sizeof(float);
    for (int r = 0; r < n_rows && st == TR_OK; r++) {
        st = tr_comm_all_gather(m->groups.attn_tp, m->ws.logits_own + (size_t)r * width,
                                m->ws.logits + (size_t)r * vocab, bytes, &ticket, err);
        st = tr_model_await(m, m->groups.attn_tp, st, ticket, (double)width * 4, err);
    }
    return st;
}

/* ws.logits [n, vocab] of ws.head_in [n, hidden]. */
static tr_status logits(tr_model *m, int n, tr_err *err)
{
    const tr_linear *w = &m->weights->head;
    const int d = m->config->hidden_size, cut = m->weights->slice.head_partial;

    m->note_bytes = (double)m->ops->linear_bytes(w->format, 1, w->n_out, d);
    m->note_flops = 2.0 * n * w->n_out * d;
    tr_status st =
        TR_RUN(m, linear, err, .n = m->ws.n_head, .n_max = m->n_head_chunk, .w = w,
               .in = {.x = m->ws.head_in, .ld = (size_t)d, .n_max = m->n_head_chunk, .d = d},
               .out = cut ? m->ws.logits_own : m->ws.logits, .ld_out = (size_t)w->n_out,
               .out_f32 = 1);
    return st == TR_OK && cut ? gather_logits(m, n, err) : st;
}

tr_status tr_head_forward(tr_model *m, const tr_pass *p, struct tr_step_memory *s, tr_err *err)
{
    const int d = m->config->hidden_size, vocab = m->config->vocab_size;
    const tr_rows *rows = m->part ? &s->head_rows : &p->rows;
    const void *plan = m->part ? s->head_plan : s->plan;
    const int n_head = m->part ? tr_part_head(m->part)->n_head_rows : p->plan->n_head_rows;
    tr_status st = m->part ? gather_rows(m, p, err) : TR_OK;

    for (int i = 0; i < n_head && st == TR_OK; i += m->n_head_chunk) {
        const int n = n_head - i < m->n_head_chunk ? n_head - i : m->n_head_chunk;
        st = TR_RUN(m, rows_gather, err, .index = m->part ? s->head_index : rows->head_row,
                    .n_index = rows->n_head, .i0 = i, .n_rows = n, .d = d,
                    .in = m->part ? m->ws.head_all : m->ws.normed, .out = m->ws.head_in,
                    .n_out = m->ws.n_head);
        if (st == TR_OK) st = logits(m, n, err);
        if (st != TR_OK) return st;
        tr_model_show(m, "logits", -1, i, n, vocab, (size_t)vocab, m->ws.logits);
        st = TR_RUN(m, sample, err, .rows = rows, .i_head = i, .n_rows = n, .n_vocab = vocab,
                    .logits = m->ws.logits, .ld = (size_t)vocab, .has_token = m->has_token,
                    .slots = m->slots, .plan = plan, .token_out = s->token,
                    .workspace = m->ws.scratch, .workspace_bytes = m->ws.scratch_bytes);
        if (st == TR_OK)
            st = TR_RUN(m, logprobs, err, .rows = rows, .i_head = i, .n_rows = n, .n_vocab = vocab,
                        .logits = m->ws.logits, .ld = (size_t)vocab, .slots = m->slots,
                        .token_out = s->token, .logprob = s->logprob, .rank = s->rank,
                        .top_token = s->top_token, .top_logprob = s->top_logprob);
    }
    return st;
}
