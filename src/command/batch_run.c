#include <config.h>

#include "command/batch_run.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/json.h"
#include "base/size.h"
#include "base/stop.h"
#include "batch/job.h"
#include "command/apart.h"
#include "command/batch_profile.h"
#include "command/budget.h"
#include "command/open.h"
#include "model/estimate.h"

enum { MODEL_LEN_MAX = 16384, SMALL_FILE_MAX = 16 << 20, N_FIELDS = 24, FIELD_MAX = 96 };
enum { TERM_GRACE_S = 5 }; /* Slurm's KillWait is 30 s (parallel.md 10.3) */

struct tr_run {
    const tr_batch_options *o;
    tr_world *world;
    bool leads;    /* rank 0 */
    int *reporter; /* [dp] */
    tr_watchdog *watchdog;
    tr_log *log;
    tr_input *input; /* NULL with --prompt */
    tr_journal *journal;
    tr_saved *saved;
    tr_open_options open;
    tr_opened opened;
    tr_dtype kv_dtype;
    tr_tokenizer *tokenizer; /* NULL: the folder has none */
    tr_request_options request;
    int32_t eos, bos, pad;
    int max_model_len;
    char *model_name;
    tr_engine *engine;
    tr_run_profile *profile; /* NULL: not asked for */
};

/* ---- the model folder's small files ---------------------------------------------------------- */

/* NAME of the model folder as JSON, or *out NULL where it does not exist. */
static tr_status load_small(const tr_run *run, const char *name, json_t **out, tr_err *err)
{
    char *path = NULL;
    tr_status st = TR_OK;

    *out = NULL;
    if (asprintf(&path, "%s/%s", run->o->model, name) < 0)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    if (access(path, F_OK) == 0 || errno != ENOENT)
        st = tr_json_load(out, path, SMALL_FILE_MAX, err);
    free(path);
    return st;
}

static tr_status add_eos(tr_run *run, const json_t *id, tr_err *err)
{
    tr_request_options *r = &run->request;
    json_int_t v = json_is_integer(id) ? json_integer_value(id) : -1;

    if (v < 0 || v >= run->opened.config.vocab_size)
        return tr_fail(err, TR_E_INPUT, "generation_config.json: eos_token_id is not a token id");
    if (v == run->eos) return TR_OK;
    if (r->n_extra_eos == TR_EXTRA_EOS_MAX)
        return tr_fail(err, TR_E_INPUT, "generation_config.json: eos_token_id has more than %d ids",
                       TR_EXTRA_EOS_MAX + 1);
    r->extra_eos[r->n_extra_eos++] = (int32_t)v;
    return TR_OK;
}

/* Sampling defaults (chat.md 4.2) and the ids that end an answer. */
static tr_status read_generation(tr_run *run, tr_err *err)
{
    tr_sampling_defaults *d = &run->request.defaults;
    int64_t top_k = 0;
    json_t *j = NULL;

    *d = (tr_sampling_defaults){
        .temperature = 1, .top_p = 1, .min_p = 0, .repetition = 1, .top_k = 0};
    tr_status st = load_small(run, "generation_config.json", &j, err);
    if (st != TR_OK || !j) return st;
    st = tr_json_double(j, "temperature", 0, 2, &d->temperature, err);
    if (st == TR_OK) st = tr_json_double(j, "top_p", 1e-6, 1, &d->top_p, err);
    if (st == TR_OK) st = tr_json_double(j, "min_p", 0, 1, &d->min_p, err);
    if (st == TR_OK) st = tr_json_double(j, "repetition_penalty", 1e-6, 2, &d->repetition, err);
    if (st == TR_OK) st = tr_json_int(j, "top_k", -1, INT32_MAX, &top_k, err);
    if (st != TR_OK) tr_within(err, "generation_config.json");
    d->top_k = (int)top_k;
    const json_t *eos = json_object_get(j, "eos_token_id");
    if (st == TR_OK && json_is_array(eos)) {
        for (size_t i = 0; st == TR_OK && i < json_array_size(eos); i++)
            st = add_eos(run, json_array_get(eos, i), err);
    } else if (st == TR_OK && eos && !json_is_null(eos)) {
        st = add_eos(run, eos, err);
    }
    json_decref(j);
    return st;
}

static tr_status choose_chat_format(tr_run *run, tr_err *err)
{
    tr_chat_options *c = &run->request.chat;
    const char *name = run->o->chat_format;

    c->default_thinking = run->o->default_thinking;
    c->thinking_only = run->o->thinking_only;
    c->allow_tools = run->o->allow_tools;
    c->literal_content = run->o->literal_content;
    c->response_format_in_prompt = run->o->response_format_in_prompt;
    c->dsv31_assistant_after_tool = run->o->dsv31_assistant_after_tool;
    c->format = TR_CHAT_NONE;
    if (!run->tokenizer) return TR_OK;
    tr_status st = tr_chat_check_tokenizer(run->tokenizer, err);
    if (st != TR_OK) return st;
    if (!strcmp(name, "auto"))
        return tr_chat_format_detect(&c->format, run->o->model, run->tokenizer, run->log, err);
    c->format = strcmp(name, "dsv31") ? TR_CHAT_DSV32 : TR_CHAT_DSV31;
    return TR_OK;
}

/* Ids by content where there is a tokenizer (chat.md 1.2), else by config.json. */
static tr_status open_tokenizer(tr_run *run, tr_err *err)
{
    char *path = NULL;
    json_t *j = NULL;
    tr_status st = TR_OK;

    run->eos = run->opened.config.eos_token_id;
    run->bos = run->opened.config.bos_token_id;
    run->pad = -1;
    if (asprintf(&path, "%s/tokenizer.json", run->o->model) < 0)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    if (access(path, F_OK) != 0 && errno == ENOENT)
        tr_log_warn(run->log, "%s: there is none: prompts must be token ids, answers have no text",
                    path);
    else
        st = tr_tokenizer_open(&run->tokenizer, path, NULL, run->log, err);
    free(path);
    if (st == TR_OK) st = choose_chat_format(run, err);
    if (st == TR_OK) st = load_small(run, "tokenizer_config.json", &j, err);
    if (st == TR_OK && j) {
        st = tr_json_bool(j, "add_bos_token", &run->request.add_bos, err);
        if (st != TR_OK) tr_within(err, "tokenizer_config.json");
    }
    json_decref(j);
    if (st != TR_OK || !run->tokenizer) return st;
    if (tr_tokenizer_size(run->tokenizer) > run->opened.config.vocab_size)
        return tr_fail(err, TR_E_INPUT,
                       "tokenizer.json has ids up to %d, config.json a vocab_size of %d",
                       tr_tokenizer_size(run->tokenizer) - 1, run->opened.config.vocab_size);
    int32_t eos = tr_tokenizer_added(run->tokenizer, "<｜end▁of▁sentence｜>");
    if (eos != run->eos)
        tr_log_warn(run->log,
                    "config.json has %d as end of sentence, tokenizer.json %d, which is taken",
                    run->eos, eos);
    run->eos = eos;
    run->bos = tr_tokenizer_added(run->tokenizer, "<｜begin▁of▁sentence｜>");
    run->pad = tr_tokenizer_added(run->tokenizer, "<｜▁pad▁｜>");
    return TR_OK;
}

/* Cache pages of a sequence of the greatest length. */
static size_t pages_each(const tr_run *run)
{
    return tr_ceil_div((size_t)run->max_model_len, TR_PAGE_TOKENS) + 1;
}

static tr_status choose_length(tr_run *run, tr_err *err)
{
    int64_t most = run->opened.config.max_position_embeddings, asked = run->o->max_model_len;

    if (asked > most)
        return tr_fail(err, TR_E_USAGE, "--max-model-len %jd: the model has %jd positions",
                       (intmax_t)asked, (intmax_t)most);
    run->max_model_len = (int)(asked ? asked : most < MODEL_LEN_MAX ? most : MODEL_LEN_MAX);
    const size_t cache = (size_t)run->o->max_cache_tokens;
    if (cache && cache / TR_PAGE_TOKENS < pages_each(run))
        return tr_fail(
            err, TR_E_USAGE,
            "--max-cache-tokens %zu: a sequence of %d tokens needs %zu (--max-model-len)", cache,
            run->max_model_len, pages_each(run) * TR_PAGE_TOKENS);
    return TR_OK;
}

/* The last part of the folder's name: what answers call the model. */
static tr_status name_model(tr_run *run, tr_err *err)
{
    char *path = realpath(run->o->model, NULL);
    const char *slash = path ? strrchr(path, '/') : NULL;
    const char *name = slash && slash[1] ? slash + 1 : run->o->model;

    run->model_name = strdup(name);
    free(path);
    return run->model_name ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
}

tr_status tr_run_files(tr_run *run, tr_err *err)
{
    run->open = (tr_open_options){
        .model_dir = run->o->model,
        .overrides = run->o->overrides.s,
        .n_overrides = run->o->overrides.n,
        .load_format = strcmp(run->o->load_format, "dummy") ? TR_LOAD_SAFETENSORS : TR_LOAD_DUMMY,
        .peer_kernels = run->o->peer_kernels,
        .seed = (uint64_t)run->o->seed,
        .device = run->o->device,
        .no_bind = run->o->no_bind,
        .beside = run->o->input && strcmp(run->o->output, "-") ? run->o->output : NULL,
        .world = run->world,
        .ranks = run->o->ranks,
    };
    tr_status st = tr_open_kv_dtype(&run->kv_dtype, run->o->kv_dtype, err);
    if (st == TR_OK) st = tr_open_checkpoint(&run->opened, &run->open, err);
    if (st == TR_OK) st = choose_length(run, err);
    run->open.max_model_len = run->max_model_len;
    run->open.f32_caches = run->kv_dtype == TR_F32;
    if (st == TR_OK) st = open_tokenizer(run, err);
    if (st == TR_OK) st = read_generation(run, err);
    if (st == TR_OK) st = name_model(run, err);
    run->request.tokenizer = run->tokenizer;
    run->request.vocab_size = run->opened.config.vocab_size;
    run->request.max_model_len = run->max_model_len;
    run->request.bos = run->bos;
    run->request.seed = (uint64_t)run->o->seed;
    run->request.strict_params = run->o->strict_params;
    run->request.log = run->log;
    return st;
}

/* ---- what the run was started with ----------------------------------------------------------- */

typedef struct identity {
    tr_run_field field[N_FIELDS];
    char text[N_FIELDS][FIELD_MAX];
    int n;
} identity;

__attribute__((format(printf, 3, 4))) static void add_field(identity *id, const char *name,
                                                            const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(id->text[id->n], FIELD_MAX, fmt, args);
    va_end(args);
    id->field[id->n] = (tr_run_field){name, id->text[id->n]};
    id->n++;
}

/* config.json as it is used, and the shards: their names, sizes and headers. */
static tr_status model_identity(const tr_run *run, char *out, size_t size, tr_err *err)
{
    char *path = NULL, *text = NULL, config_hex[33], shards_hex[33] = "dummy";
    size_t n = 0;

    if (asprintf(&path, "%s/config.json", run->o->model) < 0)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_status st = tr_file_read(path, SMALL_FILE_MAX, &text, &n, err);
    free(path);
    tr_hasher *h = tr_hasher_create();
    if (st == TR_OK && !h) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    if (st == TR_OK) {
        tr_hasher_add(h, text, n);
        for (int i = 0; i < run->o->overrides.n; i++)
            tr_hasher_add(h, run->o->overrides.s[i], strlen(run->o->overrides.s[i]) + 1);
        tr_hasher_hex(h, config_hex);
        if (run->opened.checkpoint) tr_checkpoint_identity(run->opened.checkpoint, shards_hex);
        snprintf(out, size, "%s-%s", shards_hex, config_hex);
    }
    tr_hasher_free(h);
    free(text);
    return st;
}

/* Everything a record may depend on; not grid, device and sizes of steps (reliability.md 3). */
static tr_status make_identity(const tr_run *run, identity *id, tr_err *err)
{
    static const char *const formats[] = {"none", "dsv32", "dsv31"};
    const tr_input_info *in = tr_input_about(run->input);
    const tr_sampling_defaults *d = &run->request.defaults;
    const tr_chat_options *c = &run->request.chat;
    char model[80], eos[80] = "";
    size_t n = 0;

    tr_status st = model_identity(run, model, sizeof model, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < run->request.n_extra_eos; i++)
        n += (size_t)snprintf(eos + n, sizeof eos - n, ",%d", run->request.extra_eos[i]);
    id->n = 0;
    add_field(id, "version", "%s", PACKAGE_VERSION);
    add_field(id, "input", "%s", in->hash);
    add_field(id, "input_bytes", "%ju", (uintmax_t)in->bytes);
    add_field(id, "model", "%s", model);
    add_field(id, "tokenizer", "%s",
              run->tokenizer ? tr_tokenizer_identity(run->tokenizer) : "none");
    add_field(id, "kv_dtype", "%s", run->o->kv_dtype);
    add_field(id, "max_model_len", "%d", run->max_model_len);
    add_field(id, "shard", "%ju/%ju", (uintmax_t)run->o->shard.i, (uintmax_t)run->o->shard.n);
    add_field(id, "seed", "%jd", (intmax_t)run->o->seed);
    add_field(id, "temperature", "%.9g", d->temperature);
    add_field(id, "top_p", "%.9g", d->top_p);
    add_field(id, "top_k", "%d", d->top_k);
    add_field(id, "min_p", "%.9g", d->min_p);
    add_field(id, "repetition_penalty", "%.9g", d->repetition);
    add_field(id, "end_tokens", "%d%s", run->eos, eos);
    add_field(id, "chat_format", "%s%s", formats[c->format],
              run->request.add_bos ? ", add_bos_token" : "");
    add_field(id, "text_options", "%s%s%s%s%s%s%s", c->default_thinking ? "default-thinking " : "",
              c->thinking_only ? "thinking-only " : "", c->allow_tools ? "allow-tools " : "",
              c->literal_content ? "literal " : "",
              c->response_format_in_prompt ? "format-in-prompt " : "",
              c->dsv31_assistant_after_tool ? "assistant-after-tool " : "",
              run->o->strict_params ? "strict" : "");
    return TR_OK;
}

/* "16,16,16,13", or its hash where that is too long. */
static tr_status stage_layers(const tr_run *run, char *out, tr_err *err)
{
    const tr_ranks *ranks = &run->opened.ranks;
    const int pp = ranks->sizes.pp;
    int n = 0;

    for (int i = 0; i < pp && n < FIELD_MAX; i++)
        n += snprintf(out + n, (size_t)(FIELD_MAX - n), "%s%d", i ? "," : "",
                      ranks->stage_layers[i]);
    if (n < FIELD_MAX) return TR_OK;
    tr_hasher *h = tr_hasher_create();
    if (!h) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_hasher_add(h, ranks->stage_layers, (size_t)pp * sizeof *ranks->stage_layers);
    tr_hasher_hex(h, out);
    tr_hasher_free(h);
    return TR_OK;
}

/* Of what is too long the end: that is where names of files differ. */
static void add_text(identity *id, const char *name, const char *text)
{
    const size_t n = text ? strlen(text) : 0;

    if (n < FIELD_MAX)
        add_field(id, name, "%s", text ? text : "none");
    else
        add_field(id, name, "..%s", text + n + 3 - FIELD_MAX);
}

/* Everything in which ranks of one job must not differ. */
static tr_status make_alike(const tr_run *run, identity *id, tr_err *err)
{
    const tr_batch_options *o = run->o;
    const tr_grid_sizes *g = &run->opened.ranks.sizes;
    char model[80], layers[FIELD_MAX];

    id->n = 0;
    tr_status st = model_identity(run, model, sizeof model, err);
    if (st == TR_OK) st = stage_layers(run, layers, err);
    if (st != TR_OK) return st;
    /* Only rank 0's are read and written: processes that were meant to be jobs of their own would leave theirs undone. */
    add_field(id, "--shard", "%ju/%ju", (uintmax_t)o->shard.i, (uintmax_t)o->shard.n);
    add_text(id, "-i", o->input);
    add_text(id, "-o", o->output);
    add_text(id, "--prompt", o->prompt);
    add_field(id, "version", "%s", PACKAGE_VERSION);
    add_field(id, "process grid", "pp %d dp %d cp %d tp %d ep %d moe-tp %d", g->pp, g->dp, g->cp,
              g->tp, g->ep, g->xt);
    add_field(id, "layers of the stages", "%s", layers);
    add_field(id, "--cp-mode", "%s",
              run->opened.ranks.cp_mode == TR_CP_ZIGZAG ? "in-seq-split" : "round-robin-split");
    add_field(id, "model", "%s", model);
    add_field(id, "tokenizer", "%s",
              run->tokenizer ? tr_tokenizer_identity(run->tokenizer) : "none");
    add_field(id, "--load-format", "%s", o->load_format);
    add_field(id, "--seed", "%jd", (intmax_t)o->seed);
    add_field(id, "--kv-dtype", "%s", o->kv_dtype);
    add_field(id, "--max-model-len", "%d", run->max_model_len);
    add_field(id, "--max-batch-tokens", "%jd", (intmax_t)o->max_batch_tokens);
    add_field(id, "--max-sequences", "%jd", (intmax_t)o->max_sequences);
    add_field(id, "--no-overlap", "%s", o->no_overlap ? "on" : "off");
    add_field(id, "--sync-check", "%s", o->sync_check ? "on" : "off");
    add_field(id, "--peer-kernels", "%s", o->peer_kernels ? o->peer_kernels : "auto");
    add_field(id, "--profile", "%s", o->profile ? "on" : "off");
    add_field(id, "--profile-files", "%s", o->profile_files ? o->profile_files : "auto");
    /* These decide which collectives a rank takes part in. */
    add_field(id, "--device", "%s", o->device);
    add_field(id, "--no-bind", "%s", o->no_bind ? "on" : "off");
    add_field(id, "--step-timeout", "%s", o->step_timeout ? "on" : "0");
    return TR_OK;
}

/* Ranks that were started in another way would compute something else, or wait for the others for ever (reliability.md 4, row 20).
 * Collective, also for a rank that fails in here. */
tr_status tr_run_alike(tr_run *run, tr_err *err)
{
    identity mine = {.n = 0}, first;
    tr_err later;

    if (run->world->size == 1) return TR_OK;
    tr_status st = make_alike(run, &mine, err);
    memcpy(first.text, mine.text, sizeof first.text);
    tr_status told =
        tr_world_tell(run->world, first.text, (int)sizeof first.text, st == TR_OK ? err : &later);
    if (st != TR_OK || told != TR_OK) return st != TR_OK ? st : told;
    for (int i = 0; i < mine.n; i++)
        if (strncmp(mine.text[i], first.text[i], FIELD_MAX) != 0)
            return tr_fail(err, TR_E_USAGE, "started with another %s than rank 0: %s, not %.*s",
                           mine.field[i].name, mine.text[i], FIELD_MAX - 1, first.text[i]);
    return TR_OK;
}

tr_status tr_run_journal(tr_run *run, tr_err *err)
{
    identity id;
    if (!run->input) return TR_OK; /* --prompt, or a follower */
    if (!strcmp(run->o->output, "-"))
        return tr_journal_stream(&run->journal, STDOUT_FILENO, "standard output", err);
    tr_status st = make_identity(run, &id, err);
    if (st != TR_OK) return st;
    const tr_journal_options o = {
        .run = {.out_path = run->o->output,
                .field = id.field,
                .n_fields = id.n,
                .must_exist = run->o->resume,
                .log = run->log},
        .input_hash = tr_input_about(run->input)->hash,
        /* A disk that stays full must not keep tokens from being saved in time. */
        .end_ns = run->o->end_ns ? run->o->end_ns - (uint64_t)(run->o->margin_s * 1e9) : 0,
    };
    st = tr_journal_open(&run->journal, &o, err);
    if (st != TR_OK) return st;
    const tr_saved_options saved = {
        .out_path = run->o->output, .field = id.field, .n_fields = id.n, .log = run->log};
    st = tr_saved_open(&run->saved, &saved, err);
    if (st == TR_OK && tr_saved_count(run->saved))
        tr_log_info(run->log, "%s.saved: %zu requests have saved tokens", run->o->output,
                    tr_saved_count(run->saved));
    return st;
}

/* ---- the model ------------------------------------------------------------------------------- */

/* Pages that the largest load can use, or those that the user allows. */
static size_t pages_wanted(const tr_run *run)
{
    const size_t all = pages_each(run) * (size_t)run->o->max_sequences; /* 2^31/64 * 4096 fits */
    const size_t allowed = (size_t)run->o->max_cache_tokens / TR_PAGE_TOKENS;
    return allowed && allowed < all ? allowed : all;
}

/* Bytes. plan counts with 6 GB, CUDA's context among them (forecast.c). */
static const uint64_t device_reserve = UINT64_C(4) << 30;

/* What a rank's caches may take of the `left` bytes that weights and workspace have left. A device's memory is this rank's alone: all
 * of it but what the steps' records (CUDA graphs) and NCCL's buffers need. The host's is its ranks', whose workspaces do not count as
 * taken before they are touched, and its page cache's. */
static uint64_t cache_share(uint64_t left, bool device, int local_size)
{
    const uint64_t reserve = left / 8 < device_reserve ? left / 8 : device_reserve;
    return device ? left - reserve : left / 2 / (uint64_t)local_size;
}

/* Cache pages: what is wanted, as far as there is room. */
static tr_status pages_that_fit(const tr_run *run, int *n_pages, tr_err *err)
{
    const size_t page =
        tr_cache_page_bytes(&run->opened.config, run->opened.slice.layers.n, run->kv_dtype);
    const size_t each = pages_each(run), want = pages_wanted(run);
    const uint64_t device = run->opened.ops->memory_left(run->opened.device),
                   left = device ? device : tr_memory_available();
    const uint64_t room = cache_share(left, device > 0, run->world->local_size);
    const size_t fit = left == UINT64_MAX || room / page > want ? want : (size_t)(room / page);

    if (fit < each)
        return tr_fail(err, TR_E_MEMORY,
                       "%.1f GB for the cache do not hold one sequence of %d tokens (%.1f GB): "
                       "lower --max-model-len or "
                       "--kv-dtype",
                       (double)room / 1e9, run->max_model_len, (double)each * (double)page / 1e9);
    *n_pages = fit > INT32_MAX ? INT32_MAX : (int)fit;
    return TR_OK;
}

/* Every rank has the same pages, so that one page table serves all: the fewest that fit anywhere (tr_model_options.choose_pages).
 * Collective, also for a rank that has failed. */
static tr_status choose_pages(void *ctx, tr_status so_far, int *n_pages, tr_err *err)
{
    const tr_run *run = ctx;
    const tr_status st = so_far == TR_OK ? pages_that_fit(run, n_pages, err) : so_far;
    uint64_t missing = INT32_MAX - (uint64_t)*n_pages;
    tr_err later;

    if (run->world->size == 1) return st;
    const tr_status agreed =
        tr_comm_max_word(run->opened.control, &missing, st == TR_OK ? err : &later);
    if (st != TR_OK || agreed != TR_OK) return st != TR_OK ? st : agreed;
    *n_pages = (int)(INT32_MAX - missing);
    return *n_pages ? TR_OK : tr_fail(err, TR_E_MEMORY, "another rank has no room for the cache");
}

void tr_run_budget(const tr_run *run)
{
    const tr_opened *o = &run->opened;
    if (!run->model_name) return; /* the model's files have not been read */
    const size_t page = tr_cache_page_bytes(&o->config, o->slice.layers.n, run->kv_dtype);
    const char *name = o->device_name ? o->device_name : run->o->device; /* before it is open */
    const bool gpu = strcmp(o->ops ? o->ops->name : name, "cpu") != 0;
    const uint64_t device = o->device ? o->ops->memory_left(o->device) : 0;
    tr_weight_bytes weights;

    tr_estimate_weights(&weights, &o->config, &o->slice);
    const tr_budget budget = {
        .rank = run->world->rank,
        .host = run->world->host,
        .device = o->device ? tr_device_describe(o->device) : name,
        .weights = tr_weight_bytes_total(&weights),
        .workspace = tr_estimate_workspace(&o->config, &o->slice,
                                           (int)(run->o->max_batch_tokens + run->o->max_sequences),
                                           run->max_model_len, gpu ? 2 : 4),
        .cache_least = (uint64_t)pages_each(run) * page,
        .cache_whole = (uint64_t)pages_wanted(run) * page,
        .left = device ? device
                : gpu  ? UINT64_MAX
                       : tr_memory_available(),
        .max_batch_tokens = (int)run->o->max_batch_tokens,
        .max_sequences = (int)run->o->max_sequences,
        .max_model_len = run->max_model_len,
        .kv_dtype = run->o->kv_dtype,
    };
    tr_budget_print(&budget, run->log);
}

tr_status tr_run_model(tr_run *run, tr_err *err)
{
    const tr_config *c = &run->opened.config;
    uint32_t *has_token = NULL;

    if (run->tokenizer) {
        has_token = tr_calloc(tr_ceil_div((size_t)c->vocab_size, 32), sizeof *has_token);
        if (!has_token) { /* the others ask for its pages */
            int none = 0;
            return choose_pages(run, tr_fail(err, TR_E_MEMORY, "out of memory"), &none, err);
        }
        tr_tokenizer_mask(run->tokenizer, c->vocab_size, has_token);
    }
    const tr_model_options options = {
        .kv_dtype = run->kv_dtype,
        .max_rows = (int)(run->o->max_batch_tokens + run->o->max_sequences),
        .n_slots = (int)run->o->max_sequences,
        .max_model_len = run->max_model_len,
        .choose_pages = choose_pages,
        .choose_ctx = run,
        .cp_mode = run->opened.ranks.cp_mode,
        .no_overlap = run->o->no_overlap,
        .sync_check = run->o->sync_check,
        .find_not_finite = run->o->sync_check,
    };
    const tr_status st = tr_open_model(&run->opened, &options, has_token, err);
    free(has_token);
    if (st != TR_OK) return st;
    tr_log_info(run->log,
                "%s: %d layers, %.2f GB of weights; cache %s, %.2f GB, %d tokens; context %d; %jd "
                "sequences; %s",
                run->model_name, c->num_hidden_layers, (double)run->opened.weights->bytes / 1e9,
                run->o->kv_dtype, (double)tr_model_cache_bytes(run->opened.model) / 1e9,
                tr_model_limits(run->opened.model).n_pages * TR_PAGE_TOKENS, run->max_model_len,
                (intmax_t)run->o->max_sequences, tr_device_describe(run->opened.device));
    return TR_OK;
}

/* Of each replica the rank that has a step's results first: the last stage's, or the leader itself. */
static tr_status find_reporters(tr_run *run, tr_err *err)
{
    const tr_grid_sizes *n = &run->opened.grid.size;
    const int stage = n->dp * n->cp * n->tp;

    run->reporter = tr_calloc((size_t)n->dp, sizeof *run->reporter);
    if (!run->reporter) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int d = 0; d < n->dp; d++)
        run->reporter[d] = (n->pp - 1) * stage + d * n->cp * n->tp;
    return TR_OK;
}

tr_status tr_run_engine(tr_run *run, tr_err *err)
{
    const tr_grid *grid = &run->opened.grid;
    tr_status st = find_reporters(run, err);
    const tr_engine_options options = {
        .max_batch_tokens = (int)run->o->max_batch_tokens,
        .max_sequences = (int)run->o->max_sequences,
        .max_model_len = run->max_model_len,
        .ring = run->o->no_overlap ? 1 : 2,
        .no_prefix_cache = run->o->no_prefix_cache,
        .eos = run->eos,
        .bos = run->bos,
        .pad = run->pad,
        .is_leader = run->leads,
        .n_replicas = grid->size.dp,
        .i_replica = grid->at.dp,
        .n_stages = grid->size.pp,
        .i_stage = grid->at.pp,
        .host = run->world->host,
        .reporter = run->reporter,
        .drain = {.grace_s = run->o->input ? (double)run->o->grace
                                           : 0, /* who asks one thing waits no longer */
                  .term_grace_s = TERM_GRACE_S,
                  .end_ns = run->o->end_ns,
                  .margin_s = run->o->margin_s},
    };
    if (st == TR_OK)
        st = tr_engine_create(&run->engine, run->opened.model, run->tokenizer, run->opened.control,
                              &options, run->log, &run->opened.regions, err);
    if (st == TR_OK) tr_run_profile_engine(run->profile, run->engine);
    return st;
}

tr_status tr_run_watch(tr_run *run, tr_err *err)
{
    const bool files = run->o->input && strcmp(run->o->output, "-");

    if (run->world->size == 1 || !run->o->step_timeout) return TR_OK;
    const double timeout_s = run->o->step_timeout < 0 ? 0 : (double)run->o->step_timeout;
    tr_status st = tr_watchdog_start(&run->watchdog, run->world, timeout_s,
                                     files ? run->o->output : NULL, err);
    if (st == TR_OK) tr_engine_watch(run->engine, run->watchdog);
    return st;
}

/* ---- the run --------------------------------------------------------------------------------- */

static tr_status read_stdin(tr_buf *text, tr_err *err)
{
    char piece[4096];
    ssize_t got;
    while ((got = tr_stop_read(STDIN_FILENO, piece, sizeof piece)) != 0) {
        if (got < 0 && errno == ECANCELED) return tr_stop_fail("standard input", err);
        if (got < 0) return tr_fail(err, TR_E_IO, "standard input: %s", strerror(errno));
        tr_buf_add(text, piece, (size_t)got);
        if (text->n > TR_LINE_MAX)
            return tr_fail(err, TR_E_USAGE, "--prompt -: more than %d bytes", TR_LINE_MAX);
    }
    while (text->n && (text->s[text->n - 1] == '\n' || text->s[text->n - 1] == '\r'))
        text->n--; /* what ends a line of a terminal or of echo is no part of the question */
    return text->failed ? tr_fail(err, TR_E_MEMORY, "out of memory") : TR_OK;
}

/* --verbose: where the time went on rank 0. */
static void print_times(const tr_run *run)
{
    if (!run->o->verbose) return;
    tr_regions_print(&run->opened.regions, stderr);
    tr_model_print_overlap(run->opened.model, stderr);
}

bool tr_run_broken(const tr_run *run)
{
    return run->engine && tr_engine_broken(run->engine);
}

void tr_run_close_profile(tr_run *run, tr_status how)
{
    enum { PATIENCE_S = 5 };
    tr_err why = {0};

    if (!run->profile) return;
    tr_status st = how == TR_E_COMM || tr_run_broken(run)
                       ? tr_fail(&why, TR_E_COMM, "a step was not finished")
                       : TR_OK;
    /* Ranks that did not come to the agreement will not come to this one. */
    if (how != TR_E_COMM) st = tr_agree_within(run->world, st, PATIENCE_S, &why);
    st = tr_run_profile_end(run->profile, st == TR_OK, &why);
    if (st != TR_OK) tr_log_warn(run->log, "no joined profile: %s", why.text);
}

tr_status tr_run_job(tr_run *run, tr_err *err)
{
    tr_stop_alarm(0); /* the engine looks at the budget itself */
    if (!run->leads) return tr_engine_run(run->engine, err);
    tr_job_counts counts;
    tr_err later;
    const tr_record_options record = {
        .input_hash = run->input ? tr_input_about(run->input)->hash : "",
        .tokenizer = run->tokenizer,
        .model = run->model_name,
        .eos = run->eos,
        .bos = run->bos,
        .pad = run->pad,
    };
    tr_job_options job = {
        .input = run->input,
        .journal = run->journal,
        .saved = run->saved,
        .save_every_s = (double)run->o->save_every,
        .engine = run->engine,
        .request = run->request,
        .record = record,
        .log = run->log,
    };
    if (!run->input) {
        tr_buf text = {0};
        tr_status st = TR_OK;
        if (!strcmp(run->o->prompt, "-"))
            st = read_stdin(&text, err);
        else
            tr_buf_puts(&text, run->o->prompt);
        if (st == TR_OK && text.failed) st = tr_fail(err, TR_E_MEMORY, "out of memory");
        if (st == TR_OK) st = tr_job_prompt(&job, text.n ? text.s : "", text.n, stdout, err);
        tr_engine_dismiss(run->engine); /* of a question that was refused the others know nothing */
        free(text.s);
        return st;
    }
    tr_run_profile_job(run->profile, &job);
    tr_status st = tr_job_run(&job, &counts, err);
    tr_engine_dismiss(run->engine);
    print_times(run);
    tr_status changed = tr_input_check(run->input, &later);
    if (changed != TR_OK && (st == TR_OK || st == TR_E_STOP)) {
        st = changed;
        *err = later;
    }
    tr_status closed = tr_journal_close(run->journal, &later);
    run->journal = NULL;
    if (closed != TR_OK && (st == TR_OK || st == TR_E_STOP)) {
        st = closed;
        *err = later;
    }
    return st;
}

tr_status tr_run_input(tr_run *run, tr_err *err)
{
    if (!run->leads) return TR_OK;
    tr_status st = tr_apart_check(run->o, err);
    if (st != TR_OK || !run->o->input) return st;
    st = tr_input_open(&run->input, run->o->input, 0, err);
    if (st == TR_OK) st = tr_input_take_shard(run->input, run->o->shard, err);
    if (st == TR_OK && !tr_input_about(run->input)->n_mine)
        tr_log_warn(run->log, "%s: no requests in it%s", run->o->input,
                    run->o->shard.n > 1 ? " for this shard" : "");
    return st;
}

tr_status tr_run_open_profile(tr_run *run, tr_err *err)
{
    return tr_run_profile_begin(run->profile, run->model_name, run->o->kv_dtype, err);
}

tr_status tr_run_device(tr_run *run, tr_err *err)
{
    return tr_open_choose(&run->opened, &run->open, run->log, err);
}

tr_status tr_run_weights(tr_run *run, tr_err *err)
{
    return tr_open_weights(&run->opened, &run->open, run->log, err);
}

tr_run *tr_run_create(const tr_batch_options *options, tr_world *world, tr_log *log)
{
    tr_run *run = calloc(1, sizeof *run);
    if (!run) return NULL;
    run->o = options;
    run->world = world;
    run->leads = world->rank == 0;
    run->log = log;
    run->profile = tr_run_profile_create(options, world, &run->opened, log);
    if (run->profile || !options->profile) return run;
    tr_run_free(run);
    return NULL;
}

void tr_run_free(tr_run *run)
{
    if (!run) return;
    tr_watchdog_stop(run->watchdog);
    tr_saved_close(run->saved);
    tr_journal_close(run->journal, NULL); /* gives the lock back */
    tr_run_profile_free(run->profile);
    tr_engine_free(run->engine);
    free(run->reporter);
    tr_opened_close(&run->opened);
    tr_tokenizer_free(run->tokenizer);
    tr_input_close(run->input);
    free(run->model_name);
    free(run);
}
