/* The numbers of a request do not depend on who else is in the step (architecture.md 4), on several ranks: the same prompt and
 * the same generated row, first alone, then behind rows of another request, so that other members of its attention group take
 * its rows to the experts. To the last bit. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "fixture.h"
#include "ranks_world.h"
#include "vectors.h"

enum { N_PROMPT = 21, N_OTHER = 3 };

typedef struct rank_run {
    const tr_ranks_world *world;
    const char *dir;
    int rank, failed;
    float alone[N_PROMPT + 1], among[N_PROMPT + 1]; /* log-probabilities */
} rank_run;

static int add_span(tr_fixture *f, int slot, const int32_t *tokens, int position, int n,
                    const int32_t *targets)
{
    const int i_token = tr_plan_add_tokens(f->builder, tokens, n);
    const tr_span span = {.slot = slot,
                          .n_rows = n,
                          .position = position,
                          .i_token = i_token,
                          .kind = position ? TR_SPAN_DECODE : TR_SPAN_PREFILL,
                          .owner = -1,
                          .n_logits = n,
                          .flags = position ? 0 : TR_SPAN_DENSE};

    if (i_token < 0 || tr_plan_add_span(f->builder, span) < 0) return -1;
    return tr_plan_add_targets(f->builder, targets, n) < 0 ? -1 : 0;
}

/* Rows [position, position + n) of a slot, behind as many rows of slot 2 as `others`; log-probabilities of the targets. */
static int run_step(tr_fixture *f, int slot, const int32_t *tokens, int position, int n, int others,
                    float *logprob)
{
    static const int32_t stranger[] = {77, 400, 123, 9, 301};
    const int at = position ? N_OTHER : 0;

    tr_plan_begin(f->builder, f->n_steps++, TR_PLAN_HAS_SCORES);
    if (others && add_span(f, 2, stranger + at, at, others, stranger + at + 1)) return -1;
    if (add_span(f, slot, tokens + position, position, n, tokens + position + 1)) return -1;
    if (tr_fixture_forward(f, position + n)) return -1;
    memcpy(logprob, f->step.out.logprob + others, (size_t)n * sizeof *logprob);
    return 0;
}

static void *run_rank(void *arg)
{
    rank_run *r = arg;
    const tr_fixture_options options = {.dir = r->dir,
                                        .kv_dtype = TR_F32,
                                        .n_threads = 1,
                                        .rank = r->rank,
                                        .grid = r->world->sizes,
                                        .groups = &r->world->groups[r->rank]};
    int32_t tokens[N_PROMPT + 2];
    tr_fixture f;
    int bad = 0;

    r->failed = 1;
    for (int i = 0; i < N_PROMPT + 2; i++)
        tokens[i] = 30 + (i * 37 + 11) % 300;
    if (tr_fixture_open(&f, &options) != 0) return NULL;
    for (int slot = 0; slot < 3; slot++)
        bad = bad || tr_fixture_slot(&f, slot, 0);
    bad = bad || run_step(&f, 0, tokens, 0, N_PROMPT, 0, r->alone);
    bad = bad || run_step(&f, 0, tokens, N_PROMPT, 1, 0, r->alone + N_PROMPT);
    bad = bad || run_step(&f, 1, tokens, 0, N_PROMPT, N_OTHER, r->among);
    bad = bad || run_step(&f, 1, tokens, N_PROMPT, 1, 1, r->among + N_PROMPT);
    tr_fixture_close(&f);
    r->failed = bad;
    return NULL;
}

static void check(tr_grid_sizes sizes)
{
    static tr_ranks_world w;
    rank_run run[TR_RANKS_WORLD_MAX];
    char path[512];

    assert_int_equal(tr_ranks_world_open(&w, sizes), 0);
    for (int r = 0; r < w.n; r++)
        run[r] = (rank_run){
            .world = &w, .dir = tr_source_path(path, sizeof path, "models/tiny"), .rank = r};
    assert_int_equal(tr_ranks_world_run(&w, run_rank, run, sizeof *run), 0);
    for (int r = 0; r < w.n; r++) {
        assert_int_equal(run[r].failed, 0);
        for (int i = 0; i <= N_PROMPT; i++) {
            assert_true(run[r].alone[i] < 0);
            if (memcmp(&run[r].alone[i], &run[r].among[i], sizeof(float)))
                fail_msg("dp %d cp %d tp %d, rank %d: row %d: %.9g alone, %.9g among others",
                         sizes.dp, sizes.cp, sizes.tp, r, i, (double)run[r].alone[i],
                         (double)run[r].among[i]);
        }
    }
    tr_ranks_world_close(&w);
}

static void test_replicas(void **state)
{
    (void)state;
    check((tr_grid_sizes){.pp = 1, .dp = 2, .cp = 1, .tp = 2, .mdp = 1, .ep = 4, .xt = 1});
}

static void test_four_members(void **state)
{
    (void)state;
    check((tr_grid_sizes){.pp = 1, .dp = 2, .cp = 1, .tp = 4, .mdp = 1, .ep = 8, .xt = 1});
}

static void test_context(void **state)
{
    (void)state;
    check((tr_grid_sizes){.pp = 1, .dp = 1, .cp = 2, .tp = 2, .mdp = 1, .ep = 4, .xt = 1});
}

static void test_width(void **state)
{
    (void)state;
    check((tr_grid_sizes){.pp = 1, .dp = 1, .cp = 2, .tp = 2, .mdp = 1, .ep = 2, .xt = 2});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_replicas),
        cmocka_unit_test(test_four_members),
        cmocka_unit_test(test_context),
        cmocka_unit_test(test_width),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
