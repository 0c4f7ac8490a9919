/* Regions: the profiling call. A region is a named stretch of a step on one thread; bytes and flops are what the caller
 * knows it moved and computed. Where the numbers go is the sink's business: base/ has aggregate counters (always on),
 * profile/ adds time lines and HDF5 later. Used by the step loop, the model, the communicators and loading.
 *
 * Begin/end pairs nest; one tr_regions belongs to one thread. */
#ifndef TR_BASE_REGION_H
#define TR_BASE_REGION_H

#include <stdint.h>
#include <stdio.h>

enum { TR_REGIONS_MAX = 96, TR_REGION_DEPTH = 16 };

typedef struct tr_region_total {
    const char *name; /* static string */
    uint64_t calls, inclusive_ns, exclusive_ns;
    double bytes, flops;
} tr_region_total;

typedef struct tr_region_sink {
    void *ctx; /* both may be NULL */
    void (*begin)(void *ctx, int region, uint64_t now_ns);
    void (*end)(void *ctx, int region, uint64_t now_ns, double bytes, double flops);
} tr_region_sink;

typedef struct tr_regions {
    int n, depth;
    tr_region_total total[TR_REGIONS_MAX];
    int open[TR_REGION_DEPTH];
    uint64_t begun_ns[TR_REGION_DEPTH], child_ns[TR_REGION_DEPTH];
    tr_region_sink sink;
} tr_regions;

/* The id of a region with this name (compared as strings), made on first use; -1 when the table is full. */
int tr_region_id(tr_regions *r, const char *static_name);

/* r may be NULL and id may be -1: nothing happens. */
void tr_region_begin(tr_regions *r, int id);
void tr_region_end(tr_regions *r, double bytes, double flops);

/* Totals to zero, names stay: before the part of a run that is to be looked at. Not inside a region. */
void tr_regions_reset(tr_regions *r);

/* A table, largest exclusive time first: name, calls, time, share, GB/s, Gflop/s. */
void tr_regions_print(const tr_regions *r, FILE *out);

#endif
