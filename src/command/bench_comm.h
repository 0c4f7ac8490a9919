/* trireme bench comm: the communicators against the MPI library's own calls. */
#ifndef TR_COMMAND_BENCH_COMM_H
#define TR_COMMAND_BENCH_COMM_H

#include "base/err.h"

/* argv[0] is "comm". Starts and ends MPI; table and JSON lines on rank 0's stdout. */
tr_status tr_bench_comm(int argc, char **argv, tr_err *err);

#endif
