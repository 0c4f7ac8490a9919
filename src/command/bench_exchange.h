/* trireme bench comm: what the exchange of keys and latents under context parallelism costs beside the products that hide it, in
 * the setting of parallel.md 3.5: index keys of 132 bytes and latents of 656 bytes a row are written and exchanged while bf16
 * products of 24576 x 1536 and 8192 x 1536 numbers run on as many rows, in a graph. Exposed is that time less that of the same
 * graph in which every member writes its own rows alone. */
#ifndef TR_COMMAND_BENCH_EXCHANGE_H
#define TR_COMMAND_BENCH_EXCHANGE_H

#include "mpi/comm.h"

typedef struct tr_exchange_bench {
    tr_comm *comm; /* over NCCL, of this device's memory */
    tr_device *device;
    const tr_ops *ops;
    const int *rows; /* [n_rows] that a member writes */
    int n_rows;
    int times;   /* a median of so many runs, the slowest member's */
    bool prints; /* a table and JSON lines */
} tr_exchange_bench;

/* Collective over the members. Rows go by push and then by NCCL; by NCCL alone where the members' GPUs do not reach each other.
 * After them NCCL's gathers alone, of as many bytes, from symmetric window to symmetric window: a yardstick, not a way of the model's.
 * One layer at a time, with what its launches take, where the device has no graphs. */
tr_status tr_bench_exchange(const tr_exchange_bench *b, tr_err *err);

#endif
