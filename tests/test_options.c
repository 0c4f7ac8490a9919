/* The command line of batch: every option, its bounds, what is not built, what excludes each
 * other; --help's width. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "command/options.h"

enum { ARGS_MAX = 48 };

/* Words of a command line split at spaces; `parts` point into copy, which the caller frees. */
static tr_status parse(const char *line, tr_batch_options *o, tr_err *err, char **copy)
{
    static char *argv[ARGS_MAX];
    int argc = 0;
    char *save = NULL;
    *copy = strdup(line);
    assert_non_null(*copy);
    for (char *w = strtok_r(*copy, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
        assert_true(argc < ARGS_MAX - 1);
        argv[argc++] = w;
    }
    argv[argc] = NULL;
    return tr_batch_options_parse(o, argc, argv, err);
}

static void test_good(void **state)
{
    tr_batch_options o;
    tr_err err = {0};
    char *copy;
    (void)state;
    assert_int_equal(parse("batch -m M -i in -o out", &o, &err, &copy), TR_OK);
    assert_string_equal(o.model, "M");
    assert_string_equal(o.input, "in");
    assert_string_equal(o.output, "out");
    assert_string_equal(o.kv_dtype, "fp8");
    assert_string_equal(o.chat_format, "auto");
    assert_string_equal(o.load_format, "safetensors");
    assert_true(o.seed == 0 && o.max_model_len == 0 && o.max_sequences == 32 &&
                o.max_batch_tokens == 1024);
    assert_true(!o.resume && !o.merge && !o.help && !o.prompt && o.n_parts == 0);
    assert_true(!o.ranks.tp && !o.ranks.pp && !o.ranks.dp && !o.ranks.cp && !o.ranks.ep &&
                !o.ranks.moe_tp && o.step_timeout == -1); /* not given */
    free(copy);
    assert_int_equal(parse("batch --model=M --input - --output - --kv-dtype f32 --max-model-len "
                           "4096 --seed 9223372036854775807 "
                           "--load-format dummy --override a=1 --override b.c=2 --device cpu --tp "
                           "1 --pp 1 --dp 1 --cp 1 --ep 1 "
                           "--moe-tp 1",
                           &o, &err, &copy),
                     TR_OK);
    assert_true(o.seed == INT64_MAX && o.max_model_len == 4096 && o.overrides.n == 2);
    assert_string_equal(o.overrides.s[1], "b.c=2");
    assert_true(o.ranks.tp == 1 && o.ranks.moe_tp == 1 && !o.ranks.pp_layers && !o.ranks.cp_mode);
    free(copy);
    assert_int_equal(parse("batch -m M -i in -o out --tp 8 --pp 4 --dp 2 --cp 3 --ep 16 --moe-tp 5 "
                           "--pp-layers 16,16,16,13 --cp-mode in-seq-split --step-timeout 90",
                           &o, &err, &copy),
                     TR_OK);
    assert_true(o.ranks.tp == 8 && o.ranks.pp == 4 && o.ranks.dp == 2 && o.ranks.cp == 3 &&
                o.ranks.ep == 16 && o.ranks.moe_tp == 5 && o.step_timeout == 90);
    assert_string_equal(o.ranks.pp_layers, "16,16,16,13");
    assert_string_equal(o.ranks.cp_mode, "in-seq-split");
    free(copy);
    assert_int_equal(parse("batch -mM -iin -oout --default-thinking --thinking-only --allow-tools "
                           "--literal-content "
                           "--dsv31-assistant-after-tool "
                           "--strict-params --resume --verbose "
                           "--no-bind --no-overlap --no-prefix-cache --shard 0/1 --speculate 0 "
                           "--chat-format dsv31",
                           &o, &err, &copy),
                     TR_OK);
    assert_true(o.default_thinking && o.thinking_only && o.allow_tools && o.literal_content &&
                !o.response_format_in_prompt && o.dsv31_assistant_after_tool && o.strict_params &&
                o.resume && o.verbose && o.no_bind && o.no_overlap && o.no_prefix_cache);
    free(copy);
    assert_int_equal(parse("batch -m M -i in -o out", &o, &err, &copy), TR_OK);
    assert_true(o.grace == 60 && o.budget_s < 0 && o.shard.i == 0 && o.shard.n == 1);
    free(copy);
    assert_int_equal(parse("batch -m M -i in -o out --time-budget 1-00:00:30 --grace 0 --shard 3/8",
                           &o, &err, &copy),
                     TR_OK);
    assert_true(o.grace == 0 && o.budget_s == 86430 && o.shard.i == 3 && o.shard.n == 8);
    free(copy);
    assert_int_equal(parse("batch --merge -i in -o all p1 p2 p3", &o, &err, &copy), TR_OK);
    assert_int_equal(o.n_parts, 3);
    assert_string_equal(o.part[2], "p3");
    free(copy);
    assert_int_equal(parse("batch p1 --merge -i in p2 -o all", &o, &err, &copy),
                     TR_OK); /* anywhere */
    assert_int_equal(o.n_parts, 2);
    free(copy);
    assert_int_equal(parse("batch --merge --verbose -i in -o - p", &o, &err, &copy), TR_OK);
    assert_true(o.merge && o.verbose);
    free(copy);
    assert_int_equal(parse("batch -m M --prompt Hello", &o, &err, &copy), TR_OK);
    assert_string_equal(o.prompt, "Hello");
    free(copy);
    assert_int_equal(parse("batch --help", &o, &err, &copy), TR_OK);
    assert_true(o.help);
    free(copy);
}

static void test_bad(void **state)
{
    /* the line, and a word of the message */
    static const char *const t[][2] = {
        {"batch", "-m MODEL"},
        {"batch -m", "-m"},
        {"batch --model", "--model"},
        {"batch -m M", "-i IN"},
        {"batch -m M -i in", "-o OUT"},
        {"batch -m M -o out", "-i IN"},
        {"batch -i in -o out", "-m MODEL"},
        {"batch -m M -i in --output=", "-o OUT"}, /* empty: as if it were not given */
        {"batch -m M --input= -o out", "-i IN"},
        {"batch --model= -i in -o out", "-m MODEL"},
        {"batch --merge -i in --output= p", "--merge"},
        {"batch -m M -i in -o out more", "more"},
        {"batch -m M --prompt x -i in", "--prompt"},
        {"batch -m M --prompt x -o out", "--prompt"},
        {"batch -m M --prompt x --resume", "--prompt"},
        {"batch -m M -i in -o - --resume", "--resume"},
        {"batch --merge", "--merge"},
        {"batch --merge -i in -o all", "--merge"},
        {"batch --merge -i in p", "--merge"},
        {"batch -m M -i in -o out --no-such-thing", "--no-such-thing"},
        {"batch -m M -i in -o out -z", "-z"},
        {"batch -m M -i in -o out --resume=yes", "no value"},
        {"batch -m M -i in -o out --seed", "--seed"},
        {"batch -m M -i in -o out --seed -1", "--seed -1"},
        {"batch -m M -i in -o out --seed 9223372036854775808", "--seed"},
        {"batch -m M -i in -o out --seed 1x", "--seed 1x"},
        {"batch -m M -i in -o out --seed 0x10", "--seed"},
        {"batch -m M -i in -o out --seed 1e3", "--seed"},
        {"batch -m M -i in -o out --seed=", "--seed"},
        {"batch -m M -i in -o out --max-model-len 1", "--max-model-len"},
        {"batch -m M -i in -o out --max-model-len 2147483648", "--max-model-len"},
        {"batch -m M -i in -o out --max-sequences 0", "--max-sequences"},
        {"batch -m M -i in -o out --max-sequences 4097", "--max-sequences"},
        {"batch -m M -i in -o out --max-batch-tokens 0", "--max-batch-tokens"},
        {"batch -m M -i in -o out --max-batch-tokens 1048577", "--max-batch-tokens"},
        {"batch -m M -i in -o out --kv-dtype fp16", "fp8|bf16|f32"},
        {"batch -m M -i in -o out --kv-dtype fp8|bf16", "--kv-dtype"},
        {"batch -m M -i in -o out --chat-format chatml", "--chat-format"},
        {"batch -m M -i in -o out --load-format gguf", "--load-format"},
        {"batch -m M -i in -o out --allow-tools", "--thinking-only"},
        {"batch -m M -i in -o out --tp 0", "--tp 0"},
        {"batch -m M -i in -o out --pp -1", "--pp -1"},
        {"batch -m M -i in -o out --dp 1048577", "--dp 1048577"},
        {"batch -m M -i in -o out --cp two", "--cp two"},
        {"batch -m M -i in -o out --ep=", "--ep"},
        {"batch -m M -i in -o out --moe-tp 1.5", "--moe-tp 1.5"},
        {"batch -m M -i in -o out --cp-mode zigzag", "round-robin-split|in-seq-split"},
        {"batch -m M -i in -o out --step-timeout -1", "--step-timeout -1"},
        {"batch -m M -i in -o out --papi X", "--profile FILE"},
        {"batch -m M -i in -o out --profile p.h5 --papi=", "--papi '' names no event"},
        {"batch -m M -i in -o out --profile p.h5 --papi ,,", "--papi ',,' names no event"},
        {"batch -m M -i in -o out --profile-trace", "--profile FILE"},
        {"batch -m M -i in -o out --profile-flush 30", "--profile FILE"},
        {"batch -m M -i in -o out --profile=", "--profile FILE"},
        /* not built yet: refused, the option named */
        {"batch -m M -i a -o b --response-format-in-prompt",
         "--response-format-in-prompt: this build has no constrained decoding"},
        {"batch -m M -i in -o out --device gpu", "--device gpu"},
        {"batch -m M -i in -o out --speculate 1", "--speculate 1"},
        {"batch -m M -i in -o out --time-budget soon", "--time-budget soon"},
        {"batch -m M -i in -o out --grace -1", "--grace -1"},
        {"batch -m M -i in -o out --grace 86401", "--grace"},
        {"batch -m M -i in -o out --shard 2/2", "--shard 2/2"},
        {"batch -m M --prompt x --shard 1/2", "--shard"},
        {"batch --merge -i in -o all --shard 1/2 p", "--shard"},
        {"batch --merge -i in -o all --save-every 60 p", "--save-every"},
        {"batch --merge -i in -o all p --save-every 0", "--save-every"},
        {"batch --merge -i in -o - -m M p", "--model"},
        {"batch --merge -i in -o all --resume p", "--resume"},
        {"batch --merge -i in -o all --device auto p", "--device"},
        {"batch --merge -i in -o all --override a=1 p", "--override"},
        {"batch --merge -i in -o all --grace 0 p", "--grace"},
        {"batch --merge -i in -o all --tp 2 p", "--tp"},
        {"batch --merge -i in -o all --time-budget 60 p", "--time-budget"},
        {"batch --merge -i in -o all --profile x.h5 p", "--profile"},
        {"batch -m M -i in -o - --save-every 60", "--save-every"},
        {"batch -m M -i in -o - --save-every 0", "--save-every"},
        {"batch -m M --prompt x --save-every 60", "--save-every"},
        {"batch -m M -i in -o out --shard auto", "--shard auto"},
        {"batch -m M -i in -o out --index-topk-freq 4", "--index-topk-freq"},
        {"batch -m M -i in -o out --index-topk-pattern FS", "--index-topk-pattern"},
        {"batch -m M -i in -o out --check-agree", "--check-agree"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        tr_batch_options o;
        tr_err err = {0};
        char *copy;
        tr_status st = parse(t[i][0], &o, &err, &copy);
        if (st != TR_E_USAGE || !strstr(err.text, t[i][1]))
            fail_msg("%s: %d: %s", t[i][0], st, err.text);
        free(copy);
    }
}

static void test_many_overrides(void **state)
{
    tr_err err = {0};
    tr_batch_options o;
    char *argv[8 + 2 * (TR_OPTION_LIST_MAX + 1)] = {(char *)"batch"};
    int argc = 1;
    (void)state;
    for (int i = 0; i <= TR_OPTION_LIST_MAX; i++) {
        argv[argc++] = (char *)"--override";
        argv[argc++] = (char *)"a=1";
    }
    assert_int_equal(tr_batch_options_parse(&o, argc, argv, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "--override"));
}

static void test_help(void **state)
{
    char *text = NULL;
    size_t n = 0;
    (void)state;
    FILE *f = open_memstream(&text, &n);
    assert_non_null(f);
    tr_batch_options_help(f);
    fclose(f);
    for (char *line = text, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        assert_non_null(end);
        if (end - line > 80)
            fail_msg("%d columns: %.*s", (int)(end - line), (int)(end - line), line);
    }
    static const char *const words[] = {"--model", "--kv-dtype", "-i, --input", "--seed",
                                        "--merge", "default 32", "tokens"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        assert_non_null(strstr(text, words[i]));
    assert_null(strstr(text, "--check-agree")); /* what is not built is not offered */
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),
        cmocka_unit_test(test_bad),
        cmocka_unit_test(test_many_overrides),
        cmocka_unit_test(test_help),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
