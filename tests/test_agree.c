/* Start-up and the agreement on errors. Alone it is a world of one; tests/ starts it under mpirun on 2 and 4 ranks too:
 * every rank runs the same checks. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mpi/start.h"

static void test_world(void **state)
{
    const tr_world *w = *state;
    char text[128], shorter[8];

    assert_in_range(w->rank, 0, w->size - 1);
    assert_in_range(w->local_size, 1, w->size);
    assert_in_range(w->local_rank, 0, w->local_size - 1);
    assert_true(w->host[0] != '\0');
    const char *launched = getenv("OMPI_COMM_WORLD_SIZE");
    if (launched) assert_int_equal(w->size, strtol(launched, NULL, 10));
    tr_mpi_version(text, sizeof text);
    assert_true(strlen(text) > 3);
    assert_null(strchr(text, '\n'));
    tr_mpi_version(shorter, sizeof shorter);
    assert_int_equal(strlen(shorter), 7);
}

static void test_who_speaks(void **state)
{
    (void)state;
    assert_true(tr_names_rank("rank 3 on node07: no room"));
    assert_true(tr_names_rank("rank 12 on node07.cluster: rank 3 of 4 is bad"));
    assert_false(tr_names_rank("no room"));
    assert_false(tr_names_rank("rank 3 of 4 is bad: no room"));
    assert_false(tr_names_rank("rank 3 on"));
    assert_false(tr_names_rank("rank x on node07: no room"));
    assert_false(tr_names_rank(""));
}

static void test_all_well(void **state)
{
    tr_err err = {0};

    assert_int_equal(tr_agree(*state, TR_OK, &err), TR_OK);
    assert_int_equal(tr_agree(*state, TR_OK, NULL), TR_OK);
    assert_string_equal(err.text, "");
}

/* Ranks [lowest, lowest + n) fail, each in its own way. */
static void check_failures(const tr_world *w, int lowest, int n)
{
    static const tr_status kind[] = {TR_E_INPUT, TR_E_MEMORY, TR_E_IO, TR_E_STOP};
    tr_err err = {0};
    tr_status mine = TR_OK;
    char want[256], where[128], others[64] = "";

    if (w->rank >= lowest && w->rank < lowest + n)
        mine = tr_fail(&err, kind[w->rank % 4], "shard %d is damaged", w->rank);
    tr_status st = tr_agree(w, mine, &err);
    assert_int_equal(st, kind[lowest % 4]);
    assert_int_equal(err.status, st);
    if (w->size == 1) {
        assert_string_equal(err.text, "shard 0 is damaged");
        return;
    }
    snprintf(where, sizeof where, "rank %d on ", lowest);
    assert_memory_equal(err.text, where, strlen(where));
    if (n > 1) snprintf(others, sizeof others, " (and %d more rank%s)", n - 1, n > 2 ? "s" : "");
    snprintf(want, sizeof want, ": shard %d is damaged%s", lowest, others);
    const char *end = strstr(err.text, ": ");
    assert_non_null(end);
    assert_string_equal(end, want);
}

static void test_failures(void **state)
{
    const tr_world *w = *state;

    for (int lowest = 0; lowest < w->size; lowest++)
        for (int n = 1; lowest + n <= w->size; n++)
            check_failures(w, lowest, n);
}

/* A text that fills the buffer keeps its beginning, its cause and the number of the others. */
static void test_long_text(void **state)
{
    const tr_world *w = *state;
    tr_err err = {.status = TR_E_IO};

    memset(err.text, 'x', sizeof err.text - 1);
    memcpy(err.text, "BEGIN", 5);
    memcpy(err.text + sizeof err.text - 6, "CAUSE", 5);
    assert_int_equal(tr_agree(w, TR_E_IO, &err), TR_E_IO);
    assert_int_equal(strlen(err.text), sizeof err.text - 1);
    assert_non_null(strstr(err.text, "BEGIN"));
    assert_non_null(strstr(err.text, "CAUSE"));
    if (w->size > 1) assert_non_null(strstr(err.text, "CAUSE (and "));
}

int main(void)
{
    tr_world world;
    tr_err err = {0};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_world, &world),
        cmocka_unit_test(test_who_speaks),
        cmocka_unit_test_prestate(test_all_well, &world),
        cmocka_unit_test_prestate(test_failures, &world),
        cmocka_unit_test_prestate(test_long_text, &world),
    };

    if (tr_world_start(&world, &err) != TR_OK) {
        fprintf(stderr, "test_agree: %s\n", err.text);
        return 1;
    }
    int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_world_finish(TR_OK);
    tr_world_finish(TR_OK); /* once more is harmless */
    return n_failed ? 1 : 0;
}
