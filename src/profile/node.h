/* Files of nodes: in large jobs one file for each node in place of one for each rank, so that a file system for all sees few of
 * them. The ranks of a node write their own files as ever, but to a folder of that node (scratch); its leader puts them together
 * into one file with a row for each, after its flushes and at the end. Readers and the join take both kinds. */
#ifndef TR_PROFILE_NODE_H
#define TR_PROFILE_NODE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

enum {
    TR_PROFILE_RANK_FILES = 512
}; /* jobs of more ranks have files of nodes (parallel.md 10.5) */

/* The leader makes the folder, this user's alone, in $TMPDIR or /tmp; its name into path[n]. TR_E_IO. */
tr_status tr_profile_scratch_make(char *path, size_t n, tr_err *err);
/* What ranks leave there goes, and the folder where nothing else is in it. */
void tr_profile_scratch_remove(const char *path);

/* All files of ranks in the folder, closed ones and copies of the last flush (which must be readable: tr_profile_options.clear),
 * as one at path: rows are the ranks that are there, in their order. Written beside path and renamed. All of this process' HDF5
 * is the caller's meanwhile. TR_E_INPUT: there is no file that can be read; TR_E_IO, TR_E_MEMORY. */
tr_status tr_profile_node_write(const char *scratch, const char *path, tr_err *err);

#endif
