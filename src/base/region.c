#include <config.h>

#include "base/region.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"

enum {
    LINE = 64, /* bytes of a cache line */
    SPINS = 64,
    AHEAD = 2,     /* begins for which lines are fetched */
    SCRIPT = 1024, /* begins that are remembered */
    N_IN = TR_N_PHASES + 1,
};

/* A node, as far as it is looked for; the numbers are elsewhere. A step comes once in a millisecond or less often, and between two
 * regions the operations have read megabytes: what a region touches comes from memory each time, so it must be little. */
typedef struct spot {
    int parent, id, layer, depth;
    int first_child, next; /* -1: none; children in the order of their first calls */
} spot;

typedef struct sums { /* of a node in one phase: one line */
    uint64_t count, incl_ns, excl_ns, min_ns, max_ns;
    double sumsq, bytes, flops;
} sums;
_Static_assert(sizeof(sums) == LINE, "one line");

typedef struct gpu_sums {
    uint64_t count, ns;
} gpu_sums;

typedef struct scene { /* a begin: what it asked for, and the node that it was */
    int node, parent, id, layer;
} scene;

typedef struct tr_region_tree {
    int busy; /* the lock of all that others look at; the stream's thread alone reads it without */
    int n, n_max;
    uint64_t n_lost;
    uint64_t ended_ns;    /* the last end */
    bool aside;           /* nothing goes into it now: its open frames are */
    tr_region_frame root; /* this one */
    spot *spot;           /* [n_max] */
    sums *sums;           /* [N_IN, n_max], at a line's begin in: */
    void *sums_memory;
    gpu_sums *gpu; /* [N_IN, n_max] */

    /* The stream's thread's. From the begin of a step on, or of a child of the root, the same regions begin in the same order. */
    int at;                     /* begins since then, at most SCRIPT */
    scene script[N_IN][SCRIPT]; /* each begin when it was that phase last; node 0: none */
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

/* Taken at every end of a region, and by others for microseconds once in a while: half as dear as a mutex. */
static void lock(tree *t)
{
    if (!t) return;
    for (int tries = 0; __atomic_exchange_n(&t->busy, 1, __ATOMIC_ACQUIRE); tries++)
        if (tries >= SPINS) sched_yield(); /* who has it may have no core */
}

static void unlock(tree *t)
{
    if (t) __atomic_store_n(&t->busy, 0, __ATOMIC_RELEASE);
}

/* Locked, or nobody else has it. */
static int add_node(tree *t, int parent, int id, int layer)
{
    if (t->n == t->n_max) return -1;
    t->spot[t->n] = (spot){.parent = parent,
                           .id = id,
                           .layer = layer,
                           .depth = parent < 0 ? 0 : t->spot[parent].depth + 1,
                           .first_child = -1,
                           .next = -1};
    return t->n++;
}

/* The child of a node, made on its first call; -1: no room. */
static int find_child(tree *t, int parent, int id, int layer)
{
    int *to = &t->spot[parent].first_child;

    for (; *to >= 0; to = &t->spot[*to].next)
        if (t->spot[*to].id == id && t->spot[*to].layer == layer) return *to;
    lock(t);
    *to = add_node(t, parent, id, layer);
    if (*to < 0) t->n_lost++;
    unlock(t);
    return *to;
}

static sums *sums_of(const tree *t, int phase, int node)
{
    return &t->sums[(size_t)phase * (size_t)t->n_max + (size_t)node];
}

/* find_child, mostly by looking where the last such step was at this point; what the next regions need is fetched meanwhile. */
static int follow(tree *t, int phase, int parent, int id, int layer)
{
    scene *const script = t->script[phase];
    const int at = t->at;

    if (at == SCRIPT) return find_child(t, parent, id, layer);
    t->at++;
    if (at + AHEAD < SCRIPT && script[at + AHEAD].node)
        __builtin_prefetch(sums_of(t, phase, script[at + AHEAD].node), 1);
    scene *const s = &script[at];
    if (s->node && s->id == id && s->layer == layer && s->parent == parent) return s->node;
    const int node = find_child(t, parent, id, layer);
    if (node > 0) *s = (scene){.node = node, .parent = parent, .id = id, .layer = layer};
    return node;
}

/* The node of a region that begins; where there is none it counts as time of the one above. */
static void place(tr_regions *r, tr_region_frame *f, int layer)
{
    tree *t = r->grows;
    const int parent = r->open[r->depth - 1].node;

    if (parent < 0) return; /* the stream has been cut */
    f->layer = layer < 0 ? r->open[r->depth - 1].layer : layer;
    if (r->depth == 1) t->at = 0;
    if (f->id >= 0) f->node = follow(t, f->phase, parent, f->id, f->layer);
    f->counted = f->node >= 0;
    if (f->counted) return;
    f->node = parent;
    if (f->id >= 0) return; /* counted where there was no room */
    lock(t);
    t->n_lost++;
    unlock(t);
}

static void add_sums(sums *n, const tr_region_frame *f, uint64_t now, double bytes, double flops)
{
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

static tree *make_tree(int n_max)
{
    size_t n, bytes;
    tree *t = calloc(1, sizeof *t);

    if (!t) return NULL;
    if (!tr_mul(&n, (size_t)n_max, N_IN) || !tr_mul(&bytes, n, sizeof(sums)) ||
        !tr_add(&bytes, bytes, LINE))
        goto failed;
    t->n_max = n_max;
    t->spot = tr_calloc((size_t)n_max, sizeof *t->spot);
    t->gpu = tr_calloc(n, sizeof *t->gpu);
    t->sums_memory = tr_calloc(1, bytes);
    if (!t->spot || !t->gpu || !t->sums_memory) goto failed;
    t->sums = (sums *)(((uintptr_t)t->sums_memory + LINE - 1) / LINE * LINE);
    return t;

failed:
    free(t->spot);
    free(t->gpu);
    free(t->sums_memory);
    free(t);
    return NULL;
}

bool tr_regions_grow(tr_regions *r, const char *stream, int nodes_max)
{
    if (!r || r->tree || r->depth > 0 || nodes_max < 1) return false;
    const int id = tr_region_id_of(r, stream, TR_KIND_PHASE, -1);
    tree *t = id < 0 ? NULL : make_tree(nodes_max);
    if (!t) return false;
    r->phase = TR_PHASE_NONE;
    r->open[0] = (tr_region_frame){.id = id,
                                   .node = add_node(t, -1, id, -1),
                                   .layer = -1,
                                   .phase = TR_PHASE_NONE,
                                   .mark = -1,
                                   .counted = true,
                                   .begun_ns = tr_ticks_now(&r->ticks)};
    r->depth = 1;
    r->tree = r->grows = t;
    return true;
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
    free(r->tree->spot);
    free(r->tree->gpu);
    free(r->tree->sums_memory);
    free(r->tree);
    r->tree = r->grows = NULL;
}

void tr_regions_keep(tr_regions *r, tr_region_keep what)
{
    tree *const t = r->tree;
    const bool aside = what != TR_KEEP_ALL;

    r->keep = what;
    r->joins = false;
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

static tr_region_numbers numbers(const sums *s, const gpu_sums *gpu)
{
    return (tr_region_numbers){.count = s->count,
                               .incl_ns = s->incl_ns,
                               .excl_ns = s->excl_ns,
                               .min_ns = s->min_ns,
                               .max_ns = s->max_ns,
                               .sumsq = s->sumsq,
                               .bytes = s->bytes,
                               .flops = s->flops,
                               .gpu_count = gpu->count,
                               .gpu_ns = gpu->ns};
}

/* Locked. */
static void show_node(const tree *t, int i, tr_region_node *node)
{
    const spot *s = &t->spot[i];

    *node =
        (tr_region_node){.parent = s->parent, .id = s->id, .layer = s->layer, .depth = s->depth};
    for (int p = 0; p < N_IN; p++)
        node->in[p] = numbers(sums_of(t, p, i), &t->gpu[(size_t)p * (size_t)t->n_max + (size_t)i]);
}

/* Now, and not before what is seen here: the stream has a clock of its own, which may be a little ahead. Locked. */
static uint64_t latest(const tr_regions *r, const tree *t, int n_open)
{
    uint64_t now = tr_now_ns();

    if (t->ended_ns > now) now = t->ended_ns;
    if (!t->aside && n_open > 0 && r->open[n_open - 1].begun_ns > now)
        now = r->open[n_open - 1].begun_ns;
    return now;
}

int tr_regions_look(tr_regions *r, tr_region_node *node, int n_max)
{
    if (!r || !r->tree) return 0;
    tree *t = r->tree;
    uint64_t child_ns = 0; /* of the open region below, as far as it has come */
    lock(t);
    /* While this has the lock no region ends; one that begins meanwhile comes above those that are seen here. */
    const int n_open = t->aside ? 1 : __atomic_load_n(&r->depth, __ATOMIC_ACQUIRE);
    const uint64_t now = latest(r, t, n_open);
    const int n = t->n < n_max ? t->n : n_max;
    for (int i = 0; i < n; i++)
        show_node(t, i, &node[i]);
    for (int i = n_open - 1; i >= 0; i--) {
        tr_region_frame f = t->aside ? t->root : r->open[i];
        f.tree_child_ns += child_ns;
        child_ns = f.counted ? now - f.begun_ns : f.tree_child_ns;
        if (!f.counted || f.node >= n) continue;
        const gpu_sums gpu = {node[f.node].in[f.phase].gpu_count, node[f.node].in[f.phase].gpu_ns};
        sums so_far = *sums_of(t, f.phase, f.node);
        add_sums(&so_far, &f, now, 0, 0);
        node[f.node].in[f.phase] = numbers(&so_far, &gpu);
    }
    unlock(t);
    return n;
}

void tr_regions_add_gpu(tr_regions *r, int node, int phase, uint64_t ns)
{
    if (!r || !r->tree) return;
    tree *t = r->tree;
    lock(t);
    if (node >= 0 && node < t->n && phase >= 0 && phase <= TR_N_PHASES) {
        gpu_sums *gpu = &t->gpu[(size_t)phase * (size_t)t->n_max + (size_t)node];
        gpu->count++;
        gpu->ns += ns;
    }
    unlock(t);
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

static uint64_t read_clock(tr_regions *r)
{
    if (!r->joins) r->moment_ns = tr_ticks_now(&r->ticks);
    r->joins = false;
    return r->moment_ns;
}

void tr_regions_phase(tr_regions *r, tr_phase phase)
{
    if (!r) return;
    r->phase = phase;
    if (r->grows) r->grows->at = 0;
}

void tr_region_begin_layer(tr_regions *r, int id, int layer)
{
    if (!r || r->keep == TR_KEEP_NOTHING) return;
    /* Deeper than the stack: counted, so that ends match begins, but not timed. Nobody else looks at this count; depth, which
     * others look at, goes down under the lock only. */
    if (r->depth == TR_REGION_DEPTH) {
        r->deeper++;
        r->joins = false;
        return;
    }
    tr_region_frame *f = &r->open[r->depth]; /* nobody looks at it yet */
    f->id = id;
    f->node = f->mark = -1;
    f->phase = (int)r->phase;
    f->counted = false;
    f->child_ns = f->tree_child_ns = 0;
    if (id >= 0) __builtin_prefetch(&r->total[id].calls, 1);
    if (r->clock.begin && r->grows && id >= 0)
        f->mark = r->clock.begin(r->clock.ctx, r->total[id].kind);
    if (r->grows && r->depth > 0) place(r, f, layer);
    f->begun_ns = read_clock(r);
    __atomic_store_n(&r->depth, r->depth + 1, __ATOMIC_RELEASE); /* for tr_regions_look */
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
        r->joins = false;
        return;
    }
    lock(r->grows);
    const uint64_t now = read_clock(r);
    if (r->grows) r->grows->ended_ns = now;
    const tr_region_frame *f = &r->open[r->depth - 1];
    __atomic_store_n(&r->depth, r->depth - 1, __ATOMIC_RELAXED);
    tr_region_frame *up = r->depth > 0 ? &r->open[r->depth - 1] : NULL;
    const uint64_t inclusive = now - f->begun_ns;
    if (up) up->child_ns += inclusive;
    if (up) up->tree_child_ns += f->counted ? inclusive : f->tree_child_ns;
    if (f->id >= 0) add_total(&r->total[f->id], f, now, bytes, flops);
    if (f->counted) add_sums(sums_of(r->grows, f->phase, f->node), f, now, bytes, flops);
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
