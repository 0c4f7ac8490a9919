#include <config.h>

#include "engine/scheduler.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/progress.h"
#include "engine/scheduler_priv.h"

/* ---- creation ----------------------------------------------------------------------------------- */

tr_status tr_scheduler_create(tr_scheduler **out, const tr_scheduler_options *options, tr_err *err)
{
    const tr_plan_limits *l = &options->limits;
    tr_status st = TR_OK;
    tr_scheduler *s = NULL;

    *out = NULL;
    if (options->max_sequences < 1 || options->max_batch_tokens < 1 || options->max_model_len < 1 ||
        options->ring < 1 || !tr_plan_bytes_max(l) || options->max_sequences > l->n_slots ||
        options->max_sequences > l->n_rows_max || options->max_sequences > l->n_head_max)
        return tr_fail(
            err, TR_E_USAGE,
            "%d sequences, %d tokens per step, ring of %d do not go with %d slots, %d rows, "
            "%d head rows",
            options->max_sequences, options->max_batch_tokens, options->ring, l->n_slots,
            l->n_rows_max, l->n_head_max);
    s = calloc(1, sizeof *s);
    if (s) {
        s->options = *options;
        s->step = 1;
        s->pages = tr_pages_create(l->n_pages, options->ring, options->prefix_cache);
        s->builder = tr_plan_builder_create(l);
        s->running = tr_calloc((size_t)options->max_sequences, sizeof(tr_sequence *));
        s->slot_used = tr_calloc((size_t)options->max_sequences, sizeof *s->slot_used);
        s->flight = tr_calloc((size_t)options->ring, sizeof *s->flight);
    }
    bool ok = s && s->pages && s->builder && s->running && s->slot_used && s->flight;
    for (int i = 0; ok && i < options->ring; i++) {
        tr_flight *f = &s->flight[i];
        f->head = tr_calloc((size_t)l->n_head_max, sizeof *f->head);
        f->written = tr_calloc((size_t)options->max_sequences, sizeof *f->written);
        ok = f->head && f->written;
    }
    if (!ok) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory for the scheduler");
        goto done;
    }
    *out = s;
    s = NULL;

done:
    tr_scheduler_free(s);
    return st;
}

static void groups_free(tr_group *g)
{
    while (g) {
        tr_group *next = g->next;
        tr_group_free(g);
        g = next;
    }
}

void tr_scheduler_free(tr_scheduler *s)
{
    if (!s) return;
    groups_free(s->groups.first);
    groups_free(s->done.first);
    for (int i = 0; s->flight && i < s->options.ring; i++) {
        free(s->flight[i].head);
        free(s->flight[i].written);
    }
    free(s->flight);
    free(s->slot_used);
    free(s->running);
    tr_plan_builder_free(s->builder);
    tr_pages_free(s->pages);
    free(s);
}

/* ---- lists -------------------------------------------------------------------------------------- */

static void list_append(tr_group_list *l, tr_group *g)
{
    g->next = NULL;
    g->prev = l->last;
    *(l->last ? &l->last->next : &l->first) = g;
    l->last = g;
}

static void list_remove(tr_group_list *l, tr_group *g)
{
    *(g->prev ? &g->prev->next : &l->first) = g->next;
    *(g->next ? &g->next->prev : &l->last) = g->prev;
}

static bool older(const tr_sequence *a, const tr_sequence *b)
{
    if (a->group != b->group) return a->group->order < b->group->order;
    return a->i_choice < b->i_choice;
}

/* To its place by age: the end when it is new, near the front when it was preempted. */
static void waiting_insert(tr_scheduler *s, tr_sequence *q)
{
    tr_sequence *after;

    if (s->last_waiting && older(s->last_waiting, q)) {
        after = NULL;
    } else {
        after = s->first_waiting;
        while (after && older(after, q))
            after = after->next;
    }
    q->state = TR_SEQUENCE_WAITING;
    q->next = after;
    q->prev = after ? after->prev : s->last_waiting;
    *(q->prev ? &q->prev->next : &s->first_waiting) = q;
    *(after ? &after->prev : &s->last_waiting) = q;
    s->n_waiting++;
}

void tr_waiting_remove(tr_scheduler *s, tr_sequence *q)
{
    *(q->prev ? &q->prev->next : &s->first_waiting) = q->next;
    *(q->next ? &q->next->prev : &s->last_waiting) = q->prev;
    q->prev = q->next = NULL;
    s->n_waiting--;
}

void tr_running_insert(tr_scheduler *s, tr_sequence *q)
{
    int i = s->n_running++;

    for (; i > 0 && older(q, s->running[i - 1]); i--)
        s->running[i] = s->running[i - 1];
    s->running[i] = q;
    q->state = TR_SEQUENCE_RUNNING;
}

static void running_remove(tr_scheduler *s, const tr_sequence *q)
{
    int i = 0;

    while (s->running[i] != q)
        i++;
    s->n_running--;
    memmove(&s->running[i], &s->running[i + 1], (size_t)(s->n_running - i) * sizeof(tr_sequence *));
}

/* ---- pages and slots ------------------------------------------------------------------------------ */

void tr_scheduler_mature(tr_scheduler *s)
{
    tr_pages_step(s->pages, s->n_flight ? s->step : s->step + (uint64_t)s->options.ring);
}

int tr_scheduler_reclaim(tr_scheduler *s, int n)
{
    int available = tr_pages_available(s->pages);

    if (available < n) {
        const int n_idle = tr_pages_idle(s->pages);
        tr_pages_evict(s->pages, n - available);
        s->stats.pages_evicted += (uint64_t)(n_idle - tr_pages_idle(s->pages));
        available = tr_pages_available(s->pages);
    }
    return n < available ? n : available;
}

void tr_scheduler_clear_cache(tr_scheduler *s)
{
    tr_pages_evict(s->pages, tr_pages_idle(s->pages));
    tr_scheduler_mature(s);
}

void tr_scheduler_drop_prefix(tr_scheduler *s, tr_group *g, uint64_t step)
{
    if (!g->n_prefix) return;
    tr_pages_drop(s->pages, g->prefix, g->n_prefix, step);
    g->n_prefix = 0;
    s->n_prefixes--;
}

bool tr_scheduler_drop_some_prefix(tr_scheduler *s, const tr_group *spare)
{
    tr_group *victim = NULL;

    for (tr_group *g = s->n_prefixes ? s->groups.first : NULL; g; g = g->next)
        if (g->n_prefix && (!victim || g != spare)) victim = g;
    if (victim) tr_scheduler_drop_prefix(s, victim, s->step - 1);
    return victim != NULL;
}

bool tr_sequence_can_lend(const tr_sequence *q)
{
    return q->state == TR_SEQUENCE_RUNNING && !q->fresh && q->length >= q->group->n_prompt - 1;
}

/* q leaves its slot and pages; steps up to the last planned one may still touch them. */
static void leave(tr_scheduler *s, tr_sequence *q)
{
    for (int i = 0; i < s->n_flight; i++) {
        tr_flight *f = &s->flight[(s->i_flight + i) % s->options.ring];
        for (int j = 0; j < f->n_written; j++)
            if (f->written[j].sequence == q) f->written[j].sequence = NULL;
    }
    tr_pages_drop(s->pages, q->page, q->n_pages, s->step - 1);
    s->slot_used[q->slot] = false;
    q->slot = -1;
    q->n_pages = q->n_pages_sent = q->n_entered = q->length = q->n_rows = 0;
    q->fresh = false;
    q->copy_from = -1;
    running_remove(s, q);
}

void tr_scheduler_preempt(tr_scheduler *s, tr_sequence *q)
{
    leave(s, q);
    waiting_insert(s, q);
    s->preempted = true;
    s->stats.preemptions++;
}

/* The last choice that has the prompt's rows ends, others have not begun: the group keeps the pages ("one prompt pass"). */
static void bequeath(tr_scheduler *s, tr_sequence *q)
{
    tr_group *g = q->group;
    int n = tr_pages_for(g->n_prompt - 1);

    if (!g->n_unborn || !n || g->n_prefix || !tr_sequence_can_lend(q)) return;
    for (int i = 0; i < g->n_choices; i++)
        if (&g->sequence[i] != q && tr_sequence_can_lend(&g->sequence[i])) return;
    memcpy(g->prefix, q->page, (size_t)n * sizeof *g->prefix);
    tr_pages_share(s->pages, g->prefix, n);
    g->n_prefix = n;
    s->n_prefixes++;
}

/* ---- the ends of sequences and groups ------------------------------------------------------------ */

static void end_sequence(tr_scheduler *s, tr_sequence *q)
{
    if (q->state == TR_SEQUENCE_DONE) return;
    if (q->state == TR_SEQUENCE_RUNNING) {
        bequeath(s, q);
        leave(s, q);
    } else {
        tr_waiting_remove(s, q);
    }
    /* Rows it still has in steps in flight are computed and dropped. */
    for (int i = 0; i < s->n_flight; i++) {
        tr_flight *f = &s->flight[(s->i_flight + i) % s->options.ring];
        for (int h = 0; h < f->n_head; h++)
            if (f->head[h].sequence == q) f->head[h].sequence = NULL;
    }
    q->state = TR_SEQUENCE_DONE;
    q->group->n_live--;
}

static void end_group(tr_scheduler *s, tr_group *g)
{
    tr_scheduler_drop_prefix(s, g, s->step - 1);
    list_remove(&s->groups, g);
    list_append(&s->done, g);
}

static void finish_if_done(tr_scheduler *s, tr_group *g)
{
    if (g->n_live) return;
    tr_group_finish(g);
    s->stats.finished++;
    end_group(s, g);
}

/* All choices of the group are dropped; the event says why already. */
static void fail_group(tr_scheduler *s, tr_group *g)
{
    g->n_unborn = 0; /* nobody to bequeath to */
    for (int i = 0; i < g->n_choices; i++)
        end_sequence(s, &g->sequence[i]);
    s->stats.failed++;
    end_group(s, g);
}

/* ---- admission to the queue ----------------------------------------------------------------------- */

/* What would break a plan, or could never run. False: the event says why. */
static bool acceptable(const tr_scheduler *s, tr_event *e)
{
    const tr_request *r = e->request;
    const tr_params *p = &r->params;
    const int n_vocab = s->options.limits.n_vocab;
    const int len = s->options.max_model_len;

    if (r->stream) {
        tr_event_fail(e, "unsupported", "streaming is not built yet");
        return false;
    }
    bool ok = r->n_prompt >= 1 && p->n >= 1 && p->max_tokens >= 0 && p->repetition > 0 &&
              isfinite(p->repetition) && isfinite(p->presence) && isfinite(p->frequency) &&
              p->n_logprobs <= TR_MAX_LOGPROBS && p->n_prompt_logprobs <= TR_MAX_LOGPROBS;
    for (size_t i = 0; ok && i < r->n_prompt; i++)
        ok = r->prompt[i] >= 0 && r->prompt[i] < n_vocab;
    for (int i = 0; ok && i < p->n_bias; i++)
        ok = p->bias[i].token > (i ? p->bias[i - 1].token : -1) && p->bias[i].token < n_vocab &&
             isfinite(p->bias[i].bias);
    if (!ok) {
        tr_event_fail(e, "invalid_request",
                      "a parameter, a prompt token or a biased token is out of range");
        return false;
    }
    if (r->n_prompt > (size_t)len || p->max_tokens > len - (int)r->n_prompt) {
        tr_event_fail(e, "context_length_exceeded",
                      "%zu prompt tokens and %d to generate, of %d at most", r->n_prompt,
                      p->max_tokens, len);
        return false;
    }
    /* Its longest row count: the newest token has no row, nor has a prompt's last when nothing is sampled. */
    int n_pages = tr_pages_for((int)r->n_prompt + p->max_tokens - 1);
    int most = s->options.limits.n_pages < s->options.limits.max_pages
                   ? s->options.limits.n_pages
                   : s->options.limits.max_pages;
    if (n_pages > most) {
        tr_event_fail(e, "context_length_exceeded",
                      "%zu prompt tokens and %d to generate need %d cache pages, of %d",
                      r->n_prompt, p->max_tokens, n_pages, most);
        return false;
    }
    return true;
}

/* The request's group, where it had come to. What does not fit is marked, and the request begins anew. */
static tr_group *make_group(tr_scheduler *s, tr_event *e)
{
    tr_group *g = tr_group_create(e, &s->options);
    tr_progress *p = e->request->progress;

    if (!g || !p) return g;
    if (tr_group_restore(g, p, &s->options)) {
        tr_progress_free(p);
        e->request->progress = NULL;
        return g;
    }
    p->unfit = true;
    g->event = NULL;
    tr_group_free(g);
    tr_event_clear(e);
    e->first_token_ns = 0;
    return tr_group_create(e, &s->options);
}

tr_event *tr_scheduler_add(tr_scheduler *s, tr_event *e)
{
    tr_group *g = NULL;

    if (acceptable(s, e)) {
        g = make_group(s, e);
        if (!g) tr_event_fail(e, "out_of_memory", "no memory for the request");
    }
    if (!g) {
        s->stats.failed++;
        return e;
    }
    if (g->params->max_tokens ==
        0) { /* scoring: the first choice does it, if anything is to be scored */
        for (int i = g->n_scores > g->n_scores_taken; i < g->n_choices; i++) {
            g->sequence[i].state = TR_SEQUENCE_DONE;
            g->n_live--;
        }
        g->n_unborn = g->n_live;
    }
    if (g->n_live == 0) {
        tr_group_finish(g);
        s->stats.continued += g->restored;
        g->event = NULL;
        tr_group_free(g);
        s->stats.finished++;
        return e;
    }
    g->order = s->n_orders++;
    list_append(&s->groups, g);
    for (int i = 0; i < g->n_choices; i++)
        if (g->sequence[i].state != TR_SEQUENCE_DONE) waiting_insert(s, &g->sequence[i]);
    return NULL;
}

bool tr_scheduler_wants(const tr_scheduler *s)
{
    return s->n_waiting < s->options.max_sequences;
}

/* Pages, up to n_pages, that begin with the same tokens. */
static int same_pages(const int32_t *a, const int32_t *b, int n_pages)
{
    int n = 0;

    while (n < n_pages && !memcmp(a + (size_t)n * TR_PAGE_TOKENS, b + (size_t)n * TR_PAGE_TOKENS,
                                  TR_PAGE_TOKENS * sizeof *a))
        n++;
    return n;
}

int tr_scheduler_known(const tr_scheduler *s, const tr_request *r)
{
    const size_t last =
        r->n_prompt ? (r->n_prompt - 1) / TR_PAGE_TOKENS : 0; /* one row is left to run */
    const int most =
        last < (size_t)s->options.limits.max_pages ? (int)last : s->options.limits.max_pages;

    if (!s->options.prefix_cache || r->params.n_prompt_logprobs >= 0) return 0;
    int n = tr_pages_known(s->pages, r->prompt, most);
    for (const tr_group *g = s->groups.first; g && n < most; g = g->next) {
        const int has = g->n_prompt / TR_PAGE_TOKENS, both = has < most ? has : most;
        const int same = same_pages(g->prompt, r->prompt, both);
        if (same > n) n = same;
    }
    return n * TR_PAGE_TOKENS;
}

bool tr_scheduler_idle(const tr_scheduler *s)
{
    return !s->groups.first;
}

static bool fits(const tr_group *g, int64_t most)
{
    for (int i = 0; i < g->n_choices; i++)
        if (g->sequence[i].state != TR_SEQUENCE_DONE &&
            tr_sequence_needs_more(&g->sequence[i]) > most)
            return false;
    return true;
}

int tr_scheduler_drain(tr_scheduler *s, int64_t most)
{
    int n = 0;

    s->draining = true;
    for (tr_group *g = s->groups.first; g; g = g->next) {
        if (!g->counted || g->aside) continue;
        g->aside = !fits(g, most);
        n += !g->aside;
        for (int i = 0; i < g->n_choices && g->aside; i++)
            if (g->sequence[i].state == TR_SEQUENCE_RUNNING) {
                leave(s, &g->sequence[i]);
                waiting_insert(s, &g->sequence[i]);
            }
    }
    return n;
}

int tr_scheduler_progress(const tr_scheduler *s, tr_progress **list)
{
    for (const tr_group *g = s->groups.first; g; g = g->next) {
        tr_progress *p;
        if (tr_group_progress(g, &p) < 0) return -1;
        if (!p) continue;
        p->next = *list;
        *list = p;
    }
    return 0;
}

/* ---- state for callers ------------------------------------------------------------ */

const tr_plan *tr_scheduler_stop_plan(tr_scheduler *s)
{
    tr_plan_begin(s->builder, s->step, TR_PLAN_STOP);
    return tr_plan_seal(s->builder, 0);
}

int tr_scheduler_in_flight(const tr_scheduler *s)
{
    return s->n_flight;
}

int tr_scheduler_prefill_rows(const tr_scheduler *s)
{
    return s->n_flight ? s->flight[s->i_flight].n_prefill : 0;
}

/* ---- taking in a step -------------------------------------------------------------------------------- */

static void commit_row(tr_scheduler *s, tr_head_row *row, const tr_step_output *out, int h)
{
    tr_sequence *q = row->sequence;
    tr_group *g = q->group;
    const int32_t token = out->token[h];
    char where[48];

    row->sequence = NULL;
    if (tr_not_finite(token, where, sizeof where)) {
        tr_event_fail(g->event, "numerical_error", "logits at position %d are not finite%s%s",
                      row->i_score >= 0 ? row->i_score : g->n_prompt + q->n_token - 1,
                      *where ? ", " : "", where);
        tr_pages_distrust(s->pages, q->page, q->n_pages);
        fail_group(s, g);
        return;
    }
    if (row->i_score >= 0) {
        tr_group_take_score(g, out, h, row->i_score);
        if (g->params->max_tokens > 0 || g->n_scores_taken < g->n_scores) return;
        end_sequence(s, q);
        finish_if_done(s, g);
        return;
    }
    q->n_flight--;
    int ended = -1;
    if (token >= 0 && token < s->options.limits.n_vocab) {
        ended = tr_sequence_take(q, out, h, &s->options);
        if (ended < 0) tr_event_fail(g->event, "out_of_memory", "no memory for another token");
        if (ended >= 0) s->stats.generated_tokens++;
    } else {
        tr_event_fail(g->event, "internal_error", "token %d was sampled, of %d", (int)token,
                      s->options.limits.n_vocab);
    }
    if (ended < 0) {
        fail_group(s, g);
    } else if (ended > 0) {
        end_sequence(s, q);
        finish_if_done(s, g);
    }
}

/* Full pages of prompt rows go into the index; those of generated tokens, which are computed in another form, do not. */
static void enter_pages(tr_scheduler *s, tr_sequence *q, int end)
{
    const tr_group *g = q->group;
    const int n = (end < g->n_prompt ? end : g->n_prompt) / TR_PAGE_TOKENS;

    for (; q->n_entered < n; q->n_entered++)
        if (!tr_pages_enter(s->pages, q->page, q->n_entered,
                            g->prompt + q->n_entered * TR_PAGE_TOKENS)) {
            q->n_entered = g->n_prompt; /* nobody need wait for the rest */
            return;
        }
}

void tr_scheduler_commit(tr_scheduler *s, const tr_step_output *out)
{
    tr_flight *f = &s->flight[s->i_flight];

    assert(s->n_flight > 0);
    for (int i = 0; i < f->n_written; i++)
        if (f->written[i].sequence) enter_pages(s, f->written[i].sequence, f->written[i].end);
    for (int h = 0; h < f->n_head; h++)
        if (f->head[h].sequence) commit_row(s, &f->head[h], out, h);
    s->stats.steps++;
    s->stats.prefill_tokens += (uint64_t)f->n_prefill;
    s->stats.decode_tokens += (uint64_t)f->n_decode;
    if (f->n_prefill) s->stats.mixed_decode_tokens += (uint64_t)f->n_decode;
    s->i_flight = (s->i_flight + 1) % s->options.ring;
    s->n_flight--;
}

tr_event *tr_scheduler_event(tr_scheduler *s)
{
    tr_group *g = s->done.first;
    if (!g) return NULL;

    tr_event *e = g->event;
    list_remove(&s->done, g);
    g->event = NULL;
    tr_group_free(g);
    return e;
}

tr_scheduler_stats tr_scheduler_stats_get(const tr_scheduler *s)
{
    tr_scheduler_stats stats = s->stats;

    stats.running = s->n_running;
    stats.waiting = s->n_waiting;
    stats.pages_held = tr_pages_held(s->pages);
    stats.pages_cached = tr_pages_idle(s->pages);
    stats.pages_total = tr_pages_total(s->pages);
    return stats;
}

bool tr_scheduler_consistent(const tr_scheduler *s)
{
    const int n_pages = tr_pages_total(s->pages);
    int *held = tr_calloc((size_t)n_pages, sizeof *held);
    bool ok = held != NULL;
    int n_idle = 0;

    if (!ok) return false;
    for (int i = 0; i < s->n_running; i++) {
        const tr_sequence *q = s->running[i];
        ok = ok && q->state == TR_SEQUENCE_RUNNING && s->slot_used[q->slot] &&
             q->n_pages * TR_PAGE_TOKENS >= q->length && (!i || older(s->running[i - 1], q));
        for (int j = 0; j < q->n_pages; j++)
            held[q->page[j]]++;
        for (int j = q->length / TR_PAGE_TOKENS; j < q->n_pages; j++)
            ok = ok && tr_pages_references(s->pages, q->page[j]) == 1 &&
                 !tr_pages_indexed(s->pages, q->page[j]);
    }
    for (const tr_group *g = s->groups.first; g; g = g->next)
        for (int j = 0; j < g->n_prefix; j++)
            held[g->prefix[j]]++;
    for (int i = 0; i < n_pages; i++)
        ok = ok && held[i] == tr_pages_references(s->pages, i);
    for (int i = 0; i < n_pages; i++)
        n_idle += !held[i] && tr_pages_indexed(s->pages, i);
    ok = ok && n_idle == tr_pages_idle(s->pages);
    for (const tr_sequence *q = s->first_waiting; q && q->next; q = q->next)
        ok = ok && older(q, q->next);
    free(held);
    return ok;
}
