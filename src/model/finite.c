/* Where rows stop being finite (reliability.md 4, row 10). Only a model that was asked to looks (tr_model_options.find_not_finite):
 * after the embedding and after every layer the host reads the rows of the residual stream, and a slot keeps the earliest place at
 * which one of its rows was not finite since it was opened. The slot and not the row: what is wrong in a row is in the keys that
 * later rows see, in this step or another one. Earliest in the network's order: a row that only reads such keys stops being finite
 * a layer later.
 *
 * A stage passes what it and those before it know of all slots on with the rows; the members of a context-parallel group, which have
 * different rows, take the earliest of all. So whoever has the head knows, and says it in the tokens of rows whose logits are not
 * finite, which go to the leader as ever. */
#include <config.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "model/model_priv.h"

enum { ROWS_AT_A_TIME = 64 };

/* Places as words of which the larger is the earlier: the group's earliest is tr_comm_all_max_u64's. */
enum { NOWHERE = 0, EMBEDDING = TR_LAYERS_MAX + 1 };

struct tr_finite {
    uint64_t *word;  /* [n_slots] */
    uint64_t *going; /* [n_slots] on their way to the next stage */
    uint64_t *heard; /* [n_slots] of the stage before; of all members */
    int32_t *slot;   /* [max_rows] of the step's rows */
    float *rows;     /* [ROWS_AT_A_TIME, hidden] of the backend's host memory */
    tr_ticket sent;
    bool sending;
    int region;
};

static uint64_t word_of(int layer)
{
    return (uint64_t)(TR_LAYERS_MAX - layer);
}

static int32_t token_of(uint64_t word)
{
    if (word == NOWHERE) return TR_NOT_FINITE_HEAD;
    if (word == EMBEDDING) return TR_NOT_FINITE_EMBEDDING;
    return TR_NOT_FINITE_LAYER_0 - (int32_t)(TR_LAYERS_MAX - word);
}

/* ---- creation ------------------------------------------------------------------------------------------------------ */

tr_status tr_finite_create(tr_model *m, tr_err *err)
{
    const size_t n_slots = (size_t)m->slots.n_slots, d = (size_t)m->config->hidden_size;
    void *rows = NULL;
    size_t bytes;

    tr_finite *f = m->finite = calloc(1, sizeof *f);
    if (f) {
        f->word = tr_calloc(n_slots, sizeof *f->word);
        f->going = tr_calloc(n_slots, sizeof *f->going);
        f->heard = tr_calloc(n_slots, sizeof *f->heard);
        f->slot = tr_calloc((size_t)m->max_rows, sizeof *f->slot);
    }
    if (!f || !f->word || !f->going || !f->heard || !f->slot ||
        !tr_mul(&bytes, ROWS_AT_A_TIME * sizeof *f->rows, d))
        return tr_fail(err, TR_E_MEMORY, "out of memory for --sync-check");
    const tr_status st = m->ops->alloc(m->device, bytes, TR_MEMORY_HOST, &rows);
    if (st != TR_OK) return tr_fail(err, st, "--sync-check: %s", m->ops->error(m->device));
    f->rows = rows;
    f->region = tr_region_id(m->regions, "sync_check");
    return TR_OK;
}

void tr_finite_free(tr_model *m)
{
    tr_finite *f = m->finite;

    if (!f) return;
    if (f->rows) m->ops->release(m->device, f->rows);
    free(f->word);
    free(f->going);
    free(f->heard);
    free(f->slot);
    free(f);
    m->finite = NULL;
}

/* ---- one step ------------------------------------------------------------------------------------------------------ */

void tr_finite_begin(tr_model *m, const tr_plan *plan)
{
    const tr_slot_open *open = tr_plan_opens(plan);

    for (int i = 0; m->finite && i < plan->n_opens; i++)
        m->finite->word[open[i].slot] = NOWHERE;
}

static bool is_finite(const float *x, int n)
{
    for (int i = 0; i < n; i++)
        if (!isfinite(x[i])) return false;
    return true;
}

/* Rows [i, i + n) of the pass are in f->rows. */
static void note(tr_finite *f, int i, int n, int d, uint64_t word)
{
    for (int r = 0; r < n; r++) {
        uint64_t *of = &f->word[f->slot[i + r]];
        if (*of < word && !is_finite(f->rows + (size_t)r * (size_t)d, d)) *of = word;
    }
}

static tr_status look(tr_model *m, const tr_pass *p, uint64_t word, tr_err *err)
{
    const int d = m->config->hidden_size;
    tr_finite *f = m->finite;

    if (!f || p->n == 0) return TR_OK;
    tr_region_begin(m->regions, f->region);
    tr_status st =
        tr_model_fetch_words(m, f->slot, p->rows.slot, (size_t)p->n * sizeof *f->slot, err);
    for (int i = 0; i < p->n && st == TR_OK; i += ROWS_AT_A_TIME) {
        const int n = p->n - i < ROWS_AT_A_TIME ? p->n - i : ROWS_AT_A_TIME;
        st = tr_model_fetch_words(m, f->rows, m->ws.hidden + (size_t)i * (size_t)d,
                                  (size_t)n * (size_t)d * sizeof(float), err);
        if (st == TR_OK) note(f, i, n, d, word);
    }
    tr_region_end(m->regions, 0, 0);
    return st;
}

tr_status tr_finite_embedding(tr_model *m, const tr_pass *p, tr_err *err)
{
    return look(m, p, EMBEDDING, err);
}

tr_status tr_finite_layer(tr_model *m, const tr_pass *p, int layer, tr_err *err)
{
    return look(m, p, word_of(layer), err);
}

/* ---- between ranks ------------------------------------------------------------------------------------------------- */

tr_status tr_finite_receive(tr_model *m, const tr_pass *p, tr_err *err)
{
    tr_comm *pp = tr_comm_host(m->groups.pp);
    const int n_slots = m->slots.n_slots;
    const size_t bytes = (size_t)n_slots * sizeof(uint64_t);
    tr_finite *f = m->finite;
    tr_ticket ticket = {0};

    if (!f || p->n == 0) return TR_OK;
    tr_status st = tr_comm_recv(pp, tr_comm_rank(pp) - 1, f->heard, bytes, &ticket, err);
    st = tr_model_await(m, pp, st, ticket, (double)bytes, err);
    for (int i = 0; i < n_slots && st == TR_OK; i++) {
        if (f->heard[i] > EMBEDDING)
            return tr_fail(err, TR_E_COMM, "--sync-check: the stage before says %ju of slot %d",
                           (uintmax_t)f->heard[i], i);
        if (f->heard[i] > f->word[i]) f->word[i] = f->heard[i];
    }
    return st;
}

/* Like the rows the words stay in flight while the next step runs. */
tr_status tr_finite_send(tr_model *m, const tr_pass *p, tr_err *err)
{
    tr_comm *pp = tr_comm_host(m->groups.pp);
    const size_t bytes = (size_t)m->slots.n_slots * sizeof(uint64_t);
    tr_finite *f = m->finite;
    tr_status st = TR_OK;

    if (!f || p->n == 0) return TR_OK;
    if (f->sending) st = tr_model_await(m, pp, TR_OK, f->sent, 0, err);
    f->sending = false;
    if (st != TR_OK) return st;
    memcpy(f->going, f->word, bytes);
    st = tr_comm_send(pp, tr_comm_rank(pp) + 1, f->going, bytes, &f->sent, err);
    f->sending = st == TR_OK;
    return st;
}

/* *word: of every slot the earliest place that a member of the context-parallel group knows. */
static tr_status gather(tr_model *m, const uint64_t **word, tr_err *err)
{
    tr_comm *cp = tr_comm_host(m->groups.attn_cp);
    const size_t n = (size_t)m->slots.n_slots;
    tr_finite *f = m->finite;
    tr_ticket ticket = {0};

    *word = f->word;
    if (tr_comm_size(cp) == 1) return TR_OK;
    memcpy(f->heard, f->word, n * sizeof *f->heard);
    *word = f->heard;
    const tr_status st = tr_comm_all_max_u64(cp, f->heard, n, &ticket, err);
    return tr_model_await(m, cp, st, ticket, (double)n * sizeof *f->heard, err);
}

tr_status tr_finite_tell(tr_model *m, tr_step *step, tr_err *err)
{
    const tr_span *span = tr_plan_spans(step->plan);
    int32_t *token = step->out.token;
    const uint64_t *word;

    if (!m->finite || step->plan->n_head_rows == 0) return TR_OK;
    const tr_status st = gather(m, &word, err);
    if (st != TR_OK) return st;
    for (int i = 0; i < step->plan->n_spans; i++)
        for (int h = 0; h < span[i].n_logits; h++, token++)
            if (*token == TR_NOT_FINITE) *token = token_of(word[span[i].slot]);
    return TR_OK;
}

bool tr_not_finite(int32_t token, char *where, size_t size)
{
    if (token != TR_NOT_FINITE && (token > TR_NOT_FINITE_HEAD || token < TR_NOT_FINITE_LAST))
        return false;
    if (token == TR_NOT_FINITE)
        snprintf(where, size, "%s", "");
    else if (token == TR_NOT_FINITE_HEAD)
        snprintf(where, size, "first in the head");
    else if (token == TR_NOT_FINITE_EMBEDDING)
        snprintf(where, size, "first in the embedding");
    else
        snprintf(where, size, "first in layer %d", (int)(TR_NOT_FINITE_LAYER_0 - token));
    return true;
}
