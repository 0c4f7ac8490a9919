/* For tests of the CPU backend: opening it with each instruction set this machine has, random
 * numbers, and comparing with the worst element in the message. */
#ifndef TR_TESTS_CPU_TEST_H
#define TR_TESTS_CPU_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <setjmp.h>

#include <cmocka.h>

#include "kernels/kernels.h"

static const char *const test_isas[] = {"plain", "avx2", "avx512", "amx"};
enum { TEST_N_ISAS = 4 };

typedef struct test_cpu {
    tr_device *d;
    const tr_ops *ops;
} test_cpu;

/* 0: this machine lacks the instruction set. */
static inline int test_cpu_open(test_cpu *cpu, int i_isa, int n_threads)
{
    tr_err err;
    tr_device_options options = {.name = "cpu", .n_threads = n_threads, .isa = test_isas[i_isa]};
    tr_status st = tr_device_open(&cpu->d, &cpu->ops, &options, &err);
    if (i_isa > 0 && st == TR_E_USAGE) return 0;
    assert_int_equal(st, TR_OK);
    return 1;
}

static inline uint64_t test_bits(uint64_t *state) /* xorshift64* */
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

/* Uniform in [-1, 1). */
static inline float test_float(uint64_t *state)
{
    return (float)((double)(test_bits(state) >> 11) * 0x1p-52 - 1.0);
}

static inline float *test_floats(uint64_t *state, size_t n)
{
    float *x = malloc((n ? n : 1) * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = test_float(state);
    return x;
}

static inline void *test_alloc(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    assert_non_null(p);
    return p;
}

/* |got - want| <= absolute[i] + relative |want| for all i; absolute NULL: zero. NaN is wrong. */
static inline void test_close(const char *what, const float *got, const double *want,
                              const double *absolute, double relative, size_t n)
{
    double worst = -1;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double bound = (absolute ? absolute[i] : 0) + relative * fabs(want[i]);
        double error = fabs((double)got[i] - want[i]);
        double share = error == 0 ? 0 : isfinite(error) && bound > 0 ? error / bound : INFINITY;
        if (share > worst) {
            worst = share;
            at = i;
        }
    }
    if (worst > 1) {
        print_error("%s: worst element %zu of %zu: %.9g, not %.9g: %.2f times the tolerance\n",
                    what, at, n, (double)got[at], want[at], worst);
        fail();
    }
}

#endif
