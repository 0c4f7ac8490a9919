/* The engine's thread-safe ends: what the batch reader and the journal writer call. */
#include <config.h>

#include "engine/engine.h"

#include <errno.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/size.h"
#include "engine/engine_priv.h"

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
    event->replica = -1;
    if (!e->options.is_leader) {
        tr_event_free(event);
        return tr_fail(err, TR_E_USAGE, "requests go to rank 0");
    }
    pthread_mutex_lock(&e->lock);
    while (e->n_queue == e->options.queue_max && !e->closed && !e->stopping && !e->drain_reason &&
           !e->ended)
        pthread_cond_wait(&e->room, &e->lock);
    if (e->closed || e->stopping || e->drain_reason || e->ended) {
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

void tr_engine_dismiss(tr_engine *e)
{
    tr_err ignored;

    pthread_mutex_lock(&e->lock);
    const bool ended = e->ended, empty = !e->n_queue;
    pthread_mutex_unlock(&e->lock);
    if (ended) return;
    if (empty)
        tr_engine_close(e); /* all is well with the others */
    else
        tr_engine_stop(e);
    tr_engine_run(e, &ignored);
}

void tr_engine_ask_progress(tr_engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->progress_wanted = true;
    pthread_mutex_unlock(&e->lock);
}

bool tr_engine_take_progress(tr_engine *e, tr_progress **list, uint64_t *spent_ns)
{
    pthread_mutex_lock(&e->lock);
    const bool made = e->progress_made;
    *list = e->progress;
    *spent_ns = e->progress_ns;
    e->progress = NULL;
    e->progress_made = false;
    pthread_mutex_unlock(&e->lock);
    return made;
}

int tr_engine_ended_progress(tr_engine *e, tr_progress **list)
{
    int bad = 0;

    pthread_mutex_lock(&e->lock);
    for (size_t i = 0; i < e->n_event && !bad; i++) {
        const tr_event *event = e->event[(e->i_event + i) % e->event_cap];
        if (event->kind != TR_EVENT_DONE) continue;
        tr_progress *p = tr_progress_of(event);
        bad = p ? 0 : -1;
        if (!p) continue;
        p->n_event = e->n_taken + i + 1;
        p->next = *list;
        *list = p;
    }
    pthread_mutex_unlock(&e->lock);
    return bad;
}

const char *tr_engine_drain_reason(tr_engine *e)
{
    pthread_mutex_lock(&e->lock);
    const char *reason = e->drain_reason;
    pthread_mutex_unlock(&e->lock);
    return reason;
}

bool tr_engine_draining(tr_engine *e)
{
    return tr_engine_drain_reason(e) != NULL;
}

struct timespec tr_engine_deadline(int ms)
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
    const struct timespec deadline = tr_engine_deadline(timeout_ms > 0 ? timeout_ms : 0);
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
        e->n_taken++;
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
