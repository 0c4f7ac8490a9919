/* Seconds of a step (estimate.h): rates of one kind of GPU, operations with their bytes and flops, one behind the other. What
 * runs beside something else (the shared expert beside the routed ones, latents beside queries) shares the memory's bandwidth
 * with it and has no launch of its own here. tests/test_forecast.c holds it against what was measured. */
#include <config.h>

#include <math.h>
#include <string.h>

#include "base/size.h"
#include "model/estimate.h"
#include "model/tensors.h"

/* Measured on H200s, CUDA 13.0, 2026-11-21 and -22, by the commands of BENCHMARKS.md. "Alone": tests/cuda/bench_*, cold L2, less
 * the 4.4 us of an empty kernel. "Step": times of single kernels inside `bench step --device cuda` of 3 layers (1 dense). */
static const tr_rates rates_h200 = {
    .name = "h200",
    .memory = 139.0 * (1 << 30),
    /* Step: the head of one row, 1.853 GB in 420 us. */
    .read = 4.40e12,
    /* Alone: 7168 x 16384 of 16 rows 32.9 us, 32 experts' gate_up of 8 rows 228.5 (4.11 TB/s); step: the same of 256 experts and
     * 64 rows 4.3 (the experts' half of a layer, 2.32 ms), of one row beside the shared expert 3.9. */
    .stream = 4.2e12,
    .gather = 2.02e12, /* alone, rows of 656 bytes */
    /* Alone, 4,096 rows: a norm moves 235 MB in 110 us, quantisation of heads 201 MB in 60, in steps about half as fast; experts' rows
     * gathered 470 MB in 108, combined 470 MB in 150. */
    .rows = 1.6e12,
    .move = 2.7e12,
    /* Step, 4,096 rows: all fp8 products 8.5 Tflop in 7.95 ms. Alone: W_UK and W_UV 68.7 Gflop each in 282 and 226 us; router 15 Gflop
     * in 92 us, and of 64 rows the head 118 Gflop in 555 us. */
    .fp8 = 1.1e15,
    .heads = 250e12,
    .plain = 190e12,
    /* Step, 4,096 rows at 32K: scores 2.34 Tflop in 2.34 ms, alone a twentieth less since; alone, sparse attention over the fp8 cache
     * 2.34 Tflop in 3.66 ms, at 128K in 3.93. Decode, alone: 128 rows 73 Gflop in 200 us, of which 18 us are there for one row too. */
    .index = 1.05e15,
    .mla_prefill = 615e12,
    .mla = 390e12,
    .mla_latency = 18e-6,
    /* Alone, bench_dense_mha: 1 x 512 and 1 x 2,048 tokens in 96 and 466 us. */
    .mha = 550e12,
    .mha_keys = 400e12,
    /* Alone: 128 rows at 128K 559 us, 64 rows at 32K 81 us; top-2048: 1 x 8K 9, 128 x 128K 37, 2,048 x 128K 421 us; step: 4,096 at 34K
     * 440 us. */
    .index_read = 3.6e12,
    .topk_read = 2.5e12,
    .topk_row = 0.05e-6,
    .topk_latency = 8e-6,
    /* Step, one row: gaps and ramps between kernels that overlap their launches, 20 in a row of a MoE layer of 232 us; more than
     * 8 rows of the router's product 13-15 us and of its choice 15 us, 11 in all of fewer. */
    .kernel_latency = 2.7e-6,
    .plain_latency = 20e-6,
    .step_latency = 45e-6, /* 1,164 us of a step less its layers and head */
    /* NCCL 2.28.3, NVLS off, in graphs, less the norm behind the sum (bench comm --device cuda): 1 row of 7168 on 2 and 4 GPUs 11.8 and
     * 15.8 us, 64 rows 22.0, 256 rows 42.7; 8 GPUs: kernels.md 5, 20 to 24. Between nodes: one 400 Gb/s adapter a GPU, an assumption. */
    .link = 205e9,
    .link_latency = 8e-6,
    .link_hop = 4e-6,
    .net = 45e9,
    .net_latency = 40e-6,
    /* Stores to peers, 4 GPUs, the same command: 1 row 5.43 us with a norm of 3, 64 rows 8.9, 256 rows 21.5. */
    .peer = 390e9,
    .peer_latency = 2.5e-6,
    .peer_rows = 256,
    /* bench comm --rows: exposed 10.3, 16.2, 26.0, 24.3 us of gathers of 21.7, 26.0, 51.1, 68.1 (256 to 4,096 rows a rank, 4 GPUs). */
    .unhidden = 0.5,
    .host_wait =
        60e-6, /* counts to the host and the launches behind them: an assumption between kernels.md 4.2 and what was seen */
    .ranks_per_node = 8,
};

/* kernels.md 10: read 4.48 TB/s, rows of 656 bytes 2.02; fp8 1,548 and bf16 812 TFLOP/s at 8192^3, which no attention reaches either;
 * NVLink 450 GB/s. */
static const tr_rates rates_h200_bound = {
    .name = "h200",
    .memory = 139.0 * (1 << 30),
    .read = 4.48e12,
    .stream = 4.48e12,
    .gather = 4.48e12,
    .rows = 4.48e12,
    .move = 4.48e12,
    .fp8 = 1548e12,
    .heads = 812e12,
    .plain = 812e12,
    .index = 1548e12,
    .mla_prefill = 812e12,
    .mla = 812e12,
    .mha = 812e12,
    .mha_keys = 812e12,
    .index_read = 4.48e12,
    .topk_read = 4.48e12,
    .link = 450e9,
    .net = 50e9,
    .peer = 450e9,
    .peer_rows = 256,
    .ranks_per_node = 8,
    .bound = true,
};

const tr_rates *tr_rates_find(const char *name)
{
    return strcmp(name, rates_h200.name) == 0 ? &rates_h200 : NULL;
}

const tr_rates *tr_rates_bound(const char *name)
{
    return strcmp(name, rates_h200_bound.name) == 0 ? &rates_h200_bound : NULL;
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

/* Bytes and flops of one kernel: loads and products overlap, but not all the way. Root of the sum of squares: 16 to 4,096 rows of
 * the five products of BENCHMARKS.md within a tenth (the narrowest, 2112 wide, within a third). */
static double both(const tr_rates *r, double bytes_s, double flops_s)
{
    if (r->bound) return bytes_s > flops_s ? bytes_s : flops_s;
    return sqrt(bytes_s * bytes_s + flops_s * flops_s);
}

/* rows through weights of n numbers of weight_bytes each. */
static double gemm(const tr_rates *r, double rows, double n, double weight_bytes, double flops)
{
    return both(r, n * weight_bytes / r->stream, 2.0 * rows * n / flops);
}

static double launches(const tr_rates *r, int n)
{
    return n * r->kernel_latency;
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

/* Index scores and the selection from them. */
static double select_seconds(const tr_config *c, const tr_wire *w, const tr_rates *r,
                             const tr_step_shape *step, double rows)
{
    const double d_index = (double)c->index_n_heads * c->index_head_dim;
    const keys k = keys_of(step);
    const double score = both(r, k.all * w->key / r->index_read,
                              2.0 * rows * d_index * k.each / r->index),
                 topk = 4.0 * rows * k.each / r->topk_read;

    return score + topk + rows * r->topk_row + r->topk_latency + launches(r, 2);
}

/* Scores, selection and attention of heads: dense where nothing is to be selected from a prompt, else over the selected latents. */
static double attend_seconds(const tr_config *c, const tr_slice *s, const tr_wire *w,
                             const tr_rates *r, const tr_step_shape *step, double rows)
{
    const double heads = s->heads.n, latent = c->kv_lora_rank, d_v = c->v_head_dim;
    const double d_nope = c->qk_nope_head_dim, d_rope = c->qk_rope_head_dim;
    const keys k = keys_of(step);
    const double seen = k.each < c->index_topk ? k.each : c->index_topk;
    const double absorbed = 2.0 * rows * heads * seen * (2 * latent + d_rope);
    const double forms = heads * latent * (d_nope + d_v); /* numbers of W_UK and W_UV */

    if (step->prefill && k.all <= c->index_topk) /* rows of other requests see less: not counted */
        return 2.0 * k.all * forms / r->mha_keys + launches(r, 4) +
               2.0 * rows * heads * seen * (d_nope + d_rope + d_v) / r->mha;
    double t = gemm(r, rows, forms, 2.0, r->heads) + launches(r, 2);
    if (k.all > c->index_topk || !step->prefill) t += select_seconds(c, w, r, step, rows);
    if (step->prefill) return t + absorbed / r->mla_prefill + launches(r, 1);
    return t + r->mla_latency + both(r, rows * seen * w->latent / r->gather, absorbed / r->mla);
}

static double attention_seconds(const tr_config *c, const tr_slice *s, const tr_wire *w,
                                const tr_rates *r, const tr_step_shape *step, double rows)
{
    const double q8 = c->fp8 ? 1.0 : 2.0, fp8 = c->fp8 ? r->fp8 : 2.0 * r->heads;
    const double heads = s->heads.n, hidden = c->hidden_size;
    const double d_qk = c->qk_nope_head_dim + c->qk_rope_head_dim, d_v = c->v_head_dim;
    const double d_index = (double)c->index_n_heads * c->index_head_dim;
    double t = launches(
        r, 7); /* norm, q_a, its norm, q_b, index wq_b, its rope, o_proj's quantisation with it */

    t += gemm(r, rows,
              hidden * (c->q_lora_rank + c->kv_lora_rank + c->qk_rope_head_dim + c->index_head_dim),
              q8, fp8);
    t += gemm(r, rows, c->q_lora_rank * heads * d_qk, q8, fp8);
    t += gemm(r, rows, c->q_lora_rank * d_index, q8, fp8);
    t += gemm(r, rows, hidden * heads * d_v, q8, fp8);
    t += gemm(r, rows, hidden * c->index_n_heads, 2.0, r->plain);
    /* Norm of residual and block (2 bytes each, read and written), queries turned, attended rows and index queries quantised. */
    t += rows * (4.0 * 2 * hidden + 2.0 * 2 * heads * d_qk + 3.0 * heads * d_v + 3.0 * d_index) /
         r->rows;
    return t + attend_seconds(c, s, w, r, step, rows);
}

/* gate_up, SwiGLU, down: of a dense layer, behind its norm; as the shared expert beside the routed ones, so without launches. */
static double mlp_seconds(const tr_config *c, const tr_rates *r, double rows, double inner)
{
    const double matrix = 3.0 * c->hidden_size * inner;
    return gemm(r, rows, matrix, c->fp8 ? 1.0 : 2.0, c->fp8 ? r->fp8 : 2.0 * r->heads) +
           rows * inner * 7.0 / r->rows;
}

static double norm_seconds(const tr_config *c, const tr_rates *r, double rows)
{
    return rows * 4.0 * 2 * c->hidden_size / r->rows + launches(r, 1);
}

/* The largest of n draws, in standard deviations above their mean (normal order statistics; n = 1, 2, 4, ... 256). */
static double largest_of(int n)
{
    static const double z[] = {0.0, 0.564, 1.029, 1.424, 1.766, 2.070, 2.343, 2.594, 2.826};
    int i = 0;
    while (i + 1 < (int)(sizeof z / sizeof *z) && 2 << i <= n)
        i++;
    return z[i];
}

/* The rows that this rank's block serves, uniformly routed. Every layer waits for the rank with the most experts hit. */
static double experts_seconds(const tr_config *c, const tr_slice *s, const tr_grid_sizes *n,
                              const tr_rates *r, const tr_step_shape *step)
{
    enum { TILE = 128 };
    const double block_rows = (double)tr_estimate_expert_rows(n, step);
    const double k = c->num_experts_per_tok, experts = c->n_routed_experts, own = s->experts.n;
    const double missed = pow(1.0 - k / experts, block_rows);
    const double mean = own * (1.0 - missed), spread = sqrt(mean * missed) * largest_of(n->ep);
    const double hit = r->bound ? mean : mean + spread < own ? mean + spread : own;
    const double matrix = 3.0 * c->hidden_size * s->expert_inner.n;
    const double routed = block_rows * k * own / experts; /* rows of this rank's experts */
    /* Half a tile of each expert's rows is empty; tiles are as small as the rows allow. */
    const double each = hit > 0 ? routed / hit : 0,
                 empty = r->bound ? 0 : 0.5 * (each < TILE ? each : TILE);
    const double flops = 2.0 * (routed + hit * empty) * matrix;

    return both(r, hit * matrix * (c->fp8 ? 1.0 : 2.0) / r->stream,
                flops / (c->fp8 ? r->fp8 : 2.0 * r->heads)) +
           routed * 4.0 * c->hidden_size /
               r->move +   /* a row in, 1 + 1 bytes with fp8, and 2 back */
           launches(r, 5); /* order, gather, gate_up, down, sums */
}

/* In bf16 or f32, whatever the checkpoint's format; then the choice of experts. */
static double router_seconds(const tr_config *c, const tr_rates *r, double rows)
{
    return gemm(r, rows, (double)c->hidden_size * c->n_routed_experts, 2.0, r->plain) +
           (rows > 8 ? r->plain_latency : 0.0) + launches(r, 2);
}

static double log2_of(int n)
{
    return n > 1 ? log2(n) : 0.0;
}

/* One collective. Sums of few rows inside a node go over peer memory; gathers of keys and latents run beside the queries' products;
 * rows of a prompt go to their experts once the host knows how many there are. */
static double wire_seconds(const tr_traffic *t, const tr_grid *grid, const tr_rates *r,
                           const tr_step_shape *step, double sum_row)
{
    if (tr_crosses_nodes(grid, t->group, r->ranks_per_node))
        return r->net_latency + t->sent / r->net;
    if (t->op == TR_WIRE_ALL_REDUCE && t->group == TR_GROUP_ATTN_TP &&
        t->given <= r->peer_rows * sum_row)
        return r->peer_latency + t->sent / r->peer;
    double s = r->bound ? t->sent / r->link
                        : r->link_latency + r->link_hop * log2_of(t->n) + t->sent / r->link;
    if (t->group == TR_GROUP_ATTN_CP && step->prefill) s *= r->unhidden;
    if (t->op == TR_WIRE_ALL_TO_ALL && step->prefill) s += 0.5 * r->host_wait; /* there and back */
    return s;
}

static double traffic_seconds(const tr_traffic *t, int n, const tr_grid *grid, const tr_rates *r,
                              const tr_step_shape *step, double sum_row)
{
    double seconds = 0.0;
    for (int i = 0; i < n; i++)
        seconds += wire_seconds(&t[i], grid, r, step, sum_row);
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
    double t =
        traffic_seconds(traffic, n, &grid, rates, step, (double)config->hidden_size * wire->act) +
        attention_seconds(config, &s, wire, rates, step, rows) + norm_seconds(config, rates, rows);
    if (!moe) return t + mlp_seconds(config, rates, rows, s.dense_inner.n) + launches(rates, 4);
    return t + mlp_seconds(config, rates, rows, s.shared_inner.n) +
           router_seconds(config, rates, rows) + experts_seconds(config, &s, sizes, rates, step);
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
    const double numbers = (double)config->hidden_size * s.vocab.n;
    int n = tr_estimate_step_traffic(traffic, config, sizes, wire, step);
    for (int i = 0; i < n; i++) /* hand-offs between stages are not the head's */
        if (traffic[i].group == TR_GROUP_ATTN_CP || traffic[i].op == TR_WIRE_ALL_REDUCE)
            traffic[n_head++] = traffic[i];
    return both(rates, numbers * 2.0 / rates->read, 2.0 * step->sampled * numbers / rates->plain) +
           4.0 * step->sampled * s.vocab.n / rates->read + launches(rates, 5) +
           rates->step_latency + traffic_seconds(traffic, n_head, &grid, rates, step, 0.0);
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
    double low = 0.0, high = (dense > moe ? dense : moe) * config->num_hidden_layers + head;

    for (int i = 0; i < 60; i++) {
        double middle = 0.5 * (low + high);
        if (cut(config, sizes->pp, middle, dense, moe, head, stage_layers))
            high = middle;
        else
            low = middle;
    }
    cut(config, sizes->pp, high, dense, moe, head, stage_layers);
}
