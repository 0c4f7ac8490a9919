/* FP8 products with block scales on Hopper (model.md 5.2): y[m,o] = sum_kb sa[m,kb] sw[o/128,kb] sum_k a[m,k] w[o,k].
 *
 * Blocks of 128 along k are summed by the tensor core from zero and promoted in ascending k into one fp32 accumulator per
 * output: acc = fma(block, sa * sw, acc). K is never split, so every tile shape gives the same bits: a row does not see
 * its neighbours, nor how many there are (architecture.md 4; bench_gemm_fp8 compares bits). The missing split is paid for
 * by rings of 150-200 KB in flight per SM: 33 SMs that read as fast as an SM can beat 132 that meet again.
 *
 * Up to 32 tokens, weights are the M operand of the matrix instruction (64 rows of it) and tokens the N operand (8, 16,
 * 32): few tokens waste nothing (gemm_fp8_kernel.cuh). From 33 on tokens are M and weights N: a promotion is then one
 * multiply-add per output (gemm_fp8_wide.cuh). Both orientations give the same bits too. Blocks in a cluster share loads:
 * the tokens (up to 128 rows, and experts) or the weights (many rows). Experts with few rows get a tile as wide as their
 * rows need, those with about 128 one tile of up to 192 (gemm_fp8_tall.cuh).
 *
 * Everything is enqueued on the stream and reads row counts from device memory. Nothing is allocated. */
#ifndef TR_CUDA_GEMM_FP8_H
#define TR_CUDA_GEMM_FP8_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What launches need to know of the device; plain data, filled once. */
typedef struct tr_gemm_fp8 {
    void (*encode)(void); /* cuTensorMapEncodeTiled, from the driver */
    int n_sms;
} tr_gemm_fp8;
cudaError_t tr_gemm_fp8_open(tr_gemm_fp8 *g);

/* n_mats matrices [n_out, n_in] e4m3, row-major, n_in a multiple of 16, 16-byte aligned. scale: fp32
 * [n_mats][ceil(n_out/128)][pitch], pitch = tr_fp8_scale_pitch(n_in); the checkpoint's weight_scale_inv wherever
 * n_in / 128 is a multiple of 4. Partial last blocks (N = 576) need no padding. scale_rows, scale_pitch: other distances
 * between matrices and rows of scales, at least these, the pitch a multiple of 4; 0: these.
 * Matrices for tr_gemm_fp8_gate_up hold gate and up interleaved: row p is tr_fp8_gate_up_row(p, d_inner) of [gate; up];
 * scale rows stay in that order, [ceil(d_inner/128)] of gate, then of up. d_inner must be a multiple of 128. */
typedef struct tr_fp8_weight {
    const uint8_t *q_d;
    const float *scale_d;
    int n_mats, n_out, n_in;
    int scale_rows, scale_pitch;
} tr_fp8_weight;

static inline int tr_fp8_scale_pitch(int n_in)
{
    return ((n_in + 127) / 128 + 3) / 4 * 4;
}
/* 16 rows in a row are 8 gate rows and their 8 up rows: both meet in one thread's registers. */
static inline int tr_fp8_gate_up_row(int p, int d_inner)
{
    int i = p / 16, j = p % 16;
    return j < 8 ? 8 * i + j : d_inner + 8 * i + j - 8;
}

/* Activations: q [n_max, n_in] e4m3, scale [ceil(n_in/128)][n_max rounded up to 4] (tr_acts). n: live rows, device. */
typedef struct tr_fp8_rows {
    const uint8_t *q_d;
    const float *scale_d;
    const int32_t *n_d;
    int n_max;
    int start_made; /* experts: at least one kernel lies between the one that made start and this product */
} tr_fp8_rows;

/* out[r, o], r < *n: bf16, or f32; row stride ld_out elements. Matrix 0 of w. */
cudaError_t tr_gemm_fp8_dense(const tr_gemm_fp8 *g, const tr_fp8_weight *w, const tr_fp8_rows *x,
                              void *out_d, size_t ld_out, int out_f32, cudaStream_t stream);

/* The tile shapes by number, for bench_gemm_fp8: all give the same bits. The name, NULL past the last. */
const char *tr_gemm_fp8_shape_name(int shape);
int tr_gemm_fp8_pick(const tr_gemm_fp8 *g, int n_out, int n_max);
cudaError_t tr_gemm_fp8_dense_as(const tr_gemm_fp8 *g, int shape, const tr_fp8_weight *w,
                                 const tr_fp8_rows *x, void *out_d, size_t ld_out, int out_f32,
                                 cudaStream_t stream);

/* ---- mixture of experts: rows sorted by expert, experts' segments start[e] .. start[e + 1) as tr_moe_pack makes ------ */

/* Copy row pair[i] / k of x to row i of q, scale, for i < start[n_local]: q [n_pairs_max, d], scale
 * [ceil(d/128)][n_pairs_max rounded up to 4]. */
cudaError_t tr_moe_gather_fp8(const tr_fp8_rows *x, int d, int k, int n_local,
                              const int32_t *start_d, const int32_t *pair_d, int n_pairs_max,
                              uint8_t *q_d, float *scale_d, cudaStream_t stream);

/* q, scale [.., d_inner] = quantised silu(gate x) * (up x), fp32 up to the quantisation; x sorted (n_d unused, n_max =
 * n_pairs_max). ue8m0: powers of two, else amax / 448 (quantise.h). */
cudaError_t tr_gemm_fp8_gate_up(const tr_gemm_fp8 *g, const tr_fp8_weight *w, const tr_fp8_rows *x,
                                const int32_t *start_d, int ue8m0, uint8_t *q_d, float *scale_d,
                                cudaStream_t stream);
/* out[pair[i]] = down x[i], bf16, row stride n_out; pair NULL: out[i]. */
cudaError_t tr_gemm_fp8_down(const tr_gemm_fp8 *g, const tr_fp8_weight *w, const tr_fp8_rows *x,
                             const int32_t *start_d, const int32_t *pair_d, void *out_d,
                             cudaStream_t stream);
/* Their tile shapes by number, for bench_gemm_fp8: all give the same bits. The name, NULL past the last; which one those
 * above take; and the same with a shape. */
const char *tr_gemm_fp8_moe_shape_name(int shape);
int tr_gemm_fp8_moe_pick(int n_mats, int n_pairs_max);
cudaError_t tr_gemm_fp8_gate_up_as(const tr_gemm_fp8 *g, int shape, const tr_fp8_weight *w,
                                   const tr_fp8_rows *x, const int32_t *start_d, int ue8m0,
                                   uint8_t *q_d, float *scale_d, cudaStream_t stream);
cudaError_t tr_gemm_fp8_down_as(const tr_gemm_fp8 *g, int shape, const tr_fp8_weight *w,
                                const tr_fp8_rows *x, const int32_t *start_d, const int32_t *pair_d,
                                void *out_d, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
