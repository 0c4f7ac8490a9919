/* JSON text as Python's json.dumps(value, ensure_ascii=False) writes it (chat.md 2.3): the form the model was trained on. */
#include <config.h>

#include "text/jtext.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"

void tr_json_quote(tr_buf *out, const char *s, size_t n)
{
    static const char special[] = "\"\\\n\r\t\b\f", letter[] = "\"\\nrtbf";
    size_t done = 0;

    tr_buf_add(out, "\"", 1);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        if (i > done) tr_buf_add(out, s + done, i - done);
        done = i + 1;
        const char *at = c ? strchr(special, c) : NULL;
        if (at)
            tr_buf_add(out, (char[2]){'\\', letter[at - special]}, 2);
        else
            tr_buf_printf(out, "\\u%04x", c);
    }
    if (n > done) tr_buf_add(out, s + done, n - done);
    tr_buf_add(out, "\"", 1);
}

/* ---- repeated keys ----------------------------------------------------------------------------------------------- */

typedef struct keyed {
    size_t at, n;   /* the decoded key, in a buffer */
    size_t ordinal; /* place in the object */
    const tr_jnode *node;
} keyed;

static int compare_keys(const void *pa, const void *pb, void *buffer)
{
    const keyed *a = pa, *b = pb;
    const char *s = buffer;
    size_t n = a->n < b->n ? a->n : b->n;
    int c = n ? memcmp(s + a->at, s + b->at, n) : 0;

    if (c) return c;
    if (a->n != b->n) return a->n < b->n ? -1 : 1;
    return a->ordinal < b->ordinal ? -1 : 1;
}

static bool same_key(const keyed *a, const keyed *b, const char *s)
{
    return a->n == b->n && (a->n == 0 || memcmp(s + a->at, s + b->at, a->n) == 0);
}

/* Sorting, not hashing: keys come from a stranger, and n log n holds for every choice of them. */
tr_status tr_jtext_members(const tr_jtext *t, const tr_jnode *n, const tr_jnode ***out,
                           size_t *n_out, tr_err *err)
{
    tr_status st = TR_OK;
    size_t n_keys = n->type == TR_J_OBJECT ? (size_t)n->n_children : 0, i = 0;
    const tr_jnode **place = tr_calloc(n_keys, sizeof *place); /* by ordinal; NULL: a repetition */
    keyed *key = tr_calloc(n_keys, sizeof *key);
    tr_buf keys = {0};

    *out = NULL;
    *n_out = 0;
    if (!place || !key) goto no_memory;
    for (const tr_jnode *c = n_keys ? tr_jtext_child(t, n) : NULL; c;
         c = tr_jtext_next(t, c), i++) {
        size_t at = keys.n;
        tr_jtext_key(t, c, &keys);
        key[i] = (keyed){.at = at, .n = keys.n - at, .ordinal = i, .node = c};
    }
    if (keys.failed) goto no_memory;
    if (n_keys > 1) qsort_r(key, n_keys, sizeof *key, compare_keys, keys.s);
    for (size_t begin = 0, end; begin < n_keys; begin = end) {
        for (end = begin + 1; end < n_keys && same_key(&key[begin], &key[end], keys.s);)
            end++;
        place[key[begin].ordinal] = key[end - 1].node;
    }
    for (i = 0; i < n_keys; i++)
        if (place[i]) place[(*n_out)++] = place[i];
    *out = place;
    place = NULL;
    goto done;

no_memory:
    st = tr_fail(err, TR_E_MEMORY, "out of memory");
done:
    free(place);
    free(key);
    free(keys.s);
    return st;
}

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

/* Significant digits of a decimal without sign: value = 0.d1d2d3... * 10^point. */
typedef struct decimal {
    char digit[20];
    int n, point;
} decimal;

/* x > 0 correctly rounded to n digits. The locale is C: the program never sets another. */
static decimal round_to(double x, int n)
{
    char text[40];
    decimal d = {.n = n};

    snprintf(text, sizeof text, "%.*e", n - 1, x); /* d.ddde[+-]dd, or de[+-]dd */
    d.digit[0] = text[0];
    if (n > 1) memcpy(d.digit + 1, text + 2, (size_t)n - 1);
    d.point = (int)strtol(strchr(text, 'e') + 1, NULL, 10) + 1;
    return d;
}

static double read_back(const decimal *d)
{
    char text[40];

    snprintf(text, sizeof text, ".%.*se%d", d->n, d->digit, d->point);
    return strtod(text, NULL);
}

static decimal next_up(decimal d)
{
    int i = d.n - 1;

    while (i >= 0 && d.digit[i] == '9')
        d.digit[i--] = '0';
    if (i >= 0) {
        d.digit[i]++;
    } else {
        d.digit[0] = '1';
        d.point++;
    }
    return d;
}

/* The fewest digits that read back as x > 0, and of those the nearest. Normal numbers keep every decimal of DBL_DIG
 * digits, so if 15 digits read back, the shortest is those 15 without their zeros; subnormals try every length. Below a
 * power of two the neighbours lie half as far as above it: the nearest 16 digits may fail where the next above do not
 * (2^-44). */
static decimal shortest(double x)
{
    decimal d;

    for (int n = x < DBL_MIN ? 1 : DBL_DIG;; n++) {
        d = round_to(x, n);
        if (n == 17 || read_back(&d) == x) break;
        decimal up = next_up(d);
        if (read_back(&up) == x) {
            d = up;
            break;
        }
    }
    while (d.n > 1 && d.digit[d.n - 1] == '0')
        d.n--;
    return d;
}

static void put_zeros(tr_buf *out, int n)
{
    while (n-- > 0)
        tr_buf_add(out, "0", 1);
}

static void put_double(tr_buf *out, double x)
{
    if (signbit(x)) tr_buf_add(out, "-", 1);
    if (x == 0) {
        tr_buf_puts(out, "0.0");
        return;
    }
    decimal d = shortest(fabs(x));
    if (d.point - 1 < -4 || d.point - 1 >= 16) {
        tr_buf_add(out, d.digit, 1);
        if (d.n > 1) tr_buf_printf(out, ".%.*s", d.n - 1, d.digit + 1);
        tr_buf_printf(out, "e%+03d", d.point - 1);
    } else if (d.point <= 0) {
        tr_buf_puts(out, "0.");
        put_zeros(out, -d.point);
        tr_buf_add(out, d.digit, (size_t)d.n);
    } else if (d.point >= d.n) {
        tr_buf_add(out, d.digit, (size_t)d.n);
        put_zeros(out, d.point - d.n);
        tr_buf_puts(out, ".0");
    } else {
        tr_buf_printf(out, "%.*s.%.*s", d.point, d.digit, d.n - d.point, d.digit + d.point);
    }
}

/* The n bytes at s are a JSON number. An integer keeps its digits, however many. */
static tr_status put_number(tr_buf *out, const char *s, size_t n, tr_err *err)
{
    tr_status st = TR_OK;
    tr_buf copy = {0}; /* strtod wants an end */

    bool real = memchr(s, '.', n) || memchr(s, 'e', n) || memchr(s, 'E', n);
    if (!real) {
        if (n == 2 && memcmp(s, "-0", 2) == 0)
            tr_buf_puts(out, "0");
        else
            tr_buf_add(out, s, n);
        return TR_OK;
    }
    tr_buf_add(&copy, s, n);
    if (copy.failed) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    double x = strtod(copy.s, NULL);
    if (isinf(x)) {
        st = tr_fail(err, TR_E_INPUT, "number beyond the double range: %.40s", copy.s);
        goto done;
    }
    put_double(out, x);

done:
    free(copy.s);
    return st;
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

typedef struct speller {
    const tr_jtext *t;
    tr_buf *out;
    tr_buf scratch; /* a decoded string */
    tr_err *err;
} speller;

static tr_status put_value(speller *sp, const tr_jnode *n);

static void put_scratch(speller *sp)
{
    if (sp->scratch.failed) sp->out->failed = true;
    tr_json_quote(sp->out, sp->scratch.s ? sp->scratch.s : "", sp->scratch.n);
    sp->scratch.n = 0;
}

static tr_status put_array(speller *sp, const tr_jnode *n)
{
    const char *before = "[";

    for (const tr_jnode *c = tr_jtext_child(sp->t, n); c; c = tr_jtext_next(sp->t, c)) {
        tr_buf_puts(sp->out, before);
        tr_status st = put_value(sp, c);
        if (st != TR_OK) return st;
        before = ", ";
    }
    tr_buf_puts(sp->out, n->n_children ? "]" : "[]");
    return TR_OK;
}

static tr_status put_object(speller *sp, const tr_jnode *n)
{
    const tr_jnode **member;
    size_t n_members;
    tr_status st = tr_jtext_members(sp->t, n, &member, &n_members, sp->err);

    if (st != TR_OK) return st;
    tr_buf_add(sp->out, "{", 1);
    for (size_t i = 0; i < n_members; i++) {
        if (i) tr_buf_puts(sp->out, ", ");
        tr_jtext_key(sp->t, member[i], &sp->scratch);
        put_scratch(sp);
        tr_buf_puts(sp->out, ": ");
        st = put_value(sp, member[i]);
        if (st != TR_OK) goto done;
    }
    tr_buf_add(sp->out, "}", 1);

done:
    free(member);
    return st;
}

/* Recursion goes as deep as the parser allowed: 512. */
static tr_status put_value(speller *sp, const tr_jnode *n)
{
    const char *s = tr_jtext_raw(sp->t) + n->begin;

    switch (n->type) {
    case TR_J_NULL:
    case TR_J_FALSE:
    case TR_J_TRUE:
        tr_buf_add(sp->out, s, n->end - n->begin);
        return TR_OK;
    case TR_J_NUMBER:
        return put_number(sp->out, s, n->end - n->begin, sp->err);
    case TR_J_STRING:
        tr_jtext_string(sp->t, n, &sp->scratch);
        put_scratch(sp);
        return TR_OK;
    case TR_J_ARRAY:
        return put_array(sp, n);
    case TR_J_OBJECT:
        return put_object(sp, n);
    }
    return TR_OK;
}

tr_status tr_jtext_respell(const tr_jtext *t, const tr_jnode *n, tr_buf *out, tr_err *err)
{
    speller sp = {.t = t, .out = out, .err = err};
    tr_status st = put_value(&sp, n);

    free(sp.scratch.s);
    if (st == TR_OK && out->failed) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    return st;
}
