/* Several ranks of one model in one process: a thread each, groups over loop-backs (ranks_world.h). The model's code is the one
 * every rank runs; what one rank alone computes is the reference. Where a sum is cut over ranks (tp, ep, moe-tp) its terms are added
 * in another order: log-probabilities may move by rounding, chosen tokens and selected sets may not. Where none is cut
 * (context, data and pipeline parallelism with whole experts) every bit must be the same. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "ranks_world.h"
#include "vectors.h"

enum {
    N_TOKENS = 150, /* of replica 0; each replica has 17 fewer than the one before */
    N_DECODE = 6,   /* the last ones, one at a time */
    CHUNK = 40,     /* prompt rows of a step */
    TOPK = 16,      /* of both models: the first rows are dense, the others select */
    MOST_LAYERS = 4,
    MOST_EXPERTS = 8,
};

static const tr_grid_sizes alone = {1, 1, 1, 1, 1, 1, 1};

typedef struct result { /* of one replica, by position */
    int n;
    int32_t argmax[N_TOKENS];
    float logprob[N_TOKENS];
    int32_t selected[MOST_LAYERS][N_TOKENS][TOPK];
    float margin[MOST_LAYERS][N_TOKENS]; /* of the last selected score over the best one left out */
    int n_seen[MOST_LAYERS]
              [N_TOKENS]; /* how often a selection was shown: once, or not computed here */
    bool somebody_chose_nobody[MOST_LAYERS]; /* an expert without a row in some step */
} result;

typedef struct rank_run {
    const char *dir;
    int rank;
    tr_grid_sizes sizes;
    const tr_groups *groups; /* NULL: alone */
    tr_cp_mode mode;
    bool no_overlap;
    int replica;
    result *out;
    bool has_head;
    uint64_t calls[4]; /* of tp, cp, moe, pp: anything */
    size_t weight_bytes;
    int failed;
    /* The step that runs. */
    tr_fixture f;
    int position, n;
    bool decode;
} rank_run;

static int tokens_of(int replica)
{
    return N_TOKENS - 17 * replica;
}

static int32_t token_at(int replica, int i)
{
    return (i * 37 + 11 + 53 * replica) % 120;
}

/* ---- what the probe shows ------------------------------------------------------------------------ */

/* The position of a local row of this step. */
static int position_of(const rank_run *r, int row)
{
    tr_layout_span span = {.n = r->n, .decode = r->decode};
    tr_layout l;

    tr_layout_make(&l, r->mode, r->sizes.cp, &span, 1);
    return r->position + tr_layout_token(&l, r->rank / r->sizes.tp % r->sizes.cp, row);
}

static int descending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

static void keep_margin(rank_run *r, int layer, int row, const float *score)
{
    const int position = position_of(r, row);
    float sorted[N_TOKENS];

    r->out->margin[layer][position] = 0;
    if (position < TOPK) return;
    memcpy(sorted, score, (size_t)(position + 1) * sizeof *sorted);
    qsort(sorted, (size_t)position + 1, sizeof *sorted, descending);
    r->out->margin[layer][position] =
        (sorted[TOPK - 1] - sorted[TOPK]) / fmaxf(fabsf(sorted[TOPK - 1]), 1e-6f);
}

static void note_experts(rank_run *r, int layer, const int32_t *expert, int n)
{
    bool chosen[MOST_EXPERTS] = {false};

    for (int i = 0; i < n; i++)
        chosen[expert[i]] = true;
    for (int e = 0; e < r->f.config.n_routed_experts; e++)
        if (!chosen[e]) r->out->somebody_chose_nobody[layer] = true;
}

static void see(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                size_t ld, void *data)
{
    rank_run *r = ctx;

    if (strcmp(name, "index_logits") == 0)
        for (int i = 0; i < n_rows && !r->groups; i++)
            keep_margin(r, layer, i_row + i, (const float *)data + (size_t)i * ld);
    if (strcmp(name, "index_topk") == 0)
        for (int i = 0; i < n_rows; i++) {
            const int position = position_of(r, i_row + i);
            memcpy(r->out->selected[layer][position], (const int32_t *)data + (size_t)i * ld,
                   TOPK * sizeof(int32_t));
            r->out->n_seen[layer][position]++;
        }
    if (strcmp(name, "router_experts") == 0 && n_rows > 0)
        note_experts(r, layer, data, n_rows * n_cols);
}

/* ---- one rank -------------------------------------------------------------------------------------- */

/* Rows [i, i + n); every one reaches the head. */
static int run_rows(rank_run *r, int i, int n, bool decode)
{
    int32_t tokens[N_TOKENS];

    r->position = i;
    r->n = n;
    r->decode = decode;
    r->f.kind = decode ? TR_SPAN_DECODE : TR_SPAN_PREFILL;
    for (int k = 0; k < n; k++)
        tokens[k] = token_at(r->replica, i + k);
    return tr_fixture_run(&r->f, 0, tokens, i, n, n, decode ? TR_FORM_ABSORBED : TR_FORM_AUTO, NULL,
                          r->out->argmax + i, r->out->logprob + i);
}

/* The steps of replica 0, which has most rows; whoever has none left takes part with none. */
static int run_steps(rank_run *r)
{
    const int n = tokens_of(r->replica), n_prompt = n - N_DECODE;
    int bad = tr_fixture_slot(&r->f, 0, 0), i = 0;

    for (int at = 0; at < N_TOKENS - N_DECODE && !bad; at += at ? CHUNK : TOPK) {
        const int most = at ? CHUNK : TOPK, rows = n_prompt - i < most ? n_prompt - i : most;
        bad = rows > 0 ? run_rows(r, i, rows, false) : tr_fixture_slot(&r->f, 1, 0);
        i += rows;
    }
    for (; i < n && !bad; i++)
        bad = run_rows(r, i, 1, true);
    r->out->n = n;
    return bad;
}

static void *run_rank(void *arg)
{
    rank_run *r = arg;
    const tr_fixture_options options = {.dir = r->dir,
                                        .kv_dtype = TR_F32,
                                        .n_threads = 1,
                                        .rank = r->rank,
                                        .grid = r->sizes,
                                        .groups = r->groups,
                                        .cp_mode = r->mode,
                                        .no_overlap = r->no_overlap};
    const tr_probe probe = {.ctx = r, .see = see};

    r->failed = 1;
    r->out = calloc(1, sizeof *r->out);
    if (!r->out || tr_fixture_open(&r->f, &options) != 0) return NULL;
    r->has_head = r->f.slice.head;
    r->weight_bytes = r->f.weights->bytes;
    r->f.flags = TR_PLAN_HAS_SCORES;
    tr_model_set_probe(r->f.model, &probe);
    const int bad = run_steps(r);
    if (r->groups) {
        tr_comm *const of[] = {r->groups->attn_tp, r->groups->attn_cp, r->groups->moe,
                               r->groups->pp};
        for (int g = 0; g < 4; g++)
            for (int op = 0; op < TR_COMM_N_OPS; op++) {
                uint64_t calls, bytes;
                tr_comm_counts(of[g], (tr_comm_op)op, &calls, &bytes);
                if (tr_comm_size(of[g]) > 1) r->calls[g] += calls;
            }
    }
    tr_fixture_close(&r->f);
    r->failed = bad;
    return NULL;
}

/* ---- comparison --------------------------------------------------------------------------------------- */

static char grid_name[160];

static void name_grid(const char *set, tr_grid_sizes s, tr_cp_mode mode)
{
    snprintf(grid_name, sizeof grid_name, "%s, pp %d dp %d cp %d%s tp %d, ep %d moe-tp %d", set,
             s.pp, s.dp, s.cp, s.cp > 1 ? mode == TR_CP_ZIGZAG ? " zigzag" : " interleave" : "",
             s.tp, s.ep, s.xt);
}

static void compare_head(const rank_run *r, const result *one, bool exact)
{
    double worst = 0;

    assert_memory_equal(r->out->argmax, one->argmax, (size_t)one->n * sizeof *one->argmax);
    for (int i = 0; i < one->n; i++)
        worst = fmax(worst, fabs((double)r->out->logprob[i] - (double)one->logprob[i]));
    if (exact ? memcmp(r->out->logprob, one->logprob, (size_t)one->n * sizeof(float)) != 0
              : !(worst <= 1e-5))
        fail_msg("%s, rank %d: log-probabilities off by %g", grid_name, r->rank, worst);
}

/* Every selection that was made here, against one rank's: the same set wherever rounding cannot have changed it. Returns how many
 * there were. */
static int compare_selected(const rank_run *r, const result *one, bool exact)
{
    int n = 0;

    for (int layer = 0; layer < MOST_LAYERS; layer++)
        for (int i = TOPK; i < one->n; i++) {
            if (!r->out->n_seen[layer][i]) continue;
            assert_int_equal(r->out->n_seen[layer][i], 1);
            n++;
            if (!exact && one->margin[layer][i] < 1e-4f) continue;
            if (memcmp(r->out->selected[layer][i], one->selected[layer][i], TOPK * sizeof(int32_t)))
                fail_msg("%s, rank %d: layer %d selects other keys for position %d (margin %g)",
                         grid_name, r->rank, layer, i, (double)one->margin[layer][i]);
        }
    return n;
}

/* Two ranks of one run that computed the same rows agree to the bit: the sums run over members in rank order. */
static void compare_ranks(const rank_run *a, const rank_run *b)
{
    for (int layer = 0; layer < MOST_LAYERS; layer++)
        for (int i = 0; i < a->out->n; i++)
            if (a->out->n_seen[layer][i] && b->out->n_seen[layer][i])
                assert_memory_equal(a->out->selected[layer][i], b->out->selected[layer][i],
                                    TOPK * sizeof(int32_t));
    if (!a->has_head || !b->has_head) return;
    assert_memory_equal(a->out->argmax, b->out->argmax, (size_t)a->out->n * sizeof(int32_t));
    assert_memory_equal(a->out->logprob, b->out->logprob, (size_t)a->out->n * sizeof(float));
}

/* Every position's selection was made in every layer: by every rank of a stage's replica together. */
static void check_complete(const rank_run *run, int n_ranks, int n_layers)
{
    for (int layer = 0; layer < n_layers; layer++)
        for (int d = 0; d < run[0].sizes.dp; d++)
            for (int i = TOPK; i < tokens_of(d); i++) {
                int n = 0;
                for (int k = 0; k < n_ranks; k++)
                    if (run[k].replica == d) n += run[k].out->n_seen[layer][i];
                /* A prompt row is one member's (and its tp peers'), a decode row everybody's. */
                const int members =
                    i < tokens_of(d) - N_DECODE && n < run[0].sizes.cp * run[0].sizes.tp
                        ? run[0].sizes.tp
                        : run[0].sizes.cp * run[0].sizes.tp;
                if (n != members)
                    fail_msg("%s: layer %d, position %d: selected %d times, not %d", grid_name,
                             layer, i, n, members);
            }
}

typedef struct reference {
    const char *set, *dir;
    rank_run run[2]; /* of replica 0, 1 */
    int n_layers;
    char path[512];
} reference;

static void open_reference(reference *ref, const char *set)
{
    char name[64];

    *ref = (reference){.set = set};
    snprintf(name, sizeof name, "model/%s", set);
    ref->dir = tr_vector_path(ref->path, sizeof ref->path, name);
    for (int d = 0; d < 2; d++) {
        rank_run *r = &ref->run[d];
        *r = (rank_run){.dir = ref->dir, .sizes = alone, .replica = d};
        run_rank(r);
        assert_int_equal(r->failed, 0);
        int n_tight = 0, n = 0;
        for (int layer = 0; layer < MOST_LAYERS; layer++)
            for (int i = TOPK; i < r->out->n; i++) {
                if (!r->out->n_seen[layer][i]) continue;
                ref->n_layers = layer + 1;
                n++;
                n_tight += r->out->margin[layer][i] < 1e-4f;
            }
        assert_int_equal(n, ref->n_layers * (tokens_of(d) - TOPK));
        assert_true(n_tight < n / 10); /* hardly a comparison is left out */
    }
}

static void close_reference(reference *ref)
{
    for (int d = 0; d < 2; d++)
        free(ref->run[d].out);
}

/* The ranks of a grid; their results are the caller's to free. */
static void run_grid(const reference *ref, tr_grid_sizes sizes, tr_cp_mode mode, bool no_overlap,
                     rank_run *run)
{
    static tr_ranks_world w;

    name_grid(ref->set, sizes, mode);
    assert_int_equal(tr_ranks_world_open(&w, sizes), 0);
    for (int r = 0; r < w.n; r++)
        run[r] = (rank_run){.dir = ref->dir,
                            .rank = r,
                            .sizes = sizes,
                            .groups = &w.groups[r],
                            .mode = mode,
                            .no_overlap = no_overlap,
                            .replica = w.grid[r].at.dp};
    assert_int_equal(tr_ranks_world_run(&w, run_rank, run, sizeof *run), 0);
    for (int r = 0; r < w.n; r++) {
        if (run[r].failed) fail_msg("%s: rank %d failed", grid_name, r);
        for (int g = 0; g < 4; g++) { /* what has members was used */
            const int size[] = {sizes.tp, sizes.cp, sizes.ep * sizes.xt, sizes.pp};
            assert_true((run[r].calls[g] > 0) == (size[g] > 1) || g == 2);
        }
    }
    tr_ranks_world_close(&w);
}

static int ranks_of(tr_grid_sizes s)
{
    return s.pp * s.dp * s.cp * s.tp;
}

static void check_mode(const reference *ref, tr_grid_sizes sizes, tr_cp_mode mode)
{
    const bool exact = sizes.tp == 1 && sizes.ep == 1 && sizes.xt == 1;
    rank_run run[TR_RANKS_WORLD_MAX], plain[TR_RANKS_WORLD_MAX];
    int n_selected = 0, n_heads = 0;

    run_grid(ref, sizes, mode, true, plain);
    run_grid(ref, sizes, mode, false, run);
    for (int r = 0; r < ranks_of(sizes); r++) {
        const result *one = ref->run[run[r].replica].out;
        assert_true(sizes.tp * sizes.ep * sizes.xt * sizes.pp == 1 ||
                    run[r].weight_bytes < ref->run[0].weight_bytes);
        if (run[r].has_head) compare_head(&run[r], one, exact);
        n_heads += run[r].has_head;
        n_selected += compare_selected(&run[r], one, exact);
        for (int k = 0; k < r; k++)
            if (run[k].replica == run[r].replica) compare_ranks(&run[k], &run[r]);
        /* --no-overlap: the same rows in the same steps, to the bit. */
        assert_memory_equal(run[r].out->selected, plain[r].out->selected,
                            sizeof run[r].out->selected);
        if (run[r].has_head)
            assert_memory_equal(run[r].out->logprob, plain[r].out->logprob,
                                (size_t)one->n * sizeof(float));
    }
    assert_int_equal(n_heads, ranks_of(sizes) / sizes.pp);
    assert_true(n_selected > 0);
    check_complete(run, ranks_of(sizes), ref->n_layers);
    for (int r = 0; r < ranks_of(sizes); r++) {
        free(run[r].out);
        free(plain[r].out);
    }
}

static void check(const reference *ref, tr_grid_sizes sizes)
{
    check_mode(ref, sizes, TR_CP_INTERLEAVE);
    if (sizes.cp > 1) check_mode(ref, sizes, TR_CP_ZIGZAG);
}

/* ---- tests ---------------------------------------------------------------------------------------- */

static reference tiny, realgeom;

static int setup(void **state)
{
    (void)state;
    open_reference(&tiny, "tiny");
    open_reference(&realgeom, "realgeom");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    close_reference(&tiny);
    close_reference(&realgeom);
    return 0;
}

/* pp, dp, cp, tp, mdp, ep, xt */

static void heads_and_experts(void **state)
{
    (void)state;
    check(&tiny, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1});
    check(&realgeom, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1});
    check(&tiny, (tr_grid_sizes){1, 1, 1, 4, 1, 4, 1});
}

static void width_of_experts(void **state)
{
    (void)state;
    check(&tiny, (tr_grid_sizes){1, 1, 1, 2, 1, 1, 2});
    check(&realgeom, (tr_grid_sizes){1, 1, 1, 2, 1, 1, 2});
    check(&tiny, (tr_grid_sizes){1, 1, 1, 4, 1, 2, 2});
    check(&tiny, (tr_grid_sizes){1, 2, 1, 1, 1, 1, 2});
}

static void stages(void **state)
{
    (void)state;
    check(&tiny, (tr_grid_sizes){2, 1, 1, 1, 1, 1, 1});
    check(&tiny, (tr_grid_sizes){4, 1, 1, 1, 1, 1, 1});
    check(&tiny, (tr_grid_sizes){2, 1, 1, 2, 1, 2, 1});
}

static void rows_of_prompts(void **state)
{
    (void)state;
    check(&tiny, (tr_grid_sizes){1, 1, 2, 1, 2, 1, 1});
    check(&realgeom, (tr_grid_sizes){1, 1, 2, 1, 2, 1, 1});
    check(&tiny, (tr_grid_sizes){1, 1, 3, 1, 3, 1, 1});
    check(&tiny, (tr_grid_sizes){1, 1, 8, 1, 8, 1, 1}); /* 16 rows of the first step: two each */
    check(&tiny, (tr_grid_sizes){2, 1, 2, 1, 2, 1, 1});
}

/* Two replicas, of which one runs out of rows before the other: its experts still serve. */
static void replicas_share_experts(void **state)
{
    (void)state;
    check(&tiny, (tr_grid_sizes){1, 2, 1, 1, 2, 1, 1});
    check(&tiny, (tr_grid_sizes){1, 2, 1, 1, 1, 2, 1});
    check(&realgeom, (tr_grid_sizes){1, 2, 1, 1, 1, 2, 1});
    check(&tiny, (tr_grid_sizes){1, 2, 1, 2, 1, 4, 1});
    check(&tiny, (tr_grid_sizes){1, 2, 1, 2, 2, 2, 1});
    check(&tiny, (tr_grid_sizes){2, 2, 1, 1, 1, 2, 1});
    check(&tiny, (tr_grid_sizes){1, 2, 2, 1, 1, 4, 1});
}

/* SG#20360: garbage with CP = 2 and TP = 4, three collectives wrong. Every (cp, tp) split of 8 that 4 heads allow. */
static void every_split_of_eight(void **state)
{
    (void)state;
    check(&tiny, (tr_grid_sizes){1, 1, 2, 4, 1, 8, 1});
    check(&tiny, (tr_grid_sizes){1, 1, 4, 2, 1, 8, 1});
    check(&tiny, (tr_grid_sizes){1, 1, 8, 1, 1, 8, 1});
    check(&tiny, (tr_grid_sizes){1, 1, 2, 4, 2, 4, 1});
    check(&tiny, (tr_grid_sizes){1, 1, 2, 2, 1, 2, 2});
}

/* The tests above would not see an expert without rows go wrong if there were none. */
static void some_experts_got_nobody(void **state)
{
    int n = 0;

    (void)state;
    for (int layer = 0; layer < MOST_LAYERS; layer++)
        n += tiny.run[0].out->somebody_chose_nobody[layer];
    assert_true(n > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(heads_and_experts),
        cmocka_unit_test(width_of_experts),
        cmocka_unit_test(stages),
        cmocka_unit_test(rows_of_prompts),
        cmocka_unit_test(replicas_share_experts),
        cmocka_unit_test(every_split_of_eight),
        cmocka_unit_test(some_experts_got_nobody),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
