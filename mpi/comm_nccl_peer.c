/* Peer windows. Every member exports its memory and opens what the others export; how that went is agreed after every step, so
 * that all members have the window or none has. A process may be of another container or see other GPUs: what decides is whether
 * the driver opens the memory, not what the process can see. */
#include <config.h>

#include "mpi/comm_nccl_peer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "kernels/cuda/comm.h"
#include "mpi/nccl_priv.h"

enum {
    ALIGN = 256,
    BLOCK_BYTES = 2 << 20, /* the driver shares whole blocks of this size: the arena has its own */
    WHY = 160,
};

struct tr_peers {
    tr_nccl *nccl;
    tr_comm *host; /* kept */
    int rank, size;
    char *arena;
    size_t bytes, taken;
    tr_peer_place place; /* of the arena */
    struct opened {      /* others' memory, to be closed */
        struct opened *next;
        void *memory;
    } * opened;
};

/* What a member says of one piece of memory; sent as it is. */
typedef struct offer {
    int32_t fails; /* 1: it cannot, and why */
    int32_t node;
    char bus[32]; /* "0000:1b:00.0" */
    char why[WHY];
    cudaIpcMemHandle_t handle;
} offer;

/* ---- agreeing ------------------------------------------------------------------------------------------------------ */

static tr_status gather(tr_comm *host, const offer *mine, offer all[TR_MAX_PEERS], tr_err *err)
{
    size_t bytes[TR_MAX_PEERS];
    tr_ticket t;

    for (int i = 0; i < tr_comm_size(host); i++)
        bytes[i] = sizeof *mine;
    tr_status st = tr_comm_all_gather(host, mine, all, bytes, &t, err);
    return st == TR_OK ? tr_comm_wait(host, TR_LANE_MAIN, t, err) : st;
}

/* The lowest member that cannot. */
static bool anybody_fails(const offer *all, int n, char *why, size_t n_why)
{
    for (int i = 0; i < n; i++) {
        if (!all[i].fails) continue;
        snprintf(why, n_why, "member %d: %.*s", i, WHY - 1, all[i].why);
        return true;
    }
    return false;
}

static void refuse(offer *o, const char *call, cudaError_t e)
{
    (void)cudaGetLastError();
    o->fails = 1;
    snprintf(o->why, sizeof o->why, "%s: %s", call, cudaGetErrorString(e));
}

/* A GPU that this process does not see is reached all the same, or is not: opening its memory tells. */
static void ask_access(offer *o, int device, const offer *other)
{
    int theirs = 0, can = 1;

    if (cudaDeviceGetByPCIBusId(&theirs, other->bus) != cudaSuccess) {
        (void)cudaGetLastError();
        return;
    }
    const cudaError_t e = cudaDeviceCanAccessPeer(&can, device, theirs);
    if (e != cudaSuccess) {
        refuse(o, "cudaDeviceCanAccessPeer", e);
    } else if (!can) {
        o->fails = 1;
        snprintf(o->why, sizeof o->why, "GPU %s does not reach the memory of GPU %s", o->bus,
                 other->bus);
    }
}

/* ---- mapping --------------------------------------------------------------------------------------------------------- */

static offer offer_of(const tr_peers *p, void *memory)
{
    offer o = {.node = p->nccl->world->node_first};
    cudaError_t e = cudaDeviceGetPCIBusId(o.bus, (int)sizeof o.bus, p->nccl->ordinal);

    if (e != cudaSuccess) {
        refuse(&o, "cudaDeviceGetPCIBusId", e);
        return o;
    }
    e = cudaIpcGetMemHandle(&o.handle, memory);
    if (e != cudaSuccess) refuse(&o, "cudaIpcGetMemHandle", e);
    return o;
}

static void open_other(tr_peers *p, offer *mine, const offer *other, char **at)
{
    struct opened *o = calloc(1, sizeof *o);

    if (!o) {
        mine->fails = 1;
        snprintf(mine->why, sizeof mine->why, "out of memory");
        return;
    }
    const cudaError_t e =
        cudaIpcOpenMemHandle(&o->memory, other->handle, cudaIpcMemLazyEnablePeerAccess);
    if (e != cudaSuccess) {
        refuse(mine, "cudaIpcOpenMemHandle", e);
        free(o);
        return;
    }
    *at = o->memory;
    o->next = p->opened;
    p->opened = o;
}

/* Collective. *why empty: it is mapped on all members. mine: how this member's preparations went. */
static tr_status map(tr_peers *p, offer *mine, void *memory, tr_peer_place *out, char *why,
                     size_t n_why, tr_err *err)
{
    offer all[TR_MAX_PEERS];
    tr_status st = TR_OK;

    why[0] = '\0';
    st = gather(p->host, mine, all, err);
    if (st != TR_OK || anybody_fails(all, p->size, why, n_why)) return st;
    for (int i = 0; i < p->size && !mine->fails; i++) {
        if (all[i].node != mine->node) {
            mine->fails = 1;
            snprintf(mine->why, sizeof mine->why, "the members are of several hosts");
        } else if (i != p->rank) {
            ask_access(mine, p->nccl->ordinal, &all[i]);
        }
    }
    /* Nobody opens anything before everybody may. */
    st = gather(p->host, mine, all, err);
    if (st != TR_OK || anybody_fails(all, p->size, why, n_why)) return st;
    *out = (tr_peer_place){.at = {NULL}};
    out->at[p->rank] = memory;
    for (int i = 0; i < p->size && !mine->fails; i++)
        if (i != p->rank) open_other(p, mine, &all[i], &out->at[i]);
    st = gather(p->host, mine, all, err);
    if (st == TR_OK) anybody_fails(all, p->size, why, n_why);
    return st;
}

/* ---- opening and closing --------------------------------------------------------------------------------------------- */

/* The process's abort word; it stays as long as the process's NCCL. */
static tr_status take_abort_word(tr_nccl *nccl, tr_err *err)
{
    tr_status st = TR_OK;

    if (nccl->abort_h) return TR_OK;
    TR_CUDA(cudaHostAlloc((void **)&nccl->abort_h, sizeof *nccl->abort_h, cudaHostAllocMapped));
    *nccl->abort_h = 0;
    TR_CUDA(cudaHostGetDevicePointer((void **)&nccl->abort_d, (void *)nccl->abort_h, 0));

done:
    return st;
}

static tr_status take_arena(tr_peers *p, unsigned char fill, tr_err *err)
{
    tr_status st = TR_OK;
    void *memory = NULL;

    TR_CUDA(cudaSetDevice(p->nccl->ordinal));
    st = take_abort_word(p->nccl, err);
    if (st != TR_OK) goto done;
    TR_CUDA(cudaMalloc(&memory, p->bytes));
    p->arena = memory;
    TR_CUDA(cudaMemset(p->arena, fill, p->bytes));
    TR_CUDA(cudaDeviceSynchronize()); /* before a peer may store to it */

done:
    return st;
}

tr_status tr_peers_open(tr_peers **out, tr_nccl *nccl, tr_comm *host, size_t arena_bytes,
                        unsigned char fill, char *why, size_t n_why, tr_err *err)
{
    offer mine = {.node = nccl->world->node_first};
    tr_err local = {.status = TR_OK};
    size_t blocks;
    tr_status st = TR_OK;

    *out = NULL;
    if (tr_comm_size(host) < 2 || tr_comm_size(host) > TR_MAX_PEERS) {
        snprintf(why, n_why, "%d members, of 2 to %d", tr_comm_size(host), TR_MAX_PEERS);
        return TR_OK;
    }
    tr_peers *p = calloc(1, sizeof *p);
    /* Without memory for a struct the others are let down, and their limit ends it. */
    if (!p) return tr_fail(err, TR_E_MEMORY, "out of memory");
    p->nccl = nccl;
    p->host = host;
    p->rank = tr_comm_rank(host);
    p->size = tr_comm_size(host);
    blocks = tr_ceil_div(arena_bytes ? arena_bytes : 1, BLOCK_BYTES);
    if (!tr_mul(&p->bytes, blocks, BLOCK_BYTES))
        tr_fail(&local, TR_E_MEMORY, "%zu bytes", arena_bytes);
    else
        take_arena(p, fill, &local);
    if (local.status == TR_OK) {
        mine = offer_of(p, p->arena);
    } else {
        mine.fails = 1;
        snprintf(mine.why, sizeof mine.why, "%.*s", WHY - 1, local.text);
    }
    st = map(p, &mine, p->arena, &p->place, why, n_why, err);
    if (st == TR_OK && !why[0])
        *out = p;
    else
        tr_peers_close(p, true);
    return st;
}

void tr_peers_close(tr_peers *p, bool quiet)
{
    if (!p) return;
    cudaSetDevice(p->nccl->ordinal);
    while (p->opened) {
        struct opened *o = p->opened;
        p->opened = o->next;
        if (quiet && cudaIpcCloseMemHandle(o->memory) != cudaSuccess) (void)cudaGetLastError();
        free(o);
    }
    if (quiet && p->arena) cudaFree(p->arena);
    free(p);
}

/* ---- what is in it ----------------------------------------------------------------------------------------------------- */

int tr_peers_rank(const tr_peers *p)
{
    return p->rank;
}

int tr_peers_size(const tr_peers *p)
{
    return p->size;
}

tr_status tr_peers_take(tr_peers *p, size_t bytes, tr_peer_place *out, tr_err *err)
{
    if (bytes > p->bytes - p->taken)
        return tr_fail(err, TR_E_MEMORY, "peer memory: %zu bytes wanted, %zu of %zu left", bytes,
                       p->bytes - p->taken, p->bytes);
    *out = (tr_peer_place){.at = {NULL}};
    for (int i = 0; i < p->size; i++)
        out->at[i] = p->place.at[i] + p->taken;
    /* bytes fits, and p->bytes is a multiple of ALIGN */
    p->taken += tr_ceil_div(bytes, ALIGN) * ALIGN;
    return TR_OK;
}

tr_status tr_peers_map(tr_peers *p, void *memory, tr_peer_place *out, tr_err *err)
{
    char why[WHY + 32];

    cudaSetDevice(p->nccl->ordinal); /* it has been before; what does not work says so below */
    offer mine = offer_of(p, memory);
    tr_status st = map(p, &mine, memory, out, why, sizeof why, err);
    return st == TR_OK && why[0] ? tr_fail(err, TR_E_COMM, "peer memory: %s", why) : st;
}

const volatile uint32_t *tr_peers_abort(const tr_peers *p)
{
    return p->nccl->abort_d;
}
