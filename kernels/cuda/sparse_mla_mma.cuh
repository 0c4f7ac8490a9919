/* The matrix instructions of sparse MLA, bf16 into fp32, 16 of the inner dimension each. An element's sum depends neither
 * on the number of columns of its instruction, nor on the order of the 16, nor on whether A comes from registers or from
 * shared memory: the row tests of tests/cuda/bench_sparse_mla.cu, "bit equality", stand on that and would show it. */
#ifndef TR_CUDA_SPARSE_MLA_MMA_CUH
#define TR_CUDA_SPARSE_MLA_MMA_CUH

#include <stdint.h>

namespace tr
{

/* clang-format off */
#define TR_D4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TR_D16(i) TR_D4(i), TR_D4(i + 4), TR_D4(i + 8), TR_D4(i + 12)

/* Scores [64 heads, 64 keys]: queries and keys in shared memory, the inner dimension contiguous. */
__device__ __forceinline__ void mma_scores(float (&d)[32], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, 0, 0;\n}"
        : TR_D16(0), TR_D16(16)
        : "l"(a), "l"(b), "r"(add));
}

/* Scores [64 heads, 64 keys]: queries in registers, keys in shared memory, the inner dimension contiguous. */
__device__ __forceinline__ void mma_scores(float (&d)[32], const uint32_t *a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
        : TR_D16(0), TR_D16(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

/* Values [64 heads, 64 latents] += P V: P in registers, V in shared memory with the latents contiguous. */
__device__ __forceinline__ void mma_values(float (&d)[32], const uint32_t *a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : TR_D16(0), TR_D16(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* Values [64 heads, 128 latents] += P V: P in registers, V in shared memory with the latents contiguous. */
__device__ __forceinline__ void mma_values(float (&d)[64], const uint32_t *a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : TR_D16(0), TR_D16(16), TR_D16(32), TR_D16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* Scores turned round, [64 keys, 8 heads]: keys and queries in shared memory, the inner dimension contiguous. */
__device__ __forceinline__ void mma_keys(float (&d)[4], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, %4, %5, p, 1, 1, 0, 0;\n}"
        : TR_D4(0)
        : "l"(a), "l"(b), "r"(add));
}

/* Scores turned round, [64 keys, 16 heads]: keys and queries in shared memory, the inner dimension contiguous. */
__device__ __forceinline__ void mma_keys(float (&d)[8], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, %8, %9, p, 1, 1, 0, 0;\n}"
        : TR_D4(0), TR_D4(4)
        : "l"(a), "l"(b), "r"(add));
}

/* Scores turned round, [64 keys, 32 heads]: keys and queries in shared memory, the inner dimension contiguous. */
__device__ __forceinline__ void mma_keys(float (&d)[16], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, p, 1, 1, 0, 0;\n}"
        : TR_D16(0)
        : "l"(a), "l"(b), "r"(add));
}

/* Values turned round, [64 latents, 8 heads] += V^T P^T: latents and heads contiguous in shared memory. */
__device__ __forceinline__ void mma_latents(float (&d)[4], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, %4, %5, p, 1, 1, 1, 1;\n}"
        : TR_D4(0)
        : "l"(a), "l"(b), "r"(add));
}

/* Values turned round, [64 latents, 16 heads] += V^T P^T: latents and heads contiguous in shared memory. */
__device__ __forceinline__ void mma_latents(float (&d)[8], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, %8, %9, p, 1, 1, 1, 1;\n}"
        : TR_D4(0), TR_D4(4)
        : "l"(a), "l"(b), "r"(add));
}

/* Values turned round, [64 latents, 32 heads] += V^T P^T: latents and heads contiguous in shared memory. */
__device__ __forceinline__ void mma_latents(float (&d)[16], uint64_t a, uint64_t b, int add)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, p, 1, 1, 1, 1;\n}"
        : TR_D16(0)
        : "l"(a), "l"(b), "r"(add));
}

#undef TR_D16
#undef TR_D4
/* clang-format on */

} // namespace tr

#endif
