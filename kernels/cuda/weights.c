/* Weights, at load: pieces of checkpoint tensors in host memory become row-major matrices on the
 * device (ops.h). */
#include <config.h>

#include "kernels/cuda/cuda_priv.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "kernels/cuda/made.h"

enum { BLOCK = 128 };

static size_t element_bytes(tr_format format)
{
    return format == TR_W_F32 ? 4 : format == TR_W_BF16 ? 2 : 1;
}

size_t tr_cuda_linear_bytes(tr_format format, int n_mats, int n_out, int n_in)
{
    tr_weight_layout l;
    if (n_mats <= 0 || n_out <= 0 || n_in <= 0) return 0;
    return tr_weight_layout_of(&l, format, n_mats, n_out, n_in) ? l.bytes : SIZE_MAX;
}

/* ---- notes --------------------------------------------------------------------------------------------------------- */

/* The first note not before `data`. */
static size_t note_place(const tr_device *d, const void *data)
{
    size_t low = 0, high = d->n_notes;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if ((uintptr_t)d->note[middle].data < (uintptr_t)data)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

const tr_weight_note *tr_cuda_note_find(const tr_device *d, const void *data)
{
    const size_t i = note_place(d, data);
    return i < d->n_notes && d->note[i].data == data ? &d->note[i] : NULL;
}

void tr_cuda_note_drop(tr_device *d, const void *data)
{
    const size_t i = note_place(d, data);
    if (i == d->n_notes || d->note[i].data != data) return;
    free(d->note[i].head);
    memmove(d->note + i, d->note + i + 1, (--d->n_notes - i) * sizeof *d->note);
}

static tr_weight_note *note_take(tr_device *d, const tr_linear *w)
{
    size_t i = note_place(d, w->data), bytes;
    if (i < d->n_notes && d->note[i].data == w->data) return &d->note[i];
    if (d->n_notes == d->notes_room) {
        const size_t room = d->notes_room ? 2 * d->notes_room : 256;
        void *grown = tr_mul(&bytes, room, sizeof *d->note) ? realloc(d->note, bytes) : NULL;
        if (!grown) return NULL;
        d->note = grown;
        d->notes_room = room;
    }
    tr_weight_head *head = tr_calloc((size_t)w->n_mats, sizeof *head);
    if (!head) return NULL;
    memmove(d->note + i + 1, d->note + i, (d->n_notes++ - i) * sizeof *d->note);
    d->note[i] = (tr_weight_note){.data = w->data, .n_mats = w->n_mats, .head = head};
    return &d->note[i];
}

tr_fp8_weight tr_cuda_fp8_weight(const tr_linear *w)
{
    tr_weight_layout l;
    tr_weight_layout_of(&l, w->format, w->n_mats, w->n_out, w->n_in);
    const char *data = w->data;
    return (tr_fp8_weight){.q_d = (const uint8_t *)data + l.numbers,
                           .scale_d = (const float *)(const void *)(data + l.scales),
                           .n_mats = w->n_mats,
                           .n_out = w->n_out,
                           .n_in = w->n_in,
                           .scale_rows = l.scale_rows,
                           .scale_pitch = l.scale_pitch};
}

/* ---- numbers ------------------------------------------------------------------------------------------------------- */

static void copy_element(char *to, const char *from, size_t bytes)
{
    if (bytes == 1)
        *to = *from;
    else
        memcpy(to, from, bytes);
}

/* Rows [o, o + n) of the piece, ld bytes apart. */
static void gather_rows(char *to, size_t ld, const tr_linear_src *s, size_t bytes, int n_in, int o,
                        int n)
{
    const char *from = s->src;
    const size_t width = (size_t)n_in * bytes;
    if (!s->transposed) {
        for (int r = 0; r < n; r++) {
            memcpy(to + (size_t)r * ld, from + (size_t)(o + r) * s->ld * bytes, width);
            memset(to + (size_t)r * ld + width, 0, ld - width);
        }
        return;
    }
    memset(to, 0, (size_t)n * ld);
    for (int i = 0; i < n_in; i++) {
        const char *row = from + ((size_t)i * s->ld + (size_t)o) * bytes;
        for (int r = 0; r < n; r++)
            copy_element(to + (size_t)r * ld + (size_t)i * bytes, row + (size_t)r * bytes, bytes);
    }
}

/* Rows [o, o + n) of [gate; up], 8 at a time, between rows of the other half (tr_fp8_gate_up_row). */
static tr_status send_interleaved(tr_device *d, const tr_linear *w, tr_stage *stage, char *matrix,
                                  size_t ld, int o, int n)
{
    const int inner = w->n_out / 2, up = o >= inner;
    const size_t eight = 8 * ld;
    char *to = matrix + ((size_t)((up ? o - inner : o) / 8 * 2 + up)) * eight;
    cudaError_t e = cudaMemcpy2DAsync(to, 2 * eight, stage->memory, eight, eight, (size_t)(n / 8),
                                      cudaMemcpyHostToDevice, d->stream[TR_LANE_COPY]);
    if (e == cudaSuccess) e = cudaEventRecord(stage->sent, d->stream[TR_LANE_COPY]);
    stage->busy = e == cudaSuccess;
    return tr_cuda_status(d, "linear_pack", e);
}

static tr_status send_numbers(tr_device *d, const tr_linear *w, const tr_weight_layout *l,
                              const tr_linear_src *s, int interleaved)
{
    const size_t ld = (size_t)l->ld;
    const int most = (int)(TR_STAGE_BYTES / ld), step = interleaved ? most / 8 * 8 : most;
    char *matrix = (char *)w->data + l->numbers + (size_t)s->i_mat * l->matrix,
         *to = matrix + (size_t)s->o_begin * ld;
    tr_status st = TR_OK;

    if (step < 1)
        return tr_device_fail(
            d, TR_E_USAGE,
            "linear_pack: rows of %zu bytes, at most %d are what this backend can do", ld,
            TR_STAGE_BYTES);
    for (int o = 0, n; o < s->n_out && st == TR_OK; o += n) {
        tr_stage *stage;
        n = s->n_out - o < step ? s->n_out - o : step;
        st = tr_cuda_stage(d, &stage);
        if (st != TR_OK) break;
        gather_rows(stage->memory, ld, s, element_bytes(w->format), w->n_in, o, n);
        if (interleaved)
            st = send_interleaved(d, w, stage, matrix, ld, s->o_begin + o, n);
        else
            st = tr_cuda_send(d, TR_LANE_COPY, stage, to + (size_t)o * ld, (size_t)n * ld);
    }
    return st;
}

/* ---- scales -------------------------------------------------------------------------------------------------------- */

/* Which piece of the matrix this is, or a new one; *i. */
static tr_status find_piece(tr_device *d, const tr_linear_src *s, tr_weight_head *h, int shift,
                            int *i)
{
    for (*i = h->n - 1; *i >= 0; --*i) {
        const int at = s->o_begin - h->begin[*i];
        const int end = *i + 1 < h->n ? h->begin[*i + 1] : h->end;
        if (at >= 0 && s->o_begin <= end && (at + h->shift[*i]) % BLOCK == shift) return TR_OK;
    }
    if (h->n == 2 || s->o_begin != h->end)
        return tr_device_fail(
            d, TR_E_USAGE,
            "linear_pack: rows %d+%d of matrix %d: e4m3 pieces come in order, and no more than "
            "two begin inside of a scale block",
            s->o_begin, s->n_out, s->i_mat);
    *i = h->n++;
    h->begin[*i] = s->o_begin;
    h->shift[*i] = shift;
    h->base[*i] =
        *i ? h->base[0] + (h->shift[0] + s->o_begin - h->begin[0] + BLOCK - 1) / BLOCK : 0;
    return TR_OK;
}

/* Scale of stored block (down, right) of this piece, counted as the packed matrix lies. */
static float scale_of(const tr_linear_src *s, int down, int right)
{
    const int o0 = (s->transposed ? s->col0 : s->row0) / BLOCK,
              k0 = (s->transposed ? s->row0 : s->col0) / BLOCK;
    const size_t row = (size_t)(s->transposed ? k0 + right : o0 + down),
                 column = (size_t)(s->transposed ? o0 + down : k0 + right);
    return s->scale[row * s->scale_ld + column];
}

/* n rows of blocks to a table of rows `pitch` numbers wide. */
static tr_status send_table(tr_device *d, const tr_linear_src *s, float *to, int n, int blocks,
                            int pitch)
{
    tr_status st = TR_OK;
    const int step = (int)(TR_STAGE_BYTES / sizeof(float)) / pitch;
    for (int r = 0, m; r < n && st == TR_OK; r += m) {
        tr_stage *stage;
        m = n - r < step ? n - r : step;
        st = tr_cuda_stage(d, &stage);
        if (st != TR_OK) break;
        float *row = stage->memory;
        for (int i = 0; i < m; i++, row += pitch)
            for (int b = 0; b < pitch; b++)
                row[b] = b < blocks ? scale_of(s, r + i, b) : 0.0f;
        st = tr_cuda_send(d, TR_LANE_COPY, stage, to + (size_t)r * (size_t)pitch,
                          (size_t)m * (size_t)pitch * sizeof *to);
    }
    return st;
}

/* Whether the FP8 products can have this weight, and how its rows lie: the first piece decides. */
static tr_status note_grid(tr_device *d, const tr_linear *w, const tr_linear_src *s,
                           tr_weight_note *note, int on_grid)
{
    const int inner = w->n_out / 2;
    if (!note->packed) {
        note->on_grid = on_grid && w->n_in % BLOCK == 0;
        note->interleaved = note->on_grid && w->gate_up && w->n_out % (2 * BLOCK) == 0;
    }
    if (note->interleaved && (!on_grid || s->o_begin % BLOCK || s->n_out % BLOCK ||
                              (s->o_begin < inner && s->o_begin + s->n_out > inner)))
        return tr_device_fail(
            d, TR_E_USAGE,
            "linear_pack: rows %d+%d of gate and up: pieces of one half, in whole "
            "scale blocks, are what this backend can do",
            s->o_begin, s->n_out);
    if (!on_grid) note->on_grid = 0;
    return TR_OK;
}

static tr_status send_scales(tr_device *d, const tr_linear *w, const tr_weight_layout *l,
                             const tr_linear_src *s, tr_weight_note *note)
{
    tr_weight_head *h = &note->head[s->i_mat];
    const int shift = (s->transposed ? s->col0 : s->row0) % BLOCK,
              k_shift = (s->transposed ? s->row0 : s->col0) % BLOCK;
    const int rows = (shift + s->n_out + BLOCK - 1) / BLOCK,
              blocks = (k_shift + w->n_in + BLOCK - 1) / BLOCK;
    int i;

    if (h->n > 0 && h->k_shift != k_shift)
        return tr_device_fail(
            d, TR_E_USAGE,
            "linear_pack: pieces of matrix %d begin at columns %d and %d of a scale block",
            s->i_mat, h->k_shift, k_shift);
    tr_status st = find_piece(d, s, h, shift, &i);
    if (st == TR_OK) st = note_grid(d, w, s, note, shift == 0 && k_shift == 0 && h->n == 1);
    if (st != TR_OK) return st;
    if (!note->packed) note->k_shift = k_shift;
    if (note->k_shift != k_shift) note->k_mixed = 1;
    note->packed = 1;
    h->k_shift = k_shift;
    if (s->o_begin + s->n_out > h->end) h->end = s->o_begin + s->n_out;

    char *data = w->data;
    const size_t at = (size_t)(h->base[i] + (s->o_begin - h->begin[i] + h->shift[i]) / BLOCK);
    st = send_table(d, s,
                    (float *)(void *)(data + l->scales) +
                        ((size_t)s->i_mat * (size_t)l->scale_rows + at) * (size_t)l->scale_pitch,
                    rows, blocks, l->scale_pitch);
    if (st == TR_OK)
        st = tr_cuda_upload(d, TR_LANE_COPY, data + (size_t)s->i_mat * sizeof *h, h, sizeof *h);
    return st;
}

/* ---- a piece ------------------------------------------------------------------------------------------------------- */

static tr_status check_piece(tr_device *d, const tr_linear *w, const tr_linear_src *s)
{
    if (!w->data || w->n_in <= 0 || s->i_mat < 0 || s->i_mat >= w->n_mats || s->o_begin < 0 ||
        s->n_out < 0 || s->n_out > w->n_out - s->o_begin)
        return tr_device_fail(d, TR_E_USAGE,
                              "linear_pack: rows %d+%d of matrix %d do not fit %d x [%d, %d]",
                              s->o_begin, s->n_out, s->i_mat, w->n_mats, w->n_out, w->n_in);
    if (s->row0 < 0 || s->col0 < 0)
        return tr_device_fail(d, TR_E_USAGE, "linear_pack: piece begins at row %d, column %d",
                              s->row0, s->col0);
    if (w->format == TR_W_E4M3_B128 && !s->scale)
        return tr_device_fail(d, TR_E_USAGE, "linear_pack: e4m3 weight without scales");
    return TR_OK;
}

/* Of made numbers: written where they belong, by the device. */
static tr_status make_numbers(tr_device *d, const tr_linear *w, const tr_weight_layout *l,
                              const tr_linear_src *s, int interleaved, const tr_made *made)
{
    const tr_cuda_made_args a = {.made = *made,
                                 .to = (char *)w->data + l->numbers + (size_t)s->i_mat * l->matrix,
                                 .row_bytes = (size_t)l->ld,
                                 .number_bytes = (int)element_bytes(w->format),
                                 .n_rows = s->n_out,
                                 .n_in = w->n_in,
                                 .o_begin = s->o_begin,
                                 .inner = interleaved ? w->n_out / 2 : 0};
    return tr_cuda_status(d, "linear_made", tr_cuda_made(&a, d->stream[TR_LANE_COPY]));
}

/* The lanes that compute wait for what has been packed. made NULL: the numbers are at src. */
static tr_status pack(tr_device *d, tr_linear *dst, const tr_linear_src *src, const tr_made *made)
{
    tr_weight_layout l;
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = check_piece(d, dst, src);
    if (st != TR_OK || src->n_out == 0) return st;
    if (!tr_weight_layout_of(&l, dst->format, dst->n_mats, dst->n_out, dst->n_in))
        return tr_device_fail(d, TR_E_USAGE, "linear_pack: a weight that fits no address space");
    tr_weight_note *note = note_take(d, dst);
    if (!note) return tr_device_fail(d, TR_E_MEMORY, "out of memory");
    if (dst->format == TR_W_E4M3_B128) st = send_scales(d, dst, &l, src, note);
    if (st == TR_OK)
        st = made ? make_numbers(d, dst, &l, src, note->interleaved, made)
                  : send_numbers(d, dst, &l, src, note->interleaved);
    if (st == TR_OK) st = tr_cuda_order(d, TR_LANE_COPY, TR_LANE_MAIN);
    return st == TR_OK ? tr_cuda_order(d, TR_LANE_COPY, TR_LANE_SIDE) : st;
}

tr_status tr_cuda_linear_pack(tr_device *d, tr_linear *dst, const tr_linear_src *src)
{
    return pack(d, dst, src, NULL);
}

tr_status tr_cuda_linear_made(tr_device *d, tr_linear *dst, const tr_linear_src *src,
                              const tr_made *made)
{
    return pack(d, dst, src, made);
}

tr_status tr_cuda_table_made(tr_device *d, void *dst, int number_bytes, int n_rows, int n_in,
                             const tr_made *made)
{
    const tr_cuda_made_args a = {.made = *made,
                                 .to = dst,
                                 .row_bytes = (size_t)number_bytes * (size_t)n_in,
                                 .number_bytes = number_bytes,
                                 .n_rows = n_rows,
                                 .n_in = n_in};
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK)
        st = tr_cuda_status(d, "table_made", tr_cuda_made(&a, d->stream[TR_LANE_COPY]));
    if (st == TR_OK) st = tr_cuda_order(d, TR_LANE_COPY, TR_LANE_MAIN);
    return st == TR_OK ? tr_cuda_order(d, TR_LANE_COPY, TR_LANE_SIDE) : st;
}
