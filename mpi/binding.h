/* One GPU, one rank: what every rank of the job has opened, and whether two have opened the same. */
#ifndef TR_MPI_BINDING_H
#define TR_MPI_BINDING_H

#include "mpi/comm.h"
#include "mpi/start.h"

typedef struct tr_bound { /* plain data, sent between ranks as it is */
    char host[64];
    char uuid[48];   /* of the GPU: tr_device_uuid */
    char device[96]; /* tr_device_describe, what fits */
} tr_bound;

/* This rank's. */
tr_bound tr_binding_of(const tr_world *world, const tr_device *device);

/* Everybody's, in rank order: *out[size of the control group], for the caller to free. Collective over it. */
tr_status tr_binding_gather(tr_bound **out, tr_comm *control, const tr_bound *mine, tr_err *err);

/* TR_E_USAGE naming the first two ranks that have one GPU between them, and what to look at. Pure; a rank without a
 * uuid has nothing to share. */
tr_status tr_binding_check(const tr_bound *all, int n, tr_err *err);

#endif
