/* The figures that `trireme profile show` prints and diff compares, worked out of a profile: where the time of the main
 * stream (the one with the steps) went, by phase, operation, rank and layer; what communication cost; how even the work was;
 * how fast tokens came. Means are over the ranks that are present. Seconds throughout. */
#ifndef TR_PROFILE_SUMMARY_H
#define TR_PROFILE_SUMMARY_H

#include "profile/read.h"

enum { TR_SUMMARY_BINS = 48 };

typedef struct tr_summary_phase {
    double mean_s;  /* in the steps of this phase */
    uint64_t steps; /* of a rank, the mean */
} tr_summary_phase;

typedef struct tr_summary_op { /* all regions of one name and group */
    const char *name, *group;
    tr_region_kind kind;
    double count;         /* of all ranks */
    double mean_s, max_s; /* exclusive time of a rank */
    int max_rank;
    double bytes, flops, exposed_s; /* of all ranks */
    /* Of the calls that were timed on a GPU (0: none), of all ranks: their number, time there, what they moved and computed. Bytes
     * and flops are a call's mean in its phase. */
    double gpu_count, gpu_s, gpu_bytes, gpu_flops;
} tr_summary_op;

typedef struct tr_summary_rank {
    int rank;
    double run_s;
    double kind_s[TR_N_KINDS]; /* exclusive time by kind; run_s is their sum */
    double busy_s; /* KERNEL, HOST, LAYER and STEP: computing, or starting what computes */
} tr_summary_rank;

typedef struct tr_summary_layer {
    int layer;
    double count;         /* times a rank ran it, the mean of those that have it */
    double mean_s, max_s; /* inclusive, of those that have it */
    int max_rank;
    double stall_s;   /* of mean_s: in COMM and WAIT regions */
    double imbalance; /* most loaded expert / mean; 0: not known */
} tr_summary_layer;

typedef struct tr_summary_comm {
    const char *group, *op;
    double calls;             /* of all ranks */
    double bytes;             /* of all ranks */
    double time_s, exposed_s; /* of a rank, the mean */
} tr_summary_comm;

typedef struct tr_summary_even {   /* even work: largest over mean, 0: not known */
    double ranks;                  /* busy time */
    int rank;                      /* the busiest */
    double experts, experts_worst; /* rows of experts: mean over layers, worst layer */
    int experts_layer;
    double rank_tokens; /* rows of a rank's experts, mean over layers */
    int rank_tokens_most;
} tr_summary_even;

/* A counter: of sums (PAPI and our own) the last value, of readings (NVML) the mean; of a rank, the mean of those that have it. */
typedef struct tr_summary_counter {
    char *name;   /* "papi/perf::TASK-CLOCK" */
    char *units;  /* "" where they are not known */
    char *absent; /* why it could not be counted; NULL: it was */
    double value;
} tr_summary_counter;

typedef struct tr_summary {
    double run_s; /* of the main stream, the mean */
    int n_present, n_nodes;
    uint64_t steps;     /* of the rank that has most */
    double steps_s;     /* in steps, the mean */
    double gpu_steps_s; /* steps' time on their GPUs, of all ranks; 0: not timed */
    tr_summary_phase phase[TR_N_PHASES];
    bool has_phases;
    int n_ops, n_ranks, n_layers, n_comm;
    tr_summary_op *op;             /* largest mean_s first */
    tr_summary_rank *rank;         /* busiest first */
    tr_summary_layer *layer;       /* largest max_s first */
    tr_summary_comm *comm;         /* largest exposed_s first, then time_s */
    bool has_comm;                 /* comm is from /comm/ops; else from the regions */
    double comm_s, comm_exposed_s; /* mean: in COMM and WAIT regions; waited for in communication */
    double cp_gather_s, cp_exposed_s; /* mean: /overlap/cp, all layers */
    tr_summary_even even;
    /* Tokens, of one rank per replica. */
    double tokens_in, tokens_out, drafted, accepted;
    double t_begin, t_end; /* of the steps, seconds of the run */
    double rate_in[TR_SUMMARY_BINS], rate_out[TR_SUMMARY_BINS]; /* tokens/s, equal stretches */
    bool has_steps;
    uint64_t requests, failed;
    double ttft_p50_s, ttft_p99_s, tpot_p50_s; /* 0: not known */
    double kv_used;                    /* largest share of the pages in use, -1: not known */
    uint64_t cache_hits, cache_misses; /* tokens */
    tr_summary_counter *counter;
    int n_counters;
} tr_summary;

/* The root of the stream that has the steps; -1: no regions. */
int tr_summary_main_root(const tr_reader *r);
/* Root of each region, [n_regions], the caller's; NULL: out of memory. */
int *tr_summary_roots(const tr_reader *r);

/* Names point into r, which must outlive s. */
tr_status tr_summary_make(tr_summary *s, tr_reader *r, tr_err *err);
void tr_summary_free(tr_summary *s);

#endif
