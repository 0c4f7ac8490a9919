/* The engine with the trained checkpoint: what a request gets does not depend on its neighbours, on how its prompt is cut, on
 * preemption, on how many steps are in flight, on the number of threads or on what others left in the prefix cache, to the last
 * bit. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "fixture.h"
#include "mpi/flight.h"
#include "mpi/start.h"
#include "mpi/watchdog.h"
#include "vectors.h"

enum { N_REQUESTS = 16, MAX_LEN = 1024, PROMPT_LEN = 184, EOS = 2026 };

typedef struct setting { /* of one run; 0: the default */
    tr_dtype dtype;
    int max_batch_tokens, ring, n_threads, n_pages;
    uint64_t only; /* this request alone; 0: all (ids count from 1) */
    bool shared;   /* the requests that begin alike */
    bool no_cache;
    tr_watchdog *watch;
    tr_engine_observer observer;
    tr_engine **engine; /* where it is to be found meanwhile */
} setting;

typedef struct result {
    int n_choices;
    tr_event *event;
} result;

static json_t *cases;

static tr_request *make_request(uint64_t id)
{
    const json_t *c = json_array_get(cases, (id - 1) % json_array_size(cases));
    const json_t *ids = json_object_get(c, "prompt_ids");
    tr_request *r = calloc(1, sizeof *r);
    assert_non_null(r);
    r->id = id;
    /* The last 184 tokens: past index_topk, and the answer needs another page; one request has all of its 600. */
    const size_t n = json_array_size(ids), skip = id == 6 || n < PROMPT_LEN ? 0 : n - PROMPT_LEN;
    r->n_prompt = n - skip;
    r->prompt = malloc(r->n_prompt * sizeof *r->prompt);
    assert_non_null(r->prompt);
    for (size_t i = 0; i < r->n_prompt; i++)
        r->prompt[i] = (int32_t)json_integer_value(json_array_get(ids, skip + i));
    r->params = (tr_params){.n = 1,
                            .key = id * 77,
                            .temperature = 1,
                            .top_p = 0.95f,
                            .max_tokens = 24,
                            .repetition = 1,
                            .ignore_eos = id % 2 == 0,
                            .n_logprobs = 3,
                            .n_prompt_logprobs = -1};
    switch (id % 8) { /* every kind of work somewhere in the batch */
    case 1:
        r->params.temperature = 0;
        break;
    case 2:
        r->params.n = 3;
        break;
    case 3:
        r->params.n_prompt_logprobs = 2;
        break;
    case 4:
        r->params.frequency = 0.5f;
        r->params.repetition = 1.2f;
        break;
    case 5:
        r->params.min_p = 0.05f;
        r->params.top_k = 20;
        break;
    case 6:
        r->params.max_tokens = 0;
        r->params.n_prompt_logprobs = 0;
        break;
    case 7:
        r->params.n = 2;
        r->params.min_tokens = 10;
        r->params.n_prompt_logprobs = 0;
        break;
    default:
        break;
    }
    return r;
}

/* Beginnings of one text, around page boundaries and on both sides of index_topk (128), half of them with an end of their own. */
static tr_request *make_shared_request(uint64_t id)
{
    static const size_t length[] = {300, 63, 64, 65, 127, 128, 129, 257};
    const json_t *ids = json_object_get(json_array_get(cases, 3), "prompt_ids");
    tr_request *r = calloc(1, sizeof *r);
    assert_non_null(r);
    r->id = id;
    r->n_prompt = length[id % 8];
    r->prompt = malloc(r->n_prompt * sizeof *r->prompt);
    assert_non_null(r->prompt);
    for (size_t i = 0; i < r->n_prompt; i++)
        r->prompt[i] = (int32_t)json_integer_value(json_array_get(ids, i));
    if (id > 8) r->prompt[r->n_prompt - 1 - id % 3] = 300 + (int32_t)id;
    r->params = (tr_params){.n = id % 5 == 0 ? 3 : 1,
                            .key = id * 77,
                            .temperature = id % 2 ? 0 : 1,
                            .top_p = 0.95f,
                            .max_tokens = 70, /* pages of generated tokens too */
                            .repetition = 1,
                            .ignore_eos = true,
                            .n_logprobs = 3,
                            .n_prompt_logprobs = id == 7 || id == 12 ? 1 : -1};
    return r;
}

static void run(const setting *s, result *results)
{
    char dir[512];
    tr_fixture f;
    tr_engine *engine;
    tr_event *event;
    tr_err err = {0};
    const int n_slots = 12;
    tr_fixture_options options = {.dir = tr_source_path(dir, sizeof dir, "models/tiny"),
                                  .kv_dtype = s->dtype,
                                  .max_model_len = MAX_LEN,
                                  .n_slots = n_slots,
                                  .max_rows = 512 + n_slots,
                                  .n_threads = s->n_threads};
    assert_int_equal(tr_fixture_open(&f, &options), 0);
    if (s->n_pages > 0) { /* a small pool: another model on the same weights */
        tr_step_free(&f.step, f.model);
        tr_model_free(f.model);
        const tr_groups groups = {f.self, f.self, f.self, f.self, 1};
        const tr_model_options model = {.kv_dtype = s->dtype,
                                        .max_rows = 512 + n_slots,
                                        .n_slots = n_slots,
                                        .max_model_len = MAX_LEN,
                                        .n_pages = s->n_pages};
        assert_int_equal(tr_model_create(&f.model, &f.config, f.weights, f.device, f.ops, &groups,
                                         &model, f.has_token, &f.regions, &err),
                         TR_OK);
        assert_int_equal(tr_step_create(&f.step, f.model, &err), TR_OK);
    }
    const tr_engine_options eo = {.max_batch_tokens =
                                      s->max_batch_tokens ? s->max_batch_tokens : 512,
                                  .max_sequences = n_slots,
                                  .max_model_len = MAX_LEN,
                                  .ring = s->ring ? s->ring : 1,
                                  .queue_max = 2 * N_REQUESTS,
                                  .eos = EOS,
                                  .bos = -1,
                                  .pad = -1,
                                  .no_prefix_cache = s->no_cache,
                                  .is_leader = true};
    if (tr_engine_create(&engine, f.model, NULL, f.self, &eo, NULL, &f.regions, &err) != TR_OK)
        fail_msg("%s", err.text);
    tr_engine_watch(engine, s->watch);
    tr_engine_observe(engine, s->observer);
    if (s->engine) *s->engine = engine;
    for (uint64_t id = 1; id <= N_REQUESTS; id++)
        if (s->only == 0 || s->only == id)
            assert_int_equal(
                tr_engine_submit(engine, s->shared ? make_shared_request(id) : make_request(id),
                                 &err),
                TR_OK);
    tr_engine_close(engine);
    if (tr_engine_run(engine, &err) != TR_OK) fail_msg("%s", err.text);
    while (tr_engine_take(engine, &event, 0) == 1) {
        if (event->kind != TR_EVENT_DONE)
            fail_msg("request %d: %s", (int)event->request->id, event->message);
        assert_null(results[event->request->id].event);
        results[event->request->id] = (result){event->n_choices, event};
    }
    const tr_engine_stats stats = tr_engine_stats_get(engine);
    assert_int_equal(stats.pages_held, 0);
    if (s->n_pages > 0) assert_true(stats.preemptions > 0);
    if (s->no_cache) assert_int_equal(stats.cached_tokens, 0);
    if (s->shared && !s->no_cache) assert_true(stats.cached_tokens > 10 * TR_PAGE_TOKENS);
    tr_engine_free(engine);
    tr_fixture_close(&f);
}

static void same_scores(const tr_scores *a, const tr_scores *b, int id)
{
    if (a->n != b->n || a->n_top != b->n_top)
        fail_msg("request %d: %d scores, %d scores", id, a->n, b->n);
    if (a->n == 0) return;
    const size_t n = (size_t)a->n, top = n * (size_t)a->n_top;
    if (memcmp(a->logprob, b->logprob, n * sizeof *a->logprob) != 0)
        fail_msg("request %d: log-probabilities differ", id);
    if (memcmp(a->rank, b->rank, n * sizeof *a->rank) != 0)
        fail_msg("request %d: ranks differ", id);
    if (top > 0 && (memcmp(a->top_token, b->top_token, top * 4) != 0 ||
                    memcmp(a->top_logprob, b->top_logprob, top * 4) != 0))
        fail_msg("request %d: alternatives differ", id);
}

static void same(const result *a, const result *b, int id)
{
    assert_non_null(a->event);
    assert_non_null(b->event);
    assert_int_equal(a->n_choices, b->n_choices);
    same_scores(&a->event->prompt_scores, &b->event->prompt_scores, id);
    for (int i = 0; i < a->n_choices; i++) {
        const tr_choice *x = &a->event->choice[i], *y = &b->event->choice[i];
        if (x->n_token != y->n_token ||
            (x->n_token > 0 && memcmp(x->token, y->token, (size_t)x->n_token * 4) != 0))
            fail_msg("request %d, choice %d: other tokens (%d and %d)", id, i, x->n_token,
                     y->n_token);
        assert_int_equal(x->finish, y->finish);
        same_scores(&x->scores, &y->scores, id);
    }
}

static void forget(result *results)
{
    for (int i = 0; i <= N_REQUESTS; i++)
        tr_event_free(results[i].event);
    memset(results, 0, (N_REQUESTS + 1) * sizeof *results);
}

/* All sixteen together is the yardstick of every other way. */
static void independent(tr_dtype dtype)
{
    static const setting ways[] = {
        {.dtype = TR_F32, .max_batch_tokens = 7},
        {.dtype = TR_F32, .ring = 2},
        {.dtype = TR_F32, .n_pages = 20},
        {.dtype = TR_E4M3, .max_batch_tokens = 7, .n_threads = 1},
        {.dtype = TR_E4M3, .n_threads = 3, .max_batch_tokens = 100},
        {.dtype = TR_E4M3, .n_pages = 20, .ring = 2, .max_batch_tokens = 64},
    };
    result together[N_REQUESTS + 1] = {0}, other[N_REQUESTS + 1] = {0};
    run(&(setting){.dtype = dtype}, together);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        if (ways[i].dtype != dtype) continue;
        run(&ways[i], other);
        for (int id = 1; id <= N_REQUESTS; id++)
            same(&together[id], &other[id], id);
        forget(other);
    }
    for (uint64_t id = 1; id <= N_REQUESTS; id += 5) {
        run(&(setting){.dtype = dtype, .only = id}, other);
        same(&together[id], &other[id], (int)id);
        forget(other);
    }
    forget(together);
}

static void test_f32(void **state)
{
    (void)state;
    independent(TR_F32);
}

static void test_fp8(void **state)
{
    (void)state;
    independent(TR_E4M3);
}

static void test_shared_prefixes(void **state)
{
    static const setting ways[] = {
        {.dtype = TR_E4M3, .shared = true},
        {.dtype = TR_E4M3, .shared = true, .ring = 2, .max_batch_tokens = 50, .n_threads = 1},
        {.dtype = TR_E4M3, .shared = true, .ring = 2, .n_pages = 20},
    };
    result alone[N_REQUESTS + 1] = {0}, other[N_REQUESTS + 1] = {0};
    (void)state;
    run(&(setting){.dtype = TR_E4M3, .shared = true, .no_cache = true}, alone);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        run(&ways[i], other);
        for (int id = 1; id <= N_REQUESTS; id++)
            same(&alone[id], &other[id], id);
        forget(other);
    }
    forget(alone);
}

/* The choices of one request differ from each other, and equal choices would show a key that is not mixed in. */
static void test_choices(void **state)
{
    result results[N_REQUESTS + 1] = {0};
    (void)state;
    run(&(setting){.dtype = TR_E4M3, .only = 10},
        results); /* n = 3, a text prompt, temperature 1 */
    const tr_choice *c = results[10].event->choice;
    assert_int_equal(results[10].n_choices, 3);
    assert_true(c[0].n_token > 4 && c[1].n_token > 4);
    assert_true(c[0].n_token != c[1].n_token ||
                memcmp(c[0].token, c[1].token, (size_t)c[0].n_token * 4) != 0);
    forget(results);
}

typedef struct expected {
    const tr_world *world;
    int n, n_known;
} expected;

static void see_expected(void *ctx, const tr_engine_seen *seen)
{
    expected *e = ctx;
    const tr_flight_state s = tr_flight_look(e->world->flight);

    assert_int_equal(s.step, seen->step);
    e->n++;
    e->n_known += s.expected_s > 0;
}

/* The watchdog is told how long a step should take, once it is known: its default timeout is ten times that, where it is more
 * than a minute. */
static void test_expects(void **state)
{
    result results[N_REQUESTS + 1] = {0};
    tr_world world;
    expected e = {.world = &world};
    tr_watchdog *watch;
    tr_err err;
    (void)state;
    assert_int_equal(tr_world_start(&world, &err), TR_OK);
    assert_int_equal(tr_watchdog_start(&watch, &world, 0, NULL, &err), TR_OK);
    run(&(setting){.dtype = TR_E4M3,
                   .only = 10,
                   .watch = watch,
                   .observer = {.ctx = &e, .step = see_expected}},
        results);
    assert_true(e.n > 4);
    assert_int_equal(e.n_known, e.n - 1); /* of the first nothing is known */
    forget(results);
    tr_watchdog_stop(watch);
    tr_world_finish(TR_OK);
}

typedef struct steps_seen {
    tr_engine *engine;
    int n;
    uint64_t sum_ns; /* of all steps so far */
} steps_seen;

static void see_time(void *ctx, const tr_engine_seen *seen)
{
    steps_seen *s = ctx;
    const tr_engine_stats stats = tr_engine_stats_get(s->engine);
    const uint64_t sum = stats.prefill_ns + stats.decode_ns, took = sum - s->sum_ns;
    const uint64_t computed = seen->t1_ns - seen->t0_ns;

    assert_in_range(took, computed, computed + seen->plan_ns);
    s->sum_ns = sum;
    s->n++;
}

/* A step's time is its own, also where the next one has been computed before its results are taken in. */
static void test_step_times(void **state)
{
    result results[N_REQUESTS + 1] = {0};
    (void)state;
    for (int ring = 1; ring <= 2; ring++) {
        steps_seen seen = {0};
        run(&(setting){.dtype = TR_E4M3,
                       .ring = ring,
                       .max_batch_tokens = 64,
                       .n_threads = 1,
                       .observer = {.ctx = &seen, .step = see_time},
                       .engine = &seen.engine},
            results);
        assert_true(seen.n > 30);
        forget(results);
    }
}

static int read_cases(void **state)
{
    char path[512];
    (void)state;
    cases = tr_read_json(tr_vector_path(path, sizeof path, "tiny/generation.json"));
    return cases ? 0 : -1;
}

static int drop_cases(void **state)
{
    (void)state;
    json_decref(cases);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f32),
        cmocka_unit_test(test_fp8),
        cmocka_unit_test(test_shared_prefixes),
        cmocka_unit_test(test_choices),
        cmocka_unit_test(test_expects),
        cmocka_unit_test(test_step_times),
    };
    return cmocka_run_group_tests(tests, read_cases, drop_cases);
}
