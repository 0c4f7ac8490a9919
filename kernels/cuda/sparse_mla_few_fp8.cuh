/* Sparse MLA of up to 32 heads over fp8 records. All four warpgroups fetch: a whole chunk of records is on its way in registers
 * while they compute the one before, since its latency, and not the products, is what costs.
 *
 * A chunk: [A] keys in shared memory; the next chunk's loads; scores and P by warpgroups 0 and 1; [B] P and the factors are
 * there; values, two tiles a warpgroup; [C] the keys are free. A fence waits for the loads of the warp that fences, so one
 * warp, the keeper, fences for P, keeps the heads' running sums, and asks for its own records only then. */
#ifndef TR_CUDA_SPARSE_MLA_FEW_FP8_CUH
#define TR_CUDA_SPARSE_MLA_FEW_FP8_CUH

#include "kernels/cuda/sparse_mla_few_math.cuh"

namespace tr
{
namespace mla
{

enum { RECORD_THREADS = 512, RECORD_KEEPER = 8, RECORD_KEYS = 8 * TILE };

template <int N> constexpr int RECORD_SUMS = N == 32 ? 1 : 2; /* of a score */

template <int N> struct record_shared { /* behind keys, two rope tiles twice over, queries, P */
    few_parts<N> parts;
    float2 factors[N]; /* keep, take: of this chunk */
    float inverse[N];
    uint8_t valid[2 * KEYS];
    uint64_t said; /* its phase: parts are whole; for racecheck alone */
};
template <int N> constexpr int record_bytes()
{
    return 2 * RECORD_KEYS + 4 * TILE + 9 * N * 128 + N * 256 + (int)sizeof(record_shared<N>) +
           1024;
}

/* A thread's key of a chunk to come, for warpgroups 2 and 3 also the key 64 before it, and which chunk: row * 32 + pair (split)
 * or + whether it is the row's last; -1: none. */
struct ahead {
    int32_t key, other;
    int tag;
};
/* A quarter of a key. */
struct record {
    uint4 raw[8], scale; /* 16 bytes of each tile */
};

/* to: the key's place in the rope tile of its chunk. */
__device__ __forceinline__ void record_fetch(const job &j, int32_t key, uint32_t to, record &r)
{
    const uint8_t *p = record_fp8(j, key);

    r.scale = load16(p + SCALES_AT);
#pragma unroll
    for (int t = 0; t < 8; t++)
        r.raw[t] = load16(p + 16 * fetch_quarter() + 64 * t);
    p += ROPE_AT + 32 * fetch_quarter();
    async_copy16(to, p, key < 0 ? 0 : 16);
    async_copy16(to ^ 16, p + 16, key < 0 ? 0 : 16);
}

__device__ __forceinline__ void record_expand(const record &r, bool valid, uint32_t even)
{
    uint32_t f[4], odd = even ^ 16;
    const uint32_t scale[4] = {r.scale.x, r.scale.y, r.scale.z, r.scale.w};

#pragma unroll
    for (int i = 0; i < 4; i++)
        f[i] = factor_bf16(__uint_as_float(scale[i]), valid);
    expand16<0>(r.raw[0], f[0], even, odd);
    expand16<TILE>(r.raw[1], f[0], even, odd);
    expand16<2 * TILE>(r.raw[2], f[1], even, odd);
    expand16<3 * TILE>(r.raw[3], f[1], even, odd);
    expand16<4 * TILE>(r.raw[4], f[2], even, odd);
    expand16<5 * TILE>(r.raw[5], f[2], even, odd);
    expand16<6 * TILE>(r.raw[6], f[3], even, odd);
    expand16<7 * TILE>(r.raw[7], f[3], even, odd);
}

/* Rows without keys, which no chunk meets, by one warpgroup. */
__device__ __forceinline__ void record_zeros(const job &j, int n_live)
{
    int task = blockIdx.x;
    work w;

    while (next_work(j, n_live, task, w)) {
        if (w.first < w.last) continue;
        uint4 *out = (uint4 *)(void *)(j.out + (size_t)w.row * j.n_heads * D_LATENT * 2);
        for (int i = threadIdx.x % 128; i < j.n_heads * D_LATENT * 2 / 16; i += 128)
            out[i] = {0, 0, 0, 0};
        if (j.lse && (int)threadIdx.x % 128 < j.n_heads)
            j.lse[(size_t)w.row * j.n_heads + threadIdx.x % 128] = -CUDART_INF_F;
    }
}

template <bool SPLIT>
__device__ __forceinline__ void record_next(const job &j, pair_cursor &c, ahead &a)
{
    int key = (int)threadIdx.x / 4;

    a = {-1, -1, -1};
    if (!next_pair(j, c)) return;
    a.key = entry(j, c, key);
    if (key >= KEYS) a.other = entry(j, c, key - KEYS);
    a.tag = c.row * 32 + (SPLIT ? c.pair : c.pair + 1 == c.last);
}

/* The first chunk's. All that it hangs on is asked for at once. */
template <bool SPLIT>
__device__ __forceinline__ void record_first(const job &j, pair_cursor &c, ahead &a)
{
    int row = (int)blockIdx.x / j.n_slices, pair = (int)blockIdx.x % j.n_slices * j.pairs;
    int at = pair * 2 * KEYS + (int)threadIdx.x / 4, dense = 0, n_live;
    int lane = threadIdx.x & 31, most = (j.k + KEYS - 1) / KEYS;
    const int32_t *list = j.list + (size_t)row * j.k;
    int32_t key = -1, head = -1;

    if (at < j.k) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(key) : "l"(list + at));
    if (lane < most)
        asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(head) : "l"(list + lane * KEYS));
    if (j.dense) asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(dense) : "l"(j.dense + row));
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(n_live) : "l"(j.n));
    int n_pairs = (__popc(__ballot_sync(~0u, (uint32_t)head < j.n_latent)) + 1) / 2;
    c = {(int)blockIdx.x, n_live, -1, 0, 0};
    a = {key, -1, row * 32 + (SPLIT ? pair : pair + 1 == n_pairs)};
    if (most > 32 || row >= n_live || dense || pair >= n_pairs) { /* not so simple */
        record_next<SPLIT>(j, c, a);
        return;
    }
    c = {(int)(blockIdx.x + gridDim.x), n_live, pair, row,
         pair + j.pairs < n_pairs ? pair + j.pairs : n_pairs};
}

/* The heads of a chunk, by the keeper: a lane has one. */
template <int N, bool SPLIT>
__device__ __forceinline__ void record_heads(const job &j, record_shared<N> *sh, int tag,
                                             running &r)
{
    int lane = threadIdx.x & 31;

    if (lane >= N) return;
    float reference = few_reference<N>(sh->parts, lane, j.scale), sum = few_sum<N>(sh->parts, lane);
    if (SPLIT) {
        float *heads = chunk_heads<N>(chunk_at<N>(j, tag >> 5, tag & 31));
        heads[lane] = reference;
        heads[N + lane] = sum;
        return;
    }
    run_add(r, reference, sum);
    sh->factors[lane] = {r.keep, r.take};
    if (tag & 1) {
        sh->inverse[lane] = inverse(r.sum);
        store_lse(j, tag >> 5, lane, r);
        run_clear(r);
    }
}

/* Scores of a block, under way on return, in two sums where registers allow: tiles 0..3, and the rope's with 4..7. A small
 * instruction may wait for the one whose sum it goes on with. */
template <int N>
__device__ __forceinline__ void record_scores(float (&s)[RECORD_SUMS<N>][N / 2],
                                              const few_places &at, uint32_t rope, int wg)
{
    uint64_t k =
        matrix_descriptor(at.keys + (uint32_t)(wg * RECORD_KEYS), 16, 1024, LAYOUT_SWIZZLE_128);
    uint64_t q = matrix_descriptor(at.queries, 16, 1024, LAYOUT_SWIZZLE_128);
    uint64_t r = matrix_descriptor(rope, 16, 1024, LAYOUT_SWIZZLE_128);

    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++)
        mma_keys(s[RECORD_SUMS<N> - 1], further(r, (uint32_t)(i * 32)),
                 further(q, (uint32_t)(ROPE_TILE * N * 128 + i * 32)), i > 0);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int t = i / 2 / 4 + i % 2 * 4, step = i / 2 % 4 * 32;
        mma_keys(s[i % RECORD_SUMS<N>], further(k, (uint32_t)(t * TILE + step)),
                 further(q, (uint32_t)(t * N * 128 + step)), RECORD_SUMS<N> == 1 || i > 0);
    }
    wgmma_commit();
}

/* P of a block. */
template <int N>
__device__ __forceinline__ void record_probs(const job &j, record_shared<N> *sh,
                                             const few_places &at,
                                             float (&s)[RECORD_SUMS<N>][N / 2], int wg)
{
    float reference[N / 4];

    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < (RECORD_SUMS<N> - 1) * N / 2; i++)
        s[0][i] += s[RECORD_SUMS<N> - 1][i];
    few_mask<N>(s[0], sh->valid + wg * KEYS);
    few_probs<N>(s[0], sh->parts, at.probs, wg, j.scale, reference);
    if (WARP_ARRIVALS == 1)
        named_barrier_arrive(3, 256 + 32);
    else /* racecheck does not see that who syncs at a barrier comes behind those who arrive there */
        barrier_arrive(&sh->said);
}

/* Values of a chunk, of the warpgroup's two tiles: to the workspace, or into `total`, and if it is the last to `out`. */
template <int N, bool SPLIT>
__device__ __forceinline__ void record_values(const job &j, record_shared<N> *sh,
                                              const few_places &at, int wg, int tag,
                                              float (&total)[2][N / 2])
{
    constexpr int T = N == 32 ? 1 : 2; /* as registers allow */
    int tid = threadIdx.x, q = tid & 3;
    float o[T][N / 2];

#pragma unroll
    for (int i = 0; i < 2; i += T) {
        few_values<N, T>(o, at, 2 * wg + i);
#pragma unroll
        for (int x = 0; x < T * N / 8; x++) {
            int u = x / (N / 8), g = x % (N / 8);
            const float *v = &o[u][4 * g];
            if (SPLIT) {
                float4 *to = (float4 *)(void *)chunk_at<N>(j, tag >> 5, tag & 31);
                to[((i + u) * (N / 8) + g) * RECORD_THREADS + tid] = {v[0], v[1], v[2], v[3]};
                continue;
            }
            float4 f = *(const float4 *)(const void *)&sh->factors[8 * g + 2 * q];
#pragma unroll
            for (int y = 0; y < 4; y++)
                total[i + u][4 * g + y] =
                    fold(total[i + u][4 * g + y], v[y], y & 1 ? f.z : f.x, y & 1 ? f.w : f.y);
        }
    }
    if constexpr (!SPLIT) {
        if (!(tag & 1)) return;
#pragma unroll
        for (int x = 0; x < N / 4; x++) {
            int u = x / (N / 8), g = x % (N / 8), head = 8 * g + 2 * q;
            float *v = &total[u][4 * g];
            store_four<true>(j, tag >> 5, 2 * wg + u, tid % 128 / 32, head, v, sh->inverse[head],
                             sh->inverse[head + 1]);
            v[0] = v[1] = v[2] = v[3] = 0.0f;
        }
    }
}

template <int N, bool SPLIT>
__device__ __forceinline__ void record_work(const job &j, record_shared<N> *sh,
                                            const few_places &at, uint32_t ropes, int n_live,
                                            int wg)
{
    int key = (int)threadIdx.x / 4, row = key % KEYS;
    uint32_t place = (uint32_t)(row * 128 + (((2 * fetch_quarter()) ^ (row & 7)) << 4));
    uint32_t even = at.keys + (uint32_t)(key / KEYS * RECORD_KEYS) + place;
    uint32_t side = 0; /* of the two places for ropes */
    pair_cursor c;
    ahead now, soon, later;
    record r;
    float total[2][N / 2];
    running heads;
    bool keeper = __shfl_sync(~0u, threadIdx.x / 32, 0) == RECORD_KEEPER;
    auto queries = [&](int tag) {
        if (wg < 2)
            load_queries<true, N, N == 32 ? (SPLIT ? 3 : 1) : (N * 36 + 255) / 256>(
                j.q + (size_t)(tag >> 5) * j.n_heads * D_KEY * 2, j.n_heads, at.queries);
    };
    auto rope = [&] { /* made anew each time: registers are short */
                      return even + (uint32_t)(2 * RECORD_KEYS -
                                               fetch_thread() / 256 * (RECORD_KEYS - TILE));
    };
    auto come = [&](const ahead &a) { /* its records on their way to L2 */
                                      int q = fetch_quarter();
                                      int32_t mine = valid_row(j, q ? a.other : a.key);
                                      if (wg >= 2 && q < 2 && mine >= 0)
                                          prefetch_row<RECORD_FP8>(record_fp8(j, mine));
    };

#pragma unroll
    for (int i = 0; i < N; i++)
        total[i / (N / 2)][i % (N / 2)] = 0.0f;
    run_clear(heads);
    record_first<SPLIT>(j, c, now);
    now.key = valid_row(j, now.key);
    if (now.tag >= 0) record_fetch(j, now.key, rope(), r);
    if (!SPLIT && wg == 3) record_zeros(j, n_live);
    if (now.tag < 0) return;
    record_next<SPLIT>(j, c, soon);
    record_next<SPLIT>(j, c, later);
    queries(now.tag);
    come(soon);
#pragma unroll 1
    while (now.tag >= 0) {
        if (fetch_quarter() == 0) sh->valid[key] = now.key >= 0;
        record_expand(r, now.key >= 0, even);
        asm volatile("cp.async.wait_all;" ::: "memory");
        fence_async_shared();
        named_barrier(2, RECORD_THREADS); /* A */
        int tag = now.tag;
        now = soon;
        now.key = valid_row(j, now.key);
        soon = later;
        record_next<SPLIT>(j, c, later);
        if (wg < 2) {
            float s[RECORD_SUMS<N>][N / 2];
            record_scores<N>(s, at, ropes + side + (uint32_t)(wg * TILE), wg);
            if (now.tag >= 0) record_fetch(j, now.key, rope() + (side ^ 2 * TILE), r);
            record_probs<N>(j, sh, at, s, wg);
        } else if (!keeper) {
            if (now.tag >= 0) record_fetch(j, now.key, rope() + (side ^ 2 * TILE), r);
            come(soon);
        } else {
            come(soon);
            if (WARP_ARRIVALS == 1)
                named_barrier(3, 256 + 32);
            else
                barrier_wait(&sh->said, side > 0);
            fence_async_shared();
            record_heads<N, SPLIT>(j, sh, tag, heads);
        }
        side ^= 2 * TILE;
        __syncthreads(); /* B */
        if (keeper && now.tag >= 0) record_fetch(j, now.key, rope() + side, r);
        record_values<N, SPLIT>(j, sh, at, wg, tag, total);
        named_barrier(2, RECORD_THREADS); /* C */
        if (now.tag >= 0 && now.tag >> 5 != tag >> 5) queries(now.tag);
    }
}

/* SPLIT: registers for a block of `fold` are left, so that it can be there before this kernel ends. */
template <int N, bool SPLIT>
__global__ void __launch_bounds__(SPLIT ? 640 : RECORD_THREADS, 1)
    sparse_mla_records(const __grid_constant__ job j)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    uint32_t keys = smem_address(base), ropes = keys + 2 * RECORD_KEYS, queries = ropes + 4 * TILE;
    few_places at = {keys, RECORD_KEYS, queries, queries + 9 * N * 128};
    record_shared<N> *sh =
        (record_shared<N> *)(base + 2 * RECORD_KEYS + 4 * TILE + 9 * N * 128 + N * 256);
    int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0), n_live = *j.n;

    prefetch_first(j);
    if (SPLIT) dependent_launch();
    if (WARP_ARRIVALS > 1 && threadIdx.x == 0) {
        barrier_init(&sh->said, 256);
        barrier_init_fence();
    }
    record_work<N, SPLIT>(j, sh, at, ropes, n_live, wg);
}

} // namespace mla
} // namespace tr

#endif
