/* What this machine can do at most, with the device's threads and instruction set: the yardstick of `trireme bench`. */
#include <config.h>

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <sys/mman.h>

#include <hwloc.h>

#include "base/clock.h"
#include "kernels/cpu/cpu_priv.h"

enum { HUGE_PAGE = 2 << 20, ROUNDS = 5 };

/* Of the block that is read: CACHES times what the machine's last caches hold, in these bounds. A server's hold more than
 * a quarter of a GB, and a block that they hold is no memory. */
static const size_t block_least = (size_t)256 << 20, block_most = (size_t)4 << 30;
enum { CACHES = 4 };

enum {
    FMA_ROUNDS = 250000
}; /* half a millisecond: less than what the system gives others between two */

/* Each member's own part of the block; what it saw goes where the compiler cannot leave it out. */
typedef struct ceiling_work {
    const tr_device *d;
    char *block;
    size_t part;
    atomic_uint_fast64_t seen;
} ceiling_work;

static void touch_member(void *ctx, int i, int n)
{
    const ceiling_work *w = ctx;
    (void)n;
    /* by the thread that reads it: first touch */
    memset(w->block + (size_t)i * w->part, i + 1, w->part);
}

static void read_member(void *ctx, int i, int n)
{
    ceiling_work *w = ctx;
    (void)n;
    atomic_fetch_add(&w->seen, w->d->k.read_sum(w->block + (size_t)i * w->part, w->part));
}

static void fma_member(void *ctx, int i, int n)
{
    ceiling_work *w = ctx;
    (void)n;
    atomic_fetch_add(&w->seen, w->d->k.fma_loop(FMA_ROUNDS + i) > 0.0f);
}

/* Best of some rounds: a ceiling is what is possible, not what is usual. */
static uint64_t best_of(tr_device *d, int n_rounds, tr_team_fn *fn, ceiling_work *w)
{
    uint64_t best = UINT64_MAX;

    for (int r = 0; r < n_rounds; r++) {
        uint64_t begun = tr_now_ns();
        tr_team_run(d->team, fn, w);
        uint64_t took = tr_now_ns() - begun;
        if (took < best) best = took;
    }
    d->ticket += atomic_load(&w->seen) & 1; /* used, so that the work cannot be left out */
    return best;
}

/* All third-level caches of the machine, 0: it tells of none. */
static size_t cache_bytes(void)
{
    hwloc_topology_t topology;
    size_t bytes = 0;

    if (hwloc_topology_init(&topology) != 0) return 0;
    if (hwloc_topology_load(topology) == 0) {
        hwloc_obj_t cache = NULL;
        while ((cache = hwloc_get_next_obj_by_type(topology, HWLOC_OBJ_L3CACHE, cache)))
            bytes += (size_t)cache->attr->cache.size;
    }
    hwloc_topology_destroy(topology);
    return bytes;
}

static size_t block_bytes(void)
{
    const size_t bytes = CACHES * cache_bytes();
    return bytes < block_least ? block_least : bytes > block_most ? block_most : bytes;
}

/* Huge pages, as the weights have. */
static tr_status read_ceiling(tr_device *d, double *bytes_per_s)
{
    const int n = d->n_threads;
    const size_t part = block_bytes() / (size_t)n / HUGE_PAGE * HUGE_PAGE;
    ceiling_work w = {.d = d, .part = part ? part : HUGE_PAGE};
    const size_t all = w.part * (size_t)n;

    w.block = aligned_alloc(HUGE_PAGE, all);
    if (!w.block) return tr_cpu_fail(d, TR_E_MEMORY, "out of memory: %zu bytes to read", all);
    madvise(w.block, all, MADV_HUGEPAGE); /* a wish */
    tr_team_run(d->team, touch_member, &w);
    *bytes_per_s = (double)all / (double)best_of(d, ROUNDS, read_member, &w) * 1e9;
    free(w.block);
    return TR_OK;
}

static void fma_ceiling(tr_device *d, double *flops_per_s)
{
    ceiling_work w = {.d = d};
    const double flops = 2.0 * (double)FMA_ROUNDS * d->k.fma_width * d->n_threads;

    *flops_per_s = flops / (double)best_of(d, 8 * ROUNDS, fma_member, &w) * 1e9;
}

tr_status tr_cpu_ceilings(tr_device *d, tr_ceilings *out)
{
    *out = (tr_ceilings){0};
    fma_ceiling(d, &out->fma_flops_per_s);
    return read_ceiling(d, &out->read_bytes_per_s);
}
