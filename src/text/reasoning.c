/* Generated text into reasoning and content (chat.md 3.2), tools off. */
#include <config.h>

#include "text/chat.h"

#include <stdlib.h>
#include <string.h>

#include "text/chat_priv.h"

/* FIRST: nothing of the field but white space (content) or nothing at all (reasoning) has been seen. Content behind a
 * closed think block is plain from its beginning: a second <think> opens nothing. */
enum { REASONING_FIRST, REASONING, CONTENT_FIRST, CONTENT, ENDED };

typedef enum marker { MARK_THINK, MARK_UNTHINK, MARK_EOS, N_MARKS } marker;

/* Each has one '<', in front: where a beginning of one turns out to be text, no other can begin inside it. */
static const char *const mark_text[N_MARKS] = {TR_THINK_TEXT, TR_UNTHINK_TEXT, TR_EOS_TEXT};

static bool counts(int state, marker m)
{
    switch (m) {
    case MARK_THINK:
        return state == REASONING_FIRST || state == CONTENT_FIRST;
    case MARK_UNTHINK:
        return state == REASONING_FIRST || state == REASONING;
    default:
        return state != ENDED;
    }
}

static bool in_reasoning(const tr_reasoning *r)
{
    return r->state == REASONING_FIRST || r->state == REASONING;
}

void tr_reasoning_begin(tr_reasoning *r, tr_parse_start start)
{
    bool reasoning = start == TR_START_REASONING;
    *r = (tr_reasoning){.state = reasoning ? REASONING_FIRST : CONTENT_FIRST,
                        .has_reasoning = reasoning};
}

/* What was held is text after all. */
static void release(tr_reasoning *r)
{
    tr_buf_add(in_reasoning(r) ? &r->reasoning : &r->content, r->held.s, r->held.n);
    r->held.n = r->blank = 0;
}

static void put(tr_reasoning *r, const char *s, size_t n)
{
    if (r->held.n) release(r);
    tr_buf_add(in_reasoning(r) ? &r->reasoning : &r->content, s, n);
    r->state = in_reasoning(r) ? REASONING : CONTENT;
}

/* A whole marker stands at the end of held; at: bytes of input up to and including it. */
static void take(tr_reasoning *r, marker m, size_t at)
{
    if (m == MARK_THINK) {
        r->has_reasoning = true; /* white space in front goes with it */
        r->state = REASONING;
    } else if (m == MARK_UNTHINK) {
        r->reasoning_bytes = at;
        r->state = CONTENT;
    } else {
        r->held.n = r->blank;
        release(r);
        r->state = ENDED;
    }
    r->held.n = r->blank = 0;
}

/* held, behind its white space, against the markers: true while it may still become one, or was taken. */
static bool match(tr_reasoning *r, size_t at)
{
    const char *s = r->held.s + r->blank;
    size_t n = r->held.n - r->blank;

    for (marker m = 0; m < N_MARKS; m++) {
        size_t whole = strlen(mark_text[m]);
        if (!counts(r->state, m) || n > whole || memcmp(s, mark_text[m], n) != 0) continue;
        if (n == whole) take(r, m, at);
        return true;
    }
    return false;
}

static void step(tr_reasoning *r, char c, size_t at)
{
    if (r->held.n > r->blank) {
        tr_buf_add(&r->held, &c, 1);
        if (r->held.failed || match(r, at)) return;
        r->held.n--;
        put(r, "", 0);
    }
    if (c == '<') {
        tr_buf_add(&r->held, &c, 1);
    } else if (r->state == CONTENT_FIRST && (c == ' ' || c == '\t' || c == '\r' || c == '\n')) {
        tr_buf_add(&r->held, &c, 1);
        r->blank = r->held.n;
    } else {
        put(r, &c, 1);
    }
}

void tr_reasoning_feed(tr_reasoning *r, const char *s, size_t n)
{
    size_t i = 0;

    while (i < n && r->state != ENDED && !r->held.failed) {
        const char *mark = memchr(s + i, '<', n - i);
        size_t plain = mark ? (size_t)(mark - s) - i : n - i;
        if (plain && !r->held.n && r->state != CONTENT_FIRST) {
            put(r, s + i, plain);
            i += plain;
        } else {
            step(r, s[i], r->seen + i + 1);
            i++;
        }
    }
    r->seen += n;
}

void tr_reasoning_finish(tr_reasoning *r)
{
    if (r->state != ENDED) release(r);
    r->state = ENDED;
}

void tr_reasoning_free(tr_reasoning *r)
{
    free(r->reasoning.s);
    free(r->content.s);
    free(r->held.s);
    *r = (tr_reasoning){0};
}
