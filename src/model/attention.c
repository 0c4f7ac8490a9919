/* Attention of one layer (model.md 3.4, 4): multi-head latent attention over the tokens that the lightning indexer selects.
 *
 *     keys      kv_a, index_k  -> cache rows of these tokens         first, so that their exchange hides behind the queries
 *     queries   q_a -> q_b -> rope, absorb W_UK ; index queries
 *     select    index scores -> the index_topk best positions        only rows that see more than index_topk keys
 *     attend    absorbed rows over their selection ; dense rows over everything up to themselves
 *     output    W_UV, o_proj
 *
 * Rows whose context fits index_topk select everything, so a prompt's first index_topk rows may take the cheaper multi-head
 * form ("dense"); the scheduler says which (kernels/plan_block.h). */
#include <config.h>

#include "model/model_priv.h"
#include "model/note.h"

/* What this step's rows add to the cache, of all members of the context-parallel group. */
typedef struct exchange {
    tr_await keys, latents;
    int here; /* both were waited for at once (--no-overlap) */
} exchange;

/* The other members' rows are there; what this waits for is the exposed part of the exchange. */
static tr_status await_rows(tr_model *m, tr_share *share, tr_await *await, tr_err *err)
{
    tr_region_begin(m->regions, m->region_gather);
    tr_status st = tr_share_ready(share, TR_LANE_MAIN, await, err);
    tr_region_end(m->regions, 0, 0);
    return st;
}

/* The index key of every row into the cache; peers of a context-parallel group get it too. */
static tr_status write_index_keys(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                                  tr_kv_layer kv, tr_err *err)
{
    const tr_config *c = m->config;
    tr_push push = {0};
    tr_status st =
        tr_model_linear(m, p, &w->index_k, m->ws.normed, m->ws.index_k, err); /* [n, index_dim] */

    if (st == TR_OK) st = tr_share_begin(m->share_key, &p->rows, kv.index, &push, err);
    if (st != TR_OK) return st;
    tr_note(m, tr_work_kv_write(p->n, &kv, 0, 1));
    st = TR_RUN(m, kv_write, err, .rows = &p->rows, .index_k = m->ws.index_k,
                .ld_index_k = (size_t)c->index_head_dim, .k_norm = w->index_k_norm,
                .k_bias = w->index_k_bias, .rope = m->rope, .eps = (float)c->rms_norm_eps, .kv = kv,
                .push = push);
    return st == TR_OK ? tr_share_sent(m->share_key, TR_LANE_MAIN, err) : st;
}

/* Its latent, likewise. */
static tr_status write_latents(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                               tr_kv_layer kv, tr_err *err)
{
    const tr_config *c = m->config;
    const int d_kv = c->kv_lora_rank + c->qk_rope_head_dim;
    tr_push push = {0};
    tr_status st =
        tr_model_linear(m, p, &w->kv_a, m->ws.normed, m->ws.kv_a, err); /* [n, kv_lora + rope] */

    if (st == TR_OK) st = tr_share_begin(m->share_latent, &p->rows, kv.latent, &push, err);
    if (st != TR_OK) return st;
    tr_note(m, tr_work_kv_write(p->n, &kv, 1, 0));
    st = TR_RUN(m, kv_write, err, .rows = &p->rows, .kv_a = m->ws.kv_a, .ld_kv_a = (size_t)d_kv,
                .norm = w->kv_a_norm, .rope = m->rope, .eps = (float)c->rms_norm_eps, .kv = kv,
                .push = push);
    return st == TR_OK ? tr_share_sent(m->share_latent, TR_LANE_MAIN, err) : st;
}

/* Of every head of the indexer; index_query makes them complete. */
static tr_status weigh_index_heads(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                                   tr_err *err)
{
    if (!(p->plan->flags & TR_PLAN_HAS_SELECTION)) return TR_OK;
    return tr_model_scores(m, p, &w->index_w, m->ws.normed, m->ws.index_w, err);
}

/* index_q [n, index_heads, index_dim]. Before q_b where lanes fork: what it starts, scores and selection, is the longer way, and
 * two products at once would be in each other's way. */
static tr_status project_index_queries(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                                       tr_err *err)
{
    if (!(p->plan->flags & TR_PLAN_HAS_SELECTION)) return TR_OK;
    return tr_model_linear(m, p, &w->index_q, m->ws.q_normed, m->ws.index_q, err);
}

/* q [n, heads, nope + rope] with rope; q_absorbed [n, heads, kv_lora + rope] of absorbed rows; leaves q_normed. */
static tr_status make_queries(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                              tr_err *err)
{
    const tr_config *c = m->config;
    const int heads = m->heads;
    tr_status st;

    st = tr_model_scores(m, p, &w->q_a, m->ws.normed, m->ws.q_latent, err); /* [n, q_lora] */
    if (st == TR_OK)
        st = tr_model_norm(m, p, c->q_lora_rank, TR_QUANT_LATENT, NULL, m->ws.q_latent, w->q_a_norm,
                           m->ws.q_normed, err);
    if (st == TR_OK && tr_model_forks(m, p)) { /* the side lane goes on from here */
        st = project_index_queries(m, p, w, err);
        if (st == TR_OK) st = tr_model_fork(m, p, err);
    }
    tr_model_back(m);
    if (st == TR_OK) st = tr_model_linear(m, p, &w->q_b, m->ws.q_normed, m->ws.q, err);
    if (st != TR_OK) return st;

    tr_note(m, tr_work_heads(tr_pass_sums(m, p).n_absorbed, m->ops, &w->w_uk_t,
                             (double)p->n * heads * c->qk_rope_head_dim));
    return TR_RUN(m, mla_query, err, .rows = &p->rows, .q = m->ws.q, .n_heads = heads,
                  .d_nope = c->qk_nope_head_dim, .d_rope = c->qk_rope_head_dim,
                  .d_latent = c->kv_lora_rank, .rope = m->rope, .w_uk_t = &w->w_uk_t,
                  .q_absorbed = p->plan->flags & TR_PLAN_HAS_ABSORBED ? m->ws.q_absorbed : NULL);
}

/* Scores of rows [i, i + n_row) against the keys that `first` and `last` leave. */
static tr_status score(tr_model *m, const tr_pass *p, tr_kv_layer kv, int i, int n_row,
                       const int32_t *first, const int32_t *last, tr_await keys, tr_err *err)
{
    const tr_config *c = m->config;
    const tr_row_sums sums = tr_pass_sums(m, p);
    const double pairs =
        first ? 0 : sums.scored_pairs * n_row / p->n_max; /* all: the first part's */
    tr_note(m, tr_work_index_logits(pairs, first ? 0 : sums.scored_keys, c->index_n_heads, &kv));
    return TR_RUN(m, index_logits, err, .rows = &p->rows, .q = m->ws.index_q8, .w = m->ws.index_w,
                  .n_heads = c->index_n_heads, .k = c->index_topk, .kv = kv, .first = first,
                  .last = last, .i_row = i, .n_row = n_row, .score = m->ws.score,
                  .ld = (size_t)m->max_model_len, .keys = keys);
}

static tr_status select_rows(tr_model *m, const tr_pass *p, int scored, int i, int n_row, int layer,
                             tr_err *err)
{
    const size_t ld = (size_t)m->max_model_len;
    if (scored)
        tr_model_show(m, "index_logits", layer, i, n_row, p->plan->max_context, ld, m->ws.score);
    tr_note(m, tr_work_topk(n_row, tr_pass_sums(m, p).scored_pairs * n_row / p->n_max,
                            m->config->index_topk));
    return TR_RUN(m, topk, err, .rows = &p->rows, .score = scored ? m->ws.score : NULL, .ld = ld,
                  .k = m->config->index_topk, .i_row = i, .n_row = n_row,
                  .position = m->ws.top_position, .cache_row = m->ws.top_row,
                  .n_selected = m->ws.n_selected);
}

/* By n_max, as everything about lists: a record serves other numbers of rows too. */
bool tr_attention_shares(const tr_model *m, const tr_pass *p)
{
    enum { ROWS_EACH = 8 };
    const int tp = tr_comm_size(m->groups.attn_tp);
    return tp > 1 && p->n_max >= ROWS_EACH * tp;
}

/* Rows of a stripe: they fit the score buffer. Where the attention group shares the work (parallel.md 3.9) stripe i is member
 * i mod tp's, small enough that everybody has some. A few rows are not worth the exchange. */
static int stripe_of(const tr_model *m, const tr_pass *p, int *members)
{
    enum { MOST_ROWS = 512 };
    const int tp = tr_comm_size(m->groups.attn_tp), each = (p->n_max + tp - 1) / tp;
    const int shared = tr_attention_shares(m, p);
    int stripe = m->n_stripe;

    *members = shared ? tp : 1;
    if (!shared) return stripe;
    if (stripe > MOST_ROWS) stripe = MOST_ROWS;
    return stripe < each ? stripe : each;
}

/* Lists of rows [i, ..), a stripe from every member, to all members. */
static tr_status gather_lists(tr_model *m, const tr_pass *p, int i, int stripe, tr_err *err)
{
    tr_comm *tp = m->groups.attn_tp;
    const size_t k = (size_t)m->config->index_topk;
    const int own = i + tr_comm_rank(tp) * stripe;
    const struct {
        int32_t *list;
        size_t width;
    } lists[] = {{m->ws.top_position, k}, {m->ws.top_row, k}, {m->ws.n_selected, 1}};
    size_t bytes[TR_MEMBERS_MAX];
    tr_status st = TR_OK;
    tr_ticket ticket = {0};

    for (int l = 0; l < 3 && st == TR_OK; l++) {
        int32_t *list = lists[l].list;
        for (int j = 0; j < tr_comm_size(tp); j++) {
            int n = p->n_max - (i + j * stripe);
            n = n < 0 ? 0 : n < stripe ? n : stripe;
            bytes[j] = (size_t)n * lists[l].width * sizeof *list;
        }
        const size_t at = own < p->n_max ? (size_t)own : (size_t)i;
        st = tr_comm_all_gather(tp, list + at * lists[l].width, list + (size_t)i * lists[l].width,
                                bytes, &ticket, err);
        st = tr_model_await(m, tp, st, ticket, (double)bytes[tr_comm_rank(tp)], err);
    }
    return st;
}

/* Queries of the indexer: index_q8 [n, index_heads, index_dim]; index_w [n, index_heads] is complete now. */
static tr_status index_queries(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                               tr_kv_layer kv, tr_err *err)
{
    const tr_config *c = m->config;
    /* Where lanes fork make_queries has projected them. */
    const tr_status st = tr_model_forks(m, p) ? TR_OK : project_index_queries(m, p, w, err);
    if (st != TR_OK) return st;
    tr_note(m, tr_work_index_query(p->n, c->index_n_heads, c->index_head_dim, c->qk_rope_head_dim,
                                   kv.dtype));
    return TR_RUN(m, index_query, err, .rows = &p->rows, .q = m->ws.index_q, .w = m->ws.index_w,
                  .n_heads = c->index_n_heads, .d_index = c->index_head_dim,
                  .d_rope = c->qk_rope_head_dim, .cache_dtype = kv.dtype, .rope = m->rope,
                  .out = m->ws.index_q8);
}

/* Index scores and selection, in stripes of rows so that the scores stay within their buffer. Dense rows select nothing: a
 * step of dense rows alone needs no lists, but the keys' exchange ends here all the same. While the other members' keys of this
 * step are on their way the first stripe's rows meet those that were in the cache before. */
static tr_status select_keys(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                             tr_kv_layer kv, exchange *x, int layer, tr_err *err)
{
    const int scored = (p->plan->flags & TR_PLAN_HAS_SELECTION) != 0;
    const int early = scored && p->split && !x->here;
    int members;
    const int stripe = stripe_of(m, p, &members), me = tr_comm_rank(m->groups.attn_tp) % members;
    const int32_t *before = p->rows.begin;
    tr_status st = scored ? index_queries(m, p, w, kv, err) : TR_OK;

    const int i_first = me * stripe,
              n_first = p->n_max - i_first < stripe ? p->n_max - i_first : stripe;
    if (st == TR_OK && early && n_first > 0)
        st = score(m, p, kv, i_first, n_first, NULL, before, (tr_await){0}, err);
    if (st == TR_OK && !x->here) st = await_rows(m, m->share_key, &x->keys, err);
    if (!(p->plan->flags & TR_PLAN_HAS_ABSORBED)) return st;

    for (int i = 0; i < p->n_max && st == TR_OK; i += stripe * members) {
        const int own = i + me * stripe, n_row = p->n_max - own < stripe ? p->n_max - own : stripe;
        if (scored && n_row > 0)
            st = score(m, p, kv, own, n_row, early && i == 0 ? before : NULL, NULL, x->keys, err);
        if (st == TR_OK && n_row > 0) st = select_rows(m, p, scored, own, n_row, layer, err);
        if (st == TR_OK && members > 1) st = gather_lists(m, p, i, stripe, err);
    }
    if (st == TR_OK)
        tr_model_show(m, "index_topk", layer, 0, p->n, m->config->index_topk,
                      (size_t)m->config->index_topk, m->ws.top_position);
    return st;
}

/* Positions between neighbouring rows of the dense spans; 0: not the same in all of them. */
static int dense_step(const tr_pass *p)
{
    const tr_span *span = tr_plan_spans(p->plan);
    int step = 0;
    for (int i = 0; i < p->plan->n_spans; i++) {
        if (!(span[i].flags & TR_SPAN_DENSE) || span[i].n_rows < 2) continue;
        const int own = span[i].flags & TR_SPAN_PART ? 1 + span[i].skip : 1;
        if (step && own != step) return 0;
        step = own;
    }
    return step ? step : 1;
}

/* Keys of all spans' dense rows, each rounded up to 128; 0: the host does not know, or the step may be a record, which serves
 * others with more of them. */
static int64_t dense_keys(const tr_model *m, const tr_pass *p)
{
    const int most = m->config->index_topk;
    const tr_span *span = tr_plan_spans(p->plan);
    int64_t sum = 0;
    for (int i = 0; i < p->plan->n_spans; i++) {
        if (!(span[i].flags & TR_SPAN_DENSE) || span[i].n_rows == 0) continue;
        if (span[i].position < 0) return 0;
        if (span[i].position >= most) continue; /* a part behind the dense rows */
        const int skip = span[i].flags & TR_SPAN_PART ? span[i].skip : 0,
                  last = span[i].position + (span[i].n_rows - 1) * (1 + skip);
        sum += ((last < most ? last + 1 : most) + 127) / 128 * 128;
    }
    return p->n == p->n_max && !tr_graph_fits(m, p) ? sum : 0;
}

/* attended [n, heads, v]: absorbed rows over their selection, dense rows over all keys up to their own. */
static tr_status attend(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                        tr_kv_layer kv, exchange *x, tr_err *err)
{
    const tr_config *c = m->config;
    const int heads = m->heads, d_latent = c->kv_lora_rank, d_v = c->v_head_dim;
    const tr_row_sums sums = tr_pass_sums(m, p);
    const int step = dense_step(p);
    tr_status st = x->here ? TR_OK : await_rows(m, m->share_latent, &x->latents, err);

    if (st == TR_OK && (p->plan->flags & TR_PLAN_HAS_ABSORBED)) {
        tr_note(m, tr_work_sparse_mla(sums.selected, heads, &kv));
        st = TR_RUN(m, sparse_mla, err, .rows = &p->rows, .q = m->ws.q_absorbed, .n_heads = heads,
                    .scale = m->attention_scale, .cache_row = m->ws.top_row,
                    .position = m->ws.top_position, .k = c->index_topk, .kv = kv,
                    .latents = x->latents, .out = m->ws.u, .workspace = m->ws.scratch,
                    .workspace_bytes = m->ws.scratch_bytes);
        tr_note(m, tr_work_heads(sums.n_absorbed, m->ops, &w->w_uv, 0));
        tr_quantised codes = {0}; /* of all rows' heads: dense rows bring theirs as numbers */
        if (!(p->plan->flags & TR_PLAN_HAS_DENSE)) codes = tr_model_codes(m, &w->o, m->ws.attended);
        if (st == TR_OK)
            st = TR_RUN(m, mla_value, err, .rows = &p->rows, .u = m->ws.u, .n_heads = heads,
                        .d_latent = d_latent, .d_v = d_v, .w_uv = &w->w_uv, .out = m->ws.attended,
                        .q = codes.q, .q_scale = codes.scale, .scale_pow2 = m->config->scale_ue8m0);
    }
    tr_note(m, tr_work_dense_mha(sums.dense_pairs, sums.dense_keys, m->ops, &w->w_uk, &w->w_uv,
                                 c->qk_rope_head_dim, &kv));
    if (st == TR_OK && (p->plan->flags & TR_PLAN_HAS_DENSE))
        st = TR_RUN(m, dense_mha, err, .rows = &p->rows, .q = m->ws.q, .n_heads = heads,
                    .d_nope = c->qk_nope_head_dim, .d_rope = c->qk_rope_head_dim, .d_v = d_v,
                    .scale = m->attention_scale, .w_uk = &w->w_uk, .w_uv = &w->w_uv, .kv = kv,
                    .latents = x->latents, .out = m->ws.attended,
                    .n_spans = p->plan->n_spans + p->n_max - p->n,
                    .max_context =
                        p->rows.max_context < c->index_topk ? p->rows.max_context : c->index_topk,
                    .row_step = step, .n_keys = dense_keys(m, p),
                    .workspace = step ? m->ws.scratch : NULL,
                    .workspace_bytes = step ? m->ws.scratch_bytes : 0);
    return st;
}

tr_status tr_attention_forward(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                               tr_kv_layer kv, int layer, tr_err *err)
{
    exchange x = {.here = m->no_overlap};
    /* Gathers are one behind the other, and keys are needed first. Rows that are pushed are not: the longer way starts first,
     * before the products of the queries fill the device. No lanes fork under context parallelism. */
    const bool latents_first = tr_share_pushes(m->share_latent);
    const bool third = tr_model_forks_again(m, p, m->ws.normed);
    tr_status st = tr_model_fork(m, p, err);
    if (st == TR_OK && latents_first) st = write_latents(m, p, w, kv, err);
    if (st == TR_OK) st = write_index_keys(m, p, w, kv, err);
    if (st == TR_OK && third) st = tr_model_fork_again(m, err);
    if (st == TR_OK) st = weigh_index_heads(m, p, w, err); /* before the latents, which can wait */
    if (!third) tr_model_back(m);
    if (st == TR_OK && third) st = tr_model_side_joins_again(m, err);
    if (st == TR_OK && !latents_first) st = write_latents(m, p, w, kv, err);
    tr_model_back(m);
    if (st == TR_OK && x.here) st = await_rows(m, m->share_key, &x.keys, err);
    if (st == TR_OK && x.here) st = await_rows(m, m->share_latent, &x.latents, err);
    if (st == TR_OK) st = make_queries(m, p, w, err);
    if (tr_model_forks(m, p)) m->lane = TR_LANE_SIDE; /* behind the keys, beside q_b */
    if (st == TR_OK) st = select_keys(m, p, w, kv, &x, layer, err);
    if (st == TR_OK) st = tr_model_join(m, p, err);
    if (st == TR_OK && third) st = tr_model_join_again(m, err);
    if (st == TR_OK) st = attend(m, p, w, kv, &x, err);
    if (st == TR_OK)
        st = tr_model_linear(m, p, &w->o, m->ws.attended, m->ws.block_out, err); /* [n, hidden] */
    return st;
}
