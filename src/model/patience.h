/* Tells when reading the weights does not get on: a file system that is stalled ends no job, but somebody should say which rank
 * waits for which file (reliability.md 4, row 9). A thread of its own, from start to stop; the reading happens on others. */
#ifndef TR_MODEL_PATIENCE_H
#define TR_MODEL_PATIENCE_H

#include <stdio.h>

#include "base/err.h"
#include "model/checkpoint.h"

typedef struct tr_patience tr_patience;

typedef struct tr_patience_options {
    const tr_checkpoint *checkpoint; /* kept */
    FILE *out;                       /* kept: one line at a time */
    int rank;
    const char *host; /* kept */
    double
        every_s; /* a line for every so many seconds in which no read of a shard began or ended; 0: 30 */
} tr_patience_options;

/* TR_E_MEMORY: no thread. */
tr_status tr_patience_start(tr_patience **out, const tr_patience_options *options, tr_err *err);
void tr_patience_stop(tr_patience *p); /* NULL is fine; not waiting for any read */

#endif
