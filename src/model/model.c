/* The model of one rank, and the forward pass of a step around its layers (layer.c). */
#include <config.h>

#include "model/model.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "model/model_priv.h"
#include "model/note.h"

/* ---- running operations ------------------------------------------------------------------------------------------- */

/* Until the lane has passed. */
static tr_status settle(tr_model *m)
{
    const uint64_t ticket = m->ops->ticket(m->device, m->lane);
    int done;
    while ((done = m->ops->done(m->device, m->lane, ticket)) == 0)
        tr_comm_progress(m->moving);
    return done > 0 ? TR_OK : TR_E_DEVICE;
}

tr_status tr_model_ran(tr_model *m, const char *op, tr_status st, tr_err *err)
{
    if (st == TR_OK && m->sync_check) st = settle(m);
    tr_region_end(m->regions, m->note_bytes, m->note_flops);
    tr_model_joins(m);
    m->note_bytes = m->note_flops = 0;
    tr_comm_progress(m->moving);
    return st == TR_OK ? TR_OK : tr_fail_of(err, st, op, m->ops->error(m->device));
}

/* Scratch of the products of the lane that comes next. */
static int lane_quant(const tr_model *m)
{
    return m->lane == TR_LANE_SIDE ? TR_QUANT_SIDE : TR_QUANT_MAIN;
}

tr_quantised tr_model_codes(tr_model *m, const tr_linear *w, const tr_act *in)
{
    tr_quantised *q = &m->ws.quant[lane_quant(m)];
    if (!q->q || !m->ops->linear_codes || !m->ops->linear_codes(m->device, w))
        return (tr_quantised){0};
    q->of = in;
    return *q;
}

tr_acts tr_model_acts(const tr_model *m, const tr_pass *p, const tr_act *in, int d)
{
    const tr_quantised *q = &m->ws.quant[lane_quant(m)];
    for (int i = 0; i < TR_N_QUANTS; i++)
        if (m->ws.quant[i].of == in) q = &m->ws.quant[i];
    return (tr_acts){.x = in,
                     .ld = (size_t)d,
                     .q = q->q,
                     .q_scale = q->scale,
                     .n_max = p->n_max,
                     .d = d,
                     .scale_pow2 = m->config->scale_ue8m0,
                     .quantised = q->of == in};
}

static tr_status product(tr_model *m, const tr_pass *p, const tr_linear *w, const tr_act *in,
                         void *out, int out_f32, tr_err *err)
{
    tr_note(m, tr_work_linear(p->n, m->ops, w));
    const tr_status st = TR_RUN(m, linear, err, .n = p->rows.n, .n_max = p->n_max, .w = w,
                                .in = tr_model_acts(m, p, in, w->n_in), .out = out,
                                .ld_out = (size_t)w->n_out, .out_f32 = out_f32);
    m->ws.quant[lane_quant(m)].of = NULL; /* the next product may overwrite it */
    return st;
}

tr_status tr_model_linear(tr_model *m, const tr_pass *p, const tr_linear *w, const tr_act *in,
                          tr_act *out, tr_err *err)
{
    return product(m, p, w, in, out, 0, err);
}

tr_status tr_model_scores(tr_model *m, const tr_pass *p, const tr_linear *w, const tr_act *in,
                          float *out, tr_err *err)
{
    return product(m, p, w, in, out, 1, err);
}

/* The members' sum and the norm in one. */
static tr_status owed_norm(tr_model *m, const struct tr_norm_args *a, tr_err *err)
{
    tr_comm *group = m->owed;

    m->owed = NULL;
    tr_region_begin(m->regions, m->region_comm);
    tr_status st = tr_comm_reduce_norm(group, a, err);
    if (st == TR_OK && m->sync_check && !m->replaying) st = settle(m);
    tr_region_end(m->regions, (double)a->n_max * a->d * (double)tr_act_bytes(m->ops), 0);
    m->note_bytes = m->note_flops = 0;
    tr_comm_progress(m->moving);
    return st;
}

tr_status tr_model_norm(tr_model *m, const tr_pass *p, int d, int i_quant, const tr_act *add,
                        float *residual, const float *weight, tr_act *out, tr_err *err)
{
    tr_quantised *q = &m->ws.quant[i_quant];
    const int quantise = q->q && d % 128 == 0;
    q->of = quantise ? out : NULL;
    const struct tr_norm_args a = {.n = p->rows.n,
                                   .n_max = p->n_max,
                                   .d = d,
                                   .add = add,
                                   .ld_add = (size_t)d,
                                   .residual = residual,
                                   .ld_residual = (size_t)d,
                                   .weight = weight,
                                   .eps = (float)m->config->rms_norm_eps,
                                   .out = out,
                                   .ld_out = (size_t)d,
                                   .q = quantise ? q->q : NULL,
                                   .q_scale = quantise ? q->scale : NULL,
                                   .scale_pow2 = m->config->scale_ue8m0};
    if (add && m->owed) return owed_norm(m, &a, err);
    tr_note(m, tr_work_norm(p->n, d, add != NULL));
    tr_region_begin(m->regions, m->region_op[TR_OP_ID_norm]);
    return tr_model_ran(m, "norm", m->replaying ? TR_OK : m->ops->norm(m->device, m->lane, &a),
                        err);
}

/* ---- two lanes ----------------------------------------------------------------------------------------------------- */

/* Communicators order what they begin behind the main lane (mpi/comm.h): where some of it is begun beside the queries, keys of
 * context parallelism or lists of shared selections, all of it stays on that lane. */
bool tr_model_forks(const tr_model *m, const tr_pass *p)
{
    return (m->ops->caps & TR_CAP_GRAPH) && !m->probe && p->n_max <= TR_GRAPH_ROWS && !p->split &&
           !tr_attention_shares(m, p);
}

static tr_status follow(tr_model *m, tr_lane before, tr_lane after, tr_err *err)
{
    const tr_status st = m->replaying ? TR_OK : m->ops->order(m->device, before, after);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "order: %s", m->ops->error(m->device));
}

tr_status tr_model_fork(tr_model *m, const tr_pass *p, tr_err *err)
{
    if (!tr_model_forks(m, p)) return TR_OK;
    m->lane = TR_LANE_SIDE;
    return follow(m, TR_LANE_MAIN, TR_LANE_SIDE, err);
}

/* Its products must find their input quantised: the scratch for that is the main lane's. */
bool tr_model_forks_again(const tr_model *m, const tr_pass *p, const tr_act *in)
{
    return tr_model_forks(m, p) && m->ws.quant[TR_QUANT_HIDDEN].of == in;
}

tr_status tr_model_fork_again(tr_model *m, tr_err *err)
{
    m->lane = TR_LANE_COPY;
    return follow(m, TR_LANE_MAIN, TR_LANE_COPY, err);
}

tr_status tr_model_side_joins_again(tr_model *m, tr_err *err)
{
    return follow(m, TR_LANE_COPY, TR_LANE_SIDE, err);
}

tr_status tr_model_join_again(tr_model *m, tr_err *err)
{
    return follow(m, TR_LANE_COPY, TR_LANE_MAIN, err);
}

void tr_model_back(tr_model *m)
{
    m->lane = TR_LANE_MAIN;
}

tr_status tr_model_join(tr_model *m, const tr_pass *p, tr_err *err)
{
    tr_model_back(m);
    return tr_model_forks(m, p) ? follow(m, TR_LANE_SIDE, TR_LANE_MAIN, err) : TR_OK;
}

tr_status tr_model_fetch_words(tr_model *m, void *host, const void *dev, size_t bytes, tr_err *err)
{
    tr_status st = m->ops->download(m->device, TR_LANE_MAIN, host, dev, bytes);
    if (st != TR_OK) return tr_fail(err, st, "download: %s", m->ops->error(m->device));
    st = settle(m);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "download: %s", m->ops->error(m->device));
}

tr_status tr_model_await(tr_model *m, tr_comm *group, tr_status begun, tr_ticket ticket,
                         double bytes, tr_err *err)
{
    if (begun != TR_OK) return begun;
    tr_region_begin(m->regions, m->region_exchange);
    tr_status st = tr_comm_wait(group, TR_LANE_MAIN, ticket, err);
    tr_region_end(m->regions, bytes, 0);
    return st;
}

tr_status tr_model_reduce(tr_model *m, const tr_pass *p, tr_comm *group, tr_act *x, tr_err *err)
{
    const size_t n = (size_t)p->n_max * (size_t)m->config->hidden_size;
    tr_ticket ticket = {0};
    if (tr_comm_size(group) == 1) return TR_OK;
    tr_region_begin(m->regions, m->region_comm);
    tr_status st = tr_comm_all_reduce(group, x, n, m->ops->act, &ticket, err);
    if (st == TR_OK) st = tr_comm_wait(group, TR_LANE_MAIN, ticket, err);
    tr_region_end(m->regions, (double)n * (double)tr_act_bytes(m->ops), 0);
    return st;
}

tr_status tr_model_owe(tr_model *m, const tr_pass *p, tr_comm *group, tr_err *err)
{
    if (!tr_comm_fuses(group, p->n_max, m->config->hidden_size))
        return tr_model_reduce(m, p, group, m->ws.block_out, err);
    m->owed = group;
    return TR_OK;
}

tr_act *tr_model_act_at(const tr_model *m, tr_act *x, size_t i)
{
    return (tr_act *)(void *)((char *)x + i * tr_act_bytes(m->ops));
}

void tr_model_progress(tr_model *m)
{
    tr_comm_progress(m->moving);
}

uint64_t *tr_model_expert_rows(const tr_model *m)
{
    return m->counted + (size_t)m->i_layer * (size_t)m->n_local;
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
        m->region_op[i] = tr_region_id_of(m->regions, op_names[i], TR_KIND_KERNEL, -1);
    m->region_step = tr_region_id_of(m->regions, "step", TR_KIND_STEP, -1);
    m->region_layer = tr_region_id_of(m->regions, "layer", TR_KIND_LAYER, -1);
    m->region_attention = tr_region_id(m->regions, "attention");
    m->region_dense = tr_region_id(m->regions, "dense");
    m->region_moe = tr_region_id(m->regions, "experts");
    m->region_head = tr_region_id(m->regions, "head");
    m->region_comm = tr_region_id_of(m->regions, "all_reduce", TR_KIND_COMM, -1);
    m->region_exchange = tr_region_id_of(m->regions, "exchange", TR_KIND_WAIT, -1);
    m->region_gather = tr_region_id_of(m->regions, "key_gather", TR_KIND_WAIT, -1);
}

static tr_comm *some_group(const tr_groups *g)
{
    tr_comm *const group[] = {g->attn_tp, g->attn_cp, g->moe, g->pp};

    for (int i = 0; i < 4; i++)
        if (tr_comm_size(group[i]) > 1) return group[i];
    return g->attn_tp;
}

static uint64_t waited_ns(const tr_comm *c)
{
    uint64_t ns = 0;

    for (int op = 0; op < TR_COMM_N_OPS; op++)
        ns += tr_comm_waited_ns(c, (tr_comm_op)op);
    return ns;
}

void tr_model_waited(const tr_model *m, uint64_t *all_ns, uint64_t *stages_ns)
{
    const tr_groups *g = &m->groups;

    *stages_ns = waited_ns(g->pp);
    *all_ns = *stages_ns + waited_ns(g->attn_tp) + waited_ns(g->attn_cp) + waited_ns(g->moe);
}

static void set_moving(tr_model *m, tr_comm *comm)
{
    m->moving = comm;
    m->joins = (m->ops->caps & TR_CAP_HOST) && tr_comm_size(comm) == 1;
}

void tr_model_advance(tr_model *m, tr_comm *comm)
{
    if (tr_comm_size(m->moving) == 1) set_moving(m, comm);
}

/* Pages of the cache, now that everything else has its memory or has not got it. */
static tr_status pages_of(const tr_model_options *o, tr_status so_far, int *n_pages, tr_err *err)
{
    *n_pages = o->n_pages;
    if (o->n_pages || !o->choose_pages) return so_far;
    return o->choose_pages(o->choose_ctx, so_far, n_pages, err);
}

tr_status tr_model_create(tr_model **out, const tr_config *config, const tr_weights *weights,
                          tr_device *device, const tr_ops *ops, const tr_groups *groups,
                          const tr_model_options *options, const uint32_t *has_token,
                          tr_regions *regions, tr_err *err)
{
    tr_status st = TR_OK;
    int n_pages;

    *out = NULL;
    const tr_comm *group[] = {groups->attn_tp, groups->attn_cp, groups->moe, groups->pp};
    for (int i = 0; i < 4; i++)
        if (tr_comm_size(group[i]) > TR_MEMBERS_MAX)
            return tr_fail(err, TR_E_USAGE, "a group of %d ranks (%s): at most %d",
                           tr_comm_size(group[i]), tr_comm_name(group[i]), TR_MEMBERS_MAX);
    tr_model *m = calloc(1, sizeof *m);
    if (!m) return pages_of(options, tr_fail(err, TR_E_MEMORY, "out of memory"), &n_pages, err);
    m->config = config;
    m->weights = weights;
    m->device = device;
    m->ops = ops;
    m->groups = *groups;
    set_moving(m, some_group(groups));
    m->regions = regions;
    m->lane = TR_LANE_MAIN;
    m->max_rows = options->max_rows;
    m->max_model_len = options->max_model_len;
    m->no_overlap = options->no_overlap;
    m->sync_check = options->sync_check;
    m->moe_exchange = tr_comm_size(groups->moe) != tr_comm_size(groups->attn_tp);
    m->heads = weights->slice.heads.n;
    m->attention_scale = (float)tr_config_attention_scale(config);
    name_regions(m);

    st = tr_model_allocate(m, options, has_token, err);
    st = pages_of(options, st, &n_pages, err);
    if (st == TR_OK) st = tr_model_allocate_cache(m, options->kv_dtype, n_pages, err);
    if (st != TR_OK) goto done;
    const tr_kv_layer kv = tr_cache_layer(m->cache, 0);
    const tr_record key = tr_record_index(&kv), latent = tr_record_latent(&kv);
    st = tr_share_open_record(&m->share_key, groups->attn_cp, &key, options->max_rows, err);
    if (st == TR_OK)
        st = tr_share_open_record(&m->share_latent, groups->attn_cp, &latent, options->max_rows,
                                  err);
    if (st == TR_OK && options->own_rows) {
        tr_share_keep(m->share_key);
        tr_share_keep(m->share_latent);
    }
    if (st == TR_OK && tr_comm_size(groups->attn_cp) > 1) {
        const tr_plan_limits limits = tr_model_limits(m);
        m->part = tr_part_create(&limits, options->cp_mode, tr_comm_rank(groups->attn_cp),
                                 tr_comm_size(groups->attn_cp));
        m->page_table =
            tr_calloc((size_t)limits.n_slots * (size_t)limits.max_pages, sizeof *m->page_table);
        m->overlap = tr_calloc((size_t)m->weights->slice.layers.n, sizeof *m->overlap);
        if (!m->part || !m->page_table || !m->overlap)
            st = tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    if (st == TR_OK && options->find_not_finite) st = tr_finite_create(m, err);
    if (st != TR_OK) goto done;
    *out = m;
    m = NULL;

done:
    tr_model_free(m);
    return st;
}

tr_status tr_model_reach(tr_model *model, tr_err *err)
{
    const tr_cache_memory c = tr_cache_memory_of(model->cache);
    tr_status st = tr_share_reach(model->share_key, c.index, c.index_bytes, err);

    return st == TR_OK ? tr_share_reach(model->share_latent, c.latent, c.latent_bytes, err) : st;
}

/* Of one member what comes is what goes. */
static bool receives(const tr_model *m)
{
    return m->moe_exchange && tr_comm_size(m->groups.moe) > 1;
}

tr_status tr_model_reach_rows(tr_model *model, tr_err *err)
{
    if (!receives(model)) return TR_OK;
    tr_comm *moe = model->groups.moe;
    tr_status st = tr_comm_reach(moe, model->ws.moe.in, model->ws.moe.in_bytes, err);
    return st == TR_OK ? tr_comm_reach(moe, model->ws.moe.back, model->ws.moe.back_bytes, err) : st;
}

void tr_model_free(tr_model *model)
{
    if (!model) return;
    if (receives(model)) {
        tr_comm_leave_alone(model->groups.moe, model->ws.moe.in);
        tr_comm_leave_alone(model->groups.moe, model->ws.moe.back);
    }
    tr_share_close(model->share_key);
    tr_share_close(model->share_latent);
    tr_part_free(model->part);
    free(model->page_table);
    free(model->overlap);
    free(model->expert_rows);
    tr_cache_free(model->cache);
    tr_graph_close(model);
    tr_finite_free(model);
    tr_model_release(model);
    free(model);
}

void tr_model_set_probe(tr_model *model, const tr_probe *probe)
{
    model->probe = probe;
}

void tr_model_set_watch(tr_model *model, tr_watchdog *watch)
{
    model->watch = watch;
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

static tr_status step_take(struct tr_step_memory *s, tr_model *m, size_t bytes, int kind, void *out,
                           tr_err *err)
{
    void *p = NULL;
    tr_status st = m->ops->alloc(m->device, bytes, kind, &p);
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
    } wanted[] =
        {
            {&s->plan, tr_part_bytes_max(&limits)},
            {&s->rows.n, sizeof(int32_t)},
            {&s->rows.n_head, sizeof(int32_t)},
            {&s->rows.token, n * sizeof(int32_t)},
            {&s->rows.slot, n * sizeof(int32_t)},
            {&s->rows.position, n * sizeof(int32_t)},
            {&s->rows.begin, n * sizeof(int32_t)},
            {&s->rows.write, n * sizeof(int64_t)},
            {&s->rows.dense, n},
            {&s->rows.head_row, n_head * sizeof(int32_t)},
            {&s->rows.target, n_head * sizeof(int32_t)},
            {&s->token, n_head * sizeof(int32_t)},
            {&s->rank, n_head * sizeof(int32_t)},
            {&s->logprob, n_head * sizeof(float)},
            {&s->top_token, top * sizeof(int32_t)},
            {&s->top_logprob, top * sizeof(float)},
        },
      on_host[] = {
          {&step->out.token, n_head * sizeof(int32_t)},
          {&step->out.rank, n_head * sizeof(int32_t)},
          {&step->out.logprob, n_head * sizeof(float)},
          {&step->out.top_token, top * sizeof(int32_t)},
          {&step->out.top_logprob, top * sizeof(float)},
      };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted && st == TR_OK; i++)
        st = step_take(s, model, wanted[i].bytes, TR_MEMORY_DEVICE, wanted[i].out, err);
    for (size_t i = 0; i < sizeof on_host / sizeof *on_host && st == TR_OK; i++)
        st = step_take(s, model, on_host[i].bytes, TR_MEMORY_HOST, on_host[i].out, err);
    const struct {
        void *out;
        size_t bytes;
    } wanted_too[] = {
        {&s->head_plan, tr_part_bytes_max(&limits)},
        {&s->head_index, n_head * sizeof(int32_t)},
        {&s->head_rows.n, sizeof(int32_t)},
        {&s->head_rows.n_head, sizeof(int32_t)},
        {&s->head_rows.token, n_head * sizeof(int32_t)},
        {&s->head_rows.slot, n_head * sizeof(int32_t)},
        {&s->head_rows.position, n_head * sizeof(int32_t)},
        {&s->head_rows.begin, n_head * sizeof(int32_t)},
        {&s->head_rows.write, n_head * sizeof(int64_t)},
        {&s->head_rows.dense, n_head},
        {&s->head_rows.head_row, n_head * sizeof(int32_t)},
        {&s->head_rows.target, n_head * sizeof(int32_t)},
    };
    for (size_t i = 0; model->part && i < sizeof wanted_too / sizeof *wanted_too && st == TR_OK;
         i++)
        st = step_take(s, model, wanted_too[i].bytes, TR_MEMORY_DEVICE, wanted_too[i].out, err);
    s->rows.n_max = limits.n_rows_max;
    s->rows.n_head_max = limits.n_head_max;
    s->rows.page_table = model->slots.page_table;
    s->rows.max_pages = model->slots.max_pages;
    s->head_rows.n_max = s->head_rows.n_head_max = limits.n_head_max;
    s->head_rows.page_table = model->slots.page_table;
    s->head_rows.max_pages = model->slots.max_pages;
    if (st != TR_OK) tr_step_free(step, model);
    return st;
}

void tr_step_free(tr_step *step, tr_model *model)
{
    if (!step->memory) return;
    for (int i = 0; i < step->memory->n_graphs; i++)
        tr_graph_drop(model, &step->memory->graph[i]);
    for (int i = 0; i < step->memory->n_owned; i++)
        model->ops->release(model->device, step->memory->owned[i]);
    free(step->memory);
    memset(step, 0, sizeof *step);
}

/* Context parallelism: this member's part of the plan, where its and the others' keys go, and which head rows are whose. */
static tr_status divide(tr_model *m, const tr_plan *plan, struct tr_step_memory *s, tr_err *err)
{
    const tr_page_set *set = tr_plan_page_sets(plan);
    for (int i = 0; i < plan->n_page_sets; i++)
        m->page_table[(size_t)set[i].slot * (size_t)m->slots.max_pages + (size_t)set[i].i_page] =
            set[i].page;
    tr_part_make(m->part, plan, m->page_table, m->slots.max_pages);
    const int *n_rows = tr_part_written(m->part);
    const int64_t *write = tr_part_write_rows(m->part);
    const tr_plan *head = tr_part_head(m->part);

    tr_status st = tr_share_plan(m->share_key, n_rows, write, err);
    if (st == TR_OK) st = tr_share_plan(m->share_latent, n_rows, write, err);
    if (st != TR_OK || !tr_part_is_split(m->part)) return st;
    st = m->ops->upload(m->device, TR_LANE_MAIN, s->head_plan, head, head->bytes);
    if (st == TR_OK)
        st = m->ops->upload(m->device, TR_LANE_MAIN, s->head_index, tr_part_head_index(m->part),
                            (size_t)plan->n_head_rows * sizeof(int32_t));
    return st == TR_OK ? TR_OK : tr_fail(err, st, "plan upload: %s", m->ops->error(m->device));
}

/* Plan to the device, rows from it, half-filled pages of forks copied in every layer. */
static tr_status make_rows(tr_model *m, tr_step *step, tr_pass *p, tr_err *err)
{
    struct tr_step_memory *s = step->memory;
    const tr_plan *plan = step->plan;
    tr_status st = m->part ? divide(m, plan, s, err) : TR_OK;

    if (st != TR_OK) return st;
    const bool split = m->part && tr_part_is_split(m->part);
    if (split) plan = tr_part_rows(m->part);
    st = m->ops->upload(m->device, TR_LANE_MAIN, s->plan, plan, plan->bytes);
    if (st != TR_OK) return tr_fail(err, st, "plan upload: %s", m->ops->error(m->device));
    s->rows.max_context = s->head_rows.max_context = plan->max_context;
    /* A device cannot be given nothing to launch for; it reads that there are no rows. */
    *p = (tr_pass){.plan = plan,
                   .rows = s->rows,
                   .n = plan->n_rows,
                   .n_max = plan->n_rows > 0 || (m->ops->caps & TR_CAP_HOST) ? plan->n_rows : 1,
                   .n_head = plan->n_head_rows,
                   .split = split};
    p->rows.n_max = p->n_max;
    tr_note(m, tr_work_plan_apply(plan->bytes));
    st = TR_RUN(m, plan_apply, err, .plan = s->plan, .slots = m->slots, .rows = s->rows,
                .n_dense = m->config->index_topk);
    tr_note(m, tr_work_plan_apply(plan->bytes));
    if (split && st == TR_OK)
        st = TR_RUN(m, plan_apply, err, .plan = s->head_plan, .slots = m->slots,
                    .rows = s->head_rows, .n_dense = m->config->index_topk, .rows_only = 1);
    for (int i = 0; i < m->weights->slice.layers.n && plan->n_copies > 0 && st == TR_OK; i++) {
        const tr_kv_layer kv = tr_cache_layer(m->cache, i);
        tr_note(m, tr_work_pages_copy((double)plan->n_copies * TR_PAGE_TOKENS, &kv));
        st = TR_RUN(m, pages_copy, err, .plan = s->plan, .kv = kv);
    }
    return st;
}

/* Outputs of the head to the host. */
static tr_status fetch(tr_model *m, tr_step *step, tr_err *err)
{
    struct tr_step_memory *s = step->memory;
    const size_t n = (size_t)step->plan->n_head_rows * 4, top = n * TR_MAX_LOGPROBS;
    step->out.n_head = step->plan->n_head_rows;
    const bool scores = (step->plan->flags & TR_PLAN_HAS_SCORES) != 0; /* else nobody reads them */
    tr_status st = m->ops->download(m->device, TR_LANE_MAIN, step->out.token, s->token, n);
    if (st == TR_OK && scores)
        st = m->ops->download(m->device, TR_LANE_MAIN, step->out.logprob, s->logprob, n);
    if (st == TR_OK && scores)
        st = m->ops->download(m->device, TR_LANE_MAIN, step->out.rank, s->rank, n);
    if (st == TR_OK && scores)
        st = m->ops->download(m->device, TR_LANE_MAIN, step->out.top_token, s->top_token, top);
    if (st == TR_OK && scores)
        st = m->ops->download(m->device, TR_LANE_MAIN, step->out.top_logprob, s->top_logprob, top);
    if (st == TR_OK && m->finite) st = settle(m);
    return st == TR_OK ? tr_finite_tell(m, step, err)
                       : tr_fail(err, st, "outputs: %s", m->ops->error(m->device));
}

/* The sum that is still to be made, and RMSNorm of it with `weight`. */
static tr_status last_norm(tr_model *m, const tr_pass *p, const float *weight, tr_err *err)
{
    return tr_model_norm(m, p, m->config->hidden_size, TR_QUANT_HIDDEN, m->ws.block_out,
                         m->ws.hidden, weight, m->ws.normed, err);
}

/* ws.hidden of this stage's first layer. */
static tr_status network_begin(tr_model *m, const tr_pass *p, tr_err *err)
{
    const int d = m->config->hidden_size;
    m->owed = NULL; /* nothing of a step that failed */
    if (!m->weights->slice.embed) {
        const tr_status received = tr_stage_receive(m, p, err);
        return received == TR_OK ? tr_finite_receive(m, p, err) : received;
    }
    tr_note(m, tr_work_embed(p->n, d, m->weights->embed_dtype));
    tr_status st = TR_RUN(m, embed, err, .rows = &p->rows, .table = m->weights->embed,
                          .dtype = m->weights->embed_dtype, .first = 0,
                          .n_table = m->config->vocab_size, .d = d, .out = m->ws.hidden);
    if (st != TR_OK) return st;
    tr_model_show(m, "embed", -1, 0, p->n, d, (size_t)d, m->ws.hidden);
    return tr_finite_embedding(m, p, err);
}

static tr_status network_end(tr_model *m, const tr_pass *p, tr_step *step, bool with_head,
                             tr_err *err)
{
    const tr_slice *slice = &m->weights->slice;
    const int d = m->config->hidden_size, last = slice->layers.begin + slice->layers.n - 1;

    if (!slice
             ->head) { /* of the norm's two results the sum alone is wanted: the next stage has the weight */
        tr_status st = last_norm(m, p, m->weights->layer[0].post_norm, err);
        if (st == TR_OK) st = tr_finite_layer(m, p, last, err);
        if (st == TR_OK) st = tr_stage_send(m, p, err);
        return st == TR_OK ? tr_finite_send(m, p, err) : st;
    }
    tr_region_begin(m->regions, m->region_head);
    tr_model_joins(m);
    tr_status st = last_norm(m, p, m->weights->norm, err);
    if (st == TR_OK) {
        tr_model_show(m, "hidden", last, 0, p->n, d, (size_t)d, m->ws.hidden);
        tr_model_show(m, "final", -1, 0, p->n, d, (size_t)d, m->ws.normed);
        st = tr_finite_layer(m, p, last, err);
        if (st == TR_OK && with_head && step->plan->n_head_rows > 0)
            st = tr_head_forward(m, p, step->memory, err);
    }
    tr_region_end(m->regions, 0, 0);
    return st == TR_OK ? TR_OK : tr_within(err, "head");
}

/* What a record without the head leaves to be done. */
tr_status tr_model_head(tr_model *m, const tr_pass *p, tr_step *step, tr_err *err)
{
    tr_region_begin(m->regions, m->region_head);
    const tr_status st = tr_head_forward(m, p, step->memory, err);
    tr_region_end(m->regions, 0, 0);
    return st == TR_OK ? TR_OK : tr_within(err, "head");
}

/* embed or receive, layers, norm and head or send. with_head: false where a record ends before the head's products. */
tr_status tr_model_network(tr_model *m, tr_pass *p, tr_step *step, bool with_head, tr_err *err)
{
    const tr_slice *slice = &m->weights->slice;
    tr_status st = network_begin(m, p, err);

    for (int i = 0; i < slice->layers.n && st == TR_OK; i++) {
        m->i_layer = i;
        tr_region_begin_layer(m->regions, m->region_layer, slice->layers.begin + i);
        tr_model_joins(m);
        st =
            tr_layer_forward(m, p, i, slice->layers.begin + i, i > 0 ? m->ws.block_out : NULL, err);
        tr_region_end(m->regions, 0, 0);
        tr_model_joins(m);
        if (st != TR_OK) return tr_within(err, "layer %d", slice->layers.begin + i);
    }
    return st == TR_OK ? network_end(m, p, step, with_head, err) : st;
}

tr_status tr_model_forward(tr_model *model, tr_step *step, tr_err *err)
{
    tr_pass pass;
    tr_status st;

    step->out.n_head = 0;
    tr_device_times_begin(tr_model_times(model), step->plan->step);
    tr_regions_phase(model->regions, tr_plan_phase(step->plan));
    tr_region_begin(model->regions, model->region_step);
    tr_finite_begin(model, step->plan);
    st = make_rows(model, step, &pass, err);
    /* A replica without rows still serves the others' with its experts. */
    if (st == TR_OK) st = tr_moe_rounds(model, &pass, err);
    if (st == TR_OK && (step->plan->n_rows > 0 || model->moe_exchange)) {
        st = tr_graph_fits(model, &pass) ? tr_graph_network(model, &pass, step, err)
                                         : tr_model_network(model, &pass, step, true, err);
        if (st == TR_OK && model->weights->slice.head) st = fetch(model, step, err);
    }
    tr_region_end(model->regions, 0, 0);
    tr_regions_phase(model->regions, TR_PHASE_NONE);
    step->ticket = model->ops->ticket(model->device, TR_LANE_MAIN);
    tr_device_times_end(tr_model_times(model), step->ticket);
    return st;
}

tr_model_seen tr_model_look(tr_model *model)
{
    const tr_slice *slice = &model->weights->slice;
    const size_t n = (size_t)slice->layers.n * (size_t)model->n_local;
    tr_err ignored;

    (void)tr_model_fetch_words(model, model->expert_rows, model->counted,
                               n * sizeof *model->expert_rows, &ignored);
    return (tr_model_seen){.layer_first = slice->layers.begin,
                           .n_layers = slice->layers.n,
                           .overlap = model->overlap,
                           .expert_rows = model->expert_rows,
                           .expert_first = slice->experts.begin,
                           .n_local = model->n_local};
}

void tr_model_print_overlap(const tr_model *model, FILE *out)
{
    if (!model->overlap) return;
    fprintf(out, "%5s %12s %12s %12s %8s\n", "layer", "gather, ms", "exposed, ms", "hidden, ms",
            "hidden");
    for (int i = 0; i < model->weights->slice.layers.n; i++) {
        const tr_overlap *o = &model->overlap[i];
        const double gather = (double)(o->key.flown_ns + o->latent.flown_ns) * 1e-6,
                     exposed = (double)(o->key.waited_ns + o->latent.waited_ns) * 1e-6,
                     hidden = gather > exposed ? gather - exposed : 0;
        fprintf(out, "%5d %12.3f %12.3f %12.3f %7.1f%%\n", model->weights->slice.layers.begin + i,
                gather, exposed, hidden, gather > 0 ? 100 * hidden / gather : 0);
    }
}

int tr_step_done(const tr_model *model, const tr_step *step)
{
    return model->ops->done(model->device, TR_LANE_MAIN, step->ticket);
}

tr_status tr_step_failure(const tr_model *model, const tr_step *step, tr_err *err)
{
    if (tr_step_done(model, step) >= 0) return TR_OK;
    return tr_fail(err, TR_E_DEVICE, "%s", model->ops->error(model->device));
}
