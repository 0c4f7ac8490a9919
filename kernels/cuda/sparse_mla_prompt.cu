/* The walk of sparse_mla.cu over bf16 rows: a cache of them, or what was expanded from records before (sparse_mla_expand.cuh), to
 * the bits of the walk over records. One warpgroup copies, with nothing to compute. */
#include "kernels/cuda/sparse_mla_expand.cuh"
#include "kernels/cuda/sparse_mla_walk.cuh"

namespace tr
{
namespace mla
{

namespace
{

enum {
    COPIERS = 128,
    PROMPT_THREADS = 256 + COPIERS,
    PROMPT_MATH_REGISTERS = 216,
    PROMPT_COPY_REGISTERS = 72,
    SCORES_TURN = 3, /* a named barrier */
};

struct prompt {
    job j;
    const int32_t *base; /* PERMUTED: [n_max], what a row's entries, positions, count from */
};

/* ---- copying: 8 neighbours take 128 bytes of each of 4 rows of a block -------------------------------------------------- */

template <bool PERMUTED>
__device__ __forceinline__ void copy_keys(const prompt &p, ring *ring, uint32_t keys, int n_live)
{
    enum { R = 512 / COPIERS, STEP = KEYS / R };
    const job &j = p.j;
    int g = threadIdx.x % COPIERS / 8, chunk = threadIdx.x & 7;
    pair_cursor c = {(int)blockIdx.x, n_live, -1, 0, 0};
    int32_t now[2][R], soon[2][R], base = 0; /* [block][row] of this pair and of the next, soon's */
    uint32_t parity = 1;                     /* a fresh barrier counts as freed before */
    uint32_t line = keys + (uint32_t)(g * 128) + ((uint32_t)(chunk ^ (g & 7)) << 4);

    auto entries = [&](int32_t(&x)[2][R], bool &any) {
        any = any && next_pair(j, c);
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            x[i / R][i % R] = any ? entry(j, c, STEP * i + g) : -1;
        if (PERMUTED) base = any ? __ldg(p.base + c.row) : 0;
    };
    auto validate = [&](int32_t(&x)[2][R]) {
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            x[i / R][i % R] = valid_row(j, PERMUTED && x[i / R][i % R] >= 0 ? x[i / R][i % R] + base
                                                                            : x[i / R][i % R]);
    };
    auto prefetch = [&](const int32_t(&x)[2][R]) {
        int32_t mine = -1;
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            mine = chunk == i ? x[i / R][i % R] : mine;
        if (mine >= 0) prefetch_row<RECORD_BF16>(j.latent + (size_t)mine * RECORD_BF16);
    };
    auto copy =
        [&](int b, int t, int n,
            const int32_t(&x)[R]) { /* tiles [t, t + n) */
#pragma unroll
                                    for (int r = 0; r < R; r++) {
                                        int32_t key = x[r] < 0 ? 0 : x[r];
                                        const uint8_t *from =
                                            j.latent + (size_t)key * RECORD_BF16 + 16 * chunk;
                                        uint32_t to = line + (uint32_t)(b * BLOCK + r * STEP * 128);
#pragma unroll
                                        for (int i = t; i < t + n; i++)
                                            async_copy16(to + (uint32_t)(i * TILE), from + 128 * i,
                                                         x[r] < 0 ? 0 : 16);
                                    }
        };

    bool have = true;
    entries(now, have);
    validate(now);
    while (have) {
        bool more = true;
        entries(soon, more);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int b = half_block(i), h = half_side(i);
            bool first = h == 0;
            barrier_wait(&ring->free[b][h], parity);
            if (first) {
#pragma unroll
                for (int r = 0; r < R; r++)
                    if (chunk == 0) ring->valid[parity ^ 1][b][g + r * STEP] = now[b][r] >= 0;
                barrier_arrive(&ring->full[b][h]);
            }
            copy(b, 4 * h, 4, now[b]);
            async_copy_arrive(&ring->full[b][h]);
            if (first) {
                barrier_wait(&ring->rope_free[b], parity);
                copy(b, ROPE_TILE, 1, now[b]);
                async_copy_arrive(&ring->rope_full[b]);
            }
            if (i == 1) {
                validate(soon); /* the list has had the time of two halves to come */
                prefetch(soon);
            }
        }
        parity ^= 1;
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            now[i / R][i % R] = soon[i / R][i % R];
        have = more;
    }
}

/* ---- computing ------------------------------------------------------------------------------------------------------------ */

/* block_scores for block WG; those of block 1 when block 0's are done: what one warpgroup makes of its scores then hides
 * behind the other's. */
template <int WG>
__device__ __forceinline__ void scores_in_turn(float (&s)[32], ring *ring, uint32_t tiles,
                                               uint32_t parity)
{
    if (WG == 1) named_barrier(SCORES_TURN, 256);
    block_scores(s, ring, tiles, tiles + (1 + WG) * BLOCK, WG, parity);
    if (WG == 0) named_barrier_arrive(SCORES_TURN, 256);
}

/* A pair of blocks, as take_pair. Here the registers suffice for warpgroup 1 to make its probabilities beside block 0's
 * values. */
template <int WG>
__device__ __forceinline__ void prompt_pair(const job &j, walk_shared *sh, uint32_t tiles,
                                            uint32_t parity, float (&o)[2][64], state<1> &s, int t)
{
    ring *ring = &sh->ring;
    float x[32], keep[2];
    probs p, first;

    scores_in_turn<WG>(x, ring, tiles, parity);
    if (WG == 0) {
        softmax(x, ring->valid[parity][0], j.scale, p);
        take_pair(sh, tiles, 0, parity, p, o, s, t);
        return;
    }
    receive(sh, tiles + BLOCK, 0, parity, first, t);
    take_reference(s, first, -1, keep);
    take_values(o, keep, first.p, tiles + BLOCK + 4 * TILE);
    softmax(x, ring->valid[parity][1], j.scale, p);
    give(sh, tiles + 2 * BLOCK, 1, p, t);
    wgmma_wait<0>();
    warp_arrive(&ring->free[0][1]);
    take_block(sh, tiles, 1, 1, 0, p, o, s);
}

template <bool PERMUTED, int WG>
__device__ __forceinline__ void prompt_math(const prompt &p, walk_shared *sh, uint32_t tiles,
                                            int n_live)
{
    const job &j = p.j;
    const int t = threadIdx.x % 128;
    volatile int *kept = sh->kept[threadIdx.x / 32];
    int task = blockIdx.x;
    uint32_t parity = 0;
    work w;

    for (int slot = 0; next_work(j, n_live, task, w); slot ^= 1) {
        float o[2][64];
        state<1> s;
        kept_store(kept, task, slot, w);
        if (w.first < w.last) {
            named_barrier(2, 256); /* both warpgroups are done with the queries before */
            load_queries<PERMUTED, HEADS, 5>(
                j.q + ((size_t)w.row * j.n_heads + (size_t)w.group * HEADS) * D_KEY * 2, HEADS,
                tiles);
            fence_async_shared();
            named_barrier(2, 256);
        }
        state_clear(s);
#pragma unroll
        for (int i = 0; i < 128; i++)
            o[i / 64][i % 64] = 0.0f;
        for (int pair = w.first; pair < w.last; pair++, parity ^= 1)
            prompt_pair<WG>(j, sh, tiles, parity, o, s, t);
        kept_load(kept, task, slot, w);
        finish<PERMUTED>(j, w, sh, slot, WG, t, o, s);
    }
}

/* Warpgroups 0 and 1 compute, the third copies. One block a SM, as many as there are SMs. */
template <bool PERMUTED>
__global__ void __launch_bounds__(PROMPT_THREADS, 1)
    sparse_mla_prompt(const __grid_constant__ prompt p)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    walk_shared *sh = (walk_shared *)(base + 3 * BLOCK);
    const uint32_t tiles = smem_address(base);
    const int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0), n_live = *p.j.n;

    prefetch_first(p.j);
    if (threadIdx.x == 0) ring_init<false, COPIERS>(&sh->ring);
    __syncthreads();
    if (wg == 2) {
        registers_set<PROMPT_COPY_REGISTERS>();
        copy_keys<PERMUTED>(p, &sh->ring, tiles + BLOCK, n_live);
    } else if (wg == 0) {
        registers_set<PROMPT_MATH_REGISTERS>();
        prompt_math<PERMUTED, 0>(p, sh, tiles, n_live);
    } else {
        registers_set<PROMPT_MATH_REGISTERS>();
        prompt_math<PERMUTED, 1>(p, sh, tiles, n_live);
    }
}

template <bool PERMUTED> cudaError_t launch(const prompt &p, int n_sm, cudaStream_t stream)
{
    const int64_t tasks = (int64_t)p.j.n_max * p.j.n_groups;
    const cudaError_t e = cudaFuncSetAttribute(
        sparse_mla_prompt<PERMUTED>, cudaFuncAttributeMaxDynamicSharedMemorySize, WALK_BYTES);

    if (e != cudaSuccess) return e;
    sparse_mla_prompt<PERMUTED>
        <<<(unsigned)(tasks < n_sm ? tasks : n_sm), PROMPT_THREADS, WALK_BYTES, stream>>>(p);
    return cudaGetLastError();
}

} // namespace

cudaError_t launch_expanded(const job &j, const expansion &e, const int32_t *position, int n_sm,
                            cudaStream_t stream)
{
    prompt p = {j, e.base};

    p.j.n = e.n;
    p.j.order = e.expanded;
    p.j.list = position;
    p.j.latent = e.rows;
    p.j.n_latent = (uint32_t)e.pages_max * TR_PAGE_TOKENS;
    return launch<true>(p, n_sm, stream);
}

cudaError_t launch_rows(const job &j, int n_sm, cudaStream_t stream)
{
    return launch<false>(prompt{j, NULL}, n_sm, stream);
}

} // namespace mla
} // namespace tr
