/* One line of the input as JSON text, and its custom_id: what the check for duplicates, the
 * reader and --merge must see alike. A line without a usable custom_id is no request; its number
 * stands for it (chat.md 4.1). */
#ifndef TR_BATCH_ENVELOPE_H
#define TR_BATCH_ENVELOPE_H

#include "batch/idset.h"
#include "batch/lines.h"
#include "text/jtext.h"

typedef struct tr_envelope { /* starts as zeros; read again and again; freed once */
    tr_buf text; /* the line; lone surrogate escapes replaced in place, ill-formed UTF-8 repaired */
    tr_jtext *json; /* over text; NULL: not JSON */
    const tr_jnode *root;
    bool bad_utf8; /* the line was not UTF-8: its request is refused */
    size_t bad_at; /* byte offset */
    tr_buf id;     /* custom_id, decoded */
    bool has_id;
    size_t fault_at; /* !has_id: byte offset in the line, and why */
    char fault[200];
    uint64_t line;
    tr_key key; /* of custom_id, or of the line number */
} tr_envelope;

/* TR_E_MEMORY only: a line that is no request is !has_id. */
tr_status tr_envelope_read(tr_envelope *e, const tr_line *line, tr_err *err);
void tr_envelope_free(tr_envelope *e);

/* Replace \u escapes of lone surrogates by \ufffd in n bytes of JSON text; the length stays
 * (chat.md 1.8). */
void tr_surrogates_replace(char *text, size_t n);

#endif
