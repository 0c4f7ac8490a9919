/* The lightning indexer (model.md 4): its queries and its scores. Its keys are written by kv_write.c. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/cpu/rope_priv.h"
#include "kernels/number.h"

/* Sylvester order, over the whole vector, times d^-0.5. */
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

static void round_bf16(float *x, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = tr_round_bf16(x[i]);
}

float tr_index_quantise(const tr_device *d, uint8_t *out, float *x, int d_index)
{
    round_bf16(x, d_index);
    tr_hadamard(x, d_index);
    round_bf16(x, d_index);
    return tr_quantise(tr_attention_of(d), out, x, d_index);
}

tr_status tr_cpu_index_query(tr_device *d, tr_lane lane, const struct tr_index_query_args *a)
{
    int n = tr_live_rows(a->rows->n, a->rows->n_max), d_index = a->d_index;
    float constant = 1.0f / sqrtf((float)a->n_heads) / sqrtf((float)d_index);
    double work = 16.0 * n * a->n_heads * d_index;
    tr_kv_layer like = {.index = a->out, .dtype = a->cache_dtype, .d_index = d_index};
    tr_status st = tr_attention_check_kv(d, "index_query", &like);

    (void)lane;
    if (st != TR_OK) return st;
    if (a->d_rope > d_index)
        return tr_cpu_fail(d, TR_E_USAGE, "index_query: queries narrower than their rope");
#pragma omp parallel for collapse(2) num_threads(tr_threads_for(d, work)) schedule(static)
    for (int i = 0; i < n; i++)
        for (int h = 0; h < a->n_heads; h++) {
            size_t at = (size_t)i * a->n_heads + h;
            float x[TR_D_INDEX_MAX], scale = 1.0f;
            if (tr_row_is_pad(a->rows, i)) continue;
            memcpy(x, a->q + at * d_index, (size_t)d_index * sizeof *x);
            tr_rope_half_split(x, a->rope + (size_t)a->rows->position[i] * a->d_rope, a->d_rope);
            if (a->cache_dtype == TR_F32)
                memcpy((float *)a->out + at * d_index, x, (size_t)d_index * sizeof *x);
            else
                scale = tr_index_quantise(d, (uint8_t *)a->out + at * d_index, x, d_index);
            a->w[at] = a->w[at] * constant * scale;
        }
    return TR_OK;
}

static int needs_scores(const struct tr_index_logits_args *a, int i)
{
    return !a->rows->dense[i] && !tr_row_is_pad(a->rows, i) && a->rows->position[i] >= a->k;
}

/* The part of row i's scores that lies in keys [s, s + TR_KEY_BLOCK). */
static void row_scores(const tr_device *d, const struct tr_index_logits_args *a, int i, int s,
                       tr_index_keys keys)
{
    const struct tr_attention_kernels *k = tr_attention_of(d);
    int begin = a->first ? a->first[i] : 0;
    int end = a->rows->position[i] + 1, d_index = a->kv.d_index;
    float query[TR_ROW_BLOCK * TR_D_INDEX_MAX] __attribute__((aligned(64)));
    float dots[TR_ROW_BLOCK * TR_KEY_BLOCK] __attribute__((aligned(64))) = {0};
    float acc[TR_KEY_BLOCK] __attribute__((aligned(64))) = {0};

    if (a->last && a->last[i] < end) end = a->last[i];
    begin = begin > s ? begin - s : 0;
    end = end - s < TR_KEY_BLOCK ? end - s : TR_KEY_BLOCK;
    if (begin >= end) return;
    tr_tile key = {keys.key + (size_t)begin * d_index, (size_t)d_index, end - begin};
    for (int h = 0; h < a->n_heads; h += TR_ROW_BLOCK) {
        int n = a->n_heads - h < TR_ROW_BLOCK ? a->n_heads - h : TR_ROW_BLOCK;
        size_t at = (size_t)i * a->n_heads + h;
        tr_tile q = {query, (size_t)d_index, n};
        if (a->kv.dtype == TR_F32)
            q.x = (const float *)a->q + at * d_index;
        else
            k->expand_e4m3(query, (const uint8_t *)a->q + at * d_index, 1.0f, n * d_index);
        k->dots(dots, q, key, d_index);
        k->relu_add(acc, dots, a->w + at, n);
    }
    k->index_score(a->score + (size_t)(i - a->i_row) * a->ld + s + begin, acc,
                   keys.scale ? keys.scale + begin : NULL, end - begin);
}

/* Rows [i, i_end) of one slot against one page. The keys are expanded once, for all of them. */
static void page_scores(const tr_device *d, const struct tr_index_logits_args *a, int i, int i_end,
                        int i_page, float *scratch)
{
    const tr_rows *rows = a->rows;
    int s = i_page * TR_PAGE_TOKENS, n = 0;

    for (int r = i; r < i_end; r++)
        if (needs_scores(a, r) && rows->position[r] - s + 1 > n) n = rows->position[r] - s + 1;
    if (n <= 0) return;
    n = n < TR_PAGE_TOKENS ? n : TR_PAGE_TOKENS;
    int page = rows->page_table[(size_t)rows->slot[i] * rows->max_pages + i_page];
    tr_index_keys keys = tr_index_page_read(d, &a->kv, page, n, scratch);
    for (int r = i; r < i_end; r++)
        if (needs_scores(a, r)) row_scores(d, a, r, s, keys);
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
        if (needs_scores(a, i)) work += (double)rows->position[i] * a->n_heads * a->kv.d_index;
    if (work == 0) return TR_OK;

        /* Every thread walks the runs of rows that share a slot, and shares out each run's pages. */
#pragma omp parallel num_threads(tr_threads_for(d, work))
    {
        float scratch[TR_PAGE_TOKENS * TR_D_INDEX_MAX] __attribute__((aligned(64)));
        for (int i = a->i_row, i_end; i < end; i = i_end) {
            int n_pages = 0;
            for (i_end = i; i_end < end && rows->slot[i_end] == rows->slot[i]; i_end++)
                if (needs_scores(a, i_end) && rows->position[i_end] / TR_PAGE_TOKENS >= n_pages)
                    n_pages = rows->position[i_end] / TR_PAGE_TOKENS + 1;
#pragma omp for schedule(static) nowait
            for (int p = 0; p < n_pages; p++)
                page_scores(d, a, i, i_end, p, scratch);
        }
    }
    return TR_OK;
}
