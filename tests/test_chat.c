/* Chat prompts: the vectors of chat/encode.jsonl, the checks of chat.md 2.2, thinking modes, literal content, detection. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/json.h"
#include "text/chat.h"
#include "vectors.h"

static const tr_chat_options dsv32 = {.format = TR_CHAT_DSV32}, dsv31 = {.format = TR_CHAT_DSV31};

static char *string_of(const tr_jtext *t, const tr_jnode *n)
{
    tr_buf b = {0};
    tr_jtext_string(t, n, &b);
    tr_buf_add(&b, "", 0);
    assert_false(b.failed);
    return b.s;
}

static tr_jtext *parse(const char *text)
{
    tr_jtext *t;
    tr_err err = {0};
    if (tr_jtext_parse(&t, text, strlen(text), NULL, &err) != TR_OK)
        fail_msg("%s: %s", err.text, text);
    return t;
}

static tr_status encode(tr_chat_prompt *p, const char *request, bool thinking,
                        const tr_chat_options *options, tr_chat_refusal *refusal)
{
    tr_err err = {0};
    tr_jtext *t = parse(request);
    *refusal = (tr_chat_refusal){0};
    tr_status st = tr_chat_encode(p, t, tr_jtext_root(t), thinking, options, refusal, &err);
    if (st != TR_OK) {
        assert_int_equal(st, TR_E_INPUT);
        assert_non_null(refusal->code);
        assert_non_null(strstr(err.text, refusal->code));
        assert_null(p->text.s);
        assert_null(p->segments);
    }
    tr_jtext_free(t);
    return st;
}

static void check_segments(const tr_chat_prompt *p, bool literal)
{
    size_t at = 0;

    for (size_t i = 0; i < p->n_segments; i++) {
        assert_ptr_equal(p->segments[i].text, p->text.s + at);
        assert_true(p->segments[i].n > 0);
        if (!literal) assert_false(p->segments[i].literal);
        if (i) assert_true(p->segments[i].literal != p->segments[i - 1].literal);
        at += p->segments[i].n;
    }
    assert_int_equal(at, p->text.n);
}

static void expect_prompt(const char *request, bool thinking, const tr_chat_options *options,
                          const char *prompt, tr_parse_start start)
{
    tr_chat_prompt p;
    tr_chat_refusal refusal;

    if (encode(&p, request, thinking, options, &refusal) != TR_OK)
        fail_msg("%s: %s", refusal.code, request);
    assert_string_equal(p.text.s, prompt);
    assert_int_equal(p.start, start);
    check_segments(&p, options->literal_content);
    tr_chat_prompt_free(&p);
}

static void expect_refusal(const char *request, bool thinking, const tr_chat_options *options,
                           const char *code, const char *param)
{
    tr_chat_prompt p;
    tr_chat_refusal refusal;

    if (encode(&p, request, thinking, options, &refusal) == TR_OK)
        fail_msg("not refused (%s): %s -> %s", code, request, p.text.s);
    if (strcmp(refusal.code, code) || strcmp(refusal.param, param))
        fail_msg("%s at %s, not %s at %s: %s", refusal.code, refusal.param, code, param, request);
    assert_true(refusal.message[0] != '\0');
}

/* ---- vectors ------------------------------------------------------------------------------------------------------ */

static void run_case(const char *line, size_t n)
{
    tr_jtext *t;
    tr_err err = {0};
    tr_chat_prompt p, q;
    tr_chat_refusal refusal = {0};

    if (tr_jtext_parse(&t, line, n, NULL, &err) != TR_OK) fail_msg("%s", err.text);
    const tr_jnode *root = tr_jtext_root(t), *request = tr_jtext_member(t, root, "request");
    const tr_jnode *expect = tr_jtext_member(t, root, "expect");
    const tr_jnode *prompt = tr_jtext_member(t, expect, "prompt");
    char *id = string_of(t, tr_jtext_member(t, root, "id"));
    char *format = string_of(t, tr_jtext_member(t, root, "format"));
    char *want = string_of(t, prompt ? prompt : tr_jtext_member(t, expect, "error"));
    tr_chat_options options = strcmp(format, "dsv32") ? dsv31 : dsv32;
    bool thinking = tr_jtext_member(t, request, "thinking")->type == TR_J_TRUE;

    tr_status st = tr_chat_encode(&p, t, request, thinking, &options, &refusal, &err);
    if (!prompt) {
        if (st == TR_OK || strcmp(refusal.code, want))
            fail_msg("%s: %s, not %s", id, st == TR_OK ? "accepted" : refusal.code, want);
    } else {
        if (st != TR_OK) fail_msg("%s: %s", id, err.text);
        if (strcmp(p.text.s, want)) fail_msg("%s:\n%s\nnot\n%s", id, p.text.s, want);
        char *start = string_of(t, tr_jtext_member(t, expect, "start"));
        assert_int_equal(p.start,
                         strcmp(start, "reasoning") ? TR_START_CONTENT : TR_START_REASONING);
        free(start);
        check_segments(&p, false);
        options.literal_content = true;
        assert_int_equal(tr_chat_encode(&q, t, request, thinking, &options, &refusal, &err), TR_OK);
        assert_string_equal(p.text.s, q.text.s);
        check_segments(&q, true);
        tr_chat_prompt_free(&q);
    }
    tr_chat_prompt_free(&p);
    free(id);
    free(format);
    free(want);
    tr_jtext_free(t);
}

static void test_vectors(void **state)
{
    char path[4096];
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    int n_cases = 0;

    (void)state;
    FILE *f = fopen(tr_vector_path(path, sizeof path, "chat/encode.jsonl"), "r");
    if (!f) fail_msg("%s cannot be read", path);
    while ((n = getline(&line, &cap, f)) > 0) {
        run_case(line, (size_t)n);
        n_cases++;
    }
    assert_true(n_cases > 0);
    free(line);
    fclose(f);
}

/* Damaged requests are refused or encoded, by both formats; segments always cover the text. */
static int mutate_case(const char *line, size_t n, uint64_t *x)
{
    static const char bits[] = "{}[]\",:\\nu01 \xe2";
    char *copy = malloc(n);
    int n_encoded = 0;
    tr_jtext *t;

    assert_non_null(copy);
    memcpy(copy, line, n);
    for (int k = 0; k < 2; k++) {
        *x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17;
        size_t place = (size_t)(*x >> 16) % n;
        if (*x & 1)
            copy[place] = bits[(*x >> 8) % (sizeof bits - 1)];
        else /* a longer cut: whole members and messages go */
            memset(copy + place, ' ', *x % 40 < n - place ? *x % 40 : n - place);
    }
    if (tr_jtext_parse(&t, copy, n, NULL, NULL) == TR_OK) {
        const tr_jnode *request = tr_jtext_member(t, tr_jtext_root(t), "request");
        for (int k = 0; request && k < 4; k++) {
            tr_chat_options options = k & 1 ? dsv31 : dsv32;
            tr_chat_prompt p;
            options.literal_content = true;
            if (tr_chat_encode(&p, t, request, k & 2, &options, NULL, NULL) != TR_OK) continue;
            check_segments(&p, true);
            tr_chat_prompt_free(&p);
            n_encoded++;
        }
        tr_jtext_free(t);
    }
    free(copy);
    return n_encoded;
}

static void test_mutations(void **state)
{
    char path[4096];
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    uint64_t x = 88172645463325252u;
    int n_encoded = 0;

    (void)state;
    FILE *f = fopen(tr_vector_path(path, sizeof path, "chat/encode.jsonl"), "r");
    if (!f) fail_msg("%s cannot be read", path);
    while ((n = getline(&line, &cap, f)) > 0)
        for (int i = 0; i < 100; i++)
            n_encoded += mutate_case(line, (size_t)n, &x);
    assert_true(n_encoded > 100);
    free(line);
    fclose(f);
}

/* ---- checks ------------------------------------------------------------------------------------------------------- */

#define M(messages) "{\"messages\": [" messages "]}"
#define U(text)     "{\"role\": \"user\", \"content\": \"" text "\"}"
#define A(text)     "{\"role\": \"assistant\", \"content\": \"" text "\"}"
#define S(text)     "{\"role\": \"system\", \"content\": \"" text "\"}"
#define T(text)     "{\"role\": \"tool\", \"content\": \"" text "\"}"
#define CALL(args)                                                                                 \
    "{\"role\": \"assistant\", \"reasoning\": \"r\", \"tool_calls\": [{\"function\": {\"name\": "  \
    "\"f\", \"arguments\": " args "}}]}"
#define TOOL(name, more) "{\"type\": \"function\", \"function\": {\"name\": \"" name "\"" more "}}"

static void test_refusals(void **state)
{
    /* clang-format off */
    static const struct { const char *request, *code, *param; } both[] = {
        {"[]", "invalid_type", ""},
        {"{}", "empty_messages", "messages"},
        {"{\"messages\": null}", "empty_messages", "messages"},
        {"{\"messages\": {\"a\": 1}}", "invalid_type", "messages"},
        {M("7"), "invalid_type", "messages[0]"},
        {M("{}"), "unknown_role", "messages[0].role"},
        {M(U("a") ",{\"role\": \"function\", \"content\": \"x\"}"), "unknown_role", "messages[1].role"},
        {M("{\"role\": \"user\"}"), "missing_content", "messages[0].content"},
        {M("{\"role\": \"user\", \"content\": 5}"), "invalid_content", "messages[0].content"},
        {M("{\"role\": \"user\", \"content\": {}}"), "invalid_content", "messages[0].content"},
        {M("{\"role\": \"user\", \"content\": [\"x\"]}"), "invalid_content", "messages[0].content[0]"},
        {M("{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}"), "invalid_content", "messages[0].content[0]"},
        {M("{\"role\": \"user\", \"content\": [{\"text\": \"x\"}]}"), "unsupported_content_part", "messages[0].content[0]"},
        {M("{\"role\": \"developer\", \"content\": []}"), "missing_content", "messages[0].content"},
        {M(U("a") ",{\"role\": \"assistant\", \"reasoning_content\": 1}," U("b")), "invalid_content", "messages[1].reasoning_content"},
        {M(U("a") ",{\"role\": \"assistant\", \"reasoning\": []}," U("b")), "invalid_content", "messages[1].reasoning"},
        {M(U("a") "," CALL("\"{\"") "," T("x")), "invalid_tool_arguments", "messages[1].tool_calls[0].function.arguments"},
        {M(U("a") "," CALL("\"3\"") "," T("x")), "invalid_tool_arguments", "messages[1].tool_calls[0].function.arguments"},
        {M(U("a") "," CALL("\"{} x\"") "," T("x")), "invalid_tool_arguments", "messages[1].tool_calls[0].function.arguments"},
        {M(U("a") "," CALL("[]") "," T("x")), "invalid_tool_arguments", "messages[1].tool_calls[0].function.arguments"},
        {M(U("a") "," CALL("{\"x\": 1e999}") "," T("x")), "invalid_tool_arguments", "messages[1].tool_calls[0].function.arguments"},
        {M(U("a") ",{\"role\": \"assistant\", \"tool_calls\": 1}," T("x")), "invalid_tool_calls", "messages[1].tool_calls"},
        {M(U("a") ",{\"role\": \"assistant\", \"tool_calls\": [1]}," T("x")), "invalid_tool_calls", "messages[1].tool_calls[0]"},
        {M(U("a") ",{\"role\": \"assistant\", \"tool_calls\": [{\"function\": {}}]}," T("x")), "invalid_tool_calls", "messages[1].tool_calls[0]"},
        {M(T("x") "," U("a")), "orphan_tool_message", "messages[0]"},
        {M(U("a") "," A("b") "," T("x")), "orphan_tool_message", "messages[2]"},
        {M(U("a") "," CALL("null") "," T("x") "," U("c") "," T("y")), "orphan_tool_message", "messages[4]"},
        {M(U("a") "," CALL("null") "," T("x") "," T("y")), "tool_result_count", "messages[1].tool_calls"},
        {M(U("a") "," CALL("null") "," S("x")), "tool_result_count", "messages[1].tool_calls"},
        {M(U("a") "," CALL("null") "," A("x") "," T("x")), "tool_result_count", "messages[1].tool_calls"},
        {M(S("a")), "no_user_message", "messages"},
        {M(A("a")), "no_user_message", "messages"},
        {M(U("a") "," A("b")), "last_message_is_assistant", "messages[1]"},
        {"{\"messages\": [" U("a") "," CALL("null") "], \"continue_final_message\": true}", "last_message_is_assistant", "messages[1]"},
        {"{\"messages\": [" U("a") "], \"continue_final_message\": true}", "nothing_to_continue", "continue_final_message"},
        {"{\"messages\": [" U("a") "], \"continue_final_message\": 1}", "invalid_type", "continue_final_message"},
        {"{\"messages\": [" U("a") "], \"tools\": {}}", "invalid_tools", "tools"},
        {"{\"messages\": [" U("a") "], \"tools\": [1]}", "invalid_tools", "tools[0]"},
        {"{\"messages\": [" U("a") "], \"tools\": [{\"type\": \"web\", \"function\": {\"name\": \"a\"}}]}", "invalid_tools", "tools[0]"},
        {"{\"messages\": [" U("a") "], \"tools\": [" TOOL("a b", "") "]}", "invalid_tools", "tools[0].function.name"},
        {"{\"messages\": [" U("a") "], \"tools\": [" TOOL("a", "") "," TOOL("", "") "]}", "invalid_tools", "tools[1].function.name"},
        {"{\"messages\": [" U("a") "], \"tools\": [" TOOL("a", "") "," TOOL("b", "") "," TOOL("a", "") "]}", "invalid_tools", "tools"},
        {"{\"messages\": [" U("a") "], \"tools\": [" TOOL("a", ", \"description\": 1") "]}", "invalid_tools", "tools[0].function.description"},
        {"{\"messages\": [" U("a") "], \"tools\": [" TOOL("a", ", \"parameters\": {\"x\": -1e400}") "]}", "invalid_tools", "tools"},
        {"{\"messages\": [" U("a") "], \"tools\": [], \"tool_choice\": \"any\"}", "invalid_tool_choice", "tool_choice"},
    };
    static const struct { const char *request, *code, *param; } only32[] = {
        {M(U("a") "," S("b")), "system_message_position", "messages[1]"},
        {M("{\"role\": \"developer\", \"content\": \"d\"}," S("b") "," U("c")), "system_message_position", "messages[1]"},
        {M(U("a") "," CALL("null") "," T("x") "," S("b") "," U("c")), "system_message_position", "messages[3]"},
        {M(U("a") "," A("b") "," S("c")), "system_message_position", "messages[2]"},
        {M("{\"role\": \"system\", \"tools\": 1}," U("a")), "invalid_tools", "messages[0].tools"},
        {M("{\"role\": \"system\", \"response_format\": {\"maximum\": 1e309}}," U("a")), "invalid_response_format", "response_format"},
    };
    /* clang-format on */

    (void)state;
    for (size_t i = 0; i < sizeof both / sizeof *both; i++) {
        expect_refusal(both[i].request, false, &dsv32, both[i].code, both[i].param);
        expect_refusal(both[i].request, false, &dsv31, both[i].code, both[i].param);
        expect_refusal(both[i].request, true, &dsv31, both[i].code, both[i].param);
    }
    for (size_t i = 0; i < sizeof only32 / sizeof *only32; i++)
        expect_refusal(only32[i].request, false, &dsv32, only32[i].code, only32[i].param);
    expect_refusal(M(U("a") "," A("b") "," S("c") "," CALL("{}") "," T("x")), true, &dsv32,
                   "assistant_without_reasoning", "messages[1].reasoning_content");
    expect_refusal(M(U("a")), false, &(tr_chat_options){0}, "chat_not_supported", "");
}

#define BOS  "<｜begin▁of▁sentence｜>"
#define EOS  "<｜end▁of▁sentence｜>"
#define USER "<｜User｜>"
#define ASST "<｜Assistant｜>"

static void test_continue(void **state)
{
    static const char more[] = "{\"messages\": [" U("q") "," CALL("\" \"") "," T(
        "x") ", {\"role\": \"assistant\", \"content\": \"C</think>D\", \"reasoning\": \"R\"}], "
             "\"continue_final_message\": true}";
    static const char start[] = "{\"messages\": [" U(
        "q") ", {\"role\": \"assistant\", \"content\": %s, "
             "\"reasoning_content\": \"R\"}], \"continue_final_message\": true}";
    char text[512];

    (void)state;
    snprintf(text, sizeof text, start, "null");
    expect_prompt(text, true, &dsv32, BOS USER "q" ASST "<think>R", TR_START_REASONING);
    expect_prompt(text, false, &dsv32, BOS USER "q" ASST "</think>", TR_START_CONTENT);
    expect_prompt(text, true, &dsv31, BOS USER "q" ASST "<think>R", TR_START_REASONING);
    expect_prompt(text, false, &dsv31, BOS USER "q" ASST "</think>", TR_START_CONTENT);
    snprintf(text, sizeof text, start, "\"C\"");
    expect_prompt(text, true, &dsv32, BOS USER "q" ASST "<think>R</think>C", TR_START_CONTENT);
    expect_prompt(text, true, &dsv31, BOS USER "q" ASST "<think>R</think>C", TR_START_CONTENT);
    expect_prompt(text, false, &dsv31, BOS USER "q" ASST "</think>C", TR_START_CONTENT);
    /* Behind a tool result V3.1 opens no think block, so none is closed. */
    expect_prompt(more, true, &dsv31,
                  BOS USER "q" ASST
                           "</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"
                           "<｜tool▁call▁end｜><｜tool▁calls▁end｜>" EOS
                           "<｜tool▁output▁begin｜>x<｜tool▁output▁end｜>C</think>D",
                  TR_START_CONTENT);
    tr_chat_options after = dsv31;
    after.dsv31_assistant_after_tool = true;
    expect_prompt(more, true, &after,
                  BOS USER
                  "q" ASST "</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"
                  "<｜tool▁call▁end｜><｜tool▁calls▁end｜>" EOS
                  "<｜tool▁output▁begin｜>x<｜tool▁output▁end｜>" ASST "</think>C</think>D",
                  TR_START_CONTENT);
}

static void test_dsv31(void **state)
{
    static const char tool_prompt[] =
        BOS "\n\n## Tools\nYou have access to the following tools:\n\n### a\nDescription: \n\n"
            "Parameters: {\"type\": \"object\", \"properties\": {}}\n\n### b\nDescription: D\n\n"
            "Parameters: {\"x\": 1e-07}\n\nIMPORTANT: ALWAYS adhere to this exact format for tool "
            "use:\n";
    tr_chat_prompt p;
    tr_chat_refusal refusal;

    (void)state;
    /* The client's string unchanged; an object as JSON text. */
    expect_prompt(M(U("q") "," CALL("\" {\\\"a\\\":1E5}\"") "," T("x")), false, &dsv31,
                  BOS USER "q" ASST
                           "</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
                           " {\"a\":1E5}<｜tool▁call▁end｜><｜tool▁calls▁end｜>" EOS
                           "<｜tool▁output▁begin｜>x<｜tool▁output▁end｜>",
                  TR_START_CONTENT);
    expect_prompt(M(U("q") "," CALL("{\"a\":1E5}") "," T("x") "," S("late") "," A(
                      "p</think>b") "," A("p</think>c") "," U("z")),
                  true, &dsv31,
                  BOS "late" USER "q" ASST "</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f"
                      "<｜tool▁sep｜>{\"a\": 100000.0}<｜tool▁call▁end｜><｜tool▁calls▁end｜>" EOS
                      "<｜tool▁output▁begin｜>x<｜tool▁output▁end｜>p</think>b" EOS "c" EOS USER
                      "z" ASST "<think>",
                  TR_START_REASONING);
    expect_prompt(M("{\"role\": \"developer\", \"content\": \"D\"}," S("") "," U("q")), false,
                  &dsv31, BOS "D\n\n" USER "q" ASST "</think>", TR_START_CONTENT);
    assert_int_equal(encode(&p,
                            "{\"messages\": [" U("q") "], \"tools\": [" TOOL("a", "") "," TOOL(
                                "b", ", \"parameters\": {\"x\":1E-7}, \"description\": \"D\"") "]}",
                            false, &dsv31, &refusal),
                     TR_OK);
    assert_true(p.tools);
    assert_memory_equal(p.text.s, tool_prompt, sizeof tool_prompt - 1);
    tr_chat_prompt_free(&p);
}

static void test_dsv32_details(void **state)
{
    static const char schema[] =
        "{\"messages\": [" U("q") "], \"response_format\": {\"type\": \"json_schema\", "
                                  "\"json_schema\": {\"name\": \"n\", \"schema\": {\"a\":1}}}}";
    tr_chat_options options = dsv32;
    tr_chat_prompt p;
    tr_chat_refusal refusal;

    (void)state;
    expect_prompt(schema, false, &dsv32, BOS USER "q" ASST "</think>", TR_START_CONTENT);
    options.response_format_in_prompt = true;
    expect_prompt(schema, false, &options,
                  BOS
                  "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to "
                  "reply:\n{\"a\": 1}" USER "q" ASST "</think>",
                  TR_START_CONTENT);
    /* Results are reordered only where all ids match. */
    expect_prompt(M(U("q") ", {\"role\": \"assistant\", \"tool_calls\": ["
                           "{\"id\": \"1\", \"function\": {\"name\": \"a\"}}, "
                           "{\"id\": \"2\", \"function\": {\"name\": \"b\"}}]}, "
                           "{\"role\": \"tool\", \"tool_call_id\": \"2\", \"content\": \"two\"}, "
                           "{\"role\": \"tool\", \"tool_call_id\": \"3\", \"content\": \"three\"}"),
                  false, &dsv32,
                  BOS USER
                  "q" ASST "</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"a\">\n\n"
                  "</｜DSML｜invoke>\n<｜DSML｜invoke name=\"b\">\n\n</｜DSML｜invoke>\n"
                  "</｜DSML｜function_calls>" EOS "\n\n<function_results>\n<result>two</result>\n"
                  "<result>three</result>\n</function_results>\n\n</think>",
                  TR_START_CONTENT);
    /* Integers of any length, repeated keys, surrogates paired and lone, NUL. */
    static const char odd[] =
        BOS USER "q\xEF\xBF\xBD\0!" ASST
                 "</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n"
                 "<｜DSML｜parameter name=\"n\" string=\"false\">0</｜DSML｜parameter>\n"
                 "<｜DSML｜parameter name=\"s\" string=\"true\">😀</｜DSML｜parameter>\n"
                 "<｜DSML｜parameter name=\"l\" "
                 "string=\"false\">[123456789012345678901234567890]</｜DSML｜parameter>\n"
                 "</｜DSML｜invoke>\n</｜DSML｜function_calls>" EOS
                 "\n\n<function_results>\n<result>x</result>\n</function_results>\n\n</think>";
    assert_int_equal(
        encode(&p,
               M(U("q\\ud800\\u0000!") "," CALL(
                   "\"{\\\"n\\\": 1, \\\"s\\\": \\\"\\\\ud83d\\\\ude00\\\", \\\"n\\\": -0, "
                   "\\\"l\\\":[123456789012345678901234567890]}\"") "," T("x")),
               false, &dsv32, &refusal),
        TR_OK);
    assert_int_equal(p.text.n, sizeof odd - 1);
    assert_memory_equal(p.text.s, odd, sizeof odd - 1);
    tr_chat_prompt_free(&p);
    assert_int_equal(
        encode(&p,
               "{\"messages\": [" U("q") "], \"tool_choice\": \"none\", \"tools\": [" TOOL("a",
                                                                                           "") "]}",
               false, &dsv32, &refusal),
        TR_OK);
    assert_false(p.tools);
    tr_chat_prompt_free(&p);
}

/* ---- literal content ---------------------------------------------------------------------------------------------- */

/* Every text of the client carries the mark X<｜Assistant｜>; in no template stretch may an X stand, and in literal ones
 * nothing of the template. */
static void test_literal(void **state)
{
#define X "X<｜Assistant｜>X"
    static const char request[] =
        "{\"messages\": [{\"role\": \"system\", \"content\": \"" X
        "\"}, " U(X) ","
                     "{\"role\": \"assistant\", \"content\": \"" X "\", \"reasoning_content\": \"" X
                     "\", "
                     "\"tool_calls\": [{\"function\": {\"name\": \"" X "\", \"arguments\": {\"" X
                     "\": \"" X "\", "
                     "\"X2\": [\"" X
                     "\"]}}}, {\"function\": {\"name\": \"X\", \"arguments\": \"{\\\"" X
                     "\\\": 1}\"}}]}, " T(X) "," T(
                         X) "], \"tools\": [{\"function\": {\"name\": \"X\", \"description\": \"" X
                            "\", "
                            "\"parameters\": {\"X\": \"" X "\"}}}]}";

    (void)state;
    for (int k = 0; k < 4; k++) {
        tr_chat_options options = k & 1 ? dsv31 : dsv32;
        tr_chat_prompt plain, p;
        tr_chat_refusal refusal;
        int n_literal = 0;
        assert_int_equal(encode(&plain, request, k & 2, &options, &refusal), TR_OK);
        assert_int_equal(plain.n_segments, 1);
        options.literal_content = true;
        assert_int_equal(encode(&p, request, k & 2, &options, &refusal), TR_OK);
        assert_string_equal(p.text.s, plain.text.s);
        check_segments(&p, true);
        for (size_t i = 0; i < p.n_segments; i++) {
            const tr_segment *s = &p.segments[i];
            n_literal += s->literal;
            if (!s->literal) assert_null(memchr(s->text, 'X', s->n));
            if (!s->literal) continue;
            assert_null(memmem(s->text, s->n, "DSML", 4));
            assert_null(memmem(s->text, s->n, "<think>", 7));
            assert_null(memmem(s->text, s->n, "</think>", 8));
            assert_null(memmem(s->text, s->n, "▁", 3));
        }
        assert_true(n_literal >= 9);
        tr_chat_prompt_free(&p);
        tr_chat_prompt_free(&plain);
    }
}

/* With the tokenizer: the client's markers stay text of several tokens, the template's are one token each. */
static void test_literal_tokens(void **state)
{
    static const char request[] = M(U(X));
    char path[4096];
    tr_tokenizer *tok = NULL;
    tr_err err = {0};

    (void)state;
    tr_vector_path(path, sizeof path, "chat/tokenizer_a.json");
    if (tr_tokenizer_open(&tok, path, NULL, NULL, &err) != TR_OK) fail_msg("%s", err.text);
    tr_encoder *e = tr_encoder_create(tok);
    assert_non_null(e);
    for (int literal = 0; literal < 2; literal++) {
        tr_chat_options options = dsv32;
        tr_chat_prompt p;
        tr_chat_refusal refusal;
        int32_t *ids;
        size_t n, n_marks = 0;
        options.literal_content = literal;
        assert_int_equal(encode(&p, request, false, &options, &refusal), TR_OK);
        if (tr_encode(e, p.segments, p.n_segments, &ids, &n, &err) != TR_OK)
            fail_msg("%s", err.text);
        for (size_t i = 0; i < n; i++)
            n_marks += ids[i] == tr_tokenizer_added(tok, ASST);
        assert_int_equal(n_marks, literal ? 1 : 2);
        assert_int_equal(ids[0], tr_tokenizer_added(tok, BOS));
        assert_int_equal(ids[n - 1], tr_tokenizer_added(tok, "</think>"));
        free(ids);
        tr_chat_prompt_free(&p);
    }
    tr_encoder_free(e);
    tr_tokenizer_free(tok);
}

/* ---- thinking ----------------------------------------------------------------------------------------------------- */

static void test_thinking(void **state)
{
    /* clang-format off */
    static const struct { const char *body; int want; const char *param; } c[] = { /* want -1: the default, -2: refused */
        {"{}", -1, ""}, {"{\"thinking\": null, \"chat_template_kwargs\": null}", -1, ""},
        {"{\"chat_template_kwargs\": {\"thinking\": true, \"enable_thinking\": false}}", 1, ""},
        {"{\"chat_template_kwargs\": {\"enable_thinking\": false}, \"thinking\": {\"type\": \"enabled\"}}", 0, "chat_template_kwargs.enable_thinking"},
        {"{\"thinking\": {\"type\": \"enabled\"}, \"reasoning_effort\": \"none\"}", 1, ""},
        {"{\"thinking\": {\"type\": \"disabled\"}}", 0, "thinking"},
        {"{\"reasoning_effort\": \"none\"}", 0, "reasoning_effort"},
        {"{\"reasoning_effort\": \"low\"}", 1, ""},
        {"{\"thinking\": {\"type\": \"auto\"}}", -2, "thinking"}, {"{\"thinking\": true}", -2, "thinking"},
        {"{\"chat_template_kwargs\": 1}", -2, "chat_template_kwargs"},
        {"{\"chat_template_kwargs\": {\"thinking\": 1}}", -2, "chat_template_kwargs.thinking"},
        {"{\"reasoning_effort\": 3}", -2, "reasoning_effort"},
    };
    /* clang-format on */

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        for (int k = 0; k < 3; k++) {
            tr_chat_options options = {
                .format = TR_CHAT_DSV32, .default_thinking = k == 1, .thinking_only = k == 2};
            tr_chat_refusal refusal = {0};
            tr_err err = {0};
            bool thinking;
            tr_jtext *t = parse(c[i].body);
            tr_status st =
                tr_chat_thinking(&thinking, t, tr_jtext_root(t), &options, &refusal, &err);
            bool refused = c[i].want == -2 || (k == 2 && c[i].want == 0);
            assert_int_equal(st, refused ? TR_E_INPUT : TR_OK);
            if (refused)
                assert_string_equal(refusal.param, c[i].param);
            else
                assert_int_equal(thinking, c[i].want == -1 ? k > 0 : c[i].want);
            tr_jtext_free(t);
        }
    }
    tr_chat_options options = {.format = TR_CHAT_DSV32, .thinking_only = true};
    static const char with_tools[] = "{\"messages\": [" U("a") "], \"tools\": [" TOOL("a", "") "]}";
    tr_chat_prompt p;
    tr_chat_refusal refusal;
    expect_refusal(with_tools, true, &options, "tools_not_supported", "tools");
    options.allow_tools = true;
    assert_int_equal(encode(&p, with_tools, true, &options, &refusal), TR_OK);
    tr_chat_prompt_free(&p);
}

/* ---- detection ---------------------------------------------------------------------------------------------------- */

static void write_file(const char *dir, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void remove_file(const char *dir, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(remove(path), 0);
}

static void expect_format(const char *dir, const tr_tokenizer *tok, tr_status status,
                          tr_chat_format want)
{
    tr_err err = {0};
    tr_chat_format format;
    assert_int_equal(tr_chat_format_detect(&format, dir, tok, NULL, &err), status);
    assert_int_equal(format, want);
}

static void test_detect(void **state)
{
    char dir[] = "/tmp/tr_chat_XXXXXX", sub[64], path[4096];
    tr_tokenizer *tok = NULL, *poor = NULL;
    tr_err err = {0};

    (void)state;
    assert_non_null(mkdtemp(dir));
    snprintf(sub, sizeof sub, "%s/encoding", dir);
    tr_vector_path(path, sizeof path, "chat/tokenizer_a.json");
    if (tr_tokenizer_open(&tok, path, NULL, NULL, &err) != TR_OK) fail_msg("%s", err.text);
    tr_vector_path(path, sizeof path, "chat/tokenizer_flags.json");
    if (tr_tokenizer_open(&poor, path, NULL, NULL, &err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(tr_chat_check_tokenizer(tok, &err), TR_OK);
    assert_int_equal(tr_chat_check_tokenizer(poor, &err), TR_E_INPUT);

    expect_format(dir, NULL, TR_E_USAGE, TR_CHAT_NONE);
    expect_format(dir, poor, TR_E_USAGE, TR_CHAT_NONE);
    expect_format(dir, tok, TR_OK, TR_CHAT_DSV32);
    write_file(dir, "tokenizer_config.json", "{\"chat_template\": \"\"}");
    expect_format(dir, NULL, TR_E_USAGE, TR_CHAT_NONE);
    write_file(dir, "tokenizer_config.json", "{\"chat_template\": \"{{ x }}\"}");
    expect_format(dir, tok, TR_OK, TR_CHAT_DSV31);
    assert_int_equal(mkdir(sub, 0700), 0);
    expect_format(dir, tok, TR_OK, TR_CHAT_DSV31);
    write_file(sub, "encoding_dsv32.py", "");
    expect_format(dir, NULL, TR_OK, TR_CHAT_DSV32);
    write_file(dir, "tokenizer_config.json", "{");
    expect_format(dir, NULL, TR_E_INPUT, TR_CHAT_NONE);
    remove_file(sub, "encoding_dsv32.py");
    remove_file(dir, "encoding");
    remove_file(dir, "tokenizer_config.json");
    write_file(dir, "chat_template.jinja", "x");
    expect_format(dir, NULL, TR_OK, TR_CHAT_DSV31);
    remove_file(dir, "chat_template.jinja");
    assert_int_equal(rmdir(dir), 0);
    tr_tokenizer_free(tok);
    tr_tokenizer_free(poor);
}

/* A hostile request of n repetitions costs time in proportion, not its square: 30,000 calls and as many results. */
static void test_large(void **state)
{
    enum { N = 30000 };
    tr_buf b = {0};
    tr_chat_prompt p;
    tr_chat_refusal refusal;

    (void)state;
    tr_buf_puts(&b, "{\"messages\": [" U("q") ", {\"role\": \"assistant\", \"tool_calls\": [");
    for (int i = 0; i < N; i++)
        tr_buf_printf(&b,
                      "%s{\"id\": \"%d\", \"function\": {\"name\": \"f\", \"arguments\": "
                      "\"{\\\"a\\\": %d}\"}}",
                      i ? "," : "", i, i);
    tr_buf_puts(&b, "]}");
    for (int i = N - 1; i >= 0; i--)
        tr_buf_printf(&b, ",{\"role\": \"tool\", \"tool_call_id\": \"%d\", \"content\": \"r%d\"}",
                      i, i);
    tr_buf_puts(&b, "]}");
    assert_false(b.failed);
    assert_int_equal(encode(&p, b.s, false, &dsv32, &refusal), TR_OK);
    const char *first = strstr(p.text.s, "<result>");
    assert_memory_equal(first, "<result>r0</result>\n<result>r1</result>\n", 40);
    tr_chat_prompt_free(&p);
    free(b.s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_literal_tokens), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_continue),       cmocka_unit_test(test_dsv31),
        cmocka_unit_test(test_dsv32_details),  cmocka_unit_test(test_literal),
        cmocka_unit_test(test_thinking),       cmocka_unit_test(test_detect),
        cmocka_unit_test(test_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
