/* Command lines by table: one row per option, from which getopt_long's list, the checks and
 * --help are made. An option whose feature is not built is in the table too and refused (exit
 * 2), never ignored (architecture.md 5). */
#ifndef TR_COMMAND_OPTIONS_H
#define TR_COMMAND_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/err.h"
#include "batch/input.h"
#include "command/ranks.h"

typedef enum tr_option_kind {
    TR_OPTION_TITLE,       /* a heading in --help; name NULL */
    TR_OPTION_FLAG,        /* bool */
    TR_OPTION_INT,         /* int64_t, min..max */
    TR_OPTION_TEXT,        /* const char * */
    TR_OPTION_LIST,        /* tr_option_list; may be repeated */
    TR_OPTION_CHOICE,      /* const char *; one of choices */
    TR_OPTION_ABSENT,      /* takes a value; refused unless it is one of choices */
    TR_OPTION_ABSENT_FLAG, /* refused */
} tr_option_kind;

typedef struct tr_option {
    const char *name;
    char letter; /* 0: none */
    tr_option_kind kind;
    size_t at; /* offset in the target struct */
    int64_t min, max;
    const char *arg;     /* "N" in --help */
    const char *choices; /* "fp8|bf16|f32" */
    const char *help;    /* with units and default; a title's text */
} tr_option;

enum { TR_OPTION_LIST_MAX = 64 };
typedef struct tr_option_list {
    const char *s[TR_OPTION_LIST_MAX]; /* point into argv */
    int n;
} tr_option_list;

/* argv[0] is the subcommand. *rest: index of the first argument that is no option (argv is
 * reordered). TR_E_USAGE. */
tr_status tr_options_parse(const tr_option *table, int n, void *target, int argc, char **argv,
                           int *rest, tr_err *err);
/* 80 columns. */
void tr_options_help(FILE *out, const tr_option *table, int n);

typedef struct tr_batch_options {
    bool help;
    const char *model, *input, *output, *prompt;
    bool merge;
    const char *kv_dtype, *load_format, *device, *chat_format;
    const char *peer_kernels; /* NULL: "auto" */
    tr_option_list overrides;
    int64_t max_model_len; /* 0: the default */
    int64_t max_batch_tokens, max_sequences, seed;
    int64_t max_cache_tokens; /* 0: the default */
    tr_rank_options ranks;
    int64_t step_timeout; /* seconds; 0: no watchdog; -1: the default */
    int64_t grace;        /* seconds that running requests have after USR1 or INT */
    int64_t save_every;   /* seconds; 0: only at a stop; -1: not given */
    double budget_s;      /* --time-budget, from the start of the program; < 0: none given */
    tr_input_shard shard; /* --shard */
    const char *budget_text, *shard_text; /* as given, or NULL */
    uint64_t
        end_ns; /* of the job, by the budget or Slurm (tr_now_ns); 0: none. Of this, saving and leaving take margin_s */
    double margin_s;
    bool default_thinking, thinking_only, allow_tools, literal_content, response_format_in_prompt;
    bool dsv31_assistant_after_tool, strict_params;
    const char *profile, *papi; /* NULL: none */
    bool profile_trace;
    const char *profile_files; /* NULL: "auto" */
    int64_t profile_flush;     /* seconds */
    bool resume, verbose, no_bind, no_overlap, sync_check, no_prefix_cache;
    char *const *part; /* --merge: the arguments behind the options */
    int n_parts;
} tr_batch_options;

/* Defaults, the command line, and what must go together. TR_E_USAGE. */
tr_status tr_batch_options_parse(tr_batch_options *out, int argc, char **argv, tr_err *err);
void tr_batch_options_help(FILE *out);

#endif
