/* What the CUDA backend does another way for many rows than for few: to the bit the same, and the same as on the CPU where that
 * rounds alike. And e4m3 forms that are written instead of numbers: what quantising the numbers gives. */
#include <config.h>

#include "tests/cuda_test.h"

/* ---- norm ---------------------------------------------------------------------------------------------------------- */

typedef struct normed {
    float *residual, *out, *scale;
    uint8_t *q;
    int n_max;
} normed;

/* RMSNorm of n of n_max rows that hold what x and add say. */
static normed run_norm(pair *p, int n, int n_max, int d, const float *x, const float *add,
                       const float *factors)
{
    const size_t room = (size_t)n_max * (size_t)d, live = (size_t)n * (size_t)d,
                 ld = (size_t)(n_max + 3) / 4 * 4;
    normed r = {floats(p, room, 1), acts(p, room, 1), floats(p, ld * (size_t)d / 128, 1),
                array(p, room), n_max};
    float *more = add ? acts(p, room, 1) : NULL;
    memcpy(r.residual, x, live * 4);
    if (add) memcpy(more, add, live * 4);
    const int32_t *count = word(p, n);
    push(p);
    pair_ok(p, "norm",
            p->g->norm(p->gpu, TR_LANE_MAIN,
                       &(struct tr_norm_args){.n = twin(p, count),
                                              .n_max = n_max,
                                              .d = d,
                                              .add = twin(p, more),
                                              .ld_add = (size_t)d,
                                              .residual = twin(p, r.residual),
                                              .ld_residual = (size_t)d,
                                              .weight = twin(p, factors),
                                              .eps = 1e-6f,
                                              .out = twin(p, r.out),
                                              .ld_out = (size_t)d,
                                              .q = twin(p, r.q),
                                              .q_scale = twin(p, r.scale),
                                              .scale_pow2 = 1}));
    return r;
}

static void check_norm(pair *p, int d, int with_add)
{
    enum { FEW = 9, MANY = 601, LD = (MANY + 3) / 4 * 4 };
    const size_t D = (size_t)d;
    const float *x = floats(p, MANY * D, 3), *add = with_add ? acts(p, MANY * D, 1) : NULL,
                *factors = floats(p, D, 1);
    const normed many = run_norm(p, MANY - 1, MANY, d, x, add, factors);
    float *residual = test_alloc(MANY * D, 4), *out = test_alloc(MANY * D, 4),
          *scale = test_alloc(LD * D / 128, 4);
    uint8_t *q = test_alloc(MANY * D, 1);
    memcpy(residual, pull(p, many.residual), MANY * D * 4);
    memcpy(out, pull(p, many.out), MANY * D * 4);
    memcpy(scale, pull(p, many.scale), LD * D / 128 * 4);
    memcpy(q, pull(p, many.q), MANY * D);
    /* The last row is not live. */
    assert_memory_equal(residual + (MANY - 1) * D, many.residual + (MANY - 1) * D, D * 4);
    assert_memory_equal(out + (MANY - 1) * D, many.out + (MANY - 1) * D, D * 4);
    assert_memory_equal(q + (MANY - 1) * D, many.q + (MANY - 1) * D, D);

    for (int r = 0; r + FEW < MANY; r += 97) { /* the same rows among few */
        const size_t at = (size_t)r * D;
        const normed few = run_norm(p, FEW, FEW, d, x + at, add ? add + at : NULL, factors);
        assert_memory_equal(pull(p, few.residual), residual + at, FEW * D * 4);
        assert_memory_equal(pull(p, few.out), out + at, FEW * D * 4);
        assert_memory_equal(pull(p, few.q), q + at, FEW * D);
        const float *few_scale = pull(p, few.scale);
        for (size_t b = 0; b < D / 128; b++)
            for (int i = 0; i < FEW; i++)
                assert_true(few_scale[b * 12 + (size_t)i] == scale[b * LD + (size_t)(r + i)]);
    }
    free(residual);
    free(out);
    free(scale);
    free(q);
    pair_clear(p);
}

static void test_norm(void **state)
{
    static const int widths[] = {128, 1536, 2048, 2176, 7168, 8192};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        for (int with_add = 0; with_add < 2; with_add++)
            check_norm(*state, widths[i], with_add);
}

/* ---- products of bf16 weights -------------------------------------------------------------------------------------- */

/* The first rows of x among n. */
static float *run_linear(pair *p, weight *w, const float *x, int n, int n_max)
{
    const size_t d = (size_t)w->c.n_in, d_out = (size_t)w->c.n_out;
    float *in = acts(p, (size_t)n_max * d, 1), *out = floats(p, (size_t)n_max * d_out, 1);
    const int32_t *live = word(p, n);
    memcpy(in, x, (size_t)n * d * 4);
    push(p);
    pair_ok(p, "linear",
            p->g->linear(p->gpu, TR_LANE_MAIN,
                         &(struct tr_linear_args){
                             .n = twin(p, live),
                             .n_max = n_max,
                             .w = &w->g,
                             .in = {.x = twin(p, in), .ld = d, .n_max = n_max, .d = w->c.n_in},
                             .out = twin(p, out),
                             .ld_out = d_out,
                             .out_f32 = 1}));
    return out;
}

/* Some of the first rows and all among `most`. */
static void check_alone(pair *p, int n_out, int n_in, int most)
{
    const int counts[][2] = {{1, 1},     {5, 8},     {16, 16},        {33, 64},
                             {250, 256}, {299, 300}, {most - 1, most}};
    const size_t d = (size_t)n_in, d_out = (size_t)n_out;
    weight w;
    weight_new(p, &w, TR_W_BF16, 1, n_out, n_in, 0, 0);
    const float *x = acts(p, (size_t)most * d, 2);
    float *want = test_alloc((size_t)most * d_out, 4);
    memcpy(want, pull(p, run_linear(p, &w, x, most, most)), (size_t)most * d_out * 4);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        const size_t n = (size_t)counts[i][0], n_max = (size_t)counts[i][1];
        const float *out = run_linear(p, &w, x, counts[i][0], counts[i][1]), *got = pull(p, out);
        assert_memory_equal(got, want, n * d_out * 4);
        assert_memory_equal(got + n * d_out, out + n * d_out, (n_max - n) * d_out * 4);
    }
    free(want);
    weight_free(p, &w);
    pair_clear(p);
}

static void test_alone(void **state)
{
    check_alone(*state, 64, 7168, 300);
    check_alone(*state, 250, 7168, 300);
    check_alone(*state, 5000, 512, 300);
    check_alone(*state, 96, 544, 300);
    check_alone(*state, 250, 1024, 4301); /* prompts: large tiles */
    check_alone(*state, 64, 1024, 6211);
    check_alone(*state, 5, 512, 80000);
}

/* ---- codes instead of numbers -------------------------------------------------------------------------------------- */

static void check_swiglu(pair *p, int n, int n_max, int d, int pow2)
{
    const size_t D = (size_t)d, room = (size_t)n_max * D, ld = (size_t)(n_max + 3) / 4 * 4,
                 blocks = (D + 127) / 128;
    float *gate_up = acts(p, 2 * room, 30), *out = acts(p, room, 1),
          *scale = floats(p, ld * blocks, 1);
    uint8_t *q = array(p, room);
    const int32_t *live = word(p, n);
    gate_up[0] = -200;
    memset(gate_up + (n > 2 ? 2 * D : 0), 0, D * 4); /* a row of zeros */
    struct tr_swiglu_args a = {.n = twin(p, live),
                               .n_max = n_max,
                               .d = d,
                               .gate_up = twin(p, gate_up),
                               .out = twin(p, out)};
    push(p);
    pair_ok(p, "swiglu", p->g->swiglu(p->gpu, TR_LANE_MAIN, &a));
    const float *numbers = pull(p, out);
    a.q = twin(p, q);
    a.q_scale = twin(p, scale);
    a.scale_pow2 = pow2;
    pair_ok(p, "swiglu to codes", p->g->swiglu(p->gpu, TR_LANE_MAIN, &a));
    same_codes(p, "swiglu", numbers, q, scale, n, n_max, d, pow2);
    pair_clear(p);
}

static void test_swiglu(void **state)
{
    for (int pow2 = 0; pow2 < 2; pow2++) {
        check_swiglu(*state, 3, 5, 2048, pow2);
        check_swiglu(*state, 1, 1, 384, pow2);
        check_swiglu(*state, 290, 301, 640, pow2);
        check_swiglu(*state, 257, 260, 136, pow2);
        check_swiglu(*state, 0, 300, 128, pow2);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_norm, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_alone, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_swiglu, pair_open, pair_close),
    };
    return run_on_gpu(argc, argv, tests, sizeof tests / sizeof *tests);
}
