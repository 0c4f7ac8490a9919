/* gemm_heads.cu for more rows than a few, on Hopper's warpgroup instructions. A block keeps a slice of a head's matrix in shared
 * memory, expanded to bf16 once (128 KiB at the real model's shapes), and walks over the rows: two warpgroups have tiles of 64
 * rows of their own and a ring each, which a warp of a third one fills, so one stores while the other multiplies. What a launch
 * takes is its rows in and out (4,096 of 128 heads: 134 MB and 537 MB one way and the other), not the products.
 *
 * The same columns meet in instructions of 16 in the same order as in multiply_heads_few, blocks of 128 are promoted alike: the
 * same bits. */
#ifndef TR_CUDA_GEMM_HEADS_WIDE_CUH
#define TR_CUDA_GEMM_HEADS_WIDE_CUH

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.cuh"

namespace tr
{
namespace heads
{

enum {
    K = 128,
    ROWS = 64, /* of a warpgroup's tile */
    MATH = 2,  /* warpgroups that multiply */
    THREADS = (MATH + 1) * 128,
    PIECE = ROWS * K * 2, /* bytes of a tile's 128 columns: [2][64 rows][128 bytes], swizzled */
    STAGES = 3,
    OUTS = 128,                   /* of one instruction */
    CHUNK = OUTS * K * 2,         /* bytes of 128 outputs' 128 columns */
    BARRIERS = MATH * STAGES * 2, /* full and empty */
    MATH_REGISTERS = 232,
    LOAD_REGISTERS = 40
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
    uint8_t *q; /* rows of ld_q codes instead of y, heads of 128; NULL: y */
    float *q_scale;
    size_t ld_q;
    int ld_scale, pow2;
};

/* Two e4m3 codes as bf16, exact. */
__device__ __forceinline__ uint32_t expand(uint32_t two)
{
    const __half2_raw h =
        __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(two & 0xffffu), __NV_E4M3);
    const __nv_bfloat162 b = __float22bfloat162_rn(__half22float2(__half2(h)));
    return *(const uint32_t *)&b;
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

/* clang-format off */
#define TR_D4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TR_D16(i) TR_D4(i), TR_D4(i + 4), TR_D4(i + 8), TR_D4(i + 12)
/* [64 rows, 128 outputs] (+)= x w^T over 16 columns, both in shared memory with the columns contiguous. */
__device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : TR_D16(0), TR_D16(16), TR_D16(32), TR_D16(48)
        : "l"(a), "l"(b), "r"(add));
}
#undef TR_D16
#undef TR_D4
/* clang-format on */

/* Outputs [o0, o0 + 128 CHUNKS) of a head, all of k, as bf16: [KB * 2][128 CHUNKS][128 bytes], swizzled. By the warpgroups that
 * multiply. */
template <int KB, int CHUNKS, bool E4M3>
__device__ __forceinline__ void load_weights(uint8_t *to, const product &p, int head, int o0)
{
    enum { PIECES = KB * K / 16, N = OUTS * CHUNKS, EACH = N * PIECES / (MATH * 128) };
    const uint8_t *w = p.w + (size_t)head * p.matrix + (size_t)o0 * (size_t)p.ld_w;
#pragma unroll EACH < 8 ? EACH : 8
    for (int i = 0; i < EACH; i++) {
        const int u = i * MATH * 128 + (int)threadIdx.x, o = u / PIECES, k = u % PIECES * 16,
                  at = k % 64 / 8;
        uint8_t *row = to + (k / 64 * N + o) * 128;
        uint4 *first = (uint4 *)(row + ((at ^ o) & 7) * 16),
              *second = (uint4 *)(row + (((at + 1) ^ o) & 7) * 16);
        const uint4 *from =
            (const uint4 *)(w + (size_t)o * (size_t)p.ld_w + (E4M3 ? 1 : 2) * (size_t)k);
        const uint4 c = __ldg(from);
        *first =
            E4M3 ? make_uint4(expand(c.x), expand(c.x >> 16), expand(c.y), expand(c.y >> 16)) : c;
        *second = E4M3 ? make_uint4(expand(c.z), expand(c.z >> 16), expand(c.w), expand(c.w >> 16))
                       : __ldg(from + 1);
    }
}

struct ring { /* of one warpgroup */
    uint8_t *memory;
    uint64_t *full, *empty;
};

/* One warp: pieces of a warpgroup's tiles, first, first + step, ..; rows past the last one are zeros. */
template <int KB>
__device__ __forceinline__ void load_tiles(const ring &r, const product &p, int head, int first,
                                           int step, int n)
{
    const int lane = (int)threadIdx.x % 32, at = lane % 16, row = lane / 16;
    const __nv_bfloat16 *x = p.x + (size_t)head * p.x_step + at * 8;
    const int n_tiles = (n + ROWS - 1) / ROWS;
    ring_position<STAGES> to;

    for (int tile = first; tile < n_tiles; tile += step)
        for (int b = 0; b < KB; b++) {
            barrier_wait(&r.empty[to.stage], to.parity ^ 1);
            const uint32_t piece = smem_address(r.memory + to.stage * PIECE + at / 8 * (PIECE / 2));
#pragma unroll 8
            for (int i = 0; i < ROWS / 2; i++) {
                const int o = 2 * i + row, from = tile * ROWS + o;
                const bool there = from < n;
                async_copy16(piece + (uint32_t)(o * 128 + ((at ^ o) & 7) * 16),
                             x + (there ? (size_t)from : 0) * p.ld_x + b * K, there ? 16 : 0);
            }
            async_copy_arrive(&r.full[to.stage]); /* when they are there */
            to.next();
        }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* A piece is there, as the tensor cores will read it: the fence is the reader's, in the writer it would wait for all copies that
 * are under way. */
__device__ __forceinline__ void wait_piece(const ring &r, const ring_position<STAGES> &at)
{
    barrier_wait(&r.full[at.stage], at.parity);
    fence_async_shared();
}

/* sum = the product of a piece and 128 outputs of 128 columns. n_outs: outputs of the block. */
__device__ __forceinline__ void multiply(float (&sum)[64], const uint8_t *piece,
                                         const uint8_t *weights, int n_outs)
{
    const uint64_t a = matrix_descriptor(smem_address(piece), 16, 1024, LAYOUT_SWIZZLE_128),
                   b = matrix_descriptor(smem_address(weights), 16, 1024, LAYOUT_SWIZZLE_128);
#pragma unroll
    for (int i = 0; i < 64; i++)
        wgmma_touch(sum[i]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K / 16; k++)
        mma(sum, a + (uint64_t)(k / 4 * (PIECE / 2 / 16) + k % 4 * 2),
            b + (uint64_t)(k / 4 * (n_outs * 128 / 16) + k % 4 * 2), k > 0);
    wgmma_commit();
}
/* Until all but LEFT products are done. */
template <int LEFT> __device__ __forceinline__ void multiplied(float (&sum)[64])
{
    wgmma_wait<LEFT>();
#pragma unroll
    for (int i = 0; i < 64; i++)
        wgmma_touch(sum[i]);
}

__device__ __forceinline__ uint32_t pack(float low, float high)
{
    const __nv_bfloat162 b = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&b;
}

/* A thread's two rows of a tile: 0 and 1. */
struct two_rows {
    int r[2];
    bool wanted[2];
};

/* 128 outputs from o of the head on, times scale. */
__device__ __forceinline__ void store(const product &p, const two_rows &rows, int head, int o,
                                      const float (&x)[64])
{
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        __nv_bfloat16 *y =
            p.y + (size_t)rows.r[h] * p.ld_y + (size_t)head * p.y_step + (size_t)(o + lane % 4 * 8);
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
            uint32_t two[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                two[i] = pack(x[4 * (j + i) + 2 * h], x[4 * (j + i) + 2 * h + 1]);
            const uint4 v = four_of_quad(two);
            if (rows.wanted[h]) *(uint4 *)(y + 8 * j) = v;
        }
    }
}

/* The same as e4m3 of its bf16 form, a head's 128 outputs with one scale (quantise.cu). */
__device__ __forceinline__ void store_codes(const product &p, const two_rows &rows, int head,
                                            const float (&x)[64])
{
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float most = 0;
#pragma unroll
        for (int j = 0; j < 16; j++)
            most = fmaxf(most, fmaxf(fabsf(x[4 * j + 2 * h]), fabsf(x[4 * j + 2 * h + 1])));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = round_bf16(fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2)));
        const float scale = block_scale(most, p.pow2), inverse = 1.0f / scale;
        const auto code = [&](int j) {
            return to_e4m3x2(
                block_divide(round_bf16(x[4 * j + 2 * h]), scale, inverse, p.pow2),
                block_divide(round_bf16(x[4 * j + 2 * h + 1]), scale, inverse, p.pow2));
        };
        uint8_t *to = p.q + (size_t)rows.r[h] * p.ld_q + (size_t)(head * OUTS + lane % 4 * 8);
#pragma unroll
        for (int j = 0; j < 16;
             j += 8) { /* columns 8 j on in the low halves, 8 j + 32 in the high ones */
            uint32_t two[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                two[i] = code(j + i) | code(j + 4 + i) << 16;
            const uint4 v = four_of_quad(two);
            if (!rows.wanted[h]) continue;
            *(uint2 *)(to + 8 * j) =
                make_uint2(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410));
            *(uint2 *)(to + 8 * j + 32) =
                make_uint2(__byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x7632));
        }
        if (rows.wanted[h] && lane % 4 == 0)
            p.q_scale[(size_t)head * (size_t)p.ld_scale + (size_t)rows.r[h]] = scale;
    }
}

/* One warpgroup: its tiles, from its ring. */
template <int KB, int CHUNKS>
__device__ __forceinline__ void multiply_tiles(const ring &r, const uint8_t *weights,
                                               const product &p, const float (&scale)[KB * CHUNKS],
                                               int head, int o0, int first, int step, int n)
{
    static_assert(KB == 1 || CHUNKS == 1, "a sum over blocks keeps one chunk's total");
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x % 128 / 32;
    const int n_tiles = (n + ROWS - 1) / ROWS;
    ring_position<STAGES> at;
    float sum[2][64];

    for (int tile = first; tile < n_tiles; tile += step) {
        two_rows rows;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            rows.r[h] = tile * ROWS + warp * 16 + h * 8 + lane / 4;
            rows.wanted[h] = rows.r[h] < n && !(p.skip && p.skip[rows.r[h]]);
        }
        float total[64];
        wait_piece(r, at);
        multiply(sum[0], r.memory + at.stage * PIECE, weights, OUTS * CHUNKS);
#pragma unroll
        for (int i = 0; i < KB * CHUNKS;
             i++) { /* the next one is multiplied beside what is done to this */
            float(&now)[64] = sum[i % 2];
            const ring_position<STAGES> held = at;
            if (i + 1 < KB * CHUNKS) {
                if (KB > 1) {
                    at.next();
                    wait_piece(r, at);
                }
                multiply(sum[(i + 1) % 2], r.memory + at.stage * PIECE,
                         weights + (KB > 1 ? (i + 1) * CHUNK : (i + 1) * OUTS * 128),
                         OUTS * CHUNKS);
                multiplied<1>(now);
            } else {
                multiplied<0>(now);
            }
            if (KB > 1 || i + 1 == CHUNKS) barrier_arrive(&r.empty[held.stage]);
#pragma unroll
            for (int c = 0; c < 64; c++)
                total[c] = __fmaf_rn(now[c], scale[i], KB == 1 || i == 0 ? 0.0f : total[c]);
            if (KB == 1) store(p, rows, head, o0 + i * OUTS, total);
        }
        at.next();
        if (KB == 1) continue;
        if (p.q)
            store_codes(p, rows, head, total);
        else
            store(p, rows, head, o0, total);
    }
}

template <int KB, int CHUNKS> constexpr int shared_bytes()
{
    return KB * CHUNKS * CHUNK + MATH * STAGES * PIECE + BARRIERS * 8 + 1024;
}

template <int KB, int CHUNKS, bool E4M3>
__global__ void __launch_bounds__(THREADS, 1) multiply_wide(const __grid_constant__ product p)
{
    extern __shared__ uint8_t memory[];
    uint8_t *weights = (uint8_t *)(((uintptr_t)memory + 1023) & ~(uintptr_t)1023),
            *pieces = weights + KB * CHUNKS * CHUNK;
    uint64_t *barriers = (uint64_t *)(pieces + MATH * STAGES * PIECE);
    const int o0 = (int)blockIdx.x * OUTS * CHUNKS, head = (int)blockIdx.y,
              group = (int)threadIdx.x / 128, warp = (int)threadIdx.x / 32;

    if (threadIdx.x == 0) {
        for (int i = 0; i < MATH * STAGES; i++) {
            barrier_init(&barriers[i], 32);
            barrier_init(&barriers[MATH * STAGES + i], 128);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const int member = group < MATH ? group : warp % 4;
    const ring r = {pieces + member * STAGES * PIECE, barriers + member * STAGES,
                    barriers + (MATH + member) * STAGES};
    const int first = (int)blockIdx.z * MATH + member, step = (int)gridDim.z * MATH;
    if (group == MATH) {
        registers_lower<LOAD_REGISTERS>();
        early::follow();
        if (member < MATH) load_tiles<KB>(r, p, head, first, step, live_rows(p.n, p.n_max));
        return;
    }
    registers_raise<MATH_REGISTERS>();
    load_weights<KB, CHUNKS, E4M3>(weights, p, head, o0); /* beside the kernel in front */
    float scale[KB * CHUNKS];
#pragma unroll
    for (int i = 0; i < KB * CHUNKS; i++)
        scale[i] = !E4M3 ? 1.0f
                         : __ldg(p.scale + (size_t)head * p.scale_matrix +
                                 (size_t)(o0 / 128 + (KB > 1 ? 0 : i)) * (size_t)p.pitch +
                                 (size_t)(KB > 1 ? i : 0));
    fence_async_shared();
    named_barrier(1, MATH * 128);
    early::follow();
    multiply_tiles<KB, CHUNKS>(r, weights, p, scale, head, o0, first, step,
                               live_rows(p.n, p.n_max));
}

} // namespace heads
} // namespace tr

#endif
