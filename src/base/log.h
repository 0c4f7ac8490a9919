/* Messages to stderr: one event is one line, "trireme: ..." in front. Rank 0 speaks for the job; a log made with
 * quiet = true (the other ranks) prints warnings of its own rank only when told so by the caller.
 * Thread-safe: the batch reader, the writer and the engine share one tr_log. */
#ifndef TR_BASE_LOG_H
#define TR_BASE_LOG_H

#include <stdbool.h>
#include <stdio.h>

typedef struct tr_log tr_log;

/* out is borrowed (stderr). Terminal and NO_COLOR are looked at once, here. verbose: tr_log_debug prints too. */
tr_log *tr_log_create(FILE *out, bool quiet, bool verbose);
void tr_log_free(tr_log *log);

/* log may be NULL everywhere: nothing is printed. */
void tr_log_info(tr_log *log, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void tr_log_warn(tr_log *log, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void tr_log_debug(tr_log *log, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Progress: redrawn in place on a terminal (at most 5 times a second), else a line at most every 30 s.
 * The next info or warn line starts on a fresh line. */
void tr_log_progress(tr_log *log, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
