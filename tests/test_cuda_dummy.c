/* Dummy weights that a GPU makes where they are to be: byte for byte what the host makes and packs, in every format, for slices that
 * begin anywhere, for the interleaved halves of gate and up, and for tables. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cuda_test.h"
#include "model/dummy.h"

typedef struct
    piece { /* rows [row0, row0 + n) and columns of a tensor, as rows [o, o + n) of matrix m */
    int row0, n, col0, o, m;
} piece;

typedef struct shape {
    tr_stored stored;
    int n_mats, n_out, n_in, gate_up;
    piece piece[5];
    int n_pieces;
} shape;

static const tr_format format_of[] = {
    [TR_STORED_F8_E4M3] = TR_W_E4M3_B128, [TR_STORED_BF16] = TR_W_BF16, [TR_STORED_F32] = TR_W_F32};

static void *fetch(pair *p, const void *device, size_t bytes)
{
    void *host = test_alloc(bytes, 1);
    pair_ok(p, "download", p->g->download(p->gpu, TR_LANE_MAIN, host, device, bytes));
    const uint64_t ticket = p->g->ticket(p->gpu, TR_LANE_MAIN);
    int done;
    while ((done = p->g->done(p->gpu, TR_LANE_MAIN, ticket)) == 0)
        continue;
    if (done < 0) fail_msg("the device failed: %s", p->g->error(p->gpu));
    return host;
}

/* A piece of both weights: from the host, and made. */
static void put(pair *p, const tr_dummy *d, const tr_wanted *w, const shape *s, const piece *at,
                tr_linear *packed, tr_linear *made)
{
    const int blocks = (at->col0 % 128 + s->n_in + 127) / 128 + 1,
              rows = (at->row0 % 128 + at->n + 127) / 128 + 1;
    const size_t bytes = s->stored == TR_STORED_F8_E4M3 ? 1 : s->stored == TR_STORED_BF16 ? 2 : 4;
    void *raw = test_alloc((size_t)at->n * (size_t)s->n_in, bytes);
    float *scale = test_alloc((size_t)rows * (size_t)blocks, sizeof *scale);
    tr_linear_src src = {
        .src = raw, .ld = (size_t)s->n_in, .i_mat = at->m, .o_begin = at->o, .n_out = at->n};
    tr_made numbers;

    tr_dummy_block(d, w, s->stored, at->row0, at->n, at->col0, s->n_in, raw);
    if (s->stored == TR_STORED_F8_E4M3) {
        tr_dummy_scale(d, w, at->row0 / 128, rows, at->col0 / 128, blocks, scale);
        src.scale = scale;
        src.scale_ld = (size_t)blocks;
        src.row0 = at->row0 % 128;
        src.col0 = at->col0 % 128;
    }
    pair_ok(p, "linear_pack", p->g->linear_pack(p->gpu, packed, &src));
    tr_dummy_made(d, w, s->stored, at->row0, at->col0, &numbers);
    src.src = NULL;
    src.ld = 0;
    pair_ok(p, "linear_made", p->g->linear_made(p->gpu, made, &src, &numbers));
    free(scale);
    free(raw);
}

static void test_weights(void **state)
{
    static const shape shapes[] = {
        {TR_STORED_F8_E4M3, 2, 256, 384, 0, {{0, 256, 0, 0, 0}, {0, 256, 0, 0, 1}}, 2},
        {TR_STORED_F8_E4M3, 1, 200, 333, 0, {{128, 72, 131, 0, 0}, {200, 128, 131, 72, 0}}, 2},
        {TR_STORED_F8_E4M3,
         2,
         512,
         256,
         1,
         {{0, 256, 0, 0, 0},
          {0, 256, 0, 256, 0},
          {0, 128, 0, 0, 1},
          {128, 128, 0, 128, 1},
          {0, 256, 0, 256, 1}},
         5},
        {TR_STORED_BF16, 1, 77, 141, 0, {{3, 50, 7, 0, 0}, {53, 27, 7, 50, 0}}, 2},
        {TR_STORED_BF16, 3, 64, 2048, 0, {{0, 64, 0, 0, 1}}, 1},
        {TR_STORED_F32, 1, 33, 65, 0, {{1, 33, 5, 0, 0}}, 1},
        {TR_STORED_F32, 1, 8, 5000, 0, {{0, 8, 2, 0, 0}}, 1},
    };
    pair *p = *state;
    tr_dummy *d = tr_dummy_create(5);
    const tr_wanted w = {.name = "a.weight", .class = TR_CLASS_Q, .rank = 2, .shape = {600, 5100}};

    assert_non_null(d);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const shape *s = &shapes[i];
        const tr_format format = format_of[s->stored];
        const size_t bytes = p->g->linear_bytes(format, s->n_mats, s->n_out, s->n_in);
        tr_linear packed = {.format = format,
                            .n_mats = s->n_mats,
                            .n_out = s->n_out,
                            .n_in = s->n_in,
                            .gate_up = s->gate_up},
                  made = packed;
        pair_ok(p, "alloc", p->g->alloc(p->gpu, bytes, 0, &packed.data));
        pair_ok(p, "alloc", p->g->alloc(p->gpu, bytes, 0, &made.data));
        for (int j = 0; j < s->n_pieces; j++)
            put(p, d, &w, s, &s->piece[j], &packed, &made);
        unsigned char *want = fetch(p, packed.data, bytes), *got = fetch(p, made.data, bytes);
        size_t n_wrong = 0, n_set = 0;
        for (size_t b = 0; b < bytes; b++) {
            n_wrong += want[b] != got[b];
            n_set += want[b] != 0;
        }
        if (n_wrong) fail_msg("shape %zu: %zu of %zu bytes differ", i, n_wrong, bytes);
        assert_true(n_set > bytes / 8);
        free(want);
        free(got);
        p->g->release(p->gpu, packed.data);
        p->g->release(p->gpu, made.data);
    }
    tr_dummy_free(d);
}

static void test_tables(void **state)
{
    enum { ROWS = 300, COLUMNS = 137 };
    pair *p = *state;
    tr_dummy *d = tr_dummy_create(6);
    const tr_wanted w = {
        .name = "t.weight", .rank = 2, .init = TR_INIT_EMBED, .shape = {ROWS, COLUMNS}};

    assert_non_null(d);
    for (int i = 0; i < 2; i++) {
        const tr_stored stored = i ? TR_STORED_F32 : TR_STORED_BF16;
        const size_t each = i ? 4 : 2, bytes = (size_t)ROWS * COLUMNS * each;
        void *want = test_alloc(bytes, 1), *table;
        tr_made made;
        tr_dummy_block(d, &w, stored, 0, ROWS, 0, COLUMNS, want);
        tr_dummy_made(d, &w, stored, 0, 0, &made);
        pair_ok(p, "alloc", p->g->alloc(p->gpu, bytes, 0, &table));
        pair_ok(p, "table_made", p->g->table_made(p->gpu, table, (int)each, ROWS, COLUMNS, &made));
        void *got = fetch(p, table, bytes);
        assert_memory_equal(got, want, bytes);
        free(got);
        free(want);
        p->g->release(p->gpu, table);
    }
    tr_dummy_free(d);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_weights, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_tables, pair_open, pair_close),
    };
    return run_on_gpu(argc, argv, tests, sizeof tests / sizeof *tests);
}
