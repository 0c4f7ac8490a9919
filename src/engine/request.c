#include <config.h>

#include "engine/request.h"

#include <stdlib.h>

void tr_request_free(tr_request *r)
{
    if (!r) return;
    if (r->free_user) r->free_user(r->user);
    for (int i = 0; i < r->params.n_stop; i++)
        free(r->params.stop[i].s);
    free(r->params.stop);
    free(r->params.stop_token);
    free(r->params.bias);
    free(r->prompt);
    free(r);
}

static void scores_free(tr_scores *s)
{
    free(s->logprob);
    free(s->rank);
    free(s->top_token);
    free(s->top_logprob);
}

void tr_event_free(tr_event *e)
{
    if (!e) return;
    for (int i = 0; e->choice && i < e->n_choices; i++) {
        free(e->choice[i].token);
        free(e->choice[i].text);
        scores_free(&e->choice[i].scores);
    }
    free(e->choice);
    scores_free(&e->prompt_scores);
    tr_request_free(e->request);
    free(e);
}

uint64_t tr_choice_key(uint64_t key, int i)
{
    uint64_t z = key + ((uint64_t)i + 1) * UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}
