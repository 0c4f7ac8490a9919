/* Multi-head latent attention in its absorbed form (model.md 3.4): the query's way into the latent space, attention over
 * the selected cache rows, and the way back out. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/cpu/rope_priv.h"

enum {
    KEYS_STEP = 16,     /* keys that stay in L1 expanded; a multiple of 16 */
    HEADS_MAX = 128,    /* heads of one task: bounds its state on the stack */
    PREFETCH_KEYS = 16, /* rows lie anywhere: those so far ahead in the list are asked for */
};

void tr_gemm_heads(const tr_device *d, const tr_gemm *g, int n_heads, size_t x_step, size_t y_step)
{
    int n_panels = tr_n_panels(g->w->n_out), n_threads = d->n_threads;
    int64_t n_all = (int64_t)n_panels * n_heads;
    double work = (double)g->n_rows * g->w->n_out * g->w->n_in * n_heads;

#pragma omp parallel for num_threads(tr_threads_for(d, work)) schedule(static)
    for (int t = 0; t < n_threads; t++) {
        int64_t end = n_all * (t + 1) / n_threads;
        for (int64_t u = n_all * t / n_threads; u < end;) {
            int h = (int)(u / n_panels), p = (int)(u % n_panels);
            int p_end = end - u < n_panels - p ? p + (int)(end - u) : n_panels;
            tr_gemm head = *g;
            head.i_mat = h;
            head.x += (size_t)h * x_step;
            head.y += (size_t)h * y_step;
            d->k.gemm(&head, p, p_end);
            u += p_end - p;
        }
    }
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

tr_status tr_cpu_mla_query(tr_device *d, tr_lane lane, const struct tr_mla_query_args *a)
{
    const tr_rows *rows = a->rows;
    int n = tr_live_rows(rows->n, rows->n_max), d_q = a->d_nope + a->d_rope,
        d_key = a->d_latent + a->d_rope;
    size_t ld_q = (size_t)a->n_heads * d_q, ld_key = (size_t)a->n_heads * d_key;
    double work = 4.0 * n * a->n_heads * a->d_rope;

    (void)lane;
#pragma omp parallel for num_threads(tr_threads_for(d, work)) schedule(static)
    for (int i = 0; i < n; i++)
        for (int h = 0; h < a->n_heads; h++) {
            float *pe = a->q + (size_t)i * ld_q + (size_t)h * d_q + a->d_nope;
            if (!tr_row_is_pad(rows, i))
                tr_rope_interleaved(pe, a->rope + (size_t)rows->position[i] * a->d_rope, a->d_rope);
            if (!rows->dense[i])
                memcpy(a->q_absorbed + (size_t)i * ld_key + (size_t)h * d_key + a->d_latent, pe,
                       (size_t)a->d_rope * sizeof *pe);
        }
    for (int i = 0, i_end; next_absorbed(rows, n, &i, &i_end); i = i_end) {
        tr_gemm g = {.w = a->w_uk_t, .n_rows = i_end - i};
        g.x = a->q + (size_t)i * ld_q;
        g.ldx = ld_q;
        g.y = a->q_absorbed + (size_t)i * ld_key;
        g.ldy = ld_key;
        tr_gemm_heads(d, &g, a->n_heads, (size_t)d_q, (size_t)d_key);
    }
    return TR_OK;
}

tr_status tr_cpu_mla_value(tr_device *d, tr_lane lane, const struct tr_mla_value_args *a)
{
    int n = tr_live_rows(a->rows->n, a->rows->n_max);
    size_t ld_u = (size_t)a->n_heads * a->d_latent, ld_out = (size_t)a->n_heads * a->d_v;

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

float tr_softmax_step(const tr_device *d, float *p, int n, float scale, float *max, float *sum)
{
    const struct tr_attention_kernels *k = tr_attention_of(d);
    float block_max = k->scale_max(p, scale, n), old = *max, keep = 1.0f;

    if (block_max > old) *max = block_max;
    if (*max == -INFINITY) { /* nothing but -inf so far: no weight anywhere */
        for (int s = 0; s < n; s++)
            p[s] = p[s] == -INFINITY ? 0.0f : p[s]; /* a NaN stays */
        *sum += k->sum(p, n);
        return 0.0f;
    }
    d->k.exp_sub(p, *max, n);
    if (old == -INFINITY)
        keep = 0.0f;
    else if (*max > old) {
        keep = old;
        d->k.exp_sub(&keep, *max, 1);
    }
    *sum = *sum * keep + k->sum(p, n);
    return keep;
}

/* A task: heads [h_begin, h_end) of a row, and what they have seen so far. `out` is the accumulator. */
typedef struct task {
    const tr_device *d;
    const struct tr_sparse_mla_args *a;
    size_t head; /* the first head, counted over all rows */
    int n_heads, n_keys;
    float max[HEADS_MAX], sum[HEADS_MAX];
    float p[HEADS_MAX * TR_KEY_BLOCK] __attribute__((aligned(64)));
    float keys[TR_KEY_BLOCK * TR_D_KEY_MAX] __attribute__((aligned(64)));
} task;

/* Cache rows of the list from *at on, until there are n_max keys or the list ends; entries that name no row are passed
 * over. */
static void gather_keys(task *t, const int32_t *list, int *at, int n_max)
{
    const struct tr_sparse_mla_args *a = t->a;
    size_t d_key = (size_t)a->kv.d_latent + (size_t)a->kv.d_rope;
    int64_t n_rows = (int64_t)a->kv.n_pages * TR_PAGE_TOKENS;

    for (; *at < a->k && t->n_keys < n_max; ++*at) {
        int ahead = *at + PREFETCH_KEYS;
        if (ahead < a->k && list[ahead] >= 0 && list[ahead] < n_rows)
            tr_latent_prefetch(&a->kv, list[ahead]);
        if (list[*at] >= 0 && list[*at] < n_rows)
            tr_latent_read(t->d, &a->kv, list[*at], t->keys + (size_t)t->n_keys++ * d_key);
    }
}

/* The next block of keys, expanded a few at a time: those meet the queries before they leave L1. */
static int next_block(task *t, const int32_t *list, int *at)
{
    size_t d_key = (size_t)t->a->kv.d_latent + (size_t)t->a->kv.d_rope;

    t->n_keys = 0;
    for (int n = 0; n < TR_KEY_BLOCK; n += KEYS_STEP) {
        gather_keys(t, list, at, n + KEYS_STEP);
        if (t->n_keys <= n) break;
        tr_tile q = {t->a->q + t->head * d_key, d_key, t->n_heads};
        tr_tile key = {t->keys + (size_t)n * d_key, d_key, t->n_keys - n};
        tr_attention_of(t->d)->dots(t->p + n, q, key, (int)d_key);
    }
    return t->n_keys > 0;
}

/* Up to TR_ROW_BLOCK heads from h on take in the values of the block. */
static void heads_step(task *t, int h, int n_heads)
{
    size_t d_latent = (size_t)t->a->kv.d_latent, d_key = d_latent + (size_t)t->a->kv.d_rope;
    float *p = t->p + h * TR_KEY_BLOCK, keep[TR_ROW_BLOCK];
    int n_keys[TR_ROW_BLOCK];

    for (int i = 0; i < n_heads; i++) {
        keep[i] = tr_softmax_step(t->d, p + i * TR_KEY_BLOCK, t->n_keys, t->a->scale,
                                  t->max + h + i, t->sum + h + i);
        n_keys[i] = t->n_keys;
    }
    tr_attention_of(t->d)->accumulate(t->a->out + (t->head + h) * d_latent, d_latent, p, keep,
                                      n_keys, n_heads, t->keys, d_key, (int)d_latent);
}

/* Heads [h_begin, h_end) of row i. */
static void row_attention(const tr_device *d, const struct tr_sparse_mla_args *a, int i,
                          int h_begin, int h_end)
{
    const int32_t *list = a->cache_row + (size_t)i * a->k;
    int at = 0, d_latent = a->kv.d_latent;
    TR_SCRATCH task t;

    t.d = d;
    t.a = a;
    t.head = (size_t)i * a->n_heads + h_begin;
    t.n_heads = h_end - h_begin;
    for (int h = 0; h < t.n_heads; h++) {
        t.max[h] = -INFINITY;
        t.sum[h] = 0.0f;
    }
    while (next_block(&t, list, &at))
        for (int h = 0; h < t.n_heads; h += TR_ROW_BLOCK)
            heads_step(&t, h, t.n_heads - h < TR_ROW_BLOCK ? t.n_heads - h : TR_ROW_BLOCK);
    for (int h = 0; h < t.n_heads; h++) {
        float factor = 1.0f / t.sum[h], *out = a->out + (t.head + h) * d_latent;
        if (t.sum[h] == 0.0f) /* nothing selected: out was never written */
            memset(out, 0, (size_t)d_latent * sizeof *out);
        else {
#pragma omp simd
            for (int j = 0; j < d_latent; j++)
                out[j] *= factor;
        }
        if (a->lse) a->lse[t.head + h] = t.max[h] + logf(t.sum[h]);
    }
}

/* The gathered block of keys, 64 x (d_latent + d_rope) fp32, is on the threads' stacks: nothing is needed from outside,
 * but an allocation of 0 bytes would be hard to tell from a failed one. */
size_t tr_cpu_sparse_mla_workspace(int n_max, int n_heads, int d_latent)
{
    (void)n_max, (void)n_heads, (void)d_latent;
    return 64;
}

tr_status tr_cpu_sparse_mla(tr_device *d, tr_lane lane, const struct tr_sparse_mla_args *a)
{
    int n = tr_live_rows(a->rows->n, a->rows->n_max), n_absorbed = 0;
    tr_status st = tr_attention_check_kv(d, "sparse_mla", &a->kv);

    (void)lane;
    if (st == TR_OK) st = tr_attention_check_wait(d, "sparse_mla", &a->latents);
    if (st != TR_OK) return st;
    for (int i = 0; i < n; i++)
        n_absorbed += !a->rows->dense[i];
    if (n_absorbed == 0) return TR_OK;

    /* Fewer rows than threads: groups of heads. Each head's numbers are its own, so the split cannot show. */
    int n_groups = (d->n_threads + n_absorbed - 1) / n_absorbed;
    int width = (a->n_heads + n_groups - 1) / n_groups;
    if (width > HEADS_MAX) width = HEADS_MAX;
    n_groups = (a->n_heads + width - 1) / width;
    double work = (double)n_absorbed * a->k * a->n_heads * a->kv.d_latent;
#pragma omp parallel for num_threads(tr_threads_for(d, work)) schedule(dynamic, 1)
    for (int64_t t = 0; t < (int64_t)n * n_groups; t++) {
        int i = (int)(t / n_groups), h = (int)(t % n_groups) * width;
        if (!a->rows->dense[i])
            row_attention(d, a, i, h, a->n_heads - h < width ? a->n_heads : h + width);
    }
    return TR_OK;
}
