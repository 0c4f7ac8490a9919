/* A request while it is in the scheduler: a group of choices, each a sequence of prompt and generated tokens. Private to
 * the scheduler (scheduler.c, planner.c, sequence.c). Lives on the leader's main thread. */
#ifndef TR_ENGINE_SEQUENCE_H
#define TR_ENGINE_SEQUENCE_H

#include "engine/gaps.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "engine/stopper.h"

typedef struct tr_group tr_group;

typedef struct tr_count { /* how often a token was generated, for penalties */
    int32_t token, n;
} tr_count;

typedef enum tr_sequence_state {
    TR_SEQUENCE_WAITING,
    TR_SEQUENCE_RUNNING,
    TR_SEQUENCE_DONE
} tr_sequence_state;

/* One choice. Token i is prompt[i] for i < n_prompt, then token[i - n_prompt]; behind those lie n_flight tokens that steps in
 * flight sample. Rows [0, length) are written by the steps planned so far. The newest token has no row yet. */
typedef struct tr_sequence {
    tr_group *group;
    int i_choice;
    tr_sequence_state state;
    bool born;  /* was admitted once */
    bool fresh; /* was admitted for the plan being made: its slot is to be opened */
    int slot;
    int32_t *
        page; /* [page_cap] page[i] holds positions [64 i, 64 i + 64); allocated for the longest it can get */
    int n_pages, n_pages_sent; /* sent: of these the device's page table knows */
    int page_cap;
    int n_entered; /* full pages of the prompt that went into the index, or that it did not want */
    int length;
    int n_flight;
    int n_rows;        /* of the plan being made */
    int32_t copy_from; /* page whose rows begin page[n - 1] of a fork, -1: none */

    int32_t *token;
    int n_token, token_cap;
    tr_scores scores;
    int scores_cap;
    tr_stopper *stopper;
    tr_finish finish;
    uint64_t token_ns; /* when its newest token was taken, 0: none was */
    tr_count *count;   /* [n_count] sorted by token; only with penalties */
    int n_count, count_cap;

    struct tr_sequence *prev, *next; /* the waiting queue */
} tr_sequence;

struct tr_group {
    uint64_t order; /* of arrival */
    tr_event *event;
    const tr_params *params; /* the event's request's */
    const int32_t *prompt;
    int n_prompt;
    int n_choices, n_live, n_unborn;
    bool counted;  /* begun: its prompt is in the statistics of the cache */
    bool restored; /* it has tokens or scores of another run */
    bool aside;    /* of a run that ends: it could not be finished, so it is not gone on with */
    tr_sequence *sequence; /* [n_choices] */
    tr_stops *stops;
    tr_gaps gaps;

    int32_t *distinct; /* sorted distinct prompt tokens; only with a repetition penalty */
    int n_distinct;
    int32_t *mask; /* sorted distinct tokens masked by min_tokens */
    int n_mask;

    int n_scores;                         /* prompt scores wanted: n_prompt - 1, or 0 */
    int n_scores_planned, n_scores_taken; /* rows [0, planned) carried their logits once */

    /* Pages of prompt rows [0, n_prompt - 1), left by the last choice that had them to the choices not begun yet. */
    int32_t *prefix;
    int n_prefix;

    struct tr_group *prev, *next; /* the unfinished groups by order, or the finished ones */
};

/* NULL: out of memory; nothing was taken. */
tr_group *tr_group_create(tr_event *event, const tr_scheduler_options *options);
void tr_group_free(tr_group *g); /* and its event, when it still has one */

static inline int
tr_sequence_generated(const tr_sequence *q) /* tokens it has or will have from steps in flight */
{
    return q->n_token + q->n_flight;
}
/* Rows up to and with the one that samples the next token; without the last prompt row where nothing is sampled. */
static inline int tr_sequence_end(const tr_sequence *q)
{
    return q->group->n_prompt + tr_sequence_generated(q) - (q->group->params->max_tokens == 0);
}
static inline int32_t tr_sequence_token(const tr_sequence *q, int i)
{
    return i < q->group->n_prompt ? q->group->prompt[i] : q->token[i - q->group->n_prompt];
}
static inline bool tr_sequence_samples(const tr_sequence *q) /* another token may be planned */
{
    return tr_sequence_generated(q) < q->group->params->max_tokens;
}
/* Further tokens it needs for sure before anything can end it; what is in flight is not further. */
int tr_sequence_needs_more(const tr_sequence *q);
/* Penalties look at the tokens themselves, so all must be known. Bias and min_tokens do not. */
static inline bool tr_sequence_needs_tokens(const tr_sequence *q)
{
    const tr_params *p = q->group->params;
    return p->presence != 0 || p->frequency != 0 || p->repetition != 1;
}

/* Upper bound of the logit changes of its next sampled row (at most n_vocab), and the changes themselves, sorted. -1: the
 * builder is full. */
int tr_sequence_changes_max(const tr_sequence *q, int n_vocab);
int tr_sequence_add_changes(const tr_sequence *q, int head_row, tr_plan_builder *b);

/* Head row h of a step's output: a sampled token with its scores, and whether the choice goes on (0), has ended (1, finish is
 * set) or memory ran out (-1). */
int tr_sequence_take(tr_sequence *q, const tr_step_output *out, int h,
                     const tr_scheduler_options *options);
/* The log-probability of prompt token i + 1. */
void tr_group_take_score(tr_group *g, const tr_step_output *out, int h, int i);
/* A copy of what a group has so far: 1; 0: nothing yet (*out NULL); -1: out of memory. */
int tr_group_progress(const tr_group *g, tr_progress **out);
/* Into a new group. False: it does not fit, or memory ran out: the group is only good to be freed. */
bool tr_group_restore(tr_group *g, const tr_progress *p, const tr_scheduler_options *options);
/* All choices have ended: the event becomes DONE. */
void tr_group_finish(tr_group *g);
void tr_event_fail(tr_event *e, const char *code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#endif
