/* What a job that hung has left: the OUT.hang.rank%05d.json of its ranks (mpi/watchdog.h), read as anything from outside is, and
 * the first collective on which they disagree. Pure but for reading the files. */
#ifndef TR_COMMAND_HANG_H
#define TR_COMMAND_HANG_H

#include <stdio.h>

#include "base/err.h"

typedef struct tr_hang tr_hang;

/* TR_E_INPUT, naming the file: not a hang report, members missing or out of range, of another job than the ones before (a world
 * of another size), or two of one rank. TR_E_IO, TR_E_MEMORY. */
tr_status tr_hang_read(tr_hang **out, char *const *path, int n_paths, tr_err *err);
void tr_hang_free(tr_hang *h);
/* The ranks, one line each, then the collective: who is in it, who is missing and where those are. */
void tr_hang_explain(const tr_hang *h, FILE *out);

#endif
