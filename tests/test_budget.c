/* The table for a job that did not find its memory. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

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
    b.left = 0;
    assert_non_null(strstr(printed(text, sizeof text, &b, false), "left at the moment    unknown"));
    /* Sums of what does not fit 64 bits are not wrapped. */
    b.weights = b.workspace = UINT64_MAX;
    assert_non_null(strstr(printed(text, sizeof text, &b, false), "  36893488147"));
    assert_string_equal(printed(text, sizeof text, &b, true), "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_table)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
