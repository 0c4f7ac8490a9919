/* How fast this rank runs its steps, and how fast the others do: the overlap of the pipeline's stages, and who holds up all
 * others (reliability.md 4, row 17). Every rank has one, on its main thread; nothing waits because of it: what ranks tell each
 * other, every few seconds when the leader says so, travels while the next steps run.
 *
 * Times are the host's. A device that runs behind the host hides in them: there its own compute is what the host takes to
 * enqueue a step, and the profile's device times tell the rest. */
#ifndef TR_ENGINE_PACE_H
#define TR_ENGINE_PACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/log.h"
#include "mpi/comm.h"

/* What one rank measured over some steps. Sent between ranks as it is. */
typedef struct tr_pace_sample {
    uint64_t n_even,
        own_ns; /* steps that gave all replicas alike to do, and this rank's own compute in them: no waiting */
    /* Steps during which all stages had something: time between the ends of this rank's steps, of which it ran; waited for
     * rows of the stage before (or its place to put them); the rest is waiting for a plan. */
    uint64_t n_full, full_ns, run_ns, rows_ns;
    int32_t stage, unused;
    char host[64];
} tr_pace_sample;

typedef struct tr_pace_options {
    tr_comm *control; /* all ranks, the leader is 0; kept */
    const char *host; /* of this rank; copied */
    int i_stage, n_stages;
    int ring; /* steps in flight at most: a message of a step has come when that many more have begun */
    double window_s;    /* between two comparisons, at least; 0: 3 */
    uint64_t repeat_ns; /* before a rank is named again; 0: 60 s */
    tr_log *log;        /* the leader's warnings; kept */
} tr_pace_options;

typedef struct tr_pace tr_pace;

tr_status tr_pace_create(tr_pace **out, const tr_pace_options *options, tr_err *err);
void tr_pace_free(tr_pace *p);

/* Around a step's forward. waited_ns, rows_ns: counters of the time this rank has waited in the model's communicators, in
 * all of them and for other stages. full: all stages have something to do meanwhile. even: the replicas have alike many rows. */
void tr_pace_begin(tr_pace *p, uint64_t waited_ns, uint64_t rows_ns);
void tr_pace_end(tr_pace *p, uint64_t waited_ns, uint64_t rows_ns, bool full, bool even);

/* Leader: it is time to compare; to be said to all ranks with the next step. */
bool tr_pace_due(const tr_pace *p);
/* All ranks, at the same step: this window's sample is on its way. */
tr_status tr_pace_tell(tr_pace *p, tr_err *err);
/* Everybody's samples if they are due to have come, `now` or not at all; the leader names who is slow. */
tr_status tr_pace_hear(tr_pace *p, bool now, tr_err *err);
/* All ranks, behind the last step: everybody's sample of the whole run. On the leader *overlap is tr_pace_overlap of it, and
 * the log (debug) gets the stages' shares. */
tr_status tr_pace_sum_up(tr_pace *p, double *overlap, tr_err *err);

/* ---- pure: what samples say ---------------------------------------------------------------------------------------- */

enum { TR_PACE_STEPS = 10 }; /* fewer even steps in a window say nothing */

/* The own compute of a rank, for each step, over the median of the ranks of its stage (the lower one of two); where it is
 * the only rank of its stage, of all ranks. 0: not known. median_s, own_s: seconds of a step. */
double tr_pace_ratio(const tr_pace_sample *all, int n, int rank, double *own_s, double *median_s);
/* Shares of the time in which all stages had something to do, [n_stages], a stage's ranks together. Returns how much of it
 * the busiest stage ran: what is missing to 1 is time lost, for that one never lacks work in a pipeline that overlaps; 1 / n_stages
 * (and less) is what steps one after the other come to. 0: never had all something to do. */
typedef struct tr_pace_share {
    double runs, rows, plan;
} tr_pace_share;
double tr_pace_overlap(const tr_pace_sample *all, int n, int n_stages, tr_pace_share *share);

#endif
