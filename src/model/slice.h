/* Which part of each tensor a coordinate holds (parallel.md 1.4): pure functions of the config and the grid. With a grid
 * of one everything is whole. Rows are [out], columns [in] of the stored tensor.
 *
 * What a rank holds follows from whose rows it shares. The members of ATTN_TP compute the same rows; those of ATTN_CP and
 * ATTN_DP have other rows. So
 *   - attention is cut by heads over ATTN_TP, o_proj's output is summed there; everything else of attention and the whole
 *     indexer are copies;
 *   - the dense MLP and the shared expert are cut over ATTN_TP alone, on the grid of the scales, and are copies under DP
 *     and CP: cut over the stage they would need the rows of all replicas at every rank;
 *   - lm_head is to be cut over ATTN_TP too, so that replicas meet in the experts and nowhere else (the other choice of 1.4, the
 *     stage, saves memory under DP at the price of gathering every replica's rows for the head);
 *   - the embedding is a copy (its sum over a group would cost more than its memory is worth, parallel.md 2.1);
 *   - routed experts are cut over the MoE groups, whole experts over MOE_EP and their width over MOE_TP. */
#ifndef TR_MODEL_SLICE_H
#define TR_MODEL_SLICE_H

#include "kernels/limits.h"
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
    /* Of intermediate_size and of the shared expert's width: cut into the largest divisor of tp that stays on the grid of
     * 128 (parallel.md 1.3 rule 4), else whole. With fewer parts than members some members hold the same part. */
    tr_range dense_inner, shared_inner;
    tr_range vocab;        /* lm_head rows */
    int embed, head;       /* this stage embeds; this stage has norm and lm_head */
    int head_partial;      /* vocab is a part: the other members of ATTN_TP have the others */
    int attention_partial; /* o_proj's output is a partial sum over ATTN_TP */
    int dense_partial;     /* the dense MLP's output is a partial sum over ATTN_TP */
    int moe_partial;       /* the routed experts' is one over MOE, ep x moe-tp ranks */
    int shared_partial;    /* the shared expert's output is a partial sum over ATTN_TP */
    /* One holder of each part in ATTN_TP: in a sum over that group only these may add what they computed (where the
     * output is not partial: member 0). */
    int dense_adds, shared_adds;
} tr_slice;

/* TR_E_USAGE: heads, experts, widths, layers or the vocabulary do not divide; every reason is named. */
tr_status tr_slice_make(tr_slice *out, const tr_config *config, const tr_grid *grid, tr_err *err);

/* lm_head rows of member i of an attention group of n. */
tr_range tr_slice_vocab(const tr_config *config, int i, int n);

/* What a backend is asked about (kernels/limits.h): the model's sizes and this rank's part. Not max_context, which is a job's. */
tr_dims tr_slice_dims(const tr_config *config, const tr_slice *slice, const tr_grid_sizes *sizes);

/* The counts that the rules of mpi/grid.h ask for. */
tr_grid_limits tr_slice_limits(const tr_config *config);

/* Parts of a width over n members: rule 4. */
int tr_slice_parts(int width, int n);

/* An FP8 tensor that the grid cuts off the 128 x 128 blocks of its scales (parallel.md 1.5): legal, each part keeps the
 * scales of both part blocks, but a backend may have to expand it. */
typedef struct tr_misaligned {
    const char *name; /* behind "model.layers.N." */
    const char *cut;  /* "rows" or "columns" */
    int width, parts; /* width / parts is no multiple of 128 */
} tr_misaligned;

enum { TR_MISALIGNED_MAX = 6 };

/* How many there are with these sizes; none in a model without FP8. */
int tr_slice_misaligned(const tr_config *config, const tr_grid_sizes *sizes,
                        tr_misaligned out[TR_MISALIGNED_MAX]);

#endif
