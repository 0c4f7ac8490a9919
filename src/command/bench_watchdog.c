/* trireme bench watchdog: what the watchdog (mpi/watchdog.h) and the notes of every collective that it keeps cost a step. The same
 * decode steps of all ranks in blocks, with a watchdog and without, in turn: a pair has one block of each, every other pair the other
 * way round. A pair compares the medians of its blocks; what is told is the median of the pairs and its standard error, by the
 * quartiles, so that a pair that something else disturbed counts once. */
#include <config.h>

#include "command/bench.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/size.h"
#include "command/bench_pairs.h"
#include "command/bench_steps.h"

enum { WARM = 8 };

typedef struct cost {
    const tr_bench_options *o;
    tr_bench_steps *steps;
    int context;              /* tokens that the sequences have */
    double *seconds;          /* [steps] of a block */
    double *off, *on, *ratio; /* [pairs] medians of the blocks; on less off, in parts of off */
} cost;

static tr_status block(cost *c, int sequences, bool guarded, double *out, tr_err *err)
{
    tr_status st = tr_bench_steps_guard(c->steps, guarded, err);

    for (int i = 0; i < c->o->steps && st == TR_OK; i++)
        st = tr_bench_steps_decode(c->steps, sequences, c->context++, &c->seconds[i], err);
    if (st == TR_OK) *out = tr_bench_median(c->seconds, c->o->steps);
    return st;
}

static void report(cost *c, int sequences, int context)
{
    const int n = c->o->pairs;
    const double off = tr_bench_median(c->off, n), on = tr_bench_median(c->on, n),
                 ratio = tr_bench_median(c->ratio, n), error = tr_bench_median_error(c->ratio, n);

    if (c->o->open.world->rank > 0) return;
    printf("  %9d %9d %6d %6d %12.3f %12.3f %8.2f%% %8.2f%%\n", sequences, context, n, c->o->steps,
           off * 1e3, on * 1e3, 100 * ratio, 100 * error);
    printf("{\"bench\": \"watchdog\", \"ranks\": %d, \"sequences\": %d, \"context\": %d, "
           "\"pairs\": %d, \"steps\": %d, \"off_median_s\": %.9f, \"on_median_s\": %.9f, "
           "\"overhead\": %.6f, \"overhead_error\": %.6f}\n",
           c->o->open.world->size, sequences, context, n, c->o->steps, off, on, ratio, error);
    fflush(stdout);
}

static tr_status measure(cost *c, int sequences, int context, tr_err *err)
{
    double unused;
    tr_status st = tr_bench_steps_fill(c->steps, sequences, context, err);

    c->context = context;
    for (int i = 0; i < WARM && st == TR_OK; i++)
        st = tr_bench_steps_decode(c->steps, sequences, c->context++, &unused, err);
    for (int i = 0; i < c->o->pairs && st == TR_OK; i++) {
        const bool on_first = i % 2;
        st = block(c, sequences, on_first, on_first ? &c->on[i] : &c->off[i], err);
        if (st == TR_OK)
            st = block(c, sequences, !on_first, on_first ? &c->off[i] : &c->on[i], err);
        c->ratio[i] = st == TR_OK && c->off[i] > 0 ? c->on[i] / c->off[i] - 1 : 0;
    }
    if (st == TR_OK) report(c, sequences, context);
    return st;
}

static tr_status prepare(cost *c, tr_err *err)
{
    const size_t pairs = (size_t)c->o->pairs;
    int n_steps = 0;

    if (c->o->open.world->size == 1)
        return tr_fail(err, TR_E_USAGE, "bench watchdog: one rank has none; start two or more");
    if (__builtin_mul_overflow(2 * c->o->pairs, c->o->steps, &n_steps) || n_steps > 1 << 24)
        return tr_fail(err, TR_E_USAGE, "bench watchdog: --pairs %d --steps %d are too many",
                       c->o->pairs, c->o->steps);
    c->seconds = tr_calloc((size_t)c->o->steps, sizeof *c->seconds);
    c->off = tr_calloc(pairs, sizeof *c->off);
    c->on = tr_calloc(pairs, sizeof *c->on);
    c->ratio = tr_calloc(pairs, sizeof *c->ratio);
    if (!c->seconds || !c->off || !c->on || !c->ratio)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    return tr_bench_steps_open(&c->steps, c->o, n_steps + WARM + 4, err);
}

static tr_status with_ranks(const tr_bench_options *o, tr_err *err)
{
    const tr_world *world = o->open.world;
    cost c = {.o = o};
    tr_status st = tr_agree(o->open.world, prepare(&c, err), err);
    const bool ready = st == TR_OK;

    if (ready && world->rank == 0) {
        printf("# trireme %s, %s, %s, %d ranks\n", PACKAGE_VERSION, o->open.model_dir,
               tr_device_describe(tr_bench_steps_opened(c.steps)->device), world->size);
        printf("# %9s %9s %6s %6s %12s %12s %9s %9s\n", "sequences", "context", "pairs", "steps",
               "off, ms", "on, ms", "overhead", "error");
    }
    for (int i = 0; i < o->n_contexts && st == TR_OK; i++)
        for (int j = 0; j < o->n_sequences && st == TR_OK; j++)
            st = measure(&c, o->sequences[j], o->context[i], err);
    if (ready) tr_bench_give_up(world, st, err);
    tr_bench_steps_close(c.steps);
    free(c.seconds);
    free(c.off);
    free(c.on);
    free(c.ratio);
    return st;
}

tr_status tr_bench_watchdog(const tr_bench_options *o, tr_err *err)
{
    return tr_bench_with_world(o, with_ranks, err);
}
