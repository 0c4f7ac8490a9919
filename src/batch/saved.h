/* OUT.saved: how far the unfinished requests of a run have come, so that the next job goes on with them (parallel.md 10.3).
 * Replaced as a whole (OUT.saved.tmp, fsync, rename), bound to its run by a hash of OUT.run's fields; OUT.run's lock keeps
 * other jobs away. It is a help, never a record: what is missing, damaged, cannot be read (the warning has the system's
 * reason), is of another run or does not fit is dropped with a warning, and the request starts over. No job ends for it.
 *
 * The reader thread asks (find, done), the writer thread writes (done, write). */
#ifndef TR_BATCH_SAVED_H
#define TR_BATCH_SAVED_H

#include "batch/runfile.h"
#include "engine/progress.h"

typedef struct tr_saved tr_saved;

typedef struct tr_saved_options {
    const char *out_path;
    const tr_run_field *field; /* OUT.run's */
    int n_fields;
    tr_log *log; /* kept */
} tr_saved_options;

/* Reads and checks what is there. TR_E_MEMORY alone. */
tr_status tr_saved_open(tr_saved **out, const tr_saved_options *options, tr_err *err);
void tr_saved_close(tr_saved *s);         /* the file stays */
size_t tr_saved_count(const tr_saved *s); /* requests in it, when it was opened */

/* What was saved of this line's request, the caller's; NULL: nothing, or nothing that can be read (then warned about). */
tr_progress *tr_saved_find(tr_saved *s, uint64_t line);
/* The line has its record: nothing of it is kept any more. */
void tr_saved_done(tr_saved *s, uint64_t line);

typedef struct tr_saved_counts {
    uint64_t requests, tokens, bytes; /* in the file now */
} tr_saved_counts;

/* These, and what was there of lines that are neither among them nor done, as far as it can be read. Nothing at all: no file. False, warned about: the
 * old file is still there. */
bool tr_saved_write(tr_saved *s, const tr_progress *list, tr_saved_counts *counts);
/* The run is complete. */
void tr_saved_remove(tr_saved *s);

#endif
