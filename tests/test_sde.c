/* Own counters as PAPI's software-defined events: read through PAPI, they are what was counted. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <cmocka.h>
#ifdef HAVE_PAPI
#include <papi.h>
#endif

#include "profile/papi.h"
#include "profile/sde.h"

#if defined HAVE_PAPI && defined HAVE_SDE
static const char *const groups[] = {"MOE", "WORLD"};

static void count(tr_sde *s, int n)
{
    for (int i = 0; i < n; i++) {
        const uint64_t bytes[] = {1000u + (unsigned)i, 7};
        tr_sde_step(
            s,
            &(tr_prof_step){
                .tok_prefill = 5, .tok_decode = 3, .accepted = 1, .pages_used = 40 + (uint32_t)i},
            bytes);
    }
}

static void papi_reads_what_was_counted(void **state)
{
    static const char *const name[] = {"sde:::trireme::steps", "sde:::trireme::tokens_prefill",
                                       "sde:::trireme::tokens_decode",
                                       "sde:::trireme::tokens_accepted"};
    int set = PAPI_NULL;
    long long value[4];
    tr_sde *s = *state;

    assert_int_equal(PAPI_create_eventset(&set), PAPI_OK);
    for (int i = 0; i < 4; i++)
        if (PAPI_add_named_event(set, name[i]) != PAPI_OK) fail_msg("%s cannot be added", name[i]);
    count(s, 10); /* before the start: not counted */
    assert_int_equal(PAPI_start(set), PAPI_OK);
    count(s, 42);
    assert_int_equal(PAPI_stop(set, value), PAPI_OK);
    assert_int_equal(value[0], 42);
    assert_int_equal(value[1], 5 * 42);
    assert_int_equal(value[2], 3 * 42);
    assert_int_equal(value[3], 42);
    PAPI_cleanup_eventset(set);
    PAPI_destroy_eventset(&set);
}

/* The same through our own reader, as --papi does it, with events that are not there among them. */
static void the_profile_reads_them_too(void **state)
{
    tr_papi *p = tr_papi_open("sde:::trireme::steps,NO_SUCH_EVENT,sde:::trireme::bytes_MOE");
    double value[3] = {-1, -1, -1}, phase[3] = {-1, -1, -1};

    assert_non_null(p);
    const tr_profile_counters c = tr_papi_counters(p);
    assert_int_equal(c.n, 3);
    assert_null(c.absent[0]);
    assert_non_null(c.absent[1]);
    assert_null(c.absent[2]);
    count(*state, 5); /* before the first step */
    tr_papi_step(p, TR_PHASE_NONE, 0);
    tr_papi_step(p, TR_PHASE_PREFILL, 1);
    c.phase(c.ctx, TR_PHASE_PREFILL, phase);
    assert_true(phase[0] == 0);
    count(*state, 9);
    tr_papi_begin(p, TR_PHASE_IDLE, 2); /* the next one has begun already: these are not its */
    tr_papi_step(p, TR_PHASE_DECODE, 3);
    c.read(c.ctx, value);
    assert_true(value[0] == 14);
    c.phase(c.ctx, TR_PHASE_DECODE, phase);
    assert_true(phase[0] == 9);
    c.phase(c.ctx, TR_PHASE_IDLE, phase);
    assert_true(phase[0] == 0);
    tr_papi_rest(p, true);
    count(*state, 100);
    tr_papi_step(p, TR_PHASE_DECODE, 4);
    tr_papi_rest(p, false);
    count(*state, 1);
    tr_papi_step(p, TR_PHASE_DECODE, 5);
    c.phase(c.ctx, TR_PHASE_DECODE, phase);
    c.read(c.ctx, value);
    assert_true(phase[0] == 10 && value[0] == 15);
    tr_papi_close(p);
}
#endif

/* Built with PAPI or not: what cannot be counted says why, and is never a zero. */
static void absent_events_have_a_reason(void **state)
{
    tr_papi *p = tr_papi_open("NO_SUCH_EVENT,,ANOTHER:::ONE");

    (void)state;
    assert_non_null(p);
    const tr_profile_counters c = tr_papi_counters(p);
    assert_int_equal(c.n, 2);
    for (int i = 0; i < c.n; i++)
        assert_true(c.absent[i] && strchr(c.absent[i], ':'));
    tr_papi_begin(p, TR_PHASE_DECODE, 0);
    tr_papi_step(p, TR_PHASE_DECODE, 1);
    tr_papi_close(p);
    tr_papi_close(NULL);
    tr_papi_begin(NULL, TR_PHASE_DECODE, 0);
    tr_papi_step(NULL, TR_PHASE_DECODE, 0);
    tr_papi_rest(NULL, true);
    tr_sde_step(NULL, &(tr_prof_step){0}, NULL);
    tr_sde_close(NULL);
}

/* Names from the command line cannot disturb each other or the datasets they become: twice the same, the profile's own,
 * far too long. */
static void hostile_names_stay_apart(void **state)
{
    char events[1200] = "NO_SUCH,NO_SUCH,time,.,..,";

    (void)state;
    memset(events + strlen(events), 'x', 1000);
    tr_papi *p = tr_papi_open(events);
    assert_non_null(p);
    const tr_profile_counters c = tr_papi_counters(p);
    assert_int_equal(c.n, 5);
    for (int i = 0; i < c.n; i++) {
        assert_non_null(c.absent[i]);
        assert_string_not_equal(c.name[i], "time");
        assert_string_not_equal(c.name[i], ".");
        assert_string_not_equal(c.name[i], "..");
        for (int k = 0; k < i; k++)
            assert_string_not_equal(c.name[i], c.name[k]);
    }
#ifdef HAVE_PAPI
    assert_string_equal(c.absent[4], "this trireme: the event's name is too long");
#else
    assert_string_equal(c.absent[4], "this trireme: built without PAPI");
#endif
    tr_papi_close(p);
    p = tr_papi_open(",,,");
    assert_non_null(p);
    assert_int_equal(tr_papi_counters(p).n, 0);
    tr_papi_close(p);
}

/* However long the list is, every event of it is there: counted, or absent with its reason. */
static void no_event_of_a_long_list_is_dropped(void **state)
{
    enum { MANY = 300 };
    static char events[MANY * 16 + 64];
    size_t at = 0;

    (void)state;
    for (int i = 0; i < MANY; i++)
        at += (size_t)snprintf(events + at, sizeof events - at, "NO_SUCH_%d,", i);
    snprintf(events + at, sizeof events - at, "perf::PAGE-FAULTS");
    tr_papi *p = tr_papi_open(events);
    assert_non_null(p);
    const tr_profile_counters c = tr_papi_counters(p);
    assert_int_equal(c.n, MANY + 1);
    assert_string_equal(c.name[MANY - 1], "NO_SUCH_299");
    assert_string_equal(c.name[MANY], "perf::PAGE-FAULTS");
    for (int i = 0; i < MANY; i++)
        assert_non_null(c.absent[i]);
    tr_papi_close(p);
}

enum { PAGES = 64 };

static void touch_pages(void)
{
    const size_t bytes = PAGES << 12;
    volatile char *page =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(page != MAP_FAILED);
    madvise((void *)page, bytes, MADV_NOHUGEPAGE); /* where there are none it fails */
    for (size_t i = 0; i < bytes; i += 4096)
        page[i] = 1;
    munmap((void *)page, bytes);
}

/* The kernel's counters are read where a phase ends and once in a while: nothing is lost, nothing is another phase's. */
static void the_kernel_is_asked_seldom(void **state)
{
    tr_papi *p = tr_papi_open("perf::PAGE-FAULTS");
    double value = -1, prefill = -1, decode = -1, none = -1;
    const uint64_t t = 7 * (uint64_t)TR_PAPI_READ_NS;

    (void)state;
    assert_non_null(p);
    const tr_profile_counters c = tr_papi_counters(p);
    if (c.absent[0]) { /* cannot be counted on this machine */
        tr_papi_close(p);
        skip();
    }
    touch_pages(); /* loading */
    tr_papi_begin(p, TR_PHASE_PREFILL, t);
    c.phase(c.ctx, TR_PHASE_NONE, &none);
    assert_true(none >= PAGES);
    touch_pages();
    tr_papi_step(p, TR_PHASE_PREFILL, t + 1);
    tr_papi_begin(p, TR_PHASE_PREFILL, t + 2);
    c.phase(c.ctx, TR_PHASE_PREFILL, &prefill);
    assert_true(prefill == 0); /* not asked yet */
    tr_papi_begin(p, TR_PHASE_DECODE, t + 3);
    c.phase(c.ctx, TR_PHASE_PREFILL, &prefill);
    assert_true(prefill >= PAGES && prefill < 2 * PAGES);
    touch_pages();
    touch_pages();
    tr_papi_step(p, TR_PHASE_DECODE, t + 3 + TR_PAPI_READ_NS - 1);
    c.phase(c.ctx, TR_PHASE_DECODE, &decode);
    assert_true(decode == 0);
    tr_papi_step(p, TR_PHASE_DECODE, t + 3 + TR_PAPI_READ_NS);
    c.phase(c.ctx, TR_PHASE_DECODE, &decode);
    assert_true(decode >= 2 * PAGES && decode < 3 * PAGES);
    tr_papi_begin(p, TR_PHASE_NONE, t + 4 + TR_PAPI_READ_NS);
    c.read(c.ctx, &value);
    c.phase(c.ctx, TR_PHASE_DECODE, &decode);
    c.phase(c.ctx, TR_PHASE_NONE, &none);
    assert_true(value == none + prefill + decode);
    tr_papi_close(p);
}

/* What only the kernel does is counted, or absent with a reason: never a zero. */
static void context_switches_are_no_zero(void **state)
{
    enum { NAPS = 20 };
    tr_papi *p = tr_papi_open("perf::CONTEXT-SWITCHES,perf::cs");
    double value[2] = {-1, -1};

    (void)state;
    assert_non_null(p);
    const tr_profile_counters c = tr_papi_counters(p);
    assert_int_equal(!c.absent[0], !c.absent[1]);
    for (int i = 0; i < NAPS; i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL);
    tr_papi_begin(p, TR_PHASE_DECODE, 1);
    c.read(c.ctx, value);
    for (int i = 0; i < 2; i++)
        if (c.absent[i])
            assert_non_null(strchr(c.absent[i], ':'));
        else
            assert_true(value[i] >= NAPS);
    tr_papi_close(p);
}

int main(void)
{
    const struct CMUnitTest always[] = {cmocka_unit_test(absent_events_have_a_reason),
                                        cmocka_unit_test(hostile_names_stay_apart),
                                        cmocka_unit_test(no_event_of_a_long_list_is_dropped),
                                        cmocka_unit_test(the_kernel_is_asked_seldom),
                                        cmocka_unit_test(context_switches_are_no_zero)};
    int failed = 0;

#if defined HAVE_PAPI && defined HAVE_SDE
    tr_sde *s = tr_sde_open(groups, 2);
    if (s && PAPI_library_init(PAPI_VER_CURRENT) == PAPI_VER_CURRENT) {
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_prestate(papi_reads_what_was_counted, s),
            cmocka_unit_test_prestate(the_profile_reads_them_too, s),
        };
        failed += cmocka_run_group_tests(tests, NULL, NULL);
    } else {
        puts("skipped: no libsde.so.1, or PAPI does not start");
    }
    failed += cmocka_run_group_tests(always, NULL, NULL);
    tr_sde_close(
        s); /* the last thing: libsde 1.0's look-up of names reads what a closed library has left behind */
#else
    puts("skipped: built without PAPI or without sde_lib.h");
    failed += cmocka_run_group_tests(always, NULL, NULL);
#endif
    return failed;
}
