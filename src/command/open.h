/* Opening a model for a subcommand: config, slice, weights, device, model, in the order in which faults are cheapest to find.
 * batch and bench share it. Owned by the caller; close in one call. */
#ifndef TR_COMMAND_OPEN_H
#define TR_COMMAND_OPEN_H

#include <stdbool.h>

#include "base/log.h"
#include "base/region.h"
#include "command/ranks.h"
#include "model/model.h"
#include "mpi/start.h"

typedef struct tr_open_options {
    const char *model_dir;
    const char *const *overrides; /* --override key=value */
    int n_overrides;
    tr_load_format load_format;
    uint64_t seed;      /* of dummy weights */
    const char *device; /* "auto" (NULL too), "cpu", "cuda" */
    const char *isa;    /* NULL: best */
    int n_threads;      /* 0: all given */
    bool no_bind;       /* threads stay where the system puts them */
    const char *beside; /* OUT, which other logs may lie beside; NULL: none */
    tr_world *world;    /* NULL: this process alone */
    tr_rank_options ranks;
    /* "auto" (NULL too), "on", "off": sums over the GPUs' peer memory */
    const char *peer_kernels;
    int max_model_len; /* tokens of one sequence; 0: nobody has said */
    bool f32_caches;
} tr_open_options;

typedef struct tr_opened {
    tr_config config;
    tr_ranks ranks;
    tr_grid grid;
    tr_slice slice;
    tr_checkpoint *checkpoint; /* NULL with dummy weights */
    const char *device_name;   /* the one to open, once it is chosen; "auto" of one rank alone */
    tr_device *device;
    const tr_ops *ops;
    tr_comm *self, *control;  /* the group of one; all ranks */
    tr_comm *group[4];        /* attn_tp, attn_cp, moe, pp where they have more than one member */
    tr_comm *device_group[4]; /* the same for memory of GPUs; NULL on CPUs */
    struct tr_nccl *nccl;     /* likewise */
    tr_groups groups;
    tr_weights *weights;
    tr_model *model;
    tr_regions regions;
} tr_opened;

/* config.json, grid and slice, shard headers: seconds at most, no weights yet. */
tr_status tr_open_checkpoint(tr_opened *o, const tr_open_options *options, tr_err *err);
/* What --device means for all ranks: of several, auto is "cuda" where each of them can have a GPU of its own (command/gpus.h), else
 * "cpu", and where GPUs are seen the log says why they are not used. Collective over the world. */
tr_status tr_open_choose(tr_opened *o, const tr_open_options *options, tr_log *log, tr_err *err);
/* Device, chosen here if it was not before; its threads are bound: they place what they touch first. TR_E_INPUT, TR_E_USAGE: the
 * model, or an option, has a size that it cannot compute. Collective over the world. */
tr_status tr_open_device(tr_opened *o, const tr_open_options *options, tr_log *log, tr_err *err);
/* Weights, and the device where it is not open yet. */
tr_status tr_open_weights(tr_opened *o, const tr_open_options *options, tr_log *log, tr_err *err);
/* The model. has_token: bit per id, NULL: every id has a token. */
tr_status tr_open_model(tr_opened *o, const tr_model_options *options, const uint32_t *has_token,
                        tr_err *err);
void tr_opened_close(tr_opened *o); /* zeroed or half open: fine */

/* "fp8", "bf16", "f32" of --kv-dtype; TR_E_USAGE for others. */
tr_status tr_open_kv_dtype(tr_dtype *out, const char *name, tr_err *err);

#endif
