#include "kernels/cuda/gemm_fp8.h"

#include "kernels/cuda/gemm_fp8_tall.cuh"
#include "kernels/cuda/launch.cuh"

namespace
{

using namespace tr;

/* 256 weight rows x up to 128 tokens. Adaptive: as wide as the expert's rows need, each block alone; the next, in pairs
 * that share tokens, is for experts with about 64 rows or more; the last, 128 weight rows x up to 192 tokens, for about 128. */
const gemm_kernel gate_up_kernels[] = {
    describe<gemm_shape<2, 2, 128, true, true>>("256x16-128"),
    describe<wide_shape<2, 256, 2, 1, true, true>>("256x128/w2"),
    describe<tall_shape<true>>("128x64-192/w2"),
};
const gemm_kernel down_kernels[] = {
    describe<gemm_shape<2, 2, 128, true, false>>("256x16-128"),
    describe<wide_shape<2, 256, 2, 1, true, false>>("256x128/w2"),
    describe<tall_shape<false>>("128x64-192/w2"),
};
enum { N_SHAPES = 3 };

enum { GATHER_WARPS = 4, GATHER_THREADS = 32 * GATHER_WARPS, GATHER_ROWS = 16, MANY_PAIRS = 8192 };

/* ROWS sorted rows a block, ROWS / 4 after each other by a warp; then their scales, which lie next to each other. */
template <int ROWS>
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_rows(const uint8_t *x, const float *x_scale, int ld_x_scale, int d, int k,
                const int32_t *end, const int32_t *pair, uint8_t *q, float *scale, int ld_scale)
{
    enum { AHEAD = 7 }; /* pieces of 16 bytes in flight per thread: 2 x 7 x 32 are a row of 7168 */
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int first = (int)blockIdx.x * ROWS;
    early::follow();
    const int n = min(ROWS, *end - first);
    for (int r = warp; r < n; r += GATHER_WARPS) {
        const size_t row = (size_t)(pair[first + r] / k);
        const uint4 *from = reinterpret_cast<const uint4 *>(x + row * (size_t)d);
        uint4 *to = reinterpret_cast<uint4 *>(q + (size_t)(first + r) * (size_t)d);
        for (int j0 = lane; j0 < d / 16; j0 += 32 * AHEAD) {
            uint4 v[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (j0 + 32 * j < d / 16) v[j] = from[j0 + 32 * j];
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (j0 + 32 * j < d / 16) to[j0 + 32 * j] = v[j];
        }
    }
    const int r = (int)threadIdx.x % ROWS;
    if (r >= n) return;
    const int row = pair[first + r] / k;
    for (int j = (int)threadIdx.x / ROWS; j < (d + 127) / 128; j += GATHER_THREADS / ROWS)
        scale[(size_t)j * ld_scale + first + r] = x_scale[(size_t)j * ld_x_scale + row];
}

/* By the most rows per expert on average that there may be: from how many on the wide form is the faster one. (One H200,
 * bench_gemm_fp8 moe, 32 experts. 128 rows: gate_up 404 us, wide 313; down 237, wide 185. 64 rows: 278 and 249, 148 and 140;
 * 32 rows: no difference.) Around 128 rows half of the experts have some more: in a chunk of 4,096 rows with all 256 experts a
 * layer's experts take 5.19 ms with the wide form, 4.61 with the tall one; 3 layers with prompts of 6,144 rows 47.0 and
 * 46.0 ms, of 8,192 61.8 and 63.1 (one H200, bench step --halves). */
enum { WIDE_FROM = 64, TALL_FROM = 96, TALL_TO = 200 };

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

const char *tr_gemm_fp8_moe_shape_name(int shape)
{
    return shape >= 0 && shape < N_SHAPES ? gate_up_kernels[shape].name : nullptr;
}

int tr_gemm_fp8_moe_pick(int n_mats, int n_pairs_max)
{
    const int each = n_pairs_max / n_mats;
    return each >= TALL_FROM && each <= TALL_TO ? 2 : each >= WIDE_FROM;
}

cudaError_t tr_moe_gather_fp8(const tr_fp8_rows *x, int d, int k, int n_local,
                              const int32_t *start_d, const int32_t *pair_d, int n_pairs_max,
                              uint8_t *q_d, float *scale_d, cudaStream_t stream)
{
    if (d <= 0 || d % 16 || k <= 0 || n_local <= 0) return cudaErrorInvalidValue;
    if (n_pairs_max <= 0) return cudaSuccess;
    /* Few pairs: a warp each, so that as many as possible are on their way; many: scales in whole sectors. */
    const int rows = n_pairs_max < MANY_PAIRS ? GATHER_WARPS : GATHER_ROWS;
    return early::launch(rows == GATHER_ROWS ? gather_rows<GATHER_ROWS> : gather_rows<GATHER_WARPS>,
                         1, dim3((unsigned)((n_pairs_max + rows - 1) / rows)), GATHER_THREADS, 0,
                         stream, x->q_d, x->scale_d, (x->n_max + 3) / 4 * 4, d, k,
                         start_d + n_local, pair_d, q_d, scale_d, (n_pairs_max + 3) / 4 * 4);
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
    return tr_gemm_fp8_gate_up_as(g, tr_gemm_fp8_moe_pick(w->n_mats, x->n_max), w, x, start_d,
                                  ue8m0, q_d, scale_d, stream);
}

cudaError_t tr_gemm_fp8_down(const tr_gemm_fp8 *g, const tr_fp8_weight *w, const tr_fp8_rows *x,
                             const int32_t *start_d, const int32_t *pair_d, void *out_d,
                             cudaStream_t stream)
{
    return tr_gemm_fp8_down_as(g, tr_gemm_fp8_moe_pick(w->n_mats, x->n_max), w, x, start_d, pair_d,
                               out_d, stream);
}
