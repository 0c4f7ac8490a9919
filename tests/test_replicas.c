/* Which replica a request goes to: schedulers side by side, a device that samples the same token always, and a queue that is
 * dealt out as the engine does. What is found in the caches together is what one replica would find; nobody is left idle. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "engine/replicas.h"

enum {
    PAGE = TR_PAGE_TOKENS,
    VOCAB = 500,
    MOST = 4,
    SEQUENCES = 8,
    MAX_LEN = 8 * PAGE,
    N_SHARED = 3 * PAGE,
    N_OWN = 20,
    N_GENERATED = 6,
    N_HEAD = 64,
};

typedef struct job {
    tr_scheduler *s[MOST];
    int n;
    int cached, finished;
    int taken[MOST], computed[MOST]; /* requests; rows of their prompts that were not found */
} job;

static void open_job(job *j, int n)
{
    tr_scheduler_options o = {
        .limits = {.n_slots = SEQUENCES,
                   .max_pages = MAX_LEN / PAGE,
                   .n_pages = 200,
                   .n_vocab = VOCAB,
                   .n_rows_max = 256 + SEQUENCES,
                   .n_head_max = N_HEAD,
                   .index_topk = 2048},
        .max_batch_tokens = 256,
        .max_sequences = SEQUENCES,
        .max_model_len = MAX_LEN,
        .ring = 1,
        .prefix_cache = true,
        .eos = -1,
        .bos = -1,
        .pad = -1,
    };
    tr_err err = {0};

    *j = (job){.n = n};
    for (int d = 0; d < n; d++)
        if (tr_scheduler_create(&j->s[d], &o, &err) != TR_OK) fail_msg("%s", err.text);
}

static void close_job(job *j)
{
    for (int d = 0; d < j->n; d++)
        tr_scheduler_free(j->s[d]);
}

/* A prompt of document `doc` with a question of its own behind. */
static tr_event *request(int doc, int id)
{
    tr_event *e = calloc(1, sizeof *e);
    tr_request *r = calloc(1, sizeof *r);

    assert_true(e && r);
    r->id = (uint64_t)id;
    r->n_prompt = N_SHARED + N_OWN;
    r->prompt = calloc(r->n_prompt, sizeof *r->prompt);
    assert_non_null(r->prompt);
    for (int i = 0; i < N_SHARED; i++)
        r->prompt[i] = (doc * 131 + i * 7) % VOCAB;
    for (int i = 0; i < N_OWN; i++)
        r->prompt[N_SHARED + i] = (id * 17 + i) % VOCAB;
    r->params = (tr_params){.n = 1,
                            .key = (uint64_t)id,
                            .top_p = 1,
                            .top_k = -1,
                            .max_tokens = N_GENERATED,
                            .repetition = 1,
                            .n_logprobs = -1,
                            .n_prompt_logprobs = -1};
    e->request = r;
    return e;
}

static void collect(job *j, int d)
{
    for (tr_event *e; (e = tr_scheduler_event(j->s[d]));) {
        assert_int_equal(e->kind, TR_EVENT_DONE);
        j->cached += e->cached_tokens;
        j->computed[d] += (int)e->request->n_prompt - e->cached_tokens;
        j->finished++;
        tr_event_free(e);
    }
}

static void run_step(job *j)
{
    static int32_t token[N_HEAD];
    tr_err err = {0};

    for (int d = 0; d < j->n; d++) {
        const tr_plan *plan;
        if (tr_scheduler_plan(j->s[d], &plan, &err) != TR_OK) fail_msg("%s", err.text);
        if (!plan) continue;
        const tr_step_output out = {.n_head = plan->n_head_rows, .token = token};
        assert_true(out.n_head <= N_HEAD);
        for (int i = 0; i < out.n_head; i++)
            token[i] = 3;
        tr_scheduler_commit(j->s[d], &out);
        collect(j, d);
    }
}

/* All requests at once, as a file gives them; `window` of them in the queue at most. doc[n]: whose prefix each has. */
static void run(job *j, const int *doc, int n, int window)
{
    for (int at = 0, steps = 0; j->finished < n; steps++) {
        assert_true(steps < 100 * n);
        while (at < n) {
            tr_event *e = request(doc[at], at);
            const int behind = n - at - 1 < window ? n - at - 1 : window;
            const int d = tr_replica_choose(j->s, j->n, e->request, behind);
            if (d < 0) {
                tr_event_free(e);
                break;
            }
            j->taken[d]++;
            assert_null(tr_scheduler_add(j->s[d], e));
            at++;
        }
        run_step(j);
    }
}

static double balance(const int *load, int n)
{
    int most = 0, sum = 0;

    for (int d = 0; d < n; d++) {
        most = load[d] > most ? load[d] : most;
        sum += load[d];
    }
    return (double)most * n / sum;
}

/* Documents with several questions each: sorted, and dealt out one by one. As many tokens are found as in one replica. */
static void test_documents(void **state)
{
    enum { N = 48 };
    static const int order[][2] = {{1, 4}, {12, 0}, {1, 8}}; /* {stride, run}: see below */
    (void)state;
    for (int replicas = 2; replicas <= MOST; replicas += 2)
        for (size_t o = 0; o < sizeof order / sizeof *order; o++) {
            int doc[N];
            job one, many;
            for (int i = 0; i < N; i++)
                doc[i] = order[o][1] ? i / order[o][1] : i % order[o][0];
            open_job(&one, 1);
            open_job(&many, replicas);
            run(&one, doc, N, 4 * SEQUENCES);
            run(&many, doc, N, 4 * SEQUENCES * replicas);
            assert_true(one.cached > 0);
            if (many.cached != one.cached)
                fail_msg("%d replicas, order %zu: %d tokens found in caches, %d in one's", replicas,
                         o, many.cached, one.cached);
            if (balance(many.taken, replicas) > 1.5 || balance(many.computed, replicas) > 1.5)
                fail_msg("%d replicas, order %zu: requests %.2f, rows %.2f beyond the average",
                         replicas, o, balance(many.taken, replicas),
                         balance(many.computed, replicas));
            close_job(&one);
            close_job(&many);
        }
}

/* One prefix that everybody has: no replica waits for the others because of it, and few compute it. */
static void test_one_for_all(void **state)
{
    enum { N = 60 };
    static const int doc[N];
    (void)state;
    for (int replicas = 2; replicas <= MOST; replicas++)
        for (int window = 0; window <= N; window += 20) {
            job j;
            open_job(&j, replicas);
            run(&j, doc, N, window);
            if (balance(j.taken, replicas) > 1.5)
                fail_msg("%d replicas, %d in the queue: one takes %.2f of the average", replicas,
                         window, balance(j.taken, replicas));
            assert_true(j.cached >= (N - replicas) * N_SHARED);
            close_job(&j);
        }
}

/* Nothing in common: the least loaded one, as ever. */
static void test_strangers(void **state)
{
    enum { N = 40 };
    int doc[N];
    job j;
    (void)state;
    for (int i = 0; i < N; i++)
        doc[i] = i;
    open_job(&j, 4);
    run(&j, doc, N, 100);
    assert_int_equal(j.cached, 0);
    assert_true(balance(j.taken, 4) <= 1.1);
    close_job(&j);
}

/* What is known: pages in the index, pages of those who wait; nothing to one whose prompt is scored, or without a whole page. */
static void test_known(void **state)
{
    job j;
    tr_event *a = request(1, 1), *b = request(1, 2), *c = request(2, 3);
    (void)state;
    open_job(&j, 1);
    assert_int_equal(tr_scheduler_known(j.s[0], b->request), 0);
    assert_null(tr_scheduler_add(j.s[0], a));
    assert_int_equal(tr_scheduler_known(j.s[0], b->request), N_SHARED); /* it waits */
    for (int i = 0; i < 20; i++)
        run_step(&j);
    assert_int_equal(j.finished, 1);
    assert_int_equal(tr_scheduler_known(j.s[0], b->request),
                     N_SHARED); /* it has gone, the pages are there */
    assert_int_equal(tr_scheduler_known(j.s[0], c->request), 0);
    b->request->params.n_prompt_logprobs = 0;
    assert_int_equal(tr_scheduler_known(j.s[0], b->request), 0);
    b->request->params.n_prompt_logprobs = -1;
    b->request->n_prompt = N_SHARED; /* its last row must run */
    assert_int_equal(tr_scheduler_known(j.s[0], b->request), N_SHARED - PAGE);
    b->request->n_prompt = PAGE;
    assert_int_equal(tr_scheduler_known(j.s[0], b->request), 0);
    tr_scheduler_clear_cache(j.s[0]);
    b->request->n_prompt = N_SHARED + N_OWN;
    assert_int_equal(tr_scheduler_known(j.s[0], b->request), 0);
    tr_event_free(b);
    tr_event_free(c);
    close_job(&j);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_documents),
        cmocka_unit_test(test_one_for_all),
        cmocka_unit_test(test_strangers),
        cmocka_unit_test(test_known),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
