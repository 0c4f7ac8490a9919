#include <config.h>

#include "mpi/yardstick.h"

#include <limits.h>
#include <stdlib.h>

#include "mpi/mpi_priv.h"

struct tr_yardstick {
    MPI_Comm comm;
    int rank, size;
};

tr_status tr_yardstick_open(tr_yardstick **out, const tr_world *world, int color, tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Comm comm = MPI_COMM_NULL;
    tr_yardstick *y = NULL;

    *out = NULL;
    TR_MPI(MPI_Comm_split(MPI_COMM_WORLD, color < 0 ? MPI_UNDEFINED : color, world->rank, &comm));
    if (comm == MPI_COMM_NULL) goto done;
    y = calloc(1, sizeof *y);
    if (!y) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    TR_MPI(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN));
    TR_MPI(MPI_Comm_rank(comm, &y->rank));
    TR_MPI(MPI_Comm_size(comm, &y->size));
    y->comm = comm;
    *out = y;
    y = NULL;
    comm = MPI_COMM_NULL;

done:
    if (comm != MPI_COMM_NULL) MPI_Comm_free(&comm);
    free(y);
    return st;
}

void tr_yardstick_close(tr_yardstick *y)
{
    if (!y) return;
    MPI_Comm_free(&y->comm);
    free(y);
}

tr_status tr_yardstick_barrier(tr_yardstick *y, tr_err *err)
{
    tr_status st = TR_OK;

    TR_MPI(MPI_Barrier(y->comm));

done:
    return st;
}

static tr_status ping_pong(tr_yardstick *y, const void *send, void *recv, int n, tr_err *err)
{
    tr_status st = TR_OK;

    if (y->rank == 0) {
        TR_MPI(MPI_Send(send, n, MPI_BYTE, 1, 0, y->comm));
        TR_MPI(MPI_Recv(recv, n, MPI_BYTE, 1, 0, y->comm, MPI_STATUS_IGNORE));
    } else if (y->rank == 1) {
        TR_MPI(MPI_Recv(recv, n, MPI_BYTE, 0, 0, y->comm, MPI_STATUS_IGNORE));
        TR_MPI(MPI_Send(send, n, MPI_BYTE, 0, 0, y->comm));
    }

done:
    return st;
}

tr_status tr_yardstick_run(tr_yardstick *y, tr_comm_op op, const void *send, void *recv,
                           size_t bytes, tr_err *err)
{
    tr_status st = TR_OK;
    const int n = (int)bytes, floats = n / 4, each = n / y->size;

    if (bytes > INT_MAX) return tr_fail(err, TR_E_USAGE, "%zu bytes: MPI counts in int", bytes);
    switch (op) {
    case TR_COMM_ALL_REDUCE:
        TR_MPI(MPI_Allreduce(MPI_IN_PLACE, recv, floats, MPI_FLOAT, MPI_SUM, y->comm));
        break;
    case TR_COMM_ALL_MAX:
        TR_MPI(MPI_Allreduce(MPI_IN_PLACE, recv, n / 8, MPI_UINT64_T, MPI_MAX, y->comm));
        break;
    case TR_COMM_ALL_GATHER:
        TR_MPI(MPI_Allgather(send, n, MPI_BYTE, recv, n, MPI_BYTE, y->comm));
        break;
    case TR_COMM_REDUCE_SCATTER:
        TR_MPI(MPI_Reduce_scatter_block(send, recv, floats / y->size, MPI_FLOAT, MPI_SUM, y->comm));
        break;
    case TR_COMM_ALL_TO_ALL:
        TR_MPI(MPI_Alltoall(send, each, MPI_BYTE, recv, each, MPI_BYTE, y->comm));
        break;
    case TR_COMM_BROADCAST:
        TR_MPI(MPI_Bcast(recv, n, MPI_BYTE, 0, y->comm));
        break;
    default:
        st = ping_pong(y, send, recv, n, err);
    }

done:
    return st;
}
