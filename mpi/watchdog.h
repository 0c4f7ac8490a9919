/* The watchdog: a thread that looks every 250 ms whether this rank still gets on and ends the job when it has shown no progress for
 * longer than it may (reliability.md 4, rows 15 and 16; parallel.md 10.2). The main thread says where it is: beat at every
 * step, enter and leave around stretches of it; the communicators (comm_mpi.h) note what they begin, wait for and
 * finish. Each of these is progress, and so is that of any other rank of the host: a rank that is merely slow, in a step that
 * takes longer than the timeout, holds up the others but is not taken for one that hangs; and one that gets neither core nor
 * page for so long, but is not stopped, has four timeouts.
 *
 * Ranks of one host see each other's state in shared memory. When time is up every rank that still can writes
 * OUT.hang.rank%05d.json (the state and the last 256 collectives), prints one line with its step, layer, communicator
 * and collective number and with the ranks that do not respond or are not waiting, and ends the job with exit code 86.
 * Ranks of other hosts that left no OUT.hang file are named too. Communicators of a device (world->guard) are asked at every
 * look whether they have failed by themselves, which ends the job in the same way, and are aborted before it ends.
 *
 * The thread makes no MPI call but MPI_Abort. */
#ifndef TR_MPI_WATCHDOG_H
#define TR_MPI_WATCHDOG_H

#include <stdint.h>

#include "mpi/start.h"

typedef struct tr_watchdog tr_watchdog;

/* Collective over the world; world->flight is set until stop. timeout_s: --step-timeout; 0: the default, the larger of
 * 60 s and ten times what tr_watchdog_expect says. out_path: OUT; NULL: no files. An OUT.hang file of an earlier run is
 * removed. */
tr_status tr_watchdog_start(tr_watchdog **out, tr_world *world, double timeout_s,
                            const char *out_path, tr_err *err);
/* Not collective. Before the communicators are freed or after. NULL: nothing. */
void tr_watchdog_stop(tr_watchdog *wd);

/* All of these: main thread; wd may be NULL (nothing happens); a few ten nanoseconds. */

/* A step begins. The first one has as long as it likes: watching starts with the second. */
void tr_watchdog_beat(tr_watchdog *wd, uint64_t step);
/* Nothing is to be done until the next beat (no requests, shutting down): this rank's clock stands still. */
void tr_watchdog_rest(tr_watchdog *wd);
/* How long the step that begins should take, by the measured time per row. */
void tr_watchdog_expect(tr_watchdog *wd, double seconds);
/* What the main thread does: a static string, shown as it is ("attention"), and the layer, -1 for none. They nest, four
 * deep. */
void tr_watchdog_enter(tr_watchdog *wd, const char *what, int layer);
void tr_watchdog_leave(tr_watchdog *wd);

#endif
