/* Attention of prompts in multi-head form. Three kernels a round: a plan (which rows, which keys, in what order), keys and
 * values of all heads (dense_mha_keys.cu), attention. The last: a block of threads takes 128 rows of one head through
 * their keys, 128 at a time; one warp copies, two warpgroups of 64 rows compute, each working on the scores of the next block
 * while its values of the last are added up, and taking turns at the tensor cores. */
#include "kernels/cuda/dense_mha_hopper.cuh"
#include "kernels/cuda/older.cuh"
#include "kernels/cuda/row_words.cuh"

namespace tr
{
namespace dense
{

/* ---- plan -------------------------------------------------------------------------------------------------------------- */

enum { SPANS_NEAR = 256, SORT_MAX = 4096 };

struct plan_shared {
    span spans[SPANS_NEAR]; /* where there are no more */
    int64_t order[SORT_MAX];
    uint32_t pads[words::ROWS / 32], space[words::WARPS];
    int n_tiles;
};

/* Spans that begin among the 8,192 rows from `first` on, and those that end before one of them; done: how many there are before. A
 * span's n is the row behind it for now. Returns whether this warp has dense rows that are pads: bits in sh->pads. */
__device__ bool find_spans(const job &j, int n, int first, plan_shared *sh, words::counts *done)
{
    enum { EACH = words::EACH };
    const tr_rows &r = j.rows;
    const int lane = (int)threadIdx.x % 32, front = words::row_at(first, 0) - lane - 1;
    uint32_t live[EACH], follows[EACH], pads = 0;
    const words::batch my(r, n, first);
    /* The row in front of the warp's. */
    const int i_front = min(max(front, 0), n - 1), d_front = r.dense[i_front];
    const int64_t w_front = r.write[i_front];
    int s = r.slot[i_front], p = r.position[i_front];
    const bool l_first = front == i_front && d_front && w_front >= 0;
    bool l = l_first;

#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const bool dense = words::row_at(first, k) < n && my.dense[k];
        live[k] = __ballot_sync(~0u, dense && my.write[k] >= 0);
        const uint32_t pad = __ballot_sync(~0u, dense && my.write[k] < 0);
        pads |= pad;
        if (lane == 0) sh->pads[threadIdx.x / 32 * EACH + k] = pad;
    }
    words::counts mine = {0, 0}, all;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int s_up = __shfl_up_sync(~0u, my.slot[k], 1),
                  p_up = __shfl_up_sync(~0u, my.position[k], 1);
        const bool goes_on =
            (lane ? s_up : s) == my.slot[k] && (lane ? p_up : p) + j.step == my.position[k];
        follows[k] = __ballot_sync(~0u, goes_on) & live[k] & (live[k] << 1 | l);
        mine.a += __popc(live[k] & ~follows[k]);
        mine.b += __popc((live[k] << 1 | l) & ~follows[k]);
        l = live[k] >> 31;
        s = __shfl_sync(~0u, my.slot[k], 31);
        p = __shfl_sync(~0u, my.position[k], 31);
    }
    words::counts at = words::scan(mine, sh->space, &all);
    at.a += done->a;
    at.b += done->b;
    l = l_first;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int i = words::row_at(first, k);
        const uint32_t begins = live[k] & ~follows[k], ends = (live[k] << 1 | l) & ~follows[k];
        const int b = at.a + __popc(begins & words::before()),
                  e = at.b + __popc(ends & words::before());
        if (begins >> lane & 1 && b < j.max_spans) {
            j.spans[b].row = i;
            j.spans[b].slot = my.slot[k];
            j.spans[b].position = my.position[k];
            j.spans[b].step = j.step;
        }
        if (ends >> lane & 1 && e < j.max_spans) j.spans[e].n = i;
        at.a += __popc(begins);
        at.b += __popc(ends);
        l = live[k] >> 31;
    }
    done->a += all.a;
    done->b += all.b;
    return pads != 0;
}

/* Pads among the dense rows see nothing: zeros. */
__device__ void zero_pads(const job &j, int first, const plan_shared *sh)
{
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;

    for (int w = 0; w < words::ROWS / 32; w++) { /* row `warp` of every word */
        if (!(sh->pads[w] >> warp & 1)) continue;
        const size_t i = (size_t)(first + 32 * w + warp);
        uint4 *out = (uint4 *)(void *)(j.out + i * j.n_heads * TR_DENSE_D_V * 2);
        for (int k = lane; k < j.n_heads * TR_DENSE_D_V / 8; k += 32)
            out[k] = {0, 0, 0, 0};
    }
}

/* Tiles and blocks of the window's spans, a warp a span at a time. */
__device__ void list_tiles(const job &j, const span *spans, int n_spans, plan_shared *sh)
{
    const int lane = (int)threadIdx.x % 32;

    for (int i = (int)threadIdx.x / 32; i < n_spans; i += words::WARPS) {
        const span s = spans[i];
        if (s.round < 0) continue;
        for (int k = lane; k * TILE_ROWS < s.n; k += 32) {
            const tile t = {i, k * TILE_ROWS};
            j.unsorted[s.i_tile + k] = t;
            if (s.i_tile + k < SORT_MAX) sh->order[s.i_tile + k] = tr_dense_tile_order(&s, t.first);
        }
        const int seen = tr_dense_seen(&s, s.n);
        for (int k = lane; k * BLOCK_KEYS < seen; k += 32)
            j.blocks[s.i_block + k] = {i, k * BLOCK_KEYS};
    }
}

/* The window's tiles, of which there are n_tiles, in their order. */
__device__ void plan_sort(const job &j, int n_tiles, const plan_shared *sh)
{
    const bool sorts = n_tiles <= SORT_MAX;

    for (int i = (int)threadIdx.x; i < n_tiles; i += words::THREADS) {
        const tile t = j.unsorted[i];
        const int64_t mine = sorts ? sh->order[i] : 0;
        int rank = 0;
#pragma unroll 8
        for (int k = 0; k < (sorts ? n_tiles : 0); k++)
            rank += sh->order[k] < mine || (sh->order[k] == mine && k < i);
        j.tiles[sorts ? rank : i] = t;
    }
}

__global__ void __launch_bounds__(words::THREADS) dense_plan(const __grid_constant__ job j)
{
    __shared__ plan_shared sh;
    const int n = min(max(*j.rows.n, 0), j.rows.n_max);
    words::counts found = {0, 0};

    for (int first = 0; first < n; first += words::ROWS) {
        const bool pads = find_spans(j, n, first, &sh, &found);
        if (__syncthreads_or(pads) && j.first_round == 0) zero_pads(j, first, &sh);
        if (first + words::ROWS < n) __syncthreads(); /* the words are written anew */
    }
    /* Otherwise the row behind the last one is one of those that find_spans saw. */
    if (threadIdx.x == 0 && n % words::ROWS == 0 && found.b < min(found.a, j.max_spans))
        j.spans[found.b].n = n;
    __syncthreads();
    const int total = min(found.a, j.max_spans);
    span *spans = total <= SPANS_NEAR ? sh.spans : j.spans;
    for (int i = (int)threadIdx.x; i < total; i += words::THREADS) {
        span s = j.spans[i];
        s.n -= s.row;
        spans[i] = s;
    }
    __syncthreads();
    if (threadIdx.x == 0) { /* spans are few */
        tr_dense_plan_window(spans, total, j.max_keys, j.first_round, j.n_rounds, j.plan);
        sh.n_tiles = j.plan->tile_begin[j.n_rounds];
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < total && spans != j.spans; i += words::THREADS)
        j.spans[i] = spans[i];
    list_tiles(j, spans, total, &sh);
    __syncthreads();
    plan_sort(j, sh.n_tiles, &sh);
}

/* ---- attention --------------------------------------------------------------------------------------------------------- */

enum { MATH = 256, Q_BYTES = 3 * CHUNK, K_BYTES = 3 * CHUNK, V_BYTES = 2 * CHUNK, STAGES = 2 };

struct mha_shared { /* behind queries, keys, values */
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};
enum { MHA_BYTES = Q_BYTES + STAGES * (K_BYTES + V_BYTES) + (int)sizeof(mha_shared) + 1024 };

struct maps {
    CUtensorMap q, kv, pe;
};

/* What a tile asks for. */
struct task {
    int row, n, position, base, head, n_blocks;
};
__device__ __forceinline__ bool next_task(const job &j, int i, task &t)
{
    int first = j.plan->tile_begin[j.i_round], n = j.plan->tile_begin[j.i_round + 1] - first;
    if (i >= n * j.n_heads) return false;
    tile x = j.tiles[first + i / j.n_heads];
    span s = j.spans[x.i_span];
    t.head = i % j.n_heads;
    t.row = s.row + x.first;
    t.n = min(s.n - x.first, (int)TILE_ROWS);
    t.position = s.position + x.first * s.step;
    t.base = s.base;
    t.n_blocks = tr_dense_pieces(tr_dense_seen(&s, x.first + t.n), BLOCK_KEYS);
    return true;
}

/* One thread. */
__device__ void copy_tiles(const job &j, const maps &m, mha_shared *sh, uint8_t *base)
{
    uint8_t *keys = base + Q_BYTES, *values = keys + STAGES * K_BYTES;
    ring_position<STAGES> at;
    uint32_t q_parity = 1;
    task t;

    for (int i = (int)blockIdx.x; next_task(j, i, t); i += (int)gridDim.x, q_parity ^= 1) {
        barrier_wait(&sh->q_empty, q_parity);
        barrier_expect(&sh->q_full, Q_BYTES);
        for (int c = 0; c < 3; c++)
            tensor_load(base + c * CHUNK, &m.q, 64 * c, t.head, t.row, &sh->q_full);
        for (int b = 0; b < t.n_blocks; b++, at.next()) {
            int s = at.stage, key = t.base + b * BLOCK_KEYS;
            uint8_t *k = keys + s * K_BYTES, *v = values + s * V_BYTES;
            barrier_wait(&sh->k_empty[s], at.parity ^ 1);
            barrier_expect(&sh->k_full[s], K_BYTES);
            tensor_load(k, &m.kv, 0, key, t.head, &sh->k_full[s]);
            tensor_load(k + CHUNK, &m.kv, 64, key, t.head, &sh->k_full[s]);
            tensor_load(k + 2 * CHUNK, &m.pe, 0, key, 0, &sh->k_full[s]);
            barrier_wait(&sh->v_empty[s], at.parity ^ 1);
            barrier_expect(&sh->v_full[s], V_BYTES);
            tensor_load(v, &m.kv, 128, key, t.head, &sh->v_full[s]);
            tensor_load(v + CHUNK, &m.kv, 192, key, t.head, &sh->v_full[s]);
        }
    }
}

/* Running softmax of a thread's two rows; sum: over the thread's own columns. */
struct state {
    float max[2], sum[2];
};

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* s -> probabilities; keep: what the values so far are multiplied by. Key 0 is seen by all, so no maximum stays -inf. */
__device__ __forceinline__ void softmax(float (&s)[64], state &st, float scale, float (&keep)[2])
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float max = st.max[r];
#pragma unroll
        for (int g = 0; g < 16; g++)
            max = fmaxf(max, fmaxf(s[4 * g + 2 * r], s[4 * g + 2 * r + 1]));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
        keep[r] = exp2_fast((st.max[r] - max) * scale);
        st.max[r] = max;
        float base = max * scale, sum[2] = {0, 0};
#pragma unroll
        for (int g = 0; g < 16; g++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float p = exp2_fast(__fmaf_rn(s[4 * g + 2 * r + e], scale, -base));
                s[4 * g + 2 * r + e] = p;
                sum[e] += p;
            }
        st.sum[r] = __fmaf_rn(st.sum[r], keep[r], sum[0] + sum[1]);
    }
}

/* Keys past a row's own position; seen: how many keys of the block the thread's first row sees, and how many more its second. */
__device__ __forceinline__ void mask(float (&s)[64], int seen, int more)
{
    int q = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int i = 0; i < 64; i++)
        if (i / 4 * 8 + q + i % 2 >= seen + i / 2 % 2 * more) s[i] = -CUDART_INF_F;
}

__device__ __forceinline__ void pack(const float (&s)[64], uint32_t (&p)[32])
{
#pragma unroll
    for (int i = 0; i < 32; i++)
        p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void arrive_warp(uint64_t *b)
{
    barrier_arrive_warp(b, threadIdx.x % 32);
}

__device__ __forceinline__ void issue_scores(float (&s)[64], uint64_t q, uint64_t k)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 12; i++)
        mma_rows(s, q + (uint32_t)(i / 4 * (CHUNK / 16) + i % 4 * 2),
                 k + (uint32_t)(i / 4 * (CHUNK / 16) + i % 4 * 2), i > 0);
    wgmma_commit();
}
__device__ __forceinline__ void issue_values(float (&o)[64], const uint32_t (&p)[32], uint64_t v)
{
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; i++)
        mma_columns(o, p + 4 * i, v + (uint32_t)(i * 16 * 128 / 16));
    wgmma_commit();
}

template <int N> __device__ __forceinline__ void touch(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        wgmma_touch(x[i]);
}

/* Rows [64 wg, ..) of tile after tile. */
__device__ __forceinline__ void math(const job &j, mha_shared *sh, uint32_t base)
{
    int wg = (int)__shfl_sync(~0u, threadIdx.x / 128, 0);
    int line = wg * 64 + (int)threadIdx.x % 128 / 32 * 16 + (int)threadIdx.x % 32 / 4;
    uint32_t keys = base + Q_BYTES, values = keys + STAGES * K_BYTES, q_parity = 0;
    uint64_t q = matrix_descriptor(base + (uint32_t)(wg * 64 * 128), 16, 1024, LAYOUT_SWIZZLE_128);
    ring_position<STAGES> at, late; /* of the block whose scores come, whose values come */
    task t;

    if (wg == 1) named_barrier_arrive(2, MATH); /* the first turn is the other's */
    for (int i = (int)blockIdx.x; next_task(j, i, t); i += (int)gridDim.x, q_parity ^= 1) {
        float o[64], keep[2];
        uint32_t p[32];
        state st = {{-CUDART_INF_F, -CUDART_INF_F}, {0, 0}};

#pragma unroll
        for (int k = 0; k < 64; k++)
            o[k] = 0.0f;
        auto k_at = [&] {
            return matrix_descriptor(keys + (uint32_t)(at.stage * K_BYTES), 16, 1024,
                                     LAYOUT_SWIZZLE_128);
        };
        auto v_late = [&] {
            return matrix_descriptor(values + (uint32_t)(late.stage * V_BYTES), CHUNK, 1024,
                                     LAYOUT_SWIZZLE_128);
        };
        auto probabilities = [&](float(&s)[64], int b) {
            int seen = t.position + line * j.step + 1 - b * BLOCK_KEYS;
            if ((b + 1) * BLOCK_KEYS > t.position + wg * 64 * j.step + 1) mask(s, seen, 8 * j.step);
            softmax(s, st, j.scale, keep);
        };

        barrier_wait(&sh->q_full, q_parity);
        { /* block 0: there are no values yet */
            float s[64];
            barrier_wait(&sh->k_full[at.stage], at.parity);
            named_barrier(2 + wg, MATH);
            issue_scores(s, q, k_at());
            named_barrier_arrive(3 - wg, MATH);
            wgmma_wait<0>();
            touch(s);
            arrive_warp(&sh->k_empty[at.stage]);
            at.next();
            probabilities(s, 0);
            pack(s, p);
        }
        for (int b = 1; b < t.n_blocks; b++, at.next(), late.next()) {
            float s[64];
            barrier_wait(&sh->k_full[at.stage], at.parity);
            barrier_wait(&sh->v_full[late.stage], late.parity);
            named_barrier(2 + wg, MATH);
            issue_scores(s, q, k_at());
            issue_values(o, p, v_late());
            named_barrier_arrive(3 - wg, MATH);
            wgmma_wait<1>();
            touch(s);
            arrive_warp(&sh->k_empty[at.stage]);
            probabilities(s, b);
            wgmma_wait<0>();
            touch(o);
            arrive_warp(&sh->v_empty[late.stage]);
#pragma unroll
            for (int k = 0; k < 64; k++)
                o[k] *= keep[k / 2 % 2];
            pack(s, p);
        }
        arrive_warp(&sh->q_empty);
        barrier_wait(&sh->v_full[late.stage], late.parity);
        issue_values(o, p, v_late());
        float f[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = st.sum[r] + __shfl_xor_sync(~0u, st.sum[r], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            f[r] = 1.0f / sum;
        }
        wgmma_wait<0>();
        touch(o);
        arrive_warp(&sh->v_empty[late.stage]);
        late.next();
        size_t pitch = (size_t)j.n_heads * TR_DENSE_D_V * 2;
        store_rows(j.out + (size_t)(t.row + line) * pitch + (size_t)t.head * TR_DENSE_D_V * 2,
                   8 * pitch, o, f, line < t.n, line + 8 < t.n);
    }
}

__global__ void __launch_bounds__(MATH + 128, 1)
    dense_attention(const __grid_constant__ job j, const __grid_constant__ maps m)
{
    extern __shared__ uint8_t raw[];
    uint8_t *base = raw + (1024 - (smem_address(raw) & 1023)) % 1024;
    mha_shared *sh = (mha_shared *)(base + Q_BYTES + STAGES * (K_BYTES + V_BYTES));

    if (threadIdx.x == 0) {
        barrier_init(&sh->q_full, 1);
        barrier_init(&sh->q_empty, MATH / 32 * WARP_ARRIVALS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&sh->k_full[i], 1);
            barrier_init(&sh->v_full[i], 1);
            barrier_init(&sh->k_empty[i], MATH / 32 * WARP_ARRIVALS);
            barrier_init(&sh->v_empty[i], MATH / 32 * WARP_ARRIVALS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= MATH) {
        registers_lower<24>();
        if (threadIdx.x == MATH) copy_tiles(j, m, sh, base);
    } else {
        registers_raise<240>();
        math(j, sh, smem_address(base));
    }
}

/* ---- launches ---------------------------------------------------------------------------------------------------------- */

cudaError_t make_map(CUtensorMap *map, const void *base, const uint64_t (&dims)[3],
                     const uint64_t (&strides)[2], const uint32_t (&box)[3])
{
    cudaDriverEntryPointQueryResult found;
    void *encode = nullptr;
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                                     cudaEnableDefault, &found);
    if (e != cudaSuccess) return e;
    if (found != cudaDriverEntryPointSuccess || !encode) return cudaErrorNotSupported;
    cuuint64_t d[3] = {dims[0], dims[1], dims[2]}, s[2] = {strides[0], strides[1]};
    cuuint32_t b[3] = {box[0], box[1], box[2]}, steps[3] = {1, 1, 1};
    CUresult r = ((decltype(&cuTensorMapEncodeTiled))encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void *>(base), d, s, b, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct layout {
    size_t spans, tiles, unsorted, blocks, pe, kv, bytes;
    int n_tiles, n_blocks, n_keys;
};

static size_t aligned(size_t n)
{
    return (n + 1023) / 1024 * 1024;
}

/* n_keys: a multiple of 128. */
static layout layout_of(int n_max, int n_spans, int n_heads, int n_keys)
{
    layout l;
    l.n_keys = n_keys;
    l.n_tiles = n_max / TILE_ROWS + n_spans;
    l.n_blocks = n_keys / BLOCK_KEYS; /* of a round; those of a window are listed */
    l.spans = aligned(sizeof(tr_dense_plan));
    l.tiles = l.spans + aligned((size_t)n_spans * sizeof(span));
    l.unsorted = l.tiles + aligned((size_t)l.n_tiles * sizeof(tile));
    l.blocks = l.unsorted + aligned((size_t)l.n_tiles * sizeof(tile));
    l.pe = l.blocks + aligned((size_t)l.n_blocks * TR_DENSE_ROUNDS * sizeof(tile));
    l.kv = l.pe + aligned((size_t)n_keys * 128);
    l.bytes = l.kv + (size_t)n_keys * (size_t)n_heads * D_KV * 2;
    return l;
}

static cudaError_t launch_attention(const job &j, const void *q, int n_sm, cudaStream_t stream)
{
    maps m;
    uint64_t rows = (uint64_t)j.rows.n_max, heads = (uint64_t)j.n_heads,
             keys = (uint64_t)j.max_keys;
    cudaError_t e =
        make_map(&m.q, q, {D_Q, heads, rows}, {D_Q * 2, heads * D_Q * 2}, {64, 1, TILE_ROWS});
    if (e == cudaSuccess)
        e = make_map(&m.kv, j.kv_new, {D_KV, keys, heads}, {D_KV * 2, keys * D_KV * 2},
                     {64, BLOCK_KEYS, 1});
    if (e == cudaSuccess)
        e = make_map(&m.pe, j.pe, {64, keys, 1}, {128, keys * 128}, {64, BLOCK_KEYS, 1});
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(dense_attention, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 MHA_BYTES);
    if (e != cudaSuccess) return e;
    dense_attention<<<(unsigned)n_sm, MATH + 128, MHA_BYTES, stream>>>(j, m);
    return cudaGetLastError();
}

} // namespace dense
} // namespace tr

using namespace tr::dense;

size_t tr_cuda_dense_mha_hopper_workspace(int n_max, int n_spans, int n_heads, int n_keys)
{
    if (n_max < 1 || n_spans < 1 || n_heads < 1 || n_keys < 1 || n_keys > 1 << 24) return 0;
    return layout_of(n_max, n_spans, n_heads, (n_keys + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS)
        .bytes;
}

cudaError_t tr_cuda_dense_mha_hopper(const tr_cuda_dense_mha_hopper_args *a, cudaStream_t stream)
{
    job j = {};
    int device = 0, n_sm = 0, n_max = a->rows->n_max, n_keys = BLOCK_KEYS;
    int span_keys = (a->rows->max_context + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS;

    if (a->kv.d_latent != TR_DENSE_D_LATENT || a->kv.d_rope != TR_DENSE_D_ROPE || a->n_heads < 1 ||
        (a->kv.dtype != TR_E4M3 && a->kv.dtype != TR_BF16))
        return cudaErrorNotSupported;
    if (n_max < 0 || a->n_spans < 0 || a->rows->max_context < 0) return cudaErrorInvalidValue;
    if (a->step < 1 || a->step > 1 << 10) return cudaErrorInvalidValue;
    if (n_max == 0 || a->n_spans == 0 || span_keys == 0) return cudaSuccess;
    if (a->n_spans > n_max) return cudaErrorInvalidValue;
    /* As many keys as there is room for, up to what can be asked for. */
    int64_t all = (int64_t)a->n_spans * span_keys;
    if (a->n_keys > 0 && a->n_keys < all) all = a->n_keys < span_keys ? span_keys : a->n_keys;
    size_t block = (size_t)BLOCK_KEYS * (128 + (size_t)a->n_heads * D_KV * 2) +
                   TR_DENSE_ROUNDS * sizeof(tile) + 1024;
    if (layout_of(n_max, a->n_spans, a->n_heads, n_keys).bytes > a->workspace_bytes)
        return cudaErrorInvalidValue;
    int64_t blocks = (int64_t)(a->workspace_bytes / block); /* near what fits, and seldom above */
    n_keys = (int)(blocks * BLOCK_KEYS < all ? blocks * BLOCK_KEYS : all);
    while (n_keys + BLOCK_KEYS <= all &&
           layout_of(n_max, a->n_spans, a->n_heads, n_keys + BLOCK_KEYS).bytes <=
               a->workspace_bytes)
        n_keys += BLOCK_KEYS;
    while (n_keys > 0 &&
           layout_of(n_max, a->n_spans, a->n_heads, n_keys).bytes > a->workspace_bytes)
        n_keys -= BLOCK_KEYS;
    if (n_keys < span_keys) return cudaErrorInvalidValue;
    const int64_t rounds = tr_dense_rounds_most(all, span_keys, n_keys);
    if (rounds > INT32_MAX - TR_DENSE_ROUNDS) return cudaErrorInvalidValue;
    layout l = layout_of(n_max, a->n_spans, a->n_heads, n_keys);

    uint8_t *work = (uint8_t *)a->workspace;
    j.rows = *a->rows;
    j.n_heads = a->n_heads;
    j.max_spans = a->n_spans;
    j.step = a->step;
    j.max_keys = n_keys;
    j.scale = a->scale * 1.44269504f;
    j.kv = a->kv;
    j.plan = (tr_dense_plan *)(void *)work;
    j.spans = (span *)(void *)(work + l.spans);
    j.tiles = (tile *)(void *)(work + l.tiles);
    j.unsorted = (tile *)(void *)(work + l.unsorted);
    j.blocks = (tile *)(void *)(work + l.blocks);
    j.pe = work + l.pe;
    j.kv_new = work + l.kv;
    j.out = (uint8_t *)a->out;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return e;
    /* As few heads at a time as keep all SMs busy: latents are brought once for each group. */
    int64_t each = ((int64_t)l.n_blocks * a->n_heads + n_sm - 1) / n_sm;
    j.group_heads = (int)(each < GROUP_HEADS ? each : GROUP_HEADS);
    for (; e == cudaSuccess && j.first_round < rounds; j.first_round += j.n_rounds) {
        j.n_rounds = (int)min(rounds - j.first_round, (int64_t)TR_DENSE_ROUNDS);
        dense_plan<<<1, tr::words::THREADS, 0, stream>>>(j);
        e = cudaGetLastError();
        for (j.i_round = 0; e == cudaSuccess && j.i_round < j.n_rounds; j.i_round++) {
            e = launch_keys(j, a->w_kv, l.n_blocks, stream);
            if (e == cudaSuccess) e = launch_attention(j, a->q, n_sm, stream);
        }
    }
    return e;
}
