#include <config.h>

#include "mpi/yardstick_nccl.h"

#include <stdlib.h>

#include "mpi/nccl_priv.h"

struct tr_nccl_yardstick {
    tr_nccl *nccl;
    tr_comm *host;
    tr_nccl_seat seat;
    cudaStream_t stream;
    int rank, size;
};

tr_status tr_nccl_yardstick_open(tr_nccl_yardstick **out, tr_nccl *nccl, tr_comm *host, tr_err *err)
{
    tr_status st = TR_OK;

    *out = NULL;
    tr_nccl_yardstick *y = calloc(1, sizeof *y);
    if (!y) return tr_fail(err, TR_E_MEMORY, "out of memory"); /* the others' limit ends it */
    y->nccl = nccl;
    y->host = host;
    y->rank = tr_comm_rank(host);
    y->size = tr_comm_size(host);
    TR_CUDA(cudaSetDevice(nccl->ordinal));
    TR_CUDA(cudaStreamCreateWithFlags(&y->stream, cudaStreamNonBlocking));

done:
    st = tr_nccl_connect(&y->seat, nccl, host, "plain", false, st, err);
    if (st == TR_OK)
        *out = y;
    else
        tr_nccl_yardstick_close(y);
    return st;
}

void tr_nccl_yardstick_close(tr_nccl_yardstick *y)
{
    if (!y) return;
    tr_nccl_disconnect(&y->seat, y->nccl, y->host, true);
    if (y->stream) cudaStreamDestroy(y->stream);
    free(y);
}

/* Member 0 to member 1 (turn 0), or back. */
static ncclResult_t letter(const tr_nccl_yardstick *y, int turn, const void *send, void *recv,
                           size_t bytes)
{
    return turn == y->rank ? ncclSend(send, bytes, ncclUint8, 1 - y->rank, y->seat.comm, y->stream)
                           : ncclRecv(recv, bytes, ncclUint8, 1 - y->rank, y->seat.comm, y->stream);
}

static ncclResult_t all_to_all(const tr_nccl_yardstick *y, const char *send, char *recv,
                               size_t bytes)
{
    const size_t each = bytes / (size_t)y->size;
    ncclResult_t r = ncclGroupStart();

    for (int i = 0; i < y->size && r == ncclSuccess; i++) {
        r = ncclSend(send + (size_t)i * each, each, ncclUint8, i, y->seat.comm, y->stream);
        if (r == ncclSuccess)
            r = ncclRecv(recv + (size_t)i * each, each, ncclUint8, i, y->seat.comm, y->stream);
    }
    const ncclResult_t end = ncclGroupEnd();
    return r == ncclSuccess ? end : r;
}

static ncclResult_t start(const tr_nccl_yardstick *y, tr_comm_op op, const void *send, void *recv,
                          size_t bytes, int turn)
{
    const ncclComm_t comm = y->seat.comm;

    switch (op) {
    case TR_COMM_ALL_REDUCE:
        return ncclAllReduce(recv, recv, bytes / 4, ncclFloat32, ncclSum, comm, y->stream);
    case TR_COMM_ALL_MAX:
        return ncclAllReduce(recv, recv, bytes / 8, ncclUint64, ncclMax, comm, y->stream);
    case TR_COMM_REDUCE_SCATTER:
        return ncclReduceScatter(send, recv, bytes / 4 / (size_t)y->size, ncclFloat32, ncclSum,
                                 comm, y->stream);
    case TR_COMM_ALL_GATHER:
        return ncclAllGather(send, recv, bytes, ncclUint8, comm, y->stream);
    case TR_COMM_BROADCAST:
        return ncclBroadcast(recv, recv, bytes, ncclUint8, 0, comm, y->stream);
    case TR_COMM_ALL_TO_ALL:
        return all_to_all(y, send, recv, bytes);
    default:
        return letter(y, turn, send, recv, bytes);
    }
}

tr_status tr_nccl_yardstick_run(tr_nccl_yardstick *y, tr_comm_op op, const void *send, void *recv,
                                size_t bytes, tr_err *err)
{
    const int turns = op == TR_COMM_SEND ? 2 : 1;
    tr_status st = TR_OK;

    if (op == TR_COMM_SEND && y->rank > 1) return TR_OK;
    for (int turn = 0; turn < turns && st == TR_OK; turn++) {
        tr_nccl_enter(y->nccl);
        const ncclResult_t said = start(y, op, send, recv, bytes, turn);
        tr_nccl_leave(y->nccl);
        st = tr_nccl_settle(y->nccl, y->seat.comm, y->host, tr_comm_op_name(op), said, 0, err);
    }
    while (st == TR_OK) {
        const cudaError_t e = cudaStreamQuery(y->stream);
        if (e == cudaSuccess) break;
        if (e != cudaErrorNotReady) st = tr_nccl_cuda("plain NCCL", e, err);
        (void)cudaGetLastError();
    }
    return st;
}
