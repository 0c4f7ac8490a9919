/* Bytes from everybody to everybody over peer memory: every member stores what it gives where the receiver wants it.
 *
 * A pair of members has as many channels as each of them has blocks for the other; block x of one and block x of the other are
 * the ends of channel x and move the x-th part of what goes there and of what comes. Exchange e of a channel, at each end:
 *
 *     READY e      to the other end, with the place where its bytes are to go: nothing here reads any more what lies there
 *     waits for the other's READY e, stores its part, with the first loads made before that
 *     SENT e       to the other end; waits for the other's SENT e, which is all that it waits for
 *
 * Channels know nothing of each other: there is no counter of blocks and no last one, so that a small exchange takes one way
 * there for READY, the stores and one way for SENT. An end begins e + 1 when e is over here, so READY and SENT are never ahead
 * of what is waited for: they are compared for equality. Epochs are words of the device's, one of each channel, so that a
 * recorded graph can run again.
 *
 * Blocks wait for other members' blocks of the same number, never for blocks of their own. Members meet in the same order: in
 * turn d, member i has i and j with i + j = d (mod n) as a pair. So whichever blocks fit a device at a time, the first ones that
 * have not ended have their other ends there or on their way.
 *
 * Who was told to leave while it waited writes that down; those behind it, whose bytes are not what they should be, then send
 * nothing to anybody. */
#include "kernels/cuda/swap.h"

#include "kernels/cuda/common.cuh"

namespace
{

enum {
    THREADS = 256,
    AHEAD = 8,                     /* lines of 16 bytes of a thread under way: 32 KB a block */
    LOOKS = 4096,                  /* at a flag, between two looks at the abort word */
    PAUSE_NS = 20,                 /* between two looks */
    EPOCH_AT = 40,                 /* READY: the place below, the epoch above */
    LEFT = TR_CUDA_SWAP_WORDS - 1, /* word */
};
enum { READY, SENT }; /* kinds of flags */

constexpr uint64_t NOWHERE = ~(uint64_t)0;

struct plan {
    tr_cuda_swap_args a;
    uint64_t *flags[TR_MAX_PEERS];
    uint32_t *words;
    const volatile uint32_t *abort;
    int rank, n_members;
};

__device__ __forceinline__ uint64_t *flag_of(uint64_t *flags, int kind, int member)
{
    return flags + ((kind * TR_MAX_PEERS + member) * TR_CUDA_SWAP_BLOCKS + (int)blockIdx.x);
}

__device__ __forceinline__ void raise_flag(uint64_t *p, uint64_t v)
{
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ uint64_t look(const uint64_t *p)
{
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

/* One thread: what stands below the epoch; NOWHERE: told to leave. */
__device__ __forceinline__ uint64_t hear(const plan &p, int kind, int member, uint32_t epoch)
{
    const uint64_t *flag = flag_of(p.flags[p.rank], kind, member),
                   wanted = (uint64_t)(epoch & 0xffffffu);
    for (int looks = 1;; looks++) {
        const uint64_t v = look(flag);
        if (v >> EPOCH_AT == wanted) {
            asm volatile("fence.acq_rel.sys;" ::: "memory");
            return v & (((uint64_t)1 << EPOCH_AT) - 1);
        }
        if (looks % LOOKS == 0 && *p.abort != 0) return NOWHERE;
        __nanosleep(PAUSE_NS);
    }
}

/* One thread; v: below the epoch. */
__device__ __forceinline__ void tell(const plan &p, int kind, int member, uint32_t epoch,
                                     uint64_t v)
{
    raise_flag(flag_of(p.flags[member], kind, p.rank),
               (uint64_t)(epoch & 0xffffffu) << EPOCH_AT | v);
}

/* This block's part of n things. */
struct part {
    size_t begin, end;
};
__device__ __forceinline__ part part_of(size_t n)
{
    const size_t each = (n + gridDim.x - 1) / gridDim.x, begin = min(n, blockIdx.x * each);
    return part{begin, min(n, begin + each)};
}

__device__ __forceinline__ void load(uint4 (&v)[AHEAD], const uint4 *from, size_t first, size_t end)
{
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if (first + k * THREADS < end) v[k] = from[first + k * THREADS];
}

__device__ __forceinline__ void store(const uint4 (&v)[AHEAD], uint4 *to, size_t first, size_t end)
{
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if (first + k * THREADS < end) to[first + k * THREADS] = v[k];
}

__device__ __forceinline__ bool is_line(uint64_t x)
{
    return x % 16 == 0;
}

/* The rest of a part whose first lines are loaded; or all of it, byte by byte. */
__device__ __forceinline__ void send(uint4 (&v)[AHEAD], const char *from, char *to, size_t bytes,
                                     bool lines)
{
    if (lines && is_line((uint64_t)to)) {
        const part n = part_of(bytes / 16);
        size_t at = n.begin + threadIdx.x;
        store(v, (uint4 *)(void *)to, at, n.end);
        for (at += AHEAD * THREADS; at < n.end; at += AHEAD * THREADS) {
            load(v, (const uint4 *)(const void *)from, at, n.end);
            store(v, (uint4 *)(void *)to, at, n.end);
        }
        return;
    }
    const part n = part_of(bytes);
#pragma unroll 1
    for (size_t at = n.begin + threadIdx.x; at < n.end; at += THREADS)
        to[at] = from[at];
}

/* Both ends have READY e; thread 0 knows where to. */
__device__ __forceinline__ uint64_t meet(const plan &p, int member, uint32_t epoch)
{
    if (p.words[LEFT]) return NOWHERE;
    tell(p, READY, member, epoch, (uint64_t)(p.a.to[member] - p.a.memory[p.rank]));
    return hear(p, READY, member, epoch);
}

__global__ void __launch_bounds__(THREADS) swap(const __grid_constant__ plan p)
{
    __shared__ uint64_t shared_place;
    const int m = ((int)blockIdx.y - p.rank + p.n_members) % p.n_members;
    const size_t bytes = p.a.n_send[m];
    const char *from = p.a.from[m];
    const bool lines = is_line((uint64_t)from | bytes), own = m == p.rank;
    uint32_t *word = p.words + m * TR_CUDA_SWAP_BLOCKS + (int)blockIdx.x, epoch = 0;
    uint4 v[AHEAD];

    if (own ? from == p.a.to[m] : !bytes && !p.a.n_recv[m]) return;
    if (lines) {
        const part n = part_of(bytes / 16);
        load(v, (const uint4 *)(const void *)from, n.begin + threadIdx.x, n.end);
    }
    if (own) {
        send(v, from, p.a.to[m], bytes, lines);
        return;
    }
    if (threadIdx.x == 0) {
        epoch = *word + 1;
        shared_place = meet(p, m, epoch);
    }
    __syncthreads();
    const uint64_t place = shared_place;
    if (place != NOWHERE) send(v, from, p.a.memory[m] + place, bytes, lines);
    __syncthreads();
    if (threadIdx.x) return;
    bool good = place != NOWHERE;
    if (good) tell(p, SENT, m, epoch, 0);
    good = good && hear(p, SENT, m, epoch) != NOWHERE;
    if (!good) p.words[LEFT] = 1;
    *word = epoch;
}

} // namespace

cudaError_t tr_cuda_swap(const tr_cuda_swap_group *g, const tr_cuda_swap_args *a,
                         cudaStream_t stream)
{
    plan p = {
        .a = *a, .words = g->words, .abort = g->abort, .rank = g->rank, .n_members = g->n_members};

    if (g->n_members < 2 || g->n_members > TR_MAX_PEERS) return cudaErrorInvalidValue;
    for (int i = 0; i < g->n_members; i++)
        p.flags[i] = g->flags[i];
    const dim3 grid((unsigned)(TR_CUDA_SWAP_BLOCKS / g->n_members), (unsigned)g->n_members);
    swap<<<grid, THREADS, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t tr_cuda_swap_load(void)
{
    cudaFuncAttributes ignored;
    return cudaFuncGetAttributes(&ignored, (const void *)swap);
}
