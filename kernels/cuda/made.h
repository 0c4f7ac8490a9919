/* Dummy weights on the device: rows of numbers that are a function of their place. */
#ifndef TR_KERNELS_CUDA_MADE_H
#define TR_KERNELS_CUDA_MADE_H

#include <cuda_runtime_api.h>

#include "kernels/made.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tr_cuda_made_args {
    tr_made made;
    void *to;         /* device memory: row 0 of a matrix */
    size_t row_bytes; /* from row to row; what lies behind n_in numbers stays as it is */
    int number_bytes; /* 1, 2 or 4: of level and of what is written */
    int n_rows, n_in; /* the piece */
    int o_begin;      /* its first row in the matrix */
    int inner; /* > 0: the matrix is [gate; up] of so many rows each, interleaved (gemm_fp8.h) */
} tr_cuda_made_args;

cudaError_t tr_cuda_made(const tr_cuda_made_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
