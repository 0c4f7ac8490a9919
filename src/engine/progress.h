/* How far an unfinished request has come: the generated tokens of its choices, with their scores, and the scores of its prompt.
 * The scheduler copies it out at a step boundary; given back with the same request in another run (tr_request.progress) the
 * request goes on as after a preemption, and ends as if nothing had been between. Plain data; what a file says of it is
 * checked here and by replaying the tokens. */
#ifndef TR_ENGINE_PROGRESS_H
#define TR_ENGINE_PROGRESS_H

#include "engine/request.h"

typedef struct tr_progress_choice {
    int32_t *token; /* [n_token] */
    int n_token;
    tr_scores scores; /* n = n_token where n_logprobs >= 0, else 0 */
} tr_progress_choice;

struct tr_progress {
    uint64_t id;          /* the request's */
    uint64_t prompt, key; /* tr_progress_prompt_hash; params.key */
    int n_prompt, max_tokens, n_logprobs, n_prompt_logprobs; /* the request's, for comparison */
    int n_choices;
    tr_progress_choice *choice; /* [n_choices] */
    tr_scores prompt_scores;    /* of the first n tokens behind the first */
    /* 0: the request is unfinished. Else it has ended, in the event that is the n-th to be taken from its engine (from 1), and
     * whoever takes and records events knows whether it still needs this. Not kept in files. */
    uint64_t n_event;
    bool unfit;        /* the scheduler could not go on with it: the request began anew */
    tr_progress *next; /* of a list */
};

/* Room for n_choices; everything else is 0. NULL: out of memory. */
tr_progress *tr_progress_create(int n_choices);
/* Of a request: what is for comparison is filled in. NULL: out of memory. */
tr_progress *tr_progress_begin(const tr_request *r);
/* Copies: choice i's tokens (none so far), the scores of those of them that are scored; the prompt's first n scores. False: out of
 * memory. */
bool tr_progress_put_choice(tr_progress *p, int i, const int32_t *token, int n,
                            const tr_scores *scores);
bool tr_progress_put_prompt(tr_progress *p, const tr_scores *scores, int n);
/* All that an event DONE holds, so that another run has its answer without computing it. NULL: out of memory. */
tr_progress *tr_progress_of(const tr_event *e);
void tr_progress_free(tr_progress *p);      /* NULL is fine */
void tr_progress_free_list(tr_progress *p); /* and what follows */

uint64_t tr_progress_prompt_hash(const int32_t *prompt, size_t n);
/* Room for n entries of n_top alternatives; the arrays of n = 0 are NULL. False: out of memory, nothing is held. */
bool tr_scores_create(tr_scores *s, int n, int n_top);
void tr_scores_free(tr_scores *s);
/* Entries [0, n) of from to the beginning of to: the same n_top. */
void tr_scores_copy(tr_scores *to, const tr_scores *from, int n);

/* It is this request's, and no number in it is out of range. That its tokens are what the request would have become up to
 * there is another thing: tokens that should have ended a choice show when they are replayed. */
bool tr_progress_fits(const tr_progress *p, const tr_request *r, int n_vocab);

#endif
