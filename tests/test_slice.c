#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "model/slice.h"

/* The published model's widths. */
static const tr_config real = {
    .vocab_size = 129280,
    .hidden_size = 7168,
    .num_hidden_layers = 61,
    .num_nextn_predict_layers = 1,
    .first_k_dense_replace = 3,
    .moe_layer_freq = 1,
    .intermediate_size = 18432,
    .moe_intermediate_size = 2048,
    .n_routed_experts = 256,
    .n_shared_experts = 1,
    .num_attention_heads = 128,
};

/* Coordinates of a rank in both views (parallel.md 1.1), written out here to not depend on mpi/grid. */
static tr_grid grid_of(tr_grid_sizes n, int rank)
{
    tr_grid g = {.size = n, .rank = rank};
    int stage = n.dp * n.cp * n.tp, s = rank % stage;
    g.world = n.pp * stage;
    g.at.pp = rank / stage;
    g.at.tp = s % n.tp;
    g.at.cp = s / n.tp % n.cp;
    g.at.dp = s / n.tp / n.cp;
    g.at.xt = s % n.xt;
    g.at.ep = s / n.xt % n.ep;
    g.at.mdp = s / n.xt / n.ep;
    return g;
}

static tr_slice slice_of(const tr_config *c, tr_grid_sizes n, int rank)
{
    tr_grid g = grid_of(n, rank);
    tr_slice s;
    tr_err err;
    assert_int_equal(tr_slice_make(&s, c, &g, &err), TR_OK);
    return s;
}

static void assert_range(tr_range r, int begin, int n)
{
    assert_int_equal(r.begin, begin);
    assert_int_equal(r.n, n);
}

static void one_rank_holds_everything(void **state)
{
    (void)state;
    tr_slice s = slice_of(&real, (tr_grid_sizes){1, 1, 1, 1, 1, 1, 1}, 0);
    assert_range(s.layers, 0, 61);
    assert_range(s.heads, 0, 128);
    assert_range(s.experts, 0, 256);
    assert_range(s.expert_inner, 0, 2048);
    assert_range(s.dense_inner, 0, 18432);
    assert_range(s.shared_inner, 0, 2048);
    assert_range(s.vocab, 0, 129280);
    assert_true(s.embed && s.head);
    assert_false(s.attention_partial || s.dense_partial || s.moe_partial || s.shared_partial);
}

/* Every grid: what the ranks hold, put together, is everything, and nothing overlaps. */
static void parts_cover_the_whole(void **state)
{
    (void)state;
    static const tr_grid_sizes grids[] = {
        {1, 1, 1, 8, 1, 8, 1}, {1, 1, 1, 8, 1, 1, 8}, {1, 1, 1, 8, 1, 4, 2},  {1, 8, 1, 1, 1, 8, 1},
        {1, 2, 2, 2, 2, 4, 1}, {4, 1, 1, 4, 1, 4, 1}, {61, 1, 1, 2, 2, 1, 1},
    };
    for (size_t k = 0; k < sizeof grids / sizeof *grids; k++) {
        tr_grid_sizes n = grids[k];
        int stage = n.dp * n.cp * n.tp, next_layer = 0;
        for (int pp = 0; pp < n.pp; pp++) {
            long heads = 0, experts = 0, inner = 0, dense = 0, shared = 0;
            for (int i = 0; i < stage; i++) {
                tr_slice s = slice_of(&real, n, pp * stage + i);
                assert_int_equal(s.layers.begin, next_layer);
                assert_true(s.layers.n >= 1);
                assert_int_equal(s.embed, pp == 0);
                assert_int_equal(s.head, pp == n.pp - 1);
                assert_int_equal(s.attention_partial, n.tp > 1);
                assert_int_equal(s.moe_partial, n.ep * n.xt > 1);
                assert_int_equal(s.heads.begin, i % n.tp * (128 / n.tp));
                if (s.dense_partial) assert_int_equal(s.dense_inner.begin, dense);
                if (s.shared_partial) assert_int_equal(s.shared_inner.begin, shared);
                heads += s.heads.n;
                experts += s.experts.n;
                inner += s.expert_inner.n;
                dense += s.dense_inner.n;
                shared += s.shared_inner.n;
                if (i == stage - 1) next_layer = s.layers.begin + s.layers.n;
                if (!s.dense_partial) assert_range(s.dense_inner, 0, 18432);
                if (!s.shared_partial) assert_range(s.shared_inner, 0, 2048);
                assert_int_equal(s.dense_inner.begin % 128, 0);
                assert_int_equal(s.shared_inner.n % 128, 0);
            }
            tr_slice s = slice_of(&real, n, pp * stage);
            assert_int_equal(heads, 128L * n.dp * n.cp);
            assert_int_equal(experts, 256L * n.mdp * n.xt);
            assert_int_equal(inner, 2048L * n.mdp * n.ep);
            assert_int_equal(dense, s.dense_partial ? 18432 : 18432L * stage);
            assert_int_equal(shared, s.shared_partial ? 2048 : 2048L * stage);
        }
        assert_int_equal(next_layer, 61);
    }
}

/* Off the 128-grid, or not divisible: whole, and then not to be summed. */
static void odd_widths_stay_whole(void **state)
{
    (void)state;
    tr_config c = real;
    c.intermediate_size = 768; /* six blocks */
    c.moe_intermediate_size = 128;
    tr_slice s = slice_of(&c, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1}, 1);
    assert_range(s.dense_inner, 384, 384);
    assert_true(s.dense_partial);
    assert_range(s.shared_inner, 0, 128);
    assert_false(s.shared_partial);
    s = slice_of(&c, (tr_grid_sizes){1, 1, 1, 4, 1, 4, 1}, 1);
    assert_range(s.dense_inner, 0, 768);
    assert_false(s.dense_partial);
    c.intermediate_size = 160;
    s = slice_of(&c, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1}, 1);
    assert_range(s.dense_inner, 0, 160);
    assert_false(s.dense_partial);
}

static void bad_grids_are_refused_with_every_reason(void **state)
{
    (void)state;
    tr_grid g = grid_of((tr_grid_sizes){62, 1, 1, 3, 1, 3, 1}, 0);
    tr_slice s;
    tr_err err;
    assert_int_equal(tr_slice_make(&s, &real, &g, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "tp 3"));
    assert_non_null(strstr(err.text, "ep 3"));
    assert_non_null(strstr(err.text, "62 pipeline stages"));
    g = grid_of((tr_grid_sizes){1, 1, 1, 3, 1, 1, 3}, 0);
    assert_int_equal(tr_slice_make(&s, &real, &g, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "moe-tp 3"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_holds_everything),
        cmocka_unit_test(parts_cover_the_whole),
        cmocka_unit_test(odd_widths_stay_whole),
        cmocka_unit_test(bad_grids_are_refused_with_every_reason),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
