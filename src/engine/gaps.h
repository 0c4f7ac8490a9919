/* Times between tokens of one request, as counts in a quarter of an octave each: percentiles within an eighth, in half a
 * kilobyte, whatever the number of tokens. */
#ifndef TR_ENGINE_GAPS_H
#define TR_ENGINE_GAPS_H

#include <stdint.h>

enum { TR_GAPS_FIRST = 40, TR_GAPS = 88 }; /* from 2^10 ns, below which all are alike, to 2^32 ns */

typedef struct tr_gaps {
    uint32_t n[TR_GAPS];
} tr_gaps;

static inline void tr_gaps_add(tr_gaps *g, uint64_t ns)
{
    int i = 0;

    if (ns > 1023) {
        const int octave = 63 - __builtin_clzll(ns);
        i = 4 * octave + (int)(ns >> (octave - 2) & 3) - TR_GAPS_FIRST;
    }
    g->n[i < TR_GAPS ? i : TR_GAPS - 1]++;
}

/* Where `part` of the gaps are no longer, 0 < part <= 1; 0: there are none. */
static inline uint32_t tr_gaps_percentile(const tr_gaps *g, double part)
{
    uint64_t all = 0, sum = 0;
    int i = 0;

    for (int k = 0; k < TR_GAPS; k++)
        all += g->n[k];
    if (!all) return 0;
    for (; i < TR_GAPS - 1; i++) {
        sum += g->n[i];
        if ((double)sum >= part * (double)all) break;
    }
    /* the middle of the bucket */
    const int octave = (i + TR_GAPS_FIRST) / 4, quarter = i % 4;
    const uint64_t ns = (uint64_t)(2 * (4 + quarter) + 1) << (octave - 3);
    return ns < UINT32_MAX ? (uint32_t)ns : UINT32_MAX;
}

#endif
