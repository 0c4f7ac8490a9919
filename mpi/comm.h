/* Communicators: one group's collectives on one lane. Knows rows and bytes, never a layer; may include kernels.h for
 * device memory and lanes. Each operation is begun (and gives a ticket) and later waited for; until then its buffers
 * belong to it. Any number may be in flight, and they may be waited for in any order.
 *
 * Implementations stand behind one table of functions (comm_priv.h): the group of one (here), MPI (comm_mpi.h), a
 * loop-back of several ranks in one process (tests), NCCL (comm_nccl.h). On the CPU "wait" returns when the data is there;
 * progress is to be called between operations because MPI advances only when called. All calls of one communicator come
 * from one thread, and operations are begun in the same order on every member.
 *
 * Over NCCL buffers are memory of a device. An operation begins behind everything that has gone to the device's main lane,
 * beside whatever goes there later; "wait" makes a lane wait and returns at once. What the host may do with a buffer is
 * then told by the device's own tickets, as for any operation of kernels.h. */
#ifndef TR_MPI_COMM_H
#define TR_MPI_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/region.h"
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
    TR_COMM_ALL_MAX,
    TR_COMM_N_OPS
} tr_comm_op;

/* The group of one: every collective is a copy or nothing; send and recv are TR_E_COMM. NULL: out of memory. */
tr_comm *tr_comm_self(void);
void tr_comm_free(tr_comm *comm);

int tr_comm_rank(const tr_comm *), tr_comm_size(const tr_comm *);
const char *tr_comm_name(const tr_comm *); /* "stage", "attn_tp", ...; "self" of the group of one */
const char *tr_comm_op_name(tr_comm_op);   /* "all_reduce", ... */
/* In place. dtype TR_F32, and of device memory TR_BF16; the sum of every element is ((x0 + x1) + x2) + ... over members in
 * rank order, made in fp32 and rounded once, so that it is the same on all members and in every run. */
tr_status tr_comm_all_reduce(tr_comm *, void *buf, size_t n, tr_dtype, tr_ticket *, tr_err *);
/* The members' sum of a->add, made as all_reduce makes it, and with it norm (kernels.h), to the bit what the one and then the
 * other make: one operation on the device's main lane, behind what is there and before what comes; there is nothing to wait
 * for. a->add is read only. Counts as an all_reduce. All members call it with the same live rows, where tr_comm_fuses says that
 * it is to be used for so many rows of so many numbers; the answer is the same on all members. */
bool tr_comm_fuses(const tr_comm *, int n_max, int d);
tr_status tr_comm_reduce_norm(tr_comm *, const struct tr_norm_args *a, tr_err *);
/* bytes[size]: what each member gives; recv holds them in rank order. `send` may lie in recv where it belongs. */
tr_status tr_comm_all_gather(tr_comm *, const void *send, void *recv, const size_t *bytes,
                             tr_ticket *, tr_err *);
/* send holds size * n elements, recv gets this member's n of the sum, made like all_reduce's; it may be their place in send. */
tr_status tr_comm_reduce_scatter(tr_comm *, const void *send, void *recv, size_t n, tr_dtype,
                                 tr_ticket *, tr_err *);
/* Buffers that all_gather and all_to_all receive into lie in these `bytes` of ops->alloc's memory, from its first byte: members
 * whose GPUs reach each other's memory then store there what they give. Collective; without effect where it cannot be, and
 * over host memory. Memory of kind SYMMETRIC that holds nothing yet, as much on all members; what is received lies at any place
 * of it, on all members in it or on none. Until tr_comm_leave_alone (of all that was given; others: nothing), which comes
 * before the memory is released and before the communicator is freed. */
tr_status tr_comm_reach(tr_comm *, void *memory, size_t bytes, tr_err *);
void tr_comm_leave_alone(tr_comm *, const void *memory);
/* n_send[size], n_recv[size] in bytes; both buffers in rank order, without gaps. */
tr_status tr_comm_all_to_all(tr_comm *, const void *send, const size_t *n_send, void *recv,
                             const size_t *n_recv, tr_ticket *, tr_err *);
tr_status tr_comm_send(tr_comm *, int to, const void *, size_t bytes, tr_ticket *, tr_err *);
tr_status tr_comm_recv(tr_comm *, int from, void *, size_t bytes, tr_ticket *, tr_err *);
tr_status tr_comm_broadcast(tr_comm *, int root, void *, size_t bytes, tr_ticket *, tr_err *);
/* Largest of the members' words, in place: the packed arg-max of parallel.md 2.6. */
tr_status tr_comm_all_max_u64(tr_comm *, uint64_t *, size_t n, tr_ticket *, tr_err *);
/* The same of one word, begun and awaited: a barrier too. */
tr_status tr_comm_max_word(tr_comm *, uint64_t *, tr_err *);
/* The same of a number >= 0, of times for instance. */
tr_status tr_comm_max_number(tr_comm *, double *, tr_err *);
/* How it went everywhere: `mine`, or TR_E_COMM where it went well here and another member has failed. Nobody is left waiting for
 * one that gave up before; so all members call it, whatever theirs is. */
tr_status tr_comm_agree(tr_comm *, tr_status mine, tr_err *err);
/* The data of `ticket` is there for `reader` afterwards. Over MPI: TR_E_COMM or TR_E_MEMORY also where another communicator of
 * this process is broken, in which the members it waits for may wait themselves. */
tr_status tr_comm_wait(tr_comm *, tr_lane reader, tr_ticket, tr_err *);
/* The data of `ticket` is there for `reader` afterwards, but the buffer still belongs to the operation: it may be read, not
 * written, until tr_comm_wait. Of a broadcast that is before other members have it: the root returns at once, and whoever
 * hands it on when it has come, so that a member that is busy holds up nobody. Of everything else it is tr_comm_wait. */
tr_status tr_comm_wait_read(tr_comm *, tr_lane reader, tr_ticket, tr_err *);
/* Over MPI: of every communicator of the world, not of this one alone. */
void tr_comm_progress(tr_comm *);
/* Calls and bytes given by this member so far, per operation. */
void tr_comm_counts(const tr_comm *, tr_comm_op, uint64_t *calls, uint64_t *bytes);
/* Time spent in tr_comm_wait for operations of this kind: what was not hidden behind computation. */
uint64_t tr_comm_waited_ns(const tr_comm *, tr_comm_op);
/* Time between begin and end of operations of this kind, as far as it was noticed: MPI shows an end only to who looks. */
uint64_t tr_comm_flown_ns(const tr_comm *, tr_comm_op);
/* Of single operations of this kind; 0: there was none. */
uint64_t tr_comm_shortest_ns(const tr_comm *, tr_comm_op),
    tr_comm_max_number_ns(const tr_comm *, tr_comm_op);
/* Of one that has been waited for, and not long ago; 0: not known. */
uint64_t tr_comm_flight_ns(const tr_comm *, tr_ticket);
/* The device whose memory the communicator moves; NULL: the host's (the group of one moves what it is given). */
const tr_device *tr_comm_device(const tr_comm *);
/* A communicator of the same members for memory of the host: of a device's the one it was made from, else itself. */
tr_comm *tr_comm_host(tr_comm *);
/* How calls are meant from now on. RUN: as they are. RECORD: the device's main lane is being recorded, and what is begun goes
 * into the record; each operation is waited for before the record ends. NOTE: a record runs that has these calls already:
 * they are counted, and nothing is moved or waited for. Host memory knows RUN alone. */
typedef enum tr_comm_mode { TR_COMM_RUN, TR_COMM_RECORD, TR_COMM_NOTE } tr_comm_mode;
void tr_comm_set_mode(tr_comm *, tr_comm_mode);
/* From now on every call is a region of `regions` (kept; may be NULL): "moe/all_to_all", of kind COMM, and "moe/wait", of
 * kind WAIT; and bytes are counted by the member they are sent to. group: kind of group (mpi/grid.h). */
tr_status tr_comm_measure(tr_comm *, tr_regions *regions, int group, tr_err *);
/* Bytes sent to a member, as they went out: a sum or a gather may send more than was given. 0: not measured. */
uint64_t tr_comm_sent_to(const tr_comm *, int member);

/* ---- shares: context parallelism's exchange (parallel.md 3.4, 3.5) -------------------------------------------------
 *
 *     tr_share_plan    once per step: which rows each member writes
 *     tr_share_begin   per layer: before the writing kernel; *push is for it
 *     tr_share_sent    the writer was enqueued: a gather may begin
 *     tr_share_ready   the reader may go on, after `await`
 *
 * Over MPI there is no push: the kernel writes this member's rows into its own cache, sent packs them and begins the
 * gather, ready waits and puts the other members' rows into the cache where they belong. Over NCCL the device packs,
 * gathers and puts them in their places on the communicator's own stream, all begun by sent, and ready makes the reader's
 * lane wait; where the members reach each other's memory a kernel there puts the rows in their places, one by one. In the group of one there is nothing to do and no plan is needed. Rows of a step that all members compute themselves are in nobody's list. */

/* Where a row lies in storage made of pages of TR_PAGE_TOKENS rows: piece i of row `page*64 + offset` is the `bytes`
 * bytes at page * page_bytes + at + offset * bytes. */
enum { TR_RECORD_PIECES = 2 };
typedef struct tr_record {
    size_t page_bytes;
    int64_t n_rows; /* of the storage: pages * TR_PAGE_TOKENS */
    int n_pieces;
    struct {
        size_t at, bytes;
    } piece[TR_RECORD_PIECES];
} tr_record;

/* Of a cache as tr_kv_layer describes it: latent rows are one piece; an index page is keys, then their scales. */
tr_record tr_record_latent(const tr_kv_layer *);
tr_record tr_record_index(const tr_kv_layer *);

/* rows_max: of one step, those of all members together. The communicator is kept. */
tr_status tr_share_open_record(tr_share **, tr_comm *, const tr_record *, int rows_max, tr_err *);
/* Rows of row_bytes, one behind the other, in storage of any length. */
tr_status tr_share_open(tr_share **, tr_comm *, size_t row_bytes, int rows_max, tr_err *);
void tr_share_close(tr_share *);
/* All storage that rows will be begun in lies in these `bytes` of ops->alloc's memory, from its first byte: members whose GPUs
 * reach each other's memory then store their rows where they belong in the others', and NCCL has no part in it. To the bit the
 * same rows in the same places, which the others may find changed from their own `sent` on. Collective; without effect
 * where it cannot be, and over host memory. Memory of kind SYMMETRIC, zeros at first, as much on all members. Until close,
 * which comes before the memory is released. */
tr_status tr_share_reach(tr_share *, void *memory, size_t bytes, tr_err *);
/* That is so: exchanges then wait for none of another share, and the longest had best be sent first. */
bool tr_share_pushes(const tr_share *);

/* From now on every member keeps its rows: nothing travels and nothing is awaited, all else stays as it is. What a step takes less
 * then is what its exchanges expose (bench step --own-rows); what it computes is worth nothing. On all members or on none. */
void tr_share_keep(tr_share *);
/* n_rows[size]: rows each member writes (0 is good); write_row: their places page*64 + offset, member after member, -1:
 * a pad row that travels nowhere. The same on all members. Both are kept until the next plan, which must not come
 * between begin and ready. If no member writes anything the exchanges of this step send nothing. */
tr_status tr_share_plan(tr_share *, const int *n_rows, const int64_t *write_row, tr_err *);
/* dst: this rank's storage, of the layer that is being written. */
tr_status tr_share_begin(tr_share *, const tr_rows *, void *dst, tr_push *push, tr_err *);
tr_status tr_share_sent(tr_share *, tr_lane writer, tr_err *);
tr_status tr_share_ready(tr_share *, tr_lane reader, tr_await *await, tr_err *);
/* What the exchanges have cost so far: how long the rows were under way, as far as their arrival was noticed, how much of
 * that was waited for, bytes that this member gave, and exchanges in which anything travelled. Of device memory bytes and
 * calls alone: times are the communicator's (tr_comm_flown_ns, tr_comm_waited_ns of all_gather). */
typedef struct tr_share_cost {
    uint64_t flown_ns, waited_ns, bytes, calls;
} tr_share_cost;
tr_share_cost tr_share_costs(const tr_share *);

#endif
