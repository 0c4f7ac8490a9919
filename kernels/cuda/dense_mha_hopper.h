/* MLA in its multi-head form for prompts, on Hopper (model.md 3.4, 4.6; kernels.md 3.6): what tr_cuda_dense_mha does for the
 * shapes of the real model, with bf16 activations. Keys and values of all heads are made once from the cached latents, then
 * attention runs over them; kernels are enqueued on the stream, nothing synchronises.
 *
 * Rows: the dense ones, in runs (spans): neighbouring rows of one slot, `step` positions apart. Others are left alone; dense
 * pads get zeros. A row's bits do not depend on where its prompt was cut, nor on the rows beside it: keys come in blocks of
 * 128 from position 0, and each row has its own running softmax. */
#ifndef TR_CUDA_DENSE_MHA_HOPPER_H
#define TR_CUDA_DENSE_MHA_HOPPER_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { TR_DENSE_D_NOPE = 128, TR_DENSE_D_ROPE = 64, TR_DENSE_D_V = 128, TR_DENSE_D_LATENT = 512 };

typedef struct tr_cuda_dense_mha_hopper_args {
    const tr_rows
        *rows;   /* host memory, read by the call; what it points to is on the device. n, n_max,
                            max_context, slot, position, write, dense, page_table, max_pages are used */
    int step;    /* 1, or where rows of prompts are dealt out to members, their number */
    int n_spans; /* at least as many as there are dense runs among the rows */
    int64_t
        n_keys; /* of all runs together at most, each rounded up to 128; 0: n_spans times max_context */
    const void *q; /* bf16 [n, n_heads, 192], rope applied */
    int n_heads;
    float scale;
    const void
        *w_kv;       /* bf16 [n_heads, 256, 512]: of each head 128 rows of W_UK, then 128 of W_UV */
    tr_kv_layer kv;  /* TR_E4M3 or TR_BF16, 512 + 64 */
    void *out;       /* bf16 [n, n_heads, 128] */
    void *workspace; /* 1024-byte aligned; size below */
    size_t workspace_bytes;
} tr_cuda_dense_mha_hopper_args;

/* Bytes for such a launch with room for the keys and values of n_keys positions at a time (at least max_context). Where all
 * spans' contexts together are more, they are done in rounds (dense_mha_plan.h), each two more kernels; n_spans * max_context
 * bounds them.
 * Pure; 0: the arguments are out of range. */
size_t tr_cuda_dense_mha_hopper_workspace(int n_max, int n_spans, int n_heads, int n_keys);

/* All device pointers 16-byte aligned. cudaErrorNotSupported: other shapes. cudaErrorInvalidValue: a workspace too small for
 * one span. */
cudaError_t tr_cuda_dense_mha_hopper(const tr_cuda_dense_mha_hopper_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
