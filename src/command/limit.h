/* What a job is given from outside: its time, and its share of the input (parallel.md 10.3). Text and environment into
 * numbers; nothing else. */
#ifndef TR_COMMAND_LIMIT_H
#define TR_COMMAND_LIMIT_H

#include <stdint.h>

#include "base/err.h"
#include "batch/input.h"

/* "90" (seconds), or as Slurm writes times: MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS; "UNLIMITED" is -1. Any number of
 * minutes or seconds is fine (90:00), ten years are the most. TR_E_USAGE: --time-budget and the text in the message. */
tr_status tr_limit_time(double *seconds, const char *text, tr_err *err);

/* Seconds from now (since 1970) until SLURM_JOB_END_TIME's text; -1: there is none, or none that can be meant (*odd, then). */
double tr_limit_slurm(const char *text, int64_t now_s, bool *odd);

/* What to keep of so many seconds for saving and leaving: a twentieth, 2 s at least and 30 s at most. */
double tr_limit_margin(double seconds);

/* "i/n", i from 0; "auto": SLURM_ARRAY_TASK_ID, _MIN, _MAX, _COUNT and _STEP as `get` (getenv) gives them. TR_E_USAGE. */
tr_status tr_limit_shard(tr_input_shard *out, const char *text, char *(*get)(const char *name),
                         tr_err *err);

#endif
