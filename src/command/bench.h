/* What the parts of `trireme bench` share: the options, parsed once (bench.c). */
#ifndef TR_COMMAND_BENCH_H
#define TR_COMMAND_BENCH_H

#include "command/open.h"

enum { TR_BENCH_LIST = 16 };

typedef struct tr_bench_options {
    tr_open_options open;
    int context[TR_BENCH_LIST], n_contexts;
    int sequences[TR_BENCH_LIST], n_sequences;
    int prefill[TR_BENCH_LIST], n_prefill;
    int steps;
    tr_dtype kv_dtype;
    bool regions;
    bool load; /* bench load */
} tr_bench_options;

/* Whole steps: bench_step.c. Loading: bench_load.c. Tables and JSON lines on stdout. */
tr_status tr_bench_step(const tr_bench_options *options, tr_err *err);
tr_status tr_bench_load(const tr_bench_options *options, tr_err *err);

#endif
