/* The query's way into the latent space and the way back out (model.md 3.4). Weights are expanded
 * exactly and meet bf16. */
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/gemm_heads.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quantise.h"
#include "kernels/cuda/rope.cuh"
#include "kernels/limits.h"

namespace
{

enum { ROPE_THREADS = 256, ROPE_EACH = 4 };

/* Rope on the end of every head, in place; absorbed rows get it into q_absorbed too. */
__global__ void query_rope(const __grid_constant__ tr_mla_query_args a,
                           const __grid_constant__ tr_rows rows)
{
    tr::early::follow();
    const int n = tr::live_rows(rows.n, rows.n_max), pairs = a.d_rope / 2;
    const size_t total = (size_t)n * (size_t)a.n_heads * (size_t)pairs;
    for (size_t u = (size_t)blockIdx.x * blockDim.x + threadIdx.x; u < total;
         u += (size_t)gridDim.x * blockDim.x) {
        const int j = (int)(u % (size_t)pairs);
        const size_t at = u / (size_t)pairs;
        const int i = (int)(at / (size_t)a.n_heads);
        __nv_bfloat162 *x = (__nv_bfloat162 *)(tr::act(a.q) + at * (size_t)(a.d_nope + a.d_rope) +
                                               a.d_nope + 2 * j);
        __nv_bfloat162 y = *x;
        if (!tr::is_pad(rows, i)) {
            const float *cs = a.rope + (size_t)rows.position[i] * (size_t)a.d_rope + 2 * j;
            const uint32_t t = tr::turned(*(const uint32_t *)&y, cs[0], cs[1]);
            y = *(const __nv_bfloat162 *)&t;
            *x = y;
        }
        if (rows.dense[i]) continue;
        *(__nv_bfloat162 *)(tr::act(a.q_absorbed) + at * (size_t)(a.d_latent + a.d_rope) +
                            a.d_latent + 2 * j) = y;
    }
}

/* The same in eights, where all widths are such. */
__global__ void __launch_bounds__(ROPE_THREADS)
    query_rope_eights(const __grid_constant__ tr_mla_query_args a,
                      const __grid_constant__ tr_rows rows)
{
    tr::early::follow();
    const unsigned units = (unsigned)a.d_rope / 8, heads = (unsigned)a.n_heads,
                   total = (unsigned)tr::live_rows(rows.n, rows.n_max) * heads * units;
    for (unsigned u0 = blockIdx.x * ROPE_THREADS * ROPE_EACH + threadIdx.x; u0 < total;
         u0 += gridDim.x * ROPE_THREADS * ROPE_EACH) {
        tr::rope_eight e[ROPE_EACH];
#pragma unroll
        for (unsigned i = 0; i < ROPE_EACH; i++) {
            const unsigned u = min(u0 + i * ROPE_THREADS, total - 1);
            e[i].begin(a, rows, u / units, u / units / heads, u % units * 8);
        }
#pragma unroll
        for (unsigned i = 0; i < ROPE_EACH; i++) {
            const unsigned u = u0 + i * ROPE_THREADS;
            if (u < total) e[i].end(a, u / units, u % units * 8);
        }
    }
}

cudaError_t launch_rope(const struct tr_mla_query_args *a, cudaStream_t stream)
{
    const size_t pairs = (size_t)a->rows->n_max * (size_t)a->n_heads * (size_t)(a->d_rope / 2);
    const bool eights = tr::rope_in_eights(*a) && pairs < 1u << 30;
    if (pairs == 0) return cudaSuccess;
    const dim3 grid(tr::at_most(
        tr::blocks_for(eights ? tr::blocks_for(pairs, 4 * ROPE_EACH) : pairs, ROPE_THREADS), 8192));
    return tr::early::launch(eights ? query_rope_eights : query_rope, 1, grid, ROPE_THREADS, 0,
                             stream, *a, *a->rows);
}

} // namespace

cudaError_t tr_cuda_mla_query(const struct tr_mla_query_args *a, int on_grid, cudaStream_t stream)
{
    const tr_rows *rows = a->rows;
    if (a->w_uk_t->n_out != a->d_latent || a->w_uk_t->n_in != a->d_nope ||
        a->w_uk_t->n_mats < a->n_heads || a->d_nope % TR_CUDA_NOPE_STEP)
        return cudaErrorInvalidValue;
    const size_t d_q = (size_t)(a->d_nope + a->d_rope), d_key = (size_t)(a->d_latent + a->d_rope),
                 heads = (size_t)a->n_heads;
    const bool heads_fit =
        on_grid && tr_cuda_gemm_heads_fits(a->w_uk_t) && d_q % 8 == 0 && d_key % 8 == 0;
    const bool together = heads_fit && a->q_absorbed && rows->n_max <= TR_HEADS_FEW &&
                          a->w_uk_t->n_in == TR_HEADS_ROPE_IN && tr::rope_in_eights(*a);
    if (!together) {
        const cudaError_t e = launch_rope(a, stream);
        if (e != cudaSuccess || !a->q_absorbed) return e;
    }
    if (heads_fit) {
        const tr_heads_product h = {.w = a->w_uk_t,
                                    .n_heads = a->n_heads,
                                    .x = a->q,
                                    .ld_x = heads * d_q,
                                    .x_step = d_q,
                                    .y = a->q_absorbed,
                                    .ld_y = heads * d_key,
                                    .y_step = d_key,
                                    .n_d = rows->n,
                                    .n_max = rows->n_max,
                                    .skip_d = rows->dense,
                                    .rope = together ? a : nullptr};
        return tr_cuda_gemm_heads(&h, stream);
    }
    tr::product p = {};
    tr::product_weight(&p, a->w_uk_t);
    p.blocks = tr_blocks_at_most(p.n_in);
    p.n_mats = a->n_heads;
    p.n = rows->n;
    p.n_max = rows->n_max;
    p.x = a->q;
    p.x_step = (size_t)(a->d_nope + a->d_rope);
    p.ld_x = (size_t)a->n_heads * p.x_step;
    p.y = a->q_absorbed;
    p.y_step = (size_t)(a->d_latent + a->d_rope);
    p.ld_y = (size_t)a->n_heads * p.y_step;
    p.skip = rows->dense;
    return tr::product_launch(&p, stream);
}

/* Where a block has not all of a head's outputs. */
static cudaError_t value_then_codes(const struct tr_mla_value_args *a, int on_grid,
                                    cudaStream_t stream)
{
    struct tr_mla_value_args plain = *a;
    const int d = a->n_heads * a->d_v;
    plain.q = nullptr;
    const cudaError_t e = tr_cuda_mla_value(&plain, on_grid, stream);
    return e == cudaSuccess ? tr_quantise_rows(a->out, (size_t)d, a->rows->n, a->rows->n_max, d,
                                               a->scale_pow2, a->q, a->q_scale, stream)
                            : e;
}

cudaError_t tr_cuda_mla_value(const struct tr_mla_value_args *a, int on_grid, cudaStream_t stream)
{
    if (a->w_uv->n_out != a->d_v || a->w_uv->n_in != a->d_latent || a->w_uv->n_mats < a->n_heads)
        return cudaErrorInvalidValue;
    const size_t heads = (size_t)a->n_heads;
    const bool fits = on_grid && tr_cuda_gemm_heads_fits(a->w_uv),
               codes = a->q && fits && a->rows->n_max > TR_HEADS_FEW && a->d_v == TR_HEADS_VALUE &&
                       a->w_uv->n_in == TR_HEADS_LATENT;
    if (a->q && !codes) return value_then_codes(a, on_grid, stream);
    if (fits) {
        const tr_heads_product h = {.w = a->w_uv,
                                    .n_heads = a->n_heads,
                                    .x = a->u,
                                    .ld_x = heads * (size_t)a->d_latent,
                                    .x_step = (size_t)a->d_latent,
                                    .y = a->out,
                                    .ld_y = heads * (size_t)a->d_v,
                                    .y_step = (size_t)a->d_v,
                                    .n_d = a->rows->n,
                                    .n_max = a->rows->n_max,
                                    .skip_d = a->rows->dense,
                                    .q = a->q,
                                    .q_scale = a->q_scale,
                                    .scale_pow2 = a->scale_pow2};
        return tr_cuda_gemm_heads(&h, stream);
    }
    tr::product p = {};
    tr::product_weight(&p, a->w_uv);
    p.blocks = tr_blocks_at_most(p.n_in);
    p.n_mats = a->n_heads;
    p.n = a->rows->n;
    p.n_max = a->rows->n_max;
    p.x = a->u;
    p.x_step = (size_t)a->d_latent;
    p.ld_x = (size_t)a->n_heads * p.x_step;
    p.y = a->out;
    p.y_step = (size_t)a->d_v;
    p.ld_y = (size_t)a->n_heads * p.y_step;
    p.skip = a->rows->dense;
    return tr::product_launch(&p, stream);
}
