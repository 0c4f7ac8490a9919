/* One rank of a test program that runs on several GPUs (tests/run_gpus.sh) or, linked with a fake device, on none
 * (tests/test_fake_nccl.sh): its device, NCCL, and a communicator over MPI beside it. Begin with device_rank_begin, which opens
 * them, and end with device_rank_leave. */
#ifndef TRIREME_TESTS_DEVICE_RANK_H
#define TRIREME_TESTS_DEVICE_RANK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "mpi/binding.h"
#include "mpi/comm_mpi.h"
#include "mpi/comm_nccl.h"

typedef struct device_rank {
    tr_world world;
    tr_device *device;
    const tr_ops *ops;
    tr_nccl *nccl;
    tr_comm *host; /* all ranks, over MPI */
    int me, size;
    bool unfit; /* these GPUs are not what the program tests: it is skipped, not failed */
} device_rank;

static inline void well(tr_status st, const tr_err *err)
{
    if (st != TR_OK) fail_msg("%s", err->text);
}

static inline void device_well(const device_rank *at, tr_status st)
{
    if (st != TR_OK) fail_msg("%s", at->ops->error(at->device));
}

/* What was given to the main lane is over. comms: the one to keep going meanwhile, or NULL. */
static inline void settle(const device_rank *at, tr_comm *comm)
{
    const uint64_t t = at->ops->ticket(at->device, TR_LANE_MAIN);
    int done;
    while ((done = at->ops->done(at->device, TR_LANE_MAIN, t)) == 0)
        if (comm) tr_comm_progress(comm);
    assert_int_equal(done, 1);
}

static inline void up(const device_rank *at, void *to, const void *from, size_t n)
{
    device_well(at, at->ops->upload(at->device, TR_LANE_MAIN, to, from, n));
}

static inline void down(const device_rank *at, void *to, const void *from, size_t n, tr_comm *comm)
{
    device_well(at, at->ops->download(at->device, TR_LANE_MAIN, to, from, n));
    settle(at, comm);
}

static inline uint32_t noise(uint32_t seed, size_t k)
{
    uint32_t h = (uint32_t)k * 2654435761u + seed * 40503u + 1;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    h *= 3266489917u;
    return h ^ h >> 16;
}

static inline tr_status device_rank_open(device_rank *at, tr_err *err)
{
    const tr_device_options options = {.name = "cuda",
                                       .n_threads = 1,
                                       .i_device = at->world.local_rank,
                                       .n_device_ranks = at->world.local_size};
    tr_status st = tr_device_open(&at->device, &at->ops, &options, err);
    st = tr_agree(&at->world, st, err);
    if (st != TR_OK) return st;
    at->me = at->world.rank;
    at->size = at->world.size;
    st = tr_comm_split(&at->host, &at->world, 0, at->me, "test", err);
    const tr_bound mine = tr_binding_of(&at->world, at->device);
    tr_bound *all = NULL;
    if (st == TR_OK) st = tr_binding_gather(&all, at->host, &mine, err);
    if (st == TR_OK) st = tr_binding_check(all, at->size, err);
    free(all);
    if (st == TR_OK) st = tr_nccl_open(&at->nccl, &at->world, at->device, at->ops, err);
    return st;
}

/* After the communicators of its own. */
static inline void device_rank_close(device_rank *at)
{
    tr_nccl_close(at->nccl);
    at->ops->close(at->device);
    tr_comm_free(at->host);
}

/* Starts MPI, on 2 to `most` ranks, and opens the rank's things; then `open`, the program's own, with `place`, whose first member
 * is a device_rank. -1: go on; else what the program ends with, at once. */
static inline int device_rank_begin(void *place, const char *name, int most,
                                    tr_status (*open)(void *place, tr_err *err))
{
    device_rank *at = place;
    tr_err err = {0};

    if (tr_world_start(&at->world, &err) != TR_OK) {
        fprintf(stderr, "%s: %s\n", name, err.text);
        return 1;
    }
    if (at->world.size == 1 || at->world.size > most) {
        tr_world_finish(TR_OK);
        printf("skipped: 2 to %d ranks are wanted, with a GPU each\n", most);
        return 77;
    }
    tr_status st = device_rank_open(at, &err);
    if (st == TR_OK) st = open(place, &err);
    if (st == TR_OK) return -1;
    const bool failed = at->device && !at->unfit;
    if (at->world.rank == 0) printf("%s: %s\n", failed ? "failed" : "skipped", err.text);
    if (failed) tr_world_abort(st);
    tr_world_finish(TR_OK);
    return 77;
}

/* A failed check ends a test on one rank only: the others may wait for it for ever. */
static inline void device_rank_leave(int n_failed)
{
    if (n_failed) tr_world_abort(TR_E_COMM);
}

#endif
