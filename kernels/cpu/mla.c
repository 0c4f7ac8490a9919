/* Multi-head latent attention in its absorbed form (model.md 3.4) over the selected cache rows. The query's way into the
 * latent space and the way back out: mla_heads.c. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"

enum {
    KEYS_STEP = 16,     /* keys that stay in L1 expanded; a multiple of 16 */
    HEADS_MAX = 128,    /* heads of one task: bounds its state on the stack */
    PREFETCH_KEYS = 16, /* rows lie anywhere: those so far ahead in the list are asked for */
};

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
