/* Rows that every member writes a part of and every member reads whole (context parallelism, parallel.md 3.4). Over
 * communicators without a push the rows travel as they lie in the cache, quantised: one gather of this step's rows from
 * a buffer in which each member packs its own and finds the others'; of device memory the device does all of that. In the
 * group of one the writer's rows are the reader's: nobody is pushed to and nothing is awaited. */
#include <config.h>

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "mpi/comm_priv.h"

/* One exchange after the other: begin, sent, ready. */
typedef enum phase { IDLE, BEGUN, SENT } phase;

struct tr_share {
    tr_comm *comm; /* kept */
    int rank, size, rows_max;
    bool kept; /* nothing travels */
    tr_record record;
    size_t row_bytes;
    phase phase;
    const int *n_rows;        /* [size], the step's; kept */
    const int64_t *write_row; /* [sum of n_rows], -1: a pad row */
    size_t *bytes;            /* [size] of the rows that travel */
    size_t my_first, all;     /* bytes before this member's, and of all */
    char *rows;               /* [rows_max][row_bytes] packed, member after member; the device's */
    int64_t *list, *list_d;   /* [rows_max] of device memory: the step's rows without pad rows */
    char *dst;                /* between begin and ready */
    tr_ticket ticket;
    tr_share_cost cost;
    const void *reached; /* the memory that dst lies in; NULL: not said */
};

tr_record tr_record_latent(const tr_kv_layer *kv)
{
    const size_t bytes = tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);

    return (tr_record){.page_bytes = bytes * TR_PAGE_TOKENS,
                       .n_rows = (int64_t)kv->n_pages * TR_PAGE_TOKENS,
                       .n_pieces = 1,
                       .piece = {{.at = 0, .bytes = bytes}}};
}

tr_record tr_record_index(const tr_kv_layer *kv)
{
    const bool plain = kv->dtype == TR_F32; /* else e4m3 keys, then a scale for each */
    const size_t key = (size_t)kv->d_index * (plain ? sizeof(float) : 1);

    return (tr_record){
        .page_bytes = tr_index_page_bytes(kv->dtype, kv->d_index),
        .n_rows = (int64_t)kv->n_pages * TR_PAGE_TOKENS,
        .n_pieces = plain ? 1 : 2,
        .piece = {{.at = 0, .bytes = key}, {.at = key * TR_PAGE_TOKENS, .bytes = sizeof(float)}}};
}

/* Pieces that leave their page, or sizes that do not fit, are an error of the caller's; told before it corrupts a
 * cache. */
static bool good_record(const tr_record *r, size_t *row_bytes)
{
    *row_bytes = 0;
    if (r->n_pieces < 1 || r->n_pieces > TR_RECORD_PIECES || r->n_rows < 0) return false;
    for (int i = 0; i < r->n_pieces; i++) {
        size_t end;
        if (!r->piece[i].bytes || !tr_mul(&end, r->piece[i].bytes, TR_PAGE_TOKENS) ||
            !tr_add(&end, end, r->piece[i].at) || end > r->page_bytes ||
            !tr_add(row_bytes, *row_bytes, r->piece[i].bytes))
            return false;
    }
    return true;
}

static tr_status take_host(tr_share *s, size_t bytes, tr_err *err)
{
    s->rows = malloc(bytes);
    return s->rows ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
}

/* The list is a row's place in the cache; where it lies packed is its place in the list. */
static tr_status take_device(tr_share *s, size_t bytes, tr_err *err)
{
    const tr_ops *ops = s->comm->ops;
    tr_device *d = s->comm->device;
    size_t list_bytes;

    s->list = tr_calloc((size_t)s->rows_max, sizeof *s->list);
    if (!s->list || !tr_mul(&list_bytes, (size_t)s->rows_max, sizeof *s->list_d))
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_status st = ops->alloc(d, bytes, TR_MEMORY_DEVICE, (void **)&s->rows);
    if (st == TR_OK) st = ops->alloc(d, list_bytes, TR_MEMORY_DEVICE, (void **)&s->list_d);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "share: %s", ops->error(d));
}

tr_status tr_share_open_record(tr_share **out, tr_comm *comm, const tr_record *record, int rows_max,
                               tr_err *err)
{
    tr_status st = TR_OK;
    size_t row_bytes, bytes;

    *out = NULL;
    if (!good_record(record, &row_bytes) || rows_max < 1 ||
        !tr_mul(&bytes, row_bytes, (size_t)rows_max))
        return tr_fail(err, TR_E_COMM, "share: %d rows of %zu bytes", rows_max, row_bytes);
    tr_share *s = calloc(1, sizeof *s);
    if (!s) return tr_fail(err, TR_E_MEMORY, "out of memory");
    s->comm = comm;
    s->rank = tr_comm_rank(comm);
    s->size = tr_comm_size(comm);
    s->rows_max = rows_max;
    s->record = *record;
    s->row_bytes = row_bytes;
    if (s->size > 1) {
        s->bytes = tr_calloc((size_t)s->size, sizeof *s->bytes);
        if (!s->bytes) {
            st = tr_fail(err, TR_E_MEMORY, "out of memory");
            goto done;
        }
        st = comm->device ? take_device(s, bytes, err) : take_host(s, bytes, err);
        if (st != TR_OK) goto done;
    }
    *out = s;
    s = NULL;

done:
    tr_share_close(s);
    return st;
}

tr_status tr_share_open(tr_share **out, tr_comm *comm, size_t row_bytes, int rows_max, tr_err *err)
{
    tr_record r = {.n_rows = INT64_MAX, .n_pieces = 1, .piece = {{.bytes = row_bytes}}};

    *out = NULL;
    if (!tr_mul(&r.page_bytes, row_bytes, TR_PAGE_TOKENS))
        return tr_fail(err, TR_E_COMM, "share: rows of %zu bytes", row_bytes);
    return tr_share_open_record(out, comm, &r, rows_max, err);
}

void tr_share_close(tr_share *s)
{
    if (!s) return;
    if (s->reached && s->comm->impl->leave_alone) s->comm->impl->leave_alone(s->comm, s->reached);
    free(s->bytes);
    if (s->comm->device) {
        s->comm->ops->release(s->comm->device, s->rows);
        s->comm->ops->release(s->comm->device, s->list_d);
    } else {
        free(s->rows);
    }
    free(s->list);
    free(s);
}

tr_status tr_share_reach(tr_share *s, void *memory, size_t bytes, tr_err *err)
{
    if (s->phase != IDLE || s->reached)
        return tr_fail(err, TR_E_COMM,
                       "share: memory given twice, or in the middle of an exchange");
    if (s->size == 1 || !s->comm->impl->reach) return TR_OK;
    s->reached = memory;
    return s->comm->impl->reach(s->comm, memory, bytes, err);
}

void tr_share_keep(tr_share *s)
{
    s->kept = true;
}

bool tr_share_pushes(const tr_share *s)
{
    return s->reached && s->comm->impl->reaches && s->comm->impl->reaches(s->comm, s->reached);
}

/* The list of this step to the device, in front of everything that will use it. The list of the step before has been used:
 * the main lane has waited for its exchanges. */
static tr_status send_list(tr_share *s, size_t n, tr_err *err)
{
    const tr_ops *ops = s->comm->ops;
    size_t n_list = 0;

    for (size_t i = 0; i < n; i++)
        if (s->write_row[i] >= 0) s->list[n_list++] = s->write_row[i];
    const tr_status st =
        ops->upload(s->comm->device, TR_LANE_MAIN, s->list_d, s->list, n_list * sizeof *s->list);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "share: %s", ops->error(s->comm->device));
}

tr_status tr_share_plan(tr_share *s, const int *n_rows, const int64_t *write_row, tr_err *err)
{
    size_t i = 0;
    int left = s->rows_max;

    if (s->size == 1) return TR_OK;
    if (s->phase != IDLE)
        return tr_fail(err, TR_E_COMM, "share: a plan in the middle of an exchange");
    s->n_rows = NULL;
    s->all = 0;
    for (int m = 0; m < s->size; m++) {
        if (n_rows[m] < 0 || n_rows[m] > left)
            return tr_fail(err, TR_E_COMM, "share: member %d writes %d rows, %d fit", m, n_rows[m],
                           left);
        left -= n_rows[m];
        s->bytes[m] = 0;
        if (m == s->rank) s->my_first = s->all;
        for (const size_t end = i + (size_t)n_rows[m]; i < end; i++) {
            if (write_row[i] < -1 || write_row[i] >= s->record.n_rows)
                return tr_fail(err, TR_E_COMM, "share: row %lld of a cache of %lld",
                               (long long)write_row[i], (long long)s->record.n_rows);
            if (write_row[i] >= 0) s->bytes[m] += s->row_bytes;
        }
        s->all += s->bytes[m];
    }
    s->n_rows = n_rows;
    s->write_row = write_row;
    return s->comm->device && s->all ? send_list(s, i, err) : TR_OK;
}

tr_status tr_share_begin(tr_share *s, const tr_rows *rows, void *dst, tr_push *push, tr_err *err)
{
    if (s->phase != IDLE) return tr_fail(err, TR_E_COMM, "share: begun twice");
    if (s->size > 1 && !s->n_rows) return tr_fail(err, TR_E_COMM, "share: begun without a plan");
    if (rows->n_max > s->rows_max)
        return tr_fail(err, TR_E_COMM, "share: a step of %d rows, made for %d", rows->n_max,
                       s->rows_max);
    *push = (tr_push){.n_peers = 0};
    s->dst = dst;
    s->phase = BEGUN;
    return TR_OK;
}

/* Member m's rows from the cache to `packed`, or back. Returns what comes after them. */
static char *copy_rows(const tr_share *s, const int64_t *write_row, int n, char *packed,
                       bool to_cache)
{
    const tr_record *r = &s->record;

    for (int i = 0; i < n; i++) {
        if (write_row[i] < 0) continue;
        const size_t row = (size_t)write_row[i], page = row / TR_PAGE_TOKENS,
                     offset = row % TR_PAGE_TOKENS;
        for (int p = 0; p < r->n_pieces; p++) {
            const size_t bytes = r->piece[p].bytes;
            char *cached = s->dst + page * r->page_bytes + r->piece[p].at + offset * bytes;
            memcpy(to_cache ? cached : packed, to_cache ? packed : cached, bytes);
            packed += bytes;
        }
    }
    return packed;
}

/* Where the list of member m begins. */
static const int64_t *list_of(const tr_share *s, int m)
{
    const int64_t *list = s->write_row;

    for (int i = 0; i < m; i++)
        list += s->n_rows[i];
    return list;
}

tr_status tr_share_sent(tr_share *s, tr_lane writer, tr_err *err)
{
    (void)writer; /* on the CPU it has written; on a device it is the main lane */
    if (s->phase != BEGUN) return tr_fail(err, TR_E_COMM, "share: sent before it was begun");
    s->phase = SENT;
    s->ticket = (tr_ticket){0};
    if (s->size == 1 || !s->all || s->kept) return TR_OK;
    if (s->comm->device) {
        const tr_share_move move = {.record = &s->record,
                                    .row_bytes = s->row_bytes,
                                    .cache = s->dst,
                                    .packed = s->rows,
                                    .list = s->list_d,
                                    .bytes = s->bytes};
        return tr_comm_share(s->comm, &move, &s->ticket, err);
    }
    char *mine = s->rows + s->my_first;
    copy_rows(s, list_of(s, s->rank), s->n_rows[s->rank], mine, false);
    return tr_comm_all_gather(s->comm, mine, s->rows, s->bytes, &s->ticket, err);
}

tr_status tr_share_ready(tr_share *s, tr_lane reader, tr_await *await, tr_err *err)
{
    tr_status st = TR_OK;

    if (s->phase != SENT) return tr_fail(err, TR_E_COMM, "share: ready before it was sent");
    *await = (tr_await){.n = 0};
    s->phase = IDLE;
    if (s->size == 1 || !s->all || s->kept) return TR_OK;
    const uint64_t waited_ns = tr_comm_waited_ns(s->comm, TR_COMM_ALL_GATHER);
    st = tr_comm_wait(s->comm, reader, s->ticket, err);
    if (st != TR_OK) return st;
    if (!s->comm->device) {
        s->cost.waited_ns += tr_comm_waited_ns(s->comm, TR_COMM_ALL_GATHER) - waited_ns;
        s->cost.flown_ns += tr_comm_flight_ns(s->comm, s->ticket);
    }
    s->cost.bytes += s->bytes[s->rank];
    s->cost.calls++;
    if (s->comm->device) return TR_OK;
    char *packed = s->rows;
    for (int m = 0; m < s->size; m++)
        if (m == s->rank)
            packed += s->bytes[m];
        else
            packed = copy_rows(s, list_of(s, m), s->n_rows[m], packed, true);
    return TR_OK;
}

tr_share_cost tr_share_costs(const tr_share *s)
{
    return s->cost;
}
