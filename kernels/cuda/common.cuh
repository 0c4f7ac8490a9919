/* What the portable kernels share: live rows, sums over a block of threads in one order, number
 * formats (model.md 5.1). */
#ifndef TR_CUDA_COMMON_CUH
#define TR_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <math_constants.h>

#include "kernels/cuda/ops.h"
#include "kernels/cuda/quantise.cuh"

namespace tr
{

__device__ __forceinline__ int live_rows(const int32_t *n, int n_max)
{
    const int v = *n;
    return v < 0 ? 0 : v < n_max ? v : n_max;
}

__device__ __forceinline__ bool is_pad(const tr_rows &rows, int i)
{
    return rows.write[i] < 0;
}

inline unsigned blocks_for(size_t n, size_t per_block)
{
    return (unsigned)((n + per_block - 1) / per_block);
}

inline unsigned at_most(size_t n, unsigned most)
{
    return n < most ? (unsigned)n : most;
}

/* ---- activations: bf16 -------------------------------------------------------------------------------------------- */

__host__ __device__ inline const __nv_bfloat16 *act(const tr_act *p)
{
    return (const __nv_bfloat16 *)(const void *)p;
}
__host__ __device__ inline __nv_bfloat16 *act(tr_act *p)
{
    return (__nv_bfloat16 *)(void *)p;
}

/* A number of an array of either kind. */
__device__ __forceinline__ float read_number(const void *p, size_t i, int is_f32)
{
    return is_f32 ? ((const float *)p)[i] : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
__device__ __forceinline__ void write_number(void *p, size_t i, int is_f32, float x)
{
    if (is_f32)
        ((float *)p)[i] = x;
    else
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
}

/* Four at a multiple of four. */
__device__ __forceinline__ float4 four_of(uint2 raw)
{
    const float2 a = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.x),
                 b = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.y);
    return make_float4(a.x, a.y, b.x, b.y);
}
__device__ __forceinline__ float4 read_four(const __nv_bfloat16 *p)
{
    return four_of(*(const uint2 *)p);
}
__device__ __forceinline__ void write_four(__nv_bfloat16 *p, float4 v)
{
    const __nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
    *(uint2 *)p = make_uint2(*(const uint32_t *)&a, *(const uint32_t *)&b);
}

/* Eight at a multiple of eight. */
__device__ __forceinline__ void eight_of(float (&v)[8], uint4 raw)
{
    const uint32_t pair[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 f = __bfloat1622float2(*(const __nv_bfloat162 *)&pair[i]);
        v[2 * i] = f.x;
        v[2 * i + 1] = f.y;
    }
}

__device__ __forceinline__ float silu_times(float gate, float up)
{
    return gate / (1.0f + expf(-gate)) * up;
}

/* ---- sums, maxima: a tree over the lanes, then over the warps; all threads get the result ------------------------- */

template <class T> __device__ __forceinline__ T add(T a, T b)
{
    return a + b;
}
template <class T> __device__ __forceinline__ T larger(T a, T b)
{
    return a > b ? a : b;
}

template <class T, T op(T, T)> __device__ __forceinline__ T warp_reduce(T x)
{
#pragma unroll
    for (int half = 16; half > 0; half /= 2)
        x = op(x, __shfl_xor_sync(0xffffffffu, x, half));
    return x;
}

/* scratch: a word for each warp and one more. */
template <class T, T op(T, T)> __device__ T block_reduce(T x, T *scratch)
{
    const int warp = (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    x = warp_reduce<T, op>(x);
    if (threadIdx.x % 32 == 0) scratch[warp] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < n_warps; i++)
            x = op(x, scratch[i]);
        scratch[n_warps] = x;
    }
    __syncthreads();
    x = scratch[n_warps];
    __syncthreads();
    return x;
}

/* Sum of x over the threads before this one; *total: over all. scratch: a word for each warp and
 * one more. */
__device__ __forceinline__ int block_scan(int x, int *scratch, int *total)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32,
              n_warps = (int)blockDim.x / 32;
    int sum = x;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int low = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += low;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        int before = 0;
        for (int i = 0; i < n_warps; i++) {
            const int here = scratch[i];
            scratch[i] = before;
            before += here;
        }
        scratch[n_warps] = before;
    }
    __syncthreads();
    sum += scratch[warp] - x;
    *total = scratch[n_warps];
    __syncthreads();
    return sum;
}

/* ---- number formats ------------------------------------------------------------------------------------------------ */

__device__ __forceinline__ float round_bf16(float x)
{
    return __bfloat162float(__float2bfloat16_rn(x));
}

/* 2^ceil(log2(max(amax, 1e-4) / 448)), as kernels/number.h makes it. */
__device__ __forceinline__ float scale_pow2(float amax)
{
    const float a = __fmul_rn(amax > 1e-4f ? amax : 1e-4f, 1.0f / 448.0f);
    return __uint_as_float((__float_as_uint(a) + 0x7fffffu) & 0xff800000u);
}

__device__ __forceinline__ float from_e4m3(uint8_t code)
{
    const __half_raw h = __nv_cvt_fp8_to_halfraw(code, __NV_E4M3);
    return __half2float(__half(h));
}

/* ---- cache records (model.md 5.3-5.5) ------------------------------------------------------------------------------ */

__host__ __device__ inline size_t kv_row_bytes(const tr_kv_layer &kv)
{
    const size_t latent = (size_t)kv.d_latent, rope = (size_t)kv.d_rope;
    if (kv.dtype == TR_E4M3) return latent + (latent + 127) / 128 * 4 + 2 * rope;
    return 2 * (latent + rope);
}

__host__ __device__ inline size_t index_page_bytes(const tr_kv_layer &kv)
{
    return (size_t)TR_PAGE_TOKENS * ((size_t)kv.d_index + 4);
}

/* Number i of a latent row, [c | k_pe], as bf16: e4m3 times a power of two of moderate size is
 * exact in it. Widths are multiples of 4 and 2 (cuda.c checks), so every part of a record lies on
 * its own alignment. */
__device__ __forceinline__ __nv_bfloat16 read_latent(const tr_kv_layer &kv, const uint8_t *row,
                                                     int i)
{
    if (kv.dtype == TR_BF16) return ((const __nv_bfloat16 *)row)[i];
    const int d = kv.d_latent, n_scales = (d + 127) / 128;
    if (i < d) return __float2bfloat16_rn(from_e4m3(row[i]) * ((const float *)(row + d))[i / 128]);
    return ((const __nv_bfloat16 *)(row + d + n_scales * 4))[i - d];
}

/* ---- tensor cores: m16n8k16, fp32 accumulation --------------------------------------------------------------------- */

/* Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void load_matrices(uint32_t r[4], const void *p)
{
    const uint32_t a = (uint32_t)__cvta_generic_to_shared(p);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a));
}
__device__ __forceinline__ void load_transposed(uint32_t r[4], const void *p)
{
    const uint32_t a = (uint32_t)__cvta_generic_to_shared(p);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a));
}

__device__ __forceinline__ void multiply(float c[4], const uint32_t a[4], const uint32_t b[2],
                                         __nv_bfloat16)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply(float c[4], const uint32_t a[4], const uint32_t b[2],
                                         __half)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

} // namespace tr

#endif
