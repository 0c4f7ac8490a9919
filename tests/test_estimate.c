/* Predicted bytes and times against the tables and examples of parallel.md 0, 1.4, 2 and 3, and the cut into stages. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "model/estimate.h"
#include "tests/published_model.h"

static tr_weight_bytes weights_of(const tr_config *c, tr_grid_sizes n, int rank, tr_slice *slice)
{
    tr_weight_bytes w;
    tr_grid g;
    tr_err err = {0};
    if (tr_grid_make(&g, n, rank, n.pp * n.dp * n.cp * n.tp, &err) != TR_OK ||
        tr_slice_make(slice, c, &g, &err) != TR_OK)
        fail_msg("%s", err.text);
    tr_estimate_weights(&w, c, slice);
    return w;
}

static void assert_near(double got, double want, double slack)
{
    if (fabs(got - want) > slack) fail_msg("%.6g is not %.6g within %.2g", got, want, slack);
}

static const double GB = 1e9;

/* The table of parallel.md 1.4. It has no MTP layer and counts each matrix once (so w.mtp and w.second_form are left out
 * here). Its vocabulary column assumes embedding and head cut over 8 in the first two rows, and whole in the others; here
 * the embedding is whole and the head is cut over tp (slice.h), so that column is computed with the table's assumption. */
static void resident_weights(void **state)
{
    static const struct {
        tr_grid_sizes n;
        int vocabs;
        double attention, moe, vocab, total;
    } c[] = {
        {{1, 1, 1, 8, 1, 8, 1}, 8, 3.1, 82.4, 0.5, 86.0},
        {{1, 1, 1, 8, 1, 1, 8}, 8, 3.1, 82.4, 0.5, 86.0},
        {{1, 8, 1, 1, 1, 8, 1}, 8, 12.3, 85.7, 0.5, 98.5},
        {{1, 16, 1, 1, 1, 16, 1}, 1, 12.3, 44.8, 3.7, 60.8},
        {{1, 32, 1, 1, 1, 32, 1}, 1, 12.3, 24.4, 3.7, 40.4},
    };
    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        tr_slice s;
        tr_weight_bytes w = weights_of(&real, c[i].n, 3, &s);
        double attention = (double)w.attention / GB,
               moe = (double)(w.dense + w.shared + w.routed + w.router) / GB;
        double vocab = 2 * 2.0 * real.vocab_size * real.hidden_size / c[i].vocabs / GB;
        assert_near(attention, c[i].attention, 0.051);
        assert_near(moe, c[i].moe, 0.051);
        assert_near(vocab, c[i].vocab, 0.051);
        /* The table adds rounded columns. */
        assert_near(attention + moe + vocab, c[i].total, 0.08);
        /* And as it is here. */
        assert_near((double)w.embed / GB, 1.8534, 0.0001);
        assert_near((double)w.head / GB, 1.8534 / c[i].n.tp, 0.0001);
        assert_int_equal(tr_weight_bytes_total(&w), w.attention + w.dense + w.shared + w.routed +
                                                        w.router + w.embed + w.head + w.mtp +
                                                        w.second_form);
    }
}

/* "Weights per layer: split part of attention 171.97 M, replicated 15.14 M, indexer 13.96 M, one expert 44.04 M, dense MLP
 * 396.4 M" (numbers, not bytes: the scales and bf16 matrices are taken off). */
static void weights_per_layer(void **state)
{
    tr_config c = real;
    tr_slice s;
    (void)state;
    c.num_hidden_layers = 4;
    c.num_nextn_predict_layers = 0;
    tr_weight_bytes one = weights_of(&c, (tr_grid_sizes){1, 1, 1, 1, 1, 1, 1}, 0, &s);
    tr_weight_bytes two = weights_of(&c, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1}, 0, &s);
    const double scales = 1 + 4.0 / 16384;
    assert_int_equal(one.mtp, 0);
    assert_near(2.0 * (double)(one.attention - two.attention) / 4 / scales, 171.97e6, 0.01e6);
    /* What stays: replicated part and indexer, 64 x 7168 of which in bf16, and norms. */
    assert_near((double)(2 * two.attention - one.attention) / 4 / scales,
                15.14e6 + 13.96e6 + 64 * 7168, 0.1e6);
    assert_near((double)one.routed / 256 / scales, 44.04e6, 0.01e6);
    assert_near((double)one.dense / 3 / scales, 396.4e6, 0.1e6);
    assert_int_equal(one.second_form, 4 * (128 * 128 * 512 + 4 * 128 * 4));
}

static void only_the_ends_have_the_vocabulary(void **state)
{
    tr_slice s;
    (void)state;
    for (int pp = 0; pp < 4; pp++) {
        tr_weight_bytes w = weights_of(&real, (tr_grid_sizes){4, 1, 1, 8, 1, 8, 1}, pp * 8, &s);
        assert_int_equal(w.embed > 0, pp == 0);
        assert_int_equal(w.head > 0, pp == 3);
        assert_int_equal(w.mtp > 0, pp == 3);
        assert_int_equal(w.dense > 0, pp == 0);
        if (pp == 3) assert_true(w.mtp > 1853000000u + w.routed / 13); /* with its own embedding */
    }
    /* Without FP8 the matrices take two bytes. */
    tr_config c = real;
    c.fp8 = false;
    tr_weight_bytes w = weights_of(&c, (tr_grid_sizes){1, 1, 1, 8, 1, 8, 1}, 0, &s);
    assert_int_equal(w.routed, 58ull * 32 * 3 * 2048 * 7168 * 2);
}

static void cache_of_a_token(void **state)
{
    tr_slice s;
    (void)state;
    weights_of(&real, (tr_grid_sizes){1, 1, 1, 1, 1, 1, 1}, 0, &s);
    assert_int_equal(tr_estimate_cache_bytes(&real, &s, TR_E4M3), 48068);
    assert_int_equal(tr_estimate_cache_bytes(&real, &s, TR_BF16), 78324);
    /* Rows cost the same each, once the buffer of logits has reached its bound. */
    uint64_t w[3];
    for (int i = 0; i < 3; i++)
        w[i] = tr_estimate_workspace(&real, &s, 1024 << i, 4096, 2);
    assert_int_equal(w[2] - w[1], 2 * (w[1] - w[0]));
    assert_true((w[1] - w[0]) / 1024 > 2 * (3 + 8) * 7168); /* hidden rows, and experts' results */
    assert_true(tr_estimate_workspace(&real, &s, 4096, 4096, 4) > w[2]);
}

/* ---- traffic -------------------------------------------------------------------------------------------------------- */

static const tr_traffic *find(const tr_traffic *t, int n, const char *what)
{
    for (int i = 0; i < n; i++)
        if (strcmp(t[i].what, what) == 0) return &t[i];
    return NULL;
}

static double sum_sent(const tr_traffic *t, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += t[i].sent;
    return sum;
}

static int layer_traffic(tr_traffic *t, tr_grid_sizes n, tr_step_shape step, tr_moe_form form)
{
    tr_wire w = tr_wire_gpu(&real, TR_E4M3);
    return tr_estimate_layer_traffic(t, &real, &n, &w, &step, form, true);
}

/* "Examples at n = 8: A 50 176 B per token, D (EP8) 69 kB" (2.7); dispatch 23.5 kB, combine 45.5 kB (2.4). */
static void examples_per_token(void **state)
{
    const tr_step_shape step = {.rows = 1000, .context = 4096, .sampled = 8};
    tr_traffic t[TR_TRAFFIC_MAX];
    (void)state;
    int n = layer_traffic(t, (tr_grid_sizes){1, 1, 1, 8, 1, 8, 1}, step, TR_MOE_FORM_AUTO);
    assert_int_equal(n, 2);
    assert_near(sum_sent(t, n) / 1000, 50176, 0.01);
    assert_int_equal(t[0].group, TR_GROUP_ATTN_TP);
    assert_true(t[0].given == 1000.0 * 14336);

    n = layer_traffic(t, (tr_grid_sizes){1, 8, 1, 1, 1, 8, 1}, step, TR_MOE_FORM_EXCHANGE);
    assert_int_equal(n, 2);
    /* 7392 + 48 bytes out; 3.63 is the rounded D(8). */
    assert_near(t[0].sent / 1000, 3.63 * 7 / 8 * 7440, 30);
    assert_near(t[0].sent / 1000, 23.5e3, 200);
    assert_near(t[1].sent / 1000, 45.5e3, 100);
    assert_near(sum_sent(t, n) / 1000, 69e3, 300);

    /* C, exact counts: (S-1) t h sent and f(S) sum(t) h back. */
    n = layer_traffic(t, (tr_grid_sizes){1, 8, 1, 1, 1, 8, 1}, step, TR_MOE_FORM_GATHER);
    assert_int_equal(n, 2);
    assert_near(t[0].sent, 7 * 1000.0 * 7440, 0.1);
    assert_near(t[1].sent, 7.0 / 8 * 8000 * 14336, 0.1);
    assert_near(t[1].given, 8 * 1000.0 * 14336, 0.1);
}

/* The table of 2.4. */
static void distinct_ranks(void **state)
{
    static const double want[][2] = {{2, 1.93},  {4, 2.93},  {8, 3.63},   {16, 5.34},
                                     {32, 6.60}, {64, 7.36}, {128, 7.78}, {256, 8.00}};
    (void)state;
    assert_near(tr_estimate_distinct(&real, 1), 1.0, 1e-9);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        assert_near(tr_estimate_distinct(&real, (int)want[i][0]), want[i][1], 0.0051);
}

/* Index keys and latents: f(C) N' (132 + 656) per rank (2.7); nothing of it in decode. */
static void context_parallel(void **state)
{
    const tr_grid_sizes n = {1, 1, 8, 1, 1, 8, 1};
    tr_step_shape step = {.prefill = true, .rows = 4093, .context = 0, .sampled = 1};
    tr_traffic t[TR_TRAFFIC_MAX];
    (void)state;
    int k = layer_traffic(t, n, step, TR_MOE_FORM_EXCHANGE);
    assert_int_equal(tr_step_rows(&n, &step), 512);
    assert_near(find(t, k, "index keys")->sent, 7.0 / 8 * 4096 * 132, 0.1);
    assert_near(find(t, k, "latents")->sent, 7.0 / 8 * 4096 * 656, 0.1);
    assert_int_equal(find(t, k, "latents")->group, TR_GROUP_ATTN_CP);
    assert_null(find(t, k, "o_proj"));
    assert_int_equal(tr_estimate_expert_rows(&n, &step), 4096);
    step.prefill = false;
    step.rows = 64;
    k = layer_traffic(t, n, step, TR_MOE_FORM_AUTO);
    assert_int_equal(k,
                     1); /* all ranks have the same rows: only sums travel, every member's to all */
    assert_int_equal(t[0].op, TR_WIRE_ALL_GATHER);
    assert_near(t[0].sent, 7.0 * 64 * 14336, 0.1);
    k = layer_traffic(t, n, step, TR_MOE_FORM_EXCHANGE);
    assert_int_equal(k, 2);
    assert_near(t[1].sent, 7.0 / 8 * 64 * tr_estimate_distinct(&real, 8) * 14336, 0.1);
    step.rows = 300; /* too many for that */
    k = layer_traffic(t, n, step, TR_MOE_FORM_AUTO);
    assert_int_equal(t[0].op, TR_WIRE_ALL_TO_ALL);
    step.rows = 64;
    assert_int_equal(tr_estimate_expert_rows(&n, &step), 64);
}

/* dp 2, tp 4: rows are shared by four, each brings a quarter and they tell each other afterwards; f32 on the CPU. */
static void shared_rows(void **state)
{
    const tr_grid_sizes n = {2, 2, 1, 4, 1, 8, 1};
    const tr_step_shape step = {.rows = 10, .context = 100, .sampled = 10};
    tr_wire w = tr_wire_cpu(&real, TR_F32);
    tr_traffic t[TR_TRAFFIC_MAX];
    (void)state;
    int k = tr_estimate_layer_traffic(t, &real, &n, &w, &step, TR_MOE_FORM_GATHER, true);
    assert_near(find(t, k, "o_proj")->given, 10 * 4 * 7168, 0.1);
    assert_near(find(t, k, "rows to the experts")->given, 3 * (4 * 7168 + 64), 0.1);
    assert_near(find(t, k, "sums back")->given, 8 * 3 * 4 * 7168, 0.1);
    assert_near(find(t, k, "rows to those who share them")->given, 3 * 4 * 7168, 0.1);
    assert_int_equal(find(t, k, "rows to those who share them")->n, 4);
    /* The shared expert is cut over tp; its sum is no part of the experts'. */
    assert_near(find(t, k, "shared expert")->given, 10 * 4 * 7168, 0.1);
    assert_int_equal(tr_estimate_expert_rows(&n, &step), 20);
    /* A dense layer: its width is cut over tp. */
    k = tr_estimate_layer_traffic(t, &real, &n, &w, &step, TR_MOE_FORM_AUTO, false);
    assert_int_equal(k, 2);
    assert_near(find(t, k, "dense MLP")->given, 10 * 4 * 7168, 0.1);
    k = tr_estimate_step_traffic(t, &real, &n, &w, &step);
    assert_near(find(t, k, "to the next stage")->sent, 3 * 4 * 7168, 0.1);
    assert_near(find(t, k, "behind the boundary")->sent, 3 * 3 * 4 * 7168, 0.1);
    assert_near(find(t, k, "greedy token")->given, 80, 0.1);
    /* One rank sends nothing. */
    const tr_grid_sizes one = {1, 1, 1, 1, 1, 1, 1};
    assert_int_equal(tr_estimate_layer_traffic(t, &real, &one, &w, &step, TR_MOE_FORM_AUTO, true),
                     0);
    assert_int_equal(tr_estimate_step_traffic(t, &real, &one, &w, &step), 0);
}

/* No grid has more collectives in a layer than there is room for. */
static void room_for_all(void **state)
{
    (void)state;
    for (int dp = 1; dp <= 4; dp++)
        for (int cp = 1; cp <= 4; cp++)
            for (int tp = 1; tp <= 4; tp *= 2)
                for (int xt = 1; xt <= 2; xt++)
                    for (int prefill = 0; prefill < 2; prefill++)
                        for (int form = 0; form < 4; form++) {
                            tr_grid_sizes n = {2, dp, cp, tp, 1, dp * cp * tp / xt, xt};
                            if (n.ep * xt != dp * cp * tp) continue;
                            tr_step_shape s = {prefill, 100, 1000, 10};
                            tr_wire w = tr_wire_cpu(&real, TR_E4M3);
                            tr_traffic t[TR_TRAFFIC_MAX];
                            int k = tr_estimate_layer_traffic(t, &real, &n, &w, &s,
                                                              (tr_moe_form)form, true);
                            assert_in_range(k, 0, TR_TRAFFIC_MAX);
                            for (int i = 0; i < k; i++)
                                assert_true(t[i].n > 1 && t[i].given > 0 && t[i].sent > 0);
                        }
}

/* ---- time ----------------------------------------------------------------------------------------------------------- */

static void times_are_plausible(void **state)
{
    const tr_grid_sizes tp8 = {1, 1, 1, 8, 1, 8, 1}, cp8 = {1, 1, 8, 1, 1, 8, 1};
    const tr_rates *r = tr_rates_find("h200");
    const tr_wire w = tr_wire_gpu(&real, TR_E4M3);
    tr_step_shape step = {.rows = 1, .context = 1000, .sampled = 1};
    (void)state;
    assert_null(tr_rates_find("abacus"));
    assert_non_null(r);
    double one = tr_estimate_layer_seconds(&real, &tp8, &w, r, &step, true);
    assert_true(one > 15 * 2.5e-6 && one < 400e-6);
    /* All of a rank's 32 experts are hit: 1.41 GB of them, 294 us at 4.8 TB/s (kernels.md 4.5). */
    step.rows = 512;
    double many = tr_estimate_layer_seconds(&real, &tp8, &w, r, &step, true);
    assert_true(many > one + 250e-6);
    /* More rows and more context never take less. */
    for (int prefill = 0; prefill < 2; prefill++) {
        double before = 0;
        for (int64_t context = 0; context <= 131072; context = 2 * context + 1024) {
            tr_step_shape s = {prefill, 256, context, 256};
            double t = tr_estimate_layer_seconds(&real, &tp8, &w, r, &s, true);
            if (context > 2048) assert_true(t >= before); /* the dense path below is another one */
            before = t;
        }
    }
    /* What CP is for: a long prompt's scores are shared, under TP every rank makes all of them. */
    step = (tr_step_shape){.prefill = true, .rows = 8192, .context = 131072 - 8192, .sampled = 1};
    assert_true(tr_estimate_layer_seconds(&real, &cp8, &w, r, &step, true) <
                0.5 * tr_estimate_layer_seconds(&real, &tp8, &w, r, &step, true));
    assert_true(tr_estimate_head_seconds(&real, &tp8, &w, r, &step) > 50e-6);
}

static void nodes(void **state)
{
    tr_grid g;
    (void)state;
    assert_int_equal(tr_grid_make(&g, (tr_grid_sizes){2, 1, 1, 8, 1, 8, 1}, 3, 16, NULL), TR_OK);
    assert_false(tr_crosses_nodes(&g, TR_GROUP_ATTN_TP, 8));
    assert_true(tr_crosses_nodes(&g, TR_GROUP_PP, 8));
    assert_true(tr_crosses_nodes(&g, TR_GROUP_ATTN_TP, 4));
    assert_false(tr_crosses_nodes(&g, TR_GROUP_ATTN_CP, 1)); /* alone */
    /* By counting, over grids that fit the nodes and grids that do not. */
    for (int cp = 1; cp <= 6; cp++)
        for (int tp = 1; tp <= 6; tp++)
            for (int pp = 1; pp <= 3; pp++)
                for (int group = 0; group < TR_N_GROUPS; group++) {
                    tr_grid_sizes z = {pp, 1, cp, tp, 1, cp * tp, 1};
                    bool crosses = false;
                    for (int w = 0; w < pp * cp * tp; w++) {
                        assert_int_equal(tr_grid_make(&g, z, w, pp * cp * tp, NULL), TR_OK);
                        for (int i = 0; i < tr_grid_group_size(&g, (tr_grid_group)group); i++)
                            crosses |= tr_grid_member(&g, (tr_grid_group)group, i) / 8 != w / 8;
                    }
                    assert_int_equal(tr_grid_make(&g, z, 0, pp * cp * tp, NULL), TR_OK);
                    assert_int_equal(tr_crosses_nodes(&g, (tr_grid_group)group, 8), crosses);
                }
}

static void stages(void **state)
{
    int layers[64];
    (void)state;
    for (int pp = 1; pp <= 61; pp++) {
        int sum = 0;
        tr_estimate_stages(&real, &(tr_grid_sizes){pp, 1, 1, 8, 1, 8, 1}, layers);
        for (int i = 0; i < pp; i++) {
            assert_true(layers[i] >= 1);
            sum += layers[i];
        }
        assert_int_equal(sum, 61);
        /* No stage is longer than an even cut needs by more than what the dense layers weigh less, three at most. */
        for (int i = 0; i < pp; i++)
            assert_true(layers[i] <= (61 + pp - 1) / pp + 3);
    }
    tr_estimate_stages(&real, &(tr_grid_sizes){4, 1, 1, 8, 1, 8, 1}, layers);
    assert_true(layers[0] >= layers[3]); /* light layers in front, the head at the end */
    tr_config c = real;
    c.num_hidden_layers = 5;
    tr_estimate_stages(&c, &(tr_grid_sizes){5, 1, 1, 1, 1, 1, 1}, layers);
    for (int i = 0; i < 5; i++)
        assert_int_equal(layers[i], 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resident_weights),
        cmocka_unit_test(weights_per_layer),
        cmocka_unit_test(only_the_ends_have_the_vocabulary),
        cmocka_unit_test(cache_of_a_token),
        cmocka_unit_test(examples_per_token),
        cmocka_unit_test(distinct_ranks),
        cmocka_unit_test(context_parallel),
        cmocka_unit_test(shared_rows),
        cmocka_unit_test(room_for_all),
        cmocka_unit_test(times_are_plausible),
        cmocka_unit_test(nodes),
        cmocka_unit_test(stages),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
