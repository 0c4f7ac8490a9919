/* Start-up: MPI_Init_thread(FUNNELED), who this rank is, which ranks share its host, binding (later), and the end.
 * Works started by mpirun, by srun or bare (a world of one). Main thread only. */
#ifndef TR_MPI_START_H
#define TR_MPI_START_H

#include <stddef.h>

#include "base/err.h"

/* What the watchdog's thread asks of communicators that do not end by themselves (comm_nccl.h). */
typedef struct tr_world_guard {
    void *ctx;
    int (*failed)(void *ctx, char *text, size_t n); /* 1: one has failed, and why: one line */
    void (*abort)(void *ctx); /* the job is about to be ended: what waits on a device leaves it */
} tr_world_guard;

typedef struct tr_world {
    int rank, size;             /* MPI_COMM_WORLD */
    int local_rank, local_size; /* ranks of this host, by MPI_COMM_TYPE_SHARED */
    int node_first;             /* lowest rank of this host */
    char host[64];
    /* What communicators and watchdog of this process share; they keep the address of the world. comms: all of them,
     * whoever waits advances every one (comm_mpi.c). flight: the recorder, while a watchdog runs (flight.h). */
    struct tr_comm_mpi *comms;
    struct tr_flight *flight;
    const tr_world_guard
        *guard; /* NULL: none. Set before a watchdog starts, and taken away after it was stopped */
} tr_world;

/* TR_E_COMM when MPI gives less than MPI_THREAD_FUNNELED. */
tr_status tr_world_start(tr_world *world, tr_err *err);

/* MPI_Finalize, unless the world was never started. After it: no MPI call. Communicators are freed before. how: the job's status;
 * after a failure the process exits with its code 5 s later, should MPI not come to an end. */
void tr_world_finish(tr_status how);

/* Whether an error's text begins with the rank it comes from, as tr_agree leaves it: who prints it need not say one. */
int tr_names_rank(const char *text);

/* All ranks say how a phase (open, load, a step) went; all return the same status: TR_OK if all were well, else the
 * status of the lowest failing rank, whose text every rank gets, "rank 3 on node07: " in front where size > 1 and
 * "(and 5 more ranks)" behind. `mine` is TR_OK or err->status. Collective over the world. */
tr_status tr_agree(const tr_world *world, tr_status mine, tr_err *err);

/* The same after something failed in the middle of a phase, where others may not come: TR_E_COMM when they have not
 * within `seconds`; then nothing but tr_world_abort may follow. */
tr_status tr_agree_within(const tr_world *world, tr_status mine, double seconds, tr_err *err);

/* What every rank knows to have failed is said once: rank 0 prints err's text to stderr, and does so now, for once a rank has
 * left MPI with a failure the launcher ends the others, printed or not; the others wait for it, some seconds at most. The text is
 * emptied on every rank, so that nobody repeats it. Nothing happens with one rank or without an error. Collective over the world. */
void tr_world_say(const tr_world *world, tr_status st, tr_err *err);

/* This rank's own words, where the others cannot be asked: its name goes in front unless the text names a rank. */
void tr_world_say_alone(const tr_world *world, const tr_err *err);

/* A failure in a step, in which others may wait for this rank: the end of the job. Where all of them have failed, and come within
 * some seconds, it is said once, else by each that came. More than one rank. */
_Noreturn void tr_world_fail(const tr_world *world, tr_status st, tr_err *err);

/* Rank 0's bytes to all. Collective over the world. */
tr_status tr_world_tell(const tr_world *world, void *data, int bytes, tr_err *err);

/* The bytes of each host's first rank (local_rank 0) to the ranks of that host. Collective over the world. */
tr_status tr_world_tell_host(const tr_world *world, void *data, int bytes, tr_err *err);

/* Ends the whole job with the exit code of `why`, by MPI_Abort, and this process after 5 s if MPI does not. From any
 * thread. */
_Noreturn void tr_world_abort(tr_status why);
/* The same; what waits on this rank's device is made to leave it before. */
_Noreturn void tr_world_give_up(const tr_world *world, tr_status why);

/* "funneled", "serialized", "multiple": what MPI gives, after start. */
const char *tr_mpi_threads(void);

/* Versions for --version: "Open MPI v4.1.4, ..." on one line into text. */
void tr_mpi_version(char *text, size_t n);

#endif
