/* What `trireme plan` tells: what each rank would hold, send and take. Computed once (forecast.c), then printed as a table or
 * as JSON (forecast_print.c). No device, no MPI. */
#ifndef TR_COMMAND_FORECAST_H
#define TR_COMMAND_FORECAST_H

#include <stdio.h>

#include "command/ranks.h"
#include "model/estimate.h"

typedef struct tr_forecast_options {
    const char *model;
    int world;
    const tr_rates *rates; /* NULL: the CPU's number formats, no limit of memory, no times */
    tr_dtype kv_dtype;
    const char *kv_name;
    int max_batch_tokens, max_sequences, max_model_len; /* per replica */
} tr_forecast_options;

typedef struct tr_forecast_class { /* ranks that hold the same amount of everything */
    int first, last, n;            /* n of the ranks first..last */
    int n_layers, n_moe;
    tr_slice slice; /* of the first one */
    tr_weight_bytes weights;
    uint64_t weight_bytes, workspace, cache_token;
    int64_t tokens; /* that fit beside the rest; -1: unlimited */
} tr_forecast_class;

typedef struct tr_forecast_step {
    tr_step_shape shape;
    double slowest, latency; /* seconds: of a stage, of all stages */
    double roofline;         /* seconds of all stages by bytes and flops alone; 0: not known */
    double rate;             /* tokens per second of all replicas, the pipeline full */
} tr_forecast_step;

typedef struct tr_forecast_traffic {
    const char *name;
    tr_step_shape shape;
    int n_layers; /* of the model that do this; 0: once a step */
    int n;
    tr_traffic list[TR_TRAFFIC_MAX];
} tr_forecast_traffic;

enum { TR_FORECAST_STEPS = 4, TR_FORECAST_TRAFFIC = 6, TR_FORECAST_WARNINGS = 16 };

typedef struct tr_forecast {
    const tr_config *config;
    const tr_ranks *ranks;
    tr_forecast_options options;
    tr_wire wire;
    tr_forecast_class *class; /* owned */
    int n_classes, room;
    int64_t tokens;    /* of a replica: what its tightest rank has room for; -1: unlimited */
    int *stage_layers; /* borrowed from ranks */
    tr_forecast_traffic traffic[TR_FORECAST_TRAFFIC];
    int n_traffic;
    tr_forecast_step step[TR_FORECAST_STEPS];
    int n_steps;
    char warning[TR_FORECAST_WARNINGS][320];
    int n_warnings;
} tr_forecast;

/* Keeps config and ranks. Free in any case. TR_E_MEMORY. */
tr_status tr_forecast_make(tr_forecast *out, const tr_config *config, const tr_ranks *ranks,
                           const tr_forecast_options *options, tr_err *err);
void tr_forecast_free(tr_forecast *f);

/* Of the memory of a GPU, what is left to the driver, to NCCL and to rounding. */
extern const double tr_forecast_reserve;

void tr_forecast_print(FILE *out, const tr_forecast *f);
/* One JSON object on one line; sizes in bytes, times in seconds. */
tr_status tr_forecast_json(FILE *out, const tr_forecast *f, tr_err *err);

#endif
