/* Sampling and log-probabilities where every member of a group has the logits of a part of the ids
 * (parallel.md 2.6): what kernels/cpu/sample_part.c does. Parts are made by a block of threads
 * each; merging is short and, but for the sort, one thread's, in the order of the CPU, so that all
 * members get the same token. */
#include "kernels/cuda/sample.cuh"
#include "kernels/limits.h"

namespace
{

using tr::choice;

enum { MERGE_THREADS = 256, MEMBERS_MAX = TR_CUDA_PARTS_MAX, BEYOND = -3 };

__global__ void __launch_bounds__(tr::SAMPLE_THREADS)
    sample_part(const __grid_constant__ tr_sample_part_args a, const __grid_constant__ tr_rows rows)
{
    __shared__ choice keys_scratch[tr::SAMPLE_SCRATCH];
    __shared__ double scratch[tr::SAMPLE_SCRATCH];
    const int n = tr::chunk_rows(rows, a.i_head, a.n_rows), tid = (int)threadIdx.x;
    choice *key = (choice *)a.workspace + (size_t)blockIdx.x * (size_t)a.n_vocab;
    for (int r = (int)blockIdx.x; r < n; r += (int)gridDim.x) {
        const int h = a.i_head + r;
        const float *logits = a.logits + (size_t)r * a.ld;
        const tr_slot_open &s = a.slots.sampling[rows.slot[rows.head_row[h]]];
        tr_sample_part *p = a.part + r;
        const bool finite = tr::all_finite(logits, a.n_vocab),
                   sampled = finite && rows.target[h] < 0;
        double count = 0, sum = 0;
        choice mine = 0;
        if (sampled) {
            const tr::changes changes = tr::changes_of(a.plan, h);
            for (int i = tid; i < a.n_vocab; i += tr::SAMPLE_THREADS) {
                const choice c = tr::candidate(changes, a.has_token, logits[i], a.first + i);
                key[i] = c;
                mine = c > mine ? c : mine;
                count += c != 0;
            }
            count = tr::block_reduce<double, tr::add<double>>(count, scratch);
        }
        const choice best = tr::block_best(mine, keys_scratch);
        if (best && s.temperature >= 1e-5f) {
            for (int i = tid; i < a.n_vocab; i += tr::SAMPLE_THREADS)
                sum += key[i] ? tr::choice_weight(key[i], tr::choice_logit(best),
                                                  (double)s.temperature)
                              : 0.0;
            sum = tr::block_reduce<double, tr::add<double>>(sum, scratch);
        }
        if (tid == 0) {
            p->finite = finite;
            p->n = (int32_t)count;
            p->sum = sum;
        }
        choice bound = ~(choice)0;
        for (int i = 0; i < TR_PART_BEST; i++) {
            mine = 0;
            for (int j = tid; sampled && bound && j < a.n_vocab; j += tr::SAMPLE_THREADS)
                if (key[j] < bound && key[j] > mine) mine = key[j];
            bound = tr::block_best(mine, keys_scratch);
            if (tid == 0) p->best[i] = bound;
        }
        __syncthreads();
    }
}

/* The best id of each row, whoever wants it. */
__global__ void __launch_bounds__(tr::SAMPLE_THREADS)
    argmax_part(const __grid_constant__ tr_argmax_part_args a, const __grid_constant__ tr_rows rows)
{
    __shared__ choice keys_scratch[tr::SAMPLE_SCRATCH];
    const int r = (int)blockIdx.x;
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    const float *logits = a.logits + (size_t)r * a.ld;
    const tr::changes changes = tr::changes_of(a.plan, a.i_head + r);
    choice best = ~(choice)0;
    if (tr::all_finite(logits, a.n_vocab)) {
        choice mine = 0;
        for (int i = (int)threadIdx.x; i < a.n_vocab; i += tr::SAMPLE_THREADS) {
            const choice c = tr::candidate(changes, a.has_token, logits[i], a.first + i);
            mine = c > mine ? c : mine;
        }
        best = tr::block_best(mine, keys_scratch);
    }
    if (threadIdx.x == 0) a.key[r] = best;
}

__global__ void argmax_take(const __grid_constant__ tr_argmax_take_args a,
                            const __grid_constant__ tr_rows rows)
{
    const int r = (int)(blockIdx.x * blockDim.x + threadIdx.x), h = a.i_head + r;
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    const choice key = a.key[r];
    a.token_out[h] = key == ~(choice)0     ? -2
                     : rows.target[h] >= 0 ? -1
                     : key == 0            ? -2
                                           : tr::choice_id(key);
}

/* ---- all members' ---- */

struct merged { /* the members' best ids of one row, descending */
    const choice *key;
    int n;         /* of these are surely the best of all, in order */
    int64_t n_all; /* ids that may be drawn */
};

__device__ const tr_sample_part &part_of(const tr_sample_merge_args &a, int member, int r)
{
    return a.part[(size_t)member * (size_t)a.n_rows + (size_t)r];
}

/* Mass of all ids, relative to the best. */
__device__ double mass(const tr_sample_merge_args &a, int r, double best, double temperature)
{
    double total = 0;
    for (int i = 0; i < a.n_members; i++) {
        const tr_sample_part &p = part_of(a, i, r);
        if (p.n > 0) total += p.sum * tr::choice_weight(p.best[0], best, temperature);
    }
    return total;
}

/* min_p -> top_k -> top_p -> draw. BEYOND: an id would be needed that no part names. */
__device__ int32_t draw(const tr_sample_merge_args &a, int r, const merged &m,
                        const tr_slot_open &s, int32_t position)
{
    const double temperature = (double)s.temperature, best = tr::choice_logit(m.key[0]);
    int64_t n = m.n_all;
    double total, sum = 0;
    if (s.min_p > 0) {
        int kept = 0;
        total = 0;
        for (; kept < m.n; kept++) {
            const double w = tr::choice_weight(m.key[kept], best, temperature);
            if (w < (double)s.min_p && w < 1) break;
            total += w;
        }
        if (kept == m.n && m.n < m.n_all) return BEYOND;
        n = kept;
    } else {
        total = mass(a, r, best, temperature);
    }
    if (s.top_k > 0 && s.top_k < n) {
        n = s.top_k;
        if (n > m.n) return BEYOND;
        total = 0;
        for (int i = 0; i < n; i++)
            total += tr::choice_weight(m.key[i], best, temperature);
    }
    if (s.top_p < 1.0f) {
        const double enough = (double)s.top_p * total;
        for (int i = 0; i < n; i++) {
            if (i >= m.n) return BEYOND;
            sum += tr::choice_weight(m.key[i], best, temperature);
            if (sum >= enough) n = i + 1;
        }
        total = sum;
    }
    const double mark = total * tr_philox_uniform(s.key, (uint32_t)position + 1, TR_PHILOX_SAMPLE);
    int32_t id = -1;
    sum = 0;
    for (int i = 0; i < n && sum <= mark; i++) {
        if (i >= m.n) return BEYOND;
        const double w = tr::choice_weight(m.key[i], best, temperature);
        sum += w;
        if (w > 0) id = tr::choice_id(m.key[i]);
    }
    return id;
}

/* Bitonic, descending; n a power of two. */
__device__ void sort(choice *key, int n)
{
    for (int size = 2; size <= n; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
                const int j = i ^ step;
                if (j <= i) continue;
                const choice low = key[i], high = key[j];
                if ((i & size) == 0 ? low < high : low > high) {
                    key[i] = high;
                    key[j] = low;
                }
            }
        }
    __syncthreads();
}

__global__ void __launch_bounds__(MERGE_THREADS)
    sample_merge(const __grid_constant__ tr_sample_merge_args a,
                 const __grid_constant__ tr_rows rows)
{
    __shared__ choice key[MEMBERS_MAX * TR_PART_BEST];
    const int r = (int)blockIdx.x, h = a.i_head + r;
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    int n = TR_PART_BEST;
    while (n < a.n_members * TR_PART_BEST)
        n *= 2;
    for (int i = (int)threadIdx.x; i < n; i += MERGE_THREADS)
        key[i] = i < a.n_members * TR_PART_BEST
                     ? part_of(a, i / TR_PART_BEST, r).best[i % TR_PART_BEST]
                     : 0;
    sort(key, n);
    if (threadIdx.x) return;

    bool finite = true;
    choice bound = 1; /* behind a member's last best id there may be others below it */
    merged m = {key, 0, 0};
    for (int i = 0; i < a.n_members; i++) {
        const tr_sample_part &p = part_of(a, i, r);
        finite = finite && p.finite;
        m.n_all += p.n;
        if (p.n > TR_PART_BEST && p.best[TR_PART_BEST - 1] > bound)
            bound = p.best[TR_PART_BEST - 1];
    }
    while (m.n < n && key[m.n] >= bound)
        m.n++;
    const int row = rows.head_row[h];
    const tr_slot_open &s = a.slots.sampling[rows.slot[row]];
    a.token_out[h] = !finite                 ? -2
                     : rows.target[h] >= 0   ? -1
                     : m.n == 0              ? -2
                     : s.temperature < 1e-5f ? tr::choice_id(key[0])
                                             : draw(a, r, m, s, rows.position[row]);
}

/* ---- log-probabilities ---- */

__global__ void __launch_bounds__(tr::SAMPLE_THREADS)
    logprob_part(const __grid_constant__ tr_logprob_part_args a,
                 const __grid_constant__ tr_rows rows)
{
    __shared__ choice keys_scratch[tr::SAMPLE_SCRATCH];
    __shared__ double scratch[tr::SAMPLE_SCRATCH];
    const int r = (int)blockIdx.x;
    int n_top;
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    const int32_t token = tr::wanted(rows, a.slots, a.token_out, a.i_head + r, &n_top);
    const float *x = a.logits + (size_t)r * a.ld;
    tr_logprob_part *p = a.part + r;
    if (token < 0) {
        for (int i = (int)threadIdx.x; i < (int)(sizeof *p / 4); i += tr::SAMPLE_THREADS)
            ((uint32_t *)p)[i] = 0;
        return;
    }
    double best;
    const double sum = tr::sum_exp(x, a.n_vocab, &best, scratch);
    if (threadIdx.x == 0) {
        p->best = (float)best;
        p->sum = sum;
        p->token_logit =
            token >= a.first && token < a.first + a.n_vocab ? x[token - a.first] : -CUDART_INF_F;
    }
    choice bound = ~(choice)0;
    for (int i = 0; i < TR_MAX_LOGPROBS; i++) {
        if (i < n_top && bound) bound = tr::best_below(x, a.n_vocab, bound, keys_scratch);
        if (threadIdx.x) continue;
        const bool found = i < n_top && bound;
        p->top_token[i] = found ? tr::choice_id(bound) + a.first : -1;
        p->top_logit[i] = found ? x[tr::choice_id(bound)] : 0.0f;
    }
}

/* The token's raw logit: one of the members has it. */
__device__ float token_logit(const tr_logprob_part *part, int n_members, int n_rows, int r)
{
    float x = -CUDART_INF_F;
    for (int i = 0; i < n_members; i++)
        x = fmaxf(x, part[(size_t)i * (size_t)n_rows + (size_t)r].token_logit);
    return x;
}

__global__ void __launch_bounds__(tr::SAMPLE_THREADS)
    logprob_rank(const __grid_constant__ tr_logprob_rank_args a,
                 const __grid_constant__ tr_rows rows)
{
    __shared__ int scratch[tr::SAMPLE_SCRATCH];
    const int r = (int)blockIdx.x;
    int n_top, better = 0;
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    const int32_t token = tr::wanted(rows, a.slots, a.token_out, a.i_head + r, &n_top);
    const float *x = a.logits + (size_t)r * a.ld;
    const float level = token < 0 ? 0.0f : token_logit(a.part, a.n_members, a.n_rows, r);
    for (int i = (int)threadIdx.x; i < a.n_vocab && token >= 0; i += tr::SAMPLE_THREADS)
        better += x[i] > level || (x[i] == level && a.first + i < token);
    better = tr::block_reduce<int, tr::add<int>>(better, scratch);
    if (threadIdx.x == 0) a.better[r] = better;
}

/* One thread per row. */
__global__ void logprob_merge(const __grid_constant__ tr_logprob_merge_args a,
                              const __grid_constant__ tr_rows rows)
{
    const int r = (int)(blockIdx.x * blockDim.x + threadIdx.x), h = a.i_head + r;
    int n_top;
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    if (tr::wanted(rows, a.slots, a.token_out, h, &n_top) < 0) return;
    const tr_logprob_part *part = a.part + r;
    const size_t step = (size_t)a.n_rows;
    double best = -CUDART_INF, sum = 0;
    int32_t rank = 1;
    for (int m = 0; m < a.n_members; m++) {
        best = fmax(best, (double)part[(size_t)m * step].best);
        rank += a.better[(size_t)m * step + (size_t)r];
    }
    for (int m = 0; m < a.n_members; m++)
        sum += part[(size_t)m * step].sum * exp((double)part[(size_t)m * step].best - best);
    const double base = log(sum);
    a.rank[h] = rank;
    a.logprob[h] = (float)((double)token_logit(a.part, a.n_members, a.n_rows, r) - best - base);

    uint8_t next[MEMBERS_MAX];
    for (int m = 0; m < a.n_members; m++)
        next[m] = 0;
    for (int i = 0; i < TR_MAX_LOGPROBS; i++) {
        int member = -1;
        float most = 0;
        for (int m = 0; m < a.n_members && i < n_top; m++) { /* members in the order of their ids */
            if (next[m] == TR_MAX_LOGPROBS || part[(size_t)m * step].top_token[next[m]] < 0)
                continue;
            const float x = part[(size_t)m * step].top_logit[next[m]];
            if (member >= 0 && !(x > most)) continue;
            most = x;
            member = m;
        }
        const size_t at = (size_t)h * TR_MAX_LOGPROBS + (size_t)i;
        a.top_token[at] = member < 0 ? -1 : part[(size_t)member * step].top_token[next[member]];
        a.top_logprob[at] = member < 0 ? 0.0f : (float)((double)most - best - base);
        if (member >= 0) next[member]++;
    }
}

} // namespace

cudaError_t tr_cuda_sample_part(const struct tr_sample_part_args *a, cudaStream_t stream)
{
    const size_t slices = a->workspace_bytes / ((size_t)a->n_vocab * sizeof(choice));
    if (a->n_rows <= 0) return cudaSuccess;
    if (!a->workspace || slices < 1) return cudaErrorInvalidValue;
    const size_t grid = (size_t)a->n_rows < slices ? (size_t)a->n_rows : slices;
    sample_part<<<tr::at_most(grid, 1024), tr::SAMPLE_THREADS, 0, stream>>>(*a, *a->rows);
    return cudaGetLastError();
}

cudaError_t tr_cuda_argmax_part(const struct tr_argmax_part_args *a, cudaStream_t stream)
{
    if (a->n_rows <= 0) return cudaSuccess;
    argmax_part<<<(unsigned)a->n_rows, tr::SAMPLE_THREADS, 0, stream>>>(*a, *a->rows);
    return cudaGetLastError();
}

cudaError_t tr_cuda_argmax_take(const struct tr_argmax_take_args *a, cudaStream_t stream)
{
    if (a->n_rows <= 0) return cudaSuccess;
    argmax_take<<<tr::blocks_for((size_t)a->n_rows, 128), 128, 0, stream>>>(*a, *a->rows);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess
               ? tr_cuda_last_tokens(a->rows, &a->slots, a->token_out, a->i_head, a->n_rows, stream)
               : e;
}

cudaError_t tr_cuda_sample_merge(const struct tr_sample_merge_args *a, cudaStream_t stream)
{
    if (a->n_members < 1 || a->n_members > MEMBERS_MAX) return cudaErrorInvalidValue;
    if (a->n_rows <= 0) return cudaSuccess;
    sample_merge<<<(unsigned)a->n_rows, MERGE_THREADS, 0, stream>>>(*a, *a->rows);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess
               ? tr_cuda_last_tokens(a->rows, &a->slots, a->token_out, a->i_head, a->n_rows, stream)
               : e;
}

cudaError_t tr_cuda_logprob_part(const struct tr_logprob_part_args *a, cudaStream_t stream)
{
    if (a->n_rows <= 0) return cudaSuccess;
    logprob_part<<<(unsigned)a->n_rows, tr::SAMPLE_THREADS, 0, stream>>>(*a, *a->rows);
    return cudaGetLastError();
}

cudaError_t tr_cuda_logprob_rank(const struct tr_logprob_rank_args *a, cudaStream_t stream)
{
    if (a->n_rows <= 0) return cudaSuccess;
    logprob_rank<<<(unsigned)a->n_rows, tr::SAMPLE_THREADS, 0, stream>>>(*a, *a->rows);
    return cudaGetLastError();
}

cudaError_t tr_cuda_logprob_merge(const struct tr_logprob_merge_args *a, cudaStream_t stream)
{
    if (a->n_members < 1 || a->n_members > MEMBERS_MAX) return cudaErrorInvalidValue;
    if (a->n_rows <= 0) return cudaSuccess;
    logprob_merge<<<tr::blocks_for((size_t)a->n_rows, 32), 32, 0, stream>>>(*a, *a->rows);
    return cudaGetLastError();
}
