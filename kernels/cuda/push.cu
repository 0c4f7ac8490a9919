/* Rows of a cache to the other members' caches, straight to where they belong: no buffer, no collective, nothing to put back.
 *
 * Exchange e of a group, on each member:
 *
 *     who starts first   READY e to every other member: nothing here reads what its rows will overwrite
 *     every block        waits for READY e of all, stores its part of this member's rows
 *     who ends last      SENT e to every other member, waits for SENT e of all; epoch := e
 *
 * So nobody overwrites what a slower member still reads, without a second buffer: its own READY stands behind everything it
 * did before. And nobody gets ahead: e + 1 begins when all rows of e are here, so READY and SENT of a member are at most one
 * ahead of what is waited for, and never go back. The epoch is a word of the device's, so that a recorded graph can run again.
 * Blocks wait for other members, never for blocks of their own that may not have started; members that enqueue the same
 * exchanges in the same order cannot block each other, whatever else runs on the device.
 *
 * A few blocks of one warp, 32 registers and no shared memory: rows travel beside the products, not in front of them. In the
 * kernel that writes the rows, on the lane that computes, NVLink's time and the fence in front of SENT would be in front of the
 * products: exposed 13, 17, 33 and 41 us for 256, 512, 2048 and 4096 rows of 132 and 656 bytes on 4 H200s, where this form leaves
 * 1.5, 3.9, 5.9 and 6.7 with both exchanges on one stream. READY by a kernel of its own (2.8, 7.1, 4.8, 9.0) comes too late: the
 * products have begun, and the stores wait for a place. Large blocks (16 of 256 threads: 0.7, 3.1, 23, 11) keep the products
 * from theirs; more of these (264: 2.3, 5.4, 7.5, 11) look at the flags too often.
 *
 * Who was told to leave while it waited writes that down; those behind it, whose rows are not what they should be, then send
 * nothing to anybody. */
#include "kernels/cuda/push.h"

#include "kernels/cuda/common.cuh"

namespace
{

enum {
    AHEAD = 2,       /* loads of a thread under way */
    BLOCKS_MAX = 99, /* three on every four SMs of an H200 */
    LOOKS = 1024,    /* at the flags, between two looks at the abort word: some 0.5 ms */
    PAUSE_NS = 32,   /* between two looks: others use the memory too */
    APART = 32,      /* words between flags */
};
enum { EPOCH, STARTED, ENDED, LEFT }; /* words */
enum { READY, SENT };                 /* kinds of flags */

struct piece {
    size_t at;
    uint32_t bytes, width,
        per_row; /* width: of a thread's word: 16, 4 or 1; per_row: words of a row */
};

struct plan {
    piece p[TR_CUDA_PIECES];
    const char *cache;
    const int64_t *list; /* this member's */
    size_t page_bytes;
    uint32_t n_rows;
    int n_pieces, n_others, rank;
    /* of the members behind this one, in turn: */
    char *to[TR_MAX_PEERS - 1];
    uint32_t *flags[TR_MAX_PEERS - 1];
    int other[TR_MAX_PEERS - 1];
    uint32_t *mine; /* flags */
    uint32_t *words;
    const volatile uint32_t *abort;
};

__device__ __forceinline__ uint32_t load_flag(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

/* The same while it is not yet what is waited for. */
__device__ __forceinline__ uint32_t look(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void raise_flag(uint32_t *p, uint32_t v)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ int flag_at(int kind, int member)
{
    return (kind * TR_MAX_PEERS + member) * APART;
}

/* A lane tells one member. */
__device__ __forceinline__ void tell(const plan &p, int kind, uint32_t epoch)
{
    const int i = (int)threadIdx.x;
    if (i < p.n_others) raise_flag(p.flags[i] + flag_at(kind, p.rank), epoch);
}

/* A lane waits for one member. False: told to leave. */
__device__ __forceinline__ bool hear(const plan &p, int kind, uint32_t epoch)
{
    const int i = (int)threadIdx.x;
    bool left = false;
    if (i < p.n_others) {
        const uint32_t *flag = p.mine + flag_at(kind, p.other[i]);
        for (int looks = 1; (int32_t)(look(flag) - epoch) < 0 && !left; looks++) {
            __nanosleep(PAUSE_NS);
            left = looks % LOOKS == 0 && *p.abort != 0;
        }
        (void)load_flag(flag);
    }
    __syncwarp();
    return __all_sync(0xffffffffu, !left);
}

/* One piece of all rows: thread after thread takes the next word of the rows. */
template <class T> __device__ __forceinline__ void send_piece(const plan &p, const piece &what)
{
    const uint32_t n = p.n_rows * what.per_row, step = gridDim.x * 32 * AHEAD;

    for (uint32_t first = blockIdx.x * 32 * AHEAD + threadIdx.x; first < n; first += step) {
        T v[AHEAD];
        size_t at[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const uint32_t i = first + k * 32, r = i / what.per_row;
            if (i >= n) continue;
            const size_t row = (size_t)p.list[r], page = row / TR_PAGE_TOKENS,
                         place = row % TR_PAGE_TOKENS;
            at[k] = page * p.page_bytes + what.at + place * what.bytes +
                    (i - r * what.per_row) * sizeof(T);
            v[k] = *(const T *)(const void *)(p.cache + at[k]);
        }
        for (int m = 0; m < p.n_others; m++) {
            char *to = p.to[m];
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (first + k * 32 < n) *(T *)(void *)(to + at[k]) = v[k];
        }
    }
}

__device__ __forceinline__ void send_rows(const plan &p)
{
#pragma unroll 1
    for (int i = 0; i < p.n_pieces; i++) {
        if (p.p[i].width == 16)
            send_piece<uint4>(p, p.p[i]);
        else if (p.p[i].width == 4)
            send_piece<uint32_t>(p, p.p[i]);
        else
            send_piece<uint8_t>(p, p.p[i]);
    }
}

/* Everything of this member is on its way, and before what comes. */
__device__ __forceinline__ bool is_last(const plan &p)
{
    uint32_t before = 0;
    __syncwarp();
    if (threadIdx.x == 0) {
        __threadfence_system();
        before = atomicAdd(&p.words[ENDED], 1u);
        __threadfence_system();
    }
    __syncwarp();
    return __shfl_sync(0xffffffffu, before, 0) == gridDim.x - 1;
}

__device__ __forceinline__ uint32_t word(const plan &p, int which)
{
    return ((const volatile uint32_t *)p.words)[which];
}

/* What the blocks begin with. False: told to leave, now or before. */
__device__ __forceinline__ bool may_send(const plan &p)
{
    const uint32_t epoch = word(p, EPOCH) + 1;
    uint32_t before = 0;

    if (word(p, LEFT)) return false;
    if (threadIdx.x == 0) before = atomicAdd(&p.words[STARTED], 1u);
    if (__shfl_sync(0xffffffffu, before, 0) == 0) tell(p, READY, epoch);
    if (hear(p, READY, epoch)) return true;
    if (threadIdx.x == 0) p.words[LEFT] = 1;
    return false;
}

/* Words are read again here: they need no registers while rows are sent. */
__global__ void __maxnreg__(32) push(const __grid_constant__ plan p)
{
    if (may_send(p)) send_rows(p);
    if (!is_last(p)) return;
    const uint32_t epoch = word(p, EPOCH) + 1;
    bool good = word(p, LEFT) == 0; /* of all blocks */
    if (good) tell(p, SENT, epoch);
    good = good && hear(p, SENT, epoch);
    if (threadIdx.x) return;
    if (!good) p.words[LEFT] = 1;
    p.words[STARTED] = p.words[ENDED] = 0;
    p.words[EPOCH] = epoch;
}

} // namespace

static bool describe(piece *out, const tr_cuda_push_args *a, int i)
{
    size_t all = (size_t)(uintptr_t)a->cache | a->page_bytes | a->at[i] | a->bytes[i];
    const size_t rows = (size_t)(a->end - a->first);

    for (int m = 0; m < TR_MAX_PEERS; m++)
        all |= (size_t)a->offset[m]; /* unused ones are 0 */
    const uint32_t width = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
    *out = piece{.at = a->at[i],
                 .bytes = (uint32_t)a->bytes[i],
                 .width = width,
                 .per_row = (uint32_t)(a->bytes[i] / width)};
    return a->bytes[i] > 0 && a->bytes[i] <= 65536 && rows * out->per_row < (1u << 30);
}

cudaError_t tr_cuda_push(const tr_cuda_push_group *g, const tr_cuda_push_args *a,
                         cudaStream_t stream)
{
    plan p = {.cache = a->cache,
              .list = a->list + a->first,
              .page_bytes = a->page_bytes,
              .n_rows = (uint32_t)(a->end - a->first),
              .n_pieces = a->n_pieces,
              .n_others = g->n_members - 1,
              .rank = g->rank,
              .mine = g->flags[g->rank],
              .words = g->words,
              .abort = g->abort};
    size_t words = 1;

    if (g->n_members < 2 || g->n_members > TR_MAX_PEERS || a->n_pieces < 1 ||
        a->n_pieces > TR_CUDA_PIECES || a->first < 0 || a->end < a->first)
        return cudaErrorInvalidValue;
    for (int i = 0; i < a->n_pieces; i++) {
        if (!describe(&p.p[i], a, i)) return cudaErrorInvalidValue;
        words =
            words > p.n_rows * (size_t)p.p[i].per_row ? words : p.n_rows * (size_t)p.p[i].per_row;
    }
    for (int d = 0; d < p.n_others; d++) {
        const int m = (g->rank + 1 + d) % g->n_members;
        p.other[d] = m;
        p.to[d] = a->cache + a->offset[m];
        p.flags[d] = g->flags[m];
    }
    push<<<tr::at_most((words + 32 * AHEAD - 1) / (32 * AHEAD), BLOCKS_MAX), 32, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t tr_cuda_push_load(void)
{
    cudaFuncAttributes ignored;
    return cudaFuncGetAttributes(&ignored, (const void *)push);
}
