/* trireme bench: options and dispatch. Every bench prints a table and JSON lines on stdout, never a verdict. */
#include <config.h>

#include "command/bench.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "command/apart.h"
#include "command/bench_comm.h"
#include "command/command.h"

static const char help_text[] =
    "Usage: trireme bench kernels [-m MODEL] [options]\n"
    "       [mpirun -n RANKS] trireme bench step -m MODEL [options]\n"
    "       trireme bench load -m MODEL [options]\n"
    "       trireme bench profile -m MODEL [options]\n"
    "       mpirun -n RANKS trireme bench watchdog -m MODEL [options]\n"
    "       mpirun -n RANKS trireme bench comm [options]   (bench comm --help)\n"
    "\n"
    "kernels: every operation alone, at the sizes of MODEL (default: the 671B model's),\n"
    "caches cold, beside the ceilings of this machine, a library's sgemm and an fp64\n"
    "computation. step: whole steps, decode of some sequences at a context and prefill\n"
    "of a prompt; a decoded context longer than 512 tokens repeats its first 512.\n"
    "load: a checkpoint into packed weights, after a plain parallel read of the same\n"
    "bytes. profile: the same decode steps in turn without regions, with them, with a\n"
    "profile and with its PAPI events, and what the profile's own thread takes. watchdog:\n"
    "the same without and with the watchdog over several ranks. Each prints a table and\n"
    "JSON lines.\n"
    "\n"
    "  -m, --model DIR           folder with config.json and, but for kernels, safetensors\n"
    "      --only OP[,OP...]     of kernels: these operations alone\n"
    "      --context N[,N...]    tokens before the decoded ones (default 1000)\n"
    "      --sequences N[,N...]  sequences of a decode step (default 1,16)\n"
    "      --prefill N[,N...]    prompt lengths (default 512); 0: none\n"
    "      --prefill-at N[,N...] tokens before the prompt's (default 0)\n"
    "      --chunk N             rows of a prefill step (default 512)\n"
    "      --steps N             timed steps of each line (default 64)\n"
    "      --pairs N             of profile, watchdog: pairs of blocks of --steps (default 10)\n"
    "      --profile FILE        of step: record all steps; of profile: where to write\n"
    "      --threads N           threads (default: as many as cores are given)\n"
    "      --isa NAME            plain, avx2, avx512 or amx (default: the best here)\n"
    "      --device NAME         auto, cpu or cuda (default auto)\n"
    "      --kv-dtype NAME       fp8, bf16 or f32 cache (default fp8)\n"
    "      --load-format NAME    safetensors or dummy (default safetensors)\n"
    "      --override KEY=VALUE  a config.json number; may be repeated\n"
    "      --seed N              of dummy weights and of the token ids (default 0)\n"
    "      --tp N                of step under mpirun, as all these: ranks that share the heads\n"
    "      --pp N                pipeline stages\n"
    "      --dp N                replicas: each has its part of --sequences, and a prompt\n"
    "      --cp N                ranks that share the rows of a prompt\n"
    "      --ep N                ranks that share the experts\n"
    "      --moe-tp N            ranks that share each expert's width\n"
    "      --pp-layers N,N...    layers of each stage\n"
    "      --cp-mode MODE        round-robin-split or in-seq-split\n"
    "      --no-overlap          wait for every exchange where it begins\n"
    "      --own-rows            of step: under --cp keys and latents stay where they are made:\n"
    "                            what a step takes less is what their exchange exposes\n"
    "      --regions             where the time went, after each line\n"
    "      --halves              of step: the same steps once more, and after each line what a\n"
    "                            layer's attention and feed-forward network take by themselves\n"
    "      --sync-check          wait for every operation: --regions then tells its time on a\n"
    "                            GPU, and a failure names it\n"
    "      --peer-kernels WHEN   auto, on or off: exchanges over the GPUs' peer memory, sums with\n"
    "                            on even where NCCL's are faster (default auto)\n"
    "  -h, --help                this text\n";

/* ---- options --------------------------------------------------------------------------------------------------------- */

static tr_status one_int(const char *option, const char *text, int min, int max, int *out,
                         tr_err *err)
{
    char *end = NULL;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < min || value > max)
        return tr_fail(err, TR_E_USAGE, "--%s %s: a whole number from %d to %d is wanted", option,
                       text, min, max);
    *out = (int)value;
    return TR_OK;
}

static tr_status int_list(const char *option, const char *text, int min, int *out, int *n,
                          tr_err *err)
{
    char copy[256], *save = NULL;
    if (strlen(text) >= sizeof copy) return tr_fail(err, TR_E_USAGE, "--%s: too long", option);
    strcpy(copy, text); /* fits: checked above */
    *n = 0;
    for (char *item = strtok_r(copy, ",", &save); item; item = strtok_r(NULL, ",", &save)) {
        if (*n == TR_BENCH_LIST)
            return tr_fail(err, TR_E_USAGE, "--%s: at most %d numbers", option, TR_BENCH_LIST);
        tr_status st = one_int(option, item, min, 1 << 20, &out[*n], err);
        if (st != TR_OK) return st;
        (*n)++;
    }
    return *n > 0 ? TR_OK : tr_fail(err, TR_E_USAGE, "--%s: a number is wanted", option);
}

enum {
    O_CONTEXT = 256,
    O_SEQUENCES,
    O_PREFILL,
    O_STEPS,
    O_THREADS,
    O_ISA,
    O_KV,
    O_LOAD,
    O_OVERRIDE,
    O_SEED,
    O_REGIONS,
    O_HALVES,
    O_ONLY,
    O_CHUNK,
    O_DEVICE,
    O_PREFILL_AT,
    O_SYNC_CHECK,
    O_PEER_KERNELS,
    O_PAIRS,
    O_PROFILE,
    O_TP,
    O_PP,
    O_DP,
    O_CP,
    O_EP,
    O_MOE_TP,
    O_PP_LAYERS,
    O_CP_MODE,
    O_NO_OVERLAP,
    O_OWN_ROWS
};

/* One of the grid's sizes. */
static tr_status rank_option(const char *option, const char *arg, int64_t *out, tr_err *err)
{
    int n = 0;
    tr_status st = one_int(option, arg, 1, TR_RANKS_MAX, &n, err);
    *out = n;
    return st;
}

static tr_status grid_option(int c, const char *arg, tr_rank_options *o, tr_err *err)
{
    switch (c) {
    case O_TP:
        return rank_option("tp", arg, &o->tp, err);
    case O_PP:
        return rank_option("pp", arg, &o->pp, err);
    case O_DP:
        return rank_option("dp", arg, &o->dp, err);
    case O_CP:
        return rank_option("cp", arg, &o->cp, err);
    case O_EP:
        return rank_option("ep", arg, &o->ep, err);
    case O_MOE_TP:
        return rank_option("moe-tp", arg, &o->moe_tp, err);
    case O_PP_LAYERS:
        o->pp_layers = arg;
        return TR_OK;
    case O_CP_MODE:
        o->cp_mode = arg;
        if (strcmp(arg, "round-robin-split") == 0 || strcmp(arg, "in-seq-split") == 0) return TR_OK;
        return tr_fail(err, TR_E_USAGE, "--cp-mode %s: round-robin-split or in-seq-split is wanted",
                       arg);
    default:
        return tr_fail(err, TR_E_USAGE, "bench: unknown option; see trireme bench --help");
    }
}

static tr_status one_option(int c, const char *arg, tr_bench_options *o, const char **overrides,
                            tr_err *err)
{
    int seed;
    tr_status st;
    switch (c) {
    case 'm':
        o->open.model_dir = arg;
        return TR_OK;
    case O_CONTEXT:
        return int_list("context", arg, 1, o->context, &o->n_contexts, err);
    case O_SEQUENCES:
        return int_list("sequences", arg, 1, o->sequences, &o->n_sequences, err);
    case O_PREFILL:
        return int_list("prefill", arg, 0, o->prefill, &o->n_prefill, err);
    case O_PREFILL_AT:
        return int_list("prefill-at", arg, 0, o->before, &o->n_before, err);
    case O_STEPS:
        return one_int("steps", arg, 1, 100000, &o->steps, err);
    case O_THREADS:
        return one_int("threads", arg, 1, 1024, &o->open.n_threads, err);
    case O_ISA:
        o->open.isa = arg;
        return TR_OK;
    case O_KV:
        return tr_open_kv_dtype(&o->kv_dtype, arg, err);
    case O_LOAD:
        if (strcmp(arg, "dummy") != 0 && strcmp(arg, "safetensors") != 0)
            return tr_fail(err, TR_E_USAGE, "--load-format %s: safetensors or dummy is wanted",
                           arg);
        o->open.load_format = strcmp(arg, "dummy") == 0 ? TR_LOAD_DUMMY : TR_LOAD_SAFETENSORS;
        return TR_OK;
    case O_PEER_KERNELS:
        if (strcmp(arg, "auto") != 0 && strcmp(arg, "on") != 0 && strcmp(arg, "off") != 0)
            return tr_fail(err, TR_E_USAGE, "--peer-kernels %s: auto, on or off is wanted", arg);
        o->open.peer_kernels = arg;
        return TR_OK;
    case O_OVERRIDE:
        overrides[o->open.n_overrides++] = arg;
        return TR_OK;
    case O_SEED:
        st = one_int("seed", arg, 0, 1 << 30, &seed, err);
        if (st == TR_OK) o->open.seed = (uint64_t)seed;
        return st;
    case O_ONLY:
        o->only = arg;
        return TR_OK;
    case O_CHUNK:
        return one_int("chunk", arg, 1, 1 << 16, &o->chunk, err);
    case O_DEVICE:
        if (strcmp(arg, "auto") != 0 && strcmp(arg, "cpu") != 0 && strcmp(arg, "cuda") != 0)
            return tr_fail(err, TR_E_USAGE, "--device %s: auto, cpu or cuda is wanted", arg);
        o->open.device = arg;
        return TR_OK;
    case O_PAIRS:
        return one_int("pairs", arg, 1, 10000, &o->pairs, err);
    case O_PROFILE:
        o->profile = arg;
        return TR_OK;
    case O_SYNC_CHECK:
        o->sync_check = true;
        return TR_OK;
    case O_NO_OVERLAP:
        o->no_overlap = true;
        return TR_OK;
    case O_HALVES:
        o->halves = true;
        return TR_OK;
    case O_OWN_ROWS:
        o->own_rows = true;
        return TR_OK;
    case O_REGIONS:
        o->regions = true;
        return TR_OK;
    default:
        return grid_option(c, arg, &o->open.ranks, err);
    }
}

static bool has_grid(const tr_rank_options *o)
{
    return o->tp || o->pp || o->dp || o->cp || o->ep || o->moe_tp || o->pp_layers || o->cp_mode;
}

/* overrides: room for argc strings. *help: --help was given. */
static tr_status parse(int argc, char **argv, tr_bench_options *o, const char **overrides,
                       bool *help, tr_err *err)
{
    static const struct option table[] = {
        {"model", required_argument, NULL, 'm'},
        {"context", required_argument, NULL, O_CONTEXT},
        {"sequences", required_argument, NULL, O_SEQUENCES},
        {"prefill", required_argument, NULL, O_PREFILL},
        {"prefill-at", required_argument, NULL, O_PREFILL_AT},
        {"steps", required_argument, NULL, O_STEPS},
        {"threads", required_argument, NULL, O_THREADS},
        {"isa", required_argument, NULL, O_ISA},
        {"kv-dtype", required_argument, NULL, O_KV},
        {"load-format", required_argument, NULL, O_LOAD},
        {"override", required_argument, NULL, O_OVERRIDE},
        {"seed", required_argument, NULL, O_SEED},
        {"only", required_argument, NULL, O_ONLY},
        {"chunk", required_argument, NULL, O_CHUNK},
        {"regions", no_argument, NULL, O_REGIONS},
        {"halves", no_argument, NULL, O_HALVES},
        {"device", required_argument, NULL, O_DEVICE},
        {"sync-check", no_argument, NULL, O_SYNC_CHECK},
        {"peer-kernels", required_argument, NULL, O_PEER_KERNELS},
        {"pairs", required_argument, NULL, O_PAIRS},
        {"profile", required_argument, NULL, O_PROFILE},
        {"tp", required_argument, NULL, O_TP},
        {"pp", required_argument, NULL, O_PP},
        {"dp", required_argument, NULL, O_DP},
        {"cp", required_argument, NULL, O_CP},
        {"ep", required_argument, NULL, O_EP},
        {"moe-tp", required_argument, NULL, O_MOE_TP},
        {"pp-layers", required_argument, NULL, O_PP_LAYERS},
        {"cp-mode", required_argument, NULL, O_CP_MODE},
        {"no-overlap", no_argument, NULL, O_NO_OVERLAP},
        {"own-rows", no_argument, NULL, O_OWN_ROWS},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int c;
    *o = (tr_bench_options){.context = {1000},
                            .n_contexts = 1,
                            .sequences = {1, 16},
                            .n_sequences = 2,
                            .prefill = {512},
                            .n_prefill = 1,
                            .n_before = 1,
                            .steps = 64,
                            .pairs = 10,
                            .chunk = 512,
                            .kv_dtype = TR_E4M3,
                            .open = {.overrides = overrides}};
    *help = false;
    opterr = 0;
    optind = 1;
    while ((c = getopt_long(argc, argv, "m:h", table, NULL)) != -1) {
        if (c == 'h') {
            *help = true;
            return TR_OK;
        }
        tr_status st = one_option(c, optarg, o, overrides, err);
        if (st != TR_OK) return st;
    }
    if (optind + 1 < argc)
        return tr_fail(err, TR_E_USAGE, "bench %s: %s is left over; see trireme bench --help",
                       argv[optind], argv[optind + 1]);
    const char *what = optind < argc ? argv[optind] : "";
    if (strcmp(what, "kernels") == 0)
        o->what = TR_BENCH_KERNELS;
    else if (strcmp(what, "step") == 0)
        o->what = TR_BENCH_STEP;
    else if (strcmp(what, "load") == 0)
        o->what = TR_BENCH_LOAD;
    else if (strcmp(what, "profile") == 0)
        o->what = TR_BENCH_PROFILE;
    else if (strcmp(what, "watchdog") == 0)
        o->what = TR_BENCH_WATCHDOG;
    else
        return tr_fail(err, TR_E_USAGE,
                       "bench: say what: kernels, step, load, profile, watchdog or comm; see "
                       "trireme bench --help");
    if (o->profile && o->what != TR_BENCH_STEP && o->what != TR_BENCH_PROFILE)
        return tr_fail(err, TR_E_USAGE, "--profile: an option of bench step and bench profile");
    if (o->halves && (o->what != TR_BENCH_STEP || o->profile))
        return tr_fail(err, TR_E_USAGE, "--halves: an option of bench step%s",
                       o->profile ? ", without --profile" : "");
    if (o->profile && !*o->profile) return tr_fail(err, TR_E_USAGE, "--profile: a file is wanted");
    if ((has_grid(&o->open.ranks) || o->no_overlap) && o->what != TR_BENCH_STEP &&
        o->what != TR_BENCH_WATCHDOG)
        return tr_fail(err, TR_E_USAGE,
                       "bench %s: --tp and the like are options of bench step and watchdog", what);
    if (o->own_rows && o->what != TR_BENCH_STEP)
        return tr_fail(err, TR_E_USAGE, "--own-rows: an option of bench step");
    if (o->only && o->what != TR_BENCH_KERNELS)
        return tr_fail(err, TR_E_USAGE, "--only: an option of bench kernels");
    if (!o->open.model_dir && o->what != TR_BENCH_KERNELS)
        return tr_fail(err, TR_E_USAGE, "bench %s: -m MODEL is missing", what);
    return o->profile ? tr_apart_replaced("--profile", o->profile, err) : TR_OK;
}

/* ---- the command ------------------------------------------------------------------------------------------------------- */

tr_status tr_command_bench(int argc, char **argv, tr_err *err)
{
    if (argc > 1 && strcmp(argv[1], "comm") == 0) return tr_bench_comm(argc - 1, argv + 1, err);
    tr_bench_options options;
    bool help;
    const char **overrides = tr_calloc((size_t)argc, sizeof *overrides);
    if (!overrides) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_status st = parse(argc, argv, &options, overrides, &help, err);
    if (st == TR_OK && help)
        fputs(help_text, stdout);
    else if (st == TR_OK)
        st = options.what == TR_BENCH_KERNELS    ? tr_bench_kernels(&options, err)
             : options.what == TR_BENCH_LOAD     ? tr_bench_load(&options, err)
             : options.what == TR_BENCH_PROFILE  ? tr_bench_profile(&options, err)
             : options.what == TR_BENCH_WATCHDOG ? tr_bench_watchdog(&options, err)
                                                 : tr_bench_step(&options, err);
    free(overrides);
    return st;
}
