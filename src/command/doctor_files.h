/* Is the folder of OUT fit for a job: locks, appending, renaming, syncing, room, and whether every rank sees the same one. Works with
 * files of its own beside OUT, which it removes; OUT and what belongs to it are only looked at. */
#ifndef TR_COMMAND_DOCTOR_FILES_H
#define TR_COMMAND_DOCTOR_FILES_H

#include <stdbool.h>
#include <stdint.h>

#include "mpi/start.h"

enum { TR_PROBE_LINES = 20 }; /* each rank appends */

typedef struct tr_out_facts {
    char path[1024]; /* OUT; "": none was given */
    char fault[256]; /* the first thing that did not work at all; "": all did */
    char kind
        [24]; /* of the file system, "ext", "nfs", "lustre", ...; a number where it has no name here */
    bool memory; /* of a file system that does not outlive the host */
    bool locks;  /* a lock keeps a second opener out */
    bool renames,
        syncs;      /* a file takes the place of another in one piece; fsync of file and folder */
    double sync_ms; /* of a line: write and fsync */
    uint64_t free_bytes, free_files;
    bool taken; /* another process holds the lock of OUT.run */
    int lines,
        whole_lines; /* that all ranks have appended at the same time, and that came out whole */
} tr_out_facts;

/* All ranks, rank 0 with OUT (others may give NULL). *sees: this rank found what rank 0 had written and could append to it, -1
 * where no OUT was given. Collective over the world. Fails only where the ranks cannot talk. */
tr_status tr_out_probe(tr_out_facts *out, int32_t *sees, const tr_world *world, const char *path,
                       tr_err *err);

#endif
