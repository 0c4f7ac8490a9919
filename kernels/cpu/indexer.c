/* The lightning indexer (model.md 4): its queries and its scores. Its keys are written by kv_write.c. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/cpu/rope_priv.h"
#include "kernels/number.h"

void tr_hadamard(float *x, int d)
{
    float factor = 1.0f / sqrtf((float)d);

    for (int half = 1; half < d; half *= 2)
        for (int i = 0; i < d; i += 2 * half)
            for (int j = i; j < i + half; j++) {
                float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    for (int i = 0; i < d; i++)
        x[i] *= factor;
}

void tr_index_tile_key(float *tile, int lanes, int d_index, int s, const float *key)
{
    int d_tile = (d_index + 3) / 4 * 4;

    for (int i = 0; i < d_tile; i += 4) {
        float *to = tile + tr_index_tile_at(lanes, d_tile, s, i);
        for (int j = 0; j < 4; j++)
            to[j] = i + j < d_index ? key[i + j] : 0.0f;
    }
}

void tr_index_tile_codes(float *tile, int lanes, int d_index, int n, const uint8_t *code)
{
    float key[TR_D_INDEX_MAX];

    for (int s = 0; s < n; s++, code += d_index) {
        for (int i = 0; i < d_index; i++)
            key[i] = tr_e4m3_to_f32(code[i]) * tr_tile_unit;
        tr_index_tile_key(tile, lanes, d_index, s, key);
    }
}

float tr_index_quantise(const tr_device *d, uint8_t *out, float *x, int d_index)
{
    const struct tr_attention_kernels *k = tr_attention_of(d);

    k->round_bf16(x, d_index);
    k->hadamard(x, d_index);
    k->round_bf16(x, d_index);
    return tr_quantise(k, out, x, d_index);
}

typedef struct query_work {
    const tr_device *d;
    const struct tr_index_query_args *a;
    int n_rows;
} query_work;

static void query_member(void *ctx, int i, int n)
{
    const query_work *work = ctx;
    const struct tr_index_query_args *a = work->a;
    const int d_index = a->d_index, total = work->n_rows * a->n_heads;
    const float constant = 1.0f / sqrtf((float)a->n_heads) / sqrtf((float)d_index);

    for (int t = tr_team_part(total, i, n); t < tr_team_part(total, i + 1, n); t++) {
        const int row = t / a->n_heads;
        const size_t at = (size_t)t;
        TR_SCRATCH float x[TR_D_INDEX_MAX];
        float scale = 1.0f;
        if (tr_row_is_pad(a->rows, row)) continue;
        memcpy(x, a->q + at * d_index, (size_t)d_index * sizeof *x);
        tr_rope_half_split(x, a->rope + (size_t)a->rows->position[row] * a->d_rope, a->d_rope);
        if (a->cache_dtype == TR_F32)
            memcpy((float *)a->out + at * d_index, x, (size_t)d_index * sizeof *x);
        else
            scale = tr_index_quantise(work->d, (uint8_t *)a->out + at * d_index, x, d_index);
        a->w[at] = a->w[at] * constant * scale;
    }
}

tr_status tr_cpu_index_query(tr_device *d, tr_lane lane, const struct tr_index_query_args *a)
{
    int n = tr_live_rows(a->rows->n, a->rows->n_max), d_index = a->d_index;
    double work = 16.0 * n * a->n_heads * d_index;
    tr_kv_layer like = {.index = a->out, .dtype = a->cache_dtype, .d_index = d_index};
    tr_status st = tr_attention_check_kv(d, "index_query", &like);

    (void)lane;
    if (st != TR_OK) return st;
    if (a->d_rope > d_index)
        return tr_cpu_fail(d, TR_E_USAGE, "index_query: queries narrower than their rope");
    query_work w = {d, a, n};
    tr_device_run(d, work, query_member, &w);
    return TR_OK;
}

/* n queries of row i from head h on, as index_add wants them: fp32, d_tile apart. */
static const float *queries(const tr_device *d, const struct tr_index_logits_args *a, size_t at,
                            int n, int d_tile, float *scratch)
{
    int d_index = a->kv.d_index;

    if (a->kv.dtype == TR_F32 && d_tile == d_index) return (const float *)a->q + at * d_index;
    for (int h = 0; h < n && d_tile != d_index; h++)
        for (int i = 0; i < d_tile; i++)
            scratch[h * d_tile + i] = 0.0f;
    if (a->kv.dtype == TR_F32)
        for (int h = 0; h < n; h++)
            memcpy(scratch + h * d_tile, (const float *)a->q + (at + h) * d_index,
                   (size_t)d_index * sizeof *scratch);
    else if (d_tile == d_index)
        tr_attention_of(d)->expand_e4m3(scratch, (const uint8_t *)a->q + at * d_index,
                                        1.0f / tr_tile_unit, n * d_index);
    else
        for (int h = 0; h < n; h++)
            tr_attention_of(d)->expand_e4m3(scratch + h * d_tile,
                                            (const uint8_t *)a->q + (at + h) * d_index,
                                            1.0f / tr_tile_unit, d_index);
    return scratch;
}

/* The part of row i's scores that lies in keys [s, s + TR_KEY_BLOCK), a page's. */
static void row_scores(const tr_device *d, const struct tr_index_logits_args *a, int i, int s,
                       const float *tile, const float *key_scale, tr_ahead *ahead)
{
    const struct tr_attention_kernels *k = tr_attention_of(d);
    int begin, end;
    int d_tile = (a->kv.d_index + 3) / 4 * 4;
    TR_SCRATCH float scratch[TR_ROW_BLOCK * TR_D_INDEX_MAX] __attribute__((aligned(64)));
    float acc[TR_KEY_BLOCK] __attribute__((aligned(64))) = {0};

    if (!tr_index_window(a, i, s, &begin, &end)) return;
    for (int h = 0; h < a->n_heads; h += TR_ROW_BLOCK) {
        int n = a->n_heads - h < TR_ROW_BLOCK ? a->n_heads - h : TR_ROW_BLOCK;
        size_t at = (size_t)i * a->n_heads + h;
        const float *q = queries(d, a, at, n, d_tile, scratch);
        for (int g = begin / TR_AHEAD_KEYS * TR_AHEAD_KEYS; g < end; g += TR_AHEAD_KEYS) {
            tr_ask_ahead(ahead, TR_AHEAD_LINES);
            k->index_add(acc, q, a->w + at, n, tile, d_tile, g,
                         end - g < TR_AHEAD_KEYS ? end : g + TR_AHEAD_KEYS);
        }
    }
    k->index_score(a->score + (size_t)(i - a->i_row) * a->ld + s + begin, acc + begin,
                   key_scale ? key_scale + begin : NULL, end - begin);
}

enum { HEADS_TILES = 16 }; /* from which on matrix tiles pay, where there are any */

/* The model and the cache's format decide, never how many rows there are. */
static int on_tiles(const tr_device *d, const struct tr_index_logits_args *a)
{
    return d->k.index_page && a->kv.dtype != TR_F32 && a->kv.d_index % 32 == 0 &&
           a->n_heads >= HEADS_TILES && a->n_heads <= TR_HEADS_MAX;
}

/* Rows [i, i_end) of one slot against one page. The keys are expanded once, for all of them; meanwhile the next page is
 * on its way. */
static void page_scores(const tr_device *d, const struct tr_index_logits_args *a, int i, int i_end,
                        int i_page, int n_pages, tr_index_scratch *scratch)
{
    const tr_rows *rows = a->rows;
    const int32_t *pages = rows->page_table + (size_t)rows->slot[i] * rows->max_pages;
    int s = i_page * TR_PAGE_TOKENS, n = 0;
    tr_ahead ahead = {NULL, NULL};

    for (int r = i; r < i_end; r++)
        if (tr_needs_scores(a, r) && rows->position[r] - s + 1 > n) n = rows->position[r] - s + 1;
    if (n <= 0) return;
    n = n < TR_PAGE_TOKENS ? n : TR_PAGE_TOKENS;
    if (i_page + 1 < n_pages) ahead = tr_index_page_ahead(&a->kv, pages[i_page + 1]);
    if (on_tiles(d, a)) {
        tr_index_page page = tr_index_page_codes(&a->kv, pages[i_page]);
        page.s = s;
        page.n = n;
        page.ahead = &ahead;
        d->k.index_page(d, a, i, i_end, &page, scratch);
        return;
    }
    const float *key_scale = tr_index_page_read(d, &a->kv, pages[i_page], n, scratch->tile, &ahead);
    for (int r = i; r < i_end; r++)
        if (tr_needs_scores(a, r)) row_scores(d, a, r, s, scratch->tile, key_scale, &ahead);
}

typedef struct logits_work {
    const tr_device *d;
    const struct tr_index_logits_args *a;
    int end; /* rows [a->i_row, end) */
} logits_work;

/* Every member walks the runs of rows that share a slot, and takes its share of each run's pages. */
static void logits_member(void *ctx, int member, int n_members)
{
    const logits_work *work = ctx;
    const struct tr_index_logits_args *a = work->a;
    const tr_rows *rows = a->rows;
    TR_SCRATCH tr_index_scratch scratch;

    scratch.row = -1;
    for (int i = a->i_row, i_end; i < work->end; i = i_end) {
        int n_pages = 0;
        for (i_end = i; i_end < work->end && rows->slot[i_end] == rows->slot[i]; i_end++)
            if (tr_needs_scores(a, i_end) && rows->position[i_end] / TR_PAGE_TOKENS >= n_pages)
                n_pages = rows->position[i_end] / TR_PAGE_TOKENS + 1;
        for (int p = tr_team_part(n_pages, member, n_members),
                 p_end = tr_team_part(n_pages, member + 1, n_members);
             p < p_end; p++)
            page_scores(work->d, a, i, i_end, p, n_pages, &scratch);
    }
}

tr_status tr_cpu_index_logits(tr_device *d, tr_lane lane, const struct tr_index_logits_args *a)
{
    const tr_rows *rows = a->rows;
    int end = tr_row_end(rows, a->i_row, a->n_row);
    double work = 0;
    tr_status st = tr_attention_check_kv(d, "index_logits", &a->kv);

    (void)lane;
    if (st == TR_OK) st = tr_attention_check_wait(d, "index_logits", &a->keys);
    if (st != TR_OK) return st;
    for (int i = a->i_row; i < end; i++)
        if (tr_needs_scores(a, i)) work += (double)rows->position[i] * a->n_heads * a->kv.d_index;
    if (work == 0) return TR_OK;

    logits_work w = {d, a, end};
    tr_device_run(d, work, logits_member, &w);
    return TR_OK;
}
