/* The model: weights, operation table, communicators and cache of one rank, and one forward pass of one step.
 * There is one forward pass, not one per mode: a row's causal limit is its own position. Runs on the main thread. */
#ifndef TR_MODEL_MODEL_H
#define TR_MODEL_MODEL_H

#include <stdbool.h>
#include <stdio.h>

#include "base/device_time.h"
#include "base/region.h"
#include "kernels/kernels.h"
#include "model/cache.h"
#include "model/config.h"
#include "model/layout.h"
#include "model/plan.h"
#include "model/weights.h"
#include "mpi/comm.h"
#include "mpi/watchdog.h"

/* Communicators of this rank (parallel.md 1.2), borrowed; size 1: tr_comm_self(). Attention uses attn_tp and attn_cp only, so
 * that replicas with nothing to do cannot hold others up; moe is used by the experts alone. */
typedef struct tr_groups {
    tr_comm *
        attn_tp; /* same rows, other heads: sums of o_proj, dense MLP, experts; index rows; logits */
    tr_comm *attn_cp; /* same requests, other rows of their prompts: keys, latents, head rows */
    tr_comm *moe;     /* the EP x XT ranks that hold all experts between them, XT innermost */
    tr_comm *pp;      /* the same place in every stage */
    int n_xt;         /* ranks of moe that share each expert's width */
} tr_groups;

/* Tokens of rows whose logits are not finite. A model that looks for it (find_not_finite) says where the rows of that sequence, as
 * far as this job has computed them since it got its slot, were not finite first, in the order of the network. LAYER_0 - l: in what
 * layer l left in the residual stream. HEAD: in none of these, so behind them. (-3 is never a result: kernels.h, sample_merge.) */
enum {
    TR_NOT_FINITE = -2, /* the model does not look */
    TR_NOT_FINITE_HEAD = -4,
    TR_NOT_FINITE_EMBEDDING = -5,
    TR_NOT_FINITE_LAYER_0 = -6,
    TR_NOT_FINITE_LAST = TR_NOT_FINITE_LAYER_0 - (TR_LAYERS_MAX - 1),
};
/* False: the token is none of these, and `where` is as it was. Else `where` says where, "first in layer 3"; "": not known. */
bool tr_not_finite(int32_t token, char *where, size_t size);

/* What a step leaves for the host; valid when ops->done(ticket). Arrays over head rows, in the order of the spans. */
typedef struct tr_step_output {
    int n_head;
    int32_t *token; /* as sample's token_out: id, -1 scored; or a TR_NOT_FINITE */
    float *logprob;
    int32_t *rank;
    int32_t *top_token; /* [n_head, TR_MAX_LOGPROBS] */
    float *top_logprob;
} tr_step_output;

typedef struct tr_step { /* one step in flight; the engine owns a ring of them */
    const tr_plan *plan; /* checked; must stay until the step is done */
    tr_step_output out;
    uint64_t ticket;
    struct tr_step_memory *memory; /* private: plan_dev, rows, head outputs on the device */
} tr_step;

typedef struct tr_model_options {
    tr_dtype kv_dtype; /* TR_E4M3, TR_BF16, TR_F32 */
    int max_rows;      /* rows of one step: --max-batch-tokens + --max-sequences */
    int n_slots;       /* --max-sequences, plus what a fork needs */
    int max_model_len; /* tokens of one sequence */
    int n_pages;       /* of the cache; 0: choose_pages says it */
    /* Asked once, when all else has its memory, or has not got it (so_far): ranks can agree here. *n_pages is 0 before. What it
     * returns ends or goes on with tr_model_create; not asked with n_pages. */
    tr_status (*choose_pages)(void *ctx, tr_status so_far, int *n_pages, tr_err *err);
    void *choose_ctx;
    tr_cp_mode cp_mode; /* how prompt rows are dealt out to attn_cp */
    bool
        sync_check; /* wait for every operation, so that a failure is the one's that failed (--sync-check) */
    bool no_overlap; /* wait for every exchange where it begins (--no-overlap): the same results */
    bool own_rows; /* keys and latents stay with who wrote them (tr_share_keep): for times alone */
    bool find_not_finite; /* look at all rows after every layer (--sync-check), on all ranks */
} tr_model_options;

/* For tests: called after every named intermediate with its rows; may change them. index scores come
 * stripe by stripe (i_row: first row). names: "embed", "hidden", "index_logits", "index_topk", "router_experts",
 * "router_weights", "final", "logits". layer: -1 where there is none. data: device memory, enqueued on the main lane; f32, for
 * "final" tr_act, for topk and experts int32. */
typedef struct tr_probe {
    void *ctx;
    void (*see)(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                size_t ld, void *data);
} tr_probe;

typedef struct tr_model tr_model;

/* Keeps config, weights, device, ops, groups, regions (all must outlive the model). Allocates slots, workspace and
 * cache, in this order, once; TR_E_MEMORY with the budget when they do not fit. */
tr_status tr_model_create(tr_model **out, const tr_config *config, const tr_weights *weights,
                          tr_device *device, const tr_ops *ops, const tr_groups *groups,
                          const tr_model_options *options, const uint32_t *has_token,
                          tr_regions *regions, tr_err *err);
/* The members of the context-parallel group may store rows into each other's caches from now on, where their devices can
 * (tr_share_reach). Collective over that group, once, when all its members have their model. */
tr_status tr_model_reach(tr_model *model, tr_err *err);
/* The same of the members of the MoE group and what each receives of the others' rows and sums (tr_comm_reach). */
tr_status tr_model_reach_rows(tr_model *model, tr_err *err);
void tr_model_free(tr_model *model);
void tr_model_set_probe(tr_model *model, const tr_probe *probe); /* kept; NULL: none */
void tr_model_set_watch(tr_model *model, tr_watchdog *watch);    /* kept; NULL: none */
/* Whose messages advance between operations where the model's own groups have one member each. Kept. */
void tr_model_advance(tr_model *model, tr_comm *comm);

/* To be called while something is waited for: messages go on. Does not return in a process that the watchdog is ending: what the
 * device has done since is not to be used. */
void tr_model_progress(tr_model *model);

/* What plans for this model may hold. */
tr_plan_limits tr_model_limits(const tr_model *model);
size_t tr_model_cache_bytes(const tr_model *model), tr_model_workspace_bytes(const tr_model *model);

tr_status tr_step_create(tr_step *step, tr_model *model, tr_err *err);
void tr_step_free(tr_step *step, tr_model *model);

/* Before the first step: records (graphs) of steps that decode up to n_rows rows, for contexts without and with selection, where
 * this model's steps can be recorded; else the first step of each kind makes one. Adds to *sum what there are and what they took.
 * Where the device has no memory for a record, now or later, steps run without. Nothing runs, no region counts. */
typedef struct tr_step_records {
    int n;
    uint64_t ns, bytes; /* bytes: of the device's memory */
    bool no_memory;     /* for all of them */
} tr_step_records;
tr_status tr_step_record(tr_step *step, tr_model *model, int n_rows, tr_step_records *sum,
                         tr_err *err);

/* Time on the device (base/device_time.h): while it is on, steps, layers, their halves and operations are timed there too, into the
 * tree of the model's regions, where the device has a clock of its own; of steps that are run from a record one in `every` has its
 * layers timed (TR_TIME_EVERY: few enough to cost nothing). 0: off, what has passed is read; before the tree goes. A failure leaves
 * everything as it was. */
enum { TR_TIME_EVERY = 64 }; /* parallel.md 10.4, build.md 7 */
tr_status tr_model_time(tr_model *model, int every, tr_err *err);
/* Of a step that is done, by its plan's number, one of the last few; false: not known. */
bool tr_model_step_time(tr_model *model, uint64_t step, tr_device_step *out);
/* Regions whose time on the device could not be taken (tr_device_times_lost); -1: none was ever asked for. */
int64_t tr_model_times_lost(const tr_model *model);

/* Enqueue one step: apply the plan, embed (or receive from the stage before), this stage's layers, head and sample (or send to
 * the next stage). step->plan is set by the caller. Every rank of a stage runs every step, with an idle plan if its replica has
 * nothing to do: the collectives must match. A failure in here leaves the other ranks waiting: end the job. */
tr_status tr_model_forward(tr_model *model, tr_step *step, tr_err *err);
/* What the model has counted so far, for the profile; owned by the model, whose main thread may look between steps. */
typedef struct tr_overlap { /* of one layer's exchanges (context parallelism) */
    tr_share_cost key, latent;
} tr_overlap;
typedef struct tr_model_seen {
    int layer_first, n_layers; /* this stage's */
    const tr_overlap *overlap; /* [n_layers], NULL: no exchange */
    const uint64_t *
        expert_rows; /* [n_layers, n_local] rows that each expert of this rank computed; the model's */
    int expert_first, n_local;
} tr_model_seen;
/* Waits for the steps that run. Where the device is broken the counts stay those of the last look. */
tr_model_seen tr_model_look(tr_model *model);
/* Context parallelism: for each layer how long the gathers of keys and latents took, how much of that was waited for (exposed)
 * and how much was hidden behind the queries. Nothing in a group of one. */
void tr_model_print_overlap(const tr_model *model, FILE *out);
/* How long this rank's main thread has waited in the model's communicators so far: in all of them; for other stages. */
void tr_model_waited(const tr_model *model, uint64_t *all_ns, uint64_t *stages_ns);
/* 1 when the step's outputs are on the host, -1 when the device has failed, else 0; never blocks. */
int tr_step_done(const tr_model *model, const tr_step *step);
/* The failure behind a -1. */
tr_status tr_step_failure(const tr_model *model, const tr_step *step, tr_err *err);

#endif
