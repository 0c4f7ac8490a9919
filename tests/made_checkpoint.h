/* Checkpoints made for a test: every tensor of a config, one of them wrong where that is asked for. */
#ifndef TR_TESTS_MADE_CHECKPOINT_H
#define TR_TESTS_MADE_CHECKPOINT_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/number.h"
#include "model/tensors.h"
#include "tests/shard_file.h"

typedef struct making {
    tr_shard_file file;
    const tr_config *config;
    const char *without;    /* a tensor left out */
    const char *reshaped;   /* one with a dimension more */
    const char *as_f32;     /* names with this in them are F32 where others are BF16 */
    const char *not_finite; /* whose last number is infinite, or NaN */
    const char *as_bf16;    /* names with this in them are BF16, without scales */
    bool nan;
    bool copies; /* the MTP layer's copies are there */
} making;

static void add_tensor(making *m, const char *name, const char *dtype, size_t element, int rank,
                       const int64_t *shape)
{
    char text[64];
    size_t n = (size_t)shape[0] * (size_t)(rank == 2 ? shape[1] : 1);
    unsigned char *data = malloc(n * element + 1);
    assert_non_null(data);
    for (size_t i = 0; i < n; i++) {
        float x = (float)((int)((i * 31 + strlen(name)) % 97) - 48) / 64.0f;
        uint16_t h = tr_f32_to_bf16(x);
        if (element == 1) data[i] = tr_f32_to_e4m3(x);
        if (element == 2) memcpy(data + 2 * i, &h, 2);
        if (element == 4) memcpy(data + 4 * i, &x, 4);
    }
    const uint16_t bad2 = (uint16_t)(0x7f80 | m->nan);
    const float bad4 = m->nan ? NAN : -INFINITY;
    if (m->not_finite && strcmp(m->not_finite, name) == 0)
        memcpy(data + (n - 1) * element, element == 2 ? (const void *)&bad2 : &bad4, element);
    const char *more = m->reshaped && strcmp(m->reshaped, name) == 0 ? "1, " : "";
    if (rank == 2)
        snprintf(text, sizeof text, "[%s%jd, %jd]", more, (intmax_t)shape[0], (intmax_t)shape[1]);
    else
        snprintf(text, sizeof text, "[%s%jd]", more, (intmax_t)shape[0]);
    if (!m->without || strcmp(m->without, name) != 0)
        tr_shard_file_add(&m->file, name, dtype, text, data, n * element);
    free(data);
}

static bool make_tensor(void *ctx, const tr_wanted *w)
{
    making *m = ctx;
    if (w->optional && !m->copies) return true;
    bool bf16 = m->as_bf16 && strstr(w->name, m->as_bf16);
    if (w->class == TR_CLASS_Q && m->config->fp8 && !bf16) {
        char name[160];
        int64_t blocks[2] = {(w->shape[0] + 127) / 128, (w->shape[1] + 127) / 128};
        add_tensor(m, w->name, "F8_E4M3", 1, 2, w->shape);
        snprintf(name, sizeof name, "%s_scale_inv", w->name);
        add_tensor(m, name, "F32", 4, 2, blocks);
    } else if (m->as_f32 && strstr(w->name, m->as_f32)) {
        add_tensor(m, w->name, "F32", 4, w->rank, w->shape);
    } else {
        add_tensor(m, w->name, "BF16", 2, w->rank, w->shape);
    }
    return true;
}

#endif
