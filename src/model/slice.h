/* Which part of each tensor a coordinate holds (parallel.md 1.4): pure functions of the config and the grid. With a grid
 * of one everything is whole. Rows are [out], columns [in] of the stored tensor. */
#ifndef TR_MODEL_SLICE_H
#define TR_MODEL_SLICE_H

#include "model/config.h"
#include "mpi/grid.h"

typedef struct tr_range {
    int begin, n;
} tr_range;

typedef struct tr_slice {  /* what this rank holds */
    tr_range layers;       /* main layers of this stage */
    tr_range heads;        /* attention heads: q_b, kv_b rows, o_proj columns */
    tr_range experts;      /* routed experts */
    tr_range expert_inner; /* columns of each expert's width (moe-tp) */
    tr_range
        dense_inner; /* of intermediate_size, cut over the stage; whole (and then not reduced) where it does not divide */
    tr_range shared_inner; /* of the shared expert's width, likewise */
    tr_range vocab;        /* lm_head rows; whole so far */
    int embed, head;       /* this stage embeds; this stage has norm and lm_head */
    int attention_partial; /* o_proj's output is a partial sum over ATTN_TP */
    int dense_partial;     /* dense MLP's output is a partial sum over the stage */
    int moe_partial;       /* routed experts' output is a partial sum over the stage */
    int shared_partial; /* shared expert's output is one too; else only member 0 of the group may add it */
} tr_slice;

/* TR_E_USAGE: heads or experts do not divide. */
tr_status tr_slice_make(tr_slice *out, const tr_config *config, const tr_grid *grid, tr_err *err);

#endif
