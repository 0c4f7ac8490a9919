/* What `trireme bench comm` compares the communicators with: the library's own blocking call for the same thing, on the same
 * ranks. Main thread only. */
#ifndef TR_MPI_YARDSTICK_H
#define TR_MPI_YARDSTICK_H

#include "mpi/comm.h"
#include "mpi/start.h"

typedef struct tr_yardstick tr_yardstick;

/* Members as of tr_comm_split; *out NULL where color < 0. Collective over the world. */
tr_status tr_yardstick_open(tr_yardstick **out, const tr_world *world, int color, tr_err *err);
void tr_yardstick_close(tr_yardstick *y);

tr_status tr_yardstick_barrier(tr_yardstick *y, tr_err *err);
/* One call that moves what tr_comm's operation of this name moves: `bytes` is what one member gives, all of it, and must be
 * a multiple of size * 8 for reductions and exchanges. send and recv: member 0 to member 1 and back, the others do nothing.
 * all_reduce and all_max: in place in recv. */
tr_status tr_yardstick_run(tr_yardstick *y, tr_comm_op op, const void *send, void *recv,
                           size_t bytes, tr_err *err);

#endif
