/* Shared by request.c (the line, the prompt, the limits) and params.c (the table of parameters). */
#ifndef TR_BATCH_REQUEST_PRIV_H
#define TR_BATCH_REQUEST_PRIV_H

#include <jansson.h>

#include "batch/request.h"

enum { TR_WARNED_MAX = 64 };

struct tr_parser {
    tr_request_options o;
    tr_encoder *encoder;         /* NULL without a tokenizer */
    char *warned[TR_WARNED_MAX]; /* unknown names warned about */
    int n_warned;
    bool tools_warned;
};

typedef struct tr_values { /* scalar parameters as given, or their defaults */
    double temperature, top_p, min_p, presence, frequency, repetition;
    int64_t top_k, seed, max_tokens, max_completion_tokens, min_tokens, n, logprobs, top_logprobs;
    int64_t prompt_logprobs, best_of;
    bool has_seed, want_logprobs, return_token_ids, stream, ignore_eos, add_special_tokens;
    bool continue_final, echo, skip_special, include_stop, parallel_tool_calls, tools;
} tr_values;

typedef struct tr_parsing { /* one line on its way */
    tr_parser *parser;
    const tr_envelope *e;
    const tr_jnode *body;
    bool chat;
    json_t *json; /* the body; what stays text is 0 in it */
    tr_values v;
    tr_request *r;
    tr_asked *asked;
    tr_refusal *refusal;
    bool no_memory; /* with false returned: not a refusal */
} tr_parsing;

/* Fill the refusal; false, so that callers write `return tr_refuse(...)`. param may be NULL. */
bool tr_refuse(tr_parsing *p, int status, const char *code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));

/* Parse the body's scalars by jansson, check every member, fill p->v and the lists of
 * p->r->params. */
bool tr_params_read(tr_parsing *p);

/* An unknown member: a warning once, or a refusal. node's key is the name. */
bool tr_unknown_member(tr_parsing *p, const tr_jnode *node, const char *where);

#endif
