/* The lines of OUT: an answer, a refusal, or a line that was no request, as one line of JSON
 * (chat.md 4.1, 4.4). Every id is a hash of the input's hash and the request, so that a rerun
 * writes the same record but for `created` and `cached_tokens`. Used by the writer thread; holds nothing between
 * calls. */
#ifndef TR_BATCH_RECORD_H
#define TR_BATCH_RECORD_H

#include "batch/idset.h"
#include "batch/request.h"

typedef struct tr_record_options { /* of the run, borrowed */
    const char *input_hash;        /* 32 hex digits */
    const tr_tokenizer *tokenizer; /* NULL: ids and no text */
    const char *model;             /* name in the answers */
    int32_t eos, bos, pad;         /* -1: none; not part of any text */
} tr_record_options;

typedef struct tr_record_name { /* whose record: custom_id, or NULL and the line's number */
    const char *custom_id;
    size_t n;
    uint64_t line;
} tr_record_name;

/* "batch_req_" and 24 hex digits, with a NUL. */
void tr_record_id(const char *input_hash, const tr_record_name *name, char id[40]);

/* All append one line with its line feed to out; TR_E_MEMORY only. created: seconds since 1970. */
tr_status tr_record_answer(tr_buf *out, const tr_record_options *o, const tr_event *event,
                           int64_t created, tr_err *err);
tr_status tr_record_refusal(tr_buf *out, const tr_record_options *o, const tr_record_name *name,
                            const tr_refusal *refusal, tr_err *err);
tr_status tr_record_invalid(tr_buf *out, const tr_record_options *o, uint64_t line, size_t column,
                            const char *message, tr_err *err);

/* The refusal a TR_EVENT_FAILED amounts to: 400 for what could never fit, else 500. */
void tr_record_failure(const tr_event *event, tr_refusal *out);

/* A line of some OUT (without its line feed): 1 and whose it is, 0: not a whole record of this
 * input. id is overwritten with the custom_id's bytes and name points into it; -1: out of
 * memory. */
int tr_record_read(const char *text, size_t n, const char *input_hash, tr_buf *id,
                   tr_record_name *name);

#endif
