/* Matrix tiles (AMX-BF16) and fp32 numbers in three bf16 parts, for the *_amx.c files only: their flags are needed.
 *
 * A number is cut into three parts of 8 significant bits each, x = x1 + x2 + x3 exactly, so that its product with a bf16
 * is three exact products in the fp32 that the tiles sum in. Parts and factors below 2^-126 count as zero. */
#ifndef TR_KERNELS_CPU_AMX_PRIV_H
#define TR_KERNELS_CPU_AMX_PRIV_H

#include <immintrin.h>
#include <stdint.h>

enum {
    TR_TILE_STEP = 32, /* numbers of k of one tile product */
    TR_TILE_BYTES = 1024,
    TR_TILE_ROWS = 16,
    TR_N_PARTS = 3,
};

typedef struct tr_tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
} tr_tile_config;

/* Tiles 0 to 6: `rows` rows of 64 bytes; 7: 16 rows. */
static inline void tr_tiles_configure(int rows)
{
    tr_tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.column_bytes[i] = 64;
        c.rows[i] = (uint8_t)(i == 7 ? 16 : rows);
    }
    _tile_loadconfig(&c);
}

/* The high halves of 32 numbers. */
static inline __m512i tr_high_halves(__m512i a, __m512i b)
{
    return _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
}

typedef struct tr_parts16 {
    __m512i part[TR_N_PARTS];
} tr_parts16;

/* Cut, not rounded: the rest is exact, and no part overflows. Inf and NaN are the first part's alone, and a NaN keeps
 * a bit that says so. */
static inline tr_parts16 tr_split16(__m512 x)
{
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), high);
    __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(bits));
    const __mmask16 special =
        _mm512_fpclass_ps_mask(x, 0x99); /* NaN of both kinds, Inf of both signs */
    if (special) {
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x400000));
        rest = _mm512_mask_mov_ps(rest, special, _mm512_setzero_ps());
    }
    __m512i second = _mm512_and_si512(_mm512_castps_si512(rest), high);
    __m512 third = _mm512_sub_ps(rest, _mm512_castsi512_ps(second));
    return (tr_parts16){{bits, second, _mm512_castps_si512(third)}};
}

/* 32 numbers; parts part_bytes apart. packus takes fours of one operand and of the other by turns. */
static inline void tr_split32(uint8_t *out, size_t part_bytes, __m512 x, __m512 y)
{
    const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
    const __m512i odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
    tr_parts16 p = tr_split16(_mm512_castpd_ps(_mm512_permutex2var_pd(a, even, b)));
    tr_parts16 q = tr_split16(_mm512_castpd_ps(_mm512_permutex2var_pd(a, odd, b)));
#pragma GCC unroll 3
    for (int i = 0; i < TR_N_PARTS; i++, out += part_bytes)
        _mm512_store_si512(out, tr_high_halves(p.part[i], q.part[i]));
}

/* The first n of 16. */
static inline __mmask16 tr_first16(int n)
{
    unsigned lanes = n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u;
    return (__mmask16)lanes;
}

#endif
