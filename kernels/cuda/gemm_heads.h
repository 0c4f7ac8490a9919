/* A product per head, of bf16 rows with that head's matrix (model.md 3.4): y[r, h, o] = sum_k x[r, h, k] w[h, o, k], where the
 * matrices are e4m3 with scales (expanded exactly) or bf16, 128 or 512 columns wide and on their scale grid.
 *
 * A block expands outputs of a head to bf16 once and walks over the rows. Blocks of 128 along k are summed by matrix instructions
 * of 16 columns from zero and promoted, k ascending: total = fma(block, scale, total), as gemm.cuh does, so a row's bits are its
 * own. */
#ifndef TR_CUDA_GEMM_HEADS_H
#define TR_CUDA_GEMM_HEADS_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tr_heads_product {
    const tr_linear *w; /* packed, on_grid */
    int n_heads;
    const tr_act
        *x; /* row r of head h from r * ld_x + h * x_step on; multiples of 8, 16-byte aligned */
    size_t ld_x, x_step;
    tr_act *y; /* likewise, multiples of 2 */
    size_t ld_y, y_step;
    const int32_t *n_d;
    int n_max;
    const uint8_t *skip_d; /* [n_max] rows that are not written where it is set */
    const struct tr_mla_query_args *
        rope; /* of up to TR_HEADS_FEW rows of TR_HEADS_ROPE_IN columns: their rope by the same launch; NULL: no */
    /* Of more than TR_HEADS_FEW rows of 512 columns, 128 outputs a head: instead of y its e4m3 form, as tr_quantise_rows would make
     * it of y's rows of n_heads * 128; NULL: y. */
    uint8_t *q;
    float *q_scale;
    int scale_pow2;
} tr_heads_product;
enum { TR_HEADS_FEW = 16, TR_HEADS_ROPE_IN = 128, TR_HEADS_LATENT = 512, TR_HEADS_VALUE = 128 };

/* Whether it can do this weight: formats as above, n_in 128 or 512, n_out a multiple of 128. */
int tr_cuda_gemm_heads_fits(const tr_linear *w);
/* Once per device, before the first product. */
cudaError_t tr_cuda_gemm_heads_open(void);
cudaError_t tr_cuda_gemm_heads(const tr_heads_product *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
