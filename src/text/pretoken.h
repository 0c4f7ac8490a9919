/* The pre-tokenizer (chat.md 1.3): three Split steps through PCRE2, each run on every piece of the
 * one before. The patterns are compiled once and shared by all threads; a tr_pretoken_scratch
 * belongs to one thread. */
#ifndef TR_TEXT_PRETOKEN_H
#define TR_TEXT_PRETOKEN_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

enum { TR_N_SPLITS = 3 };

/* The regular expressions of tokenizer.json that are understood, in their order, as the file spells
 * them. */
extern const char *const tr_split_patterns[TR_N_SPLITS];

typedef struct tr_pretoken tr_pretoken;
typedef struct tr_pretoken_scratch tr_pretoken_scratch;

/* TR_E_MEMORY, or TR_E_INPUT where PCRE2 lacks Unicode. */
tr_status tr_pretoken_create(tr_pretoken **out, tr_err *err);
void tr_pretoken_free(tr_pretoken *p);
tr_pretoken_scratch *tr_pretoken_scratch_create(void); /* NULL: out of memory */
void tr_pretoken_scratch_free(tr_pretoken_scratch *s);

/* Called for each piece, in order; false stops, and tr_pretoken_split returns TR_E_MEMORY. */
typedef bool tr_piece_sink(void *ctx, const char *piece, size_t n);

/* The pieces of well-formed UTF-8 text; their concatenation is the text. */
tr_status tr_pretoken_split(const tr_pretoken *p, tr_pretoken_scratch *s, const char *text,
                            size_t n, tr_piece_sink *sink, void *ctx, tr_err *err);

/* Is the first (last) character of text a word character (chat.md 1.5, single_word)? false for n =
 * 0. */
bool tr_word_first(const tr_pretoken *p, tr_pretoken_scratch *s, const char *text, size_t n);
bool tr_word_last(const tr_pretoken *p, tr_pretoken_scratch *s, const char *text, size_t n);

/* Length of the White_Space run that text begins (ends) with, in bytes. */
size_t tr_space_first(const char *text, size_t n);
size_t tr_space_last(const char *text, size_t n);

#endif
