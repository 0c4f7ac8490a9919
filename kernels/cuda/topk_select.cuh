/* What both kernels of topk.cu are made of: order-preserving keys, histograms and the bin where the k-th key lies, bit maps
 * over positions, and the output of a row. The selected set is collected in bit maps, so that positions come out ascending
 * whatever order threads worked in. */
#ifndef TR_CUDA_TOPK_SELECT_CUH
#define TR_CUDA_TOPK_SELECT_CUH

#include <stdint.h>

#include "kernels/kernels.h"

namespace tr
{

constexpr int BINS = 2048, BIN_BITS = 11, COARSE = BINS / 32;
constexpr uint32_t ALL = 0xffffffffu, KEY_OF_MINUS_INF = 0x007fffffu;

struct topk_params {
    tr_rows rows;
    const float *score;
    size_t ld;
    int k, i_row, row_end; /* row_end: the host's bound */
    int32_t *position, *cache_row, *n_selected;
    int span; /* largest part of a row that a CTA holds (cluster), largest context (stream): sizes of shared arrays */
    int limit; /* scores of a row that may be read, whatever its context (cluster); 0: there are none */
};

/* Floats in ascending order as unsigned integers in ascending order. */
__device__ __forceinline__ uint32_t topk_key(float x)
{
    uint32_t u = __float_as_uint(fmaxf(x, -INFINITY) + 0.0f); /* no NaN; -0 + +0 is +0 */
    return u ^ ((uint32_t)((int32_t)u >> 31) | 0x80000000u);
}
__device__ __forceinline__ float topk_float(uint32_t key)
{
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ uint32_t warp_prefix(uint32_t x, int lane) /* inclusive */
{
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        uint32_t y = __shfl_up_sync(ALL, x, d);
        if (lane >= d) x += y;
    }
    return x;
}

/* Counts in descending order of bins, one per lane (or the sum of what a lane stands for): the lane in whose count the
 * want-th lies (want >= 1), and the counts before it. */
__device__ __forceinline__ int find_lane(uint32_t count, uint32_t want, int lane, uint32_t *before)
{
    uint32_t end = warp_prefix(count, lane);
    unsigned reached = __ballot_sync(ALL, end >= want);
    int i = reached ? __ffs(reached) - 1 : 31;
    *before = __shfl_sync(ALL, end - count, i);
    return i;
}

/* Exclusive prefix sums over the block of two counts at once. space: one word pair per warp. */
template <int THREADS> __device__ __forceinline__ uint2 block_prefix(uint2 x, uint2 *space)
{
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5;
    uint2 end = {warp_prefix(x.x, lane), warp_prefix(x.y, lane)};
    if (lane == 31) space[i_warp] = end;
    __syncthreads();
    uint2 w = lane < THREADS / 32 ? space[lane] : make_uint2(0, 0);
    uint32_t a = warp_prefix(w.x, lane) - w.x, b = warp_prefix(w.y, lane) - w.y;
    a = __shfl_sync(ALL, a, i_warp);
    b = __shfl_sync(ALL, b, i_warp);
    return make_uint2(a + end.x - x.x, b + end.y - x.y);
}

/* Writes the positions whose bits are set in `above`, and the first n_ties whose bits are set in `ties`, in ascending order
 * to chosen. Block-wide; begins and ends with a barrier. */
template <int THREADS>
__device__ __forceinline__ void emit_bits(const uint32_t *above, const uint32_t *ties, int n_words,
                                          uint32_t n_ties, int first_position, int32_t *chosen,
                                          uint2 *space)
{
    int per_thread = (n_words + THREADS - 1) / THREADS;
    int b = min((int)threadIdx.x * per_thread, n_words), e = min(b + per_thread, n_words);
    uint2 count = {0, 0};

    __syncthreads();
#pragma unroll 1
    for (int i = b; i < e; i++) {
        count.x += (uint32_t)__popc(above[i]);
        count.y += (uint32_t)__popc(ties[i]);
    }
    uint2 at = block_prefix<THREADS>(count, space);
    uint32_t out = at.x + min(at.y, n_ties);
    uint32_t left = n_ties - min(at.y, n_ties); /* ties that may still be taken */
#pragma unroll 1
    for (int i = b; i < e; i++) {
        uint32_t tie = ties[i], word = above[i];
        if ((uint32_t)__popc(tie) <= left) {
            word |= tie;
            left -= (uint32_t)__popc(tie);
        } else {
#pragma unroll 1
            for (; left; left--, tie &= tie - 1)
                word |= tie & (0u - tie);
        }
#pragma unroll 1
        for (; word; word &= word - 1)
            chosen[out++] = first_position + i * 32 + __ffs(word) - 1;
    }
    __syncthreads();
}

/* Row r's outputs [begin, begin + n) from chosen. */
template <int THREADS>
__device__ __forceinline__ void write_chosen(const topk_params &p, int r, int begin, int n,
                                             const int32_t *chosen)
{
    const int32_t *pages = p.rows.page_table + (size_t)p.rows.slot[r] * p.rows.max_pages;
    size_t to = (size_t)r * p.k + begin;
#pragma unroll 2
    for (int i = threadIdx.x; i < n; i += THREADS) {
        int s = chosen[i];
        p.position[to + i] = s;
        p.cache_row[to + i] = pages[s / TR_PAGE_TOKENS] * TR_PAGE_TOKENS + s % TR_PAGE_TOKENS;
    }
}

/* Rows without a choice to make: the identity 0..n-1 (n <= k), then -1. */
template <int THREADS>
__device__ __forceinline__ void write_identity(const topk_params &p, int r, int n)
{
    const int32_t *pages = p.rows.page_table + (size_t)p.rows.slot[r] * p.rows.max_pages;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.k; i += THREADS) {
        size_t to = (size_t)r * p.k + i;
        p.position[to] = i < n ? i : -1;
        p.cache_row[to] =
            i < n ? pages[i / TR_PAGE_TOKENS] * TR_PAGE_TOKENS + i % TR_PAGE_TOKENS : -1;
    }
    if (threadIdx.x == 0) p.n_selected[r] = n;
}

/* Row r's entries of the page table into the L2: wanted at the end, when nothing else is left to wait for. */
template <int THREADS>
__device__ __forceinline__ void prefetch_pages(const topk_params &p, int r, int n)
{
    const int32_t *pages = p.rows.page_table + (size_t)p.rows.slot[r] * p.rows.max_pages;
#pragma unroll 1
    for (int i = threadIdx.x * 32; i < (n + TR_PAGE_TOKENS - 1) / TR_PAGE_TOKENS; i += THREADS * 32)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(pages + i));
}

/* Keys of row r's context; 0: dense or pad. */
__device__ __forceinline__ int topk_context(const topk_params &p, int r)
{
    int n = p.rows.position[r] + 1;
    bool none = p.rows.dense[r] || p.rows.write[r] < 0;
    return none ? 0 : n;
}

} // namespace tr

#endif
