#include <config.h>

#include "profile/snapshot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "profile/file.h"

enum { PIECE = 1 << 18 };

/* All of one descriptor to another; the name that failed, or NULL. */
static const char *copy(int in, const char *from, int out, const char *to, char *piece)
{
    ssize_t n;

    while ((n = read(in, piece, PIECE)) != 0) {
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return from;
        for (ssize_t done = 0; done < n;) {
            const ssize_t k = write(out, piece + done, (size_t)(n - done));
            if (k < 0 && errno == EINTR) continue;
            if (k < 0) return to;
            done += k;
        }
    }
    return NULL;
}

tr_status tr_profile_snapshot(const char *from, const char *to, bool clear, tr_err *err)
{
    tr_status st = TR_OK;
    int in = -1, out = -1;
    char *piece = malloc(PIECE), *tmp = NULL;
    const char *failed = NULL;

    if (asprintf(&tmp, "%s.tmp", to) < 0) tmp = NULL;
    if (!piece || !tmp) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory for a copy of %s", from);
        goto done;
    }
    in = open(from, O_RDONLY | O_CLOEXEC);
    if (in < 0) failed = from;
    if (!failed) out = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (!failed && out < 0) failed = tmp;
    if (!failed) failed = copy(in, from, out, tmp, piece);
    if (!failed && close(out) != 0) failed = tmp;
    if (!failed) out = -1;
    if (!failed && clear && (st = tr_prof_file_clear(tmp, err)) != TR_OK) {
        remove(tmp);
        goto done;
    }
    if (!failed && rename(tmp, to) != 0) failed = to;
    if (failed) {
        st = tr_fail(err, TR_E_IO, "%s: %s", failed, strerror(errno));
        remove(tmp);
    }

done:
    if (in >= 0) close(in);
    if (out >= 0) close(out);
    free(piece);
    free(tmp);
    return st;
}
