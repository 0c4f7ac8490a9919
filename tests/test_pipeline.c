/* Stages of a pipeline at work together: a whole engine of 2 and of 4 ranks in one process, where every layer takes a given time (a
 * nap, so that the load of the machine does not matter: where it does all the same the naps are made longer). With choices enough no stage waits while there is a step it could run:
 * the busiest one runs nearly always. Were the steps run one after the other it would run its share of the time alone. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/engine.h"
#include "fixture.h"
#include "ranks_world.h"
#include "vectors.h"

enum { N_SLOTS = 12, N_TOKENS = 10, MAX_LEN = 128 };

typedef struct rank_run {
    const tr_ranks_world *world;
    tr_comm *control;
    const char *dir;
    int rank, n_requests, failed;
    int nap_ms;   /* of a layer */
    int pause_ms; /* leader: before the last request comes */
    tr_watchdog *watch;
    tr_engine_stats stats;
} rank_run;

static void nap(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                size_t ld, void *data)
{
    const rank_run *r = ctx;
    const struct timespec ms = {.tv_nsec = r->nap_ms * 1000000L};

    (void)layer, (void)n_rows, (void)n_cols, (void)ld, (void)data;
    if (strcmp(name, "index_topk") == 0 && i_row == 0) nanosleep(&ms, NULL);
}

static tr_request *make_request(uint64_t id)
{
    tr_request *r = calloc(1, sizeof *r);

    assert_non_null(r);
    r->id = id;
    r->n_prompt = 3;
    r->prompt = calloc(r->n_prompt, sizeof *r->prompt);
    assert_non_null(r->prompt);
    for (size_t i = 0; i < r->n_prompt; i++)
        r->prompt[i] = (int32_t)(40 + 7 * id + i);
    r->params = (tr_params){.n = 1,
                            .key = id,
                            .top_p = 1,
                            .max_tokens = N_TOKENS,
                            .repetition = 1,
                            .ignore_eos = true,
                            .n_logprobs = -1,
                            .n_prompt_logprobs = -1};
    return r;
}

typedef struct feed {
    rank_run *r;
    tr_engine *engine;
} feed;

/* What the batch reader does, on a thread of its own. */
static void *submit_all(void *arg)
{
    const feed *f = arg;
    const struct timespec pause = {.tv_sec = f->r->pause_ms / 1000,
                                   .tv_nsec = f->r->pause_ms % 1000 * 1000000L};
    tr_err err = {0};

    for (int i = 0; i < f->r->n_requests; i++) {
        if (i == f->r->n_requests - 1) nanosleep(&pause, NULL);
        if (tr_engine_submit(f->engine, make_request((uint64_t)i), &err) != TR_OK) f->r->failed = 1;
    }
    tr_engine_close(f->engine);
    return NULL;
}

/* All requests through the engine. */
static int run_engine(rank_run *r, tr_engine *engine)
{
    feed f = {r, engine};
    pthread_t reader;
    tr_err err = {0};
    int n_done = 0;

    if (r->rank == 0 && pthread_create(&reader, NULL, submit_all, &f) != 0) return -1;
    tr_engine_watch(engine, r->watch);
    const tr_status st = tr_engine_run(engine, &err);
    if (r->rank == 0) pthread_join(reader, NULL);
    if (st != TR_OK) return -1;
    for (tr_event *e; tr_engine_take(engine, &e, 0) == 1; tr_event_free(e))
        n_done += e->kind == TR_EVENT_DONE;
    r->stats = tr_engine_stats_get(engine);
    return r->rank == 0 && n_done != r->n_requests ? -1 : 0;
}

static void *run_rank(void *arg)
{
    rank_run *r = arg;
    const tr_probe probe = {.ctx = r, .see = nap};
    const int n_stages = r->world->sizes.pp;
    const tr_fixture_options options = {.dir = r->dir,
                                        .kv_dtype = TR_F32,
                                        .n_threads = 1,
                                        .n_slots = N_SLOTS,
                                        .max_model_len = MAX_LEN,
                                        .rank = r->rank,
                                        .grid = r->world->sizes,
                                        .groups = &r->world->groups[r->rank]};
    const int reporter = r->world->n - 1; /* the last stage samples */
    const tr_engine_options eo = {.max_batch_tokens = 64,
                                  .max_sequences = N_SLOTS,
                                  .max_model_len = MAX_LEN,
                                  .ring = 2,
                                  .eos = -1,
                                  .bos = -1,
                                  .pad = -1,
                                  .is_leader = r->rank == 0,
                                  .n_stages = n_stages,
                                  .i_stage = r->world->grid[r->rank].at.pp,
                                  .reporter = &reporter};
    tr_engine *engine = NULL;
    tr_fixture f;
    tr_err err = {0};

    r->failed = 1;
    if (tr_fixture_open(&f, &options) != 0) return NULL;
    tr_model_set_probe(f.model, &probe);
    if (tr_engine_create(&engine, f.model, NULL, r->control, &eo, NULL, &f.regions, &err) == TR_OK)
        r->failed = run_engine(r, engine);
    tr_engine_free(engine);
    tr_fixture_close(&f);
    return NULL;
}

static tr_engine_stats run(int pp, int nap_ms, int n_requests, int pause_ms, tr_watchdog **watch)
{
    static tr_ranks_world w;
    rank_run ranks[TR_RANKS_WORLD_MAX];
    char path[512];

    assert_int_equal(
        tr_ranks_world_open(
            &w, (tr_grid_sizes){.pp = pp, .dp = 1, .cp = 1, .tp = 1, .mdp = 1, .ep = 1, .xt = 1}),
        0);
    tr_loopback *l = tr_loopback_create(pp);
    assert_non_null(l);
    for (int r = 0; r < pp; r++) {
        ranks[r] = (rank_run){.world = &w,
                              .control = tr_loopback_comm(l, r),
                              .dir = tr_source_path(path, sizeof path, "models/tiny"),
                              .rank = r,
                              .n_requests = n_requests,
                              .nap_ms = nap_ms,
                              .pause_ms = pause_ms,
                              .watch = watch ? watch[r] : NULL};
        assert_non_null(ranks[r].control);
    }
    assert_int_equal(tr_ranks_world_run(&w, run_rank, ranks, sizeof *ranks), 0);
    for (int r = 0; r < pp; r++) {
        assert_int_equal(ranks[r].failed, 0);
        tr_comm_free(ranks[r].control);
    }
    tr_loopback_free(l);
    tr_ranks_world_close(&w);
    return ranks[0].stats;
}

/* One after the other: 1 / pp of the time, with equal stages, however long a layer takes. Longer naps make what the machine
 * adds to them small. */
static void check(int pp, double least)
{
    double overlap = 0;

    for (int nap_ms = 8; nap_ms <= 128; nap_ms *= 4) {
        overlap = run(pp, nap_ms, N_SLOTS, 0, NULL).overlap;
        assert_true(overlap <= 1);
        if (overlap >= least) return;
    }
    fail_msg("%d stages: the busiest runs %.3f of the time in which all have work, not %.2f", pp,
             overlap, least);
}

static void test_two_stages(void **state)
{
    (void)state;
    check(2, 0.7);
}

static void test_four_stages(void **state)
{
    (void)state;
    check(4, 0.55);
}

/* One request cannot keep two stages busy: there is no such time. */
static void test_one_request(void **state)
{
    (void)state;
    const tr_engine_stats s = run(2, 8, 1, 0, NULL);
    assert_true(s.overlap == 0);
    assert_int_equal(s.finished, 1);
}

/* The leader waits for a request longer than a step may take: no rank is taken for one that hangs. (A watchdog that thinks so
 * ends the process.) The ranks' watchdogs believe each to be alone. */
static void test_rest(void **state)
{
    enum { N = 2, PAUSE_MS = 2800, TIMEOUT_S = 2 };
    tr_world world[N];
    tr_watchdog *watch[N];
    tr_err err = {0};

    for (int r = 0; r < N; r++) {
        world[r] = *(tr_world *)*state;
        assert_int_equal(tr_watchdog_start(&watch[r], &world[r], TIMEOUT_S, NULL, &err), TR_OK);
    }
    const tr_engine_stats s = run(N, 8, 2, PAUSE_MS, watch);
    assert_int_equal(s.finished, 2);
    for (int r = 0; r < N; r++)
        tr_watchdog_stop(watch[r]);
}

int main(void)
{
    tr_world world;
    tr_err err = {0};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_two_stages),
        cmocka_unit_test(test_four_stages),
        cmocka_unit_test(test_one_request),
        cmocka_unit_test_prestate(test_rest, &world),
    };
    if (tr_world_start(&world, &err) != TR_OK) fail_msg("%s", err.text);
    const int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_world_finish(TR_OK);
    return n_failed;
}
