/* The lines of OUT: fields, ids, log-probabilities, bytes that are no text, and reading them
 * back. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "batch/record.h"
#include "tests/vectors.h"

#define HASH "0123456789abcdef0123456789abcdef"

static tr_tokenizer *tokenizer;

static tr_record_options options(void)
{
    return (tr_record_options){
        .input_hash = HASH,
        .tokenizer = tokenizer,
        .model = "tiny",
        .eos = tr_tokenizer_added(tokenizer, "<｜end▁of▁sentence｜>"),
        .bos = tr_tokenizer_added(tokenizer, "<｜begin▁of▁sentence｜>"),
        .pad = -1,
    };
}

static void *copy(const void *from, size_t bytes)
{
    void *to = malloc(bytes ? bytes : 1);
    assert_non_null(to);
    if (bytes) memcpy(to, from, bytes);
    return to;
}

static int32_t *encode(const char *text, size_t *n)
{
    int32_t *ids = NULL;
    tr_err err;
    tr_encoder *e = tr_encoder_create(tokenizer);
    const tr_segment all = {text, strlen(text), false};
    assert_non_null(e);
    assert_int_equal(tr_encode(e, &all, 1, &ids, n, &err), TR_OK);
    tr_encoder_free(e);
    return ids;
}

/* An answer of n_choices to a request, all with the same tokens and text; asked is copied. */
static tr_event *answer(const tr_asked *asked, const char *prompt, const int32_t *tokens,
                        size_t n_tokens, const char *text, int n_choices)
{
    tr_event *e = calloc(1, sizeof *e);
    assert_non_null(e);
    e->kind = TR_EVENT_DONE;
    e->request = calloc(1, sizeof *e->request);
    assert_non_null(e->request);
    e->request->prompt = encode(prompt, &e->request->n_prompt);
    e->request->user = copy(asked, sizeof *asked);
    e->request->free_user = free;
    e->n_choices = n_choices;
    e->choice = calloc((size_t)n_choices, sizeof *e->choice);
    assert_non_null(e->choice);
    for (int i = 0; i < n_choices; i++)
        e->choice[i] = (tr_choice){.token = copy(tokens, n_tokens * sizeof *tokens),
                                   .n_token = (int)n_tokens,
                                   .text = text ? copy(text, strlen(text) + 1) : NULL,
                                   .n_text = text ? strlen(text) : 0,
                                   .stop = -1,
                                   .stop_token = -1};
    return e;
}

static tr_scores scores(int n, int n_top)
{
    tr_scores s = {.n = n, .n_top = n_top};
    size_t cells = (size_t)n * (size_t)n_top;
    s.logprob = calloc((size_t)n + 1, sizeof *s.logprob);
    s.rank = calloc((size_t)n + 1, sizeof *s.rank);
    s.top_token = calloc(cells + 1, sizeof *s.top_token);
    s.top_logprob = calloc(cells + 1, sizeof *s.top_logprob);
    assert_true(s.logprob && s.rank && s.top_token && s.top_logprob);
    for (int i = 0; i < n; i++) {
        s.logprob[i] = -0.1f * (float)(i + 1);
        s.rank[i] = i + 1;
    }
    return s;
}

/* The record as JSON, checked to be one line that reads back as its own. */
static json_t *record_of(const tr_record_options *o, const tr_event *e, int64_t created, char **raw)
{
    tr_buf out = {0}, id = {0};
    tr_record_name name;
    tr_err err;
    json_error_t where;
    assert_int_equal(tr_record_answer(&out, o, e, created, &err), TR_OK);
    assert_int_equal(out.s[out.n - 1], '\n');
    assert_null(memchr(out.s, '\n', out.n - 1));
    assert_int_equal(tr_record_read(out.s, out.n - 1, HASH, &id, &name), 1);
    const tr_asked *a = e->request->user;
    assert_int_equal(name.n, a->n_custom_id);
    assert_memory_equal(name.custom_id, a->custom_id, name.n);
    json_t *j = json_loadb(out.s, out.n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &where);
    if (!j) fail_msg("%s at %d: %s", where.text, where.position, out.s);
    free(id.s);
    if (raw)
        *raw = out.s;
    else
        free(out.s);
    return j;
}

static json_t *at(json_t *j, const char *path)
{
    char part[64];
    while (j && *path) {
        size_t n = strcspn(path, ".");
        snprintf(part, sizeof part, "%.*s", (int)n, path);
        j = part[0] >= '0' && part[0] <= '9' ? json_array_get(j, (size_t)atol(part))
                                             : json_object_get(j, part);
        path += n + (path[n] == '.');
    }
    return j;
}

static const char *text_at(json_t *j, const char *path)
{
    const char *s = json_string_value(at(j, path));
    return s ? s : "(no string)";
}

static int64_t int_at(json_t *j, const char *path)
{
    assert_true(json_is_integer(at(j, path)));
    return json_integer_value(at(j, path));
}

static void test_chat(void **state)
{
    const tr_record_options o = options();
    tr_asked asked = {.custom_id = (char *)"r-1",
                      .n_custom_id = 3,
                      .line = 4,
                      .chat = true,
                      .n_logprobs = -1,
                      .n_prompt_logprobs = -1};
    size_t n;
    char *raw = NULL;
    (void)state;
    int32_t *ids = encode("The answer.", &n);
    tr_event *e = answer(&asked, "Hello there", ids, n, "The \"answer\".\n\x01", 2);
    e->choice[1].finish = TR_FINISH_LENGTH;
    e->cached_tokens = 128;
    json_t *j = record_of(&o, e, 1700000000, &raw);
    assert_string_equal(text_at(j, "custom_id"), "r-1");
    assert_int_equal(strlen(text_at(j, "id")), 34);
    assert_memory_equal(text_at(j, "id"), "batch_req_", 10);
    assert_true(json_is_null(at(j, "error")));
    assert_int_equal(int_at(j, "response.status_code"), 200);
    assert_int_equal(int_at(j, "response.body.created"), 1700000000);
    assert_string_equal(text_at(j, "response.body.object"), "chat.completion");
    assert_string_equal(text_at(j, "response.body.model"), "tiny");
    assert_string_equal(text_at(j, "response.body.choices.0.message.content"),
                        "The \"answer\".\n\x01");
    assert_string_equal(text_at(j, "response.body.choices.0.message.role"), "assistant");
    assert_null(at(j, "response.body.choices.0.message.reasoning_content"));
    assert_null(at(j, "response.body.choices.0.message.tool_calls"));
    assert_true(json_is_null(at(j, "response.body.choices.0.logprobs")));
    assert_string_equal(text_at(j, "response.body.choices.0.finish_reason"), "stop");
    assert_string_equal(text_at(j, "response.body.choices.1.finish_reason"), "length");
    assert_int_equal(int_at(j, "response.body.choices.1.index"), 1);
    assert_int_equal(int_at(j, "response.body.usage.prompt_tokens"), (int64_t)e->request->n_prompt);
    assert_int_equal(int_at(j, "response.body.usage.completion_tokens"), 2 * (int64_t)n);
    assert_int_equal(int_at(j, "response.body.usage.total_tokens"),
                     (int64_t)e->request->n_prompt + 2 * (int64_t)n);
    assert_int_equal(int_at(j, "response.body.usage.prompt_tokens_details.cached_tokens"), 128);
    assert_int_equal(int_at(j, "response.body.usage.completion_tokens_details.reasoning_tokens"),
                     0);
    /* A rerun: the same bytes but for created. */
    char *again = NULL;
    json_t *k = record_of(&o, e, 1700000001, &again);
    assert_string_not_equal(raw, again);
    char *digit = strstr(again, "1700000001");
    assert_non_null(digit);
    digit[9] = '0';
    assert_string_equal(raw, again);
    /* Another input: other ids. */
    const tr_record_name name = {"r-1", 3, 0}, other = {"r-2", 3, 0}, line = {NULL, 0, 4};
    char a[40], b[40];
    tr_record_id(HASH, &name, a);
    assert_string_equal(a, text_at(j, "id"));
    tr_record_id("f123456789abcdef0123456789abcdef", &name, b);
    assert_string_not_equal(a, b);
    tr_record_id(HASH, &other, b);
    assert_string_not_equal(a, b);
    tr_record_id(HASH, &line, b);
    assert_string_not_equal(a, b);
    json_decref(j);
    json_decref(k);
    free(raw);
    free(again);
    free(ids);
    tr_event_free(e);
}

static void test_reasoning(void **state)
{
    const tr_record_options o = options();
    tr_asked asked = {.custom_id = (char *)"x",
                      .n_custom_id = 1,
                      .chat = true,
                      .start = TR_START_REASONING,
                      .n_logprobs = -1,
                      .n_prompt_logprobs = -1};
    size_t n, n_think;
    (void)state;
    int32_t *think = encode("I think so.</think>", &n_think),
            *ids = encode("I think so.</think>Yes.", &n);
    tr_event *e = answer(&asked, "Q", ids, n, "I think so.</think>Yes.", 1);
    json_t *j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.message.content"), "Yes.");
    assert_string_equal(text_at(j, "response.body.choices.0.message.reasoning_content"),
                        "I think so.");
    assert_int_equal(int_at(j, "response.body.usage.completion_tokens_details.reasoning_tokens"),
                     (int64_t)n_think);
    json_decref(j);
    tr_event_free(e);
    /* Cut off inside the reasoning: all of it is. */
    e = answer(&asked, "Q", think, n_think - 1, "I think so.", 1);
    j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.message.content"), "");
    assert_int_equal(int_at(j, "response.body.usage.completion_tokens_details.reasoning_tokens"),
                     (int64_t)n_think - 1);
    json_decref(j);
    tr_event_free(e);
    free(think);
    free(ids);
}

/* A token whose bytes are no whole UTF-8, or -1. */
static int32_t broken_token(int skip)
{
    for (int32_t t = 0; t < tr_tokenizer_size(tokenizer); t++) {
        size_t n;
        const char *s = tr_tokenizer_bytes(tokenizer, t, &n);
        if (n == 1 && ((unsigned char)s[0] & 0xc0) == 0x80 && !skip--) return t;
    }
    return -1;
}

static void test_bytes(void **state)
{
    const tr_record_options o = options();
    tr_asked asked = {.custom_id = (char *)"x",
                      .n_custom_id = 1,
                      .chat = true,
                      .n_logprobs = 2,
                      .n_prompt_logprobs = -1};
    int32_t a = broken_token(0), b = broken_token(1), ids[2] = {a, o.eos};
    size_t n;
    (void)state;
    assert_true(a >= 0 && b >= 0);
    const char *bytes = tr_tokenizer_bytes(tokenizer, a, &n);
    tr_event *e = answer(&asked, "Q", ids, 2, "\xef\xbf\xbd", 1);
    tr_scores s = scores(2, 3);
    const int32_t top[6] = {b, a, 5, o.eos, -1, -1};
    memcpy(s.top_token, top, sizeof top);
    s.logprob[1] = -INFINITY;
    e->choice[0].scores = s;
    json_t *j = record_of(&o, e, 1, NULL);
    assert_int_equal(json_array_size(at(j, "response.body.choices.0.logprobs.content")), 2);
    assert_string_equal(text_at(j, "response.body.choices.0.logprobs.content.0.token"),
                        "\xef\xbf\xbd");
    assert_int_equal(json_array_size(at(j, "response.body.choices.0.logprobs.content.0.bytes")), 1);
    assert_int_equal(int_at(j, "response.body.choices.0.logprobs.content.0.bytes.0"),
                     (unsigned char)bytes[0]);
    assert_true(json_real_value(at(j, "response.body.choices.0.logprobs.content.0.logprob")) ==
                -0.1);
    assert_int_equal(
        json_array_size(at(j, "response.body.choices.0.logprobs.content.0.top_logprobs")), 2);
    assert_int_equal(
        json_array_size(at(j, "response.body.choices.0.logprobs.content.1.top_logprobs")), 1);
    assert_true(json_real_value(at(j, "response.body.choices.0.logprobs.content.1.logprob")) ==
                -9999.0);
    json_decref(j);
    tr_event_free(e);
    /* As a completion: two tokens that are spelled alike are still two keys. */
    asked.chat = false;
    e = answer(&asked, "Q", ids, 2, "\xef\xbf\xbd", 1);
    e->choice[0].scores = scores(2, 3);
    memcpy(e->choice[0].scores.top_token, top, sizeof top);
    j = record_of(&o, e, 1, NULL);
    json_t *map = at(j, "response.body.choices.0.logprobs.top_logprobs.0");
    assert_int_equal(json_object_size(map), 2);
    char key[32];
    snprintf(key, sizeof key, "token_id:%d", b);
    assert_non_null(json_object_get(map, "\xef\xbf\xbd"));
    assert_non_null(json_object_get(map, key));
    assert_int_equal(int_at(j, "response.body.choices.0.logprobs.text_offset.1"),
                     1); /* a stray byte is decided at once */
    json_decref(j);
    tr_event_free(e);
}

static void test_echo(void **state)
{
    const tr_record_options o = options();
    const char *prompt = "Héllo wörld";
    tr_asked asked = {.custom_id = (char *)"x",
                      .n_custom_id = 1,
                      .n_logprobs = 1,
                      .n_prompt_logprobs = 1,
                      .echo = true,
                      .return_token_ids = true,
                      .prompt_text = (char *)prompt,
                      .n_prompt_text = strlen(prompt)};
    size_t n;
    (void)state;
    int32_t *ids = encode(" again", &n);
    tr_event *e = answer(&asked, prompt, ids, n, " again", 1);
    int n_prompt = (int)e->request->n_prompt;
    e->prompt_scores = scores(n_prompt - 1, 1);
    for (int i = 0; i < n_prompt - 1; i++)
        e->prompt_scores.top_token[i] =
            i ? e->request->prompt[i + 1] : 7; /* mostly the token itself */
    e->choice[0].scores = scores((int)n, 1);
    json_t *j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.object"), "text_completion");
    assert_string_equal(text_at(j, "response.body.choices.0.text"), "Héllo wörld again");
    json_t *l = at(j, "response.body.choices.0.logprobs");
    assert_int_equal(json_array_size(at(l, "tokens")), (size_t)n_prompt + n);
    assert_int_equal(json_array_size(at(l, "token_logprobs")), (size_t)n_prompt + n);
    assert_int_equal(json_array_size(at(l, "top_logprobs")), (size_t)n_prompt + n);
    assert_int_equal(json_array_size(at(l, "text_offset")), (size_t)n_prompt + n);
    assert_true(json_is_null(at(l, "token_logprobs.0")) && json_is_null(at(l, "top_logprobs.0")));
    assert_true(json_is_number(at(l, "token_logprobs.1")));
    /* the answer begins behind the 11 characters of the prompt */
    assert_int_equal(json_integer_value(json_array_get(at(l, "text_offset"), (size_t)n_prompt)),
                     11);
    json_t *p = at(j, "response.body.choices.0.prompt_logprobs");
    assert_int_equal(json_array_size(p), (size_t)n_prompt);
    assert_true(json_is_null(json_array_get(p, 0)));
    assert_int_equal(json_object_size(json_array_get(p, 1)), 2);
    assert_int_equal(json_object_size(json_array_get(p, 2)), 1);
    char key[16];
    snprintf(key, sizeof key, "%d", e->request->prompt[1]);
    assert_int_equal(int_at(json_object_get(json_array_get(p, 1), key), "rank"), 1);
    assert_true(json_is_string(at(json_object_get(json_array_get(p, 1), key), "decoded_token")));
    assert_int_equal(json_array_size(at(j, "response.body.choices.0.prompt_token_ids")),
                     (size_t)n_prompt);
    assert_int_equal(json_array_size(at(j, "response.body.choices.0.token_ids")), n);
    json_decref(j);
    tr_event_free(e);
    free(ids);
}

static void test_skip_special(void **state)
{
    const tr_record_options o = options();
    tr_asked asked = {.custom_id = (char *)"x",
                      .n_custom_id = 1,
                      .n_logprobs = -1,
                      .n_prompt_logprobs = -1,
                      .skip_special = true};
    int32_t special = -1;
    size_t n;
    (void)state;
    for (int32_t t = 0; t < tr_tokenizer_size(tokenizer) && special < 0; t++)
        if (tr_tokenizer_special(tokenizer, t) && t != o.eos && t != o.bos) special = t;
    assert_true(special >= 0);
    const char *name = tr_tokenizer_bytes(tokenizer, special, &n);
    char *with = calloc(1, n + 16);
    assert_non_null(with);
    snprintf(with, n + 16, "ab%.*sstop", (int)n, name);
    int32_t *ids = encode(with, &n);
    tr_event *e = answer(&asked, "Q", ids, n, with, 1);
    json_t *j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.text"), "abstop");
    json_decref(j);
    /* What is left out of the text moves no offset, in an echoed prompt of ids either. */
    tr_asked *scored = e->request->user;
    scored->n_logprobs = 0;
    scored->echo = true;
    free(e->request->prompt);
    e->request->prompt = copy(ids, n * sizeof *ids);
    e->request->n_prompt = n;
    e->prompt_scores = scores((int)n - 1, 0);
    e->choice[0].scores = scores((int)n, 0);
    j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.text"), "abstopabstop");
    const json_t *offset = at(j, "response.body.choices.0.logprobs.text_offset");
    size_t i_special = 0;
    while (ids[i_special] != special)
        i_special++;
    for (size_t i = i_special; i < i_special + 2; i++) {
        assert_int_equal(json_integer_value(json_array_get(offset, i)), 2);
        assert_int_equal(json_integer_value(json_array_get(offset, n + i)), 8);
    }
    json_decref(j);
    scored->n_logprobs = -1;
    scored->echo = false;
    e->request->params.stop = calloc(1, sizeof(tr_string));
    assert_non_null(e->request->params.stop);
    e->request->params.stop[0] = (tr_string){copy("st", 3), 2};
    e->request->params.n_stop = 1;
    e->choice[0].stop = 0;
    e->choice[0].n_text -= 4; /* what the engine leaves of it */
    j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.text"), "ab");
    json_decref(j);
    e->choice[0].n_text += 2; /* and where the string is to be included */
    j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.text"), "abst");
    json_decref(j);
    /* A stop string that begins inside the special token: nothing of it or behind it comes back. */
    e->choice[0].n_text = 3;
    j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.text"), "ab");
    json_decref(j);
    tr_event_free(e);
    free(ids);
    free(with);
}

static void test_no_tokenizer(void **state)
{
    tr_record_options o = options();
    const int32_t ids[2] = {5, 6};
    tr_asked asked = {.custom_id = (char *)"x",
                      .n_custom_id = 1,
                      .n_logprobs = 0,
                      .n_prompt_logprobs = 0,
                      .return_token_ids = true};
    (void)state;
    tr_event *e = answer(&asked, "Hello you", ids, 2, NULL, 1);
    o.tokenizer = NULL;
    e->choice[0].scores = scores(2, 0);
    e->prompt_scores = scores((int)e->request->n_prompt - 1, 0);
    json_t *j = record_of(&o, e, 1, NULL);
    assert_string_equal(text_at(j, "response.body.choices.0.text"), "");
    assert_string_equal(text_at(j, "response.body.choices.0.logprobs.tokens.0"), "token_id:5");
    assert_int_equal(int_at(j, "response.body.choices.0.token_ids.1"), 6);
    json_decref(j);
    tr_event_free(e);
}

static void test_failures(void **state)
{
    const tr_record_options o = options();
    tr_asked asked = {.custom_id = (char *)"a\0b", .n_custom_id = 3, .chat = true};
    static const struct {
        const char *code, *type;
        int status;
    } t[] = {{"numerical_error", "server_error", 500},
             {"context_length_exceeded", "invalid_request_error", 400}};
    (void)state;
    for (int i = 0; i < 2; i++) {
        const int32_t none[1] = {0};
        tr_event *e = answer(&asked, "Q", none, 0, NULL, 1);
        e->kind = TR_EVENT_FAILED;
        e->code = t[i].code;
        snprintf(e->message, sizeof e->message, "cut in a character: \xe2\x82");
        json_t *j = record_of(&o, e, 1, NULL);
        assert_int_equal(int_at(j, "response.status_code"), t[i].status);
        assert_string_equal(text_at(j, "response.body.error.code"), t[i].code);
        assert_string_equal(text_at(j, "response.body.error.type"), t[i].type);
        assert_string_equal(text_at(j, "response.body.error.message"),
                            "cut in a character: \xef\xbf\xbd");
        assert_true(json_is_null(at(j, "response.body.error.param")));
        json_decref(j);
        tr_event_free(e);
    }
}

static void test_refusals(void **state)
{
    const tr_record_options o = options();
    const tr_record_name name = {"r", 1, 3};
    const tr_refusal refusal = {404, "not_found_error", "unknown_url", "url", "no \"such\" url"};
    tr_buf out = {0}, id = {0};
    tr_record_name back;
    tr_err err;
    (void)state;
    assert_int_equal(tr_record_refusal(&out, &o, &name, &refusal, &err), TR_OK);
    json_t *j = json_loadb(out.s, out.n, 0, NULL);
    assert_non_null(j);
    assert_int_equal(int_at(j, "response.status_code"), 404);
    assert_string_equal(text_at(j, "response.body.error.param"), "url");
    assert_string_equal(text_at(j, "response.body.error.message"), "no \"such\" url");
    assert_int_equal(tr_record_read(out.s, out.n - 1, HASH, &id, &back), 1);
    json_decref(j);
    out.n = 0;
    assert_int_equal(tr_record_invalid(&out, &o, 17, 5, "bad \xff", &err), TR_OK);
    j = json_loadb(out.s, out.n, 0, NULL);
    assert_non_null(j);
    assert_true(json_is_null(at(j, "response")) && json_is_null(at(j, "custom_id")));
    assert_string_equal(text_at(j, "error.code"), "invalid_line");
    assert_int_equal(int_at(j, "error.line"), 17);
    assert_int_equal(int_at(j, "error.column"), 5);
    assert_int_equal(tr_record_read(out.s, out.n - 1, HASH, &id, &back), 1);
    assert_true(!back.custom_id && back.line == 17);
    /* Every prefix, and every change of the id, is no record. */
    for (size_t i = 0; i + 1 < out.n; i++)
        assert_int_equal(tr_record_read(out.s, i, HASH, &id, &back), 0);
    char *digit = strstr(out.s, "batch_req_") + 10;
    *digit = *digit == '0' ? '1' : '0';
    assert_int_equal(tr_record_read(out.s, out.n - 1, HASH, &id, &back), 0);
    json_decref(j);
    free(out.s);
    free(id.s);
}

int main(void)
{
    char path[1024];
    tr_err err;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chat),         cmocka_unit_test(test_reasoning),
        cmocka_unit_test(test_bytes),        cmocka_unit_test(test_echo),
        cmocka_unit_test(test_skip_special), cmocka_unit_test(test_no_tokenizer),
        cmocka_unit_test(test_failures),     cmocka_unit_test(test_refusals),
    };
    if (tr_tokenizer_open(&tokenizer,
                          tr_source_path(path, sizeof path, "models/tiny/tokenizer.json"), NULL,
                          NULL, &err)) {
        fprintf(stderr, "skipped: %s\n", err.text);
        return 77;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_tokenizer_free(tokenizer);
    return failed;
}
