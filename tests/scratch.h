/* A scratch folder for one test program, and small files in it. */
#ifndef TR_TESTS_SCRATCH_H
#define TR_TESTS_SCRATCH_H

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Makes it: a template in dir (at least 64 bytes); NULL when it cannot be had. */
static inline char *tr_scratch_make(char *dir, size_t n)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, n, "%s/trireme-test-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    return mkdtemp(dir);
}

/* Empties it; with_folder: removes it too. */
static inline void tr_scratch_clear(const char *dir, int with_folder)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    char path[512];
    while (d && (e = readdir(d)) != NULL) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        unlink(path);
    }
    if (d) closedir(d);
    if (with_folder) rmdir(dir);
}

/* 0: the n bytes are in dir/name. */
static inline int tr_scratch_write(const char *dir, const char *name, const void *data, size_t n)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    if (!f) return -1;
    size_t put = n ? fwrite(data, 1, n, f) : 0;
    return fclose(f) == 0 && put == n ? 0 : -1;
}

#endif
