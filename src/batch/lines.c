#include <config.h>

#include "batch/lines.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/size.h"
#include "base/stop.h"

enum { PIECE = 1 << 18 };

struct tr_lines {
    int fd;
    const char *name;
    size_t max_line;
    tr_hasher *hasher;
    char *buf; /* [cap]: bytes [begin, end) are read and not yet given out */
    size_t cap, begin, end;
    uint64_t pos; /* in the file, of the byte behind buf[end - 1] */
    uint64_t number;
    bool eof, heeds_stop;
};

tr_status tr_lines_open(tr_lines **out, int fd, const char *name, size_t max_line,
                        tr_hasher *hasher, tr_err *err)
{
    *out = NULL;
    tr_lines *l = calloc(1, sizeof *l);
    if (!l || !(l->buf = malloc(PIECE))) {
        free(l);
        return tr_fail(err, TR_E_MEMORY, "%s: out of memory", name);
    }
    l->fd = fd;
    l->name = name;
    l->max_line = max_line;
    l->hasher = hasher;
    l->cap = PIECE;
    *out = l;
    return TR_OK;
}

void tr_lines_close(tr_lines *l)
{
    if (!l) return;
    free(l->buf);
    free(l);
}

void tr_lines_heed_stop(tr_lines *l)
{
    l->heeds_stop = true;
}

/* Room for another piece behind buf[end]: by moving what is left to the front, or by doubling. */
static bool make_room(tr_lines *l)
{
    if (l->begin) {
        memmove(l->buf, l->buf + l->begin, l->end - l->begin);
        l->end -= l->begin;
        l->begin = 0;
    }
    if (l->cap - l->end >= PIECE / 2) return true;
    size_t cap;
    char *buf = tr_mul(&cap, l->cap, 2) ? realloc(l->buf, cap) : NULL;
    if (!buf) return false;
    l->buf = buf;
    l->cap = cap;
    return true;
}

/* One more piece. 1: something came; 0: the end; -1: err. */
static int read_piece(tr_lines *l, tr_err *err)
{
    if (l->eof) return 0;
    if (l->heeds_stop && tr_stop_requested()) {
        tr_stop_fail(l->name, err);
        return -1;
    }
    if (!make_room(l)) {
        tr_fail(err, TR_E_MEMORY, "%s: line %ju: out of memory", l->name, (uintmax_t)l->number);
        return -1;
    }
    ssize_t got;
    do {
        got = pread(l->fd, l->buf + l->end, l->cap - l->end, (off_t)l->pos);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        tr_fail(err, TR_E_IO, "%s: %s", l->name, strerror(errno));
        return -1;
    }
    if (got == 0) {
        l->eof = true;
        return 0;
    }
    if (l->hasher) tr_hasher_add(l->hasher, l->buf + l->end, (size_t)got);
    l->end += (size_t)got;
    l->pos += (uint64_t)got;
    return 1;
}

/* A line that is too long: counted, hashed and forgotten, a piece at a time. */
static int skip_line(tr_lines *l, tr_line *line, tr_err *err)
{
    line->too_long = true;
    line->text = "";
    line->n = 0;
    for (;;) {
        size_t n = l->end - l->begin;
        char *nl = memchr(l->buf + l->begin, '\n', n);
        if (nl) n = (size_t)(nl - (l->buf + l->begin)) + 1;
        line->bytes += n;
        l->begin += n;
        line->whole = nl != NULL;
        if (nl) return 1;
        int got = read_piece(l, err);
        if (got <= 0) return got < 0 ? -1 : 1;
    }
}

int tr_lines_next(tr_lines *l, tr_line *line, tr_err *err)
{
    size_t seen = 0; /* bytes behind buf[begin] without a line feed */

    *line = (tr_line){.number = ++l->number, .offset = l->pos - (l->end - l->begin)};
    for (;;) {
        char *from = l->buf + l->begin;
        char *nl = memchr(from + seen, '\n', l->end - l->begin - seen);
        size_t n = nl ? (size_t)(nl - from) : l->end - l->begin;
        if (n > l->max_line) return skip_line(l, line, err);
        int got = nl ? 0 : read_piece(l, err);
        if (got < 0) return -1;
        if (got > 0) {
            seen = n;
            continue;
        }
        if (!nl && n == 0) return 0;
        line->text = l->buf + l->begin;
        line->n = n;
        line->whole = nl != NULL;
        line->bytes = n + line->whole;
        l->begin += n + line->whole;
        return 1;
    }
}
