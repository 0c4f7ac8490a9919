#include <config.h>

#include "base/region.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"

/* How the tree hangs together: beside the nodes, which are copied for whoever looks. */
typedef struct link {
    int first_child, next; /* -1: none; children in the order of their first calls */
    int latest;            /* child that began last, -1: none */
} link;

typedef struct tr_region_tree {
    pthread_mutex_t
        lock; /* the nodes and the open frames; the stream's thread writes, others look */
    int n, n_max;
    uint64_t n_lost;
    bool aside;           /* nothing goes into it now: its open frames are */
    tr_region_frame root; /* this one */
    tr_region_node *node; /* [n_max] */
    link *link;           /* [n_max] */
} tree;

/* ---- names -------------------------------------------------------------------------------------- */

int tr_region_id_of(tr_regions *r, const char *name, tr_region_kind kind, int group)
{
    if (!r) return -1;
    for (int i = 0; i < r->n; i++)
        if (strncmp(r->total[i].name, name, TR_REGION_NAME - 1) == 0) return i;
    if (r->n == TR_REGIONS_MAX) return -1;
    tr_region_total *t = &r->total[r->n];
    *t = (tr_region_total){.kind = kind, .group = group};
    snprintf(t->name, sizeof t->name, "%s", name);
    return r->n++;
}

int tr_region_id(tr_regions *r, const char *name)
{
    return tr_region_id_of(r, name, TR_KIND_HOST, -1);
}

/* ---- the tree ------------------------------------------------------------------------------------ */

static void lock(tree *t)
{
    if (t) pthread_mutex_lock(&t->lock);
}

static void unlock(tree *t)
{
    if (t) pthread_mutex_unlock(&t->lock);
}

static int add_node(tree *t, int parent, int id, int layer)
{
    if (t->n == t->n_max) return -1;
    const int i = t->n++;
    t->node[i] = (tr_region_node){.parent = parent,
                                  .id = id,
                                  .layer = layer,
                                  .depth = parent < 0 ? 0 : t->node[parent].depth + 1};
    t->link[i] = (link){.first_child = -1, .next = -1, .latest = -1};
    return i;
}

/* Children come in the same order step after step: the one behind the last is looked at first. */
static int find_child(tree *t, int parent, int id, int layer)
{
    link *up = &t->link[parent];
    int from = up->latest >= 0 ? t->link[up->latest].next : up->first_child;
    int last = -1;

    for (int i = from; i >= 0; i = t->link[i].next)
        if (t->node[i].id == id && t->node[i].layer == layer) return up->latest = i;
    for (int i = up->first_child; i >= 0; i = t->link[i].next) {
        if (t->node[i].id == id && t->node[i].layer == layer) return up->latest = i;
        last = i;
    }
    const int made = add_node(t, parent, id, layer);
    if (made < 0) return -1;
    *(last < 0 ? &up->first_child : &t->link[last].next) = made;
    return up->latest = made;
}

/* The node of a region that begins; where there is none it counts as time of the one above. */
static void place(tr_regions *r, tr_region_frame *f, int layer)
{
    tree *t = r->grows;
    const int parent = r->open[r->depth - 1].node;

    if (parent < 0) return; /* the stream has been cut */
    if (layer < 0) layer = t->node[parent].layer;
    f->node = f->id < 0 ? -1 : find_child(t, parent, f->id, layer);
    f->counted = f->node >= 0;
    if (f->counted) return;
    f->node = parent;
    t->n_lost++;
}

static void add_numbers(tr_region_node *node, const tr_region_frame *f, uint64_t now, double bytes,
                        double flops)
{
    tr_region_numbers *n = &node->in[f->phase];
    const uint64_t incl = now - f->begun_ns;

    if (!n->count || incl < n->min_ns) n->min_ns = incl;
    if (incl > n->max_ns) n->max_ns = incl;
    n->count++;
    n->incl_ns += incl;
    n->excl_ns += incl - f->tree_child_ns;
    n->sumsq += (double)incl * (double)incl;
    n->bytes += bytes;
    n->flops += flops;
}

bool tr_regions_grow(tr_regions *r, const char *stream, int nodes_max)
{
    if (!r || r->tree || r->depth > 0 || nodes_max < 1) return false;
    const int id = tr_region_id_of(r, stream, TR_KIND_PHASE, -1);
    tree *t = calloc(1, sizeof *t);
    if (id < 0 || !t) goto failed;
    t->n_max = nodes_max;
    t->node = tr_calloc((size_t)nodes_max, sizeof *t->node);
    t->link = tr_calloc((size_t)nodes_max, sizeof *t->link);
    if (!t->node || !t->link) goto failed;
    pthread_mutex_init(&t->lock, NULL);
    r->phase = TR_PHASE_NONE;
    r->open[0] = (tr_region_frame){.id = id,
                                   .node = add_node(t, -1, id, -1),
                                   .phase = TR_PHASE_NONE,
                                   .mark = -1,
                                   .counted = true,
                                   .begun_ns = tr_now_ns()};
    r->depth = 1;
    r->tree = r->grows = t;
    return true;

failed:
    if (t) free(t->node);
    if (t) free(t->link);
    free(t);
    return false;
}

void tr_regions_cut(tr_regions *r)
{
    if (!r || !r->tree) return;
    tr_regions_keep(r, TR_KEEP_ALL);
    while (r->depth > 0)
        tr_region_end(r, 0, 0);
}

void tr_regions_prune(tr_regions *r)
{
    if (!r || !r->tree) return;
    tr_regions_cut(r);
    pthread_mutex_destroy(&r->tree->lock);
    free(r->tree->node);
    free(r->tree->link);
    free(r->tree);
    r->tree = r->grows = NULL;
}

void tr_regions_keep(tr_regions *r, tr_region_keep what)
{
    tree *const t = r->tree;
    const bool aside = what != TR_KEEP_ALL;

    r->keep = what;
    if (!t || aside == t->aside) return;
    lock(t);
    if (aside) {
        t->root = r->open[0];
        t->aside = r->depth > 0; /* the stream has not been cut */
        r->depth = 0;
    } else {
        r->open[0] = t->root;
        r->depth = 1;
        t->aside = false;
    }
    r->grows = aside ? NULL : t;
    unlock(t);
}

int tr_regions_look(tr_regions *r, tr_region_node *node, int n_max)
{
    if (!r || !r->tree) return 0;
    tree *t = r->tree;
    lock(t);
    const uint64_t now = tr_now_ns();
    const int n = t->n < n_max ? t->n : n_max;
    uint64_t child_ns = 0; /* of the open region below, as far as it has come */
    memcpy(node, t->node, (size_t)n * sizeof *node);
    for (int i = (t->aside ? 1 : r->depth) - 1; i >= 0; i--) {
        tr_region_frame f = t->aside ? t->root : r->open[i];
        f.tree_child_ns += child_ns;
        child_ns = f.counted ? now - f.begun_ns : f.tree_child_ns;
        if (f.counted && f.node < n) add_numbers(&node[f.node], &f, now, 0, 0);
    }
    unlock(t);
    return n;
}

void tr_regions_add_gpu(tr_regions *r, int node, int phase, uint64_t ns)
{
    if (!r || !r->tree) return;
    lock(r->tree);
    if (node >= 0 && node < r->tree->n && phase >= 0 && phase <= TR_N_PHASES) {
        r->tree->node[node].in[phase].gpu_count++;
        r->tree->node[node].in[phase].gpu_ns += ns;
    }
    unlock(r->tree);
}

uint64_t tr_regions_lost(tr_regions *r)
{
    if (!r || !r->tree) return 0;
    lock(r->tree);
    const uint64_t lost = r->tree->n_lost;
    unlock(r->tree);
    return lost;
}

/* ---- begin and end -------------------------------------------------------------------------------- */

void tr_regions_phase(tr_regions *r, tr_phase phase)
{
    if (r) r->phase = phase;
}

void tr_region_begin_layer(tr_regions *r, int id, int layer)
{
    if (!r || r->keep == TR_KEEP_NOTHING) return;
    /* Deeper than the stack: counted, so that ends match begins, but not timed. Nobody else looks at this count; depth, which
     * others look at, changes under the lock only. */
    if (r->depth == TR_REGION_DEPTH) {
        r->deeper++;
        return;
    }
    tr_region_frame f = {.id = id, .phase = (int)r->phase, .node = -1, .mark = -1};
    if (r->clock.begin && r->grows && id >= 0)
        f.mark = r->clock.begin(r->clock.ctx, r->total[id].kind);
    lock(r->grows);
    if (r->grows && r->depth > 0) place(r, &f, layer);
    f.begun_ns = tr_now_ns();
    r->open[r->depth++] = f;
    unlock(r->grows);
}

void tr_region_begin(tr_regions *r, int id)
{
    tr_region_begin_layer(r, id, -1);
}

/* The totals by name. */
static void add_total(tr_region_total *t, const tr_region_frame *f, uint64_t now, double bytes,
                      double flops)
{
    t->calls++;
    t->inclusive_ns += now - f->begun_ns;
    t->exclusive_ns += now - f->begun_ns - f->child_ns;
    t->bytes += bytes;
    t->flops += flops;
}

void tr_region_end(tr_regions *r, double bytes, double flops)
{
    if (!r || r->depth == 0 || r->keep == TR_KEEP_NOTHING) return;
    if (r->deeper > 0) {
        r->deeper--;
        return;
    }
    lock(r->grows);
    const uint64_t now = tr_now_ns();
    const tr_region_frame *f = &r->open[--r->depth];
    tr_region_frame *up = r->depth > 0 ? &r->open[r->depth - 1] : NULL;
    const uint64_t inclusive = now - f->begun_ns;
    if (up) up->child_ns += inclusive;
    if (up) up->tree_child_ns += f->counted ? inclusive : f->tree_child_ns;
    if (f->id >= 0) add_total(&r->total[f->id], f, now, bytes, flops);
    if (f->counted) add_numbers(&r->grows->node[f->node], f, now, bytes, flops);
    unlock(r->grows);
    if (f->mark >= 0 && r->clock.end)
        r->clock.end(r->clock.ctx, f->mark, f->counted ? f->node : -1, f->phase);
    if (r->sink.end) r->sink.end(r->sink.ctx, f->counted ? f->node : -1, f->begun_ns, now, bytes);
}

void tr_regions_reset(tr_regions *r)
{
    for (int i = 0; i < r->n; i++) {
        tr_region_total *t = &r->total[i];
        t->calls = t->inclusive_ns = t->exclusive_ns = 0;
        t->bytes = t->flops = 0;
    }
}

static int longest_first(const void *a, const void *b)
{
    const tr_region_total *x = *(const tr_region_total *const *)a,
                          *y = *(const tr_region_total *const *)b;
    if (x->exclusive_ns != y->exclusive_ns) return x->exclusive_ns < y->exclusive_ns ? 1 : -1;
    return strcmp(x->name, y->name);
}

void tr_regions_print(const tr_regions *r, FILE *out)
{
    const tr_region_total *order[TR_REGIONS_MAX];
    double sum = 0;
    int n = 0;
    for (int i = 0; i < r->n; i++)
        if (r->total[i].calls > 0) {
            order[n++] = &r->total[i];
            sum += (double)r->total[i].exclusive_ns;
        }
    qsort(order, (size_t)n, sizeof *order, longest_first);
    fprintf(out, "# %-22s %10s %12s %7s %10s %10s\n", "region", "calls", "ms", "share", "GB/s",
            "Gflop/s");
    for (int i = 0; i < n; i++) {
        double ns = (double)order[i]->exclusive_ns;
        fprintf(out, "  %-22s %10ju %12.3f %6.1f%%", order[i]->name, (uintmax_t)order[i]->calls,
                ns * 1e-6, sum > 0 ? 100 * ns / sum : 0.0);
        bool known = ns > 0;
        if (known && order[i]->bytes > 0)
            fprintf(out, " %10.2f", order[i]->bytes / ns);
        else
            fprintf(out, " %10s", "-");
        if (known && order[i]->flops > 0)
            fprintf(out, " %10.2f\n", order[i]->flops / ns);
        else
            fprintf(out, " %10s\n", "-");
    }
}
