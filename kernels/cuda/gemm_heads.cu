#include "kernels/cuda/gemm_heads.h"

#include "kernels/cuda/gemm_heads_wide.cuh"
#include "kernels/cuda/rope.cuh"

namespace
{

using namespace tr::heads;

enum { LD = K + 8 /* rows of shared memory in different banks */ };

__device__ __forceinline__ void copy_async(void *to, const void *from, bool there)
{
    const uint32_t a = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(a), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* ---- up to 16 rows --------------------------------------------------------------------------------------------------- */

/* As many weights a block as keep every SM busy with several: 128 outputs of 128 columns, or 32 of 512. Everything is asked for at
 * once. A warp has a quarter of the outputs; sums run as in multiply_block: the same bits. */
enum { FEW_ROWS = TR_HEADS_FEW, FEW_THREADS = 128, FEW_NUMBERS = 128 * K };

struct rope_job { /* of queries, by the last block of each head */
    tr_mla_query_args a;
    tr_rows rows;
    int wanted;
};

template <int KB> constexpr int few_bytes()
{
    return (FEW_NUMBERS / K + KB * FEW_ROWS) * LD * 2;
}

/* Weights of a block's outputs as bf16: [KB][outputs][LD]. */
template <int KB, bool E4M3>
__device__ __forceinline__ void few_weights(__nv_bfloat16 *weights, const product &p, int head,
                                            int o0)
{
    enum { OUTS_FEW = FEW_NUMBERS / (KB * K), PIECES = KB * K / 16 };
    const uint8_t *w = p.w + (size_t)head * p.matrix + (size_t)o0 * (size_t)p.ld_w;

    enum { EACH = OUTS_FEW * PIECES / FEW_THREADS };
    uint4 c[EACH][E4M3 ? 1 : 2];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int u = i * FEW_THREADS + (int)threadIdx.x, o = u / PIECES, k = u % PIECES * 16;
        const uint4 *from =
            (const uint4 *)(w + (size_t)o * (size_t)p.ld_w + (E4M3 ? 1 : 2) * (size_t)k);
        c[i][0] = __ldg(from);
        if (!E4M3) c[i][E4M3 ? 0 : 1] = __ldg(from + 1);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int u = i * FEW_THREADS + (int)threadIdx.x, o = u / PIECES, k = u % PIECES * 16;
        uint4 *piece = (uint4 *)(weights + (k / K * OUTS_FEW + o) * LD + k % K);
        const uint4 v = c[i][0];
        piece[0] =
            E4M3 ? make_uint4(expand(v.x), expand(v.x >> 16), expand(v.y), expand(v.y >> 16)) : v;
        piece[1] = E4M3 ? make_uint4(expand(v.z), expand(v.z >> 16), expand(v.w), expand(v.w >> 16))
                        : c[i][E4M3 ? 0 : 1];
    }
}

template <int KB, bool E4M3>
__global__ void __launch_bounds__(FEW_THREADS)
    multiply_heads_few(const __grid_constant__ product p, const __grid_constant__ rope_job rope)
{
    enum { OUTS_FEW = FEW_NUMBERS / (KB * K), TILES = OUTS_FEW / 4 / 8 };
    extern __shared__ __align__(16) __nv_bfloat16 memory[];
    __nv_bfloat16 *weights = memory,
                  *rows = memory + KB * OUTS_FEW * LD; /* [KB][outs], [KB][rows] */
    const int o0 = (int)blockIdx.x * OUTS_FEW, head = (int)blockIdx.y, lane = (int)threadIdx.x % 32,
              warp = (int)threadIdx.x / 32;
    few_weights<KB, E4M3>(weights, p, head, o0); /* beside the kernel in front */
    float scale[KB];
#pragma unroll
    for (int b = 0; b < KB; b++)
        scale[b] = E4M3 ? __ldg(p.scale + (size_t)head * p.scale_matrix +
                                (size_t)(o0 / 128) * (size_t)p.pitch + (size_t)b)
                        : 1.0f;
    tr::early::follow();
    const int n = tr::live_rows(p.n, p.n_max);
    const __nv_bfloat16 *x = p.x + (size_t)head * p.x_step;
#pragma unroll
    for (int i = 0; i < KB * FEW_ROWS * K / 8 / FEW_THREADS; i++) {
        const int u = i * FEW_THREADS + (int)threadIdx.x, r = u / (KB * K / 8),
                  k = u % (KB * K / 8) * 8;
        copy_async(rows + (k / K * FEW_ROWS + r) * LD + k % K,
                   x + (r < n ? (size_t)r : 0) * p.ld_x + k, r < n);
    }
    copies_commit();
    if (KB == 1 && rope.wanted && blockIdx.x + 1 == gridDim.x) {
        const unsigned units = (unsigned)rope.a.d_rope / 8, heads = gridDim.y;
        for (unsigned u = threadIdx.x; u < (unsigned)n * units; u += FEW_THREADS) {
            const unsigned at = u / units * heads + (unsigned)head, j = u % units * 8;
            tr::rope_eight e;
            e.begin(rope.a, rope.rows, at, u / units, j);
            e.end(rope.a, at, j);
        }
    }
    copies_wait<0>();
    __syncthreads();

    float total[TILES][4] = {};
#pragma unroll
    for (int b = 0; b < KB; b++) {
        float sum[TILES][4] = {};
#pragma unroll
        for (int k = 0; k < K; k += 32) {
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++)
                tr::load_matrices(a[h], rows + (b * FEW_ROWS + lane % 16) * LD + k + 16 * h +
                                            lane / 16 * 8);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                uint32_t y[4]; /* 8 outputs by 32 columns */
                tr::load_matrices(y, weights +
                                         (b * OUTS_FEW + (warp * TILES + j) * 8 + lane % 8) * LD +
                                         k + lane / 8 * 8);
                tr::multiply(sum[j], a[0], y, __nv_bfloat16());
                tr::multiply(sum[j], a[1], y + 2, __nv_bfloat16());
            }
        }
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                total[j][i] = __fmaf_rn(sum[j][i], scale[b], b == 0 ? 0.0f : total[j][i]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = half * 8 + lane / 4;
        if (r >= n || (p.skip && p.skip[r])) continue;
        __nv_bfloat16 *y = p.y + (size_t)r * p.ld_y + (size_t)head * p.y_step +
                           (size_t)(o0 + warp * TILES * 8 + lane % 4 * 2);
#pragma unroll
        for (int j = 0; j < TILES; j++)
            *(__nv_bfloat162 *)(y + 8 * j) =
                __floats2bfloat162_rn(total[j][2 * half], total[j][2 * half + 1]);
    }
}

template <int KB>
cudaError_t launch_few(const product &p, bool e4m3, const tr_heads_product *a, cudaStream_t stream)
{
    const dim3 grid((unsigned)(a->w->n_out * KB / OUTS), (unsigned)a->n_heads);
    rope_job rope = {};
    if (a->rope) {
        rope.a = *a->rope;
        rope.rows = *a->rope->rows;
        rope.wanted = 1;
    }
    return tr::early::launch(e4m3 ? multiply_heads_few<KB, true> : multiply_heads_few<KB, false>, 1,
                             grid, FEW_THREADS, few_bytes<KB>(), stream, p, rope);
}

template <int KB, bool E4M3> cudaError_t open_few()
{
    return cudaFuncSetAttribute(multiply_heads_few<KB, E4M3>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize, few_bytes<KB>());
}

template <int KB, int CHUNKS, bool E4M3> cudaError_t open_wide()
{
    return cudaFuncSetAttribute(multiply_wide<KB, CHUNKS, E4M3>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                shared_bytes<KB, CHUNKS>());
}

/* As many blocks as fill the GPU once, each of whole tiles for both of its warpgroups. */
template <int KB, int CHUNKS>
cudaError_t launch_wide(const product &p, bool e4m3, const tr_heads_product *a, cudaStream_t stream)
{
    int device = 0, n_sm = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return e;
    const int slices = a->w->n_out / (OUTS * CHUNKS), tiles = (a->n_max + ROWS - 1) / ROWS,
              most = (tiles + MATH - 1) / MATH, fit = n_sm / (slices * a->n_heads),
              each = fit < 1      ? 1
                     : fit < most ? fit
                                  : most;
    return tr::early::launch(e4m3 ? multiply_wide<KB, CHUNKS, true>
                                  : multiply_wide<KB, CHUNKS, false>,
                             1, dim3((unsigned)slices, (unsigned)a->n_heads, (unsigned)each),
                             THREADS, shared_bytes<KB, CHUNKS>(), stream, p);
}

} // namespace

int tr_cuda_gemm_heads_fits(const tr_linear *w)
{
    return w->format != TR_W_F32 && (w->n_in == K || w->n_in == 4 * K) && w->n_out % OUTS == 0;
}

cudaError_t tr_cuda_gemm_heads_open(void)
{
    cudaError_t e = open_few<1, true>();
    if (e == cudaSuccess) e = open_few<1, false>();
    if (e == cudaSuccess) e = open_few<4, true>();
    if (e == cudaSuccess) e = open_few<4, false>();
    if (e == cudaSuccess) e = open_wide<1, 4, true>();
    if (e == cudaSuccess) e = open_wide<1, 4, false>();
    if (e == cudaSuccess) e = open_wide<1, 1, true>();
    if (e == cudaSuccess) e = open_wide<1, 1, false>();
    if (e == cudaSuccess) e = open_wide<4, 1, true>();
    return e == cudaSuccess ? open_wide<4, 1, false>() : e;
}

cudaError_t tr_cuda_gemm_heads(const tr_heads_product *a, cudaStream_t stream)
{
    tr_weight_layout l;
    const tr_linear *w = a->w;
    if (!tr_cuda_gemm_heads_fits(w) || w->n_mats < a->n_heads || a->ld_x % 8 || a->x_step % 8 ||
        a->ld_y % 8 || a->y_step % 8 || (uintptr_t)a->y % 16 ||
        (a->rope && (a->n_max > FEW_ROWS || w->n_in != K)) ||
        (a->q && (a->n_max <= FEW_ROWS || w->n_in == K || w->n_out != OUTS)))
        return cudaErrorInvalidValue;
    if (a->n_max <= 0) return cudaSuccess;
    tr_weight_layout_of(&l, w->format, w->n_mats, w->n_out, w->n_in);
    const uint8_t *data = (const uint8_t *)w->data;
    const product p = {.x = tr::act(a->x),
                       .y = tr::act(a->y),
                       .ld_x = a->ld_x,
                       .x_step = a->x_step,
                       .ld_y = a->ld_y,
                       .y_step = a->y_step,
                       .w = data + l.numbers,
                       .scale = (const float *)(data + l.scales),
                       .matrix = l.matrix,
                       .scale_matrix = (size_t)l.scale_rows * (size_t)l.scale_pitch,
                       .ld_w = l.ld,
                       .pitch = l.scale_pitch,
                       .n = a->n_d,
                       .n_max = a->n_max,
                       .skip = a->skip_d,
                       .q = a->q,
                       .q_scale = a->q_scale,
                       .ld_q = (size_t)a->n_heads * OUTS,
                       .ld_scale = (a->n_max + 3) / 4 * 4,
                       .pow2 = a->scale_pow2};
    const bool e4m3 = w->format == TR_W_E4M3_B128;
    if (a->n_max <= FEW_ROWS)
        return w->n_in == K ? launch_few<1>(p, e4m3, a, stream) : launch_few<4>(p, e4m3, a, stream);
    if (w->n_in != K) return launch_wide<4, 1>(p, e4m3, a, stream);
    return w->n_out % (4 * OUTS) == 0 ? launch_wide<1, 4>(p, e4m3, a, stream)
                                      : launch_wide<1, 1>(p, e4m3, a, stream);
}
