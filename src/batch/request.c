#include <config.h>

#include "batch/request.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"
#include "batch/request_priv.h"
#include "text/utf8.h"

/* Temperatures below this are greedy (chat.md 4.2). */
static const double greedy_below = 1e-5;

tr_status tr_parser_create(tr_parser **out, const tr_request_options *options, tr_err *err)
{
    *out = NULL;
    tr_parser *p = calloc(1, sizeof *p);
    if (!p) return tr_fail(err, TR_E_MEMORY, "out of memory");
    p->o = *options;
    if (options->tokenizer && !(p->encoder = tr_encoder_create(options->tokenizer))) {
        free(p);
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    *out = p;
    return TR_OK;
}

void tr_parser_free(tr_parser *p)
{
    if (!p) return;
    for (int i = 0; i < p->n_warned; i++)
        free(p->warned[i]);
    tr_encoder_free(p->encoder);
    free(p);
}

bool tr_refuse(tr_parsing *p, int status, const char *code, const char *param, const char *fmt, ...)
{
    va_list args;
    char message[sizeof p->refusal->message];

    p->refusal->status = status;
    p->refusal->type = status >= 500   ? "server_error"
                       : status == 404 ? "not_found_error"
                                       : "invalid_request_error";
    p->refusal->code = code;
    snprintf(p->refusal->param, sizeof p->refusal->param, "%s", param ? param : "");
    va_start(args, fmt);
    vsnprintf(message, sizeof message, fmt, args);
    va_end(args);
    snprintf(p->refusal->message, sizeof p->refusal->message, "%s", message);
    return false;
}

static bool no_memory(tr_parsing *p)
{
    p->no_memory = true;
    return false;
}

/* The first bytes of a name somebody else chose, cut between characters. */
static void short_name(const tr_parsing *p, const tr_jnode *node, char *out, size_t size)
{
    tr_buf key = {0};
    size_t n = 0;
    tr_jtext_key(p->e->json, node, &key);
    while (!key.failed && n < key.n) {
        int len = tr_utf8_next((const unsigned char *)key.s + n, key.n - n);
        if (len <= 0 || n + (size_t)len >= size || !key.s[n]) break;
        n += (size_t)len;
    }
    if (n) memcpy(out, key.s, n);
    out[n] = 0;
    free(key.s);
}

bool tr_unknown_member(tr_parsing *p, const tr_jnode *node, const char *where)
{
    tr_parser *q = p->parser;
    char name[64];

    short_name(p, node, name, sizeof name);
    if (q->o.strict_params)
        return tr_refuse(p, 400, "unknown_field", name, "unknown field \"%s\" in the %s", name,
                         where);
    for (int i = 0; i < q->n_warned; i++)
        if (!strcmp(q->warned[i], name)) return true;
    if (q->n_warned == TR_WARNED_MAX) return true;
    q->warned[q->n_warned] = strdup(name);
    if (!q->warned[q->n_warned]) return no_memory(p);
    q->n_warned++;
    tr_log_warn(q->o.log,
                "line %ju: unknown field \"%s\" in the %s is ignored, here and in later lines",
                (uintmax_t)p->e->line, name, where);
    return true;
}

/* ---- the line -------------------------------------------------------------------------------- */

static bool required_string(tr_parsing *p, const char *key, tr_buf *out)
{
    const tr_jnode *n = tr_jtext_member(p->e->json, p->e->root, key);
    if (!n || n->type == TR_J_NULL)
        return tr_refuse(p, 400, "missing_field", key, "%s is missing", key);
    if (n->type != TR_J_STRING)
        return tr_refuse(p, 400, "invalid_type", key, "%s must be a string", key);
    out->n = 0;
    tr_jtext_string(p->e->json, n, out);
    return !out->failed || no_memory(p);
}

static bool buf_is(const tr_buf *b, const char *text)
{
    return b->n == strlen(text) && !memcmp(b->n ? b->s : "", text, b->n);
}

static bool is_one_of(const tr_jtext *t, const tr_jnode *m, const char *const *known, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (tr_jtext_key_is(t, m, known[i])) return true;
    return false;
}

static bool read_line(tr_parsing *p)
{
    static const char *const known[] = {"custom_id", "method", "url", "body"};
    const tr_envelope *e = p->e;
    tr_buf s = {0};
    bool ok = false;

    if (e->bad_utf8)
        return tr_refuse(p, 400, "invalid_utf8", NULL, "the line is not UTF-8 at column %zu",
                         e->bad_at + 1);
    for (const tr_jnode *m = tr_jtext_child(e->json, e->root); m; m = tr_jtext_next(e->json, m))
        if (!is_one_of(e->json, m, known, sizeof known / sizeof *known) &&
            !tr_unknown_member(p, m, "line"))
            return false;
    if (!required_string(p, "method", &s)) goto done;
    if (!buf_is(&s, "POST")) {
        tr_refuse(p, 405, "invalid_method", "method", "method must be \"POST\"");
        goto done;
    }
    if (!required_string(p, "url", &s)) goto done;
    p->chat = buf_is(&s, "/v1/chat/completions");
    if (!p->chat && !buf_is(&s, "/v1/completions")) {
        tr_refuse(p, 404, "unknown_url", "url",
                  "url must be \"/v1/chat/completions\" or \"/v1/completions\"");
        goto done;
    }
    p->body = tr_jtext_member(e->json, e->root, "body");
    if (!p->body || p->body->type == TR_J_NULL)
        tr_refuse(p, 400, "missing_field", "body", "body is missing");
    else if (p->body->type != TR_J_OBJECT)
        tr_refuse(p, 400, "invalid_type", "body", "body must be an object");
    else
        ok = true;
done:
    free(s.s);
    return ok;
}

/* ---- prompts --------------------------------------------------------------------------------- */

static bool encode(tr_parsing *p, const tr_segment *segments, size_t n, const char *param)
{
    tr_err why;
    tr_status st = tr_encode(p->parser->encoder, segments, n, &p->r->prompt, &p->r->n_prompt, &why);
    if (st == TR_E_MEMORY) return no_memory(p);
    if (st != TR_OK) return tr_refuse(p, 500, "tokenizer_error", param, "%s", why.text);
    return true;
}

static bool chat_refused(tr_parsing *p, tr_status st, const tr_chat_refusal *c)
{
    if (st == TR_E_MEMORY) return no_memory(p);
    return tr_refuse(p, 400, c->code, c->param, "%s", c->message);
}

/* Members of an object that nobody will look at, such as misspelt ones; null is as good as absent. */
static bool only_known(tr_parsing *p, const tr_jnode *object, const char *const *known, size_t n,
                       const char *where)
{
    const tr_jtext *t = p->e->json;

    if (!object || object->type != TR_J_OBJECT) return true;
    for (const tr_jnode *m = tr_jtext_child(t, object); m; m = tr_jtext_next(t, m))
        if (m->type != TR_J_NULL && !is_one_of(t, m, known, n) && !tr_unknown_member(p, m, where))
            return false;
    return true;
}

static bool chat_members(tr_parsing *p, const tr_jnode *messages)
{
    static const char *const of_kwargs[] = {"thinking", "enable_thinking"};
    static const char *const of_message[] = {
        "role",       "content",      "name",  "reasoning_content", "reasoning",
        "tool_calls", "tool_call_id", "tools", "response_format"};
    const tr_jtext *t = p->e->json;

    for (const tr_jnode *m = tr_jtext_child(t, messages); m; m = tr_jtext_next(t, m))
        if (!only_known(p, m, of_message, sizeof of_message / sizeof *of_message, "messages"))
            return false;
    return only_known(p, tr_jtext_member(t, p->body, "chat_template_kwargs"), of_kwargs,
                      sizeof of_kwargs / sizeof *of_kwargs, "chat_template_kwargs");
}

static bool chat_prompt(tr_parsing *p)
{
    tr_parser *q = p->parser;
    const tr_jtext *t = p->e->json;
    const tr_jnode *messages = tr_jtext_member(t, p->body, "messages");
    tr_chat_refusal refused = {.code = "invalid_value"};
    tr_chat_prompt prompt = {0};
    bool thinking = false;
    tr_err why;

    if (!q->o.tokenizer || q->o.chat.format == TR_CHAT_NONE)
        return tr_refuse(p, 400, "no_tokenizer", "messages",
                         "chat needs a tokenizer, and the model folder has none: send token ids to "
                         "/v1/completions");
    if (!messages || messages->type == TR_J_NULL)
        return tr_refuse(p, 400, "missing_field", "messages", "messages is missing");
    if (messages->type != TR_J_ARRAY)
        return tr_refuse(p, 400, "invalid_type", "messages", "messages must be a list");
    if (!chat_members(p, messages)) return false;
    if (p->v.tools && !q->tools_warned) {
        q->tools_warned = true;
        tr_log_warn(q->o.log,
                    "line %ju: tools are put into the prompt, but calls are not taken out of the "
                    "answers yet: "
                    "they stand in content as the model wrote them",
                    (uintmax_t)p->e->line);
    }
    tr_status st = tr_chat_thinking(&thinking, t, p->body, &q->o.chat, &refused, &why);
    if (st != TR_OK) return chat_refused(p, st, &refused);
    st = tr_chat_encode(&prompt, t, p->body, thinking, &q->o.chat, &refused, &why);
    if (st != TR_OK) return chat_refused(p, st, &refused);
    p->asked->start = prompt.start;
    bool ok = encode(p, prompt.segments, prompt.n_segments, "messages");
    tr_chat_prompt_free(&prompt);
    return ok;
}

/* BOS in front, unless it is there (chat.md 1.8). */
static bool add_bos(tr_parsing *p)
{
    const tr_request_options *o = &p->parser->o;
    size_t bytes;

    if (!o->add_bos || o->bos < 0 || !p->v.add_special_tokens) return true;
    if (p->r->n_prompt && p->r->prompt[0] == o->bos) return true;
    if (!tr_add(&bytes, p->r->n_prompt, 1) || !tr_mul(&bytes, bytes, sizeof(int32_t)))
        return no_memory(p);
    int32_t *ids = realloc(p->r->prompt, bytes);
    if (!ids) return no_memory(p);
    memmove(ids + 1, ids, p->r->n_prompt * sizeof *ids);
    ids[0] = o->bos;
    p->r->prompt = ids;
    p->r->n_prompt++;
    p->asked->bos_added = true;
    return true;
}

static bool string_prompt(tr_parsing *p, const json_t *v)
{
    tr_segment all = {json_string_value(v), json_string_length(v), false};

    if (!p->parser->o.tokenizer)
        return tr_refuse(p, 400, "no_tokenizer", "prompt",
                         "the model folder has no tokenizer: prompt must be a list of token ids");
    if (!encode(p, &all, 1, "prompt") || !add_bos(p)) return false;
    if (!p->v.echo) return true;
    p->asked->prompt_text = malloc(all.n + 1);
    if (!p->asked->prompt_text) return no_memory(p);
    memcpy(p->asked->prompt_text, all.text, all.n);
    p->asked->n_prompt_text = all.n;
    return true;
}

static bool token_prompt(tr_parsing *p, const json_t *v)
{
    size_t n = json_array_size(v);
    p->r->prompt = tr_calloc(n, sizeof *p->r->prompt);
    if (!p->r->prompt) return no_memory(p);
    for (size_t i = 0; i < n; i++) {
        const json_t *t = json_array_get(v, i);
        char name[40];
        snprintf(name, sizeof name, "prompt[%zu]", i);
        if (json_is_string(t) || json_is_array(t))
            return tr_refuse(p, 400, "unsupported_prompt", "prompt",
                             "prompt is a list of prompts: send one request for each of them");
        if (!json_is_integer(t))
            return tr_refuse(p, 400, "invalid_type", name, "%s must be a token id", name);
        json_int_t id = json_integer_value(t);
        if (id < 0 || id >= p->parser->o.vocab_size)
            return tr_refuse(p, 400, "unknown_token", name, "%s is %jd; token ids are 0 to %d",
                             name, (intmax_t)id, p->parser->o.vocab_size - 1);
        p->r->prompt[i] = (int32_t)id;
    }
    p->r->n_prompt = n;
    return true;
}

static bool completion_prompt(tr_parsing *p)
{
    const json_t *v = json_object_get(p->json, "prompt");
    bool ok;

    if (!v || json_is_null(v))
        return tr_refuse(p, 400, "missing_field", "prompt", "prompt is missing");
    if (json_is_string(v))
        ok = string_prompt(p, v);
    else if (json_is_array(v))
        ok = token_prompt(p, v);
    else
        ok = tr_refuse(p, 400, "invalid_type", "prompt",
                       "prompt must be a string or a list of token ids");
    if (ok && !p->r->n_prompt) ok = tr_refuse(p, 400, "empty_prompt", "prompt", "prompt is empty");
    return ok;
}

/* ---- parameters that depend on each other ---------------------------------------------------- */

static void set_defaults(tr_parsing *p)
{
    const tr_sampling_defaults *d = &p->parser->o.defaults;
    p->v = (tr_values){
        .temperature = d->temperature,
        .top_p = d->top_p,
        .min_p = d->min_p,
        .repetition = d->repetition,
        .top_k = d->top_k,
        .max_tokens = -1,
        .max_completion_tokens = -1,
        .n = 1,
        .logprobs = -1,
        .top_logprobs = -1,
        .prompt_logprobs = -1,
        .best_of = 1,
        .add_special_tokens = true,
        .parallel_tool_calls = true,
    };
}

/* Rules between parameters; the prompt is not needed for them. */
static bool check_together(tr_parsing *p)
{
    tr_values *v = &p->v;
    const char *limit = v->max_completion_tokens >= 0 ? "max_completion_tokens" : "max_tokens";

    if (v->stream)
        return tr_refuse(p, 400, "unsupported_parameter", "stream",
                         "a batch has no streaming: stream must be false");
    if (v->best_of > 1)
        return tr_refuse(p, 400, "unsupported_parameter", "best_of",
                         "best_of is %jd, only 1 is supported", (intmax_t)v->best_of);
    if (v->max_tokens == 0 && !(v->echo))
        return tr_refuse(p, 400, "out_of_range", "max_tokens",
                         "max_tokens is 0, which only scoring (echo) allows");
    if (v->max_completion_tokens == 0 && !v->echo)
        return tr_refuse(p, 400, "out_of_range", "max_completion_tokens",
                         "max_completion_tokens is 0, which only scoring (echo) allows");
    if (v->max_completion_tokens >= 0) v->max_tokens = v->max_completion_tokens; /* it wins */
    if (v->max_tokens >= 0 && v->min_tokens > v->max_tokens)
        return tr_refuse(p, 400, "out_of_range", "min_tokens",
                         "min_tokens is %jd, more than %s, which is %jd", (intmax_t)v->min_tokens,
                         limit, (intmax_t)v->max_tokens);
    if (v->n > 1 && v->temperature < greedy_below)
        return tr_refuse(p, 400, "invalid_value", "n",
                         "n is %jd and the temperature is 0: all choices would be the same",
                         (intmax_t)v->n);
    if (v->n > 1 && v->max_tokens == 0)
        return tr_refuse(p, 400, "invalid_value", "n", "n is %jd and nothing is generated",
                         (intmax_t)v->n);
    if (v->top_logprobs >= 0 && !v->want_logprobs)
        return tr_refuse(p, 400, "invalid_value", "top_logprobs",
                         "top_logprobs needs logprobs: true");
    return true;
}

/* The prompt's length against the context. Never cut silently. */
static bool check_context(tr_parsing *p)
{
    tr_values *v = &p->v;
    size_t room = (size_t)p->parser->o.max_model_len, n = p->r->n_prompt;
    const char *param = p->chat ? "messages" : "prompt";

    if (n > room || (n == room && v->max_tokens != 0))
        return tr_refuse(p, 400, "context_length_exceeded", param,
                         "the prompt has %zu tokens and the context is %zu: no room for an answer",
                         n, room);
    room -= n;
    if (v->max_tokens > 0 && (size_t)v->max_tokens > room)
        return tr_refuse(p, 400, "context_length_exceeded",
                         v->max_completion_tokens >= 0 ? "max_completion_tokens" : "max_tokens",
                         "the prompt has %zu tokens, %jd more are asked for, and the context is %d",
                         n, (intmax_t)v->max_tokens, p->parser->o.max_model_len);
    if (v->max_tokens < 0) v->max_tokens = (int64_t)room;
    if (v->min_tokens > v->max_tokens)
        return tr_refuse(
            p, 400, "context_length_exceeded", "min_tokens",
            "the prompt has %zu tokens, at least %jd more are asked for, and the context is %d", n,
            (intmax_t)v->min_tokens, p->parser->o.max_model_len);
    return true;
}

static void fill(tr_parsing *p)
{
    const tr_values *v = &p->v;
    tr_params *q = &p->r->params;
    tr_asked *a = p->asked;
    int logprobs =
        (int)(p->chat ? (v->want_logprobs ? (v->top_logprobs > 0 ? v->top_logprobs : 0) : -1)
                      : v->logprobs);

    a->chat = p->chat;
    a->n_logprobs = logprobs;
    a->n_prompt_logprobs = (int)v->prompt_logprobs;
    a->echo = v->echo;
    a->skip_special = !p->chat && v->skip_special;
    a->return_token_ids =
        v->return_token_ids || !p->parser->o.tokenizer; /* no text: the ids are the answer */
    q->n = (int)v->n;
    q->key = v->has_seed ? (uint64_t)v->seed : tr_hash64(p->e->id.s, p->e->id.n, p->parser->o.seed);
    q->temperature = (float)v->temperature;
    q->top_p = (float)v->top_p;
    q->min_p = (float)v->min_p;
    q->top_k = (int)v->top_k;
    q->max_tokens = (int)v->max_tokens;
    q->min_tokens = (int)v->min_tokens;
    q->ignore_eos = v->ignore_eos;
    q->include_stop = v->include_stop;
    q->presence = (float)v->presence;
    q->frequency = (float)v->frequency;
    q->repetition = (float)v->repetition;
    q->n_logprobs = v->max_tokens ? logprobs : -1;
    q->n_prompt_logprobs = (int)v->prompt_logprobs;
    /* echo with logprobs scores the prompt too; with nothing to generate, scoring is all there
     * is to do. */
    if (v->echo && logprobs > q->n_prompt_logprobs) q->n_prompt_logprobs = logprobs;
    if (!v->max_tokens && q->n_prompt_logprobs < 0) q->n_prompt_logprobs = 0;
}

/* ---- one line -------------------------------------------------------------------------------- */

static void free_asked(void *user)
{
    tr_asked *a = user;
    if (!a) return;
    free(a->custom_id);
    free(a->prompt_text);
    free(a);
}

static bool make_request(tr_parsing *p)
{
    p->r = calloc(1, sizeof *p->r);
    if (!p->r || !(p->asked = calloc(1, sizeof *p->asked))) return no_memory(p);
    p->r->user = p->asked;
    p->r->free_user = free_asked;
    p->r->id = p->asked->line = p->e->line;
    p->asked->custom_id = malloc(p->e->id.n);
    if (!p->asked->custom_id) return no_memory(p);
    memcpy(p->asked->custom_id, p->e->id.s, p->e->id.n);
    p->asked->n_custom_id = p->e->id.n;
    return true;
}

tr_status tr_parser_line(tr_parser *parser, const tr_envelope *line, tr_parsed *out, tr_err *err)
{
    tr_parsing p = {.parser = parser, .e = line, .refusal = &out->refusal};

    memset(out, 0, sizeof *out);
    if (!line->has_id) {
        out->kind = TR_PARSED_INVALID;
        out->column = line->fault_at + 1;
        return TR_OK;
    }
    set_defaults(&p);
    bool ok = read_line(&p) && make_request(&p) && tr_params_read(&p) && check_together(&p) &&
              (p.chat ? chat_prompt(&p) : completion_prompt(&p)) && check_context(&p);
    if (ok) {
        fill(&p);
        out->kind = TR_PARSED_REQUEST;
        out->request = p.r;
        p.r = NULL;
    } else {
        out->kind = TR_PARSED_REFUSED;
    }
    json_decref(p.json);
    tr_request_free(p.r);
    if (p.no_memory)
        return tr_fail(err, TR_E_MEMORY, "line %ju: out of memory", (uintmax_t)line->line);
    return TR_OK;
}
