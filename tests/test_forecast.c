/* The times that `plan` tells against steps measured on H200s: a table of them, and how far from it the estimate may be. Rows that
 * its constants were taken from are marked; the others say what it is worth. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "model/estimate.h"
#include "tests/published_model.h"

typedef enum build {
    TODAY,   /* prompts expand their keys once, products per head and of bf16 rows in tiles */
    MORNING, /* kernels that come in beside the one in front of them, sums over peer memory */
    EARLIER, /* before those */
} build;

typedef struct measured {
    build build;
    bool fitted;        /* a constant was taken from this row */
    tr_grid_sizes grid; /* pp dp cp tp mdp ep xt */
    int layers;         /* one of them dense */
    bool prefill;
    int rows; /* of a replica */
    int64_t context;
    double ms; /* median of `bench step` */
} measured;

/* clang-format off */
#define ONE {1, 1, 1, 1, 1, 1, 1}
#define TP2 {1, 1, 1, 2, 1, 2, 1}
#define TP4 {1, 1, 1, 4, 1, 4, 1}
#define TP2_SLICED {1, 1, 1, 2, 1, 1, 2}
#define TP4_SLICED {1, 1, 1, 4, 1, 1, 4}
#define DP2 {1, 2, 1, 1, 1, 2, 1}
#define CP2 {1, 1, 2, 1, 1, 2, 1}
#define DP4 {1, 4, 1, 1, 1, 4, 1}
#define CP4 {1, 1, 4, 1, 1, 4, 1}

/* 2026-11-22, H200s of one host, CUDA 13.0, NCCL 2.28.3: trireme bench step --device cuda --load-format dummy --override
 * num_hidden_layers=N --override first_k_dense_replace=1 (BENCHMARKS.md has the whole commands). */
static const measured table[] = {
    {TODAY, true,  ONE, 3, false,  1,   4096,  1.151},
    {TODAY, true,  ONE, 3, false,  1,   8192,  1.144},
    {TODAY, false, ONE, 3, false,  1, 131072,  1.174},
    {TODAY, false, ONE, 3, false,  8,   1024,  2.112},
    {TODAY, false, ONE, 3, false, 32,   1024,  4.497},
    {TODAY, false, ONE, 3, false, 64,   1024,  5.813},
    {TODAY, false, ONE, 3, false,  8,   8192,  2.262},
    {TODAY, false, ONE, 3, false, 16,   8192,  3.275},
    {TODAY, false, ONE, 3, false, 32,   8192,  4.786},
    {TODAY, false, ONE, 3, false, 64,   8192,  6.124},
    {TODAY, false, ONE, 3, false,  8,  32768,  2.291},
    {TODAY, false, ONE, 3, false, 32,  32768,  4.878},
    {TODAY, true,  ONE, 3, false, 64,  32768,  6.305},
    {TODAY, false, ONE, 5, false,  1,   8192,  1.603},
    {TODAY, false, ONE, 5, false, 16,   8192,  5.793},
    {TODAY, false, ONE, 5, false, 64,   8192, 11.172},
    {TODAY, false, ONE, 3, true,  512,     0,  7.595},
    {TODAY, false, ONE, 3, true, 2048,     0, 13.870},
    {TODAY, false, ONE, 3, true, 8192,     0, 67.128},
    {TODAY, true,  ONE, 3, true, 4096, 32768, 42.854},
    {TODAY, false, ONE, 5, true, 4096, 32768, 72.014},
    {TODAY, false, TP2_SLICED, 3, false,  1, 8192, 0.851},
    {TODAY, false, TP2_SLICED, 5, false,  1, 8192, 1.234},
    {TODAY, false, TP2_SLICED, 3, false, 16, 8192, 2.160},
    {TODAY, false, TP2_SLICED, 5, false, 16, 8192, 3.757},
    {TODAY, false, TP2_SLICED, 3, false, 64, 8192, 3.785},
    {TODAY, false, TP2_SLICED, 5, false, 64, 8192, 6.808},
    {TODAY, false, TP2_SLICED, 3, true, 4096, 32768, 25.783},
    {TODAY, false, TP2_SLICED, 5, true, 4096, 32768, 44.361},
    {TODAY, false, DP2, 3, false,  1, 8192, 1.287},
    {TODAY, false, DP2, 5, false,  1, 8192, 1.882},
    {TODAY, false, DP2, 3, false, 16, 8192, 3.035},
    {TODAY, false, DP2, 5, false, 16, 8192, 5.248},
    {TODAY, false, DP2, 3, false, 64, 8192, 4.234},
    {TODAY, false, DP2, 5, false, 64, 8192, 7.562},
    {TODAY, false, DP2, 3, true, 4096, 32768, 46.422},
    {TODAY, false, DP2, 5, true, 4096, 32768, 80.541},
    {TODAY, false, CP2, 3, false,  1, 8192, 1.143},
    {TODAY, false, CP2, 5, false,  1, 8192, 1.609},
    {TODAY, false, CP2, 3, true, 8192, 32768, 45.201},
    {TODAY, false, CP2, 5, true, 8192, 32768, 77.282},

    {MORNING, true,  ONE, 3, false,  1,   4096,  1.163},
    {MORNING, true,  ONE, 3, false,  1,   8192,  1.164},
    {MORNING, false, ONE, 3, false,  1, 131072,  1.192},
    {MORNING, false, ONE, 3, false,  8,   1024,  2.150},
    {MORNING, false, ONE, 3, false, 32,   1024,  4.955},
    {MORNING, false, ONE, 3, false, 64,   1024,  6.396},
    {MORNING, false, ONE, 3, false,  8,  32768,  2.322},
    {MORNING, false, ONE, 3, false, 32,  32768,  5.260},
    {MORNING, true,  ONE, 3, false, 64,  32768,  6.916},
    {MORNING, false, ONE, 3, true,  512,     0,  7.636},
    {MORNING, false, ONE, 3, true, 2048,     0, 13.496},
    {MORNING, false, ONE, 3, true,  512, 32768, 11.090},
    {MORNING, false, ONE, 3, true, 2048, 32768, 26.992},
    {MORNING, true,  ONE, 3, true, 4096, 32768, 49.485},

    {EARLIER, true,  ONE, 3, false,  1, 8192,  1.582},
    {EARLIER, true,  ONE, 5, false,  1, 8192,  2.269},
    {EARLIER, false, ONE, 3, false, 16, 8192,  3.763},
    {EARLIER, false, ONE, 5, false, 16, 8192,  6.394},
    {EARLIER, false, ONE, 3, false, 64, 8192,  6.848},
    {EARLIER, false, ONE, 5, false, 64, 8192, 12.083},
    {EARLIER, false, TP2, 3, false,  1, 8192,  1.288},
    {EARLIER, false, TP2_SLICED, 3, false,  1, 8192, 1.300},
    {EARLIER, false, TP2_SLICED, 3, false, 16, 8192, 2.540},
    {EARLIER, false, TP2_SLICED, 3, false, 64, 8192, 4.337},
    {EARLIER, false, TP4, 3, false,  1, 8192,  0.972},
    {EARLIER, false, TP4, 3, false, 16, 8192,  1.698},
    {EARLIER, false, TP4, 3, false, 64, 8192,  3.013},
    {EARLIER, false, TP4_SLICED, 3, false,  1, 8192, 1.037},
    {EARLIER, false, TP4_SLICED, 5, false,  1, 8192, 1.577},
    {EARLIER, false, TP4_SLICED, 3, false, 16, 8192, 1.669},
    {EARLIER, false, TP4_SLICED, 5, false, 16, 8192, 2.794},
    {EARLIER, false, TP4_SLICED, 3, false, 64, 8192, 2.998},
    {EARLIER, false, TP4_SLICED, 5, false, 64, 8192, 5.188},
    {EARLIER, false, CP4, 3, false,  1, 8192,  1.514},
    {EARLIER, false, CP4, 5, false,  1, 8192,  2.110},
    {EARLIER, false, DP4, 3, false,  1, 8192,  1.721},
    {EARLIER, false, DP4, 5, false,  1, 8192,  2.533},
    {EARLIER, false, DP4, 3, false, 16, 8192,  3.005},
    {EARLIER, false, DP4, 5, false, 16, 8192,  4.911},
    {EARLIER, false, DP4, 3, false, 64, 8192,  3.868},
    {EARLIER, false, DP4, 5, false, 64, 8192,  6.226},
    {EARLIER, false, ONE, 3, true,  4096, 32768, 50.144},
    {EARLIER, false, TP2, 3, true,  4096, 32768, 29.352},
    {EARLIER, false, TP4, 3, true,  4096, 32768, 24.521},
    {EARLIER, false, DP4, 3, true,  4096, 32768, 57.482},
    {EARLIER, false, CP4, 3, true, 16384, 32768, 54.378},
};
/* clang-format on */
enum { N_TABLE = sizeof table / sizeof *table };

/* What the kernels of the morning differ in (BENCHMARKS.md). Of the earlier build one GPU tells what a kernel and a step cost beside bytes and flops (the fitted rows); what several GPUs make of
 * the same kernels is not fitted. */
static tr_rates rates_of(build b)
{
    tr_rates r = *tr_rates_find("h200");
    if (b == TODAY) return r;
    r.stream = 4.0e12;
    r.rows = 1.3e12;
    r.heads = 190e12;
    r.plain = 120e12;
    r.plain_latency = 36e-6;
    r.mla_prefill = 385e12;
    if (b == MORNING) return r;
    r.kernel_latency = 8.2e-6;
    r.step_latency = 100e-6;
    r.peer_rows = 0;
    return r;
}

static double ms_of(const measured *m, const tr_rates *r)
{
    tr_config c = real; /* of whose layers a test has fewer, one of them dense */
    c.first_k_dense_replace = 1;
    c.num_nextn_predict_layers = 0;
    const tr_wire w = tr_wire_gpu(&c, TR_E4M3);
    const tr_step_shape step = {.prefill = m->prefill,
                                .rows = m->rows,
                                .context = m->context,
                                .sampled = m->prefill ? 1 : m->rows};
    c.num_hidden_layers = m->layers;
    return 1e3 * (tr_estimate_layer_seconds(&c, &m->grid, &w, r, &step, false) +
                  (m->layers - 1) * tr_estimate_layer_seconds(&c, &m->grid, &w, r, &step, true) +
                  tr_estimate_head_seconds(&c, &m->grid, &w, r, &step));
}

/* With --print, the table. */
static void print_row(const measured *m, double ms)
{
    const tr_grid_sizes *g = &m->grid;
    printf(
        "%-8s%s tp %d dp %d cp %d ep %d moe-tp %d, %d layers, %s %5d at %6jd: %8.3f ms measured, "
        "%8.3f estimated, %.2f\n",
        m->build == TODAY     ? "today"
        : m->build == MORNING ? "morning"
                              : "earlier",
        m->fitted ? "*" : " ", g->tp, g->dp, g->cp, g->ep, g->xt, m->layers,
        m->prefill ? "prefill" : "decode ", m->rows, (intmax_t)m->context, m->ms, ms, ms / m->ms);
}

/* "Predictions of plan within 20% of what was measured." */
static void estimates_are_near(void **state)
{
    (void)state;
    for (int i = 0; i < N_TABLE; i++) {
        const measured *m = &table[i];
        const tr_rates r = rates_of(m->build);
        const double ms = ms_of(m, &r), most = m->fitted ? 1.10 : 1.20;
        if (ms > m->ms * most || ms < m->ms / most)
            fail_msg(
                "row %d, %s %d at %jd, tp %d dp %d cp %d: %.3f ms was measured, %.3f estimated", i,
                m->prefill ? "prefill" : "decode", m->rows, (intmax_t)m->context, m->grid.tp,
                m->grid.dp, m->grid.cp, m->ms, ms);
    }
}

/* Nothing that was measured, and no estimate, is faster than the roofline. */
static void roofline_is_below(void **state)
{
    const tr_rates *bound = tr_rates_bound("h200");
    (void)state;
    assert_null(tr_rates_bound("abacus"));
    assert_non_null(bound);
    for (int i = 0; i < N_TABLE; i++) {
        const double least = ms_of(&table[i], bound);
        const tr_rates r = rates_of(table[i].build);
        assert_true(least > 0.1 * table[i].ms && least < table[i].ms);
        assert_true(least < ms_of(&table[i], &r));
    }
}

/* What the terms are for: each of them makes a step longer, and none of them is all of it. */
static void terms_count(void **state)
{
    const tr_rates *h200 = tr_rates_find("h200");
    const measured few = {.grid = TP4, .layers = 5, .rows = 1, .context = 8192},
                   many = {.grid = DP4, .layers = 5, .rows = 64, .context = 8192},
                   prompt = {
                       .grid = CP4, .layers = 5, .prefill = true, .rows = 16384, .context = 32768};
    tr_rates r = *h200;
    (void)state;
    r.kernel_latency = 0;
    assert_true(ms_of(&few, &r) < 0.8 * ms_of(&few, h200));
    assert_true(ms_of(&prompt, &r) >
                0.98 * ms_of(&prompt, h200)); /* launches are lost in large kernels */
    r = *h200;
    r.peer_rows = 0; /* the library's sums: two a layer */
    assert_true(ms_of(&few, &r) > ms_of(&few, h200) + 10 * 0.010);
    assert_true(ms_of(&many, &r) == ms_of(&many, h200)); /* no sums over heads there */
    r = *h200;
    r.unhidden = 1.0;
    assert_true(ms_of(&prompt, &r) > ms_of(&prompt, h200) && ms_of(&few, &r) == ms_of(&few, h200));
    r = *h200;
    r.link = 0.5 * h200->link;
    assert_true(ms_of(&many, &r) > ms_of(&many, h200) && ms_of(&prompt, &r) > ms_of(&prompt, h200));
}

/* Of one token's 8 experts, spread over four ranks, the busiest rank has more than two; sliced, every rank has a quarter of all. */
static void spread_experts_are_uneven(void **state)
{
    const tr_rates *r = tr_rates_find("h200");
    const measured
        spread = {.grid = TP4, .layers = 5, .rows = 1, .context = 8192},
        sliced = {.grid = TP4_SLICED, .layers = 5, .rows = 1, .context = 8192},
        spread_all = {.grid = TP4, .layers = 5, .prefill = true, .rows = 4096, .context = 8192},
        sliced_all = {
            .grid = TP4_SLICED, .layers = 5, .prefill = true, .rows = 4096, .context = 8192};
    (void)state;
    /* 44 MB an expert: 1 to 2 of them more in each of four layers, 11 us each */
    const double more = ms_of(&spread, r) - ms_of(&sliced, r);
    assert_true(more > 4 * 0.011 && more < 4 * 2 * 0.011);
    /* With all experts at work every rank has a quarter of the work either way, but of slices every rank takes all rows. */
    const double rows_more = ms_of(&sliced_all, r) / ms_of(&spread_all, r);
    assert_true(rows_more > 1.0 && rows_more < 1.1);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(estimates_are_near),
        cmocka_unit_test(roofline_is_below),
        cmocka_unit_test(terms_count),
        cmocka_unit_test(spread_experts_are_uneven),
    };
    if (argc > 1 && strcmp(argv[1], "--print") == 0)
        for (int i = 0; i < N_TABLE; i++) {
            const tr_rates r = rates_of(table[i].build);
            print_row(&table[i], ms_of(&table[i], &r));
        }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
