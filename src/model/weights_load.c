#include <config.h>

#include "model/weights_priv.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "base/stop.h"
#include "kernels/number.h"

void tr_loader_done(tr_loader *l)
{
    free(l->raw);
    free(l->scale);
    l->raw = NULL;
    l->scale = NULL;
}

static tr_status device_fail(const tr_loader *l, tr_status st, const char *name, tr_err *err)
{
    return tr_fail(err, st, "%s: %s", name, l->ops->error(l->device));
}

tr_status tr_loader_alloc(tr_loader *l, const char *name, size_t bytes, void **out, tr_err *err)
{
    struct tr_weights_memory *m = l->weights->memory;

    *out = NULL;
    if (m->n == m->room) {
        size_t room = m->room ? 2 * m->room : 256, n_bytes;
        void **grown = tr_mul(&n_bytes, room, sizeof *grown) ? realloc(m->block, n_bytes) : NULL;
        if (!grown) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", name);
        m->block = grown;
        m->room = room;
    }
    tr_status st = l->ops->alloc(l->device, bytes, 0, out);
    if (st != TR_OK) return device_fail(l, st, name, err);
    m->block[m->n++] = *out;
    l->weights->bytes += bytes;
    return TR_OK;
}

/* ---- from the file into host memory -------------------------------------------------------------------------------- */

static size_t element_bytes(tr_stored stored)
{
    return stored == TR_STORED_F8_E4M3 ? 1 : stored == TR_STORED_BF16 ? 2 : 4;
}

/* `rows` rows of `bytes_row` bytes; what was there is lost. */
static tr_status grow(void **buffer, size_t *bytes, size_t rows, size_t bytes_row, const char *name,
                      tr_err *err)
{
    size_t n;
    bool fits = tr_mul(&n, rows, bytes_row);
    if (fits && n <= *bytes) return TR_OK;
    free(*buffer);
    *bytes = 0;
    *buffer = fits ? malloc(n) : NULL;
    if (!*buffer)
        return tr_fail(err, TR_E_MEMORY, "%s: out of memory for %zu rows of %zu bytes", name, rows,
                       bytes_row);
    *bytes = n;
    return TR_OK;
}

/* The name and place of the tensor's data: the stored tensor itself, or NULL for dummy weights. */
static tr_status locate(const tr_loader *l, const tr_wanted *w, const tr_tensor **tensor,
                        tr_stored *stored, tr_err *err)
{
    *tensor = NULL;
    if (tr_stop_requested())
        return tr_fail(err, TR_E_STOP, "stopped by %s while loading", tr_stop_reason());
    if (l->dummy) {
        *stored = tr_dummy_stored(l->config, w);
        return TR_OK;
    }
    *tensor = tr_checkpoint_find(l->checkpoint, w->name);
    /* tr_wanted_check has seen it; an optional one is not asked for here */
    if (!*tensor) return tr_fail(err, TR_E_INPUT, "%s is missing", w->name);
    *stored = (*tensor)->stored;
    return TR_OK;
}

/* For tensors of few numbers, of which one that is NaN or infinite spoils much: selections pass over NaN scores, and answers
 * would be wrong in silence. numbers: n of the stored tensor `name`. Codes have scales, which are checked; what dummy weights are made
 * of is finite. */
static tr_status check_finite(const tr_loader *l, const char *name, tr_stored stored,
                              const void *numbers, size_t n, tr_err *err)
{
    const uint16_t *h = numbers;
    const float *x = numbers;
    bool finite = true;

    if (l->dummy || (stored != TR_STORED_BF16 && stored != TR_STORED_F32)) return TR_OK;
    for (size_t i = 0; i < n; i++)
        finite &= stored == TR_STORED_BF16 ? (h[i] & 0x7f80) != 0x7f80 : isfinite(x[i]) != 0;
    if (finite) return TR_OK;
    const tr_tensor *t = tr_checkpoint_find(l->checkpoint, name);
    return tr_fail(err, TR_E_INPUT, "%s: %s: has a number that is NaN or infinite",
                   tr_checkpoint_path(l->checkpoint, t), name);
}

static tr_range blocks_of(tr_range r)
{
    int first = r.begin / TR_SCALE_BLOCK;
    return (tr_range){.begin = first, .n = (r.begin + r.n - 1) / TR_SCALE_BLOCK + 1 - first};
}

/* Scales of the blocks that rows and columns touch: [r.n, c.n]. */
static tr_status read_scale(tr_loader *l, const tr_wanted *w, tr_range r, tr_range c, float *to,
                            tr_err *err)
{
    char name[sizeof w->name + 16];
    const size_t n = strlen(w->name);

    if (l->dummy) {
        tr_dummy_scale(l->dummy, w, r.begin, r.n, c.begin, c.n, to);
        return TR_OK;
    }
    memcpy(name, w->name, n);
    memcpy(name + n, "_scale_inv", sizeof "_scale_inv");
    const tr_tensor *t = tr_checkpoint_find(l->checkpoint, name);
    if (!t) return tr_fail(err, TR_E_INPUT, "%s is missing", name);
    l->weights->bytes_read += (uint64_t)r.n * (uint64_t)c.n * sizeof(float);
    tr_status st = tr_checkpoint_read_block(l->checkpoint, t, r.begin, r.n, c.begin, c.n, to, err);
    return st == TR_OK ? check_finite(l, name, TR_STORED_F32, to, (size_t)r.n * (size_t)c.n, err)
                       : st;
}

static tr_status grow_scale(tr_loader *l, size_t rows, size_t columns, const char *name,
                            tr_err *err)
{
    void *room = l->scale;
    tr_status st = grow(&room, &l->scale_bytes, rows, columns * sizeof(float), name, err);
    l->scale = room;
    return st;
}

static tr_status fetch_scale(tr_loader *l, const tr_wanted *w, tr_range rows, tr_range columns,
                             tr_err *err)
{
    const tr_range r = blocks_of(rows), c = blocks_of(columns);
    tr_status st = grow_scale(l, (size_t)r.n, (size_t)c.n, w->name, err);

    l->scale_ld = (size_t)c.n;
    return st == TR_OK ? read_scale(l, w, r, c, l->scale, err) : st;
}

static tr_status fetch(tr_loader *l, const tr_wanted *w, tr_range rows, tr_range columns,
                       tr_err *err)
{
    const tr_tensor *t;
    tr_status st = locate(l, w, &t, &l->stored, err);
    if (st != TR_OK) return st;
    size_t row_bytes = (size_t)columns.n * element_bytes(l->stored);
    size_t bytes = (size_t)rows.n * row_bytes;

    st = grow(&l->raw, &l->raw_bytes, (size_t)rows.n, row_bytes, w->name, err);
    if (st != TR_OK) return st;
    if (!t) {
        tr_dummy_block(l->dummy, w, l->stored, rows.begin, rows.n, columns.begin, columns.n,
                       l->raw);
        l->bytes_made += bytes;
    } else {
        l->weights->bytes_read += bytes;
        st = w->rank == 2 ? tr_checkpoint_read_block(l->checkpoint, t, rows.begin, rows.n,
                                                     columns.begin, columns.n, l->raw, err)
                          : tr_checkpoint_read(l->checkpoint, t, 0, bytes, l->raw, err);
    }
    if (st == TR_OK && l->stored == TR_STORED_F8_E4M3) st = fetch_scale(l, w, rows, columns, err);
    return st;
}

static void tell_progress(const tr_loader *l)
{
    const double bytes = (double)(l->weights->bytes_read + l->bytes_made),
                 seconds = (double)(tr_now_ns() - l->begun_ns) * 1e-9;

    tr_log_progress(l->log, "loading layer %d of %d: %.2f GB %s, %.2f GB/s", l->i_layer,
                    l->n_layers, bytes * 1e-9, l->dummy ? "made up" : "read",
                    seconds > 0.0 ? bytes * 1e-9 / seconds : 0.0);
}

tr_status tr_loader_fetch(tr_loader *l, const tr_wanted *w, tr_range rows, tr_range columns,
                          tr_err *err)
{
    uint64_t before = l->weights->bytes_read + l->bytes_made;

    tr_region_begin(l->regions, l->read_region);
    tr_status st = fetch(l, w, rows, columns, err);
    uint64_t after = l->weights->bytes_read + l->bytes_made;
    tr_region_end(l->regions, (double)(after - before), 0.0);
    tell_progress(l);
    return st;
}

/* ---- from host memory to the device ------------------------------------------------------------------------------- */

/* The host buffer may be used again when this returns. */
static tr_status upload(tr_loader *l, const char *name, void *dst, const void *src, size_t bytes,
                        tr_err *err)
{
    tr_status st = l->ops->upload(l->device, TR_LANE_COPY, dst, src, bytes);
    if (st != TR_OK) return device_fail(l, st, name, err);
    uint64_t ticket = l->ops->ticket(l->device, TR_LANE_COPY);
    while (!l->ops->done(l->device, TR_LANE_COPY, ticket))
        sched_yield();
    return TR_OK;
}

static tr_format format_of(tr_stored stored)
{
    return stored == TR_STORED_F8_E4M3 ? TR_W_E4M3_B128
           : stored == TR_STORED_BF16  ? TR_W_BF16
                                       : TR_W_F32;
}

static tr_status wrong_format(const tr_wanted *w, tr_err *err)
{
    return tr_fail(err, TR_E_INPUT,
                   "%s is not stored in the same format as the tensors it belongs to", w->name);
}

tr_status tr_loader_linear(tr_loader *l, tr_linear *dst, const tr_wanted *w, int n_mats, int n_out,
                           int n_in, tr_err *err)
{
    const tr_tensor *t;
    tr_stored stored;
    tr_status st = locate(l, w, &t, &stored, err);
    if (st != TR_OK) return st;
    *dst = (tr_linear){.format = format_of(stored), .n_mats = n_mats, .n_out = n_out, .n_in = n_in};
    return tr_loader_alloc(l, w->name, l->ops->linear_bytes(dst->format, n_mats, n_out, n_in),
                           &dst->data, err);
}

tr_status tr_loader_pack_fetched(tr_loader *l, tr_linear *dst, const tr_wanted *w, tr_range rows,
                                 tr_range columns, tr_range part, int transposed, int i_mat,
                                 int o_begin, tr_err *err)
{
    size_t ld = (size_t)columns.n;
    int row = rows.begin + part.begin; /* in the stored tensor */
    int block = row / TR_SCALE_BLOCK - rows.begin / TR_SCALE_BLOCK;
    tr_linear_src src = {
        .src = (const char *)l->raw + (size_t)part.begin * ld * element_bytes(l->stored),
        .ld = ld,
        .transposed = transposed,
        .i_mat = i_mat,
        .o_begin = o_begin,
        .n_out = transposed ? columns.n : part.n,
    };
    if (format_of(l->stored) != dst->format) return wrong_format(w, err);
    if (l->stored == TR_STORED_F8_E4M3) {
        src.scale = l->scale + (size_t)block * l->scale_ld;
        src.scale_ld = l->scale_ld;
        src.row0 = row % TR_SCALE_BLOCK;
        src.col0 = columns.begin % TR_SCALE_BLOCK;
    }
    tr_region_begin(l->regions, l->pack_region);
    tr_status st = l->ops->linear_pack(l->device, dst, &src);
    tr_region_end(l->regions, (double)((size_t)part.n * ld * element_bytes(l->stored)), 0.0);
    return st == TR_OK ? TR_OK : device_fail(l, st, w->name, err);
}

/* Rows of a chunk: whole scale blocks, so that no scale is read twice. */
static int chunk_rows(const tr_loader *l, tr_range columns)
{
    size_t row_bytes = (size_t)columns.n * sizeof(float); /* at most */
    size_t rows = l->chunk_bytes / row_bytes / TR_SCALE_BLOCK * TR_SCALE_BLOCK;
    return rows ? (int)rows : TR_SCALE_BLOCK;
}

/* ---- from the file to the device by the device's threads ----------------------------------------------------------- */

typedef struct rows_of { /* of a tensor, for tr_rows_fn */
    tr_loader *l;
    const tr_wanted *w;
    const tr_tensor *tensor; /* NULL: dummy */
    tr_range rows, columns;
    tr_stored stored;
    bool finite;
    pthread_mutex_t lock;
    int bad_row; /* the first that failed, and why; rows.n: none */
    tr_err why;
} rows_of;

static tr_status read_rows(void *ctx, int row, int n, void *dst)
{
    rows_of *r = ctx;
    tr_status st = TR_OK;
    tr_err why;

    if (tr_stop_requested()) /* many tensors are on their way at once, and a file may be slow */
        st = tr_fail(&why, TR_E_STOP, "stopped by %s while loading", tr_stop_reason());
    else if (r->tensor)
        st = tr_checkpoint_read_block(r->l->checkpoint, r->tensor, r->rows.begin + row, n,
                                      r->columns.begin, r->columns.n, dst, &why);
    else
        tr_dummy_block(r->l->dummy, r->w, r->stored, r->rows.begin + row, n, r->columns.begin,
                       r->columns.n, dst);
    if (st == TR_OK && r->finite)
        st = check_finite(r->l, r->w->name, r->stored, dst, (size_t)n * (size_t)r->columns.n, &why);
    if (st == TR_OK) return TR_OK;
    pthread_mutex_lock(&r->lock);
    if (row < r->bad_row) {
        r->bad_row = row;
        r->why = why;
    }
    pthread_mutex_unlock(&r->lock);
    return st;
}

/* Counted and told as a fetch is. A failure of reading is told before one of the device, the first tensor's first. */
static tr_status rows_done(rows_of *r, int n, tr_status st, tr_err *err)
{
    tr_loader *l = r->l;
    uint64_t bytes = 0;
    int bad = -1;

    for (int i = n; i-- > 0;) {
        const uint64_t here =
            (uint64_t)r[i].rows.n * (uint64_t)r[i].columns.n * (uint64_t)element_bytes(r[i].stored);
        bytes += here;
        if (r[i].tensor)
            l->weights->bytes_read += here;
        else
            l->bytes_made += here;
        if (r[i].bad_row < r[i].rows.n) bad = i;
        pthread_mutex_destroy(&r[i].lock);
    }
    tr_region_end(l->regions, (double)bytes, 0.0);
    tell_progress(l);
    if (st == TR_OK) return TR_OK;
    return bad >= 0 ? tr_fail(err, r[bad].why.status, "%s", r[bad].why.text)
                    : device_fail(l, st, r->w->name, err);
}

/* Where the pieces' rows come from, and their scales. */
static tr_status begin_fill(tr_loader *l, const tr_linear *dst, const tr_piece *p, int n,
                            rows_of *r, tr_linear_src *src, tr_err *err)
{
    size_t n_scales = 0, at = 0;
    tr_status st = TR_OK;

    for (int i = 0; i < n && st == TR_OK; i++) {
        r[i] = (rows_of){.l = l, .w = &p[i].w, .rows = p[i].rows, .columns = p[i].columns};
        r[i].bad_row = p[i].rows.n;
        r[i].finite = p[i].finite;
        st = locate(l, r[i].w, &r[i].tensor, &r[i].stored, err);
        if (st == TR_OK && format_of(r[i].stored) != dst->format) st = wrong_format(r[i].w, err);
        n_scales += (size_t)blocks_of(p[i].rows).n * (size_t)blocks_of(p[i].columns).n;
    }
    const int scaled = st == TR_OK && dst->format == TR_W_E4M3_B128;
    if (scaled) st = grow_scale(l, n_scales, 1, p->w.name, err);
    for (int i = 0; i < n && st == TR_OK; i++) {
        const tr_range rows = blocks_of(p[i].rows), columns = blocks_of(p[i].columns);
        src[i] = (tr_linear_src){.ld = (size_t)p[i].columns.n,
                                 .i_mat = p[i].i_mat,
                                 .o_begin = p[i].o_begin,
                                 .n_out = p[i].rows.n};
        if (!scaled) continue;
        src[i].scale = l->scale + at;
        src[i].scale_ld = (size_t)columns.n;
        src[i].row0 = p[i].rows.begin % TR_SCALE_BLOCK;
        src[i].col0 = p[i].columns.begin % TR_SCALE_BLOCK;
        st = read_scale(l, r[i].w, rows, columns, l->scale + at, err);
        at += (size_t)rows.n * (size_t)columns.n;
    }
    return st;
}

static tr_status fill(tr_loader *l, tr_linear *dst, const tr_piece *p, int n, tr_err *err)
{
    tr_linear_src src[TR_PIECES_MAX];
    void *ctx[TR_PIECES_MAX];
    rows_of *r = tr_calloc((size_t)n, sizeof *r);

    if (!r) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", p->w.name);
    tr_status st = begin_fill(l, dst, p, n, r, src, err);
    if (st != TR_OK) goto done;
    for (int i = 0; i < n; i++) {
        pthread_mutex_init(&r[i].lock, NULL);
        ctx[i] = &r[i];
    }
    tr_region_begin(l->regions, l->fill_region);
    st = rows_done(r, n, l->ops->linear_fill(l->device, dst, src, n, read_rows, ctx), err);

done:
    free(r);
    return st;
}

/* Where the backend wants whole pieces. */
static tr_status pack_piece(tr_loader *l, tr_linear *dst, const tr_piece *p, tr_err *err)
{
    const int step = chunk_rows(l, p->columns);
    tr_status st = TR_OK;

    for (int done = 0, n = 0; done < p->rows.n && st == TR_OK; done += n) {
        tr_range chunk = {.begin = p->rows.begin + done};
        /* A slice that begins inside a block first goes to the block's end. */
        n = step - chunk.begin % TR_SCALE_BLOCK;
        if (n > p->rows.n - done) n = p->rows.n - done;
        chunk.n = n;
        st = tr_loader_fetch(l, &p->w, chunk, p->columns, err);
        if (st == TR_OK && p->finite)
            st = check_finite(l, p->w.name, l->stored, l->raw, (size_t)n * (size_t)p->columns.n,
                              err);
        if (st != TR_OK) break;
        st = tr_loader_pack_fetched(l, dst, &p->w, chunk, p->columns, tr_whole(n), 0, p->i_mat,
                                    p->o_begin + done, err);
    }
    return st;
}

/* Dummy numbers that the device makes where they belong; their scales are few, and the host's. */
static tr_status make_piece(tr_loader *l, tr_linear *dst, const tr_piece *p, tr_err *err)
{
    const tr_stored stored = tr_dummy_stored(l->config, &p->w);
    const uint64_t bytes =
        (uint64_t)p->rows.n * (uint64_t)p->columns.n * (uint64_t)element_bytes(stored);
    tr_linear_src src = {.i_mat = p->i_mat, .o_begin = p->o_begin, .n_out = p->rows.n};
    tr_made made;

    if (tr_stop_requested())
        return tr_fail(err, TR_E_STOP, "stopped by %s while loading", tr_stop_reason());
    if (format_of(stored) != dst->format) return wrong_format(&p->w, err);
    if (stored == TR_STORED_F8_E4M3) {
        tr_status st = fetch_scale(l, &p->w, p->rows, p->columns, err);
        if (st != TR_OK) return st;
        src.scale = l->scale;
        src.scale_ld = l->scale_ld;
        src.row0 = p->rows.begin % TR_SCALE_BLOCK;
        src.col0 = p->columns.begin % TR_SCALE_BLOCK;
    }
    tr_dummy_made(l->dummy, &p->w, stored, p->rows.begin, p->columns.begin, &made);
    tr_region_begin(l->regions, l->pack_region);
    tr_status st = l->ops->linear_made(l->device, dst, &src, &made);
    tr_region_end(l->regions, (double)bytes, 0.0);
    l->bytes_made += bytes;
    tell_progress(l);
    return st == TR_OK ? TR_OK : device_fail(l, st, p->w.name, err);
}

tr_status tr_loader_pack(tr_loader *l, tr_linear *dst, const tr_piece *piece, int n_pieces,
                         tr_err *err)
{
    tr_status st = TR_OK;

    const bool made = l->dummy && l->ops->linear_made;

    if (!made && l->ops->linear_fill) return fill(l, dst, piece, n_pieces, err);
    for (int i = 0; i < n_pieces && st == TR_OK; i++)
        st = made ? make_piece(l, dst, &piece[i], err) : pack_piece(l, dst, &piece[i], err);
    return st;
}

tr_status tr_loader_vector(tr_loader *l, float **out, tr_role role, int layer, tr_err *err)
{
    tr_wanted w;
    void *memory;

    tr_wanted_get(&w, l->config, role, layer, 0);
    size_t n = (size_t)w.shape[0], bytes = n * sizeof(float);
    tr_status st = tr_loader_fetch(l, &w, tr_whole(1), tr_whole(w.shape[0]), err);
    if (st == TR_OK) st = check_finite(l, w.name, l->stored, l->raw, n, err);
    if (st != TR_OK) return st;
    if (l->stored == TR_STORED_BF16) {
        /* Widen in place, from the end: element i moves up from byte 2 i to byte 4 i. */
        if (bytes > l->raw_bytes) {
            void *grown = realloc(l->raw, bytes);
            if (!grown) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", w.name);
            l->raw = grown;
            l->raw_bytes = bytes;
        }
        const uint16_t *from = l->raw;
        float *to = l->raw;
        for (size_t i = n; i-- > 0;) {
            float x = tr_bf16_to_f32(from[i]);
            memcpy(&to[i], &x, sizeof x);
        }
    }
    st = tr_loader_alloc(l, w.name, bytes, &memory, err);
    if (st != TR_OK) return st;
    *out = memory;
    return upload(l, w.name, memory, l->raw, bytes, err);
}

tr_status tr_loader_table(tr_loader *l, void **out, tr_dtype *dtype, const tr_wanted *w,
                          tr_err *err)
{
    const tr_tensor *t;
    tr_stored stored;
    size_t row_bytes, bytes;

    tr_status st = locate(l, w, &t, &stored, err);
    if (st != TR_OK) return st;
    *dtype = stored == TR_STORED_BF16 ? TR_BF16 : TR_F32;
    if (!tr_mul(&row_bytes, (size_t)w->shape[1], element_bytes(stored)) ||
        !tr_mul(&bytes, (size_t)w->shape[0], row_bytes))
        return tr_fail(err, TR_E_MEMORY, "%s is too large", w->name);
    st = tr_loader_alloc(l, w->name, bytes, out, err);
    if (st == TR_OK && l->ops->table_fill) {
        rows_of r = {.l = l, .w = w, .tensor = t, .stored = stored, .bad_row = (int)w->shape[0]};
        r.rows = tr_whole(w->shape[0]);
        r.columns = tr_whole(w->shape[1]);
        pthread_mutex_init(&r.lock, NULL);
        tr_region_begin(l->regions, l->fill_region);
        st = l->ops->table_fill(l->device, *out, row_bytes, r.rows.n, read_rows, &r);
        return rows_done(&r, 1, st, err);
    }
    if (st == TR_OK && l->dummy && l->ops->table_made) {
        tr_made made;
        tr_dummy_made(l->dummy, w, stored, 0, 0, &made);
        l->bytes_made += bytes;
        st = l->ops->table_made(l->device, *out, (int)element_bytes(stored), (int)w->shape[0],
                                (int)w->shape[1], &made);
        return st == TR_OK ? TR_OK : device_fail(l, st, w->name, err);
    }
    int step = chunk_rows(l, tr_whole(w->shape[1]));
    for (int row = 0; row < w->shape[0] && st == TR_OK; row += step) {
        int n = (int)w->shape[0] - row < step ? (int)w->shape[0] - row : step;
        st = tr_loader_fetch(l, w, (tr_range){.begin = row, .n = n}, tr_whole(w->shape[1]), err);
        if (st == TR_OK)
            st = upload(l, w->name, (char *)*out + (size_t)row * row_bytes, l->raw,
                        (size_t)n * row_bytes, err);
    }
    return st;
}
