/* The profile of one rank while it runs: who has something to record calls this; a thread of its own, the only one that
 * touches HDF5 meanwhile, takes samples once a second and writes and flushes the rank's file.
 *
 *     create      main thread: the file with what is known at the start
 *     describe    main thread: attributes and whole datasets, before start
 *     start       the first flush; the thread begins. NAME.new is being written, NAME.part its copy of the last flush
 *     step, ...   record; none of them waits for a disk
 *     stop        main thread: the thread has ended, the last tables are written
 *     settle      main thread: regions and clocks of all ranks brought together (settle.h)
 *     close       NAME.new becomes NAME, NAME.part goes
 *
 * A profile is never in the way of results: whatever fails after create is one warning, ends the recording, and is not
 * an error of the job. All functions take NULL and do nothing. */
#ifndef TR_PROFILE_PROFILE_H
#define TR_PROFILE_PROFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/log.h"
#include "base/region.h"
#include "profile/schema.h"

typedef struct tr_profile tr_profile;

enum { TR_PROFILE_STREAMS = 4, TR_PROFILE_MATRICES = 8 };

/* What is counted in many places, as one picture; arrays are the profile's and zeroed. NULL where a length is 0. */
typedef struct tr_profile_tables {
    tr_prof_comm
        *comm; /* [n_comm]; region: an id of the main stream's names, or TR_PROFILE_NO_REGION */
    uint64_t *sent[TR_PROFILE_MATRICES]; /* [world] each, bytes by receiver */
    tr_prof_overlap *overlap;            /* [n_layers] */
    uint64_t *expert_tokens;             /* [n_layers, n_experts] */
    uint64_t *rank_tokens;               /* [n_layers] */
} tr_profile_tables;
#define TR_PROFILE_NO_REGION UINT32_MAX

typedef struct tr_profile_options {
    const char *path; /* of the rank's file, without .part */
    double flush_s, sample_s;
    int64_t clock_offset_ns,
        origin_ns;                  /* rank 0's clock less this one's; rank 0's clock at time 0 */
    int world, n_layers, n_experts; /* lengths of the tables; experts: all there are, 0: none */
    int n_comm, n_matrices;
    const char *matrix[TR_PROFILE_MATRICES]; /* names: kinds of groups */
    bool trace;                              /* single regions too */
    int events_max;                          /* of the trace, all streams together, each second */
    bool clear;  /* what lies at PATH.part can be opened as it is, without h5clear */
    tr_log *log; /* kept; may be NULL */
    void *ctx;   /* of these calls; any may be NULL */
    void (*copied)(
        void *ctx); /* PATH.part is new; by whoever flushes, and HDF5 is its own meanwhile */
    void (*sample)(void *ctx, tr_prof_kv *kv, tr_prof_memory *memory); /* by the profile's thread */
    void (*tables)(void *ctx, tr_profile_tables *out);   /* by the main thread, between steps */
    void (*rank_tokens)(void *ctx, uint64_t *per_layer); /* [n_layers], by the main thread */
} tr_profile_options;

/* Names and strings are copied, the log is kept. TR_E_IO, TR_E_MEMORY. */
tr_status tr_profile_create(tr_profile **out, const tr_profile_options *options, tr_err *err);

/* Before start, by the main thread. A failure is remembered and ends the profile. */
void tr_profile_text(tr_profile *p, const char *object, const char *name, const char *value);
void tr_profile_number(tr_profile *p, const char *object, const char *name, int64_t value);
void tr_profile_put(tr_profile *p, tr_dataset_id id, const uint64_t *dims, const void *data);

/* A stream that has been grown (base/region.h); kept until close. The first one is the main thread's. Before start. */
void tr_profile_stream(tr_profile *p, tr_regions *regions);
/* One more source of counters: sampled by the thread with the others. read: values[n], NaN: not now. Kept. absent[i]: why
 * counter i cannot be read, or NULL. Before start. */
typedef struct tr_profile_counters {
    const char *source; /* "papi", "nvml", ... */
    int n;
    const char *const *name, *const *units, *const *absent; /* [n] */
    void *ctx;
    void (*read)(void *ctx, double *values);
    void (*phase)(void *ctx, tr_phase phase, double *values); /* sums during a phase; may be NULL */
} tr_profile_counters;
void tr_profile_counter(tr_profile *p, const tr_profile_counters *counters);

void tr_profile_start(tr_profile *p);

/* Moments of tr_now_ns as the file has them. */
int64_t tr_profile_time(const tr_profile *p, uint64_t now_ns);

/* Main thread, before a step's regions: they are this step's in /trace. It may begin before those before it are done. */
void tr_profile_begin_step(tr_profile *p, uint64_t step);
/* Main thread, when a step is done. Times as tr_profile_time gives them. */
void tr_profile_step(tr_profile *p, const tr_prof_step *step);
/* Any thread. id is set here. */
void tr_profile_request(tr_profile *p, const tr_prof_request *request);
void tr_profile_warn(tr_profile *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The thread has ended and everything is in the file. */
void tr_profile_stop(tr_profile *p);
/* False: the profile has failed, or there is none. */
bool tr_profile_well(const tr_profile *p);

/* complete: the run has come to its end. The file gets its name. Frees; p may be in any state. */
void tr_profile_close(tr_profile *p, bool complete);

/* What the flushes of the rank's file have taken so far, for the closing message. */
typedef struct tr_profile_costs {
    uint64_t flushes, flush_ns, longest_ns, cpu_ns; /* cpu: of the profile's thread */
    uint64_t lost_steps, lost_events;
} tr_profile_costs;
tr_profile_costs tr_profile_costs_get(tr_profile *p);

#endif
