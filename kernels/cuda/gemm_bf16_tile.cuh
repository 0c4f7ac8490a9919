/* gemm_bf16.cu for more rows than a few: tiles whose rows and weights come through rings of shared memory, so that each is asked of
 * the L2 once a tile. All warps of a block work on the same columns; a warp's sum of an eighth of them is added to its total where
 * the eighth ends. The same columns meet in the same order as in multiply_rows, and eighths ascending: the same bits. */
#ifndef TR_CUDA_GEMM_BF16_TILE_CUH
#define TR_CUDA_GEMM_BF16_TILE_CUH

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.cuh"

namespace tr
{
namespace tile
{

enum { WARPS = 8, THREADS = WARPS * 32, PARTS = 8, COLUMNS = 64, ROW_BYTES = COLUMNS * 2 };

struct product {
    const __nv_bfloat16 *x, *w;
    size_t ld_x, ld_y;
    void *y;
    int y_f32, n_max, n_out, n_in;
    const int32_t *n;
};

/* WR x 8 / WR warps, of 16 M rows by 8 N outputs each; DEEP: stages of the ring. SPLIT: a cluster of 8 blocks makes a tile, each an
 * eighth of the columns, where there are too few tiles for the GPU. */
template <int WR, int M, int N, int DEEP, bool SPLIT> struct shape {
    enum {
        ROWS = WR * 16 * M,
        OUTS = WARPS / WR * 8 * N,
        STAGES = DEEP,
        STAGE_BYTES = (ROWS + OUTS) * ROW_BYTES,
        BYTES = STAGES * STAGE_BYTES,
        BLOCKS_SM = BYTES <= 100 << 10 ? 2 : 1
    };
};

/* 16 bytes of row r of a stage: 64 columns are 8 of them. Two rows that a quarter of a warp reads together meet no bank twice. */
__device__ __forceinline__ uint32_t place(int r, int at)
{
    return (uint32_t)(r * ROW_BYTES + (at ^ (r & 1) * 4) * 16);
}

/* The cluster's eighths of a tile, ascending; each block writes an eighth of the outputs. put: this block's sums. */
template <int ROWS, int OUTS, class F>
__device__ __forceinline__ void join(const product &p, uint8_t *memory, int row0, int out0, int n,
                                     const F &put)
{
    float *part = (float *)memory;
    const int me = (int)cluster_rank();
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    put(part);
    cluster_arrive();
    cluster_wait();
    for (int u = me * (ROWS * OUTS / PARTS) + (int)threadIdx.x;
         u < (me + 1) * (ROWS * OUTS / PARTS); u += THREADS) {
        const int r = row0 + u / OUTS, o = out0 + u % OUTS;
        float v[PARTS], sum = 0;
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            asm volatile("ld.shared::cluster.f32 %0, [%1];"
                         : "=f"(v[i])
                         : "r"(cluster_address(smem_address(part + u), (uint32_t)i)));
        sum = v[0];
#pragma unroll
        for (int i = 1; i < PARTS; i++)
            sum += v[i];
        if (r < n && o < p.n_out) write_number(p.y, (size_t)r * p.ld_y + (size_t)o, p.y_f32, sum);
    }
    cluster_arrive(); /* nobody's sums go before all have read them */
    cluster_wait();
}

/* An eighth of the columns is done: its sums to the total, which the first one begins. */
template <int M, int N>
__device__ __forceinline__ void end_part(float (&total)[M][N][4], float (&sum)[M][N][4], bool first)
{
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                total[i][j][c] = first ? sum[i][j][c] : total[i][j][c] + sum[i][j][c];
                sum[i][j][c] = 0;
            }
}

template <int WR, int M, int N, int DEEP, bool SPLIT>
__global__ void __launch_bounds__(THREADS, shape<WR, M, N, DEEP, SPLIT>::BLOCKS_SM)
    multiply_tile(const __grid_constant__ product p)
{
    typedef shape<WR, M, N, DEEP, SPLIT> S;
    extern __shared__ __align__(128) uint8_t memory[];
    const int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int row0 = (int)blockIdx.y * S::ROWS,
              out0 = (int)(SPLIT ? blockIdx.x / PARTS : blockIdx.x) * S::OUTS;
    const uint32_t ring = smem_address(memory);
    const int steps_part = p.n_in / COLUMNS / PARTS,
              n_steps = SPLIT ? steps_part : PARTS * steps_part,
              first_column = SPLIT ? (int)(blockIdx.x % PARTS) * steps_part * COLUMNS : 0;
    enum { EACH_X = S::ROWS * 8 / THREADS, EACH_W = S::OUTS * 8 / THREADS };
    static_assert(EACH_X * THREADS == S::ROWS * 8 || S::ROWS * 8 < THREADS, "whole rounds of rows");
    static_assert(EACH_W * THREADS == S::OUTS * 8, "whole rounds of outputs");

    /* Rows and outputs past the last one are the last one again. */
    const int at = tid % 8, r0 = tid / 8;
    const __nv_bfloat16 *w[EACH_W];
#pragma unroll
    for (int i = 0; i < EACH_W; i++)
        w[i] = p.w + (size_t)min(out0 + r0 + i * (THREADS / 8), p.n_out - 1) * (size_t)p.n_in +
               first_column + at * 8;
    const auto load_w = [&](int step) {
        const uint32_t stage =
            ring + (uint32_t)(step % S::STAGES * S::STAGE_BYTES + S::ROWS * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < EACH_W; i++)
            async_copy16(stage + place(r0 + i * (THREADS / 8), at), w[i] + step * COLUMNS, 16);
    };
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++)
        if (i < n_steps) load_w(i); /* beside the kernel in front */
    early::follow();
    const int n = live_rows(p.n, p.n_max);
    if (row0 >= n) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        return;
    }
    enum { ROUNDS_X = EACH_X ? EACH_X : 1 };
    const __nv_bfloat16 *x[ROUNDS_X];
#pragma unroll
    for (int i = 0; i < ROUNDS_X; i++)
        x[i] = p.x + (size_t)min(row0 + r0 + i * (THREADS / 8), n - 1) * p.ld_x + first_column +
               at * 8;
    const auto load_x = [&](int step) {
        const uint32_t stage = ring + (uint32_t)(step % S::STAGES * S::STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < ROUNDS_X; i++)
            if (EACH_X || r0 < S::ROWS)
                async_copy16(stage + place(r0 + i * (THREADS / 8), at), x[i] + step * COLUMNS, 16);
    };
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++) {
        if (i < n_steps) load_x(i);
        asm volatile("cp.async.commit_group;" ::
                         : "memory"); /* the first takes all weights so far */
    }

    float sum[M][N][4] = {}, total[M][N][4] = {};
    const int g = lane / 4, q = lane % 4, row_w = warp / (WARPS / WR) * 16 * M,
              out_w = warp % (WARPS / WR) * 8 * N;
    int left = steps_part;
#pragma unroll 1
    for (int step = 0; step < n_steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(S::STAGES - 2) : "memory");
        __syncthreads();
        if (step + S::STAGES - 1 < n_steps) {
            load_w(step + S::STAGES - 1);
            load_x(step + S::STAGES - 1);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        const uint8_t *rows = memory + step % S::STAGES * S::STAGE_BYTES,
                      *outs = rows + S::ROWS * ROW_BYTES;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint4 a[M][2], b[N];
#pragma unroll
            for (int j = 0; j < N; j++)
                b[j] = *(const uint4 *)(outs + place(out_w + 8 * j + g, 4 * k + q));
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    a[i][h] = *(const uint4 *)(rows + place(row_w + 16 * i + 8 * h + g, 4 * k + q));
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int j = 0; j < N; j++) {
                    const uint4 lo = a[i][0], hi = a[i][1], y = b[j];
                    const uint32_t a0[4] = {lo.x, hi.x, lo.y, hi.y},
                                   a1[4] = {lo.z, hi.z, lo.w, hi.w}, b0[2] = {y.x, y.y},
                                   b1[2] = {y.z, y.w};
                    multiply(sum[i][j], a0, b0, __nv_bfloat16());
                    multiply(sum[i][j], a1, b1, __nv_bfloat16());
                }
        }
        if (--left) continue;
        left = steps_part;
        end_part<M, N>(total, sum, step + 1 == steps_part);
    }
    if constexpr (SPLIT) {
        join<S::ROWS, S::OUTS>(p, memory, row0, out0, n, [&](float *part) {
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++)
                        part[(row_w + 16 * i + c / 2 * 8 + g) * S::OUTS + out_w + 8 * j + 2 * q +
                             c % 2] = total[i][j][c];
        });
    } else {
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row0 + row_w + 16 * i + 8 * h + g;
                if (r >= n) continue;
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int o = out0 + out_w + 8 * j + 2 * q + c;
                        if (o < p.n_out)
                            write_number(p.y, (size_t)r * p.ld_y + (size_t)o, p.y_f32,
                                         total[i][j][2 * h + c]);
                    }
            }
    }
}

/* Whether the eighths of these columns are whole steps. */
inline bool fits(int n_in)
{
    return n_in % (PARTS * COLUMNS) == 0;
}

template <int WR, int M, int N, int DEEP, bool SPLIT> cudaError_t open()
{
    return cudaFuncSetAttribute(multiply_tile<WR, M, N, DEEP, SPLIT>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                shape<WR, M, N, DEEP, SPLIT>::BYTES);
}

template <int WR, int M, int N, int DEEP, bool SPLIT>
cudaError_t launch(const product &p, cudaStream_t stream)
{
    typedef shape<WR, M, N, DEEP, SPLIT> S;
    const dim3 grid(blocks_for((size_t)p.n_out, S::OUTS) * (SPLIT ? PARTS : 1),
                    blocks_for((size_t)p.n_max, S::ROWS));
    return early::launch(multiply_tile<WR, M, N, DEEP, SPLIT>, SPLIT ? PARTS : 1, grid, THREADS,
                         S::BYTES, stream, p);
}

} // namespace tile
} // namespace tr

#endif
