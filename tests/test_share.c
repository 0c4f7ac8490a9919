/* Shares: rows that each member writes a part of are in every member's cache afterwards, where they belong, and nothing
 * else has changed. Alone: over the loop-back, one thread per rank. tests/test_comm_ranks.sh starts it over MPI too. */
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

#include <cmocka.h>

#include "loopback.h"
#include "mpi/comm_mpi.h"

/* CMocka's asserts belong to the main thread: a rank says what was wrong by a line number, 0 if nothing. */
#define CHECK(x)                                                                                   \
    do {                                                                                           \
        if (!(x)) return __LINE__;                                                                 \
    } while (0)

enum { MAX_RANKS = 16, N_PAGES = 5, ROWS_MAX = 96, N_LAYERS = 3, N_STEPS = 12 };

typedef struct step { /* the same on all members */
    int n_rows[MAX_RANKS];
    int64_t write_row[ROWS_MAX];
    int n;
} step;

static uint32_t next(uint32_t *random)
{
    *random = *random * 1664525u + 1013904223u;
    return *random >> 8;
}

/* Distinct rows of the cache, some pads, in parts of random size: some members get none, in some steps nobody gets any. */
static step make_step(uint32_t *random, int size)
{
    step s = {.n = 0};
    int64_t order[N_PAGES * TR_PAGE_TOKENS];
    const int n_order = N_PAGES * TR_PAGE_TOKENS;

    for (int i = 0; i < n_order; i++)
        order[i] = i;
    for (int i = n_order - 1; i > 0; i--) {
        const int j = (int)(next(random) % (unsigned)(i + 1));
        const int64_t kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
    const bool empty = next(random) % 6 == 0;
    for (int m = 0; m < size; m++) {
        const int n = empty || next(random) % 4 == 0 ? 0 : (int)(next(random) % (ROWS_MAX / 4));
        if (n > ROWS_MAX - s.n) continue;
        s.n_rows[m] = n;
        for (int i = 0; i < n; i++, s.n++)
            s.write_row[s.n] = next(random) % 8 == 0 ? -1 : order[s.n];
    }
    return s;
}

/* Byte b of a row: of all rows of all steps and layers different ones. */
static unsigned char content(int64_t row, int layer, int turn, size_t b)
{
    return (unsigned char)(((uint64_t)row * 131 + (uint64_t)layer * 57 + (uint64_t)turn * 29 + b) %
                           251);
}

static void write_row(unsigned char *cache, const tr_record *r, int64_t row, int layer, int turn)
{
    size_t b = 0;
    for (int p = 0; p < r->n_pieces; p++)
        for (size_t k = 0; k < r->piece[p].bytes; k++)
            cache[(size_t)(row / TR_PAGE_TOKENS) * r->page_bytes + r->piece[p].at +
                  (size_t)(row % TR_PAGE_TOKENS) * r->piece[p].bytes + k] =
                content(row, layer, turn, b++);
}

typedef struct half { /* keys or latents */
    tr_share *share;
    tr_record record;
    unsigned char *cache[N_LAYERS], *want[N_LAYERS];
    size_t bytes;
} half;

static int open_half(half *h, tr_comm *c, tr_record record)
{
    tr_err err = {0};

    h->record = record;
    h->bytes = record.page_bytes * N_PAGES;
    CHECK(tr_share_open_record(&h->share, c, &record, ROWS_MAX, &err) == TR_OK);
    for (int l = 0; l < N_LAYERS; l++) {
        h->cache[l] = calloc(1, h->bytes);
        h->want[l] = calloc(1, h->bytes);
        CHECK(h->cache[l] && h->want[l]);
    }
    return 0;
}

static void close_half(half *h)
{
    tr_share_close(h->share);
    for (int l = 0; l < N_LAYERS; l++) {
        free(h->cache[l]);
        free(h->want[l]);
    }
}

/* This member's rows into its cache, as the writing kernel does; all rows into what is wanted. */
static void write_layer(half *h, const step *s, int layer, int turn, int me, int size)
{
    int i = 0;
    for (int m = 0; m < size; m++)
        for (int end = i + s->n_rows[m]; i < end; i++) {
            if (s->write_row[i] < 0) continue;
            if (m == me) write_row(h->cache[layer], &h->record, s->write_row[i], layer, turn);
            write_row(h->want[layer], &h->record, s->write_row[i], layer, turn);
        }
}

/* Keys and latents of every layer, both in flight, ready in the order of their readers. */
static int run_step(tr_comm *c, half *key, half *latent, const step *s, int turn)
{
    const int me = tr_comm_rank(c), size = tr_comm_size(c);
    const tr_rows rows = {.n_max = ROWS_MAX};
    tr_push push = {.n_peers = 1};
    tr_await await = {.n = 1};
    tr_err err = {0};
    half *const both[] = {key, latent};

    for (int i = 0; i < 2; i++)
        CHECK(tr_share_plan(both[i]->share, s->n_rows, s->write_row, &err) == TR_OK);
    for (int l = 0; l < N_LAYERS; l++) {
        for (int i = 0; i < 2; i++) {
            half *h = both[i];
            CHECK(tr_share_begin(h->share, &rows, h->cache[l], &push, &err) == TR_OK);
            CHECK(push.n_peers == 0);
            write_layer(h, s, l, turn, me, size);
            CHECK(tr_share_sent(h->share, TR_LANE_MAIN, &err) == TR_OK);
        }
        tr_comm_progress(c);
        for (int i = 0; i < 2; i++) {
            half *h = both[i];
            CHECK(tr_share_ready(h->share, TR_LANE_MAIN, &await, &err) == TR_OK);
            CHECK(await.n == 0);
            CHECK(memcmp(h->cache[l], h->want[l], h->bytes) == 0);
        }
    }
    return 0;
}

static int run_kind(tr_comm *c, tr_dtype dtype)
{
    const tr_kv_layer kv = {
        .dtype = dtype, .n_pages = N_PAGES, .d_latent = 130, .d_rope = 8, .d_index = 24};
    half key = {0}, latent = {0};
    uint32_t random = 11;
    int line;

    if ((line = open_half(&key, c, tr_record_index(&kv)))) return line;
    if ((line = open_half(&latent, c, tr_record_latent(&kv)))) return line;
    CHECK(latent.bytes == tr_kv_row_bytes(dtype, 130, 8) * TR_PAGE_TOKENS * N_PAGES);
    CHECK(key.bytes == tr_index_page_bytes(dtype, 24) * N_PAGES);
    for (int turn = 0; turn < N_STEPS; turn++) {
        const step s = make_step(&random, tr_comm_size(c));
        if ((line = run_step(c, &key, &latent, &s, turn))) return line;
    }
    close_half(&key);
    close_half(&latent);
    return 0;
}

/* An empty step sends nothing at all. */
static int run_nothing(tr_comm *c)
{
    const tr_rows rows = {.n_max = 4};
    const int n_rows[MAX_RANKS] = {1};
    const int64_t pad = -1;
    tr_share *s;
    tr_push push;
    tr_await await;
    tr_err err = {0};
    uint64_t before, after, bytes;

    CHECK(tr_share_open(&s, c, 16, 4, &err) == TR_OK);
    CHECK(tr_share_plan(s, n_rows, &pad, &err) == TR_OK);
    tr_comm_counts(c, TR_COMM_ALL_GATHER, &before, &bytes);
    CHECK(tr_share_begin(s, &rows, &bytes, &push, &err) == TR_OK);
    CHECK(tr_share_sent(s, TR_LANE_MAIN, &err) == TR_OK);
    CHECK(tr_share_ready(s, TR_LANE_MAIN, &await, &err) == TR_OK);
    tr_comm_counts(c, TR_COMM_ALL_GATHER, &after, &bytes);
    CHECK(after == before);
    tr_share_close(s);
    return 0;
}

/* Rows that are kept: every member has its own, nothing is sent, and the phases are what they are. */
static int run_kept(tr_comm *c)
{
    const tr_rows rows = {.n_max = 4};
    const int64_t all[MAX_RANKS] = {0, 1, 2, 3};
    const int size = tr_comm_size(c), me = tr_comm_rank(c);
    char cache[64 * 4] = {0};
    int n_rows[MAX_RANKS];
    tr_share *s;
    tr_push push;
    tr_await await;
    tr_err err = {0};
    uint64_t before, after, bytes;

    for (int m = 0; m < size; m++)
        n_rows[m] = m < 4;
    CHECK(tr_share_open(&s, c, 4, 4, &err) == TR_OK);
    tr_share_keep(s);
    tr_comm_counts(c, TR_COMM_ALL_GATHER, &before, &bytes);
    for (int turn = 0; turn < 2; turn++) {
        CHECK(tr_share_plan(s, n_rows, all, &err) == TR_OK);
        CHECK(tr_share_ready(s, TR_LANE_MAIN, &await, &err) == TR_E_COMM);
        CHECK(tr_share_begin(s, &rows, cache, &push, &err) == TR_OK);
        if (me < 4) memset(cache + me * 4, me + 1, 4);
        CHECK(tr_share_sent(s, TR_LANE_MAIN, &err) == TR_OK);
        CHECK(tr_share_ready(s, TR_LANE_MAIN, &await, &err) == TR_OK && await.n == 0);
    }
    tr_comm_counts(c, TR_COMM_ALL_GATHER, &after, &bytes);
    CHECK(after == before && tr_share_costs(s).calls == 0);
    for (int m = 0; m < 4; m++)
        CHECK(cache[m * 4] == (m == me ? m + 1 : 0));
    tr_share_close(s);
    return 0;
}

/* What is wrong is said before anything is sent. */
static int run_wrong(tr_comm *c)
{
    const tr_rows rows = {.n_max = 4}, many = {.n_max = 9};
    const int few[MAX_RANKS] = {4, 4}, more[MAX_RANKS] = {4, 5}, less[MAX_RANKS] = {4, -1};
    const int64_t good[9] = {0, 1, 2, 3, 4, 5, 6, 127, -1}, high[9] = {0, 1, 2, 3, 4, 5, 6, 128},
                  low[9] = {0, 1, 2, 3, 4, 5, 6, -2};
    const tr_record record = {
        .page_bytes = 64 * 8, .n_rows = 128, .n_pieces = 2, .piece = {{0, 4}, {256, 4}}};
    tr_record bad[5];
    tr_share *s;
    tr_push push;
    tr_await await;
    tr_err err = {0};
    char cache[2 * 64 * 8] = {0};

    for (int i = 0; i < 5; i++)
        bad[i] = record;
    bad[0].page_bytes--;
    bad[1].n_pieces = 3;
    bad[2].piece[1].at = SIZE_MAX - 8;
    bad[3].piece[0].bytes = 0;
    bad[4].piece[0].bytes = SIZE_MAX / 8;
    for (int i = 0; i < 5; i++)
        CHECK(tr_share_open_record(&s, c, &bad[i], 8, &err) == TR_E_COMM && !s);
    CHECK(tr_share_open_record(&s, c, &record, 0, &err) == TR_E_COMM);
    CHECK(tr_share_open_record(&s, c, &record, 8, &err) == TR_OK);
    CHECK(tr_share_begin(s, &rows, cache, &push, &err) == TR_E_COMM); /* no plan */
    CHECK(tr_share_plan(s, more, good, &err) == TR_E_COMM);
    CHECK(tr_share_plan(s, less, good, &err) == TR_E_COMM);
    CHECK(tr_share_plan(s, few, high, &err) == TR_E_COMM);
    CHECK(tr_share_plan(s, few, low, &err) == TR_E_COMM);
    CHECK(tr_share_begin(s, &rows, cache, &push, &err) == TR_E_COMM); /* still none */
    CHECK(tr_share_plan(s, few, good, &err) == TR_OK);
    CHECK(tr_share_begin(s, &many, cache, &push, &err) == TR_E_COMM);
    CHECK(tr_share_begin(s, &rows, cache, &push, &err) == TR_OK);
    CHECK(tr_share_plan(s, few, good, &err) == TR_E_COMM);
    CHECK(tr_share_ready(s, TR_LANE_MAIN, &await, &err) == TR_E_COMM);
    CHECK(tr_share_sent(s, TR_LANE_MAIN, &err) == TR_OK);
    CHECK(tr_share_ready(s, TR_LANE_MAIN, &await, &err) == TR_OK);
    tr_share_close(s);
    return 0;
}

static int run_all(tr_comm *c)
{
    static const tr_dtype kinds[] = {TR_E4M3, TR_BF16, TR_F32};
    int line;

    for (int i = 0; i < 3; i++)
        if ((line = run_kind(c, kinds[i]))) return line;
    if ((line = run_nothing(c))) return line;
    if ((line = run_kept(c))) return line;
    return run_wrong(c);
}

/* ---- over the loop-back, and over MPI ---------------------------------------------------------------------------- */

typedef struct rank {
    tr_comm *comm;
    int line;
} rank;

static void *run_rank(void *arg)
{
    rank *r = arg;
    r->line = run_all(r->comm);
    return NULL;
}

static void test_loopback(void **state)
{
    (void)state;
    for (int size = 2; size <= 4; size++) {
        tr_loopback *l = tr_loopback_create(size);
        pthread_t thread[4];
        rank r[4];

        assert_non_null(l);
        for (int i = 0; i < size; i++) {
            r[i] = (rank){.comm = tr_loopback_comm(l, i)};
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
}

static void test_mpi(void **state)
{
    tr_world *w = *state;
    tr_comm *c;
    tr_err err = {0};

    if (tr_comm_split(&c, w, 0, w->rank, "attn_cp", &err) != TR_OK) fail_msg("%s", err.text);
    const int line = run_all(c);
    if (line) fail_msg("rank %d of %d: line %d", w->rank, w->size, line);
    tr_comm_free(c);
}

int main(void)
{
    tr_world world;
    tr_err err = {0};
    const struct CMUnitTest alone[] = {cmocka_unit_test(test_loopback)};
    const struct CMUnitTest together[] = {cmocka_unit_test_prestate(test_mpi, &world)};

    if (tr_world_start(&world, &err) != TR_OK) {
        fprintf(stderr, "test_share: %s\n", err.text);
        return 1;
    }
    int n_failed = world.size == 1 ? cmocka_run_group_tests(alone, NULL, NULL)
                                   : cmocka_run_group_tests(together, NULL, NULL);
    if (n_failed && world.size > 1) tr_world_abort(TR_E_COMM);
    tr_world_finish(TR_OK);
    return n_failed ? 1 : 0;
}
