#include <config.h>

#include "profile/summary.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/summary_priv.h"

static tr_status no_memory(tr_err *err)
{
    return tr_fail(err, TR_E_MEMORY, "out of memory");
}

/* ---- streams ------------------------------------------------------------------------------------------------------- */

int *tr_summary_roots(const tr_reader *r)
{
    const int n = tr_reader_about_of(r)->n_regions;
    const tr_reader_region *g = tr_reader_regions(r);
    int *root = tr_calloc((size_t)n, sizeof *root);
    for (int i = 0; root && i < n; i++)
        root[i] = g[i].parent < 0 ? i : root[g[i].parent];
    return root;
}

int tr_summary_main_root(const tr_reader *r)
{
    const int n = tr_reader_about_of(r)->n_regions;
    const tr_reader_region *g = tr_reader_regions(r);
    for (int i = 0; i < n; i++)
        if (g[i].kind == TR_KIND_STEP) {
            while (g[i].parent >= 0)
                i = g[i].parent;
            return i;
        }
    return n > 0 ? 0 : -1;
}

/* ---- ranks --------------------------------------------------------------------------------------------------------- */

static int busiest(const void *a, const void *b)
{
    const tr_summary_rank *x = a, *y = b;
    if (x->busy_s != y->busy_s) return x->busy_s < y->busy_s ? 1 : -1;
    return x->rank - y->rank;
}

/* Nodes are numbered by their lowest rank; that one may be absent. */
static int count_nodes(const tr_reader *r)
{
    const int n_ranks = tr_reader_about_of(r)->n_ranks;
    int n = 0, last = -1;
    for (int i = 0; i < n_ranks; i++) {
        const int node = tr_reader_rank(r, i)->node;
        bool seen = !tr_reader_has(r, i) || node == last;
        for (int k = 0; k < i && !seen; k++)
            seen = tr_reader_has(r, k) && tr_reader_rank(r, k)->node == node;
        n += !seen;
        last = tr_reader_has(r, i) ? node : last;
    }
    return n;
}

static tr_status by_rank(tr_summary *s, const tr_reader *r, const int *root, int main_root,
                         tr_err *err)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    const tr_reader_region *g = tr_reader_regions(r);
    double sum = 0;
    s->rank = tr_calloc((size_t)about->n_present, sizeof *s->rank);
    if (!s->rank) return no_memory(err);
    for (int i = 0; i < about->n_ranks; i++) {
        if (!tr_reader_has(r, i)) continue;
        tr_summary_rank *k = &s->rank[s->n_ranks++];
        const tr_reader_cell *c = tr_reader_cells(r, i);
        k->rank = i;
        for (int n = 0; n < about->n_regions; n++)
            if (root[n] == main_root) k->kind_s[g[n].kind] += (double)c[n].excl_ns * 1e-9;
        for (int n = 0; n < TR_N_KINDS; n++)
            k->run_s += k->kind_s[n];
        k->busy_s = k->kind_s[TR_KIND_KERNEL] + k->kind_s[TR_KIND_HOST] + k->kind_s[TR_KIND_LAYER] +
                    k->kind_s[TR_KIND_STEP];
        s->run_s += k->run_s;
        s->comm_s += k->kind_s[TR_KIND_COMM] + k->kind_s[TR_KIND_WAIT];
        sum += k->busy_s;
    }
    s->n_present = s->n_ranks;
    s->n_nodes = count_nodes(r);
    s->run_s /= s->n_ranks;
    s->comm_s /= s->n_ranks;
    qsort(s->rank, (size_t)s->n_ranks, sizeof *s->rank, busiest);
    if (sum > 0) {
        s->even.ranks = s->rank[0].busy_s * s->n_ranks / sum;
        s->even.rank = s->rank[0].rank;
    }
    return TR_OK;
}

/* ---- operations ---------------------------------------------------------------------------------------------------- */

static int longest(const void *a, const void *b)
{
    const tr_summary_op *x = a, *y = b;
    if (x->mean_s != y->mean_s) return x->mean_s < y->mean_s ? 1 : -1;
    return strcmp(x->name, y->name);
}

/* Which row of s->op each region counts into; the table has few names, however many layers. */
static int *number_ops(tr_summary *s, const tr_reader *r, const int *root, int main_root)
{
    const int n = tr_reader_about_of(r)->n_regions;
    const tr_reader_region *g = tr_reader_regions(r);
    int *op_of = tr_calloc((size_t)n, sizeof *op_of), *group_of = tr_calloc((size_t)n, sizeof(int));
    s->op = tr_calloc((size_t)n, sizeof *s->op);
    if (!op_of || !group_of || !s->op) {
        free(op_of);
        free(group_of);
        return NULL;
    }
    for (int i = 0; i < n; i++) {
        int k = 0;
        op_of[i] = -1;
        if (root[i] != main_root) continue;
        while (k < s->n_ops && (group_of[k] != g[i].group || strcmp(s->op[k].name, g[i].name) != 0))
            k++;
        if (k == s->n_ops) {
            s->op[s->n_ops++] = (tr_summary_op){
                .name = g[i].name, .group = tr_reader_group_name(r, g[i].group), .kind = g[i].kind};
            group_of[k] = g[i].group;
        }
        op_of[i] = k;
    }
    free(group_of);
    return op_of;
}

static tr_status by_operation(tr_summary *s, const tr_reader *r, const int *root, int main_root,
                              tr_err *err)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    int *op_of = number_ops(s, r, root, main_root);
    double *time = tr_calloc((size_t)s->n_ops, sizeof *time);
    if (!op_of || !time) {
        free(op_of);
        free(time);
        return no_memory(err);
    }
    for (int i = 0; i < about->n_ranks; i++) {
        const tr_reader_cell *c = tr_reader_cells(r, i);
        if (!tr_reader_has(r, i)) continue;
        memset(time, 0, (size_t)s->n_ops * sizeof *time);
        for (int n = 0; n < about->n_regions; n++) {
            if (op_of[n] < 0) continue;
            tr_summary_op *op = &s->op[op_of[n]];
            op->count += (double)c[n].count;
            op->bytes += (double)c[n].bytes;
            op->flops += c[n].flops;
            op->exposed_s += (double)c[n].exposed_ns * 1e-9;
            time[op_of[n]] += (double)c[n].excl_ns * 1e-9;
        }
        for (int k = 0; k < s->n_ops; k++) {
            s->op[k].mean_s += time[k] / s->n_ranks;
            if (time[k] > s->op[k].max_s) {
                s->op[k].max_s = time[k];
                s->op[k].max_rank = i;
            }
        }
    }
    qsort(s->op, (size_t)s->n_ops, sizeof *s->op, longest);
    free(op_of);
    free(time);
    return TR_OK;
}

/* ---- layers -------------------------------------------------------------------------------------------------------- */

static int worst(const void *a, const void *b)
{
    const tr_summary_layer *x = a, *y = b;
    if (x->max_s != y->max_s) return x->max_s < y->max_s ? 1 : -1;
    return x->layer - y->layer;
}

enum { LAYERS_MAX = 1 << 15 }; /* i2 */

/* Times of one rank's layers: all, and in COMM and WAIT. */
typedef struct layer_time {
    double all_s, stall_s, count;
} layer_time;

static void add_layers(tr_summary *s, const tr_reader *r, const int *row, int rank, layer_time *t,
                       int *holders)
{
    const tr_reader_region *g = tr_reader_regions(r);
    const tr_reader_cell *c = tr_reader_cells(r, rank);
    memset(t, 0, (size_t)s->n_layers * sizeof *t);
    for (int n = 0; n < tr_reader_about_of(r)->n_regions; n++) {
        if (g[n].layer < 0) continue;
        layer_time *to = &t[row[g[n].layer]];
        if (g[n].kind == TR_KIND_LAYER) {
            to->all_s += (double)c[n].incl_ns * 1e-9;
            to->count += (double)c[n].count;
        } else if (g[n].kind == TR_KIND_COMM || g[n].kind == TR_KIND_WAIT) {
            to->stall_s += (double)c[n].excl_ns * 1e-9;
        }
    }
    for (int k = 0; k < s->n_layers; k++) {
        tr_summary_layer *l = &s->layer[k];
        if (t[k].count <= 0) continue;
        holders[k]++;
        l->mean_s += t[k].all_s;
        l->stall_s += t[k].stall_s;
        l->count += t[k].count;
        if (t[k].all_s > l->max_s) {
            l->max_s = t[k].all_s;
            l->max_rank = rank;
        }
    }
}

static tr_status by_layer(tr_summary *s, const tr_reader *r, tr_err *err)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    const tr_reader_region *g = tr_reader_regions(r);
    int *row = tr_calloc(LAYERS_MAX, sizeof *row), *holders = NULL;
    layer_time *t = NULL;
    tr_status st = TR_OK;

    s->layer = row ? tr_calloc(LAYERS_MAX, sizeof *s->layer) : NULL;
    for (int i = 0; s->layer && i < about->n_regions; i++)
        if (g[i].layer >= 0 && g[i].kind == TR_KIND_LAYER) row[g[i].layer] = 1;
    for (int i = 0; s->layer && i < LAYERS_MAX; i++) {
        const bool is_there = row[i] > 0;
        row[i] = is_there ? s->n_layers : 0;
        if (is_there) s->layer[s->n_layers++].layer = i;
    }
    holders = tr_calloc((size_t)s->n_layers, sizeof *holders);
    t = tr_calloc((size_t)s->n_layers, sizeof *t);
    if (!s->layer || !holders || !t) {
        st = no_memory(err);
        goto done;
    }
    for (int i = 0; s->n_layers > 0 && i < about->n_ranks; i++)
        if (tr_reader_has(r, i)) add_layers(s, r, row, i, t, holders);
    for (int k = 0; k < s->n_layers; k++) {
        const int n = holders[k] > 0 ? holders[k] : 1;
        s->layer[k].mean_s /= n;
        s->layer[k].stall_s /= n;
        s->layer[k].count /= n;
    }
done:
    free(row);
    free(holders);
    free(t);
    return st;
}

/* ---- phases -------------------------------------------------------------------------------------------------------- */

static void add_gpu(tr_summary *s, const tr_reader *r, const tr_reader_region *g,
                    const tr_reader_cell *c)
{
    const char *group = tr_reader_group_name(r, g->group);
    const double part = c->count ? (double)c->gpu_count / (double)c->count : 0;
    if (g->kind == TR_KIND_STEP) s->gpu_steps_s += (double)c->gpu_ns * 1e-9;
    for (int k = 0; k < s->n_ops; k++) {
        tr_summary_op *op = &s->op[k];
        if (strcmp(op->name, g->name) != 0 || strcmp(op->group, group) != 0) continue;
        op->gpu_count += (double)c->gpu_count;
        op->gpu_s += (double)c->gpu_ns * 1e-9;
        op->gpu_bytes += (double)c->bytes * part;
        op->gpu_flops += c->flops * part;
        return;
    }
}

static tr_status by_phase(tr_summary *s, tr_reader *r, const int *root, int main_root, tr_err *err)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    const tr_reader_region *g = tr_reader_regions(r);
    for (int p = 0; p < TR_N_PHASES; p++) {
        tr_reader_cell *all = NULL;
        double count = 0;
        tr_status st = tr_reader_phase(r, (tr_phase)p, &all, err);
        if (st != TR_OK) return st;
        if (!all) continue;
        s->has_phases = true;
        for (int i = 0; i < about->n_ranks; i++)
            for (int n = 0; n < about->n_regions; n++) {
                const tr_reader_cell *c = &all[(size_t)i * (size_t)about->n_regions + (size_t)n];
                if (root[n] != main_root) continue;
                s->phase[p].mean_s += (double)c->excl_ns * 1e-9 / s->n_ranks;
                if (g[n].kind == TR_KIND_STEP) count += (double)c->count;
                if (c->gpu_count) add_gpu(s, r, &g[n], c);
            }
        s->phase[p].steps = (uint64_t)(count / s->n_ranks + 0.5);
        s->steps_s += s->phase[p].mean_s;
        free(all);
    }
    return TR_OK;
}

tr_status tr_summary_make(tr_summary *s, tr_reader *r, tr_err *err)
{
    *s = (tr_summary){.kv_used = -1};
    const int main_root = tr_summary_main_root(r);
    int *root = tr_summary_roots(r);
    tr_status st = root ? TR_OK : no_memory(err);
    if (st == TR_OK) st = by_rank(s, r, root, main_root, err);
    if (st == TR_OK) st = by_operation(s, r, root, main_root, err);
    if (st == TR_OK) st = by_layer(s, r, err);
    if (st == TR_OK) st = by_phase(s, r, root, main_root, err);
    if (st == TR_OK) st = tr_summary_steps(s, r, err);
    if (st == TR_OK) st = tr_summary_requests(s, r, err);
    if (st == TR_OK) st = tr_summary_comms(s, r, err);
    if (st == TR_OK) st = tr_summary_experts(s, r, err);
    if (st == TR_OK) st = tr_summary_cache(s, r, err);
    if (st == TR_OK) st = tr_summary_counters(s, r, err);
    if (st == TR_OK) qsort(s->layer, (size_t)s->n_layers, sizeof *s->layer, worst);
    free(root);
    if (st != TR_OK) tr_summary_free(s);
    return st;
}

void tr_summary_free(tr_summary *s)
{
    free(s->op);
    free(s->rank);
    free(s->layer);
    free(s->comm);
    for (int i = 0; i < s->n_counters; i++) {
        free(s->counter[i].name);
        free(s->counter[i].units);
        free(s->counter[i].absent);
    }
    free(s->counter);
    *s = (tr_summary){0};
}
