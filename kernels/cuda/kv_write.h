/* Cache records and index queries on a GPU (model.md 3.4, 4, 5.3-5.5; kernels.md 3.2): struct tr_kv_write_args and
 * tr_index_query_args with device memory, on a stream; activations (kv_a, index_k, q) are bf16. A row is one warp's work and
 * depends on nothing else. TR_E4M3 and TR_BF16 caches; scales are powers of two. */
#ifndef TR_CUDA_KV_WRITE_H
#define TR_CUDA_KV_WRITE_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* *a is read by the call; a->rows is host memory, the pointers in it (and in *a) are device memory. n_max rows at most.
 * cudaErrorNotSupported: a TR_F32 cache, peers to push to, d_latent over 512 or no multiple of 4, d_rope over 64 or odd, an
 * index width that is no power of two from 8 to 128, or an index rope that is no multiple of 8. */
cudaError_t tr_cuda_kv_write(const struct tr_kv_write_args *a, cudaStream_t stream);
cudaError_t tr_cuda_index_query(const struct tr_index_query_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
