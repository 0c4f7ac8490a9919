#include <config.h>

#include "kernels/near.h"

#include <stdio.h>

#include <hwloc.h>

/* With the devices that hwloc leaves out by default. NULL: it cannot be had. */
static hwloc_topology_t open_topology(void)
{
    hwloc_topology_t t;

    if (hwloc_topology_init(&t) != 0) return NULL;
    if (hwloc_topology_set_io_types_filter(t, HWLOC_TYPE_FILTER_KEEP_IMPORTANT) == 0 &&
        hwloc_topology_load(t) == 0)
        return t;
    hwloc_topology_destroy(t);
    return NULL;
}

/* A machine of one node says of most of its devices that they are nowhere in particular. */
static int node_of(hwloc_topology_t t, hwloc_obj_t where)
{
    const int n_nodes = hwloc_get_nbobjs_by_type(t, HWLOC_OBJ_NUMANODE);
    const int node = where->nodeset ? hwloc_bitmap_first(where->nodeset) : -1;

    return n_nodes == 1 || hwloc_bitmap_weight(where->nodeset) == 1 ? node : -1;
}

static void find(tr_near *out, hwloc_topology_t t, hwloc_obj_t where, hwloc_bitmap_t cpus,
                 bool bind)
{
    if (hwloc_get_cpubind(t, cpus, HWLOC_CPUBIND_THREAD) != 0)
        hwloc_bitmap_copy(cpus, hwloc_topology_get_allowed_cpuset(t));
    hwloc_bitmap_and(cpus, cpus, where->cpuset);
    if (hwloc_bitmap_iszero(cpus)) return;
    hwloc_bitmap_list_snprintf(out->cpus, sizeof out->cpus, cpus);
    out->bound = bind && hwloc_set_cpubind(t, cpus, HWLOC_CPUBIND_THREAD) == 0;
}

tr_near tr_near_find(const char *pci, bool bind)
{
    tr_near near = {.numa_node = -1};
    hwloc_topology_t t = open_topology();
    hwloc_bitmap_t cpus = hwloc_bitmap_alloc();
    hwloc_obj_t gpu = t && cpus ? hwloc_get_pcidev_by_busidstring(t, pci) : NULL;
    hwloc_obj_t where = gpu ? hwloc_get_non_io_ancestor_obj(t, gpu) : NULL;

    if (where) near.numa_node = node_of(t, where);
    if (near.numa_node >= 0) find(&near, t, where, cpus, bind);
    hwloc_bitmap_free(cpus);
    if (t) hwloc_topology_destroy(t);
    return near;
}
