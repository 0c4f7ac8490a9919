/* Cache records and index queries. One warp per token (per head of a query): lane l holds values 4 l .. 4 l + 3 of every 128.
 * Each step rounds as the CPU backend does (kernels/cpu/kv_write.c, indexer.c): products and sums apart, never fused, and sums over
 * a row in its order: the same bits. */
#include "kernels/cuda/kv_write.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quantise.cuh"

namespace tr
{
namespace
{

constexpr int WARPS = 4, BLOCK = 128, D_LATENT_MAX = 512, D_ROPE_MAX = 64;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct four {
    float x[4];
};

/* What the CPU's 16 accumulators hold, number i of the row in i % 16, in ascending order: here lane l has 4 (l % 4) and the next
 * three, of N blocks of 128. Numbers past the end are zeros, which add nothing to a sum of squares; n: how many there are. */
template <int N> __device__ __forceinline__ four accumulators(const four (&v)[N], int n)
{
    const int first = (threadIdx.x & 3);
    four part = {};
#pragma unroll
    for (int b = 0; b < N; b++)
#pragma unroll
        for (int l = 0; l < 8; l++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float x = __shfl_sync(ALL_LANES, v[b].x[i], first + 4 * l);
                if (b * 128 + 16 * l + 4 * first + i < n) part.x[i] = __fadd_rn(part.x[i], x);
            }
    return part;
}
/* Joined one after the other. */
template <int N> __device__ __forceinline__ float sum_of_squares(const four (&v)[N], int n)
{
    four square[N];
    float sum = 0;
#pragma unroll
    for (int b = 0; b < N; b++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            square[b].x[i] = __fmul_rn(v[b].x[i], v[b].x[i]);
    const four part = accumulators(square, n);
#pragma unroll
    for (int c = 0; c < 16; c++)
        sum = __fadd_rn(sum, __shfl_sync(ALL_LANES, part.x[c % 4], c / 4));
    return sum;
}
/* Joined in halves: c with c + 8, + 4, + 2, + 1. */
__device__ __forceinline__ float sum_of(const four (&v)[1], int n)
{
    four part = accumulators(v, n);
#pragma unroll
    for (int d = 2; d; d /= 2)
#pragma unroll
        for (int i = 0; i < 4; i++)
            part.x[i] = __fadd_rn(part.x[i], __shfl_down_sync(ALL_LANES, part.x[i], d));
    const float even = __fadd_rn(part.x[0], part.x[2]), odd = __fadd_rn(part.x[1], part.x[3]);
    return __shfl_sync(ALL_LANES, __fadd_rn(even, odd), 0);
}

__device__ __forceinline__ float bf16_round(float x)
{
    return __bfloat162float(__float2bfloat16_rn(x));
}

/* 2^ceil(log2(max(amax, 1e-4) / 448)), as tr_ue8m0_scale. */
__device__ __forceinline__ float ue8m0_scale(float amax)
{
    uint32_t u = __float_as_uint(__fmul_rn(amax > 1e-4f ? amax : 1e-4f, 1.0f / 448.0f));
    if (u & 0x7fffffu) u = (u & 0xff800000u) + 0x800000u;
    return __uint_as_float(u);
}

/* One block of up to 128 values over the warp: four codes in a word, *scale. Lanes past the end hold zeros. */
__device__ __forceinline__ uint32_t quantise(const four &v, float *scale)
{
    float amax = 0;
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        amax = fmaxf(amax, fabsf(v.x[i]));
#pragma unroll
    for (int d = 16; d; d /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(ALL_LANES, amax, d));
    *scale = ue8m0_scale(amax);
    float inverse = 1.0f / *scale;
#pragma unroll
    for (int i = 0; i < 4; i++)
        codes |= (uint32_t)__nv_cvt_float_to_fp8(v.x[i] * inverse, __NV_SATFINITE, __NV_E4M3)
                 << (8 * i);
    return codes;
}

__device__ __forceinline__ four load_four(const __nv_bfloat16 *from)
{
    four v;
    if ((uintptr_t)from % 8 == 0) {
        const uint2 raw = *(const uint2 *)(const void *)from;
        const float2 a = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.x),
                     b = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.y);
        return {{a.x, a.y, b.x, b.y}};
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        v.x[i] = __bfloat162float(from[i]);
    return v;
}

/* Half-split rope of the first d_rope of a row of 128: value j pairs with j + d_rope / 2, which another lane has. */
__device__ __forceinline__ void rope_half_split(four &v, const float *cos_sin, int d_rope)
{
    int lane = threadIdx.x & 31, j = lane * 4, half = d_rope / 2;
    bool first = j < half, in = j < d_rope;
    int other = first ? lane + half / 4 : lane - half / 4;

#pragma unroll
    for (int i = 0; i < 4; i++) {
        float mate = __shfl_sync(ALL_LANES, v.x[i], other & 31);
        int pair = first ? j + i : j + i - half;
        if (!in) continue;
        float c = cos_sin[2 * pair], s = cos_sin[2 * pair + 1];
        v.x[i] = first ? __fsub_rn(__fmul_rn(v.x[i], c), __fmul_rn(mate, s))
                       : __fadd_rn(__fmul_rn(mate, s), __fmul_rn(v.x[i], c));
    }
}

/* H_d x / sqrt(d): the butterflies of tr_hadamard, the first two levels within a lane. */
__device__ __forceinline__ void hadamard(four &v, int d)
{
    int lane = threadIdx.x & 31;
    float a = v.x[0] + v.x[1], b = v.x[0] - v.x[1], c = v.x[2] + v.x[3], e = v.x[2] - v.x[3];

    v.x[0] = a + c;
    v.x[1] = b + e;
    v.x[2] = a - c;
    v.x[3] = b - e;
    for (int half = 1; half < d / 4; half *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float mate = __shfl_xor_sync(ALL_LANES, v.x[i], half);
            v.x[i] = lane & half ? mate - v.x[i] : v.x[i] + mate;
        }
    float factor = 1.0f / sqrtf((float)d);
#pragma unroll
    for (int i = 0; i < 4; i++)
        v.x[i] = __fmul_rn(v.x[i], factor);
}

/* Steps 3 and 4 of model.md 4 for a row of d values, zeros past them. */
__device__ __forceinline__ uint32_t index_quantise(four &v, int d, float *scale)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        v.x[i] = bf16_round(v.x[i]);
    hadamard(v, d);
#pragma unroll
    for (int i = 0; i < 4; i++)
        v.x[i] = (threadIdx.x & 31) * 4 < d ? bf16_round(v.x[i]) : 0.0f;
    return quantise(v, scale);
}

__device__ __forceinline__ void write_latent(const tr_kv_write_args &a, const tr_rows &rows, int r)
{
    const __nv_bfloat16 *in = (const __nv_bfloat16 *)(const void *)a.kv_a + (size_t)r * a.ld_kv_a;
    int lane = threadIdx.x & 31, n = a.kv.d_latent, d_rope = a.kv.d_rope;
    int n_blocks = (n + BLOCK - 1) / BLOCK;
    bool codes = a.kv.dtype == TR_E4M3;
    size_t bytes = codes ? (size_t)(n + 4 * n_blocks + 2 * d_rope) : 2 * (size_t)(n + d_rope);
    uint8_t *to = (uint8_t *)a.kv.latent + (size_t)rows.write[r] * bytes;
    four v[D_LATENT_MAX / BLOCK];

#pragma unroll
    for (int b = 0; b < D_LATENT_MAX / BLOCK; b++) {
        int j = b * BLOCK + lane * 4;
        v[b] = j < n ? load_four(in + j) : four{};
    }
    float mean = __fdiv_rn(sum_of_squares(v, n), (float)n);
    float factor = __fdiv_rn(1.0f, sqrtf(__fadd_rn(mean, a.eps)));
#pragma unroll
    for (int b = 0; b < D_LATENT_MAX / BLOCK; b++) {
        int j = b * BLOCK + lane * 4;
        float scale;
        if (b >= n_blocks) break;
        for (int i = 0; i < 4; i++)
            v[b].x[i] = j < n ? __fmul_rn(__fmul_rn(v[b].x[i], factor), a.norm[j + i]) : 0.0f;
        if (codes) {
            uint32_t word = quantise(v[b], &scale);
            if (j < n) *(uint32_t *)(to + j) = word;
            if (lane == 0) *(float *)(to + n + 4 * b) = scale;
        } else if (j < n) {
            for (int i = 0; i < 4; i++)
                ((__nv_bfloat16 *)to)[j + i] = __float2bfloat16_rn(v[b].x[i]);
        }
    }
    if (2 * lane < d_rope) {
        const float *cos_sin = a.rope + (size_t)rows.position[r] * d_rope + 2 * lane;
        __nv_bfloat16 *half = (__nv_bfloat16 *)(to + (codes ? n + 4 * n_blocks : 2 * n)) + 2 * lane;
        float x = __bfloat162float(in[n + 2 * lane]), y = __bfloat162float(in[n + 2 * lane + 1]);
        float c = cos_sin[0], s = cos_sin[1];
        half[0] = __float2bfloat16_rn(__fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s)));
        half[1] = __float2bfloat16_rn(__fadd_rn(__fmul_rn(x, s), __fmul_rn(y, c)));
    }
}

__device__ __forceinline__ void write_index(const tr_kv_write_args &a, const tr_rows &rows, int r)
{
    const __nv_bfloat16 *in =
        (const __nv_bfloat16 *)(const void *)a.index_k + (size_t)r * a.ld_index_k;
    int n = a.kv.d_index, j = (threadIdx.x & 31) * 4;
    int64_t page = rows.write[r] / TR_PAGE_TOKENS, slot = rows.write[r] % TR_PAGE_TOKENS;
    uint8_t *base = (uint8_t *)a.kv.index + (size_t)page * TR_PAGE_TOKENS * (size_t)(n + 4);
    four row[1] = {j < n ? load_four(in + j) : four{}};
    four &v = row[0];
    float scale, mean = __fdiv_rn(sum_of(row, n), (float)n);
#pragma unroll
    for (int i = 0; i < 4; i++)
        v.x[i] = j < n ? __fsub_rn(v.x[i], mean) : 0.0f;
    float factor =
        __fdiv_rn(1.0f, sqrtf(__fadd_rn(__fdiv_rn(sum_of_squares(row, n), (float)n), 1e-6f)));
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (j < n)
            v.x[i] = bf16_round(
                __fadd_rn(__fmul_rn(__fmul_rn(v.x[i], factor), a.k_norm[j + i]), a.k_bias[j + i]));
    rope_half_split(v, a.rope + (size_t)rows.position[r] * a.kv.d_rope, a.kv.d_rope);
    uint32_t word = index_quantise(v, n, &scale);
    if (j < n) *(uint32_t *)(base + slot * n + j) = word;
    if (j == 0) ((float *)(base + TR_PAGE_TOKENS * n))[slot] = scale;
}

__global__ void __launch_bounds__(WARPS * 32)
    kv_write_kernel(const __grid_constant__ tr_kv_write_args a,
                    const __grid_constant__ tr_rows rows)
{
    int r = (int)blockIdx.x * WARPS + (int)(threadIdx.x >> 5);
    early::follow();
    if (r >= min(*rows.n, rows.n_max) || rows.write[r] < 0) return;
    if (blockIdx.y == 0 && a.kv_a && a.kv.latent) write_latent(a, rows, r);
    if (blockIdx.y == 1 && a.index_k && a.kv.index) write_index(a, rows, r);
}

__global__ void __launch_bounds__(WARPS * 32)
    index_query_kernel(const __grid_constant__ tr_index_query_args a,
                       const __grid_constant__ tr_rows rows)
{
    int at = (int)blockIdx.x * WARPS + (int)(threadIdx.x >> 5), r = at / a.n_heads;
    int n = a.d_index, j = (threadIdx.x & 31) * 4;
    float scale;

    early::follow();
    if (r >= min(*rows.n, rows.n_max) || rows.write[r] < 0) return;
    const __nv_bfloat16 *in = (const __nv_bfloat16 *)(const void *)a.q + (size_t)at * n;
    four v = j < n ? load_four(in + j) : four{};
    rope_half_split(v, a.rope + (size_t)rows.position[r] * a.d_rope, a.d_rope);
    uint32_t word = index_quantise(v, n, &scale);
    if (j < n) *(uint32_t *)((uint8_t *)a.out + (size_t)at * n + j) = word;
    float constant = 1.0f / sqrtf((float)a.n_heads) / sqrtf((float)n);
    if (j == 0) a.w[at] = __fmul_rn(__fmul_rn(a.w[at], constant), scale);
}

/* The same of rows of 128 with rope on 64 of them, as the real model has: four lanes a row, lane l with numbers 32 i + 8 l + j. So
 * rope's pairs, 32 apart, and five of the seven levels of butterflies stay within a lane; the pairs of every level are those of
 * hadamard(), in its order: the same bits. */
enum { QUERY_LANES = 4, QUERY_ROWS = WARPS * 32 / QUERY_LANES };

/* Levels of butterflies between numbers that lie half apart in the lane. */
__device__ __forceinline__ void butterflies(float (&v)[32], int half)
{
#pragma unroll
    for (int i = 0; i < 32; i++) {
        if (i & half) continue;
        const float a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
    }
}
/* And between the same number of two lanes. */
__device__ __forceinline__ void butterflies_of_lanes(float (&v)[32], int lanes)
{
    const bool high = threadIdx.x & (unsigned)lanes;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float mate = __shfl_xor_sync(ALL_LANES, v[i], lanes);
        v[i] = high ? mate - v[i] : v[i] + mate;
    }
}

__global__ void __launch_bounds__(WARPS * 32)
    index_query_rows(const __grid_constant__ tr_index_query_args a,
                     const __grid_constant__ tr_rows rows)
{
    const int at = (int)blockIdx.x * QUERY_ROWS + (int)threadIdx.x / QUERY_LANES,
              r = at / a.n_heads, j = (int)threadIdx.x % QUERY_LANES * 8;
    early::follow();
    /* Whole warps go on: lanes of rows that are none hold zeros. */
    const bool wanted = r < min(*rows.n, rows.n_max) && rows.write[r] >= 0;
    if (!__any_sync(ALL_LANES, wanted)) return;

    const uint4 *in = (const uint4 *)((const __nv_bfloat16 *)(const void *)a.q +
                                      (size_t)(wanted ? at : 0) * BLOCK + j);
    const float4 *turn =
        (const float4 *)(a.rope + (size_t)(wanted ? rows.position[r] : 0) * D_ROPE_MAX + 2 * j);
    float w = wanted && j == 0 ? a.w[at] : 0.0f;
    uint4 raw[4];
    float v[32];
#pragma unroll
    for (int i = 0; i < 4; i++)
        raw[i] = wanted ? in[4 * i] : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t pair[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float2 f = __bfloat1622float2(*(const __nv_bfloat162 *)&pair[c]);
            v[8 * i + 2 * c] = f.x;
            v[8 * i + 2 * c + 1] = f.y;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const float4 t = turn[c];
        const float cosine[2] = {t.x, t.z}, sine[2] = {t.y, t.w};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float x = v[2 * c + h], y = v[8 + 2 * c + h];
            v[2 * c + h] = __fsub_rn(__fmul_rn(x, cosine[h]), __fmul_rn(y, sine[h]));
            v[8 + 2 * c + h] = __fadd_rn(__fmul_rn(x, sine[h]), __fmul_rn(y, cosine[h]));
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) /* what rope left alone is bf16 */
        v[i] = bf16_round(v[i]);
    butterflies(v, 1);
    butterflies(v, 2);
    butterflies(v, 4);
    butterflies_of_lanes(v, 1);
    butterflies_of_lanes(v, 2);
    butterflies(v, 8);
    butterflies(v, 16);

    const float factor = 1.0f / sqrtf((float)BLOCK);
    float most = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        v[i] = bf16_round(__fmul_rn(v[i], factor));
        most = fmaxf(most, fabsf(v[i]));
    }
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
    const float scale = ue8m0_scale(most), inverse = 1.0f / scale;
    if (!wanted) return;
    uint8_t *out = (uint8_t *)a.out + (size_t)at * BLOCK + j;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t codes[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float *x = v + 8 * i + 4 * h;
            codes[h] = to_e4m3x2(x[0] * inverse, x[1] * inverse) |
                       to_e4m3x2(x[2] * inverse, x[3] * inverse) << 16;
        }
        *(uint2 *)(out + 32 * i) = make_uint2(codes[0], codes[1]);
    }
    const float constant = 1.0f / sqrtf((float)a.n_heads) / sqrtf((float)BLOCK);
    if (j == 0) a.w[at] = __fmul_rn(__fmul_rn(w, constant), scale);
}

bool index_shape_ok(int d_index, int d_rope)
{
    return d_index >= 8 && d_index <= BLOCK && (d_index & (d_index - 1)) == 0 && d_rope >= 0 &&
           d_rope <= d_index && d_rope % 8 == 0;
}

} // namespace
} // namespace tr

extern "C" cudaError_t tr_cuda_kv_write(const struct tr_kv_write_args *a, cudaStream_t stream)
{
    const tr_kv_layer *kv = &a->kv;
    int n_blocks = (a->rows->n_max + tr::WARPS - 1) / tr::WARPS;

    if (kv->dtype == TR_F32 || a->push.n_peers) return cudaErrorNotSupported;
    if (a->kv_a && kv->latent &&
        (kv->d_latent < 4 || kv->d_latent > tr::D_LATENT_MAX || kv->d_latent % 4 ||
         kv->d_rope < 0 || kv->d_rope > tr::D_ROPE_MAX || kv->d_rope % 2))
        return cudaErrorNotSupported;
    if (a->index_k && kv->index && !tr::index_shape_ok(kv->d_index, kv->d_rope))
        return cudaErrorNotSupported;
    if (n_blocks < 1) return cudaSuccess;
    return tr::early::launch(tr::kv_write_kernel, 1, dim3((unsigned)n_blocks, 2), tr::WARPS * 32, 0,
                             stream, *a, *a->rows);
}

extern "C" cudaError_t tr_cuda_index_query(const struct tr_index_query_args *a, cudaStream_t stream)
{
    int64_t n = (int64_t)a->rows->n_max * a->n_heads;

    if (a->cache_dtype == TR_F32 || !tr::index_shape_ok(a->d_index, a->d_rope))
        return cudaErrorNotSupported;
    if (n > INT32_MAX - tr::WARPS) return cudaErrorInvalidValue;
    if (n < 1) return cudaSuccess;
    if (a->d_index == tr::BLOCK && a->d_rope == tr::D_ROPE_MAX && (uintptr_t)a->q % 16 == 0 &&
        (uintptr_t)a->out % 8 == 0 && (uintptr_t)a->rope % 16 == 0)
        return tr::early::launch(tr::index_query_rows, 1,
                                 dim3((unsigned)((n + tr::QUERY_ROWS - 1) / tr::QUERY_ROWS)),
                                 tr::WARPS * 32, 0, stream, *a, *a->rows);
    return tr::early::launch(tr::index_query_kernel, 1,
                             dim3((unsigned)((n + tr::WARPS - 1) / tr::WARPS)), tr::WARPS * 32, 0,
                             stream, *a, *a->rows);
}
