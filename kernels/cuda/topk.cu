/* Selection of the k best keys. Two ways to spread it, with equal results: few rows: a cluster of CTAs per row, each holding
 * its part of the row (topk_cluster.cuh); many rows: a CTA per row, which guesses a bound from a sample, keeps what is not
 * below it, and selects among that. A guess that keeps too little or too much costs more passes over the row, never a wrong
 * choice. */
#include "kernels/cuda/topk.h"

#include "kernels/cuda/topk_cluster.cuh"
#include "kernels/cuda/topk_select.cuh"

namespace tr
{
namespace
{

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

template <int THREADS, int QUADS>
cudaError_t launch_cluster_as(const topk_params &p, int n_rows, int n_ctas, cudaStream_t stream)
{
    size_t bytes = sizeof(cluster_shared);
    cudaLaunchAttribute cluster;
    cudaLaunchConfig_t config = {};

    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {(unsigned)n_ctas, 1, 1};
    config.gridDim = (unsigned)(n_rows * n_ctas);
    config.blockDim = THREADS;
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    cudaError_t st = cudaFuncSetAttribute(topk_cluster<THREADS, QUADS>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (st == cudaSuccess && n_ctas > 8) { /* not every GPU has room for so many in one place */
        int room = 0;
        st = cudaFuncSetAttribute(topk_cluster<THREADS, QUADS>,
                                  cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (st == cudaSuccess)
            st = cudaOccupancyMaxActiveClusters(&room, topk_cluster<THREADS, QUADS>, &config);
        if (st == cudaSuccess && room == 0) return cudaErrorLaunchOutOfResources;
    }
    return st != cudaSuccess ? st
                             : cudaLaunchKernelEx(&config, topk_cluster<THREADS, QUADS>, p, n_ctas);
}

cudaError_t launch_cluster(topk_params p, int n_rows, int context, int n_ctas, cudaStream_t stream)
{
    p.span = ((context + n_ctas - 1) / n_ctas + 127) / 128 * 128;
    p.limit = !p.score ? 0 : p.ld < (size_t)context ? (int)p.ld : context;
    if (p.span > SPAN_MAX) return cudaErrorInvalidValue;
    return p.span <= 256 * 4 * 2    ? launch_cluster_as<256, 2>(p, n_rows, n_ctas, stream)
           : p.span <= 512 * 4 * 4  ? launch_cluster_as<512, 4>(p, n_rows, n_ctas, stream)
           : p.span <= 1024 * 4 * 4 ? launch_cluster_as<1024, 4>(p, n_rows, n_ctas, stream)
           : p.span <= 1024 * 4 * 6 ? launch_cluster_as<1024, 6>(p, n_rows, n_ctas, stream)
                                    : launch_cluster_as<1024, QUADS_MAX>(p, n_rows, n_ctas, stream);
}

template <int THREADS>
cudaError_t launch_stream(topk_params p, int n_rows, int context, cudaStream_t stream)
{
    constexpr size_t ROOM = 227 << 10; /* of an H200's block */
    static_assert(sizeof(stream_shared) + TR_CUDA_CONTEXT_MAX / 32 * 8 <= ROOM,
                  "a bit per key, twice");
    if (context > TR_CUDA_CONTEXT_MAX) return cudaErrorInvalidValue;
    p.span = context;
    size_t bytes = sizeof(stream_shared) + (size_t)((context + 31) / 32) * 8;
    cudaError_t st = cudaFuncSetAttribute(topk_stream<THREADS>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (st != cudaSuccess) return st;
    topk_stream<THREADS><<<(unsigned)n_rows, THREADS, bytes, stream>>>(p);
    return cudaGetLastError();
}

/* CTAs of the cluster that takes a row, at most one CTA per SM in all; 0: the rows are too many or too long for that. One row
 * of 32,768 keys takes 10.4 us with 16 CTAs, 11.2 with 8, one of 131,072 keys 13.1 and 15.1; 8 rows of 131,072 take 17.5 and
 * 16.1 (few clusters of 16 find room at a time), one row of 8,192 keys 9.6 and 8.5 (one H200). */
int cluster_size(int n_rows, int context, int n_sms)
{
    constexpr int ROWS_16 = 2, SPAN_MIN_16 = 2048, SPAN_MIN = 256;
    bool wide = n_rows <= ROWS_16 && context / CLUSTER_MAX >= SPAN_MIN_16;
    int n = wide || context > 8 * SPAN_MAX ? CLUSTER_MAX : 8;

    while (n > 1 && ((int64_t)n_rows * n > n_sms || context / n < SPAN_MIN))
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
    const bool chosen = !n_ctas;
    if (chosen) n_ctas = tr::cluster_size(n_rows, rows->max_context, n_sms);
    if (n_ctas) {
        st = tr::launch_cluster(p, n_rows, rows->max_context, n_ctas, stream);
        if (!chosen || n_ctas <= 8 || st != cudaErrorLaunchOutOfResources) return st;
        if (rows->max_context <= 8 * tr::SPAN_MAX)
            return tr::launch_cluster(p, n_rows, rows->max_context, 8, stream);
    }
    return n_rows <= n_sms ? tr::launch_stream<1024>(p, n_rows, rows->max_context, stream)
                           : tr::launch_stream<512>(p, n_rows, rows->max_context, stream);
}

extern "C" cudaError_t tr_cuda_topk(const struct tr_topk_args *a, cudaStream_t stream)
{
    return tr_cuda_topk_as(a, 0, stream);
}
