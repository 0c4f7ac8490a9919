#include <config.h>

#include <float.h>
#include <math.h>
#include <stdbool.h>

#include "kernels/cpu/sample_priv.h"
#include "kernels/philox.h"

/* Sampling and log-probabilities (chat.md 4.2, model.md 8), the reference. All sums are in double
 * and in one order, so a draw depends on the row's own logits, parameters, key and position and on
 * nothing else. */

/* Rows that may be sampled at a time: 1 MB of scratch each at 129,280 ids. */
enum { SCRATCH_ROWS = 32 };

static size_t scratch_bytes(int n_vocab)
{
    return (size_t)n_vocab * sizeof(tr_choice_key);
}

size_t tr_cpu_sample_workspace(int n_rows, int n_vocab)
{
    return (size_t)(n_rows < SCRATCH_ROWS ? n_rows : SCRATCH_ROWS) * scratch_bytes(n_vocab);
}

/* ---- candidates ------------------------------------------------------------------------------ */

/* The changes of one head row: [*begin, *end) of the plan's, which are sorted by (head_row,
 * token). */
static void row_changes(const tr_plan *plan, int32_t head_row, const tr_logit_change **begin,
                        const tr_logit_change **end)
{
    const tr_logit_change *c = tr_plan_changes(plan);
    int32_t low = 0, high = plan->n_changes;

    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (c[middle].head_row < head_row)
            low = middle + 1;
        else
            high = middle;
    }
    *begin = c + low;
    while (low < plan->n_changes && c[low].head_row == head_row)
        low++;
    *end = c + low;
}

/* The logit after a change; -INFINITY: masked. Kept finite where a tiny repetition penalty would
 * overflow. */
static float change(float logit, const tr_logit_change *c)
{
    double x = (double)logit + (double)c->bias;

    if (!(x > -INFINITY)) return -INFINITY;
    if (c->repetition != 1.0f) x = x > 0 ? x / (double)c->repetition : x * (double)c->repetition;
    x -= (double)c->penalty;
    return (float)fmax(fmin(x, FLT_MAX), -FLT_MAX);
}

int tr_sample_collect(const tr_sample_ids *a, int32_t head_row, const float *logits,
                      tr_choice_key *out)
{
    const tr_logit_change *c, *c_end;
    int n = 0;

    const int end = a->first + a->n_vocab;
    row_changes(a->plan, head_row, &c, &c_end);
    for (int id = a->first;; id++) {
        while (c < c_end && c->token < id)
            c++;
        /* Up to the next change nothing is changed. */
        int next = c < c_end && c->token < end ? c->token : end;
        for (; id < next; id++) {
            out[n] = tr_make_choice(logits[id - a->first], id);
            n += a->has_token[id / 32] >> (id % 32) & 1;
        }
        if (id == end) return n;
        float logit = change(logits[id - a->first], c);
        if (!(logit > -INFINITY)) continue;
        out[n] = tr_make_choice(logit, id);
        n += a->has_token[id / 32] >> (id % 32) & 1;
    }
}

/* ---- the order of drawing -------------------------------------------------------------------- */

/* Four children per node: half the levels, and the children share a cache line. */
static void sift_down(tr_choice_key *heap, int n, int i)
{
    tr_choice_key moved = heap[i];

    for (int child; (child = 4 * i + 1) < n; i = child) {
        int end = child + 4 < n ? child + 4 : n;
        for (int k = child + 1; k < end; k++)
            child = heap[k] > heap[child] ? k : child;
        if (heap[child] <= moved) break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

/* Candidates sorted as far as somebody has asked. A heap, since a draw rarely looks at more than
 * some hundred of 129,280; what has been taken from it stands behind it, the first one last. */
typedef struct order {
    tr_choice_key *list;
    int n, n_taken;
} order;

static void order_begin(order *o, tr_choice_key *list, int n)
{
    *o = (order){list, n, 0};
    for (int i = (n + 2) / 4; i-- > 0;)
        sift_down(list, n, i);
}

/* The i-th in order, i < n. */
static tr_choice_key order_get(order *o, int i)
{
    while (o->n_taken <= i) {
        int last = o->n - 1 - o->n_taken++;
        tr_choice_key first = o->list[0];
        o->list[0] = o->list[last];
        o->list[last] = first;
        sift_down(o->list, last, 0);
    }
    return o->list[o->n - 1 - i];
}

/* ---- one row --------------------------------------------------------------------------------- */

static tr_choice_key best_choice(const tr_choice_key *list, int n)
{
    tr_choice_key best = list[0];

    for (int i = 1; i < n; i++)
        best = list[i] > best ? list[i] : best;
    return best;
}

/* Unnormalised probability after temperature; 1 for the best. */
double tr_key_weight(tr_choice_key c, double best, double temperature)
{
    return exp((tr_key_logit(c) - best) / temperature);
}

/* min_p -> top_k -> top_p -> draw. n > 0. */
static int32_t draw(tr_choice_key *list, int n, const tr_slot_open *s, int32_t position)
{
    double temperature = (double)s->temperature, best = tr_key_logit(best_choice(list, n));
    double total = 0, sum = 0;
    int n_kept = 0;
    order o;

    for (int i = 0; i < n; i++) { /* relative to the best, whose weight is 1 */
        double w = tr_key_weight(list[i], best, temperature);
        if (w < (double)s->min_p && w < 1) continue;
        total += w;
        list[n_kept++] = list[i];
    }
    n = n_kept;
    order_begin(&o, list, n);
    if (s->top_k > 0 && s->top_k < n) {
        n = s->top_k;
        total = 0;
        for (int i = 0; i < n; i++) {
            tr_choice_key c = order_get(&o, i);
            total += tr_key_weight(c, best, temperature);
        }
    }
    if (s->top_p < 1.0f) { /* the smallest set that reaches top_p: the one that crosses it stays */
        double enough = (double)s->top_p * total;
        for (int i = 0; i < n; i++) {
            tr_choice_key c = order_get(&o, i);
            sum += tr_key_weight(c, best, temperature);
            if (sum >= enough) n = i + 1;
        }
        total = sum;
    }

    /* The row at position p gives the token at p + 1. */
    double mark = total * tr_philox_uniform(s->key, (uint32_t)position + 1, TR_PHILOX_SAMPLE);
    int32_t id = -1;
    sum = 0;
    for (int i = 0; i < n && sum <= mark; i++) {
        tr_choice_key c = order_get(&o, i);
        double w = tr_key_weight(c, best, temperature);
        sum += w;
        if (w > 0)
            id = tr_key_id(
                c); /* where rounding keeps sum below mark to the end: the last possible one */
    }
    return id;
}

static int32_t sample_row(const struct tr_sample_args *a, int r, tr_choice_key *scratch)
{
    int head_row = a->i_head + r;
    int32_t row = a->rows->head_row[head_row];
    const float *logits = a->logits + (size_t)r * a->ld;
    const tr_slot_open *s = &a->slots.sampling[a->rows->slot[row]];

    if (!tr_all_finite(logits, a->n_vocab)) return -2;
    if (a->rows->target[head_row] >= 0) return -1;
    const tr_sample_ids ids = {
        .plan = a->plan, .has_token = a->has_token, .first = 0, .n_vocab = a->n_vocab};
    int n = tr_sample_collect(&ids, head_row, logits, scratch);
    if (n == 0) return -2;
    if (s->temperature < 1e-5f) return tr_key_id(best_choice(scratch, n));
    return draw(scratch, n, s, a->rows->position[row]);
}

int tr_chunk_rows(const tr_rows *rows, int i_head, int n_rows)
{
    int left = tr_live_rows(rows->n_head, rows->n_head_max) - i_head;
    return left < n_rows ? left : n_rows;
}

typedef struct sample_work {
    const tr_device *d;
    const struct tr_sample_args *a;
    int n_rows, n_members; /* members that there is scratch for */
} sample_work;

static void sample_member(void *ctx, int i, int n)
{
    const sample_work *w = ctx;
    const struct tr_sample_args *a = w->a;

    (void)n;
    if (i >= w->n_members) return;
    tr_choice_key *scratch = (tr_choice_key *)a->workspace + (size_t)i * (size_t)a->n_vocab;
    for (int r; (r = tr_team_next(w->d->team)) < w->n_rows;)
        a->token_out[a->i_head + r] = sample_row(a, r, scratch);
}

tr_status tr_cpu_sample(tr_device *d, tr_lane lane, const struct tr_sample_args *a)
{
    int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    size_t each = scratch_bytes(a->n_vocab);

    (void)lane;
    if (n <= 0) return TR_OK;
    if (!a->workspace || a->workspace_bytes < each)
        return tr_cpu_fail(d, TR_E_MEMORY,
                           "sample: a workspace of %zu bytes, at least %zu are needed",
                           a->workspace_bytes, each);
    const double work = (double)n * a->n_vocab;
    int n_threads = tr_threads_for(d, work);
    if (n_threads > n) n_threads = n;
    if ((size_t)n_threads > a->workspace_bytes / each) n_threads = (int)(a->workspace_bytes / each);

    sample_work w = {d, a, n, n_threads};
    tr_device_run(d, n_threads == 1 ? 0.0 : work, sample_member, &w);
    for (int h = a->i_head; h < a->i_head + n; h++) /* in order: the last row of a slot counts */
        if (a->token_out[h] >= 0)
            a->slots.last_token[a->rows->slot[a->rows->head_row[h]]] = a->token_out[h];
    return TR_OK;
}

/* ---- log-probabilities ----------------------------------------------------------------------- */

/* log of the sum of exp(x - best), and best itself. */
double tr_log_sum(const float *x, int n, double *best)
{
    float most = x[0];
    double sum = 0;

    for (int i = 1; i < n; i++)
        most = x[i] > most ? x[i] : most;
    *best = (double)most;
    for (int i = 0; i < n; i++)
        sum += exp((double)x[i] - *best);
    return log(sum);
}

/* The ids of the n largest, descending, ties by smaller id; returns how many there are. */
int tr_best_ids(const float *x, int n_vocab, int n, int32_t *id)
{
    int found = 0;

    for (int i = 0; n > 0 && i < n_vocab; i++) {
        if (found == n && !(x[i] > x[id[n - 1]])) continue;
        int at = found < n ? found++ : n - 1;
        for (; at > 0 && x[i] > x[id[at - 1]]; at--)
            id[at] = id[at - 1];
        id[at] = i;
    }
    return found;
}

static void logprobs_row(const struct tr_logprobs_args *a, int r)
{
    int head_row = a->i_head + r;
    const float *x = a->logits + (size_t)r * a->ld;
    const tr_slot_open *s = &a->slots.sampling[a->rows->slot[a->rows->head_row[head_row]]];
    int32_t target = a->rows->target[head_row];
    int32_t token = target >= 0 ? target : a->token_out[head_row];
    int n = target >= 0 ? s->n_prompt_logprobs : s->n_logprobs;
    double best;

    if (n < 0 || a->token_out[head_row] == -2 || token < 0 || token >= a->n_vocab) return;
    if (n > TR_MAX_LOGPROBS) n = TR_MAX_LOGPROBS;
    double base = tr_log_sum(x, a->n_vocab, &best);
    int32_t rank = 1;
    for (int i = 0; i < a->n_vocab; i++)
        rank += x[i] > x[token] || (x[i] == x[token] && i < token);
    a->rank[head_row] = rank;
    a->logprob[head_row] = (float)((double)x[token] - best - base);

    int32_t *top = a->top_token + (size_t)head_row * TR_MAX_LOGPROBS;
    float *top_logprob = a->top_logprob + (size_t)head_row * TR_MAX_LOGPROBS;
    int found = tr_best_ids(x, a->n_vocab, n, top);
    for (int i = 0; i < TR_MAX_LOGPROBS; i++) {
        if (i >= found) top[i] = -1;
        top_logprob[i] = i < found ? (float)((double)x[top[i]] - best - base) : 0.0f;
    }
}

typedef struct logprobs_work {
    const tr_device *d;
    const struct tr_logprobs_args *a;
    int n_rows;
} logprobs_work;

static void logprobs_member(void *ctx, int i, int n)
{
    const logprobs_work *w = ctx;

    (void)i, (void)n;
    for (int r; (r = tr_team_next(w->d->team)) < w->n_rows;)
        logprobs_row(w->a, r);
}

tr_status tr_cpu_logprobs(tr_device *d, tr_lane lane, const struct tr_logprobs_args *a)
{
    int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);

    (void)lane;
    if (n <= 0) return TR_OK;
    logprobs_work w = {d, a, n};
    tr_device_run(d, n == 1 ? 0.0 : (double)n * a->n_vocab, logprobs_member, &w);
    return TR_OK;
}
