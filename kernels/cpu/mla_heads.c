/* The projections of single heads around absorbed attention (model.md 3.4): the query's way into the latent space, and
 * the way back out. Weight-bound at few rows: 128 heads' matrices are read for every step. */
#include <config.h>

#include <string.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/cpu/rope_priv.h"

/* A product per head: g's y = W[h] x for every h, x and y of head h x_step and y_step floats further. g.i_mat is not
 * used. */
typedef struct heads_work {
    const tr_device *d;
    tr_gemm g;
    int n_heads;
    size_t x_step, y_step;
} heads_work;

/* Member i of n: a share of the panels of all heads. */
static void heads_part(const heads_work *w, int i, int n)
{
    const int n_panels = tr_n_panels(w->g.w->n_out);
    const int64_t n_all = (int64_t)n_panels * w->n_heads, end = n_all * (i + 1) / n;

    for (int64_t u = n_all * i / n; u < end;) {
        int h = (int)(u / n_panels), p = (int)(u % n_panels);
        int p_end = end - u < n_panels - p ? p + (int)(end - u) : n_panels;
        tr_gemm head = w->g;
        head.i_mat = h;
        head.x += (size_t)h * w->x_step;
        head.y += (size_t)h * w->y_step;
        tr_cpu_gemm_panels(w->d, &head, p, p_end);
        u += p_end - p;
    }
}

static void heads_member(void *ctx, int i, int n)
{
    heads_part(ctx, i, n);
}

static double heads_cost(const heads_work *w)
{
    return (double)w->g.n_rows * w->g.w->n_out * w->g.w->n_in * w->n_heads;
}

void tr_gemm_heads(const tr_device *d, const tr_gemm *g, int n_heads, size_t x_step, size_t y_step)
{
    heads_work w = {d, *g, n_heads, x_step, y_step};
    tr_device_run(d, heads_cost(&w), heads_member, &w);
}

/* The next run of absorbed rows from i on; 0 when there is none. */
static int next_absorbed(const tr_rows *rows, int n, int *i, int *i_end)
{
    while (*i < n && rows->dense[*i])
        ++*i;
    for (*i_end = *i; *i_end < n && !rows->dense[*i_end];)
        ++*i_end;
    return *i < n;
}

/* ---- into the latent space ---- */

typedef struct query_work {
    const tr_device *d;
    const struct tr_mla_query_args *a;
    int n;
} query_work;

/* Rope of one head of a row, and its copy to where absorbed attention wants it. */
static void query_rope(const struct tr_mla_query_args *a, int i, int h)
{
    const tr_rows *rows = a->rows;
    const int d_q = a->d_nope + a->d_rope, d_key = a->d_latent + a->d_rope;
    const size_t head = (size_t)i * (size_t)a->n_heads + (size_t)h;
    float *pe = a->q + head * (size_t)d_q + a->d_nope;

    if (!tr_row_is_pad(rows, i))
        tr_rope_interleaved(pe, a->rope + (size_t)rows->position[i] * (size_t)a->d_rope, a->d_rope);
    if (!rows->dense[i])
        memcpy(a->q_absorbed + head * (size_t)d_key + a->d_latent, pe,
               (size_t)a->d_rope * sizeof *pe);
}

/* The two halves touch different numbers of a head: no barrier between them. */
static void query_member(void *ctx, int i_member, int n_members)
{
    const query_work *w = ctx;
    const struct tr_mla_query_args *a = w->a;
    const int d_q = a->d_nope + a->d_rope, d_key = a->d_latent + a->d_rope;
    const size_t ld_q = (size_t)a->n_heads * (size_t)d_q;
    const size_t ld_key = (size_t)a->n_heads * (size_t)d_key;
    const int64_t n_all = (int64_t)w->n * a->n_heads, end = n_all * (i_member + 1) / n_members;

    for (int64_t u = n_all * i_member / n_members; u < end; u++)
        query_rope(a, (int)(u / a->n_heads), (int)(u % a->n_heads));
    for (int i = 0, i_end; next_absorbed(a->rows, w->n, &i, &i_end); i = i_end) {
        const heads_work heads = {
            .d = w->d,
            .g = {.w = a->w_uk_t,
                  .x = a->q + (size_t)i * ld_q,
                  .ldx = ld_q,
                  .y = a->q_absorbed + (size_t)i * ld_key,
                  .ldy = ld_key,
                  .n_rows = i_end - i},
            .n_heads = a->n_heads,
            .x_step = (size_t)d_q,
            .y_step = (size_t)d_key,
        };
        heads_part(&heads, i_member, n_members);
    }
}

tr_status tr_cpu_mla_query(tr_device *d, tr_lane lane, const struct tr_mla_query_args *a)
{
    query_work w = {d, a, tr_live_rows(a->rows->n, a->rows->n_max)};
    int n_absorbed = 0;

    (void)lane;
    for (int i = 0; i < w.n; i++)
        n_absorbed += !a->rows->dense[i];
    double work = 4.0 * w.n * a->n_heads * a->d_rope;
    work += (double)n_absorbed * a->n_heads * a->d_nope * a->d_latent;
    tr_device_run(d, work, query_member, &w);
    return TR_OK;
}

/* ---- and back ---- */

tr_status tr_cpu_mla_value(tr_device *d, tr_lane lane, const struct tr_mla_value_args *a)
{
    int n = tr_live_rows(a->rows->n, a->rows->n_max);
    size_t ld_u = (size_t)a->n_heads * (size_t)a->d_latent;
    size_t ld_out = (size_t)a->n_heads * (size_t)a->d_v;

    (void)lane;
    for (int i = 0, i_end; next_absorbed(a->rows, n, &i, &i_end); i = i_end) {
        tr_gemm g = {.w = a->w_uv, .n_rows = i_end - i};
        g.x = a->u + (size_t)i * ld_u;
        g.ldx = ld_u;
        g.y = a->out + (size_t)i * ld_out;
        g.ldy = ld_out;
        tr_gemm_heads(d, &g, a->n_heads, (size_t)a->d_latent, (size_t)a->d_v);
    }
    return TR_OK;
}
