/* JSON text: strict syntax with offsets, depth, strings, keys, Python's spelling, and mutated texts. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "text/jtext.h"
#include "text/utf8.h"

static tr_jtext *parse(const char *text, size_t n)
{
    tr_jtext *t;
    tr_err err = {0};
    if (tr_jtext_parse(&t, text, n, NULL, &err) != TR_OK) fail_msg("%s: %.80s", err.text, text);
    return t;
}

/* The re-spelt text, the caller's. */
static char *respell(const char *text, size_t n, size_t *n_out)
{
    tr_buf b = {0};
    tr_err err = {0};
    tr_jtext *t = parse(text, n);
    if (tr_jtext_respell(t, tr_jtext_root(t), &b, &err) != TR_OK)
        fail_msg("%s: %.80s", err.text, text);
    tr_jtext_free(t);
    *n_out = b.n;
    return b.s;
}

static void test_accepted(void **state)
{
    static const char *const text[] = {
        "0",
        "-0",
        "1",
        "-12",
        "0.5",
        "1e5",
        "1E+5",
        "1.25e-3",
        "0e0",
        "\"\"",
        "\"a\"",
        "true",
        "false",
        "null",
        "[]",
        "{}",
        " [ ] ",
        "\t{\r\n}\n",
        "[1,2]",
        "[[],{}]",
        "{\"a\":1}",
        "{\"\":[]}",
        "{ \"a\" : { \"b\" : [ ] } , \"c\" : 1 }",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\"",
        "\"\x7f\"",
        "\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"",
        "\"\\ud800\"",
        "123456789012345678901234567890",
        "1e999",
        "{\"a\":1,\"a\":2}",
        "\"\xe2\x80\xa8\"",
    };

    (void)state;
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
        /* A copy of exactly that size: reading behind it is seen by the sanitizer. */
        size_t n = strlen(text[i]);
        char *copy = malloc(n);
        assert_non_null(copy);
        memcpy(copy, text[i], n);
        tr_jtext_free(parse(copy, n));
        free(copy);
    }
}

static void test_refused(void **state)
{
    static const struct {
        const char *text;
        size_t at;
    } c[] = {
        {"", 0},
        {"  ", 2},
        {"01", 1},
        {"-", 1},
        {"-a", 1},
        {"+1", 0},
        {".5", 0},
        {"1.", 2},
        {"1.e5", 2},
        {"1e", 2},
        {"1e+", 3},
        {"0x10", 1},
        {"NaN", 0},
        {"Infinity", 0},
        {"-Infinity", 1},
        {"tru", 3},
        {"True", 0},
        {"nul1", 3},
        {"truex", 4},
        {"1 2", 2},
        {"\"", 1},
        {"\"a", 2},
        {"'a'", 0},
        {"\"\n\"", 1},
        {"\"\x1f\"", 1},
        {"\"\\x\"", 2},
        {"\"\\", 2},
        {"\"\\u12\"", 5},
        {"\"\\u12g4\"", 5},
        {"\"\\u123", 6},
        {"[", 1},
        {"[1", 2},
        {"[1,", 3},
        {"[1,]", 3},
        {"[,1]", 1},
        {"[1 2]", 3},
        {"[1}", 2},
        {"]", 0},
        {"{", 1},
        {"{a:1}", 1},
        {"{\"a\"}", 4},
        {"{\"a\":}", 5},
        {"{\"a\":1", 6},
        {"{\"a\":1,}", 7},
        {"{\"a\":1]", 6},
        {"{\"a\" 1}", 5},
        {"{1:2}", 1},
        {"{\"a\":1 \"b\":2}", 7},
        {"[] []", 3},
        {"// x", 0},
        {"[1/**/]", 2},
        {"\xef\xbb\xbf{}", 0},
        {"\"\xff\"", 1},
        {"\"a\xc3\"", 2},
        {"\"\xed\xa0\x80\"", 1},
        {"\"\xc0\xaf\"", 1},
        {"\"\xf0\x9f\x98", 1},
        {"\xc2\xa0"
         "1",
         0},
        {"1\f", 1},
    };

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        size_t n = strlen(c[i].text), at = 999;
        tr_jtext *t;
        tr_err err = {0};
        char *copy = malloc(n + 1);
        assert_non_null(copy);
        memcpy(copy, c[i].text, n);
        tr_status st = tr_jtext_parse(&t, copy, n, &at, &err);
        if (st != TR_E_INPUT || at != c[i].at)
            fail_msg("status %d at %zu, not at %zu: %s", st, at, c[i].at, c[i].text);
        assert_null(t);
        assert_non_null(strstr(err.text, "not JSON at byte "));
        free(copy);
    }
    /* NUL is a character like another: not white space, not an end. */
    tr_jtext *t;
    size_t at;
    assert_int_equal(tr_jtext_parse(&t, "1\0", 2, &at, NULL), TR_E_INPUT);
    assert_int_equal(at, 1);
    assert_int_equal(tr_jtext_parse(&t, "\"\0\"", 3, &at, NULL), TR_E_INPUT);
    assert_int_equal(at, 1);
    assert_int_equal(tr_jtext_parse(&t, "\"\\\0\"", 4, &at, NULL), TR_E_INPUT);
    assert_int_equal(at, 2);
}

static void test_depth(void **state)
{
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        for (int depth = 511; depth <= 513; depth++) {
            tr_buf b = {0};
            tr_jtext *t;
            size_t at;
            for (int i = 0; i < depth; i++)
                tr_buf_puts(&b, kind && i + 1 < depth ? "{\"a\":" : "[");
            for (int i = 0; i < depth; i++)
                tr_buf_puts(&b, kind && i > 0 ? "}" : "]");
            tr_status st = tr_jtext_parse(&t, b.s, b.n, &at, NULL);
            assert_int_equal(st, depth <= 512 ? TR_OK : TR_E_INPUT);
            if (st == TR_OK) {
                tr_buf out = {0};
                assert_int_equal(tr_jtext_respell(t, tr_jtext_root(t), &out, NULL), TR_OK);
                assert_int_equal(out.n, kind ? b.n + (size_t)depth - 1 : b.n);
                free(out.s);
            } else {
                assert_int_equal(at, kind ? 512 * 5 : 512);
            }
            tr_jtext_free(t);
            free(b.s);
        }
    }
    /* A million openers end at the 513th, without recursion and without a node for each. */
    char *deep = malloc(1000000);
    assert_non_null(deep);
    memset(deep, '[', 1000000);
    tr_jtext *t;
    size_t at;
    assert_int_equal(tr_jtext_parse(&t, deep, 1000000, &at, NULL), TR_E_INPUT);
    assert_int_equal(at, 512);
    free(deep);
}

static void test_tree(void **state)
{
    static const char text[] =
        " {\"a\": [1, {\"b\": null}, \"s\"], \"\\u0061b\" : true, \"a\": 2.50}";
    tr_jtext *t = parse(text, sizeof text - 1);
    const tr_jnode *root = tr_jtext_root(t);

    (void)state;
    assert_ptr_equal(tr_jtext_raw(t), text);
    assert_int_equal(root->type, TR_J_OBJECT);
    assert_int_equal(root->n_children, 3);
    assert_int_equal(root->begin, 1);
    assert_int_equal(root->end, sizeof text - 1);
    const tr_jnode *a = tr_jtext_child(t, root), *ab = tr_jtext_next(t, a),
                   *last = tr_jtext_next(t, ab);
    assert_null(tr_jtext_next(t, last));
    assert_int_equal(a->type, TR_J_ARRAY);
    assert_int_equal(a->n_children, 3);
    assert_true(tr_jtext_key_is(t, a, "a"));
    assert_true(tr_jtext_key_is(t, ab, "ab"));
    assert_false(tr_jtext_key_is(t, ab, "a"));
    assert_false(tr_jtext_key_is(t, ab, "abc"));
    assert_false(tr_jtext_key_is(t, ab, ""));
    assert_false(tr_jtext_key_is(t, root, ""));
    assert_ptr_equal(tr_jtext_member(t, root, "a"), last);
    assert_ptr_equal(tr_jtext_member(t, root, "ab"), ab);
    assert_null(tr_jtext_member(t, root, "c"));
    assert_ptr_equal(tr_jtext_given(t, root, "ab"), ab);
    assert_null(tr_jtext_given(t, tr_jtext_next(t, tr_jtext_child(t, a)), "b"));
    assert_false(tr_jtext_is(t, ab, "true"));
    assert_true(tr_jtext_is(t, tr_jtext_next(t, tr_jtext_next(t, tr_jtext_child(t, a))), "s"));
    assert_null(tr_jtext_member(t, a, "a"));
    assert_null(tr_jtext_member(t, NULL, "a"));
    assert_memory_equal(text + last->begin, "2.50", 4);
    assert_int_equal(last->end - last->begin, 4);
    const tr_jnode *inner = tr_jtext_next(t, tr_jtext_child(t, a));
    assert_int_equal(tr_jtext_member(t, inner, "b")->type, TR_J_NULL);
    assert_null(tr_jtext_child(t, tr_jtext_child(t, a)));
    tr_jtext_free(t);
}

static void test_strings(void **state)
{
    static const struct {
        const char *text, *want;
        size_t n;
    } c[] = {
        {"\"\"", "", 0},
        {"\"a\\u0000b\"", "a\0b", 3},
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8},
        {"\"\\u00E9\\u20ac\"", "\xc3\xa9\xe2\x82\xac", 5},
        {"\"\\ud83d\\uDE00!\"", "\xf0\x9f\x98\x80!", 5},
        {"\"\\ud83d\"", "\xef\xbf\xbd", 3},
        {"\"\\ude00x\"", "\xef\xbf\xbdx", 4},
        {"\"\\ud83d\\u0041\"",
         "\xef\xbf\xbd"
         "A",
         4},
        {"\"\\ud83d\\n\"", "\xef\xbf\xbd\n", 4},
        {"\"\\ud83d\\ud83d\\ude00\"", "\xef\xbf\xbd\xf0\x9f\x98\x80", 7},
        {"\"\\ude00\\ud83d\"", "\xef\xbf\xbd\xef\xbf\xbd", 6},
        {"\"\\uffff\\udbff\\udfff\"", "\xef\xbf\xbf\xf4\x8f\xbf\xbf", 7},
    };

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        tr_buf b = {0};
        tr_jtext *t = parse(c[i].text, strlen(c[i].text));
        tr_jtext_string(t, tr_jtext_root(t), &b);
        assert_int_equal(b.n, c[i].n);
        if (b.n) assert_memory_equal(b.s, c[i].want, b.n);
        tr_jtext_free(t);
        free(b.s);
    }
    tr_jtext *t = parse("[7]", 3);
    tr_buf b = {0};
    tr_jtext_string(t, tr_jtext_root(t), &b);
    tr_jtext_key(t, tr_jtext_root(t), &b);
    assert_int_equal(b.n, 0);
    tr_jtext_free(t);
}

static void test_spelling(void **state)
{
    /* Left: as received; right: Python 3.11's json.dumps(json.loads(left), ensure_ascii=False). */
    static const char *const c[][2] = {
        {"-0", "0"},
        {"0", "0"},
        {"12345678901234567890123456789012345678901234567890",
         "12345678901234567890123456789012345678901234567890"},
        {"-7", "-7"},
        {"0.0", "0.0"},
        {"-0.0", "-0.0"},
        {"0e5", "0.0"},
        {"-0e0", "-0.0"},
        {"1.0", "1.0"},
        {"1.50", "1.5"},
        {"1e2", "100.0"},
        {"1E5", "100000.0"},
        {"1e15", "1000000000000000.0"},
        {"1e16", "1e+16"},
        {"1e22", "1e+22"},
        {"1e100", "1e+100"},
        {"9999999999999998.0", "9999999999999998.0"},
        {"12345678901234567890.0", "1.2345678901234567e+19"},
        {"0.0001", "0.0001"},
        {"0.00001", "1e-05"},
        {"1e-7", "1e-07"},
        {"0.00012345", "0.00012345"},
        {"1.25e-10", "1.25e-10"},
        {"5e-324", "5e-324"},
        {"4e-324", "5e-324"},
        {"1e-400", "0.0"},
        {"-1e-400", "-0.0"},
        {"2.2250738585072014e-308", "2.2250738585072014e-308"},
        {"1.7976931348623157e308", "1.7976931348623157e+308"},
        {"0.1", "0.1"},
        {"0.30000000000000004", "0.30000000000000004"},
        {"123.456", "123.456"},
        {"5.684341886080802e-14",
         "5.684341886080802e-14"}, /* 2^-44: nearest 16 digits read back wrong */
        {"9007199254740993.0", "9007199254740992.0"},
        {"3.0e0", "3.0"},
        {"1e23", "1e+23"},
        {"[]", "[]"},
        {"{}", "{}"},
        {"[ ]", "[]"},
        {"[1,2,[3]]", "[1, 2, [3]]"},
        {"{\"b\":1,\"a\":[true,false,null]}", "{\"b\": 1, \"a\": [true, false, null]}"},
        {"{\"a\":1,\"b\":2,\"a\":3}", "{\"a\": 3, \"b\": 2}"},
        {"{\"a\":1,\"b\":2,\"\\u0061\":{\"x\":1,\"x\":[]}}", "{\"a\": {\"x\": []}, \"b\": 2}"},
        {"{\"\":1,\"\":2}", "{\"\": 2}"},
        {"{\"a\\\"\":\"\\/<\"}", "{\"a\\\"\": \"/<\"}"},
        {"\"\\u0001\\u001F\\u007f\\b\\f\\n\\r\\t\\\"\\\\\"",
         "\"\\u0001\\u001f\x7f\\b\\f\\n\\r\\t\\\"\\\\\""},
        {"\"\\u0000\"", "\"\\u0000\""},
        {"\"\\u2028\\u00e9\"", "\"\xe2\x80\xa8\xc3\xa9\""},
        {"\"\\ud800\"", "\"\xef\xbf\xbd\""},
    };
    static const char *const beyond[] = {"1e999", "-1e309", "[1,{\"a\":1.8e308}]",
                                         "1797693134862315900e290"};

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        size_t n, n2;
        char *once = respell(c[i][0], strlen(c[i][0]), &n);
        assert_string_equal(once, c[i][1]);
        char *twice = respell(once, n, &n2);
        assert_string_equal(twice, once);
        free(twice);
        free(once);
    }
    for (size_t i = 0; i < sizeof beyond / sizeof *beyond; i++) {
        tr_jtext *t = parse(beyond[i], strlen(beyond[i]));
        tr_buf b = {0};
        tr_err err = {0};
        assert_int_equal(tr_jtext_respell(t, tr_jtext_root(t), &b, &err), TR_E_INPUT);
        assert_non_null(strstr(err.text, "double range"));
        free(b.s);
        tr_jtext_free(t);
    }
}

/* Every double comes back from its spelling, and no spelling of fewer digits would do. */
static void test_doubles(void **state)
{
    uint64_t x = 0x9E3779B97F4A7C15u;

    (void)state;
    for (int i = 0; i < 20000; i++) {
        char text[64], fewer[64];
        size_t n;
        double v, back;
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint64_t bits =
            i < 2046 ? (uint64_t)(i + 1) << 52 : x & ~(UINT64_C(1) << 63); /* powers of two first */
        memcpy(&v, &bits, sizeof v);
        if ((bits >> 52) == 0x7FF) continue;
        snprintf(text, sizeof text, "%.20e", v);
        char *s = respell(text, strlen(text), &n);
        back = strtod(s, NULL);
        if (memcmp(&back, &v, sizeof v)) fail_msg("%s came back as %s", text, s);
        int digits = 0;
        for (const char *p = s; *p && *p != 'e'; p++)
            digits += *p >= '0' && *p <= '9' && (digits || *p != '0');
        for (const char *p = s + strcspn(s, "e") - 1; p >= s && (*p == '0' || *p == '.'); p--)
            digits -= *p == '0';
        if (digits > 1) {
            snprintf(fewer, sizeof fewer, "%.*e", digits - 2, v);
            if (strtod(fewer, NULL) == v) fail_msg("%s is longer than %s", s, fewer);
        }
        free(s);
    }
}

static void test_members(void **state)
{
    enum { N = 20000 };
    tr_buf b = {0};
    const tr_jnode **member;
    size_t n;

    (void)state;
    /* Each key twice, the second time in another order. */
    tr_buf_puts(&b, "{");
    for (int i = 0; i < 2 * N; i++)
        tr_buf_printf(&b, "%s\"%d\":%d", i ? "," : "", i < N ? i : 2 * N - 1 - i, i);
    tr_buf_puts(&b, "}");
    tr_jtext *t = parse(b.s, b.n);
    assert_int_equal(tr_jtext_members(t, tr_jtext_root(t), &member, &n, NULL), TR_OK);
    assert_int_equal(n, N);
    for (int i = 0; i < N; i++) {
        char key[16];
        snprintf(key, sizeof key, "%d", i);
        assert_true(tr_jtext_key_is(t, member[i], key));
        assert_int_equal(strtol(b.s + member[i]->begin, NULL, 10), 2 * N - 1 - i);
    }
    free(member);
    tr_jtext_free(t);
    free(b.s);
    t = parse("[1]", 3);
    assert_int_equal(tr_jtext_members(t, tr_jtext_root(t), &member, &n, NULL), TR_OK);
    assert_int_equal(n, 0);
    free(member);
    tr_jtext_free(t);
}

/* Mutations of a text: refused, or re-spelt to something that is its own spelling. */
static void test_mutations(void **state)
{
    static const char seed_text[] =
        "{\"a\": [1, -2.5e-3, 1e16, true, false, null, \"\\ud83d\\ude00\\n\\\"x\\u00e9\xc3\xa9\"], "
        "\"b\": {\"c\": {}, \"c\": [[], [{}]], \"\": \"\\\\\"}, \"a\": 12345678901234567890}";
    static const char bits[] = "{}[]\",:\\u0123456789abcdefEe+-.tfn \n\x80\xc3\xff";
    uint64_t x = 88172645463325252u;
    int n_accepted = 0;

    (void)state;
    for (int round = 0; round < 30000; round++) {
        size_t n = sizeof seed_text - 1, at = 0;
        char *copy = malloc(n);
        tr_jtext *t;
        tr_err err = {0};
        assert_non_null(copy);
        memcpy(copy, seed_text, n);
        for (int k = 0; k <= round % 4; k++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            size_t place = (size_t)(x >> 16) % n;
            if (x & 1)
                copy[place] = bits[(x >> 8) % (sizeof bits - 1)];
            else if (n > 1)
                memmove(copy + place, copy + place + 1, --n - place);
        }
        if (tr_jtext_parse(&t, copy, n, &at, &err) == TR_OK) {
            tr_buf b = {0};
            tr_status st = tr_jtext_respell(t, tr_jtext_root(t), &b, &err);
            assert_true(st == TR_OK || st == TR_E_INPUT);
            if (st == TR_OK) {
                size_t n2;
                char *again = respell(b.s, b.n, &n2);
                assert_int_equal(n2, b.n);
                assert_memory_equal(again, b.s, n2);
                assert_true(tr_utf8_valid(b.s, b.n, NULL));
                free(again);
                n_accepted++;
            }
            free(b.s);
            tr_jtext_free(t);
        } else {
            assert_true(at <= n);
        }
        free(copy);
    }
    assert_true(n_accepted > 1000);
}

static void test_buf(void **state)
{
    tr_buf b = {0};

    (void)state;
    tr_buf_add(&b, NULL, 0);
    assert_string_equal(b.s, "");
    for (int i = 0; i < 1000; i++)
        tr_buf_printf(&b, "%03d", i);
    assert_int_equal(b.n, 3000);
    assert_memory_equal(b.s + 2997, "999", 4);
    /* What cannot be had: the old text stays, and the buffer says so from then on. */
    tr_buf_add(&b, "x", SIZE_MAX);
    assert_true(b.failed);
    tr_buf_puts(&b, "more");
    assert_int_equal(b.n, 3000);
    free(b.s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accepted),  cmocka_unit_test(test_refused),
        cmocka_unit_test(test_depth),     cmocka_unit_test(test_tree),
        cmocka_unit_test(test_strings),   cmocka_unit_test(test_spelling),
        cmocka_unit_test(test_doubles),   cmocka_unit_test(test_members),
        cmocka_unit_test(test_mutations), cmocka_unit_test(test_buf),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
