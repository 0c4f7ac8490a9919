/* Operations over NCCL. Each is: the communicator's stream waits for the main lane, then for a call of NCCL or a group of
 * sends and receives (with kernels around it where a sum is made of terms or rows of a cache travel), then an event that
 * marks the end, which whoever waits is made to wait for on the device.
 *
 * Events tell the host afterwards how long an operation took and how much of that a lane stood waiting. */
#include <config.h>

#include "mpi/comm_nccl.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "kernels/cuda/comm.h"
#include "mpi/comm_nccl_priv.h"
#include "mpi/flight.h"

enum {
    LOOK_NS = 50000,      /* between two looks at what has ended */
    LONG_NS = 1000000000, /* under way so long: the flight recorder is told that it is waited for */
};

static tr_comm_nccl *of(tr_comm *c)
{
    return (tr_comm_nccl *)c;
}

/* ---- what has ended ------------------------------------------------------------------------------------------------ */

static uint64_t between_ns(cudaEvent_t a, cudaEvent_t b)
{
    float ms = 0;

    if (cudaEventElapsedTime(&ms, a, b) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return ms > 0 ? (uint64_t)((double)ms * 1e6) : 0;
}

/* A lane that has not come to its wait yet, or came after the end, has not stood still. */
static void account(tr_comm_nccl *c, const tr_nccl_flying *f)
{
    tr_comm_flew(&c->base, f->op, f->ticket, between_ns(f->begun, f->ended));
    if (!f->waited) return;
    if (cudaEventQuery(f->reached) == cudaSuccess)
        c->base.waited_ns[f->op] += between_ns(f->reached, f->ended);
    else
        (void)cudaGetLastError();
}

/* Not while a lane is being recorded: the device refuses to be asked then. */
static void look(tr_comm_nccl *c)
{
    tr_flight *flight = c->nccl->world->flight;

    c->looked_ns = tr_now_ns();
    while (c->first < c->end && c->broken.status == TR_OK) {
        tr_nccl_flying *f = &c->flying[c->first % TR_NCCL_FLYING];
        const cudaError_t e = cudaEventQuery(f->ended);
        if (e == cudaErrorNotReady) {
            (void)cudaGetLastError();
            if (c->looked_ns - f->begun_ns > LONG_NS) tr_flight_wait(flight, f->flight);
            return;
        }
        if (tr_nccl_cuda("an operation on the device", e, &c->broken) != TR_OK) {
            tr_within(&c->broken, "%s of %s", tr_comm_op_name(f->op), c->base.name);
            return;
        }
        tr_nccl_stay(c->nccl);
        tr_flight_done(flight, f->flight);
        account(c, f);
        c->first++;
    }
}

static void progress(tr_comm *base)
{
    tr_comm_nccl *c = of(base);

    tr_nccl_stay(c->nccl);
    if (base->mode == TR_COMM_RUN && tr_now_ns() - c->looked_ns > LOOK_NS) look(c);
    tr_comm_progress(base->host);
}

/* A place for one more. */
static tr_nccl_flying *take_place(tr_comm_nccl *c, const tr_nccl_call *k)
{
    while (c->end - c->first == TR_NCCL_FLYING && c->broken.status == TR_OK) {
        look(c);
        tr_comm_progress(c->base.host);
        sched_yield();
    }
    if (c->broken.status != TR_OK) return NULL;
    tr_nccl_flying *f = &c->flying[c->end++ % TR_NCCL_FLYING];
    f->ticket = c->base.next_ticket;
    f->begun_ns = tr_now_ns();
    f->op = k->op;
    f->waited = false;
    return f;
}

/* ---- one operation ------------------------------------------------------------------------------------------------- */

static uint64_t next_number(tr_comm_nccl *c, tr_comm_op op)
{
    return op == TR_COMM_SEND || op == TR_COMM_RECV ? ++c->n_letters : ++c->n_collectives;
}

static tr_status fail_for_good(tr_comm_nccl *c, tr_err *err)
{
    return tr_fail(err, c->broken.status, "%s", c->broken.text);
}

static tr_status enqueue(tr_comm_nccl *c, const tr_nccl_call *k, tr_nccl_flying *f, tr_err *err)
{
    const cudaStream_t main = tr_cuda_stream(c->nccl->device, TR_LANE_MAIN);
    const uint64_t ticket = c->base.next_ticket;
    const cudaEvent_t end = f ? f->ended : c->recorded[ticket % TR_NCCL_RECORDED];
    const cudaStream_t on = k->on_main ? main : k->stream ? k->stream : c->stream;
    tr_status st = TR_OK;

    TR_CUDA(cudaSetDevice(c->nccl->ordinal));
    if (!k->on_main) {
        TR_CUDA(cudaEventRecord(c->point, main));
        TR_CUDA(cudaStreamWaitEvent(on, c->point, 0));
    }
    if (f) TR_CUDA(cudaEventRecord(f->begun, on));
    st = k->issue(c, k, err);
    if (st != TR_OK || (k->on_main && !f)) goto done; /* in a record the lane itself is the order */
    TR_CUDA(cudaEventRecord(end, on));
    if (!f) c->recorded_of[ticket % TR_NCCL_RECORDED] = ticket;

done:
    return st;
}

static tr_status run(tr_comm *base, const tr_nccl_call *k, tr_err *err)
{
    tr_comm_nccl *c = of(base);
    const uint64_t number = next_number(c, k->op);
    tr_nccl_flying *f = NULL;

    if (c->broken.status != TR_OK) return fail_for_good(c, err);
    if (base->mode == TR_COMM_NOTE) return TR_OK;
    if (base->mode == TR_COMM_RUN) {
        f = take_place(c, k);
        if (!f) return fail_for_good(c, err);
        f->flight = tr_flight_begin(c->nccl->world->flight, base->name, c->first_rank, base->size,
                                    tr_comm_op_name(k->op), number, k->bytes);
    }
    if (enqueue(c, k, f, &c->broken) == TR_OK) return TR_OK;
    if (f) c->end--; /* its end will never come */
    tr_within(&c->broken, "%s number %llu of %s", tr_comm_op_name(k->op),
              (unsigned long long)number, base->name);
    return fail_for_good(c, err);
}

static tr_status wait_for(tr_comm *base, tr_lane reader, tr_ticket ticket, tr_err *err)
{
    tr_comm_nccl *c = of(base);
    const cudaStream_t lane = tr_cuda_stream(c->nccl->device, reader);
    tr_status st = TR_OK;

    if (c->broken.status != TR_OK) return fail_for_good(c, err);
    if (base->mode == TR_COMM_NOTE) return TR_OK;
    if (base->mode == TR_COMM_RECORD) {
        /* Of a later operation, if there were that many: it ends later. Of an earlier one: this one had nothing to do. */
        const uint64_t i = ticket.n % TR_NCCL_RECORDED;
        if (c->recorded_of[i] >= ticket.n) TR_CUDA(cudaStreamWaitEvent(lane, c->recorded[i], 0));
        goto done;
    }
    for (uint64_t i = c->first; i < c->end; i++) {
        tr_nccl_flying *f = &c->flying[i % TR_NCCL_FLYING];
        if (f->ticket != ticket.n) continue;
        TR_CUDA(cudaEventRecord(f->reached, lane));
        f->waited = true;
        TR_CUDA(cudaStreamWaitEvent(lane, f->ended, 0));
        break; /* not found: the host has seen its end */
    }

done:
    return st;
}

/* ---- the table ------------------------------------------------------------------------------------------------------- */

static void give_all(tr_comm_nccl *c, size_t bytes)
{
    for (int i = 0; i < c->base.size; i++)
        if (i != c->base.rank) tr_comm_gave(&c->base, i, bytes);
}

/* What is counted as sent is what a member gives to each other one; which way NCCL takes is its own. */
static tr_status all_reduce(tr_comm *base, void *buf, size_t n, tr_dtype dtype, tr_ticket *ticket,
                            tr_err *err)
{
    const size_t bytes = n * tr_nccl_number_bytes(dtype);

    (void)ticket;
    if (!n) return TR_OK;
    give_all(of(base), bytes);
    return run(
        base,
        &(tr_nccl_call){.op = TR_COMM_ALL_REDUCE,
                        .issue = of(base)->by_terms ? tr_nccl_issue_sum : tr_nccl_issue_sum_two,
                        .send = buf,
                        .recv = buf,
                        .n = n,
                        .dtype = dtype,
                        .bytes = bytes},
        err);
}

static bool fuses(const tr_comm *base, int n_max, int d)
{
    return tr_nccl_norm_form((const tr_comm_nccl *)base, n_max, d) >= 0;
}

static tr_status reduce_norm(tr_comm *base, const struct tr_norm_args *a, tr_ticket *ticket,
                             tr_err *err)
{
    const size_t bytes = (size_t)a->n_max * (size_t)a->d * tr_act_bytes(base->ops);

    (void)ticket;
    if (!a->n_max) return TR_OK;
    for (int i = 0; i < base->size; i++)
        if (i != base->rank) tr_comm_gave(base, i, tr_nccl_norm_gives(of(base), a, i));
    return run(base,
               &(tr_nccl_call){.op = TR_COMM_ALL_REDUCE,
                               .issue = tr_nccl_issue_norm,
                               .norm = a,
                               .bytes = bytes,
                               .on_main = true},
               err);
}

static tr_status all_max(tr_comm *base, uint64_t *x, size_t n, tr_ticket *ticket, tr_err *err)
{
    const size_t bytes = n * sizeof *x;

    (void)ticket;
    if (!n) return TR_OK;
    give_all(of(base), bytes);
    return run(base,
               &(tr_nccl_call){.op = TR_COMM_ALL_MAX,
                               .issue = tr_nccl_issue_max,
                               .send = x,
                               .recv = x,
                               .n = n,
                               .bytes = bytes},
               err);
}

static tr_status reduce_scatter(tr_comm *base, const void *send, void *recv, size_t n,
                                tr_dtype dtype, tr_ticket *ticket, tr_err *err)
{
    const size_t bytes = n * tr_nccl_number_bytes(dtype);

    (void)ticket;
    if (!n) return TR_OK;
    give_all(of(base), bytes);
    return run(
        base,
        &(tr_nccl_call){.op = TR_COMM_REDUCE_SCATTER,
                        .issue = of(base)->by_terms ? tr_nccl_issue_scatter : tr_nccl_issue_sum_two,
                        .send = send,
                        .recv = recv,
                        .n = n,
                        .dtype = dtype,
                        .bytes = bytes * (size_t)base->size},
        err);
}

static tr_status all_gather(tr_comm *base, const void *send, void *recv, const size_t *bytes,
                            tr_ticket *ticket, tr_err *err)
{
    const size_t all = tr_nccl_sum(bytes, base->size);

    (void)ticket;
    if (!all) return TR_OK;
    give_all(of(base), bytes[base->rank]);
    return run(base,
               &(tr_nccl_call){.op = TR_COMM_ALL_GATHER,
                               .issue = tr_nccl_swaps(of(base), recv, all) ? tr_nccl_issue_swap
                                                                           : tr_nccl_issue_gather,
                               .send = send,
                               .recv = recv,
                               .n_recv = bytes,
                               .bytes = bytes[base->rank]},
               err);
}

static tr_status all_to_all(tr_comm *base, const void *send, const size_t *n_send, void *recv,
                            const size_t *n_recv, tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    for (int i = 0; i < base->size; i++)
        if (i != base->rank) tr_comm_gave(base, i, n_send[i]);
    return run(
        base,
        &(tr_nccl_call){.op = TR_COMM_ALL_TO_ALL,
                        .issue = tr_nccl_swaps(of(base), recv, tr_nccl_sum(n_recv, base->size))
                                     ? tr_nccl_issue_swap
                                     : tr_nccl_issue_exchange,
                        .send = send,
                        .n_send = n_send,
                        .recv = recv,
                        .n_recv = n_recv,
                        .bytes = tr_nccl_sum(n_send, base->size)},
        err);
}

static tr_status letter_send(tr_comm *base, int to, const void *buf, size_t bytes,
                             tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    if (!bytes) return TR_OK;
    tr_comm_gave(base, to, bytes);
    return run(base,
               &(tr_nccl_call){.op = TR_COMM_SEND,
                               .issue = tr_nccl_issue_letter,
                               .send = buf,
                               .n = bytes,
                               .peer = to,
                               .bytes = bytes},
               err);
}

static tr_status letter_recv(tr_comm *base, int from, void *buf, size_t bytes, tr_ticket *ticket,
                             tr_err *err)
{
    (void)ticket;
    if (!bytes) return TR_OK;
    return run(base,
               &(tr_nccl_call){.op = TR_COMM_RECV,
                               .issue = tr_nccl_issue_letter,
                               .recv = buf,
                               .n = bytes,
                               .peer = from,
                               .bytes = bytes},
               err);
}

static tr_status broadcast(tr_comm *base, int root, void *buf, size_t bytes, tr_ticket *ticket,
                           tr_err *err)
{
    (void)ticket;
    if (!bytes) return TR_OK;
    if (root == base->rank) give_all(of(base), bytes);
    return run(base,
               &(tr_nccl_call){.op = TR_COMM_BROADCAST,
                               .issue = tr_nccl_issue_broadcast,
                               .recv = buf,
                               .n = bytes,
                               .peer = root,
                               .bytes = bytes},
               err);
}

static tr_status share(tr_comm *base, const tr_share_move *move, tr_ticket *ticket, tr_err *err)
{
    (void)ticket;
    if (!tr_nccl_sum(move->bytes, base->size)) return TR_OK;
    give_all(of(base), move->bytes[base->rank]);
    const cudaStream_t pushes = tr_nccl_push_stream(of(base), move);
    return run(base,
               &(tr_nccl_call){.op = TR_COMM_ALL_GATHER,
                               .issue = pushes ? tr_nccl_issue_push : tr_nccl_issue_share,
                               .move = move,
                               .bytes = move->bytes[base->rank],
                               .stream = pushes},
               err);
}

/* ---- creation -------------------------------------------------------------------------------------------------------- */

/* The others may wait for what is under way here as long as they like: with nothing under way NCCL ends in an orderly way. */
static bool is_quiet(tr_comm_nccl *c)
{
    const uint64_t until_ns = tr_now_ns() + UINT64_C(5000000000);
    cudaError_t e = cudaErrorNotReady;

    if (c->broken.status != TR_OK || !c->stream) return false;
    const cudaStream_t main = tr_cuda_stream(c->nccl->device, TR_LANE_MAIN);
    while (((e = cudaStreamQuery(c->stream)) == cudaErrorNotReady ||
            (c->peers && (e = cudaStreamQuery(main)) == cudaErrorNotReady)) &&
           tr_now_ns() < until_ns)
        tr_comm_progress(c->base.host);
    if (e != cudaSuccess) (void)cudaGetLastError();
    return e == cudaSuccess;
}

static void destroy_event(cudaEvent_t e)
{
    if (e) cudaEventDestroy(e);
}

static void free_comm(tr_comm *base)
{
    tr_comm_nccl *c = of(base);

    tr_nccl_stay(c->nccl);
    cudaSetDevice(c->nccl->ordinal);
    const bool quiet = is_quiet(c);
    tr_nccl_disconnect(&c->seat, c->nccl, base->host, quiet);
    tr_peers_close(c->peers, quiet);
    tr_nccl_push_close(c);
    destroy_event(c->point);
    for (int i = 0; i < TR_NCCL_RECORDED; i++)
        destroy_event(c->recorded[i]);
    for (int i = 0; i < TR_NCCL_FLYING; i++) {
        destroy_event(c->flying[i].begun);
        destroy_event(c->flying[i].ended);
        destroy_event(c->flying[i].reached);
    }
    c->nccl->ops->release(c->nccl->device, c->terms);
    if (c->stream) cudaStreamDestroy(c->stream);
    free(c);
}

static const tr_comm_impl nccl_impl = {
    .all_reduce = all_reduce,
    .fuses = fuses,
    .reduce_norm = reduce_norm,
    .all_gather = all_gather,
    .reduce_scatter = reduce_scatter,
    .all_to_all = all_to_all,
    .send = letter_send,
    .recv = letter_recv,
    .broadcast = broadcast,
    .all_max = all_max,
    .wait = wait_for,
    .share = share,
    .reach = tr_nccl_reach,
    .reaches = tr_nccl_reaches,
    .leave_alone = tr_nccl_leave_alone,
    .progress = progress,
    .free = free_comm,
};

/* What moves is short beside what computes: its blocks go first where there is a choice. */
static tr_status prepare(tr_comm_nccl *c, tr_err *err)
{
    int least = 0, greatest = 0;
    tr_status st = TR_OK;

    TR_CUDA(cudaSetDevice(c->nccl->ordinal));
    TR_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    TR_CUDA(cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, greatest));
    TR_CUDA(cudaEventCreateWithFlags(&c->point, cudaEventDisableTiming));
    for (int i = 0; i < TR_NCCL_RECORDED; i++)
        TR_CUDA(cudaEventCreateWithFlags(&c->recorded[i], cudaEventDisableTiming));
    for (int i = 0; i < TR_NCCL_FLYING; i++) {
        TR_CUDA(cudaEventCreate(&c->flying[i].begun));
        TR_CUDA(cudaEventCreate(&c->flying[i].ended));
        TR_CUDA(cudaEventCreate(&c->flying[i].reached));
    }
    if (c->by_terms)
        st = c->nccl->ops->alloc(c->nccl->device, TR_NCCL_TERMS_BYTES, TR_MEMORY_DEVICE, &c->terms);
    if (st != TR_OK) tr_fail(err, st, "%s", c->nccl->ops->error(c->nccl->device));

done:
    return st;
}

static tr_status find_first(tr_comm_nccl *c, tr_err *err)
{
    tr_ticket t;

    c->first_rank = c->nccl->world->rank;
    tr_status st =
        tr_comm_broadcast(c->base.host, 0, &c->first_rank, sizeof c->first_rank, &t, err);
    return st == TR_OK ? tr_comm_wait(c->base.host, TR_LANE_MAIN, t, err) : st;
}

tr_status tr_nccl_comm(tr_comm **out, tr_nccl *nccl, tr_comm *host, unsigned flags, tr_err *err)
{
    *out = NULL;
    tr_comm_nccl *c = calloc(1, sizeof *c);
    /* Without memory for a struct the others are let down, and their limit ends it. */
    if (!c) return tr_fail(err, TR_E_MEMORY, "out of memory");
    c->nccl = nccl;
    c->base.impl = &nccl_impl;
    c->base.rank = tr_comm_rank(host);
    c->base.size = tr_comm_size(host);
    c->base.device = nccl->device;
    c->base.ops = nccl->ops;
    c->base.host = host;
    c->base.sums_bf16 = true;
    snprintf(c->base.name, sizeof c->base.name, "%s", tr_comm_name(host));
    c->by_terms = c->base.size > 2 || (flags & TR_NCCL_TERMS);
    tr_status st = prepare(c, err);
    st = tr_nccl_connect(&c->seat, nccl, host, c->base.name, (flags & TR_NCCL_BLOCKING) != 0, st,
                         err);
    if (st == TR_OK) st = find_first(c, err);
    if (st == TR_OK)
        *out = &c->base;
    else
        free_comm(&c->base);
    return st;
}
