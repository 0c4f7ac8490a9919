#include <config.h>

#include "text/jtext.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "text/utf8.h"

enum { MAX_DEPTH = 512 };

/* Longest text: node indices are int, and two bytes make at most one node. */
#define MAX_BYTES ((size_t)INT_MAX)

struct tr_jtext {
    const char *raw; /* borrowed */
    tr_jnode *node;
    int n_nodes, cap;
};

/* The parser never recurses: `open` holds the containers around the current place, `last` their newest child. */
typedef struct parser {
    tr_jtext *t;
    const char *s;
    size_t n, i;
    int depth;
    int open[MAX_DEPTH], last[MAX_DEPTH];
    size_t key_begin, key_end;
    const char *fault; /* what was wrong at s[i] */
    bool out_of_memory;
} parser;

static bool fault(parser *p, size_t at, const char *what)
{
    p->i = at;
    p->fault = what;
    return false;
}

static void skip_space(parser *p)
{
    while (p->i < p->n &&
           (p->s[p->i] == ' ' || p->s[p->i] == '\t' || p->s[p->i] == '\n' || p->s[p->i] == '\r'))
        p->i++;
}

static bool at_digit(const parser *p)
{
    return p->i < p->n && p->s[p->i] >= '0' && p->s[p->i] <= '9';
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

/* s[i] is the backslash. */
static bool scan_escape(parser *p)
{
    static const char *const bad = "unknown escape in a string";

    if (++p->i == p->n) return fault(p, p->i, "string without an end");
    if (p->s[p->i] != 'u') {
        if (!memchr("\"\\/bfnrt", p->s[p->i], 8)) return fault(p, p->i, bad);
        p->i++;
        return true;
    }
    p->i++;
    for (int k = 0; k < 4; k++, p->i++) {
        if (p->i == p->n) return fault(p, p->i, "string without an end");
        if (hex_value(p->s[p->i]) < 0) return fault(p, p->i, "\\u without four hex digits");
    }
    return true;
}

/* s[i] is the opening quote. */
static bool scan_string(parser *p)
{
    p->i++;
    while (p->i < p->n) {
        unsigned char c = (unsigned char)p->s[p->i];
        if (c == '"') {
            p->i++;
            return true;
        }
        if (c == '\\') {
            if (!scan_escape(p)) return false;
        } else if (c < 0x20) {
            return fault(p, p->i, "raw control character in a string");
        } else if (c < 0x80) {
            p->i++;
        } else {
            int len = tr_utf8_next((const unsigned char *)p->s + p->i, p->n - p->i);
            if (len <= 0) return fault(p, p->i, "ill-formed UTF-8");
            p->i += (size_t)len;
        }
    }
    return fault(p, p->i, "string without an end");
}

static bool scan_digits(parser *p)
{
    if (!at_digit(p)) return fault(p, p->i, "number without a digit");
    while (at_digit(p))
        p->i++;
    return true;
}

static bool scan_number(parser *p)
{
    if (p->s[p->i] == '-') p->i++;
    if (p->i < p->n && p->s[p->i] == '0')
        p->i++; /* a digit behind it is then "text after the value" */
    else if (!scan_digits(p))
        return false;
    if (p->i < p->n && p->s[p->i] == '.') {
        p->i++;
        if (!scan_digits(p)) return false;
    }
    if (p->i < p->n && (p->s[p->i] == 'e' || p->s[p->i] == 'E')) {
        p->i++;
        if (p->i < p->n && (p->s[p->i] == '+' || p->s[p->i] == '-')) p->i++;
        if (!scan_digits(p)) return false;
    }
    return true;
}

static bool scan_word(parser *p, const char *word)
{
    for (; *word; word++, p->i++)
        if (p->i == p->n || p->s[p->i] != *word) return fault(p, p->i, "not a JSON value");
    return true;
}

static bool grow(parser *p)
{
    tr_jtext *t = p->t;
    int cap = t->cap <= INT_MAX / 2 ? t->cap * 2 : INT_MAX;
    size_t bytes;

    if (t->n_nodes == INT_MAX || !tr_mul(&bytes, (size_t)cap, sizeof *t->node)) {
        p->out_of_memory = true;
        return false;
    }
    tr_jnode *node = realloc(t->node, bytes);
    if (!node) {
        p->out_of_memory = true;
        return false;
    }
    t->node = node;
    t->cap = cap;
    return true;
}

/* A node that begins at s[i], linked behind its elder sibling. */
static bool add_node(parser *p, tr_jtype type)
{
    tr_jtext *t = p->t;
    int index = t->n_nodes;

    if (t->n_nodes == t->cap && !grow(p)) return false;
    t->node[t->n_nodes++] = (tr_jnode){
        .type = type,
        .begin = p->i,
        .key_begin = p->key_begin,
        .key_end = p->key_end,
        .child = -1,
        .next = -1,
    };
    p->key_begin = p->key_end = 0;
    if (p->depth) {
        tr_jnode *parent = &t->node[p->open[p->depth - 1]];
        int *elder = &p->last[p->depth - 1];
        if (*elder < 0)
            parent->child = index;
        else
            t->node[*elder].next = index;
        *elder = index;
        parent->n_children++;
    }
    return true;
}

static bool parse_scalar(parser *p)
{
    int index = p->t->n_nodes;
    char c = p->s[p->i];
    bool ok;

    if (c == '"')
        ok = add_node(p, TR_J_STRING) && scan_string(p);
    else if (c == '-' || (c >= '0' && c <= '9'))
        ok = add_node(p, TR_J_NUMBER) && scan_number(p);
    else if (c == 't')
        ok = add_node(p, TR_J_TRUE) && scan_word(p, "true");
    else if (c == 'f')
        ok = add_node(p, TR_J_FALSE) && scan_word(p, "false");
    else if (c == 'n')
        ok = add_node(p, TR_J_NULL) && scan_word(p, "null");
    else
        return fault(p, p->i, "not a JSON value");
    if (ok) p->t->node[index].end = p->i;
    return ok;
}

static bool parse_key(parser *p)
{
    skip_space(p);
    if (p->i == p->n || p->s[p->i] != '"') return fault(p, p->i, "expected a key");
    p->key_begin = p->i;
    if (!scan_string(p)) return false;
    p->key_end = p->i;
    skip_space(p);
    if (p->i == p->n || p->s[p->i] != ':') return fault(p, p->i, "expected ':'");
    p->i++;
    return true;
}

/* s[i] opens a container. *ended: it was empty; else the place is before its first value. */
static bool parse_open(parser *p, bool *ended)
{
    bool object = p->s[p->i] == '{';
    int index = p->t->n_nodes;

    if (p->depth == MAX_DEPTH) return fault(p, p->i, "nested too deep");
    if (!add_node(p, object ? TR_J_OBJECT : TR_J_ARRAY)) return false;
    p->i++;
    skip_space(p);
    if (p->i < p->n && p->s[p->i] == (object ? '}' : ']')) {
        p->t->node[index].end = ++p->i;
        *ended = true;
        return true;
    }
    p->open[p->depth] = index;
    p->last[p->depth] = -1;
    p->depth++;
    *ended = false;
    return !object || parse_key(p);
}

/* Behind a value: closers and at most one comma. The place is then before the next value, or depth is 0. */
static bool parse_behind(parser *p)
{
    while (p->depth) {
        tr_jnode *parent = &p->t->node[p->open[p->depth - 1]];
        bool object = parent->type == TR_J_OBJECT;
        skip_space(p);
        if (p->i == p->n) return fault(p, p->i, "the text ends inside a value");
        if (p->s[p->i] == ',') {
            p->i++;
            return !object || parse_key(p);
        }
        if (p->s[p->i] != (object ? '}' : ']'))
            return fault(p, p->i, object ? "expected ',' or '}'" : "expected ',' or ']'");
        parent->end = ++p->i;
        p->depth--;
    }
    return true;
}

static bool parse_text(parser *p)
{
    do {
        bool ended = true;
        skip_space(p);
        if (p->i == p->n) return fault(p, p->i, "the text ends where a value should be");
        if (p->s[p->i] == '{' || p->s[p->i] == '[') {
            if (!parse_open(p, &ended)) return false;
        } else if (!parse_scalar(p)) {
            return false;
        }
        if (ended && !parse_behind(p)) return false;
    } while (p->depth);
    skip_space(p);
    return p->i == p->n || fault(p, p->i, "text after the value");
}

tr_status tr_jtext_parse(tr_jtext **out, const char *text, size_t n, size_t *at, tr_err *err)
{
    tr_status st = TR_OK;
    parser p = {.s = text, .n = n};
    tr_jtext *t = NULL;

    *out = NULL;
    if (at) *at = 0;
    if (n > MAX_BYTES) return tr_fail(err, TR_E_INPUT, "JSON text of %zu bytes", n);
    t = calloc(1, sizeof *t);
    if (!t) return tr_fail(err, TR_E_MEMORY, "out of memory");
    t->raw = text;
    /* Small texts (a call's arguments) come by the thousand: start small. */
    t->cap = n < 126 ? (int)n / 2 + 1 : 64;
    t->node = tr_calloc((size_t)t->cap, sizeof *t->node);
    p.t = t;
    if (!t->node || (!parse_text(&p) && p.out_of_memory)) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    if (p.fault) {
        if (at) *at = p.i;
        st = tr_fail(err, TR_E_INPUT, "not JSON at byte %zu: %s", p.i, p.fault);
        goto done;
    }
    /* Give back what doubling took too much; if that fails the larger block serves as well. */
    tr_jnode *fit = realloc(t->node, (size_t)t->n_nodes * sizeof *fit);
    if (fit) {
        t->node = fit;
        t->cap = t->n_nodes;
    }
    *out = t;
    t = NULL;

done:
    tr_jtext_free(t);
    return st;
}

void tr_jtext_free(tr_jtext *t)
{
    if (!t) return;
    free(t->node);
    free(t);
}

const char *tr_jtext_raw(const tr_jtext *t)
{
    return t->raw;
}

const tr_jnode *tr_jtext_root(const tr_jtext *t)
{
    return t->node;
}

const tr_jnode *tr_jtext_child(const tr_jtext *t, const tr_jnode *n)
{
    return n->child < 0 ? NULL : &t->node[n->child];
}

const tr_jnode *tr_jtext_next(const tr_jtext *t, const tr_jnode *n)
{
    return n->next < 0 ? NULL : &t->node[n->next];
}

/* Four hex digits at s, already checked. */
static uint32_t hex4(const char *s)
{
    uint32_t v = 0;
    for (int k = 0; k < 4; k++)
        v = v * 16 + (uint32_t)hex_value(s[k]);
    return v;
}

/* The escape at s (a backslash; `end` is the closing quote) as UTF-8 in out; *n its bytes. Returns its length in the text. */
static size_t decode_escape(const char *s, const char *end, char out[4], int *n)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    size_t len = 6;

    if (s[1] != 'u') {
        out[0] = to[strchr(from, s[1]) - from];
        *n = 1;
        return 2;
    }
    uint32_t code = hex4(s + 2);
    if (code >= 0xD800 && code < 0xDC00 && end - s >= 12 && s[6] == '\\' && s[7] == 'u') {
        uint32_t low = hex4(s + 8);
        if (low >= 0xDC00 && low < 0xE000) {
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            len = 12;
        }
    }
    if (code >= 0xD800 && code < 0xE000) code = 0xFFFD; /* chat.md 1.8 */
    *n = tr_utf8_encode(code, out);
    return len;
}

/* [begin, end) of the text is a string with its quotes. */
static void decode_string(const tr_jtext *t, size_t begin, size_t end, tr_buf *out)
{
    const char *s = t->raw + begin + 1, *stop = t->raw + end - 1;

    while (s < stop) {
        const char *escape = memchr(s, '\\', (size_t)(stop - s));
        if (!escape) escape = stop;
        if (escape > s) tr_buf_add(out, s, (size_t)(escape - s));
        s = escape;
        if (s < stop) {
            char utf8[4];
            int n;
            s += decode_escape(s, stop, utf8, &n);
            tr_buf_add(out, utf8, (size_t)n);
        }
    }
}

void tr_jtext_string(const tr_jtext *t, const tr_jnode *n, tr_buf *out)
{
    if (n->type == TR_J_STRING) decode_string(t, n->begin, n->end, out);
}

void tr_jtext_key(const tr_jtext *t, const tr_jnode *n, tr_buf *out)
{
    if (n->key_end > n->key_begin) decode_string(t, n->key_begin, n->key_end, out);
}

/* [begin, end) of the text is a string with its quotes. */
static bool same_string(const tr_jtext *t, size_t begin, size_t end, const char *text)
{
    const char *s = t->raw + begin + 1, *stop = t->raw + end - 1;

    while (s < stop) {
        char utf8[4] = {*s, 0, 0, 0};
        int len = 1;
        if (*s == '\\')
            s += decode_escape(s, stop, utf8, &len);
        else
            s++;
        for (int k = 0; k < len; k++, text++)
            if (!*text || utf8[k] != *text) return false;
    }
    return !*text;
}

bool tr_jtext_key_is(const tr_jtext *t, const tr_jnode *n, const char *key)
{
    return n->key_end > n->key_begin && same_string(t, n->key_begin, n->key_end, key);
}

bool tr_jtext_is(const tr_jtext *t, const tr_jnode *n, const char *text)
{
    return n->type == TR_J_STRING && same_string(t, n->begin, n->end, text);
}

const tr_jnode *tr_jtext_member(const tr_jtext *t, const tr_jnode *n, const char *key)
{
    const tr_jnode *found = NULL;

    if (!n || n->type != TR_J_OBJECT) return NULL;
    for (const tr_jnode *c = tr_jtext_child(t, n); c; c = tr_jtext_next(t, c))
        if (tr_jtext_key_is(t, c, key)) found = c;
    return found;
}

const tr_jnode *tr_jtext_given(const tr_jtext *t, const tr_jnode *n, const char *key)
{
    const tr_jnode *found = tr_jtext_member(t, n, key);
    return found && found->type != TR_J_NULL ? found : NULL;
}
