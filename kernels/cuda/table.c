/* The table of operations: arguments are checked, the form that fits the shapes is chosen, the
 * launch's answer becomes a status. */
#include <config.h>

#include "kernels/cuda/cuda_priv.h"
#include "kernels/cuda/gemm_bf16.h"
#include "kernels/cuda/index_logits.h"
#include "kernels/cuda/kv_write.h"
#include "kernels/cuda/moe_fp8.h"
#include "kernels/cuda/quantise.h"
#include "kernels/cuda/sparse_mla.h"
#include "kernels/cuda/topk.h"
#include "kernels/limits.h"

/* ---- what several check -------------------------------------------------------------------------------------------- */

static tr_status check_kv(tr_device *d, const char *op, const tr_kv_layer *kv)
{
    if (kv->dtype != TR_E4M3 && kv->dtype != TR_BF16)
        return tr_device_fail(d, TR_E_USAGE,
                              "%s: caches on a GPU are e4m3 or bf16; f32 is the CPU's alone", op);
    if (kv->latent &&
        (kv->d_latent < 1 || kv->d_latent % TR_LATENT_STEP || kv->d_rope < 0 || kv->d_rope % 2))
        return tr_device_fail(
            d, TR_E_USAGE,
            "%s: latents of %d and rope of %d: multiples of 4 and 2 are what this backend can do",
            op, kv->d_latent, kv->d_rope);
    if (kv->index && (kv->d_index < 1 || (kv->d_index & (kv->d_index - 1))))
        return tr_device_fail(d, TR_E_USAGE,
                              "%s: index keys of %d: powers of two are what this backend can do",
                              op, kv->d_index);
    return TR_OK;
}

/* The note of a weight that has been packed. */
static tr_status find_note(tr_device *d, const char *op, const tr_linear *w,
                           const tr_weight_note **out)
{
    *out = tr_cuda_note_find(d, w->data);
    if (*out) return TR_OK;
    return tr_device_fail(d, TR_E_USAGE, "%s: a weight that was never packed", op);
}

static const tr_kv_layer no_cache = {.dtype = TR_E4M3};

/* ---- one launch each ----------------------------------------------------------------------------------------------- */

/* The fast form, or where it cannot do these widths the one that can; which one it is does not depend on the rows. */
static cudaError_t launch_sparse_mla(const struct tr_sparse_mla_args *a, cudaStream_t stream)
{
    const cudaError_t e = tr_cuda_sparse_mla(a, stream);
    return e == cudaErrorNotSupported ? tr_cuda_sparse_mla_any(a, stream) : e;
}

static cudaError_t launch_index_query(const struct tr_index_query_args *a, cudaStream_t stream)
{
    const cudaError_t e = tr_cuda_index_query(a, stream);
    return e == cudaErrorNotSupported ? tr_cuda_index_query_any(a, stream) : e;
}

static cudaError_t launch_kv_write(const struct tr_kv_write_args *a, cudaStream_t stream)
{
    const cudaError_t e = tr_cuda_kv_write(a, stream);
    return e == cudaErrorNotSupported ? tr_cuda_kv_write_any(a, stream) : e;
}

/* kv: what the arguments say of a cache. */
#define OPERATION(name, kv_of) LAUNCH(name, kv_of, tr_cuda_##name)
#define LAUNCH(name, kv_of, launch)                                                                \
    static tr_status op_##name(tr_device *d, tr_lane lane, const struct tr_##name##_args *a)       \
    {                                                                                              \
        const tr_kv_layer kv = kv_of;                                                              \
        tr_status st = tr_cuda_begin(d);                                                           \
        if (st == TR_OK) st = check_kv(d, #name, &kv);                                             \
        return st == TR_OK ? tr_cuda_status(d, #name, launch(a, d->stream[lane])) : st;            \
    }
#define INDEX_OUT                                                                                  \
    (tr_kv_layer)                                                                                  \
    {                                                                                              \
        .dtype = a->cache_dtype, .index = a->out, .d_index = a->d_index                            \
    }

OPERATION(embed, no_cache)
OPERATION(norm, no_cache)
OPERATION(rows_gather, no_cache)
OPERATION(swiglu, no_cache)
LAUNCH(kv_write, a->kv, launch_kv_write)
LAUNCH(index_query, INDEX_OUT, launch_index_query)
OPERATION(index_logits, a->kv)
OPERATION(topk, no_cache)
LAUNCH(sparse_mla, a->kv, launch_sparse_mla)
OPERATION(router, no_cache)
OPERATION(moe_pack, no_cache)
OPERATION(moe_combine, no_cache)
OPERATION(moe_dispatch, no_cache)
OPERATION(moe_receive, no_cache)
OPERATION(moe_return, no_cache)
OPERATION(moe_offer, no_cache)
OPERATION(moe_add, no_cache)
OPERATION(rows_zero, no_cache)
OPERATION(sample, no_cache)
OPERATION(logprobs, no_cache)
OPERATION(argmax_part, no_cache)
OPERATION(argmax_take, no_cache)
OPERATION(sample_part, no_cache)
OPERATION(sample_merge, no_cache)
OPERATION(logprob_part, no_cache)
OPERATION(logprob_rank, no_cache)
OPERATION(logprob_merge, no_cache)

/* ---- those that need more ------------------------------------------------------------------------------------------ */

static tr_status op_plan_apply(tr_device *d, tr_lane lane, const struct tr_plan_apply_args *a)
{
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK) return st;
    return tr_cuda_status(d, "plan_apply", tr_cuda_plan_apply(a, d->fault_d, d->stream[lane]));
}

static tr_status op_pages_copy(tr_device *d, tr_lane lane, const struct tr_pages_copy_args *a)
{
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = check_kv(d, "pages_copy", &a->kv);
    if (st != TR_OK) return st;
    return tr_cuda_status(d, "pages_copy", tr_cuda_pages_copy(a, d->fault_d, d->stream[lane]));
}

/* On the FP8 matrix instructions: weights on their grid, inputs of their width. */
static cudaError_t linear_fp8(tr_device *d, const struct tr_linear_args *a, cudaStream_t stream)
{
    const tr_fp8_weight w = tr_cuda_fp8_weight(a->w);
    const tr_fp8_rows x = {
        .q_d = a->in.q, .scale_d = a->in.q_scale, .n_d = a->n, .n_max = a->n_max};
    cudaError_t e = cudaSuccess;
    if (!a->in.quantised)
        e = tr_quantise_rows(a->in.x, a->in.ld, a->n, a->n_max, a->in.d, a->in.scale_pow2, a->in.q,
                             a->in.q_scale, stream);
    return e == cudaSuccess
               ? tr_gemm_fp8_dense(&d->gemm, &w, &x, a->out, a->ld_out, a->out_f32, stream)
               : e;
}

static cudaError_t linear_bf16(const struct tr_linear_args *a, cudaStream_t stream)
{
    tr_weight_layout l;
    tr_weight_layout_of(&l, a->w->format, a->w->n_mats, a->w->n_out, a->w->n_in);
    const tr_bf16_product p = {.x_d = a->in.x,
                               .w_d = (const char *)a->w->data + l.numbers,
                               .ld_x = a->in.ld,
                               .out_d = a->out,
                               .ld_out = a->ld_out,
                               .out_f32 = a->out_f32,
                               .n_d = a->n,
                               .n_max = a->n_max,
                               .n_out = a->w->n_out,
                               .n_in = a->w->n_in};
    return tr_gemm_bf16(&p, stream);
}

/* Which form depends on the weight and the rows' stride alone, never on how many rows there are. */
static cudaError_t launch_linear(tr_device *d, const tr_weight_note *note,
                                 const struct tr_linear_args *a, cudaStream_t stream)
{
    if (a->w->format == TR_W_E4M3_B128 && note->on_grid && a->in.ld % 8 == 0 && a->in.q)
        return linear_fp8(d, a, stream);
    if (a->w->format == TR_W_BF16 && tr_gemm_bf16_fits(a->w->n_in, a->in.ld))
        return linear_bf16(a, stream);
    return tr_cuda_linear(a, note->k_shift, stream);
}

/* As launch_linear chooses, of rows without gaps. */
static int linear_codes(const tr_device *d, const tr_linear *w)
{
    const tr_weight_note *note = tr_cuda_note_find(d, w->data);
    return w->format == TR_W_E4M3_B128 && note && note->on_grid;
}

static tr_status op_linear(tr_device *d, tr_lane lane, const struct tr_linear_args *a)
{
    const tr_weight_note *note;
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = find_note(d, "linear", a->w, &note);
    if (st != TR_OK) return st;
    if (a->in.d != a->w->n_in)
        return tr_device_fail(d, TR_E_USAGE, "linear: %d inputs for a weight of %d columns",
                              a->in.d, a->w->n_in);
    return tr_cuda_status(d, "linear", launch_linear(d, note, a, d->stream[lane]));
}

static tr_status op_moe(tr_device *d, tr_lane lane, const struct tr_moe_args *a)
{
    const tr_weight_note *gate_up, *down;
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = find_note(d, "moe", a->gate_up, &gate_up);
    if (st == TR_OK) st = find_note(d, "moe", a->down, &down);
    if (st != TR_OK) return st;
    if (a->gate_up->n_out != 2 * a->down->n_in || a->gate_up->n_in != a->in.d)
        return tr_device_fail(
            d, TR_E_USAGE, "moe: gate_up [%d, %d] and down [%d, %d] for %d inputs",
            a->gate_up->n_out, a->gate_up->n_in, a->down->n_out, a->down->n_in, a->in.d);
    if (gate_up->k_mixed || down->k_mixed) /* one run of codes serves all experts */
        return tr_device_fail(d, TR_E_USAGE,
                              "moe: experts begin at different columns of a scale block");
    if (!gate_up->interleaved)
        return tr_cuda_status(d, "moe",
                              tr_cuda_moe(a, gate_up->k_shift, down->k_shift, d->stream[lane]));
    if (!down->on_grid || a->in.ld % 8)
        return tr_device_fail(d, TR_E_USAGE, "moe: down off the scale grid that gate_up is on");
    const tr_fp8_weight first = tr_cuda_fp8_weight(a->gate_up),
                        second = tr_cuda_fp8_weight(a->down);
    return tr_cuda_status(d, "moe", tr_cuda_moe_fp8(&d->gemm, a, &first, &second, d->stream[lane]));
}

static size_t moe_workspace(int n_max, int k, int d, int d_inner)
{
    const size_t any = tr_cuda_moe_workspace(n_max, k, d, d_inner),
                 fp8 = tr_cuda_moe_fp8_workspace(n_max, k, d, d_inner);
    return any > fp8 ? any : fp8;
}

static int on_grid(const tr_linear *w, const tr_weight_note *note)
{
    return w->format != TR_W_E4M3_B128 || note->on_grid;
}

static tr_status op_mla_query(tr_device *d, tr_lane lane, const struct tr_mla_query_args *a)
{
    const tr_weight_note *note;
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = find_note(d, "mla_query", a->w_uk_t, &note);
    return st == TR_OK
               ? tr_cuda_status(d, "mla_query",
                                tr_cuda_mla_query(a, on_grid(a->w_uk_t, note), d->stream[lane]))
               : st;
}

static tr_status op_mla_value(tr_device *d, tr_lane lane, const struct tr_mla_value_args *a)
{
    const tr_weight_note *note;
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = find_note(d, "mla_value", a->w_uv, &note);
    return st == TR_OK
               ? tr_cuda_status(d, "mla_value",
                                tr_cuda_mla_value(a, on_grid(a->w_uv, note), d->stream[lane]))
               : st;
}

static tr_status op_dense_mha(tr_device *d, tr_lane lane, const struct tr_dense_mha_args *a)
{
    const tr_weight_note *uk, *uv;
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = check_kv(d, "dense_mha", &a->kv);
    if (st == TR_OK) st = find_note(d, "dense_mha", a->w_uk, &uk);
    if (st == TR_OK) st = find_note(d, "dense_mha", a->w_uv, &uv);
    if (st != TR_OK) return st;
    cudaError_t e = cudaErrorNotSupported;
    if (on_grid(a->w_uk, uk) && on_grid(a->w_uv, uv))
        e = tr_cuda_dense_mha_real(a, d->stream[lane]);
    if (e == cudaErrorNotSupported) e = tr_cuda_dense_mha(a, d->stream[lane]);
    return tr_cuda_status(d, "dense_mha", e);
}

static tr_status op_ceilings(tr_device *d, tr_ceilings *out)
{
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK) return st;
    return tr_cuda_status(d, "ceilings",
                          tr_cuda_ceilings(&d->gemm, &out->read_bytes_per_s, &out->fma_flops_per_s,
                                           &out->fp8_flops_per_s, d->stream[TR_LANE_MAIN]));
}

#define ENTRY(name) .name = op_##name,
const tr_ops tr_cuda_ops = {
    .name = "cuda",
    .caps = TR_CAP_W8A8 | TR_CAP_GRAPH,
    .act = TR_BF16,
    .stripe_bytes = (size_t)512 << 20,
    .alloc = tr_cuda_alloc,
    .release = tr_cuda_release,
    .memory_left = tr_cuda_memory_left,
    .upload = tr_cuda_upload,
    .download = tr_cuda_download,
    .order = tr_cuda_order,
    .ticket = tr_cuda_ticket,
    .done = tr_cuda_done,
    .graph_begin = tr_cuda_graph_begin,
    .graph_end = tr_cuda_graph_end,
    .graph_run = tr_cuda_graph_run,
    .graph_free = tr_cuda_graph_free,
    .stamps_create = tr_cuda_stamps_create,
    .stamps_free = tr_cuda_stamps_free,
    .stamp = tr_cuda_stamp,
    .stamps_between = tr_cuda_stamps_between,
    .error = tr_device_error,
    .close = tr_cuda_close,
    .linear_bytes = tr_cuda_linear_bytes,
    .linear_pack = tr_cuda_linear_pack,
    .linear_made = tr_cuda_linear_made,
    .table_made = tr_cuda_table_made,
    .linear_codes = linear_codes,
    .moe_workspace = moe_workspace,
    .sparse_mla_workspace = tr_cuda_sparse_mla_workspace,
    .sample_workspace = tr_cuda_sample_workspace,
    .dense_mha_workspace = tr_cuda_dense_mha_workspace,
    .ceilings = op_ceilings,
    /* clang-format off */
    TR_OPS(ENTRY)
    /* clang-format on */
};
