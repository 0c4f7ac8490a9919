/* Row-wise operations: embedding, RMSNorm, gathering and clearing rows. A row is one block's, in
 * one order. */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace
{

enum { THREADS = 256, MANY_ROWS = 256 };

__global__ void embed(const __grid_constant__ tr_embed_args a, const __grid_constant__ tr_rows rows)
{
    const int r = (int)blockIdx.x, first = (int)blockIdx.y * THREADS + (int)threadIdx.x,
              step = (int)gridDim.y * THREADS;
    tr::early::follow();
    if (r >= tr::live_rows(rows.n, rows.n_max)) return;
    const int64_t at = (int64_t)rows.token[r] - a.first;
    const bool here = at >= 0 && at < a.n_table;
    float *out = a.out + (size_t)r * (size_t)a.d;
    for (int i = first; i < a.d; i += step) {
        const size_t j = (size_t)at * (size_t)a.d + (size_t)i;
        out[i] = !here               ? 0.0f
                 : a.dtype == TR_F32 ? ((const float *)a.table)[j]
                                     : __bfloat162float(((const __nv_bfloat16 *)a.table)[j]);
    }
}

/* A row of any width. */
__global__ void __launch_bounds__(THREADS) norm(const __grid_constant__ tr_norm_args a)
{
    __shared__ float scratch[THREADS / 32 + 1];
    const int r = (int)blockIdx.x;
    tr::early::follow();
    if (r >= tr::live_rows(a.n, a.n_max)) return;
    float *residual = a.residual + (size_t)r * a.ld_residual;
    __nv_bfloat16 *out = tr::act(a.out) + (size_t)r * a.ld_out;
    const __nv_bfloat16 *add = a.add ? tr::act(a.add) + (size_t)r * a.ld_add : nullptr;
    float sum = 0;
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS) {
        const float x = add ? residual[i] + __bfloat162float(add[i]) : residual[i];
        if (add) residual[i] = x;
        sum = __fmaf_rn(x, x, sum);
    }
    sum = tr::block_reduce<float, tr::add<float>>(sum, scratch);
    const float inverse = 1.0f / sqrtf(sum / (float)a.d + a.eps);
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS) /* what this thread wrote above */
        out[i] = __float2bfloat16_rn(residual[i] * inverse * a.weight[i]);
}

/* Rows of a multiple of 128, held in registers: a warp's 32 lanes have 4 numbers each of a block of
 * 128, whose e4m3 form goes to q where that is wanted. */
__global__ void __launch_bounds__(tr::NORM_THREADS)
    norm_blocks(const __grid_constant__ tr_norm_args a, int ld_scale)
{
    __shared__ float scratch[tr::NORM_THREADS / 32 + 1];
    const int r = (int)blockIdx.x, t = (int)threadIdx.x;
    float *residual = a.residual + (size_t)r * a.ld_residual;
    const __nv_bfloat16 *add = a.add ? tr::act(a.add) + (size_t)r * a.ld_add : nullptr;
    float4 v[tr::NORM_ROUNDS], w[tr::NORM_ROUNDS];
#pragma unroll
    for (int i = 0; i < tr::NORM_ROUNDS; i++) {
        const int j = tr::norm_at(i, t);
        w[i] = j < a.d ? __ldg((const float4 *)(a.weight + j)) : make_float4(0, 0, 0, 0);
    }
    tr::early::follow();
    if (r >= tr::live_rows(a.n, a.n_max)) return;
#pragma unroll
    for (int i = 0; i < tr::NORM_ROUNDS; i++) {
        const int j = tr::norm_at(i, t);
        v[i] = j < a.d ? *(const float4 *)(residual + j) : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < tr::NORM_ROUNDS; i++) {
        const int j = tr::norm_at(i, t);
        if (!add || j >= a.d) continue;
        const float4 x = tr::read_four(add + j);
        v[i] = make_float4(v[i].x + x.x, v[i].y + x.y, v[i].z + x.z, v[i].w + x.w);
        *(float4 *)(residual + j) = v[i];
    }
    const float sum = tr::block_reduce<float, tr::add<float>>(tr::norm_squares(v), scratch);
    tr::norm_store(a, ld_scale, r, t, v, w, sum);
}

/* The same of many rows: a block of 256 threads has what four of norm_blocks' warps have in each of its own, and as many blocks
 * fit an SM as keep the memory busy while others add up. Partial sums are those of norm_blocks, added in its order: the same bits.
 * R: rounds of 256 fours, d <= 1024 R. */
enum { ROW_THREADS = 256, VIRTUAL = tr::NORM_THREADS / ROW_THREADS };

template <int R>
__global__ void __launch_bounds__(ROW_THREADS, R > 4 ? 4 : 8)
    norm_rows(const __grid_constant__ tr_norm_args a, int ld_scale)
{
    __shared__ float4 part[tr::NORM_THREADS / 32 / 4];
    const int r = (int)blockIdx.x, t = (int)threadIdx.x;
    tr::early::follow();
    if (r >= tr::live_rows(a.n, a.n_max)) return;
    float *residual = a.residual + (size_t)r * a.ld_residual;
    const __nv_bfloat16 *add = a.add ? tr::act(a.add) + (size_t)r * a.ld_add : nullptr;
    float4 v[R];
    uint2 more[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int j = (i * ROW_THREADS + t) * 4;
        v[i] = j < a.d ? *(const float4 *)(residual + j) : make_float4(0, 0, 0, 0);
        if (add) more[i] = j < a.d ? *(const uint2 *)(add + j) : make_uint2(0, 0);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int j = (i * ROW_THREADS + t) * 4;
        if (!add || j >= a.d) continue;
        const float4 x = tr::four_of(more[i]);
        v[i] = make_float4(v[i].x + x.x, v[i].y + x.y, v[i].z + x.z, v[i].w + x.w);
        *(float4 *)(residual + j) = v[i];
    }
#pragma unroll
    for (int i = 0; i < VIRTUAL; i++) {
        float4 of[tr::NORM_ROUNDS];
#pragma unroll
        for (int k = 0; k < tr::NORM_ROUNDS; k++)
            of[k] = i + k * VIRTUAL < R ? v[i + k * VIRTUAL] : make_float4(0, 0, 0, 0);
        const float sum = tr::warp_reduce<float, tr::add<float>>(tr::norm_squares(of));
        if (t % 32 == 0) ((float *)part)[i * (ROW_THREADS / 32) + t / 32] = sum;
    }
    __syncthreads();
    float sum = part[0].x;
#pragma unroll
    for (int i = 0; i < tr::NORM_THREADS / 32 / 4; i++) { /* warps ascending, as block_reduce */
        if (i > 0) sum += part[i].x;
        sum += part[i].y;
        sum += part[i].z;
        sum += part[i].w;
    }
    const float inverse = tr::norm_inverse(a, sum);
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int j = (i * ROW_THREADS + t) * 4;
        if (j >= a.d) break; /* a whole warp at a time */
        tr::norm_four(a, ld_scale, r, j, v[i], __ldg((const float4 *)(a.weight + j)), inverse);
    }
}

__global__ void rows_gather(const __grid_constant__ tr_rows_gather_args a)
{
    tr::early::follow();
    const int left = *a.n_index - a.i0, n = left < 0 ? 0 : min(left, a.n_rows), r = (int)blockIdx.x;
    if (r == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.n_out = n;
    if (r >= n) return;
    const __nv_bfloat16 *in = tr::act(a.in) + (size_t)a.index[a.i0 + r] * (size_t)a.d;
    __nv_bfloat16 *out = tr::act(a.out) + (size_t)r * (size_t)a.d;
    for (int i = (int)blockIdx.y * THREADS + (int)threadIdx.x; i < a.d;
         i += (int)gridDim.y * THREADS)
        out[i] = in[i];
}

__global__ void rows_zero(const __grid_constant__ tr_rows_zero_args a)
{
    tr::early::follow();
    if ((int)blockIdx.x >= tr::live_rows(a.n, a.n_max)) return;
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS)
        tr::act(a.out)[(size_t)blockIdx.x * (size_t)a.d + (size_t)i] = __float2bfloat16_rn(0.0f);
}

/* Few rows are cut into parts that a block of threads passes once. */
dim3 parts_of(int n_rows, int d)
{
    const unsigned parts = tr::blocks_for((size_t)d, THREADS);
    return dim3((unsigned)n_rows, n_rows <= 64 && parts > 0 ? parts : 1);
}

} // namespace

cudaError_t tr_cuda_embed(const struct tr_embed_args *a, cudaStream_t stream)
{
    if (a->dtype != TR_F32 && a->dtype != TR_BF16) return cudaErrorInvalidValue;
    if (a->rows->n_max <= 0) return cudaSuccess;
    return tr::early::launch(embed, 1, parts_of(a->rows->n_max, a->d), THREADS, 0, stream, *a,
                             *a->rows);
}

cudaError_t tr_cuda_norm(const struct tr_norm_args *a, cudaStream_t stream)
{
    if (a->n_max <= 0) return cudaSuccess;
    const unsigned n = (unsigned)a->n_max;
    const int ld_scale = (a->n_max + 3) / 4 * 4;
    const bool blocks = tr::norm_fits(*a);
    if (!blocks && a->q && a->d % 128 == 0) return cudaErrorInvalidValue;
    if (!blocks) return tr::early::launch(norm, 1, dim3(n), THREADS, 0, stream, *a);
    if (a->n_max < MANY_ROWS)
        return tr::early::launch(norm_blocks, 1, dim3(n), tr::NORM_THREADS, 0, stream, *a,
                                 ld_scale);
    return tr::early::launch(a->d <= 2048   ? norm_rows<2>
                             : a->d <= 7168 ? norm_rows<7>
                                            : norm_rows<8>,
                             1, dim3(n), ROW_THREADS, 0, stream, *a, ld_scale);
}

cudaError_t tr_cuda_rows_gather(const struct tr_rows_gather_args *a, cudaStream_t stream)
{
    return tr::early::launch(rows_gather, 1, parts_of(a->n_rows > 0 ? a->n_rows : 1, a->d), THREADS,
                             0, stream, *a);
}

cudaError_t tr_cuda_rows_zero(const struct tr_rows_zero_args *a, cudaStream_t stream)
{
    if (a->n_max <= 0) return cudaSuccess;
    return tr::early::launch(rows_zero, 1, dim3((unsigned)a->n_max), THREADS, 0, stream, *a);
}
