#include <config.h>

#include "command/gpus.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "mpi/comm_mpi.h"

/* What keeps rank i from a GPU of its own; "": nothing. */
static void look_at(char why[TR_GPUS_WHY], const tr_gpu_sight *all, int i)
{
    const tr_gpu_sight *r = &all[i];

    *why = '\0';
    if (r->gpu.unfit[0])
        snprintf(why, TR_GPUS_WHY, "rank %d on %s sees %s", i, r->host, r->gpu.unfit);
    else if (r->gpu.n == 0)
        snprintf(why, TR_GPUS_WHY, "rank %d on %s sees none", i, r->host);
    else if (!r->gpu.uuid[0])
        snprintf(why, TR_GPUS_WHY, "%d ranks but %d GPUs on %s", r->local_size, r->gpu.n, r->host);
    for (int j = 0; j < i && !*why; j++)
        if (strcmp(all[j].gpu.uuid, r->gpu.uuid) == 0)
            snprintf(why, TR_GPUS_WHY, "ranks %d and %d on %s see the same one, %s", j, i, r->host,
                     r->gpu.uuid);
}

bool tr_gpus_suffice(char why[TR_GPUS_WHY], const tr_gpu_sight *all, int n, bool nccl)
{
    bool seen = false;

    *why = '\0';
    for (int i = 0; i < n; i++)
        seen = seen || all[i].gpu.n > 0 || all[i].gpu.unfit[0];
    if (!seen) return false;
    if (!nccl) snprintf(why, TR_GPUS_WHY, "this build has no NCCL (configure --with-nccl)");
    for (int i = 0; i < n && !*why; i++)
        look_at(why, all, i);
    return !*why;
}

static tr_gpu_sight sight_of(const tr_world *world)
{
    tr_gpu_sight mine = {.local_size = world->local_size};

    snprintf(mine.host, sizeof mine.host, "%s", world->host);
    tr_device_look(&mine.gpu, world->local_rank, world->local_size);
    return mine;
}

/* From other processes: a text ends inside its field. */
static void end_texts(tr_gpu_sight *r)
{
    r->host[sizeof r->host - 1] = '\0';
    r->gpu.uuid[sizeof r->gpu.uuid - 1] = '\0';
    r->gpu.unfit[sizeof r->gpu.unfit - 1] = '\0';
}

tr_status tr_gpus_ask(bool *suffice, char why[TR_GPUS_WHY], tr_world *world, bool nccl, tr_err *err)
{
    const tr_gpu_sight mine = sight_of(world);
    const size_t n = (size_t)world->size;
    tr_gpu_sight *all = tr_calloc(n, sizeof *all);
    size_t *bytes = tr_calloc(n, sizeof *bytes);
    tr_comm *c = NULL;
    tr_ticket t = {0};
    tr_status st = all && bytes ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");

    *suffice = false;
    *why = '\0';
    st = tr_agree(world, st, err); /* nobody may be left alone in the gather */
    if (st == TR_OK) st = tr_comm_split(&c, world, 0, world->rank, "devices", err);
    for (size_t i = 0; i < n && st == TR_OK; i++)
        bytes[i] = sizeof *all;
    if (st == TR_OK) st = tr_comm_all_gather(c, &mine, all, bytes, &t, err);
    if (st == TR_OK) st = tr_comm_wait(c, TR_LANE_MAIN, t, err);
    for (size_t i = 0; i < n && st == TR_OK; i++)
        end_texts(&all[i]);
    if (st == TR_OK) *suffice = tr_gpus_suffice(why, all, (int)n, nccl);
    tr_comm_free(c);
    free(bytes);
    free(all);
    return st;
}
