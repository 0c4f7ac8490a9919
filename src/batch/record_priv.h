/* Shared by record.c and logprobs.c. */
#ifndef TR_BATCH_RECORD_PRIV_H
#define TR_BATCH_RECORD_PRIV_H

#include "batch/record.h"
#include "text/detok.h"

/* A string literal of bytes that may be ill-formed (one U+FFFD per maximal subpart). */
void tr_write_text(tr_buf *out, const char *s, size_t n);
void tr_write_ids(tr_buf *out, const int32_t *ids, size_t n);
/* JSON has no infinity: an impossible token has -9999, as in OpenAI's answers. */
void tr_write_logprob(tr_buf *out, float x);
/* The bytes a token decodes to; "token_id:N" written to spare (32 bytes) where there is no
 * tokenizer. */
const char *tr_token_bytes(const tr_record_options *o, int32_t token, char *spare, size_t *n);

/* Text of a run of tokens, piece by piece. Starts as zeros; free(m.room). */
typedef struct tr_meter {
    tr_detok detok;
    char *room;
    size_t cap;
    bool failed; /* out of memory */
} tr_meter;
/* What is decided once this token is read, valid until the next call; *n bytes. */
const char *tr_meter_token(tr_meter *m, const tr_record_options *o, int32_t token, size_t *n);

/* The values of "logprobs" and "prompt_logprobs" of choice i. */
void tr_write_chat_logprobs(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                            const tr_choice *choice);
void tr_write_completion_logprobs(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                                  const tr_event *event, const tr_choice *choice);
void tr_write_prompt_logprobs(tr_buf *out, const tr_record_options *o, const tr_asked *asked,
                              const tr_event *event);

#endif
