/* Activations to W8A8: bf16 rows to e4m3 with one fp32 scale per 128 columns (model.md 5.1), in the layout of tr_acts. */
#ifndef TR_CUDA_QUANTISE_H
#define TR_CUDA_QUANTISE_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* x [*n, d] bf16, row stride ld_x elements (a multiple of 8, 16-byte aligned), d a multiple of 8; q [n_max, d];
 * scale [ceil(d/128)][n_max rounded up to 4]. Per block: amax = max(|x|, 1e-4); ue8m0: the power of two at or above
 * amax/448, else amax/448. Rows from *n on are left alone. */
cudaError_t tr_quantise_rows(const void *x_d, size_t ld_x, const int32_t *n_d, int n_max, int d,
                             int ue8m0, uint8_t *q_d, float *scale_d, cudaStream_t stream);
/* The same of silu(gate) * up, rounded to bf16: gate_up [*n, 2 d], gate in [0, d) of each row. */
cudaError_t tr_quantise_swiglu(const void *gate_up_d, const int32_t *n_d, int n_max, int d,
                               int ue8m0, uint8_t *q_d, float *scale_d, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
