/* Index scores on matrix tiles (AMX-BF16), for caches of e4m3 keys: both queries and keys are bf16 as they are, so every
 * product is exact and sums are fp32.
 *
 * For one row and one key, whatever others come along: a head's dot product is c = 0, then for every 32 numbers c += q k;
 * the score is the sum of w relu(c) over the heads, ascending, one multiply-add each. */
#include <config.h>

#include "kernels/cpu/amx_priv.h"
#include "kernels/cpu/attention_priv.h"

enum { KEY_TILES = TR_KEY_BLOCK / TR_TILE_ROWS };

/* The high and the low bytes of 64 codes' bf16. */
typedef struct bytes64 {
    __m512i high, low;
} bytes64;

/* Of codes among which are some below 2^-6, zeros and NaN. */
static __attribute__((noinline)) bytes64 expand_all(__m512i code, bytes64 x)
{
    const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c,
                                                              0x3c, 0, 0, 0, 0, 0, 0, 0, 0)),
                  low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, (char)0x80, (char)0xc0, 0, 0x20,
                                                             0x40, 0x60, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi8(0x7f));
    const __mmask64 small = _mm512_cmplt_epu8_mask(magnitude, _mm512_set1_epi8(8));
    const __mmask64 nan = _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f));
    const __m512i sign = _mm512_xor_si512(code, magnitude);

    x.high = _mm512_mask_blend_epi8(small, x.high,
                                    _mm512_or_si512(_mm512_shuffle_epi8(high, magnitude), sign));
    x.low = _mm512_mask_shuffle_epi8(x.low, small, low, magnitude);
    x.high = _mm512_mask_mov_epi8(x.high, nan, _mm512_set1_epi8(0x7f));
    x.low = _mm512_mask_mov_epi8(x.low, nan, _mm512_set1_epi8((char)0xc0));
    return x;
}

/* A code is seeeemmm; the bf16's exponent e + 120 is e3, four times its complement, e2 e1 e0. This holds where e > 0 and
 * the code is a number. */
static inline bytes64 expand(__m512i code)
{
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi8(0x7f));
    bytes64 x = {
        .high = _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64(0x1020404040404080), 0x3c),
        .low = _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64(0x01020408), 0),
    };
    /* 8 ... 0x7e, less 8 */
    const __mmask64 special = _mm512_cmpgt_epu8_mask(
        _mm512_sub_epi8(magnitude, _mm512_set1_epi8(8)), _mm512_set1_epi8(0x7e - 8));
    return __builtin_expect(special != 0, 0) ? expand_all(code, x) : x;
}

/* ---- keys: pairs of numbers down, 16 keys across ---- */

/* Tiles [n_steps] of 16 keys of d codes each. */
static void turn_keys(const tr_device *d, uint8_t *out, const uint8_t *code, int d_index)
{
    const __m512i pairs =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    TR_SCRATCH uint8_t word[TR_D_INDEX_MAX / 4 * 64] __attribute__((aligned(64)));
    const uint8_t *key[TR_TILE_ROWS];

    for (int s = 0; s < TR_TILE_ROWS; s++)
        key[s] = code + s * d_index;
    d->k.transpose(word, key, d_index / 4);
    for (int i = 0; i < d_index / 4; i++, out += 2 * 64) {
        const bytes64 x = expand(_mm512_shuffle_epi8(_mm512_load_si512(word + i * 64), pairs));
        _mm512_store_si512(out, _mm512_unpacklo_epi8(x.low, x.high));
        _mm512_store_si512(out + 64, _mm512_unpackhi_epi8(x.low, x.high));
    }
}

/* ---- queries: a head a row ---- */

/* Of 16 heads of a row from `code` on, n of which exist, tiles [n_steps]; the rest are zeros. */
static void expand_heads(uint8_t *out, const uint8_t *code, int n, int d_index)
{
    const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);

    for (int h = 0; h < TR_TILE_ROWS; h++, code += d_index)
        for (int i = 0; i < d_index; i += 2 * TR_TILE_STEP) {
            uint8_t *to = out + i / TR_TILE_STEP * TR_TILE_BYTES + h * 64;
            const __mmask64 half = d_index - i > TR_TILE_STEP ? ~(__mmask64)0 : 0xffffffff;
            const bytes64 x = expand(_mm512_permutexvar_epi64(
                halves, _mm512_maskz_loadu_epi8(h < n ? half : 0, code + (h < n ? i : 0))));
            _mm512_store_si512(to, _mm512_unpacklo_epi8(x.low, x.high));
            if (d_index - i > TR_TILE_STEP)
                _mm512_store_si512(to + TR_TILE_BYTES, _mm512_unpackhi_epi8(x.low, x.high));
        }
}

static void expand_queries(const struct tr_index_logits_args *a, int i, uint8_t *out)
{
    const int d_index = a->kv.d_index;
    const uint8_t *code = (const uint8_t *)a->q + (size_t)i * (size_t)(a->n_heads * d_index);

    for (int h = 0; h < a->n_heads; h += TR_TILE_ROWS) {
        const int left = a->n_heads - h;
        expand_heads(out, code + h * d_index, left < TR_TILE_ROWS ? left : TR_TILE_ROWS, d_index);
        out += d_index / TR_TILE_STEP * TR_TILE_BYTES;
    }
}

/* ---- 16 heads and a page ---- */

#define KEY_PRODUCT(t)                                                                             \
    if (tile <= (t) && (t) < tile_end) {                                                           \
        _tile_loadd(5, key + (t)*key_bytes, 64);                                                   \
        _tile_dpbf16ps(t, 4, 5);                                                                   \
    }

/* dot [16 heads, 64 keys], tiles [tile, tile_end) of keys. */
static void head_dots(float *dot, const uint8_t *query, const uint8_t *key, int n_steps, int tile,
                      int tile_end)
{
    const size_t key_bytes = (size_t)n_steps * TR_TILE_BYTES, ld = TR_KEY_BLOCK * sizeof *dot;

    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < n_steps; i++, query += TR_TILE_BYTES, key += TR_TILE_BYTES) {
        _tile_loadd(4, query, 64);
        KEY_PRODUCT(0)
        KEY_PRODUCT(1)
        KEY_PRODUCT(2)
        KEY_PRODUCT(3)
    }
    _tile_stored(0, dot, ld);
    _tile_stored(1, dot + 16, ld);
    _tile_stored(2, dot + 32, ld);
    _tile_stored(3, dot + 48, ld);
}

/* sum[t] += w relu(dot) of n heads; a NaN stays. */
static inline void add_heads(__m512 sum[KEY_TILES], const float *dot, const float *w, int n)
{
    for (int h = 0; h < n; h++, dot += TR_KEY_BLOCK) {
        const __m512 weight = _mm512_set1_ps(w[h]);
#pragma GCC unroll 4
        for (int t = 0; t < KEY_TILES; t++) {
            /* max: of two of which one is NaN the second */
            const __m512 x = _mm512_max_ps(_mm512_setzero_ps(), _mm512_load_ps(dot + 16 * t));
            sum[t] = _mm512_fmadd_ps(weight, x, sum[t]);
        }
    }
}

static void row_scores(const tr_device *d, const struct tr_index_logits_args *a, int i,
                       const tr_index_page *page, tr_index_scratch *scratch)
{
    TR_SCRATCH float dot[TR_TILE_ROWS * TR_KEY_BLOCK] __attribute__((aligned(64)));
    TR_SCRATCH float acc[TR_KEY_BLOCK] __attribute__((aligned(64)));
    const int n_steps = a->kv.d_index / TR_TILE_STEP;
    const float *w = a->w + (size_t)i * (size_t)a->n_heads;
    const uint8_t *query = scratch->query, *key = (const uint8_t *)scratch->tile;
    __m512 sum[KEY_TILES] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                             _mm512_setzero_ps()};
    int begin, end;

    if (!tr_index_window(a, i, page->s, &begin, &end)) return;
    if (scratch->row != i) expand_queries(a, i, scratch->query);
    scratch->row = i;
    for (int h = 0; h < a->n_heads; h += TR_TILE_ROWS, query += n_steps * TR_TILE_BYTES) {
        const int left = a->n_heads - h;
        tr_ask_ahead(page->ahead, TR_AHEAD_LINES);
        head_dots(dot, query, key, n_steps, begin / TR_TILE_ROWS,
                  (end + TR_TILE_ROWS - 1) / TR_TILE_ROWS);
        add_heads(sum, dot, w + h, left < TR_TILE_ROWS ? left : TR_TILE_ROWS);
    }
    for (int t = 0; t < KEY_TILES; t++)
        _mm512_store_ps(acc + 16 * t, sum[t]);
    tr_attention_of(d)->index_score(a->score + (size_t)(i - a->i_row) * a->ld + page->s + begin,
                                    acc + begin, page->scale + begin, end - begin);
}

void tr_index_page_amx(const tr_device *d, const struct tr_index_logits_args *a, int i, int i_end,
                       const tr_index_page *page, tr_index_scratch *scratch)
{
    const int d_index = a->kv.d_index, n_steps = d_index / TR_TILE_STEP;
    uint8_t *tile = (uint8_t *)scratch->tile;

    for (int s = 0; s < page->n; s += TR_TILE_ROWS) {
        tr_ask_ahead(page->ahead, TR_AHEAD_LINES);
        turn_keys(d, tile + s / TR_TILE_ROWS * n_steps * TR_TILE_BYTES, page->code + s * d_index,
                  d_index);
    }
    tr_tiles_configure(TR_TILE_ROWS);
    for (; i < i_end; i++)
        if (tr_needs_scores(a, i)) row_scores(d, a, i, page, scratch);
    _tile_release();
}
