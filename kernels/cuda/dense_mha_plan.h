/* Which keys of which prompts are made when, where not all fit at once (dense_mha_hopper.h): rounds, one behind the other. Header
 * only, the same text for C and CUDA: one thread of the device plans, a host test looks at the plans.
 *
 * Spans are done in their order, each whole. A round takes spans until the next one's keys would not fit. What is listed for the
 * device's blocks of threads has room for TR_DENSE_ROUNDS rounds, a window; more are planned window by window. */
#ifndef TR_CUDA_DENSE_MHA_PLAN_H
#define TR_CUDA_DENSE_MHA_PLAN_H

#include <stdint.h>

#ifdef __CUDACC__
#define TR_DENSE_INLINE static inline __host__ __device__
#else
#define TR_DENSE_INLINE static inline
#endif

enum { TR_DENSE_TILE_ROWS = 128, TR_DENSE_BLOCK_KEYS = 128, TR_DENSE_ROUNDS = 512 };

/* Rows [row, row + n) of `slot`, the first at `position`, the others `step` positions apart; its keys begin at key `base` of the workspace in round `round` of the
 * window, its tiles of rows and blocks of keys at the i_tile-th and i_block-th of the window. round -1: not in this window. */
typedef struct tr_dense_span {
    int row, n, position, step, slot, base, round, i_tile, i_block;
} tr_dense_span;

/* Tiles and blocks of round r of a window: [begin[r], begin[r + 1]). */
typedef struct tr_dense_plan {
    int tile_begin[TR_DENSE_ROUNDS + 1], block_begin[TR_DENSE_ROUNDS + 1];
} tr_dense_plan;

TR_DENSE_INLINE int tr_dense_pieces(int n, int of)
{
    return (n + of - 1) / of;
}

/* Keys that the first n rows of a span see. */
TR_DENSE_INLINE int tr_dense_seen(const tr_dense_span *s, int n)
{
    return s->position + (n - 1) * s->step + 1;
}

/* Most rounds that spans take whose keys, each span's rounded up to whole blocks, are all_keys together and span_keys at most
 * alone: a round may be left before it is full, by less than a span. max_keys: those of a round; span_keys <= max_keys, all
 * multiples of TR_DENSE_BLOCK_KEYS. */
TR_DENSE_INLINE int64_t tr_dense_rounds_most(int64_t all_keys, int span_keys, int max_keys)
{
    const int64_t least = (int64_t)max_keys - span_keys + TR_DENSE_BLOCK_KEYS;

    return all_keys <= max_keys ? 1 : (all_keys + least - 1) / least;
}

/* The window of n_rounds rounds, at most TR_DENSE_ROUNDS, from the first-th on: base, round, i_tile and i_block of all spans, and
 * the plan up to begin[n_rounds]; rounds that there are not have nothing in them. */
TR_DENSE_INLINE void tr_dense_plan_window(tr_dense_span *span, int n_spans, int max_keys, int first,
                                          int n_rounds, tr_dense_plan *plan)
{
    int base = 0, round = 0, n_tiles = 0, n_blocks = 0, end = 0;

    for (int i = 0; i < n_spans; i++) {
        tr_dense_span s = span[i];
        const int blocks = tr_dense_pieces(tr_dense_seen(&s, s.n), TR_DENSE_BLOCK_KEYS),
                  keys = blocks * TR_DENSE_BLOCK_KEYS;
        if (base + keys > max_keys) {
            base = 0;
            round++;
        }
        s.base = base;
        s.round = round >= first && round - first < n_rounds ? round - first : -1;
        base += keys;
        for (; end <= s.round; end++) {
            plan->tile_begin[end] = n_tiles;
            plan->block_begin[end] = n_blocks;
        }
        s.i_tile = n_tiles;
        s.i_block = n_blocks;
        span[i] = s;
        if (s.round < 0) continue;
        n_tiles += tr_dense_pieces(s.n, TR_DENSE_TILE_ROWS);
        n_blocks += blocks;
    }
    for (; end <= n_rounds; end++) {
        plan->tile_begin[end] = n_tiles;
        plan->block_begin[end] = n_blocks;
    }
}

/* Tiles of a window are done in ascending order of this: round by round, and in a round those that see most keys first, so that the
 * long ones are not begun last. first: the tile's first row in its span. */
TR_DENSE_INLINE int64_t tr_dense_tile_order(const tr_dense_span *s, int first)
{
    const int rows = first + TR_DENSE_TILE_ROWS < s->n ? first + (int)TR_DENSE_TILE_ROWS : s->n;

    return ((int64_t)s->round << 32) - tr_dense_seen(s, rows);
}

#endif
