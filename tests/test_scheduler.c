/* The scheduler against the simulated model of scheduler_world.h: everybody gets the tokens it would get alone, nobody waits
 * for ever, no page is lost or held twice. With an argument: that many steps (the default is 100000). */
#include <config.h>

#include "scheduler_world.h"

static void submit(world *w)
{
    tr_request *r = make_request(w);
    w->finished[r->id % (1 << 16)] = false;
    submit_request(w, r);
}

/* Run n steps with a stream of requests, then let everybody finish. */
static void run_world(uint64_t seed, uint64_t n_steps, tr_scheduler_stats *sum)
{
    uint64_t r = seed;
    int n_pages = chance(&r, 25) ? 3 : chance(&r, 40) ? pick(&r, 4, 9) : pick(&r, 10, 30);
    int ring = chance(&r, 10) ? 3 : pick(&r, 1, 2), max_sequences = pick(&r, 1, MAX_SLOTS);
    int max_batch = chance(&r, 30) ? pick(&r, 1, 16) : pick(&r, 17, 300);
    int topk = chance(&r, 20) ? 1000 : pick(&r, 0, 150);
    world *w = world_create(r, n_pages, ring, max_sequences, max_batch, topk);

    while (w->n_steps < n_steps) {
        int n = tr_scheduler_wants(w->scheduler) ? pick(&w->random, 0, 2) : 0;
        for (int i = 0; i < n; i++)
            submit(w);
        if (!turn(w)) assert_true(tr_scheduler_idle(w->scheduler)); /* no deadlock */
    }
    while (turn(w)) {
    }
    assert_true(tr_scheduler_idle(w->scheduler));
    assert_true(tr_scheduler_consistent(w->scheduler));
    tr_scheduler_stats stats = tr_scheduler_stats_get(w->scheduler);
    assert_int_equal(stats.pages_held, 0);
    assert_true(stats.cached_tokens <= stats.prompt_tokens);
    tr_scheduler_clear_cache(w->scheduler);
    assert_true(tr_scheduler_consistent(w->scheduler));
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).pages_cached, 0);
    assert_int_equal(stats.running + stats.waiting, 0);
    assert_int_equal(w->n_done, w->n_requests);
    assert_int_equal(stats.finished + stats.failed, w->n_requests);
    assert_int_equal(stats.steps, w->n_steps);
    /* Nobody starves: whoever waits, waits for older ones, which are few and short. */
    assert_true(w->longest_wait < 20000);
    sum->steps += stats.steps;
    sum->preemptions += stats.preemptions;
    sum->finished += stats.finished;
    sum->failed += stats.failed;
    sum->mixed_decode_tokens += stats.mixed_decode_tokens;
    sum->prefill_tokens += w->n_forks;
    sum->cached_tokens += stats.cached_tokens;
    sum->prompt_tokens += stats.prompt_tokens;
    sum->pages_evicted += stats.pages_evicted;
    world_free(w);
}

static void test_random_worlds(void **state)
{
    const uint64_t n_steps_wanted = *(const uint64_t *)*state;
    tr_scheduler_stats sum = {0};

    for (uint64_t seed = 1; sum.steps < n_steps_wanted; seed++)
        run_world(seed * 7919, 2000, &sum);
    /* The worlds must have met what they are for. */
    assert_true(sum.preemptions > 100);
    assert_true(sum.failed > 5);
    assert_true(sum.prefill_tokens > 100); /* forks */
    assert_true(sum.mixed_decode_tokens > 100);
    assert_true(sum.cached_tokens * 20 > sum.prompt_tokens);
    assert_true(sum.pages_evicted > 100);
}

/* ---- one thing at a time -------------------------------------------------------------------------------- */

static tr_request *plain_request(int n_prompt, int max_tokens, int n)
{
    tr_request *r = calloc(1, sizeof *r);
    r->n_prompt = (size_t)n_prompt;
    r->prompt = malloc((size_t)n_prompt * sizeof *r->prompt + 1);
    for (int i = 0; i < n_prompt; i++)
        r->prompt[i] = 3 + i % 50;
    r->params = (tr_params){.n = n,
                            .key = 4711,
                            .temperature = 1,
                            .top_p = 1,
                            .max_tokens = max_tokens,
                            .repetition = 1,
                            .ignore_eos = true,
                            .n_logprobs = -1,
                            .n_prompt_logprobs = -1};
    return r;
}

static tr_event *add(world *w, tr_request *r)
{
    tr_event *e = calloc(1, sizeof *e);
    r->id = w->n_requests++;
    w->submitted_at[r->id % (1 << 16)] = w->n_steps;
    w->finished[r->id % (1 << 16)] = false;
    e->request = r;
    return tr_scheduler_add(w->scheduler, e);
}

static void finish(world *w)
{
    while (turn(w)) {
    }
    assert_true(tr_scheduler_idle(w->scheduler));
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).pages_held, 0);
}

static void refuse(world *w, tr_request *r, const char *code)
{
    tr_event *e = add(w, r);
    assert_non_null(e);
    assert_int_equal(e->kind, TR_EVENT_FAILED);
    assert_string_equal(e->code, code);
    assert_true(strlen(e->message) > 0);
    tr_event_free(e);
}

static void test_refused(void **state)
{
    world *w = world_create(1, 3, 1, 2, 64, 100); /* 3 pages: 192 rows */
    tr_request *r;
    (void)state;

    refuse(w, plain_request(193, 0, 1), "context_length_exceeded");
    refuse(w, plain_request(100, 93, 1), "context_length_exceeded");
    refuse(w, plain_request(1, INT32_MAX, 1), "context_length_exceeded");
    refuse(w, plain_request(0, 5, 1), "invalid_request");
    refuse(w, plain_request(3, 5, 0), "invalid_request");
    r = plain_request(3, 5, 1);
    r->prompt[1] = VOCAB;
    refuse(w, r, "invalid_request");
    r = plain_request(3, 5, 1);
    r->prompt[2] = -1;
    refuse(w, r, "invalid_request");
    r = plain_request(3, 5, 1);
    r->params.n_bias = 2; /* not sorted */
    r->params.bias = calloc(2, sizeof *r->params.bias);
    r->params.bias[0].token = 7;
    r->params.bias[1].token = 7;
    refuse(w, r, "invalid_request");
    r = plain_request(3, 5, 1);
    r->params.repetition = NAN;
    refuse(w, r, "invalid_request");
    r = plain_request(3, 5, 1);
    r->stream = true;
    refuse(w, r, "unsupported");
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).failed, 10);

    /* The model length may be longer than the pool. */
    w->options.max_model_len = 1000;
    tr_scheduler_free(w->scheduler);
    assert_int_equal(tr_scheduler_create(&w->scheduler, &w->options, NULL), TR_OK);
    refuse(w, plain_request(100, 94, 1), "context_length_exceeded");
    assert_null(add(w, plain_request(100, 93, 1))); /* 192 rows: the last token has none */
    finish(w);
    assert_int_equal(w->n_done, 1);
    world_free(w);
}

static void test_nothing_to_compute(void **state)
{
    world *w = world_create(1, 3, 1, 2, 64, 100);
    (void)state;

    for (int score = 0; score < 2; score++) {
        tr_request *r = plain_request(score ? 1 : 50, 0, 2);
        if (score)
            r->params.n_prompt_logprobs = 3; /* one token: nothing before it to score it from */
        tr_event *e = add(w, r);
        assert_non_null(e);
        assert_int_equal(e->kind, TR_EVENT_DONE);
        assert_int_equal(e->n_choices, 2);
        assert_int_equal(e->choice[1].n_token, 0);
        assert_int_equal(e->choice[1].finish, TR_FINISH_LENGTH);
        assert_string_equal(e->choice[1].text, "");
        assert_int_equal(e->prompt_scores.n, 0);
        tr_event_free(e);
    }
    assert_true(tr_scheduler_idle(w->scheduler));
    world_free(w);
}

/* However many slots there are, n choices compute the prompt once: its last token each, the rest together. */
static void test_one_prompt_pass(void **state)
{
    (void)state;
    for (int max_sequences = 1; max_sequences <= 5; max_sequences++)
        for (int ring = 1; ring <= 2; ring++)
            for (int n_prompt = 127; n_prompt <= 130; n_prompt++) {
                world *w = world_create(1, 40, ring, max_sequences, 50, 100);
                assert_null(add(w, plain_request(n_prompt, 20, 4)));
                finish(w);
                assert_int_equal(w->n_done, 1);
                assert_int_equal(tr_scheduler_stats_get(w->scheduler).prefill_tokens,
                                 n_prompt - 1 + 4);
                /* first tokens count, though no decode row gave them */
                assert_int_equal(tr_scheduler_stats_get(w->scheduler).generated_tokens, 4 * 20);
                world_free(w);
            }
}

static void test_forks_share_pages(void **state)
{
    world *w = world_create(1, 40, 1, 4, 300, 100);
    int most = 0;
    (void)state;

    assert_null(add(w, plain_request(3 * PAGE + 10, 20, 4)));
    while (turn(w)) {
        int held = tr_scheduler_stats_get(w->scheduler).pages_held;
        if (held > most) most = held;
        assert_true(tr_scheduler_consistent(w->scheduler));
    }
    assert_int_equal(w->n_done, 1);
    assert_int_equal(w->n_forks, 3);
    assert_int_equal(most, 3 + 4); /* three full pages together, the half-filled one each */
    world_free(w);
}

/* ---- prompts that begin alike ---------------------------------------------------------------------------- */

/* A plain request whose prompt ends in a token of its own. */
static tr_request *tailed_request(int n_prompt, int max_tokens, int tail)
{
    tr_request *r = plain_request(n_prompt, max_tokens, 1);
    r->prompt[n_prompt - 1] = 3 + tail;
    r->params.key = (uint64_t)tail;
    return r;
}

static world *cached_world(int n_pages, int ring, int max_sequences, int max_batch)
{
    world *w = world_create(1, n_pages, ring, max_sequences, max_batch, 100);
    tr_scheduler_free(w->scheduler);
    w->options.prefix_cache = true;
    assert_int_equal(tr_scheduler_create(&w->scheduler, &w->options, NULL), TR_OK);
    return w;
}

/* Admitted at once, the pages they share are computed once, whatever the ring and the size of a step. */
static void test_shared_once(void **state)
{
    (void)state;
    for (int ring = 1; ring <= 3; ring++)
        for (int max_batch = 30; max_batch <= 300; max_batch += 135)
            for (int n_prompt = 127; n_prompt <= 194; n_prompt++) {
                world *w = cached_world(60, ring, 6, max_batch);
                const int n_shared = (n_prompt - 1) / PAGE * PAGE;
                for (int i = 0; i < 10; i++)
                    assert_null(add(w, tailed_request(n_prompt, 5, i)));
                finish(w);
                tr_scheduler_stats stats = tr_scheduler_stats_get(w->scheduler);
                assert_int_equal(w->n_done, 10);
                assert_int_equal(stats.prefill_tokens, n_prompt + 9 * (n_prompt - n_shared));
                assert_int_equal(stats.prompt_tokens, 10 * n_prompt);
                assert_int_equal(stats.cached_tokens, 9 * n_shared);
                world_free(w);
            }
}

static void test_cache_off(void **state)
{
    world *w = cached_world(60, 2, 6, 300);
    (void)state;
    tr_scheduler_free(w->scheduler);
    w->options.prefix_cache = false;
    assert_int_equal(tr_scheduler_create(&w->scheduler, &w->options, NULL), TR_OK);
    for (int i = 0; i < 10; i++)
        assert_null(add(w, tailed_request(130, 5, i)));
    finish(w);
    tr_scheduler_stats stats = tr_scheduler_stats_get(w->scheduler);
    assert_int_equal(stats.prefill_tokens, 10 * 130);
    assert_int_equal(stats.cached_tokens + (uint64_t)stats.pages_cached, 0);
    world_free(w);
}

/* What was generated was computed in another form: a prompt that contains it must not find it. */
static void test_generated_not_shared(void **state)
{
    world *w = cached_world(60, 1, 2, 300);
    int32_t said[201];
    const tr_plan *plan;
    tr_event *e = NULL;
    (void)state;

    assert_null(add(w, plain_request(70, 131, 1)));
    while (!e) {
        assert_int_equal(tr_scheduler_plan(w->scheduler, &plan, NULL), TR_OK);
        device_run(&w->device, plan);
        tr_scheduler_commit(w->scheduler, &w->device.out);
        e = tr_scheduler_event(w->scheduler);
    }
    memcpy(said, e->request->prompt, 70 * sizeof *said);
    memcpy(said + 70, e->choice[0].token, 131 * sizeof *said);
    tr_event_free(e);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).pages_cached, 1);
    tr_request *r = plain_request(201, 10, 1);
    memcpy(r->prompt, said, sizeof said);
    assert_null(add(w, r));
    finish(w);
    assert_int_equal(w->n_done, 1);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).cached_tokens, 64);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).pages_cached, 3);
    world_free(w);
}

/* Who scores runs every row; its pages serve others. Unrelated requests pass those who wait. */
static void test_scores_and_passing(void **state)
{
    (void)state;
    for (int ring = 1; ring <= 2; ring++) {
        world *w = cached_world(60, ring, 4, 20);
        for (int i = 0; i < 2; i++) {
            tr_request *r = tailed_request(200, 5, i);
            r->params.n_prompt_logprobs = 1;
            assert_null(add(w, r));
        }
        assert_null(add(w, tailed_request(200, 5, 2)));
        tr_request *other = plain_request(10, 2, 1);
        other->prompt[0] = 90;
        assert_null(add(w, other));
        uint64_t passed = 0;
        while (turn(w))
            if (w->n_done == 1 && !passed) passed = w->n_steps;
        assert_int_equal(w->n_done, 4);
        assert_true(passed < 25 + (uint64_t)ring); /* before the 400 rows that score had been run */
        tr_scheduler_stats stats = tr_scheduler_stats_get(w->scheduler);
        assert_int_equal(stats.cached_tokens, 192);
        assert_int_equal(stats.prefill_tokens, 200 + 200 + 8 + 10);
        world_free(w);
    }
}

/* Kept pages never stand in the way: they are evicted before anybody is preempted. */
static void test_eviction(void **state)
{
    (void)state;
    for (int ring = 1; ring <= 3; ring++) {
        world *w = cached_world(8, ring, 2, 100);
        for (int i = 0; i < 12; i++) {
            tr_request *r = plain_request(150, 100, 1);
            r->prompt[0] = 3 + i;
            assert_null(add(w, r));
        }
        finish(w);
        tr_scheduler_stats stats = tr_scheduler_stats_get(w->scheduler);
        assert_int_equal(w->n_done, 12);
        assert_int_equal(stats.preemptions, 0);
        assert_int_equal(stats.cached_tokens, 0);
        assert_int_equal(stats.pages_cached + (int)stats.pages_evicted, 24);
        assert_true(stats.pages_cached > 0);
        tr_scheduler_clear_cache(w->scheduler);
        assert_int_equal(tr_scheduler_stats_get(w->scheduler).pages_cached, 0);
        assert_true(tr_scheduler_consistent(w->scheduler));
        world_free(w);
    }
}

/* Kept pages that a request begins with cannot be evicted for it too: it waits, and nobody is preempted. */
static void test_room(void **state)
{
    world *w = cached_world(5, 1, 2, 100);
    (void)state;
    assert_null(add(w, plain_request(200, 5, 1)));
    finish(w);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).pages_cached, 3);
    tr_request *r = plain_request(100, 20, 1); /* the other two pages */
    r->prompt[0] = 90;
    assert_null(add(w, r));
    assert_null(add(w, plain_request(300, 5, 1))); /* the three, and two more */
    finish(w);
    assert_int_equal(w->n_done, 3);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).preemptions, 0);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).cached_tokens, 192);
    world_free(w);
}

/* Pages of a request that failed on its numbers are found by nobody. */
static void test_distrust(void **state)
{
    world *w = cached_world(60, 2, 2, 300);
    (void)state;
    assert_null(add(w, tailed_request(150, 5, NAN_TOKEN - 3)));
    finish(w);
    assert_int_equal(w->n_failed, 1);
    assert_null(add(w, tailed_request(150, 5, 1)));
    finish(w);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).cached_tokens, 0);
    assert_null(add(w, tailed_request(150, 5, 2)));
    finish(w);
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).cached_tokens, 128);
    assert_int_equal(w->n_done, 3);
    world_free(w);
}

/* The older of two that do not fit together is never the one preempted. */
static void test_first_come(void **state)
{
    (void)state;
    for (int ring = 1; ring <= 2; ring++) {
        world *w = world_create(1, 4, ring, 2, 100, 0);
        assert_null(add(w, plain_request(10, 200, 1)));
        assert_null(add(w, plain_request(10, 200, 1)));
        uint64_t first = 0;
        while (turn(w))
            if (w->n_done == 1 && !first) first = w->n_steps;
        assert_int_equal(w->n_done, 2);
        assert_true(first <= 205); /* without a pause */
        assert_true(tr_scheduler_stats_get(w->scheduler).preemptions >= 1);
        /* computed twice, generated once */
        assert_int_equal(tr_scheduler_stats_get(w->scheduler).generated_tokens, 2 * 200);
        world_free(w);
    }
}

/* Rows whose changes name every token: they do not fit one step together, and still all of them run, in every ring. */
static void test_full_change_rows(void **state)
{
    (void)state;
    for (int ring = 1; ring <= 2; ring++) {
        world *w = world_create(1, 40, ring, 8, 300, 100);
        for (int i = 0; i < 8; i++) {
            tr_request *r = plain_request(200, 30, 1); /* 50 distinct tokens and those generated */
            r->params.key = (uint64_t)i;
            r->params.repetition = 1.5f;
            r->params.presence = 0.5f;
            r->params.min_tokens = 10;
            r->params.n_bias = VOCAB;
            r->params.bias = calloc(VOCAB, sizeof *r->params.bias);
            for (int t = 0; t < VOCAB; t++)
                r->params.bias[t] = (tr_bias){.token = t, .bias = (float)(t % 9) / 4};
            assert_null(add(w, r));
        }
        finish(w);
        assert_int_equal(w->n_done, 8);
        world_free(w);
    }
}

/* What a request that failed on logits that are not finite says of where; a number that is no place is nonsense. */
static void test_not_finite(void **state)
{
    const struct {
        int32_t token;
        const char *code, *end; /* of the message */
    } t[] = {
        {TR_NOT_FINITE, "numerical_error", " 9 are not finite"},
        {TR_NOT_FINITE_HEAD, "numerical_error", " 9 are not finite, first in the head"},
        {TR_NOT_FINITE_EMBEDDING, "numerical_error", " 9 are not finite, first in the embedding"},
        {TR_NOT_FINITE_LAYER_0, "numerical_error", " 9 are not finite, first in layer 0"},
        {TR_NOT_FINITE_LAYER_0 - 60, "numerical_error", " 9 are not finite, first in layer 60"},
        {TR_NOT_FINITE_LAST, "numerical_error", " 9 are not finite, first in layer 4095"},
        {TR_NOT_FINITE_LAST - 1, "internal_error", " was sampled, of 97"},
        {INT32_MIN, "internal_error", " was sampled, of 97"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        world *w = world_create(1, 10, 1, 3, 100, 100);
        const tr_plan *plan;
        assert_null(add(w, plain_request(10, 5, 1)));
        assert_int_equal(tr_scheduler_plan(w->scheduler, &plan, NULL), TR_OK);
        device_run(&w->device, plan);
        w->device.out.token[0] = t[i].token;
        tr_scheduler_commit(w->scheduler, &w->device.out);
        tr_event *e = tr_scheduler_event(w->scheduler);
        assert_non_null(e);
        assert_int_equal(e->kind, TR_EVENT_FAILED);
        assert_string_equal(e->code, t[i].code);
        const size_t n = strlen(e->message), n_end = strlen(t[i].end);
        assert_true(n > n_end);
        assert_string_equal(e->message + n - n_end, t[i].end);
        tr_event_free(e);
        finish(w);
        world_free(w);
    }
}

/* A device that answers nonsense costs the request, not the run. */
static void test_bad_output(void **state)
{
    const int32_t bad[] = {-1, -3, VOCAB, INT32_MAX};
    (void)state;
    for (int i = 0; i < 4; i++) {
        world *w = world_create(1, 10, 1, 3, 100, 100);
        const tr_plan *plan;
        assert_null(add(w, plain_request(10, 5, 2)));
        assert_int_equal(tr_scheduler_plan(w->scheduler, &plan, NULL), TR_OK);
        device_run(&w->device, plan);
        tr_scheduler_commit(w->scheduler, &w->device.out); /* the prompt: no head row yet */
        assert_null(tr_scheduler_event(w->scheduler));
        assert_int_equal(tr_scheduler_plan(w->scheduler, &plan, NULL), TR_OK);
        device_run(&w->device, plan);
        w->device.out.token[1] = bad[i];
        tr_scheduler_commit(w->scheduler, &w->device.out);
        tr_event *e = tr_scheduler_event(w->scheduler);
        assert_non_null(e);
        assert_int_equal(e->kind, TR_EVENT_FAILED);
        assert_string_equal(e->code, "internal_error");
        tr_event_free(e);
        finish(w);
        world_free(w);
    }
}

static void test_limits(void **state)
{
    world *w = world_create(1, 10, 1, 4, 100, 100);
    tr_scheduler *s;
    tr_err err;
    (void)state;
    for (int i = 0; i < 6; i++) {
        tr_scheduler_options o = w->options;
        if (i == 0) o.max_sequences = o.limits.n_slots + 1;
        if (i == 1) o.limits.n_rows_max = 3;
        if (i == 2) o.limits.n_head_max = 3;
        if (i == 3) o.ring = 0;
        if (i == 4) o.max_batch_tokens = 0;
        if (i == 5) o.limits.n_pages = 0;
        assert_int_equal(tr_scheduler_create(&s, &o, &err), TR_E_USAGE);
        assert_null(s);
    }
    world_free(w);

    /* The tightest there is: one row and one head row per sequence. */
    w = world_create(1, 10, 2, 3, 100, 10);
    tr_scheduler_free(w->scheduler);
    w->options.limits.n_rows_max = w->options.limits.n_head_max = 3;
    assert_int_equal(tr_scheduler_create(&w->scheduler, &w->options, &err), TR_OK);
    for (int i = 0; i < 5; i++) {
        tr_request *r = plain_request(30 + i, 6, 1 + i % 2);
        r->params.n_prompt_logprobs = 2;
        assert_null(add(w, r));
    }
    finish(w);
    assert_int_equal(w->n_done, 5);
    const tr_plan *stop = tr_scheduler_stop_plan(w->scheduler);
    assert_int_equal(stop->flags, TR_PLAN_STOP);
    assert_int_equal(tr_plan_check(stop, stop->bytes, &w->options.limits, &err), TR_OK);
    world_free(w);
}

int main(int argc, char **argv)
{
    uint64_t n_steps = 100000;
    if (argc > 1) n_steps = strtoull(argv[1], NULL, 10);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_nothing_to_compute),
        cmocka_unit_test(test_one_prompt_pass),
        cmocka_unit_test(test_forks_share_pages),
        cmocka_unit_test(test_shared_once),
        cmocka_unit_test(test_cache_off),
        cmocka_unit_test(test_generated_not_shared),
        cmocka_unit_test(test_scores_and_passing),
        cmocka_unit_test(test_eviction),
        cmocka_unit_test(test_room),
        cmocka_unit_test(test_distrust),
        cmocka_unit_test(test_first_come),
        cmocka_unit_test(test_full_change_rows),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_bad_output),
        cmocka_unit_test(test_limits),
        cmocka_unit_test_prestate(test_random_worlds, &n_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
