/* Cache records and index queries (model.md 3.4, 4, 5.3-5.5): the bits of the CPU's plain forms. So
 * sums go into 16 accumulators, number i into i % 16, joined as kernels/cpu/attention_plain.c
 * (sums) and gemm_plain.c (squares) do; nothing is contracted. */
#include "kernels/cuda/common.cuh"
#include "kernels/limits.h"

namespace
{

enum { WARPS = 4, D_KEY_MAX = 1024, D_INDEX_MAX = TR_CUDA_D_INDEX_MAX };

/* Lanes 0 to 15 have an accumulator each. */
__device__ float sum_of(const float *x, int n)
{
    float part = 0;
    for (int i = (int)threadIdx.x % 32; i < n && threadIdx.x % 32 < 16; i += 16)
        part = __fadd_rn(part, x[i]);
#pragma unroll
    for (int half = 8; half > 0; half /= 2)
        part = __fadd_rn(part, __shfl_down_sync(0xffffffffu, part, half));
    return __shfl_sync(0xffffffffu, part, 0);
}

__device__ float squares_of(const float *x, int n)
{
    float part = 0, sum = 0;
    for (int i = (int)threadIdx.x % 32; i < n && threadIdx.x % 32 < 16; i += 16)
        part = __fadd_rn(part, __fmul_rn(x[i], x[i]));
#pragma unroll
    for (int c = 0; c < 16; c++)
        sum = __fadd_rn(sum, __shfl_sync(0xffffffffu, part, c));
    return sum;
}

__device__ float largest_of(const float *x, int n)
{
    float most = 0;
    for (int i = (int)threadIdx.x % 32; i < n; i += 32)
        most = fmaxf(most, fabsf(x[i]));
    return tr::warp_reduce<float, tr::larger<float>>(most);
}

/* A warp's vector in shared memory, n numbers: codes and their scale. */
__device__ float quantise(uint8_t *out, const float *x, int n)
{
    const float scale = tr::scale_pow2(largest_of(x, n)), inverse = __fdiv_rn(1.0f, scale);
    for (int i = (int)threadIdx.x % 32; i < n; i += 32)
        out[i] = tr::to_e4m3(__fmul_rn(x[i], inverse));
    return scale;
}

__device__ void rope_half_split(float *x, const float *cs, int d)
{
    const int half = d / 2;
    for (int i = (int)threadIdx.x % 32; i < half; i += 32) {
        const float c = cs[2 * i], s = cs[2 * i + 1], a = x[i], b = x[i + half];
        x[i] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
        x[i + half] = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
    }
    __syncwarp();
}

__device__ void round_all(float *x, int n)
{
    for (int i = (int)threadIdx.x % 32; i < n; i += 32)
        x[i] = tr::round_bf16(x[i]);
    __syncwarp();
}

/* Sylvester order, times d^-0.5. */
__device__ void hadamard(float *x, int d)
{
    const float factor = __fdiv_rn(1.0f, sqrtf((float)d));
    for (int half = 1; half < d; half *= 2) {
        for (int u = (int)threadIdx.x % 32; u < d / 2; u += 32) {
            const int j = u / half * 2 * half + u % half;
            const float a = x[j], b = x[j + half];
            x[j] = __fadd_rn(a, b);
            x[j + half] = __fsub_rn(a, b);
        }
        __syncwarp();
    }
    for (int i = (int)threadIdx.x % 32; i < d; i += 32)
        x[i] = __fmul_rn(x[i], factor);
    __syncwarp();
}

__device__ float index_quantise(uint8_t *out, float *x, int d)
{
    round_all(x, d);
    hadamard(x, d);
    round_all(x, d);
    return quantise(out, x, d);
}

__device__ void write_latent(const tr_kv_write_args &a, const tr_rows &rows, int i, float *x)
{
    const tr_kv_layer &kv = a.kv;
    const int n = kv.d_latent, all = n + kv.d_rope, lane = (int)threadIdx.x % 32;
    const __nv_bfloat16 *row = tr::act(a.kv_a) + (size_t)i * a.ld_kv_a;
    float *in = x + D_KEY_MAX; /* as fp32 */
    uint8_t *to = (uint8_t *)kv.latent + (size_t)rows.write[i] * tr::kv_row_bytes(kv);

    for (int j = lane; j < all; j += 32)
        in[j] = __bfloat162float(row[j]);
    __syncwarp();
    const float mean = __fdiv_rn(squares_of(in, n), (float)n);
    const float r = __fdiv_rn(1.0f, sqrtf(__fadd_rn(mean, a.eps)));
    for (int j = lane; j < n; j += 32)
        x[j] = __fmul_rn(__fmul_rn(in[j], r), a.norm[j]);
    const float *cs = a.rope + (size_t)rows.position[i] * (size_t)kv.d_rope;
    for (int j = 2 * lane; j < kv.d_rope; j += 64) {
        const float even = in[n + j], odd = in[n + j + 1];
        x[n + j] = __fsub_rn(__fmul_rn(even, cs[j]), __fmul_rn(odd, cs[j + 1]));
        x[n + j + 1] = __fadd_rn(__fmul_rn(even, cs[j + 1]), __fmul_rn(odd, cs[j]));
    }
    __syncwarp();
    int first = 0;
    __nv_bfloat16 *half = (__nv_bfloat16 *)to;
    if (kv.dtype == TR_E4M3) {
        float *scale = (float *)(to + n);
        for (int j = 0; j < n; j += 128) {
            const float s = quantise(to + j, x + j, min(128, n - j));
            if (lane == 0) scale[j / 128] = s;
        }
        half = (__nv_bfloat16 *)(scale + (n + 127) / 128);
        first = n;
    }
    for (int j = first + lane; j < all; j += 32)
        half[j - first] = __float2bfloat16_rn(x[j]);
    __syncwarp();
}

__device__ void write_index(const tr_kv_write_args &a, const tr_rows &rows, int i, float *x)
{
    const tr_kv_layer &kv = a.kv;
    const int n = kv.d_index, lane = (int)threadIdx.x % 32;
    const __nv_bfloat16 *row = tr::act(a.index_k) + (size_t)i * a.ld_index_k;
    float *in = x + D_KEY_MAX;
    for (int j = lane; j < n; j += 32)
        in[j] = __bfloat162float(row[j]);
    __syncwarp();
    const float mean = __fdiv_rn(sum_of(in, n), (float)n);
    for (int j = lane; j < n; j += 32)
        x[j] = __fsub_rn(in[j], mean);
    __syncwarp();
    const float r = __fdiv_rn(1.0f, sqrtf(__fadd_rn(__fdiv_rn(squares_of(x, n), (float)n), 1e-6f)));
    for (int j = lane; j < n; j += 32)
        x[j] = __fadd_rn(__fmul_rn(__fmul_rn(x[j], r), a.k_norm[j]), a.k_bias[j]);
    __syncwarp();
    round_all(x, n);
    rope_half_split(x, a.rope + (size_t)rows.position[i] * (size_t)kv.d_rope, kv.d_rope);
    const int64_t page = rows.write[i] / TR_PAGE_TOKENS, slot = rows.write[i] % TR_PAGE_TOKENS;
    uint8_t *base = (uint8_t *)kv.index + (size_t)page * tr::index_page_bytes(kv);
    const float scale = index_quantise(base + (size_t)slot * (size_t)n, x, n);
    if (lane == 0) ((float *)(base + (size_t)TR_PAGE_TOKENS * (size_t)n))[slot] = scale;
    __syncwarp();
}

__global__ void __launch_bounds__(WARPS * 32)
    kv_write(const __grid_constant__ tr_kv_write_args a, const __grid_constant__ tr_rows rows)
{
    __shared__ float x[WARPS][2 * D_KEY_MAX]; /* what is made, and the input */
    const int warp = (int)threadIdx.x / 32, i = (int)blockIdx.x * WARPS + warp;
    if (i >= tr::live_rows(rows.n, rows.n_max) || tr::is_pad(rows, i)) return;
    if (a.kv_a && a.kv.latent) write_latent(a, rows, i, x[warp]);
    if (a.index_k && a.kv.index) write_index(a, rows, i, x[warp]);
}

__global__ void __launch_bounds__(WARPS * 32)
    index_query(const __grid_constant__ tr_index_query_args a, const __grid_constant__ tr_rows rows)
{
    __shared__ float shared[WARPS][D_INDEX_MAX];
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, d = a.d_index;
    const size_t at = (size_t)blockIdx.x * WARPS + (size_t)warp;
    const int i = (int)(at / (size_t)a.n_heads);
    float *x = shared[warp];
    if (i >= tr::live_rows(rows.n, rows.n_max) || tr::is_pad(rows, i)) return;
    for (int j = lane; j < d; j += 32)
        x[j] = __bfloat162float(tr::act(a.q)[at * (size_t)d + (size_t)j]);
    __syncwarp();
    rope_half_split(x, a.rope + (size_t)rows.position[i] * (size_t)a.d_rope, a.d_rope);
    const float scale = index_quantise((uint8_t *)a.out + at * (size_t)d, x, d);
    const float constant = __fdiv_rn(__fdiv_rn(1.0f, sqrtf((float)a.n_heads)), sqrtf((float)d));
    if (lane == 0) a.w[at] = __fmul_rn(__fmul_rn(a.w[at], constant), scale);
}

} // namespace

cudaError_t tr_cuda_kv_write_any(const struct tr_kv_write_args *a, cudaStream_t stream)
{
    const tr_rows *rows = a->rows;
    if (a->push.n_peers || a->kv.d_latent + a->kv.d_rope > D_KEY_MAX || a->kv.d_index > D_INDEX_MAX)
        return cudaErrorInvalidValue;
    if (rows->n_max <= 0) return cudaSuccess;
    kv_write<<<tr::blocks_for((size_t)rows->n_max, WARPS), WARPS * 32, 0, stream>>>(*a, *rows);
    return cudaGetLastError();
}

cudaError_t tr_cuda_index_query_any(const struct tr_index_query_args *a, cudaStream_t stream)
{
    const size_t n = (size_t)a->rows->n_max * (size_t)a->n_heads;
    if (a->d_index > D_INDEX_MAX || a->d_rope > a->d_index || (a->d_index & (a->d_index - 1)))
        return cudaErrorInvalidValue;
    if (n == 0) return cudaSuccess;
    index_query<<<tr::blocks_for(n, WARPS), WARPS * 32, 0, stream>>>(*a, *a->rows);
    return cudaGetLastError();
}
