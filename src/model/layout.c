#include <config.h>

#include "model/layout.h"

#include <stddef.h>

/* Split rows before x that rank c has: rows c, c + C, c + 2C, ... (parallel.md 3.2). */
static int32_t interleaved_before(int32_t x, int c, int n_ranks)
{
    return (x - c + n_ranks - 1) / n_ranks;
}

/* ---- zigzag: block i of a span of n tokens (parallel.md 3.1) -------------------------------------------------------- */

static int32_t block_length(int32_t n, int i, int n_ranks)
{
    return n / (2 * n_ranks) + (i < n % (2 * n_ranks));
}

static int32_t block_start(int32_t n, int i, int n_ranks)
{
    int32_t rest = n % (2 * n_ranks);
    return i * (n / (2 * n_ranks)) + (i < rest ? i : rest);
}

static int block_of(int32_t n, int32_t x, int n_ranks)
{
    int32_t q = n / (2 * n_ranks), rest = n % (2 * n_ranks);
    return (int)(x < rest * (q + 1) ? x / (q + 1) : rest + (x - rest * (q + 1)) / q);
}

static int32_t padded(int32_t n, int n_ranks)
{
    return n / n_ranks + (n % n_ranks != 0);
}

/* Row j of a span on rank c as a token of the span, or a pad. */
static int32_t zigzag_token(int32_t n, int32_t j, int c, int n_ranks)
{
    int32_t first = block_length(n, c, n_ranks), late = 2 * n_ranks - 1 - c;
    if (j < first) return block_start(n, c, n_ranks) + j;
    if (j - first < block_length(n, late, n_ranks))
        return block_start(n, late, n_ranks) + j - first;
    return TR_LAYOUT_PAD;
}

/* ---- the object ----------------------------------------------------------------------------------------------------- */

static bool can_split(tr_cp_mode mode, int n_ranks, const tr_layout_span *span, int n_spans)
{
    int32_t n = 0;
    for (int i = 0; i < n_spans; i++) {
        if (span[i].decode) continue;
        n += span[i].n;
        if (mode == TR_CP_ZIGZAG && span[i].n > 0 && span[i].n < 2 * n_ranks) return false;
    }
    return n_ranks > 1 && n > 0;
}

void tr_layout_make(tr_layout *out, tr_cp_mode mode, int n_ranks, tr_layout_span *span, int n_spans)
{
    tr_layout l = {.mode = mode, .n_ranks = n_ranks, .n_spans = n_spans, .span = span};

    l.split = can_split(mode, n_ranks, span, n_spans);
    for (int i = 0; i < n_spans; i++) {
        tr_layout_span *s = &span[i];
        s->begin = l.n_tokens;
        l.n_tokens += s->n;
        if (!l.split || s->decode) {
            s->at = l.n_whole;
            l.n_whole += s->n;
            continue;
        }
        s->at = mode == TR_CP_ZIGZAG ? l.m : l.n_split;
        l.n_split += s->n;
        if (mode == TR_CP_ZIGZAG) l.m += padded(s->n, n_ranks);
    }
    if (l.split && mode == TR_CP_INTERLEAVE) l.m = padded(l.n_split, n_ranks);
    *out = l;
}

static bool is_whole(const tr_layout *l, const tr_layout_span *s)
{
    return !l->split || s->decode;
}

/* Rows of one zigzag span on a rank. */
static int32_t zigzag_count(const tr_layout *l, const tr_layout_span *s, int rank)
{
    return block_length(s->n, rank, l->n_ranks) +
           block_length(s->n, 2 * l->n_ranks - 1 - rank, l->n_ranks);
}

int32_t tr_layout_count(const tr_layout *l, int rank)
{
    int32_t n = 0;
    if (!l->split) return 0;
    if (l->mode == TR_CP_INTERLEAVE) return interleaved_before(l->n_split, rank, l->n_ranks);
    for (int i = 0; i < l->n_spans; i++)
        if (!l->span[i].decode) n += zigzag_count(l, &l->span[i], rank);
    return n;
}

/* The span that has a token; empty ones have none. */
static const tr_layout_span *span_of(const tr_layout *l, int32_t token)
{
    int low = 0, high = l->n_spans - 1;
    while (low < high) { /* the last span that begins at or before the token */
        int middle = low + (high - low + 1) / 2;
        if (l->span[middle].begin <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return &l->span[low];
}

int tr_layout_owner(const tr_layout *l, int32_t token)
{
    const tr_layout_span *s = span_of(l, token);
    int32_t x = token - s->begin;

    if (is_whole(l, s)) return TR_LAYOUT_ALL;
    if (l->mode == TR_CP_INTERLEAVE) return (s->at + x) % l->n_ranks;
    int block = block_of(s->n, x, l->n_ranks);
    return block < l->n_ranks ? block : 2 * l->n_ranks - 1 - block;
}

int32_t tr_layout_row(const tr_layout *l, int32_t token)
{
    const tr_layout_span *s = span_of(l, token);
    int32_t x = token - s->begin;

    if (is_whole(l, s)) return l->m + s->at + x;
    if (l->mode == TR_CP_INTERLEAVE) return (s->at + x) / l->n_ranks;
    int block = block_of(s->n, x, l->n_ranks);
    int32_t row = s->at + x - block_start(s->n, block, l->n_ranks);
    /* The late block stands behind the early one. */
    return block < l->n_ranks ? row
                              : row + block_length(s->n, 2 * l->n_ranks - 1 - block, l->n_ranks);
}

/* Write the tokens of one rank's split rows to token[m]. */
static void split_tokens(const tr_layout *l, int rank, int32_t *token)
{
    for (int32_t j = 0; j < l->m; j++)
        token[j] = TR_LAYOUT_PAD;
    for (int i = 0; i < l->n_spans; i++) {
        const tr_layout_span *s = &l->span[i];
        if (is_whole(l, s)) continue;
        if (l->mode == TR_CP_INTERLEAVE) {
            int32_t j = interleaved_before(s->at, rank, l->n_ranks),
                    end = interleaved_before(s->at + s->n, rank, l->n_ranks);
            for (; j < end; j++)
                token[j] = s->begin + j * l->n_ranks + rank - s->at;
        } else {
            int32_t n = zigzag_count(l, s, rank);
            for (int32_t j = 0; j < n; j++)
                token[s->at + j] = s->begin + zigzag_token(s->n, j, rank, l->n_ranks);
        }
    }
}

void tr_layout_tokens(const tr_layout *l, int rank, int32_t *token)
{
    split_tokens(l, rank, token);
    for (int i = 0; i < l->n_spans; i++) {
        const tr_layout_span *s = &l->span[i];
        for (int32_t x = 0; is_whole(l, s) && x < s->n; x++)
            token[l->m + s->at + x] = s->begin + x;
    }
}

void tr_layout_put_back(const tr_layout *l, int32_t *token)
{
    for (int c = 0; c < l->n_ranks; c++)
        split_tokens(l, c, token + (int64_t)c * l->m);
}

/* The span that has a local row; split spans' rows and whole spans' rows are numbered apart. */
static const tr_layout_span *span_of_row(const tr_layout *l, bool whole, int32_t at)
{
    const tr_layout_span *found = NULL;
    for (int i = 0; i < l->n_spans; i++) {
        const tr_layout_span *s = &l->span[i];
        if (is_whole(l, s) == whole && s->n > 0 && s->at <= at) found = s;
    }
    return found;
}

int32_t tr_layout_token(const tr_layout *l, int rank, int32_t row)
{
    const tr_layout_span *s;
    if (row >= l->m) {
        s = span_of_row(l, true, row - l->m);
        return s ? s->begin + row - l->m - s->at : TR_LAYOUT_PAD;
    }
    int32_t at = l->mode == TR_CP_INTERLEAVE ? row * l->n_ranks + rank : row;
    if (l->mode == TR_CP_INTERLEAVE && at >= l->n_split) return TR_LAYOUT_PAD;
    s = span_of_row(l, false, at);
    if (!s) return TR_LAYOUT_PAD;
    if (l->mode == TR_CP_INTERLEAVE) return s->begin + at - s->at;
    int32_t x = zigzag_token(s->n, at - s->at, rank, l->n_ranks);
    return x == TR_LAYOUT_PAD ? TR_LAYOUT_PAD : s->begin + x;
}

int tr_layout_queries(const tr_layout *l, int rank, tr_layout_query *out)
{
    int n = 0;
    for (int i = 0; i < l->n_spans; i++) {
        const tr_layout_span *s = &l->span[i];
        tr_layout_query q = {.span = i, .stride = 1};
        if (is_whole(l, s)) {
            q.row = l->m + s->at;
            q.n = q.n_first = s->n;
        } else if (l->mode == TR_CP_INTERLEAVE) {
            q.row = interleaved_before(s->at, rank, l->n_ranks);
            q.n = q.n_first = interleaved_before(s->at + s->n, rank, l->n_ranks) - q.row;
            q.x_first = q.row * l->n_ranks + rank - s->at;
            q.stride = l->n_ranks;
        } else {
            q.row = s->at;
            q.n = zigzag_count(l, s, rank);
            q.n_first = block_length(s->n, rank, l->n_ranks);
            q.x_first = block_start(s->n, rank, l->n_ranks);
            q.x_second = block_start(s->n, 2 * l->n_ranks - 1 - rank, l->n_ranks);
        }
        if (q.n > 0) out[n++] = q;
    }
    return n;
}
