/* A communicator of N ranks in one process, one thread per rank: stands in for MPI in tests. Nothing is delivered before
 * wait, so a missing wait shows; send buffers may not change before it; sums run in rank order; a call that does not match
 * the other members' is TR_E_COMM for all of them, and so is waiting more than 10 s. */
#ifndef TR_TESTS_LOOPBACK_H
#define TR_TESTS_LOOPBACK_H

#include "mpi/comm.h"

typedef struct tr_loopback tr_loopback;

tr_loopback *tr_loopback_create(int size); /* NULL: out of memory */
/* The communicator of one rank, once each; tr_comm_free. NULL: out of memory. */
tr_comm *tr_loopback_comm(tr_loopback *l, int rank);
/* After all of its communicators. */
void tr_loopback_free(tr_loopback *l);

#endif
