#include "kernels/cuda/gemm_bf16.h"

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_bf16_few.cuh"
#include "kernels/cuda/gemm_bf16_tile.cuh"
#include "kernels/cuda/gemm_bf16_wide.cuh"

namespace
{

enum { WARPS = 8, THREADS = WARPS * 32, STEP = 32, LD_MAX = 1 << 24 };

struct product {
    const __nv_bfloat16 *x, *w;
    size_t ld_x, ld_w, ld_y;
    void *y;
    int y_f32, n_max, n_out, n_in, k_warp; /* k_warp: columns of a warp */
    const int32_t *n;
};

/* A block makes 16 M rows by 8 N outputs. Lane l loads 8 neighbouring columns, from 8 (l % 4) on, of
 * rows l / 4 of both sides: where the instruction thinks a column is does not matter as long as both
 * sides agree, and two instructions take what was loaded. */
template <int M, int N>
__global__ void __launch_bounds__(THREADS) multiply_rows(const __grid_constant__ product p)
{
    extern __shared__ float4 part[]; /* [WARPS][M * N][32] */
    const int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
    tr::early::follow();
    const int n = tr::live_rows(p.n, p.n_max), row0 = (int)blockIdx.y * 16 * M,
              out0 = (int)blockIdx.x * 8 * N;
    if (row0 >= n) return;

    const int begin = warp * p.k_warp, end = min(begin + p.k_warp, p.n_in);
    /* Rows and outputs past the last one are the last one again: loads without a branch, results that nobody writes. */
    const __nv_bfloat16 *x = p.x + (size_t)row0 * p.ld_x + lane % 4 * 8,
                        *w = p.w + (size_t)out0 * p.ld_w + lane % 4 * 8;
    int x_at[M][2], w_at[N];
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            x_at[i][h] = min(16 * i + 8 * h + lane / 4, n - 1 - row0) * (int)p.ld_x;
#pragma unroll
    for (int j = 0; j < N; j++)
        w_at[j] = min(8 * j + lane / 4, p.n_out - 1 - out0) * (int)p.ld_w;
    float sum[M][N][4] = {};
    enum { BATCH = N == 1 ? 4 : M == 1 ? 2 : 1 }; /* steps whose loads are in flight together */
#pragma unroll 1
    for (int k0 = begin; k0 < end; k0 += BATCH * STEP) {
        uint4 a[BATCH][M][2], b[BATCH][N];
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int k = min(k0 + u * STEP, end - STEP);
#pragma unroll
            for (int j = 0; j < N; j++)
                b[u][j] = __ldg((const uint4 *)(w + w_at[j] + k));
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    a[u][i][h] = *(const uint4 *)(x + x_at[i][h] + k);
        }
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            if (k0 + u * STEP >= end) break;
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int j = 0; j < N; j++) {
                    const uint4 lo = a[u][i][0], hi = a[u][i][1], y = b[u][j];
                    const uint32_t a0[4] = {lo.x, hi.x, lo.y, hi.y},
                                   a1[4] = {lo.z, hi.z, lo.w, hi.w}, b0[2] = {y.x, y.y},
                                   b1[2] = {y.z, y.w};
                    tr::multiply(sum[i][j], a0, b0, __nv_bfloat16());
                    tr::multiply(sum[i][j], a1, b1, __nv_bfloat16());
                }
        }
    }
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
            part[(warp * M * N + i * N + j) * 32 + lane] =
                make_float4(sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]);
    __syncthreads();
    for (int u = tid; u < M * N * 32; u += THREADS) { /* warps ascending */
        float4 s = part[u];
#pragma unroll
        for (int v = 1; v < WARPS; v++) {
            const float4 t = part[v * M * N * 32 + u];
            s = make_float4(s.x + t.x, s.y + t.y, s.z + t.z, s.w + t.w);
        }
        const int l = u % 32, tile = u / 32, r = row0 + tile / N * 16 + l / 4,
                  o = out0 + tile % N * 8 + l % 4 * 2;
        const float v[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (r + c / 2 * 8 < n && o + c % 2 < p.n_out)
                tr::write_number(p.y, (size_t)(r + c / 2 * 8) * p.ld_y + (size_t)(o + c % 2),
                                 p.y_f32, v[c]);
    }
}

template <int M, int N> constexpr int part_bytes()
{
    return WARPS * M * N * 32 * (int)sizeof(float4);
}

template <int M, int N> cudaError_t launch(const product &p, cudaStream_t stream)
{
    const dim3 grid(tr::blocks_for((size_t)p.n_out, 8 * N),
                    tr::blocks_for((size_t)p.n_max, 16 * M));
    if (grid.y > 65535) return cudaErrorInvalidValue;
    return tr::early::launch(multiply_rows<M, N>, 1, grid, THREADS, part_bytes<M, N>(), stream, p);
}

/* 7168 columns: 28 steps of 32 for each warp. */
enum { FEW_STEPS = 28, FEW_N_IN = FEW_STEPS * 32 * tr::few::WARPS };

template <int OUTS> cudaError_t launch_few(const tr_bf16_product *a, int n_sm, cudaStream_t stream)
{
    const tr::few::product p = {.x = (const __nv_bfloat16 *)a->x_d,
                                .w = (const __nv_bfloat16 *)a->w_d,
                                .ld_x = a->ld_x,
                                .ld_y = a->ld_out,
                                .y = a->out_d,
                                .y_f32 = a->out_f32,
                                .n_max = a->n_max,
                                .n_out = a->n_out,
                                .n = a->n_d};
    const unsigned tiles = tr::blocks_for((size_t)a->n_out, OUTS);
    return tr::early::launch(tr::few::multiply_few<FEW_STEPS, OUTS>, 1,
                             dim3(tr::at_most(tiles, (unsigned)n_sm)), tr::few::THREADS,
                             tr::few::shared_bytes<OUTS>(), stream, p);
}

/* Few outputs are spread over more SMs in tiles of 8. */
cudaError_t launch_few(const tr_bf16_product *a, cudaStream_t stream)
{
    int device = 0, n_sm = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return e;
    return a->n_out <= 8 * n_sm ? launch_few<8>(a, n_sm, stream) : launch_few<16>(a, n_sm, stream);
}

template <int OUTS> cudaError_t open_few()
{
    return cudaFuncSetAttribute(tr::few::multiply_few<FEW_STEPS, OUTS>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                tr::few::shared_bytes<OUTS>());
}

enum { MANY_OUTPUTS = 4096 }; /* from here on smaller tiles would not occupy more SMs */

/* Tiles by what keeps the GPU busy without asking the L2 for the same too often: of the language head's weights as few passes over
 * the rows as registers allow; of few outputs and rows an eighth of the columns a block, else whole sums. Where those tiles would
 * be more than the SMs at once, or nearly, larger ones (gemm_bf16_wide.cuh; one H200, 7168 columns, 8,192 rows: 256 outputs 161 and
 * 83 us, 64 outputs 59 and 44; of 4,096 rows they take as long). */
enum {
    HEAD_ROWS = 32,
    SPLIT_MOST = 1 << 18,
    NARROW = 64,
    NARROW_LEAST = 3 << 17,
    WIDE_LEAST = 1 << 20
};

cudaError_t launch_tile(const product &p, cudaStream_t stream)
{
    using namespace tr::tile;
    const tr::tile::product t = {.x = p.x,
                                 .w = p.w,
                                 .ld_x = p.ld_x,
                                 .ld_y = p.ld_y,
                                 .y = p.y,
                                 .y_f32 = p.y_f32,
                                 .n_max = p.n_max,
                                 .n_out = p.n_out,
                                 .n_in = p.n_in,
                                 .n = p.n};
    if (p.n_out >= MANY_OUTPUTS)
        return p.n_max <= HEAD_ROWS ? launch<2, 1, 4, 5, false>(t, stream)  /* 32 x 128 */
                                    : launch<2, 2, 8, 5, false>(t, stream); /* 64 x 256 */
    const size_t n = (size_t)p.n_max * (size_t)p.n_out;
    if (p.n_out > 128 && n > WIDE_LEAST)
        return tr::wide::launch<2, 4, 4, 6>(t, stream); /* 128 x 128 */
    if (p.n_out <= NARROW && n > NARROW_LEAST)
        return tr::wide::launch<4, 1, 4, 12>(t, stream);             /* 64 x 64 */
    if (n < SPLIT_MOST) return launch<2, 1, 1, 7, true>(t, stream);  /* 32 x 32 */
    return p.n_out <= NARROW ? launch<4, 1, 2, 6, false>(t, stream)  /* 64 x 32 */
                             : launch<4, 2, 4, 6, false>(t, stream); /* 128 x 64 */
}

cudaError_t open_tiles()
{
    cudaError_t e = tr::tile::open<2, 1, 4, 5, false>();
    if (e == cudaSuccess) e = tr::tile::open<2, 2, 8, 5, false>();
    if (e == cudaSuccess) e = tr::tile::open<2, 1, 1, 7, true>();
    if (e == cudaSuccess) e = tr::tile::open<4, 1, 2, 6, false>();
    if (e == cudaSuccess) e = tr::tile::open<4, 2, 4, 6, false>();
    if (e == cudaSuccess) e = tr::wide::open<2, 4, 4, 6>();
    return e == cudaSuccess ? tr::wide::open<4, 1, 4, 12>() : e;
}

} // namespace

int tr_gemm_bf16_fits(int n_in, size_t ld_x)
{
    return n_in > 0 && n_in % STEP == 0 && n_in <= LD_MAX && ld_x % 8 == 0 && ld_x <= LD_MAX;
}

cudaError_t tr_gemm_bf16_open(void)
{
    cudaError_t e = cudaFuncSetAttribute(
        multiply_rows<4, 8>, cudaFuncAttributeMaxDynamicSharedMemorySize, part_bytes<4, 8>());
    if (e == cudaSuccess) e = open_few<8>();
    if (e == cudaSuccess) e = open_few<16>();
    return e == cudaSuccess ? open_tiles() : e;
}

cudaError_t tr_gemm_bf16(const tr_bf16_product *a, cudaStream_t stream)
{
    const product p = {.x = (const __nv_bfloat16 *)a->x_d,
                       .w = (const __nv_bfloat16 *)a->w_d,
                       .ld_x = a->ld_x,
                       .ld_w = (size_t)a->n_in,
                       .ld_y = a->ld_out,
                       .y = a->out_d,
                       .y_f32 = a->out_f32,
                       .n_max = a->n_max,
                       .n_out = a->n_out,
                       .n_in = a->n_in,
                       .k_warp = (a->n_in / STEP + WARPS - 1) / WARPS * STEP,
                       .n = a->n_d};
    if (!tr_gemm_bf16_fits(a->n_in, a->ld_x) || a->n_out <= 0) return cudaErrorInvalidValue;
    if (a->n_max <= 0) return cudaSuccess;
    if (a->n_max <= tr::few::ROWS && a->n_in == FEW_N_IN) return launch_few(a, stream);
    if (tr::tile::fits(a->n_in)) return launch_tile(p, stream);
    const bool many = a->n_out >= MANY_OUTPUTS;
    if (a->n_max <= 16)
        return many && a->n_max > 4 ? launch<1, 4>(p, stream) : launch<1, 1>(p, stream);
    return many || a->n_max > 256 ? launch<4, 8>(p, stream) : launch<4, 1>(p, stream);
}
