#include <config.h>

#include "engine/engine.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/size.h"
#include "base/stop.h"
#include "engine/scheduler.h"

enum { POLL_MS = 100, MOST_RING = 8 };

/* What goes ahead of every plan block. */
typedef struct announcement {
    uint64_t bytes;  /* of the block that follows */
    uint64_t status; /* with a STOP plan: how the leader ended, so that all ranks end alike */
} announcement;

typedef struct slot { /* a place of the step ring */
    tr_step step;
    tr_plan *staging; /* [bytes_max] the plan's bytes as they came; step.plan */
    uint64_t begun_ns;
} slot;

struct tr_engine {
    /* Fixed after creation. */
    tr_model *model;
    tr_comm *control;
    tr_log *log;
    tr_regions *regions;
    tr_engine_options options;
    tr_plan_limits limits;
    size_t bytes_max;
    int region_plan, region_commit;

    /* The main thread's alone. */
    tr_scheduler *scheduler; /* leader only */
    slot slot[MOST_RING];
    int i_slot, n_flight; /* the oldest step in flight, and how many */
    uint64_t last_done_ns;
    uint64_t prefill_ns, decode_ns;

    /* Everybody's, under the lock. */
    pthread_mutex_t lock;
    pthread_cond_t room, work,
        news; /* the queue has room; the main thread has something to do; there is an event */
    tr_event **queue; /* [options.queue_max] submitted, a circle */
    int i_queue, n_queue;
    tr_event *
        *event; /* [event_cap] finished, a circle; as large as what is submitted and not taken */
    size_t i_event, n_event, event_cap, n_outstanding;
    bool closed, stopping, ended;
    tr_engine_stats stats;
};

/* ---- creation ----------------------------------------------------------------------------------- */

static const char *token_bytes(const void *tokenizer, int32_t token, size_t *n)
{
    return tr_tokenizer_bytes(tokenizer, token, n);
}

/* Waits are intervals: the monotonic clock. */
static bool make_locks(tr_engine *e)
{
    pthread_condattr_t attr;
    bool ok = pthread_condattr_init(&attr) == 0;

    if (!ok) return false;
    ok = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC) == 0 &&
         pthread_mutex_init(&e->lock, NULL) == 0;
    if (ok) {
        pthread_cond_init(&e->room, &attr); /* neither of these can fail on Linux */
        pthread_cond_init(&e->work, &attr);
        pthread_cond_init(&e->news, &attr);
    }
    pthread_condattr_destroy(&attr);
    return ok;
}

static tr_status make_steps(tr_engine *e, tr_err *err)
{
    for (int i = 0; i < e->options.ring; i++) {
        slot *s = &e->slot[i];
        s->staging = malloc(e->bytes_max);
        if (!s->staging)
            return tr_fail(err, TR_E_MEMORY, "out of memory for plans of %zu bytes", e->bytes_max);
        tr_status st = tr_step_create(&s->step, e->model, err);
        if (st) return st;
        s->step.plan = s->staging;
    }
    return TR_OK;
}

static tr_status make_scheduler(tr_engine *e, const tr_tokenizer *tokenizer, tr_err *err)
{
    const tr_engine_options *o = &e->options;
    tr_scheduler_options so = {
        .limits = e->limits,
        .max_batch_tokens = o->max_batch_tokens,
        .max_sequences = o->max_sequences,
        .max_model_len = o->max_model_len,
        .ring = o->ring,
        .prefix_cache = !o->no_prefix_cache,
        .eos = o->eos,
        .bos = o->bos,
        .pad = o->pad,
        .vocabulary = {.ctx = tokenizer, .bytes = tokenizer ? token_bytes : NULL},
    };

    e->queue = tr_calloc((size_t)o->queue_max, sizeof *e->queue);
    if (!e->queue)
        return tr_fail(err, TR_E_MEMORY, "out of memory for a queue of %d", o->queue_max);
    return tr_scheduler_create(&e->scheduler, &so, err);
}

tr_status tr_engine_create(tr_engine **out, tr_model *model, const tr_tokenizer *tokenizer,
                           tr_comm *control, const tr_engine_options *options, tr_log *log,
                           tr_regions *regions, tr_err *err)
{
    tr_status st = TR_OK;

    *out = NULL;
    if (options->ring < 1 || options->ring > MOST_RING || options->max_sequences < 1 ||
        options->max_sequences > INT32_MAX / 4 || options->queue_max < 0)
        return tr_fail(err, TR_E_USAGE, "engine: ring of %d, %d sequences, queue of %d",
                       options->ring, options->max_sequences, options->queue_max);
    if (options->is_leader != (tr_comm_rank(control) == 0))
        return tr_fail(err, TR_E_USAGE, "engine: rank %d of its replica cannot be %s",
                       tr_comm_rank(control), options->is_leader ? "its leader" : "a follower");
    tr_engine *e = calloc(1, sizeof *e);
    if (!e || !make_locks(e)) {
        free(e);
        return tr_fail(err, TR_E_MEMORY, "out of memory for the engine");
    }
    e->model = model;
    e->control = control;
    e->log = log;
    e->regions = regions;
    e->options = *options;
    if (!e->options.queue_max) e->options.queue_max = 4 * options->max_sequences;
    e->limits = tr_model_limits(model);
    e->bytes_max = tr_plan_bytes_max(&e->limits);
    e->region_plan = tr_region_id(regions, "engine/plan");
    e->region_commit = tr_region_id(regions, "engine/commit");
    e->stats.pages_total = e->limits.n_pages;
    if (!e->bytes_max) {
        st = tr_fail(err, TR_E_USAGE, "engine: no plan can serve %d slots of %d pages",
                     e->limits.n_slots, e->limits.max_pages);
        goto done;
    }
    st = make_steps(e, err);
    if (!st && options->is_leader) st = make_scheduler(e, tokenizer, err);
    if (st) goto done;
    *out = e;
    e = NULL;

done:
    tr_engine_free(e);
    return st;
}

void tr_engine_free(tr_engine *e)
{
    if (!e) return;
    for (int i = 0; i < e->n_queue; i++)
        tr_event_free(e->queue[(e->i_queue + i) % e->options.queue_max]);
    for (size_t i = 0; i < e->n_event; i++)
        tr_event_free(e->event[(e->i_event + i) % e->event_cap]);
    free(e->queue);
    free(e->event);
    tr_scheduler_free(e->scheduler);
    for (int i = 0; i < e->options.ring; i++) {
        tr_step_free(&e->slot[i].step, e->model);
        free(e->slot[i].staging);
    }
    pthread_cond_destroy(&e->news);
    pthread_cond_destroy(&e->work);
    pthread_cond_destroy(&e->room);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

/* ---- the ends: any thread ------------------------------------------------------------------------- */

/* Room for one more event, made while its request is submitted, so that delivering allocates nothing. */
static bool reserve_event(tr_engine *e)
{
    if (e->n_outstanding < e->event_cap) return true;
    size_t cap = e->event_cap ? 2 * e->event_cap : 64;
    tr_event **event = tr_calloc(cap, sizeof *event);
    if (!event) return false;
    for (size_t i = 0; i < e->n_event; i++)
        event[i] = e->event[(e->i_event + i) % e->event_cap];
    free(e->event);
    e->event = event;
    e->event_cap = cap;
    e->i_event = 0;
    return true;
}

tr_status tr_engine_submit(tr_engine *e, tr_request *request, tr_err *err)
{
    tr_status st = TR_OK;
    tr_event *event = calloc(1, sizeof *event);

    if (!event) {
        tr_request_free(request);
        return tr_fail(err, TR_E_MEMORY, "out of memory for a request");
    }
    event->request = request;
    event->submitted_ns = tr_now_ns();
    if (!e->options.is_leader) {
        tr_event_free(event);
        return tr_fail(err, TR_E_USAGE, "requests go to rank 0 of a replica");
    }
    pthread_mutex_lock(&e->lock);
    while (e->n_queue == e->options.queue_max && !e->closed && !e->stopping && !e->ended)
        pthread_cond_wait(&e->room, &e->lock);
    if (e->closed || e->stopping || e->ended) {
        st = tr_fail(err, TR_E_STOP, "the engine takes no more requests");
    } else if (!reserve_event(e)) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory for a request");
    } else {
        e->queue[(e->i_queue + e->n_queue++) % e->options.queue_max] = event;
        e->n_outstanding++;
        event = NULL;
        pthread_cond_signal(&e->work);
    }
    pthread_mutex_unlock(&e->lock);
    tr_event_free(event);
    return st;
}

void tr_engine_close(tr_engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->closed = true;
    pthread_cond_broadcast(&e->work);
    pthread_cond_broadcast(&e->room);
    pthread_mutex_unlock(&e->lock);
}

void tr_engine_stop(tr_engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->stopping = true;
    pthread_cond_broadcast(&e->work);
    pthread_cond_broadcast(&e->room);
    pthread_mutex_unlock(&e->lock);
}

static struct timespec deadline_in(int ms)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += ms % 1000 * 1000000L;
    if (t.tv_nsec >= 1000000000L) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000L;
    }
    return t;
}

int tr_engine_take(tr_engine *e, tr_event **out, int timeout_ms)
{
    const struct timespec deadline = deadline_in(timeout_ms > 0 ? timeout_ms : 0);
    int got = 0;

    *out = NULL;
    pthread_mutex_lock(&e->lock);
    while (!e->n_event && !e->ended && timeout_ms > 0)
        if (pthread_cond_timedwait(&e->news, &e->lock, &deadline) == ETIMEDOUT) break;
    if (e->n_event) {
        *out = e->event[e->i_event];
        e->i_event = (e->i_event + 1) % e->event_cap;
        e->n_event--;
        e->n_outstanding--;
        got = 1;
    } else if (e->ended) {
        got = -1;
    }
    pthread_mutex_unlock(&e->lock);
    return got;
}

tr_engine_stats tr_engine_stats_get(tr_engine *e)
{
    pthread_mutex_lock(&e->lock);
    tr_engine_stats stats = e->stats;
    stats.waiting += e->n_queue;
    pthread_mutex_unlock(&e->lock);
    return stats;
}

/* ---- the main thread's side of the ends -------------------------------------------------------------- */

static void deliver(tr_engine *e, tr_event *event)
{
    pthread_mutex_lock(&e->lock);
    e->event[(e->i_event + e->n_event++) % e->event_cap] = event;
    pthread_cond_signal(&e->news);
    pthread_mutex_unlock(&e->lock);
}

static void publish_stats(tr_engine *e)
{
    const tr_scheduler_stats s = tr_scheduler_stats_get(e->scheduler);

    pthread_mutex_lock(&e->lock);
    e->stats = (tr_engine_stats){
        .steps = s.steps,
        .prefill_tokens = s.prefill_tokens,
        .decode_tokens = s.decode_tokens,
        .mixed_decode_tokens = s.mixed_decode_tokens,
        .generated_tokens = s.generated_tokens,
        .preemptions = s.preemptions,
        .finished = s.finished,
        .failed = s.failed,
        .prefill_ns = e->prefill_ns,
        .decode_ns = e->decode_ns,
        .running = s.running,
        .waiting = s.waiting,
        .prompt_tokens = s.prompt_tokens,
        .cached_tokens = s.cached_tokens,
        .pages_held = s.pages_held,
        .pages_cached = s.pages_cached,
        .pages_total = s.pages_total,
    };
    pthread_mutex_unlock(&e->lock);
}

/* Requests from the queue to the scheduler, no more than it can soon run: the rest holds submit back. */
static void take_in(tr_engine *e)
{
    while (tr_scheduler_wants(e->scheduler)) {
        tr_event *event = NULL;
        pthread_mutex_lock(&e->lock);
        if (e->n_queue) {
            event = e->queue[e->i_queue];
            e->i_queue = (e->i_queue + 1) % e->options.queue_max;
            e->n_queue--;
            pthread_cond_signal(&e->room);
        }
        pthread_mutex_unlock(&e->lock);
        if (!event) return;
        event = tr_scheduler_add(e->scheduler, event);
        if (event) {
            publish_stats(e);
            deliver(e, event);
        }
    }
}

static bool asked_to_stop(tr_engine *e)
{
    pthread_mutex_lock(&e->lock);
    bool stopping = e->stopping;
    pthread_mutex_unlock(&e->lock);
    return stopping || tr_stop_requested();
}

/* Nothing to run: wait for a request. False: none will come. A signal does not wake a condition, hence the polling. */
static bool wait_for_work(tr_engine *e)
{
    pthread_mutex_lock(&e->lock);
    while (!e->n_queue && !e->closed && !e->stopping && !tr_stop_requested()) {
        const struct timespec deadline = deadline_in(POLL_MS);
        pthread_cond_timedwait(&e->work, &e->lock, &deadline);
    }
    bool more = e->n_queue || !e->closed;
    pthread_mutex_unlock(&e->lock);
    return more;
}

/* ---- steps ------------------------------------------------------------------------------------------ */

static tr_status broadcast(tr_engine *e, void *data, size_t bytes, tr_err *err)
{
    tr_ticket ticket;
    tr_status st = tr_comm_broadcast(e->control, 0, data, bytes, &ticket, err);

    return st ? st : tr_comm_wait(e->control, TR_LANE_MAIN, ticket, err);
}

/* A plan comes from another rank, so every rank checks it, the leader too: one path. */
static tr_status run_plan(tr_engine *e, slot *s, size_t bytes, tr_err *err)
{
    tr_err why = {0};
    const uint64_t step = s->staging->step;

    if (tr_plan_check(s->staging, bytes, &e->limits, &why))
        return tr_fail(err, TR_E_COMM, "step plan refused: %s", why.text);
    if (s->staging->flags & TR_PLAN_STOP) return TR_OK;
    tr_status st = tr_model_forward(e->model, &s->step, err);
    if (st) return tr_within(err, "step %llu", (unsigned long long)step);
    e->n_flight++;
    return TR_OK;
}

static slot *next_slot(tr_engine *e)
{
    return &e->slot[(e->i_slot + e->n_flight) % e->options.ring];
}

static void wait_oldest(tr_engine *e)
{
    while (!tr_step_done(e->model, &e->slot[e->i_slot].step)) {
        tr_comm_progress(e->control);
        sched_yield();
    }
}

static void forget_oldest(tr_engine *e)
{
    e->i_slot = (e->i_slot + 1) % e->options.ring;
    e->n_flight--;
}

/* Plan a step, send it, enqueue it. *planned false: nothing to plan now. */
static tr_status begin_step(tr_engine *e, bool *planned, tr_err *err)
{
    slot *s = next_slot(e);
    const tr_plan *plan;

    s->begun_ns = tr_now_ns();
    tr_region_begin(e->regions, e->region_plan);
    tr_status st = tr_scheduler_plan(e->scheduler, &plan, err);
    *planned = !st && plan;
    if (*planned) {
        announcement a = {.bytes = plan->bytes};
        memcpy(s->staging, plan, plan->bytes);
        st = broadcast(e, &a, sizeof a, err);
        if (!st) st = broadcast(e, s->staging, plan->bytes, err);
    }
    tr_region_end(e->regions, 0, 0);
    return !st && *planned ? run_plan(e, s, plan->bytes, err) : st;
}

/* Wait for the oldest step, take in what it sampled, hand out what has finished. */
static void finish_step(tr_engine *e)
{
    slot *s = &e->slot[e->i_slot];
    const bool prefill = tr_scheduler_prefill_rows(e->scheduler) > 0;

    wait_oldest(e);
    tr_region_begin(e->regions, e->region_commit);
    tr_scheduler_commit(e->scheduler, &s->step.out);
    /* With a ring of 2 a step waits for the one before it: its time begins where that one's ended. */
    const uint64_t now = tr_now_ns();
    const uint64_t from = s->begun_ns > e->last_done_ns ? s->begun_ns : e->last_done_ns;
    *(prefill ? &e->prefill_ns : &e->decode_ns) += now - from;
    e->last_done_ns = now;
    forget_oldest(e);
    publish_stats(e);
    for (tr_event *event; (event = tr_scheduler_event(e->scheduler));)
        deliver(e, event);
    tr_region_end(e->regions, 0, 0);
}

/* ---- the loops --------------------------------------------------------------------------------------- */

static tr_status send_stop(tr_engine *e, tr_status how, tr_err *err)
{
    tr_plan stop = *tr_scheduler_stop_plan(e->scheduler); /* has no sections */
    announcement a = {.bytes = stop.bytes, .status = (uint64_t)how};
    tr_status st = broadcast(e, &a, sizeof a, err);

    return st ? st : broadcast(e, &stop, stop.bytes, err);
}

static tr_status steps(tr_engine *e, tr_err *err)
{
    for (;;) {
        bool planned = false;
        take_in(e);
        if (asked_to_stop(e)) return tr_fail(err, TR_E_STOP, "stopped at a step boundary");
        tr_status st = begin_step(e, &planned, err);
        if (st) return st;
        if (planned && e->n_flight < e->options.ring) continue;
        if (e->n_flight)
            finish_step(e);
        else if (!tr_scheduler_idle(e->scheduler))
            return tr_fail(err, TR_E_USAGE, "the scheduler is stuck with %d running choices",
                           tr_scheduler_stats_get(e->scheduler).running);
        else if (!wait_for_work(e))
            return TR_OK;
    }
}

static tr_status lead(tr_engine *e, tr_err *err)
{
    tr_err ignored = {0};
    tr_status st = steps(e, err);

    /* What is in flight was computed: whoever it finishes is finished. Not after a failure: it may never be done. */
    while (e->n_flight && (st == TR_OK || st == TR_E_STOP))
        finish_step(e);
    tr_log_debug(e->log, "engine: %llu steps, %llu preemptions",
                 (unsigned long long)tr_scheduler_stats_get(e->scheduler).steps,
                 (unsigned long long)tr_scheduler_stats_get(e->scheduler).preemptions);
    /* Followers must leave too. After a failure of the communicator itself there is nothing left to tell them with. */
    if (st != TR_E_COMM) {
        tr_status told = send_stop(e, st, &ignored);
        if (told && !st) {
            if (err) *err = ignored;
            st = told;
        }
    }
    return st;
}

static tr_status follow(tr_engine *e, tr_err *err)
{
    for (;;) {
        announcement a = {0};
        while (e->n_flight == e->options.ring ||
               (e->n_flight && tr_step_done(e->model, &e->slot[e->i_slot].step))) {
            wait_oldest(e);
            forget_oldest(e);
        }
        slot *s = next_slot(e);
        tr_status st = broadcast(e, &a, sizeof a, err);
        if (st) return st;
        if (a.bytes < sizeof(tr_plan) || a.bytes > e->bytes_max || a.status > TR_E_STOP)
            return tr_fail(err, TR_E_COMM, "a plan of %llu bytes was announced, status %llu",
                           (unsigned long long)a.bytes, (unsigned long long)a.status);
        st = broadcast(e, s->staging, a.bytes, err);
        if (!st) st = run_plan(e, s, a.bytes, err);
        if (st) return st;
        if (!(s->staging->flags & TR_PLAN_STOP)) continue;
        while (e->n_flight && (a.status == TR_OK || a.status == TR_E_STOP)) {
            wait_oldest(e);
            forget_oldest(e);
        }
        return a.status ? tr_fail(err, (tr_status)a.status, "rank 0 of the replica ended the run")
                        : TR_OK;
    }
}

tr_status tr_engine_run(tr_engine *e, tr_err *err)
{
    tr_status st = e->options.is_leader ? lead(e, err) : follow(e, err);

    pthread_mutex_lock(&e->lock);
    e->ended = true;
    pthread_cond_broadcast(&e->room);
    pthread_cond_broadcast(&e->news);
    pthread_mutex_unlock(&e->lock);
    return st;
}
