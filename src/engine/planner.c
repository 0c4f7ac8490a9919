/* The next step's plan: who gets rows (deciding), who is let in (admission), and the block that says so. What this file and
 * the order of scheduler.h decide is when something is computed; never what. */
#include <config.h>

#include <assert.h>
#include <string.h>

#include "base/clock.h"
#include "engine/scheduler_priv.h"

/* ---- deciding a step: who gets rows --------------------------------------------------------------- */

/* Its next rows score prompt tokens (choice 0, once: what a preemption makes it compute again is not scored again). */
static bool scores_next(const tr_sequence *q)
{
    const tr_group *g = q->group;
    return q->i_choice == 0 && q->length < g->n_scores && q->length >= g->n_scores_planned;
}

/* Rows [length, end) would be the last with known tokens, and the last of them samples. */
static bool samples_at(const tr_sequence *q, int end)
{
    return q->group->params->max_tokens > 0 && end == tr_sequence_end(q);
}

static bool is_decode(const tr_sequence *q)
{
    return q->length >= q->group->n_prompt && q->length + 1 == tr_sequence_end(q);
}

/* How far one span of q may go: one kind, all rows scored or none. */
static int span_end(const tr_sequence *q)
{
    const tr_group *g = q->group;
    int end = tr_sequence_end(q);

    if (g->params->max_tokens > 0 && !tr_sequence_samples(q))
        return q->length; /* its last token is in flight */
    if (q->length >= g->n_prompt) return end;
    if (end > g->n_prompt) end = g->n_prompt;
    /* Other choices wait for these rows and run the last prompt token themselves. */
    if (g->n_unborn && q->length < g->n_prompt - 1 && end > g->n_prompt - 1) end = g->n_prompt - 1;
    if (q->i_choice == 0 && q->length < g->n_scores_planned && end > g->n_scores_planned)
        end = g->n_scores_planned;
    return end;
}

/* The end of q's rows in this step as far as rows, head rows and logit changes go. */
static int budget_end(const tr_scheduler *s, const tr_sequence *q)
{
    int n = span_end(q) - q->length;

    if (!is_decode(q) && n > s->batch_left) n = s->batch_left;
    if (n > 1 + s->rows_left) n = 1 + s->rows_left;
    if (scores_next(q) && n > 1 + s->head_left) n = 1 + s->head_left;
    if (n > 0 && samples_at(q, q->length + n)) {
        bool must_wait = q->n_flight > 0 && (s->options.n_micro > 1 || tr_sequence_needs_tokens(q));
        if (must_wait || tr_sequence_changes_max(q, s->options.limits.n_vocab) > s->changes_left)
            n--;
    }
    return q->length + n;
}

/* Pages for q's rows up to `end`: as many as there are; for the first row others are preempted. Returns how far it can
 * go. q itself may be preempted, when it is the youngest. */
static int take_pages(tr_scheduler *s, tr_sequence *q, int end)
{
    for (;;) {
        int n = tr_pages_for(end) - q->n_pages;
        if (n > 0 && !s->waits_for_pages) {
            n = tr_scheduler_reclaim(s, n);
            tr_pages_take(s->pages, n, q->page + q->n_pages);
            q->n_pages += n;
        }
        int reach = q->n_pages * TR_PAGE_TOKENS;
        if (reach > q->length) return reach < end ? reach : end;
        if (s->waits_for_pages) return q->length;
        if (tr_pages_aging(s->pages)) {
            /* Pages come free when steps in flight have ended: its turn is before younger ones'. */
            s->waits_for_pages = true;
            return q->length;
        }
        tr_sequence *youngest = s->running[s->n_running - 1];
        if (youngest != q || !tr_scheduler_drop_some_prefix(s, NULL)) {
            tr_scheduler_preempt(s, youngest);
            if (youngest == q) return 0;
        }
        tr_scheduler_mature(s);
    }
}

static void decide(tr_scheduler *s, tr_sequence *q)
{
    int end = budget_end(s, q);

    q->n_rows = 0;
    if (end <= q->length || (is_decode(q) && s->decode_left <= 0)) return;
    end = take_pages(s, q, end);
    if (q->state != TR_SEQUENCE_RUNNING || end <= q->length) return;
    q->n_rows = end - q->length;
    if (is_decode(q))
        s->decode_left--;
    else
        s->batch_left -= q->n_rows;
    s->rows_left -= q->n_rows - 1;
    if (scores_next(q)) s->head_left -= q->n_rows - 1;
    if (samples_at(q, end))
        s->changes_left -= tr_sequence_changes_max(q, s->options.limits.n_vocab);
}

/* ---- admission to the running ones ----------------------------------------------------------------- */

/* Pages whose first n_prompt - 1 rows are this prompt's: the group's own or a running choice's. NULL: nobody's. */
static const int32_t *find_lender(const tr_sequence *q)
{
    const tr_group *g = q->group;

    if (g->n_choices == 1 || g->n_prompt == 1) return NULL;
    if (q->i_choice == 0 && g->n_scores_planned < g->n_scores) return NULL; /* has rows to score */
    if (g->n_prefix) return g->prefix;
    for (int i = 0; i < g->n_choices; i++)
        if (tr_sequence_can_lend(&g->sequence[i])) return g->sequence[i].page;
    return NULL;
}

/* Another choice is computing the prompt: wait for it. */
static bool sibling_runs(const tr_sequence *q)
{
    const tr_group *g = q->group;

    for (int i = 0; i < g->n_choices && g->n_prompt > 1; i++)
        if (g->sequence[i].state == TR_SEQUENCE_RUNNING) return true;
    return false;
}

/* Pages of the index that q could begin with; at least one row is left to run, the last prompt token's before the first
 * token. None where rows must run because they score. */
static int most_cached(const tr_scheduler *s, const tr_sequence *q)
{
    const tr_group *g = q->group;
    int n_rows = tr_sequence_end(q) - 1;

    if (!s->options.prefix_cache || (q->i_choice == 0 && g->n_scores_planned < g->n_scores))
        return 0;
    return (n_rows < g->n_prompt ? n_rows : g->n_prompt) / TR_PAGE_TOKENS;
}

/* Somebody running is about to fill the index's next page of q's prompt, behind the n_cached in q->page: it pays to wait. Who
 * has another page than the index for the rows before will not enter it. */
static bool is_being_computed(const tr_scheduler *s, const tr_sequence *q, int n_cached)
{
    const int begin = n_cached * TR_PAGE_TOKENS, end = begin + TR_PAGE_TOKENS;
    const int32_t *token = q->group->prompt + begin;

    if (n_cached >= most_cached(s, q)) return false;
    for (int i = 0; i < s->n_running; i++) {
        const tr_sequence *r = s->running[i];
        if (r->n_entered > n_cached || end > r->group->n_prompt || end > tr_sequence_end(r))
            continue;
        if (n_cached && (r->n_pages < n_cached || r->page[n_cached - 1] != q->page[n_cached - 1]))
            continue;
        if (!memcmp(r->group->prompt + begin, token, TR_PAGE_TOKENS * sizeof *token)) return true;
    }
    return false;
}

/* Pages for all its tokens so far, beside what running ones still need for theirs. Each of these grows: a page in reserve for
 * each, but not more than a sixteenth of all, so that a small pool is not left idle. Idle pages can be evicted, but for those
 * q begins with. */
static bool has_room(const tr_scheduler *s, const tr_sequence *q, const int32_t *lender,
                     int n_cached)
{
    int reserve = tr_pages_total(s->pages) / 16;
    if (reserve > s->n_running) reserve = s->n_running;
    int64_t need = tr_pages_for(tr_sequence_end(q)) + reserve;

    if (lender) need -= (q->group->n_prompt - 1) / TR_PAGE_TOKENS;
    for (int i = 0; i < n_cached; i++)
        need -= tr_pages_references(s->pages, q->page[i]) > 0;
    for (int i = 0; i < s->n_running; i++) {
        int owed = tr_pages_for(tr_sequence_end(s->running[i])) - s->running[i]->n_pages;
        if (owed > 0) need += owed;
    }
    return need <= tr_pages_available(s->pages) + tr_pages_idle(s->pages);
}

/* At a request's first admission: what a preemption makes it find or compute again does not count. */
static void count_cached(tr_scheduler *s, tr_group *g, int n_tokens)
{
    if (g->counted) return;
    g->counted = true;
    s->stats.continued += g->restored;
    g->event->begun_ns = tr_now_ns();
    g->event->cached_tokens = n_tokens;
    s->stats.cached_tokens += (uint64_t)n_tokens;
    s->stats.prompt_tokens += (uint64_t)g->n_prompt;
}

/* Into a slot, with the n_cached pages in q->page. With a lender instead its full pages are shared and the half-filled one is
 * copied before the step's rows. */
static void begin(tr_scheduler *s, tr_sequence *q, const int32_t *lender, int n_cached)
{
    const int n_rows = q->group->n_prompt - 1, n_full = n_rows / TR_PAGE_TOKENS;
    int slot = 0;

    while (s->slot_used[slot])
        slot++;
    s->slot_used[slot] = true;
    q->slot = slot;
    tr_waiting_remove(s, q);
    tr_running_insert(s, q);
    q->fresh = true;
    count_cached(s, q->group, n_cached * TR_PAGE_TOKENS);
    if (!q->born) q->group->n_unborn--;
    q->born = true;
    if (!lender) {
        tr_pages_share(s->pages, q->page, n_cached);
        q->n_pages = q->n_entered = n_cached;
        q->length = n_cached * TR_PAGE_TOKENS;
        return;
    }
    memcpy(q->page, lender, (size_t)n_full * sizeof *q->page);
    tr_pages_share(s->pages, lender, n_full);
    q->n_pages = n_full;
    q->length = n_rows;
    if (n_rows % TR_PAGE_TOKENS && tr_pages_take(s->pages, 1, &q->page[n_full])) {
        q->n_pages++;
        q->copy_from = lender[n_full];
    }
}

static void admit(tr_scheduler *s)
{
    tr_sequence *q = s->first_waiting;

    if (s->preempted || s->waits_for_pages) return;
    while (q && s->n_running < s->options.max_sequences && s->batch_left > 0) {
        tr_sequence *next = q->next;
        if (q->n_flight) return; /* preempted with a token on its way */
        if (s->draining && (!q->group->counted || q->group->aside)) {
            q = next;
            continue;
        }
        const int32_t *lender = find_lender(q);
        if (!lender && sibling_runs(q)) {
            q = next;
            continue;
        }
        int n_cached =
            lender ? 0 : tr_pages_match(s->pages, q->group->prompt, most_cached(s, q), q->page);
        if (!lender && is_being_computed(s, q, n_cached)) {
            q = next;
            continue;
        }
        if (!has_room(s, q, lender, n_cached)) {
            /* Only prefixes can be in the way of somebody who is alone; the own one at last. */
            if (s->n_running || s->n_flight || !tr_scheduler_drop_some_prefix(s, q->group)) return;
            tr_scheduler_mature(s);
            continue;
        }
        if (lender && !tr_scheduler_reclaim(s, 1)) return; /* for its half-filled page */
        begin(s, q, lender, n_cached);
        decide(s, q);
        q = next;
    }
}

/* Prefixes that are not needed any more; this plan may still copy from them. */
static void release_prefixes(tr_scheduler *s)
{
    for (tr_group *g = s->n_prefixes ? s->groups.first : NULL; g; g = g->next) {
        bool needed = g->n_prefix && g->n_unborn;
        for (int i = 0; i < g->n_choices && needed; i++)
            needed = g->sequence[i].state != TR_SEQUENCE_RUNNING ||
                     g->sequence[i].length < g->n_prompt - 1;
        if (!needed) tr_scheduler_drop_prefix(s, g, s->step);
    }
}

/* ---- writing the plan ------------------------------------------------------------------------------- */

static int write_open(tr_scheduler *s, const tr_sequence *q)
{
    const tr_params *p = q->group->params;

    return tr_plan_add_open(s->builder,
                            (tr_slot_open){
                                .key = tr_choice_key(p->key, q->i_choice),
                                .slot = q->slot,
                                .top_k = p->top_k,
                                .n_logprobs = p->n_logprobs,
                                .n_prompt_logprobs = q->i_choice == 0 ? p->n_prompt_logprobs : -1,
                                .temperature = p->temperature,
                                .top_p = p->top_p,
                                .min_p = p->min_p,
                            });
}

/* Targets of the span's head rows, who waits for them, and the logit changes of the sampled one. */
static int write_head(tr_scheduler *s, tr_flight *f, tr_sequence *q, int n_logits)
{
    const tr_group *g = q->group;
    const int end = q->length + q->n_rows;
    const bool samples = samples_at(q, end);
    const int32_t here = -1;
    int ok = 0;

    for (int row = end - n_logits; row < end && ok >= 0; row++) {
        bool sampled = samples && row == end - 1;
        f->head[f->n_head] = (tr_head_row){.sequence = q, .i_score = sampled ? -1 : row};
        ok = tr_plan_add_targets(s->builder, sampled ? &here : &g->prompt[row + 1], 1);
        if (sampled && ok >= 0) ok = tr_sequence_add_changes(q, f->n_head, s->builder);
        f->n_head++;
    }
    return ok;
}

/* q's span; q then stands behind it. */
static int write_span(tr_scheduler *s, tr_flight *f, tr_sequence *q)
{
    tr_group *g = q->group;
    const int n = q->n_rows, end = q->length + n;
    const bool is_prompt = q->length < g->n_prompt, scores = scores_next(q),
               samples = samples_at(q, end);
    tr_span span = {
        .slot = q->slot,
        .n_rows = n,
        .position = -1, /* its last token is in flight: the device knows both */
        .i_token = -1,
        .kind = is_prompt ? TR_SPAN_PREFILL : TR_SPAN_DECODE,
        .owner = -1,
        .n_logits = scores ? n : samples,
        .flags = is_prompt && q->length < s->options.limits.index_topk ? TR_SPAN_DENSE : 0,
    };

    if (!q->n_flight) {
        const int32_t *token =
            is_prompt ? g->prompt + q->length : q->token + (q->length - g->n_prompt);
        span.position = q->length;
        span.i_token = tr_plan_add_tokens(s->builder, token, n);
        if (span.i_token < 0) return -1;
    }
    if (tr_plan_add_span(s->builder, span) < 0 || write_head(s, f, q, span.n_logits) < 0) return -1;
    *(is_decode(q) ? &f->n_decode : &f->n_prefill) += n;
    g->event->n_chunks += is_prompt;
    if (is_prompt && s->options.prefix_cache)
        f->written[f->n_written++] = (tr_written){.sequence = q, .end = end};
    if (scores) g->n_scores_planned = end < g->n_scores ? end : g->n_scores;
    q->length = end;
    q->n_flight += samples;
    return 0;
}

static int write_sequence(tr_scheduler *s, tr_flight *f, tr_sequence *q)
{
    int ok = q->fresh ? write_open(s, q) : 0;

    for (; q->n_pages_sent < q->n_pages && ok >= 0; q->n_pages_sent++)
        ok = tr_plan_add_page(s->builder, (tr_page_set){.slot = q->slot,
                                                        .i_page = q->n_pages_sent,
                                                        .page = q->page[q->n_pages_sent]});
    if (q->copy_from >= 0 && ok >= 0)
        ok = tr_plan_add_copy(s->builder, (tr_page_copy){.from = q->copy_from,
                                                         .to = q->page[q->length / TR_PAGE_TOKENS],
                                                         .n_rows = q->length % TR_PAGE_TOKENS});
    q->fresh = false;
    q->copy_from = -1;
    return ok >= 0 && q->n_rows ? write_span(s, f, q) : ok;
}

/* Choices that generate, divided by the stages: what one step may take of them. */
static int decode_share(const tr_scheduler *s)
{
    int n = 0;

    if (s->options.n_micro <= 1) return s->options.max_sequences;
    for (int i = 0; i < s->n_running; i++)
        n += s->running[i]->length >= s->running[i]->group->n_prompt;
    return (n + s->options.n_micro - 1) / s->options.n_micro;
}

tr_status tr_scheduler_plan(tr_scheduler *s, const tr_plan **plan, tr_err *err)
{
    const tr_plan_limits *l = &s->options.limits;
    tr_flight *f = &s->flight[(s->i_flight + s->n_flight) % s->options.ring];
    int n_rows = 0, max_context = 0;

    *plan = NULL;
    assert(s->n_flight < s->options.ring);
    s->batch_left = s->options.max_batch_tokens;
    s->rows_left = l->n_rows_max - s->options.max_sequences;
    s->head_left = l->n_head_max - s->options.max_sequences;
    s->changes_left = tr_plan_changes_max(l);
    s->decode_left = decode_share(s);
    s->waits_for_pages = s->preempted = false;
    tr_scheduler_mature(s);
    for (int i = 0; i < s->n_running;) { /* shrinks from its young end */
        tr_sequence *q = s->running[i];
        decide(s, q);
        if (q->state == TR_SEQUENCE_RUNNING) i++;
    }
    admit(s);
    bool scores = false, greedy = true;
    for (int i = 0; i < s->n_running; i++) {
        const tr_params *p = s->running[i]->group->params;
        n_rows += s->running[i]->n_rows;
        if (!s->running[i]->n_rows) continue;
        scores = scores || p->n_logprobs >= 0 || p->n_prompt_logprobs >= 0;
        greedy = greedy && p->temperature < 1e-5f;
    }
    if (!n_rows) return TR_OK;

    tr_plan_begin(s->builder, s->step,
                  (s->n_flight ? 0 : TR_PLAN_AFTER_TOKENS) | (scores ? TR_PLAN_HAS_SCORES : 0) |
                      (greedy ? TR_PLAN_GREEDY : 0));
    f->n_head = f->n_written = f->n_prefill = f->n_decode = 0;
    for (int i = 0; i < s->n_running; i++) {
        tr_sequence *q = s->running[i];
        if (write_sequence(s, f, q) < 0)
            return tr_fail(err, TR_E_USAGE,
                           "step %llu does not fit a plan of %d rows and %d head rows",
                           (unsigned long long)s->step, l->n_rows_max, l->n_head_max);
        if (q->n_rows && q->length > max_context) max_context = q->length;
    }
    release_prefixes(s);
    *plan = tr_plan_seal(s->builder, max_context);
    s->step++;
    s->n_flight++;
    return TR_OK;
}
