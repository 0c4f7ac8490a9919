/* The page allocator: references, order, the delay of the ring, against a simple model. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/pages.h"
#include "kernels/kernels.h"

enum { N = 150 };

static void test_order_and_all_or_none(void **state)
{
    int32_t page[N + 1];
    tr_pages *p = tr_pages_create(N, 1, false);
    (void)state;

    assert_int_equal(tr_pages_take(p, N + 1, page), 0);
    assert_int_equal(tr_pages_available(p), N);
    assert_int_equal(tr_pages_take(p, 0, page), 1);
    assert_int_equal(tr_pages_take(p, N, page), 1);
    for (int i = 0; i < N; i++) /* lowest ids first */
        assert_int_equal(page[i], i);
    assert_int_equal(tr_pages_take(p, 1, page + N), 0);
    assert_int_equal(tr_pages_held(p), N);
    const int32_t back[] = {130, 3, 70};
    tr_pages_drop(p, back, 3, 5);
    tr_pages_step(p, 6);
    assert_int_equal(tr_pages_take(p, 2, page), 1);
    assert_int_equal(page[0], 3);
    assert_int_equal(page[1], 70);
    assert_int_equal(tr_pages_available(p), 1);
    tr_pages_free(p);
    tr_pages_free(NULL);
    assert_null(tr_pages_create(0, 1, false));
    assert_null(tr_pages_create(1, 0, false));
}

static void test_delay(void **state)
{
    (void)state;
    for (int ring = 1; ring <= 3; ring++) {
        int32_t page;
        tr_pages *p = tr_pages_create(1, ring, false);
        assert_int_equal(tr_pages_take(p, 1, &page), 1);
        tr_pages_drop(p, &page, 1, 10);
        for (uint64_t step = 10; step < 10 + (uint64_t)ring; step++) {
            tr_pages_step(p, step);
            assert_int_equal(tr_pages_available(p), 0);
            assert_int_equal(tr_pages_held(p), 0);
            assert_int_equal(tr_pages_take(p, 1, &page), 0);
        }
        tr_pages_step(p, 10 + (uint64_t)ring);
        assert_int_equal(tr_pages_available(p), 1);
        assert_int_equal(tr_pages_take(p, 1, &page), 1);
        tr_pages_free(p);
    }
}

static void test_sharing(void **state)
{
    int32_t page[4];
    tr_pages *p = tr_pages_create(4, 1, false);
    (void)state;

    tr_pages_take(p, 3, page);
    tr_pages_share(p, page, 2);
    tr_pages_share(p, page, 1);
    assert_int_equal(tr_pages_references(p, page[0]), 3);
    tr_pages_drop(p, page, 3, 1);
    tr_pages_step(p, 2);
    assert_int_equal(tr_pages_held(p), 2);
    assert_int_equal(tr_pages_available(p), 2);
    tr_pages_drop(p, page, 2, 2);
    tr_pages_step(p, 3);
    assert_int_equal(tr_pages_held(p), 1);
    tr_pages_drop(p, page, 1, 3);
    tr_pages_step(p, 4);
    assert_int_equal(tr_pages_held(p), 0);
    assert_int_equal(tr_pages_available(p), 4);
    assert_int_equal(tr_pages_total(p), 4);
    tr_pages_free(p);
}

/* Random work beside an array of counts and of the steps in which pages become free. */
static void test_against_model(void **state)
{
    uint32_t r = 99;
    int count[N] = {0};
    uint64_t free_from[N] = {0};
    (void)state;

    for (int ring = 1; ring <= 2; ring++) {
        tr_pages *p = tr_pages_create(N, ring, false);
        memset(count, 0, sizeof count);
        memset(free_from, 0, sizeof free_from);
        for (uint64_t step = 1; step < 20000; step++) {
            int held = 0, available = 0;
            tr_pages_step(p, step);
            for (int i = 0; i < N; i++) {
                held += count[i] > 0;
                available += !count[i] && free_from[i] <= step;
            }
            assert_int_equal(tr_pages_held(p), held);
            assert_int_equal(tr_pages_available(p), available);
            r = r * 1664525u + 1013904223u;
            int32_t page[8];
            int n = (int)(r >> 8) % 8;
            if (tr_pages_take(p, n, page)) {
                assert_true(n <= available);
                for (int i = 0; i < n; i++) {
                    assert_int_equal(count[page[i]], 0);
                    assert_true(free_from[page[i]] <= step);
                    count[page[i]] = 1;
                }
            } else {
                assert_true(n > available);
            }
            for (int i = 0; i < 12; i++) {
                r = r * 1664525u + 1013904223u;
                int32_t id = (int32_t)((r >> 8) % N);
                if (!count[id]) continue;
                if ((r >> 4) % 3 == 0) {
                    tr_pages_share(p, &id, 1);
                    count[id]++;
                } else {
                    tr_pages_drop(p, &id, 1, step);
                    if (!--count[id]) free_from[id] = step + (uint64_t)ring;
                }
                assert_int_equal(tr_pages_references(p, id), count[id]);
            }
        }
        tr_pages_free(p);
    }
}

/* ---- with the prefix index ------------------------------------------------------------------------------ */

static void test_index(void **state)
{
    int32_t token[3 * TR_PAGE_TOKENS], page[3], found[3], more[4];
    tr_pages *p = tr_pages_create(4, 2, true);
    (void)state;

    for (int i = 0; i < 3 * TR_PAGE_TOKENS; i++)
        token[i] = i;
    tr_pages_step(p, 1);
    assert_int_equal(tr_pages_match(p, token, 3, found), 0);
    assert_int_equal(tr_pages_take(p, 3, page), 1);
    assert_false(tr_pages_enter(p, page, 1, token + TR_PAGE_TOKENS)); /* not behind nothing */
    for (int i = 0; i < 2; i++)
        assert_true(tr_pages_enter(p, page, i, token + i * TR_PAGE_TOKENS));
    assert_true(tr_pages_enter(p, page, 1, token + TR_PAGE_TOKENS)); /* is in it already */
    tr_pages_drop(p, page, 3, 1);
    assert_int_equal(tr_pages_held(p), 0);
    assert_int_equal(tr_pages_idle(p), 2);
    assert_int_equal(tr_pages_aging(p), 1);
    assert_int_equal(tr_pages_match(p, token, 3, found), 2);
    assert_memory_equal(found, page, 2 * sizeof *page);
    assert_int_equal(tr_pages_match(p, token, 1, found), 1);

    /* Evicted while a step in flight may read it: as late as any other page. */
    tr_pages_step(p, 2);
    tr_pages_evict(p, 1);
    assert_int_equal(tr_pages_match(p, token, 3, found), 1); /* the leaf has left */
    assert_int_equal(tr_pages_aging(p), 2);
    assert_int_equal(tr_pages_available(p), 1);
    tr_pages_share(p, found, 1);
    assert_int_equal(tr_pages_references(p, found[0]), 1);
    tr_pages_evict(p, 9); /* nothing is idle */
    assert_int_equal(tr_pages_held(p), 1);
    tr_pages_step(p, 3);
    assert_int_equal(tr_pages_available(p), 3);
    tr_pages_drop(p, found, 1, 3);
    tr_pages_step(p, 5);
    tr_pages_evict(p, 1); /* long enough ago */
    assert_int_equal(tr_pages_take(p, 4, more), 1);

    /* Others came first with these tokens: nothing of the later run goes in, and nothing is lost. */
    for (int i = 0; i < 2; i++)
        assert_true(tr_pages_enter(p, more, i, token + i * TR_PAGE_TOKENS));
    assert_false(tr_pages_enter(p, more + 2, 0, token));
    assert_false(tr_pages_enter(p, more + 2, 1, token + TR_PAGE_TOKENS));
    tr_pages_distrust(p, more, 4);
    assert_int_equal(tr_pages_match(p, token, 2, found), 0);
    tr_pages_drop(p, more, 4, 6);
    assert_int_equal(tr_pages_idle(p), 2);
    tr_pages_evict(p, 2);
    tr_pages_step(p, 8);
    assert_int_equal(tr_pages_available(p), 4);
    tr_pages_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_and_all_or_none),
        cmocka_unit_test(test_delay),
        cmocka_unit_test(test_sharing),
        cmocka_unit_test(test_against_model),
        cmocka_unit_test(test_index),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
