#include <config.h>

#include "engine/sequence.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "engine/progress.h"

/* ---- making ---------------------------------------------------------------------------------- */

static int compare_tokens(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* Sort ids, drop doubles and those outside the vocabulary; returns how many are left. */
static int sort_distinct(int32_t *id, int n, int n_vocab)
{
    int m = 0;

    qsort(id, (size_t)n, sizeof *id, compare_tokens);
    for (int i = 0; i < n; i++)
        if (id[i] >= 0 && id[i] < n_vocab && (m == 0 || id[m - 1] != id[i])) id[m++] = id[i];
    return m;
}

static bool sequence_create(tr_sequence *q, tr_group *g, int i_choice,
                            const tr_scheduler_options *options)
{
    /* Its longest: the newest of max_tokens tokens never gets a row. */
    int rows_max = g->n_prompt + (g->params->max_tokens > 0 ? g->params->max_tokens - 1 : 0);
    tr_stopper_options so = {
        .params = g->params,
        .stops = g->stops,
        .eos = options->eos,
        .bos = options->bos,
        .pad = options->pad,
        .has_text = options->vocabulary.bytes != NULL,
    };

    q->group = g;
    q->i_choice = i_choice;
    q->slot = -1;
    q->copy_from = -1;
    q->finish = TR_FINISH_LENGTH;
    q->page_cap = (int)tr_ceil_div((size_t)rows_max, TR_PAGE_TOKENS);
    q->page = tr_calloc((size_t)q->page_cap, sizeof *q->page);
    q->stopper = tr_stopper_create(&so);
    return q->page && q->stopper;
}

/* The tokens that min_tokens keeps from being sampled. With ignore_eos EOS is a token like others. */
static bool mask_create(tr_group *g, const tr_scheduler_options *options)
{
    const tr_params *p = g->params;
    int n = 0;

    if (p->min_tokens <= 0) return true;
    g->mask = tr_calloc((size_t)p->n_stop_tokens + 1, sizeof *g->mask);
    if (!g->mask) return false;
    if (options->eos >= 0 && !p->ignore_eos) g->mask[n++] = options->eos;
    for (int i = 0; i < p->n_stop_tokens; i++)
        g->mask[n++] = p->stop_token[i];
    g->n_mask = sort_distinct(g->mask, n, options->limits.n_vocab);
    return true;
}

tr_group *tr_group_create(tr_event *event, const tr_scheduler_options *options)
{
    const tr_request *r = event->request;
    tr_group *g = calloc(1, sizeof *g);
    if (!g) return NULL;

    g->params = &r->params;
    g->prompt = r->prompt;
    g->n_prompt = (int)r->n_prompt;
    g->n_choices = g->n_live = g->n_unborn = r->params.n;
    if (r->params.n_prompt_logprobs >= 0) g->n_scores = g->n_prompt - 1;
    g->sequence = tr_calloc((size_t)g->n_choices, sizeof *g->sequence);
    g->stops = tr_stops_create(r->params.stop, r->params.n_stop);
    g->prefix = tr_calloc((size_t)g->n_prompt / TR_PAGE_TOKENS + 1, sizeof *g->prefix);
    event->choice = tr_calloc((size_t)g->n_choices, sizeof *event->choice);
    bool ok = g->sequence && g->stops && g->prefix && event->choice && mask_create(g, options);
    for (int i = 0; i < g->n_choices && ok; i++)
        ok = sequence_create(&g->sequence[i], g, i, options);
    if (ok && r->params.repetition != 1) {
        g->distinct = tr_calloc(r->n_prompt, sizeof *g->distinct);
        ok = g->distinct != NULL;
        if (ok) {
            memcpy(g->distinct, r->prompt, r->n_prompt * sizeof *g->distinct);
            g->n_distinct = sort_distinct(g->distinct, g->n_prompt, options->limits.n_vocab);
        }
    }
    if (ok)
        ok = tr_scores_create(&event->prompt_scores, g->n_scores,
                              g->n_scores ? r->params.n_prompt_logprobs : 0);
    if (!ok) {
        event->n_choices = g->n_choices;
        tr_event_clear(event);
        tr_group_free(g); /* has no event yet */
        return NULL;
    }
    event->n_choices = g->n_choices;
    g->event = event;
    return g;
}

void tr_group_free(tr_group *g)
{
    if (!g) return;
    for (int i = 0; g->sequence && i < g->n_choices; i++) {
        tr_sequence *q = &g->sequence[i];
        free(q->page);
        free(q->token);
        free(q->scores.logprob);
        free(q->scores.rank);
        free(q->scores.top_token);
        free(q->scores.top_logprob);
        free(q->count);
        tr_stopper_free(q->stopper);
    }
    free(g->sequence);
    tr_stops_free(g->stops);
    free(g->distinct);
    free(g->mask);
    free(g->prefix);
    tr_event_free(g->event);
    free(g);
}

void tr_event_fail(tr_event *e, const char *code, const char *fmt, ...)
{
    va_list ap;

    e->kind = TR_EVENT_FAILED;
    e->code = code;
    va_start(ap, fmt);
    vsnprintf(e->message, sizeof e->message, fmt, ap);
    va_end(ap);
    e->done_ns = tr_now_ns();
}

int tr_sequence_needs_more(const tr_sequence *q)
{
    const tr_params *p = q->group->params;
    const bool only_length = p->ignore_eos && !p->n_stop && !p->n_stop_tokens;
    const int least = only_length ? p->max_tokens : p->n_stop ? 0 : p->min_tokens;
    const int has = tr_sequence_generated(q);

    return least > has ? least - has : 0;
}

/* ---- logit changes (chat.md 4.2) --------------------------------------------------------------- */

static bool masks_now(const tr_sequence *q)
{
    return q->group->n_mask && tr_sequence_generated(q) < q->group->params->min_tokens;
}

int tr_sequence_changes_max(const tr_sequence *q, int n_vocab)
{
    const tr_group *g = q->group;
    int64_t n =
        (int64_t)g->n_distinct + q->n_count + g->params->n_bias + (masks_now(q) ? g->n_mask : 0);

    return n < n_vocab ? (int)n : n_vocab;
}

int tr_sequence_add_changes(const tr_sequence *q, int head_row, tr_plan_builder *b)
{
    const tr_group *g = q->group;
    const tr_params *p = g->params;
    const int n_mask = masks_now(q) ? g->n_mask : 0;
    int d = 0, c = 0, i = 0, m = 0;

    for (;;) { /* merge four sorted lists */
        int32_t token = INT32_MAX;
        if (d < g->n_distinct && g->distinct[d] < token) token = g->distinct[d];
        if (c < q->n_count && q->count[c].token < token) token = q->count[c].token;
        if (i < p->n_bias && p->bias[i].token < token) token = p->bias[i].token;
        if (m < n_mask && g->mask[m] < token) token = g->mask[m];
        if (token == INT32_MAX) return 0;

        tr_logit_change change = {.head_row = head_row, .token = token, .repetition = 1};
        if (d < g->n_distinct && g->distinct[d] == token) {
            change.repetition = p->repetition;
            d++;
        }
        if (c < q->n_count && q->count[c].token == token) {
            change.repetition = p->repetition;
            change.penalty = p->presence + p->frequency * (float)q->count[c].n;
            c++;
        }
        if (i < p->n_bias && p->bias[i].token == token) change.bias = p->bias[i++].bias;
        if (m < n_mask && g->mask[m] == token) {
            change.bias = -__builtin_inff();
            m++;
        }
        if (tr_plan_add_change(b, change) < 0) return -1;
    }
}

/* ---- taking in what a step computed ------------------------------------------------------------- */

/* Room for one more element; array is grown to twice its size. Never shrinks, the old one stays good on failure. */
static bool grow(void *array, size_t size, int cap)
{
    void **p = array;
    size_t bytes;

    if (!tr_mul(&bytes, (size_t)cap, size)) return false;
    void *bigger = realloc(*p, bytes ? bytes : 1);
    if (!bigger) return false;
    *p = bigger;
    return true;
}

static int next_cap(int n, int most)
{
    int cap = n < 16 ? 16 : n > most / 2 ? most : 2 * n;
    return cap < most ? cap : most;
}

static bool reserve_token(tr_sequence *q, int n_top)
{
    int most = q->group->params->max_tokens;

    if (q->n_token == q->token_cap) {
        int cap = next_cap(q->token_cap, most);
        if (!grow(&q->token, sizeof *q->token, cap)) return false;
        q->token_cap = cap;
    }
    if (n_top >= 0 && q->n_token == q->scores_cap) {
        int cap = next_cap(q->scores_cap, most);
        if (!grow(&q->scores.logprob, sizeof *q->scores.logprob, cap) ||
            !grow(&q->scores.rank, sizeof *q->scores.rank, cap) ||
            !grow(&q->scores.top_token, (size_t)n_top * sizeof *q->scores.top_token, cap) ||
            !grow(&q->scores.top_logprob, (size_t)n_top * sizeof *q->scores.top_logprob, cap))
            return false;
        q->scores_cap = cap;
    }
    return true;
}

static bool count_token(tr_sequence *q, int32_t token)
{
    int low = 0, high = q->n_count;

    while (low < high) {
        int mid = low + (high - low) / 2;
        if (q->count[mid].token < token)
            low = mid + 1;
        else
            high = mid;
    }
    if (low < q->n_count && q->count[low].token == token) {
        q->count[low].n++;
        return true;
    }
    if (q->n_count == q->count_cap) {
        int cap = next_cap(q->count_cap, q->group->params->max_tokens);
        if (!grow(&q->count, sizeof *q->count, cap)) return false;
        q->count_cap = cap;
    }
    memmove(q->count + low + 1, q->count + low, (size_t)(q->n_count - low) * sizeof *q->count);
    q->count[low] = (tr_count){.token = token, .n = 1};
    q->n_count++;
    return true;
}

/* Entry i of scores from head row h. */
static void score(tr_scores *s, int i, const tr_step_output *out, int h)
{
    size_t from = (size_t)h * TR_MAX_LOGPROBS, to = (size_t)i * (size_t)s->n_top;

    s->logprob[i] = out->logprob[h];
    s->rank[i] = out->rank[h];
    memcpy(s->top_token + to, out->top_token + from, (size_t)s->n_top * sizeof *s->top_token);
    memcpy(s->top_logprob + to, out->top_logprob + from, (size_t)s->n_top * sizeof *s->top_logprob);
}

int tr_sequence_take(tr_sequence *q, const tr_step_output *out, int h,
                     const tr_scheduler_options *options)
{
    const tr_params *p = q->group->params;
    const tr_vocabulary *v = &options->vocabulary;
    const int32_t token = out->token[h];
    const char *bytes = NULL;
    size_t n_bytes = 0;

    if (!reserve_token(q, p->n_logprobs)) return -1;
    if (p->n_logprobs >= 0) {
        q->scores.n_top = p->n_logprobs;
        score(&q->scores, q->n_token, out, h);
        q->scores.n = q->n_token + 1;
    }
    q->token[q->n_token++] = token;
    const uint64_t now = tr_now_ns();
    if (!q->group->event->first_token_ns) q->group->event->first_token_ns = now;
    if (q->token_ns) tr_gaps_add(&q->group->gaps, now - q->token_ns);
    q->token_ns = now;
    if (tr_sequence_needs_tokens(q) && !count_token(q, token)) return -1;

    if (v->bytes) bytes = v->bytes(v->ctx, token, &n_bytes);
    int ended = tr_stopper_token(q->stopper, token, bytes, n_bytes);
    if (ended == 0 && q->n_token >= p->max_tokens) {
        ended = tr_stopper_finish(q->stopper);
        q->finish = ended ? TR_FINISH_STOP : TR_FINISH_LENGTH;
        return ended < 0 ? -1 : 1;
    }
    q->finish = TR_FINISH_STOP;
    return ended;
}

void tr_group_take_score(tr_group *g, const tr_step_output *out, int h, int i)
{
    score(&g->event->prompt_scores, i, out, h);
    g->n_scores_taken++;
}

void tr_group_finish(tr_group *g)
{
    for (int i = 0; i < g->n_choices; i++) {
        tr_sequence *q = &g->sequence[i];
        tr_choice *c = &g->event->choice[i];

        c->token = q->token;
        c->n_token = q->n_token;
        c->scores = q->scores;
        q->token = NULL;
        q->scores = (tr_scores){0};
        c->text = tr_stopper_take_text(q->stopper, &c->n_text);
        c->finish = q->finish;
        c->stop_token = tr_stopper_stop_token(q->stopper);
        c->stop = tr_stopper_stop(q->stopper);
    }
    g->event->kind = TR_EVENT_DONE;
    g->event->done_ns = tr_now_ns();
    g->event->itl_p50_ns = tr_gaps_percentile(&g->gaps, 0.5);
    g->event->itl_p99_ns = tr_gaps_percentile(&g->gaps, 0.99);
}

/* ---- progress out and in --------------------------------------------------------------------------- */

int tr_group_progress(const tr_group *g, tr_progress **out)
{
    bool any = g->n_scores_taken > 0;

    *out = NULL;
    for (int i = 0; i < g->n_choices; i++)
        any = any || g->sequence[i].n_token > 0;
    if (!any) return 0;
    tr_progress *p = tr_progress_begin(g->event->request);
    if (!p) return -1;
    /* Scores are taken in the order of the prompt, so those there are stand at the beginning. */
    bool ok = tr_progress_put_prompt(p, &g->event->prompt_scores, g->n_scores_taken);
    for (int i = 0; i < g->n_choices && ok; i++) {
        const tr_sequence *q = &g->sequence[i];
        ok = tr_progress_put_choice(p, i, q->token, q->n_token, &q->scores);
    }
    if (!ok) {
        tr_progress_free(p);
        return -1;
    }
    *out = p;
    return 1;
}

/* The tokens as if a step had sampled them one by one. Nobody may end before the last of them. */
static bool replay(tr_sequence *q, const tr_progress_choice *c, const tr_scheduler_options *options)
{
    int32_t token = 0, rank = 0, top_token[TR_MAX_LOGPROBS];
    float logprob = 0, top_logprob[TR_MAX_LOGPROBS];
    const tr_step_output row = {.n_head = 1,
                                .token = &token,
                                .logprob = &logprob,
                                .rank = &rank,
                                .top_token = top_token,
                                .top_logprob = top_logprob};
    const size_t n_top = (size_t)c->scores.n_top;
    int ended = 0;

    for (int i = 0; i < c->n_token && !ended; i++) {
        token = c->token[i];
        if (c->scores.n) {
            logprob = c->scores.logprob[i];
            rank = c->scores.rank[i];
            memcpy(top_token, c->scores.top_token + (size_t)i * n_top, n_top * sizeof *top_token);
            memcpy(top_logprob, c->scores.top_logprob + (size_t)i * n_top,
                   n_top * sizeof *top_logprob);
        }
        ended = tr_sequence_take(q, &row, 0, options);
    }
    if (ended < 0 || q->n_token != c->n_token) return false;
    if (ended > 0) {
        q->state = TR_SEQUENCE_DONE;
        q->group->n_live--;
        q->group->n_unborn--;
    }
    return true;
}

bool tr_group_restore(tr_group *g, const tr_progress *p, const tr_scheduler_options *options)
{
    if (!tr_progress_fits(p, g->event->request, options->limits.n_vocab)) return false;
    tr_scores_copy(&g->event->prompt_scores, &p->prompt_scores, p->prompt_scores.n);
    g->n_scores_planned = g->n_scores_taken = p->prompt_scores.n;
    for (int i = 0; i < g->n_choices; i++) {
        if (!replay(&g->sequence[i], &p->choice[i], options)) return false;
        g->sequence[i].token_ns = 0;
    }
    /* Of this run none yet: nobody waited for the tokens above, or between them. */
    g->event->first_token_ns = 0;
    g->gaps = (tr_gaps){0};
    g->restored = true;
    /* All may have ended: then it was saved between its end and its record. Nobody ends before the prompt's scores are there. */
    return g->n_live > 0 || g->n_scores_taken == g->n_scores;
}
