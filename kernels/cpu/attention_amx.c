/* Absorbed attention of one cache row list on matrix tiles (AMX-BF16): mla.c's loops where a rank has many heads and the
 * cache's numbers are bf16 as they are, fp8 latents times their power of two among them. Queries and probabilities stay
 * fp32: they are cut into three parts (amx_priv.h), so every product is exact and sums are fp32.
 *
 * For one head, whatever heads and rows come along: a score is c = 0, then for every 32 numbers of the key the three
 * parts of the query, largest first, c += q_part k. A block of 64 keys is a softmax step; a number of the output is kept
 * in fp32 from block to block, y = keep y, then for every 32 keys the three parts of p, y += p_part v.
 *
 * A block is expanded once per task: 16 keys by 16 are turned for the scores (pairs of numbers down, keys across), pairs
 * of keys are interleaved for the values. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "kernels/cpu/amx_priv.h"
#include "kernels/cpu/attention_priv.h"
#include "kernels/cpu/exp_avx512.h"

enum {
    KEY_TILES = TR_KEY_BLOCK / TR_TILE_ROWS,
    KEY_STEPS = TR_KEY_BLOCK / TR_TILE_STEP,
    HEAD_TILES = TR_HEADS_MAX / TR_TILE_ROWS,
    STEPS_MAX = TR_D_KEY_MAX / TR_TILE_STEP, /* of a key */
    TILE_FLOATS = TR_TILE_BYTES / (int)sizeof(float),
    N_VEC = TR_KEY_BLOCK / 16,
    STEPS_L1 = 9, /* of a key that all heads meet one after another: 36 KiB of turned keys */
};

/* A task. n_tiles tiles of heads, `rows` in each; a key is n_steps tiles, a value n_columns of 16. */
typedef struct task {
    const tr_device *d;
    const struct tr_sparse_mla_args *a;
    const int32_t *list; /* entries [at, k) are still to come */
    int at, n_keys, n_heads;
    int n_tiles, rows, n_steps, n_columns;
    size_t head, part_bytes; /* the first head, counted over all rows; a part of a tile */
    float max[TR_HEADS_MAX], sum[TR_HEADS_MAX];
    /* [n_tiles][n_steps][3][rows][32] bf16 */
    uint8_t q[HEAD_TILES * STEPS_MAX * TR_N_PARTS * TR_TILE_BYTES] __attribute__((aligned(64)));
    float wide[TR_D_KEY_MAX] __attribute__((aligned(64)));
    uint16_t key[TR_KEY_BLOCK * TR_D_KEY_MAX] __attribute__((aligned(64))); /* [64][n_steps 32] */
    uint8_t turned[KEY_TILES * STEPS_MAX * TR_TILE_BYTES] __attribute__((aligned(64)));
    /* [n_columns][KEY_STEPS] tiles. Of 32 columns 8 l + j, j < 8, the first tile has j < 4. */
    uint8_t value[2 * STEPS_MAX * KEY_STEPS * TR_TILE_BYTES] __attribute__((aligned(64)));
    float score[HEAD_TILES * TR_TILE_ROWS * TR_KEY_BLOCK] __attribute__((aligned(64)));
    uint8_t p[KEY_STEPS * TR_N_PARTS * TR_TILE_BYTES] __attribute__((aligned(64)));
    float out[HEAD_TILES * 2 * STEPS_MAX * TILE_FLOATS] __attribute__((aligned(64)));
} task;

static size_t key_width(const task *t)
{
    return (size_t)t->a->kv.d_latent + (size_t)t->a->kv.d_rope;
}

static uint8_t *query_tiles(task *t, int i_tile)
{
    return t->q + (size_t)(i_tile * t->n_steps) * TR_N_PARTS * t->part_bytes;
}

static float *out_tiles(task *t, int i_tile)
{
    return t->out + (size_t)(i_tile * t->n_columns) * TILE_FLOATS;
}

/* Rows past the last head are zeros. */
static void split_queries(task *t)
{
    const int d_key = (int)key_width(t);

    for (int h = 0; h < t->n_tiles * t->rows; h++) {
        const int n = h < t->n_heads ? d_key : 0;
        const float *q = t->a->q + (t->head + (size_t)(n ? h : 0)) * key_width(t);
        uint8_t *to = query_tiles(t, h / t->rows) + h % t->rows * 64;
        for (int i = 0; i < t->n_steps * TR_TILE_STEP; i += TR_TILE_STEP) {
            tr_split32(to, t->part_bytes, _mm512_maskz_loadu_ps(tr_first16(n - i), q + i),
                       _mm512_maskz_loadu_ps(tr_first16(n - i - 16), q + i + 16));
            to += TR_N_PARTS * t->part_bytes;
        }
    }
}

/* ---- a block of keys ---- */

/* The high halves: the numbers are bf16 already. wide has zeros behind the key. */
static void store_key(const task *t, uint16_t *key)
{
    for (int i = 0; i < t->n_steps * TR_TILE_STEP; i += 16) {
        __m512i x = _mm512_srli_epi32(_mm512_load_si512(t->wide + i), 16);
        _mm256_store_si256((__m256i *)(void *)(key + i), _mm512_cvtepi32_epi16(x));
    }
}

/* Cache rows of the list, up to a block; entries that name no row are passed over. Keys that fill up the last step are
 * zeros. */
static int read_keys(task *t)
{
    const int ld = t->n_steps * TR_TILE_STEP;
    int n = 0;

    for (; t->at < t->a->k && n < TR_KEY_BLOCK; t->at++) {
        const int row = tr_selected_row(t->a, t->list, t->at);
        if (row < 0) continue;
        tr_latent_read(t->d, &t->a->kv, row, t->wide);
        store_key(t, t->key + n++ * ld);
    }
    t->n_keys = n;
    const int end = (n + TR_TILE_STEP - 1) / TR_TILE_STEP * TR_TILE_STEP;
    memset(t->key + n * ld, 0, (size_t)((end - n) * ld) * sizeof *t->key);
    return n > 0;
}

/* Tiles of 16 pairs of numbers by 16 keys, a step of 32 numbers after another. */
static void turn_keys(task *t)
{
    const int ld = t->n_steps * TR_TILE_STEP;

    for (int i = 0; i * TR_TILE_ROWS < t->n_keys; i++) {
        const uint8_t *row[TR_PANEL];
        for (int s = 0; s < TR_PANEL; s++)
            row[s] = (const uint8_t *)(t->key + (i * TR_TILE_ROWS + s) * ld);
        t->d->k.transpose(t->turned + (size_t)(i * t->n_steps) * TR_TILE_BYTES, row, ld / 2);
    }
}

/* Tiles of 16 pairs of keys by 16 columns, two tiles' columns at a time: rows of one tile follow each other, those of
 * many tiles would all want the same few sets of L1. Pairs past the last key are zeros: read_keys made them. */
static void pair_values(task *t)
{
    const int ld = t->n_steps * TR_TILE_STEP;
    const int end = (t->n_keys + TR_TILE_STEP - 1) / TR_TILE_STEP * TR_TILE_STEP;
    uint8_t *to = t->value;

    for (int c = 0; c < t->n_columns; c += 2, to += 2 * KEY_STEPS * TR_TILE_BYTES) {
        const uint16_t *key = t->key + c / 2 * TR_TILE_STEP;
        for (int s = 0; s < end; s += 2, key += 2 * ld) {
            __m512i x = _mm512_load_si512(key), y = _mm512_load_si512(key + ld);
            uint8_t *at = to + s / 2 * 64; /* a tile of the next step follows a tile */
            _mm512_store_si512(at, _mm512_unpacklo_epi16(x, y));
            _mm512_store_si512(at + KEY_STEPS * TR_TILE_BYTES, _mm512_unpackhi_epi16(x, y));
        }
    }
}

/* ---- a tile of heads takes in the block ---- */

#define KEY_PRODUCTS(i)                                                                            \
    if (n_key_tiles > (i)) {                                                                       \
        _tile_loadd(7, key + (size_t)((i)*t->n_steps) * TR_TILE_BYTES, 64);                        \
        _tile_dpbf16ps(i, 4, 7);                                                                   \
        _tile_dpbf16ps(i, 5, 7);                                                                   \
        _tile_dpbf16ps(i, 6, 7);                                                                   \
    }

/* Steps [i, i_end) of score [rows, 64] of a tile of heads; of tiles that no key is in nothing is written. */
static void tile_scores(task *t, int i_tile, int i, int i_end)
{
    const int n_key_tiles = (t->n_keys + TR_TILE_ROWS - 1) / TR_TILE_ROWS;
    const uint8_t *q = query_tiles(t, i_tile) + (size_t)i * TR_N_PARTS * t->part_bytes;
    const uint8_t *key = t->turned + (size_t)i * TR_TILE_BYTES;
    float *score = t->score + i_tile * TR_TILE_ROWS * TR_KEY_BLOCK;
    const size_t ld = TR_KEY_BLOCK * sizeof(float);

    if (i == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, score, ld);
        if (n_key_tiles > 1) _tile_loadd(1, score + 16, ld);
        if (n_key_tiles > 2) _tile_loadd(2, score + 32, ld);
        if (n_key_tiles > 3) _tile_loadd(3, score + 48, ld);
    }
    for (; i < i_end; i++) {
        _tile_loadd(4, q, 64);
        _tile_loadd(5, q + t->part_bytes, 64);
        _tile_loadd(6, q + 2 * t->part_bytes, 64);
        KEY_PRODUCTS(0)
        KEY_PRODUCTS(1)
        KEY_PRODUCTS(2)
        KEY_PRODUCTS(3)
        q += TR_N_PARTS * t->part_bytes;
        key += TR_TILE_BYTES;
    }
    _tile_stored(0, score, ld);
    if (n_key_tiles > 1) _tile_stored(1, score + 16, ld);
    if (n_key_tiles > 2) _tile_stored(2, score + 32, ld);
    if (n_key_tiles > 3) _tile_stored(3, score + 48, ld);
}

/* All tiles of heads, a few steps at a time: a block's turned keys are 72 KiB, of which each tile would read all from L2
 * again. Sums that wait in memory meanwhile are fp32 as they are in tiles. */
static void block_scores(task *t)
{
    for (int i = 0; i < t->n_steps; i += STEPS_L1)
        for (int tile = 0; tile < t->n_tiles; tile++)
            tile_scores(t, tile, i, t->n_steps - i < STEPS_L1 ? t->n_steps : i + STEPS_L1);
}

static float exp_of(float x)
{
    return _mm512_cvtss_f32(tr_exp16(_mm512_set1_ps(x)));
}

/* tr_softmax_step of one head's scores, p in parts at row `row` of the tiles of p. Returns what is kept of the output. */
static float softmax(task *t, const float *score, int row, float *max, float *sum)
{
    const __m512 scale = _mm512_set1_ps(t->a->scale), none = _mm512_set1_ps(-INFINITY);
    const float old = *max;
    __m512 x[N_VEC], most = none, total = _mm512_setzero_ps();

#pragma GCC unroll 4
    for (int i = 0; i < N_VEC; i++) {
        const __mmask16 m = tr_first16(t->n_keys - 16 * i);
        x[i] = _mm512_mask_mul_ps(none, m, _mm512_maskz_loadu_ps(m, score + 16 * i), scale);
        most = _mm512_max_ps(x[i], most); /* a NaN loses */
    }
    const float block_max = _mm512_reduce_max_ps(most);
    if (block_max > old) *max = block_max;
    const int nothing = *max == -INFINITY; /* seen so far: no weight anywhere, but a NaN stays */
    const __m512 top = _mm512_set1_ps(*max);
#pragma GCC unroll 4
    for (int i = 0; i < N_VEC; i++) {
        const __mmask16 m = tr_first16(t->n_keys - 16 * i);
        const __mmask16 empty = _mm512_cmp_ps_mask(x[i], none, _CMP_EQ_OQ);
        x[i] = nothing ? x[i] : tr_exp16(_mm512_sub_ps(x[i], top));
        x[i] = _mm512_maskz_mov_ps((__mmask16)(m & ~empty), x[i]);
        total = _mm512_add_ps(total, x[i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < KEY_STEPS; i++)
        tr_split32(t->p + (size_t)i * TR_N_PARTS * t->part_bytes + row * 64, t->part_bytes,
                   x[2 * i], x[2 * i + 1]);
    const float keep = nothing || old == -INFINITY ? 0.0f : *max > old ? exp_of(old - *max) : 1.0f;
    *sum = (nothing ? *sum : *sum * keep) + _mm512_reduce_add_ps(total);
    return keep;
}

/* Row `row` of a tile of heads' output times keep; 0: whatever it was. */
static void keep_row(const task *t, float *out, int row, float keep)
{
    const __m512 factor = _mm512_set1_ps(keep);

    out += row * 16;
    for (int c = 0; c < t->n_columns; c++, out += TILE_FLOATS)
        _mm512_store_ps(out, keep == 0.0f ? _mm512_setzero_ps()
                                          : _mm512_mul_ps(_mm512_load_ps(out), factor));
}

/* Parts of p stay in six tiles while all columns pass. */
static void tile_values(task *t, int i_tile)
{
    const uint8_t *p = t->p, *value = t->value;
    float *out = out_tiles(t, i_tile);
    const int two = t->n_keys > TR_TILE_STEP;

    _tile_loadd(0, p, 64);
    _tile_loadd(1, p + t->part_bytes, 64);
    _tile_loadd(2, p + 2 * t->part_bytes, 64);
    if (two) {
        _tile_loadd(3, p + 3 * t->part_bytes, 64);
        _tile_loadd(4, p + 4 * t->part_bytes, 64);
        _tile_loadd(5, p + 5 * t->part_bytes, 64);
    }
    for (int c = 0; c < t->n_columns; c++) {
        _tile_loadd(6, out, 64);
        _tile_loadd(7, value, 64);
        _tile_dpbf16ps(6, 0, 7);
        _tile_dpbf16ps(6, 1, 7);
        _tile_dpbf16ps(6, 2, 7);
        if (two) {
            _tile_loadd(7, value + TR_TILE_BYTES, 64);
            _tile_dpbf16ps(6, 3, 7);
            _tile_dpbf16ps(6, 4, 7);
            _tile_dpbf16ps(6, 5, 7);
        }
        _tile_stored(6, out, 64);
        out += TILE_FLOATS;
        value += KEY_STEPS * TR_TILE_BYTES;
    }
}

static void take_block(task *t, int i_tile)
{
    const int first = i_tile * t->rows;
    const float *score = t->score + i_tile * TR_TILE_ROWS * TR_KEY_BLOCK;

    for (int r = 0; r < t->rows; r++) {
        const int h = first + r;
        float keep = softmax(t, score + r * TR_KEY_BLOCK, r, t->max + h, t->sum + h);
        if (keep != 1.0f) keep_row(t, out_tiles(t, i_tile), r, keep);
    }
    tile_values(t, i_tile);
}

/* ---- the end ---- */

/* One head's output: columns back in their order, divided by the sum. */
static void write_head(task *t, int h)
{
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const int d_latent = t->a->kv.d_latent;
    const float *from = out_tiles(t, h / t->rows) + h % t->rows * 16;
    float *out = t->a->out + (t->head + (size_t)h) * (size_t)d_latent;

    if (t->a->lse) t->a->lse[t->head + (size_t)h] = t->max[h] + logf(t->sum[h]);
    if (t->sum[h] == 0.0f) { /* nothing selected */
        memset(out, 0, (size_t)d_latent * sizeof *out);
        return;
    }
    const __m512 factor = _mm512_set1_ps(1.0f / t->sum[h]);
    for (int c = 0; c < d_latent; c += 32, from += 2 * TILE_FLOATS) {
        __m512 a = _mm512_load_ps(from), b = _mm512_load_ps(from + TILE_FLOATS);
        __m512 x = _mm512_mul_ps(_mm512_permutex2var_ps(a, low, b), factor);
        __m512 y = _mm512_mul_ps(_mm512_permutex2var_ps(a, high, b), factor);
        _mm512_mask_storeu_ps(out + c, tr_first16(d_latent - c), x);
        _mm512_mask_storeu_ps(out + c + 16, tr_first16(d_latent - c - 16), y);
    }
}

static void begin_task(task *t, const tr_device *d, const struct tr_sparse_mla_args *a, int i,
                       int h_begin, int h_end)
{
    t->d = d;
    t->a = a;
    t->list = a->cache_row + (size_t)i * (size_t)a->k;
    t->at = 0;
    t->n_heads = h_end - h_begin;
    t->head = (size_t)i * (size_t)a->n_heads + (size_t)h_begin;
    t->rows = t->n_heads < TR_TILE_ROWS ? t->n_heads : TR_TILE_ROWS;
    t->n_tiles = (t->n_heads + TR_TILE_ROWS - 1) / TR_TILE_ROWS;
    t->n_steps = ((int)key_width(t) + TR_TILE_STEP - 1) / TR_TILE_STEP;
    t->n_columns = 2 * ((a->kv.d_latent + TR_TILE_STEP - 1) / TR_TILE_STEP);
    t->part_bytes = (size_t)t->rows * 64;
    memset(t->wide, 0, sizeof t->wide);
    for (int h = 0; h < t->n_tiles * t->rows; h++) {
        t->max[h] = -INFINITY;
        t->sum[h] = 0.0f;
    }
}

void tr_latent_attention_amx(const tr_device *d, const struct tr_sparse_mla_args *a, int i,
                             int h_begin, int h_end)
{
    TR_SCRATCH task t;

    begin_task(&t, d, a, i, h_begin, h_end);
    tr_ask_for_rows(a, t.list, 0, TR_KEY_BLOCK);
    split_queries(&t);
    tr_tiles_configure(t.rows);
    while (read_keys(&t)) {
        turn_keys(&t);
        pair_values(&t);
        block_scores(&t);
        for (int tile = 0; tile < t.n_tiles; tile++) {
            const int from = tr_team_part(TR_KEY_BLOCK, tile, t.n_tiles);
            tr_ask_for_rows(a, t.list, t.at + from,
                            tr_team_part(TR_KEY_BLOCK, tile + 1, t.n_tiles) - from);
            take_block(&t, tile);
        }
    }
    _tile_release();
    for (int h = 0; h < t.n_heads; h++)
        write_head(&t, h);
}
