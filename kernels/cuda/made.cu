/* Dummy weights where they are to be (kernels/made.h): bytes written, nothing read. */
#include "kernels/cuda/common.cuh"

#include "kernels/cuda/made.h"

namespace
{

enum { THREADS = 256, EACH = 8 /* elements of a thread: as many as a word has bytes */ };

/* Where row o of the piece lies: as it comes, or between the rows of the other half (tr_fp8_gate_up_row). */
__device__ __forceinline__ size_t place(const tr_cuda_made_args &a, int o)
{
    const int row = a.o_begin + o;
    if (a.inner == 0) return (size_t)row;
    const int up = row >= a.inner, r = up ? row - a.inner : row;
    return (size_t)((r / 8 * 2 + up) * 8 + r % 8);
}

/* The eight random bytes of elements e .. e + 7. */
__device__ __forceinline__ uint64_t bytes_of(const tr_made &m, uint64_t e)
{
    const int shift = (int)(e % 8) * 8;
    const uint64_t low = tr_made_word(m.key, e / 8) >> shift;
    return shift == 0 ? low : low | tr_made_word(m.key, e / 8 + 1) << (64 - shift);
}

template <typename number>
__device__ __forceinline__ void make_row(const tr_cuda_made_args &a, const number *level,
                                         number *to, uint64_t e, int i0)
{
    const uint64_t word = bytes_of(a.made, e + (uint64_t)i0);
    alignas(8) number x[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        x[i] = level[(word >> (8 * i)) & 255];
    if (i0 + EACH <= a.n_in && (uintptr_t)(to + i0) % (EACH * sizeof(number)) == 0) {
        /* in pieces of 8 bytes, which the compiler joins */
#pragma unroll
        for (int i = 0; i < (int)sizeof(number); i++)
            ((uint64_t *)(void *)(to + i0))[i] = ((const uint64_t *)(const void *)x)[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (i0 + i < a.n_in) to[i0 + i] = x[i];
}

template <typename number>
__global__ void __launch_bounds__(THREADS) make(const __grid_constant__ tr_cuda_made_args a)
{
    __shared__ number level[TR_MADE_LEVELS];
    static_assert(THREADS == TR_MADE_LEVELS, "a thread, a level");
    level[threadIdx.x] = ((const number *)(const void *)&a.made.level)[threadIdx.x];
    __syncthreads();
    const int i0 = ((int)blockIdx.x * THREADS + (int)threadIdx.x) * EACH;
    for (int o = (int)blockIdx.y; o < a.n_rows && i0 < a.n_in; o += (int)gridDim.y)
        make_row(a, level, (number *)(void *)((char *)a.to + place(a, o) * a.row_bytes),
                 (a.made.row0 + (uint64_t)o) * a.made.width + a.made.col0, i0);
}

} // namespace

cudaError_t tr_cuda_made(const tr_cuda_made_args *a, cudaStream_t stream)
{
    if (a->n_rows <= 0 || a->n_in <= 0) return cudaSuccess;
    const unsigned across = (unsigned)((a->n_in + THREADS * EACH - 1) / (THREADS * EACH));
    const dim3 grid(across, tr::at_most((size_t)a->n_rows, 4096));
    if (a->number_bytes == 1)
        make<uint8_t><<<grid, THREADS, 0, stream>>>(*a);
    else if (a->number_bytes == 2)
        make<uint16_t><<<grid, THREADS, 0, stream>>>(*a);
    else if (a->number_bytes == 4)
        make<uint32_t><<<grid, THREADS, 0, stream>>>(*a);
    else
        return cudaErrorInvalidValue;
    return cudaGetLastError();
}
