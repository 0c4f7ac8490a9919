/* Cases of `trireme bench kernels`: the frame of a step, rows one by one, routing, the head. */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "command/bench_kernels.h"
#include "kernels/number.h"
#include "model/plan.h"

enum { PAGES = 4, MAX_ROWS = 512 };

/* ---- plans ------------------------------------------------------------------------------------------------------------ */

/* A decode step of TR_BENCH_SLOTS slots (or, copies: as many page copies), on the device. */
tr_status tr_bench_plan(tr_kbench *b, int copies, tr_operand *out, tr_err *err)
{
    const tr_plan_limits limits = {.n_slots = TR_BENCH_SLOTS,
                                   .max_pages = PAGES,
                                   .n_pages = TR_BENCH_SLOTS * PAGES,
                                   .n_rows_max = TR_BENCH_SLOTS,
                                   .n_head_max = TR_BENCH_SLOTS,
                                   .n_vocab = b->config.vocab_size,
                                   .index_topk = b->config.index_topk};
    tr_plan_builder *builder = tr_plan_builder_create(&limits);
    tr_status st = TR_OK;
    if (!builder) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_plan_begin(builder, 0, copies ? TR_PLAN_IDLE : 0);
    for (int i = 0; i < TR_BENCH_SLOTS; i++) {
        const tr_page_copy copy = {.from = i, .to = TR_BENCH_SLOTS + i, .n_rows = TR_PAGE_TOKENS};
        if ((copies ? tr_plan_add_copy(builder, copy) : tr_plan_add_decode(builder, i)) < 0)
            st = tr_fail(err, TR_E_USAGE, "bench: a plan does not fit");
    }
    const tr_plan *plan = tr_plan_seal(builder, copies ? 0 : PAGES * TR_PAGE_TOKENS);
    if (st == TR_OK && !plan) st = tr_fail(err, TR_E_USAGE, "bench: a plan does not fit");
    if (st == TR_OK) st = tr_bench_zeros(b, plan->bytes, out, err);
    if (st == TR_OK) {
        memcpy(out->h, plan, plan->bytes);
        st = tr_bench_send(b, out, err);
    }
    tr_plan_builder_free(builder);
    return st;
}

/* A zeroed device array. */
static tr_status array(tr_kbench *b, size_t bytes, void *out, tr_err *err)
{
    tr_operand x;
    tr_status st = tr_bench_zeros(b, bytes, &x, err);
    if (st == TR_OK) memcpy(out, &x.d, sizeof x.d);
    return st;
}

/* Slots and rows of TR_BENCH_SLOTS sequences. */
tr_status tr_bench_frame(tr_kbench *b, tr_slots *slots, tr_rows *rows, tr_err *err)
{
    const size_t n = TR_BENCH_SLOTS * sizeof(int32_t);
    *slots = (tr_slots){.n_slots = TR_BENCH_SLOTS, .max_pages = PAGES};
    *rows = (tr_rows){.n_max = TR_BENCH_SLOTS,
                      .n_head_max = TR_BENCH_SLOTS,
                      .max_context = PAGES * TR_PAGE_TOKENS,
                      .max_pages = PAGES};
    const struct {
        size_t bytes;
        void *out;
    } wanted[] = {
        {n, &slots->length},
        {n, &slots->last_token},
        {n * PAGES, &slots->page_table},
        {TR_BENCH_SLOTS * sizeof(tr_slot_open), &slots->sampling},
        {4, &rows->n},
        {4, &rows->n_head},
        {n, &rows->token},
        {n, &rows->slot},
        {n, &rows->position},
        {n, &rows->begin},
        {2 * n, &rows->write},
        {TR_BENCH_SLOTS, &rows->dense},
        {n, &rows->head_row},
        {n, &rows->target},
    };
    tr_status st = TR_OK;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted && st == TR_OK; i++)
        st = array(b, wanted[i].bytes, wanted[i].out, err);
    rows->page_table = slots->page_table;
    return st;
}

tr_status tr_bench_plan_apply(tr_kbench *b, tr_err *err)
{
    tr_operand plan;
    struct tr_plan_apply_args args = {0};
    tr_status st = tr_bench_plan(b, 0, &plan, err);
    if (st == TR_OK) st = tr_bench_frame(b, &args.slots, &args.rows, err);
    if (st != TR_OK) return st;
    args.plan = plan.d;
    args.n_dense = b->config.index_topk;
    /* Lengths grow by a token a run, and stay inside the pages: no more runs than a page has rows. */
    tr_line line = TR_LINE(plan_apply, tr_work_plan_apply((double)plan.bytes));
    snprintf(line.shape, sizeof line.shape, "decode, %d sequences", TR_BENCH_SLOTS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

tr_status tr_bench_pages_copy(tr_kbench *b, tr_err *err)
{
    const tr_config *c = &b->config;
    tr_operand plan, latent, index;
    tr_kv_layer kv = {.dtype = b->options->kv_dtype,
                      .n_pages = TR_BENCH_SLOTS * PAGES,
                      .d_latent = c->kv_lora_rank,
                      .d_rope = c->qk_rope_head_dim,
                      .d_index = c->index_head_dim};
    tr_status st = tr_bench_plan(b, 1, &plan, err);
    if (st == TR_OK)
        st = tr_bench_zeros(b,
                            (size_t)kv.n_pages * TR_PAGE_TOKENS *
                                tr_kv_row_bytes(kv.dtype, kv.d_latent, kv.d_rope),
                            &latent, err);
    if (st == TR_OK)
        st = tr_bench_zeros(b, (size_t)kv.n_pages * tr_index_page_bytes(kv.dtype, kv.d_index),
                            &index, err);
    if (st != TR_OK) return st;
    kv.latent = latent.d;
    kv.index = index.d;
    const struct tr_pages_copy_args args = {.plan = plan.d, .kv = kv};
    tr_line line = TR_LINE(pages_copy, tr_work_pages_copy(TR_BENCH_SLOTS * TR_PAGE_TOKENS, &kv));
    snprintf(line.shape, sizeof line.shape, "%d pages", TR_BENCH_SLOTS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

/* ---- rows ---------------------------------------------------------------------------------------------------------------- */

tr_status tr_bench_embed(tr_kbench *b, tr_err *err)
{
    const int n_table = b->config.vocab_size < 8192 ? b->config.vocab_size : 8192;
    const int d = b->config.hidden_size;
    tr_operand table, token, out;
    tr_rows rows = {.n_max = MAX_ROWS};
    tr_status st = tr_bench_zeros(b, (size_t)n_table * (size_t)d * 2, &table, err);
    if (st == TR_OK) st = tr_bench_zeros(b, MAX_ROWS * 4, &token, err);
    if (st == TR_OK) st = tr_bench_zeros(b, MAX_ROWS * (size_t)d * 4, &out, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < MAX_ROWS; i++)
        ((int32_t *)token.h)[i] = tr_bench_pick(b, n_table);
    st = tr_bench_send(b, &token, err);
    for (int n = 1; n <= MAX_ROWS && st == TR_OK; n *= MAX_ROWS) {
        tr_line line = TR_LINE(embed, tr_work_embed(n, d, TR_BF16));
        st = tr_bench_word(b, n, &rows.n, err);
        rows.token = token.d;
        const struct tr_embed_args args = {.rows = &rows,
                                           .table = table.d,
                                           .dtype = TR_BF16,
                                           .n_table = n_table,
                                           .d = d,
                                           .out = out.d};
        snprintf(line.shape, sizeof line.shape, "d %d rows %d", d, n);
        if (st == TR_OK) st = tr_bench_time(b, &line, &args, err);
        if (st == TR_OK) tr_bench_print_line(b, &line);
    }
    return st;
}

static tr_status one_norm(tr_kbench *b, int n, int d, tr_err *err)
{
    const size_t all = (size_t)n * (size_t)d;
    tr_operand residual, weight, out;
    int32_t *word;
    tr_errors e = {0, 0};
    tr_status st = tr_bench_floats(b, all, 3, &residual, err);
    if (st == TR_OK) st = tr_bench_floats(b, (size_t)d, 1, &weight, err);
    if (st == TR_OK) st = tr_bench_zeros(b, all * 4, &out, err);
    if (st == TR_OK) st = tr_bench_word(b, n, &word, err);
    if (st != TR_OK) return st;
    const struct tr_norm_args args = {.n = word,
                                      .n_max = n,
                                      .d = d,
                                      .residual = residual.d,
                                      .ld_residual = (size_t)d,
                                      .weight = weight.d,
                                      .eps = 1e-6f,
                                      .out = out.d,
                                      .ld_out = (size_t)d};
    tr_line line = TR_LINE(norm, tr_work_norm(n, d, 0), .warm = {residual});
    snprintf(line.shape, sizeof line.shape, "d %d rows %d", d, n);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) st = tr_bench_fetch(b, &out, err);
    if (st != TR_OK) return st;
    const float *x = (float *)residual.h + (all - (size_t)d),
                *y = (float *)out.h + (all - (size_t)d);
    double squares = 0;
    for (int i = 0; i < d; i++)
        squares += (double)x[i] * (double)x[i] / d;
    for (int i = 0; i < d; i++)
        tr_errors_add(&e, (double)y[i],
                      (double)x[i] / sqrt(squares + (double)args.eps) *
                          (double)((float *)weight.h)[i]);
    line.error = tr_errors_relative(&e);
    tr_bench_print_line(b, &line);
    return TR_OK;
}

tr_status tr_bench_norm(tr_kbench *b, tr_err *err)
{
    tr_status st = one_norm(b, 1, b->config.hidden_size, err);
    if (st == TR_OK) st = one_norm(b, MAX_ROWS, b->config.hidden_size, err);
    return st == TR_OK ? one_norm(b, 7, 1111, err) : st;
}

tr_status tr_bench_rows_gather(tr_kbench *b, tr_err *err)
{
    const int d = b->config.hidden_size, n = TR_BENCH_SLOTS;
    tr_operand index, in, out;
    int32_t *n_index, *n_out;
    tr_status st = tr_bench_floats(b, MAX_ROWS * (size_t)d, 1, &in, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)n * 4, &index, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)n * (size_t)d * 4, &out, err);
    if (st == TR_OK) st = tr_bench_word(b, n, &n_index, err);
    if (st == TR_OK) st = tr_bench_word(b, 0, &n_out, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < n; i++)
        ((int32_t *)index.h)[i] = tr_bench_pick(b, MAX_ROWS);
    st = tr_bench_send(b, &index, err);
    if (st != TR_OK) return st;
    const struct tr_rows_gather_args args = {.index = index.d,
                                             .n_index = n_index,
                                             .n_rows = n,
                                             .d = d,
                                             .in = in.d,
                                             .out = out.d,
                                             .n_out = n_out};
    tr_line line = TR_LINE(rows_gather, tr_work_rows_gather(n, d));
    snprintf(line.shape, sizeof line.shape, "d %d, %d of %d rows", d, n, MAX_ROWS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

static tr_status one_swiglu(tr_kbench *b, int n, int d, tr_err *err)
{
    tr_operand in, out;
    int32_t *word;
    tr_errors e = {0, 0};
    tr_status st = tr_bench_floats(b, 2 * (size_t)n * (size_t)d, 5, &in, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)n * (size_t)d * 4, &out, err);
    if (st == TR_OK) st = tr_bench_word(b, n, &word, err);
    if (st != TR_OK) return st;
    const struct tr_swiglu_args args = {
        .n = word, .n_max = n, .d = d, .gate_up = in.d, .out = out.d};
    tr_line line = TR_LINE(swiglu, tr_work_swiglu(n, d), .warm = {in});
    snprintf(line.shape, sizeof line.shape, "d %d rows %d", d, n);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) st = tr_bench_fetch(b, &out, err);
    if (st != TR_OK) return st;
    const float *x = (float *)in.h + 2 * (size_t)(n - 1) * (size_t)d;
    for (int i = 0; i < d; i++)
        tr_errors_add(&e, (double)((float *)out.h)[(size_t)(n - 1) * (size_t)d + (size_t)i],
                      (double)x[i] / (1 + exp(-(double)x[i])) * (double)x[d + i]);
    line.error = tr_errors_relative(&e);
    tr_bench_print_line(b, &line);
    return TR_OK;
}

tr_status tr_bench_swiglu(tr_kbench *b, tr_err *err)
{
    tr_status st = one_swiglu(b, 1, b->config.intermediate_size, err);
    if (st == TR_OK) st = one_swiglu(b, MAX_ROWS, b->config.moe_intermediate_size, err);
    return st == TR_OK ? one_swiglu(b, 7, 1111, err) : st;
}

/* ---- routing ---------------------------------------------------------------------------------------------------------------- */

tr_status tr_bench_router(tr_kbench *b, tr_err *err)
{
    const tr_config *c = &b->config;
    const int k = c->num_experts_per_tok, experts = c->n_routed_experts;
    tr_operand logits, bias, expert, weight;
    tr_status st = TR_OK;
    if (experts < 1 || k < 1) return TR_OK;
    for (int n = 1; n <= MAX_ROWS && st == TR_OK; n *= MAX_ROWS) {
        int32_t *word;
        st = tr_bench_floats(b, (size_t)n * (size_t)experts, 4, &logits, err);
        if (st == TR_OK) st = tr_bench_floats(b, (size_t)experts, 0.1f, &bias, err);
        if (st == TR_OK) st = tr_bench_zeros(b, (size_t)n * (size_t)k * 4, &expert, err);
        if (st == TR_OK) st = tr_bench_zeros(b, (size_t)n * (size_t)k * 4, &weight, err);
        if (st == TR_OK) st = tr_bench_word(b, n, &word, err);
        if (st != TR_OK) return st;
        const struct tr_router_args args = {.n = word,
                                            .n_max = n,
                                            .n_experts = experts,
                                            .n_group = c->n_group,
                                            .topk_group = c->topk_group,
                                            .k = k,
                                            .norm_topk = c->norm_topk_prob,
                                            .logits = logits.d,
                                            .bias = bias.d,
                                            .scaling = (float)c->routed_scaling_factor,
                                            .expert = expert.d,
                                            .weight = weight.d};
        tr_line line = TR_LINE(router, tr_work_router(n, experts, k), .warm = {logits});
        snprintf(line.shape, sizeof line.shape, "%d of %d experts, rows %d", k, experts, n);
        st = tr_bench_time(b, &line, &args, err);
        if (st == TR_OK) tr_bench_print_line(b, &line);
    }
    return st;
}

/* Random experts of n rows, k different ones each. */
static void pick_experts(tr_kbench *b, int32_t *expert, int n, int k)
{
    const int experts = b->config.n_routed_experts;
    for (int i = 0; i < n; i++) {
        const int first = tr_bench_pick(b, experts);
        for (int j = 0; j < k; j++)
            expert[i * k + j] = (first + j * (experts / k)) % experts;
    }
}

tr_status tr_bench_moe_pack(tr_kbench *b, tr_err *err)
{
    const int k = b->config.num_experts_per_tok, experts = b->config.n_routed_experts;
    tr_operand expert, start, pair;
    int32_t *word;
    if (experts < 1 || k < 1) return TR_OK;
    tr_status st = tr_bench_zeros(b, MAX_ROWS * (size_t)k * 4, &expert, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)(experts + 1) * 4, &start, err);
    if (st == TR_OK) st = tr_bench_zeros(b, MAX_ROWS * (size_t)k * 4, &pair, err);
    if (st != TR_OK) return st;
    pick_experts(b, expert.h, MAX_ROWS, k);
    st = tr_bench_send(b, &expert, err);
    for (int n = 1; n <= MAX_ROWS && st == TR_OK; n *= MAX_ROWS) {
        st = tr_bench_word(b, n, &word, err);
        if (st != TR_OK) return st;
        const struct tr_moe_pack_args args = {.n = word,
                                              .n_max = n,
                                              .k = k,
                                              .n_local = experts,
                                              .expert = expert.d,
                                              .start = start.d,
                                              .pair = pair.d};
        tr_line line = TR_LINE(moe_pack, tr_work_moe_pack(n, k), .warm = {expert});
        snprintf(line.shape, sizeof line.shape, "%d of %d experts, rows %d", k, experts, n);
        st = tr_bench_time(b, &line, &args, err);
        if (st == TR_OK) tr_bench_print_line(b, &line);
    }
    return st;
}

static double combine_error(const struct tr_moe_combine_args *a, const float *weight,
                            const float *y, const float *shared, const float *out, int row)
{
    const size_t d = (size_t)a->d, k = (size_t)a->k, r = (size_t)row;
    tr_errors e = {0, 0};
    for (size_t i = 0; i < d; i++) {
        double want = (double)shared[r * d + i];
        for (size_t j = 0; j < k; j++)
            want += (double)weight[r * k + j] * (double)y[(r * k + j) * d + i];
        tr_errors_add(&e, (double)out[r * d + i], want);
    }
    return tr_errors_relative(&e);
}

tr_status tr_bench_moe_combine(tr_kbench *b, tr_err *err)
{
    const int k = b->config.num_experts_per_tok, d = b->config.hidden_size;
    if (b->config.n_routed_experts < 1 || k < 1) return TR_OK;
    for (int n = 1; n <= 256; n *= 256) {
        tr_operand expert, weight, y, shared, out;
        int32_t *word;
        tr_status st = tr_bench_zeros(b, (size_t)n * (size_t)k * 4, &expert, err);
        if (st == TR_OK) st = tr_bench_floats(b, (size_t)n * (size_t)k, 1, &weight, err);
        if (st == TR_OK) st = tr_bench_floats(b, (size_t)n * (size_t)(k * d), 1, &y, err);
        if (st == TR_OK) st = tr_bench_floats(b, (size_t)n * (size_t)d, 1, &shared, err);
        if (st == TR_OK) st = tr_bench_zeros(b, (size_t)n * (size_t)d * 4, &out, err);
        if (st == TR_OK) st = tr_bench_word(b, n, &word, err);
        if (st != TR_OK) return st;
        pick_experts(b, expert.h, n, k);
        st = tr_bench_send(b, &expert, err);
        if (st != TR_OK) return st;
        const struct tr_moe_combine_args args = {.n = word,
                                                 .n_max = n,
                                                 .k = k,
                                                 .d = d,
                                                 .n_local = b->config.n_routed_experts,
                                                 .expert = expert.d,
                                                 .weight = weight.d,
                                                 .y = y.d,
                                                 .shared = shared.d,
                                                 .out = out.d};
        tr_line line = TR_LINE(moe_combine, tr_work_moe_combine(n, k, d), .warm = {y, shared});
        snprintf(line.shape, sizeof line.shape, "%d x %d, rows %d", k, d, n);
        st = tr_bench_time(b, &line, &args, err);
        if (st == TR_OK) st = tr_bench_fetch(b, &out, err);
        if (st != TR_OK) return st;
        line.error = combine_error(&args, weight.h, y.h, shared.h, out.h, n - 1);
        tr_bench_print_line(b, &line);
    }
    return TR_OK;
}

/* ---- experts of other ranks ---------------------------------------------------------------------------------------------- */

tr_status tr_bench_moe_dispatch(tr_kbench *b, tr_err *err)
{
    enum { N_EP = 8, ROWS = 64 };
    const int k = b->config.num_experts_per_tok, d = b->config.hidden_size,
              experts = b->config.n_routed_experts;
    const bool codes = tr_record_act(b->ops, d) == TR_CODES;
    const size_t most = ROWS * (size_t)(k < N_EP ? k : N_EP);
    tr_operand expert, weight, x, scale, record, count, origin;
    int32_t *n;
    if (experts < N_EP || experts % N_EP || k < 1) return TR_OK;
    tr_status st = tr_bench_zeros(b, ROWS * (size_t)k * 4, &expert, err);
    if (st == TR_OK) st = tr_bench_floats(b, ROWS * (size_t)k, 1, &weight, err);
    if (st == TR_OK) st = tr_bench_floats(b, ROWS * (size_t)d, 1, &x, err);
    if (st == TR_OK) st = tr_bench_floats(b, ROWS * (size_t)d / 128 + 1, 1, &scale, err);
    if (st == TR_OK)
        st = tr_bench_zeros(b, most * tr_dispatch_bytes(d, k, tr_record_act(b->ops, d)), &record,
                            err);
    if (st == TR_OK) st = tr_bench_zeros(b, N_EP * 4, &count, err);
    if (st == TR_OK) st = tr_bench_zeros(b, most * 4, &origin, err);
    if (st == TR_OK) st = tr_bench_word(b, ROWS, &n, err);
    if (st != TR_OK) return st;
    pick_experts(b, expert.h, ROWS, k);
    st = tr_bench_send(b, &expert, err);
    if (st != TR_OK) return st;
    const struct tr_moe_dispatch_args args = {.n = n,
                                              .step = 1,
                                              .n_rows = ROWS,
                                              .k = k,
                                              .d = d,
                                              .n_local = experts / N_EP,
                                              .n_ep = N_EP,
                                              .n_xt = 1,
                                              .expert = expert.d,
                                              .weight = weight.d,
                                              .x = x.d,
                                              .q = codes ? x.d : NULL,
                                              .q_scale = codes ? scale.d : NULL,
                                              .ld_scale = ROWS,
                                              .record = record.d,
                                              .count = count.d,
                                              .origin = origin.d};
    tr_line line =
        TR_LINE(moe_dispatch, tr_work_moe_dispatch((double)most, d, k, tr_record_act(b->ops, d)),
                .warm = {x});
    snprintf(line.shape, sizeof line.shape, "to %d ranks, rows %d", N_EP, ROWS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

tr_status tr_bench_moe_receive(tr_kbench *b, tr_err *err)
{
    const int k = b->config.num_experts_per_tok, d = b->config.hidden_size;
    const bool codes = tr_record_act(b->ops, d) == TR_CODES;
    tr_operand record, expert, weight, q = {0}, scale = {0};
    int32_t *n;
    if (k < 1) return TR_OK;
    tr_status st = tr_bench_zeros(b, MAX_ROWS * tr_dispatch_bytes(d, k, tr_record_act(b->ops, d)),
                                  &record, err);
    if (st == TR_OK) st = tr_bench_zeros(b, MAX_ROWS * (size_t)k * 4, &expert, err);
    if (st == TR_OK) st = tr_bench_zeros(b, MAX_ROWS * (size_t)k * 4, &weight, err);
    if (st == TR_OK && codes) st = tr_bench_zeros(b, MAX_ROWS * (size_t)d, &q, err);
    if (st == TR_OK && codes) st = tr_bench_zeros(b, MAX_ROWS * (size_t)d / 128 * 4, &scale, err);
    if (st == TR_OK) st = tr_bench_word(b, 0, &n, err);
    if (st != TR_OK) return st;
    const struct tr_moe_receive_args args = {.record = record.d,
                                             .n_rows = MAX_ROWS,
                                             .k = k,
                                             .d = d,
                                             .expert = expert.d,
                                             .weight = weight.d,
                                             .n_out = n,
                                             .q = q.d,
                                             .q_scale = scale.d,
                                             .ld_scale = MAX_ROWS};
    tr_line line = TR_LINE(moe_receive, codes ? tr_work_moe_dispatch(MAX_ROWS, d, k, TR_CODES)
                                              : tr_work_moe_pack(MAX_ROWS, 2 * k));
    snprintf(line.shape, sizeof line.shape, "rows %d", MAX_ROWS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

tr_status tr_bench_moe_return(tr_kbench *b, tr_err *err)
{
    const int d = b->config.hidden_size, each = 4, n = 128;
    tr_operand count, origin, y, out;
    tr_status st = tr_bench_zeros(b, (size_t)(n * each) * 4, &origin, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)each * 4, &count, err);
    if (st == TR_OK) st = tr_bench_floats(b, (size_t)(n * each) * (size_t)d, 1, &y, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)n * (size_t)d * 4, &out, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < n * each; i++) /* destination by destination, rows ascending in each */
        ((int32_t *)origin.h)[i] = i % n;
    for (int i = 0; i < each; i++)
        ((int32_t *)count.h)[i] = n;
    st = tr_bench_send(b, &origin, err);
    if (st == TR_OK) st = tr_bench_send(b, &count, err);
    if (st != TR_OK) return st;
    const struct tr_moe_return_args args = {.n_rows = n * each,
                                            .d = d,
                                            .n_members = each,
                                            .count = count.d,
                                            .origin = origin.d,
                                            .y = y.d,
                                            .out = out.d};
    tr_line line = TR_LINE(moe_return, tr_work_moe_return(n * each, d));
    snprintf(line.shape, sizeof line.shape, "d %d, %d into %d rows", d, n * each, n);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

tr_status tr_bench_moe_offer(tr_kbench *b, tr_err *err)
{
    enum { ROWS = 16 };
    const int k = b->config.num_experts_per_tok, d = b->config.hidden_size;
    const bool codes = tr_record_act(b->ops, d) == TR_CODES;
    tr_operand expert, weight, x, scale, record;
    int32_t *n;
    if (k < 1) return TR_OK;
    tr_status st = tr_bench_zeros(b, ROWS * (size_t)k * 4, &expert, err);
    if (st == TR_OK) st = tr_bench_floats(b, ROWS * (size_t)k, 1, &weight, err);
    if (st == TR_OK) st = tr_bench_floats(b, ROWS * (size_t)d, 1, &x, err);
    if (st == TR_OK) st = tr_bench_floats(b, ROWS * (size_t)d / 128 + 1, 1, &scale, err);
    if (st == TR_OK)
        st = tr_bench_zeros(b, ROWS * tr_dispatch_bytes(d, k, tr_record_act(b->ops, d)), &record,
                            err);
    if (st == TR_OK) st = tr_bench_word(b, ROWS, &n, err);
    if (st != TR_OK) return st;
    const struct tr_moe_offer_args args = {.n = n,
                                           .n_rows = ROWS,
                                           .k = k,
                                           .d = d,
                                           .expert = expert.d,
                                           .weight = weight.d,
                                           .x = x.d,
                                           .q = codes ? x.d : NULL,
                                           .q_scale = codes ? scale.d : NULL,
                                           .ld_scale = ROWS,
                                           .record = record.d};
    tr_line line =
        TR_LINE(moe_offer, tr_work_moe_dispatch(ROWS, d, k, tr_record_act(b->ops, d)), .warm = {x});
    snprintf(line.shape, sizeof line.shape, "d %d rows %d", d, ROWS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

tr_status tr_bench_moe_add(tr_kbench *b, tr_err *err)
{
    enum { ROWS = 16, MEMBERS = 4 };
    const int d = b->config.hidden_size;
    tr_operand y, out;
    int32_t *n;
    tr_status st = tr_bench_floats(b, (size_t)MEMBERS * ROWS * (size_t)d, 1, &y, err);
    if (st == TR_OK) st = tr_bench_zeros(b, ROWS * (size_t)d * 4, &out, err);
    if (st == TR_OK) st = tr_bench_word(b, ROWS, &n, err);
    if (st != TR_OK) return st;
    const struct tr_moe_add_args args = {
        .n = n, .n_max = ROWS, .d = d, .n_members = MEMBERS, .ld = ROWS, .y = y.d, .out = out.d};
    tr_line line = TR_LINE(moe_add, tr_work_moe_add(ROWS, d, MEMBERS));
    snprintf(line.shape, sizeof line.shape, "d %d rows %d of %d", d, ROWS, MEMBERS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}

tr_status tr_bench_rows_zero(tr_kbench *b, tr_err *err)
{
    const int d = b->config.hidden_size;
    tr_operand out;
    int32_t *n;
    tr_status st = tr_bench_zeros(b, MAX_ROWS * (size_t)d * 4, &out, err);
    if (st == TR_OK) st = tr_bench_word(b, MAX_ROWS, &n, err);
    if (st != TR_OK) return st;
    const struct tr_rows_zero_args args = {.n = n, .n_max = MAX_ROWS, .d = d, .out = out.d};
    tr_line line = TR_LINE(rows_zero, tr_work_rows_zero(MAX_ROWS, d));
    snprintf(line.shape, sizeof line.shape, "d %d rows %d", d, MAX_ROWS);
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    return st;
}
