/* What sampling from a whole row (sample.cu) and from parts of a vocabulary (sample_part.cu) share.
 * Same numbers as kernels/cpu/ sample.c, but for the order of sums: a tree over the threads of a
 * block, in double. */
#ifndef TR_CUDA_SAMPLE_CUH
#define TR_CUDA_SAMPLE_CUH

#include <float.h>

#include "kernels/cuda/common.cuh"
#include "kernels/philox.h"

namespace tr
{

enum { SAMPLE_THREADS = 512, SAMPLE_SCRATCH = SAMPLE_THREADS / 32 + 1 };

typedef unsigned long long
    choice; /* the larger is drawn first: logit descending, id ascending; 0: none */

__device__ __forceinline__ choice make_choice(float logit, int32_t id)
{
    uint32_t u = __float_as_uint(logit + 0.0f); /* -0 is 0 */
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (choice)u << 32 | (uint32_t) ~(uint32_t)id;
}
__device__ __forceinline__ int32_t choice_id(choice c)
{
    return (int32_t) ~(uint32_t)c;
}
__device__ __forceinline__ double choice_logit(choice c)
{
    const uint32_t u = (uint32_t)(c >> 32);
    return (double)__uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}
/* Unnormalised probability after temperature; 1 for the best. */
__device__ __forceinline__ double choice_weight(choice c, double best, double temperature)
{
    return exp((choice_logit(c) - best) / temperature);
}

__device__ __forceinline__ int chunk_rows(const tr_rows &rows, int i_head, int n_rows)
{
    return min(live_rows(rows.n_head, rows.n_head_max) - i_head, n_rows);
}

struct changes { /* of one head row, tokens ascending */
    const tr_logit_change *first;
    int n;
};

/* The plan's changes are sorted by (head_row, token). */
__device__ inline changes changes_of(const tr_plan *plan, int32_t head_row)
{
    const tr_logit_change *c = (const tr_logit_change *)((const char *)plan + plan->at_changes);
    int low = 0, high = plan->n_changes;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (c[middle].head_row < head_row)
            low = middle + 1;
        else
            high = middle;
    }
    changes r = {c + low, 0};
    high = plan->n_changes;
    for (int begin = low; begin < high;) {
        const int middle = begin + (high - begin) / 2;
        if (c[middle].head_row <= head_row)
            begin = middle + 1;
        else
            high = middle;
    }
    r.n = high - low;
    return r;
}

/* The key of an id that may be drawn, else 0. */
__device__ inline choice candidate(const changes &list, const uint32_t *has_token, float logit,
                                   int32_t id)
{
    if (!(has_token[id / 32] >> (id % 32) & 1)) return 0;
    int low = 0, high = list.n;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (list.first[middle].token < id)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == list.n || list.first[low].token != id) return make_choice(logit, id);
    const tr_logit_change &c = list.first[low];
    double x = (double)logit + (double)c.bias;
    if (!(x > -CUDART_INF)) return 0;
    if (c.repetition != 1.0f) x = x > 0 ? x / (double)c.repetition : x * (double)c.repetition;
    x -= (double)c.penalty;
    return make_choice((float)fmax(fmin(x, (double)FLT_MAX), -(double)FLT_MAX), id);
}

__device__ __forceinline__ bool all_finite(const float *x, int n)
{
    int bad = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        bad |= (__float_as_uint(x[i]) & 0x7fffffffu) >= 0x7f800000u;
    return !__syncthreads_or(bad);
}

__device__ __forceinline__ choice block_best(choice mine, choice *scratch)
{
    return block_reduce<choice, larger<choice>>(mine, scratch);
}

/* The token whose log-probability head row h wants, and how many others; -1: it wants none. */
__device__ __forceinline__ int32_t wanted(const tr_rows &rows, const tr_slots &slots,
                                          const int32_t *token_out, int h, int *n_top)
{
    const tr_slot_open &s = slots.sampling[rows.slot[rows.head_row[h]]];
    const int32_t target = rows.target[h], token = target >= 0 ? target : token_out[h];
    *n_top = min(target >= 0 ? s.n_prompt_logprobs : s.n_logprobs, (int)TR_MAX_LOGPROBS);
    return *n_top < 0 || token_out[h] == -2 ? -1 : token;
}

/* The largest of x, and the sum of exp(x - it). */
__device__ inline double sum_exp(const float *x, int n, double *best, double *scratch)
{
    float most = -CUDART_INF_F;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        most = x[i] > most ? x[i] : most;
    *best = block_reduce<double, larger<double>>((double)most, scratch);
    double sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        sum += exp((double)x[i] - *best);
    return block_reduce<double, add<double>>(sum, scratch);
}

/* The best id of x below `bound`. */
__device__ inline choice best_below(const float *x, int n, choice bound, choice *scratch)
{
    choice mine = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        const choice c = make_choice(x[i], i);
        if (c < bound && c > mine) mine = c;
    }
    return block_best(mine, scratch);
}

} // namespace tr

/* sample.cu: every slot's newest token among the head rows of a chunk. */
cudaError_t tr_cuda_last_tokens(const tr_rows *rows, const tr_slots *slots,
                                const int32_t *token_out, int i_head, int n_rows,
                                cudaStream_t stream);

#endif
