/* Exchanges of cache rows by kernels that store them where they belong in the other members' caches (kernels/cuda/push.h), in
 * place of packing, gathering and putting back. They go to streams of their own: what computes on the main lane goes on beside
 * them, and whoever reads the rows waits for the event behind them.
 *
 * Gathers and all-to-alls into memory that is reached, by kernels that store into the other members' receive buffers
 * (kernels/cuda/swap.h); on the communicator's stream, as NCCL's are. */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "kernels/cuda/push.h"
#include "kernels/cuda/swap.h"
#include "mpi/comm_nccl_priv.h"

enum {
    REACHED_MAX = 4,
    TRIED = 4096, /* bytes from everybody to everybody, to see whether they arrive */
    TRIES = 2,
    LIMIT_S = 10, /* for what takes some 0.01 ms once everybody is there */
};

/* Exchanges of one piece of memory are one behind the other, those of different pieces are not: each has a stream, flags and
 * an epoch of its own. */
typedef struct reached {
    char *memory; /* that rows are pushed into; NULL: free */
    size_t bytes;
    tr_peer_place place;
    tr_cuda_push_group group;
    cudaStream_t stream;
} reached;

struct tr_nccl_pusher {
    tr_peers *peers;
    reached reached[REACHED_MAX];
    tr_cuda_swap_group swap; /* of all of them: swaps are on one stream */
};

/* ---- opening ------------------------------------------------------------------------------------------------------- */

/* The members' largest words. All have come here. */
static tr_status largest(tr_comm_nccl *c, uint64_t *words, size_t n, tr_err *err)
{
    tr_ticket t;
    tr_status st = tr_comm_all_max_u64(c->base.host, words, n, &t, err);

    return st == TR_OK ? tr_comm_wait(c->base.host, TR_LANE_MAIN, t, err) : st;
}

/* Flags in every member's memory, and counters, for each piece. */
static tr_status take_groups(tr_comm_nccl *c, tr_nccl_pusher *p, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < REACHED_MAX && st == TR_OK; i++) {
        tr_peer_place flags, words;
        tr_cuda_push_group *g = &p->reached[i].group;
        st = tr_peers_take(p->peers, TR_CUDA_PUSH_FLAGS * sizeof **g->flags, &flags, err);
        if (st == TR_OK)
            st = tr_peers_take(p->peers, TR_CUDA_PUSH_WORDS * sizeof *g->words, &words, err);
        if (st != TR_OK) return st;
        *g = (tr_cuda_push_group){.rank = c->base.rank,
                                  .n_members = c->base.size,
                                  .words = (uint32_t *)(void *)words.at[c->base.rank],
                                  .abort = tr_peers_abort(p->peers)};
        for (int m = 0; m < c->base.size; m++)
            g->flags[m] = (uint32_t *)(void *)flags.at[m];
    }
    return st;
}

static void close_streams(tr_nccl_pusher *p)
{
    for (int i = 0; i < REACHED_MAX; i++)
        if (p->reached[i].stream) cudaStreamDestroy(p->reached[i].stream);
}

static tr_status take_swap(tr_comm_nccl *c, tr_nccl_pusher *p, tr_err *err)
{
    tr_peer_place flags, words;
    tr_cuda_swap_group *g = &p->swap;

    tr_status st = tr_peers_take(p->peers, TR_CUDA_SWAP_FLAGS * sizeof **g->flags, &flags, err);
    if (st == TR_OK)
        st = tr_peers_take(p->peers, TR_CUDA_SWAP_WORDS * sizeof *g->words, &words, err);
    if (st != TR_OK) return st;
    *g = (tr_cuda_swap_group){.rank = c->base.rank,
                              .n_members = c->base.size,
                              .words = (uint32_t *)(void *)words.at[c->base.rank],
                              .abort = tr_peers_abort(p->peers)};
    for (int m = 0; m < c->base.size; m++)
        g->flags[m] = (uint64_t *)(void *)flags.at[m];
    return TR_OK;
}

/* What moves is short beside what computes: its blocks go first where there is a choice. */
static tr_status open_streams(tr_nccl_pusher *p, tr_err *err)
{
    int least = 0, greatest = 0;
    tr_status st = TR_OK;

    TR_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    for (int i = 0; i < REACHED_MAX; i++)
        TR_CUDA(
            cudaStreamCreateWithPriority(&p->reached[i].stream, cudaStreamNonBlocking, greatest));
    TR_CUDA(tr_cuda_push_load());
    TR_CUDA(tr_cuda_swap_load());

done:
    return st;
}

/* Byte i of what member `from` gives member `to`; another one in every try. */
static unsigned char given(int try, int from, int to, size_t i)
{
    return (unsigned char)((size_t)(1 + try * 89 + from * 37 + to * 11) + i * (i >> 8 | 1));
}

/* True: the stream's work has ended well within the limit. */
static bool ends(const tr_comm_nccl *c, double seconds)
{
    const uint64_t until_ns = tr_now_ns() + (uint64_t)(seconds * 1e9);
    cudaError_t e;

    while ((e = cudaStreamQuery(c->stream)) == cudaErrorNotReady && tr_now_ns() < until_ns)
        tr_comm_progress(c->base.host);
    (void)cudaGetLastError();
    return e == cudaSuccess;
}

/* One swap. `place`: receive buffers, TRIED bytes of each member, and behind them what is given. False: not what was given. */
static bool try_swap(const tr_comm_nccl *c, const tr_nccl_pusher *p, const tr_peer_place *place,
                     char *host, int try)
{
    const int me = c->base.rank, n = c->base.size;
    const size_t all = (size_t)n * TRIED;
    char *const in = place->at[me], *const out = in + all;
    tr_cuda_swap_args a = {.memory = {NULL}};
    bool right = true;

    for (int m = 0; m < n; m++) {
        for (size_t i = 0; i < TRIED; i++)
            host[(size_t)m * TRIED + i] = (char)given(try, me, m, i);
        a.memory[m] = place->at[m];
        a.from[m] = out + (size_t)m * TRIED;
        a.to[m] = in + (size_t)m * TRIED;
        a.n_send[m] = a.n_recv[m] = TRIED;
    }
    if (cudaMemcpy(out, host, all, cudaMemcpyHostToDevice) != cudaSuccess ||
        cudaDeviceSynchronize() != cudaSuccess ||
        tr_cuda_swap(&p->swap, &a, c->stream) != cudaSuccess)
        return false;
    if (!ends(c, LIMIT_S)) {
        *c->nccl->abort_h = 1;
        ends(c, 1); /* it leaves */
        return false;
    }
    if (cudaMemcpy(host, in, all, cudaMemcpyDeviceToHost) != cudaSuccess) return false;
    for (int m = 0; m < n; m++)
        for (size_t i = 0; i < TRIED; i++)
            right &= (unsigned char)host[(size_t)m * TRIED + i] == given(try, m, me, i);
    return right;
}

/* There are machines whose GPUs say that they reach each other and lose what is stored that way (an IOMMU in between): on all
 * members *why. */
static tr_status try_out(tr_comm_nccl *c, tr_nccl_pusher *p, char *why, size_t n_why, tr_err *err)
{
    const size_t all = (size_t)c->base.size * TRIED;
    tr_peer_place place;
    tr_status st = tr_peers_take(p->peers, 2 * all, &place, err);
    char *host = malloc(all);
    uint64_t wrong = !host;

    if (st == TR_OK) st = largest(c, &wrong, 1, err); /* all are here */
    for (int i = 0; i < TRIES && st == TR_OK && !wrong; i++) {
        wrong = !try_swap(c, p, &place, host, i);
        st = largest(c, &wrong, 1, err);
    }
    free(host);
    if (st == TR_OK && wrong) snprintf(why, n_why, "%s", TR_NCCL_DAMAGED);
    return st;
}

/* *why: there is no window. */
static tr_status open_window(tr_comm_nccl *c, char *why, size_t n_why, tr_err *err)
{
    const size_t each = (TR_CUDA_PUSH_FLAGS + TR_CUDA_PUSH_WORDS) * sizeof(uint32_t) + 2 * 256,
                 swap = TR_CUDA_SWAP_FLAGS * sizeof(uint64_t) +
                        TR_CUDA_SWAP_WORDS * sizeof(uint32_t) + 2 * 256,
                 tried = 2 * (size_t)c->base.size * TRIED + 256;
    tr_err local = {.status = TR_OK};

    tr_nccl_pusher *p = calloc(1, sizeof *p);
    if (!p)
        tr_fail(&local, TR_E_MEMORY, "out of memory");
    else
        open_streams(p, &local);
    uint64_t failed = local.status != TR_OK;
    tr_status st = largest(c, &failed, 1, err);
    if (st == TR_OK && failed)
        st = local.status != TR_OK ? tr_fail(err, local.status, "%s", local.text)
                                   : tr_fail(err, TR_E_COMM, "another member has failed");
    if (st == TR_OK)
        st = tr_peers_open(&p->peers, c->nccl, c->base.host, REACHED_MAX * each + swap + tried, 0,
                           why, n_why, err);
    if (st == TR_OK && p->peers) st = take_groups(c, p, err);
    if (st == TR_OK && p->peers) st = take_swap(c, p, err);
    if (st == TR_OK && p->peers) st = try_out(c, p, why, n_why, err);
    if (st == TR_OK && p->peers && !why[0]) {
        c->push = p;
        return TR_OK;
    }
    if (p && p->peers) {
        *c->nccl->abort_h = 0;
        tr_peers_close(p->peers, !why[0]); /* its memory may still be written */
    }
    if (p) close_streams(p);
    free(p);
    return st;
}

/* Not collective. What is under way has ended, or the process is being ended. */
static void close_window(tr_comm_nccl *c)
{
    tr_nccl_pusher *p = c->push;
    bool quiet = true;

    if (!p) return;
    c->push = NULL;
    cudaSetDevice(c->nccl->ordinal);
    for (int i = 0; i < REACHED_MAX; i++)
        if (cudaStreamQuery(p->reached[i].stream) != cudaSuccess) {
            (void)cudaGetLastError();
            quiet = false;
        }
    if (cudaStreamQuery(c->stream) != cudaSuccess) {
        (void)cudaGetLastError();
        quiet = false;
    }
    tr_peers_close(p->peers, quiet);
    close_streams(p);
    free(p);
}

/* ---- memory that rows are pushed into --------------------------------------------------------------------------------- */

/* Whose memory this is; of NULL the first free one; -1: none. */
static int slot_of(const tr_nccl_pusher *p, const void *memory)
{
    for (int i = 0; i < REACHED_MAX; i++)
        if (p->reached[i].memory == memory) return i;
    return -1;
}

static uint64_t mark_of(int slot, int member)
{
    return UINT64_C(0x9e3779b97f4a7c15) * (uint64_t)(16 * slot + member + 1);
}

/* Is what was opened what the others gave? Memory that the driver shares in whole blocks may begin elsewhere in its block: a
 * word that each member has written must be where the others look for it. */
static tr_status look_at_marks(const tr_peer_place *place, int slot, int rank, int size,
                               uint64_t *wrong, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < size; i++) {
        uint64_t got = 0;
        TR_CUDA(cudaMemcpy(&got, place->at[i], sizeof got, cudaMemcpyDeviceToHost));
        if (i != rank && got != mark_of(slot, i)) *wrong = 1;
    }

done:
    return st;
}

static tr_status mark(void *memory, uint64_t word, tr_err *err)
{
    tr_status st = TR_OK;

    TR_CUDA(cudaMemcpy(memory, &word, sizeof word, cudaMemcpyHostToDevice));
    TR_CUDA(cudaDeviceSynchronize());

done:
    return st;
}

static tr_status map_memory(tr_comm_nccl *c, void *memory, size_t bytes, char *why, size_t n_why,
                            tr_err *err)
{
    tr_nccl_pusher *p = c->push;
    const int rank = c->base.rank, size = c->base.size, slot = slot_of(p, NULL);
    uint64_t word[2] = {bytes, ~(uint64_t)bytes}, failed = 0;
    tr_peer_place place;
    tr_err local = {.status = TR_OK};

    tr_status st = largest(c, word, 2, err);
    if (st != TR_OK) return st;
    if (word[0] != ~word[1] || bytes < sizeof(uint64_t) || slot < 0) {
        snprintf(why, n_why, "the members' memory is not alike");
        return TR_OK;
    }
    if (tr_peers_map(p->peers, memory, &place, &local) != TR_OK) {
        snprintf(why, n_why, "%.*s", (int)n_why - 1, local.text);
        return TR_OK;
    }
    failed = mark(memory, mark_of(slot, rank), &local) != TR_OK;
    st = largest(c, &failed, 1, err);
    if (st == TR_OK && !failed)
        failed = look_at_marks(&place, slot, rank, size, &failed, &local) != TR_OK || failed;
    if (st == TR_OK) st = largest(c, &failed, 1, err); /* all have looked */
    if (st == TR_OK && mark(memory, 0, &local) != TR_OK)
        st = tr_fail(err, local.status, "%s", local.text);
    if (st == TR_OK && failed) snprintf(why, n_why, "what is mapped is not the members' memory");
    if (st != TR_OK || failed) return st;
    p->reached[slot].memory = memory;
    p->reached[slot].bytes = bytes;
    p->reached[slot].place = place;
    return st;
}

/* What has failed to reach the members is not tried again: the next memory's try might pass by chance. */
static tr_status open_once(tr_comm_nccl *c, char *why, size_t n_why, tr_err *err)
{
    const tr_status st = open_window(c, why, n_why, err);
    if (st == TR_OK && why[0] && c->push_use == TR_PEER_AUTO) c->push_use = TR_PEER_OFF;
    return st;
}

/* Where it cannot be done but must. */
static tr_status refuse(const tr_comm_nccl *c, tr_status st, const char *why, tr_err *err)
{
    if (st == TR_OK && why[0] && c->push_use == TR_PEER_ON)
        st = tr_fail(err, TR_E_USAGE, "%s", why);
    return st == TR_OK ? TR_OK : tr_within(err, "rows over peer memory of %s", c->base.name);
}

tr_status tr_nccl_reach(tr_comm *base, void *memory, size_t bytes, tr_err *err)
{
    tr_comm_nccl *c = (tr_comm_nccl *)base;
    char why[256] = "";
    tr_status st = TR_OK;

    if (c->push_use == TR_PEER_OFF) return TR_OK;
    if (!c->push) st = open_once(c, why, sizeof why, err);
    if (st == TR_OK && c->push) st = map_memory(c, memory, bytes, why, sizeof why, err);
    return refuse(c, st, why, err);
}

void tr_nccl_leave_alone(tr_comm *base, const void *memory)
{
    tr_comm_nccl *c = (tr_comm_nccl *)base;
    tr_nccl_pusher *p = c->push;
    bool any = false;

    if (!p || !memory) return;
    const int slot = slot_of(p, memory);
    if (slot >= 0) p->reached[slot].memory = NULL;
    for (int i = 0; i < REACHED_MAX; i++)
        any |= p->reached[i].memory != NULL;
    if (!any) close_window(c);
}

void tr_nccl_push_close(tr_comm_nccl *c)
{
    close_window(c);
}

tr_status tr_nccl_push(tr_comm *base, tr_peer_use use, char *why, size_t n_why, tr_err *err)
{
    tr_comm_nccl *c = (tr_comm_nccl *)base;

    why[0] = '\0';
    c->push_use = use;
    if (use == TR_PEER_OFF) snprintf(why, n_why, "switched off");
    if (use == TR_PEER_OFF || c->push) return TR_OK;
    return refuse(c, open_once(c, why, n_why, err), why, err);
}

bool tr_nccl_reaches(const tr_comm *comm, const void *memory)
{
    const tr_nccl_pusher *p = ((const tr_comm_nccl *)comm)->push;
    return p && memory && slot_of(p, memory) >= 0;
}

/* ---- the operation ------------------------------------------------------------------------------------------------------ */

/* The memory that these bytes lie in; NULL: none that is reached. The same answer on all members: theirs lie alike. Nothing
 * lies behind a memory's end, though the next one may begin there. */
static reached *that_holds(tr_nccl_pusher *p, const void *memory, size_t bytes)
{
    const char *at = memory;

    for (int i = 0; p && i < REACHED_MAX; i++) {
        reached *r = &p->reached[i];
        if (!r->memory || at < r->memory || (size_t)(at - r->memory) >= r->bytes) continue;
        if (bytes <= r->bytes - (size_t)(at - r->memory)) return r;
    }
    return NULL;
}

/* The memory that this storage lies in. */
static reached *reached_of(const tr_comm_nccl *c, const tr_share_move *m)
{
    size_t bytes;

    if (m->record->n_rows < 0 ||
        !tr_mul(&bytes, tr_ceil_div((size_t)m->record->n_rows, TR_PAGE_TOKENS),
                m->record->page_bytes))
        return NULL;
    return that_holds(c->push, m->cache, bytes);
}

cudaStream_t tr_nccl_push_stream(const tr_comm_nccl *c, const tr_share_move *m)
{
    const reached *r = reached_of(c, m);
    return r ? r->stream : NULL;
}

tr_status tr_nccl_issue_push(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const tr_share_move *m = k->move;
    const tr_record *r = m->record;
    const reached *to = reached_of(c, m);
    const size_t before = tr_nccl_sum(m->bytes, c->base.rank);
    tr_cuda_push_args a = {.cache = m->cache,
                           .list = m->list,
                           .first = (int)(before / m->row_bytes),
                           .end = (int)((before + m->bytes[c->base.rank]) / m->row_bytes),
                           .n_pieces = r->n_pieces,
                           .page_bytes = r->page_bytes};

    for (int i = 0; i < r->n_pieces && i < TR_CUDA_PIECES; i++) {
        a.at[i] = r->piece[i].at;
        a.bytes[i] = r->piece[i].bytes;
    }
    for (int i = 0; i < c->base.size; i++)
        a.offset[i] = to->place.at[i] - to->place.at[c->base.rank];
    return tr_nccl_cuda("push", tr_cuda_push(&to->group, &a, to->stream), err);
}

/* ---- gathers and all-to-alls --------------------------------------------------------------------------------------------- */

bool tr_nccl_swaps(const tr_comm_nccl *c, const void *recv, size_t bytes)
{
    return that_holds(c->push, recv, bytes) != NULL;
}

tr_status tr_nccl_issue_swap(tr_comm_nccl *c, const tr_nccl_call *k, tr_err *err)
{
    const reached *r = that_holds(c->push, k->recv, tr_nccl_sum(k->n_recv, c->base.size));
    const char *from = k->send;
    char *to = k->recv;
    tr_cuda_swap_args a = {.memory = {NULL}};

    for (int i = 0; i < c->base.size; i++) {
        a.memory[i] = r->place.at[i];
        a.from[i] = from;
        a.n_send[i] = k->n_send ? k->n_send[i] : k->n_recv[c->base.rank];
        a.to[i] = to;
        a.n_recv[i] = k->n_recv[i];
        to += k->n_recv[i];
        if (k->n_send) from += k->n_send[i]; /* a gather gives all the same */
    }
    return tr_nccl_cuda("swap", tr_cuda_swap(&c->push->swap, &a, c->stream), err);
}
