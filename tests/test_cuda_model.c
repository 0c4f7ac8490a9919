/* The trained checkpoint models/tiny on a GPU: recall and tool answers exact with fp8 and bf16
 * caches, mean negative log-likelihood of unseen text close to the CPU's, and bits that depend
 * neither on the run nor on how a prompt was cut. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_test.h"
#include "fixture.h"
#include "vectors.h"

enum { MAX_TOKENS = 4096, CHUNK = 200 };

static int ids_of(const json_t *array, int32_t *ids)
{
    const int n = (int)json_array_size(array);
    assert_true(n > 0 && n <= MAX_TOKENS);
    for (int i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return n;
}

static void open_tiny(tr_fixture *f, const char *device, tr_dtype dtype)
{
    char dir[512];
    const tr_fixture_options options = {.dir = tr_source_path(dir, sizeof dir, "models/tiny"),
                                        .device = device,
                                        .kv_dtype = dtype,
                                        .max_model_len = MAX_TOKENS,
                                        .n_slots = 2};
    assert_int_equal(tr_fixture_open(f, &options), 0);
}

/* A prompt of n tokens in slot 0, `chunk` rows a step; the first sampled token. */
static int32_t prefill(tr_fixture *f, const int32_t *prompt, int n, int chunk, int form)
{
    int32_t token = -1;
    assert_int_equal(tr_fixture_slot(f, 0, TR_MAX_LOGPROBS), 0);
    for (int i = 0; i < n; i += chunk) {
        const int rows = n - i < chunk ? n - i : chunk;
        assert_int_equal(
            tr_fixture_run(f, 0, prompt + i, i, rows, i + rows == n, form, NULL, &token, NULL), 0);
    }
    return token;
}

/* Greedy continuation of one case; 1 when it is the reference's. */
static int continues_alike(tr_fixture *f, const json_t *c)
{
    int32_t prompt[MAX_TOKENS], want[MAX_TOKENS];
    const int n = ids_of(json_object_get(c, "prompt_ids"), prompt),
              n_want = ids_of(json_object_get(c, "greedy_ids"), want);
    int32_t token = prefill(f, prompt, n, CHUNK, TR_FORM_AUTO);
    for (int i = 0; i < n_want; i++) {
        if (token != want[i]) return 0;
        assert_int_equal(
            tr_fixture_run(f, 0, &token, n + i, 1, 1, TR_FORM_ABSORBED, NULL, &token, NULL), 0);
    }
    return 1;
}

static void greedy(tr_dtype dtype)
{
    char path[512];
    json_t *cases = tr_read_json(tr_vector_path(path, sizeof path, "tiny/generation.json"));
    int n = 0;
    tr_fixture f;
    open_tiny(&f, "cuda", dtype);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i);
        const char *kind = json_string_value(json_object_get(c, "kind"));
        if (strcmp(kind, "text") == 0) continue;
        n++;
        if (!continues_alike(&f, c)) fail_msg("case %zu (%s): another greedy answer", i, kind);
    }
    assert_true(n > 0);
    tr_fixture_close(&f);
    json_decref(cases);
}

static void test_greedy_fp8(void **state)
{
    (void)state;
    greedy(TR_E4M3);
}

static void test_greedy_bf16(void **state)
{
    (void)state;
    greedy(TR_BF16);
}

/* Log-probabilities of n - 1 tokens of a text. */
static void score(const char *device, tr_dtype dtype, const int32_t *ids, int n, int chunk,
                  int form, float *logprob)
{
    tr_fixture f;
    open_tiny(&f, device, dtype);
    assert_int_equal(tr_fixture_slot(&f, 1, 0), 0);
    for (int i = 0; i < n - 1; i += chunk) {
        const int rows = n - 1 - i < chunk ? n - 1 - i : chunk;
        assert_int_equal(
            tr_fixture_run(&f, 1, ids + i, i, rows, rows, form, ids + i + 1, NULL, logprob + i), 0);
    }
    tr_fixture_close(&f);
}

static double mean(const float *x, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum -= (double)x[i];
    return sum / n;
}

/* The CPU's products have fp32 inputs, the GPU's e4m3 and bf16: 4.952 and 4.956 (H200; 2047 tokens). Such roundings alone, put
 * into the CPU's operations one after the other, gave 4.947 to 4.991, since keys and experts are chosen otherwise. */
static const double nll_bound = 0.02;

static void test_nll(void **state)
{
    char path[512];
    int32_t ids[MAX_TOKENS];
    (void)state;
    json_t *root = tr_read_json(tr_vector_path(path, sizeof path, "tiny/nll.json"));
    const int n = ids_of(json_object_get(root, "ids"), ids);
    float *gpu = calloc((size_t)n, sizeof *gpu), *cpu = calloc((size_t)n, sizeof *cpu);
    assert_true(gpu && cpu);
    score("cpu", TR_E4M3, ids, n, CHUNK, TR_FORM_AUTO, cpu);
    score("cuda", TR_E4M3, ids, n, CHUNK, TR_FORM_AUTO, gpu);
    const double a = mean(gpu, n - 1), b = mean(cpu, n - 1);
    printf("mean nll of %d tokens: cuda %.6f, cpu %.6f\n", n - 1, a, b);
    if (!(fabs(a - b) <= nll_bound)) fail_msg("mean nll %.6f, the CPU's %.6f", a, b);
    free(cpu);
    free(gpu);
    json_decref(root);
}

/* The same text in other chunks, and twice: the same bits. */
static void test_same_bits(void **state)
{
    static const int chunks[] = {CHUNK, CHUNK, 37, 64, 13, 5};
    static const int forms[] = {TR_FORM_AUTO, TR_FORM_ABSORBED};
    enum { N = 420 };
    char path[512];
    int32_t ids[MAX_TOKENS];
    float first[N], again[N];
    (void)state;
    json_t *root = tr_read_json(tr_vector_path(path, sizeof path, "tiny/nll.json"));
    assert_true(ids_of(json_object_get(root, "ids"), ids) >= N);
    for (size_t form = 0; form < 2; form++)
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
            score("cuda", TR_E4M3, ids, N, chunks[i], forms[form], i ? again : first);
            for (int j = 0; i && j < N - 1; j++)
                if (memcmp(&first[j], &again[j], sizeof *first) != 0)
                    fail_msg("form %zu, chunks of %d: token %d has %.9g, not %.9g", form, chunks[i],
                             j, (double)again[j], (double)first[j]);
        }
    json_decref(root);
}

/* N tokens behind a prompt, one a step, with records made ahead or as steps come. */
enum { N_GENERATED = 12, N_PROMPT = 300 };

static void generate(const int32_t *prompt, bool ahead, int32_t *tokens, float *logprobs)
{
    tr_fixture f;
    tr_step_records made = {0};
    open_tiny(&f, "cuda", TR_E4M3);
    if (ahead) {
        assert_int_equal(tr_step_record(&f.step, f.model, 2, &made, &f.err), TR_OK);
        assert_int_equal(made.n, 4); /* 1 and 2 rows, without and with selection */
        assert_true(made.ns > 0);
    }
    int32_t token = prefill(&f, prompt, N_PROMPT, CHUNK, TR_FORM_AUTO);
    for (int i = 0; i < N_GENERATED; i++) {
        tokens[i] = token;
        assert_int_equal(tr_fixture_run(&f, 0, &tokens[i], N_PROMPT + i, 1, 1, TR_FORM_AUTO, NULL,
                                        &token, &logprobs[i]),
                         0);
    }
    tr_fixture_close(&f);
}

static void test_recorded_ahead(void **state)
{
    char path[512];
    int32_t ids[MAX_TOKENS], tokens[2][N_GENERATED];
    float logprobs[2][N_GENERATED];
    (void)state;
    json_t *root = tr_read_json(tr_vector_path(path, sizeof path, "tiny/nll.json"));
    assert_true(ids_of(json_object_get(root, "ids"), ids) >= N_PROMPT);
    for (int ahead = 0; ahead < 2; ahead++)
        generate(ids, ahead, tokens[ahead], logprobs[ahead]);
    assert_memory_equal(tokens[0], tokens[1], sizeof tokens[0]);
    assert_memory_equal(logprobs[0], logprobs[1], sizeof logprobs[0]);
    json_decref(root);
}

static void test_f32_cache_refused(void **state)
{
    char dir[512];
    const tr_fixture_options options = {.dir = tr_source_path(dir, sizeof dir, "models/tiny"),
                                        .device = "cuda",
                                        .kv_dtype = TR_F32};
    tr_fixture f;
    (void)state;
    assert_int_not_equal(tr_fixture_open(&f, &options), 0);
    assert_int_equal(f.err.status, TR_E_USAGE);
    assert_non_null(strstr(f.err.text, "f32"));
    tr_fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy_fp8),
        cmocka_unit_test(test_greedy_bf16),
        cmocka_unit_test(test_nll),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_recorded_ahead),
        cmocka_unit_test(test_f32_cache_refused),
    };
    const tr_device_options options = {.name = "cuda"};
    show_gpus();
    tr_device *device;
    const tr_ops *ops;
    tr_err err;
    if (tr_device_open(&device, &ops, &options, &err) != TR_OK) {
        printf("skipped: %s\n", err.text);
        return 77;
    }
    printf("%s\n", tr_device_describe(device));
    ops->close(device);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
