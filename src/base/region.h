/* Regions: the profiling call. A region is a named stretch of time on one thread; bytes and flops are what the caller
 * knows it moved and computed. Used by the step loop, the model, the communicators, loading, and the reader and the
 * writer of a batch.
 *
 * One tr_regions is one stream: begin/end pairs nest, and one thread makes them. Flat totals by name are always kept. A
 * stream that has been grown keeps a tree too: a node for every region in every place it is called from, with numbers
 * for every phase; its root lasts as long as the stream, so that the exclusive times of all nodes add up to it. Another
 * thread may look at a tree at any time (profile/ does). */
#ifndef TR_BASE_REGION_H
#define TR_BASE_REGION_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/ticks.h"

enum {
    TR_REGIONS_MAX = 192, /* names of one stream */
    TR_REGION_DEPTH = 16, /* regions open at a time; deeper ones count as time of the deepest */
    TR_REGION_NAME = 48,
};

/* What a region is. A KERNEL is one operation of the table; COMM begins or performs a communicator's operation; WAIT is
 * time in which nothing else could be done. */
typedef enum tr_region_kind {
    TR_KIND_HOST,
    TR_KIND_KERNEL,
    TR_KIND_COMM,
    TR_KIND_WAIT,
    TR_KIND_PHASE, /* part of a run: a stream's root, loading, the steps, ... */
    TR_KIND_LAYER,
    TR_KIND_STEP,
    TR_KIND_IO,
    TR_N_KINDS
} tr_region_kind;

/* What a step does: with prompt rows, with decode rows only, with verification or draft spans, or nothing at all. */
typedef enum tr_phase {
    TR_PHASE_PREFILL,
    TR_PHASE_DECODE,
    TR_PHASE_VERIFY,
    TR_PHASE_DRAFT,
    TR_PHASE_IDLE,
    TR_N_PHASES,
    TR_PHASE_NONE = TR_N_PHASES, /* outside steps */
} tr_phase;

typedef struct tr_region_total {
    char name[TR_REGION_NAME];
    tr_region_kind kind;
    int group; /* kind of group that communicates (mpi/grid.h), -1: none */
    uint64_t calls, inclusive_ns, exclusive_ns;
    double bytes, flops;
} tr_region_total;

typedef struct tr_region_numbers {
    uint64_t count, incl_ns, excl_ns, min_ns, max_ns; /* min and max of single inclusive times */
    double sumsq, bytes, flops;                       /* sumsq: of inclusive times, ns^2 */
    uint64_t gpu_count, gpu_ns; /* calls that were timed on the device, and their time there */
} tr_region_numbers;

typedef struct tr_region_node {
    int parent; /* always an earlier node; -1: the root */
    int id;     /* in total[] */
    int layer;  /* -1: none; otherwise the nearest one above that was given */
    int depth;
    tr_region_numbers in[TR_N_PHASES + 1]; /* by the phase in which it began; [TR_PHASE_NONE] */
} tr_region_node;

/* Told of every region that ends, by the stream's thread: node -1: the tree is full. */
typedef struct tr_region_sink {
    void *ctx;
    void (*end)(void *ctx, int node, uint64_t begun_ns, uint64_t ended_ns, double bytes);
} tr_region_sink;

/* Asked at the begin and told of the end of every region of a stream with a tree, by the stream's thread: who times them on a
 * device (device_time.h). begin returns a mark for the end, -1: this one is not timed. node -1: the tree is full. */
typedef struct tr_region_clock {
    void *ctx;
    int (*begin)(void *ctx, tr_region_kind kind);
    void (*end)(void *ctx, int mark, int node, int phase);
} tr_region_clock;

/* What is kept of regions. Everything is, but in benches that measure what that costs. */
typedef enum tr_region_keep {
    TR_KEEP_ALL,    /* totals, and the tree of a stream that has been grown */
    TR_KEEP_TOTALS, /* as if it had not been grown: what passes is its root's own time */
    TR_KEEP_NOTHING /* begin and end return at once */
} tr_region_keep;

typedef struct tr_region_frame { /* an open region; regions.c's own */
    int id, node, layer, phase;
    int mark;     /* the clock's, -1: none */
    bool counted; /* has a node of its own */
    uint64_t begun_ns, child_ns, tree_child_ns;
} tr_region_frame;

/* Zeroed: empty, not grown. What every begin and end touches comes first: a step's operations leave little of it in the caches. */
typedef struct tr_regions {
    int depth; /* open regions that are timed, at most TR_REGION_DEPTH; others may look: goes down under the tree's lock */
    int deeper;     /* open regions beyond those: the stream's thread's alone */
    tr_phase phase; /* set by tr_regions_phase; counted in trees only */
    tr_region_keep keep;
    struct tr_region_tree *grows; /* the tree, where regions that begin go into it */
    tr_region_clock clock;        /* begin may be NULL */
    tr_region_sink sink;          /* end may be NULL */
    tr_ticks ticks;
    uint64_t moment_ns; /* of the last begin or end */
    bool joins;         /* the next one is at that moment: tr_region_joins */
    int n;
    struct tr_region_tree *tree;
    tr_region_frame open[TR_REGION_DEPTH];
    tr_region_total total[TR_REGIONS_MAX];
} tr_regions;

/* The id of a region with this name (compared as strings), made on first use; -1 when the table is full. tr_region_id:
 * of kind HOST; _of: of another, and of a group. The first call decides. */
int tr_region_id(tr_regions *r, const char *name);
int tr_region_id_of(tr_regions *r, const char *name, tr_region_kind kind, int group);

/* r may be NULL and id may be -1: nothing happens. */
void tr_region_begin(tr_regions *r, int id);
void tr_region_begin_layer(tr_regions *r, int id, int layer);
void tr_region_end(tr_regions *r, double bytes, double flops);

/* Behind a begin or an end: nothing that takes time comes before the next begin or end of this stream, which happens at the same
 * moment then and needs no reading of the clock. r may be NULL. */
static inline void tr_region_joins(tr_regions *r)
{
    if (r) r->joins = true;
}

/* Regions that begin from now on belong to a phase; TR_PHASE_NONE: to none. */
void tr_regions_phase(tr_regions *r, tr_phase phase);

/* From now on a tree is kept, of at most nodes_max nodes, and its root, a region of kind PHASE with the stream's name, is
 * open until tr_regions_cut. Not inside a region; false: out of memory, or the stream has been grown before. */
bool tr_regions_grow(tr_regions *r, const char *stream, int nodes_max);
/* By the stream's thread: the root ends, the tree stays to be looked at. */
void tr_regions_cut(tr_regions *r);
/* The tree goes; totals stay. r may be NULL. */
void tr_regions_prune(tr_regions *r);

/* By the stream's thread, outside regions (a stream's root is none). */
void tr_regions_keep(tr_regions *r, tr_region_keep what);

/* Any thread. A copy of the nodes, at most n_max of them, returns how many; 0: not grown. What is open now is counted as
 * if it ended now, so that exclusive times always add up to the root's inclusive time. min_ns of what never ran is 0. */
int tr_regions_look(tr_regions *r, tr_region_node *node, int n_max);
/* Any thread. One call of a node took so long on the device. */
void tr_regions_add_gpu(tr_regions *r, int node, int phase, uint64_t ns);
/* Any thread: regions that found the tree full so far. */
uint64_t tr_regions_lost(tr_regions *r);

/* Totals to zero, names stay: before the part of a run that is to be looked at. Not inside a region; a tree is left. */
void tr_regions_reset(tr_regions *r);

/* A table, largest exclusive time first: name, calls, time, share, GB/s, Gflop/s. */
void tr_regions_print(const tr_regions *r, FILE *out);

#endif
