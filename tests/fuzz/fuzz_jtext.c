/* JSON text as text. The tree's spans nest; jansson agrees about what is JSON; a respelled value is the same value, and
 * respelling it again changes nothing. */
#include <config.h>

#include <jansson.h>

#include "tests/fuzz/fuzz.h"
#include "text/jtext.h"
#include "text/utf8.h"

static size_t check_node(const tr_jtext *t, const tr_jnode *n, int depth)
{
    size_t at = n->begin, count = 0;

    FUZZ_CHECK(depth <= 512 && n->begin < n->end, "a node [%zu, %zu)", n->begin, n->end);
    for (const tr_jnode *c = tr_jtext_child(t, n); c; c = tr_jtext_next(t, c), count++) {
        FUZZ_CHECK(c->begin > at && c->end < n->end, "child [%zu, %zu) in [%zu, %zu)", c->begin,
                   c->end, n->begin, n->end);
        FUZZ_CHECK((c->key_end > c->key_begin) == (n->type == TR_J_OBJECT), "key of a member");
        FUZZ_CHECK(n->type != TR_J_OBJECT || (c->key_begin > at && c->key_end < c->begin), "key");
        at = c->end - 1;
        check_node(t, c, depth + 1);
    }
    FUZZ_CHECK(count == (size_t)n->n_children, "%zu children, %d counted", count, n->n_children);
    return count;
}

static json_t *by_jansson(const char *text, size_t n, json_error_t *e)
{
    return json_loadb(text, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, e);
}

/* What jansson refuses and RFC 8259 allows: numbers beyond its types, lone surrogates, a NUL in a key. */
static int may_differ(const json_error_t *e)
{
    enum json_error_code code = json_error_code(e);
    return code == json_error_numeric_overflow || code == json_error_null_byte_in_key ||
           code == json_error_null_character || strstr(e->text, "nicode") ||
           strstr(e->text, "nvalid escape");
}

static void check_respelled(const tr_jtext *t, const json_t *value)
{
    tr_jtext *again = NULL;
    tr_buf once = {0}, twice = {0};
    json_error_t e;
    tr_err err = {0};

    tr_status st = tr_jtext_respell(t, tr_jtext_root(t), &once, &err);
    if (st != TR_OK) {
        FUZZ_CHECK(st == TR_E_INPUT && strstr(err.text, "double range") && !value, "%s", err.text);
        goto done;
    }
    FUZZ_CHECK(tr_utf8_valid(once.s, once.n, NULL), "respelled text is no UTF-8");
    st = tr_jtext_parse(&again, once.s, once.n, NULL, &err);
    FUZZ_CHECK(st == TR_OK, "respelled text is no JSON: %s: %s", err.text, once.s);
    st = tr_jtext_respell(again, tr_jtext_root(again), &twice, &err);
    FUZZ_CHECK(st == TR_OK && twice.n == once.n && !memcmp(once.s, twice.s, once.n), "%s, then %s",
               once.s, twice.s ? twice.s : err.text);
    if (value) {
        json_t *other = by_jansson(once.s, once.n, &e);
        FUZZ_CHECK(other && json_equal(other, value), "another value: %s", once.s);
        json_decref(other);
    }
done:
    tr_jtext_free(again);
    free(once.s);
    free(twice.s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char *text = fuzz_copy(data, n);
    tr_jtext *t = NULL;
    json_error_t e = {0};
    tr_err err = {0};
    size_t at = 0;

    json_t *value = by_jansson(text, n, &e);
    tr_status st = tr_jtext_parse(&t, text, n, &at, &err);
    if (st == TR_OK) {
        FUZZ_CHECK(value || may_differ(&e), "jansson refuses it: %s", e.text);
        check_node(t, tr_jtext_root(t), 0);
        check_respelled(t, value);
        tr_jtext_free(t);
    } else {
        FUZZ_CHECK(st == TR_E_INPUT && !t && at <= n, "status %d at %zu", st, at);
        /* A NUL behind a number is one thing that jansson does not see. */
        FUZZ_CHECK(!value || strstr(err.text, "too deep") || memchr(text, 0, n),
                   "jansson takes it: %s", err.text);
    }
    json_decref(value);
    free(text);
    return 0;
}
