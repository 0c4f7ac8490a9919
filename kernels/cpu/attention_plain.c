/* The inner loops of attention in plain C: the reference of the other two, and what runs where they do not. Sums have 16
 * accumulators (element i goes to accumulator i % 16) joined by one tree: compilers can vectorise that without leave to
 * reorder, and its rounding error does not grow with the length as one long chain's would. */
#include <config.h>

#include <math.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/number.h"

enum { N_PART = 16 };

static float join(float part[N_PART])
{
    for (int half = N_PART / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            part[i] += part[i + half];
    return part[0];
}

static float dot(const float *a, const float *b, int d)
{
    float part[N_PART] = {0};
    int i = 0;

    for (; i + N_PART <= d; i += N_PART)
        for (int j = 0; j < N_PART; j++)
            part[j] += a[i + j] * b[i + j];
    for (int j = 0; i + j < d; j++)
        part[j] += a[i + j] * b[i + j];
    return join(part);
}

static void dots(float *out, tr_tile q, tr_tile k, int d)
{
    for (int r = 0; r < q.n; r++)
        for (int s = 0; s < k.n; s++)
            out[r * TR_KEY_BLOCK + s] = dot(q.x + (size_t)r * q.ld, k.x + (size_t)s * k.ld, d);
}

static void turn(float *out, tr_tile k, int d)
{
    for (int i = 0; i < d; i++)
        for (int s = 0; s < TR_KEY_BLOCK; s++)
            out[i * TR_KEY_BLOCK + s] = s < k.n ? k.x[(size_t)s * k.ld + (size_t)i] : 0.0f;
}

static void scores(float *p, tr_tile q, const float *turned, int d)
{
    for (int r = 0; r < q.n; r++, p += TR_KEY_BLOCK) {
        for (int s = 0; s < TR_KEY_BLOCK; s++)
            p[s] = 0.0f;
        for (int i = 0; i < d; i++)
            for (int s = 0; s < TR_KEY_BLOCK; s++)
                p[s] += q.x[(size_t)r * q.ld + (size_t)i] * turned[i * TR_KEY_BLOCK + s];
    }
}

static void accumulate(float *y, size_t ld_y, const float *p, const float *keep, const int *n_keys,
                       int n_rows, const float *v, size_t ld_v, int d)
{
    for (int r = 0; r < n_rows; r++) {
        float *out = y + (size_t)r * ld_y;
        for (int i = 0; i < d; i++)
            out[i] = keep[r] == 0.0f ? 0.0f : out[i] * keep[r];
        for (int s = 0; s < n_keys[r]; s++) {
            float w = p[r * TR_KEY_BLOCK + s];
            const float *row = v + (size_t)s * ld_v;
            for (int i = 0; i < d; i++)
                out[i] += w * row[i];
        }
    }
}

static float scale_max(float *x, float scale, int n)
{
    float max = -INFINITY;

    for (int i = 0; i < n; i++) {
        x[i] *= scale;
        max = x[i] > max ? x[i] : max;
    }
    return max;
}

static float sum(const float *x, int n)
{
    float part[N_PART] = {0};

    for (int i = 0; i < n; i++)
        part[i % N_PART] += x[i];
    return join(part);
}

enum { LANES = 1 };

static void index_tile(float *tile, const uint8_t *code, int d, int n)
{
    tr_index_tile_codes(tile, LANES, d, (n + 4 * LANES - 1) / (4 * LANES) * (4 * LANES), code);
}

static void index_add(float *acc, const float *q, const float *w, int n_heads, const float *tile,
                      int d, int begin, int end)
{
    for (int s = begin; s < end; s++)
        for (int h = 0; h < n_heads; h++) {
            float part[4] = {0};
            for (int i = 0; i < d; i += 4) {
                const float *key = tile + tr_index_tile_at(LANES, d, s, i);
                for (int j = 0; j < 4; j++)
                    part[j] += q[h * d + i + j] * key[j];
            }
            float x = (part[0] + part[2]) + (part[1] + part[3]);
            acc[s] += w[h] * (x < 0.0f ? 0.0f : x);
        }
}

static void index_score(float *score, const float *acc, const float *key_scale, int n)
{
    for (int s = 0; s < n; s++) {
        float x = (key_scale ? acc[s] * key_scale[s] : acc[s]) + 0.0f; /* -0 + +0 is +0 */
        score[s] = isnan(x) ? -INFINITY : x;
    }
}

static int count_from(const float *score, int n, float bound)
{
    int count = 0;

    if (bound == -INFINITY) return n;
#pragma omp simd reduction(+ : count)
    for (int s = 0; s < n; s++)
        count += score[s] >= bound;
    return count;
}

static int take(int32_t *position, int k, const float *score, int n, float bound, int n_ties)
{
    int m = 0;

    for (int s = 0; s < n && m < k; s++) {
        int tie = (score[s] == bound || (bound == -INFINITY && isnan(score[s]))) && n_ties > 0;
        position[m] = s; /* overwritten by the next unless it is taken: no branch to mispredict */
        n_ties -= tie;
        m += (score[s] > bound) | tie;
    }
    return m;
}

static float max_abs(const float *x, int n)
{
    float max = 0.0f;

    for (int i = 0; i < n; i++)
        max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    return max;
}

static void to_e4m3(uint8_t *out, const float *x, float factor, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = tr_f32_to_e4m3(x[i] * factor);
}

static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = tr_e4m3_to_f32(in[i]) * scale;
}

static void expand_latent(float *out, const uint8_t *record, int d_latent, int d_rope)
{
    const float *scale = (const float *)(const void *)(record + d_latent);
    const uint16_t *rope;

    for (int i = 0; i < d_latent; i++)
        out[i] = tr_e4m3_to_f32(record[i]) * scale[i / TR_SCALE_BLOCK];
    rope = (const uint16_t *)(const void *)(scale + tr_n_scales(d_latent));
    for (int i = 0; i < d_rope; i++)
        out[d_latent + i] = tr_bf16_to_f32(rope[i]);
}

static void round_bf16(float *x, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = tr_round_bf16(x[i]);
}

const struct tr_attention_kernels tr_attention_plain = {
    .dots = dots,
    .turn = turn,
    .scores = scores,
    .accumulate = accumulate,
    .scale_max = scale_max,
    .sum = sum,
    .tile_lanes = LANES,
    .index_tile = index_tile,
    .index_add = index_add,
    .index_score = index_score,
    .count_from = count_from,
    .select = take,
    .max_abs = max_abs,
    .to_e4m3 = to_e4m3,
    .expand_e4m3 = expand_e4m3,
    .expand_latent = expand_latent,
    .round_bf16 = round_bf16,
    .hadamard = tr_hadamard,
};
