/* Inside of weight loading: the loader, shared by weights.c (which layer has which matrices) and weights_load.c (how one
 * tensor gets from the file into device memory), and by their test. Not for others. */
#ifndef TR_MODEL_WEIGHTS_PRIV_H
#define TR_MODEL_WEIGHTS_PRIV_H

#include "model/dummy.h"
#include "model/tensors.h"
#include "model/weights.h"

struct tr_weights_memory { /* every block of device memory the weights hold */
    void **block;
    size_t n, room;
};

typedef struct tr_loader {
    const tr_config *config;
    const tr_slice *slice;
    const tr_checkpoint *checkpoint; /* one of these two is NULL */
    const tr_dummy *dummy;
    tr_device *device;
    const tr_ops *ops;
    tr_log *log;
    tr_regions *regions;
    int read_region, pack_region, fill_region;
    tr_weights *weights; /* counts and memory go here */
    size_t chunk_bytes;  /* of a tensor in host memory at a time, at most (but always 128 rows) */
    int i_layer, n_layers;
    uint64_t begun_ns, bytes_made; /* made: by dummy */

    /* What tr_loader_fetch leaves: rows x columns of a tensor in its stored format, and the scales of the blocks they
     * touch, [scale rows, scale_ld]. Host memory, grown as needed, overwritten by the next fetch. */
    void *raw;
    size_t raw_bytes;
    float *scale;
    size_t scale_bytes, scale_ld;
    tr_stored stored;
} tr_loader;

/* The whole of a length (a range from 0). */
static inline tr_range tr_whole(int64_t n)
{
    return (tr_range){.begin = 0, .n = (int)n};
}

tr_status tr_loader_alloc(tr_loader *l, const char *name, size_t bytes, void **out, tr_err *err);

/* Stored rows and columns into l->raw and l->scale. Rank 1: one row. */
tr_status tr_loader_fetch(tr_loader *l, const tr_wanted *w, tr_range rows, tr_range columns,
                          tr_err *err);

/* Device memory for n_mats matrices [n_out, n_in] in the format in which w is stored. */
tr_status tr_loader_linear(tr_loader *l, tr_linear *dst, const tr_wanted *w, int n_mats, int n_out,
                           int n_in, tr_err *err);

/* Rows and columns of a stored tensor become rows [o_begin, o_begin + rows.n) of matrix i_mat. */
typedef struct tr_piece {
    tr_wanted w;
    tr_range rows, columns;
    int i_mat, o_begin;
    bool finite; /* a small BF16 or F32 matrix: NaN and infinity are refused */
} tr_piece;

enum { TR_PIECES_MAX = 64 };

/* Up to TR_PIECES_MAX pieces of one linear, read in chunks: by all threads at once where the device reads by itself. */
tr_status tr_loader_pack(tr_loader *l, tr_linear *dst, const tr_piece *piece, int n_pieces,
                         tr_err *err);

/* Part of what was fetched last: its rows [first, first + n) of the fetch, which began at stored row `row0`, as a matrix
 * of dst, or transposed as one. */
tr_status tr_loader_pack_fetched(tr_loader *l, tr_linear *dst, const tr_wanted *w, tr_range rows,
                                 tr_range columns, tr_range part, int transposed, int i_mat,
                                 int o_begin, tr_err *err);

/* A vector, as fp32. */
tr_status tr_loader_vector(tr_loader *l, float **out, tr_role role, int layer, tr_err *err);

/* A table of rows as it is stored (BF16 or F32), row-major: the embedding. */
tr_status tr_loader_table(tr_loader *l, void **out, tr_dtype *dtype, const tr_wanted *w,
                          tr_err *err);

void tr_loader_done(tr_loader *l);

#endif
