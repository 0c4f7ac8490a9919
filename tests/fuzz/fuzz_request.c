/* One line of a batch. Whatever is accepted has every number in its range, and the line respelled by another writer of JSON
 * gives the same request; whatever is not has a code, and a record that a resume counts as this line's. The first byte
 * chooses the options of the run. */
#include <config.h>

#include <math.h>

#include "batch/record.h"
#include "batch/request.h"
#include "tests/fuzz/fuzz.h"
#include "tests/vectors.h"

#define HASH "0123456789abcdef0123456789abcdef"

enum { CONTEXT = 600, N_PARSERS = 8, LINE = 9 };

static tr_tokenizer *tokenizer; /* loaded once, then only read */
static tr_parser *parser[N_PARSERS];

static tr_request_options options(int i)
{
    return (tr_request_options){
        .tokenizer = i == 7 ? NULL : tokenizer,
        .chat = {.format = i & 1 ? TR_CHAT_DSV31 : TR_CHAT_DSV32, .literal_content = i & 2},
        .vocab_size = tr_tokenizer_size(tokenizer) + 3,
        .max_model_len = CONTEXT,
        .bos = tr_tokenizer_added(tokenizer, "<｜begin▁of▁sentence｜>"),
        .add_bos = i & 1,
        .extra_eos = {5, 7},
        .n_extra_eos = i & 2,
        .seed = 7,
        .defaults = {.temperature = 1, .top_p = 0.95, .min_p = 0, .repetition = 1, .top_k = 0},
        .strict_params = i & 4,
    };
}

static void make_parsers(void)
{
    char path[4096];
    tr_err err = {0};
    tr_vector_path(path, sizeof path, "chat/tokenizer_a.json");
    FUZZ_CHECK(tr_tokenizer_open(&tokenizer, path, NULL, NULL, &err) == TR_OK, "%s", err.text);
    for (int i = 0; i < N_PARSERS; i++) {
        const tr_request_options o = options(i);
        FUZZ_CHECK(tr_parser_create(&parser[i], &o, &err) == TR_OK, "%s", err.text);
    }
}

#define IN(value, low, high)                                                                       \
    FUZZ_CHECK((value) >= (low) && (value) <= (high), "%s is %g", #value, (double)(value))

static void check_request(const tr_request *r, const tr_request_options *o)
{
    const tr_params *p = &r->params;
    const tr_asked *a = r->user;

    IN(r->n_prompt, 1, CONTEXT);
    for (size_t i = 0; i < r->n_prompt; i++)
        IN(r->prompt[i], 0, o->vocab_size - 1);
    IN(p->n, 1, 128);
    IN(p->temperature, 0, 2);
    FUZZ_CHECK(p->top_p > 0 && p->top_p <= 1 && p->repetition > 0 && p->repetition <= 2, "open");
    IN(p->min_p, 0, 1);
    IN(p->top_k, -1, INT32_MAX);
    IN(p->max_tokens, 0, CONTEXT - (int)r->n_prompt);
    IN(p->min_tokens, 0, p->max_tokens);
    IN(p->presence, -2, 2);
    IN(p->frequency, -2, 2);
    IN(p->n_logprobs, -1, 20);
    IN(p->n_prompt_logprobs, -1, 20);
    IN(p->n_stop, 0, 16);
    IN(p->n_stop_tokens, 0, 128 + TR_EXTRA_EOS_MAX);
    for (int i = 0; i < p->n_bias; i++) {
        IN(p->bias[i].token, i ? p->bias[i - 1].token + 1 : 0, o->vocab_size - 1);
        IN(p->bias[i].bias, -100, 100);
    }
    for (int i = 0; i < p->n_stop; i++)
        FUZZ_CHECK(p->stop[i].n > 0 && strlen(p->stop[i].s) <= p->stop[i].n, "stop %d", i);
    for (int i = 0; i < p->n_stop_tokens; i++)
        IN(p->stop_token[i], 0, o->vocab_size - 1);
    FUZZ_CHECK(a->n_custom_id > 0 && a->line == LINE && r->id == LINE, "whose it is");
    IN(a->n_logprobs, -1, TR_ASKED_LOGPROBS_MAX);
    IN(a->n_prompt_logprobs, -1, TR_ASKED_LOGPROBS_MAX);
}

/* Everything but pointers. */
static bool same_params(const tr_params *a, const tr_params *b)
{
    bool same = a->n == b->n && a->key == b->key && a->temperature == b->temperature &&
                a->top_p == b->top_p && a->min_p == b->min_p && a->top_k == b->top_k &&
                a->max_tokens == b->max_tokens && a->min_tokens == b->min_tokens &&
                a->ignore_eos == b->ignore_eos && a->include_stop == b->include_stop &&
                a->presence == b->presence && a->frequency == b->frequency &&
                a->repetition == b->repetition && a->n_bias == b->n_bias &&
                a->n_stop == b->n_stop && a->n_stop_tokens == b->n_stop_tokens &&
                a->n_logprobs == b->n_logprobs && a->n_prompt_logprobs == b->n_prompt_logprobs;
    for (int i = 0; same && i < a->n_bias; i++)
        same = a->bias[i].token == b->bias[i].token && a->bias[i].bias == b->bias[i].bias;
    for (int i = 0; same && i < a->n_stop_tokens; i++)
        same = a->stop_token[i] == b->stop_token[i];
    for (int i = 0; same && i < a->n_stop; i++)
        same = a->stop[i].n == b->stop[i].n && !memcmp(a->stop[i].s, b->stop[i].s, a->stop[i].n);
    return same;
}

static void check_same(const tr_request *a, const tr_request *b, const char *text)
{
    const tr_asked *x = a->user, *y = b->user;
    FUZZ_CHECK(a->n_prompt == b->n_prompt &&
                   !memcmp(a->prompt, b->prompt, a->n_prompt * sizeof *a->prompt),
               "another prompt: %s", text);
    FUZZ_CHECK(same_params(&a->params, &b->params), "other parameters: %s", text);
    FUZZ_CHECK(
        x->n_custom_id == y->n_custom_id && !memcmp(x->custom_id, y->custom_id, x->n_custom_id) &&
            x->chat == y->chat && x->n_logprobs == y->n_logprobs && x->echo == y->echo &&
            x->n_prompt_logprobs == y->n_prompt_logprobs &&
            x->return_token_ids == y->return_token_ids && x->skip_special == y->skip_special &&
            x->bos_added == y->bos_added && x->start == y->start,
        "another answer is asked for: %s", text);
}

static void parse(tr_parser *p, tr_envelope *e, const char *text, size_t n, tr_parsed *out)
{
    const tr_line line = {.number = LINE, .text = text, .n = n, .bytes = n, .whole = true};
    tr_err err = {0};
    FUZZ_CHECK(tr_envelope_read(e, &line, &err) == TR_OK, "%s", err.text);
    FUZZ_CHECK(tr_parser_line(p, e, out, &err) == TR_OK, "%s", err.text);
}

/* The record of a line that is not answered: resume finds it, under the same key. */
static void check_record(const tr_envelope *e, const tr_parsed *parsed)
{
    const tr_record_options o = {.input_hash = HASH, .model = "m"};
    const tr_record_name name = {e->id.s, e->id.n, e->line};
    tr_record_name found;
    tr_buf line = {0}, id = {0};

    if (parsed->kind == TR_PARSED_REFUSED) {
        const tr_refusal *r = &parsed->refusal;
        FUZZ_CHECK(r->code && r->type && r->message[0] && r->status >= 400 && r->status <= 500,
                   "refusal");
        tr_record_refusal(&line, &o, &name, r, NULL);
    } else {
        FUZZ_CHECK(e->fault[0] && parsed->column >= 1, "no reason");
        tr_record_invalid(&line, &o, e->line, parsed->column, e->fault, NULL);
    }
    FUZZ_CHECK(line.n > 1 && memchr(line.s, '\n', line.n) == line.s + line.n - 1, "one line: %s",
               line.s);
    FUZZ_CHECK(tr_record_read(line.s, line.n - 1, HASH, &id, &found) == 1, "no record: %s", line.s);
    if (parsed->kind == TR_PARSED_REFUSED)
        FUZZ_CHECK(found.custom_id && found.n == e->id.n &&
                       !memcmp(found.custom_id, e->id.s, found.n),
                   "whose");
    else
        FUZZ_CHECK(!found.custom_id && found.line == LINE, "which line");
    free(line.s);
    free(id.s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tr_envelope e = {0}, e2 = {0};
    tr_parsed parsed, again;
    tr_buf respelled = {0};

    if (!tokenizer) make_parsers();
    int which = fuzz_take_byte(&data, &n) % N_PARSERS;
    const tr_request_options o = options(which);
    char *text = fuzz_copy(data, n);
    parse(parser[which], &e, text, n, &parsed);
    if (parsed.kind != TR_PARSED_REQUEST) {
        check_record(&e, &parsed);
    } else {
        check_request(parsed.request, &o);
        if (tr_jtext_respell(e.json, e.root, &respelled, NULL) == TR_OK) {
            parse(parser[which], &e2, respelled.s, respelled.n, &again);
            FUZZ_CHECK(again.kind == TR_PARSED_REQUEST, "respelled it is refused: %s: %s",
                       again.kind == TR_PARSED_REFUSED ? again.refusal.message : e2.fault,
                       respelled.s);
            check_same(parsed.request, again.request, respelled.s);
            tr_request_free(again.request);
        }
        tr_request_free(parsed.request);
    }
    free(respelled.s);
    tr_envelope_free(&e);
    tr_envelope_free(&e2);
    free(text);
    return 0;
}
