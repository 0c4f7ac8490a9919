/* What the parts of `trireme bench` share: the options, parsed once (bench.c). */
#ifndef TR_COMMAND_BENCH_H
#define TR_COMMAND_BENCH_H

#include "command/open.h"

enum { TR_BENCH_LIST = 16, TR_BENCH_FLUSH_S = 30 };

typedef struct tr_bench_options {
    tr_open_options open;
    int context[TR_BENCH_LIST], n_contexts;
    int sequences[TR_BENCH_LIST], n_sequences;
    int prefill[TR_BENCH_LIST], n_prefill;
    int before[TR_BENCH_LIST], n_before; /* tokens before a prefill's */
    int steps, chunk, pairs;             /* pairs: of blocks of steps, bench profile and watchdog */
    const char *only;                    /* bench kernels: operations, with commas; NULL: all */
    tr_dtype kv_dtype;
    const char *profile; /* file; NULL: none */
    bool regions, halves, sync_check, no_overlap, own_rows;
    enum {
        TR_BENCH_STEP,
        TR_BENCH_LOAD,
        TR_BENCH_KERNELS,
        TR_BENCH_PROFILE,
        TR_BENCH_WATCHDOG
    } what;
} tr_bench_options;

/* Single operations: bench_kernels.c. Whole steps: bench_step.c. Loading: bench_load.c. Tables and JSON lines on stdout. */
tr_status tr_bench_kernels(const tr_bench_options *options, tr_err *err);
tr_status tr_bench_step(const tr_bench_options *options, tr_err *err);
/* The ceilings, as a line and as JSON. library: what it is, or why there is none (flops 0). bench_kernels.c */
void tr_bench_print_ceilings(const tr_ceilings *c, double sgemm_flops_per_s, const char *library);
tr_status tr_bench_load(const tr_bench_options *options, tr_err *err);
/* What recording a profile costs: bench_profile.c */
tr_status tr_bench_profile(const tr_bench_options *options, tr_err *err);
/* What the watchdog over several ranks costs: bench_watchdog.c */
tr_status tr_bench_watchdog(const tr_bench_options *options, tr_err *err);

#endif
