#include <config.h>

#include "model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "base/hash.h"
#include "base/json.h"
#include "base/size.h"

enum { READERS_MAX = 16, PART_BYTES = 1 << 20 }; /* threads of one read; bytes that are worth one */

struct tr_shard {
    char *path;
    int fd;
    uint64_t bytes; /* of the file */
    uint64_t data;  /* where the data begins: 8 + header */
    json_t *header; /* owns the names */
    tr_tensor *tensor;
    size_t n;
    char header_hash[33];
};

typedef struct dtype {
    const char *name;
    size_t bytes;
    tr_stored stored;
} dtype;

/* All of the format but the ones smaller than a byte. What we cannot compute with is only carried. */
static const dtype dtypes[] = {
    {"F8_E4M3", 1, TR_STORED_F8_E4M3}, {"BF16", 2, TR_STORED_BF16},
    {"F32", 4, TR_STORED_F32},         {"F16", 2, TR_STORED_OTHER},
    {"F64", 8, TR_STORED_OTHER},       {"F8_E5M2", 1, TR_STORED_OTHER},
    {"F8_E8M0", 1, TR_STORED_OTHER},   {"BOOL", 1, TR_STORED_OTHER},
    {"I8", 1, TR_STORED_OTHER},        {"U8", 1, TR_STORED_OTHER},
    {"I16", 2, TR_STORED_OTHER},       {"U16", 2, TR_STORED_OTHER},
    {"I32", 4, TR_STORED_OTHER},       {"U32", 4, TR_STORED_OTHER},
    {"I64", 8, TR_STORED_OTHER},       {"U64", 8, TR_STORED_OTHER},
};

static const dtype *find_dtype(const char *name)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (strcmp(name, dtypes[i].name) == 0) return &dtypes[i];
    return NULL;
}

bool tr_tensor_bytes(size_t element_bytes, int rank, const int64_t *shape, uint64_t *bytes)
{
    uint64_t product = element_bytes;
    if (rank < 0 || rank > TR_TENSOR_RANK_MAX) return false;
    for (int i = 0; i < rank; i++)
        if (shape[i] < 0 || __builtin_mul_overflow(product, (uint64_t)shape[i], &product))
            return false;
    *bytes = product;
    return true;
}

/* ---- reading ------------------------------------------------------------------------------------------------------ */

/* what: the tensor, or "header". The caller has checked that [at, at + n) lies inside the size the file had. */
static tr_status read_at(const tr_shard *s, const char *what, uint64_t at, size_t n, void *dst,
                         tr_err *err)
{
    char *to = dst;
    while (n > 0) {
        size_t part = n < ((size_t)1 << 30) ? n : (size_t)1 << 30; /* Linux stops at 2 GiB */
        ssize_t got = pread(s->fd, to, part, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return tr_fail(err, TR_E_IO, "%s: %s: read of %zu bytes at %ju: %s", s->path, what, n,
                           (uintmax_t)at, strerror(errno));
        if (got == 0)
            return tr_fail(err, TR_E_INPUT, "%s: %s: the file ends at byte %ju", s->path, what,
                           (uintmax_t)at);
        to += got;
        at += (uint64_t)got;
        n -= (size_t)got;
    }
    return TR_OK;
}

static tr_status check_size(const tr_shard *s, const char *what, tr_err *err)
{
    struct stat sb;
    if (fstat(s->fd, &sb) != 0)
        return tr_fail(err, TR_E_IO, "%s: %s: %s", s->path, what, strerror(errno));
    if ((uint64_t)sb.st_size != s->bytes)
        return tr_fail(err, TR_E_INPUT,
                       "%s: %s: the file had %ju bytes when opened, now it has %jd", s->path, what,
                       (uintmax_t)s->bytes, (intmax_t)sb.st_size);
    return TR_OK;
}

/* Rows [row, row_end) of `n` bytes, stride apart in the file from `begin` on, one behind the other in dst. */
typedef struct read_part {
    const tr_shard *s;
    const char *what;
    uint64_t begin, stride;
    size_t n;
    int64_t row, row_end;
    char *dst;
    pthread_t thread;
    bool started;
    tr_err err;
    tr_status st;
} read_part;

static void read_rows(read_part *p)
{
    const uint64_t at = p->begin + (uint64_t)p->row * p->stride;
    char *to = p->dst + (size_t)p->row * p->n;

    p->st = TR_OK;
    if (p->stride == p->n) { /* one run */
        p->st = read_at(p->s, p->what, at, (size_t)(p->row_end - p->row) * p->n, to, &p->err);
        return;
    }
    for (int64_t r = 0; r < p->row_end - p->row && p->st == TR_OK; r++)
        p->st = read_at(p->s, p->what, at + (uint64_t)r * p->stride, p->n, to + (size_t)r * p->n,
                        &p->err);
}

static void *read_main(void *part)
{
    read_rows(part);
    return NULL;
}

/* CPUs that this process may use: a copy out of the page cache keeps one busy, and parallel file systems give several
 * readers more than one. */
static int reader_count(uint64_t bytes)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    uint64_t worth = bytes / PART_BYTES;
    if (n > READERS_MAX) n = READERS_MAX;
    return worth < (uint64_t)n ? (int)worth : n;
}

/* By several threads for as long as it takes; the caller reads what no thread could be started for. The first error of
 * the file's order is the one that is told. */
static tr_status read_parallel(const read_part *whole, int n, tr_err *err)
{
    read_part part[READERS_MAX];
    tr_status st = TR_OK;

    for (int i = 0; i < n; i++) {
        part[i] = *whole;
        part[i].row = whole->row_end / n * i;
        if (i < n - 1) part[i].row_end = whole->row_end / n * (i + 1);
        part[i].started = i > 0 && pthread_create(&part[i].thread, NULL, read_main, &part[i]) == 0;
    }
    for (int i = 0; i < n; i++)
        if (!part[i].started) read_rows(&part[i]);
    for (int i = 0; i < n; i++) {
        if (part[i].started) pthread_join(part[i].thread, NULL);
        if (st == TR_OK && part[i].st != TR_OK)
            st = tr_fail(err, part[i].st, "%s", part[i].err.text);
    }
    return st;
}

tr_status tr_shard_read(const tr_shard *s, const tr_tensor *t, uint64_t begin, size_t n,
                        uint64_t stride, int64_t n_rows, void *dst, tr_err *err)
{
    uint64_t end = n; /* of the last piece, counted from begin */

    if (n_rows <= 0 || n == 0) return TR_OK;
    if (__builtin_mul_overflow(stride, (uint64_t)n_rows - 1, &end) ||
        __builtin_add_overflow(end, n, &end) || begin > t->bytes || end > t->bytes - begin)
        return tr_fail(err, TR_E_INPUT, "%s: %s: read of %zu bytes at %ju outside its %ju", s->path,
                       t->name, n, (uintmax_t)begin, (uintmax_t)t->bytes);
    tr_status st = check_size(s, t->name, err);
    if (st != TR_OK) return st;
    read_part whole = {.s = s,
                       .what = t->name,
                       .begin = t->offset + begin,
                       .stride = stride,
                       .n = n,
                       .row_end = n_rows,
                       .dst = dst};
    /* n n_rows cannot wrap: pieces lie side by side inside the tensor. Rows that overlap in the file (stride < n) would
     * be as many bytes in memory, which the caller has. */
    int n_readers = reader_count((uint64_t)n * (uint64_t)n_rows);
    if (n_readers > n_rows) n_readers = (int)n_rows;
    if (n_readers > 1) return read_parallel(&whole, n_readers, err);
    read_rows(&whole);
    return whole.st == TR_OK ? TR_OK : tr_fail(err, whole.st, "%s", whole.err.text);
}

/* ---- the header --------------------------------------------------------------------------------------------------- */

static tr_status check_metadata(const tr_shard *s, json_t *metadata, tr_err *err)
{
    const char *key;
    json_t *value;
    if (!json_is_object(metadata))
        return tr_fail(err, TR_E_INPUT, "%s: __metadata__ is not an object", s->path);
    json_object_foreach(metadata, key, value)
    {
        if (!json_is_string(value))
            return tr_fail(err, TR_E_INPUT, "%s: __metadata__: %s is not a string", s->path, key);
    }
    return TR_OK;
}

/* {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}; offsets count from the end of the header. */
static tr_status parse_tensor(const tr_shard *s, const char *name, const json_t *entry,
                              tr_tensor *t, tr_err *err)
{
    const json_t *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const char *dtype_name = json_string_value(json_object_get(entry, "dtype"));
    uint64_t data_bytes = s->bytes - s->data;

    *t = (tr_tensor){.name = name};
    if (!json_is_object(entry) || !dtype_name || !json_is_array(shape) || !json_is_array(offsets))
        return tr_fail(err, TR_E_INPUT, "%s: %s: not a tensor: wants dtype, shape and data_offsets",
                       s->path, name);
    const dtype *d = find_dtype(dtype_name);
    if (!d)
        return tr_fail(err, TR_E_INPUT, "%s: %s: unknown dtype \"%s\"", s->path, name, dtype_name);
    t->stored = d->stored;

    if (json_array_size(shape) > TR_TENSOR_RANK_MAX)
        return tr_fail(err, TR_E_INPUT, "%s: %s: %zu dimensions, at most %d are allowed", s->path,
                       name, json_array_size(shape), TR_TENSOR_RANK_MAX);
    t->rank = (int)json_array_size(shape);
    for (int i = 0; i < t->rank; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        t->shape[i] = json_integer_value(dim);
        if (!json_is_integer(dim) || t->shape[i] < 0)
            return tr_fail(err, TR_E_INPUT, "%s: %s: dimension %d is not a count", s->path, name,
                           i);
    }
    if (!tr_tensor_bytes(d->bytes, t->rank, t->shape, &t->bytes))
        return tr_fail(err, TR_E_INPUT, "%s: %s: its shape has more bytes than 64 bits can count",
                       s->path, name);

    const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last) ||
        json_integer_value(first) < 0 || json_integer_value(last) < 0)
        return tr_fail(err, TR_E_INPUT, "%s: %s: data_offsets are not two counts", s->path, name);
    uint64_t begin = (uint64_t)json_integer_value(first), end = (uint64_t)json_integer_value(last);
    if (begin > end || end > data_bytes)
        return tr_fail(err, TR_E_INPUT, "%s: %s: data_offsets [%ju, %ju] in %ju bytes of data%s",
                       s->path, name, (uintmax_t)begin, (uintmax_t)end, (uintmax_t)data_bytes,
                       begin > end ? "" : ": the file is too short, is it cut off?");
    if (end - begin != t->bytes)
        return tr_fail(err, TR_E_INPUT, "%s: %s: its shape has %ju bytes, its data_offsets %ju",
                       s->path, name, (uintmax_t)t->bytes, (uintmax_t)(end - begin));
    if (begin % d->bytes != 0)
        return tr_fail(err, TR_E_INPUT,
                       "%s: %s: begins at %ju, not a multiple of its %zu-byte type", s->path, name,
                       (uintmax_t)begin, d->bytes);
    t->offset = s->data + begin;
    return TR_OK;
}

/* By offset; an empty tensor before the one that begins where it lies, equals by name. */
static int by_offset(const void *a, const void *b)
{
    const tr_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    if ((x->bytes == 0) != (y->bytes == 0)) return x->bytes == 0 ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* The tensors must cover the data exactly, without overlap and without holes. */
static tr_status check_cover(const tr_shard *s, tr_err *err)
{
    uint64_t at = s->data;
    for (size_t i = 0; i < s->n; i++) {
        const tr_tensor *t = &s->tensor[i];
        if (t->offset < at)
            return tr_fail(err, TR_E_INPUT, "%s: %s: overlaps %s", s->path, t->name,
                           s->tensor[i - 1].name);
        if (t->offset > at)
            return tr_fail(err, TR_E_INPUT, "%s: %s: %ju bytes before it belong to no tensor",
                           s->path, t->name, (uintmax_t)(t->offset - at));
        at += t->bytes; /* offset + bytes <= file, checked with the tensor */
    }
    if (at != s->bytes)
        return tr_fail(err, TR_E_INPUT, "%s: its last %ju bytes belong to no tensor", s->path,
                       (uintmax_t)(s->bytes - at));
    return TR_OK;
}

static tr_status parse_header(tr_shard *s, const char *text, size_t n, tr_err *err)
{
    const char *name;
    json_t *entry;
    tr_status st = TR_OK;

    if (n == 0 || text[0] != '{')
        return tr_fail(err, TR_E_INPUT, "%s: the header does not begin with {", s->path);
    if (tr_json_parse(&s->header, text, n, 0, NULL, NULL, err) != TR_OK)
        return tr_within(err, "%s: header", s->path);
    size_t most = json_object_size(s->header);
    s->tensor = tr_calloc(most, sizeof *s->tensor);
    if (!s->tensor) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", s->path);
    json_object_foreach(s->header, name, entry)
    {
        if (strcmp(name, "__metadata__") == 0)
            st = check_metadata(s, entry, err);
        else
            st = parse_tensor(s, name, entry, &s->tensor[s->n++], err);
        if (st != TR_OK) return st;
    }
    qsort(s->tensor, s->n, sizeof *s->tensor, by_offset);
    return check_cover(s, err);
}

static uint64_t load_u64le(const unsigned char b[8])
{
    uint64_t v = 0;
    for (int i = 7; i >= 0; i--)
        v = v << 8 | b[i];
    return v;
}

/* What a git clone leaves of a large file where git-lfs is not installed. */
static bool is_lfs_pointer(const tr_shard *s)
{
    static const char begins[] = "version https://git-lfs";
    char text[sizeof begins - 1];
    tr_err ignored;
    return s->bytes >= sizeof text &&
           read_at(s, "header", 0, sizeof text, text, &ignored) == TR_OK &&
           memcmp(text, begins, sizeof text) == 0;
}

tr_status tr_shard_open(tr_shard **out, const char *path, tr_err *err)
{
    tr_status st = TR_OK;
    unsigned char head[8];
    char *text = NULL;
    struct stat sb;

    *out = NULL;
    tr_shard *s = calloc(1, sizeof *s);
    if (s) s->fd = -1;
    if (!s || !(s->path = strdup(path))) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", path);
        goto done;
    }
    /* O_NONBLOCK: opening a FIFO of this name must not wait for its writer. */
    s->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (s->fd < 0 || fstat(s->fd, &sb) != 0) {
        st = tr_fail(err, errno == ENOENT || errno == ENOTDIR ? TR_E_INPUT : TR_E_IO, "%s: %s",
                     path, strerror(errno));
        goto done;
    }
    if (!S_ISREG(sb.st_mode) || sb.st_size < 8) {
        st = tr_fail(err, TR_E_INPUT, "%s: not a safetensors file: %s", path,
                     S_ISREG(sb.st_mode) ? "shorter than 8 bytes" : "no regular file");
        goto done;
    }
    s->bytes = (uint64_t)sb.st_size;
    if ((st = read_at(s, "header", 0, sizeof head, head, err)) != TR_OK) goto done;

    /* Compare by subtraction: 8 + header could wrap, bytes - 8 cannot. */
    uint64_t header = load_u64le(head);
    if (header > TR_SHARD_HEADER_MAX || header > s->bytes - 8) {
        st =
            is_lfs_pointer(s)
                ? tr_fail(err, TR_E_INPUT,
                          "%s: a git-lfs pointer instead of the weights: git lfs pull fetches them",
                          path)
                : tr_fail(err, TR_E_INPUT, "%s: header of %ju bytes in a file of %ju", path,
                          (uintmax_t)header, (uintmax_t)s->bytes);
        goto done;
    }
    s->data = 8 + header;
    text = malloc((size_t)header + 1);
    if (!text) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory for a header of %ju bytes", path,
                     (uintmax_t)header);
        goto done;
    }
    if ((st = read_at(s, "header", 8, (size_t)header, text, err)) != TR_OK) goto done;
    tr_hash128_hex(text, (size_t)header, 0, s->header_hash);
    if ((st = parse_header(s, text, (size_t)header, err)) != TR_OK) goto done;
    *out = s;
    s = NULL; /* ownership has moved to the caller */

done:
    free(text);
    tr_shard_close(s);
    return st;
}

void tr_shard_close(tr_shard *s)
{
    if (!s) return;
    if (s->fd >= 0) close(s->fd);
    json_decref(s->header);
    free(s->tensor);
    free(s->path);
    free(s);
}

const char *tr_shard_path(const tr_shard *s)
{
    return s->path;
}

uint64_t tr_shard_bytes(const tr_shard *s)
{
    return s->bytes;
}

size_t tr_shard_count(const tr_shard *s)
{
    return s->n;
}

const tr_tensor *tr_shard_tensors(const tr_shard *s)
{
    return s->tensor;
}

const char *tr_shard_header_hash(const tr_shard *s)
{
    return s->header_hash;
}
