#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "model/slice.h"
#include "tests/published_model.h"

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
    assert_true(s.dense_adds && s.shared_adds);
}

static int overlap(tr_range a, tr_range b)
{
    int begin = a.begin > b.begin ? a.begin : b.begin;
    int end = a.begin + a.n < b.begin + b.n ? a.begin + a.n : b.begin + b.n;
    return end > begin ? end - begin : 0;
}

/* Parts that the chosen ones of n members hold: next to each other, together the whole, each once. */
static void assert_covers(const tr_range *part, const int *counts, int n, int width)
{
    long sum = 0;
    for (int i = 0; i < n; i++) {
        if (!counts[i]) continue;
        assert_true(part[i].begin >= 0 && part[i].n >= 1 && part[i].begin + part[i].n <= width);
        sum += part[i].n;
        for (int k = 0; k < i; k++)
            if (counts[k]) assert_int_equal(overlap(part[i], part[k]), 0);
    }
    assert_int_equal(sum, width);
}

enum { N = 64 };

/* Heads, widths and vocabulary of the members of each ATTN_TP group. */
static void check_attention(const tr_slice *slice, tr_grid_sizes n, int world, const tr_config *c)
{
    int shared_width = c->n_shared_experts * c->moe_intermediate_size;
    for (int first = 0; first < world; first += n.tp) {
        tr_range heads[N], dense[N], shared[N], vocab[N];
        int all[N], dense_adds[N], shared_adds[N];
        for (int i = 0; i < n.tp; i++) {
            const tr_slice *s = &slice[first + i];
            heads[i] = s->heads;
            dense[i] = s->dense_inner;
            shared[i] = s->shared_inner;
            vocab[i] = s->vocab;
            all[i] = 1;
            dense_adds[i] = s->dense_adds;
            shared_adds[i] = s->shared_adds;
            assert_int_equal(s->attention_partial, n.tp > 1);
            assert_int_equal(s->dense_partial, s->dense_inner.n < c->intermediate_size);
            assert_int_equal(s->shared_partial, s->shared_inner.n < shared_width);
            assert_int_equal(s->dense_inner.begin % 128, 0);
            assert_int_equal(s->shared_inner.begin % 128, 0);
            if (i > 0) assert_int_equal(vocab[i].begin, vocab[i - 1].begin + vocab[i - 1].n);
        }
        assert_covers(heads, all, n.tp, c->num_attention_heads);
        assert_covers(vocab, all, n.tp, c->vocab_size);
        assert_covers(dense, dense_adds, n.tp, c->intermediate_size);
        assert_covers(shared, shared_adds, n.tp, shared_width);
    }
}

/* Each block of ep x moe-tp ranks holds every column of every expert once. */
static void check_experts(const tr_slice *slice, tr_grid_sizes n, int world, const tr_config *c)
{
    int block = n.ep * n.xt;
    for (int first = 0; first < world; first += block) {
        long cells = 0;
        for (int i = 0; i < block; i++) {
            const tr_slice *a = &slice[first + i];
            cells += (long)a->experts.n * a->expert_inner.n;
            assert_int_equal(a->moe_partial, block > 1);
            for (int k = 0; k < i; k++) {
                const tr_slice *b = &slice[first + k];
                assert_int_equal(
                    overlap(a->experts, b->experts) * overlap(a->expert_inner, b->expert_inner), 0);
            }
        }
        assert_int_equal(cells, (long)c->n_routed_experts * c->moe_intermediate_size);
    }
}

static void check_layers(const tr_slice *slice, tr_grid_sizes n, const tr_config *c)
{
    int stage = n.dp * n.cp * n.tp, next = 0;
    for (int pp = 0; pp < n.pp; pp++) {
        const tr_slice *s = &slice[pp * stage];
        assert_int_equal(s->layers.begin, next);
        assert_true(s->layers.n >= 1);
        next += s->layers.n;
        for (int i = 0; i < stage; i++) {
            assert_memory_equal(&s[i].layers, &s->layers, sizeof s->layers);
            assert_int_equal(s[i].embed, pp == 0);
            assert_int_equal(s[i].head, pp == n.pp - 1);
        }
    }
    assert_int_equal(next, c->num_hidden_layers);
}

/* Every legal grid of up to 64 ranks: what the members of a group hold, put together, is every tensor exactly once. */
static void parts_cover_the_whole(void **state)
{
    static tr_slice slice[N];
    tr_grid_limits limits = tr_slice_limits(&real);
    int n_grids = 0;
    (void)state;
    for (int pp = 1; pp <= N; pp++)
        for (int dp = 1; pp * dp <= N; dp++)
            for (int cp = 1; pp * dp * cp <= N; cp++)
                for (int tp = 1; pp * dp * cp * tp <= N; tp++)
                    for (int ep = 1; ep <= dp * cp * tp; ep++)
                        for (int xt = 1; xt * ep <= dp * cp * tp; xt++) {
                            int world = pp * dp * cp * tp, width = dp * cp * tp;
                            tr_grid_sizes n = {pp, dp, cp, tp, width / (ep * xt), ep, xt};
                            if (tr_grid_broken(&n, world, &limits, NULL, 0)) continue;
                            for (int w = 0; w < world; w++)
                                slice[w] = slice_of(&real, n, w);
                            check_attention(slice, n, world, &real);
                            check_experts(slice, n, world, &real);
                            check_layers(slice, n, &real);
                            n_grids++;
                        }
    assert_true(n_grids > 2000);
}

static void given_layers_are_followed(void **state)
{
    static const int good[4] = {16, 16, 16, 13}, bad[4] = {16, 16, 16, 20};
    (void)state;
    tr_slice s;
    tr_err err = {0};
    tr_grid g = grid_of((tr_grid_sizes){4, 1, 1, 1, 1, 1, 1}, 3);
    g.stage_layers = good;
    assert_int_equal(tr_slice_make(&s, &real, &g, &err), TR_OK);
    assert_range(s.layers, 48, 13);
    g.stage_layers = bad;
    assert_int_equal(tr_slice_make(&s, &real, &g, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "stage 3 would own layers 48 to 67 of 61"));
}

/* Off the 128-grid, or not divisible: fewer parts than members, or whole, and then not to be summed. */
static void odd_widths(void **state)
{
    static const int parts_of_dense[][2] = {{1, 1},   {2, 2},   {4, 4},    {8, 8}, {16, 16},
                                            {32, 16}, {64, 16}, {128, 16}, {3, 3}, {5, 1}};
    (void)state;
    for (size_t i = 0; i < sizeof parts_of_dense / sizeof *parts_of_dense; i++)
        assert_int_equal(tr_slice_parts(18432, parts_of_dense[i][0]), parts_of_dense[i][1]);
    assert_int_equal(tr_slice_parts(2048, 32), 16);
    tr_config c = real;
    c.intermediate_size = 768; /* six blocks */
    c.moe_intermediate_size = 128;
    tr_slice s = slice_of(&c, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1}, 1);
    assert_range(s.dense_inner, 384, 384);
    assert_true(s.dense_partial && s.dense_adds);
    assert_range(s.shared_inner, 0, 128);
    assert_false(s.shared_partial || s.shared_adds);
    /* Two parts for four members: neighbours hold the same, the first of them adds. */
    for (int w = 0; w < 4; w++) {
        s = slice_of(&c, (tr_grid_sizes){1, 1, 1, 4, 1, 4, 1}, w);
        assert_range(s.dense_inner, w / 2 * 384, 384);
        assert_true(s.dense_partial);
        assert_int_equal(s.dense_adds, w % 2 == 0);
        assert_int_equal(s.shared_adds, w == 0);
    }
    c.intermediate_size = 160;
    s = slice_of(&c, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1}, 1);
    assert_range(s.dense_inner, 0, 160);
    assert_false(s.dense_partial);
    /* 97 ids over 4 ranks. */
    c.vocab_size = 97;
    int next = 0;
    for (int w = 0; w < 4; w++) {
        s = slice_of(&c, (tr_grid_sizes){1, 1, 1, 4, 1, 4, 1}, w);
        assert_int_equal(s.vocab.begin, next);
        assert_in_range(s.vocab.n, 24, 25);
        next += s.vocab.n;
    }
    assert_int_equal(next, 97);
}

/* Under DP and CP alone nothing but the experts is cut: the rows of the ranks differ. */
static void other_rows_other_copies(void **state)
{
    static const tr_grid_sizes grids[] = {{1, 8, 1, 1, 1, 8, 1}, {1, 1, 8, 1, 1, 8, 1}};
    (void)state;
    for (int k = 0; k < 2; k++)
        for (int w = 0; w < 8; w++) {
            tr_slice s = slice_of(&real, grids[k], w);
            assert_range(s.heads, 0, 128);
            assert_range(s.dense_inner, 0, 18432);
            assert_range(s.shared_inner, 0, 2048);
            assert_range(s.vocab, 0, 129280);
            assert_range(s.experts, 32 * w, 32);
            assert_false(s.attention_partial || s.dense_partial || s.shared_partial);
            assert_true(s.moe_partial);
        }
}

/* parallel.md 1.5: which widths keep to the grid of the scales. */
static void misaligned_tensors_are_named(void **state)
{
    static const struct {
        int tp, xt, n;
        const char *first;
    } c[] = {{1, 1, 0, NULL},  {2, 1, 0, NULL},         {64, 1, 0, NULL},   {128, 1, 1, "q_b"},
             {1, 16, 0, NULL}, {1, 32, 3, "gate_proj"}, {128, 32, 4, "q_b"}};
    tr_misaligned list[TR_MISALIGNED_MAX];
    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        tr_grid_sizes sizes = {1, 1, 1, c[i].tp, 1, 1, c[i].xt};
        int n = tr_slice_misaligned(&real, &sizes, list);
        assert_int_equal(n, c[i].n);
        if (n) assert_non_null(strstr(list[0].name, c[i].first));
        for (int k = 0; k < n; k++)
            assert_int_not_equal(list[k].width / list[k].parts % 128, 0);
    }
    /* models/tiny: 192 rows a head, 4 heads. */
    tr_config tiny = real;
    tiny.num_attention_heads = 4;
    assert_int_equal(tr_slice_misaligned(&tiny, &(tr_grid_sizes){1, 1, 1, 2, 1, 1, 1}, list), 0);
    assert_int_equal(tr_slice_misaligned(&tiny, &(tr_grid_sizes){1, 1, 1, 4, 1, 1, 1}, list), 1);
    assert_int_equal(list[0].width / list[0].parts, 192);
    tiny.fp8 = false;
    assert_int_equal(tr_slice_misaligned(&tiny, &(tr_grid_sizes){1, 1, 1, 4, 1, 1, 1}, list), 0);
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
    tr_config c = real;
    c.vocab_size = 4;
    g = grid_of((tr_grid_sizes){1, 1, 1, 8, 1, 8, 1}, 0);
    assert_int_equal(tr_slice_make(&s, &c, &g, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "a vocabulary of 4"));
}

/* ---- what backends take (kernels/limits.h) ---- */

static const tr_grid_sizes alone = {1, 1, 1, 1, 1, 1, 1};

/* What a backend says of the model with one size changed; others, 0 for none, are such that nothing else is too large. */
typedef struct size {
    const char *backend;
    size_t at; /* in tr_config */
    int least, most, too_much;
    size_t beside;
    int there;
    const char *says;
} size;

#define AT(field) offsetof(tr_config, field)

static void put(tr_config *c, size_t at, int v)
{
    memcpy((char *)c + at, &v, sizeof v);
}

static tr_status asked(const char *backend, const tr_config *c, tr_err *err)
{
    const tr_slice s = slice_of(c, alone, 0);
    const tr_dims dims = tr_slice_dims(c, &s, &alone);

    return tr_device_takes(backend, &dims, err);
}

/* clang-format off */
static const size sizes[] = {
    {"cpu", AT(n_routed_experts), 8, 1024, 1025, 0, 0, "n_routed_experts 1025: the CPU backend takes at most 1024"},
    {"cpu", AT(kv_lora_rank), 4, 960, 964, 0, 0, "kv_lora_rank + qk_rope_head_dim 1028: the CPU backend takes at most 1024"},
    {"cpu", AT(kv_lora_rank), 4, 512, 514, 0, 0, "kv_lora_rank 514: the CPU backend takes multiples of 4"},
    {"cpu", AT(qk_nope_head_dim), 1, 448, 449, 0, 0, "qk_nope_head_dim + qk_rope_head_dim 513: the CPU backend takes at most 512"},
    {"cpu", AT(v_head_dim), 1, 512, 513, 0, 0, "v_head_dim 513: the CPU backend takes at most 512"},
    {"cpu", AT(index_head_dim), 64, 256, 512, 0, 0, "index_head_dim 512: the CPU backend takes at most 256"},
    {"cuda", AT(n_routed_experts), 8, 1024, 1025, 0, 0, "n_routed_experts 1025: the CUDA backend takes at most 1024"},
    {"cuda", AT(hidden_size), 128, 8192, 8320, 0, 0, "hidden_size 8320: the CUDA backend takes at most 8192"},
    {"cuda", AT(q_lora_rank), 128, 8192, 8320, 0, 0, "q_lora_rank 8320: the CUDA backend takes at most 8192"},
    {"cuda", AT(kv_lora_rank), 4, 512, 516, 0, 0, "kv_lora_rank 516: the CUDA backend takes at most 512"},
    {"cuda", AT(kv_lora_rank), 4, 508, 510, 0, 0, "kv_lora_rank 510: the CUDA backend takes multiples of 4"},
    {"cuda", AT(qk_rope_head_dim), 2, 128, 130, 0, 0, "kv_lora_rank + qk_rope_head_dim 642: the CUDA backend takes at most 640"},
    {"cuda", AT(qk_nope_head_dim), 2, 126, 127, 0, 0, "qk_nope_head_dim 127: the CUDA backend takes multiples of 2"},
    {"cuda", AT(qk_nope_head_dim), 2, 192, 194, AT(v_head_dim), 32, "qk_nope_head_dim + qk_rope_head_dim 258: the CUDA backend takes at most 256"},
    {"cuda", AT(qk_nope_head_dim), 2, 128, 130, AT(v_head_dim), 128, "qk_nope_head_dim + v_head_dim 258: the CUDA backend takes at most 256"},
    {"cuda", AT(v_head_dim), 1, 128, 129, AT(qk_nope_head_dim), 64, "v_head_dim 129: the CUDA backend takes at most 128"},
    {"cuda", AT(index_head_dim), 64, 256, 512, 0, 0, "index_head_dim 512: the CUDA backend takes at most 256"},
    {"cuda", AT(index_topk), 1, 2048, 2049, 0, 0, "index_topk 2049: the CUDA backend takes at most 2048"},
};
/* clang-format on */

static void backends_say_what_they_cannot(void **state)
{
    (void)state;
    char want[200];
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const size *s = &sizes[i];
        const int good[] = {s->least, s->most};
        tr_config c = real;
        tr_err err = {0};
        if (s->there) put(&c, s->beside, s->there);
        for (int j = 0; j < 2; j++) {
            put(&c, s->at, good[j]);
            if (asked(s->backend, &c, &err) != TR_OK) fail_msg("%d: %s", good[j], err.text);
        }
        put(&c, s->at, s->too_much);
        assert_int_equal(asked(s->backend, &c, &err), TR_E_INPUT);
        snprintf(want, sizeof want, "config.json: %s", s->says);
        assert_string_equal(err.text, want);
    }
    tr_err err = {0};
    assert_int_equal(asked("abacus", &real, &err), TR_E_USAGE);
}

/* Heads whose rows of kv_b begin anywhere in a scale block: each has its own scales. */
static void heads_lie_anywhere_on_the_grid_of_scales(void **state)
{
    static const int nope[] = {2, 64, 100, 126}, v[] = {1, 64, 100, 128};
    (void)state;
    tr_config c = real;
    tr_err err = {0};
    for (size_t i = 0; i < sizeof nope / sizeof *nope; i++)
        for (size_t j = 0; j < sizeof v / sizeof *v; j++) {
            c.qk_nope_head_dim = nope[i], c.v_head_dim = v[j];
            assert_int_equal(asked("cpu", &c, &err), TR_OK);
            assert_int_equal(asked("cuda", &c, &err), TR_OK);
        }
}

/* Widths off the blocks of 128 are normed without codes, any number of them; experts count where there are layers of them. */
static void what_a_rank_has_not_does_not_count(void **state)
{
    (void)state;
    tr_config c = real;
    tr_err err = {0};
    c.hidden_size = 9000, c.q_lora_rank = 12345;
    assert_int_equal(asked("cuda", &c, &err), TR_OK);
    c = real;
    c.n_routed_experts = 4096;
    const tr_grid_sizes two = {2, 1, 1, 1, 1, 1, 1};
    static const int layers[] = {3, 58};
    for (int rank = 0; rank < 2; rank++) {
        tr_grid g = grid_of(two, rank);
        tr_slice s;
        g.stage_layers = layers;
        assert_int_equal(tr_slice_make(&s, &c, &g, &err), TR_OK);
        const tr_dims dims = tr_slice_dims(&c, &s, &two);
        assert_int_equal(dims.n_experts, rank ? 4096 : 0);
        assert_int_equal(tr_cpu_takes(&dims, &err), rank ? TR_E_INPUT : TR_OK);
    }
}

/* What options ask for is the command line's fault. */
static void grids_and_lengths_have_limits_too(void **state)
{
    (void)state;
    tr_err err = {0};
    for (int tp = 64; tp <= 128; tp += 64) {
        const tr_grid_sizes n = {1, 1, 1, tp, 1, tp, 1};
        const tr_slice s = slice_of(&real, n, tp - 1);
        const tr_dims dims = tr_slice_dims(&real, &s, &n);
        assert_int_equal(tr_cpu_takes(&dims, &err), TR_OK);
        assert_int_equal(tr_cuda_takes(&dims, &err), tp == 64 ? TR_OK : TR_E_USAGE);
    }
    assert_string_equal(err.text, "--tp 128: the CUDA backend takes at most 64");

    for (int dp = 16; dp <= 32; dp += 16) {
        const tr_grid_sizes n = {1, dp, 1, 1, 1, 64, dp};
        const tr_slice s = slice_of(&real, n, 0);
        tr_dims dims = tr_slice_dims(&real, &s, &n);
        assert_int_equal(tr_cuda_takes(&dims, &err), dp == 16 ? TR_OK : TR_E_USAGE);
    }
    assert_string_equal(err.text, "--ep times --moe-tp 2048: the CUDA backend takes at most 1024");

    const tr_slice s = slice_of(&real, alone, 0);
    tr_dims dims = tr_slice_dims(&real, &s, &alone);
    dims.max_context = 1 << 19;
    assert_int_equal(tr_cuda_takes(&dims, &err), TR_OK);
    dims.max_context++;
    assert_int_equal(tr_cpu_takes(&dims, &err), TR_OK);
    assert_int_equal(tr_cuda_takes(&dims, &err), TR_E_USAGE);
    assert_string_equal(err.text, "a sequence of 524289: the CUDA backend takes at most 524288");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_holds_everything),
        cmocka_unit_test(parts_cover_the_whole),
        cmocka_unit_test(given_layers_are_followed),
        cmocka_unit_test(odd_widths),
        cmocka_unit_test(other_rows_other_copies),
        cmocka_unit_test(misaligned_tensors_are_named),
        cmocka_unit_test(bad_grids_are_refused_with_every_reason),
        cmocka_unit_test(backends_say_what_they_cannot),
        cmocka_unit_test(heads_lie_anywhere_on_the_grid_of_scales),
        cmocka_unit_test(what_a_rank_has_not_does_not_count),
        cmocka_unit_test(grids_and_lengths_have_limits_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
