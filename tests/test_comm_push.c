/* Rows of a cache pushed into the other members' caches (tr_share_reach), against the same rows made here: to the bit, whatever
 * their number and the delays of single ranks. Runs on 2 to 8 ranks with a GPU each (tests/run_gpus.sh starts it), and linked
 * with a fake device as tests/test_push_on_fake (tests/test_fake_nccl.sh). Alone, or where there are no GPUs that reach each
 * other, there is nothing to test (77). FAKE_PEERS set: the fake GPUs do not reach each other; NCCL then makes the same. */
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
#include "tests/device_rank.h"

#ifndef TR_ON_FAKE
#define TR_ON_FAKE 0
#endif

enum { RANKS_MAX = 8, PAGES = 8, LAYERS = 3, ROWS = 200, STEPS = 200, MOST = 4 << 20 };

typedef struct place { /* one rank's */
    device_rank at;
    tr_comm *gpu;
    char *cache_h, *got_h; /* [MOST] what a cache should be, and what it is */
    int n_rows[RANKS_MAX];
    int64_t write[ROWS];
    bool reached; /* what is to be expected */
} place;

/* All members are here. */
static void meet(const place *p)
{
    uint64_t word = 0;
    tr_err err = {0};
    tr_ticket t;

    well(tr_comm_all_max_u64(p->at.host, &word, 1, &t, &err), &err);
    well(tr_comm_wait(p->at.host, TR_LANE_MAIN, t, &err), &err);
}

/* Now and then somebody is late. */
static void dawdle(const place *p, int step, int where)
{
    const uint32_t h = noise((uint32_t)(p->at.me * 7 + where), (size_t)step);
    if (h % 4 == 0) usleep(h / 4 % 1500);
}

/* ---- one cache ---------------------------------------------------------------------------------------------------------- */

typedef struct cache {
    tr_record record;
    tr_share *share;
    char *memory; /* of LAYERS layers */
    size_t layer_bytes;
} cache;

static void open_cache(place *p, cache *c, const tr_record *r)
{
    tr_err err = {0};

    *c = (cache){.record = *r, .layer_bytes = r->page_bytes * PAGES};
    assert_true(c->layer_bytes <= MOST);
    device_well(&p->at, p->at.ops->alloc(p->at.device, c->layer_bytes * LAYERS, TR_MEMORY_SYMMETRIC,
                                         (void **)&c->memory));
    well(tr_share_open_record(&c->share, p->gpu, r, ROWS, &err), &err);
    well(tr_share_reach(c->share, c->memory, c->layer_bytes * LAYERS, &err), &err);
    assert_int_equal(tr_nccl_reaches(p->gpu, c->memory), p->reached);
}

static void close_cache(place *p, cache *c)
{
    settle(&p->at, NULL);
    tr_share_close(c->share);
    assert_false(tr_nccl_reaches(p->gpu, c->memory));
    meet(p); /* nobody has it open any more */
    p->at.ops->release(p->at.device, c->memory);
}

/* Which rows the members write in a step: none, few or many, pads among them, in pages of any order. */
static void choose_rows(place *p, const tr_record *r, int step)
{
    int n = 0;

    for (int m = 0; m < p->at.size; m++) {
        const uint32_t h = noise((uint32_t)m + 3, (size_t)step);
        p->n_rows[m] = h % 5 == 0 ? 0 : (int)(h / 5 % (ROWS / RANKS_MAX));
        for (int i = 0; i < p->n_rows[m];
             i++, n++) /* 37 and 512 have no common divisor: no row twice */
            p->write[n] = n % 7 == 5 ? -1 : (n * 37 + step * 11) % (int)r->n_rows;
    }
}

static char *row_at(const cache *c, char *layer, int64_t row, int i_piece)
{
    const tr_record *r = &c->record;
    const size_t page = (size_t)row / TR_PAGE_TOKENS, offset = (size_t)row % TR_PAGE_TOKENS;
    return layer + page * r->page_bytes + r->piece[i_piece].at + offset * r->piece[i_piece].bytes;
}

/* The step's rows: all of them where they are to be in the end, and this member's on the device. */
static void make_rows(place *p, const cache *c, char *layer_d, int step)
{
    int n = 0;

    for (int m = 0; m < p->at.size; m++)
        for (int i = 0; i < p->n_rows[m]; i++, n++)
            for (int k = 0; k < c->record.n_pieces && p->write[n] >= 0; k++) {
                const size_t bytes = c->record.piece[k].bytes;
                char *x = row_at(c, p->cache_h, p->write[n], k);
                for (size_t j = 0; j < bytes; j++)
                    x[j] = (char)noise((uint32_t)step * 31 + (uint32_t)n, j + (size_t)k * 1000);
                if (m == p->at.me)
                    device_well(&p->at,
                                p->at.ops->upload(p->at.device, TR_LANE_MAIN,
                                                  row_at(c, layer_d, p->write[n], k), x, bytes));
            }
}

static void compare(place *p, const cache *c, const char *layer_d, int step)
{
    device_well(&p->at,
                p->at.ops->download(p->at.device, TR_LANE_MAIN, p->got_h, layer_d, c->layer_bytes));
    settle(&p->at, NULL);
    for (size_t i = 0; i < c->layer_bytes; i++)
        if (p->got_h[i] != p->cache_h[i])
            fail_msg("step %d, member %d: byte %zu of %zu is %02x, not %02x", step, p->at.me, i,
                     c->layer_bytes, p->got_h[i] & 0xff, p->cache_h[i] & 0xff);
}

static void begin(cache *c, char *layer_d)
{
    const tr_rows rows = {.n_max = 1};
    tr_push push;
    tr_err err = {0};

    well(tr_share_begin(c->share, &rows, layer_d, &push, &err), &err);
    assert_int_equal(push.n_peers, 0);
    well(tr_share_sent(c->share, TR_LANE_MAIN, &err), &err);
}

static void end(cache *c)
{
    tr_await await;
    tr_err err = {0};

    well(tr_share_ready(c->share, TR_LANE_MAIN, &await, &err), &err);
    assert_int_equal(await.n, 0);
}

/* ---- bits ------------------------------------------------------------------------------------------------------------------ */

static void steps(place *p, const tr_record *r, int n_steps)
{
    cache c;
    tr_err err = {0};

    open_cache(p, &c, r);
    for (int layer = 0; layer < LAYERS; layer++) {
        char *layer_d = c.memory + (size_t)layer * c.layer_bytes;
        memset(p->cache_h, 0, c.layer_bytes);
        for (int i = layer; i < n_steps; i += LAYERS) {
            choose_rows(p, r, i);
            well(tr_share_plan(c.share, p->n_rows, p->write, &err), &err);
            dawdle(p, i, 0);
            make_rows(p, &c, layer_d, i);
            begin(&c, layer_d);
            end(&c);
            dawdle(p, i,
                   1); /* the others may be at their next rows, and must not write them here */
            compare(p, &c, layer_d, i);
        }
    }
    close_cache(p, &c);
}

static const tr_kv_layer real = {
    .dtype = TR_E4M3, .n_pages = PAGES, .d_latent = 512, .d_rope = 64, .d_index = 128};

static void test_records(void **state)
{
    place *p = *state;
    const tr_kv_layer wide = {
        .dtype = TR_BF16, .n_pages = PAGES, .d_latent = 512, .d_rope = 64, .d_index = 128};
    const tr_kv_layer small = {
        .dtype = TR_BF16, .n_pages = PAGES, .d_latent = 20, .d_rope = 2, .d_index = 2};
    const tr_record records[] = {
        tr_record_latent(&real),
        tr_record_index(&real),
        tr_record_latent(&wide),
        tr_record_latent(&small),
        tr_record_index(&small),
        {.page_bytes = 64 * 3 + 1, .n_rows = 512, .n_pieces = 1, .piece = {{.at = 1, .bytes = 3}}}};

    for (size_t i = 0; i < sizeof records / sizeof *records; i++)
        steps(p, &records[i], 12);
}

static void test_late(void **state)
{
    const tr_record r = tr_record_latent(&real);

    steps(*state, &r, STEPS);
}

/* Keys and latents under way together, as in a layer; recorded and run again where there are graphs. */
static void test_two(void **state)
{
    place *p = *state;
    const bool graphs = (p->at.ops->caps & TR_CAP_GRAPH) != 0;
    const tr_record records[] = {tr_record_index(&real), tr_record_latent(&real)};
    cache c[2];
    tr_graph *graph = NULL;
    tr_err err = {0};

    for (int k = 0; k < 2; k++)
        open_cache(p, &c[k], &records[k]);
    choose_rows(p, &records[0], 3);
    for (int i = 0; i < 50; i++) {
        for (int k = 0; k < 2; k++) {
            if (!graph) well(tr_share_plan(c[k].share, p->n_rows, p->write, &err), &err);
            make_rows(p, &c[k], c[k].memory, 2 * i + k);
        }
        dawdle(p, i, 2);
        if (graphs && !graph) {
            device_well(&p->at, p->at.ops->graph_begin(p->at.device, TR_LANE_MAIN));
            tr_comm_set_mode(p->gpu, TR_COMM_RECORD);
        }
        for (int k = 0; k < 2 && !graph; k++)
            begin(&c[k], c[k].memory);
        for (int k = 0; k < 2 && !graph; k++)
            end(&c[k]);
        if (graphs && !graph) {
            tr_comm_set_mode(p->gpu, TR_COMM_RUN);
            device_well(&p->at, p->at.ops->graph_end(p->at.device, TR_LANE_MAIN, &graph));
        }
        if (graph) device_well(&p->at, p->at.ops->graph_run(p->at.device, TR_LANE_MAIN, graph));
        dawdle(p, i, 3);
        for (int k = 0; k < 2; k++) {
            memset(p->cache_h, 0, c[k].layer_bytes);
            make_rows(p, &c[k], c[k].memory, 2 * i + k); /* the same again: what is expected */
            compare(p, &c[k], c[k].memory, i);
        }
    }
    settle(&p->at, NULL);
    if (graph) p->at.ops->graph_free(p->at.device, graph);
    for (int k = 0; k < 2; k++)
        close_cache(p, &c[k]);
}

/* ---- gathers and all-to-alls into memory that is reached --------------------------------------------------------------- */

enum { SWAP_MOST = 60000 }; /* bytes of a pair */

/* What a member gives another one in a step: nothing, a few bytes, or whole lines. */
static size_t swap_bytes(int step, int from, int to)
{
    const uint32_t h = noise((uint32_t)(from * 8 + to), (size_t)step);
    const size_t n = h / 4 % SWAP_MOST;
    return h % 4 == 0 ? 0 : h % 4 == 1 ? n % 40 : n / 16 * 16;
}

static char swap_byte(int step, int from, int to, size_t i)
{
    return (char)noise((uint32_t)(step * 64 + from * 8 + to), i);
}

/* All-to-alls in even steps, in odd ones gathers, which give all the same. */
static void swap(place *p, int step, char *send_d, char *memory)
{
    const bool gathers = step % 2;
    const int n = p->at.size, me = p->at.me;
    char *recv = memory + (size_t)(step % 7) * 16 + (step % 5 == 4);
    size_t n_send[RANKS_MAX], n_recv[RANKS_MAX], at = 0;
    tr_err err = {0};
    tr_ticket t;

    for (int m = 0; m < n; m++) {
        n_send[m] = swap_bytes(step, me, gathers ? 0 : m);
        n_recv[m] = swap_bytes(step, m, gathers ? 0 : me);
        for (size_t i = 0; i < n_send[m] && (!gathers || m == 0); i++)
            p->cache_h[at++] = swap_byte(step, me, m, i);
    }
    up(&p->at, send_d, p->cache_h, at ? at : 1);
    dawdle(p, step, 0);
    if (gathers)
        well(tr_comm_all_gather(p->gpu, send_d, recv, n_recv, &t, &err), &err);
    else
        well(tr_comm_all_to_all(p->gpu, send_d, n_send, recv, n_recv, &t, &err), &err);
    dawdle(p, step, 1);
    well(tr_comm_wait(p->gpu, TR_LANE_MAIN, t, &err), &err);
    down(&p->at, p->got_h, recv, MOST / 2, NULL);
    at = 0;
    for (int m = 0; m < n; m++)
        for (size_t i = 0; i < n_recv[m]; i++, at++)
            if (p->got_h[at] != swap_byte(step, m, gathers ? 0 : me, i))
                fail_msg("step %d, member %d: byte %zu of member %d is wrong", step, me, i, m);
}

static void test_swap(void **state)
{
    place *p = *state;
    char *send_d, *memory;
    tr_err err = {0};

    device_well(&p->at, p->at.ops->alloc(p->at.device, MOST, TR_MEMORY_DEVICE, (void **)&send_d));
    device_well(&p->at,
                p->at.ops->alloc(p->at.device, MOST, TR_MEMORY_SYMMETRIC, (void **)&memory));
    well(tr_comm_reach(p->gpu, memory, MOST, &err), &err);
    assert_int_equal(tr_nccl_reaches(p->gpu, memory), p->reached);
    for (int step = 0; step < STEPS; step++)
        swap(p, step, send_d, memory);
    tr_comm_leave_alone(p->gpu, memory);
    meet(p);
    p->at.ops->release(p->at.device, memory);
    p->at.ops->release(p->at.device, send_d);
}

/* ---- refusals ----------------------------------------------------------------------------------------------------------- */

/* Memory that is not alike is not reached, nor any where that is switched off; rows travel all the same. */
static void test_not_alike(void **state)
{
    place *p = *state;
    const tr_record r = tr_record_latent(&real);
    cache c = {.record = r, .layer_bytes = r.page_bytes * PAGES};
    tr_err err = {0};
    char *memory;

    device_well(&p->at,
                p->at.ops->alloc(p->at.device, MOST, TR_MEMORY_SYMMETRIC, (void **)&memory));
    for (int use = 0; use < 3; use++) {
        static const tr_peer_use uses[] = {TR_PEER_AUTO, TR_PEER_OFF, TR_PEER_ON};
        const size_t less = uses[use] == TR_PEER_OFF || p->at.me ? 0 : 64;
        char why[256];
        const bool fails = uses[use] == TR_PEER_ON && !p->reached;
        assert_int_equal(tr_nccl_push(p->gpu, uses[use], why, sizeof why, &err),
                         fails ? TR_E_USAGE : TR_OK);
        assert_int_equal(!why[0], p->reached && uses[use] != TR_PEER_OFF);
        well(tr_share_open_record(&c.share, p->gpu, &r, ROWS, &err), &err);
        const tr_status st = tr_share_reach(c.share, memory, MOST - less, &err);
        assert_int_equal(st, uses[use] == TR_PEER_ON ? TR_E_USAGE : TR_OK);
        assert_false(tr_nccl_reaches(p->gpu, memory));
        memset(p->cache_h, 0, c.layer_bytes);
        device_well(&p->at, p->at.ops->upload(p->at.device, TR_LANE_MAIN, memory, p->cache_h,
                                              c.layer_bytes));
        choose_rows(p, &r, 8 + use);
        well(tr_share_plan(c.share, p->n_rows, p->write, &err), &err);
        make_rows(p, &c, memory, use);
        begin(&c, memory);
        end(&c);
        compare(p, &c, memory, use);
        assert_int_equal(tr_share_reach(c.share, memory, MOST, &err), TR_E_COMM); /* twice */
        tr_share_close(c.share);
    }
    char why[256];
    well(tr_nccl_push(p->gpu, TR_PEER_AUTO, why, sizeof why, &err), &err);
    meet(p);
    p->at.ops->release(p->at.device, memory);
}

/* What does not arrive as it was is found out once, on the fake device: a later try, which might pass, is not made. */
static void test_damaged(void **state)
{
    place *p = *state;
    const tr_record r = tr_record_latent(&real);
    tr_comm *gpu;
    tr_share *share;
    tr_err err = {0};
    char why[256], *memory;

    if (!p->reached) return;
    device_well(&p->at,
                p->at.ops->alloc(p->at.device, MOST, TR_MEMORY_SYMMETRIC, (void **)&memory));
    well(tr_nccl_comm(&gpu, p->at.nccl, p->at.host, 0, &err), &err);
    assert_int_equal(setenv("FAKE_PEERS", "damaged", 1), 0);
    well(tr_nccl_push(gpu, TR_PEER_AUTO, why, sizeof why, &err), &err);
    assert_int_equal(unsetenv("FAKE_PEERS"), 0);
    assert_int_equal(!!why[0], TR_ON_FAKE);
    well(tr_share_open_record(&share, gpu, &r, ROWS, &err), &err);
    well(tr_share_reach(share, memory, MOST, &err), &err);
    assert_int_equal(tr_nccl_reaches(gpu, memory), !why[0]);
    tr_share_close(share);
    meet(p);
    tr_comm_free(gpu);
    p->at.ops->release(p->at.device, memory);
}

/* ---- a kernel that waits for ever leaves when the job is given up -------------------------------------------------------- */

static void *give_up(void *ctx)
{
    const place *p = ctx;

    nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
    p->at.world.guard->abort(p->at.world.guard->ctx);
    return NULL;
}

/* The last test: nothing can be sent after it. */
static void test_abort(void **state)
{
    place *p = *state;
    const tr_record r = tr_record_latent(&real);
    cache c;
    tr_err err = {0};
    pthread_t thread;

    if (!p->reached) return;
    open_cache(p, &c, &r);
    for (int m = 0; m < p->at.size; m++)
        p->n_rows[m] = 1;
    for (int m = 0; m < p->at.size; m++)
        p->write[m] = m;
    well(tr_share_plan(c.share, p->n_rows, p->write, &err), &err);
    settle(&p->at, NULL);
    if (p->at.me != 0) return; /* they do not come */
    const uint64_t from_ns = tr_now_ns();
    assert_int_equal(pthread_create(&thread, NULL, give_up, p), 0);
    begin(&c, c.memory);
    end(&c);
    settle(&p->at, NULL);
    assert_true(tr_now_ns() - from_ns > 200000000);
    assert_int_equal(pthread_join(thread, NULL), 0);
}

/* ---- the program -------------------------------------------------------------------------------------------------------- */

static tr_status open_place(void *place_, tr_err *err)
{
    place *p = place_;
    tr_status st = tr_nccl_comm(&p->gpu, p->at.nccl, p->at.host, 0, err);

    p->reached = !getenv("FAKE_PEERS");
    p->cache_h = malloc(MOST);
    p->got_h = malloc(MOST);
    return st == TR_OK && (!p->cache_h || !p->got_h) ? tr_fail(err, TR_E_MEMORY, "out of memory")
                                                     : st;
}

int main(void)
{
    place p = {.gpu = NULL};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_records, &p),   cmocka_unit_test_prestate(test_late, &p),
        cmocka_unit_test_prestate(test_two, &p),       cmocka_unit_test_prestate(test_swap, &p),
        cmocka_unit_test_prestate(test_not_alike, &p), cmocka_unit_test_prestate(test_damaged, &p),
        cmocka_unit_test_prestate(test_abort, &p),
    };
    const int how = device_rank_begin(&p, "test_comm_push", RANKS_MAX, open_place);

    if (how >= 0) return how;
    device_rank_leave(cmocka_run_group_tests(tests, NULL, NULL));
    free(p.cache_h); /* what follows an abort is the end: communicators stay as they are */
    free(p.got_h);
    tr_world_finish(TR_OK);
    return 0;
}
