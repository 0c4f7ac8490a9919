/* Which rows of a step have their keys expanded, and expanding them (sparse_mla_expand.cuh). Both read on the device what the
 * step is: its rows, their slots, the slots' pages. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/row_words.cuh"
#include "kernels/cuda/sparse_mla_expand.cuh"
#include "kernels/cuda/sparse_mla_tile.cuh"

namespace tr
{
namespace mla
{

namespace
{

enum { EXPAND_THREADS = 256 };
/* Of a record: 16-byte pieces of latents and of rope. */
enum { LATENT_PIECES = D_LATENT / 16, PIECES = LATENT_PIECES + (D_KEY - D_LATENT) / 8 };

struct plan_shared {
    int32_t n_rows[EXPAND_RUNS], context[EXPAND_RUNS], slot[EXPAND_RUNS], base[EXPAND_RUNS];
    uint32_t space[words::WARPS];
};

/* What the rows of a run that count have together. By a whole warp, alike in its lanes. */
struct run_sum {
    int run, n_rows, context;

    __device__ __forceinline__ void end(plan_shared *sh)
    {
        if (threadIdx.x % 32 == 0 && n_rows > 0 && run < EXPAND_RUNS) {
            atomicAdd(&sh->n_rows[run], n_rows);
            atomicMax(&sh->context[run], context);
        }
        n_rows = context = 0;
        run++;
    }
    /* The rows of a word: where runs begin, which rows count, and this lane's context. */
    __device__ __forceinline__ void add(uint32_t begins, uint32_t count, int mine, plan_shared *sh)
    {
        uint32_t rest = ~0u; /* lanes behind the last run that ended */
        for (;;) {
            const uint32_t first = begins & -begins, here = rest & (first - 1) & count;
            if (here) {
                n_rows += __popc(here);
                context =
                    max(context, __reduce_max_sync(~0u, here >> threadIdx.x % 32 & 1 ? mine : 0));
            }
            if (!first) return;
            end(sh);
            rest = ~(first - 1);
            begins ^= first;
        }
    }
};

/* Rows that want a list are the absorbed ones; what a pad row's output is nobody asks, but it is written.
 *
 * Number the runs of the 8,192 rows from `first` on; base[i] is the run of row i for now. Returns how many there are with the
 * n_runs before. */
__device__ int find_runs(const tr_rows &rows, int n, int first, int n_runs, plan_shared *sh,
                         int32_t *base)
{
    enum { EACH = words::EACH };
    const int lane = (int)threadIdx.x % 32, front = words::row_at(first, 0) - lane - 1;
    const words::batch my(rows, n, first);
    uint32_t begins[EACH], count[EACH];
    words::counts mine = {0, 0}, all;
    int s = front >= 0 && front < n ? rows.slot[front] : -1;

#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int i = words::row_at(first, k), s_up = __shfl_up_sync(~0u, my.slot[k], 1);
        begins[k] = __ballot_sync(~0u, i < n && (i == 0 || (lane ? s_up : s) != my.slot[k]));
        count[k] = __ballot_sync(~0u, i < n && !my.dense[k] && my.write[k] >= 0);
        mine.a += __popc(begins[k]);
        s = __shfl_sync(~0u, my.slot[k], 31);
    }
    run_sum sum = {n_runs + words::scan(mine, sh->space, &all).a - 1, 0, 0};
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int i = words::row_at(first, k), bit = (int)(begins[k] >> lane & 1),
                  run = sum.run + __popc(begins[k] & words::before()) + bit;
        if (i < n) base[i] = run;
        if (bit && run < EXPAND_RUNS) sh->slot[run] = my.slot[k];
        sum.add(begins[k], count[k], my.position[k] + 1, sh);
    }
    sum.end(sh);
    return n_runs + all.a;
}

/* Room for those that pay, in order. By one thread. */
__device__ void place_runs(plan_shared *sh, int n_runs, const expansion &e)
{
    int n = 0, page = 0;

    for (int r = 0; r < min(n_runs, (int)EXPAND_RUNS); r++) {
        const int pages = (sh->context[r] + TR_PAGE_TOKENS - 1) / TR_PAGE_TOKENS;
        const bool pays =
            sh->n_rows[r] >= EXPAND_ROWS && (int64_t)sh->n_rows[r] * EXPAND_KEYS >= sh->context[r];
        sh->base[r] = -1;
        if (!pays || pages > e.pages_max - page) continue;
        sh->base[r] = page * TR_PAGE_TOKENS;
        e.runs[n++] = {sh->slot[r], page, pages};
        page += pages;
    }
    e.n[2] = n;
    e.n[3] = page;
}

/* Where the 8,192 rows from `first` on find their keys, and the lists they go to; done: how many are there before. */
__device__ void list_rows(const tr_rows &rows, int n, int first, const expansion &e,
                          plan_shared *sh, words::counts *done)
{
    enum { EACH = words::EACH };
    const int lane = (int)threadIdx.x % 32;
    const words::batch my(rows, n, first);
    int run[EACH], base[EACH];
    uint32_t yes[EACH], no[EACH];
    words::counts mine = {0, 0}, all;

#pragma unroll
    for (int k = 0; k < EACH; k++)
        run[k] = e.base[min(words::row_at(first, k), n - 1)];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const bool wanted = words::row_at(first, k) < n && !my.dense[k];
        base[k] = wanted && my.write[k] >= 0 && run[k] < EXPAND_RUNS ? sh->base[run[k]] : -1;
        yes[k] = __ballot_sync(~0u, wanted && base[k] >= 0);
        no[k] = __ballot_sync(~0u, wanted && base[k] < 0);
        mine.a += __popc(yes[k]);
        mine.b += __popc(no[k]);
    }
    words::counts at = words::scan(mine, sh->space, &all);
    at.a += done->a;
    at.b += done->b;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int i = words::row_at(first, k);
        if (i < n) e.base[i] = base[k];
        if (yes[k] >> lane & 1) e.expanded[at.a + __popc(yes[k] & words::before())] = i;
        if (no[k] >> lane & 1) e.others[at.b + __popc(no[k] & words::before())] = i;
        at.a += __popc(yes[k]);
        at.b += __popc(no[k]);
    }
    done->a += all.a;
    done->b += all.b;
}

__global__ void __launch_bounds__(words::THREADS)
    plan(const __grid_constant__ tr_rows rows, const __grid_constant__ expansion e)
{
    __shared__ plan_shared sh;
    const int n = live_rows(rows.n, rows.n_max);
    words::counts listed = {0, 0};
    int n_runs = 0;

    for (int r = (int)threadIdx.x; r < EXPAND_RUNS; r += words::THREADS)
        sh.n_rows[r] = sh.context[r] = 0;
    __syncthreads();
    for (int first = 0; first < n; first += words::ROWS)
        n_runs = find_runs(rows, n, first, n_runs, &sh, e.base);
    __syncthreads();
    if (threadIdx.x == 0) place_runs(&sh, n_runs, e);
    __syncthreads();
    for (int first = 0; first < n; first += words::ROWS)
        list_rows(rows, n, first, e, &sh, &listed);
    if (threadIdx.x == 0) {
        e.n[0] = listed.a;
        e.n[1] = listed.b;
    }
}

/* The run that has the page. */
__device__ expand_run run_of(const expansion &e, int n_runs, int page)
{
    int low = 0, high = n_runs - 1;

    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (e.runs[middle].first <= page)
            low = middle;
        else
            high = middle - 1;
    }
    return e.runs[low];
}

/* A page at a time to a block of threads; a thread's pieces of 16 bytes become 32, or stay (rope). */
__global__ void __launch_bounds__(EXPAND_THREADS)
    expand(const __grid_constant__ tr_rows rows, const __grid_constant__ tr_kv_layer kv,
           const __grid_constant__ expansion e)
{
    enum { EACH = TR_PAGE_TOKENS * PIECES / EXPAND_THREADS, AT_ONCE = 5 };
    static_assert(TR_PAGE_TOKENS * PIECES % EXPAND_THREADS == 0 && EACH % AT_ONCE == 0, "");
    const int n_runs = e.n[2], n_pages = e.n[3];

    for (int page = (int)blockIdx.x; page < n_pages; page += (int)gridDim.x) {
        const expand_run run = run_of(e, n_runs, page);
        const int from =
            rows.page_table[(size_t)run.slot * (size_t)rows.max_pages + (size_t)(page - run.first)];
        if ((unsigned)from >= (unsigned)kv.n_pages) continue;
        const uint8_t *in = (const uint8_t *)kv.latent + (size_t)from * TR_PAGE_TOKENS * RECORD_FP8;
        uint8_t *out = e.rows + (size_t)page * TR_PAGE_TOKENS * RECORD_BF16;
#pragma unroll 1
        for (int u = (int)threadIdx.x; u < TR_PAGE_TOKENS * PIECES; u += AT_ONCE * EXPAND_THREADS) {
            uint4 raw[AT_ONCE];
            float scale[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int row = (u + i * EXPAND_THREADS) / PIECES,
                          c = (u + i * EXPAND_THREADS) % PIECES;
                const uint8_t *record = in + (size_t)row * RECORD_FP8;
                raw[i] = load16(record +
                                (c < LATENT_PIECES ? 16 * c : ROPE_AT + 16 * (c - LATENT_PIECES)));
                scale[i] = c < LATENT_PIECES
                               ? __ldg((const float *)(const void *)(record + SCALES_AT) + c / 8)
                               : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int row = (u + i * EXPAND_THREADS) / PIECES,
                          c = (u + i * EXPAND_THREADS) % PIECES;
                uint4 *to = (uint4 *)(void *)(out + (size_t)row * RECORD_BF16);
                if (c >= LATENT_PIECES) {
                    to[2 * LATENT_PIECES + c - LATENT_PIECES] = raw[i];
                    continue;
                }
                uint32_t even[4], odd[4];
                expand_words(raw[i], factor_bf16(scale[i], true), even, odd);
                to[2 * c] = {
                    __byte_perm(even[0], odd[0], 0x5410), __byte_perm(even[0], odd[0], 0x7632),
                    __byte_perm(even[1], odd[1], 0x5410), __byte_perm(even[1], odd[1], 0x7632)};
                to[2 * c + 1] = {
                    __byte_perm(even[2], odd[2], 0x5410), __byte_perm(even[2], odd[2], 0x7632),
                    __byte_perm(even[3], odd[3], 0x5410), __byte_perm(even[3], odd[3], 0x7632)};
            }
        }
    }
}

} // namespace

size_t expansion_bytes(int n_max)
{
    expansion e;
    const size_t pages = (size_t)n_max * EXPAND_KEYS_SIZED / TR_PAGE_TOKENS; /* [n_max, 32] keys */

    if (n_max < EXPAND_ROWS) return 0;
    (void)expansion_place(&e, NULL, SIZE_MAX, n_max);
    return (size_t)(uintptr_t)e.rows + pages * TR_PAGE_TOKENS * RECORD_BF16;
}

bool expansion_place(expansion *e, void *workspace, size_t bytes, int n_max)
{
    size_t at = 0;
    auto take = [&](size_t size) {
        uint8_t *p = (uint8_t *)workspace + at;
        at += (size + 255) / 256 * 256;
        return p;
    };

    e->n = (int32_t *)take(4 * sizeof *e->n);
    e->runs = (expand_run *)take(EXPAND_RUNS * sizeof *e->runs);
    e->expanded = (int32_t *)take((size_t)n_max * sizeof *e->expanded);
    e->others = (int32_t *)take((size_t)n_max * sizeof *e->others);
    e->base = (int32_t *)take((size_t)n_max * sizeof *e->base);
    e->rows = take(0);
    const size_t page = TR_PAGE_TOKENS * RECORD_BF16, pages = bytes > at ? (bytes - at) / page : 0,
                 most = INT32_MAX / TR_PAGE_TOKENS;
    e->pages_max = (int)(pages < most ? pages : most);
    return n_max >= EXPAND_ROWS && pages > 0;
}

cudaError_t expansion_make(const expansion &e, const tr_rows &rows, const tr_kv_layer &kv, int n_sm,
                           cudaStream_t stream)
{
    plan<<<1, words::THREADS, 0, stream>>>(rows, e);
    expand<<<(unsigned)(4 * n_sm), EXPAND_THREADS, 0, stream>>>(rows, kv, e);
    return cudaGetLastError();
}

} // namespace mla
} // namespace tr
