/* The trained checkpoint models/tiny against Hugging Face transformers in fp32 (tests/vectors/tiny): greedy answers exact,
 * log-probabilities to 1e-3, mean negative log-likelihood of unseen text to 1e-4; with fp8 caches recall and tool answers exact, also
 * behind so much text that they stand at 8K context. */
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

#include "tiny_cases.h"
#include "vectors.h"

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

static void test_greedy_f32(void **state)
{
    char path[512];
    int32_t prompt[TR_TINY_MAX], want[TR_TINY_MAX];
    tr_fixture f;
    (void)state;
    json_t *cases = tr_read_json(tr_vector_path(path, sizeof path, "tiny/generation.json"));
    assert_true(json_array_size(cases) > 0);
    tr_tiny_open(&f, NULL, TR_F32, TR_TINY_MAX);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i);
        const int n = tr_tiny_ids(json_object_get(c, "prompt_ids"), prompt, TR_TINY_MAX),
                  n_want = tr_tiny_ids(json_object_get(c, "greedy_ids"), want, TR_TINY_MAX);
        const int32_t token = tr_tiny_prompt(&f, prompt, 0, n, TR_TINY_CHUNK, TR_FORM_AUTO);
        check_top20(&f, json_object_get(c, "first_token_top20"), i);
        if (!tr_tiny_goes_on(&f, n, token, want, n_want))
            fail_msg("case %zu: another greedy answer", i);
    }
    tr_fixture_close(&f);
    json_decref(cases);
}

static void answers(tr_dtype cache)
{
    static const int far[] = {0, TR_TINY_FAR};
    for (int i = 0; i < 2; i++) {
        tr_fixture f;
        tr_tiny_open(&f, NULL, cache, far[i] ? TR_TINY_LONG : TR_TINY_MAX);
        tr_tiny_answers(&f, far[i]);
        tr_fixture_close(&f);
    }
}

static void test_answers_fp8(void **state)
{
    (void)state;
    answers(TR_E4M3);
}

static void test_answers_bf16(void **state)
{
    (void)state;
    answers(TR_BF16);
}

static void test_nll(void **state)
{
    char path[512];
    int32_t ids[TR_TINY_MAX];
    (void)state;
    json_t *root = tr_read_json(tr_vector_path(path, sizeof path, "tiny/nll.json"));
    const json_t *want = json_object_get(root, "nll");
    const int n = tr_tiny_ids(json_object_get(root, "ids"), ids, TR_TINY_MAX);
    assert_int_equal((int)json_array_size(want), n - 1);
    float *logprob = malloc((size_t)n * sizeof *logprob);
    double sum = 0, reference = 0, worst = 0;
    tr_tiny_score(NULL, TR_F32, ids, n, TR_TINY_CHUNK, TR_FORM_AUTO, logprob);
    for (int i = 0; i < n - 1; i++) {
        const double theirs = json_number_value(json_array_get(want, (size_t)i));
        sum += -(double)logprob[i];
        reference += theirs;
        if (fabs(theirs + (double)logprob[i]) > worst) worst = fabs(theirs + (double)logprob[i]);
    }
    if (!(fabs(sum - reference) / (n - 1) <= 1e-4))
        fail_msg("mean nll %.6f, reference %.6f (worst token %g off)", sum / (n - 1),
                 reference / (n - 1), worst);
    free(logprob);
    json_decref(root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy_f32),
        cmocka_unit_test(test_answers_fp8),
        cmocka_unit_test(test_answers_bf16),
        cmocka_unit_test(test_nll),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
