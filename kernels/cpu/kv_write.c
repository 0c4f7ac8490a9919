/* The cache records of model.md 5.3-5.5: written by kv_write, read back by the functions next to it. */
#include <config.h>

#include <assert.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/cpu/rope_priv.h"
#include "kernels/number.h"

static const float layer_norm_eps = 1e-6f;

static int at_most(int a, int b)
{
    return a < b ? a : b;
}

tr_status tr_attention_check_kv(tr_device *d, const char *name, const tr_kv_layer *kv)
{
    if (kv->dtype != TR_E4M3 && kv->dtype != TR_BF16 && kv->dtype != TR_F32)
        return tr_cpu_fail(d, TR_E_USAGE, "%s: the cache is not e4m3, bf16 or f32", name);
    if (kv->latent && (kv->d_latent < 1 || kv->d_latent % TR_LATENT_STEP || kv->d_rope < 0 ||
                       kv->d_rope % 2 || kv->d_latent > TR_D_KEY_MAX - kv->d_rope))
        return tr_cpu_fail(d, TR_E_USAGE,
                           "%s: latents of %d and rope of %d: multiples of %d and 2, together at "
                           "most %d, are what this backend can do",
                           name, kv->d_latent, kv->d_rope, TR_LATENT_STEP, TR_D_KEY_MAX);
    if (kv->index && (kv->d_index < 1 || kv->d_index > TR_D_INDEX_MAX ||
                      (kv->dtype != TR_F32 && (kv->d_index & (kv->d_index - 1)))))
        return tr_cpu_fail(
            d, TR_E_USAGE,
            "%s: index keys of %d: powers of two up to %d are what this backend can do", name,
            kv->d_index, TR_D_INDEX_MAX);
    return TR_OK;
}

tr_status tr_attention_check_wait(tr_device *d, const char *name, const tr_await *await)
{
    if (await->n == 0) return TR_OK;
    return tr_cpu_fail(d, TR_E_USAGE, "%s: this backend has no peers to wait for", name);
}

float tr_quantise(const struct tr_attention_kernels *k, uint8_t *out, const float *x, int n)
{
    float scale = tr_ue8m0_scale(k->max_abs(x, n));

    k->to_e4m3(out, x, 1.0f / scale, n); /* a power of two: as good as the division */
    return scale;
}

/* RMSNorm of the latent, rope of the rest; x [d_latent + d_rope]. */
static void latent_prepare(const tr_device *d, const struct tr_kv_write_args *a, int i, float *x)
{
    const float *in = a->kv_a + (size_t)i * a->ld_kv_a;
    int n = a->kv.d_latent, d_rope = a->kv.d_rope;
    float r = 1.0f / sqrtf(d->k.dot(in, in, n) / (float)n + a->eps);

#pragma omp simd
    for (int j = 0; j < n; j++)
        x[j] = in[j] * r * a->norm[j];
    memcpy(x + n, in + n, (size_t)d_rope * sizeof *x);
    tr_rope_interleaved(x + n, a->rope + (size_t)a->rows->position[i] * d_rope, d_rope);
}

static void latent_write(const tr_device *d, const struct tr_kv_write_args *a, int i)
{
    const tr_kv_layer *kv = &a->kv;
    int n = kv->d_latent, n_all = kv->d_latent + kv->d_rope;
    char *to = (char *)kv->latent +
               (size_t)a->rows->write[i] * tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);
    TR_SCRATCH float x[TR_D_KEY_MAX];

    latent_prepare(d, a, i, x);
    if (kv->dtype == TR_F32) {
        memcpy(to, x, (size_t)n_all * sizeof *x);
        return;
    }
    uint16_t *half = (uint16_t *)(void *)to;
    int first_half = 0; /* where the bf16 part of x begins */
    if (kv->dtype == TR_E4M3) {
        float *scale = (float *)(void *)(to + n);
        for (int j = 0; j < n; j += TR_SCALE_BLOCK)
            *scale++ = tr_quantise(tr_attention_of(d), (uint8_t *)to + j, x + j,
                                   at_most(TR_SCALE_BLOCK, n - j));
        half = (uint16_t *)(void *)scale;
        first_half = n;
    }
    for (int j = first_half; j < n_all; j++)
        *half++ = tr_f32_to_bf16(x[j]);
}

void tr_latent_read(const tr_device *d, const tr_kv_layer *kv, int64_t i_row, float *out)
{
    int n = kv->d_latent;
    const char *from = (const char *)kv->latent +
                       (size_t)i_row * tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);

    assert(i_row >= 0 && i_row < (int64_t)kv->n_pages * TR_PAGE_TOKENS);
    if (kv->dtype == TR_F32) {
        memcpy(out, from, (size_t)(n + kv->d_rope) * sizeof *out);
    } else if (kv->dtype == TR_BF16) {
        d->k.expand_bf16(out, (const uint16_t *)(const void *)from, n + kv->d_rope);
    } else {
        tr_attention_of(d)->expand_latent(out, (const uint8_t *)from, n, kv->d_rope);
    }
}

tr_index_slot tr_index_at(const tr_kv_layer *kv, int64_t i_row)
{
    int64_t page = i_row / TR_PAGE_TOKENS, slot = i_row % TR_PAGE_TOKENS;
    uint8_t *base =
        (uint8_t *)kv->index + (size_t)page * tr_index_page_bytes(kv->dtype, kv->d_index);
    float *scales = (float *)(void *)(base + TR_PAGE_TOKENS * kv->d_index);

    return (tr_index_slot){base + slot * kv->d_index, scales + slot};
}

/* Steps 2 to 4 of model.md 4. */
static void index_write(const tr_device *d, const struct tr_kv_write_args *a, int i)
{
    const struct tr_attention_kernels *k = tr_attention_of(d);
    const tr_kv_layer *kv = &a->kv;
    const float *in = a->index_k + (size_t)i * a->ld_index_k;
    int n = kv->d_index, exact = kv->dtype == TR_F32;
    TR_SCRATCH float x[TR_D_INDEX_MAX];

    float mean = k->sum(in, n) / (float)n;
#pragma omp simd
    for (int j = 0; j < n; j++)
        x[j] = in[j] - mean;
    float r = 1.0f / sqrtf(d->k.dot(x, x, n) / (float)n + layer_norm_eps);
#pragma omp simd
    for (int j = 0; j < n; j++)
        x[j] = x[j] * r * a->k_norm[j] + a->k_bias[j];
    if (!exact) k->round_bf16(x, n);
    tr_rope_half_split(x, a->rope + (size_t)a->rows->position[i] * kv->d_rope, kv->d_rope);
    if (exact) { /* rows of a TR_F32 page have no scales between them: they simply go on */
        memcpy((float *)kv->index + a->rows->write[i] * n, x, (size_t)n * sizeof *x);
        return;
    }
    tr_index_slot to = tr_index_at(kv, a->rows->write[i]);
    *to.scale = tr_index_quantise(d, to.code, x, n);
}

static const char *index_page_at(const tr_kv_layer *kv, int page)
{
    assert(page >= 0 && page < kv->n_pages);
    return (const char *)kv->index + (size_t)page * tr_index_page_bytes(kv->dtype, kv->d_index);
}

const float *tr_index_page_read(const tr_device *d, const tr_kv_layer *kv, int page, int n,
                                float *tile, tr_ahead *ahead)
{
    const struct tr_attention_kernels *k = tr_attention_of(d);
    const char *from = index_page_at(kv, page);
    int d_index = kv->d_index, d_tile = (d_index + 3) / 4 * 4;

    for (int s = 0; s < n && kv->dtype != TR_F32; s += TR_AHEAD_KEYS) {
        tr_ask_ahead(ahead, TR_AHEAD_LINES);
        k->index_tile(tile + s * d_tile, (const uint8_t *)from + s * d_index, d_index,
                      at_most(n - s, TR_AHEAD_KEYS));
    }
    if (kv->dtype != TR_F32)
        return (const float *)(const void *)(from + (size_t)TR_PAGE_TOKENS * d_index);
    const float *key = (const float *)(const void *)from;
    for (int s = 0; s < (n + 15) / 16 * 16; s++) /* past n: the last one again, to fill its group */
        tr_index_tile_key(tile, k->tile_lanes, d_index, s, key + (s < n ? s : n - 1) * d_index);
    return NULL;
}

tr_index_page tr_index_page_codes(const tr_kv_layer *kv, int page)
{
    const char *at = index_page_at(kv, page);
    return (tr_index_page){
        .code = (const uint8_t *)at,
        .scale = (const float *)(const void *)(at + (size_t)TR_PAGE_TOKENS * (size_t)kv->d_index),
    };
}

tr_ahead tr_index_page_ahead(const tr_kv_layer *kv, int page)
{
    const char *at = index_page_at(kv, page);
    return (tr_ahead){at, at + tr_index_page_bytes(kv->dtype, kv->d_index)};
}

void tr_latent_prefetch(const tr_kv_layer *kv, int64_t i_row)
{
    size_t bytes = tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);
    const char *at = (const char *)kv->latent + (size_t)i_row * bytes;

    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(at + i, 0, 2);
    __builtin_prefetch(at + bytes - 1, 0, 2);
}

typedef struct write_work {
    const tr_device *d;
    const struct tr_kv_write_args *a;
    int n_rows, latent, index;
} write_work;

static void write_member(void *ctx, int i, int n)
{
    const write_work *w = ctx;
    const struct tr_kv_write_args *a = w->a;

    for (int r = tr_team_part(w->n_rows, i, n); r < tr_team_part(w->n_rows, i + 1, n); r++) {
        if (tr_row_is_pad(a->rows, r)) continue;
        assert(a->rows->write[r] < (int64_t)a->kv.n_pages * TR_PAGE_TOKENS);
        if (w->latent) latent_write(w->d, a, r);
        if (w->index) index_write(w->d, a, r);
    }
}

tr_status tr_cpu_kv_write(tr_device *d, tr_lane lane, const struct tr_kv_write_args *a)
{
    int n = tr_live_rows(a->rows->n, a->rows->n_max);
    int latent = a->kv_a && a->kv.latent, index = a->index_k && a->kv.index;
    double work = 16.0 * n * ((latent ? a->kv.d_latent : 0) + (index ? a->kv.d_index : 0));
    tr_status st = tr_attention_check_kv(d, "kv_write", &a->kv);

    (void)lane;
    if (st != TR_OK) return st;
    if (a->push.n_peers)
        return tr_cpu_fail(d, TR_E_USAGE, "kv_write: this backend has no peers to push to");
    if (index && a->kv.d_rope > a->kv.d_index)
        return tr_cpu_fail(d, TR_E_USAGE, "kv_write: index keys narrower than their rope");
    write_work w = {d, a, n, latent, index};
    tr_device_run(d, n < 2 ? 0.0 : work, write_member, &w);
    return TR_OK;
}
