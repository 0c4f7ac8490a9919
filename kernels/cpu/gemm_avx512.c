#include <config.h>

#include <immintrin.h>
#include <stdint.h>

#include "kernels/cpu/exp_avx512.h"

typedef __m512 vec;
enum { LANES = 16 };

#define v_zero()       _mm512_setzero_ps()
#define v_load(p)      _mm512_loadu_ps(p)
#define v_store(p, a)  _mm512_storeu_ps(p, a)
#define v_set1(p)      _mm512_set1_ps(*(p))
#define v_mul(a, b)    _mm512_mul_ps(a, b)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)

/* A dword is two bf16 of a lane: k in the low half, k + 1 in the high half. */
static inline __attribute__((always_inline)) void v_bf16(__m512 w[4], const uint8_t *group,
                                                         int i_vec)
{
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    __m512i a = _mm512_loadu_si512(group), b = _mm512_loadu_si512(group + 64);
    (void)i_vec;
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(a, high));
    w[2] = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    w[3] = _mm512_castsi512_ps(_mm512_and_si512(b, high));
}

/* e4m3 shifted into fp16 is 2^-8 of its value, subnormals too, and the conversion to fp32 is exact
 * and takes no microcode assist on subnormals (multiplying an fp32 subnormal by 2^120 does: 38 ns
 * instead of 1 on a 2.7 GHz Xeon). Group: word l has lane l's k 0 and 1 in its low and high byte,
 * word 16 + l its k 2 and 3. */
static inline __attribute__((always_inline)) void v_e4m3(__m512 w[4], const uint8_t *group,
                                                         int i_vec)
{
    const __m512i keep = _mm512_set1_epi16((short)0xbf80);
    __m512i code = _mm512_loadu_si512(group);
    __m512i odd = _mm512_and_si512(_mm512_srai_epi16(code, 1), keep);
    __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(code, 8), 1), keep);
    (void)i_vec;
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(even));
    w[1] = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
    w[2] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
    w[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
}
#define E4M3_UNIT 256.0f

/* 32 registers: at most 24 accumulators. */
/* clang-format off */
#define TILES_P(X, f, R) X(f, R, 1) X(f, R, 2) X(f, R, 4)
#define TILES(X)                                                                                   \
    TILES_P(X, E4M3, 1) TILES_P(X, E4M3, 2) TILES_P(X, E4M3, 3) TILES_P(X, E4M3, 4)                \
    TILES_P(X, BF16, 1) TILES_P(X, BF16, 2) TILES_P(X, BF16, 3) TILES_P(X, BF16, 4)                \
    TILES_P(X, F32, 1) TILES_P(X, F32, 2) TILES_P(X, F32, 3) TILES_P(X, F32, 4)                    \
    TILES_P(X, F32, 5) TILES_P(X, F32, 6)
/* clang-format on */
enum { DIRECT_ROWS = 4, buffered_panels = 4 };
#define direct_panels(rows) 4

#include "kernels/cpu/gemm_tile.h"

/* clang-format off */
#define LANE(l) 2 * (l), 2 * (l) + 1, 2 * (l) + 32, 2 * (l) + 33
static const uint8_t order[64] = {
    LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7),
    LANE(8), LANE(9), LANE(10), LANE(11), LANE(12), LANE(13), LANE(14), LANE(15),
};
/* clang-format on */

/* Lanes below n. */
static inline __mmask16 first(int n)
{
    unsigned lanes = n >= 16 ? 0xffffu : (1u << n) - 1u;
    return (__mmask16)lanes;
}

/* Four chains; chain c takes the vectors c, c + 4, ... */
static float dot(const float *a, const float *b, int n)
{
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                   _mm512_setzero_ps()};
    int i = 0;
    for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++)
            s[c] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * c), _mm512_loadu_ps(b + i + 16 * c),
                                   s[c]);
    for (; i < n; i += 16) {
        __mmask16 m = first(n - i);
        s[0] =
            _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, a + i), _mm512_maskz_loadu_ps(m, b + i), s[0]);
    }
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}

static void axpy(float *y, float a, const float *x, int n)
{
    __m512 va = _mm512_set1_ps(a);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = first(n - i);
        __m512 r =
            _mm512_fmadd_ps(va, _mm512_maskz_loadu_ps(m, x + i), _mm512_maskz_loadu_ps(m, y + i));
        _mm512_mask_storeu_ps(y + i, m, r);
    }
}

static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    const __m256i keep = _mm256_set1_epi16((short)0xbf80);
    const __m128i nan = _mm_set1_epi8(0x7f);
    __m512 unit = _mm512_set1_ps(E4M3_UNIT), s = _mm512_set1_ps(scale);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = first(n - i);
        __m128i code = _mm_maskz_loadu_epi8(m, in + i);
        __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(code), 7), keep);
        __m512 w = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(half), unit), s);
        __mmask16 is_nan = _mm_cmpeq_epi8_mask(_mm_and_si128(code, nan), nan);
        w = _mm512_mask_mov_ps(w, is_nan, _mm512_set1_ps(__builtin_nanf("")));
        _mm512_mask_storeu_ps(out + i, m, w);
    }
}

static void expand_bf16(float *out, const uint16_t *in, int n)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = first(n - i);
        __m512i w = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, in + i));
        _mm512_mask_storeu_ps(out + i, m, _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)));
    }
}

static void exp_sub(float *x, float max, int n)
{
    __m512 vmax = _mm512_set1_ps(max);
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = first(n - i);
        __m512 r = tr_exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), vmax));
        _mm512_mask_storeu_ps(x + i, m, r);
    }
}

/* Four streams at once: one stream alone is held back by the prefetcher at page borders. */
static uint64_t read_sum(const void *p, size_t n)
{
    const char *at = p;
    size_t part = n / 4 / 64 * 64;
    __m512i s[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                    _mm512_setzero_si512()};
    for (size_t i = 0; i < part; i += 64)
        for (int k = 0; k < 4; k++)
            s[k] = _mm512_xor_si512(s[k], _mm512_loadu_si512(at + (size_t)k * part + i));
    s[0] = _mm512_xor_si512(_mm512_xor_si512(s[0], s[1]), _mm512_xor_si512(s[2], s[3]));
    return (uint64_t)_mm512_reduce_or_epi64(s[0]);
}

static float fma_loop(long n)
{
    __m512 acc[12], x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps((float)n);
#pragma GCC unroll 12
    for (int k = 0; k < 12; k++)
        acc[k] = _mm512_set1_ps((float)k);
    for (long i = 0; i < n; i++)
#pragma GCC unroll 12
        for (int k = 0; k < 12; k++)
            acc[k] = _mm512_fmadd_ps(acc[k], x, y);
#pragma GCC unroll 12
    for (int k = 1; k < 12; k++)
        acc[0] = _mm512_add_ps(acc[0], acc[k]);
    return _mm512_reduce_add_ps(acc[0]);
}

/* Low words of the 16 lanes, then the high ones. */
static unsigned e4m3_arrange(uint8_t *groups, int n_groups)
{
    const __m512i low = _mm512_set_epi16(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0,
                                         30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i from = _mm512_mask_add_epi16(low, 0xffff0000u, low, _mm512_set1_epi16(1));
    const __m512i magnitude = _mm512_set1_epi8(0x7f);
    __mmask64 nan = 0;
    for (; n_groups > 0; n_groups--, groups += TR_PACK_ALIGN) {
        __m512i code = _mm512_loadu_si512(groups);
        nan |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(code, magnitude), magnitude);
        _mm512_storeu_si512(groups, _mm512_permutexvar_epi16(from, code));
    }
    __m512i bytes = _mm512_movm_epi8(nan);
    return _mm512_test_epi32_mask(bytes, bytes);
}

/* 16 rows of 16 words: words, pairs and fours of words trade places. Row r of `a` becomes column r. */
static inline __attribute__((always_inline)) void transpose16(__m512i a[16])
{
    TR_SCRATCH __m512i b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4 q + c], 128 bits each: word 4 l + c of the rows 4 q ... 4 q + 3, in quarter l */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i even_low = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
        __m512i even_high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
        b[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        b[c + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        b[c + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        b[c + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        a[i] = b[i];
}

/* Words [w, w + 16) of the rows; n of them exist. */
static inline __attribute__((always_inline)) void
transpose_words(uint8_t *out, const uint8_t *const row[TR_PANEL], int w, int n)
{
    const __mmask16 m = first(n);
    TR_SCRATCH __m512i a[16];

#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        a[i] = n >= 16 ? _mm512_loadu_si512(row[i] + 4 * w)
                       : _mm512_maskz_loadu_epi32(m, row[i] + 4 * w);
    transpose16(a);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (i < n) _mm512_storeu_si512(out + i * TR_PACK_ALIGN, a[i]);
}

static void transpose(uint8_t *out, const uint8_t *const row[TR_PANEL], int n_words)
{
    int w = 0;

    for (; w + 16 <= n_words; w += 16)
        transpose_words(out + w * TR_PACK_ALIGN, row, w, 16);
    if (w < n_words) transpose_words(out + w * TR_PACK_ALIGN, row, w, n_words - w);
}

#include "kernels/cpu/gemm_turned.h"

/* The rows behind the first n. */
static tr_gemm rows_from(const tr_gemm *g, int n)
{
    tr_gemm rest = *g;

    rest.n_rows -= n;
    if (g->row_index)
        rest.row_index += n;
    else
        rest.x += (size_t)n * g->ldx;
    if (g->out_index)
        rest.out_index += n;
    else
        rest.y += (size_t)n * g->ldy;
    return rest;
}

/* Up to 32 rows in two parts: weights that are read twice take less time than those that pass through a buffer. */
static void gemm_512(const tr_gemm *g, tr_pieces *pieces)
{
    const int first = g->n_rows > TURNED_MAX ? (g->n_rows + 1) / 2 : g->n_rows;
    tr_gemm part = *g;

    if (g->n_rows < TURNED_MIN || g->n_rows > 2 * TURNED_MAX) {
        gemm(g, pieces);
        return;
    }
    part.n_rows = first;
    gemm_turned(&part, pieces);
    if (first == g->n_rows) return;
    part = rows_from(g, first);
    gemm_turned(&part, pieces);
}

const tr_cpu_kernels tr_cpu_avx512 = {
    .gemm = gemm_512,
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
    .fma_width = 12 * 16,
    .attention = &tr_attention_avx512,
};
