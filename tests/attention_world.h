/* What the attention tests run on: slots with scrambled page tables, every position of them a row, random weights; a
 * backend with these weights packed; and all results of a run of the attention operations. */
#ifndef TR_TESTS_ATTENTION_WORLD_H
#define TR_TESTS_ATTENTION_WORLD_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "tests/attention_topk.h"

enum { N_ISAS = 4, N_SLOTS = 7 };
static const char *const isa_names[N_ISAS] = {"plain", "avx2", "avx512", "amx"};

typedef struct geometry {
    int n_heads, d_nope, d_rope, d_v, d_latent, n_index_heads, d_index, k;
    int contexts[N_SLOTS];
} geometry;

/* clang-format off */
static const geometry geometries[] = {
    /* vectors/model/tiny */
    {4, 32, 16, 32, 64, 4, 32, 16, {1, 63, 64, 65, 129, 80, 200}},
    /* nothing a multiple of a vector; a second scale block of 4 latents */
    {3, 20, 6, 23, 132, 5, 8, 70, {1, 63, 64, 65, 129, 80, 200}},
    /* more heads than a row block */
    {18, 16, 8, 16, 32, 19, 16, 64, {2, 44, 3, 66, 130, 70, 17}},
    /* the real model's heads */
    {4, 128, 64, 128, 512, 4, 128, 24, {1, 20, 66, 3, 2, 44, 5}},
    /* so many heads that sparse_mla turns its keys; the last ones are fewer than a step */
    {33, 16, 8, 16, 36, 3, 16, 68, {1, 63, 3, 66, 130, 70, 17}},
    /* the real model's latents, and heads enough for matrix tiles */
    {9, 8, 64, 8, 512, 2, 64, 130, {1, 2, 3, 30, 150, 7, 17}},
};
/* clang-format on */
enum { N_GEOMETRIES = sizeof geometries / sizeof *geometries };
enum { MAX_CONTEXT = 200, MAX_PAGES = 4, N_PAGES = N_SLOTS * MAX_PAGES };

/* Inputs of a run: every position of every slot is a row, and pad rows stand between some. */
typedef struct world {
    geometry g;
    tr_dtype dtype;
    int n, n_max;
    int32_t *slot, *position, page_table[N_SLOTS * MAX_PAGES];
    int64_t *write;
    uint8_t *dense;
    float *kv_a, *index_k, *q, *index_q, *index_w;
    float *norm, *k_norm, *k_bias, *rope, *w_uk, *w_uv;
} world;

/* A backend with the world's weights packed for it. */
typedef struct machine {
    tr_device *device;
    const tr_ops *ops;
    tr_linear w_uk, w_uk_t, w_uv;
} machine;

typedef enum buffer_name {
    LATENT,
    INDEX,
    Q,
    QA,
    INDEX_Q,
    INDEX_W,
    SCORE,
    POSITION,
    CACHE_ROW,
    N_SELECTED,
    U,
    LSE,
    OUT,
    N_BUFFERS
} buffer_name;
static const char *const buffer_names[N_BUFFERS] = {
    "latent cache", "index cache", "q",          "q_absorbed", "index q", "index w", "score",
    "position",     "cache_row",   "n_selected", "u",          "lse",     "out"};

typedef struct results {
    void *p[N_BUFFERS];
    size_t bytes[N_BUFFERS];
} results;

static float *random_floats(size_t n, float scale)
{
    float *x = get(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = scale * uniform();
    return x;
}

static int is_pad(int slot, int position)
{
    return slot % 4 == 1 && position == 40;
}

static void world_rows(world *w, int form)
{
    int32_t shuffled[N_PAGES];

    for (int i = 0; i < N_PAGES; i++)
        shuffled[i] = i;
    for (int i = N_PAGES - 1; i > 0; i--) {
        int j = (int)(fabsf(uniform()) * (float)i);
        int32_t t = shuffled[i];
        shuffled[i] = shuffled[j];
        shuffled[j] = t;
    }
    memcpy(w->page_table, shuffled, sizeof shuffled);
    w->n = 0;
    for (int s = 0; s < N_SLOTS; s++)
        for (int p = 0; p < w->g.contexts[s]; p++) {
            int pad = is_pad(s, p), i = w->n++;
            w->slot[i] = s;
            w->position[i] = p;
            w->write[i] = (int64_t)w->page_table[s * MAX_PAGES + p / 64] * 64 + p % 64;
            /* form -1: some slots dense, some absorbed, one changes over */
            w->dense[i] = (uint8_t)(form >= 0 ? form : s == 5 ? p < 30 : s % 2);
            if (!pad) continue;
            w->slot[i + 1] = w->slot[i]; /* the real row comes after the pad */
            w->write[i] = -1;
            i = w->n++;
            w->position[i] = p;
            w->write[i] = (int64_t)w->page_table[s * MAX_PAGES + p / 64] * 64 + p % 64;
            w->dense[i] = w->dense[i - 1];
        }
}

/* form: 0 absorbed, 1 dense, -1 mixed. */
static world *world_create(const geometry *g, tr_dtype dtype, int form)
{
    world *w = get(sizeof *w);
    size_t n = 0;

    for (int s = 0; s < N_SLOTS; s++)
        n += (size_t)g->contexts[s] + (g->contexts[s] > 40 && is_pad(s, 40));
    memset(w, 0, sizeof *w);
    w->g = *g;
    w->dtype = dtype;
    w->n_max = (int)n;
    w->slot = get(n * 4);
    w->position = get(n * 4);
    w->write = get(n * 8);
    w->dense = get(n);
    world_rows(w, form);
    assert_int_equal(w->n, w->n_max);
    w->kv_a = random_floats(n * (size_t)(g->d_latent + g->d_rope), 2.0f);
    w->index_k = random_floats(n * (size_t)g->d_index, 1.0f);
    w->q = random_floats(n * (size_t)(g->n_heads * (g->d_nope + g->d_rope)), 1.5f);
    w->index_q = random_floats(n * (size_t)(g->n_index_heads * g->d_index), 1.0f);
    w->index_w = random_floats(n * (size_t)g->n_index_heads, 1.0f);
    w->norm = random_floats((size_t)g->d_latent, 1.0f);
    w->k_norm = random_floats((size_t)g->d_index, 1.0f);
    w->k_bias = random_floats((size_t)g->d_index, 0.3f);
    w->rope = get((size_t)(MAX_CONTEXT * g->d_rope) * sizeof(float));
    for (int i = 0; i < MAX_CONTEXT * g->d_rope / 2; i++) {
        double angle = (i / (g->d_rope / 2)) * pow(0.1, i % (g->d_rope / 2));
        w->rope[2 * i] = (float)cos(angle);
        w->rope[2 * i + 1] = (float)sin(angle);
    }
    float scale = 2.0f / sqrtf((float)g->d_latent);
    w->w_uk = random_floats((size_t)(g->n_heads * g->d_nope * g->d_latent), scale);
    w->w_uv = random_floats((size_t)(g->n_heads * g->d_v * g->d_latent), scale);
    return w;
}

static void world_free(world *w)
{
    void *all[] = {w->slot, w->position, w->write,   w->dense, w->kv_a,   w->index_k,
                   w->q,    w->index_q,  w->index_w, w->norm,  w->k_norm, w->k_bias,
                   w->rope, w->w_uk,     w->w_uv,    w};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void pack(machine *m, tr_linear *l, int n_mats, int n_out, int n_in, const float *src,
                 int transposed)
{
    size_t bytes = m->ops->linear_bytes(TR_W_F32, n_mats, n_out, n_in);

    *l = (tr_linear){
        .format = TR_W_F32, .n_mats = n_mats, .n_out = n_out, .n_in = n_in, .data = get(bytes)};
    memset(l->data, 0, bytes);
    for (int h = 0; h < n_mats; h++) {
        tr_linear_src s = {.src = src + (size_t)h * n_out * n_in,
                           .ld = (size_t)(transposed ? n_out : n_in),
                           .transposed = transposed,
                           .i_mat = h,
                           .n_out = n_out};
        assert_int_equal(m->ops->linear_pack(m->device, l, &s), TR_OK);
    }
}

/* 0: this machine or build lacks the instruction set. */
static int machine_open(machine *m, const world *w, const char *isa, int n_threads)
{
    tr_device_options options = {.name = "cpu", .n_threads = 1, .isa = isa};
    const geometry *g = &w->g;
    tr_err err = {0};

    memset(m, 0, sizeof *m);
    if (tr_device_open(&m->device, &m->ops, &options, &err) != TR_OK) {
        assert_string_not_equal(isa, "plain");
        return 0;
    }
    pack(m, &m->w_uk, g->n_heads, g->d_nope, g->d_latent, w->w_uk, 0);
    pack(m, &m->w_uk_t, g->n_heads, g->d_latent, g->d_nope, w->w_uk, 1);
    pack(m, &m->w_uv, g->n_heads, g->d_v, g->d_latent, w->w_uv, 0);
    m->ops->close(
        m->device); /* packed by one thread, used by many: fewer teams to wake on a busy machine */
    options.n_threads = n_threads;
    assert_int_equal(tr_device_open(&m->device, &m->ops, &options, &err), TR_OK);
    return 1;
}

static void machine_close(machine *m)
{
    free(m->w_uk.data);
    free(m->w_uk_t.data);
    free(m->w_uv.data);
    m->ops->close(m->device);
}

static results results_create(const world *w)
{
    const geometry *g = &w->g;
    size_t n = (size_t)w->n, heads = n * (size_t)g->n_heads;
    results r = {
        .bytes = {[LATENT] = tr_kv_row_bytes(w->dtype, g->d_latent, g->d_rope) * N_PAGES * 64,
                  [INDEX] = tr_index_page_bytes(w->dtype, g->d_index) * N_PAGES,
                  [Q] = heads * (size_t)(g->d_nope + g->d_rope) * 4,
                  [QA] = heads * (size_t)(g->d_latent + g->d_rope) * 4,
                  [INDEX_Q] =
                      n * (size_t)(g->n_index_heads * g->d_index) * (w->dtype == TR_F32 ? 4 : 1),
                  [INDEX_W] = n * (size_t)g->n_index_heads * 4,
                  [SCORE] = n * MAX_CONTEXT * 4,
                  [POSITION] = n * (size_t)g->k * 4,
                  [CACHE_ROW] = n * (size_t)g->k * 4,
                  [N_SELECTED] = n * 4,
                  [U] = heads * (size_t)g->d_latent * 4,
                  [LSE] = heads * 4,
                  [OUT] = heads * (size_t)g->d_v * 4}};
    for (int i = 0; i < N_BUFFERS; i++)
        r.p[i] = get(r.bytes[i]);
    memcpy(r.p[Q], w->q, r.bytes[Q]);
    memcpy(r.p[INDEX_W], w->index_w, r.bytes[INDEX_W]);
    return r;
}

static void results_free(results *r)
{
    for (int i = 0; i < N_BUFFERS; i++)
        free(r->p[i]);
}

static float *floats_at(const results *r, buffer_name name, const world *w, int row)
{
    return (float *)r->p[name] + r->bytes[name] / 4 / (size_t)w->n * (size_t)row;
}

static tr_kv_layer layer_of(const world *w, const results *r)
{
    return (tr_kv_layer){.latent = r->p[LATENT],
                         .index = r->p[INDEX],
                         .dtype = w->dtype,
                         .n_pages = N_PAGES,
                         .d_latent = w->g.d_latent,
                         .d_rope = w->g.d_rope,
                         .d_index = w->g.d_index};
}

static tr_rows rows_of(const world *w, int row, int32_t *n)
{
    return (tr_rows){.n_max = w->n_max,
                     .max_context = MAX_CONTEXT,
                     .n = n,
                     .slot = w->slot + row,
                     .position = w->position + row,
                     .write = w->write + row,
                     .dense = w->dense + row,
                     .page_table = w->page_table,
                     .max_pages = MAX_PAGES};
}

static float attention_scale(const geometry *g)
{
    return 1.5f / sqrtf((float)(g->d_nope + g->d_rope));
}

#define OP(name, ...)                                                                              \
    assert_int_equal(                                                                              \
        m->ops->name(m->device, TR_LANE_MAIN, &(struct tr_##name##_args){__VA_ARGS__}), TR_OK)

static void run_write(const machine *m, const world *w, results *r, int row, int32_t n)
{
    const geometry *g = &w->g;
    tr_rows rows = rows_of(w, row, &n);
    size_t d_key = (size_t)(g->d_latent + g->d_rope), d_index = (size_t)g->d_index;

    OP(kv_write, .rows = &rows, .kv_a = w->kv_a + (size_t)row * d_key, .ld_kv_a = d_key,
       .index_k = w->index_k + (size_t)row * d_index, .ld_index_k = d_index, .norm = w->norm,
       .k_norm = w->k_norm, .k_bias = w->k_bias, .rope = w->rope, .eps = 1e-6f,
       .kv = layer_of(w, r));
}

static void run_index(const machine *m, const world *w, results *r, int row, int32_t n)
{
    const geometry *g = &w->g;
    tr_rows rows = rows_of(w, row, &n);
    size_t at = (size_t)row * (size_t)(g->n_index_heads * g->d_index);
    char *iq = (char *)r->p[INDEX_Q] + at * (w->dtype == TR_F32 ? 4 : 1);

    OP(index_query, .rows = &rows, .q = w->index_q + at, .w = floats_at(r, INDEX_W, w, row),
       .n_heads = g->n_index_heads, .d_index = g->d_index, .d_rope = g->d_rope,
       .cache_dtype = w->dtype, .rope = w->rope, .out = iq);
    OP(index_logits, .rows = &rows, .q = iq, .w = floats_at(r, INDEX_W, w, row),
       .n_heads = g->n_index_heads, .k = g->k, .kv = layer_of(w, r), .i_row = 0, .n_row = n,
       .score = floats_at(r, SCORE, w, row), .ld = MAX_CONTEXT);
    OP(topk, .rows = &rows, .score = floats_at(r, SCORE, w, row), .ld = MAX_CONTEXT, .k = g->k,
       .n_row = n, .position = (int32_t *)(void *)floats_at(r, POSITION, w, row),
       .cache_row = (int32_t *)(void *)floats_at(r, CACHE_ROW, w, row),
       .n_selected = (int32_t *)(void *)floats_at(r, N_SELECTED, w, row));
}

static void run_attention(const machine *m, const world *w, results *r, int row, int32_t n)
{
    const geometry *g = &w->g;
    tr_rows rows = rows_of(w, row, &n);

    OP(mla_query, .rows = &rows, .q = floats_at(r, Q, w, row), .n_heads = g->n_heads,
       .d_nope = g->d_nope, .d_rope = g->d_rope, .d_latent = g->d_latent, .rope = w->rope,
       .w_uk_t = &m->w_uk_t, .q_absorbed = floats_at(r, QA, w, row));
    size_t bytes = m->ops->sparse_mla_workspace(n, g->n_heads, g->d_latent);
    void *workspace = get(bytes);
    OP(sparse_mla, .rows = &rows, .q = floats_at(r, QA, w, row), .n_heads = g->n_heads,
       .scale = attention_scale(g), .cache_row = (int32_t *)(void *)floats_at(r, CACHE_ROW, w, row),
       .k = g->k, .kv = layer_of(w, r), .out = floats_at(r, U, w, row),
       .lse = floats_at(r, LSE, w, row), .workspace = workspace, .workspace_bytes = bytes);
    free(workspace);
    OP(mla_value, .rows = &rows, .u = floats_at(r, U, w, row), .n_heads = g->n_heads,
       .d_latent = g->d_latent, .d_v = g->d_v, .w_uv = &m->w_uv, .out = floats_at(r, OUT, w, row));
    OP(dense_mha, .rows = &rows, .q = floats_at(r, Q, w, row), .n_heads = g->n_heads,
       .d_nope = g->d_nope, .d_rope = g->d_rope, .d_v = g->d_v, .scale = attention_scale(g),
       .w_uk = &m->w_uk, .w_uv = &m->w_uv, .kv = layer_of(w, r), .out = floats_at(r, OUT, w, row));
}

/* All rows, `chunk` at a time. Each chunk sees only what it and the ones before it wrote. */
static results run_all(const machine *m, const world *w, int chunk)
{
    results r = results_create(w);

    for (int row = 0; row < w->n; row += chunk) {
        int n = w->n - row < chunk ? w->n - row : chunk;
        run_write(m, w, &r, row, n);
        run_index(m, w, &r, row, n);
        run_attention(m, w, &r, row, n);
    }
    return r;
}

#endif
