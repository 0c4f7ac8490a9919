/* A simulated model and a stream of random requests around a scheduler. The device here holds for every cache row the token
 * it was computed from and a hash over all rows before it; a row's sample is a hash of that, of the choice's key and of the
 * position. So a page that was reused too early, not copied, or computed in another form changes the tokens, which are
 * compared with the request run alone. Included by test_scheduler.c and test_resume.c. */
#ifndef TR_TESTS_SCHEDULER_WORLD_H
#define TR_TESTS_SCHEDULER_WORLD_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/scheduler.h"

enum {
    PAGE = TR_PAGE_TOKENS,
    VOCAB = 97,
    EOS = 1,
    BOS = 0,
    PAD = 2,
    NAN_TOKEN = 96,
    MAX_SLOTS = 12
};

static uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t z = (a ^ (b + 0x9e3779b97f4a7c15u + (a << 6) + (a >> 2))) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 29)) * 0x94d049bb133111ebu;
    return z ^ (z >> 32);
}

static int pick(uint64_t *state, int low, int high) /* [low, high] */
{
    *state = mix(*state, 1);
    return low + (int)(*state % (uint64_t)(high - low + 1));
}

static bool chance(uint64_t *state, int percent)
{
    return pick(state, 0, 99) < percent;
}

/* ---- the model's arithmetic, used by the device and by the request alone ---------------------------- */

static uint64_t row_hash(uint64_t before, int32_t token, int position, bool dense)
{
    return mix(mix(before, (uint64_t)token), (uint64_t)position * 2 + dense);
}

/* Changes act as sums over the row: enough to see whether each of them arrived. */
static uint64_t change_hash(uint64_t h, int32_t token, float bias, float repetition, float penalty)
{
    h = mix(h, (uint64_t)token);
    h = mix(h, isinf(bias) ? 77 : (uint64_t)(int64_t)(bias * 64));
    h = mix(h, (uint64_t)(int64_t)(repetition * 64));
    return mix(h, (uint64_t)(int64_t)(penalty * 64));
}

/* A token, never one that the -inf of min_tokens forbids. */
static int32_t sample(uint64_t key, int position, uint64_t cache, uint64_t changes,
                      const uint8_t *masked)
{
    uint64_t h = mix(mix(key, (uint64_t)position), mix(cache, changes));
    int32_t token = (int32_t)(h % VOCAB);
    if (token == NAN_TOKEN && (h >> 32) % 32) token--; /* poison is rare */
    while (masked[token])
        token = (token + 1) % VOCAB;
    return token;
}

static float target_score(uint64_t cache, int32_t target)
{
    return (float)(mix(cache, (uint64_t)target) % 1000);
}

static const char *token_text(const void *ctx, int32_t token, size_t *n)
{
    const char *alphabet = ctx;
    *n = token % 3 ? 1 : 2;
    return alphabet + token % 5;
}

static const tr_vocabulary vocabulary = {.ctx = "abcabcabc", .bytes = token_text};

/* ---- the request alone ------------------------------------------------------------------------------- */

typedef struct expected {
    int n, finish_stop;
    int32_t token[512];
    bool failed;
    char text[1200];
    size_t n_text;
} expected;

static int compare_change(const void *a, const void *b)
{
    const tr_logit_change *x = a, *y = b;
    return (x->token > y->token) - (x->token < y->token);
}

/* The changes as chat.md 4.2 words them, straight from the parameters. */
static uint64_t expect_changes(const tr_request *r, const expected *e, uint8_t *masked)
{
    const tr_params *p = &r->params;
    tr_logit_change c[VOCAB];
    uint64_t h = 5;

    memset(masked, 0, VOCAB);
    if (p->repetition == 1 && p->presence == 0 && p->frequency == 0 && !p->n_bias &&
        e->n >= p->min_tokens)
        return h;
    for (int t = 0; t < VOCAB; t++) {
        c[t] = (tr_logit_change){.token = t, .repetition = 1};
        bool seen = false;
        int n = 0;
        for (size_t i = 0; i < r->n_prompt; i++)
            seen |= r->prompt[i] == t;
        for (int i = 0; i < e->n; i++)
            n += e->token[i] == t;
        if (seen || n) c[t].repetition = p->repetition;
        if (n) c[t].penalty = p->presence + p->frequency * (float)n;
        for (int i = 0; i < p->n_bias; i++)
            if (p->bias[i].token == t) c[t].bias = p->bias[i].bias;
        bool ends = t == EOS && !p->ignore_eos;
        for (int i = 0; i < p->n_stop_tokens; i++)
            ends |= p->stop_token[i] == t;
        if (ends && e->n < p->min_tokens) {
            c[t].bias = -INFINITY;
            masked[t] = 1;
        }
    }
    qsort(c, VOCAB, sizeof *c, compare_change);
    for (int t = 0; t < VOCAB; t++)
        if (c[t].bias != 0 || c[t].repetition != 1 || c[t].penalty != 0)
            h = change_hash(h, c[t].token, c[t].bias, c[t].repetition, c[t].penalty);
    return h;
}

/* Text, and whether a stop string is in it: by searching the whole text anew. Returns true when it ends. */
static bool expect_text(const tr_request *r, expected *e, int32_t token)
{
    size_t n, best_end = SIZE_MAX, best_n = 0;
    const char *bytes = token_text(vocabulary.ctx, token, &n);

    if (token == EOS || token == BOS || token == PAD) return false;
    memcpy(e->text + e->n_text, bytes, n);
    e->n_text += n;
    for (int i = 0; i < r->params.n_stop; i++) {
        const tr_string *s = &r->params.stop[i];
        const char *at = memmem(e->text, e->n_text, s->s, s->n);
        if (!at) continue;
        size_t end = (size_t)(at - e->text) + s->n;
        if (end < best_end || (end == best_end && s->n > best_n)) {
            best_end = end;
            best_n = s->n;
        }
    }
    if (best_end == SIZE_MAX) return false;
    e->n_text = best_end - (r->params.include_stop ? 0 : best_n);
    return true;
}

static void run_alone(const tr_request *r, int i_choice, int index_topk, expected *e)
{
    const tr_params *p = &r->params;
    const uint64_t key = tr_choice_key(p->key, i_choice);
    uint64_t cache = 0;
    uint8_t masked[VOCAB];
    bool ended = false;

    memset(e, 0, sizeof *e);
    for (int i = 0; i < (int)r->n_prompt; i++) {
        cache = row_hash(cache, r->prompt[i], i, i < index_topk);
        if (r->prompt[i] == NAN_TOKEN && (p->max_tokens > 0 || p->n_prompt_logprobs >= 0)) {
            bool seen = p->n_prompt_logprobs >= 0 && i < (int)r->n_prompt - 1;
            if (seen || (p->max_tokens > 0 && i == (int)r->n_prompt - 1)) e->failed = true;
        }
    }
    while (!ended && e->n < p->max_tokens && !e->failed) {
        uint64_t changes = expect_changes(r, e, masked);
        int position = (int)r->n_prompt + e->n - 1;
        int32_t token = sample(key, position, cache, changes, masked);
        e->token[e->n++] = token;
        ended = token == EOS && !p->ignore_eos;
        for (int i = 0; i < p->n_stop_tokens; i++)
            ended |= p->stop_token[i] == token;
        if (!ended) ended = expect_text(r, e, token);
        cache = row_hash(cache, token, position + 1, false);
        if (token == NAN_TOKEN && !ended && e->n < p->max_tokens) e->failed = true;
    }
    e->finish_stop = ended;
}

/* ---- the device ---------------------------------------------------------------------------------------- */

typedef struct cell {
    uint64_t hash;
    int32_t token;
    uint8_t dense, written;
} cell;

typedef struct device {
    tr_plan_limits limits;
    cell *cell;          /* [n_pages, PAGE] */
    int32_t *page_table; /* [n_slots, max_pages] */
    int32_t length[MAX_SLOTS], last_token[MAX_SLOTS];
    tr_slot_open open[MAX_SLOTS];
    tr_step_output out;
} device;

static void device_create(device *d, const tr_plan_limits *l)
{
    memset(d, 0, sizeof *d);
    d->limits = *l;
    d->cell = calloc((size_t)l->n_pages * PAGE, sizeof *d->cell);
    d->page_table = malloc((size_t)l->n_slots * (size_t)l->max_pages * sizeof *d->page_table);
    for (int i = 0; i < l->n_slots * l->max_pages; i++)
        d->page_table[i] = -1;
    d->out.token = calloc((size_t)l->n_head_max, sizeof(int32_t));
    d->out.logprob = calloc((size_t)l->n_head_max, sizeof(float));
    d->out.rank = calloc((size_t)l->n_head_max, sizeof(int32_t));
    d->out.top_token = calloc((size_t)l->n_head_max * TR_MAX_LOGPROBS, sizeof(int32_t));
    d->out.top_logprob = calloc((size_t)l->n_head_max * TR_MAX_LOGPROBS, sizeof(float));
}

static void device_free(device *d)
{
    free(d->cell);
    free(d->page_table);
    free(d->out.token);
    free(d->out.logprob);
    free(d->out.rank);
    free(d->out.top_token);
    free(d->out.top_logprob);
}

static cell *cell_at(const device *d, int slot, int position)
{
    int32_t page = d->page_table[slot * d->limits.max_pages + position / PAGE];
    assert_in_range(page, 0, d->limits.n_pages - 1);
    return &d->cell[page * PAGE + position % PAGE];
}

/* Every row a token sees must be there, computed from what precedes it. Returns the hash of the last. */
static uint64_t see_cache(const device *d, int slot, int position)
{
    uint64_t before = 0;
    for (int i = 0; i <= position; i++) {
        const cell *c = cell_at(d, slot, i);
        assert_true(c->written);
        assert_true(c->hash == row_hash(before, c->token, i, c->dense));
        before = c->hash;
    }
    return before;
}

static void device_head(device *d, const tr_plan *p, int h, int slot, int position, int32_t token)
{
    const uint64_t cache = see_cache(d, slot, position);
    const int32_t target = tr_plan_targets(p)[h];
    uint8_t masked[VOCAB] = {0};
    uint64_t changes = 5;

    for (int i = 0; i < p->n_changes; i++) {
        const tr_logit_change *c = &tr_plan_changes(p)[i];
        if (c->head_row != h) continue;
        if (isinf(c->bias)) masked[c->token] = 1;
        if (c->bias != 0 || c->repetition != 1 || c->penalty != 0)
            changes = change_hash(changes, c->token, c->bias, c->repetition, c->penalty);
    }
    if (token == NAN_TOKEN) {
        d->out.token[h] = -2;
    } else if (target >= 0) {
        d->out.token[h] = -1;
        d->out.logprob[h] = target_score(cache, target);
        d->out.rank[h] = target;
    } else {
        d->out.token[h] = sample(d->open[slot].key, position, cache, changes, masked);
        d->out.logprob[h] = target_score(cache, d->out.token[h]);
        d->out.rank[h] = d->out.token[h];
        d->last_token[slot] = d->out.token[h];
    }
    for (int i = 0; i < TR_MAX_LOGPROBS; i++) {
        d->out.top_token[h * TR_MAX_LOGPROBS + i] = (d->out.rank[h] + i) % VOCAB;
        d->out.top_logprob[h * TR_MAX_LOGPROBS + i] = d->out.logprob[h] - (float)i;
    }
}

/* One plan, in plan_apply's order; copies before rows. */
static void device_run(device *d, const tr_plan *p)
{
    int h = 0;

    for (int i = 0; i < p->n_opens; i++) {
        const tr_slot_open *o = &tr_plan_opens(p)[i];
        d->open[o->slot] = *o;
        d->length[o->slot] = 0;
    }
    for (int i = 0; i < p->n_page_sets; i++) {
        const tr_page_set *s = &tr_plan_page_sets(p)[i];
        d->page_table[s->slot * d->limits.max_pages + s->i_page] = s->page;
    }
    for (int i = 0; i < p->n_copies; i++) {
        const tr_page_copy *c = &tr_plan_copies(p)[i];
        memcpy(&d->cell[c->to * PAGE], &d->cell[c->from * PAGE], (size_t)c->n_rows * sizeof(cell));
        /* The rest of the page is whatever was there: make it wrong. */
        memset(&d->cell[c->to * PAGE + c->n_rows], 0, (size_t)(PAGE - c->n_rows) * sizeof(cell));
    }
    for (int i = 0; i < p->n_spans; i++) {
        const tr_span *s = &tr_plan_spans(p)[i];
        int first = s->position < 0 ? d->length[s->slot] : s->position;
        for (int r = 0; r < s->n_rows; r++) {
            int position = first + r;
            int32_t token =
                s->i_token < 0 ? d->last_token[s->slot] : tr_plan_tokens(p)[s->i_token + r];
            bool dense = (s->flags & TR_SPAN_DENSE) && position < d->limits.index_topk;
            assert_true(position < p->max_context);
            cell *c = cell_at(d, s->slot, position);
            *c = (cell){.token = token, .dense = dense, .written = 1};
            uint64_t before = position ? cell_at(d, s->slot, position - 1)->hash : 0;
            c->hash = row_hash(before, token, position, dense);
            if (r >= s->n_rows - s->n_logits) device_head(d, p, h++, s->slot, position, token);
        }
        d->length[s->slot] = first + s->n_rows;
    }
    d->out.n_head = h;
    assert_int_equal(h, p->n_head_rows);
}

/* ---- a world: scheduler, device, requests --------------------------------------------------------------- */

typedef struct world {
    tr_scheduler_options options;
    tr_scheduler *scheduler;
    device device;
    tr_plan *flight[4]; /* copies of plans in flight, oldest first */
    int n_flight;
    uint64_t random, n_steps, n_requests, n_done, n_failed, n_refused, n_forks;
    int shared_percent;             /* requests that begin like others */
    int long_percent, largest;      /* requests: how many are long; the longest, in tokens */
    uint64_t submitted_at[1 << 16]; /* [id % size] step */
    uint32_t itl_p50_ns;            /* of the last event */
    bool finished[1 << 16];         /* [id % size] */
    bool restarted;                 /* requests may have been scored before */
    uint64_t longest_wait;
} world;

/* Documents: token i of number d. A few share their first page and a half. */
static int32_t document_token(int d, int i)
{
    int32_t token =
        (int32_t)(3 + mix((uint64_t)(i < 96 ? d / 2 : 100 + d), (uint64_t)i) % (VOCAB - 5));
    return d == 5 && i == 70 ? NAN_TOKEN : token; /* poison in the middle */
}

/* Of `length` tokens at most: the beginning of a document, often around a page boundary, and often a tail of its own. */
static void share_prompt(world *w, tr_request *r, int length)
{
    static const int edges[] = {63, 64, 65, 127, 128, 129, 192, 193};
    uint64_t *s = &w->random;
    const int d = pick(s, 0, 5);
    int n = chance(s, 50) ? edges[pick(s, 0, 7)] : pick(s, 1, length);

    if (!chance(s, w->shared_percent)) return;
    if (n > length) n = length;
    int n_tail = chance(s, 60) ? pick(s, 0, length - n) % 20 : 0;
    r->n_prompt = (size_t)(n + n_tail);
    r->prompt = realloc(r->prompt, r->n_prompt * sizeof *r->prompt);
    for (int i = 0; i < n + n_tail; i++)
        r->prompt[i] = i < n ? document_token(d, i) : pick(s, 3, VOCAB - 2);
}

static tr_request *make_request(world *w)
{
    uint64_t *s = &w->random;
    tr_request *r = calloc(1, sizeof *r);
    tr_params *p = &r->params;
    int length =
        chance(s, w->long_percent) ? pick(s, 1, w->largest) : pick(s, 1, w->largest / 4 + 1);

    r->id = w->n_requests++;
    r->n_prompt = (size_t)pick(s, 1, length);
    if (chance(s, 10))
        r->n_prompt = (size_t)(length + PAGE - 1) / PAGE * PAGE - (size_t)pick(s, 0, 1);
    if (r->n_prompt > (size_t)length) r->n_prompt = (size_t)length;
    if (!r->n_prompt) r->n_prompt = 1;
    r->prompt = malloc(r->n_prompt * sizeof *r->prompt);
    for (size_t i = 0; i < r->n_prompt; i++)
        r->prompt[i] = pick(s, 3, chance(s, 1) && chance(s, 30) ? VOCAB - 1 : VOCAB - 2);
    share_prompt(w, r, length);
    *p = (tr_params){.n = chance(s, 25) ? pick(s, 2, 4) : 1,
                     .key = mix(*s, 9),
                     .temperature = 1,
                     .top_p = 1,
                     .max_tokens = length - (int)r->n_prompt,
                     .repetition = 1,
                     .n_logprobs = chance(s, 20) ? pick(s, 0, 3) : -1,
                     .n_prompt_logprobs = chance(s, 10) ? pick(s, 0, 2) : -1};
    if (p->max_tokens > 300) p->max_tokens = 300;
    p->ignore_eos = chance(s, 80);
    p->include_stop = chance(s, 50);
    p->min_tokens = chance(s, 15) ? pick(s, 0, 20) : 0;
    if (chance(s, 8)) p->repetition = 1.25f;
    if (chance(s, 8)) p->presence = 0.5f;
    if (chance(s, 8)) p->frequency = 0.25f;
    if (chance(s, 8)) {
        p->bias = calloc(2, sizeof *p->bias);
        p->n_bias = 2;
        p->bias[0] = (tr_bias){.token = pick(s, 3, 40), .bias = -3};
        p->bias[1] = (tr_bias){.token = pick(s, 41, 90), .bias = 2};
    }
    if (chance(s, 20)) {
        p->stop_token = calloc(2, sizeof *p->stop_token);
        p->n_stop_tokens = 2;
        p->stop_token[0] = pick(s, 3, 90);
        p->stop_token[1] = pick(s, 3, 90);
    }
    if (chance(s, 20)) {
        const char *words[] = {"abcab", "bb", "ccacca", "aaaa", "bcbcb"};
        p->n_stop = pick(s, 1, 2);
        p->stop = calloc((size_t)p->n_stop, sizeof *p->stop);
        for (int i = 0; i < p->n_stop; i++) {
            p->stop[i].s = strdup(words[pick(s, 0, 4)]);
            p->stop[i].n = strlen(p->stop[i].s);
        }
    }
    return r;
}

static void check_scores(const tr_request *r, const tr_scores *s, int index_topk)
{
    uint64_t cache = 0;

    assert_int_equal(s->n, (int)r->n_prompt - 1);
    for (int i = 0; i < s->n; i++) {
        cache = row_hash(cache, r->prompt[i], i, i < index_topk);
        assert_true(s->logprob[i] == target_score(cache, r->prompt[i + 1]));
        assert_int_equal(s->rank[i], r->prompt[i + 1]);
        for (int j = 0; j < s->n_top; j++)
            assert_int_equal(s->top_token[i * s->n_top + j], (r->prompt[i + 1] + j) % VOCAB);
    }
}

static void check_event(world *w, const tr_event *e)
{
    const tr_request *r = e->request;
    const int topk = w->options.limits.index_topk;
    expected x;
    bool failed = false;

    w->n_done++;
    w->itl_p50_ns = e->itl_p50_ns;
    assert_false(w->finished[r->id % (1 << 16)]);
    w->finished[r->id % (1 << 16)] = true;
    uint64_t waited = w->n_steps - w->submitted_at[r->id % (1 << 16)];
    if (waited > w->longest_wait) w->longest_wait = waited;
    for (int i = 0; i < r->params.n; i++) {
        run_alone(r, i, topk, &x);
        failed |= x.failed;
        if (e->kind != TR_EVENT_DONE) continue;
        const tr_choice *c = &e->choice[i];
        assert_false(x.failed);
        assert_int_equal(c->n_token, x.n);
        if (x.n) assert_memory_equal(c->token, x.token, (size_t)x.n * sizeof *x.token);
        assert_int_equal(c->finish == TR_FINISH_STOP, x.finish_stop);
        assert_int_equal(c->n_text, x.n_text);
        assert_memory_equal(c->text, x.text, x.n_text);
        assert_int_equal(c->scores.n, r->params.n_logprobs >= 0 ? x.n : 0);
        for (int j = 0; j < c->scores.n; j++)
            assert_int_equal(c->scores.rank[j], c->token[j]);
    }
    if (e->kind == TR_EVENT_DONE) {
        if (r->params.n_prompt_logprobs >= 0) check_scores(r, &e->prompt_scores, topk);
        assert_in_range(e->cached_tokens, 0, r->n_prompt - !w->restarted);
        assert_int_equal(e->cached_tokens % PAGE, 0);
        if (!w->options.prefix_cache || (r->params.n_prompt_logprobs >= 0 && !w->restarted))
            assert_true(!e->cached_tokens || r->n_prompt == 1);
        return;
    }
    assert_true(failed);
    assert_string_equal(e->code, "numerical_error");
    w->n_failed++;
}

static void submit_request(world *w, tr_request *r)
{
    tr_event *e = calloc(1, sizeof *e);
    e->request = r;
    w->submitted_at[e->request->id % (1 << 16)] = w->n_steps;
    e = tr_scheduler_add(w->scheduler, e);
    if (e) { /* nothing to compute */
        assert_int_equal(e->kind, TR_EVENT_DONE);
        check_event(w, e);
        tr_event_free(e);
        w->n_refused++;
    }
}

/* No page that a step in flight reads or writes may get into another's hands: what this plan hands out for writing (set, and
 * not set or read by anybody else before) must not be in the page tables of spans in flight. */
static void check_hazards(const tr_plan *plan, const uint8_t *busy)
{
    for (int i = 0; i < plan->n_copies; i++)
        assert_false(busy[tr_plan_copies(plan)[i].to]);
    for (int i = 0; i < plan->n_spans; i++) {
        const tr_span *s = &tr_plan_spans(plan)[i];
        if (s->position < 0) continue;
        for (int j = 0; j < plan->n_page_sets; j++) {
            const tr_page_set *set = &tr_plan_page_sets(plan)[j];
            if (set->slot == s->slot && set->i_page >= s->position / PAGE &&
                set->i_page <= (s->position + s->n_rows - 1) / PAGE)
                assert_false(busy[set->page]);
        }
    }
}

/* Marks the pages that the steps in flight touch: as the device's tables will stand, replayed on a copy. */
static void find_busy(const world *w, uint8_t *busy)
{
    const tr_plan_limits *l = &w->options.limits;
    size_t bytes = (size_t)l->n_slots * (size_t)l->max_pages * sizeof(int32_t);
    int32_t *table = malloc(bytes);
    int32_t length[MAX_SLOTS];

    memcpy(table, w->device.page_table, bytes);
    memcpy(length, w->device.length, sizeof length);
    memset(busy, 0, (size_t)l->n_pages);
    for (int f = 0; f < w->n_flight; f++) {
        const tr_plan *p = w->flight[f];
        for (int i = 0; i < p->n_page_sets; i++)
            table[tr_plan_page_sets(p)[i].slot * l->max_pages + tr_plan_page_sets(p)[i].i_page] =
                tr_plan_page_sets(p)[i].page;
        for (int i = 0; i < p->n_copies; i++)
            busy[tr_plan_copies(p)[i].from] = busy[tr_plan_copies(p)[i].to] = 1;
        for (int i = 0; i < p->n_spans; i++) {
            const tr_span *s = &tr_plan_spans(p)[i];
            int first = s->position < 0 ? length[s->slot] : s->position;
            for (int k = 0; k <= (first + s->n_rows - 1) / PAGE; k++)
                busy[table[s->slot * l->max_pages + k]] = 1;
            length[s->slot] = first + s->n_rows;
        }
    }
    free(table);
}

/* Plan, run or commit once, as an engine would: a plan whenever the ring has room. */
static bool turn(world *w)
{
    const tr_plan *plan = NULL;
    tr_err err = {0};

    if (w->n_flight < w->options.ring) {
        assert_int_equal(tr_scheduler_plan(w->scheduler, &plan, &err), TR_OK);
        if (plan) {
            uint8_t busy[256];
            find_busy(w, busy);
            check_hazards(plan, busy);
            if (tr_plan_check(plan, plan->bytes, &w->options.limits, &err))
                fail_msg("%s", err.text);
            w->flight[w->n_flight] = malloc(plan->bytes);
            memcpy(w->flight[w->n_flight++], plan, plan->bytes);
            w->n_steps++;
            w->n_forks += (uint64_t)plan->n_copies;
        }
    }
    if (plan && w->n_flight < w->options.ring) return true;
    if (!w->n_flight) return false;
    device_run(&w->device, w->flight[0]);
    free(w->flight[0]);
    memmove(w->flight, w->flight + 1, sizeof w->flight - sizeof w->flight[0]);
    w->n_flight--;
    tr_scheduler_commit(w->scheduler, &w->device.out);
    for (tr_event *e; (e = tr_scheduler_event(w->scheduler));) {
        check_event(w, e);
        tr_event_free(e);
    }
    if (w->n_steps % 64 == 0) assert_true(tr_scheduler_consistent(w->scheduler));
    return true;
}

static world *world_create(uint64_t seed, int n_pages, int ring, int max_sequences, int max_batch,
                           int topk)
{
    world *w = calloc(1, sizeof *w);
    tr_err err = {0};

    w->random = seed;
    w->options = (tr_scheduler_options){
        .limits = {.n_slots = max_sequences,
                   .n_pages = n_pages,
                   .max_pages = n_pages < 7 ? n_pages : 7,
                   .n_rows_max = max_batch + max_sequences,
                   .n_head_max = max_batch + max_sequences,
                   .n_vocab = VOCAB,
                   .index_topk = topk},
        .max_batch_tokens = max_batch,
        .max_sequences = max_sequences,
        .ring = ring,
        .prefix_cache = chance(&w->random, 85),
        .eos = EOS,
        .bos = BOS,
        .pad = PAD,
        .vocabulary = vocabulary,
    };
    w->options.max_model_len = w->options.limits.max_pages * PAGE;
    w->long_percent = chance(&w->random, 30) ? 15 : 80;
    w->shared_percent = chance(&w->random, 30) ? 20 : 80;
    w->largest = w->options.max_model_len;
    if (tr_scheduler_create(&w->scheduler, &w->options, &err)) fail_msg("%s", err.text);
    device_create(&w->device, &w->options.limits);
    return w;
}

static void world_free(world *w)
{
    for (int i = 0; i < w->n_flight; i++)
        free(w->flight[i]);
    tr_scheduler_free(w->scheduler);
    device_free(&w->device);
    free(w);
}

#endif
