#include "kernels/cuda/gemm_fp8.h"

#include "kernels/cuda/gemm_fp8_wide.cuh"
#include "kernels/cuda/launch.cuh"

namespace
{

using namespace tr;

/* 256 weight rows x up to 128 tokens. Adaptive: as wide as the expert's rows need, each block alone; the other, in pairs
 * that share tokens, is for experts with about 64 rows or more. */
const gemm_kernel gate_up_kernels[] = {
    describe<gemm_shape<2, 2, 128, true, true>>("256x16-128"),
    describe<wide_shape<2, 256, 2, 1, true, true>>("256x128/w2"),
};
const gemm_kernel down_kernels[] = {
    describe<gemm_shape<2, 2, 128, true, false>>("256x16-128"),
    describe<wide_shape<2, 256, 2, 1, true, false>>("256x128/w2"),
};
enum { N_SHAPES = 2 };

enum { GATHER_THREADS = 128 };

/* One block per sorted row. */
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_rows(const uint8_t *x, const float *x_scale, int ld_x_scale, int d, int k,
                const int32_t *end, const int32_t *pair, uint8_t *q, float *scale, int ld_scale)
{
    const int i = (int)blockIdx.x;
    early::follow();
    if (i >= *end) return;
    const int row = pair[i] / k;
    const uint4 *from = reinterpret_cast<const uint4 *>(x + (size_t)row * d);
    uint4 *to = reinterpret_cast<uint4 *>(q + (size_t)i * d);
    for (int j = (int)threadIdx.x; j < d / 16; j += GATHER_THREADS)
        to[j] = from[j];
    for (int j = (int)threadIdx.x; j < (d + 127) / 128; j += GATHER_THREADS)
        scale[(size_t)j * ld_scale + i] = x_scale[(size_t)j * ld_x_scale + row];
}

/* By the most rows per expert on average that there may be: from how many on the wide form is the faster one. (One H200,
 * bench_gemm_fp8 moe, 32 experts. 128 rows: gate_up 404 us, wide 313; down 237, wide 185. 64 rows: 278 and 249, 148 and 140;
 * 32 rows: no difference.) */
enum { WIDE_FROM = 64 };

int pick(const tr_fp8_weight *w, const tr_fp8_rows *x)
{
    return x->n_max / w->n_mats >= WIDE_FROM;
}

/* Every expert may leave its last tile part empty. */
long tiles_max(const gemm_kernel &k, const tr_fp8_weight *w, const tr_fp8_rows *x)
{
    const long w_tiles = (w->n_out + k.w_rows * k.cw - 1) / (k.w_rows * k.cw);
    const int least = k.cw * k.ct == 1 ? 1 : k.nb * k.ct;
    return w_tiles * ((x->n_max + least - 1) / least + w->n_mats);
}

} // namespace

cudaError_t tr::gemm_prepare_moe()
{
    for (int i = 0; i < N_SHAPES; i++) {
        cudaError_t e = cudaFuncSetAttribute((const void *)gate_up_kernels[i].kernel,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             gate_up_kernels[i].smem_bytes);
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute((const void *)down_kernels[i].kernel,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     down_kernels[i].smem_bytes);
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}

cudaError_t tr_moe_gather_fp8(const tr_fp8_rows *x, int d, int k, int n_local,
                              const int32_t *start_d, const int32_t *pair_d, int n_pairs_max,
                              uint8_t *q_d, float *scale_d, cudaStream_t stream)
{
    if (d <= 0 || d % 16 || k <= 0 || n_local <= 0) return cudaErrorInvalidValue;
    if (n_pairs_max <= 0) return cudaSuccess;
    return early::launch(gather_rows, 1, dim3((unsigned)n_pairs_max), GATHER_THREADS, 0, stream,
                         x->q_d, x->scale_d, (x->n_max + 3) / 4 * 4, d, k, start_d + n_local,
                         pair_d, q_d, scale_d, (n_pairs_max + 3) / 4 * 4);
}

cudaError_t tr_gemm_fp8_gate_up_as(const tr_gemm_fp8 *g, int shape, const tr_fp8_weight *w,
                                   const tr_fp8_rows *x, const int32_t *start_d, int ue8m0,
                                   uint8_t *q_d, float *scale_d, cudaStream_t stream)
{
    if (shape < 0 || shape >= N_SHAPES || w->n_out % 256) return cudaErrorInvalidValue;
    if (x->n_max <= 0) return cudaSuccess;
    gemm_args a = {};
    a.start = start_d;
    a.n_groups = w->n_mats;
    a.known = x->start_made;
    a.q = q_d;
    a.q_scale = scale_d;
    a.ld_q_scale = (x->n_max + 3) / 4 * 4;
    a.ue8m0 = ue8m0;
    const gemm_kernel &k = gate_up_kernels[shape];
    return gemm_launch(g, k, a, w, x, tiles_max(k, w, x), stream);
}

cudaError_t tr_gemm_fp8_down_as(const tr_gemm_fp8 *g, int shape, const tr_fp8_weight *w,
                                const tr_fp8_rows *x, const int32_t *start_d, const int32_t *pair_d,
                                void *out_d, cudaStream_t stream)
{
    if (shape < 0 || shape >= N_SHAPES) return cudaErrorInvalidValue;
    if (x->n_max <= 0) return cudaSuccess;
    gemm_args a = {};
    a.start = start_d;
    a.n_groups = w->n_mats;
    a.known = x->start_made;
    a.scatter = pair_d;
    a.out = out_d;
    a.ld_out = (size_t)w->n_out;
    const gemm_kernel &k = down_kernels[shape];
    return gemm_launch(g, k, a, w, x, tiles_max(k, w, x), stream);
}

cudaError_t tr_gemm_fp8_gate_up(const tr_gemm_fp8 *g, const tr_fp8_weight *w, const tr_fp8_rows *x,
                                const int32_t *start_d, int ue8m0, uint8_t *q_d, float *scale_d,
                                cudaStream_t stream)
{
    return tr_gemm_fp8_gate_up_as(g, pick(w, x), w, x, start_d, ue8m0, q_d, scale_d, stream);
}

cudaError_t tr_gemm_fp8_down(const tr_gemm_fp8 *g, const tr_fp8_weight *w, const tr_fp8_rows *x,
                             const int32_t *start_d, const int32_t *pair_d, void *out_d,
                             cudaStream_t stream)
{
    return tr_gemm_fp8_down_as(g, pick(w, x), w, x, start_d, pair_d, out_d, stream);
}
