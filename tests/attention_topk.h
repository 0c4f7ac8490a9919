/* Small things both attention tests need: random numbers, memory full of NaN, and the k best the slow way. */
#ifndef TR_TESTS_ATTENTION_TOPK_H
#define TR_TESTS_ATTENTION_TOPK_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static uint32_t seed = 12345; /* of xorshift */

/* In [-1, 1). */
static float uniform(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return (float)(int32_t)seed * 0x1p-31f;
}

static void *get(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) fail_msg("out of memory");
    memset(p, 0xff, bytes); /* NaN in every format: what nobody wrote must not be read */
    return p;
}

typedef struct scored {
    float score;
    int position;
} scored;

static int better(const void *a, const void *b)
{
    const scored *x = a, *y = b;
    float u = isnan(x->score) ? -INFINITY : x->score, v = isnan(y->score) ? -INFINITY : y->score;
    return u != v ? (u < v ? 1 : -1) : x->position - y->position;
}

static int smaller(const void *a, const void *b)
{
    return *(const int32_t *)a - *(const int32_t *)b;
}

/* Positions of the k best of n, ascending. */
static int topk_ref(const float *score, int n, int k, int32_t *out)
{
    scored *all = get((size_t)n * sizeof *all);

    for (int s = 0; s < n; s++)
        all[s] = (scored){n > k ? score[s] : 0.0f, s};
    qsort(all, (size_t)n, sizeof *all, better);
    k = n < k ? n : k;
    for (int j = 0; j < k; j++)
        out[j] = all[j].position;
    qsort(out, (size_t)k, sizeof *out, smaller);
    free(all);
    return k;
}

#endif
