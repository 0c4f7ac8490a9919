/* trireme bench profile: what recording a profile costs. The same decode steps in blocks, without and with one, in turn: a pair
 * has one block of each, and every other pair has them the other way round, so that contexts that grow and machines that warm up
 * weigh on both. A pair's overhead compares medians of its steps; what is told is the median of the pairs and its error; on a
 * machine with other work, that of the process' CPU time says more. Work of the profile's own thread, which may have a core of its
 * own, is told beside it. */
#include <config.h>

#include "command/bench.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/size.h"
#include "command/bench_pairs.h"
#include "command/bench_steps.h"

enum { WARM = 8, PATH_BYTES = 4096 };

typedef struct overhead {
    const tr_bench_options *o;
    tr_bench_steps *steps;
    tr_papi *papi;
    char file[PATH_BYTES];
    bool temporary;
    int context;              /* tokens that the sequences have */
    double *seconds;          /* [steps] of a block */
    double *off, *on, *ratio; /* [pairs] medians of the blocks; on less off, in parts of off */
    double *cpu;              /* [pairs] the same of the process' CPU time in the whole block */
    double on_s;              /* all blocks with a profile, from begin to end */
    tr_profile_costs costs;   /* all of them */
    uint64_t bytes;           /* of the last file */
} overhead;

/* Of all threads, the profile's too. Where a thread that waits spins this is no more than another clock. */
static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static tr_status block(overhead *b, int sequences, double *out, double *cpu, tr_err *err)
{
    tr_status st = TR_OK;
    const double begun = cpu_s();

    for (int i = 0; i < b->o->steps && st == TR_OK; i++)
        st = tr_bench_steps_decode(b->steps, sequences, b->context++, &b->seconds[i], err);
    *cpu = cpu_s() - begun;
    if (st == TR_OK) *out = tr_bench_median(b->seconds, b->o->steps);
    return st;
}

static void add(tr_profile_costs *sum, const tr_profile_costs *c)
{
    sum->flushes += c->flushes;
    sum->flush_ns += c->flush_ns;
    sum->cpu_ns += c->cpu_ns;
    if (c->longest_ns > sum->longest_ns) sum->longest_ns = c->longest_ns;
}

static tr_status block_with_profile(overhead *b, int sequences, double *out, double *cpu,
                                    tr_err *err)
{
    const tr_bench_record_options options = {.file = b->file,
                                             .model = b->o->open.model_dir,
                                             .device = b->o->open.device,
                                             .kv_dtype = tr_bench_kv_name(b->o),
                                             .papi = b->papi,
                                             .flush_s = TR_BENCH_FLUSH_S};
    tr_bench_record *record = NULL;
    tr_profile_costs costs;
    struct stat sb;
    tr_err later;
    const uint64_t begun = tr_now_ns();

    tr_status st = tr_bench_record_begin(&record, &options, tr_bench_steps_opened(b->steps), err);
    if (st != TR_OK) return st;
    tr_bench_steps_record(b->steps, record);
    st = block(b, sequences, out, cpu, err);
    tr_bench_steps_record(b->steps, NULL);
    const tr_status closed = tr_bench_record_end(record, &costs, st == TR_OK ? err : &later);
    b->on_s += (double)(tr_now_ns() - begun) * 1e-9;
    add(&b->costs, &costs);
    if (stat(b->file, &sb) == 0) b->bytes = (uint64_t)sb.st_size;
    return st == TR_OK ? closed : st;
}

static tr_status pair(overhead *b, int sequences, int i, tr_err *err)
{
    const bool on_first = i % 2;
    double on = 0, off = 0;
    tr_status st = on_first ? block_with_profile(b, sequences, &b->on[i], &on, err)
                            : block(b, sequences, &b->off[i], &off, err);

    if (st == TR_OK)
        st = on_first ? block(b, sequences, &b->off[i], &off, err)
                      : block_with_profile(b, sequences, &b->on[i], &on, err);
    b->ratio[i] = st == TR_OK && b->off[i] > 0 ? b->on[i] / b->off[i] - 1 : 0;
    b->cpu[i] = st == TR_OK && off > 0 ? on / off - 1 : 0;
    return st;
}

static void report(overhead *b, int sequences, int context)
{
    const int n = b->o->pairs;
    const double off = tr_bench_median(b->off, n), on = tr_bench_median(b->on, n),
                 ratio = tr_bench_median(b->ratio, n), error = tr_bench_median_error(b->ratio, n),
                 of_cpu = tr_bench_median(b->cpu, n), cpu_error = tr_bench_median_error(b->cpu, n),
                 cpu = (double)b->costs.cpu_ns * 1e-9,
                 flush =
                     b->costs.flushes ? (double)b->costs.flush_ns / (double)b->costs.flushes : 0;

    printf("  %9d %9d %6d %6d %12.3f %12.3f %8.2f%% %8.2f%% %8.2f%% %8.2f%% %8.2f%% %10.2f\n",
           sequences, context, n, b->o->steps, off * 1e3, on * 1e3, 100 * ratio, 100 * error,
           100 * of_cpu, 100 * cpu_error, 100 * cpu / b->on_s, flush * 1e-6);
    printf(
        "{\"bench\": \"profile\", \"sequences\": %d, \"context\": %d, \"pairs\": %d, "
        "\"steps\": %d, \"off_median_s\": %.9f, \"on_median_s\": %.9f, \"overhead\": %.6f, "
        "\"overhead_error\": %.6f, \"overhead_cpu\": %.6f, \"overhead_cpu_error\": %.6f, \"on_s\": "
        "%.3f, "
        "\"thread_cpu_s\": "
        "%.6f, \"flushes\": %ju, \"flush_s\": %.9f, \"longest_flush_s\": %.9f, \"bytes\": %ju}\n",
        sequences, context, n, b->o->steps, off, on, ratio, error, of_cpu, cpu_error, b->on_s, cpu,
        (uintmax_t)b->costs.flushes, flush * 1e-9, (double)b->costs.longest_ns * 1e-9,
        (uintmax_t)b->bytes);
    fflush(stdout);
}

static tr_status measure(overhead *b, int sequences, int context, tr_err *err)
{
    double unused;
    tr_status st = tr_bench_steps_fill(b->steps, sequences, context, err);

    b->context = context;
    b->on_s = 0;
    b->costs = (tr_profile_costs){0};
    for (int i = 0; i < WARM && st == TR_OK; i++)
        st = tr_bench_steps_decode(b->steps, sequences, b->context++, &unused, err);
    for (int i = 0; i < b->o->pairs && st == TR_OK; i++)
        st = pair(b, sequences, i, err);
    if (st == TR_OK) report(b, sequences, context);
    return st;
}

static tr_status name_file(overhead *b, tr_err *err)
{
    const char *place = getenv("TMPDIR");
    int fd = -1;

    b->temporary = !b->o->profile;
    const int n = b->o->profile ? snprintf(b->file, sizeof b->file, "%s", b->o->profile)
                                : snprintf(b->file, sizeof b->file, "%s/trireme-bench-XXXXXX",
                                           place && *place == '/' ? place : "/tmp");
    if (n < 0 || n >= (int)sizeof b->file)
        return tr_fail(err, TR_E_USAGE, "bench profile: too long a name of a file");
    if (!b->temporary) return TR_OK;
    if ((fd = mkstemp(b->file)) < 0) {
        b->temporary = false;
        return tr_fail(err, TR_E_IO, "%s: %s", b->file, strerror(errno));
    }
    close(fd);
    return TR_OK;
}

static tr_status prepare(overhead *b, tr_err *err)
{
    const size_t pairs = (size_t)b->o->pairs;
    int n_steps = 0;

    if (__builtin_mul_overflow(2 * b->o->pairs, b->o->steps, &n_steps) || n_steps > 1 << 24)
        return tr_fail(err, TR_E_USAGE, "bench profile: --pairs %d --steps %d are too many",
                       b->o->pairs, b->o->steps);
    b->seconds = tr_calloc((size_t)b->o->steps, sizeof *b->seconds);
    b->off = tr_calloc(pairs, sizeof *b->off);
    b->on = tr_calloc(pairs, sizeof *b->on);
    b->ratio = tr_calloc(pairs, sizeof *b->ratio);
    b->cpu = tr_calloc(pairs, sizeof *b->cpu);
    if (!b->seconds || !b->off || !b->on || !b->ratio || !b->cpu)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_status st = name_file(b, err);
    if (st != TR_OK) return st;
    b->papi = tr_papi_open(NULL); /* before the device: its threads are counted too */
    return tr_bench_steps_open(&b->steps, b->o, n_steps + WARM + 4, err);
}

tr_status tr_bench_profile(const tr_bench_options *o, tr_err *err)
{
    overhead b = {.o = o};
    tr_status st = prepare(&b, err);

    if (st == TR_OK) {
        printf("# trireme %s, %s, %s\n", PACKAGE_VERSION, o->open.model_dir,
               tr_device_describe(tr_bench_steps_opened(b.steps)->device));
        printf("# %9s %9s %6s %6s %12s %12s %9s %9s %9s %9s %9s %10s\n", "sequences", "context",
               "pairs", "steps", "off, ms", "on, ms", "overhead", "error", "of CPU", "error",
               "thread", "flush, ms");
    }
    for (int i = 0; i < o->n_contexts && st == TR_OK; i++)
        for (int j = 0; j < o->n_sequences && st == TR_OK; j++)
            st = measure(&b, o->sequences[j], o->context[i], err);

    tr_bench_steps_close(b.steps);
    tr_papi_close(b.papi);
    if (b.temporary) remove(b.file);
    free(b.seconds);
    free(b.off);
    free(b.on);
    free(b.ratio);
    free(b.cpu);
    return st;
}
