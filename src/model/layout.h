/* The layout of context parallelism: which rank computes which row of a step (parallel.md 3.1, 3.2), behind one object with
 * two strategies. Everybody who needs to know (key ranges, cache slots, head rows, the put-back of gathered keys) asks here.
 * Pure: no MPI, no memory of its own, the same answers on every rank. Made once per step by the main thread.
 *
 * The rows of a step are numbered as the plan has them: its spans one behind the other, token g in [0, n_tokens). A span is
 * consecutive rows of one request. Prompt chunks are split over the C members of ATTN_CP; decode rows (and verification
 * runs) are not: every member computes all of them (policy `replicate`, parallel.md 3.6), because one row per request cannot
 * be split evenly and every member has its pages anyhow.
 *
 * On every rank the local rows are [0, m) of the split spans, then the n_whole rows that everybody computes, in the order
 * of the plan. m is the same on every rank; local rows that are no token are pad rows: no keys, no cache slot, nothing
 * reaches the head. Member c's split rows gathered behind each other are rows c*m + j (3.4).
 *
 * interleave (round-robin-split, the default): split row e, counted over all split spans, is row e div C of rank e mod C;
 * at most one pad row, the last. zigzag (in-seq-split): each span apart is cut into 2C blocks, rank c has blocks c and
 * 2C-1-c; span r begins at the same local row on every rank and takes m_r = ceil(n_r / C) rows there, so its last one may be
 * a pad row. zigzag needs n_r >= 2C of every split span: a step where one is shorter is not split, all ranks compute all
 * of it. */
#ifndef TR_MODEL_LAYOUT_H
#define TR_MODEL_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

typedef enum tr_cp_mode { TR_CP_INTERLEAVE, TR_CP_ZIGZAG } tr_cp_mode;

enum { TR_LAYOUT_ALL = -1, TR_LAYOUT_PAD = -1 };

typedef struct tr_layout_span {
    int32_t n;   /* rows, >= 0 */
    bool decode; /* computed by every rank, not split */
    /* Filled in by tr_layout_make. */
    int32_t begin; /* first token */
    int32_t
        at; /* interleave: split rows before it; zigzag: its first local row; not split: its first whole row */
} tr_layout_span;

typedef struct tr_layout {
    tr_cp_mode mode;
    int n_ranks; /* C */
    bool split;  /* false: nothing of this step is split, m is 0 */
    int n_spans;
    const tr_layout_span *span; /* kept */
    int32_t n_tokens;           /* all rows of the step */
    int32_t n_split,
        n_whole; /* tokens split over the ranks, tokens computed by each: together n_tokens */
    int32_t m;   /* local rows of split spans, pads included, on every rank */
} tr_layout;

/* Spans in the order of the plan; their begin and at are filled in, the array must stay. Sums of n must fit an int32_t
 * (the plan's checker has seen to it); n_ranks >= 1. */
void tr_layout_make(tr_layout *out, tr_cp_mode mode, int n_ranks, tr_layout_span *span,
                    int n_spans);

/* Local rows on every rank, pads included. */
static inline int32_t tr_layout_rows(const tr_layout *l)
{
    return l->m + l->n_whole;
}

/* Split tokens of a rank: its rows in [0, m) that are no pads. */
int32_t tr_layout_count(const tr_layout *l, int rank);

/* Of a token: the rank that computes it (TR_LAYOUT_ALL: every rank), and its local row there. */
int tr_layout_owner(const tr_layout *l, int32_t token);
int32_t tr_layout_row(const tr_layout *l, int32_t token);

/* The token in a rank's local row; TR_LAYOUT_PAD: none. */
int32_t tr_layout_token(const tr_layout *l, int rank, int32_t row);

/* The same for all local rows at once, token[tr_layout_rows]. */
void tr_layout_tokens(const tr_layout *l, int rank, int32_t *token);

/* Where row c*m + j of the members' split rows, gathered in rank order, belongs: token[C * m], TR_LAYOUT_PAD: nowhere. */
void tr_layout_put_back(const tr_layout *l, int32_t *token);

/* What a rank computes of one span: n local rows from `row` on, consecutive; never empty. Positions of a zigzag span jump
 * once: rows [0, n_first) begin x_first tokens into the span, the others x_second; an interleaved span's rows are x_first,
 * x_first + C, ... (n_first = n, stride C). */
typedef struct tr_layout_query {
    int32_t span;
    int32_t row, n;
    int32_t n_first, x_first, x_second;
    int32_t stride;
} tr_layout_query;

/* The spans of which this rank computes something, in order; those of which it has no row are left out of every array
 * of the query side. out[n_spans]; returns their number. */
int tr_layout_queries(const tr_layout *l, int rank, tr_layout_query *out);

#endif
