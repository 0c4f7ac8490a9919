/* The matrix instructions of the index scores: 64 keys x heads of 1 or 2 queries, 32 of the inner dimension, e4m3 by
 * e4m3 into fp32, both operands in shared memory. An element's sum does not depend on the number of columns. */
#ifndef TR_CUDA_INDEX_LOGITS_MMA_CUH
#define TR_CUDA_INDEX_LOGITS_MMA_CUH

#include <stdint.h>

namespace tr
{

/* clang-format off */
#define TR_D4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TR_D16(i) TR_D4(i), TR_D4(i + 4), TR_D4(i + 8), TR_D4(i + 12)

/* 2 queries: accumulator [64 keys, 128], 64 registers a thread. */
__device__ __forceinline__ void index_mma(float (&d)[64], uint64_t keys, uint64_t queries, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1;\n}"
        : TR_D16(0), TR_D16(16), TR_D16(32), TR_D16(48)
        : "l"(keys), "l"(queries), "r"(add));
}

/* 1 query: accumulator [64 keys, 64], 32 registers a thread. */
__device__ __forceinline__ void index_mma(float (&d)[32], uint64_t keys, uint64_t queries, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1;\n}"
        : TR_D16(0), TR_D16(16)
        : "l"(keys), "l"(queries), "r"(add));
}

#undef TR_D16
#undef TR_D4
/* clang-format on */

} // namespace tr

#endif
