#include <config.h>

#include "profile/profile.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/size.h"
#include "profile/profile_priv.h"
#include "profile/snapshot.h"

enum {
    STEPS = 16384, /* between two samples */
    REQUESTS = 16384,
    LINES = 1024,
    LINE_BYTES = 512,
    STREAM_NODES = 4096,
};

/* ---- failure ------------------------------------------------------------------------------------------------------- */

bool tr_profile_survives(tr_profile *p, tr_status st, const tr_err *err)
{
    if (st == TR_OK) return true;
    if (!atomic_exchange(&p->dead, true))
        tr_log_warn(p->o.log, "the profile ends here: %s", err->text);
    return false;
}

bool tr_profile_well(const tr_profile *p)
{
    return p && !atomic_load(&p->dead);
}

/* ---- creation ------------------------------------------------------------------------------------------------------ */

static bool make_queue(tr_prof_queue *q, size_t bytes, size_t room)
{
    *q = (tr_prof_queue){.bytes = bytes, .room = room};
    q->in = tr_calloc(room, bytes);
    q->out = tr_calloc(room, bytes);
    return q->in && q->out;
}

static void free_queue(tr_prof_queue *q)
{
    free(q->in);
    free(q->out);
}

static bool make_tables(tr_profile_tables *t, const tr_profile_options *o)
{
    const size_t layers = (size_t)o->n_layers, experts = (size_t)o->n_experts;
    size_t n;

    t->comm = tr_calloc((size_t)o->n_comm, sizeof *t->comm);
    t->overlap = tr_calloc(layers, sizeof *t->overlap);
    t->rank_tokens = tr_calloc(layers, sizeof *t->rank_tokens);
    t->expert_tokens = tr_mul(&n, layers, experts) ? tr_calloc(n, sizeof(uint64_t)) : NULL;
    bool ok = t->comm && t->overlap && t->rank_tokens && t->expert_tokens;
    for (int i = 0; i < o->n_matrices; i++) {
        t->sent[i] = tr_calloc((size_t)o->world, sizeof(uint64_t));
        ok = ok && t->sent[i];
    }
    return ok;
}

static void free_tables(tr_profile_tables *t)
{
    free(t->comm);
    free(t->overlap);
    free(t->rank_tokens);
    free(t->expert_tokens);
    for (int i = 0; i < TR_PROFILE_MATRICES; i++)
        free(t->sent[i]);
}

static bool make_memory(tr_profile *p)
{
    const size_t layers = (size_t)p->o.n_layers;
    size_t n;

    if (!tr_mul(&n, layers, TR_PROFILE_WINDOWS)) return false;
    p->line = tr_calloc(LINES, sizeof(char *));
    p->window = tr_calloc(n, sizeof *p->window);
    p->window_copy = tr_calloc(n, sizeof *p->window_copy);
    p->tokens = tr_calloc(layers, sizeof *p->tokens);
    p->tokens_before = tr_calloc(layers, sizeof *p->tokens_before);
    p->window_steps = TR_PROFILE_FIRST_WINDOW;
    return p->line && p->window && p->window_copy && p->tokens && p->tokens_before &&
           make_queue(&p->steps, sizeof(tr_prof_step), STEPS) &&
           make_queue(&p->requests, sizeof(tr_prof_request), REQUESTS) &&
           make_tables(&p->now, &p->o) && make_tables(&p->copy, &p->o);
}

static void free_profile(tr_profile *p)
{
    for (int i = 0; i < p->n_streams; i++) {
        tr_prof_stream *s = &p->stream[i];
        if (s->regions) s->regions->sink = (tr_region_sink){0};
        free(s->node);
        free(s->row);
        free_queue(&s->events);
        pthread_mutex_destroy(&s->lock);
    }
    for (int i = 0; i < p->n_lines; i++)
        free(p->line[i]);
    free(p->line);
    free(p->window);
    free(p->window_copy);
    free(p->tokens);
    free(p->tokens_before);
    free_queue(&p->steps);
    free_queue(&p->requests);
    free_tables(&p->now);
    free_tables(&p->copy);
    free(p->region);
    free(p->column);
    free(p->values);
    free(p->path);
    free(p->part);
    free(p->fresh);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

static void make_locks(tr_profile *p)
{
    pthread_condattr_t attr;

    pthread_condattr_init(&attr); /* none of these can fail on Linux */
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, &attr);
    pthread_condattr_destroy(&attr);
}

tr_status tr_profile_create(tr_profile **out, const tr_profile_options *options, tr_err *err)
{
    tr_status st = TR_OK;

    *out = NULL;
    if (options->n_layers < 0 || options->n_experts < 0 || options->n_comm < 0 ||
        options->world < 1 || options->n_matrices < 0 || options->n_matrices > TR_PROFILE_MATRICES)
        return tr_fail(err, TR_E_USAGE, "profile: impossible lengths");
    tr_profile *p = calloc(1, sizeof *p);
    if (!p) return tr_fail(err, TR_E_MEMORY, "out of memory for the profile");
    p->o = *options;
    make_locks(p);
    for (int i = 0; i < options->n_matrices; i++)
        snprintf(p->matrix[i], sizeof p->matrix[i], "%s", options->matrix[i]);
    p->path = strdup(options->path);
    if (asprintf(&p->part, "%s.part", options->path) < 0) p->part = NULL;
    if (asprintf(&p->fresh, "%s.new", options->path) < 0) p->fresh = NULL;
    if (!p->path || !p->part || !p->fresh || !make_memory(p)) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory for the profile");
        goto done;
    }
    st = tr_prof_file_create(&p->file, p->fresh, err);
    if (st != TR_OK) goto done;
    *out = p;
    p = NULL;
    tr_profile_text(*out, "/", "schema", TR_PROFILE_SCHEMA);
    tr_profile_text(*out, "/", "version", TR_PROFILE_VERSION);
    tr_profile_number(*out, "/", "complete", 0);

done:
    if (p) free_profile(p);
    return st;
}

/* ---- what is known at the start -------------------------------------------------------------------------------------- */

void tr_profile_text(tr_profile *p, const char *object, const char *name, const char *value)
{
    tr_err err;
    if (!tr_profile_well(p)) return;
    tr_profile_survives(p, tr_prof_file_text(p->file, object, name, value, &err), &err);
}

void tr_profile_number(tr_profile *p, const char *object, const char *name, int64_t value)
{
    tr_err err;
    if (!tr_profile_well(p)) return;
    tr_profile_survives(p, tr_prof_file_number(p->file, object, name, value, &err), &err);
}

void tr_profile_put(tr_profile *p, tr_dataset_id id, const uint64_t *dims, const void *data)
{
    tr_err err;
    if (!tr_profile_well(p)) return;
    tr_status st = tr_prof_file_put(p->file, &tr_datasets[id], NULL, dims, data, &err);
    tr_profile_survives(p, st, &err);
}

static void keep_event(void *ctx, int node, uint64_t begun_ns, uint64_t ended_ns, double bytes)
{
    tr_prof_stream *s = ctx;
    tr_prof_queue *q = &s->events;
    const uint64_t dur = ended_ns - begun_ns;
    const bool in_step = s->is_main && s->regions->phase != TR_PHASE_NONE;

    if (node < 0) return;
    const tr_prof_trace e = {.region = (uint32_t)node,
                             .step = in_step ? atomic_load(&s->profile->step) : UINT32_MAX,
                             .t0 = tr_profile_time(s->profile, begun_ns),
                             .dur = dur < UINT32_MAX ? (uint32_t)dur : UINT32_MAX,
                             .bytes = bytes < UINT32_MAX ? (uint32_t)bytes : UINT32_MAX};
    pthread_mutex_lock(&s->lock);
    if (q->n_in < q->room)
        ((tr_prof_trace *)(void *)q->in)[q->n_in++] = e;
    else
        q->lost++;
    pthread_mutex_unlock(&s->lock);
}

void tr_profile_stream(tr_profile *p, tr_regions *regions)
{
    if (!tr_profile_well(p) || !regions || !regions->tree || p->n_streams == TR_PROFILE_STREAMS)
        return;
    tr_prof_stream *s = &p->stream[p->n_streams];
    tr_err err = {0};

    *s = (tr_prof_stream){
        .profile = p, .regions = regions, .nodes_max = STREAM_NODES, .is_main = p->n_streams == 0};
    snprintf(s->name, sizeof s->name, "%s", regions->total[regions->open[0].id].name);
    pthread_mutex_init(&s->lock, NULL);
    p->n_streams++;
    s->node = tr_calloc(STREAM_NODES, sizeof *s->node);
    s->row = tr_calloc(STREAM_NODES, sizeof *s->row);
    const bool ok =
        s->node && s->row &&
        (!p->o.trace || make_queue(&s->events, sizeof(tr_prof_trace), (size_t)p->o.events_max));
    if (!ok)
        tr_profile_survives(p, tr_fail(&err, TR_E_MEMORY, "out of memory"), &err);
    else if (p->o.trace)
        regions->sink = (tr_region_sink){s, keep_event};
}

void tr_profile_counter(tr_profile *p, const tr_profile_counters *counters)
{
    tr_err err = {0};
    int most = 1;

    if (!tr_profile_well(p) || p->n_sources == TR_PROFILE_SOURCES || counters->n < 1) return;
    p->source[p->n_sources++] = *counters;
    for (int i = 0; i < p->n_sources; i++)
        if (p->source[i].n > most) most = p->source[i].n;
    free(p->values);
    p->values = tr_calloc((size_t)most, sizeof *p->values);
    if (!p->values) tr_profile_survives(p, tr_fail(&err, TR_E_MEMORY, "out of memory"), &err);
}

/* ---- recording ------------------------------------------------------------------------------------------------------ */

int64_t tr_profile_time(const tr_profile *p, uint64_t now_ns)
{
    return p ? (int64_t)now_ns + p->o.clock_offset_ns - p->o.origin_ns : 0;
}

/* Locked. */
static void push(tr_prof_queue *q, const void *record)
{
    if (q->n_in < q->room)
        memcpy(q->in + q->n_in++ * q->bytes, record, q->bytes);
    else
        q->lost++;
}

/* Locked: a window is over. Neighbours are joined when there are too many, so that they never outgrow the memory. */
static void end_window(tr_profile *p, uint64_t step)
{
    const size_t layers = (size_t)p->o.n_layers;
    uint64_t *row = p->window + (size_t)p->n_windows * layers;

    for (size_t l = 0; l < layers; l++) {
        row[l] = p->tokens[l] - p->tokens_before[l];
        p->tokens_before[l] = p->tokens[l];
    }
    p->window_begun = step;
    if (++p->n_windows < TR_PROFILE_WINDOWS) return;
    for (size_t w = 0; w < TR_PROFILE_WINDOWS / 2; w++)
        for (size_t l = 0; l < layers; l++)
            p->window[w * layers + l] =
                p->window[2 * w * layers + l] + p->window[(2 * w + 1) * layers + l];
    p->n_windows /= 2;
    p->window_steps *= 2;
}

void tr_profile_begin_step(tr_profile *p, uint64_t step)
{
    if (tr_profile_well(p)) atomic_store(&p->step, (uint32_t)step);
}

void tr_profile_step(tr_profile *p, const tr_prof_step *step)
{
    if (!tr_profile_well(p)) return;
    pthread_mutex_lock(&p->lock);
    push(&p->steps, step);
    if (p->o.rank_tokens && step->step >= p->window_begun + p->window_steps) {
        p->o.rank_tokens(p->o.ctx, p->tokens);
        end_window(p, step->step);
    }
    if (p->wanted && p->o.tables) p->o.tables(p->o.ctx, &p->now);
    p->wanted = false;
    pthread_mutex_unlock(&p->lock);
}

void tr_profile_request(tr_profile *p, const tr_prof_request *request)
{
    if (!tr_profile_well(p)) return;
    tr_prof_request r = *request;
    pthread_mutex_lock(&p->lock);
    r.id = p->n_requests++;
    push(&p->requests, &r);
    pthread_mutex_unlock(&p->lock);
}

void tr_profile_warn(tr_profile *p, const char *fmt, ...)
{
    va_list args;
    char text[LINE_BYTES];

    if (!tr_profile_well(p)) return;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    char *line = strdup(text);
    pthread_mutex_lock(&p->lock);
    if (line && p->n_lines < LINES)
        p->line[p->n_lines++] = line;
    else
        p->n_lost_lines++;
    line = p->n_lines && p->line[p->n_lines - 1] == line ? NULL : line;
    pthread_mutex_unlock(&p->lock);
    free(line);
}

/* ---- the thread ------------------------------------------------------------------------------------------------------ */

static size_t swap(pthread_mutex_t *lock, tr_prof_queue *q)
{
    pthread_mutex_lock(lock);
    char *const full = q->in;
    q->in = q->out;
    q->out = full;
    q->n_out = q->n_in;
    q->n_in = 0;
    pthread_mutex_unlock(lock);
    return q->n_out;
}

static tr_status take_lines(tr_profile *p, tr_err *err)
{
    char *line[LINES];

    pthread_mutex_lock(&p->lock);
    const int n = p->n_lines;
    memcpy(line, p->line, (size_t)n * sizeof *line);
    p->n_lines = 0;
    pthread_mutex_unlock(&p->lock);
    tr_status st =
        tr_prof_file_append(p->file, &tr_datasets[TR_D_LOG], NULL, (uint64_t)n, line, err);
    for (int i = 0; i < n; i++)
        free(line[i]);
    return st;
}

static tr_status take_events(tr_profile *p, tr_prof_stream *s, tr_err *err)
{
    char path[TR_REGION_NAME + 16];
    const size_t n = swap(&s->lock, &s->events);
    tr_prof_trace *e = (tr_prof_trace *)(void *)s->events.out;

    tr_status st = n ? tr_profile_map_regions(p, err) : TR_OK;
    for (size_t i = 0; i < n && st == TR_OK; i++)
        e[i].region = s->row[e[i].region];
    snprintf(path, sizeof path, "/trace/%s", s->name);
    if (st == TR_OK) st = tr_prof_file_append(p->file, &tr_datasets[TR_D_TRACE], path, n, e, err);
    return st;
}

static tr_status sample_counters(tr_profile *p, const tr_profile_counters *c, int64_t t,
                                 tr_err *err)
{
    char path[256];
    tr_status st = TR_OK;

    snprintf(path, sizeof path, "/counters/%s/time", c->source);
    st = tr_prof_file_append(p->file, &tr_datasets[TR_D_COUNTER_TIME], path, 1, &t, err);
    c->read(c->ctx, p->values);
    for (int i = 0; i < c->n && st == TR_OK; i++) {
        if (c->absent[i]) continue;
        tr_profile_counter_path(path, sizeof path, "/counters", c->source, c->name[i]);
        st = tr_prof_file_append(p->file, &tr_datasets[TR_D_COUNTER], path, 1, &p->values[i], err);
    }
    return st;
}

/* What has come since the last time, and a sample of what changes slowly. */
static tr_status collect(tr_profile *p, tr_err *err)
{
    tr_prof_kv kv = {0};
    tr_prof_memory memory = {0};
    tr_status st = TR_OK;
    const size_t n_steps = swap(&p->lock, &p->steps), n_requests = swap(&p->lock, &p->requests);

    st = tr_prof_file_append(p->file, &tr_datasets[TR_D_STEPS], NULL, n_steps, p->steps.out, err);
    if (st == TR_OK && n_requests)
        st = tr_prof_file_append(p->file, &tr_datasets[TR_D_REQUESTS], NULL, n_requests,
                                 p->requests.out, err);
    if (st == TR_OK) st = take_lines(p, err);
    for (int i = 0; i < p->n_streams && p->o.trace && st == TR_OK; i++)
        st = take_events(p, &p->stream[i], err);
    const int64_t t = tr_profile_time(p, tr_now_ns());
    if (p->o.sample && st == TR_OK) {
        p->o.sample(p->o.ctx, &kv, &memory);
        kv.t = memory.t = t;
        st = tr_prof_file_append(p->file, &tr_datasets[TR_D_KV], NULL, 1, &kv, err);
        if (st == TR_OK)
            st = tr_prof_file_append(p->file, &tr_datasets[TR_D_MEMORY], NULL, 1, &memory, err);
    }
    for (int i = 0; i < p->n_sources && st == TR_OK; i++)
        st = sample_counters(p, &p->source[i], t, err);
    return st;
}

static tr_status flush(tr_profile *p, tr_err *err)
{
    const uint64_t begun_ns = tr_now_ns();
    tr_status st = tr_profile_write_tables(p, err);

    if (st == TR_OK) st = tr_prof_file_flush(p->file, err);
    if (st == TR_OK && begun_ns >= p->next_copy_ns) {
        const uint64_t flushed_ns = tr_now_ns();
        st = tr_profile_snapshot(p->fresh, p->part, p->o.clear, err);
        if (st == TR_OK && p->o.copied) p->o.copied(p->o.ctx);
        /* A trace makes a file large: copying takes a hundredth of the time at most. */
        p->next_copy_ns = begun_ns + 100 * (tr_now_ns() - flushed_ns);
    }
    const uint64_t took = tr_now_ns() - begun_ns;
    pthread_mutex_lock(&p->lock);
    p->costs.flushes++;
    p->costs.flush_ns += took;
    if (took > p->costs.longest_ns) p->costs.longest_ns = took;
    pthread_mutex_unlock(&p->lock);
    return st;
}

static struct timespec at(uint64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u),
                             .tv_nsec = (long)(ns % 1000000000u)};
}

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *work(void *arg)
{
    tr_profile *p = arg;
    const uint64_t sample = (uint64_t)(p->o.sample_s * 1e9), every = (uint64_t)(p->o.flush_s * 1e9);
    uint64_t next = tr_now_ns() + sample, next_flush = tr_now_ns() + every;
    tr_err err;

    pthread_mutex_lock(&p->lock);
    while (!p->stop && !atomic_load(&p->dead)) {
        const struct timespec until = at(next);
        if (pthread_cond_timedwait(&p->wake, &p->lock, &until) != ETIMEDOUT) continue;
        /* The tables come with the next step: asked for in time for the next flush. */
        p->wanted = true;
        pthread_mutex_unlock(&p->lock);
        tr_status st = collect(p, &err);
        if (st == TR_OK && next >= next_flush) {
            st = flush(p, &err);
            next_flush = tr_now_ns() + every;
        }
        tr_profile_survives(p, st, &err);
        next += sample;
        if (next < tr_now_ns()) next = tr_now_ns() + sample;
        pthread_mutex_lock(&p->lock);
        p->costs.cpu_ns = cpu_ns();
    }
    p->costs.cpu_ns = cpu_ns();
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

void tr_profile_start(tr_profile *p)
{
    sigset_t all, before;
    tr_err err = {0};

    if (!tr_profile_well(p) || p->started) return;
    p->started = true;
    /* Whatever is known now survives a kill from here on, and all datasets that grow are there. */
    tr_status st = collect(p, &err);
    if (st == TR_OK) st = flush(p, &err);
    if (!tr_profile_survives(p, st, &err)) return;
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    p->running = pthread_create(&p->thread, NULL, work, p) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!p->running)
        tr_profile_survives(p, tr_fail(&err, TR_E_MEMORY, "cannot start the profile's thread"),
                            &err);
}

/* ---- the end ----------------------------------------------------------------------------------------------------------- */

/* What came faster than there was room for. */
static tr_status say_lost(tr_profile *p, tr_err *err)
{
    const struct {
        const char *name;
        uint64_t n;
    } lost[] = {{"steps_lost", p->steps.lost},
                {"requests_lost", p->requests.lost},
                {"lines_lost", p->n_lost_lines}};
    tr_status st = TR_OK;

    for (size_t i = 0; i < sizeof lost / sizeof *lost && st == TR_OK; i++)
        st = tr_prof_file_number(p->file, "/", lost[i].name, (int64_t)lost[i].n, err);
    return st;
}

void tr_profile_stop(tr_profile *p)
{
    tr_err err = {0};

    if (!p || !p->started) return;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->lock);
    if (p->running) pthread_join(p->thread, NULL);
    p->running = false;
    p->started = false;
    if (atomic_load(&p->dead)) return;
    if (p->o.tables) p->o.tables(p->o.ctx, &p->now);
    if (p->o.rank_tokens && p->n_windows < TR_PROFILE_WINDOWS) {
        p->o.rank_tokens(p->o.ctx, p->tokens);
        end_window(p, p->window_begun);
    }
    tr_status st = collect(p, &err);
    if (st == TR_OK) st = flush(p, &err);
    if (st == TR_OK) st = say_lost(p, &err);
    for (int i = 0; i < p->n_streams && st == TR_OK && p->o.trace; i++) {
        char path[TR_REGION_NAME + 16];
        snprintf(path, sizeof path, "/trace/%s", p->stream[i].name);
        st = tr_prof_file_number(p->file, path, "dropped", (int64_t)p->stream[i].events.lost, &err);
    }
    tr_profile_survives(p, st, &err);
}

void tr_profile_close(tr_profile *p, bool complete)
{
    tr_err err = {0};

    if (!p) return;
    tr_profile_stop(p);
    tr_status st = TR_OK;
    if (tr_profile_well(p) && complete) st = tr_prof_file_number(p->file, "/", "complete", 1, &err);
    tr_err later;
    tr_status closed = tr_prof_file_close(p->file, st == TR_OK ? &err : &later);
    if (st == TR_OK) st = closed;
    if (tr_profile_survives(p, st, &err) && tr_profile_well(p)) {
        if (rename(p->fresh, p->path) == 0)
            remove(p->part);
        else
            tr_log_warn(p->o.log, "the profile stays %s: %s", p->fresh, strerror(errno));
    }
    free_profile(p);
}

tr_profile_costs tr_profile_costs_get(tr_profile *p)
{
    tr_profile_costs c = {0};

    if (!p) return c;
    pthread_mutex_lock(&p->lock);
    c = p->costs;
    c.lost_steps = p->steps.lost;
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n_streams; i++)
        c.lost_events += p->stream[i].events.lost;
    return c;
}
