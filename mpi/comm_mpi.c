/* Communicators over MPI.
 *
 * An operation is a list of requests and a function that posts the next ones when all have finished: it is over when
 * that posts nothing. Progress tests the requests of every operation in flight, on every communicator of the world: a
 * reduction has two rounds, and a member that waits on one communicator must not keep others waiting on another.
 *
 * One tag per operation: messages of one operation between two members go in the order in which both post them, and
 * rounds of different operations, which members may reach in different order, cannot be taken for each other. */
#include <config.h>

#include "mpi/comm_mpi.h"

#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <omp.h>

#include "base/clock.h"
#include "base/size.h"
#include "mpi/comm_priv.h"
#include "mpi/flight.h"
#include "mpi/mpi_priv.h"

enum {
    PIECE_MAX = 1 << 30,   /* bytes of one message: MPI counts in int */
    SCRATCH_MAX = 1 << 20, /* bytes of the others' terms that one operation keeps */
    DIRECT_MAX = 32 << 10, /* bytes: a reduction up to here takes one round */
    TAG_LETTER = 0,        /* send and recv: in order */
    TAG_FIRST = 1,         /* of collectives */
    N_TAGS = 32767,        /* MPI promises tags up to 32767 */
    TESTS_ALONE = 20000,   /* in a row before the core is offered to others: a millisecond or two */
    TESTS_CROWDED = 20,    /* the same where others of this job want it */
    BLOCK_BYTES = 4096,    /* of each member's terms at a time */
};

typedef struct tr_comm_mpi tr_comm_mpi;
typedef struct operation operation;

struct operation {
    operation *next;
    uint64_t ticket, number, flight;
    tr_comm_op op;
    int tag, stage, root;
    uint64_t begun_ns;
    bool direct;   /* a reduction of one round: everybody gets all terms */
    bool readable; /* a broadcast: the data is here, though perhaps not yet where it goes on to */
    tr_status (*step)(tr_comm_mpi *, operation *, tr_err *);
    int n_requests, room;
    MPI_Request *request; /* [room] */
    MPI_Status *status;   /* [room] */
    int *want;            /* [room] bytes to be received, -1: a send */
    /* reductions: n elements, the terms of [at, at + width) on their way */
    const char *send;
    char *recv;
    const size_t *n_send, *n_recv; /* [size], in the first step only; gather: n_send NULL */
    size_t n, at, width;
    char *scratch; /* terms of the other members in rank order */
    size_t scratch_bytes;
};

struct tr_comm_mpi {
    tr_comm base;
    tr_world *world;
    tr_comm_mpi *next; /* of the world's */
    MPI_Comm comm;
    int first; /* member 0's rank of the world */
    uint64_t n_collectives, n_letters;
    int tests;                 /* in a row before the core is offered to others */
    operation *flying, **last; /* in flight, eldest first */
    operation *idle;
    tr_err broken; /* MPI failed: so do all waits */
};

static tr_comm_mpi *of(tr_comm *c)
{
    return (tr_comm_mpi *)c;
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

static bool make_room(operation *o, int n)
{
    if (n <= o->room) return true;
    const int room = n > 2 * o->room ? n : 2 * o->room;
    void *request = realloc(o->request, (size_t)room * sizeof *o->request);
    if (request) o->request = request;
    void *status = realloc(o->status, (size_t)room * sizeof *o->status);
    if (status) o->status = status;
    void *want = realloc(o->want, (size_t)room * sizeof *o->want);
    if (want) o->want = want;
    if (!request || !status || !want) return false;
    o->room = room;
    return true;
}

/* Both sides know the size, so that nothing is sent where there is nothing, and large messages fall into the same
 * pieces. */
static tr_status post(tr_comm_mpi *c, operation *o, bool receive, int peer, const void *buf,
                      size_t bytes, tr_err *err)
{
    tr_status st = TR_OK;
    char *p = (char *)buf;

    while (bytes) {
        const int n = bytes > PIECE_MAX ? PIECE_MAX : (int)bytes;
        if (!make_room(o, o->n_requests + 1)) {
            st = tr_fail(err, TR_E_MEMORY, "out of memory");
            goto done;
        }
        MPI_Request *r = &o->request[o->n_requests];
        if (receive)
            TR_MPI(MPI_Irecv(p, n, MPI_BYTE, peer, o->tag, c->comm, r));
        else
            TR_MPI(MPI_Isend(p, n, MPI_BYTE, peer, o->tag, c->comm, r));
        o->want[o->n_requests++] = receive ? n : -1;
        if (!receive) tr_comm_gave(&c->base, peer, (size_t)n);
        p += n;
        bytes -= (size_t)n;
    }

done:
    return st;
}

static tr_status post_send(tr_comm_mpi *c, operation *o, int to, const void *buf, size_t bytes,
                           tr_err *err)
{
    return post(c, o, false, to, buf, bytes, err);
}

static tr_status post_recv(tr_comm_mpi *c, operation *o, int from, void *buf, size_t bytes,
                           tr_err *err)
{
    return post(c, o, true, from, buf, bytes, err);
}

static size_t sum(const size_t *n, int count)
{
    size_t s = 0;
    for (int i = 0; i < count; i++)
        s += n[i];
    return s;
}

/* The d-th other member, counted from this one: not everybody begins with member 0. */
static int other(const tr_comm_mpi *c, int d)
{
    return (c->base.rank + d) % c->base.size;
}

/* ---- one operation ----------------------------------------------------------------------------------------------- */

static operation *new_operation(tr_comm_mpi *c, tr_comm_op op)
{
    operation *o = c->idle;

    if (o)
        c->idle = o->next;
    else if (!(o = calloc(1, sizeof *o)))
        return NULL;
    operation kept = *o;
    *o = (operation){.op = op,
                     .ticket = c->base.next_ticket,
                     .begun_ns = tr_now_ns(),
                     .room = kept.room,
                     .request = kept.request,
                     .status = kept.status,
                     .want = kept.want,
                     .scratch = kept.scratch,
                     .scratch_bytes = kept.scratch_bytes};
    if (op == TR_COMM_SEND || op == TR_COMM_RECV) {
        o->tag = TAG_LETTER;
        o->number = ++c->n_letters;
    } else {
        o->tag = TAG_FIRST + (int)(c->n_collectives++ % (N_TAGS - TAG_FIRST));
        o->number = c->n_collectives;
    }
    return o;
}

static void free_operation(operation *o)
{
    if (!o) return;
    free(o->request);
    free(o->status);
    free(o->want);
    free(o->scratch);
    free(o);
}

/* All requests have finished: did every message have the size that was expected? */
static tr_status check_sizes(const operation *o, tr_err *err)
{
    for (int i = 0; i < o->n_requests; i++) {
        int n = 0;
        if (o->want[i] < 0) continue;
        if (MPI_Get_count(&o->status[i], MPI_BYTE, &n) != MPI_SUCCESS || n != o->want[i])
            return tr_fail(err, TR_E_COMM, "member %d sent %d bytes where %d are expected",
                           o->status[i].MPI_SOURCE, n, o->want[i]);
    }
    return TR_OK;
}

/* MPI_Testall says MPI_ERR_IN_STATUS where one request failed: the cause is in there. */
static int cause(const operation *o, int code)
{
    if (code != MPI_ERR_IN_STATUS) return code;
    for (int i = 0; i < o->n_requests; i++) {
        int e = o->status[i].MPI_ERROR;
        if (e != MPI_SUCCESS && e != MPI_ERR_PENDING) return e;
    }
    return code;
}

/* *finished: nothing is left to do. */
static tr_status advance(tr_comm_mpi *c, operation *o, bool *finished, tr_err *err)
{
    tr_status st = TR_OK;

    *finished = false;
    while (st == TR_OK) {
        int all = 1;
        if (o->n_requests) {
            int code = MPI_Testall(o->n_requests, o->request, &all, o->status);
            if (code != MPI_SUCCESS) return tr_mpi_failed(err, "MPI_Testall", cause(o, code));
        }
        if (!all) return TR_OK;
        st = check_sizes(o, err);
        o->n_requests = 0;
        if (st == TR_OK) st = o->step(c, o, err);
        if (st == TR_OK && !o->n_requests) {
            *finished = true;
            return TR_OK;
        }
    }
    return st;
}

static tr_status break_down(tr_comm_mpi *c, const operation *o)
{
    tr_within(&c->broken, "%s number %llu of %s", tr_comm_op_name(o->op),
              (unsigned long long)o->number, c->base.name);
    return c->broken.status;
}

/* The first step, and into the list unless that was all. A failure leaves the communicator broken: other members may
 * already count on the messages. */
static tr_status begin(tr_comm_mpi *c, operation *o, size_t bytes, tr_err *err)
{
    if (c->broken.status != TR_OK) {
        o->next = c->idle;
        c->idle = o;
        return tr_fail(err, c->broken.status, "%s", c->broken.text);
    }
    o->flight = tr_flight_begin(c->world->flight, c->base.name, c->first, c->base.size,
                                tr_comm_op_name(o->op), o->number, bytes);
    o->next = NULL;
    *c->last = o;
    c->last = &o->next;
    tr_status st = o->step(c, o, &c->broken);
    if (st == TR_OK) return TR_OK;
    break_down(c, o);
    return tr_fail(err, st, "%s", c->broken.text);
}

static void progress_one(tr_comm_mpi *c)
{
    operation **at = &c->flying;

    while (*at && c->broken.status == TR_OK) {
        operation *o = *at;
        bool finished;
        if (advance(c, o, &finished, &c->broken) != TR_OK) {
            break_down(c, o);
            return;
        }
        if (!finished) {
            at = &o->next;
            continue;
        }
        tr_flight_done(c->world->flight, o->flight);
        tr_comm_flew(&c->base, o->op, o->ticket, tr_now_ns() - o->begun_ns);
        *at = o->next;
        if (!*at) c->last = at;
        o->next = c->idle;
        c->idle = o;
    }
}

/* Of all communicators; what has broken one of them, or NULL: others may wait in that one for ever, so nobody here waits on
 * another for them. */
static const tr_err *progress_all(tr_world *world)
{
    const tr_err *broken = NULL;

    for (tr_comm_mpi *c = world->comms; c; c = c->next) {
        if (c->flying) progress_one(c);
        if (c->broken.status != TR_OK) broken = &c->broken;
    }
    return broken;
}

static void progress(tr_comm *base)
{
    progress_all(of(base)->world);
}

static operation *find(const tr_comm_mpi *c, uint64_t ticket)
{
    operation *o = c->flying;

    while (o && o->ticket != ticket)
        o = o->next;
    return o;
}

/* Until the operation is over or, with `read`, its data may be read. */
static tr_status await_end(tr_comm_mpi *c, tr_ticket ticket, bool read, tr_err *err)
{
    const operation *o = find(c, ticket.n);
    const tr_err *broken = c->broken.status == TR_OK ? NULL : &c->broken;

    if (o && !(read && o->readable) && !broken) {
        const uint64_t begun_ns = tr_now_ns();
        const tr_comm_op op = o->op;
        tr_flight_wait(c->world->flight, o->flight);
        for (int i = 1; o && !(read && o->readable) && !broken; i++) {
            broken = progress_all(c->world);
            o = find(c, ticket.n);
            if (o && i >= c->tests) sched_yield();
        }
        tr_flight_wait(c->world->flight, 0);
        c->base.waited_ns[op] += tr_now_ns() - begun_ns;
    }
    return broken ? tr_fail(err, broken->status, "%s", broken->text) : TR_OK;
}

static tr_status wait_for(tr_comm *base, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    (void)reader;
    return await_end(of(base), ticket, false, err);
}

static tr_status wait_read(tr_comm *base, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    (void)reader;
    return await_end(of(base), ticket, true, err);
}

/* ---- reductions -------------------------------------------------------------------------------------------------- */

static size_t element_bytes(const operation *o)
{
    return o->op == TR_COMM_ALL_MAX ? sizeof(uint64_t) : sizeof(float);
}

/* Where the n terms of another member go. */
static char *slot(const tr_comm_mpi *c, const operation *o, int i, size_t n)
{
    return o->scratch + (size_t)(i < c->base.rank ? i : i - 1) * n * element_bytes(o);
}

/* out = ((x0 + x1) + x2) + ... over members in rank order (or the largest), n elements; own and out may be the same.
 * Block by block in the first-level cache; the adding itself is the library's, which uses the machine's widest
 * registers (plain loops in place of it: an all-reduce of 1 MiB by two ranks of a Xeon took 10 % longer, bench comm). */
static tr_status combine(const tr_comm_mpi *c, const operation *o, char *out, const char *own,
                         size_t n, tr_err *err)
{
    const bool largest = o->op == TR_COMM_ALL_MAX;
    const MPI_Datatype type = largest ? MPI_UINT64_T : MPI_FLOAT;
    const MPI_Op op = largest ? MPI_MAX : MPI_SUM;
    const size_t size = element_bytes(o), per_block = BLOCK_BYTES / size;
    _Alignas(64) char block[BLOCK_BYTES];
    tr_status st = TR_OK;

    if (c->base.size == 2 && out == own) { /* x0 + x1 is x1 + x0 */
        TR_MPI(MPI_Reduce_local(slot(c, o, 1 - c->base.rank, n), out, (int)n, type, op));
        return TR_OK;
    }
    for (size_t at = 0; at < n; at += per_block) {
        const size_t m = n - at < per_block ? n - at : per_block;
        for (int i = 0; i < c->base.size; i++) {
            const char *x = (i == c->base.rank ? own : slot(c, o, i, n)) + at * size;
            if (i == 0)
                memcpy(block, x, m * size);
            else
                TR_MPI(MPI_Reduce_local(x, block, (int)m, type, op));
        }
        memcpy(out + at * size, block, m * size);
    }

done:
    return st;
}

/* Which elements member i reduces now. */
typedef struct part {
    size_t at, n;
} part;

static part part_of(const tr_comm_mpi *c, const operation *o, int i)
{
    if (o->op == TR_COMM_REDUCE_SCATTER) return (part){(size_t)i * o->n + o->at, o->width};
    if (o->direct) return (part){o->at, o->width};
    /* As even as possible; the last members may get nothing. */
    const size_t each = tr_ceil_div(o->width, (size_t)c->base.size), before = (size_t)i * each;
    if (before >= o->width) return (part){o->at + o->width, 0};
    return (part){o->at + before, o->width - before < each ? o->width - before : each};
}

static bool make_scratch(operation *o, size_t bytes)
{
    if (bytes <= o->scratch_bytes) return true;
    free(o->scratch);
    o->scratch = malloc(bytes);
    o->scratch_bytes = o->scratch ? bytes : 0;
    return o->scratch != NULL;
}

/* Of this member's part: the terms of all others; of theirs: this member's terms. */
static tr_status post_terms(tr_comm_mpi *c, operation *o, tr_err *err)
{
    const size_t size = element_bytes(o), mine = part_of(c, o, c->base.rank).n,
                 bytes = (size_t)(c->base.size - 1) * mine * size;
    tr_status st = TR_OK;

    if (!make_scratch(o, bytes)) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int d = 1; d < c->base.size && st == TR_OK; d++) {
        const int from = other(c, c->base.size - d);
        st = post_recv(c, o, from, slot(c, o, from, mine), mine * size, err);
    }
    for (int d = 1; d < c->base.size && st == TR_OK; d++) {
        const part p = part_of(c, o, other(c, d));
        st = post_send(c, o, other(c, d), o->send + p.at * size, p.n * size, err);
    }
    return st;
}

/* The reduced parts of everybody, in place: their terms have left. */
static tr_status post_results(tr_comm_mpi *c, operation *o, tr_err *err)
{
    const size_t size = element_bytes(o);
    const part mine = part_of(c, o, c->base.rank);
    tr_status st = TR_OK;

    for (int d = 1; d < c->base.size && st == TR_OK; d++) {
        const int from = other(c, c->base.size - d);
        const part p = part_of(c, o, from);
        st = post_recv(c, o, from, o->recv + p.at * size, p.n * size, err);
    }
    for (int d = 1; d < c->base.size && st == TR_OK; d++)
        st = post_send(c, o, other(c, d), o->recv + mine.at * size, mine.n * size, err);
    return st;
}

/* The terms of one window are here, and the results of the one before: reduce, hand on, and go on to the next window.
 * Both rounds are under way together. */
static tr_status step_reduce(tr_comm_mpi *c, operation *o, tr_err *err)
{
    const size_t size = element_bytes(o), most = SCRATCH_MAX / size / (size_t)(c->base.size - 1);
    tr_status st = TR_OK;

    if (o->width) {
        const part p = part_of(c, o, c->base.rank);
        const bool scatter = o->op == TR_COMM_REDUCE_SCATTER;
        char *out = o->recv + (scatter ? o->at : p.at) * size;
        st = combine(c, o, out, o->send + p.at * size, p.n, err);
        if (st == TR_OK && !scatter && !o->direct) st = post_results(c, o, err);
        o->at += o->width;
        o->width = 0;
    }
    if (st == TR_OK && o->at < o->n) {
        const size_t window =
            o->op == TR_COMM_REDUCE_SCATTER || o->direct ? most : most * (size_t)c->base.size;
        o->width = o->n - o->at < window ? o->n - o->at : window;
        st = post_terms(c, o, err);
    }
    return st;
}

static tr_status begin_reduce(tr_comm *base, tr_comm_op op, const void *send, void *recv, size_t n,
                              tr_err *err)
{
    tr_comm_mpi *c = of(base);
    operation *o = new_operation(c, op);

    if (!o) return tr_fail(err, TR_E_MEMORY, "out of memory");
    o->step = step_reduce;
    o->send = send;
    o->recv = recv;
    o->n = n;
    o->direct = n <= DIRECT_MAX / element_bytes(o) / (size_t)(base->size - 1);
    return begin(c, o, n * element_bytes(o), err);
}

static tr_status all_reduce(tr_comm *base, void *buf, size_t n, tr_dtype dtype, tr_ticket *ticket,
                            tr_err *err)
{
    (void)dtype, (void)ticket;
    return begin_reduce(base, TR_COMM_ALL_REDUCE, buf, buf, n, err);
}

static tr_status all_max(tr_comm *base, uint64_t *x, size_t n, tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    return begin_reduce(base, TR_COMM_ALL_MAX, x, x, n, err);
}

static tr_status reduce_scatter(tr_comm *base, const void *send, void *recv, size_t n,
                                tr_dtype dtype, tr_ticket *ticket, tr_err *err)
{
    (void)dtype, (void)ticket;
    return begin_reduce(base, TR_COMM_REDUCE_SCATTER, send, recv, n, err);
}

/* ---- the others -------------------------------------------------------------------------------------------------- */

/* All-to-all, and the gather, which sends the same bytes to everybody: one round. */
static tr_status step_exchange(tr_comm_mpi *c, operation *o, tr_err *err)
{
    const bool gather = o->op == TR_COMM_ALL_GATHER;
    tr_status st = TR_OK;

    if (o->stage++) return TR_OK;
    for (int d = 1; d < c->base.size && st == TR_OK; d++) {
        const int from = other(c, c->base.size - d);
        st = post_recv(c, o, from, o->recv + sum(o->n_recv, from), o->n_recv[from], err);
    }
    for (int d = 1; d < c->base.size && st == TR_OK; d++) {
        const int to = other(c, d);
        st = gather ? post_send(c, o, to, o->send, o->n_recv[c->base.rank], err)
                    : post_send(c, o, to, o->send + sum(o->n_send, to), o->n_send[to], err);
    }
    return st;
}

static tr_status begin_exchange(tr_comm *base, tr_comm_op op, const void *send,
                                const size_t *n_send, void *recv, const size_t *n_recv, tr_err *err)
{
    tr_comm_mpi *c = of(base);
    operation *o = new_operation(c, op);
    const int me = base->rank;

    if (!o) return tr_fail(err, TR_E_MEMORY, "out of memory");
    o->step = step_exchange;
    o->send = send;
    o->recv = recv;
    o->n_send = n_send;
    o->n_recv = n_recv;
    const char *from = o->send + (op == TR_COMM_ALL_GATHER ? 0 : sum(n_send, me));
    char *to = o->recv + sum(n_recv, me);
    if (n_recv[me] && to != from) memmove(to, from, n_recv[me]);
    return begin(c, o, op == TR_COMM_ALL_GATHER ? n_recv[me] : sum(n_send, base->size), err);
}

static tr_status all_gather(tr_comm *base, const void *send, void *recv, const size_t *bytes,
                            tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    return begin_exchange(base, TR_COMM_ALL_GATHER, send, NULL, recv, bytes, err);
}

static tr_status all_to_all(tr_comm *base, const void *send, const size_t *n_send, void *recv,
                            const size_t *n_recv, tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    return begin_exchange(base, TR_COMM_ALL_TO_ALL, send, n_send, recv, n_recv, err);
}

/* A binomial tree: counted from the root, member v gets it from v without its lowest set bit. */
static tr_status step_broadcast(tr_comm_mpi *c, operation *o, tr_err *err)
{
    const int size = c->base.size, v = (c->base.rank - o->root + size) % size;
    int low = 1;
    tr_status st = TR_OK;

    while (low < size && !(v & low))
        low <<= 1;
    if (o->stage == 0 && v) {
        o->stage = 1;
        return post_recv(c, o, (v - low + o->root) % size, o->recv, o->n, err);
    }
    if (o->stage == 2) return TR_OK;
    o->stage = 2;
    o->readable = true;
    for (int bit = low >> 1; bit && st == TR_OK; bit >>= 1)
        if (v + bit < size) st = post_send(c, o, (v + bit + o->root) % size, o->recv, o->n, err);
    return st;
}

static tr_status step_letter(tr_comm_mpi *c, operation *o, tr_err *err)
{
    if (o->stage++) return TR_OK;
    return post(c, o, o->op == TR_COMM_RECV, o->root, o->recv, o->n, err);
}

static tr_status begin_single(tr_comm *base, tr_comm_op op, int root, const void *buf, size_t bytes,
                              tr_err *err)
{
    tr_comm_mpi *c = of(base);
    operation *o = new_operation(c, op);

    if (!o) return tr_fail(err, TR_E_MEMORY, "out of memory");
    o->step = op == TR_COMM_BROADCAST ? step_broadcast : step_letter;
    o->root = root;
    o->recv = (char *)buf; /* written to by recv and broadcast only */
    o->n = bytes;
    return begin(c, o, bytes, err);
}

static tr_status letter_send(tr_comm *base, int to, const void *buf, size_t bytes,
                             tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    return begin_single(base, TR_COMM_SEND, to, buf, bytes, err);
}

static tr_status letter_recv(tr_comm *base, int from, void *buf, size_t bytes, tr_ticket *ticket,
                             tr_err *err)
{
    (void)ticket;
    return begin_single(base, TR_COMM_RECV, from, buf, bytes, err);
}

static tr_status broadcast(tr_comm *base, int root, void *buf, size_t bytes, tr_ticket *ticket,
                           tr_err *err)
{
    (void)ticket;
    return begin_single(base, TR_COMM_BROADCAST, root, buf, bytes, err);
}

/* ---- creation ---------------------------------------------------------------------------------------------------- */

/* What is in flight is given up, but for sends, whose receivers may be on their way: these have a second. Where MPI may still use
 * the scratch it is left to MPI. */
static void give_up(operation *o)
{
    const uint64_t until_ns = tr_now_ns() + UINT64_C(1000000000);

    for (int i = 0; i < o->n_requests; i++) {
        int over = 1;
        if (o->request[i] == MPI_REQUEST_NULL) continue;
        if (o->want[i] >= 0) MPI_Cancel(&o->request[i]);
        do
            MPI_Test(&o->request[i], &over, MPI_STATUS_IGNORE);
        while (!over && o->want[i] < 0 && tr_now_ns() < until_ns);
        if (over) continue;
        MPI_Request_free(&o->request[i]);
        o->scratch = NULL;
    }
}

static void free_comm(tr_comm *base)
{
    tr_comm_mpi *c = of(base), **at = &c->world->comms;

    while (*at && *at != c)
        at = &(*at)->next;
    if (*at) *at = c->next;
    while (c->flying) {
        operation *o = c->flying;
        c->flying = o->next;
        give_up(o);
        free_operation(o);
    }
    while (c->idle) {
        operation *o = c->idle;
        c->idle = o->next;
        free_operation(o);
    }
    if (c->comm != MPI_COMM_NULL) MPI_Comm_free(&c->comm);
    free(c);
}

static const tr_comm_impl mpi_impl = {
    .all_reduce = all_reduce,
    .all_gather = all_gather,
    .reduce_scatter = reduce_scatter,
    .all_to_all = all_to_all,
    .send = letter_send,
    .recv = letter_recv,
    .broadcast = broadcast,
    .all_max = all_max,
    .wait = wait_for,
    .wait_read = wait_read,
    .progress = progress,
    .free = free_comm,
};

/* More threads of this job on this host than cores: whoever waits keeps somebody from working. */
static bool is_crowded(const tr_world *world)
{
    return (long)world->local_size * omp_get_max_threads() > sysconf(_SC_NPROCESSORS_ONLN);
}

tr_status tr_comm_split(tr_comm **out, tr_world *world, int color, int key, const char *name,
                        tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Comm comm = MPI_COMM_NULL;
    tr_comm_mpi *c = NULL;
    int size = 0;

    *out = NULL;
    TR_MPI(MPI_Comm_split(MPI_COMM_WORLD, color < 0 ? MPI_UNDEFINED : color, key, &comm));
    if (comm == MPI_COMM_NULL) goto done;
    TR_MPI(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN));
    TR_MPI(MPI_Comm_size(comm, &size));
    if (size == 1)
        *out = tr_comm_self();
    else
        c = calloc(1, sizeof *c);
    if (!*out && !c) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    if (!c) goto done;
    TR_MPI(MPI_Comm_rank(comm, &c->base.rank));
    TR_MPI(MPI_Comm_set_name(comm, name));
    c->first = world->rank;
    TR_MPI(MPI_Bcast(&c->first, 1, MPI_INT, 0, comm));
    c->base.impl = &mpi_impl;
    c->base.size = size;
    snprintf(c->base.name, sizeof c->base.name, "%s", name);
    c->world = world;
    c->comm = comm;
    c->last = &c->flying;
    c->tests = is_crowded(world) ? TESTS_CROWDED : TESTS_ALONE;
    c->next = world->comms;
    world->comms = c;
    *out = &c->base;
    c = NULL;
    comm = MPI_COMM_NULL;

done:
    if (comm != MPI_COMM_NULL) MPI_Comm_free(&comm);
    free(c);
    return st;
}
