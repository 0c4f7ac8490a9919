#include <config.h>

#include "command/forecast.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "kernels/limits.h"
#include "model/tensors.h"

const double tr_forecast_reserve = 6e9;

__attribute__((format(printf, 2, 3))) static void warn(tr_forecast *f, const char *fmt, ...)
{
    va_list args;
    if (f->n_warnings == TR_FORECAST_WARNINGS) return;
    va_start(args, fmt);
    vsnprintf(f->warning[f->n_warnings], sizeof f->warning[0], fmt, args);
    va_end(args);
    f->n_warnings++;
}

/* ---- memory --------------------------------------------------------------------------------------------------------- */

static int moe_layers(const tr_config *c, tr_range layers)
{
    int n = 0;
    for (int i = 0; i < layers.n; i++)
        n += tr_layer_is_moe(c, layers.begin + i);
    return n;
}

static int64_t tokens_that_fit(const tr_forecast *f, const tr_forecast_class *k)
{
    if (!f->options.rates) return -1;
    double left = f->options.rates->memory - tr_forecast_reserve - (double)k->weight_bytes -
                  (double)k->workspace;
    if (left <= 0) return 0;
    return (int64_t)(left / (double)(k->cache_token * TR_PAGE_TOKENS)) * TR_PAGE_TOKENS;
}

static tr_status add_class(tr_forecast *f, const tr_slice *s, int rank, tr_forecast_class **out,
                           tr_err *err)
{
    const tr_config *c = f->config;
    const tr_forecast_options *o = &f->options;
    tr_forecast_class k = {.first = rank,
                           .n_layers = s->layers.n,
                           .n_moe = moe_layers(c, s->layers),
                           .slice = *s,
                           .cache_token = tr_estimate_cache_bytes(c, s, o->kv_dtype)};

    tr_estimate_weights(&k.weights, c, s);
    k.weight_bytes = tr_weight_bytes_total(&k.weights);
    for (int i = 0; i < f->n_classes; i++) {
        *out = &f->class[i];
        if ((*out)->n_layers == k.n_layers && (*out)->n_moe == k.n_moe &&
            memcmp(&(*out)->weights, &k.weights, sizeof k.weights) == 0)
            return TR_OK;
    }
    if (f->n_classes == f->room) {
        size_t bytes;
        int room = f->room ? 2 * f->room : 16;
        tr_forecast_class *grown =
            tr_mul(&bytes, (size_t)room, sizeof *grown) ? realloc(f->class, bytes) : NULL;
        if (!grown) return tr_fail(err, TR_E_MEMORY, "out of memory");
        f->class = grown;
        f->room = room;
    }
    k.workspace = tr_estimate_workspace(c, s, o->max_batch_tokens + o->max_sequences,
                                        o->max_model_len, f->wire.act);
    k.tokens = tokens_that_fit(f, &k);
    *out = &f->class[f->n_classes++];
    **out = k;
    return TR_OK;
}

/* Neighbours mostly differ in nothing; only what does is counted again. */
static tr_status classify(tr_forecast *f, tr_err *err)
{
    tr_status st = TR_OK;
    tr_forecast_class *k = NULL;
    tr_slice before = {0};
    tr_grid grid;
    tr_slice s;

    for (int rank = 0; rank < f->options.world && st == TR_OK; rank++) {
        st = tr_ranks_place(&grid, f->ranks, rank, f->options.world, err);
        if (st == TR_OK) st = tr_slice_make(&s, f->config, &grid, err);
        if (st != TR_OK) break;
        if (!k || s.layers.begin != before.layers.begin || s.vocab.n != before.vocab.n)
            st = add_class(f, &s, rank, &k, err);
        if (st != TR_OK) break;
        k->last = rank;
        k->n++;
        before = s;
    }
    f->tokens = -1;
    for (int i = 0; i < f->n_classes; i++)
        if (f->class[i].tokens >= 0 && (f->tokens < 0 || f->class[i].tokens < f->tokens))
            f->tokens = f->class[i].tokens;
    return st;
}

/* ---- traffic and time ----------------------------------------------------------------------------------------------- */

static void add_traffic(tr_forecast *f, const char *name, tr_step_shape shape, int n_layers,
                        bool moe)
{
    tr_forecast_traffic *t = &f->traffic[f->n_traffic++];
    *t = (tr_forecast_traffic){.name = name, .shape = shape, .n_layers = n_layers};
    t->n = n_layers > 0
               ? tr_estimate_layer_traffic(t->list, f->config, &f->ranks->sizes, &f->wire, &shape,
                                           TR_MOE_FORM_AUTO, moe)
               : tr_estimate_step_traffic(t->list, f->config, &f->ranks->sizes, &f->wire, &shape);
    /* A model need not have layers of both kinds, nor a grid anything to send. */
    if (t->n == 0 || n_layers < 0) f->n_traffic--;
}

static void make_traffic(tr_forecast *f)
{
    const tr_forecast_options *o = &f->options;
    const tr_step_shape decode = {
        .rows = o->max_sequences, .context = o->max_model_len, .sampled = o->max_sequences};
    const tr_step_shape prefill = {.prefill = true, .rows = o->max_batch_tokens, .sampled = 1};
    int n = f->config->num_hidden_layers, n_moe = moe_layers(f->config, (tr_range){0, n});

    add_traffic(f, "decode, dense layer", decode, n > n_moe ? n - n_moe : -1, false);
    add_traffic(f, "decode, MoE layer", decode, n_moe > 0 ? n_moe : -1, true);
    add_traffic(f, "decode, step", decode, 0, false);
    add_traffic(f, "prefill, dense layer", prefill, n > n_moe ? n - n_moe : -1, false);
    add_traffic(f, "prefill, MoE layer", prefill, n_moe > 0 ? n_moe : -1, true);
    add_traffic(f, "prefill, step", prefill, 0, false);
}

/* Handing the rows to the next stage. */
static double hop_seconds(const tr_forecast *f, const tr_rates *r, const tr_step_shape *shape)
{
    tr_traffic t[TR_TRAFFIC_MAX];
    int n = tr_estimate_step_traffic(t, f->config, &f->ranks->sizes, &f->wire, shape);
    for (int i = 0; i < n; i++)
        if (t[i].op == TR_WIRE_SEND) return r->net_latency + t[i].sent / r->net;
    return 0.0;
}

/* All stages, one behind the other, and the slowest of them. */
static double step_seconds(const tr_forecast *f, const tr_rates *r, const tr_step_shape *shape,
                           double *slowest)
{
    const tr_grid_sizes *n = &f->ranks->sizes;
    const double dense = tr_estimate_layer_seconds(f->config, n, &f->wire, r, shape, false),
                 moe = tr_estimate_layer_seconds(f->config, n, &f->wire, r, shape, true),
                 head = tr_estimate_head_seconds(f->config, n, &f->wire, r, shape);
    double sum = (n->pp - 1) * hop_seconds(f, r, shape);
    int layer = 0;

    *slowest = 0.0;
    for (int i = 0; i < n->pp; i++) {
        tr_range layers = {layer, f->stage_layers[i]};
        int n_moe = moe_layers(f->config, layers);
        double t = n_moe * moe + (layers.n - n_moe) * dense + (i == n->pp - 1 ? head : 0.0);
        sum += t;
        if (t > *slowest) *slowest = t;
        layer += layers.n;
    }
    return sum;
}

static void add_step(tr_forecast *f, tr_step_shape shape)
{
    const tr_rates *r = f->options.rates, *bound = tr_rates_bound(r->name);
    tr_forecast_step *s = &f->step[f->n_steps++];
    double none;

    *s = (tr_forecast_step){.shape = shape};
    s->latency = step_seconds(f, r, &shape, &s->slowest);
    s->roofline = bound ? step_seconds(f, bound, &shape, &none) : 0.0;
    s->rate = (double)shape.rows * f->ranks->sizes.dp / s->slowest;
}

static void make_steps(tr_forecast *f)
{
    const tr_forecast_options *o = &f->options;
    const int n = o->max_sequences, chunk = o->max_batch_tokens, len = o->max_model_len;
    const int shorter = len < 4096 ? len : 4096;

    add_step(f, (tr_step_shape){.rows = n, .context = shorter, .sampled = n});
    if (len > shorter) add_step(f, (tr_step_shape){.rows = n, .context = len, .sampled = n});
    add_step(f, (tr_step_shape){.prefill = true, .rows = chunk, .context = 0, .sampled = 1});
    if (len > chunk)
        add_step(f, (tr_step_shape){
                        .prefill = true, .rows = chunk, .context = len - chunk, .sampled = 1});
}

/* ---- warnings --------------------------------------------------------------------------------------------------------- */

/* What a job would be refused for, once its device is open. */
static void warn_sizes(tr_forecast *f)
{
    const tr_forecast_options *o = &f->options;
    tr_err err;

    if (o->rates && o->kv_dtype == TR_F32)
        warn(f, "it does not run: --kv-dtype f32: GPUs have caches of fp8 and bf16 only");
    for (int i = 0; i < f->n_classes; i++) {
        tr_dims dims = tr_slice_dims(f->config, &f->class[i].slice, &f->ranks->sizes);
        dims.max_context = o->max_model_len;
        if (tr_device_takes(o->rates ? "cuda" : "cpu", &dims, &err) == TR_OK) continue;
        warn(f, "it does not run: %s", err.text);
        return;
    }
}

static void warn_memory(tr_forecast *f)
{
    const tr_forecast_options *o = &f->options;
    const tr_grid_sizes *n = &f->ranks->sizes;

    if (f->tokens == 0)
        warn(
            f,
            "it does not fit: more ranks, or a larger --ep or --pp, make each rank's part smaller");
    else if (f->tokens > 0 && f->tokens < o->max_model_len)
        warn(f, "the caches hold %jd tokens, less than one sequence of %d (--max-model-len)",
             (intmax_t)f->tokens, o->max_model_len);
    if (n->mdp % 2 == 0 && f->config->n_routed_experts % (n->ep * 2) == 0)
        warn(f, "MoE-DP %d: every %d ranks hold all %d experts; --ep %d would halve that", n->mdp,
             n->ep * n->xt, f->config->n_routed_experts, n->ep * 2);
}

/* parallel.md 1.3, rule 8: legal, and costly. */
static void warn_gathering(tr_forecast *f)
{
    const tr_grid_sizes *n = &f->ranks->sizes;
    const int stage = n->dp * n->cp * n->tp;
    const double row = (double)f->config->hidden_size * f->wire.act;

    if (tr_grid_gathers_all(n))
        warn(
            f,
            "ep 1 with moe-tp over the whole stage: every MoE layer gathers the rows of all ranks; "
            "with t rows on each, a rank sends (S-1) t h = %.0f kB and as much again for the "
            "sums, for each t (S = %d, h = %.0f B)",
            (stage - 1) * row * 1e-3, stage, row);
}

static void warn_cuts(tr_forecast *f)
{
    const tr_config *c = f->config;
    const tr_grid_sizes *n = &f->ranks->sizes;
    tr_misaligned list[TR_MISALIGNED_MAX];
    int k = tr_slice_misaligned(c, n, list);

    for (int i = 0; i < k; i++)
        warn(f,
             "%s: %d %s over %d ranks are %d each, off the 128 x 128 blocks of its FP8 scales: a "
             "GPU expands it to bf16 (twice the memory)",
             list[i].name, list[i].width, list[i].cut, list[i].parts,
             list[i].width / list[i].parts);
    if (tr_slice_parts(c->intermediate_size, n->tp) < n->tp)
        warn(f,
             "the dense MLP's width %d has only %d aligned parts for tp %d: some ranks hold copies",
             c->intermediate_size, tr_slice_parts(c->intermediate_size, n->tp), n->tp);
    if (tr_slice_parts(c->n_shared_experts * c->moe_intermediate_size, n->tp) < n->tp)
        warn(
            f,
            "the shared expert's width has only %d aligned parts for tp %d: some ranks hold copies",
            tr_slice_parts(c->n_shared_experts * c->moe_intermediate_size, n->tp), n->tp);
}

static void warn_speed(tr_forecast *f)
{
    const tr_rates *r = f->options.rates;
    const tr_grid_sizes *n = &f->ranks->sizes;
    const tr_forecast_step *s = &f->step[0];
    int layers[4096];
    tr_grid grid;

    if (!r || tr_ranks_place(&grid, f->ranks, 0, f->options.world, NULL) != TR_OK) return;
    if (tr_crosses_nodes(&grid, TR_GROUP_ATTN_TP, r->ranks_per_node))
        warn(f, "tp %d reaches over nodes of %d: two sums a layer go through the network", n->tp,
             r->ranks_per_node);
    double mean = (s->latency - (n->pp - 1) * hop_seconds(f, r, &s->shape)) / n->pp;
    if (n->pp == 1 || s->slowest < 1.1 * mean) return;
    tr_estimate_stages(f->config, n, layers);
    bool best = memcmp(layers, f->stage_layers, (size_t)n->pp * sizeof *layers) == 0;
    warn(f, "stages are uneven: the slowest takes %.0f %% longer than the average (decode)%s",
         100 * (s->slowest / mean - 1),
         best ? "; no cut at layers is better" : "; without --pp-layers they are cut better");
}

tr_status tr_forecast_make(tr_forecast *out, const tr_config *config, const tr_ranks *ranks,
                           const tr_forecast_options *options, tr_err *err)
{
    *out = (tr_forecast){.config = config,
                         .ranks = ranks,
                         .options = *options,
                         .wire = options->rates ? tr_wire_gpu(config, options->kv_dtype)
                                                : tr_wire_cpu(config, options->kv_dtype),
                         .stage_layers = ranks->stage_layers};
    tr_status st = classify(out, err);
    if (st != TR_OK) return st;
    make_traffic(out);
    if (options->rates) make_steps(out);
    warn_sizes(out);
    warn_memory(out);
    warn_cuts(out);
    warn_gathering(out);
    warn_speed(out);
    return TR_OK;
}

void tr_forecast_free(tr_forecast *f)
{
    free(f->class);
    f->class = NULL;
}
