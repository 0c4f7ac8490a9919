#include <config.h>

#include "command/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "command/limit.h"

enum { FIRST_CODE = 256, HELP_INDENT = 28, HELP_WIDTH = 80 };

static bool takes_value(const tr_option *o)
{
    return o->kind != TR_OPTION_FLAG && o->kind != TR_OPTION_ABSENT_FLAG;
}

/* Is text one of "a|b|c"? */
static bool is_choice(const char *choices, const char *text)
{
    size_t n = strlen(text);
    for (const char *p = choices; p && *p;) {
        size_t len = strcspn(p, "|");
        if (len == n && !memcmp(p, text, n)) return true;
        p += len + (p[len] == '|');
    }
    return false;
}

static tr_status take_int(const tr_option *o, int64_t *out, const char *text, tr_err *err)
{
    char *end = NULL;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (end == text || *end || errno || v < o->min || v > o->max || text[0] == ' ' ||
        text[0] == '+')
        return tr_fail(err, TR_E_USAGE, "--%s %s: it must be a whole number from %jd to %jd",
                       o->name, text, (intmax_t)o->min, (intmax_t)o->max);
    *out = v;
    return TR_OK;
}

static tr_status take(const tr_option *o, void *target, const char *text, tr_err *err)
{
    void *at = (char *)target + o->at;
    tr_option_list *list = at;

    switch (o->kind) {
    case TR_OPTION_TITLE:
        return TR_OK;
    case TR_OPTION_FLAG:
        *(bool *)at = true;
        return TR_OK;
    case TR_OPTION_INT:
        return take_int(o, at, text, err);
    case TR_OPTION_CHOICE:
        if (!is_choice(o->choices, text))
            return tr_fail(err, TR_E_USAGE, "--%s %s: it must be one of %s", o->name, text,
                           o->choices);
        *(const char **)at = text;
        return TR_OK;
    case TR_OPTION_TEXT:
        *(const char **)at = text;
        return TR_OK;
    case TR_OPTION_LIST:
        if (list->n == TR_OPTION_LIST_MAX)
            return tr_fail(err, TR_E_USAGE, "--%s may be given %d times at most", o->name,
                           TR_OPTION_LIST_MAX);
        list->s[list->n++] = text;
        return TR_OK;
    case TR_OPTION_ABSENT:
        if (is_choice(o->choices, text)) return TR_OK;
        return tr_fail(err, TR_E_USAGE, "--%s %s: this is not built yet%s%s", o->name, text,
                       o->choices ? "; so far only " : "", o->choices ? o->choices : "");
    case TR_OPTION_ABSENT_FLAG:
        return tr_fail(err, TR_E_USAGE, "--%s: this is not built yet", o->name);
    }
    return TR_OK;
}

/* What getopt_long could not use; argv[optind - 1] is the word, or part of it. */
static tr_status bad_word(int c, char **argv, tr_err *err)
{
    const char *word = argv[optind - 1];
    char letter[3] = {'-', (char)optopt, 0};
    bool is_long = !strncmp(word, "--", 2);
    if (c == ':') return tr_fail(err, TR_E_USAGE, "%s needs a value", is_long ? word : letter);
    if (is_long && optopt >= FIRST_CODE)
        return tr_fail(err, TR_E_USAGE, "%s: this option takes no value", word);
    return tr_fail(err, TR_E_USAGE, "unknown option %s (see trireme %s --help)",
                   is_long || !optopt ? word : letter, argv[0]);
}

tr_status tr_options_parse(const tr_option *table, int n, void *target, int argc, char **argv,
                           int *rest, tr_err *err)
{
    struct option *longs = tr_calloc((size_t)n + 1, sizeof *longs);
    char *letters = tr_calloc((size_t)n * 2 + 2, 1);
    tr_status st = TR_OK;
    int n_longs = 0, c;
    char *p = letters;

    if (!longs || !letters) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    *p++ = ':'; /* a missing value is told from an unknown option */
    for (int i = 0; i < n; i++) {
        if (table[i].kind == TR_OPTION_TITLE) continue;
        longs[n_longs++] =
            (struct option){table[i].name, takes_value(&table[i]) ? required_argument : no_argument,
                            NULL, FIRST_CODE + i};
        if (!table[i].letter) continue;
        *p++ = table[i].letter;
        if (takes_value(&table[i])) *p++ = ':';
    }
    optind = 0; /* a fresh scan, also when another command line was read before */
    opterr = 0;
    while (st == TR_OK && (c = getopt_long(argc, argv, letters, longs, NULL)) != -1) {
        int i = c - FIRST_CODE;
        if (c == '?' || c == ':') {
            st = bad_word(c, argv, err);
            break;
        }
        for (int k = 0; c < FIRST_CODE && k < n; k++)
            if (table[k].letter == c) i = k;
        st = take(&table[i], target, optarg, err);
    }
    *rest = optind;
done:
    free(longs);
    free(letters);
    return st;
}

/* Words of text from column `at` on, wrapped. */
static void put_wrapped(FILE *out, const char *text, int at)
{
    int column = at;
    while (*text) {
        int n = (int)strcspn(text, " ");
        if (column > HELP_INDENT && column + 1 + n >= HELP_WIDTH) {
            fprintf(out, "\n%*s", HELP_INDENT, "");
            column = HELP_INDENT;
        } else if (column > HELP_INDENT) {
            fputc(' ', out);
            column++;
        }
        fprintf(out, "%.*s", n, text);
        column += n;
        text += n;
        while (*text == ' ')
            text++;
    }
    fputc('\n', out);
}

void tr_options_help(FILE *out, const tr_option *table, int n)
{
    char head[HELP_WIDTH];
    for (int i = 0; i < n; i++) {
        const tr_option *o = &table[i];
        if (o->kind == TR_OPTION_TITLE) {
            fprintf(out, "\n%s\n", o->help);
            continue;
        }
        if (o->kind == TR_OPTION_ABSENT || o->kind == TR_OPTION_ABSENT_FLAG)
            continue; /* what is not there */
        int len = snprintf(head, sizeof head, "  %c%c%s--%s%s%s", o->letter ? '-' : ' ',
                           o->letter ? o->letter : ' ', o->letter ? ", " : "  ", o->name,
                           o->arg ? " " : "", o->arg ? o->arg : "");
        if (len < HELP_INDENT - 1)
            fprintf(out, "%-*s", HELP_INDENT, head);
        else
            fprintf(out, "%s\n%*s", head, HELP_INDENT, "");
        put_wrapped(out, o->help, HELP_INDENT);
    }
}

/* ---- batch ----------------------------------------------------------------------------------- */

#define AT(field) offsetof(tr_batch_options, field)

/* clang-format off */
static const tr_option batch_table[] = {
    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Model"},
    {"model", 'm', TR_OPTION_TEXT, AT(model), 0, 0, "DIR", NULL,
     "folder with config.json, safetensors, tokenizer.json"},
    {"kv-dtype", 0, TR_OPTION_CHOICE, AT(kv_dtype), 0, 0, "TYPE", "fp8|bf16|f32",
     "number format of the caches: fp8, bf16 or f32 (default fp8)"},
    {"max-model-len", 0, TR_OPTION_INT, AT(max_model_len), 2, INT32_MAX, "N", NULL,
     "prompt and answer together, in tokens (default: what the model allows, at most 16384)"},
    {"load-format", 0, TR_OPTION_CHOICE, AT(load_format), 0, 0, "FORMAT", "safetensors|dummy",
     "safetensors, or dummy: random weights of config.json (default safetensors)"},
    {"override", 0, TR_OPTION_LIST, AT(overrides), 0, 0, "KEY=VALUE", NULL,
     "put a number into config.json; may be repeated"},
    {"index-topk-freq", 0, TR_OPTION_ABSENT, 0, 0, 0, "N", NULL, NULL},
    {"index-topk-pattern", 0, TR_OPTION_ABSENT, 0, 0, 0, "P", NULL, NULL},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Ranks"},
    {"device", 0, TR_OPTION_CHOICE, AT(device), 0, 0, "NAME", "auto|cpu|cuda",
     "auto, cpu or cuda (default auto: cuda where every rank has a GPU of its own)"},
    TR_RANK_OPTIONS(tr_batch_options, ranks),
    {"no-bind", 0, TR_OPTION_FLAG, AT(no_bind), 0, 0, NULL, NULL,
     "leave threads where the launcher put them"},
    {"step-timeout", 0, TR_OPTION_INT, AT(step_timeout), 0, 1 << 20, "S", NULL,
     "give up without progress for so long, seconds; 0: never (default: 60, or 10 times a step)"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Engine"},
    {"max-batch-tokens", 0, TR_OPTION_INT, AT(max_batch_tokens), 1, 1 << 20, "N", NULL,
     "prompt tokens of one step, at most (default 1024)"},
    {"max-sequences", 0, TR_OPTION_INT, AT(max_sequences), 1, 4096, "N", NULL,
     "answers generated at the same time, at most (default 32)"},
    {"max-cache-tokens", 0, TR_OPTION_INT, AT(max_cache_tokens), 1, (int64_t)1 << 36, "N", NULL,
     "tokens in the caches of a replica, at most (default: what all answers need, as far as the "
     "memory left goes: nearly all of a GPU's, half of the host's)"},
    {"no-prefix-cache", 0, TR_OPTION_FLAG, AT(no_prefix_cache), 0, 0, NULL, NULL,
     "compute every prompt in full, also what it shares with others"},
    {"seed", 0, TR_OPTION_INT, AT(seed), 0, INT64_MAX, "N", NULL,
     "of requests without a seed of their own, with their custom_id (default 0)"},
    {"speculate", 0, TR_OPTION_ABSENT, 0, 0, 0, "N", "0", NULL},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Text"},
    {"chat-format", 0, TR_OPTION_CHOICE, AT(chat_format), 0, 0, "FORMAT", "auto|dsv32|dsv31",
     "dsv32 (V3.2), dsv31 (V3.2-Exp) or auto: as the model folder says (default auto)"},
    {"default-thinking", 0, TR_OPTION_FLAG, AT(default_thinking), 0, 0, NULL, NULL,
     "requests that say nothing think (default: they do not)"},
    {"thinking-only", 0, TR_OPTION_FLAG, AT(thinking_only), 0, 0, NULL, NULL,
     "the model always thinks (Speciale); tools are refused"},
    {"allow-tools", 0, TR_OPTION_FLAG, AT(allow_tools), 0, 0, NULL, NULL,
     "with --thinking-only: accept tools"},
    {"literal-content", 0, TR_OPTION_FLAG, AT(literal_content), 0, 0, NULL, NULL,
     "special tokens written in messages are plain text"},
    {"response-format-in-prompt", 0, TR_OPTION_FLAG, AT(response_format_in_prompt), 0, 0, NULL, NULL,
     "put a request's schema into its prompt (needs constrained decoding: not in this build)"},
    {"dsv31-assistant-after-tool", 0, TR_OPTION_FLAG, AT(dsv31_assistant_after_tool), 0, 0, NULL, NULL,
     "dsv31: mark the assistant's turn after tool output"},
    {"strict-params", 0, TR_OPTION_FLAG, AT(strict_params), 0, 0, NULL, NULL,
     "refuse requests with unknown fields (default: one warning per name)"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Job"},
    {"input", 'i', TR_OPTION_TEXT, AT(input), 0, 0, "FILE", NULL,
     "requests, JSON Lines as in OpenAI's batch format; - is standard input"},
    {"output", 'o', TR_OPTION_TEXT, AT(output), 0, 0, "FILE", NULL,
     "records, one per request, appended as they finish; - is standard output (no resume)"},
    {"prompt", 0, TR_OPTION_TEXT, AT(prompt), 0, 0, "TEXT", NULL,
     "instead of -i and -o: one chat message, its answer on standard output; - reads standard input"},
    {"merge", 0, TR_OPTION_FLAG, AT(merge), 0, 0, NULL, NULL,
     "join the outputs PART... of one input, in input order"},
    {"resume", 0, TR_OPTION_FLAG, AT(resume), 0, 0, NULL, NULL,
     "fail unless there is a run to go on with (going on is the default)"},
    {"time-budget", 0, TR_OPTION_TEXT, AT(budget_text), 0, 0, "T", NULL,
     "end in good time before T is over: seconds, or MM:SS, HH:MM:SS, D-HH:MM:SS (default: until "
     "SLURM_JOB_END_TIME where it is set)"},
    {"grace", 0, TR_OPTION_INT, AT(grace), 0, 86400, "S", NULL,
     "seconds that running requests have to finish after USR1 or INT; after TERM 5 at most (default 60)"},
    {"save-every", 0, TR_OPTION_INT, AT(save_every), 0, 86400, "S", NULL,
     "save running requests' tokens so often, seconds; 0: only when stopped (default: now and then)"},
    {"shard", 0, TR_OPTION_TEXT, AT(shard_text), 0, 0, "I/N", NULL,
     "answer line k of IN (from 0) if k mod N is I; auto: by the Slurm job array's task"},
    {"verbose", 0, TR_OPTION_FLAG, AT(verbose), 0, 0, NULL, NULL, "say more"},
    {"help", 'h', TR_OPTION_FLAG, AT(help), 0, 0, NULL, NULL, "this text"},
    {"profile", 0, TR_OPTION_TEXT, AT(profile), 0, 0, "FILE.h5", NULL,
     "leave an account of the run, of every rank, in HDF5: FILE.h5 over FILE.h5.d"},
    {"profile-trace", 0, TR_OPTION_FLAG, AT(profile_trace), 0, 0, NULL, NULL,
     "with --profile: every single region too (large)"},
    {"profile-files", 0, TR_OPTION_CHOICE, AT(profile_files), 0, 0, "WHAT", "auto|rank|node",
     "with --profile: one file of each rank, or of each node; auto (default): of ranks up to 512, of nodes above"},
    {"profile-flush", 0, TR_OPTION_INT, AT(profile_flush), 1, 3600, "S", NULL,
     "with --profile: seconds between flushes, what a killed run may lose of it; default 30"},
    {"papi", 0, TR_OPTION_TEXT, AT(papi), 0, 0, "EVENT,...", NULL,
     "with --profile: count these PAPI events (default: software events, cycles and instructions)"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "Debugging"},
    {"no-overlap", 0, TR_OPTION_FLAG, AT(no_overlap), 0, 0, NULL, NULL,
     "plan a step only after the previous one was read back"},
    {"sync-check", 0, TR_OPTION_FLAG, AT(sync_check), 0, 0, NULL, NULL,
     "wait for every operation, so that a failure names the one that failed, and look at every row "
     "after every layer: a numerical_error says where its numbers were not finite first. Slow"},
    {"peer-kernels", 0, TR_OPTION_CHOICE, AT(peer_kernels), 0, 0, "WHEN", "auto|on|off",
     "exchanges between the ranks of a host by kernels that store into the other GPUs' memory: rows "
     "to other ranks' experts, context-parallel ranks' keys and latents, and sums where they are "
     "faster than NCCL, as measured at the start (auto, the default); sums wherever they can (on); "
     "or never (off)"},
    {"check-agree", 0, TR_OPTION_ABSENT_FLAG, 0, 0, 0, NULL, NULL, NULL},
};
/* clang-format on */

enum { N_BATCH = sizeof batch_table / sizeof *batch_table };

/* Not given, or empty: -o "$OUT" where OUT is not set. */
static bool absent(const char *path)
{
    return !path || !*path;
}

static tr_batch_options batch_defaults(void)
{
    return (tr_batch_options){
        .kv_dtype = "fp8",
        .load_format = "safetensors",
        .device = "auto",
        .chat_format = "auto",
        .max_batch_tokens = 1024,
        .max_sequences = 32,
        .grace = 60,
        .save_every = -1,
        .step_timeout = -1,
        .budget_s = -1,
        .shard = {.n = 1},
    };
}

/* Whether the option says something else than the default, or names it: a choice is then a word of the command line. */
static bool is_given(const tr_option *t, const tr_batch_options *o, const tr_batch_options *fresh)
{
    const void *a = (const char *)o + t->at, *b = (const char *)fresh + t->at;

    switch (t->kind) {
    case TR_OPTION_FLAG:
        return memcmp(a, b, sizeof(bool)) != 0;
    case TR_OPTION_INT:
        return memcmp(a, b, sizeof(int64_t)) != 0;
    case TR_OPTION_TEXT:
    case TR_OPTION_CHOICE:
        return memcmp(a, b, sizeof(const char *)) != 0;
    case TR_OPTION_LIST:
        return ((const tr_option_list *)a)->n > 0;
    case TR_OPTION_TITLE:
    case TR_OPTION_ABSENT:
    case TR_OPTION_ABSENT_FLAG:
        break;
    }
    return false;
}

/* Joining runs no model: what speaks of one is a mistake. */
static tr_status merge_alone(const tr_batch_options *o, tr_err *err)
{
    static const char *const fits[] = {"input", "output", "merge", "verbose", "help"};
    const tr_batch_options fresh = batch_defaults();

    for (int i = 0; i < N_BATCH; i++) {
        const tr_option *t = &batch_table[i];
        bool fit = !is_given(t, o, &fresh);
        for (size_t k = 0; k < sizeof fits / sizeof *fits && !fit; k++)
            fit = !strcmp(fits[k], t->name);
        if (!fit)
            return tr_fail(err, TR_E_USAGE,
                           "--merge joins records of all shards: --%s does not go with it",
                           t->name);
    }
    return TR_OK;
}

static tr_status batch_together(const tr_batch_options *o, tr_err *err)
{
    if (o->merge) {
        tr_status st = merge_alone(o, err);
        if (st != TR_OK) return st;
        if (absent(o->input) || absent(o->output) || !o->n_parts)
            return tr_fail(err, TR_E_USAGE, "--merge needs -i IN, -o OUT and the parts to join");
        return TR_OK;
    }
    if (o->n_parts)
        return tr_fail(err, TR_E_USAGE, "%s: an argument that belongs to no option", o->part[0]);
    if (absent(o->model)) return tr_fail(err, TR_E_USAGE, "-m MODEL is missing");
    if (o->prompt && (o->input || o->output || o->resume))
        return tr_fail(err, TR_E_USAGE, "--prompt and -i, -o or --resume exclude each other");
    if (!o->prompt && absent(o->input))
        return tr_fail(err, TR_E_USAGE, "-i IN or --prompt TEXT is missing");
    if (!o->prompt && absent(o->output)) return tr_fail(err, TR_E_USAGE, "-o OUT is missing");
    if (o->prompt && o->shard.n > 1)
        return tr_fail(err, TR_E_USAGE, "--prompt and --shard exclude each other");
    if (o->resume && !strcmp(o->output, "-"))
        return tr_fail(err, TR_E_USAGE, "--resume: -o - cannot be resumed");
    if (o->save_every >= 0 && (o->prompt || !strcmp(o->output, "-")))
        return tr_fail(err, TR_E_USAGE, "--save-every: %s cannot be resumed, nothing is saved",
                       o->prompt ? "--prompt" : "-o -");
    const bool wants = o->papi || o->profile_trace || o->profile_flush || o->profile_files;
    if (absent(o->profile) && (o->profile || wants))
        return tr_fail(err, TR_E_USAGE,
                       "--papi, --profile-trace, --profile-flush and --profile-files need "
                       "--profile FILE.h5");
    if (o->papi && o->papi[strspn(o->papi, ",")] == '\0')
        return tr_fail(err, TR_E_USAGE, "--papi '%s' names no event", o->papi);
    if (o->allow_tools && !o->thinking_only)
        return tr_fail(err, TR_E_USAGE, "--allow-tools needs --thinking-only");
    return TR_OK;
}

tr_status tr_batch_options_parse(tr_batch_options *out, int argc, char **argv, tr_err *err)
{
    int rest = 0;
    *out = batch_defaults();
    tr_status st = tr_options_parse(batch_table, N_BATCH, out, argc, argv, &rest, err);
    if (st != TR_OK) return st;
    out->part = argv + rest;
    out->n_parts = argc - rest;
    if (out->help) return TR_OK;
    if (out->budget_text) st = tr_limit_time(&out->budget_s, out->budget_text, err);
    if (st == TR_OK && out->shard_text)
        st = tr_limit_shard(&out->shard, out->shard_text, getenv, err);
    if (st == TR_OK) st = batch_together(out, err);
    if (st == TR_OK && out->response_format_in_prompt)
        st = tr_fail(err, TR_E_USAGE,
                     "--response-format-in-prompt: this build has no constrained decoding, without "
                     "which a request with a schema is refused");
    if (!out->profile_flush) out->profile_flush = 30;
    return st;
}

void tr_batch_options_help(FILE *out)
{
    fputs("Usage: trireme batch -m MODEL -i IN.jsonl -o OUT.jsonl [options]\n"
          "       trireme batch -m MODEL --prompt TEXT [options]\n"
          "       trireme batch --merge -i IN.jsonl -o ALL.jsonl PART...\n"
          "\n"
          "Answer every request of IN and append one record for each to OUT. Running the\n"
          "same command again goes on where it was stopped or killed.\n",
          out);
    tr_options_help(out, batch_table, N_BATCH);
    fputs("\nExit status: 0 done, 2 usage, 65 input or model damaged, 70 device, 71 memory,\n"
          "74 I/O, 75 stopped early (run again to go on), 86 communication lost.\n",
          out);
}
