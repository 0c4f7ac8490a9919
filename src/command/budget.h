/* How much memory this process may still take: the host's, or what a control group (Slurm's, a
 * container's) leaves; and what a rank takes, in a table for those whose job did not find it. */
#ifndef TR_COMMAND_BUDGET_H
#define TR_COMMAND_BUDGET_H

#include <stdint.h>

#include "base/log.h"

/* Bytes; UINT64_MAX: unknown. Pages of files count as available: they are given back when memory is wanted, and a job that has just
 * read its weights has gigabytes of them on its group's account. */
uint64_t tr_memory_available(void);
/* The same of the files of /proc and /sys under `root` (tests). */
uint64_t tr_memory_available_under(const char *root);

typedef struct tr_budget {
    int rank;
    const char *host, *device;         /* as a user knows them */
    uint64_t weights, workspace;       /* bytes, estimated before there is anything */
    uint64_t cache_least, cache_whole; /* one sequence; all that may run at a time */
    uint64_t left;                     /* at the moment; UINT64_MAX: unknown */
    int max_batch_tokens, max_sequences, max_model_len;
    const char *kv_dtype;
} tr_budget;

/* The table, a line for each item with the options that change it. Allocates nothing. */
void tr_budget_print(const tr_budget *budget, tr_log *log);

#endif
