#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/stop.h"
#include "kernels/number.h"
#include "model/dummy.h"
#include "model/weights_priv.h"
#include "tests/fake_ops.h"

/* Any block of a dummy tensor is that block of the whole, at odd offsets and widths, in each format. */
static void dummy_blocks_are_parts_of_the_tensor(void **state)
{
    (void)state;
    tr_wanted w = {.name = "some.weight", .class = TR_CLASS_Q, .rank = 2, .shape = {37, 141}};
    static const tr_stored stored[] = {TR_STORED_F8_E4M3, TR_STORED_BF16, TR_STORED_F32};
    static const int64_t blocks[][4] = {
        {0, 37, 0, 141}, {3, 5, 7, 9}, {36, 1, 140, 1}, {1, 30, 1, 137}};
    enum { N = 37 * 141 };
    tr_dummy *d = tr_dummy_create(1), *other = tr_dummy_create(2);
    unsigned char *all = malloc(4 * N), *part = malloc(4 * N);
    assert_true(d && other && all && part);
    for (size_t k = 0; k < 3; k++) {
        size_t e = k == 0 ? 1 : k == 1 ? 2 : 4;
        tr_dummy_block(d, &w, stored[k], 0, 37, 0, 141, all);
        for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
            const int64_t *at = blocks[b];
            tr_dummy_block(d, &w, stored[k], at[0], at[1], at[2], at[3], part);
            for (int64_t r = 0; r < at[1]; r++)
                assert_memory_equal(part + (size_t)(r * at[3]) * e,
                                    all + (size_t)((at[0] + r) * 141 + at[2]) * e,
                                    (size_t)at[3] * e);
        }
        tr_dummy_block(other, &w, stored[k], 0, 37, 0, 141, part);
        assert_memory_not_equal(all, part, N * e);
    }
    float scales[2], one;
    tr_dummy_scale(d, &w, 0, 1, 0, 2, scales);
    tr_dummy_scale(d, &w, 0, 1, 1, 1, &one);
    assert_true(one == scales[1] && scales[0] > 0.0f);
    free(all);
    free(part);
    tr_dummy_free(d);
    tr_dummy_free(other);
}

/* Every kind of tensor has the mean and the spread it is meant to have. */
static void kinds_have_their_distribution(void **state)
{
    (void)state;
    static const struct {
        tr_init init;
        double mean, std;
    } kinds[] = {{TR_INIT_MATRIX, 0.0, 0.125},
                 {TR_INIT_EMBED, 0.0, 1.0},
                 {TR_INIT_GAIN, 1.0, 0.02},
                 {TR_INIT_SMALL, 0.0, 0.02},
                 {TR_INIT_ZERO, 0.0, 0.0}};
    enum { ROWS = 256, COLUMNS = 64, N = ROWS * COLUMNS };
    float *x = malloc(N * sizeof *x);
    tr_dummy *d = tr_dummy_create(3);
    assert_true(x && d);
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        tr_wanted w = {.name = "t", .init = kinds[k].init, .rank = 2, .shape = {ROWS, COLUMNS}};
        double mean = 0.0, square = 0.0;
        tr_dummy_block(d, &w, TR_STORED_F32, 0, ROWS, 0, COLUMNS, x);
        for (int i = 0; i < N; i++) {
            mean += (double)x[i] / N;
            square += ((double)x[i] - kinds[k].mean) * ((double)x[i] - kinds[k].mean) / N;
        }
        /* Five standard errors of N independent draws. */
        assert_true(fabs(mean - kinds[k].mean) <= 5.0 * kinds[k].std / sqrt(N));
        assert_true(fabs(sqrt(square) - kinds[k].std) <= 5.0 * kinds[k].std / sqrt(2.0 * N));
    }
    free(x);
    tr_dummy_free(d);
}

/* The e4m3 codes are finite numbers, and not few of them. */
static void codes_are_finite_and_varied(void **state)
{
    (void)state;
    tr_wanted w = {.name = "t", .rank = 2, .shape = {64, 256}};
    uint8_t code[64 * 256];
    int used[256] = {0}, n_used = 0;
    tr_dummy *d = tr_dummy_create(3);
    assert_non_null(d);
    tr_dummy_block(d, &w, TR_STORED_F8_E4M3, 0, 64, 0, 256, code);
    for (size_t i = 0; i < sizeof code; i++) {
        assert_true(isfinite(tr_e4m3_to_f32(code[i])));
        n_used += used[code[i]]++ == 0;
    }
    assert_true(n_used > 60);
    tr_dummy_free(d);
}

static tr_status fill_and_stop(tr_device *d, tr_linear *dst, const tr_linear_src *s, int n,
                               tr_rows_fn *rows, void *const *ctx)
{
    raise(SIGUSR1);
    return filling_linear(d, dst, s, n, rows, ctx);
}

/* In a process of its own, since a stop is for good. */
static int stopped_midway(void)
{
    tr_ops ops = filling_ops;
    tr_config c = {0};
    tr_device device = {0};
    struct tr_weights_memory memory = {0};
    tr_weights weights = {.memory = &memory};
    tr_piece p = {.w = {.name = "t", .rank = 2, .shape = {300, 256}},
                  .rows = tr_whole(300),
                  .columns = tr_whole(256)};
    tr_linear linear;
    tr_err err = {0};

    ops.linear_fill = fill_and_stop;
    tr_loader l = {.config = &c, .device = &device, .ops = &ops, .weights = &weights};
    l.dummy = tr_dummy_create(1);
    l.read_region = l.pack_region = l.fill_region = -1;
    if (!l.dummy || tr_stop_install(&err) != TR_OK) return 1;
    if (tr_loader_linear(&l, &linear, &p.w, 1, 300, 256, &err) != TR_OK) return 2;
    if (tr_loader_pack(&l, &linear, &p, 1, &err) != TR_E_STOP) return 3;
    return strcmp(err.text, "stopped by USR1 while loading") == 0 ? 0 : 4;
}

/* Tensors of gigabytes may be on their way: a stop ends that between two reads. */
static void a_stop_ends_loading_midway(void **state)
{
    int status = 0;
    (void)state;
    const pid_t child = fork();
    if (child == 0) _exit(stopped_midway());
    assert_true(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dummy_blocks_are_parts_of_the_tensor),
        cmocka_unit_test(kinds_have_their_distribution),
        cmocka_unit_test(codes_are_finite_and_varied),
        cmocka_unit_test(a_stop_ends_loading_midway),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
