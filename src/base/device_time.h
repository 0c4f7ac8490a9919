/* Time on a device, for the regions of one stream (base/region.h): pairs of stamps, which the device takes when its work has come so
 * far, from a pool. Nothing here waits: stamps of a step are read when the step's ticket has passed, which is when a later step
 * begins or somebody asks. A region's time is that of its lane from begin to end, waiting for the host's launches included; it is
 * added to the region's node as gpu_ns and gpu_count, so that what was timed only now and then can be told from what always was.
 *
 * A recorded step (a graph) is one launch for the host: its operations have no stamps. A second record of it with stamps where
 * layers and their halves begin and end, a set of its own, is run now and then. This module knows no device; the stream's thread
 * alone calls it. */
#ifndef TR_BASE_DEVICE_TIME_H
#define TR_BASE_DEVICE_TIME_H

#include <stdbool.h>
#include <stdint.h>

#include "base/region.h"

typedef struct tr_stamp_source { /* kept; set NULL: the pool's own, of 2 * n_pairs stamps */
    void *ctx;
    bool (*stamp)(void *ctx, void *set, int i); /* false: it could not be asked for */
    bool (*between)(void *ctx, void *set, int from, int to,
                    uint64_t *ns);             /* both have been taken; false: failed */
    int (*passed)(void *ctx, uint64_t ticket); /* 1; 0: not yet; negative: the device has failed */
} tr_stamp_source;

/* What is stamped from now on. */
typedef enum tr_stamp_mode {
    TR_STAMP_ALL,  /* every operation, layer, region of kind HOST inside a step, and step */
    TR_STAMP_STEP, /* steps */
    TR_STAMP_RECORD, /* all but operations, into a set, in a record: it takes no time, so nothing is added */
    TR_STAMP_REPLAY, /* the same as they come: the record, run in this step, stamps the set again */
} tr_stamp_mode;

typedef struct tr_device_times tr_device_times;

/* Sets the clock of regions (kept), which must have a tree. NULL: out of memory. */
tr_device_times *tr_device_times_create(tr_regions *regions, const tr_stamp_source *source,
                                        int n_pairs);
void tr_device_times_free(tr_device_times *t); /* the clock goes; may be NULL */

/* Stamps of a record: `stamps` (kept, the caller's to free afterwards) has 2 * n_pairs. NULL: out of memory. */
typedef struct tr_stamp_set tr_stamp_set;
tr_stamp_set *tr_stamp_set_create(void *stamps, int n_pairs);
void tr_stamp_set_free(
    tr_stamp_set
        *set); /* no step that uses it is on its way, or times are freed first; may be NULL */
/* A step with this set has not been read yet: it must not be run again before. */
bool tr_stamp_set_busy(const tr_stamp_set *set);

/* A step of this number: begin, its regions, end with a ticket that passes behind its last stamp. t may be NULL. */
void tr_device_times_begin(tr_device_times *t, uint64_t step);
void tr_device_times_mode(tr_device_times *t, tr_stamp_mode mode, tr_stamp_set *set);
void tr_device_times_end(tr_device_times *t, uint64_t ticket);
/* Whatever has passed is read. */
void tr_device_times_collect(tr_device_times *t);
/* One of the last steps that were read; false: not known. t may be NULL. */
typedef struct tr_device_step {
    uint64_t ns;
    bool recorded; /* it was run from a record, or made one: another mode than TR_STAMP_ALL */
} tr_device_step;
bool tr_device_times_of(const tr_device_times *t, uint64_t step, tr_device_step *out);
/* Regions that found no stamps left, or whose stamps failed; whole steps count once. */
uint64_t tr_device_times_lost(const tr_device_times *t);

#endif
