/* The signal flag: USR1, TERM and INT ask the run to stop at a step boundary (exit 75); a second one ends the process
 * at once (_exit(75)) after the write that is under way. The one mutable global of the program. */
#ifndef TR_BASE_STOP_H
#define TR_BASE_STOP_H

#include <stdbool.h>

#include "base/err.h"

/* Install the handlers and ignore SIGPIPE, SIGHUP and SIGXFSZ (a closed terminal or a size limit is an errno). */
tr_status tr_stop_install(tr_err *err);
bool tr_stop_requested(void);
/* The name of the signal that asked ("USR1"), or NULL. */
const char *tr_stop_reason(void);

#endif
