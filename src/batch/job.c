#include <config.h>

#include "batch/job.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "base/clock.h"

enum { QUEUE = 256, WAIT_MS = 20, MS = 1000000 };

typedef struct job {
    const tr_job_options *o;
    tr_job_counts *c;     /* the writer's, except skipped: the reader's */
    atomic_bool stopping; /* admit nothing more */
    atomic_ullong n_skipped;
    uint64_t n_taken, n_recorded; /* the writer's: events; those up to this one have their record */
    uint64_t saved_ns;            /* the writer's: when it last asked for what is to be saved */
    uint64_t save_cost_ns;        /* of the last saving: steps lost and processor time */
    uint64_t n_saves, all_saves_ns;
    /* Records of refused lines, on their way from the reader to the writer. */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct ready {
        tr_buf line;
        const char *code; /* of the refusal; NULL: invalid_line */
    } queue[QUEUE];
    int n_queue;
    bool reader_done;
    tr_status reader_st, writer_st;
    tr_err reader_err, writer_err;
    uint64_t begun_ns;
    int region_input, region_parse, region_submit, region_take, region_record, region_write,
        region_tick;
} job;

static void name_regions(job *j)
{
    tr_regions *in = j->o->read_regions, *out = j->o->write_regions;

    j->region_input = tr_region_id_of(in, "input/read", TR_KIND_IO, -1);
    j->region_parse = tr_region_id(in, "input/parse");
    j->region_submit = tr_region_id_of(in, "input/submit", TR_KIND_WAIT, -1);
    j->region_take = tr_region_id_of(out, "output/take", TR_KIND_WAIT, -1);
    j->region_record = tr_region_id(out, "output/record");
    j->region_write = tr_region_id_of(out, "output/write", TR_KIND_IO, -1);
    j->region_tick = tr_region_id_of(out, "output/sync", TR_KIND_IO, -1);
}

/* ---- reader ---------------------------------------------------------------------------------- */

static void nap(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * MS}, NULL);
}

/* Takes the line's memory. */
static void push(job *j, tr_buf line, const char *code)
{
    pthread_mutex_lock(&j->lock);
    while (j->n_queue == QUEUE && !atomic_load(&j->stopping))
        pthread_cond_wait(&j->changed, &j->lock);
    if (j->n_queue < QUEUE)
        j->queue[j->n_queue++] = (struct ready){line, code};
    else
        free(line.s);
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
}

/* What an earlier job has saved of this request goes with it. */
static void go_on_from(job *j, tr_request *r, uint64_t line)
{
    tr_progress *p = j->o->saved ? tr_saved_find(j->o->saved, line) : NULL;

    if (!p) return;
    if (tr_progress_fits(p, r, j->o->request.vocab_size)) {
        r->progress = p;
        return;
    }
    tr_log_warn(j->o->log, "line %ju: what was saved is not of its request: it starts over",
                (uintmax_t)line);
    tr_progress_free(p);
}

static tr_status read_one(job *j, tr_parser *parser, tr_envelope *e, const tr_line *line,
                          tr_err *err)
{
    const tr_job_options *o = j->o;
    tr_parsed parsed;
    tr_buf record = {0};
    tr_status st = tr_envelope_read(e, line, err);

    if (st != TR_OK) return st;
    if (tr_journal_has(o->journal, e->key)) {
        atomic_fetch_add(&j->n_skipped, 1);
        if (o->saved) tr_saved_done(o->saved, e->line);
        return TR_OK;
    }
    st = tr_parser_line(parser, e, &parsed, err);
    if (st != TR_OK) return st;
    while (tr_journal_stalled(o->journal) && !atomic_load(&j->stopping))
        nap(50);
    if (parsed.kind == TR_PARSED_REQUEST) {
        go_on_from(j, parsed.request, e->line);
        tr_region_begin(o->read_regions, j->region_submit);
        st = tr_engine_submit(o->engine, parsed.request, err);
        tr_region_end(o->read_regions, 0, 0);
        return st;
    }
    const tr_record_name name = {e->id.s, e->id.n, e->line};
    if (parsed.kind == TR_PARSED_REFUSED)
        st = tr_record_refusal(&record, &o->record, &name, &parsed.refusal, err);
    else
        st = tr_record_invalid(&record, &o->record, e->line, parsed.column, e->fault, err);
    if (st == TR_OK)
        push(j, record, parsed.kind == TR_PARSED_REFUSED ? parsed.refusal.code : NULL);
    else
        free(record.s);
    return st;
}

static void *reader(void *arg)
{
    job *j = arg;
    tr_parser *parser = NULL;
    tr_envelope e = {0};
    tr_line line;
    tr_status st = tr_parser_create(&parser, &j->o->request, &j->reader_err);

    while (st == TR_OK && !atomic_load(&j->stopping)) {
        tr_region_begin(j->o->read_regions, j->region_input);
        int got = tr_input_next(j->o->input, &line, &j->reader_err);
        tr_region_end(j->o->read_regions, got > 0 ? (double)line.n : 0, 0);
        if (got == 0) break;
        tr_region_begin(j->o->read_regions, j->region_parse);
        st = got < 0 ? j->reader_err.status : read_one(j, parser, &e, &line, &j->reader_err);
        tr_region_end(j->o->read_regions, 0, 0);
    }
    /* What was admitted still finishes, whatever went wrong here. */
    tr_engine_close(j->o->engine);
    tr_envelope_free(&e);
    tr_parser_free(parser);
    pthread_mutex_lock(&j->lock);
    j->reader_st = st == TR_E_STOP ? TR_OK : st; /* who stopped the engine knows why */
    j->reader_done = true;
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

/* ---- writer ---------------------------------------------------------------------------------- */

static void count_kind(tr_job_counts *c, const char *code)
{
    int i = 0;
    while (i < c->n_kinds && strcmp(c->code[i], code))
        i++;
    if (i == TR_JOB_KINDS_MAX) return;
    if (i == c->n_kinds) {
        c->code[i] = code;
        c->n_kinds++;
    }
    c->n_code[i]++;
}

/* The first failure of the writer ends the run; later ones are its consequences. */
static void writer_failed(job *j, tr_status st)
{
    if (j->writer_st == TR_OK) j->writer_st = st;
    atomic_store(&j->stopping, true);
    tr_engine_stop(j->o->engine);
    pthread_mutex_lock(&j->lock);
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
}

static void write_record(job *j, const tr_buf *line)
{
    tr_err err;
    if (j->writer_st != TR_OK) return;
    tr_region_begin(j->o->write_regions, j->region_write);
    tr_status st = tr_journal_append(j->o->journal, line->s, line->n, &err);
    tr_region_end(j->o->write_regions, (double)line->n, 0);
    if (st == TR_OK) return;
    j->writer_err = err;
    writer_failed(j, st);
}

/* Records of refused lines; true: there were some. */
static bool write_ready(job *j)
{
    struct ready ready[QUEUE];

    pthread_mutex_lock(&j->lock);
    int n = j->n_queue;
    memcpy(ready, j->queue, (size_t)n * sizeof *ready);
    j->n_queue = 0;
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
    for (int i = 0; i < n; i++) {
        write_record(j, &ready[i].line);
        free(ready[i].line.s);
        if (j->writer_st != TR_OK) continue;
        if (ready[i].code) {
            j->c->refused++;
            count_kind(j->c, ready[i].code);
        } else {
            j->c->invalid++;
        }
    }
    return n > 0;
}

static void write_event(job *j, tr_event *event)
{
    tr_buf line = {0};
    tr_err err;

    if (j->writer_st == TR_OK) {
        tr_status st = tr_record_answer(&line, &j->o->record, event, (int64_t)time(NULL), &err);
        if (st != TR_OK) {
            j->writer_err = err;
            writer_failed(j, st);
        }
    }
    write_record(j, &line);
    if (j->writer_st == TR_OK) {
        if (event->kind == TR_EVENT_FAILED) {
            tr_refusal refusal;
            tr_record_failure(event, &refusal);
            count_kind(j->c, refusal.code);
            if (refusal.status == 400) j->c->refused++;
            if (refusal.status == 500) j->c->failed++;
            if (!strcmp(refusal.code, "numerical_error")) j->c->numerical++;
        } else {
            j->c->answered++;
        }
        if (j->o->saved) tr_saved_done(j->o->saved, event->request->id);
    }
    j->n_taken++;
    if (j->writer_st == TR_OK) j->n_recorded = j->n_taken;
    free(line.s);
    tr_event_free(event);
}

/* ---- saving ---------------------------------------------------------------------------------- */

static uint64_t thread_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* How long to wait from one saving to the next. */
static double save_interval_s(const job *j, uint64_t now_ns)
{
    enum { COST_SHARE = 200, PART = 8, LEAST_S = 1, MOST_S = 120 };
    double s = (double)(now_ns - j->begun_ns) / 1e9 / PART;
    const double least = COST_SHARE * (double)j->save_cost_ns / 1e9;

    if (j->o->save_every_s >= 0) return j->o->save_every_s;
    if (s < LEAST_S) s = LEAST_S;
    if (s > MOST_S) s = MOST_S;
    return s > least ? s : least;
}

/* A copy may be older than records: what has one is not saved. */
static tr_progress *without_recorded(const job *j, tr_progress *list)
{
    tr_progress **at = &list;

    while (*at) {
        tr_progress *p = *at;
        if (!p->n_event || p->n_event > j->n_recorded) {
            at = &p->next;
            continue;
        }
        *at = p->next;
        tr_progress_free(p);
    }
    return list;
}

/* Of what runs, when there is something new; *spent: what it took. */
static void save(job *j, tr_saved_counts *counts)
{
    tr_progress *list;
    uint64_t spent_ns;

    if (!tr_engine_take_progress(j->o->engine, &list, &spent_ns)) return;
    const uint64_t begun_ns = thread_ns();
    list = without_recorded(j, list);
    tr_saved_write(j->o->saved, list, counts); /* a failure is warned about, and no more */
    tr_progress_free_list(list);
    j->save_cost_ns = spent_ns + thread_ns() - begun_ns;
    j->all_saves_ns += j->save_cost_ns;
    j->n_saves++;
}

static void save_now_and_then(job *j)
{
    tr_saved_counts counts;
    const uint64_t now_ns = tr_now_ns();

    if (!j->o->saved || j->o->save_every_s == 0) return;
    /* What the engine leaves when it stops is for save_at_end, when all that has ended is recorded. */
    if (tr_engine_draining(j->o->engine) || atomic_load(&j->stopping)) return;
    save(j, &counts);
    if ((double)(now_ns - j->saved_ns) / 1e9 < save_interval_s(j, now_ns)) return;
    j->saved_ns = now_ns;
    if (!tr_engine_draining(j->o->engine)) tr_engine_ask_progress(j->o->engine);
}

/* The run has ended: for the next one, or there is none. */
static void save_at_end(job *j, tr_status engine_st)
{
    const uint64_t done =
        j->c->skipped + j->c->answered + j->c->refused + j->c->invalid + j->c->failed;

    if (!j->o->saved) return;
    /* Answers that could not be recorded are in no copy of what runs any more: what was saved of them while they ran stays. */
    if (j->writer_st != TR_OK && j->n_saves) return;
    if (engine_st == TR_OK && done == tr_input_about(j->o->input)->n_mine)
        tr_saved_remove(j->o->saved);
    else if (engine_st == TR_OK || engine_st == TR_E_STOP)
        save(j, &j->c->saved);
}

/* ---- progress -------------------------------------------------------------------------------- */

/* "12.3 k" */
static void short_count(double x, char *out, size_t size)
{
    static const char *const unit[] = {"", "k", "M", "G", "T"};
    int i = 0;
    while (x >= 1000 && i < 4) {
        x /= 1000;
        i++;
    }
    snprintf(out, size, i ? "%.1f %s" : "%.0f %s", x, unit[i]);
}

static void progress(job *j)
{
    tr_engine_stats s = tr_engine_stats_get(j->o->engine);
    uint64_t total = tr_input_about(j->o->input)->n_mine;
    uint64_t mine = j->c->answered + j->c->refused + j->c->invalid + j->c->failed;
    uint64_t done = mine + atomic_load(&j->n_skipped);
    double seconds = (double)(tr_now_ns() - j->begun_ns) / 1e9;
    char tokens[32], rate[32], left[48] = "";

    short_count((double)s.generated_tokens, tokens, sizeof tokens);
    short_count((double)s.generated_tokens / (seconds + 1e-9), rate, sizeof rate);
    if (mine && done < total) {
        uint64_t t = (uint64_t)(seconds / (double)mine * (double)(total - done));
        snprintf(left, sizeof left, ", %02ju:%02ju:%02ju left", (uintmax_t)(t / 3600),
                 (uintmax_t)(t / 60 % 60), (uintmax_t)(t % 60));
    }
    tr_log_progress(j->o->log, "%ju/%ju requests, %stok out, %stok/s, %ju refused, %ju failed%s",
                    (uintmax_t)done, (uintmax_t)total, tokens, rate,
                    (uintmax_t)(j->c->refused + j->c->invalid), (uintmax_t)j->c->failed, left);
}

static bool reader_is_done(job *j)
{
    pthread_mutex_lock(&j->lock);
    bool done = j->reader_done && !j->n_queue;
    pthread_mutex_unlock(&j->lock);
    return done;
}

static void *writer(void *arg)
{
    job *j = arg;
    tr_event *event;
    tr_err err;

    for (;;) {
        bool busy = write_ready(j);
        tr_region_begin(j->o->write_regions, j->region_take);
        int got = tr_engine_take(j->o->engine, &event, busy ? 0 : WAIT_MS);
        tr_region_end(j->o->write_regions, 0, 0);
        if (got > 0) {
            if (j->o->seen) j->o->seen(j->o->seen_ctx, event);
            tr_region_begin(j->o->write_regions, j->region_record);
            write_event(j, event);
            tr_region_end(j->o->write_regions, 0, 0);
        }
        if (got < 0) {
            /* The engine has ended; the reader learns it from its next submit, or from this. */
            atomic_store(&j->stopping, true);
            if (reader_is_done(j)) break; /* what the engine left is saved behind this */
            if (!busy) nap(WAIT_MS);
        }
        if (tr_engine_draining(j->o->engine)) atomic_store(&j->stopping, true);
        tr_region_begin(j->o->write_regions, j->region_tick);
        tr_status st = j->writer_st == TR_OK ? tr_journal_tick(j->o->journal, &err) : TR_OK;
        tr_region_end(j->o->write_regions, 0, 0);
        if (st != TR_OK) {
            j->writer_err = err;
            writer_failed(j, st);
        }
        save_now_and_then(j);
        progress(j);
    }
    return NULL;
}

/* ---- the job --------------------------------------------------------------------------------- */

/* " at 12.3 tok/s", or nothing where no such step was taken: answers of one token come with their prompts. */
static const char *at_rate(char *out, size_t size, uint64_t tokens, uint64_t ns)
{
    out[0] = '\0';
    if (tokens && ns) snprintf(out, size, " at %.1f tok/s", (double)tokens * 1e9 / (double)ns);
    return out;
}

/* What was dropped, what of it was saved, and how to go on. */
static void say_what_is_left(const job *j, uint64_t n)
{
    const tr_saved_counts *saved = &j->c->saved;
    const char *reason = tr_engine_drain_reason(j->o->engine);
    char kept[128] = "";

    if (!n) return;
    if (saved->requests)
        snprintf(kept, sizeof kept, ", %ju of them begun, with %ju tokens saved",
                 (uintmax_t)saved->requests, (uintmax_t)saved->tokens);
    tr_log_info(j->o->log, "%s%s: %ju requests have no record yet%s; %s",
                reason ? "stopped by " : "ended early", reason ? reason : "", (uintmax_t)n, kept,
                j->o->saved ? "the same command goes on with them"
                            : "only with -o FILE could the same command go on with them");
}

static void summary(const job *j)
{
    const tr_job_counts *c = j->c;
    tr_engine_stats s = tr_engine_stats_get(j->o->engine);
    uint64_t total = tr_input_about(j->o->input)->n_mine;
    uint64_t done = c->skipped + c->answered + c->refused + c->invalid + c->failed;
    struct rusage usage;
    tr_buf kinds = {0};
    char went_on[64] = "", prompts[40], answers[40];

    for (int i = 0; i < c->n_kinds; i++)
        tr_buf_printf(&kinds, "%s%ju %s", i ? ", " : " (", (uintmax_t)c->n_code[i], c->code[i]);
    if (c->n_kinds) tr_buf_puts(&kinds, ")");
    if (c->continued)
        snprintf(went_on, sizeof went_on, ", %ju went on from their saved tokens",
                 (uintmax_t)c->continued);
    tr_log_info(j->o->log,
                "%ju requests: %ju answered, %ju refused, %ju failed, %ju invalid lines%s; %ju had "
                "a record before%s",
                (uintmax_t)total, (uintmax_t)c->answered, (uintmax_t)c->refused,
                (uintmax_t)c->failed, (uintmax_t)c->invalid, kinds.n ? kinds.s : "",
                (uintmax_t)c->skipped, went_on);
    free(kinds.s);
    memset(&usage, 0, sizeof usage);
    getrusage(RUSAGE_SELF, &usage);
    tr_log_info(
        j->o->log,
        "%ju prompt tokens%s, %.1f %% of the prompts cached, %ju generated%s, %ju steps, %ju "
        "preemptions, %.1f s, peak memory %.2f GB",
        (uintmax_t)s.prefill_tokens,
        at_rate(prompts, sizeof prompts, s.prefill_tokens, s.prefill_ns),
        s.prompt_tokens ? 100 * (double)s.cached_tokens / (double)s.prompt_tokens : 0,
        (uintmax_t)s.generated_tokens,
        at_rate(answers, sizeof answers, s.decode_tokens - s.mixed_decode_tokens, s.decode_ns),
        (uintmax_t)s.steps, (uintmax_t)s.preemptions, (double)(tr_now_ns() - j->begun_ns) / 1e9,
        (double)usage.ru_maxrss * 1024 / 1e9);
    if (j->n_saves)
        tr_log_debug(j->o->log, "saved %ju times: %.3f ms of steps and processor in all, %.4f %%",
                     (uintmax_t)j->n_saves, (double)j->all_saves_ns / 1e6,
                     100 * (double)j->all_saves_ns / (double)(tr_now_ns() - j->begun_ns));
    say_what_is_left(j, done < total ? total - done : 0); /* the input may have grown */
}

/* What the run amounts to: a failure to record outweighs a failure to compute, that one a
 * failure to read. */
static tr_status outcome(job *j, tr_status engine_st, const tr_err *engine_err, tr_err *err)
{
    const tr_job_counts *c = j->c;
    const char *reason = tr_engine_drain_reason(j->o->engine);
    uint64_t done = c->answered + c->refused + c->invalid + c->failed;
    const tr_err *from = NULL;

    if (j->writer_st != TR_OK)
        from = &j->writer_err;
    else if (engine_st != TR_OK && engine_st != TR_E_STOP)
        from = engine_err;
    else if (j->reader_st != TR_OK)
        from = &j->reader_err;
    if (from) {
        if (err) *err = *from;
        return from->status;
    }
    if (c->numerical * 100 > done)
        return tr_fail(
            err, TR_E_DEVICE,
            "%ju of %ju requests failed with numerical_error: suspect device or checkpoint",
            (uintmax_t)c->numerical, (uintmax_t)done);
    /* What had been submitted may have finished, and the reader have left lines behind. */
    if (engine_st == TR_E_STOP ||
        (reason && done + c->skipped < tr_input_about(j->o->input)->n_mine))
        return tr_fail(err, TR_E_STOP, "stopped by %s", reason ? reason : "request");
    return TR_OK;
}

tr_status tr_job_run(const tr_job_options *options, tr_job_counts *counts, tr_err *err)
{
    pthread_t read_thread, write_thread;
    tr_err engine_err = {0};
    job *j = calloc(1, sizeof *j);

    memset(counts, 0, sizeof *counts);
    if (!j) return tr_fail(err, TR_E_MEMORY, "out of memory");
    j->o = options;
    j->c = counts;
    j->begun_ns = j->saved_ns = tr_now_ns();
    name_regions(j);
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->changed, NULL);
    tr_status st = TR_OK;
    if (pthread_create(&write_thread, NULL, writer, j) != 0) {
        st = tr_fail(err, TR_E_MEMORY, "cannot start the writer thread");
        goto done;
    }
    bool reading = pthread_create(&read_thread, NULL, reader, j) == 0;
    if (!reading) {
        pthread_mutex_lock(&j->lock);
        j->reader_st = tr_fail(&j->reader_err, TR_E_MEMORY, "cannot start the reader thread");
        j->reader_done = true;
        pthread_mutex_unlock(&j->lock);
        tr_engine_close(options->engine);
    }
    tr_status engine_st = tr_engine_run(options->engine, &engine_err);
    if (reading) pthread_join(read_thread, NULL);
    pthread_join(write_thread, NULL);
    counts->skipped = atomic_load(&j->n_skipped);
    counts->continued = tr_engine_stats_get(options->engine).continued;
    save_at_end(j, engine_st);
    summary(j);
    st = outcome(j, engine_st, &engine_err, err);
done:
    for (int i = 0; i < j->n_queue; i++)
        free(j->queue[i].line.s);
    pthread_cond_destroy(&j->changed);
    pthread_mutex_destroy(&j->lock);
    free(j);
    return st;
}
