/* Communicators: the group of one, argument checks, counts, shares; and the loop-back that other tests use for MPI. */
#include <config.h>

#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "loopback.h"

static void expect_counts(const tr_comm *c, tr_comm_op op, uint64_t calls, uint64_t bytes)
{
    uint64_t n, b;
    tr_comm_counts(c, op, &n, &b);
    assert_int_equal(n, calls);
    assert_int_equal(b, bytes);
}

static void test_self(void **state)
{
    tr_comm *c = tr_comm_self();
    tr_ticket t = {0};
    tr_err err = {0};
    float x[4] = {1, 2, 3, 4}, y[4] = {0};
    const size_t n16 = 16, n8 = 8;

    (void)state;
    assert_non_null(c);
    assert_int_equal(tr_comm_rank(c), 0);
    assert_int_equal(tr_comm_size(c), 1);
    assert_int_equal(tr_comm_wait(c, TR_LANE_MAIN, t, &err), TR_OK);
    assert_int_equal(tr_comm_all_reduce(c, x, 4, TR_F32, &t, &err), TR_OK);
    assert_int_equal(t.n, 1);
    assert_int_equal(tr_comm_wait(c, TR_LANE_MAIN, t, &err), TR_OK);
    assert_true(x[0] == 1 && x[3] == 4);
    assert_int_equal(tr_comm_all_gather(c, x, y, &n16, &t, &err), TR_OK);
    assert_memory_equal(x, y, 16);
    assert_int_equal(tr_comm_all_gather(c, x, x, &n16, &t, &err), TR_OK);
    memset(y, 0, sizeof y);
    assert_int_equal(tr_comm_reduce_scatter(c, x, y, 3, TR_F32, &t, &err), TR_OK);
    assert_memory_equal(x, y, 12);
    assert_true(y[3] == 0);
    memset(y, 0, sizeof y);
    assert_int_equal(tr_comm_all_to_all(c, x, &n8, y, &n8, &t, &err), TR_OK);
    assert_memory_equal(x, y, 8);
    assert_true(y[2] == 0);
    assert_int_equal(tr_comm_broadcast(c, 0, x, 16, &t, &err), TR_OK);
    assert_int_equal(t.n, 6);
    tr_comm_progress(c);
    assert_int_equal(tr_comm_all_reduce(c, NULL, 0, TR_F32, &t, &err), TR_OK);
    uint64_t word = 7;
    assert_int_equal(tr_comm_all_max_u64(c, &word, 1, &t, &err), TR_OK);
    assert_true(word == 7);
    expect_counts(c, TR_COMM_ALL_MAX, 1, 8);
    assert_string_equal(tr_comm_name(c), "self");
    expect_counts(c, TR_COMM_ALL_REDUCE, 2, 16);
    expect_counts(c, TR_COMM_ALL_GATHER, 2, 32);
    expect_counts(c, TR_COMM_REDUCE_SCATTER, 1, 12);
    expect_counts(c, TR_COMM_ALL_TO_ALL, 1, 8);
    expect_counts(c, TR_COMM_BROADCAST, 1, 16);
    expect_counts(c, TR_COMM_SEND, 0, 0);
    tr_comm_free(c);
    tr_comm_free(NULL);
}

static void test_arguments(void **state)
{
    tr_comm *c = tr_comm_self();
    tr_ticket t = {0};
    tr_err err = {0};
    float x[4] = {0}, y[4] = {0};
    const size_t n4 = 4, n8 = 8;

    (void)state;
    assert_int_equal(tr_comm_all_reduce(c, x, 4, TR_BF16, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_reduce(c, x, SIZE_MAX / 2, TR_F32, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_reduce(c, NULL, 4, TR_F32, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_reduce(c, x, 4, TR_F32, NULL, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_gather(c, x, y, NULL, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_gather(c, NULL, y, &n4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_gather(c, x, NULL, &n4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_reduce_scatter(c, x, NULL, 1, TR_F32, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_reduce_scatter(c, x, y, 1, TR_I32, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_to_all(c, x, &n4, y, &n8, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_to_all(c, NULL, &n4, y, &n4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_to_all(c, x, NULL, y, &n4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_send(c, 0, x, 4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_recv(c, 0, x, 4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_send(c, 1, x, 4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_broadcast(c, 1, x, 4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_broadcast(c, -1, x, 4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_broadcast(c, 0, NULL, 4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_max_u64(c, NULL, 1, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_max_u64(c, (uint64_t *)1, SIZE_MAX / 4, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_max_u64(c, NULL, 0, NULL, &err), TR_E_COMM);
    assert_int_equal(tr_comm_wait(c, TR_LANE_MAIN, (tr_ticket){1}, &err), TR_E_COMM);
    assert_non_null(strstr(err.text, "wait: "));
    /* What was refused is not counted and has no ticket. */
    for (int op = 0; op < TR_COMM_N_OPS; op++) {
        expect_counts(c, (tr_comm_op)op, 0, 0);
        assert_true(strlen(tr_comm_op_name((tr_comm_op)op)) > 3);
    }
    assert_string_equal(tr_comm_op_name(TR_COMM_N_OPS), "?");
    assert_int_equal(t.n, 0);
    tr_comm_free(c);
}

static void test_share(void **state)
{
    tr_comm *c = tr_comm_self();
    tr_share *s;
    tr_err err = {0};
    tr_push push;
    tr_await await;
    tr_rows rows = {.n_max = 8}, many = {.n_max = 9};
    char page[64];

    (void)state;
    assert_int_equal(tr_share_open(&s, c, 0, 8, &err), TR_E_COMM);
    assert_int_equal(tr_share_open(&s, c, 656, 0, &err), TR_E_COMM);
    assert_int_equal(tr_share_open(&s, c, SIZE_MAX, 2, &err), TR_E_COMM);
    assert_null(s);
    tr_share_close(s);
    assert_int_equal(tr_share_open(&s, c, 656, 8, &err), TR_OK);
    for (int step = 0; step < 2; step++) {
        memset(&push, 1, sizeof push);
        memset(&await, 1, sizeof await);
        assert_int_equal(tr_share_sent(s, TR_LANE_MAIN, &err), TR_E_COMM);
        assert_int_equal(tr_share_begin(s, &many, page, &push, &err), TR_E_COMM);
        assert_int_equal(tr_share_begin(s, &rows, page, &push, &err), TR_OK);
        assert_int_equal(push.n_peers, 0);
        assert_int_equal(tr_share_begin(s, &rows, page, &push, &err), TR_E_COMM);
        assert_int_equal(tr_share_ready(s, TR_LANE_MAIN, &await, &err), TR_E_COMM);
        assert_int_equal(tr_share_sent(s, TR_LANE_MAIN, &err), TR_OK);
        assert_int_equal(tr_share_ready(s, TR_LANE_MAIN, &await, &err), TR_OK);
        assert_int_equal(await.n, 0);
    }
    tr_share_close(s);
    tr_comm_free(c);
}

/* ---- loop-back: one thread per rank ------------------------------------------------------------------------------- */

/* CMocka's asserts belong to the main thread: a rank says what was wrong by a line number, 0 if nothing. */
#define CHECK(x)                                                                                   \
    do {                                                                                           \
        if (!(x)) return __LINE__;                                                                 \
    } while (0)

enum { MAX_RANKS = 4, N = 5 };

typedef struct rank {
    tr_comm *comm;
    int (*run)(tr_comm *);
    int line;
} rank;

static void *run_rank(void *arg)
{
    rank *r = arg;
    r->line = r->run(r->comm);
    return NULL;
}

static void run_ranks(int size, int (*run)(tr_comm *))
{
    tr_loopback *l = tr_loopback_create(size);
    pthread_t thread[MAX_RANKS];
    rank r[MAX_RANKS];

    assert_non_null(l);
    for (int i = 0; i < size; i++) {
        r[i] = (rank){.comm = tr_loopback_comm(l, i), .run = run};
        assert_non_null(r[i].comm);
    }
    for (int i = 0; i < size; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, run_rank, &r[i]), 0);
    for (int i = 0; i < size; i++)
        assert_int_equal(pthread_join(thread[i], NULL), 0);
    for (int i = 0; i < size; i++) {
        if (r[i].line) fail_msg("rank %d of %d: line %d", i, size, r[i].line);
        tr_comm_free(r[i].comm);
    }
    tr_loopback_free(l);
}

static tr_status wait_for(tr_comm *c, tr_ticket t)
{
    tr_err err = {0};
    tr_comm_progress(c);
    return tr_comm_wait(c, TR_LANE_MAIN, t, &err);
}

/* In rank order: 1e8 + 1 - 1e8 differs from any other order in fp32. */
static float term(int i)
{
    static const float x[MAX_RANKS] = {1e8f, 1.0f, -1e8f, 1.0f};
    return x[i];
}

static float total(int size)
{
    volatile float s = term(0);
    for (int i = 1; i < size; i++)
        s = s + term(i);
    return s;
}

static int sums(tr_comm *c)
{
    int me = tr_comm_rank(c), size = tr_comm_size(c);
    float x[N], y[MAX_RANKS * N], z[N];
    tr_ticket t, u;
    tr_err err = {0};

    for (int step = 0; step < 50; step++) {
        for (int i = 0; i < N; i++)
            x[i] = term(me) * (float)(i + 1);
        for (int i = 0; i < size * N; i++)
            y[i] = (float)(me * 100 + i + step);
        CHECK(tr_comm_all_reduce(c, x, N, TR_F32, &t, &err) == TR_OK);
        CHECK(x[0] == term(me)); /* begun, not yet there */
        CHECK(tr_comm_reduce_scatter(c, y, z, N, TR_F32, &u, &err) == TR_OK);
        CHECK(u.n == t.n + 1);
        CHECK(wait_for(c, u) == TR_OK); /* in any order */
        CHECK(wait_for(c, t) == TR_OK);
        CHECK(wait_for(c, t) == TR_OK); /* a second time: nothing */
        CHECK(x[0] == total(size));
        for (int i = 0; i < N; i++)
            CHECK(z[i] == (float)(size * (me * N + i + step) + 100 * (size * (size - 1) / 2)));
    }
    uint64_t calls, bytes;
    tr_comm_counts(c, TR_COMM_REDUCE_SCATTER, &calls, &bytes);
    CHECK(calls == 50 && bytes == 50u * N * sizeof(float) * (unsigned)size);
    CHECK(tr_comm_all_reduce(c, NULL, 0, TR_F32, &t, &err) == TR_OK);
    CHECK(wait_for(c, t) == TR_OK);
    return 0;
}

/* Member i gives i bytes (so member 0 none) to a gather, and i + 2 j bytes to member j. */
static int gathers(tr_comm *c)
{
    int me = tr_comm_rank(c), size = tr_comm_size(c);
    size_t bytes[MAX_RANKS], n_send[MAX_RANKS], n_recv[MAX_RANKS];
    unsigned char mine[64], all[256], out[256], in[256];
    tr_ticket t, u, v;
    tr_err err = {0};

    for (int step = 0; step < 20; step++) {
        size_t at = 0;
        memset(all, 255, sizeof all);
        memset(in, 255, sizeof in);
        memset(mine, me, sizeof mine);
        for (int j = 0; j < size; j++) {
            bytes[j] = (size_t)j;
            n_send[j] = (size_t)(me + 2 * j);
            n_recv[j] = (size_t)(j + 2 * me);
            memset(out + at, me * 16 + j, n_send[j]);
            at += n_send[j];
        }
        unsigned char word[3] = {0, 0, 0};
        if (me == size - 1) memset(word, 7, 3);
        CHECK(tr_comm_all_gather(c, me ? mine : NULL, all, bytes, &t, &err) == TR_OK);
        CHECK(tr_comm_all_to_all(c, out, n_send, in, n_recv, &u, &err) == TR_OK);
        CHECK(tr_comm_broadcast(c, size - 1, word, 3, &v, &err) == TR_OK);
        CHECK(all[0] == 255 && in[0] == 255);
        CHECK(wait_for(c, t) == TR_OK && wait_for(c, u) == TR_OK && wait_for(c, v) == TR_OK);
        CHECK(word[0] == 7 && word[2] == 7);
        at = 0;
        for (int j = 0; j < size; j++)
            for (size_t k = 0; k < bytes[j]; k++)
                CHECK(all[at++] == j);
        CHECK(all[at] == 255);
        at = 0;
        for (int j = 0; j < size; j++)
            for (size_t k = 0; k < n_recv[j]; k++)
                CHECK(in[at++] == j * 16 + me);
        CHECK(in[at] == 255);
    }
    return 0;
}

static int maxima(tr_comm *c)
{
    const uint64_t me = (uint64_t)tr_comm_rank(c), last = (uint64_t)tr_comm_size(c) - 1;
    tr_ticket t;
    tr_err err = {0};

    for (uint64_t step = 0; step < 20; step++) {
        uint64_t x[3] = {me << 40 | step, last - me, me == 1 ? UINT64_MAX : 0};
        CHECK(tr_comm_all_max_u64(c, x, 3, &t, &err) == TR_OK);
        CHECK(x[1] == last - me);
        CHECK(wait_for(c, t) == TR_OK);
        CHECK(x[0] == (last << 40 | step) && x[1] == last && x[2] == UINT64_MAX);
    }
    return 0;
}

/* A ring where everybody sends first, two messages deep, received in order though waited for in the other. */
static int ring(tr_comm *c)
{
    int me = tr_comm_rank(c), size = tr_comm_size(c), to = (me + 1) % size,
        from = (me + size - 1) % size;
    tr_ticket s1, s2, r1, r2;
    tr_err err = {0};

    for (int step = 0; step < 50; step++) {
        int a = me * 1000 + step, b = -a, x = 0, y = 0;
        CHECK(tr_comm_send(c, to, &a, sizeof a, &s1, &err) == TR_OK);
        CHECK(tr_comm_send(c, to, &b, sizeof b, &s2, &err) == TR_OK);
        CHECK(tr_comm_recv(c, from, &x, sizeof x, &r1, &err) == TR_OK);
        CHECK(tr_comm_recv(c, from, &y, sizeof y, &r2, &err) == TR_OK);
        CHECK(wait_for(c, r2) == TR_OK && wait_for(c, r1) == TR_OK);
        CHECK(x == from * 1000 + step && y == -x);
        CHECK(wait_for(c, s1) == TR_OK && wait_for(c, s2) == TR_OK);
    }
    CHECK(tr_comm_send(c, me, &size, 1, &s1, &err) == TR_E_COMM);
    CHECK(tr_comm_send(c, size, &size, 1, &s1, &err) == TR_E_COMM);
    return 0;
}

static int wrong_call(tr_comm *c)
{
    float x[4] = {0};
    tr_ticket t;
    tr_err err = {0};

    if (tr_comm_rank(c) == 0)
        CHECK(tr_comm_all_reduce(c, x, 4, TR_F32, &t, &err) == TR_OK);
    else
        CHECK(tr_comm_broadcast(c, 0, x, 16, &t, &err) == TR_OK);
    CHECK(wait_for(c, t) == TR_E_COMM);
    return 0;
}

static int wrong_size(tr_comm *c)
{
    float x[8] = {0}, y[8] = {0};
    size_t n_send[MAX_RANKS] = {4, 4, 4, 4}, n_recv[MAX_RANKS] = {4, 4, 4, 4};
    tr_ticket t, u;
    tr_err err = {0};

    CHECK(tr_comm_all_reduce(c, x, tr_comm_rank(c) == 1 ? 3 : 4, TR_F32, &t, &err) == TR_OK);
    if (tr_comm_rank(c) == 1) n_send[0] = 8;
    CHECK(tr_comm_all_to_all(c, x, n_send, y, n_recv, &u, &err) == TR_OK);
    CHECK(wait_for(c, t) == TR_E_COMM);
    CHECK(wait_for(c, u) == TR_E_COMM);
    return 0;
}

static int changed_buffer(tr_comm *c)
{
    float x[4] = {1, 2, 3, 4}, y[16];
    size_t bytes[MAX_RANKS] = {16, 16, 16, 16};
    tr_ticket t;
    tr_err err = {0};

    CHECK(tr_comm_all_gather(c, x, y, bytes, &t, &err) == TR_OK);
    if (tr_comm_rank(c) == 0) x[2] = 9;
    CHECK(wait_for(c, t) == (tr_comm_rank(c) == 0 ? TR_E_COMM : TR_OK));
    return 0;
}

static void test_loopback(void **state)
{
    static int (*const run[])(tr_comm *) = {
        sums, gathers, maxima, ring, wrong_call, wrong_size, changed_buffer,
    };

    (void)state;
    for (size_t i = 0; i < sizeof run / sizeof *run; i++) {
        run_ranks(2, run[i]);
        run_ranks(4, run[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_self),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_share),
        cmocka_unit_test(test_loopback),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
