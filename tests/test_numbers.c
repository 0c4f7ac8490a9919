#include <config.h>

#include <string.h>

#include <jansson.h>

#include "cpu_test.h"
#include "kernels/cpu/cpu_priv.h"
#include "kernels/number.h"
#include "vectors.h"

static float number(const json_t *array, size_t i)
{
    const json_t *v = json_array_get(array, i);
    assert_true(json_is_number(v));
    return (float)json_number_value(v);
}

static void e4m3_vectors(void **state)
{
    const json_t *c = json_object_get(*state, "e4m3");
    const json_t *x = json_object_get(c, "x"), *code = json_object_get(c, "code");
    size_t n = json_array_size(x);
    assert_true(n > 0 && json_array_size(code) == n);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(tr_f32_to_e4m3(number(x, i)), json_integer_value(json_array_get(code, i)));
}

static void quant_vectors(void **state)
{
    const json_t *rows = json_object_get(*state, "quant_row"), *c;
    size_t i_row;
    assert_true(json_array_size(rows) > 0);
    json_array_foreach(rows, i_row, c)
    {
        const json_t *x = json_object_get(c, "x"), *code = json_object_get(c, "ue8m0_codes");
        const json_t *plain = json_object_get(c, "fp32_codes");
        size_t n = json_array_size(x);
        float amax = 0;
        for (size_t i = 0; i < n; i++)
            amax = fmaxf(amax, fabsf(number(x, i)));
        float scale = tr_ue8m0_scale(amax);
        assert_true(scale == (float)json_number_value(json_object_get(c, "ue8m0_scale")));
        float fp32 = (float)json_number_value(json_object_get(c, "fp32_scale"));
        assert_true(json_array_size(code) == n && json_array_size(plain) == n && n > 0);
        for (size_t i = 0; i < n; i++) {
            assert_int_equal(tr_f32_to_e4m3(number(x, i) / scale),
                             json_integer_value(json_array_get(code, i)));
            assert_int_equal(tr_f32_to_e4m3(number(x, i) / fp32),
                             json_integer_value(json_array_get(plain, i)));
        }
    }
}

/* Every code there and back, and the value from its definition. */
static void e4m3_codes(void **state)
{
    (void)state;
    for (int b = 0; b < 256; b++) {
        int e = b >> 3 & 15, m = b & 7;
        float x = tr_e4m3_to_f32((uint8_t)b);
        if (e == 15 && m == 7) {
            assert_true(isnan(x));
            assert_int_equal(tr_f32_to_e4m3(x) & 0x7f, 0x7f);
            continue;
        }
        double want = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
        assert_true((double)x == (b & 0x80 ? -want : want));
        assert_int_equal(signbit(x) != 0, b >> 7);
        assert_int_equal(tr_f32_to_e4m3(x), b);
    }
    assert_int_equal(tr_f32_to_e4m3(INFINITY), 0x7e);
    assert_int_equal(tr_f32_to_e4m3(-1e30f), 0xfe);
}

/* Rounding to nearest even between all neighbours. */
static void e4m3_rounding(void **state)
{
    (void)state;
    for (int b = 0; b < 0x7e; b++) {
        float low = tr_e4m3_to_f32((uint8_t)b), high = tr_e4m3_to_f32((uint8_t)(b + 1));
        float middle = (low + high) / 2;
        assert_int_equal(tr_f32_to_e4m3(middle), b + (b & 1));
        assert_int_equal(tr_f32_to_e4m3(nextafterf(middle, 0)), b);
        assert_int_equal(tr_f32_to_e4m3(nextafterf(middle, 1e9f)), b + 1);
    }
}

static void bf16(void **state)
{
    (void)state;
    for (uint32_t b = 0; b < 0x10000; b++) {
        float x = tr_bf16_to_f32((uint16_t)b);
        if (isnan(x))
            assert_true(isnan(tr_bf16_to_f32(tr_f32_to_bf16(x))));
        else
            assert_int_equal(tr_f32_to_bf16(x), b);
    }
    assert_int_equal(tr_f32_to_bf16(tr_bits_f32(0x3f808000)), 0x3f80); /* ties to even */
    assert_int_equal(tr_f32_to_bf16(tr_bits_f32(0x3f818000)), 0x3f82);
    assert_int_equal(tr_f32_to_bf16(tr_bits_f32(0x3f808001)), 0x3f81);
    assert_int_equal(tr_f32_to_bf16(tr_bits_f32(0x7f7fffff)), 0x7f80); /* overflow is inf */
    assert_true(isnan(tr_bf16_to_f32(tr_f32_to_bf16(tr_bits_f32(0x7f800001)))));
}

static void scales(void **state)
{
    (void)state;
    assert_true(tr_ue8m0_scale(448) == 1 && tr_ue8m0_scale(449) == 2);
    assert_true(tr_ue8m0_scale(224) == 0.5f && tr_ue8m0_scale(0) == tr_ue8m0_scale(1e-4f));
    for (float a = 1e-4f; a < 1e6f; a *= 1.37f) {
        float s = tr_ue8m0_scale(a);
        assert_true((tr_f32_bits(s) & 0x7fffffu) == 0);
        assert_true(a / s <= 448 && a / s > 223.9f);
    }
}

/* The expansions of every instruction set against the scalar ones: all codes, all lengths, bits. */
static void expansions(void **state)
{
    uint8_t code[300];
    uint16_t *half = test_alloc(0x10000, sizeof *half);
    float *out = test_alloc(0x10001, sizeof *out);
    static const float scale[] = {1, 0.3f, 0x1p-20f, 3e8f};
    (void)state;
    for (int i = 0; i < 300; i++)
        code[i] = (uint8_t)(i * 7);
    for (uint32_t i = 0; i < 0x10000; i++)
        half[i] = (uint16_t)i;
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 1)) continue;
        for (int n = 0; n <= 300; n++) {
            out[n] = 55;
            float s = scale[n % 4];
            cpu.d->k.expand_e4m3(out, code, s, n);
            for (int j = 0; j < n; j++) {
                float want = tr_e4m3_to_f32(code[j]) * s;
                assert_true(isnan(want) ? isnan(out[j]) : tr_f32_bits(want) == tr_f32_bits(out[j]));
            }
            assert_true(out[n] == 55);
        }
        for (int n = 0x10000; n > 0; n = n > 40 ? n - 32768 + 8 : n - 1) {
            out[n] = 55;
            cpu.d->k.expand_bf16(out, half, n);
            for (int j = 0; j < n; j++)
                assert_int_equal(tr_f32_bits(out[j]), (uint32_t)half[j] << 16);
            assert_true(out[n] == 55);
        }
        cpu.ops->close(cpu.d);
    }
    free(half);
    free(out);
}

int main(void)
{
    char path[4096];
    json_t *all = json_load_file(tr_vector_path(path, sizeof path, "model/unit.json"), 0, NULL);
    if (!all) {
        fprintf(stderr, "test_numbers: no %s\n", path);
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(e4m3_vectors, all),
        cmocka_unit_test_prestate(quant_vectors, all),
        cmocka_unit_test(e4m3_codes),
        cmocka_unit_test(e4m3_rounding),
        cmocka_unit_test(bf16),
        cmocka_unit_test(scales),
        cmocka_unit_test(expansions),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    json_decref(all);
    return failed;
}
