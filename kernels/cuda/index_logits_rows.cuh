/* How the rows of a step are shared out among the CTAs of index_logits.cu. Consecutive rows of one slot that see the same
 * keys (a prompt chunk, a verification run) form groups of up to GROUP_ROWS; a decode row is a group of one. The work is
 * the sequence of (group, page) pairs, and every CTA takes an equal, contiguous part of it, found by one scan over the
 * rows; nothing is stored for it. */
#ifndef TR_CUDA_INDEX_LOGITS_ROWS_CUH
#define TR_CUDA_INDEX_LOGITS_ROWS_CUH

#include <stdint.h>

#include "kernels/kernels.h"

namespace tr
{

constexpr int GROUP_ROWS = 8;
constexpr int FEW_ROWS = 32;       /* of a launch: a lane of a warp holds each */
constexpr int LAUNCH_ROWS = 16384; /* rows of a launch at most: what a CTA has room to look at */

struct index_params {
    tr_rows rows;
    const float *w;
    const uint8_t *index; /* pages of the cache */
    const int32_t *first, *last;
    float *score;
    size_t ld;
    int n_heads, k, i_row, row_end; /* row_end: the host's bound */
};

/* What a row asks for: keys [low, high) of a slot; slot -1: nothing. */
struct index_row {
    int slot, low, high;
};

__device__ __forceinline__ index_row index_row_at(const index_params &p, int r, int n)
{
    index_row v = {-1, 0, 0};
    if (r < p.i_row || r >= p.row_end) return v;
    int position = p.rows.position[r], slot = p.rows.slot[r], low = 0, last = INT32_MAX;
    bool skip =
        (p.rows.dense[r] != 0) | (p.rows.write[r] < 0); /* no load waits for another's value */
    if (p.first) low = max(p.first[r], 0);
    if (p.last) last = p.last[r];
    v.low = low;
    v.high = min(last, position + 1);
    bool asks = !skip & (r < n) & (position >= p.k) & (v.low < v.high);
    v.slot = asks ? slot : -1;
    return v;
}

/* Lane from's row, of a warp whose lanes hold one each; no such lane: one that asks for nothing. */
__device__ __forceinline__ index_row index_row_shuffle(const index_row &v, int from)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    index_row a = {__shfl_sync(ALL_LANES, v.slot, from), __shfl_sync(ALL_LANES, v.low, from),
                   __shfl_sync(ALL_LANES, v.high, from)};
    if (from < 0 || from > 31) a.slot = -1;
    return a;
}

/* Row b follows row a in one run: the same keys, b seeing at least as far. */
__device__ __forceinline__ bool index_row_continues(const index_row &a, const index_row &b)
{
    return a.slot >= 0 && a.slot == b.slot && a.low == b.low && a.high <= b.high;
}

__device__ __forceinline__ int index_pages(const index_row &last)
{
    return (last.high - 1) / TR_PAGE_TOKENS - last.low / TR_PAGE_TOKENS + 1;
}
/* How many of the 4 math warpgroups work on the same page of a group, 2 rows each; also what the page costs. */
__device__ __forceinline__ int index_parts(int group_rows)
{
    return group_rows > 4 ? 4 : group_rows > 2 ? 2 : 1;
}

/* The work of a group: its pages, and as much as one more for changing to it (a chunk's first rows see few pages: the CTA
 * that has many such groups would come last). */
__device__ __forceinline__ int index_work(int n_pages, int parts)
{
    return (n_pages + 1) * parts;
}

/* A CTA's part [begin, end) of the work, in units of page cost, and the group that holds `begin`: its first row and the
 * work in front of it. */
struct index_share {
    int begin, end, row, before;
};

template <int THREADS> struct index_scan_space {
    int warp[THREADS / 32], n;
    index_share share;
};

/* Exclusive scan over the block, in thread order; *total: over all threads. */
template <int THREADS, bool MAX>
__device__ __forceinline__ int block_scan(int x, int *warp, int *total)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    int lane = threadIdx.x & 31, i_warp = threadIdx.x >> 5, neutral = MAX ? -1 : 0;
    int y = 0, w;
#pragma unroll 1
    for (int round = 0; round < 2; round++) { /* within the warp, then over the warps */
        int z = round == 0 ? x : lane < THREADS / 32 ? warp[lane] : neutral;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int up = __shfl_up_sync(ALL_LANES, z, d);
            if (lane >= d) z = MAX ? max(z, up) : z + up;
        }
        if (round == 0) {
            y = z;
            __syncthreads();
            if (lane == 31) warp[i_warp] = y;
            __syncthreads();
        }
        w = z;
    }
    *total = __shfl_sync(ALL_LANES, w, THREADS / 32 - 1);
    int before = __shfl_sync(ALL_LANES, w, max(i_warp - 1, 0));
    if (i_warp == 0) before = neutral;
    int up = __shfl_up_sync(ALL_LANES, y, 1);
    if (lane == 0) return before;
    return MAX ? max(before, up) : before + up;
}

/* The share, for up to FEW_ROWS rows, by one warp whose lanes hold them: a decode step would wait for the block's scans
 * longer than for its keys. */
__device__ __forceinline__ index_share index_find_share_few(const index_params &p,
                                                            const index_row &v)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    int lane = threadIdx.x & 31;
    index_row before = index_row_shuffle(v, lane - 1), next = index_row_shuffle(v, lane + 1);

    unsigned runs = __ballot_sync(ALL_LANES, lane == 0 || !index_row_continues(before, v));
    int run = 31 - __clz((int)(runs & (ALL_LANES >> (31 - lane)))), j = (lane - run) % GROUP_ROWS;
    bool goes_on = lane < 31 && j < GROUP_ROWS - 1 && index_row_continues(v, next);
    int cost = v.slot < 0 || goes_on ? 0 : index_work(index_pages(v), index_parts(j + 1));
    int sum = cost;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int up = __shfl_up_sync(ALL_LANES, sum, d);
        if (lane >= d) sum += up;
    }
    int total = __shfl_sync(ALL_LANES, sum, 31);
    int each = total / (int)gridDim.x, more = total % (int)gridDim.x, i = (int)blockIdx.x;
    int begin = each * i + min(i, more), end = each * (i + 1) + min(i + 1, more);
    unsigned holds = __ballot_sync(ALL_LANES, sum - cost <= begin && begin < sum);
    if (begin == end) return {begin, end, p.row_end, 0};
    int at = __ffs((int)holds) - 1;
    return {begin, end, p.i_row + __shfl_sync(ALL_LANES, lane - j, at),
            __shfl_sync(ALL_LANES, sum - cost, at)};
}

/* The share, for any number of rows. All threads of the block; view: space for all the rows of the launch, free again
 * afterwards. The result is in s->share, visible to all. */
template <int THREADS>
__device__ __forceinline__ void index_find_share(const index_params &p, int n, index_row *view,
                                                 index_scan_space<THREADS> *s)
{
    int n_rows = p.row_end - p.i_row, per_thread = (n_rows + THREADS - 1) / THREADS;
    int b = min((int)threadIdx.x * per_thread, n_rows), e = min(b + per_thread, n_rows);
    int run = -1, units = 0, begin = -1, end = -1, total;
    const index_row none = {-1, 0, 0};

    if (threadIdx.x == 0) s->n = n;
    if (n_rows <= THREADS) {
        if ((int)threadIdx.x < n_rows)
            view[threadIdx.x] = index_row_at(p, p.i_row + (int)threadIdx.x, n);
    } else {
#pragma unroll 4
        for (int i = threadIdx.x; i < n_rows; i += THREADS) /* many loads at once: latency counts */
            view[i] = index_row_at(p, p.i_row + i, n);
    }
    __syncthreads();
    index_row before = b > 0 && b < e ? view[b - 1] : none;
#pragma unroll 1
    for (int i = b; i < e; i++) {
        index_row v = view[i];
        if (!index_row_continues(before, v)) run = i;
        before = v;
    }
    int run_before = block_scan<THREADS, true>(run, s->warp, &total);
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) { /* add up the work; find the group that holds `begin` */
        run = run_before;
        before = b > 0 && b < e ? view[b - 1] : none;
#pragma unroll 1
        for (int i = b; i < e; i++) {
            index_row v = view[i], next = i + 1 < n_rows ? view[i + 1] : none;
            if (!index_row_continues(before, v)) run = i;
            before = v;
            int j = (i - run) % GROUP_ROWS;
            if (v.slot < 0 || (j < GROUP_ROWS - 1 && index_row_continues(v, next))) continue;
            int cost = index_work(index_pages(v), index_parts(j + 1));
            if (units <= begin && begin < units + cost)
                s->share = {begin, end, p.i_row + i - j, units};
            units += cost;
        }
        if (pass) break;
        units = block_scan<THREADS, false>(units, s->warp, &total);
        int each = total / (int)gridDim.x, more = total % (int)gridDim.x, i = (int)blockIdx.x;
        begin = each * i + min(i, more);
        end = each * (i + 1) + min(i + 1, more);
        if (begin == end && threadIdx.x == 0) s->share = {begin, end, p.row_end, 0};
        if (begin == end) break;
    }
    __syncthreads();
}

} // namespace tr

#endif
