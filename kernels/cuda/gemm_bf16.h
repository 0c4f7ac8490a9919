/* bf16 products with few outputs or few rows (the router, the indexer's head weights, the language head):
 * out[r, o] = sum_k x[r, k] w[o, k], fp32 accumulation by mma.sync.
 *
 * Eight warps of a block take an eighth of k each, whatever the number of rows and outputs, and their sums are added in one
 * order: every tile shape gives the same bits, so a row does not see its neighbours (architecture.md 4), and a single row of
 * 64 outputs still occupies 64 warps. */
#ifndef TR_CUDA_GEMM_BF16_H
#define TR_CUDA_GEMM_BF16_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tr_bf16_product {
    const void *x_d,
        *w_d; /* bf16 [*n_d, n_in], row stride ld_x; [n_out, n_in]; both 16-byte aligned */
    size_t ld_x;
    void *out_d; /* bf16, or f32; row stride ld_out */
    size_t ld_out;
    int out_f32;
    const int32_t *n_d; /* live rows */
    int n_max, n_out, n_in;
} tr_bf16_product;

/* Whether it can do these: n_in a multiple of 32, ld_x of 8, neither beyond 2^24. */
int tr_gemm_bf16_fits(int n_in, size_t ld_x);
/* Once per device, before the first product. */
cudaError_t tr_gemm_bf16_open(void);
cudaError_t tr_gemm_bf16(const tr_bf16_product *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
