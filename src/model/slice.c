#include <config.h>

#include "model/slice.h"

#include <stdint.h>

#include "model/problems.h"
#include "model/tensors.h"

/* Part i of n equal ones; n divides width. */
static tr_range part(int width, int i, int n)
{
    return (tr_range){.begin = width / n * i, .n = width / n};
}

/* Part i of n as equal ones as there can be. */
static tr_range uneven_part(int width, int i, int n)
{
    int begin = (int)((int64_t)width * i / n), end = (int)((int64_t)width * (i + 1) / n);
    return (tr_range){.begin = begin, .n = end - begin};
}

tr_range tr_slice_vocab(const tr_config *config, int i, int n)
{
    return uneven_part(config->vocab_size, i, n);
}

int tr_slice_parts(int width, int n)
{
    int best = 1;
    if (width % TR_SCALE_BLOCK != 0) return 1;
    for (int parts = 2; parts <= n; parts++)
        if (n % parts == 0 && width / TR_SCALE_BLOCK % parts == 0) best = parts;
    return best;
}

/* A width of the MLPs over the n members of ATTN_TP. n / parts neighbours hold the same part; the first of them adds. */
static tr_range cut_inner(int width, int i, int n, int *partial, int *adds)
{
    int parts = tr_slice_parts(width, n), copies = n / parts;
    *partial = parts > 1;
    *adds = i % copies == 0;
    return part(width, i / copies, parts);
}

tr_grid_limits tr_slice_limits(const tr_config *config)
{
    return (tr_grid_limits){.layers = config->num_hidden_layers,
                            .heads = config->num_attention_heads,
                            .experts = config->n_routed_experts,
                            .expert_inner = config->moe_intermediate_size,
                            .vocab = config->vocab_size};
}

static void check(const tr_config *c, const tr_grid_sizes *n, tr_problems *p)
{
    if (c->num_attention_heads % n->tp != 0)
        tr_problem(p, "%d attention heads do not divide by tp %d", c->num_attention_heads, n->tp);
    if (c->vocab_size < n->tp)
        tr_problem(p, "a vocabulary of %d is less than tp %d", c->vocab_size, n->tp);
    if (c->n_routed_experts % n->ep != 0)
        tr_problem(p, "%d experts do not divide by ep %d", c->n_routed_experts, n->ep);
    if (c->moe_intermediate_size % n->xt != 0)
        tr_problem(p, "expert width %d does not divide by moe-tp %d", c->moe_intermediate_size,
                   n->xt);
    if (c->num_hidden_layers < n->pp)
        tr_problem(p, "%d layers are fewer than the %d pipeline stages", c->num_hidden_layers,
                   n->pp);
}

tr_status tr_slice_make(tr_slice *out, const tr_config *config, const tr_grid *grid, tr_err *err)
{
    const tr_grid_sizes *n = &grid->size;
    const tr_coord *at = &grid->at;
    const int shared = config->n_shared_experts * config->moe_intermediate_size;
    tr_problems p = {0};
    int first = 0, last = 0;

    *out = (tr_slice){0};
    check(config, n, &p);
    if (!p.n) tr_grid_layers(grid, config->num_hidden_layers, &first, &last);
    if (!p.n && (first < 0 || first >= last || last > config->num_hidden_layers))
        tr_problem(&p, "stage %d would own layers %d to %d of %d", at->pp, first, last - 1,
                   config->num_hidden_layers);
    if (p.n) return tr_problems_end(&p, TR_E_USAGE, "the grid does not fit the model", err);

    out->layers = (tr_range){.begin = first, .n = last - first};
    out->heads = part(config->num_attention_heads, at->tp, n->tp);
    out->experts = part(config->n_routed_experts, at->ep, n->ep);
    out->expert_inner = part(config->moe_intermediate_size, at->xt, n->xt);
    out->dense_inner =
        cut_inner(config->intermediate_size, at->tp, n->tp, &out->dense_partial, &out->dense_adds);
    out->shared_inner = cut_inner(shared, at->tp, n->tp, &out->shared_partial, &out->shared_adds);
    out->vocab = tr_slice_vocab(config, at->tp, n->tp);
    out->head_partial = n->tp > 1;
    out->embed = at->pp == 0;
    out->head = at->pp == n->pp - 1;
    out->attention_partial = n->tp > 1;
    /* With mdp > 1 each block of ep x xt ranks holds all experts and serves its own rows (parallel.md 1.1). */
    out->moe_partial = n->ep * n->xt > 1;
    return TR_OK;
}

tr_dims tr_slice_dims(const tr_config *c, const tr_slice *slice, const tr_grid_sizes *sizes)
{
    tr_dims dims = {.d_model = c->hidden_size,
                    .d_q_latent = c->q_lora_rank,
                    .d_latent = c->kv_lora_rank,
                    .d_rope = c->qk_rope_head_dim,
                    .d_nope = c->qk_nope_head_dim,
                    .d_v = c->v_head_dim,
                    .d_index = c->index_head_dim,
                    .k = c->index_topk,
                    .n_parts = slice->head && slice->head_partial ? sizes->tp : 1,
                    .n_moe_members = sizes->ep * sizes->xt};

    for (int i = 0; i < slice->layers.n; i++)
        if (tr_layer_is_moe(c, slice->layers.begin + i)) dims.n_experts = c->n_routed_experts;
    return dims;
}

int tr_slice_misaligned(const tr_config *config, const tr_grid_sizes *sizes,
                        tr_misaligned out[TR_MISALIGNED_MAX])
{
    const int heads = config->num_attention_heads, expert = config->moe_intermediate_size;
    /* The widths of the dense MLP and the shared expert are never cut off the grid: tr_slice_parts. */
    const tr_misaligned cut[TR_MISALIGNED_MAX] = {
        {"self_attn.q_b_proj.weight", "rows",
         heads * (config->qk_nope_head_dim + config->qk_rope_head_dim), sizes->tp},
        {"self_attn.kv_b_proj.weight", "rows",
         heads * (config->qk_nope_head_dim + config->v_head_dim), sizes->tp},
        {"self_attn.o_proj.weight", "columns", heads * config->v_head_dim, sizes->tp},
        {"mlp.experts.E.gate_proj.weight", "rows", expert, sizes->xt},
        {"mlp.experts.E.up_proj.weight", "rows", expert, sizes->xt},
        {"mlp.experts.E.down_proj.weight", "columns", expert, sizes->xt},
    };
    int n = 0;

    for (int i = 0; config->fp8 && i < TR_MISALIGNED_MAX; i++)
        if (cut[i].parts > 1 && cut[i].width / cut[i].parts % TR_SCALE_BLOCK != 0)
            out[n++] = cut[i];
    return n;
}
