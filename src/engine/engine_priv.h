/* The engine's own struct, shared by engine.c (the step loop, on the main thread) and engine_ends.c (submit, take and what else
 * other threads call). */
#ifndef TR_ENGINE_ENGINE_PRIV_H
#define TR_ENGINE_ENGINE_PRIV_H

#include <pthread.h>
#include <time.h>

#include "base/clock.h"
#include "engine/engine.h"
#include "engine/expect.h"
#include "engine/pace.h"
#include "engine/scheduler.h"
#include "engine/wire.h"

enum { TR_ENGINE_RING_MAX = 64 };

typedef struct tr_engine_slot { /* a place of the step ring */
    tr_step step;
    char *staging; /* [n_replicas * bytes_max] the plans' bytes as they came */
    uint64_t *at;  /* [n_replicas] where each begins; step.plan is this rank's replica's */
    bool *planned; /* [n_replicas] leader: its scheduler has this step in flight */
    char *report;  /* [report_bytes_max] what this rank tells the leader of the step */
    tr_wire wire;  /* staging and report, on their way */
    uint64_t begun_ns;
    uint64_t number, t0_ns, t1_ns; /* for the observer; t1_ns 0: not done yet */
    int64_t n_rows;                /* of all replicas */
} tr_engine_slot;

struct tr_engine {
    /* Fixed after creation. */
    tr_model *model;
    tr_comm *control;
    tr_log *log;
    tr_regions *regions;
    tr_engine_options options;
    tr_plan_limits limits;
    size_t bytes_max, report_bytes_max;
    int *reporter; /* [options.n_replicas] */
    int region_plan, region_commit, region_report, region_rest, region_done;
    tr_watchdog *watch;
    tr_engine_observer observer;
    tr_pace *pace;

    /* The main thread's alone. */
    tr_scheduler **scheduler; /* [options.n_replicas] leader only */
    tr_step_output *
        heard; /* [options.n_replicas] leader: what a step of another rank's replica sampled, in heard_text */
    char **heard_text; /* [report_bytes_max] each */
    uint64_t n_steps;  /* run here: the same number on every rank */
    tr_expect expect;
    bool broken;
    tr_engine_slot slot[TR_ENGINE_RING_MAX];
    int i_slot, n_flight; /* the oldest step in flight, and how many */
    uint64_t last_done_ns;
    uint64_t prefill_ns, decode_ns;
    double overlap;      /* of the pipeline, when all is over */
    tr_drain drain;      /* leader: when and how the run ends early */
    uint64_t drained_ns; /* leader: when the schedulers were last told what still fits */
    int n_go_on;         /* leader, draining: requests that may still finish */
    uint64_t word,
        heard_word;  /* an exchange of what ranks were asked (base/stop.h); what was heard */
    tr_ticket words; /* of the exchange under way */
    bool exchanging, rests;
    uint64_t exchanged_ns;

    /* Everybody's, under the lock. */
    pthread_mutex_t lock;
    pthread_cond_t room, work,
        news; /* the queue has room; the main thread has something to do; there is an event */
    tr_event **queue; /* [options.queue_max] submitted, a circle */
    int i_queue, n_queue;
    tr_event *
        *event; /* [event_cap] finished, a circle; as large as what is submitted and not taken */
    size_t i_event, n_event, event_cap, n_outstanding;
    uint64_t n_taken; /* events so far */
    bool closed, stopping, ended;
    const char *drain_reason; /* NULL: not draining */
    bool progress_wanted, progress_made;
    tr_progress *progress; /* progress_made: a list */
    uint64_t progress_ns;
    tr_engine_stats stats;
};

/* What the oldest step took: it waits for the one before it, so its time begins where that one's ended, and ends when its results
 * are here; but one stage of CPUs has computed the next one by then, and knows when this one was done. */
static inline uint64_t tr_engine_took(tr_engine *e, const tr_engine_slot *s)
{
    const uint64_t done = e->options.n_stages == 1 ? s->t1_ns : tr_now_ns();
    const uint64_t from = s->begun_ns > e->last_done_ns ? s->begun_ns : e->last_done_ns;

    e->last_done_ns = done;
    return done > from ? done - from : 0;
}

/* Of the events that nobody has taken, in front of *list: 0, or -1: out of memory. */
int tr_engine_ended_progress(tr_engine *e, tr_progress **list);

/* A moment of the monotonic clock, for waits on the engine's conditions. */
struct timespec tr_engine_deadline(int ms);

#endif
