/* Sampling and log-probabilities where every member has the logits of some ids (parallel.md 2.6), against the operations that see
 * whole rows: random rows, rows full of ties, flat and peaked ones, with every parameter, changes, masks and uneven cuts. The
 * token must be the same to the bit; a row may be given back (-3) only where no sum over the best ids of each member can tell. */
#include <config.h>

#include "cpu_test.h"

#include <float.h>
#include <stdbool.h>
#include <string.h>

enum {
    ROWS = 600,
    VOCAB = 701,
    CHUNK = 37, /* head rows of one call: not a divisor of ROWS */
    CHANGES = 6 * ROWS,
    MEMBERS_MAX = 7,
    WHOLE = -3, /* "sample this row from its whole logits" */
};

typedef struct world { /* row i is head row i and slot i */
    test_cpu cpu;
    uint64_t random;
    float logits[ROWS][VOCAB];
    uint32_t has_token[(VOCAB + 31) / 32];
    int32_t n, n_head, token[ROWS], slot[ROWS], position[ROWS], head_row[ROWS], target[ROWS];
    int32_t last_token[ROWS], length[ROWS];
    tr_slot_open sampling[ROWS];
    tr_rows rows;
    tr_slots slots;
    struct {
        tr_plan head;
        tr_logit_change changes[CHANGES];
    } plan;
    int n_members, first[MEMBERS_MAX + 1]; /* member i has ids [first[i], first[i + 1]) */
    /* What the operations on whole rows say, and what those on parts do. */
    struct outcome {
        int32_t token[ROWS], last[ROWS], rank[ROWS], top_token[ROWS][TR_MAX_LOGPROBS];
        float logprob[ROWS], top_logprob[ROWS][TR_MAX_LOGPROBS];
    } whole, parts;
    void *workspace;
    size_t workspace_bytes;
} world;

static int below(world *w, int n)
{
    return (int)(test_bits(&w->random) % (uint64_t)n);
}

/* ---- rows ------------------------------------------------------------------------------------ */

enum { SMOOTH, TIES, FLAT, PEAKED, HUGE_ONES, ONE_MEMBER, N_KINDS };

static float logit_of(world *w, int kind, int id)
{
    const float x = test_float(&w->random);

    switch (kind) {
    case TIES:
        return (float)((int)(x * 4)); /* -3 .. 3: a hundred ids of every value, 0 and -0 */
    case FLAT:
        return 1.5f;
    case PEAKED:
        return below(w, 40) ? x * 4 - 20 : x * 6;
    case HUGE_ONES:
        return below(w, 3) ? x * FLT_MAX : x * 1e30f;
    case ONE_MEMBER: /* all of the mass lies with few neighbours */
        return id / 60 == 5 ? x * 3 : x - 60;
    default:
        return x * 5;
    }
}

static tr_slot_open random_parameters(world *w, int row)
{
    static const float temperature[] = {0, 0.9e-5f, 0.2f, 0.7f, 1, 1.9f};
    static const float top_p[] = {1, 1, 0.999f, 0.95f, 0.5f, 1e-6f};
    static const float min_p[] = {0, 0, 0, 0.01f, 0.3f, 1};
    static const int top_k[] = {0, 0, -1, 1, 5, 64, 65, 300, VOCAB, INT32_MAX};

    return (tr_slot_open){.key = test_bits(&w->random),
                          .slot = row,
                          .top_k = top_k[below(w, 10)],
                          .n_logprobs = below(w, 3) ? below(w, TR_MAX_LOGPROBS + 1) : -1,
                          .n_prompt_logprobs = below(w, 2) ? below(w, TR_MAX_LOGPROBS + 1) : -1,
                          .temperature = temperature[below(w, 6)],
                          .top_p = top_p[below(w, 6)],
                          .min_p = min_p[below(w, 6)]};
}

static void random_changes(world *w, int row)
{
    int id = below(w, VOCAB / 3);

    for (int i = below(w, 6); i > 0 && id < VOCAB; i--, id += 1 + below(w, 150)) {
        tr_logit_change *c = &w->plan.changes[w->plan.head.n_changes++];
        *c = (tr_logit_change){.head_row = row,
                               .token = id,
                               .bias = below(w, 4) ? 2 * test_float(&w->random) : -INFINITY,
                               .repetition = below(w, 2) ? 1 : 1.3f,
                               .penalty = below(w, 2) ? 0 : test_float(&w->random)};
    }
}

static void make_rows(world *w)
{
    w->plan.head.n_changes = 0;
    for (int i = 0; i < ROWS; i++) {
        const int kind = below(w, N_KINDS);
        for (int id = 0; id < VOCAB; id++)
            w->logits[i][id] = logit_of(w, kind, id);
        w->slot[i] = i;
        w->head_row[i] = i;
        w->position[i] = below(w, 5000);
        w->target[i] = below(w, 6) ? -1 : below(w, VOCAB);
        w->sampling[i] = random_parameters(w, i);
        w->last_token[i] = -88;
        if (below(w, 2)) random_changes(w, i);
        if (below(w, 25) == 0) w->logits[i][below(w, VOCAB)] = below(w, 2) ? NAN : INFINITY;
    }
    for (int id = 0; id < VOCAB;
         id++) { /* some ids have no token; of two whole words nobody has one */
        const uint32_t bit = 1u << (id % 32);
        if (below(w, 20) && id / 32 != 3 && id / 32 != 4)
            w->has_token[id / 32] |= bit;
        else
            w->has_token[id / 32] &= ~bit;
    }
}

/* Uneven, and the last member may have very few. */
static void cut(world *w, int n_members)
{
    w->n_members = n_members;
    w->first[0] = 0;
    for (int i = 1; i < n_members; i++)
        w->first[i] = w->first[i - 1] + 1 + below(w, 2 * VOCAB / n_members - 1);
    for (int i = n_members - 1; i > 0 && w->first[i] >= VOCAB - (n_members - i); i--)
        w->first[i] = VOCAB - (n_members - i);
    w->first[n_members] = VOCAB;
    for (int i = 0; i < n_members; i++)
        assert_true(w->first[i] < w->first[i + 1]);
}

static int setup(void **state)
{
    world *w = calloc(1, sizeof *w);

    if (!w) return -1;
    w->random = 20;
    assert_true(test_cpu_open(&w->cpu, 0, 1));
    w->n = w->n_head = ROWS;
    w->rows = (tr_rows){.n_max = ROWS,
                        .n_head_max = ROWS,
                        .n = &w->n,
                        .n_head = &w->n_head,
                        .token = w->token,
                        .slot = w->slot,
                        .position = w->position,
                        .head_row = w->head_row,
                        .target = w->target};
    w->slots = (tr_slots){
        .n_slots = ROWS, .length = w->length, .last_token = w->last_token, .sampling = w->sampling};
    w->plan.head.at_changes = (uint32_t)((const char *)w->plan.changes - (const char *)&w->plan);
    w->workspace_bytes = w->cpu.ops->sample_workspace(CHUNK, VOCAB);
    w->workspace = malloc(w->workspace_bytes);
    *state = w;
    return w->workspace ? 0 : -1;
}

static int teardown(void **state)
{
    world *w = *state;

    w->cpu.ops->close(w->cpu.d);
    free(w->workspace);
    free(w);
    return 0;
}

/* ---- both ways --------------------------------------------------------------------------------- */

#define RUN(w, op, ...)                                                                            \
    assert_int_equal(                                                                              \
        (w)->cpu.ops->op((w)->cpu.d, TR_LANE_MAIN, &(struct tr_##op##_args){__VA_ARGS__}), TR_OK)

/* Head rows [i, i + n) from whole rows. */
static void from_whole(world *w, int i, int n, struct outcome *o)
{
    RUN(w, sample, .rows = &w->rows, .i_head = i, .n_rows = n, .n_vocab = VOCAB,
        .logits = w->logits[i], .ld = VOCAB, .has_token = w->has_token, .slots = w->slots,
        .plan = &w->plan.head, .token_out = o->token, .workspace = w->workspace,
        .workspace_bytes = w->workspace_bytes);
}

/* And from parts; *n_whole: rows that were given back. */
static void from_parts(world *w, int i, int n, struct outcome *o, int *n_whole)
{
    tr_sample_part *part = test_alloc((size_t)w->n_members * (size_t)n, sizeof *part);

    for (int m = 0; m < w->n_members; m++) {
        memset(w->workspace, 0xa5, w->workspace_bytes);
        RUN(w, sample_part, .rows = &w->rows, .i_head = i, .n_rows = n, .first = w->first[m],
            .n_vocab = w->first[m + 1] - w->first[m], .logits = w->logits[i] + w->first[m],
            .ld = VOCAB, .has_token = w->has_token, .slots = w->slots, .plan = &w->plan.head,
            .part = part + (size_t)m * (size_t)n, .workspace = w->workspace,
            .workspace_bytes = w->workspace_bytes);
    }
    RUN(w, sample_merge, .rows = &w->rows, .i_head = i, .n_rows = n, .n_members = w->n_members,
        .part = part, .slots = w->slots, .token_out = o->token);
    for (int r = i; r < i + n; r++) {
        if (o->token[r] != WHOLE) continue;
        assert_int_equal(w->last_token[r], -88);
        from_whole(w, r, 1, o); /* as the model does */
        ++*n_whole;
    }
    free(part);
}

static void logprobs_of_parts(world *w, int i, int n, struct outcome *o)
{
    const size_t count = (size_t)w->n_members * (size_t)n;
    tr_logprob_part *part = test_alloc(count, sizeof *part);
    int32_t *better = test_alloc(count, sizeof *better);

    for (int m = 0; m < w->n_members; m++)
        RUN(w, logprob_part, .rows = &w->rows, .i_head = i, .n_rows = n, .first = w->first[m],
            .n_vocab = w->first[m + 1] - w->first[m], .logits = w->logits[i] + w->first[m],
            .ld = VOCAB, .slots = w->slots, .token_out = o->token,
            .part = part + (size_t)m * (size_t)n);
    for (int m = 0; m < w->n_members; m++)
        RUN(w, logprob_rank, .rows = &w->rows, .i_head = i, .n_rows = n, .first = w->first[m],
            .n_vocab = w->first[m + 1] - w->first[m], .n_members = w->n_members,
            .logits = w->logits[i] + w->first[m], .ld = VOCAB, .slots = w->slots,
            .token_out = o->token, .part = part, .better = better + (size_t)m * (size_t)n);
    RUN(w, logprob_merge, .rows = &w->rows, .i_head = i, .n_rows = n, .n_members = w->n_members,
        .slots = w->slots, .token_out = o->token, .part = part, .better = better,
        .logprob = o->logprob, .rank = o->rank, .top_token = o->top_token[0],
        .top_logprob = o->top_logprob[0]);
    free(part);
    free(better);
}

static void forget(world *w, struct outcome *o)
{
    memset(o, 0x7b, sizeof *o); /* rows that nobody writes must stay alike too */
    for (int i = 0; i < ROWS; i++)
        w->last_token[i] = -88;
}

static int both_ways(world *w)
{
    int n_whole = 0;

    forget(w, &w->whole);
    for (int i = 0; i < ROWS; i += CHUNK) {
        from_whole(w, i, CHUNK, &w->whole);
        RUN(w, logprobs, .rows = &w->rows, .i_head = i, .n_rows = CHUNK, .n_vocab = VOCAB,
            .logits = w->logits[i], .ld = VOCAB, .slots = w->slots, .token_out = w->whole.token,
            .logprob = w->whole.logprob, .rank = w->whole.rank, .top_token = w->whole.top_token[0],
            .top_logprob = w->whole.top_logprob[0]);
    }
    memcpy(w->whole.last, w->last_token, sizeof w->last_token);
    forget(w, &w->parts);
    for (int i = 0; i < ROWS; i += CHUNK) {
        const int n = ROWS - i < CHUNK ? ROWS - i : CHUNK;
        from_parts(w, i, n, &w->parts, &n_whole);
        logprobs_of_parts(w, i, n, &w->parts);
    }
    memcpy(w->parts.last, w->last_token, sizeof w->last_token);
    return n_whole;
}

static void assert_near(int row, const char *what, float got, float want)
{
    /* The sums are made in another order, in double; one rounding to float. */
    const double bound = 1e-6 + 4 * FLT_EPSILON * fabs((double)want);
    const bool same = got == want || (isnan(got) && isnan(want)); /* two huge logits: -Inf */
    if (!same && !(fabs((double)got - (double)want) <= bound))
        fail_msg("row %d: %s %.9g instead of %.9g", row, what, (double)got, (double)want);
}

static void assert_alike(const world *w)
{
    const struct outcome *a = &w->whole, *b = &w->parts;

    for (int i = 0; i < ROWS; i++) {
        if (a->token[i] != b->token[i])
            fail_msg("row %d of %d members: token %d instead of %d (temperature %g, top_k %d, "
                     "top_p %g, min_p %g)",
                     i, w->n_members, b->token[i], a->token[i], (double)w->sampling[i].temperature,
                     w->sampling[i].top_k, (double)w->sampling[i].top_p,
                     (double)w->sampling[i].min_p);
        assert_int_equal(a->last[i], b->last[i]);
        assert_int_equal(a->rank[i], b->rank[i]);
        assert_near(i, "log-probability", b->logprob[i], a->logprob[i]);
        assert_memory_equal(a->top_token[i], b->top_token[i], sizeof a->top_token[i]);
        for (int k = 0; k < TR_MAX_LOGPROBS; k++)
            assert_near(i, "alternative", b->top_logprob[i][k], a->top_logprob[i][k]);
    }
}

/* ---- tests ------------------------------------------------------------------------------------ */

static void same_as_from_whole_rows(void **state)
{
    static const int n_members[] = {1, 2, 2, 3, 4, MEMBERS_MAX};
    world *w = *state;
    int n_whole = 0, n_drawn = 0;

    for (size_t k = 0; k < sizeof n_members / sizeof *n_members; k++) {
        make_rows(w);
        cut(w, n_members[k]);
        n_whole += both_ways(w);
        assert_alike(w);
        for (int i = 0; i < ROWS; i++)
            n_drawn += w->parts.token[i] >= 0;
    }
    /* Both ways were gone often: rows told by their parts, and rows that had to be looked at whole. */
    if (n_whole < 50 || n_whole > n_drawn / 3)
        fail_msg("%d of %d tokens came from whole rows", n_whole, n_drawn);
}

/* What the best of every member surely tell must not be asked for whole: greedy rows, a top_k within the lists, a nucleus
 * within them. And a flat row must be. */
static void whole_rows_are_rare(void **state)
{
    world *w = *state;

    make_rows(w);
    cut(w, 3);
    for (int i = 0; i < ROWS; i++) {
        static const float hot = 1.9f;
        w->target[i] = -1;
        for (int id = 0; id < VOCAB; id++)
            w->logits[i][id] = i < 150 ? 5 * test_float(&w->random) : i % 2 ? 1.5f : -1.5f;
        if (i >= 100 && i < 150) w->logits[i][300] = 40; /* all of the mass */
        w->sampling[i] = (tr_slot_open){.key = test_bits(&w->random),
                                        .slot = i,
                                        .n_logprobs = -1,
                                        .temperature = i < 50 ? 0 : hot,
                                        .top_k = i < 100 ? TR_PART_BEST : 0,
                                        .top_p = i < 150 ? 0.99f : 1};
    }
    w->plan.head.n_changes = 0;
    memset(w->has_token, 0xff, sizeof w->has_token);
    int n_whole = 0;
    forget(w, &w->parts);
    for (int i = 0; i < 150; i += 50)
        from_parts(w, i, 50, &w->parts, &n_whole);
    assert_int_equal(n_whole, 0);
    from_parts(w, 150, ROWS - 150, &w->parts, &n_whole);
    /* 3 x 64 of 701 equal ids are told in order by 64 of the first member: about nine draws of ten go beyond. */
    assert_in_range(n_whole, (ROWS - 150) * 8 / 10, (ROWS - 150) * 98 / 100);
}

/* The first id of equals, wherever the cut lies: greedy across members. */
static void ties_across_members(void **state)
{
    world *w = *state;

    memset(w->has_token, 0xff, sizeof w->has_token);
    w->plan.head.n_changes = 0;
    for (int i = 0; i < ROWS; i++) {
        for (int id = 0; id < VOCAB; id++)
            w->logits[i][id] = -1;
        w->target[i] = -1;
        w->sampling[i] = (tr_slot_open){.slot = i, .temperature = 0, .top_p = 1, .n_logprobs = 5};
        w->logits[i][600] = 2;
        w->logits[i][i] = i % 2 ? 2 : 2.5f;
        w->logits[i][VOCAB - 1] = 2;
    }
    for (int n = 1; n <= MEMBERS_MAX; n++) {
        cut(w, n);
        assert_int_equal(both_ways(w), 0);
        for (int i = 0; i < ROWS; i++) {
            assert_int_equal(w->parts.token[i], i);
            assert_int_equal(w->parts.rank[i], 1);
            assert_int_equal(w->parts.top_token[i][1], 600);
            assert_int_equal(w->parts.top_token[i][2], VOCAB - 1);
            assert_int_equal(w->parts.top_token[i][3], i == 0 ? 1 : 0);
        }
        assert_alike(w);
    }
}

/* One member's NaN is everybody's; one member without any id that may be drawn is none of the others' business; none at all is
 * the error of the whole row. */
static void nothing_to_draw(void **state)
{
    world *w = *state;

    make_rows(w);
    cut(w, 3);
    for (int i = 0; i < ROWS; i++) {
        for (int id = 0; id < VOCAB; id++)
            w->logits[i][id] = test_float(&w->random);
        w->target[i] = i % 3 == 0 ? 4 : -1;
    }
    memset(w->has_token, 0, sizeof w->has_token);
    assert_int_equal(both_ways(w), 0);
    assert_alike(w);
    for (int i = 0; i < ROWS; i++)
        assert_int_equal(w->parts.token[i], i % 3 == 0 ? -1 : -2);
    for (int id = w->first[1]; id < w->first[2]; id++)
        w->has_token[id / 32] |= 1u << (id % 32);
    both_ways(w);
    assert_alike(w);
    for (int i = 0; i < ROWS; i++)
        if (i % 3) assert_in_range(w->parts.token[i], w->first[1], w->first[2] - 1);
    for (int i = 0; i < ROWS; i++)
        w->logits[i][w->first[2]] = NAN; /* whose ids cannot even be drawn */
    assert_int_equal(both_ways(w), 0);
    assert_alike(w);
    for (int i = 0; i < ROWS; i++)
        assert_int_equal(w->parts.token[i], -2);
}

/* Greedy rows by their 8 bytes, as the largest over all members: the same as from whole rows, targets, masks, NaN and all. */
static void greedy_rows_by_key(void **state)
{
    world *w = *state;
    uint64_t key[ROWS], most[ROWS];

    for (int n_members = 1; n_members <= MEMBERS_MAX; n_members++) {
        make_rows(w);
        cut(w, n_members);
        for (int i = 0; i < ROWS; i++)
            w->sampling[i].temperature = 0;
        if (n_members == 4) memset(w->has_token, 0, sizeof w->has_token);
        forget(w, &w->whole);
        for (int i = 0; i < ROWS; i += CHUNK)
            from_whole(w, i, CHUNK, &w->whole);
        memcpy(w->whole.last, w->last_token, sizeof w->last_token);
        forget(w, &w->parts);
        for (int i = 0; i < ROWS; i += CHUNK) {
            const int n = ROWS - i < CHUNK ? ROWS - i : CHUNK;
            memset(most, 0, sizeof most);
            for (int m = 0; m < n_members; m++) {
                RUN(w, argmax_part, .rows = &w->rows, .i_head = i, .n_rows = n,
                    .first = w->first[m], .n_vocab = w->first[m + 1] - w->first[m],
                    .logits = w->logits[i] + w->first[m], .ld = VOCAB, .has_token = w->has_token,
                    .plan = &w->plan.head, .key = key, .workspace = w->workspace,
                    .workspace_bytes = w->workspace_bytes);
                for (int r = 0; r < n; r++)
                    most[r] = key[r] > most[r] ? key[r] : most[r];
            }
            RUN(w, argmax_take, .rows = &w->rows, .i_head = i, .n_rows = n, .key = most,
                .slots = w->slots, .token_out = w->parts.token);
        }
        assert_memory_equal(w->parts.token, w->whole.token, sizeof w->whole.token);
        assert_memory_equal(w->last_token, w->whole.last, sizeof w->whole.last);
    }
}

static void too_small_a_workspace(void **state)
{
    world *w = *state;
    tr_sample_part part[1];
    struct tr_sample_part_args a = {.rows = &w->rows,
                                    .n_rows = 1,
                                    .n_vocab = 100,
                                    .logits = w->logits[0],
                                    .ld = VOCAB,
                                    .has_token = w->has_token,
                                    .slots = w->slots,
                                    .plan = &w->plan.head,
                                    .part = part,
                                    .workspace = w->workspace,
                                    .workspace_bytes = 799};
    assert_int_equal(w->cpu.ops->sample_part(w->cpu.d, TR_LANE_MAIN, &a), TR_E_MEMORY);
    assert_non_null(strstr(w->cpu.ops->error(w->cpu.d), "799"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_as_from_whole_rows), cmocka_unit_test(whole_rows_are_rare),
        cmocka_unit_test(ties_across_members),     cmocka_unit_test(nothing_to_draw),
        cmocka_unit_test(greedy_rows_by_key),      cmocka_unit_test(too_small_a_workspace),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
