#include <config.h>

#include "command/open.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "mpi/grid.h"

tr_status tr_open_checkpoint(tr_opened *o, const tr_open_options *options, tr_err *err)
{
    const tr_grid_sizes one = {1, 1, 1, 1, 1, 1, 1};
    tr_status st = tr_config_load(&o->config, options->model_dir, options->overrides,
                                  options->n_overrides, err);
    if (st == TR_OK) st = tr_grid_make(&o->grid, one, 0, 1, err);
    if (st == TR_OK) st = tr_slice_make(&o->slice, &o->config, &o->grid, err);
    if (st == TR_OK && options->load_format == TR_LOAD_SAFETENSORS)
        st = tr_checkpoint_open(&o->checkpoint, options->model_dir, err);
    return st;
}

tr_status tr_open_weights(tr_opened *o, const tr_open_options *options, tr_log *log, tr_err *err)
{
    const tr_device_options device = {.name = options->device ? options->device : "auto",
                                      .n_threads = options->n_threads,
                                      .isa = options->isa};
    tr_status st = tr_device_open(&o->device, &o->ops, &device, err);
    if (st != TR_OK) return st;
    o->self = tr_comm_self();
    if (!o->self) return tr_fail(err, TR_E_MEMORY, "out of memory");
    o->groups = (tr_groups){.stage = o->self, .attn_tp = o->self, .attn_cp = o->self};
    st = tr_weights_load(&o->weights, &o->config, &o->slice, o->checkpoint, options->load_format,
                         options->seed, o->device, o->ops, log, &o->regions, err);
    return st == TR_OK ? TR_OK : tr_within(err, "cannot load model");
}

tr_status tr_open_model(tr_opened *o, const tr_model_options *options, const uint32_t *has_token,
                        tr_err *err)
{
    const size_t words = tr_ceil_div((size_t)o->config.vocab_size, 32);
    uint32_t *all = NULL;
    if (!has_token) {
        all = malloc(words * sizeof *all);
        if (!all) return tr_fail(err, TR_E_MEMORY, "out of memory");
        memset(all, 0xff, words * sizeof *all);
        has_token = all;
    }
    tr_status st = tr_model_create(&o->model, &o->config, o->weights, o->device, o->ops, &o->groups,
                                   options, has_token, &o->regions, err);
    free(all);
    return st;
}

void tr_opened_close(tr_opened *o)
{
    tr_model_free(o->model);
    if (o->weights) tr_weights_free(o->weights, o->device, o->ops);
    if (o->device) o->ops->close(o->device);
    tr_checkpoint_close(o->checkpoint);
    tr_comm_free(o->self);
    memset(o, 0, sizeof *o);
}

tr_status tr_open_kv_dtype(tr_dtype *out, const char *name, tr_err *err)
{
    if (strcmp(name, "fp8") == 0)
        *out = TR_E4M3;
    else if (strcmp(name, "bf16") == 0)
        *out = TR_BF16;
    else if (strcmp(name, "f32") == 0)
        *out = TR_F32;
    else
        return tr_fail(err, TR_E_USAGE, "--kv-dtype %s: fp8, bf16 or f32 is wanted", name);
    return TR_OK;
}
