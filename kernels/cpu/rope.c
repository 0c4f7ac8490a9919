#include <config.h>

#include "kernels/cpu/rope_priv.h"

void tr_rope_interleaved(float *x, const float *cos_sin, int d)
{
    for (int i = 0; i < d / 2; i++) {
        float c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * c - b * s;
        x[2 * i + 1] = a * s + b * c;
    }
}

void tr_rope_half_split(float *x, const float *cos_sin, int d)
{
    int half = d / 2;

    for (int i = 0; i < half; i++) {
        float c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
        float a = x[i], b = x[i + half];
        x[i] = a * c - b * s;
        x[i + half] = a * s + b * c;
    }
}
