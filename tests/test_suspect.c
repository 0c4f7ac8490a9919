/* What is said of a GPU that failed: which one, what the driver reported, and whether to keep away from it. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/suspect.h"

static const char *text_of(char *out, size_t size, tr_suspect_facts facts)
{
    if (!facts.uuid) facts.uuid = "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f";
    facts.host = "node07";
    tr_suspect_text(out, size, &facts);
    return out;
}

static void test_hardware(void **state)
{
    (void)state;
    char text[400];
    tr_suspect_facts f = {
        .in_slurm = true, .verdict = TR_VERDICT_HARDWARE, .heard = {.listens = true, .xid = 48}};

    assert_string_equal(text_of(text, sizeof text, f),
                        "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f, on node07; Xid 48: double-bit "
                        "ECC error; this GPU is suspect: submit again with --exclude=node07");
    f.in_slurm = false;
    text_of(text, sizeof text, f);
    assert_non_null(strstr(text, "this GPU is suspect: run elsewhere"));
    assert_null(strstr(text, "--exclude"));
}

/* CUDA's error alone may come of a wrong kernel; what the driver reported decides. */
static void test_driver_decides(void **state)
{
    (void)state;
    char text[400];
    tr_suspect_facts f = {
        .in_slurm = true, .verdict = TR_VERDICT_PERHAPS, .heard = {.listens = true}};

    text_of(text, sizeof text, f);
    assert_non_null(strstr(text, "the driver reported no Xid; if this comes on one host alone"));
    assert_non_null(strstr(text, "is suspect: --exclude=node07"));
    assert_null(strstr(text, "this GPU is suspect"));
    f.heard.xid = 31;
    text_of(text, sizeof text, f);
    assert_non_null(strstr(text, "Xid 31: memory page fault; if this comes on one host alone"));
    f.heard.xid = 79;
    assert_non_null(strstr(text_of(text, sizeof text, f), "this GPU is suspect"));
    f.heard.xid = 4711; /* one of a later driver */
    assert_non_null(strstr(text_of(text, sizeof text, f), "Xid 4711; if this comes on one host"));
    f.heard = (tr_heard){.listens = true, .lost = true};
    text_of(text, sizeof text, f);
    assert_non_null(strstr(text, "the driver has lost the GPU; this GPU is suspect"));
    f.heard.xid = 31;
    text_of(text, sizeof text, f);
    assert_non_null(strstr(text, "page fault, and the driver has lost the GPU; this GPU is"));
    f.heard = (tr_heard){0};
    f.in_slurm = false;
    text_of(text, sizeof text, f);
    assert_non_null(strstr(text, "Xid unknown, no NVML; if this comes on one host alone"));
    assert_null(strstr(text, "--exclude"));
}

static void test_refusal(void **state)
{
    (void)state;
    char text[400];
    const tr_suspect_facts f = {.in_slurm = true, .uuid = ""};
    assert_string_equal(text_of(text, sizeof text, f), "on node07");
}

static void test_short_room(void **state)
{
    (void)state;
    char text[64];
    const tr_suspect_facts f = {
        .in_slurm = true, .verdict = TR_VERDICT_HARDWARE, .heard = {.listens = true, .xid = 48}};
    for (size_t n = 1; n <= 48; n++) {
        memset(text, 'x', sizeof text);
        text_of(text, n, f);
        assert_int_equal(strlen(text), n - 1);
        assert_int_equal(text[n], 'x');
    }
}

/* Those of reliability.md 4, row 18 are the hardware's; what a wrong kernel can cause is not. */
static void test_xids(void **state)
{
    (void)state;
    static const int hardware[] = {48, 63, 64, 79, 94, 95}, other[] = {13, 31, 43, 45, 9999};
    for (size_t i = 0; i < sizeof hardware / sizeof *hardware; i++) {
        assert_int_equal(tr_xid_verdict(hardware[i]), TR_VERDICT_HARDWARE);
        assert_string_not_equal(tr_xid_meaning(hardware[i]), "");
    }
    for (size_t i = 0; i < sizeof other / sizeof *other; i++)
        assert_int_equal(tr_xid_verdict(other[i]), TR_VERDICT_PERHAPS);
    assert_int_equal(tr_xid_verdict(0), TR_VERDICT_NONE);
    assert_int_equal(tr_xid_verdict(-1), TR_VERDICT_NONE);
    assert_string_equal(tr_xid_meaning(9999), "");
}

static void test_host(void **state)
{
    (void)state;
    char host[64];
    bool in_slurm;

    unsetenv("SLURM_JOB_ID");
    setenv("SLURMD_NODENAME", "tr2", 1); /* left over: there is no job */
    tr_suspect_host(host, sizeof host, &in_slurm);
    assert_false(in_slurm);
    assert_int_not_equal(host[0], 0);
    setenv("SLURM_JOB_ID", "17", 1);
    tr_suspect_host(host, sizeof host, &in_slurm);
    assert_true(in_slurm);
    assert_string_equal(host, "tr2");
    tr_suspect_host(host, 3, &in_slurm);
    assert_string_equal(host, "tr");
}

static void test_nobody_listens(void **state)
{
    (void)state;
    const tr_heard heard = tr_suspect_hear(NULL, 1000);
    assert_false(heard.listens);
    assert_false(heard.lost);
    assert_int_equal(heard.xid, 0);
    tr_suspect_close(NULL);
    assert_null(tr_suspect_open("no such address"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hardware),       cmocka_unit_test(test_driver_decides),
        cmocka_unit_test(test_refusal),        cmocka_unit_test(test_short_room),
        cmocka_unit_test(test_xids),           cmocka_unit_test(test_host),
        cmocka_unit_test(test_nobody_listens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
