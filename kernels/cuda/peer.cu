/* The members' sum of a row, the residual, its norm and e4m3 form in one kernel over peer memory (kernels.md 5, "all-reduce").
 *
 * A slot holds a row of bf16 from one member. Data are their own flag: a slot's 32-bit words are all ones until the sender's
 * stores arrive, and a word of data never is all ones (two NaNs of a payload that no conversion makes; they are sent as the
 * usual ones). Who has read a slot makes it all ones again.
 *
 * Slots are there BUFFERS times, taken in turn by epoch. A member leaves epoch e only when every other has sent its terms of e,
 * which it does after it has ended e - 1 altogether. So whoever stores into the slots of epoch e + 2 knows that they have been
 * read and cleared in e, and two would do; the third keeps the clearing stores and the peer's next ones a whole kernel apart.
 * Launches without live rows are no epoch: nobody would have waited in them.
 *
 * A cluster of blocks, a part of the row each, has rows c, c + clusters, ..: it sends all it has to send unasked before it
 * waits, then takes them in ascending order. The clusters that there are run at once (at_once), so of the rows not yet done
 * anywhere the first one always gets on.
 *
 * A kernel that was told to leave while it waited writes that down; those behind it, whose input is not what it should be, then
 * send nothing to anybody. */
#include "kernels/cuda/peer.h"

#include <algorithm>

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace
{

/* CLUSTER: one row of 7168 on 4 H200s of one host, in a graph, takes 6.4 us with 2, 5.6 with 4, 5.4 with 8. */
enum {
    BUFFERS = 3,
    CLUSTER = 8, /* blocks of threads a row */
    THREADS = tr::NORM_THREADS / CLUSTER,
    WARPS = tr::NORM_THREADS / 32,
    ONE_ROWS = 64,    /* of form ONE with more than two members */
    ROWS_MOST = 4096, /* of a launch: addresses in the slots are of 32 bits */
    LOOKS = 1024,     /* at the slots, between two looks at the abort word: some 0.5 ms */
};
enum { EPOCH, ARRIVED, LEFT }; /* words */

constexpr uint32_t NOTHING = 0xffffffffu;

struct plan {
    tr_norm_args a;
    char *other[TR_MAX_PEERS - 1]; /* slots of the members behind this one, in turn */
    char *mine;
    uint32_t *words;
    const volatile uint32_t *abort;
    unsigned row_bytes;
    int rank, rows_in, rows_out, ld_scale;
};

/* ---- memory that others write or read: 8 numbers at a time ----------------------------------------------------------- */

__device__ __forceinline__ uint4 look(const char *p)
{
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ void send(char *p, uint4 v)
{
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ void clear(char *p)
{
    *(uint4 *)(void *)p = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
}
/* Every word by itself: nothing is assumed of how stores travel. */
__device__ __forceinline__ bool is_there(uint4 v)
{
    return v.x != NOTHING && v.y != NOTHING && v.z != NOTHING && v.w != NOTHING;
}
__device__ __forceinline__ uint32_t sendable(uint32_t w)
{
    return w == NOTHING ? 0x7fff7fffu : w;
}
__device__ __forceinline__ uint4 sendable(uint4 v)
{
    return make_uint4(sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w));
}

/* ---- numbers -------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float2 widen(uint32_t w)
{
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

/* Pairs of the members' numbers, added up in rank order; begins with the first: 0 + -0 would be +0. */
template <int N> __device__ __forceinline__ uint32_t sum_pair(const uint32_t (&term)[N])
{
    float2 sum = widen(term[0]);
#pragma unroll
    for (int m = 1; m < N; m++) {
        const float2 x = widen(term[m]);
        sum = make_float2(sum.x + x.x, sum.y + x.y);
    }
    const __nv_bfloat162 both = __floats2bfloat162_rn(sum.x, sum.y);
    return sendable(*(const uint32_t *)&both);
}

template <int N> __device__ __forceinline__ uint4 sum_terms(const uint4 (&term)[N])
{
    uint32_t x[N], y[N], z[N], w[N];
#pragma unroll
    for (int m = 0; m < N; m++) {
        x[m] = term[m].x;
        y[m] = term[m].y;
        z[m] = term[m].z;
        w[m] = term[m].w;
    }
    return make_uint4(sum_pair(x), sum_pair(y), sum_pair(z), sum_pair(w));
}

/* ---- one thread's view ------------------------------------------------------------------------------------------------ */

/* Of N members. What travels is taken 8 numbers a thread: of a warp's two blocks of 128 numbers (norm.cuh) the lower half of
 * the lanes has the one, the upper half the other. */
template <int N> struct work {
    const plan &p;
    const int t;      /* of 1024 */
    const unsigned j; /* its first number that travels */
    int buffer;
    bool has, left; /* numbers of the row at all; it was told to leave */

    __device__ work(const plan &given)
        : p(given), t((int)tr::cluster_rank() * THREADS + (int)threadIdx.x),
          j((unsigned)(t % 32 / 16 * tr::NORM_THREADS * 4 + t / 32 * 128 + t % 16 * 8)), buffer(0),
          has(j < (unsigned)given.a.d), left(false)
    {
    }

    /* Slots for terms, of `sender`; and for sums. i: a row's place in them. */
    __device__ char *in(char *slots, int sender, int i) const
    {
        return slots + (unsigned)((buffer * N + sender) * p.rows_in + i) * p.row_bytes + 2u * j;
    }
    __device__ char *out(char *slots, int i) const
    {
        return slots + (unsigned)(BUFFERS * N * p.rows_in + buffer * p.rows_out + i) * p.row_bytes +
               2u * j;
    }

    /* This member's terms of row r. */
    __device__ uint4 own(int r) const
    {
        if (!has) return make_uint4(0, 0, 0, 0);
        return sendable(*(const uint4 *)(tr::act(p.a.add) + (size_t)r * p.a.ld_add + j));
    }

    /* To all others, who find them at place r; to the one who adds up row r, at place r / N. */
    __device__ void send_all(int r, uint4 x) const
    {
        if (!has) return;
#pragma unroll
        for (int d = 1; d < N; d++)
            send(in(p.other[d - 1], p.rank, r), x);
    }
    __device__ void send_owner(int r, uint4 x) const
    {
        const int owner = r % N;
#pragma unroll
        for (int d = 1; d < N; d++)
            if (has && (owner == p.rank + d || owner == p.rank + d - N))
                send(in(p.other[d - 1], p.rank, r / N), x);
    }

    /* Leave? Asked by who has looked in vain for a while. */
    __device__ bool shall_leave(int looks)
    {
        if (looks % LOOKS != 0 || *p.abort == 0) return left;
        p.words[LEFT] = 1;
        left = true;
        return true;
    }

    /* The sum of all members' terms of a row, at place i; mine: this one's. */
    __device__ uint4 add_up(int i, uint4 mine)
    {
        uint4 term[N];
        bool all;
        int looks = 0;
        if (!has) return make_uint4(0, 0, 0, 0);
        do {
            all = true;
#pragma unroll
            for (int m = 0; m < N; m++) {
                term[m] = m == p.rank ? mine : look(in(p.mine, m, i));
                all = all && is_there(term[m]);
            }
        } while (!all && !shall_leave(++looks));
        return sum_terms<N>(term);
    }
    __device__ void clear_terms(int i) const
    {
#pragma unroll
        for (int m = 0; m < N; m++)
            if (has && m != p.rank) clear(in(p.mine, m, i));
    }

    /* Row r's sum, to all others; from the member that has made it. */
    __device__ void send_sum(int r, uint4 sum) const
    {
#pragma unroll
        for (int d = 1; d < N; d++)
            if (has && !left) send(out(p.other[d - 1], r), sum);
    }
    __device__ uint4 take_sum(int r)
    {
        uint4 sum = make_uint4(0, 0, 0, 0);
        int looks = 0;
        if (!has) return sum;
        do {
            sum = look(out(p.mine, r));
        } while (!is_there(sum) && !shall_leave(++looks));
        clear(out(p.mine, r));
        return sum;
    }

    /* From 8 numbers a thread to 4 of each round. */
    __device__ float4 spread(uint4 sum, int round) const
    {
        const int from = round * 16 + t % 32 / 2;
        const uint32_t x = __shfl_sync(0xffffffffu, sum.x, from),
                       y = __shfl_sync(0xffffffffu, sum.y, from),
                       z = __shfl_sync(0xffffffffu, sum.z, from),
                       w = __shfl_sync(0xffffffffu, sum.w, from);
        const float2 a = widen(t % 2 ? z : x), b = widen(t % 2 ? w : y);
        return make_float4(a.x, a.y, b.x, b.y);
    }
};

/* Sums over a row's threads, in the order of tr::block_reduce: each warp's goes to all blocks of the cluster, and how many bytes
 * have come tells when. No barrier, which would wait for the stores to peers as well. Rows take turns with two of them: who is
 * a row ahead writes into the other one, and cannot be two ahead. */
struct meeting {
    float warp[2][WARPS];
    uint64_t come[2];
};

__device__ __forceinline__ void meeting_begin(meeting *m)
{
    if (threadIdx.x == 0) {
        tr::barrier_init(&m->come[0], 1);
        tr::barrier_init(&m->come[1], 1);
        tr::barrier_init_fence();
        tr::barrier_expect(&m->come[0], sizeof m->warp[0]);
        tr::barrier_expect(&m->come[1], sizeof m->warp[1]);
    }
    __syncthreads();
    tr::cluster_arrive_relaxed();
}

/* x: this thread's, t of 1024; i: the row, counted. */
__device__ __forceinline__ float meeting_sum(meeting *m, float x, int t, int i)
{
    float *warp = m->warp[i % 2];
    uint64_t *come = &m->come[i % 2];
    x = tr::warp_reduce<float, tr::add<float>>(x);
    if (t % 32 < CLUSTER) {
        const uint32_t to = (uint32_t)(t % 32);
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                tr::cluster_address(tr::smem_address(warp + t / 32), to)),
            "f"(x), "r"(tr::cluster_address(tr::smem_address(come), to))
            : "memory");
    }
    tr::barrier_wait(come, (uint32_t)(i / 2 % 2));
    float sum = 0; /* 0 + a square is the square */
#pragma unroll 2
    for (int j = 0; j < WARPS; j += 4) {
        const float4 four = *(const float4 *)(warp + j);
        sum = sum + four.x + four.y + four.z + four.w;
    }
    if (threadIdx.x == 0) tr::barrier_expect(come, sizeof m->warp[0]);
    return sum;
}

/* The residual of a row, asked for before the sum is there. */
struct beside {
    float4 v[tr::NORM_ROUNDS];
    float *residual;

    __device__ beside(const plan &p, int r, int t)
        : residual(p.a.residual + (size_t)r * p.a.ld_residual)
    {
#pragma unroll
        for (int k = 0; k < tr::NORM_ROUNDS; k++) {
            const int j = tr::norm_at(k, t);
            v[k] = j < p.a.d ? *(const float4 *)(residual + j) : make_float4(0, 0, 0, 0);
        }
    }
};

template <int N, bool TWO>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, N <= 4 ? 8 : 4)
    peer_norm(const __grid_constant__ plan p)
{
    __shared__ __align__(16) meeting row;
    const int first = (int)blockIdx.x / CLUSTER, step = (int)gridDim.x / CLUSTER;
    work<N> w(p);

    meeting_begin(&row);
    tr::dependent_wait();
    const uint4 first_own = w.own(first); /* first < n_max; asked for beside the counts */
    const int n = tr::live_rows(p.a.n, p.a.n_max);
    const uint32_t epoch = ((const volatile uint32_t *)p.words)[EPOCH];
    w.left = ((const volatile uint32_t *)p.words)[LEFT] != 0;
    w.buffer = (int)(epoch % BUFFERS);
#pragma unroll 1
    for (int r = first; r < n && !w.left; r += step) {
        const uint4 x = r == first ? first_own : w.own(r);
        if (TWO)
            w.send_owner(r, x);
        else
            w.send_all(r, x);
    }
    tr::cluster_wait(); /* its blocks run: their memory can be written */
#pragma unroll 1
    for (int r = first, i = 0; r < n; r += step, i++) {
        const bool adds = !TWO || r % N == p.rank;
        const int place = TWO ? r / N : r;
        beside b(p, r, w.t);
        const uint4 sum = adds ? w.add_up(place, r == first ? first_own : w.own(r)) : w.take_sum(r);
        if (TWO && adds) w.send_sum(r, sum);
        float4 weight[tr::NORM_ROUNDS];
#pragma unroll
        for (int k = 0; k < tr::NORM_ROUNDS; k++) {
            const int at = tr::norm_at(k, w.t);
            weight[k] =
                at < p.a.d ? __ldg((const float4 *)(p.a.weight + at)) : make_float4(0, 0, 0, 0);
            const float4 x = w.spread(sum, k);
            b.v[k] = make_float4(b.v[k].x + x.x, b.v[k].y + x.y, b.v[k].z + x.z, b.v[k].w + x.w);
        }
        const float squares = meeting_sum(&row, tr::norm_squares(b.v), w.t, i);
        tr::norm_store(p.a, p.ld_scale, r, w.t, b.v, weight, squares);
#pragma unroll
        for (int k = 0; k < tr::NORM_ROUNDS; k++) {
            const int at = tr::norm_at(k, w.t);
            if (at < p.a.d) *(float4 *)(b.residual + at) = b.v[k];
        }
        if (adds) w.clear_terms(place);
    }
    /* Without live rows nobody has waited, and it was no epoch. */
    if (n > 0 && threadIdx.x == 0 && atomicAdd(&p.words[ARRIVED], 1u) == gridDim.x - 1) {
        p.words[ARRIVED] = 0;
        p.words[EPOCH] = epoch + 1;
    }
}

/* ---- launches -------------------------------------------------------------------------------------------------------- */

typedef void kernel(plan);

template <int N> kernel *of_form(tr_cuda_peer_form form)
{
    return form == TR_CUDA_PEER_ONE ? peer_norm<N, false> : peer_norm<N, true>;
}

kernel *choose(int n_members, tr_cuda_peer_form form)
{
    switch (n_members) {
    case 2: /* TWO would be a hop more and no byte less */
        return form == TR_CUDA_PEER_ONE ? peer_norm<2, false> : nullptr;
    case 3:
        return of_form<3>(form);
    case 4:
        return of_form<4>(form);
    case 5:
        return of_form<5>(form);
    case 6:
        return of_form<6>(form);
    case 7:
        return of_form<7>(form);
    case 8:
        return of_form<8>(form);
    default:
        return nullptr;
    }
}

int rows_in(int n_members, int rows)
{
    if (n_members == 2) return rows;
    return std::max(std::min(rows, (int)ONE_ROWS), (rows + n_members - 1) / n_members);
}

/* Its attributes are kept in `early`. */
cudaLaunchConfig_t launch_of(int clusters, cudaLaunchAttribute *early, cudaStream_t stream)
{
    cudaLaunchConfig_t c = {};
    c.gridDim = dim3((unsigned)(clusters * CLUSTER));
    c.blockDim = dim3(THREADS);
    c.stream = stream;
    early->id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early->val.programmaticStreamSerializationAllowed = 1;
    c.attrs = early;
    c.numAttrs = 1;
    return c;
}

} // namespace

size_t tr_cuda_peer_slots(int n_members, int d, int rows)
{
    if (n_members < 2 || n_members > TR_MAX_PEERS || d < 128 || d % 128 || d > tr::NORM_MOST ||
        rows < 1 || rows > ROWS_MOST)
        return 0;
    return (size_t)BUFFERS * (size_t)(n_members * rows_in(n_members, rows) + rows) * 2 * (size_t)d;
}

int tr_cuda_peer_rows(const tr_cuda_peer_group *g, tr_cuda_peer_form form)
{
    if (g->n_members == 2) return form == TR_CUDA_PEER_ONE ? g->rows : 0;
    return form == TR_CUDA_PEER_TWO ? g->rows : std::min(g->rows, (int)ONE_ROWS);
}

cudaError_t tr_cuda_peer_load(tr_cuda_peer_group *g)
{
    for (int form = 0; form < TR_CUDA_PEER_FORMS; form++) {
        cudaLaunchAttribute early;
        cudaLaunchConfig_t c = launch_of(1, &early, NULL);
        kernel *const k = choose(g->n_members, (tr_cuda_peer_form)form);
        if (tr_cuda_peer_rows(g, (tr_cuda_peer_form)form) == 0) continue;
        const cudaError_t e =
            k ? cudaOccupancyMaxActiveClusters(&g->at_once[form], k, &c) : cudaErrorInvalidValue;
        if (e != cudaSuccess) return e;
        if (g->at_once[form] < 1) return cudaErrorLaunchOutOfResources;
    }
    return cudaSuccess;
}

cudaError_t tr_cuda_peer_norm(const tr_cuda_peer_group *g, tr_cuda_peer_form form,
                              const struct tr_norm_args *a, cudaStream_t stream)
{
    kernel *const k = choose(g->n_members, form);
    plan p = {.a = *a,
              .mine = g->slots[g->rank],
              .words = g->words,
              .abort = g->abort,
              .row_bytes = 2 * (unsigned)g->d,
              .rank = g->rank,
              .rows_in = rows_in(g->n_members, g->rows),
              .rows_out = g->rows,
              .ld_scale = (a->n_max + 3) / 4 * 4};

    if (a->n_max <= 0) return cudaSuccess;
    if (!k || !a->add || a->d > g->d || a->n_max > tr_cuda_peer_rows(g, form) ||
        !tr::norm_fits(*a) || a->ld_add % 8 || g->at_once[form] < 1)
        return cudaErrorInvalidValue;
    for (int d = 1; d < g->n_members; d++)
        p.other[d - 1] = g->slots[(g->rank + d) % g->n_members];
    cudaLaunchAttribute early;
    cudaLaunchConfig_t c = launch_of(std::min(a->n_max, g->at_once[form]), &early, stream);
    if (!tr::early::allowed(stream)) c.numAttrs = 0;
    return cudaLaunchKernelEx(&c, k, p);
}
