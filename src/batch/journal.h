/* OUT: append-only, one record per line, each written with one write; synced in groups
 * (reliability.md 3). Opening resumes: every line is read, what is no whole record is cut or
 * left out, and the requests that have a record are known. Owned by the writer thread; `has`,
 * `stalled` may be asked by the reader. */
#ifndef TR_BATCH_JOURNAL_H
#define TR_BATCH_JOURNAL_H

#include "batch/idset.h"
#include "batch/runfile.h"

typedef struct tr_journal tr_journal;

typedef struct tr_journal_options {
    tr_runfile_options run;
    const char *input_hash; /* 32 hex digits: whose records count */
    /* 0: the defaults of reliability.md (60000, 64, 1000, 10000); tests have smaller ones. */
    int retry_ms; /* disk full, quota, EIO: how long to try again */
    uint64_t
        end_ns; /* and not beyond this moment (base/clock.h): the job's time is over; 0: none */
    int sync_lines, sync_ms;
    int check_ms; /* how often to look whether OUT is still there */
} tr_journal_options;

tr_status tr_journal_open(tr_journal **out, const tr_journal_options *options, tr_err *err);
/* Records to a descriptor (kept), without a file, lock or resume. */
tr_status tr_journal_stream(tr_journal **out, int fd, const char *name, tr_err *err);

bool tr_journal_has(const tr_journal *j, tr_key key); /* had a record when the run began */
size_t tr_journal_found(const tr_journal *j);         /* how many had */
bool tr_journal_stalled(const tr_journal *j);         /* trying again: admit nothing */

/* One record with its line feed. A disk that is full is tried again for retry_ms (or until a
 * stop is asked for), then TR_E_IO; no torn line stays. */
tr_status tr_journal_append(tr_journal *j, const char *line, size_t n, tr_err *err);
/* From time to time: sync a group that has waited long enough, see that OUT is still the same
 * file (TR_E_IO). */
tr_status tr_journal_tick(tr_journal *j, tr_err *err);
/* Sync and check a last time; frees in any case. NULL is fine. */
tr_status tr_journal_close(tr_journal *j, tr_err *err);

#endif
