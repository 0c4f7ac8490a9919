#include <config.h>

#include "batch/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/stop.h"
#include "batch/lines.h"
#include "batch/record.h"

/* A record may be long (an echoed prompt with log-probabilities), but a gigabyte without a line
 * feed is damage. */
enum { RECORD_MAX = 1 << 30, GROUP_BYTES_MAX = 64 << 20, MS = 1000000 };

struct tr_journal {
    tr_journal_options o;
    tr_runfile *run;
    char *path;
    char *real_path, *tmp_path; /* the file itself where OUT is a symbolic link; what replaces it */
    int fd;
    bool stream;
    tr_idset *done;
    size_t n_found;
    uint64_t end, synced; /* bytes of whole records; of those that are on disk for sure */
    tr_buf group;         /* the records between synced and end: a failed sync may have lost them */
    int n_group;
    uint64_t group_ns, checked_ns;
    bool failed; /* gave up once: nothing is tried again */
    atomic_bool stalled;
};

/* ---- resume ---------------------------------------------------------------------------------- */

typedef struct scan {
    uint64_t good_end; /* behind the last good record */
    size_t n_good, n_bad;
    bool hole; /* something bad stands before something good */
} scan;

/* Every line: a whole record of this input that was not there before is good. keep >= 0: good
 * lines are copied to it. */
static tr_status scan_lines(tr_journal *j, int keep, scan *found, tr_err *err)
{
    tr_status st = TR_OK;
    tr_lines *lines = NULL;
    tr_record_name name;
    tr_buf id = {0};
    tr_line line;
    int got;

    *found = (scan){0};
    tr_idset_free(j->done);
    j->done = tr_idset_create();
    if (!j->done) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", j->path);
    st = tr_lines_open(&lines, j->fd, j->path, RECORD_MAX, NULL, err);
    if (st != TR_OK) return st;
    tr_lines_heed_stop(lines);
    while ((got = tr_lines_next(lines, &line, err)) > 0) {
        int is = line.whole && !line.too_long
                     ? tr_record_read(line.text, line.n, j->o.input_hash, &id, &name)
                     : 0;
        if (is > 0)
            is = tr_idset_add(j->done,
                              name.custom_id ? tr_key_id(name.custom_id, name.n)
                                             : tr_key_line(name.line),
                              line.number, NULL);
        if (is < 0) {
            st = tr_fail(err, TR_E_MEMORY, "%s: line %ju: out of memory", j->path,
                         (uintmax_t)line.number);
            goto done;
        }
        if (!is) {
            found->n_bad++;
            continue;
        }
        found->hole = found->hole || found->n_bad > 0;
        found->n_good++;
        found->good_end = line.offset + line.bytes;
        /* text[n] is the line feed: the line was whole */
        for (size_t done = 0; keep >= 0 && done < line.n + 1;) {
            ssize_t put = write(keep, line.text + done, line.n + 1 - done);
            if (put < 0 && errno == EINTR) continue;
            if (put < 0) {
                st = tr_fail(err, TR_E_IO, "%s: %s", j->tmp_path, strerror(errno));
                goto done;
            }
            done += (size_t)put;
        }
    }
    if (got < 0) st = err ? err->status : TR_E_IO;
done:
    tr_lines_close(lines);
    free(id.s);
    return st;
}

/* Something bad stands in the middle: the good lines move to a new file, which takes the name (of
 * the file itself: a symbolic link stays one). */
static tr_status rewrite(tr_journal *j, scan *found, tr_err *err)
{
    tr_status st;
    int fd = open(j->tmp_path, O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0666);

    if (fd < 0) return tr_fail(err, TR_E_IO, "%s: %s", j->tmp_path, strerror(errno));
    tr_alike(fd, j->real_path);
    size_t n_bad = found->n_bad;
    st = scan_lines(j, fd, found, err);
    if (st == TR_OK && (fsync(fd) != 0 || rename(j->tmp_path, j->real_path) != 0))
        st = tr_fail(err, TR_E_IO, "%s: %s", j->tmp_path, strerror(errno));
    if (st == TR_OK) st = tr_sync_folder(j->real_path, err);
    if (st != TR_OK) {
        close(fd);
        unlink(j->tmp_path);
        return st;
    }
    close(j->fd);
    j->fd = fd;
    found->n_bad = n_bad;
    return TR_OK;
}

static tr_status resume(tr_journal *j, tr_err *err)
{
    struct stat sb;
    scan found;
    tr_status st = scan_lines(j, -1, &found, err);

    if (st == TR_OK && found.hole) st = rewrite(j, &found, err);
    if (st != TR_OK) return st;
    if (!found.hole && found.n_bad && ftruncate(j->fd, (off_t)found.good_end) != 0)
        return tr_fail(err, TR_E_IO, "%s: cutting its torn end: %s", j->path, strerror(errno));
    /* A killed run may have left records that are readable and not yet on disk. */
    if (fsync(j->fd) != 0 && errno != EINVAL)
        return tr_fail(err, TR_E_IO, "%s: fsync: %s", j->path, strerror(errno));
    if (fstat(j->fd, &sb) != 0) return tr_fail(err, TR_E_IO, "%s: %s", j->path, strerror(errno));
    j->end = j->synced = (uint64_t)sb.st_size;
    j->n_found = found.n_good;
    if (found.n_bad)
        tr_log_warn(j->o.run.log, "%s: %zu lines were no whole records of this run and are dropped",
                    j->path, found.n_bad);
    if (found.n_good)
        tr_log_info(j->o.run.log, "%s: %zu requests have their record already", j->path,
                    found.n_good);
    return TR_OK;
}

static tr_status find_file(tr_journal *j, tr_err *err)
{
    j->real_path = realpath(j->path, NULL);
    if (!j->real_path)
        return tr_fail(err, errno == ENOMEM ? TR_E_MEMORY : TR_E_IO, "%s: %s", j->path,
                       strerror(errno));
    if (asprintf(&j->tmp_path, "%s.tmp", j->real_path) >= 0) return TR_OK;
    j->tmp_path = NULL;
    return tr_fail(err, TR_E_MEMORY, "%s: out of memory", j->path);
}

tr_status tr_journal_open(tr_journal **out, const tr_journal_options *options, tr_err *err)
{
    tr_status st = TR_OK;
    tr_journal *j = calloc(1, sizeof *j);

    *out = NULL;
    if (!j) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", options->run.out_path);
    j->o = *options;
    if (!j->o.retry_ms) j->o.retry_ms = 60000;
    if (!j->o.sync_lines) j->o.sync_lines = 64;
    if (!j->o.sync_ms) j->o.sync_ms = 1000;
    if (!j->o.check_ms) j->o.check_ms = 10000;
    j->fd = -1;
    j->path = strdup(options->run.out_path);
    if (!j->path) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", options->run.out_path);
        goto done;
    }
    st = tr_runfile_open(&j->run, &options->run, err);
    if (st != TR_OK) goto done;
    j->fd = open(j->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (j->fd < 0) {
        st = tr_fail(err, TR_E_IO, "%s: %s", j->path, strerror(errno));
        goto done;
    }
    st = find_file(j, err);
    if (st == TR_OK) st = tr_sync_folder(j->real_path, err);
    if (st == TR_OK) st = resume(j, err);
    if (st != TR_OK) goto done;
    j->checked_ns = tr_now_ns();
    *out = j;
    j = NULL;
done:
    if (j) {
        j->n_group = 0;
        j->stream = true; /* nothing was written: nothing to sync or check */
        tr_journal_close(j, NULL);
    }
    return st;
}

tr_status tr_journal_stream(tr_journal **out, int fd, const char *name, tr_err *err)
{
    *out = NULL;
    tr_journal *j = calloc(1, sizeof *j);
    if (!j || !(j->path = strdup(name))) {
        free(j);
        return tr_fail(err, TR_E_MEMORY, "%s: out of memory", name);
    }
    j->stream = true;
    j->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (j->fd < 0) {
        tr_status st = tr_fail(err, TR_E_IO, "%s: %s", name, strerror(errno));
        tr_journal_close(j, NULL);
        return st;
    }
    *out = j;
    return TR_OK;
}

bool tr_journal_has(const tr_journal *j, tr_key key)
{
    return j->done && tr_idset_find(j->done, key, NULL);
}

size_t tr_journal_found(const tr_journal *j)
{
    return j->n_found;
}

bool tr_journal_stalled(const tr_journal *j)
{
    return atomic_load(&j->stalled);
}

/* ---- writing --------------------------------------------------------------------------------- */

/* What may pass: no room, no quota (EFBIG: a limit of the process), a disk that did not answer. */
static bool may_pass(int why)
{
    return why == ENOSPC || why == EDQUOT || why == EIO || why == EFBIG;
}

/* Wait a little and say whether to try again. *since: when the trouble began, 0 before the first
 * time. */
static bool try_again(tr_journal *j, int why, const char *what, uint64_t *since)
{
    uint64_t now = tr_now_ns();

    if (j->failed || !may_pass(why)) return false;
    if (!*since) {
        *since = now;
        atomic_store(&j->stalled, true);
        tr_log_warn(j->o.run.log, "%s: %s: %s; trying again for %d s, nothing new is admitted",
                    j->path, what, strerror(why), (j->o.retry_ms + 999) / 1000);
    }
    if (now - *since >= (uint64_t)j->o.retry_ms * MS || tr_stop_requested() ||
        (j->o.end_ns && now >= j->o.end_ns)) {
        j->failed = true;
        return false;
    }
    int ms = j->o.retry_ms / 20 < 500 ? j->o.retry_ms / 20 + 1 : 500;
    nanosleep(&(struct timespec){.tv_nsec = (long)ms * MS}, NULL);
    return true;
}

static void went_on(tr_journal *j, uint64_t since)
{
    if (!since) return;
    atomic_store(&j->stalled, false);
    tr_log_info(j->o.run.log, "%s: written after %.1f s; going on", j->path,
                (double)(tr_now_ns() - since) / 1e9);
}

/* One line at `at`, where the file ends. Torn writes are cut off again at once, so a killed run
 * leaves whole lines. */
static tr_status write_line(tr_journal *j, const char *line, size_t n, uint64_t at, uint64_t *since,
                            tr_err *err)
{
    size_t done = 0;
    while (done < n) {
        ssize_t put = write(j->fd, line + done, n - done);
        int why = put < 0 ? errno : ENOSPC;
        if (put > 0) {
            done += (size_t)put;
            continue;
        }
        if (why == EINTR) continue;
        if (j->stream && why == EAGAIN) {
            poll(&(struct pollfd){.fd = j->fd, .events = POLLOUT}, 1, 1000);
            continue;
        }
        /* Back to whole lines; if even that fails, go on where it broke off. */
        if (!j->stream && done && ftruncate(j->fd, (off_t)at) == 0) done = 0;
        if (j->stream || !try_again(j, why, "cannot write", since))
            return tr_fail(err, TR_E_IO, "%s: cannot write a record: %s", j->path, strerror(why));
    }
    return TR_OK;
}

/* After a failed sync nobody knows what is on disk: back to what is, and write the group again. */
static tr_status write_group_again(tr_journal *j, uint64_t *since, tr_err *err)
{
    if (ftruncate(j->fd, (off_t)j->synced) != 0)
        return tr_fail(err, TR_E_IO, "%s: cannot cut it back: %s", j->path, strerror(errno));
    uint64_t at = j->synced;
    for (size_t i = 0; i < j->group.n;) {
        const char *nl = memchr(j->group.s + i, '\n', j->group.n - i);
        size_t n = nl ? (size_t)(nl - (j->group.s + i)) + 1 : j->group.n - i;
        tr_status st = write_line(j, j->group.s + i, n, at, since, err);
        if (st != TR_OK) return st;
        i += n;
        at += n;
    }
    return TR_OK;
}

static tr_status sync_group(tr_journal *j, tr_err *err)
{
    uint64_t since = 0;

    if (j->stream || !j->n_group) return TR_OK;
    while (fdatasync(j->fd) != 0) {
        int why = errno;
        if (why == EINTR) continue;
        if (why == EINVAL || why == ENOTSUP || why == ENOSYS) break; /* this file system cannot */
        if (!try_again(j, why, "cannot sync", &since))
            return tr_fail(err, TR_E_IO, "%s: cannot sync: %s", j->path, strerror(why));
        tr_status st = write_group_again(j, &since, err);
        if (st != TR_OK) return st;
    }
    went_on(j, since);
    j->synced = j->end;
    j->group.n = 0;
    j->n_group = 0;
    return TR_OK;
}

tr_status tr_journal_append(tr_journal *j, const char *line, size_t n, tr_err *err)
{
    uint64_t since = 0;
    tr_status st = write_line(j, line, n, j->end, &since, err);

    if (st != TR_OK) return st;
    went_on(j, since);
    j->end += n;
    if (j->stream) return TR_OK;
    if (!j->n_group++) j->group_ns = tr_now_ns();
    tr_buf_add(&j->group, line, n);
    if (j->group.failed) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", j->path);
    return j->n_group >= j->o.sync_lines || j->group.n >= GROUP_BYTES_MAX ? sync_group(j, err)
                                                                          : TR_OK;
}

/* OUT must be the file we write: results that go to a deleted file would be lost when we end
 * (reliability.md 4, row 7). */
static tr_status check_file(tr_journal *j, tr_err *err)
{
    struct stat mine, named;

    if (fstat(j->fd, &mine) != 0) return tr_fail(err, TR_E_IO, "%s: %s", j->path, strerror(errno));
    if (mine.st_nlink == 0)
        return tr_fail(err, TR_E_IO, "%s was deleted while the job was writing it", j->path);
    if (stat(j->path, &named) != 0)
        return tr_fail(err, TR_E_IO, "%s was moved away while the job was writing it: %s", j->path,
                       strerror(errno));
    if (mine.st_dev != named.st_dev || mine.st_ino != named.st_ino)
        return tr_fail(err, TR_E_IO, "%s was replaced while the job was writing it", j->path);
    if ((uint64_t)mine.st_size != j->end)
        return tr_fail(err, TR_E_IO,
                       "%s has %jd bytes instead of %ju: somebody else wrote or cut it", j->path,
                       (intmax_t)mine.st_size, (uintmax_t)j->end);
    return TR_OK;
}

tr_status tr_journal_tick(tr_journal *j, tr_err *err)
{
    uint64_t now = tr_now_ns();
    tr_status st = TR_OK;

    if (j->stream) return TR_OK;
    if (j->n_group && now - j->group_ns >= (uint64_t)j->o.sync_ms * MS) st = sync_group(j, err);
    if (st == TR_OK && now - j->checked_ns >= (uint64_t)j->o.check_ms * MS) {
        j->checked_ns = now;
        st = check_file(j, err);
    }
    return st;
}

tr_status tr_journal_close(tr_journal *j, tr_err *err)
{
    tr_status st = TR_OK;

    if (!j) return TR_OK;
    if (!j->stream) {
        st = sync_group(j, err);
        if (st == TR_OK) st = check_file(j, err);
    }
    if (j->fd >= 0) close(j->fd);
    tr_runfile_close(j->run);
    tr_idset_free(j->done);
    free(j->group.s);
    free(j->path);
    free(j->real_path);
    free(j->tmp_path);
    free(j);
    return st;
}
