/* OUT.run: what the run that writes OUT was started with, and the lock that keeps a second job
 * away (reliability.md 3). The identity is fixed once the first record may be written; who holds
 * the lock is rewritten by every run. */
#ifndef TR_BATCH_RUNFILE_H
#define TR_BATCH_RUNFILE_H

#include <stdbool.h>

#include "base/err.h"
#include "base/log.h"

typedef struct tr_run_field { /* "input", "model", "seed", ...: compared one by one, as text */
    const char *name, *value;
} tr_run_field;

typedef struct tr_runfile_options {
    const char *out_path;
    const tr_run_field *field;
    int n_fields;
    bool must_exist; /* --resume */
    bool no_ofd;     /* tests: as if the file system had no locks */
    tr_log *log;
} tr_runfile_options;

typedef struct tr_runfile tr_runfile;

/* Lock, then compare or write. TR_E_USAGE: locked (by whom), OUT without OUT.run, another
 * identity (the field named), must_exist and nothing there, an OUT.run that no job has written. Where
 * OUT has no byte and OUT.saved none nobody is bound: OUT.run is written anew, and an OUT.saved without an OUT.run is removed. */
tr_status tr_runfile_open(tr_runfile **out, const tr_runfile_options *options, tr_err *err);
/* Gives the lock back; the file stays. */
void tr_runfile_close(tr_runfile *run);

/* Of n outputs of one input, as --merge takes them: their OUT.run must have the same members but for the shard. One that has none,
 * or no whole one, goes with any. TR_E_USAGE names two that differ and the first member in which they do. */
tr_status tr_runfile_go_together(char *const *out_path, int n, tr_err *err);

/* What takes the place of `path`, or stands beside it, gets its permissions and, where this user may, its owner and group. */
void tr_alike(int fd, const char *path);

/* fsync of the folder a file lies in, so that its name survives. */
tr_status tr_sync_folder(const char *path, tr_err *err);

#endif
