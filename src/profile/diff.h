/* `trireme profile diff A B`: two profiles by region, of any two grids. */
#ifndef TR_PROFILE_DIFF_H
#define TR_PROFILE_DIFF_H

#include <stdio.h>

#include "profile/read.h"

typedef struct tr_diff_options {
    bool by_path; /* one row for each place in the tree; else for each name */
    enum { TR_DIFF_RUN, TR_DIFF_STEP, TR_DIFF_TOKEN } per;
    bool csv;   /* all rows, nanoseconds */
    int n_rows; /* of the table; 0: all */
} tr_diff_options;

/* Times are exclusive, of a rank: the mean of those present. Rows in the order of what changed most. */
tr_status tr_profile_diff(FILE *out, tr_reader *a, tr_reader *b, const tr_diff_options *o,
                          tr_err *err);

#endif
