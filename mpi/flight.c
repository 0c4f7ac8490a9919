#include <config.h>

#include "mpi/flight.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"

struct tr_flight {
    pthread_mutex_t lock;
    tr_flight_state now; /* without what, layer and waited, which are made when somebody looks */
    struct {
        const char *what;
        int layer;
    } stack[TR_FLIGHT_DEPTH];
    int depth;                              /* may be more than the stack holds */
    uint64_t waiting;                       /* id, 0: none */
    tr_flight_record record[TR_FLIGHT_MAX]; /* id is at id % TR_FLIGHT_MAX */
};

tr_flight *tr_flight_create(void)
{
    tr_flight *f = calloc(1, sizeof *f);

    if (f) pthread_mutex_init(&f->lock, NULL);
    return f;
}

void tr_flight_free(tr_flight *f)
{
    if (!f) return;
    pthread_mutex_destroy(&f->lock);
    free(f);
}

void tr_flight_beat(tr_flight *f, uint64_t step)
{
    if (!f) return;
    pthread_mutex_lock(&f->lock);
    f->now.n_beats++;
    f->now.step = step;
    f->now.beat_ns = f->now.moved_ns = tr_now_ns();
    f->now.rests = false;
    f->now.expected_s = 0;
    pthread_mutex_unlock(&f->lock);
}

void tr_flight_rest(tr_flight *f)
{
    if (!f) return;
    pthread_mutex_lock(&f->lock);
    f->now.rests = true;
    pthread_mutex_unlock(&f->lock);
}

void tr_flight_expect(tr_flight *f, double seconds)
{
    if (!f) return;
    pthread_mutex_lock(&f->lock);
    f->now.expected_s = seconds;
    pthread_mutex_unlock(&f->lock);
}

void tr_flight_enter(tr_flight *f, const char *what, int layer)
{
    if (!f) return;
    pthread_mutex_lock(&f->lock);
    f->now.moved_ns = tr_now_ns();
    if (f->depth < TR_FLIGHT_DEPTH) {
        f->stack[f->depth].what = what;
        f->stack[f->depth].layer = layer;
    }
    f->depth++;
    pthread_mutex_unlock(&f->lock);
}

void tr_flight_leave(tr_flight *f)
{
    if (!f) return;
    pthread_mutex_lock(&f->lock);
    f->now.moved_ns = tr_now_ns();
    if (f->depth > 0) f->depth--;
    pthread_mutex_unlock(&f->lock);
}

/* Locked. */
static int layer_now(const tr_flight *f)
{
    for (int i = (f->depth < TR_FLIGHT_DEPTH ? f->depth : TR_FLIGHT_DEPTH) - 1; i >= 0; i--)
        if (f->stack[i].layer >= 0) return f->stack[i].layer;
    return -1;
}

uint64_t tr_flight_begin(tr_flight *f, const char *group, int first, int members, const char *op,
                         uint64_t number, uint64_t bytes)
{
    if (!f) return 0;
    pthread_mutex_lock(&f->lock);
    const uint64_t id = ++f->now.n_records;
    tr_flight_record *r = &f->record[id % TR_FLIGHT_MAX];
    *r = (tr_flight_record){.id = id,
                            .first = first,
                            .members = members,
                            .op = op,
                            .number = number,
                            .bytes = bytes,
                            .step = f->now.step,
                            .layer = layer_now(f),
                            .begun_ns = tr_now_ns()};
    snprintf(r->group, sizeof r->group, "%s", group);
    f->now.moved_ns = r->begun_ns;
    pthread_mutex_unlock(&f->lock);
    return id;
}

void tr_flight_wait(tr_flight *f, uint64_t id)
{
    if (!f) return;
    pthread_mutex_lock(&f->lock);
    f->waiting = id;
    pthread_mutex_unlock(&f->lock);
}

void tr_flight_done(tr_flight *f, uint64_t id)
{
    if (!f || !id) return;
    pthread_mutex_lock(&f->lock);
    tr_flight_record *r = &f->record[id % TR_FLIGHT_MAX];
    f->now.moved_ns = tr_now_ns();
    if (r->id == id) r->done_ns = f->now.moved_ns;
    if (f->waiting == id) f->waiting = 0;
    pthread_mutex_unlock(&f->lock);
}

tr_flight_state tr_flight_look(tr_flight *f)
{
    if (!f) return (tr_flight_state){.layer = -1};
    pthread_mutex_lock(&f->lock);
    tr_flight_state s = f->now;
    const int top = f->depth < TR_FLIGHT_DEPTH ? f->depth : TR_FLIGHT_DEPTH;
    s.what = top ? f->stack[top - 1].what : NULL;
    s.layer = layer_now(f);
    s.waits = f->waiting != 0;
    s.waited = f->record[f->waiting % TR_FLIGHT_MAX];
    pthread_mutex_unlock(&f->lock);
    return s;
}

int tr_flight_records(tr_flight *f, tr_flight_record *out)
{
    int n = 0;

    if (!f) return 0;
    pthread_mutex_lock(&f->lock);
    const uint64_t last = f->now.n_records;
    for (uint64_t id = last > TR_FLIGHT_MAX ? last - TR_FLIGHT_MAX + 1 : 1; id <= last; id++)
        out[n++] = f->record[id % TR_FLIGHT_MAX];
    pthread_mutex_unlock(&f->lock);
    return n;
}
