/* The walk of sparse_mla.cu over bf16 rows: a cache of them, or what was expanded from records before (sparse_mla_expand.cuh), to
 * the bits of the walk over records. One warpgroup copies, keys and queries, with nothing to compute. */
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
    const int32_t *base; /* NULL, or [n_max]: what a row's entries, positions, count from */
};

/* The task whose queries lie in their tile: the copying warpgroup finds tasks for all. */
struct prompt_task {
    int row, group, n_pairs; /* row -1: no task any more */
};
struct prompt_shared {
    walk_shared walk;
    uint64_t queries_full, queries_free;
    prompt_task task;
};
enum { PROMPT_BYTES = 3 * BLOCK + (int)sizeof(prompt_shared) + 1024 };

/* ---- copying: 8 neighbours take 128 bytes of each of 4 rows of a block -------------------------------------------------- */

enum { ROWS_EACH = 512 / COPIERS, ROW_STEP = KEYS / ROWS_EACH };

/* 16 bytes of a row that begins at any line: asked for 256 at a time, neighbours' lines come, too. A gather from 151 MB takes
 * 345 us with 128 and 382 us with 256. */
__device__ __forceinline__ void copy_line16(uint32_t smem, const void *global, int src_bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(global),
                 "r"(src_bytes)
                 : "memory");
}

/* A copying thread's place: a pair of blocks of a task, or a task without any. */
struct step {
    int task; /* the next one */
    int row, group, n_pairs, pair;
};

struct copier {
    step at;
    int32_t now[2][ROWS_EACH], soon[2][ROWS_EACH]; /* [block][row] of this step and of the next */
    int32_t base;                                  /* of soon's row */
    uint32_t line;                                 /* the thread's 16 bytes in a tile */
    uint32_t parity;
};

__device__ __forceinline__ int copy_thread()
{
    return fetch_thread() % COPIERS;
}
__device__ __forceinline__ int copy_chunk()
{
    return fetch_thread() & 7;
}

/* Tiles [T, T + N) of 64 rows of 1,152 bytes to `to`; a row that is not there becomes zeros. */
template <int T, int N>
__device__ __forceinline__ void copy_tiles(uint32_t to, const uint8_t *from,
                                           const int32_t (&x)[ROWS_EACH])
{
#pragma unroll
    for (int r = 0; r < ROWS_EACH; r++) {
        const uint8_t *p = from + (size_t)(x[r] < 0 ? 0 : x[r]) * RECORD_BF16 + 16 * copy_chunk();
#pragma unroll
        for (int i = T; i < T + N; i++)
            copy_line16(to + (uint32_t)(r * ROW_STEP * 128 + i * TILE), p + 128 * i,
                        x[r] < 0 ? 0 : 16);
    }
}

__device__ __forceinline__ const uint8_t *queries_of(const job &j, int row, int group)
{
    return j.q + ((size_t)row * j.n_heads + (size_t)group * HEADS) * RECORD_BF16;
}

/* On their way to L2: the queries of the task that the step begins, and the list of the task after it. */
__device__ __forceinline__ void prefetch_task(const job &j, int n_live, const step &s)
{
    const int i = s.task / j.n_groups;

    if (copy_thread()) return;
    prefetch_l2(queries_of(j, s.row, s.group), HEADS * RECORD_BF16);
    if (i >= n_live || j.k % 4) return;
    const size_t row = (size_t)(j.order ? j.order[i] : i);
    prefetch_l2((const uint8_t *)(j.list + row * (size_t)j.k), (uint32_t)j.k * 4);
}

/* The step after this one, and its entries as they stand in the list. */
template <bool BASE>
__device__ __forceinline__ bool next_step(const prompt &p, int n_live, copier &c)
{
    const job &j = p.j;
    step &s = c.at;

    if (++s.pair >= s.n_pairs) {
        work w;
        if (!next_work(j, n_live, s.task, w)) return false;
        s.row = w.row, s.group = w.group, s.n_pairs = w.last, s.pair = 0;
        prefetch_task(j, n_live, s);
        if (BASE) c.base = __ldg(p.base + s.row);
    }
    const int32_t *list = j.list + (size_t)s.row * j.k;
    const int first = s.pair * 2 * KEYS + copy_thread() / 8;
#pragma unroll
    for (int i = 0; i < 2 * ROWS_EACH; i++)
        c.soon[i / ROWS_EACH][i % ROWS_EACH] =
            first + ROW_STEP * i < j.k ? __ldg(list + first + ROW_STEP * i) : -1;
    return true;
}

/* The list has come: soon's keys that are there, and their rows on their way to L2 (lane by lane: this takes time). The block of
 * threads beside this one has the other group of a row's heads: of two groups each asks for one block of the keys. */
template <bool BASE> __device__ __forceinline__ void take_entries(const job &j, copier &c)
{
    const bool both = j.n_groups % 2 || gridDim.x % 2;
    int32_t mine = -1;

#pragma unroll
    for (int i = 0; i < 2 * ROWS_EACH; i++) {
        int32_t &x = c.soon[i / ROWS_EACH][i % ROWS_EACH];
        x = valid_row(j, BASE && x >= 0 ? x + c.base : x);
        mine = copy_chunk() == i ? x : mine;
    }
    if (mine >= 0 && (both || copy_chunk() / ROWS_EACH == (int)(blockIdx.x & 1)))
        prefetch_l2(j.latent + (size_t)mine * RECORD_BF16, RECORD_BF16);
}

/* The queries of a task, when those before are done with; row -1: that was the last. */
__device__ __forceinline__ void give_task(const job &j, prompt_shared *sh, uint32_t queries,
                                          const prompt_task &task, uint32_t parity)
{
    int32_t x[ROWS_EACH];

#pragma unroll
    for (int r = 0; r < ROWS_EACH; r++)
        x[r] = copy_thread() / 8 + r * ROW_STEP;
    barrier_wait(&sh->queries_free, parity);
    if (task.row >= 0) copy_tiles<0, 9>(queries, queries_of(j, task.row, task.group), x);
    async_copy_arrive(&sh->queries_full);
    if (copy_thread()) return;
    sh->task = task;
    barrier_arrive(&sh->queries_full);
}

/* Half I of a pair. */
template <int I>
__device__ __forceinline__ void copy_half(const job &j, ring *ring, const copier &c)
{
    constexpr int B = half_block(I), H = half_side(I);
    const uint32_t to = c.line + (uint32_t)(B * BLOCK);

    barrier_wait(&ring->free[B][H], c.parity);
    if (H == 0) {
#pragma unroll
        for (int r = 0; r < ROWS_EACH; r++)
            if (copy_chunk() == 0)
                ring->valid[c.parity ^ 1][B][copy_thread() / 8 + r * ROW_STEP] = c.now[B][r] >= 0;
        barrier_arrive(&ring->full[B][H]);
    }
    copy_tiles<4 * H, 4>(to, j.latent, c.now[B]);
    async_copy_arrive(&ring->full[B][H]);
    if (H == 0) {
        barrier_wait(&ring->rope_free[B], c.parity);
        copy_tiles<ROPE_TILE, 1>(to, j.latent, c.now[B]);
        async_copy_arrive(&ring->rope_full[B]);
    }
}

template <bool BASE>
__device__ __forceinline__ void copy_all(const prompt &p, prompt_shared *sh, uint32_t queries,
                                         int n_live)
{
    const job &j = p.j;
    ring *ring = &sh->walk.ring;
    copier c;
    uint32_t queries_parity = 1;

    const int g = copy_thread() / 8;
    const uint32_t place = (uint32_t)(g * 128) + ((uint32_t)(copy_chunk() ^ (g & 7)) << 4);
    c.line = queries + BLOCK + place;
    c.parity = 1; /* a fresh barrier counts as freed before */
    c.base = 0;
    c.at = {(int)blockIdx.x, 0, 0, 0, 0};
    bool have = next_step<BASE>(p, n_live, c);
    if (have) take_entries<BASE>(j, c);
    while (have) {
        const prompt_task task = {c.at.row, c.at.group, c.at.n_pairs};
        const int pair = c.at.pair;
#pragma unroll
        for (int i = 0; i < 2 * ROWS_EACH; i++)
            c.now[i / ROWS_EACH][i % ROWS_EACH] = c.soon[i / ROWS_EACH][i % ROWS_EACH];
        have = next_step<BASE>(p, n_live, c);
        if (pair == 0) {
            give_task(j, sh, queries + place, task, queries_parity);
            queries_parity ^= 1;
        }
        if (task.n_pairs) {
            copy_half<0>(j, ring, c);
            copy_half<1>(j, ring, c);
            copy_half<2>(j, ring, c);
            copy_half<3>(j, ring, c);
            c.parity ^= 1;
        }
        if (have) take_entries<BASE>(j, c); /* while nothing is free to be copied to */
    }
    give_task(j, sh, queries + place, {-1, 0, 0}, queries_parity);
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

/* A pair of blocks, as take_pair; after the last one's scores nobody needs the queries. Here the registers suffice for
 * warpgroup 1 to make its probabilities beside block 0's values. */
template <int WG>
__device__ __forceinline__ void prompt_pair(const job &j, prompt_shared *prompt_sh, uint32_t tiles,
                                            bool last, uint32_t parity, float (&o)[2][64],
                                            state<1> &s, int t)
{
    walk_shared *sh = &prompt_sh->walk;
    ring *ring = &sh->ring;
    float x[32], keep[2];
    probs p, first;

    scores_in_turn<WG>(x, ring, tiles, parity);
    if (last) warp_arrive(&prompt_sh->queries_free);
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

/* Tasks as they come, with their queries; what a task's end needs is kept in shared memory meanwhile. */
template <int WG>
__device__ __forceinline__ void prompt_math(const job &j, prompt_shared *sh, uint32_t tiles)
{
    const int t = threadIdx.x % 128;
    volatile int *kept = sh->walk.kept[threadIdx.x / 32];
    uint32_t parity = 0;

#pragma unroll 1
    for (int task = 0;; task++) {
        float o[2][64];
        state<1> s;
        work w;
        int slot = task & 1;
        wait_keys(&sh->queries_full, (uint32_t)slot);
        w.row = sh->task.row;
        w.group = sh->task.group;
        int n_pairs = sh->task.n_pairs;
        if (w.row < 0) return;
        kept_store(kept, task, slot, w);
        if (n_pairs == 0) warp_arrive(&sh->queries_free);
        state_clear(s);
#pragma unroll
        for (int i = 0; i < 128; i++)
            o[i / 64][i % 64] = 0.0f;
#pragma unroll 1
        for (; n_pairs > 0; n_pairs--, parity ^= 1)
            prompt_pair<WG>(j, sh, tiles, n_pairs == 1, parity, o, s, t);
        kept_load(kept, task, slot, w);
        finish<false>(j, w, &sh->walk, slot, WG, t, o, s);
    }
}

/* Warpgroups 0 and 1 compute, the third copies. One block a SM, as many as there are SMs. */
template <bool BASE>
__global__ void __launch_bounds__(PROMPT_THREADS, 1)
    sparse_mla_prompt(const __grid_constant__ prompt p)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    prompt_shared *sh = (prompt_shared *)(base + 3 * BLOCK);
    const uint32_t tiles = smem_address(base);
    const int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0), n_live = *p.j.n;

    prefetch_first(p.j);
    if (threadIdx.x == 0) {
        ring_init<false, COPIERS>(&sh->walk.ring);
        barrier_init(&sh->walk.summed, 256);
        barrier_init(&sh->queries_full, COPIERS + 1);
        barrier_init(&sh->queries_free, 8 * WARP_ARRIVALS);
        barrier_init_fence();
    }
    __syncthreads();
    if (wg == 2) {
        registers_set<PROMPT_COPY_REGISTERS>();
        copy_all<BASE>(p, sh, tiles, n_live);
    } else if (wg == 0) {
        registers_set<PROMPT_MATH_REGISTERS>();
        prompt_math<0>(p.j, sh, tiles);
    } else {
        registers_set<PROMPT_MATH_REGISTERS>();
        prompt_math<1>(p.j, sh, tiles);
    }
}

template <bool BASE> cudaError_t launch(const prompt &p, int n_sm, cudaStream_t stream)
{
    const int64_t tasks = (int64_t)p.j.n_max * p.j.n_groups;
    const cudaError_t e = cudaFuncSetAttribute(
        sparse_mla_prompt<BASE>, cudaFuncAttributeMaxDynamicSharedMemorySize, PROMPT_BYTES);

    if (e != cudaSuccess) return e;
    sparse_mla_prompt<BASE>
        <<<(unsigned)(tasks < n_sm ? tasks : n_sm), PROMPT_THREADS, PROMPT_BYTES, stream>>>(p);
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
