/* A backend whose order of weights is none: matrices become fp32, row-major, as the comment of tr_linear_src says. For
 * tests of loading; it has no operations. Include after cmocka.h. */
#ifndef TR_TESTS_FAKE_OPS_H
#define TR_TESTS_FAKE_OPS_H

#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/number.h"

struct tr_device {
    int n_live, n_alloc, fail_at; /* the fail_at-th allocation fails; 0: none */
    size_t bytes;
};

static inline tr_status fake_alloc(tr_device *d, size_t bytes, int kind, void **out)
{
    (void)kind;
    if (++d->n_alloc == d->fail_at) return TR_E_MEMORY;
    *out = malloc(bytes);
    if (!*out) return TR_E_MEMORY;
    memset(*out, 0xff, bytes); /* NaN: what nobody wrote shows */
    d->n_live++;
    d->bytes += bytes;
    return TR_OK;
}

static inline void fake_release(tr_device *d, void *p)
{
    d->n_live--;
    free(p);
}

static inline tr_status fake_upload(tr_device *d, tr_lane lane, void *dst, const void *src,
                                    size_t n)
{
    (void)d;
    (void)lane;
    memcpy(dst, src, n);
    return TR_OK;
}

static inline uint64_t fake_ticket(tr_device *d, tr_lane lane)
{
    (void)d;
    (void)lane;
    return 1;
}

static inline int fake_done(tr_device *d, tr_lane lane, uint64_t ticket)
{
    (void)d;
    (void)lane;
    return ticket == 1;
}

static inline const char *fake_error(const tr_device *d)
{
    (void)d;
    return "no memory left on the fake device";
}

static inline size_t fake_linear_bytes(tr_format format, int n_mats, int n_out, int n_in)
{
    (void)format;
    return (size_t)n_mats * (size_t)n_out * (size_t)n_in * sizeof(float);
}

static inline tr_status fake_linear_pack(tr_device *d, tr_linear *dst, const tr_linear_src *s)
{
    (void)d;
    assert_true(s->i_mat >= 0 && s->i_mat < dst->n_mats);
    assert_true(s->o_begin >= 0 && s->n_out > 0 && s->o_begin + s->n_out <= dst->n_out);
    assert_true((s->scale != NULL) == (dst->format == TR_W_E4M3_B128));
    assert_true(s->row0 >= 0 && s->row0 < 128 && s->col0 >= 0 && s->col0 < 128);
    float value[256];
    for (int code = 0; code < 256; code++)
        value[code] = tr_e4m3_to_f32((uint8_t)code);
    float *to = (float *)dst->data + ((size_t)s->i_mat * dst->n_out + s->o_begin) * dst->n_in;
    for (int o = 0; o < s->n_out; o++)
        for (int i = 0; i < dst->n_in; i++) {
            int row = s->transposed ? i : o, col = s->transposed ? o : i;
            size_t at = (size_t)row * s->ld + (size_t)col;
            float x;
            if (dst->format == TR_W_E4M3_B128)
                x = value[((const uint8_t *)s->src)[at]] *
                    s->scale[(size_t)((s->row0 + row) / 128) * s->scale_ld +
                             (size_t)((s->col0 + col) / 128)];
            else if (dst->format == TR_W_BF16)
                x = tr_bf16_to_f32(((const uint16_t *)s->src)[at]);
            else
                x = ((const float *)s->src)[at];
            to[(size_t)o * dst->n_in + i] = x;
        }
    return TR_OK;
}

static const tr_ops fake_ops = {
    .name = "fake",
    .alloc = fake_alloc,
    .release = fake_release,
    .upload = fake_upload,
    .ticket = fake_ticket,
    .done = fake_done,
    .error = fake_error,
    .linear_bytes = fake_linear_bytes,
    .linear_pack = fake_linear_pack,
};

/* A backend that reads rows itself, a few at a time, the last ones first. */
static inline tr_status filling_piece(tr_device *d, tr_linear *dst, const tr_linear_src *s,
                                      tr_rows_fn *rows, void *ctx)
{
    const size_t element = dst->format == TR_W_E4M3_B128 ? 1 : dst->format == TR_W_BF16 ? 2 : 4;
    char *buffer = malloc(5 * s->ld * element);
    tr_status st = TR_OK;

    assert_non_null(buffer);
    assert_int_equal(s->ld, dst->n_in);
    assert_false(s->transposed);
    for (int end = s->n_out, n; end > 0 && st == TR_OK; end -= n) {
        n = end < 5 ? end : 5;
        tr_linear_src piece = *s;
        piece.src = buffer;
        piece.n_out = n;
        piece.o_begin += end - n;
        piece.scale += s->scale ? (s->row0 + end - n) / 128 * (ptrdiff_t)s->scale_ld : 0;
        piece.row0 = (s->row0 + end - n) % 128;
        st = rows(ctx, end - n, n, buffer);
        if (st == TR_OK) st = fake_linear_pack(d, dst, &piece);
    }
    free(buffer);
    return st;
}

static inline tr_status filling_linear(tr_device *d, tr_linear *dst, const tr_linear_src *s, int n,
                                       tr_rows_fn *rows, void *const *ctx)
{
    tr_status st = TR_OK;
    for (int i = n; i-- > 0 && st == TR_OK;)
        st = filling_piece(d, dst, &s[i], rows, ctx[i]);
    return st;
}

static inline tr_status filling_table(tr_device *d, void *dst, size_t row_bytes, int n_rows,
                                      tr_rows_fn *rows, void *ctx)
{
    tr_status st = TR_OK;
    (void)d;
    for (int row = n_rows; row-- > 0 && st == TR_OK;)
        st = rows(ctx, row, 1, (char *)dst + (size_t)row * row_bytes);
    return st;
}

static const tr_ops filling_ops = {
    .name = "filling",
    .alloc = fake_alloc,
    .release = fake_release,
    .upload = fake_upload,
    .ticket = fake_ticket,
    .done = fake_done,
    .error = fake_error,
    .linear_bytes = fake_linear_bytes,
    .linear_pack = fake_linear_pack,
    .linear_fill = filling_linear,
    .table_fill = filling_table,
};

#endif
