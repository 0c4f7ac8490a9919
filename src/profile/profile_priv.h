/* What profile.c, tables.c and settle.c share. */
#ifndef TR_PROFILE_PROFILE_PRIV_H
#define TR_PROFILE_PROFILE_PRIV_H

#include <pthread.h>
#include <stdatomic.h>

#include "profile/file.h"
#include "profile/profile.h"

enum {
    TR_PROFILE_SOURCES = 4,
    TR_PROFILE_WINDOWS =
        512, /* then neighbours are joined and each stands for twice as many steps */
    TR_PROFILE_FIRST_WINDOW = 16,
};

/* Records on their way to the file: one side fills `in` under the lock, the thread swaps and empties `out` without. */
typedef struct tr_prof_queue {
    size_t bytes, room; /* of a record; records */
    size_t n_in, n_out;
    char *in, *out;
    uint64_t lost; /* found it full */
} tr_prof_queue;

typedef struct tr_prof_stream {
    tr_profile *profile;
    tr_regions *regions;
    char name[TR_REGION_NAME];
    tr_region_node *node; /* [nodes_max] as last looked at */
    uint32_t *row;        /* [nodes_max] of the node in p->region */
    int n_nodes, nodes_max;
    bool is_main;
    pthread_mutex_t lock; /* of events: the stream's thread fills, the profile's empties */
    tr_prof_queue events; /* tr_prof_trace, region: a node */
} tr_prof_stream;

struct tr_profile {
    tr_profile_options o;
    char *path, *part,
        *fresh; /* the file when it is closed, its copy of the last flush, and while it is written */
    uint64_t next_copy_ns; /* no copy before that */
    char matrix[TR_PROFILE_MATRICES][32];
    tr_prof_file *file; /* the thread's while it runs */
    _Atomic bool dead;
    bool running, started;

    pthread_t thread;
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t wake;
    bool stop;
    tr_prof_queue steps, requests;
    char **line; /* [n_lines] warnings not written yet */
    int n_lines;
    uint64_t n_requests, n_lost_lines;
    bool wanted; /* the thread asks the main thread for tables */
    tr_profile_tables now;
    uint64_t window_steps, window_begun; /* length; step at which the open one began */
    int n_windows;
    uint64_t *window;                 /* [WINDOWS, n_layers] rows of finished windows */
    uint64_t *tokens, *tokens_before; /* [n_layers] now, and when the open window began */

    /* The thread's, or the main thread's while there is none. */
    tr_prof_stream stream[TR_PROFILE_STREAMS];
    int n_streams;
    tr_prof_region *region; /* [n_regions] */
    int n_regions, region_room;
    tr_profile_tables copy;
    uint64_t *window_copy;
    void *column; /* [region_room] of 8 bytes: one dataset of /profile at a time */
    tr_profile_counters source[TR_PROFILE_SOURCES];
    double *values; /* [the most counters of a source] */
    int n_sources;
    tr_profile_costs costs;
    _Atomic uint32_t step; /* that the main thread began last */
};

/* The first failure: a warning, and nothing is recorded any more. Returns whether st is TR_OK. */
bool tr_profile_survives(tr_profile *p, tr_status st, const tr_err *err);

/* tables.c: everything that is written whole. By whoever may touch the file. */
tr_status tr_profile_map_regions(tr_profile *p, tr_err *err); /* looks at the streams first */
tr_status tr_profile_write_tables(tr_profile *p, tr_err *err);
/* Names of counters in paths: '/' is another character there. Returns text. */
const char *tr_profile_counter_path(char *text, size_t n, const char *folder, const char *source,
                                    const char *name);

#endif
