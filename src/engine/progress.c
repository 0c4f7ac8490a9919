#include <config.h>

#include "engine/progress.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"

tr_progress *tr_progress_create(int n_choices)
{
    tr_progress *p = calloc(1, sizeof *p);

    if (p) p->choice = tr_calloc((size_t)n_choices, sizeof *p->choice);
    if (!p || !p->choice) {
        free(p);
        return NULL;
    }
    p->n_choices = n_choices;
    return p;
}

tr_progress *tr_progress_begin(const tr_request *r)
{
    const tr_params *params = &r->params;
    tr_progress *p = tr_progress_create(params->n);

    if (!p) return NULL;
    p->id = r->id;
    p->prompt = tr_progress_prompt_hash(r->prompt, r->n_prompt);
    p->key = params->key;
    p->n_prompt = (int)r->n_prompt;
    p->max_tokens = params->max_tokens;
    p->n_logprobs = params->n_logprobs;
    p->n_prompt_logprobs = params->n_prompt_logprobs;
    return p;
}

bool tr_progress_put_choice(tr_progress *p, int i, const int32_t *token, int n,
                            const tr_scores *scores)
{
    tr_progress_choice *to = &p->choice[i];
    const int n_scores = scores->n < n ? scores->n : n;

    if (!n) return true;
    to->token = tr_calloc((size_t)n, sizeof *to->token);
    if (!to->token || !tr_scores_create(&to->scores, n_scores, scores->n_top)) return false;
    memcpy(to->token, token, (size_t)n * sizeof *to->token);
    to->n_token = n;
    tr_scores_copy(&to->scores, scores, n_scores);
    return true;
}

bool tr_progress_put_prompt(tr_progress *p, const tr_scores *scores, int n)
{
    if (!tr_scores_create(&p->prompt_scores, n, scores->n_top)) return false;
    tr_scores_copy(&p->prompt_scores, scores, n);
    return true;
}

tr_progress *tr_progress_of(const tr_event *e)
{
    tr_progress *p = tr_progress_begin(e->request);
    bool ok = p && tr_progress_put_prompt(p, &e->prompt_scores, e->prompt_scores.n);

    for (int i = 0; ok && i < p->n_choices; i++)
        ok = tr_progress_put_choice(p, i, e->choice[i].token, e->choice[i].n_token,
                                    &e->choice[i].scores);
    if (ok) return p;
    tr_progress_free(p);
    return NULL;
}

void tr_progress_free(tr_progress *p)
{
    if (!p) return;
    for (int i = 0; i < p->n_choices; i++) {
        free(p->choice[i].token);
        tr_scores_free(&p->choice[i].scores);
    }
    free(p->choice);
    tr_scores_free(&p->prompt_scores);
    free(p);
}

void tr_progress_free_list(tr_progress *p)
{
    while (p) {
        tr_progress *next = p->next;
        tr_progress_free(p);
        p = next;
    }
}

uint64_t tr_progress_prompt_hash(const int32_t *prompt, size_t n)
{
    return tr_hash64(prompt, n * sizeof *prompt, n);
}

bool tr_scores_create(tr_scores *s, int n, int n_top)
{
    size_t n_all;

    *s = (tr_scores){.n_top = n_top};
    if (!n) return true;
    if (!tr_mul(&n_all, (size_t)n, (size_t)n_top)) return false;
    s->logprob = tr_calloc((size_t)n, sizeof *s->logprob);
    s->rank = tr_calloc((size_t)n, sizeof *s->rank);
    s->top_token = tr_calloc(n_all, sizeof *s->top_token);
    s->top_logprob = tr_calloc(n_all, sizeof *s->top_logprob);
    s->n = n;
    if (s->logprob && s->rank && s->top_token && s->top_logprob) return true;
    tr_scores_free(s);
    return false;
}

void tr_scores_free(tr_scores *s)
{
    free(s->logprob);
    free(s->rank);
    free(s->top_token);
    free(s->top_logprob);
    *s = (tr_scores){0};
}

void tr_scores_copy(tr_scores *to, const tr_scores *from, int n)
{
    const size_t rows = (size_t)n, all = rows * (size_t)from->n_top;

    if (!n) return;
    memcpy(to->logprob, from->logprob, rows * sizeof *to->logprob);
    memcpy(to->rank, from->rank, rows * sizeof *to->rank);
    if (!all) return;
    memcpy(to->top_token, from->top_token, all * sizeof *to->top_token);
    memcpy(to->top_logprob, from->top_logprob, all * sizeof *to->top_logprob);
}

/* Token ids where there are any, no rank below the first, and no log-probability that no step gives. */
static bool scores_fit(const tr_scores *s, int n_vocab)
{
    for (int i = 0; i < s->n; i++)
        if (isnan(s->logprob[i]) || s->rank[i] < 0 || s->rank[i] > n_vocab) return false;
    for (size_t i = 0; i < (size_t)s->n * (size_t)s->n_top; i++)
        if (isnan(s->top_logprob[i]) || s->top_token[i] < -1 || s->top_token[i] >= n_vocab)
            return false;
    return true;
}

static bool choice_fits(const tr_progress_choice *c, const tr_params *p, int n_vocab)
{
    const bool scored = p->n_logprobs >= 0;

    if (c->n_token < 0 || c->n_token > p->max_tokens) return false;
    if (c->scores.n != (scored ? c->n_token : 0)) return false;
    if (c->scores.n && c->scores.n_top != p->n_logprobs) return false;
    for (int i = 0; i < c->n_token; i++)
        if (c->token[i] < 0 || c->token[i] >= n_vocab) return false;
    return scores_fit(&c->scores, n_vocab);
}

bool tr_progress_fits(const tr_progress *p, const tr_request *r, int n_vocab)
{
    const tr_params *params = &r->params;
    const tr_scores *s = &p->prompt_scores;

    if (p->n_choices != params->n || p->n_prompt < 0 || (size_t)p->n_prompt != r->n_prompt ||
        p->key != params->key || p->max_tokens != params->max_tokens ||
        p->n_logprobs != params->n_logprobs || p->n_prompt_logprobs != params->n_prompt_logprobs ||
        p->prompt != tr_progress_prompt_hash(r->prompt, r->n_prompt))
        return false;
    if (s->n < 0 || s->n > (params->n_prompt_logprobs >= 0 ? p->n_prompt - 1 : 0) ||
        (s->n && s->n_top != params->n_prompt_logprobs) || !scores_fit(s, n_vocab))
        return false;
    for (int i = 0; i < p->n_choices; i++)
        if (!choice_fits(&p->choice[i], params, n_vocab)) return false;
    return true;
}
