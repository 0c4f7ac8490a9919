/* Added tokens in the input (chat.md 1.5): two passes over the text, leftmost match, longest token.
 * The set is filled at load and then read by every thread. */
#ifndef TR_TEXT_ADDED_H
#define TR_TEXT_ADDED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "text/pretoken.h"

typedef struct tr_added_token {
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
} tr_added_token;

typedef struct tr_added tr_added;
tr_added *tr_added_create(void); /* NULL: out of memory */
void tr_added_free(tr_added *a);
/* n > 0; TR_E_INPUT when there is such a text already. */
tr_status tr_added_insert(tr_added *a, const char *text, size_t n, const tr_added_token *token,
                          tr_err *err);
/* The token with exactly this text, or NULL. */
const tr_added_token *tr_added_get(const tr_added *a, const char *text, size_t n);

typedef struct tr_cut { /* text[begin, end) is token id, or ordinary text (id -1) */
    size_t begin, end;
    int32_t id;
} tr_cut;

typedef struct tr_cuts {
    tr_cut *cut;
    size_t n, cap;
} tr_cuts;

/* A stretch of the text; stretches cover it, in order. No token is found that is not wholly inside
 * one that is not literal; neighbours that are not literal must have been joined. */
typedef struct tr_stretch {
    size_t end;
    bool literal;
} tr_stretch;

/* Cut well-formed text [0, n) into tokens and what is between them. pass: scratch of the same kind
 * as out. TR_E_MEMORY. */
tr_status tr_added_cut(const tr_added *a, const tr_pretoken *p, tr_pretoken_scratch *s,
                       const char *text, size_t n, const tr_stretch *stretches, size_t n_stretches,
                       tr_cuts *pass, tr_cuts *out, tr_err *err);

#endif
