#include <config.h>

#include "batch/record.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"
#include "batch/record_priv.h"
#include "text/utf8.h"

/* ---- ids ------------------------------------------------------------------------------------- */

/* prefix and 24 hex digits of (input, request, what): `what` tells the ids of one request apart. */
static void make_id(const char *input_hash, const tr_record_name *name, const char *prefix,
                    uint64_t what, char id[40])
{
    struct {
        char input[32];
        tr_key key;
    } all;
    char hex[33];

    memcpy(all.input, input_hash, sizeof all.input);
    all.key = name->custom_id ? tr_key_id(name->custom_id, name->n) : tr_key_line(name->line);
    tr_hash128_hex(&all, sizeof all, what, hex);
    snprintf(id, 40, "%s%.24s", prefix, hex);
}

enum { WHAT_RECORD = 1, WHAT_REQUEST, WHAT_BODY };

void tr_record_id(const char *input_hash, const tr_record_name *name, char id[40])
{
    make_id(input_hash, name, "batch_req_", WHAT_RECORD, id);
}

/* ---- text ------------------------------------------------------------------------------------ */

void tr_write_text(tr_buf *out, const char *s, size_t n)
{
    size_t room;
    if (!n || tr_utf8_valid(s, n, NULL)) {
        tr_json_quote(out, s ? s : "", n);
        return;
    }
    char *repaired = tr_mul(&room, n, 3) ? malloc(room) : NULL;
    if (!repaired) {
        out->failed = true;
        return;
    }
    tr_json_quote(out, repaired, tr_utf8_repair(s, n, repaired));
    free(repaired);
}

void tr_write_ids(tr_buf *out, const int32_t *ids, size_t n)
{
    tr_buf_puts(out, "[");
    for (size_t i = 0; i < n; i++)
        tr_buf_printf(out, i ? ",%d" : "%d", ids[i]);
    tr_buf_puts(out, "]");
}

static void write_string(tr_buf *out, const char *s)
{
    tr_write_text(out, s, strlen(s));
}

/* The text of ids, those of special tokens left out where skip_special says so. EOS, BOS and
 * padding are part of an echoed prompt only. Ill-formed bytes are replaced when it is written. */
static void decode(tr_buf *text, const tr_record_options *o, const int32_t *ids, size_t n,
                   bool prompt, bool skip_special)
{
    for (size_t i = 0; i < n && o->tokenizer; i++) {
        size_t bytes;
        if (!prompt && (ids[i] == o->eos || ids[i] == o->bos || ids[i] == o->pad)) continue;
        if (skip_special && tr_tokenizer_special(o->tokenizer, ids[i])) continue;
        const char *s = tr_tokenizer_bytes(o->tokenizer, ids[i], &bytes);
        tr_buf_add(text, s, bytes);
    }
}

/* ---- the frame ------------------------------------------------------------------------------- */

static void write_head(tr_buf *out, const tr_record_options *o, const tr_record_name *name)
{
    char id[40];
    tr_record_id(o->input_hash, name, id);
    tr_buf_printf(out, "{\"id\":\"%s\",\"custom_id\":", id);
    if (name->custom_id)
        tr_write_text(out, name->custom_id, name->n);
    else
        tr_buf_puts(out, "null");
}

static void write_response(tr_buf *out, const tr_record_options *o, const tr_record_name *name,
                           int status)
{
    char id[40];
    make_id(o->input_hash, name, "req_", WHAT_REQUEST, id);
    tr_buf_printf(out, ",\"response\":{\"status_code\":%d,\"request_id\":\"%s\",\"body\":", status,
                  id);
}

static tr_status finish(tr_buf *out, tr_err *err)
{
    tr_buf_puts(out, "\n");
    return out->failed ? tr_fail(err, TR_E_MEMORY, "out of memory for a record") : TR_OK;
}

tr_status tr_record_refusal(tr_buf *out, const tr_record_options *o, const tr_record_name *name,
                            const tr_refusal *r, tr_err *err)
{
    write_head(out, o, name);
    write_response(out, o, name, r->status);
    tr_buf_puts(out, "{\"error\":{\"message\":");
    write_string(out, r->message);
    tr_buf_puts(out, ",\"type\":");
    write_string(out, r->type);
    tr_buf_puts(out, ",\"param\":");
    if (r->param[0])
        write_string(out, r->param);
    else
        tr_buf_puts(out, "null");
    tr_buf_puts(out, ",\"code\":");
    write_string(out, r->code);
    tr_buf_puts(out, "}}},\"error\":null}");
    return finish(out, err);
}

tr_status tr_record_invalid(tr_buf *out, const tr_record_options *o, uint64_t line, size_t column,
                            const char *message, tr_err *err)
{
    const tr_record_name name = {.line = line};
    write_head(out, o, &name);
    tr_buf_puts(out, ",\"response\":null,\"error\":{\"code\":\"invalid_line\",\"message\":");
    write_string(out, message);
    tr_buf_printf(out, ",\"line\":%ju,\"column\":%zu}}", (uintmax_t)line, column);
    return finish(out, err);
}

void tr_record_failure(const tr_event *event, tr_refusal *out)
{
    memset(out, 0, sizeof *out);
    out->code = event->code ? event->code : "internal_error";
    out->status = strcmp(out->code, "context_length_exceeded") ? 500 : 400;
    out->type = out->status == 400 ? "invalid_request_error" : "server_error";
    snprintf(out->message, sizeof out->message, "%s", event->message);
}

/* ---- answers --------------------------------------------------------------------------------- */

const char *tr_meter_token(tr_meter *m, const tr_record_options *o, int32_t token, size_t *n)
{
    size_t bytes;
    const char *s = tr_tokenizer_bytes(o->tokenizer, token, &bytes);

    *n = 0;
    if (tr_detok_max(bytes) > m->cap) {
        size_t cap = 2 * tr_detok_max(bytes);
        char *room = realloc(m->room, cap);
        if (!room) {
            m->failed = true;
            return "";
        }
        m->room = room;
        m->cap = cap;
    }
    *n = tr_detok_feed(&m->detok, s, bytes, m->room);
    return m->room;
}

/* Tokens up to and including the one that completes the first `bytes` bytes of text. */
static int tokens_of(const tr_record_options *o, const tr_choice *c, size_t bytes, tr_buf *out)
{
    tr_meter meter = {0};
    size_t seen = 0, n;
    int i = 0;

    for (; i < c->n_token && seen < bytes && !meter.failed; i++) {
        int32_t t = c->token[i];
        if (t == o->eos || t == o->bos || t == o->pad) continue;
        tr_meter_token(&meter, o, t, &n);
        seen += n;
    }
    if (meter.failed) out->failed = true;
    free(meter.room);
    return i;
}

/* The message of a chat choice; returns its reasoning tokens. */
static int write_message(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                         const tr_choice *c)
{
    tr_reasoning r;
    int reasoning_tokens = 0;

    tr_reasoning_begin(&r, asked->start);
    tr_reasoning_feed(&r, c->text ? c->text : "", c->text ? c->n_text : 0);
    tr_reasoning_finish(&r);
    tr_buf_puts(out, "\"message\":{\"role\":\"assistant\",\"content\":");
    tr_write_text(out, r.content.s, r.content.n);
    if (r.has_reasoning) {
        tr_buf_puts(out, ",\"reasoning_content\":");
        tr_write_text(out, r.reasoning.s, r.reasoning.n);
        /* Never closed: all of it was reasoning. */
        reasoning_tokens = r.reasoning_bytes ? tokens_of(o, c, r.reasoning_bytes, out) : c->n_token;
    }
    tr_buf_puts(out, "}");
    if (r.content.failed || r.reasoning.failed || r.held.failed) out->failed = true;
    tr_reasoning_free(&r);
    return reasoning_tokens;
}

/* The text of a completion that a stop string has ended, without special tokens: what is left of the whole text, less their
 * bytes. What was undecided before a special token stands in front of it. */
static void plain_stopped(tr_buf *text, const tr_record_options *o, const tr_choice *c)
{
    tr_meter meter = {0};
    size_t seen = 0, n;

    for (int i = 0; i < c->n_token && seen < c->n_text && !meter.failed; i++) {
        const int32_t t = c->token[i];
        size_t own = 0;
        if (t == o->eos || t == o->bos || t == o->pad) continue;
        const char *s = tr_meter_token(&meter, o, t, &n);
        if (tr_tokenizer_special(o->tokenizer, t)) tr_tokenizer_bytes(o->tokenizer, t, &own);
        const size_t plain = own < n ? n - own : 0, left = c->n_text - seen;
        tr_buf_add(text, s, plain < left ? plain : left);
        seen += n;
    }
    if (meter.failed) text->failed = true;
    free(meter.room);
}

/* The text of a completion, without special tokens. */
static void plain_text(tr_buf *text, const tr_record_options *o, const tr_choice *c)
{
    if (c->stop >= 0)
        plain_stopped(text, o, c);
    else
        decode(text, o, c->token, (size_t)(c->n_token - (c->stop_token >= 0)), false, true);
}

static void write_completion_text(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                                  const tr_request *r, const tr_choice *c)
{
    tr_buf text = {0};
    if (asked->echo && asked->prompt_text)
        tr_buf_add(&text, asked->prompt_text, asked->n_prompt_text);
    else if (asked->echo)
        decode(&text, o, r->prompt, r->n_prompt, true, asked->skip_special);
    if (asked->skip_special && o->tokenizer)
        plain_text(&text, o, c);
    else if (c->text)
        tr_buf_add(&text, c->text, c->n_text);
    tr_buf_puts(out, "\"text\":");
    tr_write_text(out, text.s, text.n);
    if (text.failed) out->failed = true;
    free(text.s);
}

/* Returns the choice's reasoning tokens. */
static int write_choice(tr_buf *out, const tr_record_options *o, const tr_event *e, int i)
{
    const tr_asked *asked = e->request->user;
    const tr_choice *c = &e->choice[i];
    int reasoning = 0;

    tr_buf_printf(out, i ? ",{\"index\":%d," : "{\"index\":%d,", i);
    if (asked->chat)
        reasoning = write_message(out, o, asked, c);
    else
        write_completion_text(out, o, asked, e->request, c);
    tr_buf_puts(out, ",\"logprobs\":");
    if (asked->chat)
        tr_write_chat_logprobs(out, o, asked, c);
    else
        tr_write_completion_logprobs(out, o, asked, e, c);
    tr_buf_printf(out, ",\"finish_reason\":\"%s\"",
                  c->finish == TR_FINISH_LENGTH ? "length" : "stop");
    if (!asked->chat && asked->return_token_ids) {
        tr_buf_puts(out, ",\"prompt_token_ids\":");
        tr_write_ids(out, e->request->prompt, e->request->n_prompt);
    }
    if (asked->return_token_ids) {
        tr_buf_puts(out, ",\"token_ids\":");
        tr_write_ids(out, c->token, (size_t)c->n_token);
    }
    if (!asked->chat && asked->n_prompt_logprobs >= 0) {
        tr_buf_puts(out, ",\"prompt_logprobs\":");
        tr_write_prompt_logprobs(out, o, asked, e);
    }
    tr_buf_puts(out, "}");
    return reasoning;
}

static void write_body(tr_buf *out, const tr_record_options *o, const tr_event *e,
                       const tr_record_name *name, int64_t created)
{
    const tr_asked *asked = e->request->user;
    uint64_t generated = 0, reasoning = 0;
    char id[40];

    make_id(o->input_hash, name, asked->chat ? "chatcmpl-" : "cmpl-", WHAT_BODY, id);
    tr_buf_printf(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%jd,\"model\":", id,
                  asked->chat ? "chat.completion" : "text_completion", (intmax_t)created);
    write_string(out, o->model);
    tr_buf_puts(out, ",\"choices\":[");
    for (int i = 0; i < e->n_choices; i++) {
        reasoning += (uint64_t)write_choice(out, o, e, i);
        generated += (uint64_t)e->choice[i].n_token;
    }
    tr_buf_printf(
        out,
        "],\"usage\":{\"prompt_tokens\":%zu,\"completion_tokens\":%ju,\"total_tokens\":%ju,"
        "\"prompt_tokens_details\":{\"cached_tokens\":%d},\"completion_tokens_details\":{"
        "\"reasoning_tokens\":%ju}}",
        e->request->n_prompt, (uintmax_t)generated, (uintmax_t)(e->request->n_prompt + generated),
        e->cached_tokens, (uintmax_t)reasoning);
    if (asked->chat && asked->return_token_ids) {
        tr_buf_puts(out, ",\"prompt_token_ids\":");
        tr_write_ids(out, e->request->prompt, e->request->n_prompt);
    }
    if (asked->chat && asked->n_prompt_logprobs >= 0) {
        tr_buf_puts(out, ",\"prompt_logprobs\":");
        tr_write_prompt_logprobs(out, o, asked, e);
    }
    tr_buf_puts(out, "}");
}

tr_status tr_record_answer(tr_buf *out, const tr_record_options *o, const tr_event *event,
                           int64_t created, tr_err *err)
{
    const tr_asked *asked = event->request->user;
    const tr_record_name name = {asked->custom_id, asked->n_custom_id, asked->line};

    if (event->kind == TR_EVENT_FAILED) {
        tr_refusal refusal;
        tr_record_failure(event, &refusal);
        return tr_record_refusal(out, o, &name, &refusal, err);
    }
    write_head(out, o, &name);
    write_response(out, o, &name, 200);
    write_body(out, o, event, &name, created);
    tr_buf_puts(out, "},\"error\":null}");
    return finish(out, err);
}

/* ---- reading one back ------------------------------------------------------------------------ */

static bool is_type(const tr_jnode *n, tr_jtype type)
{
    return n && n->type == type;
}

/* The number of the line an error record stands for; 0: none. */
static uint64_t error_line(const tr_jtext *t, const tr_jnode *error)
{
    const tr_jnode *n = tr_jtext_member(t, error, "line");
    char text[24] = "";
    if (!is_type(n, TR_J_NUMBER) || n->end - n->begin >= sizeof text) return 0;
    memcpy(text, tr_jtext_raw(t) + n->begin, n->end - n->begin);
    if (strspn(text, "0123456789") != strlen(text)) return 0;
    return strtoull(text, NULL, 10);
}

int tr_record_read(const char *text, size_t n, const char *input_hash, tr_buf *id,
                   tr_record_name *name)
{
    tr_jtext *t = NULL;
    char expected[40];
    int is = 0;

    if (!tr_utf8_valid(text, n, NULL)) return 0;
    tr_status st = tr_jtext_parse(&t, text, n, NULL, NULL);
    if (st != TR_OK) return st == TR_E_MEMORY ? -1 : 0;
    const tr_jnode *root = tr_jtext_root(t), *said = tr_jtext_member(t, root, "id");
    const tr_jnode *custom = tr_jtext_member(t, root, "custom_id");
    const tr_jnode *response = tr_jtext_member(t, root, "response"),
                   *error = tr_jtext_member(t, root, "error");
    bool answered =
        is_type(response, TR_J_OBJECT) && is_type(error, TR_J_NULL) && is_type(custom, TR_J_STRING);
    bool invalid =
        is_type(response, TR_J_NULL) && is_type(error, TR_J_OBJECT) && is_type(custom, TR_J_NULL);
    if (!is_type(said, TR_J_STRING) || (!answered && !invalid)) goto done;
    id->n = 0;
    *name = (tr_record_name){0};
    if (answered) {
        tr_jtext_string(t, custom, id);
        if (id->failed) {
            is = -1;
            goto done;
        }
        if (!id->n) goto done;
        name->custom_id = id->s;
        name->n = id->n;
    } else {
        name->line = error_line(t, error);
        if (!name->line) goto done;
    }
    tr_record_id(input_hash, name, expected);
    is = said->end - said->begin == strlen(expected) + 2 &&
         !memcmp(text + said->begin + 1, expected, strlen(expected));
done:
    tr_jtext_free(t);
    return is;
}
