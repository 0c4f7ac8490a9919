#include <config.h>

#include "text/utf8.h"

#include <string.h>

/* Lengths and ranges of table 3-7 of the Unicode standard: the lead byte decides how many bytes
 * follow and narrows the range of the second one (no overlong forms, no surrogates, nothing past
 * U+10FFFF). */
int tr_utf8_next(const unsigned char *s, size_t n)
{
    unsigned char lead = s[0], low = 0x80, high = 0xbf;
    int len;

    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return -1;
    if (lead < 0xe0) {
        len = 2;
    } else if (lead < 0xf0) {
        len = 3;
        if (lead == 0xe0) low = 0xa0;
        if (lead == 0xed) high = 0x9f;
    } else {
        len = 4;
        if (lead == 0xf0) low = 0x90;
        if (lead == 0xf4) high = 0x8f;
    }
    for (int i = 1; i < len; i++) {
        if ((size_t)i >= n) return 0;
        if (s[i] < low || s[i] > high) return -i;
        low = 0x80;
        high = 0xbf;
    }
    return len;
}

/* How many ASCII bytes s begins with, at least; whole words only. */
static size_t ascii_words(const unsigned char *s, size_t n)
{
    size_t i = 0;
    uint64_t word;

    for (; n - i >= sizeof word; i += sizeof word) {
        memcpy(&word, s + i, sizeof word);
        if (word & UINT64_C(0x8080808080808080)) break;
    }
    return i;
}

bool tr_utf8_valid(const char *s, size_t n, size_t *bad_at)
{
    const unsigned char *u = (const unsigned char *)s;
    size_t i = 0;

    while (i < n) {
        i += ascii_words(u + i, n - i);
        if (i == n) break;
        int r = tr_utf8_next(u + i, n - i);
        if (r <= 0) {
            if (bad_at) *bad_at = i;
            return false;
        }
        i += (size_t)r;
    }
    return true;
}

size_t tr_utf8_repair(const char *s, size_t n, char *out)
{
    const unsigned char *u = (const unsigned char *)s;
    size_t i = 0, o = 0;

    while (i < n) {
        size_t plain = ascii_words(u + i, n - i);
        memcpy(out + o, s + i, plain);
        i += plain;
        o += plain;
        if (i == n) break;

        int r = tr_utf8_next(u + i, n - i);
        if (r > 0) {
            memcpy(out + o, s + i, (size_t)r);
            o += (size_t)r;
            i += (size_t)r;
        } else { /* cut off at the end: the rest is one maximal subpart */
            o += (size_t)tr_utf8_encode(0xfffd, out + o);
            i += r ? (size_t)-r : n - i;
        }
    }
    return o;
}

uint32_t tr_utf8_decode(const unsigned char *s, int len)
{
    static const unsigned char lead_bits[5] = {0, 0x7f, 0x1f, 0x0f, 0x07};
    uint32_t code = s[0] & lead_bits[len];

    for (int i = 1; i < len; i++)
        code = code << 6 | (s[i] & 0x3fu);
    return code;
}

int tr_utf8_encode(uint32_t code, char *out)
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xc0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3f));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xe0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3f));
        out[2] = (char)(0x80 | (code & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3f));
    out[2] = (char)(0x80 | (code >> 6 & 0x3f));
    out[3] = (char)(0x80 | (code & 0x3f));
    return 4;
}
