/* What an implementation of tr_comm provides; included by the implementations (mpi/comm*.c, the tests' loop-back) only. */
#ifndef TR_MPI_COMM_PRIV_H
#define TR_MPI_COMM_PRIV_H

#include <stdbool.h>

#include "mpi/comm.h"

enum { TR_COMM_FLIGHTS = 32 };

struct tr_comm {
    const struct tr_comm_impl *impl;
    int rank, size;
    char name[16];
    /* Of device memory: what it belongs to, and how the host's memory goes between the same members; NULL: host memory. */
    tr_device *device;
    const tr_ops *ops;
    tr_comm *host;
    bool sums_bf16;
    tr_comm_mode mode;
    uint64_t next_ticket;
    uint64_t calls[TR_COMM_N_OPS], bytes[TR_COMM_N_OPS];
    uint64_t waited_ns[TR_COMM_N_OPS]; /* by the implementation's wait */
    uint64_t flown_ns[TR_COMM_N_OPS];  /* by the implementation, from begin to end: tr_comm_flew */
    uint64_t shortest_ns[TR_COMM_N_OPS], longest_ns[TR_COMM_N_OPS];
    struct {
        uint64_t ticket, ns;
    } flight[TR_COMM_FLIGHTS]; /* the newest that ended, by ticket */
    /* tr_comm_measure: */
    tr_regions *regions; /* NULL: none */
    int region_op[TR_COMM_N_OPS], region_wait;
    size_t region_bytes; /* of the operation that is being begun */
    uint64_t *sent;      /* [size] bytes given to each member, NULL: not counted */
};

/* For implementations: an operation has ended that took ns. */
static inline void tr_comm_flew(tr_comm *c, tr_comm_op op, uint64_t ticket, uint64_t ns)
{
    c->flight[ticket % TR_COMM_FLIGHTS].ticket = ticket;
    c->flight[ticket % TR_COMM_FLIGHTS].ns = ns;
    c->flown_ns[op] += ns;
    if (!c->shortest_ns[op] || ns < c->shortest_ns[op]) c->shortest_ns[op] = ns;
    if (ns > c->longest_ns[op]) c->longest_ns[op] = ns;
}

/* For implementations: bytes on their way to another member. */
static inline void tr_comm_gave(tr_comm *c, int member, size_t bytes)
{
    if (c->sent) c->sent[member] += bytes;
}

/* An exchange of cache rows (tr_share) as one operation on a device: the rows in list [first of this member, + its number) are
 * packed, gathered and, those of the others, put into the cache. Counts as an all_gather. */
typedef struct tr_share_move {
    const tr_record *record;
    size_t row_bytes;
    char *cache;
    char *packed; /* [all rows][row_bytes] device memory */
    const int64_t
        *list; /* [all rows] device memory: cache rows, member after member, no pad rows */
    const size_t *bytes; /* [size] what each member gives: its rows * row_bytes */
} tr_share_move;

/* Same arguments as the public functions; the public ones count, check the arguments and hand on. */
typedef struct tr_comm_impl {
    tr_status (*all_reduce)(tr_comm *, void *, size_t, tr_dtype, tr_ticket *, tr_err *);
    bool (*fuses)(const tr_comm *, int, int); /* NULL: never */
    tr_status (*reduce_norm)(tr_comm *, const struct tr_norm_args *, tr_ticket *, tr_err *);
    tr_status (*all_gather)(tr_comm *, const void *, void *, const size_t *, tr_ticket *, tr_err *);
    tr_status (*reduce_scatter)(tr_comm *, const void *, void *, size_t, tr_dtype, tr_ticket *,
                                tr_err *);
    tr_status (*all_to_all)(tr_comm *, const void *, const size_t *, void *, const size_t *,
                            tr_ticket *, tr_err *);
    tr_status (*send)(tr_comm *, int, const void *, size_t, tr_ticket *, tr_err *);
    tr_status (*recv)(tr_comm *, int, void *, size_t, tr_ticket *, tr_err *);
    tr_status (*broadcast)(tr_comm *, int, void *, size_t, tr_ticket *, tr_err *);
    tr_status (*all_max)(tr_comm *, uint64_t *, size_t, tr_ticket *, tr_err *);
    tr_status (*wait)(tr_comm *, tr_lane, tr_ticket, tr_err *);
    tr_status (*wait_read)(tr_comm *, tr_lane, tr_ticket, tr_err *); /* NULL: as wait */
    tr_status (*share)(tr_comm *, const tr_share_move *, tr_ticket *,
                       tr_err *); /* of device memory only */
    /* of device memory only; NULL: nothing is reached */
    tr_status (*reach)(tr_comm *, void *, size_t, tr_err *);
    bool (*reaches)(const tr_comm *, const void *);
    void (*leave_alone)(tr_comm *, const void *);
    void (*progress)(tr_comm *);
    void (*free)(tr_comm *);
} tr_comm_impl;

/* comm.c, for share.c: begin an exchange of device memory. */
tr_status tr_comm_share(tr_comm *, const tr_share_move *, tr_ticket *, tr_err *);
/* Bytes of n numbers that this communicator can add; false: it cannot, or they do not fit. */
bool tr_comm_sum_bytes(const tr_comm *, size_t *bytes, size_t n, tr_dtype);

#endif
