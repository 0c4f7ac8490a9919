/* The head (model.md 8): logits of the rows that asked for them, in chunks, and a token or a score of each.
 *
 * Under context parallelism the head rows of a step lie with the members that computed them; every member gets all of them, so that
 * all sample alike and know each slot's newest token. The vocabulary is cut over the attention group. */
#include <config.h>

#include "model/model_priv.h"
#include "model/note.h"

/* ws.head_all: the normed head rows of all members, member after member. */
static tr_status gather_rows(tr_model *m, const tr_pass *p, tr_err *err)
{
    const int d = m->config->hidden_size, members = tr_comm_size(m->groups.attn_cp);
    const int *n = tr_part_heads(m->part), own = n[tr_comm_rank(m->groups.attn_cp)];
    size_t bytes[TR_MEMBERS_MAX];
    tr_status st = TR_OK;
    tr_ticket ticket = {0};

    tr_note(m, tr_work_rows_gather(own, d));
    if (own > 0)
        st = TR_RUN(m, rows_gather, err, .index = p->rows.head_row, .n_index = p->rows.n_head,
                    .i0 = 0, .n_rows = own, .d = d, .in = m->ws.normed, .out = m->ws.head_own,
                    .n_out = m->ws.n_head);
    for (int i = 0; i < members; i++)
        bytes[i] = (size_t)n[i] * (size_t)d * tr_act_bytes(m->ops);
    if (st == TR_OK)
        st = tr_comm_all_gather(m->groups.attn_cp, m->ws.head_own, m->ws.head_all, bytes, &ticket,
                                err);
    return tr_model_await(m, m->groups.attn_cp, st, ticket,
                          (double)own * d * (double)tr_act_bytes(m->ops), err);
}

/* ws.logits [n, this rank's ids] of ws.head_in [n, hidden]. */
static tr_status logits(tr_model *m, int n, tr_err *err)
{
    const tr_linear *w = &m->weights->head;
    const int d = m->config->hidden_size;

    tr_note(m, tr_work_linear(n, m->ops, w));
    return TR_RUN(m, linear, err, .n = m->ws.n_head, .n_max = n, .w = w,
                  .in = {.x = m->ws.head_in,
                         .ld = (size_t)d,
                         .q = m->ws.quant[TR_QUANT_MAIN].q,
                         .q_scale = m->ws.quant[TR_QUANT_MAIN].scale,
                         .n_max = n,
                         .d = d,
                         .scale_pow2 = m->config->scale_ue8m0},
                  .out = m->ws.logits, .ld_out = (size_t)w->n_out, .out_f32 = 1);
}

typedef struct chunk { /* head rows [i, i + n) */
    const tr_rows *rows;
    const void *plan; /* device copy */
    int i, n;
} chunk;

/* The vocabulary is whole on this rank. */
static tr_status sample_whole(tr_model *m, const chunk *c, struct tr_step_memory *s, tr_err *err)
{
    const int vocab = m->config->vocab_size;
    tr_model_show(m, "logits", -1, c->i, c->n, vocab, (size_t)vocab, m->ws.logits);
    tr_note(m, tr_work_logits(c->n, vocab));
    tr_status st =
        TR_RUN(m, sample, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n, .n_vocab = vocab,
               .logits = m->ws.logits, .ld = (size_t)vocab, .has_token = m->has_token,
               .slots = m->slots, .plan = c->plan, .token_out = s->token,
               .workspace = m->ws.scratch, .workspace_bytes = m->ws.scratch_bytes);
    tr_note(m, (tr_work){8.0 * c->n, 0}); /* which rows want them, the device knows */
    if (st == TR_OK)
        st = TR_RUN(m, logprobs, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
                    .n_vocab = vocab, .logits = m->ws.logits, .ld = (size_t)vocab,
                    .slots = m->slots, .token_out = s->token, .logprob = s->logprob,
                    .rank = s->rank, .top_token = s->top_token, .top_logprob = s->top_logprob);
    return st;
}

/* n rows of `bytes` from every member of the attention group to all. */
static tr_status gather_parts(tr_model *m, const void *own, void *all, size_t bytes, tr_err *err)
{
    size_t each[TR_MEMBERS_MAX];
    tr_ticket ticket = {0};

    for (int i = 0; i < tr_comm_size(m->groups.attn_tp); i++)
        each[i] = bytes;
    tr_status st = tr_comm_all_gather(m->groups.attn_tp, own, all, each, &ticket, err);
    return tr_model_await(m, m->groups.attn_tp, st, ticket, (double)bytes, err);
}

/* Head row c->i + r from its whole logits: the parts did not tell its token. Rare. */
static tr_status sample_gathered(tr_model *m, const chunk *c, int r, struct tr_step_memory *s,
                                 tr_err *err)
{
    const int members = tr_comm_size(m->groups.attn_tp), vocab = m->config->vocab_size;
    const size_t width = (size_t)m->weights->head.n_out;
    size_t bytes[TR_MEMBERS_MAX];
    tr_ticket ticket = {0};

    for (int i = 0; i < members; i++)
        bytes[i] = (size_t)tr_slice_vocab(m->config, i, members).n * sizeof(float);
    tr_status st = tr_comm_all_gather(m->groups.attn_tp, m->ws.logits + (size_t)r * width,
                                      m->ws.logits_all, bytes, &ticket, err);
    st = tr_model_await(m, m->groups.attn_tp, st, ticket, (double)width * sizeof(float), err);
    if (st != TR_OK) return st;
    tr_note(m, tr_work_logits(1, vocab));
    return TR_RUN(m, sample, err, .rows = c->rows, .i_head = c->i + r, .n_rows = 1,
                  .n_vocab = vocab, .logits = m->ws.logits_all, .ld = (size_t)vocab,
                  .has_token = m->has_token, .slots = m->slots, .plan = c->plan,
                  .token_out = s->token, .workspace = m->ws.scratch,
                  .workspace_bytes = m->ws.scratch_bytes);
}

/* Every sampled row is greedy: 8 bytes a row tell the token. */
static tr_status argmax(tr_model *m, const chunk *c, struct tr_step_memory *s, tr_err *err)
{
    const tr_range ids = m->weights->slice.vocab;
    tr_ticket ticket = {0};

    tr_note(m, tr_work_logits(c->n, ids.n));
    tr_status st =
        TR_RUN(m, argmax_part, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
               .first = ids.begin, .n_vocab = ids.n, .logits = m->ws.logits, .ld = (size_t)ids.n,
               .has_token = m->has_token, .plan = c->plan, .key = m->ws.part_own,
               .workspace = m->ws.scratch, .workspace_bytes = m->ws.scratch_bytes);
    if (st == TR_OK)
        st = tr_comm_all_max_u64(m->groups.attn_tp, m->ws.part_own, (size_t)c->n, &ticket, err);
    st = tr_model_await(m, m->groups.attn_tp, st, ticket, 8.0 * c->n, err);
    if (st != TR_OK) return st;
    tr_note(m, tr_work_parts(c->n, 1, sizeof(uint64_t)));
    return TR_RUN(m, argmax_take, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
                  .key = m->ws.part_own, .slots = m->slots, .token_out = s->token);
}

/* Tokens from the parts of all members: nobody has a row's whole logits. */
static tr_status sample_parts(tr_model *m, const chunk *c, struct tr_step_memory *s, tr_err *err)
{
    const tr_range ids = m->weights->slice.vocab;
    enum { SAMPLE_FROM_WHOLE = -3, AT_A_TIME = 64 };
    int32_t token[AT_A_TIME];

    tr_note(m, tr_work_logits(c->n, ids.n));
    tr_status st = TR_RUN(m, sample_part, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
                          .first = ids.begin, .n_vocab = ids.n, .logits = m->ws.logits,
                          .ld = (size_t)ids.n, .has_token = m->has_token, .slots = m->slots,
                          .plan = c->plan, .part = m->ws.part_own, .workspace = m->ws.scratch,
                          .workspace_bytes = m->ws.scratch_bytes);
    if (st == TR_OK)
        st = gather_parts(m, m->ws.part_own, m->ws.part_all, (size_t)c->n * sizeof(tr_sample_part),
                          err);
    tr_note(m, tr_work_parts(c->n, tr_comm_size(m->groups.attn_tp), sizeof(tr_sample_part)));
    if (st == TR_OK)
        st = TR_RUN(m, sample_merge, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
                    .n_members = tr_comm_size(m->groups.attn_tp), .part = m->ws.part_all,
                    .slots = m->slots, .token_out = s->token);
    for (int i = 0; i < c->n && st == TR_OK; i += AT_A_TIME) {
        const int n = c->n - i < AT_A_TIME ? c->n - i : AT_A_TIME;
        st = tr_model_fetch_words(m, token, s->token + c->i + i, (size_t)n * sizeof *token, err);
        for (int r = 0; r < n && st == TR_OK; r++)
            if (token[r] == SAMPLE_FROM_WHOLE) st = sample_gathered(m, c, i + r, s, err);
    }
    return st;
}

static tr_status logprob_parts(tr_model *m, const chunk *c, struct tr_step_memory *s, tr_err *err)
{
    const tr_range ids = m->weights->slice.vocab;
    const int members = tr_comm_size(m->groups.attn_tp);

    tr_note(m, tr_work_logits(c->n, ids.n));
    tr_status st =
        TR_RUN(m, logprob_part, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
               .first = ids.begin, .n_vocab = ids.n, .logits = m->ws.logits, .ld = (size_t)ids.n,
               .slots = m->slots, .token_out = s->token, .part = m->ws.part_own);
    if (st == TR_OK)
        st = gather_parts(m, m->ws.part_own, m->ws.part_all, (size_t)c->n * sizeof(tr_logprob_part),
                          err);
    tr_note(m, tr_work_logits(c->n, ids.n));
    if (st == TR_OK)
        st = TR_RUN(m, logprob_rank, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
                    .first = ids.begin, .n_vocab = ids.n, .n_members = members,
                    .logits = m->ws.logits, .ld = (size_t)ids.n, .slots = m->slots,
                    .token_out = s->token, .part = m->ws.part_all, .better = m->ws.better_own);
    if (st == TR_OK)
        st = gather_parts(m, m->ws.better_own, m->ws.better_all, (size_t)c->n * sizeof(int32_t),
                          err);
    tr_note(m, tr_work_parts(c->n, members, sizeof(tr_logprob_part)));
    if (st == TR_OK)
        st = TR_RUN(m, logprob_merge, err, .rows = c->rows, .i_head = c->i, .n_rows = c->n,
                    .n_members = members, .slots = m->slots, .token_out = s->token,
                    .part = m->ws.part_all, .better = m->ws.better_all, .logprob = s->logprob,
                    .rank = s->rank, .top_token = s->top_token, .top_logprob = s->top_logprob);
    return st;
}

tr_status tr_head_forward(tr_model *m, const tr_pass *p, struct tr_step_memory *s, tr_err *err)
{
    const tr_rows *rows = p->split ? &s->head_rows : &p->rows;
    const int n_head = p->split ? tr_part_head(m->part)->n_head_rows : p->n_head;
    const int cut = m->weights->slice.head_partial;
    tr_status st = p->split ? gather_rows(m, p, err) : TR_OK;

    for (int i = 0; i < n_head && st == TR_OK; i += m->n_head_chunk) {
        const int n = n_head - i < m->n_head_chunk ? n_head - i : m->n_head_chunk;
        const chunk c = {.rows = rows, .plan = p->split ? s->head_plan : s->plan, .i = i, .n = n};
        tr_note(m, tr_work_rows_gather(n, m->config->hidden_size));
        st = TR_RUN(m, rows_gather, err, .index = p->split ? s->head_index : rows->head_row,
                    .n_index = rows->n_head, .i0 = i, .n_rows = n, .d = m->config->hidden_size,
                    .in = p->split ? m->ws.head_all : m->ws.normed, .out = m->ws.head_in,
                    .n_out = m->ws.n_head);
        if (st == TR_OK) st = logits(m, n, err);
        if (st != TR_OK) return st;
        if (!cut)
            st = sample_whole(m, &c, s, err);
        else if (p->plan->flags & TR_PLAN_GREEDY)
            st = argmax(m, &c, s, err);
        else
            st = sample_parts(m, &c, s, err);
        if (st == TR_OK && cut && (p->plan->flags & TR_PLAN_HAS_SCORES))
            st = logprob_parts(m, &c, s, err);
    }
    return st;
}
