/* trireme batch --merge: the records of several outputs of one input, in the order of the input. */
#ifndef TR_BATCH_MERGE_H
#define TR_BATCH_MERGE_H

#include "base/err.h"
#include "base/log.h"

/* out "-": stdout; a file must not exist yet and appears whole or not at all, also when a stop
 * (base/stop.h) ends it, soon after it was asked for: TR_E_STOP, and the same command begins anew. TR_E_INPUT: a
 * request without a record, or with two (the first such one is named). TR_E_USAGE: parts of runs that were not
 * started alike (runfile.h). Lines that are no whole
 * records of this input are left out with a warning. */
tr_status tr_merge(const char *input, const char *out, char *const *part, int n_parts, tr_log *log,
                   tr_err *err);

#endif
