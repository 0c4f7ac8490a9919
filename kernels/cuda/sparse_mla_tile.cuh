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

/* Two warpgroups compute; F = 128 or 256 threads fetch. Registers: 256 x 200 + 128 x 104 = 384 x 168, and
 * 256 x 192 + 256 x 64 = 512 x 128. Where the values fill the registers there is no room for 512 threads. */
template <int F> constexpr int MATH_REGISTERS = F == 128 ? 200 : 192;
template <int F> constexpr int FETCH_REGISTERS = F == 128 ? 104 : 64;

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
};

/* Barriers of a pair in flight. Buffer b's latents come in halves (0: latents 0..255); each half is freed by the warpgroup
 * that owns those columns of the output, the rope tile by whoever reads it last. */
struct ring {
    uint64_t full[2][2], rope_full[2], free[2][2], rope_free[2], given[2];
    uint8_t valid[2][2][KEYS]; /* [parity of the pair][buffer] */
};

/* An asynchronous copy's arrival says nothing about the flags in `valid`: they come with arrivals of their own. */
template <bool FP8, int F> __device__ __forceinline__ void ring_init(ring *r)
{
    for (int b = 0; b < 2; b++) {
        for (int h = 0; h < 2; h++) {
            barrier_init(&r->full[b][h], !FP8 && h == 0 ? 2 * F : F);
            barrier_init(&r->free[b][h], 4);
        }
        barrier_init(&r->rope_full[b], F);
        barrier_init(&r->rope_free[b], 4);
        barrier_init(&r->given[b], 4);
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

/* All lanes of a converged warp have done their part. */
__device__ __forceinline__ void warp_arrive(uint64_t *b)
{
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(b);
}

/* ---- which rows and keys ------------------------------------------------------------------------------------------ */

struct work {
    int row, group, first, last; /* pairs [first, last) of the row's list */
};

/* Blocks of 64 of a list: those whose first entry names a row. By all lanes of a warp. */
__device__ __forceinline__ int count_blocks(const job &j, int row)
{
    const int32_t *list = j.list + (size_t)row * j.k;
    int n = 0, most = (j.k + KEYS - 1) / KEYS;

    for (int i = threadIdx.x & 31; i - (int)(threadIdx.x & 31) < most; i += 32)
        n += __popc(__ballot_sync(~0u, i < most && (uint32_t)list[i * KEYS] < j.n_latent));
    return n;
}

/* The next task of this block of threads, at `task` or after it; the groups of a row are neighbours. By all lanes. Rows up
 * to n_max have memory, so that a list can be asked for before it is known whether its row is live. */
__device__ __forceinline__ bool next_work(const job &j, int n_live, int &task, work &w)
{
    int n_tasks = j.n_max * j.n_slices * j.n_groups;

    while (task < n_tasks) {
        int t = task / j.n_groups, slice = t % j.n_slices;
        w.row = t / j.n_slices;
        w.group = task - t * j.n_groups;
        task += gridDim.x;
        int dense = j.dense ? j.dense[w.row] : 0, n_pairs = (count_blocks(j, w.row) + 1) / 2;
        if (w.row >= n_live) return false;
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

/* 16 latents e4m3 -> chunks 2q and 2q + 1 of a tile row. */
__device__ __forceinline__ void expand16(uint4 v, uint32_t factor, uint32_t smem_even,
                                         uint32_t smem_odd)
{
    uint32_t w[4] = {v.x, v.y, v.z, v.w}, even[4], odd[4];

#pragma unroll
    for (int i = 0; i < 4; i++) {
        even[i] = multiply2(((w[i] << 4) & 0x07f007f0u) | ((w[i] << 8) & 0x80008000u), factor);
        odd[i] = multiply2(((w[i] >> 4) & 0x07f007f0u) | (w[i] & 0x80008000u), factor);
    }
    store16(smem_even, even[0], even[1], even[2], even[3]);
    store16(smem_odd, odd[0], odd[1], odd[2], odd[3]);
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

/* The pairs of blocks of this block of threads, in order, across tasks. */
struct pair_cursor {
    int task, n_live, pair;
    work w;
};

__device__ __forceinline__ bool next_pair(const job &j, pair_cursor &c)
{
    while (++c.pair >= c.w.last) {
        if (!next_work(j, c.n_live, c.task, c.w)) return false;
        c.pair = c.w.first - 1;
        if (threadIdx.x % 256 == 0) { /* the queries and the list will be wanted soon, too */
            if (j.k % 4 == 0)
                prefetch_l2((const uint8_t *)(j.list + (size_t)c.w.row * j.k), (uint32_t)j.k * 4);
            prefetch_l2(j.q + ((size_t)c.w.row * j.n_heads + (size_t)c.w.group * HEADS) * D_KEY * 2,
                        (uint32_t)(j.n_heads < HEADS ? j.n_heads : HEADS) * D_KEY * 2);
        }
    }
    return true;
}

/* Entry i of the cursor's pair, as it stands in the list: looked at (by `valid_row`) only when a later pair's turn comes. */
__device__ __forceinline__ int32_t entry(const job &j, const pair_cursor &c, int i)
{
    int at = c.pair * 2 * KEYS + i;
    return at < j.k ? __ldg(j.list + (size_t)c.w.row * j.k + at) : -1;
}
__device__ __forceinline__ int32_t valid_row(const job &j, int32_t x)
{
    return (uint32_t)x < j.n_latent ? x : -1;
}

__device__ __forceinline__ const uint8_t *record_fp8(const job &j, int32_t x)
{
    return j.latent + (size_t)(x < 0 ? 0 : x) * RECORD_FP8;
}

/* fp8: four neighbours have R keys of each block, and read 64 bytes of each at a time: a tile's row. */
template <int F>
__device__ __forceinline__ void produce_fp8(const job &j, ring *ring, uint32_t keys, int n_live)
{
    constexpr int R = 256 / F, STEP = KEYS / R; /* keys of a thread, and how far apart */
    int tid = threadIdx.x % F, row = tid / 4, q = tid & 3;
    uint32_t line = keys + (uint32_t)(row * 128);
    uint32_t even = (uint32_t)((2 * q) ^ (row & 7)) << 4, odd = (uint32_t)((2 * q + 1) ^ (row & 7))
                                                                << 4;
    pair_cursor c = {(int)blockIdx.x, n_live, -1, {0, 0, 0, 0}};
    int32_t now[2][R], soon[2][R]; /* [block] of this pair and of the next */
    uint32_t parity = 1;           /* a fresh barrier counts as freed before */
    uint4 raw[R][4];               /* [.][tile]: of the half that is stored next, and its scales */
    float2 scale[R];

    auto entries = [&](int32_t(&x)[2][R], bool any) {
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            x[i / R][i % R] = any ? entry(j, c, STEP * i + row) : -1;
    };
    auto prefetch = [&](const int32_t(&x)[2][R]) {
        int32_t mine = q & 1 ? x[1][0] : x[0][0];
        if (R == 2 && q & 2) mine = q & 1 ? x[1][R - 1] : x[0][R - 1];
        if (q < 2 * R && mine >= 0) prefetch_row<RECORD_FP8>(record_fp8(j, mine));
    };
    auto rope = [&](int b, const int32_t(&x)[R]) {
        barrier_wait(&ring->rope_free[b], parity);
#pragma unroll
        for (int r = 0; r < R; r++) {
            const uint8_t *p = record_fp8(j, x[r]) + ROPE_AT + 32 * q;
            uint32_t to = line + (uint32_t)(b * BLOCK + ROPE_TILE * TILE + r * STEP * 128);
            async_copy16(to + even, p, x[r] < 0 ? 0 : 16);
            async_copy16(to + odd, p + 16, x[r] < 0 ? 0 : 16);
        }
        async_copy_arrive(&ring->rope_full[b]);
    };
    /* Store the half at hand, and ask for the next one (of keys `next`) as registers fall free. */
    auto half = [&](int b, int h, const int32_t(&x)[R], const int32_t(&next)[R], int next_half) {
        uint32_t f[R][2];
#pragma unroll
        for (int r = 0; r < R; r++) {
            f[r][0] = factor_bf16(scale[r].x, x[r] >= 0);
            f[r][1] = factor_bf16(scale[r].y, x[r] >= 0);
            scale[r] = load8(record_fp8(j, next[r]) + SCALES_AT + 8 * next_half);
        }
        barrier_wait(&ring->free[b][h], parity);
#pragma unroll
        for (int r = 0; r < R; r++) {
            const uint8_t *p = record_fp8(j, next[r]) + 256 * next_half + 16 * q;
            if (h == 0 && q == 0) ring->valid[parity ^ 1][b][row + r * STEP] = x[r] >= 0;
#pragma unroll
            for (int t = 0; t < 4; t++) {
                uint32_t to = line + (uint32_t)(b * BLOCK + (4 * h + t) * TILE + r * STEP * 128);
                expand16(raw[r][t], f[r][t / 2], to + even, to + odd);
                raw[r][t] = load16(p + 64 * t);
            }
        }
        barrier_arrive(&ring->full[b][h]);
    };

    auto validate = [&](int32_t(&x)[2][R]) {
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            x[i / R][i % R] = valid_row(j, x[i / R][i % R]);
    };

    bool have = next_pair(j, c);
    entries(now, have);
    validate(now);
    prefetch(now);
#pragma unroll
    for (int r = 0; r < R; r++) {
        const uint8_t *p = record_fp8(j, now[0][r]);
        scale[r] = load8(p + SCALES_AT);
#pragma unroll
        for (int t = 0; t < 4; t++)
            raw[r][t] = load16(p + 64 * t + 16 * q);
    }
    while (have) {
        bool more = next_pair(j, c);
        entries(soon, more);
        rope(0, now[0]);
        half(0, 0, now[0], now[0], 1);
        half(0, 1, now[0], now[1], 0);
        validate(soon); /* the list has had the time of two halves to come, the keys have another */
        prefetch(soon);
        rope(1, now[1]);
        half(1, 0, now[1], now[1], 1);
        half(1, 1, now[1], soon[0], 0);
        parity ^= 1;
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            now[i / R][i % R] = soon[i / R][i % R];
        have = more;
    }
}

/* bf16: 8 neighbours copy 128 bytes of each of R rows of a block; no register in between. */
template <int F>
__device__ __forceinline__ void produce_bf16(const job &j, ring *ring, uint32_t keys, int n_live)
{
    constexpr int R = 512 / F, STEP = KEYS / R;
    int g = threadIdx.x % F / 8, chunk = threadIdx.x & 7;
    pair_cursor c = {(int)blockIdx.x, n_live, -1, {0, 0, 0, 0}};
    int32_t now[2][R], soon[2][R]; /* [block][row] of this pair and of the next */
    uint32_t parity = 1, line = keys + (uint32_t)(g * 128) + ((uint32_t)(chunk ^ (g & 7)) << 4);

    auto entries = [&](int32_t(&x)[2][R], bool any) {
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
    auto copy =
        [&](int b, int t, int n,
            const int32_t(&x)[R]) { /* tiles [t, t + n) */
#pragma unroll
                                    for (int r = 0; r < R; r++) {
                                        const uint8_t *p =
                                            j.latent + (size_t)(x[r] < 0 ? 0 : x[r]) * RECORD_BF16 +
                                            16 * chunk;
#pragma unroll
                                        for (int i = 0; i < n; i++)
                                            async_copy16(line +
                                                             (uint32_t)(b * BLOCK + (t + i) * TILE +
                                                                        r * STEP * 128),
                                                         p + 128 * (t + i), x[r] < 0 ? 0 : 16);
                                    }
        };
    auto half = [&](int b, int h, const int32_t(&x)[R]) {
        barrier_wait(&ring->free[b][h], parity);
        if (h == 0) {
#pragma unroll
            for (int r = 0; r < R; r++)
                if (chunk == 0) ring->valid[parity ^ 1][b][g + r * STEP] = x[r] >= 0;
            barrier_arrive(&ring->full[b][h]);
        }
        copy(b, 4 * h, 4, x);
        async_copy_arrive(&ring->full[b][h]);
        if (h == 0) {
            barrier_wait(&ring->rope_free[b], parity);
            copy(b, ROPE_TILE, 1, x);
            async_copy_arrive(&ring->rope_full[b]);
        }
    };

    auto validate = [&](int32_t(&x)[2][R]) {
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            x[i / R][i % R] = valid_row(j, x[i / R][i % R]);
    };

    bool have = next_pair(j, c);
    entries(now, have);
    validate(now);
    while (have) {
        bool more = next_pair(j, c);
        entries(soon, more);
        half(0, 0, now[0]);
        half(0, 1, now[0]);
        validate(soon);
        prefetch(soon);
        half(1, 0, now[1]);
        half(1, 1, now[1]);
        parity ^= 1;
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            now[i / R][i % R] = soon[i / R][i % R];
        have = more;
    }
}

template <bool FP8, int F>
__device__ __forceinline__ void produce(const job &j, ring *ring, uint32_t keys, int n_live)
{
    if (FP8)
        produce_fp8<F>(j, ring, keys, n_live);
    else
        produce_bf16<F>(j, ring, keys, n_live);
}

/* n_rows query rows of 576 from global memory into tiles of ROWS rows, by threads 0..255; rows after them are zeros. All
 * loads are under way before the first store. */
template <bool FP8, int ROWS>
__device__ __forceinline__ void load_queries(const uint8_t *q, int n_rows, uint32_t tiles)
{
    constexpr int PIECES = ROWS * 36, N = (PIECES + 255) / 256; /* 36 pieces of 16 numbers a row */
    uint4 a[N], b[N];

#pragma unroll
    for (int n = 0; n < N; n++) {
        int i = (int)threadIdx.x + 256 * n, row = i / 36;
        a[n] = b[n] = {0, 0, 0, 0};
        if (i < PIECES && row < n_rows) {
            const uint8_t *p = q + (size_t)row * (D_KEY * 2) + 32 * (i - row * 36);
            a[n] = load16(p);
            b[n] = load16(p + 16);
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        int i = (int)threadIdx.x + 256 * n, row = i / 36, at = i - row * 36, c = 2 * (at & 3);
        if (i >= PIECES) continue;
        uint4 x = a[n], y = b[n];
        uint32_t to = tiles + (uint32_t)(at / 4 * (ROWS * 128) + row * 128);
        uint32_t even = to + ((uint32_t)(c ^ (row & 7)) << 4);
        uint32_t odd = to + ((uint32_t)((c + 1) ^ (row & 7)) << 4);
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
    uint32_t v[8], all = 0x0101;

#pragma unroll
    for (int g = 0; g < 8; g++) {
        v[g] = *(const uint16_t *)(valid + 8 * g + 2 * q);
        all &= v[g];
    }
    if (all != 0x0101) {
#pragma unroll
        for (int g = 0; g < 8; g++) {
            if (!(v[g] & 1)) s[4 * g] = s[4 * g + 2] = -CUDART_INF_F;
            if (!(v[g] >> 8)) s[4 * g + 1] = s[4 * g + 3] = -CUDART_INF_F;
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

/* What the values of two heads of a thread stand at. sum: of even and of odd blocks, each in order. */
struct state {
    float reference[2], sum[2][2];
};

__device__ __forceinline__ void state_clear(state &s)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        s.reference[r] = -CUDART_INF_F;
        s.sum[0][r] = s.sum[1][r] = 0.0f;
    }
}

/* Change the state, and the probabilities of a block, to a reference that suits both; keep: what the values must be
 * multiplied by. `counts`: the block's sum is taken in too (once, by the warpgroup that made it). */
__device__ __forceinline__ void take_reference(state &s, probs &b, int parity, bool counts,
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
        s.sum[0][r] *= keep[r];
        s.sum[1][r] *= keep[r];
        if (counts) {
            s.sum[0][r] = __fmaf_rn(parity ? 0.0f : b.sum[r], f, s.sum[0][r]);
            s.sum[1][r] = __fmaf_rn(parity ? b.sum[r] : 0.0f, f, s.sum[1][r]);
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++)
        b.p[i] = multiply2(b.p[i], take[i & 1]);
}

/* o = o keep + P V for a block: v is the tile of the first column. The instructions are under way on return, and p is
 * theirs. */
template <int R>
__device__ __forceinline__ void take_values(float (&o)[R], const float (&keep)[2],
                                            const uint32_t (&p)[16], uint32_t v)
{
    if (__any_sync(~0u, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < R; i += 4) {
            o[i] *= keep[0];
            o[i + 1] *= keep[0];
            o[i + 2] *= keep[1];
            o[i + 3] *= keep[1];
        }
    }
    uint64_t d = matrix_descriptor(v, TILE, 1024, LAYOUT_SWIZZLE_128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
        mma_values(o, p + 4 * k, further(d, (uint32_t)(k * 2048)));
    wgmma_commit();
}

/* The row's sum of a head from its two series, whole in each of the four threads that share the head. */
__device__ __forceinline__ float sum_of_four(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* o, scaled, to the columns of `out` (of the thread's first head); the second head is 8 further. */
template <bool FP8, int R>
__device__ __forceinline__ void store_values(uint8_t *out, const float (&o)[R], float f0, float f1)
{
    int q = threadIdx.x & 3;

#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint8_t *to = out + (size_t)r * 8 * D_LATENT * 2;
        float f = r ? f1 : f0;
#pragma unroll
        for (int g = 0; g < R / 4;
             g += 2) { /* + 0: no negative zeros, which would tell padding apart */
            const float *a = o + 4 * g + 2 * r, *b = a + 4;
            float x0 = __fmaf_rn(a[0], f, 0.0f), x1 = __fmaf_rn(a[1], f, 0.0f);
            float y0 = __fmaf_rn(b[0], f, 0.0f), y1 = __fmaf_rn(b[1], f, 0.0f);
            if (FP8) {
                *(uint2 *)(to + 16 * g + 8 * q) = {pack_bf16(x0, y0), pack_bf16(x1, y1)};
            } else {
                *(uint32_t *)(to + 16 * g + 4 * q) = pack_bf16(x0, x1);
                *(uint32_t *)(to + 16 * g + 16 + 4 * q) = pack_bf16(y0, y1);
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
