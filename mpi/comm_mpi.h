/* Communicators over MPI. Made at start-up from the numbers of mpi/grid; all functions on the main thread only.
 *
 * Collectives are made of point-to-point messages, so that sums run in rank order and every operation can be advanced a
 * little at a time. Messages of any length: what MPI's int cannot count goes in pieces. */
#ifndef TR_MPI_COMM_MPI_H
#define TR_MPI_COMM_MPI_H

#include "mpi/comm.h"
#include "mpi/start.h"

/* The group of all ranks that give the same colour, in order of key, then rank. Collective over the world, in the same
 * order on every rank. colour < 0: this rank is in none, *out is NULL and the status TR_OK. A group of one becomes
 * tr_comm_self(). name: for messages and the profile, at most 15 characters. The world is kept: it must neither move
 * nor end before tr_comm_free. Operations that may be in flight together with those of another lane want a communicator
 * of their own: split again. tr_comm_free is not collective; what is in flight is given up. */
tr_status tr_comm_split(tr_comm **out, tr_world *world, int color, int key, const char *name,
                        tr_err *err);

#endif
