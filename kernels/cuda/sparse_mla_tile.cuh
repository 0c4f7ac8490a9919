/* What the kernels of sparse MLA share: the shape of a tile of keys in shared memory, which rows and keys a block of threads
 * works on, the warps that fetch keys, and the softmax of one block of 64 keys.
 *
 * Keys come in blocks of 64, as nine tiles [64 keys][64 numbers] bf16 with 128-byte swizzle (eight of latents, one of rope):
 * the tensor cores read the same tile as K (numbers contiguous) and as V (turned round). Two blocks, a pair, are in flight.
 *
 * fp8 latents are expanded without conversion instructions: the 7 bits of magnitude of an e4m3, moved 4 bits up from the
 * bottom of a bf16, are the number times 2^-120, subnormals too; one packed multiply by scale * 2^120 is exact. It gives the
 * pairs of bytes (0, 2) and (1, 3) of a word, so inside each 16 latents number 4i + g + 2e lies at place 8g + 2i + e
 * (i < 4, g < 2, e < 2); queries are stored alike, and the epilogue finds 4 neighbouring outputs in one thread. */
#ifndef TR_CUDA_SPARSE_MLA_TILE_CUH
#define TR_CUDA_SPARSE_MLA_TILE_CUH

#include <math_constants.h>
#include <stddef.h>

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/sparse_mla_mma.cuh"

namespace tr
{
namespace mla
{

enum {
    KEYS = 64,
    HEADS = 64,
    D_LATENT = 512,
    D_KEY = 576,
    TILE = 8192,
    ROPE_TILE = 8,
    BLOCK = 9 * TILE, /* bytes of 64 keys, or of 64 queries */
    RECORD_FP8 = 656,
    RECORD_BF16 = 1152,
    SCALES_AT = 512,
    ROPE_AT = 528,
};

/* Two warpgroups compute, the others fetch. Where the values fill the registers (WALK) one warpgroup is enough to copy bf16; to
 * expand fp8 it takes two. */
template <bool FP8, bool WALK> constexpr int FETCHERS = !FP8 && WALK ? 128 : 256;
template <bool FP8, bool WALK>
constexpr int FETCH_REGISTERS = FETCHERS<FP8, WALK> == 128 ? 104 : 64;
template <bool FP8, bool WALK>
constexpr int MATH_REGISTERS = FETCHERS<FP8, WALK> == 128 ? 200 : 192;

/* From the 128 or 168 registers that a thread starts with. */
template <int N> __device__ __forceinline__ void registers_set()
{
    if constexpr (N > 128)
        registers_raise<N>();
    else
        registers_lower<N>();
}

/* The order in which the halves of a pair come, and fall free. */
__host__ __device__ constexpr int half_block(int i)
{
    return i / 2;
}
__host__ __device__ constexpr int half_side(int i)
{
    return i & 1;
}

struct job { /* a launch */
    const int32_t *n;
    int n_max;
    const uint8_t *dense; /* [n] or NULL */
    const uint8_t *q;     /* bf16 [n, n_heads, 576] */
    const int32_t *list;  /* [n, k] */
    int k;
    const uint8_t *latent;
    uint32_t n_latent; /* rows of the cache */
    uint8_t *out;      /* bf16 [n, n_heads, 512] */
    float *lse;        /* [n, n_heads] or NULL */
    float scale;       /* of a score, times log2(e) */
    int n_heads;
    int n_groups;        /* of 64 heads */
    int n_slices, pairs; /* a row's pairs of blocks are cut into slices of so many pairs */
    uint8_t *work;
    const int32_t
        *order; /* [n_max], the first *n: the rows of the launch; NULL: rows 0 .. *n - 1 */
};

struct work {
    int row, group, first, last; /* pairs [first, last) of the row's list */
};

/* The pairs of blocks of this block of threads, in order, across tasks. */
struct pair_cursor {
    int task, n_live, pair, row, last;
};

/* Barriers of a pair in flight. Buffer b's latents come in halves (0: latents 0..255); each half is freed by the warpgroup
 * that owns those columns of the output, the rope tile by whoever reads it last. */
struct ring {
    uint64_t full[2][2], rope_full[2], free[2][2], rope_free[2], given[2];
    uint8_t valid[2][2][KEYS]; /* [parity of the pair][buffer] */
};

/* readers: warps that must free a half. An asynchronous copy's arrival says nothing about the flags in `valid`: they come
 * with arrivals of their own. */
template <bool FP8, int F> __device__ __forceinline__ void ring_init(ring *r, uint32_t readers = 4)
{
    for (int b = 0; b < 2; b++) {
        for (int h = 0; h < 2; h++) {
            barrier_init(&r->full[b][h], !FP8 && h == 0 ? 2 * F : F);
            barrier_init(&r->free[b][h], readers * WARP_ARRIVALS);
        }
        barrier_init(&r->rope_full[b], F);
        barrier_init(&r->rope_free[b], readers * WARP_ARRIVALS);
        barrier_init(&r->given[b], 4 * WARP_ARRIVALS);
    }
    barrier_init_fence();
}

/* The operand `bytes` further on than the one that d describes, in one addition: the high word is the layout. */
__device__ __forceinline__ uint64_t further(uint64_t d, uint32_t bytes)
{
    return (d & 0xffffffff00000000ull) | ((uint32_t)d + (bytes >> 4));
}

/* Keys that the fetching threads have stored, or copied asynchronously, as the tensor cores will read them. The fence is
 * the reader's: in the writer it would wait for the loads that are under way, too. */
__device__ __forceinline__ void wait_keys(uint64_t *full, uint32_t parity)
{
    barrier_wait(full, parity);
    fence_async_shared();
}

__device__ __forceinline__ void warp_arrive(uint64_t *b)
{
    barrier_arrive_warp(b, threadIdx.x & 31);
}

/* ---- which rows and keys ------------------------------------------------------------------------------------------ */

/* Blocks of 64 of a list: those whose first entry names a row. By all lanes of a warp. */
__device__ __forceinline__ int count_blocks(const job &j, int row)
{
    const int32_t *list = j.list + (size_t)row * j.k;
    int n = 0, most = (j.k + KEYS - 1) / KEYS;

#pragma unroll 1
    for (int i = threadIdx.x & 31; i - (int)(threadIdx.x & 31) < most; i += 32)
        n += __popc(__ballot_sync(~0u, i < most && (uint32_t)list[i * KEYS] < j.n_latent));
    return n;
}

/* The next task of this block of threads, at `task` or after it; the groups of a row are neighbours. By all lanes. Rows up
 * to n_max have memory, so that a list can be asked for before it is known whether its row is live. */
__device__ __forceinline__ bool next_work(const job &j, int n_live, int &task, work &w)
{
    int n_tasks = j.n_max * j.n_slices * j.n_groups;

#pragma unroll 1
    while (task < n_tasks) {
        int t = task / j.n_groups, slice = t % j.n_slices, i = t / j.n_slices;
        w.row = j.order && i < n_live ? j.order[i] : i;
        w.group = task - t * j.n_groups;
        task += gridDim.x;
        int dense = j.dense ? j.dense[w.row] : 0, n_pairs = (count_blocks(j, w.row) + 1) / 2;
        if (i >= n_live) return false;
        if (dense) continue;
        w.first = slice * j.pairs;
        w.last = w.first + j.pairs < n_pairs ? w.first + j.pairs : n_pairs;
        return true;
    }
    return false;
}

/* ---- fetching keys: one or two warpgroups --------------------------------------------------------------------------- */

__device__ __forceinline__ uint4 load16(const uint8_t *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
__device__ __forceinline__ float2 load8(const uint8_t *p)
{
    float2 v;
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ void prefetch_l2(const uint8_t *p, uint32_t bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}
/* A row of `bytes` that may begin anywhere in a line: a lane's own, where prefetch_l2 would go through the lanes in turn. */
template <int BYTES> __device__ __forceinline__ void prefetch_row(const uint8_t *p)
{
#pragma unroll
    for (int i = 0; i < BYTES; i += 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p + i));
    if (BYTES % 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + BYTES - 16));
}
__device__ __forceinline__ void store16(uint32_t smem, uint32_t x, uint32_t y, uint32_t z,
                                        uint32_t w)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(x), "r"(y), "r"(z),
                 "r"(w)
                 : "memory");
}
__device__ __forceinline__ uint4 load16_shared(uint32_t smem)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(smem)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b)
{
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
/* A power of two as both halves of a word. */
__device__ __forceinline__ uint32_t twice_bf16(float x)
{
    return __byte_perm(__float_as_uint(x), 0, 0x3232);
}
/* The factor of expanded latents of a key; 0 where there is no key, so that whatever lies there becomes zeros. */
__device__ __forceinline__ uint32_t factor_bf16(float scale, bool valid)
{
    return valid ? twice_bf16(scale * 0x1p120f) : 0;
}

/* The first task's list and queries on their way to L2, before anything is known. By all threads of the block. */
__device__ __forceinline__ void prefetch_first(const job &j)
{
    int t = (int)blockIdx.x / j.n_groups, group = (int)blockIdx.x - t * j.n_groups;
    size_t row = (size_t)(t / j.n_slices);
    int heads = j.n_heads < HEADS ? j.n_heads : HEADS, at = (int)threadIdx.x * 32;

    if (at < j.k) asm volatile("prefetch.global.L2 [%0];" ::"l"(j.list + row * (size_t)j.k + at));
    if (threadIdx.x == 128)
        prefetch_l2(j.q + (row * (size_t)j.n_heads + (size_t)group * HEADS) * D_KEY * 2,
                    (uint32_t)heads * D_KEY * 2);
}

__device__ __forceinline__ bool next_pair(const job &j, pair_cursor &c)
{
#pragma unroll 1
    while (++c.pair >= c.last) {
        work w;
        if (!next_work(j, c.n_live, c.task, w)) return false;
        c.pair = w.first - 1;
        c.row = w.row;
        c.last = w.last;
        if (threadIdx.x % 256 == 0) { /* the queries and the list will be wanted soon, too */
            if (j.k % 4 == 0)
                prefetch_l2((const uint8_t *)(j.list + (size_t)w.row * j.k), (uint32_t)j.k * 4);
            prefetch_l2(j.q + ((size_t)w.row * j.n_heads + (size_t)w.group * HEADS) * D_KEY * 2,
                        (uint32_t)(j.n_heads < HEADS ? j.n_heads : HEADS) * D_KEY * 2);
        }
    }
    return true;
}

/* Entry i of the cursor's pair, as it stands in the list: looked at (by `valid_row`) only when a later pair's turn comes. */
__device__ __forceinline__ int32_t entry(const job &j, const pair_cursor &c, int i)
{
    int at = c.pair * 2 * KEYS + i;
    return at < j.k ? __ldg(j.list + (size_t)c.row * j.k + at) : -1;
}
__device__ __forceinline__ int32_t valid_row(const job &j, int32_t x)
{
    return (uint32_t)x < j.n_latent ? x : -1;
}

__device__ __forceinline__ const uint8_t *record_fp8(const job &j, int32_t x)
{
    const uint8_t
        *p; /* made anew each time: kept, the addresses of four keys would cost eight registers */
    asm volatile("mad.wide.s32 %0, %1, %2, %3;"
                 : "=l"(p)
                 : "r"(x < 0 ? 0 : x), "n"((int)RECORD_FP8), "l"(j.latent));
    return p;
}

/* Instructions with the constant part of their shared address in them: as sums, the addresses of all barriers and tiles would
 * be kept in registers. */
template <int AT> __device__ __forceinline__ void wait_at(uint32_t smem, uint32_t parity)
{
    asm volatile("{\n.reg .pred p;\nWAIT_%=:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0 + %2], %1;\n"
                 "@!p bra WAIT_%=;\n}" ::"r"(smem),
                 "r"(parity), "n"(AT)
                 : "memory");
}
template <int AT> __device__ __forceinline__ void arrive_at(uint32_t smem)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0 + %1];" ::"r"(smem), "n"(AT) : "memory");
}
template <int AT> __device__ __forceinline__ void copies_arrive_at(uint32_t smem)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0 + %1];" ::"r"(smem), "n"(AT)
                 : "memory");
}
template <int AT>
__device__ __forceinline__ void copy16_at(uint32_t smem, const void *global, int src_bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0 + %3], [%1], 16, %2;" ::"r"(smem),
                 "l"(global), "r"(src_bytes), "n"(AT)
                 : "memory");
}
template <int AT> __device__ __forceinline__ void store16_at(uint32_t smem, const uint32_t (&x)[4])
{
    asm volatile("st.shared.v4.u32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(smem), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3]), "n"(AT)
                 : "memory");
}

/* 16 latents e4m3 -> 8 and 8 bf16, in the order above. */
__device__ __forceinline__ void expand_words(uint4 v, uint32_t factor, uint32_t (&even)[4],
                                             uint32_t (&odd)[4])
{
    uint32_t w[4] = {v.x, v.y, v.z, v.w};

#pragma unroll
    for (int i = 0; i < 4; i++) {
        even[i] = multiply2(((w[i] << 4) & 0x07f007f0u) | ((w[i] << 8) & 0x80008000u), factor);
        odd[i] = multiply2(((w[i] >> 4) & 0x07f007f0u) | (w[i] & 0x80008000u), factor);
    }
}
/* -> chunks 2q and 2q + 1 of a tile row. */
template <int AT>
__device__ __forceinline__ void expand16(uint4 v, uint32_t factor, uint32_t smem_even,
                                         uint32_t smem_odd)
{
    uint32_t even[4], odd[4];

    expand_words(v, factor, even, odd);
    store16_at<AT>(smem_even, even);
    store16_at<AT>(smem_odd, odd);
}

/* What a fetching thread of fp8 records has: four neighbours have one key of each block, and read 64 bytes of it at a time,
 * a tile's row; half a key's latents are in registers, on their way. */
struct fetch_fp8 {
    int32_t now[2], soon[2]; /* [block]: keys of this pair and of the next */
    uint4 raw[4];            /* [tile] */
    float2 scale;
    uint32_t ring_at, even, odd,
        parity; /* shared addresses; `even`, `odd`: of the chunks in the first tile of block 0 */
    pair_cursor at;
};

/* Which of the four neighbours, and which of 64 keys: read anew each time, as above. */
__device__ __forceinline__ int fetch_thread()
{
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
__device__ __forceinline__ int fetch_quarter()
{
    return fetch_thread() & 3;
}
__device__ __forceinline__ int fetch_row()
{
    return fetch_thread() % 256 / 4;
}

__device__ __forceinline__ void fetch_entries(const job &j, fetch_fp8 &f, int32_t (&x)[2],
                                              bool &any)
{
    any = any && next_pair(j, f.at);
    int row = fetch_row();
    x[0] = any ? entry(j, f.at, row) : -1;
    x[1] = any ? entry(j, f.at, KEYS + row) : -1;
}

/* The list has come: the keys that are there, and their records on their way to L2, by two lanes a key. */
__device__ __forceinline__ void fetch_validate(const job &j, int32_t (&x)[2])
{
    x[0] = valid_row(j, x[0]);
    x[1] = valid_row(j, x[1]);
    int q = fetch_quarter();
    int32_t mine = q & 1 ? x[1] : x[0];
    if (q < 2 && mine >= 0) prefetch_row<RECORD_FP8>(record_fp8(j, mine));
}

template <int I> __device__ __forceinline__ void fetch_load(const job &j, fetch_fp8 &f, int32_t key)
{
    const uint8_t *p = record_fp8(j, key);
    f.scale = load8(p + SCALES_AT + 8 * half_side(I));
    p += 16 * fetch_quarter();
#pragma unroll
    for (int t = 0; t < 4; t++)
        f.raw[t] = load16(p + 256 * half_side(I) + 64 * t);
}

/* Store half I of a pair, and ask for the next. */
template <int I> __device__ __forceinline__ void fetch_half(const job &j, fetch_fp8 &f)
{
    constexpr int B = half_block(I), H = half_side(I);
    constexpr int FULL = (int)offsetof(ring, full) + 8 * (2 * B + H);
    constexpr int FREE = (int)offsetof(ring, free) + 8 * (2 * B + H);
    constexpr int TO = B * BLOCK + 4 * H * TILE, ROPE_TO = B * BLOCK + ROPE_TILE * TILE;

    if (I == 2) fetch_validate(j, f.soon);
    uint32_t f0 = factor_bf16(f.scale.x, f.now[B] >= 0);
    uint32_t f1 = factor_bf16(f.scale.y, f.now[B] >= 0);
    if (H == 0) {
        const uint8_t *p = record_fp8(j, f.now[B]) + ROPE_AT + 32 * fetch_quarter();
        wait_at<(int)offsetof(ring, rope_free) + 8 * B>(f.ring_at, f.parity);
        copy16_at<ROPE_TO>(f.even, p, f.now[B] < 0 ? 0 : 16);
        copy16_at<ROPE_TO>(f.odd, p + 16, f.now[B] < 0 ? 0 : 16);
        copies_arrive_at<(int)offsetof(ring, rope_full) + 8 * B>(f.ring_at);
    }
    wait_at<FREE>(f.ring_at, f.parity);
    if (H == 0 && fetch_quarter() == 0)
        asm volatile("st.shared.u8 [%0 + %2], %1;" ::"r"(f.ring_at + (f.parity ^ 1) * 2 * KEYS +
                                                         (uint32_t)fetch_row()),
                     "r"(f.now[B] >= 0 ? 1 : 0), "n"((int)offsetof(ring, valid) + B * KEYS)
                     : "memory");
    expand16<TO>(f.raw[0], f0, f.even, f.odd);
    expand16<TO + TILE>(f.raw[1], f0, f.even, f.odd);
    expand16<TO + 2 * TILE>(f.raw[2], f1, f.even, f.odd);
    expand16<TO + 3 * TILE>(f.raw[3], f1, f.even, f.odd);
    arrive_at<FULL>(f.ring_at);
    if constexpr (I < 3) fetch_load<I + 1>(j, f, f.now[half_block(I + 1)]);
}

__device__ __forceinline__ void produce_fp8(const job &j, ring *ring, uint32_t keys, int n_live)
{
    fetch_fp8 f;
    bool have = true;

    int row = fetch_row();
    f.even = keys + (uint32_t)(row * 128 + (((2 * fetch_quarter()) ^ (row & 7)) << 4));
    f.odd = f.even ^ 16;
    f.ring_at = smem_address(ring);
    f.parity = 1; /* a fresh barrier counts as freed before */
    f.at = {(int)blockIdx.x, n_live, -1, 0, 0};
    fetch_entries(j, f, f.now, have);
    fetch_validate(j, f.now);
    fetch_load<0>(j, f, f.now[half_block(0)]);
    bool next = have;
    fetch_entries(j, f, f.soon, next);
#pragma unroll 1
    while (have) {
        fetch_half<0>(j, f);
        fetch_half<1>(j, f);
        fetch_half<2>(j, f);
        fetch_half<3>(j, f);
        f.parity ^= 1;
        f.now[0] = f.soon[0];
        f.now[1] = f.soon[1];
        have = next;
        fetch_entries(j, f, f.soon, next); /* while the fewest registers hold keys */
        fetch_load<0>(j, f, f.now[half_block(0)]);
    }
}

/* bf16: 8 neighbours copy 128 bytes of each of R rows of a block; no register in between. */
template <int F>
__device__ __forceinline__ void produce_bf16(const job &j, ring *ring, uint32_t keys, int n_live)
{
    enum { R = 512 / F, STEP = KEYS / R };
    int g = threadIdx.x % F / 8, chunk = threadIdx.x & 7;
    pair_cursor c = {(int)blockIdx.x, n_live, -1, 0, 0};
    int32_t now[2][R], soon[2][R]; /* [block][row] of this pair and of the next */
    uint32_t parity = 1, line = keys + (uint32_t)(g * 128) + ((uint32_t)(chunk ^ (g & 7)) << 4);

    auto entries = [&](int32_t(&x)[2][R], bool &any) {
        any = any && next_pair(j, c);
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            x[i / R][i % R] = any ? entry(j, c, STEP * i + g) : -1;
    };
    auto prefetch = [&](const int32_t(&x)[2][R]) {
        int32_t mine = -1;
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            mine = chunk == i ? x[i / R][i % R] : mine;
        if (mine >= 0) prefetch_row<RECORD_BF16>(j.latent + (size_t)mine * RECORD_BF16);
    };
    auto copy = [&](int b, int t, int n, const int32_t(&x)[R]) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            int32_t key = x[r] < 0 ? 0 : x[r];
            const uint8_t *p = j.latent + (size_t)key * RECORD_BF16 + 16 * chunk;
            uint32_t to = line + (uint32_t)(b * BLOCK + r * STEP * 128);
#pragma unroll
            for (int i = t; i < t + n; i++) /* tiles */
                async_copy16(to + (uint32_t)(i * TILE), p + 128 * i, x[r] < 0 ? 0 : 16);
        }
    };
    auto validate = [&](int32_t(&x)[2][R]) {
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            x[i / R][i % R] = valid_row(j, x[i / R][i % R]);
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
            barrier_wait(&ring->free[b][h], parity);
            if (h == 0) {
#pragma unroll
                for (int r = 0; r < R; r++)
                    if (chunk == 0) ring->valid[parity ^ 1][b][g + r * STEP] = now[b][r] >= 0;
                barrier_arrive(&ring->full[b][h]);
            }
            copy(b, 4 * h, 4, now[b]);
            async_copy_arrive(&ring->full[b][h]);
            if (h == 0) {
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

template <bool FP8, bool WALK>
__device__ __forceinline__ void produce(const job &j, ring *ring, uint32_t keys, int n_live)
{
    if (FP8)
        produce_fp8(j, ring, keys, n_live);
    else
        produce_bf16<FETCHERS<FP8, WALK>>(j, ring, keys, n_live);
}

/* n_rows query rows of 576 from global memory into tiles of ROWS rows, by threads 0..255; rows after them are zeros. AT_ONCE
 * loads of 32 bytes are under way before the first store. */
template <bool FP8, int ROWS, int AT_ONCE>
__device__ __forceinline__ void load_queries(const uint8_t *q, int n_rows, uint32_t tiles)
{
    constexpr int PIECES = ROWS * 36, N = (PIECES + 255) / 256; /* 36 pieces of 16 numbers a row */

#pragma unroll 1
    for (int first = 0; first < N; first += AT_ONCE) {
        uint4 a[AT_ONCE], b[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            int i = (int)threadIdx.x + 256 * (first + n), row = i / 36;
            a[n] = b[n] = {0, 0, 0, 0};
            if (i < PIECES && row < n_rows) {
                const uint8_t *p = q + (size_t)row * (D_KEY * 2) + 32 * (i - row * 36);
                a[n] = load16(p);
                b[n] = load16(p + 16);
            }
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            int i = (int)threadIdx.x + 256 * (first + n), row = i / 36, at = i - row * 36;
            int chunk = 2 * (at & 3);
            if (i >= PIECES) continue;
            uint4 x = a[n], y = b[n];
            uint32_t to = tiles + (uint32_t)(at / 4 * (ROWS * 128) + row * 128);
            uint32_t even = to + ((uint32_t)(chunk ^ (row & 7)) << 4);
            uint32_t odd = to + ((uint32_t)((chunk + 1) ^ (row & 7)) << 4);
            if (FP8 && at < 32) { /* the order that expand16 leaves latents in */
                store16(even, __byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                        __byte_perm(y.x, y.y, 0x5410), __byte_perm(y.z, y.w, 0x5410));
                store16(odd, __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632),
                        __byte_perm(y.x, y.y, 0x7632), __byte_perm(y.z, y.w, 0x7632));
            } else {
                store16(even, x.x, x.y, x.z, x.w);
                store16(odd, y.x, y.y, y.z, y.w);
            }
        }
    }
}

/* ---- softmax of a block ---------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* 2^d for a whole d <= 0, exactly; NaN (-inf less -inf: nothing so far, and nothing new) gives 1. */
__device__ __forceinline__ float exp2_whole(float d)
{
    return d < -126.0f ? 0.0f : __int_as_float(((int)d + 127) << 23);
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

/* Probabilities of 64 heads x 64 keys in one warpgroup, as the A operand of the values: a thread has two heads. They are
 * 2^(score - reference) with a whole reference for each head and block: changing to another reference is exact, so when,
 * and by whom, it is changed cannot show. */
struct probs {
    uint32_t p[16];
    float reference[2], sum[2];
};

__device__ __forceinline__ void softmax(float (&s)[32], const uint8_t *valid, float scale, probs &b)
{
    int q = threadIdx.x & 3;
    uint32_t all = 0x0101;

#pragma unroll
    for (int g = 0; g < 8; g++)
        all &= *(const uint16_t *)(valid + 8 * g + 2 * q);
    if (all != 0x0101) {
        asm volatile("" ::: "memory"); /* read them anew: registers are short */
#pragma unroll
        for (int g = 0; g < 8; g++) {
            uint32_t v = *(const uint16_t *)(valid + 8 * g + 2 * q);
            if (!(v & 1)) s[4 * g] = s[4 * g + 2] = -CUDART_INF_F;
            if (!(v >> 8)) s[4 * g + 1] = s[4 * g + 3] = -CUDART_INF_F;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float max = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
        for (int g = 1; g < 8; g++)
            max = fmaxf(max, fmaxf(s[4 * g + 2 * r], s[4 * g + 2 * r + 1]));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
        b.reference[r] = ceilf(max * scale);
        float base = b.reference[r] == -CUDART_INF_F ? 0.0f : -b.reference[r], sum[2] = {0, 0};
#pragma unroll
        for (int g = 0; g < 8; g++) {
            float x = exp2_fast(__fmaf_rn(s[4 * g + 2 * r], scale, base));
            float y = exp2_fast(__fmaf_rn(s[4 * g + 2 * r + 1], scale, base));
            sum[0] += x;
            sum[1] += y;
            b.p[2 * g + r] = pack_bf16(x, y);
        }
        b.sum[r] = sum[0] + sum[1];
    }
}

/* What the values of two heads of a thread stand at. sum: of even and of odd blocks, each in order, or of one of the two. */
template <int N_SUMS> struct state {
    float reference[2], sum[N_SUMS][2];
};

template <int N_SUMS> __device__ __forceinline__ void state_clear(state<N_SUMS> &s)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        s.reference[r] = -CUDART_INF_F;
#pragma unroll
        for (int i = 0; i < N_SUMS; i++)
            s.sum[i][r] = 0.0f;
    }
}

/* Change the state, and the probabilities of a block, to a reference that suits both; keep: what the values must be
 * multiplied by. series: which sum takes the block's in (the warpgroup that made it counts it), -1: none does. */
template <int N_SUMS>
__device__ __forceinline__ void take_reference(state<N_SUMS> &s, probs &b, int series,
                                               float (&keep)[2])
{
    uint32_t take[2];

#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = fmaxf(s.reference[r], b.reference[r]);
        float f = exp2_whole(b.reference[r] - top);
        keep[r] = exp2_whole(s.reference[r] - top);
        take[r] = twice_bf16(f);
        s.reference[r] = top;
#pragma unroll
        for (int i = 0; i < N_SUMS; i++) {
            s.sum[i][r] *= keep[r];
            if (series >= 0) s.sum[i][r] = __fmaf_rn(series == i ? b.sum[r] : 0.0f, f, s.sum[i][r]);
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++)
        b.p[i] = multiply2(b.p[i], take[i & 1]);
}

/* o = o keep + P V for a block: v is the tile of the first column, o in N parts of R / 32 tiles. The instructions are under
 * way on return, in two groups, and p is theirs: one half each. */
template <int N, int R>
__device__ __forceinline__ void take_values(float (&o)[N][R], const float (&keep)[2],
                                            const uint32_t (&p)[16], uint32_t v)
{
    if (__any_sync(~0u, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < N * R; i++)
            o[i / R][i % R] *= keep[i / 2 % 2];
    }
    uint64_t d = matrix_descriptor(v, TILE, 1024, LAYOUT_SWIZZLE_128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int n = 0; n < N; n++)
            mma_values(o[n], p + 4 * k, further(d, (uint32_t)(n * (R / 32) * TILE + k * 2048)));
        if (k & 1) wgmma_commit();
    }
}

/* o += P V for one more block, behind take_values: the same reference, another group of instructions. */
template <int N, int R>
__device__ __forceinline__ void add_values(float (&o)[N][R], const uint32_t (&p)[16], uint32_t v)
{
    uint64_t d = matrix_descriptor(v, TILE, 1024, LAYOUT_SWIZZLE_128);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int n = 0; n < N; n++)
            mma_values(o[n], p + 4 * k, further(d, (uint32_t)(n * (R / 32) * TILE + k * 2048)));
    wgmma_commit();
}

/* The row's sum of a head from its two series, whole in each of the four threads that share the head. */
__device__ __forceinline__ float sum_of_four(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* Of four words of each of four neighbours, x[i] of lane q, lane q gets those with i = q, in the lanes' order. */
__device__ __forceinline__ uint4 quad_transpose(const uint32_t (&x)[4])
{
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
    uint32_t b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
    uint32_t low0 = odd ? a : x[0], low1 = odd ? x[1] : a; /* of i = q & 1, from two lanes */
    uint32_t high0 = odd ? b : x[2], high1 = odd ? x[3] : b;
    uint32_t c = __shfl_xor_sync(~0u, high ? low0 : high0, 2);
    uint32_t d = __shfl_xor_sync(~0u, high ? low1 : high1, 2);
    if (high) return {c, d, high0, high1};
    return {low0, low1, c, d};
}

/* o, scaled, to the columns of `out` (of the thread's first head); the second head is 8 further. */
template <bool FP8, int N, int R>
__device__ __forceinline__ void store_values(uint8_t *out, const float (&o)[N][R], float f0,
                                             float f1)
{
    int q = threadIdx.x & 3;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint8_t *to = out + (size_t)r * 8 * D_LATENT * 2;
        float f = r ? f1 : f0;
#pragma unroll
        for (int g = 0; g < N * R / 4; g += 4) { /* 32 columns */
            uint32_t x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *a = &o[4 * (g + i) / R][4 * (g + i) % R + 2 * r], *b = a;
                if (FP8) /* tiles hold 4 neighbouring columns of a thread in two groups of 8 */
                    a = &o[4 * (g + i / 2 * 2) / R][4 * (g + i / 2 * 2) % R + 2 * r + i % 2],
                    b = a + 4;
                else
                    b = a + 1;
                /* + 0: no negative zeros, which would tell padding apart */
                x[i] = pack_bf16(__fmaf_rn(*a, f, 0.0f), __fmaf_rn(*b, f, 0.0f));
            }
            if (FP8) {
                *(uint2 *)(to + 16 * g + 8 * q) = {x[0], x[1]};
                *(uint2 *)(to + 16 * g + 32 + 8 * q) = {x[2], x[3]};
            } else {
                *(uint4 *)(to + 16 * g + 16 * q) = quad_transpose(x);
            }
        }
    }
}

__device__ __forceinline__ float inverse(float sum)
{
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

} // namespace mla
} // namespace tr

#endif
