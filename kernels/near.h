/* The CPUs next to a GPU: a rank's threads belong where its GPU's host bridge is, so that pinned memory that they touch first and
 * the queues that they feed are not behind the other socket (parallel.md 10.1). By hwloc; host code without CUDA. */
#ifndef TR_KERNELS_NEAR_H
#define TR_KERNELS_NEAR_H

#include <stdbool.h>

typedef struct tr_near {
    int numa_node; /* the system's number of the GPU's; -1: not known */
    bool bound;    /* the calling thread was put there */
    char cpus
        [64]; /* of that node those that this thread may use: "0-15,32", as far as there is room; "": none, or not known */
} tr_near;

/* Of the PCI device at "0000:1b:00.0". bind: the calling thread, and with it every one that it starts from now on, goes to the
 * CPUs found, never outside the mask that the launcher gave; where that leaves none, or the place is not known, it stays. */
tr_near tr_near_find(const char *pci, bool bind);

#endif
