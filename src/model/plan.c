#include <config.h>

#include "model/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"

enum { SPANS, TOKENS, PAGE_SETS, COPIES, OPENS, TARGETS, CHANGES, N_SECTIONS };

enum {
    PAGE_ROWS = 64,     /* TR_PAGE_TOKENS of kernels.h, which this file does not need otherwise */
    MOST_LOGPROBS = 20, /* TR_MAX_LOGPROBS */
    CHANGES_PER_SLOT = 1024, /* beside one whole vocabulary */
    MOST_SLOTS = 1 << 16,
};

static const size_t section_size[N_SECTIONS] = {
    sizeof(tr_span),      sizeof(int32_t), sizeof(tr_page_set),     sizeof(tr_page_copy),
    sizeof(tr_slot_open), sizeof(int32_t), sizeof(tr_logit_change),
};
static const char *const section_name[N_SECTIONS] = {
    "spans", "tokens", "page sets", "page copies", "slot openings", "targets", "logit changes",
};

struct tr_plan_builder {
    tr_plan_limits limits;
    size_t n_max[N_SECTIONS];
    size_t n[N_SECTIONS];
    char *data[N_SECTIONS];
    tr_plan *block;
    uint64_t step;
    uint32_t flags;
    int n_rows, n_head_rows;
};

static size_t align8(size_t n)
{
    return (n + 7) / 8 * 8;
}

int tr_plan_changes_max(const tr_plan_limits *l)
{
    int per_slot = l->n_vocab < CHANGES_PER_SLOT ? l->n_vocab : CHANGES_PER_SLOT;

    return l->n_vocab + l->n_slots * per_slot;
}

/* Entries of each section at most; false: limits that no plan can have. */
static bool section_limits(const tr_plan_limits *l, size_t n_max[N_SECTIONS])
{
    int n_sets, n_changes;

    if (l->n_slots < 1 || l->n_slots > MOST_SLOTS || l->n_pages < 1 || l->max_pages < 1 ||
        l->max_pages > INT32_MAX / PAGE_ROWS || l->n_rows_max < 1 || l->n_head_max < 1 ||
        l->n_vocab < 1 || l->index_topk < 0)
        return false;
    if (__builtin_mul_overflow(l->n_slots, l->max_pages, &n_sets) ||
        __builtin_mul_overflow(l->n_slots, CHANGES_PER_SLOT, &n_changes) ||
        __builtin_add_overflow(n_changes, l->n_vocab, &n_changes))
        return false;
    n_max[SPANS] = n_max[COPIES] = n_max[OPENS] = (size_t)l->n_slots; /* one of each per slot */
    n_max[TOKENS] = (size_t)l->n_rows_max;
    n_max[PAGE_SETS] = (size_t)n_sets;
    n_max[TARGETS] = (size_t)l->n_head_max;
    n_max[CHANGES] = (size_t)tr_plan_changes_max(l);
    return true;
}

size_t tr_plan_bytes_max(const tr_plan_limits *limits)
{
    size_t n_max[N_SECTIONS], bytes = align8(sizeof(tr_plan));

    if (!section_limits(limits, n_max)) return 0;
    for (int i = 0; i < N_SECTIONS; i++) /* below 2^31 entries of 48 bytes each: no wrap */
        bytes += align8(n_max[i] * section_size[i]);
    return bytes <= UINT32_MAX ? bytes : 0;
}

/* ---- building ------------------------------------------------------------------------------- */

tr_plan_builder *tr_plan_builder_create(const tr_plan_limits *limits)
{
    size_t bytes = tr_plan_bytes_max(limits);
    tr_plan_builder *b = bytes ? calloc(1, sizeof *b) : NULL;
    if (!b) return NULL;
    b->limits = *limits;
    bool ok = section_limits(limits, b->n_max);
    for (int i = 0; i < N_SECTIONS && ok; i++) {
        b->data[i] = malloc(b->n_max[i] * section_size[i]);
        ok = b->data[i] != NULL;
    }
    if (ok) b->block = malloc(bytes);
    if (!b->block) {
        tr_plan_builder_free(b);
        return NULL;
    }
    return b;
}

void tr_plan_builder_free(tr_plan_builder *b)
{
    if (!b) return;
    for (int i = 0; i < N_SECTIONS; i++)
        free(b->data[i]);
    free(b->block);
    free(b);
}

void tr_plan_begin(tr_plan_builder *b, uint64_t step, uint32_t flags)
{
    memset(b->n, 0, sizeof b->n);
    b->step = step;
    b->flags = flags & (TR_PLAN_STOP | TR_PLAN_IDLE | TR_PLAN_PROFILE | TR_PLAN_AFTER_TOKENS |
                        TR_PLAN_HAS_SCORES | TR_PLAN_GREEDY);
    b->n_rows = b->n_head_rows = 0;
}

static int append(tr_plan_builder *b, int section, const void *entries, int n)
{
    size_t at = b->n[section];

    if (n < 0 || (size_t)n > b->n_max[section] - at) return -1;
    if (n)
        memcpy(b->data[section] + at * section_size[section], entries,
               (size_t)n * section_size[section]);
    b->n[section] = at + (size_t)n;
    return (int)at;
}

int tr_plan_add_tokens(tr_plan_builder *b, const int32_t *tokens, int n_tokens)
{
    return append(b, TOKENS, tokens, n_tokens);
}

int tr_plan_add_span(tr_plan_builder *b, tr_span span)
{
    if (span.n_rows < 1 || span.n_rows > b->limits.n_rows_max - b->n_rows || span.n_logits < 0 ||
        span.n_logits > b->limits.n_head_max - b->n_head_rows)
        return -1;
    int at = append(b, SPANS, &span, 1);
    if (at >= 0) {
        b->n_rows += span.n_rows;
        b->n_head_rows += span.n_logits;
    }
    return at;
}

int tr_plan_add_decode(tr_plan_builder *b, int slot)
{
    const int32_t sample = -1;
    const tr_span span = {.slot = slot,
                          .n_rows = 1,
                          .position = -1,
                          .i_token = -1,
                          .kind = TR_SPAN_DECODE,
                          .owner = -1,
                          .n_logits = 1};
    const int at = tr_plan_add_span(b, span);
    return at >= 0 && tr_plan_add_targets(b, &sample, 1) < 0 ? -1 : at;
}

int tr_plan_add_page(tr_plan_builder *b, tr_page_set set)
{
    return append(b, PAGE_SETS, &set, 1);
}

int tr_plan_add_copy(tr_plan_builder *b, tr_page_copy copy)
{
    return append(b, COPIES, &copy, 1);
}

int tr_plan_add_open(tr_plan_builder *b, tr_slot_open open)
{
    return append(b, OPENS, &open, 1);
}

int tr_plan_add_targets(tr_plan_builder *b, const int32_t *targets, int n)
{
    return append(b, TARGETS, targets, n);
}

int tr_plan_add_change(tr_plan_builder *b, tr_logit_change change)
{
    return append(b, CHANGES, &change, 1);
}

/* What the spans say about the kernels a step needs. Dense rows end below index_topk, so a context beyond it is an absorbed
 * row's: max_context alone decides about selection. A prompt's chunk may have rows of both forms. */
static uint32_t has_flags(const tr_span *span, int n_spans, int max_context, int index_topk)
{
    uint32_t flags = 0;

    for (int i = 0; i < n_spans; i++) {
        const bool dense = span[i].flags & TR_SPAN_DENSE;
        if (dense) flags |= TR_PLAN_HAS_DENSE;
        if (!dense || (int64_t)span[i].position + span[i].n_rows > index_topk)
            flags |= TR_PLAN_HAS_ABSORBED;
    }
    if ((flags & TR_PLAN_HAS_ABSORBED) && max_context > index_topk) flags |= TR_PLAN_HAS_SELECTION;
    return flags;
}

const tr_plan *tr_plan_seal(tr_plan_builder *b, int max_context)
{
    uint32_t at[N_SECTIONS];
    size_t bytes = align8(sizeof(tr_plan));
    char *block = (char *)b->block;

    memset(block, 0, bytes);
    for (int i = 0; i < N_SECTIONS; i++) {
        size_t used = b->n[i] * section_size[i], padded = align8(used);
        at[i] = (uint32_t)bytes;
        memcpy(block + bytes, b->data[i], used);
        memset(block + bytes + used, 0, padded - used);
        bytes += padded;
    }
    *b->block = (tr_plan){
        .magic = TR_PLAN_MAGIC,
        .version = TR_PLAN_VERSION,
        .bytes = (uint32_t)bytes,
        .flags = b->flags | has_flags((const tr_span *)(const void *)b->data[SPANS],
                                      (int)b->n[SPANS], max_context, b->limits.index_topk),
        .step = b->step,
        .n_rows = b->n_rows,
        .n_head_rows = b->n_head_rows,
        .max_context = max_context,
        .n_spans = (int32_t)b->n[SPANS],
        .n_tokens = (int32_t)b->n[TOKENS],
        .n_page_sets = (int32_t)b->n[PAGE_SETS],
        .n_copies = (int32_t)b->n[COPIES],
        .n_opens = (int32_t)b->n[OPENS],
        .n_targets = (int32_t)b->n[TARGETS],
        .n_changes = (int32_t)b->n[CHANGES],
        .at_spans = at[SPANS],
        .at_tokens = at[TOKENS],
        .at_page_sets = at[PAGE_SETS],
        .at_copies = at[COPIES],
        .at_opens = at[OPENS],
        .at_targets = at[TARGETS],
        .at_changes = at[CHANGES],
    };
    return b->block;
}

size_t tr_plan_idle(void *block)
{
    const uint32_t end = sizeof(tr_plan);

    *(tr_plan *)block = (tr_plan){.magic = TR_PLAN_MAGIC,
                                  .version = TR_PLAN_VERSION,
                                  .bytes = end,
                                  .flags = TR_PLAN_IDLE,
                                  .at_spans = end,
                                  .at_tokens = end,
                                  .at_page_sets = end,
                                  .at_copies = end,
                                  .at_opens = end,
                                  .at_targets = end,
                                  .at_changes = end};
    return end;
}

/* ---- checking ------------------------------------------------------------------------------- */

#define REFUSE(...) tr_fail(err, TR_E_INPUT, "plan: " __VA_ARGS__)

static bool within(int64_t value, int64_t low, int64_t high) /* [low, high) */
{
    return value >= low && value < high;
}

/* The block holds what its header says: after this every section may be read. */
static tr_status check_header(const tr_plan *p, size_t bytes, const tr_plan_limits *l, tr_err *err)
{
    size_t n_max[N_SECTIONS];

    if (!section_limits(l, n_max)) return REFUSE("impossible limits");
    if (bytes < sizeof *p || (uintptr_t)p % 8)
        return REFUSE("no room for a header in %zu bytes", bytes);
    if (p->magic != TR_PLAN_MAGIC || p->version != TR_PLAN_VERSION)
        return REFUSE("magic %08x version %u, expected %08x and %d", (unsigned)p->magic,
                      (unsigned)p->version, (unsigned)TR_PLAN_MAGIC, TR_PLAN_VERSION);
    if (p->bytes != bytes)
        return REFUSE("%u bytes announced, %zu there", (unsigned)p->bytes, bytes);
    if (p->ring || p->pad || p->pad2 || p->pad3 || p->layout || p->bucket || p->tier)
        return REFUSE("a reserved field of the header is not 0");

    const int32_t n[N_SECTIONS] = {p->n_spans, p->n_tokens,  p->n_page_sets, p->n_copies,
                                   p->n_opens, p->n_targets, p->n_changes};
    const uint32_t at[N_SECTIONS] = {p->at_spans, p->at_tokens,  p->at_page_sets, p->at_copies,
                                     p->at_opens, p->at_targets, p->at_changes};
    for (int i = 0; i < N_SECTIONS; i++) {
        if (n[i] < 0 || (size_t)n[i] > n_max[i])
            return REFUSE("%d %s, at most %zu fit", (int)n[i], section_name[i], n_max[i]);
        if (at[i] % 8 || at[i] < sizeof *p || at[i] > bytes ||
            (size_t)n[i] > (bytes - at[i]) / section_size[i])
            return REFUSE("%d %s at byte %u of %zu", (int)n[i], section_name[i], (unsigned)at[i],
                          bytes);
    }
    return TR_OK;
}

static tr_status check_span(const tr_plan *p, int i, const tr_plan_limits *l, tr_err *err)
{
    const tr_span *s = &tr_plan_spans(p)[i];

    if (s->kind != TR_SPAN_PREFILL && s->kind != TR_SPAN_DECODE)
        return REFUSE("span %d: kind %d is not known", i, s->kind);
    if (s->owner != -1 && s->owner != 0) return REFUSE("span %d: owner %d", i, s->owner);
    if (s->skip || s->begin || s->end || (s->flags & ~(uint32_t)TR_SPAN_DENSE))
        return REFUSE("span %d: flags %x", i, (unsigned)s->flags);
    if (!within(s->slot, 0, l->n_slots)) return REFUSE("span %d: slot %d", i, (int)s->slot);
    if (!within(s->n_rows, 1, (int64_t)l->n_rows_max + 1))
        return REFUSE("span %d: %d rows", i, (int)s->n_rows);
    if (s->position < -1 || (int64_t)s->position + s->n_rows > (int64_t)l->max_pages * PAGE_ROWS)
        return REFUSE("span %d: %d rows at position %d", i, (int)s->n_rows, (int)s->position);
    if (s->i_token == -1 ? s->n_rows != 1 || s->kind == TR_SPAN_PREFILL
                         : !within(s->i_token, 0, (int64_t)p->n_tokens - s->n_rows + 1))
        return REFUSE("span %d: %d rows of token %d of %d", i, (int)s->n_rows, (int)s->i_token,
                      (int)p->n_tokens);
    if ((s->flags & TR_SPAN_DENSE) && !within(s->position, 0, l->index_topk))
        return REFUSE("span %d: dense rows from position %d on, index_topk %d", i, (int)s->position,
                      l->index_topk);
    if (!within(s->n_logits, 0, (int64_t)s->n_rows + 1))
        return REFUSE("span %d: %d logits of %d rows", i, (int)s->n_logits, (int)s->n_rows);
    return TR_OK;
}

/* A slot must not come twice among n entries; slot i lies at first + i * stride. A bit per slot, windows of 4096 slots. */
static bool slots_differ(const void *first, size_t stride, int n, int n_slots)
{
    uint64_t seen[64];

    for (int base = 0; base < n_slots; base += 4096) {
        memset(seen, 0, sizeof seen);
        for (int i = 0; i < n; i++) {
            int32_t slot;
            memcpy(&slot, (const char *)first + (size_t)i * stride, sizeof slot);
            if (!within(slot, base, (int64_t)base + 4096)) continue;
            uint64_t bit = UINT64_C(1) << (slot % 64);
            if (seen[(slot - base) / 64] & bit) return false;
            seen[(slot - base) / 64] |= bit;
        }
    }
    return true;
}

static tr_status check_spans(const tr_plan *p, const tr_plan_limits *l, tr_err *err)
{
    const tr_span *span = tr_plan_spans(p);
    int64_t n_rows = 0, n_logits = 0;
    int context = 0;
    bool unknown = false;

    for (int i = 0; i < p->n_spans; i++) {
        tr_status st = check_span(p, i, l, err);
        if (st) return st;
        n_rows += span[i].n_rows;
        n_logits += span[i].n_logits;
        if (span[i].position < 0)
            unknown = true;
        else if (span[i].position + span[i].n_rows > context)
            context = span[i].position + span[i].n_rows;
    }
    if (p->n_spans && !slots_differ(&span->slot, sizeof *span, p->n_spans, l->n_slots))
        return REFUSE("two spans of one slot");
    if (n_rows != p->n_rows || n_rows > l->n_rows_max)
        return REFUSE("%d rows announced, %lld there, at most %d", (int)p->n_rows,
                      (long long)n_rows, l->n_rows_max);
    if (n_logits != p->n_head_rows || n_logits > l->n_head_max || p->n_targets != n_logits)
        return REFUSE("%d head rows announced, %lld there, %d targets, at most %d",
                      (int)p->n_head_rows, (long long)n_logits, (int)p->n_targets, l->n_head_max);
    if (unknown ? p->max_context < context || p->max_context < 1 ||
                      p->max_context > l->max_pages * PAGE_ROWS
                : p->max_context != context)
        return REFUSE("largest context %d announced, %d there", (int)p->max_context, context);

    const uint32_t given = TR_PLAN_STOP | TR_PLAN_IDLE | TR_PLAN_PROFILE | TR_PLAN_AFTER_TOKENS |
                           TR_PLAN_HAS_SCORES | TR_PLAN_GREEDY;
    if ((p->flags & ~given) != has_flags(span, p->n_spans, p->max_context, l->index_topk))
        return REFUSE("flags %x do not match the spans", (unsigned)p->flags);
    if (((p->flags & (TR_PLAN_STOP | TR_PLAN_IDLE)) != 0) != (p->n_spans == 0))
        return REFUSE("flags %x with %d spans", (unsigned)p->flags, (int)p->n_spans);
    return TR_OK;
}

static tr_status check_ids(const int32_t *id, int n, int low, int n_vocab, const char *what,
                           tr_err *err)
{
    for (int i = 0; i < n; i++)
        if (!within(id[i], low, n_vocab))
            return REFUSE("%s %d: id %d of %d", what, i, (int)id[i], n_vocab);
    return TR_OK;
}

static tr_status check_pages(const tr_plan *p, const tr_plan_limits *l, tr_err *err)
{
    const tr_page_set *set = tr_plan_page_sets(p);
    const tr_page_copy *copy = tr_plan_copies(p);

    for (int i = 0; i < p->n_page_sets; i++)
        if (!within(set[i].slot, 0, l->n_slots) || !within(set[i].i_page, 0, l->max_pages) ||
            !within(set[i].page, 0, l->n_pages))
            return REFUSE("page set %d: slot %d, entry %d, page %d", i, (int)set[i].slot,
                          (int)set[i].i_page, (int)set[i].page);
    for (int i = 0; i < p->n_copies; i++) {
        if (!within(copy[i].from, 0, l->n_pages) || !within(copy[i].to, 0, l->n_pages) ||
            copy[i].from == copy[i].to || !within(copy[i].n_rows, 1, PAGE_ROWS))
            return REFUSE("page copy %d: %d rows of page %d to page %d", i, (int)copy[i].n_rows,
                          (int)copy[i].from, (int)copy[i].to);
        for (int j = 0; j < i; j++) /* copies run in any order: few, so every pair is looked at */
            if (copy[j].to == copy[i].to || copy[j].to == copy[i].from ||
                copy[j].from == copy[i].to)
                return REFUSE("page copies %d and %d meet in one page", j, i);
    }
    return TR_OK;
}

static tr_status check_opens(const tr_plan *p, const tr_plan_limits *l, tr_err *err)
{
    const tr_slot_open *open = tr_plan_opens(p);

    for (int i = 0; i < p->n_opens; i++) {
        const tr_slot_open *o = &open[i];
        if (!within(o->slot, 0, l->n_slots) || o->flags)
            return REFUSE("slot opening %d: slot %d, flags %x", i, (int)o->slot,
                          (unsigned)o->flags);
        if (!within(o->n_logprobs, -1, MOST_LOGPROBS + 1) ||
            !within(o->n_prompt_logprobs, -1, MOST_LOGPROBS + 1))
            return REFUSE("slot opening %d: %d and %d log-probabilities", i, (int)o->n_logprobs,
                          (int)o->n_prompt_logprobs);
        /* Negated, so that a NaN is refused too. */
        if (!(o->temperature >= 0 && isfinite(o->temperature) && o->top_p >= 0 && o->top_p <= 1 &&
              o->min_p >= 0 && o->min_p <= 1))
            return REFUSE("slot opening %d: temperature %g, top_p %g, min_p %g", i,
                          (double)o->temperature, (double)o->top_p, (double)o->min_p);
    }
    if (p->n_opens && !slots_differ(&open->slot, sizeof *open, p->n_opens, l->n_slots))
        return REFUSE("one slot opened twice");
    return TR_OK;
}

static tr_status check_changes(const tr_plan *p, const tr_plan_limits *l, tr_err *err)
{
    const tr_logit_change *change = tr_plan_changes(p);
    const int32_t *target = tr_plan_targets(p);

    for (int i = 0; i < p->n_changes; i++) {
        const tr_logit_change *c = &change[i];
        if (!within(c->head_row, 0, p->n_head_rows) || !within(c->token, 0, l->n_vocab) || c->pad)
            return REFUSE("logit change %d: head row %d, token %d", i, (int)c->head_row,
                          (int)c->token);
        if (target[c->head_row] != -1)
            return REFUSE("logit change %d: head row %d is not sampled", i, (int)c->head_row);
        if (!(isfinite(c->bias) || (isinf(c->bias) && c->bias < 0)) || !isfinite(c->repetition) ||
            !(c->repetition > 0) || !isfinite(c->penalty))
            return REFUSE("logit change %d: bias %g, repetition %g, penalty %g", i, (double)c->bias,
                          (double)c->repetition, (double)c->penalty);
        if (i && (c->head_row < c[-1].head_row ||
                  (c->head_row == c[-1].head_row && c->token <= c[-1].token)))
            return REFUSE("logit change %d is out of order", i);
    }
    return TR_OK;
}

tr_status tr_plan_check(const tr_plan *p, size_t bytes, const tr_plan_limits *l, tr_err *err)
{
    tr_status st = check_header(p, bytes, l, err);

    if (!st) st = check_spans(p, l, err);
    if (!st) st = check_ids(tr_plan_tokens(p), p->n_tokens, 0, l->n_vocab, "token", err);
    if (!st) st = check_ids(tr_plan_targets(p), p->n_targets, -1, l->n_vocab, "target", err);
    if (!st) st = check_pages(p, l, err);
    if (!st) st = check_opens(p, l, err);
    if (!st) st = check_changes(p, l, err);
    return st;
}

tr_phase tr_plan_phase(const tr_plan *plan)
{
    static const tr_phase phase[] = {
        [TR_SPAN_PREFILL] = TR_PHASE_PREFILL,
        [TR_SPAN_DECODE] = TR_PHASE_DECODE,
        [TR_SPAN_VERIFY] = TR_PHASE_VERIFY,
        [TR_SPAN_DRAFT] = TR_PHASE_DRAFT,
    };
    bool has[TR_N_PHASES] = {false};

    for (int i = 0; i < plan->n_spans; i++) {
        const int kind = tr_plan_spans(plan)[i].kind;
        if (kind >= 0 && kind <= TR_SPAN_DRAFT) has[phase[kind]] = true;
    }
    if (has[TR_PHASE_PREFILL]) return TR_PHASE_PREFILL;
    if (has[TR_PHASE_VERIFY]) return TR_PHASE_VERIFY;
    if (has[TR_PHASE_DRAFT]) return TR_PHASE_DRAFT;
    return has[TR_PHASE_DECODE] ? TR_PHASE_DECODE : TR_PHASE_IDLE;
}
