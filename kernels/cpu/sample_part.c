#include <config.h>

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/sample_priv.h"
#include "kernels/philox.h"

/* Sampling and log-probabilities where every member of a group has the logits of a part of the ids (parallel.md 2.6). What the
 * members exchange is their best ids and the mass of all of theirs: a draw nearly always ends among the best, and where it does
 * not the row says so. All members merge the same parts in the same order, so all get the same token. */

/* ---- one member's part ----------------------------------------------------------------------- */

/* The TR_PART_BEST largest of list[n] into best, descending, 0 behind them. */
static void keep_best(const tr_choice_key *list, int n, tr_choice_key *best)
{
    int kept = 0;

    memset(best, 0, TR_PART_BEST * sizeof *best);
    for (int i = 0; i < n; i++) {
        if (kept == TR_PART_BEST && list[i] <= best[kept - 1]) continue;
        int at = kept < TR_PART_BEST ? kept++ : kept - 1;
        for (; at > 0 && list[i] > best[at - 1]; at--)
            best[at] = best[at - 1];
        best[at] = list[i];
    }
}

static void part_row(const struct tr_sample_part_args *a, int r, tr_choice_key *scratch)
{
    const int head_row = a->i_head + r;
    const float *logits = a->logits + (size_t)r * a->ld;
    const tr_slot_open *s = &a->slots.sampling[a->rows->slot[a->rows->head_row[head_row]]];
    const tr_sample_ids ids = {
        .plan = a->plan, .has_token = a->has_token, .first = a->first, .n_vocab = a->n_vocab};
    tr_sample_part *p = &a->part[r];

    memset(p, 0, sizeof *p);
    p->finite = tr_all_finite(logits, a->n_vocab);
    if (!p->finite || a->rows->target[head_row] >= 0) return;
    p->n = tr_sample_collect(&ids, head_row, logits, scratch);
    keep_best(scratch, p->n, p->best);
    if (s->temperature < 1e-5f) return; /* greedy: nobody asks for the mass */
    for (int i = 0; i < p->n; i++)
        p->sum += tr_key_weight(scratch[i], tr_key_logit(p->best[0]), (double)s->temperature);
}

tr_status tr_cpu_sample_part(tr_device *d, tr_lane lane, const struct tr_sample_part_args *a)
{
    const int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    (void)lane;

    if (a->workspace_bytes < (size_t)a->n_vocab * sizeof(tr_choice_key))
        return tr_cpu_fail(d, TR_E_MEMORY, "sample_part: a workspace of %zu bytes for %d ids",
                           a->workspace_bytes, a->n_vocab);
    for (int r = 0; r < n; r++)
        part_row(a, r, a->workspace);
    return TR_OK;
}

tr_status tr_cpu_argmax_part(tr_device *d, tr_lane lane, const struct tr_argmax_part_args *a)
{
    const int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    const tr_sample_ids ids = {
        .plan = a->plan, .has_token = a->has_token, .first = a->first, .n_vocab = a->n_vocab};
    tr_choice_key *list = a->workspace;
    (void)lane;

    if (a->workspace_bytes < (size_t)a->n_vocab * sizeof *list)
        return tr_cpu_fail(d, TR_E_MEMORY, "argmax_part: a workspace of %zu bytes for %d ids",
                           a->workspace_bytes, a->n_vocab);
    for (int r = 0; r < n; r++) {
        const float *logits = a->logits + (size_t)r * a->ld;
        a->key[r] = UINT64_MAX;
        if (!tr_all_finite(logits, a->n_vocab)) continue;
        const int n_ids = tr_sample_collect(&ids, a->i_head + r, logits, list);
        a->key[r] = 0;
        for (int i = 0; i < n_ids; i++)
            if (list[i] > a->key[r]) a->key[r] = list[i];
    }
    return TR_OK;
}

tr_status tr_cpu_argmax_take(tr_device *d, tr_lane lane, const struct tr_argmax_take_args *a)
{
    const int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    (void)d, (void)lane;

    for (int r = 0; r < n; r++) {
        const int h = a->i_head + r;
        const uint64_t key = a->key[r];
        if (key == UINT64_MAX)
            a->token_out[h] = -2;
        else if (a->rows->target[h] >= 0)
            a->token_out[h] = -1;
        else if (key == 0)
            a->token_out[h] = -2;
        else
            a->slots.last_token[a->rows->slot[a->rows->head_row[h]]] = a->token_out[h] =
                tr_key_id(key);
    }
    return TR_OK;
}

/* ---- all members' ---------------------------------------------------------------------------- */

typedef struct merged { /* the members' best ids of one row, descending */
    tr_choice_key *key;
    int n;         /* of these are surely the best of all, in order */
    int64_t n_all; /* ids that may be drawn */
} merged;

static int descending(const void *a, const void *b)
{
    const tr_choice_key x = *(const tr_choice_key *)a, y = *(const tr_choice_key *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

static const tr_sample_part *part_of(const struct tr_sample_merge_args *a, int member, int r)
{
    return &a->part[(size_t)member * (size_t)a->n_rows + (size_t)r];
}

static merged merge(const struct tr_sample_merge_args *a, int r, tr_choice_key *scratch)
{
    merged m = {.key = scratch};
    tr_choice_key bound = 0; /* behind a member's last best id there may be others below it */

    for (int i = 0; i < a->n_members; i++) {
        const tr_sample_part *p = part_of(a, i, r);
        const int n = p->n < TR_PART_BEST ? p->n : TR_PART_BEST;
        memcpy(scratch + m.n, p->best, (size_t)n * sizeof *scratch);
        m.n += n;
        m.n_all += p->n;
        if (p->n > TR_PART_BEST && p->best[TR_PART_BEST - 1] > bound)
            bound = p->best[TR_PART_BEST - 1];
    }
    qsort(scratch, (size_t)m.n, sizeof *scratch, descending);
    while (m.n > 0 && scratch[m.n - 1] < bound)
        m.n--;
    return m;
}

/* Mass of all ids, relative to the best. */
static double mass(const struct tr_sample_merge_args *a, int r, double best, double temperature)
{
    double total = 0;

    for (int i = 0; i < a->n_members; i++) {
        const tr_sample_part *p = part_of(a, i, r);
        if (p->n > 0) total += p->sum * tr_key_weight(p->best[0], best, temperature);
    }
    return total;
}

enum { BEYOND = -3 };

/* min_p -> top_k -> top_p -> draw, as sample.c does it from a whole row. BEYOND: an id would be needed that no part names. */
static int32_t draw(const struct tr_sample_merge_args *a, int r, const merged *m,
                    const tr_slot_open *s, int32_t position)
{
    const double temperature = (double)s->temperature, best = tr_key_logit(m->key[0]);
    int64_t n = m->n_all;
    double total, sum = 0;

    if (s->min_p > 0) {
        int kept = 0;
        total = 0;
        for (; kept < m->n; kept++) {
            const double w = tr_key_weight(m->key[kept], best, temperature);
            if (w < (double)s->min_p && w < 1) break;
            total += w;
        }
        if (kept == m->n && m->n < m->n_all) return BEYOND;
        n = kept;
    } else {
        total = mass(a, r, best, temperature);
    }
    if (s->top_k > 0 && s->top_k < n) {
        n = s->top_k;
        if (n > m->n) return BEYOND;
        total = 0;
        for (int i = 0; i < n; i++)
            total += tr_key_weight(m->key[i], best, temperature);
    }
    if (s->top_p < 1.0f) {
        const double enough = (double)s->top_p * total;
        for (int i = 0; i < n; i++) {
            if (i >= m->n) return BEYOND;
            sum += tr_key_weight(m->key[i], best, temperature);
            if (sum >= enough) n = i + 1;
        }
        total = sum;
    }

    const double mark = total * tr_philox_uniform(s->key, (uint32_t)position + 1, TR_PHILOX_SAMPLE);
    int32_t id = -1;
    sum = 0;
    for (int i = 0; i < n && sum <= mark; i++) {
        if (i >= m->n) return BEYOND;
        const double w = tr_key_weight(m->key[i], best, temperature);
        sum += w;
        if (w > 0) id = tr_key_id(m->key[i]);
    }
    return id;
}

static int32_t merge_row(const struct tr_sample_merge_args *a, int r, tr_choice_key *scratch)
{
    const int32_t head_row = a->i_head + r, row = a->rows->head_row[head_row];
    const tr_slot_open *s = &a->slots.sampling[a->rows->slot[row]];

    for (int i = 0; i < a->n_members; i++)
        if (!part_of(a, i, r)->finite) return -2;
    if (a->rows->target[head_row] >= 0) return -1;
    const merged m = merge(a, r, scratch);
    if (m.n == 0) return -2;
    if (s->temperature < 1e-5f) return tr_key_id(m.key[0]);
    return draw(a, r, &m, s, a->rows->position[row]);
}

tr_status tr_cpu_sample_merge(tr_device *d, tr_lane lane, const struct tr_sample_merge_args *a)
{
    const int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    (void)lane;

    tr_choice_key *scratch =
        n > 0 ? malloc((size_t)a->n_members * TR_PART_BEST * sizeof *scratch) : NULL;
    if (n > 0 && !scratch)
        return tr_cpu_fail(d, TR_E_MEMORY, "out of memory to merge %d parts", a->n_members);
    for (int r = 0; r < n; r++) {
        const int32_t token = merge_row(a, r, scratch);
        a->token_out[a->i_head + r] = token;
        if (token >= 0)
            a->slots.last_token[a->rows->slot[a->rows->head_row[a->i_head + r]]] = token;
    }
    free(scratch);
    return TR_OK;
}

/* ---- log-probabilities ----------------------------------------------------------------------- */

/* The token whose log-probability head row h wants, and how many others; -1: it wants none. */
static int32_t wanted(const tr_rows *rows, const tr_slots *slots, const int32_t *token_out, int h,
                      int *n_top)
{
    const tr_slot_open *s = &slots->sampling[rows->slot[rows->head_row[h]]];
    const int32_t target = rows->target[h], token = target >= 0 ? target : token_out[h];

    *n_top = target >= 0 ? s->n_prompt_logprobs : s->n_logprobs;
    if (*n_top > TR_MAX_LOGPROBS) *n_top = TR_MAX_LOGPROBS;
    return *n_top < 0 || token_out[h] == -2 ? -1 : token;
}

tr_status tr_cpu_logprob_part(tr_device *d, tr_lane lane, const struct tr_logprob_part_args *a)
{
    const int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    (void)d, (void)lane;

    for (int r = 0; r < n; r++) {
        const float *x = a->logits + (size_t)r * a->ld;
        tr_logprob_part *p = &a->part[r];
        int n_top;
        const int32_t token = wanted(a->rows, &a->slots, a->token_out, a->i_head + r, &n_top);
        double best;
        memset(p, 0, sizeof *p);
        if (token < 0) continue;
        const bool mine = token >= a->first && token < a->first + a->n_vocab;
        p->sum = exp(tr_log_sum(x, a->n_vocab, &best));
        p->best = (float)best;
        p->token_logit = mine ? x[token - a->first] : -INFINITY;
        const int found = tr_best_ids(x, a->n_vocab, n_top, p->top_token);
        for (int i = 0; i < TR_MAX_LOGPROBS; i++) {
            p->top_logit[i] = i < found ? x[p->top_token[i]] : 0.0f;
            p->top_token[i] = i < found ? p->top_token[i] + a->first : -1;
        }
    }
    return TR_OK;
}

/* The token's raw logit: one of the members has it. */
static float token_logit(const tr_logprob_part *part, int n_members, int n_rows, int r)
{
    float x = -INFINITY;

    for (int i = 0; i < n_members; i++)
        x = fmaxf(x, part[(size_t)i * (size_t)n_rows + (size_t)r].token_logit);
    return x;
}

tr_status tr_cpu_logprob_rank(tr_device *d, tr_lane lane, const struct tr_logprob_rank_args *a)
{
    const int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    (void)d, (void)lane;

    for (int r = 0; r < n; r++) {
        const float *x = a->logits + (size_t)r * a->ld;
        int n_top;
        const int32_t token = wanted(a->rows, &a->slots, a->token_out, a->i_head + r, &n_top);
        const float level = token < 0 ? 0 : token_logit(a->part, a->n_members, a->n_rows, r);
        a->better[r] = 0;
        for (int i = 0; i < a->n_vocab && token >= 0; i++)
            a->better[r] += x[i] > level || (x[i] == level && a->first + i < token);
    }
    return TR_OK;
}

/* The n best of all members' lists, descending, ties by smaller id; next[member]: how far each list has been read. */
static void merge_tops(const struct tr_logprob_merge_args *a, int r, int n, double best,
                       double base, int *next)
{
    const size_t at = (size_t)(a->i_head + r) * TR_MAX_LOGPROBS;

    memset(next, 0, (size_t)a->n_members * sizeof *next);
    for (int i = 0; i < TR_MAX_LOGPROBS; i++) {
        const tr_logprob_part *from = NULL;
        int member = -1;
        for (int m = 0; m < a->n_members && i < n; m++) { /* members in the order of their ids */
            const tr_logprob_part *p = &a->part[(size_t)m * (size_t)a->n_rows + (size_t)r];
            if (next[m] == TR_MAX_LOGPROBS || p->top_token[next[m]] < 0) continue;
            if (from && !(p->top_logit[next[m]] > from->top_logit[next[member]])) continue;
            from = p;
            member = m;
        }
        a->top_token[at + (size_t)i] = from ? from->top_token[next[member]] : -1;
        a->top_logprob[at + (size_t)i] =
            from ? (float)((double)from->top_logit[next[member]] - best - base) : 0.0f;
        if (from) next[member]++;
    }
}

tr_status tr_cpu_logprob_merge(tr_device *d, tr_lane lane, const struct tr_logprob_merge_args *a)
{
    const int n = tr_chunk_rows(a->rows, a->i_head, a->n_rows);
    (void)lane;

    int *next = n > 0 ? malloc((size_t)a->n_members * sizeof *next) : NULL;
    if (n > 0 && !next)
        return tr_cpu_fail(d, TR_E_MEMORY, "out of memory to merge %d parts", a->n_members);
    for (int r = 0; r < n; r++) {
        const int h = a->i_head + r;
        double best = -INFINITY, sum = 0;
        int n_top;
        if (wanted(a->rows, &a->slots, a->token_out, h, &n_top) < 0) continue;
        a->rank[h] = 1;
        for (int m = 0; m < a->n_members; m++) {
            const tr_logprob_part *p = &a->part[(size_t)m * (size_t)a->n_rows + (size_t)r];
            best = fmax(best, (double)p->best);
            a->rank[h] += a->better[(size_t)m * (size_t)a->n_rows + (size_t)r];
        }
        for (int m = 0; m < a->n_members; m++) {
            const tr_logprob_part *p = &a->part[(size_t)m * (size_t)a->n_rows + (size_t)r];
            sum += p->sum * exp((double)p->best - best);
        }
        const double base = log(sum);
        a->logprob[h] =
            (float)((double)token_logit(a->part, a->n_members, a->n_rows, r) - best - base);
        merge_tops(a, r, n_top, best, base, next);
    }
    free(next);
    return TR_OK;
}
