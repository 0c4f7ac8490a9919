/* When a run that is to end ends: the graces, the budget, what can still be gained; and the word that signals travel as. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/stop.h"
#include "engine/drain.h"
#include "fixture.h"
#include "vectors.h"

#define S UINT64_C(1000000000)

static const uint64_t usr1 = SIGUSR1, term = (1 << 16) + SIGTERM;

static tr_drain drain_of(double grace_s, uint64_t end_ns, double margin_s)
{
    tr_drain d;
    tr_drain_begin(
        &d, &(tr_drain_options){
                .grace_s = grace_s, .term_grace_s = 5, .end_ns = end_ns, .margin_s = margin_s});
    return d;
}

static void test_words(void **state)
{
    tr_err err = {0};
    (void)state;
    assert_string_equal(tr_stop_word_name(usr1), "USR1");
    assert_string_equal(tr_stop_word_name(term), "TERM");
    assert_string_equal(tr_stop_word_name(SIGINT), "INT");
    assert_string_equal(tr_stop_word_name(SIGALRM), "the time budget");
    assert_string_equal(tr_stop_word_name(UINT64_MAX),
                        "signal"); /* another rank may say anything */
    assert_string_equal(tr_stop_word_name(1 << 16), "signal");
    assert_null(tr_stop_word_name(0));
    assert_true(tr_stop_word_urgent(term) && !tr_stop_word_urgent(usr1));
    assert_true(term > usr1 && term > SIGINT && term > SIGALRM);

    assert_int_equal(tr_stop_word(), 0);
    assert_int_equal(tr_stop_install(&err), TR_OK);
    tr_stop_alarm(3600);
    tr_stop_alarm(0);
    assert_false(tr_stop_requested());
    assert_null(tr_stop_reason());
    tr_stop_alarm(1e-3);
    for (int i = 0; i < 100000 && !tr_stop_requested(); i++)
        usleep(1000);
    assert_true(tr_stop_requested());
    assert_string_equal(tr_stop_reason(), "the time budget");
    assert_int_equal(tr_stop_word(), SIGALRM);
}

/* The status of a process that gets these signals in turn, and then says what it was asked. */
static int after_signals(int first, int second)
{
    int status = -1;
    const pid_t pid = fork();

    assert_true(pid >= 0);
    if (pid == 0) {
        raise(first);
        raise(second);
        _exit((int)(tr_stop_word() & 63));
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* The alarm is no second signal, nor does it make one of the first; of two others the second ends the process. */
static void test_second(void **state)
{
    (void)state;
    assert_int_equal(tr_stop_word(), SIGALRM); /* test_words asked */
    assert_int_equal(after_signals(SIGALRM, SIGALRM), SIGALRM);
    assert_int_equal(after_signals(SIGALRM, SIGUSR1), SIGUSR1);
    assert_int_equal(after_signals(SIGUSR1, SIGALRM), SIGUSR1);
    assert_int_equal(after_signals(SIGUSR1, SIGTERM), 75);
    assert_int_equal(after_signals(SIGTERM, SIGTERM), 75);
}

/* Whoever is asked to stop while it loads does not load on. */
static void test_loading(void **state)
{
    char dir[512];
    tr_fixture f;
    const tr_fixture_options options = {
        .dir = tr_source_path(dir, sizeof dir, "models/tiny"), .kv_dtype = TR_F32, .n_threads = 1};
    (void)state;
    assert_true(tr_stop_requested()); /* test_words asked */
    assert_int_not_equal(tr_fixture_open(&f, &options), 0);
    assert_int_equal(f.err.status, TR_E_STOP);
    assert_non_null(strstr(f.err.text, "stopped by the time budget while loading"));
    tr_fixture_close(&f);
}

static void test_graces(void **state)
{
    (void)state;
    tr_drain d = drain_of(60, 0, 0);
    assert_false(tr_drain_look(&d, 100 * S, 0));
    assert_false(tr_drain_over(&d, 100 * S));
    assert_null(tr_drain_reason(&d));
    assert_true(tr_drain_tokens(&d, 100 * S) == INT64_MAX);
    assert_true(tr_drain_look(&d, 100 * S, usr1));
    assert_string_equal(tr_drain_reason(&d), "USR1");
    assert_true(d.until_ns == 160 * S);
    assert_true(tr_drain_look(&d, 150 * S, usr1)); /* not anew */
    assert_true(d.until_ns == 160 * S && !tr_drain_over(&d, 159 * S) && tr_drain_over(&d, 160 * S));
    /* Another rank's TERM: the end is nearer. */
    assert_true(tr_drain_look(&d, 152 * S, term));
    assert_true(d.until_ns == 157 * S);
    assert_string_equal(tr_drain_reason(&d), "TERM");
    assert_true(tr_drain_look(&d, 153 * S, usr1));
    assert_true(d.until_ns == 157 * S);

    d = drain_of(60, 0, 0); /* and a late TERM does not put the end off */
    tr_drain_look(&d, 100 * S, usr1);
    tr_drain_look(&d, 158 * S, term);
    assert_true(d.until_ns == 160 * S);
    d = drain_of(2, 0, 0); /* --grace holds for TERM too */
    tr_drain_look(&d, 100 * S, term);
    assert_true(d.until_ns == 102 * S);
    d = drain_of(0, 0, 0);
    assert_true(tr_drain_look(&d, 100 * S, usr1) && tr_drain_over(&d, 100 * S));
}

static void test_budget(void **state)
{
    (void)state;
    tr_drain d = drain_of(60, 1000 * S, 30);
    assert_false(tr_drain_look(&d, 969 * S, 0)); /* nothing is known of requests: to the end */
    assert_true(tr_drain_look(&d, 970 * S, 0));
    assert_true(tr_drain_over(&d, 970 * S));
    assert_string_equal(tr_drain_reason(&d), "the time budget");

    d = drain_of(60, 1000 * S, 30);
    for (int i = 0; i < 200; i++)
        tr_drain_request(&d, (i % 2 ? 150 : 50) * S);
    assert_in_range((int)(d.request_ns / 1e9), 98, 102);
    tr_drain_step(&d, 2 * S, true);
    assert_false(tr_drain_look(&d, 860 * S, 0));
    assert_true(tr_drain_look(&d, 872 * S, 0)); /* 98 s and a step of 2 s are left of 970 */
    assert_true(d.until_ns == 970 * S);
    assert_true(tr_drain_over(&d, 968 * S) && !tr_drain_over(&d, 967 * S)); /* a step takes two */
    assert_true(
        tr_drain_look(&d, 880 * S, usr1)); /* a signal in the drain: its grace, but no later */
    assert_true(d.until_ns == 940 * S);

    d = drain_of(600, 1000 * S, 30); /* nor does a grace go beyond the budget */
    tr_drain_look(&d, 800 * S, usr1);
    assert_true(d.until_ns == 970 * S);
    d = drain_of(60, 10 * S, 30); /* a budget that is over before it begins */
    assert_true(tr_drain_look(&d, 11 * S, 0) && tr_drain_over(&d, 11 * S));
    assert_true(tr_drain_look(&d, 5 * S, 0));
}

static void test_tokens(void **state)
{
    (void)state;
    tr_drain d = drain_of(60, 0, 0);
    tr_drain_look(&d, 100 * S, usr1);
    assert_true(tr_drain_tokens(&d, 100 * S) == INT64_MAX); /* no step was measured */
    tr_drain_step(&d, S, false);                            /* a prompt's */
    assert_true(tr_drain_tokens(&d, 100 * S) == INT64_MAX);
    tr_drain_step(&d, S / 10, true);
    tr_drain_step(&d, S / 4, true);
    assert_in_range((int)tr_drain_tokens(&d, 100 * S), 599, 600);
    assert_in_range((int)tr_drain_tokens(&d, 159 * S), 9, 10);
    assert_int_equal(tr_drain_tokens(&d, 161 * S), 0);
    /* The longest step lately is what a step may take; it is forgotten in time. */
    assert_true(tr_drain_over(&d, 160 * S - S / 2));
    for (int i = 0; i < 100; i++)
        tr_drain_step(&d, S / 10, true);
    assert_false(tr_drain_over(&d, 160 * S - S / 2));
    tr_drain_step(&d, 1, true); /* absurdly fast: no overflow */
    assert_true(tr_drain_tokens(&d, 100 * S) > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_words),   cmocka_unit_test(test_second),
        cmocka_unit_test(test_loading), cmocka_unit_test(test_graces),
        cmocka_unit_test(test_budget),  cmocka_unit_test(test_tokens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
