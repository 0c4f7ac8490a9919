/* Sparse MLA of up to 32 heads, turned round so that no heads are padded to 64: scores are keys x heads, values latents x
 * heads, with 8, 16 or 32 columns. Keys come in chunks of 128 (two blocks). Every chunk is a softmax of its own, and chunks
 * are added up in order, in fp32: by the threads that made them (walk, many rows), or from the workspace (split, few
 * rows, chunks side by side) by `fold`, the same arithmetic, so the bits are the same. */
#include "kernels/cuda/sparse_mla.h"
#include "kernels/cuda/sparse_mla_few.cuh"

namespace tr
{
namespace mla
{

template <int N>
struct few_shared { /* behind the tiles: two blocks of keys, queries [9][N][64], P [128 keys, N] */
    struct ring ring;
    float max[2][4][N], sum[2][4][N]; /* [warpgroup][warp][head] */
};
template <int N> constexpr int few_bytes()
{
    return 2 * BLOCK + 9 * N * 128 + N * 256 + (int)sizeof(few_shared<N>) + 1024;
}

/* What is kept of a chunk: values as the threads of two warpgroups hold them, then references and sums of the heads. */
template <int N> __host__ __device__ constexpr size_t chunk_bytes()
{
    return (size_t)N * (2048 + 8);
}
template <int N> __device__ __forceinline__ uint8_t *chunk_at(const job &j, int row, int chunk)
{
    return j.work + ((size_t)row * FEW_CHUNKS + chunk) * chunk_bytes<N>();
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
__device__ __forceinline__ float fold(float total, float chunk, const running &r)
{
    return __fmaf_rn(chunk, r.take, total * r.keep);
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

template <int N> struct few_places { /* shared addresses */
    uint32_t keys, queries, probs;
};

/* Scores [64 keys, N heads] of warpgroup wg's block; keys that are not there get -inf. */
template <int N>
__device__ __forceinline__ void few_scores(float (&s)[N / 2], ring *ring, const few_places<N> &at,
                                           int wg, uint32_t parity)
{
    uint32_t keys = at.keys + (uint32_t)(wg * BLOCK);
    int row = threadIdx.x % 128 / 32 * 16 + (threadIdx.x & 31) / 4;
    uint64_t k = matrix_descriptor(keys, 16, 1024, LAYOUT_SWIZZLE_128);
    uint64_t q = matrix_descriptor(at.queries, 16, 1024, LAYOUT_SWIZZLE_128);
    auto tiles = [&](int t, int n, bool first) {
#pragma unroll
        for (int i = 0; i < 4 * n; i++)
            mma_keys(s, further(k, (uint32_t)((t + i / 4) * TILE + i % 4 * 32)),
                     further(q, (uint32_t)((t + i / 4) * N * 128 + i % 4 * 32)), !first || i);
    };

    barrier_wait(&ring->full[wg][0], parity);
    wait_keys(&ring->rope_full[wg], parity); /* comes with the first half: a fence less */
    wgmma_fence();
    tiles(0, 4, true);
    tiles(ROPE_TILE, 1, false);
    wait_keys(&ring->full[wg][1], parity);
    tiles(4, 4, false);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (!ring->valid[parity][wg][row + 8 * r]) {
#pragma unroll
            for (int g = 0; g < N / 8; g++)
                s[4 * g + 2 * r] = s[4 * g + 2 * r + 1] = -CUDART_INF_F;
        }
    }
    warp_arrive(&ring->rope_free[wg]);
}

/* Over the lanes that share columns: all rows of a warp. */
template <class F> __device__ __forceinline__ float over_rows(float x, F f)
{
    x = f(x, __shfl_xor_sync(~0u, x, 4));
    x = f(x, __shfl_xor_sync(~0u, x, 8));
    return f(x, __shfl_xor_sync(~0u, x, 16));
}

/* s -> P in shared memory; reference and sum of each of the thread's N / 4 heads over the 128 keys of the chunk. */
template <int N>
__device__ __forceinline__ void few_softmax(float (&s)[N / 2], few_shared<N> *sh,
                                            const few_places<N> &at, int wg, float scale,
                                            float (&reference)[N / 4], float (&sum)[N / 4])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x % 128 / 32, q = lane & 3;
    auto larger = [](float a, float b) { return fmaxf(a, b); };
    auto plus = [](float a, float b) { return a + b; };

#pragma unroll
    for (int c = 0; c < N / 4; c++) { /* column 8 (c / 2) + 2 q + c % 2 */
        float x = over_rows(fmaxf(s[4 * (c / 2) + c % 2], s[4 * (c / 2) + c % 2 + 2]), larger);
        if (lane < 4) sh->max[wg][warp][8 * (c / 2) + 2 * q + c % 2] = x;
    }
    named_barrier(1, 256);
#pragma unroll
    for (int c = 0; c < N / 4; c++) {
        int i = 4 * (c / 2) + c % 2, h = 8 * (c / 2) + 2 * q + c % 2;
        float max = -CUDART_INF_F;
#pragma unroll
        for (int w = 0; w < 8; w++)
            max = fmaxf(max, sh->max[w / 4][w % 4][h]);
        reference[c] = ceilf(max * scale);
        float base = reference[c] == -CUDART_INF_F ? 0.0f : -reference[c];
        s[i] = exp2_fast(__fmaf_rn(s[i], scale, base));
        s[i + 2] = exp2_fast(__fmaf_rn(s[i + 2], scale, base));
        float x = over_rows(s[i] + s[i + 2], plus);
        if (lane < 4) sh->sum[wg][warp][h] = x;
    }
#pragma unroll
    for (int g = 0; g < N / 8; g++)
#pragma unroll
        for (int r = 0; r < 2;
             r++) { /* 8 keys x 8 heads are 128 bytes; N / 8 of those for each 8 keys */
            uint32_t to =
                at.probs + (uint32_t)(((wg * 8 + warp * 2 + r) * (N / 8) + g) * 128 + lane * 4);
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(to),
                         "r"(pack_bf16(s[4 * g + 2 * r], s[4 * g + 2 * r + 1]))
                         : "memory");
        }
    fence_async_shared();
    named_barrier(1, 256);
#pragma unroll
    for (int c = 0; c < N / 4; c++) {
        sum[c] = 0.0f;
#pragma unroll
        for (int w = 0; w < 8; w++)
            sum[c] += sh->sum[w / 4][w % 4][8 * (c / 2) + 2 * q + c % 2];
    }
}

/* Values [T tiles of latents from `first` on, N heads] of the chunk. */
template <int N, int T>
__device__ __forceinline__ void few_values(float (&o)[T][N / 2], const few_places<N> &at, int first)
{
    uint64_t v =
        matrix_descriptor(at.keys + (uint32_t)(first * TILE), TILE, 1024, LAYOUT_SWIZZLE_128);
    uint64_t p = matrix_descriptor(at.probs, N * 16, 128, LAYOUT_PLAIN);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
        for (int k = 0; k < 8; k++)
            mma_latents(o[t], further(v, (uint32_t)(k / 4 * BLOCK + t * TILE + k % 4 * 2048)),
                        further(p, (uint32_t)(k * N * 32)), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
}

/* T tiles of the thread's values, from its own i-th on, and (i = 0) the heads. */
template <int N, int T>
__device__ __forceinline__ void chunk_store(uint8_t *to, int i, const float (&o)[T][N / 2],
                                            const float (&reference)[N / 4],
                                            const float (&sum)[N / 4])
{
    int tid = threadIdx.x;
    float *heads = (float *)(void *)(to + N * 2048);

#pragma unroll
    for (int u = 0; u < T * N / 8; u++) {
        const float *v = &o[u / (N / 8)][u % (N / 8) * 4];
        ((float4 *)(void *)to)[(i * N / 8 + u) * 256 + tid] = {v[0], v[1], v[2], v[3]};
    }
    if (i == 0 && tid < 4) {
#pragma unroll
        for (int c = 0; c < N / 4; c++) {
            heads[8 * (c / 2) + 2 * tid + c % 2] = reference[c];
            heads[N + 8 * (c / 2) + 2 * tid + c % 2] = sum[c];
        }
    }
}

template <bool FP8, int N, bool SPLIT>
__device__ __forceinline__ void few_math(const job &j, few_shared<N> *sh, const few_places<N> &at,
                                         int n_live, int wg)
{
    int task = blockIdx.x, tid = threadIdx.x, q = tid & 3;
    uint32_t parity = 0;
    work w;

    while (next_work(j, n_live, task, w)) {
        constexpr int T = SPLIT ? (N == 32 ? 2 : 4) : N == 8 ? 4 : 32 / N; /* as registers allow */
        float total[4][N / 2], o[T][N / 2], s[N / 2], reference[N / 4], sum[N / 4];
        running r[N / 4];
        if (SPLIT && w.first >= w.last) continue;
        named_barrier(2, 256);
        load_queries<FP8, N, (N * 36 + 255) / 256>(j.q + (size_t)w.row * j.n_heads * D_KEY * 2,
                                                   j.n_heads, at.queries);
        fence_async_shared();
        named_barrier(2, 256);
#pragma unroll
        for (int c = 0; c < N / 4; c++)
            run_clear(r[c]);
#pragma unroll
        for (int i = 0; i < 2 * N; i++)
            total[i / (N / 2)][i % (N / 2)] = 0.0f;
        for (int pair = w.first; pair < w.last; pair++, parity ^= 1) {
            few_scores<N>(s, &sh->ring, at, wg, parity);
            few_softmax<N>(s, sh, at, wg, j.scale, reference, sum);
            if (!SPLIT) {
#pragma unroll
                for (int c = 0; c < N / 4; c++)
                    run_add(r[c], reference[c], sum[c]);
            }
#pragma unroll
            for (int i = 0; i < 4; i += T) {
                few_values<N, T>(o, at, 4 * wg + i);
                if (SPLIT) chunk_store<N, T>(chunk_at<N>(j, w.row, pair), i, o, reference, sum);
#pragma unroll
                for (int x = 0; x < (SPLIT ? 0 : T * N / 2); x++) {
                    int u = x / (N / 2), v = x % (N / 2);
                    total[i + u][v] = fold(total[i + u][v], o[u][v], r[v / 4 * 2 + v % 2]);
                }
            }
            warp_arrive(&sh->ring.free[0][wg]);
            warp_arrive(&sh->ring.free[1][wg]);
        }
#pragma unroll
        for (int g = 0; g < (SPLIT ? 0 : N / 8); g++) {
            int head = 8 * g + 2 * q;
            float f0 = inverse(r[2 * g].sum), f1 = inverse(r[2 * g + 1].sum);
#pragma unroll
            for (int t = 0; t < 4; t++)
                store_four<FP8>(j, w.row, 4 * wg + t, tid % 128 / 32, head, &total[t][4 * g], f0,
                                f1);
            if (tid < 4) {
                store_lse(j, w.row, head, r[2 * g]);
                store_lse(j, w.row, head + 1, r[2 * g + 1]);
            }
        }
    }
}

/* Warpgroups 0 and 1 compute, 2 and 3 fetch. */
template <bool FP8, int N, bool SPLIT>
__global__ void __launch_bounds__(512, 1) sparse_mla_few(const __grid_constant__ job j)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    uint32_t tiles = smem_address(base);
    few_places<N> at = {tiles, tiles + 2 * BLOCK, tiles + 2 * BLOCK + 9 * N * 128};
    few_shared<N> *sh = (few_shared<N> *)(base + 2 * BLOCK + 9 * N * 128 + N * 256);
    int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0), n_live = *j.n;

    prefetch_first(j);
    if (SPLIT) dependent_launch();
    if (threadIdx.x == 0) ring_init<FP8, 256>(&sh->ring);
    __syncthreads();
    if (wg >= 2) {
        registers_set<FETCH_REGISTERS<FP8, false>>();
        produce<FP8, false>(j, &sh->ring, tiles, n_live);
    } else {
        registers_set<MATH_REGISTERS<FP8, false>>();
        few_math<FP8, N, SPLIT>(j, sh, at, n_live, wg);
    }
}

/* Block (row, u): the u-th four values of every thread of the two warpgroups, over the row's chunks. */
template <bool FP8, int N>
__global__ void __launch_bounds__(256) sparse_mla_fold(const __grid_constant__ job j)
{
    int row = blockIdx.x / (N / 2), u = blockIdx.x % (N / 2), g = u % (N / 8);
    int tid = threadIdx.x, head = 8 * g + 2 * (tid & 3);
    float total[4] = {0, 0, 0, 0};
    float4 v[FEW_CHUNKS];
    float2 reference[FEW_CHUNKS], sum[FEW_CHUNKS];
    running r[2];

    int n_live = *j.n, dense = j.dense ? j.dense[row] : 0, n = (count_blocks(j, row) + 1) / 2;
    dependent_wait(); /* of every block: who comes behind waits for this kernel alone (launch.cuh) */
    if (row >= n_live || dense) return;
#pragma unroll
    for (int c = 0; c < FEW_CHUNKS; c++) {
        const uint8_t *from = chunk_at<N>(j, row, c);
        const float *heads = (const float *)(const void *)(from + N * 2048);
        if (c < n) {
            v[c] = ((const float4 *)(const void *)from)[u * 256 + tid];
            reference[c] = *(const float2 *)(const void *)(heads + head);
            sum[c] = *(const float2 *)(const void *)(heads + N + head);
        }
    }
    run_clear(r[0]);
    run_clear(r[1]);
#pragma unroll
    for (int c = 0; c < FEW_CHUNKS; c++) {
        if (c >= n) break;
        run_add(r[0], reference[c].x, sum[c].x);
        run_add(r[1], reference[c].y, sum[c].y);
        total[0] = fold(total[0], v[c].x, r[0]);
        total[1] = fold(total[1], v[c].y, r[1]);
        total[2] = fold(total[2], v[c].z, r[0]);
        total[3] = fold(total[3], v[c].w, r[1]);
    }
    store_four<FP8>(j, row, tid / 128 * 4 + u / (N / 8), tid % 128 / 32, head, total,
                    inverse(r[0].sum), inverse(r[1].sum));
    if (u < N / 8 && tid < 4) {
        store_lse(j, row, head, r[0]);
        store_lse(j, row, head + 1, r[1]);
    }
}

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

template <bool FP8, int N, bool SPLIT>
cudaError_t launch_few_main(const job &j, int n_sm, cudaStream_t stream)
{
    int64_t tasks = (int64_t)j.n_max * j.n_slices;
    cudaError_t e = cudaFuncSetAttribute(
        sparse_mla_few<FP8, N, SPLIT>, cudaFuncAttributeMaxDynamicSharedMemorySize, few_bytes<N>());
    if (e != cudaSuccess) return e;
    sparse_mla_few<FP8, N, SPLIT>
        <<<(unsigned)(tasks < n_sm ? tasks : n_sm), 512, few_bytes<N>(), stream>>>(j);
    return cudaGetLastError();
}

template <bool FP8, int N> cudaError_t launch_few_way(job j, int way, int n_sm, cudaStream_t stream)
{
    cudaLaunchAttribute early = {};
    cudaLaunchConfig_t config = {};
    int n_pairs = j.pairs;

    if (way != TR_MLA_SPLIT) return launch_few_main<FP8, N, false>(j, n_sm, stream);
    j.pairs = (n_pairs * j.n_max + n_sm - 1) / n_sm;
    j.pairs = j.pairs < n_pairs ? j.pairs : n_pairs;
    j.n_slices = (n_pairs + j.pairs - 1) / j.pairs;
    cudaError_t e = launch_few_main<FP8, N, true>(j, n_sm, stream);
    if (e != cudaSuccess) return e;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3((unsigned)(j.n_max * (N / 2)));
    config.blockDim = dim3(256);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, sparse_mla_fold<FP8, N>, j);
}

template <bool FP8>
cudaError_t launch_few_heads(const job &j, int way, int n_sm, cudaStream_t stream)
{
    if (j.n_heads <= 8) return launch_few_way<FP8, 8>(j, way, n_sm, stream);
    if (j.n_heads <= 16) return launch_few_way<FP8, 16>(j, way, n_sm, stream);
    return launch_few_way<FP8, 32>(j, way, n_sm, stream);
}

size_t few_workspace(int n_max, int n_heads)
{
    size_t chunk = n_heads <= 8    ? chunk_bytes<8>()
                   : n_heads <= 16 ? chunk_bytes<16>()
                                   : chunk_bytes<32>();
    return (size_t)n_max * FEW_CHUNKS * chunk;
}

cudaError_t launch_few(const job &j, bool fp8, int way, int n_sm, cudaStream_t stream)
{
    return fp8 ? launch_few_heads<true>(j, way, n_sm, stream)
               : launch_few_heads<false>(j, way, n_sm, stream);
}

} // namespace mla
} // namespace tr
