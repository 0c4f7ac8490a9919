/* Sparse MLA of 64 and more heads. Two ways to the same bits:
 *
 * walk (many rows): a block of threads takes 64 heads of a row through all of the row's keys. Two warpgroups each own half of
 * the 512 output columns, in registers; warpgroup w makes the probabilities of the blocks w, w + 2, ... and hands them
 * to the other; both take the blocks' values in order.
 *
 * split (few rows): the probabilities of all blocks are made side by side (a block's depend on nothing else), then groups of
 * columns walk over all keys side by side, in the same order. No sum is ever cut, so nothing needs combining. */
#include <initializer_list>

#include "kernels/cuda/sparse_mla.h"
#include "kernels/cuda/sparse_mla_expand.cuh"
#include "kernels/cuda/sparse_mla_few.cuh"
#include "kernels/cuda/sparse_mla_scores.cuh"
#include "kernels/cuda/sparse_mla_walk.cuh"

namespace tr
{
namespace mla
{

__device__ __forceinline__ void probs_load(const uint8_t *from, probs &b, int t)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint4 v = ((const uint4 *)from)[i * 128 + t];
        b.p[4 * i] = v.x, b.p[4 * i + 1] = v.y, b.p[4 * i + 2] = v.z, b.p[4 * i + 3] = v.w;
    }
    float4 v = ((const float4 *)from)[4 * 128 + t];
    b.reference[0] = v.x, b.reference[1] = v.y, b.sum[0] = v.z, b.sum[1] = v.w;
}

/* Warpgroup wg of 0 and 1. */
template <bool FP8>
__device__ __forceinline__ void math(const job &j, walk_shared *sh, uint32_t tiles, int n_live,
                                     int wg)
{
    int t = threadIdx.x % 128, task = blockIdx.x;
    uint32_t parity = 0;
    ring *ring = &sh->ring;
    volatile int *kept = sh->kept[threadIdx.x / 32];
    work w;

    for (int slot = 0; next_work(j, n_live, task, w); slot ^= 1) {
        float o[2][64];
        state<1> s;
        kept_store(kept, task, slot, w);
        if (w.first < w.last) {
            named_barrier(2, 256); /* both warpgroups are done with the queries before */
            load_queries<FP8, HEADS, 5>(
                j.q + ((size_t)w.row * j.n_heads + (size_t)w.group * HEADS) * D_KEY * 2, HEADS,
                tiles);
            fence_async_shared();
            named_barrier(2, 256);
        }
        state_clear(s);
#pragma unroll
        for (int i = 0; i < 128; i++)
            o[i / 64][i % 64] = 0.0f;
        for (int pair = w.first; pair < w.last; pair++, parity ^= 1) {
            float x[32];
            probs p;
            block_scores(x, ring, tiles, tiles + (uint32_t)((1 + wg) * BLOCK), wg, parity);
            softmax(x, ring->valid[parity][wg], j.scale, p);
            take_pair(sh, tiles, wg, parity, p, o, s, t);
        }
        kept_load(kept, task, slot, w);
        finish<FP8>(j, w, sh, slot, wg, t, o, s);
    }
}

/* Warpgroups 0 and 1 compute, the rest fetch. One block a SM, as many as there are SMs. */
template <bool FP8>
__global__ void __launch_bounds__(256 + FETCHERS<FP8, true>, 1)
    sparse_mla_walk(const __grid_constant__ job j)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    walk_shared *sh = (walk_shared *)(base + 3 * BLOCK);
    uint32_t tiles = smem_address(base);
    int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0), n_live = *j.n;

    prefetch_first(j);
    if (threadIdx.x == 0) {
        barrier_init(&sh->summed, 256);
        ring_init<FP8, FETCHERS<FP8, true>>(&sh->ring);
    }
    __syncthreads();
    if (wg >= 2) {
        registers_set<FETCH_REGISTERS<FP8, true>>();
        produce<FP8, true>(j, &sh->ring, tiles + BLOCK, n_live);
    } else {
        registers_set<MATH_REGISTERS<FP8, true>>();
        math<FP8>(j, sh, tiles, n_live, wg);
    }
}

/* ---- split: columns ---------------------------------------------------------------------------------------------------- */

enum {
    COLUMN_STAGES = 8,
    LIST_MAX = 2048,
    COLUMN_THREADS = 512,
    COLUMN_MATH_REGISTERS = 200,
    COLUMN_FETCH_REGISTERS = 104,
    COLUMN_PROBS_REGISTERS = 40,
};
/* Blocks whose keys a fetching thread has on their way. */
template <int T> constexpr int COLUMN_AHEAD = T == 1 ? 8 : 4;

struct column_shared { /* behind the stages: T tiles of keys and a block's probabilities each */
    uint64_t full[COLUMN_STAGES], free[COLUMN_STAGES];
    int32_t list[LIST_MAX];
};
template <int T> __host__ __device__ constexpr int stage_bytes()
{
    return T * TILE + PROBS_BYTES;
}

/* 256 threads bring [64 keys, 64 T latents] of one block after another. */
template <bool FP8, int T>
__device__ __forceinline__ void column_fetch(const job &j, column_shared *sh, uint32_t stages,
                                             int tile, int n_blocks, int tid)
{
    enum { UNITS = FP8 ? T : 2 * T }; /* 16-byte loads of a thread and block */
    enum { AHEAD = COLUMN_AHEAD<T> };
    int row = FP8 ? tid / 4 : tid / 8, c = FP8 ? tid & 3 : tid & 7;
    uint4 raw[AHEAD][UNITS];
    float scale[AHEAD];
    ring_position<COLUMN_STAGES> at;

    auto key = [&](int i, int u) { return sh->list[i * KEYS + row + (FP8 ? 0 : 32 * (u & 1))]; };
    auto load = [&](int slot, int i) {
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            int32_t x = key(i, u);
            const uint8_t *p =
                j.latent + (size_t)(x < 0 ? 0 : x) * (FP8 ? RECORD_FP8 : RECORD_BF16);
            raw[slot][u] = load16(p + (FP8 ? 64 * (tile + u) : 128 * (tile + u / 2)) + 16 * c);
            if (FP8 && u == 0)
                scale[slot] = __ldg((const float *)(const void *)(p + SCALES_AT + tile / 2 * 4));
        }
    };
    auto store = [&](int slot, int i) {
        uint32_t to = stages + (uint32_t)(at.stage * stage_bytes<T>() + row * 128);
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            int32_t x = key(i, u);
            if (FP8) {
                uint32_t even = to + (uint32_t)(u * TILE) + ((uint32_t)((2 * c) ^ (row & 7)) << 4);
                expand16<0>(raw[slot][u], factor_bf16(scale[slot], x >= 0), even, even ^ 16);
            } else {
                uint4 v = x >= 0 ? raw[slot][u] : uint4{0, 0, 0, 0};
                store16(to + (uint32_t)(u / 2 * TILE + (u & 1) * 4096) +
                            ((uint32_t)(c ^ (row & 7)) << 4),
                        v.x, v.y, v.z, v.w);
            }
        }
    };

#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i < n_blocks) load(i, i);
    for (int i0 = 0; i0 < n_blocks; i0 += AHEAD) {
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            if (i0 + s >= n_blocks) break;
            barrier_wait(&sh->free[at.stage], at.parity ^ 1);
            store(s, i0 + s);
            barrier_arrive(&sh->full[at.stage]);
            at.next();
            if (i0 + s + AHEAD < n_blocks) load(s, i0 + s + AHEAD);
        }
    }
}

/* One thread brings the probabilities, which the kernel before makes. */
template <int T>
__device__ __forceinline__ void column_probs(const job &j, column_shared *sh, uint8_t *stages,
                                             int row, int group, int tile, int n_blocks)
{
    ring_position<COLUMN_STAGES> at;

    dependent_wait();
    if (T == 1) dependent_launch(); /* few rows: there are SMs free for who comes behind */
    for (int i = 0; i < n_blocks; i++, at.next()) {
        barrier_wait(&sh->free[at.stage], at.parity ^ 1);
        barrier_expect(&sh->full[at.stage], PROBS_BYTES);
        bulk_load(stages + at.stage * stage_bytes<T>() + T * TILE, probs_at(j, row, group, i),
                  PROBS_BYTES, &sh->full[at.stage]);
    }
}

/* Change the state to a reference that suits it and two blocks, an even and an odd one, as two calls of take_reference would. */
__device__ __forceinline__ void take_two(state<2> &s, probs &a, probs &b, float (&keep)[2])
{
    uint32_t of_a[2], of_b[2];

#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = fmaxf(s.reference[r], fmaxf(a.reference[r], b.reference[r]));
        float fa = exp2_whole(a.reference[r] - top), fb = exp2_whole(b.reference[r] - top);
        keep[r] = exp2_whole(s.reference[r] - top);
        of_a[r] = twice_bf16(fa);
        of_b[r] = twice_bf16(fb);
        s.reference[r] = top;
        s.sum[0][r] = __fmaf_rn(a.sum[r], fa, s.sum[0][r] * keep[r]);
        s.sum[1][r] = __fmaf_rn(b.sum[r], fb, s.sum[1][r] * keep[r]);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        a.p[i] = multiply2(a.p[i], of_a[i & 1]);
        b.p[i] = multiply2(b.p[i], of_b[i & 1]);
    }
}

/* 128 threads: columns [64 tile, 64 (tile + T)) of 64 heads, all keys in order, two blocks at a time: the waits are what costs.
 * The next two's probabilities are made ready while the tensor cores work on these. */
template <bool FP8, int T>
__device__ __forceinline__ void column_math(const job &j, column_shared *sh, uint8_t *stages,
                                            int row, int group, int tile, int n_blocks)
{
    int t = threadIdx.x;
    float o[1][32 * T], keep[2][2];
    state<2> s;
    probs p[2][2];
    ring_position<COLUMN_STAGES> at, ahead; /* of even stages */

    auto ready = [&](int e, int i) {
        barrier_wait(&sh->full[ahead.stage], ahead.parity);
        if (i + 1 < n_blocks) barrier_wait(&sh->full[ahead.stage + 1], ahead.parity);
        fence_async_shared();
        probs_load(stages + ahead.stage * stage_bytes<T>() + T * TILE, p[e][0], t);
        if (i + 1 < n_blocks) {
            probs_load(stages + (ahead.stage + 1) * stage_bytes<T>() + T * TILE, p[e][1], t);
        } else { /* no second one */
#pragma unroll
            for (int x = 0; x < 16; x++)
                p[e][1].p[x] = 0;
            p[e][1].reference[0] = p[e][1].reference[1] = -CUDART_INF_F;
            p[e][1].sum[0] = p[e][1].sum[1] = 0.0f;
        }
        take_two(s, p[e][0], p[e][1], keep[e]);
        ahead.next();
        ahead.next();
    };

    state_clear(s);
#pragma unroll
    for (int i = 0; i < 32 * T; i++)
        o[0][i] = 0.0f;
    if (n_blocks) ready(0, 0);
#pragma unroll 1
    for (int i0 = 0; i0 < n_blocks; i0 += 4) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int i = i0 + 2 * e;
            if (i >= n_blocks) break;
            uint32_t v = smem_address(stages) + (uint32_t)(at.stage * stage_bytes<T>());
            take_values(o, keep[e], p[e][0].p, v);
            add_values(o, p[e][1].p, i + 1 < n_blocks ? v + (uint32_t)stage_bytes<T>() : v);
            if (i + 2 < n_blocks) ready(e ^ 1, i + 2);
            wgmma_wait<0>();
            warp_arrive(&sh->free[at.stage]);
            if (i + 1 < n_blocks) warp_arrive(&sh->free[at.stage + 1]);
            at.next();
            at.next();
        }
    }

    int head = t / 32 * 16 + (t & 31) / 4;
    size_t to = (size_t)row * j.n_heads + (size_t)group * HEADS + head;
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
        total[r] = sum_of_four(s.sum[0][r]) + sum_of_four(s.sum[1][r]);
    store_values<FP8>(j.out + (to * D_LATENT + (size_t)tile * 64) * 2, o, inverse(total[0]),
                      inverse(total[1]));
    if (j.lse && tile == 0 && (t & 3) == 0) {
        j.lse[to] = (s.reference[0] + log2f(total[0])) * CUDART_LN2_F;
        j.lse[to + 8] = (s.reference[1] + log2f(total[1])) * CUDART_LN2_F;
    }
}

/* Block (row, group of heads, T tiles of columns): all keys of the row. Of four warpgroups one computes, two fetch keys, one
 * thread of the last fetches probabilities. */
template <bool FP8, int T>
__global__ void __launch_bounds__(COLUMN_THREADS, 1)
    sparse_mla_columns(const __grid_constant__ job j)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    column_shared *sh = (column_shared *)(base + COLUMN_STAGES * stage_bytes<T>());
    int n_columns = 8 / T, x = blockIdx.x, tile = x % n_columns * T,
        group = x / n_columns % j.n_groups;
    int row = x / n_columns / j.n_groups, n = *j.n, dense = j.dense ? j.dense[row] : 0;

    for (int i = threadIdx.x; i < j.k; i += COLUMN_THREADS) {
        int32_t v = __ldg(j.list + (size_t)row * j.k + i);
        sh->list[i] = (uint32_t)v < j.n_latent ? v : -1;
    }
    for (int i = j.k + (int)threadIdx.x; i < (j.k + KEYS - 1) / KEYS * KEYS; i += COLUMN_THREADS)
        sh->list[i] = -1;
    int n_blocks = __shfl_sync(~0u, count_blocks(j, row), 0);
    if (row >= n || dense) {
        dependent_wait(); /* of every block: who comes behind waits for this kernel alone (launch.cuh) */
        return;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < COLUMN_STAGES; i++) {
            barrier_init(&sh->full[i], 256 + 1);
            barrier_init(&sh->free[i], 4 * WARP_ARRIVALS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0);
    if (wg == 0) {
        registers_set<COLUMN_MATH_REGISTERS>();
        column_math<FP8, T>(j, sh, base, row, group, tile, n_blocks);
    } else if (wg < 3) {
        registers_set<COLUMN_FETCH_REGISTERS>();
        column_fetch<FP8, T>(j, sh, smem_address(base), tile, n_blocks, (int)threadIdx.x - 128);
    } else {
        registers_set<COLUMN_PROBS_REGISTERS>();
        if (threadIdx.x == 384) column_probs<T>(j, sh, base, row, group, tile, n_blocks);
    }
}

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

/* Up to this many (row, heads that share the keys fetched) the split way is the faster one. bench_sparse_mla on an H200, fp8,
 * split and walking: 128 heads, 16 rows 44 and 94 us, 32 rows 80 and 97, 64 rows 150 and 104; 64 heads, 16 rows 35 and
 * 96 us, 48 rows 104 and 97. */
enum { SPLIT_MAX = 32 };

/* Of 64 heads; an even number of them goes two by two (sparse_mla_scores.cuh). */
static int groups_apart(int n_heads)
{
    const int groups = n_heads / HEADS;
    return groups % 2 ? groups : groups / 2;
}

template <bool FP8> cudaError_t launch_walk(const job &j, int n_sm, cudaStream_t stream)
{
    int64_t tasks = (int64_t)j.n_max * j.n_groups * j.n_slices;
    cudaError_t e = cudaFuncSetAttribute(sparse_mla_walk<FP8>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, WALK_BYTES);
    if (e != cudaSuccess) return e;
    sparse_mla_walk<FP8><<<(unsigned)(tasks < n_sm ? tasks : n_sm), 256 + FETCHERS<FP8, true>,
                           WALK_BYTES, stream>>>(j);
    return cudaGetLastError();
}

template <bool FP8, int T> cudaError_t launch_columns(const job &j, cudaStream_t stream)
{
    int bytes = COLUMN_STAGES * stage_bytes<T>() + (int)sizeof(column_shared) + 1024;
    cudaLaunchAttribute early = {};
    cudaLaunchConfig_t config = {};
    cudaError_t e = cudaFuncSetAttribute(sparse_mla_columns<FP8, T>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);

    if (e != cudaSuccess) return e;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3((unsigned)(j.n_max * j.n_groups * (8 / T)));
    config.blockDim = dim3(COLUMN_THREADS);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, sparse_mla_columns<FP8, T>, j);
}

template <bool FP8> cudaError_t launch_split(job j, int n_sm, cudaStream_t stream)
{
    int n_pairs = (j.k + 2 * KEYS - 1) / (2 * KEYS), tasks = j.n_max * j.n_groups;
    /* two groups of heads share what is fetched, unless there is a block of threads for every pair of each */
    bool two = j.n_groups % 2 == 0 && n_pairs * tasks > n_sm;

    slices_cut(j, two ? tasks / 2 : tasks, n_sm);
    cudaError_t e =
        two ? launch_scores<FP8, 2>(j, n_sm, stream) : launch_scores<FP8, 1>(j, n_sm, stream);
    if (e != cudaSuccess) return e;
    return tasks * 8 <= n_sm ? launch_columns<FP8, 1>(j, stream)
                             : launch_columns<FP8, 2>(j, stream);
}

template <bool FP8> cudaError_t launch(const job &j, int way, int n_sm, cudaStream_t stream)
{
    if (j.n_heads <= 32) return launch_few(j, FP8, way, n_sm, stream);
    if (way == TR_MLA_SPLIT) return launch_split<FP8>(j, n_sm, stream);
    if constexpr (FP8)
        return launch_walk<true>(j, n_sm, stream);
    else
        return launch_rows(j, n_sm, stream);
}

/* Prompts of many rows: e's keys are expanded first; other rows of the step walk over records. */
static cudaError_t launch_prompts(job j, const expansion &e, const struct tr_sparse_mla_args *a,
                                  int n_sm, cudaStream_t stream)
{
    cudaError_t status = expansion_make(e, *a->rows, a->kv, n_sm, stream);
    if (status == cudaSuccess) status = launch_expanded(j, e, a->position, n_sm, stream);
    if (status != cudaSuccess) return status;
    j.n = e.n + 1;
    j.order = e.others;
    return launch_walk<true>(j, n_sm, stream);
}

} // namespace mla
} // namespace tr

using namespace tr::mla;

/* Whether the launch expands, and where. */
static bool expands(const struct tr_sparse_mla_args *a, int way, expansion *e)
{
    if (way != TR_MLA_EXPAND && (way != TR_MLA_AUTO || a->rows->n_max < EXPAND_STEP_ROWS))
        return false;
    return a->kv.dtype == TR_E4M3 && a->n_heads >= HEADS && a->position && a->rows->slot &&
           a->rows->position && a->rows->write && a->rows->page_table &&
           expansion_place(e, a->workspace, a->workspace_bytes, a->rows->n_max);
}

static int way_of(int n_max, int n_heads, int k, int way)
{
    if (k > LIST_MAX || way == TR_MLA_EXPAND) return TR_MLA_WALK;
    if (way != TR_MLA_AUTO) return way;
    if (n_heads <= 32) return n_max <= FEW_SPLIT_MAX ? TR_MLA_SPLIT : TR_MLA_WALK;
    return n_max * groups_apart(n_heads) <= SPLIT_MAX ? TR_MLA_SPLIT : TR_MLA_WALK;
}

size_t tr_cuda_sparse_mla_workspace_way(int n_max, int n_heads, int way)
{
    if (way == TR_MLA_EXPAND) return expansion_bytes(n_max);
    if (way_of(n_max, n_heads, 0, way) == TR_MLA_WALK) return 256;
    if (n_heads <= 32) return few_workspace(n_max, n_heads);
    return (size_t)n_max * (size_t)(n_heads / HEADS) * (LIST_MAX / KEYS) * PROBS_BYTES;
}

size_t tr_cuda_sparse_mla_workspace(int n_max, int n_heads, int d_latent)
{
    const int groups = groups_apart(n_heads);
    const int rows = n_heads <= 32 ? FEW_SPLIT_MAX : groups > 0 ? SPLIT_MAX / groups : 0;

    (void)d_latent;
    if (n_max < 1 || n_heads < 1 || rows < 1) return 256; /* never split; other forms need none */
    const size_t split = tr_cuda_sparse_mla_workspace_way(n_max < rows ? n_max : rows, n_heads,
                                                          TR_MLA_SPLIT),
                 expand = groups > 0 && n_max >= EXPAND_STEP_ROWS ? expansion_bytes(n_max) : 0;
    return split > expand ? split : expand;
}

cudaError_t tr_cuda_sparse_mla_way(const struct tr_sparse_mla_args *a, int way, cudaStream_t stream)
{
    job j = {};
    expansion made;
    int device = 0, n_sm = 0;
    cudaError_t e;

    if (a->latents.n || a->kv.d_latent != D_LATENT || a->kv.d_rope != D_KEY - D_LATENT ||
        (a->kv.dtype != TR_E4M3 && a->kv.dtype != TR_BF16) || a->n_heads < 1 ||
        (a->n_heads > 32 && a->n_heads % HEADS))
        return cudaErrorNotSupported;
    if (a->k < 1 || a->rows->n_max < 0 || a->kv.n_pages < 1) return cudaErrorInvalidValue;
    if (a->rows->n_max == 0) return cudaSuccess;
    const bool expand = expands(a, way, &made);
    way = way_of(a->rows->n_max, a->n_heads, a->k, way);
    if (a->workspace_bytes < tr_cuda_sparse_mla_workspace_way(a->rows->n_max, a->n_heads, way))
        return cudaErrorInvalidValue;

    j.n = a->rows->n;
    j.n_max = a->rows->n_max;
    j.dense = a->rows->dense;
    j.q = (const uint8_t *)(const void *)a->q;
    j.list = a->cache_row;
    j.k = a->k;
    j.latent = (const uint8_t *)a->kv.latent;
    j.n_latent = (uint32_t)a->kv.n_pages * TR_PAGE_TOKENS;
    j.out = (uint8_t *)(void *)a->out;
    j.lse = a->lse;
    j.scale = a->scale * 1.44269504f;
    j.n_heads = a->n_heads;
    j.n_groups = (a->n_heads + HEADS - 1) / HEADS;
    j.n_slices = 1;
    j.pairs = (a->k + 2 * KEYS - 1) / (2 * KEYS);
    j.work = (uint8_t *)a->workspace;
    e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return e;
    if (expand) return launch_prompts(j, made, a, n_sm, stream);
    return a->kv.dtype == TR_E4M3 ? launch<true>(j, way, n_sm, stream)
                                  : launch<false>(j, way, n_sm, stream);
}

cudaError_t tr_cuda_sparse_mla(const struct tr_sparse_mla_args *a, cudaStream_t stream)
{
    return tr_cuda_sparse_mla_way(a, TR_MLA_AUTO, stream);
}
