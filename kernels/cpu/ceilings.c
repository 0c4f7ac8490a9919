/* What this machine can do at most, with the device's threads and instruction set: the yardstick of `trireme bench`. */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/cpu/cpu_priv.h"

enum { BLOCK_BYTES = 256 << 20, ROUNDS = 5 };

/* Best of some rounds: a ceiling is what is possible, not what is usual. */
static tr_status read_ceiling(tr_device *d, double *bytes_per_s)
{
    const int n = d->n_threads;
    const size_t part = (size_t)BLOCK_BYTES / (size_t)n / 4096 * 4096, all = part * (size_t)n;
    uint64_t best = UINT64_MAX, seen = 0;
    char *block = aligned_alloc(4096, all);

    if (!block) return tr_cpu_fail(d, TR_E_MEMORY, "out of memory: %zu bytes to read", all);
#pragma omp parallel for num_threads(n) schedule(static, 1)
    for (int i = 0; i < n; i++)
        memset(block + (size_t)i * part, i + 1,
               part); /* by the thread that reads it: first touch */
    for (int r = 0; r < ROUNDS; r++) {
        uint64_t begun = tr_now_ns();
#pragma omp parallel for num_threads(n) schedule(static, 1) reduction(+ : seen)
        for (int i = 0; i < n; i++)
            seen += d->k.read_sum(block + (size_t)i * part, part);
        uint64_t took = tr_now_ns() - begun;
        if (took < best) best = took;
    }
    free(block);
    d->ticket += seen & 1; /* the sum is used, so that the reads cannot be left out */
    *bytes_per_s = (double)all / (double)best * 1e9;
    return TR_OK;
}

static void fma_ceiling(tr_device *d, double *flops_per_s)
{
    const long rounds =
        250000; /* half a millisecond: less than what the system gives others between two */
    const int n = d->n_threads;
    uint64_t best = UINT64_MAX;
    double seen = 0;

    for (int r = 0; r < 8 * ROUNDS; r++) {
        uint64_t begun = tr_now_ns();
#pragma omp parallel for num_threads(n) schedule(static, 1) reduction(+ : seen)
        for (int i = 0; i < n; i++)
            seen += (double)d->k.fma_loop(rounds + i);
        uint64_t took = tr_now_ns() - begun;
        if (took < best) best = took;
    }
    d->ticket += seen > 0;
    *flops_per_s = 2.0 * (double)rounds * d->k.fma_width * n / (double)best * 1e9;
}

tr_status tr_cpu_ceilings(tr_device *d, tr_ceilings *out)
{
    *out = (tr_ceilings){0};
    fma_ceiling(d, &out->fma_flops_per_s);
    return read_ceiling(d, &out->read_bytes_per_s);
}
