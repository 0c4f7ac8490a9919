/* Generated text into reasoning and content (chat.md 3.2, tools off): rules, the applicable vectors, every way of cutting. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "text/chat.h"
#include "vectors.h"

#define EOS "<｜end▁of▁sentence｜>"

static bool same(const tr_buf *b, const char *want, size_t n)
{
    return b->n == n && (n == 0 || memcmp(b->s, want, n) == 0);
}

/* Pieces of `cut` bytes; NULL reasoning: there is none. */
static void check_cut(const char *name, tr_parse_start start, const char *text, size_t n,
                      size_t cut, const char *reasoning, size_t n_reasoning, const char *content,
                      size_t n_content)
{
    tr_reasoning r;

    tr_reasoning_begin(&r, start);
    for (size_t i = 0; i < n; i += cut) {
        size_t before_r = r.reasoning.n, before_c = r.content.n;
        tr_reasoning_feed(&r, text + i, n - i < cut ? n - i : cut);
        assert_true(r.reasoning.n >= before_r &&
                    r.content.n >= before_c); /* nothing is taken back */
    }
    tr_reasoning_finish(&r);
    assert_false(r.reasoning.failed || r.content.failed || r.held.failed);
    if (r.has_reasoning != (reasoning != NULL) || !same(&r.reasoning, reasoning, n_reasoning) ||
        !same(&r.content, content, n_content))
        fail_msg("%s in pieces of %zu: reasoning %d '%.*s', content '%.*s'", name, cut,
                 r.has_reasoning, (int)r.reasoning.n, r.reasoning.s ? r.reasoning.s : "",
                 (int)r.content.n, r.content.s ? r.content.s : "");
    tr_reasoning_free(&r);
}

static void check(const char *name, tr_parse_start start, const char *text, size_t n,
                  const char *reasoning, size_t n_reasoning, const char *content, size_t n_content)
{
    static const size_t cuts[] = {1, 2, 3, 7, SIZE_MAX};

    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++)
        check_cut(name, start, text, n,
                  cuts[i] < n ? cuts[i]
                  : n         ? n
                              : 1,
                  reasoning, n_reasoning, content, n_content);
}

static void test_rules(void **state)
{
    enum { R, C };
    /* clang-format off */
    static const struct { int start; const char *text, *reasoning, *content; } c[] = {
        {R, "", "", ""}, {C, "", NULL, ""}, {R, "a", "a", ""}, {C, "a", NULL, "a"},
        {R, "<think>a</think>b", "a", "b"}, {R, "<think><think>a</think>b", "<think>a", "b"},
        {R, "\n<think>a</think>b", "\n<think>a", "b"}, {R, "a<think>b</think>c", "a<think>b", "c"},
        {R, "</think>", "", ""}, {R, "<think></think>x", "", "x"}, {R, "a</think>b</think>c", "a", "b</think>c"},
        {R, "a</think> <think>b</think>c", "a", " <think>b</think>c"}, {R, "a</think></think>b", "a", "</think>b"},
        {R, "a</thin", "a</thin", ""}, {R, "<thin", "<thin", ""}, {R, "<<think>a</think>", "<<think>a", ""},
        {R, "a</thi</think>b", "a</thi", "b"}, {R, "a<</think>b", "a<", "b"}, {R, "</Think>a", "</Think>a", ""},
        {C, "<think>a</think>b", "a", "b"}, {C, " \t\r\n<think>a</think> b", "a", " b"}, {C, "<think>a", "a", ""},
        {C, "<think>", "", ""}, {C, "<think><think>a</think>", "<think>a", ""}, {C, "  ", NULL, "  "},
        {C, " <thin", NULL, " <thin"}, {C, " \n<think", NULL, " \n<think"}, {C, " x<think>a</think>", NULL, " x<think>a</think>"},
        {C, "</think>a", NULL, "</think>a"}, {C, "</think><think>a</think>", NULL, "</think><think>a</think>"},
        {C, "\xc2\xa0<think>a", NULL, "\xc2\xa0<think>a"}, {C, "< <think>a", NULL, "< <think>a"},
        {C, "a" EOS "b", NULL, "a"}, {R, "a" EOS "</think>b", "a", ""}, {C, " " EOS, NULL, " "},
        {C, EOS "<think>x</think>", NULL, ""}, {C, "a<｜end▁of▁sentence｜", NULL, "a<｜end▁of▁sentence｜"},
        {C, "a<｜end▁of" EOS "x", NULL, "a<｜end▁of"}, {R, "a</think>b" EOS "c" EOS, "a", "b"}, {R, EOS "x", "", ""},
        {C, "<think>a" EOS "</think>b", "a", ""},
    };
    /* clang-format on */

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++)
        check(c[i].text, c[i].start == R ? TR_START_REASONING : TR_START_CONTENT, c[i].text,
              strlen(c[i].text), c[i].reasoning, c[i].reasoning ? strlen(c[i].reasoning) : 0,
              c[i].content, strlen(c[i].content));
}

static void test_counts(void **state)
{
    static const char text[] = "<think>ab</think>cd</think>";

    (void)state;
    for (size_t cut = 1; cut <= sizeof text; cut++) {
        tr_reasoning r;
        tr_reasoning_begin(&r, TR_START_CONTENT);
        for (size_t i = 0; i < sizeof text - 1; i += cut) {
            size_t n = sizeof text - 1 - i;
            tr_reasoning_feed(&r, text + i, n < cut ? n : cut);
        }
        tr_reasoning_finish(&r);
        assert_int_equal(r.reasoning_bytes, strlen("<think>ab</think>"));
        assert_int_equal(r.seen, sizeof text - 1);
        tr_reasoning_finish(&r); /* a second end changes nothing */
        assert_int_equal(r.content.n, strlen("cd</think>"));
        tr_reasoning_free(&r);
    }
    tr_reasoning open;
    tr_reasoning_begin(&open, TR_START_REASONING);
    tr_reasoning_feed(&open, "abc", 3);
    /* Decided text is there at once, before the end. */
    assert_int_equal(open.reasoning.n, 3);
    tr_reasoning_finish(&open);
    assert_int_equal(open.reasoning_bytes, 0);
    tr_reasoning_free(&open);
}

/* Megabytes of what is held back longest, byte by byte: linear. */
static void test_long(void **state)
{
    enum { N = 1 << 20 };
    tr_reasoning r;

    (void)state;
    tr_reasoning_begin(&r, TR_START_CONTENT);
    for (int i = 0; i < N; i++)
        tr_reasoning_feed(&r, "\n", 1);
    assert_int_equal(r.content.n, 0);
    for (int i = 0; i < N; i++)
        tr_reasoning_feed(&r, "<", 1);
    tr_reasoning_finish(&r);
    assert_int_equal(r.content.n, 2 * N);
    tr_reasoning_free(&r);
}

/* ---- vectors ------------------------------------------------------------------------------------------------------ */

static tr_buf string_of(const tr_jtext *t, const tr_jnode *n)
{
    tr_buf b = {0};
    tr_jtext_string(t, n, &b);
    tr_buf_add(&b, "", 0);
    assert_false(b.failed);
    return b;
}

/* Tools off, or a text that holds no tool markup of either format: then tools change nothing. */
static bool applies(const tr_jtext *t, const tr_jnode *root, const tr_buf *text)
{
    static const char *const markup[] = {"｜DSML｜", "function_calls", "invoke", "tool▁", "<｜DS"};

    if (tr_jtext_member(t, root, "tools")->type == TR_J_NULL) return true;
    for (size_t i = 0; i < sizeof markup / sizeof *markup; i++)
        if (memmem(text->s, text->n, markup[i], strlen(markup[i]))) return false;
    return true;
}

static bool run_case(const char *line, size_t n)
{
    tr_jtext *t;
    tr_err err = {0};

    if (tr_jtext_parse(&t, line, n, NULL, &err) != TR_OK) fail_msg("%s", err.text);
    const tr_jnode *root = tr_jtext_root(t);
    const tr_jnode *message = tr_jtext_member(t, tr_jtext_member(t, root, "expect"), "message");
    const tr_jnode *reasoning = tr_jtext_member(t, message, "reasoning_content");
    tr_buf id = string_of(t, tr_jtext_member(t, root, "id"));
    tr_buf text = string_of(t, tr_jtext_member(t, root, "text"));
    tr_buf start = string_of(t, tr_jtext_member(t, root, "start"));
    tr_buf want_r = string_of(t, reasoning);
    tr_buf want_c = string_of(t, tr_jtext_member(t, message, "content"));
    bool counts = applies(t, root, &text);

    if (counts) {
        assert_int_equal(tr_jtext_member(t, message, "tool_calls")->n_children, 0);
        check(id.s, strcmp(start.s, "reasoning") ? TR_START_CONTENT : TR_START_REASONING, text.s,
              text.n, reasoning->type == TR_J_NULL ? NULL : want_r.s, want_r.n, want_c.s, want_c.n);
    }
    free(id.s);
    free(text.s);
    free(start.s);
    free(want_r.s);
    free(want_c.s);
    tr_jtext_free(t);
    return counts;
}

static void test_vectors(void **state)
{
    char path[4096];
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    int n_applied = 0;

    (void)state;
    FILE *f = fopen(tr_vector_path(path, sizeof path, "chat/parse.jsonl"), "r");
    if (!f) fail_msg("%s cannot be read", path);
    while ((n = getline(&line, &cap, f)) > 0)
        n_applied += run_case(line, (size_t)n);
    assert_true(n_applied > 0);
    free(line);
    fclose(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rules),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_long),
        cmocka_unit_test(test_vectors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
