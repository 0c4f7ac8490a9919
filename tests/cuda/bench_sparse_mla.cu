/* Checks and times sparse MLA on a GPU: against fp64 on random data and on hostile shapes, bit for bit between the ways to
 * run it and between a row alone and among others, then every shape of kernels.md 10.
 *
 *   bench_sparse_mla          checks, then the table
 *   bench_sparse_mla check    checks of small shapes only (for compute-sanitizer)
 *   bench_sparse_mla time     the table only
 *   bench_sparse_mla one ROWS HEADS FP8 WAY   one launch (for a profiler)
 *
 * Exit status 1: a check failed. The peer of the table is FlashMLA, measured on one H200 (kernels.md 10). */
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "kernels/cuda/sparse_mla.h"
#include "tests/cuda/measure.cuh"

enum { D_LATENT = 512, D_KEY = 576, RECORD_FP8 = 656, RECORD_BF16 = 1152, K = 2048 };

static int n_failed = 0;

/* ---- data ------------------------------------------------------------------------------------------------------------- */

__host__ __device__ static uint16_t to_bf16(float x) /* finite */
{
    union {
        float f;
        uint32_t u;
    } v = {x};
    return (uint16_t)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}
__host__ __device__ static float from_bf16(uint16_t x)
{
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)x << 16};
    return v.f;
}
__host__ __device__ static float from_e4m3(uint8_t x)
{
    int e = x >> 3 & 15, m = x & 7;
    float v = e ? ldexpf(1.0f + (float)m / 8.0f, e - 7) : ldexpf((float)m / 8.0f, -6);
    return x & 0x80 ? -v : v;
}

/* Each record from its row number: random codes (no NaN), powers of two 2^-4..2^-1 as scales. */
__global__ void fill_cache(uint8_t *cache, size_t n_rows, int fp8, unsigned long long seed)
{
    for (size_t r = blockIdx.x; r < n_rows; r += gridDim.x) {
        uint8_t *row = cache + r * (size_t)(fp8 ? RECORD_FP8 : RECORD_BF16);
        for (int i = (int)threadIdx.x; i < D_KEY; i += (int)blockDim.x) {
            unsigned long long x = measure::mix(seed + r * D_KEY + (unsigned)i);
            float u = (float)(int)(unsigned)x * (1.0f / 2147483648.0f);
            if (!fp8 || i >= D_LATENT)
                ((uint16_t *)(row + (fp8 ? 528 - 2 * D_LATENT : 0)))[i] = to_bf16(u);
            else
                row[i] = (uint8_t)((x & 0x7f) == 0x7f ? x & 0x80 : (x & 0xbf)); /* below 2 */
            if (fp8 && i < 4)
                ((float *)(row + D_LATENT))[i] = ldexpf(1.0f, -4 + (int)(x >> 40 & 3));
        }
    }
}
__global__ void fill_bf16(uint16_t *x, size_t n, float scale, unsigned long long seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        x[i] = to_bf16(scale * measure::uniform(seed, i));
}
/* count[row] ascending positions of the row's region (its slot; without, the rows take turns), about evenly spread, and their
 * cache rows; -1 behind them. exchanged: a region's pages are, in pairs. */
__host__ __device__ static int page_of(int region, int page, int context, int exchanged)
{
    int n = context / TR_PAGE_TOKENS;
    return region * n + (exchanged && (page ^ 1) < n ? page ^ 1 : page);
}
__global__ void fill_lists(int32_t *list, int32_t *position, const int32_t *count,
                           const int32_t *slot, int n, int context, int n_regions, int exchanged,
                           unsigned long long seed)
{
    int row = blockIdx.x;
    if (row >= n) return;
    int c = count ? count[row] : K, region = slot ? slot[row] : row % n_regions;
    for (int i = (int)threadIdx.x; i < K; i += (int)blockDim.x) {
        double step = c ? (double)context / c : 0,
               u = 0.5 + 0.5 * measure::uniform(seed, (size_t)row * K + i);
        int at = step >= 1 ? (int)(step * (i + 0.999 * u))
                           : (int)(measure::mix(seed + i + row * K) % (unsigned)context);
        list[(size_t)row * K + i] =
            i < c ? page_of(region, at / TR_PAGE_TOKENS, context, exchanged) * TR_PAGE_TOKENS +
                        at % TR_PAGE_TOKENS
                  : -1;
        if (position) position[(size_t)row * K + i] = i < c ? at : -1;
    }
}
/* Rows of a step, as far as a launch looks at them: row / per_region is the slot; it sees all of its region. */
__global__ void fill_rows(tr_rows rows, int per_region, int context, int n_regions, int exchanged)
{
    int at = (int)(blockIdx.x * blockDim.x + threadIdx.x), n_pages = context / TR_PAGE_TOKENS;
    if (at < rows.n_max) {
        rows.slot[at] = at / per_region % n_regions;
        rows.position[at] = context - 1;
        rows.write[at] = 0;
    }
    for (int i = at; i < n_regions * n_pages; i += (int)(gridDim.x * blockDim.x))
        ((int32_t *)rows.page_table)[i] = page_of(i / n_pages, i % n_pages, context, exchanged);
}

/* ---- fp64 reference, and the comparison: one block per (row, head) ---------------------------------------------------- */

__device__ static float key_value(const uint8_t *row, int fp8, int i)
{
    if (!fp8) return from_bf16(((const uint16_t *)row)[i]);
    if (i >= D_LATENT) return from_bf16(((const uint16_t *)(row + 528))[i - D_LATENT]);
    return from_e4m3(row[i]) * ((const float *)(row + D_LATENT))[i / 128];
}

__device__ static double block_sum(double x, double *tmp)
{
    tmp[threadIdx.x] = x;
    __syncthreads();
    for (int s = 128; s; s /= 2) {
        if (threadIdx.x < s) tmp[threadIdx.x] += tmp[threadIdx.x + s];
        __syncthreads();
    }
    x = tmp[0];
    __syncthreads();
    return x;
}
__device__ static double block_max(double x, double *tmp)
{
    tmp[threadIdx.x] = x;
    __syncthreads();
    for (int s = 128; s; s /= 2) {
        if (threadIdx.x < s) tmp[threadIdx.x] = fmax(tmp[threadIdx.x], tmp[threadIdx.x + s]);
        __syncthreads();
    }
    x = tmp[0];
    __syncthreads();
    return x;
}

struct
    checked { /* of a (row, head): norm of the error and of the reference; worst element over its tolerance; lse error */
    double error, norm, worst, lse;
};

__global__ void __launch_bounds__(256)
    check_rows(checked *result, const uint16_t *q, const uint8_t *cache, int fp8, uint32_t n_latent,
               const int32_t *list, const int32_t *rows, int n_heads, double scale,
               const uint16_t *out, const float *lse)
{
    __shared__ double p[K], tmp[256];
    __shared__ float query[D_KEY];
    int row = rows[blockIdx.x / n_heads], head = blockIdx.x % n_heads;
    size_t record = fp8 ? RECORD_FP8 : RECORD_BF16, at = (size_t)row * n_heads + head;
    const int32_t *l = list + (size_t)row * K;
    double max = -INFINITY, sum = 0, error = 0, norm = 0, worst = 0;

    for (int i = (int)threadIdx.x; i < D_KEY; i += 256)
        query[i] = from_bf16(q[at * D_KEY + i]);
    __syncthreads();
    for (int s = (int)threadIdx.x; s < K; s += 256) {
        double x = 0;
        if ((uint32_t)l[s] < n_latent)
            for (int i = 0; i < D_KEY; i++)
                x += (double)query[i] * (double)key_value(cache + (size_t)l[s] * record, fp8, i);
        else
            x = -INFINITY;
        p[s] = x * scale;
        max = fmax(max, p[s]);
    }
    max = block_max(max, tmp);
    for (int s = (int)threadIdx.x; s < K; s += 256) {
        p[s] = max == -INFINITY ? 0 : exp(p[s] - max);
        sum += p[s];
    }
    sum = block_sum(sum, tmp);
    double ref[2] = {0, 0};
    for (int s = 0; s < K; s++)
        if (p[s] != 0)
            for (int e = 0; e < 2; e++)
                ref[e] += p[s] * (double)key_value(cache + (size_t)l[s] * record, fp8,
                                                   (int)threadIdx.x + 256 * e);
    for (int e = 0; e < 2; e++) {
        ref[e] = sum == 0 ? 0 : ref[e] / sum;
        norm += ref[e] * ref[e];
    }
    norm = block_sum(norm, tmp);
    for (int e = 0; e < 2; e++) {
        double d = fabs((double)from_bf16(out[at * D_LATENT + threadIdx.x + 256 * e]) - ref[e]);
        /* rounding of the output, and of 2,048 probabilities to 8 bits, whose errors mostly cancel */
        double allowed = 0x1p-8 * fabs(ref[e]) + 0x1p-6 * sqrt(norm / D_LATENT);
        error += d * d;
        double ratio = d == 0 ? 0 : d / allowed;
        worst = !(ratio <= worst) ? ratio : worst;
    }
    error = block_sum(error, tmp);
    worst = isnan(block_sum(worst, tmp)) ? NAN : block_max(worst, tmp);
    if (threadIdx.x == 0) {
        double want = sum == 0 ? -INFINITY : max + log(sum);
        double off =
            !lse || lse[at] == want ? 0 : fabs((double)lse[at] - want) / fmax(1.0, fabs(want));
        result[blockIdx.x] = {error, norm, worst, off};
    }
}

/* ---- a launch's buffers ------------------------------------------------------------------------------------------------ */

struct setup {
    int n_max, n_heads, fp8, n_regions, context;
    uint8_t *cache, *dense;
    uint16_t *q, *out;
    float *lse;
    int32_t *n, *list, *position, *count;
    void *work;
    size_t work_bytes;
    tr_rows rows;
    tr_sparse_mla_args args;
};

template <class T> static T *allocate(size_t n)
{
    void *p;
    CHECK_CUDA(cudaMalloc(&p, n * sizeof(T) + 256));
    return (T *)p;
}

static void make(setup &s, int n, int n_heads, int fp8, int n_regions, int context, int per_region,
                 const std::vector<int32_t> *counts, float q_scale, uint8_t *cache)
{
    memset(&s, 0, sizeof s);
    s.n_max = n, s.n_heads = n_heads, s.fp8 = fp8, s.n_regions = n_regions, s.context = context;
    size_t n_rows = (size_t)n_regions * context;
    s.cache = cache;
    s.q = allocate<uint16_t>((size_t)n * n_heads * D_KEY);
    s.out = allocate<uint16_t>((size_t)n * n_heads * D_LATENT);
    s.lse = allocate<float>((size_t)n * n_heads);
    s.n = allocate<int32_t>(1);
    s.list = allocate<int32_t>((size_t)n * K);
    s.position = allocate<int32_t>((size_t)n * K);
    s.dense = allocate<uint8_t>((size_t)n);
    s.count = allocate<int32_t>((size_t)n);
    CHECK_CUDA(cudaMemset(s.dense, 0, (size_t)n));
    CHECK_CUDA(cudaMemcpy(s.n, &n, 4, cudaMemcpyHostToDevice));
    if (counts)
        CHECK_CUDA(cudaMemcpy(s.count, counts->data(), 4 * (size_t)n, cudaMemcpyHostToDevice));
    fill_bf16<<<1024, 256>>>(s.q, (size_t)n * n_heads * D_KEY, q_scale, 77);
    CHECK_CUDA(cudaGetLastError());
    s.work_bytes =
        std::max(tr_cuda_sparse_mla_workspace_way(n <= 64 ? n : 1, n_heads, TR_MLA_SPLIT),
                 tr_cuda_sparse_mla_workspace(n, n_heads, D_LATENT));
    s.work = allocate<uint8_t>(s.work_bytes);
    s.rows.n_max = n;
    s.rows.n = s.n;
    s.rows.dense = s.dense;
    s.rows.max_context = context;
    s.rows.max_pages = context / TR_PAGE_TOKENS;
    s.rows.slot = allocate<int32_t>((size_t)n);
    s.rows.position = allocate<int32_t>((size_t)n);
    s.rows.write = allocate<int64_t>((size_t)n);
    s.rows.page_table = allocate<int32_t>((size_t)n_regions * (size_t)s.rows.max_pages);
    fill_rows<<<(n + 255) / 256, 256>>>(s.rows, per_region, context, n_regions, 0);
    fill_lists<<<n, 256>>>(s.list, s.position, counts ? s.count : NULL, s.rows.slot, n, context,
                           n_regions, 0, 5);
    CHECK_CUDA(cudaGetLastError());
    s.args.rows = &s.rows;
    s.args.q = (const float *)(const void *)s.q;
    s.args.n_heads = n_heads;
    s.args.scale = 0.13523378f;
    s.args.cache_row = s.list;
    s.args.position = s.position;
    s.args.k = K;
    s.args.kv.latent = s.cache;
    s.args.kv.dtype = fp8 ? TR_E4M3 : TR_BF16;
    s.args.kv.n_pages = (int)(n_rows / TR_PAGE_TOKENS);
    s.args.kv.d_latent = D_LATENT;
    s.args.kv.d_rope = 64;
    s.args.out = (float *)(void *)s.out;
    s.args.lse = s.lse;
    s.args.workspace = s.work;
    s.args.workspace_bytes = s.work_bytes;
}

static void unmake(setup &s)
{
    cudaFree(s.q), cudaFree(s.out), cudaFree(s.lse), cudaFree(s.n), cudaFree(s.list);
    cudaFree(s.dense), cudaFree(s.count), cudaFree(s.work), cudaFree(s.position);
    cudaFree(s.rows.slot), cudaFree(s.rows.position), cudaFree(s.rows.write);
    cudaFree((void *)s.rows.page_table);
}

static uint8_t *make_cache(size_t n_rows, int fp8)
{
    uint8_t *cache = allocate<uint8_t>(n_rows * (size_t)(fp8 ? RECORD_FP8 : RECORD_BF16));
    fill_cache<<<4096, 128>>>(cache, n_rows, fp8, 1234);
    CHECK_CUDA(cudaGetLastError());
    return cache;
}

static void launch(setup &s, int way)
{
    s.args.rows = &s.rows;
    CHECK_CUDA(tr_cuda_sparse_mla_way(&s.args, way, 0));
}

static void fail(const std::string &what)
{
    printf("FAILED %s\n", what.c_str());
    n_failed++;
}

/* Largest relative error of the rows given; fails where an element is out of its tolerance. */
static double check(setup &s, const std::vector<int32_t> &rows, const std::string &what)
{
    int n = (int)rows.size() * s.n_heads;
    int32_t *rows_d = allocate<int32_t>(rows.size());
    checked *d = allocate<checked>((size_t)n);
    std::vector<checked> h((size_t)n);
    double worst = 0, relative = 0, lse = 0;

    CHECK_CUDA(cudaMemcpy(rows_d, rows.data(), 4 * rows.size(), cudaMemcpyHostToDevice));
    check_rows<<<n, 256>>>(d, s.q, s.cache, s.fp8, (uint32_t)s.args.kv.n_pages * 64, s.list, rows_d,
                           s.n_heads, (double)s.args.scale, s.out, s.args.lse);
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaMemcpy(h.data(), d, sizeof(checked) * (size_t)n, cudaMemcpyDeviceToHost));
    cudaFree(rows_d), cudaFree(d);
    for (int i = 0; i < n; i++) {
        worst = !(h[i].worst <= worst) ? h[i].worst : worst;
        lse = !(h[i].lse <= lse) ? h[i].lse : lse;
        if (h[i].norm > 0) relative = std::max(relative, sqrt(h[i].error / h[i].norm));
        if (h[i].norm == 0 && h[i].error != 0) worst = INFINITY;
        if (!(h[i].worst <= 1) && n_failed < 20)
            printf("  row %d head %d: error %.3g of %.3g\n", rows[(size_t)(i / s.n_heads)],
                   i % s.n_heads, sqrt(h[i].error), sqrt(h[i].norm));
        if (!(h[i].worst <= 1)) break;
    }
    if (!(worst <= 1) || !(lse <= 1e-4))
        fail(what + ": worst element " + std::to_string(worst) + " of its tolerance, lse off by " +
             std::to_string(lse));
    return relative;
}

static std::vector<uint16_t> fetch(setup &s)
{
    std::vector<uint16_t> h((size_t)s.n_max * s.n_heads * D_LATENT);
    CHECK_CUDA(cudaMemcpy(h.data(), s.out, 2 * h.size(), cudaMemcpyDeviceToHost));
    return h;
}
static void poison(setup &s)
{
    CHECK_CUDA(cudaMemset(s.out, 0xff, (size_t)s.n_max * s.n_heads * D_LATENT * 2));
    CHECK_CUDA(cudaMemset(s.lse, 0xff, (size_t)s.n_max * s.n_heads * 4));
    if (s.work_bytes < 512u << 20) CHECK_CUDA(cudaMemset(s.work, 0xff, s.work_bytes));
}

/* Rows of every awkward count, a dense one, and one past the live rows; both ways; then bit equality. */
static void check_shape(int n_heads, int fp8, uint8_t *cache, int n_regions, int context,
                        float q_scale, const std::vector<int32_t> &counts, const char *name)
{
    setup s;
    int n = (int)counts.size(), live = n - 1, dense_row = n / 2;
    std::vector<int32_t> rows;
    std::vector<uint16_t> first[2];
    std::string what =
        std::string(name) + " h=" + std::to_string(n_heads) + (fp8 ? " fp8" : " bf16");
    double relative[2];
    uint8_t one = 1;

    make(s, n, n_heads, fp8, n_regions, context, 1, &counts, q_scale, cache);
    CHECK_CUDA(cudaMemcpy(s.dense + dense_row, &one, 1, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(s.n, &live, 4, cudaMemcpyHostToDevice));
    for (int i = 0; i < live; i++)
        if (i != dense_row) rows.push_back(i);
    for (int way = 0; way < 2; way++) {
        std::string w = what + (way ? " walk" : " split");
        poison(s);
        launch(s, way ? TR_MLA_WALK : TR_MLA_SPLIT);
        CHECK_CUDA(cudaDeviceSynchronize());
        relative[way] = check(s, rows, w);
        first[way] = fetch(s);
        for (int i : {dense_row, live})
            for (size_t e = 0; e < (size_t)n_heads * D_LATENT; e++)
                if (first[way][(size_t)i * n_heads * D_LATENT + e] != 0xffff) {
                    fail(w + ": a row that is not its own was written");
                    break;
                }
        poison(s);
        launch(s, way ? TR_MLA_WALK : TR_MLA_SPLIT);
        if (fetch(s) != first[way]) fail(w + ": two runs differ");
    }
    if (first[0] != first[1]) {
        size_t i = 0;
        while (first[0][i] == first[1][i])
            i++;
        size_t row = i / D_LATENT / n_heads;
        fail(what + ": bit equality: split and walk differ, first at row " + std::to_string(row) +
             " (" + std::to_string(counts[row]) + " keys) head " +
             std::to_string(i / D_LATENT % n_heads) + " column " + std::to_string(i % D_LATENT));
    }
    for (int i : {0, live / 2 + 1, live - 1}) { /* alone */
        setup a = s;
        if (i == dense_row) continue;
        a.q += (size_t)i * n_heads * D_KEY, a.list += (size_t)i * K;
        a.args.q = (const float *)(const void *)a.q, a.args.cache_row = a.list;
        a.rows.n_max = 1, a.rows.dense = s.dense + i;
        poison(s);
        launch(a, TR_MLA_AUTO);
        std::vector<uint16_t> alone = fetch(s);
        if (memcmp(alone.data(), &first[1][(size_t)i * n_heads * D_LATENT],
                   2u * n_heads * D_LATENT))
            fail(what + ": bit equality: row " + std::to_string(i) +
                 " alone differs from among others");
    }
    printf("checked %-28s %d rows: relative error %.2e split, %.2e walk\n", what.c_str(), live,
           relative[0], relative[1]);
    unmake(s);
}

/* Rows of a step of 128, that walk, and the same rows alone, split. */
static void check_among(int n_heads, int fp8, uint8_t *cache, int n_regions, int context)
{
    setup s;
    std::vector<int32_t> counts(128);

    for (int i = 0; i < 128; i++)
        counts[(size_t)i] = i % 3 ? 2048 : (int)(measure::mix((unsigned)i) % 2049);
    make(s, 128, n_heads, fp8, n_regions, context, 1, &counts, 0.25f, cache);
    poison(s);
    launch(s, TR_MLA_AUTO);
    std::vector<uint16_t> all = fetch(s);
    for (int i : {0, 1, 63, 66, 127}) {
        setup a = s;
        a.q += (size_t)i * n_heads * D_KEY, a.list += (size_t)i * K;
        a.args.q = (const float *)(const void *)a.q, a.args.cache_row = a.list;
        a.rows.n_max = 1;
        for (int way : {TR_MLA_SPLIT, TR_MLA_WALK}) {
            poison(s);
            launch(a, way);
            std::vector<uint16_t> alone = fetch(s);
            if (memcmp(alone.data(), &all[(size_t)i * n_heads * D_LATENT], 2u * n_heads * D_LATENT))
                fail("bit equality: row " + std::to_string(i) +
                     " alone differs from among 128, h=" + std::to_string(n_heads));
        }
    }
    printf("checked bit equality of rows alone and among 128, h=%d %s\n", n_heads,
           fp8 ? "fp8" : "bf16");
    unmake(s);
}

/* A step of prompts and single rows, where the prompts' keys are expanded first: the bits of the walk over records. Some rows
 * are dense, some pads, the last ones not live; `keys`: how many rows of bf16 there is room for. */
static void check_expanded(int n_heads, uint8_t *cache, int n_regions, int context, size_t keys)
{
    enum { N = 700, LIVE = 690 };
    setup s;
    std::vector<int32_t> counts(N), slot(N);
    std::vector<uint8_t> dense(N);
    std::vector<int64_t> write(N, 1);
    std::vector<float> lse[2];
    std::vector<uint16_t> out[2];
    int live = LIVE;
    size_t fixed = tr_cuda_sparse_mla_workspace_way(N, n_heads, TR_MLA_EXPAND) -
                   (size_t)N * 32 / TR_PAGE_TOKENS * TR_PAGE_TOKENS * RECORD_BF16;

    for (int i = 0; i < N; i++) { /* 150 rows, 20 runs of one, 200, 110, the rest */
        slot[(size_t)i] = i < 150 ? 3 : i < 170 ? i % 2 : i < 370 ? 2 : i < 480 ? 1 : 5;
        counts[(size_t)i] = i % 5 ? K : (int)(measure::mix((unsigned)i) % (K + 1));
        dense[(size_t)i] = i / 11 % 13 == 12;
        if (i % 97 == 50) write[(size_t)i] = -1;
    }
    make(s, N, n_heads, 1, n_regions, context, 1, &counts, 0.25f, cache);
    fill_rows<<<(N + 255) / 256, 256>>>(s.rows, 1, context, n_regions, 1);
    CHECK_CUDA(cudaMemcpy(s.rows.slot, slot.data(), 4 * N, cudaMemcpyHostToDevice));
    fill_lists<<<N, 256>>>(s.list, s.position, s.count, s.rows.slot, N, context, n_regions, 1, 11);
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaMemcpy(s.rows.write, write.data(), 8 * N, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(s.dense, dense.data(), N, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(s.n, &live, 4, cudaMemcpyHostToDevice));
    cudaFree(s.work);
    s.work_bytes = fixed + keys * RECORD_BF16;
    s.work = allocate<uint8_t>(s.work_bytes);
    s.args.workspace = s.work;
    s.args.workspace_bytes = s.work_bytes;
    for (int way = 0; way < 2; way++) {
        poison(s);
        launch(s, way ? TR_MLA_EXPAND : TR_MLA_WALK);
        out[way] = fetch(s);
        lse[way].resize((size_t)N * n_heads);
        CHECK_CUDA(cudaMemcpy(lse[way].data(), s.lse, 4 * lse[way].size(), cudaMemcpyDeviceToHost));
    }
    if (out[0] != out[1] ||
        memcmp(lse[0].data(), lse[1].data(), 4 * lse[0].size())) /* NaN where poisoned */
        fail("bit equality: rows whose keys are expanded differ, h=" + std::to_string(n_heads) +
             ", room for " + std::to_string(keys) + " keys");
    printf("checked bit equality of expanded rows, h=%d, room for %zu keys\n", n_heads, keys);
    unmake(s);
}

/* ---- timing ------------------------------------------------------------------------------------------------------------ */

/* What the memory gives for this pattern: rows of a list, read once, 8 lanes... whole warps on a row. */
__global__ void gather_rows(const uint8_t *cache, size_t record, const int32_t *list, int n,
                            uint4 *sink)
{
    uint4 x = {0, 0, 0, 0};
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32; i < n;
         i += (int)(gridDim.x * blockDim.x) / 32) {
        const uint4 *row = (const uint4 *)(cache + (size_t)list[i] * record);
        for (size_t c = threadIdx.x & 31; c < record / 16; c += 32) {
            uint4 v = row[c];
            x.x ^= v.x, x.y ^= v.y, x.z ^= v.z, x.w ^= v.w;
        }
    }
    if ((x.x ^ x.y ^ x.z ^ x.w) == 0x12345u) *sink = x;
}
__global__ void read_all(const uint4 *p, size_t n, uint4 *sink)
{
    uint4 x = {0, 0, 0, 0};
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint4 v = p[i];
        x.x ^= v.x, x.y ^= v.y, x.z ^= v.z, x.w ^= v.w;
    }
    if ((x.x ^ x.y ^ x.z ^ x.w) == 0x12345u) *sink = x;
}

static void time_shape(measure::cold_timer &timer, const char *name, int n, int per_region,
                       int n_heads, int fp8, int n_regions, int context, uint8_t *cache,
                       double peer_us, int reps)
{
    setup s;
    double us[3] = {0, 0, 0}, flop = 2.0 * n_heads * K * (D_KEY + D_LATENT) * n;
    std::vector<int32_t> rows;

    make(s, n, n_heads, fp8, n_regions, context, per_region, NULL, 0.25f, cache);
    for (int way = TR_MLA_AUTO; way <= TR_MLA_WALK; way++) {
        if (way == TR_MLA_SPLIT && n > 64) continue;
        us[way] = timer.median_us([&] { launch(s, way); }, reps);
    }
    poison(s);
    launch(s, TR_MLA_AUTO);
    for (int i = 0; i < 4; i++)
        rows.push_back((int)((long long)(n - 1) * i / 3));
    double e = check(s, rows, name);
    printf("%-30s %9.1f %9.1f %9.1f %8.0f %8.2f %9.1f %7.2f  %.1e\n", name, us[0], us[1], us[2],
           flop / us[0] * 1e-6, (double)n * K * (fp8 ? RECORD_FP8 : RECORD_BF16) / us[0] * 1e-6,
           peer_us, peer_us / us[0], e);
    fflush(stdout);
    unmake(s);
}

static void time_ceilings(measure::cold_timer &timer, uint8_t *cache, int fp8, int n_regions,
                          int context)
{
    size_t record = fp8 ? RECORD_FP8 : RECORD_BF16, bytes = (size_t)n_regions * context * record;
    int n = 128 * K;
    int32_t *list = allocate<int32_t>((size_t)n);
    uint4 *sink = allocate<uint4>(1);

    fill_lists<<<128, 256>>>(list, NULL, NULL, NULL, 128, context, n_regions, 0, 9);
    double read =
        timer.median_us([&] { read_all<<<132 * 8, 512>>>((uint4 *)cache, bytes / 16, sink); }, 5);
    double gather =
        timer.median_us([&] { gather_rows<<<132 * 4, 512>>>(cache, record, list, n, sink); }, 9);
    CHECK_CUDA(cudaGetLastError());
    printf("ceilings: read %.2f TB/s, gather of %zu-byte rows %.2f TB/s\n",
           (double)bytes / read * 1e-6, record, (double)n * (double)record / gather * 1e-6);
    cudaFree(list), cudaFree(sink);
}

static double prefill_us(double tflops, int n)
{
    return 2.0 * 128 * K * (D_KEY + D_LATENT) * n / tflops * 1e-6;
}

static void time_all()
{
    measure::cold_timer timer;
    const int regions = 128, context = 16384;
    uint8_t *cache = make_cache((size_t)regions * context, 1);

    time_ceilings(timer, cache, 1, regions, context);
    printf("%-30s %9s %9s %9s %8s %8s %9s %7s  error\n", "shape", "us", "split us", "walk us",
           "TFLOP/s", "TB/s", "peer us", "speed");
    const struct {
        const char *name;
        int n, per_region, n_heads;
        double peer;
    } shapes[] = {
        {"fp8 h=128 b=1", 1, 1, 128, 20.4},
        {"fp8 h=128 b=8", 8, 1, 128, 29.5},
        {"fp8 h=128 b=32", 32, 1, 128, 65.9},
        {"fp8 h=128 b=128", 128, 1, 128, 188.5},
        {"fp8 h=128 b=1 x 2 rows", 2, 2, 128, 19.7},
        {"fp8 h=128 b=8 x 2 rows", 16, 2, 128, 41.8},
        {"fp8 h=128 b=32 x 2 rows", 64, 2, 128, 97.9},
        {"fp8 h=128 b=128 x 2 rows", 256, 2, 128, 365.6},
        {"fp8 h=64 b=1", 1, 1, 64, 20.7},
        {"fp8 h=64 b=16", 16, 1, 64, 34.2},
        {"fp8 h=64 b=48", 48, 1, 64, 0},
        {"fp8 h=64 b=128", 128, 1, 64, 119.7},
        {"fp8 h=16 b=1", 1, 1, 16, 0},
        {"fp8 h=16 b=8", 8, 1, 16, 16.8},
        {"fp8 h=16 b=32", 32, 1, 16, 0},
        {"fp8 h=16 b=64", 64, 1, 16, 0},
        {"fp8 h=16 b=128", 128, 1, 16, 0},
        {"fp8 h=8 b=8", 8, 1, 8, 0},
        {"fp8 h=32 b=8", 8, 1, 32, 0},
        {"fp8 h=32 b=128", 128, 1, 32, 0},
    };
    for (const auto &x : shapes)
        time_shape(timer, x.name, x.n, x.per_region, x.n_heads, 1, regions, context, cache, x.peer,
                   15);
    time_shape(timer, "fp8 prefill 4096 x 32K", 4096, 4096, 128, 1, 1, 32768, cache, 0, 5);
    time_shape(timer, "fp8 prefill 4096 x 128K", 4096, 4096, 128, 1, 1, 131072, cache, 0, 5);
    cudaFree(cache);
    cache = make_cache(131072, 0);
    time_ceilings(timer, cache, 0, 8, 16384);
    time_shape(timer, "bf16 h=128 b=8", 8, 1, 128, 0, 8, 16384, cache, 0, 15);
    time_shape(timer, "bf16 prefill 4096 x 8K", 4096, 4096, 128, 0, 1, 8192, cache,
               prefill_us(680, 4096), 7);
    time_shape(timer, "bf16 prefill 4096 x 32K", 4096, 4096, 128, 0, 1, 32768, cache,
               prefill_us(652, 4096), 7);
    time_shape(timer, "bf16 prefill 4096 x 64K", 4096, 4096, 128, 0, 1, 65536, cache,
               prefill_us(609, 4096), 7);
    time_shape(timer, "bf16 prefill 4096 x 128K", 4096, 4096, 128, 0, 1, 131072, cache,
               prefill_us(603, 4096), 7);
    cudaFree(cache);
}

/* One launch, for a profiler. */
static int profile(char **argv)
{
    int n = atoi(argv[0]), n_heads = atoi(argv[1]), fp8 = atoi(argv[2]), way = atoi(argv[3]);
    int regions = n > 128 ? 1 : n, context = n > 128 ? 32768 : 16384;
    uint8_t *cache = make_cache((size_t)regions * context, fp8);
    setup s;

    make(s, n, n_heads, fp8, regions, context, n > 128 ? n : 1, NULL, 0.25f, cache);
    launch(s, way);
    CHECK_CUDA(cudaDeviceSynchronize());
    unmake(s);
    cudaFree(cache);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 6 && !strcmp(argv[1], "one")) return profile(argv + 2);
    bool small = argc > 1 && !strcmp(argv[1], "check"),
         timed = argc > 1 && !strcmp(argv[1], "time");
    std::vector<int32_t> counts = {2048, 0,    1,    63,   64,  65, 127,  128,
                                   129,  2047, 1984, 1985, 700, 3,  2048, 5};
    if (small) counts = {200, 0, 1, 64, 65, 129, 5};

    for (int fp8 = 1; fp8 >= 0 && !timed; fp8--) {
        int n_regions = 16, context = small ? 256 : 4096;
        uint8_t *cache = make_cache((size_t)n_regions * context, fp8);
        for (int h : {128, 64, 32, 16, 8, 4}) {
            if (small && h != 128 && h != 16) continue;
            for (int contexts = 0; fp8 && h >= 64 && contexts < 4; contexts++)
                check_expanded(h, cache, n_regions, context, (size_t)(contexts * context));
            check_shape(h, fp8, cache, n_regions, context, 0.25f, counts, "random");
            if (small) continue;
            check_among(h, fp8, cache, n_regions, context);
            check_shape(h, fp8, cache, n_regions, context, 0.0f, counts, "equal scores");
            check_shape(h, fp8, cache, n_regions, context, 8.0f, counts, "sharp");
        }
        CHECK_CUDA(
            cudaMemset(cache, 0, (size_t)n_regions * context * (fp8 ? RECORD_FP8 : RECORD_BF16)));
        check_shape(128, fp8, cache, n_regions, context, 0.25f, counts, "zeros");
        cudaFree(cache);
    }
    if (!small && (n_failed == 0 || argc > 1)) time_all();
    printf(n_failed ? "%d checks FAILED\n" : "all checks passed\n", n_failed);
    return n_failed != 0;
}
