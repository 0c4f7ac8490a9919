#include <config.h>

#include "batch/input.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/stop.h"

struct tr_input {
    char *path; /* as in messages */
    int fd;
    bool copied; /* fd is a copy that nobody else can change */
    struct stat before;
    tr_input_info info;
    size_t max_line;
    tr_input_shard shard;
    tr_lines *lines; /* second pass */
    tr_hasher *hasher;
    bool at_end;
};

/* Blank: nothing but space, tab and carriage return. */
static bool blank(const tr_line *line)
{
    if (line->too_long) return false;
    for (size_t i = 0; i < line->n; i++)
        if (line->text[i] != ' ' && line->text[i] != '\t' && line->text[i] != '\r') return false;
    return true;
}

/* The next line that is not blank, its ends cleaned. */
static int next_line(tr_lines *lines, tr_line *line, tr_err *err)
{
    int got;
    while ((got = tr_lines_next(lines, line, err)) > 0) {
        if (line->number == 1 && line->n >= 3 && !memcmp(line->text, "\xef\xbb\xbf", 3)) {
            line->text += 3;
            line->n -= 3;
        }
        if (line->n && line->text[line->n - 1] == '\r') line->n--;
        if (!blank(line)) return 1;
    }
    return got;
}

static bool write_all(int fd, const char *buf, size_t n)
{
    while (n) {
        ssize_t put = write(fd, buf, n);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return false;
        buf += put;
        n -= (size_t)put;
    }
    return true;
}

/* A pipe can be read once: copy it to a file without a name, in TMPDIR. Takes the place of
 * in->fd. */
static tr_status copy_aside(tr_input *in, tr_err *err)
{
    const char *dir = getenv("TMPDIR");
    char *buf = malloc(1 << 16), *name = NULL;
    tr_status st = TR_OK;
    int fd = -1;

    if (!dir || !*dir) dir = "/tmp";
    if (!buf || asprintf(&name, "%s/trireme.XXXXXX", dir) < 0) {
        name = NULL;
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", in->path);
        goto done;
    }
    fd = mkostemp(name, O_CLOEXEC);
    if (fd < 0) {
        st = tr_fail(err, TR_E_IO, "%s: a copy in %s: %s", in->path, dir, strerror(errno));
        goto done;
    }
    unlink(name);
    for (;;) {
        ssize_t got = tr_stop_read(in->fd, buf, 1 << 16);
        if (got == 0) break;
        if (got < 0 && errno == ECANCELED) {
            st = tr_stop_fail(in->path, err);
            goto done;
        }
        if (got < 0 || !write_all(fd, buf, (size_t)got)) {
            st = tr_fail(err, TR_E_IO, "%s: copying to %s: %s", in->path, dir, strerror(errno));
            goto done;
        }
    }
    close(in->fd);
    in->fd = fd;
    in->copied = true;
    fd = -1;
done:
    if (fd >= 0) close(fd);
    free(name);
    free(buf);
    return st;
}

static tr_status open_file(tr_input *in, const char *path, tr_err *err)
{
    struct stat named;
    /* A FIFO that nobody has opened for writing yet is waited for where a stop can end it. */
    const int wait = stat(path, &named) == 0 && S_ISFIFO(named.st_mode) ? O_NONBLOCK : 0;

    if (!strcmp(path, "-"))
        in->fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
    else
        in->fd = open(path, O_RDONLY | O_CLOEXEC | wait);
    if (in->fd < 0 || fstat(in->fd, &in->before) != 0)
        return tr_fail(err, errno == ENOENT || errno == ENOTDIR ? TR_E_INPUT : TR_E_IO, "%s: %s",
                       in->path, strerror(errno));
    if (S_ISDIR(in->before.st_mode))
        return tr_fail(err, TR_E_INPUT, "%s: is a directory", in->path);
    if (S_ISREG(in->before.st_mode)) return TR_OK;
    tr_status st = copy_aside(in, err);
    if (st == TR_OK && fstat(in->fd, &in->before) != 0)
        st = tr_fail(err, TR_E_IO, "%s: %s", in->path, strerror(errno));
    return st;
}

static tr_status first_pass(tr_input *in, tr_err *err)
{
    tr_status st = TR_OK;
    tr_lines *lines = NULL;
    tr_envelope e = {0};
    tr_idset *ids = tr_idset_create();
    tr_hasher *hasher = tr_hasher_create();
    tr_line line;
    int got;

    if (!ids || !hasher) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", in->path);
        goto done;
    }
    st = tr_lines_open(&lines, in->fd, in->path, in->max_line, hasher, err);
    if (st != TR_OK) goto done;
    tr_lines_heed_stop(lines);
    while ((got = next_line(lines, &line, err)) > 0) {
        uint64_t before;
        st = tr_envelope_read(&e, &line, err);
        if (st != TR_OK) goto done;
        in->info.n_requests++;
        if (!e.has_id) continue;
        int added = tr_idset_add(ids, e.key, line.number, &before);
        if (added < 0) {
            st = tr_fail(err, TR_E_MEMORY, "%s: line %ju: out of memory", in->path,
                         (uintmax_t)line.number);
            goto done;
        }
        if (added == 0) {
            st = tr_fail(err, TR_E_INPUT, "%s: lines %ju and %ju have the same custom_id \"%.*s\"",
                         in->path, (uintmax_t)before, (uintmax_t)line.number,
                         e.id.n > 200 ? 200 : (int)e.id.n, e.id.s);
            goto done;
        }
    }
    if (got < 0) {
        st = err->status;
        goto done;
    }
    in->info.bytes = line.offset;
    in->info.n_mine = in->info.n_requests;
    tr_hasher_hex(hasher, in->info.hash);
    if (in->info.bytes != (uint64_t)in->before.st_size)
        st = tr_fail(err, TR_E_INPUT, "%s: its size changed while it was read", in->path);
done:
    tr_lines_close(lines);
    tr_hasher_free(hasher);
    tr_idset_free(ids);
    tr_envelope_free(&e);
    return st;
}

tr_status tr_input_open(tr_input **out, const char *path, size_t max_line, tr_err *err)
{
    tr_err none;
    if (!err) err = &none; /* first_pass reads the status back */
    *out = NULL;
    tr_input *in = calloc(1, sizeof *in);
    if (!in) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", path);
    in->fd = -1;
    in->shard.n = 1;
    in->max_line = max_line ? max_line : TR_LINE_MAX;
    in->path = strdup(strcmp(path, "-") ? path : "standard input");
    in->hasher = tr_hasher_create();
    tr_status st = TR_OK;
    if (!in->path || !in->hasher) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", path);
        goto done;
    }
    st = open_file(in, path, err);
    if (st == TR_OK) st = first_pass(in, err);
    if (st == TR_OK)
        st = tr_lines_open(&in->lines, in->fd, in->path, in->max_line, in->hasher, err);
    if (st != TR_OK) goto done;
    *out = in;
    in = NULL;
done:
    tr_input_close(in);
    return st;
}

void tr_input_close(tr_input *in)
{
    if (!in) return;
    tr_lines_close(in->lines);
    tr_hasher_free(in->hasher);
    if (in->fd >= 0) close(in->fd);
    free(in->path);
    free(in);
}

const tr_input_info *tr_input_about(const tr_input *in)
{
    return &in->info;
}

static bool is_mine(const tr_input *in, const tr_line *line)
{
    return (line->number - 1) % in->shard.n == in->shard.i;
}

/* Counted by a pass of its own, over the lines alone. */
tr_status tr_input_take_shard(tr_input *in, tr_input_shard shard, tr_err *err)
{
    tr_lines *lines = NULL;
    tr_line line;
    int got;

    in->shard = shard;
    if (shard.n == 1) return TR_OK;
    tr_status st = tr_lines_open(&lines, in->fd, in->path, in->max_line, NULL, err);
    if (st != TR_OK) return st;
    tr_lines_heed_stop(lines);
    in->info.n_mine = 0;
    while ((got = next_line(lines, &line, err)) > 0)
        in->info.n_mine += is_mine(in, &line);
    tr_lines_close(lines);
    return got < 0 ? err->status : TR_OK;
}

tr_status tr_input_rewind(tr_input *in, tr_err *err)
{
    tr_hasher *hasher = tr_hasher_create();

    if (!hasher) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", in->path);
    tr_lines_close(in->lines);
    tr_hasher_free(in->hasher);
    in->lines = NULL;
    in->hasher = hasher;
    in->at_end = false;
    return tr_lines_open(&in->lines, in->fd, in->path, in->max_line, in->hasher, err);
}

int tr_input_next(tr_input *in, tr_line *line, tr_err *err)
{
    int got;

    do
        got = next_line(in->lines, line, err);
    while (got > 0 && !is_mine(in, line));
    if (got == 0) in->at_end = true;
    return got;
}

/* The file that has the name now, read once more: touched, or put there again, with the same bytes. */
static bool has_same_bytes(const tr_input *in)
{
    tr_hasher *hasher = tr_hasher_create();
    const int fd = open(in->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO by now, perhaps */
    struct stat about;
    tr_lines *lines = NULL;
    tr_line line;
    tr_err ignored;
    char hash[33] = "";
    int got = -1;

    if (hasher && fd >= 0 && fstat(fd, &about) == 0 && S_ISREG(about.st_mode) &&
        tr_lines_open(&lines, fd, in->path, in->max_line, hasher, &ignored) == TR_OK)
        while ((got = tr_lines_next(lines, &line, &ignored)) > 0)
            ;
    if (got == 0) tr_hasher_hex(hasher, hash);
    tr_lines_close(lines);
    if (fd >= 0) close(fd);
    tr_hasher_free(hasher);
    return !strcmp(hash, in->info.hash);
}

tr_status tr_input_check(const tr_input *in, tr_err *err)
{
    struct stat now, named;
    char hash[33];

    if (fstat(in->fd, &now) != 0) return tr_fail(err, TR_E_IO, "%s: %s", in->path, strerror(errno));
    bool same = in->copied || (now.st_size == in->before.st_size &&
                               now.st_mtim.tv_sec == in->before.st_mtim.tv_sec &&
                               now.st_mtim.tv_nsec == in->before.st_mtim.tv_nsec);
    /* Another file under the name: what was read stays right, but the next run would be given
     * other requests. A file that was deleted harms nobody: the descriptor still holds it. */
    if (same && !in->copied && stat(in->path, &named) == 0)
        same = named.st_dev == now.st_dev && named.st_ino == now.st_ino;
    if (in->at_end) {
        tr_hasher_hex(in->hasher, hash);
        same = (same || has_same_bytes(in)) && !strcmp(hash, in->info.hash);
    }
    if (!same)
        return tr_fail(err, TR_E_INPUT, "%s: the file changed while the job was running", in->path);
    return TR_OK;
}
