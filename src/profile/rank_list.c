#include <config.h>

#include "profile/rank_list.h"

#include <stdio.h>

void tr_rank_list(char *text, size_t size, const int *file_of, int n)
{
    const size_t longest = sizeof ", 2147483647-2147483647, ...";
    size_t at = 0;

    if (size > 0) *text = '\0';
    for (int i = 0; i < n; i++) {
        int last = i;
        if (file_of[i] >= 0) continue;
        while (last + 1 < n && file_of[last + 1] < 0)
            last++;
        if (at + longest > size) {
            snprintf(text + at, size - at, "%s...", at ? ", " : "");
            return;
        }
        at += (size_t)snprintf(text + at, size - at, last > i ? "%s%d-%d" : "%s%d", at ? ", " : "",
                               i, last);
        i = last;
    }
}
