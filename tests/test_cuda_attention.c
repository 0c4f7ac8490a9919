/* The CUDA backend's attention against the CPU's plain forms: caches and index queries to the bit,
 * selections equal on equal scores, the rest within what bf16 operands leave. */
#include <config.h>

#include "tests/cuda_test.h"

enum { SLOTS = 3, PAGES_EACH = 4, N_PAGES = SLOTS * PAGES_EACH, MAX_POSITION = PAGES_EACH * 64 };

typedef struct geometry {
    int heads, d_nope, d_rope, d_v, d_latent, index_heads, d_index, k;
    int context[SLOTS];
} geometry;

/* clang-format off */
static const geometry geometries[] = {
    {4, 32, 16, 32, 64, 4, 32, 16, {1, 65, 200}},     /* vectors/model/tiny */
    {3, 20, 6, 23, 132, 5, 8, 70, {63, 64, 129}},     /* nothing a multiple of a vector; a second scale block of 4 latents */
    {18, 16, 8, 16, 32, 16, 128, 64, {2, 66, 130}},
    {5, 128, 64, 128, 512, 64, 128, 24, {20, 64, 131}}, /* the real model's heads */
};
/* clang-format on */

typedef struct world {
    const geometry *g;
    tr_dtype dtype;
    int n;
    tr_rows rows, dev_rows;
    tr_kv_layer kv, dev_kv;
    float *rope;
} world;

/* Every position of every slot, ascending, pads between; form 0: absorbed, 1: dense, 2: slot 1
 * dense, slot 2 changes over. */
static void make_world(pair *p, world *w, const geometry *g, tr_dtype dtype, int form)
{
    int n = 0;
    memset(w, 0, sizeof *w);
    w->g = g;
    w->dtype = dtype;
    for (int s = 0; s < SLOTS; s++)
        n += g->context[s] + 1;
    tr_rows r = {.n_max = n + 5, .max_context = MAX_POSITION, .max_pages = PAGES_EACH};
    r.n = word(p, n);
    r.token = array(p, (size_t)(n + 5) * 4);
    r.slot = array(p, (size_t)(n + 5) * 4);
    r.position = array(p, (size_t)(n + 5) * 4);
    r.begin = array(p, (size_t)(n + 5) * 4);
    r.write = array(p, (size_t)(n + 5) * 8);
    r.dense = array(p, (size_t)n + 5);
    int32_t *pages = array(p, N_PAGES * 4);
    for (int i = 0; i < N_PAGES; i++)
        pages[i] = (i * 7 + 3) % N_PAGES;
    r.page_table = pages;
    n = 0;
    for (int s = 0; s < SLOTS; s++)
        for (int at = 0; at <= g->context[s]; at++, n++) {
            const int pad = at == g->context[s], position = pad ? 0 : at;
            r.slot[n] = s;
            r.position[n] = position;
            r.write[n] = pad ? -1 : (int64_t)pages[s * PAGES_EACH + at / 64] * 64 + at % 64;
            r.dense[n] = form == 1 || (form == 2 && (s == 1 || (s == 2 && at < 30)));
        }
    w->n = n;
    w->rows = r;
    w->dev_rows = twin_rows(p, &r);
    w->kv = (tr_kv_layer){.dtype = dtype,
                          .n_pages = N_PAGES,
                          .d_latent = g->d_latent,
                          .d_rope = g->d_rope,
                          .d_index = g->d_index};
    w->kv.latent = array(p, N_PAGES * 64 * tr_kv_row_bytes(dtype, g->d_latent, g->d_rope));
    w->kv.index = array(p, N_PAGES * tr_index_page_bytes(dtype, g->d_index));
    w->dev_kv = w->kv;
    TWIN(p, w->dev_kv.latent);
    TWIN(p, w->dev_kv.index);
    w->rope = array(p, (size_t)(MAX_POSITION * g->d_rope) * 4);
    for (int i = 0; i < MAX_POSITION * g->d_rope / 2; i++) {
        const double angle = (i / (g->d_rope / 2)) * pow(0.1, i % (g->d_rope / 2));
        w->rope[2 * i] = (float)cos(angle);
        w->rope[2 * i + 1] = (float)sin(angle);
    }
}

/* One row in `step` of the world's; how many. */
static int thin_rows(pair *p, const world *w, int step, tr_rows *few)
{
    const size_t n = (size_t)w->rows.n_max;
    int m = 0;
    *few = w->rows;
    few->slot = array(p, n * sizeof *few->slot);
    few->position = array(p, n * sizeof *few->position);
    few->begin = array(p, n * sizeof *few->begin);
    few->write = array(p, n * sizeof *few->write);
    few->dense = array(p, n * sizeof *few->dense);
    for (int i = 0; i < w->n; i += step, m++) {
        few->slot[m] = w->rows.slot[i];
        few->position[m] = w->rows.position[i];
        few->begin[m] = w->rows.begin[i];
        few->write[m] = w->rows.write[i];
        few->dense[m] = w->rows.dense[i];
    }
    few->n = word(p, m);
    return m;
}

/* Caches, to the bit. */
static void write_keys(pair *p, world *w)
{
    const geometry *g = w->g;
    const size_t n = (size_t)w->rows.n_max, d_kv = (size_t)(g->d_latent + g->d_rope);
    float *kv_a = acts(p, n * d_kv, 2), *index_k = acts(p, n * (size_t)g->d_index, 1),
          *norm = floats(p, (size_t)g->d_latent, 1), *k_norm = floats(p, (size_t)g->d_index, 1),
          *k_bias = floats(p, (size_t)g->d_index, 0.3f);
    memset(kv_a, 0, d_kv * 4); /* an all-zero latent: the floor of its scale */
    struct tr_kv_write_args c = {.rows = &w->rows,
                                 .kv_a = kv_a,
                                 .ld_kv_a = d_kv,
                                 .index_k = index_k,
                                 .ld_index_k = (size_t)g->d_index,
                                 .norm = norm,
                                 .k_norm = k_norm,
                                 .k_bias = k_bias,
                                 .rope = w->rope,
                                 .eps = 1e-6f,
                                 .kv = w->kv},
                            d = c;
    push(p);
    d.rows = &w->dev_rows;
    d.kv = w->dev_kv;
    TWIN(p, d.kv_a);
    TWIN(p, d.index_k);
    TWIN(p, d.norm);
    TWIN(p, d.k_norm);
    TWIN(p, d.k_bias);
    TWIN(p, d.rope);
    assert_int_equal(p->c->kv_write(p->cpu, TR_LANE_MAIN, &c), TR_OK);
    pair_ok(p, "kv_write", p->g->kv_write(p->gpu, TR_LANE_MAIN, &d));
    same_bytes(p, "latent cache", w->kv.latent,
               N_PAGES * 64 * tr_kv_row_bytes(w->dtype, g->d_latent, g->d_rope));
    same_bytes(p, "index cache", w->kv.index, N_PAGES * tr_index_page_bytes(w->dtype, g->d_index));
}

/* What fp32 rounds when it makes the score of row i and key s: the sum of its terms' magnitudes. */
static double terms(const world *w, const uint8_t *q8, const float *head_weight, int i, int s)
{
    const geometry *g = w->g;
    const int32_t page = w->rows.page_table[w->rows.slot[i] * PAGES_EACH + s / 64];
    const uint8_t *base =
        (const uint8_t *)w->kv.index + (size_t)page * tr_index_page_bytes(w->dtype, g->d_index);
    const uint8_t *key = base + (size_t)(s % 64) * (size_t)g->d_index;
    float scale;
    double sum = 0;
    memcpy(&scale, base + (size_t)(64 * g->d_index) + (size_t)(s % 64) * 4, sizeof scale);
    for (int h = 0; h < g->index_heads; h++) {
        const size_t at = (size_t)i * (size_t)g->index_heads + (size_t)h;
        double dot = 0;
        for (int j = 0; j < g->d_index; j++)
            dot += fabs((double)tr_e4m3_to_f32(q8[at * (size_t)g->d_index + (size_t)j]) *
                        (double)tr_e4m3_to_f32(key[j]));
        sum += fabs((double)head_weight[at]) * dot;
    }
    return sum * (double)scale;
}

/* fp8 products on Hopper's matrix instructions: of the terms of a sum, what lies 2^-13 below the largest is lost. */
static const double fp8_sum_error = 1.0 / 4096;

/* Steps whose rows see at most k keys have no scores: all of them are selected. */
static void select_all(pair *p, world *w)
{
    const geometry *g = w->g;
    const size_t n = (size_t)w->rows.n_max, lists = n * (size_t)g->k * 4;
    int32_t *at = array(p, n * 4), *position = array(p, lists), *cache_row = array(p, lists),
            *n_selected = array(p, n * 4);
    tr_rows host = w->rows, dev = w->dev_rows;
    struct tr_topk_args tc = {.rows = &host,
                              .ld = MAX_POSITION,
                              .k = g->k,
                              .n_row = w->n,
                              .position = position,
                              .cache_row = cache_row,
                              .n_selected = n_selected},
                        td = tc;

    for (size_t i = 0; i < n; i++)
        at[i] = w->rows.position[i] < g->k ? w->rows.position[i] : g->k - 1;
    host.position = dev.position = at;
    push(p);
    td.rows = &dev;
    TWIN(p, dev.position);
    TWIN(p, td.position);
    TWIN(p, td.cache_row);
    TWIN(p, td.n_selected);
    assert_int_equal(p->c->topk(p->cpu, TR_LANE_MAIN, &tc), TR_OK);
    pair_ok(p, "topk without scores", p->g->topk(p->gpu, TR_LANE_MAIN, &td));
    same_bytes(p, "n_selected", n_selected, (size_t)w->n * 4);
    same_bytes(p, "positions", position, (size_t)w->n * (size_t)g->k * 4);
    same_bytes(p, "cache rows", cache_row, (size_t)w->n * (size_t)g->k * 4);
}

/* Index queries to the bit, scores, and the same selection from the same scores; lists stay for the
 * attention. */
static int32_t *select_keys(pair *p, world *w, int ties)
{
    const geometry *g = w->g;
    const size_t n = (size_t)w->rows.n_max, heads = (size_t)g->index_heads, d = (size_t)g->d_index,
                 ld = MAX_POSITION;
    float *q = acts(p, n * heads * d, 1), *head_weight = floats(p, n * heads, 1),
          *score = array(p, n * ld * 4);
    uint8_t *q8 = array(p, n * heads * d);
    int32_t *position = array(p, n * (size_t)g->k * 4), *cache_row = array(p, n * (size_t)g->k * 4),
            *n_selected = array(p, n * 4);
    if (ties) memset(q, 0, n * heads * d * 4);
    struct tr_index_query_args qc = {.rows = &w->rows,
                                     .q = q,
                                     .w = head_weight,
                                     .n_heads = g->index_heads,
                                     .d_index = g->d_index,
                                     .d_rope = g->d_rope < g->d_index ? g->d_rope : 0,
                                     .cache_dtype = w->dtype,
                                     .rope = w->rope,
                                     .out = q8},
                               qd = qc;
    push(p);
    qd.rows = &w->dev_rows;
    TWIN(p, qd.q);
    TWIN(p, qd.w);
    TWIN(p, qd.rope);
    TWIN(p, qd.out);
    assert_int_equal(p->c->index_query(p->cpu, TR_LANE_MAIN, &qc), TR_OK);
    pair_ok(p, "index_query", p->g->index_query(p->gpu, TR_LANE_MAIN, &qd));
    same_bytes(p, "index query", q8, n * heads * d);
    same_bytes(p, "index weights", head_weight, n * heads * 4);

    for (int part = 0; part < 2; part++) { /* rows in two parts, as stripes are */
        const int i_row = part ? w->n / 2 : 0, n_row = part ? w->n - w->n / 2 : w->n / 2;
        struct tr_index_logits_args lc = {.rows = &w->rows,
                                          .q = q8,
                                          .w = head_weight,
                                          .n_heads = g->index_heads,
                                          .k = g->k,
                                          .kv = w->kv,
                                          .i_row = i_row,
                                          .n_row = n_row,
                                          .score = score,
                                          .ld = ld},
                                    ldv = lc;
        memset(score, 0, n * ld * 4);
        push(p);
        ldv.rows = &w->dev_rows;
        ldv.kv = w->dev_kv;
        TWIN(p, ldv.q);
        TWIN(p, ldv.w);
        TWIN(p, ldv.score);
        assert_int_equal(p->c->index_logits(p->cpu, TR_LANE_MAIN, &lc), TR_OK);
        pair_ok(p, "index_logits", p->g->index_logits(p->gpu, TR_LANE_MAIN, &ldv));
        const float *got = pull(p, score);
        for (int r = 0; r < n_row; r++) {
            const int i = i_row + r;
            if (w->rows.dense[i] || w->rows.write[i] < 0 || w->rows.position[i] < g->k) continue;
            for (int s = 0; s <= w->rows.position[i]; s++) {
                const double want = (double)score[(size_t)r * ld + (size_t)s],
                             error = fabs((double)got[(size_t)r * ld + (size_t)s] - want);
                if (!(error <= fp8_sum_error * terms(w, q8, head_weight, i, s)))
                    fail_msg("index_logits: row %d, key %d: %g, not %g", i, s,
                             (double)got[(size_t)r * ld + (size_t)s], want);
            }
        }
        struct tr_topk_args tc = {.rows = &w->rows,
                                  .score = score,
                                  .ld = ld,
                                  .k = g->k,
                                  .i_row = i_row,
                                  .n_row = n_row,
                                  .position = position,
                                  .cache_row = cache_row,
                                  .n_selected = n_selected},
                            td = tc;
        push(p); /* the CPU's scores */
        td.rows = &w->dev_rows;
        TWIN(p, td.score);
        TWIN(p, td.position);
        TWIN(p, td.cache_row);
        TWIN(p, td.n_selected);
        assert_int_equal(p->c->topk(p->cpu, TR_LANE_MAIN, &tc), TR_OK);
        pair_ok(p, "topk", p->g->topk(p->gpu, TR_LANE_MAIN, &td));
        const size_t at = (size_t)i_row * (size_t)g->k;
        same_bytes(p, "n_selected", n_selected + i_row, (size_t)n_row * 4);
        same_bytes(p, "positions", position + at, (size_t)n_row * (size_t)g->k * 4);
        same_bytes(p, "cache rows", cache_row + at, (size_t)n_row * (size_t)g->k * 4);
    }
    select_all(p, w);
    return cache_row;
}

/* |gpu - cpu| of rows [n, width], relative to the row's largest number. */
static void near_rows(pair *p, const char *what, const float *host, int n, int width,
                      double relative)
{
    const float *got = pull(p, host);
    for (int r = 0; r < n; r++) {
        double size = 1e-6;
        for (int j = 0; j < width; j++)
            size = fmax(size, fabs((double)host[(size_t)r * (size_t)width + (size_t)j]));
        for (int j = 0; j < width; j++) {
            const size_t at = (size_t)r * (size_t)width + (size_t)j;
            if (!(fabs((double)got[at] - (double)host[at]) <= relative * size))
                fail_msg("%s: row %d, number %d: %.7g, not %.7g (largest of the row %.3g)", what, r,
                         j, (double)got[at], (double)host[at], size);
        }
    }
}

/* bf16 operands, 2^-9 each, averaged over many products; q and the output of one head at a time. */
static const double bf16_error = 1.5e-2;

/* mla_value's e4m3 form, of the numbers that it has written (out): where no row is dense, and a product could take it. */
static void value_codes(pair *p, world *w, const struct tr_mla_value_args *numbers,
                        const float *out)
{
    struct tr_mla_value_args a = *numbers;
    const int d = a.n_heads * a.d_v, n_max = w->rows.n_max;
    const size_t ld = (size_t)(n_max + 3) / 4 * 4;
    for (int i = 0; i < w->n; i++)
        if (w->rows.dense[i]) return;
    if (d % 128) return;
    float *want = test_alloc((size_t)n_max * (size_t)d, sizeof *want),
          *scale = floats(p, ld * (size_t)d / 128, 1);
    uint8_t *q = array(p, (size_t)n_max * (size_t)d);
    memcpy(want, pull(p, out), (size_t)n_max * (size_t)d * sizeof *want);
    a.q = twin(p, q);
    a.q_scale = twin(p, scale);
    for (a.scale_pow2 = 0; a.scale_pow2 < 2; a.scale_pow2++) {
        pair_ok(p, "mla_value to codes", p->g->mla_value(p->gpu, TR_LANE_MAIN, &a));
        same_codes(p, "mla_value", want, q, scale, w->n, n_max, d, a.scale_pow2);
    }
    free(want);
}

static void attend(pair *p, world *w, const int32_t *cache_row, tr_format format)
{
    const geometry *g = w->g;
    const int heads = g->heads, d_q = g->d_nope + g->d_rope, d_key = g->d_latent + g->d_rope;
    const size_t n = (size_t)w->rows.n_max;
    weight uk, uk_t, uv;
    weight_new(p, &uk, format, heads, g->d_nope, g->d_latent, 0, 0);
    weight_new(p, &uk_t, format, heads, g->d_latent, g->d_nope, 0, 0);
    weight_new(p, &uv, format, heads, g->d_v, g->d_latent, 0, 0);
    const size_t work_bytes = p->g->sparse_mla_workspace((int)n, heads, g->d_latent);
    float *q = acts(p, n * (size_t)(heads * d_q), 0.2f),
          *qa = acts(p, n * (size_t)(heads * d_key), 1),
          *u = acts(p, n * (size_t)(heads * g->d_latent), 1),
          *lse = array(p, n * (size_t)heads * 4), *out = acts(p, n * (size_t)(heads * g->d_v), 1);
    void *work = array(p, work_bytes);
    struct tr_mla_query_args qc = {.rows = &w->rows,
                                   .q = q,
                                   .n_heads = heads,
                                   .d_nope = g->d_nope,
                                   .d_rope = g->d_rope,
                                   .d_latent = g->d_latent,
                                   .rope = w->rope,
                                   .w_uk_t = &uk_t.c,
                                   .q_absorbed = qa},
                             qd = qc;
    push(p);
    qd.rows = &w->dev_rows;
    qd.w_uk_t = &uk_t.g;
    TWIN(p, qd.q);
    TWIN(p, qd.rope);
    TWIN(p, qd.q_absorbed);
    assert_int_equal(p->c->mla_query(p->cpu, TR_LANE_MAIN, &qc), TR_OK);
    pair_ok(p, "mla_query", p->g->mla_query(p->gpu, TR_LANE_MAIN, &qd));
    near_rows(p, "q with rope", q, (int)n * heads, d_q, act_error);
    near_rows(p, "q_absorbed", qa, (int)n * heads, d_key, act_error);

    round_floats(qa, n * (size_t)(heads * d_key)); /* dense rows' are whatever was there */
    for (size_t i = 0; i < n * (size_t)(heads * d_key); i++) /* tame logits */
        qa[i] = tr_round_bf16(qa[i] * 0.05f);
    struct tr_sparse_mla_args sc = {.rows = &w->rows,
                                    .q = qa,
                                    .n_heads = heads,
                                    .scale = 0.1f,
                                    .cache_row = cache_row,
                                    .k = g->k,
                                    .kv = w->kv,
                                    .out = u,
                                    .lse = lse},
                              sd = sc;
    push(p);
    sd.workspace = twin(p, work);
    sd.workspace_bytes = work_bytes;
    sd.rows = &w->dev_rows;
    sd.kv = w->dev_kv;
    TWIN(p, sd.q);
    TWIN(p, sd.cache_row);
    TWIN(p, sd.out);
    TWIN(p, sd.lse);
    assert_int_equal(p->c->sparse_mla(p->cpu, TR_LANE_MAIN, &sc), TR_OK);
    pair_ok(p, "sparse_mla", p->g->sparse_mla(p->gpu, TR_LANE_MAIN, &sd));
    near_rows(p, "sparse_mla", u, (int)n * heads, g->d_latent, bf16_error);
    const float *got = pull(p, lse);
    for (int i = 0; i < w->n * heads; i++)
        if (got[i] != lse[i] &&
            !(fabs((double)got[i] - (double)lse[i]) <= 1e-4 + 1e-5 * fabs((double)lse[i])))
            fail_msg("lse %d: %g, not %g", i, (double)got[i], (double)lse[i]);

    round_floats(u, n * (size_t)(heads * g->d_latent));
    struct tr_mla_value_args vc = {.rows = &w->rows,
                                   .u = u,
                                   .n_heads = heads,
                                   .d_latent = g->d_latent,
                                   .d_v = g->d_v,
                                   .w_uv = &uv.c,
                                   .out = out},
                             vd = vc;
    push(p);
    vd.rows = &w->dev_rows;
    vd.w_uv = &uv.g;
    TWIN(p, vd.u);
    TWIN(p, vd.out);
    assert_int_equal(p->c->mla_value(p->cpu, TR_LANE_MAIN, &vc), TR_OK);
    pair_ok(p, "mla_value", p->g->mla_value(p->gpu, TR_LANE_MAIN, &vd));
    near_rows(p, "mla_value", out, (int)n * heads, g->d_v, act_error);
    value_codes(p, w, &vd, out);

    round_floats(q, n * (size_t)(heads * d_q));
    struct tr_dense_mha_args dc = {.rows = &w->rows,
                                   .q = q,
                                   .n_heads = heads,
                                   .d_nope = g->d_nope,
                                   .d_rope = g->d_rope,
                                   .d_v = g->d_v,
                                   .scale = 0.05f,
                                   .w_uk = &uk.c,
                                   .w_uv = &uv.c,
                                   .kv = w->kv,
                                   .out = out},
                             dd = dc;
    push(p);
    dd.rows = &w->dev_rows;
    dd.kv = w->dev_kv;
    dd.w_uk = &uk.g;
    dd.w_uv = &uv.g;
    TWIN(p, dd.q);
    TWIN(p, dd.out);
    assert_int_equal(p->c->dense_mha(p->cpu, TR_LANE_MAIN, &dc), TR_OK);
    pair_ok(p, "dense_mha", p->g->dense_mha(p->gpu, TR_LANE_MAIN, &dd));
    near_rows(p, "dense_mha", out, (int)n * heads, g->d_v, bf16_error);

    /* Again with memory to work in, which another form wants; poisoned where it writes. */
    const size_t width = (size_t)(heads * g->d_v),
                 bytes = p->g->dense_mha_workspace((int)n, heads, w->rows.max_context);
    float *want = test_alloc(n * width, sizeof *want);
    void *dense_work = array(p, bytes);
    memcpy(want, out, n * width * sizeof *want);
    for (size_t i = 0; i < n * width; i++)
        if (i / width < (size_t)w->n && w->rows.dense[i / width]) out[i] = 7;
    push(p);
    dd.n_spans = (int)n;
    dd.max_context = w->rows.max_context;
    dd.workspace = twin(p, dense_work);
    dd.workspace_bytes = bytes;
    pair_ok(p, "dense_mha", p->g->dense_mha(p->gpu, TR_LANE_MAIN, &dd));
    memcpy(out, want, n * width * sizeof *want);
    near_rows(p, "dense_mha with memory", out, (int)n * heads, g->d_v, bf16_error);
    free(want);
    dd.workspace = NULL;
    dd.workspace_bytes = 0;

    tr_rows few; /* as a prompt that is dealt out: positions that are not neighbours */
    for (int step = 2; step <= 4; step++) {
        const int n_few = thin_rows(p, w, step, &few);
        const tr_rows dev_few = twin_rows(p, &few);
        dc.rows = &few;
        dd.rows = &dev_few;
        push(p);
        assert_int_equal(p->c->dense_mha(p->cpu, TR_LANE_MAIN, &dc), TR_OK);
        pair_ok(p, "dense_mha", p->g->dense_mha(p->gpu, TR_LANE_MAIN, &dd));
        near_rows(p, "dense_mha of some", out, n_few * heads, g->d_v, bf16_error);
        dd.row_step = step;
        dd.workspace = twin(p, dense_work);
        dd.workspace_bytes = bytes;
        pair_ok(p, "dense_mha", p->g->dense_mha(p->gpu, TR_LANE_MAIN, &dd));
        near_rows(p, "dense_mha of some with memory", out, n_few * heads, g->d_v, bf16_error);
        dd.workspace = NULL;
        dd.workspace_bytes = 0;
    }
    weight_free(p, &uk);
    weight_free(p, &uk_t);
    weight_free(p, &uv);
}

/* Each a test by itself: racecheck keeps all accesses of a process in memory. */
typedef struct attention_case {
    const geometry *g;
    tr_dtype cache;
    int form;
    char name[32];
} attention_case;

static void test_attention(void **state)
{
    pair *p = *state;
    const attention_case *c = p->given;
    const tr_format values[] = {TR_W_E4M3_B128, TR_W_BF16};
    world w;
    make_world(p, &w, c->g, c->cache, c->form);
    write_keys(p, &w);
    const int32_t *lists = select_keys(p, &w, c->form == 2);
    attend(p, &w, lists, values[((c->cache == TR_BF16) + c->form) % 2]);
    pair_clear(p);
}

/* Rows of prompts, enough of them that their keys are made ready first: all of a step's slots, pads and dense rows between. */
static void test_prompts(void **state)
{
    static const geometry g = {64, 128, 64, 128, 512, 4, 128, 40, {200, 180, 220}};
    pair *p = *state;

    for (int form = 0; form < 3; form += 2) {
        world w;
        make_world(p, &w, &g, TR_E4M3, form);
        write_keys(p, &w);
        const size_t n = (size_t)w.rows.n_max, numbers = n * (size_t)g.heads * (size_t)g.d_latent,
                     bytes = p->g->sparse_mla_workspace((int)n, g.heads, g.d_latent);
        int32_t *position = array(p, n * (size_t)g.k * 4),
                *cache_row = array(p, n * (size_t)g.k * 4);
        for (size_t i = 0; i < n * (size_t)g.k; i++) {
            const int row = (int)i / g.k, at = (int)i % g.k, here = w.rows.position[row] + 1;
            const int n_keys = row >= w.n || w.rows.write[row] < 0 ? 0 : here < g.k ? here : g.k;
            position[i] = at < n_keys ? at * here / n_keys : -1;
            cache_row[i] =
                at < n_keys
                    ? w.rows.page_table[w.rows.slot[row] * PAGES_EACH + position[i] / 64] * 64 +
                          position[i] % 64
                    : -1;
        }
        float *q = acts(p, n * (size_t)(g.heads * (g.d_latent + g.d_rope)), 0.3f),
              *u = acts(p, numbers, 1);
        struct tr_sparse_mla_args c = {.rows = &w.rows,
                                       .q = q,
                                       .n_heads = g.heads,
                                       .scale = 0.1f,
                                       .cache_row = cache_row,
                                       .position = position,
                                       .k = g.k,
                                       .kv = w.kv,
                                       .out = u},
                                  d = c;
        push(p);
        d.rows = &w.dev_rows;
        d.kv = w.dev_kv;
        d.workspace = twin(p, array(p, bytes));
        d.workspace_bytes = bytes;
        TWIN(p, d.q);
        TWIN(p, d.cache_row);
        TWIN(p, d.position);
        TWIN(p, d.out);
        assert_int_equal(p->c->sparse_mla(p->cpu, TR_LANE_MAIN, &c), TR_OK);
        pair_ok(p, "sparse_mla", p->g->sparse_mla(p->gpu, TR_LANE_MAIN, &d));
        near_rows(p, "sparse_mla of prompts", u, (int)n * g.heads, g.d_latent, bf16_error);
        pair_clear(p);
    }
}

/* What cannot be done says so. */
static void test_refused(void **state)
{
    pair *p = *state;
    world w;
    make_world(p, &w, &geometries[0], TR_E4M3, 0);
    w.dev_kv.dtype = TR_F32;
    assert_int_equal(
        p->g->kv_write(p->gpu, TR_LANE_MAIN,
                       &(struct tr_kv_write_args){.rows = &w.dev_rows, .kv = w.dev_kv}),
        TR_E_USAGE);
    assert_non_null(strstr(p->g->error(p->gpu), "kv_write"));
    assert_non_null(strstr(p->g->error(p->gpu), "f32"));
    tr_linear w_none = {
        .format = TR_W_BF16, .n_mats = 1, .n_out = 4, .n_in = 4, .data = twin(p, w.rope)};
    assert_int_equal(
        p->g->linear(p->gpu, TR_LANE_MAIN,
                     &(struct tr_linear_args){.n = w.dev_rows.n, .w = &w_none, .in = {.d = 4}}),
        TR_E_USAGE);
    void *none;
    assert_int_equal(p->g->alloc(p->gpu, (size_t)1 << 50, TR_MEMORY_DEVICE, &none), TR_E_MEMORY);
    assert_null(none);
    assert_non_null(strstr(p->g->error(p->gpu), "PCI"));
    assert_int_equal(p->g->alloc(p->gpu, 100, TR_MEMORY_DEVICE, &none), TR_OK);
    p->g->release(p->gpu, none);
    assert_true(p->g->memory_left(p->gpu) > 1000000);
    tr_ceilings c;
    assert_int_equal(p->g->ceilings(p->gpu, &c), TR_OK);
    printf("%s: read %.2f TB/s, fp32 %.1f TFLOP/s\n", tr_device_describe(p->gpu),
           c.read_bytes_per_s * 1e-12, c.fma_flops_per_s * 1e-12);
    assert_true(c.read_bytes_per_s > 1e11 && c.fma_flops_per_s > 1e12);
    pair_clear(p);
}

int main(int argc, char **argv)
{
    enum { N_GEOMETRIES = sizeof geometries / sizeof *geometries, N_CASES = N_GEOMETRIES * 2 * 3 };
    static const char *const sizes[] = {"tiny", "odd", "heads", "real"};
    static const char *const forms[] = {"absorbed", "dense", "both"};
    static attention_case cases[N_CASES];
    struct CMUnitTest tests[N_CASES + 2] = {
        cmocka_unit_test_setup_teardown(test_prompts, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_refused, pair_open, pair_close),
    };
    for (int i = 0; i < N_CASES; i++) {
        attention_case *c = cases + i;
        *c = (attention_case){geometries + i / 6, i / 3 % 2 ? TR_BF16 : TR_E4M3, i % 3, ""};
        snprintf(c->name, sizeof c->name, "test_%s_%s_%s", sizes[i / 6],
                 c->cache == TR_BF16 ? "bf16" : "fp8", forms[c->form]);
        tests[2 + i] = (struct CMUnitTest){c->name, test_attention, pair_open, pair_close, c};
    }
    return run_on_gpu(argc, argv, tests, sizeof tests / sizeof *tests);
}
