/* index_logits on codes of every kind, against fp64: every instruction set, heads and widths that fill matrix tiles and
 * that do not, rows of one slot and of another, windows of the context, NaN among keys and queries. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/kernels.h"
#include "kernels/number.h"

enum { N_ISAS = 4, N_ROWS = 4, N_PAGES = 8, MAX_PAGES = 4, CONTEXT = MAX_PAGES * TR_PAGE_TOKENS };
static const char *const isa_names[N_ISAS] = {"plain", "avx2", "avx512", "amx"};

/* Three rows of slot 0, one of slot 1. */
static int32_t slot[N_ROWS] = {0, 0, 0, 1}, position[N_ROWS] = {129, 130, 131, 200};
static int64_t row_write[N_ROWS] = {1, 1, 1, 1};
static uint8_t dense[N_ROWS];
static const int32_t page_table[2 * MAX_PAGES] = {5, 0, 3, 0, 1, 7, 2, 4};

typedef struct scene {
    int n_heads, d;
    uint8_t *q; /* [N_ROWS, n_heads, d] */
    float *w;   /* [N_ROWS, n_heads] */
    char *index;
    tr_dtype dtype;
} scene;

static uint32_t seed = 1;

static uint32_t draw(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

/* Any code that is a number; every eighth below 2^-6 or zero. */
static uint8_t draw_code(void)
{
    const uint8_t c = (uint8_t)draw();
    if (draw() % 8 == 0) return c & 0x87;
    return (c & 0x7f) == 0x7f ? 0x38 : c;
}

static size_t page_bytes(const scene *s)
{
    return tr_index_page_bytes(s->dtype, s->d);
}

static void scene_make(scene *s)
{
    const size_t n = (size_t)(N_ROWS * s->n_heads);

    s->q = malloc(n * (size_t)s->d);
    s->w = malloc(n * sizeof *s->w);
    s->index = malloc(N_PAGES * page_bytes(s));
    assert_true(s->q && s->w && s->index);
    for (size_t i = 0; i < n * (size_t)s->d; i++)
        s->q[i] = draw_code();
    for (size_t i = 0; i < n; i++)
        s->w[i] = (float)(int)(draw() % 2001) * 1e-3f - 1.0f;
    for (int page = 0; page < N_PAGES; page++) {
        uint8_t *code = (uint8_t *)s->index + (size_t)page * page_bytes(s);
        for (int i = 0; i < TR_PAGE_TOKENS * s->d; i++)
            code[i] = draw_code();
        for (int i = 0; i < TR_PAGE_TOKENS; i++) {
            const float scale = ldexpf(1.0f, (int)(draw() % 9) - 4);
            memcpy(code + TR_PAGE_TOKENS * s->d + 4 * i, &scale, sizeof scale);
        }
    }
    /* a NaN in key 70 of slot 0 and in a query of row 1; what lies behind the contexts is none either */
    ((uint8_t *)s->index)[6 * s->d + 1] = 0xff;
    s->q[(size_t)((s->n_heads + 1) * s->d) + 3] = 0x7f;
    memset(s->index + 4 * page_bytes(s), 0x7f, page_bytes(s));
}

static void scene_free(scene *s)
{
    free(s->q);
    free(s->w);
    free(s->index);
}

/* Rows [from, from + n) of the scene; scores outside of the windows stay what they were. */
static void run(const scene *s, const char *isa, int n_threads, int from, int n, float *score,
                const int32_t *first, const int32_t *last)
{
    tr_device_options options = {.name = "cpu", .n_threads = n_threads, .isa = isa};
    int32_t live = n;
    const tr_rows rows = {.n_max = n,
                          .n = &live,
                          .slot = slot + from,
                          .position = position + from,
                          .write = row_write + from,
                          .dense = dense + from,
                          .page_table = page_table,
                          .max_pages = MAX_PAGES};
    const struct tr_index_logits_args args = {
        .rows = &rows,
        .q = s->q + (size_t)from * (size_t)(s->n_heads * s->d),
        .w = s->w + (size_t)from * (size_t)s->n_heads,
        .n_heads = s->n_heads,
        .k = 64,
        .kv = {.index = s->index,
               .dtype = s->dtype,
               .n_pages = N_PAGES,
               .d_latent = 64,
               .d_rope = 16,
               .d_index = s->d},
        .first = first ? first + from : NULL,
        .last = last ? last + from : NULL,
        .n_row = n,
        .score = score + (size_t)from * CONTEXT,
        .ld = CONTEXT,
    };
    tr_device *d;
    const tr_ops *ops;
    tr_err err = {0};

    assert_int_equal(tr_device_open(&d, &ops, &options, &err), TR_OK);
    assert_int_equal(ops->index_logits(d, TR_LANE_MAIN, &args), TR_OK);
    ops->close(d);
}

static void poison(float *score)
{
    for (int i = 0; i < N_ROWS * CONTEXT; i++)
        score[i] = NAN;
}

static void check_score(const scene *s, const char *isa, int row, int key, float got)
{
    const uint8_t *page =
        (uint8_t *)s->index +
        (size_t)page_table[slot[row] * MAX_PAGES + key / TR_PAGE_TOKENS] * page_bytes(s);
    const int at = key % TR_PAGE_TOKENS;
    double sum = 0, size = 0;
    float scale;

    memcpy(&scale, page + TR_PAGE_TOKENS * s->d + 4 * at, sizeof scale);
    for (int h = 0; h < s->n_heads; h++) {
        const size_t head = (size_t)(row * s->n_heads + h);
        double dot = 0;
        for (int i = 0; i < s->d; i++) {
            const double x = (double)tr_e4m3_to_f32(s->q[head * (size_t)s->d + (size_t)i]) *
                             (double)tr_e4m3_to_f32(page[at * s->d + i]);
            dot += x;
            size += fabs(x * (double)s->w[head]);
        }
        sum += (double)s->w[head] * (isnan(dot) ? dot : fmax(dot, 0));
    }
    const double want = sum * (double)scale, room = 1e-6 * size * (double)scale;
    if (isnan(want) ? got != -INFINITY : !(fabs((double)got - want) <= room))
        fail_msg("%s: %d heads of %d: row %d, key %d: %g, expected %g", isa, s->n_heads, s->d, row,
                 key, (double)got, want);
}

/* Right; and the same bits however rows and threads come together. */
static void check_isa(const scene *s, const char *isa)
{
    static float all[N_ROWS * CONTEXT], apart[N_ROWS * CONTEXT];
    static const int32_t first[N_ROWS] = {0, 70, 128, 33}, last[N_ROWS] = {64, 90, 132, 250};

    poison(all);
    run(s, isa, 1, 0, N_ROWS, all, NULL, NULL);
    for (int row = 0; row < N_ROWS; row++)
        for (int key = 0; key < CONTEXT; key++)
            if (key <= position[row])
                check_score(s, isa, row, key, all[row * CONTEXT + key]);
            else
                assert_true(isnan(all[row * CONTEXT + key]));
    poison(apart);
    for (int row = 0; row < N_ROWS; row++)
        run(s, isa, 2, row, 1, apart, NULL, NULL);
    assert_memory_equal(all, apart, sizeof all);

    poison(apart);
    run(s, isa, 2, 0, N_ROWS, apart, first, last);
    for (int row = 0; row < N_ROWS; row++)
        for (int key = 0; key < CONTEXT; key++) {
            const int i = row * CONTEXT + key;
            if (key < first[row] || key >= last[row] || key > position[row])
                assert_true(isnan(apart[i]));
            else
                assert_memory_equal(all + i, apart + i, sizeof *all);
        }
}

static int has(const char *isa)
{
    tr_device_options options = {.name = "cpu", .n_threads = 1, .isa = isa};
    tr_device *d;
    const tr_ops *ops;
    tr_err err = {0};

    if (tr_device_open(&d, &ops, &options, &err) != TR_OK) return 0;
    ops->close(d);
    return 1;
}

static void scores(void **state)
{
    static const int heads[] = {4, 16, 19, 64, 128}, widths[] = {32, 128, 256};

    (void)state;
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!has(isa_names[isa])) continue;
        for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
            /* a width for each number of heads, all of them where there are most tiles */
            for (size_t j = i % 3; j < 3; j += i == 3 ? 1 : 3) {
                scene s = {.n_heads = heads[i], .d = widths[j], .dtype = i % 2 ? TR_BF16 : TR_E4M3};
                scene_make(&s);
                check_isa(&s, isa_names[isa]);
                scene_free(&s);
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(scores)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
