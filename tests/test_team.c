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

/* ---- pieces ---- */

enum { MOST = 29 };

typedef struct count_work {
    tr_team *team;
    atomic_int had[MOST + 1];
} count_work;

static void count(void *ctx, int i, int n)
{
    count_work *w = ctx;
    (void)n;
    for (int at = 0; at < MOST;) {
        at = tr_team_count(w->team, TR_TEAM_COUNTERS - 1, MOST);
        atomic_fetch_add(&w->had[at], 1);
    }
    if (i == 0) assert_int_equal(tr_team_count(w->team, TR_TEAM_COUNTERS - 1, MOST), MOST);
}

/* Each number comes once in every run, of all members or of one, and then the end to each. */
static void counters(void **state)
{
    (void)state;
    for (int n = 1; n <= MEMBERS_MAX; n++) {
        count_work w = {0};
        tr_err err;
        assert_int_equal(tr_team_create(&w.team, n, NULL, &err), TR_OK);
        for (int run = 1; run <= 20; run++) {
            tr_team_run(w.team, count, &w);
            tr_team_run_alone(w.team, count, &w);
            for (int at = 0; at < MOST; at++)
                assert_int_equal(atomic_load(&w.had[at]), 2 * run);
            assert_int_equal(atomic_load(&w.had[MOST]), run * (n + 1));
        }
        tr_team_free(w.team);
    }
}

enum { PANELS_MAX = 1500 };

typedef struct pieces_work {
    tr_team *team;
    int n_panels, lazy;
    size_t panel_bytes;
    atomic_int wrong, had[2][PANELS_MAX];
    int n_first[MEMBERS_MAX]; /* panels of its own share that a member has had */
} pieces_work;

/* Every panel of two products, the second with an offset, in two passes; who is lazy waits for the others to do its part. */
static void take_pieces(void *ctx, int i, int n)
{
    pieces_work *w = ctx;
    const int own = tr_team_part(w->n_panels, i, n), own_end = tr_team_part(w->n_panels, i + 1, n);
    TR_SCRATCH tr_pieces p;
    int begin, end, n_first = 0, n_again = 0;

    for (int product = 0; product < 2; product++) {
        tr_pieces_shared(&p, w->team, product * n, w->n_panels, n, i, w->panel_bytes);
        if (i == w->lazy) tr_team_barrier(w->team);
        for (int k = 0; tr_piece(&p, k, &begin, &end); k++)
            for (int panel = begin; panel < end; panel++) {
                if (panel >= own && panel < own_end) w->n_first[i]++;
                atomic_fetch_add(&w->had[product][panel], 1);
                n_first += panel;
            }
        if (i != w->lazy && w->lazy >= 0) tr_team_barrier(w->team);
        p.offset = 7;
        for (int k = 0; tr_piece(&p, k, &begin, &end); k++)
            for (int panel = begin; panel < end; panel++)
                n_again += panel - 7;
    }
    if (n_first != n_again) atomic_fetch_add(&w->wrong, 1);
}

static void check_pieces(tr_team *team, int n, int n_panels, size_t panel_bytes, int lazy)
{
    pieces_work *w = calloc(1, sizeof *w);
    assert_non_null(w);
    *w =
        (pieces_work){.team = team, .n_panels = n_panels, .panel_bytes = panel_bytes, .lazy = lazy};

    tr_team_run(team, take_pieces, w);
    assert_int_equal(atomic_load(&w->wrong), 0);
    for (int panel = 0; panel < n_panels; panel++)
        for (int product = 0; product < 2; product++)
            assert_int_equal(atomic_load(&w->had[product][panel]), 1);
    if (lazy >= 0) assert_int_equal(w->n_first[lazy], 0);
    if (lazy < 0 && n == 1) assert_int_equal(w->n_first[0], 2 * n_panels);
    free(w);
}

/* Every panel comes once, also those of a member who comes when all is done; counters begin again with every run. */
static void pieces(void **state)
{
    static const int panels[] = {1, 2, 3, 4, 5, 23, 64, 333, PANELS_MAX};
    static const size_t bytes[] = {0, 1, 20000, 1 << 20};
    (void)state;
    for (int n = 1; n <= MEMBERS_MAX; n++) {
        tr_team *team;
        tr_err err;
        assert_int_equal(tr_team_create(&team, n, NULL, &err), TR_OK);
        for (size_t k = 0; k < sizeof panels / sizeof *panels; k++)
            for (size_t b = 0; b < sizeof bytes / sizeof *bytes; b++) {
                check_pieces(team, n, panels[k], bytes[b], -1);
                if (n > 1) check_pieces(team, n, panels[k], bytes[b], (int)(k + b) % n);
            }
        tr_team_free(team);
    }
}

static void member_of_none(void *ctx, int i, int n)
{
    (void)ctx, (void)i, (void)n;
}

/* As many pieces as a product may have, all for one member: it has room for them. */
static void most_pieces(void **state)
{
    (void)state;
    for (int n_shares = 1; n_shares <= TR_PIECES_MAX; n_shares *= 4)
        for (int n_panels = 4 * TR_PIECES_MAX - 40; n_panels < 4 * TR_PIECES_MAX + 40; n_panels++) {
            TR_SCRATCH tr_pieces p;
            tr_team *team;
            tr_err err;
            int begin, end, sum = 0, k = 0;
            if (n_panels % 13 != 0) continue;
            assert_int_equal(tr_team_create(&team, 1, NULL, &err), TR_OK);
            tr_team_run(team, member_of_none, NULL);
            tr_pieces_shared(&p, team, 0, n_panels, n_shares, n_shares / 2, 0);
            for (; tr_piece(&p, k, &begin, &end); k++) {
                assert_true(end - begin <= p.size && begin < end);
                sum += end - begin;
            }
            assert_int_equal(sum, n_panels);
            assert_true(k <= TR_PIECES_MAX && k > TR_PIECES_MAX / 4);
            tr_team_free(team);
        }
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
        cmocka_unit_test(runs),   cmocka_unit_test(parts),       cmocka_unit_test(counters),
        cmocka_unit_test(pieces), cmocka_unit_test(most_pieces), cmocka_unit_test(hostile_places),
        cmocka_unit_test(places),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
