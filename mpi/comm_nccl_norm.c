/* Sums with a norm behind them over peer memory (kernels/cuda/peer.h): opening the slots, measuring which way is the fastest for
 * how many rows, and the operation itself. It goes to the main lane: whoever needs the norm waits for the sum anyway, and two
 * streams' events would cost more than the hop over NVLink. */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/order.h"
#include "base/size.h"
#include "kernels/cuda/comm.h"
#include "mpi/comm_nccl_priv.h"

enum {
    BYTES_MOST = 4 << 20, /* of the rows of a launch; above, NCCL's rings have the better of it */
    A_RECORD = 16,        /* operations in one go */
    WARM_UP = 2,
    TIMES = 15,
    LIMIT_S = 10, /* for what takes some 0.1 ms once everybody is there */
    TRIED = 7,    /* rows, to see whether the sums are right */
};

/* ---- the operation --------------------------------------------------------------------------------------------------- */

/* k such that 2^(k - 1) < rows <= 2^k. */
static int size_of(int rows)
{
    int k = 0;

    while (k < 31 && 1 << k < rows)
        k++;
    return k;
}

int tr_nccl_norm_form(const tr_comm_nccl *c, int n_max, int d)
{
    const int k = size_of(n_max);

    if (!c->peers || d != c->fused.d || n_max < 0 || k >= TR_PEER_SIZES || c->form[k] < 0)
        return -1;
    return n_max <= tr_cuda_peer_rows(&c->fused, (tr_cuda_peer_form)c->form[k]) ? c->form[k] : -1;
}

/* Rows that member i adds up in form TWO: i, i + size, .. */
static int rows_of(const tr_comm_nccl *c, int n_max, int i)
{
    return i < n_max ? (n_max - i - 1) / c->base.size + 1 : 0;
}

size_t tr_nccl_norm_gives(const tr_comm_nccl *c, const struct tr_norm_args *a, int member)
{
    const size_t row = (size_t)a->d * tr_act_bytes(c->base.ops);
    const int rows = tr_nccl_norm_form(c, a->n_max, a->d) == TR_CUDA_PEER_TWO
                         ? rows_of(c, a->n_max, member) + rows_of(c, a->n_max, c->base.rank)
                         : a->n_max;

    return (size_t)rows * row;
}

tr_status tr_nccl_issue_norm(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const int form = tr_nccl_norm_form(c, k->norm->n_max, k->norm->d);

    return tr_nccl_cuda("peer_norm",
                        tr_cuda_peer_norm(&c->fused, (tr_cuda_peer_form)form, k->norm,
                                          tr_cuda_stream(c->nccl->device, TR_LANE_MAIN)),
                        err);
}

/* ---- slots ----------------------------------------------------------------------------------------------------------- */

static int rows_most(const tr_comm_nccl *c, int d)
{
    const size_t row = (size_t)d * tr_act_bytes(c->base.ops);
    const size_t most = BYTES_MOST / row, enough = (size_t)1 << (TR_PEER_SIZES - 1);

    return (int)(most < enough ? most : enough);
}

/* Slots in every member's memory, all ones; counters; and the kernels on the device. report->why: it cannot be. */
static tr_status open_slots(tr_comm_nccl *c, int d, tr_peer_report *report, tr_err *err)
{
    const int rows = d > 0 ? rows_most(c, d) : 0;
    const size_t bytes = tr_cuda_peer_slots(c->base.size, d, rows);
    tr_cuda_peer_group g = {.rank = c->base.rank, .n_members = c->base.size, .d = d, .rows = rows};
    const size_t words = TR_CUDA_PEER_WORDS * sizeof *g.words;
    tr_peer_place slots, counters;
    tr_peers *peers = NULL;
    tr_status st = TR_OK;

    if (!bytes) {
        snprintf(report->why, sizeof report->why, "rows of %d numbers among %d members", d,
                 c->base.size);
        return TR_OK;
    }
    /* A kernel that cannot be loaded here cannot be waited for elsewhere: it fails before the window is opened. */
    TR_CUDA(cudaSetDevice(c->nccl->ordinal));
    TR_CUDA(tr_cuda_peer_load(&g));
    st = tr_peers_open(&peers, c->nccl, c->base.host, bytes + 2 * 256 + words, 0xff, report->why,
                       sizeof report->why, err);
    if (st != TR_OK || !peers) goto done;
    st = tr_peers_take(peers, bytes, &slots, err);
    if (st == TR_OK) st = tr_peers_take(peers, words, &counters, err);
    if (st != TR_OK) goto done;
    memcpy(g.slots, slots.at, sizeof g.slots);
    g.words = (uint32_t *)(void *)counters.at[g.rank];
    g.abort = tr_peers_abort(peers);
    TR_CUDA(cudaMemset(g.words, 0, words));
    TR_CUDA(cudaDeviceSynchronize());
    c->fused = g;
    c->peers = peers;
    peers = NULL;

done:
    tr_peers_close(peers, true);
    return st;
}

/* ---- measuring --------------------------------------------------------------------------------------------------------- */

typedef struct trial {
    tr_comm_nccl *c;
    void *add, *out;
    float *residual, *weight;
    int32_t *n;
    cudaEvent_t *event; /* [WARM_UP + times + 1], one between two replays */
    double *seconds;    /* [times] */
    int d, times;
} trial;

static struct tr_norm_args args_of(const trial *t, int rows)
{
    return (struct tr_norm_args){.n = t->n,
                                 .n_max = rows,
                                 .d = t->d,
                                 .add = t->add,
                                 .ld_add = (size_t)t->d,
                                 .residual = t->residual,
                                 .ld_residual = (size_t)t->d,
                                 .weight = t->weight,
                                 .eps = 1e-6f,
                                 .out = t->out,
                                 .ld_out = (size_t)t->d};
}

static tr_status take(const trial *t, size_t bytes, void *out, tr_err *err)
{
    const tr_ops *ops = t->c->base.ops;
    tr_device *device = t->c->base.device;
    void *p = NULL;
    tr_status st = ops->alloc(device, bytes, TR_MEMORY_DEVICE, &p);

    memcpy(out, &p, sizeof p);
    if (st != TR_OK) return tr_fail(err, st, "%s", ops->error(device));
    return tr_nccl_cuda("cudaMemset", cudaMemset(p, 0, bytes), err);
}

static tr_status prepare(trial *t, int rows, tr_err *err)
{
    const size_t numbers = (size_t)rows * (size_t)t->d, row = (size_t)t->d * sizeof(float);
    const size_t act = tr_act_bytes(t->c->base.ops);
    tr_status st = TR_OK;

    t->seconds = tr_calloc((size_t)t->times, sizeof *t->seconds);
    t->event = tr_calloc((size_t)t->times + WARM_UP + 1, sizeof *t->event);
    if (!t->seconds || !t->event) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i <= WARM_UP + t->times; i++)
        TR_CUDA(cudaEventCreate(&t->event[i]));
    st = take(t, numbers * act, &t->add, err);
    if (st == TR_OK) st = take(t, numbers * act, &t->out, err);
    if (st == TR_OK) st = take(t, numbers * sizeof(float), &t->residual, err);
    if (st == TR_OK) st = take(t, row, &t->weight, err);
    if (st == TR_OK) st = take(t, sizeof *t->n, &t->n, err);
    if (st == TR_OK) TR_CUDA(cudaDeviceSynchronize());

done:
    return st;
}

/* After a failure something may still be under way that uses the memory: it goes with the device. */
static void clear(trial *t, bool well)
{
    void *const memory[] = {t->add, t->out, t->residual, t->weight, t->n};

    for (int i = 0; i < 5 && well; i++)
        t->c->base.ops->release(t->c->base.device, memory[i]);
    for (int i = 0; t->event && i <= WARM_UP + t->times; i++)
        if (t->event[i]) cudaEventDestroy(t->event[i]);
    free(t->event);
    free(t->seconds);
}

/* One sum and norm, as a layer would have it. form -1: NCCL's. */
static tr_status once(const trial *t, int form, int rows, tr_err *err)
{
    tr_comm *comm = &t->c->base;
    const struct tr_norm_args a = args_of(t, rows);
    tr_ticket ticket;
    tr_status st;

    if (form >= 0) return tr_comm_reduce_norm(comm, &a, err);
    st =
        tr_comm_all_reduce(comm, t->add, (size_t)rows * (size_t)t->d, comm->ops->act, &ticket, err);
    if (st == TR_OK) st = tr_comm_wait(comm, TR_LANE_MAIN, ticket, err);
    if (st != TR_OK) return st;
    st = comm->ops->norm(comm->device, TR_LANE_MAIN, &a);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "%s", comm->ops->error(comm->device));
}

static tr_status several(const trial *t, int form, int rows, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < A_RECORD && st == TR_OK; i++)
        st = once(t, form, rows, err);
    return st;
}

static tr_status record(const trial *t, int form, int rows, tr_graph **out, tr_err *err)
{
    tr_comm *comm = &t->c->base;
    const tr_ops *ops = comm->ops;
    tr_status st = ops->graph_begin(comm->device, TR_LANE_MAIN);

    if (st != TR_OK) return tr_fail(err, st, "graph: %s", ops->error(comm->device));
    tr_comm_set_mode(comm, TR_COMM_RECORD);
    st = several(t, form, rows, err);
    tr_comm_set_mode(comm, TR_COMM_RUN);
    if (st != TR_OK) {
        ops->graph_end(comm->device, TR_LANE_MAIN, NULL);
        return st;
    }
    st = ops->graph_end(comm->device, TR_LANE_MAIN, out);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "graph: %s", ops->error(comm->device));
}

/* The last event, or TR_E_COMM after the limit: no watchdog runs yet, and nobody else would end it. */
static cudaError_t await_until(const trial *t, double seconds)
{
    const uint64_t until_ns = tr_now_ns() + (uint64_t)(seconds * 1e9);
    cudaError_t e;

    while ((e = cudaEventQuery(t->event[WARM_UP + t->times])) == cudaErrorNotReady &&
           tr_now_ns() < until_ns)
        tr_comm_progress(t->c->base.host);
    return e;
}

static tr_status await_end(const trial *t, tr_err *err)
{
    const cudaError_t e = await_until(t, LIMIT_S);

    if (e != cudaErrorNotReady) return tr_nccl_cuda("a sum of rows", e, err);
    *t->c->nccl->abort_h = 1;
    await_until(t, 1); /* it leaves */
    (void)cudaGetLastError();
    return tr_fail(err, TR_E_COMM, "the other members' rows have not come within %d s", LIMIT_S);
}

/* Replay i took from event i to the next one. */
static tr_status settle(const trial *t, double *median, tr_err *err)
{
    tr_status st = await_end(t, err);

    for (int i = 0; i < t->times && st == TR_OK; i++) {
        float ms = 0;
        st = tr_nccl_cuda(
            "cudaEventElapsedTime",
            cudaEventElapsedTime(&ms, t->event[WARM_UP + i], t->event[WARM_UP + i + 1]), err);
        t->seconds[i] = (double)ms * 1e-3 / A_RECORD;
    }
    if (st != TR_OK) return st;
    *median = tr_median(t->seconds, t->times);
    return TR_OK;
}

/* Seconds that one takes, of the slowest member. The first run makes NCCL's connections. The others follow each other without
 * the host: sums keep the members together. */
static tr_status measure(const trial *t, int form, int rows, double *out, tr_err *err)
{
    tr_comm *comm = &t->c->base;
    const tr_ops *ops = comm->ops;
    const cudaStream_t main = tr_cuda_stream(comm->device, TR_LANE_MAIN);
    const bool graphs = (ops->caps & TR_CAP_GRAPH) != 0;
    double none = 0;
    tr_graph *graph = NULL;
    tr_status st = several(t, form, rows, err);

    if (st == TR_OK && graphs) st = record(t, form, rows, &graph, err);
    if (st == TR_OK) st = tr_comm_max_number(comm->host, &none, err); /* all are here */
    for (int i = 0; i < WARM_UP + t->times && st == TR_OK; i++) {
        TR_CUDA(cudaEventRecord(t->event[i], main));
        st = graphs ? ops->graph_run(comm->device, TR_LANE_MAIN, graph)
                    : several(t, form, rows, err);
        if (st != TR_OK && graphs) tr_fail(err, st, "graph: %s", ops->error(comm->device));
    }
    if (st != TR_OK) goto done;
    TR_CUDA(cudaEventRecord(t->event[WARM_UP + t->times], main));
    st = settle(t, out, err);
    if (st == TR_OK) st = tr_comm_max_number(comm->host, out, err);

done:
    if (graph) ops->graph_free(comm->device, graph);
    return st;
}

/* NCCL's sum in its own order. */
static tr_status measure_plain(const trial *t, int rows, double *out, tr_err *err)
{
    const bool by_terms = t->c->by_terms;

    t->c->by_terms = false;
    const tr_status st = measure(t, -1, rows, out, err);
    t->c->by_terms = by_terms;
    return st;
}

/* Is form, not NCCL's, to be taken rather than best? As fast as NCCL's is enough: it has a kernel less. */
static bool is_better(const tr_peer_options *o, int form, int best, double *const seconds[])
{
    if (best < 0 && o->use == TR_PEER_ON) return true;
    return best < 0 ? *seconds[form + 1] <= *seconds[0] : *seconds[form + 1] < *seconds[best + 1];
}

/* Row k of the report, and what such rows take from now on. */
static tr_status choose(trial *t, const tr_peer_options *o, int k, tr_peer_report *report,
                        tr_err *err)
{
    static const char *const name[] = {"nccl", "one-shot", "two-shot"};
    tr_comm_nccl *c = t->c;
    const int rows = 1 << k;
    const int32_t live = rows;
    double *const seconds[] = {&report->size[k].nccl_s, &report->size[k].one_s,
                               &report->size[k].two_s};
    tr_status st = tr_nccl_cuda("cudaMemcpy",
                                cudaMemcpy(t->n, &live, sizeof live, cudaMemcpyHostToDevice), err);
    int best = -1;

    for (int form = -1; form < TR_CUDA_PEER_FORMS && st == TR_OK; form++) {
        *seconds[form + 1] = 0;
        c->form[k] = form;
        if (form >= 0 &&
            (tr_nccl_norm_form(c, rows, t->d) < 0 || (o->shots && o->shots != form + 1)))
            continue;
        st = measure(t, form, rows, seconds[form + 1], err);
        if (form >= 0 && is_better(o, form, best, seconds)) best = form;
    }
    if (st == TR_OK && o->plain) st = measure_plain(t, rows, &report->size[k].plain_s, err);
    c->form[k] = best;
    report->size[k].rows = rows;
    report->size[k].chosen = name[best + 1];
    return st;
}

/* ---- does it work at all? ------------------------------------------------------------------------------------------------ */

/* Some rows' sums, as form makes them, to `sums`, [TRIED * d]. */
static tr_status try_form(const trial *t, int form, float *sums, tr_err *err)
{
    const size_t numbers = TRIED * (size_t)t->d;
    const int32_t live = TRIED;
    const int k = size_of(TRIED), before = t->c->form[k];
    tr_status st = TR_OK;

    TR_CUDA(cudaMemcpy(t->n, &live, sizeof live, cudaMemcpyHostToDevice));
    TR_CUDA(cudaMemset(t->residual, 0, numbers * sizeof(float)));
    /* numbers around 0.01, of another mantissa on every member */
    TR_CUDA(cudaMemset(t->add, 0x3c + t->c->base.rank % 2, numbers * tr_act_bytes(t->c->base.ops)));
    TR_CUDA(
        cudaMemset(t->add, 0x21 + t->c->base.rank, (size_t)t->d * tr_act_bytes(t->c->base.ops)));
    TR_CUDA(cudaDeviceSynchronize());
    t->c->form[k] = form;
    st = once(t, form, TRIED, err);
    t->c->form[k] = before;
    if (st != TR_OK) goto done;
    TR_CUDA(cudaEventRecord(t->event[WARM_UP + t->times],
                            tr_cuda_stream(t->c->nccl->device, TR_LANE_MAIN)));
    st = await_end(t, err);
    if (st != TR_OK) goto done;
    TR_CUDA(cudaMemcpy(sums, t->residual, numbers * sizeof(float), cudaMemcpyDeviceToHost));

done:
    return st;
}

/* There are machines whose GPUs say that they reach each other and lose what is stored that way (an IOMMU in between). Where the
 * forms do not make NCCL's sums, or wait for ever, there is no peer memory, on all members. */
static tr_status try_out(trial *t, tr_peer_report *report, tr_err *err)
{
    const size_t bytes = TRIED * (size_t)t->d * sizeof(float);
    float *want = malloc(bytes), *got = malloc(bytes);
    double wrong = 0;
    tr_status st = want && got ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");

    if (st == TR_OK) st = try_form(t, -1, want, err);
    for (int form = 0; form < TR_CUDA_PEER_FORMS && st == TR_OK && wrong == 0; form++) {
        tr_err ignored;
        if (tr_cuda_peer_rows(&t->c->fused, (tr_cuda_peer_form)form) < TRIED) continue;
        st = tr_comm_max_number(t->c->base.host, &wrong, err); /* all are here */
        if (st != TR_OK) break;
        wrong = try_form(t, form, got, &ignored) != TR_OK || memcmp(got, want, bytes) != 0;
        st = tr_comm_max_number(t->c->base.host, &wrong, err);
    }
    if (st == TR_OK && wrong > 0) snprintf(report->why, sizeof report->why, "%s", TR_NCCL_DAMAGED);
    free(want);
    free(got);
    return st;
}

/* Which form, for every number of rows. What it costs is no part of what the job is told of its communicators. */
static tr_status choose_all(tr_comm_nccl *c, const tr_peer_options *o, tr_peer_report *report,
                            tr_err *err)
{
    trial t = {.c = c, .d = c->fused.d, .times = o->times ? o->times : TIMES};
    const tr_comm before = c->base;
    tr_status st = tr_comm_agree(c->base.host, prepare(&t, c->fused.rows, err), err);

    if (st == TR_OK) st = try_out(&t, report, err);
    for (int k = 0; k < TR_PEER_SIZES && 1 << k <= c->fused.rows && st == TR_OK && !report->why[0];
         k++) {
        st = choose(&t, o, k, report, err);
        report->n = k + 1;
    }
    const uint64_t next = c->base.next_ticket;
    c->base = before;
    c->base.next_ticket = next;
    clear(&t, st == TR_OK);
    return st;
}

tr_status tr_nccl_peers(tr_comm *comm, const tr_peer_options *o, tr_peer_report *report,
                        tr_err *err)
{
    tr_comm_nccl *c = (tr_comm_nccl *)comm;
    tr_status st = TR_OK;

    *report = (tr_peer_report){.n = 0};
    for (int k = 0; k < TR_PEER_SIZES; k++)
        c->form[k] = -1;
    if (o->use == TR_PEER_OFF) {
        snprintf(report->why, sizeof report->why, "switched off");
        return TR_OK;
    }
    st = open_slots(c, o->d, report, err);
    if (st == TR_OK && c->peers) st = choose_all(c, o, report, err);
    if (st == TR_OK && c->peers && report->why[0]) {
        tr_peers_close(c->peers, false); /* its memory may still be written */
        c->peers = NULL;
        *c->nccl->abort_h = 0;
        c->broken = (tr_err){0}; /* a launch that was refused: NCCL does without it */
    }
    if (st == TR_OK && report->why[0] && o->use == TR_PEER_ON)
        st = tr_fail(err, TR_E_USAGE, "sums over peer memory: %s", report->why);
    return st == TR_OK ? TR_OK : tr_within(err, "peer memory of %s", tr_comm_name(comm));
}
