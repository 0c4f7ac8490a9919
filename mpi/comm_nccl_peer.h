/* Peer windows: memory of every member of a communicator's group, mapped into every member's process (CUDA IPC), for kernels
 * that store to other GPUs and wait for what these store here. Built with --with-nccl; used by mpi/comm_nccl*.c alone.
 *
 * A group has a window if its members are of one host and every GPU reaches every other's memory; otherwise none of them has,
 * and NCCL moves everything. What the window is for:
 *
 *     tr_peers_open    once per group: an arena for flags, slots and counters, the same offsets on all members
 *     tr_peers_take    a piece of the arena
 *     tr_peers_map     memory that is there already (a cache, of ops->alloc), to be stored to where it lies
 *
 * How kernels use it (kernels.md 5). Stores go to at[peer], loads and waits to at[rank] alone. Data either carry their own flag
 * or are followed by one, raised with release at system scope. What flags are compared with is an epoch: a word of this
 * member's device memory that a kernel advances on every run, so that a recorded graph can be run again; never an argument.
 * A kernel that waits looks at the abort word now and then and leaves when it is not 0; what it leaves behind is not to be
 * used (tr_nccl_stay). It stores whatever the others may wait for before it waits itself, and its blocks fit the device all at
 * once or take rows in ascending order: so members that enqueue the same kernels in the same order cannot block each other,
 * whatever else runs on the device. Kernels are loaded before the first of them waits.
 *
 * Main thread, but for the abort word, which the watchdog's thread sets. */
#ifndef TR_MPI_COMM_NCCL_PEER_H
#define TR_MPI_COMM_NCCL_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"
#include "mpi/comm_nccl.h"

typedef struct tr_peers tr_peers;

/* One piece of memory of each member, as this process addresses it; at[rank] is this member's own. tr_push.peer_offset of
 * member i is at[i] - at[rank]. */
typedef struct tr_peer_place {
    char *at[TR_MAX_PEERS];
} tr_peer_place;

/* Collective over the members of host (2 .. TR_MAX_PEERS of them, else there is no window). The arena holds arena_bytes, all
 * bits of it as `fill` says. *out NULL and TR_OK: no window, and `why` says why in one line, the same on all members. */
tr_status tr_peers_open(tr_peers **out, tr_nccl *nccl, tr_comm *host, size_t arena_bytes,
                        unsigned char fill, char *why, size_t n_why, tr_err *err);
/* Not collective. quiet: this member's device has ended all that waits for others, so nobody stores here any more; else its
 * memory stays until the process ends. NULL: nothing. */
void tr_peers_close(tr_peers *peers, bool quiet);

int tr_peers_rank(const tr_peers *), tr_peers_size(const tr_peers *);

/* `bytes` of the arena, 256 aligned. Not collective, but all members take the same in the same order. TR_E_MEMORY: it is used up. */
tr_status tr_peers_take(tr_peers *peers, size_t bytes, tr_peer_place *out, tr_err *err);

/* Memory that ops->alloc gave on each member, from its first byte. Collective. TR_E_COMM, on all members, where it cannot be
 * mapped. The mapping lasts until close; the memory is released after that. */
tr_status tr_peers_map(tr_peers *peers, void *memory, tr_peer_place *out, tr_err *err);

/* The device's address of the abort word: 0, and something else once the watchdog ends the job. One a process. */
const volatile uint32_t *tr_peers_abort(const tr_peers *peers);

#endif
