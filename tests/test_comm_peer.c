/* Sums with a norm behind them over peer memory (tr_comm_reduce_norm), against the sum and the norm one after the other: to the bit,
 * whatever the data, the number of rows and the delays of single ranks. Runs on 2 to 8 ranks with a GPU each
 * (tests/run_gpus.sh starts it), and linked with a fake device as tests/test_peer_on_fake (tests/test_fake_nccl.sh). Alone, or
 * where there are no GPUs that reach each other, there is nothing to test (77). With the argument "abort": a kernel that waits
 * for ever leaves when the job is given up. */
#include <config.h>

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/clock.h"
#include "kernels/number.h"
#include "tests/device_rank.h"

enum { ROWS = 300, WIDTH = 7168, SHOTS = 2 }; /* of a row: at most; a fake device is slow */

typedef struct rows { /* of one operation, on the device; and a copy of its results */
    int32_t *n;
    char *add, *out;
    float *residual, *weight, *q_scale;
    uint8_t *q;
    float *residual_h;
    char *out_h;
    uint8_t *q_h;
    float *scale_h;
} rows;

typedef struct place { /* one rank's */
    device_rank at;
    tr_comm *comm[SHOTS + 1]; /* by shots; 0: of narrow rows, the faster */
    tr_peer_report report[SHOTS + 1];
    rows one, other; /* in one kernel; one after the other */
    char *fill;
    size_t act;
    int width;
} place;

enum { NARROW = 256 };

/* Of both signs and of very different sizes, so that every order of summation gives another sum; zeros of both signs. */
static float term(uint32_t seed, size_t k)
{
    const uint32_t h = noise(seed, k);
    if ((h >> 24) < 8) return h & 1 ? -0.0f : 0.0f;
    return ((float)(h & 0xffff) - 32768.0f) * (h & 0x10000 ? 1e-4f : h & 0x20000 ? 1.0f : 1e2f);
}

static void put(const place *p, size_t i, float x)
{
    const uint16_t b = tr_f32_to_bf16(x);
    if (p->act == 2)
        memcpy(p->fill + 2 * i, &b, 2);
    else
        memcpy(p->fill + 4 * i, &x, 4);
}

/* n numbers: what this member gives. */
static void give(const place *p, void *to, uint32_t seed, size_t n)
{
    for (size_t i = 0; i < n; i++)
        put(p, i, term(seed * 16 + (uint32_t)p->at.me, i));
    up(&p->at, to, p->fill, n * p->act);
}

static void set_rows(const place *p, const rows *r, uint32_t seed, int n, int n_max, int d)
{
    const size_t numbers = (size_t)n_max * (size_t)d;
    float *x = (float *)(void *)p->fill;

    give(p, r->add, seed, numbers);
    for (size_t i = 0; i < numbers; i++)
        x[i] = term(seed + 99991, i);
    up(&p->at, r->residual, x, numbers * 4);
    for (size_t i = 0; i < (size_t)d; i++)
        x[i] = term(7, i);
    up(&p->at, r->weight, x, (size_t)d * 4);
    up(&p->at, r->n, &n, sizeof n);
    memset(p->fill, 0x5a, numbers * p->act);
    up(&p->at, r->out, p->fill, numbers * p->act);
    up(&p->at, r->q, p->fill, numbers);
}

static struct tr_norm_args args_of(const place *p, const rows *r, int n_max, int d, int pow2)
{
    const bool quantised = (p->at.ops->caps & TR_CAP_W8A8) != 0;

    return (struct tr_norm_args){.n = r->n,
                                 .n_max = n_max,
                                 .d = d,
                                 .add = (const tr_act *)(const void *)r->add,
                                 .ld_add = (size_t)d,
                                 .residual = r->residual,
                                 .ld_residual = (size_t)d,
                                 .weight = r->weight,
                                 .eps = 1e-6f,
                                 .out = (tr_act *)(void *)r->out,
                                 .ld_out = (size_t)d,
                                 .q = quantised ? r->q : NULL,
                                 .q_scale = quantised ? r->q_scale : NULL,
                                 .scale_pow2 = pow2};
}

static void sum_then_norm(const place *p, tr_comm *comm, const rows *r, struct tr_norm_args a)
{
    const size_t numbers = (size_t)a.n_max * (size_t)a.d;
    tr_err err = {0};
    tr_ticket t;

    well(tr_comm_all_reduce(comm, r->add, numbers, p->at.ops->act, &t, &err), &err);
    well(tr_comm_wait(comm, TR_LANE_MAIN, t, &err), &err);
    device_well(&p->at, p->at.ops->norm(p->at.device, TR_LANE_MAIN, &a));
}

static void fetch(const place *p, rows *r, int n_max, int d)
{
    const size_t numbers = (size_t)n_max * (size_t)d;

    down(&p->at, r->residual_h, r->residual, numbers * 4, NULL);
    down(&p->at, r->out_h, r->out, numbers * p->act, NULL);
    if (!(p->at.ops->caps & TR_CAP_W8A8)) return;
    down(&p->at, r->q_h, r->q, numbers, NULL);
    down(&p->at, r->scale_h, r->q_scale, (size_t)(d / 128) * (size_t)((n_max + 3) / 4 * 4) * 4,
         NULL);
}

static void same(const char *what, const void *got, const void *want, size_t n, int n_max, int live)
{
    const unsigned char *x = got, *y = want;
    for (size_t i = 0; i < n; i++)
        if (x[i] != y[i])
            fail_msg("%s of %d rows, room for %d: byte %zu of %zu is %02x, not %02x", what, live,
                     n_max, i, n, x[i], y[i]);
}

static void compare(const place *p, rows *one, rows *other, int live, int n_max, int d)
{
    const size_t numbers = (size_t)n_max * (size_t)d, ld = (size_t)((n_max + 3) / 4 * 4);

    fetch(p, one, n_max, d);
    fetch(p, other, n_max, d);
    same("residual", one->residual_h, other->residual_h, numbers * 4, n_max, live);
    same("out", one->out_h, other->out_h, numbers * p->act, n_max, live);
    if (!(p->at.ops->caps & TR_CAP_W8A8)) return;
    same("e4m3", one->q_h, other->q_h, numbers, n_max, live);
    for (size_t b = 0; b < (size_t)(d / 128); b++)
        same("scales", one->scale_h + b * ld, other->scale_h + b * ld, (size_t)live * 4, n_max,
             live);
}

/* ---- bits ------------------------------------------------------------------------------------------------------------ */

static void check_rows(place *p, tr_comm *comm, uint32_t seed, int live, int n_max, int d)
{
    const int pow2 = (int)(seed & 1);
    tr_err err = {0};

    assert_true(tr_comm_fuses(comm, n_max, d));
    set_rows(p, &p->one, seed, live, n_max, d);
    set_rows(p, &p->other, seed, live, n_max, d);
    const struct tr_norm_args a = args_of(p, &p->one, n_max, d, pow2);
    well(tr_comm_reduce_norm(comm, &a, &err), &err);
    sum_then_norm(p, comm, &p->other, args_of(p, &p->other, n_max, d, pow2));
    compare(p, &p->one, &p->other, live, n_max, d);
}

static int most_rows(const place *p, int i)
{
    const tr_peer_report *r = &p->report[i];
    int most = 0;

    for (int k = 0; k < r->n; k++)
        if (strcmp(r->size[k].chosen, "nccl") != 0) most = r->size[k].rows;
    return most;
}

static void test_bits(void **state)
{
    static const int sizes[] = {1, 2, 3, 5, 8, 16, 17, 33, 64, 65, 128, 131, 256};
    place *p = *state;
    uint32_t seed = 1;

    for (int shots = 1; shots <= SHOTS; shots++) {
        const int most = most_rows(p, shots);
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            if (sizes[i] <= most)
                check_rows(p, p->comm[shots], seed++, sizes[i], sizes[i], p->width);
    }
    assert_true(seed > 1);
}

/* Records have room for more rows than there are; no rows at all are no turn. */
static void test_live(void **state)
{
    place *p = *state;

    for (int shots = 1; shots <= SHOTS; shots++) {
        const int most = most_rows(p, shots);
        for (int i = 0; i < 40 && most; i++) {
            const int n_max = 1 + (int)(noise(3, (size_t)i) % (uint32_t)most);
            const int live = i % 4 == 3 ? 0 : (int)(noise(5, (size_t)i) % (uint32_t)(n_max + 1));
            check_rows(p, p->comm[shots], 1000 + (uint32_t)i, live, n_max, p->width);
        }
    }
}

static void test_narrow(void **state)
{
    place *p = *state;

    for (int n = 1; n <= 200; n += 23)
        check_rows(p, p->comm[0], 500 + (uint32_t)n, n, n, NARROW);
}

/* The value that marks an empty slot, sent as data: it arrives as what it is, not a number. */
static void test_not_numbers(void **state)
{
    place *p = *state;
    const int n = 3, d = NARROW;
    tr_err err = {0};

    set_rows(p, &p->one, 77, n, n, d);
    if (p->at.me == 1) {
        memset(p->fill, 0xff, (size_t)d * p->act);
        up(&p->at, p->one.add + (size_t)d * p->act, p->fill, (size_t)d * p->act);
    }
    const struct tr_norm_args a = args_of(p, &p->one, n, d, 1);
    well(tr_comm_reduce_norm(p->comm[0], &a, &err), &err);
    fetch(p, &p->one, n, d);
    for (int i = 0; i < n * d; i++)
        assert_int_equal(p->one.residual_h[i] != p->one.residual_h[i], i / d == 1);
}

/* ---- again and again --------------------------------------------------------------------------------------------------- */

enum { OPS = 6, REPLAYS = 1000 };

static const int replayed[OPS] = {1, 64, 2, 17, 1, 5};

/* Whole numbers, so small that bf16 holds the sum of eight members' and the residual after so many sums is exact. */
static float whole(int member, size_t k)
{
    return (float)(noise((uint32_t)member + 31, k) % 32);
}

static void several(place *p, tr_comm *comm, int d)
{
    tr_err err = {0};

    for (int i = 0; i < OPS; i++) {
        const struct tr_norm_args a = args_of(p, &p->one, replayed[i], d, 1);
        well(tr_comm_reduce_norm(comm, &a, &err), &err);
    }
}

/* One graph, 1000 times, while single ranks come late. */
static void test_replays(void **state)
{
    place *p = *state;
    const bool graphs = (p->at.ops->caps & TR_CAP_GRAPH) != 0;
    const int d = NARROW, n = 64, times = graphs ? REPLAYS : 50;
    tr_graph *graph = NULL;

    set_rows(p, &p->one, 1, n, n, d);
    for (int i = 0; i < n * d; i++)
        put(p, (size_t)i, whole(p->at.me, (size_t)i));
    up(&p->at, p->one.add, p->fill, (size_t)(n * d) * p->act);
    memset(p->fill, 0, (size_t)(n * d) * 4);
    up(&p->at, p->one.residual, p->fill, (size_t)(n * d) * 4);
    if (graphs) {
        device_well(&p->at, p->at.ops->graph_begin(p->at.device, TR_LANE_MAIN));
        tr_comm_set_mode(p->comm[0], TR_COMM_RECORD);
        several(p, p->comm[0], d);
        tr_comm_set_mode(p->comm[0], TR_COMM_RUN);
        device_well(&p->at, p->at.ops->graph_end(p->at.device, TR_LANE_MAIN, &graph));
    }
    for (int i = 0; i < times; i++) {
        const uint32_t h = noise((uint32_t)p->at.me + 11, (size_t)i);
        if (h % 16 == 0) usleep(h / 16 % 300);
        if (graphs)
            device_well(&p->at, p->at.ops->graph_run(p->at.device, TR_LANE_MAIN, graph));
        else
            several(p, p->comm[0], d);
    }
    settle(&p->at, NULL);
    if (graph) p->at.ops->graph_free(p->at.device, graph);
    down(&p->at, p->one.residual_h, p->one.residual, (size_t)(n * d) * 4, NULL);
    for (int r = 0; r < n; r++) {
        int turns = 0;
        for (int i = 0; i < OPS; i++)
            turns += r < replayed[i];
        for (int j = 0; j < d; j++) {
            const size_t at = (size_t)(r * d + j);
            float sum = 0;
            for (int m = 0; m < p->at.size; m++)
                sum += whole(m, at);
            assert_true(p->one.residual_h[at] == (float)(times * turns) * sum);
        }
    }
}

/* ---- what else is promised ------------------------------------------------------------------------------------------------ */

static void test_refusals(void **state)
{
    place *p = *state;
    tr_err err = {0};
    struct tr_norm_args a = args_of(p, &p->one, 1, NARROW, 1);

    assert_true(tr_comm_fuses(p->comm[0], 1, NARROW));
    assert_false(tr_comm_fuses(p->comm[0], 1, NARROW + 128)); /* made for another width */
    assert_false(tr_comm_fuses(p->comm[0], 257, NARROW));
    assert_false(tr_comm_fuses(p->at.host, 1, NARROW));
    a.add = NULL;
    assert_int_equal(tr_comm_reduce_norm(p->comm[0], &a, &err), TR_E_COMM);
    a = args_of(p, &p->one, 1000, NARROW, 1);
    assert_int_equal(tr_comm_reduce_norm(p->comm[0], &a, &err), TR_E_COMM);
    assert_int_equal(tr_comm_reduce_norm(p->at.host, &a, &err), TR_E_COMM);
}

/* Measuring leaves no trace in the accounts; an operation counts as a sum; one that a record has is counted and not run. */
static void test_accounts(void **state)
{
    place *p = *state;
    uint64_t calls, bytes, calls_then, bytes_then;
    tr_err err = {0};
    const struct tr_norm_args a = args_of(p, &p->one, 2, NARROW, 1);
    tr_comm *comm = p->comm[0];

    set_rows(p, &p->one, 9, 2, 2, NARROW);
    tr_comm_counts(comm, TR_COMM_ALL_REDUCE, &calls, &bytes);
    tr_comm_set_mode(comm, TR_COMM_NOTE);
    if (p->at.me == 0) well(tr_comm_reduce_norm(comm, &a, &err), &err); /* nobody waits for it */
    tr_comm_set_mode(comm, TR_COMM_RUN);
    tr_comm_counts(comm, TR_COMM_ALL_REDUCE, &calls_then, &bytes_then);
    assert_int_equal(calls_then - calls, p->at.me == 0);
    assert_int_equal(bytes_then - bytes, p->at.me == 0 ? 2 * NARROW * p->act : 0);
    for (int i = 0; i <= SHOTS; i++)
        for (int k = 0; k < p->report[i].n; k++)
            assert_true(p->report[i].size[k].nccl_s > 0);
}

/* ---- a kernel that waits for ever leaves when the job is given up ---------------------------------------------------------- */

static void *give_up(void *ctx)
{
    const place *p = ctx;

    nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
    p->at.world.guard->abort(p->at.world.guard->ctx);
    return NULL;
}

/* Nothing can be sent after it. */
static void test_abort(void **state)
{
    place *p = *state;
    const struct tr_norm_args a = args_of(p, &p->one, 1, NARROW, 1);
    tr_err err = {0};
    pthread_t thread;

    if (p->at.me != 0) return; /* they do not come */
    set_rows(p, &p->one, 1, 1, 1, NARROW);
    const uint64_t from_ns = tr_now_ns();
    assert_int_equal(pthread_create(&thread, NULL, give_up, p), 0);
    well(tr_comm_reduce_norm(p->comm[0], &a, &err), &err);
    settle(&p->at, NULL);
    assert_true(tr_now_ns() - from_ns > 200000000);
    assert_int_equal(pthread_join(thread, NULL), 0);
}

/* ---- the program ---------------------------------------------------------------------------------------------------------- */

static tr_status take(const place *p, size_t bytes, void *out, tr_err *err)
{
    const tr_status st = p->at.ops->alloc(p->at.device, bytes, TR_MEMORY_DEVICE, out);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "%s", p->at.ops->error(p->at.device));
}

static tr_status take_rows(const place *p, rows *r, tr_err *err)
{
    const size_t n = (size_t)ROWS * WIDTH, scales = (size_t)(WIDTH / 128) * ROWS * 4;
    tr_status st = take(p, sizeof *r->n, &r->n, err);

    if (st == TR_OK) st = take(p, n * p->act, &r->add, err);
    if (st == TR_OK) st = take(p, n * p->act, &r->out, err);
    if (st == TR_OK) st = take(p, n * 4, &r->residual, err);
    if (st == TR_OK) st = take(p, WIDTH * 4, &r->weight, err);
    if (st == TR_OK) st = take(p, n, &r->q, err);
    if (st == TR_OK) st = take(p, scales, &r->q_scale, err);
    r->residual_h = malloc(n * 4);
    r->out_h = malloc(n * 4);
    r->q_h = malloc(n);
    r->scale_h = malloc(scales);
    if (st == TR_OK && (!r->residual_h || !r->out_h || !r->q_h || !r->scale_h))
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    return st;
}

static void release_rows(const place *p, rows *r)
{
    void *const memory[] = {r->n, r->add, r->out, r->residual, r->weight, r->q, r->q_scale};

    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        p->at.ops->release(p->at.device, memory[i]);
    free(r->residual_h);
    free(r->out_h);
    free(r->q_h);
    free(r->scale_h);
}

static tr_status open_place(void *place_, tr_err *err)
{
    place *p = place_;
    tr_status st = TR_OK;

    p->act = tr_act_bytes(p->at.ops);
    p->width = p->at.ops->caps & TR_CAP_GRAPH ? WIDTH : 768;
    for (int i = 0; i <= SHOTS && st == TR_OK; i++) {
        const tr_peer_options how = {
            .use = TR_PEER_ON, .d = i ? p->width : NARROW, .shots = i, .times = 3};
        st = tr_nccl_comm(&p->comm[i], p->at.nccl, p->at.host, 0, err);
        if (st == TR_OK) st = tr_nccl_peers(p->comm[i], &how, &p->report[i], err);
    }
    p->at.unfit = st == TR_E_USAGE;
    if (st == TR_OK) st = take_rows(p, &p->one, err);
    if (st == TR_OK) st = take_rows(p, &p->other, err);
    p->fill = malloc((size_t)ROWS * WIDTH * 4);
    return st == TR_OK && !p->fill ? tr_fail(err, TR_E_MEMORY, "out of memory") : st;
}

static void close_place(place *p)
{
    release_rows(p, &p->one);
    release_rows(p, &p->other);
    for (int i = 0; i <= SHOTS; i++)
        tr_comm_free(p->comm[i]);
    device_rank_close(&p->at);
    free(p->fill);
}

int main(int argc, char **argv)
{
    place p = {.fill = NULL};
    const bool aborts = argc > 1 && strcmp(argv[1], "abort") == 0;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_bits, &p),
        cmocka_unit_test_prestate(test_live, &p),
        cmocka_unit_test_prestate(test_narrow, &p),
        cmocka_unit_test_prestate(test_not_numbers, &p),
        cmocka_unit_test_prestate(test_replays, &p),
        cmocka_unit_test_prestate(test_refusals, &p),
        cmocka_unit_test_prestate(test_accounts, &p),
    };
    const struct CMUnitTest last[] = {cmocka_unit_test_prestate(test_abort, &p)};
    const int how = device_rank_begin(&p, "test_comm_peer", TR_MAX_PEERS, open_place);

    if (how >= 0) return how;
    device_rank_leave(aborts ? cmocka_run_group_tests(last, NULL, NULL)
                             : cmocka_run_group_tests(tests, NULL, NULL));
    if (!aborts) close_place(&p);
    tr_world_finish(TR_OK);
    fflush(stdout);
    if (aborts) _exit(0); /* what has been given up cannot be closed */
    return 0;
}
