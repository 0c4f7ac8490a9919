/* Cases of `trireme bench kernels`: attention and the indexer. Sequences have random caches of their own, their pages in
 * random order; contexts are twice and eight times the selection. */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command/bench_kernels.h"
#include "kernels/number.h"

enum { SAMPLES = 16 };

/* A step: `sequences` slots with `rows` rows each, the last of which is at position context - 1. */
typedef struct step {
    int sequences, rows, context, dense, n, max_pages;
    tr_rows r;
    tr_operand page_table, position, cache_row, latent, index;
    tr_kv_layer kv;
    tr_row_sums sums;
} step;

/* ---- building one --------------------------------------------------------------------------------------------------- */

static int64_t row_at(const step *s, int slot, int position)
{
    const int32_t page =
        ((int32_t *)s->page_table.h)[slot * s->max_pages + position / TR_PAGE_TOKENS];
    return (int64_t)page * TR_PAGE_TOKENS + position % TR_PAGE_TOKENS;
}

static tr_status fill_rows(tr_kbench *b, step *s, tr_err *err)
{
    const size_t n = (size_t)s->n;
    tr_operand slot, write, dense;
    tr_status st = tr_bench_zeros(b, 4 * n, &slot, err);
    if (st == TR_OK) st = tr_bench_zeros(b, 4 * n, &s->position, err);
    if (st == TR_OK) st = tr_bench_zeros(b, 8 * n, &write, err);
    if (st == TR_OK) st = tr_bench_zeros(b, n, &dense, err);
    if (st == TR_OK) st = tr_bench_word(b, s->n, &s->r.n, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < s->n; i++) {
        const int position = s->context - s->rows + i % s->rows;
        ((int32_t *)slot.h)[i] = i / s->rows;
        ((int32_t *)s->position.h)[i] = position;
        ((int64_t *)write.h)[i] = row_at(s, i / s->rows, position);
        ((uint8_t *)dense.h)[i] = (uint8_t)s->dense;
    }
    for (int i = 0; i < s->sequences; i++)
        tr_row_sums_add(&s->sums, s->context - s->rows, s->rows, s->dense, b->config.index_topk);
    s->r.n_max = s->n;
    s->r.max_context = s->context;
    s->r.max_pages = s->max_pages;
    s->r.page_table = s->page_table.d;
    s->r.slot = slot.d;
    s->r.position = s->position.d;
    s->r.begin = s->position.d; /* every key but the row's own was there before */
    s->r.write = write.d;
    s->r.dense = dense.d;
    st = tr_bench_send(b, &slot, err);
    if (st == TR_OK) st = tr_bench_send(b, &s->position, err);
    if (st == TR_OK) st = tr_bench_send(b, &write, err);
    return st == TR_OK ? tr_bench_send(b, &dense, err) : st;
}

/* One number of a record, in its format. */
static void put(tr_dtype dtype, uint8_t *at, size_t i, double x)
{
    const float f = (float)x;
    const uint16_t half = tr_f32_to_bf16(f);
    if (dtype == TR_E4M3) at[i] = tr_f32_to_e4m3(f * 16);
    if (dtype == TR_BF16) memcpy(at + 2 * i, &half, 2);
    if (dtype == TR_F32) memcpy(at + 4 * i, &f, 4);
}

/* Latents and index keys of every token, about one in size. */
static void fill_cache(tr_kbench *b, step *s)
{
    const tr_kv_layer *kv = &s->kv;
    const size_t latent = (size_t)kv->d_latent, rope = (size_t)kv->d_rope, d = (size_t)kv->d_index,
                 row_bytes = tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);
    const int fp8 = kv->dtype == TR_E4M3, plain_index = kv->dtype == TR_F32;
    const float scale = 1.0f / 16;
    for (size_t i = 0; i < (size_t)kv->n_pages * TR_PAGE_TOKENS; i++) {
        uint8_t *row = (uint8_t *)s->latent.h + i * row_bytes;
        for (size_t j = 0; j < latent; j++)
            put(kv->dtype, row, j, tr_bench_uniform(b));
        for (size_t j = 0; fp8 && j < (latent + 127) / 128; j++)
            memcpy(row + latent + 4 * j, &scale, 4);
        uint8_t *pe = fp8 ? row + latent + 4 * ((latent + 127) / 128) : row;
        for (size_t j = 0; j < rope; j++)
            put(fp8 ? TR_BF16 : kv->dtype, pe, fp8 ? j : latent + j, tr_bench_uniform(b));
        uint8_t *page = (uint8_t *)s->index.h +
                        i / TR_PAGE_TOKENS * tr_index_page_bytes(kv->dtype, kv->d_index);
        for (size_t j = 0; j < d; j++)
            put(plain_index ? TR_F32 : TR_E4M3, page, i % TR_PAGE_TOKENS * d + j,
                tr_bench_uniform(b));
        if (!plain_index) memcpy(page + TR_PAGE_TOKENS * d + 4 * (i % TR_PAGE_TOKENS), &scale, 4);
    }
}

static tr_status make_cache(tr_kbench *b, step *s, tr_err *err)
{
    const tr_config *c = &b->config;
    tr_kv_layer *kv = &s->kv;
    *kv = (tr_kv_layer){.dtype = b->options->kv_dtype,
                        .n_pages = s->sequences * s->max_pages,
                        .d_latent = c->kv_lora_rank,
                        .d_rope = c->qk_rope_head_dim,
                        .d_index = c->index_head_dim};
    tr_status st = tr_bench_zeros(b,
                                  (size_t)kv->n_pages * TR_PAGE_TOKENS *
                                      tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope),
                                  &s->latent, err);
    if (st == TR_OK)
        st = tr_bench_zeros(b, (size_t)kv->n_pages * tr_index_page_bytes(kv->dtype, kv->d_index),
                            &s->index, err);
    if (st != TR_OK) return st;
    fill_cache(b, s);
    kv->latent = s->latent.d;
    kv->index = s->index.d;
    st = tr_bench_send(b, &s->latent, err);
    return st == TR_OK ? tr_bench_send(b, &s->index, err) : st;
}

static tr_status make_step(tr_kbench *b, step *s, int sequences, int rows, int context, int dense,
                           tr_err *err)
{
    *s = (step){.sequences = sequences, .rows = rows, .context = context, .dense = dense};
    s->n = sequences * rows;
    s->max_pages = (context + TR_PAGE_TOKENS - 1) / TR_PAGE_TOKENS;
    const int n_pages = sequences * s->max_pages;
    tr_status st = tr_bench_zeros(b, 4 * (size_t)n_pages, &s->page_table, err);
    if (st != TR_OK) return st;
    int32_t *table = s->page_table.h;
    for (int i = 0; i < n_pages; i++) {
        const int j = tr_bench_pick(b, i + 1); /* a random permutation */
        table[i] = table[j];
        table[j] = i;
    }
    st = tr_bench_send(b, &s->page_table, err);
    if (st == TR_OK) st = fill_rows(b, s, err);
    return st == TR_OK ? make_cache(b, s, err) : st;
}

static tr_status rope_table(tr_kbench *b, int n, tr_operand *out, tr_err *err)
{
    const size_t d = (size_t)b->config.qk_rope_head_dim;
    tr_status st = tr_bench_zeros(b, (size_t)n * d * sizeof(float), out, err);
    if (st != TR_OK) return st;
    tr_config_rope_table(&b->config, n, out->h);
    return tr_bench_send(b, out, err);
}

static tr_status finish(tr_kbench *b, tr_line *line, const void *args, tr_operand *out, tr_err *err)
{
    tr_status st = tr_bench_time(b, line, args, err);
    return st == TR_OK && out ? tr_bench_fetch(b, out, err) : st;
}

/* The cache's own numbers, in fp64: what is attended to, and index keys. */
static void latent_of(const step *s, int64_t row, double *out)
{
    const tr_kv_layer *kv = &s->kv;
    const uint8_t *at =
        (uint8_t *)s->latent.h + (size_t)row * tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);
    const int n = kv->d_latent, fp8 = kv->dtype == TR_E4M3;
    for (int i = 0; i < n + kv->d_rope; i++) {
        uint16_t half;
        float x;
        if (kv->dtype == TR_F32) {
            memcpy(&x, at + 4 * i, 4);
        } else if (fp8 && i < n) {
            memcpy(&x, at + n + 4 * (i / 128), 4);
            x *= tr_e4m3_to_f32(at[i]);
        } else {
            memcpy(&half, fp8 ? at + n + 4 * ((n + 127) / 128) + 2 * (i - n) : at + 2 * i, 2);
            x = tr_bf16_to_f32(half);
        }
        out[i] = (double)x;
    }
}

static double index_dot(const step *s, int64_t row, const void *q, size_t at)
{
    const size_t d = (size_t)s->kv.d_index, i_row = (size_t)(row % TR_PAGE_TOKENS);
    const uint8_t *page = (uint8_t *)s->index.h +
                          (size_t)(row / TR_PAGE_TOKENS) * tr_index_page_bytes(s->kv.dtype, (int)d);
    double sum = 0;
    for (size_t i = 0; i < d; i++) {
        float k, x;
        if (s->kv.dtype == TR_F32) {
            memcpy(&k, page + 4 * (i_row * d + i), 4);
            x = ((const float *)q)[at + i];
        } else {
            k = tr_e4m3_to_f32(page[i_row * d + i]);
            x = tr_e4m3_to_f32(((const uint8_t *)q)[at + i]);
        }
        sum += (double)x * (double)k;
    }
    return s->kv.dtype == TR_F32 ? sum : sum / 16;
}

/* ---- queries and keys ----------------------------------------------------------------------------------------------- */

/* mla_query (value 0) and mla_value (value 1): a product per head. */
static tr_status one_heads(tr_kbench *b, int rows, int value, tr_err *err)
{
    const tr_config *c = &b->config;
    const int heads = c->num_attention_heads, nope = c->qk_nope_head_dim,
              rope = c->qk_rope_head_dim, latent = c->kv_lora_rank, d_v = c->v_head_dim;
    const int ld_in = value ? latent : nope + rope, ld_out = value ? d_v : latent + rope;
    const int n_out = value ? d_v : latent;
    tr_operand in, out, table;
    tr_linear w;
    tr_matrix numbers;
    step s;
    tr_errors e = {0, 0};
    tr_status st = make_step(b, &s, rows, 1, TR_PAGE_TOKENS, 0, err);
    if (st == TR_OK)
        st = tr_bench_weight(b, tr_bench_format(b), heads, n_out, value ? latent : nope, !value, &w,
                             &numbers, err);
    if (st == TR_OK) st = tr_bench_floats(b, (size_t)rows * (size_t)(heads * ld_in), 1, &in, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)rows * (size_t)(heads * ld_out) * 4, &out, err);
    if (st == TR_OK) st = rope_table(b, s.context, &table, err);
    if (st != TR_OK) return st;
    const tr_work work = tr_work_heads(rows, b->ops, &w, value ? 0 : (double)rows * heads * rope);
    tr_line line = {
        .op = value ? TR_BENCH_mla_value : TR_BENCH_mla_query, .work = work, .warm = {in}};
    const struct tr_mla_query_args query = {.rows = &s.r,
                                            .q = in.d,
                                            .n_heads = heads,
                                            .d_nope = nope,
                                            .d_rope = rope,
                                            .d_latent = latent,
                                            .rope = table.d,
                                            .w_uk_t = &w,
                                            .q_absorbed = out.d};
    const struct tr_mla_value_args out_of = {.rows = &s.r,
                                             .u = in.d,
                                             .n_heads = heads,
                                             .d_latent = latent,
                                             .d_v = d_v,
                                             .w_uv = &w,
                                             .out = out.d};
    snprintf(line.shape, sizeof line.shape, "heads %d, rows %d", heads, rows);
    st = finish(b, &line, value ? (const void *)&out_of : (const void *)&query, &out, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < SAMPLES; i++) {
        const int r = tr_bench_pick(b, rows), h = tr_bench_pick(b, heads),
                  o = tr_bench_pick(b, n_out);
        const float *x = (float *)in.h + (r * heads + h) * ld_in;
        double want = value ? tr_matrix_dot(&numbers, o, x) : 0;
        for (int j = 0; j < nope && !value; j++) /* stored [nope, latent] */
            want += (double)x[j] * tr_matrix_at(&numbers, j, o);
        tr_errors_add(&e, (double)((float *)out.h)[(r * heads + h) * ld_out + o], want);
    }
    line.error = tr_errors_relative(&e);
    tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return TR_OK;
}

tr_status tr_bench_mla_query(tr_kbench *b, tr_err *err)
{
    tr_status st = one_heads(b, 1, 0, err);
    if (st == TR_OK) st = one_heads(b, 16, 0, err);
    return st == TR_OK ? one_heads(b, 97, 0, err) : st;
}

tr_status tr_bench_mla_value(tr_kbench *b, tr_err *err)
{
    tr_status st = one_heads(b, 1, 1, err);
    if (st == TR_OK) st = one_heads(b, 16, 1, err);
    return st == TR_OK ? one_heads(b, 97, 1, err) : st;
}

static tr_status one_kv_write(tr_kbench *b, int rows, tr_err *err)
{
    const tr_config *c = &b->config;
    const size_t d_kv = (size_t)(c->kv_lora_rank + c->qk_rope_head_dim),
                 d = (size_t)c->index_head_dim;
    tr_operand kv_a, index_k, norm, k_norm, k_bias, table;
    step s;
    tr_status st = make_step(b, &s, 1, rows, rows, 0, err);
    if (st == TR_OK) st = tr_bench_floats(b, (size_t)rows * d_kv, 1, &kv_a, err);
    if (st == TR_OK) st = tr_bench_floats(b, (size_t)rows * d, 1, &index_k, err);
    if (st == TR_OK) st = tr_bench_floats(b, d_kv, 1, &norm, err);
    if (st == TR_OK) st = tr_bench_floats(b, d, 1, &k_norm, err);
    if (st == TR_OK) st = tr_bench_floats(b, d, 1, &k_bias, err);
    if (st == TR_OK) st = rope_table(b, s.context, &table, err);
    if (st != TR_OK) return st;
    tr_line line = TR_LINE(kv_write, tr_work_kv_write(rows, &s.kv, 1, 1), .warm = {kv_a, index_k});
    const struct tr_kv_write_args args = {.rows = &s.r,
                                          .kv_a = kv_a.d,
                                          .ld_kv_a = d_kv,
                                          .index_k = index_k.d,
                                          .ld_index_k = d,
                                          .norm = norm.d,
                                          .k_norm = k_norm.d,
                                          .k_bias = k_bias.d,
                                          .rope = table.d,
                                          .eps = (float)c->rms_norm_eps,
                                          .kv = s.kv};
    snprintf(line.shape, sizeof line.shape, "rows %d", rows);
    st = finish(b, &line, &args, NULL, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return st;
}

tr_status tr_bench_kv_write(tr_kbench *b, tr_err *err)
{
    tr_status st = one_kv_write(b, 1, err);
    return st == TR_OK ? one_kv_write(b, 511, err) : st;
}

static tr_status one_index_query(tr_kbench *b, int rows, tr_err *err)
{
    const tr_config *c = &b->config;
    const size_t n = (size_t)rows * (size_t)(c->index_n_heads * c->index_head_dim);
    tr_operand q, w, out, table;
    step s;
    tr_status st = make_step(b, &s, 1, rows, rows, 0, err);
    if (st == TR_OK) st = tr_bench_floats(b, n, 1, &q, err);
    if (st == TR_OK) st = tr_bench_floats(b, (size_t)(rows * c->index_n_heads), 1, &w, err);
    if (st == TR_OK) st = tr_bench_zeros(b, 4 * n, &out, err);
    if (st == TR_OK) st = rope_table(b, s.context, &table, err);
    if (st != TR_OK) return st;
    tr_line line = TR_LINE(index_query,
                           tr_work_index_query(rows, c->index_n_heads, c->index_head_dim,
                                               c->qk_rope_head_dim, s.kv.dtype),
                           .warm = {q});
    const struct tr_index_query_args args = {.rows = &s.r,
                                             .q = q.d,
                                             .w = w.d,
                                             .n_heads = c->index_n_heads,
                                             .d_index = c->index_head_dim,
                                             .d_rope = c->qk_rope_head_dim,
                                             .cache_dtype = s.kv.dtype,
                                             .rope = table.d,
                                             .out = out.d};
    snprintf(line.shape, sizeof line.shape, "heads %d, rows %d", c->index_n_heads, rows);
    st = finish(b, &line, &args, NULL, err);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return st;
}

tr_status tr_bench_index_query(tr_kbench *b, tr_err *err)
{
    tr_status st = one_index_query(b, 1, err);
    return st == TR_OK ? one_index_query(b, 255, err) : st;
}

/* ---- selection -------------------------------------------------------------------------------------------------------- */

static tr_status one_index_logits(tr_kbench *b, int sequences, int rows, int context, tr_err *err)
{
    const int heads = b->config.index_n_heads, d = b->config.index_head_dim;
    tr_operand q, w, score;
    step s;
    tr_errors e = {0, 0};
    tr_status st = make_step(b, &s, sequences, rows, context, 0, err);
    const size_t n = (size_t)s.n * (size_t)heads;
    if (st == TR_OK) st = tr_bench_zeros(b, n * (size_t)d * 4, &q, err);
    if (st == TR_OK) st = tr_bench_floats(b, n, 1, &w, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)s.n * (size_t)context * 4, &score, err);
    if (st != TR_OK) return st;
    for (size_t i = 0; i < n * (size_t)d; i++)
        put(s.kv.dtype == TR_F32 ? TR_F32 : TR_E4M3, q.h, i, tr_bench_uniform(b));
    st = tr_bench_send(b, &q, err);
    if (st != TR_OK) return st;
    tr_line line = TR_LINE(
        index_logits, tr_work_index_logits(s.sums.scored_pairs, s.sums.scored_keys, heads, &s.kv));
    line.warm[0] = (tr_operand){.d = q.d, .bytes = n * (size_t)d};
    const struct tr_index_logits_args args = {.rows = &s.r,
                                              .q = q.d,
                                              .w = w.d,
                                              .n_heads = heads,
                                              .k = b->config.index_topk,
                                              .kv = s.kv,
                                              .n_row = s.n,
                                              .score = score.d,
                                              .ld = (size_t)context};
    snprintf(line.shape, sizeof line.shape, "%d x %d rows, context %d", sequences, rows, context);
    st = finish(b, &line, &args, &score, err);
    for (int i = 0; i < SAMPLES && st == TR_OK; i++) {
        const int r = tr_bench_pick(b, s.n),
                  key = tr_bench_pick(b, ((int32_t *)s.position.h)[r] + 1);
        double want = 0;
        for (int h = 0; h < heads; h++)
            want += (double)((float *)w.h)[r * heads + h] *
                    fmax(0, index_dot(&s, row_at(&s, r / rows, key), q.h,
                                      (size_t)(r * heads + h) * (size_t)d));
        tr_errors_add(&e, (double)((float *)score.h)[(size_t)r * (size_t)context + (size_t)key],
                      want);
    }
    line.error = tr_errors_relative(&e);
    if (st == TR_OK) tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return st;
}

tr_status tr_bench_index_logits(tr_kbench *b, tr_err *err)
{
    const int k = b->config.index_topk;
    tr_status st = one_index_logits(b, 1, 1, 8 * k, err);
    if (st == TR_OK) st = one_index_logits(b, 16, 1, 2 * k, err);
    if (st == TR_OK) st = one_index_logits(b, 1, 64, 8 * k, err);
    return st == TR_OK ? one_index_logits(b, 3, 1, 2 * k + 37, err) : st;
}

/* Selected scores must be the best: 0, or the share of the selection that is not. */
static double topk_error(const float *score, int n, int k, const int32_t *position)
{
    float worst = INFINITY;
    int better = 0, selected_better = 0;
    for (int i = 0; i < k; i++) {
        if (position[i] < 0 || position[i] >= n || (i > 0 && position[i] <= position[i - 1]))
            return 1;
        worst = fminf(worst, score[position[i]]);
    }
    for (int i = 0; i < n; i++)
        better += score[i] > worst;
    for (int i = 0; i < k; i++)
        selected_better += score[position[i]] > worst;
    return (double)(better - selected_better) / k;
}

static tr_status one_topk(tr_kbench *b, int sequences, int rows, int context, tr_err *err)
{
    const int k = b->config.index_topk;
    tr_operand score, position, cache_row, n_selected;
    step s;
    tr_status st = make_step(b, &s, sequences, rows, context, 0, err);
    const size_t lists = (size_t)s.n * (size_t)k * 4;
    if (st == TR_OK) st = tr_bench_floats(b, (size_t)s.n * (size_t)context, 1, &score, err);
    if (st == TR_OK) st = tr_bench_zeros(b, lists, &position, err);
    if (st == TR_OK) st = tr_bench_zeros(b, lists, &cache_row, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)s.n * 4, &n_selected, err);
    if (st != TR_OK) return st;
    tr_line line = TR_LINE(topk, tr_work_topk(s.n, s.sums.scored_pairs, k), .warm = {score});
    const struct tr_topk_args args = {.rows = &s.r,
                                      .score = score.d,
                                      .ld = (size_t)context,
                                      .k = k,
                                      .n_row = s.n,
                                      .position = position.d,
                                      .cache_row = cache_row.d,
                                      .n_selected = n_selected.d};
    snprintf(line.shape, sizeof line.shape, "%d of %d, rows %d", k, context, s.n);
    st = finish(b, &line, &args, &position, err);
    if (st != TR_OK) return st;
    line.error = topk_error(score.h, ((int32_t *)s.position.h)[0] + 1, k, position.h);
    tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return TR_OK;
}

tr_status tr_bench_topk(tr_kbench *b, tr_err *err)
{
    const int k = b->config.index_topk;
    tr_status st = one_topk(b, 1, 1, 8 * k, err);
    if (st == TR_OK) st = one_topk(b, 16, 1, 2 * k, err);
    if (st == TR_OK) st = one_topk(b, 1, 64, 8 * k, err);
    return st == TR_OK ? one_topk(b, 3, 1, 2 * k + 37, err) : st;
}

/* ---- attention ---------------------------------------------------------------------------------------------------------- */

/* Softmax over n keys of scores p, in place; returns nothing for n 0. */
static void softmax(double *p, int n)
{
    double max = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        max = fmax(max, p[i]);
    for (int i = 0; i < n; i++)
        sum += p[i] = exp(p[i] - max);
    for (int i = 0; i < n; i++)
        p[i] /= sum;
}

static double sparse_error(const step *s, const float *q, const float *out, int k, float scale,
                           double *p, double *c)
{
    const int d_latent = s->kv.d_latent, d = d_latent + s->kv.d_rope;
    const int32_t *list = s->cache_row.h;
    double want[1024] = {0};
    tr_errors e = {0, 0};
    for (int i = 0; i < k; i++) {
        latent_of(s, list[i], c);
        p[i] = 0;
        for (int j = 0; j < d; j++)
            p[i] += (double)q[j] * c[j] * (double)scale;
    }
    softmax(p, k);
    for (int i = 0; i < k; i++) {
        latent_of(s, list[i], c);
        for (int j = 0; j < d_latent; j++)
            want[j] += p[i] * c[j];
    }
    for (int j = 0; j < d_latent; j++)
        tr_errors_add(&e, (double)out[j], want[j]);
    return tr_errors_relative(&e);
}

/* Every row's list: k different positions, evenly spread with a random start, ascending. */
static void pick_lists(tr_kbench *b, step *s, int k)
{
    for (int r = 0; r < s->n; r++) {
        const int n = ((int32_t *)s->position.h)[r] + 1;
        const int shift = tr_bench_pick(b, n / k);
        for (int i = 0; i < k; i++)
            ((int32_t *)s->cache_row.h)[r * k + i] =
                (int32_t)row_at(s, r / s->rows, (int)((int64_t)i * n / k) + shift * (i < k - 1));
    }
}

static tr_status one_sparse_mla(tr_kbench *b, int sequences, int rows, int context, tr_err *err)
{
    const tr_config *c = &b->config;
    const int heads = c->num_attention_heads, k = c->index_topk, d_latent = c->kv_lora_rank,
              d_key = d_latent + c->qk_rope_head_dim;
    const float scale = (float)tr_config_attention_scale(c);
    tr_operand q, out, work, p, key;
    step s;
    tr_status st = make_step(b, &s, sequences, rows, context, 0, err);
    const size_t n = (size_t)s.n * (size_t)heads,
                 workspace = b->ops->sparse_mla_workspace(s.n, heads, d_latent);
    if (st == TR_OK) st = tr_bench_floats(b, n * (size_t)d_key, 1, &q, err);
    if (st == TR_OK) st = tr_bench_zeros(b, n * (size_t)d_latent * 4, &out, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)s.n * (size_t)k * 4, &s.cache_row, err);
    if (st == TR_OK) st = tr_bench_zeros(b, workspace, &work, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)k * sizeof(double), &p, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)d_key * sizeof(double), &key, err);
    if (st != TR_OK) return st;
    pick_lists(b, &s, k);
    st = tr_bench_send(b, &s.cache_row, err);
    if (st != TR_OK) return st;
    tr_line line =
        TR_LINE(sparse_mla, tr_work_sparse_mla(s.sums.selected, heads, &s.kv), .warm = {q});
    const struct tr_sparse_mla_args args = {.rows = &s.r,
                                            .q = q.d,
                                            .n_heads = heads,
                                            .scale = scale,
                                            .cache_row = s.cache_row.d,
                                            .k = k,
                                            .kv = s.kv,
                                            .out = out.d,
                                            .workspace = work.d,
                                            .workspace_bytes = workspace};
    snprintf(line.shape, sizeof line.shape, "%d x %d rows, context %d", sequences, rows, context);
    st = finish(b, &line, &args, &out, err);
    if (st != TR_OK) return st;
    if (d_latent <= 1024)
        line.error = sparse_error(&s, q.h, out.h, k, scale, p.h, key.h); /* row 0, head 0 */
    tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return TR_OK;
}

tr_status tr_bench_sparse_mla(tr_kbench *b, tr_err *err)
{
    const int k = b->config.index_topk;
    tr_status st = one_sparse_mla(b, 1, 1, k + 1, err);
    if (st == TR_OK) st = one_sparse_mla(b, 1, 1, 8 * k, err);
    if (st == TR_OK) st = one_sparse_mla(b, 16, 1, 2 * k, err);
    return st == TR_OK ? one_sparse_mla(b, 1, 33, 2 * k + 37, err) : st;
}

/* The last row, head 0: its keys' k_nope and v made from the latents in fp64. */
static double dense_error(const tr_kbench *b, const step *s, const float *q, const float *out,
                          const tr_matrix *w_uk, const tr_matrix *w_uv, double *p, double *v)
{
    const int nope = b->config.qk_nope_head_dim, rope = b->config.qk_rope_head_dim,
              d_v = b->config.v_head_dim, d_latent = s->kv.d_latent, n = s->context;
    const double scale = (double)(float)tr_config_attention_scale(&b->config);
    double c[2048];
    float latent[2048];
    tr_errors e = {0, 0};
    for (int t = 0; t < n; t++) {
        latent_of(s, row_at(s, 0, t), c);
        for (int i = 0; i < d_latent; i++)
            latent[i] = (float)c[i];
        p[t] = 0;
        for (int o = 0; o < nope; o++)
            p[t] += (double)q[o] * tr_matrix_dot(w_uk, o, latent) * scale;
        for (int i = 0; i < rope; i++)
            p[t] += (double)q[nope + i] * c[d_latent + i] * scale;
        v[t] = tr_matrix_dot(w_uv, d_v / 2, latent); /* one column is enough */
    }
    softmax(p, n);
    double want = 0, size = 0;
    for (int t = 0; t < n; t++) {
        want += p[t] * v[t];
        size += p[t] * fabs(v[t]);
    }
    tr_errors_add(&e, (double)out[d_v / 2], want);
    return e.worst / size;
}

/* The library at the sizes of one head: k_nope and v of all keys, scores, values; no softmax, no causal saving. */
static tr_status dense_library(tr_kbench *b, const step *s, double *flops_per_s, tr_err *err)
{
    const tr_config *c = &b->config;
    const int d_kv = c->qk_nope_head_dim + c->v_head_dim,
              d_q = c->qk_nope_head_dim + c->qk_rope_head_dim, d_v = c->v_head_dim;
    double seconds = 0;
    tr_status st = tr_bench_product(b, s->context, d_kv, c->kv_lora_rank, &seconds, err);
    if (st == TR_OK) st = tr_bench_product(b, s->rows, s->context, d_q, &seconds, err);
    if (st == TR_OK) st = tr_bench_product(b, s->rows, d_v, s->context, &seconds, err);
    if (b->blas)
        *flops_per_s = 2.0 * s->context *
                       ((double)d_kv * c->kv_lora_rank + (double)s->rows * (d_q + d_v)) / seconds;
    return st;
}

static tr_status one_dense_mha(tr_kbench *b, int rows, int context, tr_err *err)
{
    const tr_config *c = &b->config;
    const int heads = c->num_attention_heads, nope = c->qk_nope_head_dim,
              rope = c->qk_rope_head_dim, latent = c->kv_lora_rank, d_v = c->v_head_dim;
    tr_operand q, out, p, v;
    tr_linear w_uk, w_uv;
    tr_matrix uk, uv;
    step s;
    tr_status st = make_step(b, &s, 1, rows, context, 1, err);
    if (st == TR_OK)
        st = tr_bench_weight(b, tr_bench_format(b), heads, nope, latent, 0, &w_uk, &uk, err);
    if (st == TR_OK)
        st = tr_bench_weight(b, tr_bench_format(b), heads, d_v, latent, 0, &w_uv, &uv, err);
    if (st == TR_OK)
        st = tr_bench_floats(b, (size_t)rows * (size_t)(heads * (nope + rope)), 0.05f, &q, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)rows * (size_t)(heads * d_v) * 4, &out, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)context * sizeof(double), &p, err);
    if (st == TR_OK) st = tr_bench_zeros(b, (size_t)context * sizeof(double), &v, err);
    if (st != TR_OK) return st;
    tr_line line = TR_LINE(
        dense_mha,
        tr_work_dense_mha(s.sums.dense_pairs, s.sums.dense_keys, b->ops, &w_uk, &w_uv, rope, &s.kv),
        .warm = {q});
    const struct tr_dense_mha_args args = {.rows = &s.r,
                                           .q = q.d,
                                           .n_heads = heads,
                                           .d_nope = nope,
                                           .d_rope = rope,
                                           .d_v = d_v,
                                           .scale = (float)tr_config_attention_scale(c),
                                           .w_uk = &w_uk,
                                           .w_uv = &w_uv,
                                           .kv = s.kv,
                                           .out = out.d};
    snprintf(line.shape, sizeof line.shape, "rows %d, context %d", rows, context);
    st = finish(b, &line, &args, &out, err);
    if (st == TR_OK) st = dense_library(b, &s, &line.sgemm_flops_per_s, err);
    if (st != TR_OK) return st;
    if (latent + rope <= 2048)
        line.error = dense_error(
            b, &s, (float *)q.h + (size_t)(rows - 1) * (size_t)(heads * (nope + rope)),
            (float *)out.h + (size_t)(rows - 1) * (size_t)(heads * d_v), &uk, &uv, p.h, v.h);
    tr_bench_print_line(b, &line);
    tr_bench_case_end(b);
    return TR_OK;
}

tr_status tr_bench_dense_mha(tr_kbench *b, tr_err *err)
{
    const int k = b->config.index_topk;
    tr_status st = one_dense_mha(b, k < 512 ? k : 512, k < 512 ? k : 512, err);
    if (st == TR_OK && k > 512)
        st = one_dense_mha(b, k < 2048 ? k : 2048, k < 2048 ? k : 2048, err);
    return st == TR_OK ? one_dense_mha(b, 37, k < 500 ? k : 500, err) : st;
}
