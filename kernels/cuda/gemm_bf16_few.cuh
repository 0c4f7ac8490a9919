/* gemm_bf16.cu for up to 8 rows of the real model's width. The rows' fragments stay in registers for good, weights come through
 * rings of shared memory: each warp has one of its own for its eighth of the columns and asks for what it will need, beside the
 * kernel in front and across tiles, so an SM has up to 200 KB on their way. The same columns meet in
 * the same order as in multiply_rows: the same bits. */
#ifndef TR_CUDA_GEMM_BF16_FEW_CUH
#define TR_CUDA_GEMM_BF16_FEW_CUH

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.cuh"

namespace tr
{
namespace few
{

/* A chunk: OUTS weight rows by 7 steps of 32 columns, 448 bytes a row: an odd number of half bank rows, so that the four lanes
 * of eight rows meet no bank twice. */
enum {
    ROWS = 8,
    WARPS = 8,
    THREADS = WARPS * 32,
    CHUNK_STEPS = 7,
    ROW_BYTES = CHUNK_STEPS * 64,
    STAGES = 3,
    PART_BYTES = 2 * WARPS * 32 * 16
};

struct product {
    const __nv_bfloat16 *x, *w;
    size_t ld_x, ld_y;
    void *y;
    int y_f32, n_max, n_out;
    const int32_t *n;
};

template <int OUTS> constexpr int shared_bytes()
{
    return WARPS * STAGES * (OUTS * ROW_BYTES + 8) + PART_BYTES;
}

/* A warp's ring: chunk i of its columns, of the tiles of the block one after the other. */
template <int STEPS, int OUTS> struct ring {
    enum { CHUNKS = STEPS / CHUNK_STEPS, K_WARP = STEPS * 32, CHUNK_BYTES = OUTS * ROW_BYTES };
    const product &p;
    uint8_t *memory;
    uint64_t *full;
    const __nv_bfloat16 *w; /* the warp's first column */
    uint64_t policy;
    int lane, n; /* chunks there are */
    ring_position<STAGES> at;

    __device__ __forceinline__ ring(const product &product, uint8_t *shared, int warp, int n_chunks)
        : p(product), lane((int)threadIdx.x % 32), n(n_chunks)
    {
        memory = shared + warp * STAGES * CHUNK_BYTES;
        full = (uint64_t *)(shared + WARPS * STAGES * CHUNK_BYTES) + warp * STAGES;
        w = p.w + warp * K_WARP;
        policy = policy_evict_first();
        if (lane == 0) {
            for (int i = 0; i < STAGES; i++)
                barrier_init(full + i, 1);
            barrier_init_fence();
        }
        __syncwarp();
        for (int i = 0; i < STAGES; i++)
            fetch(i, i);
    }
    __device__ __forceinline__ void fetch(int i, int stage)
    {
        if (i >= n) return;
        const int tile = (int)blockIdx.x + i / CHUNKS * (int)gridDim.x;
        if (lane == 0) barrier_expect(full + stage, CHUNK_BYTES);
        __syncwarp();
        if (lane < OUTS) {
            const int row = min(tile * OUTS + lane, p.n_out - 1);
            bulk_load(memory + stage * CHUNK_BYTES + lane * ROW_BYTES,
                      w + (size_t)row * (WARPS * K_WARP) + i % CHUNKS * (CHUNK_STEPS * 32),
                      ROW_BYTES, full + stage, policy);
        }
    }
};

/* Weights are the first operand of the instruction, its 16 (8) rows, and activations the second. */
template <int STEPS, int OUTS>
__global__ void __launch_bounds__(THREADS, 1) multiply_few(const __grid_constant__ product p)
{
    using weights = ring<STEPS, OUTS>;
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, step = (int)gridDim.x;
    float4 *part = (float4 *)(memory + WARPS * STAGES * (weights::CHUNK_BYTES + 8));
    const int n_tiles = (p.n_out + OUTS - 1) / OUTS,
              n_mine = (n_tiles - (int)blockIdx.x + step - 1) / step;
    weights ring(p, memory, warp, n_mine * weights::CHUNKS);

    early::follow();
    const int live = *p.n, n = live < p.n_max ? live : p.n_max;
    /* Rows past the last one are the last one again: nobody writes what they give. */
    const int row = max(min(lane / 4, n - 1), 0);
    const __nv_bfloat16 *from = p.x + (size_t)row * p.ld_x + warp * weights::K_WARP + lane % 4 * 8;
    uint4 x[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        x[k] = *(const uint4 *)(from + k * 32);

    for (int i = 0; i < n_mine; i++) {
        float sum[4] = {};
#pragma unroll
        for (int c = 0; c < weights::CHUNKS; c++) {
            const int stage = ring.at.stage;
            const uint8_t *w =
                ring.memory + stage * weights::CHUNK_BYTES + lane / 4 * ROW_BYTES + lane % 4 * 16;
            barrier_wait(ring.full + stage, ring.at.parity);
#pragma unroll
            for (int k = 0; k < CHUNK_STEPS; k++) {
                const uint4 lo = *(const uint4 *)(w + k * 64), v = x[c * CHUNK_STEPS + k];
                const uint4 hi = OUTS == 16 ? *(const uint4 *)(w + 8 * ROW_BYTES + k * 64)
                                            : make_uint4(0, 0, 0, 0);
                const uint32_t a0[4] = {lo.x, hi.x, lo.y, hi.y}, a1[4] = {lo.z, hi.z, lo.w, hi.w},
                               b0[2] = {v.x, v.y}, b1[2] = {v.z, v.w};
                multiply(sum, a0, b0, __nv_bfloat16());
                multiply(sum, a1, b1, __nv_bfloat16());
            }
            __syncwarp();
            ring.fetch(i * weights::CHUNKS + c + STAGES, stage);
            ring.at.next();
        }
        float4 *all = part + i % 2 * WARPS * 32 + lane;
        all[warp * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        __syncthreads();
        if (warp != i % WARPS) continue;
        float4 s = all[0]; /* warps ascending */
#pragma unroll
        for (int v = 1; v < WARPS; v++) {
            const float4 t = all[v * 32];
            s = make_float4(s.x + t.x, s.y + t.y, s.z + t.z, s.w + t.w);
        }
        const float of[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int j = 0; j < OUTS / 4; j++) {
            const int r = lane % 4 * 2 + j % 2,
                      o = ((int)blockIdx.x + i * step) * OUTS + lane / 4 + j / 2 * 8;
            if (r < n && o < p.n_out)
                write_number(p.y, (size_t)r * p.ld_y + (size_t)o, p.y_f32, of[j]);
        }
    }
}

} // namespace few
} // namespace tr

#endif
