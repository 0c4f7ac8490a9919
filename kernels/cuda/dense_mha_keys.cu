/* Keys and values of all heads from cached latents: [128 positions, 512] x [512, 256 of a head], bf16 into fp32, out as bf16.
 * A block of threads brings the latents of 128 positions into shared memory once, as bf16, and takes the weights of up to 16
 * heads past them, in tiles of 64 of the inner dimension through a ring. */
#include "kernels/cuda/dense_mha_hopper.cuh"

namespace tr
{
namespace dense
{

enum { STAGES = 3, STAGE = D_KV * 128, K_TILES = TR_DENSE_D_LATENT / 64, MATH = 256 };

struct keys_shared { /* behind the latents [8 tiles] and the stages */
    uint64_t full[STAGES], empty[STAGES];
};
enum { KEYS_BYTES = K_TILES * CHUNK + STAGES * STAGE + (int)sizeof(keys_shared) + 1024 };

__device__ __forceinline__ void store16(uint32_t smem, uint4 v)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

/* 8 e4m3 times a power of two, exactly. */
__device__ __forceinline__ uint4 expand8(uint2 v, float scale)
{
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        __nv_fp8x2_storage_t two = (__nv_fp8x2_storage_t)((i < 2 ? v.x : v.y) >> (i & 1) * 16);
        float2 f = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
        x[i] = pack_bf16(f.x * scale, f.y * scale);
    }
    return {x[0], x[1], x[2], x[3]};
}

/* Latents of positions [first, first + 128) of a span's slot into swizzled tiles; zeros past its context. The rope part goes
 * to the workspace as it is. By the threads that compute. */
__device__ __forceinline__ void load_latents(const job &j, const span &s, int first, uint32_t tiles,
                                             bool with_pe)
{
    const bool fp8 = j.kv.dtype == TR_E4M3;
    const int32_t *pages = j.rows.page_table + (size_t)s.slot * (size_t)j.rows.max_pages;
    int context = tr_dense_seen(&s, s.n);

#pragma unroll 4
    for (int i = (int)threadIdx.x; i < BLOCK_KEYS * 64; i += MATH) { /* 8 numbers each */
        int row = i / 64, unit = i % 64, at = first + row;
        uint4 v = {0, 0, 0, 0};
        if (at < context) {
            size_t record =
                (size_t)pages[at / TR_PAGE_TOKENS] * TR_PAGE_TOKENS + at % TR_PAGE_TOKENS;
            const uint8_t *p = (const uint8_t *)j.kv.latent + record * (fp8 ? 656 : 1152);
            v = fp8 ? expand8(*(const uint2 *)(const void *)(p + 8 * unit),
                              *(const float *)(const void *)(p + 512 + unit / 16 * 4))
                    : *(const uint4 *)(const void *)(p + 16 * unit);
        }
        store16(tiles + (uint32_t)(unit / 8 * CHUNK + row * 128 + ((unit % 8 ^ (row & 7)) << 4)),
                v);
    }
    for (int i = (int)threadIdx.x; with_pe && i < BLOCK_KEYS * 8; i += MATH) {
        int row = i / 8, unit = i % 8, at = first + row;
        uint4 v = {0, 0, 0, 0};
        if (at < context) {
            size_t record =
                (size_t)pages[at / TR_PAGE_TOKENS] * TR_PAGE_TOKENS + at % TR_PAGE_TOKENS;
            v = *(const uint4 *)(const void *)((const uint8_t *)j.kv.latent +
                                               record * (fp8 ? 656 : 1152) + (fp8 ? 528 : 1024) +
                                               16 * unit);
        }
        ((uint4 *)(void *)(j.pe + (size_t)(s.base + first) * 128))[i] = v;
    }
}

/* Warpgroup wg: keys [64 wg, ..) of the block, head after head. */
__device__ __forceinline__ void keys_math(const job &j, keys_shared *sh, uint32_t tiles, int key,
                                          int head0, int head1)
{
    int wg = (int)threadIdx.x / 128, t = (int)threadIdx.x % 128;
    uint64_t a = matrix_descriptor(tiles + (uint32_t)(wg * 64 * 128), 16, 1024, LAYOUT_SWIZZLE_128);
    uint64_t b = matrix_descriptor(tiles + K_TILES * CHUNK, 16, 1024, LAYOUT_SWIZZLE_128);
    const float one[2] = {1.0f, 1.0f};
    ring_position<STAGES> at;

    for (int head = head0; head < head1; head++) {
        float x[2][64];
        for (int c = 0; c < K_TILES; c++, at.next()) {
            barrier_wait(&sh->full[at.stage], at.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int n = 0; n < 2; n++)
                    mma_rows(x[n], a + (uint32_t)(c * CHUNK / 16 + k * 2),
                             b + (uint32_t)(at.stage * STAGE / 16 + n * (CHUNK / 16) + k * 2),
                             c + k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            barrier_arrive_warp(&sh->empty[at.stage], threadIdx.x % 32);
        }
#pragma unroll
        for (int i = 0; i < 128; i++)
            wgmma_touch(x[i / 64][i % 64]);
        uint8_t *to = j.kv_new + ((size_t)head * (size_t)j.max_keys + (size_t)(key + wg * 64) +
                                  (size_t)(t / 32 * 16 + t % 32 / 4)) *
                                     (D_KV * 2);
        store_rows(to, 8 * D_KV * 2, x[0], one, true, true);
        store_rows(to + 256, 8 * D_KV * 2, x[1], one, true, true);
    }
}

/* Block (i, g): the i-th block of keys of the round, the g-th group of heads. */
__global__ void __launch_bounds__(MATH + 128, 1)
    dense_keys(const __grid_constant__ job j, const __grid_constant__ CUtensorMap weights)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    keys_shared *sh = (keys_shared *)(base + K_TILES * CHUNK + STAGES * STAGE);
    int i = j.plan->block_begin[j.i_round] + (int)blockIdx.x;
    int head0 = (int)blockIdx.y * j.group_heads, head1 = min(head0 + j.group_heads, j.n_heads);

    if (i >= j.plan->block_begin[j.i_round + 1]) return;
    tile b = j.blocks[i];
    span s = j.spans[b.i_span];
    if (threadIdx.x == 0) {
        for (int k = 0; k < STAGES; k++) {
            barrier_init(&sh->full[k], 1);
            barrier_init(&sh->empty[k], MATH / 32 * WARP_ARRIVALS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < MATH) {
        registers_raise<208>();
        load_latents(j, s, b.first, smem_address(base), blockIdx.y == 0);
        fence_async_shared();
        named_barrier(1, MATH);
        keys_math(j, sh, smem_address(base), s.base + b.first, head0, head1);
    } else {
        registers_lower<40>();
        if (threadIdx.x == MATH) {
            ring_position<STAGES> at;
            for (int c = 0; c < (head1 - head0) * K_TILES; c++, at.next()) {
                barrier_wait(&sh->empty[at.stage], at.parity ^ 1);
                barrier_expect(&sh->full[at.stage], STAGE);
                tensor_load(base + K_TILES * CHUNK + at.stage * STAGE, &weights, c % K_TILES * 64,
                            (head0 + c / K_TILES) * D_KV, 0, &sh->full[at.stage]);
            }
        }
    }
}

cudaError_t launch_keys(const job &j, const void *w_kv, int n_blocks, cudaStream_t stream)
{
    CUtensorMap map;
    cudaError_t e =
        make_map(&map, w_kv, {TR_DENSE_D_LATENT, (uint64_t)j.n_heads * D_KV, 1},
                 {TR_DENSE_D_LATENT * 2, (uint64_t)j.n_heads * D_KV * 1024}, {64, D_KV, 1});
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(dense_keys, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 KEYS_BYTES);
    if (e != cudaSuccess) return e;
    dim3 grid((unsigned)n_blocks, (unsigned)((j.n_heads + j.group_heads - 1) / j.group_heads));
    dense_keys<<<grid, MATH + 128, KEYS_BYTES, stream>>>(j, map);
    return cudaGetLastError();
}

} // namespace dense
} // namespace tr
