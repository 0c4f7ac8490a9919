/* Communicators over NCCL: the rows of comm.h in a GPU's memory, one rank and one GPU a process. Built with --with-nccl.
 *
 * MPI stays the ground: it finds the ranks, carries NCCL's ids and everything the host itself reads (plans, counts, status).
 * A communicator has a stream of its own: what is begun waits there, on the device, for what the main lane holds by then; to
 * wait is to make a lane wait. The host never stands still for either, with one exception: more than 256 operations of a
 * communicator cannot be under way.
 *
 * NCCL's calls do not block here (ncclConfig_t.blocking 0): what it still works on is asked for until it is done, while MPI
 * goes on. One lock keeps the main thread's calls and the watchdog's apart. The watchdog (watchdog.h) asks every communicator
 * for errors that came by themselves, and has them aborted before it ends the job.
 *
 * Sums of two members are NCCL's: x0 + x1 is x1 + x0. Of more they are made of the members' terms in rank order, as comm.h
 * promises; NCCL's own rings begin with another member for every part of a buffer. Main thread, but for what is said above. */
#ifndef TR_MPI_COMM_NCCL_H
#define TR_MPI_COMM_NCCL_H

#include "mpi/binding.h"
#include "mpi/comm.h"
#include "mpi/start.h"

typedef struct tr_nccl tr_nccl; /* NCCL in this process */

/* device: opened as "cuda", its table is ops; both, and the world, are kept and must outlive it. world->guard is set until
 * close. NCCL_NVLS_ENABLE is set to 0 where the environment does not say. Not collective. */
tr_status tr_nccl_open(tr_nccl **out, tr_world *world, tr_device *device, const tr_ops *ops,
                       tr_err *err);
/* After all of its communicators, before the device. NULL: nothing. */
void tr_nccl_close(tr_nccl *nccl);

/* TR_NCCL_TERMS: sums of two members too are made of terms (tests). TR_NCCL_BLOCKING: NCCL's calls return when they are done,
 * which its symmetric windows want (2.28.3 reports a communicator that is still busy otherwise); a member that is lost then holds
 * up the others' calls, so for benches alone. */
enum { TR_NCCL_TERMS = 1, TR_NCCL_BLOCKING = 2 };

/* The members of `host` (of more than one; kept, freed after this one) in the same order and with the same name, for
 * memory of the device. Collective over them: all succeed or none does. Operations that may be in flight together with those of another lane
 * want a communicator of their own. tr_comm_free is not collective; what is in flight is given up. */
tr_status tr_nccl_comm(tr_comm **out, tr_nccl *nccl, tr_comm *host, unsigned flags, tr_err *err);

/* How rows will go from rank `me` to each of the n others, as far as can be told without asking NCCL: counts into all[me].peers.
 * NCCL_P2P_DISABLE and NCCL_SHM_DISABLE are looked at; what NCCL itself chose stands in its log (NCCL_DEBUG=INFO). */
void tr_nccl_ways(const tr_nccl *nccl, tr_bound *all, int n, int me);

/* Where the environment has NCCL_DEBUG and no NCCL_DEBUG_FILE: NCCL's log goes to OUT.nccl.HOST.PID, not between this program's
 * lines. Before the first communicator. out NULL: left as it is. */
tr_status tr_nccl_log_beside(const char *out, tr_err *err);

/* "2.28.9" of the library that is loaded. */
void tr_nccl_version(char *text, size_t n);

/* Sums with a norm behind them (tr_comm_reduce_norm) by kernels of our own over peer memory (kernels.md 5), where the members
 * share a host and their GPUs reach each other. AUTO: for those numbers of rows for which these kernels are faster than NCCL's
 * sum and the norm behind it, both measured here, in graphs where there are graphs. ON: for all that they can do; TR_E_USAGE
 * where they cannot. OFF: never. */
typedef enum tr_peer_use { TR_PEER_AUTO, TR_PEER_ON, TR_PEER_OFF } tr_peer_use;
enum { TR_PEER_SIZES = 9 }; /* 1, 2, 4 .. 256 rows */
typedef struct tr_peer_options {
    tr_peer_use use;
    int d;      /* numbers of a row */
    int shots;  /* 0: one-shot or two-shot, whichever is faster; 1, 2: that one alone (tests) */
    int times;  /* a median of so many, of 16 operations each; 0: the default */
    bool plain; /* NCCL's own sum too, which is not always that of comm.h */
} tr_peer_options;
typedef struct tr_peer_report {
    char why[256]; /* one line: why there are none; "": there are */
    int n;         /* sizes that were measured */
    struct {
        int rows;
        double nccl_s, one_s, two_s; /* the slowest member's medians; 0: cannot be done */
        double plain_s;              /* 0: not asked for */
        const char *chosen;          /* "nccl", "one-shot", "two-shot" */
    } size[TR_PEER_SIZES];
} tr_peer_report;
/* Of tr_nccl_comm's communicator. Collective over its members, before it is used; measuring takes some milliseconds and some
 * 10 MB for a while. */
tr_status tr_nccl_peers(tr_comm *comm, const tr_peer_options *options, tr_peer_report *report,
                        tr_err *err);

/* Rows of caches (tr_share) by a kernel of our own that stores them into the other members' caches, beside what computes
 * (parallel.md 3.5). AUTO, the default: wherever the members share a host, their GPUs reach each other and what is tried out
 * first arrives as it was; `why` says in one line why not (else it is empty); ON: TR_E_USAGE where not, and from
 * tr_share_reach where they do not reach that memory; OFF: never. Collective over the members, the same on all of them, with
 * no memory reached. */
tr_status tr_nccl_push(tr_comm *comm, tr_peer_use use, char *why, size_t n_why, tr_err *err);
/* Of memory given to tr_share_reach: rows in it are pushed. */
bool tr_nccl_reaches(const tr_comm *comm, const void *memory);

#endif
