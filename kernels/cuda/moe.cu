/* Mixture of experts (model.md 6): W8A8 inputs, the experts' segments as tiles, silu in between,
 * and the weighted sum; the router and the sort of pairs by expert are in router.cu. */
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quantise.h"

namespace
{

enum { THREADS = 256, COMBINE_THREADS = 128 };

/* A warp takes a block of 128 columns of a row: one scale. */
__global__ void __launch_bounds__(THREADS)
    quantise(const __grid_constant__ tr_cuda_quantise_args a, int ld_scale)
{
    const int n = tr::live_rows(a.n, a.n_max), lane = (int)threadIdx.x % 32;
    const size_t total = (size_t)n * (size_t)a.blocks, step = (size_t)gridDim.x * (THREADS / 32);
    for (size_t u = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; u < total; u += step) {
        const int row = (int)(u / (size_t)a.blocks), block = (int)(u % (size_t)a.blocks);
        const size_t x0 = (size_t)row * a.ld;
        const int k = block * 128 + lane * 4 - a.k_shift;
        float v[4], amax = 0;
        for (int i = 0; i < 4; i++) {
            v[i] = k + i >= 0 && k + i < a.d ? tr::read_number(a.x, x0 + (size_t)(k + i), a.x_f32)
                                             : 0.0f;
            amax = fmaxf(amax, fabsf(v[i]));
        }
        amax = tr::warp_reduce<float, tr::larger<float>>(amax);
        const float scale = a.pow2 ? tr::scale_pow2(amax) : __fdiv_rn(fmaxf(amax, 1e-4f), 448.0f);
        uint32_t codes = 0;
        for (int i = 0; i < 4; i++)
            codes |= (uint32_t)tr::to_e4m3(__fdiv_rn(v[i], scale)) << (8 * i);
        *(uint32_t *)(a.q + (size_t)row * (size_t)(a.blocks * 128) +
                      (size_t)(block * 128 + lane * 4)) = codes;
        if (lane == 0) a.scale[(size_t)block * (size_t)ld_scale + (size_t)row] = scale;
    }
}

/* The tiles of all experts, experts ascending. One thread per expert. */
__global__ void list_tiles(const int32_t *start, int n_local, int2 *tiles, int32_t *n_tiles,
                           int32_t *n_pairs)
{
    __shared__ int scratch[33];
    int done = 0;
    for (int e0 = 0; e0 < n_local; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x;
        const int rows = e < n_local ? start[e + 1] - start[e] : 0;
        const int n = (rows + tr::TILE_ROWS - 1) / tr::TILE_ROWS;
        int total;
        const int at = done + tr::block_scan(n, scratch, &total);
        for (int i = 0; i < n; i++)
            tiles[at + i] = make_int2(e, start[e] + i * tr::TILE_ROWS);
        done += total;
    }
    if (threadIdx.x == 0) {
        *n_tiles = done;
        *n_pairs = start[n_local];
    }
}

/* out = silu(gate) * up, of rows [gate | up] of fp32; out may be gate. */
__global__ void swiglu_f32(const int32_t *n, int n_max, int d, const float *gate_up, size_t ld_in,
                           float *out, size_t ld_out)
{
    const size_t total = (size_t)tr::live_rows(n, n_max) * (size_t)d;
    for (size_t u = (size_t)blockIdx.x * blockDim.x + threadIdx.x; u < total;
         u += (size_t)gridDim.x * blockDim.x) {
        const size_t r = u / (size_t)d, i = u % (size_t)d;
        const float g = gate_up[r * ld_in + i], up = gate_up[r * ld_in + (size_t)d + i];
        out[r * ld_out + i] = g / (1.0f + expf(-g)) * up;
    }
}

cudaError_t launch_swiglu_f32(const int32_t *n, int n_max, int d, float *gate_up,
                              cudaStream_t stream)
{
    const size_t total = (size_t)n_max * (size_t)d, ld = 2 * (size_t)d;
    if (total == 0) return cudaSuccess;
    const unsigned blocks = tr::blocks_for(total, THREADS);
    swiglu_f32<<<tr::at_most(blocks, 8192), THREADS, 0, stream>>>(n, n_max, d, gate_up, ld, gate_up,
                                                                  ld);
    return cudaGetLastError();
}

/* The same of activations. V: numbers at a time, 4 or 1. */
template <int V>
__global__ void __launch_bounds__(THREADS) swiglu(const __grid_constant__ tr_swiglu_args a)
{
    tr::early::follow();
    const size_t width = (size_t)(a.d / V), total = (size_t)tr::live_rows(a.n, a.n_max) * width;
    const __nv_bfloat16 *in = tr::act(a.gate_up);
    __nv_bfloat16 *out = tr::act(a.out);
    for (size_t u = (size_t)blockIdx.x * THREADS + threadIdx.x; u < total;
         u += (size_t)gridDim.x * THREADS) {
        const size_t r = u / width, i = u % width * V, at = r * 2 * (size_t)a.d + i;
        if (V == 4) {
            const float4 g = tr::read_four(in + at), up = tr::read_four(in + at + a.d);
            tr::write_four(out + r * (size_t)a.d + i,
                           make_float4(tr::silu_times(g.x, up.x), tr::silu_times(g.y, up.y),
                                       tr::silu_times(g.z, up.z), tr::silu_times(g.w, up.w)));
        } else {
            out[r * (size_t)a.d + i] = __float2bfloat16_rn(
                tr::silu_times(__bfloat162float(in[at]), __bfloat162float(in[at + (size_t)a.d])));
        }
    }
}

/* V neighbouring numbers at once: 8 are 16 bytes. */
template <int V> struct piece_of;
template <> struct piece_of<8> {
    typedef uint4 raw;
};
template <> struct piece_of<4> {
    typedef uint2 raw;
};
template <> struct piece_of<1> {
    typedef unsigned short raw;
};
__device__ __forceinline__ void spread(float (&v)[8], uint4 raw)
{
    tr::eight_of(v, raw);
}
__device__ __forceinline__ void spread(float (&v)[4], uint2 raw)
{
    const float4 f = tr::four_of(raw);
    v[0] = f.x;
    v[1] = f.y;
    v[2] = f.z;
    v[3] = f.w;
}
__device__ __forceinline__ void spread(float (&v)[1], unsigned short raw)
{
    v[0] = __uint_as_float((uint32_t)raw << 16);
}

__device__ __forceinline__ uint32_t two(float low, float high)
{
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&x;
}

/* A thread has V neighbouring columns of a row, a block of threads one of the row's `across` parts. The rows of AHEAD pairs are on
 * their way at a time; they are added in the order of the pairs. */
template <int V>
__global__ void __launch_bounds__(COMBINE_THREADS, 6)
    combine(const __grid_constant__ tr_moe_combine_args a, int across)
{
    enum { AHEAD = 8 };
    typedef typename piece_of<V>::raw piece;
    const int r = (int)blockIdx.x / across,
              i = ((int)blockIdx.x % across * COMBINE_THREADS + (int)threadIdx.x) * V;
    tr::early::follow();
    if (i >= a.d) return;
    const size_t at = (size_t)r * (size_t)a.d + (size_t)i, pair = (size_t)r * (size_t)a.k;
    const __nv_bfloat16 *y = tr::act(a.y) + pair * (size_t)a.d + (size_t)i;
    const int32_t *expert = a.expert + pair;
    const float *weight = a.weight + pair;
    const int n = tr::live_rows(a.n, a.n_max);
    float sum[V] = {};
    piece x0 = {};
    if (a.shared) x0 = *reinterpret_cast<const piece *>(tr::act(a.shared) + at);
    for (int j0 = 0; j0 == 0 || j0 < a.k; j0 += AHEAD) {
        piece x[AHEAD] = {};
        float w[AHEAD];
        uint32_t here = 0;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) { /* beside n: there is room for n_max rows of them */
            const int e = j0 + j < a.k ? expert[j0 + j] - a.e_first : -1;
            w[j] = j0 + j < a.k ? weight[j0 + j] : 0;
            here |= (uint32_t)(e >= 0 && e < a.n_local) << j;
        }
        if (r >= n) return;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (here >> j & 1) /* nobody reads it again */
                x[j] = __ldcs(reinterpret_cast<const piece *>(y + (size_t)(j0 + j) * (size_t)a.d));
        if (j0 == 0) spread(sum, x0);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (!(here >> j & 1)) continue;
            float f[V];
            spread(f, x[j]);
#pragma unroll
            for (int v = 0; v < V; v++)
                sum[v] = __fmaf_rn(w[j], f[v], sum[v]);
        }
    }
    __nv_bfloat16 *out = tr::act(a.out) + at;
    if constexpr (V == 1)
        *out = __float2bfloat16_rn(sum[0]);
    else if constexpr (V == 4)
        tr::write_four(out, make_float4(sum[0], sum[1], sum[2], sum[3]));
    else
        *(uint4 *)(void *)out = make_uint4(two(sum[0], sum[1]), two(sum[2], sum[3]),
                                           two(sum[4], sum[5]), two(sum[6], sum[7]));
}

/* ---- the workspace of moe ------------------------------------------------------------------------------------------ */

struct moe_memory {
    uint8_t *q_in, *q_inner;
    float *scale_in, *scale_inner, *inner;
    int2 *tiles;
    int32_t *n_tiles, *n_pairs;
};

size_t carve(moe_memory *m, void *base, int n_max, int k, int d, int inner)
{
    const size_t rows = (size_t)n_max, pairs = rows * (size_t)k;
    const size_t in_blocks = (size_t)tr_blocks_at_most(d),
                 inner_blocks = (size_t)tr_blocks_at_most(inner);
    size_t at = 0;
    auto take = [&](size_t bytes) {
        uint8_t *p = (uint8_t *)base + at;
        at += (bytes + 255) / 256 * 256;
        return p;
    };
    m->q_in = take(rows * in_blocks * 128);
    m->scale_in = (float *)take((rows + 3) / 4 * 4 * in_blocks * 4);
    m->inner = (float *)take(pairs * 2 * (size_t)inner * 4);
    m->q_inner = take(pairs * inner_blocks * 128);
    m->scale_inner = (float *)take((pairs + 3) / 4 * 4 * inner_blocks * 4);
    m->tiles = (int2 *)take(pairs * sizeof(int2));
    m->n_tiles = (int32_t *)take(8);
    m->n_pairs = m->n_tiles + 1;
    return at;
}

} // namespace

cudaError_t tr_cuda_quantise(const tr_cuda_quantise_args *a, cudaStream_t stream)
{
    const unsigned blocks = tr::blocks_for((size_t)a->n_max * (size_t)a->blocks, THREADS / 32);
    if (blocks == 0) return cudaSuccess;
    quantise<<<tr::at_most(blocks, 8192), THREADS, 0, stream>>>(*a, (a->n_max + 3) / 4 * 4);
    return cudaGetLastError();
}

size_t tr_cuda_moe_workspace(int n_max, int k, int d, int d_inner)
{
    moe_memory m;
    if (n_max <= 0 || k <= 0 || d <= 0 || d_inner <= 0) return 0;
    return carve(&m, nullptr, n_max, k, d, d_inner);
}

cudaError_t tr_cuda_moe(const struct tr_moe_args *a, int shift_in, int shift_inner,
                        cudaStream_t stream)
{
    const int d = a->in.d, inner = a->down->n_in, pairs_max = a->n_max * a->k;
    const bool quantised = a->gate_up->format == TR_W_E4M3_B128;
    moe_memory m;

    if (a->gate_up->n_out != 2 * inner || a->gate_up->n_in != d ||
        a->down->format != a->gate_up->format ||
        a->workspace_bytes < carve(&m, a->workspace, a->n_max, a->k, d, inner))
        return cudaErrorInvalidValue;
    if (pairs_max == 0) return cudaSuccess;
    list_tiles<<<1, 256, 0, stream>>>(a->start, a->n_local, m.tiles, m.n_tiles, m.n_pairs);

    tr::product p = {};
    tr::product_weight(&p, a->gate_up);
    cudaError_t e = cudaGetLastError();
    if (quantised) {
        const bool ready = a->in.quantised && shift_in == 0;
        p.blocks = (d + shift_in + 127) / 128;
        p.q = ready ? a->in.q : m.q_in;
        p.q_scale = ready ? a->in.q_scale : m.scale_in;
        p.ld_q_scale = (a->n_max + 3) / 4 * 4;
        const tr_cuda_quantise_args q = {.x = a->in.x,
                                         .ld = a->in.ld,
                                         .n = a->n,
                                         .n_max = a->n_max,
                                         .d = d,
                                         .blocks = p.blocks,
                                         .pow2 = a->in.scale_pow2,
                                         .k_shift = shift_in,
                                         .q = m.q_in,
                                         .scale = m.scale_in};
        if (e == cudaSuccess && !ready) e = tr_cuda_quantise(&q, stream);
    }
    p.x = a->in.x;
    p.ld_x = a->in.ld;
    p.row_index = a->pair;
    p.row_div = a->k;
    p.y = m.inner;
    p.y_f32 = 1;
    p.ld_y = 2 * (size_t)inner;
    p.tiles = m.tiles;
    p.n_tiles = m.n_tiles;
    p.start = a->start;
    p.tiles_max = pairs_max / tr::TILE_ROWS + (a->n_local < pairs_max ? a->n_local : pairs_max);
    if (e == cudaSuccess) e = tr::product_launch(&p, stream);
    if (e == cudaSuccess) e = launch_swiglu_f32(m.n_pairs, pairs_max, inner, m.inner, stream);

    tr::product_weight(&p, a->down);
    if (quantised) {
        p.blocks = (inner + shift_inner + 127) / 128;
        p.q = m.q_inner;
        p.q_scale = m.scale_inner;
        p.ld_q_scale = (pairs_max + 3) / 4 * 4;
        const tr_cuda_quantise_args q = {.x = m.inner,
                                         .x_f32 = 1,
                                         .ld = 2 * (size_t)inner,
                                         .n = m.n_pairs,
                                         .n_max = pairs_max,
                                         .d = inner,
                                         .blocks = p.blocks,
                                         .pow2 = a->in.scale_pow2,
                                         .k_shift = shift_inner,
                                         .q = m.q_inner,
                                         .scale = m.scale_inner};
        if (e == cudaSuccess) e = tr_cuda_quantise(&q, stream);
    }
    p.x = m.inner;
    p.x_f32 = 1;
    p.ld_x = 2 * (size_t)inner;
    p.row_index = nullptr;
    p.y = a->out;
    p.y_f32 = 0;
    p.ld_y = (size_t)a->down->n_out;
    p.out_index = a->pair;
    return e == cudaSuccess ? tr::product_launch(&p, stream) : e;
}

cudaError_t tr_cuda_swiglu(const struct tr_swiglu_args *a, cudaStream_t stream)
{
    if (a->q && a->d % 8 == 0)
        return tr_quantise_swiglu(a->gate_up, a->n, a->n_max, a->d, a->scale_pow2, a->q, a->q_scale,
                                  stream);
    const int v = a->d % 4 ? 1 : 4;
    const size_t total = a->n_max <= 0 ? 0 : (size_t)a->n_max * (size_t)(a->d / v);
    if (total == 0) return cudaSuccess;
    const unsigned blocks = tr::at_most(tr::blocks_for(total, THREADS), 8192);
    return tr::early::launch(v == 4 ? swiglu<4> : swiglu<1>, 1, dim3(blocks), THREADS, 0, stream,
                             *a);
}

cudaError_t tr_cuda_moe_combine(const struct tr_moe_combine_args *a, cudaStream_t stream)
{
    if (a->n_max <= 0) return cudaSuccess;
    const uintptr_t where = (uintptr_t)a->y | (uintptr_t)a->shared | (uintptr_t)a->out;
    const int v = a->d % 8 == 0 && where % 16 == 0 ? 8 : a->d % 4 == 0 && where % 8 == 0 ? 4 : 1;
    const unsigned across = tr::blocks_for((size_t)a->d, (size_t)(COMBINE_THREADS * v));
    return tr::early::launch(v == 8   ? combine<8>
                             : v == 4 ? combine<4>
                                      : combine<1>,
                             1, dim3((unsigned)a->n_max * across), COMBINE_THREADS, 0, stream, *a,
                             (int)across);
}
