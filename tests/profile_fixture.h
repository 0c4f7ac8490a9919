/* Synthetic profiles: files of the schema with numbers that tests can work out. Every rank has the same tree:
 *
 *     main > load, engine/plan, step > layer 0 .. > attention > mla_decode, all_reduce
 *                                               > experts > moe_gemm, exchange
 *                               step > head,    engine/no_work
 *     writer > journal/write
 *
 * Steps take 10 ms and come every 12 ms; every third prefills 100 tokens, the others decode 4. The last rank computes
 * slowly: its kernels take twice as long, and the others wait in exchange for it. */
#ifndef TR_TESTS_PROFILE_FIXTURE_H
#define TR_TESTS_PROFILE_FIXTURE_H

#include <stdbool.h>
#include <stdint.h>

#include "profile/schema.h"

typedef struct tr_synthetic {
    int n_ranks, n_layers, n_experts, n_steps;
    bool trace; /* /trace/main, a step and its layers each */
    bool nan;   /* every real number is NaN */
    bool later; /* groups and attributes that 1.0 does not have; version 1.7 */
    bool
        killed; /* left as by kill -9 after a flush: rank files are .part; the process must end by _exit */
    uint64_t absent; /* bit i: without dataset i of the schema */
} tr_synthetic;

enum {
    TR_SYNTHETIC_STEP_NS = 10000000,
    TR_SYNTHETIC_PERIOD_NS = 12000000,
    TR_SYNTHETIC_KERNEL_NS =
        100000, /* mla_decode of a layer of a step, but on the last rank; moe_gemm half of it */
    TR_SYNTHETIC_REDUCE_NS = 20000,
    TR_SYNTHETIC_REDUCE_BYTES = 4096,
};

/* Rows [first, first + n) of the ranks in one file; n = n_ranks: what pack makes. 0: written. */
int tr_synthetic_write(const char *path, const tr_synthetic *s, int first, int n);
/* rank%05d.h5 for each rank in a folder that is there. */
int tr_synthetic_folder(const char *folder, const tr_synthetic *s);
/* The joined file over them: `relative` is the folder's name as seen from the file's. */
int tr_synthetic_join(const char *path, const char *relative, const tr_synthetic *s);

/* Time of the tree's root in all, of every rank. */
uint64_t tr_synthetic_run_ns(const tr_synthetic *s);

#endif
