/* Who started this process and how many of it, by what launchers leave in the environment; and the launch whose processes do not find
 * each other: each is a job of one rank. doctor tells of it, batch and bench comm do not begin. */
#ifndef TR_COMMAND_LAUNCH_H
#define TR_COMMAND_LAUNCH_H

#include <stdbool.h>
#include <stddef.h>

#include "mpi/start.h"

typedef struct tr_launch {
    const char *by; /* "mpirun", "srun", ...; NULL: started bare */
    int n;          /* processes started together, by the launcher's own account; 0: unknown */
} tr_launch;

/* Main thread. A step of srun counts only where it runs this program: not under a shell of srun --pty, nor where another launcher has
 * started just one of it in there. SLURM_NTASKS is no sign: a batch script has it, too. */
tr_launch tr_launch_find(void);

/* The sentence about n processes started by `by` of which each is in a job of n_ranks; false: these are all. Pure. */
bool tr_launch_tell(char *text, size_t room, const char *by, int n, int n_ranks);

/* TR_E_USAGE with that sentence where the world is this process alone and its launcher has started more. After tr_world_start. */
tr_status tr_launch_check(const tr_world *world, tr_err *err);

#endif
