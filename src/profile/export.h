/* `trireme profile export`: a profile in the formats of other tools. Files are made new; one that is there is replaced. */
#ifndef TR_PROFILE_EXPORT_H
#define TR_PROFILE_EXPORT_H

#include <stdio.h>

#include "profile/read.h"

/* Trace Event Format (chrome://tracing, Perfetto): one process per rank, one thread per stream, B and E events in pairs, from
 * /trace where it was recorded, else from /steps; requests as async events; tokens/s, pages and queue as counters.
 * Times are microseconds on rank 0's clock. */
tr_status tr_export_chrome(FILE *out, tr_reader *r, tr_err *err);

/* TAU's text profiles in a folder, profile.RANK.0.STREAM: flat and call path entries, microseconds, bytes as user events.
 * A folder with such files of another profile, which would not be replaced, is refused. */
tr_status tr_export_tau(const char *folder, tr_reader *r, tr_err *err);

/* One table per file in a folder: run, ranks, groups, regions, phases, steps, requests, comm, matrix, overlap, experts,
 * rank_tokens, balance, kv, memory, counters, counters_absent, phase_counters, io, log and trace; empty where the profile has
 * nothing. The first line names the columns. */
tr_status tr_export_csv(const char *folder, tr_reader *r, tr_err *err);

/* Hatchet's literal: a list of trees as JSON. rank -1: means over ranks, with the largest and the rank that has it. */
tr_status tr_export_hatchet(FILE *out, tr_reader *r, int rank, tr_err *err);

/* Text in quotes, escaped for JSON. */
void tr_export_quote(FILE *out, const char *text);

/* The folder is there afterwards. */
tr_status tr_export_folder(const char *folder, tr_err *err);
/* folder/name for writing. */
tr_status tr_export_open(FILE **out, const char *folder, const char *name, tr_err *err);
/* Closes; TR_E_IO when anything could not be written. */
tr_status tr_export_close(FILE *out, const char *folder, const char *name, tr_err *err);

#endif
