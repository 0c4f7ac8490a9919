/* Memory that NCCL knows at every member of a communicator (a symmetric window, parallel.md 5.4): operations between two places of
 * it take NCCL's kernels over peer memory. `trireme bench comm` compares our own way of moving rows with it; the model does not
 * use it. Main thread only. */
#ifndef TR_MPI_COMM_NCCL_WINDOW_H
#define TR_MPI_COMM_NCCL_WINDOW_H

#include "mpi/comm_nccl.h"

typedef struct tr_nccl_window tr_nccl_window;

/* `bytes` of the GPU's memory, zeros, and a communicator of its own for the members of tr_nccl_comm's `comm` (whose calls do not
 * block, which windows do not bear). Collective over them: all succeed or none does. Where the members' GPUs do not reach each
 * other NCCL takes the memory all the same and moves it as any other. */
tr_status tr_nccl_window_open(tr_nccl_window **out, tr_comm *comm, size_t bytes, tr_err *err);
void *tr_nccl_window_memory(const tr_nccl_window *w);
tr_comm *tr_nccl_window_comm(const tr_nccl_window *w); /* the window's */
/* On all members, with nothing of it under way, before `comm`. NULL: nothing. */
void tr_nccl_window_close(tr_nccl_window *w);

#endif
