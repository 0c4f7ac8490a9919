/* Rows of a cache to the same places in other GPUs' caches (parallel.md 3.5, "push at the source"): stored over peer memory by
 * a few warps beside whatever computes. A member is a pointer and an offset; who they are and how their memory came here is
 * mpi/comm_nccl_push.c's business. */
#ifndef TR_CUDA_PUSH_H
#define TR_CUDA_PUSH_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/cuda/comm.h"
#include "kernels/kernels.h"

enum {
    TR_CUDA_PUSH_WORDS = 4, /* of a member's own */
    TR_CUDA_PUSH_FLAGS =
        2 * TR_MAX_PEERS * 32 /* words of a member's that others write: 128 B apart */
};

/* What a group has for its exchanges. They are made one behind the other, in the same order on all members. */
typedef struct tr_cuda_push_group {
    int rank, n_members;            /* 2 .. TR_MAX_PEERS */
    uint32_t *flags[TR_MAX_PEERS];  /* by member: TR_CUDA_PUSH_FLAGS words, at first 0 */
    uint32_t *words;                /* own memory: TR_CUDA_PUSH_WORDS, at first 0 */
    const volatile uint32_t *abort; /* host-mapped: not 0: who waits leaves */
} tr_cuda_push_group;

/* One exchange: this member's rows list[first, end), laid out as tr_cuda_cache_rows_args says, from its cache to the same
 * place in the others': at + offset[member]. */
typedef struct tr_cuda_push_args {
    char *cache;
    ptrdiff_t offset[TR_MAX_PEERS]; /* by member; own and missing ones: 0 */
    const int64_t *list;            /* device memory, no entry below 0 */
    int first, end;                 /* the same: this member has none, and waits for the others' */
    int n_pieces;
    size_t page_bytes, at[TR_CUDA_PIECES], bytes[TR_CUDA_PIECES];
} tr_cuda_push_args;

/* When it ends the rows of all members are in this member's cache; a kernel behind it may read them. What went before it on
 * this member has ended reading what lies there now: nobody's rows come before it has begun. Every member runs it. */
cudaError_t tr_cuda_push(const tr_cuda_push_group *g, const tr_cuda_push_args *a,
                         cudaStream_t stream);
/* The kernels onto the current device, before the first one waits. */
cudaError_t tr_cuda_push_load(void);

#ifdef __cplusplus
}
#endif

#endif
