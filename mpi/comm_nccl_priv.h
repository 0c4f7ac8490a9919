/* One communicator over NCCL, shared by comm_nccl.c (what is under way, the table of functions) and comm_nccl_calls.c (what an
 * operation is made of). */
#ifndef TR_MPI_COMM_NCCL_PRIV_H
#define TR_MPI_COMM_NCCL_PRIV_H

#include <stdbool.h>

#include "kernels/cuda/peer.h"
#include "mpi/comm_nccl_peer.h"
#include "mpi/comm_priv.h"
#include "mpi/nccl_priv.h"

enum {
    TR_NCCL_FLYING = 256,           /* operations under way that the host follows */
    TR_NCCL_RECORDED = 64,          /* ends inside a record that can be told apart */
    TR_NCCL_TERMS_BYTES = 32 << 20, /* of the other members' terms at a time */
};

typedef struct tr_comm_nccl tr_comm_nccl;
typedef struct tr_nccl_pusher tr_nccl_pusher; /* comm_nccl_push.c */

typedef struct tr_nccl_flying { /* one operation under way */
    uint64_t ticket, flight, begun_ns;
    tr_comm_op op;
    bool waited; /* a lane was made to wait, at `reached` */
    cudaEvent_t begun, ended, reached;
} tr_nccl_flying;

struct tr_comm_nccl {
    tr_comm base;
    tr_nccl *nccl; /* kept */
    tr_nccl_seat seat;
    bool by_terms; /* sums */
    cudaStream_t stream;
    cudaEvent_t point; /* of the main lane: where an operation begins */
    tr_nccl_flying flying[TR_NCCL_FLYING];
    uint64_t first, end; /* under way: flying[i % TR_NCCL_FLYING], first <= i < end */
    uint64_t looked_ns;
    cudaEvent_t recorded[TR_NCCL_RECORDED]; /* by ticket: */
    uint64_t recorded_of[TR_NCCL_RECORDED]; /* whose end it is; 0: nobody's */
    void *terms;                            /* [TR_NCCL_TERMS_BYTES] device memory; by_terms only */
    int first_rank;                         /* member 0's of the world */
    uint64_t n_collectives, n_letters;
    tr_peers *peers; /* NULL: sums are NCCL's; else: */
    tr_cuda_peer_group fused;
    int form
        [TR_PEER_SIZES]; /* by the logarithm of the number of rows, rounded up: tr_cuda_peer_form, -1: NCCL's */
    tr_peer_use push_use; /* of exchanges of rows */
    tr_nccl_pusher *push; /* NULL: NCCL moves rows */
    tr_err broken;        /* NCCL or the device failed: so does all that comes */
};

/* What is to be done; issue enqueues it on the communicator's stream. */
typedef struct tr_nccl_call tr_nccl_call;
struct tr_nccl_call {
    tr_comm_op op;
    tr_status (*issue)(tr_comm_nccl *, const tr_nccl_call *, tr_err *);
    const void *send;
    void *recv;
    size_t n; /* elements of a sum; else bytes */
    tr_dtype dtype;
    const size_t *n_send, *n_recv; /* [size] bytes */
    int peer;                      /* or root */
    size_t bytes;                  /* what this member gives, for the flight recorder */
    const tr_share_move *move;
    const struct tr_norm_args *norm;
    bool on_main;        /* on the main lane itself: no other stream has a part in it */
    cudaStream_t stream; /* NULL: the communicator's */
};

static inline size_t tr_nccl_number_bytes(tr_dtype dtype)
{
    return dtype == TR_BF16 ? 2 : 4;
}

static inline size_t tr_nccl_sum(const size_t *n, int count)
{
    size_t s = 0;
    for (int i = 0; i < count; i++)
        s += n[i];
    return s;
}

/* Ways to do it; on the main thread, not while a lock is held. */
typedef tr_status tr_nccl_issue(tr_comm_nccl *, const tr_nccl_call *, tr_err *);
tr_nccl_issue tr_nccl_issue_sum_two, tr_nccl_issue_sum, tr_nccl_issue_scatter, tr_nccl_issue_max,
    tr_nccl_issue_gather, tr_nccl_issue_exchange, tr_nccl_issue_broadcast, tr_nccl_issue_letter,
    tr_nccl_issue_share, tr_nccl_issue_norm, tr_nccl_issue_push, tr_nccl_issue_swap;

/* Why there is no peer memory although it could be mapped: what was tried out first has shown it. */
#define TR_NCCL_DAMAGED "what one GPU stores into another's memory does not arrive as it was"

/* comm_nccl_norm.c: which form so many rows take; -1: none. */
int tr_nccl_norm_form(const tr_comm_nccl *c, int n_max, int d);
/* Bytes that such an operation sends to another member. */
size_t tr_nccl_norm_gives(const tr_comm_nccl *c, const struct tr_norm_args *a, int member);

/* comm_nccl_push.c: tr_comm_impl's reach and leave_alone; on which stream such rows are pushed, NULL: they are not; and the
 * end of it. */
tr_status tr_nccl_reach(tr_comm *base, void *memory, size_t bytes, tr_err *err);
void tr_nccl_leave_alone(tr_comm *base, const void *memory);
cudaStream_t tr_nccl_push_stream(const tr_comm_nccl *c, const tr_share_move *m);
void tr_nccl_push_close(tr_comm_nccl *c);
/* These `bytes` lie in memory that is reached: a gather or an all-to-all into them is tr_nccl_issue_swap. */
bool tr_nccl_swaps(const tr_comm_nccl *c, const void *recv, size_t bytes);

#endif
