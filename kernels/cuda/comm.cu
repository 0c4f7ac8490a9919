/* Kernels around what a communicator moves: sums in rank order, and rows of a cache packed for their
 * way and put back. */
#include "kernels/cuda/comm.h"

#include "kernels/cuda/common.cuh"

namespace
{

enum { THREADS = 256, BLOCKS_MAX = 1056 }; /* 8 blocks on each of an H200's 132 SMs */

__global__ void __launch_bounds__(THREADS) sum_terms(const __grid_constant__ tr_cuda_sum_args a)
{
    const int f32 = a.dtype == TR_F32;
    const size_t step = (size_t)gridDim.x * THREADS;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < a.n; i += step) {
        const float own = tr::read_number(a.own, i, f32);
        float sum = 0;
        for (int m = 0; m < a.n_members; m++) {
            const size_t j = (size_t)(m < a.rank ? m : m - 1);
            const float x = m == a.rank ? own : tr::read_number(a.terms, j * a.n + i, f32);
            sum = m == 0 ? x : sum + x; /* 0 + -0 would be +0 */
        }
        tr::write_number(a.out, i, f32, sum);
    }
}

template <class T>
__device__ __forceinline__ void copy_piece(char *cached, char *packed, size_t bytes, int to_cache)
{
    const T *from = (const T *)(const void *)(to_cache ? packed : cached);
    T *to = (T *)(void *)(to_cache ? cached : packed);
    const unsigned n = (unsigned)(bytes / sizeof(T));
#pragma unroll 1
    for (unsigned i = threadIdx.x % 32; i < n; i += 32)
        to[i] = from[i];
}

/* A warp takes a row. T: the widest word that all addresses and lengths are multiples of. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    cache_rows(const __grid_constant__ tr_cuda_cache_rows_args a)
{
    const int per_block = THREADS / 32;
    const int step = (int)gridDim.x * per_block;
    for (int i = a.first + (int)blockIdx.x * per_block + (int)threadIdx.x / 32; i < a.end;
         i += step) {
        const size_t row = (size_t)a.list[i], page = row / TR_PAGE_TOKENS,
                     offset = row % TR_PAGE_TOKENS;
        char *packed = a.packed + (size_t)i * a.row_bytes;
#pragma unroll
        for (int p = 0; p < TR_CUDA_PIECES; p++) {
            if (p >= a.n_pieces) break;
            char *cached = a.cache + page * a.page_bytes + a.at[p] + offset * a.bytes[p];
            copy_piece<T>(cached, packed, a.bytes[p], a.to_cache);
            packed += a.bytes[p];
        }
    }
}

} // namespace

cudaError_t tr_cuda_sum_terms(const tr_cuda_sum_args *a, cudaStream_t stream)
{
    if (a->n_members < 1 || a->rank < 0 || a->rank >= a->n_members ||
        (a->dtype != TR_F32 && a->dtype != TR_BF16))
        return cudaErrorInvalidValue;
    if (a->n == 0) return cudaSuccess;
    const size_t blocks = (a->n + THREADS - 1) / THREADS;
    sum_terms<<<tr::at_most(blocks, BLOCKS_MAX), THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_cache_rows(const tr_cuda_cache_rows_args *a, cudaStream_t stream)
{
    size_t all = (size_t)(uintptr_t)a->cache | (size_t)(uintptr_t)a->packed | a->page_bytes;

    if (a->n_pieces < 1 || a->n_pieces > TR_CUDA_PIECES || a->first < 0)
        return cudaErrorInvalidValue;
    if (a->first >= a->end) return cudaSuccess;
    for (int p = 0; p < a->n_pieces; p++)
        all |= a->at[p] | a->bytes[p]; /* row_bytes is their sum */
    const size_t rows = (size_t)(a->end - a->first), per_block = THREADS / 32;
    const unsigned blocks = tr::at_most((rows + per_block - 1) / per_block, BLOCKS_MAX);
    if (all % 16 == 0)
        cache_rows<uint4><<<blocks, THREADS, 0, stream>>>(*a);
    else if (all % 4 == 0)
        cache_rows<uint32_t><<<blocks, THREADS, 0, stream>>>(*a);
    else
        cache_rows<uint8_t><<<blocks, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}
