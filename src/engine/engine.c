#include <config.h>

#include "engine/engine.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "base/stop.h"
#include "engine/engine_priv.h"
#include "engine/plans.h"
#include "engine/replicas.h"
#include "engine/report.h"

enum { POLL_MS = 100 };
/* How often ranks exchange what they were asked. Everybody sends a word to everybody: a thousand ranks do it less often. */
static const uint64_t exchange_ns = 250000000, exchange_rank_ns = 4000000, idle_ns = 1000000000;

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
    const size_t n = (size_t)e->options.n_replicas;
    const bool reports = tr_comm_rank(e->control) != 0 &&
                         e->reporter[e->options.i_replica] == tr_comm_rank(e->control);
    tr_step_records records = {0};
    size_t bytes;

    if (!tr_mul(&bytes, n, e->bytes_max)) bytes = 0;
    for (int i = 0; i < e->options.ring; i++) {
        tr_engine_slot *s = &e->slot[i];
        s->staging = bytes ? malloc(bytes) : NULL;
        s->at = tr_calloc(n, sizeof *s->at);
        s->planned = tr_calloc(n, sizeof *s->planned);
        if (reports) s->report = malloc(e->report_bytes_max);
        if (!s->staging || !s->at || !s->planned || (reports && !s->report))
            return tr_fail(err, TR_E_MEMORY, "out of memory for %zu plans of %zu bytes", n,
                           e->bytes_max);
        tr_status st = tr_step_create(&s->step, e->model, err);
        if (!st) st = tr_step_record(&s->step, e->model, e->options.max_sequences, &records, err);
        if (st) return st;
    }
    if (records.n)
        tr_log_info(e->log, "steps that decode: %d recorded in %.2f s, %.1f MB of the device",
                    records.n, (double)records.ns * 1e-9, (double)records.bytes * 1e-6);
    if (records.no_memory)
        tr_log_warn(e->log,
                    "no memory of the device is left for records of steps (CUDA graphs): the "
                    "others run slower without; --max-cache-tokens leaves more");
    return TR_OK;
}

static tr_status make_schedulers(tr_engine *e, const tr_tokenizer *tokenizer, tr_err *err)
{
    const tr_engine_options *o = &e->options;
    const size_t n = (size_t)o->n_replicas;
    tr_scheduler_options so = {
        .limits = e->limits,
        .max_batch_tokens = o->max_batch_tokens,
        .max_sequences = o->max_sequences,
        .max_model_len = o->max_model_len,
        .ring = o->ring,
        .n_micro = o->n_stages,
        .prefix_cache = !o->no_prefix_cache,
        .eos = o->eos,
        .bos = o->bos,
        .pad = o->pad,
        .vocabulary = {.ctx = tokenizer, .bytes = tokenizer ? token_bytes : NULL},
    };
    tr_status st = TR_OK;

    e->queue = tr_calloc((size_t)o->queue_max, sizeof *e->queue);
    e->scheduler = tr_calloc(n, sizeof(tr_scheduler *));
    e->heard = tr_calloc(n, sizeof *e->heard);
    e->heard_text = tr_calloc(n, sizeof(char *));
    if (!e->queue || !e->scheduler || !e->heard || !e->heard_text)
        return tr_fail(err, TR_E_MEMORY, "out of memory for a queue of %d", o->queue_max);
    for (int d = 0; d < o->n_replicas && !st; d++) {
        if (e->reporter[d] != 0) {
            e->heard_text[d] = malloc(e->report_bytes_max);
            if (!e->heard_text[d]) return tr_fail(err, TR_E_MEMORY, "out of memory for results");
        }
        st = tr_scheduler_create(&e->scheduler[d], &so, err);
    }
    return st;
}

static tr_status make_pace(tr_engine *e, tr_err *err)
{
    const tr_pace_options o = {.control = e->control,
                               .host = e->options.host,
                               .i_stage = e->options.i_stage,
                               .n_stages = e->options.n_stages,
                               .ring = e->options.ring,
                               .log = e->log};
    e->options.host = NULL; /* only lent */
    return tr_pace_create(&e->pace, &o, err);
}

/* One replica, reported by the leader itself, unless the options say otherwise. */
static tr_status take_options(tr_engine *e, const tr_engine_options *options, tr_err *err)
{
    tr_engine_options *o = &e->options;

    *o = *options;
    if (!o->n_replicas) o->n_replicas = 1;
    if (!o->n_stages) o->n_stages = 1;
    if (!o->queue_max) o->queue_max = 4 * o->max_sequences * o->n_replicas;
    /* One more than there are stages: prompts go ahead while the oldest step's tokens come back. */
    if (o->n_stages > 1)
        o->ring = o->n_stages < TR_ENGINE_RING_MAX ? o->n_stages + 1 : TR_ENGINE_RING_MAX;
    e->reporter = tr_calloc((size_t)o->n_replicas, sizeof *e->reporter);
    if (!e->reporter) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; options->reporter && i < o->n_replicas; i++)
        e->reporter[i] = options->reporter[i];
    e->options.reporter = e->reporter;
    return TR_OK;
}

tr_status tr_engine_create(tr_engine **out, tr_model *model, const tr_tokenizer *tokenizer,
                           tr_comm *control, const tr_engine_options *options, tr_log *log,
                           tr_regions *regions, tr_err *err)
{
    tr_status st = TR_OK;

    *out = NULL;
    if (options->ring < 1 || options->ring > TR_ENGINE_RING_MAX || options->max_sequences < 1 ||
        options->max_sequences > INT32_MAX / 4 || options->queue_max < 0 ||
        options->n_replicas < 0 || options->n_replicas > 4096 || options->i_replica < 0 ||
        options->n_stages < 0)
        return tr_fail(err, TR_E_USAGE, "engine: ring of %d, %d sequences, queue of %d",
                       options->ring, options->max_sequences, options->queue_max);
    if (options->is_leader != (tr_comm_rank(control) == 0))
        return tr_fail(err, TR_E_USAGE, "engine: rank %d cannot be %s", tr_comm_rank(control),
                       options->is_leader ? "its leader" : "a follower");
    tr_engine *e = calloc(1, sizeof *e);
    if (!e || !make_locks(e)) {
        free(e);
        return tr_fail(err, TR_E_MEMORY, "out of memory for the engine");
    }
    e->model = model;
    e->control = control;
    e->log = log;
    e->regions = regions;
    st = take_options(e, options, err);
    if (!st && options->i_replica >= e->options.n_replicas)
        st = tr_fail(err, TR_E_USAGE, "engine: replica %d of %d", options->i_replica,
                     e->options.n_replicas);
    if (st) goto done;
    e->limits = tr_model_limits(model);
    tr_model_advance(model, control);
    e->bytes_max = tr_plan_bytes_max(&e->limits);
    e->report_bytes_max = tr_report_bytes_max(&e->limits);
    e->region_plan = tr_region_id(regions, "engine/plan");
    e->region_commit = tr_region_id(regions, "engine/commit");
    e->region_report = tr_region_id(regions, "engine/report");
    e->region_rest = tr_region_id_of(regions, "engine/no_work", TR_KIND_WAIT, -1);
    e->region_done = tr_region_id_of(regions, "engine/step_wait", TR_KIND_WAIT, -1);
    e->stats.pages_total = e->limits.n_pages * e->options.n_replicas;
    if (!e->bytes_max) {
        st = tr_fail(err, TR_E_USAGE, "engine: no plan can serve %d slots of %d pages",
                     e->limits.n_slots, e->limits.max_pages);
        goto done;
    }
    st = make_steps(e, err);
    if (!st) st = make_pace(e, err);
    if (!st && options->is_leader) st = make_schedulers(e, tokenizer, err);
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
    tr_progress_free_list(e->progress);
    free(e->queue);
    free(e->event);
    for (int d = 0; d < e->options.n_replicas; d++) {
        if (e->scheduler) tr_scheduler_free(e->scheduler[d]);
        if (e->heard_text) free(e->heard_text[d]);
    }
    free(e->scheduler);
    free(e->heard);
    free(e->heard_text);
    free(e->reporter);
    tr_pace_free(e->pace);
    for (int i = 0; i < e->options.ring; i++) {
        tr_step_free(&e->slot[i].step, e->model);
        free(e->slot[i].staging);
        free(e->slot[i].at);
        free(e->slot[i].planned);
        free(e->slot[i].report);
    }
    pthread_cond_destroy(&e->news);
    pthread_cond_destroy(&e->work);
    pthread_cond_destroy(&e->room);
    pthread_mutex_destroy(&e->lock);
    free(e);
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
    const tr_scheduler_stats s = tr_replicas_stats(e->scheduler, e->options.n_replicas);
    const tr_engine_stats t = {
        .steps = s.steps,
        .prefill_tokens = s.prefill_tokens,
        .decode_tokens = s.decode_tokens,
        .preemptions = s.preemptions,
        .finished = s.finished,
        .failed = s.failed,
        .continued = s.continued,
        .prefill_ns = e->prefill_ns,
        .decode_ns = e->decode_ns,
        .mixed_decode_tokens = s.mixed_decode_tokens,
        .generated_tokens = s.generated_tokens,
        .prompt_tokens = s.prompt_tokens,
        .cached_tokens = s.cached_tokens,
        .running = s.running,
        .waiting = s.waiting,
        .pages_held = s.pages_held,
        .pages_cached = s.pages_cached,
        .pages_total = s.pages_total,
        .pages_evicted = s.pages_evicted,
    };
    pthread_mutex_lock(&e->lock);
    e->stats = t;
    pthread_mutex_unlock(&e->lock);
}

/* Requests from the queue to the schedulers, no more than these can soon run: the rest holds submit back. */
static void take_in(tr_engine *e)
{
    for (;;) {
        pthread_mutex_lock(&e->lock);
        const int n = e->n_queue; /* only this thread takes from it */
        const tr_request *next = n ? e->queue[e->i_queue]->request : NULL;
        pthread_mutex_unlock(&e->lock);
        const int d =
            next ? tr_replica_choose(e->scheduler, e->options.n_replicas, next, n - 1) : -1;
        if (d < 0) return;
        pthread_mutex_lock(&e->lock);
        tr_event *event = e->queue[e->i_queue];
        e->i_queue = (e->i_queue + 1) % e->options.queue_max;
        e->n_queue--;
        pthread_cond_signal(&e->room);
        pthread_mutex_unlock(&e->lock);
        const tr_request *request = event->request; /* whoever has the event then */
        event = tr_scheduler_add(e->scheduler[d], event);
        if (request->progress && request->progress->unfit)
            tr_log_warn(e->log, "request %llu: what was saved of it does not fit: it starts over",
                        (unsigned long long)request->id);
        if (event) {
            publish_stats(e);
            deliver(e, event);
        }
    }
}

static bool asked_to_stop(tr_engine *e, bool *progress_wanted)
{
    pthread_mutex_lock(&e->lock);
    bool stopping = e->stopping;
    *progress_wanted = e->progress_wanted;
    pthread_mutex_unlock(&e->lock);
    return stopping;
}

/* Between steps: what unfinished requests have so far, for whoever takes it. */
static void make_progress(tr_engine *e)
{
    const uint64_t begun_ns = tr_now_ns();
    tr_progress *list = NULL;
    int bad = 0;

    for (int d = 0; d < e->options.n_replicas && !bad; d++)
        bad = tr_scheduler_progress(e->scheduler[d], &list);
    if (!bad) bad = tr_engine_ended_progress(e, &list);
    if (bad) {
        tr_log_warn(e->log, "no memory for a copy of the running requests: nothing is saved");
        tr_progress_free_list(list);
        list = NULL;
    }
    pthread_mutex_lock(&e->lock);
    tr_progress *older = e->progress;
    e->progress = list;
    e->progress_made = !bad;
    e->progress_wanted = false;
    e->progress_ns = tr_now_ns() - begun_ns;
    pthread_mutex_unlock(&e->lock);
    tr_progress_free_list(older);
}

/* Nothing to run: wait a while for a request. False: none will come. */
static bool wait_for_work(tr_engine *e)
{
    const struct timespec deadline = tr_engine_deadline(POLL_MS);

    pthread_mutex_lock(&e->lock);
    if (!e->n_queue && !e->closed && !e->stopping)
        pthread_cond_timedwait(&e->work, &e->lock, &deadline);
    bool more = e->n_queue || !e->closed;
    pthread_mutex_unlock(&e->lock);
    return more;
}

/* ---- what a step sampled, from the rank that knows to the leader --------------------------------------- */

/* This rank's step is done: tell the leader. */
static tr_status tell(tr_engine *e, tr_engine_slot *s, tr_err *err)
{
    const size_t bytes = tr_report_bytes(s->step.plan);

    if (!s->report || !bytes) return TR_OK;
    tr_report_write(s->report, s->step.plan, &s->step.out);
    return tr_wire_tell(&s->wire, e->control, s->report, bytes, err);
}

/* What replica d's step sampled. */
static tr_status hear(tr_engine *e, const tr_engine_slot *s, int d, tr_step_output *out,
                      tr_err *err)
{
    const tr_plan *plan = tr_plans_of(s->staging, s->at, d);
    tr_ticket ticket = {0};

    if (e->reporter[d] == 0) {
        *out = s->step.out;
        return TR_OK;
    }
    *out = tr_report_read(e->heard_text[d], plan);
    if (!tr_report_bytes(plan)) return TR_OK;
    tr_status st = tr_comm_recv(e->control, e->reporter[d], e->heard_text[d], tr_report_bytes(plan),
                                &ticket, err);
    return st ? st : tr_comm_wait(e->control, TR_LANE_MAIN, ticket, err);
}

/* ---- steps ------------------------------------------------------------------------------------------ */

/* Once begun, an exchange goes on beside the steps; what came of it is looked at when the next one begins. */
static tr_status hear_words(tr_engine *e, tr_err *err)
{
    if (!e->exchanging) return TR_OK;
    e->exchanging = false;
    tr_status st = tr_comm_wait(e->control, TR_LANE_MAIN, e->words, err);
    if (!st && e->word > e->heard_word) e->heard_word = e->word;
    return st;
}

static tr_status exchange_words(tr_engine *e, tr_err *err)
{
    tr_status st = hear_words(e, err);

    if (st) return st;
    e->word = tr_stop_word();
    e->exchanged_ns = tr_now_ns();
    st = tr_comm_all_max_u64(e->control, &e->word, 1, &e->words, err);
    e->exchanging = !st;
    return st;
}

static bool exchange_is_due(const tr_engine *e)
{
    const int n = tr_comm_size(e->control);
    const uint64_t by_size = (uint64_t)n * exchange_rank_ns;
    return n > 1 &&
           tr_now_ns() - e->exchanged_ns >= (by_size > exchange_ns ? by_size : exchange_ns);
}

static tr_status run_plan(tr_engine *e, tr_engine_slot *s, tr_err *err)
{
    const size_t bytes = s->wire.announced.bytes;
    const uint32_t flags = s->wire.announced.flags;
    uint64_t waited_ns, rows_ns;
    tr_status st = tr_plans_check(s->staging, bytes, e->options.n_replicas, &e->limits, s->at, err);

    if (st) return st;
    s->step.plan = tr_plans_of(s->staging, s->at, e->options.i_replica);
    if (s->step.plan->flags & TR_PLAN_STOP) return TR_OK;
    s->n_rows = tr_plans_rows(s->staging, s->at, e->options.n_replicas);
    tr_watchdog_beat(e->watch, ++e->n_steps);
    tr_watchdog_expect(e->watch, tr_expect_step(&e->expect, s->n_rows));
    s->number = e->n_steps;
    s->t0_ns = tr_now_ns();
    tr_model_waited(e->model, &waited_ns, &rows_ns);
    tr_pace_begin(e->pace, waited_ns, rows_ns);
    if (e->observer.begin) e->observer.begin(e->observer.ctx, s->number, s->step.plan, s->t0_ns);
    st = tr_model_forward(e->model, &s->step, err);
    e->broken = st != TR_OK;
    if (st) return tr_within(err, "step %llu", (unsigned long long)e->n_steps);
    tr_model_waited(e->model, &waited_ns, &rows_ns);
    tr_pace_end(e->pace, waited_ns, rows_ns, flags & TR_STEP_FULL,
                tr_plans_even(s->staging, s->at, e->options.n_replicas));
    /* The CPU has computed it by now; elsewhere it is seen when it is waited for. */
    s->t1_ns = tr_step_done(e->model, &s->step) > 0 ? tr_now_ns() : 0;
    e->n_flight++;
    return flags & TR_STEP_PACE ? tr_pace_tell(e->pace, err) : tr_pace_hear(e->pace, false, err);
}

static tr_engine_slot *next_slot(tr_engine *e)
{
    return &e->slot[(e->i_slot + e->n_flight) % e->options.ring];
}

static tr_status wait_oldest(tr_engine *e, tr_err *err)
{
    tr_engine_slot *s = &e->slot[e->i_slot];
    const tr_step *step = &s->step;
    tr_region_begin(e->regions, e->region_done);
    if (!tr_step_done(e->model, step)) {
        tr_watchdog_enter(e->watch, "device", -1);
        while (!tr_step_done(e->model, step)) {
            tr_model_progress(e->model);
            sched_yield();
        }
        tr_watchdog_leave(e->watch);
        tr_model_progress(e->model); /* if it was aborted this does not return */
    }
    if (!s->t1_ns) s->t1_ns = tr_now_ns();
    tr_region_end(e->regions, 0, 0);
    const tr_status st = tr_step_failure(e->model, step, err);
    e->broken = e->broken || st != TR_OK;
    return st;
}

static void forget_oldest(tr_engine *e)
{
    const tr_engine_slot *s = &e->slot[e->i_slot];
    tr_expect_seen(&e->expect, s->n_rows, (double)(s->t1_ns - s->t0_ns) * 1e-9);
    if (e->observer.step)
        e->observer.step(e->observer.ctx, &(tr_engine_seen){.step = s->number,
                                                            .t0_ns = s->t0_ns,
                                                            .t1_ns = s->t1_ns,
                                                            .plan_ns = s->t0_ns - s->begun_ns,
                                                            .plan = s->step.plan});
    e->i_slot = (e->i_slot + 1) % e->options.ring;
    e->n_flight--;
}

/* Plans of all replicas into the slot's staging. *planned false: nobody has anything to do now. */
static tr_status plan_step(tr_engine *e, tr_engine_slot *s, size_t *bytes, bool *planned,
                           tr_err *err)
{
    *bytes = 0;
    *planned = false;
    for (int d = 0; d < e->options.n_replicas; d++) {
        const tr_plan *plan;
        tr_status st = tr_scheduler_plan(e->scheduler[d], &plan, err);
        if (st) return st;
        s->planned[d] = plan != NULL;
        if (plan) {
            memcpy(s->staging + *bytes, plan, plan->bytes);
            *bytes += plan->bytes;
            *planned = true;
        } else {
            *bytes += tr_plan_idle(s->staging + *bytes);
        }
    }
    return TR_OK;
}

/* Plan a step, send it, enqueue it. *planned false: nothing to plan now. */
static tr_status begin_step(tr_engine *e, bool *planned, tr_err *err)
{
    tr_engine_slot *s = next_slot(e);
    tr_announcement a = {0};
    size_t bytes = 0;

    *planned = false;
    s->begun_ns = tr_now_ns();
    tr_region_begin(e->regions, e->region_plan);
    tr_status st = tr_wire_settle(&s->wire, e->control, err);
    if (!st) st = plan_step(e, s, &bytes, planned, err);
    a.bytes = bytes;
    a.flags = (e->n_flight + 1 >= e->options.n_stages ? TR_STEP_FULL : 0) |
              (tr_pace_due(e->pace) ? TR_STEP_PACE : 0) | (exchange_is_due(e) ? TR_STEP_ASK : 0);
    e->rests = e->rests && !*planned;
    if (!st && *planned) st = tr_wire_give(&s->wire, e->control, a, s->staging, err);
    if (!st && *planned && (a.flags & TR_STEP_ASK)) st = exchange_words(e, err);
    tr_region_end(e->regions, 0, 0);
    return !st && *planned ? run_plan(e, s, err) : st;
}

/* Wait for the oldest step, take in what it sampled, hand out what has finished. */
static tr_status finish_step(tr_engine *e, tr_err *err)
{
    tr_engine_slot *s = &e->slot[e->i_slot];
    bool prefill = false;

    tr_status st = wait_oldest(e, err);
    if (st) return st;
    tr_region_begin(e->regions, e->region_report);
    for (int d = 0; d < e->options.n_replicas && !st; d++) {
        if (!s->planned[d]) continue;
        prefill = prefill || tr_scheduler_prefill_rows(e->scheduler[d]) > 0;
        st = hear(e, s, d, &e->heard[d], err);
    }
    tr_region_end(e->regions, 0, 0);
    if (st) {
        e->broken = true;
        return st;
    }
    tr_region_begin(e->regions, e->region_commit);
    for (int d = 0; d < e->options.n_replicas; d++)
        if (s->planned[d]) tr_scheduler_commit(e->scheduler[d], &e->heard[d]);
    const uint64_t took_ns = tr_engine_took(e, s);
    *(prefill ? &e->prefill_ns : &e->decode_ns) += took_ns;
    tr_drain_step(&e->drain, took_ns, !prefill);
    publish_stats(e);
    forget_oldest(e);
    for (int d = 0; d < e->options.n_replicas; d++)
        for (tr_event *event; (event = tr_scheduler_event(e->scheduler[d]));) {
            event->replica = d;
            if (event->kind == TR_EVENT_DONE)
                tr_drain_request(&e->drain, event->done_ns - event->begun_ns);
            deliver(e, event);
        }
    tr_region_end(e->regions, 0, 0);
    return TR_OK;
}

static tr_status settle_all(tr_engine *e, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < e->options.ring && !st; i++)
        st = tr_wire_settle(&e->slot[i].wire, e->control, err);
    return st;
}

/* Behind the last plan, on every rank: watched like a step, though there may have been nothing to do before. */
static tr_status part(tr_engine *e, tr_err *err)
{
    tr_watchdog_beat(e->watch, e->n_steps);
    tr_status st = settle_all(e, err);
    if (!st) st = hear_words(e, err);
    return st ? st : tr_pace_sum_up(e->pace, &e->overlap, err);
}

/* ---- the loops --------------------------------------------------------------------------------------- */

static tr_status send_stop(tr_engine *e, tr_status how, tr_err *err)
{
    const tr_plan *stop = tr_scheduler_stop_plan(e->scheduler[0]); /* has no sections */
    tr_engine_slot *s = next_slot(e);
    const tr_announcement a = {.bytes = stop->bytes * (uint64_t)e->options.n_replicas,
                               .status = (uint32_t)how};
    tr_status st = tr_wire_settle(&s->wire, e->control, err);

    for (int d = 0; d < e->options.n_replicas; d++)
        memcpy(s->staging + (size_t)d * stop->bytes, stop, stop->bytes);
    if (!st) st = tr_wire_give(&s->wire, e->control, a, s->staging, err);
    return st ? st : part(e, err);
}

static bool all_idle(const tr_engine *e)
{
    for (int d = 0; d < e->options.n_replicas; d++)
        if (!tr_scheduler_idle(e->scheduler[d])) return false;
    return true;
}

/* There is nothing to do: the others are told (they would miss a step), and asked. */
static tr_status rest(tr_engine *e, tr_err *err)
{
    tr_engine_slot *s = next_slot(e);

    tr_watchdog_rest(e->watch);
    if (tr_comm_size(e->control) == 1 || (e->rests && tr_now_ns() - e->exchanged_ns < idle_ns))
        return TR_OK;
    e->rests = true;
    tr_status st = tr_wire_settle(&s->wire, e->control, err);
    if (!st)
        st =
            tr_wire_give(&s->wire, e->control, (tr_announcement){.flags = TR_STEP_IDLE}, NULL, err);
    return st ? st : exchange_words(e, err);
}

/* Is the run to end? Then nothing new is begun; now and then what cannot be finished any more makes room. */
static bool drains(tr_engine *e)
{
    const uint64_t now = tr_now_ns(), mine = tr_stop_word();

    if (!tr_drain_look(&e->drain, now, mine > e->heard_word ? mine : e->heard_word)) return false;
    if (e->drained_ns && now - e->drained_ns < idle_ns) return true;
    const bool first = !e->drained_ns;
    e->drained_ns = now;
    e->n_go_on = 0;
    for (int d = 0; d < e->options.n_replicas; d++)
        e->n_go_on += tr_scheduler_drain(e->scheduler[d], tr_drain_tokens(&e->drain, now));
    if (first)
        tr_log_info(e->log, "%s: nothing new is begun; %d requests have %.0f s to finish",
                    tr_drain_reason(&e->drain), e->n_go_on,
                    e->drain.until_ns > now ? (double)(e->drain.until_ns - now) / 1e9 : 0.0);
    pthread_mutex_lock(&e->lock);
    e->drain_reason = tr_drain_reason(&e->drain);
    pthread_cond_broadcast(&e->room);
    pthread_mutex_unlock(&e->lock);
    return true;
}

/* Drained. TR_OK: of what was submitted nothing is left, and nothing more will be: whoever submits has been told, or had ended
 * before. */
static tr_status drained(tr_engine *e, tr_err *err)
{
    bool more = true;

    for (int i = 0; i < 5 && more && all_idle(e); i++)
        more = wait_for_work(e);
    return more || !all_idle(e) ? tr_fail(err, TR_E_STOP, "stopped at a step boundary") : TR_OK;
}

static tr_status steps(tr_engine *e, tr_err *err)
{
    for (;;) {
        bool planned = false, progress_wanted;
        const bool draining = drains(e);
        if (draining && (e->n_go_on == 0 || tr_drain_over(&e->drain, tr_now_ns())))
            return drained(e, err);
        if (!draining) take_in(e);
        if (asked_to_stop(e, &progress_wanted))
            return tr_fail(err, TR_E_STOP, "stopped at a step boundary");
        if (progress_wanted) make_progress(e);
        tr_status st = begin_step(e, &planned, err);
        if (st) return st;
        if (planned && e->n_flight < e->options.ring) continue;
        if (e->n_flight) {
            st = finish_step(e, err);
            if (st) return st;
        } else if (draining) {
            return drained(e, err);
        } else if (!all_idle(e)) {
            return tr_fail(err, TR_E_USAGE, "the scheduler is stuck with %d running choices",
                           tr_engine_stats_get(e).running);
        } else {
            st = rest(e, err);
            if (st) return st;
            tr_region_begin(e->regions, e->region_rest);
            const bool more = wait_for_work(e);
            tr_region_end(e->regions, 0, 0);
            if (!more) return TR_OK;
        }
    }
}

static tr_status lead(tr_engine *e, tr_err *err)
{
    tr_err ignored = {0};
    tr_status st = steps(e, err);

    /* What is in flight was computed: whoever it finishes is finished. Not after a failure: it may never be done. */
    while (e->n_flight && !e->broken && (st == TR_OK || st == TR_E_STOP)) {
        tr_status finished = finish_step(e, &ignored);
        if (finished && err) *err = ignored;
        if (finished) st = finished;
    }
    if (st == TR_E_STOP && !e->broken) make_progress(e);
    tr_log_debug(e->log, "engine: %llu steps, %llu preemptions",
                 (unsigned long long)tr_engine_stats_get(e).steps,
                 (unsigned long long)tr_engine_stats_get(e).preemptions);
    /* Followers must leave too; those that still are in a step will not hear of it. */
    if (!e->broken || tr_comm_size(e->control) == 1) {
        tr_status told = send_stop(e, st, &ignored);
        e->broken = e->broken || told; /* somebody may wait in it */
        if (told && (!st || st == TR_E_STOP)) {
            if (err) *err = ignored;
            st = told;
        }
    }
    return st;
}

/* The oldest step has been computed here: tell the leader if that is this rank's to do, and go on. */
static tr_status retire_oldest(tr_engine *e, tr_err *err)
{
    tr_status st = wait_oldest(e, err);
    if (!st) st = tell(e, &e->slot[e->i_slot], err);
    forget_oldest(e);
    return st;
}

static tr_status follow_step(tr_engine *e, bool *last, tr_err *err)
{
    tr_engine_slot *s = next_slot(e);
    const tr_announcement *a = &s->wire.announced;
    tr_status st = tr_wire_settle(&s->wire, e->control, err);

    s->begun_ns = tr_now_ns();
    if (!st)
        st = tr_wire_get(&s->wire, e->control, s->staging, sizeof(tr_plan),
                         e->bytes_max * (size_t)e->options.n_replicas, err);
    if (!st && (a->flags & (TR_STEP_ASK | TR_STEP_IDLE))) st = exchange_words(e, err);
    if (!st && !a->bytes) { /* nothing to do */
        tr_watchdog_rest(e->watch);
        return TR_OK;
    }
    if (!st) st = run_plan(e, s, err);
    if (st) return st;
    *last = s->step.plan->flags & TR_PLAN_STOP;
    return *last && a->status ? tr_fail(err, (tr_status)a->status, "rank 0 ended the run") : TR_OK;
}

static tr_status follow(tr_engine *e, tr_err *err)
{
    tr_status st = TR_OK;
    bool last = false;

    while (!st && !last) {
        /* What is done is told at once: the leader may be waiting for it, and with it the next plan. */
        while (e->n_flight && !st &&
               (e->n_flight == e->options.ring || e->slot[e->i_slot].report ||
                tr_step_done(e->model, &e->slot[e->i_slot].step)))
            st = retire_oldest(e, err);
        if (!st) st = follow_step(e, &last, err);
        if (st && !last) e->broken = true;
    }
    if (e->broken) return st;
    tr_err why;
    const tr_status parted = part(e, &why);
    if (!parted) return st;
    e->broken = true; /* others may wait in it */
    if (err) *err = why;
    return parted;
}

bool tr_engine_broken(const tr_engine *e)
{
    return e->broken && tr_comm_size(e->control) > 1;
}

void tr_engine_observe(tr_engine *e, tr_engine_observer observer)
{
    e->observer = observer;
}

void tr_engine_watch(tr_engine *e, tr_watchdog *watch)
{
    e->watch = watch;
    tr_model_set_watch(e->model, watch);
}

tr_status tr_engine_run(tr_engine *e, tr_err *err)
{
    tr_drain_begin(&e->drain, &e->options.drain);
    tr_status st = e->options.is_leader ? lead(e, err) : follow(e, err);

    tr_watchdog_rest(e->watch); /* the writer may still have to save */
    pthread_mutex_lock(&e->lock);
    e->stats.overlap = e->overlap;
    e->ended = true;
    pthread_cond_broadcast(&e->room);
    pthread_cond_broadcast(&e->news);
    pthread_mutex_unlock(&e->lock);
    return st;
}
