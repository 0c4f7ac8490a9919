/* Which CPUs the device's threads belong on. */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>

#include <hwloc.h>

#include "kernels/cpu/cpu_priv.h"

/* CPUs this process may use (the mask that mpirun, srun or taskset left it), as the system numbers them: one of every
 * core first, in the order of the machine, then the second ones of these cores, and so on. Returns how many. */
static int list_places(hwloc_topology_t topology, hwloc_const_cpuset_t mask, int *cpu, int room)
{
    const int n_cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE);
    int n = 0, found = 1;

    for (unsigned round = 0; found && n < room; round++) {
        found = 0;
        for (int i = 0; i < n_cores && n < room; i++) {
            hwloc_obj_t core = hwloc_get_obj_by_type(topology, HWLOC_OBJ_CORE, (unsigned)i);
            hwloc_cpuset_t mine = hwloc_bitmap_alloc();
            if (!mine) return -1;
            hwloc_bitmap_and(mine, core->cpuset, mask);
            int id = hwloc_bitmap_first(mine);
            for (unsigned k = 0; k < round && id >= 0; k++)
                id = hwloc_bitmap_next(mine, id);
            hwloc_bitmap_free(mine);
            if (id < 0) continue;
            cpu[n++] = id;
            found = 1;
        }
    }
    return n;
}

static tr_status find_places(int *cpu, int room, int *n, tr_err *err)
{
    hwloc_topology_t topology = NULL;
    hwloc_cpuset_t mask = hwloc_bitmap_alloc();
    tr_status st = TR_OK;

    *n = 0;
    if (!mask) return tr_fail(err, TR_E_MEMORY, "out of memory");
    if (hwloc_topology_init(&topology) != 0) {
        topology = NULL;
        st = tr_fail(err, TR_E_MEMORY, "binding: hwloc has no memory");
    } else if (hwloc_topology_load(topology) != 0 ||
               hwloc_get_cpubind(topology, mask, HWLOC_CPUBIND_THREAD) != 0) {
        st = tr_fail(err, TR_E_IO, "binding: hwloc cannot tell the CPUs of this process");
    } else if ((*n = list_places(topology, mask, cpu, room)) < 0) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    if (topology) hwloc_topology_destroy(topology);
    hwloc_bitmap_free(mask);
    return st;
}

/* "0-3,8" of 0 1 2 3 8, as far as there is room. */
static void write_places(tr_device *d, const int *cpu)
{
    size_t at = 0;

    d->places[0] = '\0';
    for (int i = 0, last; i < d->n_threads && at < sizeof d->places; i = last + 1) {
        for (last = i; last + 1 < d->n_threads && cpu[last + 1] == cpu[last] + 1;)
            last++;
        int wrote = snprintf(d->places + at, sizeof d->places - at, "%s%d", i ? "," : "", cpu[i]);
        at += (size_t)wrote;
        if (last == i || at >= sizeof d->places) continue;
        wrote = snprintf(d->places + at, sizeof d->places - at, "-%d", cpu[last]);
        at += (size_t)wrote;
    }
}

const char *tr_device_places(const tr_device *d)
{
    return d->places;
}

tr_status tr_device_bind(tr_device *d, int i_share, int n_share, int *bound, tr_err *err)
{
    enum { ROOM = 4096 };
    tr_team *team;
    int n;

    *bound = 0;
    if (n_share < 1 || i_share < 0 || i_share >= n_share)
        return tr_fail(err, TR_E_USAGE, "binding: share %d of %d", i_share, n_share);
    int *cpu = malloc(ROOM * sizeof *cpu);
    if (!cpu) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_status st = find_places(cpu, ROOM, &n, err);
    const int begin = tr_team_part(n, i_share, n_share);
    /* More threads than CPUs: the system does better than any place we could choose. Of the smallest share, so that all
     * processes come to the same end. */
    if (st == TR_OK && n / n_share >= d->n_threads) {
        st = tr_team_create(&team, d->n_threads, cpu + begin, err);
        if (st == TR_OK) {
            tr_team_free(d->team);
            d->team = team;
            write_places(d, cpu + begin);
            *bound = 1;
        }
    }
    free(cpu);
    return st;
}
