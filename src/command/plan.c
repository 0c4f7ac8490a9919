/* trireme plan: what each rank of a job would hold, send and take. Needs config.json and nothing else: no GPU, no launcher. */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command/command.h"
#include "command/forecast.h"
#include "command/open.h"
#include "command/options.h"

typedef struct plan_options {
    bool help, json;
    const char *model, *kv_dtype, *gpu;
    tr_option_list overrides;
    int64_t n_ranks, max_model_len, max_batch_tokens, max_sequences;
    tr_rank_options ranks;
} plan_options;

#define AT(field) offsetof(plan_options, field)

/* clang-format off */
static const tr_option table[] = {
    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Model"},
    {"model", 'm', TR_OPTION_TEXT, AT(model), 0, 0, "DIR", NULL, "folder with config.json"},
    {"kv-dtype", 0, TR_OPTION_CHOICE, AT(kv_dtype), 0, 0, "TYPE", "fp8|bf16|f32",
     "number format of the caches: fp8, bf16 or f32 (default fp8)"},
    {"max-model-len", 0, TR_OPTION_INT, AT(max_model_len), 2, INT32_MAX, "N", NULL,
     "prompt and answer together, in tokens (default: what the model allows, at most 16384)"},
    {"override", 0, TR_OPTION_LIST, AT(overrides), 0, 0, "KEY=VALUE", NULL,
     "put a number into config.json; may be repeated"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Ranks"},
    {"ranks", 0, TR_OPTION_INT, AT(n_ranks), 1, TR_RANKS_MAX, "N", NULL, "ranks of the job, one per GPU"},
    TR_RANK_OPTIONS(plan_options, ranks),
    {"gpu", 0, TR_OPTION_CHOICE, AT(gpu), 0, 0, "NAME", "h200|none",
     "h200, or none: the CPU's number formats, no times (default h200)"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Engine"},
    {"max-batch-tokens", 0, TR_OPTION_INT, AT(max_batch_tokens), 1, 1 << 20, "N", NULL,
     "prompt tokens of one step of a replica, at most (default 1024)"},
    {"max-sequences", 0, TR_OPTION_INT, AT(max_sequences), 1, 4096, "N", NULL,
     "answers a replica generates at the same time, at most (default 32)"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Output"},
    {"json", 0, TR_OPTION_FLAG, AT(json), 0, 0, NULL, NULL, "one JSON object instead of the table"},
    {"help", 'h', TR_OPTION_FLAG, AT(help), 0, 0, NULL, NULL, "this text"},
};
/* clang-format on */

enum { N_TABLE = sizeof table / sizeof *table, LEN_DEFAULT = 16384 };

static tr_status parse(plan_options *o, int argc, char **argv, tr_err *err)
{
    int rest = 0;
    *o = (plan_options){
        .kv_dtype = "fp8", .gpu = "h200", .max_batch_tokens = 1024, .max_sequences = 32};
    tr_status st = tr_options_parse(table, N_TABLE, o, argc, argv, &rest, err);
    if (st != TR_OK || o->help) return st;
    if (rest < argc)
        return tr_fail(err, TR_E_USAGE, "%s: an argument that belongs to no option", argv[rest]);
    if (!o->model || !*o->model) return tr_fail(err, TR_E_USAGE, "-m MODEL is missing");
    if (!o->n_ranks) return tr_fail(err, TR_E_USAGE, "--ranks N is missing");
    return TR_OK;
}

static void help(FILE *out)
{
    fputs("Usage: trireme plan -m MODEL --ranks N [options]\n"
          "\n"
          "What each rank would hold, send and take, and why the grid is what it is.\n"
          "Needs config.json alone: no weights, no GPU, no launcher.\n",
          out);
    tr_options_help(out, table, N_TABLE);
}

static tr_status lengths(const plan_options *o, const tr_config *c, tr_forecast_options *f,
                         tr_err *err)
{
    const int most = c->max_position_embeddings;
    if (o->max_model_len > most)
        return tr_fail(err, TR_E_USAGE, "--max-model-len %jd: the model allows %d tokens",
                       (intmax_t)o->max_model_len, most);
    f->max_model_len = o->max_model_len     ? (int)o->max_model_len
                       : most < LEN_DEFAULT ? most
                                            : LEN_DEFAULT;
    f->max_batch_tokens = (int)o->max_batch_tokens;
    f->max_sequences = (int)o->max_sequences;
    return tr_open_kv_dtype(&f->kv_dtype, o->kv_dtype, err);
}

static tr_status plan(const plan_options *o, tr_err *err)
{
    tr_forecast_options options = {.model = o->model,
                                   .world = (int)o->n_ranks,
                                   .rates = tr_rates_find(o->gpu),
                                   .kv_name = o->kv_dtype};
    tr_ranks ranks = {0};
    tr_forecast forecast = {0};
    tr_config config;

    tr_status st = tr_config_load(&config, o->model, o->overrides.s, o->overrides.n, err);
    if (st == TR_OK) st = lengths(o, &config, &options, err);
    if (st == TR_OK) st = tr_ranks_choose(&ranks, &o->ranks, &config, options.world, err);
    if (st == TR_OK) st = tr_forecast_make(&forecast, &config, &ranks, &options, err);
    if (st == TR_OK && o->json)
        st = tr_forecast_json(stdout, &forecast, err);
    else if (st == TR_OK)
        tr_forecast_print(stdout, &forecast);
    tr_forecast_free(&forecast);
    tr_ranks_free(&ranks);
    return st;
}

tr_status tr_command_plan(int argc, char **argv, tr_err *err)
{
    plan_options options;
    tr_status st = parse(&options, argc, argv, err);

    if (st == TR_OK && options.help)
        help(stdout);
    else if (st == TR_OK)
        st = plan(&options, err);
    if (st == TR_OK && (fflush(stdout) != 0 || ferror(stdout)))
        st = tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno));
    return st;
}
