/* trireme bench comm: every operation of a communicator, for some group sizes and message lengths, next to the MPI
 * library's own blocking call for the same thing; of GPUs' memory, next to NCCL's own, each until the device has done it. Both take turns call by call, so that whatever else this machine does
 * falls on both. A call is timed on every member between two clock readings behind a barrier; of each member's calls
 * the median counts, of the members the slowest. */
#include <config.h>

#include "command/bench_comm.h"

#include <getopt.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/order.h"
#include "base/size.h"
#include "command/bench_experts.h"
#include "command/launch.h"
#include "mpi/comm_mpi.h"
#include "mpi/yardstick.h"
#ifdef HAVE_NCCL
#include "command/bench_exchange.h"
#include "mpi/binding.h"
#include "mpi/comm_nccl.h"
#include "mpi/yardstick_nccl.h"
#endif

static const char help_text[] =
    "Usage: mpirun -n RANKS trireme bench comm [options]\n"
    "\n"
    "Every operation of a communicator, next to the MPI library's own blocking call for\n"
    "the same thing: a table and JSON lines. With --device cuda in the memory of GPUs, one\n"
    "for each rank, next to NCCL's own call.\n"
    "\n"
    "      --device NAME      cpu or cuda (default cpu)\n"
    "      --bytes N[,N...]   what one member gives (default 8,1024,65536,1048576)\n"
    "      --ranks N[,N...]   group sizes (default: 2, 4, 8, ... and all ranks)\n"
    "      --calls N          timed calls of each line (default 10000); fewer of long\n"
    "                         messages, 50 or as many as make 500 MB\n"
    "      --width N          with --device cuda: numbers of a row, of sums of 1 to 256 rows\n"
    "                         that a norm follows, in graphs: NCCL's and the norm kernel,\n"
    "                         NCCL's made in rank order, and over peer memory (default\n"
    "                         7168; 0: none)\n"
    "      --rows N[,N...]    with --device cuda: index keys and latents of so many rows a rank,\n"
    "                         exchanged beside the products of a layer's queries, in graphs:\n"
    "                         by stores to the other GPUs and by NCCL, alone and what of it is\n"
    "                         not hidden, then NCCL between its symmetric windows (as\n"
    "                         256,512,2048,4096; default 0: none)\n"
    "      --experts N[,N...] so many rows a rank to the ranks of their experts and back, as the\n"
    "                         model sends them (as 128,4096; default 0: none), of --width numbers\n"
    "  -h, --help             this text\n";

enum { LIST_MAX = 16, WARM_UP = 20 };

typedef struct comm_options {
    size_t bytes[LIST_MAX];
    int ranks[LIST_MAX];
    int rows[LIST_MAX];    /* of an exchange */
    int experts[LIST_MAX]; /* rows to their experts */
    int n_bytes, n_ranks, n_rows, n_experts, calls, width;
    bool cuda, help;
} comm_options;

typedef struct group {
    tr_comm *host, *comm; /* the latter is measured: host, or a device's */
    tr_yardstick *plain;
    struct tr_nccl_yardstick *plain_nccl;
    int size;
    bool crowded; /* more ranks on this host than cores given */
} group;

typedef struct bench {
    tr_world world;
    comm_options options;
    tr_device *device; /* NULL: host memory */
    const tr_ops *ops;
    struct tr_nccl *nccl;
    char *send, *recv;
    size_t *each;          /* [world.size] */
    double *ours, *theirs; /* [calls] seconds */
} bench;

/* ---- options ----------------------------------------------------------------------------------------------------- */

static tr_status number(const char *option, const char *text, long min, long max, long *out,
                        tr_err *err)
{
    char *end = NULL;
    *out = strtol(text, &end, 10);
    if (end == text || *end || *out < min || *out > max)
        return tr_fail(err, TR_E_USAGE, "--%s %s: a whole number from %ld to %ld is wanted", option,
                       text, min, max);
    return TR_OK;
}

/* Numbers with commas between them. */
static tr_status numbers(const char *option, const char *text, long min, long max, long *out,
                         int *n, tr_err *err)
{
    char copy[256], *save = NULL;

    if (strlen(text) >= sizeof copy) return tr_fail(err, TR_E_USAGE, "--%s: too long", option);
    memcpy(copy, text, strlen(text) + 1);
    *n = 0;
    for (char *item = strtok_r(copy, ",", &save); item; item = strtok_r(NULL, ",", &save)) {
        if (*n == LIST_MAX)
            return tr_fail(err, TR_E_USAGE, "--%s: at most %d numbers", option, LIST_MAX);
        tr_status st = number(option, item, min, max, &out[(*n)++], err);
        if (st != TR_OK) return st;
    }
    return *n ? TR_OK : tr_fail(err, TR_E_USAGE, "--%s: a number is wanted", option);
}

/* Numbers of rows, or 0 alone: none. */
static tr_status row_counts(const char *option, const char *text, int *out, int *n, tr_err *err)
{
    long list[LIST_MAX];
    tr_status st = numbers(option, text, 0, 16384, list, n, err);

    if (st == TR_OK && *n == 1 && !list[0]) *n = 0;
    for (int i = 0; i < *n && st == TR_OK; i++) {
        out[i] = (int)list[i];
        if (!out[i]) st = tr_fail(err, TR_E_USAGE, "--%s %s: 0 stands alone", option, text);
    }
    return st;
}

static void default_ranks(comm_options *o, int world)
{
    for (int n = 2; n < world && o->n_ranks < LIST_MAX - 1; n *= 2)
        o->ranks[o->n_ranks++] = n;
    if (world > 1) o->ranks[o->n_ranks++] = world;
}

static tr_status choose_device(comm_options *o, const char *name, tr_err *err)
{
    o->cuda = strcmp(name, "cuda") == 0;
    if (!o->cuda && strcmp(name, "cpu") != 0)
        return tr_fail(err, TR_E_USAGE, "--device %s: cpu or cuda is wanted", name);
#ifndef HAVE_NCCL
    if (o->cuda)
        return tr_fail(err, TR_E_USAGE, "--device cuda: this build has no NCCL (--with-nccl)");
#endif
    return TR_OK;
}

static tr_status parse(comm_options *o, int world, int argc, char **argv, tr_err *err)
{
    static const struct option table[] = {{"bytes", required_argument, NULL, 'b'},
                                          {"ranks", required_argument, NULL, 'r'},
                                          {"calls", required_argument, NULL, 'c'},
                                          {"device", required_argument, NULL, 'd'},
                                          {"width", required_argument, NULL, 'w'},
                                          {"rows", required_argument, NULL, 'o'},
                                          {"experts", required_argument, NULL, 'e'},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL, 0, NULL, 0}};
    long list[LIST_MAX], one;
    tr_status st = TR_OK;
    int c;

    *o = (comm_options){
        .bytes = {8, 1024, 65536, 1048576}, .n_bytes = 4, .calls = 10000, .width = 7168};
    opterr = 0;
    optind = 1;
    while (st == TR_OK && (c = getopt_long(argc, argv, "h", table, NULL)) != -1) {
        if (c == 'h') {
            o->help = true;
        } else if (c == 'b') {
            st = numbers("bytes", optarg, 1, 1 << 30, list, &o->n_bytes, err);
            for (int i = 0; i < o->n_bytes && st == TR_OK; i++)
                o->bytes[i] = (size_t)list[i];
        } else if (c == 'r') {
            st = numbers("ranks", optarg, 2, world, list, &o->n_ranks, err);
            for (int i = 0; i < o->n_ranks && st == TR_OK; i++)
                o->ranks[i] = (int)list[i];
        } else if (c == 'c') {
            st = number("calls", optarg, 1, 10000000, &one, err);
            if (st == TR_OK) o->calls = (int)one;
        } else if (c == 'w') {
            st = number("width", optarg, 0, 1 << 20, &one, err);
            if (st == TR_OK) o->width = (int)one;
        } else if (c == 'o') {
            st = row_counts("rows", optarg, o->rows, &o->n_rows, err);
        } else if (c == 'e') {
            st = row_counts("experts", optarg, o->experts, &o->n_experts, err);
        } else if (c == 'd') {
            st = choose_device(o, optarg, err);
        } else {
            st = tr_fail(err, TR_E_USAGE,
                         "bench comm: unknown option; see trireme bench comm --help");
        }
    }
    if (st == TR_OK && optind < argc)
        st = tr_fail(err, TR_E_USAGE, "bench comm: %s: what is that?", argv[optind]);
    if (st == TR_OK && !o->help && world == 1)
        st = tr_fail(err, TR_E_USAGE,
                     "bench comm: one rank has nobody to talk to; start it with mpirun -n 2");
    if (!o->n_ranks) default_ranks(o, world);
    return st;
}

/* ---- measuring --------------------------------------------------------------------------------------------------- */

/* What one member gives, rounded up to what the operation can cut. */
static size_t round_bytes(const group *g, tr_comm_op op, size_t bytes)
{
    const size_t size = (size_t)g->size;
    const size_t unit = op == TR_COMM_REDUCE_SCATTER || op == TR_COMM_ALL_TO_ALL ? 4 * size
                        : op == TR_COMM_ALL_REDUCE                               ? 4
                        : op == TR_COMM_ALL_MAX                                  ? 8
                                                                                 : 1;
    return tr_ceil_div(bytes, unit) * unit;
}

static tr_status begin(bench *b, const group *g, tr_comm_op op, size_t bytes, tr_ticket *t,
                       tr_err *err)
{
    const size_t size = (size_t)g->size;
    size_t *each = b->each;

    switch (op) {
    case TR_COMM_ALL_REDUCE:
        return tr_comm_all_reduce(g->comm, b->recv, bytes / 4, TR_F32, t, err);
    case TR_COMM_ALL_MAX:
        return tr_comm_all_max_u64(g->comm, (uint64_t *)(void *)b->recv, bytes / 8, t, err);
    case TR_COMM_REDUCE_SCATTER:
        return tr_comm_reduce_scatter(g->comm, b->send, b->recv, bytes / 4 / size, TR_F32, t, err);
    case TR_COMM_BROADCAST:
        return tr_comm_broadcast(g->comm, 0, b->recv, bytes, t, err);
    default:
        for (size_t i = 0; i < size; i++)
            each[i] = op == TR_COMM_ALL_GATHER ? bytes : bytes / size;
        return op == TR_COMM_ALL_GATHER
                   ? tr_comm_all_gather(g->comm, b->send, b->recv, each, t, err)
                   : tr_comm_all_to_all(g->comm, b->send, each, b->recv, each, t, err);
    }
}

/* Until the data is there for the host too. */
static tr_status finish(bench *b, const group *g, tr_ticket t, tr_err *err)
{
    tr_status st = tr_comm_wait(g->comm, TR_LANE_MAIN, t, err);
    int done = 0;

    if (!b->device || st != TR_OK) return st;
    const uint64_t ticket = b->ops->ticket(b->device, TR_LANE_MAIN);
    while ((done = b->ops->done(b->device, TR_LANE_MAIN, ticket)) == 0)
        continue;
    return done > 0 ? TR_OK : tr_fail(err, TR_E_DEVICE, "%s", b->ops->error(b->device));
}

static tr_status ping_pong(bench *b, const group *g, size_t bytes, tr_err *err)
{
    const int me = tr_comm_rank(g->comm);
    tr_ticket t;
    tr_status st = TR_OK;

    for (int turn = 0; turn < 2 && me < 2 && st == TR_OK; turn++) {
        st = turn == me ? tr_comm_send(g->comm, 1 - me, b->send, bytes, &t, err)
                        : tr_comm_recv(g->comm, 1 - me, b->recv, bytes, &t, err);
        if (st == TR_OK) st = finish(b, g, t, err);
    }
    return st;
}

static tr_status run_ours(bench *b, const group *g, tr_comm_op op, size_t bytes, tr_err *err)
{
    tr_ticket t;

    if (op == TR_COMM_SEND) return ping_pong(b, g, bytes, err);
    tr_status st = begin(b, g, op, bytes, &t, err);
    return st == TR_OK ? finish(b, g, t, err) : st;
}

static tr_status run_theirs(bench *b, const group *g, tr_comm_op op, size_t bytes, tr_err *err)
{
#ifdef HAVE_NCCL
    if (g->plain_nccl)
        return tr_nccl_yardstick_run(g->plain_nccl, op, b->send, b->recv, bytes, err);
#endif
    return tr_yardstick_run(g->plain, op, b->send, b->recv, bytes, err);
}

/* One timed call behind a barrier. */
static tr_status timed(bench *b, const group *g, bool ours, tr_comm_op op, size_t bytes,
                       double *seconds, tr_err *err)
{
    tr_status st = tr_yardstick_barrier(g->plain, err);
    if (st != TR_OK) return st;
    const uint64_t begun_ns = tr_now_ns();
    st = ours ? run_ours(b, g, op, bytes, err) : run_theirs(b, g, op, bytes, err);
    *seconds = (double)(tr_now_ns() - begun_ns) * 1e-9 * (op == TR_COMM_SEND ? 0.5 : 1.0);
    return st;
}

/* The slowest member's median. */
static tr_status slowest_median(const group *g, double *seconds, int n, double *out, tr_err *err)
{
    *out = tr_median(seconds, n);
    return tr_comm_max_number(g->host, out, err);
}

static void print_line(const bench *b, const group *g, tr_comm_op op, size_t bytes, int calls,
                       double ours, double theirs)
{
    const char *name = op == TR_COMM_SEND ? "send_recv" : tr_comm_op_name(op);

    printf("  %-14s %5d %10zu %10.2f %10.2f %9.2f %8.1f %9.3f %9.3f%s\n", name, g->size, bytes,
           ours * 1e6, theirs * 1e6, (ours - theirs) * 1e6, (ours / theirs - 1) * 100,
           (double)bytes / ours * 1e-9, (double)bytes / theirs * 1e-9,
           g->crowded ? "  (more ranks than cores)" : "");
    printf("{\"bench\": \"comm\", \"device\": \"%s\", \"op\": \"%s\", \"ranks\": %d, "
           "\"bytes\": %zu, \"calls\": %d, "
           "\"median_s\": %.9g, \"plain_median_s\": %.9g, \"bytes_per_s\": %.6g, "
           "\"plain_bytes_per_s\": %.6g, \"oversubscribed\": %s}\n",
           b->device ? "cuda" : "cpu", name, g->size, bytes, calls, ours, theirs,
           (double)bytes / ours, (double)bytes / theirs, g->crowded ? "true" : "false");
    fflush(stdout);
}

static tr_status measure(bench *b, const group *g, tr_comm_op op, size_t wanted, tr_err *err)
{
    const size_t bytes = round_bytes(g, op, wanted);
    const size_t enough = 500000000 / bytes > 50 ? 500000000 / bytes : 50;
    const int calls = enough < (size_t)b->options.calls ? (int)enough : b->options.calls;
    double ours = 0, theirs = 0;
    tr_status st = TR_OK;

    if (!b->device) { /* a device's memory is zeros, and sums of zeros are */
        memset(b->send, 0, bytes);
        memset(b->recv, 0, bytes);
    }
    for (int i = -WARM_UP; i < calls && st == TR_OK; i++) {
        const int at = i < 0 ? 0 : i;
        const bool first = i & 1; /* who goes first takes turns too */
        st = timed(b, g, first, op, bytes, first ? &b->ours[at] : &b->theirs[at], err);
        if (st == TR_OK)
            st = timed(b, g, !first, op, bytes, first ? &b->theirs[at] : &b->ours[at], err);
    }
    if (st == TR_OK) st = slowest_median(g, b->ours, calls, &ours, err);
    if (st == TR_OK) st = slowest_median(g, b->theirs, calls, &theirs, err);
    if (st == TR_OK && b->world.rank == 0) print_line(b, g, op, bytes, calls, ours, theirs);
    return st;
}

/* Ranks are often bound to a core each, so the cores of this process say nothing. */
static bool is_crowded(const tr_world *world)
{
    return world->local_size > sysconf(_SC_NPROCESSORS_ONLN);
}

#ifdef HAVE_NCCL
static void print_rows(const group *g, int width, int times, const tr_peer_report *r)
{
    if (r->why[0]) printf("# %d ranks: no sums over peer memory: %s\n", g->size, r->why);
    if (r->n)
        printf("# sum and norm of rows of %d, us, in graphs\n# %-12s %5s %6s %10s %10s %10s %10s "
               "%7s\n",
               width, "", "ranks", "rows", "nccl", "in order", "one-shot", "two-shot", "of nccl");
    for (int i = 0; i < r->n; i++) {
        const double one = r->size[i].one_s, two = r->size[i].two_s,
                     ours = two > 0 && (one <= 0 || two < one) ? two : one;
        printf("  %-12s %5d %6d %10.2f %10.2f %10.2f %10.2f %7.3f\n", "sum_norm", g->size,
               r->size[i].rows, r->size[i].plain_s * 1e6, r->size[i].nccl_s * 1e6, one * 1e6,
               two * 1e6, ours / r->size[i].plain_s);
        printf("{\"bench\": \"comm\", \"device\": \"cuda\", \"op\": \"sum_norm\", \"ranks\": %d, "
               "\"rows\": %d, \"width\": %d, \"calls\": %d, \"median_s\": %.9g, "
               "\"plain_median_s\": %.9g, \"in_order_median_s\": %.9g, \"chosen\": \"%s\"}\n",
               g->size, r->size[i].rows, width, times, ours, r->size[i].plain_s, r->size[i].nccl_s,
               r->size[i].chosen);
    }
    fflush(stdout);
}

/* Sums that a norm follows, as the model has them under tensor parallelism. */
static tr_status bench_rows(const bench *b, const group *g, tr_err *err)
{
    enum { REPLAYS = 200 };
    const int times =
        (b->ops->caps & TR_CAP_GRAPH) || b->options.calls > REPLAYS ? REPLAYS : b->options.calls;
    const tr_peer_options how = {
        .use = TR_PEER_AUTO, .d = b->options.width, .times = times, .plain = true};
    tr_peer_report report;

    if (!b->options.width) return TR_OK;
    const tr_status st = tr_nccl_peers(g->comm, &how, &report, err);
    if (st == TR_OK && b->world.rank == 0) print_rows(g, b->options.width, times, &report);
    return st;
}

/* Rows of keys and latents, as the model has them under context parallelism. */
static tr_status bench_exchange(const bench *b, const group *g, tr_err *err)
{
    enum { RUNS = 100 };
    const tr_exchange_bench e = {.comm = g->comm,
                                 .device = b->device,
                                 .ops = b->ops,
                                 .rows = b->options.rows,
                                 .n_rows = b->options.n_rows,
                                 .times = b->options.calls < RUNS ? b->options.calls : RUNS,
                                 .prints = b->world.rank == 0};
    return tr_bench_exchange(&e, err);
}
#endif

static tr_status plain_all_to_all(void *ctx, const void *send, void *recv, size_t bytes,
                                  tr_err *err)
{
    const group *g = ctx;
#ifdef HAVE_NCCL
    if (g->plain_nccl)
        return tr_nccl_yardstick_run(g->plain_nccl, TR_COMM_ALL_TO_ALL, send, recv, bytes, err);
#endif
    return tr_yardstick_run(g->plain, TR_COMM_ALL_TO_ALL, send, recv, bytes, err);
}

/* Rows to experts of other ranks and back; without a GPU by the CPU's operations. */
static tr_status bench_experts(bench *b, const group *g, tr_err *err)
{
    enum { RUNS = 100, WIDTH = 7168 };
    group own = *g;
    tr_experts_bench e = {.comm = g->comm,
                          .device = b->device,
                          .ops = b->ops,
                          .rows = b->options.experts,
                          .n_rows = b->options.n_experts,
                          .width = b->options.width ? b->options.width : WIDTH,
                          .times = b->options.calls < RUNS ? b->options.calls : RUNS,
                          .prints = b->world.rank == 0,
                          .plain = plain_all_to_all,
                          .ctx = &own};
    tr_status st = TR_OK;

    if (!e.n_rows) return TR_OK;
    if (!b->device) {
        const tr_device_options cpu = {.name = "cpu"};
        st = tr_device_open(&e.device, &e.ops, &cpu, err);
        if (st != TR_OK)
            return st; /* the others wait for this one, until it says so and ends the job */
    }
    st = tr_bench_experts(&e, err);
    if (!b->device) e.ops->close(e.device);
    return st;
}

static tr_status bench_group(bench *b, int size, tr_err *err)
{
    static const tr_comm_op ops[] = {TR_COMM_ALL_REDUCE, TR_COMM_ALL_GATHER, TR_COMM_REDUCE_SCATTER,
                                     TR_COMM_ALL_TO_ALL, TR_COMM_SEND,       TR_COMM_BROADCAST,
                                     TR_COMM_ALL_MAX};
    const int color = b->world.rank < size ? 0 : -1;
    group g = {.size = size, .crowded = is_crowded(&b->world)};
    tr_status st = tr_comm_split(&g.host, &b->world, color, b->world.rank, "bench", err);

    if (st == TR_OK) st = tr_yardstick_open(&g.plain, &b->world, color, err);
    g.comm = g.host;
#ifdef HAVE_NCCL
    if (b->device && g.host) {
        st = tr_nccl_comm(&g.comm, b->nccl, g.host, 0, err);
        if (st == TR_OK) st = tr_nccl_yardstick_open(&g.plain_nccl, b->nccl, g.host, err);
    }
#endif
    for (size_t i = 0; i < sizeof ops / sizeof *ops && g.comm; i++)
        for (int j = 0; j < b->options.n_bytes && st == TR_OK; j++)
            st = measure(b, &g, ops[i], b->options.bytes[j], err);
#ifdef HAVE_NCCL
    if (b->device && g.comm && st == TR_OK) st = bench_rows(b, &g, err);
    if (b->device && g.comm && st == TR_OK) st = bench_exchange(b, &g, err);
#endif
    if (g.comm && st == TR_OK) st = bench_experts(b, &g, err);
#ifdef HAVE_NCCL
    tr_nccl_yardstick_close(g.plain_nccl);
#endif
    if (g.comm != g.host) tr_comm_free(g.comm);
    tr_comm_free(g.host);
    tr_yardstick_close(g.plain);
    return tr_agree(&b->world, st, err);
}

#ifdef HAVE_NCCL
/* A GPU for every rank, and its memory. */
static tr_status open_device(bench *b, tr_comm *all, tr_err *err)
{
    const tr_device_options options = {
        .name = "cuda", .i_device = b->world.local_rank, .n_device_ranks = b->world.local_size};
    tr_bound *bound = NULL;
    tr_status st = tr_agree(&b->world, tr_device_open(&b->device, &b->ops, &options, err), err);

    if (st != TR_OK) return st;
    const tr_bound mine = tr_binding_of(&b->world, b->device);
    st = tr_binding_gather(&bound, all, &mine, err);
    if (st == TR_OK) st = tr_binding_check(bound, b->world.size, err);
    for (int i = 0; i < b->world.size && st == TR_OK && b->world.rank == 0; i++)
        printf("# rank %d on %s: %s, %s\n", i, bound[i].host, bound[i].device, bound[i].uuid);
    free(bound);
    return st == TR_OK ? tr_nccl_open(&b->nccl, &b->world, b->device, b->ops, err) : st;
}
#endif

static tr_status take_buffers(bench *b, size_t send, size_t recv, tr_err *err)
{
    tr_status st = TR_OK;

    if (!b->device) {
        b->send = malloc(send);
        b->recv = malloc(recv);
        return b->send && b->recv ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    st = b->ops->alloc(b->device, send, TR_MEMORY_DEVICE, (void **)&b->send);
    if (st == TR_OK) st = b->ops->alloc(b->device, recv, TR_MEMORY_DEVICE, (void **)&b->recv);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "%s", b->ops->error(b->device));
}

static void close_device(bench *b)
{
    if (!b->device) {
        free(b->send);
        free(b->recv);
        return;
    }
#ifdef HAVE_NCCL
    tr_nccl_close(b->nccl);
#endif
    b->ops->release(b->device, b->send);
    b->ops->release(b->device, b->recv);
    b->ops->close(b->device);
}

static tr_status prepare(bench *b, tr_err *err)
{
    size_t most = 0, all;

    for (int i = 0; i < b->options.n_bytes; i++)
        if (b->options.bytes[i] > most) most = b->options.bytes[i];
    most += 8 * (size_t)b->world.size; /* round_bytes */
    if (!tr_mul(&all, most, (size_t)b->world.size))
        return tr_fail(err, TR_E_USAGE, "--bytes: too much for %d ranks", b->world.size);
    b->each = tr_calloc((size_t)b->world.size, sizeof *b->each);
    b->ours = tr_calloc((size_t)b->options.calls, sizeof *b->ours);
    b->theirs = tr_calloc((size_t)b->options.calls, sizeof *b->theirs);
    if (!b->each || !b->ours || !b->theirs) return tr_fail(err, TR_E_MEMORY, "out of memory");
    return take_buffers(b, most, all, err);
}

static void print_head(const bench *b)
{
    char library[128], nccl[32] = "";

    tr_mpi_version(library, sizeof library);
#ifdef HAVE_NCCL
    if (b->device) tr_nccl_version(nccl, sizeof nccl);
#endif
    printf("# trireme %s, %s%s%s, %d ranks, %d on %s; medians, the slowest member's\n",
           PACKAGE_VERSION, library, nccl[0] ? ", NCCL " : "", nccl, b->world.size,
           b->world.local_size, b->world.host);
    printf("# %-14s %5s %10s %10s %10s %9s %8s %9s %9s\n", "operation", "ranks", "bytes", "us",
           "plain us", "more us", "more %", "GB/s", "plain");
}

static tr_status run(bench *b, tr_err *err)
{
    tr_status st = TR_OK;

#ifdef HAVE_NCCL
    tr_comm *all = NULL;
    if (b->options.cuda) {
        st = tr_comm_split(&all, &b->world, 0, b->world.rank, "all", err);
        if (st == TR_OK) st = open_device(b, all, err);
        tr_comm_free(all);
    }
#endif
    st = tr_agree(&b->world, st == TR_OK ? prepare(b, err) : st, err);
    if (st == TR_OK && b->world.rank == 0) print_head(b);
    for (int i = 0; i < b->options.n_ranks && st == TR_OK; i++)
        st = bench_group(b, b->options.ranks[i], err);
    return st;
}

tr_status tr_bench_comm(int argc, char **argv, tr_err *err)
{
    bench b = {.send = NULL};
    tr_status st = tr_world_start(&b.world, err);

    if (st == TR_OK) {
        st = parse(&b.options, b.world.size, argc, argv, err);
        /* One rank among strangers is told so, and not what --ranks it may have. */
        if (!b.options.help && tr_launch_check(&b.world, err) != TR_OK) st = err->status;
        if (st == TR_OK && !b.options.help)
            st = run(&b, err);
        else if (st == TR_OK && b.world.rank == 0)
            fputs(help_text, stdout);
        tr_world_say(&b.world, st, err);
    }
    close_device(&b);
    free(b.each);
    free(b.ours);
    free(b.theirs);
    tr_world_finish(st);
    return st;
}
