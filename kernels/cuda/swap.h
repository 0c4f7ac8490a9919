/* Rows from everybody to everybody, stored straight into the other members' receive buffers over peer memory (parallel.md 5.5,
 * "lsa"): no staging, no collective. A member is a pointer; who they are and how their memory came here is
 * mpi/comm_nccl_push.c's business. */
#ifndef TR_CUDA_SWAP_H
#define TR_CUDA_SWAP_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/kernels.h"

enum {
    /* Of threads, of all members together; every one has its flags. `bench comm --experts 1,128,4096` on two H200s, dispatch and
     * combine: 9.6 and 9.2, 13.0 and 15.2, 186 and 263 us with 64; with 128 11.6 and 11.2, 13.7 and 16.3, 184 and 262; with 256
     * 12.9 and 12.6, 15.0 and 17.7, 193 and 278. */
    TR_CUDA_SWAP_BLOCKS = 64,
    TR_CUDA_SWAP_FLAGS =
        2 * TR_MAX_PEERS * TR_CUDA_SWAP_BLOCKS, /* words of 64 bits that others write */
    TR_CUDA_SWAP_WORDS = TR_MAX_PEERS * TR_CUDA_SWAP_BLOCKS + 1, /* of 32 bits, a member's own */
};

/* What a group has for its exchanges. They are made one behind the other, in the same order on all members. */
typedef struct tr_cuda_swap_group {
    int rank, n_members;            /* 2 .. TR_MAX_PEERS */
    uint64_t *flags[TR_MAX_PEERS];  /* by member: TR_CUDA_SWAP_FLAGS words, at first 0 */
    uint32_t *words;                /* own memory: TR_CUDA_SWAP_WORDS, at first 0 */
    const volatile uint32_t *abort; /* host-mapped: not 0: who waits leaves */
} tr_cuda_swap_group;

/* One exchange. Where a member's bytes go the receiver tells it, as an offset in the memory that is mapped. */
typedef struct tr_cuda_swap_args {
    char *memory[TR_MAX_PEERS];     /* by member: the same memory's first byte, 256 aligned */
    const char *from[TR_MAX_PEERS]; /* what each member is given, own memory; */
    size_t n_send[TR_MAX_PEERS];    /* bytes of it */
    char *to[TR_MAX_PEERS];         /* where each member's bytes go, in memory[rank]; */
    size_t n_recv[TR_MAX_PEERS];    /* bytes of them: the giver's n_send */
} tr_cuda_swap_args;

/* When it ends all members' bytes are here; a kernel behind it may read them. What went before it on this member has ended
 * reading what lies there now: nobody's bytes come before it has begun. Every member runs it. */
cudaError_t tr_cuda_swap(const tr_cuda_swap_group *g, const tr_cuda_swap_args *a,
                         cudaStream_t stream);
/* The kernels onto the current device, before the first one waits. */
cudaError_t tr_cuda_swap_load(void);

#ifdef __cplusplus
}
#endif

#endif
