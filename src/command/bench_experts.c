#include <config.h>

#include "command/bench_experts.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/order.h"
#include "base/size.h"
#include "command/bench_device.h"

enum {
    EXPERTS = 256,
    GROUPS = 8,
    GROUPS_CHOSEN = 4,
    CHOSEN = 8, /* experts of a row */
    FEW = 256,
    FEW_OF_ALL = 1024, /* rows that are told to all (model/exchange.c) */
    IN_GRAPH = 8,
    WARM_UP = 3,
};

typedef enum part { DISPATCH, COMBINE, PLAIN_DISPATCH, PLAIN_COMBINE, N_PARTS } part;

typedef struct place { /* one member's */
    const tr_experts_bench *b;
    tr_comm *comm;
    tr_bench_device on;
    tr_graph *graph;
    int rows, members, rank, most; /* most: of all sizes */
    bool tells;
    size_t record, row; /* bytes */
    size_t plain[2];    /* the most that any member has to dispatch and combine, in equal parts */
    int32_t *n, *expert, *count, *origin;
    float *weight;
    void *x, *out; /* [most, width] */
    float
        *q_scale; /* [width / 128, most]: rows travel as codes, any bytes of x; NULL: as they are */
    void *send, *y;           /* records; sums, as they leave the experts */
    void *recv, *back;        /* the same as they come */
    int32_t *n_send, *n_recv; /* [members] of the last dispatch */
    size_t *to, *from;        /* [members] */
    double *seconds;
} place;

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

static tr_status take(place *p, size_t n, size_t each, void *out, tr_err *err)
{
    size_t bytes;

    if (!tr_mul(&bytes, n, each)) return tr_fail(err, TR_E_USAGE, "--experts: too many rows");
    return tr_bench_device_take(&p->on, bytes, TR_MEMORY_DEVICE, out, err);
}

/* What members receive into. */
static tr_status take_receiver(place *p, size_t n, size_t each, void *out, tr_err *err)
{
    size_t bytes;

    if (!tr_mul(&bytes, n, each)) return tr_fail(err, TR_E_USAGE, "--experts: too many rows");
    return tr_bench_device_take(&p->on, bytes, TR_MEMORY_SYMMETRIC, out, err);
}

/* Each other's receivers; all members have theirs. */
static tr_status reach(place *p, tr_err *err)
{
    const size_t all = (size_t)p->most * (size_t)p->members + 1;
    const tr_status st = tr_comm_reach(p->comm, p->recv, all * p->record, err);

    return st == TR_OK ? tr_comm_reach(p->comm, p->back, all * p->row, err) : st;
}

/* How it went on all members, none of which has the others' memory any more. */
static tr_status leave_alone(place *p, tr_status st, tr_err *err)
{
    tr_comm_leave_alone(p->comm, p->recv);
    tr_comm_leave_alone(p->comm, p->back);
    return tr_comm_agree(tr_comm_host(p->comm), st, err);
}

static tr_status upload(place *p, void *to, const void *from, size_t bytes, tr_err *err)
{
    return tr_bench_device_status(
        &p->on, "upload", p->on.ops->upload(p->on.device, TR_LANE_MAIN, to, from, bytes), err);
}

/* Of n things m, each as likely as any other, ascending. */
static void draw(uint64_t *x, int n, int m, int *out)
{
    for (int i = 0, taken = 0; i < n && taken < m; i++) {
        *x = *x * 6364136223846793005u + 1442695040888963407u;
        if ((int)((*x >> 33) % (uint64_t)(n - i)) < m - taken) out[taken++] = i;
    }
}

/* Every member's rows choose for themselves. */
static tr_status choose_experts(place *p, tr_err *err)
{
    enum { OF_GROUP = EXPERTS / GROUPS };
    const size_t n = (size_t)p->most * CHOSEN;
    uint64_t x = 12345 + (uint64_t)p->rank;
    int32_t *expert = tr_calloc(n, sizeof *expert);
    float *weight = tr_calloc(n, sizeof *weight);
    tr_status st = expert && weight ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");

    for (int i = 0; i < p->most && st == TR_OK; i++) {
        int group[GROUPS_CHOSEN], one[CHOSEN];
        draw(&x, GROUPS, GROUPS_CHOSEN, group);
        draw(&x, GROUPS_CHOSEN * OF_GROUP, CHOSEN, one);
        for (int k = 0; k < CHOSEN; k++) {
            expert[i * CHOSEN + k] = group[one[k] / OF_GROUP] * OF_GROUP + one[k] % OF_GROUP;
            weight[i * CHOSEN + k] = 1.0f / CHOSEN;
        }
    }
    if (st == TR_OK) st = upload(p, p->expert, expert, n * sizeof *expert, err);
    if (st == TR_OK) st = upload(p, p->weight, weight, n * sizeof *weight, err);
    if (st == TR_OK) st = tr_bench_device_settle(&p->on, err);
    free(expert);
    free(weight);
    return st;
}

static tr_status take_all(place *p, tr_err *err)
{
    const size_t most = (size_t)p->most, members = (size_t)p->members,
                 all = most * members + 1; /* plain's parts are whole words */
    tr_status st = take(p, 1, sizeof *p->n, &p->n, err);

    if (st == TR_OK) st = take(p, most * CHOSEN, sizeof *p->expert, &p->expert, err);
    if (st == TR_OK) st = take(p, most * CHOSEN, sizeof *p->weight, &p->weight, err);
    if (st == TR_OK) st = take(p, members, sizeof *p->count, &p->count, err);
    if (st == TR_OK) st = take(p, all, sizeof *p->origin, &p->origin, err);
    if (st == TR_OK) st = take(p, most, p->row, &p->x, err);
    if (st == TR_OK) st = take(p, most, p->row, &p->out, err);
    if (st == TR_OK && tr_record_act(p->on.ops, p->b->width) == TR_CODES)
        st = take(p, most, (size_t)p->b->width / 128 * sizeof *p->q_scale, &p->q_scale, err);
    if (st == TR_OK) st = take(p, all, p->record, &p->send, err);
    if (st == TR_OK) st = take_receiver(p, all, p->record, &p->recv, err);
    if (st == TR_OK) st = take(p, all, p->row, &p->y, err);
    if (st == TR_OK) st = take_receiver(p, all, p->row, &p->back, err);
    p->n_send = tr_calloc(members, sizeof *p->n_send);
    p->n_recv = tr_calloc(members, sizeof *p->n_recv);
    p->to = tr_calloc(members, sizeof *p->to);
    p->from = tr_calloc(members, sizeof *p->from);
    p->seconds = tr_calloc((size_t)p->b->times, sizeof *p->seconds);
    if (st == TR_OK && (!p->n_send || !p->n_recv || !p->to || !p->from || !p->seconds))
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    return st;
}

/* ---- there and back ---------------------------------------------------------------------------------------------------- */

static tr_status wait(place *p, tr_status st, tr_ticket t, tr_err *err)
{
    return st == TR_OK ? tr_comm_wait(p->comm, TR_LANE_MAIN, t, err) : st;
}

static tr_status tell(place *p, tr_err *err)
{
    const struct tr_moe_offer_args a = {.n = p->n,
                                        .n_rows = p->rows,
                                        .k = CHOSEN,
                                        .d = p->b->width,
                                        .expert = p->expert,
                                        .weight = p->weight,
                                        .x = p->x,
                                        .q = p->q_scale ? p->x : NULL,
                                        .q_scale = p->q_scale,
                                        .ld_scale = p->most,
                                        .record = p->send};
    tr_status st = tr_bench_device_status(
        &p->on, "moe_offer", p->on.ops->moe_offer(p->on.device, TR_LANE_MAIN, &a), err);
    tr_ticket t = {0};

    for (int i = 0; i < p->members; i++)
        p->to[i] = (size_t)p->rows * p->record;
    if (st == TR_OK) st = tr_comm_all_gather(p->comm, p->send, p->recv, p->to, &t, err);
    return wait(p, st, t, err);
}

static tr_status collect(place *p, tr_err *err)
{
    const struct tr_moe_add_args a = {.n = p->n,
                                      .n_max = p->rows,
                                      .d = p->b->width,
                                      .n_members = p->members,
                                      .ld = (size_t)p->rows,
                                      .y = p->back,
                                      .out = p->out};
    tr_ticket t = {0};

    for (int i = 0; i < p->members; i++)
        p->to[i] = (size_t)p->rows * p->row;
    tr_status st = tr_comm_all_to_all(p->comm, p->y, p->to, p->back, p->to, &t, err);
    st = wait(p, st, t, err);
    if (st != TR_OK) return st;
    return tr_bench_device_status(&p->on, "moe_add",
                                  p->on.ops->moe_add(p->on.device, TR_LANE_MAIN, &a), err);
}

/* Records of `bytes` between all members, as the counts say; back: the other way. */
static tr_status travel(place *p, bool back, const void *send, void *recv, size_t bytes,
                        tr_err *err)
{
    const int32_t *out = back ? p->n_recv : p->n_send, *in = back ? p->n_send : p->n_recv;
    tr_ticket t = {0};

    for (int i = 0; i < p->members; i++) {
        p->to[i] = (size_t)out[i] * bytes;
        p->from[i] = (size_t)in[i] * bytes;
    }
    const tr_status st = tr_comm_all_to_all(p->comm, send, p->to, recv, p->from, &t, err);
    return wait(p, st, t, err);
}

/* The host learns how many rows each member gets, and tells them. */
static tr_status count(place *p, tr_err *err)
{
    tr_comm *host = tr_comm_host(p->comm);
    const size_t bytes = (size_t)p->members * sizeof *p->n_send;
    tr_ticket t = {0};
    tr_status st = tr_bench_device_status(
        &p->on, "download",
        p->on.ops->download(p->on.device, TR_LANE_MAIN, p->n_send, p->count, bytes), err);

    if (st == TR_OK) st = tr_bench_device_settle(&p->on, err);
    for (int i = 0; i < p->members; i++)
        p->to[i] = sizeof *p->n_send;
    if (st == TR_OK) st = tr_comm_all_to_all(host, p->n_send, p->to, p->n_recv, p->to, &t, err);
    return st == TR_OK ? tr_comm_wait(host, TR_LANE_MAIN, t, err) : st;
}

static tr_status dispatch(place *p, tr_err *err)
{
    const struct tr_moe_dispatch_args a = {.n = p->n,
                                           .step = 1,
                                           .n_rows = p->rows,
                                           .k = CHOSEN,
                                           .d = p->b->width,
                                           .n_local = EXPERTS / p->members,
                                           .n_ep = p->members,
                                           .n_xt = 1,
                                           .expert = p->expert,
                                           .weight = p->weight,
                                           .x = p->x,
                                           .q = p->q_scale ? p->x : NULL,
                                           .q_scale = p->q_scale,
                                           .ld_scale = p->most,
                                           .record = p->send,
                                           .count = p->count,
                                           .origin = p->origin};
    tr_status st = tr_bench_device_status(
        &p->on, "moe_dispatch", p->on.ops->moe_dispatch(p->on.device, TR_LANE_MAIN, &a), err);

    if (st == TR_OK) st = count(p, err);
    return st == TR_OK ? travel(p, false, p->send, p->recv, p->record, err) : st;
}

static int sum(const int32_t *n, int members)
{
    int total = 0;
    for (int i = 0; i < members; i++)
        total += n[i];
    return total;
}

static tr_status come_back(place *p, tr_err *err)
{
    const struct tr_moe_return_args a = {.n_rows = sum(p->n_send, p->members),
                                         .d = p->b->width,
                                         .n_members = p->members,
                                         .count = p->count,
                                         .origin = p->origin,
                                         .y = p->back,
                                         .out = p->out};
    tr_status st = travel(p, true, p->y, p->back, p->row, err);

    if (st != TR_OK) return st;
    return tr_bench_device_status(&p->on, "moe_return",
                                  p->on.ops->moe_return(p->on.device, TR_LANE_MAIN, &a), err);
}

/* Bytes that this member gives to all, itself too. */
static size_t bytes_of(const place *p, bool combine)
{
    const size_t each = combine ? p->row : p->record;
    if (p->tells) return (size_t)p->rows * (size_t)p->members * each;
    return (size_t)sum(combine ? p->n_recv : p->n_send, p->members) * each;
}

static tr_status run(place *p, part what, tr_err *err)
{
    switch (what) {
    case DISPATCH:
        return p->tells ? tell(p, err) : dispatch(p, err);
    case COMBINE:
        return p->tells ? collect(p, err) : come_back(p, err);
    default:
        return what == PLAIN_DISPATCH ? p->b->plain(p->b->ctx, p->send, p->recv, p->plain[0], err)
                                      : p->b->plain(p->b->ctx, p->y, p->back, p->plain[1], err);
    }
}

/* ---- measuring ----------------------------------------------------------------------------------------------------------- */

static tr_status record(place *p, part what, tr_err *err)
{
    tr_status st = p->on.ops->graph_begin(p->on.device, TR_LANE_MAIN);

    if (st != TR_OK) return tr_bench_device_status(&p->on, "graph", st, err);
    tr_comm_set_mode(p->comm, TR_COMM_RECORD);
    for (int i = 0; i < IN_GRAPH && st == TR_OK; i++)
        st = run(p, what, err);
    tr_comm_set_mode(p->comm, TR_COMM_RUN);
    if (st != TR_OK) {
        p->on.ops->graph_end(p->on.device, TR_LANE_MAIN, NULL);
        return st;
    }
    return tr_bench_device_status(&p->on, "graph",
                                  p->on.ops->graph_end(p->on.device, TR_LANE_MAIN, &p->graph), err);
}

/* Once, or the graph. */
static tr_status once(place *p, part what, tr_err *err)
{
    tr_status st = p->graph ? tr_bench_device_status(
                                  &p->on, "graph",
                                  p->on.ops->graph_run(p->on.device, TR_LANE_MAIN, p->graph), err)
                            : run(p, what, err);
    return st == TR_OK ? tr_bench_device_settle(&p->on, err) : st;
}

/* What needs nothing of the host is timed in a graph, where the device has graphs, as decode steps run it; the first run makes
 * NCCL's connections. */
static tr_status measure(place *p, part what, double *out, tr_err *err)
{
    const bool recorded = p->tells && what < PLAIN_DISPATCH && (p->on.ops->caps & TR_CAP_GRAPH);
    double none = 0;
    tr_status st = once(p, what, err);

    if (st == TR_OK && recorded) st = record(p, what, err);
    for (int i = -WARM_UP; i < p->b->times && st == TR_OK; i++) {
        st = tr_comm_max_number(tr_comm_host(p->comm), &none, err);
        const uint64_t from_ns = tr_now_ns();
        if (st == TR_OK) st = once(p, what, err);
        p->seconds[i < 0 ? 0 : i] =
            (double)(tr_now_ns() - from_ns) * 1e-9 / (recorded ? IN_GRAPH : 1);
    }
    if (p->graph) p->on.ops->graph_free(p->on.device, p->graph);
    p->graph = NULL;
    if (st != TR_OK) return st;
    *out = tr_median(p->seconds, p->b->times);
    return tr_comm_max_number(tr_comm_host(p->comm), out, err);
}

/* Behind a dispatch: every member has parts of the same size, or a library waits for bytes that do not come. */
static tr_status agree_plain(place *p, tr_err *err)
{
    tr_comm *host = tr_comm_host(p->comm);
    uint64_t most[] = {bytes_of(p, false), bytes_of(p, true)};
    tr_ticket t;
    tr_status st = tr_comm_all_max_u64(host, most, 2, &t, err);

    if (st == TR_OK) st = tr_comm_wait(host, TR_LANE_MAIN, t, err);
    for (int i = 0; i < 2; i++) {
        const size_t each = tr_ceil_div((size_t)most[i], 4 * (size_t)p->members) * 4;
        p->plain[i] = each * (size_t)p->members;
    }
    return st;
}

static void print(const place *p, const double *s)
{
    const char *way = p->tells ? "all rows to all" : "to their experts";
    const double out = (double)bytes_of(p, false), back = (double)bytes_of(p, true);

    printf("  %-12s %5d %6d %-17s %10.2f %10.2f %10.2f %10.2f %8.1f %8.1f\n", "experts", p->members,
           p->rows, way, s[DISPATCH] * 1e6, s[PLAIN_DISPATCH] * 1e6, s[COMBINE] * 1e6,
           s[PLAIN_COMBINE] * 1e6, out / s[DISPATCH] * 1e-9, back / s[COMBINE] * 1e-9);
    printf("{\"bench\": \"comm\", \"device\": \"%s\", \"op\": \"experts\", \"ranks\": %d, "
           "\"rows\": %d, "
           "\"calls\": %d, \"told\": %s, \"dispatch_bytes\": %.0f, \"combine_bytes\": %.0f, "
           "\"dispatch_s\": %.9g, \"combine_s\": %.9g, \"plain_dispatch_s\": %.9g, "
           "\"plain_combine_s\": %.9g}\n",
           p->on.ops->caps & TR_CAP_HOST ? "cpu" : "cuda", p->members, p->rows, p->b->times,
           p->tells ? "true" : "false", out, back, s[DISPATCH], s[COMBINE], s[PLAIN_DISPATCH],
           s[PLAIN_COMBINE]);
    fflush(stdout);
}

static tr_status one_size(place *p, int rows, tr_err *err)
{
    const int32_t n = rows;
    double seconds[N_PARTS];
    tr_status st = upload(p, p->n, &n, sizeof n, err);

    p->rows = rows;
    p->tells = rows <= FEW && rows * p->members <= FEW_OF_ALL;
    if (st == TR_OK) st = tr_bench_device_settle(&p->on, err); /* before n goes */
    for (int i = 0; i < N_PARTS && st == TR_OK; i++)
        if (i != PLAIN_DISPATCH || (st = agree_plain(p, err)) == TR_OK)
            st = measure(p, (part)i, &seconds[i], err);
    if (st == TR_OK && p->b->prints) print(p, seconds);
    return st;
}

tr_status tr_bench_experts(const tr_experts_bench *b, tr_err *err)
{
    place p = {.b = b,
               .comm = b->comm,
               .on = {.ops = b->ops, .device = b->device},
               .members = tr_comm_size(b->comm),
               .rank = tr_comm_rank(b->comm)};
    tr_status st = TR_OK;

    if (EXPERTS % p.members)
        return tr_fail(err, TR_E_USAGE, "--experts: %d experts do not divide by %d ranks", EXPERTS,
                       p.members);
    for (int i = 0; i < b->n_rows; i++)
        if (b->rows[i] > p.most) p.most = b->rows[i];
    p.row = (size_t)b->width * tr_act_bytes(b->ops);
    p.record = tr_dispatch_bytes(b->width, CHOSEN, tr_record_act(b->ops, b->width));
    st = take_all(&p, err);
    if (st == TR_OK) st = choose_experts(&p, err);
    st = tr_comm_agree(tr_comm_host(p.comm), st, err);
    if (st == TR_OK) st = tr_comm_agree(tr_comm_host(p.comm), reach(&p, err), err);
    if (st == TR_OK && b->prints)
        printf("# rows of %d to their experts and back, us; GB/s: what a rank gives, itself too\n"
               "# %-12s %5s %6s %-17s %10s %10s %10s %10s %8s %8s\n",
               b->width, "", "ranks", "rows", "way", "dispatch", "plain", "combine", "plain",
               "GB/s", "GB/s");
    for (int i = 0; i < b->n_rows && st == TR_OK; i++)
        st = one_size(&p, b->rows[i], err);
    st = leave_alone(&p, st, err);
    tr_bench_device_release(&p.on);
    free(p.n_send);
    free(p.n_recv);
    free(p.to);
    free(p.from);
    free(p.seconds);
    return st == TR_OK ? TR_OK : tr_within(err, "rows to their experts");
}
