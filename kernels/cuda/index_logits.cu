/* Scores of the lightning indexer. Keys are the 64 rows of a matrix instruction, (query, head) pairs its columns: 64 heads of
 * 1 or 2 queries. One CTA per SM: a warpgroup that copies (queries once per group, keys through a ring of pages) and four
 * math warpgroups, so that some reduce over heads while another multiplies. A group of 8 rows gives each warpgroup 2
 * queries and all the same keys; smaller groups (decode: one row) spread the pages over the warpgroups instead. A row's
 * scores are the same sums in the same order whatever its group. */
#include "kernels/cuda/index_logits.h"

#include <cuda.h>

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/index_logits_mma.cuh"
#include "kernels/cuda/index_logits_rows.cuh"
#include "kernels/cuda/launch.cuh"

namespace tr
{
namespace
{

constexpr int D_INDEX = 128, HEADS = 64, STAGES = 8, THREADS = 640, MATH_WARPS = 16;
constexpr int MATH_GROUPS = 4, MATH_REGISTERS = 112, COPY_REGISTERS = 32, COPY_WARPS = 4;
constexpr int COPY_BARRIER = 1;
constexpr uint32_t KEY_BYTES = TR_PAGE_TOKENS * D_INDEX, SCALE_BYTES = TR_PAGE_TOKENS * 4;
static_assert(STAGES % MATH_GROUPS == 0 && STAGES % COPY_WARPS == 0,
              "a stage has the same warps all the time");

struct index_group { /* what the copying warps tell the math warps; n_rows 0: the end */
    int row, n_rows, page, n_pages, low;
    int high[GROUP_ROWS];
};

/* At an address that is a multiple of 1024: the tiles are swizzled by 128 bytes. Page number i that the CTA has seen is in
 * stage i % STAGES. `parts` warpgroups work on it, the same ones for all pages of a stage until a group with another
 * number of parts comes; no other warpgroup looks at its barriers. */
struct index_shared {
    uint8_t q[2][GROUP_ROWS][HEADS * D_INDEX];
    uint8_t key[STAGES][KEY_BYTES];
    float w[2][GROUP_ROWS][HEADS];
    float key_scale[STAGES][TR_PAGE_TOKENS];
    uint64_t full[STAGES], empty[STAGES], q_full[2], q_empty[2];
    index_group group[2];
    index_scan_space<THREADS> scan;
};
constexpr int SHARED_BYTES = (int)sizeof(index_shared);
static_assert(LAUNCH_ROWS * sizeof(index_row) <= sizeof index_shared::q + sizeof index_shared::key,
              "views of a launch's rows lie where queries and keys come later");

/* One thread. */
__device__ __forceinline__ void init_barriers(index_shared *s)
{
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
        barrier_init(&s->full[i], 1);
        barrier_init(&s->empty[i], MATH_WARPS * WARP_ARRIVALS);
    }
    for (int i = 0; i < 2; i++) {
        barrier_init(&s->q_full[i], WARP_ARRIVALS);
        barrier_init(&s->q_empty[i], MATH_WARPS * WARP_ARRIVALS);
    }
    barrier_init_fence();
}

__device__ __forceinline__ void wait_empty(index_shared *s, unsigned ring)
{
    barrier_wait(&s->empty[ring % STAGES], ring / STAGES % 2 ^ 1);
}

/* This warp's pages of a group: of n_pages, page numbers `ring` on that the CTA sees, in the page table from entry `at` on,
 * every COPY_WARPS'th. next: the table's entry that this lane has read already. */
__device__ __forceinline__ void load_pages(const index_params &p, const CUtensorMap *keys,
                                           index_shared *s, int at, int n_pages, unsigned ring,
                                           int next, uint64_t policy)
{
    int lane = threadIdx.x & 31, now = 0;

#pragma unroll 1
    for (int i = 0; n_pages > 0; i++, n_pages -= COPY_WARPS, ring += COPY_WARPS) {
        if (i % 32 == 0) {
            now = next;
            at += 32 * COPY_WARPS;
            next =
                (32 + lane) * COPY_WARPS < n_pages ? p.rows.page_table[at + lane * COPY_WARPS] : 0;
        }
        int i_page = __shfl_sync(0xffffffffu, now, i % 32);
        unsigned stage = ring % STAGES;
        if (lane == 0) {
            uint64_t *full = &s->full[stage];
            wait_empty(s, ring);
            barrier_expect(full, KEY_BYTES + SCALE_BYTES);
            tensor_load(s->key[stage], keys, 0, 0, i_page, full, policy);
            bulk_load(s->key_scale[stage],
                      p.index + (size_t)i_page * (KEY_BYTES + SCALE_BYTES) + KEY_BYTES, SCALE_BYTES,
                      full, policy);
        }
        __syncwarp();
    }
}

/* Rows [row, row + count) as group number i: what the math warps need to know, queries and weights. One warp. */
__device__ __forceinline__ void load_group(const index_params &p, const CUtensorMap *queries,
                                           index_shared *s, int i, int row, int count,
                                           const index_row &v, int page, int n_pages)
{
    int lane = threadIdx.x & 31, stage = i & 1;
    index_group *g = &s->group[stage];
    uint64_t *full = &s->q_full[stage];

    barrier_wait(&s->q_empty[stage], i / 2 % 2 ^ 1);
    if (lane < GROUP_ROWS) g->high[lane] = lane < count ? v.high : 0;
    if (lane == 0) {
        g->row = row;
        g->n_rows = count;
        g->page = page;
        g->n_pages = n_pages;
        g->low = v.low;
    }
    __syncwarp();
    if (lane && WARP_ARRIVALS > 1) barrier_arrive(full);
    if (lane == 0) {
        barrier_expect(full, (uint32_t)(count * p.n_heads * (D_INDEX + 4)));
#pragma unroll 1
        for (int j = 0; j < count; j++) {
            tensor_load(s->q[stage][j], queries, 0, 0, row + j, full);
            bulk_load(s->w[stage][j], p.w + (size_t)(row + j) * p.n_heads, (uint32_t)p.n_heads * 4,
                      full);
        }
    }
    __syncwarp();
}

/* a / parts, rounded up: parts is 1, 2 or 4. */
__device__ __forceinline__ int parts_of(int a, int parts)
{
    return max(0, a + parts - 1) >> parts / 2;
}

/* Group after group of this CTA's share; each of the copying warps. The first of them loads the groups. few: the launch's
 * rows, a lane each, if they are few. */
__device__ __forceinline__ void copy_warp(const index_params &p, const CUtensorMap *queries,
                                          const CUtensorMap *keys, index_shared *s,
                                          const index_row &few)
{
    bool is_few = p.row_end - p.i_row <= FEW_ROWS;
    int lane = threadIdx.x & 31, i_warp = (threadIdx.x >> 5) - MATH_WARPS;
    index_share share = is_few ? index_find_share_few(p, few) : s->scan.share;
    int row = share.row, i_group = 0, parts_before = 0;
    unsigned ring = 0;
    int begin = share.begin - share.before; /* work in front of the share, and up */
    int end = share.end - share.before;     /* to its end, from `row` on */

    while (end > 0 && row < p.row_end) {
        index_row v = is_few ? index_row_shuffle(few, row - p.i_row + lane)
                             : index_row_at(p, row + lane, s->scan.n);
        unsigned asks = __ballot_sync(0xffffffffu, v.slot >= 0);
        if (!(asks & 1)) {
            row += asks ? __ffs(asks) - 1 : 32;
            continue;
        }
        index_row up = index_row_shuffle(v, lane - 1);
        unsigned breaks = __ballot_sync(0xffffffffu, lane > 0 && !index_row_continues(up, v));
        int count = min(GROUP_ROWS, breaks ? __ffs(breaks) - 1 : 32);
        int low_page = __shfl_sync(0xffffffffu, v.low, 0) / TR_PAGE_TOKENS;
        int pages =
            (__shfl_sync(0xffffffffu, v.high, count - 1) - 1) / TR_PAGE_TOKENS + 1 - low_page;
        int parts =
            index_parts(count); /* the first page's worth of work is changing to the group */
        int page = max(0, parts_of(begin, parts) - 1);
        int n_pages = min(pages, parts_of(end, parts) - 1) - page;
        begin -= index_work(pages, parts);
        end -= index_work(pages, parts);
        row += count;
        if (n_pages <= 0) continue;
        page += low_page;

        int first = (int)(i_warp - ring) & (COPY_WARPS - 1); /* page of the group for this warp */
        int at = __shfl_sync(0xffffffffu, v.slot, 0) * p.rows.max_pages + page + first;
        int i_page =
            first + lane * COPY_WARPS < n_pages ? p.rows.page_table[at + lane * COPY_WARPS] : 0;
        if (parts_before && parts != parts_before) {
            /* Other warpgroups take over stages: who has not seen a stage's last page would take the one before it for
             * the next. So all pages are through first; each of these warps can tell of its own stages only. */
#pragma unroll 1
            for (int i = 0; i < STAGES; i += COPY_WARPS)
                wait_empty(s, ring + first + i);
            __syncwarp();
            named_barrier(COPY_BARRIER, COPY_WARPS * 32);
        }
        if (i_warp == 0) load_group(p, queries, s, i_group, row - count, count, v, page, n_pages);
        /* A decode row's keys are read once; a prompt's, by every group of it. */
        load_pages(p, keys, s, at, n_pages - first, ring + first, i_page,
                   parts == 1 ? policy_evict_first() : policy_evict_normal());
        parts_before = parts;
        ring += n_pages;
        i_group++;
    }
    if (i_warp == 0 && lane == 0) {
        barrier_wait(&s->q_empty[i_group & 1], i_group / 2 % 2 ^ 1);
        s->group[i_group & 1].n_rows = 0;
        barrier_arrive(&s->q_full[i_group & 1], WARP_ARRIVALS);
    }
}

__device__ __forceinline__ float add_other(float keep, float send, int lane_mask)
{
    return keep + __shfl_xor_sync(0xffffffffu, send, lane_mask);
}

/* One term: x + |x| is 2 max(x, 0) exactly, keeps a NaN, and needs no other pipe than the sum. */
__device__ __forceinline__ void add_head(float x, float half_w, float &sum)
{
    sum = fmaf(half_w, x + fabsf(x), sum);
}

/* One page against 2 queries: the score of this thread's key and query. A thread has two keys (its row of the warp and the
 * one 8 below: halves) and, of both queries, 16 heads; four lanes have all 64. The sum over the lanes leaves a lane half
 * lane >> 1 & 1 of query lane & 1. half_w are weights / 2. */
__device__ __forceinline__ float sum_heads(const float (&acc)[64], const float (&half_w)[32],
                                           int lane)
{
    float v[2][2];
    bool odd = lane & 1, high = lane & 2;

    v[0][0] = v[0][1] = v[1][0] = v[1][1] = 0.0f;
#pragma unroll
    for (int j = 0; j < 64; j++) {
        int query = j / 32, half = j % 2, head = j / 2 % 16;
        add_head(acc[query * 32 + head / 2 * 4 + half * 2 + head % 2], half_w[query * 16 + head],
                 v[query][half]);
    }
    float u0 = add_other(high ? v[0][1] : v[0][0], high ? v[0][0] : v[0][1], 2);
    float u1 = add_other(high ? v[1][1] : v[1][0], high ? v[1][0] : v[1][1], 2);
    return add_other(odd ? u1 : u0, odd ? u0 : u1, 1);
}

/* The same sums for 1 query; odd lanes have the score of the even lane before. */
__device__ __forceinline__ float sum_heads(const float (&acc)[32], const float (&half_w)[16],
                                           int lane)
{
    float v[2] = {0.0f, 0.0f};
    bool high = lane & 2;

#pragma unroll
    for (int j = 0; j < 32; j++) /* halves one after the other: they share a weight */
        add_head(acc[j / 4 * 4 + j % 2 * 2 + j / 2 % 2], half_w[j / 2], v[j % 2]);
    float u = add_other(high ? v[1] : v[0], high ? v[0] : v[1], 2);
    return add_other(u, u, 1);
}

/* threadIdx.x, read anew each time: kept, it would cost a register, and there is none left. */
__device__ __forceinline__ int thread_now()
{
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

/* The key of the page whose score the thread ends up with. */
__device__ __forceinline__ int thread_key(int thread)
{
    return (thread >> 5 & 3) * 16 + (thread >> 2 & 7) + 8 * (thread >> 1 & 1);
}

/* The whole group for one math warpgroup, QUERIES queries of it; ring: number of the group's first page. Returns the number
 * of the next group's. */
template <int QUERIES>
__device__ __forceinline__ unsigned math_group(const index_params &p, index_shared *s, int stage,
                                               unsigned ring)
{
    const index_group &g = s->group[stage];
    int parts = QUERIES == 1 ? 1 : index_parts(g.n_rows), step = MATH_GROUPS / parts;
    int lane = threadIdx.x & 31, i_wg = threadIdx.x >> 7;
    int i_query = QUERIES == 1 ? 0 : (i_wg & (parts - 1)) * 2, my_query = i_query + (lane & 1);
    int first = (int)(i_wg * step / MATH_GROUPS - ring) & (step - 1); /* page of the group for us */
    int low = g.low, left = g.n_pages - first;
    int at = (g.page + first) * TR_PAGE_TOKENS + thread_key(threadIdx.x) - low;
    float *out = p.score + (size_t)(g.row - p.i_row + my_query) * p.ld + low;
    uint32_t n_keys = (uint32_t)max(0, g.high[my_query] - low); /* 0: a query that is not there */
    uint64_t b_matrix =
        matrix_descriptor(smem_address(s->q[stage][i_query]), 16, 1024, LAYOUT_SWIZZLE_128);
    float acc[32 * QUERIES], half_w[16 * QUERIES];

#pragma unroll
    for (int i = 0; i < 8 * QUERIES; i++) {
        int head = i % 8 * 8 + (lane & 3) * 2;
        float2 x = *(const float2 *)&s->w[stage][i_query + i / 8][head];
        half_w[2 * i] = head < p.n_heads ? 0.5f * x.x : 0.0f;
        half_w[2 * i + 1] = head < p.n_heads ? 0.5f * x.y : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 32 * QUERIES; k++)
        acc[k] = 0.0f; /* no product reads it, but the compiler would keep what was there before */
    ring += first;
#pragma unroll 1
    for (; left > 0; left -= step, ring += step, at += step * TR_PAGE_TOKENS) {
        unsigned i = ring % STAGES;
        barrier_wait(&s->full[i], ring / STAGES % 2);
        uint64_t a_matrix =
            matrix_descriptor(smem_address(s->key[i]), 16, 1024, LAYOUT_SWIZZLE_128);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < D_INDEX / 32; k++)
            index_mma(acc, a_matrix + 2 * k, b_matrix + 2 * k, k > 0);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int k = 0; k < 32 * QUERIES; k++)
            wgmma_touch(acc[k]);
        int thread = thread_now();
        float scale = s->key_scale[i][thread_key(thread)];
        barrier_arrive_warp(&s->empty[i], thread % 32, (uint32_t)step);

        float x = fmaf(sum_heads(acc, half_w, thread % 32), scale, 0.0f); /* -0 + +0 is +0 */
        if ((uint32_t)at < n_keys) out[at] = x == x ? x : -INFINITY;
    }
    return ring + left;
}

__device__ __forceinline__ void math_warpgroup(const index_params &p, index_shared *s)
{
    unsigned ring = 0;

    for (int i = 0;; i++) {
        barrier_wait(&s->q_full[i & 1], i / 2 % 2);
        int n_rows = s->group[i & 1].n_rows;
        if (n_rows == 0) break;
        ring = n_rows == 1 ? math_group<1>(p, s, i & 1, ring) : math_group<2>(p, s, i & 1, ring);
        barrier_arrive_warp(&s->q_empty[i & 1], thread_now() % 32);
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    index_logits_kernel(const __grid_constant__ index_params p,
                        const __grid_constant__ CUtensorMap queries,
                        const __grid_constant__ CUtensorMap keys)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    index_shared *s = (index_shared *)memory;
    int n_rows = p.row_end - p.i_row;
    index_row v = {-1, 0, 0};

    if (threadIdx.x == 0) init_barriers(s);
    if (threadIdx.x == MATH_WARPS * 32) {
        tensor_prefetch(&queries);
        tensor_prefetch(&keys);
    }
    early::follow();
    if (n_rows > FEW_ROWS)
        index_find_share<THREADS>(p, *p.rows.n, (index_row *)s->q, &s->scan);
    else if (threadIdx.x >= MATH_WARPS * 32)
        v = index_row_at(p, p.i_row + (int)(threadIdx.x & 31), *p.rows.n);
    if (p.n_heads <
        HEADS) /* heads that are not there: no NaN may stand where their queries would be */
#pragma unroll 1
        for (int i = threadIdx.x; i < (int)(sizeof s->q / 16); i += THREADS)
            ((uint4 *)s->q)[i] = make_uint4(0, 0, 0, 0);
    fence_async_shared(); /* copies follow where views of rows and zeros were */
    __syncthreads();
    if (threadIdx.x >= MATH_WARPS * 32) {
        registers_lower<COPY_REGISTERS>();
        copy_warp(p, &queries, &keys, s, v);
    } else {
        registers_raise<MATH_REGISTERS>();
        math_warpgroup(p, s);
    }
}

/* Any head count and width, one thread per key: the shapes that no published model has. */
__global__ void index_logits_plain(const __grid_constant__ index_params p,
                                   const __grid_constant__ tr_kv_layer kv, const uint8_t *q)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    float *query = (float *)memory; /* [d] */
    int n = *p.rows.n, d = kv.d_index;

    for (int r = p.i_row + (int)blockIdx.y; r < min(n, p.row_end); r += gridDim.y) {
        index_row v = index_row_at(p, r, n);
        int page = v.low / TR_PAGE_TOKENS + (int)blockIdx.x;
        if (v.slot < 0 || page * TR_PAGE_TOKENS >= v.high) continue;
        int i_page = p.rows.page_table[(size_t)v.slot * p.rows.max_pages + page];
        const uint8_t *base = p.index + (size_t)i_page * TR_PAGE_TOKENS * (d + 4);
        const __nv_fp8_e4m3 *key = (const __nv_fp8_e4m3 *)base + (size_t)threadIdx.x * d;
        float sum = 0.0f, scale = ((const float *)(base + TR_PAGE_TOKENS * d))[threadIdx.x];
        for (int h = 0; h < p.n_heads; h++) {
            size_t at = (size_t)r * p.n_heads + h;
            __syncthreads();
            for (int i = threadIdx.x; i < d; i += TR_PAGE_TOKENS)
                query[i] = (float)((const __nv_fp8_e4m3 *)q)[at * d + i];
            __syncthreads();
            float x = 0.0f;
            for (int i = 0; i < d; i++)
                x = fmaf(query[i], (float)key[i], x);
            sum = fmaf(0.5f * p.w[at], x + fabsf(x), sum);
        }
        float x = fmaf(sum, scale, 0.0f);
        int at = page * TR_PAGE_TOKENS + (int)threadIdx.x;
        if (at >= v.low && at < v.high)
            p.score[(size_t)(r - p.i_row) * p.ld + at] = x == x ? x : -INFINITY;
    }
}

/* [n][rows][128] bytes, planes `stride` bytes apart, loaded one plane at a time in swizzled rows. */
cudaError_t make_map(CUtensorMap *map, const void *base, int n, int rows, uint64_t stride)
{
    cudaDriverEntryPointQueryResult found;
    void *encode = nullptr;
    cudaError_t st = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                                      cudaEnableDefault, &found);
    if (st != cudaSuccess) return st;
    if (found != cudaDriverEntryPointSuccess || !encode) return cudaErrorNotSupported;
    cuuint64_t dims[3] = {D_INDEX, (cuuint64_t)rows, (cuuint64_t)n};
    cuuint64_t strides[2] = {D_INDEX, stride};
    cuuint32_t box[3] = {D_INDEX, (cuuint32_t)rows, 1}, steps[3] = {1, 1, 1};
    CUresult r = ((decltype(&cuTensorMapEncodeTiled))encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void *>(base), dims, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

bool aligned(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

cudaError_t launch(const struct tr_index_logits_args *a, const index_params &p, cudaStream_t stream)
{
    int device, n_sms;
    CUtensorMap queries, keys;
    cudaError_t st =
        make_map(&queries, a->q, a->rows->n_max, a->n_heads, (uint64_t)a->n_heads * D_INDEX);
    if (st == cudaSuccess)
        st = make_map(&keys, a->kv.index, a->kv.n_pages, TR_PAGE_TOKENS, KEY_BYTES + SCALE_BYTES);
    if (st == cudaSuccess) st = cudaGetDevice(&device);
    if (st == cudaSuccess)
        st = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    if (st == cudaSuccess)
        st = cudaFuncSetAttribute(index_logits_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  SHARED_BYTES);
    if (st != cudaSuccess) return st;
    for (int i = 0; i < a->n_row; i += LAUNCH_ROWS) {
        index_params part = p;
        part.i_row = p.i_row + i;
        if (part.i_row >= p.row_end) break;
        part.row_end = min(p.row_end, part.i_row + LAUNCH_ROWS);
        part.score = p.score + (size_t)i * p.ld;
        st = early::launch(index_logits_kernel, 1, dim3((unsigned)n_sms), THREADS, SHARED_BYTES,
                           stream, part, queries, keys);
        if (st != cudaSuccess) return st;
    }
    return cudaGetLastError();
}

cudaError_t launch_plain(const struct tr_index_logits_args *a, const index_params &p,
                         cudaStream_t stream)
{
    int pages = (a->rows->max_context + TR_PAGE_TOKENS - 1) / TR_PAGE_TOKENS;
    int rows = p.row_end - p.i_row < 65535 ? p.row_end - p.i_row : 65535;

    if (pages < 1) return cudaSuccess;
    index_logits_plain<<<dim3((unsigned)pages, (unsigned)rows), TR_PAGE_TOKENS,
                         (size_t)a->kv.d_index * sizeof(float), stream>>>(p, a->kv,
                                                                          (const uint8_t *)a->q);
    return cudaGetLastError();
}

cudaError_t index_logits(const struct tr_index_logits_args *a, cudaStream_t stream)
{
    const tr_rows *rows = a->rows;
    int row_end = rows->n_max - a->i_row < a->n_row ? rows->n_max : a->i_row + a->n_row;
    index_params p = {*rows,    a->w,       (const uint8_t *)a->kv.index,
                      a->first, a->last,    a->score,
                      a->ld,    a->n_heads, a->k,
                      a->i_row, row_end};

    if (a->kv.dtype == TR_F32 || a->keys.n > 0) return cudaErrorNotSupported;
    if (a->i_row < 0 || a->n_heads < 1 || a->kv.d_index < 1 || !a->kv.index)
        return cudaErrorInvalidValue;
    if (row_end <= a->i_row) return cudaSuccess;
    if (a->kv.d_index == D_INDEX && a->n_heads % 16 == 0 && a->n_heads <= HEADS && aligned(a->q) &&
        aligned(a->w) && aligned(a->kv.index))
        return launch(a, p, stream);
    return launch_plain(a, p, stream);
}

} // namespace
} // namespace tr

extern "C" cudaError_t tr_cuda_index_logits(const struct tr_index_logits_args *a,
                                            cudaStream_t stream)
{
    return tr::index_logits(a, stream);
}
