#include <config.h>

#include "engine/pace.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"

/* Own compute of a step over the median: twice it, in two windows one after the other, is nothing that the load of a few
 * seconds, a page that must be read or an uneven router does. */
static const double slow_ratio = 2.0;
enum { WINDOWS = 2 };

struct tr_pace {
    tr_pace_options o;
    int rank, size;
    uint64_t begun_ns, ended_ns; /* of the forward that runs, of the one before (0: none) */
    uint64_t waited_ns, rows_ns; /* counters when it began */
    uint64_t window_begun_ns;
    tr_pace_sample window, total;
    tr_pace_sample told; /* on its way: stays until it is heard */
    tr_ticket ticket;
    bool telling;
    int n_since;          /* steps since it was told */
    tr_pace_sample *all;  /* [size] */
    size_t *bytes;        /* [size] */
    int *n_slow;          /* [size] windows one after the other in which a rank was slow */
    uint64_t *named_ns;   /* [size] when it was last named */
    tr_pace_share *share; /* [o.n_stages] */
};

tr_status tr_pace_create(tr_pace **out, const tr_pace_options *options, tr_err *err)
{
    tr_pace *p = calloc(1, sizeof *p);
    const size_t n = (size_t)tr_comm_size(options->control);

    *out = NULL;
    if (p) {
        p->o = *options;
        p->rank = tr_comm_rank(options->control);
        p->size = (int)n;
        p->window.stage = p->total.stage = options->i_stage;
        snprintf(p->window.host, sizeof p->window.host, "%s", options->host ? options->host : "");
        memcpy(p->total.host, p->window.host, sizeof p->total.host);
        p->o.host = NULL;
        if (p->o.window_s <= 0) p->o.window_s = 3;
        if (!p->o.repeat_ns) p->o.repeat_ns = UINT64_C(60000000000);
        p->window_begun_ns = tr_now_ns();
        p->all = tr_calloc(n, sizeof *p->all);
        p->bytes = tr_calloc(n, sizeof *p->bytes);
        p->n_slow = tr_calloc(n, sizeof *p->n_slow);
        p->named_ns = tr_calloc(n, sizeof *p->named_ns);
        p->share = tr_calloc((size_t)options->n_stages, sizeof *p->share);
    }
    if (!p || !p->all || !p->bytes || !p->n_slow || !p->named_ns || !p->share) {
        tr_pace_free(p);
        return tr_fail(err, TR_E_MEMORY, "out of memory for the pace of %zu ranks", n);
    }
    for (size_t i = 0; i < n; i++)
        p->bytes[i] = sizeof *p->all;
    *out = p;
    return TR_OK;
}

void tr_pace_free(tr_pace *p)
{
    if (!p) return;
    free(p->all);
    free(p->bytes);
    free(p->n_slow);
    free(p->named_ns);
    free(p->share);
    free(p);
}

/* ---- measuring --------------------------------------------------------------------------------------------------- */

void tr_pace_begin(tr_pace *p, uint64_t waited_ns, uint64_t rows_ns)
{
    p->begun_ns = tr_now_ns();
    p->waited_ns = waited_ns;
    p->rows_ns = rows_ns;
}

static uint64_t less(uint64_t a, uint64_t b)
{
    return a > b ? a - b : 0;
}

static void add_step(tr_pace_sample *s, uint64_t since_ns, uint64_t forward_ns, uint64_t waited_ns,
                     uint64_t rows_ns, bool full, bool even)
{
    if (even) {
        s->n_even++;
        s->own_ns += less(forward_ns, waited_ns);
    }
    if (full) {
        s->n_full++;
        s->full_ns += since_ns;
        s->run_ns += less(forward_ns, rows_ns);
        s->rows_ns += rows_ns;
    }
}

void tr_pace_end(tr_pace *p, uint64_t waited_ns, uint64_t rows_ns, bool full, bool even)
{
    const uint64_t now_ns = tr_now_ns(), waited = less(waited_ns, p->waited_ns),
                   rows = less(rows_ns, p->rows_ns), forward = now_ns - p->begun_ns;

    full = full && p->ended_ns;
    const uint64_t since = full ? now_ns - p->ended_ns : 0;
    add_step(&p->window, since, forward, waited, rows, full, even);
    add_step(&p->total, since, forward, waited, rows, full, even);
    p->ended_ns = now_ns;
    p->n_since++;
}

/* ---- what samples say -------------------------------------------------------------------------------------------- */

static double step_s(const tr_pace_sample *s)
{
    return s->n_even >= TR_PACE_STEPS ? (double)s->own_ns * 1e-9 / (double)s->n_even : 0;
}

/* The rank of `s` in time among those it is compared with: how many are faster, and how many there are. */
static int n_faster(const tr_pace_sample *all, int n, const tr_pace_sample *s, int stage,
                    int *among)
{
    int faster = 0;

    *among = 0;
    for (int i = 0; i < n; i++) {
        const tr_pace_sample *x = &all[i];
        if ((stage >= 0 && x->stage != stage) || step_s(x) <= 0) continue;
        ++*among;
        faster += step_s(x) < step_s(s) || (!(step_s(x) > step_s(s)) && x < s);
    }
    return faster;
}

double tr_pace_ratio(const tr_pace_sample *all, int n, int rank, double *own_s, double *median_s)
{
    int among, stage = all[rank].stage;

    *own_s = step_s(&all[rank]);
    *median_s = 0;
    if (*own_s <= 0) return 0;
    n_faster(all, n, &all[rank], stage, &among);
    if (among == 1) stage = -1;
    for (int i = 0; i < n; i++) {
        if ((stage >= 0 && all[i].stage != stage) || step_s(&all[i]) <= 0) continue;
        if (n_faster(all, n, &all[i], stage, &among) == (among - 1) / 2)
            *median_s = step_s(&all[i]);
    }
    return among > 1 && *median_s > 0 ? *own_s / *median_s : 0;
}

double tr_pace_overlap(const tr_pace_sample *all, int n, int n_stages, tr_pace_share *share)
{
    double busiest = 0;

    for (int s = 0; s < n_stages; s++) {
        double full = 0, run = 0, rows = 0;
        for (int i = 0; i < n; i++) {
            if (all[i].stage != s) continue;
            full += (double)all[i].full_ns;
            run += (double)all[i].run_ns;
            rows += (double)all[i].rows_ns;
        }
        share[s] = (tr_pace_share){0};
        if (full <= 0) continue;
        share[s] = (tr_pace_share){run / full, rows / full, 1 - (run + rows) / full};
        if (share[s].runs > busiest) busiest = share[s].runs;
    }
    return busiest;
}

/* ---- telling each other ------------------------------------------------------------------------------------------ */

bool tr_pace_due(const tr_pace *p)
{
    return p->size > 1 && !p->telling && p->window.n_even >= TR_PACE_STEPS &&
           (double)(tr_now_ns() - p->window_begun_ns) * 1e-9 >= p->o.window_s;
}

static tr_status send_sample(tr_pace *p, const tr_pace_sample *sample, tr_err *err)
{
    p->told = *sample;
    p->n_since = 0;
    tr_status st = tr_comm_all_gather(p->o.control, &p->told, p->all, p->bytes, &p->ticket, err);
    p->telling = st == TR_OK;
    return st;
}

tr_status tr_pace_tell(tr_pace *p, tr_err *err)
{
    tr_status st = tr_pace_hear(p, true, err);

    if (st != TR_OK) return st;
    st = send_sample(p, &p->window, err);
    const tr_pace_sample empty = {.stage = p->window.stage};
    memcpy(&p->window, &empty, offsetof(tr_pace_sample, host));
    p->window_begun_ns = tr_now_ns();
    return st;
}

static void name_slow(tr_pace *p)
{
    const uint64_t now_ns = tr_now_ns();

    for (int i = 0; i < p->size; i++) {
        double own_s, median_s;
        const double ratio = tr_pace_ratio(p->all, p->size, i, &own_s, &median_s);
        p->n_slow[i] = ratio >= slow_ratio ? p->n_slow[i] + 1 : 0;
        if (p->n_slow[i] < WINDOWS) continue;
        if (p->named_ns[i] && now_ns - p->named_ns[i] < p->o.repeat_ns) continue;
        p->named_ns[i] = now_ns;
        p->all[i].host[sizeof p->all[i].host - 1] = '\0';
        tr_log_warn(p->o.log,
                    "rank %d on %s is slow and holds up the others: %.3g times the median of its "
                    "stage (%.3g ms of own compute for each of %llu steps, median %.3g ms)",
                    i, p->all[i].host, ratio, own_s * 1e3, (unsigned long long)p->all[i].n_even,
                    median_s * 1e3);
    }
}

tr_status tr_pace_hear(tr_pace *p, bool now, tr_err *err)
{
    if (!p->telling || (!now && p->n_since <= p->o.ring)) return TR_OK;
    p->telling = false;
    tr_status st = tr_comm_wait(p->o.control, TR_LANE_MAIN, p->ticket, err);
    if (st == TR_OK && p->rank == 0) name_slow(p);
    return st;
}

static void print_overlap(const tr_pace *p, const tr_pace_share *share, double busiest)
{
    tr_log_debug(p->o.log,
                 "pipeline: the busiest of %d stages runs %.3f of the time in which all have work",
                 p->o.n_stages, busiest);
    for (int s = 0; s < p->o.n_stages; s++)
        tr_log_debug(p->o.log, "pipeline: stage %d runs %.3f, waits for rows %.3f, for plans %.3f",
                     s, share[s].runs, share[s].rows, share[s].plan);
}

tr_status tr_pace_sum_up(tr_pace *p, double *overlap, tr_err *err)
{
    *overlap = 0;
    if (p->size == 1) return TR_OK;
    tr_status st = tr_pace_hear(p, true, err);
    if (st == TR_OK) st = send_sample(p, &p->total, err);
    p->telling = false;
    if (st == TR_OK) st = tr_comm_wait(p->o.control, TR_LANE_MAIN, p->ticket, err);
    if (st == TR_OK && p->rank == 0 && p->o.n_stages > 1) {
        *overlap = tr_pace_overlap(p->all, p->size, p->o.n_stages, p->share);
        if (*overlap > 0) print_overlap(p, p->share, *overlap);
    }
    return st;
}
