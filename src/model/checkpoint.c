#include <config.h>

#include "model/checkpoint.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <jansson.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/size.h"
#include "model/problems.h"
#include "model/safetensors.h"

enum { INDEX_BYTES_MAX = 100 << 20, SHARDS_MAX = 65536 };

struct tr_checkpoint {
    char *dir;
    char *index_path;  /* NULL: a single file without an index */
    json_t *index;     /* owns the shard names */
    const char **file; /* [n_shards] names inside dir, sorted */
    tr_shard **shard;  /* [n_shards] */
    size_t n_shards;
    tr_tensor *tensor; /* [n] */
    size_t n;
    size_t *slot;   /* [n_slots] open addressing: index into tensor + 1, 0 free */
    size_t n_slots; /* power of two */
    char identity[33];
    atomic_uint_fast64_t *bytes_read; /* behind a pointer: reading leaves the checkpoint const */
    struct shard_use {
        atomic_uint_fast64_t bytes, ns, moved_ns; /* moved: when a read began or ended last */
        atomic_int n_reading;
    } * use; /* [n_shards] */
};

static json_t *weight_map(const tr_checkpoint *c)
{
    return json_object_get(c->index, "weight_map");
}

/* A shard lies in the folder itself: a name that could lead elsewhere is refused. */
static bool is_plain_name(const char *name)
{
    return name[0] != '\0' && !strchr(name, '/') && !strstr(name, "..") && strcmp(name, ".") != 0;
}

static int by_string(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct shard names of the index into c->file, sorted. */
static tr_status list_shards(tr_checkpoint *c, tr_err *err)
{
    json_t *map = weight_map(c);
    const char *name;
    json_t *file;
    size_t n = 0;

    if (!json_is_object(map) || json_object_size(map) == 0)
        return tr_fail(err, TR_E_INPUT, "%s: no weight_map", c->index_path);
    c->file = tr_calloc(json_object_size(map), sizeof *c->file);
    if (!c->file) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", c->index_path);
    json_object_foreach(map, name, file)
    {
        if (!json_is_string(file))
            return tr_fail(err, TR_E_INPUT, "%s: %s: its file is not a string", c->index_path,
                           name);
        if (!is_plain_name(json_string_value(file)))
            return tr_fail(err, TR_E_INPUT,
                           "%s: %s: \"%s\" is not the name of a file in the folder", c->index_path,
                           name, json_string_value(file));
        c->file[n++] = json_string_value(file);
    }
    qsort(c->file, n, sizeof *c->file, by_string);
    for (size_t i = 0; i < n; i++)
        if (c->n_shards == 0 || strcmp(c->file[c->n_shards - 1], c->file[i]) != 0)
            c->file[c->n_shards++] = c->file[i];
    if (c->n_shards > SHARDS_MAX)
        return tr_fail(err, TR_E_INPUT, "%s: %zu files", c->index_path, c->n_shards);
    return TR_OK;
}

/* Reads the index, or finds that there is one file and none. */
static tr_status find_shards(tr_checkpoint *c, tr_err *err)
{
    struct stat sb;
    if (asprintf(&c->index_path, "%s/model.safetensors.index.json", c->dir) < 0) {
        c->index_path = NULL;
        return tr_fail(err, TR_E_MEMORY, "%s: out of memory", c->dir);
    }
    if (lstat(c->index_path, &sb) == 0) {
        tr_status st = tr_json_load(&c->index, c->index_path, INDEX_BYTES_MAX, err);
        return st == TR_OK ? list_shards(c, err) : st;
    }
    free(c->index_path);
    c->index_path = NULL;
    c->file = tr_calloc(1, sizeof *c->file);
    if (!c->file) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", c->dir);
    c->file[0] = "model.safetensors";
    c->n_shards = 1;
    return TR_OK;
}

static tr_status open_shards(tr_checkpoint *c, tr_err *err)
{
    tr_status st = TR_OK;
    c->shard = tr_calloc(c->n_shards, sizeof *c->shard);
    c->use = tr_calloc(c->n_shards, sizeof *c->use);
    if (!c->use) return tr_fail(err, TR_E_MEMORY, "out of memory");
    if (!c->shard) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", c->dir);
    for (size_t i = 0; i < c->n_shards && st == TR_OK; i++) {
        char *path = NULL;
        if (asprintf(&path, "%s/%s", c->dir, c->file[i]) < 0)
            return tr_fail(err, TR_E_MEMORY, "%s: out of memory", c->dir);
        st = tr_shard_open(&c->shard[i], path, err);
        free(path);
        if (st == TR_OK) c->n += tr_shard_count(c->shard[i]);
    }
    return st;
}

/* Where `name` is, or the free slot where it would go. */
static size_t probe(const tr_checkpoint *c, const char *name)
{
    size_t i = (size_t)tr_hash64(name, strlen(name), 0) & (c->n_slots - 1);
    while (c->slot[i] && strcmp(c->tensor[c->slot[i] - 1].name, name) != 0)
        i = (i + 1) & (c->n_slots - 1);
    return i;
}

/* One array and one hash table over all shards. */
static tr_status gather_tensors(tr_checkpoint *c, tr_err *err)
{
    size_t n = 0;
    c->n_slots = 16;
    while (c->n_slots < 2 * c->n)
        c->n_slots *= 2;
    c->tensor = tr_calloc(c->n, sizeof *c->tensor);
    c->slot = tr_calloc(c->n_slots, sizeof *c->slot);
    if (!c->tensor || !c->slot) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", c->dir);
    for (size_t k = 0; k < c->n_shards; k++) {
        const tr_tensor *from = tr_shard_tensors(c->shard[k]);
        for (size_t i = 0; i < tr_shard_count(c->shard[k]); i++) {
            tr_tensor *t = &c->tensor[n];
            *t = from[i];
            t->shard = (int)k;
            size_t at = probe(c, t->name);
            if (c->slot[at])
                return tr_fail(err, TR_E_INPUT, "%s: %s: is in %s too", tr_shard_path(c->shard[k]),
                               t->name, tr_checkpoint_path(c, &c->tensor[c->slot[at] - 1]));
            c->slot[at] = ++n;
        }
    }
    return TR_OK;
}

/* Index and shards must tell the same story. */
static tr_status check_index(const tr_checkpoint *c, tr_err *err)
{
    tr_problems p = {0};
    json_t *map = weight_map(c);
    const char *name;
    json_t *file;

    if (!c->index) return TR_OK;
    json_object_foreach(map, name, file)
    {
        const tr_tensor *t = tr_checkpoint_find(c, name);
        if (!t || strcmp(c->file[t->shard], json_string_value(file)) != 0)
            tr_problem(&p, "%s is not in %s", name, json_string_value(file));
    }
    for (size_t i = 0; i < c->n; i++)
        if (!json_object_get(map, c->tensor[i].name))
            tr_problem(&p, "%s of %s is not listed", c->tensor[i].name,
                       c->file[c->tensor[i].shard]);
    return tr_problems_end(&p, TR_E_INPUT, c->index_path, err);
}

static tr_status make_identity(tr_checkpoint *c, tr_err *err)
{
    tr_hasher *h = tr_hasher_create();
    if (!h) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", c->dir);
    for (size_t i = 0; i < c->n_shards; i++) {
        char size[32];
        int n = snprintf(size, sizeof size, "%ju", (uintmax_t)tr_shard_bytes(c->shard[i]));
        tr_hasher_add(h, c->file[i],
                      strlen(c->file[i]) + 1); /* with the NULs: no two lists alike */
        tr_hasher_add(h, size, (size_t)n + 1);
        tr_hasher_add(h, tr_shard_header_hash(c->shard[i]), 33);
    }
    tr_hasher_hex(h, c->identity);
    tr_hasher_free(h);
    return TR_OK;
}

tr_status tr_checkpoint_open(tr_checkpoint **out, const char *dir, tr_err *err)
{
    tr_status st = TR_OK;

    *out = NULL;
    tr_checkpoint *c = calloc(1, sizeof *c);
    if (!c || !(c->dir = strdup(dir)) || !(c->bytes_read = calloc(1, sizeof *c->bytes_read))) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", dir);
        goto done;
    }
    if ((st = find_shards(c, err)) != TR_OK) goto done;
    if ((st = open_shards(c, err)) != TR_OK) goto done;
    if ((st = gather_tensors(c, err)) != TR_OK) goto done;
    if ((st = check_index(c, err)) != TR_OK) goto done;
    if ((st = make_identity(c, err)) != TR_OK) goto done;
    *out = c;
    c = NULL;

done:
    tr_checkpoint_close(c);
    return st;
}

void tr_checkpoint_close(tr_checkpoint *c)
{
    if (!c) return;
    for (size_t i = 0; c->shard && i < c->n_shards; i++)
        tr_shard_close(c->shard[i]);
    json_decref(c->index);
    free(c->shard);
    free(c->file);
    free(c->tensor);
    free(c->slot);
    free(c->bytes_read);
    free(c->use);
    free(c->index_path);
    free(c->dir);
    free(c);
}

const tr_tensor *tr_checkpoint_find(const tr_checkpoint *c, const char *name)
{
    size_t found = c->slot[probe(c, name)];
    return found ? &c->tensor[found - 1] : NULL;
}

size_t tr_checkpoint_count(const tr_checkpoint *c)
{
    return c->n;
}

const tr_tensor *tr_checkpoint_tensor(const tr_checkpoint *c, size_t i)
{
    return &c->tensor[i];
}

const char *tr_checkpoint_path(const tr_checkpoint *c, const tr_tensor *t)
{
    return tr_shard_path(c->shard[t->shard]);
}

static uint64_t begin_read(const tr_checkpoint *c, const tr_tensor *t)
{
    const uint64_t now_ns = tr_now_ns();

    atomic_store_explicit(&c->use[t->shard].moved_ns, now_ns, memory_order_relaxed);
    atomic_fetch_add(&c->use[t->shard].n_reading, 1);
    return now_ns;
}

static void end_read(const tr_checkpoint *c, const tr_tensor *t)
{
    atomic_store_explicit(&c->use[t->shard].moved_ns, tr_now_ns(), memory_order_relaxed);
    atomic_fetch_sub(&c->use[t->shard].n_reading, 1);
}

static void note_read(const tr_checkpoint *c, const tr_tensor *t, uint64_t bytes, uint64_t begun_ns)
{
    struct shard_use *use = &c->use[t->shard];

    atomic_fetch_add_explicit(c->bytes_read, bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&use->bytes, bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&use->ns, tr_now_ns() - begun_ns, memory_order_relaxed);
}

tr_status tr_checkpoint_read(const tr_checkpoint *c, const tr_tensor *t, uint64_t begin, size_t n,
                             void *dst, tr_err *err)
{
    const uint64_t begun_ns = begin_read(c, t);
    tr_status st = tr_shard_read(c->shard[t->shard], t, begin, n, n, 1, dst, err);
    end_read(c, t);
    if (st == TR_OK) note_read(c, t, n, begun_ns);
    return st;
}

tr_status tr_checkpoint_read_block(const tr_checkpoint *c, const tr_tensor *t, int64_t row0,
                                   int64_t n_rows, int64_t col0, int64_t n_cols, void *dst,
                                   tr_err *err)
{
    if (t->rank != 2 || row0 < 0 || n_rows < 0 || row0 > t->shape[0] ||
        n_rows > t->shape[0] - row0 || col0 < 0 || n_cols < 0 || col0 > t->shape[1] ||
        n_cols > t->shape[1] - col0)
        return tr_fail(err, TR_E_INPUT, "%s: %s: rows %jd + %jd, columns %jd + %jd are not in it",
                       tr_checkpoint_path(c, t), t->name, (intmax_t)row0, (intmax_t)n_rows,
                       (intmax_t)col0, (intmax_t)n_cols);
    if (n_rows == 0 || n_cols == 0) return TR_OK;
    /* No product below can wrap: each is at most t->bytes, which the open has checked. */
    uint64_t element = t->bytes / (uint64_t)t->shape[0] / (uint64_t)t->shape[1];
    uint64_t stride = (uint64_t)t->shape[1] * element, piece = (uint64_t)n_cols * element;
    uint64_t begin = (uint64_t)row0 * stride + (uint64_t)col0 * element;
    const uint64_t begun_ns = begin_read(c, t);
    tr_status st =
        tr_shard_read(c->shard[t->shard], t, begin, (size_t)piece, stride, n_rows, dst, err);
    end_read(c, t);
    if (st == TR_OK) note_read(c, t, piece * (uint64_t)n_rows, begun_ns);
    return st;
}

void tr_checkpoint_identity(const tr_checkpoint *c, char hex[33])
{
    memcpy(hex, c->identity, sizeof c->identity);
}

uint64_t tr_checkpoint_bytes_read(const tr_checkpoint *c)
{
    return atomic_load_explicit(c->bytes_read, memory_order_relaxed);
}

size_t tr_checkpoint_shards(const tr_checkpoint *c)
{
    return c->n_shards;
}

const char *tr_checkpoint_shard_use(const tr_checkpoint *c, size_t i, uint64_t *bytes, uint64_t *ns)
{
    *bytes = atomic_load_explicit(&c->use[i].bytes, memory_order_relaxed);
    *ns = atomic_load_explicit(&c->use[i].ns, memory_order_relaxed);
    return c->file[i];
}

const char *tr_checkpoint_waits(const tr_checkpoint *c, uint64_t *ns)
{
    const uint64_t now_ns = tr_now_ns();
    const char *path = NULL;

    *ns = 0;
    for (size_t i = 0; i < c->n_shards; i++) {
        const struct shard_use *use = &c->use[i];
        if (!atomic_load(&use->n_reading)) continue;
        const uint64_t moved_ns = atomic_load_explicit(&use->moved_ns, memory_order_relaxed);
        const uint64_t quiet_ns = now_ns > moved_ns ? now_ns - moved_ns : 0;
        if (path && quiet_ns <= *ns) continue;
        path = tr_shard_path(c->shard[i]);
        *ns = quiet_ns;
    }
    return path;
}
