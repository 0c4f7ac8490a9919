/* What the watchdog's default timeout goes by. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>

#include "engine/expect.h"

static void test_sizes(void **state)
{
    tr_expect x = {{0}};
    (void)state;
    assert_float_equal(tr_expect_step(&x, 512), 0, 0);
    tr_expect_seen(&x, 0, 0); /* a clock that stood still says nothing */
    tr_expect_seen(&x, 4, -1);
    tr_expect_seen(&x, 4, NAN);
    assert_float_equal(tr_expect_step(&x, 4), 0, 0);
    tr_expect_seen(&x, 600, 3);
    for (int n = 512; n < 1024; n++)
        assert_float_equal(tr_expect_step(&x, n), 3, 0);
    assert_float_equal(tr_expect_step(&x, 1), 3, 0);  /* a smaller one takes no longer */
    assert_true(tr_expect_step(&x, 4800) >= 3.0 * 8); /* a larger one by the row */
    assert_true(tr_expect_step(&x, 4800) <= 3.0 * 8 * 2.01);
    tr_expect_seen(&x, 0, 0.25);
    assert_float_equal(tr_expect_step(&x, 1), 0.25, 0);
    assert_float_equal(tr_expect_step(&x, 2), 3, 0);
    assert_true(isfinite(tr_expect_step(&x, INT64_MAX)));
    assert_true(tr_expect_step(&x, INT64_MIN) > 0);
}

/* The mean follows; one step that was held up for an hour does not turn the watchdog off. */
static void test_mean(void **state)
{
    tr_expect x = {{0}};
    (void)state;
    for (int i = 0; i < 100; i++)
        tr_expect_seen(&x, 32, 0.5);
    tr_expect_seen(&x, 32, 3600);
    assert_true(tr_expect_step(&x, 32) < 1);
    for (int i = 0; i < 100; i++)
        tr_expect_seen(&x, 32, 20);
    assert_float_equal(tr_expect_step(&x, 32), 20, 0.1);
    for (int i = 0; i < 100; i++)
        tr_expect_seen(&x, 32, 1);
    assert_float_equal(tr_expect_step(&x, 32), 1, 0.1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_mean),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
