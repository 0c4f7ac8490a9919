/* The flight recorder and the watchdog. Without arguments: in one process. With a name and OUT: one rank of a job that
 * goes wrong in that way; tests/test_watchdog_ranks.sh starts it and looks at what comes of it. */
#include <config.h>

#include <dirent.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/clock.h"
#include "mpi/comm_mpi.h"
#include "mpi/flight.h"
#include "mpi/watchdog.h"

/* ---- in one process ---------------------------------------------------------------------------------------------- */

static void test_state(void **state)
{
    tr_flight *f = tr_flight_create();
    tr_flight_state s = tr_flight_look(f);

    (void)state;
    assert_int_equal(s.n_beats, 0);
    assert_null(s.what);
    assert_int_equal(s.layer, -1);
    assert_false(s.waits);
    tr_flight_beat(f, 41);
    tr_flight_expect(f, 2.5);
    tr_flight_enter(f, "layer", 7);
    tr_flight_enter(f, "attention", -1);
    s = tr_flight_look(f);
    assert_int_equal(s.n_beats, 1);
    assert_int_equal(s.step, 41);
    assert_true(s.expected_s > 2.4 && s.expected_s < 2.6);
    assert_string_equal(s.what, "attention");
    assert_int_equal(s.layer, 7);
    for (int i = 0; i < 3; i++)
        tr_flight_enter(f, "deep", 9); /* one more than is kept */
    s = tr_flight_look(f);
    assert_string_equal(s.what, "deep");
    for (int i = 0; i < 4; i++)
        tr_flight_leave(f);
    s = tr_flight_look(f);
    assert_string_equal(s.what, "layer");
    tr_flight_leave(f);
    tr_flight_leave(f); /* one too many: harmless */
    assert_null(tr_flight_look(f).what);
    const uint64_t moved_ns = tr_flight_look(f).moved_ns;
    assert_true(moved_ns >= s.beat_ns);
    tr_flight_wait(f, 0); /* whoever waits does not get on */
    tr_flight_expect(f, 1);
    assert_true(tr_flight_look(f).moved_ns == moved_ns);
    tr_flight_rest(f);
    assert_true(tr_flight_look(f).rests);
    tr_flight_beat(f, 42);
    s = tr_flight_look(f);
    assert_false(s.rests);
    assert_true(s.expected_s == 0);
    tr_flight_free(f);
}

static void test_records(void **state)
{
    tr_flight *f = tr_flight_create();
    tr_flight_record r[TR_FLIGHT_MAX];

    (void)state;
    assert_int_equal(tr_flight_records(f, r), 0);
    tr_flight_beat(f, 3);
    tr_flight_enter(f, "experts", 5);
    uint64_t a = tr_flight_begin(f, "stage", 4, 3, "all_reduce", 1, 100),
             b = tr_flight_begin(f, "a name that is too long", 0, 2, "send", 1, 200);
    assert_int_equal(a, 1);
    assert_int_equal(b, 2);
    tr_flight_wait(f, b);
    tr_flight_done(f, a);
    tr_flight_state s = tr_flight_look(f);
    assert_true(s.waits);
    assert_int_equal(s.waited.bytes, 200);
    assert_int_equal(tr_flight_records(f, r), 2);
    assert_string_equal(r[0].group, "stage");
    assert_string_equal(r[0].op, "all_reduce");
    assert_true(r[0].first == 4 && r[0].members == 3);
    assert_true(r[0].done_ns >= r[0].begun_ns && r[1].done_ns == 0);
    assert_int_equal(r[1].step, 3);
    assert_int_equal(r[1].layer, 5);
    assert_int_equal(strlen(r[1].group), 15);
    tr_flight_done(f, b);
    assert_false(tr_flight_look(f).waits);
    for (int i = 0; i < 1000; i++)
        tr_flight_begin(f, "stage", 4, 3, "all_reduce", (uint64_t)i + 2, 8);
    tr_flight_done(f, a); /* long overwritten: nobody else is marked */
    assert_int_equal(tr_flight_records(f, r), TR_FLIGHT_MAX);
    for (int i = 0; i < TR_FLIGHT_MAX; i++) {
        assert_int_equal(r[i].id, 1002 - TR_FLIGHT_MAX + 1 + i);
        assert_int_equal(r[i].done_ns, 0);
    }
    tr_flight_free(f);
}

/* Without a recorder, without a watchdog: nothing happens. */
static void test_none(void **state)
{
    tr_flight_record r[TR_FLIGHT_MAX];

    (void)state;
    tr_flight_beat(NULL, 1);
    assert_int_equal(tr_flight_begin(NULL, "stage", 0, 2, "send", 1, 1), 0);
    tr_flight_wait(NULL, 0);
    tr_flight_done(NULL, 0);
    assert_int_equal(tr_flight_records(NULL, r), 0);
    assert_int_equal(tr_flight_look(NULL).n_beats, 0);
    tr_flight_free(NULL);
    tr_watchdog_beat(NULL, 1);
    tr_watchdog_rest(NULL);
    tr_watchdog_expect(NULL, 1);
    tr_watchdog_enter(NULL, "x", 1);
    tr_watchdog_leave(NULL);
    tr_watchdog_stop(NULL);
}

static void test_start_stop(void **state)
{
    tr_world *w = *state;
    tr_watchdog *wd;
    tr_err err = {0};

    for (int i = 0; i < 3; i++) {
        assert_int_equal(tr_watchdog_start(&wd, w, 0, NULL, &err), TR_OK);
        assert_non_null(w->flight);
        tr_watchdog_beat(wd, 1);
        tr_watchdog_enter(wd, "layer", 3);
        assert_int_equal(tr_flight_look(w->flight).layer, 3);
        tr_watchdog_stop(wd);
        assert_null(w->flight);
    }
}

/* ---- one rank of a job ------------------------------------------------------------------------------------------- */

enum { N_STEPS = 8, WRONG_STEP = 5 };

static void nap(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds,
                         .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&t, &t) != 0)
        ;
}

static void sleep_here(int signal)
{
    const struct timespec t = {.tv_sec = 2, .tv_nsec = 500000000};
    (void)signal;
    nanosleep(&t, NULL);
}

/* As if the machine had no time for this process: its other threads sleep, and this one gets nowhere. */
static void starve(void)
{
    const struct sigaction sleeper = {.sa_handler = sleep_here, .sa_flags = SA_RESTART};
    DIR *d = opendir("/proc/self/task");

    sigaction(SIGUSR1, &sleeper, NULL);
    for (struct dirent *e; d && (e = readdir(d));) {
        const pid_t tid = (pid_t)strtol(e->d_name, NULL, 10);
        if (tid > 0 && tid != getpid()) syscall(SYS_tgkill, getpid(), tid, SIGUSR1);
    }
    if (d) closedir(d);
    const uint64_t until_ns = tr_now_ns() + UINT64_C(2600000000);
    while (tr_now_ns() < until_ns)
        ;
}

/* What rank `who` does at the wrong step. */
static void go_wrong(const char *how, const tr_world *w, tr_watchdog *wd)
{
    if (strcmp(how, "stop") == 0 && w->rank == 2) raise(SIGSTOP);
    if (strcmp(how, "kill") == 0 && w->rank == 1) raise(SIGKILL);
    if (strcmp(how, "busy") == 0 && w->rank == 1) {
        tr_watchdog_enter(wd, "experts", 11);
        for (;;)
            nap(1);
    }
    if (strcmp(how, "slow") == 0 &&
        w->rank == 1) /* three times what a step may take, but it gets on */
        for (int i = 0; i < 30; i++) {
            tr_watchdog_enter(wd, "experts", i);
            nap(0.1);
            tr_watchdog_leave(wd);
        }
    if (strcmp(how, "starve") == 0 && w->rank == 1) starve();
    if (strcmp(how, "well") == 0) { /* nothing to do for longer than a step may take */
        tr_watchdog_rest(wd);
        nap(1.6);
    }
    if (strcmp(how, "fail") == 0 && w->rank == 3) {
        /* The others wait in a collective and do not come to the agreement. */
        tr_err err = {0};
        tr_status mine = tr_fail(&err, TR_E_MEMORY, "no room");
        if (tr_agree_within(w, mine, 0.5, &err) == TR_E_COMM) {
            fprintf(stderr, "rank 3: %s\n", err.text);
            tr_world_abort(mine);
        }
    }
}

static tr_status run_step(tr_comm *c, int step, const char *how, const tr_world *w, tr_watchdog *wd,
                          tr_err *err)
{
    static float x[30000];
    tr_ticket t;

    tr_watchdog_beat(wd, (uint64_t)step);
    if (step == 0 && strcmp(how, "well") == 0) nap(1.6); /* the first step may take long */
    tr_watchdog_enter(wd, "layer", 4);
    tr_status st = tr_comm_all_reduce(c, x, 30000, TR_F32, &t, err);
    if (st == TR_OK) st = tr_comm_wait(c, TR_LANE_MAIN, t, err);
    tr_watchdog_leave(wd);
    if (st == TR_OK && step == WRONG_STEP) go_wrong(how, w, wd);
    nap(strcmp(how, "suspend") == 0 ? 0.3 : 0.05);
    return st;
}

/* A device's communicators, of which rank 1's fail by themselves when it says so. */
typedef struct device {
    atomic_bool failed;
} device;

static int device_failed(void *ctx, char *text, size_t n)
{
    device *d = ctx;
    if (!atomic_load(&d->failed)) return 0;
    snprintf(text, n, "a link of the device is gone");
    return 1;
}

static void device_abort(void *ctx)
{
    static const char text[] = "the device's work was aborted\n";
    (void)ctx;
    const ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);
    (void)n;
}

static int run_rank(tr_world *w, const char *how, const char *out)
{
    static device on_device;
    const tr_world_guard guard = {&on_device, device_failed, device_abort};
    tr_watchdog *wd = NULL;
    tr_comm *c = NULL;
    tr_err err = {0};
    char path[1024];
    if (strcmp(how, "device") == 0) w->guard = &guard;
    /* Of a rank that is killed the launcher is to be the first to tell, however slow this machine is. */
    tr_status st = tr_watchdog_start(&wd, w, strcmp(how, "kill") == 0 ? 600 : 1, out, &err);

    if (st == TR_OK) st = tr_comm_split(&c, w, 0, w->rank, "stage", &err);
    snprintf(path, sizeof path, "%s.pid.%d", out, w->rank);
    FILE *f = fopen(path, "w");
    if (f) {
        fprintf(f, "%ld\n", (long)getpid());
        fclose(f);
    }
    for (int step = 0; step < N_STEPS && st == TR_OK; step++)
        st = run_step(c, step, how, w, wd, &err);
    if (st == TR_OK && w->guard && w->rank == 1) {
        atomic_store(&on_device.failed, true);
        for (;;) /* until the watchdog ends the process */
            nap(1);
    }
    if (st == TR_OK) st = tr_agree(w, TR_OK, &err);
    if (st != TR_OK) fprintf(stderr, "rank %d: %s\n", w->rank, err.text);
    if (st == TR_OK && w->rank == 0) puts("finished");
    tr_watchdog_stop(wd);
    tr_comm_free(c);
    tr_world_finish(TR_OK);
    return st != TR_OK;
}

int main(int argc, char **argv)
{
    tr_world world;
    tr_err err = {0};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_state),
        cmocka_unit_test(test_records),
        cmocka_unit_test(test_none),
        cmocka_unit_test_prestate(test_start_stop, &world),
    };

    if (tr_world_start(&world, &err) != TR_OK) {
        fprintf(stderr, "test_watchdog: %s\n", err.text);
        return 1;
    }
    if (argc == 3) return run_rank(&world, argv[1], argv[2]);
    int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_world_finish(TR_OK);
    return n_failed ? 1 : 0;
}
