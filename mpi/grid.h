/* The process grid: sizes, coordinates and groups of a rank, as pure functions of numbers (parallel.md 1). No MPI here.
 * So far every size is 1 outside tests; the arithmetic and the rules are for any. */
#ifndef TR_MPI_GRID_H
#define TR_MPI_GRID_H

#include "base/err.h"

typedef struct tr_grid_sizes { /* world = pp*dp*cp*tp, dp*cp*tp = mdp*ep*xt (stage width) */
    int pp, dp, cp, tp, mdp, ep, xt;
} tr_grid_sizes;

typedef struct tr_coord { /* of one rank; both views name the same rank */
    int pp, dp, cp, tp, mdp, ep, xt;
} tr_coord;

typedef struct tr_grid {
    tr_grid_sizes size;
    tr_coord at;
    int rank, world;
} tr_grid;

/* Sizes must multiply up to `world` in both views; TR_E_USAGE naming every broken rule. */
tr_status tr_grid_make(tr_grid *out, tr_grid_sizes sizes, int rank, int world, tr_err *err);

/* Layers [*first, *last) of stage at.pp: n_layers cut as evenly as possible, earlier stages the larger ones. */
void tr_grid_layers(const tr_grid *grid, int n_layers, int *first, int *last);

#endif
