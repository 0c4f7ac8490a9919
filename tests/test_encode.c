/* Encoding: the pre-tokenizer and the merges against slow second versions, random texts, segments,
 * flags of added tokens, time, and memory that runs out. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/json.h"
#include "machine.h"
#include "text/bpe.h"
#include "text/tokenizer.h"
#include "text/utf8.h"
#include "vectors.h"

/* A megabyte must encode in a second (chat.md 1.4); sanitizers take their share. */
#ifdef __SANITIZE_ADDRESS__
#define TR_TEST_SECONDS 10.0
#else
#define TR_TEST_SECONDS 1.0
#endif

static tr_tokenizer *open_vector(const char *name)
{
    char path[1024], file[256];
    tr_tokenizer *t;
    tr_err err;

    snprintf(file, sizeof file, "chat/%s", name);
    if (tr_tokenizer_open(&t, tr_vector_path(path, sizeof path, file), NULL, NULL, &err) != TR_OK)
        fail_msg("%s", err.text);
    return t;
}

static int32_t *encode(tr_encoder *e, const char *text, size_t n, bool literal, size_t *n_ids)
{
    tr_segment whole = {text, n, literal};
    int32_t *ids;
    tr_err err;

    if (tr_encode(e, &whole, 1, &ids, n_ids, &err) != TR_OK) fail_msg("%s", err.text);
    return ids;
}

/* A generator for tests; *x is its state. */
static uint32_t next_random(uint64_t *x)
{
    *x = *x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(*x >> 33);
}

/* ---- the parts against slow versions --------------------------------------------------------- */

/* chat.md 1.3 word for word: the file's own spelling, \s replaced by White_Space, interpreted. */
#define WS                                                                                         \
    "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{"    \
    "205f}\\x{3000}"
static const char *const plain_patterns[3] = {
    "\\p{N}{1,3}",
    "[\\x{4e00}-\\x{9fa5}\\x{3040}-\\x{309f}\\x{30a0}-\\x{30ff}]+",
    "[!\"#$%&'()*+,\\-./"
    ":;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|[" WS "]*[\r\n]+|[" WS "]+(?![^" WS "])|[" WS "]+",
};

static void plain_split(pcre2_code *const code[3], pcre2_match_data *m, int step, const char *text,
                        size_t begin, size_t end, size_t *ends, size_t *n)
{
    size_t at = begin;

    if (begin == end) return;
    if (step == 3) {
        ends[(*n)++] = end;
        return;
    }
    while (at < end && pcre2_match(code[step], (PCRE2_SPTR)text + begin, end - begin, at - begin, 0,
                                   m, NULL) >= 0) {
        size_t from = begin + pcre2_get_ovector_pointer(m)[0],
               to = begin + pcre2_get_ovector_pointer(m)[1];
        plain_split(code, m, step + 1, text, at, from, ends, n);
        plain_split(code, m, step + 1, text, from, to, ends, n);
        at = to;
    }
    plain_split(code, m, step + 1, text, at, end, ends, n);
}

/* Random text of characters from every class that the patterns tell apart. */
static size_t random_text(char *out, size_t n_chars, uint64_t *random)
{
    static const uint32_t set[] = {
        ' ',    ' ',   '\n', '\r',    '\t',   'a',    'Z',      '1',    '9',    '!',
        '_',    '$',   0x85, 0xa0,    0x3000, 0x2028, 0x200b,   0x200d, 0x180e, 0x1c,
        0,      0x301, 0xe9, 0x4e00,  0x9fa5, 0x9fa6, 0x3042,   0x30fb, 0x30ff, 0xff5c,
        0x2581, 0x661, 0xbd, 0x1f600, 0x20ac, 0xe000, 0x10ffff, 0x2160, 0x24b6, 0xfeff};
    size_t n = 0;

    for (size_t i = 0; i < n_chars; i++)
        n += (size_t)tr_utf8_encode(set[next_random(random) % (sizeof set / sizeof *set)], out + n);
    return n;
}

static void pieces_match_the_published_patterns(void **state)
{
    enum { CHARS = 40 };
    tr_tokenizer *t = open_vector("tokenizer_a.json");
    tr_encoder *e = tr_encoder_create(t);
    pcre2_code *code[3];
    pcre2_match_data *m = pcre2_match_data_create(1, NULL);
    char text[4 * CHARS];
    size_t ends[4 * CHARS], *got, n_ends, n_got, at;
    uint64_t random = 7;
    tr_err err;
    int number;

    (void)state;
    assert_non_null(e);
    for (int i = 0; i < 3; i++) {
        code[i] = pcre2_compile((PCRE2_SPTR)plain_patterns[i], PCRE2_ZERO_TERMINATED, PCRE2_UTF,
                                &number, &at, NULL);
        assert_non_null(code[i]);
    }
    for (int round = 0; round < 20000; round++) {
        size_t n = random_text(text, 1 + next_random(&random) % CHARS, &random);
        n_ends = 0;
        plain_split(code, m, 0, text, 0, n, ends, &n_ends);
        assert_int_equal(tr_encode_pieces(e, text, n, &got, &n_got, &err), TR_OK);
        if (n_got != n_ends || memcmp(got, ends, n_ends * sizeof *ends) != 0)
            fail_msg("round %d: %zu pieces instead of %zu", round, n_got, n_ends);
        free(got);
    }
    for (int i = 0; i < 3; i++)
        pcre2_code_free(code[i]);
    pcre2_match_data_free(m);
    tr_encoder_free(e);
    tr_tokenizer_free(t);
}

/* chat.md 1.4 word for word, on lists. */
static size_t plain_bpe(const tr_merge *list, int n_merges, int32_t *id, size_t n)
{
    for (;;) {
        size_t best = n;
        int rank = n_merges;
        for (size_t i = 0; i + 1 < n; i++)
            for (int r = 0; r < rank; r++)
                if (list[r].left == id[i] && list[r].right == id[i + 1]) {
                    rank = r;
                    best = i;
                }
        if (best == n) return n;
        id[best] = list[rank].result;
        memmove(id + best + 1, id + best + 2, (n - best - 2) * sizeof *id);
        n--;
    }
}

static void merging_matches_the_rule(void **state)
{
    enum { MERGES = 24, N = 200 };
    tr_merge list[MERGES];
    int32_t byte_id[256], id[N];
    char piece[N];
    tr_bpe *b = tr_bpe_create();
    tr_ids out = {0};
    uint64_t random = 3;

    (void)state;
    assert_non_null(b);
    for (int i = 0; i < 256; i++)
        byte_id[i] = i % 3;
    for (int round = 0; round < 3000; round++) {
        tr_merges m = {0};
        assert_true(tr_merges_create(&m, MERGES));
        for (int i = 0; i < MERGES;
             i++) { /* pairs of what there is so far; repeats happen on purpose */
            list[i] = (tr_merge){(int32_t)next_random(&random) % (3 + i),
                                 (int32_t)next_random(&random) % (3 + i), i, 3 + i};
            tr_merges_add(&m, list[i]);
        }
        size_t n = 1 + next_random(&random) % N; /* both sides of TR_BPE_SHORT */
        for (size_t i = 0; i < n; i++) {
            piece[i] = (char)(next_random(&random) % 3 * (next_random(&random) % 4 > 0));
            id[i] = byte_id[(unsigned char)piece[i]];
        }
        size_t n_ids = plain_bpe(list, MERGES, id, n);
        out.n = 0;
        assert_true(tr_bpe_piece(b, &m, byte_id, piece, n, &out));
        assert_int_equal(out.n, n_ids);
        assert_memory_equal(out.id, id, n_ids * sizeof *id);
        tr_merges_free(&m);
    }
    free(out.id);
    tr_bpe_free(b);
}

/* ---- encoding -------------------------------------------------------------------------------- */

static void decoding_undoes_encoding(void **state)
{
    enum { CHARS = 200 };
    static const char *const files[] = {"tokenizer_a.json", "tokenizer_ignore_merges.json"};
    char text[4 * CHARS], *back;
    uint64_t random = 11;
    size_t n_ids, n_back;
    tr_err err;

    (void)state;
    for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
        tr_tokenizer *t = open_vector(files[f]);
        tr_encoder *e = tr_encoder_create(t);
        assert_non_null(e);
        for (int round = 0; round < 2000; round++) {
            size_t n;
            if (round % 2) {
                n = random_text(text, 1 + next_random(&random) % CHARS, &random);
            } else { /* any scalar value */
                n = 0;
                for (size_t i = next_random(&random) % CHARS; i > 0; i--) {
                    uint32_t c = next_random(&random) % (0x110000u >> next_random(&random) % 14);
                    n += (size_t)tr_utf8_encode(c >= 0xd800 && c < 0xe000 ? 'x' : c, text + n);
                }
            }
            /* ß is an added token of the second file and decodes to a byte (chat.md 1.6): literal
             * there. */
            int32_t *ids = encode(e, text, n, f == 1, &n_ids);
            assert_true(n_ids <= n);
            assert_int_equal(tr_decode(t, ids, n_ids, false, &back, &n_back, &err), TR_OK);
            assert_int_equal(n_back, n);
            assert_memory_equal(back, text, n);
            free(back);
            free(ids);
        }
        tr_encoder_free(e);
        tr_tokenizer_free(t);
    }
}

static void check_segments(tr_encoder *e, const tr_segment *segments, size_t n,
                           const int32_t *expected, size_t n_expected)
{
    int32_t *ids;
    size_t n_ids;
    tr_err err;

    assert_int_equal(tr_encode(e, segments, n, &ids, &n_ids, &err), TR_OK);
    assert_int_equal(n_ids, n_expected);
    assert_memory_equal(ids, expected, n_ids * sizeof *ids);
    free(ids);
}

#define SEGMENT(text, literal)                                                                     \
    {                                                                                              \
        text, sizeof(text) - 1, literal                                                            \
    }

static void segments(void **state)
{
    tr_tokenizer *t = open_vector("tokenizer_a.json");
    tr_encoder *e = tr_encoder_create(t);
    int32_t think = tr_tokenizer_added(t, "<think>");
    size_t n;

    (void)state;
    assert_non_null(e);
    assert_true(think >= 0 && tr_tokenizer_added(t, "<think") < 0 && tr_tokenizer_added(t, "") < 0);

    /* Cut anywhere, of one kind or of both: the pieces do not move. */
    static const char text[] = "Hello,  world! 12345\n\n x\xe4\xbd\xa0\xe5\xa5\xbd";
    int32_t *whole = encode(e, text, sizeof text - 1, false, &n);
    for (size_t cut = 0; cut < sizeof text; cut++) {
        tr_segment both[3] = {
            {text, cut, false}, {"", 0, false}, {text + cut, sizeof text - 1 - cut, false}};
        check_segments(e, both, 3, whole, n);
        if (((unsigned char)text[cut] & 0xc0) == 0x80) continue;
        both[2].literal = true;
        check_segments(e, both, 3, whole, n);
        both[0].literal = true;
        both[1].literal = true;
        check_segments(e, both, 3, whole, n);
    }
    free(whole);

    /* A token is found across segments that are not literal, and nowhere else. */
    const tr_segment joined[] = {SEGMENT("<th", false), SEGMENT("ink>", false)};
    check_segments(e, joined, 2, &think, 1);
    int32_t *plain = encode(e, "<think><think>", 14, true, &n);
    assert_true(n > 2);
    const tr_segment literal[] = {SEGMENT("<th", false), SEGMENT("ink><th", true),
                                  SEGMENT("ink>", false)};
    check_segments(e, literal, 3, plain, n);
    free(plain);
    int32_t *ids = encode(e, "a<think>", 8, true, &n);
    const tr_segment mixed[] = {SEGMENT("a<think>", true), SEGMENT("<think>", false)};
    int32_t *expected = malloc((n + 1) * sizeof *expected);
    assert_non_null(expected);
    memcpy(expected, ids, n * sizeof *ids);
    expected[n] = think;
    check_segments(e, mixed, 2, expected, n + 1);
    free(expected);
    free(ids);
    check_segments(e, NULL, 0, NULL, 0);
    tr_encoder_free(e);
    tr_tokenizer_free(t);
}

/* lstrip, rstrip and single_word where several meet, and across segments. */
static void flags(void **state)
{
    tr_tokenizer *t = open_vector("tokenizer_flags.json");
    tr_encoder *e = tr_encoder_create(t);
    int32_t ls = tr_tokenizer_added(t, "<ls>"), rs = tr_tokenizer_added(t, "<rs>"),
            raw = tr_tokenizer_added(t, "<raw>");
    int32_t word = tr_tokenizer_added(t, "word");
    size_t n;

    (void)state;
    assert_non_null(e);
    assert_true(ls >= 0 && rs >= 0 && raw >= 0 && word >= 0);
    const tr_segment spaces[] = {SEGMENT("\xc2\xa0 ", true), SEGMENT("<ls><rs>", false),
                                 SEGMENT("\xe3\x80\x80\n", true), SEGMENT("<raw>", false)};
    check_segments(e, spaces, 4, (int32_t[]){ls, rs, raw}, 3);
    const tr_segment near[] = {SEGMENT("<rs> ", false), SEGMENT("word", false), SEGMENT("!", true)};
    int32_t *bang = encode(e, "!", 1, false, &n);
    check_segments(e, near, 3, (int32_t[]){rs, word, bang[0]}, 3);
    free(bang);
    /* Word characters that are letters only by Other_Alphabetic, joiners and connectors. */
    static const char *const beside[] = {"_",        "\xe2\x93\x90", "\xe2\x80\x8d",
                                         "\xcc\x81", "\xd9\xa1",     "\xf0\x9f\x84\xb0"};
    static const char *const apart[] = {" ", "-", "\xc2\xbd", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
    char text[32];
    for (size_t i = 0; i < 11; i++) {
        const char *c = i < 6 ? beside[i] : apart[i - 6];
        for (int side = 0; side < 2; side++) {
            int len = snprintf(text, sizeof text, "%sword%s", side ? c : "", side ? "" : c);
            int32_t *ids = encode(e, text, (size_t)len, false, &n);
            bool found = false;
            for (size_t k = 0; k < n; k++)
                found = found || ids[k] == word;
            if (found != (i >= 6)) fail_msg("%s", text);
            free(ids);
        }
    }
    tr_encoder_free(e);
    tr_tokenizer_free(t);
}

/* ---- time ------------------------------------------------------------------------------------ */

typedef size_t fill_text(char *text, size_t n);

static size_t fill_letter(char *text, size_t n)
{
    memset(text, 'l', n); /* "ll" is a merge */
    return n;
}

static size_t repeat(char *text, size_t n, const char *unit)
{
    size_t len = strlen(unit);

    for (size_t i = 0; i + len <= n; i += len)
        memcpy(text + i, unit, len);
    return n / len * len;
}

static size_t fill_spaces(char *text, size_t n)
{
    memset(text, ' ', n);
    text[n - 1] = 'x';
    return n;
}

static size_t fill_breaks(char *text, size_t n)
{
    n = repeat(text, n, " \n\t\xe3\x80\x80\r\n ");
    text[n - 1] = 'x';
    return n;
}

static size_t fill_punctuation(char *text, size_t n)
{
    return repeat(text, n, "!?\xe2\x80\xa6.,;:<>");
}

static size_t fill_marks(char *text, size_t n)
{
    return repeat(text, n, "\xcc\x81");
}

static size_t fill_controls(char *text, size_t n)
{
    return repeat(text, n, "\x01\xe2\x80\x8b");
}

static size_t fill_digits(char *text, size_t n)
{
    return repeat(text, n, "1234567a ");
}

static size_t fill_openers(char *text, size_t n)
{
    return repeat(text, n,
                  "<\xef\xbd\x9c"
                  "begin\xe2\x96\x81"
                  "of<<");
}

static size_t fill_ill_formed(char *text, size_t n)
{
    return repeat(text, n, "\xf0\x9f\xc0 \xff");
}

static size_t fill_random(char *text, size_t n)
{
    uint64_t random = 5;
    return random_text(text, n / 4, &random);
}

/* Of processor time: the machine may be busy. */
static double seconds(tr_encoder *e, const char *text, size_t n)
{
    double best = 1e9;
    size_t n_ids;

    for (int i = 0; i < 2; i++) {
        clock_t begin = clock();
        free(encode(e, text, n, false, &n_ids));
        double taken = (double)(clock() - begin) / CLOCKS_PER_SEC;
        if (taken < best) best = taken;
    }
    return best;
}

/* Four times the text may take six times as long (n log n, caches) and some fixed noise; a
 * quadratic step would take sixteen times. Where another process spoils it, it is measured again: the shortest times count. */
static void time_is_nearly_linear(void **state)
{
    static const struct {
        const char *name;
        fill_text *fill;
    } kinds[] = {
        {"one letter", fill_letter},     {"spaces", fill_spaces},
        {"line breaks", fill_breaks},    {"punctuation", fill_punctuation},
        {"marks", fill_marks},           {"controls", fill_controls},
        {"digits", fill_digits},         {"openers", fill_openers},
        {"ill-formed", fill_ill_formed}, {"random", fill_random},
    };
    enum { N = 1 << 20 };
    tr_tokenizer *t = open_vector("tokenizer_a.json");
    tr_encoder *e = tr_encoder_create(t);
    char *text = malloc(N);

    (void)state;
    const double limit = tr_machine_seconds(TR_TEST_SECONDS);
    assert_true(e && text);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        double quarter = 1e9, whole = 1e9;
        for (int tries = 0; tries < 10 && (!tries || whole > 6 * quarter + 0.05); tries++) {
            quarter = fmin(quarter, seconds(e, text, kinds[i].fill(text, N / 4)));
            whole = fmin(whole, seconds(e, text, kinds[i].fill(text, N)));
        }
        if (whole > limit) fail_msg("%s: %.3f s, not %.3f", kinds[i].name, whole, limit);
        if (whole > 6 * quarter + 0.05)
            fail_msg("%s: %.3f s, a quarter of it %.3f s", kinds[i].name, whole, quarter);
    }
    free(text);
    tr_encoder_free(e);
    tr_tokenizer_free(t);
}

/* ---- memory that runs out -------------------------------------------------------------------- */

#if defined __GLIBC__ && !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
#define TR_TEST_MEMORY 1

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);

/* How many allocations still succeed; negative: all. */
static long allocations_left = -1;

static bool spend(void)
{
    if (allocations_left < 0) return true;
    if (allocations_left == 0) return false;
    allocations_left--;
    return true;
}

void *malloc(size_t n)
{
    return spend() ? __libc_malloc(n) : NULL;
}

void *calloc(size_t n, size_t size)
{
    return spend() ? __libc_calloc(n, size) : NULL;
}

void *realloc(void *p, size_t n)
{
    return spend() ? __libc_realloc(p, n) : NULL;
}

/* Load and encode with `left` allocations; the first status that is not TR_OK. */
static tr_status load_and_encode(const char *json, size_t n, const char *text, size_t n_text,
                                 long left, tr_err *err)
{
    tr_segment whole = {text, n_text, false};
    tr_tokenizer *t = NULL;
    tr_encoder *e = NULL;
    int32_t *ids = NULL;
    size_t n_ids, *ends = NULL, n_ends, n_back;
    char *back = NULL;

    allocations_left = left;
    tr_status st = tr_tokenizer_parse(&t, json, n, "x", NULL, NULL, err);
    if (st == TR_OK) e = tr_encoder_create(t);
    if (st == TR_OK && !e) st = TR_E_MEMORY;
    if (st == TR_OK) st = tr_encode(e, &whole, 1, &ids, &n_ids, err);
    if (st == TR_OK) st = tr_encode_pieces(e, text, n_text, &ends, &n_ends, err);
    if (st == TR_OK) st = tr_decode(t, ids, n_ids, false, &back, &n_back, err);
    if (st != TR_OK && (ids || back)) st = back ? TR_E_IO : st;
    /* After a failure the encoder still works. */
    if (st == TR_E_MEMORY && e) {
        allocations_left = -1;
        free(ids);
        if (tr_encode(e, &whole, 1, &ids, &n_ids, err) != TR_OK) st = TR_E_IO;
    }
    allocations_left = -1;
    free(ids);
    free(ends);
    free(back);
    tr_encoder_free(e);
    tr_tokenizer_free(t);
    return st;
}

static void every_allocation_may_fail(void **state)
{
    char text[3000], path[1024], *json;
    size_t n, n_text;
    uint64_t random = 9;
    tr_err err;

    (void)state;
    memset(text, 'a', 200);
    n_text = 200 + random_text(text + 200, 500, &random);
    tr_vector_path(path, sizeof path, "chat/tokenizer_ignore_merges.json");
    if (tr_file_read(path, 1 << 20, &json, &n, &err) != TR_OK) fail_msg("%s", err.text);
    long left = 0;
    for (tr_status st = TR_E_MEMORY; st != TR_OK; left++) {
        st = load_and_encode(json, n, text, n_text, left, &err);
        /* jansson 2.14 takes a failed allocation of its lexer for a syntax error: that code it may
         * be. */
        if (st == TR_E_INPUT && strstr(err.text, ": bad_json: ")) st = TR_E_MEMORY;
        if (st != TR_OK && st != TR_E_MEMORY)
            fail_msg("allocation %ld: status %d, %s", left, st, err.text);
        assert_true(left < 100000);
    }
    assert_true(left > 100);
    free(json);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_match_the_published_patterns),
        cmocka_unit_test(merging_matches_the_rule),
        cmocka_unit_test(decoding_undoes_encoding),
        cmocka_unit_test(segments),
        cmocka_unit_test(flags),
        cmocka_unit_test(time_is_nearly_linear),
#ifdef TR_TEST_MEMORY
        cmocka_unit_test(every_allocation_may_fail),
#endif
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
