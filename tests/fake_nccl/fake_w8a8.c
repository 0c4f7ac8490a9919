/* A backend whose experts take e4m3 codes (TR_CAP_W8A8), made of the CPU's: the norm leaves codes and scales of its output, moe
 * computes with what they stand for. FAKE_W8A8=codes: codes are left and used. FAKE_W8A8=rows: nothing is left, and moe makes
 * them of the rows itself; the same numbers on another way, so that jobs of both must agree to the last digit. */
#include <config.h>

#include "tests/fake_nccl/fake.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/number.h"

static const tr_ops *cpu;

static float scale_of(float amax, int pow2)
{
    const float scale = fmaxf(amax, 1e-4f) / 448.0f;
    return pow2 ? exp2f(ceilf(log2f(scale))) : scale;
}

/* A block of 128 numbers. Returns its scale. */
static float encode(const float *x, uint8_t *q, int pow2)
{
    float amax = 0;
    for (int i = 0; i < 128; i++)
        amax = fmaxf(amax, fabsf(x[i]));
    const float scale = scale_of(amax, pow2);
    for (int i = 0; i < 128; i++)
        q[i] = tr_f32_to_e4m3(x[i] / scale);
    return scale;
}

tr_status fake_w8a8_norm(tr_device *device, tr_lane lane, const struct tr_norm_args *a)
{
    const tr_status st = cpu->norm(device, lane, a);
    const int n = *a->n < a->n_max ? *a->n : a->n_max, stride = (a->n_max + 3) / 4 * 4;

    for (int r = 0; r < n && a->q && st == TR_OK; r++)
        for (int b = 0; b < a->d / 128; b++)
            a->q_scale[(size_t)b * (size_t)stride + (size_t)r] =
                encode(a->out + (size_t)r * a->ld_out + (size_t)b * 128,
                       a->q + (size_t)r * (size_t)a->d + (size_t)b * 128, a->scale_pow2);
    return st;
}

/* Row r of what goes in, as its codes say. */
static void decode(const tr_acts *in, int r, float *x)
{
    const size_t at = (size_t)r, stride = (size_t)(in->n_max + 3) / 4 * 4;
    uint8_t own[128];

    for (size_t b = 0; b < (size_t)in->d / 128; b++) {
        const uint8_t *q = own;
        float scale;
        if (in->quantised) {
            q = in->q + at * (size_t)in->d + b * 128;
            scale = in->q_scale[b * stride + at];
        } else {
            scale = encode(in->x + at * in->ld + b * 128, own, in->scale_pow2);
        }
        for (int i = 0; i < 128; i++)
            x[b * 128 + (size_t)i] = tr_e4m3_to_f32(q[i]) * scale;
    }
}

static tr_status moe(tr_device *device, tr_lane lane, const struct tr_moe_args *a)
{
    const int n = *a->n < a->n_max ? *a->n : a->n_max, d = a->in.d;
    struct tr_moe_args with = *a;

    if (a->gate_up->format != TR_W_E4M3_B128 || d % 128) return cpu->moe(device, lane, a);
    float *x = malloc(((size_t)n * (size_t)d + 1) * sizeof *x);
    if (!x) return TR_E_MEMORY;
    for (int r = 0; r < n; r++)
        decode(&a->in, r, x + (size_t)r * (size_t)d);
    with.in = (tr_acts){.x = x, .ld = (size_t)d, .n_max = a->n_max, .d = d};
    const tr_status st = cpu->moe(device, lane, &with);
    free(x);
    return st;
}

bool fake_w8a8(const tr_ops *cpu_ops, tr_ops *table)
{
    const char *how = getenv("FAKE_W8A8");

    cpu = cpu_ops;
    if (!how || !*how) return false;
    table->moe = moe;
    if (strcmp(how, "codes") != 0) return false;
    table->norm = fake_w8a8_norm;
    table->caps |= TR_CAP_W8A8;
    return true;
}
