/* The model of one rank, and the forward pass of a step around its layers (layer.c). */
#include <config.h>

#include "model/model.h"

#include <stdlib.h>
#include <string.h>

#include "model/model_priv.h"

/* A step's own memory: plan and rows on the device, outputs on device and host. */
struct tr_step_memory {
    void *plan; /* device copy of the block */
    tr_rows rows;
    int32_t *token, *rank, *top_token; /* device: [n_head_max] (x TR_MAX_LOGPROBS) */
    float *logprob, *top_logprob;
    void *owned[24];
    int n_owned;
};

/* ---- running operations ------------------------------------------------------------------------------------------- */

tr_status tr_model_ran(tr_model *m, const char *op, tr_status st, tr_err *err)
{
    tr_region_end(m->regions, m->note_bytes, m->note_flops);
    m->note_bytes = m->note_flops = 0;
    tr_comm_progress(m->groups.stage);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "%s: %s", op, m->ops->error(m->device));
}

tr_status tr_model_linear(tr_model *m, const tr_pass *p, const tr_linear *w, const float *in,
                          float *out, tr_err *err)
{
    m->note_bytes = (double)m->ops->linear_bytes(w->format, w->n_mats, w->n_out, w->n_in);
    m->note_flops = 2.0 * p->n * w->n_out * w->n_in;
    return TR_RUN(
        m, linear, err, .n = p->rows.n, .n_max = m->max_rows, .w = w,
        .in = {.x = (void *)in, .ld = (size_t)w->n_in, .n_max = m->max_rows, .d = w->n_in},
        .out = out, .ld_out = (size_t)w->n_out, .out_f32 = 1);
}

tr_status tr_model_reduce(tr_model *m, const tr_pass *p, tr_comm *group, float *x, tr_err *err)
{
    const size_t n = (size_t)p->n * (size_t)m->config->hidden_size;
    tr_ticket ticket;
    tr_region_begin(m->regions, m->region_comm);
    tr_status st = tr_comm_all_reduce(group, x, n, TR_F32, &ticket, err);
    if (st == TR_OK) st = tr_comm_wait(group, TR_LANE_MAIN, ticket, err);
    tr_region_end(m->regions, (double)n * 4, 0);
    return st;
}

void tr_model_show(tr_model *m, const char *name, int layer, int i_row, int n_rows, int n_cols,
                   size_t ld, void *data)
{
    if (m->probe) m->probe->see(m->probe->ctx, name, layer, i_row, n_rows, n_cols, ld, data);
}

/* ---- creation ------------------------------------------------------------------------------------------------------ */

static const char *const op_names[] = {
#define TR_OP_NAME(name) #name,
    TR_OPS(TR_OP_NAME)
#undef TR_OP_NAME
};

static void name_regions(tr_model *m)
{
    for (int i = 0; i < TR_N_OPS; i++)
        m->region_op[i] = tr_region_id(m->regions, op_names[i]);
    m->region_step = tr_region_id(m->regions, "step");
    m->region_attention = tr_region_id(m->regions, "attention");
    m->region_dense = tr_region_id(m->regions, "dense");
    m->region_moe = tr_region_id(m->regions, "experts");
    m->region_head = tr_region_id(m->regions, "head");
    m->region_comm = tr_region_id(m->regions, "all_reduce");
}

tr_status tr_model_create(tr_model **out, const tr_config *config, const tr_weights *weights,
                          tr_device *device, const tr_ops *ops, const tr_groups *groups,
                          const tr_model_options *options, const uint32_t *has_token,
                          tr_regions *regions, tr_err *err)
{
    tr_status st = TR_OK;

    *out = NULL;
    tr_model *m = calloc(1, sizeof *m);
    if (!m) return tr_fail(err, TR_E_MEMORY, "out of memory");
    m->config = config;
    m->weights = weights;
    m->device = device;
    m->ops = ops;
    m->groups = *groups;
    m->regions = regions;
    m->max_rows = options->max_rows;
    m->max_model_len = options->max_model_len;
    m->heads = weights->slice.heads.n;
    m->attention_scale = (float)tr_config_attention_scale(config);
    name_regions(m);

    st = tr_model_allocate(m, options, has_token, err);
    if (st != TR_OK) goto done;
    st = tr_share_open(&m->share_key, groups->attn_cp,
                       tr_index_page_bytes(options->kv_dtype, config->index_head_dim) /
                           TR_PAGE_TOKENS,
                       options->max_rows, err);
    if (st == TR_OK)
        st = tr_share_open(
            &m->share_latent, groups->attn_cp,
            tr_kv_row_bytes(options->kv_dtype, config->kv_lora_rank, config->qk_rope_head_dim),
            options->max_rows, err);
    if (st != TR_OK) goto done;
    *out = m;
    m = NULL;

done:
    tr_model_free(m);
    return st;
}

void tr_model_free(tr_model *model)
{
    if (!model) return;
    tr_share_close(model->share_key);
    tr_share_close(model->share_latent);
    tr_cache_free(model->cache);
    tr_model_release(model);
    free(model);
}

void tr_model_set_probe(tr_model *model, const tr_probe *probe)
{
    model->probe = probe;
}

tr_plan_limits tr_model_limits(const tr_model *model)
{
    return (tr_plan_limits){.n_slots = model->slots.n_slots,
                            .n_pages = tr_cache_pages(model->cache),
                            .max_pages = model->slots.max_pages,
                            .n_rows_max = model->max_rows,
                            .n_head_max = model->max_rows,
                            .n_vocab = model->config->vocab_size,
                            .index_topk = model->config->index_topk};
}

size_t tr_model_cache_bytes(const tr_model *model)
{
    const tr_kv_layer kv = tr_cache_layer(model->cache, 0);
    return tr_cache_page_bytes(model->config, model->weights->slice.layers.n, kv.dtype) *
           (size_t)kv.n_pages;
}

size_t tr_model_workspace_bytes(const tr_model *model)
{
    return model->owned_bytes;
}

/* ---- steps --------------------------------------------------------------------------------------------------------- */

static tr_status step_take(struct tr_step_memory *s, tr_model *m, size_t bytes, void *out,
                           tr_err *err)
{
    void *p = NULL;
    tr_status st = m->ops->alloc(m->device, bytes, 0, &p);
    if (st != TR_OK) return tr_fail(err, st, "step buffers: %s", m->ops->error(m->device));
    s->owned[s->n_owned++] = p;
    *(void **)out = p;
    return TR_OK;
}

tr_status tr_step_create(tr_step *step, tr_model *model, tr_err *err)
{
    const tr_plan_limits limits = tr_model_limits(model);
    const size_t n = (size_t)limits.n_rows_max, n_head = (size_t)limits.n_head_max,
                 top = n_head * TR_MAX_LOGPROBS;
    tr_status st = TR_OK;

    memset(step, 0, sizeof *step);
    struct tr_step_memory *s = calloc(1, sizeof *s);
    if (!s) return tr_fail(err, TR_E_MEMORY, "out of memory");
    step->memory = s;
    const struct {
        void *out;
        size_t bytes;
    } wanted[] = {
        {&s->plan, tr_plan_bytes_max(&limits)},
        {&s->rows.n, sizeof(int32_t)},
        {&s->rows.n_head, sizeof(int32_t)},
        {&s->rows.token, n * sizeof(int32_t)},
        {&s->rows.slot, n * sizeof(int32_t)},
        {&s->rows.position, n * sizeof(int32_t)},
        {&s->rows.write, n * sizeof(int64_t)},
        {&s->rows.dense, n},
        {&s->rows.head_row, n_head * sizeof(int32_t)},
        {&s->rows.target, n_head * sizeof(int32_t)},
        {&s->token, n_head * sizeof(int32_t)},
        {&s->rank, n_head * sizeof(int32_t)},
        {&s->logprob, n_head * sizeof(float)},
        {&s->top_token, top * sizeof(int32_t)},
        {&s->top_logprob, top * sizeof(float)},
        {&step->out.token, n_head * sizeof(int32_t)},
        {&step->out.rank, n_head * sizeof(int32_t)},
        {&step->out.logprob, n_head * sizeof(float)},
        {&step->out.top_token, top * sizeof(int32_t)},
        {&step->out.top_logprob, top * sizeof(float)},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted && st == TR_OK; i++)
        st = step_take(s, model, wanted[i].bytes, wanted[i].out, err);
    s->rows.n_max = limits.n_rows_max;
    s->rows.n_head_max = limits.n_head_max;
    s->rows.page_table = model->slots.page_table;
    s->rows.max_pages = model->slots.max_pages;
    if (st != TR_OK) tr_step_free(step, model);
    return st;
}

void tr_step_free(tr_step *step, tr_model *model)
{
    if (!step->memory) return;
    for (int i = 0; i < step->memory->n_owned; i++)
        model->ops->release(model->device, step->memory->owned[i]);
    free(step->memory);
    memset(step, 0, sizeof *step);
}

/* Plan to the device, rows from it, half-filled pages of forks copied in every layer. */
static tr_status make_rows(tr_model *m, tr_step *step, tr_pass *p, tr_err *err)
{
    struct tr_step_memory *s = step->memory;
    tr_status st = m->ops->upload(m->device, TR_LANE_MAIN, s->plan, step->plan, step->plan->bytes);
    if (st != TR_OK) return tr_fail(err, st, "plan upload: %s", m->ops->error(m->device));
    s->rows.max_context = step->plan->max_context;
    *p = (tr_pass){.plan = step->plan, .rows = s->rows, .n = step->plan->n_rows};
    st = TR_RUN(m, plan_apply, err, .plan = s->plan, .slots = m->slots, .rows = s->rows);
    for (int i = 0; i < m->weights->slice.layers.n && step->plan->n_copies > 0 && st == TR_OK; i++)
        st = TR_RUN(m, pages_copy, err, .plan = s->plan, .kv = tr_cache_layer(m->cache, i));
    return st;
}

/* logits of the rows that asked for them, in chunks; a token or a score of each. ws.normed holds RMSNorm(h; norm). */
static tr_status head(tr_model *m, const tr_pass *p, const tr_step *step, tr_err *err)
{
    struct tr_step_memory *s = step->memory;
    const int d = m->config->hidden_size, vocab = m->config->vocab_size,
              n_head = p->plan->n_head_rows;
    tr_status st = TR_OK;

    for (int i = 0; i < n_head && st == TR_OK; i += m->n_head_chunk) {
        const int n = n_head - i < m->n_head_chunk ? n_head - i : m->n_head_chunk;
        st = TR_RUN(m, rows_gather, err, .index = p->rows.head_row, .n_index = p->rows.n_head,
                    .i0 = i, .n_rows = n, .d = d, .in = m->ws.normed, .out = m->ws.head_in,
                    .n_out = m->ws.n_head);
        m->note_bytes = (double)m->ops->linear_bytes(m->weights->head.format, 1, vocab, d);
        m->note_flops = 2.0 * n * vocab * d;
        if (st == TR_OK)
            st = TR_RUN(
                m, linear, err, .n = m->ws.n_head, .n_max = m->n_head_chunk, .w = &m->weights->head,
                .in = {.x = m->ws.head_in, .ld = (size_t)d, .n_max = m->n_head_chunk, .d = d},
                .out = m->ws.logits, .ld_out = (size_t)vocab, .out_f32 = 1);
        if (st != TR_OK) return st;
        tr_model_show(m, "logits", -1, i, n, vocab, (size_t)vocab, m->ws.logits);
        st = TR_RUN(m, sample, err, .rows = &p->rows, .i_head = i, .n_rows = n, .n_vocab = vocab,
                    .logits = m->ws.logits, .ld = (size_t)vocab, .has_token = m->has_token,
                    .slots = m->slots, .plan = s->plan, .token_out = s->token,
                    .workspace = m->ws.scratch, .workspace_bytes = m->ws.scratch_bytes);
        if (st == TR_OK)
            st = TR_RUN(m, logprobs, err, .rows = &p->rows, .i_head = i, .n_rows = n,
                        .n_vocab = vocab, .logits = m->ws.logits, .ld = (size_t)vocab,
                        .slots = m->slots, .token_out = s->token, .logprob = s->logprob,
                        .rank = s->rank, .top_token = s->top_token, .top_logprob = s->top_logprob);
    }
    return st;
}

/* Outputs of the head to the host. */
static tr_status fetch(tr_model *m, tr_step *step, tr_err *err)
{
    struct tr_step_memory *s = step->memory;
    const size_t n = (size_t)step->plan->n_head_rows * 4, top = n * TR_MAX_LOGPROBS;
    step->out.n_head = step->plan->n_head_rows;
    tr_status st = m->ops->download(m->device, TR_LANE_MAIN, step->out.token, s->token, n);
    if (st == TR_OK)
        st = m->ops->download(m->device, TR_LANE_MAIN, step->out.logprob, s->logprob, n);
    if (st == TR_OK) st = m->ops->download(m->device, TR_LANE_MAIN, step->out.rank, s->rank, n);
    if (st == TR_OK)
        st = m->ops->download(m->device, TR_LANE_MAIN, step->out.top_token, s->top_token, top);
    if (st == TR_OK)
        st = m->ops->download(m->device, TR_LANE_MAIN, step->out.top_logprob, s->top_logprob, top);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "outputs: %s", m->ops->error(m->device));
}

/* embed, layers, final norm, head. */
static tr_status network(tr_model *m, const tr_pass *p, tr_step *step, tr_err *err)
{
    const tr_config *c = m->config;
    const tr_slice *slice = &m->weights->slice;
    const int d = c->hidden_size, last = slice->layers.begin + slice->layers.n - 1;
    tr_status st = TR_RUN(m, embed, err, .rows = &p->rows, .table = m->weights->embed,
                          .dtype = m->weights->embed_dtype, .first = 0, .n_table = c->vocab_size,
                          .d = d, .out = m->ws.hidden);
    if (st == TR_OK) tr_model_show(m, "embed", -1, 0, p->n, d, (size_t)d, m->ws.hidden);

    for (int i = 0; i < slice->layers.n && st == TR_OK; i++) {
        st =
            tr_layer_forward(m, p, i, slice->layers.begin + i, i > 0 ? m->ws.block_out : NULL, err);
        if (st != TR_OK) return tr_within(err, "layer %d", slice->layers.begin + i);
    }
    if (st != TR_OK) return st;

    tr_region_begin(m->regions, m->region_head);
    const struct tr_norm_args norm = {.n = p->rows.n,
                                      .n_max = m->max_rows,
                                      .d = d,
                                      .add = m->ws.block_out,
                                      .ld_add = (size_t)d,
                                      .residual = m->ws.hidden,
                                      .ld_residual = (size_t)d,
                                      .weight = m->weights->norm,
                                      .eps = (float)c->rms_norm_eps,
                                      .out = m->ws.normed,
                                      .ld_out = (size_t)d};
    tr_region_begin(m->regions, m->region_op[TR_OP_ID_norm]);
    st = tr_model_ran(m, "norm", m->ops->norm(m->device, TR_LANE_MAIN, &norm), err);
    if (st == TR_OK) {
        tr_model_show(m, "hidden", last, 0, p->n, d, (size_t)d, m->ws.hidden);
        tr_model_show(m, "final", -1, 0, p->n, d, (size_t)d, m->ws.normed);
        st = head(m, p, step, err);
    }
    tr_region_end(m->regions, 0, 0);
    return st == TR_OK ? TR_OK : tr_within(err, "head");
}

tr_status tr_model_forward(tr_model *model, tr_step *step, tr_err *err)
{
    tr_pass pass;
    tr_status st;

    step->out.n_head = 0;
    tr_region_begin(model->regions, model->region_step);
    st = make_rows(model, step, &pass, err);
    if (st == TR_OK && pass.n > 0) {
        st = network(model, &pass, step, err);
        if (st == TR_OK) st = fetch(model, step, err);
    }
    step->ticket = model->ops->ticket(model->device, TR_LANE_MAIN);
    tr_region_end(model->regions, 0, 0);
    return st;
}

int tr_step_done(const tr_model *model, const tr_step *step)
{
    return model->ops->done(model->device, TR_LANE_MAIN, step->ticket);
}
