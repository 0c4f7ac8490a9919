/* Ranks as people write them: "2, 5-9". Used where a joined file and its readers say which ranks are missing. */
#ifndef TR_PROFILE_RANK_LIST_H
#define TR_PROFILE_RANK_LIST_H

#include <stddef.h>

enum { TR_RANK_LIST = 160 }; /* room that is enough to be told; what does not fit ends in ", ..." */

/* The ranks i of [0, n) whose file_of[i] is negative, as a list into text; "": none. */
void tr_rank_list(char *text, size_t size, const int *file_of, int n);

#endif
