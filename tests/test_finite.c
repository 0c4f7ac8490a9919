/* Where a row stopped being finite (model/finite.c): one number of one row is spoiled behind the embedding, a layer or the last
 * norm, and the token of the head row of that sequence must say where, on every rank that has the head; the sequence beside it gets
 * the tokens it gets alone. On one rank, and on several in one process (ranks_world.h). */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "fixture.h"
#include "ranks_world.h"
#include "vectors.h"

enum { N_EARLY = 9, N_LATE = 6, N = N_EARLY + N_LATE, N_SLOTS = 2 };

typedef struct spoil { /* what the probe does, once */
    const char *name;
    int layer;
    int step;       /* 0: the early rows, none of which reaches the head; 1: the late ones */
    int row;        /* of the step, on this rank; the first rows are slot 0's */
    float with;     /* NaN or an infinity */
    int32_t expect; /* token of slot 0's head row */
} spoil;

typedef struct rank_run {
    const tr_ranks_world *world; /* NULL: one rank */
    char dir[512];
    const spoil *spoils;
    int n_spoils, rank, only_rank, only_replica; /* -1: all */
    bool blind;                                  /* the model does not look */
    int failed;
    bool has_head, mine;
    int n_seen_rows; /* largest number of rows of a step */
    int32_t clean[N_SLOTS], token[8][N_SLOTS], after[N_SLOTS];
    /* The step that runs. */
    tr_fixture f;
    const spoil *now;
    int step;
} rank_run;

/* ---- one rank -------------------------------------------------------------------------------------------------------- */

static void see(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                size_t ld, void *data)
{
    rank_run *r = ctx;
    const spoil *s = r->now;

    if (!strcmp(name, "embed") && n_rows > r->n_seen_rows) r->n_seen_rows = n_rows;
    if (!s || !r->mine || s->step != r->step || strcmp(s->name, name) || s->layer != layer) return;
    if (s->row >= i_row && s->row < i_row + n_rows)
        ((float *)data)[(size_t)(s->row - i_row) * ld + (size_t)(n_cols - 1)] = s->with;
}

static int add_span(tr_fixture *f, int slot, int position, int n, int n_logits)
{
    const int32_t sample = -1;
    int32_t tokens[N];

    for (int i = 0; i < n; i++)
        tokens[i] = 30 + ((position + i) * 37 + slot * 11) % 300;
    const tr_span span = {.slot = slot,
                          .n_rows = n,
                          .position = position,
                          .i_token = tr_plan_add_tokens(f->builder, tokens, n),
                          .kind = TR_SPAN_PREFILL,
                          .owner = -1,
                          .n_logits = n_logits,
                          .flags = TR_SPAN_DENSE};
    if (span.i_token < 0 || tr_plan_add_span(f->builder, span) < 0) return -1;
    return n_logits && tr_plan_add_targets(f->builder, &sample, 1) < 0 ? -1 : 0;
}

/* Both prompts from their beginning, in two steps; the token of the last row of each. */
static int run_prompts(rank_run *r, const spoil *s, int32_t *token)
{
    tr_fixture *f = &r->f;
    int bad = 0;

    r->now = s;
    for (int slot = 0; slot < N_SLOTS && !bad; slot++)
        bad = tr_fixture_slot(f, slot, 0);
    for (r->step = 0; r->step < 2 && !bad; r->step++) {
        const int position = r->step ? N_EARLY : 0, n = r->step ? N_LATE : N_EARLY;
        tr_plan_begin(f->builder, f->n_steps++, 0);
        for (int slot = 0; slot < N_SLOTS && !bad; slot++)
            bad = add_span(f, slot, position, n, r->step);
        bad = bad || tr_fixture_forward(f, position + n);
    }
    if (!bad && f->slice.head) memcpy(token, f->step.out.token, N_SLOTS * sizeof *token);
    r->now = NULL;
    return bad;
}

static void *run_rank(void *arg)
{
    rank_run *r = arg;
    const tr_fixture_options options = {.dir = r->dir,
                                        .kv_dtype = TR_F32,
                                        .n_threads = 1,
                                        .rank = r->rank,
                                        .grid = r->world ? r->world->sizes
                                                         : (tr_grid_sizes){1, 1, 1, 1, 1, 1, 1},
                                        .groups = r->world ? &r->world->groups[r->rank] : NULL,
                                        .find_not_finite = !r->blind};
    const tr_probe probe = {.ctx = r, .see = see};

    r->failed = 1;
    if (tr_fixture_open(&r->f, &options) != 0) return NULL;
    const int replica = r->f.grid.at.dp;
    r->mine = (r->only_rank < 0 || r->only_rank == r->rank) &&
              (r->only_replica < 0 || r->only_replica == replica);
    r->has_head = r->f.slice.head;
    tr_model_set_probe(r->f.model, &probe);
    int bad = run_prompts(r, NULL, r->clean);
    for (int i = 0; i < r->n_spoils && !bad; i++)
        bad = run_prompts(r, &r->spoils[i], r->token[i]);
    bad = bad || run_prompts(r, NULL, r->after); /* slots that are opened anew are as new */
    tr_fixture_close(&r->f);
    r->failed = bad;
    return NULL;
}

/* ---- grids ------------------------------------------------------------------------------------------------------------ */

static void compare(const rank_run *r, bool spoiled)
{
    for (int i = 0; i < r->n_spoils; i++) {
        const int32_t expect = !spoiled   ? r->clean[0]
                               : r->blind ? TR_NOT_FINITE
                                          : r->spoils[i].expect;
        if (r->token[i][0] != expect)
            fail_msg("rank %d: %s %d: %d, not %d", r->rank, r->spoils[i].name, r->spoils[i].layer,
                     (int)r->token[i][0], (int)expect);
        assert_int_equal(r->token[i][1], r->clean[1]);
    }
    for (int slot = 0; slot < N_SLOTS; slot++) {
        assert_true(r->clean[slot] >= 0);
        assert_int_equal(r->after[slot], r->clean[slot]);
    }
}

static void set_up(rank_run *r, const spoil *spoils, int n)
{
    memset(r, 0, sizeof *r);
    tr_source_path(r->dir, sizeof r->dir, "models/tiny");
    r->spoils = spoils;
    r->n_spoils = n;
    r->only_rank = r->only_replica = -1;
}

/* The same spoils on every rank of the grid, or on one alone. most_rows: that a rank may have of a step. */
static void check_grid(tr_grid_sizes sizes, const spoil *spoils, int n, int only_rank,
                       int only_replica, int most_rows)
{
    static rank_run run[TR_RANKS_WORLD_MAX];
    static tr_ranks_world w;

    assert_int_equal(tr_ranks_world_open(&w, sizes), 0);
    for (int i = 0; i < w.n; i++) {
        set_up(&run[i], spoils, n);
        run[i].world = &w;
        run[i].rank = i;
        run[i].only_rank = only_rank;
        run[i].only_replica = only_replica;
    }
    assert_int_equal(tr_ranks_world_run(&w, run_rank, run, sizeof *run), 0);
    for (int i = 0; i < w.n; i++) {
        assert_int_equal(run[i].failed, 0);
        assert_true(run[i].n_seen_rows <= most_rows);
        if (run[i].has_head) compare(&run[i], only_replica < 0 || run[i].mine);
    }
    tr_ranks_world_close(&w);
}

/* What each place is called. Row 2 of the early step and row 1 of the late one are slot 0's; the head row is its last. */
static const spoil places[] = {
    {"embed", -1, 0, 2, NAN, TR_NOT_FINITE_EMBEDDING},
    {"embed", -1, 1, N_LATE - 1, INFINITY, TR_NOT_FINITE_EMBEDDING},
    {"hidden", 0, 0, 2, -INFINITY, TR_NOT_FINITE_LAYER_0},
    {"hidden", 0, 1, 1, NAN, TR_NOT_FINITE_LAYER_0},
    {"hidden", 2, 0, 2, NAN, TR_NOT_FINITE_LAYER_0 - 2},
    {"hidden", 2, 1, N_LATE - 1, INFINITY, TR_NOT_FINITE_LAYER_0 - 2},
    {"final", -1, 1, N_LATE - 1, NAN, TR_NOT_FINITE_HEAD},
};
enum { N_PLACES = sizeof places / sizeof *places };

static void test_one_rank(void **state)
{
    static rank_run r;
    (void)state;

    for (int blind = 0; blind < 2; blind++) {
        set_up(&r, places, N_PLACES);
        r.blind = blind;
        run_rank(&r);
        assert_int_equal(r.failed, 0);
        compare(&r, true);
    }
}

static void test_stages(void **state)
{
    (void)state;
    check_grid((tr_grid_sizes){.pp = 2, .dp = 1, .cp = 1, .tp = 1, .mdp = 1, .ep = 1, .xt = 1},
               places, N_PLACES, -1, -1, N_SLOTS * N_EARLY);
}

static void test_heads(void **state)
{
    (void)state;
    check_grid((tr_grid_sizes){.pp = 1, .dp = 1, .cp = 1, .tp = 2, .mdp = 1, .ep = 2, .xt = 1},
               places, N_PLACES, -1, -1, N_SLOTS * N_EARLY);
}

static void test_stages_of_heads(void **state)
{
    (void)state;
    check_grid((tr_grid_sizes){.pp = 2, .dp = 1, .cp = 1, .tp = 2, .mdp = 1, .ep = 2, .xt = 1},
               places, N_PLACES, -1, -1, N_SLOTS * N_EARLY);
}

/* One replica's request alone fails, though the other one's experts computed its rows. */
static void test_replicas(void **state)
{
    (void)state;
    check_grid((tr_grid_sizes){.pp = 1, .dp = 2, .cp = 1, .tp = 1, .mdp = 1, .ep = 2, .xt = 1},
               places, N_PLACES, -1, 1, N_SLOTS * N_EARLY);
}

/* The member that has the row is not the one that has the head row: both must know. */
static void test_context(void **state)
{
    static const spoil some[] = {
        {"embed", -1, 0, 0, NAN, TR_NOT_FINITE_EMBEDDING},
        {"hidden", 1, 0, 1, NAN, TR_NOT_FINITE_LAYER_0 - 1},
        {"hidden", 2, 1, 0, INFINITY, TR_NOT_FINITE_LAYER_0 - 2},
    };
    (void)state;
    for (int member = 0; member < 2; member++) {
        check_grid((tr_grid_sizes){.pp = 1, .dp = 1, .cp = 2, .tp = 1, .mdp = 1, .ep = 2, .xt = 1},
                   some, 3, member, -1, N_EARLY);
        check_grid((tr_grid_sizes){.pp = 2, .dp = 1, .cp = 2, .tp = 1, .mdp = 1, .ep = 2, .xt = 1},
                   some, 1, member, -1, N_EARLY);
    }
}

/* ---- the stage before -------------------------------------------------------------------------------------------------- */

typedef struct pair { /* rank 0 sends what it likes, rank 1 is a last stage */
    const tr_ranks_world *world;
    int rank;
    uint64_t word;
    char dir[512];
    int failed; /* to run at all */
    tr_status st;
    tr_err err;
    int32_t token;
} pair;

static int send_step(pair *p)
{
    static float rows[N_EARLY * 256];
    uint64_t words[4] = {p->word};
    tr_comm *pp = p->world->groups[0].pp;
    tr_ticket a, b;

    for (int i = 0; i < N_EARLY * 256; i++)
        rows[i] = 0.01f * (float)(i % 17);
    return tr_comm_send(pp, 1, rows, sizeof rows, &a, &p->err) ||
           tr_comm_send(pp, 1, words, sizeof words, &b, &p->err) ||
           tr_comm_wait(pp, TR_LANE_MAIN, a, &p->err) || tr_comm_wait(pp, TR_LANE_MAIN, b, &p->err);
}

static int receive_step(pair *p)
{
    const tr_fixture_options options = {.dir = p->dir,
                                        .kv_dtype = TR_F32,
                                        .n_threads = 1,
                                        .rank = 1,
                                        .grid = p->world->sizes,
                                        .groups = &p->world->groups[1],
                                        .find_not_finite = true};
    tr_fixture f;
    int bad = tr_fixture_open(&f, &options) != 0 || tr_fixture_slot(&f, 0, 0) != 0;

    if (!bad) {
        tr_plan_begin(f.builder, f.n_steps++, 0);
        bad = add_span(&f, 0, 0, N_EARLY, 1);
        f.step.plan = tr_plan_seal(f.builder, N_EARLY);
        p->st = tr_model_forward(f.model, &f.step, &p->err);
        if (p->st == TR_OK) p->token = f.step.out.token[0];
    }
    tr_fixture_close(&f);
    return bad;
}

static void *run_one_of_pair(void *arg)
{
    pair *p = arg;
    p->failed = p->rank ? receive_step(p) : send_step(p);
    return NULL;
}

static void check_word(uint64_t word, pair *last)
{
    static tr_ranks_world w;
    pair p[2] = {{.rank = 0}, {.rank = 1}};

    assert_int_equal(
        tr_ranks_world_open(
            &w, (tr_grid_sizes){.pp = 2, .dp = 1, .cp = 1, .tp = 1, .mdp = 1, .ep = 1, .xt = 1}),
        0);
    for (int i = 0; i < 2; i++) {
        p[i].world = &w;
        p[i].word = word;
        tr_source_path(p[i].dir, sizeof p[i].dir, "models/tiny");
    }
    assert_int_equal(tr_ranks_world_run(&w, run_one_of_pair, p, sizeof *p), 0);
    assert_int_equal(p[0].failed || p[1].failed, 0);
    tr_ranks_world_close(&w);
    *last = p[1];
}

static void test_what_comes(void **state)
{
    pair p;
    (void)state;

    check_word(0, &p);
    assert_int_equal(p.st, TR_OK);
    assert_true(p.token >= 0);
    check_word(TR_LAYERS_MAX + 1, &p); /* the rows are finite again: nothing is said of them */
    assert_int_equal(p.st, TR_OK);
    assert_true(p.token >= 0);
    const uint64_t bad[] = {TR_LAYERS_MAX + 2, UINT64_MAX};
    for (int i = 0; i < 2; i++) {
        check_word(bad[i], &p);
        assert_int_equal(p.st, TR_E_COMM);
        assert_non_null(strstr(p.err.text, "the stage before says"));
        assert_non_null(strstr(p.err.text, "slot 0"));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_rank),   cmocka_unit_test(test_stages),
        cmocka_unit_test(test_heads),      cmocka_unit_test(test_stages_of_heads),
        cmocka_unit_test(test_replicas),   cmocka_unit_test(test_context),
        cmocka_unit_test(test_what_comes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
