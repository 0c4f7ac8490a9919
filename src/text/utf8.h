/* UTF-8 as the Unicode standard wants it: validation, and repair with one U+FFFD per maximal subpart (chat.md 1.8). */
#ifndef TR_TEXT_UTF8_H
#define TR_TEXT_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Length of the well-formed sequence at s (1..4), or minus the length of the maximal ill-formed subpart (-1..-3);
 * 0: n bytes are a proper prefix of a well-formed sequence (incomplete at the end). n > 0. */
int tr_utf8_next(const unsigned char *s, size_t n);
bool tr_utf8_valid(const char *s, size_t n, size_t *bad_at); /* bad_at may be NULL */
/* Repaired copy into out (3 * n bytes at most), its length. */
size_t tr_utf8_repair(const char *s, size_t n, char *out);
/* Code point of the well-formed sequence at s of length len. */
uint32_t tr_utf8_decode(const unsigned char *s, int len);
/* Writes 1..4 bytes, returns how many. */
int tr_utf8_encode(uint32_t code, char *out);

#endif
