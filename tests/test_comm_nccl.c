/* Communicators over NCCL, against those over MPI: the same calls with the same data give the same bytes. Runs on 2 or more
 * ranks with a GPU each (tests/run_gpus.sh starts it), and linked with a fake device as tests/test_comm_on_fake
 * (tests/test_fake_nccl.sh). Alone, or where a rank finds no GPU, there is nothing to test (77). */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/number.h"
#include "tests/device_rank.h"

enum { RANKS_MAX = 16, MOST = 6 << 20 };

typedef struct place { /* one rank's */
    device_rank at;
    tr_comm *gpu, *terms,
        *other;      /* the last two: sums of terms; another communicator of the same members */
    char *a, *b, *c; /* [MOST] host memory */
    char *da, *db;   /* [MOST] the device's */
} place;

static void await(tr_comm *c, tr_ticket t)
{
    tr_err err = {0};
    well(tr_comm_wait(c, TR_LANE_MAIN, t, &err), &err);
}

/* Of both signs and of very different sizes: every order of summation gives another sum. */
static float term(int member, size_t k)
{
    const uint32_t h = noise((uint32_t)member, k);
    return ((float)(h & 0xffff) - 32768.0f) * (h & 0x10000 ? 1e-4f : h & 0x20000 ? 1.0f : 1e4f);
}

static uint16_t term16(int member, size_t k)
{
    return tr_f32_to_bf16(term(member, k));
}

static void fill_bytes(char *x, size_t n, int member)
{
    for (size_t k = 0; k < n; k++)
        x[k] = (char)noise((uint32_t)member, k);
}

static void same(const char *what, const void *got, const void *want, size_t n)
{
    const unsigned char *x = got, *y = want;
    for (size_t i = 0; i < n; i++)
        if (x[i] != y[i]) fail_msg("%s: byte %zu of %zu is %02x, not %02x", what, i, n, x[i], y[i]);
}

/* ---- sums ------------------------------------------------------------------------------------------------------------ */

/* A sum of terms goes in one round up to 256 KiB of others' terms; windows are of 32 MiB of them. */
static const size_t sum_sizes[] = {0, 1, 5, 1023, 16384, 65536, 65537, 100003, 1000003};
enum { N_SUMS = sizeof sum_sizes / sizeof *sum_sizes };

static void sum_f32(place *p, tr_comm *c)
{
    tr_err err = {0};
    tr_ticket t;

    for (int s = 0; s < N_SUMS; s++) {
        const size_t n = sum_sizes[s];
        float *x = (float *)(void *)p->a;
        for (size_t k = 0; k < n; k++)
            x[k] = term(p->at.me, k);
        up(&p->at, p->da, x, n * 4);
        well(tr_comm_all_reduce(c, p->da, n, TR_F32, &t, &err), &err);
        await(c, t);
        down(&p->at, p->b, p->da, n * 4, p->gpu);
        well(tr_comm_all_reduce(p->at.host, x, n, TR_F32, &t, &err), &err);
        await(p->at.host, t);
        same("all_reduce f32", p->b, x, n * 4);
    }
}

static void sum_bf16(place *p, tr_comm *c)
{
    tr_err err = {0};
    tr_ticket t;

    for (int s = 0; s < N_SUMS; s++) {
        const size_t n = sum_sizes[s];
        uint16_t *x = (uint16_t *)(void *)p->a, *y = (uint16_t *)(void *)p->b;
        for (size_t k = 0; k < n; k++)
            x[k] = term16(p->at.me, k);
        up(&p->at, p->da, x, n * 2);
        well(tr_comm_all_reduce(c, p->da, n, TR_BF16, &t, &err), &err);
        await(c, t);
        down(&p->at, y, p->da, n * 2, p->gpu);
        for (size_t k = 0; k < n; k++) {
            float sum = tr_bf16_to_f32(term16(0, k));
            for (int m = 1; m < p->at.size; m++)
                sum += tr_bf16_to_f32(term16(m, k));
            if (y[k] != tr_f32_to_bf16(sum))
                fail_msg("bf16, n %zu: element %zu: %04x, not %04x", n, k, y[k],
                         tr_f32_to_bf16(sum));
        }
    }
}

static void test_sums(void **state)
{
    place *p = *state;
    sum_f32(p, p->gpu);
    sum_f32(p, p->terms);
    sum_bf16(p, p->gpu);
    sum_bf16(p, p->terms);
}

static void scatter(place *p, tr_comm *c, size_t n, bool in_place)
{
    float *x = (float *)(void *)p->a, *y = (float *)(void *)p->b;
    const size_t all = n * (size_t)p->at.size, mine = (size_t)p->at.me * n * 4;
    tr_err err = {0};
    tr_ticket t;

    for (size_t k = 0; k < all; k++)
        x[k] = term(p->at.me, k);
    up(&p->at, p->da, x, all * 4);
    char *out = in_place ? p->da + mine : p->db;
    well(tr_comm_reduce_scatter(c, p->da, out, n, TR_F32, &t, &err), &err);
    await(c, t);
    down(&p->at, p->c, out, n * 4, p->gpu);
    well(tr_comm_reduce_scatter(p->at.host, x, y, n, TR_F32, &t, &err), &err);
    await(p->at.host, t);
    same("reduce_scatter", p->c, y, n * 4);
}

static void test_scatter(void **state)
{
    place *p = *state;
    static const size_t n[] = {0, 1, 77, 20001};
    for (size_t i = 0; i < sizeof n / sizeof *n; i++)
        for (int in_place = 0; in_place < 2; in_place++) {
            scatter(p, p->gpu, n[i], in_place);
            scatter(p, p->terms, n[i], in_place);
        }
}

static void test_max(void **state)
{
    place *p = *state;
    static const size_t sizes[] = {0, 1, 129, 4096};
    uint64_t *x = (uint64_t *)(void *)p->a;
    tr_err err = {0};
    tr_ticket t;

    for (size_t s = 0; s < 4; s++) {
        const size_t n = sizes[s];
        for (size_t k = 0; k < n; k++) /* above the sign bit too: all ones is one of the keys */
            x[k] = k % 7 == 0 && p->at.me == (int)(k % (size_t)p->at.size)
                       ? UINT64_MAX
                       : (uint64_t)noise(p->at.me, k) << (k % 33);
        up(&p->at, p->da, x, n * 8);
        well(tr_comm_all_max_u64(p->gpu, (uint64_t *)(void *)p->da, n, &t, &err), &err);
        await(p->gpu, t);
        down(&p->at, p->b, p->da, n * 8, p->gpu);
        well(tr_comm_all_max_u64(p->at.host, x, n, &t, &err), &err);
        await(p->at.host, t);
        same("all_max", p->b, x, n * 8);
    }
}

/* ---- moves ------------------------------------------------------------------------------------------------------------- */

/* What member i gives to j in round r: even, uneven, much, nothing. */
static size_t bytes_of(int r, int i, int j)
{
    if (r == 0) return 4096;
    if (r == 1) return (size_t)(i + 1) * 1001 + (size_t)j * 3;
    if (r == 2) return i == 0 ? 0 : 333;
    if (r == 3) return i == j ? 7 : 0;
    if (r == 4) return j == 0 ? 100000 : 0;
    return r == 5 ? 0 : noise(r * RANKS_MAX + i, (size_t)j) % 30011;
}
enum { ROUNDS = 12 };

static void test_gather(void **state)
{
    place *p = *state;
    size_t bytes[RANKS_MAX];
    tr_err err = {0};
    tr_ticket t;

    for (int r = 0; r < 2 * ROUNDS; r++) {
        size_t all = 0, before = 0;
        for (int i = 0; i < p->at.size; i++) {
            if (i == p->at.me) before = all;
            bytes[i] = bytes_of(r / 2, i, 0);
            all += bytes[i];
        }
        const size_t mine = bytes[p->at.me];
        const bool in_place = r % 2;
        fill_bytes(p->a, mine, p->at.me + r);
        memset(p->b, 0, all);
        up(&p->at, p->db, p->b, all);
        char *from = in_place ? p->db + before : p->da;
        up(&p->at, from, p->a, mine);
        well(tr_comm_all_gather(p->gpu, from, p->db, bytes, &t, &err), &err);
        await(p->gpu, t);
        down(&p->at, p->c, p->db, all, p->gpu);
        well(tr_comm_all_gather(p->at.host, p->a, p->b, bytes, &t, &err), &err);
        await(p->at.host, t);
        same("all_gather", p->c, p->b, all);
    }
}

static void test_exchange(void **state)
{
    place *p = *state;
    size_t out[RANKS_MAX], in[RANKS_MAX];
    tr_err err = {0};
    tr_ticket t;

    for (int r = 0; r < ROUNDS; r++) {
        size_t n_out = 0, n_in = 0;
        for (int i = 0; i < p->at.size; i++) {
            n_out += out[i] = bytes_of(r, p->at.me, i);
            n_in += in[i] = bytes_of(r, i, p->at.me);
        }
        fill_bytes(p->a, n_out, p->at.me + r);
        up(&p->at, p->da, p->a, n_out);
        well(tr_comm_all_to_all(p->gpu, p->da, out, p->db, in, &t, &err), &err);
        await(p->gpu, t);
        down(&p->at, p->c, p->db, n_in, p->gpu);
        well(tr_comm_all_to_all(p->at.host, p->a, out, p->b, in, &t, &err), &err);
        await(p->at.host, t);
        same("all_to_all", p->c, p->b, n_in);
    }
}

/* From each member to the next: the even ones send first. */
static void test_letters(void **state)
{
    place *p = *state;
    static const size_t sizes[] = {0, 1, 28672, 1 << 20};
    const int to = (p->at.me + 1) % p->at.size, from = (p->at.me + p->at.size - 1) % p->at.size;
    tr_err err = {0};
    tr_ticket sent = {0}, got = {0};

    for (size_t s = 0; s < 4; s++) {
        const size_t n = sizes[s];
        fill_bytes(p->a, n, p->at.me);
        fill_bytes(p->b, n, from);
        up(&p->at, p->da, p->a, n);
        for (int turn = 0; turn < 2; turn++)
            if (turn == p->at.me % 2)
                well(tr_comm_send(p->gpu, to, p->da, n, &sent, &err), &err);
            else
                well(tr_comm_recv(p->gpu, from, p->db, n, &got, &err), &err);
        await(p->gpu, got);
        await(p->gpu, sent);
        down(&p->at, p->c, p->db, n, p->gpu);
        same("send, recv", p->c, p->b, n);
    }
}

static void test_broadcast(void **state)
{
    place *p = *state;
    tr_err err = {0};
    tr_ticket t;

    for (int root = 0; root < p->at.size; root++)
        for (size_t n = 0; n < 70000; n = n * 7 + 1) {
            fill_bytes(p->a, n, p->at.me);
            fill_bytes(p->b, n, root);
            up(&p->at, p->da, p->a, n);
            well(tr_comm_broadcast(p->gpu, root, p->da, n, &t, &err), &err);
            await(p->gpu, t);
            down(&p->at, p->c, p->da, n, p->gpu);
            same("broadcast", p->c, p->b, n);
        }
}

/* ---- order ----------------------------------------------------------------------------------------------------------------- */

/* Many under way on two communicators, waited for the last ones first; more than the host follows. */
static void test_in_flight(void **state)
{
    place *p = *state;
    enum { N = 300, EACH = 64 };
    tr_ticket t[N];
    size_t bytes[RANKS_MAX];
    tr_err err = {0};

    for (int i = 0; i < p->at.size; i++)
        bytes[i] = EACH;
    const size_t all = EACH * (size_t)p->at.size;
    fill_bytes(p->a, N * EACH, p->at.me);
    up(&p->at, p->da, p->a, N * EACH);
    for (int i = 0; i < N; i++)
        well(tr_comm_all_gather(i % 2 ? p->gpu : p->other, p->da + (size_t)i * EACH,
                                p->db + (size_t)i * all, bytes, &t[i], &err),
             &err);
    for (int i = N; i-- > 0;)
        await(i % 2 ? p->gpu : p->other, t[i]);
    await(p->gpu, t[N - 1]); /* once more */
    down(&p->at, p->c, p->db, N * all, p->gpu);
    for (int m = 0; m < p->at.size; m++) {
        fill_bytes(p->b, N * EACH, m);
        for (size_t i = 0; i < N; i++)
            same("in flight", p->c + i * all + (size_t)m * EACH, p->b + i * EACH, EACH);
    }
}

/* What goes to the main lane after an operation was begun does not reach it, what went before does. */
static void test_begins_behind(void **state)
{
    place *p = *state;
    enum { N = 1 << 20 };
    tr_err err = {0};
    tr_ticket t;

    for (int round = 0; round < 5; round++) {
        fill_bytes(p->a, N, round);
        up(&p->at, p->da, p->a, N);
        well(tr_comm_broadcast(p->gpu, 0, p->da, N, &t, &err), &err);
        await(p->gpu, t);
        memset(p->c, 0, N);
        up(&p->at, p->da, p->c, N);
        up(&p->at, p->db, p->a, N);
        down(&p->at, p->b, p->da, N, p->gpu);
        same("written behind", p->b, p->c, N);
    }
}

static void test_modes(void **state)
{
    place *p = *state;
    enum { N = 4096 };
    float *x = (float *)(void *)p->a;
    uint64_t before, after, bytes;
    tr_err err = {0};
    tr_ticket t;

    for (size_t k = 0; k < N; k++)
        x[k] = term(p->at.me, k);
    up(&p->at, p->da, x, N * 4);
    tr_comm_counts(p->gpu, TR_COMM_ALL_REDUCE, &before, &bytes);
    tr_comm_set_mode(p->gpu, TR_COMM_NOTE);
    well(tr_comm_all_reduce(p->gpu, p->da, N, TR_F32, &t, &err), &err);
    await(p->gpu, t);
    tr_comm_set_mode(p->gpu, TR_COMM_RUN);
    tr_comm_counts(p->gpu, TR_COMM_ALL_REDUCE, &after, &bytes);
    assert_int_equal(after, before + 1);
    down(&p->at, p->b, p->da, N * 4, p->gpu);
    same("noted", p->b, x, N * 4);
    if (!(p->at.ops->caps & TR_CAP_GRAPH)) return;

    tr_graph *graph = NULL;
    well(tr_comm_all_reduce(p->gpu, p->da, N, TR_F32, &t, &err), &err); /* connections are made */
    await(p->gpu, t);
    assert_int_equal(p->at.ops->graph_begin(p->at.device, TR_LANE_MAIN), TR_OK);
    tr_comm_set_mode(p->gpu, TR_COMM_RECORD);
    well(tr_comm_all_reduce(p->gpu, p->da, N, TR_F32, &t, &err), &err);
    await(p->gpu, t);
    tr_comm_set_mode(p->gpu, TR_COMM_RUN);
    assert_int_equal(p->at.ops->graph_end(p->at.device, TR_LANE_MAIN, &graph), TR_OK);
    for (int i = 0; i < 3; i++) {
        up(&p->at, p->da, x, N * 4);
        assert_int_equal(p->at.ops->graph_run(p->at.device, TR_LANE_MAIN, graph), TR_OK);
        down(&p->at, p->b, p->da, N * 4, p->gpu);
        memcpy(p->c, x, N * 4);
        well(tr_comm_all_reduce(p->at.host, p->c, N, TR_F32, &t, &err), &err);
        await(p->at.host, t);
        same("recorded", p->b, p->c, N * 4);
    }
    p->at.ops->graph_free(p->at.device, graph);
}

/* ---- shares ------------------------------------------------------------------------------------------------------------------ */

typedef struct shares {
    tr_share *host, *gpu;
    size_t cache_bytes;
    int n_rows[RANKS_MAX];
    int64_t write[256];
} shares;

/* Each member writes its rows into its own caches, host and device alike. */
static void share_once(place *p, shares *s, const tr_record *r, int round)
{
    tr_rows rows = {.n_max = 1};
    tr_push push;
    tr_await ready;
    tr_err err = {0};
    int n = 0, first = 0;

    for (int m = 0; m < p->at.size; m++) {
        if (m == p->at.me) first = n;
        s->n_rows[m] = round == 3 ? 0 : (int)(noise(m, (size_t)round) % 9);
        for (int i = 0; i < s->n_rows[m]; i++, n++) /* every page once in a while, some rows pads */
            s->write[n] = n % 5 == 4 ? -1 : (n * 37 + round) % (int)r->n_rows;
    }
    memset(p->a, 0, s->cache_bytes);
    for (int i = first; i < first + s->n_rows[p->at.me]; i++)
        for (int k = 0; k < r->n_pieces && s->write[i] >= 0; k++) {
            const size_t row = (size_t)s->write[i], b = r->piece[k].bytes;
            char *at = p->a + row / TR_PAGE_TOKENS * r->page_bytes + r->piece[k].at +
                       row % TR_PAGE_TOKENS * b;
            fill_bytes(at, b, i + 7 * round + k);
        }
    up(&p->at, p->da, p->a, s->cache_bytes);
    well(tr_share_plan(s->gpu, s->n_rows, s->write, &err), &err);
    well(tr_share_begin(s->gpu, &rows, p->da, &push, &err), &err);
    well(tr_share_sent(s->gpu, TR_LANE_MAIN, &err), &err);
    well(tr_share_ready(s->gpu, TR_LANE_MAIN, &ready, &err), &err);
    down(&p->at, p->b, p->da, s->cache_bytes, p->gpu);
    well(tr_share_plan(s->host, s->n_rows, s->write, &err), &err);
    well(tr_share_begin(s->host, &rows, p->a, &push, &err), &err);
    well(tr_share_sent(s->host, TR_LANE_MAIN, &err), &err);
    well(tr_share_ready(s->host, TR_LANE_MAIN, &ready, &err), &err);
    same("share", p->b, p->a, s->cache_bytes);
}

static void test_shares(void **state)
{
    place *p = *state;
    const tr_kv_layer kv = {
        .dtype = TR_E4M3, .n_pages = 8, .d_latent = 512, .d_rope = 64, .d_index = 128};
    const tr_kv_layer small = {
        .dtype = TR_BF16, .n_pages = 8, .d_latent = 20, .d_rope = 2, .d_index = 2};
    const tr_record records[] = {
        tr_record_latent(&kv),
        tr_record_index(&kv),
        tr_record_latent(&small),
        tr_record_index(&small),
        {.page_bytes = 64 * 3 + 1, .n_rows = 512, .n_pieces = 1, .piece = {{.at = 1, .bytes = 3}}}};
    tr_err err = {0};

    for (size_t i = 0; i < sizeof records / sizeof *records; i++) {
        const tr_record *r = &records[i];
        shares s = {.cache_bytes = r->page_bytes * 8};
        well(tr_share_open_record(&s.host, p->at.host, r, 256, &err), &err);
        well(tr_share_open_record(&s.gpu, p->gpu, r, 256, &err), &err);
        for (int round = 0; round < 6; round++)
            share_once(p, &s, r, round);
        assert_int_equal(tr_share_costs(s.gpu).bytes, tr_share_costs(s.host).bytes);
        assert_int_equal(tr_share_costs(s.gpu).calls, tr_share_costs(s.host).calls);
        tr_share_close(s.host);
        tr_share_close(s.gpu);
    }
}

/* ---- accounts and refusals ---------------------------------------------------------------------------------------------------- */

static void test_accounts(void **state)
{
    place *p = *state;
    uint64_t calls, bytes, host_calls, host_bytes;
    tr_err err = {0};
    tr_ticket t;
    float x = 1;

    /* all_to_all: as many calls as the host's, and as many bytes. */
    tr_comm_counts(p->gpu, TR_COMM_ALL_TO_ALL, &calls, &bytes);
    tr_comm_counts(p->at.host, TR_COMM_ALL_TO_ALL, &host_calls, &host_bytes);
    assert_int_equal(calls, host_calls);
    assert_int_equal(bytes, host_bytes);
    assert_true(calls > 0 && bytes > 0);
    for (int i = 0; i < 1000000 && !tr_comm_flown_ns(p->gpu, TR_COMM_ALL_TO_ALL); i++)
        tr_comm_progress(p->gpu); /* looks now and then */
    assert_true(tr_comm_flown_ns(p->gpu, TR_COMM_ALL_TO_ALL) > 0);
    assert_ptr_equal(tr_comm_host(p->gpu), p->at.host);
    assert_ptr_equal(tr_comm_host(p->at.host), p->at.host);
    assert_ptr_equal(tr_comm_device(p->gpu), p->at.device);
    assert_null(tr_comm_device(p->at.host));
    assert_string_equal(tr_comm_name(p->gpu), tr_comm_name(p->at.host));
    /* The host adds no bf16, nobody adds bytes. */
    assert_int_equal(tr_comm_all_reduce(p->at.host, &x, 1, TR_BF16, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_all_reduce(p->gpu, p->da, 1, TR_U8, &t, &err), TR_E_COMM);
    assert_int_equal(tr_comm_send(p->gpu, p->at.me, p->da, 1, &t, &err), TR_E_COMM);
    t.n = UINT64_MAX;
    assert_int_equal(tr_comm_wait(p->gpu, TR_LANE_MAIN, t, &err), TR_E_COMM);
    char text[64];
    assert_int_equal(p->at.world.guard->failed(p->at.world.guard->ctx, text, sizeof text), 0);
}

/* Of the others every one is counted once, those of other hosts as such. */
static void test_ways(void **state)
{
    place *p = *state;
    tr_bound all[RANKS_MAX] = {{.host = ""}};
    const int n = p->at.world.size, me = p->at.world.rank;
    int others = 0;

    for (int i = 0; i < n; i++) {
        snprintf(all[i].host, sizeof all[i].host, "%s",
                 i == n - 1 && me != i ? "elsewhere" : "here");
        snprintf(all[i].pci, sizeof all[i].pci, "%s", tr_device_pci(p->at.device));
    }
    tr_nccl_ways(p->at.nccl, all, n, me);
    for (int i = 0; i < TR_N_WAYS; i++)
        others += all[me].peers[i];
    assert_int_equal(others, n - 1);
    assert_int_equal(all[me].peers[TR_WAY_NET], me != n - 1);
    setenv("NCCL_P2P_DISABLE", "1", 1);
    tr_nccl_ways(p->at.nccl, all, n, me);
    assert_int_equal(all[me].peers[TR_WAY_SHM], n - 1 - (me != n - 1));
    setenv("NCCL_SHM_DISABLE", "1", 1);
    tr_nccl_ways(p->at.nccl, all, n, me);
    assert_int_equal(all[me].peers[TR_WAY_NET], n - 1);
    unsetenv("NCCL_P2P_DISABLE");
    unsetenv("NCCL_SHM_DISABLE");
}

/* NCCL's own log: beside OUT where nobody said otherwise. */
static void test_log(void **state)
{
    tr_err err;

    (void)state;
    unsetenv("NCCL_DEBUG_FILE");
    unsetenv("NCCL_DEBUG");
    assert_int_equal(tr_nccl_log_beside("out.jsonl", &err), TR_OK);
    assert_null(getenv("NCCL_DEBUG_FILE"));
    setenv("NCCL_DEBUG", "WARN", 1);
    assert_int_equal(tr_nccl_log_beside(NULL, &err), TR_OK);
    assert_null(getenv("NCCL_DEBUG_FILE"));
    assert_int_equal(tr_nccl_log_beside("a/100%/out.jsonl", &err), TR_OK);
    assert_string_equal(getenv("NCCL_DEBUG_FILE"), "a/100%%/out.jsonl.nccl.%h.%p");
    assert_int_equal(tr_nccl_log_beside("other", &err), TR_OK); /* it is said already */
    assert_string_equal(getenv("NCCL_DEBUG_FILE"), "a/100%%/out.jsonl.nccl.%h.%p");
    unsetenv("NCCL_DEBUG_FILE");
    unsetenv("NCCL_DEBUG");
}

/* ---- the program ---------------------------------------------------------------------------------------------------------------- */

static tr_status open_place(void *place_, tr_err *err)
{
    place *p = place_;
    const device_rank *at = &p->at;
    tr_status st = tr_nccl_comm(&p->gpu, at->nccl, at->host, 0, err);

    if (st == TR_OK) st = tr_nccl_comm(&p->terms, at->nccl, at->host, TR_NCCL_TERMS, err);
    if (st == TR_OK) st = tr_nccl_comm(&p->other, at->nccl, at->host, 0, err);
    p->a = malloc(MOST);
    p->b = malloc(MOST);
    p->c = malloc(MOST);
    if (st == TR_OK && (!p->a || !p->b || !p->c)) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    if (st == TR_OK) st = at->ops->alloc(at->device, MOST, TR_MEMORY_DEVICE, (void **)&p->da);
    if (st == TR_OK) st = at->ops->alloc(at->device, MOST, TR_MEMORY_DEVICE, (void **)&p->db);
    return st;
}

static void close_place(place *p)
{
    tr_comm_free(p->other);
    tr_comm_free(p->terms);
    tr_comm_free(p->gpu);
    p->at.ops->release(p->at.device, p->da);
    p->at.ops->release(p->at.device, p->db);
    device_rank_close(&p->at);
    free(p->a);
    free(p->b);
    free(p->c);
}

int main(void)
{
    place p = {.gpu = NULL};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_sums, &p),
        cmocka_unit_test_prestate(test_scatter, &p),
        cmocka_unit_test_prestate(test_max, &p),
        cmocka_unit_test_prestate(test_gather, &p),
        cmocka_unit_test_prestate(test_exchange, &p),
        cmocka_unit_test_prestate(test_letters, &p),
        cmocka_unit_test_prestate(test_broadcast, &p),
        cmocka_unit_test_prestate(test_in_flight, &p),
        cmocka_unit_test_prestate(test_begins_behind, &p),
        cmocka_unit_test_prestate(test_modes, &p),
        cmocka_unit_test_prestate(test_shares, &p),
        cmocka_unit_test_prestate(test_accounts, &p),
        cmocka_unit_test_prestate(test_ways, &p),
        cmocka_unit_test_prestate(test_log, &p),
    };
    const int how = device_rank_begin(&p, "test_comm_nccl", RANKS_MAX, open_place);

    if (how >= 0) return how;
    device_rank_leave(cmocka_run_group_tests(tests, NULL, NULL));
    close_place(&p);
    tr_world_finish(TR_OK);
    return 0;
}
