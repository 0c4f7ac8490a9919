/* Inside of the attention operations: the inner loops that exist once per instruction set, and what the operations share.
 * Included by kernels/cpu/ only (and its unit tests).
 *
 * The rule every function here keeps: an output element is made by one sequence of roundings that depends on its own
 * row and key alone, never on how many rows or keys come along in the call. Tails are lanes of zeros. So rows do not
 * see each other, nor the chunking of a prompt, nor the number of threads (architecture.md 4). */
#ifndef TR_KERNELS_CPU_ATTENTION_PRIV_H
#define TR_KERNELS_CPU_ATTENTION_PRIV_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/cpu_priv.h"
#include "kernels/limits.h"

enum {
    TR_KEY_BLOCK =
        TR_PAGE_TOKENS, /* keys of one softmax step: from position 0, or along the selected list */
    TR_HEADS_MAX = 128, /* heads of a row that one thread does at a time in absorbed attention */
    TR_ROW_BLOCK = 16,  /* query rows (heads, tokens) that meet a key block together */
    /* Bounds of the scratch on the threads' stacks: 64 keys of the first are 256 KiB. */
    TR_D_KEY_MAX = TR_CPU_D_KEY_MAX,     /* d_latent + d_rope */
    TR_D_HEAD_MAX = TR_CPU_D_HEAD_MAX,   /* d_nope + d_rope, d_v */
    TR_D_INDEX_MAX = TR_CPU_D_INDEX_MAX, /* d_index */
};

typedef struct tr_tile { /* n rows of numbers, ld apart */
    const float *x;
    size_t ld;
    int n;
} tr_tile;

/* A page of index keys, TR_KEY_BLOCK of them, as index_add wants them. With group = 4 lanes: number i of key s is at
 *     s / group * group * d + i / 4 * 4 * group + s % 4 * group + s % group / 4 * 4 + i % 4
 * d being d_index rounded up to a multiple of 4. So a vector holds 4 numbers of `lanes` keys, a query's 4 numbers
 * meet all of it, and the sums end with 4 additions side by side in a vector, whole lanes of keys at once. */
enum { TR_INDEX_TILE = TR_KEY_BLOCK * TR_D_INDEX_MAX };
/* e4m3 tiles hold 2^-8 of the keys, what the shift to fp16 leaves of them; the queries make up for it. Exact. */
static const float tr_tile_unit = 0x1p-8f;

static inline size_t tr_index_tile_at(int lanes, int d, int s, int i)
{
    int group = 4 * lanes;
    return (size_t)(s / group * group * d + i / 4 * 4 * group + s % 4 * group + s % group / 4 * 4 +
                    i % 4);
}

/* indexer.c, plain C: puts key s of d_index numbers in its place in a tile; and n e4m3 keys [n, d_index]. */
void tr_index_tile_key(float *tile, int lanes, int d_index, int s, const float *key);
void tr_index_tile_codes(float *tile, int lanes, int d_index, int n, const uint8_t *code);

/* One thread. Arrays of a key block have room for TR_KEY_BLOCK numbers per row. Any d, n >= 1. */
struct tr_attention_kernels {
    /* out[r, s] = q[r] . k[s], rows of out TR_KEY_BLOCK apart. Past k.n, up to a multiple of 16, out is undefined. */
    void (*dots)(float *out, tr_tile q, tr_tile k, int d);
    /* Many rows and one block of keys: the keys turned on their side once, out[i, s] = k[s][i] for s < k.n and 0 up to
     * TR_KEY_BLOCK, out [d, TR_KEY_BLOCK]; then p[r, s] = q[r] . k[s] for all TR_KEY_BLOCK of them, rows of p TR_KEY_BLOCK
     * apart. Sums go along d in one chain, in ascending order. */
    void (*turn)(float *out, tr_tile k, int d);
    void (*scores)(float *p, tr_tile q, const float *turned, int d);
    /* y[r] = keep[r] y[r] + sum over s < n_keys[r], ascending, of p[r, s] v[s]. keep 0: y is not read.
     * y [n_rows, ld_y], p [n_rows, TR_KEY_BLOCK], d numbers per row of y and v. */
    void (*accumulate)(float *y, size_t ld_y, const float *p, const float *keep, const int *n_keys,
                       int n_rows, const float *v, size_t ld_v, int d);
    /* x *= scale; returns the maximum. */
    float (*scale_max)(float *x, float scale, int n);
    float (*sum)(const float *x, int n);
    /* Tiles: how many keys a vector holds, at most 4; and the first n keys (and as many more as fill a group) of a page
     * of e4m3 keys [TR_KEY_BLOCK, d], d a power of two. Codes past n may be anything. */
    int tile_lanes;
    void (*index_tile)(float *tile, const uint8_t *code, int d, int n);
    /* acc[s] += sum over h of w[h] relu(q[h] . k[s]), h ascending, for the keys s in [begin, end) of a tile, and for
     * those that share a group with them. q [n_heads, d], d a multiple of 4; relu(NaN) is NaN. */
    void (*index_add)(float *acc, const float *q, const float *w, int n_heads, const float *tile,
                      int d, int begin, int end);
    /* score[s] = acc[s] * key_scale[s] (NULL: 1), -0.0 made +0.0 and NaN made -inf. n <= TR_KEY_BLOCK */
    void (*index_score)(float *score, const float *acc, const float *key_scale, int n);
    /* How many of n scores are >= bound; and the first k positions of n, ascending, that are > bound or among the first
     * n_ties that are == bound. NaN counts as -inf. Returns how many it found. */
    int (*count_from)(const float *score, int n, float bound);
    int (*select)(int32_t *position, int k, const float *score, int n, float bound, int n_ties);
    float (*max_abs)(const float *x, int n);
    /* e4m3 of x * factor, factor a power of two; the codes are tr_f32_to_e4m3's. */
    void (*to_e4m3)(uint8_t *out, const float *x, float factor, int n);
    /* And back, times scale: one rounding. NaN codes give NaN. */
    void (*expand_e4m3)(float *out, const uint8_t *in, float scale, int n);
    /* A latent record of an e4m3 cache (model.md 5.3) to [d_latent + d_rope], as expand_e4m3 and bf16 give it. */
    void (*expand_latent)(float *out, const uint8_t *record, int d_latent, int d_rope);
    /* To bf16 and back; the Hadamard transform (indexer.c), d a power of two. The same bits everywhere. */
    void (*round_bf16)(float *x, int n);
    void (*hadamard)(float *x, int d);
};

static inline const struct tr_attention_kernels *tr_attention_of(const tr_device *d)
{
    return d->k.attention ? d->k.attention : &tr_attention_plain;
}

/* Dimensions the scratch and the record formats can hold; flags that the CPU has no use for. TR_E_USAGE if not. */
tr_status tr_attention_check_kv(tr_device *d, const char *name, const tr_kv_layer *kv);
tr_status tr_attention_check_wait(tr_device *d, const char *name, const tr_await *await);

enum { TR_SCALE_BLOCK = 128 }; /* latents that share a scale */

static inline int tr_n_scales(int d_latent)
{
    return (d_latent + TR_SCALE_BLOCK - 1) / TR_SCALE_BLOCK;
}

/* A pad row sees no keys and writes none. */
static inline int tr_row_is_pad(const tr_rows *rows, int i)
{
    return rows->write[i] < 0;
}

/* End of the rows [i_row, i_row + n_row) that exist. */
static inline int tr_row_end(const tr_rows *rows, int i_row, int n_row)
{
    int n = tr_live_rows(rows->n, rows->n_max);
    return n - i_row < n_row ? n : i_row + n_row;
}

/* The cache row that entry `at` of a row's list names, -1: none. */
static inline int tr_selected_row(const struct tr_sparse_mla_args *a, const int32_t *list, int at)
{
    const int64_t n_rows = (int64_t)a->kv.n_pages * TR_PAGE_TOKENS;
    return at < a->k && list[at] >= 0 && list[at] < n_rows ? list[at] : -1;
}

/* Whether row i of index_logits is scored at all. */
static inline int tr_needs_scores(const struct tr_index_logits_args *a, int i)
{
    return !a->rows->dense[i] && !tr_row_is_pad(a->rows, i) && a->rows->position[i] >= a->k;
}

/* Which keys [*begin, *end) of the page that begins at position s row i sees; 0: none. */
static inline int tr_index_window(const struct tr_index_logits_args *a, int i, int s, int *begin,
                                  int *end)
{
    const int first = a->first ? a->first[i] : 0;
    int last = a->rows->position[i] + 1;

    if (a->last && a->last[i] < last) last = a->last[i];
    *begin = first > s ? first - s : 0;
    *end = last - s < TR_KEY_BLOCK ? last - s : TR_KEY_BLOCK;
    return *begin < *end;
}

/* kv_write.c: cache records read back, one thread. Latent row i_row (page * 64 + offset): [c | k_pe] as fp32. */
void tr_latent_read(const tr_device *d, const tr_kv_layer *kv, int64_t i_row, float *out);
/* Memory that is wanted next, asked for a few lines at a time between other work: a core has some 16 requests under way
 * and stands still to make more. */
typedef struct tr_ahead {
    const char *at, *end;
} tr_ahead;

enum { TR_AHEAD_LINES = 17, TR_AHEAD_KEYS = 16 }; /* so many lines for every so many index keys */

static inline void tr_ask_ahead(tr_ahead *a, int n_lines)
{
    for (; n_lines > 0 && a->at < a->end; n_lines--, a->at += 64)
        __builtin_prefetch(a->at, 0, 2);
}

/* A page of an e4m3 index: its keys' codes and scales, the position of its first key, how many of them any row sees; and
 * the next page, to be asked for meanwhile. */
typedef struct tr_index_page {
    const uint8_t *code;
    const float *scale;
    int s, n;
    tr_ahead *ahead;
} tr_index_page;

/* One thread's, for the pages of a call. row: whose queries index_page has left in `query`, -1 at first. */
typedef struct tr_index_scratch {
    float tile[TR_INDEX_TILE] __attribute__((aligned(64)));
    uint8_t query[2 * TR_HEADS_MAX * TR_D_INDEX_MAX] __attribute__((aligned(64)));
    int row;
} tr_index_scratch;

/* Those of a page's index keys that are among its first n, as a tile [TR_INDEX_TILE]. Returns the keys' scales, NULL if
 * they have none (TR_F32). */
const float *tr_index_page_read(const tr_device *d, const tr_kv_layer *kv, int page, int n,
                                float *tile, tr_ahead *ahead);
tr_ahead tr_index_page_ahead(const tr_kv_layer *kv, int page);
/* code and scale of a page of a cache that is not TR_F32. */
tr_index_page tr_index_page_codes(const tr_kv_layer *kv, int page);
/* Asks for a latent row, all of it. */
void tr_latent_prefetch(const tr_kv_layer *kv, int64_t i_row);

/* Cache rows lie anywhere: those of entries [at, at + n) of a list are asked for while there is other work. */
static inline void tr_ask_for_rows(const struct tr_sparse_mla_args *a, const int32_t *list, int at,
                                   int n)
{
    for (int i = at; i < at + n; i++) {
        const int row = tr_selected_row(a, list, i);
        if (row >= 0) tr_latent_prefetch(&a->kv, row);
    }
}

/* e4m3 codes of x (n at most 128: one scale), returns the scale. */
float tr_quantise(const struct tr_attention_kernels *k, uint8_t *out, const float *x, int n);
/* Where an e4m3 index key and its scale lie. */
typedef struct tr_index_slot {
    uint8_t *code;
    float *scale;
} tr_index_slot;
tr_index_slot tr_index_at(const tr_kv_layer *kv, int64_t i_row);

/* indexer.c: steps 3 and 4 of model.md 4. */
/* Sylvester order, over the whole vector, times d^-0.5; d a power of two. Plain C. */
void tr_hadamard(float *x, int d);
/* bf16 rounding, Hadamard, bf16 rounding, e4m3; returns the scale. x is overwritten. One thread. */
float tr_index_quantise(const tr_device *d, uint8_t *out, float *x, int d_index);

/* mla.c: one step of an online softmax. p [64]: dot products in, exp(scale p - max) out. Updates *max (start: -inf)
 * and *sum (start: 0); returns the factor for what was accumulated so far, 0 at the start. */
float tr_softmax_step(const tr_device *d, float *p, int n, float scale, float *max, float *sum);

/* mla.c: a product per head: g's y = W[h] x for h < n_heads, x and y of head h x_step and y_step floats further,
 * panels of all heads spread over the threads. g->i_mat is not used. */
void tr_gemm_heads(const tr_device *d, const tr_gemm *g, int n_heads, size_t x_step, size_t y_step);

#endif
