/* Rows to the experts of other ranks and back (parallel.md 5.1). Every order is fixed, so that sums
 * do not depend on arrival. */
#include "kernels/cuda/common.cuh"
#include "kernels/limits.h"

namespace
{

enum { THREADS = 256, MEMBERS_MAX = TR_CUDA_MOE_MEMBERS_MAX };

/* tr_dispatch_choices and tr_dispatch_bytes. */
__device__ __forceinline__ size_t choices_at(int d, bool codes)
{
    if (codes) return (size_t)d + (size_t)d / 128 * 4;
    return ((size_t)d * sizeof(__nv_bfloat16) + 3) / 4 * 4;
}

__device__ __forceinline__ size_t record_bytes(int d, int k, bool codes)
{
    return (choices_at(d, codes) + (size_t)k * 8 + 15) / 16 * 16;
}

__device__ __forceinline__ char *record_at(void *records, size_t i, int d, int k, bool codes)
{
    return (char *)records + i * record_bytes(d, k, codes);
}

/* Lines of 16 bytes. */
__device__ __forceinline__ void copy_lines(const void *from, void *to, int n)
{
#pragma unroll 4
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        ((uint4 *)to)[i] = ((const uint4 *)from)[i];
}

/* A record's activations are copied as lines where rows are whole ones. */
__device__ __forceinline__ void copy_row(const __nv_bfloat16 *from, void *to, int d)
{
    if (d % 8 == 0) {
        copy_lines(from, to, d / 8);
        return;
    }
    for (int i = (int)threadIdx.x; i < d; i += THREADS)
        ((__nv_bfloat16 *)to)[i] = from[i];
}

/* Row r of codes and their scales, into a record. */
__device__ __forceinline__ void copy_codes(const uint8_t *q, const float *q_scale, int ld_scale,
                                           size_t r, char *to, int d)
{
    const uint4 *from = (const uint4 *)(const void *)(q + r * (size_t)d);
#pragma unroll 2
    for (int i = (int)threadIdx.x; i < d / 16; i += THREADS)
        ((uint4 *)(void *)to)[i] = from[i];
#pragma unroll 1
    for (int b = (int)threadIdx.x; b < d / 128; b += THREADS)
        ((float *)(void *)(to + d))[b] = q_scale[(size_t)b * (size_t)ld_scale + r];
}

template <bool CODES, typename A>
__device__ __forceinline__ void put_row(const A &a, size_t r, char *to)
{
    if (CODES)
        copy_codes(a.q, a.q_scale, a.ld_scale, r, to, a.d);
    else
        copy_row(tr::act(a.x) + r * (size_t)a.d, to, a.d);
}

__device__ __forceinline__ int dispatch_rows(const tr_moe_dispatch_args &a)
{
    const int left = *a.n - a.first;
    return left <= 0 ? 0 : min(a.n_rows, (left + a.step - 1) / a.step);
}

/* Which of the members [low, low + 64) hold experts of row r. */
__device__ __forceinline__ uint64_t holders(const tr_moe_dispatch_args &a, int r, int low)
{
    uint64_t mask = 0;
#pragma unroll 8
    for (int j = 0; j < a.k; j++) {
        const int e = a.expert[(size_t)r * (size_t)a.k + (size_t)j] - low * a.n_local;
        if (e >= 0 && e < 64 * a.n_local) mask |= (uint64_t)1 << (e / a.n_local);
    }
    return mask;
}

enum { LISTERS = 1024, LIST_WARPS = LISTERS / 32 };

/* Of a warp's rows [begin, end): those that go to ep, and how often they go to members below it. */
__device__ __forceinline__ int2 count_rows(const tr_moe_dispatch_args &a, int ep, int begin,
                                           int end)
{
    int hits = 0, below = 0;
    for (int low = 0; low <= ep; low += 64) {
        const bool mine = ep < low + 64;
        const uint64_t less = mine ? ((uint64_t)1 << (ep - low)) - 1 : ~(uint64_t)0;
        for (int i = begin + (int)threadIdx.x % 32; i < end; i += 32) {
            const uint64_t m = holders(a, a.first + i * a.step, low);
            below += __popcll(m & less);
            if (mine) hits += (int)(m >> (ep - low) & 1);
        }
    }
    return make_int2(__reduce_add_sync(0xffffffffu, hits), __reduce_add_sync(0xffffffffu, below));
}

/* A block takes a destination: which rows go there, behind those of the destinations below it. Warps have stretches of the rows. */
__global__ void __launch_bounds__(LISTERS)
    dispatch_list(const __grid_constant__ tr_moe_dispatch_args a)
{
    __shared__ int2 part[LIST_WARPS];
    const int n = dispatch_rows(a), dest = (int)blockIdx.x, ep = dest / a.n_xt,
              warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int each = (n + LISTERS - 1) / LISTERS * 32, begin = min(n, warp * each),
              end = min(n, begin + each), low = ep / 64 * 64;

    const int2 c = count_rows(a, ep, begin, end);
    if (lane == 0) part[warp] = c;
    __syncthreads();
    const int2 other = part[lane]; /* LIST_WARPS is 32 */
    const int hits = __reduce_add_sync(0xffffffffu, other.x),
              below = __reduce_add_sync(0xffffffffu, other.y),
              before = __reduce_add_sync(0xffffffffu, lane < warp ? other.x : 0);
    if (threadIdx.x == 0) a.count[dest] = hits;
    int at = below * a.n_xt + dest % a.n_xt * hits + before;
    for (int i0 = begin; i0 < end; i0 += 32) {
        const int i = i0 + lane, r = a.first + i * a.step;
        const bool hit = i < end && holders(a, r, low) >> (ep - low) & 1;
        const unsigned all = __ballot_sync(0xffffffffu, hit);
        if (hit) a.origin[at + __popc(all & ((1u << lane) - 1))] = r;
        at += __popc(all);
    }
}

/* A block copies a record at a time. */
template <bool CODES>
__global__ void __launch_bounds__(THREADS)
    dispatch_copy(const __grid_constant__ tr_moe_dispatch_args a)
{
    int dest = 0, end = a.count[0];
    for (int at = (int)blockIdx.x;; at += (int)gridDim.x) {
        while (at >= end) {
            if (++dest == a.n_ep * a.n_xt) return;
            end += a.count[dest];
        }
        const size_t r = (size_t)a.origin[at];
        char *to = record_at(a.record, (size_t)at, a.d, a.k, CODES);
        put_row<CODES>(a, r, to);
        int32_t *choice = (int32_t *)(void *)(to + choices_at(a.d, CODES));
        const int low = dest / a.n_xt * a.n_local;
        for (int j = (int)threadIdx.x; j < a.k; j += THREADS) {
            const int32_t e = a.expert[r * (size_t)a.k + (size_t)j];
            const bool here = e >= low && e < low + a.n_local;
            choice[j] = here ? e : -1;
            ((float *)(void *)choice)[a.k + j] =
                here ? a.weight[r * (size_t)a.k + (size_t)j] : 0.0f;
        }
    }
}

/* A thread takes a choice. */
__global__ void __launch_bounds__(THREADS)
    moe_receive(const __grid_constant__ tr_moe_receive_args a)
{
    const int at = (int)(blockIdx.x * THREADS + threadIdx.x), r = at / a.k, j = at % a.k;
    if (at == 0) *a.n_out = a.n_rows;
    if (r >= a.n_rows) return;
    const char *from = record_at((void *)a.record, (size_t)r, a.d, a.k, false);
    const int32_t *choice = (const int32_t *)(const void *)(from + choices_at(a.d, false));
    a.expert[at] = choice[j];
    a.weight[at] = ((const float *)(const void *)choice)[a.k + j];
}

/* A block takes a record with codes. */
__global__ void __launch_bounds__(THREADS)
    moe_receive_codes(const __grid_constant__ tr_moe_receive_args a)
{
    const size_t r = blockIdx.x;
    if (r == 0 && threadIdx.x == 0) *a.n_out = a.n_rows;
    if (r >= (size_t)a.n_rows) return;
    const char *from = record_at((void *)a.record, r, a.d, a.k, true);
    const float *scale = (const float *)(const void *)(from + a.d);
    const int32_t *choice = (const int32_t *)(const void *)(from + choices_at(a.d, true));
    copy_lines(from, a.q + r * (size_t)a.d, a.d / 16);
    for (int b = (int)threadIdx.x; b < a.d / 128; b += THREADS)
        a.q_scale[(size_t)b * (size_t)a.ld_scale + r] = scale[b];
    for (int j = (int)threadIdx.x; j < a.k; j += THREADS) {
        a.expert[r * (size_t)a.k + (size_t)j] = choice[j];
        a.weight[r * (size_t)a.k + (size_t)j] = ((const float *)(const void *)choice)[a.k + j];
    }
}

/* Where row stands among the ascending ones [begin, end) of origin; -1: nowhere. */
__device__ __forceinline__ int find(const int32_t *origin, int begin, int end, int row)
{
    while (begin < end) {
        const int i = (begin + end) / 2, r = origin[i];
        if (r == row) return i;
        if (r < row)
            begin = i + 1;
        else
            end = i;
    }
    return -1;
}

/* A row's records: a thread looks among a member's. */
__device__ __forceinline__ int find_all(const tr_moe_return_args &a, int row, int *list, int *begin)
{
    __shared__ int n_list;
    if (threadIdx.x == 0) {
        int at = 0;
        for (int m = 0; m < a.n_members; m++) {
            begin[m] = at;
            at += a.count[m];
        }
        begin[a.n_members] = at;
    }
    __syncthreads();
    for (int m = (int)threadIdx.x; m < a.n_members; m += THREADS)
        list[m] = find(a.origin, begin[m], begin[m + 1], row);
    __syncthreads();
    if (threadIdx.x == 0) {
        int n = 0;
        for (int m = 0; m < a.n_members; m++)
            if (list[m] >= 0) list[n++] = list[m];
        n_list = n;
    }
    __syncthreads();
    return n_list;
}

union line { /* of a row */
    uint4 v;
    __nv_bfloat162 x[4];
};

/* out += y[0] + y[1] + .., one after the other. at: in numbers; 8 of them. */
template <class Y> __device__ __forceinline__ void add_line(__nv_bfloat16 *out, int n, const Y &y)
{
    line o;
    float2 sum[4];
    o.v = *(const uint4 *)(const void *)out;
#pragma unroll
    for (int j = 0; j < 4; j++)
        sum[j] = __bfloat1622float2(o.x[j]);
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        line l;
        l.v = *(const uint4 *)(const void *)y(i);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 t = __bfloat1622float2(l.x[j]);
            sum[j].x += t.x;
            sum[j].y += t.y;
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        o.x[j] = __floats2bfloat162_rn(sum[j].x, sum[j].y);
    *(uint4 *)(void *)out = o.v;
}

template <class Y> __device__ __forceinline__ void add_number(__nv_bfloat16 *out, int n, const Y &y)
{
    float sum = __bfloat162float(*out);
    for (int i = 0; i < n; i++)
        sum += __bfloat162float(*y(i));
    *out = __float2bfloat16_rn(sum);
}

/* Block i: if record i is the first of its row, all of that row's sums, members ascending. */
__global__ void __launch_bounds__(THREADS) moe_return(const __grid_constant__ tr_moe_return_args a)
{
    __shared__ int list[MEMBERS_MAX], begin[MEMBERS_MAX + 1];
    const size_t d = (size_t)a.d;
    const int first = (int)blockIdx.x, row = a.origin[first], n = find_all(a, row, list, begin);
    if (list[0] != first) return;
    __nv_bfloat16 *out = tr::act(a.out) + (size_t)row * d;
    if (a.d % 8 == 0) {
        for (int j = (int)threadIdx.x * 8; j < a.d; j += THREADS * 8)
            add_line(out + j, n, [&](int i) { return tr::act(a.y) + (size_t)list[i] * d + j; });
        return;
    }
    for (int j = (int)threadIdx.x; j < a.d; j += THREADS)
        add_number(out + j, n, [&](int i) { return tr::act(a.y) + (size_t)list[i] * d + j; });
}

/* A block takes a row. */
template <bool CODES>
__global__ void __launch_bounds__(THREADS) moe_offer(const __grid_constant__ tr_moe_offer_args a)
{
    const int r = a.first + (int)blockIdx.x, live = r < *a.n;
    char *to = record_at(a.record, (size_t)blockIdx.x, a.d, a.k, CODES);
    const int words = (int)(choices_at(a.d, CODES) / 4);
    int32_t *choice = (int32_t *)(void *)to + words;
    if (live)
        put_row<CODES>(a, (size_t)r, to);
    else {
#pragma unroll 1
        for (int i = (int)threadIdx.x; i < words; i += THREADS)
            ((uint32_t *)(void *)to)[i] = 0;
    }
#pragma unroll 1
    for (int j = (int)threadIdx.x; j < a.k; j += THREADS) {
        const size_t at = (size_t)r * (size_t)a.k + (size_t)j;
        choice[j] = live ? a.expert[at] : -1;
        ((float *)(void *)choice)[a.k + j] = live ? a.weight[at] : 0.0f;
    }
}

enum { ADDERS = 128 };

/* Rows down, stretches of them across: one row is 7 blocks of loads that do not wait for each other. */
__global__ void __launch_bounds__(ADDERS) moe_add(const __grid_constant__ tr_moe_add_args a)
{
    const int r = (int)blockIdx.y, each = a.d % 8 ? 1 : 8,
              j = ((int)blockIdx.x * ADDERS + (int)threadIdx.x) * each;
    const size_t at = (size_t)r * (size_t)a.d + (size_t)j, member = a.ld * (size_t)a.d;
    if (r >= *a.n || j >= a.d) return;
    const auto y = [&](int i) { return tr::act(a.y) + (size_t)i * member + at; };
    if (each == 8)
        add_line(tr::act(a.out) + at, a.n_members, y);
    else
        add_number(tr::act(a.out) + at, a.n_members, y);
}

} // namespace

cudaError_t tr_cuda_moe_dispatch(const struct tr_moe_dispatch_args *a, cudaStream_t stream)
{
    if (a->step < 1 || a->first < 0 || a->n_local < 1 || a->k < 1 || a->n_ep < 1 || a->n_xt < 1 ||
        (a->q && a->d % 128))
        return cudaErrorInvalidValue;
    dispatch_list<<<(unsigned)(a->n_ep * a->n_xt), LISTERS, 0, stream>>>(*a);
    const cudaError_t e = cudaGetLastError();
    if (e != cudaSuccess || a->n_rows <= 0) return e;
    const size_t records =
        (size_t)a->n_rows * (size_t)(a->k < a->n_ep ? a->k : a->n_ep) * (size_t)a->n_xt;
    const unsigned blocks = tr::at_most(records, 2048);
    if (a->q)
        dispatch_copy<true><<<blocks, THREADS, 0, stream>>>(*a);
    else
        dispatch_copy<false><<<blocks, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_moe_receive(const struct tr_moe_receive_args *a, cudaStream_t stream)
{
    if (a->k < 1 || (a->q && a->d % 128)) return cudaErrorInvalidValue;
    if (a->q) {
        moe_receive_codes<<<(unsigned)(a->n_rows > 0 ? a->n_rows : 1), THREADS, 0, stream>>>(*a);
        return cudaGetLastError();
    }
    const size_t choices = (size_t)(a->n_rows > 0 ? a->n_rows : 1) * (size_t)a->k;
    moe_receive<<<(unsigned)((choices + THREADS - 1) / THREADS), THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_moe_return(const struct tr_moe_return_args *a, cudaStream_t stream)
{
    if (a->n_rows <= 0) return cudaSuccess;
    if (a->n_members < 1 || a->n_members > MEMBERS_MAX) return cudaErrorInvalidValue;
    moe_return<<<(unsigned)a->n_rows, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_moe_offer(const struct tr_moe_offer_args *a, cudaStream_t stream)
{
    if (a->first < 0 || a->k < 1 || (a->q && a->d % 128)) return cudaErrorInvalidValue;
    if (a->n_rows <= 0) return cudaSuccess;
    if (a->q)
        moe_offer<true><<<(unsigned)a->n_rows, THREADS, 0, stream>>>(*a);
    else
        moe_offer<false><<<(unsigned)a->n_rows, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_moe_add(const struct tr_moe_add_args *a, cudaStream_t stream)
{
    if (a->n_max <= 0 || a->n_members <= 0) return cudaSuccess;
    if (a->n_max > 65535) return cudaErrorInvalidValue;
    const int each = ADDERS * (a->d % 8 ? 1 : 8);
    const unsigned across = (unsigned)((a->d + each - 1) / each);
    moe_add<<<dim3(across, (unsigned)a->n_max), ADDERS, 0, stream>>>(*a);
    return cudaGetLastError();
}
