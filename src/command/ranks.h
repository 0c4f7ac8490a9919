/* The options that lay a model out over ranks, the same for every subcommand that has ranks, and what they come to for a
 * model and a number of them. Pure: no MPI, so that `plan` and every rank of a job find the same. */
#ifndef TR_COMMAND_RANKS_H
#define TR_COMMAND_RANKS_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "model/config.h"
#include "model/layout.h"
#include "mpi/grid.h"

typedef struct tr_rank_options { /* 0 or NULL: not given */
    int64_t tp, pp, dp, cp, ep, moe_tp;
    const char *pp_layers, *cp_mode;
} tr_rank_options;

enum { TR_RANKS_MAX = 1 << 20 };

/* Rows of an option table (command/options.h) for the member `m` of type tr_rank_options in the struct `s`. */
/* clang-format off */
#define TR_RANK_OPTION(s, m, name, field, help)                                                    \
    {name, 0, TR_OPTION_INT, offsetof(s, m.field), 1, TR_RANKS_MAX, "N", NULL, help}
#define TR_RANK_OPTIONS(s, m)                                                                      \
    TR_RANK_OPTION(s, m, "tp", tp, "ranks that share the heads (default: what the others leave)"), \
    TR_RANK_OPTION(s, m, "pp", pp, "pipeline stages (default 1)"),                                 \
    TR_RANK_OPTION(s, m, "dp", dp, "replicas with requests of their own (default 1)"),             \
    TR_RANK_OPTION(s, m, "cp", cp, "ranks that share the rows of a prompt (default 1)"),           \
    TR_RANK_OPTION(s, m, "ep", ep, "ranks that share the experts (default: as many as can)"),      \
    TR_RANK_OPTION(s, m, "moe-tp", moe_tp, "ranks that share each expert's width (default 1)"),    \
    {"pp-layers", 0, TR_OPTION_TEXT, offsetof(s, m.pp_layers), 0, 0, "N,N...", NULL,               \
     "layers of each stage (default: what balances their time)"},                                  \
    {"cp-mode", 0, TR_OPTION_CHOICE, offsetof(s, m.cp_mode), 0, 0, "MODE",                         \
     "round-robin-split|in-seq-split",                                                             \
     "how cp deals out rows: round-robin-split or in-seq-split (default round-robin-split)"}
/* clang-format on */

typedef struct tr_ranks {
    tr_grid_sizes sizes;
    tr_cp_mode cp_mode;
    int *stage_layers; /* [sizes.pp], owned; goes into tr_grid.stage_layers */
    char why[TR_GRID_WHY];
} tr_ranks;

/* TR_E_USAGE: no such grid, with every reason. Free in any case. */
tr_status tr_ranks_choose(tr_ranks *out, const tr_rank_options *options, const tr_config *config,
                          int world, tr_err *err);
void tr_ranks_free(tr_ranks *ranks);

/* Place of one rank: tr_grid_make with the stages' layers, which the grid borrows from ranks. */
tr_status tr_ranks_place(tr_grid *out, const tr_ranks *ranks, int rank, int world, tr_err *err);

#endif
