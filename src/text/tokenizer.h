/* tokenizer.json of the published form (chat.md 1): loading with refusals, encoding, decoding. Immutable after open:
 * every thread may encode with one tokenizer (each with a tr_encoder of its own, which holds scratch and the piece cache). */
#ifndef TR_TEXT_TOKENIZER_H
#define TR_TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/log.h"

typedef struct tr_tokenizer tr_tokenizer;
typedef struct tr_encoder tr_encoder;

/* Load and check (chat.md 1.7). TR_E_INPUT; the text is "PATH: CODE: field, value found", and *code (may be NULL) points
 * to the code alone, a static string such as "unsupported_pattern" (NULL when the file could not be read). Warnings
 * (unknown top-level keys) go to log, which may be NULL. */
tr_status tr_tokenizer_open(tr_tokenizer **out, const char *path, const char **code, tr_log *log,
                            tr_err *err);
/* The same from memory; name stands in messages. */
tr_status tr_tokenizer_parse(tr_tokenizer **out, const char *json, size_t n, const char *name,
                             const char **code, tr_log *log, tr_err *err);
void tr_tokenizer_free(tr_tokenizer *t);

/* Largest id + 1. */
int32_t tr_tokenizer_size(const tr_tokenizer *t);
/* The id of an added token with exactly this text, or -1. */
int32_t tr_tokenizer_added(const tr_tokenizer *t, const char *content);
/* The bytes an id decodes to (chat.md 1.6), not NUL-terminated; *n = 0 for an id without token. */
const char *tr_tokenizer_bytes(const tr_tokenizer *t, int32_t id, size_t *n);
bool tr_tokenizer_has(const tr_tokenizer *t, int32_t id);
bool tr_tokenizer_special(const tr_tokenizer *t, int32_t id);
/* Bit per id of [0, n_vocab): set where the id has a token; words ceil(n_vocab / 32). */
void tr_tokenizer_mask(const tr_tokenizer *t, int n_vocab, uint32_t *words);
/* The text of ids: their bytes joined, ill-formed UTF-8 repaired, NUL-terminated; *text is the caller's (free). Ids
 * without token give nothing; skip_special leaves out tr_tokenizer_special ones. Never on output that is to be parsed
 * (chat.md 1.6). TR_E_MEMORY. */
tr_status tr_decode(const tr_tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                    char **text, size_t *n_text, tr_err *err);
/* 32 hex digits over the file's bytes. */
const char *tr_tokenizer_identity(const tr_tokenizer *t);

tr_encoder *tr_encoder_create(const tr_tokenizer *t); /* keeps t; NULL: out of memory */
void tr_encoder_free(tr_encoder *e);

/* A stretch of text; literal: added tokens are not looked for in it (--literal-content). */
typedef struct tr_segment {
    const char *text;
    size_t n;
    bool literal;
} tr_segment;

/* Token ids of the concatenated segments; neighbouring segments without a token between them are joined before
 * pre-tokenizing. Ill-formed UTF-8 becomes U+FFFD per maximal subpart. *ids is the caller's (free). Time is linear in the
 * text, n log n at worst. TR_E_MEMORY, or TR_E_INPUT when PCRE2 reports a failure. */
tr_status tr_encode(tr_encoder *e, const tr_segment *segments, size_t n_segments, int32_t **ids,
                    size_t *n_ids, tr_err *err);
/* For tests: the pre-tokenizer's pieces as end offsets into the (repaired) text, without added-token matching. */
tr_status tr_encode_pieces(tr_encoder *e, const char *text, size_t n, size_t **ends, size_t *n_ends,
                           tr_err *err);

#endif
