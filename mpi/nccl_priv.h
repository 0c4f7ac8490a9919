/* Inside of the NCCL communicators (nccl.c, comm_nccl.c, yardstick_nccl.c): the process's NCCL, and how its answers become a
 * status (style.md 3). */
#ifndef TR_MPI_NCCL_PRIV_H
#define TR_MPI_NCCL_PRIV_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include "mpi/comm_nccl.h"

typedef struct tr_nccl_seat { /* one of NCCL's communicators, for the watchdog; under the lock */
    struct tr_nccl_seat *next;
    ncclComm_t comm;
    char name[16];
} tr_nccl_seat;

struct tr_nccl {
    tr_world *world;
    tr_device *device;
    const tr_ops *ops;
    int ordinal;
    tr_world_guard guard;
    pthread_mutex_t lock; /* every call that takes a communicator */
    atomic_bool aborted;  /* the watchdog has aborted, or is about to: no call any more */
    tr_nccl_seat *seats;
    /* What our own kernels look at while they wait (comm_nccl_peer.h): host-mapped, and as the device addresses it; NULL: there
     * are no peer windows. */
    volatile uint32_t *abort_h;
    uint32_t *abort_d;
};

/* Around NCCL's calls. enter does not return once the communicators have been aborted: the process is being ended, and what
 * the device has made since is not to be used. */
void tr_nccl_enter(tr_nccl *nccl);
void tr_nccl_leave(tr_nccl *nccl);
/* The same check alone. */
void tr_nccl_stay(const tr_nccl *nccl);

/* TR_OK, or TR_E_COMM "call: NCCL's words" (comm NULL: none yet). Not between enter and leave. */
tr_status tr_nccl_status(tr_nccl *nccl, ncclComm_t comm, const char *call, ncclResult_t said,
                         tr_err *err);
/* Until NCCL is through with what said ncclInProgress; MPI goes on (host). seconds 0: as long as it takes, the watchdog has
 * its own opinion of that. */
tr_status tr_nccl_settle(tr_nccl *nccl, ncclComm_t comm, tr_comm *host, const char *call,
                         ncclResult_t said, double seconds, tr_err *err);
/* TR_OK or TR_E_DEVICE "call: CUDA's words". */
tr_status tr_nccl_cuda(const char *call, cudaError_t said, tr_err *err);

/* One of NCCL's communicators for the members of host, seated. Collective over them; `mine`: how this member's preparations
 * went (TR_OK or err->status): all succeed or none does. blocking: of NCCL's calls on it (TR_NCCL_BLOCKING). */
tr_status tr_nccl_connect(tr_nccl_seat *seat, tr_nccl *nccl, tr_comm *host, const char *name,
                          bool blocking, tr_status mine, tr_err *err);
/* In an orderly way where `well`, with a limit; else, or when that has passed, aborted. Never seated: nothing. */
void tr_nccl_disconnect(tr_nccl_seat *seat, tr_nccl *nccl, tr_comm *host, bool well);

/* Set st and leave. */
#define TR_CUDA(call)                                                                              \
    do {                                                                                           \
        st = tr_nccl_cuda(#call, (call), err);                                                     \
        if (st != TR_OK) goto done;                                                                \
    } while (0)

#endif
