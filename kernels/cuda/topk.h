/* Selection of the k best keys of each row on a GPU (model.md 4.3, kernels.md 3.4): struct tr_topk_args with device memory,
 * on a stream. Exact for every input: larger score first, equal scores smaller position first, NaN as -inf, -0.0 as +0.0.
 * The output is the same bits in every run, whichever way the work was split. */
#ifndef TR_CUDA_TOPK_H
#define TR_CUDA_TOPK_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"
#include "kernels/limits.h"

#ifdef __cplusplus
extern "C" {
#endif

/* *a is read by the call; a->rows is host memory, the pointers in it (and in *a) are device memory; rows->max_context bounds
 * every row's context. cudaErrorInvalidValue: k outside [1, TR_CUDA_TOPK_MAX], or a context beyond
 * TR_CUDA_CONTEXT_MAX. */
cudaError_t tr_cuda_topk(const struct tr_topk_args *a, cudaStream_t stream);

/* The same with so many blocks of threads a row (1, 2, 4, 8, 16), for the program that measures; 0: as tr_cuda_topk chooses. */
cudaError_t tr_cuda_topk_as(const struct tr_topk_args *a, int n_ctas, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
