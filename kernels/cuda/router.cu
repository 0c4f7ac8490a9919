/* Which experts a row takes, and the rows of each expert (model.md 6). */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/limits.h"

namespace
{

enum {
    WARPS = 4,
    EXPERTS_MAX = TR_CUDA_EXPERTS_MAX,
    THREADS = 256,
    MORE_THREADS = 1024,
    PACK_MANY = 8192
};

/* Index of the largest b, the first of equals; b is -inf or more, no NaN. */
__device__ int warp_best(const float *b, const uint8_t *taken, int n)
{
    float best = -CUDART_INF_F;
    int at = INT32_MAX;
    for (int i = (int)threadIdx.x % 32; i < n; i += 32)
        if (!taken[i] && (at == INT32_MAX || b[i] > best)) {
            best = b[i];
            at = i;
        }
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        const float b2 = __shfl_xor_sync(0xffffffffu, best, half);
        const int at2 = __shfl_xor_sync(0xffffffffu, at, half);
        if (at2 != INT32_MAX && (at == INT32_MAX || b2 > best || (b2 == best && at2 < at))) {
            best = b2;
            at = at2;
        }
    }
    return at;
}

/* With a bias the sum of a group's two best, without one its best. */
__device__ float group_score(const float *b, int n, bool has_bias)
{
    float first = -CUDART_INF_F, second = -CUDART_INF_F;
    for (int i = 0; i < n; i++) {
        if (b[i] > first) {
            second = first;
            first = b[i];
        } else if (b[i] > second) {
            second = b[i];
        }
    }
    return has_bias && n > 1 ? first + second : first;
}

__global__ void __launch_bounds__(WARPS * 32) router(const __grid_constant__ tr_router_args a)
{
    extern __shared__ float shared[];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int r = (int)blockIdx.x * WARPS + warp, n = a.n_experts, per_group = n / a.n_group;
    float *s = shared + warp * (2 * n + a.n_group), *b = s + n, *score = b + n;
    uint8_t *taken = (uint8_t *)(shared + WARPS * (2 * n + a.n_group)) + warp * (n + a.n_group),
            *keep = taken + n;
    tr::early::follow();
    if (r >= tr::live_rows(a.n, a.n_max)) return;

    const float *logits = a.logits + (size_t)r * (size_t)n;
    for (int e = lane; e < n; e += 32) {
        s[e] = 1.0f / (1.0f + expf(-logits[e]));
        const float biased = a.bias ? s[e] + a.bias[e] : s[e];
        b[e] = isnan(biased) ? -CUDART_INF_F : biased;
        taken[e] = 0;
    }
    __syncwarp();
    if (a.n_group > 1) {
        for (int g = lane; g < a.n_group; g += 32) {
            const float x = group_score(b + g * per_group, per_group, a.bias != nullptr);
            score[g] = isnan(x) ? -CUDART_INF_F : x; /* inf - inf */
            keep[g] = 0;
        }
        __syncwarp();
        for (int i = 0; i < a.topk_group; i++) {
            const int g = warp_best(score, keep, a.n_group);
            if (lane == 0 && g != INT32_MAX) keep[g] = 1;
            __syncwarp();
        }
        for (int e = lane; e < n; e += 32)
            if (!keep[e / per_group]) b[e] = -CUDART_INF_F;
        __syncwarp();
    }
    int32_t *expert = a.expert + (size_t)r * (size_t)a.k;
    float *weight = a.weight + (size_t)r * (size_t)a.k;
    float sum = 0;
    for (int j = 0; j < a.k; j++) {
        const int e = warp_best(b, taken, n);
        sum += s[e];
        if (lane == 0) {
            taken[e] = 1;
            expert[j] = e;
        }
        __syncwarp();
    }
    for (int j = lane; j < a.k; j += 32) {
        const float w = s[expert[j]];
        weight[j] = (a.norm_topk ? w / (sum + 1e-20f) : w) * a.scaling;
    }
}

/* A number that orders as x does, above 0; -0 is 0. */
__device__ __forceinline__ uint32_t ordered(float x)
{
    const uint32_t u = __float_as_uint(x + 0.0f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* The k best keys, one after the other, and their weights: lane i keeps the i-th. */
template <int V>
__device__ __forceinline__ void take_best(const tr_router_args &a, int r, const float (&s)[V],
                                          uint32_t (&key)[V])
{
    const int lane = (int)threadIdx.x % 32;
    float sum = 0, mine = 0;
    int expert = 0;
    for (int i = 0; i < a.k; i++) {
        uint32_t best = key[0];
        int at = 0;
        float score = s[0];
#pragma unroll
        for (int j = 1; j < V; j++)
            if (key[j] > best) {
                best = key[j];
                at = j;
                score = s[j];
            }
        const uint32_t top = __reduce_max_sync(0xffffffffu, best);
        const int from = __ffs((int)__ballot_sync(0xffffffffu, best == top)) - 1;
        const int e = __shfl_sync(0xffffffffu, lane * V + at, from);
        const float w = __shfl_sync(0xffffffffu, score, from);
#pragma unroll
        for (int j = 0; j < V; j++)
            if (lane * V + j == e) key[j] = 0;
        sum += w;
        if (lane == i) {
            mine = w;
            expert = e;
        }
    }
    if (lane >= a.k) return;
    a.expert[(size_t)r * (size_t)a.k + (size_t)lane] = expert;
    a.weight[(size_t)r * (size_t)a.k + (size_t)lane] =
        (a.norm_topk ? mine / (sum + 1e-20f) : mine) * a.scaling;
}

/* The same in registers where 32 lanes share the experts evenly and several of them, or one, share a group: lane l has the V
 * experts from V l on. */
template <int V>
__global__ void __launch_bounds__(WARPS * 32)
    router_lanes(const __grid_constant__ tr_router_args a, int lanes)
{
    const int lane = (int)threadIdx.x % 32, r = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    float s[V], bias[V];
    uint32_t key[V]; /* of biased scores; 0: taken */

#pragma unroll
    for (int j = 0; j < V; j++)
        bias[j] = a.bias ? a.bias[lane * V + j] : 0.0f;
    tr::early::follow();
    if (r >= tr::live_rows(a.n, a.n_max)) return;
    const float *logits = a.logits + (size_t)r * (32 * V) + lane * V;
#pragma unroll
    for (int j = 0; j < V; j++)
        s[j] = logits[j];
    float first = -CUDART_INF_F, second = -CUDART_INF_F;
#pragma unroll
    for (int j = 0; j < V; j++) {
        s[j] = 1.0f / (1.0f + expf(-s[j]));
        const float biased = a.bias ? s[j] + bias[j] : s[j];
        const float b = isnan(biased) ? -CUDART_INF_F : biased;
        key[j] = ordered(b);
        second = fmaxf(second, fminf(first, b));
        first = fmaxf(first, b);
    }
    if (a.n_group > 1) {
        for (int d = 1; d < lanes; d *= 2) {
            const float x = __shfl_xor_sync(0xffffffffu, first, d),
                        y = __shfl_xor_sync(0xffffffffu, second, d);
            second = fmaxf(fminf(first, x), fmaxf(second, y));
            first = fmaxf(first, x);
        }
        const float sum = a.bias && lanes * V > 1 ? first + second : first;
        const float mine = isnan(sum) ? -CUDART_INF_F : sum; /* inf - inf */
        int before = 0;                                      /* groups that are better */
        for (int g = 0; g < a.n_group; g++) {
            const float other = __shfl_sync(0xffffffffu, mine, g * lanes);
            before += other > mine || (other == mine && g < lane / lanes);
        }
#pragma unroll
        for (int j = 0; j < V; j++)
            if (before >= a.topk_group) key[j] = ordered(-CUDART_INF_F);
    }
    take_best<V>(a, r, s, key);
}

enum { EACH = 16 }; /* neighbours that a thread looks at */

/* Which of up to EACH choices from the i-th on fulfil f: a bit each. */
template <class F>
__device__ __forceinline__ unsigned which(const int32_t *expert, int i, int n, const F &f)
{
    unsigned bits = 0;
    if (i + EACH <= n && (uintptr_t)expert % 16 == 0) {
#pragma unroll
        for (int k = 0; k < EACH; k += 4) {
            const int4 e = *(const int4 *)(expert + i + k);
            bits |= (unsigned)f(e.x) << k | (unsigned)f(e.y) << (k + 1) |
                    (unsigned)f(e.z) << (k + 2) | (unsigned)f(e.w) << (k + 3);
        }
    } else {
        for (int k = 0; i + k < n; k++)
            bits |= (unsigned)f(expert[i + k]) << k;
    }
    return bits;
}

/* Block e: where expert e begins is how many pairs go to experts before it; then its own,
 * ascending. The last block, past the experts, writes the end. T threads: more where there are many pairs to look at. */
template <int T>
__global__ void __launch_bounds__(T) moe_pack(const __grid_constant__ tr_moe_pack_args a)
{
    __shared__ int scratch[T / 32 + 1];
    tr::early::follow();
    const int mine = (int)blockIdx.x, n = tr::live_rows(a.n, a.n_max) * a.k,
              each = n <= T ? 1 : EACH; /* few pairs: a thread each */
    const auto is_before = [&](int32_t x) {
        const int e = x - a.e_first;
        return e >= 0 && e < a.n_local && e < mine;
    };
    const auto is_mine = [&](int32_t x) { return x - a.e_first == mine; };
    int before = 0;
    for (int i = (int)threadIdx.x * each; i < n; i += T * each)
        before += __popc(which(a.expert, i, each == 1 ? i + 1 : n, is_before));
    before = tr::block_reduce<int, tr::add<int>>(before, scratch);
    if (threadIdx.x == 0) a.start[mine] = before;
    if (mine == a.n_local) return;
    const int first = before;
    for (int i0 = 0; i0 < n; i0 += T * each) {
        const int i = i0 + (int)threadIdx.x * each;
        unsigned hits = i < n ? which(a.expert, i, each == 1 ? i + 1 : n, is_mine) : 0;
        int total;
        int at = before + tr::block_scan(__popc(hits), scratch, &total);
        for (; hits; hits &= hits - 1)
            a.pair[at++] = i + __ffs((int)hits) - 1;
        before += total;
    }
    if (a.rows && threadIdx.x == 0) a.rows[mine] += (uint64_t)(before - first);
}

} // namespace

cudaError_t tr_cuda_router(const struct tr_router_args *a, cudaStream_t stream)
{
    if (a->n_experts < 1 || a->n_experts > EXPERTS_MAX || a->k < 1 || a->k > a->n_experts ||
        a->n_group < 1 || a->n_experts % a->n_group != 0)
        return cudaErrorInvalidValue;
    if (a->n_max <= 0) return cudaSuccess;
    const int lanes = a->n_group <= 32 && 32 % a->n_group == 0 ? 32 / a->n_group : 0;
    const dim3 grid(tr::blocks_for((size_t)a->n_max, WARPS));
    if (lanes && a->k <= 32 && a->n_experts == 256)
        return tr::early::launch(router_lanes<8>, 1, grid, WARPS * 32, 0, stream, *a, lanes);
    if (lanes && a->k <= 32 && a->n_experts == 64)
        return tr::early::launch(router_lanes<2>, 1, grid, WARPS * 32, 0, stream, *a, lanes);
    const size_t bytes = (size_t)WARPS * ((size_t)(2 * a->n_experts + a->n_group) * 4 +
                                          (size_t)(a->n_experts + a->n_group));
    return tr::early::launch(router, 1, grid, WARPS * 32, bytes, stream, *a);
}

cudaError_t tr_cuda_moe_pack(const struct tr_moe_pack_args *a, cudaStream_t stream)
{
    const bool many = (size_t)a->n_max * (size_t)a->k > PACK_MANY;
    return tr::early::launch(many ? moe_pack<MORE_THREADS> : moe_pack<THREADS>, 1,
                             dim3((unsigned)a->n_local + 1), many ? MORE_THREADS : THREADS, 0,
                             stream, *a);
}
