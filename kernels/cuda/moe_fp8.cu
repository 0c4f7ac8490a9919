/* Experts on FP8 matrix instructions: rows sorted by expert as e4m3, both products grouped, silu in the epilogue of the first
 * (gemm_fp8.h). */
#include "kernels/cuda/moe_fp8.h"

#include "kernels/cuda/quantise.h"

namespace
{

struct memory {
    uint8_t *q, *q_sorted, *q_inner;
    float *scale, *scale_sorted, *scale_inner;
};

size_t carve(memory *m, void *base, int n_max, int k, int d, int inner)
{
    const size_t rows = (size_t)n_max, pairs = rows * (size_t)k;
    const size_t d_blocks = (size_t)(d + 127) / 128, inner_blocks = (size_t)(inner + 127) / 128;
    size_t at = 0;
    auto take = [&](size_t bytes) {
        uint8_t *p = (uint8_t *)base + at;
        at += (bytes + 255) / 256 * 256;
        return p;
    };
    m->q = take(rows * (size_t)d);
    m->scale = (float *)take((rows + 3) / 4 * 4 * d_blocks * 4);
    m->q_sorted = take(pairs * (size_t)d);
    m->scale_sorted = (float *)take((pairs + 3) / 4 * 4 * d_blocks * 4);
    m->q_inner = take(pairs * (size_t)inner);
    m->scale_inner = (float *)take((pairs + 3) / 4 * 4 * inner_blocks * 4);
    return at;
}

} // namespace

size_t tr_cuda_moe_fp8_workspace(int n_max, int k, int d, int d_inner)
{
    memory m;
    if (n_max <= 0 || k <= 0 || d <= 0 || d_inner <= 0) return 0;
    return carve(&m, nullptr, n_max, k, d, d_inner);
}

cudaError_t tr_cuda_moe_fp8(const tr_gemm_fp8 *g, const struct tr_moe_args *a,
                            const tr_fp8_weight *gate_up, const tr_fp8_weight *down,
                            cudaStream_t stream)
{
    const int d = gate_up->n_in, inner = down->n_in, n_pairs = a->n_max * a->k;
    cudaError_t e = cudaSuccess;
    memory m;

    if (a->workspace_bytes < carve(&m, a->workspace, a->n_max, a->k, d, inner))
        return cudaErrorInvalidValue;
    if (n_pairs == 0) return cudaSuccess;
    tr_fp8_rows x = {.q_d = a->in.q, .scale_d = a->in.q_scale, .n_d = a->n, .n_max = a->n_max};
    if (!a->in.quantised) {
        e = tr_quantise_rows(a->in.x, a->in.ld, a->n, a->n_max, d, a->in.scale_pow2, m.q, m.scale,
                             stream);
        x.q_d = m.q;
        x.scale_d = m.scale;
    }
    if (e == cudaSuccess)
        e = tr_moe_gather_fp8(&x, d, a->k, a->n_local, a->start, a->pair, n_pairs, m.q_sorted,
                              m.scale_sorted, stream);
    const tr_fp8_rows
        sorted = {.q_d = m.q_sorted, .scale_d = m.scale_sorted, .n_max = n_pairs, .start_made = 1},
        mid = {.q_d = m.q_inner, .scale_d = m.scale_inner, .n_max = n_pairs, .start_made = 1};
    if (e == cudaSuccess)
        e = tr_gemm_fp8_gate_up(g, gate_up, &sorted, a->start, a->in.scale_pow2, m.q_inner,
                                m.scale_inner, stream);
    return e == cudaSuccess ? tr_gemm_fp8_down(g, down, &mid, a->start, a->pair, a->out, stream)
                            : e;
}
