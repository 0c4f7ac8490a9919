/* MLA in its multi-head form (model.md 3.4), for rows that see every key before them. A block of
 * threads takes up to 64 rows of one slot and one head. Keys come in blocks of 64 positions from
 * position 0, the pages of the cache; each block's k_nope and v are made from its latents on the
 * spot, as bf16. Every row runs its own online softmax over the blocks, so where a prompt was cut,
 * or which rows share a tile, cannot show. */
#include "kernels/cuda/gemm.cuh"
#include "kernels/limits.h"

namespace
{

enum {
    THREADS = 256,
    WARPS = 8,
    ROWS = 64,
    KEYS = 64,
    PAD = 8,
    CHUNK = 128, /* latents at a time: a scale block */
    BLOCK_ROWS = 8,
    D_HEAD_MAX = TR_CUDA_D_HEAD_MAX, /* d_nope + d_rope; d_nope + d_v */
    D_VALUE_MAX = TR_CUDA_D_VALUE_MAX,
    TILES = D_HEAD_MAX / 8 / WARPS,
};

struct shape {
    int d_q, d_v; /* padded to 16 */
    int ld_q, ld_v;
};

__host__ __device__ inline shape shape_of(const tr_dense_mha_args &a)
{
    shape s;
    s.d_q = (a.d_nope + a.d_rope + 15) / 16 * 16;
    s.d_v = (a.d_v + 15) / 16 * 16;
    s.ld_q = s.d_q + PAD;
    s.ld_v = s.d_v + PAD;
    return s;
}

size_t shared_bytes(const shape &s)
{
    return (size_t)(ROWS + KEYS) * (size_t)s.ld_q * 2 + (size_t)KEYS * (size_t)s.ld_v * 2 +
           KEYS * (CHUNK + PAD) * 2 + ROWS * (KEYS + PAD) * 2 + ROWS * (KEYS + 1) * 4 +
           3 * ROWS * 4;
}

struct weights { /* W_UK and W_UV of all heads */
    tr::product uk, uv;
};

/* w[o, k] and w[o, k + 1] of a row as bf16, e4m3 without its scale; 0 outside. */
__device__ __forceinline__ uint32_t pair_at(const tr::product &p, const uint8_t *row, int k)
{
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool here = row && k + i >= 0 && k + i < p.n_in;
        x[i] = !here                   ? 0.0f
               : p.format == TR_W_F32  ? ((const float *)row)[k + i]
               : p.format == TR_W_BF16 ? __bfloat162float(((const __nv_bfloat16 *)row)[k + i])
                                       : tr::from_e4m3(row[k + i]);
    }
    const __nv_bfloat162 two = __floats2bfloat162_rn(x[0], x[1]);
    return *(const uint32_t *)&two;
}

__device__ __forceinline__ float scale_at(const tr::product &p, int h, int o, int block)
{
    if (p.format != TR_W_E4M3_B128) return 1.0f;
    if (o >= p.n_out) return 0.0f;
    const tr_weight_head *head = p.head + h;
    const int s = head->n > 1 && o >= head->begin[1] ? 1 : 0;
    const int down = head->base[s] + (o - head->begin[s] + head->shift[s]) / 128;
    return p.scale[((size_t)h * (size_t)p.scale_rows + (size_t)down) * (size_t)p.scale_pitch +
                   (size_t)block];
}

/* k_nope and v of the first n keys of a page: latents in chunks through shared memory, weights
 * straight from memory as the second operand. Warp w makes outputs of tiles w, w + 8, .. of [k_nope
 * | v], 8 to a tile. Chunks are the weights' scale blocks, which both weights have alike: they are
 * pieces of one stored tensor. */
__device__ void make_keys(const tr_dense_mha_args &a, const weights &w, const shape &s, int h,
                          int page, int n, __nv_bfloat16 *latent, __nv_bfloat16 *key,
                          __nv_bfloat16 *value)
{
    const int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
    const size_t row_bytes = tr::kv_row_bytes(a.kv);
    const uint8_t *rows = (const uint8_t *)a.kv.latent + (size_t)page * TR_PAGE_TOKENS * row_bytes;
    const int n_nope = (a.d_nope + 7) / 8, n_tiles = n_nope + (a.d_v + 7) / 8;
    const int k_shift = w.uk.format == TR_W_E4M3_B128 ? w.uk.head[h].k_shift : 0;
    float acc[TILES][4][4] = {}; /* [tile][16 keys][..] */

    for (int b = 0, k0 = -k_shift; k0 < a.kv.d_latent; b++, k0 += CHUNK) {
        __syncthreads();
        for (int u = tid; u < KEYS * CHUNK; u += THREADS) {
            const int r = u / CHUNK, j = u % CHUNK, k = k0 + j;
            latent[r * (CHUNK + PAD) + j] =
                r < n && k >= 0 && k < a.kv.d_latent
                    ? tr::read_latent(a.kv, rows + (size_t)r * row_bytes, k)
                    : __float2bfloat16_rn(0.0f);
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const int tile = t * WARPS + warp;
            if (tile >= n_tiles) break;
            const tr::product &p = tile < n_nope ? w.uk : w.uv;
            const int o0 = (tile < n_nope ? tile : tile - n_nope) * 8, o = o0 + lane / 4;
            const uint8_t *row = o < p.n_out
                                     ? p.numbers + (size_t)h * p.matrix + (size_t)o * (size_t)p.ld_w
                                     : nullptr;
            float sum[4][4] = {};
            for (int k = 0; k < CHUNK; k += 16) {
                const int at = k0 + k + lane % 4 * 2;
                const uint32_t y[2] = {pair_at(p, row, at), pair_at(p, row, at + 8)};
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    uint32_t x[4];
                    tr::load_matrices(x, latent + (m * 16 + lane % 16) * (CHUNK + PAD) + k +
                                             lane / 16 * 8);
                    tr::multiply(sum[m], x, y, __nv_bfloat16());
                }
            }
            const float scale[2] = {scale_at(p, h, o0 + lane % 4 * 2, b),
                                    scale_at(p, h, o0 + lane % 4 * 2 + 1, b)};
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    acc[t][m][c] = __fmaf_rn(sum[m][c], scale[c % 2], acc[t][m][c]);
        }
    }
    for (int u = tid; u < KEYS * (s.d_q - a.d_nope); u += THREADS) { /* k_pe, and zeros behind it */
        const int r = u / (s.d_q - a.d_nope), j = u % (s.d_q - a.d_nope);
        key[r * s.ld_q + a.d_nope + j] =
            r < n && j < a.d_rope
                ? tr::read_latent(a.kv, rows + (size_t)r * row_bytes, a.kv.d_latent + j)
                : __float2bfloat16_rn(0.0f);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int tile = t * WARPS + warp;
        if (tile >= n_tiles) break;
        const bool nope = tile < n_nope;
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int r = m * 16 + lane / 4 + c / 2 * 8;
                const int o = (nope ? tile : tile - n_nope) * 8 + lane % 4 * 2 + c % 2;
                if (nope && o < a.d_nope) key[r * s.ld_q + o] = __float2bfloat16_rn(acc[t][m][c]);
                if (!nope && o < s.d_v) value[r * s.ld_v + o] = __float2bfloat16_rn(acc[t][m][c]);
            }
    }
    __syncthreads();
}

__device__ __forceinline__ bool is_live(const tr_rows &rows, int i, int n)
{
    return i < n && rows.dense[i] && !tr::is_pad(rows, i);
}

/* Row i goes on with what row i - 1 began: the next position, or, of a prompt that is dealt out to ranks, one a few further on. How
 * many; 0: it does not. */
__device__ __forceinline__ int follows(const tr_rows &rows, int i, int n)
{
    enum { FURTHEST = 64 };
    if (i == 0 || !is_live(rows, i - 1, n) || !is_live(rows, i, n) ||
        rows.slot[i] != rows.slot[i - 1])
        return 0;
    const int step = rows.position[i] - rows.position[i - 1];
    return step >= 1 && step <= FURTHEST ? step : 0;
}

/* A tile begins with a run, and wherever 64 rows of its steps end: with all positions at every multiple of 64. */
__device__ __forceinline__ bool begins(const tr_rows &rows, int i, int n)
{
    const int span = ROWS * follows(rows, i, n);
    return span == 0 || rows.position[i] / span != rows.position[i - 1] / span;
}

/* How many rows the tile that begins with row i has; 0: none does. More than 64 only where steps differ. */
__device__ int tile_rows(const tr_rows &rows, int i, int n)
{
    if (!begins(rows, i, n)) return 0;
    int end = i + 1;
    while (end < n && !begins(rows, end, n))
        end++;
    return end - i;
}

/* Head h of the n rows from row i on. */
__device__ void tile_attention(const tr_dense_mha_args &a, const tr_rows &rows, const weights &w,
                               int i, int n, int h)
{
    extern __shared__ __align__(16) unsigned char memory[];
    const int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
    const shape s = shape_of(a);
    __nv_bfloat16 *q = (__nv_bfloat16 *)memory, *key = q + ROWS * s.ld_q,
                  *value = key + KEYS * s.ld_q, *latent = value + KEYS * s.ld_v,
                  *p = latent + KEYS * (CHUNK + PAD);
    float *score = (float *)(p + ROWS * (KEYS + PAD)), *top = score + ROWS * (KEYS + 1),
          *sum = top + ROWS, *keep = sum + ROWS;
    const int d_q = a.d_nope + a.d_rope, last = rows.position[i + n - 1];
    const int32_t *pages = rows.page_table + (size_t)rows.slot[i] * (size_t)rows.max_pages;
    for (int u = tid; u < ROWS * s.d_q; u += THREADS) {
        const int r = u / s.d_q, j = u % s.d_q;
        const size_t at =
            ((size_t)(i + r) * (size_t)a.n_heads + (size_t)h) * (size_t)d_q + (size_t)j;
        q[r * s.ld_q + j] = r < n && j < d_q ? tr::act(a.q)[at] : __float2bfloat16_rn(0.0f);
    }
    for (int u = tid; u < KEYS * (s.d_v - a.d_v);
         u += THREADS) /* behind v: products with zeros, never stored */
        value[u / (s.d_v - a.d_v) * s.ld_v + a.d_v + u % (s.d_v - a.d_v)] =
            __float2bfloat16_rn(0.0f);
    if (tid < ROWS) {
        top[tid] = -CUDART_INF_F;
        sum[tid] = 0;
    }

    /* Scores and outputs: warp w has rows [w % 4 * 16, ..) and one half of the keys, of the
     * values. */
    const int m = warp % 4, side = warp / 4, half_v = (s.d_v / 16 + 1) / 2;
    float out[D_HEAD_MAX / 2 / 32][2][4] = {};
    for (int s0 = 0; s0 <= last; s0 += KEYS) {
        make_keys(a, w, s, h, pages[s0 / TR_PAGE_TOKENS], min(last + 1 - s0, (int)KEYS), latent,
                  key, value);
        float acc[4][4] = {};
        for (int k = 0; k < s.d_q; k += 16) {
            uint32_t x[4];
            tr::load_matrices(x, q + (m * 16 + lane % 16) * s.ld_q + k + lane / 16 * 8);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                uint32_t y[4];
                tr::load_matrices(y, key +
                                         (side * 32 + t * 16 + lane / 16 * 8 + lane % 8) * s.ld_q +
                                         k + lane / 8 % 2 * 8);
                tr::multiply(acc[2 * t], x, y, __nv_bfloat16());
                tr::multiply(acc[2 * t + 1], x, y + 2, __nv_bfloat16());
            }
        }
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                score[(m * 16 + lane / 4 + c / 2 * 8) * (KEYS + 1) + side * 32 + t * 8 +
                      lane % 4 * 2 + c % 2] = acc[t][c] * a.scale;
        __syncthreads();
        for (int r = warp; r < ROWS; r += WARPS) { /* row r sees keys up to its own position */
            const int seen = r < n ? rows.position[i + r] + 1 - s0 : 0;
            const float x0 = lane < seen ? score[r * (KEYS + 1) + lane] : -CUDART_INF_F;
            const float x1 = lane + 32 < seen ? score[r * (KEYS + 1) + lane + 32] : -CUDART_INF_F;
            const float old = top[r];
            const float now = fmaxf(old, tr::warp_reduce<float, tr::larger<float>>(fmaxf(x0, x1)));
            const float base = now == -CUDART_INF_F ? 0.0f : now;
            const float p0 = expf(x0 - base), p1 = expf(x1 - base);
            const float here = tr::warp_reduce<float, tr::add<float>>(p0 + p1);
            p[r * (KEYS + PAD) + lane] = __float2bfloat16_rn(p0);
            p[r * (KEYS + PAD) + lane + 32] = __float2bfloat16_rn(p1);
            __syncwarp();
            if (lane == 0) {
                const float k = old == -CUDART_INF_F ? 0.0f : expf(old - now);
                keep[r] = k;
                sum[r] = sum[r] * k + here;
                top[r] = now;
            }
        }
        __syncthreads();
        const float keep_low = keep[m * 16 + lane / 4], keep_high = keep[m * 16 + lane / 4 + 8];
#pragma unroll
        for (int t = 0; t < D_HEAD_MAX / 2 / 32; t++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                out[t][0][c] *= c < 2 ? keep_low : keep_high;
                out[t][1][c] *= c < 2 ? keep_low : keep_high;
            }
        for (int k = 0; k < KEYS; k += 16) {
            uint32_t x[4];
            tr::load_matrices(x, p + (m * 16 + lane % 16) * (KEYS + PAD) + k + lane / 16 * 8);
#pragma unroll
            for (int t = 0; t < D_HEAD_MAX / 2 / 32; t++) {
                const int tile = side * half_v + t;
                if (t >= half_v || tile >= s.d_v / 16) break;
                uint32_t y[4];
                tr::load_transposed(y,
                                    value + (k + lane % 16) * s.ld_v + tile * 16 + lane / 16 * 8);
                tr::multiply(out[t][0], x, y, __nv_bfloat16());
                tr::multiply(out[t][1], x, y + 2, __nv_bfloat16());
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < D_HEAD_MAX / 2 / 32; t++)
#pragma unroll
        for (int u = 0; u < 2; u++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int r = m * 16 + lane / 4 + c / 2 * 8;
                const int j = (side * half_v + t) * 16 + u * 8 + lane % 4 * 2 + c % 2;
                if (r >= n || t >= half_v || j >= a.d_v) continue;
                tr::act(a.out)[((size_t)(i + r) * (size_t)a.n_heads + (size_t)h) * (size_t)a.d_v +
                               (size_t)j] =
                    __float2bfloat16_rn(sum[r] == 0.0f ? 0.0f : out[t][u][c] * (1.0f / sum[r]));
            }
    __syncthreads();
}

/* The tiles that begin in a few rows, which is mostly one or none. */
__global__ void __launch_bounds__(THREADS)
    dense_mha(const __grid_constant__ tr_dense_mha_args a, const __grid_constant__ tr_rows rows,
              const __grid_constant__ weights w)
{
    const int n = tr::live_rows(rows.n, rows.n_max), h = (int)blockIdx.y;
    for (int i = (int)blockIdx.x * BLOCK_ROWS; i < min(n, ((int)blockIdx.x + 1) * BLOCK_ROWS);
         i++) {
        if (!rows.dense[i]) continue;
        if (tr::is_pad(rows, i)) { /* sees nothing */
            for (int j = (int)threadIdx.x; j < a.d_v; j += THREADS)
                tr::act(a.out)[((size_t)i * (size_t)a.n_heads + (size_t)h) * (size_t)a.d_v +
                               (size_t)j] = __float2bfloat16_rn(0.0f);
            continue;
        }
        const int n_tile = tile_rows(rows, i, n);
        for (int at = 0; at < n_tile; at += ROWS)
            tile_attention(a, rows, w, i + at, min(n_tile - at, (int)ROWS), h);
    }
}

} // namespace

cudaError_t tr_cuda_dense_mha_open(void);

cudaError_t tr_cuda_dense_mha_open(void)
{
    tr_dense_mha_args most = {};
    most.d_nope = D_HEAD_MAX;
    most.d_v = D_VALUE_MAX;
    return cudaFuncSetAttribute(dense_mha, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)shared_bytes(shape_of(most)));
}

cudaError_t tr_cuda_dense_mha(const struct tr_dense_mha_args *a, cudaStream_t stream)
{
    weights w = {};
    if (a->d_rope != a->kv.d_rope || a->d_nope + a->d_rope > D_HEAD_MAX ||
        a->d_nope + a->d_v > D_HEAD_MAX || a->d_v > D_VALUE_MAX || a->latents.n)
        return cudaErrorInvalidValue;
    if (a->rows->n_max <= 0) return cudaSuccess;
    tr::product_weight(&w.uk, a->w_uk);
    tr::product_weight(&w.uv, a->w_uv);
    const dim3 grid(tr::blocks_for((size_t)a->rows->n_max, BLOCK_ROWS), (unsigned)a->n_heads);
    dense_mha<<<grid, THREADS, shared_bytes(shape_of(*a)), stream>>>(*a, *a->rows, w);
    return cudaGetLastError();
}
