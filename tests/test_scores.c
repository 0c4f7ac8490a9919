/* Scores of many rows against one block of keys (kernels/cpu/attention_priv.h, turn and scores) against double precision, at
 * every number of keys and rows that takes another path; and that neither number shows in the bits. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cpu/attention_priv.h"

enum { ROWS = 17, D_MAX = 193, LD = D_MAX + 3 };

typedef struct sizes {
    float q[ROWS * LD], k[TR_KEY_BLOCK * LD], turned[D_MAX * TR_KEY_BLOCK],
        whole[ROWS * TR_KEY_BLOCK], p[ROWS * TR_KEY_BLOCK + 1];
} sizes;

static void fill(float *x, int n, uint32_t seed)
{
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) * 0x1p-23f - 1.0f;
    }
}

/* All rows and keys: near the exact sums. */
static void check_whole(const struct tr_attention_kernels *kernels, sizes *s, int d)
{
    kernels->turn(s->turned, (tr_tile){s->k, LD, TR_KEY_BLOCK}, d);
    kernels->scores(s->whole, (tr_tile){s->q, LD, ROWS}, s->turned, d);
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < TR_KEY_BLOCK; j++) {
            double want = 0, size = 0;
            for (int i = 0; i < d; i++) {
                want += (double)s->q[r * LD + i] * (double)s->k[j * LD + i];
                size += fabs((double)s->q[r * LD + i] * (double)s->k[j * LD + i]);
            }
            assert_true(s->turned[(d - 1) * TR_KEY_BLOCK + j] == s->k[j * LD + d - 1]);
            assert_true(fabs((double)s->whole[r * TR_KEY_BLOCK + j] - want) <= 1e-6 * size);
        }
}

/* Some rows from row `first` on and some keys: the same bits, zeros past the keys, nothing past the rows. */
static void check_part(const struct tr_attention_kernels *kernels, sizes *s, int d, int first,
                       int n_rows, int n_keys)
{
    const int n = n_rows * TR_KEY_BLOCK;
    kernels->turn(s->turned, (tr_tile){s->k, LD, n_keys}, d);
    s->p[n] = 7.0f;
    kernels->scores(s->p, (tr_tile){s->q + first * LD, LD, n_rows}, s->turned, d);
    assert_true(s->p[n] == 7.0f);
    for (int r = 0; r < n_rows; r++)
        for (int j = 0; j < TR_KEY_BLOCK; j++)
            assert_true(s->p[r * TR_KEY_BLOCK + j] ==
                        (j < n_keys ? s->whole[(first + r) * TR_KEY_BLOCK + j] : 0.0f));
}

static void scores(void **state)
{
    static const char *const isa[] = {"plain", "avx2", "avx512"};
    static const int d[] = {1, 5, 16, 64, D_MAX};
    sizes *s = malloc(sizeof *s);
    (void)state;
    assert_non_null(s);
    fill(s->q, ROWS * LD, 1);
    fill(s->k, TR_KEY_BLOCK * LD, 2);
    for (size_t i = 0; i < sizeof isa / sizeof *isa; i++) {
        const tr_device_options options = {.name = "cpu", .n_threads = 1, .isa = isa[i]};
        const tr_ops *ops;
        tr_device *device;
        tr_err err;
        if (tr_device_open(&device, &ops, &options, &err) != TR_OK) continue; /* not this machine */
        for (size_t j = 0; j < sizeof d / sizeof *d; j++) {
            check_whole(tr_attention_of(device), s, d[j]);
            for (int n = 1; n <= TR_KEY_BLOCK; n++)
                check_part(tr_attention_of(device), s, d[j], n % 5, 1 + n % (ROWS - 4), n);
        }
        ops->close(device);
    }
    free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(scores)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
