/* The exponential of 16 numbers, for files that are compiled with AVX-512. */
#ifndef TR_KERNELS_CPU_EXP_AVX512_H
#define TR_KERNELS_CPU_EXP_AVX512_H

#include <immintrin.h>

/* exp(x) = 2^n p(r), n = round(x log2 e), r = x - n ln 2 in two parts; p is Taylor's to r^7, |r| <=
 * 0.347, its error 6e-9. n is from -150 (result 0) to 128 (inf), scaled by in one rounding. NaN stays
 * NaN. */
static inline __m512 tr_exp16(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x); /* in this order: max and min return */
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), x);   /* their second operand on NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040.0f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

#endif
