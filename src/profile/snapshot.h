/* A copy of a profile between two flushes. HDF5 does not write a file at a stroke: a process killed in the middle of a
 * flush leaves one that nothing can mend. So what a killed run leaves to its readers is a copy made when all was written. */
#ifndef TR_PROFILE_SNAPSHOT_H
#define TR_PROFILE_SNAPSHOT_H

#include <stdbool.h>

#include "base/err.h"

/* `to` becomes what `from` is now: whole and at once, or not at all. Writes TO.tmp first. clear: what h5clear -s does is done to
 * the copy, so that it can be opened as it is; `from` is an HDF5 file then. TR_E_IO with the file's name. */
tr_status tr_profile_snapshot(const char *from, const char *to, bool clear, tr_err *err);

#endif
