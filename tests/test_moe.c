#include <config.h>

#include <string.h>

#include <jansson.h>

#include "cpu_test.h"
#include "kernels/limits.h"
#include "kernels/number.h"
#include "vectors.h"

/* ---- router: the vectors ---- */

static json_t *unit_cases(void)
{
    char path[4096];
    json_t *all = json_load_file(tr_vector_path(path, sizeof path, "model/unit.json"), 0, NULL);
    return all;
}

static int get_int(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    assert_true(json_is_integer(v));
    return (int)json_integer_value(v);
}

static void get_floats(float *out, const json_t *array, size_t n)
{
    assert_int_equal(json_array_size(array), n);
    for (size_t i = 0; i < n; i++)
        out[i] = (float)json_number_value(json_array_get(array, i));
}

static struct tr_router_args router_of(const json_t *config, int n_experts)
{
    struct tr_router_args a = {
        .n_experts = n_experts,
        .n_group = get_int(config, "n_group"),
        .topk_group = get_int(config, "topk_group"),
        .k = get_int(config, "num_experts_per_tok"),
        .norm_topk = json_is_true(json_object_get(config, "norm_topk_prob")),
        .scaling = (float)json_number_value(json_object_get(config, "routed_scaling_factor")),
    };
    return a;
}

static void expect_routes(const struct tr_router_args *a, int row, const json_t *experts,
                          const json_t *weights)
{
    assert_int_equal(json_array_size(experts), a->k);
    double want[64];
    for (int j = 0; j < a->k; j++) {
        assert_int_equal(a->expert[row * a->k + j],
                         json_integer_value(json_array_get(experts, (size_t)j)));
        want[j] = json_number_value(json_array_get(weights, (size_t)j));
    }
    test_close("router weights", a->weight + row * a->k, want, NULL, 1e-6, (size_t)a->k);
}

static void router_vectors(void **state)
{
    json_t *all = *state, *c = json_object_get(all, "router256");
    const json_t *logits = json_object_get(c, "logits"), *bias = json_object_get(c, "bias");
    size_t n_experts = json_array_size(bias), n_rows = json_array_size(logits);
    test_cpu cpu;
    assert_int_equal(test_cpu_open(&cpu, 0, 2), 1);
    assert_true(n_rows > 0);

    struct tr_router_args a = router_of(json_object_get(c, "config"), (int)n_experts);
    int32_t n = (int32_t)n_rows;
    float *x = test_alloc(n_rows * n_experts, sizeof *x), *b = test_alloc(n_experts, sizeof *b);
    get_floats(b, bias, n_experts);
    for (size_t r = 0; r < n_rows; r++)
        get_floats(x + r * n_experts, json_array_get(logits, r), n_experts);
    a.n = &n, a.n_max = n, a.logits = x, a.bias = b;
    a.expert = test_alloc(n_rows * (size_t)a.k, sizeof *a.expert);
    a.weight = test_alloc(n_rows * (size_t)a.k, sizeof *a.weight);
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    for (size_t r = 0; r < n_rows; r++)
        expect_routes(&a, (int)r, json_array_get(json_object_get(c, "experts"), r),
                      json_array_get(json_object_get(c, "weights"), r));

    /* Ties of groups and of experts; every biased score is negative or small. */
    c = json_object_get(all, "router256_ties");
    logits = json_object_get(c, "logits");
    assert_int_equal(json_array_size(logits), n_experts);
    struct tr_router_args t = router_of(json_object_get(c, "config"), (int)n_experts);
    assert_int_equal(t.k, a.k);
    get_floats(x, logits, n_experts);
    for (size_t e = 0; e < n_experts; e++)
        b[e] = (float)json_number_value(json_object_get(c, "bias_all"));
    n = 1;
    t.n = &n, t.n_max = 1, t.logits = x, t.bias = b, t.expert = a.expert, t.weight = a.weight;
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &t), TR_OK);
    expect_routes(&t, 0, json_object_get(c, "experts"), json_object_get(c, "weights"));
    free(x);
    free(b);
    free(a.expert);
    free(a.weight);
    cpu.ops->close(cpu.d);
}

/* ---- router: by hand ---- */

static void router_rules(void **state)
{
    test_cpu cpu;
    int32_t n = 1, expert[4];
    float weight[4];
    (void)state;
    assert_int_equal(test_cpu_open(&cpu, 0, 1), 1);
    /* Two groups of four. Without bias a group's score is its best: group 1, though group 0's two
     * best are more. */
    const float logits[8] = {1, 1, -9, -9, 2, -9, -8, -7};
    struct tr_router_args a = {
        .n = &n,
        .n_max = 1,
        .n_experts = 8,
        .n_group = 2,
        .topk_group = 1,
        .k = 2,
        .norm_topk = 0,
        .logits = logits,
        .scaling = 1,
        .expert = expert,
        .weight = weight,
    };
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    assert_int_equal(expert[0], 4);
    assert_int_equal(expert[1], 7);
    const double not_normalised[2] = {1 / (1 + exp(-2.0)), 1 / (1 + exp(7.0))};
    test_close("weights", weight, not_normalised, NULL, 1e-6, 2);

    /* With a bias it is the two best: group 0. The bias does not reach the weights. A masked group
     * is -inf, not 0: group 0's experts are below zero here. */
    const float bias[8] = {-3, -3, -3, -3, -3, -3, -3, -3};
    a.bias = bias, a.norm_topk = 1, a.k = 3, a.scaling = 2.5f;
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    assert_int_equal(expert[0], 0);
    assert_int_equal(expert[1], 1);
    assert_int_equal(expert[2], 2);
    double s = 1 / (1 + exp(-1.0)), low = 1 / (1 + exp(9.0)), sum = 2 * s + low;
    const double normalised[3] = {2.5 * s / sum, 2.5 * s / sum, 2.5 * low / sum};
    test_close("weights", weight, normalised, NULL, 1e-6, 3);

    /* One group: no grouping. NaN logits still give k different experts. */
    const float nan_logits[8] = {NAN, NAN, 3, NAN, NAN, NAN, NAN, NAN};
    a.logits = nan_logits, a.n_group = 1, a.k = 4;
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    const int32_t want[4] = {2, 0, 1, 3};
    assert_memory_equal(expert, want, sizeof want);

    a.k = 9;
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_E_USAGE);
    a.k = 2, a.n_group = 3;
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_E_USAGE);
    cpu.ops->close(cpu.d);
}

/* As many experts as the backend says it takes (kernels/limits.h), and one more. */
static void router_limit(void **state)
{
    enum { MOST = TR_CPU_EXPERTS_MAX };
    test_cpu cpu;
    int32_t n = 1, expert[1];
    float weight[1], *logits = test_alloc(MOST + 1, sizeof *logits);
    struct tr_router_args a = {.n = &n,
                               .n_max = 1,
                               .n_experts = MOST,
                               .n_group = 1,
                               .topk_group = 1,
                               .k = 1,
                               .logits = logits,
                               .scaling = 1,
                               .expert = expert,
                               .weight = weight};
    (void)state;
    assert_int_equal(test_cpu_open(&cpu, 0, 1), 1);
    logits[MOST - 1] = 5;
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    assert_int_equal(expert[0], MOST - 1);
    a.n_experts = MOST + 1;
    assert_int_equal(cpu.ops->router(cpu.d, TR_LANE_MAIN, &a), TR_E_USAGE);
    assert_string_equal(cpu.ops->error(cpu.d),
                        "router: 1 of 1025 experts in 1 groups (at most 1024 experts)");
    cpu.ops->close(cpu.d);
    free(logits);
}

/* ---- pack ---- */

static void pack_pairs(void **state)
{
    enum { N = 4, K = 2, LOCAL = 4 };
    const int32_t expert[N * K] = {5, 2, 3, 5, 9, 3, 0, 5};
    int32_t n = N, start[LOCAL + 1], pair[N * K];
    test_cpu cpu;
    (void)state;
    assert_int_equal(test_cpu_open(&cpu, 0, 1), 1);
    struct tr_moe_pack_args a = {.n = &n, .n_max = N, .k = K, .e_first = 2, .n_local = LOCAL};
    uint64_t rows[LOCAL] = {10, 20, 30, 40};
    a.expert = expert, a.start = start, a.pair = pair, a.rows = rows;
    assert_int_equal(cpu.ops->moe_pack(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    const int32_t want_start[LOCAL + 1] = {0, 1, 3, 3, 6}, want_pair[] = {1, 2, 5, 0, 3, 7};
    assert_memory_equal(start, want_start, sizeof want_start);
    assert_memory_equal(pair, want_pair, sizeof want_pair);
    const uint64_t want_rows[LOCAL] = {11, 22, 30, 43};
    assert_memory_equal(rows, want_rows, sizeof want_rows);
    n = 0;
    assert_int_equal(cpu.ops->moe_pack(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    for (int e = 0; e <= LOCAL; e++)
        assert_int_equal(start[e], 0);
    assert_memory_equal(rows, want_rows, sizeof want_rows);
    cpu.ops->close(cpu.d);
}

/* ---- experts ---- */

typedef struct experts {
    int n_local, d, inner;
    double *gate_up, *down; /* [n_local, 2 inner, d], [n_local, d, inner] */
    tr_linear gate_up_w, down_w;
} experts;

/* Random e4m3 matrices of an expert, packed (gate and up apart) and in double. */
static void pack_expert(const test_cpu *cpu, uint64_t *seed, tr_linear *w, int i_mat, int o_begin,
                        int n_out, int n_in, double *value)
{
    size_t n = (size_t)n_out * (size_t)n_in, scale_ld = (size_t)(n_in + 127) / 128;
    size_t n_scales = scale_ld * (size_t)((n_out + 127) / 128);
    uint8_t *code = test_alloc(n, 1);
    float *scale = test_alloc(n_scales, sizeof *scale);
    for (size_t i = 0; i < n_scales; i++)
        scale[i] = ldexpf(1.5f + 0.5f * test_float(seed), -7);
    for (size_t i = 0; i < n; i++) {
        code[i] = tr_f32_to_e4m3(16 * test_float(seed));
        size_t at = i / (size_t)n_in / 128 * scale_ld + i % (size_t)n_in / 128;
        value[i] = (double)tr_e4m3_to_f32(code[i]) * (double)scale[at];
    }
    tr_linear_src src = {.src = code, .ld = (size_t)n_in, .scale = scale, .scale_ld = scale_ld};
    src.i_mat = i_mat, src.o_begin = o_begin, src.n_out = n_out;
    assert_int_equal(cpu->ops->linear_pack(cpu->d, w, &src), TR_OK);
    free(code);
    free(scale);
}

static experts make_experts(const test_cpu *cpu, uint64_t *seed, int n_local, int d, int inner)
{
    experts x = {.n_local = n_local, .d = d, .inner = inner};
    size_t n = (size_t)n_local * (size_t)d * (size_t)inner;
    x.gate_up_w =
        (tr_linear){.format = TR_W_E4M3_B128, .n_mats = n_local, .n_out = 2 * inner, .n_in = d};
    x.down_w = (tr_linear){.format = TR_W_E4M3_B128, .n_mats = n_local, .n_out = d, .n_in = inner};
    x.gate_up = test_alloc(2 * n, sizeof *x.gate_up);
    x.down = test_alloc(n, sizeof *x.down);
    size_t bytes = cpu->ops->linear_bytes(TR_W_E4M3_B128, n_local, 2 * inner, d);
    assert_int_equal(cpu->ops->alloc(cpu->d, bytes, 0, &x.gate_up_w.data), TR_OK);
    bytes = cpu->ops->linear_bytes(TR_W_E4M3_B128, n_local, d, inner);
    assert_int_equal(cpu->ops->alloc(cpu->d, bytes, 0, &x.down_w.data), TR_OK);
    for (int e = 0; e < n_local; e++) {
        size_t one = (size_t)d * (size_t)inner;
        double *gate_up = x.gate_up + 2 * one * (size_t)e;
        pack_expert(cpu, seed, &x.gate_up_w, e, 0, inner, d, gate_up);
        pack_expert(cpu, seed, &x.gate_up_w, e, inner, inner, d, gate_up + one);
        pack_expert(cpu, seed, &x.down_w, e, 0, d, inner, x.down + one * (size_t)e);
    }
    return x;
}

static double dot(const double *w, const double *x, int n, double *magnitude)
{
    double sum = 0;
    *magnitude = 0;
    for (int i = 0; i < n; i++) {
        sum += w[i] * x[i];
        *magnitude += fabs(w[i] * x[i]);
    }
    return sum;
}

/* down(silu(gate x) * up x) of expert e. bound: rounding of the sums, carried through to the end.
 */
static void expert_reference(const experts *m, int e, const float *x, double *want, double *bound)
{
    const size_t one = (size_t)m->d * (size_t)m->inner;
    double *in = test_alloc((size_t)m->d, sizeof *in);
    double *h = test_alloc((size_t)m->inner, sizeof *h), *error = test_alloc((size_t)m->inner, 8);
    for (int i = 0; i < m->d; i++)
        in[i] = (double)x[i];
    for (int o = 0; o < m->inner; o++) {
        double gm, um;
        const double *gate = m->gate_up + 2 * one * (size_t)e + (size_t)o * (size_t)m->d;
        double g = dot(gate, in, m->d, &gm), u = dot(gate + one, in, m->d, &um);
        h[o] = g / (1 + exp(-g)) * u;
        error[o] = 0x1p-21 * (1.1 * gm * fabs(u) + fabs(g) * um + fabs(h[o]));
    }
    for (int o = 0; o < m->d; o++) {
        double magnitude;
        const double *down = m->down + one * (size_t)e + (size_t)o * (size_t)m->inner;
        want[o] = dot(down, h, m->inner, &magnitude);
        bound[o] = 0x1p-21 * magnitude;
        for (int i = 0; i < m->inner; i++)
            bound[o] += fabs(down[i]) * error[i];
    }
    free(in);
    free(h);
    free(error);
}

typedef struct layer_shape {
    int n, k, e_first, n_local, n_experts, d, inner, threads;
} layer_shape;

/* One step of local experts: pack, experts, combine. out [n, d] without a shared expert; y [n k,
 * d]. */
static void run_layer(const test_cpu *cpu, const experts *m, const layer_shape *s, const float *x,
                      const int32_t *expert, const float *weight, int32_t *start, float *y,
                      float *out)
{
    int32_t n = s->n;
    int32_t *pair = test_alloc((size_t)(s->n * s->k), sizeof *pair);
    struct tr_moe_pack_args p = {&n, s->n, s->k, s->e_first, s->n_local, expert, start, pair, NULL};
    assert_int_equal(cpu->ops->moe_pack(cpu->d, TR_LANE_MAIN, &p), TR_OK);

    size_t bytes = cpu->ops->moe_workspace(s->n, s->k, s->d, s->inner);
    struct tr_moe_args a = {.n = &n, .n_max = s->n, .k = s->k, .n_local = s->n_local};
    a.gate_up = &m->gate_up_w, a.down = &m->down_w;
    a.in = (tr_acts){.x = (void *)(uintptr_t)x, .ld = (size_t)s->d, .n_max = s->n, .d = s->d};
    a.start = start, a.pair = pair, a.out = y;
    a.workspace = test_alloc(bytes, 1), a.workspace_bytes = bytes;
    assert_int_equal(cpu->ops->moe(cpu->d, TR_LANE_MAIN, &a), TR_OK);

    struct tr_moe_combine_args c = {.n = &n, .n_max = s->n, .k = s->k, .d = s->d};
    c.e_first = s->e_first, c.n_local = s->n_local, c.expert = expert, c.weight = weight;
    c.y = y, c.out = out;
    assert_int_equal(cpu->ops->moe_combine(cpu->d, TR_LANE_MAIN, &c), TR_OK);
    free(a.workspace);
    free(pair);
}

static void check_layer(const test_cpu *cpu, uint64_t *seed, const layer_shape *s, const char *isa)
{
    const size_t d = (size_t)s->d, n_pairs = (size_t)(s->n * s->k);
    experts m = make_experts(cpu, seed, s->n_local, s->d, s->inner);
    float *x = test_floats(seed, (size_t)s->n * d), *weight = test_floats(seed, n_pairs);
    int32_t *expert = test_alloc(n_pairs, 4), *start = test_alloc((size_t)s->n_local + 1, 4);
    float *y = test_alloc(n_pairs * d, sizeof *y), *out = test_alloc((size_t)s->n * d, 4);
    float *alone = test_alloc((size_t)s->k * d, sizeof *y), *out_alone = test_alloc(d, 4);
    double *want = test_alloc(d, 8), *bound = test_alloc(d, 8), *sum = test_alloc(d, 8);
    double *sum_bound = test_alloc(d, 8);
    char what[96];

    snprintf(what, sizeof what, "%s, %d rows of %d, inner %d", isa, s->n, s->d, s->inner);
    for (int r = 0; r < s->n; r++) /* k different experts; never the last one: it stays empty */
        for (int j = 0, first = (int)(test_bits(seed) % 97); j < s->k; j++)
            expert[r * s->k + j] = (first + j) % (s->n_experts - 1);
    run_layer(cpu, &m, s, x, expert, weight, start, y, out);
    for (int r = 0; r < s->n; r++) {
        memset(sum, 0, d * sizeof *sum);
        memset(sum_bound, 0, d * sizeof *sum);
        for (int j = 0; j < s->k; j++) {
            size_t pair = (size_t)(r * s->k + j);
            int e = expert[pair] - s->e_first;
            if (e < 0 || e >= s->n_local) continue;
            expert_reference(&m, e, x + (size_t)r * d, want, bound);
            test_close(what, y + pair * d, want, bound, 0x1p-21, d);
            for (size_t i = 0; i < d; i++) {
                sum[i] += (double)weight[pair] * want[i];
                sum_bound[i] += fabs((double)weight[pair]) * (bound[i] + 0x1p-21 * fabs(want[i]));
            }
        }
        test_close("combine", out + (size_t)r * d, sum, sum_bound, 0x1p-21, d);

        if (r >= 8) continue;
        /* The row alone, in another step: the same bits. */
        layer_shape one = *s;
        one.n = 1;
        run_layer(cpu, &m, &one, x + (size_t)r * d, expert + r * s->k, weight + r * s->k, start,
                  alone, out_alone);
        assert_memory_equal(out_alone, out + (size_t)r * d, d * sizeof *out);
    }
    free(m.gate_up);
    free(m.down);
    void *all[] = {x, weight, expert, start, y, out, alone, out_alone, want, bound, sum, sum_bound};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void experts_of_layers(void **state)
{
    static const layer_shape shapes[] = {
        /* n, k, e_first, n_local, n_experts, d, inner, threads */
        {2, 4, 0, 8, 8, 256, 128, 2},
        {17, 4, 0, 16, 16, 64, 48, 2},
        {9, 3, 5, 4, 16, 130, 33, 2},
        {40, 2, 0, 3, 3, 31, 16, 2},
        {6, 2, 8, 8, 16, 16, 7, 1},
        {5, 3, 2, 6, 8, 48, 160, 3},
        /* enough for threads to take from each other */
        {12, 3, 1, 5, 8, 600, 256, 3},
        {9, 2, 0, 4, 4, 600, 250, 2},
    };
    uint64_t seed = 11;
    (void)state;
    for (int i = 0; i < TEST_N_ISAS; i++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            test_cpu cpu;
            if (!test_cpu_open(&cpu, i, shapes[s].threads)) continue;
            check_layer(&cpu, &seed, &shapes[s], test_isas[i]);
            cpu.ops->close(cpu.d);
        }
}

/* No pairs at all, a workspace too small, matrices that do not fit together. */
static void moe_edges(void **state)
{
    enum { D = 16, INNER = 16, LOCAL = 2 };
    uint64_t seed = 12;
    int32_t n = 1, start[LOCAL + 1] = {0}, pair[2] = {0, 1};
    float x[D] = {0}, y[2 * D], space[256];
    test_cpu cpu;
    (void)state;
    assert_int_equal(test_cpu_open(&cpu, 0, 2), 1);
    experts m = make_experts(&cpu, &seed, LOCAL, D, INNER);
    struct tr_moe_args a = {.n = &n, .n_max = 1, .k = 2, .n_local = LOCAL};
    a.gate_up = &m.gate_up_w, a.down = &m.down_w, a.start = start, a.pair = pair, a.out = y;
    a.in = (tr_acts){.x = x, .ld = D, .n_max = 1, .d = D};
    a.workspace = space;
    for (int i = 0; i < 2 * D; i++)
        y[i] = 7;
    assert_int_equal(cpu.ops->moe(cpu.d, TR_LANE_MAIN, &a), TR_OK);
    for (int i = 0; i < 2 * D; i++)
        assert_true(y[i] == 7);
    start[1] = start[2] = 2;
    a.workspace_bytes = cpu.ops->moe_workspace(1, 2, D, INNER) - 1;
    assert_int_equal(cpu.ops->moe(cpu.d, TR_LANE_MAIN, &a), TR_E_USAGE);
    a.workspace_bytes = sizeof space;
    a.in.d = D + 1;
    assert_int_equal(cpu.ops->moe(cpu.d, TR_LANE_MAIN, &a), TR_E_USAGE);
    free(m.gate_up);
    free(m.down);
    cpu.ops->close(cpu.d);
}

/* out = shared + the local experts' part; out may be shared. */
static void combine(void **state)
{
    enum { N = 2, K = 3, D = 19 };
    const int32_t expert[N * K] = {4, 1, 7, 0, 5, 9};
    uint64_t seed = 13;
    float *weight = test_floats(&seed, N * K), *y = test_floats(&seed, N * K * D);
    float *shared = test_floats(&seed, N * D), out[N * D];
    double want[N * D], bound[N * D];
    (void)state;
    for (int j = 0; j < K; j++)
        for (int i = 0; i < D; i++) /* not local: never looked at */
            if (expert[j] < 4 || expert[j] >= 8) y[j * D + i] = NAN;
    for (int r = 0; r < N; r++)
        for (int i = 0; i < D; i++) {
            double sum = (double)shared[r * D + i];
            for (int j = 0; j < K; j++) {
                int p = r * K + j;
                if (expert[p] >= 4 && expert[p] < 8)
                    sum += (double)weight[p] * (double)y[p * D + i];
            }
            want[r * D + i] = sum;
            bound[r * D + i] = 1e-6;
        }
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        int32_t n = N;
        if (!test_cpu_open(&cpu, i, 1)) continue;
        struct tr_moe_combine_args a = {.n = &n, .n_max = N, .k = K, .d = D, .e_first = 4};
        a.n_local = 4, a.expert = expert, a.weight = weight, a.y = y;
        a.shared = shared, a.out = out;
        assert_int_equal(cpu.ops->moe_combine(cpu.d, TR_LANE_MAIN, &a), TR_OK);
        test_close("combine", out, want, bound, 0, N * D);
        float in_place[N * D];
        memcpy(in_place, shared, sizeof in_place);
        a.shared = a.out = in_place;
        assert_int_equal(cpu.ops->moe_combine(cpu.d, TR_LANE_MAIN, &a), TR_OK);
        assert_memory_equal(in_place, out, sizeof out);
        cpu.ops->close(cpu.d);
    }
    free(weight);
    free(y);
    free(shared);
}

/* Records of codes: what moe_dispatch and moe_offer put in, codes, scales and choices, comes out of moe_receive, at the stride it is
 * wanted with; dead rows are zeros. */
static void records_of_codes(void **state)
{
    enum { N = 6, K = 3, D = 256, LOCAL = 2, EP = 3, LD = 8, LD_IN = 40, MOST = N * K };
    uint64_t random = 5;
    test_cpu cpu;
    (void)state;
    test_cpu_open(&cpu, 0, 1);
    const size_t bytes = tr_dispatch_bytes(D, K, TR_CODES);
    uint8_t q[N * D], got[MOST * D];
    float scale[D / 128 * LD], weight[N * K], got_scale[D / 128 * LD_IN], got_weight[MOST * K];
    int32_t expert[N * K], got_expert[MOST * K], count[EP], origin[MOST], n = N - 1, n_in = -1;
    char *record = test_alloc(MOST, bytes);

    assert_true(bytes >= D + D / 128 * 4 + K * 8 && bytes % 16 == 0);
    for (int i = 0; i < N * D; i++)
        q[i] = (uint8_t)test_bits(&random);
    for (int i = 0; i < D / 128 * LD; i++)
        scale[i] = (float)i;
    for (int i = 0; i < N * K; i++) {
        expert[i] = (int32_t)(test_bits(&random) % (EP * LOCAL));
        weight[i] = (float)(i + 1);
    }
    for (int told = 0; told < 2; told++) {
        const struct tr_moe_dispatch_args dispatch = {.n = &n,
                                                      .step = 1,
                                                      .n_rows = N,
                                                      .k = K,
                                                      .d = D,
                                                      .n_local = LOCAL,
                                                      .n_ep = EP,
                                                      .n_xt = 1,
                                                      .expert = expert,
                                                      .weight = weight,
                                                      .q = q,
                                                      .q_scale = scale,
                                                      .ld_scale = LD,
                                                      .record = record,
                                                      .count = count,
                                                      .origin = origin};
        const struct tr_moe_offer_args offer = {.n = &n,
                                                .n_rows = N,
                                                .k = K,
                                                .d = D,
                                                .expert = expert,
                                                .weight = weight,
                                                .q = q,
                                                .q_scale = scale,
                                                .ld_scale = LD,
                                                .record = record};
        int total = N;
        if (told) {
            assert_int_equal(cpu.ops->moe_offer(cpu.d, TR_LANE_MAIN, &offer), TR_OK);
        } else {
            assert_int_equal(cpu.ops->moe_dispatch(cpu.d, TR_LANE_MAIN, &dispatch), TR_OK);
            total = count[0] + count[1] + count[2];
            assert_in_range(total, N - 1, MOST);
        }
        const struct tr_moe_receive_args receive = {.record = record,
                                                    .n_rows = total,
                                                    .k = K,
                                                    .d = D,
                                                    .expert = got_expert,
                                                    .weight = got_weight,
                                                    .n_out = &n_in,
                                                    .q = got,
                                                    .q_scale = got_scale,
                                                    .ld_scale = LD_IN};
        assert_int_equal(cpu.ops->moe_receive(cpu.d, TR_LANE_MAIN, &receive), TR_OK);
        assert_int_equal(n_in, total);
        for (int i = 0, ep = 0, left = count[0]; i < total; i++, left--) {
            while (!told && left == 0)
                left = count[++ep];
            const int r = told ? i : origin[i], live = r < n;
            for (int j = 0; j < D; j++)
                assert_int_equal(got[i * D + j], live ? q[r * D + j] : 0);
            for (int b = 0; b < D / 128; b++)
                assert_true(got_scale[b * LD_IN + i] == (live ? scale[b * LD + r] : 0));
            for (int j = 0; j < K; j++) {
                const int32_t e = expert[r * K + j];
                const int here = live && (told || e / LOCAL == ep);
                assert_int_equal(got_expert[i * K + j], here ? e : -1);
                assert_true(got_weight[i * K + j] == (here ? weight[r * K + j] : 0));
            }
        }
    }
    free(record);
    cpu.ops->close(cpu.d);
}

/* Rows told to all: what is offered comes out of moe_receive again, dead rows choose nobody; and the members' sums are added as
 * those of dispatched rows are, bit for bit. */
static void told_rows(void **state)
{
    enum { N = 5, ROWS = 4, FIRST = 2, K = 3, D = 20, MEMBERS = 3, LD = N + 2 };
    uint64_t random = 77;
    const size_t words = tr_dispatch_bytes(D, K, sizeof(float)) / 4;
    test_cpu cpu;
    (void)state;
    test_cpu_open(&cpu, 0, 1);
    float *x = test_floats(&random, N * D), *weight = test_floats(&random, N * K),
          *record = test_floats(&random, ROWS * words), *y = test_floats(&random, MEMBERS * LD * D),
          *out = test_floats(&random, N * D), *want = test_alloc(N * D, sizeof *want);
    float in_weight[ROWS * K];
    int32_t expert[N * K], in_expert[ROWS * K], origin[MEMBERS * N], n = N, n_in = -1;

    for (int i = 0; i < N * K; i++)
        expert[i] = i;
    assert_int_equal(cpu.ops->moe_offer(cpu.d, TR_LANE_MAIN,
                                        &(struct tr_moe_offer_args){.n = &n,
                                                                    .first = FIRST,
                                                                    .n_rows = ROWS,
                                                                    .k = K,
                                                                    .d = D,
                                                                    .expert = expert,
                                                                    .weight = weight,
                                                                    .x = x,
                                                                    .record = record}),
                     TR_OK);
    assert_int_equal(cpu.ops->moe_receive(cpu.d, TR_LANE_MAIN,
                                          &(struct tr_moe_receive_args){.record = record,
                                                                        .n_rows = ROWS,
                                                                        .k = K,
                                                                        .d = D,
                                                                        .expert = in_expert,
                                                                        .weight = in_weight,
                                                                        .n_out = &n_in}),
                     TR_OK);
    assert_int_equal(n_in, ROWS);
    for (int i = 0; i < ROWS; i++) {
        const int live = FIRST + i < N;
        for (int j = 0; j < K; j++) {
            assert_int_equal(in_expert[i * K + j], live ? expert[(FIRST + i) * K + j] : -1);
            assert_true(in_weight[i * K + j] == (live ? weight[(FIRST + i) * K + j] : 0));
        }
        for (int j = 0; j < D; j++)
            assert_true(record[(size_t)i * words + (size_t)j] ==
                        (live ? x[(FIRST + i) * D + j] : 0));
    }

    /* Member 1 has nothing of any row: zeros, of which the other way knows nothing. */
    memset(y + LD * D, 0, LD * D * sizeof *y);
    memcpy(want, out, N * D * sizeof *want);
    int n_rows = 0;
    float packed[MEMBERS * N * D];
    for (int m = 0; m < MEMBERS; m++)
        for (int r = 0; r < N && m != 1; r++) {
            memcpy(packed + n_rows * D, y + (m * LD + r) * D, D * sizeof *y);
            origin[n_rows++] = r;
        }
    assert_int_equal(cpu.ops->moe_return(
                         cpu.d, TR_LANE_MAIN,
                         &(struct tr_moe_return_args){
                             .n_rows = n_rows, .d = D, .origin = origin, .y = packed, .out = want}),
                     TR_OK);
    n = N - 1; /* the last row is not live */
    memcpy(want + (N - 1) * D, out + (N - 1) * D, D * sizeof *out);
    assert_int_equal(
        cpu.ops->moe_add(
            cpu.d, TR_LANE_MAIN,
            &(struct tr_moe_add_args){
                .n = &n, .n_max = N, .d = D, .n_members = MEMBERS, .ld = LD, .y = y, .out = out}),
        TR_OK);
    assert_memory_equal(out, want, N * D * sizeof *out);
    cpu.ops->close(cpu.d);
    free(want);
    free(out);
    free(y);
    free(record);
    free(weight);
    free(x);
}

int main(void)
{
    json_t *all = unit_cases();
    if (!all) {
        fprintf(stderr, "test_moe: no model/unit.json\n");
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(router_vectors, all),
        cmocka_unit_test(router_rules),
        cmocka_unit_test(router_limit),
        cmocka_unit_test(pack_pairs),
        cmocka_unit_test(experts_of_layers),
        cmocka_unit_test(moe_edges),
        cmocka_unit_test(combine),
        cmocka_unit_test(records_of_codes),
        cmocka_unit_test(told_rows),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    json_decref(all);
    return failed;
}
