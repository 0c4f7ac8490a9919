/* kernels.h: every operation the model needs, as one table of C functions; one table per backend.
 *
 * Memory is the backend's. An operation takes a struct of named arguments, does one thing that the paper or the
 * specification names, and can be enqueued on a lane: on CUDA it goes to a stream and never synchronises; on the CPU it
 * runs at once, on the device's threads. Row counts are read from device memory (`*n`), `n_max` bounds them for launch
 * sizes. Argument structs are copied at the call; what their pointers name must stay until the lane has passed.
 *
 * Rows do not influence each other: an output row depends on its own inputs, bit for bit, whatever else is in the step
 * and however a prompt was cut into chunks (architecture.md 4). Activations (tr_act) lie in memory as numbers of tr_ops.act, f32
 * on the CPU and bf16 on CUDA; the residual stream, scores, router and logits are f32 everywhere. What a product makes of its
 * input first (e4m3, bf16) is its own business. Shapes: slowest axis first. Numerics: model.md, by section. */
#ifndef TR_KERNELS_KERNELS_H
#define TR_KERNELS_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/made.h"
#include "kernels/plan_block.h"

typedef struct tr_device tr_device; /* a backend instance: memory, lanes, last error text */
typedef struct tr_graph tr_graph;   /* recorded work of a lane */
typedef struct tr_stamps tr_stamps; /* moments of a device's clock */

typedef enum tr_dtype { TR_F32, TR_BF16, TR_E4M3, TR_I32, TR_U8 } tr_dtype;
/* An activation. Pointers to it name numbers of tr_ops.act: what is declared is the CPU's, a backend with smaller ones reads
 * them as what they are. Nobody but a backend looks inside, and strides count numbers. */
typedef float tr_act;
typedef enum tr_lane { TR_LANE_MAIN, TR_LANE_SIDE, TR_LANE_COMM, TR_LANE_COPY, TR_N_LANES } tr_lane;

enum { TR_PAGE_TOKENS = 64, TR_MAX_PEERS = 8, TR_MAX_LOGPROBS = 20 };

/* ---- data that several operations share ------------------------------------------------------------------------- */

typedef struct tr_acts { /* activations [n_max, d], row stride ld numbers */
    const tr_act *x;
    size_t ld;
    uint8_t *q; /* room for W8A8: [n_max, d + 254 rounded down to 128] e4m3; NULL where unused */
    float *q_scale; /* [(d + 254)/128, n_max rounded up to 4] */
    int n_max, d;
    int scale_pow2; /* W8A8: scales are powers of two (config.json's scale_fmt ue8m0), else amax/448 */
    int quantised; /* q and q_scale hold x already, in blocks from column 0: norm or another product with it left them */
} tr_acts;

/* A weight [n_mats][n_out, n_in] (n_mats: experts, heads). `format` says how its numbers are stored: a new quantisation
 * is a new enumerator, a loader, and one branch of linear and moe per backend. data is in the backend's own order.
 * gate_up: the matrices are moe's gate_up, halves of n_out that a backend may interleave; set before the first piece is packed. */
typedef enum tr_format { TR_W_F32, TR_W_BF16, TR_W_E4M3_B128 } tr_format;
typedef struct tr_linear {
    tr_format format;
    int n_mats, n_out, n_in;
    int gate_up;
    void *data; /* linear_bytes(...) bytes of device memory, owned by the weights */
} tr_linear;

/* A piece of a checkpoint tensor in host memory, as linear_pack wants it: element (o, i) of the matrix to pack is
 * src[o * ld + i], or src[i * ld + o] when transposed (the absorbed W_UK is the transpose of rows of kv_b).
 * scale (TR_W_E4M3_B128): fp32 [.., scale_ld], element (o, i) is multiplied by
 * scale[((row0 + o) / 128) * scale_ld + (col0 + i) / 128] (o and i swapped when transposed: row0 and col0 count in the
 * stored tensor). row0, col0: where the piece begins inside its first scale block, so slices off the grid stay exact.
 * Rows [o_begin, o_begin + n_out) of matrix i_mat are written (gate and up are packed into one matrix by two calls). */
typedef struct tr_linear_src {
    const void *src;
    size_t ld;
    int transposed;
    const float *scale;
    size_t scale_ld;
    int row0, col0;
    int i_mat, o_begin, n_out;
} tr_linear_src;

/* Rows [row, row + n) of a piece, one behind the other, to dst. Called by several threads at once. */
typedef tr_status tr_rows_fn(void *ctx, int row, int n, void *dst);

typedef struct
    tr_push { /* stores go to self and to every peer at the same offset; n_peers 0: self only */
    int n_peers;
    ptrdiff_t peer_offset[TR_MAX_PEERS]; /* peer address - own address, symmetric memory */
    uint32_t *peer_flag
        [TR_MAX_PEERS];    /* raised to *epoch, release.sys, when this launch's rows are out */
    const uint32_t *epoch; /* device word, advanced once per replay: never an immediate */
} tr_push;
typedef struct tr_await { /* n 0: data is here already (MPI, NCCL, one rank) */
    int n;
    const uint32_t *flag[TR_MAX_PEERS], *epoch;
    const volatile uint32_t *abort; /* host-mapped; every device-side wait polls it and leaves */
} tr_await;

typedef struct tr_slots { /* what the device keeps per slot (a slot is one running sequence) */
    int n_slots, max_pages;
    int32_t *length;        /* [n_slots] tokens whose cache rows are written */
    int32_t *last_token;    /* [n_slots] newest sampled token, not yet run through the model */
    int32_t *page_table;    /* [n_slots, max_pages] */
    tr_slot_open *sampling; /* [n_slots] parameters of the open request */
} tr_slots;

typedef struct tr_rows {       /* this rank's rows of a step, made on the device by plan_apply */
    int n_max, n_head_max;     /* capacity */
    int max_context;           /* host bound for launch sizes: the plan's */
    int32_t *n, *n_head;       /* live counts */
    int32_t *token, *slot;     /* [n] */
    int32_t *position;         /* [n]: row i sees keys [0, position[i]] */
    int32_t *begin;            /* [n]: keys [0, begin[i]) were in the cache before this step */
    int64_t *write;            /* [n] cache row page*64+offset, -1: pad row */
    uint8_t *dense;            /* [n] 1: multi-head form, 0: absorbed form with selection */
    int32_t *head_row;         /* [n_head] row index that reaches the head */
    int32_t *target;           /* [n_head] token to score there, -1: sample */
    const int32_t *page_table; /* [n_slots, max_pages], the slots' */
    int max_pages;
} tr_rows;

/* Cache of one layer: pages of TR_PAGE_TOKENS tokens; model.md 5.3-5.5.
 * latent rows, contiguous: TR_E4M3: [d_latent e4m3][ceil(d_latent/128) f32 scales][d_rope bf16] (656 B at 512 + 64);
 * TR_BF16, TR_F32: d_latent + d_rope numbers. Index pages, TR_E4M3 and TR_BF16: [64][d_index] e4m3, then 64 f32 scales
 * (8448 B at 128); TR_F32: [64][d_index] f32. index NULL: the layer has no indexer of its own (IndexCache). */
typedef struct tr_kv_layer {
    void *latent, *index;
    tr_dtype dtype;
    int n_pages, d_latent, d_rope, d_index;
} tr_kv_layer;

/* Bytes of one latent row (of one index page) of these dimensions. Pure. */
size_t tr_kv_row_bytes(tr_dtype dtype, int d_latent, int d_rope);
size_t tr_index_page_bytes(tr_dtype dtype, int d_index);

/* ---- a step's frame ---------------------------------------------------------------------------------------------- */

/* Apply a checked plan, in this order: opens (sampling parameters, length 0), page table changes, then rows: for each
 * span position, token, slot, form and cache row of its rows; slots->length becomes last position + 1. Fills all of
 * *rows but the capacities, max_context and page_table. Copies are pages_copy's. */
struct tr_plan_apply_args {
    const tr_plan *plan; /* device copy of the block */
    tr_slots slots;
    tr_rows rows;
    int n_dense; /* rows of a TR_SPAN_DENSE span at positions below it are dense, its others absorbed: index_topk */
    int rows_only; /* another call of this step has changed the slots already (its spans may be parts of these): fill *rows */
};
/* Half-filled pages of forked sequences: every copy of the plan, for one layer, latents and index keys. */
struct tr_pages_copy_args {
    const tr_plan *plan;
    tr_kv_layer kv;
};
/* out[i] = table[token[i]], for tokens in [first, first + n_table); other tokens give zeros (vocab-parallel ranks). */
struct tr_embed_args {
    const tr_rows *rows;
    const void *table; /* [n_table, d] row-major in `dtype` (TR_BF16, TR_F32) */
    tr_dtype dtype;
    int first, n_table, d;
    float *out; /* [n, d] */
};
/* residual += add (add may be NULL), then out = RMSNorm(residual) * weight, fp32 until it is stored (model.md 3.1). */
struct tr_norm_args {
    const int32_t *n;
    int n_max, d;
    const tr_act *add;
    size_t ld_add;
    float *residual;
    size_t ld_residual;
    const float *weight; /* [d] */
    float eps;
    tr_act *out;
    size_t ld_out;
    /* W8A8 (TR_CAP_W8A8), both or neither: out as e4m3 too, as linear would make it of out (tr_acts.quantised); d a multiple
     * of 128, else they are not written and linear does it. */
    uint8_t *q;
    float *q_scale;
    int scale_pow2;
};
/* out[r] = in[index[i0 + r]], r < *n_out = min(n_rows, *n_index - i0): the rows that reach the head. */
struct tr_rows_gather_args {
    const int32_t *index, *n_index;
    int i0, n_rows, d;
    const tr_act *in;
    tr_act *out;
    int32_t *n_out; /* one word, written: how many rows there are, for the operations behind */
};

/* ---- linear layers ----------------------------------------------------------------------------------------------- */

/* out[r, o] = sum_i in[r, i] w[o, i]; matrix 0 of w. One order along i for every number of rows. */
struct tr_linear_args {
    const int32_t *n;
    int n_max;
    const tr_linear *w;
    tr_acts in;
    void *
        out; /* [n, n_out], row stride ld_out: tr_act, or with out_f32 f32 (router, index head weights, lm_head) */
    size_t ld_out;
    int out_f32;
};
/* out = silu(gate) * up; gate_up [n, 2 d] holds gate in [0, d), up in [d, 2 d) of each row. out [n, d]. */
struct tr_swiglu_args {
    const int32_t *n;
    int n_max, d;
    const tr_act *gate_up;
    tr_act *out;
    /* W8A8 (TR_CAP_W8A8), both or neither: instead of out, its e4m3 form, as linear would make it of out (tr_acts.quantised);
     * d a multiple of 8. What out holds then is undefined. */
    uint8_t *q;
    float *q_scale;
    int scale_pow2;
};

/* ---- attention (model.md 3.2-3.4, 4, 5.3-5.5) --------------------------------------------------------------------- */

/* q [n, n_heads, d_nope + d_rope] from q_b. All rows: rope (interleaved) on the last d_rope, in place. Absorbed rows
 * (dense[i] == 0): q_absorbed[i, h] = [W_UK[h]^T q_nope (d_latent) | q_pe (d_rope)]. */
struct tr_mla_query_args {
    const tr_rows *rows;
    tr_act *q;
    int n_heads, d_nope, d_rope, d_latent;
    const float *rope;       /* [max_position, d_rope/2, 2]: cos, sin */
    const tr_linear *w_uk_t; /* n_heads matrices [d_latent, d_nope] */
    tr_act *q_absorbed;      /* [n, n_heads, d_latent + d_rope]; NULL where all rows are dense */
};
/* Into the cache at rows->write. Latent: RMSNorm of kv_a[:, :d_latent], rope (interleaved) of the rest, stored as the
 * cache's dtype. Index key: LayerNorm (eps 1e-6) with weight and bias, rope (half-split) on the first d_rope, Hadamard,
 * quantise (TR_F32: stored after rope). bf16 roundings of model.md 4 apply except in TR_F32 caches.
 * Either of kv_a and index_k may be NULL: not this call. */
struct tr_kv_write_args {
    const tr_rows *rows;
    const tr_act *kv_a; /* [n, d_latent + d_rope], row stride ld_kv_a */
    size_t ld_kv_a;
    const tr_act *index_k; /* [n, d_index], row stride ld_index_k */
    size_t ld_index_k;
    const float *norm;            /* [d_latent] */
    const float *k_norm, *k_bias; /* [d_index] */
    const float *rope;
    float eps;
    tr_kv_layer kv;
    tr_push push;
};
/* Index queries: q [n, n_heads, d_index] from wq_b: rope (half-split) on the first d_rope, Hadamard, quantise; head
 * weights w [n, n_heads] from weights_proj times n_heads^-0.5 d_index^-0.5 (and the query's scale), in place.
 * out: e4m3 [n, n_heads, d_index], or f32 of the same shape for TR_F32 caches (no Hadamard, not quantised). */
struct tr_index_query_args {
    const tr_rows *rows;
    const tr_act *q;
    float *w;
    int n_heads, d_index, d_rope;
    tr_dtype cache_dtype;
    const float *rope;
    void *out;
};
/* score[r - i_row, s] = sum_h w[r, h] relu(q[r, h] . k[s]) (times the key's scale), for rows r in [i_row, i_row + n_row)
 * and s in [first[r], last[r]) (NULL: the whole context [0, position]). Rows that need no selection (dense, or position
 * < k) are skipped. NaN becomes -inf, -0.0 becomes +0.0. */
struct tr_index_logits_args {
    const tr_rows *rows;
    const void *q; /* as index_query's out */
    const float *w;
    int n_heads, k;
    tr_kv_layer kv;
    const int32_t *first, *last;
    int i_row, n_row;
    float *score; /* [n_row, ld] */
    size_t ld;
    tr_await keys;
};
/* The k best of each row's context: larger score first, equal scores smaller position first. Output per row: positions
 * ascending, -1 padded; cache_row = page*64+offset of each. position < k: identity 0..position. Dense rows: none. */
struct tr_topk_args {
    const tr_rows *rows;
    const float
        *score; /* [n_row, ld], as index_logits left it; may be NULL when no row needs selection */
    size_t ld;
    int k, i_row, n_row;
    int32_t *position;   /* [n, k]; rows i_row.. are written */
    int32_t *cache_row;  /* [n, k] */
    int32_t *n_selected; /* [n] */
};
/* Absorbed rows: softmax over the selected keys in fp32, out[r, h] = sum_s p c[s]. A row with nothing selected is 0. */
struct tr_sparse_mla_args {
    const tr_rows *rows;
    const tr_act *q; /* [n, n_heads, d_latent + d_rope], absorbed */
    int n_heads;
    float scale;
    const int32_t *cache_row; /* [n, k] */
    const int32_t *position;  /* [n, k] of the same keys; NULL: a backend does without */
    int k;
    tr_kv_layer kv;
    tr_await latents;
    tr_act *out; /* [n, n_heads, d_latent] */
    float *lse;  /* [n, n_heads] or NULL */
    void *workspace;
    size_t workspace_bytes;
};
/* Dense rows (dense[i] == 1): multi-head form over keys [0, position], keys in blocks of 64 from position 0 so that
 * chunking cannot show. k_nope = W_UK c, v = W_UV c of the cached (dequantised) latent. */
struct tr_dense_mha_args {
    const tr_rows *rows;
    const tr_act *q; /* [n, n_heads, d_nope + d_rope], rope applied */
    int n_heads, d_nope, d_rope, d_v;
    float scale;
    const tr_linear *w_uk, *w_uv; /* n_heads matrices [d_nope, d_latent], [d_v, d_latent] */
    tr_kv_layer kv;
    tr_await latents;
    tr_act *out;     /* [n, n_heads, d_v] */
    int n_spans,     /* at most, of dense rows: runs of neighbours of a slot */
        max_context, /* keys of one */
        row_step; /* positions between neighbours of a run: members that rows are dealt out to (parallel.md 3.2); 0: 1 */
    int64_t
        n_keys; /* of all dense runs, each rounded up to 128, at most; 0: n_spans times max_context */
    void *workspace;
    size_t
        workspace_bytes; /* dense_mha_workspace(...); less or none: a slower form, with other roundings */
};
/* Absorbed rows: out[r, h] = W_UV[h] u[r, h]; dense rows are left alone. */
struct tr_mla_value_args {
    const tr_rows *rows;
    const tr_act *u; /* [n, n_heads, d_latent] */
    int n_heads, d_latent, d_v;
    const tr_linear *w_uv;
    tr_act *out; /* [n, n_heads, d_v] */
    /* W8A8 (TR_CAP_W8A8), both or neither, where no row is dense: instead of out, its e4m3 form, as linear would make it of out
     * (tr_acts.quantised). What out holds then is undefined. */
    uint8_t *q;
    float *q_scale;
    int scale_pow2;
};

/* ---- mixture of experts (model.md 6) ------------------------------------------------------------------------------ */

/* sigmoid scores, bias for selection only, groups, top-k (ties: smaller index), weights normalised and scaled.
 * Experts in selection order (descending biased score). */
struct tr_router_args {
    const int32_t *n;
    int n_max, n_experts, n_group, topk_group, k, norm_topk;
    const float *logits; /* [n, n_experts] */
    const float *bias;   /* [n_experts] or NULL: group score is the max */
    float scaling;
    int32_t *expert; /* [n, k] */
    float *weight;   /* [n, k] */
};
/* Pairs (row, choice) of the experts [e_first, e_first + n_local), grouped by expert, rows ascending inside:
 * pair[start[e] .. start[e + 1]) = row * k + choice. */
struct tr_moe_pack_args {
    const int32_t *n;
    int n_max, k, e_first, n_local;
    const int32_t *expert; /* [n, k] */
    int32_t *start;        /* [n_local + 1] */
    int32_t *pair;         /* [n * k] */
    uint64_t *
        rows; /* [n_local]: each expert's pairs are added to what stands there; NULL: not counted */
};
/* For every pair: out[pair] = down(silu(gate x) * up x) of its expert, unweighted. gate_up: n_local matrices
 * [2 d_inner, d] (gate rows first), down: [d, d_inner]. Each used expert's weights are read once per step. */
struct tr_moe_args {
    const int32_t *n;
    int n_max, k, n_local;
    const tr_linear *gate_up, *down;
    tr_acts in; /* [n, d] */
    const int32_t *start, *pair;
    tr_act *out; /* [n * k, d] */
    void *workspace;
    size_t workspace_bytes; /* moe_workspace(...) */
};
/* out[r] = shared[r] + sum_j weight[r, j] y[r * k + j] over local experts, fp32, j ascending. */
struct tr_moe_combine_args {
    const int32_t *n;
    int n_max, k, d, e_first, n_local;
    const int32_t *expert;
    const float *weight;
    const tr_act *y;
    const tr_act *shared; /* [n, d] or NULL */
    tr_act *out;          /* [n, d]; may equal shared */
};

/* ---- rows to experts of other ranks and back (parallel.md 2.4, 5.1) ------------------------------------------------- */

/* A dispatched row: its d activations, of act_bytes each (tr_act_bytes), then at tr_dispatch_choices its k choices and their
 * weights; a choice that is not the receiver's is -1. Records are whole lines of 16 bytes. act_bytes TR_CODES: e4m3, as the
 * experts' products want them (TR_CAP_W8A8), half of what bf16 would be; behind them the scales of their blocks of 128, of which
 * a row has whole ones. */
enum { TR_CODES = 1 };
static inline size_t tr_dispatch_choices(int d, size_t act_bytes)
{
    const size_t scales = act_bytes == TR_CODES ? (size_t)d / 128 * 4 : 0;
    return ((size_t)d * act_bytes + 3) / 4 * 4 + scales;
}
static inline size_t tr_dispatch_bytes(int d, int k, size_t act_bytes)
{
    return (tr_dispatch_choices(d, act_bytes) + (size_t)k * 8 + 15) / 16 * 16;
}
/* Records of the rows first, first + step, .. (at most n_rows of them, all below *n), one for every destination that holds one
 * of a row's experts: n_ep of them with n_local experts each, and each of these n_xt times (ranks that share their experts'
 * width). Records lie in the order of destinations (ep * n_xt + xt), rows ascending inside.
 * count [n_ep * n_xt]: records of each destination. origin: the row of every record, in their order. */
struct tr_moe_dispatch_args {
    const int32_t *n;
    int first, step, n_rows, k, d, n_local, n_ep, n_xt;
    const int32_t *expert; /* [n, k] */
    const float *weight;   /* [n, k] */
    const tr_act *x;       /* [n, d] */
    /* Not NULL: codes go in place of x, whose they are; as tr_acts has them. d is a multiple of 128. */
    const uint8_t *q;
    const float *q_scale;
    int ld_scale;
    void *record; /* [n_rows * min(k, n_ep) * n_xt] records */
    int32_t *count, *origin;
};
/* What n_rows records that came say of their choices: expert, weight [n_rows, k]; *n_out = n_rows. Their activations stay where they
 * lie, with the records' distance as row stride. Records of codes: q is not NULL, and gets them, q_scale their scales, as
 * tr_acts has them. */
struct tr_moe_receive_args {
    const void *record;
    int n_rows, k, d;
    int32_t *expert;
    float *weight;
    int32_t *n_out;
    uint8_t *q;
    float *q_scale;
    int ld_scale;
};
/* out[origin[i]] += y[i], i ascending: what the experts made of the rows, in the order in which they were dispatched, with the
 * dispatch's count (of n_members, of the n_rows records in all) and origin. */
struct tr_moe_return_args {
    int n_rows, d, n_members;
    const int32_t *count, *origin;
    const tr_act *y; /* [n_rows, d] */
    tr_act *out;     /* [n, d] */
};
/* Few rows, told to all members instead: records of rows [first, first + n_rows) with all of their choices. Those not below *n
 * choose nothing and are zeros. */
struct tr_moe_offer_args {
    const int32_t *n;
    int first, n_rows, k, d;
    const int32_t *expert; /* [n, k] */
    const float *weight;   /* [n, k] */
    const tr_act *x;       /* [n, d] */
    const uint8_t *q;      /* these three as in tr_moe_dispatch_args */
    const float *q_scale;
    int ld_scale;
    void *record; /* [n_rows] records */
};
/* out[r] += y[0][r] + y[1][r] + .., r < *n, members ascending: what moe_return would make of them. */
struct tr_moe_add_args {
    const int32_t *n;
    int n_max, d, n_members;
    size_t ld;       /* rows from one member's to the next one's */
    const tr_act *y; /* [n_members, ld, d] */
    tr_act *out;     /* [n, d] */
};
/* out[i] = 0, i < *n: [n, d]. */
struct tr_rows_zero_args {
    const int32_t *n;
    int n_max, d;
    tr_act *out;
};

/* ---- head (model.md 8, chat.md 4.2) -------------------------------------------------------------------------------- */

/* One chunk of head rows [i_head, i_head + n_rows): where target is -1, apply the changes and the mask of ids without
 * a token, then temperature, min_p, top_k, top_p (each on what the one before left, renormalised) and draw with Philox
 * keyed by (slot's key, position); greedy is argmax, ties to the smaller id. logits stay as they are.
 * token_out[head row]: the token; -1 where a target was given; -2 where the row's logits hold a NaN or Inf (target
 * rows too), or where changes and mask leave no id. A sampled token also becomes slots.last_token. */
struct tr_sample_args {
    const tr_rows *rows;
    int i_head, n_rows, n_vocab;
    const float *logits; /* [n_rows, ld]: row 0 is head row i_head */
    size_t ld;
    const uint32_t *has_token; /* bit per id, [ceil(n_vocab / 32)] */
    tr_slots slots;
    const tr_plan *plan; /* changes */
    int32_t *token_out;  /* [n_head] */
    void *workspace;
    size_t workspace_bytes; /* sample_workspace(...) */
};
/* Log-softmax of the raw logits, before any change: of the sampled token or the target; its rank (1: best; ties count
 * smaller ids as better); and the n best (descending, ties smaller id). n per row from the slot's sampling parameters
 * (n_logprobs where sampled, n_prompt_logprobs at targets); -1: the row is skipped. */
struct tr_logprobs_args {
    const tr_rows *rows;
    int i_head, n_rows, n_vocab;
    const float *logits;
    size_t ld;
    tr_slots slots;
    const int32_t *token_out;
    float *logprob;     /* [n_head] */
    int32_t *rank;      /* [n_head] */
    int32_t *top_token; /* [n_head, TR_MAX_LOGPROBS], -1 padded */
    float *top_logprob; /* [n_head, TR_MAX_LOGPROBS] */
};

/* ---- the head where the vocabulary is cut over members (parallel.md 2.6) ------------------------------------------- */

enum { TR_PART_BEST = 64 };

/* Greedy rows need 8 bytes: key[r] is this member's best id (changes and mask applied) as a number that is larger for a larger
 * logit, then for a smaller id; 0: it has none that may be drawn; all ones: not finite. The largest of all members' keys tells. */
struct tr_argmax_part_args {
    const tr_rows *rows;
    int i_head, n_rows, first, n_vocab; /* n_vocab: this member's */
    const float *logits;                /* [n_rows, ld]: of this member's ids */
    size_t ld;
    const uint32_t *has_token; /* bit per id, of all ids */
    const tr_plan *plan;
    uint64_t *key; /* [n_rows] */
    void *workspace;
    size_t workspace_bytes; /* sample_workspace(...) */
};
/* token_out as sample gives it for greedy rows, from the largest keys. */
struct tr_argmax_take_args {
    const tr_rows *rows;
    int i_head, n_rows;
    const uint64_t *key; /* [n_rows] */
    tr_slots slots;
    int32_t *token_out; /* [n_head] */
};

/* What one member's ids [first, first + n_vocab) say of a head row to be sampled. */
typedef struct tr_sample_part {
    uint64_t best
        [TR_PART_BEST]; /* its best ids, descending: ordered bits of the changed logit above, ~id below; 0: no more */
    double sum;     /* of exp((logit - best logit) / temperature) over its ids that may be drawn */
    int32_t n;      /* how many these are */
    int32_t finite; /* no NaN, no Inf among its logits */
} tr_sample_part;

/* One chunk of head rows, as in sample: changes and the mask of ids without a token, then the parts. Rows with a target get
 * `finite` alone. */
struct tr_sample_part_args {
    const tr_rows *rows;
    int i_head, n_rows, first, n_vocab; /* n_vocab: this member's */
    const float *logits;                /* [n_rows, ld]: of this member's ids */
    size_t ld;
    const uint32_t *has_token; /* bit per id, of all ids */
    tr_slots slots;
    const tr_plan *plan;
    tr_sample_part *part; /* [n_rows] */
    void *workspace;
    size_t workspace_bytes; /* sample_workspace(...) */
};
/* token_out as sample gives it, from the parts of all members: the same on each. -3: the parts do not tell (a draw beyond the
 * best ids of some member); such a row is to be sampled from its whole logits. */
struct tr_sample_merge_args {
    const tr_rows *rows;
    int i_head, n_rows, n_members;
    const tr_sample_part *part; /* [n_members, n_rows] */
    tr_slots slots;
    int32_t *token_out; /* [n_head] */
};

typedef struct tr_logprob_part {        /* of raw logits */
    float best, token_logit;            /* token_logit: -inf where the token is another member's */
    double sum;                         /* of exp(x - best) */
    int32_t top_token[TR_MAX_LOGPROBS]; /* descending, -1 padded */
    float top_logit[TR_MAX_LOGPROBS];
} tr_logprob_part;

/* Rows that want log-probabilities and have a token or target; others are left alone by all three. */
struct tr_logprob_part_args {
    const tr_rows *rows;
    int i_head, n_rows, first, n_vocab;
    const float *logits;
    size_t ld;
    tr_slots slots;
    const int32_t *token_out;
    tr_logprob_part *part; /* [n_rows] */
};
/* better[r]: this member's ids that come before the row's token. */
struct tr_logprob_rank_args {
    const tr_rows *rows;
    int i_head, n_rows, first, n_vocab, n_members;
    const float *logits;
    size_t ld;
    tr_slots slots;
    const int32_t *token_out;
    const tr_logprob_part *part; /* [n_members, n_rows] */
    int32_t *better;             /* [n_rows] */
};
/* As logprobs gives them. */
struct tr_logprob_merge_args {
    const tr_rows *rows;
    int i_head, n_rows, n_members;
    tr_slots slots;
    const int32_t *token_out;
    const tr_logprob_part *part; /* [n_members, n_rows] */
    const int32_t *better;       /* [n_members, n_rows] */
    float *logprob;              /* [n_head] ... as in logprobs */
    int32_t *rank, *top_token;
    float *top_logprob;
};

/* ---- the table ---------------------------------------------------------------------------------------------------- */

/* The list, once: struct names, table, region names, `bench kernels`, and "every operation has a test" come from it.
 * To come with their features: reduce_norm, await, pages_pack, verify. */
/* clang-format off */
#define TR_OPS(X) \
    X(plan_apply) X(pages_copy) X(embed) X(norm) X(rows_gather) X(linear) X(swiglu) X(mla_query) X(kv_write) \
    X(index_query) X(index_logits) X(topk) X(sparse_mla) X(dense_mha) X(mla_value) X(router) X(moe_pack) X(moe) \
    X(moe_combine) X(moe_dispatch) X(moe_receive) X(moe_return) X(moe_offer) X(moe_add) X(rows_zero) X(sample) X(logprobs) \
    X(argmax_part) X(argmax_take) X(sample_part) X(sample_merge) X(logprob_part) X(logprob_rank) X(logprob_merge)
/* clang-format on */
#define TR_OP(name) tr_status (*name)(tr_device *, tr_lane, const struct tr_##name##_args *);

/* tr_ops.caps. GRAPH: the graph_* entries are there. W8A8: linear and moe quantise their input where the weight is e4m3; linear wants tr_acts.q for it. F32_KV: there
 * are TR_F32 caches. */
/* HOST: the host reads what an operation has written when the operation returns. */
enum { TR_CAP_GRAPH = 1, TR_CAP_PEERS = 2, TR_CAP_W8A8 = 4, TR_CAP_F32_KV = 8, TR_CAP_HOST = 16 };

/* What alloc gives. SYMMETRIC: device memory of blocks of its own, whose address peers may be given (CP caches). HOST: the host's own, where download
 * need not wait. */
typedef enum tr_memory_kind {
    TR_MEMORY_DEVICE,
    TR_MEMORY_SYMMETRIC,
    TR_MEMORY_HOST
} tr_memory_kind;

/* Measured ceilings of a device, for bench: what the time of a kernel is compared with. */
typedef struct tr_ceilings {
    double read_bytes_per_s; /* all threads reading memory that no cache holds */
    double fma_flops_per_s;  /* fp32 multiply-adds on registers, two operations each */
    double
        fp8_flops_per_s; /* e4m3 matrix products of 8192^3 with block scales; 0: there are none. bf16: half of it */
} tr_ceilings;

typedef struct tr_ops {
    const char *name;
    unsigned caps;
    tr_dtype act; /* what tr_act is here: TR_F32, TR_BF16 */
    size_t
        stripe_bytes; /* that the index scores, and the logits, of some rows of a step may take; 0: 64 MiB */
    /* Memory: start-up only; it is zeros. Freed by release or close. */
    tr_status (*alloc)(tr_device *, size_t bytes, int kind, void **);
    void (*release)(tr_device *, void *);
    /* Bytes that alloc can still give; 0: ask the host. */
    uint64_t (*memory_left)(tr_device *);
    /* upload has read src when it returns. download is there when the lane has passed; into memory that is not TR_MEMORY_HOST it
     * may wait for that. */
    tr_status (*upload)(tr_device *, tr_lane, void *dst, const void *src, size_t);
    tr_status (*download)(tr_device *, tr_lane, void *dst, const void *src, size_t);
    /* Order: fork and join of lanes; a ticket marks a point of a lane, done polls it and never blocks. done < 0: the device has
     * failed (error says why), nothing behind the ticket can be trusted, and every later operation fails. */
    tr_status (*order)(tr_device *, tr_lane before, tr_lane after);
    uint64_t (*ticket)(tr_device *, tr_lane);
    int (*done)(tr_device *, tr_lane, uint64_t ticket);
    /* Between begin and end what goes to the lane is recorded instead of run: same pointers and launch sizes, while counts are
     * read when it runs. end: out NULL throws the record away; a failure leaves no record. */
    tr_status (*graph_begin)(tr_device *, tr_lane);
    tr_status (*graph_end)(tr_device *, tr_lane, tr_graph **out);
    tr_status (*graph_run)(tr_device *, tr_lane, tr_graph *);
    void (*graph_free)(tr_device *, tr_graph *);
    /* Stamps: moments at which a lane has come so far, taken anew whenever asked for; between begin and end of a record it is the
     * record that takes them, with every run. between: *ns from one to another of the same set, when a ticket behind both has
     * passed. None of them waits, and a failure is no failure of the device. NULL: the host's clock is the device's. */
    tr_status (*stamps_create)(tr_device *, int n, tr_stamps **out);
    void (*stamps_free)(tr_device *, tr_stamps *);
    tr_status (*stamp)(tr_device *, tr_lane, tr_stamps *, int i);
    tr_status (*stamps_between)(tr_device *, const tr_stamps *, int from, int to, uint64_t *ns);
    /* The text of the last failure of this device, one line. */
    const char *(*error)(const tr_device *);
    void (*close)(tr_device *);
    /* Weights, at load. linear_bytes is pure: `plan` uses it without a device. */
    size_t (*linear_bytes)(tr_format, int n_mats, int n_out, int n_in);
    tr_status (*linear_pack)(tr_device *, tr_linear *dst, const tr_linear_src *src);
    /* The same by the device's threads, which read the rows themselves, a few at a time, each those that it will use; NULL
     * where a backend wants whole pieces. linear_fill: pieces that are not transposed, their rows ld numbers long; src[i].src
     * is not used, rows of piece i are asked for with ctx[i]; all pieces at once keep all threads at work. table_fill: rows
     * of row_bytes, as they are. Both return what `rows` failed with. */
    tr_status (*linear_fill)(tr_device *, tr_linear *dst, const tr_linear_src *src, int n_src,
                             tr_rows_fn *rows, void *const *ctx);
    tr_status (*table_fill)(tr_device *, void *dst, size_t row_bytes, int n_rows, tr_rows_fn *rows,
                            void *ctx);
    /* Dummy weights made where they are to be, NULL where a backend has them from the host: a piece that is not transposed, of numbers
     * that are a function of their place (src->src and ld are not used); rows of a table, number_bytes each. */
    tr_status (*linear_made)(tr_device *, tr_linear *dst, const tr_linear_src *src,
                             const tr_made *made);
    tr_status (*table_made)(tr_device *, void *dst, int number_bytes, int n_rows, int n_in,
                            const tr_made *made);
    /* Whether linear of this packed weight reads its input's e4m3 form (tr_acts.q) and nothing else; NULL: of none. */
    int (*linear_codes)(const tr_device *, const tr_linear *);
    /* What moe, sparse_mla and sample need for up to that many rows; pure. */
    size_t (*moe_workspace)(int n_max, int k, int d, int d_inner);
    size_t (*sparse_mla_workspace)(int n_max, int n_heads, int d_latent);
    size_t (*sample_workspace)(int n_rows, int n_vocab);
    /* Of dense_mha, for rows that see up to max_context keys; NULL: it needs none. */
    size_t (*dense_mha_workspace)(int n_max, int n_heads, int max_context);
    /* Measure: a second or two; synchronises. */
    tr_status (*ceilings)(tr_device *, tr_ceilings *);
    TR_OPS(TR_OP) /* the network */
} tr_ops;

static inline size_t tr_act_bytes(const tr_ops *ops)
{
    return ops->act == TR_BF16 ? 2 : 4;
}
/* The same in a record of d numbers to experts whose weights are e4m3: the norm has left codes (tr_norm_args). */
static inline size_t tr_record_act(const tr_ops *ops, int d)
{
    return (ops->caps & TR_CAP_W8A8) && d % 128 == 0 ? TR_CODES : tr_act_bytes(ops);
}

/* Open a backend by name: "cpu", "cuda", or "auto": cuda where a GPU and its driver can be used and isa is NULL, else cpu.
 * *ops is static. The device is closed by ops->close. i_device: which GPU of those this process may see, modulo their number;
 * with n_device_ranks of more than one i_device is this rank's place among so many of its host, and each gets a GPU of its own
 * (tr_device_choose) or TR_E_USAGE.
 * n_threads 0: tr_device_threads(). isa NULL: the best this CPU has; "plain", "avx2", "avx512", "amx": that one (tests,
 * bench), TR_E_USAGE where the CPU or the build lacks it. */
typedef struct tr_device_options {
    const char *name;
    int n_threads;
    const char *isa;
    int i_device, n_device_ranks;
    int bind; /* a GPU's: this thread, and those it starts later, go to the CPUs next to it */
} tr_device_options;
tr_status tr_device_open(tr_device **out, const tr_ops **ops, const tr_device_options *options,
                         tr_err *err);

/* Which of n_devices rank i of n_ranks of a host takes: where it sees one, its launcher has chosen; of enough, the i-th; else
 * -1. Pure. */
int tr_device_choose(int n_devices, int i, int n_ranks);

/* What rank i of n_ranks of this host would open as "cuda", without opening anything: no GPU is given a context. */
typedef struct tr_gpu_seen {
    int n;          /* GPUs that this process sees; 0: none, no driver, or a build without CUDA */
    char uuid[48];  /* of the one it would take; "": there is none for it */
    char unfit[96]; /* why it is of no use here, or why a driver shows none; "": it is */
} tr_gpu_seen;
void tr_device_look(tr_gpu_seen *seen, int i, int n_ranks);

/* "GPU-0123abcd-...": the same on every rank that opens the same GPU; "" of a CPU. */
const char *tr_device_uuid(const tr_device *device);

/* Where a GPU is: "0000:1b:00.0", "" of a CPU; and the NUMA node next to it, -1 where that is not known. *cpus: what this thread
 * was bound to when it was opened, "0-15,32"; "": nothing. */
const char *tr_device_pci(const tr_device *device);
int tr_device_numa(const tr_device *device, const char **cpus);

/* Threads of a CPU device that is not told how many: OMP_NUM_THREADS, else as many as this process has CPUs in its mask. */
int tr_device_threads(void);

/* What the device is, for the start table: "cpu, 2 threads, avx512", "cuda, NVIDIA H200, 132 SMs, 139 GiB". */
const char *tr_device_describe(const tr_device *device);

/* Before anything is loaded: the CPU device's threads each go to a core of their own, inside the mask that the process
 * was started with. n_share processes of this host have the same mask and take a share each, this one share i_share.
 * *bound 0: the smallest share has fewer CPUs than threads, so all processes' threads stay where the system puts them. */
tr_status tr_device_bind(tr_device *device, int i_share, int n_share, int *bound, tr_err *err);

/* Where the CPU device's threads are bound, as a list of the system's numbers: "0-15,32"; "" where they are not. */
const char *tr_device_places(const tr_device *device);

#endif
