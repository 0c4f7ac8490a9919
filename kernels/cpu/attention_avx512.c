/* The inner loops of attention with AVX-512 (F, BW, VL, DQ). Loops over small constant counts are unrolled, so that the
 * accumulators named as arrays live in registers. */
#include <config.h>

#ifdef TR_HAVE_X86_SIMD

#include <immintrin.h>
#include <math.h>

#include "kernels/cpu/attention_priv.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* The first n of 16. */
INLINE __mmask16 lanes(int n)
{
    return _cvtu32_mask16(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u);
}

/* Lane j of the result is the sum of acc[j]'s lanes, the same tree for every j. */
INLINE __m512 sum_each(const __m512 acc[16])
{
    __m512 two[8], four[4], lo, hi;

    UNROLL for (int j = 0; j < 8; j++)
    {
        __m512 a = acc[2 * j], b = acc[2 * j + 1];
        two[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    UNROLL for (int j = 0; j < 4; j++)
    {
        __m512d a = _mm512_castps_pd(two[2 * j]), b = _mm512_castps_pd(two[2 * j + 1]);
        four[j] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    lo = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                       _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    hi = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                       _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
}

/* 16 numbers of every row and key into the accumulators. */
INLINE void dots_step(__m512 acc[16], const float *q, size_t ld_q, int n_live,
                      const float *const *k, int n_k, int i, __mmask16 m)
{
    __m512 row[4];

    UNROLL for (int r = 0; r < n_live; r++)
    {
        row[r] = _mm512_maskz_loadu_ps(m, q + (size_t)r * ld_q + i);
    }
    UNROLL for (int s = 0; s < n_k; s++)
    {
        __m512 key = _mm512_maskz_loadu_ps(m, k[s] + i);
        UNROLL for (int r = 0; r < n_live; r++)
        {
            acc[r * n_k + s] = _mm512_fmadd_ps(row[r], key, acc[r * n_k + s]);
        }
    }
}

/* n_q rows by 16 / n_q keys (n_q 1, 2 or 4), of which only n_live rows exist: 16 accumulators. */
INLINE void dots_block(float *out, const float *q, size_t ld_q, int n_q, int n_live,
                       const float *const *k, int d)
{
    const int n_k = 16 / n_q;
    __m512 acc[16];
    int i = 0;

    UNROLL for (int j = 0; j < 16; j++) acc[j] = _mm512_setzero_ps();
    for (; i + 16 <= d; i += 16)
        dots_step(acc, q, ld_q, n_live, k, n_k, i, 0xffff);
    if (i < d) dots_step(acc, q, ld_q, n_live, k, n_k, i, lanes(d - i));
    __m512 t = sum_each(acc);
    if (n_q == 1) _mm512_storeu_ps(out, t);
    if (n_q == 2) {
        _mm256_storeu_ps(out, _mm512_extractf32x8_ps(t, 0));
        _mm256_storeu_ps(out + TR_KEY_BLOCK, _mm512_extractf32x8_ps(t, 1));
    }
    if (n_q == 4) {
        _mm_storeu_ps(out, _mm512_extractf32x4_ps(t, 0));
        _mm_storeu_ps(out + TR_KEY_BLOCK, _mm512_extractf32x4_ps(t, 1));
        _mm_storeu_ps(out + 2 * TR_KEY_BLOCK, _mm512_extractf32x4_ps(t, 2));
        if (n_live == 4) _mm_storeu_ps(out + 3 * TR_KEY_BLOCK, _mm512_extractf32x4_ps(t, 3));
    }
}

/* Four keys at a time stay in L1 while all rows pass; the last rows, fewer than four, take more keys at once. */
static void dots(float *out, tr_tile q, tr_tile k, int d)
{
    const float *key[TR_KEY_BLOCK], *rest = q.x + (size_t)(q.n / 4 * 4) * q.ld;
    int n_rest = q.n % 4;

    /* Blocks run past the last key: they read it again. */
    for (int s = 0; s < TR_KEY_BLOCK; s++)
        key[s] = k.x + (size_t)(s < k.n ? s : k.n - 1) * k.ld;
    for (int s = 0; s < k.n; s += 4)
        for (int r = 0; r + 4 <= q.n; r += 4)
            dots_block(out + r * TR_KEY_BLOCK + s, q.x + (size_t)r * q.ld, q.ld, 4, 4, key + s, d);
    out += q.n / 4 * 4 * TR_KEY_BLOCK;
    for (int s = 0; n_rest == 3 && s < k.n; s += 4)
        dots_block(out + s, rest, q.ld, 4, 3, key + s, d);
    for (int s = 0; n_rest == 2 && s < k.n; s += 8)
        dots_block(out + s, rest, q.ld, 2, 2, key + s, d);
    for (int s = 0; n_rest == 1 && s < k.n; s += 16)
        dots_block(out + s, rest, q.ld, 1, 1, key + s, d);
}

/* Up to 4 rows by up to 64 columns. */
INLINE void accumulate_block(float *y, size_t ld_y, const float *p, const float *keep,
                             const int *n_keys, int n_rows, const float *v, size_t ld_v, int width)
{
    __m512 acc[4][4], x[4];
    __mmask16 m[4];
    int s = 0, common = n_keys[0];

    UNROLL for (int j = 0; j < 4; j++) m[j] = lanes(width - 16 * j);
    UNROLL for (int r = 0; r < n_rows; r++)
    {
        common = n_keys[r] < common ? n_keys[r] : common;
        UNROLL for (int j = 0; j < 4; j++)
        {
            acc[r][j] = _mm512_setzero_ps();
            if (keep[r] != 0.0f)
                acc[r][j] =
                    _mm512_mul_ps(_mm512_maskz_loadu_ps(m[j], y + (size_t)r * ld_y + 16 * j),
                                  _mm512_set1_ps(keep[r]));
        }
    }
    for (; s < common; s++) {
        UNROLL for (int j = 0; j < 4; j++)
        {
            x[j] = _mm512_maskz_loadu_ps(m[j], v + (size_t)s * ld_v + 16 * j);
        }
        UNROLL for (int r = 0; r < n_rows; r++)
        {
            __m512 w = _mm512_set1_ps(p[r * TR_KEY_BLOCK + s]);
            UNROLL for (int j = 0; j < 4; j++) acc[r][j] = _mm512_fmadd_ps(w, x[j], acc[r][j]);
        }
    }
    UNROLL for (int r = 0; r < n_rows; r++)
    {
        for (int t = common; t < n_keys[r]; t++) {
            __m512 w = _mm512_set1_ps(p[r * TR_KEY_BLOCK + t]);
            UNROLL for (int j = 0; j < 4; j++)
            {
                x[j] = _mm512_maskz_loadu_ps(m[j], v + (size_t)t * ld_v + 16 * j);
                acc[r][j] = _mm512_fmadd_ps(w, x[j], acc[r][j]);
            }
        }
        UNROLL for (int j = 0; j < 4; j++)
        {
            _mm512_mask_storeu_ps(y + (size_t)r * ld_y + 16 * j, m[j], acc[r][j]);
        }
    }
}

static void accumulate(float *y, size_t ld_y, const float *p, const float *keep, const int *n_keys,
                       int n_rows, const float *v, size_t ld_v, int d)
{
    for (int i = 0; i < d; i += 64) /* these columns of v stay in L1 while all rows pass */
        for (int r = 0; r < n_rows; r += 4) {
            float *to = y + (size_t)r * ld_y + i;
            const float *pr = p + r * TR_KEY_BLOCK;
            int n = n_rows - r;
            if (n >= 4)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 4, v + i, ld_v, d - i);
            else if (n == 3)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 3, v + i, ld_v, d - i);
            else if (n == 2)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 2, v + i, ld_v, d - i);
            else
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 1, v + i, ld_v, d - i);
        }
}

static float scale_max(float *x, float scale, int n)
{
    __m512 max = _mm512_set1_ps(-INFINITY);

    for (int i = 0; i < n; i += 16) {
        __mmask16 m = lanes(n - i);
        __m512 t = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), _mm512_set1_ps(scale));
        _mm512_mask_storeu_ps(x + i, m, t);
        max = _mm512_mask_max_ps(max, m, t, max);
    }
    return _mm512_reduce_max_ps(max);
}

static float sum(const float *x, int n)
{
    __m512 acc = _mm512_setzero_ps();

    for (int i = 0; i < n; i += 16)
        acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(lanes(n - i), x + i));
    return _mm512_reduce_add_ps(acc);
}

static void relu_add(float *acc, const float *products, const float *w, int n_heads)
{
    __m512 sums[4];

    UNROLL for (int j = 0; j < 4; j++) sums[j] = _mm512_loadu_ps(acc + 16 * j);
    for (int h = 0; h < n_heads; h++) {
        UNROLL for (int j = 0; j < 4; j++)
        {
            /* max gives its second operand when one is NaN: NaN stays */
            __m512 x = _mm512_max_ps(_mm512_setzero_ps(),
                                     _mm512_loadu_ps(products + h * TR_KEY_BLOCK + 16 * j));
            sums[j] = _mm512_fmadd_ps(_mm512_set1_ps(w[h]), x, sums[j]);
        }
    }
    UNROLL for (int j = 0; j < 4; j++) _mm512_storeu_ps(acc + 16 * j, sums[j]);
}

static void index_score(float *score, const float *acc, const float *key_scale, int n)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = lanes(n - i);
        __m512 x = _mm512_maskz_loadu_ps(m, acc + i);
        if (key_scale) x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(m, key_scale + i));
        x = _mm512_add_ps(x, _mm512_setzero_ps()); /* -0 + +0 is +0 */
        __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        _mm512_mask_storeu_ps(score + i, m, _mm512_mask_mov_ps(x, nan, _mm512_set1_ps(-INFINITY)));
    }
}

static float max_abs(const float *x, int n)
{
    __m512 max = _mm512_setzero_ps();

    for (int i = 0; i < n; i += 16)
        max = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i)), max);
    return _mm512_reduce_max_ps(max);
}

/* tr_f32_to_e4m3 (number.h), lane by lane. */
static void to_e4m3(uint8_t *out, const float *x, float factor, int n)
{
    const __m512i one = _mm512_set1_epi32(1);

    for (int i = 0; i < n; i += 16) {
        __mmask16 m = lanes(n - i);
        __m512 t = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), _mm512_set1_ps(factor));
        __m512 a = _mm512_min_ps(_mm512_abs_ps(t), _mm512_set1_ps(448.0f));
        __m512i u = _mm512_castps_si512(a);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 20), one);
        __m512i normal = _mm512_add_epi32(_mm512_add_epi32(u, odd),
                                          _mm512_set1_epi32(0x7ffff - ((127 - 7) << 23)));
        __m512i code = _mm512_srli_epi32(normal, 20);
        /* a + 2^14 has a unit of 2^-9 in its last place: rounded there, the code is its lowest bits */
        __m512i small =
            _mm512_and_si512(_mm512_castps_si512(_mm512_add_ps(a, _mm512_set1_ps(0x1p14f))),
                             _mm512_set1_epi32(0xff));
        code = _mm512_mask_mov_epi32(
            code, _mm512_cmp_ps_mask(a, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ), small);
        code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(t, t, _CMP_UNORD_Q),
                                     _mm512_set1_epi32(0x7f));
        __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(t), 24),
                                        _mm512_set1_epi32(0x80));
        _mm512_mask_cvtepi32_storeu_epi8(out + i, m, _mm512_or_si512(code, sign));
    }
}

/* 32 codes at a time: shifted into fp16 they are 2^-8 of their value, subnormals too, and the conversion to fp32 is
 * exact; the factor repairs the exponent together with the scale. */
static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    const __m256i quiet = _mm256_set1_epi8(0x7f);
    const __m512i keep = _mm512_set1_epi16((short)0xbf80);
    const __m512 factor = _mm512_set1_ps(scale * 256.0f), not_a_number = _mm512_set1_ps(NAN);

    for (int i = 0; i < n; i += 32) {
        __mmask16 m[2] = {lanes(n - i), lanes(n - i - 16)};
        __m256i code = _mm256_maskz_loadu_epi8(_mm512_kunpackw(m[1], m[0]), in + i);
        __m512i half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(code), 7), keep);
        __m512 x[2] = {_mm512_cvtph_ps(_mm512_castsi512_si256(half)),
                       _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))};
        __mmask32 nan = _mm256_cmpeq_epi8_mask(_mm256_and_si256(code, quiet), quiet);
        x[0] = _mm512_mul_ps(x[0], factor);
        x[1] = _mm512_mul_ps(x[1], factor);
        if (__builtin_expect(nan != 0, 0)) {
            x[0] = _mm512_mask_mov_ps(x[0], (__mmask16)nan, not_a_number);
            x[1] = _mm512_mask_mov_ps(x[1], (__mmask16)(nan >> 16), not_a_number);
        }
        _mm512_mask_storeu_ps(out + i, m[0], x[0]);
        _mm512_mask_storeu_ps(out + i + 16, m[1], x[1]);
    }
}

const struct tr_attention_kernels tr_attention_avx512 = {
    .dots = dots,
    .accumulate = accumulate,
    .scale_max = scale_max,
    .sum = sum,
    .relu_add = relu_add,
    .index_score = index_score,
    .max_abs = max_abs,
    .to_e4m3 = to_e4m3,
    .expand_e4m3 = expand_e4m3,
};

#endif
