/* Selection for few rows: a cluster of CTAs per row, each of which reads its part once and keeps its keys (registers, or
 * shared memory where a part is long). The bin of the k-th key is found by a histogram across the cluster; the keys of that
 * bin, mostly few, are then sent to every CTA, and each looks for the k-th among them alone: a barrier of the cluster costs
 * as much as a pass over the keys. Where the bin holds too many, the next histogram goes across the cluster too.
 *
 * A part's quads (4 keys that follow one another) are dealt to warps in runs of per_warp * 32, and in a run to the lanes in
 * turn: reads join, and positions ascend by warp, then by q, then by lane, as the places in the output do. */
#ifndef TR_CUDA_TOPK_CLUSTER_CUH
#define TR_CUDA_TOPK_CLUSTER_CUH

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/topk_select.cuh"

namespace tr
{
namespace
{

constexpr int CLUSTER_MAX = 16;
constexpr int ROUNDS = 3, DIGIT = 12, LAST_DIGIT = 32 - (ROUNDS - 1) * DIGIT; /* bits of a round */
constexpr int DIGITS = 1 << DIGIT, LAST_DIGITS = 1 << LAST_DIGIT, GROUPS = DIGITS / 32;
constexpr int SPAN_MAX = 36864; /* keys of a CTA: with all else below 227 KB */
constexpr int CAND_MAX = 3072;  /* keys of a bin that are sent around */

/* Where the search stands: keys whose bits above `shift` are `prefix` hold the want-th of what is left, of `count`. Keys of
 * the CTAs before this one: above that bin, in it. */
struct bin_state {
    uint32_t prefix, want, count, above_before, ties_before;
    int shift;
};

struct cluster_shared {
    uint32_t hist[(ROUNDS - 1) * DIGITS + LAST_DIGITS]; /* read by the cluster: one a round */
    uint32_t bytes[3][256];                             /* histograms of the candidates */
    uint32_t part[2][CLUSTER_MAX][GROUPS]; /* sums of groups of 32 bins, written by the cluster */
    uint32_t cand[CAND_MAX]; /* keys of the bin, in the order of the CTAs; written by the cluster */
    uint32_t mine[CAND_MAX]; /* those of this CTA */
    int32_t page[SPAN_MAX / TR_PAGE_TOKENS];
    uint2 space[2][32];
    bin_state state;
    uint32_t n_mine, n_last, last[32];
    int tie_end;
    uint4 data[]; /* keys, where registers do not hold them */
};

/* A CTA's part of the row. */
struct row_part {
    int begin, n, span, per_warp; /* per_warp: quads of a lane */
};

__device__ __forceinline__ uint32_t load_cluster(const uint32_t *p, int cta)
{
    uint32_t x;
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(x)
                 : "r"(cluster_address(smem_address(p), (uint32_t)cta))
                 : "memory");
    return x;
}
__device__ __forceinline__ void store_cluster(uint32_t *p, int cta, uint32_t x)
{
    asm volatile(
        "st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(smem_address(p), (uint32_t)cta)),
        "r"(x)
        : "memory");
}
/* Barrier of a cluster of n CTAs: of one CTA the plain one, which is faster. */
__device__ __forceinline__ void cluster_barrier(int n)
{
    if (n > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
}

/* Where this lane's quad q of the part begins. */
__device__ __forceinline__ int quad_begin(const row_part &part, int q)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;
    return ((i_warp * part.per_warp + q) * 32 + lane) * 4;
}

/* This lane's quads from q0 on, as far as `end` lets read. */
template <int QUADS>
__device__ __forceinline__ void load_quads(float4 (&x)[QUADS], const float *row,
                                           const row_part &part, int q0, int end)
{
    bool aligned = ((uintptr_t)row & 15) == 0;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = quad_begin(part, q0 + j), left = q0 + j < part.per_warp ? end - i : 0;
        x[j] = make_float4(0, 0, 0, 0);
        if (aligned && left >= 4) {
            x[j] = __ldcs((const float4 *)(row + i));
        } else {
            if (left > 0) x[j].x = row[i];
            if (left > 1) x[j].y = row[i + 1];
            if (left > 2) x[j].z = row[i + 2];
            if (left > 3) x[j].w = row[i + 3];
        }
    }
}

/* Keys from this lane's quad q to the end of the row's part; none where the lane has no such quad. */
__device__ __forceinline__ int keys_left(const row_part &part, int q)
{
    return q < part.per_warp ? part.n - quad_begin(part, q) : 0;
}

/* Scores into keys; what is past the row's end into 0, less than every key. */
template <int QUADS>
__device__ __forceinline__ void make_keys(uint4 (&key)[QUADS], const float4 (&x)[QUADS],
                                          const row_part &part, int q0)
{
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int left = keys_left(part, q0 + j);
        key[j] = make_uint4(topk_key(x[j].x), topk_key(x[j].y), topk_key(x[j].z), topk_key(x[j].w));
        if (left < 4) {
            key[j].x = left > 0 ? key[j].x : 0;
            key[j].y = left > 1 ? key[j].y : 0;
            key[j].z = left > 2 ? key[j].z : 0;
            key[j].w = 0;
        }
    }
}

/* Counts the first digits. Zeros that end a quad count too, in a bin that nobody looks for. */
template <int QUADS>
__device__ __forceinline__ void count_keys(cluster_shared *s, const uint4 (&key)[QUADS],
                                           const row_part &part, int q0)
{
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        if (keys_left(part, q0 + j) <= 0) continue;
        atomicAdd(&s->hist[key[j].x >> (32 - DIGIT)], 1);
        atomicAdd(&s->hist[key[j].y >> (32 - DIGIT)], 1);
        atomicAdd(&s->hist[key[j].z >> (32 - DIGIT)], 1);
        atomicAdd(&s->hist[key[j].w >> (32 - DIGIT)], 1);
    }
}

/* Quads q0.. of this lane, where they are not in `key` already. */
template <int QUADS, bool HELD>
__device__ __forceinline__ void fetch_quads(const cluster_shared *s, uint4 (&key)[QUADS],
                                            const row_part &part, int q0)
{
    if constexpr (!HELD)
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            int i = quad_begin(part, q0 + j);
            bool there = q0 + j < part.per_warp && i < part.span;
            key[j] = there ? s->data[i / 4] : make_uint4(0, 0, 0, 0);
        }
}

/* Bit 8 j + u: element u of quad j is in the bin. */
template <int QUADS>
__device__ __forceinline__ uint32_t quads_in(const uint4 (&key)[QUADS], uint32_t prefix, int shift)
{
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        bits |= key[j].x >> shift == prefix ? 1u << 8 * j : 0;
        bits |= key[j].y >> shift == prefix ? 2u << 8 * j : 0;
        bits |= key[j].z >> shift == prefix ? 4u << 8 * j : 0;
        bits |= key[j].w >> shift == prefix ? 8u << 8 * j : 0;
    }
    return bits;
}
/* The same for keys that are not below `low`. */
template <int QUADS>
__device__ __forceinline__ uint32_t quads_from(const uint4 (&key)[QUADS], uint32_t low)
{
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        bits |= key[j].x >= low ? 1u << 8 * j : 0;
        bits |= key[j].y >= low ? 2u << 8 * j : 0;
        bits |= key[j].z >= low ? 4u << 8 * j : 0;
        bits |= key[j].w >= low ? 8u << 8 * j : 0;
    }
    return bits;
}

__device__ __forceinline__ int round_bits(int i)
{
    return i < ROUNDS - 1 ? DIGIT : LAST_DIGIT;
}

/* Sums of groups of 32 bins of round i, to the same place in all n CTAs. */
template <int THREADS>
__device__ __forceinline__ void send_groups(cluster_shared *s, int i, int i_cta, int n)
{
    int n_bins = 1 << round_bits(i);
#pragma unroll 2
    for (int bin = (int)threadIdx.x * 4; bin < n_bins; bin += THREADS * 4) {
        uint4 v = *(const uint4 *)&s->hist[i * DIGITS + bin];
        uint32_t sum = v.x + v.y + v.z + v.w;
#pragma unroll
        for (int d = 1; d < 8; d *= 2)
            sum += __shfl_xor_sync(ALL, sum, d);
#pragma unroll 1
        for (int c = (int)threadIdx.x & 7; c < n; c += 8)
            store_cluster(&s->part[i & 1][i_cta][bin / 32], c, sum);
    }
}

/* One warp: the bin of round i that holds the want-th key, from the sums and histograms of the n CTAs. */
__device__ __forceinline__ void search_round(cluster_shared *s, int i, int i_cta, int n,
                                             bin_state b)
{
    int lane = threadIdx.x & 31;
    int quad = 4 * (31 - lane), n_groups = (1 << round_bits(i)) / 32; /* this lane's four groups */
    const uint32_t *part = &s->part[i & 1][0][quad];
    uint4 all = {0, 0, 0, 0}, earlier = {0, 0, 0, 0};
    uint32_t before, count = 0, mine = 0;

#pragma unroll 4
    for (int c = 0; c < n; c++) {
        uint4 v = {0, 0, 0, 0};
        if (quad < n_groups) v = *(const uint4 *)(part + c * GROUPS);
        all.x += v.x, all.y += v.y, all.z += v.z, all.w += v.w;
        if (c < i_cta) earlier.x += v.x, earlier.y += v.y, earlier.z += v.z, earlier.w += v.w;
    }
    int at = find_lane(all.x + all.y + all.z + all.w, b.want, lane, &before);
    /* which of the lane's four groups, the highest first */
    uint32_t w = __shfl_sync(ALL, all.w, at) + before, z = __shfl_sync(ALL, all.z, at) + w;
    uint32_t y = __shfl_sync(ALL, all.y, at) + z;
    int u = (w < b.want) + (z < b.want) + (y < b.want);
    int group = GROUPS - 1 - 4 * at - u;
    b.want -= u == 0 ? before : u == 1 ? w : u == 2 ? z : y;
    const uint32_t *bin = &s->hist[i * DIGITS + group * 32 + 31 - lane];
#pragma unroll 8
    for (int c = 0; c < n; c++) {
        uint32_t x = load_cluster(bin, c);
        count += x;
        mine += c < i_cta ? x : 0;
    }
    uint32_t above = lane < at ? earlier.x + earlier.y + earlier.z + earlier.w : 0;
    if (lane == at)
        above = (u > 0 ? earlier.w : 0) + (u > 1 ? earlier.z : 0) + (u > 2 ? earlier.y : 0);
    at = find_lane(count, b.want, lane, &before);
    above = __reduce_add_sync(ALL, above + (lane < at ? mine : 0));
    b.want -= before;
    b.count = __shfl_sync(ALL, count, at);
    b.above_before += above;
    b.ties_before = __shfl_sync(ALL, mine, at);
    b.prefix = b.prefix << round_bits(i) | (uint32_t)(group * 32 + 31 - at);
    b.shift -= round_bits(i);
    if (lane == 0) s->state = b;
}

/* Round i's histograms of all CTAs are made: finds the bin. Block-wide. */
template <int THREADS>
__device__ __forceinline__ void find_round(cluster_shared *s, int i, int i_cta, int n, bin_state &b)
{
    __syncthreads();
    send_groups<THREADS>(s, i, i_cta, n);
    cluster_barrier(n);
    if (threadIdx.x < 32) search_round(s, i, i_cta, n, b);
    __syncthreads();
    b = s->state;
}

/* This CTA's keys of the bin to the candidates of all CTAs. Ends with a barrier of the cluster. */
template <int THREADS, int QUADS, bool HELD>
__device__ __forceinline__ void send_candidates(cluster_shared *s, uint4 (&key)[QUADS],
                                                const row_part &part, int n_ctas,
                                                const bin_state &b)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;

#pragma unroll 1
    for (int q0 = 0; q0 < (HELD ? 1 : part.per_warp); q0 += QUADS) {
        fetch_quads<QUADS, HELD>(s, key, part, q0);
        uint32_t bits = quads_in<QUADS>(key, b.prefix, b.shift);
        if (__ballot_sync(ALL, bits) == 0) continue;
        uint32_t count = (uint32_t)__popc(bits), end = warp_prefix(count, lane), at = 0;
        if (lane == 31) at = atomicAdd(&s->n_mine, end);
        at = __shfl_sync(ALL, at, 31) + end - count;
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            if (bits & 1u << 8 * j) s->mine[at++] = key[j].x;
            if (bits & 2u << 8 * j) s->mine[at++] = key[j].y;
            if (bits & 4u << 8 * j) s->mine[at++] = key[j].z;
            if (bits & 8u << 8 * j) s->mine[at++] = key[j].w;
        }
    }
    __syncthreads();
    constexpr int WARPS = THREADS / 32;
    int n = (int)s->n_mine, together = min(n_ctas, WARPS);
#pragma unroll 1
    for (int c = i_warp % together; c < n_ctas; c += together)
#pragma unroll 1
        for (int e = i_warp / together * 32 + lane; e < n; e += WARPS / together * 32)
            store_cluster(&s->cand[b.ties_before + (uint32_t)e], c, s->mine[e]);
    cluster_barrier(n_ctas);
}

/* The want-th of at most 32 candidates in the bin, bit by bit. Block-wide, every warp for itself. */
template <int THREADS>
__device__ __forceinline__ void search_last(cluster_shared *s, int n_cand, bin_state &b)
{
    int lane = threadIdx.x & 31;

#pragma unroll 1
    for (int i = threadIdx.x; i < n_cand; i += THREADS)
        if (s->cand[i] >> b.shift == b.prefix) s->last[atomicAdd(&s->n_last, 1)] = s->cand[i];
    __syncthreads();
    uint32_t key = lane < (int)b.count ? s->last[lane] : 0;
    uint32_t left = __ballot_sync(ALL, lane < (int)b.count);
#pragma unroll 4
    for (int bit = b.shift - 1; bit >= 0; bit--) {
        uint32_t ones = __ballot_sync(ALL, key >> bit & 1), n_ones = (uint32_t)__popc(ones & left);
        bool in_ones = n_ones >= b.want;
        b.want -= in_ones ? 0 : n_ones;
        left &= in_ones ? ones : ~ones;
        b.prefix = b.prefix << 1 | (in_ones ? 1u : 0u);
    }
    b.shift = 0;
    b.count = (uint32_t)__popc(left);
}

/* The bin of 256 that holds the want-th key. Every warp for itself: none has to be told. */
__device__ __forceinline__ void search_bytes(const uint32_t *hist, int bits, bin_state &b)
{
    int lane = threadIdx.x & 31, n_above = 0;
    uint4 h = *(const uint4 *)&hist[252 - 8 * lane], l = *(const uint4 *)&hist[248 - 8 * lane];
    uint32_t bin[8] = {h.w, h.z, h.y, h.x, l.w, l.z, l.y, l.x}, before, sum = 0;

#pragma unroll
    for (int u = 0; u < 8; u++)
        sum += bin[u];
    int at = find_lane(sum, b.want, lane, &before);
    uint32_t count = bin[0];
#pragma unroll
    for (int u = 0; u < 7; u++)
        if (n_above == u && before + bin[u] < b.want) {
            before += bin[u];
            count = bin[u + 1];
            n_above = u + 1;
        }
    n_above = __shfl_sync(ALL, n_above, at);
    b.want -= __shfl_sync(ALL, before, at);
    b.count = __shfl_sync(ALL, count, at);
    b.prefix = b.prefix << bits | (uint32_t)(255 - 8 * at - n_above);
    b.shift -= bits;
}

/* Narrows the bin among the candidates, all of which this CTA holds, until all of it is wanted or it is one key. What other
 * CTAs hold of it is not looked at: above_before and ties_before stay what they were. Block-wide. */
template <int THREADS>
__device__ __forceinline__ void search_candidates(cluster_shared *s, int n_cand, bin_state &b)
{
#pragma unroll 1
    for (int i = 0; b.count != b.want && b.count > 32 && b.shift > 0; i++) {
        int bits = min(8, b.shift);
#pragma unroll 2
        for (int j = threadIdx.x; j < n_cand; j += THREADS) {
            uint32_t key = s->cand[j];
            if (key >> b.shift == b.prefix)
                atomicAdd(&s->bytes[i][key >> (b.shift - bits) & ((1u << bits) - 1)], 1);
        }
        __syncthreads();
        search_bytes(s->bytes[i], bits, b);
    }
    if (b.count != b.want && b.shift > 0) search_last<THREADS>(s, n_cand, b);
}

/* Counts the next digit of the keys of the bin. */
template <int QUADS>
__device__ __forceinline__ void count_digit(uint32_t *hist, const uint4 (&key)[QUADS],
                                            const bin_state &b, int bits)
{
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        uint32_t k[4] = {key[j].x, key[j].y, key[j].z, key[j].w};
#pragma unroll
        for (int u = 0; u < 4; u++)
            if (k[u] >> b.shift == b.prefix)
                atomicAdd(&hist[k[u] >> (b.shift - bits) & ((1u << bits) - 1)], 1);
    }
}

/* Sums over the block of what warps hold, and over the warps before this one of x.x. All lanes of a warp pass the same. */
template <int THREADS>
__device__ __forceinline__ uint2 warps_before(uint2 x, uint2 *space, uint32_t *sum_y)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;
    if (lane == 0) space[i_warp] = x;
    __syncthreads();
    uint2 v = lane < THREADS / 32 ? space[lane] : make_uint2(0, 0);
    uint32_t end = warp_prefix(v.x, lane);
    *sum_y = __reduce_add_sync(ALL, v.y);
    return make_uint2(__shfl_sync(ALL, end - v.x, i_warp), __shfl_sync(ALL, end, 31));
}

/* Of bits as quads_in makes them: per quad (a byte each) how many the lanes before this one have; *all: how many all have. */
__device__ __forceinline__ uint32_t lanes_before(uint32_t bits, uint32_t *all)
{
    uint32_t pairs = bits - (bits >> 1 & 0x55555555u);
    uint32_t count = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);
    uint32_t end = warp_prefix(count, (int)(threadIdx.x & 31)); /* at most 128 a byte */
    *all = __shfl_sync(ALL, end, 31);
    return end - count;
}

/* Bits of the chosen among quads q0..: the keys of the bin only at positions before tie_end (of this part). */
template <int QUADS>
__device__ __forceinline__ uint32_t chosen_bits(const uint4 (&key)[QUADS], const row_part &part,
                                                int q0, uint32_t low, bool cut, int tie_end)
{
    uint32_t bits = quads_from<QUADS>(key, low);
    if (!cut) return bits;
    uint32_t ties = quads_in<QUADS>(key, low, 0);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int left = max(0, min(4, tie_end - quad_begin(part, q0 + j)));
        bits &= ~(ties & (15u << left & 15u) << 8 * j);
    }
    return bits;
}

/* Equal keys of which not all are wanted: the position in this part before which they are. ties_before: in the CTAs before. */
template <int THREADS, int QUADS, bool HELD>
__device__ __forceinline__ int find_tie_end(cluster_shared *s, uint4 (&key)[QUADS],
                                            const row_part &part, const bin_state &b,
                                            uint32_t ties_before)
{
    uint32_t count = 0, unused, all;

#pragma unroll 1
    for (int q0 = 0; q0 < (HELD ? 1 : part.per_warp); q0 += QUADS) {
        fetch_quads<QUADS, HELD>(s, key, part, q0);
        count += (uint32_t)__popc(quads_in<QUADS>(key, b.prefix, b.shift));
    }
    count = __reduce_add_sync(ALL, count);
    uint32_t at = ties_before + warps_before<THREADS>(make_uint2(count, 0), s->space[1], &unused).x;
#pragma unroll 1
    for (int q0 = 0; q0 < (HELD ? 1 : part.per_warp); q0 += QUADS) {
        fetch_quads<QUADS, HELD>(s, key, part, q0);
        uint32_t bits = quads_in<QUADS>(key, b.prefix, b.shift), before = lanes_before(bits, &all);
#pragma unroll 1
        for (int j = 0; j < QUADS; j++) {
            uint32_t rank = at + (before >> 8 * j & 255);
#pragma unroll 1
            for (uint32_t set = bits >> 8 * j & 15; set; set &= set - 1)
                if (++rank == b.want) s->tie_end = quad_begin(part, q0 + j) + __ffs((int)set);
            at += all >> 8 * j & 255;
        }
    }
    __syncthreads();
    return ties_before >= b.want ? 0 : s->tie_end;
}

/* The chosen of this CTA's keys, to their place in row r's output. Where candidates were
 * sent, the first n_before are of the CTAs before this one, and it is not known yet how many of them are chosen. */
template <int THREADS, int QUADS, bool HELD>
__device__ __forceinline__ void cluster_emit(const topk_params &p, cluster_shared *s,
                                             uint4 (&key)[QUADS], const row_part &part, int r,
                                             int n_before, const bin_state &b, bool sent)
{
    uint32_t low = b.prefix << b.shift, high = low + ((1u << b.shift) - 1);
    uint32_t before = 0, count = 0, bits = 0, all; /* before: above the bin << 16 | in it */
    bool cut = b.count != b.want;
    int tie_end = 0;

#pragma unroll 1
    for (int i = threadIdx.x; i < n_before; i += THREADS)
        before += s->cand[i] > high ? 0x10000u : s->cand[i] >= low ? 1u : 0u;
    before = __reduce_add_sync(ALL, before);
    if (cut) {
        warps_before<THREADS>(make_uint2(0, before), s->space[0], &all);
        tie_end = find_tie_end<THREADS, QUADS, HELD>(s, key, part, b,
                                                     sent ? all & 0xffff : b.ties_before);
    }
#pragma unroll 1
    for (int q0 = 0; q0 < (HELD ? 1 : part.per_warp); q0 += QUADS) {
        fetch_quads<QUADS, HELD>(s, key, part, q0);
        bits = chosen_bits<QUADS>(key, part, q0, low, cut, tie_end);
        count += (uint32_t)__popc(bits);
    }
    count = __reduce_add_sync(ALL, count);
    uint32_t at = warps_before<THREADS>(make_uint2(count, before), s->space[0], &all).x;
    uint32_t ties = sent ? all & 0xffff : b.ties_before;
    at += b.above_before + (all >> 16) + min(ties, b.want);
    int32_t *position = p.position + (size_t)r * p.k, *cache_row = p.cache_row + (size_t)r * p.k;
#pragma unroll 1
    for (int q0 = 0; q0 < (HELD ? 1 : part.per_warp); q0 += QUADS) {
        if (!HELD) {
            fetch_quads<QUADS, HELD>(s, key, part, q0);
            bits = chosen_bits<QUADS>(key, part, q0, low, cut, tie_end);
        }
        uint32_t lanes = lanes_before(bits, &all);
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            int i = quad_begin(part, q0 + j), page = 0;
            uint32_t out = at + (lanes >> 8 * j & 255), set = bits >> 8 * j & 15;
            if (set) page = s->page[i / TR_PAGE_TOKENS] * TR_PAGE_TOKENS + i % TR_PAGE_TOKENS;
#pragma unroll
            for (int u = 0; u < 4; u++)
                if (set & 1u << u) {
                    position[out] = part.begin + i + u;
                    cache_row[out] = page + u;
                    out++;
                }
            at += all >> 8 * j & 255;
        }
    }
    if (part.begin == 0 && threadIdx.x == 0) p.n_selected[r] = p.k;
}

/* Keys of the whole part, counted; the scores of the first quads are in x already. */
template <int QUADS, bool HELD>
__device__ __forceinline__ void cluster_count(cluster_shared *s, uint4 (&key)[QUADS],
                                              float4 (&x)[QUADS], const float *row,
                                              const row_part &part)
{
    make_keys<QUADS>(key, x, part, 0);
    if constexpr (!HELD)
#pragma unroll 1
        for (int q0 = 0; q0 < part.per_warp;) {
#pragma unroll
            for (int j = 0; j < QUADS; j++) {
                int i = quad_begin(part, q0 + j);
                if (q0 + j < part.per_warp && i < part.span) s->data[i / 4] = key[j];
            }
            load_quads<QUADS>(x, row, part, q0 + QUADS, part.n);
            count_keys<QUADS>(s, key, part, q0);
            q0 += QUADS;
            make_keys<QUADS>(key, x, part, q0);
        }
    else
        count_keys<QUADS>(s, key, part, 0);
}

/* HELD: per_warp <= QUADS, and keys stay in registers. */
template <int THREADS, int QUADS, bool HELD>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    topk_cluster(const __grid_constant__ topk_params p, int n_ctas)
{
    extern __shared__ uint4 memory[];
    cluster_shared *s = (cluster_shared *)memory;
    int i_cta = (int)cluster_rank(), r = p.i_row + (int)blockIdx.x / n_ctas;
    row_part part = {i_cta * p.span, 0, p.span, (p.span + THREADS * 4 - 1) / (THREADS * 4)};
    const float *row = p.score + (size_t)(r - p.i_row) * p.ld + part.begin;
    bin_state b = {0, (uint32_t)p.k, 0, 0, 0, 32};
    float4 x[QUADS];
    uint4 key[QUADS];

    /* Scores are asked for before it is known how many of them count: that takes as long to come. */
    load_quads<QUADS>(x, row, part, 0, min(p.span, p.limit - part.begin));
    int context = topk_context(p, r), live = *p.rows.n;
    const int32_t *pages = p.rows.page_table + (size_t)p.rows.slot[r] * p.rows.max_pages;
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)((sizeof s->hist + sizeof s->bytes) / 16); i += THREADS)
        ((uint4 *)s->hist)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) s->n_mine = s->n_last = 0, s->tie_end = INT32_MAX;
    if (r >= live || context <= p.k) { /* for all CTAs of the cluster alike */
        if (r < live && i_cta == 0) write_identity<THREADS>(p, r, context);
        return;
    }
    cluster_arrive_relaxed(); /* this CTA runs: its memory may be written */
    part.n = max(0, min(p.span, context - part.begin));
    int page = 0, i_page = (int)threadIdx.x;
    if (i_page * TR_PAGE_TOKENS < part.n) page = pages[part.begin / TR_PAGE_TOKENS + i_page];
    __syncthreads();
    cluster_count<QUADS, HELD>(s, key, x, row, part);
    if (i_page < SPAN_MAX / TR_PAGE_TOKENS) s->page[i_page] = page;
    cluster_wait();
    int i = 0;
    bool sent = false;
#pragma unroll 1
    for (;;) {
        find_round<THREADS>(s, i++, i_cta, n_ctas, b);
        sent = b.count != b.want && b.shift > 0 && b.count <= CAND_MAX;
        if (b.count == b.want || b.shift == 0 || sent) break;
        int bits = round_bits(i);
#pragma unroll 1
        for (int q0 = 0; q0 < (HELD ? 1 : part.per_warp); q0 += QUADS) {
            fetch_quads<QUADS, HELD>(s, key, part, q0);
            count_digit<QUADS>(s->hist + i * DIGITS, key, b, bits);
        }
    }
    int n_before = 0;
    if (sent) {
        int n_cand = (int)b.count;
        n_before = (int)b.ties_before;
        send_candidates<THREADS, QUADS, HELD>(s, key, part, n_ctas, b);
        search_candidates<THREADS>(s, n_cand, b);
    } else {
        cluster_arrive(); /* other CTAs' memory is read no more; it stays until all have said so */
    }
    cluster_emit<THREADS, QUADS, HELD>(p, s, key, part, r, n_before, b, sent);
    if (!sent) cluster_wait();
}

} // namespace
} // namespace tr

#endif
