/* When a choice ends, and the text it has by then: end tokens, stop strings on the decoded text (chat.md 3.7), and the text
 * itself through the streaming detokenizer (chat.md 1.6). Knows no tokenizer: the caller gives each token's bytes.
 *
 * The match that is complete first ends the choice; of several complete at the same byte, the longest. This depends on the
 * text alone, not on how tokens cut it. On the leader's main thread. */
#ifndef TR_ENGINE_STOPPER_H
#define TR_ENGINE_STOPPER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/request.h"

/* The stop strings of one request, prepared once for all its choices. Keeps the strings. NULL: out of memory. */
typedef struct tr_stops tr_stops;
tr_stops *tr_stops_create(const tr_string *stop, int n_stop);
void tr_stops_free(tr_stops *s);

typedef struct tr_stopper_options {
    const tr_params *params; /* kept */
    const tr_stops *stops;   /* kept: of the same params */
    int32_t eos, bos, pad;   /* -1: none */
    bool has_text;           /* false: no tokenizer, so no text and no stop strings */
} tr_stopper_options;

typedef struct tr_stopper tr_stopper;
tr_stopper *tr_stopper_create(const tr_stopper_options *options); /* NULL: out of memory */
void tr_stopper_free(tr_stopper *s);

/* True: this token ends a choice (EOS unless ignored, a stop token). */
bool tr_stopper_ends(const tr_stopper *s, int32_t token);

/* One sampled token and the bytes it decodes to. 1: the choice has ended, 0: it goes on, -1: out of memory. The text buffer
 * grows geometrically; nothing else is allocated. */
int tr_stopper_token(tr_stopper *s, int32_t token, const char *bytes, size_t n);
/* The token limit was reached: what is held back becomes text. 1: that completed a stop string; 0, -1 as above. */
int tr_stopper_finish(tr_stopper *s);

/* Text that is decided: it will not be taken back. What may still become a stop string or part of a character is not in it. */
const char *tr_stopper_text(const tr_stopper *s, size_t *n);
/* After the end: hands the text over (malloc, NUL behind it; NULL without text). */
char *tr_stopper_take_text(tr_stopper *s, size_t *n);
int32_t tr_stopper_stop_token(const tr_stopper *s); /* the token that ended it, -1: none */
int tr_stopper_stop(const tr_stopper *s); /* index of the stop string that ended it, -1: none */

#endif
