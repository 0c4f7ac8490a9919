/* Checked sizes: no number from a file or a request reaches malloc, a shift or a product except through these. */
#ifndef TR_BASE_SIZE_H
#define TR_BASE_SIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* *out = a * b (a + b); false, and *out untouched, when the result does not fit. */
static inline bool tr_mul(size_t *out, size_t a, size_t b)
{
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

static inline bool tr_add(size_t *out, size_t a, size_t b)
{
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

/* calloc(n, size) through the check calloc already makes, with n = 0 giving a valid pointer. NULL: out of memory. */
void *tr_calloc(size_t n, size_t size);

/* a / b rounded up; b > 0, and a + b - 1 must not wrap (sizes of the model, not of files). */
static inline size_t tr_ceil_div(size_t a, size_t b)
{
    return (a + b - 1) / b;
}

#endif
