#include <config.h>

#include "base/json.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/size.h"

tr_status tr_file_read(const char *path, size_t max_bytes, char **text, size_t *n, tr_err *err)
{
    tr_status st = TR_OK;
    struct stat sb;
    char *buf = NULL;
    size_t got = 0;

    *text = NULL;
    *n = 0;
    /* O_NONBLOCK: a FIFO under this name must be refused, not waited for. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &sb) != 0) {
        bool absent = errno == ENOENT || errno == ENOTDIR;
        st = tr_fail(err, absent ? TR_E_INPUT : TR_E_IO, "%s: %s", path, strerror(errno));
        goto done;
    }
    if (!S_ISREG(sb.st_mode)) {
        st = tr_fail(err, TR_E_INPUT, "%s: not a file", path);
        goto done;
    }
    if (sb.st_size < 0 || (uint64_t)sb.st_size > max_bytes) {
        st = tr_fail(err, TR_E_INPUT, "%s: %jd bytes, at most %zu are allowed", path,
                     (intmax_t)sb.st_size, max_bytes);
        goto done;
    }
    buf = malloc((size_t)sb.st_size + 1);
    if (!buf) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory for %jd bytes", path,
                     (intmax_t)sb.st_size);
        goto done;
    }
    while (got < (size_t)sb.st_size) {
        ssize_t r = read(fd, buf + got, (size_t)sb.st_size - got);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) {
            st = tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno));
            goto done;
        }
        if (r == 0) break; /* it shrank: what is there is what we parse */
        got += (size_t)r;
    }
    buf[got] = '\0';
    *text = buf;
    *n = got;
    buf = NULL;

done:
    if (fd >= 0) close(fd);
    free(buf);
    return st;
}

/* ---- jansson where memory ends ------------------------------------------------------------------
 *
 * jansson 2.14 does not look whether the buffer of the token it reads could grow: a character is lost, and where that is a
 * string's closing quote it writes beyond its memory. So no allocation inside json_loadb fails: what malloc refuses comes
 * from a reserve, from then on the text has ended, and the value is thrown away. */

typedef struct guard {
    char *reserve;
    size_t size, used;
    bool starved;
} guard;

typedef struct feed {
    const char *text;
    size_t n;
    const guard *g;
} feed;

/* Of the parse under way in this thread. An exception to "no mutable globals": jansson's allocation functions take no context. */
static _Thread_local guard *guarding;

static void *guarded_malloc(size_t n)
{
    guard *g = guarding;
    void *p = malloc(n);
    if (p || !g) return p;
    g->starved = true;
    size_t aligned = (g->used + 15) & ~(size_t)15;
    if (aligned > g->size || n > g->size - aligned) return NULL;
    g->used = aligned + n;
    return g->reserve + aligned;
}

static void guarded_free(void *p)
{
    const guard *g = guarding;
    if (g && (uintptr_t)p >= (uintptr_t)g->reserve &&
        (uintptr_t)p - (uintptr_t)g->reserve < g->size)
        return;
    free(p);
}

/* Before main, so before any thread. */
__attribute__((constructor)) static void guard_jansson(void)
{
    json_set_alloc_funcs(guarded_malloc, guarded_free);
}

/* One byte at a time, so that nothing is read ahead when memory ends: 5 ns a byte. */
static size_t give_byte(void *to, size_t room, void *ctx)
{
    feed *f = ctx;
    if (!room || !f->n || f->g->starved) return 0;
    f->n--;
    memcpy(to, f->text++, 1);
    return 1;
}

json_t *tr_json_loadb(const char *text, size_t n, size_t flags, json_error_t *e, bool *no_memory)
{
    /* A token's buffer doubles, and no token is longer than the text; a string is then copied once. */
    guard g = {.size = 4096};
    feed f = {text, n, &g};
    json_t *root = NULL;

    *no_memory = true;
    for (int i = 0; i < 3; i++)
        if (!tr_add(&g.size, g.size, n)) return NULL;
    g.reserve = malloc(g.size);
    if (!g.reserve) return NULL;
    guarding = &g;
    root = json_load_callback(give_byte, &f, flags, e);
    *no_memory = g.starved || (!root && json_error_code(e) == json_error_out_of_memory);
    if (*no_memory) {
        json_decref(root);
        root = NULL;
    }
    guarding = NULL;
    free(g.reserve);
    return root;
}

/* A raw NUL is never JSON, but jansson 2.14 does not see one behind a number. */
static tr_status refuse_nul(const char *text, size_t at, int *line, int *column, tr_err *err)
{
    int l = 1, c = 1;

    for (size_t i = 0; i < at; i++) {
        c = text[i] == '\n' ? 1 : c + 1;
        l += text[i] == '\n';
    }
    if (line) *line = l;
    if (column) *column = c;
    return tr_fail(err, TR_E_INPUT, "line %d, column %d: a NUL byte", l, c);
}

tr_status tr_json_parse(json_t **out, const char *text, size_t n, size_t flags, int *line,
                        int *column, tr_err *err)
{
    json_error_t e;
    const char *nul = n ? memchr(text, 0, n) : NULL;

    *out = NULL;
    if (nul) return refuse_nul(text, (size_t)(nul - text), line, column, err);
    bool no_memory;
    *out = tr_json_loadb(text, n, flags | JSON_REJECT_DUPLICATES, &e, &no_memory);
    if (line) *line = *out ? 0 : e.line;
    if (column) *column = *out ? 0 : (e.column > 0 ? e.column : 1);
    if (*out) return TR_OK;
    if (no_memory) return tr_fail(err, TR_E_MEMORY, "out of memory");
    return tr_fail(err, TR_E_INPUT, "line %d, column %d: %s", e.line, e.column > 0 ? e.column : 1,
                   e.text);
}

tr_status tr_json_load(json_t **out, const char *path, size_t max_bytes, tr_err *err)
{
    char *text = NULL;
    size_t n = 0;
    *out = NULL;
    tr_status st = tr_file_read(path, max_bytes, &text, &n, err);
    if (st != TR_OK) return st;
    st = tr_json_parse(out, text, n, 0, NULL, NULL, err);
    free(text);
    if (st != TR_OK) return tr_within(err, "%s", path);
    if (!json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        return tr_fail(err, TR_E_INPUT, "%s: the root is not an object", path);
    }
    return TR_OK;
}

/* The member, or NULL when it is absent or null. */
static const json_t *member(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return v && !json_is_null(v) ? v : NULL;
}

tr_status tr_json_int(const json_t *object, const char *key, int64_t min, int64_t max, int64_t *out,
                      tr_err *err)
{
    const json_t *v = member(object, key);
    if (!v) return TR_OK;
    if (!json_is_integer(v)) return tr_fail(err, TR_E_INPUT, "%s must be an integer", key);
    json_int_t i = json_integer_value(v);
    if (i < min || i > max)
        return tr_fail(err, TR_E_INPUT, "%s is %jd, it must be %jd to %jd", key, (intmax_t)i,
                       (intmax_t)min, (intmax_t)max);
    *out = i;
    return TR_OK;
}

tr_status tr_json_double(const json_t *object, const char *key, double min, double max, double *out,
                         tr_err *err)
{
    const json_t *v = member(object, key);
    if (!v) return TR_OK;
    if (!json_is_number(v)) return tr_fail(err, TR_E_INPUT, "%s must be a number", key);
    double d = json_number_value(v);
    if (!isfinite(d) || d < min || d > max)
        return tr_fail(err, TR_E_INPUT, "%s is %.15g, it must be %.15g to %.15g", key, d, min, max);
    *out = d;
    return TR_OK;
}

tr_status tr_json_bool(const json_t *object, const char *key, bool *out, tr_err *err)
{
    const json_t *v = member(object, key);
    if (!v) return TR_OK;
    if (!json_is_boolean(v)) return tr_fail(err, TR_E_INPUT, "%s must be true or false", key);
    *out = json_is_true(v);
    return TR_OK;
}

tr_status tr_json_string(const json_t *object, const char *key, const char **out, size_t *n,
                         tr_err *err)
{
    const json_t *v = member(object, key);
    if (!v) return TR_OK;
    if (!json_is_string(v)) return tr_fail(err, TR_E_INPUT, "%s must be a string", key);
    *out = json_string_value(v);
    if (n) *n = json_string_length(v);
    return TR_OK;
}
