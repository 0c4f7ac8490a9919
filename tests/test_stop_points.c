/* Every step as a stop point: the engine with the trained checkpoint is stopped at step k, for every k there is; another engine
 * goes on from what was saved, and every request ends with the tokens, the text and the scores of a run that nobody stopped, to
 * the last bit. Greedy and sampled, choices, stop strings, penalties, scores of prompts and answers. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "fixture.h"
#include "vectors.h"

enum { N_REQUESTS = 7, MAX_LEN = 256, N_SLOTS = 6, BATCH = 24, EOS = 2026, STEPS_MAX = 200 };

typedef struct stopper_at { /* counts steps, and stops the engine behind one of them */
    tr_engine *engine;
    int n, at;
} stopper_at;

static tr_fixture f;
static tr_tokenizer *tokenizer;

static tr_request *make_request(uint64_t id)
{
    tr_request *r = calloc(1, sizeof *r);
    assert_non_null(r);
    r->id = id;
    r->n_prompt = 3 + 17 * id % 48;
    r->prompt = malloc(r->n_prompt * sizeof *r->prompt);
    assert_non_null(r->prompt);
    for (size_t i = 0; i < r->n_prompt; i++)
        r->prompt[i] = (int32_t)(40 + (i * 37 + id * 911) % 1500);
    r->params = (tr_params){.n = id == 2 ? 3 : 1,
                            .key = id * 77,
                            .temperature = id % 2 ? 0 : 1,
                            .top_p = 1,
                            .max_tokens = 3 + (int)id,
                            .repetition = id == 3 ? 1.3f : 1,
                            .frequency = id == 4 ? 0.7f : 0,
                            .ignore_eos = true,
                            .n_logprobs = id % 3 == 1 ? 2 : -1,
                            .n_prompt_logprobs = id == 5 || id == 6 ? 1 : -1};
    if (id == 6) r->params.max_tokens = 0; /* scoring alone */
    if (id == 7) {
        r->params.n_stop = 1;
        r->params.stop = calloc(1, sizeof *r->params.stop);
        assert_non_null(r->params.stop);
        r->params.stop[0] = (tr_string){.s = strdup("d ."), .n = 3};
    }
    return r;
}

static void after_step(void *ctx, const tr_engine_seen *seen)
{
    stopper_at *s = ctx;
    (void)seen;
    if (++s->n == s->at) tr_engine_stop(s->engine);
}

/* How a run is stopped and what it leaves. */
typedef struct how {
    int ring, n_slots;
    int at;          /* behind this step (0: before the first); -1: not */
    bool unrecorded; /* who has ended has no record: what was saved of it is all there is */
    uint64_t n_continued, n_ended; /* out: as the engine counts; unrecorded ones */
} how;

/* One engine over the requests that have no event yet, with their progress. What is left of it becomes the new progress. Returns
 * how many steps there were, about. */
static int run(how *h, tr_event **event, tr_progress **progress)
{
    tr_engine *engine;
    tr_event *done;
    tr_err err = {0};
    uint64_t spent_ns, n_taken = 0;
    const tr_engine_options o = {.max_batch_tokens = BATCH,
                                 .max_sequences = h->n_slots,
                                 .max_model_len = MAX_LEN,
                                 .ring = h->ring,
                                 .queue_max = N_REQUESTS,
                                 .eos = EOS,
                                 .bos = -1,
                                 .pad = -1,
                                 .is_leader = true};
    stopper_at s = {.at = h->at};

    if (tr_engine_create(&engine, f.model, tokenizer, f.self, &o, NULL, &f.regions, &err) != TR_OK)
        fail_msg("%s", err.text);
    s.engine = engine;
    tr_engine_observe(engine, (tr_engine_observer){.ctx = &s, .step = after_step});
    for (uint64_t id = 1; id <= N_REQUESTS; id++) {
        if (event[id]) continue;
        tr_request *r = make_request(id);
        r->progress = progress[id];
        progress[id] = NULL;
        if (r->progress) assert_true(tr_progress_fits(r->progress, r, f.config.vocab_size));
        assert_int_equal(tr_engine_submit(engine, r, &err), TR_OK);
    }
    tr_engine_close(engine);
    if (h->at == 0) tr_engine_stop(engine);
    const tr_status st = tr_engine_run(engine, &err);
    if (st != TR_OK) assert_true(st == TR_E_STOP && h->at >= 0 && s.n >= h->at);
    h->n_continued = tr_engine_stats_get(engine).continued;
    tr_progress *list = NULL;
    const bool lost = st == TR_E_STOP && h->unrecorded;
    while (!lost && tr_engine_take(engine, &done, 0) == 1) {
        assert_int_equal(done->kind, TR_EVENT_DONE);
        assert_true(!done->request->progress && !event[done->request->id]);
        event[done->request->id] = done;
        n_taken++;
    }
    assert_int_equal(tr_engine_take_progress(engine, &list, &spent_ns), st == TR_E_STOP);
    for (int id = 1; id <= N_REQUESTS && st == TR_OK; id++)
        assert_non_null(event[id]); /* the stop came after the last step */
    h->n_ended = 0;
    while (list) {
        tr_progress *p = list;
        list = p->next;
        if (p->n_event && !lost) { /* taken, and recorded: as the job sees by the number */
            assert_true(p->n_event <= n_taken && event[p->id]);
            tr_progress_free(p);
            continue;
        }
        h->n_ended += p->n_event > 0;
        assert_true(!event[p->id] && !progress[p->id]);
        progress[p->id] = p;
    }
    tr_engine_free(engine);
    return s.n;
}

static void same_scores(const tr_scores *a, const tr_scores *b, int id)
{
    assert_int_equal(a->n, b->n);
    if (!a->n) return;
    assert_int_equal(a->n_top, b->n_top);
    const size_t n = (size_t)a->n * 4, top = n * (size_t)a->n_top;
    if (memcmp(a->logprob, b->logprob, n) || memcmp(a->rank, b->rank, n) ||
        (top &&
         (memcmp(a->top_token, b->top_token, top) || memcmp(a->top_logprob, b->top_logprob, top))))
        fail_msg("request %d: other scores", id);
}

static void same(const tr_event *a, const tr_event *b, int id)
{
    assert_non_null(b);
    assert_int_equal(a->n_choices, b->n_choices);
    same_scores(&a->prompt_scores, &b->prompt_scores, id);
    for (int i = 0; i < a->n_choices; i++) {
        const tr_choice *x = &a->choice[i], *y = &b->choice[i];
        if (x->n_token != y->n_token ||
            (x->n_token && memcmp(x->token, y->token, (size_t)x->n_token * 4)))
            fail_msg("request %d, choice %d: other tokens (%d and %d)", id, i, x->n_token,
                     y->n_token);
        assert_int_equal(x->finish, y->finish);
        assert_int_equal(x->stop, y->stop);
        assert_int_equal(x->n_text, y->n_text);
        assert_memory_equal(x->text, y->text, x->n_text);
        same_scores(&x->scores, &y->scores, id);
    }
}

static void forget(tr_event **event)
{
    for (int id = 1; id <= N_REQUESTS; id++) {
        tr_event_free(event[id]);
        event[id] = NULL;
    }
}

/* twice: what goes on is stopped at the same step again. unrecorded: killed before anybody recorded what had ended. */
static void every_step(int ring, bool twice, bool unrecorded)
{
    tr_event *whole[N_REQUESTS + 1] = {0}, *parts[N_REQUESTS + 1] = {0};
    tr_progress *progress[N_REQUESTS + 1] = {0};
    how undisturbed = {.ring = ring, .n_slots = N_SLOTS, .at = -1};
    const int n = run(&undisturbed, whole, progress);
    int n_continued = 0;
    uint64_t n_ended = 0;

    assert_in_range(n, 15, STEPS_MAX);
    assert_int_equal(whole[7]->choice[0].finish, TR_FINISH_STOP); /* the stop string was met */
    for (int at = 0; at < n; at++) {
        how stopped = {.ring = ring, .n_slots = N_SLOTS, .at = at, .unrecorded = unrecorded};
        uint64_t n_saved = 0;
        run(&stopped, parts, progress);
        n_ended += stopped.n_ended;
        for (int id = 1; id <= N_REQUESTS; id++)
            n_saved += progress[id] != NULL;
        n_continued += (int)n_saved;
        if (twice) {
            stopped.at = at / 2;
            run(&stopped, parts, progress);
            n_saved = 0;
            for (int id = 1; id <= N_REQUESTS; id++)
                n_saved += progress[id] != NULL;
        }
        run(&undisturbed, parts, progress);
        assert_int_equal(undisturbed.n_continued, n_saved);
        for (int id = 1; id <= N_REQUESTS; id++)
            same(whole[id], parts[id], id);
        forget(parts);
    }
    assert_true(n_continued > n);
    assert_int_equal(n_ended > 0, unrecorded);
    forget(whole);
}

static void test_one_in_flight(void **state)
{
    (void)state;
    every_step(1, false, false);
}

static void test_two_in_flight(void **state)
{
    (void)state;
    every_step(2, true, false);
}

static void test_unrecorded(void **state)
{
    (void)state;
    every_step(2, false, true);
}

/* Several have saved tokens, one at a time runs: those that are never begun do not go on with theirs, and keep them. */
static void test_went_on(void **state)
{
    tr_event *event[N_REQUESTS + 1] = {0};
    tr_progress *progress[N_REQUESTS + 1] = {0};
    how then = {.ring = 1, .n_slots = 1, .at = 1}, last = {.ring = 1, .n_slots = N_SLOTS, .at = -1};
    int n_tried = 0;
    (void)state;

    for (int at = 4; at < 12; at++) {
        how first = {.ring = 1, .n_slots = N_SLOTS, .at = at};
        uint64_t n_saved = 0;
        run(&first, event, progress);
        assert_int_equal(first.n_continued, 0);
        for (int id = 1; id <= N_REQUESTS; id++)
            n_saved += progress[id] != NULL;
        if (n_saved >= 2) {
            n_tried++;
            run(&then, event, progress);
            assert_int_equal(then.n_continued, 1);
        }
        run(&last, event, progress);
        forget(event);
    }
    assert_true(n_tried > 0);
}

static int open_model(void **state)
{
    char dir[512], path[600];
    tr_err err;
    const tr_fixture_options options = {.dir = tr_source_path(dir, sizeof dir, "models/tiny"),
                                        .kv_dtype = TR_F32,
                                        .max_model_len = MAX_LEN,
                                        .n_slots = N_SLOTS,
                                        .max_rows = BATCH + N_SLOTS,
                                        .n_threads = 1};
    (void)state;
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (tr_tokenizer_open(&tokenizer, path, NULL, NULL, &err) != TR_OK) return -1;
    return tr_fixture_open(&f, &options);
}

static int close_model(void **state)
{
    (void)state;
    tr_fixture_close(&f);
    tr_tokenizer_free(tokenizer);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_in_flight),
        cmocka_unit_test(test_two_in_flight),
        cmocka_unit_test(test_unrecorded),
        cmocka_unit_test(test_went_on),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
