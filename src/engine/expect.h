/* How long a step should take, by those before it: what the watchdog's timeout goes by where none was given (reliability.md 4,
 * row 15). Steps of about as many rows take alike long; few rows cost more each than many, so sizes are kept apart. Plain data,
 * begun as zeros; no clock here. On every rank's main thread. */
#ifndef TR_ENGINE_EXPECT_H
#define TR_ENGINE_EXPECT_H

#include <stdint.h>

enum { TR_EXPECT_SIZES = 48 };

typedef struct tr_expect {
    double step_s
        [TR_EXPECT_SIZES]; /* of steps of [2^i, 2^(i+1)) rows, the mean of the last ones; 0: there was none */
} tr_expect;

/* A step of so many rows, of all replicas, has taken so long. One that was held up once counts as four times the mean at most. */
void tr_expect_seen(tr_expect *x, int64_t n_rows, double seconds);
/* Seconds; 0: not known. Of a size that has not come yet: as long as one of the next larger size, or else by the row. */
double tr_expect_step(const tr_expect *x, int64_t n_rows);

#endif
