#include <config.h>

#include "batch/envelope.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "text/utf8.h"

/* The code unit of the escape \uXXXX at s, or -1. */
static int escape_at(const char *s, size_t n)
{
    int v = 0;
    if (n < 6 || s[0] != '\\' || s[1] != 'u') return -1;
    for (int i = 2; i < 6; i++) {
        char c = s[i];
        int d = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
        if (d < 0) return -1;
        v = v * 16 + d;
    }
    return v;
}

void tr_surrogates_replace(char *text, size_t n)
{
    size_t i = 0;
    while (i < n) {
        char *p = memchr(text + i, '\\', n - i);
        if (!p) return;
        i = (size_t)(p - text);
        int u = escape_at(p, n - i);
        if (u < 0xd800 || u > 0xdfff) {
            i += u < 0 ? 2 : 6; /* \\ is two: its second backslash starts nothing */
            continue;
        }
        int low = u < 0xdc00 ? escape_at(p + 6, n - i - 6) : -1;
        if (low >= 0xdc00 && low <= 0xdfff) {
            i += 12;
            continue;
        }
        memcpy(p + 2, "fffd", 4);
        i += 6;
    }
}

/* The line into e->text, as UTF-8. */
static tr_status take_text(tr_envelope *e, const tr_line *line, tr_err *err)
{
    e->text.n = 0;
    e->bad_utf8 = !tr_utf8_valid(line->text, line->n, &e->bad_at);
    if (!e->bad_utf8) {
        tr_buf_add(&e->text, line->text, line->n);
    } else {
        size_t room;
        char *repaired = tr_mul(&room, line->n, 3) ? malloc(room) : NULL;
        if (!repaired)
            return tr_fail(err, TR_E_MEMORY, "line %ju: out of memory", (uintmax_t)line->number);
        tr_buf_add(&e->text, repaired, tr_utf8_repair(line->text, line->n, repaired));
        free(repaired);
    }
    if (e->text.failed)
        return tr_fail(err, TR_E_MEMORY, "line %ju: out of memory", (uintmax_t)line->number);
    tr_surrogates_replace(e->text.s, e->text.n);
    return TR_OK;
}

static void fault(tr_envelope *e, size_t at, const char *what)
{
    e->fault_at = at;
    snprintf(e->fault, sizeof e->fault, "%.*s", (int)sizeof e->fault - 1, what);
}

/* Exactly one custom_id, a non-empty string. Of a repeated one nobody can say which was meant. */
static void find_id(tr_envelope *e)
{
    const tr_jnode *id = NULL;
    if (e->root->type != TR_J_OBJECT) {
        fault(e, e->root->begin, "the line is not a JSON object");
        return;
    }
    for (const tr_jnode *m = tr_jtext_child(e->json, e->root); m; m = tr_jtext_next(e->json, m)) {
        if (!tr_jtext_key_is(e->json, m, "custom_id")) continue;
        if (id) {
            fault(e, m->key_begin, "custom_id is given twice");
            return;
        }
        id = m;
    }
    if (!id) {
        fault(e, e->root->begin, "custom_id is missing");
    } else if (id->type != TR_J_STRING) {
        fault(e, id->begin, "custom_id is not a string");
    } else {
        tr_jtext_string(e->json, id, &e->id);
        if (!e->id.n)
            fault(e, id->begin, "custom_id is empty");
        else if (e->bad_utf8 && memmem(e->id.s, e->id.n, "\xef\xbf\xbd", 3))
            fault(e, e->bad_at, "custom_id is not UTF-8");
        else
            e->has_id = true;
    }
}

tr_status tr_envelope_read(tr_envelope *e, const tr_line *line, tr_err *err)
{
    tr_err why;
    size_t at = 0;

    tr_jtext_free(e->json);
    e->json = NULL;
    e->root = NULL;
    e->has_id = false;
    e->id.n = 0;
    e->fault_at = 0;
    e->fault[0] = 0;
    e->line = line->number;
    e->key = tr_key_line(line->number);
    if (line->too_long) {
        e->text.n = 0;
        e->bad_utf8 = false;
        snprintf(e->fault, sizeof e->fault, "the line has %ju bytes, more than a request may have",
                 (uintmax_t)line->bytes);
        return TR_OK;
    }
    tr_status st = take_text(e, line, err);
    if (st != TR_OK) return st;
    st = tr_jtext_parse(&e->json, e->text.s, e->text.n, &at, &why);
    if (st == TR_E_MEMORY) {
        e->json = NULL;
        return tr_fail(err, st, "line %ju: %s", (uintmax_t)line->number, why.text);
    }
    if (st != TR_OK) {
        e->json = NULL;
        /* In a repaired line offsets have moved: the first bad byte is where the fault begins. */
        fault(e, e->bad_utf8 ? e->bad_at : at, e->bad_utf8 ? "not UTF-8, and not JSON" : why.text);
        return TR_OK;
    }
    e->root = tr_jtext_root(e->json);
    find_id(e);
    if (e->id.failed)
        return tr_fail(err, TR_E_MEMORY, "line %ju: out of memory", (uintmax_t)line->number);
    if (e->has_id) e->key = tr_key_id(e->id.s, e->id.n);
    return TR_OK;
}

void tr_envelope_free(tr_envelope *e)
{
    if (!e) return;
    tr_jtext_free(e->json);
    free(e->text.s);
    free(e->id.s);
    memset(e, 0, sizeof *e);
}
