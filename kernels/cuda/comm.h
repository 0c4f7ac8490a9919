/* What a communicator needs of a GPU (mpi/comm_nccl.c): which one it is, its streams, and two
 * kernels around what NCCL moves. Knows bytes and rows of a cache, never a rank. */
#ifndef TR_CUDA_COMM_H
#define TR_CUDA_COMM_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/kernels.h"

/* The CUDA runtime's number of a device that tr_device_open opened as "cuda", and the stream of a
 * lane. */
int tr_cuda_ordinal(const tr_device *device);
cudaStream_t tr_cuda_stream(const tr_device *device, tr_lane lane);

/* out[i] = ((x0[i] + x1[i]) + x2[i]) + .. over members in rank order: x of member `rank` is own[i], of
 * the others terms[j][i], j counting the others in rank order. Added in fp32, rounded once. out may
 * be own. */
typedef struct tr_cuda_sum_args {
    const void *own;   /* [n] */
    const void *terms; /* [n_members - 1][n] */
    void *out;         /* [n] */
    size_t n;
    int n_members, rank;
    tr_dtype dtype; /* TR_F32 or TR_BF16 */
} tr_cuda_sum_args;
cudaError_t tr_cuda_sum_terms(const tr_cuda_sum_args *a, cudaStream_t stream);

/* Rows of a cache to where they lie packed, one behind the other, or back: row i of [first, end) is
 * cache row list[i] and lies at packed + i * row_bytes. Piece p of cache row page*64 + offset: the
 * bytes[p] bytes at page * page_bytes + at[p] + offset * bytes[p]; row_bytes is the pieces' sum. */
enum { TR_CUDA_PIECES = 2 };
typedef struct tr_cuda_cache_rows_args {
    char *cache, *packed;
    const int64_t *list; /* device memory, no entry below 0 */
    int first, end;
    int n_pieces;
    size_t page_bytes, row_bytes, at[TR_CUDA_PIECES], bytes[TR_CUDA_PIECES];
    int to_cache;
} tr_cuda_cache_rows_args;
cudaError_t tr_cuda_cache_rows(const tr_cuda_cache_rows_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
