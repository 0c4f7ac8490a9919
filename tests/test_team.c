/* The CPU backend's thread team: every member runs, barriers hold, tasks come once, errors, and places on cores. */
#include <config.h>

#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cpu/cpu_priv.h"
#include "kernels/cpu/team.h"

enum { MEMBERS_MAX = 5, N_TASKS = 57 };

typedef struct work {
    tr_team *team;
    int n_members;
    int ran[MEMBERS_MAX], before[MEMBERS_MAX];
    atomic_int wrong, task[2][N_TASKS];
} work;

static void member(void *ctx, int i, int n)
{
    work *w = ctx;

    if (n != w->n_members || i < 0 || i >= n) {
        atomic_fetch_add(&w->wrong, 1);
        return;
    }
    for (int t; (t = tr_team_next(w->team)) < N_TASKS;)
        atomic_fetch_add(&w->task[0][t], 1);
    w->before[i]++;
    tr_team_barrier(w->team);
    for (int k = 0; k < n; k++) /* plain reads of what others wrote before the barrier */
        if (w->before[k] != w->before[i]) atomic_fetch_add(&w->wrong, 1);
    for (int t; (t = tr_team_next(w->team)) < N_TASKS;)
        atomic_fetch_add(&w->task[1][t], 1);
    tr_team_barrier(w->team);
    w->ran[i]++;
}

static void check(work *w, int n_runs)
{
    assert_int_equal(atomic_load(&w->wrong), 0);
    for (int i = 0; i < w->n_members; i++)
        assert_int_equal(w->ran[i], n_runs);
    for (int phase = 0; phase < 2; phase++)
        for (int t = 0; t < N_TASKS; t++)
            assert_int_equal(atomic_load(&w->task[phase][t]), n_runs);
}

/* Also more members than this machine has CPUs; runs of all and of the caller alone by turns. */
static void runs(void **state)
{
    enum { N_RUNS = 60 };
    (void)state;
    for (int n = 1; n <= MEMBERS_MAX; n++) {
        work all = {.n_members = n}, alone = {.n_members = 1};
        tr_err err;
        assert_int_equal(tr_team_create(&all.team, n, NULL, &err), TR_OK);
        alone.team = all.team;
        assert_int_equal(tr_team_size(all.team), n);
        for (int r = 0; r < N_RUNS; r++) {
            tr_team_run(all.team, member, &all);
            check(&all, r + 1);
            tr_team_run_alone(all.team, member, &alone);
            check(&alone, r + 1);
        }
        tr_team_free(all.team);
    }
    tr_team_free(NULL);
}

static void parts(void **state)
{
    (void)state;
    for (int total = 0; total < 40; total++)
        for (int n = 1; n < 9; n++) {
            assert_int_equal(tr_team_part(total, 0, n), 0);
            assert_int_equal(tr_team_part(total, n, n), total);
            for (int i = 0; i < n; i++) {
                int size = tr_team_part(total, i + 1, n) - tr_team_part(total, i, n);
                assert_true(size == total / n || size == total / n + 1);
            }
        }
}

/* CPUs that are none; the second of these is refused by the system, after a thread has been started. */
static void hostile_places(void **state)
{
    cpu_set_t mine;
    tr_team *team = (tr_team *)state;
    tr_err err = {0};
    int last = 0;

    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof mine, &mine), 0);
    while (!CPU_ISSET(last, &mine))
        last++;
    assert_int_equal(tr_team_create(&team, 2, (const int[]){last, CPU_SETSIZE}, &err), TR_E_USAGE);
    assert_null(team);
    assert_int_equal(tr_team_create(&team, 2, (const int[]){-1, last}, &err), TR_E_USAGE);
    assert_int_equal(tr_team_create(&team, 3, (const int[]){last, last, CPU_SETSIZE - 1}, &err),
                     TR_E_IO);
    assert_null(team);
    assert_non_null(strstr(err.text, "CPU 1023"));
}

typedef struct where {
    int cpu[MEMBERS_MAX];
} where;

static void look(void *ctx, int i, int n)
{
    where *w = ctx;
    (void)n;
    w->cpu[i] = sched_getcpu();
}

/* A device's threads get a core each, inside of the mask, and the caller keeps its mask. */
static void places(void **state)
{
    cpu_set_t before, after;
    tr_device *d;
    const tr_ops *ops;
    tr_err err;
    int bound = -1;

    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    const int n = CPU_COUNT(&before) < MEMBERS_MAX ? CPU_COUNT(&before) : MEMBERS_MAX;
    const tr_device_options options = {.name = "cpu", .n_threads = n};
    assert_int_equal(tr_device_open(&d, &ops, &options, &err), TR_OK);
    assert_int_equal(tr_device_bind(d, 1, 1, &bound, &err), TR_E_USAGE);
    assert_int_equal(tr_device_bind(d, 0, 2 * CPU_COUNT(&before), &bound, &err), TR_OK);
    assert_int_equal(bound, 0); /* half a CPU for n threads */
    assert_int_equal(tr_device_bind(d, 0, 1, &bound, &err), TR_OK);
    assert_int_equal(bound, 1);
    where w = {{0}};
    tr_team_run(d->team, look, &w);
    for (int i = 1; i < n; i++) { /* the caller itself may have been moved on since */
        assert_true(CPU_ISSET(w.cpu[i], &before));
        for (int k = 1; k < i; k++)
            assert_int_not_equal(w.cpu[i], w.cpu[k]);
    }
    assert_int_equal(sched_getaffinity(0, sizeof after, &after), 0);
    assert_true(CPU_EQUAL(&before, &after));
    ops->close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(runs),
        cmocka_unit_test(parts),
        cmocka_unit_test(hostile_places),
        cmocka_unit_test(places),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
