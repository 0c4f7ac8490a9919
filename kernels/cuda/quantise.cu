#include "kernels/cuda/quantise.h"

#include <cuda_bf16.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quantise.cuh"

namespace
{

enum { ROWS = 8, BLOCKS = 4, THREADS = ROWS * BLOCKS * 16 };

/* 16 lanes hold a block of 128, 8 numbers each; a CUDA block takes 8 rows x 4 scale blocks, neighbouring rows in
 * neighbouring half-warps so that their scales fall into one sector. */
__global__ void __launch_bounds__(THREADS)
    quantise_rows(const __nv_bfloat16 *x, size_t ld_x, const int32_t *n, int n_max, int d,
                  int ld_scale, int ue8m0, uint8_t *q, float *scale)
{
    const int lane = (int)threadIdx.x % 16, half = (int)threadIdx.x / 16;
    const int row = (int)blockIdx.y * ROWS + half % ROWS;
    const int block = (int)blockIdx.x * BLOCKS + half / ROWS;
    const int column = block * 128 + lane * 8;
    tr::early::follow();
    if (row >= min(*n, n_max)) return;

    float v[8] = {};
    if (column < d) {
        uint4 raw = *reinterpret_cast<const uint4 *>(x + (size_t)row * ld_x + column);
        const __nv_bfloat162 *pair = reinterpret_cast<const __nv_bfloat162 *>(&raw);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 f = __bfloat1622float2(pair[i]);
            v[2 * i] = f.x;
            v[2 * i + 1] = f.y;
        }
    }
    float amax = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        amax = fmaxf(amax, fabsf(v[i]));
    const unsigned mask = 0xffffu << (threadIdx.x & 16);
#pragma unroll
    for (int s = 8; s; s /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(mask, amax, s));

    const float sc = tr::block_scale(amax, ue8m0), inverse = 1.0f / sc;
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = tr::block_divide(v[i], sc, inverse, ue8m0);
    if (column < d) {
        uint2 out;
        out.x = tr::to_e4m3x2(v[0], v[1]) | tr::to_e4m3x2(v[2], v[3]) << 16;
        out.y = tr::to_e4m3x2(v[4], v[5]) | tr::to_e4m3x2(v[6], v[7]) << 16;
        *reinterpret_cast<uint2 *>(q + (size_t)row * d + column) = out;
        if (lane == 0) scale[(size_t)block * ld_scale + row] = sc;
    }
}

} // namespace

cudaError_t tr_quantise_rows(const void *x_d, size_t ld_x, const int32_t *n_d, int n_max, int d,
                             int ue8m0, uint8_t *q_d, float *scale_d, cudaStream_t stream)
{
    if (n_max <= 0) return cudaSuccess;
    if (d <= 0 || d % 8 || ld_x % 8) return cudaErrorInvalidValue;
    const int blocks = (d + 127) / 128;
    dim3 grid((unsigned)((blocks + BLOCKS - 1) / BLOCKS), (unsigned)((n_max + ROWS - 1) / ROWS));
    return tr::early::launch(quantise_rows, 1, grid, THREADS, 0, stream, (const __nv_bfloat16 *)x_d,
                             ld_x, n_d, n_max, d, (n_max + 3) / 4 * 4, ue8m0, q_d, scale_d);
}
