/* The vectors of tests/vectors/model on a GPU, at the tolerances of their README: the layers from the reference's own input, whole
 * runs with fp8 and bf16 weights and caches, chunks, and the unit cases of operations. */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "model_vectors.h"
#include "scratch.h"
#include "tests/cuda_test.h"
#include "vectors.h"

static const char *const sets[] = {"tiny", "realgeom"};
enum { N_SETS = 2 };

/* README.md: of a bf16 engine, of one with fp8 weights and cache. */
static const double bf16_bound = 0.03, fp8_bound = 0.08;

/* A set's checkpoint on the GPU, its weights fp8 as stored or bf16. */
typedef struct engine {
    tr_vectors v;
    tr_fixture f;
    char scratch[128]; /* "": none */
    float *final;      /* [n_trace, hidden] */
    bool *clear;
} engine;

static void engine_open(engine *e, const char *set, bool bf16_weights, tr_dtype cache)
{
    tr_fixture_options options = {.device = "cuda", .kv_dtype = cache};
    tr_vectors_open(&e->v, set);
    *e->scratch = '\0';
    if (bf16_weights) {
        assert_non_null(tr_scratch_make(e->scratch, sizeof e->scratch));
        tr_vectors_as_bf16(&e->v, e->scratch);
        options.dir = e->scratch;
    }
    tr_vectors_fixture(&e->v, &e->f, &options);
    e->final = test_alloc((size_t)e->v.n_trace * (size_t)e->v.n_hidden, sizeof *e->final);
    e->clear = test_alloc((size_t)e->v.n_trace, sizeof *e->clear);
}

static void engine_close(engine *e)
{
    free(e->final);
    free(e->clear);
    tr_fixture_close(&e->f);
    tr_vectors_close(&e->v);
    if (*e->scratch) tr_scratch_clear(e->scratch, 1);
}

/* ---- layer by layer ------------------------------------------------------------------------------------------------ */

/* Rows count where they selected the same keys and experts; selections must be the same where the margin is wider than a quarter
 * of a standard deviation of the scores, and experts where it is wider than 0.01 of the gate's scores in (0, 1). */
static void layers(bool bf16_weights, tr_dtype cache, double bound)
{
    for (int s = 0; s < N_SETS; s++) {
        engine e;
        engine_open(&e, sets[s], bf16_weights, cache);
        tr_watch w = {.v = &e.v,
                      .f = &e.f,
                      .prefix = "",
                      .only = -1,
                      .feed = true,
                      .set_margin = 0.25,
                      .route_margin = 0.01,
                      .clear = e.clear};
        tr_watch_run(&w);
        printf("%s: layers: %d rows, worst %.4f; %d selections; %d routings, weights to %.4f\n",
               sets[s], w.n_hidden, w.worst_hidden, w.n_sets, w.n_routes, w.worst_weight);
        if (!(w.worst_hidden <= bound && w.worst_weight <= bound))
            fail_msg("%s: worst row %g, router weight %g", sets[s], w.worst_hidden, w.worst_weight);
        assert_true(w.n_hidden >= e.v.n_layers * e.v.n_trace / 2);
        assert_true(w.n_sets > 0 && w.n_routes > 0);
        engine_close(&e);
    }
}

static void test_layers_fp8(void **state)
{
    (void)state;
    layers(false, TR_E4M3, fp8_bound);
}

static void test_layers_bf16(void **state)
{
    (void)state;
    layers(true, TR_BF16, bf16_bound);
}

/* Layer 0's input is exact: index scores differ by the fp8 codes of queries and keys, and by bf16 before them. The bounds are
 * those of the CPU backend (test_model.c). */
static void test_index_scores(void **state)
{
    (void)state;
    for (int s = 0; s < N_SETS; s++) {
        engine e;
        engine_open(&e, sets[s], true, TR_E4M3);
        tr_watch w = {.v = &e.v,
                      .f = &e.f,
                      .prefix = "idxfp8.",
                      .only = 0,
                      .sets_only = true,
                      .set_margin = 0.1,
                      .clear = e.clear};
        tr_watch_run(&w);
        assert_true(w.n_sets > 0 && w.n_logit > 0);
        const double rms = sqrt(w.sum_logit / w.n_logit);
        printf("%s: %d index scores: %.4f standard deviations rms, %.4f at worst\n", sets[s],
               w.n_logit, rms, w.worst_logit);
        if (!(rms <= 0.03 && w.worst_logit <= 0.25))
            fail_msg("%s: index scores off by %g std rms, %g at worst", sets[s], rms,
                     w.worst_logit);
        engine_close(&e);
    }
}

/* ---- end to end ---------------------------------------------------------------------------------------------------- */

/* Final hidden states of the rows under `list` against the array `name`. From the second layer on a row sees keys of rows that may
 * have chosen otherwise, so here no choice is wrong: rows with other ones do not count. bound 0: see test_whole_mixed. */
static void whole(bool bf16_weights, tr_dtype cache, const char *prefix, const char *list,
                  double bound)
{
    for (int s = 0; s < N_SETS; s++) {
        engine e;
        char name[64];
        engine_open(&e, sets[s], bf16_weights, cache);
        tr_watch w = {.v = &e.v,
                      .f = &e.f,
                      .prefix = prefix,
                      .only = -1,
                      .routes = *prefix == '\0',
                      .set_margin = (double)INFINITY,
                      .route_margin = (double)INFINITY,
                      .keep_final = e.final,
                      .clear = e.clear};
        tr_watch_run(&w);
        snprintf(name, sizeof name, "%shidden.final", prefix);
        const tr_distance d = tr_vectors_distance(&e.v, name, list, e.final, e.clear);
        printf("%s: %s: %d rows, worst %.4f, rms %.4f\n", sets[s], name, d.n, d.worst, d.rms);
        if (bound > 0) {
            if (!(d.worst <= bound)) fail_msg("%s against %s: %g", sets[s], name, d.worst);
        } else {
            const tr_distance of = tr_vectors_emulated(&e.v, list);
            printf("%s: the emulation: %d rows, worst %.4f, rms %.4f\n", sets[s], of.n, of.worst,
                   of.rms);
            if (!(d.rms <= of.rms)) fail_msg("%s: rms %g, more than %g", sets[s], d.rms, of.rms);
        }
        engine_close(&e);
    }
}

/* Codes of weights, activations, index keys and latents: the emulation has them all. */
static void test_whole_fp8(void **state)
{
    (void)state;
    whole(false, TR_E4M3, "sim.", "sim_robust_rows", fp8_bound);
}

/* bf16 throughout, but for the index keys: a row that chooses as the exact reference does differs by bf16 alone. */
static void test_whole_bf16(void **state)
{
    (void)state;
    whole(true, TR_BF16, "", "robust_rows", bf16_bound);
}

/* Weights or cache in fp8 alone: no array is of that. What is rounded less must lie no further from the exact states than the
 * emulation of all of it does, in the mean of the rows. */
static void test_whole_mixed(void **state)
{
    (void)state;
    whole(false, TR_BF16, "", "robust_rows", 0);
    whole(true, TR_E4M3, "", "robust_rows", 0);
}

/* A longer sequence, several pages, whole and in chunks: the same bits. */
static void test_chunks(void **state)
{
    static const int chunks[] = {200, 64, 7, 1};
    static const tr_dtype caches[] = {TR_E4M3, TR_BF16};
    (void)state;
    for (int i = 0; i < N_SETS * 2; i++) {
        engine e;
        engine_open(&e, sets[i % N_SETS], false, caches[i / N_SETS]);
        const size_t n = (size_t)e.v.n_long, bytes = n * (size_t)e.v.n_hidden * sizeof(float);
        float *first = test_alloc(bytes, 1), *final = test_alloc(bytes, 1);
        int32_t *argmax = test_alloc(2 * n, sizeof *argmax);
        for (int c = 0; c < 4; c++) {
            tr_vectors_split(&e.f, c, e.v.longer, e.v.n_long, chunks[c], TR_FORM_AUTO,
                             c ? final : first, c ? argmax + n : argmax);
            if (c == 0) continue;
            if (memcmp(first, final, bytes) != 0)
                fail_msg("%s: chunks of %d differ", sets[i % N_SETS], chunks[c]);
            assert_memory_equal(argmax, argmax + n, n * sizeof *argmax);
        }
        free(first);
        free(final);
        free(argmax);
        engine_close(&e);
    }
}

/* ---- unit cases ---------------------------------------------------------------------------------------------------- */

static json_t *unit(const char *key)
{
    char path[512];
    json_t *all = tr_read_json(tr_vector_path(path, sizeof path, "model/unit.json"));
    json_t *c = json_incref(json_object_get(all, key));
    if (!c) fail_msg("unit.json: no %s", key);
    json_decref(all);
    return c;
}

static void fill(float *to, const json_t *numbers, size_t n)
{
    assert_int_equal(json_array_size(numbers), n);
    for (size_t i = 0; i < n; i++)
        to[i] = (float)json_number_value(json_array_get(numbers, i));
}

/* Rows of logits; experts and weights as the case has them. */
static void route(pair *p, const json_t *c, int n_rows, const float *logits, const float *bias,
                  int n_experts, const json_t *const experts[], const json_t *const weights[])
{
    const json_t *config = json_object_get(c, "config");
    struct tr_router_args a = {
        .n = word(p, n_rows),
        .n_max = n_rows,
        .n_experts = n_experts,
        .n_group = (int)json_integer_value(json_object_get(config, "n_group")),
        .topk_group = (int)json_integer_value(json_object_get(config, "topk_group")),
        .k = (int)json_integer_value(json_object_get(config, "num_experts_per_tok")),
        .norm_topk = json_is_true(json_object_get(config, "norm_topk_prob")),
        .logits = logits,
        .bias = bias,
        .scaling = (float)json_number_value(json_object_get(config, "routed_scaling_factor"))};
    int32_t *expert = array(p, (size_t)(n_rows * a.k) * 4);
    float *share = array(p, (size_t)(n_rows * a.k) * 4);
    assert_true(a.k > 0 && n_rows > 0);
    push(p);
    TWIN(p, a.n);
    TWIN(p, a.logits);
    TWIN(p, a.bias);
    a.expert = twin(p, expert);
    a.weight = twin(p, share);
    pair_ok(p, "router", p->g->router(p->gpu, TR_LANE_MAIN, &a));
    for (int r = 0; r < n_rows; r++) {
        double want[64];
        const int32_t *got = (const int32_t *)pull(p, expert) + r * a.k;
        assert_true(a.k <= 64 && json_array_size(experts[r]) == (size_t)a.k);
        for (int j = 0; j < a.k; j++) {
            assert_int_equal(got[j], json_integer_value(json_array_get(experts[r], (size_t)j)));
            want[j] = json_number_value(json_array_get(weights[r], (size_t)j));
        }
        test_close("router weights", (const float *)pull(p, share) + r * a.k, want, NULL, 1e-6,
                   (size_t)a.k);
    }
}

static void test_router(void **state)
{
    pair *p = *state;
    json_t *c = unit("router256");
    const json_t *logits = json_object_get(c, "logits"), *bias = json_object_get(c, "bias"),
                 *experts[8], *weights[8];
    const size_t n = json_array_size(logits), n_experts = json_array_size(bias);
    assert_true(n > 0 && n <= 8);
    float *x = array(p, n * n_experts * 4), *b = array(p, n_experts * 4);
    fill(b, bias, n_experts);
    for (size_t r = 0; r < n; r++) {
        fill(x + r * n_experts, json_array_get(logits, r), n_experts);
        experts[r] = json_array_get(json_object_get(c, "experts"), r);
        weights[r] = json_array_get(json_object_get(c, "weights"), r);
    }
    route(p, c, (int)n, x, b, (int)n_experts, experts, weights);
    json_decref(c);

    c = unit("router256_ties");
    fill(x, json_object_get(c, "logits"), n_experts);
    for (size_t i = 0; i < n_experts; i++)
        b[i] = (float)json_number_value(json_object_get(c, "bias_all"));
    experts[0] = json_object_get(c, "experts");
    weights[0] = json_object_get(c, "weights");
    route(p, c, 1, x, b, (int)n_experts, experts, weights);
    json_decref(c);
    pair_clear(p);
}

/* One row, at this position of its sequence, whose pages are these; it writes to cache row `write`. */
static tr_rows row_at(pair *p, int position, int64_t write, const int32_t *pages, int n_pages)
{
    tr_rows r = {.n_max = 1, .max_context = position + 1, .max_pages = n_pages};
    int64_t *to = array(p, sizeof *to);
    int32_t *table = array(p, (size_t)n_pages * sizeof *table);
    *to = write;
    memcpy(table, pages, (size_t)n_pages * sizeof *table);
    r.n = word(p, 1);
    r.token = word(p, 0);
    r.slot = word(p, 0);
    r.position = word(p, position);
    r.begin = word(p, 0);
    r.write = to;
    r.dense = array(p, 1);
    r.page_table = table;
    return r;
}

static void test_topk(void **state)
{
    static const int32_t pages[4] = {3, 0, 2, 1};
    enum { LD = 256 };
    pair *p = *state;
    json_t *cases = unit("topk"), *c;
    size_t i;
    assert_true(json_array_size(cases) > 0);
    json_array_foreach(cases, i, c)
    {
        const json_t *logits = json_object_get(c, "logits"),
                     *want = json_object_get(c, "sorted_positions");
        const size_t n = json_array_size(logits), n_want = json_array_size(want);
        const int k = (int)json_integer_value(json_object_get(c, "k"));
        const tr_rows rows = row_at(p, (int)n - 1, 0, pages, 4);
        float *score = array(p, LD * 4);
        int32_t *position = array(p, (size_t)k * 4), *cache_row = array(p, (size_t)k * 4),
                *n_selected = word(p, -7);
        assert_true(n > 0 && n <= LD && k > 0);
        fill(score, logits, n);
        push(p);
        const tr_rows there = twin_rows(p, &rows);
        pair_ok(p, "topk",
                p->g->topk(p->gpu, TR_LANE_MAIN,
                           &(struct tr_topk_args){.rows = &there,
                                                  .score = twin(p, score),
                                                  .ld = LD,
                                                  .k = k,
                                                  .n_row = 1,
                                                  .position = twin(p, position),
                                                  .cache_row = twin(p, cache_row),
                                                  .n_selected = twin(p, n_selected)}));
        assert_int_equal(*(const int32_t *)pull(p, n_selected), n_want);
        const int32_t *at = pull(p, position), *row = pull(p, cache_row);
        for (size_t j = 0; j < (size_t)k; j++) {
            const int s = j < n_want ? (int)json_integer_value(json_array_get(want, j)) : -1;
            assert_int_equal(at[j], s);
            assert_int_equal(row[j], s < 0 ? -1 : pages[s / 64] * 64 + s % 64);
        }
        pair_clear(p);
    }
    json_decref(cases);
}

/* With an input of ones, no epsilon and the latents as weights, the norm gives the latents themselves. */
static void test_kv656(void **state)
{
    static const int32_t pages[1] = {0};
    enum { D = 512, ROPE = 64, ROW = 5, BYTES = 656 };
    pair *p = *state;
    json_t *c = unit("kv656");
    const char *hex = json_string_value(json_object_get(c, "hex"));
    const tr_rows rows = row_at(p, 0, ROW, pages, 1);
    float *kv_a = acts(p, D + ROPE, 1), *norm = floats(p, D, 1), *table = floats(p, ROPE, 1);
    uint8_t *cache = array(p, TR_PAGE_TOKENS * BYTES);
    struct tr_kv_write_args a = {
        .ld_kv_a = D + ROPE, .kv = {.dtype = TR_E4M3, .n_pages = 1, .d_latent = D, .d_rope = ROPE}};
    fill(norm, json_object_get(c, "latent"), D);
    fill(kv_a + D, json_object_get(c, "k_rope"), ROPE);
    for (int i = 0; i < D; i++)
        kv_a[i] = 1.0f;
    for (int i = 0; i < ROPE; i++)
        table[i] = i % 2 ? 0.0f : 1.0f;
    memset(cache, 0xa5, TR_PAGE_TOKENS * BYTES);
    push(p);
    const tr_rows there = twin_rows(p, &rows);
    a.rows = &there;
    a.kv_a = twin(p, kv_a);
    a.norm = twin(p, norm);
    a.rope = twin(p, table);
    a.kv.latent = twin(p, cache);
    pair_ok(p, "kv_write", p->g->kv_write(p->gpu, TR_LANE_MAIN, &a));
    assert_true(hex && strlen(hex) == 2 * BYTES);
    for (int i = 0; i < BYTES; i++) {
        const char byte[3] = {hex[2 * i], hex[2 * i + 1], '\0'};
        cache[ROW * BYTES + i] = (uint8_t)strtoul(byte, NULL, 16);
    }
    same_bytes(p, "kv656", cache, TR_PAGE_TOKENS * BYTES);
    json_decref(c);
    pair_clear(p);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers_fp8),
        cmocka_unit_test(test_layers_bf16),
        cmocka_unit_test(test_index_scores),
        cmocka_unit_test(test_whole_fp8),
        cmocka_unit_test(test_whole_bf16),
        cmocka_unit_test(test_whole_mixed),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test_setup_teardown(test_router, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_topk, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_kv656, pair_open, pair_close),
    };
    return run_on_gpu(argc, argv, tests, sizeof tests / sizeof *tests);
}
