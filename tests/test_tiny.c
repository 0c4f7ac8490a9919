/* The trained checkpoint models/tiny against Hugging Face transformers in fp32 (tests/vectors/tiny): greedy answers exact,
 * log-probabilities to 1e-3, mean negative log-likelihood of unseen text to 1e-4; with fp8 caches recall and tool answers exact. */
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

static void open_tiny(tr_fixture *f, tr_dtype dtype)
{
    char dir[512];
    const tr_fixture_options options = {.dir = tr_source_path(dir, sizeof dir, "models/tiny"),
                                        .kv_dtype = dtype,
                                        .max_model_len = MAX_TOKENS,
                                        .n_slots = 2};
    assert_int_equal(tr_fixture_open(f, &options), 0);
}

/* Log-probability of `token` among the first generated position's alternatives; NAN when it is not one of them. */
static double listed(const tr_fixture *f, int32_t token)
{
    for (int i = 0; i < TR_MAX_LOGPROBS; i++)
        if (f->step.out.top_token[i] == token) return f->step.out.top_logprob[i];
    return NAN;
}

static void check_top20(const tr_fixture *f, const json_t *top, size_t i_case)
{
    const json_t *ids = json_object_get(top, "ids"), *values = json_object_get(top, "logprobs");
    size_t n = json_array_size(ids);
    assert_true(n >= 20 && json_array_size(values) == n);
    /* The last listed ones may change places with the 21st. */
    for (size_t j = 0; j < n; j++) {
        const double ours = listed(f, (int32_t)json_integer_value(json_array_get(ids, j)));
        const double theirs = json_number_value(json_array_get(values, j));
        const double last = json_number_value(json_array_get(values, n - 1));
        if (isnan(ours) && theirs - last < 2e-3) continue;
        if (isnan(ours) || fabs(ours - theirs) > 1e-3)
            fail_msg("case %zu, alternative %zu: log-probability %g, reference %g", i_case, j, ours,
                     theirs);
    }
}

/* Greedy continuation of one case; 1 when it is the reference's. */
static int continues_alike(tr_fixture *f, const json_t *c, size_t i_case, int check_logprobs)
{
    int32_t prompt[MAX_TOKENS], want[MAX_TOKENS], token = -1;
    const int n = ids_of(json_object_get(c, "prompt_ids"), prompt),
              n_want = ids_of(json_object_get(c, "greedy_ids"), want);
    assert_int_equal(tr_fixture_slot(f, 0, TR_MAX_LOGPROBS), 0);
    for (int i = 0; i < n; i += CHUNK) {
        const int rows = n - i < CHUNK ? n - i : CHUNK;
        assert_int_equal(tr_fixture_run(f, 0, prompt + i, i, rows, i + rows == n, TR_FORM_AUTO,
                                        NULL, &token, NULL),
                         0);
    }
    if (check_logprobs) check_top20(f, json_object_get(c, "first_token_top20"), i_case);
    for (int i = 0; i < n_want; i++) {
        if (token != want[i]) return 0;
        assert_int_equal(
            tr_fixture_run(f, 0, &token, n + i, 1, 1, TR_FORM_ABSORBED, NULL, &token, NULL), 0);
    }
    return 1;
}

static void greedy(tr_dtype dtype, int text_too)
{
    char path[512];
    json_t *cases = tr_read_json(tr_vector_path(path, sizeof path, "tiny/generation.json"));
    tr_fixture f;
    assert_true(json_array_size(cases) > 0);
    open_tiny(&f, dtype);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i);
        const char *kind = json_string_value(json_object_get(c, "kind"));
        if (strcmp(kind, "text") == 0 && !text_too) continue;
        if (!continues_alike(&f, c, i, dtype == TR_F32))
            fail_msg("case %zu (%s): another greedy answer", i, kind);
    }
    tr_fixture_close(&f);
    json_decref(cases);
}

static void test_greedy_f32(void **state)
{
    (void)state;
    greedy(TR_F32, 1);
}

static void test_greedy_fp8(void **state)
{
    (void)state;
    greedy(TR_E4M3, 0);
}

static void test_nll(void **state)
{
    char path[512];
    int32_t ids[MAX_TOKENS];
    tr_fixture f;
    (void)state;
    json_t *root = tr_read_json(tr_vector_path(path, sizeof path, "tiny/nll.json"));
    const json_t *want = json_object_get(root, "nll");
    const int n = ids_of(json_object_get(root, "ids"), ids);
    assert_int_equal((int)json_array_size(want), n - 1);
    float *logprob = malloc((size_t)n * sizeof *logprob);
    double sum = 0, reference = 0, worst = 0;
    open_tiny(&f, TR_F32);
    assert_int_equal(tr_fixture_slot(&f, 1, 0), 0);
    for (int i = 0; i < n - 1; i += CHUNK) {
        const int rows = n - 1 - i < CHUNK ? n - 1 - i : CHUNK;
        assert_int_equal(tr_fixture_run(&f, 1, ids + i, i, rows, rows, TR_FORM_AUTO, ids + i + 1,
                                        NULL, logprob + i),
                         0);
    }
    for (int i = 0; i < n - 1; i++) {
        const double theirs = json_number_value(json_array_get(want, (size_t)i));
        sum += -(double)logprob[i];
        reference += theirs;
        if (fabs(theirs + (double)logprob[i]) > worst) worst = fabs(theirs + (double)logprob[i]);
    }
    if (fabs(sum - reference) / (n - 1) > 1e-4)
        fail_msg("mean nll %.6f, reference %.6f (worst token %g off)", sum / (n - 1),
                 reference / (n - 1), worst);
    free(logprob);
    tr_fixture_close(&f);
    json_decref(root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy_f32),
        cmocka_unit_test(test_greedy_fp8),
        cmocka_unit_test(test_nll),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
