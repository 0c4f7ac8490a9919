#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/order.h"
#include "base/size.h"
#include "profile/summary_priv.h"

/* ---- tokens over time ---------------------------------------------------------------------------------------------- */

/* One rank for each replica: all ranks of a replica have the same steps. Its lowest rank that is present. */
static bool speaks_for_replica(const tr_reader *r, int rank)
{
    const int dp = tr_reader_rank(r, rank)->dp;
    if (!tr_reader_has(r, rank)) return false;
    for (int i = 0; i < rank; i++)
        if (tr_reader_has(r, i) && tr_reader_rank(r, i)->dp == dp) return false;
    return true;
}

/* Tokens of a step, spread evenly over the stretches that it touches. */
static void spread(const tr_summary *s, double *rate, double t0, double t1, double tokens)
{
    const double width = (s->t_end - s->t_begin) / TR_SUMMARY_BINS;
    if (!(width > 0) || !(t1 > t0) || tokens <= 0) return;
    for (int i = (int)((t0 - s->t_begin) / width); i < TR_SUMMARY_BINS; i++) {
        const double low = s->t_begin + i * width, high = low + width;
        const double from = t0 > low ? t0 : low, to = t1 < high ? t1 : high;
        if (low >= t1) break;
        if (to > from) rate[i] += tokens * (to - from) / (t1 - t0) / width;
    }
}

static double step_out(const tr_prof_step *t)
{
    return (double)t->tok_decode + t->accepted;
}

static void add_steps(tr_summary *s, const tr_prof_step *t, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double t0 = (double)t[i].t0 * 1e-9, t1 = (double)t[i].t1 * 1e-9;
        spread(s, s->rate_in, t0, t1, t[i].tok_prefill);
        spread(s, s->rate_out, t0, t1, step_out(&t[i]));
    }
}

static void count_steps(tr_summary *s, const tr_prof_step *t, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double t0 = (double)t[i].t0 * 1e-9, t1 = (double)t[i].t1 * 1e-9;
        const double pages = (double)t[i].pages_used + t[i].pages_free;
        if (!s->has_steps || t0 < s->t_begin) s->t_begin = t0;
        if (!s->has_steps || t1 > s->t_end) s->t_end = t1;
        s->has_steps = true;
        s->tokens_in += t[i].tok_prefill;
        s->tokens_out += step_out(&t[i]);
        s->drafted += t[i].drafted;
        s->accepted += t[i].accepted;
        if (pages > 0 && t[i].pages_used / pages > s->kv_used) s->kv_used = t[i].pages_used / pages;
    }
    if (n > s->steps) s->steps = n;
}

tr_status tr_summary_steps(tr_summary *s, tr_reader *r, tr_err *err)
{
    const int n_ranks = tr_reader_about_of(r)->n_ranks;
    tr_status st = TR_OK;
    for (int pass = 0; pass < 2; pass++) /* the ends first, then what lies between */
        for (int i = 0; i < n_ranks && st == TR_OK; i++) {
            tr_prof_step *t = NULL;
            size_t n = 0;
            if (!speaks_for_replica(r, i)) continue;
            st = tr_reader_steps(r, i, &t, &n, err);
            if (st == TR_OK && pass == 0) count_steps(s, t, n);
            if (st == TR_OK && pass == 1) add_steps(s, t, n);
            free(t);
        }
    return st;
}

/* ---- requests ------------------------------------------------------------------------------------------------------ */

/* The value below which a share of n sorted ones lies; 0 of none. */
static double quantile(const double *sorted, size_t n, double share)
{
    return n ? sorted[(size_t)((double)(n - 1) * share + 0.5)] : 0;
}

tr_status tr_summary_requests(tr_summary *s, tr_reader *r, tr_err *err)
{
    tr_h5_data data;
    size_t n_first = 0, n_each = 0;
    tr_status st = tr_reader_read(r, TR_D_REQUESTS, NULL, -1, &data, err);
    if (st != TR_OK) return st;
    double *first = tr_calloc(data.n, sizeof *first), *each = tr_calloc(data.n, sizeof *each);
    const tr_prof_request *q = data.at;
    if (!first || !each) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    for (size_t i = 0; i < data.n; i++) {
        s->requests++;
        if (q[i].finish == 2) s->failed++;
        if (q[i].t_first > q[i].t_arrive)
            first[n_first++] = ((double)q[i].t_first - (double)q[i].t_arrive) * 1e-9;
        if (q[i].n_out > 1 && q[i].t_done > q[i].t_first)
            each[n_each++] = ((double)q[i].t_done - (double)q[i].t_first) * 1e-9 / (q[i].n_out - 1);
    }
    tr_sort(first, n_first);
    tr_sort(each, n_each);
    s->ttft_p50_s = quantile(first, n_first, 0.5);
    s->ttft_p99_s = quantile(first, n_first, 0.99);
    s->tpot_p50_s = quantile(each, n_each, 0.5);
done:
    free(first);
    free(each);
    free(data.at);
    return st;
}

/* ---- communication ------------------------------------------------------------------------------------------------- */

static int most_exposed(const void *a, const void *b)
{
    const tr_summary_comm *x = a, *y = b;
    if (x->exposed_s != y->exposed_s) return x->exposed_s < y->exposed_s ? 1 : -1;
    if (x->time_s != y->time_s) return x->time_s < y->time_s ? 1 : -1;
    return strcmp(x->op, y->op);
}

enum { COMM_MAX = 512 };

/* The row of a group and an operation; NULL: the table is full. */
static tr_summary_comm *comm_row(tr_summary *s, const char *group, const char *op)
{
    for (int i = 0; i < s->n_comm; i++)
        if (!strcmp(s->comm[i].group, group) && !strcmp(s->comm[i].op, op)) return &s->comm[i];
    if (s->n_comm == COMM_MAX) return NULL;
    s->comm[s->n_comm] = (tr_summary_comm){.group = group, .op = op};
    return &s->comm[s->n_comm++];
}

static tr_status add_comms(tr_summary *s, tr_reader *r, int rank, tr_err *err)
{
    tr_h5_data data;
    tr_status st = tr_reader_read(r, TR_D_COMM_OPS, NULL, rank, &data, err);
    if (st != TR_OK) return st;
    const tr_prof_comm *c = data.at;
    for (size_t i = 0; i < data.n; i++) {
        if (c[i].calls == 0) continue;
        const char *op = c[i].op < tr_comm_op_names.n ? tr_comm_op_names.name[c[i].op] : "other";
        tr_summary_comm *to = comm_row(s, tr_reader_group_name(r, c[i].group), op);
        if (!to) break;
        to->calls += (double)c[i].calls;
        to->bytes += (double)c[i].bytes;
        to->time_s += (double)c[i].time_ns * 1e-9 / s->n_present;
        to->exposed_s += (double)c[i].exposed_ns * 1e-9 / s->n_present;
    }
    free(data.at);
    return TR_OK;
}

/* Without /comm/ops: COMM and WAIT regions have the time, all of it exposed. */
static void comms_of_regions(tr_summary *s)
{
    for (int i = 0; i < s->n_ops; i++) {
        const tr_summary_op *op = &s->op[i];
        if (op->kind != TR_KIND_COMM || op->count <= 0) continue;
        tr_summary_comm *to = comm_row(s, op->group, op->name);
        if (!to) return;
        to->calls += op->count;
        to->bytes += op->bytes;
        to->time_s += op->mean_s;
        to->exposed_s += op->exposed_s > 0 ? op->exposed_s / s->n_present : op->mean_s;
    }
}

static tr_status overlap(tr_summary *s, tr_reader *r, int rank, tr_err *err)
{
    tr_h5_data data;
    tr_status st = tr_reader_read(r, TR_D_OVERLAP_CP, NULL, rank, &data, err);
    if (st != TR_OK) return st;
    const tr_prof_overlap *o = data.at;
    for (size_t i = 0; i < data.n; i++) {
        s->cp_gather_s += ((double)o[i].gatherK_ns + (double)o[i].gatherL_ns) * 1e-9 / s->n_present;
        s->cp_exposed_s +=
            ((double)o[i].exposedK_ns + (double)o[i].exposedL_ns) * 1e-9 / s->n_present;
    }
    free(data.at);
    return TR_OK;
}

tr_status tr_summary_comms(tr_summary *s, tr_reader *r, tr_err *err)
{
    tr_status st = TR_OK;
    s->comm = tr_calloc(COMM_MAX, sizeof *s->comm);
    if (!s->comm) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < tr_reader_about_of(r)->n_ranks && st == TR_OK; i++) {
        st = add_comms(s, r, i, err);
        if (st == TR_OK) st = overlap(s, r, i, err);
    }
    s->has_comm = s->n_comm > 0;
    if (st == TR_OK && !s->has_comm) comms_of_regions(s);
    for (int i = 0; i < s->n_comm; i++)
        s->comm_exposed_s += s->comm[i].exposed_s;
    qsort(s->comm, (size_t)s->n_comm, sizeof *s->comm, most_exposed);
    return st;
}

/* ---- experts ------------------------------------------------------------------------------------------------------- */

/* Largest over mean of n numbers; 0 where all are 0. */
static double unevenness(const uint64_t *v, size_t n, size_t stride, size_t *most)
{
    double sum = 0, max = 0;
    for (size_t i = 0; i < n; i++) {
        const double x = (double)v[i * stride];
        sum += x;
        if (x > max) {
            max = x;
            *most = i;
        }
    }
    return sum > 0 ? max * (double)n / sum : 0;
}

static tr_summary_layer *find_layer(tr_summary *s, size_t layer)
{
    for (int i = 0; i < s->n_layers; i++)
        if ((size_t)s->layer[i].layer == layer) return &s->layer[i];
    return NULL;
}

static tr_status expert_rows(tr_summary *s, tr_reader *r, tr_err *err)
{
    tr_h5_data data;
    size_t most = 0, n = 0;
    tr_status st = tr_reader_read(r, TR_D_EXPERT_TOKENS, NULL, -1, &data, err);
    if (st != TR_OK) return st;
    for (size_t i = 0; data.n > 0 && i < data.dim[0]; i++) {
        const uint64_t *row = (const uint64_t *)data.at + i * data.dim[1];
        const double uneven = unevenness(row, (size_t)data.dim[1], 1, &most);
        tr_summary_layer *layer = find_layer(s, i);
        if (uneven <= 0) continue;
        if (layer) layer->imbalance = uneven;
        s->even.experts += uneven;
        n++;
        if (uneven > s->even.experts_worst) {
            s->even.experts_worst = uneven;
            s->even.experts_layer = (int)i;
        }
    }
    if (n > 0) s->even.experts /= (double)n;
    free(data.at);
    return TR_OK;
}

/* Rows of the experts of each rank, all layers together: who has most. */
static tr_status rank_rows(tr_summary *s, tr_reader *r, tr_err *err)
{
    const int n = tr_reader_about_of(r)->n_ranks;
    uint64_t *rows = tr_calloc((size_t)n, sizeof *rows);
    tr_status st = rows ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
    size_t most = 0, held = 0;
    int *who = st == TR_OK ? tr_calloc((size_t)n, sizeof *who) : NULL;
    if (st == TR_OK && !who) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < n && st == TR_OK; i++) {
        tr_h5_data data;
        st = tr_reader_read(r, TR_D_RANK_TOKENS, NULL, i, &data, err);
        if (st != TR_OK) break;
        for (size_t k = 0; k < data.n; k++)
            rows[held] += ((const uint64_t *)data.at)[k];
        if (data.n > 0) who[held++] = i;
        free(data.at);
    }
    if (st == TR_OK && held > 1) {
        s->even.rank_tokens = unevenness(rows, held, 1, &most);
        s->even.rank_tokens_most = who[most];
    }
    free(rows);
    free(who);
    return st;
}

tr_status tr_summary_experts(tr_summary *s, tr_reader *r, tr_err *err)
{
    tr_status st = expert_rows(s, r, err);
    return st == TR_OK ? rank_rows(s, r, err) : st;
}

tr_status tr_summary_cache(tr_summary *s, tr_reader *r, tr_err *err)
{
    tr_h5_data data;
    for (int i = 0; i < tr_reader_about_of(r)->n_ranks; i++) {
        tr_status st = tr_reader_read(r, TR_D_KV, NULL, i, &data, err);
        if (st != TR_OK) return st;
        const tr_prof_kv *kv = data.at;
        uint64_t hits = 0, misses = 0; /* they only grow; rows that fill up are 0 */
        for (size_t k = 0; k < data.n; k++) {
            if (kv[k].hits > hits) hits = kv[k].hits;
            if (kv[k].misses > misses) misses = kv[k].misses;
        }
        /* The leader counts for all replicas, and it is the first. */
        const bool known = hits + misses > 0;
        if (known) s->cache_hits = hits;
        if (known) s->cache_misses = misses;
        free(data.at);
        if (known) break;
    }
    return TR_OK;
}
