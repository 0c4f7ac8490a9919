/* Row-wise operations: embedding, RMSNorm, gathering and clearing rows. A row is one block's, in
 * one order. */
#include "kernels/cuda/common.cuh"

namespace
{

enum { THREADS = 256 };

__global__ void embed(const __grid_constant__ tr_embed_args a, const __grid_constant__ tr_rows rows)
{
    const int r = (int)blockIdx.x;
    if (r >= tr::live_rows(rows.n, rows.n_max)) return;
    const int64_t at = (int64_t)rows.token[r] - a.first;
    const bool here = at >= 0 && at < a.n_table;
    float *out = a.out + (size_t)r * (size_t)a.d;
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS) {
        const size_t j = (size_t)at * (size_t)a.d + (size_t)i;
        out[i] = !here               ? 0.0f
                 : a.dtype == TR_F32 ? ((const float *)a.table)[j]
                                     : __bfloat162float(((const __nv_bfloat16 *)a.table)[j]);
    }
}

__global__ void __launch_bounds__(THREADS) norm(const __grid_constant__ tr_norm_args a)
{
    __shared__ float scratch[THREADS / 32 + 1];
    const int r = (int)blockIdx.x;
    if (r >= tr::live_rows(a.n, a.n_max)) return;
    float *residual = a.residual + (size_t)r * a.ld_residual;
    float *out = a.out + (size_t)r * a.ld_out;
    const float *add = a.add ? a.add + (size_t)r * a.ld_add : nullptr;
    float sum = 0;
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS) {
        const float x = add ? residual[i] + add[i] : residual[i];
        if (add) residual[i] = x;
        sum = __fmaf_rn(x, x, sum);
    }
    sum = tr::block_reduce<float, tr::add<float>>(sum, scratch);
    const float inverse = 1.0f / sqrtf(sum / (float)a.d + a.eps);
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS) /* what this thread wrote above */
        out[i] = residual[i] * inverse * a.weight[i];
}

__global__ void rows_gather(const __grid_constant__ tr_rows_gather_args a)
{
    const int left = *a.n_index - a.i0, n = left < 0 ? 0 : min(left, a.n_rows), r = (int)blockIdx.x;
    if (r == 0 && threadIdx.x == 0) *a.n_out = n;
    if (r >= n) return;
    const float *in = a.in + (size_t)a.index[a.i0 + r] * (size_t)a.d;
    float *out = a.out + (size_t)r * (size_t)a.d;
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS)
        out[i] = in[i];
}

__global__ void rows_zero(const __grid_constant__ tr_rows_zero_args a)
{
    if ((int)blockIdx.x >= tr::live_rows(a.n, a.n_max)) return;
    for (int i = (int)threadIdx.x; i < a.d; i += THREADS)
        a.out[(size_t)blockIdx.x * (size_t)a.d + (size_t)i] = 0.0f;
}

} // namespace

cudaError_t tr_cuda_embed(const struct tr_embed_args *a, cudaStream_t stream)
{
    if (a->dtype != TR_F32 && a->dtype != TR_BF16) return cudaErrorInvalidValue;
    if (a->rows->n_max <= 0) return cudaSuccess;
    embed<<<(unsigned)a->rows->n_max, THREADS, 0, stream>>>(*a, *a->rows);
    return cudaGetLastError();
}

cudaError_t tr_cuda_norm(const struct tr_norm_args *a, cudaStream_t stream)
{
    if (a->n_max <= 0) return cudaSuccess;
    norm<<<(unsigned)a->n_max, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_rows_gather(const struct tr_rows_gather_args *a, cudaStream_t stream)
{
    rows_gather<<<(unsigned)(a->n_rows > 0 ? a->n_rows : 1), THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_rows_zero(const struct tr_rows_zero_args *a, cudaStream_t stream)
{
    if (a->n_max <= 0) return cudaSuccess;
    rows_zero<<<(unsigned)a->n_max, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}
