#include <config.h>

#include "model/part.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"

enum { PAGE_ROWS = 64 }; /* TR_PAGE_TOKENS of kernels.h */

struct tr_part {
    tr_cp_mode mode;
    int member, n_members;
    bool is_split;
    tr_layout_span *span;   /* [n_slots] */
    tr_layout_query *query; /* [n_slots] */
    tr_plan *rows, *head;   /* [tr_part_bytes_max] */
    int *written;           /* [n_members] */
    int64_t *write;         /* [n_rows_max] */
    int *heads;             /* [n_members] */
    int32_t *head_index;    /* [n_head_max] */
};

/* A span may become two (zigzag), and none of its other sections grows. */
size_t tr_part_bytes_max(const tr_plan_limits *limits)
{
    const size_t whole = tr_plan_bytes_max(limits);
    return whole ? whole + (size_t)limits->n_slots * sizeof(tr_span) : 0;
}

tr_part *tr_part_create(const tr_plan_limits *limits, tr_cp_mode mode, int member, int n_members)
{
    const size_t n_slots = (size_t)limits->n_slots, bytes = tr_part_bytes_max(limits);
    tr_part *p = bytes ? calloc(1, sizeof *p) : NULL;
    if (!p) return NULL;
    p->mode = mode;
    p->member = member;
    p->n_members = n_members;
    p->span = tr_calloc(n_slots, sizeof *p->span);
    p->query = tr_calloc(n_slots, sizeof *p->query);
    p->rows = malloc(bytes);
    p->head = malloc(bytes);
    p->written = tr_calloc((size_t)n_members, sizeof *p->written);
    p->write = tr_calloc((size_t)limits->n_rows_max, sizeof *p->write);
    p->heads = tr_calloc((size_t)n_members, sizeof *p->heads);
    p->head_index = tr_calloc((size_t)limits->n_head_max, sizeof *p->head_index);
    if (p->span && p->query && p->rows && p->head && p->written && p->write && p->heads &&
        p->head_index)
        return p;
    tr_part_free(p);
    return NULL;
}

void tr_part_free(tr_part *p)
{
    if (!p) return;
    free(p->span);
    free(p->query);
    free(p->rows);
    free(p->head);
    free(p->written);
    free(p->write);
    free(p->heads);
    free(p->head_index);
    free(p);
}

/* ---- spans ---------------------------------------------------------------------------------- */

typedef struct run { /* rows x, x + stride, .. of a span: n of them */
    int x, n, stride;
} run;

/* What a member computes of a span as one run or two; how many. */
static int runs_of(const tr_layout_query *q, run out[2])
{
    out[0] = (run){q->x_first, q->n_first, q->stride};
    out[1] = (run){q->x_second, q->n - q->n_first, q->stride};
    return q->n > q->n_first ? 2 : 1;
}

/* Rows of a run that are among the span's last n_logits: the run's last ones too. */
static int heads_of(const tr_span *s, run r)
{
    const int first = s->n_rows - s->n_logits; /* rows from here on */
    int n = 0;

    while (n < r.n && r.x + (r.n - 1 - n) * r.stride >= first)
        n++;
    return n;
}

/* A run as a span of its own. */
static tr_span part_of(const tr_span *s, run r)
{
    tr_span part = *s;

    part.n_rows = r.n;
    part.position = s->position + r.x;
    part.i_token = s->i_token + r.x;
    part.n_logits = heads_of(s, r);
    part.flags |= TR_SPAN_PART;
    part.skip = r.stride - 1;
    part.begin = s->position;
    part.end = s->position + s->n_rows;
    return part;
}

static bool is_split(const tr_part *p, const tr_layout *l, int i)
{
    return l->split && !p->span[i].decode;
}

/* ---- blocks --------------------------------------------------------------------------------- */

typedef struct section {
    const void *data;
    size_t bytes;
    uint32_t *at;
} section;

/* A block whose sections come from elsewhere; its header is complete but for sizes and places. */
static void seal(tr_plan *block, section *s, int n_sections)
{
    size_t bytes = sizeof *block;

    for (int i = 0; i < n_sections; i++) {
        const size_t padded = (s[i].bytes + 7) / 8 * 8;
        *s[i].at = (uint32_t)bytes;
        if (s[i].data && s[i].bytes) memmove((char *)block + bytes, s[i].data, s[i].bytes);
        bytes += padded;
    }
    block->bytes = (uint32_t)bytes;
}

/* The rows of the network: this member's parts of the split spans, all of the others. */
static void make_rows(tr_part *p, const tr_plan *plan, const tr_layout *l)
{
    const tr_span *span = tr_plan_spans(plan);
    tr_plan *b = p->rows;
    tr_span *out = (tr_span *)(void *)(b + 1); /* the first section */
    const tr_layout_query *q = p->query, *q_end = q + tr_layout_queries(l, p->member, p->query);
    int n = 0;

    *b = *plan;
    b->n_rows = b->n_head_rows = 0;
    for (int i = 0; i < plan->n_spans; i++) {
        const int first = n;
        run r[2] = {{.stride = 1}};
        while (q < q_end && q->span < i) /* rows that everybody computes are among the queries */
            q++;
        if (!is_split(p, l, i)) {
            out[n] = span[i];
            if (p->member != 0) out[n].n_logits = 0; /* member 0's, though all compute them */
            n++;
        } else {
            const bool some = q < q_end && q->span == i;
            const int n_runs =
                some ? runs_of(q, r) : 1; /* none: the slot's length must grow all the same */
            for (int j = 0; j < n_runs; j++)
                out[n++] = part_of(&span[i], r[j]);
        }
        for (int j = first; j < n; j++) {
            b->n_rows += out[j].n_rows;
            b->n_head_rows += out[j].n_logits;
        }
    }
    b->n_spans = n;
    b->n_targets = b->n_head_rows;
    b->n_changes = 0;
    section s[] = {
        {out, (size_t)n * sizeof *out, &b->at_spans},
        {tr_plan_tokens(plan), (size_t)plan->n_tokens * 4, &b->at_tokens},
        {tr_plan_page_sets(plan), (size_t)plan->n_page_sets * sizeof(tr_page_set),
         &b->at_page_sets},
        {tr_plan_copies(plan), (size_t)plan->n_copies * sizeof(tr_page_copy), &b->at_copies},
        {tr_plan_opens(plan), (size_t)plan->n_opens * sizeof(tr_slot_open), &b->at_opens},
        {NULL, (size_t)b->n_targets * 4, &b->at_targets},
        {NULL, 0, &b->at_changes}};
    seal(b, s, sizeof s / sizeof *s);
    memset((char *)b + b->at_targets, 0xff, (size_t)b->n_targets * 4); /* -1: nobody samples here */
}

/* The head rows of the whole plan, each a row. */
static void make_head(tr_part *p, const tr_plan *plan)
{
    const tr_span *span = tr_plan_spans(plan);
    tr_plan *b = p->head;
    tr_span *out = (tr_span *)(void *)(b + 1);
    int n = 0;

    *b = *plan;
    b->n_rows = plan->n_head_rows;
    for (int i = 0; i < plan->n_spans; i++) {
        const int before = span[i].n_rows - span[i].n_logits;
        if (!span[i].n_logits) continue;
        out[n] = span[i];
        out[n].n_rows = span[i].n_logits;
        if (span[i].position >= 0) out[n].position += before;
        if (span[i].i_token >= 0) out[n].i_token += before;
        n++;
    }
    b->n_spans = n;
    b->n_page_sets = b->n_copies = b->n_opens = 0;
    section s[] = {
        {out, (size_t)n * sizeof *out, &b->at_spans},
        {tr_plan_tokens(plan), (size_t)plan->n_tokens * 4, &b->at_tokens},
        {NULL, 0, &b->at_page_sets},
        {NULL, 0, &b->at_copies},
        {NULL, 0, &b->at_opens},
        {tr_plan_targets(plan), (size_t)plan->n_targets * 4, &b->at_targets},
        {tr_plan_changes(plan), (size_t)plan->n_changes * sizeof(tr_logit_change), &b->at_changes}};
    seal(b, s, sizeof s / sizeof *s);
}

/* ---- what the members have ------------------------------------------------------------------ */

typedef struct walk { /* over one member's runs, spans in order */
    int64_t *write;   /* the next cache row */
    int32_t n_heads;  /* head rows so far, of all members */
} walk;

static void walk_run(const tr_part *p, const tr_span *s, run r, int first_head,
                     const int32_t *pages, walk *w)
{
    const int first = s->n_rows - s->n_logits;

    for (int j = 0; j < r.n; j++) {
        const int x = r.x + j * r.stride, position = s->position + x;
        *w->write++ = (int64_t)pages[position / PAGE_ROWS] * PAGE_ROWS + position % PAGE_ROWS;
        if (x >= first) p->head_index[first_head + x - first] = w->n_heads++;
    }
}

static void walk_member(tr_part *p, const tr_plan *plan, const tr_layout *l, int member,
                        const int32_t *page_table, int max_pages, walk *w)
{
    const tr_span *span = tr_plan_spans(plan);
    const tr_layout_query *q = p->query, *q_end = q + tr_layout_queries(l, member, p->query);
    int first_head = 0;

    for (int i = 0; i < plan->n_spans; first_head += span[i++].n_logits) {
        run r[2];
        while (q < q_end && q->span < i)
            q++;
        if (!is_split(p, l, i)) {
            for (int h = 0; h < span[i].n_logits && member == 0; h++)
                p->head_index[first_head + h] = w->n_heads++;
            continue;
        }
        if (q == q_end || q->span != i) continue;
        const int n_runs = runs_of(q, r);
        for (int j = 0; j < n_runs; j++)
            walk_run(p, &span[i], r[j], first_head,
                     page_table + (size_t)span[i].slot * (size_t)max_pages, w);
    }
}

void tr_part_make(tr_part *p, const tr_plan *plan, const int32_t *page_table, int max_pages)
{
    const tr_span *span = tr_plan_spans(plan);
    walk w = {.write = p->write};
    tr_layout l;

    for (int i = 0; i < plan->n_spans; i++)
        p->span[i] = (tr_layout_span){
            .n = span[i].n_rows,
            .decode = span[i].kind != TR_SPAN_PREFILL || span[i].position < 0,
        };
    tr_layout_make(&l, p->mode, p->n_members, p->span, plan->n_spans);
    p->is_split = l.split && l.n_split > 0;
    for (int c = 0; c < p->n_members; c++) {
        const int64_t *write = w.write;
        const int32_t n_heads = w.n_heads;
        walk_member(p, plan, &l, c, page_table, max_pages, &w);
        p->written[c] = (int)(w.write - write);
        p->heads[c] = w.n_heads - n_heads;
    }
    if (!p->is_split) return;
    make_rows(p, plan, &l);
    make_head(p, plan);
}

bool tr_part_is_split(const tr_part *p)
{
    return p->is_split;
}

const tr_plan *tr_part_rows(const tr_part *p)
{
    return p->rows;
}

const tr_plan *tr_part_head(const tr_part *p)
{
    return p->head;
}

const int *tr_part_written(const tr_part *p)
{
    return p->written;
}

const int64_t *tr_part_write_rows(const tr_part *p)
{
    return p->write;
}

const int *tr_part_heads(const tr_part *p)
{
    return p->heads;
}

const int32_t *tr_part_head_index(const tr_part *p)
{
    return p->head_index;
}
