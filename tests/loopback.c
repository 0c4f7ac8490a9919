#include <config.h>

#include "loopback.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/size.h"
#include "mpi/comm_priv.h"

enum { PATIENCE_S = 10 };

/* What one member gave to a collective. */
typedef struct part {
    void *data;     /* a copy */
    size_t *n_send; /* [size] bytes for each member */
    size_t *n_recv; /* [size] bytes wanted from each */
    bool posted;
} part;

/* The k-th collective of a group. */
typedef struct meeting {
    struct meeting *next;
    uint64_t k;
    tr_comm_op op;
    int root, n_posted, n_done;
    bool mismatch;
    part *part; /* [size] */
} meeting;

typedef struct letter { /* sent and not yet received, in order per pair */
    struct letter *next;
    int from, to;
    size_t n;
    void *data;
} letter;

struct tr_loopback {
    int size;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    meeting *meetings;
    letter *letters;
};

typedef struct pending { /* begun by this member and not yet waited for; newest first */
    struct pending *next;
    uint64_t ticket, k;
    tr_comm_op op;
    const void *send;
    void *recv;
    void *kept; /* SEND: a copy, to see that the buffer stayed */
    size_t n;   /* SEND, RECV: bytes */
    int peer;   /* the root, of a broadcast */
} pending;

typedef struct member {
    tr_comm base;
    tr_loopback *l;
    uint64_t n_meetings;
    pending *begun;
} member;

static void *copy_of(const void *data, size_t n)
{
    void *p = malloc(n ? n : 1);
    if (p && n) memcpy(p, data, n);
    return p;
}

static size_t sum(const size_t *n, int count)
{
    size_t s = 0;
    for (int i = 0; i < count; i++)
        s += n[i];
    return s;
}

static void free_meeting(meeting *m, int size)
{
    for (int i = 0; i < size; i++) {
        free(m->part[i].data);
        free(m->part[i].n_send);
        free(m->part[i].n_recv);
    }
    free(m->part);
    free(m);
}

/* Locked. */
static meeting *find_meeting(tr_loopback *l, uint64_t k)
{
    meeting *m = l->meetings;
    while (m && m->k != k)
        m = m->next;
    return m;
}

/* Locked: the meeting of number k, made by whoever comes first. */
static meeting *enter_meeting(tr_loopback *l, uint64_t k, tr_comm_op op, int root)
{
    meeting *m = find_meeting(l, k);

    if (m) {
        if (m->op != op || m->root != root) m->mismatch = true;
        return m;
    }
    m = calloc(1, sizeof *m);
    if (!m) return NULL;
    *m = (meeting){.next = l->meetings, .k = k, .op = op, .root = root};
    m->part = tr_calloc((size_t)l->size, sizeof *m->part);
    if (!m->part) {
        free(m);
        return NULL;
    }
    l->meetings = m;
    return m;
}

static tr_status remember(member *b, pending p, tr_err *err)
{
    pending *q = malloc(sizeof *q);

    if (!q) return tr_fail(err, TR_E_MEMORY, "out of memory");
    *q = p;
    q->ticket = b->base.next_ticket;
    q->next = b->begun;
    b->begun = q;
    return TR_OK;
}

/* Copies of what this member gives: sum(n_send) bytes, and the sizes. */
static tr_status post(tr_comm *c, tr_comm_op op, int root, const void *send, const size_t *n_send,
                      void *recv, const size_t *n_recv, tr_err *err)
{
    member *b = (member *)c;
    tr_loopback *l = b->l;
    size_t counts = (size_t)c->size * sizeof(size_t);
    part given = {.data = copy_of(send, sum(n_send, c->size)),
                  .n_send = copy_of(n_send, counts),
                  .n_recv = copy_of(n_recv, counts),
                  .posted = true};
    tr_status st = remember(
        b, (pending){.op = op, .k = b->n_meetings, .send = send, .recv = recv, .peer = root}, err);

    pthread_mutex_lock(&l->lock);
    meeting *m = st == TR_OK ? enter_meeting(l, b->n_meetings, op, root) : NULL;
    if (m && given.data && given.n_send && given.n_recv) {
        m->part[c->rank] = given;
        m->n_posted++;
        b->n_meetings++;
        pthread_cond_broadcast(&l->changed);
    } else {
        free(given.data);
        free(given.n_send);
        free(given.n_recv);
        if (st == TR_OK) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    pthread_mutex_unlock(&l->lock);
    return st;
}

/* The same number for every member. */
static void fill(size_t *n, int size, size_t value)
{
    for (int i = 0; i < size; i++)
        n[i] = value;
}

static tr_status post_even(tr_comm *c, tr_comm_op op, int root, const void *send, size_t n_send,
                           void *recv, size_t n_recv, tr_err *err)
{
    size_t *n = tr_calloc(2 * (size_t)c->size, sizeof *n);
    tr_status st;

    if (!n) return tr_fail(err, TR_E_MEMORY, "out of memory");
    fill(n, c->size, n_send);
    fill(n + c->size, c->size, n_recv);
    st = post(c, op, root, send, n, recv, n + c->size, err);
    free(n);
    return st;
}

/* In all of them the data lies as [member] stretches of n_send[member] bytes. A reduction of n elements over all members is
 * one stretch (the first; the rest are empty). */
static tr_status loop_all_reduce(tr_comm *c, void *buf, size_t n, tr_dtype dtype, tr_ticket *ticket,
                                 tr_err *err)
{
    size_t *sizes = tr_calloc((size_t)c->size, sizeof *sizes);
    tr_status st;

    (void)dtype, (void)ticket;
    if (!sizes) return tr_fail(err, TR_E_MEMORY, "out of memory");
    sizes[0] = n * sizeof(float);
    st = post(c, TR_COMM_ALL_REDUCE, 0, buf, sizes, buf, sizes, err);
    free(sizes);
    return st;
}

static tr_status loop_all_gather(tr_comm *c, const void *send, void *recv, const size_t *bytes,
                                 tr_ticket *ticket, tr_err *err)
{
    size_t *mine = tr_calloc((size_t)c->size, sizeof *mine);
    tr_status st;

    (void)ticket;
    if (!mine) return tr_fail(err, TR_E_MEMORY, "out of memory");
    mine[0] = bytes[c->rank];
    st = post(c, TR_COMM_ALL_GATHER, 0, send, mine, recv, bytes, err);
    free(mine);
    return st;
}

static tr_status loop_reduce_scatter(tr_comm *c, const void *send, void *recv, size_t n,
                                     tr_dtype dtype, tr_ticket *ticket, tr_err *err)
{
    (void)dtype, (void)ticket;
    return post_even(c, TR_COMM_REDUCE_SCATTER, 0, send, n * sizeof(float), recv, n * sizeof(float),
                     err);
}

static tr_status loop_all_to_all(tr_comm *c, const void *send, const size_t *n_send, void *recv,
                                 const size_t *n_recv, tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    return post(c, TR_COMM_ALL_TO_ALL, 0, send, n_send, recv, n_recv, err);
}

static tr_status loop_broadcast(tr_comm *c, int root, void *buf, size_t bytes, tr_ticket *ticket,
                                tr_err *err)
{
    size_t *sizes = tr_calloc(2 * (size_t)c->size, sizeof *sizes);
    tr_status st;

    (void)ticket;
    if (!sizes) return tr_fail(err, TR_E_MEMORY, "out of memory");
    sizes[0] = c->rank == root ? bytes : 0;
    sizes[c->size + root] = bytes;
    st = post(c, TR_COMM_BROADCAST, root, buf, sizes, buf, sizes + c->size, err);
    free(sizes);
    return st;
}

static tr_status loop_all_max(tr_comm *c, uint64_t *x, size_t n, tr_ticket *ticket, tr_err *err)
{
    size_t *sizes = tr_calloc((size_t)c->size, sizeof *sizes);
    tr_status st;

    (void)ticket;
    if (!sizes) return tr_fail(err, TR_E_MEMORY, "out of memory");
    sizes[0] = n * sizeof *x;
    st = post(c, TR_COMM_ALL_MAX, 0, x, sizes, x, sizes, err);
    free(sizes);
    return st;
}

static tr_status loop_send(tr_comm *c, int to, const void *buf, size_t n, tr_ticket *ticket,
                           tr_err *err)
{
    member *b = (member *)c;
    letter *s = calloc(1, sizeof *s);
    pending p = {.op = TR_COMM_SEND, .send = buf, .n = n, .kept = copy_of(buf, n)};
    tr_status st;

    (void)ticket;
    if (s) *s = (letter){.from = c->rank, .to = to, .n = n, .data = copy_of(buf, n)};
    if (!s || !s->data || !p.kept)
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    else
        st = remember(b, p, err);
    if (st != TR_OK) {
        if (s) free(s->data);
        free(s);
        free(p.kept);
        return st;
    }
    pthread_mutex_lock(&b->l->lock);
    letter **end = &b->l->letters;
    while (*end)
        end = &(*end)->next;
    *end = s;
    pthread_cond_broadcast(&b->l->changed);
    pthread_mutex_unlock(&b->l->lock);
    return TR_OK;
}

static tr_status loop_recv(tr_comm *c, int from, void *buf, size_t n, tr_ticket *ticket,
                           tr_err *err)
{
    (void)ticket;
    return remember((member *)c, (pending){.op = TR_COMM_RECV, .recv = buf, .n = n, .peer = from},
                    err);
}

/* ---- wait --------------------------------------------------------------------------------------------------------- */

/* Locked; false: nothing changed in time. */
static bool await_change(tr_loopback *l, const struct timespec *until)
{
    return pthread_cond_timedwait(&l->changed, &l->lock, until) != ETIMEDOUT;
}

static struct timespec deadline(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += PATIENCE_S;
    return t;
}

/* Begin of member j's stretch in member i's data. */
static size_t offset(const part *p, int j)
{
    return sum(p->n_send, j);
}

static bool sizes_match(const meeting *m, int rank, int size)
{
    const part *me = &m->part[rank];

    for (int i = 0; i < size; i++) {
        const part *p = &m->part[i];
        switch (m->op) {
        case TR_COMM_ALL_REDUCE:
        case TR_COMM_ALL_MAX:
        case TR_COMM_REDUCE_SCATTER:
            if (memcmp(p->n_send, me->n_send, (size_t)size * sizeof(size_t))) return false;
            break;
        case TR_COMM_ALL_TO_ALL:
            for (int j = 0; j < size; j++)
                if (p->n_send[j] != m->part[j].n_recv[i]) return false;
            break;
        case TR_COMM_BROADCAST:
            p = &m->part[m->root];
            if (p->n_recv[m->root] != me->n_recv[m->root]) return false;
            break;
        default: /* ALL_GATHER: all agree on what each gives */
            if (memcmp(p->n_recv, me->n_recv, (size_t)size * sizeof(size_t))) return false;
        }
    }
    return true;
}

static void add_up(float *out, const meeting *m, int size, size_t at, size_t n)
{
    memcpy(out, (const char *)m->part[0].data + at, n * sizeof *out);
    for (int i = 1; i < size; i++) {
        const float *x = (const float *)((const char *)m->part[i].data + at);
        for (size_t k = 0; k < n; k++)
            out[k] += x[k];
    }
}

static void largest(uint64_t *out, const meeting *m, int size, size_t n)
{
    memcpy(out, m->part[0].data, n * sizeof *out);
    for (int i = 1; i < size; i++) {
        const uint64_t *x = m->part[i].data;
        for (size_t k = 0; k < n; k++)
            if (x[k] > out[k]) out[k] = x[k];
    }
}

/* Everybody has posted; parts do not change any more and live until all are done. */
static void deliver(const meeting *m, const pending *p, int rank, int size)
{
    const part *me = &m->part[rank];
    char *out = p->recv;

    if (m->op == TR_COMM_ALL_REDUCE) {
        if (me->n_send[0]) add_up(p->recv, m, size, 0, me->n_send[0] / sizeof(float));
    } else if (m->op == TR_COMM_ALL_MAX) {
        if (me->n_send[0]) largest(p->recv, m, size, me->n_send[0] / sizeof(uint64_t));
    } else if (m->op == TR_COMM_REDUCE_SCATTER) {
        size_t n = me->n_send[rank];
        if (n) add_up(p->recv, m, size, n * (size_t)rank, n / sizeof(float));
    } else {
        for (int i = 0; i < size; i++) {
            const part *from = &m->part[i];
            size_t at = m->op == TR_COMM_ALL_TO_ALL ? offset(from, rank) : 0, n = me->n_recv[i];
            if (n) memcpy(out, (const char *)from->data + at, n);
            out += n;
        }
    }
}

/* A broadcast is over for whoever gets it when the root has given it; for the root when all have come. */
static bool all_is_here(const meeting *m, int rank, int size)
{
    if (m->op == TR_COMM_BROADCAST && rank != m->root) return m->part[m->root].posted;
    return m->n_posted == size;
}

static tr_status wait_meeting(member *b, const pending *p, tr_err *err)
{
    tr_loopback *l = b->l;
    tr_status st = TR_OK;
    struct timespec until = deadline();

    pthread_mutex_lock(&l->lock);
    meeting *m = find_meeting(l, p->k);
    if (!m) st = tr_fail(err, TR_E_COMM, "loop-back: the call had failed");
    while (m && !all_is_here(m, b->base.rank, l->size) && !m->mismatch && st == TR_OK)
        if (!await_change(l, &until))
            st = tr_fail(err, TR_E_COMM, "loop-back: a member did not come");
    if (st == TR_OK && m->mismatch) st = tr_fail(err, TR_E_COMM, "loop-back: calls do not match");
    pthread_mutex_unlock(&l->lock);
    if (st != TR_OK) return st;

    const part *me = &m->part[b->base.rank];
    size_t given = sum(me->n_send, l->size);
    if (!sizes_match(m, b->base.rank, l->size))
        st = tr_fail(err, TR_E_COMM, "loop-back: sizes do not match");
    else if (given && memcmp(me->data, p->send, given))
        st = tr_fail(err, TR_E_COMM, "loop-back: the buffer changed before wait");
    else
        deliver(m, p, b->base.rank, l->size);

    pthread_mutex_lock(&l->lock);
    if (++m->n_done == l->size) {
        meeting **q = &l->meetings;
        while (*q != m)
            q = &(*q)->next;
        *q = m->next;
        free_meeting(m, l->size);
    }
    pthread_mutex_unlock(&l->lock);
    return st;
}

/* Locked: takes the oldest letter for this member. */
static letter *take_letter(tr_loopback *l, int from, int to)
{
    for (letter **q = &l->letters; *q; q = &(*q)->next)
        if ((*q)->from == from && (*q)->to == to) {
            letter *found = *q;
            *q = found->next;
            return found;
        }
    return NULL;
}

static tr_status wait_recv(member *b, const pending *p, tr_err *err)
{
    tr_loopback *l = b->l;
    tr_status st = TR_OK;
    struct timespec until = deadline();
    letter *s;

    pthread_mutex_lock(&l->lock);
    while (!(s = take_letter(l, p->peer, b->base.rank)) && st == TR_OK)
        if (!await_change(l, &until)) st = tr_fail(err, TR_E_COMM, "loop-back: nothing was sent");
    pthread_mutex_unlock(&l->lock);
    if (!s) return st;
    st = TR_OK;
    if (s->n != p->n)
        st = tr_fail(err, TR_E_COMM, "loop-back: sizes do not match");
    else if (s->n)
        memcpy(p->recv, s->data, s->n);
    free(s->data);
    free(s);
    return st;
}

/* Receives of one pair match in the order in which they were begun: elder ones first. */
static tr_status finish(member *b, pending **at, tr_err *err);

static tr_status finish_elder_receives(member *b, pending *p, tr_err *err)
{
    tr_status st = TR_OK;

    for (;;) {
        pending **elder = NULL;
        for (pending **q = &p->next; *q; q = &(*q)->next)
            if ((*q)->op == TR_COMM_RECV && (*q)->peer == p->peer)
                elder = q; /* the last: the eldest */
        if (!elder || st != TR_OK) return st;
        pending *e = *elder;
        *elder = e->next;
        st = wait_recv(b, e, err);
        free(e);
    }
}

static tr_status finish(member *b, pending **at, tr_err *err)
{
    pending *p = *at;
    tr_status st = TR_OK;

    if (p->op == TR_COMM_RECV) {
        st = finish_elder_receives(b, p, err);
        if (st == TR_OK) st = wait_recv(b, p, err);
    } else if (p->op == TR_COMM_SEND) {
        if (p->n && memcmp(p->kept, p->send, p->n))
            st = tr_fail(err, TR_E_COMM, "loop-back: the buffer changed before wait");
    } else {
        st = wait_meeting(b, p, err);
    }
    *at = p->next;
    free(p->kept);
    free(p);
    return st;
}

/* A ticket that is no longer pending was waited for before. */
static tr_status loop_wait(tr_comm *c, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    member *b = (member *)c;

    (void)reader;
    for (pending **q = &b->begun; *q; q = &(*q)->next) {
        if ((*q)->ticket != ticket.n) continue;
        const tr_comm_op op = (*q)->op;
        const uint64_t begun_ns = tr_now_ns();
        tr_status st = finish(b, q, err);
        c->waited_ns[op] += tr_now_ns() - begun_ns;
        return st;
    }
    return TR_OK;
}

/* The root of a broadcast may go on; that it leaves the buffer alone shows when it waits. */
static tr_status loop_wait_read(tr_comm *c, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    for (const pending *p = ((member *)c)->begun; p; p = p->next)
        if (p->ticket == ticket.n && p->op == TR_COMM_BROADCAST && p->peer == c->rank) return TR_OK;
    return loop_wait(c, reader, ticket, err);
}

static void loop_progress(tr_comm *c)
{
    (void)c;
}

static void loop_free(tr_comm *c)
{
    member *b = (member *)c;

    while (b->begun) {
        pending *p = b->begun;
        b->begun = p->next;
        free(p->kept);
        free(p);
    }
    free(b);
}

static const tr_comm_impl loop_impl = {
    .all_reduce = loop_all_reduce,
    .all_gather = loop_all_gather,
    .reduce_scatter = loop_reduce_scatter,
    .all_to_all = loop_all_to_all,
    .send = loop_send,
    .recv = loop_recv,
    .broadcast = loop_broadcast,
    .all_max = loop_all_max,
    .wait = loop_wait,
    .wait_read = loop_wait_read,
    .progress = loop_progress,
    .free = loop_free,
};

tr_loopback *tr_loopback_create(int size)
{
    tr_loopback *l = calloc(1, sizeof *l);
    pthread_condattr_t attr;

    if (!l) return NULL;
    l->size = size;
    pthread_mutex_init(&l->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&l->changed, &attr);
    pthread_condattr_destroy(&attr);
    return l;
}

tr_comm *tr_loopback_comm(tr_loopback *l, int rank)
{
    member *b = calloc(1, sizeof *b);

    if (!b) return NULL;
    b->base = (tr_comm){.impl = &loop_impl, .rank = rank, .size = l->size, .name = "loop-back"};
    b->l = l;
    return &b->base;
}

void tr_loopback_free(tr_loopback *l)
{
    if (!l) return;
    while (l->meetings) {
        meeting *m = l->meetings;
        l->meetings = m->next;
        free_meeting(m, l->size);
    }
    while (l->letters) {
        letter *s = l->letters;
        l->letters = s->next;
        free(s->data);
        free(s);
    }
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
    free(l);
}
