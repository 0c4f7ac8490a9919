#include <config.h>

#include <string.h>

#include "cpu_test.h"
#include "kernels/cpu/cpu_priv.h"
#include "kernels/number.h"

/* residual += add; out = RMSNorm(residual) weight. */
static void norm_reference(const float *x, const float *add, const float *weight, int d, double eps,
                           double *residual, double *out)
{
    double sum = 0;
    for (int i = 0; i < d; i++) {
        residual[i] = (double)x[i] + (add ? (double)add[i] : 0);
        sum += residual[i] * residual[i];
    }
    for (int i = 0; i < d; i++)
        out[i] = residual[i] / sqrt(sum / d + eps) * (double)weight[i];
}

static void check_norm(const test_cpu *cpu, uint64_t *seed, int n, int d, int with_add,
                       const char *isa)
{
    const size_t pad = 5, ld = (size_t)d + pad, all = (size_t)n * ld;
    float *x = test_floats(seed, all), *add = test_floats(seed, all);
    float *weight = test_floats(seed, (size_t)d), *out = test_alloc(all, sizeof *out);
    float *residual = test_alloc(all, sizeof *out), *alone = test_alloc(ld, sizeof *out);
    double *want = test_alloc((size_t)d, 8), *sum = test_alloc((size_t)d, 8);
    int32_t live = n;

    for (size_t i = 0; i < all; i += 7) /* one large value now and then */
        x[i] *= 300.0f;
    memcpy(residual, x, all * sizeof *x);
    struct tr_norm_args a = {.n = &live, .n_max = n, .d = d, .eps = 1e-6f, .weight = weight};
    a.add = with_add ? add : NULL, a.ld_add = ld;
    a.residual = residual, a.ld_residual = ld, a.out = out, a.ld_out = ld;
    assert_int_equal(cpu->ops->norm(cpu->d, TR_LANE_MAIN, &a), TR_OK);
    for (int r = 0; r < n; r++) {
        const size_t at = (size_t)r * ld;
        norm_reference(x + at, with_add ? add + at : NULL, weight, d, 1e-6, sum, want);
        test_close(isa, residual + at, sum, NULL, 0x1p-23, (size_t)d);
        test_close(isa, out + at, want, NULL, 0x1p-20, (size_t)d);
        for (size_t i = 0; i < pad; i++) {
            assert_true(out[at + (size_t)d + i] == 0);
            assert_true(residual[at + (size_t)d + i] == x[at + (size_t)d + i]);
        }
        /* the row alone, in place where that is allowed: the same bits */
        memcpy(alone, x + at, ld * sizeof *x);
        float *second = test_alloc(ld, sizeof *second);
        live = 1;
        a.residual = alone, a.add = with_add ? add + at : NULL, a.out = with_add ? second : alone;
        assert_int_equal(cpu->ops->norm(cpu->d, TR_LANE_MAIN, &a), TR_OK);
        assert_memory_equal(a.out, out + at, (size_t)d * sizeof *out);
        free(second);
    }
    void *mine[] = {x, add, weight, out, residual, alone, want, sum};
    for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
        free(mine[i]);
}

static void norms(void **state)
{
    static const int dims[] = {1, 3, 16, 63, 64, 65, 256, 1000, 7168};
    uint64_t seed = 21;
    (void)state;
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 2)) continue;
        for (size_t s = 0; s < sizeof dims / sizeof *dims; s++) {
            check_norm(&cpu, &seed, 1, dims[s], 0, test_isas[i]);
            check_norm(&cpu, &seed, 5, dims[s], 1, test_isas[i]);
        }
        cpu.ops->close(cpu.d);
    }
}

/* An all-zero row is zero, not NaN. */
static void zero_row(void **state)
{
    float residual[40] = {0}, out[40], weight[40];
    int32_t n = 1;
    (void)state;
    for (int i = 0; i < 40; i++)
        weight[i] = 2;
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 1)) continue;
        struct tr_norm_args a = {.n = &n, .n_max = 1, .d = 40, .eps = 1e-6f, .weight = weight};
        a.residual = residual, a.ld_residual = 40, a.out = out, a.ld_out = 40;
        assert_int_equal(cpu.ops->norm(cpu.d, TR_LANE_MAIN, &a), TR_OK);
        for (int j = 0; j < 40; j++)
            assert_true(out[j] == 0);
        cpu.ops->close(cpu.d);
    }
}

static void swiglu(void **state)
{
    enum { D = 301, N = 9 };
    uint64_t seed = 22;
    float *x = test_floats(&seed, N * 2 * D), out[N * D], alone[D];
    double want[N * D], bound[N * D];
    (void)state;
    for (int i = 0; i < N * 2 * D; i++)
        x[i] *= i % 3 ? 4.0f : 60.0f;
    x[0] = 200, x[1] = -200, x[2] = 0, x[3] = -88.9f, x[4] = -1e30f; /* exp overflows */
    for (int r = 0; r < N; r++)
        for (int i = 0; i < D; i++) {
            double g = (double)x[r * 2 * D + i];
            want[r * D + i] = g / (1 + exp(-g)) * (double)x[r * 2 * D + D + i];
            bound[r * D + i] = 1e-30;
        }
    for (int i = 0; i < TEST_N_ISAS; i++)
        for (int threads = 1; threads <= 2; threads++) {
            test_cpu cpu;
            int32_t n = N;
            if (!test_cpu_open(&cpu, i, threads)) continue;
            struct tr_swiglu_args a = {.n = &n, .n_max = N, .d = D, .gate_up = x, .out = out};
            assert_int_equal(cpu.ops->swiglu(cpu.d, TR_LANE_MAIN, &a), TR_OK);
            test_close(test_isas[i], out, want, bound, 0x1p-20, N * D);
            n = 1, a.gate_up = x + 4 * 2 * D, a.out = alone;
            assert_int_equal(cpu.ops->swiglu(cpu.d, TR_LANE_MAIN, &a), TR_OK);
            assert_memory_equal(alone, out + 4 * D, sizeof alone);
            cpu.ops->close(cpu.d);
        }
    free(x);
}

static void embed(void **state)
{
    enum { D = 21, TABLE = 5, FIRST = 10, N = 6 };
    const int32_t token[N] = {10, 14, 9, 15, -1, 12};
    uint64_t seed = 23;
    float *table = test_floats(&seed, TABLE * D), out[N * D];
    uint16_t half[TABLE * D];
    (void)state;
    for (int i = 0; i < TABLE * D; i++) {
        half[i] = tr_f32_to_bf16(table[i]);
        table[i] = tr_bf16_to_f32(half[i]);
    }
    for (int i = 0; i < TEST_N_ISAS; i++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            test_cpu cpu;
            int32_t n = N;
            if (!test_cpu_open(&cpu, i, 1)) continue;
            tr_rows rows = {.n_max = N, .n = &n, .token = (int32_t *)(uintptr_t)token};
            struct tr_embed_args a = {.rows = &rows, .table = bf16 ? (void *)half : table};
            a.dtype = bf16 ? TR_BF16 : TR_F32, a.first = FIRST, a.n_table = TABLE, a.d = D;
            a.out = out;
            memset(out, 0xff, sizeof out);
            assert_int_equal(cpu.ops->embed(cpu.d, TR_LANE_MAIN, &a), TR_OK);
            for (int r = 0; r < N; r++)
                for (int j = 0; j < D; j++) {
                    int t = token[r] - FIRST;
                    assert_true(out[r * D + j] == (t < 0 || t >= TABLE ? 0 : table[t * D + j]));
                }
            a.dtype = TR_E4M3;
            assert_int_equal(cpu.ops->embed(cpu.d, TR_LANE_MAIN, &a), TR_E_USAGE);
            cpu.ops->close(cpu.d);
        }
    free(table);
}

static void rows_gather(void **state)
{
    enum { D = 3 };
    const int32_t index[4] = {7, 0, 5, 7};
    int32_t n_index = 4, n_out;
    float in[8 * D], out[3 * D];
    test_cpu cpu;
    (void)state;
    assert_int_equal(test_cpu_open(&cpu, 0, 1), 1);
    for (int i = 0; i < 8 * D; i++)
        in[i] = (float)i;
    struct tr_rows_gather_args a = {.index = index, .n_index = &n_index, .n_rows = 3, .d = D};
    a.in = in, a.out = out, a.n_out = &n_out;
    for (a.i0 = 0; a.i0 <= 5; a.i0++) {
        memset(out, 0, sizeof out);
        assert_int_equal(cpu.ops->rows_gather(cpu.d, TR_LANE_MAIN, &a), TR_OK);
        assert_int_equal(n_out, a.i0 > 4 ? 0 : a.i0 > 1 ? 4 - a.i0 : 3);
        for (int r = 0; r < 3; r++)
            for (int j = 0; j < D; j++)
                assert_true(out[r * D + j] ==
                            (a.i0 + r < 4 ? (float)(index[a.i0 + r] * D + j) : 0));
    }
    cpu.ops->close(cpu.d);
}

/* The vector functions that norms and attention share: every length up to some vectors, and bits
 * that do not depend on an element's place. */
static void vectors(void **state)
{
    enum { N = 150 };
    uint64_t seed = 24;
    float *a = test_floats(&seed, N), *b = test_floats(&seed, N), y[N + 1];
    (void)state;
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 1)) continue;
        for (int n = 0; n <= N; n++) {
            double dot = 0, bound = 0, want[N], bounds[N];
            for (int j = 0; j < n; j++) {
                dot += (double)a[j] * (double)b[j];
                bound += 0x1p-22 * fabs((double)a[j] * (double)b[j]);
                want[j] = (double)a[j] + 0.3 * (double)b[j];
                bounds[j] = 0x1p-22;
            }
            float got = cpu.d->k.dot(a, b, n);
            test_close("dot", &got, &dot, &bound, 0, 1);
            memcpy(y, a, sizeof *y * N);
            y[n] = 99;
            cpu.d->k.axpy(y, 0.3f, b, n);
            test_close("axpy", y, want, bounds, 0, (size_t)n);
            assert_true(y[n] == 99);
        }
        cpu.ops->close(cpu.d);
    }
    free(a);
    free(b);
}

static void exponentials(void **state)
{
    enum { N = 40000 };
    float *x = test_alloc(N, sizeof *x), *y = test_alloc(N, sizeof *y);
    double *want = test_alloc(N, sizeof *want), *bound = test_alloc(N, sizeof *bound);
    (void)state;
    for (int i = 0; i < N; i++) { /* -110 to 90, and densely about 0 */
        x[i] = i % 2 ? -110.0f + 0.005f * (float)i : ldexpf((float)(i - N / 2), -15);
        want[i] = exp((double)x[i]);
        bound[i] = 0x1p-149;
        if (want[i] > 0x1.fffffep127) want[i] = 0x1.fffffep127; /* got: inf, looked at below */
    }
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 1)) continue;
        memcpy(y, x, N * sizeof *x);
        cpu.d->k.exp_sub(y, 0, N);
        for (int j = 0; j < N; j++)
            if (want[j] == 0x1.fffffep127 && isinf(y[j])) y[j] = 0x1.fffffep127f;
        test_close(test_isas[i], y, want, bound, 0x1p-22, N);
        for (int n = 1; n < 40; n++) { /* elementwise, whatever the place and the length */
            float z[41];
            memcpy(z, x + 20000 - n, (size_t)n * sizeof *z);
            z[n] = 77;
            cpu.d->k.exp_sub(z, 0, n);
            assert_memory_equal(z, y + 20000 - n, (size_t)n * sizeof *z);
            assert_true(z[n] == 77);
        }
        float special[6] = {NAN, -INFINITY, INFINITY, 1000, -1000, 3.5f};
        cpu.d->k.exp_sub(special, 3.5f, 6);
        assert_true(isnan(special[0]) && special[1] == 0 && isinf(special[2]));
        assert_true(isinf(special[3]) && special[4] == 0 && special[5] == 1);
        cpu.ops->close(cpu.d);
    }
    free(x);
    free(y);
    free(want);
    free(bound);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norms),        cmocka_unit_test(zero_row),    cmocka_unit_test(swiglu),
        cmocka_unit_test(embed),        cmocka_unit_test(rows_gather), cmocka_unit_test(vectors),
        cmocka_unit_test(exponentials),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
