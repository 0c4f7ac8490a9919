/* What this device can do at most, measured: reading memory that no cache holds, and fp32
 * multiply-adds on registers. */
#include "kernels/cuda/common.cuh"

namespace
{

enum { THREADS = 512, FMA_ROUNDS = 1 << 15, CHAINS = 16, REPEATS = 5 };

__global__ void read_all(const uint4 *p, size_t n, uint32_t *out)
{
    uint32_t folded = 0;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (size_t)gridDim.x * THREADS) {
        const uint4 v = p[i];
        folded ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (folded == 0x12345678u)
        *out = folded; /* memory is zero: never, but the compiler cannot know */
}

__global__ void multiply_add(float x, float *out)
{
    float sum[CHAINS];
    for (int i = 0; i < CHAINS; i++)
        sum[i] = (float)(i + (int)threadIdx.x);
    for (int r = 0; r < FMA_ROUNDS; r++)
#pragma unroll
        for (int i = 0; i < CHAINS; i++)
            sum[i] = __fmaf_rn(sum[i], x, 1.0f);
    float all = 0;
    for (int i = 0; i < CHAINS; i++)
        all += sum[i];
    if (all == 1.0f) *out = all;
}

/* e4m3 numbers of moderate size, of either sign. */
__global__ void make_codes(uint32_t *p, size_t n)
{
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (size_t)gridDim.x * THREADS) {
        uint32_t x = (uint32_t)i * 2654435761u;
        x = (x ^ x >> 15) * 2246822519u;
        p[i] = ((x ^ x >> 13) & 0x8f8f8f8fu) | 0x30303030u;
    }
}

__global__ void make_ones(float *p, size_t n, int32_t *rows, int n_rows)
{
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (size_t)gridDim.x * THREADS)
        p[i] = 1.0f;
    if (blockIdx.x == 0 && threadIdx.x == 0) *rows = n_rows;
}

/* The square product of SIDE, in seconds: the best of some. memory: SIDE * SIDE * 5 bytes. */
cudaError_t time_fp8(const tr_gemm_fp8 *g, uint8_t *memory, cudaEvent_t begin, cudaEvent_t end,
                     double *seconds, cudaStream_t stream)
{
    enum { SIDE = 8192 };
    const size_t codes = (size_t)SIDE * SIDE, scales = codes / 128;
    uint8_t *w = memory, *x = w + codes, *out = x + codes;
    float *scale = (float *)(out + 2 * codes);
    int32_t *n = (int32_t *)(scale + scales);
    const tr_fp8_weight weight = {
        .q_d = w, .scale_d = scale, .n_mats = 1, .n_out = SIDE, .n_in = SIDE};
    const tr_fp8_rows rows = {.q_d = x, .scale_d = scale, .n_d = n, .n_max = SIDE};

    make_codes<<<1024, THREADS, 0, stream>>>((uint32_t *)memory, 2 * codes / 4);
    make_ones<<<64, THREADS, 0, stream>>>(scale, scales, n, SIDE);
    cudaError_t e = cudaGetLastError();
    *seconds = 0;
    for (int i = 0; i < REPEATS && e == cudaSuccess; i++) {
        float ms = 0;
        e = cudaEventRecord(begin, stream);
        if (e == cudaSuccess) e = tr_gemm_fp8_dense(g, &weight, &rows, out, SIDE, 0, stream);
        if (e == cudaSuccess) e = cudaEventRecord(end, stream);
        if (e == cudaSuccess) e = cudaEventSynchronize(end);
        if (e == cudaSuccess) e = cudaEventElapsedTime(&ms, begin, end);
        if (*seconds == 0 || ms * 1e-3 < *seconds) *seconds = ms * 1e-3;
    }
    return e;
}

} // namespace

cudaError_t tr_cuda_ceilings(const tr_gemm_fp8 *g, double *read_bytes_per_s,
                             double *fma_flops_per_s, double *fp8_flops_per_s, cudaStream_t stream)
{
    double fp8_seconds = 0;
    const size_t bytes = (size_t)2 << 30;
    cudaEvent_t begin = nullptr, end = nullptr;
    void *memory = nullptr;
    int device = 0, n_sms = 0;
    float ms = 0, best_read = 0, best_fma = 0;

    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaMalloc(&memory, bytes);
    if (e == cudaSuccess) e = cudaMemsetAsync(memory, 0, bytes, stream);
    if (e == cudaSuccess) e = cudaEventCreate(&begin);
    if (e == cudaSuccess) e = cudaEventCreate(&end);
    for (int i = 0; i < 2 * REPEATS && e == cudaSuccess; i++) {
        const unsigned grid = (unsigned)n_sms * 4;
        e = cudaEventRecord(begin, stream);
        if (i % 2 == 0)
            read_all<<<grid, THREADS, 0, stream>>>((const uint4 *)memory, bytes / 16,
                                                   (uint32_t *)memory);
        else
            multiply_add<<<grid, THREADS, 0, stream>>>(0.5f, (float *)memory);
        if (e == cudaSuccess) e = cudaGetLastError();
        if (e == cudaSuccess) e = cudaEventRecord(end, stream);
        if (e == cudaSuccess) e = cudaEventSynchronize(end);
        if (e == cudaSuccess) e = cudaEventElapsedTime(&ms, begin, end);
        float *best = i % 2 == 0 ? &best_read : &best_fma;
        if (*best == 0 || ms < *best) *best = ms;
    }
    if (e == cudaSuccess) e = time_fp8(g, (uint8_t *)memory, begin, end, &fp8_seconds, stream);
    if (e == cudaSuccess) {
        *fp8_flops_per_s = 2.0 * 8192 * 8192 * 8192 / fp8_seconds;
        *read_bytes_per_s = (double)bytes / ((double)best_read * 1e-3);
        *fma_flops_per_s =
            2.0 * CHAINS * FMA_ROUNDS * THREADS * 4.0 * n_sms / ((double)best_fma * 1e-3);
    }
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
    if (memory) cudaFree(memory);
    return e;
}
