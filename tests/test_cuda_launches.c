/* What the CUDA table does with arguments that jobs seldom have, on the device that plays a GPU (tests/fault/cuda_shim.c): kernels
 * do nothing there, but launches are looked at. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/kernels.h"

enum { SPANS = 4000, HEADS = 2, CONTEXT = 2048, D = 128, D_LATENT = 512 };

typedef struct gpu {
    tr_device *d;
    const tr_ops *ops;
} gpu;

static void well(const gpu *g, tr_status st)
{
    if (st != TR_OK) fail_msg("status %d: %s", (int)st, g->ops->error(g->d));
}

static void *take(const gpu *g, size_t bytes)
{
    void *p;

    well(g, g->ops->alloc(g->d, bytes, TR_MEMORY_DEVICE, &p));
    return p;
}

/* HEADS matrices of zeros. */
static tr_linear linear_of(const gpu *g, int n_out, int n_in)
{
    tr_linear w = {.format = TR_W_BF16, .n_mats = HEADS, .n_out = n_out, .n_in = n_in};
    void *zeros = calloc((size_t)n_out * (size_t)n_in, 2);

    assert_non_null(zeros);
    w.data = take(g, g->ops->linear_bytes(w.format, w.n_mats, n_out, n_in));
    for (int i = 0; i < HEADS; i++)
        well(g,
             g->ops->linear_pack(
                 g->d, &w,
                 &(tr_linear_src){.src = zeros, .ld = (size_t)n_in, .i_mat = i, .n_out = n_out}));
    free(zeros);
    return w;
}

static tr_rows rows_of(const gpu *g, int n)
{
    const size_t rows = (size_t)n, max_pages = CONTEXT / TR_PAGE_TOKENS;

    return (tr_rows){.n_max = n,
                     .max_context = CONTEXT,
                     .n = take(g, 4),
                     .slot = take(g, 4 * rows),
                     .position = take(g, 4 * rows),
                     .write = take(g, 8 * rows),
                     .dense = take(g, rows),
                     .page_table = take(g, 4 * rows * max_pages),
                     .max_pages = (int)max_pages};
}

/* Prompts whose keys take more rounds than a window of the plan has room for: where the host knows how many, and where not. */
static void many_prompts(void **state)
{
    const gpu *g = *state;
    const tr_linear uk = linear_of(g, D, D_LATENT), uv = linear_of(g, D, D_LATENT);
    const tr_rows rows = rows_of(g, SPANS);
    struct tr_dense_mha_args a = {
        .rows = &rows,
        .q = take(g, (size_t)SPANS * HEADS * 192 * 2),
        .n_heads = HEADS,
        .d_nope = D,
        .d_rope = 64,
        .d_v = D,
        .scale = 0.1f,
        .w_uk = &uk,
        .w_uv = &uv,
        .kv = {.latent = take(g, 656 * TR_PAGE_TOKENS),
               .dtype = TR_E4M3,
               .n_pages = 1,
               .d_latent = D_LATENT,
               .d_rope = 64},
        .out = take(g, (size_t)SPANS * HEADS * D * 2),
        .n_spans = SPANS,
        .max_context = CONTEXT,
        .workspace_bytes = g->ops->dense_mha_workspace(SPANS, HEADS, CONTEXT),
    };

    a.workspace = take(g, a.workspace_bytes);
    for (int n = 1; n <= SPANS; n = n * 3 + 1) {
        a.n_spans = n;
        for (int64_t keys = 0; keys < 2; keys++) {
            a.n_keys = keys * n * CONTEXT;
            well(g, g->ops->dense_mha(g->d, TR_LANE_MAIN, &a));
        }
    }
    a.n_spans = SPANS;
    a.n_keys = 0;
    well(g, g->ops->dense_mha(g->d, TR_LANE_MAIN, &a));
}

/* Pure, so for any number. */
static void any_number_of_heads(void **state)
{
    const gpu *g = *state;

    for (int heads = 1; heads <= 4096; heads++)
        for (int n = 1; n <= 4096; n *= 8) {
            const size_t bytes = g->ops->sparse_mla_workspace(n, heads, D_LATENT);
            assert_true(bytes > 0 && bytes <= (size_t)1 << 30);
        }
}

/* Rows [o, o + n) of a matrix of zeros, e4m3, that begins at column col0 of a scale block. */
static tr_status pack_at(const gpu *g, tr_linear *w, int i_mat, int o, int n, int col0)
{
    static const uint8_t zeros[D * D];
    static const float ones[16] = {1};

    return g->ops->linear_pack(g->d, w,
                               &(tr_linear_src){.src = zeros,
                                                .ld = D,
                                                .scale = ones,
                                                .scale_ld = 2,
                                                .row0 = o,
                                                .col0 = col0,
                                                .i_mat = i_mat,
                                                .o_begin = o,
                                                .n_out = n});
}

/* Each matrix of a weight has its own place in the blocks of scales, the pieces of one have the same; experts, whose input is
 * quantised once for all, must agree. */
static void places_in_blocks_of_scales(void **state)
{
    const gpu *g = *state;
    tr_linear gate_up = {.format = TR_W_E4M3_B128, .n_mats = 2, .n_out = D, .n_in = D},
              down = {.format = TR_W_E4M3_B128, .n_mats = 2, .n_out = D, .n_in = D / 2};

    gate_up.data = take(g, g->ops->linear_bytes(gate_up.format, 2, D, D));
    down.data = take(g, g->ops->linear_bytes(down.format, 2, D, D / 2));
    for (int i = 0; i < 2; i++) {
        well(g, pack_at(g, &gate_up, i, 0, D / 2, 64 * i));
        well(g, pack_at(g, &gate_up, i, D / 2, D / 2, 64 * i));
        well(g, pack_at(g, &down, i, 0, D, 0));
    }
    assert_int_equal(pack_at(g, &gate_up, 1, D / 2, D / 2, 32), TR_E_USAGE);
    assert_non_null(strstr(g->ops->error(g->d), "matrix 1 begin at columns 64 and 32"));
    assert_int_equal(g->ops->moe(g->d, TR_LANE_MAIN,
                                 &(struct tr_moe_args){
                                     .n_max = 1, .gate_up = &gate_up, .down = &down, .in.d = D}),
                     TR_E_USAGE);
    assert_non_null(strstr(g->ops->error(g->d), "different columns of a scale block"));
}

static int open_gpu(void **state)
{
    gpu *g = calloc(1, sizeof *g);
    tr_err err;

    *state = g;
    return g && tr_device_open(&g->d, &g->ops, &(tr_device_options){.name = "cuda"}, &err) == TR_OK
               ? 0
               : -1;
}

static int close_gpu(void **state)
{
    gpu *g = *state;

    g->ops->close(g->d);
    free(g);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(many_prompts),
        cmocka_unit_test(any_number_of_heads),
        cmocka_unit_test(places_in_blocks_of_scales),
    };
    return cmocka_run_group_tests(tests, open_gpu, close_gpu);
}
