/* The plan block: what the builder seals passes the checker; whatever is changed in it is refused or stays harmless. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/plan.h"

static const tr_plan_limits limits = {.n_slots = 6,
                                      .n_pages = 40,
                                      .max_pages = 8,
                                      .n_rows_max = 50,
                                      .n_head_max = 30,
                                      .n_vocab = 100,
                                      .index_topk = 128};

/* A block of its own allocation, so that ASan sees every byte read beyond it. */
static tr_plan *copy_of(const tr_plan *p, size_t bytes)
{
    tr_plan *c = malloc(bytes ? bytes : 1);
    assert_non_null(c);
    memcpy(c, p, bytes);
    return c;
}

/* Every section in use: a scored dense chunk, an absorbed chunk, a decode row known to the device only. */
static tr_plan *make_plan(void)
{
    const int32_t prompt[] = {5, 6, 7, 8, 9}, targets[] = {6, 7, 8, -1, -1, -1};
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    assert_non_null(b);

    tr_plan_begin(b, 77, TR_PLAN_AFTER_TOKENS);
    assert_int_equal(tr_plan_add_tokens(b, prompt, 4), 0);
    assert_int_equal(tr_plan_add_tokens(b, prompt + 2, 3), 4);
    assert_int_equal(tr_plan_add_span(b, (tr_span){.slot = 4,
                                                   .n_rows = 4,
                                                   .position = 10,
                                                   .i_token = 0,
                                                   .kind = TR_SPAN_PREFILL,
                                                   .owner = -1,
                                                   .n_logits = 4,
                                                   .flags = TR_SPAN_DENSE}),
                     0);
    tr_plan_add_span(b, (tr_span){.slot = 1,
                                  .n_rows = 3,
                                  .position = 200,
                                  .i_token = 4,
                                  .kind = TR_SPAN_DECODE,
                                  .owner = -1,
                                  .n_logits = 1});
    tr_plan_add_span(b, (tr_span){.slot = 0,
                                  .n_rows = 1,
                                  .position = -1,
                                  .i_token = -1,
                                  .kind = TR_SPAN_DECODE,
                                  .owner = -1,
                                  .n_logits = 1});
    assert_int_equal(tr_plan_add_targets(b, targets, 6), 0);
    tr_plan_add_page(b, (tr_page_set){.slot = 4, .i_page = 0, .page = 39});
    tr_plan_add_page(b, (tr_page_set){.slot = 4, .i_page = 7, .page = 0});
    tr_plan_add_copy(b, (tr_page_copy){.from = 3, .to = 39, .n_rows = 10});
    tr_plan_add_copy(b, (tr_page_copy){.from = 3, .to = 38, .n_rows = 10});
    tr_plan_add_open(b, (tr_slot_open){.slot = 4,
                                       .key = 9,
                                       .n_logprobs = 20,
                                       .n_prompt_logprobs = -1,
                                       .temperature = 0.5f,
                                       .top_p = 1});
    tr_plan_add_change(
        b, (tr_logit_change){.head_row = 3, .token = 1, .bias = -INFINITY, .repetition = 1});
    tr_plan_add_change(
        b,
        (tr_logit_change){.head_row = 4, .token = 0, .bias = 2, .repetition = 1.5f, .penalty = 1});
    tr_plan_add_change(
        b, (tr_logit_change){.head_row = 4, .token = 99, .repetition = 1, .penalty = -1});
    const tr_plan *p = tr_plan_seal(b, 203);
    assert_true(p->bytes <= tr_plan_bytes_max(&limits));
    tr_plan *c = copy_of(p, p->bytes);
    tr_plan_builder_free(b);
    return c;
}

static void test_round_trip(void **state)
{
    tr_err err = {0};
    tr_plan *p = make_plan();
    (void)state;

    if (tr_plan_check(p, p->bytes, &limits, &err)) fail_msg("%s", err.text);
    assert_int_equal(p->n_rows, 8);
    assert_int_equal(p->n_head_rows, 6);
    assert_int_equal(p->step, 77);
    assert_int_equal(p->flags, TR_PLAN_AFTER_TOKENS | TR_PLAN_HAS_DENSE | TR_PLAN_HAS_ABSORBED |
                                   TR_PLAN_HAS_SELECTION);
    assert_int_equal(tr_plan_tokens(p)[4], 7);
    assert_int_equal(tr_plan_spans(p)[1].position, 200);
    assert_int_equal(tr_plan_targets(p)[2], 8);
    assert_int_equal(tr_plan_page_sets(p)[0].page, 39);
    assert_int_equal(tr_plan_copies(p)[1].to, 38);
    assert_int_equal(tr_plan_opens(p)[0].n_logprobs, 20);
    assert_int_equal(tr_plan_changes(p)[2].token, 99);
    assert_int_equal(p->at_spans % 8 + p->at_tokens % 8 + p->at_page_sets % 8 + p->at_copies % 8 +
                         p->at_opens % 8 + p->at_targets % 8 + p->at_changes % 8,
                     0);
    free(p);
}

/* A prompt's chunk across index_topk has rows of both forms; where all of it is below, it asks for nothing else. */
static void test_both_forms(void **state)
{
    const int32_t prompt[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    (void)state;

    for (int from = 118; from <= 128; from++) {
        tr_err err = {0};
        tr_plan_builder *b = tr_plan_builder_create(&limits);
        tr_plan_begin(b, 5, 0);
        tr_plan_add_span(b, (tr_span){.slot = 1,
                                      .n_rows = 8,
                                      .position = from,
                                      .i_token = tr_plan_add_tokens(b, prompt, 8),
                                      .kind = TR_SPAN_PREFILL,
                                      .owner = -1,
                                      .flags = TR_SPAN_DENSE});
        const tr_plan *p = tr_plan_seal(b, from + 8);
        const uint32_t both = TR_PLAN_HAS_DENSE | TR_PLAN_HAS_ABSORBED | TR_PLAN_HAS_SELECTION;
        assert_int_equal(p->flags, from + 8 > 128 ? both : TR_PLAN_HAS_DENSE);
        assert_int_equal(tr_plan_check(p, p->bytes, &limits, &err),
                         from < 128 ? TR_OK : TR_E_INPUT);
        tr_plan_builder_free(b);
    }
}

static void test_empty_plans(void **state)
{
    tr_err err = {0};
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    (void)state;

    tr_plan_begin(b, 1, TR_PLAN_STOP);
    const tr_plan *p = tr_plan_seal(b, 0);
    assert_int_equal(p->bytes, sizeof(tr_plan)); /* the engine sends it without its builder */
    assert_int_equal(tr_plan_check(p, p->bytes, &limits, &err), TR_OK);
    tr_plan_begin(b, 2, TR_PLAN_IDLE);
    p = tr_plan_seal(b, 0);
    assert_int_equal(tr_plan_check(p, p->bytes, &limits, &err), TR_OK);
    tr_plan_begin(b, 3, 0);
    p = tr_plan_seal(b, 0);
    assert_int_equal(tr_plan_check(p, p->bytes, &limits, &err),
                     TR_E_INPUT); /* nothing to do, and does not say so */
    tr_plan_builder_free(b);
}

/* One thing wrong: how to make it so, by what its message must speak of. */
#define BROKEN(says, ...)                                                                          \
    {                                                                                              \
        tr_plan *p = make_plan();                                                                  \
        tr_span *span = (tr_span *)(uintptr_t)tr_plan_spans(p);                                    \
        tr_page_set *set = (tr_page_set *)(uintptr_t)tr_plan_page_sets(p);                         \
        tr_page_copy *copy = (tr_page_copy *)(uintptr_t)tr_plan_copies(p);                         \
        tr_slot_open *open = (tr_slot_open *)(uintptr_t)tr_plan_opens(p);                          \
        tr_logit_change *change = (tr_logit_change *)(uintptr_t)tr_plan_changes(p);                \
        int32_t *token = (int32_t *)(uintptr_t)tr_plan_tokens(p),                                  \
                *target = (int32_t *)(uintptr_t)tr_plan_targets(p);                                \
        size_t bytes = p->bytes;                                                                   \
        tr_err err = {0};                                                                          \
        (void)span, (void)set, (void)copy, (void)open, (void)change, (void)token, (void)target;    \
        __VA_ARGS__;                                                                               \
        if (tr_plan_check(p, bytes, &limits, &err) != TR_E_INPUT || !strstr(err.text, says))       \
            fail_msg("%s: \"%s\"", #__VA_ARGS__, err.text);                                        \
        free(p);                                                                                   \
    }

static void test_header_faults(void **state)
{
    (void)state;
    BROKEN("magic", p->magic++)
    BROKEN("magic", p->version++)
    BROKEN("bytes announced", p->bytes -= 8)
    BROKEN("bytes announced", bytes -= 8)
    BROKEN("no room", bytes = sizeof(tr_plan) - 1)
    BROKEN("no room", bytes = 0)
    BROKEN("reserved", p->ring = 1)
    BROKEN("reserved", p->pad3 = 1)
    BROKEN("reserved", p->bucket = 1)
    BROKEN("spans at byte", p->at_spans = (uint32_t)bytes)
    BROKEN("spans at byte", p->at_spans = 0)
    BROKEN("tokens at byte", p->at_tokens += 4)
    BROKEN("tokens at byte", p->at_tokens = UINT32_MAX - 7)
    BROKEN("logit changes at byte", p->at_changes += 8)
    BROKEN("fit", p->n_spans = 7)
    BROKEN("fit", p->n_spans = -1)
    BROKEN("fit", p->n_tokens = INT32_MAX)
    BROKEN("fit", p->n_page_sets = 49)
    BROKEN("fit", p->n_targets = INT32_MIN)
    BROKEN("fit", p->n_changes = 100000)
    BROKEN("rows announced", p->n_rows++)
    BROKEN("head rows", p->n_head_rows--)
    BROKEN("context", p->max_context = 202)
    BROKEN("context", p->max_context = 8 * 64 + 1)
    BROKEN("flags", p->flags |= TR_PLAN_STOP)
    BROKEN("flags", p->flags |= TR_PLAN_IDLE)
    BROKEN("flags", p->flags &= ~(uint32_t)TR_PLAN_HAS_SELECTION)
    BROKEN("flags", p->flags &= ~(uint32_t)TR_PLAN_HAS_DENSE)
    BROKEN("flags", p->flags |= 1u << 20)
}

static void test_span_faults(void **state)
{
    (void)state;
    BROKEN("slot -1", span[0].slot = -1)
    BROKEN("slot 6", span[2].slot = 6)
    BROKEN("two spans", span[2].slot = 1)
    BROKEN("0 rows", span[0].n_rows = 0)
    BROKEN("rows", span[0].n_rows = INT32_MAX)
    BROKEN("position", span[1].position = 8 * 64 - 2)
    BROKEN("position", span[1].position = INT32_MAX)
    BROKEN("position", span[1].position = -2)
    BROKEN("token", span[1].i_token = 5)
    BROKEN("token", span[1].i_token = -1)
    BROKEN("token", span[1].i_token = INT32_MAX)
    BROKEN("token", span[2].i_token = -2)
    BROKEN("dense", span[0].position = 128)
    BROKEN("dense", span[0].position = -1)
    BROKEN("dense", span[1].flags = TR_SPAN_DENSE)
    BROKEN("flags", span[0].flags = 2)
    BROKEN("flags", span[0].skip = 1)
    BROKEN("flags", span[0].begin = 1)
    BROKEN("flags", span[0].end = 1)
    BROKEN("flags", span[0].flags |= TR_SPAN_PART)
    BROKEN("kind", span[1].kind = TR_SPAN_VERIFY)
    BROKEN("kind", span[1].kind = TR_SPAN_DRAFT)
    BROKEN("kind", span[1].kind = -1)
    BROKEN("token", span[2].kind = TR_SPAN_PREFILL)
    BROKEN("owner", span[1].owner = 1)
    BROKEN("logits", span[1].n_logits = 4)
    BROKEN("logits", span[1].n_logits = -1)
    BROKEN("head rows", span[1].n_logits = 2)
}

static void test_section_faults(void **state)
{
    (void)state;
    BROKEN("token 3", token[3] = 100)
    BROKEN("token 6", token[6] = -1)
    BROKEN("target 0", target[0] = 100)
    BROKEN("target 5", target[5] = -2)
    BROKEN("page set 1", set[1].page = 40)
    BROKEN("page set 1", set[1].page = -1)
    BROKEN("page set 0", set[0].slot = 6)
    BROKEN("page set 0", set[0].i_page = 8)
    BROKEN("page copy 0", copy[0].n_rows = 64)
    BROKEN("page copy 0", copy[0].n_rows = 0)
    BROKEN("page copy 0", copy[0].from = 40)
    BROKEN("page copy 0", copy[0].to = -1)
    BROKEN("page copy 0", copy[0].to = 3)
    BROKEN("meet", copy[1].to = 39)
    BROKEN("meet", copy[1].from = 39)
    BROKEN("slot opening", open[0].slot = -1)
    BROKEN("slot opening", open[0].flags = 1)
    BROKEN("slot opening", open[0].n_logprobs = 21)
    BROKEN("slot opening", open[0].n_prompt_logprobs = -2)
    BROKEN("slot opening", open[0].temperature = -1)
    BROKEN("slot opening", open[0].temperature = NAN)
    BROKEN("slot opening", open[0].temperature = INFINITY)
    BROKEN("slot opening", open[0].top_p = 1.5f)
    BROKEN("slot opening", open[0].min_p = NAN)
    BROKEN("order", change[1].token = 99)
    BROKEN("order", change[0].head_row = 5)
    BROKEN("not sampled", change[0].head_row = 2)
    BROKEN("head row", change[2].head_row = 6)
    BROKEN("token 100", change[2].token = 100)
    BROKEN("bias", change[0].bias = INFINITY)
    BROKEN("bias", change[0].bias = NAN)
    BROKEN("bias", change[0].repetition = 0)
    BROKEN("bias", change[0].repetition = NAN)
    BROKEN("bias", change[0].penalty = -INFINITY)
}

/* What a kernel would do with an accepted plan, in the checker's words and without its code. */
static void assert_harmless(const tr_plan *p)
{
    int rows = 0, heads = 0;
    uint32_t slots = 0;

    for (int i = 0; i < p->n_spans; i++) {
        const tr_span *s = &tr_plan_spans(p)[i];
        assert_in_range(s->slot, 0, limits.n_slots - 1);
        assert_false(slots & 1u << s->slot);
        slots |= 1u << s->slot;
        if (s->position >= 0) assert_in_range(s->position + s->n_rows, 1, limits.max_pages * 64);
        for (int r = 0; r < s->n_rows && s->i_token >= 0; r++)
            assert_in_range(tr_plan_tokens(p)[s->i_token + r], 0, limits.n_vocab - 1);
        rows += s->n_rows;
        heads += s->n_logits;
    }
    assert_in_range(rows, 0, limits.n_rows_max);
    assert_in_range(heads, 0, limits.n_head_max);
    assert_int_equal(heads, p->n_targets);
    for (int i = 0; i < p->n_targets; i++)
        assert_in_range(tr_plan_targets(p)[i] + 1, 0, limits.n_vocab);
    for (int i = 0; i < p->n_page_sets; i++) {
        assert_in_range(tr_plan_page_sets(p)[i].page, 0, limits.n_pages - 1);
        assert_in_range(tr_plan_page_sets(p)[i].slot, 0, limits.n_slots - 1);
        assert_in_range(tr_plan_page_sets(p)[i].i_page, 0, limits.max_pages - 1);
    }
    for (int i = 0; i < p->n_changes; i++) {
        assert_in_range(tr_plan_changes(p)[i].head_row, 0, heads - 1);
        assert_in_range(tr_plan_changes(p)[i].token, 0, limits.n_vocab - 1);
    }
}

static uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    return *state ^= *state << 5;
}

/* Random flips, interesting words, cuts: never a crash, and what passes is harmless. */
static void test_hostile_blocks(void **state)
{
    static const uint32_t words[] = {0,   1,          2,          7,          8,         64,
                                     127, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffff8};
    tr_plan *good = make_plan();
    const size_t bytes = good->bytes;
    uint32_t r = 12345;
    int n_passed = 0;
    (void)state;

    for (int i = 0; i < 60000; i++) {
        size_t n = i % 8 ? bytes : next_random(&r) % (bytes + 1);
        tr_plan *p = copy_of(good, n);
        unsigned char *byte = (unsigned char *)p;
        for (uint32_t k = 1 + next_random(&r) % 3; k > 0 && n >= 4; k--) {
            size_t at = next_random(&r) % (n - 3);
            if (next_random(&r) % 2)
                byte[at] ^= (unsigned char)(1u << next_random(&r) % 8);
            else
                memcpy(byte + at / 4 * 4, &words[next_random(&r) % 11], 4);
        }
        if (n != bytes && n >= sizeof *p) p->bytes = (uint32_t)n;
        if (tr_plan_check(p, n, &limits, NULL) == TR_OK) {
            assert_harmless(p);
            n_passed++;
        }
        free(p);
    }
    assert_in_range(n_passed, 100,
                    59000); /* some changes are harmless (a token, the key), many are not */
    free(good);
}

static void test_builder_limits(void **state)
{
    const int32_t ids[60] = {0};
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    tr_span span = {
        .slot = 0, .n_rows = 30, .position = 0, .i_token = 0, .owner = -1, .n_logits = 20};
    (void)state;

    for (int round = 0; round < 2; round++) { /* begin forgets */
        tr_plan_begin(b, 1, 0);
        assert_int_equal(tr_plan_add_tokens(b, ids, 51), -1);
        assert_int_equal(tr_plan_add_tokens(b, ids, 50), 0);
        assert_int_equal(tr_plan_add_tokens(b, ids, 1), -1);
        assert_int_equal(tr_plan_add_span(b, span), 0);
        assert_int_equal(tr_plan_add_span(b, span), -1); /* 60 rows */
        span.n_rows = 20;
        assert_int_equal(tr_plan_add_span(b, span), -1); /* 40 head rows */
        span.n_rows = 30;
        assert_int_equal(tr_plan_add_targets(b, ids, 31), -1);
        for (int i = 0; i < 48; i++)
            assert_int_equal(tr_plan_add_page(b, (tr_page_set){0}), i);
        assert_int_equal(tr_plan_add_page(b, (tr_page_set){0}), -1);
        for (int i = 0; i < 6; i++)
            assert_int_equal(tr_plan_add_open(b, (tr_slot_open){0}) +
                                 tr_plan_add_copy(b, (tr_page_copy){0}),
                             2 * i);
        assert_int_equal(tr_plan_add_open(b, (tr_slot_open){0}), -1);
        assert_int_equal(tr_plan_add_copy(b, (tr_page_copy){0}), -1);
        for (int i = 0; i < tr_plan_changes_max(&limits); i++)
            assert_int_equal(tr_plan_add_change(b, (tr_logit_change){0}), i);
        assert_int_equal(tr_plan_add_change(b, (tr_logit_change){0}), -1);
        assert_true(tr_plan_seal(b, 1)->bytes <= tr_plan_bytes_max(&limits));
    }
    tr_plan_builder_free(b);
    tr_plan_builder_free(NULL);
    assert_true(tr_plan_changes_max(&limits) >= limits.n_vocab);
}

static void test_impossible_limits(void **state)
{
    (void)state;
    for (int i = 0; i < 8; i++) {
        tr_plan_limits l = limits;
        if (i == 0) l.n_slots = 0;
        if (i == 1) l.n_slots = INT32_MAX;
        if (i == 2) l.max_pages = INT32_MAX;
        if (i == 3) l.n_vocab = INT32_MAX;
        if (i == 4) l.n_rows_max = 0;
        if (i == 5) l.n_pages = -1;
        if (i == 6) l.n_head_max = -1;
        if (i == 7) l.index_topk = -1;
        assert_int_equal(tr_plan_bytes_max(&l), 0);
        assert_null(tr_plan_builder_create(&l));
        tr_plan *p = make_plan();
        if (i != 3) assert_int_equal(tr_plan_check(p, p->bytes, &l, NULL), TR_E_INPUT);
        free(p);
    }
    /* The real model on a large node. */
    tr_plan_limits big = {.n_slots = 1024,
                          .n_pages = 1 << 20,
                          .max_pages = 2560,
                          .n_rows_max = 17408,
                          .n_head_max = 17408,
                          .n_vocab = 129280,
                          .index_topk = 2048};
    assert_in_range(tr_plan_bytes_max(&big), 1, 100 << 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),        cmocka_unit_test(test_both_forms),
        cmocka_unit_test(test_empty_plans),       cmocka_unit_test(test_header_faults),
        cmocka_unit_test(test_span_faults),       cmocka_unit_test(test_section_faults),
        cmocka_unit_test(test_hostile_blocks),    cmocka_unit_test(test_builder_limits),
        cmocka_unit_test(test_impossible_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
