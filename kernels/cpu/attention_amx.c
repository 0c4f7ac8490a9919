/* Absorbed attention of one cache row list on matrix tiles (AMX-BF16): mla.c's loops where a rank has many heads and the
 * cache's numbers are bf16 as they are, fp8 latents times their power of two among them. Queries and probabilities stay
 * fp32: they are cut into three parts (amx_priv.h), so every product is exact and sums are fp32.
 *
 * For one head, whatever heads and rows come along: a score is c = 0, then for every 32 numbers of the key the three
 * parts of the query, largest first, c += q_part k. A block of 64 keys is a softmax step; a number of the output is kept
 * in fp32 from block to block, y = keep y, then for every 32 keys the three parts of p, y += p_part v.
 *
 * A block is expanded once per task: 16 keys by 16 are turned for the scores (pairs of numbers down, keys across), pairs
 * of keys are interleaved for the values.
 *
 * Tile products are less than half of the instructions but most of the time, and a core does other work meanwhile if it
 * comes along evenly: what fits into the 48 cycles of three products stands behind every three. So the next block is made
 * ready piece by piece between the products of scores, and the next heads' softmax between those of values. Which numbers
 * meet in which order is as if one followed the other. */
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
    /* Of a key that all heads meet one after another: 24 KiB turned, while 18 KiB of queries pass by. */
    STEPS_L1 = 6,
    HEAD_PIECES = 4, /* of a head's softmax */
};

/* What becomes of 16 keys of a block, and then of the next 16, before they meet the queries. */
typedef enum stage { READING, TURNING, PAIRING, READY } stage;

typedef struct block {
    int n_keys;
    stage stage;
    int tile; /* of keys, on its way */
    int i;    /* pieces of this stage that are done, or of the key that is read */
    int row;  /* its cache row; -1: none is begun */
    uint8_t turned[KEY_TILES * STEPS_MAX * TR_TILE_BYTES] __attribute__((aligned(64)));
    /* [n_columns][KEY_STEPS] tiles. Of 32 columns 8 l + j, j < 8, the first tile has j < 4. */
    uint8_t value[2 * STEPS_MAX * KEY_STEPS * TR_TILE_BYTES] __attribute__((aligned(64)));
} block;

/* A task. n_tiles tiles of heads, `rows` in each; a key is n_steps tiles, a value n_columns of 16. */
typedef struct task {
    const tr_device *d;
    const struct tr_sparse_mla_args *a;
    const int32_t *list; /* entries [at, k) are still to come */
    int at, n_heads;
    int n_tiles, rows, n_steps, n_columns;
    size_t head, part_bytes; /* the first head, counted over all rows; a part of a tile */
    int n_prepare, n_soft;   /* pieces of the next block and of softmax behind three products */
    int i_soft, soft; /* the tile of heads whose softmax is under way, pieces of it that are done */
    block *now, *next;
    float max[TR_HEADS_MAX], sum[TR_HEADS_MAX];
    /* [n_tiles][n_steps][3][rows][32] bf16 */
    uint8_t q[HEAD_TILES * STEPS_MAX * TR_N_PARTS * TR_TILE_BYTES] __attribute__((aligned(64)));
    float wide[TR_D_KEY_MAX] __attribute__((aligned(64)));
    uint16_t key[TR_TILE_ROWS * TR_D_KEY_MAX] __attribute__((aligned(64))); /* [16][n_steps 32] */
    block block[2];
    float half[TR_TILE_ROWS * 16] __attribute__((aligned(64))); /* turned */
    float x[TR_KEY_BLOCK] __attribute__((aligned(64))); /* a head's scores on the way to p */
    float keep;                                         /* of its output */
    float score[HEAD_TILES * TR_TILE_ROWS * TR_KEY_BLOCK] __attribute__((aligned(64)));
    uint8_t p[2][KEY_STEPS * TR_N_PARTS * TR_TILE_BYTES] __attribute__((aligned(64)));
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

/* 32 codes of an e4m3 cache as their numbers' high halves: through fp16, which they are 2^-8 of. The factor repairs
 * that together with the scale. */
static inline __m512i expand_32(const uint8_t *code, __m512 factor)
{
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i wide =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)code));
    const __m512i half =
        _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((short)0xbf80));
    __m512 x = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    __m512 y = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));

    x = _mm512_mul_ps(x, factor);
    y = _mm512_mul_ps(y, factor);
    return _mm512_permutexvar_epi64(in_order,
                                    tr_high_halves(_mm512_castps_si512(x), _mm512_castps_si512(y)));
}

/* Whether keys are expanded a scale block at a time. */
static int in_parts(const tr_kv_layer *kv)
{
    return kv->dtype == TR_E4M3 && kv->d_latent % TR_SCALE_BLOCK == 0 &&
           kv->d_rope % TR_TILE_STEP == 0;
}

/* A scale block of a record of an e4m3 cache, and with the last one what is behind: as tr_latent_read and store_key make
 * it, but for codes that are NaN. Returns whether there are none. */
static int expand_part(const task *t, uint16_t *key, int row, int part)
{
    const tr_kv_layer *kv = &t->a->kv;
    const int n = kv->d_latent, i = part * TR_SCALE_BLOCK;
    const uint8_t *record =
        (const uint8_t *)kv->latent + (size_t)row * tr_kv_row_bytes(kv->dtype, n, kv->d_rope);
    const float *scale = (const float *)(const void *)(record + n);
    const __m512i quiet = _mm512_set1_epi8(0x7f);
    const __m512i largest =
        _mm512_max_epu8(_mm512_and_si512(_mm512_loadu_si512(record + i), quiet),
                        _mm512_and_si512(_mm512_loadu_si512(record + i + 64), quiet));
    const __m512 factor = _mm512_set1_ps(scale[part] / tr_tile_unit);

#pragma GCC unroll 4
    for (int j = i; j < i + TR_SCALE_BLOCK; j += TR_TILE_STEP)
        _mm512_store_si512(key + j, expand_32(record + j, factor));
    if (i + TR_SCALE_BLOCK == n)
        for (int j = 0; j < kv->d_rope; j += TR_TILE_STEP)
            _mm512_store_si512(key + n + j,
                               _mm512_loadu_si512(record + n + (size_t)(part + 1) * sizeof *scale +
                                                  (size_t)j * sizeof *key));
    return _mm512_cmpeq_epi8_mask(largest, quiet) == 0;
}

/* The next cache row of the list; entries that name no row are passed over. -1: there is none. */
static int next_row(task *t)
{
    int row = -1;
    while (row < 0 && t->at < t->a->k)
        row = tr_selected_row(t->a, t->list, t->at++);
    return row;
}

/* The list has ended behind n keys of a tile: zeros fill it up, and the last step of values. */
static void end_reading(task *t, block *b, int n)
{
    const int ld = t->n_steps * TR_TILE_STEP, half_a_step = b->tile * TR_TILE_ROWS % TR_TILE_STEP;

    b->stage = n > 0 ? TURNING : half_a_step ? PAIRING : READY;
    if (b->stage != READY)
        memset(t->key + n * ld, 0, (size_t)((TR_TILE_ROWS - n) * ld) * sizeof *t->key);
}

/* A part of a key, or all of it. */
static void read_piece(task *t, block *b)
{
    const int n = b->n_keys - b->tile * TR_TILE_ROWS;
    uint16_t *key = t->key + n * t->n_steps * TR_TILE_STEP;

    if (b->row < 0) b->row = next_row(t);
    if (b->row < 0) {
        end_reading(t, b, n);
        return;
    }
    if (in_parts(&t->a->kv) && expand_part(t, key, b->row, b->i)) {
        if (++b->i * TR_SCALE_BLOCK < t->a->kv.d_latent) return;
    } else {
        tr_latent_read(t->d, &t->a->kv, b->row, t->wide);
        store_key(t, key);
    }
    b->n_keys++;
    b->i = 0;
    b->row = -1;
    if (n + 1 == TR_TILE_ROWS) b->stage = TURNING;
}

/* Half the way of 16 rows of 16 words towards 16 columns: words and pairs of words trade places among four rows. Row 4 q
 * + c of the result has word 4 l + c of the rows 4 q ... 4 q + 3 in its quarter l. */
static void turn_begin(float *half, const uint16_t *key, size_t ld)
{
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++, key += 4 * ld, half += 4 * 16) {
        const __m512 a = _mm512_castsi512_ps(_mm512_load_si512(key));
        const __m512 b = _mm512_castsi512_ps(_mm512_load_si512(key + ld));
        const __m512 c = _mm512_castsi512_ps(_mm512_load_si512(key + 2 * ld));
        const __m512 d = _mm512_castsi512_ps(_mm512_load_si512(key + 3 * ld));
        const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
        const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
        const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
        const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
        _mm512_store_pd(half, _mm512_unpacklo_pd(ab, cd));
        _mm512_store_pd(half + 16, _mm512_unpackhi_pd(ab, cd));
        _mm512_store_pd(half + 32, _mm512_unpacklo_pd(ab_high, cd_high));
        _mm512_store_pd(half + 48, _mm512_unpackhi_pd(ab_high, cd_high));
    }
}

/* The rest: quarters trade places among the rows c, 4 + c, 8 + c and 12 + c. */
static void turn_end(uint8_t *tile, const float *half)
{
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++, tile += 64, half += 16) {
        const __m512 x = _mm512_load_ps(half), y = _mm512_load_ps(half + 64);
        const __m512 z = _mm512_load_ps(half + 128), w = _mm512_load_ps(half + 192);
        const __m512 even = _mm512_shuffle_f32x4(x, y, 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(x, y, 0xdd);
        const __m512 even_high = _mm512_shuffle_f32x4(z, w, 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(z, w, 0xdd);
        _mm512_store_ps(tile, _mm512_shuffle_f32x4(even, even_high, 0x88));
        _mm512_store_ps(tile + 4 * 64, _mm512_shuffle_f32x4(odd, odd_high, 0x88));
        _mm512_store_ps(tile + 8 * 64, _mm512_shuffle_f32x4(even, even_high, 0xdd));
        _mm512_store_ps(tile + 12 * 64, _mm512_shuffle_f32x4(odd, odd_high, 0xdd));
    }
}

/* Half of the way to a tile of 16 pairs of numbers by 16 keys. */
static void turn_piece(task *t, block *b)
{
    const int ld = t->n_steps * TR_TILE_STEP, step = b->i / 2;

    if (b->i % 2 == 0)
        turn_begin(t->half, t->key + step * TR_TILE_STEP, (size_t)ld);
    else
        turn_end(b->turned + (size_t)(b->tile * t->n_steps + step) * TR_TILE_BYTES, t->half);
    if (++b->i < 2 * t->n_steps) return;
    b->i = 0;
    b->stage = PAIRING;
}

/* Half of the tiles of 16 pairs of keys by 16 columns, those of two tiles' columns: rows of one tile follow each other,
 * those of many tiles would all want the same few sets of L1. */
static void pair_piece(const task *t, block *b)
{
    enum { PAIRS = TR_TILE_ROWS / 2 };
    const int ld = t->n_steps * TR_TILE_STEP;
    const uint16_t *key = t->key + b->i * TR_TILE_STEP;
    /* a tile of the next step follows a tile */
    uint8_t *to = b->value + (size_t)(2 * b->i) * KEY_STEPS * TR_TILE_BYTES + b->tile * PAIRS * 64;

#pragma GCC unroll 8
    for (int i = 0; i < PAIRS; i++, key += 2 * ld, to += 64) {
        __m512i x = _mm512_load_si512(key), y = _mm512_load_si512(key + ld);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
        _mm512_store_si512(to + KEY_STEPS * TR_TILE_BYTES, _mm512_unpackhi_epi16(x, y));
    }
    if (2 * ++b->i < t->n_columns) return;
    b->i = 0;
    b->stage = ++b->tile < KEY_TILES ? READING : READY;
}

static int pieces_of_block(const task *t)
{
    const int parts = in_parts(&t->a->kv) ? t->a->kv.d_latent / TR_SCALE_BLOCK : 1;
    return TR_KEY_BLOCK * parts + 2 * KEY_TILES * t->n_steps + KEY_TILES * t->n_columns / 2;
}

/* A piece of the next block. */
static void prepare(task *t)
{
    block *b = t->next;
    switch (b->stage) {
    case READING:
        read_piece(t, b);
        break;
    case TURNING:
        turn_piece(t, b);
        break;
    case PAIRING:
        pair_piece(t, b);
        break;
    case READY:
        break;
    }
}

static void begin_block(task *t, block *b)
{
    t->next = b;
    b->n_keys = b->tile = b->i = 0;
    b->row = -1;
    b->stage = READING;
}

/* What is left to do for the next block; it becomes the one that is used. */
static int end_block(task *t)
{
    block *ready = t->next;
    while (ready->stage != READY)
        prepare(t);
    begin_block(t, ready == t->block ? t->block + 1 : t->block);
    t->now = ready;
    return ready->n_keys > 0;
}

/* ---- a tile of heads: p of a block ---- */

static float exp_of(float x)
{
    return _mm512_cvtss_f32(tr_exp16(_mm512_set1_ps(x)));
}

/* tr_softmax_step of one head, in pieces: the largest score ... */
static void soft_max(task *t, const float *score, int h)
{
    const __m512 scale = _mm512_set1_ps(t->a->scale), none = _mm512_set1_ps(-INFINITY);
    const float old = t->max[h];
    __m512 most = none;

#pragma GCC unroll 4
    for (int i = 0; i < N_VEC; i++) {
        const __mmask16 m = tr_first16(t->now->n_keys - 16 * i);
        const __m512 x =
            _mm512_mask_mul_ps(none, m, _mm512_maskz_loadu_ps(m, score + 16 * i), scale);
        _mm512_store_ps(t->x + 16 * i, x);
        most = _mm512_max_ps(x, most); /* a NaN loses */
    }
    const float block_max = _mm512_reduce_max_ps(most);
    if (block_max > old) t->max[h] = block_max;
    const int nothing =
        t->max[h] == -INFINITY; /* seen so far: no weight anywhere, but a NaN stays */
    t->keep = nothing || old == -INFINITY ? 0.0f : t->max[h] > old ? exp_of(old - t->max[h]) : 1.0f;
}

/* ... what is left of the scores ... */
static void soft_exp(task *t, int h)
{
    const __m512 none = _mm512_set1_ps(-INFINITY), top = _mm512_set1_ps(t->max[h]);
    const int nothing = t->max[h] == -INFINITY;
    __m512 total = _mm512_setzero_ps();

#pragma GCC unroll 4
    for (int i = 0; i < N_VEC; i++) {
        const __mmask16 m = tr_first16(t->now->n_keys - 16 * i);
        __m512 x = _mm512_load_ps(t->x + 16 * i);
        const __mmask16 empty = _mm512_cmp_ps_mask(x, none, _CMP_EQ_OQ);
        if (!nothing) x = tr_exp16(_mm512_sub_ps(x, top));
        x = _mm512_maskz_mov_ps((__mmask16)(m & ~empty), x);
        _mm512_store_ps(t->x + 16 * i, x);
        total = _mm512_add_ps(total, x);
    }
    t->sum[h] = (nothing ? t->sum[h] : t->sum[h] * t->keep) + _mm512_reduce_add_ps(total);
}

/* ... and its parts, a step of them, at the head's row of the tiles of p. */
static void soft_split(const task *t, uint8_t *p, int step)
{
    const float *x = t->x + step * TR_TILE_STEP;
    tr_split32(p + (size_t)step * TR_N_PARTS * t->part_bytes, t->part_bytes, _mm512_load_ps(x),
               _mm512_load_ps(x + 16));
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

/* Heads of a tile have been done; none is under way. */
static int softmax_done(const task *t)
{
    return t->i_soft >= t->n_tiles || t->soft >= t->rows * HEAD_PIECES;
}

/* The next piece of a tile's softmax: a head's p and what it keeps of its output. Rows of the block after the next one are
 * asked for. */
static void softmax_piece(task *t)
{
    const int r = t->soft / HEAD_PIECES, h = t->i_soft * t->rows + r;
    const int n = t->n_tiles * t->rows, from = tr_team_part(TR_KEY_BLOCK, h, n);
    uint8_t *p = t->p[t->i_soft % 2] + r * 64;

    switch (t->soft++ % HEAD_PIECES) {
    case 0:
        tr_ask_for_rows(t->a, t->list, t->at + from, tr_team_part(TR_KEY_BLOCK, h + 1, n) - from);
        soft_max(t, t->score + h * TR_KEY_BLOCK, h);
        break;
    case 1:
        soft_exp(t, h);
        break;
    case 2:
        soft_split(t, p, 0);
        break;
    default:
        soft_split(t, p, 1);
        if (t->keep != 1.0f) keep_row(t, out_tiles(t, t->i_soft), r, t->keep);
    }
}

static void begin_softmax(task *t, int i_tile)
{
    t->i_soft = i_tile;
    t->soft = 0;
}

/* ---- the products of a block ---- */

/* Behind three products. Not inline, so that no store of it is still to come when a tile is loaded. */
static __attribute__((noinline)) void beside(task *t)
{
    for (int i = 0; i < t->n_prepare && t->next->stage != READY; i++)
        prepare(t);
    for (int i = 0; i < t->n_soft && !softmax_done(t); i++)
        softmax_piece(t);
}

#define KEY_PRODUCTS(i)                                                                            \
    if (n_key_tiles > (i)) {                                                                       \
        _tile_loadd(7, key + (size_t)((i)*t->n_steps) * TR_TILE_BYTES, 64);                        \
        _tile_dpbf16ps(i, 4, 7);                                                                   \
        _tile_dpbf16ps(i, 5, 7);                                                                   \
        _tile_dpbf16ps(i, 6, 7);                                                                   \
        beside(t);                                                                                 \
    }

/* Steps [i, i_end) of score [rows, 64] of a tile of heads; of tiles that no key is in nothing is written. */
static void tile_scores(task *t, int i_tile, int i, int i_end)
{
    const int n_key_tiles = (t->now->n_keys + TR_TILE_ROWS - 1) / TR_TILE_ROWS;
    const uint8_t *q = query_tiles(t, i_tile) + (size_t)i * TR_N_PARTS * t->part_bytes;
    const uint8_t *key = t->now->turned + (size_t)i * TR_TILE_BYTES;
    float *score = t->score + i_tile * t->rows * TR_KEY_BLOCK;
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
 * again. Sums that wait in memory meanwhile are fp32 as they are in tiles. The softmax of the first tile begins beside
 * the last steps of the others. */
static void block_scores(task *t)
{
    const int pieces = pieces_of_block(t), products = t->n_tiles * t->n_steps * KEY_TILES;

    t->i_soft = t->n_tiles;
    t->n_prepare = (pieces + products - 1) / products;
    t->n_soft = 1;
    for (int i = 0; i < t->n_steps; i += STEPS_L1)
        for (int tile = 0; tile < t->n_tiles; tile++) {
            const int end = t->n_steps - i < STEPS_L1 ? t->n_steps : i + STEPS_L1;
            if (end == t->n_steps && tile == 1) begin_softmax(t, 0);
            tile_scores(t, tile, i, end);
        }
    if (t->n_tiles == 1) begin_softmax(t, 0);
}

/* Parts of p stay in six tiles while all columns pass. */
static void tile_values(task *t, int i_tile)
{
    const uint8_t *p = t->p[i_tile % 2], *value = t->now->value;
    float *out = out_tiles(t, i_tile);
    const int two = t->now->n_keys > TR_TILE_STEP;

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
        beside(t);
        if (two) {
            _tile_loadd(7, value + TR_TILE_BYTES, 64);
            _tile_dpbf16ps(6, 3, 7);
            _tile_dpbf16ps(6, 4, 7);
            _tile_dpbf16ps(6, 5, 7);
            beside(t);
        }
        _tile_stored(6, out, 64);
        out += TILE_FLOATS;
        value += KEY_STEPS * TR_TILE_BYTES;
    }
}

/* All heads take in the block. */
static void take_block(task *t)
{
    block_scores(t);
    t->n_soft = (t->rows * HEAD_PIECES + 2 * t->n_columns - 1) / (2 * t->n_columns);
    for (int tile = 0; tile < t->n_tiles; tile++) {
        while (!softmax_done(t))
            softmax_piece(t);
        begin_softmax(t, tile + 1);
        tile_values(t, tile);
    }
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
    begin_block(&t, t.block);
    while (end_block(&t))
        take_block(&t);
    _tile_release();
    for (int h = 0; h < t.n_heads; h++)
        write_head(&t, h);
}
