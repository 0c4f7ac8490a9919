/* Checks and times the FP8 products (gemm_fp8.h, quantise.h) on one Hopper GPU: every tile shape against fp64 on random
 * and hostile sizes, bits equal between shapes and numbers of rows, then the shapes of the model beside cuBLASLt.
 * Arguments pick parts: quick (checks on small sizes; alone: for compute-sanitizer), dense, moe, all_experts
 * (timing); none: all.
 * one ROWS SHAPE: one launch of gate_up and one of down, 32 experts of ROWS rows (for a profiler).
 * Exit 1 when a check fails. */
#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/gemm_cublas.h"
#include "kernels/cuda/gemm_fp8.h"
#include "kernels/cuda/quantise.h"
#include "tests/cuda/measure.cuh"

namespace
{

int n_failed;

void expect(bool ok, const char *what, const char *shape, double value)
{
    if (ok) return;
    n_failed++;
    printf("FAILED: %s, %s: %g\n", what, shape, value);
}

/* ---- device memory ------------------------------------------------------------------------------------------------ */

template <class T> struct buffer {
    T *p = nullptr;
    size_t n;
    explicit buffer(size_t count) : n(count)
    {
        CHECK_CUDA(cudaMalloc(&p, (n + 64) * sizeof(T)));
    }
    buffer(const buffer &) = delete;
    ~buffer()
    {
        cudaFree(p);
    }
    void fill(int byte)
    {
        CHECK_CUDA(cudaMemset(p, byte, (n + 64) * sizeof(T)));
    }
    void put(const std::vector<T> &v)
    {
        CHECK_CUDA(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get() const
    {
        std::vector<T> v(n);
        CHECK_CUDA(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

__global__ void fill_bf16(__nv_bfloat16 *p, size_t n, unsigned long long seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = __float2bfloat16(measure::uniform(seed, i));
}
__global__ void fill_e4m3(uint8_t *p, size_t n, unsigned long long seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = (uint8_t)__nv_cvt_float_to_fp8(448.0f * measure::uniform(seed, i), __NV_SATFINITE,
                                              __NV_E4M3);
}
__global__ void fill_scale(float *p, size_t n, unsigned long long seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = (1.0f + 0.5f * measure::uniform(seed, i)) * 1e-4f;
}

struct weight {
    buffer<uint8_t> q;
    buffer<float> scale;
    tr_fp8_weight w;
    weight(int n_mats, int n_out, int n_in, int seed)
        : q((size_t)n_mats * n_out * n_in),
          scale((size_t)n_mats * ((n_out + 127) / 128) * tr_fp8_scale_pitch(n_in))
    {
        fill_e4m3<<<1024, 256>>>(q.p, q.n, seed);
        fill_scale<<<64, 256>>>(scale.p, scale.n, seed + 1);
        w = {q.p, scale.p, n_mats, n_out, n_in};
    }
};
struct rows {
    buffer<uint8_t> q;
    buffer<float> scale;
    buffer<int32_t> n;
    tr_fp8_rows x;
    rows(int n_max, int n_live, int d, int seed, bool random = true)
        : q((size_t)n_max * d), scale((size_t)((d + 127) / 128) * ((n_max + 3) / 4 * 4)), n(1)
    {
        n.put({n_live});
        q.fill(0x7f); /* NaN wherever nothing is written */
        scale.fill(0xff);
        x = {q.p, scale.p, n.p, n_max};
        if (!random) return;
        buffer<__nv_bfloat16> b((size_t)n_max * d);
        fill_bf16<<<1024, 256>>>(b.p, b.n, seed);
        CHECK_CUDA(tr_quantise_rows(b.p, (size_t)d, n.p, n_max, d, 1, q.p, scale.p, 0));
        CHECK_CUDA(cudaDeviceSynchronize());
    }
};

/* ---- references ------------------------------------------------------------------------------------------------------ */

__device__ double e4m3_value(uint8_t b)
{
    __nv_fp8_e4m3 v;
    v.__x = b;
    return (double)(float)v;
}

/* One product in double precision: row r of x, row o of matrix m, scale row s of w. */
__device__ double product(const tr_fp8_weight &w, const tr_fp8_rows &x, int pitch, int m, int o,
                          int s, int r)
{
    const int blocks = (w.n_out + 127) / 128, ld = (x.n_max + 3) / 4 * 4;
    const uint8_t *wq = w.q_d + ((size_t)m * w.n_out + o) * w.n_in;
    const uint8_t *xq = x.q_d + (size_t)r * w.n_in;
    double sum = 0;
    for (int k0 = 0; k0 < w.n_in; k0 += 128) {
        double part = 0;
        for (int k = k0; k < min(k0 + 128, w.n_in); k++)
            part += e4m3_value(wq[k]) * e4m3_value(xq[k]);
        sum += part * (double)w.scale_d[((size_t)m * blocks + s) * pitch + k0 / 128] *
               (double)x.scale_d[(size_t)(k0 / 128) * ld + r];
    }
    return sum;
}

/* error[0]: sum of squared differences, [1]: of squared references, [2]: outputs that are not finite. Every output when
 * n_samples is 0, else random ones. group of row r: start (NULL: matrix 0); output row: scatter. */
__global__ void compare(tr_fp8_weight w, tr_fp8_rows x, int pitch, int n, const int32_t *start,
                        const int32_t *scatter, const void *out, size_t ld_out, int out_f32,
                        unsigned n_samples, double *error)
{
    const size_t all = n_samples ? n_samples : (size_t)n * w.n_out;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < all;
         i += (size_t)gridDim.x * blockDim.x) {
        const size_t at = n_samples ? measure::mix(i) % ((size_t)n * w.n_out) : i;
        const int r = (int)(at / w.n_out), o = (int)(at % w.n_out);
        int m = 0;
        if (start)
            while (start[m + 1] <= r)
                m++;
        const size_t to = (size_t)(scatter ? scatter[r] : r) * ld_out + o;
        const double ref = product(w, x, pitch, m, o, o / 128, r);
        const double got = out_f32 ? ((const float *)out)[to]
                                   : (double)__bfloat162float(((const __nv_bfloat16 *)out)[to]);
        if (!isfinite(got)) {
            atomicAdd(error + 2, 1.0);
            continue;
        }
        atomicAdd(error, (got - ref) * (got - ref));
        atomicAdd(error + 1, ref * ref);
    }
}
__global__ void count_not_finite(const uint16_t *p, size_t n, double *error)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        if ((p[i] & 0x7f80) == 0x7f80) atomicAdd(error + 2, 1.0);
}
/* Relative error; infinite where an output is missing. */
double relative_error(const tr_fp8_weight &w, const tr_fp8_rows &x, int n, const int32_t *start,
                      const int32_t *scatter, const void *out, size_t ld_out, int out_f32,
                      unsigned n_samples)
{
    if (n == 0) return 0;
    buffer<double> e(3);
    e.fill(0);
    compare<<<1024, 128>>>(w, x, tr_fp8_scale_pitch(w.n_in), n, start, scatter, out, ld_out,
                           out_f32, n_samples, e.p);
    if (!out_f32 && ld_out == (size_t)w.n_out)
        count_not_finite<<<1024, 256>>>((const uint16_t *)out, (size_t)n * w.n_out, e.p);
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<double> h = e.get();
    return h[2] > 0 ? INFINITY : sqrt(h[0] / h[1]);
}

/* The interleaved gate and up rows: h = silu(g) u in double, against q * scale. worst[0]: error over what one rounding to
 * e4m3 may do; worst[1]: how far scale * 448 lies below the largest, worst[2]: above twice of it. */
__global__ void compare_gate_up(tr_fp8_weight w, tr_fp8_rows x, int pitch, const int32_t *start,
                                int n, const uint8_t *q, const float *scale, double *worst)
{
    __shared__ double most;
    const int d = w.n_out / 2, r = (int)blockIdx.y, b = (int)blockIdx.x, i = (int)threadIdx.x;
    const int inner = b * 128 + i, ld = (n + 3) / 4 * 4;
    int m = 0;
    while (start[m + 1] <= r)
        m++;
    const int row = inner / 8 * 16 + inner % 8;
    const double g = product(w, x, pitch, m, row, inner / 128, r);
    const double u = product(w, x, pitch, m, row + 8, (d + inner) / 128, r);
    const double h = g / (1 + exp(-g)) * u;
    if (i == 0) most = 1e-4;
    __syncthreads();
    atomicMax((unsigned long long *)&most, (unsigned long long)__double_as_longlong(fabs(h)));
    __syncthreads();
    const double s = scale[(size_t)b * ld + r], got = s * e4m3_value(q[(size_t)r * d + inner]);
    const double may = fmax(fabs(h) / 16, s / 1024) + 1e-3 * most;
    double bad[3] = {fabs(got - h) / may, most / (448 * s), 448 * s / (2 * most)};
    for (int j = 0; j < 3; j++)
        if (isnan(bad[j])) bad[j] = 1e300;
    for (int j = 0; j < 3; j++)
        atomicMax((unsigned long long *)worst + j,
                  (unsigned long long)__double_as_longlong(bad[j]));
}

__global__ void count_different(const uint32_t *a, const uint32_t *b, size_t words,
                                unsigned long long *n)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < words;
         i += (size_t)gridDim.x * blockDim.x)
        if (a[i] != b[i]) atomicAdd(n, 1ull);
}
double different(const void *a, const void *b, size_t bytes)
{
    buffer<unsigned long long> n(1);
    n.fill(0);
    count_different<<<1024, 256>>>((const uint32_t *)a, (const uint32_t *)b, bytes / 4, n.p);
    CHECK_CUDA(cudaDeviceSynchronize());
    return (double)n.get()[0];
}

/* ---- checks ------------------------------------------------------------------------------------------------------------- */

/* Nearest e4m3, ties to even, saturating: by search, independent of the conversion instructions. */
uint8_t nearest_e4m3(double x)
{
    double best = INFINITY;
    int code = 0;
    for (int c = 0; c < 127; c++) {
        const int e = c >> 3, f = c & 7;
        const double v = e ? ldexp(8 + f, e - 10) : ldexp(f, -9);
        const double off = fabs(fabs(x) - v);
        if (off < best || (off == best && c % 2 == 0)) {
            best = off;
            code = c;
        }
    }
    return (uint8_t)(code | (std::signbit(x) ? 128 : 0));
}

void check_quantise(int n, int n_max, int d, int ue8m0)
{
    buffer<__nv_bfloat16> x((size_t)n_max * d);
    buffer<uint8_t> q((size_t)n_max * d);
    const int blocks = (d + 127) / 128, ld = (n_max + 3) / 4 * 4;
    buffer<float> scale((size_t)blocks * ld);
    buffer<int32_t> live(1);
    live.put({n});
    fill_bf16<<<64, 256>>>(x.p, x.n, 5);
    std::vector<__nv_bfloat16> hx = x.get();
    for (int i = 0; i < d && n_max > 2; i++) {
        hx[(size_t)1 * d + i] = __float2bfloat16(0.0f);
        hx[(size_t)2 * d + i] = __float2bfloat16(i % 97 == 3 ? 3e4f : -448.0f * (float)(i % 5));
    }
    x.put(hx);
    q.fill(0xaa);
    scale.fill(0xaa);
    CHECK_CUDA(tr_quantise_rows(x.p, (size_t)d, live.p, n_max, d, ue8m0, q.p, scale.p, 0));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<uint8_t> hq = q.get();
    std::vector<float> hs = scale.get();
    int wrong = 0;
    for (int r = 0; r < n_max; r++) {
        for (int b = 0; b < blocks; b++) {
            float amax = 1e-4f, s;
            const int end = std::min(d, b * 128 + 128);
            for (int i = b * 128; i < end; i++)
                amax = std::max(amax, fabsf(__bfloat162float(hx[(size_t)r * d + i])));
            s = ue8m0 ? exp2f(ceilf(log2f(amax * (1.0f / 448.0f)))) : amax / 448.0f;
            uint32_t poison = 0xaaaaaaaa, bits;
            memcpy(&bits, &hs[(size_t)b * ld + r], 4);
            wrong += r < n ? hs[(size_t)b * ld + r] != s : bits != poison;
            for (int i = b * 128; i < end; i++) {
                const float v = __bfloat162float(hx[(size_t)r * d + i]) / s;
                wrong += hq[(size_t)r * d + i] != (r < n ? nearest_e4m3(v) : 0xaa);
            }
        }
    }
    char name[64];
    snprintf(name, sizeof name, "n %d of %d, d %d, ue8m0 %d", n, n_max, d, ue8m0);
    expect(wrong == 0, "quantise: wrong numbers", name, wrong);
}

/* Every tile shape on one problem: error, untouched rows, bits equal to the last shape's. */
void check_dense(const tr_gemm_fp8 *g, int n_out, int n_in, int n_max, int n, int out_f32)
{
    weight w(1, n_out, n_in, 11);
    rows x(n_max, n, n_in, 13);
    const size_t ld = (size_t)n_out + (n_out % 8 ? 0 : 8), bytes = out_f32 ? 4 : 2;
    buffer<uint8_t> first((size_t)n_max * ld * bytes), out((size_t)n_max * ld * bytes);
    for (int s = 0; tr_gemm_fp8_shape_name(s); s++) {
        char name[96];
        snprintf(name, sizeof name, "%s on %d of %d rows, %d x %d%s", tr_gemm_fp8_shape_name(s), n,
                 n_max, n_out, n_in, out_f32 ? " f32" : "");
        out.fill(0xff);
        CHECK_CUDA(tr_gemm_fp8_dense_as(g, s, &w.w, &x.x, out.p, ld, out_f32, 0));
        CHECK_CUDA(cudaDeviceSynchronize());
        const double e = relative_error(w.w, x.x, n, nullptr, nullptr, out.p, ld, out_f32, 0);
        expect(e < (out_f32 ? 1e-3 : 3e-3), "dense: relative error", name, e);
        if (s == 0) {
            CHECK_CUDA(cudaMemcpy(first.p, out.p, out.n, cudaMemcpyDeviceToDevice));
            std::vector<uint8_t> h = out.get();
            size_t touched = 0;
            for (size_t i = 0; i < h.size(); i++)
                if (i / bytes / ld >= (size_t)n || i / bytes % ld >= (size_t)n_out)
                    touched += h[i] != 0xff;
            expect(touched == 0, "dense: bytes outside written", name, (double)touched);
        } else {
            const double off = different(first.p, out.p, out.n);
            expect(off == 0, "dense: words unlike the first shape's", name, off);
        }
    }
}

struct grouped {
    int n, d, d_inner, k;
    std::vector<int32_t> start, pair;
    weight up, down;
    rows sorted, inner;
    buffer<int32_t> start_d, pair_d;
    buffer<__nv_bfloat16> out;
    static int sum(const std::vector<int> &c)
    {
        int s = 0;
        for (int v : c)
            s += v;
        return s;
    }
    grouped(const std::vector<int> &count, int d_, int d_inner_)
        : n(sum(count)), d(d_), d_inner(d_inner_), k(8), up((int)count.size(), 2 * d_inner, d, 21),
          down((int)count.size(), d, d_inner, 23), sorted(n, n, d, 25, false),
          inner(n, n, d_inner, 27, false), start_d(count.size() + 1), pair_d((size_t)n),
          out((size_t)n * d)
    {
        start.push_back(0);
        for (int c : count)
            start.push_back(start.back() + c);
        /* A permutation of the pairs of ceil(n / k) rows, ascending inside an expert as tr_moe_pack leaves them. */
        for (int i = 0; i < n; i++)
            pair.push_back(i);
        for (int i = n - 1; i > 0; i--)
            std::swap(pair[i], pair[measure::mix(i) % (unsigned)(i + 1)]);
        for (size_t e = 0; e < count.size(); e++)
            std::sort(pair.begin() + start[e], pair.begin() + start[e + 1]);
        start_d.put(start);
        pair_d.put(pair);
        const int n_rows = (n + k - 1) / k;
        rows x(n_rows, n_rows, d, 29);
        CHECK_CUDA(tr_moe_gather_fp8(&x.x, d, k, (int)count.size(), start_d.p, pair_d.p, n,
                                     sorted.q.p, sorted.scale.p, 0));
        CHECK_CUDA(cudaDeviceSynchronize());
    }
    void run(const tr_gemm_fp8 *g, int shape)
    {
        inner.q.fill(0x7f);
        inner.scale.fill(0xff);
        out.fill(0xff);
        CHECK_CUDA(tr_gemm_fp8_gate_up_as(g, shape, &up.w, &sorted.x, start_d.p, 1, inner.q.p,
                                          inner.scale.p, 0));
        CHECK_CUDA(cudaDeviceSynchronize());
        CHECK_CUDA(tr_gemm_fp8_down_as(g, shape, &down.w, &inner.x, start_d.p, pair_d.p, out.p, 0));
        CHECK_CUDA(cudaDeviceSynchronize());
    }
};

void check_gather(const grouped &t)
{
    const int n_rows = (t.n + t.k - 1) / t.k;
    rows x(n_rows, n_rows, t.d, 29);
    std::vector<uint8_t> a = x.q.get(), b = t.sorted.q.get();
    std::vector<float> sa = x.scale.get(), sb = t.sorted.scale.get();
    const int lda = (n_rows + 3) / 4 * 4, ldb = (t.n + 3) / 4 * 4;
    int wrong = 0;
    for (int i = 0; i < t.n; i++) {
        const int r = t.pair[i] / t.k;
        wrong += memcmp(&a[(size_t)r * t.d], &b[(size_t)i * t.d], (size_t)t.d) != 0;
        for (int kb = 0; kb < t.d / 128; kb++)
            wrong += sa[(size_t)kb * lda + r] != sb[(size_t)kb * ldb + i];
    }
    expect(wrong == 0, "gather: wrong rows", "", wrong);
}

void check_grouped(const tr_gemm_fp8 *g, const std::vector<int> &count, int d, int d_inner)
{
    grouped t(count, d, d_inner);
    char name[64];
    buffer<uint8_t> q(t.inner.q.n);
    buffer<float> scale(t.inner.scale.n);
    buffer<__nv_bfloat16> out(t.out.n);
    check_gather(t);
    for (int shape = 0; tr_gemm_fp8_moe_shape_name(shape); shape++) {
        snprintf(name, sizeof name, "%s, %d rows of %d experts", tr_gemm_fp8_moe_shape_name(shape),
                 t.n, (int)count.size());
        t.run(g, shape);
        if (shape == 0) {
            buffer<double> worst(3);
            worst.fill(0);
            compare_gate_up<<<dim3((unsigned)(d_inner / 128), (unsigned)t.n), 128>>>(
                t.up.w, t.sorted.x, tr_fp8_scale_pitch(d), t.start_d.p, t.n, t.inner.q.p,
                t.inner.scale.p, worst.p);
            CHECK_CUDA(cudaDeviceSynchronize());
            std::vector<double> h = worst.get();
            expect(h[0] <= 1, "gate_up: error over the rounding's", name, h[0]);
            expect(h[1] <= 1.001 && h[2] <= 1.001, "gate_up: scale", name, std::max(h[1], h[2]));
            const double e = relative_error(t.down.w, t.inner.x, t.n, t.start_d.p, t.pair_d.p,
                                            t.out.p, (size_t)d, 0, 0);
            expect(e < 3e-3, "down: relative error", name, e);
            CHECK_CUDA(cudaMemcpy(q.p, t.inner.q.p, q.n, cudaMemcpyDeviceToDevice));
            CHECK_CUDA(cudaMemcpy(scale.p, t.inner.scale.p, scale.n * 4, cudaMemcpyDeviceToDevice));
            CHECK_CUDA(cudaMemcpy(out.p, t.out.p, out.n * 2, cudaMemcpyDeviceToDevice));
        } else {
            expect(different(q.p, t.inner.q.p, q.n) == 0, "gate_up: bits by shape", name, 0);
            expect(different(scale.p, t.inner.scale.p, scale.n * 4) == 0, "scales by shape", name,
                   0);
            expect(different(out.p, t.out.p, out.n * 2) == 0, "down: bits by shape", name, 0);
        }
    }
}

void check_small(const tr_gemm_fp8 *g)
{
    check_quantise(37, 41, 1408, 1);
    check_quantise(37, 41, 1408, 0);
    check_quantise(1, 1, 8, 1);
    check_quantise(0, 5, 256, 1);
    const struct {
        int n_out, n_in, n_max, n;
    } dense[] = {{576, 384, 300, 257}, {64, 128, 1, 1},     {40, 144, 3, 2},  {2112, 512, 130, 129},
                 {129, 256, 64, 63},   {200, 4352, 65, 65}, {256, 128, 9, 0}, {1000, 640, 17, 16}};
    for (const auto &p : dense)
        check_dense(g, p.n_out, p.n_in, p.n_max, p.n, 0);
    check_dense(g, 72, 256, 33, 33, 1);
    check_grouped(g, {0, 1, 17, 130, 64, 0, 300, 33}, 256, 128);
    check_grouped(g, {97, 288, 1, 289, 193, 96, 4, 577, 191, 257}, 896, 384);
    check_grouped(g, {3}, 384, 256);
    check_grouped(g, {0, 0, 5, 0}, 128, 384);
}

/* ---- timing ------------------------------------------------------------------------------------------------------------- */

__global__ void read_all(const uint4 *p, size_t n, uint4 *out)
{
    uint4 s = {};
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        const uint4 v = __ldcs(p + i);
        s.x ^= v.x, s.y ^= v.y, s.z ^= v.z, s.w ^= v.w;
    }
    if (s.x == 0x12345678 && s.y == 0x9abcdef0) *out = s;
}

/* Peers: kernels.md 10, measured on one H200. */
struct dense_case {
    int n_out, n_in;
    double tflops_4096, us_16, us_128;
};
const dense_case dense_cases[] = {{2112, 7168, 1291, 13.2, 13.1},
                                  {24576, 1536, 1332, 19.3, 19.4},
                                  {7168, 16384, 1507, 43.6, 46.5},
                                  {4096, 7168, 1404, 17.0, 18.0},
                                  {7168, 2048, 1252, 10.9, 12.2}};

void line(const char *shape, double us, double flops, double bytes, double peer_us, double error)
{
    printf("%-44s %8.1f us %7.0f TFLOP/s %6.2f TB/s", shape, us, flops / us * 1e-6,
           bytes / us * 1e-6);
    if (peer_us > 0) printf("  peer %7.1f us, %.2f of its speed", peer_us, peer_us / us);
    if (error >= 0) printf("  error %.1e", error);
    printf("\n");
}

void time_cublas(measure::cold_timer &timer, const dense_case &c, const weight &w, const rows &x,
                 buffer<uint8_t> &workspace, buffer<__nv_bfloat16> &out)
{
    tr_cublas_fp8 *p = nullptr;
    const int n = x.x.n_max;
    char name[96];
    snprintf(name, sizeof name, "  cuBLASLt m %d, %d x %d", n, c.n_out, c.n_in);
    if (tr_cublas_fp8_create(&p, c.n_out, c.n_in, n, workspace.p, workspace.n) != cudaSuccess) {
        printf("%s: no algorithm\n", name);
        return;
    }
    out.fill(0xff);
    CHECK_CUDA(tr_cublas_fp8_run(p, &w.w, &x.x, out.p, 0));
    const double e = relative_error(w.w, x.x, n, nullptr, nullptr, out.p, (size_t)c.n_out, 0, 8192);
    const double us =
        timer.median_us([&] { CHECK_CUDA(tr_cublas_fp8_run(p, &w.w, &x.x, out.p, 0)); });
    line(name, us, 2.0 * n * c.n_out * c.n_in, (double)c.n_out * c.n_in, 0, e);
    tr_cublas_fp8_free(p);
}

/* Shapes worth timing at m rows. */
bool worth(int shape, int m)
{
    int w_rows = 0, nb = 0;
    sscanf(tr_gemm_fp8_shape_name(shape), "%dx%d", &w_rows, &nb);
    if (m > 128) return w_rows >= 128;
    return w_rows == 64 && nb >= (m < 8 ? 8 : m > 64 ? 64 : m) && nb <= 2 * (m < 8 ? 4 : m);
}

void time_dense(const tr_gemm_fp8 *g, measure::cold_timer &timer, buffer<uint8_t> &workspace,
                const dense_case &c)
{
    weight w(1, c.n_out, c.n_in, 31);
    rows all(4096, 4096, c.n_in, 33);
    buffer<__nv_bfloat16> wide((size_t)4096 * c.n_out), out((size_t)4096 * c.n_out);
    const double flops = 2.0 * c.n_out * c.n_in, bytes = (double)c.n_out * c.n_in;
    for (int m : {4096, 128, 64, 16, 1}) {
        rows x(m, m, c.n_in, 33); /* the first m rows of `all` */
        const int picked = tr_gemm_fp8_pick(g, c.n_out, m);
        const double peer = m == 4096  ? flops * m / c.tflops_4096 * 1e-6
                            : m == 128 ? c.us_128
                            : m == 16  ? c.us_16
                                       : 0;
        for (int s = 0; tr_gemm_fp8_shape_name(s); s++) {
            if (!worth(s, m)) continue;
            char name[96];
            snprintf(name, sizeof name, "%c m %d, %d x %d, %s", s == picked ? '*' : ' ', m, c.n_out,
                     c.n_in, tr_gemm_fp8_shape_name(s));
            out.fill(0xff);
            auto go = [&] {
                CHECK_CUDA(tr_gemm_fp8_dense_as(g, s, &w.w, &x.x, out.p, (size_t)c.n_out, 0, 0));
            };
            go();
            const double e =
                relative_error(w.w, x.x, m, nullptr, nullptr, out.p, (size_t)c.n_out, 0, 8192);
            expect(e < 3e-3, "dense: relative error", name, e);
            if (m == 4096 && wide.n) {
                if (s == picked)
                    CHECK_CUDA(cudaMemcpy(wide.p, out.p, wide.n * 2, cudaMemcpyDeviceToDevice));
            } else {
                const double off = different(wide.p, out.p, (size_t)m * c.n_out * 2);
                expect(off == 0, "dense: words unlike those among 4096 rows", name, off);
            }
            line(name, timer.median_us(go), flops * m, bytes, peer, e);
        }
        if (m >= 16) time_cublas(timer, c, w, x, workspace, out);
    }
}

/* Rows of 32 experts: alike, or up to 30% more or less. */
std::vector<int> rows_each(int each, bool spread)
{
    std::vector<int> count;
    for (int e = 0; e < 32; e++)
        count.push_back(spread ? (int)(each * (1 + 0.3 * measure::uniform(7, (unsigned)e)) + 0.5)
                               : each);
    return count;
}
/* Of 256 experts of which every row takes 8 at random. */
std::vector<int> rows_drawn(int n_rows)
{
    std::vector<int> count(256, 0);
    unsigned long long draw = 0;
    for (int r = 0; r < n_rows; r++) {
        bool taken[256] = {};
        for (int j = 0; j < 8;) {
            const int e = (int)(measure::mix(0x51ull << 32 | draw++) % 256);
            if (taken[e]) continue;
            taken[e] = true;
            count[(size_t)e]++;
            j++;
        }
    }
    return count;
}

void time_grouped(const tr_gemm_fp8 *g, measure::cold_timer &timer, const std::vector<int> &count,
                  double peer_up, double peer_down)
{
    grouped t(count, 7168, 2048);
    buffer<__nv_bfloat16> first(t.out.n);
    buffer<uint8_t> first_q(t.inner.q.n);
    const int n_experts = (int)count.size(), each = t.n / n_experts;
    const int picked = tr_gemm_fp8_moe_pick(n_experts, t.n);
    int hit = 0;
    bool have = false;
    for (int c : count)
        hit += c > 0;
    for (int shape = 0; tr_gemm_fp8_moe_shape_name(shape); shape++) {
        if (shape > 0 && each < 32) continue;
        if (shape == 0 && each > 160) continue;
        char name[96];
        t.run(g, shape);
        const double e = relative_error(t.down.w, t.inner.x, t.n, t.start_d.p, t.pair_d.p, t.out.p,
                                        7168, 0, 8192);
        expect(e < 3e-3, "down: relative error", "timed", e);
        if (have) {
            const double off = different(first.p, t.out.p, t.out.n * 2),
                         off_q = different(first_q.p, t.inner.q.p, t.inner.q.n);
            expect(off == 0, "down: bits by shape", "timed", off);
            expect(off_q == 0, "gate_up: bits by shape", "timed", off_q);
        }
        have = true;
        CHECK_CUDA(cudaMemcpy(first.p, t.out.p, first.n * 2, cudaMemcpyDeviceToDevice));
        CHECK_CUDA(cudaMemcpy(first_q.p, t.inner.q.p, first_q.n, cudaMemcpyDeviceToDevice));
        snprintf(name, sizeof name, "%c gate_up %d x ~%d rows, %s", shape == picked ? '*' : ' ',
                 n_experts, each, tr_gemm_fp8_moe_shape_name(shape));
        line(name,
             timer.median_us(
                 [&] {
                     CHECK_CUDA(tr_gemm_fp8_gate_up_as(g, shape, &t.up.w, &t.sorted.x, t.start_d.p,
                                                       1, t.inner.q.p, t.inner.scale.p, 0));
                 },
                 15),
             2.0 * t.n * 4096 * 7168, (double)hit * 4096 * 7168, peer_up, -1);
        snprintf(name, sizeof name, "%c down    %d x ~%d rows, %s", shape == picked ? '*' : ' ',
                 n_experts, each, tr_gemm_fp8_moe_shape_name(shape));
        line(name,
             timer.median_us(
                 [&] {
                     CHECK_CUDA(tr_gemm_fp8_down_as(g, shape, &t.down.w, &t.inner.x, t.start_d.p,
                                                    t.pair_d.p, t.out.p, 0));
                 },
                 15),
             2.0 * t.n * 7168 * 2048, (double)hit * 7168 * 2048, peer_down, e);
        fflush(stdout);
    }
}

void time_gather(measure::cold_timer &timer, const std::vector<int> &count)
{
    grouped t(count, 7168, 128);
    const int n_rows = (t.n + t.k - 1) / t.k, n_experts = (int)count.size();
    rows x(n_rows, n_rows, t.d, 29);
    char name[64];
    check_gather(t);
    const double us = timer.median_us([&] {
        CHECK_CUDA(tr_moe_gather_fp8(&x.x, t.d, t.k, n_experts, t.start_d.p, t.pair_d.p, t.n,
                                     t.sorted.q.p, t.sorted.scale.p, 0));
    });
    snprintf(name, sizeof name, "gather %d of %d rows", t.n, n_rows);
    line(name, us, 0, 1.03125 * (t.n + n_rows) * t.d, 0, -1);
}

void time_quantise(measure::cold_timer &timer, int n, int d)
{
    buffer<__nv_bfloat16> x((size_t)n * d);
    rows q(n, n, d, 0, false);
    char name[64];
    fill_bf16<<<1024, 256>>>(x.p, x.n, 3);
    snprintf(name, sizeof name, "quantise %d x %d", n, d);
    const double us = timer.median_us(
        [&] { CHECK_CUDA(tr_quantise_rows(x.p, (size_t)d, q.n.p, n, d, 1, q.q.p, q.scale.p, 0)); });
    line(name, us, 0, 3.03125 * n * d, 0, -1);
}

void time_ceilings(measure::cold_timer &timer, buffer<uint8_t> &workspace)
{
    buffer<uint4> big((size_t)1 << 26);
    big.fill(0x5a);
    buffer<uint4> sink(1);
    double us = timer.median_us([&] { read_all<<<132 * 8, 512>>>(big.p, big.n, sink.p); }, 9);
    line("ceiling: read 1 GiB", us, 0, 16.0 * big.n, 0, -1);
    const dense_case square = {8192, 8192, 0, 0, 0};
    weight w(1, 8192, 8192, 41);
    rows x(8192, 8192, 8192, 43);
    buffer<__nv_bfloat16> out((size_t)8192 * 8192);
    time_cublas(timer, square, w, x, workspace, out);
}

} // namespace

int main(int argc, char **argv)
{
    tr_gemm_fp8 g;
    CHECK_CUDA(tr_gemm_fp8_open(&g));
    if (argc == 4 && !strcmp(argv[1], "one")) {
        grouped t(std::vector<int>(32, atoi(argv[2])), 7168, 2048);
        t.run(&g, atoi(argv[3]));
        return 0;
    }
    auto wanted = [&](const char *part) {
        for (int i = 1; i < argc; i++)
            if (!strcmp(argv[i], part)) return true;
        return argc == 1;
    };
    if (wanted("quick")) {
        check_small(&g);
        printf("small sizes: %d failed\n", n_failed);
        fflush(stdout);
    }
    measure::cold_timer timer;
    buffer<uint8_t> workspace((size_t)64 << 20);
    if (wanted("dense")) {
        time_ceilings(timer, workspace);
        for (const dense_case &c : dense_cases) {
            time_dense(&g, timer, workspace, c);
            fflush(stdout);
        }
        time_quantise(timer, 4096, 7168);
        time_quantise(timer, 16, 7168);
    }
    if (wanted("moe")) {
        const double up = 2.0 * 32768 * 4096 * 7168 * 1e-6, down = 2.0 * 32768 * 7168 * 2048 * 1e-6;
        time_grouped(&g, timer, rows_each(8, true), 241.7, 132.9);
        time_grouped(&g, timer, rows_each(32, true), 241.3, 133.9);
        time_grouped(&g, timer, rows_each(64, true), 0, 0);
        time_grouped(&g, timer, rows_each(128, true), 311.5, 171.5);
        time_grouped(&g, timer, rows_each(1024, false), up / 1429, down / 1349);
        time_grouped(&g, timer, rows_each(1024, true), 0, 0);
    }
    if (wanted("all_experts"))
        for (int n : {4096, 8192, 2048, 64}) {
            time_gather(timer, rows_drawn(n));
            time_grouped(&g, timer, rows_drawn(n), 0, 0);
        }
    printf("%d checks failed\n", n_failed);
    return n_failed ? 1 : 0;
}
