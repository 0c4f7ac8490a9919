/* What the kernels of dense_mha_hopper.h share: the plan of a launch in device memory, tensor maps, the matrix
 * instructions. */
#ifndef TR_CUDA_DENSE_MHA_HOPPER_CUH
#define TR_CUDA_DENSE_MHA_HOPPER_CUH

#include <math_constants.h>

#include "kernels/cuda/dense_mha_hopper.h"
#include "kernels/cuda/dense_mha_plan.h"
#include "kernels/cuda/hopper.cuh"

namespace tr
{
namespace dense
{

enum {
    TILE_ROWS = TR_DENSE_TILE_ROWS,
    BLOCK_KEYS = TR_DENSE_BLOCK_KEYS,
    D_Q = TR_DENSE_D_NOPE + TR_DENSE_D_ROPE,
    D_KV = TR_DENSE_D_NOPE + TR_DENSE_D_V,
    CHUNK = BLOCK_KEYS * 128, /* bytes of 128 rows of 64 numbers, swizzled by 128 bytes */
    GROUP_HEADS = 16,         /* at most, of a block of keys, by one block of threads */
};

using span = tr_dense_span;
struct tile { /* rows [first, ..) of a span, up to TILE_ROWS; or a block of its keys */
    int i_span, first;
};

struct job {
    tr_rows rows;
    int n_heads, group_heads, max_spans, max_keys;
    int step; /* of all spans */
    int first_round, n_rounds; /* the window: of all rounds, these */
    int i_round;               /* in it */
    float scale;               /* times log2(e) */
    tr_kv_layer kv;
    tr_dense_plan *plan;
    span *spans;
    struct tile *tiles, *unsorted, *blocks;
    uint8_t *kv_new; /* bf16 [n_heads, max_keys, 256] */
    uint8_t *pe;     /* bf16 [max_keys, 64] */
    uint8_t *out;
};

cudaError_t make_map(CUtensorMap *map, const void *base, const uint64_t (&dims)[3],
                     const uint64_t (&strides)[2], const uint32_t (&box)[3]);
cudaError_t launch_keys(const job &j, const void *w_kv, int n_blocks, cudaStream_t stream);

/* clang-format off */
#define TR_D4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TR_D16(i) TR_D4(i), TR_D4(i + 4), TR_D4(i + 8), TR_D4(i + 12)
#define TR_D64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

/* [64, 128] (+)= A B^T, both in shared memory with the inner dimension contiguous. */
__device__ __forceinline__ void mma_rows(float (&d)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " TR_D64 ", %64, %65, p, 1, 1, 0, 0;\n}"
        : TR_D16(0), TR_D16(16), TR_D16(32), TR_D16(48)
        : "l"(a), "l"(b), "r"(add));
}
/* [64, 128] += A B: A in registers, B in shared memory with the columns contiguous. */
__device__ __forceinline__ void mma_columns(float (&d)[64], const uint32_t *a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " TR_D64 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : TR_D16(0), TR_D16(16), TR_D16(32), TR_D16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef TR_D64
#undef TR_D16
#undef TR_D4
/* clang-format on */

__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

/* Of four words of each of four neighbours, x[i] of lane q, lane q gets those with i = q, in the lanes' order. */
__device__ __forceinline__ uint4 quad_transpose(const uint32_t (&x)[4])
{
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
    uint32_t b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
    uint32_t low0 = odd ? a : x[0], low1 = odd ? x[1] : a;
    uint32_t high0 = odd ? b : x[2], high1 = odd ? x[3] : b;
    uint32_t c = __shfl_xor_sync(~0u, high ? low0 : high0, 2);
    uint32_t d = __shfl_xor_sync(~0u, high ? low1 : high1, 2);
    if (high) return {c, d, high0, high1};
    return {low0, low1, c, d};
}

/* A warpgroup's [64, 128] as bf16 to rows of 256 bytes: `to` is the row of the thread's first, the second lies `below` bytes
 * further. All lanes take part; `first`, `second`: whether the row is to be written. */
__device__ __forceinline__ void store_rows(uint8_t *to, size_t below, const float (&x)[64],
                                           const float (&f)[2], bool first, bool second)
{
    int q = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int g = 0; g < 16; g += 4) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i] = pack_bf16(x[4 * (g + i) + 2 * r] * f[r], x[4 * (g + i) + 2 * r + 1] * f[r]);
            uint4 v = quad_transpose(w);
            if (r ? second : first) *(uint4 *)(void *)(to + r * below + 16 * g + 16 * q) = v;
        }
}

} // namespace dense
} // namespace tr

#endif
