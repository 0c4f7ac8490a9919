#include <config.h>

#include "model/config.h"

#include <math.h>

/* model.md 3.2 */
static double yarn_mscale(double factor, double mscale)
{
    return factor > 1.0 ? 0.1 * mscale * log(factor) + 1.0 : 1.0;
}

double tr_config_attention_scale(const tr_config *c)
{
    double m = c->yarn.present ? yarn_mscale(c->yarn.factor, c->yarn.mscale_all_dim) : 1.0;
    return m * m / sqrt((double)(c->qk_nope_head_dim + c->qk_rope_head_dim));
}

/* The dimension whose wave makes `rotations` turns over the original context. */
static double corrected_dim(const tr_config *c, double rotations)
{
    const double two_pi = 6.283185307179586476925;
    double turns = (double)c->yarn.original_max_position_embeddings / (rotations * two_pi);
    return c->qk_rope_head_dim * log(turns) / (2.0 * log(c->rope_theta));
}

void tr_config_inv_freq(const tr_config *c, float *inv_freq)
{
    int d = c->qk_rope_head_dim;
    double low = 0.0, high = 0.0;

    if (c->yarn.present) {
        low = fmax(floor(corrected_dim(c, c->yarn.beta_fast)), 0.0);
        high = fmin(ceil(corrected_dim(c, c->yarn.beta_slow)), d - 1);
        if (low == high) high += 0.001;
    }
    for (int i = 0; i < d / 2; i++) {
        /* Rounded to fp32 once, at the end: then the vectors' frequencies come out bit for bit, and with them the
         * angles at far positions, where one unit in the last place of a frequency is visible. */
        double f = pow(c->rope_theta, -2.0 * i / d);
        if (c->yarn.present) {
            double ramp = fmin(fmax((i - low) / (high - low), 0.0), 1.0);
            f = f / c->yarn.factor * ramp + f * (1.0 - ramp);
        }
        inv_freq[i] = (float)f;
    }
}

void tr_config_rope_table(const tr_config *c, int n_positions, float *table)
{
    float inv_freq[TR_ROPE_DIM_MAX / 2];
    int half = c->qk_rope_head_dim / 2;
    double m = 1.0; /* 1 for every published model: the two mscales are equal */

    if (c->yarn.present)
        m = yarn_mscale(c->yarn.factor, c->yarn.mscale) /
            yarn_mscale(c->yarn.factor, c->yarn.mscale_all_dim);
    tr_config_inv_freq(c, inv_freq);
#pragma omp parallel for schedule(static)
    for (int p = 0; p < n_positions; p++) {
        float *row = table + (size_t)p * (size_t)half * 2;
        for (int i = 0; i < half; i++) {
            /* The angle is rounded to fp32, its cosine is not computed in it (model.md 3.2). */
            float angle = (float)p * inv_freq[i];
            row[2 * i] = (float)(cos((double)angle) * m);
            row[2 * i + 1] = (float)(sin((double)angle) * m);
        }
    }
}
