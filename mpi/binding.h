/* One GPU, one rank: what every rank of the job has opened, whether two have opened the same, and the table that says so at start. */
#ifndef TR_MPI_BINDING_H
#define TR_MPI_BINDING_H

#include "mpi/comm.h"
#include "mpi/start.h"

typedef enum tr_way { TR_WAY_P2P, TR_WAY_SHM, TR_WAY_SAME_HOST, TR_WAY_NET, TR_N_WAYS } tr_way;

typedef struct tr_bound { /* plain data, sent between ranks as it is */
    char host[64];
    char uuid[48];   /* of the GPU: tr_device_uuid */
    char device[96]; /* tr_device_describe, what fits */
    char pci[16];    /* tr_device_pci */
    char cpus[48];   /* that its threads were bound to; "": nothing */
    int32_t numa;    /* node next to the GPU; -1: not known */
    /* Other ranks by the way rows go to them: through the GPUs' own links, through memory of the host (of which SAME_HOST is not
     * told which, as the other's GPU is not seen from here), over the network. comm_nccl.h fills it in. */
    int32_t peers[TR_N_WAYS];
} tr_bound;

/* This rank's. */
tr_bound tr_binding_of(const tr_world *world, const tr_device *device);

/* Everybody's, in rank order: *out[size of the control group], for the caller to free. Collective over it. */
tr_status tr_binding_gather(tr_bound **out, tr_comm *control, const tr_bound *mine, tr_err *err);

/* TR_E_USAGE naming the first two ranks that have one GPU between them, and what to look at. Pure; a rank without a
 * uuid has nothing to share. */
tr_status tr_binding_check(const tr_bound *all, int n, tr_err *err);

/* A line of the table, without a newline: rank, host, PCI address, NUMA node, CPUs, ways to the others. i < 0: its head. Pure; what
 * comes from another process is cut to its fields. Returns `line`. */
const char *tr_binding_line(char *line, size_t room, const tr_bound *all, int i);

#endif
