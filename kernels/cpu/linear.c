#include <config.h>

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
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

/* ---- packing ---- */

/* A block of up to 16 lanes of one panel: n columns from column k, lanes [lane, lane_end), the first of them being row o
 * of the piece. */
typedef struct pack_block {
    const tr_device *d;
    const tr_packed *m;
    tr_format format;
    const tr_linear_src *s;
    uint8_t *at;
    int lane, lane_end, o, k, n;
} pack_block;

/* A transposed piece is turned into rows first, a row short of a 32-bit word is filled up with zeros: [16][128] numbers,
 * whatever a number is. */
typedef struct pack_rows {
    uint8_t room[TR_PANEL * TR_K_BLOCK * 4];
} pack_rows;

static size_t source_at(const pack_block *b, int lane, int i)
{
    size_t o = (size_t)(b->o + lane - b->lane), k = (size_t)(b->k + i);
    return b->s->transposed ? k * b->s->ld + o : o * b->s->ld + k;
}

#define GATHER_COLUMNS(type)                                                                       \
    for (int i = 0; i < b->n; i++) {                                                               \
        type *to = (type *)(void *)rows->room + i;                                                 \
        const type *column = (const type *)b->s->src + source_at(b, b->lane, i);                   \
        for (int l = b->lane; l < b->lane_end; l++)                                                \
            to[l * TR_K_BLOCK] = column[l - b->lane];                                              \
    }

/* Where the numbers of each lane stand in a row. Rows that are not in memory like that are put together in *rows. */
static void find_rows(const pack_block *b, pack_rows *rows, const uint8_t *row[TR_PANEL])
{
    const int size = tr_format_bytes(b->format), row_bytes = TR_K_BLOCK * size;
    const size_t bytes = (size_t)(b->n * size);

    if (!b->s->transposed && bytes % 4 == 0) {
        for (int l = b->lane; l < b->lane_end; l++)
            row[l] = (const uint8_t *)b->s->src + source_at(b, l, 0) * (size_t)size;
        return;
    }
    for (int l = b->lane; l < b->lane_end; l++) {
        uint8_t *to = rows->room + l * row_bytes;
        row[l] = to;
        if (bytes % 4) memset(to + bytes / 4 * 4, 0, 4); /* columns that fill up the last word */
        if (!b->s->transposed)
            memcpy(to, (const uint8_t *)b->s->src + source_at(b, l, 0) * (size_t)size, bytes);
    }
    if (!b->s->transposed) return;
    if (size == 1) {
        GATHER_COLUMNS(uint8_t)
    } else if (size == 2) {
        GATHER_COLUMNS(uint16_t)
    } else {
        GATHER_COLUMNS(uint32_t)
    }
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));

static inline bytes16 load16(const uint8_t *at)
{
    bytes16 x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* Bytes, and pairs of bytes, of two vectors by turns: of their lower halves, of their upper ones. */
/* clang-format off */
#define LOW1(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH1(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW2(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23)
#define HIGH2(a, b) __builtin_shufflevector(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31)
/* clang-format on */

/* All lanes of a transposed piece of e4m3: a column of it is 16 lanes beside each other, four of them make a group. */
static void interleave_columns(const pack_block *b, uint8_t *groups)
{
    const uint8_t *column = (const uint8_t *)b->s->src + source_at(b, b->lane, 0);

    for (int i = 0; i < b->n; i += TR_K_GROUP, groups += TR_PACK_ALIGN) {
        bytes16 c[TR_K_GROUP] = {{0}};
        for (int j = 0; j < TR_K_GROUP && i + j < b->n; j++)
            c[j] = load16(column + (size_t)(i + j) * b->s->ld);
        const bytes16 even = LOW1(c[0], c[1]), odd = LOW1(c[2], c[3]),
                      even_high = HIGH1(c[0], c[1]), odd_high = HIGH1(c[2], c[3]);
        const bytes16 out[4] = {LOW2(even, odd), HIGH2(even, odd), LOW2(even_high, odd_high),
                                HIGH2(even_high, odd_high)};
        memcpy(groups, out, sizeof out);
    }
}

static float scale_of(const pack_block *b, int lane)
{
    const tr_linear_src *s = b->s;
    const int o = b->o + lane - b->lane;
    const size_t down = (size_t)(s->row0 + (s->transposed ? b->k : o)) / TR_K_BLOCK;
    const size_t right = (size_t)(s->col0 + (s->transposed ? o : b->k)) / TR_K_BLOCK;
    return s->scale[down * s->scale_ld + right];
}

/* nan: a bit for every lane in which there is one. */
static void pack_scales(const pack_block *b, unsigned nan)
{
    /* where the lanes' scale block ends, the next one's scale begins */
    const int from = b->o + (b->s->transposed ? b->s->col0 : b->s->row0);
    float scale = 0;

    for (int l = b->lane; l < b->lane_end; l++) {
        if (l == b->lane || (from + l - b->lane) % TR_K_BLOCK == 0) scale = scale_of(b, l);
        const float here = nan >> l & 1 ? NAN : scale;
        memcpy(b->at + l * (int)sizeof here, &here, sizeof here);
    }
}

/* Some lanes of a panel, beside others that are there already: word by word, or, e4m3, byte by byte. Returns the lanes
 * with a NaN code. */
static unsigned pack_lanes(const pack_block *b, const uint8_t *const row[TR_PANEL])
{
    const tr_cpu_kernels *k = &b->d->k;
    const int n_words = (b->n * tr_format_bytes(b->format) + 3) / 4;
    unsigned nan = 0;

    for (int l = b->lane; l < b->lane_end; l++) {
        uint8_t *group = b->at + b->m->scale_bytes;
        for (int w = 0; w < n_words; w++, group += TR_PACK_ALIGN) {
            const uint8_t *word = row[l] + 4 * w;
            if (b->format != TR_W_E4M3_B128)
                memcpy(group + 4 * l, word, 4);
            else
                for (int j = 0; j < TR_K_GROUP; j++) {
                    group[k->e4m3_order[l * TR_K_GROUP + j]] = tr_e4m3_packed(k, word[j]);
                    nan |= (unsigned)((word[j] & 0x7f) == 0x7f) << l;
                }
        }
    }
    return nan;
}

static void pack(const pack_block *b)
{
    const int n_words = (b->n * tr_format_bytes(b->format) + 3) / 4;
    uint8_t *groups = b->at + b->m->scale_bytes;
    const uint8_t *row[TR_PANEL] = {NULL};
    const int e4m3 = b->format == TR_W_E4M3_B128, all = b->lane_end - b->lane == TR_PANEL;
    TR_SCRATCH pack_rows rows;
    unsigned nan = 0;

    /* Panels are written once, far from any cache: the block after the next is asked for, to be written. */
    const int block_bytes = b->m->scale_bytes + n_words * TR_PACK_ALIGN;
    for (int i = 0; i < block_bytes; i += TR_PACK_ALIGN)
        __builtin_prefetch(b->at + 2 * block_bytes + i, 1, 3);
    if (all && e4m3 && b->s->transposed) {
        interleave_columns(b, groups);
    } else {
        find_rows(b, &rows, row);
        if (all) b->d->k.transpose(groups, row, n_words);
    }
    if (!all)
        nan = pack_lanes(b, row);
    else if (e4m3)
        nan = b->d->k.e4m3_arrange(groups, n_words);
    if (e4m3) pack_scales(b, nan);
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

/* What lies of a piece in a panel; `first`: the row of the piece that stands at src. */
static void pack_panel(tr_device *d, const tr_linear *dst, const tr_packed *m,
                       const tr_linear_src *s, int panel, int first)
{
    const int o = panel * TR_PANEL, o_end = s->o_begin + s->n_out;
    pack_block b = {.d = d, .m = m, .format = dst->format, .s = s};

    b.lane = o > s->o_begin ? 0 : s->o_begin - o;
    b.lane_end = o_end - o < TR_PANEL ? o_end - o : TR_PANEL;
    b.o = o + b.lane - s->o_begin - first;
    b.at = m->panels + (size_t)panel * m->panel_bytes;
    for (b.k = 0; b.lane < b.lane_end && b.k < m->n_in; b.k += b.n) {
        b.n = tr_block_columns(m, b.k);
        pack(&b);
        b.at += tr_block_bytes(m, b.n);
    }
}

/* Pieces of one linear. */
typedef struct pack_work {
    tr_device *d;
    const tr_linear *dst;
    const tr_linear_src *src;
    int n_src;
    tr_rows_fn *rows; /* fill: where rows of src[i] come from, with ctx[i] */
    void *const *ctx;
    atomic_int status;
} pack_work;

/* Panels that the piece has a part in and that member i of n owns: those that it will read in tr_cpu_gemm_all, so that
 * first touch places them. */
static void own_panels(const pack_work *w, const tr_linear_src *s, int i, int n, int *begin,
                       int *end)
{
    const int n_panels = tr_n_panels(w->dst->n_out), last = tr_n_panels(s->o_begin + s->n_out);

    *begin = tr_team_part(n_panels, i, n);
    *end = tr_team_part(n_panels, i + 1, n);
    if (*begin < s->o_begin / TR_PANEL) *begin = s->o_begin / TR_PANEL;
    if (*end > last) *end = last;
}

static void pack_member(void *ctx, int i, int n)
{
    const pack_work *w = ctx;
    const tr_packed m = tr_packed_view(w->dst, w->src->i_mat);
    int panel, end;

    for (own_panels(w, w->src, i, n, &panel, &end); panel < end; panel++)
        pack_panel(w->d, w->dst, &m, w->src, panel, 0);
}

static int shift_of(const tr_linear *dst, const tr_linear_src *src)
{
    const int origin = src->transposed ? src->row0 : src->col0;
    return dst->format == TR_W_E4M3_B128 ? origin % TR_K_BLOCK : 0;
}

static tr_status begin_piece(tr_device *d, tr_linear *dst, const tr_linear_src *src)
{
    tr_status st = check_piece(d, dst, src);
    if (st != TR_OK) return st;

    tr_pack_header *header = tr_packed_header(dst, src->i_mat);
    const int k_shift = shift_of(dst, src);
    if (header->magic == TR_PACK_MAGIC && header->k_shift != k_shift)
        return tr_cpu_fail(d, TR_E_USAGE,
                           "linear_pack: pieces of one matrix begin at columns %d and %d of a "
                           "scale block",
                           header->k_shift, k_shift);
    *header = (tr_pack_header){.magic = TR_PACK_MAGIC, .k_shift = k_shift};
    return TR_OK;
}

tr_status tr_cpu_linear_pack(tr_device *d, tr_linear *dst, const tr_linear_src *src)
{
    tr_status st = begin_piece(d, dst, src);
    if (st != TR_OK) return st;
    pack_work w = {.d = d, .dst = dst, .src = src, .n_src = 1};
    tr_device_run(d, (double)src->n_out * dst->n_in, pack_member, &w);
    return TR_OK;
}

/* ---- reading and packing by the same thread ---- */

enum { FILL_BYTES = 512 << 10 }; /* of rows that are read before they are packed: they stay in L2 */

/* Rows of the panels [panel, end) to the buffer, then into their panels. */
static tr_status fill_panels(const pack_work *w, const tr_packed *m, int i_src, int panel, int end,
                             void *buffer)
{
    const tr_linear_src *s = &w->src[i_src];
    const int from = panel * TR_PANEL - s->o_begin, to = end * TR_PANEL - s->o_begin;
    const int first = from > 0 ? from : 0, n = (to < s->n_out ? to : s->n_out) - first;
    tr_linear_src here = *s;
    tr_status st = w->rows(w->ctx[i_src], first, n, buffer);

    here.src = buffer;
    here.row0 += first;
    for (; panel < end && st == TR_OK; panel++)
        pack_panel(w->d, w->dst, m, &here, panel, first);
    return st;
}

static size_t rows_bytes(const tr_linear *dst, const tr_linear_src *s) /* of a panel, in the file */
{
    return TR_PANEL * s->ld * (size_t)tr_format_bytes(dst->format);
}

/* Member i's part of a piece; the buffer has room for FILL_BYTES or a panel. */
static void fill_piece(pack_work *w, int i_src, int i, int n, void *buffer)
{
    const tr_linear_src *s = &w->src[i_src];
    const tr_packed m = tr_packed_view(w->dst, s->i_mat);
    const size_t panel_bytes = rows_bytes(w->dst, s);
    const int step = panel_bytes < FILL_BYTES ? (int)(FILL_BYTES / panel_bytes) : 1;
    tr_status st = TR_OK;
    int panel, end;

    for (own_panels(w, s, i, n, &panel, &end); panel < end && st == TR_OK; panel += step) {
        if (atomic_load(&w->status) != TR_OK) break;
        st = fill_panels(w, &m, i_src, panel, end - panel < step ? end : panel + step, buffer);
    }
    if (st != TR_OK) atomic_store(&w->status, (int)st);
}

static void fill_member(void *ctx, int i, int n)
{
    pack_work *w = ctx;
    TR_SCRATCH uint8_t small[FILL_BYTES] __attribute__((aligned(64)));
    size_t most = 0;

    for (int k = 0; k < w->n_src; k++)
        if (rows_bytes(w->dst, &w->src[k]) > most) most = rows_bytes(w->dst, &w->src[k]);
    void *buffer = most <= FILL_BYTES ? small : malloc(most);
    if (!buffer) atomic_store(&w->status, (int)TR_E_MEMORY);
    for (int k = 0; k < w->n_src && buffer; k++)
        fill_piece(w, k, i, n, buffer);
    if (buffer != small) free(buffer);
}

tr_status tr_cpu_linear_fill(tr_device *d, tr_linear *dst, const tr_linear_src *src, int n_src,
                             tr_rows_fn *rows, void *const *ctx)
{
    pack_work w = {.d = d, .dst = dst, .src = src, .n_src = n_src, .rows = rows, .ctx = ctx};
    tr_status st = TR_OK;
    double work = 0;

    for (int i = 0; i < n_src && st == TR_OK; i++) {
        if (src[i].transposed || src[i].ld < (size_t)dst->n_in)
            return tr_cpu_fail(d, TR_E_USAGE, "linear_fill: rows of %zu numbers for %d columns",
                               src[i].ld, dst->n_in);
        st = begin_piece(d, dst, &src[i]);
        work += (double)src[i].n_out * dst->n_in;
    }
    if (st != TR_OK) return st;
    tr_device_run(d, work, fill_member, &w);
    st = (tr_status)atomic_load(&w.status);
    return st == TR_OK
               ? TR_OK
               : tr_cpu_fail(d, st, "%s", st == TR_E_MEMORY ? "out of memory" : "unreadable rows");
}

typedef struct table_work {
    char *dst;
    size_t row_bytes;
    int n_rows;
    tr_rows_fn *rows;
    void *ctx;
    atomic_int status;
} table_work;

static void table_member(void *ctx, int i, int n)
{
    table_work *w = ctx;
    const int begin = tr_team_part(w->n_rows, i, n), end = tr_team_part(w->n_rows, i + 1, n);
    const int step = w->row_bytes < FILL_BYTES ? (int)(FILL_BYTES / w->row_bytes) : 1;

    for (int r = begin; r < end && atomic_load(&w->status) == TR_OK; r += step) {
        tr_status st =
            w->rows(w->ctx, r, end - r < step ? end - r : step, w->dst + (size_t)r * w->row_bytes);
        if (st != TR_OK) atomic_store(&w->status, (int)st);
    }
}

tr_status tr_cpu_table_fill(tr_device *d, void *dst, size_t row_bytes, int n_rows, tr_rows_fn *rows,
                            void *ctx)
{
    table_work w = {.dst = dst, .row_bytes = row_bytes, .n_rows = n_rows, .rows = rows, .ctx = ctx};

    if (row_bytes > 0) tr_device_run(d, (double)n_rows * (double)row_bytes, table_member, &w);
    tr_status st = (tr_status)atomic_load(&w.status);
    return st == TR_OK ? TR_OK : tr_cpu_fail(d, st, "unreadable rows");
}

/* ---- products ---- */

/* Thread i of n, few rows: its own panels (own_panels), then what others have left. */
static void gemm_shared(const tr_device *d, const tr_gemm *g, int i, int n)
{
    TR_SCRATCH tr_pieces pieces;
    const tr_packed m = tr_packed_view(g->w, g->i_mat);

    tr_pieces_shared(&pieces, d->team, 0, tr_n_panels(g->w->n_out), n, i, m.panel_bytes);
    d->k.gemm(g, &pieces);
}

/* Thread i of n, its part alone: panels are cut first; threads that are left over share the rows. */
static void gemm_part(const tr_device *d, const tr_gemm *g, int i, int n)
{
    const int n_panels = tr_n_panels(g->w->n_out);
    const int columns = n_panels < n ? n_panels : n;
    int row_parts = n / columns < g->n_rows ? n / columns : g->n_rows;
    int i_column = i % columns, i_row = i / columns;

    if (i_row >= row_parts) return;
    tr_gemm mine = *g;
    int r = tr_team_part(g->n_rows, i_row, row_parts);
    mine.n_rows = tr_team_part(g->n_rows, i_row + 1, row_parts) - r;
    if (g->row_index)
        mine.row_index += r;
    else
        mine.x += (size_t)r * g->ldx;
    if (g->out_index)
        mine.out_index += r;
    else
        mine.y += (size_t)r * g->ldy;
    tr_cpu_gemm_panels(d, &mine, tr_team_part(n_panels, i_column, columns),
                       tr_team_part(n_panels, i_column + 1, columns));
}

typedef struct gemm_work {
    const tr_device *d;
    const tr_gemm *g;
} gemm_work;

static void gemm_member(void *ctx, int i, int n)
{
    const gemm_work *w = ctx;
    const size_t n_panels = (size_t)tr_n_panels(w->g->w->n_out);
    const size_t bytes = n_panels * tr_packed_view(w->g->w, w->g->i_mat).panel_bytes;

    if (n > 1 && (size_t)n <= n_panels && n <= TR_PIECES_MAX &&
        tr_pieces_pay(w->g->n_rows, bytes / (size_t)n))
        gemm_shared(w->d, w->g, i, n);
    else
        gemm_part(w->d, w->g, i, n);
}

void tr_cpu_gemm_all(tr_device *d, const tr_gemm *g)
{
    gemm_work w = {d, g};
    if (g->n_rows > 0)
        tr_device_run(d, (double)g->n_rows * g->w->n_out * g->w->n_in, gemm_member, &w);
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
