/* A row's sum of squares and its RMSNorm, as bf16 and as e4m3, in one order wherever it is made: by the norm alone (rows.cu) and
 * by the kernel that adds up the members' terms first (peer.cu). Thread t of 1024 has numbers [4t, 4t + 4) and, ROUNDS times,
 * those 4096 further on; 32 lanes have a block of 128. */
#ifndef TR_CUDA_NORM_CUH
#define TR_CUDA_NORM_CUH

#include "kernels/cuda/common.cuh"
#include "kernels/limits.h"

namespace tr
{

enum { NORM_THREADS = 1024, NORM_ROUNDS = 2, NORM_MOST = TR_CUDA_NORM_MAX };
static_assert(NORM_MOST == NORM_ROUNDS * NORM_THREADS * 4, "what the threads of a row have");

/* Number of thread t's first of round i. */
__device__ __forceinline__ int norm_at(int i, int t)
{
    return (i * NORM_THREADS + t) * 4;
}

/* This thread's part of the sum of squares; what lies past the row's end is 0. */
__device__ __forceinline__ float norm_squares(const float4 v[NORM_ROUNDS])
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < NORM_ROUNDS; i++) {
        sum = __fmaf_rn(v[i].x, v[i].x, sum);
        sum = __fmaf_rn(v[i].y, v[i].y, sum);
        sum = __fmaf_rn(v[i].z, v[i].z, sum);
        sum = __fmaf_rn(v[i].w, v[i].w, sum);
    }
    return sum;
}

__device__ __forceinline__ float norm_inverse(const tr_norm_args &a, float sum)
{
    return 1.0f / sqrtf(sum / (float)a.d + a.eps);
}

/* Numbers [j, j + 4) of row r of out, and of q and q_scale where they are wanted. Whole warps, each with a block of 128. */
__device__ __forceinline__ void norm_four(const tr_norm_args &a, int ld_scale, int r, int j,
                                          float4 v, float4 w, float inverse)
{
    const float4 y = make_float4(round_bf16(v.x * inverse * w.x), round_bf16(v.y * inverse * w.y),
                                 round_bf16(v.z * inverse * w.z), round_bf16(v.w * inverse * w.w));
    write_four(act(a.out) + (size_t)r * a.ld_out + j, y);
    if (!a.q) return;
    float most = fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w)));
    most = warp_reduce<float, larger<float>>(most);
    const float scale = block_scale(most, a.scale_pow2), inv = 1.0f / scale;
    *(uint32_t *)(a.q + (size_t)r * (size_t)a.d + (size_t)j) =
        to_e4m3x2(block_divide(y.x, scale, inv, a.scale_pow2),
                  block_divide(y.y, scale, inv, a.scale_pow2)) |
        to_e4m3x2(block_divide(y.z, scale, inv, a.scale_pow2),
                  block_divide(y.w, scale, inv, a.scale_pow2))
            << 16;
    if (threadIdx.x % 32 == 0) a.q_scale[(size_t)(j / 128) * (size_t)ld_scale + (size_t)r] = scale;
}

/* Row r of thread t of NORM_THREADS. sum: of all squares. */
__device__ __forceinline__ void norm_store(const tr_norm_args &a, int ld_scale, int r, int t,
                                           const float4 v[NORM_ROUNDS], const float4 w[NORM_ROUNDS],
                                           float sum)
{
    const float inverse = norm_inverse(a, sum);
#pragma unroll
    for (int i = 0; i < NORM_ROUNDS; i++) {
        const int j = norm_at(i, t);
        if (j >= a.d) break; /* a whole warp at a time */
        norm_four(a, ld_scale, r, j, v[i], w[i], inverse);
    }
}

/* What these forms can do: rows of whole blocks of 128 numbers, aligned. */
inline bool norm_fits(const tr_norm_args &a)
{
    return a.d % 128 == 0 && a.ld_residual % 4 == 0 && a.ld_add % 4 == 0 && a.ld_out % 4 == 0 &&
           a.d <= NORM_MOST;
}

} // namespace tr

#endif
