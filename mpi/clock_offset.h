/* Clocks: how far rank 0's monotonic clock (base/clock.h) is ahead of this rank's. Main thread, collective. */
#ifndef TR_MPI_CLOCK_OFFSET_H
#define TR_MPI_CLOCK_OFFSET_H

#include <stdint.h>

#include "base/err.h"
#include "mpi/start.h"

typedef struct tr_clock_offset {
    int64_t offset_ns; /* add to this rank's clock to get rank 0's; 0 on rank 0 */
    uint64_t rtt_ns;   /* of the ping-pong it comes from: it is right within half of this */
    uint64_t at_ns;    /* when, by this rank's clock */
} tr_clock_offset;

/* 64 ping-pongs of each rank with rank 0, one rank after the other; the one that was back soonest counts, as it had the
 * least chance to be late on one way. */
tr_status tr_clock_measure(tr_clock_offset *out, const tr_world *world, tr_err *err);

#endif
