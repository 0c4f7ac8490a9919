/* Scores of the lightning indexer on a GPU (model.md 4 step 6, kernels.md 3.3): struct tr_index_logits_args with device
 * memory, on a stream. Nothing synchronises; the number of rows is read on the device.
 *
 * Index keys of 128 e4m3 and heads that are a multiple of 16 up to 64 run on the tensor cores; every other shape goes to a
 * plain kernel. A row's scores do not depend on the rows beside it, nor on how many SMs share the work. */
#ifndef TR_CUDA_INDEX_LOGITS_H
#define TR_CUDA_INDEX_LOGITS_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* *a is read by the call; a->rows is host memory, the pointers in it (and in *a) are device memory.
 * cudaErrorNotSupported: a TR_F32 cache, or a->keys names peers (the caller waits for them before). */
cudaError_t tr_cuda_index_logits(const struct tr_index_logits_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
