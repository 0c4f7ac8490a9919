/* The operations of kernels.h on a GPU, portable forms: any shape, any GPU from sm_80 on. Each is
 * enqueued on the stream and returns what the launch said; pointers inside of the arguments are
 * device memory, the argument structs host memory and read at the call. cudaErrorInvalidValue: a
 * shape that the kernel cannot do. Faster forms for the shapes of the real model have headers of
 * their own (gemm_fp8.h, sparse_mla.h); cuda.c chooses. */
#ifndef TR_CUDA_OPS_H
#define TR_CUDA_OPS_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/cuda/gemm_fp8.h"
#include "kernels/kernels.h"

/* ---- weights: a tr_linear's data --------------------------------------------------------------------------------- */

/* [head of each matrix][numbers][scales]. Numbers are row-major, rows of ld bytes. Scales, of e4m3:
 * [n_mats][scale_rows] [scale_pitch]; slices may begin inside a scale block, so an output o of
 * piece s has scale row base[s] + (o - begin[s] + shift[s]) / 128, an input k column (k + k_shift)
 * / 128. */
typedef struct tr_weight_head {
    int32_t k_shift; /* column 0's place in its 128-block of the stored tensor */
    int32_t n;       /* pieces: gate and up are two */
    int32_t begin[2], shift[2], base[2];
    int32_t end; /* behind the last output so far */
    int32_t pad[7];
} tr_weight_head;

typedef struct tr_weight_layout {
    size_t numbers, scales, bytes; /* offsets; all of it */
    size_t matrix;                 /* bytes of a matrix's numbers */
    int ld;                        /* bytes of a row of numbers */
    int scale_rows, scale_pitch;
} tr_weight_layout;

/* 0: it does not fit an address space. Pure. */
int tr_weight_layout_of(tr_weight_layout *out, tr_format format, int n_mats, int n_out, int n_in);

/* Blocks of 128 that n columns can take, wherever they begin. */
static inline int tr_blocks_at_most(int n)
{
    return (n + 2 * 127) / 128;
}

/* ---- W8A8 -------------------------------------------------------------------------------------------------------- */

/* Rows (of activations, or of fp32) to e4m3 with a scale per 128-block of the weight they will meet
 * (model.md 5.1), column 0 at k_shift of its block: q [n_max, blocks * 128] with zeros around the
 * row, scale [blocks][n_max rounded up to 4]. */
typedef struct tr_cuda_quantise_args {
    const void *x;
    int x_f32;
    size_t ld;
    const int32_t *n;
    int n_max, d, blocks, pow2, k_shift;
    uint8_t *q;
    float *scale;
} tr_cuda_quantise_args;
cudaError_t tr_cuda_quantise(const tr_cuda_quantise_args *a, cudaStream_t stream);

/* ---- products and experts ---------------------------------------------------------------------------------------- */

/* k_shift: the weight's, from the host's notes. */
cudaError_t tr_cuda_linear(const struct tr_linear_args *a, int k_shift, cudaStream_t stream);
cudaError_t tr_cuda_moe(const struct tr_moe_args *a, int k_shift_in, int k_shift_inner,
                        cudaStream_t stream);
size_t tr_cuda_moe_workspace(int n_max, int k, int d, int d_inner);

/* Once per device, before the first launch: kernels with more than 48 KiB of shared memory. */
cudaError_t tr_cuda_products_open(void);
cudaError_t tr_cuda_attention_open(void);

/* ---- the others -------------------------------------------------------------------------------------------------- */

/* fault: a word that the host reads; a plan that does not fit the device's lengths leaves a reason
 * there and no rows. */
enum {
    TR_FAULT_SLOT = 1,
    TR_FAULT_ROWS,
    TR_FAULT_HEADS,
    TR_FAULT_TOKENS,
    TR_FAULT_PART,
    TR_FAULT_BEFORE,
    TR_FAULT_BEHIND,
    TR_FAULT_PAGE,
    TR_FAULT_TARGETS,
    TR_FAULT_COPY,
    TR_N_FAULTS
};
cudaError_t tr_cuda_plan_apply(const struct tr_plan_apply_args *a, uint32_t *fault,
                               cudaStream_t stream);
cudaError_t tr_cuda_pages_copy(const struct tr_pages_copy_args *a, uint32_t *fault,
                               cudaStream_t stream);

/* For every shape; kv_write.h and sparse_mla.h have faster ones for some. */
cudaError_t tr_cuda_kv_write_any(const struct tr_kv_write_args *a, cudaStream_t stream);
cudaError_t tr_cuda_index_query_any(const struct tr_index_query_args *a, cudaStream_t stream);
cudaError_t tr_cuda_sparse_mla_any(const struct tr_sparse_mla_args *a, cudaStream_t stream);

/* on_grid: the weight's pieces begin with scale blocks (or it has no scales). */
cudaError_t tr_cuda_mla_query(const struct tr_mla_query_args *a, int on_grid, cudaStream_t stream);
cudaError_t tr_cuda_mla_value(const struct tr_mla_value_args *a, int on_grid, cudaStream_t stream);

/* dense_mha of the real model's shapes, of weights on their grid (dense_mha_hopper.h); cudaErrorNotSupported: others, or no
 * workspace. */
cudaError_t tr_cuda_dense_mha_real(const struct tr_dense_mha_args *a, cudaStream_t stream);
size_t tr_cuda_dense_mha_workspace(int n_max, int n_heads, int max_context);

size_t tr_cuda_sample_workspace(int n_rows, int n_vocab);

/* clang-format off */
#define TR_CUDA_PLAIN_OPS(X) \
    X(embed) X(norm) X(rows_gather) X(swiglu) X(dense_mha) \
    X(router) X(moe_pack) X(moe_combine) X(moe_dispatch) X(moe_receive) X(moe_return) X(moe_offer) X(moe_add) X(rows_zero) X(sample) \
    X(logprobs) X(argmax_part) X(argmax_take) X(sample_part) X(sample_merge) X(logprob_part) X(logprob_rank) X(logprob_merge)
/* clang-format on */
#define TR_CUDA_OP(name)                                                                           \
    cudaError_t tr_cuda_##name(const struct tr_##name##_args *a, cudaStream_t stream);
TR_CUDA_PLAIN_OPS(TR_CUDA_OP)

/* Ceilings, measured: bytes read per second, fp32 multiply-adds counted twice per second, and those
 * of FP8 products. Synchronises. */
cudaError_t tr_cuda_ceilings(const tr_gemm_fp8 *g, double *read_bytes_per_s,
                             double *fma_flops_per_s, double *fp8_flops_per_s, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
