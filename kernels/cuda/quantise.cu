#include "kernels/cuda/quantise.h"

#include <cuda_bf16.h>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"

namespace
{

/* 16 lanes hold a block of 128, 8 numbers each; a warp takes neighbouring rows' blocks, 8 rows in neighbouring half-warps, so that
 * their scales fall into one sector. A half-warp has BLOCKS blocks of its row, all of them asked for at once; of few rows, one. */
enum { ROWS = 8, THREADS = ROWS * 16, MANY = 4, MANY_ROWS = 256 };

/* What becomes codes: rows of x, or silu(gate) * up of rows that hold gate in [0, d) and up in [d, 2 d), as bf16. */
template <bool SWIGLU> struct source;
template <> struct source<false> {
    uint4 x;
    __device__ __forceinline__ void load(const __nv_bfloat16 *at, int)
    {
        x = *(const uint4 *)at;
    }
    __device__ __forceinline__ void numbers(float (&v)[8]) const
    {
        tr::eight_of(v, x);
    }
};
template <> struct source<true> {
    uint4 gate, up;
    __device__ __forceinline__ void load(const __nv_bfloat16 *at, int d)
    {
        gate = *(const uint4 *)at;
        up = *(const uint4 *)(at + d);
    }
    __device__ __forceinline__ void numbers(float (&v)[8]) const
    {
        float u[8];
        tr::eight_of(v, gate);
        tr::eight_of(u, up);
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = tr::round_bf16(tr::silu_times(v[i], u[i]));
    }
};

template <bool SWIGLU, int BLOCKS>
__global__ void __launch_bounds__(THREADS)
    quantise_rows(const __nv_bfloat16 *x, size_t ld_x, const int32_t *n, int n_max, int d,
                  int ld_scale, int ue8m0, uint8_t *q, float *scale)
{
    const int lane = (int)threadIdx.x % 16, row = (int)blockIdx.y * ROWS + (int)threadIdx.x / 16;
    const int block0 = (int)blockIdx.x * BLOCKS;
    source<SWIGLU> in[BLOCKS] = {};
    tr::early::follow();
    if (row >= min(*n, n_max)) return;

    const unsigned mask = 0xffffu << (threadIdx.x & 16);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        const int column = (block0 + b) * 128 + lane * 8;
        if (column < d) in[b].load(x + (size_t)row * ld_x + column, d);
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        const int column = (block0 + b) * 128 + lane * 8;
        if ((block0 + b) * 128 >= d) break;
        float v[8], amax = 0;
        in[b].numbers(v);
#pragma unroll
        for (int i = 0; i < 8; i++)
            amax = fmaxf(amax, fabsf(v[i]));
#pragma unroll
        for (int s = 8; s; s /= 2)
            amax = fmaxf(amax, __shfl_xor_sync(mask, amax, s));

        const float sc = tr::block_scale(amax, ue8m0), inverse = 1.0f / sc;
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = tr::block_divide(v[i], sc, inverse, ue8m0);
        if (column >= d) continue;
        uint2 out;
        out.x = tr::to_e4m3x2(v[0], v[1]) | tr::to_e4m3x2(v[2], v[3]) << 16;
        out.y = tr::to_e4m3x2(v[4], v[5]) | tr::to_e4m3x2(v[6], v[7]) << 16;
        *reinterpret_cast<uint2 *>(q + (size_t)row * (size_t)d + column) = out;
        if (lane == 0) scale[(size_t)(block0 + b) * (size_t)ld_scale + (size_t)row] = sc;
    }
}

template <bool SWIGLU>
cudaError_t launch(const void *x_d, size_t ld_x, const int32_t *n_d, int n_max, int d, int ue8m0,
                   uint8_t *q_d, float *scale_d, cudaStream_t stream)
{
    if (n_max <= 0) return cudaSuccess;
    if (d <= 0 || d % 8 || ld_x % 8) return cudaErrorInvalidValue;
    const int blocks = (d + 127) / 128;
    const bool many = n_max >= MANY_ROWS;
    const dim3 grid((unsigned)(many ? (blocks + MANY - 1) / MANY : blocks),
                    (unsigned)((n_max + ROWS - 1) / ROWS));
    return tr::early::launch(many ? quantise_rows<SWIGLU, MANY> : quantise_rows<SWIGLU, 1>, 1, grid,
                             THREADS, 0, stream, (const __nv_bfloat16 *)x_d, ld_x, n_d, n_max, d,
                             (n_max + 3) / 4 * 4, ue8m0, q_d, scale_d);
}

} // namespace

cudaError_t tr_quantise_rows(const void *x_d, size_t ld_x, const int32_t *n_d, int n_max, int d,
                             int ue8m0, uint8_t *q_d, float *scale_d, cudaStream_t stream)
{
    return launch<false>(x_d, ld_x, n_d, n_max, d, ue8m0, q_d, scale_d, stream);
}

cudaError_t tr_quantise_swiglu(const void *gate_up_d, const int32_t *n_d, int n_max, int d,
                               int ue8m0, uint8_t *q_d, float *scale_d, cudaStream_t stream)
{
    return launch<true>(gate_up_d, 2 * (size_t)d, n_d, n_max, d, ue8m0, q_d, scale_d, stream);
}
