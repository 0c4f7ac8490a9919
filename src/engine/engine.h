/* The step loop around scheduler, pages, model and step ring. Two thread-safe ends, submit and take (the batch reader and
 * the journal writer are threads; serve will be another pair), and one MPI thread in the middle that runs the steps. */
#ifndef TR_ENGINE_ENGINE_H
#define TR_ENGINE_ENGINE_H

#include "base/log.h"
#include "base/region.h"
#include "engine/request.h"
#include "model/model.h"
#include "mpi/comm.h"
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
    bool is_leader; /* rank 0 of its replica: schedules; followers only run the plans they get */
} tr_engine_options;

typedef struct tr_engine_stats {
    uint64_t steps, prefill_tokens,
        decode_tokens; /* computed: recomputation after preemption counts as prefill */
    uint64_t preemptions, finished, failed;
    uint64_t prefill_ns, decode_ns; /* time of steps with, and without, prompt rows */
    uint64_t mixed_decode_tokens;   /* generated in steps that also had prompt rows */
    uint64_t
        generated_tokens; /* of answers; decode_tokens lack each answer's first, which a prompt's row gives */
    uint64_t prompt_tokens,
        cached_tokens; /* of requests begun; of these, found in the prefix cache */
    int running, waiting, pages_held, pages_cached, pages_total; /* cached: held by nobody now */
} tr_engine_stats;

/* Keeps model, tokenizer (may be NULL), control (the communicator plans travel on, size 1: self), log, regions. */
tr_status tr_engine_create(tr_engine **out, tr_model *model, const tr_tokenizer *tokenizer,
                           tr_comm *control, const tr_engine_options *options, tr_log *log,
                           tr_regions *regions, tr_err *err);
void tr_engine_free(tr_engine *e);

/* Any thread. Takes the request (on failure too: it is freed). Blocks while the queue is full. TR_E_STOP: the engine is
 * stopping. A request that can never fit (prompt + max_tokens > max_model_len, or more pages than there are) comes
 * back as a TR_EVENT_FAILED. */
tr_status tr_engine_submit(tr_engine *e, tr_request *takes, tr_err *err);
/* Any thread: no more submits will come; run returns when everything has finished. */
void tr_engine_close(tr_engine *e);
/* Any thread: leave at the next step boundary; running and waiting requests are dropped without an event. */
void tr_engine_stop(tr_engine *e);
/* Any thread: 1 and *out (the caller's), 0 after timeout_ms without an event, -1 when run has returned and all is taken. */
int tr_engine_take(tr_engine *e, tr_event **out, int timeout_ms);

/* Main thread, leader and followers, until closed and finished (TR_OK), stopped (TR_E_STOP) or failed. */
tr_status tr_engine_run(tr_engine *e, tr_err *err);

tr_engine_stats tr_engine_stats_get(tr_engine *e); /* any thread */

#endif
