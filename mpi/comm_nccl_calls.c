/* What operations over NCCL are made of. Everything here is enqueued on the communicator's stream, in the same order on every
 * member. */
#include <config.h>

#include "mpi/comm_nccl_priv.h"

#include "base/size.h"
#include "kernels/cuda/comm.h"

enum { DIRECT_MAX = 256 << 10 }; /* bytes: a sum of terms up to here takes one round */

/* ---- NCCL's calls -------------------------------------------------------------------------------------------------- */

static tr_status settle(tr_comm_nccl *c, const char *call, ncclResult_t said, tr_err *err)
{
    return tr_nccl_settle(c->nccl, c->seat.comm, c->base.host, call, said, 0, err);
}

static ncclDataType_t type_of(tr_dtype dtype)
{
    return dtype == TR_BF16 ? ncclBfloat16 : ncclFloat32;
}

tr_status tr_nccl_issue_sum_two(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    tr_nccl_enter(c->nccl);
    const ncclResult_t said = k->op == TR_COMM_ALL_REDUCE
                                  ? ncclAllReduce(k->send, k->recv, k->n, type_of(k->dtype),
                                                  ncclSum, c->seat.comm, c->stream)
                                  : ncclReduceScatter(k->send, k->recv, k->n, type_of(k->dtype),
                                                      ncclSum, c->seat.comm, c->stream);
    tr_nccl_leave(c->nccl);
    return settle(c, k->op == TR_COMM_ALL_REDUCE ? "ncclAllReduce" : "ncclReduceScatter", said,
                  err);
}

tr_status tr_nccl_issue_max(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    tr_nccl_enter(c->nccl);
    const ncclResult_t said =
        ncclAllReduce(k->send, k->recv, k->n, ncclUint64, ncclMax, c->seat.comm, c->stream);
    tr_nccl_leave(c->nccl);
    return settle(c, "ncclAllReduce", said, err);
}

tr_status tr_nccl_issue_broadcast(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    tr_nccl_enter(c->nccl);
    const ncclResult_t said =
        ncclBroadcast(k->recv, k->recv, k->n, ncclUint8, k->peer, c->seat.comm, c->stream);
    tr_nccl_leave(c->nccl);
    return settle(c, "ncclBroadcast", said, err);
}

tr_status tr_nccl_issue_letter(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const bool sends = k->op == TR_COMM_SEND;

    tr_nccl_enter(c->nccl);
    const ncclResult_t said =
        sends ? ncclSend(k->send, k->n, ncclUint8, k->peer, c->seat.comm, c->stream)
              : ncclRecv(k->recv, k->n, ncclUint8, k->peer, c->seat.comm, c->stream);
    tr_nccl_leave(c->nccl);
    return settle(c, sends ? "ncclSend" : "ncclRecv", said, err);
}

/* ---- groups of sends and receives ----------------------------------------------------------------------------------- */

/* Between group_begin and group_end: NCCL's first refusal stays. */
static void group_begin(tr_comm_nccl *c, ncclResult_t *said)
{
    tr_nccl_enter(c->nccl);
    *said = ncclGroupStart();
}

static void group_send(tr_comm_nccl *c, int to, const void *p, size_t bytes, ncclResult_t *said)
{
    if (!bytes || to == c->base.rank || (*said != ncclSuccess && *said != ncclInProgress)) return;
    *said = ncclSend(p, bytes, ncclUint8, to, c->seat.comm, c->stream);
}

static void group_recv(tr_comm_nccl *c, int from, void *p, size_t bytes, ncclResult_t *said)
{
    if (!bytes || from == c->base.rank || (*said != ncclSuccess && *said != ncclInProgress)) return;
    *said = ncclRecv(p, bytes, ncclUint8, from, c->seat.comm, c->stream);
}

static tr_status group_end(tr_comm_nccl *c, ncclResult_t said, tr_err *err)
{
    const ncclResult_t end = ncclGroupEnd();

    tr_nccl_leave(c->nccl);
    if (said == ncclSuccess || said == ncclInProgress) said = end;
    return settle(c, "ncclGroupEnd", said, err);
}

static tr_status copy(tr_comm_nccl *c, void *to, const void *from, size_t bytes, tr_err *err)
{
    if (!bytes || to == from) return TR_OK;
    return tr_nccl_cuda("cudaMemcpyAsync",
                        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, c->stream), err);
}

/* Rows from everybody to everybody; the gather, which gives all the same, has no n_send. */
static tr_status exchange(tr_comm_nccl *c, const void *send, const size_t *n_send, void *recv,
                          const size_t *n_recv, tr_err *err)
{
    const char *from = send;
    char *to = recv;
    const int me = c->base.rank, size = c->base.size;
    ncclResult_t said;

    tr_status st = copy(c, to + tr_nccl_sum(n_recv, me),
                        from + (n_send ? tr_nccl_sum(n_send, me) : 0), n_recv[me], err);
    if (st != TR_OK) return st;
    group_begin(c, &said);
    for (int d = 1; d < size; d++) {
        const int i = (me + d) % size, j = (me + size - d) % size;
        group_send(c, i, from + (n_send ? tr_nccl_sum(n_send, i) : 0),
                   n_send ? n_send[i] : n_recv[me], &said);
        group_recv(c, j, to + tr_nccl_sum(n_recv, j), n_recv[j], &said);
    }
    return group_end(c, said, err);
}

static bool all_equal(const size_t *n, int count)
{
    for (int i = 1; i < count; i++)
        if (n[i] != n[0]) return false;
    return true;
}

static tr_status gather(tr_comm_nccl *c, const void *send, void *recv, const size_t *bytes,
                        tr_err *err)
{
    if (!all_equal(bytes, c->base.size)) return exchange(c, send, NULL, recv, bytes, err);
    tr_nccl_enter(c->nccl);
    const ncclResult_t said =
        ncclAllGather(send, recv, bytes[0], ncclUint8, c->seat.comm, c->stream);
    tr_nccl_leave(c->nccl);
    return settle(c, "ncclAllGather", said, err);
}

tr_status tr_nccl_issue_gather(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    return gather(c, k->send, k->recv, k->n_recv, err);
}

tr_status tr_nccl_issue_exchange(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    return exchange(c, k->send, k->n_send, k->recv, k->n_recv, err);
}

/* ---- sums of terms --------------------------------------------------------------------------------------------------- */

/* Which of the elements [at, at + width) member i adds up. */
typedef struct part {
    size_t at, n;
} part;

static part part_of(const tr_comm_nccl *c, size_t at, size_t width, int i)
{
    const size_t each = tr_ceil_div(width, (size_t)c->base.size), before = (size_t)i * each;

    if (before >= width) return (part){at + width, 0};
    return (part){at + before, width - before < each ? width - before : each};
}

/* Where the n terms of another member go. */
static char *slot(const tr_comm_nccl *c, int i, size_t bytes)
{
    return (char *)c->terms + (size_t)(i < c->base.rank ? i : i - 1) * bytes;
}

static tr_status add_up(tr_comm_nccl *c, const void *own, void *out, size_t n, tr_dtype dtype,
                        tr_err *err)
{
    const tr_cuda_sum_args a = {.own = own,
                                .terms = c->terms,
                                .out = out,
                                .n = n,
                                .n_members = c->base.size,
                                .rank = c->base.rank,
                                .dtype = dtype};
    return tr_nccl_cuda("sum_terms", tr_cuda_sum_terms(&a, c->stream), err);
}

/* Few: everybody gets all terms and makes the same sum. */
static tr_status sum_direct(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const size_t bytes = k->n * tr_nccl_number_bytes(k->dtype);
    ncclResult_t said;

    group_begin(c, &said);
    for (int i = 0; i < c->base.size; i++) {
        if (i == c->base.rank) continue;
        group_send(c, i, k->send, bytes, &said);
        group_recv(c, i, slot(c, i, bytes), bytes, &said);
    }
    tr_status st = group_end(c, said, err);
    return st == TR_OK ? add_up(c, k->send, k->recv, k->n, k->dtype, err) : st;
}

/* Each member adds up a part of a window and tells the others. */
static tr_status sum_window(tr_comm_nccl *c, const tr_nccl_call *k, size_t at, size_t width,
                            tr_err *err)
{
    const size_t size = tr_nccl_number_bytes(k->dtype);
    const part mine = part_of(c, at, width, c->base.rank);
    char *buf = k->recv;
    ncclResult_t said;

    group_begin(c, &said);
    for (int i = 0; i < c->base.size; i++) {
        const part p = part_of(c, at, width, i);
        if (i == c->base.rank) continue;
        group_send(c, i, buf + p.at * size, p.n * size, &said);
        group_recv(c, i, slot(c, i, mine.n * size), mine.n * size, &said);
    }
    tr_status st = group_end(c, said, err);
    char *own = buf + mine.at * size;
    if (st == TR_OK) st = add_up(c, own, own, mine.n, k->dtype, err);
    if (st != TR_OK) return st;
    group_begin(c, &said);
    for (int i = 0; i < c->base.size; i++) {
        const part p = part_of(c, at, width, i);
        if (i == c->base.rank) continue;
        group_send(c, i, own, mine.n * size, &said);
        group_recv(c, i, buf + p.at * size, p.n * size, &said);
    }
    return group_end(c, said, err);
}

/* Elements whose terms of all other members fit. */
static size_t terms_fit(const tr_comm_nccl *c, tr_dtype dtype)
{
    return TR_NCCL_TERMS_BYTES / tr_nccl_number_bytes(dtype) / (size_t)(c->base.size - 1);
}

tr_status tr_nccl_issue_sum(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const size_t bytes = k->n * tr_nccl_number_bytes(k->dtype) * (size_t)(c->base.size - 1),
                 most = terms_fit(c, k->dtype) * (size_t)c->base.size;
    tr_status st = TR_OK;

    if (bytes <= DIRECT_MAX) return sum_direct(c, k, err);
    for (size_t at = 0; at < k->n && st == TR_OK; at += most)
        st = sum_window(c, k, at, k->n - at < most ? k->n - at : most, err);
    return st;
}

tr_status tr_nccl_issue_scatter(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const size_t size = tr_nccl_number_bytes(k->dtype), most = terms_fit(c, k->dtype);
    const char *send = k->send;
    tr_status st = TR_OK;

    for (size_t at = 0; at < k->n && st == TR_OK; at += most) {
        const size_t n = k->n - at < most ? k->n - at : most;
        ncclResult_t said;
        group_begin(c, &said);
        for (int i = 0; i < c->base.size; i++) {
            if (i == c->base.rank) continue;
            group_send(c, i, send + ((size_t)i * k->n + at) * size, n * size, &said);
            group_recv(c, i, slot(c, i, n * size), n * size, &said);
        }
        st = group_end(c, said, err);
        if (st == TR_OK)
            st = add_up(c, send + ((size_t)c->base.rank * k->n + at) * size,
                        (char *)k->recv + at * size, n, k->dtype, err);
    }
    return st;
}

/* ---- rows of a cache --------------------------------------------------------------------------------------------------- */

static tr_status move_rows(tr_comm_nccl *c, const tr_share_move *m, size_t first, size_t end,
                           int to_cache, tr_err *err)
{
    const tr_record *r = m->record;
    tr_cuda_cache_rows_args a = {.cache = m->cache,
                                 .packed = m->packed,
                                 .list = m->list,
                                 .first = (int)first,
                                 .end = (int)end,
                                 .n_pieces = r->n_pieces,
                                 .page_bytes = r->page_bytes,
                                 .row_bytes = m->row_bytes,
                                 .to_cache = to_cache};
    for (int i = 0; i < r->n_pieces && i < TR_CUDA_PIECES; i++) {
        a.at[i] = r->piece[i].at;
        a.bytes[i] = r->piece[i].bytes;
    }
    return tr_nccl_cuda("cache_rows", tr_cuda_cache_rows(&a, c->stream), err);
}

tr_status tr_nccl_issue_share(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const tr_share_move *m = k->move;
    const size_t all = tr_nccl_sum(m->bytes, c->base.size),
                 before = tr_nccl_sum(m->bytes, c->base.rank),
                 behind = before + m->bytes[c->base.rank];
    const size_t first = before / m->row_bytes, end = behind / m->row_bytes;

    tr_status st = move_rows(c, m, first, end, 0, err);
    if (st == TR_OK) st = gather(c, m->packed + before, m->packed, m->bytes, err);
    if (st == TR_OK) st = move_rows(c, m, 0, first, 1, err);
    return st == TR_OK ? move_rows(c, m, end, all / m->row_bytes, 1, err) : st;
}
