/* What every backend's struct tr_device begins with, and the backends' openers. Included by
 * kernels/ only. */
#ifndef TR_KERNELS_DEVICE_H
#define TR_KERNELS_DEVICE_H

#include "kernels/kernels.h"
#include "kernels/near.h"

typedef struct tr_device_head { /* the first member of a struct tr_device */
    char describe[128];
    char uuid[48];   /* of a GPU: "GPU-0123abcd-..." */
    char pci[16];    /* of a GPU: "0000:1b:00.0" */
    tr_near near;    /* of a GPU */
    char error[512]; /* of the last failure, one line */
} tr_device_head;

/* Keeps the text for tr_ops.error; returns `status`. */
tr_status tr_device_fail(tr_device *d, tr_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
const char *tr_device_error(const tr_device *d);

/* A backend that lacks an operation is refused at opening, not found out in a step. */
tr_status tr_ops_check(const tr_ops *ops, tr_err *err);

tr_status tr_cpu_open(tr_device **out, const tr_ops **ops, const tr_device_options *options,
                      tr_err *err);
#ifdef HAVE_CUDA
/* *usable: whether there is a GPU that this build can use; where there is none that is an error
 * too. */
tr_status tr_cuda_open(tr_device **out, const tr_ops **ops, const tr_device_options *options,
                       int *usable, tr_err *err);
void tr_cuda_look(tr_gpu_seen *seen, int i, int n_ranks);
#endif

#endif
