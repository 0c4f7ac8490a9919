/* Rows that every member writes a part of and every member reads whole (context parallelism). So far groups have one
 * member: the writer's rows are the reader's, nobody is pushed to and nothing is awaited. */
#include <config.h>

#include <stdlib.h>

#include "base/size.h"
#include "mpi/comm.h"

/* One exchange after the other: begin, sent, ready. */
typedef enum phase { IDLE, BEGUN, SENT } phase;

struct tr_share {
    tr_comm *comm; /* kept */
    int rows_max;
    phase phase;
};

tr_status tr_share_open(tr_share **out, tr_comm *comm, size_t row_bytes, int rows_max, tr_err *err)
{
    size_t bytes;

    *out = NULL;
    if (!row_bytes || rows_max < 1 || !tr_mul(&bytes, row_bytes, (size_t)rows_max))
        return tr_fail(err, TR_E_COMM, "share: %d rows of %zu bytes", rows_max, row_bytes);
    if (tr_comm_size(comm) > 1)
        return tr_fail(err, TR_E_USAGE, "context parallelism over %d ranks is not built yet",
                       tr_comm_size(comm));
    tr_share *s = calloc(1, sizeof *s);
    if (!s) return tr_fail(err, TR_E_MEMORY, "out of memory");
    s->comm = comm;
    s->rows_max = rows_max;
    *out = s;
    return TR_OK;
}

void tr_share_close(tr_share *s)
{
    free(s);
}

tr_status tr_share_begin(tr_share *s, const tr_rows *rows, void *dst, tr_push *push, tr_err *err)
{
    if (s->phase != IDLE) return tr_fail(err, TR_E_COMM, "share: begun twice");
    if (rows->n_max > s->rows_max)
        return tr_fail(err, TR_E_COMM, "share: a step of %d rows, made for %d", rows->n_max,
                       s->rows_max);
    (void)dst; /* where peers would write: there are none */
    *push = (tr_push){.n_peers = 0};
    s->phase = BEGUN;
    return TR_OK;
}

tr_status tr_share_sent(tr_share *s, tr_lane writer, tr_err *err)
{
    (void)writer;
    if (s->phase != BEGUN) return tr_fail(err, TR_E_COMM, "share: sent before it was begun");
    s->phase = SENT;
    return TR_OK;
}

tr_status tr_share_ready(tr_share *s, tr_lane reader, tr_await *await, tr_err *err)
{
    (void)reader;
    if (s->phase != SENT) return tr_fail(err, TR_E_COMM, "share: ready before it was sent");
    *await = (tr_await){.n = 0};
    s->phase = IDLE;
    return TR_OK;
}
