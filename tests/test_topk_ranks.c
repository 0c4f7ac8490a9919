/* Which keys the indexer selects: the same set, layer for layer and row for row, on all ranks that compute the same row, whatever
 * the grid (parallel.md 3.9). For as many ranks as it is started with, on CPUs or GPUs:
 *
 *     mpirun -n 4 test_topk_ranks MODEL [cpu|cuda]
 *
 * A prompt in steps of many rows (whose lists a tensor-parallel group shares) and of a few (whose lists every member makes), then
 * single tokens. Members of a tensor-parallel group always have the same rows, those of a context-parallel one where no prompt
 * is split. 77: one rank, or no GPU for each. */
#include <config.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"
#include "command/open.h"

enum {
    N_PROMPT = 420,
    MANY = 96,
    FEW = 3,
    N_DECODE = 12,
    LENGTH = N_PROMPT + N_DECODE,
    LAYERS = 128
};

typedef struct look {
    tr_opened o;
    tr_step step;
    tr_plan_builder *builder;
    uint64_t n_steps;
    int32_t *list;           /* [rows, k] of one layer, on the host */
    uint64_t layer[LAYERS];  /* of this step: what its rows selected */
    uint64_t n_lists, n_bad; /* of all */
} look;

static int ascending(const void *a, const void *b)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The order inside a list is nobody's promise. */
static void see(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                size_t ld, void *data)
{
    look *l = ctx;
    const tr_ops *ops = l->o.ops;
    (void)i_row;
    if (strcmp(name, "index_topk") != 0 || layer >= LAYERS) return;
    const size_t bytes = (size_t)n_rows * ld * sizeof *l->list;
    if (ops->download(l->o.device, TR_LANE_MAIN, l->list, data, bytes) != TR_OK) return;
    const uint64_t ticket = ops->ticket(l->o.device, TR_LANE_MAIN);
    while (ops->done(l->o.device, TR_LANE_MAIN, ticket) == 0)
        continue;
    uint64_t h = 1;
    for (int r = 0; r < n_rows; r++) {
        int32_t *row = l->list + (size_t)r * ld;
        qsort(row, (size_t)n_cols, sizeof *row, ascending);
        h = tr_hash64(row, (size_t)n_cols * sizeof *row, h);
    }
    l->layer[layer] = h;
    l->n_lists += (uint64_t)n_rows;
}

/* Do all members of a group have the same numbers? */
static tr_status compare(look *l, tr_comm *group, tr_err *err)
{
    uint64_t both[2 * LAYERS];
    tr_ticket ticket = {0};

    if (tr_comm_size(group) == 1) return TR_OK;
    tr_comm *host = tr_comm_host(group);
    for (int i = 0; i < LAYERS; i++) {
        both[i] = l->layer[i];
        both[LAYERS + i] = ~l->layer[i];
    }
    tr_status st = tr_comm_all_max_u64(host, both, 2 * LAYERS, &ticket, err);
    if (st == TR_OK) st = tr_comm_wait(host, TR_LANE_MAIN, ticket, err);
    for (int i = 0; i < LAYERS && st == TR_OK; i++)
        if (both[i] != ~both[LAYERS + i]) {
            fprintf(stderr, "step %llu, layer %d: other keys on other ranks of %s\n",
                    (unsigned long long)l->n_steps - 1, i, tr_comm_name(group));
            l->n_bad++;
        }
    return st;
}

static tr_status run(look *l, int max_context, bool split, tr_err *err)
{
    tr_model *m = l->o.model;

    memset(l->layer, 0, sizeof l->layer);
    l->step.plan = tr_plan_seal(l->builder, max_context);
    if (!l->step.plan) return tr_fail(err, TR_E_USAGE, "a plan does not fit");
    tr_status st = tr_model_forward(m, &l->step, err);
    while (st == TR_OK && !tr_step_done(m, &l->step))
        tr_model_progress(m);
    if (st == TR_OK) st = tr_step_failure(m, &l->step, err);
    if (st == TR_OK) st = compare(l, l->o.groups.attn_tp, err);
    return st == TR_OK && !split ? compare(l, l->o.groups.attn_cp, err) : st;
}

/* Tokens [at, at + n) of slot 0; every one of the vocabulary may come. */
static tr_status rows(look *l, int at, int n, tr_span_kind kind, tr_err *err)
{
    const int32_t sample = -1;
    const int k = l->o.config.index_topk;
    int32_t token[MANY];

    for (int i = 0; i < n; i++)
        token[i] =
            (int32_t)((unsigned)(at + i + 1) * 2654435761u % (unsigned)l->o.config.vocab_size);
    tr_plan_begin(l->builder, l->n_steps++, TR_PLAN_GREEDY);
    const tr_span span = {.n_rows = n,
                          .position = at,
                          .i_token = tr_plan_add_tokens(l->builder, token, n),
                          .kind = (int16_t)kind,
                          .owner = -1,
                          .n_logits = 1,
                          .flags = at < k && kind == TR_SPAN_PREFILL ? TR_SPAN_DENSE : 0};
    if (span.i_token < 0 || tr_plan_add_span(l->builder, span) < 0 ||
        tr_plan_add_targets(l->builder, &sample, 1) < 0)
        return tr_fail(err, TR_E_USAGE, "a step of %d rows does not fit", n);
    return run(l, at + n, kind == TR_SPAN_PREFILL, err);
}

static tr_status steps(look *l, tr_err *err)
{
    tr_status st = TR_OK;
    int at = 0;

    tr_plan_begin(l->builder, l->n_steps++, TR_PLAN_IDLE);
    tr_plan_add_open(l->builder,
                     (tr_slot_open){.n_logprobs = -1, .n_prompt_logprobs = -1, .top_p = 1});
    for (int i = 0; i < (int)tr_ceil_div(LENGTH, TR_PAGE_TOKENS); i++)
        tr_plan_add_page(l->builder, (tr_page_set){.i_page = i, .page = i});
    st = run(l, 0, false, err);
    for (int i = 0; at < N_PROMPT && st == TR_OK; i++) {
        int n = i % 2 ? FEW : MANY;
        if (n > N_PROMPT - at) n = N_PROMPT - at;
        st = rows(l, at, n, TR_SPAN_PREFILL, err);
        at += n;
    }
    for (; at < LENGTH && st == TR_OK; at++)
        st = rows(l, at, 1, TR_SPAN_DECODE, err);
    return st;
}

static tr_status open_look(look *l, const tr_open_options *open, tr_err *err)
{
    const tr_model_options model = {.kv_dtype = TR_E4M3,
                                    .max_rows = MANY,
                                    .n_slots = 1,
                                    .max_model_len = LENGTH,
                                    .n_pages = (int)tr_ceil_div(LENGTH, TR_PAGE_TOKENS)};
    tr_status st = tr_open_checkpoint(&l->o, open, err);
    st = tr_agree(open->world, st, err);
    if (st == TR_OK) st = tr_agree(open->world, tr_open_weights(&l->o, open, NULL, err), err);
    if (st == TR_OK) st = tr_open_model(&l->o, &model, NULL, err);
    if (st == TR_OK) st = tr_step_create(&l->step, l->o.model, err);
    if (st != TR_OK) return st;
    const tr_plan_limits limits = tr_model_limits(l->o.model);
    l->builder = tr_plan_builder_create(&limits);
    l->list = tr_calloc((size_t)MANY * (size_t)l->o.config.index_topk, sizeof *l->list);
    return l->builder && l->list ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
}

/* One grid. Every rank's failures count. */
static tr_status look_at(const tr_open_options *open, uint64_t *n_bad, tr_err *err)
{
    look *l = tr_calloc(1, sizeof *l);
    char grid[96];

    if (!l) return tr_fail(err, TR_E_MEMORY, "out of memory");
    const tr_probe probe = {.ctx = l, .see = see};
    tr_status st = tr_agree(open->world, open_look(l, open, err), err);
    if (st == TR_OK) tr_model_set_probe(l->o.model, &probe);
    if (st == TR_OK) st = steps(l, err);
    if (st == TR_OK) {
        tr_ticket ticket = {0};
        uint64_t seen[2] = {l->n_bad, l->n_lists == 0}; /* nothing seen would be nothing shown */
        st = tr_comm_all_max_u64(l->o.control, seen, 2, &ticket, err);
        if (st == TR_OK) st = tr_comm_wait(l->o.control, TR_LANE_MAIN, ticket, err);
        *n_bad += seen[0] + seen[1];
        if (open->world->rank == 0)
            printf(
                "%s  %s: %llu lists a rank\n", seen[0] + seen[1] ? "[  FAILED  ]" : "[       OK ]",
                tr_grid_text(grid, sizeof grid, &l->o.ranks.sizes), (unsigned long long)l->n_lists);
    }
    tr_plan_builder_free(l->builder);
    if (l->step.memory) tr_step_free(&l->step, l->o.model);
    tr_opened_close(&l->o);
    free(l->list);
    free(l);
    return st;
}

int main(int argc, char **argv)
{
    tr_world world;
    tr_err err = {0};
    uint64_t n_bad = 0;

    if (argc < 2 || tr_world_start(&world, &err) != TR_OK) return 2;
    const char *device = argc > 2 ? argv[2] : "cuda";
    const int n = world.size, half = n / 2;
    const tr_rank_options grids[] = {
        {.tp = n}, {.cp = n}, {.tp = half, .cp = 2}, {.tp = half, .dp = 2}, {.tp = half, .pp = 2}};
    if (n == 1) {
        tr_world_finish(TR_OK);
        puts("skipped: more than one rank is wanted");
        return 77;
    }
    tr_status st = TR_OK;
    for (size_t i = 0; i < (n % 2 || n == 2 ? 2 : sizeof grids / sizeof *grids) && st == TR_OK;
         i++) {
        const tr_open_options open = {
            .model_dir = argv[1], .device = device, .world = &world, .ranks = grids[i]};
        st = look_at(&open, &n_bad, &err);
    }
    if (st != TR_OK && world.rank == 0) printf("failed: %s\n", err.text);
    const bool no_gpu = st != TR_OK && strstr(err.text, "no usable GPU");
    if (no_gpu && world.rank == 0) puts("skipped: no GPU");
    if (st != TR_OK && !no_gpu) tr_world_abort(st); /* the others may wait in a step */
    tr_world_finish(TR_OK);
    return no_gpu ? 77 : n_bad ? 1 : 0;
}
