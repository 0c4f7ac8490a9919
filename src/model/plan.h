/* The step plan: building the block of kernels/plan_block.h, and checking one that came from elsewhere. */
#ifndef TR_MODEL_PLAN_H
#define TR_MODEL_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/region.h"
#include "kernels/plan_block.h"

/* What a checker must know. */
typedef struct tr_plan_limits {
    int n_slots, n_pages, max_pages; /* pages per slot */
    int n_rows_max, n_head_max, n_vocab, index_topk;
} tr_plan_limits;

/* Builder: sections are appended in any order, then sealed into one block. Memory is allocated at creation for the
 * limits; nothing is allocated later. An append returns the index of its (first) entry, or -1 past the limits. */
typedef struct tr_plan_builder tr_plan_builder;
tr_plan_builder *tr_plan_builder_create(
    const tr_plan_limits *limits); /* NULL: out of memory, or impossible limits */
void tr_plan_builder_free(tr_plan_builder *b);
void tr_plan_begin(tr_plan_builder *b, uint64_t step, uint32_t flags);
/* n_tokens ids are copied behind the ones before; returns their i_token. */
int tr_plan_add_tokens(tr_plan_builder *b, const int32_t *tokens, int n_tokens);
int tr_plan_add_span(tr_plan_builder *b, tr_span span);
/* A row of a sequence whose last token and length the device knows, with the logits of its next token. */
int tr_plan_add_decode(tr_plan_builder *b, int slot);
int tr_plan_add_page(tr_plan_builder *b, tr_page_set set);
int tr_plan_add_copy(tr_plan_builder *b, tr_page_copy copy);
int tr_plan_add_open(tr_plan_builder *b, tr_slot_open open);
int tr_plan_add_targets(tr_plan_builder *b, const int32_t *targets, int n);
int tr_plan_add_change(tr_plan_builder *b, tr_logit_change change);
/* Header and sections in one block, owned by the builder until the next seal. max_context: the largest position + 1 of
 * any row, which the scheduler knows even where a span says -1. The HAS_ flags are computed here. */
const tr_plan *tr_plan_seal(tr_plan_builder *b, int max_context);
/* Bytes a sealed plan can have at most: staging is allocated with it. 0: no block can be that large (32-bit offsets). */
size_t tr_plan_bytes_max(const tr_plan_limits *limits);
/* Logit changes of one plan: a whole vocabulary for one head row, and up to 1024 more for every slot. One row always fits
 * alone; what does not fit beside others is planned in a later step. */
int tr_plan_changes_max(const tr_plan_limits *limits);

/* The plan of a replica that has nothing to do in a step: a header alone. Returns its bytes. */
size_t tr_plan_idle(void *block);

/* What a step does, for the profile: the first of prefill, verify, draft and decode that one of its spans is. */
tr_phase tr_plan_phase(const tr_plan *plan);

/* A plan comes from another rank: checked in full, like a file: TR_E_INPUT, nothing outside the block is read. Lengths of
 * slots whose span says -1 are not known here, nor what the page tables hold. Verify and draft spans and owners other
 * than -1 and 0 are refused until their features come. */
tr_status tr_plan_check(const tr_plan *plan, size_t bytes, const tr_plan_limits *limits,
                        tr_err *err);

#endif
