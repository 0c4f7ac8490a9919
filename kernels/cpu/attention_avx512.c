/* The inner loops of attention with AVX-512 (F, BW, VL, DQ). Loops over small constant counts are unrolled, so that the
 * accumulators named as arrays live in registers. */
#include <config.h>

#ifdef TR_HAVE_X86_SIMD

#include <immintrin.h>
#include <math.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/number.h"

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
    TR_SCRATCH __m512 two[8], four[4], lo, hi;

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
    TR_SCRATCH __m512 row[4];

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
    TR_SCRATCH __m512 acc[16];
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
    TR_SCRATCH const float *key[TR_KEY_BLOCK], *rest = q.x + (size_t)(q.n / 4 * 4) * q.ld;
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

/* Row i of the result is lane i of the rows. */
INLINE void transpose_16(__m512 x[16])
{
    TR_SCRATCH __m512 t[16], u[16];

    UNROLL for (int i = 0; i < 16; i += 2)
    {
        t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4)
    {
        UNROLL for (int j = 0; j < 2; j++)
        {
            __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    /* Quarter l of u[4 r + c] holds lane 4 l + c of rows 4 r to 4 r + 3. */
    UNROLL for (int c = 0; c < 4; c++)
    {
        __m512 even = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
        __m512 odd = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
        __m512 even_2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
        __m512 odd_2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
        x[c] = _mm512_shuffle_f32x4(even, even_2, 0x88);
        x[4 + c] = _mm512_shuffle_f32x4(odd, odd_2, 0x88);
        x[8 + c] = _mm512_shuffle_f32x4(even, even_2, 0xdd);
        x[12 + c] = _mm512_shuffle_f32x4(odd, odd_2, 0xdd);
    }
}

static void turn(float *out, tr_tile k, int d)
{
    for (int s = 0; s < TR_KEY_BLOCK; s += 16, out += 16) {
        for (int i = 0; i < d; i += 16) {
            TR_SCRATCH __m512 x[16];
            UNROLL for (int j = 0; j < 16; j++)
            {
                x[j] = s + j < k.n
                           ? _mm512_maskz_loadu_ps(lanes(d - i), k.x + (size_t)(s + j) * k.ld + i)
                           : _mm512_setzero_ps();
            }
            transpose_16(x);
            UNROLL for (int j = 0; j < 16; j++)
            {
                if (i + j < d) _mm512_storeu_ps(out + (size_t)(i + j) * TR_KEY_BLOCK, x[j]);
            }
        }
    }
}

/* Up to 6 rows and all keys: 24 accumulators. */
INLINE void scores_block(float *p, const float *q, size_t ld_q, int n_rows, const float *turned,
                         int d)
{
    TR_SCRATCH __m512 acc[6][4], key[4];

    UNROLL for (int r = 0; r < n_rows; r++)
    {
        UNROLL for (int j = 0; j < 4; j++) acc[r][j] = _mm512_setzero_ps();
    }
    for (int i = 0; i < d; i++, turned += TR_KEY_BLOCK) {
        UNROLL for (int j = 0; j < 4; j++) key[j] = _mm512_loadu_ps(turned + 16 * j);
        UNROLL for (int r = 0; r < n_rows; r++)
        {
            __m512 x = _mm512_set1_ps(q[(size_t)r * ld_q + (size_t)i]);
            UNROLL for (int j = 0; j < 4; j++) acc[r][j] = _mm512_fmadd_ps(x, key[j], acc[r][j]);
        }
    }
    UNROLL for (int r = 0; r < n_rows; r++)
    {
        UNROLL for (int j = 0; j < 4; j++)
            _mm512_storeu_ps(p + r * TR_KEY_BLOCK + 16 * j, acc[r][j]);
    }
}

static void scores(float *p, tr_tile q, const float *turned, int d)
{
    int r = 0;

    for (; r + 6 <= q.n; r += 6)
        scores_block(p + r * TR_KEY_BLOCK, q.x + (size_t)r * q.ld, q.ld, 6, turned, d);
    for (; r + 4 <= q.n; r += 4)
        scores_block(p + r * TR_KEY_BLOCK, q.x + (size_t)r * q.ld, q.ld, 4, turned, d);
    for (; r + 2 <= q.n; r += 2)
        scores_block(p + r * TR_KEY_BLOCK, q.x + (size_t)r * q.ld, q.ld, 2, turned, d);
    if (r < q.n) scores_block(p + r * TR_KEY_BLOCK, q.x + (size_t)r * q.ld, q.ld, 1, turned, d);
}

/* Masked loads cost a vector operation each: not where all 16 are there. */
INLINE __m512 load(const float *x, int full, __mmask16 m)
{
    return full ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(m, x);
}

/* Up to 6 rows by up to 64 columns; full: by 64. */
INLINE void accumulate_block(float *y, size_t ld_y, const float *p, const float *keep,
                             const int *n_keys, int n_rows, const float *v, size_t ld_v, int width,
                             int full)
{
    TR_SCRATCH __m512 acc[6][4], x[4];
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
            x[j] = load(v + (size_t)s * ld_v + 16 * j, full, m[j]);
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
        for (int r = 0, step = 4; r < n_rows; r += step) {
            float *to = y + (size_t)r * ld_y + i;
            const float *pr = p + r * TR_KEY_BLOCK;
            int n = n_rows - r;
            step = n >= 6 && d - i >= 64 ? 6 : 4;
            if (step == 6)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 6, v + i, ld_v, 64, 1);
            else if (n >= 4 && d - i >= 64)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 4, v + i, ld_v, 64, 1);
            else if (n >= 4)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 4, v + i, ld_v, d - i, 0);
            else if (n == 3)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 3, v + i, ld_v, d - i, 0);
            else if (n == 2)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 2, v + i, ld_v, d - i, 0);
            else
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 1, v + i, ld_v, d - i, 0);
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

/* ---- the indexer ---- */

enum { LANES = 4, GROUP = 4 * LANES };

/* Codes to 2^-8 of their value in fp16, subnormals too (which the conversion to fp32 takes in its stride). */
INLINE __m512i halves_of(__m256i code)
{
    return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(code), 7),
                            _mm512_set1_epi16((short)0xbf80));
}

/* 16 numbers of the keys s, s + 4, s + 8, s + 12 of a group: 4 dwords of each, transposed to 4 dwords of all. */
INLINE __m512i four_keys(const uint8_t *code, size_t ld)
{
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(const void *)code));

    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)(code + 4 * ld)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)(code + 8 * ld)), 2);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)(code + 12 * ld)), 3);
    return _mm512_permutexvar_epi32(transpose, x);
}

/* The low and the high 16 of 32 halves as fp32. */
INLINE __m512 from_half(__m512i half, int high)
{
    return _mm512_cvtph_ps(high ? _mm512_extracti64x4_epi64(half, 1)
                                : _mm512_castsi512_si256(half));
}

/* One group; returns whether there are NaN among the codes, which come out as numbers. */
static int group_tile(float *tile, const uint8_t *code, int d)
{
    const __m512i quiet = _mm512_set1_epi8(0x7f);
    __m512i largest = _mm512_setzero_si512();

    for (int i = 0; i < d; i += 16) {
        UNROLL for (int s = 0; s < 4; s++)
        {
            float *to = tile + i * GROUP + s * GROUP;
            __m512i x = four_keys(code + s * d + i, (size_t)d);
            __m512i lo = halves_of(_mm512_castsi512_si256(x));
            __m512i hi = halves_of(_mm512_extracti64x4_epi64(x, 1));
            largest = _mm512_max_epu8(largest, _mm512_and_si512(x, quiet));
            /* four numbers of the keys make a vector; the next four follow after all four s */
            _mm512_storeu_ps(to, from_half(lo, 0));
            _mm512_storeu_ps(to + 4 * GROUP, from_half(lo, 1));
            _mm512_storeu_ps(to + 8 * GROUP, from_half(hi, 0));
            _mm512_storeu_ps(to + 12 * GROUP, from_half(hi, 1));
        }
    }
    return _mm512_cmpeq_epi8_mask(largest, quiet) != 0;
}

static void index_tile(float *tile, const uint8_t *code, int d, int n)
{
    int d_tile = (d + 3) / 4 * 4;

    for (int g = 0; g < n; g += GROUP) {
        const uint8_t *from = code + g * d;
        float *to = tile + g * d_tile;
        if (d % 16 || group_tile(to, from, d)) tr_index_tile_codes(to, LANES, d, GROUP, from);
    }
}

/* Four keys' sums, each spread over 4 numbers, in every 128 bits. */
INLINE __m512 sum_fours(const __m512 acc[4])
{
    __m512 lo =
        _mm512_add_ps(_mm512_unpacklo_ps(acc[0], acc[1]), _mm512_unpackhi_ps(acc[0], acc[1]));
    __m512 hi =
        _mm512_add_ps(_mm512_unpacklo_ps(acc[2], acc[3]), _mm512_unpackhi_ps(acc[2], acc[3]));
    __m512d a = _mm512_castps_pd(lo), b = _mm512_castps_pd(hi);

    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

/* Up to four heads and the 16 keys of a group. */
INLINE __m512 index_heads(__m512 score, const float *q, const float *w, int n_heads,
                          const float *group, int d)
{
    TR_SCRATCH __m512 acc[4][4], key[4];

    UNROLL for (int h = 0; h < n_heads; h++)
    {
        UNROLL for (int s = 0; s < 4; s++) acc[h][s] = _mm512_setzero_ps();
    }
    for (int i = 0; i < d; i += 4) {
        UNROLL for (int s = 0; s < 4; s++) key[s] = _mm512_loadu_ps(group + i * GROUP + s * GROUP);
        UNROLL for (int h = 0; h < n_heads; h++)
        {
            __m512 x = _mm512_broadcast_f32x4(_mm_loadu_ps(q + h * d + i));
            UNROLL for (int s = 0; s < 4; s++) acc[h][s] = _mm512_fmadd_ps(x, key[s], acc[h][s]);
        }
    }
    UNROLL for (int h = 0; h < n_heads; h++)
    {
        /* max gives its second operand when one is NaN: NaN stays */
        __m512 x = _mm512_max_ps(_mm512_setzero_ps(), sum_fours(acc[h]));
        score = _mm512_fmadd_ps(_mm512_set1_ps(w[h]), x, score);
    }
    return score;
}

static void index_add(float *acc, const float *q, const float *w, int n_heads, const float *tile,
                      int d, int begin, int end)
{
    int last = n_heads / 4 * 4;

    for (int g = begin / GROUP * GROUP; g < end; g += GROUP) {
        const float *group = tile + g * d, *rest = q + last * d;
        __m512 score = _mm512_loadu_ps(acc + g);
        for (int h = 0; h < last; h += 4)
            score = index_heads(score, q + h * d, w + h, 4, group, d);
        if (n_heads - last == 3) score = index_heads(score, rest, w + last, 3, group, d);
        if (n_heads - last == 2) score = index_heads(score, rest, w + last, 2, group, d);
        if (n_heads - last == 1) score = index_heads(score, rest, w + last, 1, group, d);
        _mm512_storeu_ps(acc + g, score);
    }
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

static int count_from(const float *score, int n, float bound)
{
    __m512i count[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    const __m512i one = _mm512_set1_epi32(1);
    const __m512 least = _mm512_set1_ps(bound);
    int s = 0;

    if (bound == -INFINITY) return n; /* NaN among them */
    for (; s + 32 <= n; s += 32) {
        UNROLL for (int j = 0; j < 2; j++)
        {
            __mmask16 m =
                _mm512_cmp_ps_mask(_mm512_loadu_ps(score + s + 16 * j), least, _CMP_GE_OQ);
            count[j] = _mm512_mask_add_epi32(count[j], m, count[j], one);
        }
    }
    for (; s < n; s += 16) {
        __mmask16 m = lanes(n - s);
        m = _mm512_mask_cmp_ps_mask(m, _mm512_maskz_loadu_ps(m, score + s), least, _CMP_GE_OQ);
        count[0] = _mm512_mask_add_epi32(count[0], m, count[0], one);
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(count[0], count[1]));
}

/* The lowest n bits that are set. */
INLINE uint32_t lowest_bits(uint32_t x, int n)
{
    uint32_t rest = x;

    if (__builtin_popcount(x) <= n) return x;
    for (; n > 0; n--)
        rest &= rest - 1;
    return x & ~rest;
}

static int take(int32_t *position, int k, const float *score, int n, float bound, int n_ties)
{
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 edge = _mm512_set1_ps(bound);
    int m = 0;

    for (int s = 0; s < n && m < k; s += 16) {
        __mmask16 live = lanes(n - s);
        __m512 x = _mm512_maskz_loadu_ps(live, score + s);
        uint32_t more = _mm512_mask_cmp_ps_mask(live, x, edge, _CMP_GT_OQ), ties = 0;
        if (n_ties > 0) {
            ties = _mm512_mask_cmp_ps_mask(live, x, edge, _CMP_EQ_OQ);
            if (bound == -INFINITY) ties |= _mm512_mask_cmp_ps_mask(live, x, x, _CMP_UNORD_Q);
            ties = lowest_bits(ties, n_ties);
            n_ties -= __builtin_popcount(ties);
        }
        int n_found = __builtin_popcount(more | ties);
        __m512i at = _mm512_maskz_compress_epi32((__mmask16)(more | ties),
                                                 _mm512_add_epi32(count, _mm512_set1_epi32(s)));
        n_found = n_found < k - m ? n_found : k - m;
        _mm512_mask_storeu_epi32(position + m, lanes(n_found), at);
        m += n_found;
    }
    return m;
}

/* ---- number formats ---- */

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

/* 128 codes, a scale block of the latents. The factor repairs the exponent together with the scale. Returns whether there
 * are NaN among the codes, which come out as numbers. */
INLINE int expand_128(float *out, const uint8_t *in, __m512 factor)
{
    const __m512i quiet = _mm512_set1_epi8(0x7f);

    UNROLL for (int i = 0; i < 128; i += 32)
    {
        __m512i half = halves_of(_mm256_loadu_si256((const __m256i *)(const void *)(in + i)));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(from_half(half, 0), factor));
        _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(from_half(half, 1), factor));
    }
    __m512i largest = _mm512_max_epu8(_mm512_and_si512(_mm512_loadu_si512(in), quiet),
                                      _mm512_and_si512(_mm512_loadu_si512(in + 64), quiet));
    return _mm512_cmpeq_epi8_mask(largest, quiet) != 0;
}

static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    const __m512 factor = _mm512_set1_ps(scale / tr_tile_unit);
    int i = 0;

    for (; i + 128 <= n; i += 128)
        if (__builtin_expect(expand_128(out + i, in + i, factor), 0))
            for (int j = i; j < i + 128; j++)
                out[j] = tr_e4m3_to_f32(in[j]) * scale;
    for (; i < n; i += 16) {
        __mmask16 m = lanes(n - i);
        __m128i code = _mm_maskz_loadu_epi8(m, in + i), quiet = _mm_set1_epi8(0x7f);
        __m512i half = halves_of(_mm256_castsi128_si256(code));
        __m512 x = _mm512_mul_ps(from_half(half, 0), factor);
        __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(code, quiet), quiet);
        _mm512_mask_storeu_ps(out + i, m, _mm512_mask_mov_ps(x, nan, _mm512_set1_ps(NAN)));
    }
}

static void expand_latent(float *out, const uint8_t *record, int d_latent, int d_rope)
{
    const float *scale = (const float *)(const void *)(record + d_latent);
    const uint16_t *rope = (const uint16_t *)(const void *)(scale + tr_n_scales(d_latent));

    for (int i = 0; i < d_latent; i += TR_SCALE_BLOCK, scale++) {
        const __m512 factor = _mm512_set1_ps(*scale / tr_tile_unit);
        if (i + TR_SCALE_BLOCK > d_latent)
            expand_e4m3(out + i, record + i, *scale, d_latent - i);
        else if (__builtin_expect(expand_128(out + i, record + i, factor), 0))
            expand_e4m3(out + i, record + i, *scale, TR_SCALE_BLOCK);
    }
    for (int i = 0; i < d_rope; i += 16) {
        __mmask16 m = lanes(d_rope - i);
        __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, rope + i));
        _mm512_mask_storeu_ps(out + d_latent + i, m, _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
    }
}

INLINE __m512 to_bf16_and_back(__m512 x)
{
    __m512i u = _mm512_castps_si512(x), top = _mm512_set1_epi32((int)0xffff0000u);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i even = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);

    even = _mm512_mask_or_epi32(even, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(even, top));
}

static void round_bf16(float *x, int n)
{
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = lanes(n - i);
        _mm512_mask_storeu_ps(x + i, m, to_bf16_and_back(_mm512_maskz_loadu_ps(m, x + i)));
    }
}

/* The four stages inside a vector: a + b in the lane of a, a - b in that of b (as -1 b + a: one rounding too). */
INLINE __m512 hadamard_16(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);

    x = _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xaaaa, minus), _mm512_permute_ps(x, 0xb1));
    x = _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xcccc, minus), _mm512_permute_ps(x, 0x4e));
    x = _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xf0f0, minus),
                        _mm512_shuffle_f32x4(x, x, 0xb1));
    return _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xff00, minus),
                           _mm512_shuffle_f32x4(x, x, 0x4e));
}

static void hadamard(float *x, int d)
{
    TR_SCRATCH __m512 v[TR_D_INDEX_MAX / 16], factor = _mm512_set1_ps(1.0f / sqrtf((float)d));
    int n = d / 16;

    if (d < 16 || d > TR_D_INDEX_MAX) {
        tr_hadamard(x, d);
        return;
    }
    for (int i = 0; i < n; i++)
        v[i] = hadamard_16(_mm512_loadu_ps(x + 16 * i));
    for (int half = 1; half < n; half *= 2)
        for (int i = 0; i < n; i++) {
            __m512 a = v[i], b = v[i ^ half];
            if (i & half) continue;
            v[i] = _mm512_add_ps(a, b);
            v[i + half] = _mm512_sub_ps(a, b);
        }
    for (int i = 0; i < n; i++)
        _mm512_storeu_ps(x + 16 * i, _mm512_mul_ps(v[i], factor));
}

const struct tr_attention_kernels tr_attention_avx512 = {
    .dots = dots,
    .turn = turn,
    .scores = scores,
    .accumulate = accumulate,
    .scale_max = scale_max,
    .sum = sum,
    .tile_lanes = LANES,
    .index_tile = index_tile,
    .index_add = index_add,
    .index_score = index_score,
    .count_from = count_from,
    .select = take,
    .max_abs = max_abs,
    .to_e4m3 = to_e4m3,
    .expand_e4m3 = expand_e4m3,
    .expand_latent = expand_latent,
    .round_bf16 = round_bf16,
    .hadamard = hadamard,
};

#endif
