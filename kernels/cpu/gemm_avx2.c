#include <config.h>

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef __m256 vec;
enum { LANES = 8 };

#define v_zero()       _mm256_setzero_ps()
#define v_load(p)      _mm256_loadu_ps(p)
#define v_store(p, a)  _mm256_storeu_ps(p, a)
#define v_set1(p)      _mm256_broadcast_ss(p)
#define v_mul(a, b)    _mm256_mul_ps(a, b)
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)

/* A dword is two bf16 of a lane: k in the low half, k + 1 in the high half. */
static inline __attribute__((always_inline)) void v_bf16(__m256 w[4], const uint8_t *group,
                                                         int i_vec)
{
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    const __m256i *at = (const __m256i *)(const void *)(group + 32 * i_vec);
    __m256i a = _mm256_loadu_si256(at), b = _mm256_loadu_si256(at + 2);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(a, high));
    w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(b, high));
}

/* As in gemm_avx512.c, through fp16. Group: 32 bytes per vector; word l has its lane l's k 0 and 1
 * in its low and high byte, word 8 + l its k 2 and 3. */
static inline __attribute__((always_inline)) void v_e4m3(__m256 w[4], const uint8_t *group,
                                                         int i_vec)
{
    const __m256i keep = _mm256_set1_epi16((short)0xbf80);
    __m256i code = _mm256_loadu_si256((const __m256i *)(const void *)(group + 32 * i_vec));
    __m256i odd = _mm256_and_si256(_mm256_srai_epi16(code, 1), keep);
    __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(code, 8), 1), keep);
    w[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(even));
    w[1] = _mm256_cvtph_ps(_mm256_castsi256_si128(odd));
    w[2] = _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1));
    w[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1));
}
#define E4M3_UNIT 256.0f

/* 16 registers: 8 accumulators beside an expansion, 12 without. */
/* clang-format off */
#define TILES_DIRECT(X, f)                                                                         \
    X(f, 1, 1) X(f, 1, 2) X(f, 1, 4) X(f, 2, 1) X(f, 2, 2) X(f, 3, 1) X(f, 4, 1)
#define TILES(X) TILES_DIRECT(X, E4M3) TILES_DIRECT(X, BF16) TILES_DIRECT(X, F32)                  \
    X(F32, 5, 1) X(F32, 6, 1)
/* clang-format on */
enum { DIRECT_ROWS = 4, buffered_panels = 1 };
#define direct_panels(rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)

#include "kernels/cpu/gemm_tile.h"

/* clang-format off */
#define LANE(l) (l) / 8 * 32 + (l) % 8 * 2, (l) / 8 * 32 + (l) % 8 * 2 + 1, \
                (l) / 8 * 32 + (l) % 8 * 2 + 16, (l) / 8 * 32 + (l) % 8 * 2 + 17
static const uint8_t order[64] = {
    LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7),
    LANE(8), LANE(9), LANE(10), LANE(11), LANE(12), LANE(13), LANE(14), LANE(15),
};
/* clang-format on */

/* The first n of 8 floats, the rest 0; and back. A tail goes through the same vector code, so that
 * an element's bits do not depend on where it stands. */
static inline __m256 load_first(const float *p, int n)
{
    float t[8] = {0};
    if (n >= 8) return _mm256_loadu_ps(p);
    memcpy(t, p, (size_t)n * sizeof *t);
    return _mm256_loadu_ps(t);
}

static inline void store_first(float *p, __m256 v, int n)
{
    float t[8];
    if (n >= 8) {
        _mm256_storeu_ps(p, v);
        return;
    }
    _mm256_storeu_ps(t, v);
    memcpy(p, t, (size_t)n * sizeof *t);
}

/* Four chains; chain c takes the vectors c, c + 4, ... */
static float dot(const float *a, const float *b, int n)
{
    __m256 s[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                   _mm256_setzero_ps()};
    float t[8];
    int i = 0;
    for (; i + 32 <= n; i += 32)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++)
            s[c] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * c), _mm256_loadu_ps(b + i + 8 * c),
                                   s[c]);
    for (; i < n; i += 8)
        s[0] = _mm256_fmadd_ps(load_first(a + i, n - i), load_first(b + i, n - i), s[0]);
    _mm256_storeu_ps(t, _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
    return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}

static void axpy(float *y, float a, const float *x, int n)
{
    __m256 va = _mm256_set1_ps(a);
    for (int i = 0; i < n; i += 8)
        store_first(y + i, _mm256_fmadd_ps(va, load_first(x + i, n - i), load_first(y + i, n - i)),
                    n - i);
}

static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    const __m128i keep = _mm_set1_epi16((short)0xbf80), nan = _mm_set1_epi16(0x3f80);
    __m256 unit = _mm256_set1_ps(E4M3_UNIT), s = _mm256_set1_ps(scale);
    for (int i = 0; i < n; i += 8) {
        uint8_t tail[8] = {0};
        memcpy(tail, in + i, n - i < 8 ? (size_t)(n - i) : 8);
        __m128i code = _mm_loadl_epi64((const __m128i *)(const void *)tail);
        __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(code), 7), keep);
        __m256 w = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(half), unit), s);
        __m128i is_nan = _mm_cmpeq_epi16(_mm_and_si128(half, nan), nan);
        w = _mm256_or_ps(w, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(is_nan)));
        store_first(out + i, w, n - i);
    }
}

static void expand_bf16(float *out, const uint16_t *in, int n)
{
    for (int i = 0; i < n; i += 8) {
        uint16_t tail[8] = {0};
        memcpy(tail, in + i, (n - i < 8 ? (size_t)(n - i) : 8) * sizeof *tail);
        __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)tail));
        store_first(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), n - i);
    }
}

/* exp(x) = 2^n p(r), as in gemm_avx512.c. */
static inline __m256 v_exp(__m256 x)
{
    x = _mm256_max_ps(_mm256_set1_ps(-104.0f), x); /* in this order: max and min return */
    x = _mm256_min_ps(_mm256_set1_ps(89.0f), x);   /* their second operand on NaN */
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040.0f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i k = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(k, 1);
    __m256i bias = _mm256_set1_epi32(127);
    __m256i rest = _mm256_sub_epi32(k, half);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(p,
                         _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

static void exp_sub(float *x, float max, int n)
{
    __m256 vmax = _mm256_set1_ps(max);
    for (int i = 0; i < n; i += 8)
        store_first(x + i, v_exp(_mm256_sub_ps(load_first(x + i, n - i), vmax)), n - i);
}

/* Four streams at once: one stream alone is held back by the prefetcher at page borders. */
static uint64_t read_sum(const void *p, size_t n)
{
    const char *at = p;
    size_t part = n / 4 / 64 * 64;
    __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                    _mm256_setzero_si256()};
    uint64_t out[4];
    for (size_t i = 0; i < part; i += 32)
        for (int k = 0; k < 4; k++)
            s[k] = _mm256_xor_si256(
                s[k], _mm256_loadu_si256((const __m256i *)(at + (size_t)k * part + i)));
    s[0] = _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3]));
    _mm256_storeu_si256((__m256i *)out, s[0]);
    return out[0] | out[1] | out[2] | out[3];
}

static float fma_loop(long n)
{
    __m256 acc[12], x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps((float)n);
    float out[8], sum = 0;
#pragma GCC unroll 12
    for (int k = 0; k < 12; k++)
        acc[k] = _mm256_set1_ps((float)k);
    for (long i = 0; i < n; i++)
#pragma GCC unroll 12
        for (int k = 0; k < 12; k++)
            acc[k] = _mm256_fmadd_ps(acc[k], x, y);
#pragma GCC unroll 12
    for (int k = 1; k < 12; k++)
        acc[0] = _mm256_add_ps(acc[0], acc[k]);
    _mm256_storeu_ps(out, acc[0]);
    for (int k = 0; k < 8; k++)
        sum += out[k];
    return sum;
}

/* In each half of a group the low words of its 8 lanes, then the high ones. */
static unsigned e4m3_arrange(uint8_t *groups, int n_groups)
{
    const __m256i words = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0,
                                           1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256i magnitude = _mm256_set1_epi8(0x7f);
    __m256i nan[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    unsigned lanes = 0;

    for (int i = 0; i < 2 * n_groups; i++, groups += 32) {
        __m256i *at = (__m256i *)(void *)groups, code = _mm256_loadu_si256(at);
        __m256i is_nan = _mm256_cmpeq_epi8(_mm256_and_si256(code, magnitude), magnitude);
        nan[i % 2] = _mm256_or_si256(nan[i % 2], is_nan);
        code = _mm256_shuffle_epi8(code, words);
        _mm256_storeu_si256(at, _mm256_permute4x64_epi64(code, 0xd8));
    }
    for (int half = 0; half < 2; half++) {
        __m256i none = _mm256_cmpeq_epi32(nan[half], _mm256_setzero_si256());
        unsigned some = ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(none)) & 0xffu;
        lanes |= some << 8 * half;
    }
    return lanes;
}

/* 8 rows of 8 words. Row r of `a` becomes column r. */
static inline void transpose8(__m256i a[8])
{
    __m256i b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        b[c] = _mm256_permute2x128_si256(a[c], a[c + 4], 0x20);
        b[c + 4] = _mm256_permute2x128_si256(a[c], a[c + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] = b[i];
}

static void transpose(uint8_t *out, const uint8_t *const row[TR_PANEL], int n_words)
{
    int w = 0;
    for (; w + 8 <= n_words; w += 8)
        for (int half = 0; half < 2; half++) {
            __m256i a[8];
            uint8_t *to = out + w * TR_PACK_ALIGN + half * 32;
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                a[i] =
                    _mm256_loadu_si256((const __m256i *)(const void *)(row[8 * half + i] + 4 * w));
            transpose8(a);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(void *)(to + i * TR_PACK_ALIGN), a[i]);
        }
    for (; w < n_words; w++)
        for (int lane = 0; lane < TR_PANEL; lane++)
            memcpy(out + w * TR_PACK_ALIGN + 4 * lane, row[lane] + 4 * w, 4);
}

const tr_cpu_kernels tr_cpu_avx2 = {
    .gemm = gemm,
    .e4m3_order = order,
    .e4m3_arrange = e4m3_arrange,
    .transpose = transpose,
    .dot = dot,
    .axpy = axpy,
    .expand_e4m3 = expand_e4m3,
    .expand_bf16 = expand_bf16,
    .exp_sub = exp_sub,
    .read_sum = read_sum,
    .fma_loop = fma_loop,
    .fma_width = 12 * 8,
    .attention = &tr_attention_avx2,
};
