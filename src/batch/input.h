/* The input file: read twice, by lines. The first pass hashes it, counts the requests and
 * refuses a custom_id that stands twice; the second gives the lines out. What is no regular file
 * ("-", a pipe) is copied to an unlinked temporary file first. Main thread opens and checks, the
 * reader thread calls next. */
#ifndef TR_BATCH_INPUT_H
#define TR_BATCH_INPUT_H

#include "batch/envelope.h"

enum { TR_LINE_MAX = 16 << 20 };

typedef struct tr_input tr_input;

/* Line k of the file, from 0 and blank ones counted, belongs to shard k mod n. */
typedef struct tr_input_shard {
    uint64_t i, n; /* i < n */
} tr_input_shard;

typedef struct tr_input_info {
    char hash[33]; /* XXH3 over every byte */
    uint64_t bytes;
    uint64_t n_requests; /* lines that are not blank */
    uint64_t n_mine;     /* of these, in the shard */
} tr_input_info;

/* path "-" is stdin. max_line 0: TR_LINE_MAX. TR_E_INPUT: missing, or a custom_id twice (with
 * both line numbers). TR_E_STOP: a stop was asked for while it was read, or waited for (base/stop.h). */
tr_status tr_input_open(tr_input **out, const char *path, size_t max_line, tr_err *err);
void tr_input_close(tr_input *in);
/* From the next line on only this shard's are given out (the default: 0 of 1, all). Before the first line. */
tr_status tr_input_take_shard(tr_input *in, tr_input_shard shard, tr_err *err);
const tr_input_info *tr_input_about(const tr_input *in);

/* From the first line again, whether or not the last was reached: of what was opened, also where that was a pipe. */
tr_status tr_input_rewind(tr_input *in, tr_err *err);

/* The next line that is not blank, without BOM, carriage return and line feed. 1, 0 at the end,
 * -1: err. */
int tr_input_next(tr_input *in, tr_line *line, tr_err *err);

/* At the end of a run: TR_E_INPUT when the file is not what the first pass saw. The contents are
 * compared only when every line was given out; then a file that was touched, or replaced by the same bytes, is the same. */
tr_status tr_input_check(const tr_input *in, tr_err *err);

#endif
