/* Who is slow, and how stages overlap: the figures from made-up samples, and the leader's warning from ranks in threads. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "engine/pace.h"
#include "loopback.h"

static tr_pace_sample steps(int stage, int n, double ms)
{
    return (tr_pace_sample){
        .stage = stage, .n_even = (uint64_t)n, .own_ns = (uint64_t)(n * ms * 1e6)};
}

static double ratio(const tr_pace_sample *all, int n, int rank)
{
    double own_s, median_s;
    return tr_pace_ratio(all, n, rank, &own_s, &median_s);
}

static void test_ratio(void **state)
{
    double own_s, median_s;
    (void)state;
    const tr_pace_sample three[] = {steps(0, 50, 4), steps(0, 50, 12), steps(0, 50, 5)};
    assert_float_equal(tr_pace_ratio(three, 3, 1, &own_s, &median_s), 2.4, 1e-6);
    assert_float_equal(own_s, 0.012, 1e-9);
    assert_float_equal(median_s, 0.005, 1e-9);
    assert_float_equal(ratio(three, 3, 0), 0.8, 1e-6);
    assert_float_equal(ratio(three, 3, 2), 1, 1e-6);

    /* Of two the faster one is the measure: else nobody could be twice as slow. */
    const tr_pace_sample two[] = {steps(0, 50, 4), steps(0, 50, 10)};
    assert_float_equal(ratio(two, 2, 1), 2.5, 1e-6);
    assert_float_equal(ratio(two, 2, 0), 1, 1e-6);

    /* All alike: nobody. */
    const tr_pace_sample same[] = {steps(0, 50, 4), steps(0, 50, 4), steps(0, 50, 4),
                                   steps(0, 50, 4)};
    for (int i = 0; i < 4; i++)
        assert_float_equal(ratio(same, 4, i), 1, 1e-6);

    /* Steps differ in number: a step's time counts. */
    const tr_pace_sample uneven[] = {steps(0, 100, 4), steps(0, 20, 8), steps(0, 50, 4)};
    assert_float_equal(ratio(uneven, 3, 1), 2, 1e-6);
}

/* Stages differ in layers: each rank is compared with its own; one that is alone in its stage with all. */
static void test_stages(void **state)
{
    (void)state;
    const tr_pace_sample pairs[] = {steps(0, 50, 4), steps(0, 50, 4), steps(1, 50, 12),
                                    steps(1, 50, 12)};
    for (int i = 0; i < 4; i++)
        assert_float_equal(ratio(pairs, 4, i), 1, 1e-6);
    const tr_pace_sample alone[] = {steps(0, 50, 4), steps(1, 50, 5), steps(2, 50, 20),
                                    steps(3, 50, 5)};
    assert_float_equal(ratio(alone, 4, 2), 4, 1e-6);
    assert_float_equal(ratio(alone, 4, 0), 0.8, 1e-6);
}

/* What says nothing: too few steps, nobody to compare with, no time at all. */
static void test_unknown(void **state)
{
    (void)state;
    const tr_pace_sample few[] = {steps(0, 50, 4), steps(0, TR_PACE_STEPS - 1, 40),
                                  steps(0, 50, 4)};
    assert_true(ratio(few, 3, 1) == 0);
    assert_float_equal(ratio(few, 3, 0), 1, 1e-6);
    const tr_pace_sample nobody[] = {steps(0, 50, 4), steps(0, 0, 0)};
    assert_true(ratio(nobody, 2, 0) == 0);
    const tr_pace_sample still[] = {steps(0, 50, 0), steps(0, 50, 0)};
    assert_true(ratio(still, 2, 0) == 0);
    const tr_pace_sample odd[] = {steps(-5, 50, 4), steps(INT32_MAX, 50, 9)};
    assert_float_equal(ratio(odd, 2, 1), 2.25, 1e-6);
}

static void test_overlap(void **state)
{
    tr_pace_share share[2];
    (void)state;
    const tr_pace_sample s[] = {
        {.stage = 0, .n_full = 10, .full_ns = 1000, .run_ns = 700, .rows_ns = 0},
        {.stage = 0, .n_full = 10, .full_ns = 1000, .run_ns = 500, .rows_ns = 100},
        {.stage = 1, .n_full = 10, .full_ns = 2000, .run_ns = 1800, .rows_ns = 150},
        {.stage = 1, .n_full = 0},
        {.stage = 7, .n_full = 1, .full_ns = 1, .run_ns = 1}, /* nobody's */
    };
    assert_float_equal(tr_pace_overlap(s, 5, 2, share), 0.9, 1e-9);
    assert_float_equal(share[0].runs, 0.6, 1e-9);
    assert_float_equal(share[0].rows, 0.05, 1e-9);
    assert_float_equal(share[0].plan, 0.35, 1e-9);
    assert_float_equal(share[1].runs, 0.9, 1e-9);
    assert_float_equal(share[1].plan, 0.025, 1e-9);
    assert_true(tr_pace_overlap(s + 3, 1, 2, share) == 0);
}

/* ---- a warning: ranks in threads, each with a clock of its own that only its naps and its waiting move --------------- */

enum { N_RANKS = 3, SLOW = 2, N_STEPS = 60 };

typedef struct rank_run {
    tr_comm *control;
    pthread_barrier_t *step;
    _Atomic int *due;
    _Atomic uint64_t *now_ns; /* [N_RANKS] the clocks as a step ends */
    tr_log *log;
    int rank, slow_ms;
    uint64_t repeat_ns;
    tr_status st;
} rank_run;

/* This thread's time; 0: the machine's. Ahead of the machine's, so that what waits until a time waits long enough. */
static _Thread_local uint64_t my_ns;

/* In place of the C library's, for tr_now_ns. */
int clock_gettime(clockid_t id, struct timespec *t)
{
    if (!my_ns) return (int)syscall(SYS_clock_gettime, id, t);
    *t = (struct timespec){.tv_sec = (time_t)(my_ns / 1000000000u),
                           .tv_nsec = (long)(my_ns % 1000000000u)};
    return 0;
}

/* Everybody is here: it is as late as it is for the last one. */
static void meet(rank_run *r)
{
    r->now_ns[r->rank] = my_ns;
    pthread_barrier_wait(r->step);
    for (int i = 0; i < N_RANKS; i++)
        if (r->now_ns[i] > my_ns) my_ns = r->now_ns[i];
    pthread_barrier_wait(r->step);
}

/* Steps of 2 ms, and of slow_ms on one rank; the others wait for it, which is no compute of theirs. */
static void *run_rank(void *arg)
{
    rank_run *r = arg;
    const tr_pace_options o = {.control = r->control,
                               .host = r->rank == SLOW ? "node07" : "node01",
                               .n_stages = 1,
                               .ring = 1,
                               .window_s = 0.1,
                               .repeat_ns = r->repeat_ns,
                               .log = r->log};
    uint64_t waited_ns = 0;
    double overlap;
    tr_pace *p;
    tr_err err;

    my_ns = tr_now_ns() + UINT64_C(3600000000000);
    meet(r);
    r->st = tr_pace_create(&p, &o, &err);
    for (int i = 0; i < N_STEPS && r->st == TR_OK; i++) {
        if (r->rank == 0) *r->due = tr_pace_due(p);
        tr_pace_begin(p, waited_ns, 0);
        my_ns += UINT64_C(1000000) * (unsigned)(r->rank == SLOW ? r->slow_ms : 2);
        const uint64_t begun_ns = my_ns;
        meet(r);
        waited_ns += my_ns - begun_ns;
        tr_pace_end(p, waited_ns, 0, true, true);
        r->st = *r->due ? tr_pace_tell(p, &err) : tr_pace_hear(p, false, &err);
        meet(r);
    }
    if (r->st == TR_OK) r->st = tr_pace_sum_up(p, &overlap, &err);
    tr_pace_free(p);
    return NULL;
}

/* What the leader says in the end. */
static void run(int slow_ms, uint64_t repeat_ns, char *said, size_t room)
{
    rank_run r[N_RANKS];
    pthread_t thread[N_RANKS];
    pthread_barrier_t step;
    _Atomic int due = 0;
    _Atomic uint64_t now_ns[N_RANKS] = {0};
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);
    tr_log *log = tr_log_create(f, false, false);
    tr_loopback *l = tr_loopback_create(N_RANKS);

    assert_true(f && log && l);
    pthread_barrier_init(&step, NULL, N_RANKS);
    for (int i = 0; i < N_RANKS; i++)
        r[i] = (rank_run){.control = tr_loopback_comm(l, i),
                          .step = &step,
                          .due = &due,
                          .now_ns = now_ns,
                          .log = i ? NULL : log,
                          .rank = i,
                          .slow_ms = slow_ms,
                          .repeat_ns = repeat_ns};
    for (int i = 0; i < N_RANKS; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, run_rank, &r[i]), 0);
    for (int i = 0; i < N_RANKS; i++) {
        pthread_join(thread[i], NULL);
        assert_int_equal(r[i].st, TR_OK);
        tr_comm_free(r[i].control);
    }
    tr_loopback_free(l);
    tr_log_free(log);
    fclose(f);
    snprintf(said, room, "%s", text);
    free(text);
    pthread_barrier_destroy(&step);
}

static int count(const char *text, const char *word)
{
    int n = 0;
    for (const char *p = text; (p = strstr(p, word)); p++)
        n++;
    return n;
}

static void test_warning(void **state)
{
    char said[8192];
    (void)state;
    run(30, 0, said, sizeof said);
    if (count(said, "rank 2 on node07 is slow") != 1 || count(said, "\n") != 1)
        fail_msg("said: %s", said);
    run(30, 1, said, sizeof said); /* as often as there are windows, from the second on */
    assert_true(count(said, "rank 2 on node07 is slow") > 1);
    assert_int_equal(count(said, "rank 0 ") + count(said, "rank 1 "), 0);
}

static void test_no_warning(void **state)
{
    char said[8192];
    (void)state;
    run(2, 0, said, sizeof said);
    if (said[0]) fail_msg("said: %s", said);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ratio),   cmocka_unit_test(test_stages),
        cmocka_unit_test(test_unknown), cmocka_unit_test(test_overlap),
        cmocka_unit_test(test_warning), cmocka_unit_test(test_no_warning),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
