/* The table for a job that did not find its memory. */
#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "command/budget.h"

/* What a rank with this budget prints, or does not. */
static const char *printed(char *text, size_t size, const tr_budget *budget, bool quiet)
{
    FILE *f = tmpfile();
    assert_non_null(f);
    tr_log *log = tr_log_create(f, quiet, false);
    assert_non_null(log);
    tr_budget_print(budget, log);
    tr_log_free(log);
    rewind(f);
    text[fread(text, 1, size - 1, f)] = '\0';
    fclose(f);
    return text;
}

static void test_table(void **state)
{
    (void)state;
    char text[2048];
    tr_budget b = {.rank = 3,
                   .host = "node07",
                   .device = "cuda, NVIDIA H200",
                   .weights = UINT64_C(84200000000),
                   .workspace = 1500000000,
                   .cache_least = 250000000,
                   .cache_whole = UINT64_C(8000000000),
                   .left = UINT64_C(12345000000),
                   .max_batch_tokens = 1024,
                   .max_sequences = 32,
                   .max_model_len = 16384,
                   .kv_dtype = "fp8"};

    assert_string_equal(
        printed(text, sizeof text, &b, false),
        "trireme: memory of rank 3 on node07 (cuda, NVIDIA H200), GB (10^9 bytes):\n"
        "trireme:   weights                84.200  fewer with more ranks\n"
        "trireme:   buffers of a step       1.500  --max-batch-tokens 1024, --max-sequences 32\n"
        "trireme:   caches, at least        0.250  --max-model-len 16384, --kv-dtype fp8\n"
        "trireme:   caches, at most         8.000  for --max-sequences 32 of that length\n"
        "trireme:   needed, at least       85.950\n"
        "trireme:   left at the moment     12.345  beside what has been taken\n");
    b.left = UINT64_MAX;
    assert_non_null(strstr(printed(text, sizeof text, &b, false), "left at the moment    unknown"));
    b.left = 0; /* a group that is at its limit */
    assert_non_null(strstr(printed(text, sizeof text, &b, false), "left at the moment      0.000"));
    /* Sums of what does not fit 64 bits are not wrapped. */
    b.weights = b.workspace = UINT64_MAX;
    assert_non_null(strstr(printed(text, sizeof text, &b, false), "  36893488147"));
    assert_string_equal(printed(text, sizeof text, &b, true), "");
}

/* ---- what is left ------------------------------------------------------------------------------ */

/* Files of a small /proc and /sys. */
static void put(const char *root, const char *path, const char *text)
{
    char name[512];
    FILE *f;

    for (const char *c = strchr(path, '/'); c; c = strchr(c + 1, '/')) {
        snprintf(name, sizeof name, "%s/%.*s", root, (int)(c - path), path);
        assert_true(mkdir(name, 0700) == 0 || errno == EEXIST);
    }
    snprintf(name, sizeof name, "%s/%s", root, path);
    assert_non_null(f = fopen(name, "w"));
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void test_left(void **state)
{
    char root[] = "/tmp/trireme-budget.XXXXXX", command[64];
    (void)state;
    assert_non_null(mkdtemp(root));
    assert_true(tr_memory_available_under(root) == UINT64_MAX);
    put(root, "proc/meminfo", "MemTotal: 900 kB\nMemAvailable:  800 kB\n");
    assert_int_equal(tr_memory_available_under(root), 800 * 1024);

    /* Version 2: the tighter of two groups. What files have of it is left, but not what nobody can take away. */
    put(root, "proc/self/cgroup", "0::/job/step\n");
    put(root, "sys/fs/cgroup/job/step/memory.max", "max\n");
    put(root, "sys/fs/cgroup/job/memory.max", "700000\n");
    put(root, "sys/fs/cgroup/job/memory.current", "690000\n");
    assert_int_equal(tr_memory_available_under(root), 10000);
    put(root, "sys/fs/cgroup/job/memory.stat",
        "anon 80000\nfile 610000\ninactive_file 500000\nactive_file 100000\n");
    assert_int_equal(tr_memory_available_under(root), 610000);
    put(root, "sys/fs/cgroup/job/memory.stat", "anon 700000\ninactive_file 0\nactive_file 0\n");
    put(root, "sys/fs/cgroup/job/memory.current", "700000\n");
    assert_int_equal(tr_memory_available_under(root), 0); /* known to be nothing */

    put(root, "proc/self/cgroup", "4:cpu:/x\n9:memory:/slurm\n");
    put(root, "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes", "500000\n");
    put(root, "sys/fs/cgroup/memory/slurm/memory.usage_in_bytes", "500000\n");
    put(root, "sys/fs/cgroup/memory/slurm/memory.stat",
        "active_file 1\ninactive_file 1\ntotal_active_file 1000\ntotal_inactive_file 2000\n");
    assert_int_equal(tr_memory_available_under(root), 3000);
    snprintf(command, sizeof command, "rm -r %s", root);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_table), cmocka_unit_test(test_left)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
