/* The process grid: sizes, coordinates and groups of a rank, and which sizes are legal, as pure functions of numbers
 * (parallel.md 1). No MPI here, nothing of the model but the counts its rules need: tests and `plan` use all of it without
 * a launch. grid.c has coordinates and groups, grid_rules.c the rules, the defaults and the nearest legal grids. */
#ifndef TR_MPI_GRID_H
#define TR_MPI_GRID_H

#include <stdbool.h>
#include <stddef.h>

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
    /* [size.pp] layers of each stage, kept (--pp-layers, or what balances the stages); NULL: as even as possible.
     * tr_grid_make leaves NULL. */
    const int *stage_layers;
} tr_grid;

/* Sizes must multiply up to `world` in both views; TR_E_USAGE naming every broken rule. */
tr_status tr_grid_make(tr_grid *out, tr_grid_sizes sizes, int rank, int world, tr_err *err);

/* Layers [*first, *last) of stage at.pp: stage_layers, or n_layers cut as evenly as possible, earlier stages the larger
 * ones. */
void tr_grid_layers(const tr_grid *grid, int n_layers, int *first, int *last);

/* ---- groups (parallel.md 1.2) ------------------------------------------------------------------------------------- */

/* The last two are not in that table: MOE is the block of ep*xt ranks that together hold all experts and sum or exchange
 * the rows of their own members (the stage when mdp is 1), REPLICA is who follows one scheduler's plan. NODE is MPI's to
 * find, DCP is not built. */
typedef enum tr_grid_group {
    TR_GROUP_WORLD,
    TR_GROUP_STAGE,
    TR_GROUP_ATTN_TP,
    TR_GROUP_ATTN_CP,
    TR_GROUP_ATTN_DP,
    TR_GROUP_MOE_EP,
    TR_GROUP_MOE_TP,
    TR_GROUP_PP,
    TR_GROUP_LEAD, /* tp = cp = 0 of each (pp, dp): not everybody is in one */
    TR_GROUP_MOE,
    TR_GROUP_REPLICA,
    TR_N_GROUPS
} tr_grid_group;

const char *tr_grid_group_name(tr_grid_group group); /* "ATTN_TP" */

/* What MPI_Comm_split takes: the members of a group share a colour, >= 0, and are in the order of their keys. -1: this
 * rank is in no such group (MPI_UNDEFINED). */
int tr_grid_color(const tr_grid *grid, tr_grid_group group);
int tr_grid_key(const tr_grid *grid, tr_grid_group group);

int tr_grid_group_size(const tr_grid *grid, tr_grid_group group); /* 0: not a member */
int tr_grid_group_index(const tr_grid *grid,
                        tr_grid_group group); /* this rank's place in it, -1: not a member */
/* World rank of member i of this rank's group, 0 <= i < group size. */
int tr_grid_member(const tr_grid *grid, tr_grid_group group, int i);

/* On every rank both groups have the same members in the same order: one communicator will do, unless both can be in
 * flight together. */
bool tr_grid_same_group(const tr_grid_sizes *sizes, tr_grid_group a, tr_grid_group b);

/* ---- rules (parallel.md 1.3) -------------------------------------------------------------------------------------- */

typedef struct
    tr_grid_limits { /* what the rules ask of a model; 0: not known, its rule is not checked */
    int layers, heads, experts, expert_inner, vocab;
    const int *stage_layers; /* --pp-layers as given, or NULL */
    int n_stage_layers;
} tr_grid_limits;

enum { TR_GRID_BROKEN = 608 }; /* room for every broken rule */

/* How many rules are broken, and which: one sentence each, "; " between. limits NULL: only that the sizes multiply up.
 * text NULL: only the number. */
int tr_grid_broken(const tr_grid_sizes *sizes, int world, const tr_grid_limits *limits, char *text,
                   size_t n);

/* TR_E_USAGE: one message with every broken rule, then up to three legal grids of the same world that change the fewest
 * sizes. mdp of sizes is what remains of the stage, 0 where that is no whole number. */
tr_status tr_grid_check(const tr_grid_sizes *sizes, int world, const tr_grid_limits *limits,
                        tr_err *err);

/* Rule 8: legal, but every MoE layer gathers the rows of all ranks of the stage (the cost is in parallel.md 2.3). */
bool tr_grid_gathers_all(const tr_grid_sizes *sizes);

enum { TR_GRID_WHY = 512 };

/* Sizes from what was given (0: not given; mdp is never given) and the defaults of parallel.md 1.1: pp, dp and cp 1; tp the
 * rest of the world where the rules allow it, else the largest legal part of it and dp the rest; ep the largest divisor
 * of the stage that divides the experts; moe-tp 1; mdp what remains. why[TR_GRID_WHY]: one sentence for each default that
 * is not 1, may be NULL. The result is checked; TR_E_USAGE as tr_grid_check, but sizes not given do not count as changed
 * in the grids it proposes. */
tr_status tr_grid_choose(tr_grid_sizes *out, const tr_grid_sizes *given, int world,
                         const tr_grid_limits *limits, char *why, tr_err *err);

/* "--dp 2 --tp 4 --ep 8": the options that make these sizes, sizes of 1 left out ("one rank" when all are). */
const char *tr_grid_text(char *text, size_t n, const tr_grid_sizes *sizes);

#endif
