#include <config.h>

#include "model/dummy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "kernels/number.h"

enum {
    N_LEVELS = TR_MADE_LEVELS, /* one random byte per element chooses one of these values */
    STRIPE = 4096,             /* elements whose random bytes are made at a time */
    PARALLEL = 4 << 20 /* elements below which it is one of the device's threads that asks */
};

/* Standard deviation of the e4m3 codes: the largest level, 2.9 of it, stays below 448. */
static const float code_std = 128.0f;
static const float small_std = 0.02f;

struct tr_dummy {
    uint64_t seed;
    float normal[N_LEVELS]; /* quantiles of the normal distribution, mean square 1 */
    uint8_t code[N_LEVELS]; /* e4m3 of normal * code_std */
};

/* x with P(X < x) = p, by bisection: 256 of them are wanted, once. */
static double normal_quantile(double p)
{
    double low = -8.0, high = 8.0;
    for (int i = 0; i < 60; i++) {
        double middle = 0.5 * (low + high);
        if (0.5 * erfc(-middle / sqrt(2.0)) < p)
            low = middle;
        else
            high = middle;
    }
    return 0.5 * (low + high);
}

tr_dummy *tr_dummy_create(uint64_t seed)
{
    tr_dummy *d = malloc(sizeof *d);
    double q[N_LEVELS], square = 0.0;

    if (!d) return NULL;
    d->seed = seed;
    for (int i = 0; i < N_LEVELS; i++) {
        q[i] = normal_quantile((i + 0.5) / N_LEVELS);
        square += q[i] * q[i] / N_LEVELS;
    }
    for (int i = 0; i < N_LEVELS; i++) {
        d->normal[i] = (float)(q[i] / sqrt(square));
        d->code[i] = tr_f32_to_e4m3(d->normal[i] * code_std);
    }
    return d;
}

void tr_dummy_free(tr_dummy *d)
{
    free(d);
}

tr_stored tr_dummy_stored(const tr_config *config, const tr_wanted *w)
{
    if (w->class == TR_CLASS_Q && config->fp8) return TR_STORED_F8_E4M3;
    return w->class == TR_CLASS_F ? TR_STORED_F32 : TR_STORED_BF16;
}

/* The random bytes of elements [begin, begin + n), n <= STRIPE; out has 16 bytes of room behind. Returns where they
 * start: eight elements share a word. */
static const uint8_t *random_bytes(uint64_t key, uint64_t begin, size_t n, uint8_t *out)
{
    uint64_t first = begin / 8, last = (begin + n + 7) / 8;
    for (uint64_t i = first; i < last; i++) {
        uint64_t word = tr_made_word(key, i);
        memcpy(out + (i - first) * 8, &word, 8);
    }
    return out + begin % 8;
}

typedef union levels { /* the 256 values of one tensor, as it is stored */
    uint8_t e4m3[N_LEVELS];
    uint16_t bf16[N_LEVELS];
    float f32[N_LEVELS];
} levels;

static void make_levels(const tr_dummy *d, const tr_wanted *w, tr_stored stored, levels *out)
{
    float mean = 0.0f, std = 0.0f;
    switch (w->init) {
    case TR_INIT_MATRIX:
        std = 1.0f / sqrtf((float)w->shape[1]);
        break;
    case TR_INIT_EMBED:
        std = 1.0f;
        break;
    case TR_INIT_GAIN:
        mean = 1.0f;
        std = small_std;
        break;
    case TR_INIT_SMALL:
        std = small_std;
        break;
    case TR_INIT_ZERO:
        break;
    }
    for (int i = 0; i < N_LEVELS; i++) {
        float x = mean + std * d->normal[i];
        if (stored == TR_STORED_F8_E4M3)
            out->e4m3[i] = d->code[i];
        else if (stored == TR_STORED_BF16)
            out->bf16[i] = tr_f32_to_bf16(x);
        else
            out->f32[i] = x;
    }
}

/* Elements [begin, begin + n) of the whole tensor. */
static void fill_run(uint64_t key, const levels *v, tr_stored stored, uint64_t begin, size_t n,
                     void *dst)
{
    uint8_t room[STRIPE + 16];
    while (n > 0) {
        size_t m = n < STRIPE ? n : STRIPE;
        const uint8_t *byte = random_bytes(key, begin, m, room);
        if (stored == TR_STORED_F8_E4M3) {
            uint8_t *to = dst;
            for (size_t i = 0; i < m; i++)
                to[i] = v->e4m3[byte[i]];
            dst = to + m;
        } else if (stored == TR_STORED_BF16) {
            uint16_t *to = dst;
            for (size_t i = 0; i < m; i++)
                to[i] = v->bf16[byte[i]];
            dst = to + m;
        } else {
            float *to = dst;
            for (size_t i = 0; i < m; i++)
                to[i] = v->f32[byte[i]];
            dst = to + m;
        }
        begin += m;
        n -= m;
    }
}

static uint64_t key_of(const tr_dummy *d, const char *name)
{
    return tr_hash64(name, strlen(name), d->seed);
}

void tr_dummy_block(const tr_dummy *d, const tr_wanted *w, tr_stored stored, int64_t row0,
                    int64_t n_rows, int64_t col0, int64_t n_cols, void *dst)
{
    uint64_t key = key_of(d, w->name);
    uint64_t width = (uint64_t)(w->rank == 2 ? w->shape[1] : w->shape[0]);
    size_t element = stored == TR_STORED_F8_E4M3 ? 1 : stored == TR_STORED_BF16 ? 2 : 4;
    levels v;

    make_levels(d, w, stored, &v);
#pragma omp parallel for schedule(static) if (n_rows * n_cols > PARALLEL)
    for (int64_t r = 0; r < n_rows; r++)
        fill_run(key, &v, stored, (uint64_t)(row0 + r) * width + (uint64_t)col0, (size_t)n_cols,
                 (char *)dst + (size_t)r * (size_t)n_cols * element);
}

void tr_dummy_made(const tr_dummy *d, const tr_wanted *w, tr_stored stored, int64_t row0,
                   int64_t col0, tr_made *out)
{
    levels v;

    make_levels(d, w, stored, &v);
    *out = (tr_made){.key = key_of(d, w->name),
                     .width = (uint64_t)(w->rank == 2 ? w->shape[1] : w->shape[0]),
                     .row0 = (uint64_t)row0,
                     .col0 = (uint64_t)col0};
    _Static_assert(sizeof v == sizeof out->level, "levels of the widest numbers");
    memcpy(&out->level, &v, sizeof v);
}

void tr_dummy_scale(const tr_dummy *d, const tr_wanted *w, int64_t row0, int64_t n_rows,
                    int64_t col0, int64_t n_cols, float *dst)
{
    /* Powers of two, as in the published checkpoints, and two of them, so that a block with another's scale shows. */
    uint64_t key = ~key_of(d, w->name);
    uint64_t width = ((uint64_t)w->shape[1] + TR_SCALE_BLOCK - 1) / TR_SCALE_BLOCK;
    double std = 1.0 / sqrt((double)w->shape[1]);
    float large = (float)exp2(round(log2(std / (double)code_std)));

    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t c = 0; c < n_cols; c++) {
            uint64_t i = (uint64_t)(row0 + r) * width + (uint64_t)(col0 + c);
            dst[r * n_cols + c] = tr_made_word(key, i) & 1 ? large : 0.5f * large;
        }
}
