#include <config.h>

#include "mpi/comm.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "mpi/comm_priv.h"

/* ---- the public functions: check, count, hand on ------------------------------------------------------------------ */

/* All arguments come from this program; a wrong one is its error, told before it can hang the other members. */
static tr_status bad(tr_err *err, const char *op, const char *what)
{
    return tr_fail(err, TR_E_COMM, "%s: %s", op, what);
}

bool tr_comm_sum_bytes(const tr_comm *c, size_t *bytes, size_t n, tr_dtype dtype)
{
    if (dtype == TR_BF16) return c->sums_bf16 && tr_mul(bytes, n, sizeof(uint16_t));
    return dtype == TR_F32 && tr_mul(bytes, n, sizeof(float));
}

static bool sum_of(size_t *sum, const size_t *n, int size)
{
    *sum = 0;
    for (int i = 0; i < size; i++)
        if (!tr_add(sum, *sum, n[i])) return false;
    return true;
}

/* An operation is about to be begun: `begun` comes behind it. */
static void count(tr_comm *c, tr_comm_op op, size_t bytes, tr_ticket *ticket)
{
    c->calls[op]++;
    c->bytes[op] += bytes;
    ticket->n = ++c->next_ticket;
    c->region_bytes = bytes;
    tr_region_begin(c->regions, c->region_op[op]);
}

static tr_status begun(tr_comm *c, tr_status st)
{
    tr_region_end(c->regions, (double)c->region_bytes, 0);
    return st;
}

int tr_comm_rank(const tr_comm *c)
{
    return c->rank;
}

int tr_comm_size(const tr_comm *c)
{
    return c->size;
}

const char *tr_comm_name(const tr_comm *c)
{
    return c->name;
}

const char *tr_comm_op_name(tr_comm_op op)
{
    static const char *const name[] = {
        [TR_COMM_ALL_REDUCE] = "all_reduce",
        [TR_COMM_ALL_GATHER] = "all_gather",
        [TR_COMM_REDUCE_SCATTER] = "reduce_scatter",
        [TR_COMM_ALL_TO_ALL] = "all_to_all",
        [TR_COMM_SEND] = "send",
        [TR_COMM_RECV] = "recv",
        [TR_COMM_BROADCAST] = "broadcast",
        [TR_COMM_ALL_MAX] = "all_max",
    };
    return (int)op >= 0 && op < TR_COMM_N_OPS ? name[op] : "?";
}

void tr_comm_free(tr_comm *c)
{
    if (!c) return;
    free(c->sent);
    c->sent = NULL;
    c->impl->free(c);
}

tr_status tr_comm_all_reduce(tr_comm *c, void *buf, size_t n, tr_dtype dtype, tr_ticket *ticket,
                             tr_err *err)
{
    size_t bytes;

    if (!tr_comm_sum_bytes(c, &bytes, n, dtype))
        return bad(err, "all_reduce", "not a number of elements that can be added here");
    if (!ticket || (n && !buf)) return bad(err, "all_reduce", "no buffer or no ticket");
    count(c, TR_COMM_ALL_REDUCE, bytes, ticket);
    return begun(c, c->impl->all_reduce(c, buf, n, dtype, ticket, err));
}

bool tr_comm_fuses(const tr_comm *c, int n_max, int d)
{
    return c->impl->fuses && c->impl->fuses(c, n_max, d);
}

tr_status tr_comm_reduce_norm(tr_comm *c, const struct tr_norm_args *a, tr_err *err)
{
    tr_ticket ticket;
    size_t bytes;

    if (!a->add || a->n_max < 0 || !tr_comm_fuses(c, a->n_max, a->d) ||
        !tr_mul(&bytes, (size_t)a->n_max, (size_t)a->d) ||
        !tr_mul(&bytes, bytes, tr_act_bytes(c->ops)))
        return bad(err, "reduce_norm", "not rows that can be added up and normed at once here");
    count(c, TR_COMM_ALL_REDUCE, bytes, &ticket);
    return begun(c, c->impl->reduce_norm(c, a, &ticket, err));
}

tr_status tr_comm_reach(tr_comm *c, void *memory, size_t bytes, tr_err *err)
{
    return c->impl->reach ? c->impl->reach(c, memory, bytes, err) : TR_OK;
}

void tr_comm_leave_alone(tr_comm *c, const void *memory)
{
    if (c->impl->leave_alone) c->impl->leave_alone(c, memory);
}

tr_status tr_comm_all_gather(tr_comm *c, const void *send, void *recv, const size_t *bytes,
                             tr_ticket *ticket, tr_err *err)
{
    size_t all;

    if (!bytes || !sum_of(&all, bytes, c->size)) return bad(err, "all_gather", "impossible sizes");
    if (!ticket || (bytes[c->rank] && !send) || (all && !recv))
        return bad(err, "all_gather", "no buffer or no ticket");
    count(c, TR_COMM_ALL_GATHER, bytes[c->rank], ticket);
    return begun(c, c->impl->all_gather(c, send, recv, bytes, ticket, err));
}

tr_status tr_comm_reduce_scatter(tr_comm *c, const void *send, void *recv, size_t n, tr_dtype dtype,
                                 tr_ticket *ticket, tr_err *err)
{
    size_t bytes;

    if (!tr_comm_sum_bytes(c, &bytes, n, dtype) || !tr_mul(&bytes, bytes, (size_t)c->size))
        return bad(err, "reduce_scatter", "not a number of elements that can be added here");
    if (!ticket || (n && (!send || !recv)))
        return bad(err, "reduce_scatter", "no buffer or no ticket");
    count(c, TR_COMM_REDUCE_SCATTER, bytes, ticket);
    return begun(c, c->impl->reduce_scatter(c, send, recv, n, dtype, ticket, err));
}

tr_status tr_comm_all_to_all(tr_comm *c, const void *send, const size_t *n_send, void *recv,
                             const size_t *n_recv, tr_ticket *ticket, tr_err *err)
{
    size_t out, in;

    if (!n_send || !n_recv || !sum_of(&out, n_send, c->size) || !sum_of(&in, n_recv, c->size) ||
        n_send[c->rank] != n_recv[c->rank])
        return bad(err, "all_to_all", "impossible sizes");
    if (!ticket || (out && !send) || (in && !recv))
        return bad(err, "all_to_all", "no buffer or no ticket");
    count(c, TR_COMM_ALL_TO_ALL, out, ticket);
    return begun(c, c->impl->all_to_all(c, send, n_send, recv, n_recv, ticket, err));
}

tr_status tr_comm_share(tr_comm *c, const tr_share_move *move, tr_ticket *ticket, tr_err *err)
{
    if (!c->impl->share) return bad(err, "share", "a communicator of host memory");
    count(c, TR_COMM_ALL_GATHER, move->bytes[c->rank], ticket);
    return begun(c, c->impl->share(c, move, ticket, err));
}

static bool is_other(const tr_comm *c, int rank)
{
    return rank >= 0 && rank < c->size && rank != c->rank;
}

tr_status tr_comm_send(tr_comm *c, int to, const void *buf, size_t bytes, tr_ticket *ticket,
                       tr_err *err)
{
    if (!is_other(c, to)) return bad(err, "send", "not another member");
    if (!ticket || (bytes && !buf)) return bad(err, "send", "no buffer or no ticket");
    count(c, TR_COMM_SEND, bytes, ticket);
    return begun(c, c->impl->send(c, to, buf, bytes, ticket, err));
}

tr_status tr_comm_recv(tr_comm *c, int from, void *buf, size_t bytes, tr_ticket *ticket,
                       tr_err *err)
{
    if (!is_other(c, from)) return bad(err, "recv", "not another member");
    if (!ticket || (bytes && !buf)) return bad(err, "recv", "no buffer or no ticket");
    count(c, TR_COMM_RECV, 0, ticket);
    return begun(c, c->impl->recv(c, from, buf, bytes, ticket, err));
}

tr_status tr_comm_broadcast(tr_comm *c, int root, void *buf, size_t bytes, tr_ticket *ticket,
                            tr_err *err)
{
    if (root < 0 || root >= c->size) return bad(err, "broadcast", "the root is not a member");
    if (!ticket || (bytes && !buf)) return bad(err, "broadcast", "no buffer or no ticket");
    count(c, TR_COMM_BROADCAST, root == c->rank ? bytes : 0, ticket);
    return begun(c, c->impl->broadcast(c, root, buf, bytes, ticket, err));
}

tr_status tr_comm_all_max_u64(tr_comm *c, uint64_t *x, size_t n, tr_ticket *ticket, tr_err *err)
{
    size_t bytes;

    if (!tr_mul(&bytes, n, sizeof *x)) return bad(err, "all_max", "impossible size");
    if (!ticket || (n && !x)) return bad(err, "all_max", "no buffer or no ticket");
    count(c, TR_COMM_ALL_MAX, bytes, ticket);
    return begun(c, c->impl->all_max(c, x, n, ticket, err));
}

tr_status tr_comm_max_word(tr_comm *c, uint64_t *x, tr_err *err)
{
    tr_ticket ticket = {0};
    tr_status st = tr_comm_all_max_u64(c, x, 1, &ticket, err);

    return st == TR_OK ? tr_comm_wait(c, TR_LANE_MAIN, ticket, err) : st;
}

tr_status tr_comm_agree(tr_comm *c, tr_status mine, tr_err *err)
{
    uint64_t failed = mine != TR_OK;
    tr_err other;
    const tr_status st = tr_comm_max_word(c, &failed, &other);

    if (mine != TR_OK) return mine;
    if (st != TR_OK) return tr_fail(err, st, "%s", other.text);
    return failed ? tr_fail(err, TR_E_COMM, "another member has failed") : TR_OK;
}

tr_status tr_comm_max_number(tr_comm *c, double *x, tr_err *err)
{
    uint64_t bits;

    memcpy(&bits, x, sizeof bits); /* what is not negative is ordered as its bits */
    tr_status st = tr_comm_max_word(c, &bits, err);
    memcpy(x, &bits, sizeof bits);
    return st;
}

/* Ticket 0 stands for nothing begun: there is nothing to wait for. */
tr_status tr_comm_wait(tr_comm *c, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    if (ticket.n > c->next_ticket) return bad(err, "wait", "a ticket that was never given");
    if (!ticket.n) return TR_OK;
    tr_region_begin(c->regions, c->region_wait);
    tr_status st = c->impl->wait(c, reader, ticket, err);
    tr_region_end(c->regions, 0, 0);
    return st;
}

tr_status tr_comm_wait_read(tr_comm *c, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    if (!c->impl->wait_read || !ticket.n || ticket.n > c->next_ticket)
        return tr_comm_wait(c, reader, ticket, err);
    return c->impl->wait_read(c, reader, ticket, err);
}

void tr_comm_progress(tr_comm *c)
{
    c->impl->progress(c);
}

const tr_device *tr_comm_device(const tr_comm *c)
{
    return c->device;
}

tr_comm *tr_comm_host(tr_comm *c)
{
    return c->host ? c->host : c;
}

void tr_comm_set_mode(tr_comm *c, tr_comm_mode mode)
{
    if (c->device) c->mode = mode;
}

void tr_comm_counts(const tr_comm *c, tr_comm_op op, uint64_t *calls, uint64_t *bytes)
{
    *calls = c->calls[op];
    *bytes = c->bytes[op];
}

uint64_t tr_comm_waited_ns(const tr_comm *c, tr_comm_op op)
{
    return c->waited_ns[op];
}

uint64_t tr_comm_flown_ns(const tr_comm *c, tr_comm_op op)
{
    return c->flown_ns[op];
}

uint64_t tr_comm_shortest_ns(const tr_comm *c, tr_comm_op op)
{
    return c->shortest_ns[op];
}

uint64_t tr_comm_max_number_ns(const tr_comm *c, tr_comm_op op)
{
    return c->longest_ns[op];
}

uint64_t tr_comm_flight_ns(const tr_comm *c, tr_ticket ticket)
{
    const uint64_t i = ticket.n % TR_COMM_FLIGHTS;
    return ticket.n && c->flight[i].ticket == ticket.n ? c->flight[i].ns : 0;
}

tr_status tr_comm_measure(tr_comm *c, tr_regions *regions, int group, tr_err *err)
{
    char name[TR_REGION_NAME];

    if (!c->sent) c->sent = tr_calloc((size_t)c->size, sizeof *c->sent);
    if (!c->sent) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < TR_COMM_N_OPS; i++) {
        snprintf(name, sizeof name, "%s/%s", c->name, tr_comm_op_name((tr_comm_op)i));
        c->region_op[i] = tr_region_id_of(regions, name, TR_KIND_COMM, group);
    }
    snprintf(name, sizeof name, "%s/wait", c->name);
    c->region_wait = tr_region_id_of(regions, name, TR_KIND_WAIT, group);
    c->regions = regions;
    return TR_OK;
}

uint64_t tr_comm_sent_to(const tr_comm *c, int member)
{
    return c->sent && member >= 0 && member < c->size ? c->sent[member] : 0;
}

/* ---- the group of one: what a member would get is what it gives --------------------------------------------------- */

static void copy(void *to, const void *from, size_t n)
{
    if (n && to != from) memmove(to, from, n);
}

static tr_status self_all_reduce(tr_comm *c, void *buf, size_t n, tr_dtype dtype, tr_ticket *ticket,
                                 tr_err *err)
{
    (void)c, (void)buf, (void)n, (void)dtype, (void)ticket, (void)err;
    return TR_OK;
}

static tr_status self_all_gather(tr_comm *c, const void *send, void *recv, const size_t *bytes,
                                 tr_ticket *ticket, tr_err *err)
{
    (void)c, (void)ticket, (void)err;
    copy(recv, send, bytes[0]);
    return TR_OK;
}

static tr_status self_reduce_scatter(tr_comm *c, const void *send, void *recv, size_t n,
                                     tr_dtype dtype, tr_ticket *ticket, tr_err *err)
{
    size_t bytes = 0;

    (void)ticket, (void)err;
    tr_comm_sum_bytes(c, &bytes, n, dtype); /* was checked */
    copy(recv, send, bytes);
    return TR_OK;
}

static tr_status self_all_to_all(tr_comm *c, const void *send, const size_t *n_send, void *recv,
                                 const size_t *n_recv, tr_ticket *ticket, tr_err *err)
{
    (void)c, (void)n_recv, (void)ticket, (void)err;
    copy(recv, send, n_send[0]);
    return TR_OK;
}

static tr_status self_send(tr_comm *c, int to, const void *buf, size_t bytes, tr_ticket *ticket,
                           tr_err *err)
{
    (void)c, (void)to, (void)buf, (void)bytes, (void)ticket;
    return bad(err, "send", "a group of one");
}

static tr_status self_recv(tr_comm *c, int from, void *buf, size_t bytes, tr_ticket *ticket,
                           tr_err *err)
{
    (void)c, (void)from, (void)buf, (void)bytes, (void)ticket;
    return bad(err, "recv", "a group of one");
}

static tr_status self_broadcast(tr_comm *c, int root, void *buf, size_t bytes, tr_ticket *ticket,
                                tr_err *err)
{
    (void)c, (void)root, (void)buf, (void)bytes, (void)ticket, (void)err;
    return TR_OK;
}

static tr_status self_all_max(tr_comm *c, uint64_t *x, size_t n, tr_ticket *ticket, tr_err *err)
{
    (void)c, (void)x, (void)n, (void)ticket, (void)err;
    return TR_OK;
}

static tr_status self_wait(tr_comm *c, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    (void)c, (void)reader, (void)ticket, (void)err;
    return TR_OK;
}

static void self_progress(tr_comm *c)
{
    (void)c;
}

static void self_free(tr_comm *c)
{
    free(c);
}

static const tr_comm_impl self_impl = {
    .all_reduce = self_all_reduce,
    .all_gather = self_all_gather,
    .reduce_scatter = self_reduce_scatter,
    .all_to_all = self_all_to_all,
    .send = self_send,
    .recv = self_recv,
    .broadcast = self_broadcast,
    .all_max = self_all_max,
    .wait = self_wait,
    .progress = self_progress,
    .free = self_free,
};

tr_comm *tr_comm_self(void)
{
    tr_comm *c = calloc(1, sizeof *c);

    if (c) {
        c->impl = &self_impl;
        c->size = 1;
        memcpy(c->name, "self", sizeof "self");
    }
    return c;
}
