/* kernels/cuda/push.cu and swap.cu where the GPU is the host: one thread does what their blocks do, with the same flags in the same
 * memory. */
#include <config.h>

#include <sched.h>
#include <string.h>

#include <mpi.h>

#include "tests/fake_nccl/fake.h"

enum { EPOCH, STARTED, ENDED, LEFT };
enum { READY, SENT, APART = 32 };

static uint32_t *flag_of(const tr_cuda_push_group *g, int at, int kind, int of)
{
    return g->flags[at] + (kind * TR_MAX_PEERS + of) * APART;
}

static void tell(const tr_cuda_push_group *g, int kind, uint32_t epoch)
{
    for (int i = 0; i < g->n_members; i++)
        if (i != g->rank) __atomic_store_n(flag_of(g, i, kind, g->rank), epoch, __ATOMIC_RELEASE);
}

static int hear(const tr_cuda_push_group *g, int kind, uint32_t epoch)
{
    for (int i = 0; i < g->n_members; i++) {
        const uint32_t *flag = flag_of(g, g->rank, kind, i);
        while (i != g->rank && (int32_t)(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - epoch) < 0) {
            int found;
            if (*g->abort) return 0;
            MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &found, MPI_STATUS_IGNORE);
            sched_yield();
        }
    }
    return 1;
}

static void send_rows(const tr_cuda_push_group *g, const tr_cuda_push_args *a)
{
    for (int i = a->first; i < a->end; i++) {
        const size_t page = (size_t)a->list[i] / TR_PAGE_TOKENS,
                     place = (size_t)a->list[i] % TR_PAGE_TOKENS;
        for (int p = 0; p < a->n_pieces; p++) {
            char *from = a->cache + page * a->page_bytes + a->at[p] + place * a->bytes[p];
            for (int m = 0; m < g->n_members; m++)
                if (m != g->rank) memcpy(from + a->offset[m], from, a->bytes[p]);
        }
    }
}

void fake_push(const tr_cuda_push_group *g, const tr_cuda_push_args *a)
{
    const uint32_t epoch = g->words[EPOCH] + 1;
    int good = !g->words[LEFT];

    if (good) tell(g, READY, epoch);
    good = good && hear(g, READY, epoch);
    if (good) send_rows(g, a);
    if (good) tell(g, SENT, epoch);
    good = good && hear(g, SENT, epoch);
    g->words[LEFT] = !good;
    g->words[EPOCH] = epoch;
}

cudaError_t tr_cuda_push_load(void)
{
    return cudaSuccess;
}

/* ---- swap.cu: one channel of every pair --------------------------------------------------------------------------------- */

enum { SWAP_LEFT = TR_CUDA_SWAP_WORDS - 1, EPOCH_AT = 40 };

static uint64_t *swap_flag(const tr_cuda_swap_group *g, int at, int kind, int of)
{
    return g->flags[at] + (kind * TR_MAX_PEERS + of) * TR_CUDA_SWAP_BLOCKS;
}

static void swap_tell(const tr_cuda_swap_group *g, int kind, int m, uint32_t epoch, uint64_t v)
{
    __atomic_store_n(swap_flag(g, m, kind, g->rank), (uint64_t)(epoch & 0xffffffu) << EPOCH_AT | v,
                     __ATOMIC_RELEASE);
}

static int swap_hear(const tr_cuda_swap_group *g, int kind, int m, uint32_t epoch, uint64_t *v)
{
    const uint64_t *flag = swap_flag(g, g->rank, kind, m);
    while ((*v = __atomic_load_n(flag, __ATOMIC_ACQUIRE)) >> EPOCH_AT != (epoch & 0xffffffu)) {
        int found;
        if (*g->abort) return 0;
        MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &found, MPI_STATUS_IGNORE);
        sched_yield();
    }
    *v &= (UINT64_C(1) << EPOCH_AT) - 1;
    return 1;
}

static void swap_pair(const tr_cuda_swap_group *g, const tr_cuda_swap_args *a, int m)
{
    uint32_t *word = g->words + m * TR_CUDA_SWAP_BLOCKS;
    const uint32_t epoch = *word + 1;
    uint64_t v;
    int good = !g->words[SWAP_LEFT];

    if (good) swap_tell(g, READY, m, epoch, (uint64_t)(a->to[m] - a->memory[g->rank]));
    good = good && swap_hear(g, READY, m, epoch, &v);
    if (good) {
        memcpy(a->memory[m] + v, a->from[m], a->n_send[m]);
        if (fake_told("damaged") && a->n_send[m]) a->memory[m][v] ^= 1;
        swap_tell(g, SENT, m, epoch, 0);
    }
    good = good && swap_hear(g, SENT, m, epoch, &v);
    if (!good) g->words[SWAP_LEFT] = 1;
    *word = epoch;
}

void fake_swap(const tr_cuda_swap_group *g, const tr_cuda_swap_args *a)
{
    for (int d = 0; d < g->n_members; d++) {
        const int m = (d - g->rank + g->n_members) % g->n_members;
        if (m == g->rank)
            memmove(a->to[m], a->from[m], a->n_send[m]);
        else if (a->n_send[m] || a->n_recv[m])
            swap_pair(g, a, m);
    }
}

cudaError_t tr_cuda_swap_load(void)
{
    return cudaSuccess;
}
