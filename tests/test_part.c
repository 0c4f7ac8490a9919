/* What each member of a context-parallel group computes of a plan, by brute force: plan_apply on every member's part and on the
 * whole plan, for both modes, up to 16 members, prompts, decode rows (also in flight: position unknown) and scored prompts mixed.
 * Every row is computed once, or by all; every row's cache place is in the list of who computes it; every head row is found again,
 * in the plan's order; all members' slots end alike. */
#include <config.h>

#include "cpu_test.h"

#include <stdbool.h>
#include <string.h>

#include "model/part.h"
#include "model/plan.h"

enum {
    SLOTS = 12,
    MAX_PAGES = 8,
    N_PAGES = SLOTS * MAX_PAGES,
    ROWS_MAX = 700,
    MEMBERS_MAX = 16,
    VOCAB = 2000
};

static const tr_plan_limits limits = {.n_slots = SLOTS,
                                      .n_pages = N_PAGES,
                                      .max_pages = MAX_PAGES,
                                      .n_rows_max = ROWS_MAX,
                                      .n_head_max = ROWS_MAX,
                                      .n_vocab = VOCAB,
                                      .index_topk = 128};

typedef struct state { /* the device of one rank */
    int32_t n, n_head, token[ROWS_MAX], slot[ROWS_MAX], position[ROWS_MAX], begin[ROWS_MAX];
    int64_t write[ROWS_MAX];
    uint8_t dense[ROWS_MAX];
    int32_t head_row[ROWS_MAX], target[ROWS_MAX];
    int32_t length[SLOTS], last_token[SLOTS], page_table[SLOTS * MAX_PAGES];
    tr_slot_open sampling[SLOTS];
    tr_slots slots;
    tr_rows rows;
} state;

typedef struct world {
    test_cpu cpu;
    uint64_t random;
    tr_plan_builder *builder;
    uint64_t n_steps;
    int32_t length[SLOTS];             /* as the scheduler knows them */
    int n_tokens, n_head, max_context; /* of the plan that is being made */
    state one;                         /* runs whole plans */
    state *member;                     /* [n_members] run their parts, */
    state *head;                       /* and this one head rows alone, after member 0's slots */
    tr_part **part;                    /* [n_members] */
    tr_cp_mode mode;
    int n_members;
    int n_split_steps, n_whole_steps;
} world;

static int below(world *w, int n)
{
    return (int)(test_bits(&w->random) % (uint64_t)n);
}

static void clear(state *s)
{
    memset(s, 0, sizeof *s);
    memset(s->page_table, 0xff, sizeof s->page_table);
    s->slots = (tr_slots){.n_slots = SLOTS,
                          .max_pages = MAX_PAGES,
                          .length = s->length,
                          .last_token = s->last_token,
                          .page_table = s->page_table,
                          .sampling = s->sampling};
    s->rows = (tr_rows){.n_max = ROWS_MAX,
                        .n_head_max = ROWS_MAX,
                        .n = &s->n,
                        .n_head = &s->n_head,
                        .token = s->token,
                        .slot = s->slot,
                        .position = s->position,
                        .begin = s->begin,
                        .write = s->write,
                        .dense = s->dense,
                        .head_row = s->head_row,
                        .target = s->target,
                        .page_table = s->page_table,
                        .max_pages = MAX_PAGES};
}

static void apply(const world *w, state *s, const tr_plan *plan, int rows_only)
{
    const struct tr_plan_apply_args a = {.plan = plan,
                                         .slots = s->slots,
                                         .rows = s->rows,
                                         .n_dense = limits.index_topk,
                                         .rows_only = rows_only};
    if (w->cpu.ops->plan_apply(w->cpu.d, TR_LANE_MAIN, &a) != TR_OK)
        fail_msg("%s", w->cpu.ops->error(w->cpu.d));
}

/* ---- plans -------------------------------------------------------------------------------------- */

static void open_slot(world *w, int slot)
{
    assert_true(tr_plan_add_open(w->builder, (tr_slot_open){.slot = slot,
                                                            .key = (uint64_t)w->n_steps,
                                                            .temperature = 1,
                                                            .top_p = 1}) >= 0);
    for (int i = 0; i < MAX_PAGES; i++) /* scrambled: 37 and 96 have no common divisor */
        assert_true(tr_plan_add_page(w->builder, (tr_page_set){.slot = slot,
                                                               .i_page = i,
                                                               .page = (slot * MAX_PAGES + i) * 37 %
                                                                       N_PAGES}) >= 0);
    w->length[slot] = 0;
}

/* n rows of a slot, of which the last n_logits are scored (or, n_logits 1, sampled). */
static void add_span(world *w, int slot, int n, int n_logits, bool decode, bool in_flight)
{
    int32_t token[ROWS_MAX];

    for (int i = 0; i < n; i++)
        token[i] = below(w, VOCAB);
    const tr_span span = {.slot = slot,
                          .n_rows = n,
                          .position = in_flight ? -1 : w->length[slot],
                          .i_token = in_flight ? -1 : tr_plan_add_tokens(w->builder, token, n),
                          .kind = decode ? TR_SPAN_DECODE : TR_SPAN_PREFILL,
                          .owner = -1,
                          .n_logits = n_logits,
                          .flags =
                              !decode && w->length[slot] < limits.index_topk ? TR_SPAN_DENSE : 0};
    assert_true(tr_plan_add_span(w->builder, span) >= 0);
    for (int i = 0; i < n_logits; i++) {
        const int32_t target = n_logits > 1 || below(w, 4) == 0 ? below(w, VOCAB) : -1;
        assert_true(tr_plan_add_targets(w->builder, &target, 1) >= 0);
        if (target < 0 && below(w, 2))
            assert_true(tr_plan_add_change(w->builder, (tr_logit_change){.head_row = w->n_head + i,
                                                                         .token = below(w, VOCAB),
                                                                         .repetition = 1,
                                                                         .penalty = 1}) >= 0);
    }
    w->length[slot] += n;
    w->n_tokens += n;
    w->n_head += n_logits;
    if (w->length[slot] > w->max_context) w->max_context = w->length[slot];
}

/* Prompts of awkward lengths, one row for others. */
static const tr_plan *random_plan(world *w)
{
    static const int awkward[] = {1, 2, 3, 5, 8, 31, 32, 33, 63, 64, 65, 127, 128};

    tr_plan_begin(w->builder, w->n_steps++, 0);
    w->n_tokens = w->n_head = w->max_context = 0;
    const bool only_decode = below(w, 6) == 0;
    for (int slot = 0; slot < SLOTS; slot++) {
        int n = below(w, 2) ? awkward[below(w, 13)] : 1 + below(w, 150);
        if (below(w, 3) == 0) continue;
        if (w->length[slot] + n > MAX_PAGES * TR_PAGE_TOKENS || w->n_steps <= 1) open_slot(w, slot);
        const bool decode = w->length[slot] > 0 && (only_decode || below(w, 2));
        if (decode || only_decode) n = 1;
        if (w->n_tokens + n > ROWS_MAX - SLOTS) continue;
        const int kind = below(w, 4);
        add_span(w, slot, n,
                 kind == 0   ? n
                 : kind == 1 ? 0
                             : decode || kind == 2,
                 decode || only_decode, decode && below(w, 2));
    }
    return tr_plan_seal(w->builder, w->max_context);
}

/* ---- what must hold -------------------------------------------------------------------------------- */

/* The rule of parallel.md 3.1 and 3.2, written down once more: who computes row x of a split span of n rows of which e split
 * rows come before. */
static int owner_of(const world *w, int n, int x, int e)
{
    const int C = w->n_members;
    if (w->mode == TR_CP_INTERLEAVE) return (e + x) % C;
    for (int block = 0, at = 0;; block++) {
        at += n / (2 * C) + (block < n % (2 * C));
        if (x < at) return block < C ? block : 2 * C - 1 - block;
    }
}

/* The members' rows against the whole plan's: owner[row], or -1 where everybody computes it. */
static bool find_owners(world *w, const tr_plan *plan, int *owner)
{
    const tr_span *span = tr_plan_spans(plan);
    bool split = false, too_short = false;
    int row = 0, e = 0;

    for (int i = 0; i < plan->n_spans; i++) {
        if (span[i].kind != TR_SPAN_PREFILL) continue;
        split = true;
        too_short = too_short || span[i].n_rows < 2 * w->n_members;
    }
    if (w->mode == TR_CP_ZIGZAG && too_short) split = false;
    for (int i = 0; i < plan->n_spans; i++) {
        const bool whole = !split || span[i].kind != TR_SPAN_PREFILL;
        for (int x = 0; x < span[i].n_rows; x++)
            owner[row++] = whole ? -1 : owner_of(w, span[i].n_rows, x, e);
        if (!whole) e += span[i].n_rows;
    }
    split ? w->n_split_steps++ : w->n_whole_steps++;
    return split;
}

static int find_row(const state *s, int slot, int position)
{
    for (int i = 0; i < s->n; i++)
        if (s->slot[i] == slot && s->position[i] == position) return i;
    return -1;
}

/* Member c has exactly its rows, each as the whole plan has it. */
static void check_rows(const world *w, int c, const int *owner)
{
    const state *a = &w->one, *b = &w->member[c];
    int n = 0;

    for (int i = 0; i < a->n; i++) {
        const int at = find_row(b, a->slot[i], a->position[i]);
        assert_int_equal(at >= 0, owner[i] < 0 || owner[i] == c);
        if (at < 0) continue;
        n++;
        assert_int_equal(b->token[at], a->token[i]);
        assert_true(b->write[at] == a->write[i]);
        assert_int_equal(b->dense[at], a->dense[i]);
        assert_int_equal(b->begin[at], a->begin[i]);
    }
    assert_int_equal(b->n, n);
    assert_memory_equal(b->length, a->length, sizeof a->length);
    assert_memory_equal(b->page_table, a->page_table, sizeof a->page_table);
    assert_memory_equal(b->sampling, a->sampling, sizeof a->sampling);
    for (int h = 0; h < b->n_head && tr_part_is_split(w->part[c]); h++)
        assert_int_equal(b->target[h], -1); /* nobody samples from a part */
}

/* What travels: the cache rows of every member's split rows, in the order in which it has them. */
static void check_written(const world *w, const int *owner)
{
    const tr_part *p = w->part[0];
    const int64_t *write = tr_part_write_rows(p);

    for (int c = 0; c < w->n_members; c++) {
        const state *s = &w->member[c];
        int n = 0;
        for (int i = 0; i < s->n; i++) {
            const int row = find_row(&w->one, s->slot[i], s->position[i]);
            if (owner[row] < 0) continue;
            assert_true(write[n] == s->write[i]);
            n++;
        }
        assert_int_equal(tr_part_written(p)[c], n);
        write += n;
    }
}

/* Head row h of the plan lies at head_index[h] among the members' head rows, member after member. */
static void check_heads(const world *w)
{
    const tr_part *p = w->part[0];
    int at[ROWS_MAX + 1], member[ROWS_MAX + 1], n = 0;
    bool used[ROWS_MAX] = {false};

    for (int c = 0; c < w->n_members; c++) {
        assert_int_equal(tr_part_heads(p)[c], w->member[c].n_head);
        for (int h = 0; h < w->member[c].n_head; h++, n++) {
            member[n] = c;
            at[n] = w->member[c].head_row[h];
        }
    }
    assert_int_equal(n, w->one.n_head);
    assert_int_equal(w->head->n_head, n);
    assert_int_equal(w->head->n, n);
    for (int h = 0; h < n; h++) {
        const int k = tr_part_head_index(p)[h], row = w->one.head_row[h];
        assert_in_range(k, 0, n - 1);
        assert_false(used[k]);
        used[k] = true;
        const state *s = &w->member[member[k]];
        assert_int_equal(s->slot[at[k]], w->one.slot[row]);
        assert_int_equal(s->position[at[k]], w->one.position[row]);
        /* And what the sampler is told of it. */
        assert_int_equal(w->head->slot[h], w->one.slot[row]);
        assert_int_equal(w->head->position[h], w->one.position[row]);
        assert_int_equal(w->head->target[h], w->one.target[h]);
        assert_int_equal(w->head->head_row[h], h);
    }
}

static void check_step(world *w, const tr_plan *plan)
{
    int owner[ROWS_MAX];
    const bool split = find_owners(w, plan, owner);

    for (int c = 0; c < w->n_members; c++) {
        assert_int_equal(tr_part_is_split(w->part[c]), split);
        check_rows(w, c, owner);
    }
    check_written(w, owner);
    if (!split) return;
    check_heads(w);
    const tr_plan *head = tr_part_head(w->part[0]);
    assert_int_equal(head->n_changes, plan->n_changes);
    assert_memory_equal(tr_plan_changes(head), tr_plan_changes(plan),
                        (size_t)plan->n_changes * sizeof(tr_logit_change));
}

/* The plan on one rank, and what each member makes of it, as the model does. */
static void run_plan(world *w, const tr_plan *plan)
{
    tr_err err;

    assert_non_null(plan);
    if (tr_plan_check(plan, plan->bytes, &limits, &err) != TR_OK) fail_msg("%s", err.text);
    apply(w, &w->one, plan, 0);
    for (int c = 0; c < w->n_members; c++) {
        state *s = &w->member[c];
        const tr_page_set *set = tr_plan_page_sets(plan);
        for (int i = 0; i < plan->n_page_sets; i++) /* the host's copy is ahead of the device's */
            s->page_table[set[i].slot * MAX_PAGES + set[i].i_page] = set[i].page;
        tr_part_make(w->part[c], plan, s->page_table, MAX_PAGES);
        const bool split = tr_part_is_split(w->part[c]);
        const tr_plan *rows = split ? tr_part_rows(w->part[c]) : plan;
        apply(w, s, rows, 0);
        assert_int_equal(rows->n_rows, s->n);
        assert_int_equal(rows->n_head_rows, s->n_head);
        assert_int_equal(rows->flags, plan->flags);
        assert_int_equal(rows->max_context, plan->max_context);
        if (!split) continue;
        assert_true(rows->bytes <= tr_part_bytes_max(&limits));
        assert_true(tr_part_head(w->part[c])->bytes <= tr_part_bytes_max(&limits));
    }
    if (tr_part_is_split(w->part[0])) { /* every member's head plan is the same one */
        w->head->slots = w->member[0].slots;
        w->head->rows.page_table = w->member[0].page_table;
        apply(w, w->head, tr_part_head(w->part[w->n_members - 1]), 1);
    }
    check_step(w, plan);
}

/* New members; every slot has its pages. */
static void begin(world *w, tr_cp_mode mode, int n_members)
{
    w->mode = mode;
    w->n_members = n_members;
    w->n_steps = 0;
    clear(&w->one);
    clear(w->head);
    for (int c = 0; c < n_members; c++) {
        clear(&w->member[c]);
        w->part[c] = tr_part_create(&limits, mode, c, n_members);
        assert_non_null(w->part[c]);
    }
    memset(w->length, 0, sizeof w->length);
    tr_plan_begin(w->builder, w->n_steps++, TR_PLAN_IDLE);
    for (int slot = 0; slot < SLOTS; slot++)
        open_slot(w, slot);
    run_plan(w, tr_plan_seal(w->builder, 0));
}

static void end(world *w)
{
    for (int c = 0; c < w->n_members; c++)
        tr_part_free(w->part[c]);
}

static void run_steps(world *w, tr_cp_mode mode, int n_members, int n_steps)
{
    begin(w, mode, n_members);
    for (int i = 0; i < n_steps; i++)
        run_plan(w, random_plan(w));
    end(w);
}

static int setup(void **state_out)
{
    world *w = calloc(1, sizeof *w);

    if (!w) return -1;
    w->random = 4;
    w->member = calloc(MEMBERS_MAX, sizeof *w->member);
    w->head = calloc(1, sizeof *w->head);
    w->part = calloc(MEMBERS_MAX, sizeof(tr_part *));
    w->builder = tr_plan_builder_create(&limits);
    *state_out = w;
    return w->member && w->head && w->part && w->builder && test_cpu_open(&w->cpu, 0, 1) ? 0 : -1;
}

static int teardown(void **state_in)
{
    world *w = *state_in;

    w->cpu.ops->close(w->cpu.d);
    tr_plan_builder_free(w->builder);
    free(w->member);
    free(w->head);
    free(w->part);
    free(w);
    return 0;
}

/* ---- tests ------------------------------------------------------------------------------------------ */

static void interleave(void **state_in)
{
    world *w = *state_in;
    for (int n = 2; n <= MEMBERS_MAX; n++)
        run_steps(w, TR_CP_INTERLEAVE, n, 25);
    assert_true(w->n_split_steps > 200 && w->n_whole_steps > 20);
}

static void zigzag(void **state_in)
{
    world *w = *state_in;
    w->n_split_steps = w->n_whole_steps = 0;
    for (int n = 2; n <= MEMBERS_MAX; n++)
        run_steps(w, TR_CP_ZIGZAG, n, 25);
    assert_true(w->n_whole_steps > 200);
    for (int i = 0; i < 40; i++) { /* long prompts only, so that steps are split */
        w->n_members = 2 + below(w, 7);
        w->mode = TR_CP_ZIGZAG;
        run_steps(w, TR_CP_ZIGZAG, w->n_members, 3);
    }
    assert_true(w->n_split_steps > 5);
}

/* SG#20531: a ragged step in which some prompts have fewer rows than there are members, so that some members have none of them.
 * Whoever has no row of a slot must still know its length, or its next step is computed at the wrong positions. */
static void ragged_prompts_shorter_than_the_group(void **state_in)
{
    static const int n_rows[] = {1, 3, 2, 7, 1, 4}; /* 18 over 8 members */
    world *w = *state_in;

    for (int mode = 0; mode < 2; mode++) {
        begin(w, (tr_cp_mode)mode, 8);
        for (int turn = 0; turn < 3; turn++) {
            tr_plan_begin(w->builder, w->n_steps++, 0);
            w->n_tokens = w->n_head = w->max_context = 0;
            for (int slot = 0; slot < 6; slot++)
                add_span(w, slot, n_rows[(slot + turn) % 6], 1, false, false);
            run_plan(w, tr_plan_seal(w->builder, w->max_context));
            for (int c = 0; c < 8; c++) /* too short for zigzag: all compute all */
                assert_in_range(w->member[c].n, mode == TR_CP_INTERLEAVE ? 2 : 18,
                                mode == TR_CP_INTERLEAVE ? 3 : 18);
        }
        end(w);
    }
}

/* SG#18280, SG#23268: prompts whose first pages were found in the prefix cache. Their rows begin behind the prefix, and their keys
 * begin at 0: the prefix is added once, by the positions. */
static void prompts_behind_a_prefix(void **state_in)
{
    world *w = *state_in;

    for (int mode = 0; mode < 2; mode++) {
        begin(w, (tr_cp_mode)mode, 4);
        for (int slot = 0; slot < 3; slot++)
            w->length[slot] = w->one.length[slot] = 64 * (slot + 1);
        for (int c = 0; c < 4; c++)
            memcpy(w->member[c].length, w->one.length, sizeof w->one.length);
        tr_plan_begin(w->builder, w->n_steps++, 0);
        w->n_tokens = w->n_head = w->max_context = 0;
        for (int slot = 0; slot < 3; slot++)
            add_span(w, slot, 65 + slot, 1, false, false);
        run_plan(w, tr_plan_seal(w->builder, w->max_context));
        for (int c = 0; c < 4; c++)
            for (int i = 0; i < w->member[c].n; i++) {
                const state *s = &w->member[c];
                assert_int_equal(s->begin[i], 64 * (s->slot[i] + 1));
                assert_in_range(s->position[i], s->begin[i], s->begin[i] + 64 + s->slot[i]);
                assert_true(s->write[i] == (int64_t)(s->slot[i] * MAX_PAGES + s->position[i] / 64) *
                                                   37 % N_PAGES * 64 +
                                               s->position[i] % 64);
            }
        end(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(interleave),
        cmocka_unit_test(zigzag),
        cmocka_unit_test(ragged_prompts_shorter_than_the_group),
        cmocka_unit_test(prompts_behind_a_prefix),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
