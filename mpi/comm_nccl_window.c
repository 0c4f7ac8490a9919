#include <config.h>

#include "mpi/comm_nccl_window.h"

#include <stdlib.h>

#include "base/size.h"
#include "mpi/comm_nccl_priv.h"

struct tr_nccl_window {
    tr_nccl *nccl;
    tr_comm *comm; /* its own */
    void *memory;
    ncclWindow_t window;
};

static tr_status take(tr_nccl_window *w, size_t bytes, tr_err *err)
{
    tr_nccl *nccl = w->nccl;
    tr_status st = TR_OK;

    TR_CUDA(cudaSetDevice(nccl->ordinal));
    st = tr_nccl_status(nccl, NULL, "ncclMemAlloc", ncclMemAlloc(&w->memory, bytes), err);
    if (st != TR_OK) {
        w->memory = NULL;
        return st;
    }
    TR_CUDA(cudaMemset(w->memory, 0, bytes));

done:
    return st;
}

static ncclComm_t seat_of(const tr_nccl_window *w)
{
    return ((tr_comm_nccl *)(void *)w->comm)->seat.comm;
}

tr_status tr_nccl_window_open(tr_nccl_window **out, tr_comm *comm, size_t bytes, tr_err *err)
{
    tr_nccl *nccl = ((tr_comm_nccl *)(void *)comm)->nccl;
    tr_comm *host = tr_comm_host(comm);

    *out = NULL;
    tr_nccl_window *w = tr_calloc(1, sizeof *w);
    tr_status st = w ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
    if (w) {
        w->nccl = nccl;
        st = take(w, bytes, err);
    }
    /* The registration waits for all members: none begins it unless all do. */
    st = tr_comm_agree(host, st, err);
    if (st == TR_OK) st = tr_nccl_comm(&w->comm, nccl, host, TR_NCCL_BLOCKING, err);
    if (st != TR_OK) goto done;

    const ncclComm_t seat = seat_of(w);
    tr_nccl_enter(nccl);
    const ncclResult_t said =
        ncclCommWindowRegister(seat, w->memory, bytes, &w->window, NCCL_WIN_COLL_SYMMETRIC);
    tr_nccl_leave(nccl);
    st = tr_nccl_settle(nccl, seat, host, "ncclCommWindowRegister", said, 0, err);
    st = tr_comm_agree(host, st, err);
    if (st != TR_OK) goto done;
    *out = w;
    w = NULL;

done:
    tr_nccl_window_close(w);
    return st;
}

void *tr_nccl_window_memory(const tr_nccl_window *w)
{
    return w->memory;
}

tr_comm *tr_nccl_window_comm(const tr_nccl_window *w)
{
    return w->comm;
}

void tr_nccl_window_close(tr_nccl_window *w)
{
    if (!w) return;
    if (w->window) {
        tr_nccl_enter(w->nccl);
        const ncclResult_t said = ncclCommWindowDeregister(seat_of(w), w->window);
        tr_nccl_leave(w->nccl);
        tr_err none;
        (void)tr_nccl_settle(w->nccl, seat_of(w), tr_comm_host(w->comm), "ncclCommWindowDeregister",
                             said, 0, &none);
    }
    tr_comm_free(w->comm);
    if (w->memory) (void)ncclMemFree(w->memory);
    free(w);
}
