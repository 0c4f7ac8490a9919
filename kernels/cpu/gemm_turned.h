/* 4 to 16 rows with AVX-512: the rows of x are turned on their side once, and every panel's weights are expanded in
 * registers between the products. Against the ways of gemm_tile.h: no buffer of expanded weights, which alone would fill
 * an L1 of 32 KiB, and no rows whose distances are multiples of 4 KiB, which want the same few sets of it. The sums are
 * those of gemm_tile.h in the same order: bits do not depend on the way.
 *
 * fp8, n_in 7168, one core of a 2-core EPYC (Zen 4, 3.7 GHz, 118 Gflop/s of multiply-adds), old and new by turns, 2 %
 * quantiles: 4 rows 82 -> 92 Gflop/s, 5 rows 50 -> 105, 8 rows 56 -> 109, 16 rows 78 -> 113, 32 rows (in two parts) 89 -> 112.
 *
 * Included by gemm_avx512.c after gemm_tile.h. */
#ifndef TR_KERNELS_CPU_GEMM_TURNED_H
#define TR_KERNELS_CPU_GEMM_TURNED_H

enum {
    TURNED_MIN = 4,
    TURNED_MAX = 16,
    TURNED_COLUMNS = 8192, /* of x at a time: 512 KiB, half of an L2 of 1 MiB */
    /* Bytes of a panel between what is multiplied and what is asked for. That core, 5 rows: 512 89 Gflop/s, 1024 98, 2048 105,
     * 4096 106; from 8 rows on it hardly matters. */
    TURNED_AHEAD = 2048,
};

/* Columns [k, k + n_k) of the rows, whole blocks. */
typedef struct turned {
    const tr_gemm *g;
    tr_packed m;
    int k, n_k;
    int ld;   /* 8 or 16: floats of a column of x */
    float *x; /* [columns, ld], every block's columns filled up with zeros to whole groups */
} turned;

/* Numbers between columns of x of R rows. */
static inline int turned_ld(const int R)
{
    return R <= 8 ? 8 : 16;
}

/* ---- rows on their side ---- */

/* Columns [k, k + n), at most 16; to n_out columns, the rest zeros. */
static inline void turn_columns(float *out, int ld, const float *const *x, int R, int k, int n,
                                int n_out)
{
    TR_SCRATCH __m512i a[16];
    const __mmask16 m = first(n);

#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        a[r] = r < R ? _mm512_maskz_loadu_epi32(m, x[r] + k) : _mm512_setzero_si512();
    transpose16(a);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (i < n_out) {
            if (ld == 8)
                _mm256_store_si256((__m256i *)(void *)(out + i * 8), _mm512_castsi512_si256(a[i]));
            else
                _mm512_store_si512(out + i * 16, a[i]);
        }
}

/* The next columns from t->k on, as many whole blocks as there is room for; their bytes in a panel. */
static size_t turn_rows(turned *t)
{
    const tr_gemm *g = t->g;
    const float *x[TURNED_MAX];
    float *out = t->x;
    size_t bytes = 0;

    row_starts(x, g, 0, g->n_rows);
    t->n_k = 0;
    for (int n; t->k + t->n_k < t->m.n_in && t->n_k + TR_K_BLOCK <= TURNED_COLUMNS; t->n_k += n) {
        n = tr_block_columns(&t->m, t->k + t->n_k);
        const int n_out = (n + TR_K_GROUP - 1) / TR_K_GROUP * TR_K_GROUP;
        for (int i = 0; i < n; i += 16)
            turn_columns(out + i * t->ld, t->ld, x, g->n_rows, t->k + t->n_k + i, n - i, n_out - i);
        out += n_out * t->ld;
        bytes += tr_block_bytes(&t->m, n);
    }
    return bytes;
}

/* ---- a block of a panel ---- */

typedef struct turned_block {
    const float *x;
    const uint8_t *groups;
    int n_groups;
    const float *scale; /* [16] */
    float *total;       /* [R, 16] */
} turned_block;

/* acc += four k of one group. One panel at a time: its multiply-adds load x themselves, so that all registers are left for
 * sums. Two panels that share the loads of x take 15 % longer (8 to 12 rows). */
INLINE void turned_group(__m512 acc[TURNED_MAX], const int format, const int R, const float *x,
                         const uint8_t *group)
{
    TR_SCRATCH __m512 w[TR_K_GROUP];
    const int ld = turned_ld(R);

    if (format == E4M3) v_e4m3(w, group, 0);
    if (format == BF16) v_bf16(w, group, 0);
#pragma GCC unroll 4
    for (int j = 0; j < TR_K_GROUP; j++) {
        if (format == F32) w[j] = _mm512_loadu_ps(group + j * TR_PACK_ALIGN);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[j * ld + r]), w[j], acc[r]);
    }
}

INLINE void turned_tile(const int format, const int R, const turned_block *b)
{
    const int lines = format == F32 ? 4 : format == BF16 ? 2 : 1;
    TR_SCRATCH __m512 acc[TURNED_MAX];
    const float *x = b->x;
    const uint8_t *groups = b->groups;

#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        acc[r] = _mm512_setzero_ps();
    for (int i = 0; i < b->n_groups; i++, groups += lines * TR_PACK_ALIGN) {
#pragma GCC unroll 4
        for (int l = 0; l < lines; l++)
            _mm_prefetch(groups + TURNED_AHEAD + l * TR_PACK_ALIGN, _MM_HINT_T0);
        turned_group(acc, format, R, x, groups);
        x += TR_K_GROUP * turned_ld(R);
    }
    const __m512 unit = _mm512_set1_ps(format == E4M3 ? E4M3_UNIT : 1.0f);
    const __m512 scale = _mm512_loadu_ps(b->scale);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        float *total = b->total + r * TR_PANEL;
        _mm512_store_ps(total,
                        _mm512_fmadd_ps(_mm512_mul_ps(acc[r], unit), scale, _mm512_load_ps(total)));
    }
}

/* clang-format off */
#define TURNED_R(X, f) X(f, 4) X(f, 5) X(f, 6) X(f, 7) X(f, 8) X(f, 9) X(f, 10) X(f, 11) X(f, 12) X(f, 13) X(f, 14) X(f, 15) X(f, 16)
#define TURNED(X) TURNED_R(X, F32) TURNED_R(X, BF16) TURNED_R(X, E4M3)
/* clang-format on */

#define TURNED_FUNCTION(format, R)                                                                 \
    static void turned_##format##_##R(const turned_block *b)                                       \
    {                                                                                              \
        turned_tile(format, R, b);                                                                 \
    }
TURNED(TURNED_FUNCTION)

typedef void turned_function(const turned_block *b);
#define TURNED_ENTRY(format, R) [format][R] = turned_##format##_##R,
static turned_function *const turned_tiles[E4M3 + 1][TURNED_MAX + 1] = {TURNED(TURNED_ENTRY)};

/* ---- whole products ---- */

/* What earlier columns gave, out of y; lanes behind n_out keep their zeros. */
static void load_totals(const tr_gemm *g, int panel, float *total)
{
    const int o = panel * TR_PANEL;
    const int n = g->w->n_out - o < TR_PANEL ? g->w->n_out - o : TR_PANEL;

    for (int r = 0; r < g->n_rows; r++) {
        int to = g->out_index ? g->out_index[r] : r;
        memcpy(total + r * TR_PANEL, g->y + (size_t)to * g->ldy + o, (size_t)n * sizeof(float));
    }
}

/* The columns meet a panel, `at` bytes behind whose beginning they stand. */
static void turned_panel(const turned *t, size_t at, int panel)
{
    TR_SCRATCH float total[TURNED_MAX * TR_PANEL] __attribute__((aligned(64)));
    const tr_gemm *g = t->g;
    const tr_packed *m = &t->m;
    const uint8_t *block = m->panels + (size_t)panel * m->panel_bytes + at;
    turned_block b = {.x = t->x, .total = total};

    memset(total, 0, (size_t)(g->n_rows * TR_PANEL) * sizeof(float));
    if (t->k > 0) load_totals(g, panel, total);
    for (int k = t->k, n; k < t->k + t->n_k; k += n) {
        n = tr_block_columns(m, k);
        b.groups = block + m->scale_bytes;
        b.scale = m->scale_bytes ? (const float *)(const void *)block : no_scale;
        b.n_groups = (n + TR_K_GROUP - 1) / TR_K_GROUP;
        turned_tiles[g->w->format][g->n_rows](&b);
        b.x += b.n_groups * TR_K_GROUP * t->ld;
        block += tr_block_bytes(m, n);
    }
    store_rows(g, 0, g->n_rows, panel, 1, total);
}

static void gemm_turned(const tr_gemm *g, tr_pieces *pieces)
{
    TR_SCRATCH float x[TURNED_COLUMNS * TURNED_MAX] __attribute__((aligned(64)));
    turned t = {.g = g, .m = tr_packed_view(g->w, g->i_mat), .ld = turned_ld(g->n_rows), .x = x};

    int panel, end;

    if (!tr_piece(pieces, 0, &panel, &end)) return; /* no piece, no x */
    for (size_t at = 0; t.k < t.m.n_in; t.k += t.n_k) {
        const size_t bytes = turn_rows(&t);
        for (int i = 0; tr_piece(pieces, i, &panel, &end); i++)
            for (; panel < end; panel++)
                turned_panel(&t, at, panel);
        at += bytes;
    }
}

#endif
