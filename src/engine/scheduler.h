/* The scheduler: waiting and running choices, their pages and slots; makes the plan of every step and takes in what the step
 * sampled. On the leader's main thread, without a device, tested alone against a simulated model.
 *
 * First come, first served: the order of arrival (then of choices) decides who is planned first, who is admitted first, and,
 * when pages run out, who is preempted: always the youngest running. The oldest unfinished sequence therefore always
 * gets on, and everybody finishes. Whoever begins with the tokens of somebody running that are not in the cache yet waits
 * until they are; others pass. That one runs, so it gets on, or is preempted, which ends the waiting too. What a row computes
 * never depends on this: a prompt row below index_topk is dense, every other row is absorbed, also when it is computed again
 * (architecture.md 4). */
#ifndef TR_ENGINE_SCHEDULER_H
#define TR_ENGINE_SCHEDULER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "engine/request.h"
#include "model/model.h"
#include "model/plan.h"

/* Where the bytes of tokens come from (a tokenizer); bytes NULL: answers have no text. */
typedef struct tr_vocabulary {
    const void *ctx; /* kept */
    const char *(*bytes)(const void *ctx, int32_t token, size_t *n);
} tr_vocabulary;

typedef struct tr_scheduler_options {
    tr_plan_limits limits;
    int max_batch_tokens; /* prompt rows (and rows computed again) of one step */
    int max_sequences; /* running choices; slots, head rows and rows of the limits must do for one row each */
    int max_model_len;
    int ring; /* steps in flight at most */
    /* Pipeline stages. With more than one a choice's next token must be known before its row is planned, and a step takes only
     * its share of the choices that generate, so that every stage has some to work on. 0: one. */
    int n_micro;
    bool prefix_cache; /* prompts that begin alike share pages */
    int32_t eos, bos, pad;
    tr_vocabulary vocabulary;
} tr_scheduler_options;

typedef struct tr_scheduler_stats {
    uint64_t steps, prefill_tokens, decode_tokens, mixed_decode_tokens; /* of committed steps */
    uint64_t
        generated_tokens; /* sampled and kept: a first token comes from a prompt's row, not from a decode row */
    uint64_t preemptions, finished, failed;
    uint64_t
        continued; /* requests begun, or finished at once, with what another run had saved of them */
    uint64_t prompt_tokens,
        cached_tokens; /* of requests admitted; of these, not computed for them */
    uint64_t pages_evicted;
    int running, waiting; /* choices */
    int pages_held, pages_cached,
        pages_total; /* cached: kept for the next with these tokens, held by nobody */
} tr_scheduler_stats;

typedef struct tr_scheduler tr_scheduler;

/* TR_E_USAGE: the limits cannot hold max_sequences; TR_E_MEMORY. */
tr_status tr_scheduler_create(tr_scheduler **out, const tr_scheduler_options *options, tr_err *err);
void tr_scheduler_free(tr_scheduler *s); /* drops what has not been taken, requests too */

/* A request to the end of the queue, from the beginning or from its progress (which is then freed, or marked unfit), as an event of which only request and submitted_ns are filled in. Takes it; it comes
 * back from tr_scheduler_event, DONE or FAILED, or right here when it is over at once (refused, or nothing to compute:
 * the caller's then); NULL otherwise. Streaming is refused until serve comes. Everything a request needs is allocated here, but for its outputs
 * (tokens, scores, text, counts of penalties), which grow geometrically. */
tr_event *tr_scheduler_add(tr_scheduler *s, tr_event *takes);
/* Fewer choices wait than could run: the next request may come. */
bool tr_scheduler_wants(const tr_scheduler *s);
/* How many of its prompt's tokens a request would find here, in whole pages: in the prefix index, or in it once requests that
 * are here already have run. 0 for one whose prompt is scored: it computes every row. */
int tr_scheduler_known(const tr_scheduler *s, const tr_request *r);
bool tr_scheduler_idle(const tr_scheduler *s); /* nobody waits or runs */
/* From now on no request is begun. Those begun go on, but for those that need more than `most` further tokens of one choice
 * for sure (no end token, no stop string can end them before): their choices leave slots and pages for good, their tokens
 * stay. To be called again as time runs out. Returns how many requests go on. */
int tr_scheduler_drain(tr_scheduler *s, int64_t most);

/* Copies of how far every unfinished request has come (engine/progress.h), in front of *list; those without a token or score
 * have none. 0, or -1: out of memory. At any step boundary: tokens in flight are not in it. */
int tr_scheduler_progress(const tr_scheduler *s, tr_progress **list);

/* The next step's plan, valid until the next call; NULL in *plan: nothing can be planned before a commit (or at all). With
 * fewer than `ring` steps in flight. Fails only when the builder refuses, which limits rule out. */
tr_status tr_scheduler_plan(tr_scheduler *s, const tr_plan **plan, tr_err *err);
const tr_plan *tr_scheduler_stop_plan(tr_scheduler *s); /* the last one; valid like the others */
int tr_scheduler_in_flight(const tr_scheduler *s);
int tr_scheduler_prefill_rows(const tr_scheduler *s); /* of the oldest step in flight */
/* What the oldest step in flight sampled. */
void tr_scheduler_commit(tr_scheduler *s, const tr_step_output *out);

tr_event *tr_scheduler_event(tr_scheduler *s); /* a finished request, or NULL */

tr_scheduler_stats tr_scheduler_stats_get(const tr_scheduler *s);
/* Every page that nobody holds leaves the prefix index. */
void tr_scheduler_clear_cache(tr_scheduler *s);
/* For tests: every page's references equal the holders there are, and what is still to be written has one holder. */
bool tr_scheduler_consistent(const tr_scheduler *s);

#endif
