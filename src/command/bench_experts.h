/* trireme bench comm: what rows on their way to experts of other ranks and back cost, made as the model makes them
 * (model/exchange.c), next to a plain all-to-all of the same bytes. Few rows are told to all members, of more each goes to those that
 * hold one of its experts; experts are chosen evenly within the model's groups (8 of 256, from 4 of 8 groups). */
#ifndef TR_COMMAND_BENCH_EXPERTS_H
#define TR_COMMAND_BENCH_EXPERTS_H

#include "mpi/comm.h"

typedef struct tr_experts_bench {
    tr_comm *comm; /* of this device's memory; over MPI, of the host's */
    tr_device *device;
    const tr_ops *ops;
    const int *rows; /* [n_rows] tokens of a member */
    int n_rows;
    int width;   /* numbers of a row */
    int times;   /* a median of so many, the slowest member's */
    bool prints; /* a table and JSON lines */
    /* All members: a library's own all-to-all of `bytes` of every member's, in equal parts; returns when it is done. */
    tr_status (*plain)(void *ctx, const void *send, void *recv, size_t bytes, tr_err *err);
    void *ctx;
} tr_experts_bench;

/* Collective over the members. */
tr_status tr_bench_experts(const tr_experts_bench *b, tr_err *err);

#endif
