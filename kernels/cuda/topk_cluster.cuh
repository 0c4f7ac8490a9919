/* Selection for few rows: a cluster of CTAs per row, each of which asks for its part at once and keeps its keys in
 * registers: in shared memory each pass would write or read them again. The bin of the k-th key is found by a histogram across
 * the cluster; the keys of that bin, mostly few, are then sent to every CTA, and each looks for the k-th among them alone: a
 * barrier of the cluster costs as much as a pass over the keys. Where the bin holds too many, the next histogram goes across
 * the cluster too.
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
constexpr int QUADS_MAX = 9;                   /* quads of a thread: 36 of its 64 registers */
constexpr int SPAN_MAX = 1024 * 4 * QUADS_MAX; /* keys of a CTA */
constexpr int CAND_MAX = 3072;                 /* keys of a bin that are sent around */

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
    int tie_end, n_cand; /* n_cand: candidates that were sent; 0: none were */
};

/* A CTA's part of the row. */
struct row_part {
    int begin, n, per_warp; /* per_warp: quads of a lane */
};

/* A bit for each key of a lane's quads: bit 8 (j % 4) + u of w[j / 4] is element u of quad j. As many bytes for their counts. */
template <int QUADS> struct quad_bits {
    uint32_t w[(QUADS + 3) / 4];
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
/* The row that this CTA's cluster takes. */
__device__ __forceinline__ int cluster_row(const topk_params &p)
{
    int i;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(i));
    return p.i_row + i;
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

/* This CTA's part of a row that is asked for up to `end`. Worked out anew by each that asks, as is where this lane's first quad
 * begins (the others follow QUAD_STEP keys apart): the compiler would keep a register for each quad from one to the next, and
 * there are none left. */
template <int THREADS> __device__ __forceinline__ row_part make_part(const topk_params &p, int end)
{
    int span = p.span;
    asm volatile("" : "+r"(span));
    int begin = (int)cluster_rank() * span;
    return {begin, max(0, min(span, end - begin)), (span + THREADS * 4 - 1) / (THREADS * 4)};
}
constexpr int QUAD_STEP = 32 * 4;
__device__ __forceinline__ int quads_begin(const row_part &part)
{
    int thread = (int)threadIdx.x;
    asm volatile("" : "+r"(thread));
    return (thread >> 5) * part.per_warp * QUAD_STEP + (thread & 31) * 4;
}

/* This lane's quads of the part. Fours first, all of them in flight at a time; what cannot be read so is rare. */
template <int QUADS>
__device__ __forceinline__ void load_quads(float4 (&x)[QUADS], const float *row,
                                           const row_part &part)
{
    bool aligned = ((uintptr_t)row & 15) == 0;
    int begin = quads_begin(part), end = part.n;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = begin + j * QUAD_STEP;
        x[j] = make_float4(0, 0, 0, 0);
        if (aligned && j < part.per_warp && end - i >= 4) x[j] = __ldcs((const float4 *)(row + i));
    }
    if (aligned && (end & 3) == 0) return;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = begin + j * QUAD_STEP, left = j < part.per_warp ? end - i : 0;
        if (aligned && left >= 4) continue;
        if (left > 0) x[j].x = row[i];
        if (left > 1) x[j].y = row[i + 1];
        if (left > 2) x[j].z = row[i + 2];
        if (left > 3) x[j].w = row[i + 3];
    }
}

/* Scores into keys, counted by their first digit. What is past the row's end becomes 0, less than every key; such as end a
 * quad count too, in a bin that nobody looks for. */
template <int QUADS>
__device__ __forceinline__ void count_quads(cluster_shared *s, uint4 (&key)[QUADS],
                                            const float4 (&x)[QUADS], const row_part &part)
{
    int begin = quads_begin(part);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int left = j < part.per_warp ? part.n - begin - j * QUAD_STEP : 0;
        key[j] = make_uint4(topk_key(x[j].x), topk_key(x[j].y), topk_key(x[j].z), topk_key(x[j].w));
        if (left < 4) {
            key[j].x = left > 0 ? key[j].x : 0;
            key[j].y = left > 1 ? key[j].y : 0;
            key[j].z = left > 2 ? key[j].z : 0;
            key[j].w = 0;
        }
        if (left <= 0) continue;
        atomicAdd(&s->hist[key[j].x >> (32 - DIGIT)], 1);
        atomicAdd(&s->hist[key[j].y >> (32 - DIGIT)], 1);
        atomicAdd(&s->hist[key[j].z >> (32 - DIGIT)], 1);
        atomicAdd(&s->hist[key[j].w >> (32 - DIGIT)], 1);
    }
}

/* To the compiler a word of its own from here on: else it keeps a register for each bit that it was made of. */
template <int QUADS> __device__ __forceinline__ void seal(quad_bits<QUADS> &bits)
{
#pragma unroll
    for (uint32_t &w : bits.w)
        asm volatile("" : "+r"(w));
}
/* The keys that are in the bin. */
template <int QUADS>
__device__ __forceinline__ quad_bits<QUADS> quads_in(const uint4 (&key)[QUADS], uint32_t prefix,
                                                     int shift)
{
    quad_bits<QUADS> bits = {};
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        bits.w[j / 4] |= key[j].x >> shift == prefix ? 1u << 8 * (j % 4) : 0;
        bits.w[j / 4] |= key[j].y >> shift == prefix ? 2u << 8 * (j % 4) : 0;
        bits.w[j / 4] |= key[j].z >> shift == prefix ? 4u << 8 * (j % 4) : 0;
        bits.w[j / 4] |= key[j].w >> shift == prefix ? 8u << 8 * (j % 4) : 0;
    }
    seal<QUADS>(bits);
    return bits;
}
/* The keys that are not below `low`. */
template <int QUADS>
__device__ __forceinline__ quad_bits<QUADS> quads_from(const uint4 (&key)[QUADS], uint32_t low)
{
    quad_bits<QUADS> bits = {};
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        bits.w[j / 4] |= key[j].x >= low ? 1u << 8 * (j % 4) : 0;
        bits.w[j / 4] |= key[j].y >= low ? 2u << 8 * (j % 4) : 0;
        bits.w[j / 4] |= key[j].z >= low ? 4u << 8 * (j % 4) : 0;
        bits.w[j / 4] |= key[j].w >= low ? 8u << 8 * (j % 4) : 0;
    }
    seal<QUADS>(bits);
    return bits;
}
template <int QUADS> __device__ __forceinline__ uint32_t count_bits(const quad_bits<QUADS> &bits)
{
    uint32_t n = 0;
#pragma unroll
    for (uint32_t w : bits.w)
        n += (uint32_t)__popc(w);
    return n;
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

/* What one warp found, to all; a barrier follows. More warps than one in a search would be in each other's way. Who wants the
 * state reads it from s->state between two barriers: registers are for keys. */
__device__ __forceinline__ void tell(cluster_shared *s, const bin_state &b)
{
    __syncwarp(); /* all lanes have read what stood there */
    if ((threadIdx.x & 31) == 0) s->state = b;
}

/* One warp, which asks UNROLL CTAs at a time: the bin of round i that holds the want-th key, from the sums and histograms of
 * the n CTAs. */
template <int UNROLL> __device__ __forceinline__ void search_round(cluster_shared *s, int i, int n)
{
    int lane = threadIdx.x & 31, i_cta = (int)cluster_rank();
    int quad = 4 * (31 - lane), n_groups = (1 << round_bits(i)) / 32; /* this lane's four groups */
    const uint32_t *part = &s->part[i & 1][0][quad];
    uint4 all = {0, 0, 0, 0}, earlier = {0, 0, 0, 0};
    uint32_t want = s->state.want, before, count = 0, mine = 0;

#pragma unroll(UNROLL / 2)
    for (int c = 0; c < n; c++) {
        uint4 v = {0, 0, 0, 0};
        if (quad < n_groups) v = *(const uint4 *)(part + c * GROUPS);
        all.x += v.x, all.y += v.y, all.z += v.z, all.w += v.w;
        if (c < i_cta) earlier.x += v.x, earlier.y += v.y, earlier.z += v.z, earlier.w += v.w;
    }
    int at = find_lane(all.x + all.y + all.z + all.w, want, lane, &before);
    /* which of the lane's four groups, the highest first */
    uint32_t w = __shfl_sync(ALL, all.w, at) + before, z = __shfl_sync(ALL, all.z, at) + w;
    uint32_t y = __shfl_sync(ALL, all.y, at) + z;
    int u = (w < want) + (z < want) + (y < want);
    int group = GROUPS - 1 - 4 * at - u;
    want -= u == 0 ? before : u == 1 ? w : u == 2 ? z : y;
    const uint32_t *bin = &s->hist[i * DIGITS + group * 32 + 31 - lane];
#pragma unroll(UNROLL)
    for (int c = 0; c < n; c++) {
        uint32_t x = load_cluster(bin, c);
        count += x;
        mine += c < i_cta ? x : 0;
    }
    uint32_t above = lane < at ? earlier.x + earlier.y + earlier.z + earlier.w : 0;
    if (lane == at)
        above = (u > 0 ? earlier.w : 0) + (u > 1 ? earlier.z : 0) + (u > 2 ? earlier.y : 0);
    at = find_lane(count, want, lane, &before);
    above = __reduce_add_sync(ALL, above + (lane < at ? mine : 0));
    bin_state b = s->state;
    b.want = want - before;
    b.count = __shfl_sync(ALL, count, at);
    b.above_before += above;
    b.ties_before = __shfl_sync(ALL, mine, at);
    b.prefix = b.prefix << round_bits(i) | (uint32_t)(group * 32 + 31 - at);
    b.shift -= round_bits(i);
    tell(s, b);
}

/* Round i's histograms of all CTAs are made: finds the bin. Block-wide. */
template <int THREADS, int QUADS>
__device__ __forceinline__ void find_round(cluster_shared *s, int i, int n)
{
    __syncthreads();
    send_groups<THREADS>(s, i, (int)cluster_rank(), n);
    cluster_barrier(n);
    if (threadIdx.x < 32) search_round<QUADS <= 6 ? 8 : 2>(s, i, n);
    __syncthreads();
}

/* This CTA's keys of the bin to the candidates of all CTAs. Ends with a barrier of the cluster. */
template <int THREADS, int QUADS>
__device__ __forceinline__ void send_candidates(cluster_shared *s, const uint4 (&key)[QUADS],
                                                int n_ctas)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;
    quad_bits<QUADS> bits = quads_in<QUADS>(key, s->state.prefix, s->state.shift);
    uint32_t count = count_bits<QUADS>(bits), at = 0;

    if (__ballot_sync(ALL, count)) {
        uint32_t end = warp_prefix(count, lane);
        if (lane == 31) at = atomicAdd(&s->n_mine, end);
        at = __shfl_sync(ALL, at, 31) + end - count;
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            uint32_t set = bits.w[j / 4] >> 8 * (j % 4) & 15;
            if (!set) continue;
            if (set & 1) s->mine[at++] = key[j].x;
            if (set & 2) s->mine[at++] = key[j].y;
            if (set & 4) s->mine[at++] = key[j].z;
            if (set & 8) s->mine[at++] = key[j].w;
        }
    }
    __syncthreads();
    constexpr int WARPS = THREADS / 32;
    if (threadIdx.x == 0) s->n_cand = (int)s->state.count;
    int n = (int)s->n_mine, together = min(n_ctas, WARPS);
#pragma unroll 1
    for (int c = i_warp % together; c < n_ctas; c += together)
#pragma unroll 1
        for (int e = i_warp / together * 32 + lane; e < n; e += WARPS / together * 32)
            store_cluster(&s->cand[s->state.ties_before + (uint32_t)e], c, s->mine[e]);
    cluster_barrier(n_ctas);
}

/* One warp: the want-th of at most 32 keys in the bin, bit by bit. */
__device__ __forceinline__ bin_state search_bits(const uint32_t *keys, bin_state b)
{
    int lane = threadIdx.x & 31;
    uint32_t key = lane < (int)b.count ? keys[lane] : 0;
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
    return b;
}

/* The same where the keys have to be found among the candidates. Block-wide. */
template <int THREADS> __device__ __forceinline__ void search_last(cluster_shared *s)
{
    uint32_t prefix = s->state.prefix;
    int shift = s->state.shift;

#pragma unroll 2
    for (int i = threadIdx.x; i < s->n_cand; i += THREADS) {
        uint32_t key = s->cand[i];
        if (key >> shift == prefix) s->last[atomicAdd(&s->n_last, 1)] = key;
    }
    __syncthreads();
    if (threadIdx.x < 32) tell(s, search_bits(s->last, s->state));
    __syncthreads();
}

/* One warp: the bin of 256 that holds the want-th key. */
__device__ __forceinline__ bin_state search_bytes(const uint32_t *hist, int bits, bin_state b)
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
    return b;
}

/* Narrows the bin among the candidates, all of which this CTA holds, until all of it is wanted or it is one key. What other
 * CTAs hold of it is not looked at: above_before and ties_before stay what they were. Block-wide. */
template <int THREADS> __device__ __forceinline__ void search_candidates(cluster_shared *s)
{
#pragma unroll 1
    for (int i = 0;; i++) {
        uint32_t count = s->state.count, prefix = s->state.prefix;
        int shift = s->state.shift, bits = min(8, shift);
        if (count == s->state.want || count <= 32 || shift == 0) break;
#pragma unroll 2
        for (int j = threadIdx.x; j < s->n_cand; j += THREADS) {
            uint32_t key = s->cand[j];
            if (key >> shift == prefix)
                atomicAdd(&s->bytes[i][key >> (shift - bits) & ((1u << bits) - 1)], 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) tell(s, search_bytes(s->bytes[i], bits, s->state));
        __syncthreads();
    }
    if (s->state.count != s->state.want && s->state.shift > 0) search_last<THREADS>(s);
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

/* Of a word of quad_bits: per quad (a byte each) how many the lanes before this one have; *all: how many all have, at most
 * 128. */
__device__ __forceinline__ uint32_t lanes_before(uint32_t bits, uint32_t *all)
{
    uint32_t pairs = bits - (bits >> 1 & 0x55555555u);
    uint32_t count = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);
    uint32_t end = warp_prefix(count, (int)(threadIdx.x & 31));
    *all = __shfl_sync(ALL, end, 31);
    return end - count;
}

/* The chosen among this lane's keys: the keys of the bin only at positions before tie_end (of this part). */
template <int QUADS>
__device__ __forceinline__ quad_bits<QUADS>
chosen_bits(const uint4 (&key)[QUADS], const row_part &part, uint32_t low, bool cut, int tie_end)
{
    quad_bits<QUADS> bits = quads_from<QUADS>(key, low);
    if (!cut) return bits;
    quad_bits<QUADS> ties = quads_in<QUADS>(key, low, 0);
    int begin = quads_begin(part);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int left = max(0, min(4, tie_end - begin - j * QUAD_STEP));
        bits.w[j / 4] &= ~(ties.w[j / 4] & (15u << left & 15u) << 8 * (j % 4));
    }
    return bits;
}

/* Equal keys of which not all are wanted: the position in this part before which they are. ties_before: in the CTAs before. */
template <int THREADS, int QUADS>
__device__ __forceinline__ int find_tie_end(cluster_shared *s, const uint4 (&key)[QUADS],
                                            const row_part &part, uint32_t ties_before)
{
    quad_bits<QUADS> bits = quads_in<QUADS>(key, s->state.prefix, s->state.shift);
    uint32_t count = __reduce_add_sync(ALL, count_bits<QUADS>(bits)), all;
    uint32_t at = ties_before + warps_before<THREADS>(make_uint2(count, 0), s->space[1], &all).x;
    uint32_t want = s->state.want;
    int begin = quads_begin(part);

#pragma unroll
    for (int g = 0; g < (QUADS + 3) / 4; g++) {
        uint32_t before = lanes_before(bits.w[g], &all);
#pragma unroll 1
        for (int j = 0; j < min(4, QUADS - 4 * g); j++, begin += QUAD_STEP) {
            uint32_t rank = at + (before >> 8 * j & 255);
#pragma unroll 1
            for (uint32_t set = bits.w[g] >> 8 * j & 15; set; set &= set - 1)
                if (++rank == want) s->tie_end = begin + __ffs((int)set);
            at += all >> 8 * j & 255;
        }
    }
    __syncthreads();
    return ties_before >= want ? 0 : s->tie_end;
}

/* The chosen of a lane's quads j.. of the part (as bits of a word of quad_bits), to row r's output from `at` on; returns where
 * the next go. */
__device__ __forceinline__ uint32_t write_quads(const topk_params &p, const cluster_shared *s,
                                                uint32_t bits, int part_begin, int begin, int n,
                                                uint32_t at)
{
    uint32_t all, lanes = lanes_before(bits, &all);
    size_t to = (size_t)cluster_row(p) * p.k;
    int32_t *position = p.position + to, *cache_row = p.cache_row + to;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j >= n) break;
        int i = begin + j * QUAD_STEP;
        uint32_t out = at + (lanes >> 8 * j & 255), set = bits >> 8 * j & 15;
        int page = set ? s->page[i / TR_PAGE_TOKENS] * TR_PAGE_TOKENS : 0;
#pragma unroll 1
        for (; set; set &= set - 1, out++) { /* few are set: shorter than four ifs */
            int u = i + __ffs((int)set) - 1;
            position[out] = part_begin + u;
            cache_row[out] = page + u % TR_PAGE_TOKENS;
        }
        at += all >> 8 * j & 255;
    }
    return at;
}

/* The chosen of this CTA's keys, to their place in the row's output. Where candidates were sent, the first ties_before are of
 * the CTAs before this one, and it is not known yet how many of them are chosen. */
template <int THREADS, int QUADS>
__device__ __forceinline__ void cluster_emit(const topk_params &p, cluster_shared *s,
                                             const uint4 (&key)[QUADS])
{
    row_part part = make_part<THREADS>(p, 0);
    bin_state b = s->state;
    uint32_t low = b.prefix << b.shift, high = low + ((1u << b.shift) - 1);
    uint32_t before = 0, sum; /* above the bin << 16 | in it */
    bool cut = b.count != b.want;
    int tie_end = 0, n_before = s->n_cand ? (int)b.ties_before : 0;

#pragma unroll 1
    for (int i = threadIdx.x; i < n_before; i += THREADS)
        before += s->cand[i] > high ? 0x10000u : s->cand[i] >= low ? 1u : 0u;
    before = __reduce_add_sync(ALL, before);
    if (cut) {
        warps_before<THREADS>(make_uint2(0, before), s->space[0], &sum);
        tie_end =
            find_tie_end<THREADS, QUADS>(s, key, part, s->n_cand ? sum & 0xffff : b.ties_before);
    }
    quad_bits<QUADS> bits = chosen_bits<QUADS>(key, part, low, cut, tie_end);
    uint32_t count = __reduce_add_sync(ALL, count_bits<QUADS>(bits));
    uint32_t at = warps_before<THREADS>(make_uint2(count, before), s->space[0], &sum).x;
    uint32_t ties = s->n_cand ? sum & 0xffff : s->state.ties_before;
    at += s->state.above_before + (sum >> 16) + min(ties, s->state.want);
    int begin = quads_begin(part);
#pragma unroll
    for (int g = 0; g < (QUADS + 3) / 4; g++)
        at = write_quads(p, s, bits.w[g], part.begin, begin + 4 * g * QUAD_STEP,
                         min(4, QUADS - 4 * g), at);
    if (part.begin == 0 && threadIdx.x == 0) p.n_selected[cluster_row(p)] = p.k;
}

/* A part is at most THREADS * 4 * QUADS keys. */
template <int THREADS, int QUADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    topk_cluster(const __grid_constant__ topk_params p, int n_ctas)
{
    extern __shared__ uint4 memory[];
    cluster_shared *s = (cluster_shared *)memory;
    int r = cluster_row(p);
    row_part part = make_part<THREADS>(p, p.limit);
    const float *row = p.score + (size_t)(r - p.i_row) * p.ld + part.begin;
    float4 x[QUADS];
    uint4 key[QUADS];

    /* Scores are asked for before it is known how many of them count: that takes as long to come. */
    load_quads<QUADS>(x, row, part);
    int context = topk_context(p, r), live = *p.rows.n;
    const int32_t *pages = p.rows.page_table + (size_t)p.rows.slot[r] * p.rows.max_pages;
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)((sizeof s->hist + sizeof s->bytes) / 16); i += THREADS)
        ((uint4 *)s->hist)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) {
        s->n_mine = s->n_last = 0;
        s->tie_end = INT32_MAX;
        s->n_cand = 0;
        s->state = {0, (uint32_t)p.k, 0, 0, 0, 32};
    }
    if (r >= live || context <= p.k) { /* for all CTAs of the cluster alike */
        if (r < live && part.begin == 0) write_identity<THREADS>(p, r, context);
        return;
    }
    cluster_arrive_relaxed(); /* this CTA runs: its memory may be written */
    part = make_part<THREADS>(p, context);
    int page = 0, i_page = (int)threadIdx.x;
    if (i_page * TR_PAGE_TOKENS < part.n) page = pages[part.begin / TR_PAGE_TOKENS + i_page];
    __syncthreads();
    count_quads<QUADS>(s, key, x, part);
    if (i_page < SPAN_MAX / TR_PAGE_TOKENS) s->page[i_page] = page;
    cluster_wait();
#pragma unroll 1
    for (int i = 0;;) {
        find_round<THREADS, QUADS>(s, i++, n_ctas);
        bin_state b = s->state;
        if (b.count == b.want || b.shift == 0) break;
        if (b.count <= CAND_MAX) {
            send_candidates<THREADS, QUADS>(s, key, n_ctas);
            break;
        }
        count_digit<QUADS>(s->hist + i * DIGITS, key, b, round_bits(i));
    }
    if (s->n_cand)
        search_candidates<THREADS>(s);
    else
        cluster_arrive(); /* other CTAs' memory is read no more; it stays until all have said so */
    cluster_emit<THREADS, QUADS>(p, s, key);
    if (!s->n_cand) cluster_wait();
}

} // namespace
} // namespace tr

#endif
