/* The same dense FP8 product through cuBLASLt 12.9 or later: the yardstick of gemm_fp8.h, and what to fall back on.
 * Accumulates in an order of its own, so its bits depend on the number of rows: not for results that must not. */
#ifndef TR_CUDA_GEMM_CUBLAS_H
#define TR_CUDA_GEMM_CUBLAS_H

#include <cuda_runtime_api.h>

#include "kernels/cuda/gemm_fp8.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One problem, planned: descriptors and the heuristic's first algorithm. */
typedef struct tr_cublas_fp8 tr_cublas_fp8;

/* out [n_max, n_out] bf16, row-major, all n_max rows (the library does not read *n). n_max a multiple of 4, n_out of 8,
 * n_in of 128. cudaErrorNotSupported: the library has no algorithm for it. workspace_d stays the caller's. */
cudaError_t tr_cublas_fp8_create(tr_cublas_fp8 **out, int n_out, int n_in, int n_max,
                                 void *workspace_d, size_t workspace_bytes);
cudaError_t tr_cublas_fp8_run(tr_cublas_fp8 *p, const tr_fp8_weight *w, const tr_fp8_rows *x,
                              void *out_d, cudaStream_t stream);
void tr_cublas_fp8_free(tr_cublas_fp8 *p);

#ifdef __cplusplus
}
#endif

#endif
