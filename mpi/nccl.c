#include <config.h>

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "kernels/cuda/comm.h"
#include "mpi/nccl_priv.h"

enum {
    CONNECT_S = 120,  /* for all members to come; hundreds of ranks need seconds */
    FINALIZE_S = 5,   /* for the others to leave */
    ABORT_LOCK_S = 1, /* the watchdog waits so long for the main thread's call to end */
};

/* ---- calls and their answers ------------------------------------------------------------------------------------- */

void tr_nccl_stay(const tr_nccl *nccl)
{
    while (atomic_load(&nccl->aborted))
        pause(); /* the watchdog's thread is ending the process */
}

void tr_nccl_enter(tr_nccl *nccl)
{
    pthread_mutex_lock(&nccl->lock);
    if (!atomic_load(&nccl->aborted)) return;
    pthread_mutex_unlock(&nccl->lock);
    tr_nccl_stay(nccl);
}

void tr_nccl_leave(tr_nccl *nccl)
{
    pthread_mutex_unlock(&nccl->lock);
}

/* NCCL's last words may have several lines. */
static void first_line(char *out, size_t room, const char *text)
{
    snprintf(out, room, "%s", text ? text : "");
    out[strcspn(out, "\r\n")] = '\0';
}

tr_status tr_nccl_status(tr_nccl *nccl, ncclComm_t comm, const char *call, ncclResult_t said,
                         tr_err *err)
{
    char last[512] = "";

    if (said == ncclSuccess) return TR_OK;
    tr_nccl_enter(nccl);
    first_line(last, sizeof last, ncclGetLastError(comm));
    tr_nccl_leave(nccl);
    return tr_fail(err, TR_E_COMM, "%s: %s%s%s", call, ncclGetErrorString(said),
                   last[0] ? ": " : "", last);
}

tr_status tr_nccl_settle(tr_nccl *nccl, ncclComm_t comm, tr_comm *host, const char *call,
                         ncclResult_t said, double seconds, tr_err *err)
{
    const uint64_t until_ns = tr_now_ns() + (uint64_t)(seconds * 1e9);

    for (int i = 0; said == ncclInProgress; i++) {
        tr_nccl_enter(nccl);
        const ncclResult_t asked = ncclCommGetAsyncError(comm, &said);
        tr_nccl_leave(nccl);
        if (asked != ncclSuccess) said = asked;
        if (said != ncclInProgress) break;
        if (seconds > 0 && tr_now_ns() > until_ns)
            return tr_fail(err, TR_E_COMM, "%s: not all members have come within %g s", call,
                           seconds);
        tr_comm_progress(host);
        if (i > 100) sched_yield();
    }
    return tr_nccl_status(nccl, comm, call, said, err);
}

tr_status tr_nccl_cuda(const char *call, cudaError_t said, tr_err *err)
{
    if (said == cudaSuccess) return TR_OK;
    (void)cudaGetLastError(); /* those that are not sticky are forgotten */
    return tr_fail(err, said == cudaErrorMemoryAllocation ? TR_E_MEMORY : TR_E_DEVICE, "%s: %s",
                   call, cudaGetErrorString(said));
}

/* ---- what the watchdog's thread calls ----------------------------------------------------------------------------- */

/* Errors that came by themselves: a peer whose process has gone, a link. While the main thread is in a call it will hear of
 * them itself. */
static int has_failed(void *ctx, char *text, size_t n)
{
    tr_nccl *nccl = ctx;
    int found = 0;

    if (pthread_mutex_trylock(&nccl->lock) != 0) return 0;
    for (const tr_nccl_seat *s = nccl->seats; s && !found; s = s->next) {
        ncclResult_t said = ncclSuccess;
        const ncclResult_t asked = ncclCommGetAsyncError(s->comm, &said);
        char last[256];
        if (asked != ncclSuccess) said = asked;
        if (said == ncclSuccess || said == ncclInProgress) continue;
        first_line(last, sizeof last, ncclGetLastError(s->comm));
        snprintf(text, n, "NCCL on %s: %s%s%s", s->name, ncclGetErrorString(said),
                 last[0] ? ": " : "", last);
        found = 1;
    }
    pthread_mutex_unlock(&nccl->lock);
    return found;
}

/* Kernels that wait for a rank that will not come leave the device. Said before: what follows them on the streams then runs
 * on what is not there, so nothing it makes may leave this process (tr_nccl_stay). A call that does not end keeps its
 * communicators; the process ends all the same. */
static void abort_all(void *ctx)
{
    tr_nccl *nccl = ctx;
    struct timespec until;

    atomic_store(&nccl->aborted, true);
    if (nccl->abort_h) *nccl->abort_h = 1;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ABORT_LOCK_S;
    if (pthread_mutex_timedlock(&nccl->lock, &until) != 0) return;
    for (tr_nccl_seat *s = nccl->seats; s; s = s->next)
        ncclCommAbort(s->comm);
    nccl->seats = NULL;
    pthread_mutex_unlock(&nccl->lock);
}

/* ---- opening and closing ------------------------------------------------------------------------------------------ */

tr_status tr_nccl_open(tr_nccl **out, tr_world *world, tr_device *device, const tr_ops *ops,
                       tr_err *err)
{
    const char *multicast = getenv("NCCL_NVLS_ENABLE");

    *out = NULL;
    if (multicast && strcmp(multicast, "0") != 0)
        return tr_fail(
            err, TR_E_USAGE,
            "NCCL_NVLS_ENABLE=%s: multicast is not to be relied on; 0 is wanted, or nothing",
            multicast);
    if (strcmp(ops->name, "cuda") != 0)
        return tr_fail(err, TR_E_USAGE, "NCCL moves a GPU's memory, not that of %s", ops->name);
    tr_nccl *nccl = calloc(1, sizeof *nccl);
    if (!nccl || pthread_mutex_init(&nccl->lock, NULL) != 0) {
        free(nccl);
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    nccl->world = world;
    nccl->device = device;
    nccl->ops = ops;
    nccl->ordinal = tr_cuda_ordinal(device);
    nccl->guard = (tr_world_guard){.ctx = nccl, .failed = has_failed, .abort = abort_all};
    world->guard = &nccl->guard;
    setenv("NCCL_NVLS_ENABLE", "0",
           0); /* parallel.md 5.4, 10.1: multicast is not to be relied on */
    *out = nccl;
    return TR_OK;
}

void tr_nccl_close(tr_nccl *nccl)
{
    if (!nccl) return;
    nccl->world->guard = NULL;
    if (nccl->abort_h) cudaFreeHost((void *)nccl->abort_h);
    pthread_mutex_destroy(&nccl->lock);
    free(nccl);
}

/* Member 0's id to all. */
static tr_status share_id(ncclUniqueId *id, tr_nccl *nccl, tr_comm *host, tr_err *err)
{
    tr_ticket t;
    tr_status st = TR_OK;

    memset(id, 0, sizeof *id);
    if (tr_comm_rank(host) == 0)
        st = tr_nccl_status(nccl, NULL, "ncclGetUniqueId", ncclGetUniqueId(id), err);
    st = tr_comm_agree(host, st, err);
    if (st == TR_OK) st = tr_comm_broadcast(host, 0, id, sizeof *id, &t, err);
    return st == TR_OK ? tr_comm_wait(host, TR_LANE_MAIN, t, err) : st;
}

tr_status tr_nccl_connect(tr_nccl_seat *seat, tr_nccl *nccl, tr_comm *host, const char *name,
                          bool blocking, tr_status mine, tr_err *err)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId id;
    tr_status st = mine;

    *seat = (tr_nccl_seat){.comm = NULL};
    snprintf(seat->name, sizeof seat->name, "%s", name);
    config.blocking = blocking;
    config.commName = seat->name;
    if (st == TR_OK) st = tr_nccl_cuda("cudaSetDevice", cudaSetDevice(nccl->ordinal), err);
    st = tr_comm_agree(host, st, err);
    if (st == TR_OK) st = share_id(&id, nccl, host, err);
    if (st != TR_OK) return tr_within(err, "NCCL for %s", seat->name);
    tr_nccl_enter(nccl);
    const ncclResult_t said =
        ncclCommInitRankConfig(&seat->comm, tr_comm_size(host), id, tr_comm_rank(host), &config);
    tr_nccl_leave(nccl);
    st = tr_nccl_settle(nccl, seat->comm, host, "ncclCommInitRankConfig", said, CONNECT_S, err);
    st = tr_comm_agree(host, st, err);
    if (st != TR_OK) {
        tr_within(err, "NCCL for %s", seat->name);
        if (seat->comm) ncclCommAbort(seat->comm);
        seat->comm = NULL;
        return st;
    }
    tr_nccl_enter(nccl);
    seat->next = nccl->seats;
    nccl->seats = seat;
    tr_nccl_leave(nccl);
    return TR_OK;
}

void tr_nccl_disconnect(tr_nccl_seat *seat, tr_nccl *nccl, tr_comm *host, bool well)
{
    tr_err ignored;

    if (!seat->comm) return;
    tr_nccl_enter(nccl);
    tr_nccl_seat **at = &nccl->seats;
    while (*at && *at != seat)
        at = &(*at)->next;
    if (*at) *at = seat->next;
    tr_nccl_leave(nccl);
    if (well)
        well = tr_nccl_settle(nccl, seat->comm, host, "ncclCommFinalize",
                              ncclCommFinalize(seat->comm), FINALIZE_S, &ignored) == TR_OK;
    if (well)
        ncclCommDestroy(seat->comm);
    else
        ncclCommAbort(seat->comm);
    seat->comm = NULL;
}

void tr_nccl_version(char *text, size_t n)
{
    int v = 0;

    if (ncclGetVersion(&v) != ncclSuccess) v = NCCL_VERSION_CODE;
    snprintf(text, n, "%d.%d.%d", v / 10000, v / 100 % 100, v % 100);
}

/* ---- what is told at start ---------------------------------------------------------------------------------------- */

static bool is_set(const char *name)
{
    const char *value = getenv(name);
    return value && *value && strcmp(value, "0") != 0;
}

/* Of a host's GPUs those that this process does not see may be reached all the same: by their addresses NCCL finds them. */
static tr_way local_way(const tr_nccl *nccl, const char *pci)
{
    int other = -1, can = 0;

    if (!is_set("NCCL_P2P_DISABLE")) {
        if (cudaDeviceGetByPCIBusId(&other, pci) != cudaSuccess) {
            (void)cudaGetLastError();
            return TR_WAY_SAME_HOST;
        }
        if (cudaDeviceCanAccessPeer(&can, nccl->ordinal, other) != cudaSuccess)
            (void)cudaGetLastError();
    }
    if (can) return TR_WAY_P2P;
    return is_set("NCCL_SHM_DISABLE") ? TR_WAY_NET : TR_WAY_SHM;
}

void tr_nccl_ways(const tr_nccl *nccl, tr_bound *all, int n, int me)
{
    tr_bound *mine = &all[me];

    memset(mine->peers, 0, sizeof mine->peers);
    for (int i = 0; i < n; i++) {
        char pci[sizeof all[i].pci + 1];
        if (i == me) continue;
        snprintf(pci, sizeof pci, "%.*s", (int)sizeof all[i].pci, all[i].pci);
        if (strncmp(all[i].host, mine->host, sizeof mine->host) != 0)
            mine->peers[TR_WAY_NET]++;
        else
            mine->peers[local_way(nccl, pci)]++;
    }
}

tr_status tr_nccl_log_beside(const char *out, tr_err *err)
{
    char *name = NULL;
    size_t n = 0;

    if (!out || !getenv("NCCL_DEBUG") || getenv("NCCL_DEBUG_FILE")) return TR_OK;
    const size_t room = 2 * strlen(out) + sizeof ".nccl.%h.%p";
    name = malloc(room);
    if (!name) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (const char *p = out; *p; p++) { /* a % of a name is none of NCCL's */
        name[n++] = *p;
        if (*p == '%') name[n++] = '%';
    }
    snprintf(name + n, room - n, ".nccl.%%h.%%p");
    setenv("NCCL_DEBUG_FILE", name, 1);
    free(name);
    return TR_OK;
}
