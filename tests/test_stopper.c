/* Where text ends and what it is, for every way of cutting it into tokens. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/stopper.h"

enum { EOS = 1, BOS = 0, PAD = 2, WORD = 50, STOP_TOKEN = 60 };

typedef struct fixture {
    tr_params params;
    tr_string stop[4];
    int32_t stop_token[1];
    tr_stops *stops;
    tr_stopper *s;
} fixture;

static void open_with(fixture *f, bool include, int n_stop, const char *const *stop, bool has_text)
{
    memset(f, 0, sizeof *f);
    for (int i = 0; i < n_stop; i++)
        f->stop[i] = (tr_string){.s = (char *)(uintptr_t)stop[i], .n = strlen(stop[i])};
    f->stop_token[0] = STOP_TOKEN;
    f->params = (tr_params){.n = 1,
                            .include_stop = include,
                            .stop = f->stop,
                            .n_stop = n_stop,
                            .stop_token = f->stop_token,
                            .n_stop_tokens = 1};
    f->stops = tr_stops_create(f->stop, n_stop);
    tr_stopper_options o = {.params = &f->params,
                            .stops = f->stops,
                            .eos = EOS,
                            .bos = BOS,
                            .pad = PAD,
                            .has_text = has_text};
    f->s = tr_stopper_create(&o);
    assert_non_null(f->stops);
    assert_non_null(f->s);
}

static void close_it(fixture *f)
{
    tr_stopper_free(f->s);
    tr_stops_free(f->stops);
}

typedef struct example {
    const char *in, *stop[4];
    const char *out, *out_included; /* NULL: the same */
    int i_stop;                     /* -1: goes on to the end */
} example;

/* clang-format off */
static const example examples[] = {
    {"hello world", {NULL}, "hello world", NULL, -1},
    {"hello world", {"o w"}, "hell", "hello w", 0},
    {"hello world", {"xyz", "lo"}, "hel", "hello", 1},
    {"abc", {"abc", "b"}, "a", "ab", 1},                    /* complete first */
    {"xabc", {"c", "abc", "bc"}, "x", "xabc", 1},           /* complete together: the longest */
    {"aaab", {"aab"}, "a", "aaab", 0},                      /* overlapping starts */
    {"abababac", {"ababac"}, "ab", "abababac", 0},
    {"ends with sto", {"stop"}, "ends with sto", NULL, -1}, /* what was held back comes out */
    {"stop", {"stop"}, "", "stop", 0},
    {"na\xc3\xafve caf\xc3\xa9!", {"\xc3\xa9"}, "na\xc3\xafve caf", "na\xc3\xafve caf\xc3\xa9", 0},
    {"\xe4\xbd\xa0\xe5\xa5\xbd", {"\xe5\xa5\xbd"}, "\xe4\xbd\xa0", "\xe4\xbd\xa0\xe5\xa5\xbd", 0},
    {"a\xff" "b", {"b"}, "a\xef\xbf\xbd", "a\xef\xbf\xbd" "b", 0},     /* ill-formed */
    {"a\xff" "b", {"\xef\xbf\xbd"}, "a", "a\xef\xbf\xbd", 0},          /* its replacement is text */
    {"a\xe4\xbd", {"zz"}, "a\xef\xbf\xbd", NULL, -1},                  /* cut inside a character */
    {"a\xe4\xbd", {"\xef\xbf\xbd"}, "a", "a\xef\xbf\xbd", 0},          /* a match that only the end completes */
    {"aaaaaaaaab", {"aaaab", "aaaac"}, "aaaaa", "aaaaaaaaab", 0},
};
/* clang-format on */
enum { N_EXAMPLES = sizeof examples / sizeof *examples };

/* Feed `in` cut where the bits of `cuts` say; then EOS or the token limit. Text that was shown is never taken back. */
static void run_example(const example *e, uint64_t cuts, bool include, bool by_eos)
{
    fixture f;
    const size_t n = strlen(e->in);
    size_t begin = 0, shown = 0, n_text;
    char before[64];
    int n_stop = 0, ended = 0;

    while (n_stop < 4 && e->stop[n_stop])
        n_stop++;
    open_with(&f, include, n_stop, e->stop, true);
    for (size_t i = 1; i <= n && !ended; i++) {
        if (i < n && !(cuts >> (i - 1) & 1)) continue;
        ended = tr_stopper_token(f.s, WORD, e->in + begin, i - begin);
        begin = i;
        const char *text = tr_stopper_text(f.s, &n_text);
        assert_true(n_text >= shown);
        assert_memory_equal(text, before, shown);
        memcpy(before, text, n_text);
        shown = n_text;
    }
    if (!ended && by_eos) {
        assert_int_equal(tr_stopper_token(f.s, EOS, "</s>", 4), 1);
        assert_int_equal(tr_stopper_stop_token(f.s), e->i_stop < 0 ? EOS : -1);
    } else if (!ended) {
        assert_int_equal(tr_stopper_finish(f.s), e->i_stop >= 0);
    }
    assert_int_equal(tr_stopper_stop(f.s), e->i_stop);
    const char *want = include && e->out_included ? e->out_included : e->out;
    char *text = tr_stopper_take_text(f.s, &n_text);
    assert_string_equal(text, want);
    assert_int_equal(n_text, strlen(want));
    assert_memory_equal(text, before, shown);
    free(text);
    close_it(&f);
}

static void test_all_cuttings(void **state)
{
    (void)state;
    for (int i = 0; i < N_EXAMPLES; i++) {
        const size_t n = strlen(examples[i].in);
        for (uint64_t cuts = 0; cuts < UINT64_C(1) << (n - 1); cuts++)
            run_example(&examples[i], cuts, cuts % 2, cuts % 3 == 0);
        for (int k = 0; k < 4; k++) {
            run_example(&examples[i], 0, k & 1, k & 2);
            run_example(&examples[i], UINT64_MAX, k & 1, k & 2);
        }
    }
}

static void test_end_tokens(void **state)
{
    fixture f;
    size_t n;
    (void)state;

    open_with(&f, true, 0, NULL, true);
    assert_int_equal(tr_stopper_token(f.s, BOS, "<s>", 3), 0); /* in no text */
    assert_int_equal(tr_stopper_token(f.s, PAD, "<p>", 3), 0);
    assert_int_equal(tr_stopper_token(f.s, WORD, "hi", 2), 0);
    assert_int_equal(tr_stopper_token(f.s, WORD, NULL, 0), 0); /* an id without token */
    assert_int_equal(tr_stopper_token(f.s, STOP_TOKEN, "!", 1), 1);
    assert_int_equal(tr_stopper_stop_token(f.s), STOP_TOKEN);
    assert_int_equal(tr_stopper_stop(f.s), -1);
    char *text = tr_stopper_take_text(f.s, &n);
    assert_string_equal(text, "hi");
    free(text);
    close_it(&f);

    open_with(&f, false, 0, NULL, true);
    f.params.ignore_eos = true;
    assert_int_equal(tr_stopper_token(f.s, EOS, "</s>", 4), 0);
    assert_int_equal(tr_stopper_token(f.s, WORD, "x", 1), 0);
    assert_int_equal(tr_stopper_finish(f.s), 0);
    text = tr_stopper_take_text(f.s, &n);
    assert_string_equal(text, "x");
    free(text);
    close_it(&f);
}

static void test_without_text(void **state)
{
    const char *const stop[] = {"x"};
    fixture f;
    size_t n = 7;
    (void)state;

    open_with(&f, false, 1, stop, false);
    assert_int_equal(tr_stopper_token(f.s, WORD, "x", 1), 0);
    assert_int_equal(tr_stopper_token(f.s, EOS, NULL, 0), 1);
    assert_int_equal(tr_stopper_stop_token(f.s), EOS);
    assert_null(tr_stopper_take_text(f.s, &n));
    assert_int_equal(n, 0);
    close_it(&f);
}

/* Long text and long strings: buffers grow, and matching stays linear (a quadratic one would take minutes here). */
static void test_long(void **state)
{
    enum { STOP = 200000, TEXT = 1000000 };
    char *stop = malloc(STOP + 1), *text = malloc(TEXT);
    fixture f;
    size_t n;
    (void)state;

    memset(stop, 'a', STOP);
    stop[STOP - 1] = 'b';
    stop[STOP] = 0;
    memset(text, 'a', TEXT);
    text[TEXT - 1] = 'b';
    const char *const stops[] = {stop};
    open_with(&f, false, 1, stops, true);
    int ended = 0;
    for (int at = 0; at < TEXT; at += 1000) {
        assert_int_equal(ended, 0);
        ended = tr_stopper_token(f.s, WORD, text + at, 1000);
    }
    assert_int_equal(ended, 1);
    char *out = tr_stopper_take_text(f.s, &n);
    assert_int_equal(n, TEXT - STOP);
    free(out);
    close_it(&f);
    free(stop);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_cuttings),
        cmocka_unit_test(test_end_tokens),
        cmocka_unit_test(test_without_text),
        cmocka_unit_test(test_long),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
