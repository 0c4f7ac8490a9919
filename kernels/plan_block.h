/* The plan block: what one step does, as one contiguous run of bytes. The scheduler writes it, MPI carries it, the device
 * gets it, plan_apply reads it: the same bytes everywhere. Little-endian, fixed-size fields, sections at byte offsets
 * from the start of the block, each aligned to 8. Building and checking: model/plan.h. Nothing here is trusted before
 * tr_plan_check has seen it. (Here and not in model/, because kernels may not include model/.) */
#ifndef TR_KERNELS_PLAN_BLOCK_H
#define TR_KERNELS_PLAN_BLOCK_H

#include <stdint.h>

enum { TR_PLAN_VERSION = 2, TR_PLAN_MAGIC = 0x4e4c5054 }; /* "TPLN" */

typedef enum tr_span_kind {
    TR_SPAN_PREFILL,
    TR_SPAN_DECODE,
    TR_SPAN_VERIFY,
    TR_SPAN_DRAFT
} tr_span_kind;

enum { /* tr_span.flags */
       /* A prompt's rows, from a position < index_topk on. Those at positions < index_topk take the multi-head form of MLA over all
     * keys up to their own position, no selection (model.md 3.4, 4.6); those behind them the absorbed form, as rows of other
     * spans do. A row keeps its form when it is computed again after a preemption: the two forms agree in exact arithmetic,
     * not in bits. */
       TR_SPAN_DENSE = 1,
       /* What one member of a context-parallel group computes of a span (model/part.h); never in a plan that travels.
     * Neighbouring rows lie 1 + skip positions apart (their tokens too), and there may be none at all. */
       TR_SPAN_PART = 2,
};

typedef struct
    tr_span { /* consecutive rows of one slot: a prompt chunk, a decode row, a verify run */
    int32_t slot, n_rows;
    int32_t position;    /* first row; -1: the slot's length on the device */
    int32_t i_token;     /* in tokens[]; -1: the slot's last token on the device (n_rows is 1) */
    int16_t kind, owner; /* owner: CP rank that decodes it, -1 all */
    int32_t n_logits;    /* trailing rows that reach the head: 0, 1, or all when scoring */
    uint32_t flags;
    int32_t skip, begin,
        end; /* TR_SPAN_PART, else 0: [begin, end) are the positions of the whole span */
} tr_span;

typedef struct tr_page_set { /* page_table[slot][i_page] = page */
    int32_t slot, i_page, page;
} tr_page_set;

typedef struct
    tr_page_copy { /* rows [0, n_rows) of one page into another, every layer: fork of a half-filled page (n > 1) */
    int32_t from, to, n_rows;
} tr_page_copy;

typedef struct
    tr_slot_open { /* sampling parameters travel once, at admission; the slot's length becomes 0 */
    uint64_t key;  /* Philox key of this choice (architecture.md 4) */
    int32_t slot, top_k; /* top_k <= 0: off */
    int32_t n_logprobs,
        n_prompt_logprobs; /* -1: none wanted; 0: of the token alone; else that many best too (<= 20) */
    float temperature, top_p, min_p; /* temperature < 1e-5: greedy */
    uint32_t flags;
} tr_slot_open;

/* A change to one logit, in the order of chat.md 4.2: add bias (-inf masks), then divide or multiply by `repetition`
 * (a positive logit is divided, others multiplied; 1: nothing), then subtract `penalty`. Sorted by (head_row, token). */
typedef struct tr_logit_change {
    int32_t head_row, token;
    float bias, repetition, penalty;
    uint32_t pad;
} tr_logit_change;

enum {                           /* tr_plan.flags */
       TR_PLAN_STOP = 1,         /* last plan: nothing is computed, everybody leaves */
       TR_PLAN_IDLE = 2,         /* no rows: collectives only */
       TR_PLAN_HAS_DENSE = 4,    /* some row takes the multi-head form */
       TR_PLAN_HAS_ABSORBED = 8, /* some row does not */
       TR_PLAN_HAS_SELECTION =
           16, /* some absorbed row's position >= index_topk: the indexer must score */
       TR_PLAN_PROFILE = 32,
       TR_PLAN_AFTER_TOKENS =
           64, /* was planned with the previous step's tokens known on the host */
       TR_PLAN_HAS_SCORES =
           128, /* some slot wants log-probabilities: logprob, rank and top tokens are read */
       TR_PLAN_GREEDY = 256, /* every sampled row's temperature is 0 */
};

typedef struct tr_plan { /* header; sections follow */
    uint32_t magic, version, bytes, flags;
    uint64_t step;
    uint32_t ring, pad;
    int32_t n_rows, n_head_rows;  /* sums over the spans of n_rows and n_logits */
    int32_t max_context;          /* largest number of keys any row sees (position + 1) */
    int32_t layout, bucket, tier; /* CUDA graphs and CP layouts: 0 so far */
    int32_t n_spans, n_tokens, n_page_sets, n_copies, n_opens, n_targets, n_changes, pad2;
    uint32_t at_spans, at_tokens, at_page_sets, at_copies, at_opens, at_targets, at_changes, pad3;
} tr_plan;

/* The sections. tokens: int32, token ids. targets: int32 [n_head_rows], in the order of the spans: the token whose
 * log-probability is asked for at that row (a prompt's next token), or -1: sample here. */
static inline const tr_span *tr_plan_spans(const tr_plan *p)
{
    return (const tr_span *)(const void *)((const char *)p + p->at_spans);
}
static inline const int32_t *tr_plan_tokens(const tr_plan *p)
{
    return (const int32_t *)(const void *)((const char *)p + p->at_tokens);
}
static inline const tr_page_set *tr_plan_page_sets(const tr_plan *p)
{
    return (const tr_page_set *)(const void *)((const char *)p + p->at_page_sets);
}
static inline const tr_page_copy *tr_plan_copies(const tr_plan *p)
{
    return (const tr_page_copy *)(const void *)((const char *)p + p->at_copies);
}
static inline const tr_slot_open *tr_plan_opens(const tr_plan *p)
{
    return (const tr_slot_open *)(const void *)((const char *)p + p->at_opens);
}
static inline const int32_t *tr_plan_targets(const tr_plan *p)
{
    return (const int32_t *)(const void *)((const char *)p + p->at_targets);
}
static inline const tr_logit_change *tr_plan_changes(const tr_plan *p)
{
    return (const tr_logit_change *)(const void *)((const char *)p + p->at_changes);
}

#endif
