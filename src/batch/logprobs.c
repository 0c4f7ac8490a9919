/* Log-probabilities in the three forms of chat.md 4.2: OpenAI's chat, OpenAI's completions,
 * vLLM's prompt_logprobs. */
#include <config.h>

#include "batch/record_priv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/utf8.h"

void tr_write_logprob(tr_buf *out, float x)
{
    char text[32];
    if (!isfinite(x)) {
        tr_buf_puts(out, "-9999.0");
        return;
    }
    /* The shortest form that reads back as the same float. */
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if (strtof(text, NULL) == x) break;
    }
    tr_buf_puts(out, text);
}

const char *tr_token_bytes(const tr_record_options *o, int32_t token, char *spare, size_t *n)
{
    if (o->tokenizer) return tr_tokenizer_bytes(o->tokenizer, token, n);
    *n = (size_t)snprintf(spare, 32, "token_id:%d", token);
    return spare;
}

static void write_token(tr_buf *out, const tr_record_options *o, int32_t token)
{
    char spare[32];
    size_t n;
    const char *s = tr_token_bytes(o, token, spare, &n);
    tr_write_text(out, s, n);
}

/* ---- chat ------------------------------------------------------------------------------------ */

/* {"token": ..., "logprob": ..., "bytes": [...] without the closing brace */
static void open_entry(tr_buf *out, const tr_record_options *o, int32_t token, float logprob)
{
    char spare[32];
    size_t n;
    const char *s = tr_token_bytes(o, token, spare, &n);

    tr_buf_puts(out, "{\"token\":");
    tr_write_text(out, s, n);
    tr_buf_puts(out, ",\"logprob\":");
    tr_write_logprob(out, logprob);
    if (!o->tokenizer) {
        tr_buf_puts(out, ",\"bytes\":null");
        return;
    }
    tr_buf_puts(out, ",\"bytes\":[");
    for (size_t i = 0; i < n; i++)
        tr_buf_printf(out, i ? ",%d" : "%d", (unsigned char)s[i]);
    tr_buf_puts(out, "]");
}

/* Alternatives of entry i that were asked for: scores may hold more columns than this reader
 * wants. */
static int n_top(const tr_scores *s, int wanted)
{
    return wanted < s->n_top ? wanted : s->n_top;
}

void tr_write_chat_logprobs(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                            const tr_choice *choice)
{
    const tr_scores *s = &choice->scores;

    if (asked->n_logprobs < 0) {
        tr_buf_puts(out, "null");
        return;
    }
    tr_buf_puts(out, "{\"content\":[");
    for (int i = 0; i < s->n && i < choice->n_token; i++) {
        if (i) tr_buf_puts(out, ",");
        open_entry(out, o, choice->token[i], s->logprob[i]);
        tr_buf_puts(out, ",\"top_logprobs\":[");
        for (int k = 0; k < n_top(s, asked->n_logprobs); k++) {
            size_t at = (size_t)i * (size_t)s->n_top + (size_t)k;
            if (s->top_token[at] < 0) break;
            if (k) tr_buf_puts(out, ",");
            open_entry(out, o, s->top_token[at], s->top_logprob[at]);
            tr_buf_puts(out, "}");
        }
        tr_buf_puts(out, "]}");
    }
    tr_buf_puts(out, "],\"refusal\":null}");
}

/* ---- completions ----------------------------------------------------------------------------- */

typedef struct run { /* tokens with their scores: the echoed prompt, then the answer */
    const int32_t *token;
    size_t n;
    const tr_scores *scores; /* of token[first_scored ..]; NULL: none */
    size_t first_scored;
} run;

static size_t characters(const char *s, size_t n)
{
    size_t c = 0;
    for (size_t i = 0; i < n; i++)
        if (((unsigned char)s[i] & 0xc0) != 0x80) c++;
    return c;
}

/* Without memory nobody knows: out has failed then. */
static bool same_text(tr_buf *out, const tr_record_options *o, int32_t a, int32_t b)
{
    size_t na, nb;
    char sa[32], sb[32];
    const char *ta = tr_token_bytes(o, a, sa, &na), *tb = tr_token_bytes(o, b, sb, &nb);
    if (na == nb && !memcmp(ta, tb, na)) return true;
    /* Ill-formed bytes may be spelled alike once they are replaced. */
    bool whole = tr_utf8_valid(ta, na, NULL) && tr_utf8_valid(tb, nb, NULL);
    if (whole) return false;
    tr_buf ra = {0}, rb = {0};
    tr_write_text(&ra, ta, na);
    tr_write_text(&rb, tb, nb);
    if (ra.failed || rb.failed) out->failed = true;
    bool same = ra.n == rb.n && (ra.n == 0 || !memcmp(ra.s, rb.s, ra.n));
    free(ra.s);
    free(rb.s);
    return same;
}

/* One map of token text to log-probability: the token itself, then the best. A text that is
 * there already (two tokens that are parts of characters, say) is spelled by its id, for keys
 * must differ. */
static void write_top_map(tr_buf *out, const tr_record_options *o, const tr_scores *s, int i,
                          int32_t token, int wanted)
{
    int32_t seen[1 + TR_ASKED_LOGPROBS_MAX];
    int n_seen = 0, n = n_top(s, wanted);

    tr_buf_puts(out, "{");
    for (int k = -1; k < n; k++) {
        size_t at = (size_t)i * (size_t)s->n_top + (size_t)(k < 0 ? 0 : k);
        int32_t t = k < 0 ? token : s->top_token[at];
        bool twice = false, spelled = false;
        if (t < 0) break;
        for (int j = 0; j < n_seen; j++) {
            twice = twice || seen[j] == t;
            spelled = spelled || same_text(out, o, seen[j], t);
        }
        if (twice) continue;
        if (n_seen) tr_buf_puts(out, ",");
        if (spelled)
            tr_buf_printf(out, "\"token_id:%d\"", t);
        else
            write_token(out, o, t);
        tr_buf_puts(out, ":");
        tr_write_logprob(out, k < 0 ? s->logprob[i] : s->top_logprob[at]);
        seen[n_seen++] = t;
    }
    tr_buf_puts(out, "}");
}

/* One of the four parallel lists. */
static void write_list(tr_buf *out, const tr_record_options *o, const run *runs, int what,
                       int wanted, bool *first)
{
    for (size_t i = 0; i < runs->n; i++) {
        long at = runs->scores && i >= runs->first_scored ? (long)(i - runs->first_scored) : -1;
        if (!*first) tr_buf_puts(out, ",");
        *first = false;
        if (what == 0)
            write_token(out, o, runs->token[i]);
        else if (at < 0 || at >= runs->scores->n)
            tr_buf_puts(out, "null"); /* the first token of a prompt follows nothing */
        else if (what == 1)
            tr_write_logprob(out, runs->scores->logprob[at]);
        else
            write_top_map(out, o, runs->scores, (int)at, runs->token[i], wanted);
    }
}

/* Does a token of the prompt (i-th) or of the answer (i < 0) stand in the choice's text? */
static bool in_text(const tr_record_options *o, const tr_asked *asked, int32_t t, long i)
{
    if (!o->tokenizer || (i == 0 && asked->bos_added)) return false;
    if (i < 0 && (t == o->eos || t == o->bos || t == o->pad)) return false;
    bool as_sent = i >= 0 && asked->prompt_text;
    return as_sent || !asked->skip_special || !tr_tokenizer_special(o->tokenizer, t);
}

void tr_write_completion_logprobs(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                                  const tr_event *event, const tr_choice *choice)
{
    static const char *const names[] = {"\"tokens\":[", "],\"token_logprobs\":[",
                                        "],\"top_logprobs\":["};
    const tr_request *r = event->request;
    const run runs[2] = {
        {r->prompt, asked->echo ? r->n_prompt : 0, &event->prompt_scores, 1},
        {choice->token, (size_t)choice->n_token, &choice->scores, 0},
    };
    tr_meter meter = {0};
    size_t offset = 0;
    bool first = true;

    if (asked->n_logprobs < 0) {
        tr_buf_puts(out, "null");
        return;
    }
    tr_buf_puts(out, "{");
    for (int what = 0; what < 3; what++) {
        tr_buf_puts(out, names[what]);
        first = true;
        for (int k = 0; k < 2; k++)
            write_list(out, o, &runs[k], what, asked->n_logprobs, &first);
    }
    tr_buf_puts(out, "],\"text_offset\":[");
    first = true;
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < runs[k].n; i++) {
            int32_t t = runs[k].token[i];
            tr_buf_printf(out, first ? "%zu" : ",%zu", offset);
            first = false;
            if (!in_text(o, asked, t, k ? -1 : (long)i)) continue;
            size_t n;
            const char *text = tr_meter_token(&meter, o, t, &n);
            offset += characters(text, n);
        }
    }
    tr_buf_puts(out, "]}");
    if (meter.failed) out->failed = true;
    free(meter.room);
}

/* ---- the prompt, as vLLM writes it ----------------------------------------------------------- */

static void write_prompt_entry(tr_buf *out, const tr_record_options *o, int32_t token,
                               float logprob, int rank, bool first)
{
    tr_buf_printf(out, first ? "\"%d\":{\"logprob\":" : ",\"%d\":{\"logprob\":", token);
    tr_write_logprob(out, logprob);
    tr_buf_printf(out, ",\"rank\":%d,\"decoded_token\":", rank);
    if (o->tokenizer)
        write_token(out, o, token);
    else
        tr_buf_puts(out, "null");
    tr_buf_puts(out, "}");
}

void tr_write_prompt_logprobs(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                              const tr_event *event)
{
    const tr_scores *s = &event->prompt_scores;
    const tr_request *r = event->request;

    tr_buf_puts(out, "[null");
    for (int i = 0; i < s->n && (size_t)i + 1 < r->n_prompt; i++) {
        int32_t token = r->prompt[i + 1];
        tr_buf_puts(out, ",{");
        write_prompt_entry(out, o, token, s->logprob[i], s->rank[i], true);
        for (int k = 0; k < n_top(s, asked->n_prompt_logprobs); k++) {
            size_t at = (size_t)i * (size_t)s->n_top + (size_t)k;
            if (s->top_token[at] < 0) break;
            if (s->top_token[at] != token)
                write_prompt_entry(out, o, s->top_token[at], s->top_logprob[at], k + 1, false);
        }
        tr_buf_puts(out, "}");
    }
    tr_buf_puts(out, "]");
}
