/* --time-budget, SLURM_JOB_END_TIME and --shard as text. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "command/limit.h"

static void test_times(void **state)
{
    static const struct {
        const char *text;
        double seconds;
    } good[] = {
        {"0", 0},
        {"90", 90},
        {"3600", 3600},
        {"0:58", 58},
        {"59:30", 3570},
        {"90:00", 5400},
        {"1:02:03", 3723},
        {"12:00:00", 43200},
        {"00:00:01", 1},
        {"1-12", 129600},
        {"1-12:00", 129600},
        {"2-01:02:03", 176523},
        {"0-0:0:0", 0},
        {"UNLIMITED", -1},
        {"3660-00", 316224000},
        {"0-00:90", 5400},
        {"100:00:00", 360000},
    };
    static const char *const bad[] = {
        "",
        "soon",
        "-1",
        "1-",
        "-5:00",
        "1:",
        ":1",
        "1::2",
        "1.5",
        "1e3",
        " 5",
        "5 ",
        "1:2:3:4",
        "1-2-3",
        "1-2:3:4:5",
        "INVALID",
        "0x10",
        "+5",
        "99999999999999999999",
        "3661-00",
        "1-:5",
        "1:-2",
        "NOT_SET",
        "unlimited",
    };
    tr_err err;
    double seconds;
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        if (tr_limit_time(&seconds, good[i].text, &err) != TR_OK || seconds != good[i].seconds)
            fail_msg("%s: %g", good[i].text, seconds);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (tr_limit_time(&seconds, bad[i], &err) != TR_E_USAGE ||
            !strstr(err.text, "--time-budget"))
            fail_msg("\"%s\" is %g", bad[i], seconds);
}

static void test_slurm(void **state)
{
    bool odd;
    (void)state;
    assert_true(tr_limit_slurm(NULL, 1000, &odd) < 0 && !odd);
    assert_true(tr_limit_slurm("", 1000, &odd) < 0 && !odd);
    assert_true(tr_limit_slurm("1060", 1000, &odd) == 60 && !odd);
    assert_true(tr_limit_slurm("1000", 1000, &odd) < 0 && odd); /* over, and this job runs */
    assert_true(tr_limit_slurm("tomorrow", 1000, &odd) < 0 && odd);
    assert_true(tr_limit_slurm("4294967294", 1000, &odd) < 0 && odd); /* "no limit" */
    assert_true(tr_limit_slurm("99999999999999999999", 1000, &odd) < 0 && odd);
    assert_true(tr_limit_margin(10) == 2 && tr_limit_margin(200) == 10 &&
                tr_limit_margin(1e6) == 30 && tr_limit_margin(0) == 2);
}

/* What the array's variables say: five words, "-" for one that is not set. */
static const char *const *array_now;

static char *get(const char *name)
{
    static const char *const names[] = {"ID", "MIN", "MAX", "COUNT", "STEP"};
    for (int i = 0; i < 5; i++)
        if (!strcmp(name + strlen("SLURM_ARRAY_TASK_"), names[i]))
            return strcmp(array_now[i], "-") ? (char *)array_now[i] : NULL;
    return NULL;
}

static void test_shards(void **state)
{
    static const struct {
        const char *array[5];
        int i, n; /* n 0: refused */
    } arrays[] = {
        {{"0", "0", "3", "4", "1"}, 0, 4},
        {{"3", "0", "3", "4", "1"}, 3, 4},
        {{"5", "2", "9", "8", "-"}, 3, 8},
        {{"20", "0", "30", "4", "10"}, 2, 4},
        {{"7", "7", "7", "1", "1"}, 0, 1},
        {{"-", "0", "3", "4", "1"}, 0, 0},
        {{"1", "-", "3", "4", "1"}, 0, 0},
        {{"1", "0", "-", "4", "1"}, 0, 0},
        {{"1", "0", "3", "-", "1"}, 0, 0},
        {{"3", "1", "7", "3", "1"}, 0, 0}, /* 1,3,7 */
        {{"4", "0", "3", "4", "1"}, 0, 0},
        {{"0", "1", "3", "3", "1"}, 0, 0},
        {{"x", "0", "3", "4", "1"}, 0, 0},
        {{"1", "0", "3", "4", "0"}, 0, 0},
        {{"15", "0", "30", "4", "10"}, 0, 0},
        {{"-1", "0", "3", "4", "1"}, 0, 0},
        {{"1", "0", "999999999999", "1000000000000", "1"}, 0, 0},
    };
    static const char *const bad[] = {"",
                                      "1",
                                      "1/",
                                      "/2",
                                      "2/2",
                                      "3/2",
                                      "-1/2",
                                      "1/0",
                                      "0/0",
                                      "a/b",
                                      "1/2/",
                                      "1 /2",
                                      " 1/2",
                                      "AUTO",
                                      "1/2x",
                                      "0x0/2",
                                      "0/99999999999999999999",
                                      "0/16777217"};
    tr_input_shard s;
    tr_err err;
    (void)state;
    assert_int_equal(tr_limit_shard(&s, "0/1", get, &err), TR_OK);
    assert_true(s.i == 0 && s.n == 1);
    assert_int_equal(tr_limit_shard(&s, "15/16", get, &err), TR_OK);
    assert_true(s.i == 15 && s.n == 16);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (tr_limit_shard(&s, bad[i], get, &err) != TR_E_USAGE || !strstr(err.text, "--shard"))
            fail_msg("\"%s\" is a shard", bad[i]);
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        array_now = arrays[i].array;
        tr_status st = tr_limit_shard(&s, "auto", get, &err);
        if (arrays[i].n ? st != TR_OK || (int)s.i != arrays[i].i || (int)s.n != arrays[i].n
                        : st != TR_E_USAGE || !strstr(err.text, "--shard auto"))
            fail_msg("array %zu: %d", i, st);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_times),
        cmocka_unit_test(test_slurm),
        cmocka_unit_test(test_shards),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
