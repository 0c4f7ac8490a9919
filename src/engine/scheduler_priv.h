/* The scheduler's own struct, shared by scheduler.c (queues, pages, ends, commit) and planner.c (the next step's plan). */
#ifndef TR_ENGINE_SCHEDULER_PRIV_H
#define TR_ENGINE_SCHEDULER_PRIV_H

#include "base/size.h"
#include "engine/pages.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"

typedef struct tr_head_row { /* who waits for one head row of a step in flight */
    tr_sequence *sequence;   /* NULL: nobody any more */
    int32_t i_score;         /* prompt score of token i_score + 1; -1: its next token */
} tr_head_row;

typedef struct tr_written { /* prompt rows [.., end) of a step in flight */
    tr_sequence *sequence;  /* NULL: it has left its pages */
    int end;
} tr_written;

typedef struct tr_flight { /* a step that was planned and not yet committed */
    tr_head_row *head;     /* [n_head_max] */
    tr_written *written;   /* [max_sequences] */
    int n_head, n_written, n_prefill, n_decode;
} tr_flight;

typedef struct tr_group_list {
    tr_group *first, *last;
} tr_group_list;

struct tr_scheduler {
    tr_scheduler_options options;
    tr_pages *pages;
    tr_plan_builder *builder;
    uint64_t step; /* the next to be planned; from 1 */
    uint64_t n_orders;
    tr_group_list groups, done;
    tr_sequence *first_waiting, *last_waiting; /* oldest first */
    int n_waiting;
    tr_sequence **running; /* [max_sequences], oldest first */
    int n_running;
    bool *slot_used;   /* [max_sequences] */
    int n_prefixes;    /* groups that hold one */
    tr_flight *flight; /* [ring], oldest at i_flight */
    int i_flight, n_flight;
    tr_scheduler_stats stats;

    /* What the plan being made has left. Every running sequence has one row and one head row of its own; rows_left and
     * head_left are what there is beyond these. */
    int batch_left, rows_left, head_left, changes_left, decode_left;
    bool waits_for_pages; /* an older sequence waits: no younger one may take a page before it */
    bool preempted;
    bool draining; /* no request is begun any more */
};

static inline int tr_pages_for(int n_rows)
{
    return (int)tr_ceil_div((size_t)n_rows, TR_PAGE_TOKENS);
}

/* Pages dropped before become free: those no step in flight can read. Nothing in flight: all of them. */
void tr_scheduler_mature(tr_scheduler *s);

/* Makes pages available, up to n, by evicting idle ones from the prefix index. Returns how many of the n there are. */
int tr_scheduler_reclaim(tr_scheduler *s, int n);

void tr_scheduler_drop_prefix(tr_scheduler *s, tr_group *g, uint64_t step);
/* Of the youngest group that holds one, rather not `spare`'s. Its choices to come compute the prompt again. */
bool tr_scheduler_drop_some_prefix(tr_scheduler *s, const tr_group *spare);
/* q can lend the rows [0, n_prompt - 1) of its cache: written by steps before the one being planned. */
bool tr_sequence_can_lend(const tr_sequence *q);
/* Back to the queue without slot and pages. Its tokens stay; what steps in flight sample for it is still taken in. */
void tr_scheduler_preempt(tr_scheduler *s, tr_sequence *q);
void tr_waiting_remove(tr_scheduler *s, tr_sequence *q);
void tr_running_insert(tr_scheduler *s, tr_sequence *q);

#endif
