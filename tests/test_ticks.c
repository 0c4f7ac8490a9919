/* base/ticks: a made-up counter beside a made-up clock, whatever the counter does; then this machine's, on all its processors. */
#include <config.h>

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/ticks.h"

#define MS UINT64_C(1000000)
#define S  (1000 * MS)

/* ---- a counter of our own ------------------------------------------------------------------------------------------------ */

typedef struct world { /* the counter runs at `ghz` of the clock's time, from count_0 at ns_0 */
    tr_ticks t;
    uint64_t ns, ns_0, count_0, told;
    double ghz;
    uint64_t anchors; /* times that the clock was asked */
} world;

static uint64_t count_of(const world *w)
{
    return w->count_0 + (uint64_t)((double)(w->ns - w->ns_0) * w->ghz);
}

/* From here on the counter goes on at another rate, and `jump` ticks further on. */
static void change(world *w, double ghz, int64_t jump)
{
    w->count_0 = count_of(w) + (uint64_t)jump;
    w->ns_0 = w->ns;
    w->ghz = ghz;
}

/* As tr_ticks_now, some time later. */
static uint64_t after(world *w, uint64_t ns)
{
    w->ns += ns;
    const uint64_t count = count_of(w), before = w->told;
    const bool lasts = w->t.span && count - w->t.count < w->t.span;

    w->anchors += !lasts;
    w->told = lasts ? tr_ticks_at(&w->t, count) : tr_ticks_anchor(&w->t, count, w->ns);
    assert_true(w->told >= before);
    assert_int_equal(w->told, w->t.last_ns);
    return w->told;
}

static uint64_t error_of(const world *w)
{
    return w->told > w->ns ? w->told - w->ns : w->ns - w->told;
}

/* Until the rate is known. */
static void warm(world *w, double ghz)
{
    *w = (world){.ns = 77 * S, .ns_0 = 77 * S, .count_0 = UINT64_MAX - 1000, .ghz = ghz};
    for (int i = 0; i < 30; i++) {
        after(w, MS / 2);
        assert_true(error_of(w) < 50);
    }
    assert_int_equal(w->t.state, TR_TICKS_ANCHORED);
}

static void it_is_the_clocks_time(void **state)
{
    static const double ghz[] = {1.2, 2.7, 5.7};
    world w;

    (void)state;
    for (size_t i = 0; i < sizeof ghz / sizeof *ghz; i++) {
        uint32_t x = 1;
        warm(&w, ghz[i]);
        w.anchors = 0;
        for (int k = 0; k < 200000; k++) { /* 0 to 65 us: 6.5 s */
            after(&w, (x = x * 1664525 + 1013904223) >> 16);
            assert_true(error_of(&w) < 50);
        }
        assert_true(w.anchors > 3000 && w.anchors < 7000); /* one in a millisecond or so */
        for (int k = 0; k < 50; k++) {                     /* who waits long */
            after(&w, 3600 * S);
            assert_int_equal(w.told, w.ns);
            after(&w, MS / 3);
            assert_true(error_of(&w) < 50);
        }
        assert_int_equal(w.t.strikes, 0);
    }
}

/* What the system does to its clock to keep it right: no more than 500 ppm, for hours. */
static void a_slewed_clock_is_followed(void **state)
{
    world w;

    (void)state;
    warm(&w, 2.7);
    for (int hour = 0; hour < 6; hour++) {
        change(&w, 2.7 * (hour % 2 ? 1.0005 : 0.9995), 0);
        for (int k = 0; k < 36000; k++) {
            after(&w, 99 * MS);
            after(&w, MS * 9 / 10);
            assert_true(error_of(&w) < 1100);
            after(&w, MS / 10);
        }
    }
    assert_int_equal(w.t.strikes, 0);
    assert_int_equal(w.t.state, TR_TICKS_ANCHORED);
}

/* Far on, back, to zero, a little ahead: right again from the next anchor on, within a millisecond, and believed twice. */
static void a_counter_that_jumps_is_given_up(void **state)
{
    static const int64_t jump[] = {INT64_C(1) << 50, -(INT64_C(1) << 40), 1000000, -1000000, -100};
    world w;

    (void)state;
    for (size_t i = 0; i < sizeof jump / sizeof *jump; i++) {
        warm(&w, 2.7);
        for (int strike = 1; strike <= TR_TICKS_STRIKES; strike++) {
            after(&w, 2 * S);
            after(&w, MS / 2);
            change(&w, 2.7, jump[i]);
            for (int k = 0; k < 100; k++) {
                after(&w, MS / 50);
                assert_true(error_of(&w) < MS);
                if (k > 55) assert_true(error_of(&w) < 50);
            }
            /* A hundred ticks are less than what the two readings may be apart. */
            assert_int_equal(w.t.strikes, jump[i] == -100 ? 0 : strike);
        }
        assert_int_equal(w.t.state, jump[i] == -100 ? TR_TICKS_ANCHORED : TR_TICKS_CLOCK);
        for (int k = 0; k < 1000; k++) {
            after(&w, 12345);
            assert_true(error_of(&w) < 50);
        }
    }
}

/* Another machine's processor, after a move; and a machine that slept, by whose clock no time has passed. */
static void another_rate_is_given_up_and_sleep_is_not_time(void **state)
{
    world w;

    (void)state;
    warm(&w, 2.7);
    change(&w, 2.1, 0);
    for (int k = 0; k < 1000; k++) {
        after(&w, MS / 100);
        assert_true(error_of(&w) < MS / 2);
        if (k > 500) assert_int_equal(w.told, w.ns);
    }
    assert_int_equal(w.t.state, TR_TICKS_CLOCK);

    warm(&w, 2.7);
    change(&w, 2.7, INT64_C(2700000000) * 3600);
    for (int k = 0; k < 10000; k++) {
        after(&w, MS / 100);
        assert_true(error_of(&w) < 50);
    }
    assert_int_equal(w.t.strikes, 1);
}

static void no_counter_is_no_matter(void **state)
{
    static const double ghz[] = {0, 0.025, 20};
    world w;

    (void)state;
    for (size_t i = 0; i < sizeof ghz / sizeof *ghz; i++) {
        w = (world){.ns = S, .ns_0 = S, .ghz = ghz[i]};
        for (int k = 0; k < 1000; k++) {
            after(&w, MS / 10);
            assert_int_equal(w.told, w.ns);
        }
        assert_int_equal(w.t.state, TR_TICKS_CLOCK);
    }
}

/* ---- this machine's ------------------------------------------------------------------------------------------------------ */

/* Readings between two of the clock; how many of them are out of that by more than a microsecond. The clock says when readings
 * on two processors may be compared at all: it is monotonic over all of them. */
static int look(tr_ticks *t, int n)
{
    int bad = 0;

    for (int i = 0; i < n; i++) {
        const uint64_t last = t->last_ns, from = tr_now_ns(), now = tr_ticks_now(t),
                       until = tr_now_ns();
        assert_true(now >= last);
        bad += now + 1000 < from || now > until + 1000;
    }
    return bad;
}

static void this_machines_agrees_with_its_clock(void **state)
{
    enum { N = 20000, ROUNDS = 30 };
    tr_ticks t = {0};
    int bad = 0;

    (void)state;
    for (int i = 0; i < ROUNDS; i++) {
        const struct timespec nap = {.tv_nsec = 1000000 + i % 3 * 3000000};
        bad += look(&t, N / ROUNDS);
        nanosleep(&nap, NULL);
    }
    assert_true(t.state == TR_TICKS_ANCHORED || t.state == TR_TICKS_CLOCK);
    assert_true(bad <= N / 1000);
}

/* From one processor to the next, as the scheduler may send a thread. */
static void a_thread_that_moves_never_goes_back(void **state)
{
    cpu_set_t may, one;
    tr_ticks t = {0};
    int bad = 0, moves = 0;

    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof may, &may), 0);
    for (int round = 0; round < 20; round++)
        for (int cpu = 0; cpu < CPU_SETSIZE && moves < 400; cpu++) {
            if (!CPU_ISSET(cpu, &may)) continue;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            if (sched_setaffinity(0, sizeof one, &one) != 0) continue;
            bad += look(&t, 100);
            moves++;
        }
    assert_int_equal(sched_setaffinity(0, sizeof may, &may), 0);
    assert_true(moves > 0);
    assert_true(bad <= moves / 10);
}

/* Streams of two threads tell the same time: what one has read is over when the other reads. */
typedef struct relay {
    _Atomic uint64_t ball; /* time, odd: the other's turn */
    atomic_int bad;
} relay;

static void pass(relay *r, uint64_t mine, int n)
{
    tr_ticks t = {0};

    for (int i = 0; i < n; i++) {
        uint64_t theirs;
        while (((theirs = atomic_load(&r->ball)) & 1) != mine)
            sched_yield();
        const uint64_t now = tr_ticks_now(&t);
        if (now + 2000 < (theirs & ~UINT64_C(1))) atomic_fetch_add(&r->bad, 1);
        atomic_store(&r->ball, (now & ~UINT64_C(1)) | (mine ^ 1));
    }
}

enum { PASSES = 3000 };

static void *pass_back(void *arg)
{
    pass(arg, 1, PASSES);
    return NULL;
}

static void threads_tell_the_same_time(void **state)
{
    relay r = {0};
    pthread_t other;

    (void)state;
    assert_int_equal(pthread_create(&other, NULL, pass_back, &r), 0);
    pass(&r, 0, PASSES);
    pthread_join(other, NULL);
    assert_true(atomic_load(&r.bad) <= PASSES / 100);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_is_the_clocks_time),
        cmocka_unit_test(a_slewed_clock_is_followed),
        cmocka_unit_test(a_counter_that_jumps_is_given_up),
        cmocka_unit_test(another_rate_is_given_up_and_sleep_is_not_time),
        cmocka_unit_test(no_counter_is_no_matter),
        cmocka_unit_test(this_machines_agrees_with_its_clock),
        cmocka_unit_test(a_thread_that_moves_never_goes_back),
        cmocka_unit_test(threads_tell_the_same_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
