/* struct tr_moe_args on FP8 matrix instructions: widths that are multiples of 128, weights as gemm_fp8.h wants them. */
#ifndef TR_CUDA_MOE_FP8_H
#define TR_CUDA_MOE_FP8_H

#include "kernels/cuda/gemm_fp8.h"
#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes for up to n_max rows; pure. */
size_t tr_cuda_moe_fp8_workspace(int n_max, int k, int d, int d_inner);

/* gate_up: interleaved (tr_fp8_gate_up_row). *a is read by the call; pointers in it are device memory. */
cudaError_t tr_cuda_moe_fp8(const tr_gemm_fp8 *g, const struct tr_moe_args *a,
                            const tr_fp8_weight *gate_up, const tr_fp8_weight *down,
                            cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
