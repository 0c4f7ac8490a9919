/* trireme bench step: whole steps of a model, decode and prefill. Times are of tr_model_forward alone (plan to tokens on the
 * host), by the monotonic clock; medians over the steps. Ranks begin a step together, and it ends when the last one has: every
 * rank makes the same plans by itself, a replica for its own sequences. Bytes, flops and regions are rank 0's. */
#include <config.h>

#include "command/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/order.h"
#include "base/region.h"
#include "base/size.h"
#include "command/bench_blas.h"
#include "command/bench_halves.h"
#include "command/bench_steps.h"
#include "kernels/work.h"
#include "mpi/watchdog.h"

enum {
    SLOT_SHIFT = 61, /* sequences differ, as in any real batch: they use different experts */
    FILL_ROWS = 8 * TR_PAGE_TOKENS, /* of a decoded context are computed, the rest is copies */
};

struct tr_bench_steps {
    const tr_bench_options *options;
    tr_opened opened;
    tr_step step;
    tr_plan_builder *builder;
    uint64_t n_steps;
    double *seconds; /* [options->steps] */
    int32_t *tokens; /* [longest prompt + slots * SLOT_SHIFT]: slot s begins at s * SLOT_SHIFT */
    int *load;       /* [layers, experts] rows sent to each expert in the steps of one line */
    int32_t *routes; /* [rows of a step, experts of a row] what a probe looks at, on the host */
    tr_probe probe;  /* the model keeps its address */
    tr_ceilings ceilings;
    double sgemm_flops_per_s; /* 0: no library */
    double load_s;            /* of the weights, this rank's */
    int room;                 /* decode steps that have room behind the longest context */
    tr_bench_record *record;  /* of all steps; NULL: none */
    tr_bench_halves *halves;  /* NULL: not asked for */
    tr_papi *papi;
    tr_watchdog *watchdog; /* NULL: one rank */
};
typedef struct tr_bench_steps bench;

static bool leads(const bench *b)
{
    return !b->options->open.world || b->options->open.world->rank == 0;
}

/* Of n sequences of all replicas those of one. */
static int own_sequences(const bench *b, int n)
{
    return n / b->opened.ranks.sizes.dp;
}

/* ---- how evenly experts are used ---------------------------------------------------------------------- */

static void see_routes(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                       size_t ld, void *data)
{
    bench *b = ctx;
    const int experts = b->opened.config.n_routed_experts;
    const tr_ops *ops = b->opened.ops;
    const size_t bytes = (size_t)n_rows * ld * sizeof *b->routes;
    (void)i_row;
    if (strcmp(name, "router_experts") != 0) return;
    if (ops->download(b->opened.device, TR_LANE_MAIN, b->routes, data, bytes) != TR_OK) return;
    const uint64_t ticket = ops->ticket(b->opened.device, TR_LANE_MAIN);
    int done;
    while ((done = ops->done(b->opened.device, TR_LANE_MAIN, ticket)) == 0)
        continue;
    for (int i = 0; i < n_rows && done > 0; i++)
        for (int j = 0; j < n_cols; j++) {
            const int32_t e = b->routes[(size_t)i * ld + (size_t)j];
            if (e >= 0 && e < experts) b->load[layer * experts + e]++;
        }
}

/* Experts that got a row, of all of all layers, and the largest load of a layer over its mean; the mean of the layers. */
static void balance(const bench *b, double *hit, double *worst_over_mean)
{
    const tr_config *c = &b->opened.config;
    int n_hit = 0, n_layers = 0;
    *hit = *worst_over_mean = 0;
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        int most = 0, sum = 0;
        for (int e = 0; e < c->n_routed_experts; e++) {
            const int n = b->load[layer * c->n_routed_experts + e];
            n_hit += n > 0;
            sum += n;
            if (n > most) most = n;
        }
        if (sum == 0) continue;
        *worst_over_mean += (double)most * c->n_routed_experts / sum;
        n_layers++;
    }
    if (n_layers == 0) return;
    *hit = (double)n_hit / ((double)n_layers * c->n_routed_experts);
    *worst_over_mean /= n_layers;
}

/* Looking costs time, so it is done in a step of the warm-up. */
static void watch(bench *b, bool on)
{
    const tr_config *c = &b->opened.config;
    const size_t n = (size_t)c->num_hidden_layers * (size_t)c->n_routed_experts;
    if (on) memset(b->load, 0, n * sizeof *b->load);
    b->probe = (tr_probe){.ctx = b, .see = see_routes};
    tr_model_set_probe(b->opened.model, on ? &b->probe : NULL);
}

/* ---- steps -------------------------------------------------------------------------------------------- */

/* Token ids that exercise the whole vocabulary and repeat from run to run. */
static void make_tokens(int32_t *tokens, int n, int vocab, uint64_t seed)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < n; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        tokens[i] = (int32_t)((x >> 33) % (uint64_t)vocab);
    }
}

static tr_status run(bench *b, int max_context, double *seconds, tr_err *err)
{
    uint64_t ns = 0;
    const tr_plan_limits limits = tr_model_limits(b->opened.model);
    const tr_plan *plan = tr_plan_seal(b->builder, max_context);
    if (!plan) return tr_fail(err, TR_E_USAGE, "bench: a plan does not fit");
    tr_status st = tr_plan_check(plan, plan->bytes, &limits, err);
    if (st != TR_OK) return st;
    b->step.plan = plan;
    tr_watchdog_beat(b->watchdog, plan->step);
    st = tr_comm_max_word(b->opened.control, &ns, err);
    if (st != TR_OK) return st;
    const uint64_t begun = tr_now_ns();
    tr_bench_record_plan(b->record, plan, begun);
    st = tr_model_forward(b->opened.model, &b->step, err);
    while (st == TR_OK && !tr_step_done(b->opened.model, &b->step))
        tr_model_progress(b->opened.model);
    if (st == TR_OK) st = tr_step_failure(b->opened.model, &b->step, err);
    if (st == TR_OK) tr_bench_record_step(b->record, plan, begun, tr_now_ns());
    ns = tr_now_ns() - begun;
    if (st == TR_OK) st = tr_comm_max_word(b->opened.control, &ns, err);
    *seconds = (double)ns * 1e-9;
    return st;
}

/* Greedy slots 0..n-1 with pages of their own for `tokens` tokens each. */
static tr_status open_slots(bench *b, int n, int tokens, tr_err *err)
{
    const int pages = (int)tr_ceil_div((size_t)tokens, TR_PAGE_TOKENS);
    double unused;
    tr_plan_begin(b->builder, b->n_steps++, TR_PLAN_IDLE);
    for (int slot = 0; slot < own_sequences(b, n); slot++) {
        const tr_slot_open open = {.key = (uint64_t)slot,
                                   .slot = slot,
                                   .n_logprobs = -1,
                                   .n_prompt_logprobs = -1,
                                   .top_p = 1};
        if (tr_plan_add_open(b->builder, open) < 0)
            return tr_fail(err, TR_E_USAGE, "bench: too many slots");
        for (int i = 0; i < pages; i++)
            if (tr_plan_add_page(
                    b->builder,
                    (tr_page_set){.slot = slot, .i_page = i, .page = slot * pages + i}) < 0)
                return tr_fail(err, TR_E_USAGE, "bench: too many pages");
    }
    return run(b, 0, &unused, err);
}

/* A prompt of n tokens into a slot, in chunks that fit a step; the time of all chunks. The last row is sampled. */
static tr_status prefill(bench *b, int slot, int from, int n, double *seconds, tr_err *err)
{
    const int32_t *tokens = b->tokens + (size_t)slot * SLOT_SHIFT;
    const int k = b->opened.config.index_topk, chunk = b->options->chunk;
    tr_status st = TR_OK;
    *seconds = 0;
    for (int at = from; at < from + n && st == TR_OK;) {
        const int rows = from + n - at < chunk ? from + n - at : chunk;
        const int32_t sample = -1;
        const int last = at + rows == from + n;
        double one = 0;
        tr_plan_begin(b->builder, b->n_steps++, TR_PLAN_GREEDY);
        const tr_span span = {.slot = slot,
                              .n_rows = rows,
                              .position = at,
                              .i_token = tr_plan_add_tokens(b->builder, tokens + at, rows),
                              .kind = TR_SPAN_PREFILL,
                              .owner = -1,
                              .n_logits = last,
                              .flags = at < k ? TR_SPAN_DENSE : 0};
        if (span.i_token < 0 || tr_plan_add_span(b->builder, span) < 0 ||
            (last && tr_plan_add_targets(b->builder, &sample, 1) < 0))
            return tr_fail(err, TR_E_USAGE, "bench: a chunk of %d rows does not fit", rows);
        st = run(b, at + rows, &one, err);
        *seconds += one;
        at += rows;
    }
    return st;
}

/* One row of every slot, from the device's own length and last token; these are the last stage's, so that with more than one
 * they are given, as the scheduler does. */
static tr_status decode(bench *b, int n, int context, double *seconds, tr_err *err)
{
    const int32_t sample = -1;
    const bool given = b->opened.ranks.sizes.pp > 1;
    tr_plan_begin(b->builder, b->n_steps++, TR_PLAN_GREEDY);
    for (int slot = 0; slot < own_sequences(b, n); slot++) {
        const int32_t *token = b->tokens + (size_t)slot * SLOT_SHIFT + context;
        const tr_span span = {.slot = slot,
                              .n_rows = 1,
                              .position = given ? context : -1,
                              .i_token = given ? tr_plan_add_tokens(b->builder, token, 1) : -1,
                              .kind = TR_SPAN_DECODE,
                              .owner = -1,
                              .n_logits = 1};
        if (tr_plan_add_span(b->builder, span) < 0 ||
            tr_plan_add_targets(b->builder, &sample, 1) < 0)
            return tr_fail(err, TR_E_USAGE, "bench: too many sequences");
    }
    return run(b, context + 1, seconds, err);
}

/* Weights and cache that a step touches, of all timed steps. Experts by what a step of the warm-up hit where one step is
 * a line (decode). */
static double touched_bytes(const bench *b, bool decode)
{
    static const char *const op[] = {"linear",       "mla_query",  "mla_value", "kv_write",
                                     "index_logits", "sparse_mla", "dense_mha", "moe"};
    const tr_regions *r = &b->opened.regions;
    const tr_slice *slice = &b->opened.weights->slice;
    double bytes = 0;
    for (int i = 0; i < r->n; i++)
        for (size_t j = 0; j < sizeof op / sizeof *op; j++)
            if (strcmp(r->total[i].name, op[j]) == 0 && (!decode || strcmp(op[j], "moe") != 0))
                bytes += r->total[i].bytes;
    for (int i = 0; i < slice->layers.n && decode; i++) {
        const tr_layer_weights *w = &b->opened.weights->layer[i];
        const int *load = b->load + (slice->layers.begin + i) * b->opened.config.n_routed_experts;
        double hit = 0;
        if (!w->is_moe) continue;
        for (int e = slice->experts.begin; e < slice->experts.begin + slice->experts.n; e++)
            hit += load[e] > 0;
        bytes += tr_work_moe(0, hit, b->opened.ops, &w->moe.gate_up, &w->moe.down).bytes *
                 b->options->steps;
    }
    return bytes;
}

/* Flops of all timed steps with attention counted in its multi-head form, whichever form ran: what the published
 * architecture needs. `s`: the sums of all their rows. */
static double useful_flops(const bench *b, const tr_row_sums *s)
{
    const tr_regions *r = &b->opened.regions;
    const tr_config *c = &b->opened.config;
    const tr_slice *slice = &b->opened.weights->slice;
    const double d_kv = (double)c->qk_nope_head_dim + c->v_head_dim;
    double flops = 2.0 * slice->heads.n * slice->layers.n *
                   ((s->dense_pairs + s->selected) * (d_kv + c->qk_rope_head_dim) +
                    s->n_dense * d_kv * c->kv_lora_rank); /* absorbed rows: mla_query, mla_value */
    for (int i = 0; i < r->n; i++)
        if (strcmp(r->total[i].name, "sparse_mla") != 0 &&
            strcmp(r->total[i].name, "dense_mha") != 0)
            flops += r->total[i].flops;
    return flops;
}

/* The least time for what the regions counted: of every operation the larger of its bytes and its flops over the ceilings. */
static double roofline(const bench *b)
{
    const tr_regions *r = &b->opened.regions;
    double seconds = 0;
    for (int i = 0; i < r->n; i++)
        seconds +=
            tr_bench_roofline(&b->ceilings, r->total[i].name, r->total[i].bytes, r->total[i].flops);
    return seconds / b->options->steps;
}

static void report(bench *b, const char *what, int sequences, int context, double tokens,
                   const tr_row_sums *sums)
{
    const tr_bench_options *o = b->options;
    const double median = tr_median(b->seconds, o->steps), low = b->seconds[0],
                 high = b->seconds[o->steps - 1];
    double hit, uneven;
    const double bytes = touched_bytes(b, strcmp(what, "decode") == 0) / o->steps,
                 flops = useful_flops(b, sums) / o->steps;
    const double compute =
        b->sgemm_flops_per_s > 0 ? b->sgemm_flops_per_s : b->ceilings.fma_flops_per_s;
    if (!leads(b)) return;
    balance(b, &hit, &uneven);
    const double roof = roofline(b);
    printf("  %-8s %9d %9d %12.3f %12.3f %12.3f %12.1f %7.0f%% %8.2f %8.2f %5.1f%% %9.2f %5.1f%% "
           "%9.3f %6.2f\n",
           what, sequences, context, median * 1e3, low * 1e3, high * 1e3, tokens / median,
           100 * hit, uneven, bytes / median * 1e-9,
           100 * bytes / median / b->ceilings.read_bytes_per_s, flops / median * 1e-9,
           100 * flops / median / compute, roof * 1e3, median / roof);
    printf("{\"bench\": \"step\", \"kind\": \"%s\", \"sequences\": %d, \"context\": %d, \"steps\": "
           "%d, "
           "\"median_s\": %.9f, \"min_s\": %.9f, \"max_s\": %.9f, \"tokens_per_s\": %.3f, "
           "\"experts_hit\": %.4f, \"max_over_mean_load\": %.3f, \"bytes\": %.0f, \"flops\": %.0f, "
           "\"read_fraction\": %.7f, \"fma_fraction\": %.7f, \"roofline_s\": %.9f",
           what, sequences, context, o->steps, median, low, high, tokens / median, hit, uneven,
           bytes, flops, bytes / median / b->ceilings.read_bytes_per_s,
           flops / median / b->ceilings.fma_flops_per_s, roof);
    if (b->sgemm_flops_per_s > 0)
        printf(", \"sgemm_fraction\": %.4f", flops / median / b->sgemm_flops_per_s);
    printf("}\n");
    if (o->regions) tr_regions_print(&b->opened.regions, stdout);
    fflush(stdout);
}

/* Pages of all slots as copies of slot 0's first n tokens. A plan copies pages that are not full, as forks have them: a
 * page's last token stays zero. */
static tr_status copy_pages(bench *b, int sequences, int slot_pages, int n, int context,
                            tr_err *err)
{
    const int n_slots = tr_model_limits(b->opened.model).n_slots;
    const int from = (int)tr_ceil_div((size_t)n, TR_PAGE_TOKENS),
              to = (int)tr_ceil_div((size_t)context, TR_PAGE_TOKENS);
    tr_status st = TR_OK;
    double unused;
    int pending = 0;
    sequences = own_sequences(b, sequences);
    for (int i = from; i < sequences * to && st == TR_OK; i++) {
        /* the first slot's pages, then the next one's */
        const int page = i / to * slot_pages + i % to;
        if (pending == 0) tr_plan_begin(b->builder, b->n_steps++, TR_PLAN_IDLE);
        if (tr_plan_add_copy(b->builder, (tr_page_copy){.from = i % to % from,
                                                        .to = page,
                                                        .n_rows = TR_PAGE_TOKENS - 1}) < 0)
            return tr_fail(err, TR_E_USAGE, "bench: too many page copies");
        if (++pending < n_slots && i + 1 < sequences * to) continue;
        st = run(b, 0, &unused, err);
        pending = 0;
    }
    return st;
}

/* A context to decode after. Its first FILL_ROWS tokens are computed once, the rest are copies of their cache pages: other
 * memory with the same numbers, which costs a step what different numbers would. Last tokens are computed, and differ. */
static tr_status fill(bench *b, int sequences, int context, tr_err *err)
{
    const int tokens = context + b->room, at = context - 1, sample = -1;
    const int n = context < FILL_ROWS ? context : FILL_ROWS;
    double unused;
    tr_status st = open_slots(b, sequences, tokens, err);
    if (st == TR_OK) st = prefill(b, 0, 0, n, &unused, err);
    if (st == TR_OK)
        st = copy_pages(b, sequences, (int)tr_ceil_div((size_t)tokens, TR_PAGE_TOKENS), n, context,
                        err);
    if (st != TR_OK) return st;
    tr_plan_begin(b->builder, b->n_steps++, TR_PLAN_GREEDY);
    for (int slot = 0; slot < own_sequences(b, sequences); slot++) {
        const tr_span span = {.slot = slot,
                              .n_rows = 1,
                              .position = at,
                              .i_token = tr_plan_add_tokens(
                                  b->builder, b->tokens + (size_t)slot * SLOT_SHIFT + at, 1),
                              .kind = TR_SPAN_PREFILL,
                              .owner = -1,
                              .n_logits = 1,
                              .flags = at < b->opened.config.index_topk ? TR_SPAN_DENSE : 0};
        if (span.i_token < 0 || tr_plan_add_span(b->builder, span) < 0 ||
            tr_plan_add_targets(b->builder, &sample, 1) < 0)
            return tr_fail(err, TR_E_USAGE, "bench: too many sequences");
    }
    return run(b, context, &unused, err);
}

static void print_halves(const bench *b, const char *what, int sequences, int context)
{
    if (leads(b)) tr_bench_halves_print(b->halves, &b->ceilings, what, sequences, context, stdout);
}

static tr_status bench_decode(bench *b, int sequences, int context, tr_err *err)
{
    double unused;
    tr_row_sums sums = {0};
    tr_status st = fill(b, sequences, context, err);
    for (int i = 0; i < 3 && st == TR_OK; i++) { /* warm */
        watch(b, i == 2);
        st = decode(b, sequences, context + i, &unused, err);
    }
    watch(b, false);
    tr_regions_reset(&b->opened.regions);
    for (int i = 0; i < b->options->steps && st == TR_OK; i++)
        st = decode(b, sequences, context + 3 + i, &b->seconds[i], err);
    const int own = own_sequences(b, sequences);
    for (int i = 0; i < b->options->steps * own; i++)
        tr_row_sums_add(&sums, context + 3 + i / own, 1, 0, b->opened.config.index_topk);
    if (st == TR_OK) report(b, "decode", sequences, context, sequences, &sums);
    if (st != TR_OK || !b->halves) return st;
    st = tr_bench_halves_begin(b->halves, err);
    for (int i = 0; i < b->options->steps && st == TR_OK; i++)
        st = decode(b, sequences, context + 3 + b->options->steps + i, &unused, err);
    tr_bench_halves_end(b->halves);
    if (st == TR_OK) print_halves(b, "decode", sequences, context);
    return st;
}

/* In every replica n rows behind `before` tokens, which are made as a decoded context is. */
static tr_status bench_prefill(bench *b, int n, int before, tr_err *err)
{
    const tr_grid_sizes *sizes = &b->opened.ranks.sizes;
    const int computed = before < FILL_ROWS ? before : FILL_ROWS, k = b->opened.config.index_topk;
    tr_status st = open_slots(b, sizes->dp, before + n, err);
    tr_row_sums sums = {0};
    double unused;
    if (st == TR_OK) st = prefill(b, 0, 0, computed, &unused, err);
    if (st == TR_OK)
        st = copy_pages(b, sizes->dp, (int)tr_ceil_div((size_t)(before + n), TR_PAGE_TOKENS),
                        computed, before, err);
    for (int i = -1; i < b->options->steps && st == TR_OK; i++) {
        watch(b, i < 0);
        if (i == 0) tr_regions_reset(&b->opened.regions);
        st = prefill(b, 0, before, n, i < 0 ? &unused : &b->seconds[i], err);
    }
    for (int i = 0; i < b->options->steps; i++)
        tr_row_sums_add(&sums, before, n, before < k, k);
    sums.dense_pairs /= sizes->cp; /* rows are dealt out */
    sums.selected /= sizes->cp;
    sums.n_dense /= sizes->cp;
    if (st == TR_OK) report(b, "prefill", sizes->dp, before + n, (double)n * sizes->dp, &sums);
    if (st != TR_OK || !b->halves) return st;
    st = tr_bench_halves_begin(b->halves, err);
    for (int i = 0; i < b->options->steps && st == TR_OK; i++)
        st = prefill(b, 0, before, n, &unused, err);
    tr_bench_halves_end(b->halves);
    if (st == TR_OK) print_halves(b, "prefill", sizes->dp, before + n);
    return st;
}

static int largest(const int *values, int n)
{
    int best = 0;
    for (int i = 0; i < n; i++)
        if (values[i] > best) best = values[i];
    return best;
}

static tr_status check_sequences(const bench *b, tr_err *err)
{
    const tr_bench_options *o = b->options;
    const int dp = b->opened.ranks.sizes.dp;
    for (int i = 0; i < o->n_sequences; i++)
        if (o->sequences[i] % dp)
            return tr_fail(err, TR_E_USAGE, "--sequences %d: %d replicas want as many of them each",
                           o->sequences[i], dp);
    return TR_OK;
}

/* What is opened with the others of a job. After each phase all ranks know how it went. */
static tr_status agreed(const bench *b, tr_status st, tr_err *err)
{
    return b->options->open.world ? tr_agree(b->options->open.world, st, err) : st;
}

static tr_status guard(bench *b, bool on, tr_err *err)
{
    tr_world *world = b->options->open.world;
    if (!world || world->size == 1 || on == !!b->watchdog) return TR_OK;
    tr_watchdog_stop(b->watchdog);
    b->watchdog = NULL;
    tr_status st = on ? tr_watchdog_start(&b->watchdog, world, 0, NULL, err) : TR_OK;
    tr_model_set_watch(b->opened.model, b->watchdog);
    return st;
}

static tr_status watch_steps(bench *b, tr_err *err)
{
    tr_world *world = b->options->open.world;
    if (!world || world->size == 1) return TR_OK;
    tr_status st = guard(b, true, err);
    if (st == TR_OK) tr_model_advance(b->opened.model, b->opened.control);
    return st;
}

/* Rank 0 says why GPUs that are there are not used. */
static tr_status choose(bench *b, tr_err *err)
{
    tr_log *log = tr_log_create(stderr, !leads(b), false);
    const tr_status st = tr_open_choose(&b->opened, &b->options->open, log, err);
    tr_log_free(log);
    return st;
}

static tr_status prepare(bench *b, tr_err *err)
{
    const tr_bench_options *o = b->options;
    const int all = largest(o->sequences, o->n_sequences),
              prompt = largest(o->prefill, o->n_prefill) + largest(o->before, o->n_before);
    int length = largest(o->context, o->n_contexts) + b->room;
    if (length < prompt) length = prompt;
    tr_open_options open = o->open;
    open.max_model_len = length;
    open.f32_caches = o->kv_dtype == TR_F32;

    tr_status st = tr_open_checkpoint(&b->opened, &o->open, err);
    if (st == TR_OK) st = check_sequences(b, err);
    if (st == TR_OK && length > b->opened.config.max_position_embeddings)
        st =
            tr_fail(err, TR_E_USAGE, "bench: %d tokens of one sequence, the model has %d positions",
                    length, b->opened.config.max_position_embeddings);
    st = agreed(b, st, err);
    if (st == TR_OK) st = agreed(b, choose(b, err), err);
    const uint64_t begun = tr_now_ns();
    if (st == TR_OK) st = agreed(b, tr_open_weights(&b->opened, &open, NULL, err), err);
    if (st != TR_OK) return st;
    b->load_s = (double)(tr_now_ns() - begun) * 1e-9;
    const int sequences = own_sequences(b, all);
    const int rows = sequences > o->chunk ? sequences : o->chunk;
    const tr_model_options model = {.kv_dtype = o->kv_dtype,
                                    .max_rows = rows,
                                    .n_slots = sequences,
                                    .max_model_len = length,
                                    .sync_check = o->sync_check,
                                    .no_overlap = o->no_overlap,
                                    .own_rows = o->own_rows,
                                    .cp_mode = b->opened.ranks.cp_mode,
                                    .n_pages = sequences *
                                               (int)tr_ceil_div((size_t)length, TR_PAGE_TOKENS)};
    st = tr_open_model(&b->opened, &model, NULL, err);
    if (st == TR_OK) st = tr_step_create(&b->step, b->opened.model, err);
    if (st == TR_OK) st = watch_steps(b, err);
    if (st != TR_OK) return st;
    const tr_plan_limits limits = tr_model_limits(b->opened.model);
    b->builder = tr_plan_builder_create(&limits);
    b->seconds = tr_calloc((size_t)o->steps, sizeof *b->seconds);
    const int n_tokens = length + sequences * SLOT_SHIFT;
    b->tokens = tr_calloc((size_t)n_tokens, sizeof *b->tokens);
    b->load = tr_calloc((size_t)b->opened.config.num_hidden_layers *
                            (size_t)b->opened.config.n_routed_experts,
                        sizeof *b->load);
    b->routes =
        tr_calloc((size_t)rows * (size_t)b->opened.config.num_experts_per_tok, sizeof *b->routes);
    if (!b->builder || !b->seconds || !b->tokens || !b->load || !b->routes)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    make_tokens(b->tokens, n_tokens, b->opened.config.vocab_size,
                o->open.seed + (uint64_t)b->opened.grid.at.dp);
    return TR_OK;
}

/* The ceilings of the device, measured in the same run as what is compared with them. */
static tr_status print_ceilings(bench *b, tr_err *err)
{
    tr_status st = b->opened.ops->ceilings(b->opened.device, &b->ceilings);
    if (st != TR_OK) return tr_fail_of(err, st, "ceilings", b->opened.ops->error(b->opened.device));
    const char *why = "not with several ranks";
    tr_blas *blas = NULL;
    if (b->opened.grid.world == 1)
        blas = tr_blas_open(b->options->open.n_threads > 0 ? b->options->open.n_threads
                                                           : tr_device_threads(),
                            &why);
    if (blas) b->sgemm_flops_per_s = tr_blas_flops_per_s(blas);
    if (leads(b))
        tr_bench_print_ceilings(&b->ceilings, b->sgemm_flops_per_s,
                                blas ? tr_blas_describe(blas) : why);
    tr_blas_close(blas);
    return TR_OK;
}

const char *tr_bench_kv_name(const tr_bench_options *o)
{
    return o->kv_dtype == TR_E4M3 ? "fp8" : o->kv_dtype == TR_BF16 ? "bf16" : "f32";
}

/* ---- for others -------------------------------------------------------------------------------------------- */

static void close_bench(bench *b)
{
    tr_watchdog_stop(b->watchdog);
    tr_bench_halves_close(b->halves);
    tr_plan_builder_free(b->builder);
    if (b->opened.model) tr_step_free(&b->step, b->opened.model);
    tr_opened_close(&b->opened);
    free(b->seconds);
    free(b->tokens);
    free(b->load);
    free(b->routes);
}

tr_status tr_bench_steps_open(tr_bench_steps **out, const tr_bench_options *options, int n_steps,
                              tr_err *err)
{
    *out = calloc(1, sizeof **out);
    if (!*out) return tr_fail(err, TR_E_MEMORY, "out of memory");
    (*out)->options = options;
    (*out)->room = n_steps;
    tr_status st = prepare(*out, err);
    if (st == TR_OK) return st;
    tr_bench_steps_close(*out);
    *out = NULL;
    return st;
}

void tr_bench_steps_close(tr_bench_steps *b)
{
    if (!b) return;
    close_bench(b);
    free(b);
}

tr_opened *tr_bench_steps_opened(tr_bench_steps *b)
{
    return &b->opened;
}

tr_status tr_bench_steps_fill(tr_bench_steps *b, int sequences, int context, tr_err *err)
{
    return fill(b, sequences, context, err);
}

tr_status tr_bench_steps_decode(tr_bench_steps *b, int sequences, int context, double *seconds,
                                tr_err *err)
{
    return decode(b, sequences, context, seconds, err);
}

tr_status tr_bench_steps_guard(tr_bench_steps *b, bool on, tr_err *err)
{
    return agreed(b, guard(b, on, err), err);
}

void tr_bench_steps_record(tr_bench_steps *b, tr_bench_record *record)
{
    b->record = record;
}

/* ---- the bench ---------------------------------------------------------------------------------------------- */

static void print_head(const bench *b)
{
    char grid[96];
    if (!leads(b)) return;
    printf("# trireme %s, %s, %s, weights %.1f MB after %.1f s, cache %.1f MB\n", PACKAGE_VERSION,
           b->options->open.model_dir, tr_device_describe(b->opened.device),
           (double)b->opened.weights->bytes * 1e-6, b->load_s,
           (double)tr_model_cache_bytes(b->opened.model) * 1e-6);
    if (b->opened.grid.world > 1)
        printf("# %d ranks: %s; weights, cache, bytes and flops are those of rank 0\n",
               b->opened.grid.world, tr_grid_text(grid, sizeof grid, &b->opened.ranks.sizes));
    printf("# %-8s %9s %9s %12s %12s %12s %12s %8s %8s %8s %6s %9s %6s %9s %6s\n", "step",
           "sequences", "context", "median ms", "min ms", "max ms", "tokens/s", "experts",
           "max/mean", "GB/s", "read", "Gflop/s", b->sgemm_flops_per_s > 0 ? "sgemm" : "FMA",
           "roof, ms", "x roof");
}

static tr_status begin_record(bench *b, tr_err *err)
{
    const tr_bench_options *o = b->options;
    const tr_bench_record_options record = {.file = o->profile,
                                            .model = o->open.model_dir,
                                            .device = o->open.device,
                                            .kv_dtype = tr_bench_kv_name(o),
                                            .papi = b->papi,
                                            .flush_s = TR_BENCH_FLUSH_S};
    return o->profile ? tr_bench_record_begin(&b->record, &record, &b->opened, err) : TR_OK;
}

static tr_status all_lines(bench *b, tr_err *err)
{
    const tr_bench_options *o = b->options;
    tr_status st = TR_OK;
    for (int i = 0; i < o->n_contexts && st == TR_OK; i++)
        for (int j = 0; j < o->n_sequences && st == TR_OK; j++)
            st = bench_decode(b, o->sequences[j], o->context[i], err);
    for (int i = 0; i < o->n_prefill && st == TR_OK; i++)
        for (int j = 0; j < o->n_before && o->prefill[i] > 0 && st == TR_OK; j++)
            st = bench_prefill(b, o->prefill[i], o->before[j], err);
    return st;
}

void tr_bench_give_up(const tr_world *world, tr_status st, tr_err *err)
{
    if (st != TR_OK && world->size > 1) tr_world_fail(world, st, err);
}

static tr_status with_ranks(const tr_bench_options *o, tr_err *err)
{
    const tr_world *world = o->open.world;
    bench b = {.options = o, .room = (o->halves ? 2 * o->steps : o->steps) + 4};
    tr_err later;
    if (o->profile && world->size > 1)
        return tr_fail(err, TR_E_USAGE, "--profile: a bench step of one rank, not of %d",
                       world->size);
    if (o->profile) b.papi = tr_papi_open(NULL);
    tr_status st = prepare(&b, err);
    st = agreed(&b, st, err);
    const bool ready = st == TR_OK;
    if (st == TR_OK) st = print_ceilings(&b, err);
    if (st == TR_OK) print_head(&b);
    if (st == TR_OK) st = begin_record(&b, err);
    if (st == TR_OK && o->halves) st = tr_bench_halves_open(&b.halves, &b.opened, err);
    if (st == TR_OK) st = all_lines(&b, err);
    if (ready) tr_bench_give_up(world, st, err);
    const tr_status recorded = tr_bench_record_end(b.record, NULL, st == TR_OK ? err : &later);
    if (st == TR_OK) st = recorded;
    close_bench(&b);
    tr_papi_close(b.papi);
    return st;
}

tr_status tr_bench_with_world(const tr_bench_options *o, tr_bench_ranks *bench_ranks, tr_err *err)
{
    tr_bench_options own = *o;
    tr_world world;
    tr_status st = tr_world_start(&world, err);
    own.open.world = &world;
    if (st == TR_OK) {
        st = bench_ranks(&own, err);
        tr_world_say(&world, st, err);
    }
    tr_world_finish(st);
    return st;
}

tr_status tr_bench_step(const tr_bench_options *o, tr_err *err)
{
    return tr_bench_with_world(o, with_ranks, err);
}
