/* What `trireme bench comm --device cuda` compares the communicators with: NCCL's own call for the same thing, on a
 * communicator and a stream of its own. Main thread only. */
#ifndef TR_MPI_YARDSTICK_NCCL_H
#define TR_MPI_YARDSTICK_NCCL_H

#include "mpi/comm_nccl.h"

typedef struct tr_nccl_yardstick tr_nccl_yardstick;

/* The members of host, kept. Collective over them: all succeed or none does. */
tr_status tr_nccl_yardstick_open(tr_nccl_yardstick **out, tr_nccl *nccl, tr_comm *host,
                                 tr_err *err);
void tr_nccl_yardstick_close(tr_nccl_yardstick *y); /* NULL: nothing */

/* One call that moves what tr_comm's operation of this name moves, as tr_yardstick_run says (yardstick.h), in device memory;
 * returns when the device has done it. */
tr_status tr_nccl_yardstick_run(tr_nccl_yardstick *y, tr_comm_op op, const void *send, void *recv,
                                size_t bytes, tr_err *err);

#endif
