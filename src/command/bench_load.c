/* trireme bench load: a checkpoint into packed weights, beside a plain parallel read of the same bytes. */
#include <config.h>

#include "command/bench.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <omp.h>

#include "base/clock.h"
#include "base/size.h"

enum { CHUNK = 4 << 20 };

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

/* Every tensor's bytes into buffers that are thrown away, by as many threads as loading has. */
static tr_status read_plainly(const reading *r, int n_threads, double *seconds, tr_err *err)
{
    atomic_int failed = 0;
    const uint64_t begun = tr_now_ns();
#pragma omp parallel num_threads(n_threads)
    {
        char *buffer = malloc(CHUNK);
        if (!buffer) atomic_store(&failed, 1);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < r->n; i++)
            if (buffer && read_piece(&r->list[i], buffer) != 0) atomic_store(&failed, 1);
        free(buffer);
    }
    *seconds = (double)(tr_now_ns() - begun) * 1e-9;
    return atomic_load(&failed) ? tr_fail(err, TR_E_IO, "bench load: a plain read failed") : TR_OK;
}

static void report(const char *what, uint64_t bytes, double seconds)
{
    printf("  %-12s %12.1f %12.3f %12.3f\n", what, (double)bytes * 1e-6, seconds,
           (double)bytes / seconds * 1e-9);
    printf("{\"bench\": \"load\", \"kind\": \"%s\", \"bytes\": %ju, \"seconds\": %.6f, "
           "\"bytes_per_s\": %.0f}\n",
           what, (uintmax_t)bytes, seconds, (double)bytes / seconds);
}

tr_status tr_bench_load(const tr_bench_options *o, tr_err *err)
{
    tr_opened opened = {0};
    reading r = {0};
    double plain = 0;

    tr_status st = o->open.load_format == TR_LOAD_SAFETENSORS
                       ? tr_open_checkpoint(&opened, &o->open, err)
                       : tr_fail(err, TR_E_USAGE,
                                 "bench load reads a checkpoint: not with --load-format dummy");
    if (st != TR_OK) goto done;
    r.checkpoint = opened.checkpoint;
    st = list_pieces(&r, err);
    if (st != TR_OK) goto done;
    const int n_threads = o->open.n_threads > 0 ? o->open.n_threads : omp_get_max_threads();
    st = read_plainly(&r, n_threads, &plain,
                      err); /* once before: both then find the same page cache */
    if (st == TR_OK) st = read_plainly(&r, n_threads, &plain, err);
    if (st != TR_OK) goto done;
    const uint64_t begun = tr_now_ns();
    st = tr_open_weights(&opened, &o->open, NULL, err);
    const double loading = (double)(tr_now_ns() - begun) * 1e-9;
    if (st != TR_OK) goto done;

    printf("# trireme %s, %s, %s\n", PACKAGE_VERSION, o->open.model_dir,
           tr_device_describe(opened.device));
    printf("# %-12s %12s %12s %12s   (page cache warm)\n", "load", "MB", "seconds", "GB/s");
    report("plain read", r.bytes, plain);
    report("load", opened.weights->bytes_read, loading);
    if (o->regions) tr_regions_print(&opened.regions, stdout);

done:
    for (int i = 0; i < r.n_shards && r.fd; i++)
        if (r.fd[i] >= 0) close(r.fd[i]);
    free(r.fd);
    free(r.list);
    tr_opened_close(&opened);
    return st;
}
