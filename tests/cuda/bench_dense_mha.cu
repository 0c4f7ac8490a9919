/* Checks and times attention of prompts in multi-head form on a GPU: against fp64 (in absorbed form), bit for bit between a
 * prompt whole and in pieces, alone and among others, in one round and in several; then prompts of several lengths.
 *
 *   bench_dense_mha         checks, then the table
 *   bench_dense_mha check   small checks only (for compute-sanitizer)
 *   bench_dense_mha one N   one launch of two prompts of N rows, 128 heads (for a profiler)
 *
 * Exit status 1: a check failed. The target is 600 TFLOP/s of attention (kernels.md 3.6); no peer was measured for it. */
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "kernels/cuda/dense_mha_hopper.h"
#include "tests/cuda/measure.cuh"

namespace
{

enum { D_Q = 192, D_V = 128, D_LATENT = 512, PAGE = TR_PAGE_TOKENS };
int n_failed = 0;

void fail(const std::string &what)
{
    printf("FAILED %s\n", what.c_str());
    n_failed++;
}

__host__ __device__ uint16_t to_bf16(float x) /* finite */
{
    union {
        float f;
        uint32_t u;
    } v = {x};
    return (uint16_t)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}
__host__ __device__ float from_bf16(uint16_t x)
{
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)x << 16};
    return v.f;
}
__host__ __device__ float from_e4m3(uint8_t x)
{
    int e = x >> 3 & 15, m = x & 7;
    float v = e ? ldexpf(1.0f + (float)m / 8.0f, e - 7) : ldexpf((float)m / 8.0f, -6);
    return x & 0x80 ? -v : v;
}

__global__ void fill_cache(uint8_t *cache, size_t n_rows, int fp8, unsigned long long seed)
{
    for (size_t r = blockIdx.x; r < n_rows; r += gridDim.x) {
        uint8_t *row = cache + r * (size_t)(fp8 ? 656 : 1152);
        for (int i = (int)threadIdx.x; i < 576; i += (int)blockDim.x) {
            unsigned long long x = measure::mix(seed + r * 576 + (unsigned)i);
            float u = (float)(int)(unsigned)x * (1.0f / 2147483648.0f);
            if (!fp8 || i >= D_LATENT)
                ((uint16_t *)(void *)(row + (fp8 ? 528 - 2 * D_LATENT : 0)))[i] = to_bf16(u);
            else
                row[i] = (uint8_t)((x & 0x7f) == 0x7f ? x & 0x80 : (x & 0xbf));
            if (fp8 && i < 4)
                ((float *)(void *)(row + D_LATENT))[i] = ldexpf(1.0f, -4 + (int)(x >> 40 & 3));
        }
    }
}
__global__ void fill_bf16(uint16_t *x, size_t n, float scale, unsigned long long seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        x[i] = to_bf16(scale * measure::uniform(seed, i));
}

struct span {
    int slot, position, n, kind; /* kind 0: dense, 1: not dense, 2: dense pads */
};

template <class T> T *allocate(size_t n)
{
    void *p;
    CHECK_CUDA(cudaMalloc(&p, n * sizeof(T) + 1024));
    return (T *)p;
}
template <class T> T *upload(const std::vector<T> &v)
{
    T *d = allocate<T>(v.size());
    CHECK_CUDA(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return d;
}

struct setup {
    int n = 0, n_heads, fp8, max_context = 0;
    float q_size;
    std::vector<int32_t> slot, position;
    std::vector<uint8_t> dense;
    std::vector<int64_t> write;
    std::vector<void *> owned;
    tr_rows rows = {};
    uint16_t *q, *out, *w;
    tr_cuda_dense_mha_hopper_args a = {};

    /* n_keys: room in the workspace; q_seed by slot and position, so that a row is the same in any company. */
    setup(const std::vector<span> &spans, int heads, int is_fp8, uint8_t *cache, int max_pages,
          int n_slots, int n_keys, float q_scale, int step = 1);
    setup(const setup &) = delete;
    ~setup()
    {
        for (void *p : owned)
            cudaFree(p);
    }
    template <class T> T *own(T *p)
    {
        owned.push_back(p);
        return p;
    }
    void run()
    {
        CHECK_CUDA(tr_cuda_dense_mha_hopper(&a, 0));
    }
    std::vector<uint16_t> fetch()
    {
        std::vector<uint16_t> h((size_t)n * n_heads * D_V);
        CHECK_CUDA(cudaMemcpy(h.data(), out, 2 * h.size(), cudaMemcpyDeviceToHost));
        return h;
    }
    void poison()
    {
        CHECK_CUDA(cudaMemset(out, 0xff, (size_t)n * n_heads * D_V * 2));
        CHECK_CUDA(cudaMemset(a.workspace, 0xff, a.workspace_bytes));
    }
};

__global__ void fill_rows(uint16_t *q, const int32_t *slot, const int32_t *position, int heads,
                          float scale)
{
    unsigned long long seed =
        (unsigned)slot[blockIdx.x] * 1000003ull + (unsigned)position[blockIdx.x];
    for (int i = (int)threadIdx.x; i < heads * D_Q; i += (int)blockDim.x)
        q[(size_t)blockIdx.x * heads * D_Q + i] = to_bf16(scale * measure::uniform(seed, i));
}

setup::setup(const std::vector<span> &spans, int heads, int is_fp8, uint8_t *cache, int max_pages,
             int n_slots, int n_keys, float q_scale, int step)
    : n_heads(heads), fp8(is_fp8), q_size(q_scale)
{
    for (const span &s : spans)
        for (int i = 0; i < s.n; i++, n++) {
            slot.push_back(s.slot);
            position.push_back(s.position + i * step);
            dense.push_back(s.kind != 1);
            write.push_back(s.kind == 2 ? -1 : 0);
            max_context = std::max(max_context, s.position + i * step + 1);
        }
    std::vector<int32_t> table((size_t)n_slots * max_pages), live = {n};
    for (size_t i = 0; i < table.size(); i++)
        table[i] = (int32_t)((i * 7919) % table.size()); /* a prime: every page once */
    rows.n_max = n;
    rows.n = own(upload(live));
    rows.max_context = max_context;
    rows.slot = own(upload(slot));
    rows.position = own(upload(position));
    rows.dense = own(upload(dense));
    rows.write = own(upload(write));
    rows.page_table = own(upload(table));
    rows.max_pages = max_pages;
    q = own(allocate<uint16_t>((size_t)n * heads * D_Q));
    out = own(allocate<uint16_t>((size_t)n * heads * D_V));
    w = own(allocate<uint16_t>((size_t)heads * 256 * D_LATENT));
    fill_rows<<<n, 256>>>(q, rows.slot, rows.position, heads, q_scale);
    fill_bf16<<<1024, 256>>>(w, (size_t)heads * 256 * D_LATENT, 0.1f, 78);
    CHECK_CUDA(cudaGetLastError());
    a.rows = &rows;
    a.step = step;
    a.n_spans = (int)spans.size();
    a.q = q;
    a.n_heads = heads;
    a.scale = 0.07216878f * 1.6f;
    a.w_kv = w;
    a.kv.latent = cache;
    a.kv.dtype = fp8 ? TR_E4M3 : TR_BF16;
    a.kv.n_pages = n_slots * max_pages;
    a.kv.d_latent = D_LATENT;
    a.kv.d_rope = 64;
    a.out = out;
    a.workspace_bytes = tr_cuda_dense_mha_hopper_workspace(n, a.n_spans, heads, n_keys);
    a.workspace = own(allocate<uint8_t>(a.workspace_bytes));
}

/* ---- fp64: one block per (row, head) ------------------------------------------------------------------------------------ */

__device__ double block_reduce(double x, double *tmp, bool max)
{
    tmp[threadIdx.x] = x;
    __syncthreads();
    for (int s = 128; s; s /= 2) {
        if (threadIdx.x < s) {
            double y = tmp[threadIdx.x + s];
            tmp[threadIdx.x] = max ? fmax(tmp[threadIdx.x], y) : tmp[threadIdx.x] + y;
        }
        __syncthreads();
    }
    x = tmp[0];
    __syncthreads();
    return x;
}
__device__ double latent(const uint8_t *row, int fp8, int i)
{
    if (!fp8) return from_bf16(((const uint16_t *)(const void *)row)[i]);
    if (i >= D_LATENT)
        return from_bf16(((const uint16_t *)(const void *)(row + 528))[i - D_LATENT]);
    return (double)from_e4m3(row[i]) * ((const float *)(const void *)(row + D_LATENT))[i / 128];
}

__global__ void __launch_bounds__(256)
    reference(double2 *result, const int2 *which, tr_rows rows, const uint16_t *q,
              const uint16_t *w, const uint8_t *cache, int fp8, int heads, double scale,
              const uint16_t *out)
{
    __shared__ double qa[576], u[D_LATENT], p[2048], tmp[256];
    int row = which[blockIdx.x].x, head = which[blockIdx.x].y, n = rows.position[row] + 1;
    const uint16_t *qr = q + ((size_t)row * heads + head) * D_Q;
    const uint16_t *wk = w + (size_t)head * 256 * D_LATENT, *wv = wk + 128 * D_LATENT;
    const int32_t *pages = rows.page_table + (size_t)rows.slot[row] * rows.max_pages;
    auto record = [&](int s) {
        return cache + ((size_t)pages[s / PAGE] * PAGE + s % PAGE) * (fp8 ? 656 : 1152);
    };

    for (int i = (int)threadIdx.x; i < 576; i += 256) {
        double x = 0;
        for (int d = 0; d < 128 && i < D_LATENT; d++)
            x += (double)from_bf16(qr[d]) * from_bf16(wk[(size_t)d * D_LATENT + i]);
        qa[i] = i < D_LATENT ? x : from_bf16(qr[128 + i - D_LATENT]);
    }
    __syncthreads();
    double max = -INFINITY, sum = 0;
    for (int s = (int)threadIdx.x; s < n; s += 256) {
        double x = 0;
        for (int i = 0; i < 576; i++)
            x += qa[i] * latent(record(s), fp8, i);
        p[s] = x * scale;
        max = fmax(max, p[s]);
    }
    max = block_reduce(max, tmp, true);
    for (int s = (int)threadIdx.x; s < n; s += 256)
        sum += p[s] = exp(p[s] - max);
    sum = block_reduce(sum, tmp, false);
    for (int i = (int)threadIdx.x; i < D_LATENT; i += 256) {
        double x = 0;
        for (int s = 0; s < n; s++)
            x += p[s] * latent(record(s), fp8, i);
        u[i] = x / sum;
    }
    __syncthreads();
    double error = 0, norm = 0;
    if (threadIdx.x < D_V) {
        double x = 0;
        for (int i = 0; i < D_LATENT; i++)
            x += from_bf16(wv[(size_t)threadIdx.x * D_LATENT + i]) * u[i];
        double d = (double)from_bf16(out[((size_t)row * heads + head) * D_V + threadIdx.x]) - x;
        error = d * d;
        norm = x * x;
    }
    error = block_reduce(error, tmp, false);
    norm = block_reduce(norm, tmp, false);
    if (threadIdx.x == 0) result[blockIdx.x] = {error, norm};
}

/* Largest relative error over some rows and heads. Allowed: 2^-8 for values, probabilities and outputs in bf16; and for keys in
 * bf16, which put a score off by about 2^-10 of its deviation (that of a product of 192 numbers: 0.644 for q in [-1, 1), key
 * numbers of deviation 0.75 and 0.58 and the scale below), four times that for the worst row of some hundred, since where two
 * keys share a row it goes straight into their probabilities. */
double check(setup &s, const std::string &name, int n_samples)
{
    double allowed = 0x1p-8 + 4 * 0x1p-10 * 0.644 * (double)s.q_size;
    std::vector<int2> which;
    std::vector<int> dense;
    double worst = 0;

    for (int i = 0; i < s.n; i++)
        if (s.dense[(size_t)i] && s.write[(size_t)i] >= 0) dense.push_back(i);
    if (dense.empty()) return 0;
    for (int i = 0; i < n_samples; i++) {
        int r = i < 40 ? (int)((long long)(dense.size() - 1) * i / 39)
                       : (int)(measure::mix((unsigned)i) % dense.size());
        which.push_back(make_int2(dense[(size_t)r], i % s.n_heads));
    }
    int2 *which_d = upload(which);
    double2 *d = allocate<double2>(which.size());
    std::vector<double2> h(which.size());
    reference<<<(unsigned)which.size(), 256>>>(d, which_d, s.rows, s.q, s.w,
                                               (const uint8_t *)s.a.kv.latent, s.fp8, s.n_heads,
                                               (double)s.a.scale, s.out);
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaMemcpy(h.data(), d, h.size() * sizeof(double2), cudaMemcpyDeviceToHost));
    cudaFree(which_d), cudaFree(d);
    for (size_t i = 0; i < h.size(); i++) {
        double e = sqrt(h[i].x / h[i].y);
        if (!(e <= allowed)) {
            fail(name + ": row " + std::to_string(which[i].x) + " (position " +
                 std::to_string(s.position[(size_t)which[i].x]) + ") head " +
                 std::to_string(which[i].y) + ": relative error " + std::to_string(e));
            return e;
        }
        worst = std::max(worst, e);
    }
    return worst;
}

/* Rows of `part` in its own output and in that of `whole`, found by slot and position: the same bits. */
void compare(setup &part, const std::vector<uint16_t> &got, setup &whole,
             const std::vector<uint16_t> &want, const std::string &name)
{
    size_t row = (size_t)part.n_heads * D_V;
    for (int i = 0; i < part.n; i++)
        for (int k = 0; k < whole.n; k++) {
            if (whole.slot[(size_t)k] != part.slot[(size_t)i] ||
                whole.position[(size_t)k] != part.position[(size_t)i] || !whole.dense[(size_t)k] ||
                whole.write[(size_t)k] < 0)
                continue;
            if (memcmp(&got[(size_t)i * row], &want[(size_t)k * row], 2 * row)) {
                fail(name + ": bits differ, slot " + std::to_string(part.slot[(size_t)i]) +
                     " position " + std::to_string(part.position[(size_t)i]));
                return;
            }
        }
}

void check_shape(const std::vector<span> &spans, int heads, int fp8, uint8_t *cache, int max_pages,
                 int n_slots, float q_scale, const std::string &name)
{
    setup s(spans, heads, fp8, cache, max_pages, n_slots, 32768, q_scale);
    std::string what = name + " h=" + std::to_string(heads) + (fp8 ? " fp8" : " bf16");
    size_t row = (size_t)heads * D_V;

    s.poison();
    s.run();
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<uint16_t> first = s.fetch();
    double e = check(s, what, 200);
    for (int i = 0; i < s.n; i++) {
        if (s.dense[(size_t)i] && s.write[(size_t)i] >= 0) continue;
        uint16_t want = s.dense[(size_t)i] ? 0 : 0xffff;
        for (size_t k = 0; k < row; k++)
            if (first[(size_t)i * row + k] != want) {
                fail(what + ": row " + std::to_string(i) + " that is not its own");
                break;
            }
    }
    s.poison();
    s.run();
    if (s.fetch() != first) fail(what + ": two runs differ");
    {
        setup small(spans, heads, fp8, cache, max_pages, n_slots, s.max_context + 1024, q_scale);
        small.poison();
        small.run();
        if (small.fetch() != first) fail(what + ": several rounds differ from one");
    }
    int cut = 0;
    for (const span &x : spans) { /* alone, and cut in two */
        if (x.kind || cut++ > 4) continue;
        int at = x.n / 3 + 1;
        std::vector<span> pieces = {{x.slot, x.position, std::min(at, x.n), 0}};
        if (at < x.n) pieces.push_back({x.slot, x.position + at, x.n - at, 0});
        for (const span &p : pieces) {
            setup alone({p}, heads, fp8, cache, max_pages, n_slots, 32768, q_scale);
            alone.poison();
            alone.run();
            compare(alone, alone.fetch(), s, first, what);
        }
        for (int step : {2, 4}) /* dealt out */
            for (int m = 0; m < step && m < x.n; m++) {
                setup part({{x.slot, x.position + m, (x.n - m + step - 1) / step, 0}}, heads, fp8,
                           cache, max_pages, n_slots, 32768, q_scale, step);
                part.poison();
                part.run();
                compare(part, part.fetch(), s, first, what + ", dealt out");
            }
    }
    printf("checked %-34s %4d rows: relative error %.2e\n", what.c_str(), s.n, e);
}

uint8_t *make_cache(size_t n_rows, int fp8)
{
    uint8_t *cache = allocate<uint8_t>(n_rows * (size_t)(fp8 ? 656 : 1152));
    fill_cache<<<4096, 128>>>(cache, n_rows, fp8, 1234);
    CHECK_CUDA(cudaGetLastError());
    return cache;
}

/* More rounds than a window of the plan has room for, and more than 7 bits count: the bits of one round. */
void check_rounds(int fp8)
{
    const int n = 1100, pages = 2, heads = 2;
    uint8_t *cache = make_cache((size_t)pages * n * PAGE, fp8);
    std::vector<span> spans;
    for (int i = 0; i < n; i++)
        spans.push_back({i, (i * 37) % 120, 1 + i % 7, 0});
    setup whole(spans, heads, fp8, cache, pages, n, n * 128, 1.0f);
    whole.poison();
    whole.run();
    std::vector<uint16_t> want = whole.fetch();
    double e = check(whole, "rounds", 200);
    for (int keys : {128, 384, 1024}) { /* 1100, 367 and 138 rounds */
        setup narrow(spans, heads, fp8, cache, pages, n, keys, 1.0f);
        narrow.poison();
        narrow.run();
        if (narrow.fetch() != want)
            fail("rounds of " + std::to_string(keys) + " keys differ from one");
    }
    printf("checked %-34s %4d rows: relative error %.2e\n", fp8 ? "rounds fp8" : "rounds bf16",
           whole.n, e);
    cudaFree(cache);
}

void check_all(bool small)
{
    const int pages = 32, slots = 24;
    std::vector<span> edges,
        mixed = {{0, 0, 700, 0}, {1, 5, 1, 1},     {2, 1000, 300, 0}, {3, 0, 1, 0},
                 {4, 63, 66, 0}, {5, 2047, 1, 0},  {6, 0, 128, 0},    {7, 0, 3, 2},
                 {8, 1, 129, 0}, {9, 1919, 129, 0}};
    int at = 0;
    for (int n : {1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257})
        edges.push_back({at++, 0, n, 0});
    for (int fp8 = 1; fp8 >= 0; fp8--) {
        uint8_t *cache = make_cache((size_t)pages * slots * PAGE, fp8);
        if (small) {
            check_shape({{0, 0, 130, 0}, {1, 100, 30, 0}, {2, 0, 2, 1}}, 2, fp8, cache, pages,
                        slots, 1.0f, "small");
            cudaFree(cache);
            continue;
        }
        check_rounds(fp8);
        for (int heads : {1, 5, 16, 40}) {
            check_shape(edges, heads, fp8, cache, pages, slots, 1.0f, "edges");
            check_shape(mixed, heads, fp8, cache, pages, slots, 1.0f, "mixed");
        }
        check_shape({{0, 0, 2047, 0}, {1, 0, 2048, 0}}, 128, fp8, cache, pages, slots, 1.0f,
                    "long");
        check_shape(mixed, 16, fp8, cache, pages, slots, 0.0f, "equal scores");
        check_shape(mixed, 16, fp8, cache, pages, slots, 8.0f, "sharp");
        check_shape({{0, 0, 3, 1}, {1, 0, 2, 2}}, 16, fp8, cache, pages, slots, 1.0f, "none dense");
        std::vector<span> many;
        for (int i = 0; i < 24; i++)
            many.push_back({i, (i * 83) % 1900, 1 + i % 3, 0});
        check_shape(many, 16, fp8, cache, pages, slots, 1.0f, "many short");
        cudaFree(cache);
    }
}

void time_shape(measure::cold_timer &timer, uint8_t *cache, int n_prompts, int n, int heads)
{
    std::vector<span> spans;
    for (int i = 0; i < n_prompts; i++)
        spans.push_back({i, 0, n, 0});
    setup s(spans, heads, 1, cache, 32, 64, n_prompts * ((n + 127) / 128 * 128), 1.0f);
    double us = timer.median_us([&] { s.run(); }, 11);
    s.poison();
    s.run();
    double e = check(s, "timed", 64);
    double attention = 2.0 * heads * (D_Q + D_V) * 0.5 * n * (n + 1.0) * n_prompts;
    double keys = 2.0 * heads * 256 * D_LATENT * n * n_prompts;
    printf("%2d x %4d, %3d heads %10.1f us %9.0f TFLOP/s in all (attention %.0f GFLOP, keys and "
           "values %.0f)  error %.1e\n",
           n_prompts, n, heads, us, (attention + keys) / us * 1e-6, attention * 1e-9, keys * 1e-9,
           e);
}

} // namespace

int main(int argc, char **argv)
{
    std::string only = argc > 1 ? argv[1] : "";
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) {
        fprintf(stderr, "bench_dense_mha: no GPU\n");
        return 77;
    }
    if (only != "one") check_all(only == "check");
    printf(n_failed ? "%d checks FAILED\n" : "all checks passed\n", n_failed);
    if (only == "check" || n_failed) return n_failed != 0;
    uint8_t *cache = make_cache((size_t)64 * 2048, 1);
    if (only == "one") {
        int rows = argc > 2 ? atoi(argv[2]) : 2048;
        setup s({{0, 0, rows, 0}, {1, 0, rows, 0}}, 128, 1, cache, 32, 64, 4096, 1.0f);
        s.run();
        CHECK_CUDA(cudaDeviceSynchronize());
    } else {
        measure::cold_timer timer;
        for (int heads : {128, 16}) {
            time_shape(timer, cache, 1, 512, heads);
            time_shape(timer, cache, 1, 2048, heads);
            time_shape(timer, cache, 2, 2048, heads);
            time_shape(timer, cache, 4, 1024, heads);
            time_shape(timer, cache, 16, 256, heads);
            time_shape(timer, cache, 64, 64, heads);
        }
    }
    cudaFree(cache);
    return n_failed != 0;
}
