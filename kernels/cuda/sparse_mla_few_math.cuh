/* What the kernels of sparse MLA of up to 32 heads share: a chunk of 128 keys (two blocks) as a softmax of its own, turned round
 * (scores are keys x heads, values latents x heads, N columns of heads), and the sum of chunks. sparse_mla_few.cu says how they
 * are used. */
#ifndef TR_CUDA_SPARSE_MLA_FEW_MATH_CUH
#define TR_CUDA_SPARSE_MLA_FEW_MATH_CUH

#include "kernels/cuda/sparse_mla_few.cuh"

namespace tr
{
namespace mla
{

/* What is kept of a chunk: values as the threads that made them hold them, then references and sums of the heads. */
template <int N> __host__ __device__ constexpr size_t chunk_bytes()
{
    return (size_t)N * (2048 + 8);
}
template <int N> __device__ __forceinline__ uint8_t *chunk_at(const job &j, int row, int chunk)
{
    return j.work + ((size_t)row * FEW_CHUNKS + chunk) * chunk_bytes<N>();
}
template <int N> __device__ __forceinline__ float *chunk_heads(uint8_t *chunk)
{
    return (float *)(void *)(chunk + N * 2048);
}

/* Running reference and sum of a head take in a chunk's. keep, take: factors of the values, powers of two. */
struct running {
    float reference, sum, keep, take;
};
__device__ __forceinline__ void run_clear(running &r)
{
    r.reference = -CUDART_INF_F;
    r.sum = 0.0f;
}
__device__ __forceinline__ void run_add(running &r, float reference, float sum)
{
    float top = fmaxf(r.reference, reference);
    r.keep = exp2_whole(r.reference - top);
    r.take = exp2_whole(reference - top);
    r.reference = top;
    r.sum = __fmaf_rn(sum, r.take, r.sum * r.keep);
}
__device__ __forceinline__ float fold(float total, float chunk, float keep, float take)
{
    return __fmaf_rn(chunk, take, total * keep);
}

/* Four values of a thread: latents at places r and r + 8 of a tile, of heads h and h + 1; v[2 r + h]. */
template <bool FP8>
__device__ __forceinline__ void store_four(const job &j, int row, int tile, int warp, int head,
                                           const float *v, float f0, float f1)
{
    int r = (threadIdx.x & 31) >> 2;
    int d = tile * 64 + warp * 16 + (FP8 ? 4 * (r >> 1) + 2 * (r & 1) : r);
    uint16_t *out = (uint16_t *)(void *)j.out + ((size_t)row * j.n_heads + head) * D_LATENT + d;

#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (head + h >= j.n_heads) break;
        uint32_t x =
            pack_bf16(__fmaf_rn(v[h], h ? f1 : f0, 0.0f), __fmaf_rn(v[2 + h], h ? f1 : f0, 0.0f));
        if (FP8) {
            *(uint32_t *)(void *)(out + h * D_LATENT) = x;
        } else {
            out[h * D_LATENT] = (uint16_t)x;
            out[h * D_LATENT + 8] = (uint16_t)(x >> 16);
        }
    }
}

__device__ __forceinline__ void store_lse(const job &j, int row, int head, const running &r)
{
    if (j.lse && head < j.n_heads)
        j.lse[(size_t)row * j.n_heads + head] = (r.reference + log2f(r.sum)) * CUDART_LN2_F;
}

struct few_places { /* shared addresses; block: bytes from one block of keys to the next */
    uint32_t keys, block, queries, probs;
};

/* What the warps of the two blocks of a chunk say of each head. */
template <int N> struct few_parts {
    alignas(16) float max[N][8], sum[N][8]; /* [head][warp] */
};

/* Scores [64 keys, N heads] of n tiles; t: the first one's place among the queries', keys: its address. */
template <int N>
__device__ __forceinline__ void few_tiles(float (&s)[N / 2], uint32_t keys, uint32_t queries, int t,
                                          int n, bool first)
{
    uint64_t k = matrix_descriptor(keys, 16, 1024, LAYOUT_SWIZZLE_128);
    uint64_t q = matrix_descriptor(queries, 16, 1024, LAYOUT_SWIZZLE_128);

#pragma unroll
    for (int i = 0; i < 4 * n; i++)
        mma_keys(s, further(k, (uint32_t)(i / 4 * TILE + i % 4 * 32)),
                 further(q, (uint32_t)((t + i / 4) * N * 128 + i % 4 * 32)), !first || i);
}

/* Keys that are not there get -inf; valid: [64] of the block. */
template <int N> __device__ __forceinline__ void few_mask(float (&s)[N / 2], const uint8_t *valid)
{
    int row = threadIdx.x % 128 / 32 * 16 + (threadIdx.x & 31) / 4;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (!valid[row + 8 * r]) {
#pragma unroll
            for (int g = 0; g < N / 8; g++)
                s[4 * g + 2 * r] = s[4 * g + 2 * r + 1] = -CUDART_INF_F;
        }
    }
}

/* x[c] of the lanes that share columns (the eight rows' lanes), C = 2, 4 or 8, each down to one number, in the lane whose
 * column_of is c: halves are exchanged, so that it takes C shuffles and not 3 C. */
template <int C> __device__ __forceinline__ int column_of()
{
    int r = (threadIdx.x & 31) >> 2;
    return (r & 1) * (C / 2) + (r >> 1 & 1) * (C / 4) + (r >> 2) * (C / 8);
}
template <int C, class F> __device__ __forceinline__ float over_rows(float (&x)[C], F f)
{
#pragma unroll
    for (int step = 0; step < 3; step++) {
        const int half = C >> (step + 1);
        bool high = threadIdx.x & (4 << step);
        if (half == 0) {
            x[0] = f(x[0], __shfl_xor_sync(~0u, x[0], 4 << step));
            continue;
        }
#pragma unroll
        for (int i = 0; i < half; i++) {
            float other = __shfl_xor_sync(~0u, high ? x[i] : x[i + half], 4 << step);
            x[i] = f(high ? x[i + half] : x[i], other);
        }
    }
    return x[0];
}

/* Reference and sum of head h over the chunk, when the warps have said theirs. */
template <int N>
__device__ __forceinline__ float few_reference(const few_parts<N> &p, int h, float scale)
{
    const float4 *x = (const float4 *)(const void *)p.max[h];
    float4 a = x[0], b = x[1];
    float max =
        fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
    return ceilf(max * scale);
}
template <int N> __device__ __forceinline__ float few_sum(const few_parts<N> &p, int h)
{
    const float4 *x = (const float4 *)(const void *)p.sum[h];
    float4 a = x[0], b = x[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}

/* s -> P in shared memory, by the 256 threads of warpgroups 0 and 1: block wg's; references of the thread's N / 4 heads,
 * 8 (c / 2) + 2 q + c % 2. Who has met the others behind this and fenced may use P and the sums. */
template <int N>
__device__ __forceinline__ void few_probs(float (&s)[N / 2], few_parts<N> &p, uint32_t probs,
                                          int wg, float scale, float (&reference)[N / 4])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x % 128 / 32, q = lane & 3;
    auto larger = [](float a, float b) { return fmaxf(a, b); };
    auto plus = [](float a, float b) { return a + b; };

    constexpr int C = N / 4;
    int own = column_of<C>(), head = 8 * (own / 2) + 2 * q + own % 2;
    bool says = C == 8 || (C == 4 ? lane < 16 : lane < 8); /* one of the lanes that know */
    float x[C];

#pragma unroll
    for (int c = 0; c < C; c++)
        x[c] = fmaxf(s[4 * (c / 2) + c % 2], s[4 * (c / 2) + c % 2 + 2]);
    float max = over_rows<C>(x, larger);
    if (says) p.max[head][wg * 4 + warp] = max;
    named_barrier(1, 256);
#pragma unroll
    for (int c = 0; c < C; c++) {
        int i = 4 * (c / 2) + c % 2;
        reference[c] = few_reference<N>(p, 8 * (c / 2) + 2 * q + c % 2, scale);
        float base = reference[c] == -CUDART_INF_F ? 0.0f : -reference[c];
        s[i] = exp2_fast(__fmaf_rn(s[i], scale, base));
        s[i + 2] = exp2_fast(__fmaf_rn(s[i + 2], scale, base));
        x[c] = s[i] + s[i + 2];
    }
#pragma unroll
    for (int g = 0; g < N / 8; g++)
#pragma unroll
        for (int r = 0; r < 2;
             r++) { /* 8 keys x 8 heads are 128 bytes; N / 8 of those for each 8 keys */
            uint32_t to =
                probs + (uint32_t)(((wg * 8 + warp * 2 + r) * (N / 8) + g) * 128 + lane * 4);
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(to),
                         "r"(pack_bf16(s[4 * g + 2 * r], s[4 * g + 2 * r + 1]))
                         : "memory");
        }
    float sum = over_rows<C>(x, plus);
    if (says) p.sum[head][wg * 4 + warp] = sum;
}

/* Values [T tiles of latents from `first` on, N heads] of the chunk. */
template <int N, int T>
__device__ __forceinline__ void few_values(float (&o)[T][N / 2], const few_places &at, int first)
{
    uint64_t v =
        matrix_descriptor(at.keys + (uint32_t)(first * TILE), TILE, 1024, LAYOUT_SWIZZLE_128);
    uint64_t p = matrix_descriptor(at.probs, N * 16, 128, LAYOUT_PLAIN);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
        for (int t = 0; t < T; t++) /* neighbours need not wait for each other */
            mma_latents(
                o[t],
                further(v, (uint32_t)(k / 4) * at.block + (uint32_t)(t * TILE + k % 4 * 2048)),
                further(p, (uint32_t)(k * N * 32)), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
}

} // namespace mla
} // namespace tr

#endif
