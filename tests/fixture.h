/* A model of one rank for tests: checkpoint, weights, device, model and one step, and runs of hand-made plans. Every
 * function prints why and returns non-zero when something fails, so that tests can stop there. */
#ifndef TR_TESTS_FIXTURE_H
#define TR_TESTS_FIXTURE_H

#include <jansson.h>

#include "model/model.h"

typedef struct tr_fixture {
    tr_config config;
    tr_checkpoint *checkpoint;
    tr_grid grid;
    tr_slice slice;
    tr_device *device;
    const tr_ops *ops;
    tr_weights *weights;
    tr_comm *self;
    tr_regions regions;
    tr_model *model;
    tr_step step;
    tr_plan_builder *builder;
    uint32_t *has_token;
    uint64_t n_steps;
    uint32_t flags; /* of the plans of tr_fixture_run, */
    int16_t kind;   /* and of their spans */
    tr_err err;
} tr_fixture;

typedef struct tr_fixture_options {
    const char *dir; /* model folder */
    tr_dtype kv_dtype;
    int n_threads;                        /* 0: 2 */
    const char *isa;                      /* NULL: best */
    const char *device;                   /* NULL: cpu */
    int max_rows, max_model_len, n_slots; /* 0: 256, 1024, 4 */
    tr_grid_sizes grid;                   /* all 0: one rank */
    int rank;
    const tr_groups *groups; /* NULL: groups of one */
    tr_cp_mode cp_mode;
    bool no_overlap, find_not_finite;
} tr_fixture_options;

int tr_fixture_open(tr_fixture *f, const tr_fixture_options *options);
void tr_fixture_close(tr_fixture *f);

/* Open a slot (greedy, n_logprobs alternatives) and give it pages for max_model_len tokens: the pool's pages dealt out in a
 * scrambled order, so that a page table that is not followed shows. One step without rows. */
int tr_fixture_slot(tr_fixture *f, int slot, int n_logprobs);

enum {
    TR_FORM_AUTO,
    TR_FORM_ABSORBED
}; /* auto: dense below index_topk, as the scheduler does for prompts */

/* Rows [position, position + n) of a slot as one step; the last n_logits rows reach the head,
 * where targets [n_logits] are scored (NULL: sampled). token_out and logprob_out [n_logits] may be NULL. */
int tr_fixture_run(tr_fixture *f, int slot, const int32_t *tokens, int position, int n,
                   int n_logits, int form, const int32_t *targets, int32_t *token_out,
                   float *logprob_out);

/* The plan that was built by hand in f->builder: seal it, check it as if it came from another rank, run it to its end. */
int tr_fixture_forward(tr_fixture *f, int max_context);

/* An array of a safetensors file (read with jansson alone, not with the code under test): F32 or I32, shape into
 * rows x columns (a vector has one row). NULL when it is not there. Caller frees. */
void *tr_read_array(const char *path, const char *name, int *rows, int *columns);
json_t *tr_read_json(const char *path);

/* sqrt(sum (a - b)^2 / sum b^2) over n numbers. */
double tr_relative_l2(const float *a, const float *b, int n);

#endif
