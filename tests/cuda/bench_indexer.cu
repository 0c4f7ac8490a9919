/* Checks and times the indexer on a GPU: kernels/cuda/index_logits.h against sums in double precision, kernels/cuda/topk.h
 * against a sort on the host. Exit 1: a check failed. `bench_indexer check` leaves the timing out,
 * `bench_indexer time` the checks; `bench_indexer topk` checks and times nothing else; `bench_indexer spans` checks what few
 * rows' CTAs hold; `bench_indexer small` is for compute-sanitizer.
 * nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I. -Isrc tests/cuda/bench_indexer.cu \
 *     kernels/cuda/index_logits.cu kernels/cuda/topk.cu */
#include <cmath>
#include <cstring>
#include <cuda_fp8.h>
#include <functional>
#include <string>

#include "kernels/cuda/index_logits.h"
#include "kernels/cuda/topk.h"
#include "tests/cuda/measure.cuh"

namespace
{

constexpr int PAGE = TR_PAGE_TOKENS, D = 128;
constexpr uint32_t POISON = 0xffc12345u; /* a NaN that no kernel writes */
int n_failed = 0;

void expect(bool ok, const char *what, const std::string &name)
{
    if (ok) return;
    printf("FAILED %s: %s\n", name.c_str(), what);
    n_failed++;
}

template <class T> struct buffer { /* device memory */
    T *d = nullptr;
    size_t n;
    explicit buffer(size_t count) : n(count)
    {
        CHECK_CUDA(cudaMalloc(&d, (count ? count : 1) * sizeof(T)));
    }
    explicit buffer(const std::vector<T> &v) : buffer(v.size())
    {
        CHECK_CUDA(cudaMemcpy(d, v.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    buffer(const buffer &) = delete;
    ~buffer()
    {
        cudaFree(d);
    }
    std::vector<T> host() const
    {
        std::vector<T> v(n);
        CHECK_CUDA(cudaMemcpy(v.data(), d, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

__global__ void fill_codes(uint8_t *to, size_t n, unsigned long long seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        float x = measure::uniform(seed, 3 * i) + measure::uniform(seed, 3 * i + 1) +
                  measure::uniform(seed, 3 * i + 2);
        to[i] = __nv_fp8_e4m3(x * 140.0f).__x;
    }
}
__global__ void fill_scales(uint8_t *pages, int n_pages, int d, unsigned long long seed)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_pages * PAGE) return;
    float *scale = (float *)(pages + (size_t)(i / PAGE) * PAGE * (d + 4) + PAGE * d);
    scale[i % PAGE] = exp2f((float)((int)(measure::mix(seed + i) % 3) - 9));
}
__global__ void fill_floats(float *to, size_t n, float size, unsigned long long seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] = size * (measure::uniform(seed, 2 * i) + measure::uniform(seed, 2 * i + 1));
}
__global__ void fill_words(uint32_t *to, size_t n, uint32_t x)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] = x;
}

/* ---- rows of a step ---------------------------------------------------------------------------------------------------- */

struct row {
    int slot, position, dense, pad;
};

struct step { /* rows, the slots' page tables over shuffled pages */
    std::vector<row> at;
    int max_pages, n_pages;
    tr_rows rows = {};
    buffer<int32_t> n, slot, position, table;
    buffer<int64_t> write;
    buffer<uint8_t> dense;

    template <class T> static std::vector<T> pick(const std::vector<row> &v, T (*f)(const row &))
    {
        std::vector<T> out;
        for (const row &r : v)
            out.push_back(f(r));
        return out;
    }
    static std::vector<int32_t> shuffled(int n_pages)
    {
        std::vector<int32_t> v(n_pages);
        for (int i = 0; i < n_pages; i++)
            v[i] = i;
        for (int i = n_pages - 1; i > 0; i--)
            std::swap(v[i], v[measure::mix(i) % (i + 1)]);
        return v;
    }
    step(const std::vector<row> &v, int n_slots, int max_context, int n_live = -1)
        : at(v), max_pages((max_context + PAGE - 1) / PAGE), n_pages(n_slots * max_pages),
          n(std::vector<int32_t>{n_live < 0 ? (int)v.size() : n_live}),
          slot(pick<int32_t>(v, [](const row &r) { return r.slot; })),
          position(pick<int32_t>(v, [](const row &r) { return r.position; })),
          table(shuffled(n_pages)),
          write(pick<int64_t>(v, [](const row &r) { return (int64_t)(r.pad ? -1 : 0); })),
          dense(pick<uint8_t>(v, [](const row &r) { return (uint8_t)r.dense; }))
    {
        rows.n_max = (int)v.size();
        rows.max_context = max_context;
        rows.n = n.d;
        rows.slot = slot.d;
        rows.position = position.d;
        rows.write = write.d;
        rows.dense = dense.d;
        rows.page_table = table.d;
        rows.max_pages = max_pages;
    }
    bool live(int r, int k, const int32_t *n_live) const
    {
        return r < *n_live && !at[r].dense && !at[r].pad && at[r].position >= k;
    }
};

/* ---- index logits ------------------------------------------------------------------------------------------------------ */

struct index_case {
    step &s;
    int heads, d;
    size_t ld;
    buffer<uint8_t> q, pages;
    buffer<float> w, score;
    tr_index_logits_args a = {};

    index_case(step &steps, int n_heads, int d_index, int k, size_t row_stride)
        : s(steps), heads(n_heads), d(d_index), ld(row_stride),
          q(s.at.size() * (size_t)n_heads * d_index), pages((size_t)s.n_pages * PAGE * (d + 4)),
          w(s.at.size() * (size_t)n_heads), score(s.at.size() * row_stride)
    {
        fill_codes<<<1024, 256>>>(q.d, q.n, 1);
        fill_codes<<<4096, 256>>>(pages.d, pages.n, 2);
        fill_scales<<<(s.n_pages * PAGE + 255) / 256, 256>>>(pages.d, s.n_pages, d, 3);
        fill_floats<<<64, 256>>>(w.d, w.n, 0.02f, 4);
        CHECK_CUDA(cudaGetLastError());
        a.rows = &s.rows;
        a.q = q.d;
        a.w = w.d;
        a.n_heads = heads;
        a.k = k;
        a.kv.index = pages.d;
        a.kv.dtype = TR_E4M3;
        a.kv.n_pages = s.n_pages;
        a.kv.d_index = d;
        a.n_row = (int)s.at.size();
        a.score = score.d;
        a.ld = ld;
    }
    void poison()
    {
        fill_words<<<2048, 256>>>((uint32_t *)score.d, score.n, POISON);
    }
    void run(int i_row, int n_row)
    {
        a.i_row = i_row;
        a.n_row = n_row;
        CHECK_CUDA(tr_cuda_index_logits(&a, 0));
    }
};

/* One block per row: the scores of keys [low, high), and the sum of absolute terms, which bounds what rounding may do. */
__global__ void reference(tr_rows rows, const uint8_t *q, const float *w, const uint8_t *pages,
                          int heads, int d, const int2 *range, double *score, double *size,
                          size_t ld)
{
    int r = blockIdx.x;
    for (int s = range[r].x + threadIdx.x; s < range[r].y; s += blockDim.x) {
        int page = rows.page_table[(size_t)rows.slot[r] * rows.max_pages + s / PAGE];
        const uint8_t *base = pages + (size_t)page * PAGE * (d + 4);
        const __nv_fp8_e4m3 *key = (const __nv_fp8_e4m3 *)base + (size_t)(s % PAGE) * d;
        const __nv_fp8_e4m3 *query = (const __nv_fp8_e4m3 *)q + (size_t)r * heads * d;
        double sum = 0, all = 0, scale = ((const float *)(base + PAGE * d))[s % PAGE];
        for (int h = 0; h < heads; h++) {
            double x = 0, y = 0;
            for (int i = 0; i < d; i++) {
                double t = (double)(float)query[h * d + i] * (double)(float)key[i];
                x += t;
                y += fabs(t);
            }
            sum += w[(size_t)r * heads + h] * (x > 0 ? x : x < 0 ? 0 : x);
            all += fabs(w[(size_t)r * heads + h]) * y;
        }
        score[r * ld + s] = sum * scale;
        size[r * ld + s] = all * scale;
    }
}

uint32_t bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

/* Every element against the reference: at most 2^-10 of the sum of absolute terms off (the tensor cores keep 14 bits of a
 * sum), nothing outside the range written. Returns the relative error in the Euclidean norm. */
double compare(index_case &c, const std::vector<int2> &range, const std::vector<float> &got,
               const std::string &name)
{
    buffer<int2> range_d(range);
    buffer<double> score(c.score.n), size(c.score.n);
    reference<<<(unsigned)range.size(), 256>>>(c.s.rows, c.q.d, c.w.d, c.pages.d, c.heads, c.d,
                                               range_d.d, score.d, size.d, c.ld);
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<double> want = score.host(), bound = size.host();
    double off = 0, norm = 0;
    long long n_bad = 0, n_stray = 0;
    for (size_t r = 0; r < range.size(); r++)
        for (size_t s = 0; s < c.ld; s++) {
            float x = got[r * c.ld + s];
            if ((int)s < range[r].x || (int)s >= range[r].y) {
                n_stray += bits(x) != POISON;
                continue;
            }
            double y = want[r * c.ld + s];
            if (y != y) {
                n_bad += x != -INFINITY;
                continue;
            }
            n_bad += !(fabs(x - y) <= ldexp(bound[r * c.ld + s], -10)) || bits(x) == 0x80000000u;
            off += (x - y) * (x - y);
            norm += y * y;
        }
    expect(n_bad == 0, "scores off", name);
    expect(n_stray == 0, "stray writes", name);
    return norm > 0 ? sqrt(off / norm) : 0;
}

/* Rows computed by themselves or in other company: the same bits. */
void check_company(index_case &c, const std::vector<int2> &range,
                   const std::vector<float> &together, const std::string &name)
{
    int n = (int)range.size();
    for (int width : {1, 2, 3, 5}) {
        for (int r = 0; r < n; r += width) {
            c.poison();
            c.run(r, width);
            std::vector<float> got((size_t)width * c.ld);
            CHECK_CUDA(cudaMemcpy(got.data(), c.score.d,
                                  std::min((size_t)width, (size_t)(n - r)) * c.ld * 4,
                                  cudaMemcpyDeviceToHost));
            bool same = true;
            for (int i = r; i < std::min(n, r + width); i++)
                for (int s = range[i].x; s < range[i].y; s++)
                    same = same && bits(got[(size_t)(i - r) * c.ld + s]) ==
                                       bits(together[(size_t)i * c.ld + s]);
            expect(same, "a row's bits depend on its company", name);
        }
    }
}

void check_logits(const std::string &name, const std::vector<row> &v, int n_slots, int max_context,
                  int heads, int d, int k, bool ranges, int n_live = -1)
{
    step s(v, n_slots, max_context, n_live);
    index_case c(s, heads, d, k, (size_t)max_context + 5);
    std::vector<int32_t> live = s.n.host(), first(v.size()), last(v.size());
    std::vector<int2> range;
    for (size_t r = 0; r < v.size(); r++) {
        int high = v[r].position + 1;
        first[r] = ranges ? high / 3 / 7 * 7 : 0;
        last[r] = ranges ? high - high / 5 : high;
        bool on = s.live((int)r, k, live.data()) && first[r] < last[r];
        range.push_back(on ? make_int2(first[r], last[r]) : make_int2(0, 0));
    }
    buffer<int32_t> first_d(first), last_d(last);
    if (ranges) {
        c.a.first = first_d.d;
        c.a.last = last_d.d;
    }
    c.poison();
    c.run(0, (int)v.size());
    std::vector<float> got = c.score.host();
    double error = compare(c, range, got, name);
    expect(error < 1e-3, "error in the norm", name);
    c.poison();
    c.run(0, (int)v.size());
    std::vector<float> again = c.score.host();
    expect(memcmp(got.data(), again.data(), got.size() * 4) == 0, "two runs differ", name);
    if (v.size() <= 64) check_company(c, range, got, name);
    printf("logits %-34s rows %4zu heads %2d d %3d k %4d error %.1e\n", name.c_str(), v.size(),
           heads, d, k, error);
}

std::vector<row> span(int slot, int position, int n)
{
    std::vector<row> v;
    for (int i = 0; i < n; i++)
        v.push_back({slot, position + i, 0, 0});
    return v;
}
std::vector<row> join(std::initializer_list<std::vector<row>> parts)
{
    std::vector<row> v;
    for (const std::vector<row> &p : parts)
        v.insert(v.end(), p.begin(), p.end());
    return v;
}

void check_all_logits()
{
    std::vector<row> edges = join({span(0, 62, 4), span(1, 0, 1), span(2, 127, 2), span(3, 63, 1)});
    std::vector<row> mixed =
        join({span(0, 700, 1), span(1, 64, 1), span(2, 300, 9), span(3, 1000, 3), span(4, 65, 2),
              span(5, 500, 17), span(0, 130, 5), span(6, 10, 6), span(7, 900, 8)});
    std::vector<row> holes = mixed;
    for (size_t i = 0; i < holes.size(); i += 5)
        holes[i].dense = i % 2 == 0, holes[i].pad = i % 2;

    check_logits("edges of pages", edges, 4, 192, 64, D, 0, false);
    check_logits("mixed", mixed, 8, 1024, 64, D, 0, false);
    check_logits("dense rows, pads, k", holes, 8, 1024, 64, D, 100, false);
    check_logits("fewer rows than room", mixed, 8, 1024, 64, D, 64, false, 19);
    check_logits("no rows", mixed, 8, 1024, 64, D, 64, false, 0);
    check_logits("key ranges", mixed, 8, 1024, 64, D, 60, true);
    for (int heads : {16, 32, 48})
        check_logits("heads", holes, 8, 1024, heads, D, 64, false);
    check_logits("other width", mixed, 8, 1024, 4, 32, 64, false);
    check_logits("other heads", edges, 4, 192, 24, D, 0, false);
    check_logits("at k", join({span(0, 2046, 4), span(1, 2047, 1), span(2, 2046, 1)}), 3, 4096, 64,
                 D, 2048, false);
    check_logits("chunk", span(0, 333, 700), 1, 1100, 64, D, 0, false);
    std::vector<row> many;
    for (int i = 0; i < 500; i++)
        many.push_back({i, (i * 37) % 800, 0, 0});
    check_logits("500 decode rows", many, 500, 800, 64, D, 0, false);

    /* A CTA sees groups of several sizes one after the other, of more pages than it has room for. */
    std::vector<row> sizes;
    for (int i = 0; i < 120; i++)
        for (const row &r : span(i, 1000 + i * 613 % 3000, 1 + i * 7 % 17))
            sizes.push_back(r);
    check_logits("groups of all sizes", sizes, 120, 4096, 64, D, 0, false);
    check_logits("long groups",
                 join({span(0, 40000, 1), span(1, 50000, 8), span(2, 30000, 1), span(3, 45000, 3),
                       span(4, 60000, 2), span(5, 20000, 12)}),
                 6, 61440, 64, D, 0, false);
}

/* ---- top-k ------------------------------------------------------------------------------------------------------------- */

typedef std::function<float(int row, int i)> score_of;

struct topk_case {
    step &s;
    int k;
    size_t ld;
    buffer<float> score;
    buffer<int32_t> position, cache_row, n_selected;
    tr_topk_args a = {};

    topk_case(step &steps, int n_best, size_t row_stride)
        : s(steps), k(n_best), ld(row_stride), score(s.at.size() * row_stride),
          position(s.at.size() * (size_t)n_best), cache_row(position.n), n_selected(s.at.size())
    {
        a.rows = &s.rows;
        a.score = score.d;
        a.ld = ld;
        a.k = k;
        a.n_row = (int)s.at.size();
        a.position = position.d;
        a.cache_row = cache_row.d;
        a.n_selected = n_selected.d;
    }
    void run(int i_row, int n_row, int n_ctas = 0)
    {
        a.i_row = i_row;
        a.n_row = n_row;
        a.score = score.d + i_row * ld;
        CHECK_CUDA(tr_cuda_topk_as(&a, n_ctas, 0));
    }
    void poison()
    {
        fill_words<<<256, 256>>>((uint32_t *)position.d, position.n, POISON);
        fill_words<<<256, 256>>>((uint32_t *)cache_row.d, cache_row.n, POISON);
        fill_words<<<16, 256>>>((uint32_t *)n_selected.d, n_selected.n, POISON);
    }
};

/* What row r must select: larger first, equal: smaller position first; NaN as -inf. Ascending. */
std::vector<int> best(const float *score, int n, int k)
{
    std::vector<int> order(n);
    for (int i = 0; i < n; i++)
        order[i] = i;
    auto value = [&](int i) { return score[i] == score[i] ? score[i] : -INFINITY; };
    auto before = [&](int a, int b) {
        return value(a) > value(b) || (value(a) == value(b) && a < b);
    };
    if (n > k) {
        std::nth_element(order.begin(), order.begin() + k, order.end(), before);
        order.resize(k);
        std::sort(order.begin(), order.end());
    }
    return order;
}

void compare_topk(topk_case &c, const std::vector<float> &score, int n_live,
                  const std::string &name)
{
    std::vector<int32_t> position = c.position.host(), cache_row = c.cache_row.host(),
                         n_selected = c.n_selected.host(), table = c.s.table.host();
    bool ok = true, ok_rows = true, ok_count = true, ok_rest = true;
    for (size_t r = 0; r < c.s.at.size(); r++) {
        const row &v = c.s.at[r];
        std::vector<int> want;
        if ((int)r < n_live && !v.dense && !v.pad)
            want = best(score.data() + r * c.ld, v.position + 1, c.k);
        if ((int)r >= n_live) {
            ok_rest = ok_rest && (uint32_t)n_selected[r] == POISON &&
                      (uint32_t)position[r * c.k] == POISON;
            continue;
        }
        ok_count = ok_count && n_selected[r] == (int)want.size();
        for (int i = 0; i < c.k; i++) {
            int s = i < (int)want.size() ? want[i] : -1;
            ok = ok && position[r * c.k + i] == s;
            int cache =
                s < 0 ? -1 : table[(size_t)v.slot * c.s.max_pages + s / PAGE] * PAGE + s % PAGE;
            ok_rows = ok_rows && cache_row[r * c.k + i] == cache;
        }
    }
    expect(ok, "selection differs", name);
    expect(ok_rows, "cache rows differ", name);
    expect(ok_count, "counts differ", name);
    expect(ok_rest, "rows past the last were written", name);
}

/* n_rows rows of about n scores in one launch, and the first few again in small launches (clusters instead of single CTAs):
 * all must agree with the sort. */
void check_topk(const std::string &name, const std::vector<int> &lengths, int k, int n_rows,
                score_of f, size_t pad_ld = 0)
{
    int longest = *std::max_element(lengths.begin(), lengths.end());
    std::vector<row> v;
    for (int r = 0; r < n_rows; r++)
        v.push_back({r % 3, lengths[r % lengths.size()] - 1, r % 11 == 7, r % 13 == 9});
    step s(v, 3, longest, n_rows > 4 ? n_rows - 1 : n_rows);
    size_t ld = (size_t)(longest + 3) / 4 * 4 + pad_ld;
    topk_case c(s, k, ld);
    std::vector<float> score(c.score.n);
    for (int r = 0; r < n_rows; r++)
        for (size_t i = 0; i < ld; i++)
            score[r * ld + i] = (int)i <= v[r].position ? f(r, (int)i) : INFINITY;
    CHECK_CUDA(cudaMemcpy(c.score.d, score.data(), score.size() * 4, cudaMemcpyHostToDevice));
    int n_live = n_rows > 4 ? n_rows - 1 : n_rows;
    c.poison();
    c.run(0, n_rows);
    compare_topk(c, score, n_live, name + ", one launch");
    std::vector<int32_t> first = c.cache_row.host();
    c.poison();
    for (int r = 0, width = 1; r < n_rows; r += width, width = width % 30 + 7)
        c.run(r, width);
    compare_topk(c, score, n_live, name + ", small launches");
    expect(first == c.cache_row.host(), "two ways differ", name);
}

float normal(int r, int i)
{
    unsigned long long at = (unsigned long long)r * 1000003 + i;
    float sum = 0;
    for (int j = 0; j < 4; j++)
        sum += measure::uniform(77 + j, at);
    return sum;
}

struct kind {
    const char *name;
    score_of f;
};
std::vector<kind> hostile_kinds()
{
    auto odd = [](float x) { return [x](int, int) { return x; }; };
    return {
        {"all equal", odd(1.25f)},
        {"all zero", odd(0.0f)},
        {"all -inf", odd(-INFINITY)},
        {"all NaN", odd(NAN)},
        {"zeros of both signs", [](int r, int i) { return (i * 7 + r) % 3 ? 0.0f : -0.0f; }},
        {"half zeros", [](int r, int i) { return std::max(0.0f, normal(r, i)); }},
        {"few above zeros", [](int r, int i) { return i % 97 == 5 ? normal(r, i) : 0.0f; }},
        {"one bin",
         [](int r, int i) { return 1.0f + (float)(measure::mix(i + r) % 5000) * 0x1p-23f; }},
        {"two values", [](int r, int i) { return (float)(measure::mix(i + 9 * r) % 2); }},
        {"denormals",
         [](int r, int i) {
             return ldexpf((float)((int)(measure::mix(i ^ r) % 4096) - 2048), -149);
         }},
        {"ascending", [](int, int i) { return (float)i; }},
        {"descending", [](int, int i) { return -(float)i; }},
        {"one huge", [](int r, int i) { return i == 17 ? 3e38f : normal(r, i) * 1e-20f; }},
        {"mostly -inf", [](int r, int i) { return i % 61 ? -INFINITY : normal(r, i); }},
        {"NaN among them", [](int r, int i) { return i % 5 ? normal(r, i) : NAN; }},
        {"negative", [](int r, int i) { return -1e3f - normal(r, i); }},
        {"period of the sample", [](int r, int i) { return i % 32 < 4 ? -1.0f : normal(r, i); }},
    };
}

/* Rows of which so many CTAs hold a part each, to the edges of what their registers hold. Where scores are equal, the choice
 * ends inside the first part, inside the last, and where they meet. */
void check_spans()
{
    std::vector<kind> kinds = {
        {"plain", normal},
        {"one in 15", [](int r, int i) { return i % 15 == 3 + r ? 1.0f : 0.0f; }},
        {"one in 29", [](int r, int i) { return i % 29 == 3 + r ? 1.0f : 0.0f; }},
        {"late ones", [](int, int i) { return i >= 15000 ? 1.0f : 0.0f; }},
        {"ones about the middle", [](int, int i) { return i >= 32000 ? 1.0f : -1.0f; }},
        {"late NaN", [](int r, int i) { return i > 16000 ? NAN : normal(r, i); }},
        {"inf, some",
         [](int r, int i) { return i % 23 == r ? INFINITY
                                   : i % 2     ? -INFINITY
                                               : normal(r, i); }},
    };
    const struct {
        int context, n_ctas;
    } spans[] = {{16384, 1}, {16385, 1}, {20480, 1},  {20481, 1},  {24576, 1},  {24577, 1},
                 {28673, 1}, {32767, 1}, {32768, 1},  {32769, 1},  {36864, 1},  {32769, 2},
                 {40960, 2}, {49152, 2}, {49153, 2},  {65535, 2},  {65536, 2},  {65537, 2},
                 {73728, 2}, {40000, 4}, {131071, 4}, {131072, 4}, {131073, 4}, {270001, 8}};
    for (const kind &h : hostile_kinds())
        kinds.push_back(h);
    for (auto &x : spans)
        for (size_t i = 0; i < kinds.size(); i++) {
            if (x.context > 100000 && i % 3) continue;
            std::vector<row> v = {{0, x.context - 1, 0, 0},
                                  {1, x.context - 2, 0, 0},
                                  {2, x.context * 3 / 4, 0, 0},
                                  {1, 2048, 0, 0}};
            step s(v, 3, x.context);
            topk_case c(s, 2048, (size_t)(x.context + 3) / 4 * 4 + (i % 4 == 1));
            std::vector<float> score(c.score.n, INFINITY);
            for (size_t r = 0; r < v.size(); r++)
                for (int j = 0; j <= v[r].position; j++)
                    score[r * c.ld + j] = kinds[i].f((int)r, j);
            CHECK_CUDA(
                cudaMemcpy(c.score.d, score.data(), score.size() * 4, cudaMemcpyHostToDevice));
            c.poison();
            c.run(0, (int)v.size(), x.n_ctas);
            compare_topk(c, score, (int)v.size(),
                         std::string(kinds[i].name) + ", " + std::to_string(x.n_ctas) +
                             " CTAs for " + std::to_string(x.context));
        }
    printf("top-k: %zu spans checked\n", sizeof spans / sizeof *spans);
}

void check_all_topk(bool small)
{
    std::vector<int> edges = {1,    63,   64,   65,   2047, 2048, 2049,
                              2050, 4095, 4097, 8191, 8192, 8193, 9295};
    std::vector<int> lengths = {163840, 131072, 131071, 32768, 70001, 12345};
    check_topk("edges", edges, 2048, 28, normal);
    if (small) return;
    check_topk("edges, odd stride", edges, 2048, 28, normal, 3);
    check_topk("edges, many rows", edges, 2048, 150, normal, 1);
    check_topk("long", lengths, 2048, 12, normal);
    check_topk("long, many rows", {163840, 9000, 40000}, 2048, 140, normal);
    for (int k : {1, 2, 31, 64, 100, 2047})
        check_topk("k " + std::to_string(k), {1, 50, 100, 101, 5000, 40001}, k, 140, normal);
    for (const kind &h : hostile_kinds()) {
        check_topk(h.name, {20001, 2049, 9000, 40000}, 2048, 7, h.f);
        check_topk(std::string(h.name) + ", many rows", {20001, 2049, 9000}, 2048, 134, h.f);
    }
    printf("top-k: %zu kinds of hostile rows checked\n", hostile_kinds().size());
    check_spans();
}

/* ---- times ------------------------------------------------------------------------------------------------------------- */

__global__ void nothing()
{
}
__global__ void read_all(const uint4 *from, size_t n, uint32_t *out)
{
    uint32_t x = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        x ^= from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
    if (x == 0x12345678u) *out = x;
}

void print_time(const char *what, const std::string &shape, double us, double amount,
                const char *unit, double peer_us)
{
    printf("%-14s %-14s %9.1f us %8.2f %-7s peer %8.1f us  peer/ours %.2f\n", what, shape.c_str(),
           us, amount / us, unit, peer_us, peer_us / us);
}

void time_prefill(measure::cold_timer &timer, int n_rows, int context, double peer_tflops)
{
    step s(span(0, context - n_rows, n_rows), 1, context);
    index_case c(s, 64, D, 0, (size_t)context);
    double flops = 0;
    for (int i = 0; i < n_rows; i++)
        flops += 16384.0 * (context - n_rows + i + 1);
    double us = timer.median_us([&] { c.run(0, n_rows); }, 11);
    print_time("logits prefill", std::to_string(n_rows) + " x " + std::to_string(context), us,
               flops * 1e-6, "TFLOP/s", flops * 1e-6 / peer_tflops);
}

void time_decode(measure::cold_timer &timer, int b, int context, double peer_us)
{
    std::vector<row> v;
    for (int i = 0; i < b; i++)
        v.push_back({i, context - 1, 0, 0});
    step s(v, b, context);
    index_case c(s, 64, D, 0, (size_t)context);
    double us = timer.median_us([&] { c.run(0, b); });
    print_time("logits decode", "b=" + std::to_string(b) + " " + std::to_string(context), us,
               136.0 * b * context * 1e-6, "TB/s", peer_us);
}

void time_topk(measure::cold_timer &timer, int n_rows, int context, double target_us)
{
    std::vector<row> v;
    for (int i = 0; i < n_rows; i++)
        v.push_back({0, context - 1, 0, 0});
    step s(v, 1, context);
    topk_case c(s, 2048, (size_t)context);
    fill_floats<<<4096, 256>>>(c.score.d, c.score.n, 1.0f, 5);
    double us = timer.median_us([&] { c.run(0, n_rows); });
    print_time("top-2048", std::to_string(n_rows) + " x " + std::to_string(context), us,
               4.0 * n_rows * context * 1e-6, "TB/s", target_us);
    for (int n_ctas = 1; n_rows == 1 && n_ctas <= 16; n_ctas *= 2) {
        if (context / n_ctas > 32768) continue;
        us = timer.median_us([&] { CHECK_CUDA(tr_cuda_topk_as(&c.a, n_ctas, 0)); });
        print_time("  blocks", std::to_string(n_ctas), us, 4.0 * n_rows * context * 1e-6, "TB/s",
                   target_us);
    }
}

void time_all_topk(measure::cold_timer &timer)
{
    const struct {
        int n_rows, context;
        double target_us;
    } shapes[] = {{1, 8192, 10},      {1, 131072, 15},  {8, 131072, 15},   {16, 131100, 15},
                  {32, 32900, 12},    {32, 40000, 12},  {32, 131072, 35},  {32, 131200, 35},
                  {64, 32768, 17.4},  {64, 32900, 18},  {64, 40960, 18},   {64, 65536, 24},
                  {64, 65700, 24},    {128, 16384, 17}, {128, 16500, 17},  {128, 24576, 20},
                  {128, 32768, 23.1}, {128, 32900, 23}, {128, 131072, 45}, {2048, 131072, 600}};
    for (auto &x : shapes)
        time_topk(timer, x.n_rows, x.context, x.target_us);
}

void time_all(bool all)
{
    measure::cold_timer timer;
    {
        buffer<uint4> big((size_t)2 << 26);
        buffer<uint32_t> out(1);
        fill_words<<<4096, 256>>>((uint32_t *)big.d, big.n * 4, 1);
        double us = timer.median_us([&] { read_all<<<132 * 8, 512>>>(big.d, big.n, out.d); }, 9);
        printf("ceiling: read %.2f TB/s; an empty kernel takes %.1f us\n", big.n * 16e-6 / us,
               timer.median_us([] { nothing<<<1, 32>>>(); }));
    }
    if (all) {
        time_prefill(timer, 4096, 4096, 986);
        time_prefill(timer, 4096, 32768, 1149);
        time_prefill(timer, 2048, 131072, 1033);
        time_prefill(timer, 4096, 131072, 1017);
    }
    time_decode(timer, 1, 131072, 12.4);
    time_decode(timer, 8, 131072, 46.4);
    time_decode(timer, 32, 32768, 46.4);
    time_decode(timer, 128, 131072, 551);
    time_all_topk(timer);
}

} // namespace

int main(int argc, char **argv)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) {
        fprintf(stderr, "bench_indexer: no GPU\n");
        return 77;
    }
    std::string only = argc > 1 ? argv[1] : "";
    if (only == "spans") {
        check_spans();
        printf("%d checks failed\n", n_failed);
        return n_failed ? 1 : 0;
    }
    if (only != "time" && only != "few") {
        if (only != "topk") check_all_logits();
        check_all_topk(only == "small");
        printf("%d checks failed\n", n_failed);
    }
    if (n_failed == 0 && only == "topk") {
        measure::cold_timer timer;
        time_all_topk(timer);
    } else if (n_failed == 0 && only != "check" && only != "small") {
        time_all(only != "few");
    }
    return n_failed ? 1 : 0;
}
