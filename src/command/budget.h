/* How much memory this process may still take: the host's, or what a control group (Slurm's, a
 * container's) leaves. */
#ifndef TR_COMMAND_BUDGET_H
#define TR_COMMAND_BUDGET_H

#include <stdint.h>

/* Bytes; 0: unknown. */
uint64_t tr_memory_available(void);

#endif
