/* The GEMM on matrix tiles (AMX-BF16), for weights of e4m3 and bf16. Activations stay fp32: a row is cut into three
 * bf16 parts of 8 significant bits each, x = x1 + x2 + x3 exactly, and a weight is a bf16 as it is, so every product is
 * exact in the fp32 that the tiles sum in. What differs from the other instruction sets is the order of the sums alone.
 * (Parts and weights below 2^-126 count as zero.) Three tile products still are several times the fp32 multiply-adds
 * that a core does; 16 rows of weights in memory cost no more than one.
 *
 * For one output, whatever the number of rows: in a block of k, c = 0, then for every 32 k the three parts, largest
 * first, c += x_part w; after it total = c scale + total. */
#include <config.h>

#include <string.h>

#include "kernels/cpu/amx_priv.h"
#include "kernels/cpu/packed.h"

enum {
    GROUPS = TR_TILE_STEP / TR_K_GROUP,
    N_STEPS = TR_K_BLOCK / TR_TILE_STEP,
    N_TILES = 8,      /* row tiles that meet an expanded block: 128 rows */
    PANELS_MAX = 4,   /* tiles 0-3: sums; 4-6: parts of x; 7: weights */
    PART_STEPS = 256, /* tiles of x parts, times TR_N_PARTS: 768 KiB, a share of L2 */
    /* Bytes of a panel between what is multiplied and what is asked for: 4 panels' are what a core has under way. One
     * core of a 2-core Xeon (3.2 GHz, reading at 15 GB/s), 16 rows of 7168: 9.9 GB/s with 2048, 11.2 with 1024. */
    AHEAD = 1024,
};

/* A run of rows and of columns of k: the parts of x, in the order in which the tiles take them. */
typedef struct strip {
    const tr_gemm *g;
    tr_packed m;
    int i_row, n_rows, n_tiles;
    int k, n_k;                    /* whole blocks */
    size_t part_bytes, unit_bytes; /* of a part of a tile; of a tile, all parts */
    uint8_t *parts;                /* [blocks][tiles][steps][3][rows][32] bf16 */
} strip;

/* ---- x in three parts ---- */

/* A step of all rows of a tile, columns [k, k + n) of x with n <= 32, the rest zeros. */
static inline void split_step(const strip *s, uint8_t *out, const float *const *x, int n_rows,
                              int k, int n)
{
    for (int r = 0; r < n_rows; r++)
        tr_split32(out + r * 64, s->part_bytes, _mm512_maskz_loadu_ps(tr_first16(n), x[r] + k),
                   _mm512_maskz_loadu_ps(tr_first16(n - 16), x[r] + k + 16));
}

/* A tile of rows, step by step: a step's parts stand side by side in memory, a row's lie a step apart and would all want
 * the same few sets of L1 (16 rows of 7168: 12 us more). */
static void split_tile(const strip *s, int i_tile)
{
    const tr_gemm *g = s->g;
    const int first = i_tile * TR_TILE_ROWS, left = s->n_rows - first;
    const int n_rows = left < TR_TILE_ROWS ? left : TR_TILE_ROWS;
    const float *x[TR_TILE_ROWS];
    uint8_t *block = s->parts;

    for (int r = 0; r < n_rows; r++) {
        const int row = s->i_row + first + r;
        x[r] = g->x + (size_t)(g->row_index ? g->row_index[row] : row) * g->ldx;
    }
    for (int k = s->k, n; k < s->k + s->n_k; k += n) {
        n = tr_block_columns(&s->m, k);
        const size_t tile_bytes = (size_t)((n + TR_TILE_STEP - 1) / TR_TILE_STEP) * s->unit_bytes;
        uint8_t *out = block + (size_t)i_tile * tile_bytes;
        for (int i = 0; i < n; i += TR_TILE_STEP, out += s->unit_bytes)
            split_step(s, out, x, n_rows, k + i, n - i);
        block += (size_t)s->n_tiles * tile_bytes;
    }
}

/* ---- weights ---- */

/* Codes are packed with their bits as eeee s mmm. As bf16: the exponent e + 120 is e3, four times its complement, e2 e1
 * e0. This holds where e > 0. */
static inline __m512i high_bytes(__m512i code)
{
    return _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64(0x2040808080808008), 0x3c);
}

static inline __m512i low_bytes(__m512i code)
{
    return _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64(0x01020410), 0);
}

static inline void store_group(uint8_t *out, __m512i high, __m512i low)
{
    _mm512_store_si512(out, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512(out + 64, _mm512_unpackhi_epi8(low, high));
}

/* A group, 4 k of 16 lanes, to two rows of a tile: [2 pairs of k][16 lanes][2] bf16. The 4 low bits of a subnormal
 * choose it. */
static inline void expand_group(uint8_t *out, const uint8_t *group)
{
    const __m512i high = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, (char)0x80, (char)0xbb,
                      (char)0xbb, (char)0xbb, (char)0xbc, (char)0xbc, (char)0xbc, (char)0xbc));
    const __m512i low =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, (char)0x80, (char)0xc0, 0, 0x20, 0x40, 0x60, 0,
                                             0, (char)0x80, (char)0xc0, 0, 0x20, 0x40, 0x60));
    __m512i code = _mm512_loadu_si512(group);
    __mmask64 subnormal = _mm512_testn_epi8_mask(code, _mm512_set1_epi8((char)0xf0));
    store_group(out, _mm512_mask_shuffle_epi8(high_bytes(code), subnormal, high, code),
                _mm512_mask_shuffle_epi8(low_bytes(code), subnormal, low, code));
}

static void expand_groups(uint8_t *out, const uint8_t *group, int n)
{
    for (int i = 0; i < n; i++)
        expand_group(out + 2 * i * TR_PACK_ALIGN, group + i * TR_PACK_ALIGN);
}

/* A step, up to 32 k, to a tile; columns past n_k are zeros. Codes below 2^-6 are few in a trained weight (a block's
 * largest is 448): a tile of 512 is expanded as if there were none, which takes half the time, and again if there is
 * one. ahead: where the lines stand that will be wanted a while later. */
static inline void expand_step(uint8_t *out, const uint8_t *group, int n_k, const uint8_t *ahead)
{
    if (n_k >= TR_TILE_STEP) {
        __m512i least = _mm512_set1_epi8((char)0xff);
#pragma GCC unroll 8
        for (int i = 0; i < GROUPS; i++) {
            _mm_prefetch(ahead + i * TR_PACK_ALIGN, _MM_HINT_T0);
            __m512i code = _mm512_loadu_si512(group + i * TR_PACK_ALIGN);
            store_group(out + 2 * i * TR_PACK_ALIGN, high_bytes(code), low_bytes(code));
            least = _mm512_min_epu8(least, code);
        }
        if (__builtin_expect(_mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(16)) != 0, 0))
            expand_groups(out, group, GROUPS);
        return;
    }
    const int n = (n_k + TR_K_GROUP - 1) / TR_K_GROUP;
    expand_groups(out, group, n);
    memset(out + 2 * n * TR_PACK_ALIGN, 0, (size_t)(2 * (GROUPS - n) * TR_PACK_ALIGN));
}

/* The same of bf16, for the steps that are not in memory as they should be. */
static void copy_step(uint8_t *out, const uint8_t *group, int n_k)
{
    const size_t bytes = (size_t)((n_k + TR_K_GROUP - 1) / TR_K_GROUP) * 2 * TR_PACK_ALIGN;
    memcpy(out, group, bytes);
    memset(out + bytes, 0, TR_TILE_BYTES - bytes);
}

/* ---- a tile of rows meets a block of P panels ---- */

#define INLINE static inline __attribute__((always_inline))

/* Sums of a block that are still to be scaled and added to total [n_rows, P, 16]: that is done panel by panel between
 * the products of the steps that follow, because the matrix unit would wait for it. */
typedef struct unfolded {
    float c[PANELS_MAX][TR_TILE_ROWS * TR_PANEL] __attribute__((aligned(64)));
    float *total;
    const float *scale; /* [16], the next panel's scale_step floats on */
    size_t scale_step;
    int n_rows, panel; /* the next to be folded; P: none is left */
} unfolded;

INLINE void fold_rows(const int P, const int n, float *total, const float *c, __m512 scale)
{
#pragma GCC unroll 4
    for (int i = 0; i < n; i++, c += TR_PANEL, total += P * TR_PANEL)
        _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(c), scale, _mm512_load_ps(total)));
}

INLINE void fold_panel(const int P, unfolded *u)
{
    const int p = u->panel, n_rows = u->n_rows;
    if (p >= P) return;
    const __m512 scale = _mm512_loadu_ps(u->scale + (size_t)p * u->scale_step);
    const float *c = u->c[p];
    float *total = u->total + p * TR_PANEL;
    int r = 0;

    for (; r + 4 <= n_rows; r += 4)
        fold_rows(P, 4, total + r * P * TR_PANEL, c + r * TR_PANEL, scale);
    for (; r < n_rows; r++)
        fold_rows(P, 1, total + r * P * TR_PANEL, c + r * TR_PANEL, scale);
    u->panel = p + 1;
}

INLINE void fold_rest(const int P, unfolded *u)
{
    while (u->panel < P)
        fold_panel(P, u);
}

INLINE void sums_begin(const int P)
{
    _tile_zero(0);
    if (P > 1) _tile_zero(1);
    if (P > 2) _tile_zero(2);
    if (P > 3) _tile_zero(3);
}

/* The sums leave the tiles, for total [n_rows, P, 16]. */
INLINE void sums_end(const int P, unfolded *u, float *total, int n_rows, const float *scale,
                     size_t scale_step)
{
    fold_rest(P, u);
    _tile_stored(0, u->c[0], 64);
    if (P > 1) _tile_stored(1, u->c[1], 64);
    if (P > 2) _tile_stored(2, u->c[2], 64);
    if (P > 3) _tile_stored(3, u->c[3], 64);
    u->total = total;
    u->n_rows = n_rows;
    u->scale = scale;
    u->scale_step = scale_step;
    u->panel = 0;
}

static const float one[TR_PANEL] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/* x: the parts of a step. w: the panels' tiles, w_step bytes apart. Beside the products of every panel something else
 * goes on, what is wanted next: a step of codes (0 <= n_next columns, at codes, ahead: see expand_step) is expanded to
 * `next`, [P] tiles, or some lines of the panel are asked for. A burst of either would stop the core. */
typedef struct tile_work {
    const uint8_t *x, *w;
    size_t part_bytes, w_step, panel_bytes;
    uint8_t *next;
    const uint8_t *codes, *ahead;
    int n_next, n_ahead;
} tile_work;

enum { EXPANDS = 1, ASKS = 2 };

INLINE void beside(const int what, const tile_work *t, int p)
{
    const size_t at = (size_t)p * t->panel_bytes;
    if (what == EXPANDS)
        expand_step(t->next + p * TR_TILE_BYTES, t->codes + at, t->n_next, t->ahead + at);
    for (int i = 0; what == ASKS && i < t->n_ahead; i++)
        _mm_prefetch(t->ahead + at + 64 * i, _MM_HINT_T0);
}

#define PANEL_PRODUCTS(p)                                                                          \
    if (P > (p)) {                                                                                 \
        beside(what, t, p);                                                                        \
        _tile_loadd(7, t->w + (size_t)(p)*t->w_step, 64);                                          \
        _tile_dpbf16ps(p, 4, 7);                                                                   \
        _tile_dpbf16ps(p, 5, 7);                                                                   \
        _tile_dpbf16ps(p, 6, 7);                                                                   \
    }

/* The parts of x pass by, 3 KiB a step, once for P panels: what they would displace in L1 is wanted sooner. */
INLINE void step_products(const int P, const int what, const tile_work *t)
{
    _tile_stream_loadd(4, t->x, 64);
    _tile_stream_loadd(5, t->x + t->part_bytes, 64);
    _tile_stream_loadd(6, t->x + 2 * t->part_bytes, 64);
    PANEL_PRODUCTS(0)
    PANEL_PRODUCTS(1)
    PANEL_PRODUCTS(2)
    PANEL_PRODUCTS(3)
}

/* Where the strip's blocks lie in the first of P panels, and how many bytes they have there. After the end of what the
 * strip has of a panel the P panels behind are wanted. */
typedef struct walk {
    const strip *s;
    const uint8_t *block;
    size_t n_bytes;
    float *total;
} walk;

static inline const uint8_t *wanted_at(const walk *a, const uint8_t *at, int P)
{
    const size_t from = (size_t)(at - a->block);
    return from < a->n_bytes ? at : at - a->n_bytes + (size_t)P * a->s->m.panel_bytes;
}

/* Lines of a block of one panel, spread over the steps of all tiles of rows. */
static int lines_ahead(const strip *s)
{
    const int lines = TR_K_BLOCK / TR_K_GROUP * s->m.group_bytes / 64, n = s->n_tiles * N_STEPS;
    return (lines + n - 1) / n;
}

/* Tile by tile all rows of the strip meet a block of n columns. w: of every panel its tiles, w_step bytes apart; where
 * `last` is given, those of a last step that is short stand there. */
INLINE void block_products(const int P, const walk *a, tile_work *t, unfolded *u, const uint8_t *w,
                           int n, const uint8_t *last, const float *scale, size_t scale_step)
{
    const strip *s = a->s;
    const size_t w_step = t->w_step;

    for (int r = 0; r < s->n_rows; r += TR_TILE_ROWS) {
        t->w = w;
        sums_begin(P);
        for (int i = 0; i < n; i += TR_TILE_STEP, t->w += TR_TILE_BYTES, t->x += s->unit_bytes) {
            if (last && n - i < TR_TILE_STEP) {
                t->w = last;
                t->w_step = TR_TILE_BYTES;
            }
            step_products(P, ASKS, t);
            t->ahead += 64 * t->n_ahead;
            fold_panel(P, u);
        }
        t->w_step = w_step;
        sums_end(P, u, a->total + r * P * TR_PANEL,
                 s->n_rows - r < TR_TILE_ROWS ? s->n_rows - r : TR_TILE_ROWS, scale, scale_step);
    }
}

/* bf16 weights are tiles where they lie, but for a last step that is short. */
INLINE void panels_bf16(const int P, const walk *a)
{
    TR_SCRATCH uint8_t last[PANELS_MAX * TR_TILE_BYTES] __attribute__((aligned(64)));
    TR_SCRATCH unfolded u;
    const strip *s = a->s;
    const size_t panel_bytes = s->m.panel_bytes;
    tile_work t = {.x = s->parts, .part_bytes = s->part_bytes, .panel_bytes = panel_bytes};

    t.w_step = panel_bytes;
    t.n_ahead = lines_ahead(s);
    u.panel = P;
    for (int k = s->k, n; k < s->k + s->n_k; k += n) {
        n = tr_block_columns(&s->m, k);
        const uint8_t *block = a->block + (size_t)(k - s->k) * 2 * TR_PANEL;
        const int rest = n % TR_TILE_STEP;
        for (int p = 0; rest && p < P; p++)
            copy_step(last + p * TR_TILE_BYTES,
                      block + (size_t)p * panel_bytes + (size_t)(n - rest) * 2 * TR_PANEL, rest);
        t.ahead = wanted_at(a, block + tr_block_bytes(&s->m, n), P);
        block_products(P, a, &t, &u, block, n, rest ? last : NULL, one, 0);
    }
    fold_rest(P, &u);
}

/* A step of a strip: columns [i, n) of the block at k. */
typedef struct cursor {
    const uint8_t *block;
    int k, n, i;
} cursor;

/* 0: that was the last. */
static inline int next_step(const strip *s, cursor *c)
{
    c->i += TR_TILE_STEP;
    if (c->i < c->n) return 1;
    c->block += tr_block_bytes(&s->m, c->n);
    c->k += c->n;
    c->i = 0;
    if (c->k >= s->k + s->n_k) return 0;
    c->n = tr_block_columns(&s->m, c->k);
    return 1;
}

/* e4m3 and one tile of rows: a step is expanded while the one before is multiplied. */
INLINE void panels_direct(const int P, const walk *a)
{
    TR_SCRATCH uint8_t buffer[2][PANELS_MAX * TR_TILE_BYTES] __attribute__((aligned(64)));
    TR_SCRATCH unfolded u;
    const strip *s = a->s;
    cursor next = {.block = a->block, .k = s->k, .n = tr_block_columns(&s->m, s->k)};
    tile_work t = {.x = s->parts, .part_bytes = s->part_bytes, .w_step = TR_TILE_BYTES};

    t.panel_bytes = s->m.panel_bytes;
    u.panel = P;
    t.next = buffer[0];
    t.codes = t.ahead = a->block + TR_PACK_ALIGN;
    t.n_next = next.n;
    for (int p = 0; p < P; p++)
        beside(EXPANDS, &t, p);
    sums_begin(P);
    for (int now = 0, more = 1; more; now = !now) {
        const uint8_t *block = next.block;
        more = next_step(s, &next);
        t.w = buffer[now];
        t.next = buffer[!now];
        t.codes = next.block + TR_PACK_ALIGN + (size_t)next.i / TR_K_GROUP * TR_PACK_ALIGN;
        t.n_next = next.n - next.i;
        t.ahead = wanted_at(a, t.codes + AHEAD, P);
        if (more)
            step_products(P, EXPANDS, &t);
        else
            step_products(P, 0, &t);
        t.x += s->unit_bytes;
        fold_panel(P, &u);
        if (next.block == block) continue;
        sums_end(P, &u, a->total, s->n_rows, (const float *)(const void *)block,
                 s->m.panel_bytes / sizeof(float));
        sums_begin(P);
    }
    fold_rest(P, &u);
}

/* e4m3 and many rows: a block is expanded once and meets them tile by tile. */
INLINE void panels_buffered(const int P, const walk *a)
{
    TR_SCRATCH uint8_t buffer[PANELS_MAX * N_STEPS * TR_TILE_BYTES] __attribute__((aligned(64)));
    TR_SCRATCH unfolded u;
    const strip *s = a->s;
    const size_t panel_bytes = s->m.panel_bytes;
    const uint8_t *block = a->block;
    tile_work t = {.x = s->parts, .part_bytes = s->part_bytes, .w_step = N_STEPS * TR_TILE_BYTES};

    t.panel_bytes = panel_bytes;
    t.n_ahead = lines_ahead(s);
    u.panel = P;
    for (int k = s->k, n; k < s->k + s->n_k; k += n, block += tr_block_bytes(&s->m, n)) {
        n = tr_block_columns(&s->m, k);
        for (int p = 0; p < P; p++) {
            const uint8_t *group = block + TR_PACK_ALIGN + (size_t)p * panel_bytes;
            uint8_t *to = buffer + p * N_STEPS * TR_TILE_BYTES;
            for (int i = 0; i < n;
                 i += TR_TILE_STEP, to += TR_TILE_BYTES, group += TR_TILE_BYTES / 2)
                expand_step(to, group, n - i, group);
        }
        t.ahead = wanted_at(a, block + tr_block_bytes(&s->m, n), P);
        block_products(P, a, &t, &u, buffer, n, NULL, (const float *)(const void *)block,
                       panel_bytes / sizeof(float));
    }
    fold_rest(P, &u);
}

#define PANELS_FUNCTION(P)                                                                         \
    static void panels_##P(const walk *a)                                                          \
    {                                                                                              \
        if (a->s->g->w->format == TR_W_BF16)                                                       \
            panels_bf16(P, a);                                                                     \
        else if (a->s->n_tiles == 1)                                                               \
            panels_direct(P, a);                                                                   \
        else                                                                                       \
            panels_buffered(P, a);                                                                 \
    }
/* clang-format off */
PANELS_FUNCTION(1) PANELS_FUNCTION(2) PANELS_FUNCTION(3) PANELS_FUNCTION(4)
    /* clang-format on */
    typedef void panels_function(const walk *a);
static panels_function *const panels_functions[PANELS_MAX + 1] = {NULL, panels_1, panels_2,
                                                                  panels_3, panels_4};

/* ---- a strip meets panels ---- */

/* Between total [n_rows, P, 16] and y. */
static void move_totals(const strip *s, float *total, int panel, int P, int store)
{
    const tr_gemm *g = s->g;
    const int o = panel * TR_PANEL;
    const int n = g->w->n_out - o < P * TR_PANEL ? g->w->n_out - o : P * TR_PANEL;

    for (int r = 0; r < s->n_rows; r++) {
        int to = g->out_index ? g->out_index[s->i_row + r] : s->i_row + r;
        float *y = g->y + (size_t)to * g->ldy + o, *t = total + r * P * TR_PANEL;
        if (store)
            memcpy(y, t, (size_t)n * sizeof *y);
        else
            memcpy(t, y, (size_t)n * sizeof *y);
    }
}

/* The strip's blocks: n_bytes of a panel from `at` on. */
static void strip_panels(const strip *s, size_t at, size_t n_bytes, int panel, int P)
{
    TR_SCRATCH float total[N_TILES * TR_TILE_ROWS * PANELS_MAX * TR_PANEL]
        __attribute__((aligned(64)));
    const walk a = {s, s->m.panels + (size_t)panel * s->m.panel_bytes + at, n_bytes, total};

    if (s->k == 0 || P * TR_PANEL > s->g->w->n_out - panel * TR_PANEL)
        memset(total, 0, (size_t)(s->n_rows * P * TR_PANEL) * sizeof *total);
    if (s->k > 0) move_totals(s, total, panel, P, 0);
    panels_functions[P](&a);
    move_totals(s, total, panel, P, 1);
}

static void piece_panels(const strip *s, size_t at, size_t n_bytes, int panel, int end)
{
    for (int P; panel < end; panel += P) {
        P = end - panel < PANELS_MAX ? end - panel : PANELS_MAX;
        strip_panels(s, at, n_bytes, panel, P);
    }
}

/* Rows [i_row, i_row + n_rows), at most N_TILES tiles of them, through all of k. */
static void gemm_rows(const tr_gemm *g, const tr_packed *m, int i_row, int n_rows,
                      tr_pieces *pieces)
{
    TR_SCRATCH uint8_t parts[PART_STEPS * TR_N_PARTS * TR_TILE_BYTES] __attribute__((aligned(64)));
    const int rows = n_rows < TR_TILE_ROWS ? n_rows : TR_TILE_ROWS;
    strip s = {.g = g, .m = *m, .i_row = i_row, .n_rows = n_rows, .parts = parts};
    size_t at = 0;
    int begin, end;

    if (!tr_piece(pieces, 0, &begin, &end)) return; /* no piece, no parts of x */
    s.n_tiles = (n_rows + TR_TILE_ROWS - 1) / TR_TILE_ROWS;
    s.part_bytes = (size_t)rows * 64;
    s.unit_bytes = TR_N_PARTS * s.part_bytes;
    const int most = (int)(sizeof parts / ((size_t)s.n_tiles * s.unit_bytes)); /* steps */
    tr_tiles_configure(rows);
    for (s.k = 0; s.k < m->n_in; s.k += s.n_k) {
        size_t bytes = 0;
        int n_steps = 0;
        for (s.n_k = 0; s.k + s.n_k < m->n_in && n_steps + N_STEPS <= most; n_steps += N_STEPS) {
            int n = tr_block_columns(m, s.k + s.n_k);
            s.n_k += n;
            bytes += tr_block_bytes(m, n);
        }
        for (int i = 0; i < s.n_tiles; i++)
            split_tile(&s, i);
        for (int i = 0; tr_piece(pieces, i, &begin, &end); i++)
            piece_panels(&s, at, bytes, begin, end);
        at += bytes;
    }
    _tile_release();
}

static void gemm(const tr_gemm *g, tr_pieces *pieces)
{
    if (g->w->format == TR_W_F32) {
        tr_cpu_avx512.gemm(g, pieces);
        return;
    }
    tr_packed m = tr_packed_view(g->w, g->i_mat);
    for (int r = 0; r < g->n_rows; r += N_TILES * TR_TILE_ROWS) {
        int left = g->n_rows - r;
        gemm_rows(g, &m, r, left < N_TILES * TR_TILE_ROWS ? left : N_TILES * TR_TILE_ROWS, pieces);
    }
}

/* Bytes 16 q + w and 16 q + 8 + w: words 8 q + w of the tile rows of k 0, 1 and of k 2, 3; word 2 l + j is lane l's. */
/* clang-format off */
#define LANE(l) (l) / 4 * 16 + (l) % 4 * 2, (l) / 4 * 16 + (l) % 4 * 2 + 1, \
                (l) / 4 * 16 + (l) % 4 * 2 + 8, (l) / 4 * 16 + (l) % 4 * 2 + 9
static const uint8_t order[64] = {
    LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7),
    LANE(8), LANE(9), LANE(10), LANE(11), LANE(12), LANE(13), LANE(14), LANE(15),
};
/* clang-format on */

static unsigned e4m3_arrange(uint8_t *groups, int n_groups)
{
    const __m512i pairs =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    /* eeeesmmm of seeeemmm: bits 6, 5, 4, 3, 7, 2, 1, 0 */
    const __m512i bits = _mm512_set1_epi64(0x0102048008102040);
    const __m512i magnitude = _mm512_set1_epi8(0x7f);
    __mmask64 nan = 0;
    for (; n_groups > 0; n_groups--, groups += TR_PACK_ALIGN) {
        __m512i code = _mm512_loadu_si512(groups);
        nan |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(code, magnitude), magnitude);
        code = _mm512_shuffle_epi8(code, pairs);
        _mm512_storeu_si512(groups, _mm512_gf2p8affine_epi64_epi8(code, bits, 0));
    }
    __m512i bytes = _mm512_movm_epi8(nan);
    return _mm512_test_epi32_mask(bytes, bytes);
}

/* The rest is AVX-512's. */
const tr_cpu_kernels tr_cpu_amx = {
    .gemm = gemm,
    .e4m3_order = order,
    .e4m3_sign_low = 1,
    .e4m3_arrange = e4m3_arrange,
    .latent_attention = tr_latent_attention_amx,
    .index_page = tr_index_page_amx,
};
