/* Selection of the k best keys of a row (model.md 4.3): exact, larger score first, equal scores smaller position first.
 * Bisection over the floats finds the smallest score that is selected: every step counts the scores that are not below
 * a bound. One more pass writes the positions in ascending order. One row, one thread. */
#include <config.h>

#include <assert.h>
#include <math.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/number.h"

/* Floats in ascending order as integers in ascending order, and back. */
static uint32_t to_key(float x)
{
    uint32_t u = tr_f32_bits(x);
    return u >> 31 ? ~u : u | 0x80000000u;
}

static float from_key(uint32_t key)
{
    return tr_bits_f32(key >> 31 ? key & 0x7fffffffu : ~key);
}

/* k < n of the scores. At least k are >= the float of `bound`, fewer than k >= that of `above`. -0.0 and +0.0 are equal
 * to every comparison, so the search cannot end between them. */
static void select_best(const struct tr_attention_kernels *kernels, const float *score, int n,
                        int k, int32_t *position)
{
    uint32_t bound = to_key(-INFINITY), above = to_key(INFINITY) + 1;
    int n_above = 0, n_ties = -1;

    while (above - bound > 1 && n_ties < 0) {
        uint32_t middle = bound + (above - bound) / 2;
        int count = kernels->count_from(score, n, from_key(middle));
        if (count >= k) {
            bound = middle;
            if (count == k) n_ties = k; /* whatever is not below the bound */
        } else {
            above = middle;
            n_above = count;
        }
    }
    if (n_ties < 0) n_ties = k - n_above;
    n = kernels->select(position, k, score, n, from_key(bound), n_ties);
    assert(n == k);
    (void)n;
}

static void row_topk(const tr_device *d, const struct tr_topk_args *a, int i)
{
    const tr_rows *rows = a->rows;
    int32_t *position = a->position + (size_t)i * a->k,
            *cache_row = a->cache_row + (size_t)i * a->k;
    int n = 0;

    if (!rows->dense[i] && !tr_row_is_pad(rows, i)) {
        n = rows->position[i] + 1;
        if (n > a->k) {
            assert(a->score);
            select_best(tr_attention_of(d), a->score + (size_t)(i - a->i_row) * a->ld, n, a->k,
                        position);
            n = a->k;
        } else {
            for (int s = 0; s < n; s++)
                position[s] = s;
        }
        const int32_t *pages = rows->page_table + (size_t)rows->slot[i] * rows->max_pages;
        for (int j = 0; j < n; j++)
            cache_row[j] =
                pages[position[j] / TR_PAGE_TOKENS] * TR_PAGE_TOKENS + position[j] % TR_PAGE_TOKENS;
    }
    for (int j = n; j < a->k; j++)
        position[j] = cache_row[j] = -1;
    a->n_selected[i] = n;
}

typedef struct topk_work {
    const tr_device *d;
    const struct tr_topk_args *a;
    int end; /* rows [a->i_row, end) */
} topk_work;

static void topk_member(void *ctx, int i, int n)
{
    const topk_work *w = ctx;
    const int first = w->a->i_row, n_rows = w->end - first;

    for (int r = tr_team_part(n_rows, i, n); r < tr_team_part(n_rows, i + 1, n); r++)
        row_topk(w->d, w->a, first + r);
}

tr_status tr_cpu_topk(tr_device *d, tr_lane lane, const struct tr_topk_args *a)
{
    int end = tr_row_end(a->rows, a->i_row, a->n_row);
    double work = 0;

    (void)lane;
    if (a->k < 1) return tr_cpu_fail(d, TR_E_USAGE, "topk: k must be at least 1");
    for (int i = a->i_row; i < end; i++)
        work += a->rows->position[i] < a->k ? a->k : 4.0 * a->rows->position[i];
    topk_work w = {d, a, end};
    if (end > a->i_row) tr_device_run(d, end - a->i_row == 1 ? 0.0 : work, topk_member, &w);
    return TR_OK;
}
