/* Communicators: one group's collectives on one lane. Knows rows and bytes, never a layer; may include kernels.h for
 * device memory and lanes. Each operation is begun (and gives a ticket) and later waited for.
 *
 * Implementations stand behind one table of functions (comm_priv.h): the group of one (here), a loop-back of several
 * ranks in one process (tests), MPI and NCCL (later). On the CPU "wait" returns when the data is there; progress is to
 * be called between operations because MPI advances only when called. All calls of one communicator come from one
 * thread, in the same order on every member. */
#ifndef TR_MPI_COMM_H
#define TR_MPI_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/kernels.h"

typedef struct tr_comm tr_comm;
typedef struct tr_share
    tr_share; /* rows every member writes a part of and every member reads whole: keys and latents */
typedef struct tr_ticket {
    uint64_t n;
} tr_ticket;

typedef enum tr_comm_op {
    TR_COMM_ALL_REDUCE,
    TR_COMM_ALL_GATHER,
    TR_COMM_REDUCE_SCATTER,
    TR_COMM_ALL_TO_ALL,
    TR_COMM_SEND,
    TR_COMM_RECV,
    TR_COMM_BROADCAST,
    TR_COMM_N_OPS
} tr_comm_op;

/* The group of one: every collective is a copy or nothing; send and recv are TR_E_COMM. NULL: out of memory. */
tr_comm *tr_comm_self(void);
void tr_comm_free(tr_comm *comm);

int tr_comm_rank(const tr_comm *), tr_comm_size(const tr_comm *);
/* In place. dtype TR_F32 so far; the sum runs over members in rank order. */
tr_status tr_comm_all_reduce(tr_comm *, void *buf, size_t n, tr_dtype, tr_ticket *, tr_err *);
/* bytes[size]: what each member gives; recv holds them in rank order. */
tr_status tr_comm_all_gather(tr_comm *, const void *send, void *recv, const size_t *bytes,
                             tr_ticket *, tr_err *);
/* send holds size * n elements, recv gets this member's n of the sum. */
tr_status tr_comm_reduce_scatter(tr_comm *, const void *send, void *recv, size_t n, tr_dtype,
                                 tr_ticket *, tr_err *);
/* n_send[size], n_recv[size] in bytes; both buffers in rank order, without gaps. */
tr_status tr_comm_all_to_all(tr_comm *, const void *send, const size_t *n_send, void *recv,
                             const size_t *n_recv, tr_ticket *, tr_err *);
tr_status tr_comm_send(tr_comm *, int to, const void *, size_t bytes, tr_ticket *, tr_err *);
tr_status tr_comm_recv(tr_comm *, int from, void *, size_t bytes, tr_ticket *, tr_err *);
tr_status tr_comm_broadcast(tr_comm *, int root, void *, size_t bytes, tr_ticket *, tr_err *);
/* The data of `ticket` is there for `reader` afterwards. */
tr_status tr_comm_wait(tr_comm *, tr_lane reader, tr_ticket, tr_err *);
void tr_comm_progress(tr_comm *);
/* Calls and bytes given by this member so far, per operation. */
void tr_comm_counts(const tr_comm *, tr_comm_op, uint64_t *calls, uint64_t *bytes);

/* Context parallelism's exchange. begin: tells the writing kernel where peers want the rows (group of one: nobody);
 * sent: the writer was enqueued, a gather may begin; ready: the reader may go on, after `await`.
 * row_bytes: of one row; rows_max: of one step. NULL comm is not allowed. */
tr_status tr_share_open(tr_share **, tr_comm *, size_t row_bytes, int rows_max, tr_err *);
void tr_share_close(tr_share *);
tr_status tr_share_begin(tr_share *, const tr_rows *, void *dst, tr_push *push, tr_err *);
tr_status tr_share_sent(tr_share *, tr_lane writer, tr_err *);
tr_status tr_share_ready(tr_share *, tr_lane reader, tr_await *await, tr_err *);

#endif
