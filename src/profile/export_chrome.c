#include <config.h>

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/export.h"

enum { LANES = 8, TID_TRACE = 100 };
#define TIME_MAX ((int64_t)1 << 61) /* further off is damage, and sums of two stay numbers */

typedef struct chrome {
    FILE *out;
    tr_reader *r;
    bool any;
} chrome;

/* ---- events -------------------------------------------------------------------------------------------------------- */

static void comma(chrome *c)
{
    fputs(c->any ? ",\n" : "\n", c->out);
    c->any = true;
}

/* Microseconds, to the nanosecond. */
static void put_time(chrome *c, int64_t ns)
{
    const uint64_t a = ns < 0 ? -(uint64_t)ns : (uint64_t)ns;
    fprintf(c->out, "%s%" PRIu64 ".%03u", ns < 0 ? "-" : "", a / 1000, (unsigned)(a % 1000));
}

/* {"ph": "B", "pid": .., "tid": .., "ts": ..  and no end yet */
static void event(chrome *c, char phase, int pid, int tid, int64_t ns)
{
    comma(c);
    fprintf(c->out, "{\"ph\":\"%c\",\"pid\":%d,\"tid\":%d,\"ts\":", phase, pid, tid);
    put_time(c, ns);
}

static void put_name(chrome *c, const char *name, const char *category)
{
    fputs(",\"name\":", c->out);
    tr_export_quote(c->out, name);
    fputs(",\"cat\":", c->out);
    tr_export_quote(c->out, category);
}

/* what: process_name or thread_name */
static void name_it(chrome *c, const char *what, int pid, int tid, const char *name)
{
    comma(c);
    fprintf(c->out, "{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"%s\",\"args\":{\"name\":", pid,
            tid, what);
    tr_export_quote(c->out, name);
    fputs("}}", c->out);
}

static void sort_it(chrome *c, int pid)
{
    comma(c);
    fprintf(c->out,
            "{\"ph\":\"M\",\"pid\":%d,\"tid\":0,\"name\":\"process_sort_index\",\"args\":{\"sort_"
            "index\":%d}}",
            pid, pid);
}

/* ---- steps --------------------------------------------------------------------------------------------------------- */

static void put_step(chrome *c, int rank, int lane, const tr_prof_step *t)
{
    const char *mode = t->mode < TR_N_PHASES ? tr_phase_names.name[t->mode] : "step";
    char name[64];
    snprintf(name, sizeof name, "step %ju %s", (uintmax_t)t->step, mode);
    event(c, 'B', rank, lane, t->t0);
    put_name(c, name, "STEP");
    fprintf(c->out,
            ",\"args\":{\"step\":%ju,\"requests\":%u,\"prompt tokens\":%u,\"answer tokens\":%u,"
            "\"queue\":%u,\"plan ns\":%ju,\"wait ns\":%ju",
            (uintmax_t)t->step, t->nreq, t->tok_prefill, t->tok_decode, t->queue,
            (uintmax_t)t->plan_ns, (uintmax_t)t->sync_wait_ns);
    if (t->gpu_ns) fprintf(c->out, ",\"gpu ns\":%ju", (uintmax_t)t->gpu_ns);
    fputs("}}", c->out);
    event(c, 'E', rank, lane, t->t1);
    fputc('}', c->out);
}

static void put_counters(chrome *c, int rank, const tr_prof_step *t)
{
    const double rate = ((double)t->tok_prefill + t->tok_decode + t->accepted) * 1e9 /
                        ((double)t->t1 - (double)t->t0);
    event(c, 'C', rank, 0, t->t0);
    fprintf(c->out, ",\"name\":\"tokens/s\",\"args\":{\"rate\":%.6g}}", rate);
    event(c, 'C', rank, 0, t->t0);
    fprintf(c->out, ",\"name\":\"queue\",\"args\":{\"requests\":%u}}", t->queue);
    event(c, 'C', rank, 0, t->t0);
    fprintf(c->out, ",\"name\":\"cache\",\"args\":{\"pages\":%u}}", t->pages_used);
}

/* A step begins while the one before is being read back: each goes to the first line of the picture that is free, so that
 * begins and ends of a line never cross. One that finds none is left out (a ring has fewer steps). */
static tr_status put_steps(chrome *c, int rank, tr_err *err)
{
    int64_t free_at[LANES];
    tr_prof_step *t = NULL;
    size_t n = 0;
    int used = 0;
    tr_status st = tr_reader_steps(c->r, rank, &t, &n, err);
    if (st != TR_OK) return st;
    for (size_t i = 0; i < n; i++) {
        int lane = 0;
        if (t[i].t0 < -TIME_MAX || t[i].t1 > TIME_MAX) continue;
        while (lane < used && free_at[lane] > t[i].t0)
            lane++;
        if (lane == LANES) continue;
        if (lane == used) {
            char name[32];
            snprintf(name, sizeof name, used ? "steps %d" : "steps", used + 1);
            name_it(c, "thread_name", rank, lane, name);
            used++;
        }
        free_at[lane] = t[i].t1;
        put_step(c, rank, lane, &t[i]);
        put_counters(c, rank, &t[i]);
    }
    free(t);
    return TR_OK;
}

/* ---- single regions ------------------------------------------------------------------------------------------------ */

typedef struct span {
    int64_t t0, t1;
    size_t
        row; /* regions are recorded when they end: of two with the same times the later one lies outside */
    uint32_t region, step, bytes;
} span;

static int outer_first(const void *a, const void *b)
{
    const span *x = a, *y = b;
    if (x->t0 != y->t0) return x->t0 < y->t0 ? -1 : 1;
    if (x->t1 != y->t1) return x->t1 > y->t1 ? -1 : 1;
    return x->row > y->row ? -1 : x->row < y->row;
}

static void begin_span(chrome *c, int rank, int tid, const span *s)
{
    const tr_reader_about *about = tr_reader_about_of(c->r);
    const tr_reader_region *g = tr_reader_regions(c->r);
    const bool known = s->region < (uint32_t)about->n_regions;
    char name[96] = "?";
    if (known && g[s->region].kind == TR_KIND_LAYER && g[s->region].layer >= 0)
        snprintf(name, sizeof name, "%s %d", g[s->region].name, g[s->region].layer);
    else if (known)
        snprintf(name, sizeof name, "%s", g[s->region].name);
    event(c, 'B', rank, tid, s->t0);
    put_name(c, name, known ? tr_kind_names.name[g[s->region].kind] : "?");
    fputs(",\"args\":{", c->out);
    if (s->step != UINT32_MAX) fprintf(c->out, "\"step\":%u", s->step);
    if (s->bytes) fprintf(c->out, "%s\"bytes\":%u", s->step != UINT32_MAX ? "," : "", s->bytes);
    fputs("}}", c->out);
}

static void end_span(chrome *c, int rank, int tid, int64_t t1)
{
    event(c, 'E', rank, tid, t1);
    fputc('}', c->out);
}

/* Begins and ends as brackets: rounding of clocks may have let a child outlast its parent by a little. */
static void put_spans(chrome *c, int rank, int tid, span *s, size_t n, int64_t *open)
{
    size_t deep = 0;
    qsort(s, n, sizeof *s, outer_first);
    for (size_t i = 0; i < n; i++) {
        while (deep > 0 && open[deep - 1] <= s[i].t0)
            end_span(c, rank, tid, open[--deep]);
        if (deep > 0 && s[i].t1 > open[deep - 1]) s[i].t1 = open[deep - 1];
        begin_span(c, rank, tid, &s[i]);
        open[deep++] = s[i].t1;
    }
    while (deep > 0)
        end_span(c, rank, tid, open[--deep]);
}

static tr_status put_stream(chrome *c, int rank, int tid, const char *path, tr_err *err)
{
    tr_h5_data data;
    size_t n = 0;
    tr_status st = tr_reader_read(c->r, TR_D_TRACE, path, rank, &data, err);
    if (st != TR_OK) return st;
    span *s = tr_calloc(data.n, sizeof *s);
    int64_t *open = tr_calloc(data.n, sizeof *open);
    const tr_prof_trace *t = data.at;
    if (!s || !open) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", path);
        goto done;
    }
    int64_t ended = -TIME_MAX;
    for (size_t i = 0; i < data.n; i++) {
        const bool filler = t[i].dur == 0 && t[i].t0 == 0; /* of a joined table */
        if (filler || t[i].t0 < -TIME_MAX || t[i].t0 > TIME_MAX) continue;
        /* A duration ends at 4.29 s, which is less than a run takes: the region before has ended by then, too. */
        const int64_t t1 = t[i].t0 + t[i].dur;
        ended = t[i].dur == UINT32_MAX && ended > t1 ? ended : t1;
        s[n++] = (span){t[i].t0, ended, i, t[i].region, t[i].step, t[i].bytes};
    }
    if (n > 0) name_it(c, "thread_name", rank, tid, strrchr(path, '/') + 1);
    put_spans(c, rank, tid, s, n, open);
done:
    free(s);
    free(open);
    free(data.at);
    return st;
}

/* ---- requests ------------------------------------------------------------------------------------------------------ */

static void async(chrome *c, char phase, int pid, const tr_prof_request *q, const char *name,
                  int64_t ns)
{
    event(c, phase, pid, 0, ns);
    put_name(c, name, "request");
    fprintf(c->out, ",\"id\":%ju}", (uintmax_t)q->id);
}

static tr_status put_requests(chrome *c, int pid, tr_err *err)
{
    tr_h5_data data;
    tr_status st = tr_reader_read(c->r, TR_D_REQUESTS, NULL, -1, &data, err);
    if (st != TR_OK) return st;
    const tr_prof_request *q = data.at;
    if (data.n > 0) {
        name_it(c, "process_name", pid, 0, "requests");
        sort_it(c, pid);
    }
    for (size_t i = 0; i < data.n; i++) {
        char name[64];
        const bool generated = q[i].t_first >= q[i].t_arrive && q[i].t_first <= q[i].t_done;
        if (q[i].t_done < q[i].t_arrive || q[i].t_arrive < -TIME_MAX || q[i].t_done > TIME_MAX)
            continue;
        snprintf(name, sizeof name, "line %ju", (uintmax_t)q[i].line);
        async(c, 'b', pid, &q[i], name, q[i].t_arrive);
        if (generated) {
            async(c, 'b', pid, &q[i], "to the first token", q[i].t_arrive);
            async(c, 'e', pid, &q[i], "to the first token", q[i].t_first);
            async(c, 'b', pid, &q[i], "answer", q[i].t_first);
            async(c, 'e', pid, &q[i], "answer", q[i].t_done);
        }
        async(c, 'e', pid, &q[i], name, q[i].t_done);
    }
    free(data.at);
    return TR_OK;
}

/* ---- all ----------------------------------------------------------------------------------------------------------- */

static void put_about(chrome *c)
{
    const tr_reader_text *t;
    bool first = true;
    fputs("{\"displayTimeUnit\":\"ms\",\"otherData\":{", c->out);
    for (size_t i = 0; (t = tr_reader_text_at(c->r, i)) != NULL; i++) {
        char name[256];
        snprintf(name, sizeof name, "%s%s%s", t->object, strcmp(t->object, "/") ? "/" : "",
                 t->name);
        fputs(first ? "" : ",", c->out);
        tr_export_quote(c->out, name);
        fputc(':', c->out);
        tr_export_quote(c->out, t->value);
        first = false;
    }
    fputs("},\"traceEvents\":[", c->out);
}

tr_status tr_export_chrome(FILE *out, tr_reader *r, tr_err *err)
{
    chrome c = {.out = out, .r = r};
    const int n_ranks = tr_reader_about_of(r)->n_ranks;
    char **paths = NULL;
    size_t n_paths = 0;
    tr_status st = tr_reader_names(r, TR_D_TRACE, &paths, &n_paths, err);

    if (st == TR_OK) put_about(&c);
    for (int i = 0; i < n_ranks && st == TR_OK; i++) {
        char name[128];
        if (!tr_reader_has(r, i)) continue;
        snprintf(name, sizeof name, "rank %d %s", i, tr_reader_rank(r, i)->host);
        name_it(&c, "process_name", i, 0, name);
        sort_it(&c, i);
        st = put_steps(&c, i, err);
        for (size_t k = 0; k < n_paths && st == TR_OK; k++)
            st = put_stream(&c, i, TID_TRACE + (int)k, paths[k], err);
    }
    if (st == TR_OK) st = put_requests(&c, n_ranks, err);
    if (st == TR_OK) fputs("\n]}\n", out);
    tr_h5_texts_free(paths, n_paths);
    return st;
}
