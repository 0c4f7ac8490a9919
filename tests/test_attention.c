/* Every attention operation against double precision, on small and hostile shapes, all cache formats and instruction
 * sets; and the promise that rows do not see each other, the chunking or the threads. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/number.h"
#include "tests/attention_world.h"

/* ---- the reference ------------------------------------------------------------------------------------------------ */

static void near(const char *what, int row, int i, double got, double want, double tolerance)
{
    if (!(fabs(got - want) <= tolerance))
        fail_msg("%s of row %d, number %d: %.9g, expected %.9g within %g", what, row, i, got, want,
                 tolerance);
}

static void rope_ref(const world *w, int position, double *x, int d, int a, int b, int step)
{
    for (int i = 0; i < d / 2; i++, a += step, b += step) {
        double c = (double)w->rope[position * d + 2 * i],
               s = (double)w->rope[position * d + 2 * i + 1];
        double u = x[a] * c - x[b] * s, v = x[a] * s + x[b] * c;
        x[a] = u;
        x[b] = v;
    }
}

/* Sylvester's definition: entry (i, j) is -1 to the number of common bits. */
static void hadamard_ref(double *x, int d)
{
    double y[256];
    for (int i = 0; i < d; i++) {
        y[i] = 0;
        for (int j = 0; j < d; j++)
            y[i] += __builtin_parity((unsigned)(i & j)) ? -x[j] : x[j];
    }
    for (int i = 0; i < d; i++)
        x[i] = y[i] / sqrt(d);
}

static double amax_ref(const double *x, int n)
{
    double m = 0;
    for (int i = 0; i < n; i++)
        m = fmax(m, fabs(x[i]));
    return m;
}

static void latent_ref(const world *w, const results *r, int64_t row, double *out)
{
    int n = w->g.d_latent, d_rope = w->g.d_rope;
    const uint8_t *p = (uint8_t *)r->p[LATENT] + (size_t)row * tr_kv_row_bytes(w->dtype, n, d_rope);

    for (int i = 0; i < n + d_rope; i++) {
        float x, scale = 1.0f;
        uint16_t half;
        if (w->dtype == TR_F32) {
            memcpy(&x, p + 4 * i, 4);
        } else if (w->dtype == TR_E4M3 && i < n) {
            memcpy(&scale, p + n + 4 * (i / 128), 4);
            x = tr_e4m3_to_f32(p[i]) * scale;
        } else {
            memcpy(&half,
                   w->dtype == TR_BF16 ? p + 2 * i : p + n + 4 * ((n + 127) / 128) + 2 * (i - n),
                   2);
            x = tr_bf16_to_f32(half);
        }
        out[i] = (double)x;
    }
}

static void index_ref(const world *w, const results *r, int64_t row, double *out)
{
    int n = w->g.d_index;
    const uint8_t *p =
        (uint8_t *)r->p[INDEX] + (size_t)(row / 64) * tr_index_page_bytes(w->dtype, n);
    float x, scale = 1.0f;

    if (w->dtype != TR_F32) memcpy(&scale, p + 64 * n + 4 * (row % 64), 4);
    for (int i = 0; i < n; i++) {
        if (w->dtype == TR_F32)
            memcpy(&x, p + 4 * (row % 64 * n + i), 4);
        else
            x = tr_e4m3_to_f32(p[row % 64 * n + i]) * scale;
        out[i] = (double)x;
    }
}

/* What a format may lose of x where the largest of its scale block is amax. */
static double loss(tr_dtype dtype, double x, double amax)
{
    if (dtype == TR_F32) return 1e-5 * amax;
    if (dtype == TR_BF16) return fabs(x) * 0x1p-8 + 1e-5 * amax;
    return fabs(x) * 0x1p-4 + amax * 0x1p-17 + 1e-5 * amax;
}

static void check_written(const world *w, const results *r, int row)
{
    int n = w->g.d_latent, d_rope = w->g.d_rope, d = w->g.d_index, exact = w->dtype == TR_F32;
    double want[1024], got[1024], ss = 0, mean = 0, var = 0;
    const float *kv_a = w->kv_a + (size_t)row * (size_t)(n + d_rope);
    const float *k = w->index_k + (size_t)row * (size_t)d;

    for (int i = 0; i < n; i++)
        ss += (double)kv_a[i] * (double)kv_a[i] / n;
    for (int i = 0; i < n + d_rope; i++)
        want[i] = (double)kv_a[i] * (i < n ? (double)w->norm[i] / sqrt(ss + 1e-6) : 1.0);
    rope_ref(w, w->position[row], want, d_rope, n, n + 1, 2);
    latent_ref(w, r, w->write[row], got);
    for (int i = 0; i < n + d_rope; i++) {
        int block = i < n ? i / 128 * 128 : n, end = i >= n            ? n + d_rope
                                                     : block + 128 < n ? block + 128
                                                                       : n;
        tr_dtype dtype = i >= n && !exact ? TR_BF16 : w->dtype;
        near("latent", row, i, got[i], want[i],
             loss(dtype, want[i], amax_ref(want + block, end - block)));
    }
    for (int i = 0; i < d; i++)
        mean += (double)k[i] / d;
    for (int i = 0; i < d; i++)
        var += ((double)k[i] - mean) * ((double)k[i] - mean) / d;
    for (int i = 0; i < d; i++)
        want[i] =
            ((double)k[i] - mean) / sqrt(var + 1e-6) * (double)w->k_norm[i] + (double)w->k_bias[i];
    rope_ref(w, w->position[row], want, d_rope, 0, d_rope / 2, 1);
    if (!exact) hadamard_ref(want, d);
    index_ref(w, r, w->write[row], got);
    double amax = amax_ref(want, d); /* three roundings to bf16 before the quantisation */
    for (int i = 0; i < d; i++)
        near("index key", row, i, got[i], want[i],
             loss(exact ? TR_F32 : TR_E4M3, want[i], amax) + (exact ? 0 : amax * 0x1p-6));
}

/* Queries, their weights, and the scores made of the codes. */
static void check_indexer(const world *w, const results *r, int row)
{
    int heads = w->g.n_index_heads, d = w->g.d_index, exact = w->dtype == TR_F32;
    double want[256], key[256], query[32][256], constant = 1.0 / sqrt((double)heads * d);

    for (int h = 0; h < heads; h++) {
        size_t at = (size_t)(row * heads + h);
        const uint8_t *codes = (uint8_t *)r->p[INDEX_Q] + at * (size_t)d;
        float w_out = ((float *)r->p[INDEX_W])[at];
        double scale = exact ? 1.0 : (double)w_out / ((double)w->index_w[at] * constant);
        scale = exact ? 1.0 : exp2(round(log2(scale)));
        near("index w", row, h, (double)w_out, (double)w->index_w[at] * constant * scale,
             1e-6 * fabs((double)w_out));
        for (int i = 0; i < d; i++) {
            want[i] = (double)w->index_q[at * (size_t)d + (size_t)i];
            query[h][i] = exact ? (double)((float *)r->p[INDEX_Q])[at * (size_t)d + (size_t)i]
                                : (double)tr_e4m3_to_f32(codes[i]);
        }
        rope_ref(w, w->position[row], want, w->g.d_rope, 0, w->g.d_rope / 2, 1);
        if (!exact) hadamard_ref(want, d);
        double amax = amax_ref(want, d);
        for (int i = 0; i < d; i++)
            near("index q", row, i, query[h][i] * scale, want[i],
                 loss(exact ? TR_F32 : TR_E4M3, want[i], amax) + (exact ? 0 : amax * 0x1p-6));
    }
    for (int s = 0; s <= w->position[row]; s++) {
        const float *score = (const float *)r->p[SCORE] + (size_t)row * MAX_CONTEXT;
        const float *weight = (const float *)r->p[INDEX_W] + (size_t)row * heads;
        double sum = 0, size = 0;
        if (w->position[row] < w->g.k || w->dense[row]) { /* not asked for: not written */
            assert_true(isnan(score[s]));
            continue;
        }
        index_ref(w, r, (int64_t)w->page_table[w->slot[row] * MAX_PAGES + s / 64] * 64 + s % 64,
                  key);
        for (int h = 0; h < heads; h++) {
            double dot = 0;
            for (int i = 0; i < d; i++) {
                dot += query[h][i] * key[i];
                size += fabs(query[h][i] * key[i] * (double)weight[h]);
            }
            sum += (double)weight[h] * fmax(dot, 0);
        }
        near("score", row, s, (double)score[s], sum, 1e-6 * size);
    }
}

static void check_topk(const world *w, const results *r, int row)
{
    const int32_t *position = (const int32_t *)r->p[POSITION] + (size_t)row * w->g.k;
    const int32_t *cache_row = (const int32_t *)r->p[CACHE_ROW] + (size_t)row * w->g.k;
    int32_t want[MAX_CONTEXT];
    int n = w->dense[row] || w->write[row] < 0
                ? 0
                : topk_ref((const float *)r->p[SCORE] + (size_t)row * MAX_CONTEXT,
                           w->position[row] + 1, w->g.k, want);

    assert_int_equal(((int32_t *)r->p[N_SELECTED])[row], n);
    for (int j = 0; j < w->g.k; j++) {
        int32_t p = j < n ? want[j] : -1;
        assert_int_equal(position[j], p);
        assert_int_equal(cache_row[j],
                         p < 0 ? -1
                               : w->page_table[w->slot[row] * MAX_PAGES + p / 64] * 64 + p % 64);
    }
}

/* q [d] . k [n, ld], softmax, times v (k's rows from column 0 on, or another matrix) */
static double attend_ref(const world *w, const double *q, const double *k, int d, int n, size_t ld,
                         const double *v, int d_v, size_t ld_v, double *out)
{
    double p[MAX_CONTEXT], max = -INFINITY, sum = 0;

    for (int s = 0; s < n; s++) {
        p[s] = 0;
        for (int i = 0; i < d; i++)
            p[s] += q[i] * k[(size_t)s * ld + (size_t)i];
        p[s] *= (double)attention_scale(&w->g);
        max = fmax(max, p[s]);
    }
    for (int s = 0; s < n; s++)
        sum += exp(p[s] - max);
    for (int i = 0; i < d_v; i++) {
        out[i] = 0;
        for (int s = 0; s < n; s++)
            out[i] += exp(p[s] - max) / sum * v[(size_t)s * ld_v + (size_t)i];
    }
    return max + log(sum);
}

static void check_query(const world *w, const results *r, int row, int h, double *q)
{
    const geometry *g = &w->g;
    int d_q = g->d_nope + g->d_rope, d_key = g->d_latent + g->d_rope;
    size_t at = (size_t)row * (size_t)g->n_heads + (size_t)h;
    const float *in = w->q + at * (size_t)d_q, *got = (float *)r->p[Q] + at * (size_t)d_q;
    const float *absorbed = (float *)r->p[QA] + at * (size_t)d_key;

    for (int i = 0; i < d_q; i++)
        q[i] = (double)in[i];
    rope_ref(w, w->position[row], q, g->d_rope, g->d_nope, g->d_nope + 1, 2);
    for (int i = 0; i < d_q; i++)
        near("q", row, i, (double)got[i], q[i], 1e-6);
    for (int c = 0; c < d_key && !w->dense[row]; c++) {
        double x = c < g->d_latent ? 0 : (double)got[g->d_nope + c - g->d_latent];
        for (int i = 0; i < g->d_nope && c < g->d_latent; i++)
            x += q[i] *
                 (double)w->w_uk[((size_t)h * (size_t)g->d_nope + (size_t)i) * (size_t)g->d_latent +
                                 (size_t)c];
        near("q_absorbed", row, c, (double)absorbed[c], x, 1e-5);
    }
}

static void check_absorbed(const world *w, const results *r, int row, int h)
{
    const geometry *g = &w->g;
    int d_key = g->d_latent + g->d_rope, n = ((int32_t *)r->p[N_SELECTED])[row];
    size_t at = (size_t)row * (size_t)g->n_heads + (size_t)h;
    const int32_t *list = (const int32_t *)r->p[CACHE_ROW] + (size_t)row * g->k;
    const float *u = (float *)r->p[U] + at * (size_t)g->d_latent,
                *out = (float *)r->p[OUT] + at * (size_t)g->d_v;
    double *keys = get((size_t)(n + 1) * (size_t)d_key * 8), q[1024], want[1024], lse;

    for (int j = 0; j < n; j++)
        latent_ref(w, r, list[j], keys + (size_t)j * (size_t)d_key);
    for (int i = 0; i < d_key; i++)
        q[i] = (double)((float *)r->p[QA])[at * (size_t)d_key + (size_t)i];
    lse = attend_ref(w, q, keys, d_key, n, (size_t)d_key, keys, g->d_latent, (size_t)d_key, want);
    near("lse", row, h, (double)((float *)r->p[LSE])[at], lse, 1e-5 * (1 + fabs(lse)));
    for (int i = 0; i < g->d_latent; i++)
        near("u", row, i, (double)u[i], want[i], 1e-5);
    for (int o = 0; o < g->d_v; o++) {
        double x = 0;
        for (int i = 0; i < g->d_latent; i++)
            x += (double)u[i] *
                 (double)w->w_uv[((size_t)h * (size_t)g->d_v + (size_t)o) * (size_t)g->d_latent +
                                 (size_t)i];
        near("out", row, o, (double)out[o], x, 1e-5);
    }
    free(keys);
}

static void check_dense(const world *w, const results *r, int row, int h, const double *q)
{
    const geometry *g = &w->g;
    int n = w->position[row] + 1, d_q = g->d_nope + g->d_rope;
    size_t at = (size_t)row * (size_t)g->n_heads + (size_t)h;
    const float *out = (float *)r->p[OUT] + at * (size_t)g->d_v;
    double *k = get((size_t)(n * d_q) * 8), *v = get((size_t)(n * g->d_v) * 8), c[1024], want[1024];

    for (int s = 0; s < n; s++) {
        latent_ref(w, r, (int64_t)w->page_table[w->slot[row] * MAX_PAGES + s / 64] * 64 + s % 64,
                   c);
        for (int i = 0; i < d_q; i++) {
            double x = i < g->d_nope ? 0 : c[g->d_latent + i - g->d_nope];
            const float *weight = w->w_uk + (size_t)(h * g->d_nope + i) * (size_t)g->d_latent;
            for (int j = 0; j < g->d_latent && i < g->d_nope; j++)
                x += (double)weight[j] * c[j];
            k[s * d_q + i] = x;
        }
        for (int o = 0; o < g->d_v; o++) {
            const float *weight = w->w_uv + (size_t)(h * g->d_v + o) * (size_t)g->d_latent;
            v[s * g->d_v + o] = 0;
            for (int j = 0; j < g->d_latent; j++)
                v[s * g->d_v + o] += (double)weight[j] * c[j];
        }
    }
    attend_ref(w, q, k, d_q, n, (size_t)d_q, v, g->d_v, (size_t)g->d_v, want);
    for (int o = 0; o < g->d_v; o++)
        near("out, dense", row, o, (double)out[o], want[o], 2e-5);
    free(k);
    free(v);
}

/* A pad row: no keys, zeros out. */
static void check_pad(const world *w, const results *r, int row)
{
    const geometry *g = &w->g;

    check_topk(w, r, row);
    for (int i = 0; i < g->n_heads * g->d_v; i++)
        assert_true(floats_at(r, OUT, w, row)[i] == 0.0f);
    for (int i = 0; i < g->n_heads * g->d_latent && !w->dense[row]; i++)
        assert_true(floats_at(r, U, w, row)[i] == 0.0f);
    for (int h = 0; h < g->n_heads && !w->dense[row]; h++)
        assert_true(floats_at(r, LSE, w, row)[h] == -INFINITY);
}

static void check_all(const world *w, const results *r)
{
    int stride = w->g.d_latent > 128 ? 23 : 7; /* double precision takes its time */

    for (int row = 0; row < w->n; row++) {
        double q[1024];
        int h = row % w->g.n_heads, last = row + 1 == w->n || w->position[row + 1] == 0;
        if (w->write[row] < 0) {
            check_pad(w, r, row);
            continue;
        }
        check_topk(w, r, row);
        if (row % stride && !last) continue;
        check_written(w, r, row);
        check_indexer(w, r, row);
        check_query(w, r, row, h, q);
        if (w->dense[row])
            check_dense(w, r, row, h, q);
        else
            check_absorbed(w, r, row, h);
    }
}

static void same_bits(const results *a, const results *b, const char *what)
{
    for (int i = 0; i < N_BUFFERS; i++)
        if (memcmp(a->p[i], b->p[i], a->bytes[i]) != 0)
            fail_msg("%s: %s differs", what, buffer_names[i]);
}

/* All operations right, then the same bits however the rows are cut and whoever computes them. */
static void try_everything(const world *w, const char *isa)
{
    static const struct {
        int chunk, n_threads;
        const char *what;
    } ways[] = {{1, 1, "row by row"},
                {7, 1, "chunks of 7"},
                {170, 3, "chunks of 170, three threads"},
                {100000, 2, "two threads"}};
    machine m;

    if (!machine_open(&m, w, isa, 1)) return;
    results all = run_all(&m, w, 100000);
    machine_close(&m);
    check_all(w, &all);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        assert_true(machine_open(&m, w, isa, ways[i].n_threads));
        results other = run_all(&m, w, ways[i].chunk);
        same_bits(&all, &other, ways[i].what);
        results_free(&other);
        machine_close(&m);
    }
    results_free(&all);
}

static void every_shape(tr_dtype dtype)
{
    for (int i = 0; i < N_GEOMETRIES; i++) {
        world *w = world_create(&geometries[i], dtype, -1);
        for (int isa = 0; isa < N_ISAS; isa++)
            try_everything(w, isa_names[isa]);
        world_free(w);
    }
}

static void cache_e4m3(void **state)
{
    (void)state;
    every_shape(TR_E4M3);
}

static void cache_bf16(void **state)
{
    (void)state;
    every_shape(TR_BF16);
}

static void cache_f32(void **state)
{
    (void)state;
    every_shape(TR_F32);
}

/* With everything selected the two forms of MLA are the same formula. */
static void forms_agree(void **state)
{
    (void)state;
    for (int i = 0; i < N_GEOMETRIES; i++)
        for (int isa = 0; isa < N_ISAS; isa++) {
            geometry g = geometries[i];
            results form[2];
            g.k = MAX_CONTEXT + 3;
            world *w = world_create(&g, TR_E4M3, 0);
            machine m;
            if (machine_open(&m, w, isa_names[isa], 2)) {
                for (int dense = 0; dense < 2; dense++) {
                    memset(w->dense, dense, (size_t)w->n);
                    form[dense] = run_all(&m, w, 100000);
                }
                for (int row = 0; row < w->n; row++) {
                    const float *a = floats_at(&form[0], OUT, w, row),
                                *b = floats_at(&form[1], OUT, w, row);
                    double error = 0, size = 0;
                    for (int j = 0; j < g.n_heads * g.d_v; j++) {
                        error += ((double)a[j] - (double)b[j]) * ((double)a[j] - (double)b[j]);
                        size += (double)a[j] * (double)a[j];
                    }
                    if (!(sqrt(error) <= 1e-5 * sqrt(size)))
                        fail_msg("%s: row %d: forms differ by %g of %g", isa_names[isa], row,
                                 sqrt(error), sqrt(size));
                }
                results_free(&form[0]);
                results_free(&form[1]);
                machine_close(&m);
            }
            world_free(w);
        }
}

/* ---- single operations -------------------------------------------------------------------------------------------- */

/* A share of the context ([first, last), context parallelism) and a window of rows give the bits of the whole. */
static void index_windows(void **state)
{
    world *w = world_create(&geometries[0], TR_E4M3, 0);
    results r = results_create(w);
    machine machine_, *m = &machine_;
    int32_t *cut[3] = {get((size_t)w->n * 4), get((size_t)w->n * 4), get((size_t)w->n * 4)},
            n = w->n;
    float *score = get((size_t)w->n * MAX_CONTEXT * 4);
    tr_rows rows = rows_of(w, 0, &n);

    (void)state;
    assert_true(machine_open(m, w, NULL, 2));
    run_write(m, w, &r, 0, n);
    run_index(m, w, &r, 0, n);
    for (int i = 0; i < n; i++) {
        cut[0][i] = 0;
        cut[1][i] = w->position[i] / 3 + i % 5;
        cut[2][i] = w->position[i] + 1000; /* more than there is */
    }
    for (int part = 1; part >= 0; part--) {
        for (int i = 0; i < n; i += 100)
            OP(index_logits, .rows = &rows, .q = r.p[INDEX_Q], .w = r.p[INDEX_W],
               .n_heads = w->g.n_index_heads, .k = w->g.k, .kv = layer_of(w, &r),
               .first = cut[part], .last = cut[part + 1], .i_row = i, .n_row = 100,
               .score = score + i * MAX_CONTEXT, .ld = MAX_CONTEXT);
        for (int i = 0; i < n && part == 1; i++) /* the other share is not touched */
            for (int k = 0; k < cut[1][i] && k < MAX_CONTEXT; k++)
                assert_true(isnan(score[i * MAX_CONTEXT + k]));
    }
    assert_memory_equal(score, r.p[SCORE], r.bytes[SCORE]);
    for (int i = 0; i < 3; i++)
        free(cut[i]);
    free(score);
    results_free(&r);
    machine_close(m);
    world_free(w);
}

/* x [n, bytes of a row], rows taken in the order of `from`. */
static void permute(void *x, const int *from, int n, size_t bytes)
{
    char *old = get((size_t)n * bytes), *rows = x;

    memcpy(old, x, (size_t)n * bytes);
    for (int i = 0; i < n; i++)
        memcpy(rows + (size_t)i * bytes, old + (size_t)from[i] * bytes, bytes);
    free(old);
}

/* Rows of all slots in any order, gaps and neighbours that go backwards included. */
static void any_order(void **state)
{
    world *w = world_create(&geometries[0], TR_E4M3, -1);
    size_t n = (size_t)w->n, q = (size_t)(w->g.n_heads * (w->g.d_nope + w->g.d_rope)) * 4;
    int *from = get(n * sizeof *from);
    machine m;

    (void)state;
    assert_true(machine_open(&m, w, NULL, 2));
    results ordered = run_all(&m, w, w->n);
    for (int i = 0; i < w->n;
         i++) /* every other row changes places; then runs of a few stay together */
        from[i] = i;
    for (int i = 0; i < w->n; i += 1 + i % 3) {
        int j = (int)(fabsf(uniform()) * (float)(w->n - 1)), t = from[i];
        from[i] = from[j];
        from[j] = t;
    }
    permute(w->slot, from, w->n, sizeof *w->slot);
    permute(w->position, from, w->n, sizeof *w->position);
    permute(w->write, from, w->n, sizeof *w->write);
    permute(w->dense, from, w->n, sizeof *w->dense);
    permute(w->kv_a, from, w->n, (size_t)(w->g.d_latent + w->g.d_rope) * 4);
    permute(w->index_k, from, w->n, (size_t)w->g.d_index * 4);
    permute(w->q, from, w->n, q);
    permute(w->index_q, from, w->n, (size_t)(w->g.n_index_heads * w->g.d_index) * 4);
    permute(w->index_w, from, w->n, (size_t)w->g.n_index_heads * 4);
    results mixed = run_all(&m, w, w->n);
    for (int i = Q; i < N_BUFFERS; i++) /* per row, unlike the caches */
        permute(ordered.p[i], from, w->n, ordered.bytes[i] / n);
    same_bits(&ordered, &mixed, "rows in another order");
    results_free(&ordered);
    results_free(&mixed);
    free(from);
    machine_close(&m);
    world_free(w);
}

/* Entries that name no cache row are as good as absent, wherever they stand; an empty list is zeros. */
static void sparse_holes(void **state)
{
    world *w = world_create(&geometries[2], TR_BF16, 0);
    results r = results_create(w), s = results_create(w);
    machine machine_, *m = &machine_;
    enum { K = 300 };
    int32_t *list[2] = {get((size_t)(w->n * K) * 4), get((size_t)(w->n * K) * 4)}, n = w->n;
    tr_rows rows = rows_of(w, 0, &n);

    (void)state;
    assert_true(machine_open(m, w, NULL, 2));
    run_write(m, w, &r, 0, n);
    memcpy(r.p[QA], w->q, r.bytes[Q] < r.bytes[QA] ? r.bytes[Q] : r.bytes[QA]);
    for (int i = 0; i < n; i++) {
        int valid = 0;
        for (int j = 0; j < K; j++) {
            int32_t row = (int32_t)w->write[(i * 7 + j) % n];
            int hole = i % 10 == 0 || j % 3 == 1 || row < 0;
            list[0][i * K + j] = !hole ? row : j % 2 ? -1 : N_PAGES * 64 + j;
            if (!hole) list[1][i * K + valid++] = row;
        }
        while (valid < K)
            list[1][i * K + valid++] = -1;
    }
    for (int way = 0; way < 2; way++)
        OP(sparse_mla, .rows = &rows, .q = w->q, .n_heads = 1, .scale = 0.2f,
           .cache_row = list[way], .k = K, .kv = layer_of(w, &r), .out = (way ? s : r).p[U],
           .lse = (way ? s : r).p[LSE]);
    assert_memory_equal(r.p[U], s.p[U], r.bytes[U]);
    assert_memory_equal(r.p[LSE], s.p[LSE], r.bytes[LSE]);
    for (int i = 0; i < n; i += 10) { /* one head: rows lie d_latent apart */
        assert_true(((float *)r.p[LSE])[i] == -INFINITY);
        for (int j = 0; j < w->g.d_latent; j++)
            assert_true(((float *)r.p[U])[i * w->g.d_latent + j] == 0.0f);
    }
    free(list[0]);
    free(list[1]);
    results_free(&r);
    results_free(&s);
    machine_close(m);
    world_free(w);
}

/* Scores far beyond what exp can hold, of both signs. */
static void large_scores(void **state)
{
    (void)state;
    for (int isa = 0; isa < N_ISAS; isa++) {
        world *w = world_create(&geometries[0], TR_F32, -1);
        machine m;
        for (int i = 0; i < w->n * w->g.n_heads * (w->g.d_nope + w->g.d_rope); i++)
            w->q[i] *= i % 3 ? 2000.0f : 1.0f;
        if (machine_open(&m, w, isa_names[isa], 2)) {
            results r = run_all(&m, w, 64);
            for (int i = 0; i < w->n * w->g.n_heads * w->g.d_v; i++)
                assert_true(fabsf(((float *)r.p[OUT])[i]) < 1e3f);
            results_free(&r);
            machine_close(&m);
        }
        world_free(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cache_e4m3),    cmocka_unit_test(cache_bf16),
        cmocka_unit_test(cache_f32),     cmocka_unit_test(forms_agree),
        cmocka_unit_test(index_windows), cmocka_unit_test(any_order),
        cmocka_unit_test(sparse_holes),  cmocka_unit_test(large_scores),

    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
