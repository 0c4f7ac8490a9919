#include <config.h>

#include "model/slice.h"

#include "model/problems.h"
#include "model/tensors.h"

/* Part i of n equal ones; n divides width. */
static tr_range part(int width, int i, int n)
{
    return (tr_range){.begin = width / n * i, .n = width / n};
}

/* A width of the MLPs over the whole stage, on the grid of the scales (parallel.md 1.3 rule 4, 1.5). Where that does not
 * come out even everybody has all of it: cutting it over some members only would leave the others idle and still cost
 * the sum. */
static tr_range cut_inner(int width, int i, int n, int *partial)
{
    *partial = n > 1 && width % TR_SCALE_BLOCK == 0 && width / TR_SCALE_BLOCK % n == 0;
    return *partial ? part(width, i, n) : (tr_range){.begin = 0, .n = width};
}

tr_status tr_slice_make(tr_slice *out, const tr_config *config, const tr_grid *grid, tr_err *err)
{
    const tr_grid_sizes *n = &grid->size;
    const tr_coord *at = &grid->at;
    int stage = n->dp * n->cp * n->tp;
    int member = (at->dp * n->cp + at->cp) * n->tp + at->tp;
    tr_problems p = {0};

    *out = (tr_slice){0};
    if (config->num_attention_heads % n->tp != 0)
        tr_problem(&p, "%d attention heads do not divide by tp %d", config->num_attention_heads,
                   n->tp);
    if (config->n_routed_experts % n->ep != 0)
        tr_problem(&p, "%d experts do not divide by ep %d", config->n_routed_experts, n->ep);
    if (config->moe_intermediate_size % n->xt != 0)
        tr_problem(&p, "expert width %d does not divide by moe-tp %d",
                   config->moe_intermediate_size, n->xt);
    if (config->num_hidden_layers < n->pp)
        tr_problem(&p, "%d layers are fewer than the %d pipeline stages", config->num_hidden_layers,
                   n->pp);
    if (p.n) return tr_problems_end(&p, TR_E_USAGE, "the grid does not fit the model", err);

    int first, last;
    tr_grid_layers(grid, config->num_hidden_layers, &first, &last);
    out->layers = (tr_range){.begin = first, .n = last - first};
    out->heads = part(config->num_attention_heads, at->tp, n->tp);
    out->experts = part(config->n_routed_experts, at->ep, n->ep);
    out->expert_inner = part(config->moe_intermediate_size, at->xt, n->xt);
    out->dense_inner = cut_inner(config->intermediate_size, member, stage, &out->dense_partial);
    out->shared_inner = cut_inner(config->n_shared_experts * config->moe_intermediate_size, member,
                                  stage, &out->shared_partial);
    out->vocab = (tr_range){.begin = 0, .n = config->vocab_size};
    out->embed = at->pp == 0;
    out->head = at->pp == n->pp - 1;
    out->attention_partial = n->tp > 1;
    /* With mdp > 1 each block of ep x xt ranks holds all experts and serves its own rows (parallel.md 1.1). */
    out->moe_partial = n->ep * n->xt > 1;
    return TR_OK;
}
