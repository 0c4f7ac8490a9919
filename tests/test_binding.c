/* Which GPU a rank takes, and whether two have the same: the pure parts. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mpi/binding.h"

static void test_choose(void **state)
{
    (void)state;
    for (int n = 1; n <= 9; n++)
        for (int ranks = 1; ranks <= 9; ranks++)
            for (int i = 0; i < ranks; i++) {
                const int want = n == 1 ? 0 : ranks <= n ? i : -1;
                assert_int_equal(tr_device_choose(n, i, ranks), want);
            }
    assert_int_equal(tr_device_choose(0, 0, 1), -1);
    assert_int_equal(tr_device_choose(-1, 0, 1), -1);
    assert_int_equal(tr_device_choose(8, -1, 8), -1);
    assert_int_equal(tr_device_choose(8, 8, 8), -1);
}

static tr_bound bound(const char *host, const char *uuid)
{
    tr_bound b = {.host = ""};
    snprintf(b.host, sizeof b.host, "%s", host);
    snprintf(b.uuid, sizeof b.uuid, "%s", uuid);
    return b;
}

static void test_check(void **state)
{
    tr_bound b[4] = {bound("a", "GPU-1"), bound("a", "GPU-2"), bound("b", "GPU-3"),
                     bound("b", "GPU-4")};
    tr_err err = {0};

    (void)state;
    assert_int_equal(tr_binding_check(b, 4, &err), TR_OK);
    assert_int_equal(tr_binding_check(b, 0, &err), TR_OK);
    b[3] = b[2];
    assert_int_equal(tr_binding_check(b, 4, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "ranks 2 and 3 on b have the same GPU, GPU-3"));
    assert_int_equal(tr_binding_check(b, 3, &err), TR_OK);
    /* Containers of one machine have names of their own, and still one GPU. */
    b[3] = bound("a", "GPU-1");
    assert_int_equal(tr_binding_check(b, 4, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "ranks 0 and 3"));
    /* CPUs have none; a prefix is another one. */
    for (int i = 0; i < 4; i++)
        b[i] = bound("a", i < 2 ? "" : i == 2 ? "GPU-1" : "GPU-12");
    assert_int_equal(tr_binding_check(b, 4, &err), TR_OK);
    /* What comes from another process may have no end. */
    for (int i = 0; i < 2; i++) {
        memset(b[i].host, 'h', sizeof b[i].host);
        memset(b[i].uuid, 'u', sizeof b[i].uuid);
    }
    assert_int_equal(tr_binding_check(b, 2, &err), TR_E_USAGE);
    assert_true(strlen(err.text) < sizeof err.text);
}

static void test_cpu(void **state)
{
    const tr_world world = {.size = 1, .local_size = 1, .host = "here"};
    const tr_ops *ops;
    tr_device *d;
    tr_err err;

    (void)state;
    assert_int_equal(
        tr_device_open(&d, &ops, &(tr_device_options){.name = "cpu", .n_threads = 1}, &err), TR_OK);
    const tr_bound b = tr_binding_of(&world, d);
    assert_string_equal(b.uuid, "");
    assert_string_equal(b.host, "here");
    assert_memory_equal(b.device, "cpu", 3);
    ops->close(d);
}

static void test_gather(void **state)
{
    tr_comm *self = tr_comm_self();
    const tr_bound mine = bound("a", "GPU-1");
    tr_bound *all;
    tr_err err;

    (void)state;
    assert_non_null(self);
    assert_int_equal(tr_binding_gather(&all, self, &mine, &err), TR_OK);
    assert_memory_equal(all, &mine, sizeof mine);
    free(all);
    tr_comm_free(self);
}

static void test_lines(void **state)
{
    tr_bound b[2] = {bound("node07", "GPU-1"), bound("", "")};
    char line[256], head[256];

    (void)state;
    snprintf(b[0].pci, sizeof b[0].pci, "0000:1b:00.0");
    snprintf(b[0].cpus, sizeof b[0].cpus, "32-63");
    b[0].numa = 1;
    b[0].peers[TR_WAY_P2P] = 3;
    b[0].peers[TR_WAY_NET] = 4;
    tr_binding_line(line, sizeof line, b, 0);
    assert_non_null(strstr(line, "    0  node07 "));
    assert_non_null(strstr(line, "0000:1b:00.0    1  32-63 "));
    assert_non_null(strstr(line, " P2P 3, NET 4"));
    tr_binding_line(head, sizeof head, b, -1);
    assert_int_equal(strstr(head, "host") - head, strstr(line, "node07") - line);
    assert_int_equal(strstr(head, "to others") - head, strstr(line, "P2P") - line);
    /* Nothing known; and fields without an end, from another process. */
    b[1].numa = -1;
    tr_binding_line(line, sizeof line, b, 1);
    assert_non_null(strstr(line, "not bound"));
    assert_null(strstr(line, "-1"));
    memset(&b[1], 'x', sizeof b[1]);
    for (int i = 0; i < TR_N_WAYS; i++)
        b[1].peers[i] = i % 2 ? INT32_MIN : INT32_MAX;
    for (size_t room = 1; room <= sizeof line; room++) {
        tr_binding_line(line, room, b, 1);
        assert_true(strlen(line) < room);
    }
    assert_null(strstr(line, "local -"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choose), cmocka_unit_test(test_check), cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_gather), cmocka_unit_test(test_lines),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
