/* A batch job around a running engine: the reader thread parses and submits (skipping what has a
 * record), the writer thread takes events and writes records, the calling thread (the MPI one)
 * runs the steps. */
#ifndef TR_BATCH_JOB_H
#define TR_BATCH_JOB_H

#include "batch/input.h"
#include "batch/journal.h"
#include "batch/record.h"
#include "batch/request.h"
#include "batch/saved.h"
#include "engine/engine.h"

enum { TR_JOB_KINDS_MAX = 32 };

typedef struct tr_job_options { /* all borrowed */
    tr_input *input;
    tr_journal *journal;
    tr_saved *saved; /* NULL: nothing is saved or gone on with */
    /* Seconds between two savings of running requests. 0: only when the run is stopped. < 0: an eighth of the time the run has
     * taken so far, within 1 and 120, and so rarely that it costs less than half a percent of the time. */
    double save_every_s;
    tr_engine *engine;
    tr_request_options request;
    tr_record_options record;
    tr_log *log;
    tr_regions *read_regions, *write_regions; /* streams of the two threads; NULL: none */
    void *seen_ctx;
    void (*seen)(void *ctx, const tr_event *event); /* by the writer's thread; NULL: nobody */
} tr_job_options;

typedef struct
    tr_job_counts { /* of this run; requests of the input that have no record are in none of them */
    uint64_t skipped;      /* had a record */
    uint64_t continued;    /* begun, or finished at once, with what was saved of them */
    tr_saved_counts saved; /* at the end: what the next job goes on with */
    uint64_t answered, refused, invalid, failed;
    uint64_t numerical;                 /* of failed: numerical_error */
    const char *code[TR_JOB_KINDS_MAX]; /* refused and failed by code; static strings */
    uint64_t n_code[TR_JOB_KINDS_MAX];
    int n_kinds;
} tr_job_counts;

/* Until the input is done (TR_OK), a signal or the time budget ends it early (TR_E_STOP), or something fails. Prints
 * progress and a summary. More than 1 % numerical_error: TR_E_DEVICE. The journal is left open. */
tr_status tr_job_run(const tr_job_options *options, tr_job_counts *counts, tr_err *err);

/* One chat message; its answer's content to out with a line feed behind it. TR_E_USAGE: refused. */
tr_status tr_job_prompt(const tr_job_options *options, const char *text, size_t n, FILE *out,
                        tr_err *err);

#endif
