#include <config.h>

#include "profile/papi.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef HAVE_PAPI
#include <papi.h>
#endif

enum { EVENTS_MAX = 64, SETS_MAX = 8, NAME_BYTES = 128 };

/* Software events work on every machine; the hardware's two where a machine has and shows counters. */
static const char default_events[] =
    "perf::TASK-CLOCK,perf::PAGE-FAULTS,perf::MINOR-FAULTS,perf::MAJOR-FAULTS,"
    "perf::CONTEXT-SWITCHES,perf::CPU-MIGRATIONS,PAPI_TOT_CYC,PAPI_TOT_INS";

struct tr_papi {
    int n;
    char name[EVENTS_MAX][NAME_BYTES], why[EVENTS_MAX][NAME_BYTES];
    const char *names[EVENTS_MAX], *units[EVENTS_MAX], *absent[EVENTS_MAX];
    int of[EVENTS_MAX], at[EVENTS_MAX]; /* set, and place in it */
    int n_sets, set[SETS_MAX], component[SETS_MAX], n_in[SETS_MAX];
    bool inherits;
    double last[EVENTS_MAX]; /* main thread's */
    pthread_mutex_t lock;    /* what follows */
    double value[EVENTS_MAX], in_phase[TR_N_PHASES + 1][EVENTS_MAX];
};

static void absent(tr_papi *p, int i, const char *what, const char *why)
{
    snprintf(p->why[i], sizeof p->why[i], "%s: %s", what, why);
    p->absent[i] = p->why[i];
}

#ifdef HAVE_PAPI

/* The event set of a component: PAPI runs one of each component at a time. -1: there is none. */
static int set_of(tr_papi *p, int component)
{
    PAPI_option_t option = {.inherit = {.inherit = PAPI_INHERIT_ALL}};

    for (int s = 0; s < p->n_sets; s++)
        if (p->component[s] == component) return s;
    if (p->n_sets == SETS_MAX) return -1;
    const int s = p->n_sets;
    p->set[s] = PAPI_NULL;
    p->n_in[s] = 0;
    p->component[s] = component;
    if (PAPI_create_eventset(&p->set[s]) != PAPI_OK) return -1;
    p->n_sets++;
    if (PAPI_assign_eventset_component(p->set[s], component) != PAPI_OK) return s;
    /* Threads made from now on count too; a component that does not know how counts this one alone. */
    option.inherit.eventset = p->set[s];
    if (PAPI_set_opt(PAPI_INHERIT, &option) == PAPI_OK) p->inherits = true;
    return s;
}

/* Alone, so that one that is not there keeps no other from being counted. */
static void add(tr_papi *p, int i)
{
    int code = PAPI_NULL;
    if (p->absent[i]) return;
    int result = PAPI_event_name_to_code(p->name[i], &code);

    if (result != PAPI_OK) {
        absent(p, i, "PAPI_event_name_to_code", PAPI_strerror(result));
        return;
    }
    const int s = set_of(p, PAPI_get_event_component(code));
    result = s < 0 ? PAPI_ENOMEM : PAPI_add_event(p->set[s], code);
    if (result != PAPI_OK) {
        absent(p, i, "PAPI_add_event", PAPI_strerror(result));
        return;
    }
    p->of[i] = s;
    p->at[i] = p->n_in[s]++;
}

static void start(tr_papi *p, int s)
{
    const int result = p->n_in[s] ? PAPI_start(p->set[s]) : PAPI_OK;

    for (int i = 0; i < p->n && result != PAPI_OK; i++)
        if (!p->absent[i] && p->of[i] == s) absent(p, i, "PAPI_start", PAPI_strerror(result));
    if (result != PAPI_OK) p->n_in[s] = 0;
}

static void name_unit(tr_papi *p, int i)
{
    int code = PAPI_NULL;
    PAPI_event_info_t info;

    p->units[i] = strstr(p->name[i], "-CLOCK") ? "ns" : "1";
    if (PAPI_event_name_to_code(p->name[i], &code) != PAPI_OK) return;
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

static void read_all(tr_papi *p, double *value)
{
    long long count[SETS_MAX][EVENTS_MAX];
    bool well[SETS_MAX];

    for (int s = 0; s < p->n_sets; s++)
        well[s] = p->n_in[s] > 0 && PAPI_read(p->set[s], count[s]) == PAPI_OK;
    for (int i = 0; i < p->n; i++)
        if (!p->absent[i] && well[p->of[i]]) value[i] = (double)count[p->of[i]][p->at[i]];
}

static void stop_all(tr_papi *p)
{
    long long count[EVENTS_MAX];

    for (int s = 0; s < p->n_sets; s++) {
        if (p->n_in[s]) PAPI_stop(p->set[s], count);
        PAPI_cleanup_eventset(p->set[s]);
        PAPI_destroy_eventset(&p->set[s]);
    }
}

#else

static void start_all(tr_papi *p)
{
    for (int i = 0; i < p->n; i++)
        absent(p, i, "this trireme", "built without PAPI");
}

static void read_all(tr_papi *p, double *value)
{
    (void)p, (void)value;
}

static void stop_all(tr_papi *p)
{
    (void)p;
}

#endif

static bool listed(const tr_papi *p, const char *name)
{
    for (int i = 0; i < p->n; i++)
        if (strcmp(p->name[i], name) == 0) return true;
    return false;
}

/* Names that the profile's own objects in /counters/papi have: no event of PAPI is called so. */
static bool reserved(const char *name)
{
    return !strcmp(name, ".") || !strcmp(name, "..") || !strcmp(name, "time");
}

/* Names between commas; empty ones, those that come again, and those beyond EVENTS_MAX are left out. */
static void split(tr_papi *p, const char *events)
{
    for (const char *s = events; *s && p->n < EVENTS_MAX;) {
        const size_t n = strcspn(s, ","), kept = n < NAME_BYTES ? n : NAME_BYTES - 1;
        char *name = p->name[p->n];
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

tr_papi *tr_papi_open(const char *events)
{
    tr_papi *p = calloc(1, sizeof *p);

    if (!p) return NULL;
    pthread_mutex_init(&p->lock, NULL);
    split(p, events ? events : default_events);
    start_all(p);
    return p;
}

void tr_papi_step(tr_papi *p, tr_phase phase)
{
    if (!p) return;
    double now[EVENTS_MAX];

    memcpy(now, p->last, sizeof now);
    read_all(p, now);
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < p->n; i++) {
        p->in_phase[phase][i] += now[i] - p->last[i];
        p->value[i] = p->last[i] = now[i];
    }
    pthread_mutex_unlock(&p->lock);
}

static void give(void *ctx, double *values)
{
    tr_papi *p = ctx;

    pthread_mutex_lock(&p->lock);
    memcpy(values, p->value, (size_t)p->n * sizeof *values);
    pthread_mutex_unlock(&p->lock);
}

static void give_phase(void *ctx, tr_phase phase, double *values)
{
    tr_papi *p = ctx;

    pthread_mutex_lock(&p->lock);
    memcpy(values, p->in_phase[phase], (size_t)p->n * sizeof *values);
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
    free(p);
}
