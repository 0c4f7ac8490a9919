/* The layout of context parallelism: the examples of parallel.md 3.1 and 3.2, and by brute force over many steps that every
 * token has exactly one owner and row, that what is gathered goes back into order, and that nobody has more rows than m. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/layout.h"

enum { SPANS_MAX = 8, TOKENS_MAX = 2048, RANKS_MAX = 16, ROWS_MAX = 4096 };

static tr_layout_span split(int32_t n)
{
    return (tr_layout_span){.n = n};
}

static tr_layout_span decode(int32_t n)
{
    return (tr_layout_span){.n = n, .decode = true};
}

static void assert_tokens(const tr_layout *l, int rank, const int32_t *want, int n)
{
    int32_t token[ROWS_MAX];
    assert_int_equal(tr_layout_rows(l), n);
    tr_layout_tokens(l, rank, token);
    for (int i = 0; i < n; i++)
        if (token[i] != want[i])
            fail_msg("rank %d row %d: %d instead of %d", rank, i, token[i], want[i]);
}

static void zigzag_example(void **state)
{
    (void)state;
    static const int32_t want[4][5] = {
        {0, 1, 2, 17, 18}, {3, 4, 5, 15, 16}, {6, 7, 8, 13, 14}, {9, 10, 11, 12, -1}};
    static const int32_t starts[8] = {0, 3, 6, 9, 11, 13, 15, 17};
    tr_layout_span span[1] = {split(19)};
    tr_layout_query q;
    tr_layout l;
    tr_layout_make(&l, TR_CP_ZIGZAG, 4, span, 1);
    assert_true(l.split);
    assert_int_equal(l.m, 5);
    for (int c = 0; c < 4; c++) {
        assert_tokens(&l, c, want[c], 5);
        assert_int_equal(tr_layout_count(&l, c), c == 3 ? 4 : 5);
        assert_int_equal(tr_layout_queries(&l, c, &q), 1);
        assert_int_equal(q.x_first, starts[c]);
        assert_int_equal(q.x_second, starts[7 - c]);
        assert_int_equal(q.n_first, (q.n + 1) / 2); /* the early part is the larger half */
    }
}

static void interleave_example(void **state)
{
    (void)state;
    /* Tokens 0..4 are request 0, 5..7 request 1. */
    static const int32_t want[4][2] = {{0, 4}, {1, 5}, {2, 6}, {3, 7}};
    static const int first_of_second[4] = {-1, 0, 1, 2}; /* x of request 1's row */
    static const int prefix[2] = {10, 0}, base[2] = {0, 15};
    tr_layout_span span[2] = {split(5), split(3)};
    tr_layout_query q[2];
    tr_layout l;
    tr_layout_make(&l, TR_CP_INTERLEAVE, 4, span, 2);
    assert_int_equal(l.m, 2);
    for (int c = 0; c < 4; c++) {
        assert_tokens(&l, c, want[c], 2);
        int n = tr_layout_queries(&l, c, q);
        assert_int_equal(n, c == 0 ? 1 : 2); /* request 1 is absent on rank 0 */
        assert_int_equal(q[0].span, 0);
        assert_int_equal(q[0].x_first, c);
        assert_int_equal(q[0].n, c == 0 ? 2 : 1);
        if (n == 2) assert_int_equal(q[1].x_first, first_of_second[c]);
    }
    /* Key ranges of rank 1 (3.3): [kbase, kbase + p + x + 1). */
    tr_layout_queries(&l, 1, q);
    for (int i = 0; i < 2; i++) {
        int r = q[i].span, end = base[r] + prefix[r] + q[i].x_first + 1;
        assert_int_equal(base[r], i ? 15 : 0);
        assert_int_equal(end, i ? 16 : 12);
    }
}

/* The put-back formulas of 3.4, written down once more: gathered row c*m + j. */
static int32_t formula(const tr_layout *l, int c, int32_t j)
{
    int C = l->n_ranks;
    if (l->mode == TR_CP_INTERLEAVE) {
        int32_t g = j * C + c;
        if (g >= l->n_split) return -1;
        for (int i = 0; i < l->n_spans; i++) {
            if (l->span[i].decode) continue;
            if (g < l->span[i].n) return l->span[i].begin + g;
            g -= l->span[i].n;
        }
        return -1;
    }
    for (int i = 0; i < l->n_spans; i++) {
        const tr_layout_span *s = &l->span[i];
        if (s->decode) continue;
        int32_t m = (s->n + C - 1) / C, q = s->n / (2 * C), rest = s->n % (2 * C);
        if (j >= m) {
            j -= m;
            continue;
        }
        int b = 2 * C - 1 - c;
        int32_t len = q + (c < rest), late = q + (b < rest);
        int32_t start = c * q + (c < rest ? c : rest), start_late = b * q + (b < rest ? b : rest);
        if (j >= len + late) return -1;
        return s->begin + (j < len ? start + j : start_late + j - len);
    }
    return -1;
}

/* Rows of a rank, as the queries list them. */
static void check_queries(const tr_layout *l, int c, const int32_t *token)
{
    tr_layout_query q[SPANS_MAX];
    int32_t seen = 0;
    int n = tr_layout_queries(l, c, q), before = -1;
    for (int i = 0; i < n; i++) {
        const tr_layout_span *s = &l->span[q[i].span];
        assert_true(q[i].n > 0 && q[i].span > before);
        before = q[i].span;
        for (int32_t k = 0; k < q[i].n; k++) {
            int32_t x = k < q[i].n_first ? q[i].x_first + k * q[i].stride
                                         : q[i].x_second + (k - q[i].n_first);
            assert_int_equal(token[q[i].row + k], s->begin + x);
        }
        seen += q[i].n;
    }
    assert_int_equal(seen, tr_layout_count(l, c) + l->n_whole);
}

static void check_layout(const tr_layout *l)
{
    int owners[TOKENS_MAX] = {0};
    static int32_t token[ROWS_MAX], back[ROWS_MAX * RANKS_MAX];
    int32_t n_split = 0;

    assert_true(l->n_tokens <= TOKENS_MAX);
    assert_int_equal(l->n_split + l->n_whole, l->n_tokens);
    tr_layout_put_back(l, back);
    for (int c = 0; c < l->n_ranks; c++) {
        int32_t live = 0;
        tr_layout_tokens(l, c, token);
        for (int32_t row = 0; row < tr_layout_rows(l); row++) {
            assert_int_equal(tr_layout_token(l, c, row), token[row]);
            if (row < l->m) {
                assert_int_equal(back[(int64_t)c * l->m + row], token[row]);
                assert_int_equal(formula(l, c, row), token[row]);
            }
            if (token[row] == TR_LAYOUT_PAD) {
                assert_true(row < l->m);
                continue;
            }
            assert_in_range(token[row], 0, l->n_tokens - 1);
            assert_int_equal(tr_layout_row(l, token[row]), row);
            assert_int_equal(tr_layout_owner(l, token[row]), row < l->m ? c : TR_LAYOUT_ALL);
            owners[token[row]]++;
            live += row < l->m;
        }
        assert_int_equal(live, tr_layout_count(l, c));
        assert_true(live <= l->m);
        n_split += live;
        check_queries(l, c, token);
    }
    assert_int_equal(n_split, l->n_split);
    for (int32_t g = 0; g < l->n_tokens; g++)
        assert_int_equal(owners[g], tr_layout_owner(l, g) == TR_LAYOUT_ALL ? l->n_ranks : 1);
}

/* How evenly: interleave within one row; zigzag within one row of every span, and its keys within what the remainder
 * rows of a span can see. */
static void check_balance(const tr_layout *l)
{
    int32_t most = 0, least = INT32_MAX;
    int n_split_spans = 0;
    for (int i = 0; i < l->n_spans; i++)
        n_split_spans += !l->span[i].decode && l->span[i].n > 0;
    for (int c = 0; c < l->n_ranks; c++) {
        int32_t n = tr_layout_count(l, c);
        most = n > most ? n : most;
        least = n < least ? n : least;
    }
    assert_true(most - least <= (l->mode == TR_CP_INTERLEAVE ? 1 : n_split_spans));
    if (l->mode == TR_CP_INTERLEAVE) assert_int_equal(l->m, most);
}

static void every_length(void **state)
{
    (void)state;
    for (int mode = 0; mode < 2; mode++)
        for (int C = 1; C <= RANKS_MAX; C++)
            for (int32_t n = 0; n <= 130; n++) {
                tr_layout_span span[1] = {split(n)};
                tr_layout l;
                tr_layout_make(&l, (tr_cp_mode)mode, C, span, 1);
                assert_int_equal(l.split,
                                 C > 1 && n > 0 && (mode == TR_CP_INTERLEAVE || n >= 2 * C));
                if (l.split) assert_int_equal(l.m, (n + C - 1) / C);
                check_layout(&l);
                if (l.split) check_balance(&l);
            }
}

static int32_t random_below(uint32_t *seed, int32_t n)
{
    *seed = *seed * 1664525u + 1013904223u;
    return (int32_t)((*seed >> 8) % (uint32_t)n);
}

static void many_steps(void **state)
{
    (void)state;
    uint32_t seed = 7;
    int n_split = 0, n_whole = 0;
    for (int k = 0; k < 3000; k++) {
        tr_layout_span span[SPANS_MAX];
        tr_layout l;
        int n = random_below(&seed, SPANS_MAX + 1), C = 1 + random_below(&seed, RANKS_MAX);
        for (int i = 0; i < n; i++) {
            int kind = random_below(&seed, 4);
            span[i] = kind == 0   ? decode(random_below(&seed, 3))
                      : kind == 1 ? split(random_below(&seed, 4))
                                  : split(2 * C + random_below(&seed, 100));
        }
        for (int mode = 0; mode < 2; mode++) {
            tr_layout_make(&l, (tr_cp_mode)mode, C, span, n);
            check_layout(&l);
            if (l.split) check_balance(&l);
            n_split += l.split;
            n_whole += !l.split;
        }
    }
    assert_true(n_split > 1000 && n_whole > 1000); /* both were tried */
}

/* One short prompt among long ones: zigzag computes the whole step everywhere, interleave splits it. */
static void short_prompts(void **state)
{
    (void)state;
    tr_layout_span span[3] = {split(100), split(7), decode(1)};
    tr_layout l;
    tr_layout_make(&l, TR_CP_ZIGZAG, 4, span, 3);
    assert_false(l.split);
    assert_int_equal(l.m, 0);
    assert_int_equal(l.n_whole, 108);
    tr_layout_make(&l, TR_CP_INTERLEAVE, 4, span, 3);
    assert_true(l.split);
    assert_int_equal(l.m, 27);
    assert_int_equal(l.n_whole, 1);
    assert_int_equal(tr_layout_rows(&l), 28);
    span[1].n = 8;
    tr_layout_make(&l, TR_CP_ZIGZAG, 4, span, 3);
    assert_true(l.split);
    assert_int_equal(l.m, 25 + 2);
    assert_int_equal(tr_layout_row(&l, 108), 27);
    assert_int_equal(tr_layout_owner(&l, 108), TR_LAYOUT_ALL);
}

/* Decode rows stand anywhere in the plan, are nobody's alone, and come last on every rank, in their order. */
static void decode_rows(void **state)
{
    (void)state;
    tr_layout_span only[2] = {decode(1), decode(1)};
    tr_layout_span mixed[5] = {decode(1), split(3), decode(1), split(1), decode(1)};
    tr_layout l;
    tr_layout_make(&l, TR_CP_INTERLEAVE, 8, only, 2);
    assert_false(l.split);
    assert_int_equal(tr_layout_rows(&l), 2);
    tr_layout_make(&l, TR_CP_INTERLEAVE, 2, mixed, 5);
    assert_int_equal(l.m, 2);
    assert_int_equal(l.n_whole, 3);
    static const int32_t rows[2][5] = {{1, 3, 0, 4, 6}, {2, 5, 0, 4, 6}};
    for (int c = 0; c < 2; c++)
        assert_tokens(&l, c, rows[c], 5);
    tr_layout_make(&l, TR_CP_INTERLEAVE, 2, NULL, 0);
    assert_int_equal(tr_layout_rows(&l), 0);
}

/* The sum of keys over a rank's rows: the same for all ranks but for what is left over (3.1); interleave is off by at most
 * one row's worth per row (3.2). */
static void keys_are_balanced(void **state)
{
    (void)state;
    static int32_t token[ROWS_MAX];
    for (int mode = 0; mode < 2; mode++)
        for (int C = 2; C <= 8; C *= 2) {
            tr_layout_span span[1] = {split(1600)};
            tr_layout l;
            int64_t most = 0, least = INT64_MAX;
            tr_layout_make(&l, (tr_cp_mode)mode, C, span, 1);
            for (int c = 0; c < C; c++) {
                int64_t keys = 0;
                tr_layout_tokens(&l, c, token);
                for (int32_t i = 0; i < l.m; i++)
                    keys += token[i] + 1;
                most = keys > most ? keys : most;
                least = keys < least ? keys : least;
            }
            if (mode == TR_CP_ZIGZAG)
                assert_int_equal(most, least);
            else
                assert_int_equal(most - least, l.m * (C - 1));
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(zigzag_example),    cmocka_unit_test(interleave_example),
        cmocka_unit_test(every_length),      cmocka_unit_test(many_steps),
        cmocka_unit_test(short_prompts),     cmocka_unit_test(decode_rows),
        cmocka_unit_test(keys_are_balanced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
