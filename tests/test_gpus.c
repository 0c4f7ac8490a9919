/* Whether several ranks take GPUs by themselves: from what each of them sees to the answer and its reason. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "command/gpus.h"

enum { N = 8 };

/* Rank i of two hosts with four ranks each, which see n GPUs. */
static void good(tr_gpu_sight r[N], int n)
{
    memset(r, 0, N * sizeof *r);
    for (int i = 0; i < N; i++) {
        snprintf(r[i].host, sizeof r[i].host, "node%d", i / 4);
        r[i].local_size = 4;
        r[i].gpu.n = n;
        if (tr_device_choose(n, i % 4, 4) >= 0)
            snprintf(r[i].gpu.uuid, sizeof r[i].gpu.uuid, "GPU-%d", i);
    }
}

static void not_used(const tr_gpu_sight *r, bool nccl, const char *wanted)
{
    char why[TR_GPUS_WHY] = "?";

    assert_false(tr_gpus_suffice(why, r, N, nccl));
    assert_string_equal(why, wanted);
}

static void test_used(void **state)
{
    tr_gpu_sight r[N];
    char why[TR_GPUS_WHY] = "?";

    (void)state;
    for (int n = 1; n <= 8; n++) { /* 1: the one that the launcher shows this rank */
        if (n == 2 || n == 3) continue;
        good(r, n);
        assert_true(tr_gpus_suffice(why, r, N, true));
        assert_string_equal(why, "");
    }
}

static void test_reasons(void **state)
{
    tr_gpu_sight r[N];

    (void)state;
    good(r, 0);
    not_used(r, true, ""); /* nobody sees any: nothing to be said */
    not_used(r, false, "");
    good(r, 4);
    not_used(r, false, "this build has no NCCL (configure --with-nccl)");
    r[5].gpu = (tr_gpu_seen){.n = 0};
    not_used(r, true, "rank 5 on node1 sees none");
    good(r, 0);
    snprintf(r[2].gpu.unfit, sizeof r[2].gpu.unfit, "none: an old driver");
    not_used(r, true, "rank 0 on node0 sees none");
    for (int i = 0; i < N; i++)
        r[i].gpu = r[2].gpu;
    not_used(r, true, "rank 0 on node0 sees none: an old driver");
    good(r, 3);
    not_used(r, true, "4 ranks but 3 GPUs on node0");
    good(r, 4);
    snprintf(r[7].gpu.unfit, sizeof r[7].gpu.unfit, "an old one");
    not_used(r, true, "rank 7 on node1 sees an old one");
    /* A launcher that shows every rank the same. */
    good(r, 1);
    snprintf(r[6].gpu.uuid, sizeof r[6].gpu.uuid, "GPU-4");
    not_used(r, true, "ranks 4 and 6 on node1 see the same one, GPU-4");
}

/* Nothing that could be opened is opened: one rank of this machine. */
static void test_look(void **state)
{
    tr_gpu_seen seen = {.n = -1, .uuid = "?"};

    (void)state;
    tr_device_look(&seen, 0, 1);
    assert_true(seen.n >= 0);
    if (seen.n == 0) assert_string_equal(seen.uuid, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_used),
        cmocka_unit_test(test_reasons),
        cmocka_unit_test(test_look),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
