/* trireme bench profile: what it costs to know where the time went. The same decode steps in four ways, in turn: without regions,
 * with them (as every run has them), with a profile whose PAPI events rest, and with all of a profile. On the CPU the way changes
 * every few steps, so that contexts that grow, machines that warm up and other work weigh on all alike; a device that is timed
 * goes on in one way for a block of steps, because only one in many of its recorded steps is stamped. A pair compares the medians
 * of the steps of two ways in one block; what is told is the median of the pairs and its error; on a machine with other work,
 * that of the process' CPU time says more. Work of the profile's own thread, which may have a core of its own, is told beside it. */
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

enum {
    WARM = 8,
    PATH_BYTES = 4096,
    TURN = 8,
    /* steps */ GROWTH = 1024 /* tokens, then the context is made anew */
};

typedef enum way { WAY_BARE, WAY_REGIONS, WAY_PROFILE, WAY_PAPI, N_WAYS } way;

/* What is told: the cost of one way over another. */
static const struct {
    const char *name;
    way off, on;
} cost[] = {
    {"regions", WAY_BARE, WAY_REGIONS},
    {"profile", WAY_REGIONS, WAY_PROFILE},
    {"with PAPI", WAY_REGIONS, WAY_PAPI},
};
enum { N_COSTS = sizeof cost / sizeof *cost };

typedef struct overhead {
    const tr_bench_options *o;
    tr_bench_steps *steps;
    tr_papi *papi;
    tr_bench_record *record;
    char file[PATH_BYTES];
    bool temporary;
    int n_papi;              /* events that are counted */
    int block_tokens, fills; /* tokens of a block; blocks of one context */
    int context, turns;      /* tokens that the sequences have; changes of the way so far */
    double *seconds, *cpu;   /* [N_WAYS, steps] of a block */
    double *median, *of_cpu; /* [N_WAYS, pairs] of the blocks */
    double *ratio;           /* [pairs] */
    double recorded_s;       /* from begin to end of the profile */
    tr_profile_costs costs;
    uint64_t bytes; /* of the file */
} overhead;

/* Of all threads, the profile's too. Where a thread that waits spins this is no more than another clock. */
static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- steps in one way ------------------------------------------------------------------------------------------------- */

static bool host(const overhead *b)
{
    return tr_bench_steps_opened(b->steps)->ops->caps & TR_CAP_HOST;
}

/* Between steps. */
static tr_status go(overhead *b, way w, tr_err *err)
{
    tr_opened *opened = tr_bench_steps_opened(b->steps);
    const bool recorded = w == WAY_PROFILE || w == WAY_PAPI;

    tr_regions_keep(&opened->regions, w == WAY_BARE ? TR_KEEP_NOTHING
                                      : recorded    ? TR_KEEP_ALL
                                                    : TR_KEEP_TOTALS);
    tr_papi_rest(b->papi, w != WAY_PAPI);
    tr_bench_steps_record(b->steps, recorded ? b->record : NULL);
    return host(b) ? TR_OK : tr_model_time(opened->model, recorded ? TR_TIME_EVERY : 0, err);
}

static tr_status some(overhead *b, int sequences, way w, int from, int n, tr_err *err)
{
    const size_t row = (size_t)w * (size_t)b->o->steps;
    tr_status st = go(b, w, err);

    for (int i = from; i < from + n && st == TR_OK; i++) {
        const double begun = cpu_s();
        st = tr_bench_steps_decode(b->steps, sequences, b->context++, &b->seconds[row + (size_t)i],
                                   err);
        b->cpu[row + (size_t)i] = cpu_s() - begun;
    }
    return st;
}

/* --steps steps of each way. Who comes first changes from turn to turn, and so does who comes behind whom. */
static tr_status block(overhead *b, int sequences, int i_pair, tr_err *err)
{
    const int n = b->o->steps, turn = host(b) && TURN < n ? TURN : n;
    tr_status st = TR_OK;

    for (int i = 0; i < n && st == TR_OK; i += turn, b->turns++)
        for (int k = 0; k < N_WAYS && st == TR_OK; k++) {
            const int j = b->turns / N_WAYS % 2 ? N_WAYS - 1 - k : k,
                      left = n - i < turn ? n - i : turn;
            st = some(b, sequences, (way)((j + b->turns) % N_WAYS), i, left, err);
        }
    for (int w = 0; w < N_WAYS && st == TR_OK; w++) {
        const size_t row = (size_t)w * (size_t)n, to = (size_t)(w * b->o->pairs + i_pair);
        b->median[to] = tr_bench_median(b->seconds + row, n);
        b->of_cpu[to] = tr_bench_median(b->cpu + row, n);
    }
    return st;
}

/* ---- the profile ------------------------------------------------------------------------------------------------------- */

static tr_status begin(overhead *b, tr_err *err)
{
    const tr_bench_record_options options = {.file = b->file,
                                             .model = b->o->open.model_dir,
                                             .device = b->o->open.device,
                                             .kv_dtype = tr_bench_kv_name(b->o),
                                             .papi = b->papi,
                                             .flush_s = TR_BENCH_FLUSH_S};
    tr_papi_rest(b->papi, false);
    return tr_bench_record_begin(&b->record, &options, tr_bench_steps_opened(b->steps), err);
}

static tr_status end(overhead *b, tr_err *err)
{
    struct stat sb;

    tr_bench_steps_record(b->steps, NULL);
    tr_regions_keep(&tr_bench_steps_opened(b->steps)->regions, TR_KEEP_ALL);
    const tr_status st = tr_bench_record_end(b->record, &b->costs, err);
    b->record = NULL;
    if (stat(b->file, &sb) == 0) b->bytes = (uint64_t)sb.st_size;
    return st;
}

/* ---- what is told ------------------------------------------------------------------------------------------------------ */

/* On less off, in parts of off: the median of the pairs, and its error. */
static double compare(overhead *b, const double *of, int i_cost, double *error)
{
    const int n = b->o->pairs;
    const double *off = of + cost[i_cost].off * n, *on = of + cost[i_cost].on * n;

    for (int i = 0; i < n; i++)
        b->ratio[i] = off[i] > 0 ? on[i] / off[i] - 1 : 0;
    const double ratio = tr_bench_median(b->ratio, n);
    *error = tr_bench_median_error(b->ratio, n);
    return ratio;
}

static void report(overhead *b, int sequences, int context, int i)
{
    const int n = b->o->pairs;
    double error, cpu_error;
    const double ratio = compare(b, b->median, i, &error),
                 of_cpu = compare(b, b->of_cpu, i, &cpu_error),
                 cpu = (double)b->costs.cpu_ns * 1e-9, flushes = (double)b->costs.flushes,
                 flush = flushes > 0 ? (double)b->costs.flush_ns / flushes : 0;
    const size_t room = (size_t)n * sizeof(double);

    memcpy(b->ratio, b->median + cost[i].off * n, room);
    const double off = tr_bench_median(b->ratio, n);
    memcpy(b->ratio, b->median + cost[i].on * n, room);
    const double on = tr_bench_median(b->ratio, n);
    printf("  %-10s %9d %9d %6d %6d %10.4f %10.4f %8.2f%% %8.2f%% %8.2f%% %8.2f%% %8.2f%% %10.2f\n",
           cost[i].name, sequences, context, n, b->o->steps, off * 1e3, on * 1e3, 100 * ratio,
           100 * error, 100 * of_cpu, 100 * cpu_error, 100 * cpu / b->recorded_s, flush * 1e-6);
    printf("{\"bench\": \"profile\", \"what\": \"%s\", \"papi_events\": %d, \"sequences\": %d, "
           "\"context\": %d, \"pairs\": %d, \"steps\": %d, \"off_median_s\": %.9f, "
           "\"on_median_s\": %.9f, \"overhead\": %.6f, \"overhead_error\": %.6f, "
           "\"overhead_cpu\": %.6f, \"overhead_cpu_error\": %.6f, \"on_s\": %.3f, "
           "\"thread_cpu_s\": %.6f, \"flushes\": %ju, \"flush_s\": %.9f, \"longest_flush_s\": "
           "%.9f, \"bytes\": %ju}\n",
           cost[i].name, cost[i].on == WAY_PAPI ? b->n_papi : 0, sequences, context, n, b->o->steps,
           off, on, ratio, error, of_cpu, cpu_error, b->recorded_s, cpu,
           (uintmax_t)b->costs.flushes, flush * 1e-9, (double)b->costs.longest_ns * 1e-9,
           (uintmax_t)b->bytes);
}

static tr_status measure(overhead *b, int sequences, int context, tr_err *err)
{
    double unused;
    tr_err later;
    const uint64_t begun = tr_now_ns();
    tr_status st = begin(b, err);

    if (st != TR_OK) return st;
    b->turns = 0;
    for (int i = 0; i < b->o->pairs && st == TR_OK; i++) {
        if (i % b->fills == 0) {
            st = tr_bench_steps_fill(b->steps, sequences, context, err);
            b->context = context;
            for (int k = 0; k < WARM && st == TR_OK; k++)
                st = tr_bench_steps_decode(b->steps, sequences, b->context++, &unused, err);
        }
        if (st == TR_OK) st = block(b, sequences, i, err);
    }
    const tr_status ended = end(b, st == TR_OK ? err : &later);
    b->recorded_s = (double)(tr_now_ns() - begun) * 1e-9;
    if (st == TR_OK) st = ended;
    for (int i = 0; i < N_COSTS && st == TR_OK; i++)
        report(b, sequences, context, i);
    fflush(stdout);
    return st;
}

/* ---- the bench ----------------------------------------------------------------------------------------------------------- */

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
    const size_t pairs = (size_t)b->o->pairs, steps = (size_t)b->o->steps;

    if (b->o->steps > (1 << 20) / N_WAYS)
        return tr_fail(err, TR_E_USAGE, "bench profile: --steps %d are too many", b->o->steps);
    b->block_tokens = N_WAYS * b->o->steps;
    b->fills = b->block_tokens < GROWTH ? GROWTH / b->block_tokens : 1;
    b->seconds = tr_calloc(N_WAYS * steps, sizeof *b->seconds);
    b->cpu = tr_calloc(N_WAYS * steps, sizeof *b->cpu);
    b->median = tr_calloc(N_WAYS * pairs, sizeof *b->median);
    b->of_cpu = tr_calloc(N_WAYS * pairs, sizeof *b->of_cpu);
    b->ratio = tr_calloc(pairs, sizeof *b->ratio);
    if (!b->seconds || !b->cpu || !b->median || !b->of_cpu || !b->ratio)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_status st = name_file(b, err);
    if (st != TR_OK) return st;
    b->papi = tr_papi_open(NULL); /* before the device: its threads are counted too */
    if (!b->papi) return tr_fail(err, TR_E_MEMORY, "out of memory");
    const tr_profile_counters counters = tr_papi_counters(b->papi);
    for (int i = 0; i < counters.n; i++)
        b->n_papi += !counters.absent[i];
    return tr_bench_steps_open(&b->steps, b->o, b->fills * b->block_tokens + WARM + 4, err);
}

tr_status tr_bench_profile(const tr_bench_options *o, tr_err *err)
{
    overhead b = {.o = o};
    tr_status st = prepare(&b, err);

    if (st == TR_OK) {
        printf("# trireme %s, %s, %s, %d PAPI events counted\n", PACKAGE_VERSION, o->open.model_dir,
               tr_device_describe(tr_bench_steps_opened(b.steps)->device), b.n_papi);
        printf("# %-10s %9s %9s %6s %6s %10s %10s %9s %9s %9s %9s %9s %10s\n", "cost of",
               "sequences", "context", "pairs", "steps", "off, ms", "on, ms", "overhead", "error",
               "of CPU", "error", "thread", "flush, ms");
    }
    for (int i = 0; i < o->n_contexts && st == TR_OK; i++)
        for (int j = 0; j < o->n_sequences && st == TR_OK; j++)
            st = measure(&b, o->sequences[j], o->context[i], err);

    tr_bench_steps_close(b.steps);
    tr_papi_close(b.papi);
    if (b.temporary) remove(b.file);
    free(b.seconds);
    free(b.cpu);
    free(b.median);
    free(b.of_cpu);
    free(b.ratio);
    return st;
}
