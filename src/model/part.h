/* The part of a plan that one member of a context-parallel group computes (parallel.md 3): prompt spans are dealt out by the
 * layout, rows of generated tokens are computed by every member ("replicate", 3.6). Pure functions of the plan; every member
 * knows every other's part. */
#ifndef TR_MODEL_PART_H
#define TR_MODEL_PART_H

#include "kernels/plan_block.h"
#include "model/layout.h"
#include "model/plan.h"

typedef struct tr_part
    tr_part; /* one step's, for one member; memory for any plan within the limits */

/* member of n_members > 1. NULL: out of memory. */
tr_part *tr_part_create(const tr_plan_limits *limits, tr_cp_mode mode, int member, int n_members);
void tr_part_free(tr_part *p);
/* Bytes of a part at most, and at least those of a whole plan: what a device copy needs. */
size_t tr_part_bytes_max(const tr_plan_limits *limits);

/* Divide a checked plan, which must stay as long as the results are used. page_table [n_slots, max_pages]: the host's copy, with
 * the plan's page sets already in it. */
void tr_part_make(tr_part *p, const tr_plan *plan, const int32_t *page_table, int max_pages);

/* False: nothing of the plan is split (generated tokens alone, or prompts too short to be); every member runs the plan as it is,
 * and rows, head, heads and head_index below are not made. */
bool tr_part_is_split(const tr_part *p);

/* The results. rows: the plan with this member's spans (TR_SPAN_PART), its head rows without targets or changes: the rows of
 * the network. head: the plan's head rows alone, all of them, in order, each a row of its own: what sampling needs. */
const tr_plan *tr_part_rows(const tr_part *p), *tr_part_head(const tr_part *p);

/* For tr_share_plan: how many rows each member writes [n_members], and the cache rows of all, member after member. */
const int *tr_part_written(const tr_part *p);
const int64_t *tr_part_write_rows(const tr_part *p);

/* Head rows each member computes [n_members]; and, for each head row of the plan, where it lies among these, member after member.
 * Rows that everybody computes (generated tokens) are member 0's. */
const int *tr_part_heads(const tr_part *p);
const int32_t *tr_part_head_index(const tr_part *p);

#endif
