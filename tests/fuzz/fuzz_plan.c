/* A plan block. The first byte chooses limits and form: the bytes of a block as they are, or fields that a builder seals, so
 * that the checks behind the header's are reached too. Whatever tr_plan_check accepts is looked at again, independently:
 * every index a kernel would use is in range, every section lies in the block. */
#include <config.h>

#include <math.h>
#include <stdbool.h>

#include "model/plan.h"
#include "tests/fuzz/fuzz.h"

enum { PAGE = 64 };

static const tr_plan_limits limits[] = {
    {.n_slots = 6,
     .n_pages = 40,
     .max_pages = 8,
     .n_rows_max = 50,
     .n_head_max = 30,
     .n_vocab = 100,
     .index_topk = 128},
    {.n_slots = 1,
     .n_pages = 1,
     .max_pages = 1,
     .n_rows_max = 1,
     .n_head_max = 1,
     .n_vocab = 1,
     .index_topk = 0},
    {.n_slots = 5000,
     .n_pages = 70,
     .max_pages = 2,
     .n_rows_max = 9,
     .n_head_max = 9,
     .n_vocab = 10,
     .index_topk = 64},
};

#define IN(value, low, high)                                                                       \
    FUZZ_CHECK((value) >= (low) && (value) < (high), "%s %lld", #value, (long long)(value))

static void check_spans(const tr_plan *p, const tr_plan_limits *l)
{
    const tr_span *s = tr_plan_spans(p);
    long long rows = 0, heads = 0, sum = 0;

    for (int i = 0; i < p->n_spans; i++, s++) {
        IN(s->slot, 0, l->n_slots);
        IN(s->n_rows, 1, l->n_rows_max + 1);
        IN(s->n_logits, 0, s->n_rows + 1);
        if (s->flags & TR_SPAN_DENSE) IN(s->position, 0, l->index_topk);
        for (int r = 0; r < s->n_rows; r++) {
            if (s->position >= 0) IN((long long)s->position + r, 0, (long long)l->max_pages * PAGE);
            if (s->position >= 0) IN((long long)s->position + r, 0, p->max_context);
            if (s->i_token >= 0) {
                IN((long long)s->i_token + r, 0, p->n_tokens);
                IN(tr_plan_tokens(p)[s->i_token + r], 0, l->n_vocab);
            }
        }
        FUZZ_CHECK(s->i_token >= 0 || s->n_rows == 1, "rows without tokens");
        for (int k = 0; k < i; k++)
            FUZZ_CHECK(s[-1 - k].slot != s->slot, "slot %d twice", s->slot);
        rows += s->n_rows;
        heads += s->n_logits;
    }
    FUZZ_CHECK(rows == p->n_rows && rows <= l->n_rows_max, "%lld rows", rows);
    FUZZ_CHECK(heads == p->n_head_rows && heads <= l->n_head_max && heads == p->n_targets, "heads");
    IN(p->max_context, 0, l->max_pages * PAGE + 1);
    for (int i = 0; i < p->n_targets; i++)
        IN(tr_plan_targets(p)[i], -1, l->n_vocab);
    for (int i = 0; i < p->n_tokens; i++)
        sum += tr_plan_tokens(p)[i];
    FUZZ_CHECK(sum >= 0, "tokens");
}

static void check_rest(const tr_plan *p, const tr_plan_limits *l)
{
    const tr_logit_change *c = tr_plan_changes(p);

    for (int i = 0; i < p->n_page_sets; i++) {
        IN(tr_plan_page_sets(p)[i].slot, 0, l->n_slots);
        IN(tr_plan_page_sets(p)[i].i_page, 0, l->max_pages);
        IN(tr_plan_page_sets(p)[i].page, 0, l->n_pages);
    }
    for (int i = 0; i < p->n_copies; i++) {
        IN(tr_plan_copies(p)[i].from, 0, l->n_pages);
        IN(tr_plan_copies(p)[i].to, 0, l->n_pages);
        IN(tr_plan_copies(p)[i].n_rows, 0, PAGE + 1);
    }
    for (int i = 0; i < p->n_opens; i++) {
        const tr_slot_open *o = &tr_plan_opens(p)[i];
        IN(o->slot, 0, l->n_slots);
        IN(o->n_logprobs, -1, 21);
        IN(o->n_prompt_logprobs, -1, 21);
        FUZZ_CHECK(o->temperature >= 0 && o->top_p >= 0 && o->top_p <= 1 && o->min_p >= 0 &&
                       o->min_p <= 1,
                   "sampling of slot %d", o->slot);
    }
    for (int i = 0; i < p->n_changes; i++) {
        IN(c[i].head_row, 0, p->n_head_rows);
        IN(c[i].token, 0, l->n_vocab);
        FUZZ_CHECK(c[i].repetition > 0 && !isnan(c[i].bias) && c[i].bias < HUGE_VALF, "change %d",
                   i);
        FUZZ_CHECK(!i || c[i].head_row > c[i - 1].head_row ||
                       (c[i].head_row == c[i - 1].head_row && c[i].token > c[i - 1].token),
                   "change %d is out of order", i);
    }
}

static void check(const void *block, size_t n, const tr_plan_limits *l)
{
    tr_err err = {0};
    char *copy = fuzz_copy(block, n); /* malloc aligns to 16 */
    const tr_plan *p = (const tr_plan *)(const void *)copy;

    tr_status st = tr_plan_check(p, n, l, &err);
    FUZZ_CHECK(st == TR_OK || (st == TR_E_INPUT && err.text[0]), "status %d", st);
    if (st == TR_OK) {
        FUZZ_CHECK(n <= UINT32_MAX, "%zu bytes", n);
        check_spans(p, l);
        check_rest(p, l);
    }
    free(copy);
}

/* One field of a builder's entry: mostly small, now and then anything. */
static int32_t field(const uint8_t **data, size_t *n)
{
    uint8_t b = fuzz_take_byte(data, n);
    if (b < 250) return (int32_t)b - 1;
    int32_t v = 0;
    for (int i = 0; i < 4; i++)
        v = (int32_t)((uint32_t)v << 8 | fuzz_take_byte(data, n));
    return v;
}

#define F field(&data, &n)

static void build(const uint8_t *data, size_t n, const tr_plan_limits *l)
{
    tr_plan_builder *b = tr_plan_builder_create(l);
    if (!b) abort();
    int64_t context = 0;
    bool unknown = false;
    tr_plan_begin(b, 3, (uint32_t)F);
    while (n > 1) {
        int32_t v[8];
        uint8_t what = fuzz_take_byte(&data, &n);
        for (int i = 0; i < 8; i++)
            v[i] = what % 7 == 1 || i < 6 ? F : 0;
        float x[3];
        memcpy(x, v + 3, sizeof x); /* every bit pattern */
        switch (what % 7) {
        case 0:
            tr_plan_add_tokens(b, v, (int)(what / 7u % 8));
            break;
        case 1:
            if (tr_plan_add_span(b, (tr_span){.slot = v[0],
                                              .n_rows = v[1],
                                              .position = v[2],
                                              .i_token = v[3],
                                              .kind = (int16_t)v[4],
                                              .owner = (int16_t)(v[5] % 3),
                                              .n_logits = v[6],
                                              .flags = (uint32_t)v[7] & 1}) < 0)
                break;
            unknown = unknown || v[2] < 0;
            if (v[2] >= 0 && (int64_t)v[2] + v[1] > context) context = (int64_t)v[2] + v[1];
            break;
        case 2:
            tr_plan_add_page(b, (tr_page_set){v[0], v[1], v[2]});
            break;
        case 3:
            tr_plan_add_copy(b, (tr_page_copy){v[0], v[1], v[2]});
            break;
        case 4:
            tr_plan_add_open(b, (tr_slot_open){9, v[0], v[1], v[2], v[2], x[0], x[1], x[2], 0});
            break;
        case 5:
            tr_plan_add_targets(b, v, (int)(what / 7u % 8));
            break;
        case 6:
            tr_plan_add_change(b, (tr_logit_change){v[0], v[1], x[0], x[1], x[2], 0});
            break;
        }
    }
    /* What the scheduler knows: the largest context; where a length is the device's, anything above. */
    if (unknown) context += 1 + fuzz_take_byte(&data, &n);
    const tr_plan *p = tr_plan_seal(b, (int)(context < INT32_MAX ? context : INT32_MAX));
    FUZZ_CHECK(p->bytes <= tr_plan_bytes_max(l), "%u bytes", (unsigned)p->bytes);
    check(p, p->bytes, l);
    tr_plan_builder_free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    uint8_t first = fuzz_take_byte(&data, &n);
    const tr_plan_limits *l = &limits[first % 3];
    if (first & 128)
        build(data, n, l);
    else
        check(data, n, l);
    return 0;
}
