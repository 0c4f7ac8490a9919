/* Everything a model and its steps allocate, once, before the first step. */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "model/model_priv.h"

enum { STRIPE_BYTES = 64 << 20 }; /* where the backend does not say */

/* Rows of `row_bytes` that fit a stripe buffer: at least `least`, at most `most`. */
static int stripe_rows(const tr_ops *ops, size_t row_bytes, int least, int most)
{
    size_t n = (ops->stripe_bytes ? ops->stripe_bytes : STRIPE_BYTES) / row_bytes;
    if (n < (size_t)least) n = (size_t)least;
    return n > (size_t)most ? most : (int)n;
}

static tr_status take_kind(tr_model *m, size_t bytes, int kind, void *out, tr_err *err)
{
    void *p = NULL;
    if (m->n_owned == TR_MODEL_ALLOCATIONS)
        return tr_fail(err, TR_E_MEMORY, "too many allocations of one model");
    tr_status st = m->ops->alloc(m->device, bytes ? bytes : 1, kind, &p);
    if (st != TR_OK)
        return tr_fail(err, st, "workspace of %.1f MB (%.1f MB before it): %s",
                       (double)bytes * 1e-6, (double)m->owned_bytes * 1e-6,
                       m->ops->error(m->device));
    m->owned[m->n_owned++] = p;
    m->owned_bytes += bytes;
    *(void **)out = p;
    return TR_OK;
}

tr_status tr_model_take(tr_model *m, size_t bytes, void *out, tr_err *err)
{
    return take_kind(m, bytes, TR_MEMORY_DEVICE, out, err);
}

void tr_model_release(tr_model *m)
{
    for (int i = 0; i < m->n_owned; i++)
        m->ops->release(m->device, m->owned[i]);
    m->n_owned = 0;
}

/* rows x columns numbers of `size` bytes. */
static tr_status take_of_kind(tr_model *m, size_t rows, size_t columns, size_t size, int kind,
                              void *out, tr_err *err)
{
    size_t n, bytes;
    if (!tr_mul(&n, rows, columns) || !tr_mul(&bytes, n, size))
        return tr_fail(err, TR_E_MEMORY,
                       "a workspace of %zu x %zu numbers does not fit an address space", rows,
                       columns);
    return take_kind(m, bytes, kind, out, err);
}

static tr_status take(tr_model *m, size_t rows, size_t columns, size_t size, void *out, tr_err *err)
{
    return take_of_kind(m, rows, columns, size, TR_MEMORY_DEVICE, out, err);
}

static tr_status take_reached(tr_model *m, size_t rows, size_t columns, size_t size, void *out,
                              tr_err *err)
{
    return take_of_kind(m, rows, columns, size, TR_MEMORY_SYMMETRIC, out, err);
}

static tr_status take4(tr_model *m, size_t rows, size_t columns, void *out, tr_err *err)
{
    return take(m, rows, columns, 4, out, err);
}

static int largest(int a, int b)
{
    return a > b ? a : b;
}

/* Widest inner of this rank's MLPs and shared experts, and of its routed experts. */
static void widths(const tr_weights *w, int *mlp_inner, int *expert_inner)
{
    *mlp_inner = *expert_inner = 1;
    for (int i = 0; i < w->slice.layers.n; i++) {
        const tr_layer_weights *l = &w->layer[i];
        *mlp_inner = largest(*mlp_inner, l->is_moe ? l->moe.shared.inner : l->mlp.inner);
        if (l->is_moe) *expert_inner = largest(*expert_inner, l->moe.inner);
    }
}

/* How many rows a member of the MoE group sends to experts at a time: what may come then is no more than a step's rows. */
static void choose_rounds(tr_model *m)
{
    const int members = tr_comm_size(m->groups.moe);
    m->moe_rows = m->max_rows;
    if (!m->moe_exchange) return;
    m->moe_share = largest(1, m->max_rows / members);
    m->moe_rows = m->moe_share * members;
    /* Ranks are numbered replica by replica, and the group is of neighbours (mpi/grid.h). */
    const int replica = tr_comm_size(m->groups.attn_tp) * tr_comm_size(m->groups.attn_cp);
    m->moe_same = members % replica == 0 ? replica : replica % members == 0 ? members : 0;
}

/* n rows, up to as many for each member of the attention group. */
static size_t whole_shares(const tr_model *m, size_t n)
{
    const size_t tp = (size_t)tr_comm_size(m->groups.attn_tp);
    return tr_ceil_div(n, tp) * tp;
}

/* The largest record of a row to experts elsewhere, and whether some are of codes. */
static size_t largest_record(const tr_model *m, int *codes)
{
    const tr_config *c = m->config;
    size_t most = 16; /* a stage without experts has no rows to send */

    *codes = 0;
    for (int i = 0; i < m->weights->slice.layers.n; i++) {
        const tr_layer_weights *l = &m->weights->layer[i];
        if (!l->is_moe) continue;
        const size_t act = tr_model_travel_act(m, &l->moe),
                     bytes = tr_dispatch_bytes(c->hidden_size, c->num_experts_per_tok, act);
        if (bytes > most) most = bytes;
        *codes |= act == TR_CODES;
    }
    return most;
}

/* What only some grids need: rows to experts elsewhere, to the next stage, head rows and logits of other members. */
static tr_status take_exchanges(tr_model *m, tr_err *err)
{
    const tr_config *c = m->config;
    const tr_slice *slice = &m->weights->slice;
    tr_workspace *ws = &m->ws;
    const size_t n = (size_t)m->max_rows, hidden = (size_t)c->hidden_size,
                 act = tr_act_bytes(m->ops);
    const int k = c->num_experts_per_tok, members = tr_comm_size(m->groups.moe),
              n_ep = members / m->groups.n_xt;
    int codes;
    const size_t record = largest_record(m, &codes), n_in = (size_t)m->moe_rows,
                 n_out =
                     (size_t)m->moe_share * (size_t)(k < n_ep ? k : n_ep) * (size_t)m->groups.n_xt;
    const size_t part = sizeof(tr_sample_part) > sizeof(tr_logprob_part) ? sizeof(tr_sample_part)
                                                                         : sizeof(tr_logprob_part),
                 chunk = (size_t)m->n_head_chunk, tp = (size_t)tr_comm_size(m->groups.attn_tp);
    const struct {
        int wanted;
        void *out;
        size_t rows, columns, size;
    } list[] = {
        {m->moe_exchange, &ws->moe.out, n_out, record / 4, 4},
        {m->moe_exchange, &ws->moe.count, (size_t)members, 1, 4},
        {m->moe_exchange, &ws->moe.origin, n_out, 1, 4},
        {m->moe_exchange, &ws->moe.expert, n_in, (size_t)k, 4},
        {m->moe_exchange, &ws->moe.weight, n_in, (size_t)k, 4},
        {m->moe_exchange, &ws->moe.n, 1, 1, 4},
        {m->moe_exchange && codes, &ws->moe.q, n_in, hidden, 1},
        {m->moe_exchange && codes, &ws->moe.q_scale, tr_ceil_div(n_in, 4) * 4, hidden / 128, 4},
        {m->moe_exchange, &ws->moe.y, n_in, hidden, act},
        {!slice->head, &ws->handoff, n, hidden, 4},
        {tr_comm_size(m->groups.attn_cp) > 1, &ws->head_own, n, hidden, act},
        {tr_comm_size(m->groups.attn_cp) > 1, &ws->head_all, n, hidden, act},
        {slice->head_partial, &ws->logits_all, (size_t)c->vocab_size, 1, 4},
        {slice->head_partial, &ws->part_own, chunk, part / 4, 4},
        {slice->head_partial, &ws->part_all, chunk * tp, part / 4, 4},
        {slice->head_partial, &ws->better_own, chunk, 1, 4},
        {slice->head_partial, &ws->better_all, chunk * tp, 1, 4},
    };
    tr_status st = TR_OK;
    for (size_t i = 0; i < sizeof list / sizeof *list && st == TR_OK; i++)
        if (list[i].wanted)
            st = take(m, list[i].rows, list[i].columns, list[i].size, list[i].out, err);
    if (m->moe_exchange && members > 1) { /* the others may store here */
        if (st == TR_OK) st = take_reached(m, n_in, record / 4, 4, &ws->moe.in, err);
        if (st == TR_OK) st = take_reached(m, n_out, hidden, act, &ws->moe.back, err);
        ws->moe.in_bytes = n_in * (record / 4) * 4;
        ws->moe.back_bytes = n_out * hidden * act;
    }
    if (members == 1) { /* of --tp with --ep 1: rows are dealt out, and what goes is what comes */
        ws->moe.in = ws->moe.out;
        ws->moe.back = ws->moe.y;
    }
    return st;
}

/* Where the backend quantises what goes into a product: room for the widest of each kind (kernels.h, tr_acts). */
static tr_status take_quantised(tr_model *m, int mlp_inner, tr_err *err)
{
    const tr_config *c = m->config;
    const int widest = largest(largest(c->hidden_size, c->q_lora_rank),
                               largest(m->heads * c->v_head_dim, mlp_inner));
    const int width[TR_N_QUANTS] = {[TR_QUANT_MAIN] = widest,
                                    [TR_QUANT_SIDE] = widest,
                                    [TR_QUANT_HIDDEN] = c->hidden_size,
                                    [TR_QUANT_LATENT] = c->q_lora_rank};
    const size_t n = tr_ceil_div((size_t)m->max_rows, 4) * 4;
    tr_status st = TR_OK;

    for (int i = 0; i < TR_N_QUANTS && (m->ops->caps & TR_CAP_W8A8) && st == TR_OK; i++) {
        const size_t blocks = ((size_t)width[i] + 254) / 128;
        st = take(m, n, blocks * 128, 1, &m->ws.quant[i].q, err);
        if (st == TR_OK) st = take4(m, n, blocks, &m->ws.quant[i].scale, err);
    }
    return st;
}

static tr_status take_workspace(tr_model *m, tr_err *err)
{
    const tr_config *c = m->config;
    tr_workspace *ws = &m->ws;
    const size_t n = (size_t)m->max_rows, k = (size_t)c->num_experts_per_tok,
                 heads = (size_t)m->heads, act = tr_act_bytes(m->ops);
    const size_t d_kv = (size_t)(c->kv_lora_rank + c->qk_rope_head_dim),
                 hidden = (size_t)c->hidden_size;
    int mlp_inner, expert_inner;
    widths(m->weights, &mlp_inner, &expert_inner);
    choose_rounds(m);
    const size_t n_moe = (size_t)m->moe_rows;

    const struct {
        void *out;
        size_t rows, columns, size;
    } wanted[] = {
        {&ws->hidden, n, hidden, 4},
        {&ws->normed, n, hidden, act},
        {&ws->block_out, whole_shares(m, n), hidden, act},
        {&ws->q_latent, n, (size_t)c->q_lora_rank, 4},
        {&ws->q_normed, n, (size_t)c->q_lora_rank, act},
        {&ws->q, n, heads * (size_t)(c->qk_nope_head_dim + c->qk_rope_head_dim), act},
        {&ws->kv_a, n, d_kv, act},
        {&ws->index_k, n, (size_t)c->index_head_dim, act},
        {&ws->index_q, n, (size_t)(c->index_n_heads * c->index_head_dim), act},
        {&ws->index_q8, n, (size_t)(c->index_n_heads * c->index_head_dim), 4},
        {&ws->index_w, n, (size_t)c->index_n_heads, 4},
        {&ws->score, (size_t)m->n_stripe, (size_t)m->max_model_len, 4},
        {&ws->top_position, n, (size_t)c->index_topk, 4},
        {&ws->top_row, n, (size_t)c->index_topk, 4},
        {&ws->n_selected, n, 1, 4},
        {&ws->q_absorbed, n, heads * d_kv, act},
        {&ws->u, n, heads * (size_t)c->kv_lora_rank, act},
        {&ws->attended, n, heads * (size_t)c->v_head_dim, act},
        {&ws->gate_up, n, 2 * (size_t)mlp_inner, act},
        {&ws->inner, n, (size_t)mlp_inner, act},
        {&ws->router, n, (size_t)c->n_routed_experts, 4},
        {&ws->expert, n, k, 4},
        {&ws->weight, n, k, 4},
        {&ws->start, (size_t)c->n_routed_experts + 1, 1, 4},
        {&ws->pair, n_moe, k, 4},
        {&ws->expert_out, n_moe * k, hidden, act},
        {&ws->n_head, 1, 1, 4},
        {&ws->head_in, (size_t)m->n_head_chunk, hidden, act},
        {&ws->logits, (size_t)m->n_head_chunk, (size_t)m->weights->slice.vocab.n, 4},
    };
    tr_status st = TR_OK;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted && st == TR_OK; i++)
        st = take(m, wanted[i].rows, wanted[i].columns, wanted[i].size, wanted[i].out, err);
    if (st != TR_OK) return st;

    const int dense_context = m->max_model_len < c->index_topk ? m->max_model_len : c->index_topk;
    size_t sizes[] = {
        m->ops->moe_workspace(m->moe_rows, c->num_experts_per_tok, c->hidden_size, expert_inner),
        m->ops->sparse_mla_workspace(m->max_rows, m->heads, c->kv_lora_rank),
        m->ops->sample_workspace(m->n_head_chunk, c->vocab_size),
        m->ops->dense_mha_workspace
            ? m->ops->dense_mha_workspace(m->max_rows, m->heads, dense_context)
            : 0,
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] > ws->scratch_bytes) ws->scratch_bytes = sizes[i];
    st = tr_model_take(m, ws->scratch_bytes, &ws->scratch, err);
    if (st == TR_OK) st = take_quantised(m, mlp_inner, err);
    return st == TR_OK ? take_exchanges(m, err) : st;
}

static tr_status take_slots(tr_model *m, int n_slots, tr_err *err)
{
    tr_slots *s = &m->slots;
    s->n_slots = n_slots;
    s->max_pages = (int)tr_ceil_div((size_t)m->max_model_len, TR_PAGE_TOKENS);
    tr_status st = take4(m, (size_t)n_slots, 1, &s->length, err);
    if (st == TR_OK) st = take4(m, (size_t)n_slots, 1, &s->last_token, err);
    if (st == TR_OK) st = take4(m, (size_t)n_slots, (size_t)s->max_pages, &s->page_table, err);
    if (st == TR_OK)
        st = tr_model_take(m, (size_t)n_slots * sizeof(tr_slot_open), &s->sampling, err);
    return st;
}

/* has_token NULL: every id has one. */
static tr_status upload_mask(tr_model *m, const uint32_t *has_token, size_t bytes, tr_err *err)
{
    uint32_t *all = NULL;

    if (!has_token) {
        all = malloc(bytes);
        if (!all) return tr_fail(err, TR_E_MEMORY, "out of memory");
        has_token = memset(all, 0xff, bytes);
    }
    const tr_status st = m->ops->upload(m->device, TR_LANE_COPY, m->has_token, has_token, bytes);
    free(all);
    return st;
}

/* Host tables that every step reads: rope angles, ids that have a token. */
static tr_status take_tables(tr_model *m, const uint32_t *has_token, tr_err *err)
{
    const tr_config *c = m->config;
    const size_t words = tr_ceil_div((size_t)c->vocab_size, 32);
    const size_t rope_bytes =
        (size_t)m->max_model_len * (size_t)c->qk_rope_head_dim * sizeof(float);
    float *table = malloc(rope_bytes);
    if (!table)
        return tr_fail(err, TR_E_MEMORY, "out of memory for the rope table (%zu bytes)",
                       rope_bytes);
    tr_config_rope_table(c, m->max_model_len, table);
    tr_status st = tr_model_take(m, rope_bytes, &m->rope, err);
    if (st == TR_OK) st = m->ops->upload(m->device, TR_LANE_COPY, m->rope, table, rope_bytes);
    free(table);
    if (st == TR_OK) st = tr_model_take(m, words * 4, &m->has_token, err);
    if (st == TR_OK) st = upload_mask(m, has_token, words * 4, err);
    if (st == TR_OK) st = m->ops->order(m->device, TR_LANE_COPY, TR_LANE_MAIN);
    return st;
}

/* Rows of each expert, counted from 0. */
static tr_status take_counts(tr_model *m, tr_err *err)
{
    const size_t layers = (size_t)m->weights->slice.layers.n;

    m->n_local = m->weights->slice.experts.n;
    const size_t n = layers * (size_t)m->n_local, bytes = n * sizeof *m->counted;
    m->expert_rows = tr_calloc(n, sizeof *m->expert_rows);
    if (!m->expert_rows) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_status st = tr_model_take(m, bytes, &m->counted, err);
    if (st != TR_OK) return st;
    st = m->ops->upload(m->device, TR_LANE_MAIN, m->counted, m->expert_rows, bytes);
    return st == TR_OK ? st : tr_fail(err, st, "upload: %s", m->ops->error(m->device));
}

tr_status tr_model_allocate(tr_model *m, const tr_model_options *options, const uint32_t *has_token,
                            tr_err *err)
{
    const tr_config *c = m->config;
    if (options->kv_dtype == TR_F32 && !(m->ops->caps & TR_CAP_F32_KV))
        return tr_fail(err, TR_E_USAGE, "--kv-dtype f32: %s has caches of fp8 and bf16 only",
                       tr_device_describe(m->device));
    m->n_stripe = stripe_rows(m->ops, (size_t)m->max_model_len * 4, 1, m->max_rows);
    m->n_head_chunk = stripe_rows(m->ops, (size_t)c->vocab_size * 4, 16, m->max_rows);

    tr_status st = take_slots(m, options->n_slots, err);
    if (st == TR_OK) st = take_workspace(m, err);
    if (st == TR_OK) st = take_tables(m, has_token, err);
    return st == TR_OK ? take_counts(m, err) : st;
}

tr_status tr_model_allocate_cache(tr_model *m, tr_dtype dtype, int n_pages, tr_err *err)
{
    /* More pages than every slot at full length can use are never touched. */
    const size_t useful = (size_t)m->slots.n_slots * (size_t)m->slots.max_pages,
                 pages = (size_t)n_pages < useful ? (size_t)n_pages : useful;
    if (n_pages < 1) return tr_fail(err, TR_E_MEMORY, "a cache without a page");
    return tr_cache_create(&m->cache, m->ops, m->device, m->config, m->weights->slice.layers.n,
                           dtype, (int)pages, err);
}
