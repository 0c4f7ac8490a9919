/* Checks and times kernels/cuda/kv_write.h. The reference takes every step of model.md 3.3, 4 and 5.3 on the host with sums in
 * double precision, so a value may round the other way where the sums differ in the last bit: at most one value in 500, by
 * one step of its format. Exit 1: a check failed. */
#include <cmath>
#include <cstring>
#include <cuda_bf16.h>

#include "kernels/cuda/kv_write.h"
#include "kernels/number.h"
#include "tests/cuda/measure.cuh"

namespace
{

int n_failed = 0;

void expect(bool ok, const char *what)
{
    if (ok) return;
    printf("FAILED %s\n", what);
    n_failed++;
}

template <class T> T *upload(const std::vector<T> &v)
{
    T *d;
    CHECK_CUDA(cudaMalloc(&d, (v.size() + 1) * sizeof(T)));
    CHECK_CUDA(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return d;
}
template <class T> std::vector<T> download(const T *d, size_t n)
{
    std::vector<T> v(n);
    CHECK_CUDA(cudaMemcpy(v.data(), d, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}

struct world { /* rows, inputs and an empty cache */
    int n, d_latent, d_rope, d_index, heads, n_pages;
    std::vector<uint16_t> kv_a, index_k, q;
    std::vector<float> norm, k_norm, k_bias, rope, w;
    std::vector<int32_t> position;
    std::vector<int64_t> write;
    tr_rows rows = {};
    tr_kv_write_args kv = {};
    tr_index_query_args query = {};
    uint8_t *latent, *index, *out;

    static std::vector<float> random(size_t n, int seed, float size, float middle)
    {
        std::vector<float> v(n);
        for (size_t i = 0; i < n; i++)
            v[i] =
                middle + size * (measure::uniform(seed, 2 * i) + measure::uniform(seed, 2 * i + 1));
        return v;
    }
    static std::vector<uint16_t> half(const std::vector<float> &x)
    {
        std::vector<uint16_t> v;
        for (float f : x)
            v.push_back(tr_f32_to_bf16(f));
        return v;
    }
    size_t row_bytes() const
    {
        int blocks = (d_latent + 127) / 128;
        return kv.kv.dtype == TR_E4M3 ? (size_t)(d_latent + 4 * blocks + 2 * d_rope)
                                      : (size_t)(2 * (d_latent + d_rope));
    }
    world(int rows_n, int latent_d, int rope_d, int index_d, int n_heads, tr_dtype dtype)
        : n(rows_n), d_latent(latent_d), d_rope(rope_d), d_index(index_d), heads(n_heads),
          n_pages(rows_n / 64 + 2)
    {
        kv_a = half(random((size_t)n * (d_latent + d_rope), 1, 2.0f, 0.1f));
        index_k = half(random((size_t)n * d_index, 2, 3.0f, 0.3f));
        q = half(random((size_t)n * heads * d_index, 3, 1.0f, 0.0f));
        norm = random(d_latent, 4, 0.2f, 1.0f);
        k_norm = random(d_index, 5, 0.2f, 1.0f);
        k_bias = random(d_index, 6, 0.1f, 0.0f);
        w = random((size_t)n * heads, 7, 1.0f, 0.0f);
        rope = random((size_t)4096 * d_rope, 8, 0.5f, 0.0f);
        for (int r = 0; r < n; r++) {
            position.push_back((r * 37) % 4096);
            write.push_back(r % 9 == 4 ? -1 : (int64_t)(n - 1 - r) + 17);
        }
        if (n > 3) std::fill(index_k.begin(), index_k.begin() + d_index, 0); /* a row of zeros */
        rows.n_max = n;
        rows.n = upload(std::vector<int32_t>{n});
        rows.position = upload(position);
        rows.write = upload(write);
        kv.rows = query.rows = &rows;
        kv.kv_a = (const float *)upload(kv_a);
        kv.ld_kv_a = (size_t)(d_latent + d_rope);
        kv.index_k = (const float *)upload(index_k);
        kv.ld_index_k = (size_t)d_index;
        kv.norm = upload(norm);
        kv.k_norm = upload(k_norm);
        kv.k_bias = upload(k_bias);
        kv.rope = query.rope = upload(rope);
        kv.eps = 1e-6f;
        kv.kv.dtype = query.cache_dtype = dtype;
        kv.kv.n_pages = n_pages;
        kv.kv.d_latent = d_latent;
        kv.kv.d_rope = query.d_rope = d_rope;
        kv.kv.d_index = query.d_index = d_index;
        kv.kv.latent = latent =
            upload(std::vector<uint8_t>((size_t)n_pages * 64 * row_bytes(), 0x5a));
        kv.kv.index = index =
            upload(std::vector<uint8_t>((size_t)n_pages * 64 * (size_t)(d_index + 4), 0x5a));
        query.q = (const float *)upload(q);
        query.w = upload(w);
        query.n_heads = heads;
        query.out = out = upload(std::vector<uint8_t>((size_t)n * heads * d_index, 0x5a));
    }
};

struct tally {
    long long n = 0, off = 0, far = 0;
    void codes(uint8_t a, uint8_t b)
    {
        n++;
        off += a != b;
        far +=
            std::abs((int)(a & 0x7f) - (int)(b & 0x7f)) > 1 || ((a ^ b) & 0x80 && (a | b) & 0x7f);
    }
    void halves(uint16_t a, uint16_t b)
    {
        n++;
        off += a != b;
        far += std::abs((int)a - (int)b) > 1;
    }
    void check(const char *what) const
    {
        expect(far == 0, what);
        expect(off * 500 <= n, what);
    }
};

float quantise(const std::vector<float> &x, int from, int n, uint8_t *out)
{
    float amax = 0;
    for (int i = 0; i < n; i++)
        amax = std::fmax(amax, std::fabs(x[from + i]));
    float scale = tr_ue8m0_scale(amax);
    for (int i = 0; i < n; i++)
        out[i] = tr_f32_to_e4m3(x[from + i] / scale);
    return scale;
}

void rope_half(std::vector<float> &x, const float *cs, int d)
{
    for (int i = 0; i < d / 2; i++) {
        volatile float ac = x[i] * cs[2 * i], bs = x[i + d / 2] * cs[2 * i + 1];
        volatile float as = x[i] * cs[2 * i + 1], bc = x[i + d / 2] * cs[2 * i];
        x[i] = ac - bs;
        x[i + d / 2] = as + bc;
    }
}

float index_code(std::vector<float> &x, uint8_t *out)
{
    int d = (int)x.size();
    for (float &f : x)
        f = tr_round_bf16(f);
    for (int h = 1; h < d; h *= 2)
        for (int i = 0; i < d; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    for (float &f : x)
        f = tr_round_bf16(f * (1.0f / std::sqrt((float)d)));
    return quantise(x, 0, d, out);
}

void check_latent(const world &o, const std::vector<uint8_t> &got, int r, tally &t,
                  long long &scales)
{
    int n = o.d_latent, blocks = (n + 127) / 128;
    const uint8_t *row = got.data() + (size_t)o.write[r] * o.row_bytes();
    const uint16_t *in = o.kv_a.data() + (size_t)r * (n + o.d_rope);
    std::vector<float> x(n);
    double sum = 0;
    for (int j = 0; j < n; j++)
        sum += (double)tr_bf16_to_f32(in[j]) * tr_bf16_to_f32(in[j]);
    float factor = 1.0f / std::sqrt((float)(sum / n) + o.kv.eps);
    for (int j = 0; j < n; j++)
        x[j] = tr_bf16_to_f32(in[j]) * factor * o.norm[j];
    const uint8_t *halves = row + (o.kv.kv.dtype == TR_E4M3 ? n + 4 * blocks : 2 * n);
    for (int b = 0; b < blocks && o.kv.kv.dtype == TR_E4M3; b++) {
        uint8_t want[128];
        float scale, want_scale = quantise(x, b * 128, std::min(128, n - b * 128), want);
        memcpy(&scale, row + n + 4 * b, 4);
        scales += scale != want_scale;
        for (int j = 0; j < std::min(128, n - b * 128) && scale == want_scale; j++)
            t.codes(row[b * 128 + j], want[j]);
    }
    for (int j = 0; j < n && o.kv.kv.dtype != TR_E4M3; j++)
        t.halves(((const uint16_t *)(const void *)row)[j], tr_f32_to_bf16(x[j]));
    const float *cs = o.rope.data() + (size_t)o.position[r] * o.d_rope;
    for (int i = 0; i < o.d_rope / 2; i++) {
        float a = tr_bf16_to_f32(in[n + 2 * i]), b = tr_bf16_to_f32(in[n + 2 * i + 1]);
        volatile float ac = a * cs[2 * i], bs = b * cs[2 * i + 1], as = a * cs[2 * i + 1],
                       bc = b * cs[2 * i];
        uint16_t h[2];
        memcpy(h, halves + 4 * i, 4);
        expect(h[0] == tr_f32_to_bf16(ac - bs) && h[1] == tr_f32_to_bf16(as + bc),
               "rope of latents");
    }
}

void check_index(const world &o, const std::vector<uint8_t> &got, int r, tally &t,
                 long long &scales)
{
    int d = o.d_index;
    const uint8_t *page = got.data() + (size_t)(o.write[r] / 64) * 64 * (size_t)(d + 4);
    std::vector<float> x(d);
    std::vector<uint8_t> want(d);
    double mean = 0, sum = 0;
    for (int j = 0; j < d; j++)
        mean += tr_bf16_to_f32(o.index_k[(size_t)r * d + j]);
    for (int j = 0; j < d; j++) {
        x[j] = tr_bf16_to_f32(o.index_k[(size_t)r * d + j]) - (float)(mean / d);
        sum += (double)x[j] * x[j];
    }
    float factor = 1.0f / std::sqrt((float)(sum / d) + 1e-6f), scale;
    for (int j = 0; j < d; j++)
        x[j] = tr_round_bf16(x[j] * factor * o.k_norm[j] + o.k_bias[j]);
    rope_half(x, o.rope.data() + (size_t)o.position[r] * o.d_rope, o.d_rope);
    float want_scale = index_code(x, want.data());
    memcpy(&scale, page + 64 * d + 4 * (o.write[r] % 64), 4);
    scales += scale != want_scale;
    for (int j = 0; j < d && scale == want_scale; j++)
        t.codes(page[(size_t)(o.write[r] % 64) * d + j], want[j]);
}

void check_query(const world &o, const std::vector<uint8_t> &got, const std::vector<float> &w,
                 int r)
{
    int d = o.d_index;
    bool same = true;
    for (int h = 0; h < o.heads; h++) {
        size_t at = (size_t)r * o.heads + h;
        std::vector<float> x(d);
        std::vector<uint8_t> want(d);
        for (int j = 0; j < d; j++)
            x[j] = tr_bf16_to_f32(o.q[at * d + j]);
        rope_half(x, o.rope.data() + (size_t)o.position[r] * o.d_rope, o.d_rope);
        float scale = index_code(x, want.data());
        float constant = 1.0f / std::sqrt((float)o.heads) / std::sqrt((float)d);
        same = same && memcmp(got.data() + at * d, want.data(), d) == 0;
        same = same && w[at] == o.w[at] * constant * scale;
    }
    expect(same, "index queries: nothing is summed, so every bit must match");
}

void check(int n, int d_latent, int d_rope, int d_index, int heads, tr_dtype dtype)
{
    world o(n, d_latent, d_rope, d_index, heads, dtype);
    size_t latent_bytes = (size_t)o.n_pages * 64 * o.row_bytes();
    CHECK_CUDA(tr_cuda_kv_write(&o.kv, 0));
    CHECK_CUDA(tr_cuda_index_query(&o.query, 0));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<uint8_t> latent = download(o.latent, latent_bytes);
    std::vector<uint8_t> index = download(o.index, (size_t)o.n_pages * 64 * (size_t)(d_index + 4));
    std::vector<uint8_t> out = download(o.out, (size_t)n * heads * d_index);
    std::vector<float> w = download(o.query.w, (size_t)n * heads);
    tally t_latent, t_index;
    long long scales = 0;
    std::vector<bool> written((size_t)o.n_pages * 64);
    for (int r = 0; r < n; r++) {
        if (o.write[r] < 0) continue;
        written[o.write[r]] = true;
        check_latent(o, latent, r, t_latent, scales);
        check_index(o, index, r, t_index, scales);
        check_query(o, out, w, r);
    }
    bool clean = true;
    for (size_t i = 0; i < written.size(); i++)
        for (size_t j = 0; !written[i] && j < o.row_bytes(); j++)
            clean = clean && latent[i * o.row_bytes() + j] == 0x5a;
    expect(clean, "stray writes");
    expect(scales * 500 <= 5ll * n, "scales differ");
    t_latent.check("latents differ");
    t_index.check("index keys differ");
    printf("kv_write rows %4d latent %d rope %d index %d: latents off %lld of %lld, keys %lld of "
           "%lld, "
           "scales %lld\n",
           n, d_latent, d_rope, d_index, t_latent.off, t_latent.n, t_index.off, t_index.n, scales);
}

} // namespace

int main()
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        fprintf(stderr, "bench_kv_write: no GPU\n");
        return 77;
    }
    check(300, 512, 64, 128, 64, TR_E4M3);
    check(1, 512, 64, 128, 64, TR_E4M3);
    check(67, 512, 64, 128, 3, TR_BF16);
    check(65, 64, 16, 32, 4, TR_E4M3);
    check(65, 196, 8, 8, 5, TR_E4M3);
    printf("%d checks failed\n", n_failed);
    if (n_failed) return 1;
    measure::cold_timer timer;
    for (int n : {1, 128, 4096}) {
        world o(n, 512, 64, 128, 64, TR_E4M3);
        double us = timer.median_us([&] { CHECK_CUDA(tr_cuda_kv_write(&o.kv, 0)); });
        printf("kv_write    %4d rows %7.1f us %6.2f TB/s\n", n, us, n * (1408.0 + 788) * 1e-6 / us);
        us = timer.median_us([&] { CHECK_CUDA(tr_cuda_index_query(&o.query, 0)); });
        printf("index_query %4d rows %7.1f us %6.2f TB/s\n", n, us, n * 64 * 392.0 * 1e-6 / us);
    }
    return 0;
}
