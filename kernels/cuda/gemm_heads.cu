#include "kernels/cuda/gemm_heads.h"

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rope.cuh"

namespace
{

enum {
    THREADS = 256,
    ROWS = 128,
    OUTS = 128,
    K = 128,
    LD = K + 8, /* rows of shared memory in different banks */
    STAGES = 2,
    TILE = ROWS * LD, /* numbers of a [128][128] piece in shared memory */
};

struct product {
    const __nv_bfloat16 *x;
    __nv_bfloat16 *y;
    size_t ld_x, x_step, ld_y, y_step;
    const uint8_t *w;   /* numbers */
    const float *scale; /* [heads][scale_rows][pitch] */
    size_t matrix, scale_matrix;
    int ld_w, pitch; /* bytes of a row of numbers; scales of a row of blocks */
    const int32_t *n;
    int n_max;
    const uint8_t *skip;
};

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

/* Two e4m3 codes as bf16, exact. */
__device__ __forceinline__ uint32_t expand(uint32_t two)
{
    const __half2_raw h =
        __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(two & 0xffffu), __NV_E4M3);
    const __nv_bfloat162 b = __float22bfloat162_rn(__half22float2(__half2(h)));
    return *(const uint32_t *)&b;
}

/* Outputs [o0, o0 + 128) of a head, all of k, as bf16: [KB][128][LD]. */
template <int KB, bool E4M3>
__device__ __forceinline__ void load_weights(__nv_bfloat16 *to, const product &p, int head, int o0)
{
    const uint8_t *w = p.w + (size_t)head * p.matrix + (size_t)o0 * (size_t)p.ld_w;
    enum { CHUNKS = KB * K / 16 }; /* of 16 numbers, in a row */
#pragma unroll KB == 1 ? 4 : 8
    for (int u = (int)threadIdx.x; u < OUTS * CHUNKS; u += THREADS) {
        const int o = u / CHUNKS, k = u % CHUNKS * 16;
        uint4 *piece = (uint4 *)(to + k / K * TILE + o * LD + k % K);
        if (E4M3) {
            const uint4 c = __ldg((const uint4 *)(w + (size_t)o * (size_t)p.ld_w + k));
            piece[0] = make_uint4(expand(c.x), expand(c.x >> 16), expand(c.y), expand(c.y >> 16));
            piece[1] = make_uint4(expand(c.z), expand(c.z >> 16), expand(c.w), expand(c.w >> 16));
        } else {
            const uint4 *from = (const uint4 *)(w + (size_t)o * (size_t)p.ld_w + 2 * (size_t)k);
            piece[0] = __ldg(from);
            piece[1] = __ldg(from + 1);
        }
    }
}

/* 128 columns of 128 rows; rows past the last one are zeros. */
__device__ __forceinline__ void load_rows(__nv_bfloat16 *to, const product &p, int head, int row0,
                                          int kb, int n)
{
    const __nv_bfloat16 *x = p.x + (size_t)head * p.x_step + (size_t)(kb * K);
    const int least = n - row0 <= 16 ? 16 : ROWS; /* of a few rows, those that are multiplied */
#pragma unroll 1
    for (int u = (int)threadIdx.x; u < least * K / 8; u += THREADS) {
        const int r = u / (K / 8), k = u % (K / 8) * 8;
        const bool there = row0 + r < n;
        copy_async(to + r * LD + k, x + (there ? (size_t)(row0 + r) : 0) * p.ld_x + k, there);
    }
}

/* One block of 128 along k for this warp's 32 rows and 64 outputs; n_m: how many of its groups of 16 rows are there. */
__device__ __forceinline__ void multiply_block(float (&sum)[2][8][4], const __nv_bfloat16 *x,
                                               const __nv_bfloat16 *w, int n_m)
{
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            tr::load_matrices(a[m], x + (m * 16 + lane % 16) * LD + k + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t b[4];
            tr::load_matrices(b,
                              w + (j * 16 + lane / 16 * 8 + lane % 8) * LD + k + lane / 8 % 2 * 8);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                if (m >= n_m) break;
                tr::multiply(sum[m][2 * j], a[m], b, __nv_bfloat16());
                tr::multiply(sum[m][2 * j + 1], a[m], b + 2, __nv_bfloat16());
            }
        }
    }
}

/* Of four words of each of four neighbours, x[i] of lane q, lane q gets those with i = q, in the lanes' order: 16 bytes of a row
 * instead of 4. */
__device__ __forceinline__ uint4 four_of_quad(const uint32_t (&x)[4])
{
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1),
                   b = __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
    const uint32_t low0 = odd ? a : x[0], low1 = odd ? x[1] : a, high0 = odd ? b : x[2],
                   high1 = odd ? x[3] : b;
    const uint32_t c = __shfl_xor_sync(0xffffffffu, high ? low0 : high0, 2),
                   d = __shfl_xor_sync(0xffffffffu, high ? low1 : high1, 2);
    return high ? make_uint4(c, d, high0, high1) : make_uint4(low0, low1, c, d);
}

template <int KB, bool E4M3>
__global__ void __launch_bounds__(THREADS, 1) multiply_heads(const __grid_constant__ product p)
{
    extern __shared__ __align__(16) __nv_bfloat16 memory[];
    __nv_bfloat16 *weights = memory, *ring = memory + KB * TILE;
    const int o0 = (int)blockIdx.x * OUTS, head = (int)blockIdx.y, lane = (int)threadIdx.x % 32,
              warp = (int)threadIdx.x / 32, group = warp / 2, side = warp % 2;

    load_weights<KB, E4M3>(weights, p, head, o0); /* beside the kernel in front */
    tr::early::follow();
    const int n = tr::live_rows(p.n, p.n_max);
    const int n_tiles = (n + ROWS - 1) / ROWS, first = (int)blockIdx.z, step = (int)gridDim.z;
    if (first >= n_tiles) return;
    const int n_pieces = ((n_tiles - first + step - 1) / step) * KB;

    load_rows(ring, p, head, first * ROWS, 0, n);
    copies_commit();
    float scale[KB];
#pragma unroll
    for (int b = 0; b < KB; b++)
        scale[b] = E4M3 ? p.scale[(size_t)head * p.scale_matrix +
                                  (size_t)(o0 / 128) * (size_t)p.pitch + (size_t)b]
                        : 1.0f;

    float total[2][8][4];
#pragma unroll 1
    for (int i0 = 0; i0 < n_pieces; i0 += KB) {
        const int row0 = (first + i0 / KB * step) * ROWS;
        const int left = n - row0 - group * 32, n_m = left <= 0 ? 0 : left <= 16 ? 1 : 2;
#pragma unroll
        for (int b = 0; b < KB; b++) {
            const int i = i0 + b;
            if (i + 1 < n_pieces)
                load_rows(ring + (i + 1) % STAGES * TILE, p, head,
                          (first + (i + 1) / KB * step) * ROWS, (i + 1) % KB, n);
            copies_commit();
            copies_wait<1>();
            __syncthreads();
            float sum[2][8][4] = {};
            multiply_block(sum, ring + i % STAGES * TILE + group * 32 * LD,
                           weights + b * TILE + side * 64 * LD, n_m);
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++)
                        total[m][j][c] =
                            __fmaf_rn(sum[m][j][c], scale[b], b == 0 ? 0.0f : total[m][j][c]);
            __syncthreads();
        }
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row0 + group * 32 + m * 16 + half * 8 + lane / 4;
                const bool wanted = r < n && !(p.skip && p.skip[r]);
                __nv_bfloat16 *y = p.y + (size_t)r * p.ld_y + (size_t)head * p.y_step +
                                   (size_t)(o0 + side * 64 + lane % 4 * 8);
#pragma unroll
                for (int j = 0; j < 8; j += 4) {
                    uint32_t two[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const __nv_bfloat162 b = __floats2bfloat162_rn(
                            total[m][j + i][2 * half], total[m][j + i][2 * half + 1]);
                        two[i] = *(const uint32_t *)&b;
                    }
                    const uint4 v = four_of_quad(two);
                    if (wanted) *(uint4 *)(y + 8 * j) = v;
                }
            }
    }
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
        for (unsigned u = threadIdx.x; u < (unsigned)n * units; u += FEW_THREADS)
            tr::rope_eight(rope.a, rope.rows, u / units * heads + (unsigned)head, u / units,
                           u % units * 8);
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

template <int KB> constexpr int shared_bytes()
{
    return (KB + STAGES) * TILE * 2;
}

template <int KB, bool E4M3> cudaError_t open()
{
    const cudaError_t e = cudaFuncSetAttribute(
        multiply_heads_few<KB, E4M3>, cudaFuncAttributeMaxDynamicSharedMemorySize, few_bytes<KB>());
    return e == cudaSuccess ? cudaFuncSetAttribute(multiply_heads<KB, E4M3>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   shared_bytes<KB>())
                            : e;
}

template <int KB> cudaError_t launch(const product &p, bool e4m3, dim3 grid, cudaStream_t stream)
{
    return tr::early::launch(e4m3 ? multiply_heads<KB, true> : multiply_heads<KB, false>, 1, grid,
                             THREADS, shared_bytes<KB>(), stream, p);
}

enum { BLOCKS = 512 }; /* that a launch should have, if there are rows for them */

} // namespace

int tr_cuda_gemm_heads_fits(const tr_linear *w)
{
    return w->format != TR_W_F32 && (w->n_in == K || w->n_in == 4 * K) && w->n_out % OUTS == 0;
}

cudaError_t tr_cuda_gemm_heads_open(void)
{
    cudaError_t e = open<1, true>();
    if (e == cudaSuccess) e = open<1, false>();
    if (e == cudaSuccess) e = open<4, true>();
    return e == cudaSuccess ? open<4, false>() : e;
}

cudaError_t tr_cuda_gemm_heads(const tr_heads_product *a, cudaStream_t stream)
{
    tr_weight_layout l;
    const tr_linear *w = a->w;
    if (!tr_cuda_gemm_heads_fits(w) || w->n_mats < a->n_heads || a->ld_x % 8 || a->x_step % 8 ||
        a->ld_y % 8 || a->y_step % 8 || (uintptr_t)a->y % 16 ||
        (a->rope && (a->n_max > FEW_ROWS || w->n_in != K)))
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
                       .skip = a->skip_d};
    const bool e4m3 = w->format == TR_W_E4M3_B128;
    if (a->n_max <= FEW_ROWS)
        return w->n_in == K ? launch_few<1>(p, e4m3, a, stream) : launch_few<4>(p, e4m3, a, stream);
    const int slices = w->n_out / OUTS, tiles = (a->n_max + ROWS - 1) / ROWS;
    int each = (BLOCKS + slices * a->n_heads - 1) / (slices * a->n_heads);
    each = each < tiles ? each : tiles;
    const dim3 grid((unsigned)slices, (unsigned)a->n_heads, (unsigned)each);
    return w->n_in == K ? launch<1>(p, e4m3, grid, stream) : launch<4>(p, e4m3, grid, stream);
}
