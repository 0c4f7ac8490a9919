/* The portable product, inside of linear, moe, mla_query and mla_value: y = x w^T for one matrix, a
 * batch of heads, or the segments of experts. mma.sync m16n8k16 on tiles of 64 rows by 64 outputs;
 * blocks of 128 along k are summed by the tensor core from zero and promoted, in ascending k, into
 * one fp32 total per output: total = fma(block, sa sw, total). Nothing depends on how many rows
 * there are or which tile a row is in, so a row's bits are its own (architecture.md 4). */
#ifndef TR_CUDA_GEMM_CUH
#define TR_CUDA_GEMM_CUH

#include "kernels/cuda/common.cuh"

namespace tr
{

enum { TILE_ROWS = 64, TILE_COLUMNS = 64 };

struct product {
    /* w: n_mats matrices, of which block z takes matrix z, or (tiles) the tile's. */
    tr_format format;
    const uint8_t *numbers;
    const tr_weight_head *head;
    const float *scale; /* [scale_rows][scale_pitch] of each matrix */
    size_t matrix;
    int n_mats, n_out, n_in, ld_w, scale_rows, scale_pitch, blocks;
    /* Input: bf16 or fp32 (rounded to bf16 unless w is f32), or q with a scale per block; row i is
     * row_index[i] / row_div. */
    const void *x;
    int x_f32;
    size_t ld_x, x_step; /* x_step: from one matrix of a batch to the next */
    const uint8_t *q;
    const float *q_scale;
    int ld_q_scale;
    const int32_t *row_index;
    int row_div;
    /* Output row of input row i: out_index[i]; rows where skip is set are not written. */
    void *y; /* bf16 or fp32 */
    int y_f32;
    size_t ld_y, y_step;
    const int32_t *out_index;
    const uint8_t *skip;
    /* Rows: *n; or tiles [n_tiles]: matrix, first row, and start [n_mats + 1] says where a matrix's
     * rows end. */
    const int32_t *n;
    int n_max;
    const int2 *tiles;
    const int32_t *n_tiles, *start;
    int tiles_max;
};

void product_weight(product *p, const tr_linear *w);
cudaError_t product_launch(const product *p, cudaStream_t stream);

} // namespace tr

#endif
