/* What sampling from a whole row (sample.c) and from parts of a vocabulary (sample_part.c) share. */
#ifndef TR_CPU_SAMPLE_PRIV_H
#define TR_CPU_SAMPLE_PRIV_H

#include <stdbool.h>

#include "kernels/cpu/cpu_priv.h"
#include "kernels/number.h"

/* An id that may be drawn and its changed logit, before temperature, as one number: the larger
 * number is drawn first (logit descending, id ascending). Above: the bits of the fp32, so that they
 * compare like the fp32; below: ~id. */
typedef uint64_t tr_choice_key;

static inline tr_choice_key tr_make_choice(float logit, int32_t id)
{
    uint32_t u = tr_f32_bits(logit + 0.0f); /* -0 is 0 */
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (uint64_t)u << 32 | ~(uint32_t)id;
}

static inline int32_t tr_key_id(tr_choice_key c)
{
    return (int32_t) ~(uint32_t)c;
}

static inline double tr_key_logit(tr_choice_key c)
{
    uint32_t u = (uint32_t)(c >> 32);
    return (double)tr_bits_f32(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/* No NaN, no Inf. In lanes, which compilers turn into vectors: the row is 129,280 long. */
static inline bool tr_all_finite(const float *x, int n)
{
    enum { LANES = 16 };
    int32_t worst[LANES] = {0};
    int i = 0;

    for (; n - i >= LANES; i += LANES)
        for (int k = 0; k < LANES; k++) {
            int32_t magnitude = (int32_t)(tr_f32_bits(x[i + k]) & 0x7fffffffu);
            worst[k] = magnitude > worst[k] ? magnitude : worst[k];
        }
    for (; i < n; i++) {
        int32_t magnitude = (int32_t)(tr_f32_bits(x[i]) & 0x7fffffffu);
        worst[0] = magnitude > worst[0] ? magnitude : worst[0];
    }
    for (int k = 1; k < LANES; k++)
        worst[0] = worst[k] > worst[0] ? worst[k] : worst[0];
    return worst[0] < 0x7f800000;
}

/* Unnormalised probability after temperature; 1 for the best. */
double tr_key_weight(tr_choice_key c, double best, double temperature);

typedef struct tr_sample_ids { /* ids [first, first + n_vocab) of a vocabulary */
    const tr_plan *plan;       /* changes */
    const uint32_t *has_token; /* bit per id, of all ids */
    int first, n_vocab;
} tr_sample_ids;

/* Every id that has a token and is not masked by a change, ids ascending; logits begin with that of `first`. */
int tr_sample_collect(const tr_sample_ids *ids, int32_t head_row, const float *logits,
                      tr_choice_key *out);

/* Live rows of the chunk [i_head, i_head + n_rows). */
int tr_chunk_rows(const tr_rows *rows, int i_head, int n_rows);

/* log of the sum of exp(x - best), and best itself. */
double tr_log_sum(const float *x, int n, double *best);
/* The ids of the n largest, descending, ties by smaller id; returns how many there are. */
int tr_best_ids(const float *x, int n_vocab, int n, int32_t *id);

#endif
