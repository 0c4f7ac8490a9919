/* Number formats (model.md 5.1, 4 step 4): bf16, e4m3fn, power-of-two scales. Scalar, exact, the reference of every
 * vectorised version. Header only; no state. */
#ifndef TR_KERNELS_NUMBER_H
#define TR_KERNELS_NUMBER_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t tr_f32_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float tr_bits_f32(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float tr_bf16_to_f32(uint16_t b)
{
    return tr_bits_f32((uint32_t)b << 16);
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t tr_f32_to_bf16(float x)
{
    uint32_t u = tr_f32_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

/* x rounded to bf16, as fp32. */
static inline float tr_round_bf16(float x)
{
    return tr_bf16_to_f32(tr_f32_to_bf16(x));
}

/* e4m3fn: bias 7, subnormals m * 2^-9, largest 448, NaN 0x7f and 0xff. Exact: the bits are moved into an fp32 whose
 * exponent is 120 too small, which the product repairs for normals and subnormals alike. */
static inline float tr_e4m3_to_f32(uint8_t b)
{
    if ((b & 0x7fu) == 0x7fu) return (b & 0x80u) ? -NAN : NAN;
    float magnitude = tr_bits_f32((uint32_t)(b & 0x7fu) << 20) * 0x1p120f;
    return (b & 0x80u) ? -magnitude : magnitude;
}

/* Round to nearest even, saturating at 448; NaN gives 0x7f with x's sign. */
static inline uint8_t tr_f32_to_e4m3(float x)
{
    uint32_t u = tr_f32_bits(x);
    uint8_t sign = (uint8_t)((u >> 24) & 0x80u);
    float a = tr_bits_f32(u & 0x7fffffffu);
    if (isnan(x)) return (uint8_t)(sign | 0x7fu);
    if (a >= 448.0f) return (uint8_t)(sign | 0x7eu);
    if (a < 0x1p-6f) { /* subnormal: units of 2^-9; adding 2^14 (ulp 2^-9) rounds to nearest even */
        float r = (a + 0x1p14f) - 0x1p14f;
        return (uint8_t)(sign | (uint8_t)(r * 0x1p9f));
    }
    uint32_t m = u & 0x7fffffffu;
    m += 0x7ffffu + ((m >> 20) & 1u);
    m -= (uint32_t)(127 - 7) << 23;
    return (uint8_t)(sign | (uint8_t)(m >> 20));
}

/* Power-of-two scale of a quantised row: 2^ceil(log2(max(amax, 1e-4) / 448)), exactly as the demo computes it. */
static inline float tr_ue8m0_scale(float amax)
{
    float a = (amax > 1e-4f ? amax : 1e-4f) * (1.0f / 448.0f);
    uint32_t u = tr_f32_bits(a);
    if (u & 0x7fffffu) u = (u & 0xff800000u) + 0x800000u;
    return tr_bits_f32(u);
}

#endif
