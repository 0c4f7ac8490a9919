#include <config.h>

#include "command/launch.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

/* 0: not set, or no such number. */
static int count_in(const char *name)
{
    const char *text = getenv(name);
    char *end = NULL;

    if (!text || *text < '0' || *text > '9') return 0;
    const long v = strtol(text, &end, 10);
    return *end || v > INT_MAX ? 0 : (int)v;
}

/* Of a step, and not below its terminal's shell. */
static bool is_task(void)
{
    return getenv("SLURM_PROCID") && !getenv("SLURM_PTY_PORT");
}

tr_launch tr_launch_find(void)
{
    static const struct {
        const char *mark, *by, *count;
        bool step; /* of Slurm, in which other launchers start theirs */
    } list[] = {
        {"OMPI_COMM_WORLD_SIZE", "mpirun", "OMPI_COMM_WORLD_SIZE", false},
        {"SLURM_STEP_NUM_TASKS", "srun", "SLURM_STEP_NUM_TASKS", true},
        {"PALS_RANKID", "PALS", "PALS_SIZE", false},
        {"HYDI_CONTROL_FD", "mpiexec", "PMI_SIZE", false},
        {"PMI_RANK", "a PMI launcher", "PMI_SIZE", false},
    };
    tr_launch found = {.by = NULL};

    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        if (!getenv(list[i].mark) || (list[i].step && !is_task())) continue;
        const int n = count_in(list[i].count);
        if (!found.by)
            found = (tr_launch){list[i].by, n};
        else if (n == 1 && !list[i].step) /* mpiexec has its daemons started by srun */
            found.n = 1;
    }
    return found;
}

bool tr_launch_tell(char *text, size_t room, const char *by, int n, int n_ranks)
{
    if (n <= n_ranks) return false;
    snprintf(text, room,
             "%s started %d processes, but each is a job of %d rank%s: they do not find each "
             "other. Use srun --mpi=pmix, or the mpirun of the MPI library that trireme --version "
             "names",
             by, n, n_ranks, n_ranks == 1 ? "" : "s");
    return true;
}

tr_status tr_launch_check(const tr_world *world, tr_err *err)
{
    const tr_launch launch = tr_launch_find();
    char text[400];

    if (world->size > 1 || !launch.by) return TR_OK;
    if (!tr_launch_tell(text, sizeof text, launch.by, launch.n, world->size)) return TR_OK;
    return tr_fail(err, TR_E_USAGE, "%s", text);
}
