/* Numbers as people read them, in text that lasts as long as the buffer given. */
#ifndef TR_PROFILE_FIGURES_H
#define TR_PROFILE_FIGURES_H

#include <stddef.h>

typedef struct tr_figure {
    char s[24];
} tr_figure;

tr_figure
tr_figure_time(double seconds); /* "12.3 s", "4.10 ms", "87.0 us", "1:02:03" from an hour on */
tr_figure tr_figure_bytes(double bytes); /* "1.21 GB": powers of ten */
tr_figure tr_figure_count(double count); /* "1,203", "12.3 M" from ten million on */
tr_figure tr_figure_rate(double rate);   /* "12.3 k", three digits */

#endif
