/* JSON text as text: a tree of spans over the raw bytes, for what a number type or a hash table would spoil: integers of any
 * length, key order, repeated keys (chat.md 2.3, build.md 5). Strict RFC 8259 syntax, depth at most 512. Used for tools,
 * schemas, arguments and messages; sampling parameters go through jansson. */
#ifndef TR_TEXT_JTEXT_H
#define TR_TEXT_JTEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

typedef enum tr_jtype {
    TR_J_NULL,
    TR_J_FALSE,
    TR_J_TRUE,
    TR_J_NUMBER,
    TR_J_STRING,
    TR_J_ARRAY,
    TR_J_OBJECT
} tr_jtype;

/* A node; children are linked in order. Borrowed from its tree. */
typedef struct tr_jnode {
    tr_jtype type;
    size_t begin, end;         /* span of the value in the text */
    size_t key_begin, key_end; /* in an object: the key's string with its quotes */
    int child, next;           /* indices of nodes, -1: none */
    int n_children;
} tr_jnode;

typedef struct tr_jtext tr_jtext;

/* Parse n bytes, all of them (white space around). The text is kept and must outlive the tree. TR_E_INPUT with *at (may be
 * NULL) the byte offset of the fault; TR_E_MEMORY. */
tr_status tr_jtext_parse(tr_jtext **out, const char *text, size_t n, size_t *at, tr_err *err);
void tr_jtext_free(tr_jtext *t);
const char *tr_jtext_raw(const tr_jtext *t);
const tr_jnode *tr_jtext_root(const tr_jtext *t);
const tr_jnode *tr_jtext_child(const tr_jtext *t, const tr_jnode *n); /* first, or NULL */
const tr_jnode *tr_jtext_next(const tr_jtext *t, const tr_jnode *n);  /* sibling, or NULL */
/* Member by key (escapes in keys count): of repeated ones the last. NULL: absent, or n is no object. */
const tr_jnode *tr_jtext_member(const tr_jtext *t, const tr_jnode *n, const char *key);
/* The same, NULL also where the member is null: "not given". */
const tr_jnode *tr_jtext_given(const tr_jtext *t, const tr_jnode *n, const char *key);
/* Compared as decoded characters; n's key, n's own value (false where n is no string). Nothing is allocated. */
bool tr_jtext_key_is(const tr_jtext *t, const tr_jnode *n, const char *key);
bool tr_jtext_is(const tr_jtext *t, const tr_jnode *n, const char *text);

/* A growing byte string; starts as zeros, freed with free(b.s). failed becomes true when memory ran out and stays so;
 * what is added then is lost. s, where not NULL, has a NUL behind its n bytes. */
typedef struct tr_buf {
    char *s;
    size_t n, cap;
    bool failed;
} tr_buf;
void tr_buf_add(tr_buf *b, const char *s, size_t n);
void tr_buf_puts(tr_buf *b, const char *s);
void tr_buf_printf(tr_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The decoded characters of a string node (or of a key) appended; a lone surrogate escape becomes U+FFFD. */
void tr_jtext_string(const tr_jtext *t, const tr_jnode *n, tr_buf *out);
void tr_jtext_key(const tr_jtext *t, const tr_jnode *n, tr_buf *out);

/* The members of an object with repeated keys resolved (chat.md 2.3): the last value at the place of the first.
 * *out (the caller's: free) has *n_out nodes, each with a key span of its own. TR_E_MEMORY. */
tr_status tr_jtext_members(const tr_jtext *t, const tr_jnode *n, const tr_jnode ***out,
                           size_t *n_out, tr_err *err);

/* Re-spell a value as Python's json.dumps(value, ensure_ascii=False) does (chat.md 2.3). TR_E_INPUT: a number beyond the
 * double range, named in the text. TR_E_MEMORY: out has failed. */
tr_status tr_jtext_respell(const tr_jtext *t, const tr_jnode *n, tr_buf *out, tr_err *err);

/* A JSON string literal of n bytes of UTF-8, with quotes, escaped as in 2.3. Ill-formed bytes must not be in it. */
void tr_json_quote(tr_buf *out, const char *s, size_t n);

#endif
