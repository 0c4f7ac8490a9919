/* Every operation of the CUDA backend against the CPU's plain form, on random and hostile shapes.
 * What the GPU rounds (inputs of products to e4m3 or bf16) is rounded before it goes to the CPU, or
 * the expected value is computed in fp64. */
#include <config.h>

#include "tests/cuda_test.h"

/* Runs an operation on both; `fix` replaces the pointers of the GPU's arguments g. */
#define BOTH(p, op, args, fix)                                                                     \
    do {                                                                                           \
        struct tr_##op##_args both_c = args, g = both_c;                                           \
        push(p);                                                                                   \
        fix;                                                                                       \
        assert_int_equal((p)->c->op((p)->cpu, TR_LANE_MAIN, &both_c), TR_OK);                      \
        pair_ok(p, #op, (p)->g->op((p)->gpu, TR_LANE_MAIN, &g));                                   \
    } while (0)

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

static void test_rows(void **state)
{
    enum { N = 9, D = 300, TABLE = 11 };
    pair *p = *state;
    tr_rows rows = {.n_max = N, .n = word(p, 7), .token = array(p, N * 4)};
    uint16_t *table = array(p, TABLE * D * 2);
    float *out = floats(p, N * D, 1), *add = acts(p, N * D, 1), *residual = floats(p, N * D, 3),
          *norm = floats(p, D, 1), *normed = acts(p, N * D, 1), *gathered = acts(p, N * D, 1),
          *gate_up = acts(p, N * 2 * D, 30), *inner = acts(p, N * D, 1);
    int32_t *index = array(p, N * 4), *n_out = word(p, -5);
    for (int i = 0; i < N; i++)
        rows.token[i] = i * 3;
    for (int i = 0; i < TABLE * D; i++)
        table[i] = tr_f32_to_bf16(test_float(&p->random));
    tr_rows dev = twin_rows(p, &rows);
    BOTH(p, embed,
         ((struct tr_embed_args){.rows = &rows,
                                 .table = table,
                                 .dtype = TR_BF16,
                                 .first = 2,
                                 .n_table = TABLE,
                                 .d = D,
                                 .out = out}),
         (g.rows = &dev, TWIN(p, g.table), TWIN(p, g.out)));
    same_bytes(p, "embed", out, N * D * 4);

    BOTH(p, norm,
         ((struct tr_norm_args){.n = rows.n,
                                .n_max = N,
                                .d = D,
                                .add = add,
                                .ld_add = D,
                                .residual = residual,
                                .ld_residual = D,
                                .weight = norm,
                                .eps = 1e-6f,
                                .out = normed,
                                .ld_out = D}),
         (TWIN(p, g.n), TWIN(p, g.add), TWIN(p, g.residual), TWIN(p, g.weight), TWIN(p, g.out)));
    same_bytes(p, "residual", residual, N * D * 4);
    near(p, "norm", normed, N * D, 0, act_error);

    for (int i = 0; i < N; i++)
        index[i] = (i * 5 + 1) % N;
    for (int i0 = 0; i0 < 9; i0 += 4) {
        BOTH(p, rows_gather,
             ((struct tr_rows_gather_args){.index = index,
                                           .n_index = rows.n,
                                           .i0 = i0,
                                           .n_rows = 5,
                                           .d = D,
                                           .in = normed,
                                           .out = gathered,
                                           .n_out = n_out}),
             (TWIN(p, g.index), TWIN(p, g.n_index), TWIN(p, g.in), TWIN(p, g.out),
              TWIN(p, g.n_out)));
        near(p, "rows_gather", gathered, N * D, 0, act_error);
        same_bytes(p, "n_out", n_out, 4);
    }
    for (int i = 0; i < N * D; i++)
        normed[i] = tr_round_bf16(normed[i]);
    gate_up[3] = -200;
    BOTH(p, swiglu,
         ((struct tr_swiglu_args){
             .n = rows.n, .n_max = N, .d = D, .gate_up = gate_up, .out = inner}),
         (TWIN(p, g.n), TWIN(p, g.gate_up), TWIN(p, g.out)));
    near(p, "swiglu", inner, N * D, 1e-30, act_error);
    BOTH(p, rows_zero, ((struct tr_rows_zero_args){.n = rows.n, .n_max = N, .d = D, .out = inner}),
         (TWIN(p, g.n), TWIN(p, g.out)));
    near(p, "rows_zero", inner, N * D, 1e-30, act_error);
    pair_clear(p);
}

/* ---- products ------------------------------------------------------------------------------------------------------ */

/* What W8A8 makes of a row: blocks of 128 of the stored tensor's columns. */
static void quantised(double *out, const float *x, int n, int col0, int pow2)
{
    for (int k = 0, end; k < n; k = end) {
        end = k + 128 - (col0 + k) % 128;
        if (end > n) end = n;
        float amax = 0;
        for (int i = k; i < end; i++)
            amax = fmaxf(amax, fabsf(x[i]));
        const float scale = pow2 ? tr_ue8m0_scale(amax) : fmaxf(amax, 1e-4f) / 448.0f;
        for (int i = k; i < end; i++)
            out[i] = (double)tr_e4m3_to_f32(tr_f32_to_e4m3(x[i] / scale)) * (double)scale;
    }
}

/* The input of a product as the GPU takes it. */
static void input_of(double *out, const float *x, const weight *w, int pow2)
{
    if (w->c.format == TR_W_E4M3_B128) {
        quantised(out, x, w->c.n_in, w->col0, pow2);
        return;
    }
    for (int i = 0; i < w->c.n_in; i++)
        out[i] = (double)(w->c.format == TR_W_BF16 ? tr_round_bf16(x[i]) : x[i]);
}

/* y and sum |x w|, the measure of what rounding may do. */
static double product(const double *x, const weight *w, int m, int o, double *magnitude)
{
    double sum = 0;
    *magnitude = 0;
    for (int i = 0; i < w->c.n_in; i++) {
        const double y = x[i] * weight_at(w, m, o, i);
        sum += y;
        *magnitude += fabs(y);
    }
    return sum;
}

/* fp8 products on Hopper's matrix instructions: of a block of 128, summed from zero, what lies 2^-13 below its largest term is
 * lost (peers.md 3.6). */
static const double fp8_sum_error = 1.0 / 4096;

static void check_linear(pair *p, tr_format format, int n, int n_max, int n_out, int n_in, int row0,
                         int col0, int split, int pow2, int out_f32)
{
    weight w;
    char what[128];
    snprintf(what, sizeof what, "linear format %d, %d of %d rows, [%d, %d] at %d, %d, split %d",
             (int)format, n, n_max, n_out, n_in, row0, col0, split);
    weight_make(p, &w, format, 1, n_out, n_in, row0, col0);
    weight_pack(p, &w, 0, 0, split);
    if (split < n_out) weight_pack(p, &w, 0, split, n_out - split);
    const size_t blocks = (size_t)(n_in + 254) / 128;
    float *x = acts(p, (size_t)n_max * (size_t)n_in, 2),
          *y = (out_f32 ? floats : acts)(p, (size_t)n_max * (size_t)n_out, 1);
    uint8_t *q = array(p, (size_t)n_max * blocks * 128);
    float *scale = array(p, (size_t)(n_max + 3) / 4 * 4 * blocks * 4);
    int32_t *live = word(p, n);
    const struct tr_linear_args a = {.n = twin(p, live),
                                     .n_max = n_max,
                                     .w = &w.g,
                                     .in = {.x = twin(p, x),
                                            .ld = (size_t)n_in,
                                            .q = twin(p, q),
                                            .q_scale = twin(p, scale),
                                            .n_max = n_max,
                                            .d = n_in,
                                            .scale_pow2 = pow2},
                                     .out = twin(p, y),
                                     .ld_out = (size_t)n_out,
                                     .out_f32 = out_f32};
    push(p);
    pair_ok(p, what, p->g->linear(p->gpu, TR_LANE_MAIN, &a));
    const float *got = pull(p, y);
    double *in = test_alloc((size_t)n_in, sizeof *in),
           *want = test_alloc((size_t)n_out, sizeof *want),
           *bound = test_alloc((size_t)n_out, sizeof *bound);
    for (int r = 0; r < n_max; r++) {
        if (r >= n) { /* rows that are not live are left alone */
            assert_memory_equal(got + (size_t)r * (size_t)n_out, y + (size_t)r * (size_t)n_out,
                                (size_t)n_out * 4);
            continue;
        }
        input_of(in, x + (size_t)r * (size_t)n_in, &w, pow2);
        for (int o = 0; o < n_out; o++) {
            want[o] = product(in, &w, 0, o, &bound[o]);
            /* fp32 sums of exact products */
            bound[o] = bound[o] * (format == TR_W_E4M3_B128 ? fp8_sum_error : 1e-6) + 1e-30;
        }
        test_close(what, got + (size_t)r * (size_t)n_out, want, bound, out_f32 ? 1e-6 : act_error,
                   (size_t)n_out);
    }
    free(bound);
    free(want);
    free(in);
    weight_free(p, &w);
    pair_clear(p);
}

static void test_linear(void **state)
{
    static const tr_format formats[] = {TR_W_F32, TR_W_BF16, TR_W_E4M3_B128};
    pair *p = *state;
    for (int f = 0; f < 3; f++) {
        check_linear(p, formats[f], 0, 4, 8, 16, 0, 0, 8, 1, 0);
        check_linear(p, formats[f], 1, 3, 1, 1, 0, 0, 1, 1, 1);
        check_linear(p, formats[f], 5, 70, 33, 37, 0, 0, 33, 1, 0);
        check_linear(p, formats[f], 65, 66, 130, 132, 0, 0, 130, 0, 1);
        check_linear(p, formats[f], 17, 17, 576, 512, 0, 0, 256, 1, 0);
        check_linear(p, formats[f], 1, 1, 72, 1152, 0, 0, 72, 0, 1);
        check_linear(p, formats[f], 70, 300, 200, 256, 0, 0, 200, 1, 1);
        check_linear(p, formats[f], 130, 200, 96, 300, 40, 60, 96, 1, 0);
        check_linear(p, formats[f], 9, 9, 200, 144, 100, 16, 90, 0, 0);
    }
    /* The real model's width, whose few rows are another kernel's. */
    check_linear(p, TR_W_BF16, 1, 2, 1075, 7168, 0, 0, 1000, 1, 1);
    check_linear(p, TR_W_BF16, 8, 8, 27, 7168, 0, 0, 27, 1, 0);
    check_linear(p, TR_W_BF16, 0, 3, 64, 7168, 0, 0, 64, 1, 1);
}

/* Gate and up of an odd width, each beginning anew in a scale block. */
static void test_linear_pieces(void **state)
{
    pair *p = *state;
    weight w;
    double in[200], magnitude;
    weight_new(p, &w, TR_W_E4M3_B128, 1, 80, 200, 100,
               0); /* stored rows 100..179, scale rows 0 and 1 */
    tr_linear g = {.format = TR_W_E4M3_B128, .n_mats = 1, .n_out = 160, .n_in = 200};
    pair_ok(p, "alloc", p->g->alloc(p->gpu, p->g->linear_bytes(g.format, 1, 160, 200), 0, &g.data));
    for (int i = 0; i < 2; i++) {
        const tr_linear_src s = {.src = (const char *)w.src + 100 * w.ld,
                                 .ld = w.ld,
                                 .scale = w.scale,
                                 .scale_ld = w.scale_ld,
                                 .row0 = 100,
                                 .o_begin = 80 * i,
                                 .n_out = 80};
        pair_ok(p, "linear_pack", p->g->linear_pack(p->gpu, &g, &s));
    }
    float *x = acts(p, 200, 2), *y = floats(p, 160, 1);
    uint8_t *q = array(p, 512);
    float *scale = array(p, 64);
    int32_t *live = word(p, 1);
    push(p);
    pair_ok(p, "linear",
            p->g->linear(p->gpu, TR_LANE_MAIN,
                         &(struct tr_linear_args){.n = twin(p, live),
                                                  .n_max = 1,
                                                  .w = &g,
                                                  .in = {.x = twin(p, x),
                                                         .ld = 200,
                                                         .q = twin(p, q),
                                                         .q_scale = twin(p, scale),
                                                         .n_max = 1,
                                                         .d = 200},
                                                  .out = twin(p, y),
                                                  .ld_out = 160,
                                                  .out_f32 = 1}));
    const float *got = pull(p, y);
    quantised(in, x, 200, 0, 0);
    for (int o = 0; o < 160; o++) {
        const double want = product(in, &w, 0, o % 80, &magnitude);
        assert_true(fabs((double)got[o] - want) <= 1e-6 * magnitude);
    }
    p->g->release(p->gpu, g.data);
    weight_free(p, &w);
    pair_clear(p);
}

/* ---- experts ------------------------------------------------------------------------------------------------------- */

static void test_router_and_pack(void **state)
{
    static const int experts[] = {48, 64, 256};
    enum { N = 70, K = 6 };
    pair *p = *state;
    for (int way = 0; way < 12; way++) {
        const int E = experts[way / 4], biased = way % 2, groups = way / 2 % 2 ? 8 : 1;
        float *logits = floats(p, N * E, 4), *bias = floats(p, E, 0.3f),
              *weights = floats(p, N * K, 1);
        int32_t *n = word(p, 67), *expert = array(p, N * K * 4), *start = array(p, 21 * 4),
                *pairs = array(p, N * K * 4);
        uint64_t *rows = array(p, 20 * 8);
        for (int e = 0; e < 20; e++)
            rows[e] = UINT64_C(1) << 32 | (uint64_t)e; /* of earlier steps */
        for (int e = 0; e < E; e++)
            logits[e] = 0.5f; /* all equal: the first ones */
        logits[E] = NAN;
        for (int e = 0; biased && e < E; e++)
            bias[e] = ldexpf(roundf(bias[e] * 16), -4);
        BOTH(p, router,
             ((struct tr_router_args){.n = n,
                                      .n_max = N,
                                      .n_experts = E,
                                      .n_group = groups,
                                      .topk_group = 3,
                                      .k = K,
                                      .norm_topk = 1,
                                      .logits = logits,
                                      .bias = biased ? bias : NULL,
                                      .scaling = 2.5f,
                                      .expert = expert,
                                      .weight = weights}),
             (TWIN(p, g.n), TWIN(p, g.logits), TWIN(p, g.bias), TWIN(p, g.expert),
              TWIN(p, g.weight)));
        const int32_t *got = pull(p, expert);
        int n_other = 0;
        for (int i = 0; i < N * K; i++) /* exp differs in the last bit: a tie may fall otherwise */
            n_other += got[i] != expert[i];
        assert_true(n_other <= 2);
        if (!n_other)
            for (int r = 0; r < 67; r++)
                for (int j = 0; j < K && r != 1; j++)
                    assert_true(fabsf(((float *)pull(p, weights))[r * K + j] -
                                      weights[r * K + j]) <= 1e-6f);
        BOTH(p, moe_pack,
             ((struct tr_moe_pack_args){.n = n,
                                        .n_max = N,
                                        .k = K,
                                        .e_first = 10,
                                        .n_local = 20,
                                        .expert = expert,
                                        .start = start,
                                        .pair = pairs,
                                        .rows = rows}),
             (TWIN(p, g.n), TWIN(p, g.expert), TWIN(p, g.start), TWIN(p, g.pair), TWIN(p, g.rows)));
        same_bytes(p, "start", start, 21 * 4);
        same_bytes(p, "rows of experts", rows, 20 * 8);
        same_bytes(p, "pair", pairs, (size_t)start[20] * 4);
        pair_clear(p);
    }
}

/* As many pairs as a prompt chunk has: larger blocks look at them, several times in a row. */
static void test_pack_many(void **state)
{
    enum { N = 4200, K = 8, LIVE = 4199, E_FIRST = 7, LOCAL = 40, E = 61 };
    pair *p = *state;
    for (int way = 0; way < 3; way++) {
        int32_t *n = word(p, LIVE), *expert = array(p, (size_t)N * K * 4),
                *start = array(p, (size_t)(LOCAL + 1) * 4), *pairs = array(p, (size_t)N * K * 4);
        for (int i = 0; i < N * K; i++) /* at random; all with one; none here */
            expert[i] = way == 0 ? (int32_t)(test_bits(&p->random) % E) : way == 1 ? E_FIRST : -1;
        BOTH(p, moe_pack,
             ((struct tr_moe_pack_args){.n = n,
                                        .n_max = N,
                                        .k = K,
                                        .e_first = E_FIRST,
                                        .n_local = LOCAL,
                                        .expert = expert,
                                        .start = start,
                                        .pair = pairs}),
             (TWIN(p, g.n), TWIN(p, g.expert), TWIN(p, g.start), TWIN(p, g.pair)));
        same_bytes(p, "start", start, (LOCAL + 1) * 4);
        same_bytes(p, "pair", pairs, (size_t)start[LOCAL] * 4);
        pair_clear(p);
    }
}

static void check_moe(pair *p, tr_format format, int n, int k, int n_local, int d, int inner)
{
    weight gate_up, down;
    char what[128];
    snprintf(what, sizeof what, "moe format %d, %d rows, %d of %d experts, %d and %d", (int)format,
             n, k, n_local, d, inner);
    weight_make(p, &gate_up, format, n_local, 2 * inner, d, 0, 0);
    gate_up.g.gate_up = 1;
    for (int e = 0; e < n_local; e++) {
        weight_pack(p, &gate_up, e, 0, inner);
        weight_pack(p, &gate_up, e, inner, inner);
    }
    weight_new(p, &down, format, n_local, d, inner, 0, 0);
    const size_t pairs = (size_t)n * (size_t)k, bytes = p->g->moe_workspace(n, k, d, inner);
    float *x = acts(p, (size_t)n * (size_t)d, 1), *y = acts(p, pairs * (size_t)d, 1);
    int32_t *live = word(p, n), *expert = array(p, pairs * 4),
            *start = array(p, (size_t)(n_local + 1) * 4), *list = array(p, pairs * 4);
    void *workspace = array(p, bytes);
    for (size_t i = 0; i < pairs; i++) /* the first expert has most, one none, some are elsewhere */
        expert[i] = (int32_t)(test_bits(&p->random) % (uint64_t)(2 * n_local)) - n_local / 2;
    for (size_t i = 0; i < pairs; i += 2)
        expert[i] = 0;
    p->c->moe_pack(p->cpu, TR_LANE_MAIN,
                   &(struct tr_moe_pack_args){.n = live,
                                              .n_max = n,
                                              .k = k,
                                              .n_local = n_local,
                                              .expert = expert,
                                              .start = start,
                                              .pair = list});
    push(p);
    pair_ok(
        p, what,
        p->g->moe(p->gpu, TR_LANE_MAIN,
                  &(struct tr_moe_args){
                      .n = twin(p, live),
                      .n_max = n,
                      .k = k,
                      .n_local = n_local,
                      .gate_up = &gate_up.g,
                      .down = &down.g,
                      .in = {.x = twin(p, x), .ld = (size_t)d, .n_max = n, .d = d, .scale_pow2 = 1},
                      .start = twin(p, start),
                      .pair = twin(p, list),
                      .out = twin(p, y),
                      .workspace = twin(p, workspace),
                      .workspace_bytes = bytes}));
    const float *got = pull(p, y);
    double *in = test_alloc((size_t)d, sizeof *in), *mid = test_alloc((size_t)inner, sizeof *mid),
           worst = 0, all_error = 0, all_size = 0, unused;
    float *h = test_alloc((size_t)inner, sizeof *h);
    for (size_t i = 0; i < pairs; i++) {
        const int e = expert[i];
        if (e < 0 || e >= n_local) {
            assert_memory_equal(got + i * (size_t)d, y + i * (size_t)d, (size_t)d * 4);
            continue;
        }
        input_of(in, x + i / (size_t)k * (size_t)d, &gate_up, 1);
        for (int j = 0; j < inner; j++) {
            const double gate = product(in, &gate_up, e, j, &unused),
                         up = product(in, &gate_up, e, inner + j, &unused);
            h[j] = (float)(gate / (1 + exp(-gate)) * up);
        }
        input_of(mid, h, &down, 1);
        double error = 0, size = 0;
        for (int o = 0; o < d; o++) {
            const double want = product(mid, &down, e, o, &unused),
                         is = (double)got[i * (size_t)d + (size_t)o];
            error += (is - want) * (is - want);
            size += want * want;
        }
        if (!(sqrt(error / size) <= worst)) worst = sqrt(error / size);
        all_error += error;
        all_size += size;
    }
    /* y is stored as bf16: up to 2^-9 of each number. Last bits of h may fall to the other side of a rounding to e4m3, and the
     * largest of a block of them to the other side of a power of two, which rounds its whole row anew (2^-5 of each number):
     * rare. Everything else agrees to fp32. */
    const double bound = act_error + (format == TR_W_F32    ? 1e-5
                                      : format == TR_W_BF16 ? 4e-4
                                                            : 4e-3),
                 row_bound = format == TR_W_E4M3_B128 ? 1.0 / 32 : bound,
                 all = all_size > 0 ? sqrt(all_error / all_size) : 0;
    if (!(worst <= row_bound && all <= bound))
        fail_msg("%s: a row is %g off, at most %g; all of them %g, at most %g", what, worst,
                 row_bound, all, bound);
    free(h);
    free(mid);
    free(in);
    weight_free(p, &gate_up);
    weight_free(p, &down);
    pair_clear(p);
}

static void test_moe(void **state)
{
    static const tr_format formats[] = {TR_W_F32, TR_W_BF16, TR_W_E4M3_B128};
    for (int f = 0; f < 3; f++) {
        check_moe(*state, formats[f], 1, 2, 4, 64, 48);
        check_moe(*state, formats[f], 90, 3, 5, 96, 80);
        check_moe(*state, formats[f], 40, 4, 9, 256, 128);
        check_moe(*state, formats[f], 200, 2, 3, 384, 256);
        check_moe(*state, formats[f], 170, 3, 5, 256, 384);
    }
}

/* n records: the CPU's, and the GPU's with its own activations, whose host copy then is what the GPU has. */
static void same_records(pair *p, const char *what, const char *c, char *g, int n, int d, int k)
{
    const size_t c_bytes = tr_dispatch_bytes(d, k, 4), g_bytes = tr_dispatch_bytes(d, k, 2);
    memcpy(g, pull(p, g), (size_t)n * g_bytes);
    for (int i = 0; i < n; i++) {
        const char *x = c + (size_t)i * c_bytes, *y = g + (size_t)i * g_bytes;
        for (int j = 0; j < d; j++) {
            float wide;
            uint16_t half;
            memcpy(&wide, x + 4 * j, 4);
            memcpy(&half, y + 2 * j, 2);
            if (wide != tr_bf16_to_f32(half)) fail_msg("%s %d: number %d differs", what, i, j);
        }
        if (memcmp(x + tr_dispatch_choices(d, 4), y + tr_dispatch_choices(d, 2), (size_t)k * 8))
            fail_msg("%s %d: other choices", what, i);
    }
}

static void check_exchange(pair *p, int d)
{
    enum { N = 50, K = 4, EP = 3, XT = 2, LOCAL = 5, ROWS = 40 };
    const int D = d;
    const size_t record_bytes = tr_dispatch_bytes(D, K, 4);
    for (int n = 0; n <= N; n += 25)
        for (int first = 0; first < 3; first++) {
            float *x = acts(p, N * D, 1), *weights = floats(p, N * K, 1);
            int32_t *live = word(p, n), *expert = array(p, N * K * 4),
                    *count = array(p, EP * XT * 4), *origin = array(p, ROWS * 3 * XT * 4);
            char *record = array(p, ROWS * 3 * XT * record_bytes),
                 *g_record = array(p, ROWS * 3 * XT * record_bytes);
            float *out = acts(p, (size_t)(N * D), 1), *sum = acts(p, (size_t)(N * D), 1),
                  *back = acts(p, (size_t)(ROWS * 3 * XT * D), 1),
                  *in_weight = floats(p, ROWS * 3 * XT * K, 1);
            int32_t *in_expert = array(p, ROWS * 3 * XT * K * 4), *n_out = word(p, -1);
            for (int i = 0; i < N * K; i++)
                expert[i] = (int32_t)(test_bits(&p->random) % (EP * LOCAL));
            BOTH(p, moe_dispatch,
                 ((struct tr_moe_dispatch_args){.n = live,
                                                .first = first,
                                                .step = 2,
                                                .n_rows = ROWS,
                                                .k = K,
                                                .d = D,
                                                .n_local = LOCAL,
                                                .n_ep = EP,
                                                .n_xt = XT,
                                                .expert = expert,
                                                .weight = weights,
                                                .x = x,
                                                .record = record,
                                                .count = count,
                                                .origin = origin}),
                 (TWIN(p, g.n), TWIN(p, g.expert), TWIN(p, g.weight), TWIN(p, g.x),
                  g.record = twin(p, g_record), TWIN(p, g.count), TWIN(p, g.origin)));
            same_bytes(p, "count", count, EP * XT * 4);
            same_bytes(p, "origin", origin, ROWS * 3 * XT * 4);
            int total = 0;
            for (int i = 0; i < EP * XT; i++)
                total += count[i];
            same_records(p, "record", record, g_record, total, D, K);
            BOTH(p, moe_receive,
                 ((struct tr_moe_receive_args){.record = record,
                                               .n_rows = total,
                                               .k = K,
                                               .d = D,
                                               .expert = in_expert,
                                               .weight = in_weight,
                                               .n_out = n_out}),
                 (g.record = twin(p, g_record), TWIN(p, g.expert), TWIN(p, g.weight),
                  TWIN(p, g.n_out)));
            same_bytes(p, "received experts", in_expert, ROWS * 3 * XT * K * 4);
            same_bytes(p, "received weights", in_weight, ROWS * 3 * XT * K * 4);
            same_bytes(p, "received rows", n_out, 4);
            BOTH(p, moe_return,
                 ((struct tr_moe_return_args){.n_rows = total,
                                              .d = D,
                                              .n_members = EP * XT,
                                              .count = count,
                                              .origin = origin,
                                              .y = back,
                                              .out = out}),
                 (TWIN(p, g.count), TWIN(p, g.origin), TWIN(p, g.y), TWIN(p, g.out)));
            near(p, "returned", out, N * D, 1e-30, act_error);
            for (int i = 0; i < N * D; i++)
                out[i] = tr_round_bf16(out[i]);
            char *offered = array(p, ROWS * record_bytes),
                 *g_offered = array(p, ROWS * record_bytes);
            float *parts = acts(p, (size_t)(3 * (N + 2) * D), 1);
            BOTH(p, moe_offer,
                 ((struct tr_moe_offer_args){.n = live,
                                             .first = first,
                                             .n_rows = ROWS,
                                             .k = K,
                                             .d = D,
                                             .expert = expert,
                                             .weight = weights,
                                             .x = x,
                                             .record = offered}),
                 (TWIN(p, g.n), TWIN(p, g.expert), TWIN(p, g.weight), TWIN(p, g.x),
                  g.record = twin(p, g_offered)));
            same_records(p, "offered", offered, g_offered, ROWS, D, K);
            BOTH(p, moe_add,
                 ((struct tr_moe_add_args){.n = live,
                                           .n_max = N,
                                           .d = D,
                                           .n_members = 3,
                                           .ld = N + 2,
                                           .y = parts,
                                           .out = out}),
                 (TWIN(p, g.n), TWIN(p, g.y), TWIN(p, g.out)));
            near(p, "added", out, N * D, 1e-30, act_error);
            for (int i = 0; i < N * D; i++)
                out[i] = tr_round_bf16(out[i]);
            float *y = acts(p, N * K * D, 1);
            BOTH(p, moe_combine,
                 ((struct tr_moe_combine_args){.n = live,
                                               .n_max = N,
                                               .k = K,
                                               .d = D,
                                               .e_first = 4,
                                               .n_local = 7,
                                               .expert = expert,
                                               .weight = weights,
                                               .y = y,
                                               .shared = first ? out : NULL,
                                               .out = sum}),
                 (TWIN(p, g.n), TWIN(p, g.expert), TWIN(p, g.weight), TWIN(p, g.y),
                  TWIN(p, g.shared), TWIN(p, g.out)));
            near(p, "combine", sum, N * D, 1e-6, act_error);
            pair_clear(p);
        }
}

/* Records of codes are the CPU's to the byte, and so is what is received. */
static void check_codes(pair *p, int d)
{
    enum { N = 50, K = 4, EP = 3, LOCAL = 5, LD = 52, MOST = N * EP, LD_IN = 152 };
    const size_t D = (size_t)d, bytes = tr_dispatch_bytes(d, K, TR_CODES);
    for (int n = 0; n <= N; n += 25)
        for (int told = 0; told < 2; told++) {
            float *weights = floats(p, N * K, 1), *scale = floats(p, LD * D / 128, 1);
            uint8_t *q = array(p, N * D), *got = array(p, MOST * D);
            int32_t *live = word(p, n), *expert = array(p, N * K * 4), *count = array(p, EP * 4),
                    *origin = array(p, MOST * 4), *in_expert = array(p, MOST * K * 4),
                    *n_out = word(p, -1);
            float *in_weight = floats(p, MOST * K, 1), *got_scale = floats(p, LD_IN * D / 128, 1);
            char *record = array(p, MOST * bytes);
            int total = N;
            for (size_t i = 0; i < N * D; i++)
                q[i] = (uint8_t)test_bits(&p->random);
            for (int i = 0; i < N * K; i++)
                expert[i] = (int32_t)(test_bits(&p->random) % (EP * LOCAL));
            if (told) {
                BOTH(p, moe_offer,
                     ((struct tr_moe_offer_args){.n = live,
                                                 .n_rows = N,
                                                 .k = K,
                                                 .d = d,
                                                 .expert = expert,
                                                 .weight = weights,
                                                 .q = q,
                                                 .q_scale = scale,
                                                 .ld_scale = LD,
                                                 .record = record}),
                     (TWIN(p, g.n), TWIN(p, g.expert), TWIN(p, g.weight), TWIN(p, g.q),
                      TWIN(p, g.q_scale), TWIN(p, g.record)));
            } else {
                BOTH(p, moe_dispatch,
                     ((struct tr_moe_dispatch_args){.n = live,
                                                    .step = 1,
                                                    .n_rows = N,
                                                    .k = K,
                                                    .d = d,
                                                    .n_local = LOCAL,
                                                    .n_ep = EP,
                                                    .n_xt = 1,
                                                    .expert = expert,
                                                    .weight = weights,
                                                    .q = q,
                                                    .q_scale = scale,
                                                    .ld_scale = LD,
                                                    .record = record,
                                                    .count = count,
                                                    .origin = origin}),
                     (TWIN(p, g.n), TWIN(p, g.expert), TWIN(p, g.weight), TWIN(p, g.q),
                      TWIN(p, g.q_scale), TWIN(p, g.record), TWIN(p, g.count), TWIN(p, g.origin)));
                same_bytes(p, "count of codes", count, EP * 4);
                total = count[0] + count[1] + count[2];
            }
            same_bytes(p, "records of codes", record, (size_t)total * bytes);
            BOTH(p, moe_receive,
                 ((struct tr_moe_receive_args){.record = record,
                                               .n_rows = total,
                                               .k = K,
                                               .d = d,
                                               .expert = in_expert,
                                               .weight = in_weight,
                                               .n_out = n_out,
                                               .q = got,
                                               .q_scale = got_scale,
                                               .ld_scale = LD_IN}),
                 (TWIN(p, g.record), TWIN(p, g.expert), TWIN(p, g.weight), TWIN(p, g.n_out),
                  TWIN(p, g.q), TWIN(p, g.q_scale)));
            same_bytes(p, "received codes", got, (size_t)total * D);
            same_bytes(p, "received scales", got_scale, LD_IN * D / 128 * 4);
            same_bytes(p, "experts beside codes", in_expert, (size_t)total * K * 4);
            same_bytes(p, "weights beside codes", in_weight, (size_t)total * K * 4);
            same_bytes(p, "rows of codes", n_out, 4);
            pair_clear(p);
        }
}

static void test_moe_exchange(void **state)
{
    check_codes(*state, 256);
    check_codes(*state, 7168);
    check_exchange(*state, 36); /* rows that are no whole lines */
    check_exchange(*state, 136);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_rows, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_linear, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_linear_pieces, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_router_and_pack, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_pack_many, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_moe, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_moe_exchange, pair_open, pair_close),
    };
    return run_on_gpu(argc, argv, tests, sizeof tests / sizeof *tests);
}
