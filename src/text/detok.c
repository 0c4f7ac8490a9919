#include <config.h>

#include "text/detok.h"

#include <string.h>

#include "text/utf8.h"

size_t tr_detok_feed(tr_detok *d, const char *bytes, size_t n, char *out)
{
    const unsigned char *u = (const unsigned char *)bytes;
    size_t i = 0, o = 0;

    /* What is held is a proper prefix of a well-formed sequence. One more byte completes it, leaves
     * it a prefix, or shows that it was ill-formed; then the held bytes are the maximal subpart and
     * the byte starts afresh. */
    while (d->n_held > 0 && i < n) {
        d->held[d->n_held] = u[i];
        int r = tr_utf8_next(d->held, (size_t)d->n_held + 1);
        if (r < 0) {
            o += (size_t)tr_utf8_encode(0xfffd, out + o);
            d->n_held = 0;
            break;
        }
        i++;
        d->n_held++;
        if (r > 0) {
            memcpy(out + o, d->held, (size_t)r);
            o += (size_t)r;
            d->n_held = 0;
        }
    }
    while (i < n) {
        int r = tr_utf8_next(u + i, n - i);
        if (r > 0) {
            memcpy(out + o, bytes + i, (size_t)r);
            o += (size_t)r;
            i += (size_t)r;
        } else if (r < 0) {
            o += (size_t)tr_utf8_encode(0xfffd, out + o);
            i += (size_t)-r;
        } else {
            memcpy(d->held, bytes + i, n - i);
            d->n_held = (int)(n - i);
            break;
        }
    }
    return o;
}

size_t tr_detok_flush(tr_detok *d, char *out)
{
    if (d->n_held == 0) return 0;
    d->n_held = 0; /* a prefix of a well-formed sequence is one maximal subpart */
    return (size_t)tr_utf8_encode(0xfffd, out);
}
