/* What an operation has to move and to compute, for profiling regions and `trireme bench`. Bytes: weights and cache that
 * must be read once (and written), and of operations that touch neither, their rows. Flops: two per multiply-add, one per
 * other operation on floats, exp too. Pure functions of sizes; sums over rows are the caller's to know. Never what an
 * implementation happens to do: weights that it reads twice count once. */
#ifndef TR_KERNELS_WORK_H
#define TR_KERNELS_WORK_H

#include "kernels/kernels.h"

typedef struct tr_work {
    double bytes, flops;
} tr_work;

/* Rows of a step as attention sees them. A pair is a row and a key that it sees; a key is counted once per run of rows of
 * one slot. Positions below k select everything. */
typedef struct tr_row_sums {
    double n, n_absorbed, n_dense;
    double dense_pairs, dense_keys;
    double selected;                  /* pairs of absorbed rows and their at most k selected keys */
    double scored_pairs, scored_keys; /* of rows that need scores */
} tr_row_sums;

/* Adds `rows` consecutive rows of a slot, the first at `position`; dense: those below k are. */
static inline void tr_row_sums_add(tr_row_sums *s, int position, int rows, int dense, int k)
{
    if (dense && rows > k - position) {
        tr_row_sums_add(s, k, rows - (k - position), 0, k);
        rows = k - position;
    }
    const double first = position + 1, last = (double)position + rows;
    const double pairs = (first + last) / 2 * rows;

    s->n += rows;
    if (dense) {
        s->n_dense += rows;
        s->dense_pairs += pairs;
        s->dense_keys += last;
        return;
    }
    const int below = position >= k ? 0 : k - position < rows ? k - position : rows;
    s->n_absorbed += rows;
    s->selected += (first + position + below) / 2 * below + (double)k * (rows - below);
    if (below == rows) return;
    s->scored_pairs += (first + below + last) / 2 * (rows - below);
    s->scored_keys += last;
}

static inline double tr_weight_bytes(const tr_ops *ops, const tr_linear *w)
{
    return (double)ops->linear_bytes(w->format, w->n_mats, w->n_out, w->n_in);
}

static inline tr_work tr_work_embed(double n, double d, tr_dtype dtype)
{
    return (tr_work){n * d * (4 + (dtype == TR_F32 ? 4 : 2)), 0};
}
static inline tr_work tr_work_norm(double n, double d, int add)
{
    return (tr_work){n * d * (add ? 16 : 8), n * d * (add ? 5 : 4)};
}
static inline tr_work tr_work_rows_gather(double n, double d)
{
    return (tr_work){8 * n * d, 0};
}
static inline tr_work tr_work_linear(double n, const tr_ops *ops, const tr_linear *w)
{
    return (tr_work){tr_weight_bytes(ops, w), 2 * n * w->n_out * w->n_in};
}
static inline tr_work tr_work_swiglu(double n, double d)
{
    return (tr_work){12 * n * d, 5 * n * d};
}
/* mla_query and mla_value: one product per head and absorbed row; rope: numbers turned, 3 flops each. */
static inline tr_work tr_work_heads(double n_absorbed, const tr_ops *ops, const tr_linear *w,
                                    double rope)
{
    return (tr_work){n_absorbed > 0 ? tr_weight_bytes(ops, w) : 4 * rope,
                     2 * n_absorbed * w->n_mats * w->n_out * w->n_in + 3 * rope};
}
static inline tr_work tr_work_kv_write(double n, const tr_kv_layer *kv, int latent, int index)
{
    const double d = kv->d_latent + kv->d_rope, d_index = kv->d_index;
    tr_work w = {0, 0};
    if (latent) {
        w.bytes += n * (4 * d + (double)tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope));
        w.flops += n * (5 * d + 3 * kv->d_rope);
    }
    if (index) {
        w.bytes += n * (4 * d_index +
                        (double)tr_index_page_bytes(kv->dtype, kv->d_index) / TR_PAGE_TOKENS);
        w.flops += n * (8 * d_index + 3 * kv->d_rope);
        for (int half = 1; half < kv->d_index && kv->dtype != TR_F32; half *= 2)
            w.flops += n * d_index; /* a stage of the Hadamard transform */
    }
    return w;
}
static inline tr_work tr_work_index_query(double n, int heads, int d_index, int d_rope,
                                          tr_dtype dtype)
{
    const double all = n * heads * d_index;
    tr_work w = {all * (4 + (dtype == TR_F32 ? 4 : 1)), 3 * n * heads * d_rope};
    for (int half = 1; half < d_index && dtype != TR_F32; half *= 2)
        w.flops += all;
    return w;
}
static inline tr_work tr_work_index_logits(double pairs, double keys, int heads,
                                           const tr_kv_layer *kv)
{
    const double key = (double)tr_index_page_bytes(kv->dtype, kv->d_index) / TR_PAGE_TOKENS;
    return (tr_work){keys * key + 4 * pairs, 2 * pairs * heads * kv->d_index};
}
static inline tr_work tr_work_topk(double n, double pairs, int k)
{
    return (tr_work){4 * pairs + 8 * n * k, 0};
}
static inline tr_work tr_work_sparse_mla(double pairs, int heads, const tr_kv_layer *kv)
{
    return (tr_work){pairs * (double)tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope),
                     2 * pairs * heads * (2.0 * kv->d_latent + kv->d_rope)};
}
static inline tr_work tr_work_dense_mha(double pairs, double keys, const tr_ops *ops,
                                        const tr_linear *w_uk, const tr_linear *w_uv, int d_rope,
                                        const tr_kv_layer *kv)
{
    const double key = (double)tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);
    const double d_kv = (double)w_uk->n_out + w_uv->n_out;
    return (tr_work){keys * key + tr_weight_bytes(ops, w_uk) + tr_weight_bytes(ops, w_uv),
                     2.0 * w_uk->n_mats * (keys * kv->d_latent * d_kv + pairs * (d_kv + d_rope))};
}
static inline tr_work tr_work_router(double n, double n_experts, double k)
{
    return (tr_work){n * (4 * n_experts + 8 * k), 4 * n * n_experts};
}
static inline tr_work tr_work_moe_pack(double n, double k)
{
    return (tr_work){8 * n * k, 0};
}
/* n_hit: experts that have a row. */
static inline tr_work tr_work_moe(double pairs, double n_hit, const tr_ops *ops,
                                  const tr_linear *gate_up, const tr_linear *down)
{
    const double all = tr_weight_bytes(ops, gate_up) + tr_weight_bytes(ops, down);
    return (tr_work){all / gate_up->n_mats * n_hit,
                     6 * pairs * (double)down->n_out * (double)down->n_in};
}
static inline tr_work tr_work_moe_combine(double n, double k, double d)
{
    return (tr_work){4 * n * d * (k + 2), 2 * n * d * k};
}
/* Rows of activations with their choices, read and written as records. */
static inline tr_work tr_work_moe_dispatch(double n, int d, int k, size_t act_bytes)
{
    return (tr_work){2 * n * (double)tr_dispatch_bytes(d, k, act_bytes), 0};
}
static inline tr_work tr_work_moe_return(double n, double d)
{
    return (tr_work){12 * n * d, n * d};
}
static inline tr_work tr_work_moe_add(double n, double d, double members)
{
    return (tr_work){4 * n * d * (members + 2), n * d * members};
}
static inline tr_work tr_work_rows_zero(double n, double d)
{
    return (tr_work){4 * n * d, 0};
}
/* sample_merge and logprob_merge: every member's parts of n rows. */
static inline tr_work tr_work_parts(double n, double n_members, size_t bytes)
{
    return (tr_work){n * n_members * (double)bytes, 0};
}
/* sample and logprobs: one pass over the logits. */
static inline tr_work tr_work_logits(double n, double n_vocab)
{
    return (tr_work){4 * n * n_vocab, 0};
}
static inline tr_work tr_work_plan_apply(double plan_bytes)
{
    return (tr_work){plan_bytes, 0};
}
static inline tr_work tr_work_pages_copy(double n_rows, const tr_kv_layer *kv)
{
    const double key = kv->index ? (double)tr_index_page_bytes(kv->dtype, kv->d_index) : 0;
    return (tr_work){
        2 * n_rows *
            ((double)tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope) + key / TR_PAGE_TOKENS),
        0};
}

#endif
