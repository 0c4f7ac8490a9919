/* A list of complaints that becomes one error: a config or a checkpoint is checked to the end before it is refused, so
 * that the user mends it once. Plain data on the stack; one thread. */
#ifndef TR_MODEL_PROBLEMS_H
#define TR_MODEL_PROBLEMS_H

#include <stddef.h>

#include "base/err.h"

typedef struct tr_problems { /* all zero: none yet */
    int n, n_shown;
    size_t used;
    char text[720]; /* fits into tr_err with a path in front */
} tr_problems;

/* Add one complaint; it is only counted when the text is full. */
void tr_problem(tr_problems *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* TR_OK when there are none, else the error "what: first; second (and 3 more)". */
tr_status tr_problems_end(const tr_problems *p, tr_status status, const char *what, tr_err *err);

#endif
