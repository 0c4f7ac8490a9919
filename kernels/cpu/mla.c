/* Multi-head latent attention in its absorbed form (model.md 3.4) over the selected cache rows. The query's way into the
 * latent space and the way back out: mla_heads.c. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"

enum {
    HEADS_TILES = 8, /* heads of a rank from which on matrix tiles pay, where there are any */
    HEADS_STEP =
        24, /* that take in a block of values together: six at a time are what the loops take */
    HEADS_TURN = 32,    /* for so many of a rank it pays to turn a block of keys on its side */
    KEYS_STEP = 16,     /* where not, keys that stay in L1 expanded; a multiple of 16 */
    PREFETCH_KEYS = 16, /* and rows so far ahead in the list are asked for */
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
    float max[TR_HEADS_MAX], sum[TR_HEADS_MAX];
    float p[HEADS_TURN * TR_KEY_BLOCK] __attribute__((aligned(64)));
    float keys[TR_KEY_BLOCK * TR_D_KEY_MAX] __attribute__((aligned(64)));
    float turned[TR_KEY_BLOCK * TR_D_KEY_MAX] __attribute__((aligned(64))); /* [d_key, 64] */
} task;

/* The number of heads of a rank decides, not of a task: how rows are shared out among threads cannot show. */
static int turns(const task *t)
{
    return t->a->n_heads >= HEADS_TURN;
}

static size_t key_width(const task *t)
{
    return (size_t)t->a->kv.d_latent + (size_t)t->a->kv.d_rope;
}

/* Cache rows of the list from *at on, until there are n_max keys or the list ends; entries that name no row are passed
 * over. */
static void gather_keys(task *t, const int32_t *list, int *at, int n_max)
{
    for (; *at < t->a->k && t->n_keys < n_max; ++*at) {
        const int row = tr_selected_row(t->a, list, *at);
        if (!turns(t)) tr_ask_for_rows(t->a, list, *at + PREFETCH_KEYS, 1);
        if (row >= 0)
            tr_latent_read(t->d, &t->a->kv, row, t->keys + (size_t)t->n_keys++ * key_width(t));
    }
}

/* The next block of keys, expanded; turned, or with the products of all heads. */
static int next_block(task *t, const int32_t *list, int *at)
{
    const struct tr_attention_kernels *k = tr_attention_of(t->d);
    const size_t d_key = key_width(t);
    const int step = turns(t) ? TR_KEY_BLOCK : KEYS_STEP;

    t->n_keys = 0;
    for (int n = 0; n < TR_KEY_BLOCK; n += step) {
        gather_keys(t, list, at, n + step);
        if (t->n_keys <= n) break;
        tr_tile key = {t->keys + (size_t)n * d_key, d_key, t->n_keys - n};
        tr_tile q = {t->a->q + t->head * d_key, d_key, t->n_heads};
        if (turns(t))
            k->turn(t->turned, key, (int)d_key);
        else /* a few keys at a time meet the queries before they leave L1 */
            k->dots(t->p + n, q, key, (int)d_key);
    }
    return t->n_keys > 0;
}

/* Up to HEADS_STEP heads from h on take in the block. */
static void heads_step(task *t, int h, int n_heads)
{
    const struct tr_attention_kernels *k = tr_attention_of(t->d);
    const size_t d_latent = (size_t)t->a->kv.d_latent, d_key = key_width(t);
    float *p = turns(t) ? t->p : t->p + h * TR_KEY_BLOCK, keep[HEADS_STEP];
    int n_keys[HEADS_STEP];
    tr_tile q = {t->a->q + (t->head + h) * d_key, d_key, n_heads};

    if (turns(t)) k->scores(p, q, t->turned, (int)d_key);
    for (int i = 0; i < n_heads; i++) {
        keep[i] = tr_softmax_step(t->d, p + i * TR_KEY_BLOCK, t->n_keys, t->a->scale,
                                  t->max + h + i, t->sum + h + i);
        n_keys[i] = t->n_keys;
    }
    k->accumulate(t->a->out + (t->head + h) * d_latent, d_latent, p, keep, n_keys, n_heads, t->keys,
                  d_key, (int)d_latent);
}

/* All heads of the task take in the block, while the rows of the next one, from `at` on, come nearer. */
static void block_step(task *t, const int32_t *list, int at)
{
    const int n_steps = (t->n_heads + HEADS_STEP - 1) / HEADS_STEP;

    for (int i = 0, h = 0; i < n_steps; i++, h += HEADS_STEP) {
        const int from = tr_team_part(TR_KEY_BLOCK, i, n_steps);
        if (turns(t))
            tr_ask_for_rows(t->a, list, at + from,
                            tr_team_part(TR_KEY_BLOCK, i + 1, n_steps) - from);
        heads_step(t, h, t->n_heads - h < HEADS_STEP ? t->n_heads - h : HEADS_STEP);
    }
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
    if (turns(&t)) tr_ask_for_rows(a, list, 0, TR_KEY_BLOCK);
    while (next_block(&t, list, &at))
        block_step(&t, list, at);
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

typedef struct mla_work {
    const tr_device *d;
    const struct tr_sparse_mla_args *a;
    int n_rows, n_groups, width; /* a task: a row and one of n_groups groups of heads */
} mla_work;

/* Like turns(): the rank's heads decide, and the cache's format, never how rows are shared out. */
static int on_tiles(const mla_work *w)
{
    return w->d->k.latent_attention && w->a->n_heads >= HEADS_TILES && w->a->kv.dtype != TR_F32;
}

static void mla_member(void *ctx, int i_member, int n_members)
{
    const mla_work *w = ctx;
    const int n_heads = w->a->n_heads;
    void (*const attention)(const tr_device *, const struct tr_sparse_mla_args *, int, int, int) =
        on_tiles(w) ? w->d->k.latent_attention : row_attention;

    (void)i_member, (void)n_members;
    for (int t; (t = tr_team_next(w->d->team)) < w->n_rows * w->n_groups;) {
        int i = t / w->n_groups, h = t % w->n_groups * w->width;
        if (!w->a->rows->dense[i])
            attention(w->d, w->a, i, h, n_heads - h < w->width ? n_heads : h + w->width);
    }
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
    if (width > TR_HEADS_MAX) width = TR_HEADS_MAX;
    n_groups = (a->n_heads + width - 1) / width;
    double work = (double)n_absorbed * a->k * a->n_heads * a->kv.d_latent;
    mla_work w = {d, a, n, n_groups, width};
    tr_device_run(d, work, mla_member, &w);
    return TR_OK;
}
