/* Seconds of a step by a roofline (estimate.h): rates of one kind of GPU, operations with their bytes and flops. What it is
 * good for: which part of a step is large, how two grids compare. Kernels that reach less, imbalance of experts and everything
 * that overlaps are not in it. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "base/size.h"
#include "model/estimate.h"
#include "model/tensors.h"

static const tr_rates rates_h200 = {
    .name = "h200",
    .memory = 139.0 * (1 << 30),
    /* kernels.md 10, one H200, CUDA 13.0, 2026-11-21: read 4.48 TB/s, random 656-byte rows 1.06 TB/s; FP8 GEMMs 1250 to
     * 1507 TFLOP/s, bf16 812; index scores 986 to 1149; sparse attention 603 to 680 (chunks), 387 (decode, 128 rows). */
    .read = 4.48e12,
    .gather = 1.06e12,
    .fp8 = 1400e12,
    .bf16 = 812e12,
    .index = 1050e12,
    .mla_prefill = 640e12,
    .mla = 387e12,
    /* parallel.md 3.5: NVLink as collectives see it, one 400 Gb/s adapter per GPU. Latencies: kernels.md 5 (NCCL, 8 GPUs,
     * 20 to 24 us) and, between nodes, an assumption. */
    .link = 350e9,
    .net = 45e9,
    .link_latency = 22e-6,
    .net_latency = 40e-6,
    /* kernels.md 4.2 and 6: 15 launches a layer, 2.5 us above the floor each. */
    .kernel_latency = 2.5e-6,
    .kernels_per_layer = 15,
    .ranks_per_node = 8,
};

const tr_rates *tr_rates_find(const char *name)
{
    return strcmp(name, rates_h200.name) == 0 ? &rates_h200 : NULL;
}

bool tr_crosses_nodes(const tr_grid *grid, tr_grid_group group, int ranks_per_node)
{
    int n = tr_grid_group_size(grid, group);
    if (n < 2 || grid->world <= ranks_per_node) return false;
    /* Groups of a kind fill aligned blocks of n * stride ranks. A node's end inside a block parts one of its groups. */
    int stride = tr_grid_member(grid, group, 1) - tr_grid_member(grid, group, 0);
    if (group == TR_GROUP_LEAD) return (int64_t)(n - 1) * stride >= ranks_per_node; /* only one */
    return ranks_per_node % ((int64_t)n * stride) != 0;
}

static double larger(double a, double b)
{
    return a > b ? a : b;
}

/* rows through weights of n numbers of weight_bytes each. */
static double gemm(const tr_rates *r, double rows, double n, double weight_bytes, double flops)
{
    return larger(n * weight_bytes / r->read, 2.0 * rows * n / flops);
}

/* Keys a row of this step sees, on average, and those a request's rows see together. */
typedef struct keys {
    double each, all;
} keys;

static keys keys_of(const tr_step_shape *step)
{
    double before = (double)step->context;
    if (!step->prefill) return (keys){.each = before, .all = before * step->rows};
    return (keys){.each = before + 0.5 * (step->rows + 1), .all = before + step->rows};
}

static double attention_seconds(const tr_config *c, const tr_slice *s, const tr_wire *w,
                                const tr_rates *r, const tr_step_shape *step, double rows)
{
    const double q8 = c->fp8 ? 1.0 : 2.0, fp8 = c->fp8 ? r->fp8 : r->bf16;
    const double heads = s->heads.n, hidden = c->hidden_size, latent = c->kv_lora_rank;
    const double d_qk = c->qk_nope_head_dim + c->qk_rope_head_dim, d_v = c->v_head_dim;
    const double d_index = (double)c->index_n_heads * c->index_head_dim;
    const keys k = keys_of(step);
    const bool all_keys = (double)step->context + (step->prefill ? step->rows : 0) <= c->index_topk;
    const double seen = k.each < c->index_topk ? k.each : c->index_topk;
    double t = 0.0;

    t += gemm(r, rows, hidden * (c->q_lora_rank + latent + c->qk_rope_head_dim + c->index_head_dim),
              q8, fp8);
    t += gemm(r, rows, c->q_lora_rank * heads * d_qk, q8, fp8);
    t += gemm(r, rows, c->q_lora_rank * d_index, q8, fp8);
    t += gemm(r, rows, hidden * heads * d_v, q8, fp8);
    t += gemm(r, rows, heads * latent * (c->qk_nope_head_dim + d_v), 2.0, r->bf16);
    if (!all_keys) {
        t += larger(k.all * w->key / r->read, 2.0 * rows * d_index * k.each / r->index);
        t += 2.0 * rows * k.each * 4.0 / r->read; /* scores written and read once */
    }
    if (all_keys && step->prefill)
        t += 2.0 * rows * heads * seen * (d_qk + d_v) / r->mla_prefill;
    else if (step->prefill)
        t += 2.0 * rows * heads * seen * (2 * latent + c->qk_rope_head_dim) / r->mla_prefill;
    else
        t += larger(rows * seen * w->latent / r->gather,
                    2.0 * rows * heads * seen * (2 * latent + c->qk_rope_head_dim) / r->mla);
    return t;
}

static double mlp_seconds(const tr_config *c, const tr_rates *r, double rows, double inner)
{
    return gemm(r, rows, 3.0 * c->hidden_size * inner, c->fp8 ? 1.0 : 2.0,
                c->fp8 ? r->fp8 : r->bf16);
}

/* The rows that this rank's block serves, uniformly routed. */
static double experts_seconds(const tr_config *c, const tr_slice *s, const tr_grid_sizes *n,
                              const tr_rates *r, const tr_step_shape *step)
{
    const double block_rows = (double)tr_estimate_expert_rows(n, step);
    const double k = c->num_experts_per_tok, experts = c->n_routed_experts;
    const double hit = s->experts.n * (1.0 - pow(1.0 - k / experts, block_rows));
    const double matrix = 3.0 * c->hidden_size * s->expert_inner.n;
    const double flops = 2.0 * block_rows * k * s->experts.n / experts * matrix;
    return larger(hit * matrix * (c->fp8 ? 1.0 : 2.0) / r->read,
                  flops / (c->fp8 ? r->fp8 : r->bf16));
}

static double traffic_seconds(const tr_traffic *t, int n, const tr_grid *grid, const tr_rates *r)
{
    double seconds = 0.0;
    for (int i = 0; i < n; i++)
        seconds += tr_crosses_nodes(grid, t[i].group, r->ranks_per_node)
                       ? r->net_latency + t[i].sent / r->net
                       : r->link_latency + t[i].sent / r->link;
    return seconds;
}

/* Rank 0, who is in a group of every kind and holds as much as any. */
static bool place(tr_grid *grid, tr_slice *slice, const tr_config *config,
                  const tr_grid_sizes *sizes)
{
    int world = sizes->pp * sizes->dp * sizes->cp * sizes->tp;
    return tr_grid_make(grid, *sizes, 0, world, NULL) == TR_OK &&
           tr_slice_make(slice, config, grid, NULL) == TR_OK;
}

double tr_estimate_layer_seconds(const tr_config *config, const tr_grid_sizes *sizes,
                                 const tr_wire *wire, const tr_rates *rates,
                                 const tr_step_shape *step, bool moe)
{
    const double rows = tr_step_rows(sizes, step);
    tr_traffic traffic[TR_TRAFFIC_MAX];
    tr_slice s;
    tr_grid grid;

    if (!place(&grid, &s, config, sizes)) return 0.0;
    int n = tr_estimate_layer_traffic(traffic, config, sizes, wire, step, TR_MOE_FORM_AUTO, moe);
    double t = rates->kernels_per_layer * rates->kernel_latency +
               traffic_seconds(traffic, n, &grid, rates) +
               attention_seconds(config, &s, wire, rates, step, rows);
    /* Two norms: residual and block read, residual and rows written. */
    t += 2.0 * 4.0 * rows * config->hidden_size * wire->act / rates->read;
    if (!moe) return t + mlp_seconds(config, rates, rows, s.dense_inner.n);
    return t + mlp_seconds(config, rates, rows, s.shared_inner.n) +
           gemm(rates, rows, (double)config->hidden_size * config->n_routed_experts, 2.0,
                rates->bf16) +
           experts_seconds(config, &s, sizes, rates, step);
}

double tr_estimate_head_seconds(const tr_config *config, const tr_grid_sizes *sizes,
                                const tr_wire *wire, const tr_rates *rates,
                                const tr_step_shape *step)
{
    tr_traffic traffic[TR_TRAFFIC_MAX];
    tr_slice s;
    tr_grid grid;
    int n_head = 0;

    if (!place(&grid, &s, config, sizes)) return 0.0;
    int n = tr_estimate_step_traffic(traffic, config, sizes, wire, step);
    for (int i = 0; i < n; i++) /* hand-offs between stages are not the head's */
        if (traffic[i].group == TR_GROUP_ATTN_CP || traffic[i].op == TR_WIRE_ALL_REDUCE)
            traffic[n_head++] = traffic[i];
    return gemm(rates, step->sampled, (double)config->hidden_size * s.vocab.n, 2.0, rates->bf16) +
           4.0 * step->sampled * s.vocab.n / rates->read + 3.0 * rates->kernel_latency +
           traffic_seconds(traffic, n_head, &grid, rates);
}

/* ---- stages --------------------------------------------------------------------------------------------------------- */

/* Layers from `layer` on that fit `most` seconds, leaving one for each of the stages behind; the last stage adds `head`. */
static int fill(const tr_config *c, int layer, int stages_behind, double most, double dense,
                double moe, double head)
{
    double sum = stages_behind == 0 ? head : 0.0;
    int n = 0, room = c->num_hidden_layers - layer - stages_behind;
    while (n < room) {
        sum += tr_layer_is_moe(c, layer + n) ? moe : dense;
        if (n > 0 && sum > most) break;
        n++;
    }
    return n;
}

/* Do all layers find a place when no stage takes longer? stage_layers is filled in either way. */
static bool cut(const tr_config *c, int pp, double most, double dense, double moe, double head,
                int *stage_layers)
{
    int layer = 0;
    for (int i = 0; i < pp; i++) {
        stage_layers[i] = fill(c, layer, pp - 1 - i, most, dense, moe, head);
        layer += stage_layers[i];
    }
    return layer == c->num_hidden_layers;
}

void tr_estimate_stages(const tr_config *config, const tr_grid_sizes *sizes, int *stage_layers)
{
    /* One step for every command: 64 rows of each replica over 4096 keys. Decode, because that is where most steps are. */
    const tr_step_shape step = {.rows = 64, .context = 4096, .sampled = 64};
    const tr_wire wire = tr_wire_gpu(config, TR_E4M3);
    const double dense = tr_estimate_layer_seconds(config, sizes, &wire, &rates_h200, &step, false);
    const double moe = tr_estimate_layer_seconds(config, sizes, &wire, &rates_h200, &step, true);
    const double head = tr_estimate_head_seconds(config, sizes, &wire, &rates_h200, &step);
    double low = 0.0, high = larger(dense, moe) * config->num_hidden_layers + head;

    for (int i = 0; i < 60; i++) {
        double middle = 0.5 * (low + high);
        if (cut(config, sizes->pp, middle, dense, moe, head, stage_layers))
            high = middle;
        else
            low = middle;
    }
    cut(config, sizes->pp, high, dense, moe, head, stage_layers);
}
