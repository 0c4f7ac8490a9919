/* What the benches of communicators do with their member's device: memory that goes all at once, statuses as errors, waiting. */
#ifndef TR_COMMAND_BENCH_DEVICE_H
#define TR_COMMAND_BENCH_DEVICE_H

#include "kernels/kernels.h"

enum { TR_BENCH_OWNED = 32 };

typedef struct tr_bench_device { /* ops and device are given, the rest begins as zeros */
    const tr_ops *ops;
    tr_device *device;
    void *owned[TR_BENCH_OWNED];
    int n_owned;
} tr_bench_device;

/* st; a failure of the operation `what` with the device's own words. */
tr_status tr_bench_device_status(const tr_bench_device *b, const char *what, tr_status st,
                                 tr_err *err);

/* *out (any pointer): memory of a tr_memory_kind, this bench's until tr_bench_device_release. */
tr_status tr_bench_device_take(tr_bench_device *b, size_t bytes, int kind, void *out, tr_err *err);
void tr_bench_device_release(tr_bench_device *b);

/* What was given to the main lane is over; TR_E_COMM after 30 s, since it takes milliseconds once everybody is there. */
tr_status tr_bench_device_settle(const tr_bench_device *b, tr_err *err);

#endif
