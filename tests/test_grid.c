/* The process grid: every grid of up to 24 ranks, broken ones, and the layers of stages. */
#include <config.h>

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "mpi/grid.h"

/* Both views name the same rank, and every coordinate is taken once. */
static void check_grid(tr_grid_sizes z)
{
    int world = z.pp * z.dp * z.cp * z.tp, width = world / z.pp;

    for (int w = 0; w < world; w++) {
        tr_grid g;
        tr_err err = {0};
        if (tr_grid_make(&g, z, w, world, &err) != TR_OK) fail_msg("%s", err.text);
        assert_int_equal(g.rank, w);
        assert_int_equal(g.world, world);
        assert_memory_equal(&g.size, &z, sizeof z);
        assert_int_equal(w, g.at.pp * width + (g.at.dp * z.cp + g.at.cp) * z.tp + g.at.tp);
        assert_int_equal(w, g.at.pp * width + (g.at.mdp * z.ep + g.at.ep) * z.xt + g.at.xt);
        assert_in_range(g.at.pp, 0, z.pp - 1);
        assert_in_range(g.at.dp, 0, z.dp - 1);
        assert_in_range(g.at.cp, 0, z.cp - 1);
        assert_in_range(g.at.tp, 0, z.tp - 1);
        assert_in_range(g.at.mdp, 0, z.mdp - 1);
        assert_in_range(g.at.ep, 0, z.ep - 1);
        assert_in_range(g.at.xt, 0, z.xt - 1);
    }
}

static void test_all_small(void **state)
{
    enum { N = 24 };
    int n_grids = 0;

    (void)state;
    for (int pp = 1; pp <= N; pp++)
        for (int dp = 1; pp * dp <= N; dp++)
            for (int cp = 1; pp * dp * cp <= N; cp++)
                for (int tp = 1; pp * dp * cp * tp <= N; tp++)
                    for (int mdp = 1; mdp <= dp * cp * tp; mdp++)
                        for (int ep = 1; mdp * ep <= dp * cp * tp; ep++) {
                            int width = dp * cp * tp, xt = width / (mdp * ep);
                            if (mdp * ep * xt != width) continue;
                            check_grid((tr_grid_sizes){pp, dp, cp, tp, mdp, ep, xt});
                            n_grids++;
                        }
    assert_true(n_grids > 1000);
}

/* The worked examples of parallel.md 1.2: who shares dp and tp (a CP group), who shares dp and cp (a TP group). */
static void test_examples(void **state)
{
    tr_grid g;

    (void)state;
    assert_int_equal(tr_grid_make(&g, (tr_grid_sizes){1, 1, 2, 4, 1, 8, 1}, 6, 8, NULL), TR_OK);
    assert_int_equal(g.at.tp, 2); /* CP group {2, 6} */
    assert_int_equal(g.at.cp, 1);
    assert_int_equal(g.at.ep, 6);
    assert_int_equal(tr_grid_make(&g, (tr_grid_sizes){1, 2, 4, 1, 2, 2, 2}, 7, 8, NULL), TR_OK);
    assert_int_equal(g.at.dp, 1); /* CP group {4..7} */
    assert_int_equal(g.at.cp, 3);
    assert_int_equal(g.at.mdp, 1);
    assert_int_equal(g.at.ep, 1);
    assert_int_equal(g.at.xt, 1);
    assert_int_equal(tr_grid_make(&g, (tr_grid_sizes){2, 1, 1, 4, 1, 4, 1}, 5, 8, NULL), TR_OK);
    assert_int_equal(g.at.pp, 1);
    assert_int_equal(g.at.tp, 1);
}

static void test_broken(void **state)
{
    static const struct {
        tr_grid_sizes size;
        int rank, world;
        const char *text[2]; /* every broken rule is named */
    } c[] = {
        {{1, 1, 1, 2, 1, 2, 1}, 0, 4, {"number of ranks, 4", NULL}},
        {{1, 1, 1, 4, 1, 2, 1}, 0, 4, {"stage's width", NULL}},
        {{2, 1, 1, 4, 1, 8, 1}, 0, 4, {"number of ranks, 4", "stage's width"}},
        {{0, 1, 1, 4, 1, 4, -3}, 0, 4, {"--pp 0 is not positive", "--moe-tp -3 is not positive"}},
        {{1, 1, 0, 1, 0, 1, 1}, 9, 1, {"--cp 0", "rank 9 of 1"}},
        {{1, 1, 1, 1, 1, 1, 1}, 1, 1, {"rank 1 of 1", NULL}},
        {{1, 1, 1, 1, 1, 1, 1}, -1, 1, {"rank -1", NULL}},
        {{1, 65536, 65536, 1, 65536, 65536, 1}, 0, 1, {"number of ranks", "stage's width"}},
        {{INT_MAX, INT_MAX, 1, 1, INT_MAX, 1, 1}, 0, 1, {"number of ranks", NULL}},
        {{-1, -1, 1, 1, 1, 1, 1}, 0, 1, {"--pp -1", "--dp -1"}},
        {{-1, -1, -1, -1, -1, -1, -1}, 7, 0, {"--pp -1", "rank 7 of 0"}},
    };

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        tr_grid g;
        tr_err err = {0};
        assert_int_equal(tr_grid_make(&g, c[i].size, c[i].rank, c[i].world, &err), TR_E_USAGE);
        for (int k = 0; k < 2 && c[i].text[k]; k++)
            if (!strstr(err.text, c[i].text[k]))
                fail_msg("'%s' does not say '%s'", err.text, c[i].text[k]);
    }
}

static void test_layers(void **state)
{
    (void)state;
    for (int pp = 1; pp <= 9; pp++)
        for (int n = pp; n <= 64; n++) {
            int next = 0, before = n;
            for (int i = 0; i < pp; i++) {
                tr_grid g;
                int first, last;
                assert_int_equal(
                    tr_grid_make(&g, (tr_grid_sizes){pp, 1, 1, 1, 1, 1, 1}, i, pp, NULL), TR_OK);
                tr_grid_layers(&g, n, &first, &last);
                assert_int_equal(first, next);
                assert_true(last - first >= 1 && last - first <= before);
                assert_in_range(last - first, n / pp, (n + pp - 1) / pp);
                before = last - first;
                next = last;
            }
            assert_int_equal(next, n);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_small),
        cmocka_unit_test(test_examples),
        cmocka_unit_test(test_broken),
        cmocka_unit_test(test_layers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
