#include "kernels/cuda/gemm.cuh"

namespace tr
{

namespace
{

enum { THREADS = 128, K = 128, PAD = 8, LD = K + PAD, CHUNK = 16, CHUNKS = TILE_ROWS * K / CHUNK };
static_assert(TILE_ROWS == TILE_COLUMNS, "both tiles are loaded alike");

struct tile {
    int matrix, row, rows; /* rows [row, row + rows) of the input list */
    int column;            /* first output */
    int k_shift, pieces;
    int begin[2], shift[2], base[2];
};

/* Two e4m3 codes to two fp16 numbers, exact. */
__device__ __forceinline__ uint32_t expand_half(uint32_t two)
{
    const __half2_raw h =
        __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(two & 0xffffu), __NV_E4M3);
    return (uint32_t)h.x | (uint32_t)h.y << 16;
}
/* ... and to bf16, exact too. */
__device__ __forceinline__ uint32_t expand_bf16(uint32_t two)
{
    const __half2_raw h =
        __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(two & 0xffffu), __NV_E4M3);
    const __nv_bfloat162 b = __float22bfloat162_rn(__half22float2(__half2(h)));
    return *(const uint32_t *)&b;
}

template <class T> __device__ __forceinline__ uint32_t expand(uint32_t two);
template <> __device__ __forceinline__ uint32_t expand<__half>(uint32_t two)
{
    return expand_half(two);
}
template <> __device__ __forceinline__ uint32_t expand<__nv_bfloat16>(uint32_t two)
{
    return expand_bf16(two);
}

/* 16 codes as 16-bit numbers to shared memory. */
template <class T> __device__ __forceinline__ void put_codes(T *to, uint4 codes)
{
    const uint32_t c[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t r[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r[2 * i] = expand<T>(c[i]);
        r[2 * i + 1] = expand<T>(c[i] >> 16);
    }
    ((uint4 *)to)[0] = make_uint4(r[0], r[1], r[2], r[3]);
    ((uint4 *)to)[1] = make_uint4(r[4], r[5], r[6], r[7]);
}

/* 16 bytes of a row, columns [k, k + 16) of n_in; what lies outside is zero. */
__device__ __forceinline__ uint4 read_codes(const uint8_t *row, int k, int n_in)
{
    if (k >= 0 && k + CHUNK <= n_in && ((uintptr_t)(row + k) & 15) == 0)
        return __ldg((const uint4 *)(row + k));
    uint32_t c[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        if (k + i >= 0 && k + i < n_in) c[i / 4] |= (uint32_t)row[k + i] << (8 * (i % 4));
    return make_uint4(c[0], c[1], c[2], c[3]);
}

/* 16 numbers of a bf16 row of weights, and of a row of the input from number `row` of x on. */
__device__ __forceinline__ void put_bf16(__nv_bfloat16 *to, const uint8_t *bytes, int k, int n_in)
{
    const __nv_bfloat16 *row = (const __nv_bfloat16 *)bytes;
    if (k + CHUNK <= n_in) { /* rows begin at multiples of 16 bytes, and k_shift is 0 */
        ((uint4 *)to)[0] = __ldg((const uint4 *)(row + k));
        ((uint4 *)to)[1] = __ldg((const uint4 *)(row + k) + 1);
        return;
    }
    for (int i = 0; i < CHUNK; i++)
        to[i] = k + i < n_in ? row[k + i] : __float2bfloat16_rn(0.0f);
}
__device__ __forceinline__ void put_input(__nv_bfloat16 *to, const product &p, size_t row, int k)
{
    const __nv_bfloat16 *x = (const __nv_bfloat16 *)p.x + row + k;
    if (!p.x_f32 && k >= 0 && k + CHUNK <= p.n_in && ((uintptr_t)x & 15) == 0) {
        ((uint4 *)to)[0] = *(const uint4 *)x;
        ((uint4 *)to)[1] = *((const uint4 *)x + 1);
        return;
    }
    for (int i = 0; i < CHUNK; i++)
        to[i] = __float2bfloat16_rn(
            k + i >= 0 && k + i < p.n_in ? read_number(p.x, row + (size_t)(k + i), p.x_f32) : 0.0f);
}

/* Which rows and outputs this block takes; 0: none. */
__device__ __forceinline__ int find_tile(const product &p, tile *t)
{
    t->column = (int)blockIdx.x * TILE_COLUMNS;
    if (p.tiles) {
        if ((int)blockIdx.y >= *p.n_tiles) return 0;
        const int2 which = p.tiles[blockIdx.y];
        t->matrix = which.x;
        t->row = which.y;
        t->rows = min(p.start[which.x + 1] - which.y, (int)TILE_ROWS);
    } else {
        t->matrix = (int)blockIdx.z;
        t->row = (int)blockIdx.y * TILE_ROWS;
        t->rows = min(live_rows(p.n, p.n_max) - t->row, (int)TILE_ROWS);
    }
    return t->rows > 0;
}

__device__ __forceinline__ size_t input_row(const product &p, int i)
{
    return (size_t)(p.row_index ? p.row_index[i] / p.row_div : i);
}

__device__ __forceinline__ void write_tile(const product &p, const tile &t, int r, int column,
                                           float value)
{
    const int i = t.row + r;
    if (r >= t.rows || column >= p.n_out || (p.skip && p.skip[i])) return;
    const size_t to = (size_t)(p.out_index ? p.out_index[i] : i);
    write_number(p.y, to * p.ld_y + (size_t)t.matrix * p.y_step + (size_t)column, p.y_f32, value);
}

/* T: __half where both sides are e4m3, else bf16. W8: w is e4m3. A8: so is the input. */
template <class T, bool W8, bool A8>
__global__ void __launch_bounds__(THREADS, 4) product_mma(const __grid_constant__ product p)
{
    __shared__ __align__(16) T a_tile[TILE_ROWS * LD];
    __shared__ __align__(16) T w_tile[TILE_COLUMNS * LD];
    __shared__ float a_scale[TILE_ROWS], w_scale[TILE_COLUMNS];
    tile t;
    if (!find_tile(p, &t)) return;

    const tr_weight_head *head = p.head + t.matrix;
    const int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int k_shift = W8 ? head->k_shift : 0, n_m = (t.rows + 15) / 16;
    const uint8_t *numbers = p.numbers + (size_t)t.matrix * p.matrix;
    const size_t x0 = (size_t)t.matrix * p.x_step;

    /* The scale row of this thread's output. */
    const float *scale_row = nullptr;
    if (W8 && tid < TILE_COLUMNS && t.column + tid < p.n_out) {
        const int o = t.column + tid, s = head->n > 1 && o >= head->begin[1] ? 1 : 0;
        const int row = head->base[s] + (o - head->begin[s] + head->shift[s]) / 128;
        scale_row = p.scale +
                    ((size_t)t.matrix * (size_t)p.scale_rows + (size_t)row) * (size_t)p.scale_pitch;
    }

    float total[4][2][4] = {};
    for (int b = 0; b < p.blocks; b++) {
        const int k0 = b * K - k_shift;
        if (k0 >= p.n_in) break;
        for (int c = tid; c < CHUNKS; c += THREADS) {
            const int r = c / (K / CHUNK), j = c % (K / CHUNK) * CHUNK, o = t.column + r;
            T *to = w_tile + r * LD + j;
            if (W8) {
                put_codes<T>(to, o < p.n_out ? read_codes(numbers + (size_t)o * (size_t)p.ld_w,
                                                          k0 + j, p.n_in)
                                             : make_uint4(0, 0, 0, 0));
            } else if (o < p.n_out) {
                put_bf16((__nv_bfloat16 *)to, numbers + (size_t)o * (size_t)p.ld_w, k0 + j, p.n_in);
            } else {
                ((uint4 *)to)[0] = ((uint4 *)to)[1] = make_uint4(0, 0, 0, 0);
            }
        }
        for (int c = tid; c < n_m * 16 * (K / CHUNK); c += THREADS) {
            const int r = c / (K / CHUNK), j = c % (K / CHUNK) * CHUNK;
            T *to = a_tile + r * LD + j;
            if (r >= t.rows)
                ((uint4 *)to)[0] = ((uint4 *)to)[1] = make_uint4(0, 0, 0, 0);
            else if (A8)
                put_codes<T>(to, *(const uint4 *)(p.q +
                                                  input_row(p, t.row + r) * (size_t)(p.blocks * K) +
                                                  (size_t)(b * K + j)));
            else
                put_input((__nv_bfloat16 *)to, p, x0 + input_row(p, t.row + r) * p.ld_x, k0 + j);
        }
        if (W8 && tid < TILE_COLUMNS) w_scale[tid] = scale_row ? scale_row[b] : 0.0f;
        if (A8 && tid < t.rows)
            a_scale[tid] = p.q_scale[(size_t)b * (size_t)p.ld_q_scale + input_row(p, t.row + tid)];
        __syncthreads();

        float sum[4][2][4] = {};
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            uint32_t w[4];
            load_matrices(w, w_tile + (warp * 16 + lane / 16 * 8 + lane % 8) * LD + k +
                                 lane / 8 % 2 * 8);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                if (m >= n_m) break;
                uint32_t a[4];
                load_matrices(a, a_tile + (m * 16 + lane % 16) * LD + k + lane / 16 * 8);
                multiply(sum[m][0], a, w, T());
                multiply(sum[m][1], a, w + 2, T());
            }
        }
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float sw = W8 ? w_scale[warp * 16 + n * 8 + lane % 4 * 2 + i % 2] : 1.0f;
                    const float sa = A8 ? a_scale[m * 16 + lane / 4 + i / 2 * 8] : 1.0f;
                    total[m][n][i] = __fmaf_rn(sum[m][n][i], A8 ? sa * sw : sw, total[m][n][i]);
                }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                write_tile(p, t, m * 16 + lane / 4 + i / 2 * 8,
                           t.column + warp * 16 + n * 8 + lane % 4 * 2 + i % 2, total[m][n][i]);
}

/* fp32 weights: fp32 products, k ascending, four rows by eight outputs a thread. */
__global__ void __launch_bounds__(THREADS) product_f32(const __grid_constant__ product p)
{
    enum { STEP = 16 };
    __shared__ float a_tile[STEP][TILE_ROWS + 1], w_tile[STEP][TILE_COLUMNS + 1];
    tile t;
    if (!find_tile(p, &t)) return;

    const int tid = (int)threadIdx.x, r0 = tid / 8 * 4, c0 = tid % 8 * 8;
    const uint8_t *numbers = p.numbers + (size_t)t.matrix * p.matrix;
    const size_t x0 = (size_t)t.matrix * p.x_step;
    float total[4][8] = {};
    for (int k0 = 0; k0 < p.n_in; k0 += STEP) {
        for (int c = tid; c < TILE_ROWS * STEP; c += THREADS) {
            const int r = c / STEP, j = c % STEP, k = k0 + j, o = t.column + r;
            w_tile[j][r] = o < p.n_out && k < p.n_in
                               ? ((const float *)(numbers + (size_t)o * (size_t)p.ld_w))[k]
                               : 0.0f;
            a_tile[j][r] =
                r < t.rows && k < p.n_in
                    ? read_number(p.x, x0 + input_row(p, t.row + r) * p.ld_x + (size_t)k, p.x_f32)
                    : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < STEP; j++)
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int c = 0; c < 8; c++)
                    total[r][c] = __fmaf_rn(a_tile[j][r0 + r], w_tile[j][c0 + c], total[r][c]);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 8; c++)
            write_tile(p, t, r0 + r, t.column + c0 + c, total[r][c]);
}

} // namespace

void product_weight(product *p, const tr_linear *w)
{
    tr_weight_layout l;
    tr_weight_layout_of(&l, w->format, w->n_mats, w->n_out, w->n_in);
    p->format = w->format;
    p->numbers = (const uint8_t *)w->data + l.numbers;
    p->head = (const tr_weight_head *)w->data;
    p->scale = (const float *)((const uint8_t *)w->data + l.scales);
    p->matrix = l.matrix;
    p->n_mats = w->n_mats;
    p->n_out = w->n_out;
    p->n_in = w->n_in;
    p->ld_w = l.ld;
    p->scale_rows = l.scale_rows;
    p->scale_pitch = l.scale_pitch;
    p->blocks = (w->n_in + 127) / 128; /* where k_shift is 0; else the caller's */
}

cudaError_t product_launch(const product *p, cudaStream_t stream)
{
    const unsigned rows =
        p->tiles ? (unsigned)p->tiles_max : blocks_for((size_t)p->n_max, TILE_ROWS);
    const dim3 grid(blocks_for((size_t)p->n_out, TILE_COLUMNS), rows,
                    p->tiles ? 1u : (unsigned)p->n_mats);
    if (rows == 0) return cudaSuccess;
    if (rows > 65535 || grid.z > 65535) return cudaErrorInvalidValue;
    if (p->format == TR_W_F32)
        product_f32<<<grid, THREADS, 0, stream>>>(*p);
    else if (p->format == TR_W_BF16)
        product_mma<__nv_bfloat16, false, false><<<grid, THREADS, 0, stream>>>(*p);
    else if (p->q)
        product_mma<__half, true, true><<<grid, THREADS, 0, stream>>>(*p);
    else
        product_mma<__nv_bfloat16, true, false><<<grid, THREADS, 0, stream>>>(*p);
    return cudaGetLastError();
}

} // namespace tr

/* Nothing to set; whether this GPU can run what was built shows here. */
cudaError_t tr_cuda_products_open(void)
{
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, (const void *)tr::product_f32);
}

int tr_weight_layout_of(tr_weight_layout *out, tr_format format, int n_mats, int n_out, int n_in)
{
    const size_t element = format == TR_W_F32 ? 4 : format == TR_W_BF16 ? 2 : 1;
    const size_t mats = (size_t)n_mats;
    size_t at, more;

    out->ld = (int)(((size_t)n_in * element + 15) / 16 * 16);
    out->scale_rows = n_out / 128 + 4;
    out->scale_pitch = (tr_blocks_at_most(n_in) + 3) / 4 * 4; /* bulk copies of 16 bytes */
    out->numbers = (mats * sizeof(tr_weight_head) + 255) / 256 * 256;
    if (__builtin_mul_overflow((size_t)out->ld, (size_t)n_out, &out->matrix) ||
        __builtin_mul_overflow(out->matrix, mats, &more) ||
        __builtin_add_overflow(out->numbers, more, &at) || at > SIZE_MAX / 2)
        return 0;
    out->scales = at = (at + 255) / 256 * 256;
    if (format == TR_W_E4M3_B128) /* of the numbers' order, which fit */
        at += mats * (size_t)out->scale_rows * (size_t)out->scale_pitch * 4;
    out->bytes = at;
    return 1;
}

/* ---- linear, and the products with a matrix per head --------------------------------------------------------------- */

cudaError_t tr_cuda_linear(const struct tr_linear_args *a, int k_shift, cudaStream_t stream)
{
    tr::product p = {};
    tr::product_weight(&p, a->w);
    p.n_mats = 1;
    p.n = a->n;
    p.n_max = a->n_max;
    p.x = a->in.x;
    p.ld_x = a->in.ld;
    p.y = a->out;
    p.y_f32 = a->out_f32;
    p.ld_y = a->ld_out;
    if (p.format == TR_W_E4M3_B128) {
        if (!a->in.q || !a->in.q_scale) return cudaErrorInvalidValue;
        p.blocks = (p.n_in + k_shift + 127) / 128;
        p.q = a->in.q;
        p.q_scale = a->in.q_scale;
        p.ld_q_scale = (a->n_max + 3) / 4 * 4;
        if (a->in.quantised && k_shift) return cudaErrorInvalidValue;
        const tr_cuda_quantise_args q = {.x = p.x,
                                         .ld = p.ld_x,
                                         .n = a->n,
                                         .n_max = a->n_max,
                                         .d = p.n_in,
                                         .blocks = p.blocks,
                                         .pow2 = a->in.scale_pow2,
                                         .k_shift = k_shift,
                                         .q = a->in.q,
                                         .scale = a->in.q_scale};
        const cudaError_t e = a->in.quantised ? cudaSuccess : tr_cuda_quantise(&q, stream);
        if (e != cudaSuccess) return e;
    }
    return tr::product_launch(&p, stream);
}
