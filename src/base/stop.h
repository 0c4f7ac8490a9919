/* The signal flag: USR1, TERM and INT ask the run to stop (exit 75); a second one ends the process at once (_exit(75)) after
 * the write that is under way. The one mutable global of the program.
 *
 * A rank's signal counts for all of them, so what was asked can travel as one word: of two words the larger is the more
 * urgent. */
#ifndef TR_BASE_STOP_H
#define TR_BASE_STOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/err.h"

/* Install the handlers and ignore SIGPIPE, SIGHUP and SIGXFSZ (a closed terminal or a size limit is an errno). Once more where
 * other libraries may have put theirs in the place: a stop that was asked for before stays asked for. */
tr_status tr_stop_install(tr_err *err);
bool tr_stop_requested(void);
/* The name of the signal that asked ("USR1"), or NULL. */
const char *tr_stop_reason(void);

/* As read and write of a pipe or a terminal, which may let one wait for ever; but waiting ends when a stop is asked for: -1 with
 * errno ECANCELED, at once for a signal that this thread gets and within a tenth of a second otherwise. Interrupted calls are
 * begun again. Of a pipe at most 4096 bytes are written at a time, so that the write itself cannot wait either. */
ssize_t tr_stop_read(int fd, void *buf, size_t n);
ssize_t tr_stop_write(int fd, const void *buf, size_t n);
/* TR_E_STOP: "WHAT: stopped by USR1". */
tr_status tr_stop_fail(const char *what, tr_err *err);

/* So many seconds from now the time budget is over: as if a signal asked then ("the time budget"). 0: it is not. For the time
 * before the engine runs, which looks at the budget itself. Behind a signal it changes nothing, and a signal behind it counts
 * as the first. */
void tr_stop_alarm(double seconds);

/* What this process was asked: 0: nothing. */
uint64_t tr_stop_word(void);
/* Of any word, also one that came from another rank and is none: "USR1", "signal"; NULL for 0. */
const char *tr_stop_word_name(uint64_t word);
/* TERM: the end is near. USR1 and INT leave the time that --grace says. */
bool tr_stop_word_urgent(uint64_t word);

#endif
