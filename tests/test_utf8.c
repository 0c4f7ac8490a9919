/* utf8.c and detok.c: the table of the Unicode standard by brute force, and every way of
 * cutting. */
#include <config.h>

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <setjmp.h>

#include <cmocka.h>

#include "text/detok.h"
#include "text/utf8.h"

/* A second, slow reader of UTF-8: all well-formed sequences are the encodings of all scalar
 * values. */
static bool is_sequence(const unsigned char *s, size_t len)
{
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    static const unsigned char lead[5] = {0, 0, 0xc0, 0xe0, 0xf0},
                               mask[5] = {0, 0, 0xe0, 0xf0, 0xf8};

    if (len == 1) return s[0] < 0x80;
    if ((s[0] & mask[len]) != lead[len]) return false;
    uint32_t c = s[0] & (unsigned char)~mask[len];
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xc0) != 0x80) return false;
        c = c << 6 | (s[i] & 0x3f);
    }
    return c >= least[len] && c <= 0x10ffff && !(c >= 0xd800 && c <= 0xdfff);
}

/* Can s[0, n) be continued to a well-formed sequence? One more byte range decides all there is to
 * decide. */
static bool is_prefix(const unsigned char *s, size_t n)
{
    unsigned char t[4];

    memcpy(t, s, n);
    for (size_t len = n + 1; len <= 4; len++) {
        /* The second byte narrows the range, the others do not: try its both ends. */
        for (int first = 0x80; first <= 0xbf; first++) {
            memset(t + n, 0x80, len - n);
            t[n] = (unsigned char)first;
            if (is_sequence(t, len)) return true;
        }
    }
    return false;
}

static int reference_next(const unsigned char *s, size_t n)
{
    size_t longest = 1;

    for (size_t len = 1; len <= 4 && len <= n; len++)
        if (is_sequence(s, len)) return (int)len;
    for (size_t len = 1; len <= 3 && len <= n; len++)
        if (is_prefix(s, len)) {
            if (len == n) return 0;
            longest = len;
        }
    return -(int)longest;
}

static void next_matches_the_standard(void **state)
{
    static const unsigned char seconds[] = {0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90,
                                            0x9f, 0xa0, 0xbf, 0xc0, 0xc2, 0xff};
    enum { N = sizeof seconds };
    unsigned char s[4];

    (void)state;
    for (int lead = 0; lead < 256; lead++)
        for (size_t i = 0; i < (size_t)N * N * N; i++) {
            s[0] = (unsigned char)lead;
            s[1] = seconds[i % N];
            s[2] = seconds[i / N % N];
            s[3] = seconds[i / N / N];
            for (size_t n = 1; n <= 4; n++)
                assert_int_equal(tr_utf8_next(s, n), reference_next(s, n));
        }
}

static void encode_and_decode_agree(void **state)
{
    char s[4];

    (void)state;
    for (uint32_t c = 0; c <= 0x10ffff; c++) {
        if (c >= 0xd800 && c <= 0xdfff) continue;
        int len = tr_utf8_encode(c, s);
        if (tr_utf8_next((unsigned char *)s, (size_t)len) != len ||
            tr_utf8_decode((unsigned char *)s, len) != c)
            fail_msg("U+%04X", c);
    }
}

static void repair_examples(void **state)
{
    static const struct {
        const char *in, *out;
    } cases[] = {
        {"", ""},
        {"plain ascii text, longer than a word", "plain ascii text, longer than a word"},
        {"\xf0\x9f\x98", "\xef\xbf\xbd"},
        {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd"},
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"\xf0\x9f\x98\x80 ok \xe4\xbd", "\xf0\x9f\x98\x80 ok \xef\xbf\xbd"},
        {"\xf4\x90\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"12345678\xff"
         "12345678",
         "12345678\xef\xbf\xbd"
         "12345678"},
        {"\xe2\x82"
         "b",
         "\xef\xbf\xbd"
         "b"},
    };
    char out[256];
    size_t bad;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n = tr_utf8_repair(cases[i].in, strlen(cases[i].in), out);
        assert_int_equal(n, strlen(cases[i].out));
        assert_memory_equal(out, cases[i].out, n);
        assert_true(tr_utf8_valid(out, n, NULL));
    }
    assert_false(tr_utf8_valid("12345678\xff"
                               "9",
                               10, &bad));
    assert_int_equal(bad, 8);
    assert_false(tr_utf8_valid("a\xe4\xbd", 3, &bad));
    assert_int_equal(bad, 1);
}

/* Random bytes that are mostly leads and continuations, so that sequences of every kind come
 * about. */
static void fill(unsigned char *s, size_t n, uint32_t *random)
{
    static const unsigned char likely[] = {'a',  0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf,
                                           0xc2, 0xdf, 0xe0, 0xe4, 0xed, 0xef, 0xf0,
                                           0xf1, 0xf4, 0xf5, 0xc0, 0xff, 0xbd};

    for (size_t i = 0; i < n; i++) {
        *random = *random * 1664525u + 1013904223u;
        s[i] = likely[(*random >> 12) % sizeof likely];
    }
}

static void every_cutting_gives_the_repaired_text(void **state)
{
    enum { N = 11 };
    unsigned char s[N];
    char whole[3 * N], out[3 * (N + 3)];
    uint32_t random = 1;

    (void)state;
    for (int round = 0; round < 150; round++) {
        fill(s, N, &random);
        size_t n_whole = tr_utf8_repair((char *)s, N, whole);
        for (unsigned cuts = 0; cuts < 1u << (N - 1); cuts++) { /* bit i: a cut behind byte i */
            tr_detok d = {{0}, 0};
            size_t n = 0, begin = 0;
            for (size_t i = 0; i < N; i++) {
                if (i + 1 < N && !(cuts >> i & 1)) continue;
                n += tr_detok_feed(&d, (char *)s + begin, i + 1 - begin, out + n);
                begin = i + 1;
                assert_true(d.n_held <= 3);
            }
            n += tr_detok_flush(&d, out + n);
            if (n != n_whole || memcmp(out, whole, n) != 0)
                fail_msg("round %d, cuts %x", round, cuts);
        }
    }
}

/* What is decided comes out at once: never more than an incomplete sequence is held back. */
static void nothing_complete_is_held_back(void **state)
{
    tr_detok d = {{0}, 0};
    char out[32];

    (void)state;
    assert_int_equal(tr_detok_feed(&d, "a\xe4\xbd", 3, out), 1);
    assert_int_equal(tr_detok_feed(&d, "", 0, out), 0);
    assert_int_equal(tr_detok_feed(&d, "\xa0", 1, out), 3);
    assert_memory_equal(out, "\xe4\xbd\xa0", 3);
    assert_int_equal(tr_detok_feed(&d, "\xf0\x9f", 2, out), 0);
    assert_int_equal(tr_detok_feed(&d, "x", 1, out), 4);
    assert_memory_equal(out, "\xef\xbf\xbdx", 4);
    assert_int_equal(tr_detok_flush(&d, out), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(next_matches_the_standard),
        cmocka_unit_test(encode_and_decode_agree),
        cmocka_unit_test(repair_examples),
        cmocka_unit_test(every_cutting_gives_the_repaired_text),
        cmocka_unit_test(nothing_complete_is_held_back),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
