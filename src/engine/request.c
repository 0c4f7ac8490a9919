#include <config.h>

#include "engine/request.h"

#include <stdlib.h>

#include "engine/progress.h"

void tr_request_free(tr_request *r)
{
    if (!r) return;
    if (r->free_user) r->free_user(r->user);
    for (int i = 0; i < r->params.n_stop; i++)
        free(r->params.stop[i].s);
    free(r->params.stop);
    free(r->params.stop_token);
    free(r->params.bias);
    tr_progress_free(r->progress);
    free(r->prompt);
    free(r);
}

void tr_event_clear(tr_event *e)
{
    for (int i = 0; e->choice && i < e->n_choices; i++) {
        free(e->choice[i].token);
        free(e->choice[i].text);
        tr_scores_free(&e->choice[i].scores);
    }
    free(e->choice);
    e->choice = NULL;
    e->n_choices = 0;
    tr_scores_free(&e->prompt_scores);
}

void tr_event_free(tr_event *e)
{
    if (!e) return;
    tr_event_clear(e);
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
