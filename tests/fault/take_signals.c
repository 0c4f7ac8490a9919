/* A library to preload that takes the signals of the program as other libraries do that MPI or hwloc bring along (LLVM behind an
 * OpenCL or Mesa driver makes SIGUSR1 a word without effect, and ends the process on SIGTERM and SIGINT): behind MPI_Init_thread
 * and behind every hwloc_topology_load. */
#include <config.h>

#include <dlfcn.h>
#include <signal.h>
#include <stddef.h>

static void nothing(int number)
{
    (void)number;
}

static void take(void)
{
    signal(SIGUSR1, nothing);
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
}

int MPI_Init_thread(int *argc, char ***argv, int required, int *provided);
int MPI_Init_thread(int *argc, char ***argv, int required, int *provided)
{
    int (*next)(int *, char ***, int, int *);
    *(void **)&next = dlsym(RTLD_NEXT, "MPI_Init_thread");
    const int code = next(argc, argv, required, provided);
    take();
    return code;
}

int hwloc_topology_load(void *topology);
int hwloc_topology_load(void *topology)
{
    int (*next)(void *);
    *(void **)&next = dlsym(RTLD_NEXT, "hwloc_topology_load");
    const int code = next(topology);
    take();
    return code;
}
