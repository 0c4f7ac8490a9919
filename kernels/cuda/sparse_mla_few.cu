/* Sparse MLA of up to 32 heads, turned round so that no heads are padded to 64: scores are keys x heads, values latents x
 * heads, with 8, 16 or 32 columns. Keys come in chunks of 128 (two blocks). Every chunk is a softmax of its own, and chunks
 * are added up in order, in fp32: by the threads that made them (walk, many rows), or from the workspace (split, few
 * rows, chunks side by side) by `fold`, the same arithmetic, so the bits are the same. fp8 records have a kernel of their own
 * (sparse_mla_few_fp8.cuh); bf16 rows are copied as they are, by two warpgroups for two others, here. */
#include "kernels/cuda/sparse_mla.h"
#include "kernels/cuda/sparse_mla_few_fp8.cuh"
#include "kernels/cuda/sparse_mla_few_math.cuh"

namespace tr
{
namespace mla
{

template <int N>
struct few_shared { /* behind the tiles: two blocks of keys, queries [9][N][64], P [128 keys, N] */
    struct ring ring;
    few_parts<N> parts;
};
template <int N> constexpr int few_bytes()
{
    return 2 * BLOCK + 9 * N * 128 + N * 256 + (int)sizeof(few_shared<N>) + 1024;
}

/* Scores [64 keys, N heads] of warpgroup wg's block. */
template <int N>
__device__ __forceinline__ void few_scores(float (&s)[N / 2], ring *ring, const few_places &at,
                                           int wg, uint32_t parity)
{
    uint32_t keys = at.keys + (uint32_t)(wg * BLOCK);

    barrier_wait(&ring->full[wg][0], parity);
    wait_keys(&ring->rope_full[wg], parity); /* comes with the first half: a fence less */
    wgmma_fence();
    few_tiles<N>(s, keys, at.queries, 0, 4, true);
    few_tiles<N>(s, keys + ROPE_TILE * TILE, at.queries, ROPE_TILE, 1, false);
    wait_keys(&ring->full[wg][1], parity);
    few_tiles<N>(s, keys + 4 * TILE, at.queries, 4, 4, false);
    wgmma_commit();
    wgmma_wait<0>();
    few_mask<N>(s, ring->valid[parity][wg]);
    warp_arrive(&ring->rope_free[wg]);
}

/* T tiles of the thread's values, from its own i-th on, and (i = 0) the heads. */
template <int N, int T>
__device__ __forceinline__ void chunk_store(uint8_t *to, int i, const float (&o)[T][N / 2],
                                            const float (&reference)[N / 4],
                                            const float (&sum)[N / 4])
{
    int tid = threadIdx.x;
    float *heads = chunk_heads<N>(to);

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

template <int N, bool SPLIT>
__device__ __forceinline__ void few_math(const job &j, few_shared<N> *sh, const few_places &at,
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
        load_queries<false, N, (N * 36 + 255) / 256>(j.q + (size_t)w.row * j.n_heads * D_KEY * 2,
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
            few_probs<N>(s, sh->parts, at.probs, wg, j.scale, reference);
            fence_async_shared();
            named_barrier(1, 256);
#pragma unroll
            for (int c = 0; c < N / 4; c++)
                sum[c] = few_sum<N>(sh->parts, 8 * (c / 2) + 2 * q + c % 2);
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
                    total[i + u][v] = fold(total[i + u][v], o[u][v], r[v / 4 * 2 + v % 2].keep,
                                           r[v / 4 * 2 + v % 2].take);
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
                store_four<false>(j, w.row, 4 * wg + t, tid % 128 / 32, head, &total[t][4 * g], f0,
                                  f1);
            if (tid < 4) {
                store_lse(j, w.row, head, r[2 * g]);
                store_lse(j, w.row, head + 1, r[2 * g + 1]);
            }
        }
    }
}

/* Warpgroups 0 and 1 compute, 2 and 3 fetch. */
template <int N, bool SPLIT>
__global__ void __launch_bounds__(512, 1) sparse_mla_few(const __grid_constant__ job j)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    uint32_t tiles = smem_address(base);
    few_places at = {tiles, BLOCK, tiles + 2 * BLOCK, tiles + 2 * BLOCK + 9 * N * 128};
    few_shared<N> *sh = (few_shared<N> *)(base + 2 * BLOCK + 9 * N * 128 + N * 256);
    int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0), n_live = *j.n;

    prefetch_first(j);
    if (SPLIT) dependent_launch();
    if (threadIdx.x == 0) ring_init<false, 256>(&sh->ring);
    __syncthreads();
    if (wg >= 2) {
        registers_set<FETCH_REGISTERS<false, false>>();
        produce<false, false>(j, &sh->ring, tiles, n_live);
    } else {
        registers_set<MATH_REGISTERS<false, false>>();
        few_math<N, SPLIT>(j, sh, at, n_live, wg);
    }
}

enum { FOLD_THREADS = 128 };

/* Of all chunks: factors of their values, 1 / sum of each head. By N threads. */
template <int N> struct fold_shared {
    alignas(16) float2 factors[FEW_CHUNKS][N];
    float inverse[N];
};
template <int N>
__device__ __forceinline__ void fold_heads(const job &j, fold_shared<N> *sh, int row, int n,
                                           bool store)
{
    int head = threadIdx.x & 31;
    float reference[FEW_CHUNKS], sum[FEW_CHUNKS];
    running r;

    /* A chunk that is not there changes nothing: -inf, a sum of 0, and zeros. */
#pragma unroll
    for (int c = 0; c < FEW_CHUNKS; c++) {
        const float *heads = chunk_heads<N>(chunk_at<N>(j, row, c));
        reference[c] = c < n ? heads[head] : -CUDART_INF_F;
        sum[c] = c < n ? heads[N + head] : 0.0f;
    }
    run_clear(r);
#pragma unroll
    for (int c = 0; c < FEW_CHUNKS; c++) {
        run_add(r, reference[c], sum[c]);
        sh->factors[c][head] = {r.keep, r.take};
    }
    sh->inverse[head] = inverse(r.sum);
    if (store) store_lse(j, row, head, r);
}

/* Block (row, u): 128 threads' fours of the values, over the row's chunks. WARPGROUPS: of the kernel that made them. */
template <bool FP8, int N>
__global__ void __launch_bounds__(FOLD_THREADS, 4) sparse_mla_fold(const __grid_constant__ job j)
{
    constexpr int WARPGROUPS = FP8 ? 4 : 2;
    __shared__ fold_shared<N> sh;
    int row = blockIdx.x / N, part = blockIdx.x % N, tid = threadIdx.x;
    int wg = part % WARPGROUPS, u = part / WARPGROUPS; /* u: which four of its threads */
    int tile = wg * (8 / WARPGROUPS) + u / (N / 8), head = u % (N / 8) * 8 + 2 * (tid & 3);
    float total[4] = {0, 0, 0, 0};
    float4 v[FEW_CHUNKS];

    int n_live = *j.n, dense = j.dense ? j.dense[row] : 0, n = (count_blocks(j, row) + 1) / 2;
    dependent_wait(); /* of every block: who comes behind waits for this kernel alone (launch.cuh) */
    if (row >= n_live || dense) return;
#pragma unroll
    for (int c = 0; c < FEW_CHUNKS; c++)
        v[c] =
            c < n
                ? ((const float4 *)(const void *)chunk_at<N>(j, row, c))[part * FOLD_THREADS + tid]
                : float4{0, 0, 0, 0};
    if (tid < N) fold_heads<N>(j, &sh, row, n, part == 0);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < FEW_CHUNKS; c++) {
        float4 f = *(const float4 *)(const void *)&sh.factors[c][head];
        total[0] = fold(total[0], v[c].x, f.x, f.y);
        total[1] = fold(total[1], v[c].y, f.z, f.w);
        total[2] = fold(total[2], v[c].z, f.x, f.y);
        total[3] = fold(total[3], v[c].w, f.z, f.w);
    }
    store_four<FP8>(j, row, tile, tid / 32, head, total, sh.inverse[head], sh.inverse[head + 1]);
}

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

template <bool FP8, int N, bool SPLIT>
cudaError_t launch_few_main(const job &j, int n_sm, cudaStream_t stream)
{
    void (*kernel)(job) = FP8 ? sparse_mla_records<N, SPLIT> : sparse_mla_few<N, SPLIT>;
    const int bytes = FP8 ? record_bytes<N>() : few_bytes<N>();
    int64_t tasks = (int64_t)j.n_max * j.n_slices;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return e;
    kernel<<<(unsigned)(tasks < n_sm ? tasks : n_sm), (int)RECORD_THREADS, bytes, stream>>>(j);
    return cudaGetLastError();
}

template <bool FP8, int N> cudaError_t launch_few_way(job j, int way, int n_sm, cudaStream_t stream)
{
    cudaLaunchAttribute early = {};
    cudaLaunchConfig_t config = {};

    if (way != TR_MLA_SPLIT) return launch_few_main<FP8, N, false>(j, n_sm, stream);
    slices_cut(j, j.n_max, n_sm);
    cudaError_t e = launch_few_main<FP8, N, true>(j, n_sm, stream);
    if (e != cudaSuccess) return e;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3((unsigned)(j.n_max * N));
    config.blockDim = dim3(FOLD_THREADS);
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
