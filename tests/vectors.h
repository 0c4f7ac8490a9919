/* Where test vectors and models are: TRIREME_VECTORS, or the source tree's own. */
#ifndef TR_TESTS_VECTORS_H
#define TR_TESTS_VECTORS_H

#include <stdio.h>
#include <stdlib.h>

/* Path of a vector file ("chat/encode.jsonl") into a buffer of the caller. */
static inline const char *tr_vector_path(char *path, size_t n, const char *name)
{
    const char *dir = getenv("TRIREME_VECTORS");
    if (dir && *dir)
        snprintf(path, n, "%s/%s", dir, name);
    else
        snprintf(path, n, "%s/tests/vectors/%s", TR_SOURCE_DIR, name);
    return path;
}

/* Path of a file of the source tree ("models/tiny"). */
static inline const char *tr_source_path(char *path, size_t n, const char *name)
{
    snprintf(path, n, "%s/%s", TR_SOURCE_DIR, name);
    return path;
}

#endif
