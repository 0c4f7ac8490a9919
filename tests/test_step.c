#include <config.h>

#include <string.h>

#include "cpu_test.h"

/* Plans are written by hand here; model/plan.c has tests of its own. */

enum { SLOTS = 3, PAGES_PER_SLOT = 4, ROWS = 12, HEADS = 8, N_DENSE = 1 };

typedef struct hand_plan {
    union {
        tr_plan plan;
        char bytes[4096];
    } u;
    uint32_t end;
} hand_plan;

static void begin_plan(hand_plan *p)
{
    memset(p, 0, sizeof *p);
    p->u.plan = (tr_plan){.magic = TR_PLAN_MAGIC, .version = TR_PLAN_VERSION, .step = 41};
    p->end = sizeof(tr_plan);
}

static void section(hand_plan *p, uint32_t *at, int32_t *n, const void *data, size_t size,
                    int count)
{
    assert_true(p->end + size * (size_t)count + 8 < sizeof p->u.bytes);
    *at = p->end;
    *n = count;
    memcpy(p->u.bytes + p->end, data, size * (size_t)count);
    p->end = (p->end + (uint32_t)(size * (size_t)count) + 7) / 8 * 8;
}

#define SECTION(p, name, array)                                                                    \
    section(p, &(p)->u.plan.at_##name, &(p)->u.plan.n_##name, array, sizeof *(array),              \
            (int)(sizeof(array) / sizeof *(array)))

typedef struct device_state { /* what a device keeps, and a step's rows */
    int32_t length[SLOTS], last_token[SLOTS], page_table[SLOTS * PAGES_PER_SLOT];
    tr_slot_open sampling[SLOTS];
    int32_t n, n_head, token[ROWS], slot[ROWS], position[ROWS], begin[ROWS], head_row[HEADS],
        target[HEADS];
    int64_t write[ROWS];
    uint8_t dense[ROWS];
} device_state;

static void clear(device_state *s)
{
    memset(s, 0, sizeof *s);
    for (int i = 0; i < SLOTS * PAGES_PER_SLOT; i++)
        s->page_table[i] = -1;
}

static tr_status apply_as(const test_cpu *cpu, device_state *s, const hand_plan *p, int rows_only)
{
    struct tr_plan_apply_args a = {.plan = &p->u.plan, .n_dense = N_DENSE, .rows_only = rows_only};
    a.slots =
        (tr_slots){SLOTS, PAGES_PER_SLOT, s->length, s->last_token, s->page_table, s->sampling};
    a.rows = (tr_rows){.n_max = ROWS, .n_head_max = HEADS, .n = &s->n, .n_head = &s->n_head};
    a.rows.token = s->token, a.rows.slot = s->slot, a.rows.position = s->position;
    a.rows.begin = s->begin;
    a.rows.write = s->write, a.rows.dense = s->dense, a.rows.head_row = s->head_row;
    a.rows.target = s->target, a.rows.page_table = s->page_table;
    a.rows.max_pages = PAGES_PER_SLOT;
    return cpu->ops->plan_apply(cpu->d, TR_LANE_MAIN, &a);
}

static tr_status apply(const test_cpu *cpu, device_state *s, const hand_plan *p)
{
    return apply_as(cpu, s, p, 0);
}

/* One member's rows of spans that context parallelism has dealt out: every third position, none at all, and rows that
 * everybody has; then the same step's rows again, without touching the slots. */
static void parts(void **state)
{
    const test_cpu *cpu = *state;
    device_state s, again;
    hand_plan p;
    clear(&s);
    s.length[1] = 70;
    s.last_token[1] = 9;
    const tr_page_set sets[] = {{0, 0, 4}, {0, 1, 5}, {1, 1, 6}, {2, 0, 7}};
    const int32_t tokens[] = {20, 21, 22, 23, 24, 25, 26, 27, 50}, targets[] = {-1, -1};
    const tr_span spans[] = {
        {.slot = 0,
         .n_rows = 3,
         .position = 61,
         .i_token = 1,
         .n_logits = 1,
         .flags = TR_SPAN_PART,
         .skip = 2,
         .begin = 60,
         .end = 68},
        {.slot = 1, .n_rows = 1, .position = -1, .i_token = -1, .n_logits = 1},
        {.slot = 2,
         .n_rows = 0,
         .position = 0,
         .i_token = 8,
         .flags = TR_SPAN_PART,
         .begin = 0,
         .end = 1},
    };
    begin_plan(&p);
    SECTION(&p, page_sets, sets);
    SECTION(&p, spans, spans);
    SECTION(&p, tokens, tokens);
    SECTION(&p, targets, targets);
    assert_int_equal(apply(cpu, &s, &p), TR_OK);
    const int32_t position[] = {61, 64, 67, 70}, token[] = {21, 24, 27, 9},
                  begin[] = {60, 60, 60, 70}, head_row[] = {2, 3};
    const int64_t write[] = {4 * 64 + 61, 5 * 64, 5 * 64 + 3, 6 * 64 + 6};
    assert_int_equal(s.n, 4);
    assert_int_equal(s.n_head, 2);
    assert_memory_equal(s.position, position, sizeof position);
    assert_memory_equal(s.token, token, sizeof token);
    assert_memory_equal(s.begin, begin, sizeof begin);
    assert_memory_equal(s.write, write, sizeof write);
    assert_memory_equal(s.head_row, head_row, sizeof head_row);
    assert_int_equal(s.length[0], 68);
    assert_int_equal(s.length[1], 71);
    assert_int_equal(s.length[2], 1);

    again = s;
    assert_int_equal(apply_as(cpu, &again, &p, 1), TR_OK);
    assert_memory_equal(&again, &s, sizeof s);
}

/* A prompt's chunk across a page boundary, a scored chunk, and next step's decode rows at the
 * slots' lengths. */
static void steps(void **state)
{
    const test_cpu *cpu = *state;
    device_state s;
    hand_plan p;
    clear(&s);
    s.length[2] = 99;

    const tr_slot_open opens[] = {{.key = 7, .slot = 2, .temperature = 0.5f, .top_k = 3}};
    const tr_page_set sets[] = {{2, 0, 5}, {2, 1, 9}, {0, 0, 4}};
    const int32_t tokens[] = {100, 101, 102, 103, 200, 201}, targets[] = {-1, 201, -1};
    const tr_span spans[] = {
        {.slot = 2, .n_rows = 4, .position = 62, .i_token = 0, .n_logits = 1},
        {.slot = 0, .n_rows = 2, .i_token = 4, .n_logits = 2, .flags = TR_SPAN_DENSE},
    };
    begin_plan(&p);
    SECTION(&p, opens, opens);
    SECTION(&p, page_sets, sets);
    SECTION(&p, tokens, tokens);
    SECTION(&p, targets, targets);
    SECTION(&p, spans, spans);
    assert_int_equal(apply(cpu, &s, &p), TR_OK);
    assert_int_equal(s.n, 6);
    assert_int_equal(s.n_head, 3);
    assert_memory_equal(s.token, tokens, sizeof tokens);
    const int32_t slot[] = {2, 2, 2, 2, 0, 0}, position[] = {62, 63, 64, 65, 0, 1};
    const int64_t write[] = {5 * 64 + 62, 5 * 64 + 63, 9 * 64, 9 * 64 + 1, 4 * 64, 4 * 64 + 1};
    const uint8_t dense[] = {0, 0, 0, 0, 1, 0}; /* the last is behind N_DENSE */
    const int32_t head_row[] = {3, 4, 5};
    assert_memory_equal(s.slot, slot, sizeof slot);
    assert_memory_equal(s.position, position, sizeof position);
    assert_memory_equal(s.write, write, sizeof write);
    assert_memory_equal(s.dense, dense, sizeof dense);
    assert_memory_equal(s.head_row, head_row, sizeof head_row);
    assert_memory_equal(s.target, targets, sizeof targets);
    assert_memory_equal(&s.sampling[2], &opens[0], sizeof opens[0]);
    assert_int_equal(s.length[2], 66);
    assert_int_equal(s.length[0], 2);

    /* What sample would have left. */
    s.last_token[2] = 777;
    s.last_token[0] = 888;
    const tr_span decode[] = {
        {.slot = 0, .n_rows = 1, .position = -1, .i_token = -1, .n_logits = 1},
        {.slot = 2, .n_rows = 1, .position = -1, .i_token = -1, .n_logits = 1},
    };
    const int32_t sample[] = {-1, -1};
    begin_plan(&p);
    SECTION(&p, spans, decode);
    SECTION(&p, targets, sample);
    assert_int_equal(apply(cpu, &s, &p), TR_OK);
    assert_int_equal(s.n, 2);
    assert_int_equal(s.token[0], 888);
    assert_int_equal(s.token[1], 777);
    assert_int_equal(s.position[0], 2);
    assert_int_equal(s.position[1], 66);
    assert_int_equal(s.write[1], 9 * 64 + 2);
    assert_int_equal(s.length[2], 67);

    /* Nothing to do. */
    begin_plan(&p);
    p.u.plan.flags = TR_PLAN_IDLE;
    assert_int_equal(apply(cpu, &s, &p), TR_OK);
    assert_int_equal(s.n, 0);
    assert_int_equal(s.n_head, 0);
}

/* An opened slot starts again from 0, also for a span of the same plan that asks for the length. */
static void reopened_slot(void **state)
{
    device_state s;
    hand_plan p;
    clear(&s);
    s.length[1] = 50;
    s.page_table[PAGES_PER_SLOT] = 3;
    const tr_slot_open opens[] = {{.slot = 1}};
    const int32_t tokens[] = {1, 2};
    const tr_span spans[] = {{.slot = 1, .n_rows = 2, .position = -1, .i_token = 0}};
    begin_plan(&p);
    SECTION(&p, opens, opens);
    SECTION(&p, tokens, tokens);
    SECTION(&p, spans, spans);
    assert_int_equal(apply(*state, &s, &p), TR_OK);
    assert_int_equal(s.position[0], 0);
    assert_int_equal(s.write[1], 3 * 64 + 1);
    assert_int_equal(s.length[1], 2);
    assert_int_equal(s.n_head, 0);
}

/* What a checker of blocks cannot know, and what it should have refused, fails here and leaves no
 * rows. */
static void refused_spans(void **state)
{
    const test_cpu *cpu = *state;
    const tr_span bad[] = {
        {.slot = SLOTS, .n_rows = 1, .i_token = 0},
        {.slot = -1, .n_rows = 1, .i_token = 0},
        {.slot = 0, .n_rows = ROWS + 1, .i_token = -1},
        {.slot = 0, .n_rows = -1, .i_token = 0},
        {.slot = 0, .n_rows = 2, .i_token = -1},
        {.slot = 0, .n_rows = 3, .i_token = 0},
        {.slot = 0, .n_rows = 1, .i_token = 3},
        {.slot = 0, .n_rows = 1, .i_token = 0, .n_logits = 2},
        {.slot = 0, .n_rows = 2, .i_token = 0, .n_logits = 2},  /* one target */
        {.slot = 0, .n_rows = 1, .i_token = 0, .position = 64}, /* no page there */
        {.slot = 0, .n_rows = 1, .i_token = 0, .position = PAGES_PER_SLOT * 64},
        {.slot = 0, .n_rows = 1, .i_token = 0, .position = INT32_MAX},
        {.slot = 1, .n_rows = 1, .i_token = -1, .position = -1}, /* its length is at the end */
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        device_state s;
        hand_plan p;
        const int32_t tokens[] = {1, 2}, targets[] = {-1};
        const tr_page_set sets[] = {{0, 0, 1}};
        const tr_span spans[] = {{.slot = 0, .n_rows = 1, .i_token = 0}, bad[i]};
        clear(&s);
        s.length[1] = PAGES_PER_SLOT * 64;
        s.n = s.n_head = 5;
        begin_plan(&p);
        SECTION(&p, tokens, tokens);
        SECTION(&p, targets, targets);
        SECTION(&p, page_sets, sets);
        SECTION(&p, spans, spans);
        if (apply(cpu, &s, &p) != TR_E_DEVICE) fail_msg("span %zu was taken", i);
        assert_non_null(strstr(cpu->ops->error(cpu->d), "plan 41, span 1"));
        assert_int_equal(s.n, 0);
        assert_int_equal(s.n_head, 0);
    }
}

static void refused_slots(void **state)
{
    const test_cpu *cpu = *state;
    const tr_page_set bad_set[] = {{SLOTS, 0, 1}, {-1, 0, 1}, {0, PAGES_PER_SLOT, 1}, {0, -1, 1}};
    const int32_t bad_slot[] = {-1, SLOTS};
    device_state s;
    hand_plan p;
    for (size_t i = 0; i < sizeof bad_set / sizeof *bad_set; i++) {
        const tr_page_set sets[] = {bad_set[i]};
        clear(&s);
        begin_plan(&p);
        SECTION(&p, page_sets, sets);
        assert_int_equal(apply(cpu, &s, &p), TR_E_DEVICE);
    }
    for (size_t i = 0; i < sizeof bad_slot / sizeof *bad_slot; i++) {
        const tr_slot_open opens[] = {{.slot = bad_slot[i]}};
        clear(&s);
        begin_plan(&p);
        SECTION(&p, opens, opens);
        assert_int_equal(apply(cpu, &s, &p), TR_E_DEVICE);
    }
}

/* Rows [0, n_rows) of latents, keys and scales move; every other byte stays. */
static void check_copy(const test_cpu *cpu, tr_dtype dtype, int with_index)
{
    enum { N_PAGES = 4, D_LATENT = 130, D_ROPE = 6, D_INDEX = 16, FROM = 3, TO = 1 };
    const size_t row = tr_kv_row_bytes(dtype, D_LATENT, D_ROPE);
    const size_t page = tr_index_page_bytes(dtype, D_INDEX);
    const size_t n_latent = N_PAGES * 64 * row, n_index = N_PAGES * page;
    const size_t key = dtype == TR_F32 ? D_INDEX * 4 : D_INDEX;
    uint8_t *latent = test_alloc(n_latent, 1), *index = test_alloc(n_index, 1);
    uint8_t *old = test_alloc(n_latent + n_index, 1);
    uint64_t seed = 31;
    hand_plan p;

    for (int n_rows = 0; n_rows <= 64; n_rows += n_rows ? 21 : 1) {
        const tr_page_copy copies[] = {{FROM, TO, n_rows}};
        struct tr_pages_copy_args a = {.plan = &p.u.plan};
        a.kv = (tr_kv_layer){latent, with_index ? index : NULL, dtype, N_PAGES, D_LATENT, D_ROPE,
                             D_INDEX};
        begin_plan(&p);
        SECTION(&p, copies, copies);
        for (size_t i = 0; i < n_latent; i++)
            old[i] = latent[i] = (uint8_t)test_bits(&seed);
        for (size_t i = 0; i < n_index; i++)
            old[n_latent + i] = index[i] = (uint8_t)test_bits(&seed);
        assert_int_equal(cpu->ops->pages_copy(cpu->d, TR_LANE_MAIN, &a), TR_OK);
        const size_t n = (size_t)n_rows;
        for (size_t i = 0; i < n_latent; i++) {
            size_t begin = TO * 64 * row;
            size_t from = i >= begin && i < begin + n * row ? i + (FROM - TO) * 64 * row : i;
            assert_int_equal(latent[i], old[from]);
        }
        for (size_t i = 0; i < n_index; i++) {
            size_t in_page = i % page;
            int moved = with_index && i / page == TO &&
                        (in_page < 64 * key ? in_page < n * key : in_page < 64 * key + n * 4);
            assert_int_equal(index[i], old[n_latent + i + (moved ? (FROM - TO) * page : 0)]);
        }
    }
    free(latent);
    free(index);
    free(old);
}

static void copies(void **state)
{
    check_copy(*state, TR_E4M3, 1);
    check_copy(*state, TR_BF16, 1);
    check_copy(*state, TR_F32, 1);
    check_copy(*state, TR_E4M3, 0);
}

static void refused_copies(void **state)
{
    const test_cpu *cpu = *state;
    const tr_page_copy bad[] = {{0, 2, 1},  {2, 0, 1},  {-1, 0, 1}, {0, -1, 1},
                                {0, 1, 65}, {0, 1, -1}, {1, 1, 3}};
    float latent[2 * 64 * 8];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        hand_plan p;
        const tr_page_copy one[] = {bad[i]};
        struct tr_pages_copy_args a = {.plan = &p.u.plan};
        a.kv = (tr_kv_layer){latent, NULL, TR_F32, 2, 4, 4, 0};
        begin_plan(&p);
        SECTION(&p, copies, one);
        assert_int_equal(cpu->ops->pages_copy(cpu->d, TR_LANE_MAIN, &a), TR_E_DEVICE);
    }
}

int main(void)
{
    test_cpu cpu;
    tr_err err;
    if (tr_device_open(&cpu.d, &cpu.ops, &(tr_device_options){.name = "cpu", .n_threads = 1},
                       &err)) {
        fprintf(stderr, "test_step: %s\n", err.text);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(steps, &cpu),
        cmocka_unit_test_prestate(parts, &cpu),
        cmocka_unit_test_prestate(reopened_slot, &cpu),
        cmocka_unit_test_prestate(refused_spans, &cpu),
        cmocka_unit_test_prestate(refused_slots, &cpu),
        cmocka_unit_test_prestate(copies, &cpu),
        cmocka_unit_test_prestate(refused_copies, &cpu),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cpu.ops->close(cpu.d);
    return failed;
}
