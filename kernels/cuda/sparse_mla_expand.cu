/* Which rows of a step have their keys expanded, and expanding them (sparse_mla_expand.cuh). Both read on the device what the
 * step is: its rows, their slots, the slots' pages. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/sparse_mla_expand.cuh"
#include "kernels/cuda/sparse_mla_tile.cuh"

namespace tr
{
namespace mla
{

namespace
{

enum { PLAN_THREADS = 1024, WARPS = PLAN_THREADS / 32, EXPAND_THREADS = 256 };
/* Of a record: 16-byte pieces of latents and of rope. */
enum { LATENT_PIECES = D_LATENT / 16, PIECES = LATENT_PIECES + (D_KEY - D_LATENT) / 8 };

struct plan_shared {
    int32_t n_rows[EXPAND_RUNS], context[EXPAND_RUNS], slot[EXPAND_RUNS], base[EXPAND_RUNS];
    int32_t warp[WARPS];
};

/* Threads before this one that say yes; *all: how many do. By the whole block. */
__device__ int place(bool yes, int32_t *warp, int *all)
{
    const int lane = (int)threadIdx.x % 32, i_warp = (int)threadIdx.x / 32;
    const unsigned mask = __ballot_sync(~0u, yes);
    int before = 0, sum = 0;

    if (lane == 0) warp[i_warp] = __popc(mask);
    __syncthreads();
    for (int i = 0; i < WARPS; i++) {
        if (i < i_warp) before += warp[i];
        sum += warp[i];
    }
    __syncthreads();
    *all = sum;
    return before + __popc(mask & ((1u << lane) - 1));
}

/* Rows that want a list: absorbed ones; what a pad row's output is nobody asks, but it is written. */
__device__ bool absorbed(const tr_rows &rows, int i)
{
    return !rows.dense || !rows.dense[i];
}

/* Number the runs: base[i] is the run of row i for now. Returns how many there are. */
__device__ int find_runs(const tr_rows &rows, int n, plan_shared *sh, int32_t *base)
{
    const int lane = (int)threadIdx.x % 32;
    int n_runs = 0;

    for (int i = (int)threadIdx.x; i - (int)threadIdx.x < n; i += PLAN_THREADS) {
        const bool live = i < n;
        const int slot = live ? rows.slot[i] : -1;
        const bool begins = live && (i == 0 || rows.slot[i - 1] != slot);
        int all, run = n_runs + place(begins, sh->warp, &all) + begins - 1;
        n_runs += all;
        if (live)
            base[i] = run;
        else
            run = -1;
        const bool counts = live && absorbed(rows, i) && !is_pad(rows, i);
        int count = counts, context = counts ? rows.position[i] + 1 : 0;
        /* A run's lanes are neighbours: its last one gets all. */
        for (int d = 1; d < 32; d *= 2) {
            const int c = __shfl_up_sync(~0u, count, d), x = __shfl_up_sync(~0u, context, d),
                      r = __shfl_up_sync(~0u, run, d);
            if (lane < d || r != run) continue;
            count += c;
            context = max(context, x);
        }
        const int next = __shfl_down_sync(~0u, run, 1);
        if (count == 0 || run >= EXPAND_RUNS || (lane < 31 && next == run)) continue;
        atomicAdd(&sh->n_rows[run], count);
        atomicMax(&sh->context[run], context);
        sh->slot[run] = slot;
    }
    return n_runs;
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

__global__ void __launch_bounds__(PLAN_THREADS)
    plan(const __grid_constant__ tr_rows rows, const __grid_constant__ expansion e)
{
    __shared__ plan_shared sh;
    const int n = live_rows(rows.n, rows.n_max);
    int n_expanded = 0, n_others = 0;

    for (int r = (int)threadIdx.x; r < EXPAND_RUNS; r += PLAN_THREADS)
        sh.n_rows[r] = sh.context[r] = 0;
    __syncthreads();
    const int n_runs = find_runs(rows, n, &sh, e.base);
    __syncthreads();
    if (threadIdx.x == 0) place_runs(&sh, n_runs, e);
    __syncthreads();
    for (int i = (int)threadIdx.x; i - (int)threadIdx.x < n; i += PLAN_THREADS) {
        const bool wanted = i < n && absorbed(rows, i);
        const int run = i < n ? e.base[i] : 0;
        const int base = wanted && run < EXPAND_RUNS && !is_pad(rows, i) ? sh.base[run] : -1;
        int n_yes, n_no;
        const int yes = place(wanted && base >= 0, sh.warp, &n_yes),
                  no = place(wanted && base < 0, sh.warp, &n_no);
        if (i < n) e.base[i] = base;
        if (wanted && base >= 0) e.expanded[n_expanded + yes] = i;
        if (wanted && base < 0) e.others[n_others + no] = i;
        n_expanded += n_yes;
        n_others += n_no;
    }
    if (threadIdx.x == 0) {
        e.n[0] = n_expanded;
        e.n[1] = n_others;
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
    plan<<<1, PLAN_THREADS, 0, stream>>>(rows, e);
    expand<<<(unsigned)(4 * n_sm), EXPAND_THREADS, 0, stream>>>(rows, kv, e);
    return cudaGetLastError();
}

} // namespace mla
} // namespace tr
