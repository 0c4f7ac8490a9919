#include <config.h>

#include <string.h>

#include "kernels/cpu/cpu_priv.h"

/* The frame of a step: the plan becomes rows, half-filled pages are copied. Plans have been checked
 * (model/plan.h), but lengths live here, so what depends on a length is checked here. */

/* Sampling parameters of admitted requests; then page tables. */
static tr_status open_slots(tr_device *d, const struct tr_plan_apply_args *a)
{
    const tr_plan *plan = a->plan;
    const tr_slots *slots = &a->slots;
    const tr_slot_open *open = tr_plan_opens(plan);
    const tr_page_set *set = tr_plan_page_sets(plan);

    for (int i = 0; i < plan->n_opens; i++) {
        if (open[i].slot < 0 || open[i].slot >= slots->n_slots)
            return tr_cpu_fail(d, TR_E_DEVICE, "plan %ju opens slot %d of %d",
                               (uintmax_t)plan->step, open[i].slot, slots->n_slots);
        slots->sampling[open[i].slot] = open[i];
        slots->length[open[i].slot] = 0;
    }
    for (int i = 0; i < plan->n_page_sets; i++) {
        if (set[i].slot < 0 || set[i].slot >= slots->n_slots || set[i].i_page < 0 ||
            set[i].i_page >= slots->max_pages)
            return tr_cpu_fail(d, TR_E_DEVICE, "plan %ju sets page %d of slot %d",
                               (uintmax_t)plan->step, set[i].i_page, set[i].slot);
        slots->page_table[(size_t)set[i].slot * (size_t)slots->max_pages + (size_t)set[i].i_page] =
            set[i].page;
    }
    return TR_OK;
}

static tr_status bad_span(tr_device *d, const tr_plan *plan, int i, const char *why)
{
    return tr_cpu_fail(d, TR_E_DEVICE, "plan %ju, span %d: %s", (uintmax_t)plan->step, i, why);
}

/* Span i: its rows from row n on, its head rows from head row n_head on. */
static tr_status span_rows(tr_device *d, const struct tr_plan_apply_args *a, int i, int n,
                           int n_head)
{
    const tr_span s = tr_plan_spans(a->plan)[i];
    const tr_rows *rows = &a->rows;
    const tr_slots *slots = &a->slots;

    if (s.slot < 0 || s.slot >= slots->n_slots) return bad_span(d, a->plan, i, "no such slot");
    const int part = (s.flags & TR_SPAN_PART) != 0, stride = part ? 1 + s.skip : 1;
    if (s.n_rows < 0 || s.n_rows > rows->n_max - n) return bad_span(d, a->plan, i, "too many rows");
    if (stride < 1 || (part && (s.begin < 0 || s.end < s.begin || s.position < s.begin)))
        return bad_span(d, a->plan, i, "a part that is none");
    if (s.n_logits < 0 || s.n_logits > s.n_rows || s.n_logits > rows->n_head_max - n_head)
        return bad_span(d, a->plan, i, "too many head rows");
    const int64_t reach = s.n_rows ? (int64_t)(s.n_rows - 1) * stride + 1 : 0; /* first to last */
    if (s.i_token < 0 ? s.n_rows > 1 : s.i_token + reach > a->plan->n_tokens)
        return bad_span(d, a->plan, i, "more rows than tokens");

    int position = s.position;
    if (position < 0) position = slots->length[s.slot] - (a->rows_only ? s.n_rows : 0);
    if (position < 0) return bad_span(d, a->plan, i, "rows before the slot's first");
    if (position + reach > (int64_t)slots->max_pages * TR_PAGE_TOKENS)
        return bad_span(d, a->plan, i, "positions past the slot's page table");
    const int begin = part ? s.begin : position;

    const int32_t *pages = slots->page_table + (size_t)s.slot * (size_t)slots->max_pages;
    const int32_t *token =
        s.i_token >= 0 ? tr_plan_tokens(a->plan) + s.i_token : slots->last_token + s.slot;
    for (int r = 0; r < s.n_rows; r++, n++, position += stride) {
        int64_t page = pages[position / TR_PAGE_TOKENS];
        if (page < 0) return bad_span(d, a->plan, i, "a position without a page");
        rows->token[n] = token[r * stride];
        rows->slot[n] = s.slot;
        rows->position[n] = position;
        rows->begin[n] = begin;
        rows->write[n] = page * TR_PAGE_TOKENS + position % TR_PAGE_TOKENS;
        rows->dense[n] = (s.flags & TR_SPAN_DENSE) && position < a->n_dense;
        if (r < s.n_rows - s.n_logits) continue;
        rows->head_row[n_head] = n;
        rows->target[n_head] = tr_plan_targets(a->plan)[n_head];
        n_head++;
    }
    if (!a->rows_only) slots->length[s.slot] = part ? s.end : position;
    return TR_OK;
}

tr_status tr_cpu_plan_apply(tr_device *d, tr_lane lane, const struct tr_plan_apply_args *a)
{
    const tr_span *span = tr_plan_spans(a->plan);
    int n = 0, n_head = 0;
    (void)lane;

    *a->rows.n = 0;
    *a->rows.n_head = 0;
    tr_status st = a->rows_only ? TR_OK : open_slots(d, a);
    for (int i = 0; st == TR_OK && i < a->plan->n_spans; i++) {
        if (span[i].n_logits > a->plan->n_targets - n_head)
            return bad_span(d, a->plan, i, "more head rows than targets");
        st = span_rows(d, a, i, n, n_head);
        n += span[i].n_rows;
        n_head += span[i].n_logits;
    }
    if (st != TR_OK) return st;
    *a->rows.n = n;
    *a->rows.n_head = n_head;
    return TR_OK;
}

/* Rows [0, n_rows) of latents are one run of bytes; an index page has the keys of its rows, then
 * all scales. */
static void copy_page(const tr_kv_layer *kv, const tr_page_copy *c)
{
    const size_t row = tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope);
    const size_t page = tr_index_page_bytes(kv->dtype, kv->d_index);
    const size_t key = (size_t)kv->d_index * (kv->dtype == TR_F32 ? sizeof(float) : 1);
    const size_t n = (size_t)c->n_rows;

    memcpy((char *)kv->latent + (size_t)c->to * TR_PAGE_TOKENS * row,
           (char *)kv->latent + (size_t)c->from * TR_PAGE_TOKENS * row, n * row);
    if (!kv->index) return;
    char *to = (char *)kv->index + (size_t)c->to * page;
    const char *from = (char *)kv->index + (size_t)c->from * page;
    memcpy(to, from, n * key);
    if (kv->dtype != TR_F32)
        memcpy(to + TR_PAGE_TOKENS * key, from + TR_PAGE_TOKENS * key, n * sizeof(float));
}

tr_status tr_cpu_pages_copy(tr_device *d, tr_lane lane, const struct tr_pages_copy_args *a)
{
    const tr_page_copy *c = tr_plan_copies(a->plan);
    (void)lane;
    for (int i = 0; i < a->plan->n_copies; i++) {
        if (c[i].from < 0 || c[i].from >= a->kv.n_pages || c[i].to < 0 ||
            c[i].to >= a->kv.n_pages || c[i].from == c[i].to || c[i].n_rows < 0 ||
            c[i].n_rows > TR_PAGE_TOKENS)
            return tr_cpu_fail(d, TR_E_DEVICE, "plan %ju copies %d rows of page %d to %d of %d",
                               (uintmax_t)a->plan->step, c[i].n_rows, c[i].from, c[i].to,
                               a->kv.n_pages);
        copy_page(&a->kv, &c[i]);
    }
    return TR_OK;
}
