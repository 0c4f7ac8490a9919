/* The frame of a step: the plan becomes rows, half-filled pages are copied. Plans have been checked
 * (model/plan.h), but lengths live here: what depends on one is checked here, and a plan that fails
 * leaves a reason in *fault and no rows. */
#include "kernels/cuda/common.cuh"

namespace
{

enum { THREADS = 512 };

struct span_rows { /* one span, resolved */
    int32_t row, head, position, stride, n_rows, n_logits, slot, i_token, begin, fault;
    uint32_t dense;
};

__device__ __forceinline__ const tr_span *spans_of(const tr_plan *p)
{
    return (const tr_span *)((const char *)p + p->at_spans);
}

__device__ int apply_slots(const tr_plan_apply_args &a)
{
    const tr_plan *p = a.plan;
    const tr_slots &slots = a.slots;
    const tr_slot_open *open = (const tr_slot_open *)((const char *)p + p->at_opens);
    const tr_page_set *set = (const tr_page_set *)((const char *)p + p->at_page_sets);
    int fault = 0;

    for (int i = (int)threadIdx.x; i < p->n_opens; i += THREADS) {
        if (open[i].slot < 0 || open[i].slot >= slots.n_slots) {
            fault = TR_FAULT_SLOT;
            continue;
        }
        slots.sampling[open[i].slot] = open[i];
        slots.length[open[i].slot] = 0;
    }
    for (int i = (int)threadIdx.x; i < p->n_page_sets; i += THREADS) {
        if (set[i].slot < 0 || set[i].slot >= slots.n_slots || set[i].i_page < 0 ||
            set[i].i_page >= slots.max_pages) {
            fault = TR_FAULT_PAGE;
            continue;
        }
        slots.page_table[(size_t)set[i].slot * (size_t)slots.max_pages + (size_t)set[i].i_page] =
            set[i].page;
    }
    return fault;
}

/* Position and checks of one span; length: of its slot, where the plan leaves the position to
 * it. */
__device__ span_rows resolve(const tr_plan_apply_args &a, const tr_span &s, int length, int *end)
{
    span_rows r = {};
    const bool part = (s.flags & TR_SPAN_PART) != 0;
    r.slot = s.slot;
    r.n_rows = s.n_rows;
    r.n_logits = s.n_logits;
    r.i_token = s.i_token;
    r.stride = part ? 1 + s.skip : 1;
    r.dense = s.flags & TR_SPAN_DENSE;
    if (s.n_rows < 0 || s.n_logits < 0 || s.n_logits > s.n_rows) r.fault = TR_FAULT_HEADS;
    if (r.stride < 1 || (part && (s.begin < 0 || s.end < s.begin || s.position < s.begin)))
        r.fault = TR_FAULT_PART;
    const int64_t reach = s.n_rows > 0 ? (int64_t)(s.n_rows - 1) * r.stride + 1 : 0;
    if (s.i_token < 0 ? s.n_rows > 1 : s.i_token + reach > a.plan->n_tokens)
        r.fault = TR_FAULT_TOKENS;
    r.position = s.position >= 0 ? s.position : length - (a.rows_only ? s.n_rows : 0);
    if (r.position < 0) r.fault = TR_FAULT_BEFORE;
    if (r.position + reach > (int64_t)a.slots.max_pages * TR_PAGE_TOKENS) r.fault = TR_FAULT_BEHIND;
    r.begin = part ? s.begin : r.position;
    *end = part ? s.end : r.position + s.n_rows;
    return r;
}

__device__ void write_row(const tr_plan_apply_args &a, const span_rows &s, int i, int *fault)
{
    const tr_rows &rows = a.rows;
    const int n = s.row + i, position = s.position + i * s.stride;
    const int32_t page = a.slots.page_table[(size_t)s.slot * (size_t)a.slots.max_pages +
                                            (size_t)(position / TR_PAGE_TOKENS)];
    const int32_t *token =
        s.i_token >= 0 ? (const int32_t *)((const char *)a.plan + a.plan->at_tokens) + s.i_token
                       : a.slots.last_token + s.slot;
    if (page < 0) {
        *fault = TR_FAULT_PAGE;
        return;
    }
    rows.token[n] = token[i * s.stride];
    rows.slot[n] = s.slot;
    rows.position[n] = position;
    rows.begin[n] = s.begin;
    rows.write[n] = (int64_t)page * TR_PAGE_TOKENS + position % TR_PAGE_TOKENS;
    rows.dense[n] = s.dense && position < a.n_dense;
    const int h = i - (s.n_rows - s.n_logits);
    if (h < 0) return;
    rows.head_row[s.head + h] = n;
    rows.target[s.head + h] =
        ((const int32_t *)((const char *)a.plan + a.plan->at_targets))[s.head + h];
}

/* One block. Spans in chunks of THREADS; where a slot has several spans in a plan, one thread
 * resolves them in order. */
__global__ void __launch_bounds__(THREADS)
    plan_apply(const __grid_constant__ tr_plan_apply_args a, uint32_t *fault_out)
{
    __shared__ span_rows shared[THREADS];
    __shared__ int scratch[THREADS / 32 + 1];
    const tr_plan *p = a.plan;
    const tr_span *span = spans_of(p);
    const int tid = (int)threadIdx.x;
    int n = 0, n_head = 0, fault = a.rows_only ? 0 : apply_slots(a);

    int again = 0; /* the slot of this thread's span has one before it */
    for (int i = tid; i < p->n_spans; i += THREADS) {
        if (span[i].slot < 0 || span[i].slot >= a.slots.n_slots) fault = TR_FAULT_SLOT;
        for (int j = 0; j < i && !again; j++)
            again = span[j].slot == span[i].slot;
    }
    again = __syncthreads_or(again);
    fault = (int)tr::block_reduce<int, tr::larger<int>>(fault, scratch);
    for (int i0 = 0; i0 < p->n_spans && !fault; i0 += THREADS) {
        const int i = i0 + tid, here = min(p->n_spans - i0, (int)THREADS);
        for (int j = again ? (tid == 0 ? 0 : here) : tid; j < here; j += again ? 1 : THREADS) {
            const tr_span s = span[i0 + j];
            int end;
            shared[j] = resolve(a, s, a.slots.length[s.slot], &end);
            if (!a.rows_only && !shared[j].fault) a.slots.length[s.slot] = end;
        }
        __syncthreads();
        int rows, heads;
        const bool mine = i < p->n_spans;
        const int row = tr::block_scan(mine ? max(shared[tid].n_rows, 0) : 0, scratch, &rows);
        const int head = tr::block_scan(mine ? max(shared[tid].n_logits, 0) : 0, scratch, &heads);
        if (mine) {
            shared[tid].row = n + row;
            shared[tid].head = n_head + head;
            fault = shared[tid].fault;
        }
        if (rows > a.rows.n_max - n) fault = TR_FAULT_ROWS;
        if (heads > a.rows.n_head_max - n_head) fault = TR_FAULT_HEADS;
        if (heads > p->n_targets - n_head) fault = TR_FAULT_TARGETS;
        fault = (int)tr::block_reduce<int, tr::larger<int>>(fault, scratch);
        if (fault) break;
        for (int r = tid; r < rows; r += THREADS) {
            int low = 0, high = here - 1; /* the last span that begins at or before row n + r */
            while (low < high) {
                const int middle = (low + high + 1) / 2;
                if (shared[middle].row <= n + r)
                    low = middle;
                else
                    high = middle - 1;
            }
            write_row(a, shared[low], n + r - shared[low].row, &fault);
        }
        n += rows;
        n_head += heads;
        fault = (int)tr::block_reduce<int, tr::larger<int>>(fault, scratch);
    }
    if (tid == 0) {
        *a.rows.n = fault ? 0 : n;
        *a.rows.n_head = fault ? 0 : n_head;
        if (fault) *(volatile uint32_t *)fault_out = (uint32_t)fault;
    }
}

__device__ void copy_bytes(uint8_t *to, const uint8_t *from, size_t n)
{
    if ((((uintptr_t)to | (uintptr_t)from | n) & 15) == 0) {
        for (size_t i = threadIdx.x; i < n / 16; i += blockDim.x)
            ((uint4 *)to)[i] = ((const uint4 *)from)[i];
        return;
    }
    for (size_t i = threadIdx.x; i < n; i += blockDim.x)
        to[i] = from[i];
}

/* Rows [0, n_rows) of latents are one run of bytes; an index page has the keys of its rows, then
 * all scales. */
__global__ void pages_copy(const __grid_constant__ tr_pages_copy_args a, uint32_t *fault)
{
    const tr_page_copy *copy = (const tr_page_copy *)((const char *)a.plan + a.plan->at_copies);
    const size_t row = tr::kv_row_bytes(a.kv), page = tr::index_page_bytes(a.kv),
                 key = (size_t)a.kv.d_index;
    for (int i = (int)blockIdx.x; i < a.plan->n_copies; i += (int)gridDim.x) {
        const tr_page_copy c = copy[i];
        if (c.from < 0 || c.from >= a.kv.n_pages || c.to < 0 || c.to >= a.kv.n_pages ||
            c.from == c.to || c.n_rows < 0 || c.n_rows > TR_PAGE_TOKENS) {
            if (threadIdx.x == 0) *(volatile uint32_t *)fault = TR_FAULT_COPY;
            continue;
        }
        const size_t n = (size_t)c.n_rows;
        uint8_t *latent = (uint8_t *)a.kv.latent, *index = (uint8_t *)a.kv.index;
        copy_bytes(latent + (size_t)c.to * TR_PAGE_TOKENS * row,
                   latent + (size_t)c.from * TR_PAGE_TOKENS * row, n * row);
        if (!index) continue;
        uint8_t *to = index + (size_t)c.to * page;
        const uint8_t *from = index + (size_t)c.from * page;
        copy_bytes(to, from, n * key);
        copy_bytes(to + TR_PAGE_TOKENS * key, from + TR_PAGE_TOKENS * key, n * 4);
    }
}

} // namespace

cudaError_t tr_cuda_plan_apply(const struct tr_plan_apply_args *a, uint32_t *fault,
                               cudaStream_t stream)
{
    plan_apply<<<1, THREADS, 0, stream>>>(*a, fault);
    return cudaGetLastError();
}

cudaError_t tr_cuda_pages_copy(const struct tr_pages_copy_args *a, uint32_t *fault,
                               cudaStream_t stream)
{
    pages_copy<<<64, 256, 0, stream>>>(*a, fault);
    return cudaGetLastError();
}
