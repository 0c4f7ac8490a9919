/* What travels around a step between the leader and the other ranks: plans out, what was sampled back. Both go on by
 * themselves while the step runs, so nobody waits for a rank that is still busy with an earlier step; what is on its way
 * belongs to a place of the step ring and is waited for before that place is used again, which also keeps the leader from
 * running more than a ring ahead. Main thread only. */
#ifndef TR_ENGINE_WIRE_H
#define TR_ENGINE_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "mpi/comm.h"

/* What goes ahead of the plans of a step: one block per replica, one behind the other, each a multiple of 8 bytes long. */
enum {
    TR_STEP_FULL =
        1, /* all stages of the pipeline have something to do while this step is planned */
    TR_STEP_PACE = 2, /* behind this step every rank says how fast it is (pace.h) */
    TR_STEP_ASK = 4,  /* beside this step every rank says what it was asked (base/stop.h) */
    TR_STEP_IDLE = 8, /* no plans follow: there is nothing to do but to ask */
};
typedef struct tr_announcement {
    uint64_t bytes;  /* of all blocks that follow */
    uint32_t status; /* with STOP plans: how the leader ended, so that all ranks end alike */
    uint32_t flags;
} tr_announcement;

enum { TR_WIRE_MAX = 3 }; /* announcement, plans, report */

typedef struct tr_wire { /* of one place of the ring; begins as zeros */
    tr_announcement announced;
    tr_ticket ticket[TR_WIRE_MAX];
    int n;
} tr_wire;

/* Nothing of this place is on its way any more: its buffers may be written again. */
tr_status tr_wire_settle(tr_wire *w, tr_comm *control, tr_err *err);

/* Rank 0: *announced and that many bytes of `plans` (idle: none) to all. Both are kept until settled. */
tr_status tr_wire_give(tr_wire *w, tr_comm *control, tr_announcement announced, void *plans,
                       tr_err *err);
/* The others: rank 0's announcement and plans. TR_E_COMM when fewer than bytes_min or more than bytes_max are announced, or
 * a status that is none. `plans` may be read, and must not be written until settled. */
tr_status tr_wire_get(tr_wire *w, tr_comm *control, void *plans, size_t bytes_min, size_t bytes_max,
                      tr_err *err);
/* This rank's report to rank 0. Kept until settled. */
tr_status tr_wire_tell(tr_wire *w, tr_comm *control, const void *report, size_t bytes, tr_err *err);

#endif
