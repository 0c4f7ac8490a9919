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
    TR_SCRATCH __m256 row[2];

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
    TR_SCRATCH __m256 acc[8];
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
    TR_SCRATCH const float *key[TR_KEY_BLOCK];
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

static void turn(float *out, tr_tile k, int d)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i step = _mm256_mullo_epi32(lane, _mm256_set1_epi32((int)k.ld));

    for (int s = 0; s < TR_KEY_BLOCK; s += 8) {
        const float *from = k.x + (size_t)s * k.ld;
        const __m256 m = _mm256_castsi256_ps(lanes(k.n - s));
        for (int i = 0; i < d; i++) {
            __m256 x =
                _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from + i, step, m, sizeof *from);
            _mm256_storeu_ps(out + i * TR_KEY_BLOCK + s, x);
        }
    }
}

/* Up to 6 rows and 16 keys: 12 accumulators. */
INLINE void scores_block(float *p, const float *q, size_t ld_q, int n_rows, const float *turned,
                         int d)
{
    TR_SCRATCH __m256 acc[6][2], key[2];

    UNROLL for (int r = 0; r < n_rows; r++)
    {
        UNROLL for (int j = 0; j < 2; j++) acc[r][j] = _mm256_setzero_ps();
    }
    for (int i = 0; i < d; i++, turned += TR_KEY_BLOCK) {
        UNROLL for (int j = 0; j < 2; j++) key[j] = _mm256_loadu_ps(turned + 8 * j);
        UNROLL for (int r = 0; r < n_rows; r++)
        {
            __m256 x = _mm256_set1_ps(q[(size_t)r * ld_q + (size_t)i]);
            UNROLL for (int j = 0; j < 2; j++) acc[r][j] = _mm256_fmadd_ps(x, key[j], acc[r][j]);
        }
    }
    UNROLL for (int r = 0; r < n_rows; r++)
    {
        UNROLL for (int j = 0; j < 2; j++)
            _mm256_storeu_ps(p + r * TR_KEY_BLOCK + 8 * j, acc[r][j]);
    }
}

static void scores(float *p, tr_tile q, const float *turned, int d)
{
    for (int s = 0; s < TR_KEY_BLOCK; s += 16) {
        int r = 0;
        for (; r + 6 <= q.n; r += 6)
            scores_block(p + r * TR_KEY_BLOCK + s, q.x + (size_t)r * q.ld, q.ld, 6, turned + s, d);
        for (; r + 2 <= q.n; r += 2)
            scores_block(p + r * TR_KEY_BLOCK + s, q.x + (size_t)r * q.ld, q.ld, 2, turned + s, d);
        if (r < q.n)
            scores_block(p + r * TR_KEY_BLOCK + s, q.x + (size_t)r * q.ld, q.ld, 1, turned + s, d);
    }
}

/* Up to 4 rows by up to 16 columns; full: by 16. */
INLINE void accumulate_block(float *y, size_t ld_y, const float *p, const float *keep,
                             const int *n_keys, int n_rows, const float *v, size_t ld_v, int width,
                             int full)
{
    TR_SCRATCH __m256 acc[4][2], x[2];
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
            x[j] = load(v + (size_t)s * ld_v + 8 * j, full, m[j]);
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
                x[j] = load(v + (size_t)s * ld_v + 8 * j, full, m[j]);
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
            if (n >= 4 && d - i >= 16)
                accumulate_block(to, ld_y, pr, keep + r, n_keys + r, 4, v + i, ld_v, 16, 1);
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

/* ---- the indexer ---- */

enum { LANES = 2, GROUP = 4 * LANES };

/* Codes to 2^-8 of their value in fp16, subnormals too (which the conversion to fp32 takes in its stride). */
INLINE __m256i halves_of(__m128i code)
{
    return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(code), 7),
                            _mm256_set1_epi16((short)0xbf80));
}

/* The low and the high 8 of 16 halves as fp32. */
INLINE __m256 from_half(__m256i half, int high)
{
    return _mm256_cvtph_ps(high ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half));
}

/* 8 numbers of the keys s and s + 4 of a group: 2 dwords of each, transposed to 2 dwords of both. */
INLINE __m128i two_keys(const uint8_t *code, size_t ld)
{
    __m128i a = _mm_loadl_epi64((const __m128i *)(const void *)code);
    return _mm_unpacklo_epi32(a, _mm_loadl_epi64((const __m128i *)(const void *)(code + 4 * ld)));
}

/* One group; returns whether there are NaN among the codes, which come out as numbers. */
static int group_tile(float *tile, const uint8_t *code, int d)
{
    const __m128i quiet = _mm_set1_epi8(0x7f);
    __m128i largest = _mm_setzero_si128();

    for (int i = 0; i < d; i += 8) {
        UNROLL for (int s = 0; s < 4; s++)
        {
            float *to = tile + i * GROUP + s * GROUP;
            __m128i x = two_keys(code + s * d + i, (size_t)d);
            __m256i half = halves_of(x);
            largest = _mm_max_epu8(largest, _mm_and_si128(x, quiet));
            /* four numbers of the keys make a vector; the next four follow after all four s */
            _mm256_storeu_ps(to, from_half(half, 0));
            _mm256_storeu_ps(to + 4 * GROUP, from_half(half, 1));
        }
    }
    return _mm_movemask_epi8(_mm_cmpeq_epi8(largest, quiet)) != 0;
}

static void index_tile(float *tile, const uint8_t *code, int d, int n)
{
    int d_tile = (d + 3) / 4 * 4;

    for (int g = 0; g < n; g += GROUP) {
        const uint8_t *from = code + g * d;
        float *to = tile + g * d_tile;
        if (d % 8 || group_tile(to, from, d)) tr_index_tile_codes(to, LANES, d, GROUP, from);
    }
}

/* Four keys' sums, each spread over 4 numbers, in every 128 bits. */
INLINE __m256 sum_fours(const __m256 acc[4])
{
    __m256 lo =
        _mm256_add_ps(_mm256_unpacklo_ps(acc[0], acc[1]), _mm256_unpackhi_ps(acc[0], acc[1]));
    __m256 hi =
        _mm256_add_ps(_mm256_unpacklo_ps(acc[2], acc[3]), _mm256_unpackhi_ps(acc[2], acc[3]));
    __m256d a = _mm256_castps_pd(lo), b = _mm256_castps_pd(hi);

    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
}

/* One or two heads and the 8 keys of a group. */
INLINE __m256 index_heads(__m256 score, const float *q, const float *w, int n_heads,
                          const float *group, int d)
{
    TR_SCRATCH __m256 acc[2][4], key[4];

    UNROLL for (int h = 0; h < n_heads; h++)
    {
        UNROLL for (int s = 0; s < 4; s++) acc[h][s] = _mm256_setzero_ps();
    }
    for (int i = 0; i < d; i += 4) {
        UNROLL for (int s = 0; s < 4; s++) key[s] = _mm256_loadu_ps(group + i * GROUP + s * GROUP);
        UNROLL for (int h = 0; h < n_heads; h++)
        {
            __m256 x = _mm256_broadcast_ps((const __m128 *)(const void *)(q + h * d + i));
            UNROLL for (int s = 0; s < 4; s++) acc[h][s] = _mm256_fmadd_ps(x, key[s], acc[h][s]);
        }
    }
    UNROLL for (int h = 0; h < n_heads; h++)
    {
        /* max gives its second operand when one is NaN: NaN stays */
        __m256 x = _mm256_max_ps(_mm256_setzero_ps(), sum_fours(acc[h]));
        score = _mm256_fmadd_ps(_mm256_set1_ps(w[h]), x, score);
    }
    return score;
}

static void index_add(float *acc, const float *q, const float *w, int n_heads, const float *tile,
                      int d, int begin, int end)
{
    for (int g = begin / GROUP * GROUP; g < end; g += GROUP) {
        const float *group = tile + g * d;
        __m256 score = _mm256_loadu_ps(acc + g);
        int h = 0;
        for (; h + 2 <= n_heads; h += 2)
            score = index_heads(score, q + h * d, w + h, 2, group, d);
        if (h < n_heads) score = index_heads(score, q + h * d, w + h, 1, group, d);
        _mm256_storeu_ps(acc + g, score);
    }
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

static int count_from(const float *score, int n, float bound)
{
    __m256i count[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    const __m256 least = _mm256_set1_ps(bound);
    int32_t each[8];
    int s = 0, sum_of = 0;

    if (bound == -INFINITY) return n; /* NaN among them */
    for (; s + 16 <= n; s += 16) {
        UNROLL for (int j = 0; j < 2; j++)
        {
            __m256 m = _mm256_cmp_ps(_mm256_loadu_ps(score + s + 8 * j), least, _CMP_GE_OQ);
            count[j] = _mm256_sub_epi32(count[j], _mm256_castps_si256(m));
        }
    }
    for (; s < n; s++)
        sum_of += score[s] >= bound;
    _mm256_storeu_si256((__m256i *)(void *)each, _mm256_add_epi32(count[0], count[1]));
    for (int j = 0; j < 8; j++)
        sum_of += each[j];
    return sum_of;
}

static int take(int32_t *position, int k, const float *score, int n, float bound, int n_ties)
{
    const __m256 edge = _mm256_set1_ps(bound);
    int m = 0;

    for (int s = 0; s < n && m < k; s += 8) {
        __m256i live = lanes(n - s);
        __m256 x = _mm256_maskload_ps(score + s, live);
        __m256 tie = _mm256_cmp_ps(x, edge, _CMP_EQ_OQ);
        if (bound == -INFINITY) tie = _mm256_or_ps(tie, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        int ties = n_ties > 0 ? _mm256_movemask_ps(tie) : 0;
        int some = (_mm256_movemask_ps(_mm256_cmp_ps(x, edge, _CMP_GT_OQ)) | ties) &
                   _mm256_movemask_ps(_mm256_castsi256_ps(live));
        for (; some && m < k; some &= some - 1) {
            int is_tie = (ties & some & -some) != 0;
            position[m] = s + __builtin_ctz((unsigned)some);
            m += !is_tie || n_ties > 0;
            n_ties -= is_tie;
        }
    }
    return m;
}

/* ---- number formats ---- */

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

/* 64 codes. The factor repairs the exponent together with the scale. Returns whether there are NaN among the codes, which
 * come out as numbers. */
INLINE int expand_64(float *out, const uint8_t *in, __m256 factor)
{
    const __m128i quiet = _mm_set1_epi8(0x7f);
    __m128i largest = _mm_setzero_si128();

    UNROLL for (int i = 0; i < 64; i += 16)
    {
        __m128i code = _mm_loadu_si128((const __m128i *)(const void *)(in + i));
        __m256i half = halves_of(code);
        largest = _mm_max_epu8(largest, _mm_and_si128(code, quiet));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(from_half(half, 0), factor));
        _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(from_half(half, 1), factor));
    }
    return _mm_movemask_epi8(_mm_cmpeq_epi8(largest, quiet)) != 0;
}

static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    const __m256 factor = _mm256_set1_ps(scale / tr_tile_unit);
    int i = 0;

    for (; i + 64 <= n; i += 64)
        if (__builtin_expect(expand_64(out + i, in + i, factor), 0))
            for (int j = i; j < i + 64; j++)
                out[j] = tr_e4m3_to_f32(in[j]) * scale;
    for (; i < n; i++) /* exact too, up to the one product with the scale */
        out[i] = tr_e4m3_to_f32(in[i]) * scale;
}

static void expand_latent(float *out, const uint8_t *record, int d_latent, int d_rope)
{
    const float *scale = (const float *)(const void *)(record + d_latent);
    const uint16_t *rope = (const uint16_t *)(const void *)(scale + tr_n_scales(d_latent));
    int i = 0;

    for (; i + TR_SCALE_BLOCK <= d_latent; i += TR_SCALE_BLOCK, scale++) {
        const __m256 factor = _mm256_set1_ps(*scale / tr_tile_unit);
        if (__builtin_expect(expand_64(out + i, record + i, factor) |
                                 expand_64(out + i + 64, record + i + 64, factor),
                             0))
            expand_e4m3(out + i, record + i, *scale, TR_SCALE_BLOCK);
    }
    if (i < d_latent) expand_e4m3(out + i, record + i, *scale, d_latent - i);
    out += d_latent;
    for (i = 0; i + 8 <= d_rope; i += 8) {
        __m256i x =
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(rope + i)));
        _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)));
    }
    for (; i < d_rope; i++)
        out[i] = tr_bf16_to_f32(rope[i]);
}

static void round_bf16(float *x, int n)
{
    const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff);

    for (int i = 0; i < n; i += 8) {
        __m256i m = lanes(n - i);
        __m256 t = _mm256_maskload_ps(x + i, m);
        __m256i u = _mm256_castps_si256(t);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
        __m256i even = _mm256_add_epi32(_mm256_add_epi32(u, odd), half);
        even = choose(even, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)),
                      _mm256_cmp_ps(t, t, _CMP_UNORD_Q));
        even = _mm256_and_si256(even, _mm256_set1_epi32((int)0xffff0000u));
        _mm256_maskstore_ps(x + i, m, _mm256_castsi256_ps(even));
    }
}

/* The three stages inside a vector: a + b in the lane of a, a - b in that of b (as -1 b + a: one rounding too). */
INLINE __m256 hadamard_8(__m256 x)
{
    const __m256 sign_1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const __m256 sign_2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 sign_4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);

    x = _mm256_fmadd_ps(x, sign_1, _mm256_permute_ps(x, 0xb1));
    x = _mm256_fmadd_ps(x, sign_2, _mm256_permute_ps(x, 0x4e));
    return _mm256_fmadd_ps(x, sign_4, _mm256_permute2f128_ps(x, x, 0x01));
}

static void hadamard(float *x, int d)
{
    TR_SCRATCH __m256 v[TR_D_INDEX_MAX / 8], factor = _mm256_set1_ps(1.0f / sqrtf((float)d));
    int n = d / 8;

    if (d < 8 || d > TR_D_INDEX_MAX) {
        tr_hadamard(x, d);
        return;
    }
    for (int i = 0; i < n; i++)
        v[i] = hadamard_8(_mm256_loadu_ps(x + 8 * i));
    for (int half = 1; half < n; half *= 2)
        for (int i = 0; i < n; i++) {
            __m256 a = v[i], b = v[i ^ half];
            if (i & half) continue;
            v[i] = _mm256_add_ps(a, b);
            v[i + half] = _mm256_sub_ps(a, b);
        }
    for (int i = 0; i < n; i++)
        _mm256_storeu_ps(x + 8 * i, _mm256_mul_ps(v[i], factor));
}

const struct tr_attention_kernels tr_attention_avx2 = {
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
