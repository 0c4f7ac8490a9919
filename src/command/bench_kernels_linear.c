/* Cases of `trireme bench kernels`: what multiplies with weights. */
#include <config.h>

#include <stdio.h>

#include "command/bench_kernels.h"

enum { SAMPLES = 16, EXPERTS_MAX = 8 /* a real-width expert takes 44 MB */ };

/* ---- linear -------------------------------------------------------------------------------------------------------- */

typedef struct linear_shape {
    const char *name;
    int n_out, n_in;
    tr_format format;
    int rows[4]; /* 0: no more */
} linear_shape;

static tr_status one_linear(tr_kbench *b, const linear_shape *s, const tr_linear *w,
                            const tr_matrix *numbers, int rows, tr_err *err)
{
    tr_operand x, y;
    int32_t *n;
    tr_errors e = {0, 0};
    tr_line line = TR_LINE(linear, tr_work_linear(rows, b->ops, w));
    double seconds = 0;
    tr_status st = tr_bench_floats(b, (size_t)rows * (size_t)s->n_in, 1, &x, err);

    if (st == TR_OK)
        st = tr_bench_zeros(b, (size_t)rows * (size_t)s->n_out * sizeof(float), &y, err);
    if (st == TR_OK) st = tr_bench_word(b, rows, &n, err);
    if (st != TR_OK) return st;
    const struct tr_linear_args args = {
        .n = n,
        .n_max = rows,
        .w = w,
        .in = {.x = x.d, .ld = (size_t)s->n_in, .n_max = rows, .d = s->n_in},
        .out = y.d,
        .ld_out = (size_t)s->n_out,
        .out_f32 = 1};
    snprintf(line.shape, sizeof line.shape, "%s %dx%d rows %d", s->name, s->n_out, s->n_in, rows);
    line.warm[0] = x;
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) st = tr_bench_fetch(b, &y, err);
    if (st == TR_OK) st = tr_bench_product(b, rows, s->n_out, s->n_in, &seconds, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < SAMPLES; i++) {
        const int r = tr_bench_pick(b, rows), o = tr_bench_pick(b, s->n_out);
        tr_errors_add(&e, (double)((float *)y.h)[(size_t)r * (size_t)s->n_out + (size_t)o],
                      tr_matrix_dot(numbers, o, (float *)x.h + (size_t)r * (size_t)s->n_in));
    }
    line.error = tr_errors_relative(&e);
    if (b->blas) line.sgemm_flops_per_s = line.work.flops / seconds;
    tr_bench_print_line(b, &line);
    return TR_OK;
}

tr_status tr_bench_linear(tr_kbench *b, tr_err *err)
{
    const tr_config *c = &b->config;
    const tr_format q = tr_bench_format(b);
    const int d = c->hidden_size, heads = c->num_attention_heads, inner = c->moe_intermediate_size;
    const linear_shape shapes[] = {
        {"q_a", c->q_lora_rank, d, q, {1, 16}},
        {"q_b",
         heads * (c->qk_nope_head_dim + c->qk_rope_head_dim),
         c->q_lora_rank,
         q,
         {1, 16, 512}},
        {"kv_a", c->kv_lora_rank + c->qk_rope_head_dim, d, q, {1, 16}},
        {"o", d, heads * c->v_head_dim, q, {1, 16}},
        {"index_q", c->index_n_heads * c->index_head_dim, c->q_lora_rank, q, {1, 16}},
        {"index_w", c->index_n_heads, d, TR_W_BF16, {1, 16}},
        {"gate", c->n_routed_experts, d, TR_W_BF16, {1, 16}},
        {"shared up", 2 * inner, d, q, {1, 16, 512}},
        {"shared down", d, inner, q, {1, 16, 512}},
        {"odd", 1000 + 37, 1000 + 111, q, {1, 7, 97}},
        {"odd bf16", 5, 257, TR_W_BF16, {1, 3}},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        tr_linear w;
        tr_matrix numbers;
        tr_status st = tr_bench_weight(b, shapes[i].format, 1, shapes[i].n_out, shapes[i].n_in, 0,
                                       &w, &numbers, err);
        for (int j = 0; j < 4 && shapes[i].rows[j] > 0 && st == TR_OK; j++)
            st = one_linear(b, &shapes[i], &w, &numbers, shapes[i].rows[j], err);
        tr_bench_case_end(b);
        if (st != TR_OK) return st;
    }
    return TR_OK;
}

/* ---- experts ------------------------------------------------------------------------------------------------------- */

/* Output `o` of one pair in fp64, from a row x and the numbers of gate_up and down. */
static void expert_row(const tr_matrix *gate_up, const float *x, double *inner, int n)
{
    for (int j = 0; j < n; j++) {
        const double gate = tr_matrix_dot(gate_up, j, x), up = tr_matrix_dot(gate_up, n + j, x);
        inner[j] = gate / (1 + exp(-gate)) * up;
    }
}

typedef struct moe_bench {
    tr_linear gate_up, down;
    tr_matrix gate_up_numbers, down_numbers;
    int n_local, k, d, inner;
} moe_bench;

static double moe_error(tr_kbench *b, const moe_bench *m, const float *x, const float *y,
                        double *inner)
{
    tr_errors e = {0, 0};
    expert_row(&m->gate_up_numbers, x, inner, m->inner);
    for (int i = 0; i < SAMPLES; i++) {
        const int o = tr_bench_pick(b, m->d);
        double want = 0;
        for (int j = 0; j < m->inner; j++)
            want += inner[j] * tr_matrix_at(&m->down_numbers, o, j);
        tr_errors_add(&e, (double)y[o], want); /* pair 0: row 0's first choice */
    }
    return tr_errors_relative(&e);
}

/* Experts share the pairs evenly. */
static tr_status one_moe(tr_kbench *b, const moe_bench *m, int rows, tr_err *err)
{
    const int pairs = rows * m->k, each = pairs / m->n_local;
    tr_operand x, y, start, pair, work, inner;
    int32_t *n;
    double up = 0, down = 0;
    const size_t workspace = b->ops->moe_workspace(rows, m->k, m->d, m->inner);
    tr_line line = TR_LINE(moe, tr_work_moe(pairs, m->n_local, b->ops, &m->gate_up, &m->down));
    tr_status st = tr_bench_floats(b, (size_t)rows * (size_t)m->d, 0.05f, &x, err);

    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)pairs * (size_t)m->d * sizeof(float), &y, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)(m->n_local + 1) * 4, &start, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)pairs * 4, &pair, err);
    if (st == TR_OK) st = tr_bench_zeros(b, workspace, &work, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)m->inner * sizeof(double), &inner, err);
    if (st == TR_OK) st = tr_bench_word(b, rows, &n, err);
    if (st != TR_OK) return st;
    for (int i = 0, at = 0; i < m->n_local; i++) /* expert i has choice j where j % n_local == i */
        for (int p = i; p < pairs || (((int32_t *)start.h)[i + 1] = at, 0); p += m->n_local)
            ((int32_t *)pair.h)[at++] = p;
    st = tr_bench_send(b, &start, err);
    if (st == TR_OK) st = tr_bench_send(b, &pair, err);
    if (st != TR_OK) return st;
    const struct tr_moe_args args = {.n = n,
                                     .n_max = rows,
                                     .k = m->k,
                                     .n_local = m->n_local,
                                     .gate_up = &m->gate_up,
                                     .down = &m->down,
                                     .in = {.x = x.d, .ld = (size_t)m->d, .n_max = rows, .d = m->d},
                                     .start = start.d,
                                     .pair = pair.d,
                                     .out = y.d,
                                     .workspace = work.d,
                                     .workspace_bytes = workspace};
    snprintf(line.shape, sizeof line.shape, "%d experts, rows %d, %d each", m->n_local, rows, each);
    line.warm[0] = x;
    st = tr_bench_time(b, &line, &args, err);
    if (st == TR_OK) st = tr_bench_fetch(b, &y, err);
    if (st == TR_OK) st = tr_bench_product(b, each, 2 * m->inner, m->d, &up, err);
    if (st == TR_OK) st = tr_bench_product(b, each, m->d, m->inner, &down, err);
    if (st != TR_OK) return st;
    line.error = moe_error(b, m, x.h, y.h, inner.h);
    if (b->blas) line.sgemm_flops_per_s = line.work.flops / m->n_local / (up + down);
    tr_bench_print_line(b, &line);
    return TR_OK;
}

tr_status tr_bench_moe(tr_kbench *b, tr_err *err)
{
    const tr_config *c = &b->config;
    moe_bench m = {
        .k = c->num_experts_per_tok, .d = c->hidden_size, .inner = c->moe_intermediate_size};
    const int rows[] = {1, 16, 64};
    tr_status st;

    if (c->n_routed_experts < 1 || m.k < 1) return TR_OK; /* a model of dense layers alone */
    m.n_local = m.k < EXPERTS_MAX ? m.k : EXPERTS_MAX;    /* so that experts divide a row's pairs */
    while (m.k % m.n_local)
        m.n_local--;
    st = tr_bench_weight(b, tr_bench_format(b), m.n_local, 2 * m.inner, m.d, 0, &m.gate_up,
                         &m.gate_up_numbers, err);
    if (st == TR_OK)
        st = tr_bench_weight(b, tr_bench_format(b), m.n_local, m.d, m.inner, 0, &m.down,
                             &m.down_numbers, err);
    for (size_t i = 0; i < sizeof rows / sizeof *rows && st == TR_OK; i++)
        st = one_moe(b, &m, rows[i], err);
    return st;
}
