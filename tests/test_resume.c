/* Requests that are interrupted at any step and go on in another scheduler from what was saved, against the simulated model
 * of scheduler_world.h: everybody gets the tokens, text and scores it would get alone. What does not fit starts over. With an
 * argument: that many steps (the default is 60000). */
#include <config.h>

#include "scheduler_world.h"

#include "engine/progress.h"

enum { IDS = 1 << 16, FEW_PAGES = 3 };

typedef struct saga { /* a world that is torn down and set up again */
    world *w;
    tr_request *kept[IDS]; /* copies of the unfinished ones, [id] */
    tr_progress *older;    /* saved before, as a job that was killed has it; NULL: nothing */
    uint64_t first, n_restarts, n_continued, n_tokens, n_spoilt, n_unfit;
} saga;

static void *copied(const void *from, size_t bytes)
{
    void *to = malloc(bytes ? bytes : 1);
    assert_non_null(to);
    if (bytes) memcpy(to, from, bytes);
    return to;
}

static tr_request *clone(const tr_request *r)
{
    tr_request *c = copied(r, sizeof *r);
    tr_params *p = &c->params;

    c->progress = NULL;
    c->prompt = copied(r->prompt, r->n_prompt * sizeof *r->prompt);
    p->bias = p->n_bias ? copied(p->bias, (size_t)p->n_bias * sizeof *p->bias) : NULL;
    p->stop_token = p->n_stop_tokens
                        ? copied(p->stop_token, (size_t)p->n_stop_tokens * sizeof *p->stop_token)
                        : NULL;
    p->stop = p->n_stop ? copied(p->stop, (size_t)p->n_stop * sizeof *p->stop) : NULL;
    for (int i = 0; i < p->n_stop; i++)
        p->stop[i].s = copied(r->params.stop[i].s, r->params.stop[i].n + 1);
    return c;
}

static void submit_kept(saga *s)
{
    tr_request *r = make_request(s->w);

    assert_true(r->id < IDS);
    s->w->finished[r->id] = false;
    s->kept[r->id] = clone(r);
    submit_request(s->w, r);
}

static tr_progress *saved_of(const world *w)
{
    tr_progress *list = NULL;
    assert_int_equal(tr_scheduler_progress(w->scheduler, &list), 0);
    return list;
}

/* What no step can have left. False: this one offers nothing to spoil. */
static bool spoil(saga *s, tr_progress *p, const tr_request *r)
{
    uint64_t *random = &s->w->random;
    tr_progress_choice *c = &p->choice[pick(random, 0, p->n_choices - 1)];

    switch (pick(random, 0, 8)) {
    case 0:
        p->key++;
        return true;
    case 1:
        p->prompt++;
        return true;
    case 2:
        p->n_prompt++;
        return true;
    case 3:
        p->max_tokens++;
        return true;
    case 4:
        if (!c->n_token) return false;
        c->token[pick(random, 0, c->n_token - 1)] = chance(random, 50) ? -1 : VOCAB;
        return true;
    case 5:
        if (!c->scores.n) return false;
        c->scores.logprob[pick(random, 0, c->scores.n - 1)] = NAN;
        return true;
    case 6:
        if (!c->scores.n) return false;
        c->scores.n--;
        return true;
    case 7: /* an end where it goes on */
        if (c->n_token < 2 || r->params.ignore_eos) return false;
        c->token[pick(random, 0, c->n_token - 2)] = EOS;
        return true;
    default:
        p->n_logprobs++;
        return true;
    }
}

/* Another job: other sizes, an empty cache; all unfinished requests again, with what was saved of them. */
static void restart(saga *s, bool clean)
{
    world *w = s->w;
    uint64_t *random = &w->random;
    tr_err err = {0};

    while (clean && w->n_flight) { /* the steps in flight come to their end */
        const uint64_t before = w->n_flight;
        w->options.ring = (int)before; /* plan nothing more */
        turn(w);
    }
    tr_progress *list = clean || !s->older ? saved_of(w) : s->older;
    if (list != s->older) tr_progress_free_list(s->older);
    s->older = NULL;
    while (w->n_flight)
        free(w->flight[--w->n_flight]);
    tr_scheduler_free(w->scheduler);
    device_free(&w->device);
    w->options.ring = pick(random, 1, 2);
    w->options.max_batch_tokens =
        pick(random, 1, w->options.limits.n_rows_max - w->options.limits.n_slots);
    w->options.prefix_cache = chance(random, 85);
    assert_int_equal(tr_scheduler_create(&w->scheduler, &w->options, &err), TR_OK);
    device_create(&w->device, &w->options.limits);

    tr_progress *of[IDS / 16] = {0}; /* by id - first */
    while (list) {
        tr_progress *p = list;
        list = p->next;
        if (w->finished[p->id] || chance(random, 5)) { /* it has a record; or it was not saved */
            tr_progress_free(p);
            continue;
        }
        assert_in_range(p->id - s->first, 0, IDS / 16 - 1);
        of[p->id - s->first] = p;
    }
    const uint64_t from = s->first, to = w->n_requests;
    for (uint64_t id = from; id < to; id++) {
        if (w->finished[id]) {
            tr_request_free(s->kept[id]);
            s->kept[id] = NULL;
            s->first += id == s->first;
            continue;
        }
        tr_request *r = clone(s->kept[id]);
        tr_progress *p = of[id - from];
        const bool spoilt = p && chance(random, 10) && spoil(s, p, r);
        r->progress = p;
        for (int i = 0; p && !spoilt && i < p->n_choices; i++)
            s->n_tokens += (uint64_t)p->choice[i].n_token;
        s->n_spoilt += spoilt;
        s->n_continued += p && !spoilt;
        assert_int_equal(!p || tr_progress_fits(p, r, VOCAB),
                         !spoilt || (p && tr_progress_fits(p, r, VOCAB)));
        submit_request(w, r);
        if (!w->finished[id] && spoilt) {
            assert_non_null(r->progress); /* seen, and begun anew */
            assert_true(r->progress->unfit);
            s->n_unfit++;
        } else if (!w->finished[id]) {
            assert_null(r->progress);
        }
    }
    assert_true(tr_scheduler_consistent(w->scheduler));
    s->n_restarts++;
    w->restarted = true;
}

/* Let go of what could not be finished in so many tokens; whoever is begun and fits goes on to its end. */
static void drain(saga *s)
{
    world *w = s->w;
    const int most = pick(&w->random, 0, 60);
    const uint64_t n_done = w->n_done, n_failed = w->n_failed;
    const int n = tr_scheduler_drain(w->scheduler, most);

    while (turn(w)) {
    }
    assert_true(tr_scheduler_consistent(w->scheduler));
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).running, 0);
    /* A token in flight may fail one that was let go. */
    assert_in_range(w->n_done - n_done, n, (uint64_t)n + w->n_failed - n_failed);
    assert_int_equal(tr_scheduler_drain(w->scheduler, 0), 0);
}

static void run_saga(saga *s, uint64_t seed, uint64_t n_steps)
{
    uint64_t r = seed;
    const int n_pages = chance(&r, 25) ? FEW_PAGES : pick(&r, 4, 30);
    const int ring = pick(&r, 1, 2), max_sequences = pick(&r, 1, MAX_SLOTS);
    const int max_batch = chance(&r, 30) ? pick(&r, 1, 16) : pick(&r, 17, 300);
    world *w = world_create(r, n_pages, ring, max_sequences, max_batch,
                            chance(&r, 20) ? 1000 : pick(&r, 0, 150));
    const int often = pick(&w->random, 1, 40); /* in a thousand steps */

    s->w = w;
    s->first = 0;
    while (w->n_steps < n_steps) {
        if (tr_scheduler_wants(w->scheduler) && chance(&w->random, 50)) submit_kept(s);
        if (!turn(w)) assert_true(tr_scheduler_idle(w->scheduler));
        const int what = pick(&w->random, 0, 999);
        if (what < often) {
            const bool drained = chance(&w->random, 30);
            if (drained) drain(s);
            restart(s, drained || chance(&w->random, 50));
        } else if (what < 2 * often) {
            tr_progress_free_list(s->older);
            s->older = saved_of(w);
        }
    }
    while (turn(w)) {
    }
    assert_true(tr_scheduler_idle(w->scheduler));
    assert_int_equal(w->n_done, w->n_requests);
    for (uint64_t id = 0; id < w->n_requests; id++) {
        assert_true(w->finished[id]);
        tr_request_free(s->kept[id]);
        s->kept[id] = NULL;
    }
    tr_progress_free_list(s->older);
    s->older = NULL;
    world_free(w);
}

static void test_interrupted(void **state)
{
    const uint64_t wanted = *(const uint64_t *)*state;
    saga *s = calloc(1, sizeof *s);

    assert_non_null(s);
    for (uint64_t n = 0, seed = 1; n < wanted; n += 2000, seed++)
        run_saga(s, seed * 104729, 2000);
    /* They must have met what they are for. */
    assert_true(s->n_restarts > 100);
    assert_true(s->n_continued > 300);
    assert_true(s->n_tokens > 5000);
    assert_true(s->n_unfit > 20 && s->n_unfit <= s->n_spoilt);
    if (wanted > 60000)
        printf("%llu interruptions: %llu requests went on, with %llu tokens; %llu began anew\n",
               (unsigned long long)s->n_restarts, (unsigned long long)s->n_continued,
               (unsigned long long)s->n_tokens, (unsigned long long)s->n_unfit);
    free(s);
}

/* Choices that have ended stay ended; a request of which all have, saved before it had its record, is finished at once. */
static void test_ended_choices(void **state)
{
    world *w = world_create(3, 20, 1, 8, 200, 100);
    tr_request *r = make_request(w), *again;
    (void)state;

    r->params.n = 2;
    r->params.ignore_eos = true;
    r->params.n_stop = 0;
    r->params.n_stop_tokens = 0;
    r->params.n_prompt_logprobs = r->params.n_logprobs = -1;
    r->params.max_tokens = 9;
    again = clone(r);
    submit_request(w, r);
    for (int i = 0; i < 5; i++)
        turn(w);
    tr_progress *p = saved_of(w);
    assert_non_null(p);
    assert_null(p->next);
    assert_true(p->choice[0].n_token > 0 && p->choice[0].n_token < 9);
    while (turn(w)) {
    }
    /* All nine tokens of both, from somewhere. */
    expected x;
    for (int i = 0; i < 2; i++) {
        run_alone(again, i, 100, &x);
        free(p->choice[i].token);
        p->choice[i].token = copied(x.token, 9 * sizeof *x.token);
        p->choice[i].n_token = 9;
    }
    assert_true(tr_progress_fits(p, again, VOCAB));
    again->progress = p;
    w->finished[again->id] = false;
    const uint64_t before = tr_scheduler_stats_get(w->scheduler).continued;
    submit_request(w, again);
    assert_true(w->finished[0]); /* compared with what it would get alone */
    assert_true(tr_scheduler_idle(w->scheduler));
    assert_int_equal(tr_scheduler_stats_get(w->scheduler).continued, before + 1);
    world_free(w);
}

/* What an earlier run sampled was not waited for in this one: of a single new token there is no time between tokens. */
static void test_times(void **state)
{
    world *w = world_create(3, 20, 1, 8, 200, 100);
    tr_request *r = make_request(w), *again;
    (void)state;

    r->params.n = 1;
    r->params.ignore_eos = true;
    r->params.n_stop = 0;
    r->params.n_stop_tokens = 0;
    r->params.n_prompt_logprobs = r->params.n_logprobs = -1;
    r->params.max_tokens = 9;
    again = clone(r);
    submit_request(w, r);
    tr_progress *p = NULL;
    while (!p || p->choice[0].n_token < 8) {
        tr_progress_free(p);
        assert_true(turn(w));
        p = saved_of(w);
    }
    while (turn(w)) {
    }
    assert_true(w->finished[again->id] && w->itl_p50_ns > 0);
    assert_int_equal(p->choice[0].n_token, 8);
    w->restarted = true;
    again->progress = p;
    w->finished[again->id] = false;
    submit_request(w, again);
    while (turn(w)) {
    }
    assert_true(w->finished[0]);
    assert_int_equal(w->itl_p50_ns, 0);
    world_free(w);
}

/* Of tokens that turn out not to be its own when they are replayed nothing stays, not even when the first of them came. */
static void test_anew(void **state)
{
    world *w = world_create(3, 20, 1, 8, 200, 100);
    tr_request *r = make_request(w), *again;
    tr_event *e = calloc(1, sizeof *e);
    tr_progress *p = NULL;
    (void)state;

    assert_non_null(e);
    r->params.n = 1;
    r->params.ignore_eos = true;
    r->params.n_stop = r->params.n_stop_tokens = r->params.min_tokens = 0;
    r->params.n_prompt_logprobs = r->params.n_logprobs = -1;
    r->params.max_tokens = 9;
    again = clone(r);
    submit_request(w, r);
    while (!p || p->choice[0].n_token < 3) {
        tr_progress_free(p);
        assert_true(turn(w));
        p = saved_of(w);
    }
    while (turn(w)) {
    }
    again->params.ignore_eos = false;
    p->choice[0].token[1] = EOS; /* and yet another behind it */
    again->progress = p;
    e->request = again;
    assert_null(tr_scheduler_add(w->scheduler, e));
    assert_true(again->progress && again->progress->unfit);
    assert_int_equal(e->first_token_ns, 0);
    world_free(w);
}

int main(int argc, char **argv)
{
    uint64_t n_steps = 60000;
    if (argc > 1) n_steps = strtoull(argv[1], NULL, 10);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ended_choices),
        cmocka_unit_test(test_times),
        cmocka_unit_test(test_anew),
        cmocka_unit_test_prestate(test_interrupted, &n_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
