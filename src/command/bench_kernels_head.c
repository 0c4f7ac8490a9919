/* Cases of `trireme bench kernels`: the head, whole on one rank and cut over members. */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "command/bench_kernels.h"

enum { N_MEMBERS = 8 };

typedef struct head_bench {
    tr_slots slots;
    tr_rows rows;
    tr_operand plan, logits, has_token, token, work, out[4];
    int n_vocab;
} head_bench;

/* TR_BENCH_SLOTS slots, random logits of 16 rows, sampling parameters as given. */
static tr_status make_head(tr_kbench *b, head_bench *h, tr_slot_open sampling, tr_err *err)
{
    enum { N = 16 };
    const size_t vocab = (size_t)b->config.vocab_size, n = TR_BENCH_SLOTS * sizeof(int32_t);
    tr_operand open, target, slot;
    tr_status st = tr_bench_frame(b, &h->slots, &h->rows, err);
    h->n_vocab = b->config.vocab_size;
    if (st == TR_OK) st = tr_bench_plan(b, 0, &h->plan, err);
    if (st == TR_OK) st = tr_bench_floats(b, N * vocab, 10, &h->logits, err);
    if (st == TR_OK) st = tr_bench_zeros(b, tr_ceil_div(vocab, 32) * 4, &h->has_token, err);
    if (st == TR_OK) st = tr_bench_zeros(b, n, &h->token, err);
    if (st == TR_OK) st = tr_bench_zeros(b, b->ops->sample_workspace(N, h->n_vocab), &h->work, err);
    for (int i = 0; i < 4 && st == TR_OK; i++)
        st = tr_bench_zeros(b, n * TR_MAX_LOGPROBS, &h->out[i], err);
    if (st == TR_OK) st = tr_bench_zeros(b, TR_BENCH_SLOTS * sizeof(tr_slot_open), &open, err);
    if (st == TR_OK) st = tr_bench_zeros(b, n, &target, err);
    if (st == TR_OK) st = tr_bench_zeros(b, n, &slot, err);
    if (st != TR_OK) return st;
    memset(h->has_token.h, 0xff, h->has_token.bytes);
    for (int i = 0; i < TR_BENCH_SLOTS; i++) {
        ((tr_slot_open *)open.h)[i] = sampling;
        ((tr_slot_open *)open.h)[i].slot = i;
        ((int32_t *)target.h)[i] = -1;
        ((int32_t *)slot.h)[i] = i;
    }
    h->slots.sampling = open.d;
    h->rows.target = target.d;
    h->rows.slot = slot.d;
    h->rows.head_row = slot.d; /* head row i is row i */
    st = tr_bench_word(b, TR_BENCH_SLOTS, &h->rows.n, err);
    if (st == TR_OK) st = tr_bench_word(b, TR_BENCH_SLOTS, &h->rows.n_head, err);
    if (st == TR_OK) st = tr_bench_send(b, &h->has_token, err);
    if (st == TR_OK) st = tr_bench_send(b, &open, err);
    if (st == TR_OK) st = tr_bench_send(b, &target, err);
    return st == TR_OK ? tr_bench_send(b, &slot, err) : st;
}

static tr_status one_sample(tr_kbench *b, const char *what, tr_slot_open sampling, int n,
                            tr_err *err)
{
    head_bench h = {0};
    tr_status st = make_head(b, &h, sampling, err);
    const struct tr_sample_args args = {.rows = &h.rows,
                                        .n_rows = n,
                                        .n_vocab = h.n_vocab,
                                        .logits = h.logits.d,
                                        .ld = (size_t)h.n_vocab,
                                        .has_token = h.has_token.d,
                                        .slots = h.slots,
                                        .plan = h.plan.d,
                                        .token_out = h.token.d,
                                        .workspace = h.work.d,
                                        .workspace_bytes = h.work.bytes};
    tr_line line = TR_LINE(sample, tr_work_logits(n, h.n_vocab), .warm = {h.logits});
    snprintf(line.shape, sizeof line.shape, "%s, %d ids, rows %d", what, h.n_vocab, n);
    if (st == TR_OK) st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return st;
}

tr_status tr_bench_sample(tr_kbench *b, tr_err *err)
{
    const tr_slot_open greedy = {.top_p = 1, .n_logprobs = -1, .n_prompt_logprobs = -1},
                       drawn = {.top_p = 0.95f,
                                .temperature = 0.7f,
                                .n_logprobs = -1,
                                .n_prompt_logprobs = -1};
    tr_status st = one_sample(b, "greedy", greedy, 1, err);
    if (st == TR_OK) st = one_sample(b, "greedy", greedy, 16, err);
    if (st == TR_OK) st = one_sample(b, "top_p", drawn, 1, err);
    return st == TR_OK ? one_sample(b, "top_p", drawn, 16, err) : st;
}

tr_status tr_bench_logprobs(tr_kbench *b, tr_err *err)
{
    const tr_slot_open five = {.top_p = 1, .n_logprobs = 5, .n_prompt_logprobs = -1};
    for (int n = 1; n <= 16; n *= 16) {
        head_bench h = {0};
        tr_status st = make_head(b, &h, five, err);
        const struct tr_logprobs_args args = {.rows = &h.rows,
                                              .n_rows = n,
                                              .n_vocab = h.n_vocab,
                                              .logits = h.logits.d,
                                              .ld = (size_t)h.n_vocab,
                                              .slots = h.slots,
                                              .token_out = h.token.d,
                                              .logprob = h.out[0].d,
                                              .rank = h.out[1].d,
                                              .top_token = h.out[2].d,
                                              .top_logprob = h.out[3].d};
        tr_line line = TR_LINE(logprobs, tr_work_logits(n, h.n_vocab), .warm = {h.logits});
        snprintf(line.shape, sizeof line.shape, "5 best of %d, rows %d", h.n_vocab, n);
        if (st == TR_OK) st = tr_bench_time(b, &line, &args, err);
        if (st == TR_OK) tr_bench_print_line(b, &line);
        tr_bench_case_end(b);
        if (st != TR_OK) return st;
    }
    return TR_OK;
}

/* ---- cut over members ---------------------------------------------------------------------------------------------------- */

typedef struct cut_bench { /* member 0's ids of a vocabulary cut into N_MEMBERS */
    head_bench h;
    tr_operand own, all, better;
    int n;
} cut_bench;

static tr_status make_cut(tr_kbench *b, cut_bench *c, size_t part_bytes, tr_err *err)
{
    const tr_slot_open drawn = {
        .top_p = 0.95f, .temperature = 0.7f, .n_logprobs = 5, .n_prompt_logprobs = -1};
    const size_t n = 16;
    tr_status st = make_head(b, &c->h, drawn, err);
    c->n = (int)n;
    c->h.n_vocab /= N_MEMBERS;
    if (st == TR_OK) st = tr_bench_zeros(b, n * part_bytes, &c->own, err);
    if (st == TR_OK) st = tr_bench_zeros(b, n * part_bytes * N_MEMBERS, &c->all, err);
    if (st == TR_OK) st = tr_bench_zeros(b, n * N_MEMBERS * 4, &c->better, err);
    return st;
}

static tr_status timed(tr_kbench *b, const cut_bench *c, tr_line *line, const void *args,
                       tr_err *err)
{
    line->warm[0] = c->h.logits;
    snprintf(line->shape, sizeof line->shape, "%d ids, %d members, rows %d", c->h.n_vocab,
             N_MEMBERS, c->n);
    tr_status st = tr_bench_time(b, line, args, err);
    if (st == TR_OK) tr_bench_print_line(b, line);
    return st;
}

/* Member 0's part, as every member's. */
static tr_status spread(tr_kbench *b, cut_bench *c, tr_err *err)
{
    tr_status st = tr_bench_fetch(b, &c->own, err);
    for (int i = 0; i < N_MEMBERS && st == TR_OK; i++)
        memcpy((char *)c->all.h + (size_t)i * c->own.bytes, c->own.h, c->own.bytes);
    return st == TR_OK ? tr_bench_send(b, &c->all, err) : st;
}

static struct tr_sample_part_args sample_part_of(const cut_bench *c)
{
    return (struct tr_sample_part_args){.rows = &c->h.rows,
                                        .n_rows = c->n,
                                        .n_vocab = c->h.n_vocab,
                                        .logits = c->h.logits.d,
                                        .ld = (size_t)c->h.n_vocab,
                                        .has_token = c->h.has_token.d,
                                        .slots = c->h.slots,
                                        .plan = c->h.plan.d,
                                        .part = c->own.d,
                                        .workspace = c->h.work.d,
                                        .workspace_bytes = c->h.work.bytes};
}

static struct tr_logprob_part_args logprob_part_of(const cut_bench *c)
{
    return (struct tr_logprob_part_args){.rows = &c->h.rows,
                                         .n_rows = c->n,
                                         .n_vocab = c->h.n_vocab,
                                         .logits = c->h.logits.d,
                                         .ld = (size_t)c->h.n_vocab,
                                         .slots = c->h.slots,
                                         .token_out = c->h.token.d,
                                         .part = c->own.d};
}

tr_status tr_bench_argmax_part(tr_kbench *b, tr_err *err)
{
    cut_bench c = {0};
    tr_status st = make_cut(b, &c, sizeof(uint64_t), err);
    const struct tr_argmax_part_args args = {.rows = &c.h.rows,
                                             .n_rows = c.n,
                                             .n_vocab = c.h.n_vocab,
                                             .logits = c.h.logits.d,
                                             .ld = (size_t)c.h.n_vocab,
                                             .has_token = c.h.has_token.d,
                                             .plan = c.h.plan.d,
                                             .key = c.own.d,
                                             .workspace = c.h.work.d,
                                             .workspace_bytes = c.h.work.bytes};
    tr_line line = TR_LINE(argmax_part, tr_work_logits(c.n, c.h.n_vocab));
    return st == TR_OK ? timed(b, &c, &line, &args, err) : st;
}

tr_status tr_bench_argmax_take(tr_kbench *b, tr_err *err)
{
    cut_bench c = {0};
    tr_status st = make_cut(b, &c, sizeof(uint64_t), err);
    if (st != TR_OK) return st;
    for (int i = 0; i < c.n; i++) /* some logit, id i */
        ((uint64_t *)c.own.h)[i] = (uint64_t)0xc0000000u << 32 | (uint32_t)~i;
    st = tr_bench_send(b, &c.own, err);
    const struct tr_argmax_take_args args = {.rows = &c.h.rows,
                                             .n_rows = c.n,
                                             .key = c.own.d,
                                             .slots = c.h.slots,
                                             .token_out = c.h.token.d};
    tr_line line = TR_LINE(argmax_take, tr_work_parts(c.n, 1, sizeof(uint64_t)));
    return st == TR_OK ? timed(b, &c, &line, &args, err) : st;
}

tr_status tr_bench_sample_part(tr_kbench *b, tr_err *err)
{
    cut_bench c = {0};
    tr_status st = make_cut(b, &c, sizeof(tr_sample_part), err);
    const struct tr_sample_part_args args = sample_part_of(&c);
    tr_line line = TR_LINE(sample_part, tr_work_logits(c.n, c.h.n_vocab));
    return st == TR_OK ? timed(b, &c, &line, &args, err) : st;
}

tr_status tr_bench_sample_merge(tr_kbench *b, tr_err *err)
{
    cut_bench c = {0};
    tr_status st = make_cut(b, &c, sizeof(tr_sample_part), err);
    const struct tr_sample_part_args part = sample_part_of(&c);
    if (st == TR_OK) st = b->ops->sample_part(b->device, TR_LANE_MAIN, &part);
    if (st == TR_OK) st = spread(b, &c, err);
    if (st != TR_OK) return st;
    const struct tr_sample_merge_args args = {.rows = &c.h.rows,
                                              .n_rows = c.n,
                                              .n_members = N_MEMBERS,
                                              .part = c.all.d,
                                              .slots = c.h.slots,
                                              .token_out = c.h.token.d};
    tr_line line = TR_LINE(sample_merge, tr_work_parts(c.n, N_MEMBERS, sizeof(tr_sample_part)));
    return timed(b, &c, &line, &args, err);
}

tr_status tr_bench_logprob_part(tr_kbench *b, tr_err *err)
{
    cut_bench c = {0};
    tr_status st = make_cut(b, &c, sizeof(tr_logprob_part), err);
    const struct tr_logprob_part_args args = logprob_part_of(&c);
    tr_line line = TR_LINE(logprob_part, tr_work_logits(c.n, c.h.n_vocab));
    return st == TR_OK ? timed(b, &c, &line, &args, err) : st;
}

/* logprob_rank (merge 0) and logprob_merge (1), which want the parts. */
static tr_status after_parts(tr_kbench *b, int merge, tr_err *err)
{
    cut_bench c = {0};
    tr_status st = make_cut(b, &c, sizeof(tr_logprob_part), err);
    const struct tr_logprob_part_args part = logprob_part_of(&c);
    if (st == TR_OK) st = b->ops->logprob_part(b->device, TR_LANE_MAIN, &part);
    if (st == TR_OK) st = spread(b, &c, err);
    if (st != TR_OK) return st;
    const struct tr_logprob_rank_args rank = {.rows = &c.h.rows,
                                              .n_rows = c.n,
                                              .n_vocab = c.h.n_vocab,
                                              .n_members = N_MEMBERS,
                                              .logits = c.h.logits.d,
                                              .ld = (size_t)c.h.n_vocab,
                                              .slots = c.h.slots,
                                              .token_out = c.h.token.d,
                                              .part = c.all.d,
                                              .better = c.better.d};
    const struct tr_logprob_merge_args all = {.rows = &c.h.rows,
                                              .n_rows = c.n,
                                              .n_members = N_MEMBERS,
                                              .slots = c.h.slots,
                                              .token_out = c.h.token.d,
                                              .part = c.all.d,
                                              .better = c.better.d,
                                              .logprob = c.h.out[0].d,
                                              .rank = c.h.out[1].d,
                                              .top_token = c.h.out[2].d,
                                              .top_logprob = c.h.out[3].d};
    tr_line line = {.op = merge ? TR_BENCH_logprob_merge : TR_BENCH_logprob_rank, .error = NAN};
    line.work = merge ? tr_work_parts(c.n, N_MEMBERS, sizeof(tr_logprob_part))
                      : tr_work_logits(c.n, c.h.n_vocab);
    return timed(b, &c, &line, merge ? (const void *)&all : (const void *)&rank, err);
}

tr_status tr_bench_logprob_rank(tr_kbench *b, tr_err *err)
{
    return after_parts(b, 0, err);
}

tr_status tr_bench_logprob_merge(tr_kbench *b, tr_err *err)
{
    return after_parts(b, 1, err);
}
