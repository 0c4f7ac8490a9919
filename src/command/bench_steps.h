/* Steps of a model, for the benches that time them: bench_step.c has them, bench_profile.c repeats them with a profile, bench_watchdog.c
 * with and without a watchdog. Main thread. */
#ifndef TR_COMMAND_BENCH_STEPS_H
#define TR_COMMAND_BENCH_STEPS_H

#include "command/bench.h"
#include "command/bench_record.h"

typedef struct tr_bench_steps tr_bench_steps;

/* The model with room for n_steps decode steps behind the longest context of the options. Options are kept. */
tr_status tr_bench_steps_open(tr_bench_steps **out, const tr_bench_options *options, int n_steps,
                              tr_err *err);
void tr_bench_steps_close(tr_bench_steps *steps); /* may be NULL */
tr_opened *tr_bench_steps_opened(tr_bench_steps *steps);

/* Some sequences of `context` tokens each; whatever was there before goes. */
tr_status tr_bench_steps_fill(tr_bench_steps *steps, int sequences, int context, tr_err *err);
/* One more token of each; context: what they have. Its time from plan to tokens, with what recording it takes. */
tr_status tr_bench_steps_decode(tr_bench_steps *steps, int sequences, int context, double *seconds,
                                tr_err *err);
/* Steps from now on are recorded; NULL: no more. Kept. */
void tr_bench_steps_record(tr_bench_steps *steps, tr_bench_record *record);
/* Collective where there are several ranks: the watchdog over the steps from now on (at first there is one), or none. */
tr_status tr_bench_steps_guard(tr_bench_steps *steps, bool on, tr_err *err);

/* A bench of all ranks: options with the world, which is started before and finished behind it. */
typedef tr_status tr_bench_ranks(const tr_bench_options *options, tr_err *err);
tr_status tr_bench_with_world(const tr_bench_options *options, tr_bench_ranks *bench, tr_err *err);
/* A rank that fails in a step leaves the others waiting for it: the job ends here. TR_OK, or one rank: returns. */
void tr_bench_give_up(const tr_world *world, tr_status st, tr_err *err);

/* --kv-dtype as it was given. */
const char *tr_bench_kv_name(const tr_bench_options *options);

#endif
