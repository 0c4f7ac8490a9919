/* Which experts a row takes, and the rows of each expert (model.md 6). */
#include "kernels/cuda/common.cuh"

namespace
{

enum { WARPS = 4, EXPERTS_MAX = 1024, THREADS = 256 };

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

/* Block e: where expert e begins is how many pairs go to experts before it; then its own,
 * ascending. The last block, past the experts, writes the end. */
__global__ void __launch_bounds__(THREADS) moe_pack(const __grid_constant__ tr_moe_pack_args a)
{
    __shared__ int scratch[THREADS / 32 + 1];
    const int mine = (int)blockIdx.x, n = tr::live_rows(a.n, a.n_max) * a.k;
    int before = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        const int e = a.expert[i] - a.e_first;
        before += e >= 0 && e < a.n_local && e < mine;
    }
    before = tr::block_reduce<int, tr::add<int>>(before, scratch);
    if (threadIdx.x == 0) a.start[mine] = before;
    if (mine == a.n_local) return;
    for (int i0 = 0; i0 < n; i0 += THREADS) {
        const int i = i0 + (int)threadIdx.x;
        const int hit = i < n && a.expert[i] - a.e_first == mine;
        int total;
        const int at = before + tr::block_scan(hit, scratch, &total);
        if (hit) a.pair[at] = i;
        before += total;
    }
}

} // namespace

cudaError_t tr_cuda_router(const struct tr_router_args *a, cudaStream_t stream)
{
    if (a->n_experts < 1 || a->n_experts > EXPERTS_MAX || a->k < 1 || a->k > a->n_experts ||
        a->n_group < 1 || a->n_experts % a->n_group != 0)
        return cudaErrorInvalidValue;
    if (a->n_max <= 0) return cudaSuccess;
    const size_t bytes = (size_t)WARPS * ((size_t)(2 * a->n_experts + a->n_group) * 4 +
                                          (size_t)(a->n_experts + a->n_group));
    const unsigned blocks = tr::blocks_for((size_t)a->n_max, WARPS);
    router<<<blocks, WARPS * 32, bytes, stream>>>(*a);
    return cudaGetLastError();
}

cudaError_t tr_cuda_moe_pack(const struct tr_moe_pack_args *a, cudaStream_t stream)
{
    moe_pack<<<(unsigned)a->n_local + 1, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}
