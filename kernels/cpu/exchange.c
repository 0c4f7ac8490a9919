#include <config.h>

#include <string.h>

#include "kernels/cpu/cpu_priv.h"

/* Rows to the experts of other ranks and back (parallel.md 5.1): what lies between the router and the all-to-all, and between
 * the all-to-all and the experts. Little more than copies; every order is fixed, so that sums do not depend on arrival. */

/* Does destination ep hold an expert of row r? */
static int goes_to(const struct tr_moe_dispatch_args *a, int r, int ep)
{
    const int32_t *expert = a->expert + (size_t)r * (size_t)a->k;

    for (int j = 0; j < a->k; j++)
        if (expert[j] >= ep * a->n_local && expert[j] < (ep + 1) * a->n_local) return 1;
    return 0;
}

/* The choices of row r, those that destination ep holds: the end of a record. */
static void put_choices(const struct tr_moe_dispatch_args *a, int r, int ep, char *to)
{
    const int low = ep * a->n_local, high = low + a->n_local;
    int32_t *expert = (int32_t *)(void *)to;
    float *weight = (float *)(void *)(to + (size_t)a->k * 4);

    for (int j = 0; j < a->k; j++) {
        const size_t at = (size_t)r * (size_t)a->k + (size_t)j;
        const int32_t e = a->expert[at];
        const int here = e >= low && e < high;
        expert[j] = here ? e : -1;
        weight[j] = here ? a->weight[at] : 0;
    }
}

/* Bytes of an activation in records with codes or without. */
static size_t act_bytes(const void *q)
{
    return q ? TR_CODES : sizeof(float);
}

/* Row r's activations, or their codes and scales: the beginning of a record. */
static void put_row(const tr_act *x, const uint8_t *q, const float *q_scale, int ld_scale, int d,
                    size_t r, char *to)
{
    const size_t w = (size_t)d;

    if (!q) {
        memcpy(to, x + r * w, w * sizeof *x);
        return;
    }
    memcpy(to, q + r * w, w);
    for (size_t b = 0; b < w / 128; b++)
        memcpy(to + w + 4 * b, &q_scale[b * (size_t)ld_scale + r], 4);
}

tr_status tr_cpu_moe_dispatch(tr_device *d, tr_lane lane, const struct tr_moe_dispatch_args *a)
{
    const size_t bytes = tr_dispatch_bytes(a->d, a->k, act_bytes(a->q)),
                 row_bytes = tr_dispatch_choices(a->d, act_bytes(a->q));
    const int n = *a->n;
    char *record = a->record;
    int at = 0;
    (void)lane;

    if (a->step < 1 || a->first < 0 || a->n_local < 1 || a->k < 1)
        return tr_cpu_fail(d, TR_E_DEVICE, "rows %d, %d.. to experts in groups of %d", a->first,
                           a->first + a->step, a->n_local);
    for (int ep = 0; ep < a->n_ep; ep++) {
        for (int xt = 0; xt < a->n_xt; xt++) {
            const int begin = at;
            for (int i = 0; i < a->n_rows && a->first + i * a->step < n; i++) {
                const int r = a->first + i * a->step;
                if (!goes_to(a, r, ep)) continue; /* there is room for what goes, no more */
                char *to = record + (size_t)at * bytes;
                put_row(a->x, a->q, a->q_scale, a->ld_scale, a->d, (size_t)r, to);
                put_choices(a, r, ep, to + row_bytes);
                a->origin[at++] = r;
            }
            a->count[ep * a->n_xt + xt] = at - begin;
        }
    }
    return TR_OK;
}

tr_status tr_cpu_moe_receive(tr_device *d, tr_lane lane, const struct tr_moe_receive_args *a)
{
    const size_t bytes = tr_dispatch_bytes(a->d, a->k, act_bytes(a->q)), k = (size_t)a->k,
                 w = (size_t)a->d, choices = tr_dispatch_choices(a->d, act_bytes(a->q));
    (void)d, (void)lane;

    for (size_t i = 0; i < (size_t)a->n_rows; i++) {
        const char *from = (const char *)a->record + i * bytes;
        memcpy(a->expert + i * k, from + choices, k * 4);
        memcpy(a->weight + i * k, from + choices + k * 4, k * 4);
        if (!a->q) continue;
        memcpy(a->q + i * w, from, w);
        for (size_t b = 0; b < w / 128; b++)
            memcpy(&a->q_scale[b * (size_t)a->ld_scale + i], from + w + 4 * b, 4);
    }
    *a->n_out = a->n_rows;
    return TR_OK;
}

tr_status tr_cpu_moe_return(tr_device *d, tr_lane lane, const struct tr_moe_return_args *a)
{
    const size_t w = (size_t)a->d;
    (void)d, (void)lane;

    for (int i = 0; i < a->n_rows; i++) {
        const float *y = a->y + (size_t)i * w;
        float *out = a->out + (size_t)a->origin[i] * w;
        for (size_t j = 0; j < w; j++)
            out[j] += y[j];
    }
    return TR_OK;
}

tr_status tr_cpu_moe_offer(tr_device *d, tr_lane lane, const struct tr_moe_offer_args *a)
{
    const size_t bytes = tr_dispatch_bytes(a->d, a->k, act_bytes(a->q)), k = (size_t)a->k,
                 choices = tr_dispatch_choices(a->d, act_bytes(a->q));
    (void)d, (void)lane;

    for (int i = 0; i < a->n_rows; i++) {
        char *to = (char *)a->record + (size_t)i * bytes;
        const size_t r = (size_t)(a->first + i);
        if (a->first + i < *a->n) {
            put_row(a->x, a->q, a->q_scale, a->ld_scale, a->d, r, to);
            memcpy(to + choices, a->expert + r * k, k * 4);
            memcpy(to + choices + k * 4, a->weight + r * k, k * 4);
        } else {
            memset(to, 0, bytes);
            memset(to + choices, 0xff, k * 4); /* -1 */
        }
    }
    return TR_OK;
}

tr_status tr_cpu_moe_add(tr_device *d, tr_lane lane, const struct tr_moe_add_args *a)
{
    const size_t w = (size_t)a->d;
    const int n = tr_live_rows(a->n, a->n_max);
    (void)d, (void)lane;

    for (int r = 0; r < n; r++)
        for (int m = 0; m < a->n_members; m++) {
            const float *y = a->y + ((size_t)m * a->ld + (size_t)r) * w;
            float *out = a->out + (size_t)r * w;
            for (size_t j = 0; j < w; j++)
                out[j] += y[j];
        }
    return TR_OK;
}

tr_status tr_cpu_rows_zero(tr_device *d, tr_lane lane, const struct tr_rows_zero_args *a)
{
    (void)d, (void)lane;
    memset(a->out, 0, (size_t)tr_live_rows(a->n, a->n_max) * (size_t)a->d * sizeof(float));
    return TR_OK;
}
