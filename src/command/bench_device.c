#include <config.h>

#include "command/bench_device.h"

#include <stdint.h>
#include <string.h>

#include "base/clock.h"

enum { LIMIT_S = 30 };

tr_status tr_bench_device_status(const tr_bench_device *b, const char *what, tr_status st,
                                 tr_err *err)
{
    return st == TR_OK ? TR_OK : tr_fail_of(err, st, what, b->ops->error(b->device));
}

tr_status tr_bench_device_take(tr_bench_device *b, size_t bytes, int kind, void *out, tr_err *err)
{
    void *d = NULL;

    if (b->n_owned == TR_BENCH_OWNED)
        return tr_fail(err, TR_E_MEMORY, "a bench has room for %d pieces of memory",
                       TR_BENCH_OWNED);
    const tr_status st = b->ops->alloc(b->device, bytes, kind, &d);
    memcpy(out, &d, sizeof d);
    if (st == TR_OK) b->owned[b->n_owned++] = d;
    return tr_bench_device_status(b, "alloc", st, err);
}

void tr_bench_device_release(tr_bench_device *b)
{
    while (b->n_owned > 0)
        b->ops->release(b->device, b->owned[--b->n_owned]);
}

tr_status tr_bench_device_settle(const tr_bench_device *b, tr_err *err)
{
    const uint64_t until_ns = tr_now_ns() + UINT64_C(1000000000) * LIMIT_S,
                   ticket = b->ops->ticket(b->device, TR_LANE_MAIN);
    int done;

    while ((done = b->ops->done(b->device, TR_LANE_MAIN, ticket)) == 0 && tr_now_ns() < until_ns)
        continue;
    if (done == 0)
        return tr_fail(err, TR_E_COMM, "the other members' rows have not come within %d s",
                       LIMIT_S);
    return tr_bench_device_status(b, "bench", done < 0 ? TR_E_DEVICE : TR_OK, err);
}
