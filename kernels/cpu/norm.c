#include <config.h>

#include <math.h>
#include <string.h>

#include "base/size.h"
#include "kernels/cpu/cpu_priv.h"

enum { SWIGLU_CHUNK = 1024 }; /* columns: a unit of work, so that one row is not one thread's */

/* Row-wise operations: each row is one thread's, in one order, so rows cannot see each other. */

/* residual += add; out = residual / sqrt(mean(residual^2) + eps) * weight (model.md 3.1). The norm
 * is taken of the unrounded sum. */
static void norm_row(const tr_device *d, const struct tr_norm_args *a, int r)
{
    float *residual = a->residual + (size_t)r * a->ld_residual;
    float *out = a->out + (size_t)r * a->ld_out;
    if (a->add) {
        const float *add = a->add + (size_t)r * a->ld_add;
#pragma omp simd
        for (int i = 0; i < a->d; i++)
            residual[i] += add[i];
    }
    float mean = d->k.dot(residual, residual, a->d) / (float)a->d;
    float inverse = 1.0f / sqrtf(mean + a->eps);
#pragma omp simd
    for (int i = 0; i < a->d; i++)
        out[i] = residual[i] * inverse * a->weight[i];
}

typedef struct norm_work {
    const tr_device *d;
    const struct tr_norm_args *a;
    int n;
} norm_work;

static void norm_member(void *ctx, int i, int n)
{
    const norm_work *w = ctx;
    for (int r = tr_team_part(w->n, i, n); r < tr_team_part(w->n, i + 1, n); r++)
        norm_row(w->d, w->a, r);
}

tr_status tr_cpu_norm(tr_device *d, tr_lane lane, const struct tr_norm_args *a)
{
    norm_work w = {d, a, tr_live_rows(a->n, a->n_max)};
    (void)lane;
    tr_device_run(d, w.n > 1 ? (double)w.n * a->d : 0.0, norm_member, &w);
    return TR_OK;
}

tr_status tr_cpu_embed(tr_device *d, tr_lane lane, const struct tr_embed_args *a)
{
    int n = tr_live_rows(a->rows->n, a->rows->n_max);
    (void)lane;
    if (a->dtype != TR_F32 && a->dtype != TR_BF16)
        return tr_cpu_fail(d, TR_E_USAGE, "embed: table of type %d", (int)a->dtype);
    for (int r = 0; r < n; r++) {
        float *out = a->out + (size_t)r * (size_t)a->d;
        int64_t i = (int64_t)a->rows->token[r] - a->first;
        if (i < 0 || i >= a->n_table) {
            memset(out, 0, (size_t)a->d * sizeof *out);
            continue;
        }
        size_t at = (size_t)i * (size_t)a->d;
        if (a->dtype == TR_F32)
            memcpy(out, (const float *)a->table + at, (size_t)a->d * sizeof *out);
        else
            d->k.expand_bf16(out, (const uint16_t *)a->table + at, a->d);
    }
    return TR_OK;
}

tr_status tr_cpu_rows_gather(tr_device *d, tr_lane lane, const struct tr_rows_gather_args *a)
{
    int left = *a->n_index - a->i0;
    int n = left < 0 ? 0 : left < a->n_rows ? left : a->n_rows;
    size_t width = (size_t)a->d;
    (void)d, (void)lane;
    for (int r = 0; r < n; r++)
        memcpy(a->out + (size_t)r * width, a->in + (size_t)a->index[a->i0 + r] * width,
               width * sizeof *a->out);
    *a->n_out = n;
    return TR_OK;
}

/* out = g / (1 + exp(-g)) * up (model.md 3.5). out may be gate. Large -g: exp is inf, the quotient
 * -0. */
void tr_swiglu_row(const tr_device *d, float *out, const float *gate, const float *up, int n)
{
    enum { CHUNK = 256 };
    float e[CHUNK];
    for (int i = 0; i < n; i += CHUNK) {
        int m = n - i < CHUNK ? n - i : CHUNK;
#pragma omp simd
        for (int j = 0; j < m; j++)
            e[j] = -gate[i + j];
        d->k.exp_sub(e, 0.0f, m);
#pragma omp simd
        for (int j = 0; j < m; j++)
            out[i + j] = gate[i + j] / (1.0f + e[j]) * up[i + j];
    }
}

typedef struct swiglu_work {
    const tr_device *d;
    const struct tr_swiglu_args *a;
    int n, n_chunks;
} swiglu_work;

static void swiglu_member(void *ctx, int i, int n)
{
    const swiglu_work *w = ctx;
    const size_t width = (size_t)w->a->d;
    const int end = tr_team_part(w->n * w->n_chunks, i + 1, n);

    for (int u = tr_team_part(w->n * w->n_chunks, i, n); u < end; u++) {
        int r = u / w->n_chunks, begin = u % w->n_chunks * SWIGLU_CHUNK, left = w->a->d - begin;
        const float *gate = w->a->gate_up + (size_t)r * 2 * width + begin;
        tr_swiglu_row(w->d, w->a->out + (size_t)r * width + begin, gate, gate + width,
                      left < SWIGLU_CHUNK ? left : SWIGLU_CHUNK);
    }
}

tr_status tr_cpu_swiglu(tr_device *d, tr_lane lane, const struct tr_swiglu_args *a)
{
    swiglu_work w = {d, a, tr_live_rows(a->n, a->n_max),
                     (int)tr_ceil_div((size_t)a->d, SWIGLU_CHUNK)};
    (void)lane;
    /* an exp is worth some products */
    tr_device_run(d, 4.0 * w.n * a->d, swiglu_member, &w);
    return TR_OK;
}
