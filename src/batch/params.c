#include <config.h>

#include "batch/request_priv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/size.h"

enum { CHAT = 1, COMPLETION = 2, BOTH = 3, STOP_STRINGS_MAX = 16, STOP_TOKENS_MAX = 128 };

typedef enum kind {
    K_INT,    /* min..max into an int64_t */
    K_NUMBER, /* min..max into a double; open: min itself is out */
    K_BOOL,
    K_STRING, /* its type is checked, nothing else */
    K_OBJECT,
    K_TAKE,   /* a function of its own */
    K_TEXT,   /* stays text: read from the line by somebody else */
    K_REFUSED /* unsupported unless null, and it would change the answer: never ignored silently */
} kind;

typedef struct param {
    const char *name;
    int where;
    kind kind;
    size_t at; /* offset in tr_values */
    double min, max;
    bool open;
    bool text; /* kept out of jansson: integers of any length and repeated keys stay (build.md 5) */
    bool (*take)(tr_parsing *p, const json_t *v, const tr_jnode *node);
} param;

static bool take_stop(tr_parsing *p, const json_t *v, const tr_jnode *node);
static bool take_stop_tokens(tr_parsing *p, const json_t *v, const tr_jnode *node);
static bool take_logit_bias(tr_parsing *p, const json_t *v, const tr_jnode *node);
static bool take_response_format(tr_parsing *p, const json_t *v, const tr_jnode *node);
static bool take_tools(tr_parsing *p, const json_t *v, const tr_jnode *node);
static bool take_tool_choice(tr_parsing *p, const json_t *v, const tr_jnode *node);
static bool take_stream_options(tr_parsing *p, const json_t *v, const tr_jnode *node);
static bool take_suffix(tr_parsing *p, const json_t *v, const tr_jnode *node);

#define AT(field) offsetof(tr_values, field)

/* clang-format off */
static const param params[] = {
    {"temperature",           BOTH, K_NUMBER, AT(temperature), 0, 2, false, false, NULL},
    {"top_p",                 BOTH, K_NUMBER, AT(top_p), 0, 1, true, false, NULL},
    {"top_k",                 BOTH, K_INT, AT(top_k), -1, INT32_MAX, false, false, NULL},
    {"min_p",                 BOTH, K_NUMBER, AT(min_p), 0, 1, false, false, NULL},
    {"seed",                  BOTH, K_INT, AT(seed), -0x1p63, 0x1p63, false, false, NULL},
    {"stop",                  BOTH, K_TAKE, 0, 0, 0, false, false, take_stop},
    {"stop_token_ids",        BOTH, K_TAKE, 0, 0, 0, false, false, take_stop_tokens},
    {"max_tokens",            BOTH, K_INT, AT(max_tokens), 0, INT32_MAX, false, false, NULL},
    {"max_completion_tokens", BOTH, K_INT, AT(max_completion_tokens), 0, INT32_MAX, false, false, NULL},
    {"min_tokens",            BOTH, K_INT, AT(min_tokens), 0, INT32_MAX, false, false, NULL},
    {"n",                     BOTH, K_INT, AT(n), 1, 128, false, false, NULL},
    {"logprobs",              CHAT, K_BOOL, AT(want_logprobs), 0, 0, false, false, NULL},
    {"logprobs",              COMPLETION, K_INT, AT(logprobs), 0, TR_ASKED_LOGPROBS_MAX, false, false, NULL},
    {"top_logprobs",          CHAT, K_INT, AT(top_logprobs), 0, TR_ASKED_LOGPROBS_MAX, false, false, NULL},
    {"prompt_logprobs",       BOTH, K_INT, AT(prompt_logprobs), 0, TR_ASKED_LOGPROBS_MAX, false, false, NULL},
    {"return_token_ids",      BOTH, K_BOOL, AT(return_token_ids), 0, 0, false, false, NULL},
    {"logit_bias",            BOTH, K_TAKE, 0, 0, 0, false, false, take_logit_bias},
    {"presence_penalty",      BOTH, K_NUMBER, AT(presence), -2, 2, false, false, NULL},
    {"frequency_penalty",     BOTH, K_NUMBER, AT(frequency), -2, 2, false, false, NULL},
    {"repetition_penalty",    BOTH, K_NUMBER, AT(repetition), 0, 2, true, false, NULL},
    {"response_format",       BOTH, K_TAKE, 0, 0, 0, false, true, take_response_format},
    {"tools",                 CHAT, K_TAKE, 0, 0, 0, false, true, take_tools},
    {"tool_choice",           CHAT, K_TAKE, 0, 0, 0, false, true, take_tool_choice},
    {"parallel_tool_calls",   CHAT, K_BOOL, AT(parallel_tool_calls), 0, 0, false, false, NULL},
    {"stream",                BOTH, K_BOOL, AT(stream), 0, 0, false, false, NULL},
    {"stream_options",        BOTH, K_TAKE, 0, 0, 0, false, false, take_stream_options},
    {"ignore_eos",            BOTH, K_BOOL, AT(ignore_eos), 0, 0, false, false, NULL},
    {"add_special_tokens",    BOTH, K_BOOL, AT(add_special_tokens), 0, 0, false, false, NULL},
    {"continue_final_message", CHAT, K_BOOL, AT(continue_final), 0, 0, false, false, NULL},
    {"include_stop_str_in_output", BOTH, K_BOOL, AT(include_stop), 0, 0, false, false, NULL},
    {"skip_special_tokens",   BOTH, K_BOOL, AT(skip_special), 0, 0, false, false, NULL},
    {"echo",                  COMPLETION, K_BOOL, AT(echo), 0, 0, false, false, NULL},
    {"suffix",                COMPLETION, K_TAKE, 0, 0, 0, false, false, take_suffix},
    {"best_of",               COMPLETION, K_INT, AT(best_of), 1, 128, false, false, NULL},
    {"model",                 BOTH, K_STRING, 0, 0, 0, false, false, NULL},
    {"user",                  BOTH, K_STRING, 0, 0, 0, false, false, NULL},
    {"service_tier",          BOTH, K_STRING, 0, 0, 0, false, false, NULL},
    {"store",                 BOTH, K_TEXT, 0, 0, 0, false, true, NULL},
    {"metadata",              BOTH, K_TEXT, 0, 0, 0, false, true, NULL},
    {"reasoning_effort",      CHAT, K_STRING, 0, 0, 0, false, false, NULL},
    {"chat_template_kwargs",  CHAT, K_OBJECT, 0, 0, 0, false, false, NULL},
    {"thinking",              CHAT, K_OBJECT, 0, 0, 0, false, false, NULL},
    {"messages",              CHAT, K_TEXT, 0, 0, 0, false, true, NULL},
    {"prompt",                COMPLETION, K_TEXT, 0, 0, 0, false, false, NULL},
    {"guided_json",           BOTH, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"guided_regex",          BOTH, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"guided_choice",         BOTH, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"guided_grammar",        BOTH, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"structured_outputs",    BOTH, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"functions",             CHAT, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"function_call",         CHAT, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"audio",                 CHAT, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"prediction",            CHAT, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"truncate_prompt_tokens", BOTH, K_REFUSED, 0, 0, 0, false, true, NULL},
    {"prompt_embeds",         BOTH, K_REFUSED, 0, 0, 0, false, true, NULL},
};
/* clang-format on */

static const param *find_param(const tr_parsing *p, const tr_jnode *m)
{
    for (size_t i = 0; i < sizeof params / sizeof *params; i++)
        if ((params[i].where & (p->chat ? CHAT : COMPLETION)) &&
            tr_jtext_key_is(p->e->json, m, params[i].name))
            return &params[i];
    return NULL;
}

/* ---- scalars --------------------------------------------------------------------------------- */

static bool wrong_type(tr_parsing *p, const char *name, const char *wanted)
{
    return tr_refuse(p, 400, "invalid_type", name, "%s must be %s", name, wanted);
}

/* The bounds are exact in double but for seed, whose every int64 is allowed. */
static bool read_int(tr_parsing *p, const param *d, const json_t *v)
{
    if (!json_is_integer(v)) return wrong_type(p, d->name, "an integer");
    json_int_t i = json_integer_value(v);
    if ((double)i < d->min || (double)i > d->max)
        return tr_refuse(p, 400, "out_of_range", d->name, "%s is %jd, it must be %.0f to %.0f",
                         d->name, (intmax_t)i, d->min, d->max);
    memcpy((char *)&p->v + d->at, &(int64_t){i}, sizeof(int64_t));
    if (d->at == AT(seed)) p->v.has_seed = true;
    return true;
}

static bool read_number(tr_parsing *p, const param *d, const json_t *v)
{
    if (!json_is_number(v)) return wrong_type(p, d->name, "a number");
    double x = json_number_value(v);
    /* The engine computes in fp32: what is positive must stay so there. */
    bool low = d->open ? (float)x <= (float)d->min : x < d->min;
    if (!isfinite(x) || low || x > d->max)
        return tr_refuse(p, 400, "out_of_range", d->name,
                         "%s is %.15g, it must be %s %.15g and at most %.15g", d->name, x,
                         d->open ? "above" : "at least", d->min, d->max);
    memcpy((char *)&p->v + d->at, &x, sizeof x);
    return true;
}

static bool read_member(tr_parsing *p, const param *d, const json_t *v, const tr_jnode *node)
{
    if (node->type == TR_J_NULL) return true; /* null is absent */
    switch (d->kind) {
    case K_INT:
        return read_int(p, d, v);
    case K_NUMBER:
        return read_number(p, d, v);
    case K_BOOL:
        if (!json_is_boolean(v)) return wrong_type(p, d->name, "true or false");
        memcpy((char *)&p->v + d->at, &(bool){json_is_true(v)}, sizeof(bool));
        return true;
    case K_STRING:
        return json_is_string(v) || wrong_type(p, d->name, "a string");
    case K_OBJECT:
        return json_is_object(v) || wrong_type(p, d->name, "an object");
    case K_TAKE:
        return d->take(p, v, node);
    case K_TEXT:
        return true;
    case K_REFUSED:
        return tr_refuse(p, 400, "unsupported_parameter", d->name, "%s is not supported", d->name);
    }
    return true;
}

/* ---- lists ----------------------------------------------------------------------------------- */

static bool out_of_memory(tr_parsing *p)
{
    p->no_memory = true;
    return false;
}

static bool add_stop(tr_parsing *p, const json_t *v, const char *name)
{
    tr_params *q = &p->r->params;
    if (!json_is_string(v)) return wrong_type(p, name, "a string");
    size_t n = json_string_length(v);
    if (!n) return tr_refuse(p, 400, "invalid_value", name, "%s is empty", name);
    char *s = malloc(n + 1);
    if (!s) return out_of_memory(p);
    memcpy(s, json_string_value(v), n);
    s[n] = 0;
    q->stop[q->n_stop++] = (tr_string){s, n};
    return true;
}

static bool take_stop(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    (void)node;
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    if (!json_is_array(v) && !json_is_string(v))
        return wrong_type(p, "stop", "a string or a list of strings");
    if (n > STOP_STRINGS_MAX)
        return tr_refuse(p, 400, "out_of_range", "stop",
                         "stop has %zu strings, at most %d are allowed", n, STOP_STRINGS_MAX);
    if (n && !p->parser->o.tokenizer)
        return tr_refuse(p, 400, "no_tokenizer", "stop",
                         "stop needs text, and the model folder has no tokenizer");
    p->r->params.stop = tr_calloc(n, sizeof *p->r->params.stop);
    if (!p->r->params.stop) return out_of_memory(p);
    if (!json_is_array(v)) return add_stop(p, v, "stop");
    for (size_t i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "stop[%zu]", i);
        if (!add_stop(p, json_array_get(v, i), name)) return false;
    }
    return true;
}

/* A token id: an integer in [0, vocab). */
static bool token_id(tr_parsing *p, const json_t *v, const char *name, int32_t *out)
{
    if (!json_is_integer(v)) return wrong_type(p, name, "an integer");
    json_int_t i = json_integer_value(v);
    if (i < 0 || i >= p->parser->o.vocab_size)
        return tr_refuse(p, 400, "unknown_token", name, "%s is %jd; token ids are 0 to %d", name,
                         (intmax_t)i, p->parser->o.vocab_size - 1);
    *out = (int32_t)i;
    return true;
}

static bool take_stop_tokens(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    tr_params *q = &p->r->params;
    (void)node;
    if (!json_is_array(v)) return wrong_type(p, "stop_token_ids", "a list of token ids");
    size_t n = json_array_size(v);
    if (n > STOP_TOKENS_MAX)
        return tr_refuse(p, 400, "out_of_range", "stop_token_ids",
                         "stop_token_ids has %zu ids, at most %d are allowed", n, STOP_TOKENS_MAX);
    for (size_t i = 0; i < n; i++) {
        char name[40];
        snprintf(name, sizeof name, "stop_token_ids[%zu]", i);
        if (!token_id(p, json_array_get(v, i), name, &q->stop_token[q->n_stop_tokens]))
            return false;
        q->n_stop_tokens++;
    }
    return true;
}

static int by_token(const void *a, const void *b)
{
    int32_t x = ((const tr_bias *)a)->token, y = ((const tr_bias *)b)->token;
    return (x > y) - (x < y);
}

/* The id a key of logit_bias spells, or -1. Only the canonical spelling counts: "5" and "05"
 * would be one token twice. */
static int32_t bias_token(const tr_parsing *p, const char *key, size_t n)
{
    int64_t id = 0;
    if (!n || n > 9 || (n > 1 && key[0] == '0')) return -1;
    for (size_t i = 0; i < n; i++) {
        if (key[i] < '0' || key[i] > '9') return -1;
        id = id * 10 + (key[i] - '0');
    }
    if (id >= p->parser->o.vocab_size) return -1;
    if (p->parser->o.tokenizer && !tr_tokenizer_has(p->parser->o.tokenizer, (int32_t)id)) return -1;
    return (int32_t)id;
}

static bool take_logit_bias(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    tr_params *q = &p->r->params;
    const char *key;
    json_t *value;
    (void)node;
    if (!json_is_object(v)) return wrong_type(p, "logit_bias", "a map of token id to number");
    q->bias = tr_calloc(json_object_size(v), sizeof *q->bias);
    if (!q->bias) return out_of_memory(p);
    json_object_foreach((json_t *)v, key, value)
    {
        char name[64];
        snprintf(name, sizeof name, "logit_bias.%.40s", key);
        int32_t token = bias_token(p, key, strlen(key));
        if (token < 0)
            return tr_refuse(p, 400, "unknown_token", name, "%s: no token has this id", name);
        if (!json_is_number(value)) return wrong_type(p, name, "a number");
        double x = json_number_value(value);
        if (!(x >= -100 && x <= 100))
            return tr_refuse(p, 400, "out_of_range", name, "%s is %.15g, it must be -100 to 100",
                             name, x);
        q->bias[q->n_bias++] = (tr_bias){token, (float)x};
    }
    if (q->n_bias) qsort(q->bias, (size_t)q->n_bias, sizeof *q->bias, by_token);
    return true;
}

/* ---- what is not built, and tools ------------------------------------------------------------ */

static bool node_is(const tr_parsing *p, const tr_jnode *n, const char *text)
{
    return n && tr_jtext_is(p->e->json, n, text);
}

static bool take_response_format(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    const tr_jtext *t = p->e->json;
    (void)v;
    if (node->type != TR_J_OBJECT) return wrong_type(p, "response_format", "an object");
    const tr_jnode *type = tr_jtext_member(t, node, "type");
    if (node_is(p, type, "text")) return true;
    if (node_is(p, type, "json_schema")) {
        const tr_jnode *schema =
            tr_jtext_member(t, tr_jtext_member(t, node, "json_schema"), "schema");
        if (!schema || schema->type == TR_J_NULL)
            return tr_refuse(p, 400, "missing_field", "response_format.json_schema.schema",
                             "response_format.json_schema.schema is missing");
    } else if (!node_is(p, type, "json_object")) {
        return tr_refuse(
            p, 400, "invalid_value", "response_format.type",
            "response_format.type must be \"text\", \"json_object\" or \"json_schema\"");
    }
    return tr_refuse(
        p, 400, "unsupported_response_format", "response_format",
        "this build has no constrained decoding: response_format must be {\"type\": \"text\"}");
}

static bool take_tool_choice(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    (void)v;
    if (node_is(p, node, "none") || node_is(p, node, "auto")) return true;
    bool named = node->type == TR_J_OBJECT &&
                 node_is(p, tr_jtext_member(p->e->json, node, "type"), "function");
    if (named || node_is(p, node, "required"))
        return tr_refuse(
            p, 400, "unsupported_response_format", "tool_choice",
            "this build has no constrained decoding: tool_choice must be \"none\" or \"auto\"");
    return tr_refuse(p, 400, "invalid_value", "tool_choice",
                     "tool_choice must be \"none\", \"auto\", \"required\" or a function");
}

/* [A-Za-z0-9_.-]{1,64} */
static bool good_tool_name(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        if (!((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
              c == '_' || c == '.' || c == '-'))
            return false;
    }
    return n >= 1 && n <= 64;
}

static bool check_tool(tr_parsing *p, const tr_jnode *tool, size_t i, tr_idset *names)
{
    const tr_jtext *t = p->e->json;
    char name[64];

    snprintf(name, sizeof name, "tools[%zu]", i);
    if (tool->type != TR_J_OBJECT) return wrong_type(p, name, "an object");
    snprintf(name, sizeof name, "tools[%zu].type", i);
    if (!node_is(p, tr_jtext_member(t, tool, "type"), "function"))
        return tr_refuse(p, 400, "invalid_value", name, "%s must be \"function\"", name);
    snprintf(name, sizeof name, "tools[%zu].function", i);
    const tr_jnode *function = tr_jtext_member(t, tool, "function");
    if (!function || function->type != TR_J_OBJECT) return wrong_type(p, name, "an object");
    snprintf(name, sizeof name, "tools[%zu].function.name", i);
    const tr_jnode *said = tr_jtext_member(t, function, "name");
    if (!said || said->type != TR_J_STRING) return wrong_type(p, name, "a string");
    tr_buf s = {0};
    tr_jtext_string(t, said, &s);
    bool ok = !s.failed;
    if (!ok) {
        p->no_memory = true;
    } else if (!good_tool_name(s.s ? s.s : "", s.n)) {
        ok = tr_refuse(p, 400, "invalid_tool_name", name,
                       "%s must be 1 to 64 of the characters A-Z a-z 0-9 _ . -", name);
    } else {
        int added = tr_idset_add(names, tr_key_id(s.s, s.n), i, NULL);
        ok = added > 0;
        if (added < 0) p->no_memory = true;
        if (added == 0)
            tr_refuse(p, 400, "duplicate_tool_name", name, "%s: another tool has the name %s", name,
                      s.s);
    }
    free(s.s);
    return ok;
}

static bool take_tools(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    size_t i = 0;
    bool ok = true;
    (void)v;
    if (node->type != TR_J_ARRAY) return wrong_type(p, "tools", "a list");
    tr_idset *names = tr_idset_create();
    if (!names) return out_of_memory(p);
    for (const tr_jnode *t = tr_jtext_child(p->e->json, node); t && ok;
         t = tr_jtext_next(p->e->json, t), i++)
        ok = check_tool(p, t, i, names);
    tr_idset_free(names);
    p->v.tools = i > 0;
    return ok;
}

static bool take_stream_options(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    (void)node;
    if (!json_is_object(v)) return wrong_type(p, "stream_options", "an object");
    const json_t *usage = json_object_get(v, "include_usage");
    if (usage && !json_is_null(usage) && !json_is_boolean(usage))
        return wrong_type(p, "stream_options.include_usage", "true or false");
    return true;
}

static bool take_suffix(tr_parsing *p, const json_t *v, const tr_jnode *node)
{
    (void)node;
    if (!json_is_string(v)) return wrong_type(p, "suffix", "a string");
    return !json_string_length(v) ||
           tr_refuse(p, 400, "unsupported_parameter", "suffix", "suffix is not supported");
}

/* ---- the body -------------------------------------------------------------------------------- */

/* jansson refused the body at `column` of it. A member that it refuses also by itself is named;
 * a number beyond int64 or double is good JSON, and out of every range here. */
static bool refuse_body(tr_parsing *p, int column, const char *why)
{
    const tr_jtext *t = p->e->json;
    for (const tr_jnode *m = tr_jtext_child(t, p->body); m; m = tr_jtext_next(t, m)) {
        const param *d = find_param(p, m);
        json_t *v = NULL;
        if (!d || d->text) continue;
        tr_status st = tr_json_parse(&v, tr_jtext_raw(t) + m->begin, m->end - m->begin,
                                     JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL, NULL, NULL);
        json_decref(v);
        if (st == TR_E_MEMORY) return out_of_memory(p);
        if (st != TR_OK && m->type == TR_J_NUMBER)
            return tr_refuse(p, 400, "out_of_range", d->name, "%s is far out of range", d->name);
        if (st != TR_OK)
            return tr_refuse(p, 400, "invalid_json", d->name, "column %zu: %s",
                             p->body->begin + (size_t)column, why);
    }
    return tr_refuse(p, 400, "invalid_json", NULL, "column %zu: %s",
                     p->body->begin + (size_t)column, why);
}

/* The body as jansson shall see it: what stays text, and what is unknown, is a 0 there. */
static bool parse_body(tr_parsing *p)
{
    const tr_jtext *t = p->e->json;
    size_t n = p->body->end - p->body->begin;
    tr_err why;
    int column = 0;
    char *copy = malloc(n);

    if (!copy) return out_of_memory(p);
    memcpy(copy, tr_jtext_raw(t) + p->body->begin, n);
    for (const tr_jnode *m = tr_jtext_child(t, p->body); m; m = tr_jtext_next(t, m)) {
        const param *d = find_param(p, m);
        if (d && !d->text) continue;
        memset(copy + (m->begin - p->body->begin), ' ', m->end - m->begin);
        copy[m->begin - p->body->begin] = '0';
    }
    tr_status st = tr_json_parse(&p->json, copy, n, JSON_ALLOW_NUL, NULL, &column, &why);
    free(copy);
    if (st == TR_E_MEMORY) return out_of_memory(p);
    if (st != TR_OK)
        return refuse_body(p, column,
                           strstr(why.text, ": ") ? strstr(why.text, ": ") + 2 : why.text);
    return true;
}

bool tr_params_read(tr_parsing *p)
{
    const tr_jtext *t = p->e->json;
    tr_params *q = &p->r->params;

    q->stop_token = tr_calloc(STOP_TOKENS_MAX + TR_EXTRA_EOS_MAX, sizeof *q->stop_token);
    if (!q->stop_token) return out_of_memory(p);
    if (!parse_body(p)) return false;
    for (const tr_jnode *m = tr_jtext_child(t, p->body); m; m = tr_jtext_next(t, m)) {
        const param *d = find_param(p, m);
        bool ok = d ? read_member(p, d, json_object_get(p->json, d->name), m)
                    : tr_unknown_member(p, m, "body");
        if (!ok) return false;
    }
    if (!p->v.ignore_eos)
        for (int i = 0; i < p->parser->o.n_extra_eos; i++)
            q->stop_token[q->n_stop_tokens++] = p->parser->o.extra_eos[i];
    return true;
}
