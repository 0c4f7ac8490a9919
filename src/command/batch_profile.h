/* --profile of `trireme batch`: brings the run's parts (engine, model, communicators, checkpoint) and the profile together,
 * which know nothing of each other. Main thread. All functions take NULL, for a run without a profile, and do nothing. */
#ifndef TR_COMMAND_BATCH_PROFILE_H
#define TR_COMMAND_BATCH_PROFILE_H

#include "base/log.h"
#include "batch/job.h"
#include "command/open.h"
#include "command/options.h"
#include "engine/engine.h"
#include "mpi/start.h"

typedef struct tr_run_profile tr_run_profile;

/* As early as can be: the time of the run begins here, and events are counted in threads made later. Keeps all of them. NULL
 * where no profile is asked for, or out of memory. */
tr_run_profile *tr_run_profile_create(const tr_batch_options *options, tr_world *world,
                                      tr_opened *opened, tr_log *log);
/* Once the grid is known. Collective; the status is the world's, failures of the profile are warnings. */
tr_status tr_run_profile_begin(tr_run_profile *r, const char *model_name, const char *kv_dtype,
                               tr_err *err);
/* When the engine is there, before it runs. */
void tr_run_profile_engine(tr_run_profile *r, tr_engine *engine);
/* Streams of the job's threads and the observer of its answers. */
void tr_run_profile_job(tr_run_profile *r, tr_job_options *job);
/* After the job. whole: all ranks have come this far, and the files are brought together: collective. Otherwise this rank's
 * is closed as it is. The status is the communicator's. */
tr_status tr_run_profile_end(tr_run_profile *r, bool whole, tr_err *err);
void tr_run_profile_free(tr_run_profile *r); /* before the engine and the model */

#endif
