#include <config.h>

#include "fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const tr_fixture *f, const char *what)
{
    fprintf(stderr, "%s: %s\n", what, f->err.text);
    return -1;
}

int tr_fixture_open(tr_fixture *f, const tr_fixture_options *o)
{
    memset(f, 0, sizeof *f);
    tr_grid_sizes sizes = o->grid;
    if (sizes.tp == 0) sizes = (tr_grid_sizes){1, 1, 1, 1, 1, 1, 1};
    const int world = sizes.pp * sizes.dp * sizes.cp * sizes.tp;
    const tr_device_options device = {.name = o->device ? o->device : "cpu",
                                      .n_threads = o->n_threads ? o->n_threads : 2,
                                      .isa = o->isa};
    const int max_rows = o->max_rows ? o->max_rows : 256,
              max_len = o->max_model_len ? o->max_model_len : 1024;
    const int n_slots = o->n_slots ? o->n_slots : 4;

    if (tr_config_load(&f->config, o->dir, NULL, 0, &f->err) != TR_OK) return fail(f, "config");
    if (tr_grid_make(&f->grid, sizes, o->rank, world, &f->err) != TR_OK) return fail(f, "grid");
    if (tr_slice_make(&f->slice, &f->config, &f->grid, &f->err) != TR_OK) return fail(f, "slice");
    if (tr_checkpoint_open(&f->checkpoint, o->dir, &f->err) != TR_OK) return fail(f, "checkpoint");
    if (tr_device_open(&f->device, &f->ops, &device, &f->err) != TR_OK) return fail(f, "device");
    if (tr_weights_load(&f->weights, &f->config, &f->slice, f->checkpoint, TR_LOAD_SAFETENSORS, 0,
                        f->device, f->ops, NULL, &f->regions, &f->err) != TR_OK)
        return fail(f, "weights");
    f->self = tr_comm_self();
    const size_t words = ((size_t)f->config.vocab_size + 31) / 32;
    f->has_token = malloc(words * 4);
    if (!f->self || !f->has_token) return fail(f, "out of memory");
    memset(f->has_token, 0xff, words * 4);
    const tr_groups groups =
        o->groups ? *o->groups : (tr_groups){f->self, f->self, f->self, f->self, 1};
    const tr_model_options model = {.kv_dtype = o->kv_dtype,
                                    .max_rows = max_rows,
                                    .n_slots = n_slots,
                                    .max_model_len = max_len,
                                    .n_pages =
                                        n_slots * ((max_len + TR_PAGE_TOKENS - 1) / TR_PAGE_TOKENS),
                                    .cp_mode = o->cp_mode,
                                    .no_overlap = o->no_overlap,
                                    .find_not_finite = o->find_not_finite};
    if (tr_model_create(&f->model, &f->config, f->weights, f->device, f->ops, &groups, &model,
                        f->has_token, &f->regions, &f->err) != TR_OK)
        return fail(f, "model");
    if (tr_step_create(&f->step, f->model, &f->err) != TR_OK) return fail(f, "step");
    const tr_plan_limits limits = tr_model_limits(f->model);
    f->builder = tr_plan_builder_create(&limits);
    return f->builder ? 0 : fail(f, "plan builder");
}

void tr_fixture_close(tr_fixture *f)
{
    tr_plan_builder_free(f->builder);
    if (f->model) tr_step_free(&f->step, f->model);
    tr_model_free(f->model);
    if (f->weights) tr_weights_free(f->weights, f->device, f->ops);
    if (f->device) f->ops->close(f->device);
    tr_checkpoint_close(f->checkpoint);
    tr_comm_free(f->self);
    free(f->has_token);
    memset(f, 0, sizeof *f);
}

/* Seal, check as if it came from another rank, run. */
int tr_fixture_forward(tr_fixture *f, int max_context)
{
    const tr_plan_limits limits = tr_model_limits(f->model);
    const tr_plan *plan = tr_plan_seal(f->builder, max_context);
    if (!plan) return fail(f, "plan did not fit");
    if (tr_plan_check(plan, plan->bytes, &limits, &f->err) != TR_OK) return fail(f, "plan");
    f->step.plan = plan;
    if (tr_model_forward(f->model, &f->step, &f->err) != TR_OK) return fail(f, "forward");
    while (!tr_step_done(f->model, &f->step))
        continue;
    return tr_step_failure(f->model, &f->step, &f->err) == TR_OK ? 0 : fail(f, "step");
}

int tr_fixture_slot(tr_fixture *f, int slot, int n_logprobs)
{
    const tr_plan_limits limits = tr_model_limits(f->model);
    if (n_logprobs >= 0) f->flags |= TR_PLAN_HAS_SCORES;
    tr_plan_begin(f->builder, f->n_steps++, TR_PLAN_IDLE);
    tr_plan_add_open(f->builder, (tr_slot_open){.key = 1,
                                                .slot = slot,
                                                .n_logprobs = n_logprobs,
                                                .n_prompt_logprobs = n_logprobs,
                                                .temperature = 0,
                                                .top_p = 1});
    for (int i = 0; i < limits.max_pages; i++) {
        const int dealt =
            slot * limits.max_pages + i; /* distinct; 7919 is prime and larger than any pool here */
        const int page = (int)((int64_t)dealt * 7919 % limits.n_pages);
        if (tr_plan_add_page(f->builder, (tr_page_set){.slot = slot, .i_page = i, .page = page}) <
            0)
            return fail(f, "page set did not fit");
    }
    return tr_fixture_forward(f, 0);
}

int tr_fixture_run(tr_fixture *f, int slot, const int32_t *tokens, int position, int n,
                   int n_logits, int form, const int32_t *targets, int32_t *token_out,
                   float *logprob_out)
{
    const int dense = form == TR_FORM_AUTO && position < f->config.index_topk;
    tr_plan_begin(f->builder, f->n_steps++, f->flags);
    const int i_token = tr_plan_add_tokens(f->builder, tokens, n);
    const tr_span span = {.slot = slot,
                          .n_rows = n,
                          .position = position,
                          .i_token = i_token,
                          .kind = f->kind,
                          .owner = -1,
                          .n_logits = n_logits,
                          .flags = dense ? TR_SPAN_DENSE : 0};
    int32_t sample = -1;
    if (i_token < 0 || tr_plan_add_span(f->builder, span) < 0) return fail(f, "span did not fit");
    for (int i = 0; i < n_logits; i++)
        if (tr_plan_add_targets(f->builder, targets ? &targets[i] : &sample, 1) < 0)
            return fail(f, "targets did not fit");
    if (tr_fixture_forward(f, position + n)) return -1;
    for (int i = 0; i < n_logits; i++) {
        if (token_out) token_out[i] = f->step.out.token[i];
        if (logprob_out) logprob_out[i] = f->step.out.logprob[i];
    }
    return 0;
}

json_t *tr_read_json(const char *path)
{
    json_error_t e;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &e);
    if (!root) fprintf(stderr, "%s: line %d: %s\n", path, e.line, e.text);
    return root;
}

void *tr_read_array(const char *path, const char *name, int *rows, int *columns)
{
    void *data = NULL;
    char *header = NULL;
    json_t *root = NULL;
    uint64_t n = 0;
    FILE *file = fopen(path, "rb");

    *rows = *columns = 0;
    if (!file || fread(&n, 8, 1, file) != 1 || n > 1 << 24) goto done;
    header = malloc(n);
    if (!header || fread(header, 1, n, file) != n) goto done;
    root = json_loadb(header, n, 0, NULL);
    const json_t *entry = json_object_get(root, name), *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    if (!entry || json_array_size(offsets) != 2) goto done;
    const json_int_t begin = json_integer_value(json_array_get(offsets, 0));
    const json_int_t end = json_integer_value(json_array_get(offsets, 1));
    const size_t rank = json_array_size(shape);
    *columns = rank > 0 ? (int)json_integer_value(json_array_get(shape, rank - 1)) : 1;
    *rows = rank > 1 ? (int)json_integer_value(json_array_get(shape, 0)) : 1;
    data = malloc((size_t)(end - begin) + 1);
    if (!data || fseek(file, (long)(8 + (json_int_t)n + begin), SEEK_SET) != 0 ||
        fread(data, 1, (size_t)(end - begin), file) != (size_t)(end - begin)) {
        free(data);
        data = NULL;
    }

done:
    json_decref(root);
    free(header);
    if (file) fclose(file);
    return data;
}

double tr_relative_l2(const float *a, const float *b, int n)
{
    double difference = 0, size = 0;
    for (int i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return sqrt(difference / (size > 0 ? size : 1));
}
