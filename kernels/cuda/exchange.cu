/* Rows to the experts of other ranks and back (parallel.md 5.1). Every order is fixed, so that sums
 * do not depend on arrival. */
#include "kernels/cuda/common.cuh"

namespace
{

enum { THREADS = 256 };

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

__device__ __forceinline__ bool holds(const tr_moe_dispatch_args &a, int r, int ep)
{
    const int low = ep * a.n_local;
    for (int j = 0; j < a.k; j++) {
        const int32_t e = a.expert[(size_t)r * (size_t)a.k + (size_t)j];
        if (e >= low && e < low + a.n_local) return true;
    }
    return false;
}

__device__ __forceinline__ int dispatch_rows(const tr_moe_dispatch_args &a)
{
    const int left = *a.n - a.first;
    return left <= 0 ? 0 : min(a.n_rows, (left + a.step - 1) / a.step);
}

/* One block: which rows go where, in the order of destinations. */
__global__ void __launch_bounds__(THREADS)
    dispatch_list(const __grid_constant__ tr_moe_dispatch_args a)
{
    __shared__ int scratch[THREADS / 32 + 1];
    const int n = dispatch_rows(a);
    int at = 0;
    for (int dest = 0; dest < a.n_ep * a.n_xt; dest++) {
        const int begin = at;
        for (int i0 = 0; i0 < n; i0 += THREADS) {
            const int i = i0 + (int)threadIdx.x, r = a.first + i * a.step;
            const int hit = i < n && holds(a, r, dest / a.n_xt);
            int total;
            const int to = at + tr::block_scan(hit, scratch, &total);
            if (hit) a.origin[to] = r;
            at += total;
        }
        if (threadIdx.x == 0) a.count[dest] = at - begin;
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

/* Block i: if i is the first of its row, all of that row's sums, i ascending. */
__global__ void __launch_bounds__(THREADS) moe_return(const __grid_constant__ tr_moe_return_args a)
{
    enum { MOST = 1024 };
    __shared__ int scratch[THREADS / 32 + 1];
    __shared__ int list[MOST];
    const int first = (int)blockIdx.x, row = a.origin[first];
    int n = 0;
    for (int i0 = 0; i0 < first; i0 += THREADS) {
        const int i = i0 + (int)threadIdx.x;
        n |= i < first && a.origin[i] == row;
    }
    if (__syncthreads_or(n)) return;
    n = 0;
    for (int i0 = first; i0 < a.n_rows; i0 += THREADS) {
        const int i = i0 + (int)threadIdx.x;
        const int hit = i < a.n_rows && a.origin[i] == row;
        int total;
        const int at = n + tr::block_scan(hit, scratch, &total);
        if (hit && at < MOST) list[at] = i;
        n = min(n + total, (int)MOST); /* a row goes once to a member; there are fewer */
    }
    __syncthreads();
    __nv_bfloat16 *out = tr::act(a.out) + (size_t)row * (size_t)a.d;
    for (int j = (int)threadIdx.x; j < a.d; j += THREADS) {
        float sum = __bfloat162float(out[j]);
        for (int i = 0; i < n; i++)
            sum += __bfloat162float(tr::act(a.y)[(size_t)list[i] * (size_t)a.d + (size_t)j]);
        out[j] = __float2bfloat16_rn(sum);
    }
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

enum { ADD_EACH = 4 }; /* numbers of a thread: 1024 of a row are a block's */

/* Rows down, stretches of them across: one row is 7 blocks of loads that do not wait for each other. */
__global__ void __launch_bounds__(THREADS) moe_add(const __grid_constant__ tr_moe_add_args a)
{
    const int r = (int)blockIdx.y, d = a.d;
    if (r >= *a.n) return;
    const size_t w = (size_t)d, row = (size_t)r * w;
    const int i0 = (int)blockIdx.x * ADD_EACH * THREADS + (int)threadIdx.x;
    float sum[ADD_EACH];
#pragma unroll
    for (int i = 0; i < ADD_EACH; i++) {
        const int at = i0 + i * THREADS;
        sum[i] = at < d ? __bfloat162float(tr::act(a.out)[row + (size_t)at]) : 0.0f;
    }
    for (int m = 0; m < a.n_members; m++) {
        const __nv_bfloat16 *y = tr::act(a.y) + (size_t)m * a.ld * w + row;
#pragma unroll
        for (int i = 0; i < ADD_EACH; i++) {
            const int at = i0 + i * THREADS;
            if (at < d) sum[i] += __bfloat162float(y[at]);
        }
    }
#pragma unroll
    for (int i = 0; i < ADD_EACH; i++) {
        const int at = i0 + i * THREADS;
        if (at < d) tr::act(a.out)[row + (size_t)at] = __float2bfloat16_rn(sum[i]);
    }
}

} // namespace

cudaError_t tr_cuda_moe_dispatch(const struct tr_moe_dispatch_args *a, cudaStream_t stream)
{
    if (a->step < 1 || a->first < 0 || a->n_local < 1 || a->k < 1 || a->n_ep < 1 || a->n_xt < 1 ||
        (a->q && a->d % 128))
        return cudaErrorInvalidValue;
    dispatch_list<<<1, THREADS, 0, stream>>>(*a);
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
    const unsigned across = (unsigned)((a->d + ADD_EACH * THREADS - 1) / (ADD_EACH * THREADS));
    moe_add<<<dim3(across, (unsigned)a->n_max), THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}
