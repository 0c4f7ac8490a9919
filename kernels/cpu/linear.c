#include <config.h>

#include <math.h>
#include <string.h>

#include "base/size.h"
#include "kernels/cpu/packed.h"

size_t tr_cpu_linear_bytes(tr_format format, int n_mats, int n_out, int n_in)
{
    size_t bytes;
    if (n_mats <= 0 || n_out <= 0 || n_in <= 0) return 0;
    /* int dimensions of at most 4-byte numbers: a panel cannot wrap, their product can. */
    if (!tr_mul(&bytes, (size_t)tr_n_panels(n_out), tr_panel_bytes(format, n_in)) ||
        !tr_add(&bytes, bytes, TR_PACK_ALIGN) || !tr_mul(&bytes, bytes, (size_t)n_mats))
        return SIZE_MAX; /* more than any alloc gives */
    return bytes;
}

static uint8_t *group_at(const tr_packed *m, uint8_t *block, int k)
{
    return block + m->scale_bytes + (size_t)(k / TR_K_GROUP) * (size_t)m->group_bytes;
}

/* One lane of one block: n columns of row o of the piece, beginning with column k. */
static void pack_lane(const tr_packed *m, tr_format format, const uint8_t *order, uint8_t *block,
                      const tr_linear_src *s, int lane, int o, int k, int n)
{
    const int size = tr_format_bytes(format), per_word = 4 / size;
    const size_t step = s->transposed ? s->ld : 1;
    const char *from = (const char *)s->src;
    size_t at = s->transposed ? (size_t)k * s->ld + (size_t)o : (size_t)o * s->ld + (size_t)k;

    if (format != TR_W_E4M3_B128) {
        for (int i = 0; i < n; i++, at += step) {
            int j = i % TR_K_GROUP;
            uint8_t *to = group_at(m, block, i) + j / per_word * TR_PACK_ALIGN + lane * 4;
            memcpy(to + j % per_word * size, from + at * (size_t)size, (size_t)size);
        }
        return;
    }
    int has_nan = 0;
    for (int i = 0; i < n; i++, at += step) {
        uint8_t code = (uint8_t)from[at];
        has_nan |= (code & 0x7f) == 0x7f;
        group_at(m, block, i)[order[lane * TR_K_GROUP + i % TR_K_GROUP]] = code;
    }
    size_t down = (size_t)(s->row0 + (s->transposed ? k : o)) / TR_K_BLOCK;
    size_t right = (size_t)(s->col0 + (s->transposed ? o : k)) / TR_K_BLOCK;
    float scale = has_nan ? NAN : s->scale[down * s->scale_ld + right];
    memcpy(block + lane * (int)sizeof scale, &scale, sizeof scale);
}

static tr_status check_piece(tr_device *d, const tr_linear *w, const tr_linear_src *s)
{
    if (!w->data || w->n_in <= 0 || s->i_mat < 0 || s->i_mat >= w->n_mats || s->o_begin < 0 ||
        s->n_out < 0 || s->n_out > w->n_out - s->o_begin)
        return tr_cpu_fail(d, TR_E_USAGE,
                           "linear_pack: rows %d+%d of matrix %d do not fit %d x [%d, %d]",
                           s->o_begin, s->n_out, s->i_mat, w->n_mats, w->n_out, w->n_in);
    if (s->row0 < 0 || s->col0 < 0)
        return tr_cpu_fail(d, TR_E_USAGE, "linear_pack: piece begins at row %d, column %d", s->row0,
                           s->col0);
    if (w->format == TR_W_E4M3_B128 && !s->scale)
        return tr_cpu_fail(d, TR_E_USAGE, "linear_pack: e4m3 weight without scales");
    return TR_OK;
}

/* Panels are packed by the threads that will read them in tr_cpu_gemm_all, so that first touch
 * places them. */
tr_status tr_cpu_linear_pack(tr_device *d, tr_linear *dst, const tr_linear_src *src)
{
    tr_status st = check_piece(d, dst, src);
    if (st != TR_OK) return st;

    tr_pack_header *header = tr_packed_header(dst, src->i_mat);
    int origin = src->transposed ? src->row0 : src->col0;
    int k_shift = dst->format == TR_W_E4M3_B128 ? origin % TR_K_BLOCK : 0;
    if (header->magic == TR_PACK_MAGIC && header->k_shift != k_shift)
        return tr_cpu_fail(d, TR_E_USAGE,
                           "linear_pack: pieces of one matrix begin at columns %d and %d of a "
                           "scale block",
                           header->k_shift, k_shift);
    *header = (tr_pack_header){.magic = TR_PACK_MAGIC, .k_shift = k_shift};

    tr_packed m = tr_packed_view(dst, src->i_mat);
    const int o_begin = src->o_begin, o_end = src->o_begin + src->n_out;
    const int n_panels = tr_n_panels(dst->n_out);
#pragma omp parallel for num_threads(d->n_threads) schedule(static)
    for (int panel = 0; panel < n_panels; panel++) {
        int first = panel * TR_PANEL > o_begin ? panel * TR_PANEL : o_begin;
        int last = (panel + 1) * TR_PANEL < o_end ? (panel + 1) * TR_PANEL : o_end;
        uint8_t *block = m.panels + (size_t)panel * m.panel_bytes;
        for (int k = 0, n; first < last && k < m.n_in; k += n, block += tr_block_bytes(&m, n)) {
            n = tr_block_columns(&m, k);
            for (int o = first; o < last; o++)
                pack_lane(&m, dst->format, d->k.e4m3_order, block, src, o % TR_PANEL, o - o_begin,
                          k, n);
        }
    }
    return TR_OK;
}

/* Part i of n of [0, total), as schedule(static) cuts it. */
static int part(int total, int i, int n)
{
    int small = total / n, more = total % n;
    return i * small + (i < more ? i : more);
}

/* Thread i of n: panels are cut first; threads that are left over share the rows. */
static void gemm_part(const tr_device *d, const tr_gemm *g, int i, int n)
{
    const int n_panels = tr_n_panels(g->w->n_out);
    const int columns = n_panels < n ? n_panels : n;
    int row_parts = n / columns < g->n_rows ? n / columns : g->n_rows;
    int i_column = i % columns, i_row = i / columns;

    if (i_row >= row_parts) return;
    tr_gemm mine = *g;
    int r = part(g->n_rows, i_row, row_parts);
    mine.n_rows = part(g->n_rows, i_row + 1, row_parts) - r;
    if (g->row_index)
        mine.row_index += r;
    else
        mine.x += (size_t)r * g->ldx;
    if (g->out_index)
        mine.out_index += r;
    else
        mine.y += (size_t)r * g->ldy;
    d->k.gemm(&mine, part(n_panels, i_column, columns), part(n_panels, i_column + 1, columns));
}

void tr_cpu_gemm_all(tr_device *d, const tr_gemm *g)
{
    if (g->n_rows <= 0) return;
    int n = tr_threads_for(d, (double)g->n_rows * g->w->n_out * g->w->n_in);
    if (n == 1) {
        d->k.gemm(g, 0, tr_n_panels(g->w->n_out));
        return;
    }
#pragma omp parallel for num_threads(n) schedule(static, 1)
    for (int i = 0; i < n; i++)
        gemm_part(d, g, i, n);
}

tr_status tr_cpu_linear(tr_device *d, tr_lane lane, const struct tr_linear_args *a)
{
    (void)lane;
    if (a->in.d != a->w->n_in)
        return tr_cpu_fail(d, TR_E_USAGE, "linear: %d inputs for a weight of %d columns", a->in.d,
                           a->w->n_in);
    tr_gemm g = {
        .w = a->w,
        .x = a->in.x,
        .ldx = a->in.ld,
        .y = a->out,
        .ldy = a->ld_out,
        .n_rows = tr_live_rows(a->n, a->n_max),
    };
    tr_cpu_gemm_all(d, &g);
    return TR_OK;
}
