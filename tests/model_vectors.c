#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "model_vectors.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/number.h"
#include "scratch.h"
#include "shard_file.h"
#include "vectors.h"

/* ---- a folder ------------------------------------------------------------------------------------------------------ */

static int32_t *tokens_of(const json_t *root, const char *key, int *n)
{
    const json_t *a = json_object_get(root, key);
    *n = (int)json_array_size(a);
    int32_t *t = malloc(((size_t)*n + 1) * sizeof *t);
    for (int i = 0; i < *n; i++)
        t[i] = (int32_t)json_integer_value(json_array_get(a, (size_t)i));
    return t;
}

void tr_vectors_open(tr_vectors *v, const char *set)
{
    char name[64], path[600];
    memset(v, 0, sizeof *v);
    snprintf(name, sizeof name, "model/%s", set);
    tr_vector_path(v->dir, sizeof v->dir, name);
    snprintf(v->arrays, sizeof v->arrays, "%s/expected.safetensors", v->dir);
    snprintf(path, sizeof path, "%s/expected.json", v->dir);
    v->expected = tr_read_json(path);
    assert_non_null(v->expected);
    v->trace = tokens_of(v->expected, "trace_tokens", &v->n_trace);
    v->longer = tokens_of(v->expected, "long_tokens", &v->n_long);
    assert_true(v->n_trace > 1 && v->n_long > 1);
}

void tr_vectors_close(tr_vectors *v)
{
    json_decref(v->expected);
    free(v->trace);
    free(v->longer);
}

float *tr_vectors_array(const tr_vectors *v, const char *name, int *rows, int *columns)
{
    float *a = tr_read_array(v->arrays, name, rows, columns);
    if (!a) fail_msg("%s: no array %s", v->arrays, name);
    return a;
}

static float *layer_array(const tr_vectors *v, const char *prefix, const char *name, int layer,
                          int *rows, int *columns)
{
    char full[64];
    snprintf(full, sizeof full, "%s%s.%d", prefix, name, layer);
    return tr_vectors_array(v, full, rows, columns);
}

void tr_vectors_fixture(tr_vectors *v, tr_fixture *f, const tr_fixture_options *options)
{
    tr_fixture_options o = *options;
    if (!o.dir) o.dir = v->dir;
    assert_int_equal(tr_fixture_open(f, &o), 0);
    v->n_layers = f->config.num_hidden_layers;
    v->n_hidden = f->config.hidden_size;
    v->topk = f->config.index_topk;
}

/* ---- bf16 weights -------------------------------------------------------------------------------------------------- */

static void *bytes_of(const tr_checkpoint *c, const tr_tensor *t)
{
    tr_err err;
    void *data = malloc(t->bytes + 1);
    assert_non_null(data);
    if (tr_checkpoint_read(c, t, 0, t->bytes, data, &err) != TR_OK) fail_msg("%s", err.text);
    return data;
}

/* [rows, columns] e4m3 codes and their scales as bf16. */
static uint16_t *scaled(const tr_checkpoint *c, const tr_tensor *t)
{
    char name[160];
    snprintf(name, sizeof name, "%s_scale_inv", t->name);
    const tr_tensor *of_scales = tr_checkpoint_find(c, name);
    if (!of_scales) fail_msg("no %s", name);
    const size_t rows = (size_t)t->shape[0], columns = (size_t)t->shape[1],
                 blocks = (columns + 127) / 128;
    uint8_t *codes = bytes_of(c, t);
    float *scales = bytes_of(c, of_scales);
    uint16_t *out = malloc(rows * columns * sizeof *out + 1);
    assert_non_null(out);
    for (size_t r = 0; r < rows; r++)
        for (size_t k = 0; k < columns; k++) {
            const float x =
                tr_e4m3_to_f32(codes[r * columns + k]) * scales[r / 128 * blocks + k / 128];
            out[r * columns + k] = tr_f32_to_bf16(x);
            assert_true(tr_bf16_to_f32(out[r * columns + k]) == x);
        }
    free(codes);
    free(scales);
    return out;
}

static void add_as_bf16(tr_shard_file *file, const tr_checkpoint *c, const tr_tensor *t)
{
    char shape[64];
    const size_t n = strlen(t->name), n_end = strlen("_scale_inv");
    if (n > n_end && strcmp(t->name + n - n_end, "_scale_inv") == 0) return;
    const bool codes = t->stored == TR_STORED_F8_E4M3;
    void *data = codes ? (void *)scaled(c, t) : bytes_of(c, t);
    assert_true(t->rank == 1 || t->rank == 2);
    if (t->rank == 2)
        snprintf(shape, sizeof shape, "[%jd,%jd]", (intmax_t)t->shape[0], (intmax_t)t->shape[1]);
    else
        snprintf(shape, sizeof shape, "[%jd]", (intmax_t)t->shape[0]);
    tr_shard_file_add(file, t->name, t->stored == TR_STORED_F32 ? "F32" : "BF16", shape, data,
                      t->bytes * (codes ? 2 : 1));
    free(data);
}

void tr_vectors_as_bf16(const tr_vectors *v, const char *dir)
{
    char path[600];
    tr_checkpoint *c;
    tr_shard_file file = {0};
    tr_err err;
    size_t n;

    snprintf(path, sizeof path, "%s/config.json", v->dir);
    json_t *config = tr_read_json(path);
    assert_non_null(config);
    assert_int_equal(json_object_del(config, "quantization_config"), 0);
    char *text = json_dumps(config, 0);
    assert_int_equal(tr_scratch_write(dir, "config.json", text, strlen(text)), 0);
    free(text);
    json_decref(config);

    if (tr_checkpoint_open(&c, v->dir, &err) != TR_OK) fail_msg("%s", err.text);
    for (size_t i = 0; i < tr_checkpoint_count(c); i++)
        add_as_bf16(&file, c, tr_checkpoint_tensor(c, i));
    unsigned char *bytes = tr_shard_file_finish(&file, &n);
    assert_int_equal(tr_scratch_write(dir, "model.safetensors", bytes, n), 0);
    free(bytes);
    tr_checkpoint_close(c);
}

/* ---- on the device ------------------------------------------------------------------------------------------------ */

static bool on_host(const tr_fixture *f)
{
    return f->ops->caps & TR_CAP_HOST;
}

/* The bytes at data, for the host to read: its own, or a copy. */
static void *brought(const tr_fixture *f, void *data, size_t bytes)
{
    if (on_host(f)) return data;
    void *copy = malloc(bytes + 1);
    assert_non_null(copy);
    assert_int_equal(f->ops->download(f->device, TR_LANE_MAIN, copy, data, bytes), TR_OK);
    const uint64_t ticket = f->ops->ticket(f->device, TR_LANE_MAIN);
    int done;
    while ((done = f->ops->done(f->device, TR_LANE_MAIN, ticket)) == 0)
        continue;
    assert_true(done > 0);
    return copy;
}

/* Rows of final hidden states, tr_act on the device. */
static void copy_final(const tr_fixture *f, float *to, void *data, int n, int d)
{
    const bool half = f->ops->act == TR_BF16;
    const size_t count = (size_t)n * (size_t)d;
    void *ours = brought(f, data, count * (half ? 2 : 4));
    for (size_t i = 0; i < count; i++)
        to[i] = half ? tr_bf16_to_f32(((const uint16_t *)ours)[i]) : ((const float *)ours)[i];
    if (!on_host(f)) free(ours);
}

/* ---- in splits ----------------------------------------------------------------------------------------------------- */

typedef struct record { /* final hidden states of a run, by position */
    tr_fixture *f;
    float *final;
    int first;
} record;

static void record_final(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                         size_t ld, void *data)
{
    record *r = ctx;
    (void)layer;
    (void)i_row;
    (void)ld;
    if (strcmp(name, "final") != 0) return;
    copy_final(r->f, r->final + (size_t)r->first * (size_t)n_cols, data, n_rows, n_cols);
    r->first += n_rows;
}

void tr_vectors_split(tr_fixture *f, int slot, const int32_t *tokens, int n, int chunk, int form,
                      float *final, int32_t *argmax)
{
    record r = {.f = f, .final = final};
    const tr_probe probe = {.ctx = &r, .see = record_final};
    tr_model_set_probe(f->model, &probe);
    assert_int_equal(tr_fixture_slot(f, slot, 0), 0);
    for (int i = 0; i < n; i += chunk) {
        const int rows = n - i < chunk ? n - i : chunk;
        assert_int_equal(
            tr_fixture_run(f, slot, tokens + i, i, rows, rows, form, NULL, argmax + i, NULL), 0);
    }
    assert_int_equal(r.first, n);
    tr_model_set_probe(f->model, NULL);
}

/* ---- what a probe sees --------------------------------------------------------------------------------------------- */

/* The larger one, or the NaN. */
static double worse(double a, double b)
{
    return isnan(a) || a >= b ? a : b;
}

static void see_hidden(tr_watch *w, int layer, int n, int d, float *ours)
{
    int rows, columns;
    float *theirs = layer_array(w->v, "", "hidden", layer, &rows, &columns);
    assert_int_equal(columns, d);
    for (int t = 0; t < n && t < rows; t++) {
        const double e =
            tr_relative_l2(ours + (size_t)t * (size_t)d, theirs + (size_t)t * (size_t)d, d);
        if (w->clear[t]) {
            w->worst_hidden = worse(w->worst_hidden, e);
            w->n_hidden++;
        }
        if (w->feed) {
            memcpy(ours + (size_t)t * (size_t)d, theirs + (size_t)t * (size_t)d,
                   (size_t)d * sizeof *ours);
            w->clear[t] = true; /* the next layer starts from the reference again */
        }
    }
    free(theirs);
}

/* Standard deviation of the scores of row t. */
static double row_deviation(const float *scores, int columns, int t)
{
    double mean = 0, square = 0;
    for (int s = 0; s <= t; s++)
        mean += (double)scores[t * columns + s] / (t + 1);
    for (int s = 0; s <= t; s++)
        square += pow((double)scores[t * columns + s] - mean, 2) / (t + 1);
    return sqrt(square);
}

static void see_scores(tr_watch *w, int layer, int i_row, int n, size_t ld, const float *ours)
{
    int rows, columns;
    if (strcmp(w->prefix, "sim.") == 0) return; /* has none */
    float *theirs = layer_array(w->v, w->prefix, "index_logits", layer, &rows, &columns);
    for (int i = 0; i < n; i++) {
        const int t = i_row + i;
        if (t < w->v->topk) continue; /* sees no more than it may select: not scored */
        const double deviation = row_deviation(theirs, columns, t);
        for (int s = 0; s <= t; s++) {
            const double e =
                fabs((double)ours[(size_t)i * ld + (size_t)s] - (double)theirs[t * columns + s]) /
                deviation;
            w->worst_logit = worse(w->worst_logit, e);
            w->sum_logit += e * e;
            w->n_logit++;
        }
    }
    free(theirs);
}

static void see_sets(tr_watch *w, int layer, int n, int k, const int32_t *ours)
{
    int rows, columns, margin_rows, n_margin, n_scores;
    int32_t *theirs =
        (int32_t *)(void *)layer_array(w->v, w->prefix, "index_topk", layer, &rows, &columns);
    float *margin = layer_array(w->v, w->prefix, "index_margin", layer, &margin_rows, &n_margin);
    float *scores = layer_array(w->v, "", "index_logits", layer, &margin_rows, &n_scores);
    assert_int_equal(columns, k);
    for (int t = 0; t < n; t++) {
        const size_t at = (size_t)t * (size_t)k;
        const bool same = memcmp(ours + at, theirs + at, (size_t)k * 4) == 0;
        /* Margin 0: equal scores, the smaller position wins; exact zeros are exact in any precision. */
        const double enough = w->set_margin * row_deviation(scores, n_scores, t);
        if (margin[t] > enough || (w->exact && margin[t] == 0)) {
            if (!same)
                fail_msg("%s layer %d row %d: another selection, margin %g", w->v->dir, layer, t,
                         (double)margin[t]);
            w->n_sets++;
        }
        if (!same) w->clear[t] = false;
    }
    free(scores);
    free(theirs);
    free(margin);
}

/* By descending score: two chosen experts with close scores may stand in another order. */
static bool same_experts(int k, const int32_t *ours, const int32_t *theirs)
{
    int found = 0;
    for (int a = 0; a < k; a++)
        for (int b = 0; b < k; b++)
            found += ours[a] == theirs[b];
    return found == k;
}

static void see_experts(tr_watch *w, int layer, int n, int k, const int32_t *ours)
{
    int rows, columns, margin_rows, n_margin;
    float *margin = layer_array(w->v, "", "router_margin", layer, &margin_rows, &n_margin);
    int32_t *theirs =
        (int32_t *)(void *)layer_array(w->v, "", "router_experts", layer, &rows, &columns);
    assert_int_equal(columns, k);
    for (int t = 0; t < n; t++) {
        const size_t at = (size_t)t * (size_t)k;
        if (!w->clear[t]) continue;
        w->clear[t] = same_experts(k, ours + at, theirs + at);
        if ((double)margin[t] < w->route_margin) continue;
        if (!w->clear[t])
            fail_msg("%s layer %d row %d: other experts, margin %g", w->v->dir, layer, t,
                     (double)margin[t]);
        w->n_routes++;
    }
    free(margin);
    free(theirs);
}

static void see_weights(tr_watch *w, int layer, int n, int k, const float *ours)
{
    int rows, columns;
    float *theirs = layer_array(w->v, "", "router_weights", layer, &rows, &columns);
    assert_int_equal(columns, k);
    for (int i = 0; i < n * k; i++) {
        const double e = fabs((double)ours[i] - (double)theirs[i]);
        if (w->clear[i / k]) w->worst_weight = worse(w->worst_weight, e);
    }
    free(theirs);
}

static bool wanted(const tr_watch *w, const char *name, int layer)
{
    const bool topk = strcmp(name, "index_topk") == 0;
    if (w->only >= 0 && layer != w->only) return false;
    if (w->keep_final) return topk || (w->routes && strcmp(name, "router_experts") == 0);
    if (w->sets_only) return topk || strcmp(name, "index_logits") == 0;
    return topk || strcmp(name, "index_logits") == 0 || strcmp(name, "hidden") == 0 ||
           strncmp(name, "router_", 7) == 0;
}

static void see(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                size_t ld, void *data)
{
    tr_watch *w = ctx;
    if (w->keep_final && strcmp(name, "final") == 0)
        copy_final(w->f, w->keep_final, data, n_rows, n_cols);
    if (!wanted(w, name, layer) || n_rows == 0) return;
    const size_t bytes = ((size_t)(n_rows - 1) * ld + (size_t)n_cols) * 4;
    void *ours = brought(w->f, data, bytes);
    if (strcmp(name, "hidden") == 0) see_hidden(w, layer, n_rows, n_cols, ours);
    if (strcmp(name, "index_logits") == 0) see_scores(w, layer, i_row, n_rows, ld, ours);
    if (strcmp(name, "index_topk") == 0) see_sets(w, layer, n_rows, n_cols, ours);
    if (strcmp(name, "router_experts") == 0) see_experts(w, layer, n_rows, n_cols, ours);
    if (strcmp(name, "router_weights") == 0) see_weights(w, layer, n_rows, n_cols, ours);
    if (on_host(w->f)) return;
    if (w->feed && strcmp(name, "hidden") == 0)
        assert_int_equal(w->f->ops->upload(w->f->device, TR_LANE_MAIN, data, ours, bytes), TR_OK);
    free(ours);
}

void tr_watch_run(tr_watch *w)
{
    const tr_probe probe = {.ctx = w, .see = see};
    for (int t = 0; t < w->v->n_trace; t++)
        w->clear[t] = true;
    assert_int_equal(tr_fixture_slot(w->f, 0, 0), 0);
    tr_model_set_probe(w->f->model, &probe);
    assert_int_equal(tr_fixture_run(w->f, 0, w->v->trace, 0, w->v->n_trace, 1, TR_FORM_ABSORBED,
                                    NULL, NULL, NULL),
                     0);
    tr_model_set_probe(w->f->model, NULL);
}

tr_distance tr_vectors_distance(const tr_vectors *v, const char *name, const char *list,
                                const float *final, const bool *clear)
{
    int rows, d, n = 0;
    float *theirs = tr_vectors_array(v, name, &rows, &d);
    const json_t *listed = json_object_get(v->expected, list);
    tr_distance all = {0};

    for (size_t i = 0; i < json_array_size(listed); i++) {
        const int t = (int)json_integer_value(json_array_get(listed, i)),
                  at = t - (v->n_trace - rows);
        if (at < 0) continue;
        n++;
        if (clear && !clear[t]) continue;
        const double e =
            tr_relative_l2(final + (size_t)t * (size_t)d, theirs + (size_t)at * (size_t)d, d);
        all.worst = worse(all.worst, e);
        all.rms += e * e;
        all.n++;
    }
    free(theirs);
    if (n == 0 || all.n * 2 < n)
        fail_msg("%s against %s: %d of %d rows chose the same", v->dir, name, all.n, n);
    all.rms = sqrt(all.rms / all.n);
    return all;
}

tr_distance tr_vectors_emulated(const tr_vectors *v, const char *list)
{
    int rows, d, k;
    float *emulated = tr_vectors_array(v, "sim.hidden.final", &rows, &d);
    bool *clear = malloc((size_t)v->n_trace * sizeof *clear);
    assert_true(clear && rows == v->n_trace);
    memset(clear, 1, (size_t)v->n_trace * sizeof *clear);
    for (int l = 0; l < v->n_layers; l++) {
        float *a = layer_array(v, "sim.", "index_topk", l, &rows, &k),
              *b = layer_array(v, "", "index_topk", l, &rows, &k);
        assert_int_equal(rows, v->n_trace);
        for (int t = 0; t < rows; t++)
            clear[t] &= memcmp(a + t * k, b + t * k, (size_t)k * sizeof *a) == 0;
        free(a);
        free(b);
    }
    const tr_distance all = tr_vectors_distance(v, "hidden.final", list, emulated, clear);
    free(clear);
    free(emulated);
    return all;
}
