/* The process grid: coordinates and groups of every grid of up to 64 ranks, the rules, the defaults and what is proposed
 * instead of an illegal grid, and the layers of stages. */
#include <config.h>

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mpi/grid.h"

enum { N = 64 };

/* Both views name the same rank, and every coordinate is taken once. */
static void check_coordinates(tr_grid_sizes z, const tr_grid *grid, int world)
{
    int width = world / z.pp;

    for (int w = 0; w < world; w++) {
        const tr_grid *g = &grid[w];
        assert_int_equal(g->rank, w);
        assert_int_equal(g->world, world);
        assert_memory_equal(&g->size, &z, sizeof z);
        assert_int_equal(w, g->at.pp * width + (g->at.dp * z.cp + g->at.cp) * z.tp + g->at.tp);
        assert_int_equal(w, g->at.pp * width + (g->at.mdp * z.ep + g->at.ep) * z.xt + g->at.xt);
        assert_true(g->at.pp >= 0 && g->at.pp < z.pp && g->at.dp >= 0 && g->at.dp < z.dp);
        assert_true(g->at.cp >= 0 && g->at.cp < z.cp && g->at.tp >= 0 && g->at.tp < z.tp);
        assert_true(g->at.mdp >= 0 && g->at.mdp < z.mdp && g->at.ep >= 0 && g->at.ep < z.ep);
        assert_true(g->at.xt >= 0 && g->at.xt < z.xt);
    }
}

/* Do two ranks belong to the same group? The table of parallel.md 1.2, by coordinates. */
static bool together(tr_grid_group group, const tr_coord *a, const tr_coord *b)
{
    bool stage = a->pp == b->pp, replica = stage && a->dp == b->dp,
         block = stage && a->mdp == b->mdp;
    switch (group) {
    case TR_GROUP_WORLD:
        return true;
    case TR_GROUP_STAGE:
        return stage;
    case TR_GROUP_ATTN_TP:
        return replica && a->cp == b->cp;
    case TR_GROUP_ATTN_CP:
        return replica && a->tp == b->tp;
    case TR_GROUP_ATTN_DP:
        return stage && a->cp == b->cp && a->tp == b->tp;
    case TR_GROUP_MOE_EP:
        return block && a->xt == b->xt;
    case TR_GROUP_MOE_TP:
        return block && a->ep == b->ep;
    case TR_GROUP_PP:
        return a->dp == b->dp && a->cp == b->cp && a->tp == b->tp;
    case TR_GROUP_LEAD:
        return a->tp == 0 && a->cp == 0 && b->tp == 0 && b->cp == 0;
    case TR_GROUP_MOE:
        return block;
    case TR_GROUP_REPLICA:
        return replica;
    case TR_N_GROUPS:
        break;
    }
    return false;
}

/* Colours, keys, sizes and member lists of one kind of group say the same, and partition the world. */
static void check_group(const tr_grid *grid, int world, tr_grid_group group)
{
    int counted[N] = {0};

    for (int w = 0; w < world; w++) {
        const tr_grid *g = &grid[w];
        int n = tr_grid_group_size(g, group), index = tr_grid_group_index(g, group);
        int color = tr_grid_color(g, group);
        if (n == 0) {
            assert_true(group == TR_GROUP_LEAD && (g->at.tp || g->at.cp));
            assert_true(color == -1 && index == -1);
            continue;
        }
        assert_in_range(color, 0, world - 1);
        counted[color]++;
        assert_true(index >= 0 && index < n);
        assert_int_equal(tr_grid_member(g, group, index), w);
        if (index > 0) continue;
        /* The first member's list, once. */
        int key = -1;
        for (int i = 0, before = -1; i < n; i++) {
            int other = tr_grid_member(g, group, i);
            assert_true(other > before && other < world);
            before = other;
            assert_true(together(group, &g->at, &grid[other].at));
            assert_int_equal(tr_grid_color(&grid[other], group), color);
            assert_int_equal(tr_grid_group_index(&grid[other], group), i);
            assert_true(tr_grid_key(&grid[other], group) > key);
            key = tr_grid_key(&grid[other], group);
        }
        int same = 0;
        for (int other = 0; other < world && world <= 16; other++)
            same += together(group, &g->at, &grid[other].at);
        if (world <= 16) assert_int_equal(same, n); /* nobody is forgotten; above, colours say it */
    }
    /* A colour is one group's alone: as many ranks have it as the group has members. */
    for (int w = 0; w < world; w++)
        if (tr_grid_color(&grid[w], group) >= 0)
            assert_int_equal(counted[tr_grid_color(&grid[w], group)],
                             tr_grid_group_size(&grid[w], group));
}

/* Groups that are called the same have the same members on every rank, and only those. */
static void check_aliases(const tr_grid *grid, int world)
{
    for (int a = 0; a < TR_N_GROUPS; a++)
        for (int b = 0; b < TR_N_GROUPS; b++) {
            bool same = true;
            for (int w = 0; w < world && same; w++) {
                int n = tr_grid_group_size(&grid[w], (tr_grid_group)a);
                same = n == tr_grid_group_size(&grid[w], (tr_grid_group)b);
                for (int i = 0; i < n && same; i++)
                    same = tr_grid_member(&grid[w], (tr_grid_group)a, i) ==
                           tr_grid_member(&grid[w], (tr_grid_group)b, i);
            }
            if (same != tr_grid_same_group(&grid[0].size, (tr_grid_group)a, (tr_grid_group)b))
                fail_msg("%s and %s of %d ranks: %d", tr_grid_group_name((tr_grid_group)a),
                         tr_grid_group_name((tr_grid_group)b), world, same);
        }
}

static void check_grid(tr_grid_sizes z)
{
    int world = z.pp * z.dp * z.cp * z.tp;
    tr_grid grid[N];

    for (int w = 0; w < world; w++) {
        tr_err err = {0};
        if (tr_grid_make(&grid[w], z, w, world, &err) != TR_OK) fail_msg("%s", err.text);
    }
    check_coordinates(z, grid, world);
    for (int group = 0; group < TR_N_GROUPS; group++)
        check_group(grid, world, (tr_grid_group)group);
    if (world <= 16) check_aliases(grid, world);
}

static void test_all_small(void **state)
{
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
    assert_true(n_grids > 10000);
}

static void assert_members(tr_grid_sizes z, int rank, tr_grid_group group, const int *want, int n)
{
    tr_grid g;
    assert_int_equal(tr_grid_make(&g, z, rank, z.pp * z.dp * z.cp * z.tp, NULL), TR_OK);
    assert_int_equal(tr_grid_group_size(&g, group), n);
    for (int i = 0; i < n; i++)
        assert_int_equal(tr_grid_member(&g, group, i), want[i]);
}

/* The table of worked examples of parallel.md 1.2. */
static void test_worked_examples(void **state)
{
    static const int all[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    (void)state;
    assert_members((tr_grid_sizes){1, 1, 1, 8, 1, 8, 1}, 5, TR_GROUP_ATTN_TP, all, 8);
    assert_members((tr_grid_sizes){1, 1, 1, 8, 1, 8, 1}, 5, TR_GROUP_ATTN_CP, &all[5], 1);
    assert_members((tr_grid_sizes){1, 8, 1, 1, 1, 8, 1}, 5, TR_GROUP_ATTN_TP, &all[5], 1);
    assert_members((tr_grid_sizes){1, 8, 1, 1, 1, 8, 1}, 5, TR_GROUP_ATTN_CP, &all[5], 1);
    assert_members((tr_grid_sizes){1, 1, 2, 4, 1, 8, 1}, 6, TR_GROUP_ATTN_CP, (int[]){2, 6}, 2);
    assert_members((tr_grid_sizes){1, 1, 2, 4, 1, 8, 1}, 6, TR_GROUP_ATTN_TP, &all[4], 4);
    assert_members((tr_grid_sizes){1, 2, 4, 1, 1, 8, 1}, 2, TR_GROUP_ATTN_CP, all, 4);
    assert_members((tr_grid_sizes){1, 2, 4, 1, 1, 8, 1}, 2, TR_GROUP_ATTN_DP, (int[]){2, 6}, 2);
    assert_members((tr_grid_sizes){1, 1, 8, 1, 1, 8, 1}, 7, TR_GROUP_ATTN_CP, all, 8);
    assert_members((tr_grid_sizes){2, 1, 2, 2, 1, 2, 2}, 5, TR_GROUP_MOE_EP, (int[]){5, 7}, 2);
    assert_members((tr_grid_sizes){2, 1, 2, 2, 1, 2, 2}, 5, TR_GROUP_MOE_TP, &all[4], 2);
    assert_members((tr_grid_sizes){2, 1, 2, 2, 1, 2, 2}, 5, TR_GROUP_PP, (int[]){1, 5}, 2);
    assert_members((tr_grid_sizes){2, 2, 1, 2, 1, 2, 2}, 0, TR_GROUP_LEAD, (int[]){0, 2, 4, 6}, 4);
    assert_members((tr_grid_sizes){2, 2, 1, 2, 1, 2, 2}, 1, TR_GROUP_LEAD, NULL, 0);
    assert_true(tr_grid_same_group(&(tr_grid_sizes){1, 1, 8, 1, 1, 8, 1}, TR_GROUP_ATTN_CP,
                                   TR_GROUP_STAGE));
    assert_false(tr_grid_same_group(&(tr_grid_sizes){1, 1, 2, 4, 1, 8, 1}, TR_GROUP_ATTN_CP,
                                    TR_GROUP_STAGE));
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

static void test_layers_given(void **state)
{
    static const int each[4] = {16, 16, 16, 13};
    (void)state;
    for (int i = 0, next = 0; i < 4; i++) {
        tr_grid g;
        int first, last;
        assert_int_equal(tr_grid_make(&g, (tr_grid_sizes){4, 1, 1, 1, 1, 1, 1}, i, 4, NULL), TR_OK);
        assert_null(g.stage_layers);
        g.stage_layers = each;
        tr_grid_layers(&g, 61, &first, &last);
        assert_int_equal(first, next);
        assert_int_equal(last - first, each[i]);
        next = last;
        if (i == 3) assert_int_equal(next, 61);
    }
}

/* The published model's counts (parallel.md 0). */
static const tr_grid_limits real = {
    .layers = 61, .heads = 128, .experts = 256, .expert_inner = 2048, .vocab = 129280};

static void test_rules(void **state)
{
    static const int good[4] = {16, 16, 16, 13}, short_list[4] = {16, 16, 16, 12},
                     empty[4] = {31, 0, 15, 15};
    static const struct {
        tr_grid_sizes size;
        int world;
        const int *stage_layers;
        const char
            *text[4]; /* of the message: every broken rule, and grids that would do; NULL: legal */
    } c[] = {
        {{1, 1, 1, 8, 1, 8, 1}, 8, NULL, {NULL}},
        {{4, 1, 1, 8, 1, 8, 1}, 32, good, {NULL}},
        {{1, 1, 1, 128, 1, 128, 1}, 128, NULL, {NULL}},
        {{1, 3, 1, 8, 3, 8, 1}, 24, NULL, {NULL}},
        {{61, 1, 1, 1, 1, 1, 1}, 61, NULL, {NULL}},
        {{1, 1, 1, 3, 1, 3, 1},
         3,
         NULL,
         {"128 attention heads do not divide by tp 3", "256 experts do not divide by ep 3",
          "Legal for this number of ranks", "--dp 3"}},
        {{1, 1, 1, 24, 1, 24, 1}, 24, NULL, {"tp 24", "ep 24", "--dp 3 --tp 8", NULL}},
        {{1, 1, 1, 8, 1, 1, 3}, 8, NULL, {"stage's width", "expert width 2048", "moe-tp 3", NULL}},
        {{62, 1, 1, 1, 1, 1, 1}, 62, NULL, {"61 layers are fewer than the 62", "--pp 31", NULL}},
        {{4, 1, 1, 8, 1, 8, 1}, 32, short_list, {"adds up to 60 layers, the model has 61", NULL}},
        {{4, 1, 1, 8, 1, 8, 1}, 32, empty, {"stage 1 owns 0 layers", NULL}},
        {{2, 1, 1, 16, 1, 16, 1}, 32, good, {"--pp-layers has 4 stages, pp is 2", "--pp 4", NULL}},
        {{1, 1, 1, 4, 0, 3, 1}, 4, NULL, {"ep 3 * moe-tp 1 does not divide", "256 experts", NULL}},
        {{1, 1, 1, 0, 0, -2, 1}, 4, NULL, {"--tp 0 is not", "--ep -2 is not", NULL}},
    };

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        tr_grid_limits l = real;
        tr_err err = {0};
        l.stage_layers = c[i].stage_layers;
        l.n_stage_layers = c[i].stage_layers ? 4 : 0;
        tr_status st = tr_grid_check(&c[i].size, c[i].world, &l, &err);
        if (st != (c[i].text[0] ? TR_E_USAGE : TR_OK)) fail_msg("%zu: %d: %s", i, st, err.text);
        for (int k = 0; k < 4 && c[i].text[k]; k++)
            if (!strstr(err.text, c[i].text[k]))
                fail_msg("'%s' does not say '%s'", err.text, c[i].text[k]);
    }
}

static void test_gathering(void **state)
{
    (void)state;
    assert_true(tr_grid_gathers_all(&(tr_grid_sizes){1, 8, 1, 1, 1, 1, 8}));
    assert_true(tr_grid_gathers_all(&(tr_grid_sizes){2, 1, 2, 4, 1, 1, 8}));
    assert_false(tr_grid_gathers_all(&(tr_grid_sizes){1, 1, 1, 8, 1, 1, 8}));
    assert_false(tr_grid_gathers_all(&(tr_grid_sizes){1, 8, 1, 1, 1, 8, 1}));
    assert_false(tr_grid_gathers_all(&(tr_grid_sizes){1, 8, 1, 1, 2, 1, 4}));
}

/* Every proposal is legal for the same number of ranks. */
static void test_proposals(void **state)
{
    int n_proposed = 0;
    (void)state;
    for (int world = 1; world <= 130; world++)
        for (int tp = 3; tp <= 130; tp += 13) {
            tr_grid_sizes sizes;
            tr_err err = {0};
            if (tr_grid_choose(&sizes, &(tr_grid_sizes){.tp = tp}, world, &real, NULL, &err) ==
                TR_OK) {
                assert_int_equal(tr_grid_broken(&sizes, world, &real, NULL, 0), 0);
                continue;
            }
            char *at = strstr(err.text, "ranks: "), *save = NULL;
            assert_non_null(at);
            for (char *one = strtok_r(at + 7, ";", &save); one; one = strtok_r(NULL, ";", &save)) {
                tr_grid_sizes p = {1, 1, 1, 1, 1, 1, 1};
                const struct {
                    const char *name;
                    int *value;
                } option[] = {{"--pp ", &p.pp}, {"--dp ", &p.dp}, {"--cp ", &p.cp},
                              {"--tp ", &p.tp}, {"--ep ", &p.ep}, {"--moe-tp ", &p.xt}};
                for (size_t i = 0; i < sizeof option / sizeof *option; i++) {
                    char *o = strstr(one, option[i].name);
                    if (o) *option[i].value = atoi(o + strlen(option[i].name));
                }
                p.mdp = p.dp * p.cp * p.tp / p.ep / p.xt;
                if (tr_grid_broken(&p, world, &real, NULL, 0))
                    fail_msg("%d ranks: '%s' is not legal", world, one);
                n_proposed++;
            }
        }
    assert_true(n_proposed > 1000);
}

static void test_defaults(void **state)
{
    static const struct {
        tr_grid_sizes given;
        int world;
        tr_grid_sizes want;
        const char *why[2];
    } c[] = {
        {{0}, 1, {1, 1, 1, 1, 1, 1, 1}, {NULL}},
        {{0}, 8, {1, 1, 1, 8, 1, 8, 1}, {"tp 8: all ranks", "ep 8: the largest"}},
        {{.dp = 8}, 8, {1, 8, 1, 1, 1, 8, 1}, {"ep 8", NULL}},
        {{.cp = 4}, 8, {1, 1, 4, 2, 1, 8, 1}, {"tp 2: all ranks that pp, dp and cp leave", NULL}},
        {{.pp = 4}, 32, {4, 1, 1, 8, 1, 8, 1}, {"tp 8", NULL}},
        {{0}, 24, {1, 3, 1, 8, 3, 8, 1}, {"dp 3: what tp leaves", "MoE-DP 3"}},
        {{0}, 7, {1, 7, 1, 1, 7, 1, 1}, {"dp 7", "MoE-DP 7"}},
        {{.xt = 8}, 8, {1, 1, 1, 8, 1, 1, 8}, {"tp 8", NULL}},
        {{.ep = 4, .xt = 2}, 16, {1, 1, 1, 16, 2, 4, 2}, {"MoE-DP 2", "each 8 ranks"}},
        {{.tp = 8, .ep = 1}, 8, {1, 1, 1, 8, 8, 1, 1}, {"each 1 ranks", NULL}},
        {{.dp = 512}, 512, {1, 512, 1, 1, 2, 256, 1}, {"ep 256", "MoE-DP 2"}},
        {{0}, 4096, {1, 32, 1, 128, 16, 256, 1}, {"tp 128: the largest part", "dp 32"}},
    };

    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        tr_grid_sizes got;
        char why[TR_GRID_WHY];
        tr_err err = {0};
        if (tr_grid_choose(&got, &c[i].given, c[i].world, &real, why, &err) != TR_OK)
            fail_msg("%zu: %s", i, err.text);
        if (memcmp(&got, &c[i].want, sizeof got) != 0) {
            char text[128];
            fail_msg("%zu: %s", i, tr_grid_text(text, sizeof text, &got));
        }
        for (int k = 0; k < 2 && c[i].why[k]; k++)
            if (!strstr(why, c[i].why[k])) fail_msg("'%s' does not say '%s'", why, c[i].why[k]);
    }
}

/* Sizes that were given and cannot be; nothing that was not given is blamed on the user. */
static void test_impossible(void **state)
{
    static const struct {
        tr_grid_sizes given;
        int world;
        const char *text[2];
    } c[] = {
        {{.pp = 3},
         8,
         {"not the number of ranks, 8", "--pp 4 --tp 2 --ep 2; --pp 2 --tp 4 --ep 4"}},
        {{.tp = 3}, 9, {"not the number of ranks, 9", "heads"}},
        {{.dp = 2}, 6, {"128 attention heads do not divide by tp 3", "--dp 2 --cp 3 --ep 2"}},
        {{.ep = 3}, 8, {"ep 3 * moe-tp 1 does not divide", "256 experts do not divide by ep 3"}},
        {{.tp = 1 << 20, .dp = 1 << 20}, 8, {"not the number of ranks", NULL}},
        {{.tp = -1}, 8, {"--tp -1 is not positive", NULL}},
        {{.pp = 100}, 100, {"61 layers are fewer", "--pp 50"}},
    };
    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        tr_grid_sizes got;
        tr_err err = {0};
        assert_int_equal(tr_grid_choose(&got, &c[i].given, c[i].world, &real, NULL, &err),
                         TR_E_USAGE);
        for (int k = 0; k < 2 && c[i].text[k]; k++)
            if (!strstr(err.text, c[i].text[k]))
                fail_msg("'%s' does not say '%s'", err.text, c[i].text[k]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_small),    cmocka_unit_test(test_examples),
        cmocka_unit_test(test_broken),       cmocka_unit_test(test_layers),
        cmocka_unit_test(test_layers_given), cmocka_unit_test(test_worked_examples),
        cmocka_unit_test(test_rules),        cmocka_unit_test(test_gathering),
        cmocka_unit_test(test_proposals),    cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_impossible),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
