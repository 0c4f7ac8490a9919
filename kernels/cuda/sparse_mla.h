/* Sparse MLA on a GPU (model.md 3.4, 4.6; kernels.md 3.5, 3.6): struct tr_sparse_mla_args with device memory, on a stream.
 * q is bf16 [n, n_heads, 576] (row stride n_heads * 576), out bf16 [n, n_heads, 512], lse fp32, natural logarithm, -inf
 * where nothing is selected. Nothing synchronises; the number of rows and the form of each row are read on the device.
 *
 * Shapes: latents of 512 + 64 in a TR_E4M3 or TR_BF16 cache; heads 64, 128 (any multiple of 64), or up to 32.
 * Lists: entries outside the cache are passed over; the entry that begins a block of 64 decides whether the block is there
 * (lists are -1 padded at their end). fp8 records: scales are powers of two up to 128.
 *
 * Prompts over fp8 records: a launch of 512 and more rows that names `position` expands the records of slots with many rows to
 * bf16 first, once, in the workspace, and these rows walk over that. Slots that the workspace has no room for do without.
 *
 * A row's bits do not depend on the rows beside it nor on n_max nor on the workspace, though few rows run on other kernels than
 * many, and prompts on others again. */
#ifndef TR_CUDA_SPARSE_MLA_H
#define TR_CUDA_SPARSE_MLA_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes that a launch of up to n_max rows should have. Pure; never 0. */
size_t tr_cuda_sparse_mla_workspace(int n_max, int n_heads, int d_latent);

/* *a is read by the call; a->rows is host memory, the pointers in it (and in *a) are device memory, 16-byte aligned.
 * cudaErrorNotSupported: other shapes, or a->latents names peers (the caller waits for them before).
 * cudaErrorInvalidValue: a workspace that is too small for few rows. */
cudaError_t tr_cuda_sparse_mla(const struct tr_sparse_mla_args *a, cudaStream_t stream);

/* The ways to run, for the program that measures them; tr_cuda_sparse_mla chooses by n_max. */
enum { TR_MLA_AUTO, TR_MLA_SPLIT, TR_MLA_WALK, TR_MLA_EXPAND };
cudaError_t tr_cuda_sparse_mla_way(const struct tr_sparse_mla_args *a, int way,
                                   cudaStream_t stream);
size_t tr_cuda_sparse_mla_workspace_way(int n_max, int n_heads, int way);

#ifdef __cplusplus
}
#endif

#endif
