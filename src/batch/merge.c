#include <config.h>

#include "batch/merge.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/size.h"
#include "base/stop.h"
#include "batch/input.h"
#include "batch/record.h"
#include "batch/runfile.h"

enum { RECORD_MAX = 1 << 30, PIECE = 1 << 16 };

typedef struct place { /* of a record */
    int part;
    uint64_t line, offset, bytes;
    bool used;
} place;

typedef struct merger {
    tr_input *input;
    char *const *part;
    int n_parts;
    int *fd;       /* [n_parts] */
    tr_idset *ids; /* value: index of the place */
    place *at;
    size_t n, cap;
    tr_log *log;
} merger;

static bool add_place(merger *m, int part, const tr_line *line)
{
    if (m->n == m->cap) {
        size_t cap = m->cap ? m->cap : 512, bytes;
        place *at =
            tr_mul(&cap, cap, 2) && tr_mul(&bytes, cap, sizeof *at) ? realloc(m->at, bytes) : NULL;
        if (!at) return false;
        m->at = at;
        m->cap = cap;
    }
    m->at[m->n++] =
        (place){.part = part, .line = line->number, .offset = line->offset, .bytes = line->bytes};
    return true;
}

/* The records of one part into the index. */
static tr_status index_part(merger *m, int part, tr_err *err)
{
    const char *path = m->part[part], *hash = tr_input_about(m->input)->hash;
    tr_status st = TR_OK;
    tr_lines *lines = NULL;
    tr_record_name name;
    struct stat sb;
    tr_buf id = {0};
    tr_line line;
    uint64_t before;
    size_t n_bad = 0;
    int got;

    if (stat(path, &sb) == 0 && !S_ISREG(sb.st_mode) && !S_ISDIR(sb.st_mode))
        return tr_fail(err, TR_E_INPUT, "%s: is no file: parts are read twice", path);
    m->fd[part] = open(path, O_RDONLY | O_CLOEXEC);
    if (m->fd[part] < 0)
        return tr_fail(err, errno == ENOENT ? TR_E_INPUT : TR_E_IO, "%s: %s", path,
                       strerror(errno));
    st = tr_lines_open(&lines, m->fd[part], path, RECORD_MAX, NULL, err);
    if (st != TR_OK) return st;
    tr_lines_heed_stop(lines);
    while ((got = tr_lines_next(lines, &line, err)) > 0) {
        int is =
            line.whole && !line.too_long ? tr_record_read(line.text, line.n, hash, &id, &name) : 0;
        if (is == 0) {
            n_bad++;
            continue;
        }
        if (is > 0)
            is = tr_idset_add(
                m->ids, name.custom_id ? tr_key_id(name.custom_id, name.n) : tr_key_line(name.line),
                m->n, &before);
        if (is == 0) {
            const place *p = &m->at[before];
            st =
                tr_fail(err, TR_E_INPUT, "a request has two records: %s, line %ju and %s, line %ju",
                        m->part[p->part], (uintmax_t)p->line, path, (uintmax_t)line.number);
            goto done;
        }
        if (is < 0 || !add_place(m, part, &line)) {
            st = tr_fail(err, TR_E_MEMORY, "%s: line %ju: out of memory", path,
                         (uintmax_t)line.number);
            goto done;
        }
    }
    if (got < 0) st = err->status;
    if (n_bad)
        tr_log_warn(m->log, "%s: %zu lines are no whole records of this input and are left out",
                    path, n_bad);
done:
    tr_lines_close(lines);
    free(id.s);
    return st;
}

/* ---- writing ----------------------------------------------------------------------------------- */

typedef struct output {
    const char *name;
    int fd;
    bool waits; /* standard output, whose reader may take its time */
    char *text; /* [PIECE] not written yet */
    size_t n;
} output;

static tr_status flush(output *o, tr_err *err)
{
    for (size_t done = 0; done < o->n;) {
        ssize_t put = o->waits ? tr_stop_write(o->fd, o->text + done, o->n - done)
                               : write(o->fd, o->text + done, o->n - done);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0 && errno == ECANCELED) return tr_stop_fail(o->name, err);
        if (put < 0) return tr_fail(err, TR_E_IO, "%s: %s", o->name, strerror(errno));
        done += (size_t)put;
    }
    o->n = 0;
    return tr_stop_requested() ? tr_stop_fail(o->name, err) : TR_OK;
}

/* A record from its part to the output, through the output's buffer. */
static tr_status copy_record(const merger *m, const place *p, output *o, tr_err *err)
{
    tr_status st = TR_OK;

    for (uint64_t done = 0; done < p->bytes && st == TR_OK;) {
        size_t want = p->bytes - done < PIECE - o->n ? (size_t)(p->bytes - done) : PIECE - o->n;
        ssize_t got = pread(m->fd[p->part], o->text + o->n, want, (off_t)(p->offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return tr_fail(err, TR_E_IO, "%s: %s", m->part[p->part], strerror(errno));
        if (got == 0)
            return tr_fail(err, TR_E_INPUT, "%s shrank while it was read", m->part[p->part]);
        o->n += (size_t)got;
        done += (uint64_t)got;
        if (o->n == PIECE) st = flush(o, err);
    }
    return st;
}

/* Walk the input: write each request's record (out given), or find those that have none (out
 * NULL). */
static tr_status walk(merger *m, output *out, tr_err *err)
{
    tr_status st = TR_OK;
    tr_envelope e = {0};
    tr_line line;
    uint64_t n_missing = 0, first = 0, i;
    char who[128] = "";
    int got = 0;

    while (st == TR_OK && !tr_stop_requested() && (got = tr_input_next(m->input, &line, err)) > 0) {
        st = tr_envelope_read(&e, &line, err);
        if (st != TR_OK) break;
        bool found = tr_idset_find(m->ids, e.key, &i);
        if (found && out) {
            st = copy_record(m, &m->at[i], out, err);
        } else if (!found && !n_missing++) {
            first = line.number;
            if (e.has_id)
                snprintf(who, sizeof who, ", custom_id \"%.*s\"", e.id.n > 90 ? 90 : (int)e.id.n,
                         e.id.s);
        }
    }
    if (st == TR_OK && got < 0) st = err->status;
    if (st == TR_OK && tr_stop_requested()) st = tr_stop_fail("joining", err);
    tr_envelope_free(&e);
    if (st == TR_OK && n_missing)
        st = tr_fail(err, TR_E_INPUT, "%ju of %ju requests have no record; the first is line %ju%s",
                     (uintmax_t)n_missing, (uintmax_t)tr_input_about(m->input)->n_requests,
                     (uintmax_t)first, who);
    return st;
}

/* Every record to a file that will take the name, or to standard output. */
static tr_status write_merged(merger *m, const char *out, tr_err *err)
{
    const bool to_stdout = !strcmp(out, "-");
    output o = {.fd = STDOUT_FILENO, .waits = to_stdout, .text = malloc(PIECE)};
    tr_status st = TR_OK;
    char *tmp = NULL;

    if (!o.text || (!to_stdout && asprintf(&tmp, "%s.tmp", out) < 0)) {
        tmp = NULL;
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", out);
        goto done;
    }
    o.name = to_stdout ? "standard output" : tmp;
    if (!to_stdout) o.fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (o.fd < 0) {
        st = tr_fail(err, TR_E_IO, "%s: %s", tmp, strerror(errno));
        goto done;
    }
    st = walk(m, &o, err);
    if (st == TR_OK) st = flush(&o, err);
    if (st == TR_OK) st = tr_input_check(m->input, err);
    if (st == TR_OK && !to_stdout && fsync(o.fd) != 0 && errno != EINVAL)
        st = tr_fail(err, TR_E_IO, "%s: %s", tmp, strerror(errno));
    if (!to_stdout && close(o.fd) != 0 && st == TR_OK)
        st = tr_fail(err, TR_E_IO, "%s: %s", tmp, strerror(errno));
    if (!to_stdout && st == TR_OK && rename(tmp, out) != 0)
        st = tr_fail(err, TR_E_IO, "%s: %s", out, strerror(errno));
    if (!to_stdout && st == TR_OK) st = tr_sync_folder(out, err);
    if (!to_stdout && st != TR_OK) unlink(tmp);
done:
    free(o.text);
    free(tmp);
    return st;
}

/* Every request must have its record before a byte is written. */
static tr_status check_all(merger *m, tr_err *err)
{
    tr_status st = walk(m, NULL, err);
    return st == TR_OK ? tr_input_rewind(m->input, err) : st;
}

tr_status tr_merge(const char *input, const char *out, char *const *part, int n_parts, tr_log *log,
                   tr_err *err)
{
    merger m = {.part = part, .n_parts = n_parts, .log = log};
    struct stat sb;
    tr_status st = TR_OK;

    if (strcmp(out, "-") && stat(out, &sb) == 0)
        return tr_fail(err, TR_E_USAGE, "%s exists: delete it, or give another -o", out);
    if (!strcmp(input, "-"))
        return tr_fail(err, TR_E_USAGE, "--merge reads its input twice: -i - does not go");
    m.fd = tr_calloc((size_t)n_parts, sizeof *m.fd);
    m.ids = tr_idset_create();
    for (int i = 0; m.fd && i < n_parts; i++)
        m.fd[i] = -1;
    if (!m.fd || !m.ids) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    st = tr_runfile_go_together(part, n_parts, err);
    if (st == TR_OK) st = tr_input_open(&m.input, input, 0, err);
    for (int i = 0; st == TR_OK && i < n_parts; i++)
        st = index_part(&m, i, err);
    if (st == TR_OK) st = check_all(&m, err);
    if (st == TR_OK) st = write_merged(&m, out, err);
    if (st == TR_OK)
        tr_log_info(log, "%s: %ju records of %d parts", out,
                    (uintmax_t)tr_input_about(m.input)->n_requests, n_parts);
done:
    for (int i = 0; m.fd && i < n_parts; i++)
        if (m.fd[i] >= 0) close(m.fd[i]);
    tr_input_close(m.input);
    tr_idset_free(m.ids);
    free(m.fd);
    free(m.at);
    return st;
}
