#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tiny_cases.h"

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

void tr_tiny_open(tr_fixture *f, const char *device, tr_dtype cache, int max_model_len)
{
    char dir[512];
    const tr_fixture_options options = {.dir = tr_source_path(dir, sizeof dir, "models/tiny"),
                                        .device = device,
                                        .kv_dtype = cache,
                                        .max_model_len = max_model_len,
                                        .n_slots = 2};
    assert_int_equal(tr_fixture_open(f, &options), 0);
}

int tr_tiny_ids(const json_t *array, int32_t *ids, int max)
{
    const int n = (int)json_array_size(array);
    assert_true(n > 0 && n <= max);
    for (int i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return n;
}

void tr_tiny_text(int32_t *ids, int n)
{
    char path[512];
    int32_t text[TR_TINY_MAX];
    json_t *root = tr_read_json(tr_vector_path(path, sizeof path, "tiny/nll.json"));
    const int n_text = tr_tiny_ids(json_object_get(root, "ids"), text, TR_TINY_MAX);
    for (int i = 0; i < n; i++)
        ids[i] = text[i % n_text];
    json_decref(root);
}

int32_t tr_tiny_prompt(tr_fixture *f, const int32_t *prompt, int begin, int n, int chunk, int form)
{
    int32_t token = -1;
    assert_int_equal(tr_fixture_slot(f, 0, TR_MAX_LOGPROBS), 0);
    for (int i = begin; i < n; i += chunk) {
        const int rows = n - i < chunk ? n - i : chunk;
        assert_int_equal(
            tr_fixture_run(f, 0, prompt + i, i, rows, i + rows == n, form, NULL, &token, NULL), 0);
    }
    return token;
}

bool tr_tiny_goes_on(tr_fixture *f, int n, int32_t token, const int32_t *want, int n_want)
{
    for (int i = 0; i < n_want; i++) {
        if (token != want[i]) return false;
        assert_int_equal(
            tr_fixture_run(f, 0, &token, n + i, 1, 1, TR_FORM_ABSORBED, NULL, &token, NULL), 0);
    }
    return true;
}

void tr_tiny_answers(tr_fixture *f, int far)
{
    char path[512];
    int32_t *prompt = malloc(TR_TINY_LONG * sizeof *prompt), want[TR_TINY_MAX];
    json_t *cases = tr_read_json(tr_vector_path(path, sizeof path, "tiny/generation.json"));
    int n_cases = 0;
    assert_non_null(prompt);
    tr_tiny_text(prompt, far);
    if (far > 0) tr_tiny_prompt(f, prompt, 0, far, TR_TINY_CHUNK, TR_FORM_AUTO);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i);
        const char *kind = json_string_value(json_object_get(c, "kind"));
        if (strcmp(kind, "text") == 0) continue;
        const int n = far + tr_tiny_ids(json_object_get(c, "prompt_ids"), prompt + far,
                                        TR_TINY_LONG - far),
                  n_want = tr_tiny_ids(json_object_get(c, "greedy_ids"), want, TR_TINY_LONG - n);
        const int32_t token = tr_tiny_prompt(f, prompt, far, n, TR_TINY_CHUNK, TR_FORM_AUTO);
        if (!tr_tiny_goes_on(f, n, token, want, n_want))
            fail_msg("case %zu (%s), %d tokens: another greedy answer", i, kind, n);
        n_cases++;
    }
    assert_true(n_cases > 0);
    json_decref(cases);
    free(prompt);
}

void tr_tiny_score(const char *device, tr_dtype cache, const int32_t *ids, int n, int chunk,
                   int form, float *logprob)
{
    tr_fixture f;
    tr_tiny_open(&f, device, cache, n > TR_TINY_MAX ? TR_TINY_LONG : TR_TINY_MAX);
    assert_int_equal(tr_fixture_slot(&f, 1, 0), 0);
    for (int i = 0; i < n - 1; i += chunk) {
        const int rows = n - 1 - i < chunk ? n - 1 - i : chunk;
        assert_int_equal(
            tr_fixture_run(&f, 1, ids + i, i, rows, rows, form, ids + i + 1, NULL, logprob + i), 0);
    }
    tr_fixture_close(&f);
}

double tr_tiny_nll(const float *logprob, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum -= (double)logprob[i];
    return sum / n;
}
