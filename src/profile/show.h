/* `trireme profile show`: a profile on one screen (100 columns), a sentence or two under every block that say what its numbers
 * mean and what to try. Plain ASCII. */
#ifndef TR_PROFILE_SHOW_H
#define TR_PROFILE_SHOW_H

#include <stdio.h>

#include "profile/summary.h"

/* n_ops: rows of the table of operations; 0: all. */
void tr_profile_show(FILE *out, const tr_reader *r, const tr_summary *s, int n_ops);

#endif
