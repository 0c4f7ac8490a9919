/* For kernels of one block that list rows of a step: a block of 1024 threads takes 8,192 rows at a time, a warp 256 neighbours of
 * them, 32 at a time to a lane each. What is loaded is asked for all at once; yes or no of 32 rows is a word, places come from
 * counting bits. */
#ifndef TR_CUDA_ROW_WORDS_CUH
#define TR_CUDA_ROW_WORDS_CUH

#include <stdint.h>

#include "kernels/kernels.h"

namespace tr
{
namespace words
{

enum {
    THREADS = 1024,
    WARPS = THREADS / 32,
    EACH = 8,
    ROWS_WARP = 32 * EACH,
    ROWS = WARPS * ROWS_WARP
};

/* Row of this lane in word k of its warp, in the block's rows from `first` on. */
__device__ __forceinline__ int row_at(int first, int k)
{
    return first + (int)threadIdx.x / 32 * ROWS_WARP + 32 * k + (int)threadIdx.x % 32;
}

/* Bits of the lanes before this one. */
__device__ __forceinline__ uint32_t before()
{
    return (1u << threadIdx.x % 32) - 1;
}

/* What this lane's rows are: those past row n - 1, which is there, are that one again. The loads wait for nothing between them. */
struct batch {
    int slot[EACH], position[EACH], dense[EACH], write[EACH]; /* of write the half with the sign */

    __device__ __forceinline__ batch(const tr_rows &r, int n, int first)
    {
        const int32_t *halves = (const int32_t *)(const void *)r.write;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int i = min(row_at(first, k), n - 1);
            dense[k] = r.dense ? r.dense[i] : 0;
            write[k] = halves[2 * (size_t)i + 1];
            slot[k] = r.slot[i];
            position[k] = r.position[i];
        }
    }
};

struct counts {
    int a, b;
};

/* What the warps before this one have of two things, of which the block has fewer than 65,536 each; *all: what all have. space:
 * WARPS words. By the whole block. */
__device__ __forceinline__ counts scan(counts mine, uint32_t *space, counts *all)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;

    __syncthreads();
    if (lane == 0) space[warp] = (uint32_t)mine.a | (uint32_t)mine.b << 16;
    __syncthreads();
    const uint32_t x = space[lane];
    uint32_t sum = x;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t low = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += low;
    }
    const uint32_t total = __shfl_sync(~0u, sum, 31), here = __shfl_sync(~0u, sum - x, warp);
    *all = {(int)(total & 0xffff), (int)(total >> 16)};
    return {(int)(here & 0xffff), (int)(here >> 16)};
}

} // namespace words
} // namespace tr

#endif
