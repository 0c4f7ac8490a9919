/* --device auto of several ranks: they compute on GPUs where every one of them has a GPU of its own, which is decided from what all of
 * them see before any is opened. Main thread, at start. */
#ifndef TR_COMMAND_GPUS_H
#define TR_COMMAND_GPUS_H

#include <stdbool.h>
#include <stddef.h>

#include "kernels/kernels.h"
#include "mpi/start.h"

enum { TR_GPUS_WHY = 320 };

typedef struct tr_gpu_sight { /* of a rank: plain data, sent between ranks as it is */
    char host[64];
    int local_size; /* ranks of its host */
    tr_gpu_seen gpu;
} tr_gpu_sight;

/* Whether all n ranks, in order, can compute on GPUs. Where they cannot though one of them sees a GPU, why: one line; else "". Pure.
 * nccl: this build has it. */
bool tr_gpus_suffice(char why[TR_GPUS_WHY], const tr_gpu_sight *all, int n, bool nccl);

/* The same of the ranks of a world; each gets the same answer. Collective over the world. */
tr_status tr_gpus_ask(bool *suffice, char why[TR_GPUS_WHY], tr_world *world, bool nccl,
                      tr_err *err);

#endif
