/* A GPU and NCCL that are the host and MPI, so that what is above them (the communicators of mpi/, and the model on several devices) runs
 * where there are none.
 *
 * Lanes compute at once, as the CPU backend does. Other streams are queues, and nothing in one is done before somebody must
 * have it: a lane that is made to wait for an event, or a host that asks again and again. So a result that is read without
 * having been waited for is an old one, and shows. Every second call says that it is in progress. Sends outside of a group
 * leave at once, as they would; what they carry is what was there when they were begun. */
#include <config.h>

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mpi.h>

#include "kernels/cuda/comm.h"
#include "kernels/device.h"
#include "kernels/limits.h"
#include "kernels/number.h"
#include "nccl.h"
#include "tests/fake_nccl/fake.h"

enum { GROUP_MAX = 64, ASKED_MAX = 20 };

typedef struct item { /* of a group */
    bool sends;
    int peer;
    char *p;
    size_t bytes;
} item;

typedef enum kind { REDUCE, SCATTER, GATHER, BROADCAST, GROUP, COPY, TERMS, ROWS, PUSH, SWAP } kind;

typedef struct work {
    struct work *next;
    kind kind;
    struct fake_comm *comm;
    const void *send;
    void *recv;
    size_t n;
    ncclDataType_t type;
    ncclRedOp_t op;
    int root, n_items;
    item item[GROUP_MAX];
    tr_cuda_sum_args sum;
    tr_cuda_cache_rows_args rows;
    tr_cuda_push_group push_group;
    tr_cuda_push_args push;
    tr_cuda_swap_group swap_group;
    tr_cuda_swap_args swap;
} work;

struct fake_stream {
    struct fake_stream *gone; /* the one destroyed before */
    work *first, **last;
    uint64_t n_begun, n_done;
};

struct fake_event {
    struct fake_stream *of; /* NULL: not recorded */
    uint64_t at;
    int asked;
};

struct fake_comm {
    MPI_Comm mpi;
    int rank, size, n_calls;
    int blocking;
};

/* What the real ones keep in their libraries. */
static struct fake_stream lanes[TR_N_LANES], *gone;
static work *group;
static int group_depth, n_ids;
static tr_device *opened;
static const tr_ops *cpu_ops;
static bool leaves_codes;

static void *must(void *p)
{
    if (!p) abort(); /* a test machine without memory for a few bytes */
    return p;
}

/* ---- doing what is in a queue -------------------------------------------------------------------------------------- */

static size_t type_bytes(ncclDataType_t t)
{
    return t == ncclUint64 ? 8 : t == ncclFloat32 ? 4 : t == ncclBfloat16 ? 2 : 1;
}

static void add_term(char *sum, const char *x, size_t i, const work *w)
{
    if (w->type == ncclUint64) {
        uint64_t a, b;
        memcpy(&a, sum + 8 * i, 8);
        memcpy(&b, x + 8 * i, 8);
        if (b > a) memcpy(sum + 8 * i, &b, 8);
    } else if (w->type == ncclFloat32) {
        float a, b;
        memcpy(&a, sum + 4 * i, 4);
        memcpy(&b, x + 4 * i, 4);
        a += b;
        memcpy(sum + 4 * i, &a, 4);
    } else {
        uint16_t a, b;
        memcpy(&a, sum + 2 * i, 2);
        memcpy(&b, x + 2 * i, 2);
        a = tr_f32_to_bf16(tr_bf16_to_f32(a) + tr_bf16_to_f32(b));
        memcpy(sum + 2 * i, &a, 2);
    }
}

/* All members' terms, added up; of a scatter this member's stretch of them. */
static void reduce(const work *w)
{
    const struct fake_comm *c = w->comm;
    const size_t size = type_bytes(w->type), n = w->kind == SCATTER ? w->n * (size_t)c->size : w->n;
    char *all = must(malloc(n * size * (size_t)c->size + 1));

    MPI_Allgather(w->send, (int)(n * size), MPI_BYTE, all, (int)(n * size), MPI_BYTE, c->mpi);
    for (int m = 1; m < c->size; m++)
        for (size_t i = 0; i < n; i++)
            add_term(all, all + (size_t)m * n * size, i, w);
    memcpy(w->recv, all + (w->kind == SCATTER ? (size_t)c->rank * w->n * size : 0), w->n * size);
    free(all);
}

static void gather(const work *w)
{
    const size_t bytes = w->n * type_bytes(w->type);
    char *own = must(malloc(bytes + 1)); /* it may lie in recv */

    memcpy(own, w->send, bytes);
    MPI_Allgather(own, (int)bytes, MPI_BYTE, w->recv, (int)bytes, MPI_BYTE, w->comm->mpi);
    free(own);
}

static void exchange(const work *w)
{
    MPI_Request r[GROUP_MAX];

    for (int i = 0; i < w->n_items; i++) {
        const item *t = &w->item[i];
        if (t->sends)
            MPI_Isend(t->p, (int)t->bytes, MPI_BYTE, t->peer, 0, w->comm->mpi, &r[i]);
        else
            MPI_Irecv(t->p, (int)t->bytes, MPI_BYTE, t->peer, 0, w->comm->mpi, &r[i]);
    }
    MPI_Waitall(w->n_items, r, MPI_STATUSES_IGNORE);
}

static float number(const void *p, size_t i, tr_dtype type)
{
    return type == TR_BF16 ? tr_bf16_to_f32(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static void sum_terms(const tr_cuda_sum_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        float sum = 0;
        for (int m = 0; m < a->n_members; m++) {
            const size_t j = (size_t)(m < a->rank ? m : m - 1);
            const float x = m == a->rank ? number(a->own, i, a->dtype)
                                         : number(a->terms, j * a->n + i, a->dtype);
            sum = m ? sum + x : x;
        }
        if (a->dtype == TR_BF16)
            ((uint16_t *)a->out)[i] = tr_f32_to_bf16(sum);
        else
            ((float *)a->out)[i] = sum;
    }
}

static void cache_rows(const tr_cuda_cache_rows_args *a)
{
    for (int i = a->first; i < a->end; i++) {
        const size_t page = (size_t)a->list[i] / TR_PAGE_TOKENS,
                     offset = (size_t)a->list[i] % TR_PAGE_TOKENS;
        char *packed = a->packed + (size_t)i * a->row_bytes;
        for (int p = 0; p < a->n_pieces; p++) {
            char *cached = a->cache + page * a->page_bytes + a->at[p] + offset * a->bytes[p];
            memcpy(a->to_cache ? cached : packed, a->to_cache ? packed : cached, a->bytes[p]);
            packed += a->bytes[p];
        }
    }
}

static void perform(const work *w)
{
    switch (w->kind) {
    case REDUCE:
    case SCATTER:
        reduce(w);
        break;
    case GATHER:
        gather(w);
        break;
    case BROADCAST:
        MPI_Bcast(w->recv, (int)(w->n * type_bytes(w->type)), MPI_BYTE, w->root, w->comm->mpi);
        break;
    case GROUP:
        exchange(w);
        break;
    case COPY:
        memmove(w->recv, w->send, w->n);
        break;
    case TERMS:
        sum_terms(&w->sum);
        break;
    case PUSH:
        fake_push(&w->push_group, &w->push);
        break;
    case SWAP:
        fake_swap(&w->swap_group, &w->swap);
        break;
    default:
        cache_rows(&w->rows);
    }
}

static void drain(struct fake_stream *s, uint64_t until)
{
    while (s->n_done < until && s->first) {
        work *w = s->first;
        s->first = w->next;
        if (!s->first) s->last = &s->first;
        perform(w);
        s->n_done++;
        free(w);
    }
}

static work *enqueue(cudaStream_t s, kind k, struct fake_comm *comm)
{
    work *w = must(calloc(1, sizeof *w));

    w->kind = k;
    w->comm = comm;
    if (!s->last) s->last = &s->first;
    *s->last = w;
    s->last = &w->next;
    s->n_begun++;
    return w;
}

/* ---- the runtime ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaSuccess ? "no error" : "an error of the fake device";
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags)
{
    (void)flags;
    *s = must(calloc(1, sizeof **s));
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority)
{
    (void)priority;
    return cudaStreamCreateWithFlags(s, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    drain(s, s->n_begun);
    s->gone = gone; /* events that were recorded in it outlive it */
    gone = s;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t s)
{
    drain(s, s->n_begun);
    return cudaSuccess;
}

static bool is_lane(const struct fake_stream *s)
{
    return s >= lanes && s < lanes + TR_N_LANES;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags)
{
    (void)flags;
    if (is_lane(s) && e->of) drain(e->of, e->at); /* what a lane holds has been done */
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags)
{
    (void)flags;
    *e = must(calloc(1, sizeof **e));
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *e)
{
    return cudaEventCreateWithFlags(e, 0);
}

cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    free(e);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    *e = (struct fake_event){.of = s, .at = s->n_begun};
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t e)
{
    if (!e->of || e->of->n_done >= e->at) return cudaSuccess;
    if (++e->asked < ASKED_MAX) return cudaErrorNotReady;
    drain(e->of, e->at);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
    *ms = a->of && b->of ? 0.001f : 0.0f;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, int how, cudaStream_t s)
{
    work *w = enqueue(s, COPY, NULL);

    (void)how;
    w->send = from;
    w->recv = to;
    w->n = n;
    return cudaSuccess;
}

/* ---- NCCL --------------------------------------------------------------------------------------------------------------- */

ncclResult_t ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t r)
{
    return r == ncclSuccess ? "no error" : "an error of the fake NCCL";
}

const char *ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return "";
}

/* Member 0's rank of the world, and a number that is its own. */
ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    int word[2] = {0, ++n_ids};

    MPI_Comm_rank(MPI_COMM_WORLD, &word[0]);
    memcpy(id->internal, word, sizeof word);
    return ncclSuccess;
}

/* Member 0 hears who is there and tells all. */
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int n, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    int word[2], me, *member = must(calloc((size_t)n, sizeof *member));
    MPI_Group world, members;

    memcpy(word, id.internal, sizeof word);
    const int tag = 20000 + word[1];
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    member[0] = word[0];
    if (rank > 0) {
        MPI_Send(&(int[2]){rank, me}, 2, MPI_INT, word[0], tag, MPI_COMM_WORLD);
        MPI_Recv(member, n, MPI_INT, word[0], tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    }
    for (int i = 1; i < n && rank == 0; i++) {
        int who[2];
        MPI_Recv(who, 2, MPI_INT, MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        member[who[0]] = who[1];
    }
    for (int i = 1; i < n && rank == 0; i++)
        MPI_Send(member, n, MPI_INT, member[i], tag, MPI_COMM_WORLD);
    struct fake_comm *c = must(calloc(1, sizeof *c));
    c->rank = rank;
    c->size = n;
    c->blocking = config->blocking;
    MPI_Comm_group(MPI_COMM_WORLD, &world);
    MPI_Group_incl(world, n, member, &members);
    MPI_Comm_create_group(MPI_COMM_WORLD, members, tag, &c->mpi);
    MPI_Group_free(&members);
    MPI_Group_free(&world);
    free(member);
    *comm = c;
    return c->blocking ? ncclSuccess : ncclInProgress;
}

/* FAKE_NCCL_CALLS: after so many calls of a communicator it has failed. */
static bool has_failed(const struct fake_comm *comm)
{
    const char *calls = getenv("FAKE_NCCL_CALLS");
    return calls && comm->n_calls > strtol(calls, NULL, 10);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *said)
{
    *said = has_failed(comm)                            ? ncclSystemError
            : comm->n_calls % 3 == 1 && !comm->blocking ? ncclInProgress
                                                        : ncclSuccess;
    comm->n_calls++;
    return ncclSuccess;
}

static ncclResult_t said(ncclComm_t comm)
{
    return comm->n_calls++ % 2 && !comm->blocking ? ncclInProgress : ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    return said(comm);
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    MPI_Comm_free(&comm->mpi);
    free(comm);
    return ncclSuccess;
}

/* The main thread may be in a call: it keeps what it uses. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    (void)comm;
    return ncclSuccess;
}

/* A window is memory that was registered, once, and is given back. */
struct fake_window {
    void *p;
};

ncclResult_t ncclMemAlloc(void **p, size_t bytes)
{
    *p = malloc(bytes);
    return *p ? ncclSuccess : ncclSystemError;
}

ncclResult_t ncclMemFree(void *p)
{
    free(p);
    return ncclSuccess;
}

ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void *p, size_t bytes, ncclWindow_t *window,
                                    int flags)
{
    (void)comm;
    *window = p && bytes && flags == NCCL_WIN_COLL_SYMMETRIC ? malloc(sizeof **window) : NULL;
    if (!*window) return ncclSystemError;
    (*window)->p = p;
    return ncclSuccess;
}

ncclResult_t ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t window)
{
    (void)comm;
    free(window);
    return ncclSuccess;
}

static ncclResult_t collective(kind k, const void *send, void *recv, size_t n, ncclDataType_t type,
                               int root, ncclComm_t comm, cudaStream_t s)
{
    work *w = enqueue(s, k, comm);

    w->send = send;
    w->recv = recv;
    w->n = n;
    w->type = type;
    w->root = root;
    return said(comm);
}

ncclResult_t ncclAllReduce(const void *send, void *recv, size_t n, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t s)
{
    if ((type == ncclUint64) != (op == ncclMax)) return ncclSystemError;
    return collective(REDUCE, send, recv, n, type, 0, comm, s);
}

ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t n, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t s)
{
    return op == ncclSum ? collective(SCATTER, send, recv, n, type, 0, comm, s) : ncclSystemError;
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t n, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t s)
{
    return collective(GATHER, send, recv, n, type, 0, comm, s);
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t n, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t s)
{
    return collective(BROADCAST, send, recv, n, type, root, comm, s);
}

/* What was sent alone: MPI's until the end. */
typedef struct parcel {
    struct parcel *before;
    char bytes[];
} parcel;
static parcel *last_sent;

/* Alone: what is sent leaves at once. */
static ncclResult_t letter(bool sends, void *p, size_t bytes, int peer, ncclComm_t comm,
                           cudaStream_t s)
{
    if (sends) {
        MPI_Request r;
        parcel *kept = must(malloc(sizeof *kept + bytes));
        kept->before = last_sent;
        last_sent = kept;
        drain(s, s->n_begun);
        memcpy(kept->bytes, p, bytes);
        MPI_Isend(kept->bytes, (int)bytes, MPI_BYTE, peer, 0, comm->mpi, &r);
        MPI_Request_free(&r);
        return said(comm);
    }
    work *w = enqueue(s, GROUP, comm);
    w->item[w->n_items++] = (item){.peer = peer, .p = p, .bytes = bytes};
    return said(comm);
}

static ncclResult_t send_or_recv(bool sends, void *p, size_t n, ncclDataType_t type, int peer,
                                 ncclComm_t comm, cudaStream_t s)
{
    const size_t bytes = n * type_bytes(type);

    if (!group_depth) return letter(sends, p, bytes, peer, comm, s);
    if (!group) group = enqueue(s, GROUP, comm);
    if (group->n_items == GROUP_MAX || group->comm != comm) return ncclSystemError;
    group->item[group->n_items++] = (item){.sends = sends, .peer = peer, .p = p, .bytes = bytes};
    return ncclSuccess;
}

ncclResult_t ncclSend(const void *p, size_t n, ncclDataType_t type, int to, ncclComm_t comm,
                      cudaStream_t s)
{
    return send_or_recv(true, (void *)p, n, type, to, comm, s);
}

ncclResult_t ncclRecv(void *p, size_t n, ncclDataType_t type, int from, ncclComm_t comm,
                      cudaStream_t s)
{
    return send_or_recv(false, p, n, type, from, comm, s);
}

ncclResult_t ncclGroupStart(void)
{
    group_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    struct fake_comm *c = group ? group->comm : NULL;

    if (--group_depth) return ncclSuccess;
    group = NULL;
    return c ? said(c) : ncclSuccess;
}

/* ---- kernels and the device ------------------------------------------------------------------------------------------------ */

cudaError_t tr_cuda_sum_terms(const tr_cuda_sum_args *a, cudaStream_t stream)
{
    enqueue(stream, TERMS, NULL)->sum = *a;
    return cudaSuccess;
}

cudaError_t tr_cuda_cache_rows(const tr_cuda_cache_rows_args *a, cudaStream_t stream)
{
    enqueue(stream, ROWS, NULL)->rows = *a;
    return cudaSuccess;
}

cudaError_t tr_cuda_push(const tr_cuda_push_group *g, const tr_cuda_push_args *a,
                         cudaStream_t stream)
{
    work *w = enqueue(stream, PUSH, NULL);

    w->push_group = *g;
    w->push = *a;
    return cudaSuccess;
}

cudaError_t tr_cuda_swap(const tr_cuda_swap_group *g, const tr_cuda_swap_args *a,
                         cudaStream_t stream)
{
    work *w = enqueue(stream, SWAP, NULL);

    w->swap_group = *g;
    w->swap = *a;
    return cudaSuccess;
}

int tr_cuda_ordinal(const tr_device *device)
{
    (void)device;
    return 0;
}

cudaStream_t tr_cuda_stream(const tr_device *device, tr_lane lane)
{
    (void)device;
    return &lanes[lane];
}

bool fake_norm(const struct tr_norm_args *a)
{
    return (leaves_codes ? fake_w8a8_norm : cpu_ops->norm)(opened, TR_LANE_MAIN, a) == TR_OK;
}

/* Memory that other processes may be given is the fake runtime's, else it is the CPU backend's. */
static tr_status symmetric_alloc(tr_device *device, size_t bytes, int memory, void **out)
{
    if (memory != TR_MEMORY_SYMMETRIC) return cpu_ops->alloc(device, bytes, memory, out);
    return cudaMalloc(out, bytes ? bytes : 1) == cudaSuccess ? TR_OK : TR_E_MEMORY;
}

static void symmetric_release(tr_device *device, void *p)
{
    if (!p || cudaFree(p) != cudaSuccess) cpu_ops->release(device, p);
}

static tr_status failing_router(tr_device *device, tr_lane lane, const struct tr_router_args *a)
{
    struct tr_router_args wide = *a;

    wide.n_experts = TR_CPU_EXPERTS_MAX + 1;
    return cpu_ops->router(device, lane, &wide);
}

/* The CPU's table under another name. FAKE_GPU: its uuid, for ranks that get the same one. FAKE_FAILS: no layer of experts comes to an
 * end. */
tr_status tr_cuda_open(tr_device **out, const tr_ops **ops, const tr_device_options *options,
                       int *usable, tr_err *err)
{
    static tr_ops table;
    const char *uuid = getenv("FAKE_GPU");
    const tr_ops *cpu = NULL;

    *usable = !getenv("FAKE_UNFIT");
    if (!*usable) return tr_fail(err, TR_E_USAGE, "%s", getenv("FAKE_UNFIT"));
    const tr_status st = tr_cpu_open(out, &cpu, options, err);
    if (st != TR_OK) return st;
    opened = *out;
    cpu_ops = cpu;
    table = *cpu;
    table.name = "cuda";
    leaves_codes = fake_w8a8(cpu, &table);
    table.alloc = symmetric_alloc;
    table.release = symmetric_release;
    if (getenv("FAKE_FAILS")) table.router = failing_router;
    *ops = &table;
    tr_device_head *head = (tr_device_head *)(void *)*out;
    if (uuid && *uuid)
        snprintf(head->uuid, sizeof head->uuid, "%s", uuid);
    else
        snprintf(head->uuid, sizeof head->uuid, "GPU-fake-%d", options->i_device);
    snprintf(head->pci, sizeof head->pci, "fa4e:%02x:00.0", options->i_device & 0xff);
    head->near = (tr_near){.numa_node = options->i_device / 2};
    return TR_OK;
}

/* FAKE_GPUS: how many a process sees; not set: enough. FAKE_UNFIT: why they are of no use. */
void tr_cuda_look(tr_gpu_seen *seen, int i, int n_ranks)
{
    const char *n = getenv("FAKE_GPUS"), *unfit = getenv("FAKE_UNFIT"), *uuid = getenv("FAKE_GPU");

    seen->n = n && *n ? (int)strtol(n, NULL, 10) : n_ranks;
    snprintf(seen->unfit, sizeof seen->unfit, "%s", unfit ? unfit : "");
    const int ordinal = tr_device_choose(seen->n, i, n_ranks);
    if (ordinal < 0) return;
    if (uuid && *uuid)
        snprintf(seen->uuid, sizeof seen->uuid, "%s", uuid);
    else
        snprintf(seen->uuid, sizeof seen->uuid, "GPU-fake-%d", ordinal);
}
