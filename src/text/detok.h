/* Streaming detokenizer (chat.md 1.6): bytes of tokens in, well-formed UTF-8 out. A trailing incomplete sequence of at most
 * three bytes is held back; ill-formed bytes become U+FFFD per maximal subpart. The concatenation of all pieces equals
 * the one-shot decoding, for every way of cutting. A plain value: no memory of its own. */
#ifndef TR_TEXT_DETOK_H
#define TR_TEXT_DETOK_H

#include <stddef.h>

typedef struct tr_detok {
    unsigned char held[4];
    int n_held;
} tr_detok;

/* Output of n input bytes at most: 3 * (n + 3) bytes (every byte may become U+FFFD). */
static inline size_t tr_detok_max(size_t n)
{
    return 3 * (n + 3);
}
/* Feed n bytes; writes the text that is decided to out, returns its length. */
size_t tr_detok_feed(tr_detok *d, const char *bytes, size_t n, char *out);
/* The end: what is held becomes U+FFFD per maximal subpart. */
size_t tr_detok_flush(tr_detok *d, char *out);

#endif
