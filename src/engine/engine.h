/* With several ranks the leader (rank 0 of `control`) has one scheduler per replica and sends the plans of all replicas to all
 * ranks, one message a step; so every rank takes part in every step, with an idle plan where its replica has nothing to do, and
 * requests and answers stay on one rank. (parallel.md 4.2 has a leader per replica and an exchange of their counts before
 * every step; planning costs microseconds, so one rank can do it for all, and there is nothing to exchange.)
 *
 * The step loop around scheduler, pages, model and step ring. Two thread-safe ends, submit and take (the batch reader and
 * the journal writer are threads; serve will be another pair), and one MPI thread in the middle that runs the steps.
 *
 * A signal that reaches any rank counts (base/stop.h): a few times a second the leader's message says that all ranks exchange
 * what they were asked. */
#ifndef TR_ENGINE_ENGINE_H
#define TR_ENGINE_ENGINE_H

#include "base/log.h"
#include "base/region.h"
#include "engine/drain.h"
#include "engine/progress.h"
#include "engine/request.h"
#include "model/model.h"
#include "mpi/comm.h"
#include "mpi/watchdog.h"
#include "text/tokenizer.h"

typedef struct tr_engine tr_engine;

typedef struct tr_engine_options {
    int max_batch_tokens; /* prompt tokens of one step, at most */
    int max_sequences;    /* running choices, at most */
    int max_model_len;    /* prompt + generated tokens of one choice */
    int ring; /* steps in flight: 1, or 2 (a step is planned before the previous one is read back) */
    int queue_max; /* requests waiting in submit's queue before submit blocks; 0: 4 * max_sequences */
    int32_t eos, bos, pad; /* token ids, -1: none */
    bool no_prefix_cache;  /* every prompt is computed in full */
    bool is_leader; /* rank 0: schedules for every replica; followers only run the plans they get */
    /* Data parallelism: replicas of the attention, each with requests and pages of its own. 0: one. */
    int n_replicas, i_replica; /* this rank's */
    /* Pipeline stages: one step more is in flight at most, and a choice is in one of them at a time. 0: one. */
    int n_stages, i_stage; /* this rank's */
    const char *host;      /* this rank's, for messages; kept; NULL: unknown */
    /* [n_replicas] the rank of `control` that tells the leader what a replica's steps sampled; NULL: the leader itself. */
    const int *reporter;
    tr_drain_options
        drain; /* the leader's: how a signal or the time budget ends the run; zeros: at the next boundary */
} tr_engine_options;

typedef struct tr_engine_stats {
    uint64_t steps, prefill_tokens,
        decode_tokens; /* computed: recomputation after preemption counts as prefill */
    uint64_t preemptions, finished, failed;
    uint64_t
        continued; /* requests that went on with the tokens another run had saved: begun, or finished with them */
    uint64_t prefill_ns, decode_ns; /* time of steps with, and without, prompt rows */
    uint64_t mixed_decode_tokens;   /* generated in steps that also had prompt rows */
    uint64_t
        generated_tokens; /* of answers; decode_tokens lack each answer's first, which a prompt's row gives */
    uint64_t prompt_tokens,
        cached_tokens;      /* of requests begun; of these, found in the prefix cache */
    uint64_t pages_evicted; /* from the prefix cache */
    double
        overlap; /* leader, after run: how much of the time in which all pipeline stages had something to do the busiest
                       one ran (pace.h); 0: no such time */
    int running, waiting, pages_held, pages_cached, pages_total; /* cached: held by nobody now */
} tr_engine_stats;

/* A step as it went on this rank. */
typedef struct tr_engine_seen {
    uint64_t step;       /* its number, the same on all ranks, from 1 */
    uint64_t t0_ns;      /* its plan was there */
    uint64_t t1_ns;      /* its results were there */
    uint64_t plan_ns;    /* planning it, or waiting for its plan */
    const tr_plan *plan; /* of this rank's replica; valid during the call */
} tr_engine_seen;

/* Who is told of every step, by the main thread: before its work begins, and when it is done, which may be behind the begin of
 * the next ones. Must not wait; any call may be NULL. */
typedef struct tr_engine_observer {
    void *ctx;
    void (*begin)(void *ctx, uint64_t step, const tr_plan *plan, uint64_t t0_ns);
    void (*step)(void *ctx, const tr_engine_seen *seen);
} tr_engine_observer;

/* Keeps model, tokenizer (may be NULL), control (the communicator plans travel on: all ranks; size 1: self), log, regions, watch. */
tr_status tr_engine_create(tr_engine **out, tr_model *model, const tr_tokenizer *tokenizer,
                           tr_comm *control, const tr_engine_options *options, tr_log *log,
                           tr_regions *regions, tr_err *err);
/* Tell a watchdog of every step (mpi/watchdog.h). Kept; NULL: none. */
void tr_engine_watch(tr_engine *e, tr_watchdog *watch);
void tr_engine_observe(tr_engine *e, tr_engine_observer observer); /* before run */
void tr_engine_free(tr_engine *e);

/* Any thread. Takes the request (on failure too: it is freed). Blocks while the queue is full. TR_E_STOP: the engine is
 * stopping. A request that can never fit (prompt + max_tokens > max_model_len, or more pages than there are) comes
 * back as a TR_EVENT_FAILED. */
tr_status tr_engine_submit(tr_engine *e, tr_request *takes, tr_err *err);
/* Any thread: no more submits will come; run returns when everything has finished. */
void tr_engine_close(tr_engine *e);
/* Any thread: leave at the next step boundary; running and waiting requests are dropped without an event. */
void tr_engine_stop(tr_engine *e);
/* Any thread, the leader's: nothing new is begun because a signal came (to any rank) or the time budget ends; what runs may
 * still finish (engine/drain.h). */
bool tr_engine_draining(tr_engine *e);
/* Why: "USR1", "the time budget"; NULL while it is not draining. */
const char *tr_engine_drain_reason(tr_engine *e);
/* Any thread: 1 and *out (the caller's), 0 after timeout_ms without an event, -1 when run has returned and all is taken. */
int tr_engine_take(tr_engine *e, tr_event **out, int timeout_ms);

/* Any thread: at the next step boundary copy how far every unfinished request has come, and every one that has ended and whose
 * event nobody has taken (tr_progress.n_event): until it is recorded, it is what a killed run would lose. */
void tr_engine_ask_progress(tr_engine *e);
/* Any thread: the newest copy nobody has taken (the caller's: tr_progress_free_list; may be empty) and the time it took, which
 * the steps lost. False: there is none. When run ends with TR_E_STOP it leaves one, asked or not. */
bool tr_engine_take_progress(tr_engine *e, tr_progress **list, uint64_t *spent_ns);

/* Main thread, leader and followers, until closed and finished (TR_OK), stopped or drained (TR_E_STOP on every rank, at the
 * same step) or failed. What was begun before a drain and finished in it is TR_OK when nothing else had been submitted. */
tr_status tr_engine_run(tr_engine *e, tr_err *err);
/* The leader's main thread, instead of run: what it needs is not there, and the other ranks, which wait in theirs for the first
 * step, are let go. After run: nothing happens. */
void tr_engine_dismiss(tr_engine *e);
/* After run: it failed in the middle of a step, and other ranks may be waiting in it for ever. Only ending the job helps. */
bool tr_engine_broken(const tr_engine *e);

tr_engine_stats tr_engine_stats_get(tr_engine *e); /* any thread */

#endif
