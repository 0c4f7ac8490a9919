/* The inner loops of attention with AVX2, FMA and F16C. Loops over small constant counts are unrolled, so that the
 * accumulators named as arrays live in registers. */
#include <config.h>

#ifdef TR_HAVE_X86_SIMD

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/number.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* All ones in the first n lanes. */
INLINE __m256i lanes(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Lane j of the result is the sum of acc[j]'s lanes, the same tree for every j. */
INLINE __m256 sum_each(const __m256 acc[8])
{
    __m256 lo = _mm256_hadd_ps(_mm256_hadd_ps(acc[0], acc[1]), _mm256_hadd_ps(acc[2], acc[3]));
    __m256 hi = _mm256_hadd_ps(_mm256_hadd_ps(acc[4], acc[5]), _mm256_hadd_ps(acc[6], acc[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(lo, hi, 0x20),
                         _mm256_permute2f128_ps(lo, hi, 0x31));
}

/* Fills the row's and key's 8 numbers: all, or those of the mask. */
INLINE __m256 load(const float *x, int full, __m256i m)
{
    return full ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, m);
}

INLINE void dots_step(__m256 acc[8], const float *q, size_t ld_q, int n_q, const float *const *k,
                      int i, int full, __m256i m)
{
    const int n_k = 8 / n_q;
    __m256 row[2];

    UNROLL for (int r = 0; r < n_q; r++) row[r] = load(q + (size_t)r * ld_q + i, full, m);
    UNROLL for (int s = 0; s < n_k; s++)
    {
        __m256 key = load(k[s] + i, full, m);
        UNROLL for (int r = 0; r < n_q; r++)
        {
            acc[r * n_k + s] = _mm256_fmadd_ps(row[r], key, acc[r * n_k + s]);
        }
    }
}

/* n_q rows (1 or 2) by 8 / n_q keys: 8 accumulators. */
INLINE void dots_block(float *out, const float *q, size_t ld_q, int n_q, const float *const *k,
                       int d)
{
    __m256 acc[8];
    int i = 0;

    UNROLL for (int j = 0; j < 8; j++) acc[j] = _mm256_setzero_ps();
    for (; i + 8 <= d; i += 8)
        dots_step(acc, q, ld_q, n_q, k, i, 1, _mm256_setzero_si256());
    if (i < d) dots_step(acc, q, ld_q, n_q, k, i, 0, lanes(d - i));
    __m256 t = sum_each(acc);
    if (n_q == 1) {
        _mm256_storeu_ps(out, t);
    } else {
        _mm_storeu_ps(out, _mm256_castps256_ps128(t));
        _mm_storeu_ps(out + TR_KEY_BLOCK, _mm256_extractf128_ps(t, 1));
    }
}

/* Four keys at a time stay in L1 while all rows pass; a last odd row takes eight at once. */
static void dots(float *out, tr_tile q, tr_tile k, int d)
{
    const float *key[TR_KEY_BLOCK];
    int last = q.n / 2 * 2;

    /* Blocks run past the last key: they read it again. */
    for (int s = 0; s < TR_KEY_BLOCK; s++)
        key[s] = k.x + (size_t)(s < k.n ? s : k.n - 1) * k.ld;
    for (int s = 0; s < k.n; s += 4)
        for (int r = 0; r < last; r += 2)
            dots_block(out + r * TR_KEY_BLOCK + s, q.x + (size_t)r * q.ld, q.ld, 2, key + s, d);
    for (int s = 0; last < q.n && s < k.n; s += 8)
        dots_block(out + last * TR_KEY_BLOCK + s, q.x + (size_t)last * q.ld, q.ld, 1, key + s, d);
}

/* Up to 4 rows by up to 16 columns. */
INLINE void accumulate_block(float *y, size_t ld_y, const float *p, const float *keep,
                             const int *n_keys, int n_rows, const float *v, size_t ld_v, int width)
{
    __m256 acc[4][2], x[2];
    __m256i m[2] = {lanes(width), lanes(width - 8)};
    int common = n_keys[0];

    UNROLL for (int r = 0; r < n_rows; r++)
    {
        common = n_keys[r] < common ? n_keys[r] : common;
        UNROLL for (int j = 0; j < 2; j++)
        {
            acc[r][j] = _mm256_setzero_ps();
            if (keep[r] != 0.0f)
                acc[r][j] = _mm256_mul_ps(_mm256_maskload_ps(y + (size_t)r * ld_y + 8 * j, m[j]),
                                          _mm256_set1_ps(keep[r]));
        }
    }
    for (int s = 0; s < common; s++) {
        UNROLL for (int j = 0; j < 2; j++)
        {
            x[j] = _mm256_maskload_ps(v + (size_t)s * ld_v + 8 * j, m[j]);
        }
        UNROLL for (int r = 0; r < n_rows; r++)
        {
            __m256 w = _mm256_set1_ps(p[r * TR_KEY_BLOCK + s]);
            UNROLL for (int j = 0; j < 2; j++) acc[r][j] = _mm256_fmadd_ps(w, x[j], acc[r][j]);
        }
    }
    UNROLL for (int r = 0; r < n_rows; r++)
    {
        for (int s = common; s < n_keys[r]; s++) {
            __m256 w = _mm256_set1_ps(p[r * TR_KEY_BLOCK + s]);
            UNROLL for (int j = 0; j < 2; j++)
            {
                x[j] = _mm256_maskload_ps(v + (size_t)s * ld_v + 8 * j, m[j]);
                acc[r][j] = _mm256_fmadd_ps(w, x[j], acc[r][j]);
            }
        }
        UNROLL for (int j = 0; j < 2; j++)
        {
            _mm256_maskstore_ps(y + (size_t)r * ld_y + 8 * j, m[j], acc[r][j]);
        }
    }
}

static void accumulate(float *y, size_t ld_y, const float *p, const float *keep, const int *n_keys,
                       int n_rows, const float *v, size_t ld_v, int d)
{
    for (int i = 0; i < d; i += 16) /* these columns of v stay in L1 while all rows pass */
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

INLINE float join_max(__m256 x)
{
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}

static float scale_max(float *x, float scale, int n)
{
    __m256 max = _mm256_set1_ps(-INFINITY);

    for (int i = 0; i < n; i += 8) {
        __m256i m = lanes(n - i);
        __m256 t = _mm256_mul_ps(_mm256_maskload_ps(x + i, m), _mm256_set1_ps(scale));
        _mm256_maskstore_ps(x + i, m, t);
        t = _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), t, _mm256_castsi256_ps(m));
        max = _mm256_max_ps(t, max);
    }
    return join_max(max);
}

static float sum(const float *x, int n)
{
    __m256 acc = _mm256_setzero_ps();

    for (int i = 0; i < n; i += 8)
        acc = _mm256_add_ps(acc, _mm256_maskload_ps(x + i, lanes(n - i)));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}

static void relu_add(float *acc, const float *products, const float *w, int n_heads)
{
    __m256 sums[8];

    UNROLL for (int j = 0; j < 8; j++) sums[j] = _mm256_loadu_ps(acc + 8 * j);
    for (int h = 0; h < n_heads; h++) {
        UNROLL for (int j = 0; j < 8; j++)
        {
            /* max gives its second operand when one is NaN: NaN stays */
            __m256 x = _mm256_max_ps(_mm256_setzero_ps(),
                                     _mm256_loadu_ps(products + h * TR_KEY_BLOCK + 8 * j));
            sums[j] = _mm256_fmadd_ps(_mm256_set1_ps(w[h]), x, sums[j]);
        }
    }
    UNROLL for (int j = 0; j < 8; j++) _mm256_storeu_ps(acc + 8 * j, sums[j]);
}

static void index_score(float *score, const float *acc, const float *key_scale, int n)
{
    for (int i = 0; i < n; i += 8) {
        __m256i m = lanes(n - i);
        __m256 x = _mm256_maskload_ps(acc + i, m);
        if (key_scale) x = _mm256_mul_ps(x, _mm256_maskload_ps(key_scale + i, m));
        x = _mm256_add_ps(x, _mm256_setzero_ps()); /* -0 + +0 is +0 */
        x = _mm256_blendv_ps(x, _mm256_set1_ps(-INFINITY), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        _mm256_maskstore_ps(score + i, m, x);
    }
}

INLINE __m256 absolute(__m256 x)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

static float max_abs(const float *x, int n)
{
    __m256 max = _mm256_setzero_ps();

    for (int i = 0; i < n; i += 8)
        max = _mm256_max_ps(absolute(_mm256_maskload_ps(x + i, lanes(n - i))), max);
    return join_max(max);
}

INLINE __m256i choose(__m256i a, __m256i b, __m256 take_b)
{
    return _mm256_blendv_epi8(a, b, _mm256_castps_si256(take_b));
}

/* tr_f32_to_e4m3 (number.h), lane by lane. */
static void to_e4m3(uint8_t *out, const float *x, float factor, int n)
{
    for (int i = 0; i < n; i += 8) {
        __m256 t = _mm256_mul_ps(_mm256_maskload_ps(x + i, lanes(n - i)), _mm256_set1_ps(factor));
        __m256 a = _mm256_min_ps(absolute(t), _mm256_set1_ps(448.0f));
        __m256i u = _mm256_castps_si256(a);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 20), _mm256_set1_epi32(1));
        __m256i code =
            _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd),
                                               _mm256_set1_epi32(0x7ffff - ((127 - 7) << 23))),
                              20);
        /* a + 2^14 has a unit of 2^-9 in its last place: rounded there, the code is its lowest bits */
        __m256i small =
            _mm256_and_si256(_mm256_castps_si256(_mm256_add_ps(a, _mm256_set1_ps(0x1p14f))),
                             _mm256_set1_epi32(0xff));
        code = choose(code, small, _mm256_cmp_ps(a, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ));
        code = choose(code, _mm256_set1_epi32(0x7f), _mm256_cmp_ps(t, t, _CMP_UNORD_Q));
        code = _mm256_or_si256(code, _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(t), 24),
                                                      _mm256_set1_epi32(0x80)));
        __m128i words =
            _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        uint64_t bytes = (uint64_t)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
        memcpy(out + i, &bytes, n - i >= 8 ? 8 : (size_t)(n - i));
    }
}

/* Codes shifted into fp16 are 2^-8 of their value, subnormals too, and the conversion to fp32 is exact; the factor
 * repairs the exponent together with the scale. */
static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    const __m128i quiet = _mm_set1_epi8(0x7f);
    const __m256i keep = _mm256_set1_epi16((short)0xbf80);
    const __m256 factor = _mm256_set1_ps(scale * 256.0f);
    int i = 0;

    for (; i + 16 <= n; i += 16) {
        __m128i code = _mm_loadu_si128((const __m128i *)(const void *)(in + i));
        if (_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(code, quiet), quiet))) {
            for (int j = i; j < i + 16; j++)
                out[j] = tr_e4m3_to_f32(in[j]) * scale;
            continue;
        }
        __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(code), 7), keep);
        _mm256_storeu_ps(out + i,
                         _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), factor));
        _mm256_storeu_ps(out + i + 8,
                         _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), factor));
    }
    for (; i < n; i++) /* exact too, up to the one product with the scale */
        out[i] = tr_e4m3_to_f32(in[i]) * scale;
}

const struct tr_attention_kernels tr_attention_avx2 = {
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
