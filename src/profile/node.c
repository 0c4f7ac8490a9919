#include <config.h>

#include "profile/node.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "profile/pack.h"

tr_status tr_profile_scratch_make(char *path, size_t n, tr_err *err)
{
    const char *place = getenv("TMPDIR");

    if (!place || *place != '/') place = "/tmp";
    const int length = snprintf(path, n, "%s/trireme-profile-XXXXXX", place);
    if (length < 0 || (size_t)length >= n)
        return tr_fail(err, TR_E_IO, "TMPDIR %.100s...: too long a name", place);
    if (!mkdtemp(path)) return tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno));
    return TR_OK;
}

/* rank00007.h5, with .part, .new or .part.tmp behind it */
static bool is_ours(const char *name)
{
    if (strncmp(name, "rank", 4) != 0) return false;
    name += 4 + strspn(name + 4, "0123456789");
    return !strcmp(name, ".h5") || !strcmp(name, ".h5.part") || !strcmp(name, ".h5.new") ||
           !strcmp(name, ".h5.part.tmp");
}

void tr_profile_scratch_remove(const char *path)
{
    DIR *folder = opendir(path);
    struct dirent *e;

    while (folder && (e = readdir(folder)) != NULL)
        if (is_ours(e->d_name)) unlinkat(dirfd(folder), e->d_name, 0);
    if (folder) closedir(folder);
    rmdir(path);
}

tr_status tr_profile_node_write(const char *scratch, const char *path, tr_err *err)
{
    tr_reader *r = NULL;
    tr_status st = tr_reader_open(&r, scratch, err);

    if (st == TR_OK) st = tr_profile_pack_present(r, path, err);
    tr_reader_close(r);
    return st;
}
