#include "kernels/cuda/gemm_fp8.h"

#include "kernels/cuda/gemm_fp8_wide.cuh"

namespace
{

using namespace tr;

/* Weight rows x tokens; "/w2": two blocks share the tokens, "/t2": the weights. The first three are weights by tokens
 * (gemm_fp8_kernel.cuh), the others tokens by weights (gemm_fp8_wide.cuh). */
const gemm_kernel dense_kernels[] = {
    describe<gemm_shape<1, 1, 8, false, false>>("64x8"),
    describe<gemm_shape<1, 1, 16, false, false>>("64x16"),
    describe<gemm_shape<1, 1, 32, false, false>>("64x32"),
    describe<wide_shape<1, 64, 1, 1, false, false>>("64x64"),
    describe<wide_shape<2, 64, 2, 1, false, false>>("64x128/w2"),
    describe<wide_shape<2, 128, 1, 2, false, false>>("128x128/t2"),
    describe<wide_shape<2, 192, 1, 2, false, false>>("192x128/t2"),
    describe<wide_shape<2, 256, 1, 2, false, false>>("256x128/t2"),
};
enum { N_DENSE = sizeof dense_kernels / sizeof *dense_kernels };

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* [rows, columns] of elements of `bytes` bytes (e4m3, bf16, fp32), rows `pitch` bytes apart, in boxes of box_rows x
 * box_columns; a box wide in bytes is 128 and swizzled, but for scales. */
bool encode_map(const tr_gemm_fp8 *g, CUtensorMap *map, const void *base, int bytes, size_t columns,
                size_t rows, size_t pitch, int box_columns, int box_rows)
{
    const CUtensorMapDataType type = bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                     : bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    const cuuint64_t size[2] = {columns, rows}, stride[1] = {pitch};
    const cuuint32_t box[2] = {(cuuint32_t)box_columns, (cuuint32_t)box_rows}, step[2] = {1, 1};
    const encode_fn encode = (encode_fn)g->encode;
    return encode(map, type, 2, (void *)base, size, stride, box, step,
                  CU_TENSOR_MAP_INTERLEAVE_NONE,
                  bytes < 4 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

} // namespace

namespace tr
{

cudaError_t gemm_launch(const ::tr_gemm_fp8 *g, const gemm_kernel &k, gemm_args &a,
                        const ::tr_fp8_weight *w, const ::tr_fp8_rows *x, long tiles_max,
                        cudaStream_t stream)
{
    if (w->n_in <= 0 || w->n_in % 16 || w->n_out <= 0 || w->n_mats <= 0)
        return cudaErrorInvalidValue;
    const int ld_scale = (x->n_max + 3) / 4 * 4, n_k = (w->n_in + 127) / 128;
    if (!encode_map(g, &a.w, w->q_d, 1, (size_t)w->n_in, (size_t)w->n_out * (size_t)w->n_mats,
                    (size_t)w->n_in, 128, k.w_box) ||
        !encode_map(g, &a.x, x->q_d, 1, (size_t)w->n_in, (size_t)x->n_max, (size_t)w->n_in, 128,
                    k.x_box) ||
        !encode_map(g, &a.x_scale, x->scale_d, 4, (size_t)x->n_max, (size_t)n_k,
                    (size_t)ld_scale * 4, k.nb, 1) ||
        (k.x_tail && !encode_map(g, &a.x_tail, x->q_d, 1, (size_t)w->n_in, (size_t)x->n_max,
                                 (size_t)w->n_in, 128, k.x_tail)))
        return cudaErrorInvalidValue;
    a.has_out_map = a.out && !a.out_f32 && !a.scatter && !a.start && a.ld_out % 8 == 0 &&
                    (uintptr_t)a.out % 16 == 0 &&
                    encode_map(g, &a.out_map, a.out, 2, (size_t)w->n_out, (size_t)x->n_max,
                               a.ld_out * 2, 64, 16);
    a.copy_rows =
        a.out && !a.out_f32 && a.ld_out % 8 == 0 && w->n_out % 8 == 0 && (uintptr_t)a.out % 16 == 0;
    a.w_scale = w->scale_d;
    a.w_scale_pitch = w->scale_pitch ? w->scale_pitch : tr_fp8_scale_pitch(w->n_in);
    a.w_scale_rows = (w->n_out + 127) / 128;
    a.w_scale_matrix = w->scale_rows ? w->scale_rows : a.w_scale_rows;
    a.n_out = w->n_out;
    a.n_k = n_k;
    a.n_max = x->n_max;

    const int cluster = k.cw * k.ct;
    const long clusters = tiles_max < g->n_sms / cluster ? tiles_max : g->n_sms / cluster;
    return early::launch(k.kernel, cluster, dim3((unsigned)(clusters * cluster)),
                         (unsigned)k.threads, (size_t)k.smem_bytes, stream, a);
}

} // namespace tr

cudaError_t tr_gemm_fp8_open(tr_gemm_fp8 *g)
{
    int device = 0;
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&g->n_sms, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess)
        e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                             cudaEnableDefault, &found);
    if (e == cudaSuccess && (found != cudaDriverEntryPointSuccess || !entry))
        e = cudaErrorNotSupported;
    for (int i = 0; i < N_DENSE && e == cudaSuccess; i++)
        e = cudaFuncSetAttribute((const void *)dense_kernels[i].kernel,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 dense_kernels[i].smem_bytes);
    if (e == cudaSuccess) e = gemm_prepare_moe();
    g->encode = (void (*)(void))entry;
    return e;
}

const char *tr_gemm_fp8_shape_name(int shape)
{
    return shape >= 0 && shape < N_DENSE ? dense_kernels[shape].name : nullptr;
}

cudaError_t tr_gemm_fp8_dense_as(const tr_gemm_fp8 *g, int shape, const tr_fp8_weight *w,
                                 const tr_fp8_rows *x, void *out_d, size_t ld_out, int out_f32,
                                 cudaStream_t stream)
{
    if (shape < 0 || shape >= N_DENSE) return cudaErrorInvalidValue;
    if (x->n_max <= 0) return cudaSuccess;
    const gemm_kernel &k = dense_kernels[shape];
    gemm_args a = {};
    a.n = x->n_d;
    a.out = out_d;
    a.ld_out = ld_out;
    a.out_f32 = out_f32;
    a.stream_w = x->n_max <= k.nb * k.ct;
    const long w_tiles = (w->n_out + k.w_rows * k.cw - 1) / (k.w_rows * k.cw);
    const long t_tiles = (x->n_max + k.nb * k.ct - 1) / (k.nb * k.ct);
    return gemm_launch(g, k, a, w, x, w_tiles * t_tiles, stream);
}

/* Up to 32 rows: one tile of tokens. Beyond: the tile that costs least, by what bounds it: up to 128 rows the bytes an
 * SM takes in, above the products; both in waves of tiles over the SMs. Larger tiles win near ties: they read L2 less.
 * (One H200, bench_gemm_fp8 dense: 128 rows x 4096 x 7168: 64x64 18.3 us, 64x128/w2 21.8; x 7168 x 16384: 55.7, 43.9;
 * 4096 rows x 2112 x 7168: 192x128/t2 107 us, 256x128/t2 135.) */
int tr_gemm_fp8_pick(const tr_gemm_fp8 *g, int n_out, int n_max)
{
    if (n_max <= 8) return 0;
    if (n_max <= 16) return 1;
    if (n_max <= 32) return 2;
    const int from = n_max <= 128 ? 4 : N_DENSE - 1, to = n_max <= 128 ? 3 : 5;
    int best = from;
    double least = 0;
    for (int i = from; i >= to; i--) {
        const gemm_kernel &k = dense_kernels[i];
        const long tiles = (long)((n_out + k.w_rows * k.cw - 1) / (k.w_rows * k.cw)) *
                           ((n_max + k.nb * k.ct - 1) / (k.nb * k.ct));
        const long at_once = g->n_sms / (k.cw * k.ct), waves = (tiles + at_once - 1) / at_once;
        const double cost = (double)waves * (n_max <= 128 ? k.w_rows + k.nb : k.w_rows);
        if (i == from || cost < least * 0.97) {
            best = i;
            least = cost;
        }
    }
    return best;
}

cudaError_t tr_gemm_fp8_dense(const tr_gemm_fp8 *g, const tr_fp8_weight *w, const tr_fp8_rows *x,
                              void *out_d, size_t ld_out, int out_f32, cudaStream_t stream)
{
    return tr_gemm_fp8_dense_as(g, tr_gemm_fp8_pick(g, w->n_out, x->n_max), w, x, out_d, ld_out,
                                out_f32, stream);
}
