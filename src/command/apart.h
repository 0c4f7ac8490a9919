/* Files that a job reads, and files that it writes beside or over others, are told apart before any of them is touched: a name
 * given twice by mistake must not cost the requests. */
#ifndef TR_COMMAND_APART_H
#define TR_COMMAND_APART_H

#include "command/options.h"

/* TR_E_USAGE, with both names: -i or a PART is a file that the job writes (OUT and what is kept beside it, the profile), --profile
 * and -o would write one file, or --profile names a file that is no HDF5. By device and number, so links are seen through;
 * standard input and output are nobody's. TR_E_MEMORY. */
tr_status tr_apart_check(const tr_batch_options *options, tr_err *err);

/* A profile takes the place of an older one, of nothing else: TR_E_USAGE with `option` where `path` is another file. */
tr_status tr_apart_replaced(const char *option, const char *path, tr_err *err);

#endif
