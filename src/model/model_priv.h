/* Inside of the model: what model.c, layer.c, attention.c and ffn.c share. Not for others (tests use the probe). */
#ifndef TR_MODEL_MODEL_PRIV_H
#define TR_MODEL_MODEL_PRIV_H

#include "base/device_time.h"
#include "model/model.h"
#include "model/part.h"

/* One id per operation, for its profiling region. */
typedef enum tr_op_id {
#define TR_OP_ID(name) TR_OP_ID_##name,
    TR_OPS(TR_OP_ID)
#undef TR_OP_ID
        TR_N_OPS
} tr_op_id;

/* W8A8: room for e4m3 of what goes into products, and what it holds for those that follow (tr_acts.quantised). HIDDEN and LATENT
 * are the norms'; the others are scratch of the products that a lane runs. NULL where the backend wants none. */
enum { TR_QUANT_MAIN, TR_QUANT_SIDE, TR_QUANT_HIDDEN, TR_QUANT_LATENT, TR_N_QUANTS };
typedef struct tr_quantised {
    uint8_t *q;
    float *scale;
    const tr_act *of; /* NULL: nobody's */
} tr_quantised;

/* Activations of one step, N = max_rows. Allocated once; a step in flight owns them while it runs on the main lane, in order,
 * so one set serves every step of the ring. */
typedef struct tr_workspace {
    float *hidden;  /* [N, hidden] residual stream */
    tr_act *normed; /* [N, hidden] input of a block */
    tr_act *
        block_out; /* [N rounded up to whole shares of attn_tp, hidden] output of a block, added to the residual by the
                         next norm */
    float *q_latent;  /* [N, q_lora] before its norm; f32, as the residual is */
    tr_act *q_normed; /* [N, q_lora] */
    tr_act *q;        /* [N, heads, nope + rope] */
    tr_act *kv_a;     /* [N, kv_lora + rope] */
    tr_quantised quant[TR_N_QUANTS];
    tr_act *index_k;                 /* [N, index_dim] */
    tr_act *index_q;                 /* [N, index_heads, index_dim] before rope */
    void *index_q8;                  /* the same, quantised (f32 with an f32 cache) */
    float *index_w;                  /* [N, index_heads] */
    float *score;                    /* [n_stripe, max_model_len] */
    int32_t *top_position, *top_row; /* [N, index_topk] */
    int32_t *n_selected;             /* [N] */
    tr_act *q_absorbed;              /* [N, heads, kv_lora + rope] */
    tr_act *u;                       /* [N, heads, kv_lora] */
    tr_act *attended;                /* [N, heads, v] */
    tr_act *gate_up;                 /* [N, 2 inner] dense MLP or shared expert */
    tr_act *inner;                   /* [N, inner] */
    float *router;                   /* [N, experts] */
    int32_t *expert;                 /* [N, k] */
    float *weight;                   /* [N, k] */
    int32_t *start;                  /* [local experts + 1] */
    int32_t *pair;                   /* [N * k] */
    tr_act *expert_out;              /* [N * k, hidden] */
    struct {            /* rows to experts of other ranks (exchange.c); M rows may come at a time */
        void *out, *in; /* [n_out], [M] records */
        int32_t *count, *origin;     /* [members], [n_out] */
        int32_t *expert, *n;         /* [M, k]; one word */
        float *weight;               /* [M, k] */
        tr_act *y, *back;            /* [M, hidden], [n_out, hidden] */
        size_t in_bytes, back_bytes; /* of in and back */
        uint8_t *q;                  /* [M, hidden] codes of what came, and */
        float *q_scale; /* [hidden / 128, M rounded up to 4] their scales; where rows travel so */
    } moe;
    float
        *handoff; /* [N, hidden] rows on their way to the next stage; changes places with hidden */
    float *head_own,
        *head_all;     /* [N, hidden] head rows of this member, of all (context parallelism) */
    int32_t *n_head;   /* one word: live rows of a head chunk */
    tr_act *head_in;   /* [n_head_chunk, hidden] */
    float *logits;     /* [n_head_chunk, this rank's vocab] */
    float *logits_all; /* [vocab]: one row, where the vocabulary is cut; */
    void *part_own, *part_all; /* [n_head_chunk] sample or logprob parts, of this member, of all; */
    int32_t *better_own, *better_all; /* [n_head_chunk], of all */
    void *scratch;                    /* of the operation that runs */
    size_t scratch_bytes;
} tr_workspace;

typedef struct tr_finite tr_finite; /* finite.c */

enum { TR_MEMBERS_MAX = 1024 }; /* of one group: sizes of what each member gives are on the stack */

enum { TR_MODEL_ALLOCATIONS = 64 };

struct tr_model {
    const tr_config *config;
    const tr_weights *weights;
    tr_device *device;
    const tr_ops *ops;
    tr_groups groups;
    tr_comm *moving; /* a group with members, if there is one: whoever advances it advances all */
    tr_regions *regions;
    bool joins; /* the host computes, and for itself alone */
    const tr_probe *probe;
    tr_watchdog *watch;

    int max_rows, n_stripe, n_head_chunk, max_model_len;
    int heads;               /* this rank's */
    int moe_rows, moe_share; /* rows that may come to the experts at a time; of one member */
    bool moe_exchange; /* rows go to the experts' ranks; else all ranks of moe have the same rows */
    int moe_same; /* members of moe that have the same rows where no prompt is split, one behind the other; 0: not so */
    bool no_overlap, sync_check;
    tr_finite *finite;      /* NULL: nobody looks */
    tr_lane lane;           /* where operations go */
    tr_device_times *times; /* made by the first tr_model_time; NULL: never */
    tr_stamps *stamps;      /* its pool */
    bool timing;            /* now */
    int stamp_every;        /* so many replays one has stamps */
    uint64_t n_replays;     /* while timing */
    tr_comm *owed;          /* over which ws.block_out is still to be added up; NULL: it is a sum */
    bool replaying;         /* operations are noted, not run: a graph has them */
    tr_overlap *overlap;    /* [this stage's layers]; with part only */
    int i_layer;            /* of this stage's, the one that runs */
    uint64_t *counted;      /* on the device: [this stage's layers, n_local] rows of each expert */
    uint64_t *expert_rows;  /* the same as they were last looked at */
    int n_local;            /* experts of this rank */
    tr_part *part;          /* attn_cp of more than one: what of a plan is this member's */
    int32_t *page_table;    /* host copy [n_slots, max_pages]; with part only */
    tr_ticket sent;         /* the last send to the next stage */
    bool sending;
    float attention_scale;
    tr_cache *cache;
    tr_share *share_key, *share_latent;
    tr_slots slots;
    float *rope;         /* [max_model_len, d_rope / 2, 2] */
    uint32_t *has_token; /* bit per id */
    tr_workspace ws;

    void *owned[TR_MODEL_ALLOCATIONS]; /* device memory to release */
    int n_owned;
    size_t owned_bytes;

    int region_op[TR_N_OPS], region_step, region_layer, region_attention, region_dense, region_moe,
        region_head, region_comm, region_exchange, region_gather;
    double note_bytes,
        note_flops; /* what the next operation moves and computes; cleared when it ends */
};

/* The rows of the step that runs: live count on the host, for bytes and flops and for skipping what has nothing to do. */
typedef struct tr_pass {
    const tr_plan *plan; /* this member's part */
    tr_rows rows;
    int n;      /* live rows */
    int n_max;  /* of which kernels are launched: rows.n_max */
    int n_head; /* head rows, likewise */
    bool split; /* the members of attn_cp have different ones */
    int rounds; /* of the exchange with the experts: the same on all its members */
    int each; /* rows of every replica, at most, when they are told to all experts instead; 0: they are dispatched */
} tr_pass;

/* Run an operation on the model's lane as a region of its name; an error names it. */
#define TR_RUN(model, op, err, ...)                                                                \
    (tr_region_begin((model)->regions, (model)->region_op[TR_OP_ID_##op]),                         \
     tr_model_ran((model), #op,                                                                    \
                  (model)->replaying                                                               \
                      ? TR_OK                                                                      \
                      : (model)->ops->op((model)->device, (model)->lane,                           \
                                         &(const struct tr_##op##_args){__VA_ARGS__}),             \
                  err))
tr_status tr_model_ran(tr_model *m, const char *op, tr_status st, tr_err *err);
/* Between a region's begin or end and the next one there are arguments to be put together and no more: one reading of the clock
 * serves both. Not so where launches, communicators or a probe take their time in between. */
static inline void tr_model_joins(tr_model *m)
{
    if (m->joins && !m->probe) tr_region_joins(m->regions);
}

/* out = in w^T for all rows of the pass; tr_model_scores: into fp32. */
tr_status tr_model_linear(tr_model *m, const tr_pass *p, const tr_linear *w, const tr_act *in,
                          tr_act *out, tr_err *err);
tr_status tr_model_scores(tr_model *m, const tr_pass *p, const tr_linear *w, const tr_act *in,
                          float *out, tr_err *err);
/* Work that has its own inputs and outputs runs beside the main lane's where few rows leave the device idle: between fork, or
 * turn where it goes on with what the main lane has made, and back it goes to the side lane; the main lane waits at join. */
bool tr_model_forks(const tr_model *m, const tr_pass *p);
tr_status tr_model_fork(tr_model *m, const tr_pass *p, tr_err *err);
void tr_model_back(tr_model *m);
tr_status tr_model_join(tr_model *m, const tr_pass *p, tr_err *err);
/* A third lane, for products of `in` and what needs no more than them: whether it may be had, begin (back ends it), wait;
 * side_joins: the side lane waits, for what this one has been given so far. */
bool tr_model_forks_again(const tr_model *m, const tr_pass *p, const tr_act *in);
tr_status tr_model_fork_again(tr_model *m, tr_err *err);
tr_status tr_model_join_again(tr_model *m, tr_err *err);
tr_status tr_model_side_joins_again(tr_model *m, tr_err *err);
/* in, as linear and moe want it. */
tr_acts tr_model_acts(const tr_model *m, const tr_pass *p, const tr_act *in, int d);
/* Room for the e4m3 form of `in`, which the next product of this lane is to take, with w: where w's product reads nothing else, who
 * makes `in` writes that instead. q NULL: it reads `in`, or wants to quantise it. */
tr_quantised tr_model_codes(tr_model *m, const tr_linear *w, const tr_act *in);
/* residual += add, out = RMSNorm of it; where the products behind want it, e4m3 of that too. */
tr_status tr_model_norm(tr_model *m, const tr_pass *p, int d, int i_quant, const tr_act *add,
                        float *residual, const float *weight, tr_act *out, tr_err *err);
/* A few words from the device, after everything enqueued so far: waits. */
tr_status tr_model_fetch_words(tr_model *m, void *host, const void *dev, size_t bytes, tr_err *err);
/* A collective that was begun: wait for it, as a region. */
tr_status tr_model_await(tr_model *m, tr_comm *group, tr_status begun, tr_ticket ticket,
                         double bytes, tr_err *err);
/* Where moe_pack adds up the rows of the experts of the layer that runs. */
uint64_t *tr_model_expert_rows(const tr_model *m);
/* Bytes of an activation in a row that travels to these experts: TR_CODES where their products take them so, whatever the rows. */
size_t tr_model_travel_act(const tr_model *m, const tr_moe_weights *w);
/* This member's experts on the pass's rows: their products to ws.expert_out, [rows of them, hidden]; ws.start, ws.pair say whose. */
tr_status tr_model_experts(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_err *err);
/* Sum of [n_max, hidden] over a group, begun and awaited; nothing in a group of one. */
tr_status tr_model_reduce(tr_model *m, const tr_pass *p, tr_comm *group, tr_act *x, tr_err *err);
/* The same of ws.block_out, which nobody but the next tr_model_norm reads: where sum and norm are one operation (tr_comm_fuses)
 * it is left to that. */
tr_status tr_model_owe(tr_model *m, const tr_pass *p, tr_comm *group, tr_err *err);
/* x + i numbers. */
tr_act *tr_model_act_at(const tr_model *m, tr_act *x, size_t i);
/* Show a named intermediate to the probe, if there is one. */
void tr_model_show(tr_model *m, const char *name, int layer, int i_row, int n_rows, int n_cols,
                   size_t ld, void *data);

/* layer.c: one decoder layer; the residual is ws.hidden, block_out of the layer before is still to be added. i_layer counts this
 * stage's layers, `layer` is the model's number. */
tr_status tr_layer_forward(tr_model *m, const tr_pass *p, int i_layer, int layer, const tr_act *add,
                           tr_err *err);
/* attention.c: ws.normed -> ws.block_out. */
tr_status tr_attention_forward(tr_model *m, const tr_pass *p, const tr_attention_weights *w,
                               tr_kv_layer kv, int layer, tr_err *err);
/* The attention group shares the selection of keys: its members exchange lists. */
bool tr_attention_shares(const tr_model *m, const tr_pass *p);
/* ffn.c: ws.normed -> ws.block_out. */
tr_status tr_dense_forward(tr_model *m, const tr_pass *p, const tr_mlp_weights *w, tr_err *err);
tr_status tr_moe_forward(tr_model *m, const tr_pass *p, const tr_moe_weights *w, int layer,
                         tr_err *err);

/* exchange.c: out = what the experts of all ranks make of the rows of ws.normed (experts and weights are chosen) and the sum of
 * the members' shared experts. shared: writes this member's part of these into out; runs once, while the first rows travel. */
tr_status tr_moe_exchange(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_act *out,
                          tr_status (*shared)(tr_model *, const tr_pass *, const tr_moe_weights *,
                                              tr_err *),
                          tr_err *err);
/* How this step's rows go to the experts: rounds of exchange, or all to all. Collective over moe, by way of the host. */
tr_status tr_moe_rounds(tr_model *m, tr_pass *p, tr_err *err);
/* The same as tr_moe_exchange for a pass with `each`: nothing of it is up to the host, so that it may be recorded. */
tr_status tr_moe_tell(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_act *out,
                      tr_status (*shared)(tr_model *, const tr_pass *, const tr_moe_weights *,
                                          tr_err *),
                      tr_err *err);

/* stage.c: ws.hidden from the stage before, to the next one. */
tr_status tr_stage_receive(tr_model *m, const tr_pass *p, tr_err *err);
tr_status tr_stage_send(tr_model *m, const tr_pass *p, tr_err *err);

/* finite.c: where rows stop being finite. All but create do nothing in a model that was not asked to look.
 * begin: slots that a plan opens are as new. embedding, layer: ws.hidden as these left it. receive, send: behind the rows, from
 * the stage before, to the next one. tell: the step's outputs are on the host; collective over attn_cp. */
tr_status tr_finite_create(tr_model *m, tr_err *err);
void tr_finite_free(tr_model *m);
void tr_finite_begin(tr_model *m, const tr_plan *plan);
tr_status tr_finite_embedding(tr_model *m, const tr_pass *p, tr_err *err);
tr_status tr_finite_layer(tr_model *m, const tr_pass *p, int layer, tr_err *err);
tr_status tr_finite_receive(tr_model *m, const tr_pass *p, tr_err *err);
tr_status tr_finite_send(tr_model *m, const tr_pass *p, tr_err *err);
tr_status tr_finite_tell(tr_model *m, tr_step *step, tr_err *err);

/* head.c: logits of the rows that asked for them, and a token or a score of each. ws.normed: RMSNorm of the last layer. */
tr_status tr_head_forward(tr_model *m, const tr_pass *p, struct tr_step_memory *s, tr_err *err);

/* A recorded step: of up to n_max rows, all with logits, that see up to max_context keys. */
typedef struct tr_step_graph {
    int n_max, max_context, each;
    uint32_t flags;    /* of the plan: which operations there are */
    bool has_head;     /* else it ends before the head's products */
    tr_graph *graph;   /* NULL: not recorded yet */
    tr_graph *stamped; /* the same with stamps around its layers; NULL: none yet */
    tr_stamps *stamps; /* that it takes */
    tr_stamp_set *set; /* which of them have been read */
    bool cannot_stamp; /* there was no memory for it */
} tr_step_graph;

enum { TR_STEP_GRAPHS = 48, TR_GRAPH_ROWS = 256 };

/* graph.c: steps that decode as records of their operations, and time on the device. tr_graph_fits: the step can be one.
 * _network: what tr_model_network does, from a record, which the first step of its kind makes. */
bool tr_graph_fits(const tr_model *m, const tr_pass *p);
tr_status tr_graph_network(tr_model *m, tr_pass *p, tr_step *step, tr_err *err);
void tr_graph_drop(tr_model *m, tr_step_graph *g);
void tr_graph_close(tr_model *m);                   /* what timing has allocated */
tr_device_times *tr_model_times(const tr_model *m); /* NULL: steps are not timed on the device */
/* model.c: from the embedding or the stage before to the head or the next one; without the head's products, which tr_model_head
 * then makes. */
tr_status tr_model_network(tr_model *m, tr_pass *p, tr_step *step, bool with_head, tr_err *err);
tr_status tr_model_head(tr_model *m, const tr_pass *p, tr_step *step, tr_err *err);

/* A step's own memory: plan and rows on the device, outputs on device and host; graphs that use them. */
struct tr_step_memory {
    tr_step_graph graph[TR_STEP_GRAPHS];
    int n_graphs;
    bool no_records; /* for want of memory: steps that have none run as they are */
    void *plan;      /* device copy of the block; of this member's part */
    tr_rows rows;
    void *head_plan;                   /* with parts: the whole plan's head rows, */
    tr_rows head_rows;                 /* each a row of its own */
    int32_t *head_index;               /* [n_head] where each of them lies in ws.head_all */
    int32_t *token, *rank, *top_token; /* device: [n_head_max] (x TR_MAX_LOGPROBS) */
    float *logprob, *top_logprob;
    void *owned[40];
    int n_owned;
};

/* memory.c: everything a model allocates, at creation: first all but the cache. */
tr_status tr_model_allocate(tr_model *m, const tr_model_options *options, const uint32_t *has_token,
                            tr_err *err);
tr_status tr_model_allocate_cache(tr_model *m, tr_dtype dtype, int n_pages, tr_err *err);
tr_status tr_model_take(tr_model *m, size_t bytes, void *out,
                        tr_err *err); /* out: the address of a pointer */
void tr_model_release(tr_model *m);

#endif
