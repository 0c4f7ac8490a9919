/* Attention of absorbed rows over the keys their lists name (model.md 3.4, 4.6): any widths, any
 * number of heads. A block of threads takes 16 heads of a row. Keys come 64 at a time, expanded to
 * bf16; softmax in fp32, probabilities meet the keys as bf16. */
#include "kernels/cuda/common.cuh"
#include "kernels/limits.h"

namespace
{

enum {
    THREADS = 128,
    WARPS = THREADS / 32,
    HEADS = 16,
    KEYS = 64,
    PAD = 8,
    D_MAX = TR_CUDA_D_LATENT_MAX
};

struct shape {
    int d_key, d_latent; /* padded to 16, zeros behind */
    int ld;
};

__host__ __device__ inline shape shape_of(const tr_kv_layer &kv)
{
    shape s;
    s.d_key = (kv.d_latent + kv.d_rope + 15) / 16 * 16;
    s.d_latent = (kv.d_latent + 15) / 16 * 16;
    s.ld = s.d_key + PAD;
    return s;
}

size_t shared_bytes(const shape &s)
{
    return (size_t)(HEADS + KEYS) * (size_t)s.ld * 2 + HEADS * (KEYS + PAD) * 2 +
           HEADS * (KEYS + 1) * 4 + 3 * HEADS * 4 + KEYS * 4 + 64;
}

/* The next keys of the list: their rows to row[], how many. One warp; entries that name no cache
 * row are passed over. */
__device__ int next_rows(const int32_t *list, int k, int64_t n_cache, int *at, int32_t *row)
{
    const int lane = (int)threadIdx.x % 32;
    int n = 0;
    while (*at < k && n + 32 <= KEYS) {
        const int i = *at + lane;
        const int32_t r = i < k ? list[i] : -1;
        const bool good = r >= 0 && r < n_cache;
        const unsigned mask = __ballot_sync(0xffffffffu, good);
        if (good) row[n + __popc(mask & ((1u << lane) - 1))] = r;
        n += __popc(mask);
        *at += 32;
    }
    return n;
}

__global__ void __launch_bounds__(THREADS)
    sparse_mla(const __grid_constant__ tr_sparse_mla_args a, const __grid_constant__ tr_rows rows)
{
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ int n_keys_shared;
    const shape s = shape_of(a.kv);
    __nv_bfloat16 *q = (__nv_bfloat16 *)memory, *key = q + HEADS * s.ld, *p = key + KEYS * s.ld;
    float *score = (float *)(p + HEADS * (KEYS + PAD)), *top = score + HEADS * (KEYS + 1),
          *sum = top + HEADS, *keep = sum + HEADS;
    int32_t *cache_row = (int32_t *)(keep + HEADS);
    const int i = (int)blockIdx.x, h0 = (int)blockIdx.y * HEADS,
              n_heads = min(a.n_heads - h0, (int)HEADS);
    if (i >= tr::live_rows(rows.n, rows.n_max) || rows.dense[i]) return;

    const int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32,
              d_key = a.kv.d_latent + a.kv.d_rope;
    const size_t first = (size_t)i * (size_t)a.n_heads + (size_t)h0,
                 row_bytes = tr::kv_row_bytes(a.kv);
    for (int u = tid; u < HEADS * s.d_key; u += THREADS) {
        const int h = u / s.d_key, j = u % s.d_key;
        q[h * s.ld + j] = h < n_heads && j < d_key
                              ? tr::act(a.q)[(first + (size_t)h) * (size_t)d_key + (size_t)j]
                              : __float2bfloat16_rn(0.0f);
    }
    if (tid < HEADS) {
        top[tid] = -CUDART_INF_F;
        sum[tid] = 0;
    }

    /* Warp w: outputs [w, w + 1) quarters of the latent, in tiles of 16. */
    enum { TILES = D_MAX / 16 / WARPS };
    float out[TILES][2][4] = {};
    const int n_tiles = s.d_latent / 16;
    const int32_t *list = a.cache_row + (size_t)i * (size_t)a.k;
    for (int at = 0;;) {
        if (warp == 0) {
            const int n =
                next_rows(list, a.k, (int64_t)a.kv.n_pages * TR_PAGE_TOKENS, &at, cache_row);
            if (lane == 0) n_keys_shared = at >= a.k ? n | 0x10000 : n;
        }
        __syncthreads();
        const int n_keys = n_keys_shared & 0xffff, last = n_keys_shared >> 16;
        if (n_keys == 0) {
            if (last) break;
            __syncthreads();
            continue;
        }
        for (int u = tid; u < KEYS * s.d_key; u += THREADS) {
            const int r = u / s.d_key, j = u % s.d_key;
            key[r * s.ld + j] =
                r < n_keys && j < d_key
                    ? tr::read_latent(
                          a.kv, (const uint8_t *)a.kv.latent + (size_t)cache_row[r] * row_bytes, j)
                    : __float2bfloat16_rn(0.0f);
        }
        __syncthreads();

        float acc[2][4] = {}; /* 16 heads by this warp's 16 keys */
        for (int k = 0; k < s.d_key; k += 16) {
            uint32_t x[4], y[4];
            tr::load_matrices(x, q + lane % 16 * s.ld + k + lane / 16 * 8);
            tr::load_matrices(y, key + (warp * 16 + lane / 16 * 8 + lane % 8) * s.ld + k +
                                     lane / 8 % 2 * 8);
            tr::multiply(acc[0], x, y, __nv_bfloat16());
            tr::multiply(acc[1], x, y + 2, __nv_bfloat16());
        }
        for (int n = 0; n < 2; n++)
            for (int c = 0; c < 4; c++)
                score[(lane / 4 + c / 2 * 8) * (KEYS + 1) + warp * 16 + n * 8 + lane % 4 * 2 +
                      c % 2] = acc[n][c] * a.scale;
        __syncthreads();
        for (int h = warp; h < HEADS; h += WARPS) { /* a lane has keys lane and lane + 32 */
            const float s0 = lane < n_keys ? score[h * (KEYS + 1) + lane] : -CUDART_INF_F;
            const float s1 = lane + 32 < n_keys ? score[h * (KEYS + 1) + lane + 32] : -CUDART_INF_F;
            const float old = top[h];
            const float now = fmaxf(old, tr::warp_reduce<float, tr::larger<float>>(fmaxf(s0, s1)));
            const float base = now == -CUDART_INF_F ? 0.0f : now; /* nothing but -inf: weights 0 */
            const float p0 = expf(s0 - base), p1 = expf(s1 - base);
            const float here = tr::warp_reduce<float, tr::add<float>>(p0 + p1);
            p[h * (KEYS + PAD) + lane] = __float2bfloat16_rn(p0);
            p[h * (KEYS + PAD) + lane + 32] = __float2bfloat16_rn(p1);
            __syncwarp();
            if (lane == 0) {
                const float k = old == -CUDART_INF_F ? 0.0f : expf(old - now);
                keep[h] = k;
                sum[h] = sum[h] * k + here;
                top[h] = now;
            }
        }
        __syncthreads();
        const float keep_low = keep[lane / 4], keep_high = keep[lane / 4 + 8];
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                out[t][n][0] *= keep_low;
                out[t][n][1] *= keep_low;
                out[t][n][2] *= keep_high;
                out[t][n][3] *= keep_high;
            }
        for (int k = 0; k < KEYS; k += 16) {
            uint32_t x[4];
            tr::load_matrices(x, p + lane % 16 * (KEYS + PAD) + k + lane / 16 * 8);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int tile = t * WARPS + warp;
                if (tile >= n_tiles) break;
                uint32_t y[4]; /* keys k.. by latents: transposed */
                tr::load_transposed(y, key + (k + lane % 16) * s.ld + tile * 16 + lane / 16 * 8);
                tr::multiply(out[t][0], x, y, __nv_bfloat16());
                tr::multiply(out[t][1], x, y + 2, __nv_bfloat16());
            }
        }
        __syncthreads();
        if (last) break;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int h = lane / 4 + c / 2 * 8,
                          j = (t * WARPS + warp) * 16 + n * 8 + lane % 4 * 2 + c % 2;
                if (h >= n_heads || j >= a.kv.d_latent) continue;
                tr::act(a.out)[(first + (size_t)h) * (size_t)a.kv.d_latent + (size_t)j] =
                    __float2bfloat16_rn(sum[h] == 0.0f ? 0.0f : out[t][n][c] * (1.0f / sum[h]));
            }
    if (a.lse && tid < n_heads) a.lse[first + (size_t)tid] = top[tid] + logf(sum[tid]);
}

} // namespace

cudaError_t tr_cuda_sparse_mla_any(const struct tr_sparse_mla_args *a, cudaStream_t stream)
{
    const shape s = shape_of(a->kv);
    if (s.d_latent > D_MAX || s.d_key > TR_CUDA_D_KEY_MAX || a->latents.n)
        return cudaErrorInvalidValue;
    if (a->rows->n_max <= 0) return cudaSuccess;
    const dim3 grid((unsigned)a->rows->n_max, tr::blocks_for((size_t)a->n_heads, HEADS));
    sparse_mla<<<grid, THREADS, shared_bytes(s), stream>>>(*a, *a->rows);
    return cudaGetLastError();
}

cudaError_t tr_cuda_dense_mha_open(void);

cudaError_t tr_cuda_attention_open(void)
{
    tr_kv_layer most = {};
    most.d_latent = D_MAX;
    most.d_rope = TR_CUDA_D_KEY_MAX - D_MAX;
    const cudaError_t e = cudaFuncSetAttribute(
        sparse_mla, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes(shape_of(most)));
    return e == cudaSuccess ? tr_cuda_dense_mha_open() : e;
}
