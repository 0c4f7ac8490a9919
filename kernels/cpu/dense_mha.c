/* MLA in its multi-head form (model.md 3.4), for rows that see every key before them. Keys come in blocks of 64 positions
 * from position 0, the pages of the cache: each block's k_nope and v are made from its latents once per head and
 * group of rows, and every row runs its own online softmax over the blocks. Where a prompt was cut, or which rows
 * share a group, cannot show. */
#include <config.h>

#include <assert.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"

enum {
    GROUP_ROWS = 4096,   /* most rows of one group: their softmax state is on the stack */
    GROUP_ROWS_MIN = 64, /* smaller groups spend more on making keys than on using them */
    TASKS_PER_THREAD =
        4,          /* where heads do not divide evenly: late groups cost more than early ones */
    PAGES_STEP = 4, /* pages that rows meet while they are at hand: queries and sums of many rows
                     * lie far apart and come from beyond L2 */
};

/* Rows [begin, end) of one slot at rising positions: neighbours, or every so many where several ranks share a prompt. */
typedef struct run {
    int begin, end;
} run;

typedef struct block {                          /* one head's view of the keys of a page */
    float turned[TR_KEY_BLOCK * TR_D_HEAD_MAX]; /* keys, [d_nope + d_rope, TR_KEY_BLOCK] */
    float value[TR_KEY_BLOCK * TR_D_HEAD_MAX];
    int n;
} block;

typedef struct scratch {
    float latent[TR_KEY_BLOCK * TR_D_KEY_MAX];
    float key[TR_KEY_BLOCK * TR_D_HEAD_MAX];
    block page[PAGES_STEP];
} scratch;

static int is_live(const tr_rows *rows, int i)
{
    return rows->dense[i] && !tr_row_is_pad(rows, i);
}

static int next_run(const tr_rows *rows, run *r)
{
    int n = tr_live_rows(rows->n, rows->n_max), i = r->end;

    while (i < n && !is_live(rows, i))
        i++;
    r->begin = i;
    if (i == n) return 0;
    for (i++; i < n && is_live(rows, i) && rows->slot[i] == rows->slot[i - 1] &&
              rows->position[i] > rows->position[i - 1];)
        i++;
    r->end = i;
    return 1;
}

/* k = [W_UK c | k_pe] and v = W_UV c of head h, for the first b->n keys of a page. */
static void block_make(const tr_device *d, const struct tr_dense_mha_args *a, int h, int page,
                       scratch *to, block *b)
{
    size_t d_latent = (size_t)a->kv.d_latent, d_rope = (size_t)a->d_rope, d_key = d_latent + d_rope;
    size_t d_q = (size_t)a->d_nope + d_rope;
    tr_gemm g = {.x = to->latent, .ldx = d_key, .i_mat = h, .n_rows = b->n};

    for (int s = 0; s < b->n; s++) {
        float *row = to->latent + (size_t)s * d_key;
        tr_latent_read(d, &a->kv, (int64_t)page * TR_PAGE_TOKENS + s, row);
        memcpy(to->key + (size_t)s * d_q + a->d_nope, row + d_latent, d_rope * sizeof *row);
    }
    g.w = a->w_uk;
    g.y = to->key;
    g.ldy = d_q;
    tr_cpu_gemm_panels(d, &g, 0, tr_n_panels(a->d_nope));
    tr_tile key = {to->key, d_q, b->n};
    tr_attention_of(d)->turn(b->turned, key, (int)d_q);
    g.w = a->w_uv;
    g.y = b->value;
    g.ldy = (size_t)a->d_v;
    tr_cpu_gemm_panels(d, &g, 0, tr_n_panels(a->d_v));
}

/* Up to TR_ROW_BLOCK rows from row i on against a block whose first key is at position `first`; all see that one. */
static void rows_step(const tr_device *d, const struct tr_dense_mha_args *a, int h, int i, int n,
                      int first, const block *b, float *max, float *sum)
{
    const struct tr_attention_kernels *k = tr_attention_of(d);
    size_t d_q = (size_t)a->d_nope + (size_t)a->d_rope, at = (size_t)i * a->n_heads + h;
    TR_SCRATCH float p[TR_ROW_BLOCK * TR_KEY_BLOCK] __attribute__((aligned(64)));
    float keep[TR_ROW_BLOCK];
    int n_keys[TR_ROW_BLOCK];
    tr_tile q = {a->q + at * d_q, (size_t)a->n_heads * d_q, n};

    k->scores(p, q, b->turned, (int)d_q);
    for (int r = 0; r < n; r++) {
        int seen = a->rows->position[i + r] + 1 - first;
        n_keys[r] = seen < b->n ? seen : b->n;
        keep[r] = tr_softmax_step(d, p + r * TR_KEY_BLOCK, n_keys[r], a->scale, max + r, sum + r);
    }
    k->accumulate(a->out + at * a->d_v, (size_t)a->n_heads * a->d_v, p, keep, n_keys, n, b->value,
                  (size_t)a->d_v, a->d_v);
}

/* One head of the rows [r.begin, r.end), at most GROUP_ROWS; `out` is the accumulator. */
static void group_attention(const tr_device *d, const struct tr_dense_mha_args *a, int h, run r,
                            scratch *to)
{
    const tr_rows *rows = a->rows;
    const int32_t *pages = rows->page_table + (size_t)rows->slot[r.begin] * rows->max_pages;
    const int32_t *position = rows->position + r.begin;
    int n_rows = r.end - r.begin, last = position[n_rows - 1], past = 0;
    TR_SCRATCH float max[GROUP_ROWS];
    TR_SCRATCH float sum[GROUP_ROWS];

    for (int i = 0; i < n_rows; i++) {
        max[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    for (int s = 0; s <= last; s += PAGES_STEP * TR_KEY_BLOCK) {
        int n_pages = (last - s) / TR_KEY_BLOCK + 1;
        n_pages = n_pages < PAGES_STEP ? n_pages : PAGES_STEP;
        for (int p = 0, at = s; p < n_pages; p++, at += TR_KEY_BLOCK) {
            to->page[p].n = last + 1 - at < TR_KEY_BLOCK ? last + 1 - at : TR_KEY_BLOCK;
            block_make(d, a, h, pages[at / TR_KEY_BLOCK], to, &to->page[p]);
        }
        while (position[past] < s) /* rows before these pages */
            past++;
        for (int i = past; i < n_rows; i += TR_ROW_BLOCK) {
            int n = n_rows - i < TR_ROW_BLOCK ? n_rows - i : TR_ROW_BLOCK;
            for (int p = 0, skip = 0, at = s; p < n_pages; p++, at += TR_KEY_BLOCK) {
                while (skip < n && position[i + skip] < at)
                    skip++;
                if (skip < n)
                    rows_step(d, a, h, r.begin + i + skip, n - skip, at, &to->page[p],
                              max + i + skip, sum + i + skip);
            }
        }
    }
    for (int i = 0; i < n_rows; i++) {
        float *out = a->out + ((size_t)(r.begin + i) * a->n_heads + h) * a->d_v;
        float factor = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
        for (int j = 0; j < a->d_v; j++)
            out[j] *= factor;
    }
}

/* Groups a run is cut into so that the threads have enough to share. */
static int group_rows(const tr_device *d, const struct tr_dense_mha_args *a, run r)
{
    int n = r.end - r.begin, n_groups = 1;

    if (a->n_heads % d->n_threads)
        n_groups = (TASKS_PER_THREAD * d->n_threads + a->n_heads - 1) / a->n_heads;
    n = (n + n_groups - 1) / n_groups;
    n = n < GROUP_ROWS_MIN ? GROUP_ROWS_MIN : n;
    return n < GROUP_ROWS ? n : GROUP_ROWS;
}

typedef struct mha_work {
    const tr_device *d;
    const struct tr_dense_mha_args *a;
} mha_work;

/* Tasks are numbered through all runs, so that nobody waits between two: a member walks the runs and takes a new number
 * when it has done the task of its last one. */
static void mha_member(void *ctx, int i, int n_members)
{
    const mha_work *w = ctx;
    const struct tr_dense_mha_args *a = w->a;
    tr_team *team = w->d->team;
    int first = 0, mine = tr_team_next(team);
    TR_SCRATCH scratch to __attribute__((aligned(64)));

    (void)i, (void)n_members;
    for (run r = {0, 0}; next_run(a->rows, &r);) {
        int n = group_rows(w->d, a, r), n_groups = (r.end - r.begin + n - 1) / n;
        /* The latest group, with the most keys, first. */
        for (; mine - first < n_groups * a->n_heads; mine = tr_team_next(team)) {
            int t = mine - first;
            run group = {r.begin + (n_groups - 1 - t / a->n_heads) * n, r.end};
            if (group.end - group.begin > n) group.end = group.begin + n;
            group_attention(w->d, a, t % a->n_heads, group, &to);
        }
        first += n_groups * a->n_heads;
    }
}

static tr_status check(tr_device *d, const struct tr_dense_mha_args *a)
{
    tr_status st = tr_attention_check_kv(d, "dense_mha", &a->kv);

    if (st == TR_OK) st = tr_attention_check_wait(d, "dense_mha", &a->latents);
    if (st == TR_OK && (a->d_rope != a->kv.d_rope || a->d_v > TR_D_HEAD_MAX ||
                        a->d_nope > TR_D_HEAD_MAX - a->d_rope))
        st = tr_cpu_fail(d, TR_E_USAGE, "dense_mha: heads wider than %d numbers", TR_D_HEAD_MAX);
    return st;
}

tr_status tr_cpu_dense_mha(tr_device *d, tr_lane lane, const struct tr_dense_mha_args *a)
{
    const tr_rows *rows = a->rows;
    size_t row = (size_t)a->n_heads * a->d_v;
    double work = 0;
    tr_status st = check(d, a);

    (void)lane;
    if (st != TR_OK) return st;
    for (int i = 0; i < tr_live_rows(rows->n, rows->n_max); i++) {
        if (is_live(rows, i))
            work += (double)a->n_heads * a->kv.d_latent * (a->d_nope + a->d_v);
        else if (rows->dense[i]) /* a pad sees nothing */
            memset(a->out + (size_t)i * row, 0, row * sizeof *a->out);
    }
    if (work == 0) return TR_OK;
    mha_work w = {d, a};
    tr_device_run(d, work, mha_member, &w);
    return TR_OK;
}
