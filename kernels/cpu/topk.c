/* Selection of the k best keys of a row (model.md 4.3): exact, larger score first, equal scores smaller position first.
 * A radix search over the bits of sortable keys finds the smallest score that is selected, four passes at most; one more
 * pass writes the positions in ascending order. One row, one thread: the row itself is not changed. */
#include <config.h>

#include <assert.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/number.h"

enum {
    N_BINS = 256,
    /* Neighbours count in different copies: a row of equal scores would wait for one counter. */
    N_COPIES = 4,
    N_FEW = 2048, /* so many candidates are copied out of the row, and the later passes are short */
};

/* Ascending like the scores: -0.0 as +0.0, NaN as -inf. */
static uint32_t sort_key(float score)
{
    const uint32_t lowest = 0x007fffffu;  /* of -inf ... */
    const uint32_t highest = 0xff800000u; /* ... and +inf: NaN lie outside */
    uint32_t u = tr_f32_bits(score + 0.0f);
    u ^= u >> 31 ? UINT32_MAX : 0x80000000u;
    return u - lowest > highest - lowest ? lowest : u;
}

/* Candidates for the smallest selected key: those of the row that begin with `prefix` in their `known` bits, or, where
 * few are left, a list of them. */
typedef struct candidates {
    const float *score;
    uint32_t known, prefix;
    int n_few, n; /* n_few < 0: not listed; n: of the row */
    uint32_t few[N_FEW];
} candidates;

/* How many candidates have which 8 bits at `shift`. */
static void count_digits(const candidates *c, int shift, int count[N_BINS])
{
    int copies[N_COPIES][N_BINS] = {{0}};

    for (int i = 0; i < c->n_few; i++)
        copies[i % N_COPIES][(c->few[i] >> shift) % N_BINS]++;
    for (int s = 0; s < c->n && c->n_few < 0; s++) {
        uint32_t key = sort_key(c->score[s]);
        if ((key & c->known) == c->prefix) copies[s % N_COPIES][(key >> shift) % N_BINS]++;
    }
    for (int bin = 0; bin < N_BINS; bin++)
        count[bin] = copies[0][bin] + copies[1][bin] + copies[2][bin] + copies[3][bin];
}

/* Only those with this digit remain, n of them. */
static void narrow(candidates *c, int shift, uint32_t digit, int n)
{
    int m = 0;

    c->prefix |= digit << shift;
    c->known |= (N_BINS - 1u) << shift;
    if (c->n_few < 0 && n >= N_FEW) return;
    for (int i = 0; i < c->n_few; i++) {
        c->few[m] = c->few[i];
        m += (c->few[i] & c->known) == c->prefix;
    }
    for (int s = 0; s < c->n && c->n_few < 0; s++) {
        uint32_t key = sort_key(c->score[s]);
        c->few[m] = key; /* n < N_FEW: there is room for the one that is not taken */
        m += (key & c->known) == c->prefix;
    }
    c->n_few = m;
}

/* The k largest keys are those > bound and the first n_ties of those == bound. */
typedef struct tr_topk_bound {
    uint32_t bound;
    int n_ties;
} tr_topk_bound;

static tr_topk_bound find_bound(const float *score, int n, int k)
{
    candidates c;
    int count[N_BINS];

    c.score = score;
    c.n = n;
    c.n_few = -1;
    c.known = c.prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t bin = N_BINS - 1;
        count_digits(&c, shift, count);
        for (; count[bin] < k; bin--)
            k -= count[bin];
        narrow(&c, shift, bin, count[bin]);
    }
    return (tr_topk_bound){c.prefix, k};
}

static void select_best(const float *score, int n, int k, int32_t *position)
{
    tr_topk_bound b = find_bound(score, n, k);

    for (int s = 0, m = 0; m < k; s++) {
        uint32_t key = sort_key(score[s]);
        int tie = (key == b.bound) & (b.n_ties > 0);
        position[m] = s; /* overwritten by the next unless it is taken: no branch to mispredict */
        b.n_ties -= tie;
        m += (key > b.bound) | tie;
    }
}

static void row_topk(const struct tr_topk_args *a, int i)
{
    const tr_rows *rows = a->rows;
    int32_t *position = a->position + (size_t)i * a->k,
            *cache_row = a->cache_row + (size_t)i * a->k;
    int n = 0;

    if (!rows->dense[i] && !tr_row_is_pad(rows, i)) {
        n = rows->position[i] + 1;
        if (n > a->k) {
            assert(a->score);
            select_best(a->score + (size_t)(i - a->i_row) * a->ld, n, a->k, position);
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

tr_status tr_cpu_topk(tr_device *d, tr_lane lane, const struct tr_topk_args *a)
{
    int end = tr_row_end(a->rows, a->i_row, a->n_row);
    double work = 0;

    (void)lane;
    if (a->k < 1) return tr_cpu_fail(d, TR_E_USAGE, "topk: k must be at least 1");
    for (int i = a->i_row; i < end; i++)
        work += a->rows->position[i] < a->k ? a->k : 4.0 * a->rows->position[i];
#pragma omp parallel for num_threads(tr_threads_for(d, work)) schedule(static)
    for (int i = a->i_row; i < end; i++)
        row_topk(a, i);
    return TR_OK;
}
