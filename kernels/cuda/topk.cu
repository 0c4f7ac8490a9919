/* Selection of the k best keys. Two ways to spread it, with equal results: few rows: a cluster of CTAs per row, each holding
 * its part of the row in shared memory, histograms read across the cluster; many rows: a CTA per row, which guesses a
 * bound from a sample, keeps what is not below it, and selects among that. A guess that keeps too little or too much costs
 * more passes over the row, never a wrong choice. */
#include "kernels/cuda/topk.h"

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/topk_select.cuh"

namespace tr
{
namespace
{

/* ---- few rows: a cluster per row ------------------------------------------------------------------------------------- */

constexpr int CLUSTER_MAX = 16, CLUSTER_THREADS = 1024, ROUNDS = 3;
constexpr int SPAN_MAX = 40960; /* scores of a CTA: with the bit maps and histograms below 227 KB */

constexpr int PIECE = CLUSTER_THREADS * 4,
              PIECES = SPAN_MAX / PIECE; /* scores that arrive together */

/* Where the search stands: keys whose bits above `shift` are `prefix` hold the want-th of what is left, of `count`. */
struct bin_state {
    uint32_t prefix, want, count;
    int shift;
};

struct cluster_shared {
    uint64_t loaded[PIECES];
    bin_state state;
    uint32_t hist[ROUNDS][BINS],
        coarse[ROUNDS][COARSE]; /* read by the cluster: one set a round, never reused */
    uint32_t part_coarse[CLUSTER_MAX][COARSE], part_fine[CLUSTER_MAX][32];
    uint32_t part_above[CLUSTER_MAX],
        part_ties[CLUSTER_MAX]; /* each CTA's keys above the bin found, in it */
    uint2 space[CLUSTER_THREADS / 32];
    int32_t chosen[TR_CUDA_TOPK_MAX];
    uint32_t data[]; /* scores, then keys [span], above [span / 32], ties [span / 32] */
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

/* Warps 0 .. n_ctas - 1, each for the CTA of its number, find the bin of round i together. */
__device__ __forceinline__ void cluster_search(cluster_shared *s, int i, int n_ctas, int bits,
                                               bin_state b)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;
    uint32_t before, high = 0, low = 0, count = 0;

    s->part_coarse[i_warp][lane] = load_cluster(&s->coarse[i][lane], i_warp);
    s->part_coarse[i_warp][lane + 32] = load_cluster(&s->coarse[i][lane + 32], i_warp);
    named_barrier(1, n_ctas * 32);
#pragma unroll 4
    for (int c = 0; c < n_ctas; c++) {
        high += s->part_coarse[c][COARSE - 1 - 2 * lane];
        low += s->part_coarse[c][COARSE - 2 - 2 * lane];
    }
    int at = find_lane(high + low, b.want, lane, &before);
    uint32_t high_at = __shfl_sync(ALL, high, at);
    bool in_low = before + high_at < b.want;
    int group = COARSE - 1 - 2 * at - (in_low ? 1 : 0);
    b.want -= before + (in_low ? high_at : 0);
    uint32_t mine = load_cluster(&s->hist[i][group * 32 + lane], i_warp);
    s->part_fine[i_warp][lane] = mine;
    named_barrier(1, n_ctas * 32);
#pragma unroll 4
    for (int c = 0; c < n_ctas; c++)
        count += s->part_fine[c][31 - lane];
    at = find_lane(count, b.want, lane, &before);
    b.want -= before;
    b.count = __shfl_sync(ALL, count, at);
    b.prefix = b.prefix << bits | (uint32_t)(group * 32 + 31 - at);
    b.shift -= bits;
    /* of this warp's CTA: coarse groups above, and bins above in the group */
    uint32_t above = lane > 31 - at ? mine : 0;
    above += lane > group ? s->part_coarse[i_warp][lane] : 0;
    above += lane + 32 > group ? s->part_coarse[i_warp][lane + 32] : 0;
    above = __reduce_add_sync(ALL, above);
    if (lane == 0) s->part_above[i_warp] = i ? s->part_above[i_warp] + above : above;
    if (lane == 31 - at) s->part_ties[i_warp] = mine;
    if (i_warp == 0 && lane == 0) s->state = b;
}

/* Round i's histograms of all CTAs are made: finds the bin, adds each CTA's keys above it to part_above. Block-wide. */
__device__ __forceinline__ void cluster_find(cluster_shared *s, int i, int n_ctas, int bits,
                                             bin_state &b)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;

    __syncthreads();
#pragma unroll 2
    for (int g = i_warp; g < COARSE; g += CLUSTER_THREADS / 32) {
        uint32_t sum = __reduce_add_sync(ALL, s->hist[i][g * 32 + lane]);
        if (lane == 0) s->coarse[i][g] = sum;
    }
    cluster_arrive();
    cluster_wait();
    if (i_warp < n_ctas)
        cluster_search(s, i, n_ctas, bits, b); /* a warp per CTA: more would be in the way */
    __syncthreads();
    b = s->state;
}

/* The copies of the CTA's part of the row, a barrier for every piece, from piece `first` on. One thread, once the barriers are
 * there. What cannot go by bulk copies (whole rows that are not aligned, the last 3 scores) is left to cluster_count. */
__device__ __forceinline__ void cluster_load(cluster_shared *s, const float *row, int first, int n)
{
#pragma unroll 1
    for (int i = first; i * PIECE < n; i++) {
        uint32_t bytes = (uint32_t)min(PIECE, (n - i * PIECE) & ~3) * 4;
        if (bytes == 0) break;
        barrier_expect(&s->loaded[i], bytes);
        bulk_load(s->data + i * PIECE, row + i * PIECE, bytes, &s->loaded[i]);
    }
}

/* Turns the scores into keys, counted by their upper bits. The first `ask` come by a copy whatever n is. */
__device__ __forceinline__ void cluster_count(cluster_shared *s, const float *row, int n,
                                              bool aligned, int ask)
{
    int n_bulk = aligned ? n & ~3 : 0;

#pragma unroll 1
    for (int i = threadIdx.x * 4, piece = 0; i < n_bulk; i += PIECE, piece++) {
        barrier_wait(&s->loaded[piece], 0);
        uint4 v = *(uint4 *)&s->data[i];
        v.x = topk_key(__uint_as_float(v.x));
        v.y = topk_key(__uint_as_float(v.y));
        v.z = topk_key(__uint_as_float(v.z));
        v.w = topk_key(__uint_as_float(v.w));
        *(uint4 *)&s->data[i] = v;
        atomicAdd(&s->hist[0][v.x >> (32 - BIN_BITS)], 1);
        atomicAdd(&s->hist[0][v.y >> (32 - BIN_BITS)], 1);
        atomicAdd(&s->hist[0][v.z >> (32 - BIN_BITS)], 1);
        atomicAdd(&s->hist[0][v.w >> (32 - BIN_BITS)], 1);
    }
#pragma unroll 1
    for (int i = n_bulk + (int)threadIdx.x; i < n; i += CLUSTER_THREADS) {
        uint32_t key = topk_key(row[i]);
        if (aligned && i < ask) barrier_wait(&s->loaded[0], 0); /* it would come on top */
        s->data[i] = key;
        atomicAdd(&s->hist[0][key >> (32 - BIN_BITS)], 1);
    }
}

/* The chosen of this CTA's n keys, to their place in row r's output. */
__device__ __forceinline__ void cluster_emit(const topk_params &p, cluster_shared *s, int r,
                                             int i_cta, int begin, int n, const bin_state &b)
{
    int n_words = (n + 31) / 32;
    uint32_t *above = s->data + p.span, *ties = above + p.span / 32;
    uint32_t above_before = 0, ties_before = 0;

#pragma unroll 1
    for (int i = threadIdx.x; i < n_words * 4; i += CLUSTER_THREADS) { /* a byte of the maps */
        uint32_t a = 0, t = 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint4 v = *(const uint4 *)&s->data[i * 8 + j * 4];
            uint32_t key[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int u = 0; u < 4; u++) {
                a |= key[u] >> b.shift > b.prefix ? 1u << (j * 4 + u) : 0;
                t |= key[u] >> b.shift == b.prefix ? 1u << (j * 4 + u) : 0;
            }
        }
        uint32_t there = (1u << max(0, min(8, n - i * 8))) - 1;
        ((uint8_t *)above)[i] = (uint8_t)(a & there);
        ((uint8_t *)ties)[i] = (uint8_t)(t & there);
    }
    __syncthreads();
#pragma unroll 1
    for (int c = 0; c < i_cta; c++) {
        above_before += s->part_above[c];
        ties_before += s->part_ties[c];
    }
    uint32_t n_ties = min(s->part_ties[i_cta], b.want - min(b.want, ties_before));
    emit_bits<CLUSTER_THREADS>(above, ties, n_words, n_ties, begin, s->chosen, s->space);
    write_chosen<CLUSTER_THREADS>(p, r, (int)(above_before + min(b.want, ties_before)),
                                  (int)(s->part_above[i_cta] + n_ties), s->chosen);
    if (i_cta == 0 && threadIdx.x == 0) p.n_selected[r] = p.k;
}

__global__ void __launch_bounds__(CLUSTER_THREADS, 1)
    topk_cluster(const __grid_constant__ topk_params p, int n_ctas)
{
    extern __shared__ uint4 memory[];
    cluster_shared *s = (cluster_shared *)memory;
    int i_cta = (int)cluster_rank(), r = p.i_row + (int)blockIdx.x / n_ctas;
    int begin = i_cta * p.span, ask = max(0, min(min(p.span, PIECE), p.limit - begin)) & ~3;
    const float *row = p.score + (size_t)(r - p.i_row) * p.ld + begin;
    bool aligned = ((uintptr_t)row & 15) == 0;
    bin_state b = {0, (uint32_t)p.k, 0, 32};

    /* The first piece is asked for before it is known how much of it counts: that takes as long to come. */
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < PIECES; i++)
            barrier_init(&s->loaded[i], 1);
        barrier_init_fence();
        if (aligned) cluster_load(s, row, 0, ask);
    }
    int context = topk_context(p, r), live = *p.rows.n;
#pragma unroll 1
    for (int i = threadIdx.x; i < ROUNDS * BINS / 4; i += CLUSTER_THREADS)
        ((uint4 *)s->hist)[i] = make_uint4(0, 0, 0, 0);
    if (r >= live || context <= p.k) { /* for all CTAs of the cluster alike */
        if (r < live && i_cta == 0) write_identity<CLUSTER_THREADS>(p, r, context);
        if (threadIdx.x == 0 && aligned && ask) barrier_wait(&s->loaded[0], 0);
        return;
    }
    int n = max(0, min(p.span, context - begin));
    if (threadIdx.x == 0 && aligned) cluster_load(s, row, 1, n);
    if (i_cta == 0) prefetch_pages<CLUSTER_THREADS>(p, r, context);
    __syncthreads();
    cluster_count(s, row, n, aligned, ask);
#pragma unroll 1
    for (int i = 0; i < ROUNDS; i++) {
        int bits = i < ROUNDS - 1 ? BIN_BITS : 32 - (ROUNDS - 1) * BIN_BITS;
        if (i > 0)
#pragma unroll 1
            for (int j = threadIdx.x * 4; j < n; j += PIECE) {
                uint4 v = *(const uint4 *)&s->data[j];
                uint32_t key[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int u = 0; u < 4; u++)
                    if (key[u] >> b.shift == b.prefix && j + u < n)
                        atomicAdd(&s->hist[i][key[u] >> (b.shift - bits) & ((1u << bits) - 1)], 1);
            }
        cluster_find(s, i, n_ctas, bits, b);
        if (b.count == b.want) break; /* the whole bin is chosen */
    }
    cluster_arrive(); /* no more reads of other CTAs' memory; it must stay until all have said so */
    cluster_emit(p, s, r, i_cta, begin, n, b);
    if (threadIdx.x == 0 && aligned && ask) barrier_wait(&s->loaded[0], 0); /* though n may be 0 */
    cluster_wait();
}

/* ---- many rows: a CTA per row --------------------------------------------------------------------------------------- */

constexpr int LIST_MAX = 8192, SAMPLES = 4096;
constexpr int LIST_AIM =
    4608; /* candidates that the bound should leave: between TR_CUDA_TOPK_MAX and LIST_MAX */

/* Keys in [low, high] hold the want-th of what is left, of `count`. */
struct key_range {
    uint32_t low, high, want, count;
};

struct stream_shared {
    uint32_t hist[BINS], coarse[COARSE];
    uint2 space[32];
    key_range range;
    uint32_t n_list, n_good, high, unused;
    uint2 list
        [LIST_MAX]; /* bits of the score, position; before: the sample; after: the chosen positions */
    uint32_t bits[]; /* above [words], ties [words] */
};

/* What the search looks through. */
enum search_in { IN_LIST, IN_ROW };

/* Narrows the range until all of it is wanted or it is one key, or it has no more than `enough` keys. Block-wide. One copy of
 * the code serves both and the sample: instructions that come from memory cost more here than what they do. */
template <int THREADS>
__device__ __noinline__ key_range search(search_in where, const float *row, int n, key_range a,
                                         uint32_t enough)
{
    extern __shared__ uint4 memory[];
    stream_shared *s = (stream_shared *)memory;
    int lane = threadIdx.x & 31;

#pragma unroll 1
    for (int shift = 32; shift > 0;) {
        uint32_t span = a.high - a.low, before;
        int n_bits = 32 - __clz((int)span);
        shift = n_bits > BIN_BITS ? n_bits - BIN_BITS : 0;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < BINS / 4; i += THREADS)
            ((uint4 *)s->hist)[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += THREADS) {
            float x = where == IN_ROW ? row[i] : __uint_as_float(s->list[i].x);
            uint32_t key = topk_key(x) - a.low;
            if (key <= span) atomicAdd(&s->hist[key >> shift], 1);
        }
        __syncthreads();
#pragma unroll 1
        for (int g = threadIdx.x >> 5; g < COARSE; g += THREADS / 32) {
            uint32_t sum = __reduce_add_sync(ALL, s->hist[g * 32 + lane]);
            if (lane == 0) s->coarse[g] = sum;
        }
        __syncthreads();
        if (threadIdx.x < 32) { /* more warps would only be in the way */
            uint32_t high = s->coarse[COARSE - 1 - 2 * lane],
                     low = s->coarse[COARSE - 2 - 2 * lane];
            int at = find_lane(high + low, a.want, lane, &before);
            uint32_t high_at = __shfl_sync(ALL, high, at);
            bool in_low = before + high_at < a.want;
            int group = COARSE - 1 - 2 * at - (in_low ? 1 : 0);
            a.want -= before + (in_low ? high_at : 0);
            uint32_t count = s->hist[group * 32 + 31 - lane];
            at = find_lane(count, a.want, lane, &before);
            a.want -= before;
            a.count = __shfl_sync(ALL, count, at);
            a.low += (uint32_t)(group * 32 + 31 - at) << shift;
            a.high = a.low + min(a.high - a.low, (1u << shift) - 1);
            if (lane == 0) s->range = a;
        }
        __syncthreads();
        a = s->range;
        if (a.count == a.want || a.count <= enough) break;
    }
    return a;
}

/* A bound that about LIST_AIM of the row's n > LIST_MAX scores are not below, judged by a sample of groups of 4. */
template <int THREADS>
__device__ __forceinline__ uint32_t guess_bound(stream_shared *s, const float *row, int n)
{
    uint32_t rank = (uint32_t)((int64_t)SAMPLES * LIST_AIM / n);

#pragma unroll 4
    for (int i = threadIdx.x; i < SAMPLES; i += THREADS) {
        int at = (int)((int64_t)(i / 4) * (n / 4) / (SAMPLES / 4)) * 4 + i % 4;
        s->list[i].x = __float_as_uint(row[at]);
    }
    key_range a = search<THREADS>(IN_LIST, row, SAMPLES, {0, ALL, rank, 0}, rank / 8);
    __syncthreads();
    return a.low;
}

/* Appends the elements of `mask` (of 4 quads, quad u at position first + u * step) to the list; s->n_list counts also those
 * that find no room. Whole warps. */
__device__ __forceinline__ void append(stream_shared *s, uint32_t mask, const float4 (&v)[4],
                                       int first, int step)
{
    int lane = threadIdx.x & 31;
    uint32_t count = (uint32_t)__popc(mask), end = warp_prefix(count, lane), at = 0;
    uint32_t all = __shfl_sync(ALL, end, 31);

    if (all == 0) return;
    if (lane == 0) at = atomicAdd(&s->n_list, all);
    at = __shfl_sync(ALL, at, 0);
    if (at + all > LIST_MAX) return;
    uint2 *to = s->list + at + end - count;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float4 f = v[i / 4];
        float x = i % 4 == 0 ? f.x : i % 4 == 1 ? f.y : i % 4 == 2 ? f.z : f.w;
        if (mask & 1u << i)
            *to++ = make_uint2(__float_as_uint(x), (uint32_t)(first + i / 4 * step + i % 4));
    }
}

/* Lists the scores that are not below the key `bound`, and every NaN. */
template <int THREADS>
__device__ __forceinline__ void collect(stream_shared *s, const float *row, int n, uint32_t bound)
{
    constexpr int STEP = THREADS * 4;
    int n_quads = ((uintptr_t)row & 15) == 0 ? n & ~3 : 0; /* scores that can be read by fours */
    float least = bound <= KEY_OF_MINUS_INF ? -INFINITY : topk_float(bound);

#pragma unroll 1
    for (int base = 0; base < n_quads; base += 4 * STEP) {
        int first = base + (int)threadIdx.x * 4;
        float4 v[4];
        uint32_t mask = 0;
#pragma unroll
        for (int u = 0; u < 4; u++)
            if (first + u * STEP < n_quads) v[u] = __ldcs((const float4 *)(row + first + u * STEP));
#pragma unroll
        for (int u = 0; u < 4; u++) {
            uint32_t m = (!(v[u].x < least) ? 1u : 0u) | (!(v[u].y < least) ? 2u : 0u) |
                         (!(v[u].z < least) ? 4u : 0u) | (!(v[u].w < least) ? 8u : 0u);
            if (first + u * STEP < n_quads) mask |= m << 4 * u;
        }
        append(s, mask, v, first, STEP);
    }
#pragma unroll 1
    for (int base = n_quads; base < n; base += THREADS) {
        int i = base + (int)threadIdx.x;
        float x = i < n ? row[i] : 0.0f;
        if (i < n && !(x < least)) {
            uint32_t at = atomicAdd(&s->n_list, 1);
            if (at < LIST_MAX) s->list[at] = make_uint2(__float_as_uint(x), (uint32_t)i);
        }
    }
    __syncthreads();
}

/* Largest key of the list, and in s->n_good how many are not below the bound (NaN may be). Block-wide; both are 0 before. */
template <int THREADS>
__device__ __forceinline__ uint32_t list_high(stream_shared *s, int n_list, uint32_t bound)
{
    uint32_t high = 0, n_good = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < n_list; i += THREADS) {
        uint32_t key = topk_key(__uint_as_float(s->list[i].x));
        high = max(high, key);
        n_good += key >= bound;
    }
    high = __reduce_max_sync(ALL, high);
    n_good = __reduce_add_sync(ALL, n_good);
    if ((threadIdx.x & 31) == 0) {
        atomicMax(&s->high, high);
        atomicAdd(&s->n_good, n_good);
    }
    __syncthreads();
    return s->high;
}

/* Bit maps of the keys above the range and in it, from the list. */
template <int THREADS>
__device__ __forceinline__ void map_list(stream_shared *s, int n_list, const key_range &a,
                                         uint32_t *above, uint32_t *ties, int n_words)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < n_words; i += THREADS)
        above[i] = ties[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < n_list; i += THREADS) {
        uint2 e = s->list[i];
        uint32_t key = topk_key(__uint_as_float(e.x));
        if (key >= a.low) atomicOr((key > a.high ? above : ties) + e.y / 32, 1u << (e.y % 32));
    }
}

/* The same from the row itself. */
template <int THREADS>
__device__ __forceinline__ void map_row(const float *row, int n, const key_range &a,
                                        uint32_t *above, uint32_t *ties, int n_words)
{
    int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int w = threadIdx.x >> 5; w < n_words; w += THREADS / 32) {
        int i = w * 32 + lane;
        uint32_t key = i < n ? topk_key(row[i]) : 0;
        unsigned is_above = __ballot_sync(ALL, i < n && key > a.high);
        unsigned is_tie = __ballot_sync(ALL, i < n && key >= a.low && key <= a.high);
        if (lane == 0) above[w] = is_above;
        if (lane == 0) ties[w] = is_tie;
    }
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    topk_stream(const __grid_constant__ topk_params p)
{
    extern __shared__ uint4 memory[];
    stream_shared *s = (stream_shared *)memory;
    int r = p.i_row + (int)blockIdx.x, n = topk_context(p, r), live = *p.rows.n;
    uint32_t bound = 0;

    if (r >= live) return;
    if (n <= p.k) {
        write_identity<THREADS>(p, r, n);
        return;
    }
    prefetch_pages<THREADS>(p, r, n);
    const float *row = p.score + (size_t)(r - p.i_row) * p.ld;
    int n_words = (n + 31) / 32;
    uint32_t *above = s->bits, *ties = above + (p.span + 31) / 32;
    key_range a = {0, ALL, (uint32_t)p.k, 0};

    if (threadIdx.x == 0) s->n_list = s->n_good = s->high = 0;
    __syncthreads();
    if (n > LIST_MAX) bound = guess_bound<THREADS>(s, row, n);
    collect<THREADS>(s, row, n, bound);
    int n_list = (int)s->n_list;
    uint32_t high = list_high<THREADS>(s, min(n_list, LIST_MAX), bound);
    bool in_list = n_list <= LIST_MAX && (int)s->n_good >= p.k; /* else the guess was wrong */
    if (in_list) {
        a.low = bound;
        a.high = high;
    }
    a = search<THREADS>(in_list ? IN_LIST : IN_ROW, row, in_list ? n_list : n, a, 0);
    if (in_list)
        map_list<THREADS>(s, n_list, a, above, ties, n_words);
    else
        map_row<THREADS>(row, n, a, above, ties, n_words);
    int32_t *chosen = (int32_t *)s->list;
    emit_bits<THREADS>(above, ties, n_words, a.want, 0, chosen, s->space);
    write_chosen<THREADS>(p, r, 0, p.k, chosen);
    if (threadIdx.x == 0) p.n_selected[r] = p.k;
}

/* ---- launches --------------------------------------------------------------------------------------------------------- */

cudaError_t launch_cluster(topk_params p, int n_rows, int context, int n_ctas, cudaStream_t stream)
{
    p.span = ((context + n_ctas - 1) / n_ctas + 127) / 128 * 128;
    p.limit = !p.score ? 0 : p.ld < (size_t)context ? (int)p.ld : context;
    size_t bytes = sizeof(cluster_shared) + (size_t)(p.span + p.span / 16) * 4;
    cudaLaunchAttribute cluster;
    cudaLaunchConfig_t config = {};

    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {(unsigned)n_ctas, 1, 1};
    config.gridDim = (unsigned)(n_rows * n_ctas);
    config.blockDim = CLUSTER_THREADS;
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    cudaError_t st =
        cudaFuncSetAttribute(topk_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (st == cudaSuccess && n_ctas > 8)
        st = cudaFuncSetAttribute(topk_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return st != cudaSuccess ? st : cudaLaunchKernelEx(&config, topk_cluster, p, n_ctas);
}

template <int THREADS>
cudaError_t launch_stream(topk_params p, int n_rows, int context, cudaStream_t stream)
{
    p.span = context;
    size_t bytes = sizeof(stream_shared) + (size_t)((context + 31) / 32) * 8;
    cudaError_t st = cudaFuncSetAttribute(topk_stream<THREADS>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (st != cudaSuccess) return st;
    topk_stream<THREADS><<<(unsigned)n_rows, THREADS, bytes, stream>>>(p);
    return cudaGetLastError();
}

/* CTAs of the cluster that takes a row, at most one CTA per SM in all; 0: the rows are too many or too long for that. */
int cluster_size(int n_rows, int context, int n_sms)
{
    constexpr int SPAN_MIN = 2048,
                  SPAN_MIN_16 = 16384; /* 8 CTAs of 16K take 17.9 us, 16 of 8K 18.5 */
    int n = CLUSTER_MAX;

    while (n > 1 && ((int64_t)n_rows * n > n_sms || context / n < (n > 8 ? SPAN_MIN_16 : SPAN_MIN)))
        n /= 2;
    return (int64_t)n_rows * n <= n_sms && (context + n - 1) / n <= SPAN_MAX ? n : 0;
}

} // namespace
} // namespace tr

extern "C" cudaError_t tr_cuda_topk_as(const struct tr_topk_args *a, int n_ctas,
                                       cudaStream_t stream)
{
    const tr_rows *rows = a->rows;
    int row_end = rows->n_max - a->i_row < a->n_row ? rows->n_max : a->i_row + a->n_row;
    tr::topk_params p = {*rows,       a->score,     a->ld,         a->k, a->i_row, row_end,
                         a->position, a->cache_row, a->n_selected, 0,    0};
    int n_rows = row_end - a->i_row, device, n_sms;

    if (a->k < 1 || a->k > TR_CUDA_TOPK_MAX || a->i_row < 0) return cudaErrorInvalidValue;
    if (n_rows <= 0) return cudaSuccess;
    cudaError_t st = cudaGetDevice(&device);
    if (st == cudaSuccess)
        st = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    if (st != cudaSuccess) return st;
    if (!n_ctas) n_ctas = tr::cluster_size(n_rows, rows->max_context, n_sms);
    if (n_ctas) return tr::launch_cluster(p, n_rows, rows->max_context, n_ctas, stream);
    return n_rows <= n_sms ? tr::launch_stream<1024>(p, n_rows, rows->max_context, stream)
                           : tr::launch_stream<512>(p, n_rows, rows->max_context, stream);
}

extern "C" cudaError_t tr_cuda_topk(const struct tr_topk_args *a, cudaStream_t stream)
{
    return tr_cuda_topk_as(a, 0, stream);
}
