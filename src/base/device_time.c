#include <config.h>

#include "base/device_time.h"

#include <stdlib.h>

#include "base/size.h"

enum { FLIGHTS = 8 }; /* steps on their way, or read and remembered */

typedef struct pair {
    void *set; /* of stamps; NULL: the pool's */
    int from;  /* its stamp at the begin; the next one is at the end */
    int node, phase;
    bool ended, is_step;
} pair;

typedef struct flight {
    uint64_t step, ticket, n; /* pairs */
    tr_stamp_set *set;        /* run in it; NULL: none */
    tr_device_step seen;
    bool closed, known;
} flight;

struct tr_stamp_set {
    void *stamps;
    int n, used, next; /* pairs: room, in the record, those of this run that have come */
    bool busy;
};

struct tr_device_times {
    tr_regions *regions;
    tr_stamp_source source;
    tr_stamp_mode mode;
    tr_stamp_set *set; /* of RECORD and REPLAY */
    pair *pair;        /* [n], a ring: head - tail are in use */
    int n;
    uint64_t head, tail;
    flight flight[FLIGHTS]; /* a ring */
    uint64_t begun, read;   /* steps */
    bool open, dead;        /* a step is being stamped; the device has failed */
    uint64_t lost;
};

/* ---- regions ------------------------------------------------------------------------------------------------------- */

static flight *current(tr_device_times *t)
{
    return &t->flight[(t->begun - 1) % FLIGHTS];
}

/* A pair of the pool, with stamps of its own or of a set. -1: there is none left. */
static int take(tr_device_times *t, void *set, int from, bool is_step)
{
    if (t->head - t->tail == (uint64_t)t->n) {
        t->lost++;
        return -1;
    }
    const int i = (int)(t->head++ % (uint64_t)t->n);
    t->pair[i] = (pair){.set = set, .from = set ? from : 2 * i, .node = -1, .is_step = is_step};
    current(t)->n++;
    return i;
}

static int begin_own(tr_device_times *t, bool is_step)
{
    const int i = take(t, NULL, 0, is_step);

    if (i < 0 || t->source.stamp(t->source.ctx, NULL, t->pair[i].from)) return i;
    t->lost++; /* the pair stays without an end */
    return -1;
}

/* Marks of a record lie behind those of pairs. */
static int begin_recorded(tr_device_times *t)
{
    tr_stamp_set *s = t->set;

    if (s->used == s->n || !t->source.stamp(t->source.ctx, s->stamps, 2 * s->used)) {
        t->lost++;
        return -1;
    }
    return t->n + s->used++;
}

static int begin_replayed(tr_device_times *t)
{
    tr_stamp_set *s = t->set;

    return s->next < s->used ? take(t, s->stamps, 2 * s->next++, false) : -1;
}

static int begin(void *ctx, tr_region_kind kind)
{
    tr_device_times *t = ctx;
    const bool around = kind == TR_KIND_LAYER || kind == TR_KIND_HOST; /* operations */

    if (!t->open) return -1;
    if (kind == TR_KIND_STEP) return begin_own(t, true);
    switch (t->mode) {
    case TR_STAMP_ALL:
        return kind == TR_KIND_KERNEL || around ? begin_own(t, false) : -1;
    case TR_STAMP_RECORD:
        return around ? begin_recorded(t) : -1;
    case TR_STAMP_REPLAY:
        return around ? begin_replayed(t) : -1;
    default:
        return -1;
    }
}

static void end(void *ctx, int mark, int node, int phase)
{
    tr_device_times *t = ctx;

    if (mark >= t->n) { /* in a record, where nothing ran */
        if (!t->set || !t->source.stamp(t->source.ctx, t->set->stamps, 2 * (mark - t->n) + 1))
            t->lost++;
        return;
    }
    pair *p = &t->pair[mark];
    p->node = node;
    p->phase = phase;
    p->ended = p->set || t->source.stamp(t->source.ctx, NULL, p->from + 1);
    if (!p->ended) t->lost++;
}

/* ---- steps --------------------------------------------------------------------------------------------------------- */

void tr_device_times_begin(tr_device_times *t, uint64_t step)
{
    if (!t) return;
    tr_device_times_collect(t);
    t->mode = TR_STAMP_ALL;
    t->set = NULL;
    t->open = false;
    if (t->dead || t->begun - t->read == FLIGHTS) {
        t->lost++;
        return;
    }
    t->open = true;
    t->begun++;
    *current(t) = (flight){.step = step};
}

void tr_device_times_mode(tr_device_times *t, tr_stamp_mode mode, tr_stamp_set *set)
{
    if (!t) return;
    t->mode = mode;
    t->set = set;
    if (mode == TR_STAMP_RECORD) set->used = 0;
    if (t->open && mode != TR_STAMP_ALL) current(t)->seen.recorded = true;
    if (mode != TR_STAMP_REPLAY || !t->open) return;
    set->next = 0;
    set->busy = true;
    current(t)->set = set;
}

void tr_device_times_end(tr_device_times *t, uint64_t ticket)
{
    if (!t || !t->open) return;
    t->open = false;
    current(t)->ticket = ticket;
    current(t)->closed = true;
}

static void read_step(tr_device_times *t, flight *f)
{
    for (uint64_t i = 0; i < f->n; i++) {
        const pair *p = &t->pair[(t->tail + i) % (uint64_t)t->n];
        uint64_t ns;
        if (!p->ended) continue;
        if (!t->source.between(t->source.ctx, p->set, p->from, p->from + 1, &ns)) {
            t->lost++;
            continue;
        }
        if (p->is_step) {
            f->seen.ns = ns;
            f->known = true;
        }
        if (p->node >= 0) tr_regions_add_gpu(t->regions, p->node, p->phase, ns);
    }
}

void tr_device_times_collect(tr_device_times *t)
{
    if (!t) return;
    while (t->read < t->begun && !t->dead) {
        flight *f = &t->flight[t->read % FLIGHTS];
        const int passed = f->closed ? t->source.passed(t->source.ctx, f->ticket) : 0;
        t->dead = passed < 0; /* nothing behind can be trusted */
        if (passed <= 0) return;
        read_step(t, f);
        if (f->set) f->set->busy = false;
        t->tail += f->n;
        t->read++;
    }
}

bool tr_device_times_of(const tr_device_times *t, uint64_t step, tr_device_step *out)
{
    for (int i = 0; t && i < FLIGHTS; i++)
        if (t->flight[i].known && t->flight[i].step == step) {
            *out = t->flight[i].seen;
            return true;
        }
    return false;
}

uint64_t tr_device_times_lost(const tr_device_times *t)
{
    return t ? t->lost : 0;
}

/* ---- creation ------------------------------------------------------------------------------------------------------ */

tr_device_times *tr_device_times_create(tr_regions *regions, const tr_stamp_source *source,
                                        int n_pairs)
{
    if (n_pairs < 1 || n_pairs > INT32_MAX / 4) return NULL;
    tr_device_times *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->regions = regions;
    t->source = *source;
    t->n = n_pairs;
    t->pair = tr_calloc((size_t)n_pairs, sizeof *t->pair);
    if (!t->pair) {
        free(t);
        return NULL;
    }
    regions->clock = (tr_region_clock){.ctx = t, .begin = begin, .end = end};
    return t;
}

void tr_device_times_free(tr_device_times *t)
{
    if (!t) return;
    t->regions->clock = (tr_region_clock){0};
    free(t->pair);
    free(t);
}

tr_stamp_set *tr_stamp_set_create(void *stamps, int n_pairs)
{
    tr_stamp_set *s = calloc(1, sizeof *s);

    if (s) *s = (tr_stamp_set){.stamps = stamps, .n = n_pairs};
    return s;
}

void tr_stamp_set_free(tr_stamp_set *s)
{
    free(s);
}

bool tr_stamp_set_busy(const tr_stamp_set *s)
{
    return s->busy;
}
