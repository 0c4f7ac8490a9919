/* Sampling and log-probabilities (chat.md 4.2, model.md 8). A block of threads takes a row. Instead
 * of sorting, it searches: the set that a filter keeps, and the id where the drawn mass ends, are
 * both "all keys from v on" for some key v, found by bisection, each step one pass over the row's
 * keys and weights. Sums over a larger set are never smaller, also when rounded, so the search is
 * exact. */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample.cuh"

namespace
{

using tr::choice;

enum { ROWS_AT_A_TIME = 32 };

struct list { /* one row's candidates: key (0: none) and weight of every id, in the workspace */
    choice *key;
    double *weight;
    int n;
    choice *keys_scratch;
    double *scratch;
};

__device__ double mass_from(const list &l, choice v)
{
    double sum = 0;
    for (int i = (int)threadIdx.x; i < l.n; i += tr::SAMPLE_THREADS)
        sum += l.key[i] >= v ? l.weight[i] : 0.0;
    return tr::block_reduce<double, tr::add<double>>(sum, l.scratch);
}

__device__ double count_from(const list &l, choice v)
{
    int n = 0;
    for (int i = (int)threadIdx.x; i < l.n; i += tr::SAMPLE_THREADS)
        n += l.key[i] >= v;
    return tr::block_reduce<double, tr::add<double>>((double)n, l.scratch);
}

/* The largest v in [low, high) with measure(v) >= enough (above: > enough); measure(low) is so. */
template <double measure(const list &, choice)>
__device__ choice search(const list &l, choice low, choice high, double enough, bool above)
{
    while (high - low > 1) {
        const choice middle = low + (high - low) / 2;
        const double x = measure(l, middle);
        if (above ? x > enough : x >= enough)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The smallest key from v on with a weight above 0; all ones: there is none. */
__device__ choice last_possible(const list &l, choice v)
{
    choice mine = ~(choice)0;
    for (int i = (int)threadIdx.x; i < l.n; i += tr::SAMPLE_THREADS)
        if (l.key[i] >= v && l.weight[i] > 0 && l.key[i] < mine) mine = l.key[i];
    return ~tr::block_best(~mine, l.keys_scratch);
}

/* min_p -> top_k -> top_p -> draw, best being the best key. */
__device__ int32_t draw(const list &l, choice best, const tr_slot_open &s, int32_t position)
{
    const double temperature = (double)s.temperature, logit = tr::choice_logit(best);
    double total = 0, n = 0;
    for (int i = (int)threadIdx.x; i < l.n; i += tr::SAMPLE_THREADS) {
        double w = l.key[i] ? tr::choice_weight(l.key[i], logit, temperature) : 0.0;
        if (l.key[i] && w < (double)s.min_p && w < 1) l.key[i] = 0;
        if (!l.key[i]) w = 0;
        l.weight[i] = w;
        total += w;
        n += l.key[i] != 0;
    }
    total = tr::block_reduce<double, tr::add<double>>(total, l.scratch);
    n = tr::block_reduce<double, tr::add<double>>(n, l.scratch);
    choice low = 1;
    if (s.top_k > 0 && (double)s.top_k < n) {
        low = search<count_from>(l, low, best + 1, (double)s.top_k, false);
        total = mass_from(l, low);
    }
    if (s.top_p < 1.0f) { /* the smallest set that reaches top_p: the one that crosses it stays */
        low = search<mass_from>(l, low, best + 1, (double)s.top_p * total, false);
        total = mass_from(l, low);
    }
    /* The row at position p gives the token at p + 1. */
    const double mark = total * tr_philox_uniform(s.key, (uint32_t)position + 1, TR_PHILOX_SAMPLE);
    const choice c =
        total > mark ? search<mass_from>(l, low, best + 1, mark, true) : last_possible(l, low);
    return tr::choice_id(c);
}

/* A row's best id is looked for by PARTS blocks, each in its part of the ids. */
enum { PARTS = 128, PARTS_MANY = 32, MANY_ROWS = 16, PART_THREADS = 256, NOT_FINITE = -1 };

/* Of many rows fewer parts occupy the GPU, and one wave of blocks is enough. */
int parts_of(int n_rows)
{
    return n_rows < MANY_ROWS ? PARTS : PARTS_MANY;
}

/* part[row][parts]: the best of each as the logits are, without the plan's changes; 0 where no id has a token, all ones where a
 * logit is not finite. */
__global__ void __launch_bounds__(PART_THREADS)
    best_of_parts(const __grid_constant__ tr_sample_args a, const __grid_constant__ tr_rows rows,
                  choice *part)
{
    __shared__ choice scratch[tr::SAMPLE_SCRATCH];
    const int r = (int)blockIdx.y, parts = (int)gridDim.x, each = (a.n_vocab + parts - 1) / parts,
              begin = (int)blockIdx.x * each, end = min(begin + each, a.n_vocab);
    tr::early::follow();
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    const float *logits = a.logits + (size_t)r * a.ld;
    choice mine = 0;
#pragma unroll 4
    for (int i = begin + (int)threadIdx.x; i < end; i += PART_THREADS) {
        const float x = logits[i];
        const bool finite = (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u;
        const bool has = a.has_token[i / 32] >> (i % 32) & 1;
        const choice c = !finite ? (choice)NOT_FINITE : has ? tr::make_choice(x, i) : 0;
        mine = c > mine ? c : mine;
    }
    const choice best = tr::block_best(mine, scratch);
    if (threadIdx.x == 0) part[r * parts + (int)blockIdx.x] = best;
}

__global__ void __launch_bounds__(tr::SAMPLE_THREADS)
    sample(const __grid_constant__ tr_sample_args a, const __grid_constant__ tr_rows rows,
           const choice *part, int n_parts)
{
    __shared__ choice keys_scratch[tr::SAMPLE_SCRATCH];
    __shared__ double scratch[tr::SAMPLE_SCRATCH];
    tr::early::follow();
    const int n = tr::chunk_rows(rows, a.i_head, a.n_rows);
    list l = {(choice *)a.workspace + (size_t)blockIdx.x * 2 * (size_t)a.n_vocab, nullptr,
              a.n_vocab, keys_scratch, scratch};
    l.weight = (double *)(l.key + a.n_vocab);
    for (int r = (int)blockIdx.x; r < n; r += (int)gridDim.x) {
        const int h = a.i_head + r, row = rows.head_row[h];
        const float *logits = a.logits + (size_t)r * a.ld;
        const tr_slot_open &s = a.slots.sampling[rows.slot[row]];
        const tr::changes changes = tr::changes_of(a.plan, h);
        choice best = tr::block_best(
            (int)threadIdx.x < n_parts ? part[r * n_parts + (int)threadIdx.x] : 0, keys_scratch);
        int32_t token = -1;
        if (best == (choice)NOT_FINITE) {
            token = -2;
        } else if (rows.target[h] < 0) {
            const bool greedy = s.temperature < 1e-5f;
            if (!greedy || changes.n > 0) {
                choice mine = 0;
                for (int i = (int)threadIdx.x; i < l.n; i += tr::SAMPLE_THREADS) {
                    const choice c = tr::candidate(changes, a.has_token, logits[i], i);
                    l.key[i] = c;
                    mine = c > mine ? c : mine;
                }
                best = tr::block_best(mine, keys_scratch);
            }
            token = !best    ? -2
                    : greedy ? tr::choice_id(best)
                             : draw(l, best, s, rows.position[row]);
        }
        if (threadIdx.x == 0) a.token_out[h] = token;
        __syncthreads();
    }
}

/* A thread per slot: the last of its head rows that was sampled. */
__global__ void last_tokens(const __grid_constant__ tr_rows rows,
                            const __grid_constant__ tr_slots slots, const int32_t *token_out,
                            int i_head, int n_rows)
{
    tr::early::follow();
    const int n = tr::chunk_rows(rows, i_head, n_rows),
              slot = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (slot >= slots.n_slots) return;
    for (int h = i_head + n - 1; h >= i_head; h--) {
        if (rows.slot[rows.head_row[h]] != slot || token_out[h] < 0) continue;
        slots.last_token[slot] = token_out[h];
        return;
    }
}

__global__ void __launch_bounds__(tr::SAMPLE_THREADS, 2)
    logprobs(const __grid_constant__ tr_logprobs_args a, const __grid_constant__ tr_rows rows)
{
    __shared__ choice keys_scratch[tr::SAMPLE_SCRATCH];
    __shared__ double scratch[tr::SAMPLE_SCRATCH];
    const int r = (int)blockIdx.x, h = a.i_head + r;
    int n_top;
    tr::early::follow();
    if (r >= tr::chunk_rows(rows, a.i_head, a.n_rows)) return;
    const int32_t token = tr::wanted(rows, a.slots, a.token_out, h, &n_top);
    if (token < 0 || token >= a.n_vocab) return;

    const float *x = a.logits + (size_t)r * a.ld;
    double best;
    const double base = log(tr::sum_exp(x, a.n_vocab, &best, scratch));
    double rank = 0;
    for (int i = (int)threadIdx.x; i < a.n_vocab; i += tr::SAMPLE_THREADS)
        rank += x[i] > x[token] || (x[i] == x[token] && i < token);
    rank = tr::block_reduce<double, tr::add<double>>(rank, scratch);
    if (threadIdx.x == 0) {
        a.rank[h] = 1 + (int32_t)rank;
        a.logprob[h] = (float)((double)x[token] - best - base);
    }
    choice bound = ~(choice)0;
    for (int i = 0; i < TR_MAX_LOGPROBS; i++) {
        const size_t at = (size_t)h * TR_MAX_LOGPROBS + (size_t)i;
        if (i < n_top && bound) bound = tr::best_below(x, a.n_vocab, bound, keys_scratch);
        if (threadIdx.x) continue;
        const bool found = i < n_top && bound;
        a.top_token[at] = found ? tr::choice_id(bound) : -1;
        a.top_logprob[at] = found ? (float)((double)x[tr::choice_id(bound)] - best - base) : 0.0f;
    }
}

} // namespace

size_t tr_cuda_sample_workspace(int n_rows, int n_vocab)
{
    if (n_rows <= 0 || n_vocab <= 0) return 0;
    return (size_t)(n_rows < ROWS_AT_A_TIME ? n_rows : ROWS_AT_A_TIME) * (size_t)n_vocab * 2 *
               sizeof(choice) +
           (size_t)n_rows * PARTS * sizeof(choice);
}

cudaError_t tr_cuda_last_tokens(const tr_rows *rows, const tr_slots *slots,
                                const int32_t *token_out, int i_head, int n_rows,
                                cudaStream_t stream)
{
    return tr::early::launch(last_tokens, 1, dim3(tr::blocks_for((size_t)slots->n_slots, 128)), 128,
                             0, stream, *rows, *slots, token_out, i_head, n_rows);
}

cudaError_t tr_cuda_sample(const struct tr_sample_args *a, cudaStream_t stream)
{
    const size_t each = (size_t)a->n_vocab * 2 * sizeof(choice),
                 parts = a->n_rows > 0 ? (size_t)a->n_rows * PARTS * sizeof(choice) : 0;
    if (a->n_rows <= 0) return cudaSuccess;
    if (!a->workspace || a->workspace_bytes < parts + each || a->n_rows > 65535)
        return cudaErrorInvalidValue;
    const size_t slices = (a->workspace_bytes - parts) / each,
                 grid = (size_t)a->n_rows < slices ? (size_t)a->n_rows : slices;
    choice *part = (choice *)((char *)a->workspace + a->workspace_bytes / 8 * 8 - parts);
    const int n_parts = parts_of(a->n_rows);
    cudaError_t e =
        tr::early::launch(best_of_parts, 1, dim3((unsigned)n_parts, (unsigned)a->n_rows),
                          PART_THREADS, 0, stream, *a, *a->rows, part);
    if (e != cudaSuccess) return e;
    e = tr::early::launch(sample, 1, dim3(tr::at_most(grid, 1024)), tr::SAMPLE_THREADS, 0, stream,
                          *a, *a->rows, part, n_parts);
    return e == cudaSuccess
               ? tr_cuda_last_tokens(a->rows, &a->slots, a->token_out, a->i_head, a->n_rows, stream)
               : e;
}

cudaError_t tr_cuda_logprobs(const struct tr_logprobs_args *a, cudaStream_t stream)
{
    if (a->n_rows <= 0) return cudaSuccess;
    return tr::early::launch(logprobs, 1, dim3((unsigned)a->n_rows), tr::SAMPLE_THREADS, 0, stream,
                             *a, *a->rows);
}
