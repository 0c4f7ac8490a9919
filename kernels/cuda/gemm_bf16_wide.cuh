/* gemm_bf16.cu for prompts: what bounds tiles of many rows and few outputs is asking the L2 for the same again and again, and copying
 * words between registers for the matrix instructions; so tiles are larger, and words are copied once. One warp copies boxes of 64
 * columns, eight multiply as in gemm_bf16_tile.cuh: the same columns meet in the same order, eighths are added in theirs: the same
 * bits. Clusters that share rows or weights are slower (8,192 rows, 256 outputs 85.8 us, 64 outputs 49.0). */
#ifndef TR_CUDA_GEMM_BF16_WIDE_CUH
#define TR_CUDA_GEMM_BF16_WIDE_CUH

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_bf16_tile.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.cuh"

namespace tr
{
namespace wide
{

enum { WARPS = 8, THREADS = (WARPS + 4) * 32, PARTS = tile::PARTS, COLUMNS = 64, ROW_BYTES = 128 };

struct job {
    tile::product p;
    CUtensorMap x, w; /* boxes of 64 columns by a block's part of a tile, swizzled by 128 bytes */
};

/* WR x 8 / WR warps, of 16 M rows by 8 N outputs each. */
template <int WR, int M, int N, int DEEP> struct shape {
    enum {
        ROWS = WR * 16 * M,
        OUTS = WARPS / WR * 8 * N,
        STAGES = DEEP,
        X_BYTES = ROWS * ROW_BYTES,
        W_BYTES = OUTS * ROW_BYTES,
        STAGE_BYTES = X_BYTES + W_BYTES,
        BYTES = STAGES * (STAGE_BYTES + 16) + 1024,
        MOVES_REGISTERS = M * N >= 16 /* sums and totals take 128 */
    };
    static_assert(ROWS <= 256 && OUTS <= 256, "boxes");
};

/* Row of eight of a lane's group: the two whose 64 bytes a quarter of a warp reads together lie in different halves of the banks. */
__device__ __forceinline__ int row_of(int group)
{
    return group % 2 * 4 + group / 2;
}

/* One thread: boxes of a tile into the ring. */
template <class S>
__device__ void copy_tiles(const job &j, uint8_t *ring, uint64_t *full, uint64_t *empty, int row0,
                           int out0, int n_steps)
{
    ring_position<S::STAGES> at;

    for (int step = 0; step < n_steps; step++, at.next()) {
        uint8_t *x = ring + at.stage * S::STAGE_BYTES, *w = x + S::X_BYTES;
        uint64_t *done = full + at.stage;
        barrier_wait(empty + at.stage, at.parity ^ 1);
        barrier_expect(done, S::STAGE_BYTES);
        tensor_load(x, &j.x, step * COLUMNS, row0, done);
        tensor_load(w, &j.w, step * COLUMNS, out0, done);
    }
}

/* x. The matrix instruction wants its rows' words in four neighbouring registers; plain copies would be made again for every
 * instruction that takes them, four times as many as it needs. same: 0x3210, in a way the compiler does not see. */
__device__ __forceinline__ uint32_t copy(uint32_t x, uint32_t same)
{
    return __byte_perm(x, x, same);
}

/* Sums of 64 columns. row, out: the warp's first of the stage, at this lane's row. */
template <int M, int N>
__device__ __forceinline__ void add_columns(float (&sum)[M][N][4], const uint8_t *row,
                                            const uint8_t *out, uint32_t piece, uint32_t same)
{
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const uint32_t here = piece ^ (uint32_t)(k * 64);
        uint4 b[N];
#pragma unroll
        for (int j = 0; j < N; j++)
            b[j] = *(const uint4 *)(out + 8 * j * ROW_BYTES + here);
#pragma unroll
        for (int i = 0; i < M; i++) {
            const uint4 lo = *(const uint4 *)(row + 16 * i * ROW_BYTES + here),
                        hi = *(const uint4 *)(row + (16 * i + 8) * ROW_BYTES + here);
            const uint32_t a0[4] = {copy(lo.x, same), copy(hi.x, same), copy(lo.y, same),
                                    copy(hi.y, same)},
                           a1[4] = {copy(lo.z, same), copy(hi.z, same), copy(lo.w, same),
                                    copy(hi.w, same)};
#pragma unroll
            for (int j = 0; j < N; j++) {
                const uint32_t y[2] = {b[j].x, b[j].y};
                multiply(sum[i][j], a0, y, __nv_bfloat16());
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                const uint32_t y[2] = {b[j].z, b[j].w};
                multiply(sum[i][j], a1, y, __nv_bfloat16());
            }
        }
    }
}

template <int WR, int M, int N, int DEEP>
__device__ __forceinline__ void multiply_steps(const job &job, const uint8_t *ring, uint64_t *full,
                                               uint64_t *empty, int row0, int out0, int n)
{
    typedef shape<WR, M, N, DEEP> S;
    const tile::product &p = job.p;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, q = lane % 4,
              g = row_of(lane / 4), row_w = warp / (WARPS / WR) * 16 * M,
              out_w = warp % (WARPS / WR) * 8 * N, steps_part = p.n_in / COLUMNS / PARTS,
              n_steps = PARTS * steps_part;
    const uint32_t piece = (uint32_t)((q ^ g) * 16), same = 0x3210u + (p.n_in < 0);
    const uint8_t *rows = ring + (row_w + g) * ROW_BYTES,
                  *outs = ring + S::X_BYTES + (out_w + g) * ROW_BYTES;
    float sum[M][N][4] = {}, total[M][N][4] = {};
    ring_position<S::STAGES> at;
    int left = steps_part;

#pragma unroll 1
    for (int step = 0; step < n_steps; step++, at.next()) {
        barrier_wait(full + at.stage, at.parity);
        add_columns<M, N>(sum, rows + at.stage * S::STAGE_BYTES, outs + at.stage * S::STAGE_BYTES,
                          piece, same);
        barrier_arrive_warp(empty + at.stage, lane);
        if (--left) continue;
        left = steps_part;
        tile::end_part<M, N>(total, sum, step + 1 == steps_part);
    }
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
                    const int o = out0 + out_w + 8 * j + row_of(2 * q + c);
                    if (o < p.n_out)
                        write_number(p.y, (size_t)r * p.ld_y + (size_t)o, p.y_f32,
                                     total[i][j][2 * h + c]);
                }
        }
}

template <int WR, int M, int N, int DEEP>
__global__ void __launch_bounds__(THREADS, 1) multiply_wide(const __grid_constant__ job j)
{
    typedef shape<WR, M, N, DEEP> S;
    extern __shared__ uint8_t memory[];
    uint8_t *ring = memory + (1024 - smem_address(memory) % 1024) % 1024;
    uint64_t *full = (uint64_t *)(void *)(ring + S::STAGES * S::STAGE_BYTES),
             *empty = full + S::STAGES;
    const int across = (j.p.n_out + S::OUTS - 1) / S::OUTS,
              row0 = (int)blockIdx.x / across * S::ROWS, out0 = (int)blockIdx.x % across * S::OUTS;

    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, WARPS * WARP_ARRIVALS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    early::follow();
    const int n = live_rows(j.p.n, j.p.n_max);
    if (row0 >= n) return;
    if (threadIdx.x / 32 < WARPS) {
        if (S::MOVES_REGISTERS) registers_raise<240>();
        multiply_steps<WR, M, N, DEEP>(j, ring, full, empty, row0, out0, n);
    } else {
        if (S::MOVES_REGISTERS) registers_lower<24>();
        if (threadIdx.x == WARPS * 32)
            copy_tiles<S>(j, ring, full, empty, row0, out0, j.p.n_in / COLUMNS / PARTS * PARTS);
    }
}

/* A box of `rows` rows by 64 columns of bf16 [n, n_in], rows ld apart. */
inline cudaError_t encode(CUtensorMap *map, const void *base, int n_in, int n, size_t ld, int rows)
{
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                     cudaEnableDefault, &found);
    if (e != cudaSuccess) return e;
    if (found != cudaDriverEntryPointSuccess || !entry) return cudaErrorNotSupported;
    const cuuint64_t d[2] = {(cuuint64_t)n_in, (cuuint64_t)n}, s[1] = {(cuuint64_t)ld * 2};
    const cuuint32_t b[2] = {COLUMNS, (cuuint32_t)rows}, steps[2] = {1, 1};
    const CUresult r = ((decltype(&cuTensorMapEncodeTiled))entry)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(base), d, s, b, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <int WR, int M, int N, int DEEP> cudaError_t open()
{
    return cudaFuncSetAttribute(multiply_wide<WR, M, N, DEEP>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                shape<WR, M, N, DEEP>::BYTES);
}

template <int WR, int M, int N, int DEEP>
cudaError_t launch(const tile::product &p, cudaStream_t stream)
{
    typedef shape<WR, M, N, DEEP> S;
    job j = {p, {}, {}};
    cudaError_t e = encode(&j.x, p.x, p.n_in, p.n_max, p.ld_x, S::ROWS);
    if (e == cudaSuccess) e = encode(&j.w, p.w, p.n_in, p.n_out, (size_t)p.n_in, S::OUTS);
    if (e != cudaSuccess) return e;
    const unsigned blocks =
        blocks_for((size_t)p.n_out, S::OUTS) * blocks_for((size_t)p.n_max, S::ROWS);
    return early::launch(multiply_wide<WR, M, N, DEEP>, 1, dim3(blocks), THREADS, S::BYTES, stream,
                         j);
}

} // namespace wide
} // namespace tr

#endif
