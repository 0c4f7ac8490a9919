/* The first kernel of split sparse MLA: the probabilities of all blocks of 64 keys, side by side, into device memory.
 *
 * Fetching and expanding keys takes longer than the products. So a block of threads makes the probabilities of G groups of
 * 64 heads from what it has fetched: with G = 2 both warpgroups take every block of keys, each for its own heads; with
 * G = 1 (a single group, or few rows) each takes one of a pair's two blocks. Queries stay in registers, but for what does
 * not fit: the tensor cores then read half as much from shared memory, and there is room for records. */
#ifndef TR_CUDA_SPARSE_MLA_SCORES_CUH
#define TR_CUDA_SPARSE_MLA_SCORES_CUH

#include "kernels/cuda/sparse_mla_tile.cuh"

namespace tr
{
namespace mla
{

/* Probabilities of a block in device memory, as the threads of a warpgroup hold them: 10 KB. */
enum { PROBS_BYTES = 128 * 80 };

__device__ __forceinline__ uint8_t *probs_at(const job &j, int row, int group, int block)
{
    int n_blocks = (j.k + 2 * KEYS - 1) / (2 * KEYS) * 2;
    return j.work + (((size_t)row * (j.n_heads / HEADS) + group) * n_blocks + block) * PROBS_BYTES;
}

__device__ __forceinline__ void probs_store(uint8_t *to, const probs &b, int t)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        ((uint4 *)to)[i * 128 + t] = {b.p[4 * i], b.p[4 * i + 1], b.p[4 * i + 2], b.p[4 * i + 3]};
    ((float4 *)to)[4 * 128 + t] = {b.reference[0], b.reference[1], b.sum[0], b.sum[1]};
}

/* Tiles of queries in registers; the others, rope's the last, each warpgroup keeps in shared memory behind the keys. */
enum {
    HELD_TILES = 7,
    LEFT_TILES = 9 - HELD_TILES,
    SCORES_MATH_REGISTERS = 176,
    SCORES_FETCH_REGISTERS = 80,
    FETCH_WARPS = 8,
    WARP_KEYS = KEYS / FETCH_WARPS,
    RECORD_ROOM = 704, /* bytes: 64 of one record and 64 of the next lie in different banks */
};

struct scores_shared {
    uint8_t keys[2 * BLOCK];
    uint8_t left[2][LEFT_TILES * TILE];                   /* [warpgroup]: queries */
    uint8_t records[FETCH_WARPS][WARP_KEYS][RECORD_ROOM]; /* fp8, on their way */
    struct ring ring;
    uint64_t come[FETCH_WARPS];
};
enum { SCORES_BYTES = (int)sizeof(scores_shared) + 1024 };
static_assert(SCORES_BYTES <= 232448, "a block of threads has 227 KB");

/* ---- fetching fp8 records ------------------------------------------------------------------------------------------ */

/* A fetching warp has 8 keys of each block, four neighbours one key. The copy engine brings whole records: as loads of 64
 * bytes each they kept the first-level cache busy for most of the kernel's time. From there they go through registers,
 * so that the next block's records are under way while these are expanded. */
struct fetch_records {
    const uint8_t *latent;
    uint8_t *records; /* the warp's */
    uint64_t *come;
    uint32_t parity; /* of come */
    uint4 raw[8];
    uint32_t factor[4];
};

/* Ask for the records of a block; key: of the lane's row, or -1. By all lanes. */
__device__ __forceinline__ void records_ask(const fetch_records &f, int32_t key)
{
    const int lane = threadIdx.x & 31;
    const bool mine = (lane & 3) == 0 && key >= 0;
    const uint32_t n = (uint32_t)__popc(__ballot_sync(~0u, mine));

    fence_async_shared(); /* what lay there has been read */
    __syncwarp();
    if (lane == 0) barrier_expect(f.come, n * RECORD_FP8);
    __syncwarp();
    if (mine)
        bulk_load(f.records + lane / 4 * RECORD_ROOM, f.latent + (size_t)key * RECORD_FP8,
                  RECORD_FP8, f.come);
}

/* What has come: rope to its tile in buffer B, 16 latents of each tile into registers. A lane's first chunk of rope is q in
 * even rows, q + 4 in odd ones, so that neighbours store to different banks. */
template <int B>
__device__ __forceinline__ void records_take(fetch_records &f, ring *ring, uint32_t even,
                                             uint32_t parity, int32_t key)
{
    const int lane = threadIdx.x & 31, q = lane & 3, chunk = q + (lane & 4);
    const uint32_t p = smem_address(f.records) + (uint32_t)(lane / 4 * RECORD_ROOM),
                   keep = key >= 0 ? ~0u : 0,
                   to = (even & ~127u) + (uint32_t)((chunk ^ (lane / 4)) << 4) + B * BLOCK +
                        ROPE_TILE * TILE;

    barrier_wait(f.come, f.parity);
    f.parity ^= 1;
    barrier_wait(&ring->rope_free[B], parity);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 v = load16_shared(p + (uint32_t)(ROPE_AT + 16 * (chunk ^ (4 * i))));
        store16(to ^ (uint32_t)(64 * i), v.x & keep, v.y & keep, v.z & keep, v.w & keep);
    }
#pragma unroll
    for (int t = 0; t < 8; t++)
        f.raw[t] = load16_shared(p + (uint32_t)(64 * t + 16 * q));
    uint4 s = load16_shared(p + SCALES_AT);
    f.factor[0] = factor_bf16(__uint_as_float(s.x), key >= 0);
    f.factor[1] = factor_bf16(__uint_as_float(s.y), key >= 0);
    f.factor[2] = factor_bf16(__uint_as_float(s.z), key >= 0);
    f.factor[3] = factor_bf16(__uint_as_float(s.w), key >= 0);
}

/* What records_take has brought, into buffer B. even: shared address of the lane's first chunk in buffer 0. */
template <int B>
__device__ __forceinline__ void records_expand(const fetch_records &f, ring *ring, uint32_t even,
                                               uint32_t parity, int32_t key)
{
    const int q = threadIdx.x & 3, row = threadIdx.x % 256 / 4;
    const uint32_t odd = even ^ 16;

    barrier_wait(&ring->free[B][0], parity);
    if (q == 0) ring->valid[parity ^ 1][B][row] = key >= 0;
    expand16<B * BLOCK>(f.raw[0], f.factor[0], even, odd);
    expand16<B * BLOCK + TILE>(f.raw[1], f.factor[0], even, odd);
    expand16<B * BLOCK + 2 * TILE>(f.raw[2], f.factor[1], even, odd);
    expand16<B * BLOCK + 3 * TILE>(f.raw[3], f.factor[1], even, odd);
    fence_async_shared(); /* of rope, too */
    barrier_arrive(&ring->rope_full[B]);
    barrier_arrive(&ring->full[B][0]);
    barrier_wait(&ring->free[B][1], parity);
    expand16<B * BLOCK + 4 * TILE>(f.raw[4], f.factor[2], even, odd);
    expand16<B * BLOCK + 5 * TILE>(f.raw[5], f.factor[2], even, odd);
    expand16<B * BLOCK + 6 * TILE>(f.raw[6], f.factor[3], even, odd);
    expand16<B * BLOCK + 7 * TILE>(f.raw[7], f.factor[3], even, odd);
    fence_async_shared();
    barrier_arrive(&ring->full[B][1]);
}

__device__ __forceinline__ void scores_fetch(const job &j, scores_shared *sh, int n_live)
{
    const int row = threadIdx.x % 256 / 4, warp = threadIdx.x % 256 / 32, q = threadIdx.x & 3;
    const uint32_t even =
        smem_address(sh->keys) + (uint32_t)(row * 128 + (((2 * q) ^ (row & 7)) << 4));
    pair_cursor at = {(int)blockIdx.x, n_live, -1, 0, 0};
    fetch_records f;
    int32_t now[2], soon[2]; /* [block]: keys of this pair and of the next */
    uint32_t parity = 1;     /* a fresh barrier counts as freed before */
    bool have = true;

    auto entries = [&](int32_t(&x)[2], bool any) {
        x[0] = any ? entry(j, at, row) : -1;
        x[1] = any ? entry(j, at, KEYS + row) : -1;
    };
    auto validate = [&](int32_t(&x)[2]) {
        x[0] = valid_row(j, x[0]);
        x[1] = valid_row(j, x[1]);
    };
    f.latent = j.latent;
    f.records = sh->records[warp][0];
    f.come = &sh->come[warp];
    f.parity = 0;
    have = next_pair(j, at);
    entries(now, have);
    validate(now);
    if (have) records_ask(f, now[0]);
    bool next = have && next_pair(j, at);
    entries(soon, next);
#pragma unroll 1
    while (have) {
        records_take<0>(f, &sh->ring, even, parity, now[0]);
        records_ask(f, now[1]);
        validate(soon);
        records_expand<0>(f, &sh->ring, even, parity, now[0]);
        records_take<1>(f, &sh->ring, even, parity, now[1]);
        if (next) records_ask(f, soon[0]);
        records_expand<1>(f, &sh->ring, even, parity, now[1]);
        parity ^= 1;
        now[0] = soon[0];
        now[1] = soon[1];
        have = next;
        next = next && next_pair(j, at);
        entries(soon, next);
    }
}

/* ---- computing ----------------------------------------------------------------------------------------------------- */

/* A thread's part of HELD_TILES tiles of 64 queries, as the A operand; p: of the thread's first head. */
template <bool FP8>
__device__ __forceinline__ void hold_queries(const uint8_t *p, uint32_t (&a)[HELD_TILES * 16])
{
    const int q = threadIdx.x & 3;

#pragma unroll
    for (int k = 0; k < HELD_TILES * 4; k++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint8_t *from = p + (size_t)r * 8 * D_KEY * 2 + 32 * k;
            if (FP8) { /* the order that expand16 leaves latents in */
                uint2 v = __ldg((const uint2 *)(const void *)(from + 8 * q));
                a[4 * k + r] = __byte_perm(v.x, v.y, 0x5410);
                a[4 * k + 2 + r] = __byte_perm(v.x, v.y, 0x7632);
            } else {
                a[4 * k + r] = __ldg((const uint32_t *)(const void *)(from + 4 * q));
                a[4 * k + 2 + r] = __ldg((const uint32_t *)(const void *)(from + 16 + 4 * q));
            }
        }
}

/* The other tiles into shared memory, by a warpgroup. */
template <bool FP8>
__device__ __forceinline__ void leave_queries(const uint8_t *q, uint32_t tiles, int t)
{
    enum { PIECES = 4 * LEFT_TILES }; /* of 16 numbers, a row */

#pragma unroll 2
    for (int n = 0; n < HEADS * PIECES / 128; n++) {
        int i = t + 128 * n, row = i / PIECES, at = i - row * PIECES;
        const uint8_t *p = q + (size_t)row * (D_KEY * 2) + HELD_TILES * 128 + 32 * at;
        uint4 x = load16(p), y = load16(p + 16);
        uint32_t to = tiles + (uint32_t)(at / 4 * TILE + row * 128);
        uint32_t even = to + ((uint32_t)((2 * (at & 3)) ^ (row & 7)) << 4);
        if (FP8 && at / 4 < LEFT_TILES - 1) {
            store16(even, __byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                    __byte_perm(y.x, y.y, 0x5410), __byte_perm(y.z, y.w, 0x5410));
            store16(even ^ 16, __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632),
                    __byte_perm(y.x, y.y, 0x7632), __byte_perm(y.z, y.w, 0x7632));
        } else {
            store16(even, x.x, x.y, x.z, x.w);
            store16(even ^ 16, y.x, y.y, y.z, y.w);
        }
    }
}

/* Keys that tensor cores may read. Who expands fp8 fences after its stores: here a fence would wait for probabilities that are
 * on their way out. */
template <bool FP8> __device__ __forceinline__ void wait_scored(uint64_t *full, uint32_t parity)
{
    if (FP8)
        barrier_wait(full, parity);
    else
        wait_keys(full, parity);
}

/* Scores of 64 heads with the block in buffer b, in block_scores' order; the buffer is free on return. */
template <bool FP8>
__device__ __forceinline__ void held_scores(float (&s)[32], ring *ring,
                                            const uint32_t (&a)[HELD_TILES * 16], uint32_t left,
                                            uint32_t keys, int b, uint32_t parity)
{
    uint64_t q = matrix_descriptor(left, 16, 1024, LAYOUT_SWIZZLE_128);
    uint64_t k = matrix_descriptor(keys, 16, 1024, LAYOUT_SWIZZLE_128);
    auto tile = [&](int t) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint64_t key = further(k, (uint32_t)(t * TILE + i * 32));
            if (t < HELD_TILES)
                mma_scores(s, a + 16 * t + 4 * i, key, t || i);
            else
                mma_scores(s, further(q, (uint32_t)((t - HELD_TILES) * TILE + i * 32)), key, 1);
        }
    };

    barrier_wait(&ring->full[b][0], parity);
    wait_scored<FP8>(&ring->rope_full[b], parity); /* comes with the first half: a fence less */
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < 4; t++)
        tile(t);
    tile(ROPE_TILE);
    wgmma_commit();
    wait_scored<FP8>(&ring->full[b][1], parity);
    wgmma_fence();
#pragma unroll
    for (int t = 4; t < 8; t++)
        tile(t);
    wgmma_commit();
    wgmma_wait<1>();
    warp_arrive(&ring->free[b][0]);
    warp_arrive(&ring->rope_free[b]);
    wgmma_wait<0>();
    warp_arrive(&ring->free[b][1]);
}

template <bool FP8, int G, int WG>
__device__ __forceinline__ void scores_math(const job &j, scores_shared *sh, int n_live)
{
    int t = threadIdx.x % 128, task = blockIdx.x;
    uint32_t parity = 0, left = smem_address(sh->left[WG]), tiles = smem_address(sh->keys);
    work w;

    while (next_work(j, n_live, task, w)) {
        uint32_t a[HELD_TILES * 16];
        int group = w.group * G + (G == 2 ? WG : 0);
        if (w.first >= w.last) continue;
        const uint8_t *q = j.q + ((size_t)w.row * j.n_heads + (size_t)group * HEADS) * D_KEY * 2;
        named_barrier(1 + WG, 128); /* all of the warpgroup are done with the queries before */
        leave_queries<FP8>(q, left, t);
        hold_queries<FP8>(q + (size_t)(t / 32 * 16 + (t & 31) / 4) * D_KEY * 2, a);
        fence_async_shared();
        named_barrier(1 + WG, 128);
        uint8_t *to = probs_at(j, w.row, group, 2 * w.first + (G == 2 ? 0 : WG));
        for (int pair = w.first; pair < w.last; pair++, parity ^= 1)
#pragma unroll 1
            for (int b = G == 2 ? 0 : WG; b < (G == 2 ? 2 : WG + 1); b++) {
                float x[32];
                probs p;
                held_scores<FP8>(x, &sh->ring, a, left, tiles + (uint32_t)(b * BLOCK), b, parity);
                softmax(x, sh->ring.valid[parity][b], j.scale, p);
                probs_store(to, p, t);
                to += (G == 2 ? 1 : 2) * PROBS_BYTES;
            }
    }
}

/* Warpgroups 0 and 1 compute, the rest fetch. j.n_groups counts groups of G x 64 heads. */
template <bool FP8, int G>
__global__ void __launch_bounds__(256 + FETCHERS<FP8, false>, 1)
    sparse_mla_scores(const __grid_constant__ job j)
{
    extern __shared__ uint8_t raw[];
    scores_shared *sh = (scores_shared *)(void *)(raw + (1024 - (smem_address(raw) & 1023)) % 1024);
    int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0), n_live = *j.n;

    prefetch_first(j);
    dependent_launch();
    if (threadIdx.x == 0) {
        for (int i = 0; i < FETCH_WARPS; i++)
            barrier_init(&sh->come[i], 1);
        ring_init<FP8, FETCHERS<FP8, false>>(&sh->ring, 4 * G); /* and the fence behind both */
    }
    __syncthreads();
    if (wg >= 2) {
        registers_set<SCORES_FETCH_REGISTERS>();
        if constexpr (FP8)
            scores_fetch(j, sh, n_live);
        else
            produce<false, false>(j, &sh->ring, smem_address(sh->keys), n_live);
    } else {
        registers_set<SCORES_MATH_REGISTERS>();
        if (wg == 0)
            scores_math<FP8, G, 0>(j, sh, n_live);
        else
            scores_math<FP8, G, 1>(j, sh, n_live);
    }
}

template <bool FP8, int G> cudaError_t launch_scores(job j, int n_sm, cudaStream_t stream)
{
    j.n_groups /= G;
    int64_t tasks = (int64_t)j.n_max * j.n_groups * j.n_slices;
    cudaError_t e = cudaFuncSetAttribute(sparse_mla_scores<FP8, G>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, SCORES_BYTES);
    if (e != cudaSuccess) return e;
    sparse_mla_scores<FP8, G><<<(unsigned)(tasks < n_sm ? tasks : n_sm), 256 + FETCHERS<FP8, false>,
                                SCORES_BYTES, stream>>>(j);
    return cudaGetLastError();
}

} // namespace mla
} // namespace tr

#endif
