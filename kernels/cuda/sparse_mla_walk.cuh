/* What the kernels share that take 64 heads of a row through all of its keys: over records (sparse_mla.cu, which says how the two
 * warpgroups divide the work) and over rows made of them (sparse_mla_prompt.cu). */
#ifndef TR_CUDA_SPARSE_MLA_WALK_CUH
#define TR_CUDA_SPARSE_MLA_WALK_CUH

#include "kernels/cuda/sparse_mla_tile.cuh"

namespace tr
{
namespace mla
{

struct walk_shared { /* behind the tiles: queries, two blocks of keys */
    struct ring ring;
    uint64_t summed;          /* its phase: the task's */
    float2 reference[2][128]; /* of the probabilities handed over */
    float sum[2][2][HEADS];   /* [task & 1][warpgroup][head] */
    volatile int kept
        [8]
        [3]; /* a computing warp's own: what it needs at the end of a task; registers are short */
};
enum { WALK_BYTES = 3 * BLOCK + (int)sizeof(walk_shared) + 1024 };

/* Scores of 64 heads with the block in buffer b, in the order in which its tiles come. */
__device__ __forceinline__ void block_scores(float (&s)[32], ring *ring, uint32_t queries,
                                             uint32_t keys, int b, uint32_t parity)
{
    uint64_t q = matrix_descriptor(queries, 16, 1024, LAYOUT_SWIZZLE_128);
    uint64_t k = matrix_descriptor(keys, 16, 1024, LAYOUT_SWIZZLE_128);
    auto tiles = [&](int t, int n, bool first) {
#pragma unroll
        for (int i = 0; i < 4 * n; i++) {
            uint32_t at = (uint32_t)((t + i / 4) * TILE + i % 4 * 32);
            mma_scores(s, further(q, at), further(k, at), !first || i);
        }
    };

    barrier_wait(&ring->full[b][0], parity);
    wait_keys(&ring->rope_full[b], parity); /* comes with the first half: a fence less */
    wgmma_fence();
    tiles(0, 4, true);
    tiles(ROPE_TILE, 1, false);
    wait_keys(&ring->full[b][1], parity);
    tiles(4, 4, false);
    wgmma_commit();
    wgmma_wait<0>();
}

/* Hand the probabilities of buffer b to the other warpgroup, through the block's rope tile, which scores need no more. */
__device__ __forceinline__ void give(walk_shared *sh, uint32_t keys, int b, const probs &p, int t)
{
    uint32_t to = keys + (uint32_t)(ROPE_TILE * TILE + 16 * t);

#pragma unroll
    for (int i = 0; i < 4; i++)
        store16(to + (uint32_t)(2048 * i), p.p[4 * i], p.p[4 * i + 1], p.p[4 * i + 2],
                p.p[4 * i + 3]);
    sh->reference[b][t] = {p.reference[0], p.reference[1]};
    warp_arrive(&sh->ring.given[b]);
}
__device__ __forceinline__ void receive(walk_shared *sh, uint32_t keys, int b, uint32_t parity,
                                        probs &p, int t)
{
    uint32_t from = keys + (uint32_t)(ROPE_TILE * TILE + 16 * t);

    barrier_wait(&sh->ring.given[b], parity);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint4 v = load16_shared(from + (uint32_t)(2048 * i));
        p.p[4 * i] = v.x, p.p[4 * i + 1] = v.y, p.p[4 * i + 2] = v.z, p.p[4 * i + 3] = v.w;
    }
    float2 r = sh->reference[b][t];
    p.reference[0] = r.x, p.reference[1] = r.y;
    warp_arrive(&sh->ring.rope_free[b]);
}

/* The values of a block, and the warpgroup's half of it is free. series: as take_reference has it. */
__device__ __forceinline__ void take_block(walk_shared *sh, uint32_t tiles, int wg, int block,
                                           int series, probs &p, float (&o)[2][64], state<1> &s)
{
    float keep[2];

    take_reference(s, p, series, keep);
    take_values(o, keep, p.p, tiles + (uint32_t)((1 + block) * BLOCK + wg * 4 * TILE));
    wgmma_wait<0>();
    warp_arrive(&sh->ring.free[block][wg]);
}

/* The values of a pair, block 0's, then block 1's; p: of the warpgroup's own block, the other's arrives meanwhile. */
__device__ __forceinline__ void take_pair(walk_shared *sh, uint32_t tiles, int wg, uint32_t parity,
                                          probs &p, float (&o)[2][64], state<1> &s, int t)
{
    give(sh, tiles + (uint32_t)((1 + wg) * BLOCK), wg, p, t);
    if (wg == 0) {
        take_block(sh, tiles, 0, 0, 0, p, o, s);
        receive(sh, tiles + 2 * BLOCK, 1, parity, p, t);
        take_block(sh, tiles, 0, 1, -1, p, o, s);
    } else {
        probs first;
        receive(sh, tiles + BLOCK, 0, parity, first, t);
        take_block(sh, tiles, 1, 0, -1, first, o, s);
        take_block(sh, tiles, 1, 1, 0, p, o, s);
    }
}

/* Sums of both warpgroups, out and lse of a row's 64 heads; o is warpgroup w's half of the columns. */
template <bool FP8>
__device__ __forceinline__ void finish(const job &j, const work &w, walk_shared *sh, int slot,
                                       int wg, int t, const float (&o)[2][64], state<1> &s)
{
    int head = t / 32 * 16 + (t & 31) / 4;
    float own[2], total[2];

#pragma unroll
    for (int r = 0; r < 2; r++) {
        own[r] = sum_of_four(s.sum[0][r]);
        if ((t & 3) == 0) sh->sum[slot][wg][head + 8 * r] = own[r];
    }
    barrier_arrive(&sh->summed); /* where both meet may stand twice in a kernel: no named barrier */
    barrier_wait(&sh->summed, (uint32_t)slot);
#pragma unroll
    for (int r = 0; r < 2; r++)
        total[r] = own[r] + sh->sum[slot][1 - wg][head + 8 * r];
    size_t at = (size_t)w.row * j.n_heads + (size_t)w.group * HEADS + head;
    store_values<FP8>(j.out + (at * D_LATENT + (size_t)wg * 256) * 2, o, inverse(total[0]),
                      inverse(total[1]));
    if (j.lse && wg == 0 && (t & 3) == 0) {
        j.lse[at] = (s.reference[0] + log2f(total[0])) * CUDART_LN2_F;
        j.lse[at + 8] = (s.reference[1] + log2f(total[1])) * CUDART_LN2_F;
    }
}

__device__ __forceinline__ void kept_store(volatile int *kept, int task, int slot, const work &w)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        kept[0] = task << 1 | slot;
        kept[1] = w.row;
        kept[2] = w.group;
    }
    __syncwarp();
}
__device__ __forceinline__ void kept_load(volatile int *kept, int &task, int &slot, work &w)
{
    slot = kept[0] & 1;
    task = kept[0] >> 1;
    w.row = kept[1];
    w.group = kept[2];
}

} // namespace mla
} // namespace tr

#endif
