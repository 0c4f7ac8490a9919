/* All ranks of a grid in one process: a thread each, groups over loop-backs (loopback.h). For tests of what ranks do together
 * without a launcher. */
#ifndef TR_TESTS_RANKS_WORLD_H
#define TR_TESTS_RANKS_WORLD_H

#include "loopback.h"
#include "model/model.h"
#include "mpi/grid.h"

enum { TR_RANKS_WORLD_MAX = 8 };

typedef struct tr_ranks_world {
    tr_grid_sizes sizes;
    int n;
    tr_grid grid[TR_RANKS_WORLD_MAX];
    tr_groups groups[TR_RANKS_WORLD_MAX]; /* of each rank */
    tr_comm *self[TR_RANKS_WORLD_MAX];
    tr_loopback *loopback[4 * TR_RANKS_WORLD_MAX];
    int n_loopbacks;
} tr_ranks_world;

/* 0, or -1 where memory or the sizes do not do. */
int tr_ranks_world_open(tr_ranks_world *w, tr_grid_sizes sizes);
void tr_ranks_world_close(tr_ranks_world *w);

/* run(rank's ctx) on every rank at once: ctx + rank * size. Returns when all have ended. */
int tr_ranks_world_run(const tr_ranks_world *w, void *(*run)(void *), void *ctx, size_t size);

#endif
