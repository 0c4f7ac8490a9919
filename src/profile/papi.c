#include <config.h>

#include "profile/papi.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#ifdef HAVE_PAPI
#include <papi.h>
#endif

#include "base/size.h"

enum { NAME_BYTES = 128 };

/* Software events work on every machine; the hardware's two where a machine has and shows counters. */
static const char default_events[] =
    "perf::TASK-CLOCK,perf::PAGE-FAULTS,perf::MINOR-FAULTS,perf::MAJOR-FAULTS,"
    "perf::CONTEXT-SWITCHES,perf::CPU-MIGRATIONS,PAPI_TOT_CYC,PAPI_TOT_INS";

typedef struct event {
    char name[NAME_BYTES], why[NAME_BYTES];
    int of, at;             /* set, and place in it */
    double base, last, now; /* main thread's; base: counted before the set was started last */
    double value, in_phase[TR_N_PHASES + 1]; /* under the lock */
} event;

typedef struct set { /* of one component of PAPI's */
    int id, component, n;
    bool own; /* counted by programs, as a step is done: software-defined events */
} set;

struct tr_papi {
    int n, room;  /* events; what the list may name at most: its commas and one */
    event *event; /* [n] */
    const char **names, **units, **absent; /* [n] */
    int n_sets;
    set *set;         /* [n_sets]: no more than there are events */
    long long *count; /* [n] one set's, on their way */
    bool inherits, rests;
    tr_phase phase;   /* of what is counted now */
    uint64_t read_ns; /* when counters that are not own were read last */
    pthread_mutex_t lock;
};

static void absent(tr_papi *p, int i, const char *what, const char *why)
{
    snprintf(p->event[i].why, sizeof p->event[i].why, "%s: %s", what, why);
    p->absent[i] = p->event[i].why;
}

#ifdef HAVE_PAPI

/* The event set of a component: PAPI runs one of each component at a time. -1: there is none; *result says why. */
static int set_of(tr_papi *p, int component, int *result)
{
    PAPI_option_t option = {.inherit = {.inherit = PAPI_INHERIT_ALL}};

    for (int s = 0; s < p->n_sets; s++)
        if (p->set[s].component == component) return s;
    set *made = &p->set[p->n_sets];
    const PAPI_component_info_t *info = PAPI_get_component_info(component);
    *made = (set){.id = PAPI_NULL,
                  .component = component,
                  .own = info && strcmp(info->short_name, "sde") == 0};
    *result = PAPI_create_eventset(&made->id);
    if (*result != PAPI_OK) return -1;
    const int s = p->n_sets++;
    if (PAPI_assign_eventset_component(made->id, component) != PAPI_OK) return s;
    /* Threads made from now on count too; a component that does not know how counts this one alone. */
    option.inherit.eventset = made->id;
    if (PAPI_set_opt(PAPI_INHERIT, &option) == PAPI_OK) p->inherits = true;
    return s;
}

/* The kernel's own doings: PAPI counts what happens in the user's mode, where none of these ever does. */
static bool of_kernel(const char *name)
{
    static const char *const names[] = {
        "perf::CONTEXT-SWITCHES", "perf::CS",         "perf::PERF_COUNT_SW_CONTEXT_SWITCHES",
        "perf::CPU-MIGRATIONS",   "perf::MIGRATIONS", "perf::PERF_COUNT_SW_CPU_MIGRATIONS"};

    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcasecmp(name, names[i]) == 0) return true;
    return false;
}

/* Whether they are counted, asked for with the kernel's mode: who may not is given zeros, and no error. Who sleeps is switched. */
static bool kernel_counts(void)
{
    int probe = PAPI_NULL;
    long long switches = 1;

    if (PAPI_create_eventset(&probe) != PAPI_OK) return true; /* the event itself will say why */
    if (PAPI_add_named_event(probe, "perf::CONTEXT-SWITCHES:u=1:k=1") == PAPI_OK &&
        PAPI_start(probe) == PAPI_OK) {
        nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL);
        PAPI_stop(probe, &switches);
    }
    PAPI_cleanup_eventset(probe);
    PAPI_destroy_eventset(&probe);
    return switches > 0;
}

/* Alone, so that one that is not there keeps no other from being counted. */
static void add(tr_papi *p, int i)
{
    char asked[NAME_BYTES + 16];
    int code = PAPI_NULL;
    if (p->absent[i]) return;
    if (of_kernel(p->event[i].name) && !kernel_counts()) {
        absent(p, i, "perf_event_paranoid", "what the kernel does is not counted for this user");
        return;
    }
    snprintf(asked, sizeof asked, "%s%s", p->event[i].name,
             of_kernel(p->event[i].name) ? ":u=1:k=1" : "");
    int result = PAPI_event_name_to_code(asked, &code);

    if (result != PAPI_OK) {
        absent(p, i, "PAPI_event_name_to_code", PAPI_strerror(result));
        return;
    }
    const int s = set_of(p, PAPI_get_event_component(code), &result);
    if (s < 0) {
        absent(p, i, "PAPI_create_eventset", PAPI_strerror(result));
        return;
    }
    result = PAPI_add_event(p->set[s].id, code);
    if (result != PAPI_OK) {
        absent(p, i, "PAPI_add_event", PAPI_strerror(result));
        return;
    }
    p->event[i].of = s;
    p->event[i].at = p->set[s].n++;
}

static void start(tr_papi *p, int s)
{
    const int result = p->set[s].n ? PAPI_start(p->set[s].id) : PAPI_OK;

    for (int i = 0; i < p->n && result != PAPI_OK; i++)
        if (!p->absent[i] && p->event[i].of == s) absent(p, i, "PAPI_start", PAPI_strerror(result));
    if (result != PAPI_OK) p->set[s].n = 0;
}

static void name_unit(tr_papi *p, int i)
{
    int code = PAPI_NULL;
    PAPI_event_info_t info;
    char *const name = p->event[i].name;

    p->units[i] = strstr(name, "-CLOCK") ? "ns" : "1";
    if (PAPI_event_name_to_code(name, &code) != PAPI_OK) return;
    if (PAPI_get_event_info(code, &info) == PAPI_OK && strstr(info.units, "nW")) p->units[i] = "nW";
}

static void start_all(tr_papi *p)
{
    const int version = PAPI_library_init(PAPI_VER_CURRENT);

    for (int i = 0; i < p->n; i++) {
        if (version == PAPI_VER_CURRENT)
            add(p, i);
        else
            absent(p, i, "PAPI_library_init",
                   version < 0 ? PAPI_strerror(version) : "another version");
        name_unit(p, i);
    }
    for (int s = 0; s < p->n_sets; s++)
        start(p, s);
}

/* Events' now: stays what it was where a set cannot be read. */
static void read_sets(tr_papi *p, bool own)
{
    for (int s = 0; s < p->n_sets; s++) {
        if (p->set[s].own != own || !p->set[s].n || PAPI_read(p->set[s].id, p->count) != PAPI_OK)
            continue;
        for (int i = 0; i < p->n; i++)
            if (!p->absent[i] && p->event[i].of == s)
                p->event[i].now = p->event[i].base + (double)p->count[p->event[i].at];
    }
}

/* The sets stop, and begin again at zero. */
static void rest_all(tr_papi *p)
{
    for (int s = 0; s < p->n_sets; s++) {
        if (!p->set[s].n) continue;
        if (p->rests)
            PAPI_stop(p->set[s].id, p->count);
        else
            start(p, s);
    }
    for (int i = 0; i < p->n; i++)
        p->event[i].base = p->event[i].now;
}

static void stop_all(tr_papi *p)
{
    for (int s = 0; s < p->n_sets; s++) {
        if (p->set[s].n && !p->rests) PAPI_stop(p->set[s].id, p->count);
        PAPI_cleanup_eventset(p->set[s].id);
        PAPI_destroy_eventset(&p->set[s].id);
    }
}

#else

static void start_all(tr_papi *p)
{
    for (int i = 0; i < p->n; i++)
        absent(p, i, "this trireme", "built without PAPI");
}

static void read_sets(tr_papi *p, bool own)
{
    (void)p;
    (void)own;
}

static void rest_all(tr_papi *p)
{
    (void)p;
}

static void stop_all(tr_papi *p)
{
    (void)p;
}

#endif

static bool listed(const tr_papi *p, const char *name)
{
    for (int i = 0; i < p->n; i++)
        if (strcmp(p->event[i].name, name) == 0) return true;
    return false;
}

/* Names that the profile's own objects in /counters/papi have: no event of PAPI is called so. */
static bool reserved(const char *name)
{
    return !strcmp(name, ".") || !strcmp(name, "..") || !strcmp(name, "time");
}

/* Names between commas; empty ones and those that come again are left out. */
static void split(tr_papi *p, const char *events)
{
    for (const char *s = events; *s && p->n < p->room;) {
        const size_t n = strcspn(s, ","), kept = n < NAME_BYTES ? n : NAME_BYTES - 1;
        char *name = p->event[p->n].name;
        memcpy(name, s, kept);
        name[kept] = '\0';
        s += n + (s[n] == ',');
        if (!kept || listed(p, name)) continue;
        if (kept < n) absent(p, p->n, "this trireme", "the event's name is too long");
        if (reserved(name)) { /* no event either, but a name that a dataset can have */
            memmove(name + 1, name, kept + 1);
            name[0] = ':';
        }
        p->names[p->n] = name;
        p->units[p->n++] = "1";
    }
}

static bool make_room(tr_papi *p, const char *events)
{
    p->room = 1;
    for (const char *s = events; (s = strchr(s, ',')) != NULL; s++)
        if (p->room == INT_MAX || ++p->room == INT_MAX) return false;
    const size_t n = (size_t)p->room;
    p->event = tr_calloc(n, sizeof *p->event);
    p->names = tr_calloc(n, sizeof *p->names);
    p->units = tr_calloc(n, sizeof *p->units);
    p->absent = tr_calloc(n, sizeof *p->absent);
    p->set = tr_calloc(n, sizeof *p->set);
    p->count = tr_calloc(n, sizeof *p->count);
    return p->event && p->names && p->units && p->absent && p->set && p->count;
}

static void free_all(tr_papi *p)
{
    free(p->event);
    free(p->names);
    free(p->units);
    free(p->absent);
    free(p->set);
    free(p->count);
    free(p);
}

tr_papi *tr_papi_open(const char *events)
{
    tr_papi *p = calloc(1, sizeof *p);

    if (!events) events = default_events;
    if (!p || !make_room(p, events)) {
        if (p) free_all(p);
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    p->phase = TR_PHASE_NONE;
    split(p, events);
    start_all(p);
    return p;
}

/* What is more than at the last reading was counted in this phase. */
static void count(tr_papi *p, bool own, tr_phase phase)
{
    read_sets(p, own);
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < p->n; i++) {
        event *e = &p->event[i];
        if (e->now == e->last) continue; /* of the other kind, say */
        e->in_phase[phase] += e->now - e->last;
        e->value = e->last = e->now;
    }
    pthread_mutex_unlock(&p->lock);
}

static bool has(const tr_papi *p, bool own)
{
    for (int s = 0; s < p->n_sets; s++)
        if (p->set[s].n && p->set[s].own == own) return true;
    return false;
}

void tr_papi_begin(tr_papi *p, tr_phase phase, uint64_t now_ns)
{
    if (!p || p->rests || p->phase == phase) return;
    count(p, false, p->phase);
    p->phase = phase;
    p->read_ns = now_ns;
}

void tr_papi_step(tr_papi *p, tr_phase phase, uint64_t now_ns)
{
    if (!p || p->rests) return;
    if (has(p, true)) count(p, true, phase);
    if (now_ns - p->read_ns < TR_PAPI_READ_NS) return;
    count(p, false, p->phase);
    p->read_ns = now_ns;
}

void tr_papi_rest(tr_papi *p, bool rest)
{
    if (!p || p->rests == rest) return;
    if (rest) count(p, false, p->phase);
    if (rest) count(p, true, TR_PHASE_NONE);
    p->rests = rest;
    rest_all(p);
}

static void give(void *ctx, double *values)
{
    tr_papi *p = ctx;

    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < p->n; i++)
        values[i] = p->event[i].value;
    pthread_mutex_unlock(&p->lock);
}

static void give_phase(void *ctx, tr_phase phase, double *values)
{
    tr_papi *p = ctx;

    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < p->n; i++)
        values[i] = p->event[i].in_phase[phase];
    pthread_mutex_unlock(&p->lock);
}

tr_profile_counters tr_papi_counters(tr_papi *p)
{
    return (tr_profile_counters){.source = "papi",
                                 .n = p->n,
                                 .name = p->names,
                                 .units = p->units,
                                 .absent = p->absent,
                                 .ctx = p,
                                 .read = give,
                                 .phase = give_phase};
}

bool tr_papi_inherits(const tr_papi *p)
{
    return p && p->inherits;
}

void tr_papi_close(tr_papi *p)
{
    if (!p) return;
    stop_all(p);
    pthread_mutex_destroy(&p->lock);
    free_all(p);
}
