#include <config.h>

#include "mpi/grid.h"

tr_status tr_grid_make(tr_grid *out, tr_grid_sizes sizes, int rank, int world, tr_err *err)
{
    char text[TR_GRID_BROKEN];
    bool there = rank >= 0 && rank < world;
    int n = tr_grid_broken(&sizes, world, NULL, text, sizeof text);

    *out = (tr_grid){.size = sizes, .rank = rank, .world = world};
    if (!there)
        return tr_fail(err, TR_E_USAGE, "impossible process grid: %s%srank %d of %d does not exist",
                       text, n ? "; " : "", rank, world);
    if (n) return tr_fail(err, TR_E_USAGE, "impossible process grid: %s", text);

    /* parallel.md 1.1: pp outermost; inside a stage tp, and xt, innermost. */
    int width = world / sizes.pp, s = rank % width;
    out->at = (tr_coord){
        .pp = rank / width,
        .dp = s / sizes.tp / sizes.cp,
        .cp = s / sizes.tp % sizes.cp,
        .tp = s % sizes.tp,
        .mdp = s / sizes.xt / sizes.ep,
        .ep = s / sizes.xt % sizes.ep,
        .xt = s % sizes.xt,
    };
    return TR_OK;
}

void tr_grid_layers(const tr_grid *grid, int n_layers, int *first, int *last)
{
    int each = n_layers / grid->size.pp, more = n_layers % grid->size.pp, pp = grid->at.pp;

    if (grid->stage_layers) {
        *first = 0;
        for (int i = 0; i < pp; i++)
            *first += grid->stage_layers[i];
        *last = *first + grid->stage_layers[pp];
        return;
    }
    *first = pp * each + (pp < more ? pp : more);
    *last = *first + each + (pp < more);
}

/* ---- groups --------------------------------------------------------------------------------------------------------- */

/* Every group of parallel.md 1.2 is an arithmetic progression of world ranks: first, first + stride, ... The colour counts
 * the groups of a kind: by the coordinates that its members share. */
typedef struct progression {
    int first, stride, n;
    int color, index;
} progression;

/* Consecutive ranks, `n` at a time. */
static progression consecutive(const tr_grid *g, int n)
{
    return (progression){
        .first = g->rank / n * n, .stride = 1, .n = n, .color = g->rank / n, .index = g->rank % n};
}

/* n ranks `stride` apart inside consecutive blocks of n * stride. */
static progression strided(const tr_grid *g, int stride, int n)
{
    int block = n * stride, in_block = g->rank % block;
    return (progression){.first = g->rank - in_block + in_block % stride,
                         .stride = stride,
                         .n = n,
                         .color = g->rank / block * stride + in_block % stride,
                         .index = in_block / stride};
}

static progression members_of(const tr_grid *g, tr_grid_group group)
{
    const tr_grid_sizes *n = &g->size;
    int replica = n->cp * n->tp, stage = n->dp * replica;

    switch (group) {
    case TR_GROUP_WORLD:
        return consecutive(g, g->world);
    case TR_GROUP_STAGE:
        return consecutive(g, stage);
    case TR_GROUP_ATTN_TP:
        return consecutive(g, n->tp);
    case TR_GROUP_ATTN_CP:
        return strided(g, n->tp, n->cp);
    case TR_GROUP_ATTN_DP:
        return strided(g, replica, n->dp);
    case TR_GROUP_MOE_EP:
        return strided(g, n->xt, n->ep);
    case TR_GROUP_MOE_TP:
        return consecutive(g, n->xt);
    case TR_GROUP_PP:
        return strided(g, stage, n->pp);
    case TR_GROUP_MOE:
        return consecutive(g, n->ep * n->xt);
    case TR_GROUP_REPLICA:
        return consecutive(g, replica);
    case TR_GROUP_LEAD:
        if (g->at.tp == 0 && g->at.cp == 0)
            return (progression){.first = 0,
                                 .stride = replica,
                                 .n = n->pp * n->dp,
                                 .color = 0,
                                 .index = g->rank / replica};
        break;
    case TR_N_GROUPS:
        break;
    }
    return (progression){.color = -1, .index = -1};
}

const char *tr_grid_group_name(tr_grid_group group)
{
    static const char *const name[TR_N_GROUPS] = {
        [TR_GROUP_WORLD] = "WORLD",     [TR_GROUP_STAGE] = "STAGE",
        [TR_GROUP_ATTN_TP] = "ATTN_TP", [TR_GROUP_ATTN_CP] = "ATTN_CP",
        [TR_GROUP_ATTN_DP] = "ATTN_DP", [TR_GROUP_MOE_EP] = "MOE_EP",
        [TR_GROUP_MOE_TP] = "MOE_TP",   [TR_GROUP_PP] = "PP",
        [TR_GROUP_LEAD] = "LEAD",       [TR_GROUP_MOE] = "MOE",
        [TR_GROUP_REPLICA] = "REPLICA",
    };
    return group >= 0 && group < TR_N_GROUPS ? name[group] : "?";
}

int tr_grid_color(const tr_grid *grid, tr_grid_group group)
{
    return members_of(grid, group).color;
}

int tr_grid_key(const tr_grid *grid, tr_grid_group group)
{
    /* Keys only order the members; LEAD's is the world rank (parallel.md 1.2), the others' their coordinate. */
    progression p = members_of(grid, group);
    return group == TR_GROUP_LEAD && p.n > 0 ? grid->rank : p.index;
}

int tr_grid_group_size(const tr_grid *grid, tr_grid_group group)
{
    return members_of(grid, group).n;
}

int tr_grid_group_index(const tr_grid *grid, tr_grid_group group)
{
    return members_of(grid, group).index;
}

int tr_grid_member(const tr_grid *grid, tr_grid_group group, int i)
{
    progression p = members_of(grid, group);
    return p.first + i * p.stride;
}

bool tr_grid_same_group(const tr_grid_sizes *sizes, tr_grid_group a, tr_grid_group b)
{
    int world = sizes->pp * sizes->dp * sizes->cp * sizes->tp;
    tr_grid g = {.size = *sizes, .world = world};

    /* LEAD is everybody's only where nobody follows. The others are built of n members `stride` apart in aligned blocks
     * of n * stride, so n and stride of one rank say it for all. */
    if (a == TR_GROUP_LEAD || b == TR_GROUP_LEAD) {
        if (a == b) return true;
        if (sizes->cp * sizes->tp != 1) return false;
    }
    progression p = members_of(&g, a), q = members_of(&g, b);
    return p.n == q.n && (p.n == 1 || p.stride == q.stride);
}
