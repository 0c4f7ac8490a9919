/* The phases of `trireme batch` on one rank, in the order in which faults are cheapest to find:
 * the input, the model folder's small files, lock and OUT.run, weights, model, engine, job. The
 * caller lets the ranks agree between them. */
#ifndef TR_COMMAND_BATCH_RUN_H
#define TR_COMMAND_BATCH_RUN_H

#include "base/log.h"
#include "command/options.h"
#include "mpi/start.h"

typedef struct tr_run tr_run;

/* Keeps options, world and log. Rank 0 leads: it has input, journal and voice. NULL: out of memory. */
tr_run *tr_run_create(const tr_batch_options *options, tr_world *world, tr_log *log);
void tr_run_free(tr_run *run);

/* What is read is none of what is written; hashed, duplicates refused (nothing of that with --prompt). */
tr_status tr_run_input(tr_run *run, tr_err *err);
tr_status tr_run_files(tr_run *run, tr_err *err);   /* config, shard headers, tokenizer, defaults */
tr_status tr_run_alike(tr_run *run, tr_err *err);   /* every rank was started as rank 0 was */
tr_status tr_run_journal(tr_run *run, tr_err *err); /* lock, OUT.run, resume */
tr_status tr_run_device(tr_run *run, tr_err *err);  /* which --device it will be; collective */
tr_status tr_run_open_profile(tr_run *run, tr_err *err); /* --profile: the ranks' files, clocks */
tr_status tr_run_weights(tr_run *run, tr_err *err);
tr_status tr_run_model(tr_run *run, tr_err *err); /* the cache's size is decided here */
tr_status tr_run_engine(tr_run *run, tr_err *err);
tr_status tr_run_watch(tr_run *run,
                       tr_err *err); /* the watchdog, where there are several ranks; collective */
tr_status tr_run_job(tr_run *run,
                     tr_err *err); /* or the answer to --prompt; followers run the leader's steps */
/* After a phase up to the engine found too little memory: what this rank takes, if enough is known of the model to tell. */
void tr_run_budget(const tr_run *run);
/* After the ranks have agreed on how the job went: the profile's files are brought together, or after TR_E_COMM, when nobody
 * can be waited for any more, left as they are. Never changes how it went. */
void tr_run_close_profile(tr_run *run, tr_status how);
/* After job: other ranks may wait for this one for ever (tr_engine_broken). */
bool tr_run_broken(const tr_run *run);

#endif
