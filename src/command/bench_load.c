/* trireme bench load: a checkpoint into packed weights, beside plain parallel reads of the same bytes: into one buffer per thread,
 * and into memory that is as new as that of the weights. */
#include <config.h>

#include "command/bench.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sys/mman.h>

#include "base/clock.h"
#include "base/size.h"

enum {
    CHUNK = 512 << 10, /* what stays in L2 */
    ROUNDS = 3,
};

typedef struct piece { /* of one tensor's bytes in its file */
    int fd;
    uint64_t offset;
    size_t n;
} piece;

typedef struct reading {
    const tr_checkpoint *checkpoint;
    piece *list;
    size_t n;
    int *fd; /* one per shard, -1: not opened */
    int n_shards;
    uint64_t bytes;
} reading;

static size_t pieces_of(const tr_tensor *t)
{
    return (size_t)tr_ceil_div(t->bytes, CHUNK);
}

static tr_status list_pieces(reading *r, tr_err *err)
{
    const size_t n_tensors = tr_checkpoint_count(r->checkpoint);
    size_t n = 0;
    for (size_t i = 0; i < n_tensors; i++) {
        const tr_tensor *t = tr_checkpoint_tensor(r->checkpoint, i);
        n += pieces_of(t);
        if (t->shard >= r->n_shards) r->n_shards = t->shard + 1;
    }
    r->list = tr_calloc(n, sizeof *r->list);
    r->fd = tr_calloc((size_t)r->n_shards, sizeof *r->fd);
    if (!r->list || !r->fd) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < r->n_shards; i++)
        r->fd[i] = -1;
    for (size_t i = 0; i < n_tensors; i++) {
        const tr_tensor *t = tr_checkpoint_tensor(r->checkpoint, i);
        const char *path = tr_checkpoint_path(r->checkpoint, t);
        if (r->fd[t->shard] < 0) r->fd[t->shard] = open(path, O_RDONLY | O_CLOEXEC);
        if (r->fd[t->shard] < 0) return tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno));
        for (uint64_t at = 0; at < t->bytes; at += CHUNK) {
            const uint64_t left = t->bytes - at;
            r->list[r->n++] =
                (piece){r->fd[t->shard], t->offset + at, left < CHUNK ? (size_t)left : CHUNK};
        }
        r->bytes += t->bytes;
    }
    return TR_OK;
}

static int read_piece(const piece *p, char *buffer)
{
    for (size_t got = 0; got < p->n;) {
        ssize_t r = pread(p->fd, buffer + got, p->n - got, (off_t)(p->offset + got));
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) return -1;
        got += (size_t)r;
    }
    return 0;
}

/* One thread of a plain read. */
typedef struct reader {
    const reading *all;
    atomic_size_t *next; /* piece */
    atomic_int *failed;
    char *
        fresh; /* memory for all bytes, piece i at i CHUNK; NULL: each reader reuses a buffer of its own */
    pthread_t thread;
    bool started;
} reader;

static void *read_main(void *arg)
{
    reader *r = arg;
    char *own = r->fresh ? NULL : malloc(CHUNK);

    if (!r->fresh && !own) atomic_store(r->failed, 1);
    for (size_t i; (i = atomic_fetch_add(r->next, 1)) < r->all->n && !atomic_load(r->failed);)
        if (read_piece(&r->all->list[i], own ? own : r->fresh + i * CHUNK) != 0)
            atomic_store(r->failed, 1);
    free(own);
    return NULL;
}

/* Every tensor's bytes, by as many threads as loading has; memory is new and of huge pages where `keep`: that is the
 * least a loader has to do that keeps what it reads. */
static tr_status read_plainly(const reading *all, int n_threads, bool keep, double *seconds,
                              tr_err *err)
{
    enum { READERS_MAX = 256 };
    const int n = n_threads < READERS_MAX ? n_threads : READERS_MAX;
    const size_t bytes = (all->n + 1) * CHUNK;
    reader part[READERS_MAX];
    atomic_size_t next = 0;
    atomic_int failed = 0;
    char *fresh = NULL;

    const uint64_t begun = tr_now_ns();
    if (keep) {
        fresh = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fresh == MAP_FAILED)
            return tr_fail(err, TR_E_MEMORY, "bench load: no memory for %zu bytes", bytes);
        madvise(fresh, bytes, MADV_HUGEPAGE); /* a wish */
    }
    for (int i = 0; i < n; i++) {
        part[i] = (reader){.all = all, .next = &next, .failed = &failed, .fresh = fresh};
        part[i].started = i > 0 && pthread_create(&part[i].thread, NULL, read_main, &part[i]) == 0;
    }
    read_main(&part[0]);
    for (int i = 1; i < n; i++)
        if (part[i].started) pthread_join(part[i].thread, NULL);
    *seconds = (double)(tr_now_ns() - begun) * 1e-9;
    if (fresh) munmap(fresh, bytes);
    return atomic_load(&failed) ? tr_fail(err, TR_E_IO, "bench load: a plain read failed") : TR_OK;
}

static void report(const char *what, uint64_t bytes, double seconds)
{
    printf("  %-16s %12.1f %12.3f %12.3f\n", what, (double)bytes * 1e-6, seconds,
           (double)bytes / seconds * 1e-9);
    printf("{\"bench\": \"load\", \"kind\": \"%s\", \"bytes\": %ju, \"seconds\": %.6f, "
           "\"bytes_per_s\": %.0f}\n",
           what, (uintmax_t)bytes, seconds, (double)bytes / seconds);
}

typedef struct times {
    double plain, kept, load; /* seconds */
} times;

static void keep_best(double *best, double seconds, bool first)
{
    if (first || seconds < *best) *best = seconds;
}

/* The two reads and the loading, one after another, so that what else the machine does meets all three. The weights of
 * the round before are freed first: all rounds find the same memory. */
static tr_status one_round(const reading *r, tr_opened *opened, const tr_open_options *options,
                           int n_threads, bool first, times *best, tr_err *err)
{
    double plain, kept;

    if (opened->weights) tr_weights_free(opened->weights, opened->device, opened->ops);
    opened->weights = NULL;
    tr_status st = read_plainly(r, n_threads, false, &plain, err);
    if (st == TR_OK) st = read_plainly(r, n_threads, true, &kept, err);
    if (st != TR_OK) return st;
    tr_regions_reset(&opened->regions);
    const uint64_t begun = tr_now_ns();
    st = tr_open_weights(opened, options, NULL, err);
    if (st != TR_OK) return st;
    keep_best(&best->load, (double)(tr_now_ns() - begun) * 1e-9, first);
    keep_best(&best->plain, plain, first);
    keep_best(&best->kept, kept, first);
    return TR_OK;
}

tr_status tr_bench_load(const tr_bench_options *o, tr_err *err)
{
    tr_opened opened = {0};
    reading r = {0};
    times best = {0};

    tr_status st = o->open.load_format == TR_LOAD_SAFETENSORS
                       ? tr_open_checkpoint(&opened, &o->open, err)
                       : tr_fail(err, TR_E_USAGE,
                                 "bench load reads a checkpoint: not with --load-format dummy");
    if (st == TR_OK) st = tr_open_device(&opened, &o->open, NULL, err);
    if (st != TR_OK) goto done;
    r.checkpoint = opened.checkpoint;
    st = list_pieces(&r, err);
    if (st != TR_OK) goto done;
    const int n_threads = o->open.n_threads > 0 ? o->open.n_threads : tr_device_threads();
    st = read_plainly(&r, n_threads, false, &best.plain, err); /* the page cache is warm then */
    for (int i = 0; i < ROUNDS && st == TR_OK; i++)
        st = one_round(&r, &opened, &o->open, n_threads, i == 0, &best, err);
    if (st != TR_OK) goto done;

    printf("# trireme %s, %s, %s\n", PACKAGE_VERSION, o->open.model_dir,
           tr_device_describe(opened.device));
    printf("# %-16s %12s %12s %12s   (page cache warm, best of %d)\n", "load", "MB", "seconds",
           "GB/s", ROUNDS);
    report("read, one buffer", r.bytes, best.plain);
    report("read, new memory", r.bytes, best.kept);
    report("load", opened.weights->bytes_read, best.load);
    if (o->regions) tr_regions_print(&opened.regions, stdout);

done:
    for (int i = 0; i < r.n_shards && r.fd; i++)
        if (r.fd[i] >= 0) close(r.fd[i]);
    free(r.fd);
    free(r.list);
    tr_opened_close(&opened);
    return st;
}
