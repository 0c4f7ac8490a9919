/* The plan of prompts whose keys do not fit at once (kernels/cuda/dense_mha_plan.h): every span once, whole, where there is room;
 * lists that a window has room for; tiles in order round by round, however many rounds. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cuda/dense_mha_plan.h"

enum { SPANS_MOST = 20000, BLOCK = TR_DENSE_BLOCK_KEYS };

typedef struct tile {
    int64_t order;
    int round, keys; /* that its last row sees */
} tile;

typedef struct fixture {
    tr_dense_span span[SPANS_MOST];
    int window[SPANS_MOST]; /* that the span is in */
    tile tile[4 * SPANS_MOST];
    tr_dense_plan plan;
} fixture;

static int keys_of(const tr_dense_span *s)
{
    return (tr_dense_seen(s, s->n) + BLOCK - 1) / BLOCK * BLOCK;
}

static int tiles_of(const tr_dense_span *s)
{
    return (s->n + TR_DENSE_TILE_ROWS - 1) / TR_DENSE_TILE_ROWS;
}

static int by_order(const void *a, const void *b)
{
    const int64_t x = ((const tile *)a)->order, y = ((const tile *)b)->order;
    return (x > y) - (x < y);
}

/* Sorted as the device sorts them, the tiles of round r are those that the plan says, those that see most first. */
static void check_tiles(fixture *f, int n_spans, int n_rounds)
{
    int n = 0;

    for (int i = 0; i < n_spans; i++) {
        const tr_dense_span *s = &f->span[i];
        for (int k = 0; s->round >= 0 && k < tiles_of(s); k++) {
            const int last = (k + 1) * TR_DENSE_TILE_ROWS;
            assert_true(n < 4 * SPANS_MOST);
            assert_int_equal(s->i_tile + k, n);
            f->tile[n++] = (tile){.order = tr_dense_tile_order(s, k * TR_DENSE_TILE_ROWS),
                                  .round = s->round,
                                  .keys = tr_dense_seen(s, last < s->n ? last : s->n)};
        }
    }
    assert_int_equal(n, f->plan.tile_begin[n_rounds]);
    qsort(f->tile, (size_t)n, sizeof *f->tile, by_order);
    for (int r = 0, i = 0; r < n_rounds; r++) {
        assert_int_equal(i, f->plan.tile_begin[r]);
        for (; i < f->plan.tile_begin[r + 1]; i++) {
            assert_int_equal(f->tile[i].round, r);
            assert_true(i == f->plan.tile_begin[r] || f->tile[i].keys <= f->tile[i - 1].keys);
        }
    }
}

/* One window; *round, *used: where the spans so far have come to, of all rounds, and the keys in that one. */
static void check_window(fixture *f, int n_spans, int max_keys, int first, int n_rounds, int *round,
                         int *used)
{
    int n_blocks = 0;

    for (int i = 0; i < n_spans; i++) {
        const tr_dense_span *s = &f->span[i];
        if (s->round < 0) continue;
        assert_int_equal(f->window[i], -1); /* once */
        f->window[i] = first;
        if (first + s->round != *round) {
            assert_int_equal(first + s->round, *round + 1);
            assert_true(*used + keys_of(s) > max_keys); /* it would not have fitted */
            *round = first + s->round;
            *used = 0;
        }
        assert_int_equal(s->base, *used);
        *used += keys_of(s);
        assert_true(*used <= max_keys);
        assert_int_equal(s->i_block, n_blocks);
        n_blocks += keys_of(s) / BLOCK;
        assert_true(s->i_tile >= f->plan.tile_begin[s->round] &&
                    s->i_tile + tiles_of(s) <= f->plan.tile_begin[s->round + 1]);
        assert_true(s->i_block >= f->plan.block_begin[s->round] &&
                    n_blocks <= f->plan.block_begin[s->round + 1]);
    }
    assert_int_equal(n_blocks, f->plan.block_begin[n_rounds]);
    assert_true(n_blocks <= max_keys / BLOCK * TR_DENSE_ROUNDS); /* what is listed has its room */
    for (int r = 0; r < n_rounds; r++) /* a launch of a round has so many blocks */
        assert_true(f->plan.block_begin[r + 1] - f->plan.block_begin[r] <= max_keys / BLOCK);
    check_tiles(f, n_spans, n_rounds);
}

/* All windows that a launch would plan. Returns the rounds there were. */
static int check_all(fixture *f, int n_spans, int max_keys)
{
    int64_t all = 0;
    int longest = BLOCK, round = 0, used = 0;

    for (int i = 0; i < n_spans; i++) {
        const int keys = keys_of(&f->span[i]);
        all += keys;
        longest = keys > longest ? keys : longest;
        f->window[i] = -1;
    }
    const int64_t most = tr_dense_rounds_most(all, longest, max_keys);
    for (int first = 0; first < most; first += TR_DENSE_ROUNDS) {
        const int n = most - first < TR_DENSE_ROUNDS ? (int)most - first : TR_DENSE_ROUNDS;
        memset(&f->plan, 0xff, sizeof f->plan);
        tr_dense_plan_window(f->span, n_spans, max_keys, first, n, &f->plan);
        check_window(f, n_spans, max_keys, first, n, &round, &used);
    }
    for (int i = 0; i < n_spans; i++)
        assert_true(f->window[i] >= 0);
    assert_true(round < most);
    return round + 1;
}

static void fill(fixture *f, int n_spans, int position, int n)
{
    for (int i = 0; i < n_spans; i++)
        f->span[i] =
            (tr_dense_span){.row = i * n, .n = n, .position = position, .step = 1, .slot = i};
}

static void one_round_where_all_fit(void **state)
{
    fixture *f = *state;

    assert_int_equal(check_all(f, 0, BLOCK), 1);
    fill(f, 32, 0, 128);
    assert_int_equal(check_all(f, 32, 32 * 128), 1);
    assert_int_equal(check_all(f, 32, 31 * 128), 2);
}

/* Prompts of a common beginning, which is in the cache: 16 new rows of each at 2048 keys, two a round. */
static void many_rounds(void **state)
{
    fixture *f = *state;

    fill(f, 2600, 2032, 16);
    assert_int_equal(check_all(f, 256, 4096), 128);
    assert_int_equal(check_all(f, 258, 4096), 129); /* an order of 32 bits has none left for it */
    assert_int_equal(check_all(f, 1024, 4096), 512);
    assert_int_equal(check_all(f, 1025, 4096), 513); /* another window */
    assert_int_equal(check_all(f, 2049, 4096), 1025);
}

/* As many as a step of the largest size could have. */
static void rounds_of_one_span(void **state)
{
    fixture *f = *state;

    fill(f, 16384, 2047, 1);
    assert_int_equal(check_all(f, 16384, 2048), 16384);
}

/* The bound is of rounds that are left before they are full. */
static void rounds_left_early(void **state)
{
    fixture *f = *state;

    for (int i = 0; i < 3000; i++)
        f->span[i] = (tr_dense_span){.n = i % 2 ? 1 : 1920, .step = 1, .slot = i};
    assert_true(check_all(f, 3000, 2048) >= 1500);
    for (int i = 0; i < 3000; i++)
        f->span[i] = (tr_dense_span){.n = i % 2 ? 256 : 2048, .step = 1, .slot = i};
    assert_int_equal(check_all(f, 3000, 2048 + 128), 3000);
}

static void any_lengths(void **state)
{
    fixture *f = *state;
    uint64_t x = 7;

    for (int times = 0; times < 40; times++) {
        const int n = 1 + times * 79;
        for (int i = 0; i < n; i++) {
            x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            const int position = (int)(x >> 40) % 2048,
                      rows = 1 + (int)(x >> 50) % (2048 - position);
            const int step = times % 4 ? 1 : 1 << (times / 4 % 4); /* rows dealt out to members */
            f->span[i] = (tr_dense_span){.n = ((times % 3 ? rows : rows % 17) + step - 1) / step,
                                         .position = position,
                                         .step = step,
                                         .slot = i};
            if (f->span[i].n == 0) f->span[i].n = 1;
            if (tr_dense_seen(&f->span[i], f->span[i].n) > 2048) f->span[i].position = 0;
        }
        check_all(f, n, 2048 + times % 5 * 384);
    }
}

static int create(void **state)
{
    *state = calloc(1, sizeof(fixture));
    return *state ? 0 : -1;
}

static int destroy(void **state)
{
    free(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_round_where_all_fit),
        cmocka_unit_test(many_rounds),
        cmocka_unit_test(rounds_of_one_span),
        cmocka_unit_test(rounds_left_early),
        cmocka_unit_test(any_lengths),
    };
    return cmocka_run_group_tests(tests, create, destroy);
}
