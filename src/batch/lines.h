/* Lines of a file by pread, in pieces, with a cap on the length of one: the input, OUT at
 * resume, and parts to merge. Nothing needs the whole file in memory. */
#ifndef TR_BATCH_LINES_H
#define TR_BATCH_LINES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/hash.h"

typedef struct tr_line {
    uint64_t number;  /* from 1, blank lines counted */
    uint64_t offset;  /* of its first byte in the file */
    uint64_t bytes;   /* its length in the file, line feed included */
    const char *text; /* without the line feed; valid until the next call */
    size_t n;
    bool too_long; /* longer than the cap: text is empty */
    bool whole;    /* it ended in a line feed */
} tr_line;

typedef struct tr_lines tr_lines;

/* Keeps fd (not closed) and name (for messages); reads from offset 0. hasher may be NULL: every
 * byte read goes in. */
tr_status tr_lines_open(tr_lines **out, int fd, const char *name, size_t max_line,
                        tr_hasher *hasher, tr_err *err);
void tr_lines_close(tr_lines *lines);
/* From now on a stop (base/stop.h) ends the reading, a few milliseconds after it was asked for: for passes over whole files, which
 * nobody else ends. */
void tr_lines_heed_stop(tr_lines *lines);
/* 1: *line; 0: the end; -1: err (TR_E_IO, TR_E_MEMORY, TR_E_STOP). */
int tr_lines_next(tr_lines *lines, tr_line *line, tr_err *err);

#endif
