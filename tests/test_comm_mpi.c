/* Communicators over MPI: tests/test_comm_ranks.sh starts this on 2, 3 and 4 ranks; every rank runs the same checks.
 * Alone there is nothing to test (77). With "large" as argument: messages longer than MPI's int can count. */
#include <config.h>

#include <fcntl.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/clock.h"
#include "mpi/comm_mpi.h"

enum { MAX_RANKS = 16 };

static tr_comm *split(tr_world *w, int color, int key, const char *name)
{
    tr_err err = {0};
    tr_comm *c;

    if (tr_comm_split(&c, w, color, key, name, &err) != TR_OK) fail_msg("%s", err.text);
    return c;
}

static void well(tr_status st, const tr_err *err)
{
    if (st != TR_OK) fail_msg("%s", err->text);
}

static void await(tr_comm *c, tr_ticket t)
{
    tr_err err = {0};
    well(tr_comm_wait(c, TR_LANE_MAIN, t, &err), &err);
}

/* Element k of member i: of both signs and of very different sizes, so that every order of summation gives another sum. */
static float term(int i, size_t k)
{
    uint32_t h = (uint32_t)k * 2654435761u + (uint32_t)i * 40503u + 1;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    return ((float)(h & 0xffff) - 32768.0f) * (h & 0x10000 ? 1e-4f : h & 0x20000 ? 1.0f : 1e4f);
}

static float total(int size, size_t k)
{
    float s = term(0, k);
    for (int i = 1; i < size; i++)
        s += term(i, k);
    return s;
}

static void test_split(void **state)
{
    tr_world *w = *state;
    tr_comm *all = split(w, 0, w->rank, "world"), *reversed = split(w, 7, -w->rank, "reversed"),
            *half = split(w, w->rank % 2, w->rank, "half"), *alone = split(w, w->rank, 0, "alone"),
            *none = split(w, w->rank == 0 ? -1 : 3, 0, "a name that is too long");

    assert_int_equal(tr_comm_rank(all), w->rank);
    assert_int_equal(tr_comm_size(all), w->size);
    assert_string_equal(tr_comm_name(all), "world");
    assert_int_equal(tr_comm_rank(reversed), w->size - 1 - w->rank);
    assert_int_equal(tr_comm_rank(half), w->rank / 2);
    assert_int_equal(tr_comm_size(half), (w->size + 1 - w->rank % 2) / 2);
    assert_int_equal(tr_comm_size(alone), 1);
    assert_string_equal(tr_comm_name(alone), "self");
    if (w->rank == 0)
        assert_null(none);
    else
        assert_int_equal(tr_comm_size(none), w->size - 1);
    if (w->rank && w->size > 2) assert_string_equal(tr_comm_name(none), "a name that is ");
    tr_comm_free(none);
    tr_comm_free(half); /* in the middle of the list */
    tr_comm_progress(all);
    tr_comm_free(all);
    tr_comm_free(reversed);
    tr_comm_free(alone);
    assert_null(w->comms);
}

/* Around the sizes where the way changes: one round up to 32 KiB of others' terms, windows of 1 MiB of them. */
static void test_sums(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "sums");
    const size_t direct = 8192 / (size_t)(w->size - 1);
    const size_t window = (262144u / (size_t)(w->size - 1)) * (size_t)w->size;
    const size_t sizes[] = {0,      1,          5,          1023,           direct,
                            window, direct + 1, window + 1, 2 * window + 3, 100003};
    const size_t most = 2 * window + 3, n_sizes = sizeof sizes / sizeof *sizes;
    float *x = malloc(most * sizeof *x);
    tr_err err = {0};
    tr_ticket t;

    assert_non_null(x);
    for (size_t s = 0; s < n_sizes; s++) {
        for (size_t k = 0; k < sizes[s]; k++)
            x[k] = term(w->rank, k);
        well(tr_comm_all_reduce(c, x, sizes[s], TR_F32, &t, &err), &err);
        await(c, t);
        for (size_t k = 0; k < sizes[s]; k++)
            if (x[k] != total(w->size, k)) fail_msg("n %zu: element %zu", sizes[s], k);
    }
    uint64_t calls, bytes;
    tr_comm_counts(c, TR_COMM_ALL_REDUCE, &calls, &bytes);
    assert_int_equal(calls, n_sizes);
    assert_true(tr_comm_waited_ns(c, TR_COMM_ALL_REDUCE) > 0);
    assert_true(tr_comm_waited_ns(c, TR_COMM_BROADCAST) == 0);
    free(x);
    tr_comm_free(c);
}

static void test_scatter(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "scatter");
    const size_t size = (size_t)w->size, me = (size_t)w->rank,
                 sizes[] = {0, 1, 77, 8192 / (size - 1) + 1, 262144 / (size - 1) + 5, 300001},
                 most = 300001;
    float *x = malloc(most * size * sizeof *x), *y = malloc(most * sizeof *y);
    tr_err err = {0};
    tr_ticket t;

    assert_true(x && y);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const size_t n = sizes[s];
        for (size_t k = 0; k < n * size; k++)
            x[k] = term(w->rank, k);
        /* In place every second time. */
        float *out = s % 2 ? x + me * n : y;
        well(tr_comm_reduce_scatter(c, x, out, n, TR_F32, &t, &err), &err);
        await(c, t);
        for (size_t k = 0; k < n; k++)
            if (out[k] != total(w->size, me * n + k)) fail_msg("n %zu: element %zu", n, k);
    }
    free(x);
    free(y);
    tr_comm_free(c);
}

static uint64_t word(int i, size_t k)
{
    return ((uint64_t)(k * 7919 + (size_t)i * 104729) % 1009) << 40 | (uint64_t)(i + 1) << 3;
}

static void test_max(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "max");
    static const size_t sizes[] = {0, 1, 64, 5000, 400001};
    uint64_t *x = malloc(400001 * sizeof *x);
    tr_err err = {0};
    tr_ticket t;

    assert_non_null(x);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        for (size_t k = 0; k < sizes[s]; k++)
            x[k] = word(w->rank, k);
        well(tr_comm_all_max_u64(c, x, sizes[s], &t, &err), &err);
        await(c, t);
        for (size_t k = 0; k < sizes[s]; k++) {
            uint64_t best = 0;
            for (int i = 0; i < w->size; i++)
                best = word(i, k) > best ? word(i, k) : best;
            if (x[k] != best) fail_msg("n %zu: word %zu", sizes[s], k);
        }
    }
    /* The packed arg-max: UINT64_MAX and 0 are words like any other. */
    uint64_t y[2] = {w->rank ? 0 : UINT64_MAX, 0};
    well(tr_comm_all_max_u64(c, y, 2, &t, &err), &err);
    await(c, t);
    assert_true(y[0] == UINT64_MAX && y[1] == 0);
    free(x);
    tr_comm_free(c);
}

/* Member i gives i * unit bytes to a gather (member 0 none), and (i + 2 j) % 3 * unit bytes to member j. */
static void check_gathers(tr_world *w, tr_comm *c, size_t unit)
{
    const size_t size = (size_t)w->size, me = (size_t)w->rank;
    size_t bytes[MAX_RANKS], n_send[MAX_RANKS], n_recv[MAX_RANKS], at = 0;
    unsigned char *mine = malloc(size * unit + 1), *all = malloc(size * size * unit + 1),
                  *out = malloc(2 * size * unit + 1), *in = malloc(2 * size * unit + 1);
    tr_ticket t, u;
    tr_err err = {0};

    assert_true(mine && all && out && in);
    memset(mine, (int)me + 1, me * unit);
    memset(all, 255, size * size * unit + 1);
    memset(in, 255, 2 * size * unit + 1);
    for (size_t j = 0; j < size; j++) {
        bytes[j] = j * unit;
        n_send[j] = (me + 2 * j) % 3 * unit;
        n_recv[j] = (j + 2 * me) % 3 * unit;
        memset(out + at, (int)(me * 16 + j), n_send[j]);
        at += n_send[j];
    }
    well(tr_comm_all_gather(c, me ? mine : NULL, all, bytes, &t, &err), &err);
    well(tr_comm_all_to_all(c, out, n_send, in, n_recv, &u, &err), &err);
    await(c, u);
    await(c, t);
    await(c, t); /* a second time: nothing */
    at = 0;
    for (size_t j = 0; j < size; j++)
        for (size_t k = 0; k < bytes[j]; k++)
            if (all[at++] != j + 1) fail_msg("gather of %zu: from %zu", unit, j);
    assert_int_equal(all[at], 255);
    at = 0;
    for (size_t j = 0; j < size; j++)
        for (size_t k = 0; k < n_recv[j]; k++)
            if (in[at++] != j * 16 + me) fail_msg("exchange of %zu: from %zu", unit, j);
    assert_int_equal(in[at], 255);
    free(mine);
    free(all);
    free(out);
    free(in);
}

static void test_gathers(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "gathers");

    for (int i = 0; i < 20; i++)
        check_gathers(w, c, 1 + (size_t)i);
    check_gathers(w, c, 0);
    check_gathers(w, c, 5000);
    check_gathers(w, c, 70001);
    tr_comm_free(c);
}

static void test_broadcast(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, -w->rank, "tree"); /* members in the opposite order */
    static unsigned char x[200000];
    static const size_t sizes[] = {0, 1, 4096, sizeof x};
    const int me = tr_comm_rank(c);
    tr_ticket t;
    tr_err err = {0};

    for (size_t s = 0; s < 4; s++)
        for (int root = 0; root < w->size; root++) {
            memset(x, me == root ? root + 1 : 255, sizes[s]);
            well(tr_comm_broadcast(c, root, x, sizes[s], &t, &err), &err);
            await(c, t);
            for (size_t k = 0; k < sizes[s]; k++)
                if (x[k] != root + 1) fail_msg("from %d: byte %zu of %zu", root, k, sizes[s]);
        }
    tr_comm_free(c);
}

/* What members tell each other without a message: a file to which each appends a byte. */
static int open_slate(tr_comm *c, char *path, size_t n)
{
    tr_ticket t;
    tr_err err = {0};
    const char *folder = getenv("TMPDIR");

    snprintf(path, n, "%s/trireme-slate.XXXXXX", folder ? folder : "/tmp");
    if (tr_comm_rank(c) == 0) {
        const int fd = mkstemp(path);
        if (fd < 0) fail_msg("%s", path);
        close(fd);
    }
    well(tr_comm_broadcast(c, 0, path, n, &t, &err), &err);
    await(c, t);
    const int fd = open(path, O_RDWR | O_APPEND | O_CLOEXEC);
    if (fd < 0) fail_msg("%s", path);
    return fd;
}

static void mark(int slate)
{
    assert_int_equal(write(slate, "x", 1), 1);
}

static int n_marks(int slate)
{
    struct stat sb;
    assert_int_equal(fstat(slate, &sb), 0);
    return (int)sb.st_size;
}

/* Nobody need wait for members that are still busy: the root may go on reading, and the one that hands it on, before the last one
 * comes; the buffer is theirs again when it has. (The plans of a pipeline: a stage would idle until the next one has finished its
 * step.) So the last one comes when all others have read: if that is never it comes after a minute, and says so. */
static void test_broadcast_goes_ahead(void **state)
{
    enum { N = 1000000, N_AHEAD = 3, LIMIT_MS = 60000 };
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "plans");
    static unsigned char x[N_AHEAD][N];
    const int last = tr_comm_size(c) - 1, me = tr_comm_rank(c);
    const struct timespec ms = {.tv_nsec = 1000000}, long_enough = {.tv_nsec = 50000000};
    char path[512];
    const int slate = open_slate(c, path, sizeof path);
    bool ahead_of_last = true;
    tr_ticket t, ahead[N_AHEAD];
    tr_err err = {0};
    int word = 0;

    if (me == last) {
        for (int i = 0; i < LIMIT_MS && n_marks(slate) < last; i++)
            nanosleep(&ms, NULL);
        ahead_of_last = n_marks(slate) == last;
        nanosleep(&long_enough, NULL); /* for buffers that come back too early */
        mark(slate);
    }
    for (int i = 0; i < N_AHEAD; i++) {
        memset(x[i], me == 0 ? 10 + i : 0, N);
        well(tr_comm_broadcast(c, 0, x[i], N, &ahead[i], &err), &err);
        well(tr_comm_wait_read(c, TR_LANE_MAIN, ahead[i], &err), &err);
        for (int k = 0; k < N; k++)
            if (x[i][k] != 10 + i) fail_msg("byte %d of %d", k, N);
    }
    if (me != last) mark(slate);
    for (int i = 0; i < N_AHEAD; i++) {
        await(c, ahead[i]);
        memset(x[i], 99, N);
    }
    /* a binomial tree: the last member has it from here */
    const bool back_early = me == (last & (last - 1)) && n_marks(slate) < last + 1;
    for (int i = 0; i < w->size;
         i++) { /* until everybody has had it: somebody must move what is on its way */
        well(tr_comm_broadcast(c, i, &word, sizeof word, &t, &err), &err);
        await(c, t);
    }
    if (me == 0) unlink(path);
    close(slate);
    tr_comm_free(c);
    if (!ahead_of_last) fail_msg("the others were held up by member %d", last);
    if (back_early) fail_msg("the buffers came back before the last member had read them");
}

/* A ring where everybody sends first, two messages deep, received in order though waited for in the other. */
static void test_ring(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "ring");
    const int me = w->rank, to = (me + 1) % w->size, from = (me + w->size - 1) % w->size;
    static int a[50000], b[50000], x[50000], y[50000];
    tr_ticket s1, s2, r1, r2;
    tr_err err = {0};

    for (int step = 0; step < 50; step++) {
        const size_t n = step % 2 ? sizeof a : sizeof *a;
        a[0] = me * 1000 + step;
        b[0] = -a[0];
        a[49999] = b[49999] = step;
        x[0] = y[0] = 0;
        well(tr_comm_send(c, to, a, n, &s1, &err), &err);
        well(tr_comm_send(c, to, b, n, &s2, &err), &err);
        well(tr_comm_recv(c, from, x, n, &r1, &err), &err);
        well(tr_comm_recv(c, from, y, n, &r2, &err), &err);
        await(c, r2);
        await(c, r1);
        assert_int_equal(x[0], from * 1000 + step);
        assert_int_equal(y[0], -x[0]);
        if (step % 2) assert_int_equal(x[49999], step);
        await(c, s1);
        await(c, s2);
    }
    tr_comm_free(c);
}

/* Three communicators of the same members, large reductions of two rounds in flight on each, waited for in an order
 * that differs from member to member: whoever waits advances all of them. */
static void test_in_flight(void **state)
{
    enum { N = 60000, EACH = 3 };
    tr_world *w = *state;
    tr_comm *c[EACH] = {split(w, 0, w->rank, "lane0"), split(w, 0, w->rank, "lane1"),
                        split(w, 0, w->rank, "lane2")};
    static float x[EACH][2][N];
    tr_ticket t[EACH][2];
    tr_err err = {0};

    for (int step = 0; step < 10; step++) {
        for (int i = 0; i < EACH; i++)
            for (int j = 0; j < 2; j++) {
                for (size_t k = 0; k < N; k++)
                    x[i][j][k] = term(w->rank, k + (size_t)(i + j));
                well(tr_comm_all_reduce(c[i], x[i][j], N, TR_F32, &t[i][j], &err), &err);
            }
        for (int i = 0; i < EACH; i++)
            for (int j = 0; j < 2; j++) {
                const int lane = (i + w->rank) % EACH, which = (j + w->rank) % 2;
                await(c[lane], t[lane][which]);
                for (size_t k = 0; k < N; k++)
                    if (x[lane][which][k] != total(w->size, k + (size_t)(lane + which)))
                        fail_msg("lane %d, operation %d: element %zu", lane, which, k);
            }
    }
    for (int i = 0; i < EACH; i++)
        tr_comm_free(c[i]);
}

/* What one member does wrong is TR_E_COMM, with the sizes, and the communicator is of no use afterwards. */
static void test_wrong_size(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "wrong");
    const int last = w->size - 1;
    float x[8] = {0};
    tr_ticket t, u;
    tr_err err = {0};

    well(tr_comm_all_reduce(c, x, w->rank == last ? 3 : 4, TR_F32, &t, &err), &err);
    assert_int_equal(tr_comm_wait(c, TR_LANE_MAIN, t, &err), TR_E_COMM);
    assert_non_null(strstr(err.text, "all_reduce number 1 of wrong: "));
    if (w->size == 2 && w->rank == 0) assert_non_null(strstr(err.text, "12 bytes where 16"));
    assert_int_equal(tr_comm_broadcast(c, 0, x, 4, &u, &err), TR_E_COMM);
    assert_int_equal(tr_comm_wait(c, TR_LANE_MAIN, t, &err), TR_E_COMM);
    assert_int_equal(tr_agree(w, TR_OK, &err), TR_OK); /* others are not disturbed */
    tr_comm_free(c);
}

/* Who waits on one communicator notices that another is broken: whoever it waits for may wait in that one for ever. */
static void test_broken_elsewhere(void **state)
{
    tr_world *w = *state;
    tr_comm *wrong = split(w, 0, w->rank, "wrong"), *c = split(w, 0, w->rank, "right");
    const int last = w->size - 1;
    float x[8] = {0}, y[8] = {0};
    tr_ticket t, u;
    tr_err err = {0};

    /* Everybody's sum meets a message of the wrong size: the last member's, or those that the last one gets. */
    well(tr_comm_all_reduce(wrong, x, w->rank == last ? 3 : 4, TR_F32, &t, &err), &err);
    if (w->rank == last) { /* waits for what nobody sends */
        well(tr_comm_recv(c, 0, y, sizeof y, &u, &err), &err);
        assert_int_equal(tr_comm_wait(c, TR_LANE_MAIN, u, &err), TR_E_COMM);
        assert_non_null(strstr(err.text, "all_reduce number 1 of wrong: "));
    }
    assert_int_equal(tr_comm_wait(wrong, TR_LANE_MAIN, t, &err), TR_E_COMM);
    assert_int_equal(tr_agree(w, TR_OK, &err), TR_OK);
    tr_comm_free(c);
    tr_comm_free(wrong);
}

/* What nobody answers is given up when the communicator ends. */
static void test_given_up(void **state)
{
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "given up"), *d;
    static float x[4];
    tr_ticket t;
    tr_err err = {0};

    if (w->rank == 0) well(tr_comm_recv(c, 1, x, sizeof x, &t, &err), &err);
    tr_comm_progress(c);
    tr_comm_free(c);
    d = split(w, 0, w->rank, "after");
    well(tr_comm_all_reduce(d, x, 4, TR_F32, &t, &err), &err);
    await(d, t);
    tr_comm_free(d);
}

/* Two pieces and a bit. */
static void test_large(void **state)
{
    const size_t n = (size_t)INT_MAX + 4099;
    tr_world *w = *state;
    tr_comm *c = split(w, 0, w->rank, "large");
    unsigned char *x = malloc(n);
    tr_ticket t;
    tr_err err = {0};

    assert_non_null(x);
    for (size_t k = 0; k < n; k += 4096)
        x[k] = (unsigned char)(w->rank == 0 ? k >> 12 : 0);
    well(tr_comm_broadcast(c, 0, x, n, &t, &err), &err);
    await(c, t);
    for (size_t k = 0; k < n; k += 4096)
        if (x[k] != (unsigned char)(k >> 12)) fail_msg("byte %zu", k);
    free(x);
    tr_comm_free(c);
}

int main(int argc, char **argv)
{
    tr_world world;
    tr_err err = {0};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_split, &world),
        cmocka_unit_test_prestate(test_sums, &world),
        cmocka_unit_test_prestate(test_scatter, &world),
        cmocka_unit_test_prestate(test_max, &world),
        cmocka_unit_test_prestate(test_gathers, &world),
        cmocka_unit_test_prestate(test_broadcast, &world),
        cmocka_unit_test_prestate(test_broadcast_goes_ahead, &world),
        cmocka_unit_test_prestate(test_ring, &world),
        cmocka_unit_test_prestate(test_in_flight, &world),
        cmocka_unit_test_prestate(test_wrong_size, &world),
        cmocka_unit_test_prestate(test_broken_elsewhere, &world),
        cmocka_unit_test_prestate(test_given_up, &world),
    };
    const struct CMUnitTest large[] = {cmocka_unit_test_prestate(test_large, &world)};

    if (tr_world_start(&world, &err) != TR_OK) {
        fprintf(stderr, "test_comm_mpi: %s\n", err.text);
        return 1;
    }
    if (world.size == 1 || world.size > MAX_RANKS) {
        tr_world_finish(TR_OK);
        puts("skipped: test_comm_ranks.sh starts this on 2 to 16 ranks");
        return 77;
    }
    int n_failed = argc > 1 && strcmp(argv[1], "large") == 0
                       ? cmocka_run_group_tests(large, NULL, NULL)
                       : cmocka_run_group_tests(tests, NULL, NULL);
    /* A failed check ends a test on one rank only: the others may wait for it for ever. */
    if (n_failed) tr_world_abort(TR_E_COMM);
    tr_world_finish(TR_OK);
    return 0;
}
