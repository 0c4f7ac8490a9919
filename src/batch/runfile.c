#include <config.h>

#include "batch/runfile.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "base/json.h"
#include "text/jtext.h"

enum { RUN_MAX = 1 << 20 };

struct tr_runfile {
    char *path;       /* OUT.run */
    char *lock_path;  /* OUT.lock: only where the file system has no locks */
    char *saved_path; /* OUT.saved (saved.h) */
    int fd;
    bool made_lock, foreign; /* foreign: no job has written this OUT.run */
    off_t holder_at;         /* where the second line begins */
    tr_log *log;
};

tr_status tr_sync_folder(const char *path, tr_err *err)
{
    tr_status st = TR_OK;
    char *copy = strdup(path);
    int fd = -1;

    if (!copy) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", path);
    fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    /* EINVAL: a file system that cannot sync a folder (some network ones) has nothing to offer
     * here. */
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP))
        st = tr_fail(err, TR_E_IO, "%s: its folder: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    free(copy);
    return st;
}

void tr_alike(int fd, const char *path)
{
    struct stat sb;

    if (stat(path, &sb) != 0) return;
    const int owned = fchown(fd, sb.st_uid, sb.st_gid);
    (void)owned; /* another user's: the permissions have to do */
    fchmod(fd, sb.st_mode & 0777);
}

/* ---- text ------------------------------------------------------------------------------------ */

/* Two lines, together one JSON object; the first is whole once it ends in a line feed. */
static void write_identity(tr_buf *b, const tr_runfile_options *o)
{
    tr_buf_puts(b, "{\"run\":{");
    for (int i = 0; i < o->n_fields; i++) {
        if (i) tr_buf_puts(b, ",");
        tr_json_quote(b, o->field[i].name, strlen(o->field[i].name));
        tr_buf_puts(b, ":");
        tr_json_quote(b, o->field[i].value, strlen(o->field[i].value));
    }
    tr_buf_puts(b, "},\n");
}

static void write_holder(tr_buf *b)
{
    char host[256] = "";
    const char *job = getenv("SLURM_JOB_ID");

    gethostname(host, sizeof host - 1);
    tr_buf_puts(b, "\"lock\":{\"host\":");
    tr_json_quote(b, host, strlen(host));
    tr_buf_printf(b, ",\"pid\":%jd,\"job\":", (intmax_t)getpid());
    if (!job) job = getenv("PBS_JOBID");
    if (job)
        tr_json_quote(b, job, strlen(job));
    else
        tr_buf_puts(b, "null");
    tr_buf_puts(b, "}}\n");
}

static bool put_at(int fd, const tr_buf *b, off_t at)
{
    size_t done = 0;
    while (done < b->n) {
        ssize_t put = pwrite(fd, b->s + done, b->n - done, at + (off_t)done);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return false;
        done += (size_t)put;
    }
    return ftruncate(fd, at + (off_t)b->n) == 0;
}

/* A crash leaves a beginning of it, or zeros where the disk has not come to it. Anything else is somebody's. */
static bool is_foreign(const char *text, size_t n)
{
    static const char front[] = "{\"run\":{";
    const size_t known = n < sizeof front - 1 ? n : sizeof front - 1;
    return n && text[0] && memcmp(text, front, known) != 0;
}

/* The object of the first line (a new reference), or NULL: there is none, or not a whole one. Only a
 * machine without memory or a file that cannot be read is an error. */
static json_t *read_identity(tr_runfile *run, char **text, tr_status *st, tr_err *err)
{
    json_t *all = NULL, *found = NULL;
    size_t n;

    *st = tr_file_read(run->path, RUN_MAX, text, &n, err);
    if (*st != TR_OK) return NULL;
    run->foreign = is_foreign(*text, n);
    char *nl = memchr(*text, '\n', n);
    if (!nl || nl == *text || nl[-1] != ',') return NULL;
    run->holder_at = nl + 1 - *text;
    nl[-1] = '}';
    *st = tr_json_parse(&all, *text, (size_t)(nl - *text), 0, NULL, NULL, err);
    nl[-1] = ',';
    if (*st == TR_OK) found = json_incref(json_object_get(all, "run"));
    json_decref(all);
    if (*st == TR_E_MEMORY) tr_within(err, "%s", run->path);
    if (*st == TR_E_INPUT) *st = TR_OK; /* not JSON: a torn or foreign line */
    return found;
}

/* "by pid 12 on node07 (job 55)", or nothing that would help. */
static void describe_holder(tr_runfile *run, const char *path, char *out, size_t size)
{
    char *text = NULL;
    size_t n;
    json_t *all = NULL;
    const char *host = NULL, *job = NULL;
    int64_t pid = 0;

    (void)run;
    snprintf(out, size, "by another job");
    if (tr_file_read(path, RUN_MAX, &text, &n, NULL) == TR_OK &&
        tr_json_parse(&all, text, n, 0, NULL, NULL, NULL) == TR_OK) {
        const json_t *lock = json_object_get(all, "lock");
        if (tr_json_string(lock, "host", &host, NULL, NULL) == TR_OK && host &&
            tr_json_int(lock, "pid", 1, INT64_MAX, &pid, NULL) == TR_OK && pid &&
            tr_json_string(lock, "job", &job, NULL, NULL) == TR_OK)
            snprintf(out, size, "by pid %jd on %.64s%s%.64s%s", (intmax_t)pid, host,
                     job ? " (job " : "", job ? job : "", job ? ")" : "");
    }
    json_decref(all);
    free(text);
}

/* ---- the lock -------------------------------------------------------------------------------- */

static tr_status locked(tr_runfile *run, const char *holder_path, const char *advice, tr_err *err)
{
    char who[256];
    describe_holder(run, holder_path, who, sizeof who);
    return tr_fail(err, TR_E_USAGE, "%s is locked %s%s", run->path, who, advice);
}

/* No locks on this file system: a file that exists while the run does. A killed job leaves it
 * behind. */
static tr_status lock_by_file(tr_runfile *run, tr_err *err)
{
    char advice[512];
    tr_buf b = {0};
    tr_status st = TR_OK;

    int fd = open(run->lock_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 && errno == EEXIST) {
        snprintf(advice, sizeof advice,
                 " (this file system has no locks; if that job is gone: rm '%.400s')",
                 run->lock_path);
        return locked(run, run->lock_path, advice, err);
    }
    if (fd < 0) return tr_fail(err, TR_E_IO, "%s: %s", run->lock_path, strerror(errno));
    run->made_lock = true;
    tr_buf_puts(&b, "{");
    write_holder(&b);
    if (b.failed)
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", run->lock_path);
    else if (!put_at(fd, &b, 0))
        st = tr_fail(err, TR_E_IO, "%s: %s", run->lock_path, strerror(errno));
    close(fd);
    free(b.s);
    if (st == TR_OK)
        tr_log_warn(run->log, "no file locks here: %s keeps other jobs away", run->lock_path);
    return st;
}

static tr_status take_lock(tr_runfile *run, bool no_ofd, tr_err *err)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int why = EINVAL;

    if (!no_ofd) {
        if (fcntl(run->fd, F_OFD_SETLK, &fl) == 0) return TR_OK;
        why = errno;
    }
    if (why == EAGAIN || why == EACCES) return locked(run, run->path, "", err);
    if (why == EINVAL || why == ENOLCK || why == ENOSYS || why == EOPNOTSUPP)
        return lock_by_file(run, err);
    return tr_fail(err, TR_E_IO, "%s: cannot lock it: %s", run->path, strerror(why));
}

/* ---- opening --------------------------------------------------------------------------------- */

/* OUT's size, or -1 where there is none. */
static tr_status out_size(const char *path, int64_t *size, tr_err *err)
{
    struct stat sb;
    *size = -1;
    if (stat(path, &sb) != 0)
        return errno == ENOENT ? TR_OK
                               : tr_fail(err, errno == ENOTDIR ? TR_E_USAGE : TR_E_IO, "%s: %s",
                                         path, strerror(errno));
    if (!S_ISREG(sb.st_mode))
        return tr_fail(err, TR_E_USAGE, "%s: not a file (-o - writes to standard output)", path);
    *size = sb.st_size;
    return TR_OK;
}

/* Of two jobs that make it at the same time, both have it: the lock decides. */
static tr_status open_file(tr_runfile *run, const tr_runfile_options *o, tr_err *err)
{
    int64_t size;

    run->fd = open(run->path, O_RDWR | O_CLOEXEC);
    if (run->fd >= 0) return TR_OK;
    if (errno != ENOENT) return tr_fail(err, TR_E_IO, "%s: %s", run->path, strerror(errno));
    tr_status st = out_size(o->out_path, &size, err);
    if (st != TR_OK) return st;
    if (o->must_exist)
        return tr_fail(err, TR_E_USAGE, "--resume: there is no %s: no run has begun", run->path);
    if (size >= 0)
        return tr_fail(err, TR_E_USAGE,
                       "%s exists but %s does not: not an output to be resumed; give another -o",
                       o->out_path, run->path);
    run->fd = open(run->path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (run->fd >= 0) return TR_OK;
    return tr_fail(err, errno == ENOENT || errno == ENOTDIR ? TR_E_USAGE : TR_E_IO, "%s: %s",
                   run->path, strerror(errno));
}

/* The file that was locked must still be the one under the name. */
static bool same_file(const tr_runfile *run)
{
    struct stat a, b;
    return fstat(run->fd, &a) == 0 && stat(run->path, &b) == 0 && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

static tr_status compare(const tr_runfile *run, const tr_runfile_options *o, const json_t *identity,
                         tr_err *err)
{
    for (int i = 0; i < o->n_fields; i++) {
        const char *was = json_string_value(json_object_get(identity, o->field[i].name));
        if (!was || strcmp(was, o->field[i].value))
            return tr_fail(
                err, TR_E_USAGE,
                "%s: begun with %s %.200s, now it is %.200s: give another -o, or delete %s, %s and "
                "%s",
                run->path, o->field[i].name, was ? was : "(none)", o->field[i].value, o->out_path,
                run->path, run->saved_path);
    }
    return TR_OK;
}

/* What OUT.run says of the run, NULL: there is no such file, or not a whole one. */
static tr_status identity_of(const char *out_path, json_t **identity, tr_err *err)
{
    tr_runfile run = {.fd = -1};
    char *text = NULL;
    tr_status st = TR_OK;

    *identity = NULL;
    if (asprintf(&run.path, "%s.run", out_path) < 0)
        return tr_fail(err, TR_E_MEMORY, "%s: out of memory", out_path);
    if (access(run.path, F_OK) == 0) *identity = read_identity(&run, &text, &st, err);
    free(text);
    free(run.path);
    return st;
}

static tr_status compare_parts(const char *path, json_t *one, const char *other_path,
                               const json_t *other, tr_err *err)
{
    const char *name;
    json_t *value;

    json_object_foreach(one, name, value)
    {
        const char *a = json_string_value(value);
        const char *b = json_string_value(json_object_get(other, name));
        if (strcmp(name, "shard") && (!a || !b || strcmp(a, b)))
            return tr_fail(err, TR_E_USAGE,
                           "%.200s and %.200s are of different runs, %s %.60s and %.60s (a part "
                           "without its .run file is joined all the same)",
                           path, other_path, name, a ? a : "(none)", b ? b : "(none)");
    }
    return TR_OK;
}

tr_status tr_runfile_go_together(char *const *out_path, int n, tr_err *err)
{
    json_t *first = NULL, *other;
    int i_first = 0;
    tr_status st = TR_OK;

    for (int i = 0; i < n && st == TR_OK; i++) {
        st = identity_of(out_path[i], &other, err);
        if (st == TR_OK && first && other)
            st = compare_parts(out_path[i_first], first, out_path[i], other, err);
        if (first) {
            json_decref(other);
        } else {
            first = other;
            i_first = i;
        }
    }
    json_decref(first);
    return st;
}

/* Tokens are those of the run that OUT.run names: where it is written anew they are nobody's. */
static tr_status write_anew(tr_runfile *run, const tr_runfile_options *o, tr_err *err)
{
    tr_buf b = {0};
    tr_status st = TR_OK;

    if (unlink(run->saved_path) == 0)
        tr_log_warn(run->log, "%s: there is no %s that it belongs to; removed", run->saved_path,
                    run->path);
    write_identity(&b, o);
    run->holder_at = (off_t)b.n;
    write_holder(&b);
    if (b.failed)
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", run->path);
    else if (!put_at(run->fd, &b, 0) || fsync(run->fd) != 0)
        st = tr_fail(err, TR_E_IO, "%s: %s", run->path, strerror(errno));
    else
        st = tr_sync_folder(run->path, err);
    free(b.s);
    return st;
}

/* Has the run left something that another one must not take the place of? A record, or tokens of long answers that have none. */
static bool has_left(const tr_runfile *run, int64_t out_bytes, const char *identity)
{
    struct stat sb;
    return out_bytes > 0 ||
           (identity && *identity && stat(run->saved_path, &sb) == 0 && sb.st_size > 0);
}

static tr_status read_or_write(tr_runfile *run, const tr_runfile_options *o, tr_err *err)
{
    char *text = NULL;
    int64_t size;
    tr_status st;
    json_t *identity = read_identity(run, &text, &st, err);

    if (st == TR_OK) st = out_size(o->out_path, &size, err);
    if (st != TR_OK) goto done;
    if (!has_left(run, size, text) && run->foreign) {
        st = tr_fail(err, TR_E_USAGE, "%s is no file of a job's: give another -o", run->path);
    } else if (!has_left(run, size, text)) {
        st = write_anew(run, o, err);
    } else if (!identity) {
        st = tr_fail(err, TR_E_USAGE, "%s is damaged: delete it, %s and %s to start afresh",
                     run->path, o->out_path, run->saved_path);
    } else {
        st = compare(run, o, identity, err);
        if (st != TR_OK) goto done;
        tr_buf b = {0};
        write_holder(&b);
        if (b.failed)
            st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", run->path);
        else if (!put_at(run->fd, &b, run->holder_at))
            st = tr_fail(err, TR_E_IO, "%s: %s", run->path, strerror(errno));
        free(b.s);
    }
done:
    json_decref(identity);
    free(text);
    return st;
}

tr_status tr_runfile_open(tr_runfile **out, const tr_runfile_options *o, tr_err *err)
{
    tr_status st = TR_OK;
    tr_runfile *run = calloc(1, sizeof *run);

    *out = NULL;
    if (!run) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", o->out_path);
    run->fd = -1;
    run->log = o->log;
    if (asprintf(&run->path, "%s.run", o->out_path) < 0) run->path = NULL;
    if (asprintf(&run->lock_path, "%s.lock", o->out_path) < 0) run->lock_path = NULL;
    if (asprintf(&run->saved_path, "%s.saved", o->out_path) < 0) run->saved_path = NULL;
    if (!run->path || !run->lock_path || !run->saved_path) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", o->out_path);
        goto done;
    }
    st = open_file(run, o, err);
    if (st == TR_OK) st = take_lock(run, o->no_ofd, err);
    if (st == TR_OK && !same_file(run))
        st = tr_fail(err, TR_E_USAGE, "%s was replaced while it was being locked", run->path);
    if (st == TR_OK) st = read_or_write(run, o, err);
    if (st != TR_OK) goto done;
    *out = run;
    run = NULL;
done:
    tr_runfile_close(run);
    return st;
}

void tr_runfile_close(tr_runfile *run)
{
    if (!run) return;
    if (run->made_lock) unlink(run->lock_path);
    if (run->fd >= 0) close(run->fd); /* which gives the lock back */
    free(run->path);
    free(run->lock_path);
    free(run->saved_path);
    free(run);
}
