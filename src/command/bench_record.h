/* The profile of a bench: whole steps of one process, as `trireme batch --profile` would leave them, in one file. For `bench step
 * --profile` and for `bench profile`, which measures what it costs. Main thread. */
#ifndef TR_COMMAND_BENCH_RECORD_H
#define TR_COMMAND_BENCH_RECORD_H

#include "command/open.h"
#include "model/plan.h"
#include "profile/papi.h"
#include "profile/profile.h"

typedef struct tr_bench_record tr_bench_record;

typedef struct tr_bench_record_options {
    const char *file;   /* a rank's file of the schema; whatever was there is replaced at the end */
    const char *model;  /* folder, for what the profile says of its run */
    const char *device; /* NULL: auto */
    const char *kv_dtype;
    tr_papi *papi;  /* opened before the device, for its threads; may be NULL */
    double flush_s; /* between flushes */
    tr_log *log;    /* may be NULL */
} tr_bench_record_options;

/* From now on regions of `opened`, whose model is there, make a tree. Options and opened are kept. TR_E_IO, TR_E_MEMORY. */
tr_status tr_bench_record_begin(tr_bench_record **out, const tr_bench_record_options *options,
                                tr_opened *opened, tr_err *err);
/* A step's work begins. record may be NULL. */
void tr_bench_record_plan(tr_bench_record *record, const tr_plan *plan, uint64_t t0_ns);
/* A step is done; moments by tr_now_ns. record may be NULL. */
void tr_bench_record_step(tr_bench_record *record, const tr_plan *plan, uint64_t t0_ns,
                          uint64_t t1_ns);
/* The file is closed, the tree goes. *costs (may be NULL): what it took. TR_E_IO: the file is not whole; in any case record is
 * freed. record may be NULL. */
tr_status tr_bench_record_end(tr_bench_record *record, tr_profile_costs *costs, tr_err *err);

#endif
