#include <config.h>

#include "ranks_world.h"

#include <pthread.h>
#include <string.h>

static const tr_grid_group kinds[] = {TR_GROUP_ATTN_TP, TR_GROUP_ATTN_CP, TR_GROUP_MOE,
                                      TR_GROUP_PP};

static tr_comm **place(tr_groups *g, int kind)
{
    tr_comm **of[] = {&g->attn_tp, &g->attn_cp, &g->moe, &g->pp};
    return of[kind];
}

/* One group: its members are those that give rank r's colour. */
static int open_group(tr_ranks_world *w, int kind, int r)
{
    const tr_grid_group group = kinds[kind];
    const int size = tr_grid_group_size(&w->grid[r], group);
    tr_loopback *l = tr_loopback_create(size);

    if (!l) return -1;
    w->loopback[w->n_loopbacks++] = l;
    for (int i = 0; i < size; i++) {
        const int member = tr_grid_member(&w->grid[r], group, i);
        *place(&w->groups[member], kind) = tr_loopback_comm(l, i);
        if (!*place(&w->groups[member], kind)) return -1;
    }
    return 0;
}

int tr_ranks_world_open(tr_ranks_world *w, tr_grid_sizes sizes)
{
    tr_err err;

    memset(w, 0, sizeof *w);
    w->sizes = sizes;
    w->n = sizes.pp * sizes.dp * sizes.cp * sizes.tp;
    if (w->n > TR_RANKS_WORLD_MAX) return -1;
    for (int r = 0; r < w->n; r++) {
        if (tr_grid_make(&w->grid[r], sizes, r, w->n, &err) != TR_OK) return -1;
        w->self[r] = tr_comm_self();
        if (!w->self[r]) return -1;
        w->groups[r].n_xt = sizes.xt;
    }
    for (int kind = 0; kind < 4; kind++)
        for (int r = 0; r < w->n; r++) {
            tr_comm **comm = place(&w->groups[r], kind);
            if (*comm) continue;
            if (tr_grid_group_size(&w->grid[r], kinds[kind]) == 1)
                *comm = w->self[r];
            else if (open_group(w, kind, r))
                return -1;
        }
    return 0;
}

void tr_ranks_world_close(tr_ranks_world *w)
{
    for (int r = 0; r < w->n; r++) {
        for (int kind = 0; kind < 4; kind++)
            if (*place(&w->groups[r], kind) != w->self[r])
                tr_comm_free(*place(&w->groups[r], kind));
        tr_comm_free(w->self[r]);
    }
    for (int i = 0; i < w->n_loopbacks; i++)
        tr_loopback_free(w->loopback[i]);
}

int tr_ranks_world_run(const tr_ranks_world *w, void *(*run)(void *), void *ctx, size_t size)
{
    pthread_t thread[TR_RANKS_WORLD_MAX];
    int started = 0;

    while (started < w->n &&
           !pthread_create(&thread[started], NULL, run, (char *)ctx + (size_t)started * size))
        started++;
    for (int r = 0; r < started; r++)
        pthread_join(thread[r], NULL);
    return started == w->n ? 0 : -1;
}
