/* The whole network against tests/vectors/model (double-precision reference): layer by layer with the reference's input, end to end,
 * in every split of the prompt, with exact, bf16 and fp8 caches. */
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

#include "model_vectors.h"

static void open_fixture(tr_fixture *f, tr_vectors *v, tr_dtype dtype, const char *isa)
{
    tr_vectors_fixture(v, f, &(tr_fixture_options){.kv_dtype = dtype, .isa = isa});
}

/* ---- layer by layer ------------------------------------------------------------------------------------------------- */

/* Every layer from the reference's own input: no error adds up, so fp32 must agree closely, and every selection and every
 * routing whose margin is wider than the noise must be the same. */
static void layers_from_reference(const char *set)
{
    tr_vectors v;
    tr_fixture f;
    tr_vectors_open(&v, set);
    open_fixture(&f, &v, TR_F32, NULL);
    bool *clear = calloc((size_t)v.n_trace, sizeof *clear);
    tr_watch w = {.v = &v,
                  .f = &f,
                  .prefix = "",
                  .only = -1,
                  .exact = true,
                  .set_margin = 1e-4,
                  .route_margin = 1e-5,
                  .feed = true,
                  .clear = clear};
    tr_watch_run(&w);
    if (!(w.worst_hidden <= 1e-5 && w.worst_logit <= 1e-4 && w.worst_weight <= 1e-5))
        fail_msg("%s: worst hidden %g, index score %g std, router weight %g", set, w.worst_hidden,
                 w.worst_logit, w.worst_weight);
    assert_true(w.n_hidden > v.n_layers * v.n_trace * 9 / 10);
    assert_true(w.n_sets > v.n_layers * v.n_trace * 9 / 10);
    assert_true(w.n_routes > 0);
    free(clear);
    tr_fixture_close(&f);
    tr_vectors_close(&v);
}

static void test_layers(void **state)
{
    (void)state;
    layers_from_reference("tiny");
    layers_from_reference("realgeom");
}

/* ---- end to end ------------------------------------------------------------------------------------------------------ */

static void same_argmax(const tr_vectors *v, const int32_t *argmax, const char *key,
                        const char *rows_key)
{
    const json_t *want = json_object_get(v->expected, key),
                 *list = json_object_get(v->expected, rows_key);
    assert_true(json_array_size(list) > 0);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const size_t t = (size_t)json_integer_value(json_array_get(list, i));
        assert_int_equal(argmax[t], json_integer_value(json_array_get(want, t)));
    }
}

static void end_to_end_f32(const char *set, const char *isa)
{
    tr_vectors v;
    tr_fixture f;
    tr_vectors_open(&v, set);
    open_fixture(&f, &v, TR_F32, isa);
    const size_t n = (size_t)v.n_trace * (size_t)v.n_hidden;
    float *final = malloc(n * sizeof *final);
    int32_t *argmax = malloc((size_t)v.n_trace * sizeof *argmax);
    tr_vectors_split(&f, 0, v.trace, v.n_trace, v.n_trace, TR_FORM_AUTO, final, argmax);
    const tr_distance e = tr_vectors_distance(&v, "hidden.final", "robust_rows", final, NULL);
    if (!(e.worst <= 1e-4)) fail_msg("%s f32: worst robust row %g", set, e.worst);
    same_argmax(&v, argmax, "argmax", "robust_rows");
    /* The greedy continuation is what the trace ends with. */
    const json_t *greedy = json_object_get(v.expected, "greedy");
    const int n_greedy = (int)json_array_size(greedy);
    assert_true(n_greedy > 0);
    for (int i = 0; i < n_greedy; i++)
        assert_int_equal(argmax[v.n_trace - n_greedy + i],
                         json_integer_value(json_array_get(greedy, (size_t)i)));
    free(final);
    free(argmax);
    tr_fixture_close(&f);
    tr_vectors_close(&v);
}

/* A rounded cache against the emulation nearest to it. The engine's noise is not the emulation's (fp32 activations here, bf16
 * index keys before quantisation), so a selection may differ where the emulation's margin is narrow; where all layers
 * selected the same, final hidden states must agree. */
static void end_to_end_rounded(const char *set, tr_dtype dtype, const char *prefix,
                               double tolerance)
{
    tr_vectors v;
    tr_fixture f;
    char name[64];
    tr_vectors_open(&v, set);
    open_fixture(&f, &v, dtype, NULL);
    float *final = malloc((size_t)v.n_trace * (size_t)v.n_hidden * sizeof *final);
    bool *same = malloc((size_t)v.n_trace * sizeof *same);
    tr_watch w = {.v = &v,
                  .f = &f,
                  .prefix = prefix,
                  .only = -1,
                  .set_margin = 0.25,
                  .keep_final = final,
                  .clear = same};
    tr_watch_run(&w);
    snprintf(name, sizeof name, "%shidden.final", prefix);
    const tr_distance e = tr_vectors_distance(&v, name, "sim_robust_rows", final, same);
    if (!(e.worst <= tolerance))
        fail_msg("%s against %s: %g at worst of %d rows", set, name, e.worst, e.n);
    free(final);
    free(same);
    tr_fixture_close(&f);
    tr_vectors_close(&v);
}

static void test_end_to_end_f32(void **state)
{
    static const char *const isas[] = {"plain", "avx2", "avx512", "amx"};
    (void)state;
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        tr_device *device;
        const tr_ops *ops;
        const tr_device_options options = {.name = "cpu", .n_threads = 1, .isa = isas[i]};
        if (tr_device_open(&device, &ops, &options, NULL) != TR_OK)
            continue; /* this machine or build lacks it */
        ops->close(device);
        end_to_end_f32("tiny", isas[i]);
        end_to_end_f32("realgeom", isas[i]);
    }
}

static void test_end_to_end_bf16(void **state)
{
    (void)state;
    end_to_end_rounded("tiny", TR_BF16, "idxfp8.", 0.03);
    end_to_end_rounded("realgeom", TR_BF16, "idxfp8.", 0.03);
}

static void test_end_to_end_fp8(void **state)
{
    (void)state;
    end_to_end_rounded("tiny", TR_E4M3, "sim.", 0.08);
    end_to_end_rounded("realgeom", TR_E4M3, "sim.", 0.08);
}

/* Index scores of layer 0 with fp8 keys and queries: the layer's input is exact, so only the quantisation is compared. A value
 * near the edge between two codes falls on the other side after the bf16 roundings of model.md 4, which the emulation does not
 * make (without them the scores agree to 3e-6), hence hundredths of a standard deviation. */
static void test_fp8_index_scores(void **state)
{
    static const char *const sets[] = {"tiny", "realgeom"};
    (void)state;
    for (int s = 0; s < 2; s++) {
        tr_vectors v;
        tr_fixture f;
        tr_vectors_open(&v, sets[s]);
        open_fixture(&f, &v, TR_E4M3, NULL);
        bool *clear = calloc((size_t)v.n_trace, sizeof *clear);
        tr_watch w = {.v = &v,
                      .f = &f,
                      .prefix = "idxfp8.",
                      .only = 0,
                      .sets_only = true,
                      .set_margin = 0.1,
                      .clear = clear};
        tr_watch_run(&w);
        assert_true(w.n_sets > 0);
        const double rms = sqrt(w.sum_logit / w.n_logit);
        if (!(rms <= 0.03 && w.worst_logit <= 0.25))
            fail_msg("%s: index scores off by %g std rms, %g at worst", sets[s], rms,
                     w.worst_logit);
        free(clear);
        tr_fixture_close(&f);
        tr_vectors_close(&v);
    }
}

/* ---- long context, splits, forms --------------------------------------------------------------------------------------- */

static void test_long(void **state)
{
    static const char *const sets[] = {"tiny", "realgeom"};
    (void)state;
    for (int s = 0; s < 2; s++) {
        tr_vectors v;
        tr_fixture f;
        int rows, d;
        tr_vectors_open(&v, sets[s]);
        open_fixture(&f, &v, TR_F32, NULL);
        float *final = malloc((size_t)v.n_long * (size_t)v.n_hidden * sizeof *final);
        int32_t *argmax = malloc((size_t)v.n_long * sizeof *argmax);
        tr_vectors_split(&f, 2, v.longer, v.n_long, 64, TR_FORM_AUTO, final, argmax);
        float *theirs = tr_vectors_array(&v, "long.hidden.final", &rows, &d);
        for (int i = 0; i < rows; i++) {
            const double e = tr_relative_l2(final + (size_t)(v.n_long - rows + i) * (size_t)d,
                                            theirs + (size_t)i * (size_t)d, d);
            if (!(e <= 1e-4)) fail_msg("%s long row %d: %g", sets[s], i, e);
        }
        free(theirs);
        free(final);
        free(argmax);
        tr_fixture_close(&f);
        tr_vectors_close(&v);
    }
}

/* Whole, in chunks of 7, token by token; with 1, 2 and 3 threads: bit-identical hidden states. */
static void splits(const char *set, tr_dtype dtype)
{
    static const int chunks[] = {1, 7, 64, 200};
    tr_vectors v;
    tr_fixture f;
    tr_vectors_open(&v, set);
    const int n = v.n_long;
    float *first = NULL, *final = NULL;
    int32_t *argmax = malloc((size_t)n * sizeof *argmax);
    for (int threads = 1; threads <= 3; threads++) {
        const tr_fixture_options options = {.dir = v.dir, .kv_dtype = dtype, .n_threads = threads};
        assert_int_equal(tr_fixture_open(&f, &options), 0);
        const size_t bytes = (size_t)n * (size_t)f.config.hidden_size * sizeof(float);
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
            final = malloc(bytes);
            tr_vectors_split(&f, (int)i, v.longer, n, chunks[i], TR_FORM_AUTO, final, argmax);
            if (!first) {
                first = final;
                continue;
            }
            if (memcmp(first, final, bytes) != 0)
                fail_msg("%s: chunks of %d with %d threads differ", set, chunks[i], threads);
            free(final);
        }
        tr_fixture_close(&f);
    }
    free(first);
    free(argmax);
    tr_vectors_close(&v);
}

static void test_splits(void **state)
{
    (void)state;
    splits("tiny", TR_F32);
    splits("tiny", TR_E4M3);
    splits("realgeom", TR_BF16);
    splits("realgeom", TR_E4M3);
}

/* Both forms of MLA over contexts that fit the selection: the same up to rounding. */
static void test_forms(void **state)
{
    tr_vectors v;
    tr_fixture f;
    (void)state;
    tr_vectors_open(&v, "realgeom");
    open_fixture(&f, &v, TR_F32, NULL);
    const int n = v.topk;
    const size_t d = (size_t)v.n_hidden;
    float *dense = malloc((size_t)n * d * sizeof *dense),
          *absorbed = malloc((size_t)n * d * sizeof *absorbed);
    int32_t *argmax = malloc((size_t)n * sizeof *argmax);
    tr_vectors_split(&f, 0, v.trace, n, n, TR_FORM_AUTO, dense, argmax);
    tr_vectors_split(&f, 1, v.trace, n, n, TR_FORM_ABSORBED, absorbed, argmax);
    const double e = tr_relative_l2(dense, absorbed, n * v.n_hidden);
    if (!(e <= 1e-5)) fail_msg("forms differ by %g", e);
    free(dense);
    free(absorbed);
    free(argmax);
    tr_fixture_close(&f);
    tr_vectors_close(&v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers),           cmocka_unit_test(test_end_to_end_f32),
        cmocka_unit_test(test_end_to_end_bf16),  cmocka_unit_test(test_end_to_end_fp8),
        cmocka_unit_test(test_fp8_index_scores), cmocka_unit_test(test_long),
        cmocka_unit_test(test_splits),           cmocka_unit_test(test_forms),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
