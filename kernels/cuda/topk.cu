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

struct cluster_shared {
    uint32_t hist[ROUNDS][BINS], coarse[ROUNDS][COARSE]; /* read by the cluster: one set a round, never reused */
    uint32_t part_coarse[CLUSTER_MAX][COARSE], part_fine[CLUSTER_MAX][32];
    uint32_t part_above[CLUSTER_MAX], part_ties[CLUSTER_MAX]; /* each CTA's keys above the bin found, in it */
    uint2 space[CLUSTER_THREADS / 32];
    int32_t chosen[TR_CUDA_TOPK_MAX];
    uint32_t data[]; /* keys [span], above [span / 32], ties [span / 32] */
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

/* Where the search stands: keys whose bits above `shift` are `prefix` hold the want-th of what is left, of `count`. */
struct bin_state {
    uint32_t prefix, want, count;
    int shift;
};

/* Round i's histograms of all CTAs are made: finds the bin, adds each CTA's keys above it to part_above. Block-wide. */
__device__ __forceinline__ void cluster_find(cluster_shared *s, int i, int n_ctas, int bits,
                                             bin_state &b)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;
    uint32_t before, high = 0, low = 0, mine = 0;

    __syncthreads();
    for (int g = i_warp; g < COARSE; g += CLUSTER_THREADS / 32) {
        uint32_t sum = __reduce_add_sync(ALL, s->hist[i][g * 32 + lane]);
        if (lane == 0) s->coarse[i][g] = sum;
    }
    cluster_arrive();
    cluster_wait();
    if (i_warp < n_ctas) {
        s->part_coarse[i_warp][lane] = load_cluster(&s->coarse[i][lane], i_warp);
        s->part_coarse[i_warp][lane + 32] = load_cluster(&s->coarse[i][lane + 32], i_warp);
    }
    __syncthreads();
    for (int c = 0; c < n_ctas; c++) {
        high += s->part_coarse[c][COARSE - 1 - 2 * lane];
        low += s->part_coarse[c][COARSE - 2 - 2 * lane];
    }
    int at = find_lane(high + low, b.want, lane, &before);
    uint32_t high_at = __shfl_sync(ALL, high, at);
    bool in_low = before + high_at < b.want;
    int group = COARSE - 1 - 2 * at - (in_low ? 1 : 0);
    b.want -= before + (in_low ? high_at : 0);
    if (i_warp < n_ctas) {
        mine = load_cluster(&s->hist[i][group * 32 + lane], i_warp);
        s->part_fine[i_warp][lane] = mine;
    }
    __syncthreads();
    uint32_t count = 0;
    for (int c = 0; c < n_ctas; c++)
        count += s->part_fine[c][31 - lane];
    at = find_lane(count, b.want, lane, &before);
    b.want -= before;
    b.count = __shfl_sync(ALL, count, at);
    b.prefix = b.prefix << bits | (uint32_t)(group * 32 + 31 - at);
    b.shift -= bits;
    if (i_warp < n_ctas) { /* of this warp's CTA: coarse groups above, and bins above in the group */
        uint32_t above = lane > 31 - at ? mine : 0;
        above += lane > group ? s->part_coarse[i_warp][lane] : 0;
        above += lane + 32 > group ? s->part_coarse[i_warp][lane + 32] : 0;
        above = __reduce_add_sync(ALL, above);
        if (lane == 0) s->part_above[i_warp] = i ? s->part_above[i_warp] + above : above;
        if (lane == 31 - at) s->part_ties[i_warp] = mine;
    }
}

/* The CTA's part of the row into shared memory as keys, counted by their upper bits. */
__device__ __forceinline__ void cluster_load(cluster_shared *s, const float *row, int n)
{
    constexpr int AHEAD = 4, STEP = CLUSTER_THREADS * 4;
    bool aligned = ((uintptr_t)row & 15) == 0;

    for (int i = threadIdx.x * 4; i < n; i += AHEAD * STEP) {
        four_floats v[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            v[u] = load_four(row, i + u * STEP, n, aligned);
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (i + u * STEP + j >= n) continue;
                uint32_t key = topk_key(v[u].x[j]);
                s->data[i + u * STEP + j] = key;
                atomicAdd(&s->hist[0][key >> (32 - BIN_BITS)], 1);
            }
    }
}

/* The chosen of this CTA's n keys, to their place in row r's output. */
__device__ __forceinline__ void cluster_emit(const topk_params &p, cluster_shared *s, int r,
                                             int i_cta, int begin, int n, const bin_state &b)
{
    int lane = threadIdx.x & 31, n_words = (n + 31) / 32;
    uint32_t *above = s->data + p.span, *ties = above + p.span / 32;
    uint32_t above_before = 0, ties_before = 0;

    for (int w = threadIdx.x >> 5; w < n_words; w += CLUSTER_THREADS / 32) {
        int i = w * 32 + lane;
        uint32_t high = i < n ? s->data[i] >> b.shift : 0;
        unsigned is_above = __ballot_sync(ALL, i < n && high > b.prefix);
        unsigned is_tie = __ballot_sync(ALL, i < n && high == b.prefix);
        if (lane == 0) above[w] = is_above;
        if (lane == 0) ties[w] = is_tie;
    }
    __syncthreads();
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
    int context = topk_context(p, r), live = *p.rows.n;
    bin_state b = {0, (uint32_t)p.k, 0, 32};

    if (r >= live) return; /* these two for all CTAs of the cluster alike */
    if (context <= p.k) {
        if (i_cta == 0) write_identity<CLUSTER_THREADS>(p, r, context);
        return;
    }
    if (i_cta == 0) prefetch_pages<CLUSTER_THREADS>(p, r, context);
    int part = ((context + n_ctas - 1) / n_ctas + 127) / 128 * 128;
    int begin = i_cta * part, n = max(0, min(part, context - begin));
    for (int i = threadIdx.x; i < ROUNDS * BINS; i += CLUSTER_THREADS)
        s->hist[0][i] = 0;
    __syncthreads();
    cluster_load(s, p.score + (size_t)(r - p.i_row) * p.ld + begin, n);
    for (int i = 0; i < ROUNDS; i++) {
        int bits = i < ROUNDS - 1 ? BIN_BITS : 32 - (ROUNDS - 1) * BIN_BITS;
        if (i > 0)
            for (int j = threadIdx.x; j < n; j += CLUSTER_THREADS) {
                uint32_t key = s->data[j];
                if (key >> b.shift == b.prefix)
                    atomicAdd(&s->hist[i][key >> (b.shift - bits) & ((1u << bits) - 1)], 1);
            }
        cluster_find(s, i, n_ctas, bits, b);
        if (b.count == b.want) break; /* the whole bin is chosen */
    }
    cluster_arrive(); /* no more reads of other CTAs' memory; it must stay until all have said so */
    cluster_emit(p, s, r, i_cta, begin, n, b);
    cluster_wait();
}

/* ---- many rows: a CTA per row --------------------------------------------------------------------------------------- */

constexpr int LIST_MAX = 8192, SAMPLES = 4096;
constexpr int LIST_AIM = 4608; /* candidates that the bound should leave: between TR_CUDA_TOPK_MAX and LIST_MAX */

struct stream_shared {
    uint32_t hist[BINS], coarse[COARSE];
    uint2 space[32];
    uint32_t n_list, high;
    uint2 list[LIST_MAX]; /* bits of the score, position; before: the sample; after: the chosen positions */
    uint32_t bits[];      /* above [words], ties [words] */
};

/* Keys in [low, high] hold the want-th of what is left, of `count`. */
struct key_range {
    uint32_t low, high, want, count;
};

/* Narrows the range until all of it is wanted or it is one key, or it has no more than `enough` keys. each(f) calls f(key)
 * for every key, those outside the range too. Block-wide. */
template <int THREADS, class EACH>
__device__ __forceinline__ key_range search(stream_shared *s, key_range a, uint32_t enough,
                                            EACH each)
{
    int lane = threadIdx.x & 31;

    for (int shift = 32; shift > 0;) {
        uint32_t span = a.high - a.low, before;
        int n_bits = 32 - __clz((int)span);
        shift = n_bits > BIN_BITS ? n_bits - BIN_BITS : 0;
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            s->hist[i] = 0;
        __syncthreads();
        each([&](uint32_t key) {
            if (key - a.low <= span) atomicAdd(&s->hist[(key - a.low) >> shift], 1);
        });
        __syncthreads();
        for (int g = threadIdx.x >> 5; g < COARSE; g += THREADS / 32) {
            uint32_t sum = __reduce_add_sync(ALL, s->hist[g * 32 + lane]);
            if (lane == 0) s->coarse[g] = sum;
        }
        __syncthreads();
        uint32_t high = s->coarse[COARSE - 1 - 2 * lane], low = s->coarse[COARSE - 2 - 2 * lane];
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
        if (a.count == a.want || a.count <= enough) break;
    }
    return a;
}

/* A bound that about LIST_AIM of the row's n > LIST_MAX scores are not below, judged by a sample. */
template <int THREADS>
__device__ __forceinline__ uint32_t guess_bound(stream_shared *s, const float *row, int n,
                                                bool aligned)
{
    uint32_t *sample = (uint32_t *)s->list;
    uint32_t rank = (uint32_t)((int64_t)SAMPLES * LIST_AIM / n);

    for (int i = threadIdx.x; i < SAMPLES / 4; i += THREADS) {
        four_floats v = load_four(row, (int)((int64_t)i * (n / 4) / (SAMPLES / 4)) * 4, n, aligned);
#pragma unroll
        for (int j = 0; j < 4; j++)
            sample[i * 4 + j] = topk_key(v.x[j]);
    }
    key_range a = search<THREADS>(s, {0, ALL, rank, 0}, rank / 8, [&](auto f) {
        for (int i = threadIdx.x; i < SAMPLES; i += THREADS)
            f(sample[i]);
    });
    __syncthreads();
    return a.low;
}

/* Lists the scores that are not below the key `bound`; s->n_list counts them all, also those past the list's end. */
template <int THREADS>
__device__ __forceinline__ void collect(stream_shared *s, const float *row, int n, uint32_t bound,
                                        bool aligned)
{
    constexpr int AHEAD = 4, STEP = THREADS * 4;
    int lane = threadIdx.x & 31;
    bool everything = bound <= KEY_OF_MINUS_INF;
    float least = everything ? -INFINITY : topk_float(bound);

    for (int base = 0; base < n; base += AHEAD * STEP) {
        int first = base + (int)threadIdx.x * 4;
        four_floats v[AHEAD];
        uint32_t mask = 0;
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            v[u] = load_four(row, first + u * STEP, n, aligned);
#pragma unroll
        for (int i = 0; i < AHEAD * 4; i++)
            mask |= v[i / 4].x[i % 4] >= least ? 1u << i : 0;
        if (everything) { /* NaN too, but nothing past the end */
            mask = 0;
            for (int i = 0; i < AHEAD * 4; i++)
                mask |= first + i / 4 * STEP + i % 4 < n ? 1u << i : 0;
        }
        uint32_t count = (uint32_t)__popc(mask), end = warp_prefix(count, lane), at = 0;
        uint32_t all = __shfl_sync(ALL, end, 31);
        if (all == 0) continue;
        if (lane == 0) at = atomicAdd(&s->n_list, all);
        at = __shfl_sync(ALL, at, 0);
        if (at + all > LIST_MAX) continue;
        uint2 *to = s->list + at + end - count;
#pragma unroll
        for (int i = 0; i < AHEAD * 4; i++)
            if (mask & 1u << i)
                *to++ = make_uint2(__float_as_uint(v[i / 4].x[i % 4]),
                                   (uint32_t)(first + i / 4 * STEP + i % 4));
    }
    __syncthreads();
}

/* Largest key of the list. Block-wide; s->high is 0 before. */
template <int THREADS> __device__ __forceinline__ uint32_t list_high(stream_shared *s, int n_list)
{
    uint32_t high = 0;
    for (int i = threadIdx.x; i < n_list; i += THREADS)
        high = max(high, topk_key(__uint_as_float(s->list[i].x)));
    high = __reduce_max_sync(ALL, high);
    if ((threadIdx.x & 31) == 0) atomicMax(&s->high, high);
    __syncthreads();
    return s->high;
}

/* Bit maps of the keys above the range and in it, from the list. */
template <int THREADS>
__device__ __forceinline__ void map_list(stream_shared *s, int n_list, const key_range &a,
                                         uint32_t *above, uint32_t *ties, int n_words)
{
    for (int i = threadIdx.x; i < n_words; i += THREADS)
        above[i] = ties[i] = 0;
    __syncthreads();
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
    bool aligned = ((uintptr_t)row & 15) == 0;
    int n_words = (n + 31) / 32;
    uint32_t *above = s->bits, *ties = above + (p.span + 31) / 32;
    key_range a = {0, ALL, (uint32_t)p.k, 0};

    if (threadIdx.x == 0) s->n_list = s->high = 0;
    __syncthreads();
    if (n > LIST_MAX) bound = guess_bound<THREADS>(s, row, n, aligned);
    collect<THREADS>(s, row, n, bound, aligned);
    int n_list = (int)s->n_list;
    if (n_list >= p.k && n_list <= LIST_MAX) {
        a.low = bound;
        a.high = list_high<THREADS>(s, n_list);
        a = search<THREADS>(s, a, 0, [&](auto f) {
            for (int i = threadIdx.x; i < n_list; i += THREADS)
                f(topk_key(__uint_as_float(s->list[i].x)));
        });
        map_list<THREADS>(s, n_list, a, above, ties, n_words);
    } else { /* the guess was wrong */
        a = search<THREADS>(s, a, 0, [&](auto f) {
            for (int i = threadIdx.x * 4; i < n; i += THREADS * 4) {
                four_floats v = load_four(row, i, n, aligned);
                for (int j = 0; j < 4; j++)
                    if (i + j < n) f(topk_key(v.x[j]));
            }
        });
        map_row<THREADS>(row, n, a, above, ties, n_words);
    }
    int32_t *chosen = (int32_t *)s->list;
    emit_bits<THREADS>(above, ties, n_words, a.want, 0, chosen, s->space);
    write_chosen<THREADS>(p, r, 0, p.k, chosen);
    if (threadIdx.x == 0) p.n_selected[r] = p.k;
}

/* ---- launches --------------------------------------------------------------------------------------------------------- */

cudaError_t launch_cluster(topk_params p, int n_rows, int context, int n_ctas, cudaStream_t stream)
{
    p.span = ((context + n_ctas - 1) / n_ctas + 127) / 128 * 128;
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
    cudaError_t st = cudaFuncSetAttribute(topk_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          (int)bytes);
    if (st == cudaSuccess && n_ctas > 8)
        st = cudaFuncSetAttribute(topk_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return st != cudaSuccess ? st : cudaLaunchKernelEx(&config, topk_cluster, p, n_ctas);
}

template <int THREADS>
cudaError_t launch_stream(topk_params p, int n_rows, int context, cudaStream_t stream)
{
    p.span = context;
    size_t bytes = sizeof(stream_shared) + (size_t)((context + 31) / 32) * 8;
    cudaError_t st = cudaFuncSetAttribute(
        topk_stream<THREADS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (st != cudaSuccess) return st;
    topk_stream<THREADS><<<(unsigned)n_rows, THREADS, bytes, stream>>>(p);
    return cudaGetLastError();
}

/* CTAs of the cluster that takes a row, at most one CTA per SM in all; 0: the rows are too many or too long for that. */
int cluster_size(int n_rows, int context, int n_sms)
{
    constexpr int SPAN_MIN = 2048;
    int n = CLUSTER_MAX;

    while (n > 1 && ((int64_t)n_rows * n > n_sms || context / n < SPAN_MIN))
        n /= 2;
    return (int64_t)n_rows * n <= n_sms && (context + n - 1) / n <= SPAN_MAX ? n : 0;
}

} // namespace
} // namespace tr

extern "C" cudaError_t tr_cuda_topk(const struct tr_topk_args *a, cudaStream_t stream)
{
    const tr_rows *rows = a->rows;
    int row_end = rows->n_max - a->i_row < a->n_row ? rows->n_max : a->i_row + a->n_row;
    tr::topk_params p = {*rows,   a->score,    a->ld,        a->k,          a->i_row,
                         row_end, a->position, a->cache_row, a->n_selected, 0};
    int n_rows = row_end - a->i_row, device, n_sms;

    if (a->k < 1 || a->k > TR_CUDA_TOPK_MAX || a->i_row < 0) return cudaErrorInvalidValue;
    if (n_rows <= 0) return cudaSuccess;
    cudaError_t st = cudaGetDevice(&device);
    if (st == cudaSuccess)
        st = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    if (st != cudaSuccess) return st;
    int n_ctas = tr::cluster_size(n_rows, rows->max_context, n_sms);
    if (n_ctas) return tr::launch_cluster(p, n_rows, rows->max_context, n_ctas, stream);
    return n_rows <= n_sms ? tr::launch_stream<1024>(p, n_rows, rows->max_context, stream)
                           : tr::launch_stream<512>(p, n_rows, rows->max_context, stream);
}
