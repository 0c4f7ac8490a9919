/* The GEMM on vectors, written once and included by each SIMD file after it has defined
 *
 *   vec, LANES            a vector of floats; N_VEC = TR_PANEL / LANES of them are a panel
 *   v_zero, v_load, v_store, v_set1(address), v_mul, v_fma(a, b, c) = a b + c
 *   v_e4m3, v_bf16        expand(vec w[4], group, i_vec): the 4 k of lanes [i_vec LANES, (i_vec + 1) LANES)
 *   E4M3_UNIT             v_e4m3's numbers times this are the weights (a power of two)
 *   TILES(X)              X(format, R, P): tiles of R rows by P panels that fit the registers
 *   DIRECT_ROWS           up to so many rows weights are expanded in registers, for more into a buffer first
 *   direct_panels(rows), buffered_panels    panels that one tile of so many rows takes: 4, 2 or 1
 *
 * Every tile, of whatever shape, does the same for one output: in a block, acc = x w + acc, k ascending, from zero;
 * after it, total = (acc unit) scale + total. So bits do not depend on the shape, and tiles may be chosen for speed. */
#ifndef TR_KERNELS_CPU_GEMM_TILE_H
#define TR_KERNELS_CPU_GEMM_TILE_H

#include <string.h>

#include "kernels/cpu/packed.h"

enum {
    N_VEC = TR_PANEL / LANES,
    F32 = TR_W_F32,
    BF16 = TR_W_BF16,
    E4M3 = TR_W_E4M3_B128,
    ROWS_MAX = 6,
    PANELS_MAX = 4,
    CHUNK_ROWS =
        96, /* rows per expansion of the weights: 96 x 4 panels of totals are 24 KiB of L1 and L2 */
};

typedef struct block_args { /* one block of k for R rows and P panels */
    const float *const *x;  /* [R] row starts */
    int k, n_k;             /* columns [k, k + n_k) of x */
    const uint8_t *groups;  /* of the first panel; the next panel's are w_step bytes on */
    size_t w_step;
    const float *scale; /* [16], next panel's scale_step floats on */
    size_t scale_step;
    float unit;
    float *total; /* [R, P, 16] */
} block_args;

#define INLINE static inline __attribute__((always_inline))

/* acc += four k of one group. */
INLINE void tile_group(vec acc[ROWS_MAX][PANELS_MAX][N_VEC], const int format, const int R,
                       const int P, const float *const x[ROWS_MAX], int k, const uint8_t *groups,
                       size_t w_step)
{
    if (format == F32) {
#pragma GCC unroll 4
        for (int j = 0; j < TR_K_GROUP; j++) {
            TR_SCRATCH vec w[PANELS_MAX][N_VEC];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
#pragma GCC unroll 2
                for (int v = 0; v < N_VEC; v++)
                    w[p][v] = v_load((const float *)(const void *)(groups + (size_t)p * w_step) +
                                     j * TR_PANEL + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                vec xr = v_set1(x[r] + k + j);
#pragma GCC unroll 4
                for (int p = 0; p < P; p++)
#pragma GCC unroll 2
                    for (int v = 0; v < N_VEC; v++)
                        acc[r][p][v] = v_fma(xr, w[p][v], acc[r][p][v]);
            }
        }
        return;
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 2
        for (int v = 0; v < N_VEC; v++) {
            TR_SCRATCH vec w[TR_K_GROUP];
            if (format == E4M3)
                v_e4m3(w, groups + (size_t)p * w_step, v);
            else
                v_bf16(w, groups + (size_t)p * w_step, v);
#pragma GCC unroll 4
            for (int j = 0; j < TR_K_GROUP; j++)
#pragma GCC unroll 6
                for (int r = 0; r < R; r++)
                    acc[r][p][v] = v_fma(v_set1(x[r] + k + j), w[j], acc[r][p][v]);
        }
}

INLINE void tile_block(const int format, const int R, const int P, const block_args *b)
{
    const size_t group_bytes = (size_t)TR_PACK_ALIGN * (format == F32 ? 4 : format == BF16 ? 2 : 1);
    TR_SCRATCH const float *x[ROWS_MAX];
    TR_SCRATCH vec acc[ROWS_MAX][PANELS_MAX][N_VEC];
    const uint8_t *groups = b->groups;
    const size_t w_step = b->w_step;
    int k = b->k, k_end = b->k + b->n_k;

#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        x[r] = b->x[r];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 2
            for (int v = 0; v < N_VEC; v++)
                acc[r][p][v] = v_zero();
    }
    for (; k + TR_K_GROUP <= k_end; k += TR_K_GROUP, groups += group_bytes)
        tile_group(acc, format, R, P, x, k, groups, w_step);
    if (k < k_end) { /* rows end here: read a copy, padded with zeros as the weights are */
        float tail[ROWS_MAX][TR_K_GROUP] = {{0}};
        for (int r = 0; r < R; r++) {
            memcpy(tail[r], x[r] + k, (size_t)(k_end - k) * sizeof(float));
            x[r] = tail[r];
        }
        tile_group(acc, format, R, P, x, 0, groups, w_step);
    }
    vec unit = v_set1(&b->unit);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 2
            for (int v = 0; v < N_VEC; v++) {
                float *total = b->total + (r * P + p) * TR_PANEL + v * LANES;
                vec scale = v_load(b->scale + (size_t)p * b->scale_step + v * LANES);
                v_store(total, v_fma(v_mul(acc[r][p][v], unit), scale, v_load(total)));
            }
}

#define TILE_FUNCTION(format, R, P)                                                                \
    static void tile_##format##_##R##x##P(const block_args *b)                                     \
    {                                                                                              \
        tile_block(format, R, P, b);                                                               \
    }
TILES(TILE_FUNCTION)

typedef void tile_function(const block_args *b);
#define TILE_ENTRY(format, R, P) [format][R][P] = tile_##format##_##R##x##P,
static tile_function *const tiles[E4M3 + 1][ROWS_MAX + 1][PANELS_MAX + 1] = {TILES(TILE_ENTRY)};

static const float no_scale[TR_PANEL] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/* Largest of 4, 2, 1 that neither exceeds. */
static inline int tile_panels(int most, int left)
{
    int p = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    return p < most ? p : most;
}

/* Rows [i_row, i_row + n_rows) of x, by address. */
static inline void row_starts(const float **x, const tr_gemm *g, int i_row, int n_rows)
{
    for (int r = 0; r < n_rows; r++) {
        int from = g->row_index ? g->row_index[i_row + r] : i_row + r;
        x[r] = g->x + (size_t)from * g->ldx;
    }
}

/* total [n_rows, n_panels, 16] to y. */
static inline void store_rows(const tr_gemm *g, int i_row, int n_rows, int panel, int n_panels,
                              const float *total)
{
    int o = panel * TR_PANEL;
    int n = g->w->n_out - o < n_panels * TR_PANEL ? g->w->n_out - o : n_panels * TR_PANEL;
    for (int r = 0; r < n_rows; r++) {
        int to = g->out_index ? g->out_index[i_row + r] : i_row + r;
        memcpy(g->y + (size_t)to * g->ldy + o, total + r * n_panels * TR_PANEL,
               (size_t)n * sizeof(float));
    }
}

/* A block's arguments that do not depend on rows: weights at `at` in the first of the panels. */
static inline block_args block_of(const tr_packed *m, const uint8_t *at, int k, float unit)
{
    return (block_args){
        .k = k,
        .n_k = tr_block_columns(m, k),
        .groups = at + m->scale_bytes,
        .w_step = m->panel_bytes,
        .scale = m->scale_bytes ? (const float *)(const void *)at : no_scale,
        .scale_step = m->scale_bytes ? m->panel_bytes / sizeof(float) : 0,
        .unit = unit,
    };
}

/* Few rows: one tile of rows, weights expanded in registers. */
static void gemm_direct(const tr_gemm *g, const tr_packed *m, int panel_begin, int panel_end)
{
    const int R = g->n_rows, format = (int)g->w->format;
    const float *x[ROWS_MAX];

    row_starts(x, g, 0, R);
    for (int panel = panel_begin, P; panel < panel_end; panel += P) {
        TR_SCRATCH float total[ROWS_MAX * PANELS_MAX * TR_PANEL] __attribute__((aligned(64)));
        P = tile_panels(direct_panels(R), panel_end - panel);
        memset(total, 0, (size_t)(R * P * TR_PANEL) * sizeof(float));
        const uint8_t *at = m->panels + (size_t)panel * m->panel_bytes;
        for (int k = 0; k < m->n_in;) {
            block_args b = block_of(m, at, k, format == E4M3 ? E4M3_UNIT : 1.0f);
            b.x = x;
            b.total = total;
            tiles[format][R][P](&b);
            k += b.n_k;
            at += tr_block_bytes(m, b.n_k);
        }
        store_rows(g, 0, R, panel, P, total);
    }
}

/* Expand a block of P panels: buffer [P][TR_K_BLOCK / 4 groups][4][16]. */
static void expand_block(float *buffer, int format, const block_args *b, int P)
{
    int n_groups = (b->n_k + TR_K_GROUP - 1) / TR_K_GROUP;
    size_t group_bytes = (size_t)TR_PACK_ALIGN * (format == BF16 ? 2 : 1);
    for (int p = 0; p < P; p++) {
        const uint8_t *group = b->groups + (size_t)p * b->w_step;
        float *out = buffer + p * TR_K_BLOCK * TR_PANEL;
        for (int i = 0; i < n_groups; i++, group += group_bytes, out += TR_K_GROUP * TR_PANEL)
#pragma GCC unroll 2
            for (int v = 0; v < N_VEC; v++) {
                TR_SCRATCH vec w[TR_K_GROUP];
                if (format == BF16)
                    v_bf16(w, group, v);
                else
                    v_e4m3(w, group, v);
#pragma GCC unroll 4
                for (int j = 0; j < TR_K_GROUP; j++)
                    v_store(out + j * TR_PANEL + v * LANES, w[j]);
            }
    }
}

/* Many rows: a block of P panels is expanded once and meets the rows, tile by tile. */
static void gemm_buffered(const tr_gemm *g, const tr_packed *m, int i_row, int n_rows,
                          int panel_begin, int panel_end)
{
    const int format = (int)g->w->format;
    TR_SCRATCH const float *x[CHUNK_ROWS];
    TR_SCRATCH float total[CHUNK_ROWS * buffered_panels * TR_PANEL] __attribute__((aligned(64)));
    TR_SCRATCH float buffer[buffered_panels * TR_K_BLOCK * TR_PANEL] __attribute__((aligned(64)));

    row_starts(x, g, i_row, n_rows);
    for (int panel = panel_begin, P; panel < panel_end; panel += P) {
        P = tile_panels(buffered_panels, panel_end - panel);
        memset(total, 0, (size_t)(n_rows * P * TR_PANEL) * sizeof(float));
        const uint8_t *at = m->panels + (size_t)panel * m->panel_bytes;
        for (int k = 0; k < m->n_in;) {
            block_args b = block_of(m, at, k, format == E4M3 ? E4M3_UNIT : 1.0f);
            at += tr_block_bytes(m, b.n_k);
            if (format != F32) {
                expand_block(buffer, format, &b, P);
                b.groups = (const uint8_t *)buffer;
                b.w_step = TR_K_BLOCK * TR_PANEL * sizeof(float);
            }
            for (int r = 0; r < n_rows; r += ROWS_MAX) {
                int R = n_rows - r < ROWS_MAX ? n_rows - r : ROWS_MAX;
                b.x = x + r;
                b.total = total + r * P * TR_PANEL;
                tiles[F32][R][P](&b);
            }
            k += b.n_k;
        }
        store_rows(g, i_row, n_rows, panel, P, total);
    }
}

static void gemm(const tr_gemm *g, tr_pieces *pieces)
{
    tr_packed m = tr_packed_view(g->w, g->i_mat);
    int begin, end;

    if (g->n_rows <= 0) return;
    if (g->n_rows <= DIRECT_ROWS) {
        for (int i = 0; tr_piece(pieces, i, &begin, &end); i++)
            gemm_direct(g, &m, begin, end);
        return;
    }
    for (int r = 0; r < g->n_rows; r += CHUNK_ROWS) {
        int n = g->n_rows - r < CHUNK_ROWS ? g->n_rows - r : CHUNK_ROWS;
        for (int i = 0; tr_piece(pieces, i, &begin, &end); i++)
            gemm_buffered(g, &m, r, n, begin, end);
    }
}

#endif
