/* What a rank will hold, send and take for a step, before there is one: pure functions of the config, the grid and a few
 * rates, for `plan`, for the default cut into stages, and for tests that compare the bytes with what the communicators
 * count. estimate.c has bytes, estimate_time.c seconds. Nothing here is measured at run time. */
#ifndef TR_MODEL_ESTIMATE_H
#define TR_MODEL_ESTIMATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"
#include "model/config.h"
#include "model/slice.h"
#include "mpi/grid.h"

/* ---- memory ------------------------------------------------------------------------------------------------------- */

typedef struct
    tr_weight_bytes { /* of one rank, in the checkpoint's formats with their scales; vectors as fp32 */
    uint64_t attention; /* with the indexer and the layers' norms */
    uint64_t dense, shared, routed, router;
    uint64_t embed, head; /* head: with the last norm */
    uint64_t mtp; /* the MTP layer's share, and the embedding where the stage has none of its own */
    uint64_t second_form; /* W_UK once more, transposed, for the absorbed form */
} tr_weight_bytes;

void tr_estimate_weights(tr_weight_bytes *out, const tr_config *config, const tr_slice *slice);
uint64_t tr_weight_bytes_total(const tr_weight_bytes *w);

/* Cache of one token in this rank's layers. */
uint64_t tr_estimate_cache_bytes(const tr_config *config, const tr_slice *slice, tr_dtype kv);

/* Buffers of a step of at most rows_max rows, whose activations take act_bytes each (4 on the CPU, 2 on a GPU). */
uint64_t tr_estimate_workspace(const tr_config *config, const tr_slice *slice, int rows_max,
                               int max_model_len, int act_bytes);

/* ---- traffic (parallel.md 2.7) --------------------------------------------------------------------------------------- */

typedef struct tr_wire { /* bytes of what travels */
    int act;             /* an activation in sums and hand-offs */
    int row_out;         /* a hidden row on its way to the experts, with its scales */
    int row_ids;         /* what goes with it: experts and weights */
    int row_back;        /* a row of results on its way back */
    int key, latent;     /* a token's index key and latent as the cache stores them */
} tr_wire;

/* f32 activations everywhere, 8 bytes for each of the k experts. */
tr_wire tr_wire_cpu(const tr_config *config, tr_dtype kv);
/* bf16 sums; fp8 rows with fp32 group scales to the experts, bf16 back, 6 bytes for each of the k experts. */
tr_wire tr_wire_gpu(const tr_config *config, tr_dtype kv);

typedef enum tr_moe_form {
    TR_MOE_FORM_AUTO, /* what the model does: REDUCE where MOE and ATTN_TP are the same ranks, else TELL where few rows decode, else
                         EXCHANGE */
    TR_MOE_FORM_REDUCE, /* parallel.md 2.1: same rows everywhere, partial sums added up */
    TR_MOE_FORM_GATHER, /* 2.3, `agrs` of 5.5: all rows to all members, sums scattered back */
    TR_MOE_FORM_TELL, /* all rows to all members, every member's sums back (src/model/exchange.c) */
    TR_MOE_FORM_EXCHANGE /* 2.4: rows to the ranks that have one of their experts, and back */
} tr_moe_form;

typedef struct tr_step_shape {
    bool prefill;
    int rows;        /* of one replica: tokens of the chunk, or running sequences */
    int64_t context; /* keys a decode row sees; in prefill: tokens before the chunk */
    int sampled;     /* rows of the replica that reach the head */
} tr_step_shape;

/* Rows each CP rank computes: a prefill chunk is split over cp, decode rows are not (parallel.md 3.6, `replicate`). */
int tr_step_rows(const tr_grid_sizes *sizes, const tr_step_shape *step);

typedef enum tr_wire_op {
    TR_WIRE_ALL_REDUCE,
    TR_WIRE_ALL_GATHER,
    TR_WIRE_REDUCE_SCATTER,
    TR_WIRE_ALL_TO_ALL,
    TR_WIRE_SEND,
} tr_wire_op;

const char *tr_wire_op_name(tr_wire_op op);

/* One collective of one rank. given: the bytes the caller hands in, as tr_comm_counts counts them (all-reduce: the buffer;
 * all-gather: the own part; reduce-scatter: all parts; all-to-all: all parts, the own one too). sent: what leaves the
 * rank by the cost model of parallel.md 0. An EXCHANGE's bytes are the expectation under uniform routing, the count
 * messages in front of it (4 bytes per expert) left out. */
typedef struct tr_traffic {
    const char *what;
    tr_grid_group group;
    tr_wire_op op;
    int n; /* members */
    double given, sent;
} tr_traffic;

enum { TR_TRAFFIC_MAX = 8 };

/* The collectives of one layer, in their order. moe: a MoE layer, else a dense one. Returns their number. */
int tr_estimate_layer_traffic(tr_traffic out[TR_TRAFFIC_MAX], const tr_config *config,
                              const tr_grid_sizes *sizes, const tr_wire *wire,
                              const tr_step_shape *step, tr_moe_form form, bool moe);

/* Those of a step beside its layers: the hand-off to the next stage (of a stage that has one), and sampling. */
int tr_estimate_step_traffic(tr_traffic out[TR_TRAFFIC_MAX], const tr_config *config,
                             const tr_grid_sizes *sizes, const tr_wire *wire,
                             const tr_step_shape *step);

/* Different rows that the members of one MOE block bring to its experts. */
int64_t tr_estimate_expert_rows(const tr_grid_sizes *sizes, const tr_step_shape *step);

/* D(R) of parallel.md 2.4: how many of ep ranks hold at least one of a token's experts, expected, under uniform routing with
 * the group limit. */
double tr_estimate_distinct(const tr_config *config, int ep);

/* ---- time ----------------------------------------------------------------------------------------------------------- */

/* What one kind of GPU does, as measured (estimate_time.c says where). Per second and per rank, unless it says otherwise. */
typedef struct tr_rates {
    const char *name;
    double memory; /* bytes */
    double read, stream,
        gather;        /* bytes: long reads; weights through products; scattered cache rows */
    double rows, move; /* bytes: norms and quantisation; rows to experts' order and back */
    double fp8, heads,
        plain; /* flop: large GEMMs; bf16 per head; router, index weights and head of many rows */
    double index, mla_prefill,
        mla; /* flop: index scores; sparse attention of chunks, of decode rows */
    double mha,
        mha_keys; /* flop: dense attention of prompts within index_topk; its keys and values */
    double index_read, topk_read;  /* bytes: index keys in decode; scores */
    double topk_row, topk_latency; /* seconds: selection, for each row; once */
    double mla_latency,
        plain_latency; /* seconds: sparse attention of a decode step; a router of more than 8 rows */
    double kernel_latency; /* seconds: a kernel that waits for the one in front of it */
    double step_latency;   /* seconds: from plan to tokens beside the layers and the head */
    double link, net;      /* bytes sent: inside a node, between nodes */
    double link_latency, link_hop,
        net_latency; /* seconds: a collective; more each time its ranks double; between nodes */
    double peer, peer_latency; /* sums by stores to peers: bytes sent; seconds */
    double unhidden;  /* part of the gathers of keys and latents that products do not hide */
    double host_wait; /* seconds: the host learns how many rows an all-to-all of a prompt's has */
    int peer_rows, ranks_per_node; /* sums of more rows go over the library */
    bool
        bound; /* nothing but the largest of bytes and flops of each operation: what no program is faster than */
} tr_rates;

/* "h200"; NULL: not known. */
const tr_rates *tr_rates_find(const char *name);
/* The same GPU without latencies, at the best rates that anything was seen to reach on it: the roofline. */
const tr_rates *tr_rates_bound(const char *name);

/* Does a group of this kind reach over more than one node, on any rank, ranks being placed in blocks? grid: of a member. */
bool tr_crosses_nodes(const tr_grid *grid, tr_grid_group group, int ranks_per_node);

/* One layer with its collectives, and the head with sampling and the step's own costs, of rank 0's place in its groups. Operations
 * follow each other; each takes its bytes and flops at the rates above, and a launch. */
double tr_estimate_layer_seconds(const tr_config *config, const tr_grid_sizes *sizes,
                                 const tr_wire *wire, const tr_rates *rates,
                                 const tr_step_shape *step, bool moe);
double tr_estimate_head_seconds(const tr_config *config, const tr_grid_sizes *sizes,
                                const tr_wire *wire, const tr_rates *rates,
                                const tr_step_shape *step);

/* Layers of each stage, stage_layers[sizes->pp], so that the slowest stage of a decode step is as fast as can be
 * (parallel.md 6): a function of config and sizes alone, the same on every rank and for every command. */
void tr_estimate_stages(const tr_config *config, const tr_grid_sizes *sizes, int *stage_layers);

#endif
