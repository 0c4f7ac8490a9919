#include <config.h>

#include "model/estimate.h"

#include "base/size.h"
#include "model/cache.h"
#include "model/tensors.h"

/* ---- weights -------------------------------------------------------------------------------------------------------- */

/* rows x columns of a tensor of this role, in the format in which a checkpoint has it. A vector counts as fp32. */
static uint64_t bytes_of(const tr_config *c, tr_role role, int rows, int columns)
{
    tr_wanted w;
    tr_wanted_get(&w, c, role, 0, 0);
    uint64_t n = (uint64_t)rows * (uint64_t)columns;
    if (w.rank == 1) return 4 * n;
    if (w.class == TR_CLASS_Q && c->fp8)
        return n + 4 * tr_ceil_div((size_t)rows, TR_SCALE_BLOCK) *
                       tr_ceil_div((size_t)columns, TR_SCALE_BLOCK);
    return 2 * n;
}

static uint64_t whole(const tr_config *c, tr_role role)
{
    tr_wanted w;
    tr_wanted_get(&w, c, role, 0, 0);
    return bytes_of(c, role, (int)w.shape[0], w.rank == 1 ? 1 : (int)w.shape[1]);
}

static uint64_t attention_bytes(const tr_config *c, int heads)
{
    static const tr_role copies[] = {TR_ROLE_INPUT_NORM,   TR_ROLE_POST_NORM,   TR_ROLE_Q_A,
                                     TR_ROLE_Q_A_NORM,     TR_ROLE_KV_A,        TR_ROLE_KV_A_NORM,
                                     TR_ROLE_INDEX_Q,      TR_ROLE_INDEX_K,     TR_ROLE_INDEX_W,
                                     TR_ROLE_INDEX_K_NORM, TR_ROLE_INDEX_K_BIAS};
    uint64_t n =
        bytes_of(c, TR_ROLE_Q_B, heads * (c->qk_nope_head_dim + c->qk_rope_head_dim),
                 c->q_lora_rank) +
        bytes_of(c, TR_ROLE_KV_B, heads * (c->qk_nope_head_dim + c->v_head_dim), c->kv_lora_rank) +
        bytes_of(c, TR_ROLE_O, c->hidden_size, heads * c->v_head_dim);
    for (size_t i = 0; i < sizeof copies / sizeof *copies; i++)
        n += whole(c, copies[i]);
    return n;
}

/* Gate, up and down of one MLP of this width. */
static uint64_t mlp_bytes(const tr_config *c, tr_role gate, tr_role down, int inner)
{
    return 2 * bytes_of(c, gate, inner, c->hidden_size) + bytes_of(c, down, c->hidden_size, inner);
}

typedef struct layer_bytes {
    uint64_t attention, dense, shared, routed, router, second_form;
} layer_bytes;

static layer_bytes bytes_of_layer(const tr_config *c, const tr_slice *s)
{
    return (layer_bytes){
        .attention = attention_bytes(c, s->heads.n),
        .dense = mlp_bytes(c, TR_ROLE_GATE_PROJ, TR_ROLE_DOWN_PROJ, s->dense_inner.n),
        .shared = c->n_shared_experts > 0
                      ? mlp_bytes(c, TR_ROLE_SHARED_GATE, TR_ROLE_SHARED_DOWN, s->shared_inner.n)
                      : 0,
        .routed = (uint64_t)s->experts.n *
                  mlp_bytes(c, TR_ROLE_EXPERT_GATE, TR_ROLE_EXPERT_DOWN, s->expert_inner.n),
        .router = whole(c, TR_ROLE_ROUTER) + whole(c, TR_ROLE_ROUTER_BIAS),
        .second_form = bytes_of(c, TR_ROLE_KV_B, s->heads.n * c->qk_nope_head_dim, c->kv_lora_rank),
    };
}

void tr_estimate_weights(tr_weight_bytes *out, const tr_config *config, const tr_slice *slice)
{
    layer_bytes one = bytes_of_layer(config, slice);
    uint64_t n = (uint64_t)slice->layers.n, n_moe = 0;

    for (int i = 0; i < slice->layers.n; i++)
        n_moe += tr_layer_is_moe(config, slice->layers.begin + i);
    *out = (tr_weight_bytes){.attention = n * one.attention,
                             .dense = (n - n_moe) * one.dense,
                             .shared = n_moe * one.shared,
                             .routed = n_moe * one.routed,
                             .router = n_moe * one.router,
                             .second_form = n * one.second_form};
    if (slice->embed) out->embed = whole(config, TR_ROLE_EMBED);
    if (slice->head)
        out->head = whole(config, TR_ROLE_NORM) +
                    bytes_of(config, TR_ROLE_HEAD, slice->vocab.n, config->hidden_size);
    if (slice->head && config->num_nextn_predict_layers > 0) {
        out->mtp = one.attention + one.shared + one.routed + one.router + one.second_form +
                   whole(config, TR_ROLE_EH) + 3 * whole(config, TR_ROLE_ENORM);
        if (!slice->embed) out->mtp += whole(config, TR_ROLE_EMBED);
    }
}

uint64_t tr_weight_bytes_total(const tr_weight_bytes *w)
{
    return w->attention + w->dense + w->shared + w->routed + w->router + w->embed + w->head +
           w->mtp + w->second_form;
}

/* ---- cache and workspace -------------------------------------------------------------------------------------------- */

uint64_t tr_estimate_cache_bytes(const tr_config *config, const tr_slice *slice, tr_dtype kv)
{
    return tr_cache_page_bytes(config, slice->layers.n, kv) / TR_PAGE_TOKENS;
}

uint64_t tr_estimate_workspace(const tr_config *config, const tr_slice *slice, int rows_max,
                               int max_model_len, int act_bytes)
{
    const tr_config *c = config;
    const uint64_t n = (uint64_t)rows_max, heads = (uint64_t)slice->heads.n;
    const uint64_t stripe = 64u << 20; /* index scores, and logits: as model/memory.c bounds them */
    const uint64_t d_latent = (uint64_t)(c->kv_lora_rank + c->qk_rope_head_dim),
                   hidden = (uint64_t)c->hidden_size, k = (uint64_t)c->num_experts_per_tok;
    uint64_t inner = (uint64_t)slice->dense_inner.n;
    if (inner < (uint64_t)slice->shared_inner.n) inner = (uint64_t)slice->shared_inner.n;

    /* Numbers per row: residual, norm, block; latents; q, absorbed, attended; MLP; experts' results. */
    uint64_t acts = 3 * hidden + 2 * (uint64_t)c->q_lora_rank + d_latent +
                    (uint64_t)c->index_head_dim +
                    2 * (uint64_t)(c->index_n_heads * c->index_head_dim) +
                    heads * (uint64_t)(c->qk_nope_head_dim + c->qk_rope_head_dim + c->v_head_dim +
                                       2 * c->kv_lora_rank + c->qk_rope_head_dim) +
                    3 * inner + k * (hidden + 3 * (uint64_t)slice->expert_inner.n);
    /* fp32 and int32 whatever the activations are: router, selection, index weights. */
    uint64_t words = 2 * (uint64_t)c->index_topk + (uint64_t)c->n_routed_experts + 3 * k +
                     (uint64_t)c->index_n_heads;
    uint64_t scores = n * (uint64_t)max_model_len * 4,
             logits = slice->head ? n * (uint64_t)slice->vocab.n * 4 : 0;
    return n * (acts * (uint64_t)act_bytes + words * 4) + (scores < stripe ? scores : stripe) +
           (logits < stripe ? logits : stripe) +
           (uint64_t)max_model_len * (uint64_t)c->qk_rope_head_dim * 4;
}

/* ---- traffic -------------------------------------------------------------------------------------------------------- */

static tr_wire cache_rows(const tr_config *c, tr_dtype kv)
{
    return (tr_wire){
        .key = (int)(tr_index_page_bytes(kv, c->index_head_dim) / TR_PAGE_TOKENS),
        .latent = (int)tr_kv_row_bytes(kv, c->kv_lora_rank, c->qk_rope_head_dim),
    };
}

tr_wire tr_wire_cpu(const tr_config *config, tr_dtype kv)
{
    tr_wire w = cache_rows(config, kv);
    w.act = 4;
    w.row_out = w.row_back = 4 * config->hidden_size;
    w.row_ids = 8 * config->num_experts_per_tok;
    return w;
}

tr_wire tr_wire_gpu(const tr_config *config, tr_dtype kv)
{
    tr_wire w = cache_rows(config, kv);
    w.act = 2;
    w.row_out =
        config->hidden_size + 4 * (int)tr_ceil_div((size_t)config->hidden_size, TR_SCALE_BLOCK);
    w.row_ids = 6 * config->num_experts_per_tok;
    w.row_back = 2 * config->hidden_size;
    return w;
}

const char *tr_wire_op_name(tr_wire_op op)
{
    static const char *const name[] = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all",
                                       "send"};
    return name[op];
}

int tr_step_rows(const tr_grid_sizes *sizes, const tr_step_shape *step)
{
    return step->prefill ? (int)tr_ceil_div((size_t)step->rows, (size_t)sizes->cp) : step->rows;
}

typedef struct list {
    tr_traffic *out;
    int n;
} list;

/* `part`: bytes one member brings (all-gather, reduce-scatter: of n; all-reduce: the buffer; all-to-all: to everybody, the
 * own part included). */
static void add(list *l, const char *what, tr_grid_group group, tr_wire_op op, int n, double part)
{
    const double others = n - 1, f = others / n;
    tr_traffic t = {.what = what, .group = group, .op = op, .n = n, .given = part};

    if (n < 2) return;
    switch (op) {
    case TR_WIRE_ALL_REDUCE:
        t.sent = 2 * f * part;
        break;
    case TR_WIRE_ALL_GATHER:
        t.sent = others * part;
        break;
    case TR_WIRE_REDUCE_SCATTER:
        t.given = n * part;
        t.sent = others * part;
        break;
    case TR_WIRE_ALL_TO_ALL:
        t.sent = f * part;
        break;
    case TR_WIRE_SEND:
        t.sent = part;
        break;
    }
    l->out[l->n++] = t;
}

static int common_divisor(int a, int b)
{
    while (b) {
        int r = a % b;
        a = b;
        b = r;
    }
    return a;
}

/* n! / (k! (n-k)!) relative to another: C(a, k) / C(b, k), a <= b. */
static double choose_ratio(int a, int b, int k)
{
    double r = 1.0;
    for (int i = 0; i < k; i++)
        r *= a - i > 0 ? (double)(a - i) / (b - i) : 0.0;
    return r;
}

static double choose(int n, int k)
{
    double r = 1.0;
    if (k < 0 || k > n) return 0.0;
    for (int i = 1; i <= k; i++)
        r *= (double)(n - k + i) / i;
    return r;
}

double tr_estimate_distinct(const tr_config *config, int ep)
{
    const int groups = config->n_group, kept = config->topk_group, k = config->num_experts_per_tok;
    const int per_group = config->n_routed_experts / groups, pool = kept * per_group;
    double sum = 0.0;

    if (ep >= groups && ep % groups == 0) {
        /* A rank has experts of one group only: kept groups of ep / groups ranks can be hit. */
        int m = config->n_routed_experts / ep;
        return (double)kept * (ep / groups) * (1.0 - choose_ratio(pool - m, pool, k));
    }
    if (groups % ep == 0) {
        int mine = groups / ep; /* of which i are among the kept ones: hypergeometric */
        for (int i = 0; i <= mine && i <= kept; i++)
            sum += choose(kept, i) * choose(groups - kept, mine - i) / choose(groups, mine) *
                   (1.0 - choose_ratio(pool - i * per_group, pool, k));
        return ep * sum;
    }
    int m = config->n_routed_experts / ep, all = config->n_routed_experts;
    return ep *
           (1.0 - choose_ratio(all - m, all, k)); /* groups lie across ranks: without the limit */
}

/* How the rows of the members of MOE differ. */
typedef struct moe_rows {
    int block;  /* members of MOE */
    int share;  /* of them have the same rows */
    int rows;   /* each of these has */
    int brings; /* each member brings to an exchange */
    tr_grid_group sharers;
} moe_rows;

static moe_rows rows_of_block(const tr_grid_sizes *s, const tr_step_shape *step)
{
    const bool split = step->prefill && s->cp > 1;
    moe_rows r = {.block = s->ep * s->xt, .rows = tr_step_rows(s, step)};
    r.share = common_divisor(r.block, split ? s->tp : s->tp * s->cp);
    r.sharers = split || s->cp == 1 ? TR_GROUP_ATTN_TP : TR_GROUP_REPLICA;
    r.brings = (int)tr_ceil_div((size_t)r.rows, (size_t)r.share);
    return r;
}

int64_t tr_estimate_expert_rows(const tr_grid_sizes *sizes, const tr_step_shape *step)
{
    moe_rows r = rows_of_block(sizes, step);
    return (int64_t)r.rows * (r.block / r.share);
}

/* Rows of a replica that a step has room for: a power of two, as the records of decode steps have. */
static int room_for(int rows)
{
    int n = 1;
    while (n < rows)
        n *= 2;
    return n;
}

static tr_moe_form form_of(tr_moe_form form, const tr_grid_sizes *s, const tr_step_shape *step)
{
    enum { FEW = 256, FEW_OF_ALL = 1024 };
    const moe_rows r = rows_of_block(s, step);
    const int64_t all = (int64_t)room_for(r.rows) * (r.block / r.share);
    if (form != TR_MOE_FORM_AUTO) return form;
    if (s->ep * s->xt == s->tp) return TR_MOE_FORM_REDUCE;
    return !step->prefill && r.rows <= FEW && all <= FEW_OF_ALL ? TR_MOE_FORM_TELL
                                                                : TR_MOE_FORM_EXCHANGE;
}

/* All rows to all members, if they do not have them, and of every row the sums of all members back. */
static void tell_traffic(list *l, const moe_rows *r, const tr_wire *w)
{
    const int replicas = r->block / r->share, each = room_for(r->rows),
              told = (int)tr_ceil_div((size_t)each, (size_t)r->share);
    const double of_replica = replicas > 1 ? (double)told * r->share : each;

    if (replicas > 1)
        add(l, "rows to the experts", TR_GROUP_MOE, TR_WIRE_ALL_GATHER, r->block,
            (double)told * (w->row_out + w->row_ids));
    if (r->share > 1)
        add(l, "sums back", TR_GROUP_MOE, TR_WIRE_ALL_GATHER, r->block,
            of_replica * replicas * w->row_back);
    else
        add(l, "sums back", TR_GROUP_MOE, TR_WIRE_ALL_TO_ALL, r->block,
            of_replica * replicas * w->row_back);
}

static void moe_traffic(list *l, const tr_config *c, const tr_grid_sizes *s, const tr_wire *w,
                        const tr_step_shape *step, tr_moe_form form)
{
    const moe_rows r = rows_of_block(s, step);
    const double row = (double)c->hidden_size * w->act, own_rows = (double)r.rows / s->tp,
                 own_most = (double)tr_ceil_div((size_t)r.rows, (size_t)s->tp);
    const bool shared_partial =
        tr_slice_parts(c->n_shared_experts * c->moe_intermediate_size, s->tp) > 1;
    bool shared_summed = false;

    switch (form_of(form, s, step)) {
    case TR_MOE_FORM_AUTO:
    case TR_MOE_FORM_REDUCE:
        /* MOE is ATTN_TP: one sum for the experts' and the shared expert's parts. */
        add(l, "experts", TR_GROUP_ATTN_TP, TR_WIRE_ALL_REDUCE, s->tp, r.rows * row);
        shared_summed = true;
        break;
    case TR_MOE_FORM_GATHER:
        add(l, "rows to the experts", TR_GROUP_MOE, TR_WIRE_ALL_GATHER, r.block,
            (double)r.brings * (w->row_out + w->row_ids));
        add(l, "sums back", TR_GROUP_MOE, TR_WIRE_REDUCE_SCATTER, r.block,
            (double)r.brings * w->row_back);
        add(l, "rows to those who share them", r.sharers, TR_WIRE_ALL_GATHER, r.share,
            r.brings * row);
        break;
    case TR_MOE_FORM_TELL:
        tell_traffic(l, &r, w);
        add(l, "shared expert", TR_GROUP_ATTN_TP, TR_WIRE_ALL_REDUCE, s->tp, r.rows * row);
        shared_summed = true;
        break;
    case TR_MOE_FORM_EXCHANGE:
        /* Every member of ATTN_TP takes its part of the rows: between the halves of the shared expert's sum the experts'
         * sums come in (src/model/exchange.c). */
        add(l, "rows to the experts", TR_GROUP_MOE, TR_WIRE_ALL_TO_ALL, r.block,
            own_rows * tr_estimate_distinct(c, s->ep) * s->xt * (w->row_out + w->row_ids));
        add(l, "sums back", TR_GROUP_MOE, TR_WIRE_ALL_TO_ALL, r.block,
            own_rows * tr_estimate_distinct(c, s->ep) * s->xt * w->row_back);
        add(l, "shared expert", TR_GROUP_ATTN_TP, TR_WIRE_REDUCE_SCATTER, s->tp, own_most * row);
        add(l, "experts", TR_GROUP_ATTN_TP, TR_WIRE_ALL_GATHER, s->tp, own_most * row);
        shared_summed = true;
        break;
    }
    /* The shared expert's parts enter the routed experts' sum where all of its members are in it. */
    if (shared_partial && !shared_summed)
        add(l, "shared expert", TR_GROUP_ATTN_TP, TR_WIRE_ALL_REDUCE, s->tp, r.rows * row);
}

int tr_estimate_layer_traffic(tr_traffic out[TR_TRAFFIC_MAX], const tr_config *config,
                              const tr_grid_sizes *sizes, const tr_wire *wire,
                              const tr_step_shape *step, tr_moe_form form, bool moe)
{
    const double rows = tr_step_rows(sizes, step), row = (double)config->hidden_size * wire->act;
    list l = {.out = out};

    if (step->prefill) {
        add(&l, "index keys", TR_GROUP_ATTN_CP, TR_WIRE_ALL_GATHER, sizes->cp, rows * wire->key);
        add(&l, "latents", TR_GROUP_ATTN_CP, TR_WIRE_ALL_GATHER, sizes->cp, rows * wire->latent);
    }
    add(&l, "o_proj", TR_GROUP_ATTN_TP, TR_WIRE_ALL_REDUCE, sizes->tp, rows * row);
    if (moe)
        moe_traffic(&l, config, sizes, wire, step, form);
    else if (tr_slice_parts(config->intermediate_size, sizes->tp) > 1)
        add(&l, "dense MLP", TR_GROUP_ATTN_TP, TR_WIRE_ALL_REDUCE, sizes->tp, rows * row);
    return l.n;
}

int tr_estimate_step_traffic(tr_traffic out[TR_TRAFFIC_MAX], const tr_config *config,
                             const tr_grid_sizes *sizes, const tr_wire *wire,
                             const tr_step_shape *step)
{
    const int rows = tr_step_rows(sizes, step);
    const double row = (double)config->hidden_size * wire->act;
    const double part = (double)tr_ceil_div((size_t)rows, (size_t)sizes->tp) * row;
    list l = {.out = out};

    /* Each member of ATTN_TP sends its share of the rows; they meet again behind the boundary (parallel.md 2.5). */
    add(&l, "to the next stage", TR_GROUP_PP, TR_WIRE_SEND, sizes->pp, part);
    if (sizes->pp > 1)
        add(&l, "behind the boundary", TR_GROUP_ATTN_TP, TR_WIRE_ALL_GATHER, sizes->tp, part);
    if (step->prefill) /* rows for the head, from whoever has them */
        add(&l, "rows of the head", TR_GROUP_ATTN_CP, TR_WIRE_ALL_GATHER, sizes->cp,
            step->sampled * row / sizes->cp);
    add(&l, "greedy token", TR_GROUP_ATTN_TP, TR_WIRE_ALL_REDUCE, sizes->tp, step->sampled * 8.0);
    return l.n;
}
