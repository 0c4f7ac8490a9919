/* The table's dense_mha on dense_mha_hopper.h: W_UK and W_UV become one bf16 matrix for each head, every time, since they are a
 * few microseconds' worth and would take 34 MB a layer. What rounding that costs is that of k_nope and v themselves, or nothing
 * where scales are powers of two. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/dense_mha_hopper.h"

namespace
{

enum { THREADS = 256, ROW_THREADS = TR_DENSE_D_LATENT / 8, HEAD_ROWS = 256 };

struct matrix { /* of a format and place that are a tr_linear's */
    const uint8_t *w;
    const float *scale;
    size_t bytes, scales; /* from one head to the next; of scales: their number */
    int ld;
};

/* Eight numbers of a row of a head, from column k on. */
template <bool E4M3>
__device__ __forceinline__ uint4 eight(const matrix &m, int head, int row, int k)
{
    const uint8_t *from = m.w + (size_t)head * m.bytes + (size_t)row * (size_t)m.ld;
    if (!E4M3) return *(const uint4 *)(from + 2 * (size_t)k);
    const uint2 codes = *(const uint2 *)(from + k);
    const float scale = m.scale[(size_t)head * m.scales + (size_t)(k / 128)];
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t two = (i < 2 ? codes.x : codes.y) >> (i % 2 * 16);
        const __half2_raw h =
            __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(two & 0xffffu), __NV_E4M3);
        const float2 f = __half22float2(__half2(h));
        const __nv_bfloat162 b = __floats2bfloat162_rn(f.x * scale, f.y * scale);
        out[i] = *(const uint32_t *)&b;
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

/* Row r of a head: r of W_UK, then of W_UV. */
template <bool E4M3>
__global__ void __launch_bounds__(THREADS)
    make_weights(const __grid_constant__ matrix uk, const __grid_constant__ matrix uv, uint4 *out)
{
    const int at = (int)blockIdx.x * (THREADS / ROW_THREADS) + (int)threadIdx.x / ROW_THREADS,
              head = at / HEAD_ROWS, r = at % HEAD_ROWS, i = (int)threadIdx.x % ROW_THREADS;
    out[(size_t)at * ROW_THREADS + (size_t)i] =
        r < TR_DENSE_D_NOPE ? eight<E4M3>(uk, head, r, i * 8)
                            : eight<E4M3>(uv, head, r - TR_DENSE_D_NOPE, i * 8);
}

bool matrix_of(matrix *m, const tr_linear *w, int n_heads)
{
    tr_weight_layout l;
    if (w->n_out != 128 || w->n_in != TR_DENSE_D_LATENT || w->n_mats < n_heads ||
        !tr_weight_layout_of(&l, w->format, w->n_mats, w->n_out, w->n_in))
        return false;
    m->w = (const uint8_t *)w->data + l.numbers;
    m->scale = (const float *)(const void *)((const uint8_t *)w->data + l.scales);
    m->bytes = l.matrix;
    m->scales = (size_t)l.scale_rows * (size_t)l.scale_pitch;
    m->ld = l.ld;
    return l.ld % 16 == 0;
}

size_t weight_bytes(int n_heads)
{
    return (size_t)n_heads * HEAD_ROWS * TR_DENSE_D_LATENT * 2;
}

enum { ALIGNED = 1024, KEYS_MORE = 2048 }; /* room for keys beyond those of the longest span */

} // namespace

size_t tr_cuda_dense_mha_workspace(int n_max, int n_heads, int max_context)
{
    if (n_max < 1 || n_heads < 1 || max_context < 1 || max_context > 1 << 20) return 0;
    return weight_bytes(n_heads) + ALIGNED +
           tr_cuda_dense_mha_hopper_workspace(n_max, n_max, n_heads, max_context + KEYS_MORE);
}

cudaError_t tr_cuda_dense_mha_real(const struct tr_dense_mha_args *a, cudaStream_t stream)
{
    matrix uk, uv;
    const size_t most = weight_bytes(a->n_heads);
    if (a->d_nope != TR_DENSE_D_NOPE || a->d_rope != TR_DENSE_D_ROPE || a->d_v != TR_DENSE_D_V ||
        a->latents.n || a->n_heads < 1 || a->w_uk->format != a->w_uv->format ||
        a->w_uk->format == TR_W_F32 || !matrix_of(&uk, a->w_uk, a->n_heads) ||
        !matrix_of(&uv, a->w_uv, a->n_heads) || a->workspace_bytes < most + ALIGNED)
        return cudaErrorNotSupported;
    if (a->rows->n_max <= 0 || a->n_spans <= 0) return cudaSuccess;

    const uintptr_t base = ((uintptr_t)a->workspace + ALIGNED - 1) / ALIGNED * ALIGNED;
    tr_rows rows = *a->rows;
    rows.max_context = a->max_context;
    const tr_cuda_dense_mha_hopper_args args = {
        .rows = &rows,
        .step = a->row_step > 1 ? a->row_step : 1,
        .n_spans = a->n_spans < rows.n_max ? a->n_spans : rows.n_max,
        .n_keys = a->n_keys,
        .q = a->q,
        .n_heads = a->n_heads,
        .scale = a->scale,
        .w_kv = (const void *)base,
        .kv = a->kv,
        .out = a->out,
        .workspace = (void *)(base + most),
        .workspace_bytes = a->workspace_bytes - (size_t)(base - (uintptr_t)a->workspace) - most};
    const unsigned blocks = (unsigned)(a->n_heads * HEAD_ROWS / (THREADS / ROW_THREADS));
    if (a->w_uk->format == TR_W_E4M3_B128)
        make_weights<true><<<blocks, THREADS, 0, stream>>>(uk, uv, (uint4 *)base);
    else
        make_weights<false><<<blocks, THREADS, 0, stream>>>(uk, uv, (uint4 *)base);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? tr_cuda_dense_mha_hopper(&args, stream) : e;
}
