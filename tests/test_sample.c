/* Philox, the sampler and the log-probabilities of the CPU backend, against exact distributions. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/kernels.h"
#include "kernels/philox.h"

enum {
    ROWS = 512, /* enough work for several threads */
    SLOTS = 4,
    VOCAB = 70,
    WIDE = 80 /* row stride: more than VOCAB */,
    CHANGES = 200
};

typedef struct
    bench { /* a step whose every row reaches the head; row i is slot i % SLOTS, position 10 i */
    tr_device *device;
    const tr_ops *ops;
    float logits[ROWS][WIDE];
    uint32_t has_token[(VOCAB + 31) / 32];
    int32_t n, n_head, token[ROWS], slot[ROWS], position[ROWS], head_row[ROWS], target[ROWS];
    int32_t last_token[SLOTS], length[SLOTS];
    tr_slot_open sampling[SLOTS];
    tr_rows rows;
    tr_slots slots;
    struct {
        tr_plan head;
        tr_logit_change changes[CHANGES];
    } plan;
    int32_t token_out[ROWS], rank[ROWS], top_token[ROWS][TR_MAX_LOGPROBS];
    float logprob[ROWS], top_logprob[ROWS][TR_MAX_LOGPROBS];
    void *workspace;
    size_t workspace_bytes;
} bench;

static float random_logit(uint64_t *x)
{
    *x = *x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (float)((double)(*x >> 40) * 0x1p-24 * 8 - 4);
}

static void open_device(bench *b, int n_threads)
{
    tr_err err;

    if (b->device) b->ops->close(b->device);
    if (tr_device_open(&b->device, &b->ops,
                       &(tr_device_options){.name = "cpu", .n_threads = n_threads}, &err) != TR_OK)
        fail_msg("%s", err.text);
}

static int setup(void **state)
{
    bench *b = calloc(1, sizeof *b);
    uint64_t random = 1;

    if (!b) return -1;
    open_device(b, 1); /* several threads: draws_do_not_depend_on_neighbours */
    for (int i = 0; i < ROWS; i++) {
        for (int k = 0; k < WIDE; k++)
            b->logits[i][k] = k < VOCAB ? random_logit(&random) : NAN; /* the padding is nobody's */
        b->slot[i] = i % SLOTS;
        b->position[i] = 10 * i;
        b->head_row[i] = i;
        b->target[i] = -1;
        b->token_out[i] = -77;
    }
    memset(b->has_token, 0xff, sizeof b->has_token);
    for (int i = 0; i < SLOTS; i++) {
        b->last_token[i] = -88;
        b->sampling[i] = (tr_slot_open){.key = 1000 + (uint64_t)i,
                                        .slot = i,
                                        .n_logprobs = -1,
                                        .n_prompt_logprobs = -1,
                                        .temperature = 1,
                                        .top_p = 1};
    }
    b->n = b->n_head = ROWS;
    b->rows = (tr_rows){.n_max = ROWS,
                        .n_head_max = ROWS,
                        .n = &b->n,
                        .n_head = &b->n_head,
                        .token = b->token,
                        .slot = b->slot,
                        .position = b->position,
                        .head_row = b->head_row,
                        .target = b->target};
    b->slots = (tr_slots){.n_slots = SLOTS,
                          .length = b->length,
                          .last_token = b->last_token,
                          .sampling = b->sampling};
    b->plan.head.at_changes = (uint32_t)((const char *)b->plan.changes - (const char *)&b->plan);
    b->workspace_bytes = b->ops->sample_workspace(ROWS, VOCAB);
    b->workspace = malloc(b->workspace_bytes);
    *state = b;
    return b->workspace ? 0 : -1;
}

static int teardown(void **state)
{
    bench *b = *state;

    b->ops->close(b->device);
    free(b->workspace);
    free(b);
    return 0;
}

/* Head rows [i_head, i_head + n). */
static tr_status sample(bench *b, int i_head, int n)
{
    return b->ops->sample(b->device, TR_LANE_MAIN,
                          &(struct tr_sample_args){.rows = &b->rows,
                                                   .i_head = i_head,
                                                   .n_rows = n,
                                                   .n_vocab = VOCAB,
                                                   .logits = b->logits[i_head],
                                                   .ld = WIDE,
                                                   .has_token = b->has_token,
                                                   .slots = b->slots,
                                                   .plan = &b->plan.head,
                                                   .token_out = b->token_out,
                                                   .workspace = b->workspace,
                                                   .workspace_bytes = b->workspace_bytes});
}

static void logprobs(bench *b, int i_head, int n)
{
    struct tr_logprobs_args args = {.rows = &b->rows,
                                    .i_head = i_head,
                                    .n_rows = n,
                                    .n_vocab = VOCAB,
                                    .logits = b->logits[i_head],
                                    .ld = WIDE,
                                    .slots = b->slots,
                                    .token_out = b->token_out,
                                    .logprob = b->logprob,
                                    .rank = b->rank,
                                    .top_token = b->top_token[0],
                                    .top_logprob = b->top_logprob[0]};
    assert_int_equal(b->ops->logprobs(b->device, TR_LANE_MAIN, &args), TR_OK);
}

static void add_change(bench *b, int32_t head_row, int32_t token, float bias, float repetition,
                       float penalty)
{
    assert_true(b->plan.head.n_changes < CHANGES);
    b->plan.changes[b->plan.head.n_changes++] = (tr_logit_change){.head_row = head_row,
                                                                  .token = token,
                                                                  .bias = bias,
                                                                  .repetition = repetition,
                                                                  .penalty = penalty};
}

/* ---- random numbers -------------------------------------------------------------------------- */

/* The known answers that come with the authors' Random123. */
static void philox_known_answers(void **state)
{
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } cases[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    uint32_t out[4];

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tr_philox(cases[i].counter, cases[i].key, out);
        assert_memory_equal(out, cases[i].out, sizeof out);
    }
    memcpy(out, cases[2].counter, sizeof out);
    tr_philox(out, cases[2].key, out); /* in place */
    assert_memory_equal(out, cases[2].out, sizeof out);
}

static void uniform_numbers(void **state)
{
    enum { N = 100000 };
    double sum = 0, squares = 0, pairs = 0, before = 0;

    (void)state;
    for (uint32_t i = 0; i < N; i++) {
        double u = tr_philox_uniform(UINT64_C(0x123456789abcdef), i, TR_PHILOX_SAMPLE);
        assert_true(u >= 0 && u < 1);
        sum += u;
        squares += u * u;
        pairs += u * before;
        before = u;
    }
    assert_true(fabs(sum / N - 0.5) < 0.004 && fabs(squares / N - 1.0 / 3) < 0.004 &&
                fabs(pairs / N - 0.25) < 0.004);
    assert_true(tr_philox_uniform(1, 5, 0) != tr_philox_uniform(UINT64_C(1) << 32, 5, 0));
    assert_true(tr_philox_uniform(1, 5, 0) != tr_philox_uniform(1, 5, 1));
}

/* ---- greedy ---------------------------------------------------------------------------------- */

static void make_greedy(bench *b)
{
    for (int i = 0; i < SLOTS; i++)
        b->sampling[i].temperature = 0.9e-5f;
}

static void set_best(bench *b, int row, int32_t id, float by)
{
    float most = b->logits[row][0];

    for (int i = 1; i < VOCAB; i++)
        if (b->logits[row][i] > most) most = b->logits[row][i];
    b->logits[row][id] = most + by;
}

static void greedy(void **state)
{
    bench *b = *state;

    make_greedy(b);
    set_best(b, 0, 40, 1);
    set_best(b, 0, 33, 0); /* a tie: the smaller id */
    set_best(b, 1, 7, 2);
    set_best(b, 1, 8, 1);
    set_best(b, 1, 7, 0);  /* 7 is the best, a tie with itself */
    set_best(b, 2, 20, 1); /* has no token: masked */
    b->logits[2][5] = b->logits[2][20] - 0.5f;
    b->has_token[0] &= ~(UINT32_C(1) << 20);
    set_best(b, 3, 69, 1); /* the last id of all */
    b->target[4] = 12;
    for (int i = 0; i < VOCAB; i++) { /* -0 and 0 are a tie; all negative otherwise */
        b->logits[5][i] = i == 5 ? -0.0f : i == 8 ? 0.0f : -1e-30f;
        b->logits[6][i] = -3;
    }
    b->logits[6][2] = 2.5f, b->logits[6][60] = 2;
    add_change(b, 6, 60, 0, 1e-38f, 0); /* past fp32's range, and still the best */
    assert_int_equal(sample(b, 5, 2), TR_OK);
    assert_int_equal(b->token_out[5], 5);
    assert_int_equal(b->token_out[6], 60);
    b->token_out[5] = -77;
    assert_int_equal(sample(b, 0, 5), TR_OK);
    assert_int_equal(b->token_out[0], 33);
    assert_int_equal(b->token_out[1], 7);
    assert_int_equal(b->token_out[2], 5);
    assert_int_equal(b->token_out[3], 69);
    assert_int_equal(b->token_out[4], -1);
    assert_int_equal(b->token_out[5], -77); /* not in the chunk */
    assert_int_equal(b->last_token[0], 33); /* row 4 is of slot 0 too, and a target */
    assert_int_equal(b->last_token[3], 69);
    /* A second chunk, of which only two rows live; the last row of a slot counts. */
    b->n_head = 10;
    set_best(b, 9, 3, 1);
    assert_int_equal(sample(b, 8, 16), TR_OK);
    assert_int_equal(b->last_token[1], 3);
    assert_int_equal(b->token_out[10], -77);
    assert_int_equal(b->last_token[2], 5);
}

static void changes_in_order(void **state)
{
    bench *b = *state;

    make_greedy(b);
    for (int r = 0; r < 8; r++)
        for (int i = 0; i < VOCAB; i++)
            b->logits[r][i] = -50;
    /* Row 0: the mask of a bias of -inf. */
    b->logits[0][3] = 9, b->logits[0][4] = 8;
    add_change(b, 0, 3, -INFINITY, 1, 0);
    /* Row 1: bias first, then the division: (2 + 4) / 2 = 3 < 3.5, although 2 / 2 + 4 = 5 would
     * win. */
    b->logits[1][10] = 2, b->logits[1][11] = 3.5f;
    add_change(b, 1, 10, 4, 2, 0);
    /* Row 2: a negative one is multiplied: -1 * 2 = -2 < -1.5; dividing would give -0.5. */
    b->logits[2][10] = -1, b->logits[2][11] = -1.5f;
    add_change(b, 2, 10, 0, 2, 0);
    /* Row 3: the penalty comes last: 6 / 2 - 1 = 2 < 2.4; (6 - 1) / 2 = 2.5 would win. */
    b->logits[3][10] = 6, b->logits[3][11] = 2.4f;
    add_change(b, 3, 10, 0, 2, 1);
    /* Row 5: several, to both sides; the first and the last id; row 4 has none. */
    b->logits[4][1] = 1;
    add_change(b, 5, 0, 60, 1, 0);
    add_change(b, 5, 30, 1, 1, -2);
    add_change(b, 5, 69, 60.5f, 1, 0);
    /* Row 6: the sign after the bias decides: 1 - 2 = -1, times 2 = -2 < -1.9; before it: 1 / 2 - 2
     * = -1.5. */
    b->logits[6][10] = 1, b->logits[6][11] = -1.9f;
    add_change(b, 6, 10, -2, 2, 0);
    /* Row 7: a change of an id without token stays without effect. */
    b->logits[7][1] = 1;
    add_change(b, 7, 20, 100, 1, 0);
    b->has_token[0] &= ~(UINT32_C(1) << 20);
    assert_int_equal(sample(b, 0, 4), TR_OK);
    assert_int_equal(sample(b, 4, 4),
                     TR_OK); /* changes count head rows of the step, not of the chunk */
    static const int32_t expected[] = {4, 11, 11, 11, 1, 69, 11, 1};
    assert_memory_equal(b->token_out, expected, sizeof expected);
}

static void not_a_number(void **state)
{
    bench *b = *state;

    b->logits[0][69] = NAN;
    b->logits[1][0] = INFINITY;
    b->logits[2][30] = -INFINITY;
    b->target[2] = 3;
    b->logits[3][20] = -NAN;
    b->has_token[0] &= ~(UINT32_C(1) << 20); /* even where nothing can be drawn */
    for (int i = 0; i < VOCAB; i++)
        add_change(b, 4, i, -INFINITY, 1, 0);
    make_greedy(b);
    for (int round = 0; round < 2; round++) {
        assert_int_equal(sample(b, 0, 6), TR_OK);
        for (int r = 0; r < 5; r++)
            assert_int_equal(b->token_out[r], -2);
        assert_true(b->token_out[5] >= 0);
        assert_int_equal(b->last_token[3], -88);
        b->sampling[0].temperature = 1;
    }
    b->sampling[0].n_logprobs = 2;
    b->rank[0] = 99;
    logprobs(b, 0, 1);
    assert_int_equal(b->rank[0], 99); /* left alone */
    b->workspace_bytes = VOCAB;
    assert_int_equal(sample(b, 0, 6), TR_E_MEMORY);
    assert_non_null(strstr(b->ops->error(b->device), "workspace"));
}

/* ---- the distribution ------------------------------------------------------------------------ */

typedef struct ranked {
    double logit;
    int32_t id;
} ranked;

static int compare_ranked(const void *a, const void *b)
{
    const ranked *x = a, *y = b;

    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

/* chat.md 4.2 read aloud: the exact probability of each id of row 0. Returns the size of the
 * set. */
static int exact(const bench *b, double p[VOCAB])
{
    const tr_slot_open *s = &b->sampling[0];
    ranked list[VOCAB];
    double total = 0, sum = 0;
    int n = 0;

    for (int i = 0; i < VOCAB; i++) {
        p[i] = 0;
        if (b->has_token[i / 32] >> (i % 32) & 1)
            list[n++] = (ranked){(double)b->logits[0][i] / (double)s->temperature, i};
    }
    qsort(list, (size_t)n, sizeof *list, compare_ranked);
    double most = list[0].logit;
    while (exp(list[n - 1].logit - most) < (double)s->min_p)
        n--;
    if (s->top_k > 0 && s->top_k < n) n = s->top_k;
    for (int i = 0; i < n; i++)
        total += exp(list[i].logit - most);
    if (s->top_p < 1)
        for (int i = 0; i < n; i++) {
            sum += exp(list[i].logit - most) / total;
            if (sum >= (double)s->top_p) n = i + 1;
        }
    total = 0;
    for (int i = 0; i < n; i++)
        total += exp(list[i].logit - most);
    for (int i = 0; i < n; i++)
        p[list[i].id] = exp(list[i].logit - most) / total;
    return n;
}

/* n_draws of row 0's distribution, at ever new positions and keys. */
static void count_draws(bench *b, int n_draws, int count[VOCAB])
{
    memset(count, 0, VOCAB * sizeof *count);
    for (int r = 1; r < ROWS; r++)
        memcpy(b->logits[r], b->logits[0], sizeof b->logits[0]);
    for (int i = 1; i < SLOTS; i++) {
        uint64_t key = b->sampling[i].key;
        b->sampling[i] = b->sampling[0];
        b->sampling[i].key = key;
    }
    for (int i = 0; i < n_draws / ROWS; i++) {
        for (int r = 0; r < ROWS; r++)
            b->position[r] = i * ROWS + r;
        assert_int_equal(sample(b, 0, ROWS), TR_OK);
        for (int r = 0; r < ROWS; r++) {
            assert_true(b->token_out[r] >= 0 && b->token_out[r] < VOCAB);
            count[b->token_out[r]]++;
        }
    }
}

/* Nothing outside the set, and chi-square of the inside below mean + 4 sigma (the draws are always
 * the same). */
static void check_distribution(bench *b, int n_draws, int expected_size)
{
    double p[VOCAB], chi2 = 0, rest_p = 0, rest_n = 0;
    int count[VOCAB], freedom = -1;

    n_draws = n_draws / ROWS * ROWS;
    assert_int_equal(exact(b, p), expected_size);
    count_draws(b, n_draws, count);
    for (int i = 0; i < VOCAB; i++) {
        double expected = p[i] * n_draws;
        if (p[i] == 0) {
            if (count[i]) fail_msg("id %d is not in the set", i);
        } else if (expected < 10) { /* too rare for chi-square: counted together */
            rest_p += expected;
            rest_n += count[i];
        } else {
            chi2 += (count[i] - expected) * (count[i] - expected) / expected;
            freedom++;
        }
    }
    if (rest_p > 10) {
        chi2 += (rest_n - rest_p) * (rest_n - rest_p) / rest_p;
        freedom++;
    }
    if (chi2 > freedom + 4 * sqrt(2.0 * freedom) + 1e-9)
        fail_msg("chi-square %.1f of %d", chi2, freedom);
}

static void all_of_it(void **state)
{
    bench *b = *state;

    check_distribution(b, 200000, VOCAB);
    b->sampling[0].temperature = 0.5f;
    b->has_token[1] &= ~UINT32_C(0xff0);
    check_distribution(b, 50000, VOCAB - 8);
}

static void filters(void **state)
{
    bench *b = *state;
    tr_slot_open *s = &b->sampling[0], all = *s;

    /* Probabilities of ids 10..14: 16/32, 8/32, 4/32, 2/32, 2/32. */
    for (int i = 0; i < VOCAB; i++)
        b->logits[0][i] = -200;
    for (int i = 0; i < 5; i++)
        b->logits[0][10 + i] = logf(i < 4 ? (float)(16 >> i) : 2);
    s->top_k = 3;
    check_distribution(b, 6400, 3);
    s->top_k = 4; /* of the tie the smaller id */
    check_distribution(b, 6400, 4);
    s->top_k = 1;
    check_distribution(b, 640, 1);
    *s = all;
    s->top_p = 0.49f;
    check_distribution(b, 640, 1);
    s->top_p = 0.51f; /* the one that crosses stays */
    check_distribution(b, 6400, 2);
    s->top_p = 0.76f;
    check_distribution(b, 6400, 3);
    s->top_p = 1e-9f;
    check_distribution(b, 640, 1);
    *s = all;
    s->min_p = 0.2f; /* 4/16 stays, 2/16 goes */
    check_distribution(b, 6400, 3);
    s->min_p = 1;
    check_distribution(b, 640, 1);
    /* Together, each on what the one before left: min_p leaves 16, 8, 4; top_k 16, 8; top_p is of
     * 24: 16/24 < 0.7. */
    s->min_p = 0.2f, s->top_k = 2, s->top_p = 0.7f;
    check_distribution(b, 6400, 2);
    s->top_p = 0.66f;
    check_distribution(b, 640, 1);
    /* Temperature comes before them: at 2 the ratios are roots, and min_p 0.3 keeps 4/16 -> 0.5 and
     * 2/16 -> 0.35. */
    *s = all;
    s->temperature = 2, s->min_p = 0.3f;
    check_distribution(b, 6400, 5);
    s->temperature = 1e-5f; /* not greedy yet, and no overflow */
    s->min_p = 0;
    assert_int_equal(sample(b, 0, 1), TR_OK);
    assert_int_equal(b->token_out[0], 10);
}

static void random_parameters(void **state)
{
    static const float top_p[] = {1, 0.95f, 0.5f, 0.1f}, min_p[] = {0, 0.01f, 0.2f},
                       temperature[] = {0.3f, 1, 2};
    static const int32_t top_k[] = {-1, 0, 5, 40, 1000};
    bench *b = *state;
    double p[VOCAB];

    for (int i = 0; i < VOCAB; i += 3)
        b->logits[0][i] = b->logits[0][i / 2]; /* ties */
    for (int i = 0; i < 4 * 3 * 3 * 5; i++) {
        tr_slot_open *s = &b->sampling[0];
        s->top_p = top_p[i % 4];
        s->min_p = min_p[i / 4 % 3];
        s->temperature = temperature[i / 12 % 3];
        s->top_k = top_k[i / 36];
        check_distribution(b, 3 * ROWS, exact(b, p));
    }
}

/* The draw, exactly: the inverse of the cumulative distribution, best first, at the number of (key,
 * position + 1). */
static void the_number_decides(void **state)
{
    bench *b = *state;
    double p[VOCAB];
    ranked list[VOCAB];

    b->sampling[0].top_k = 30;
    exact(b, p);
    for (int i = 0; i < VOCAB; i++)
        list[i] = (ranked){p[i], i};
    qsort(list, VOCAB, sizeof *list, compare_ranked);
    for (int r = 0; r < ROWS; r += SLOTS) {
        memcpy(b->logits[r], b->logits[0], sizeof b->logits[0]);
        double u = tr_philox_uniform(b->sampling[0].key, (uint32_t)b->position[r] + 1,
                                     TR_PHILOX_SAMPLE),
               sum = 0;
        int i = 0;
        while (i < VOCAB - 1 && (sum += list[i].logit) <= u)
            i++;
        assert_int_equal(sample(b, r, 1), TR_OK);
        assert_int_equal(b->token_out[r], list[i].id);
    }
}

/* The same row gives the same token whatever is around it, in whatever chunk and with however many
 * threads. */
static void draws_do_not_depend_on_neighbours(void **state)
{
    bench *b = *state;
    int32_t first[ROWS];
    int distinct = 0;

    for (int i = 0; i < SLOTS; i++)
        b->sampling[i].top_p = 0.9f;
    assert_int_equal(sample(b, 0, ROWS), TR_OK);
    memcpy(first, b->token_out, sizeof first);
    for (int i = 1; i < ROWS; i++)
        distinct += first[i] != first[i - 1];
    assert_true(distinct > ROWS / 2);
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        open_device(b, n_threads);
        for (int i = 0; i < 50; i++) { /* the threads meet in ever new ways */
            memset(b->token_out, 0xff, sizeof b->token_out);
            assert_int_equal(sample(b, 0, ROWS), TR_OK);
            assert_memory_equal(b->token_out, first, sizeof first);
        }
        for (int n = 1; n <= ROWS; n = 3 * n + 1) {
            memset(b->token_out, 0xff, sizeof b->token_out);
            for (int i = 0; i < ROWS; i += n)
                assert_int_equal(sample(b, i, n), TR_OK);
            assert_memory_equal(b->token_out, first, sizeof first);
        }
    }
    b->sampling[1].key++; /* another key, another text; others stay */
    int changed = 0;
    assert_int_equal(sample(b, 0, ROWS), TR_OK);
    for (int i = 0; i < ROWS; i++) {
        if (i % SLOTS != 1) assert_int_equal(b->token_out[i], first[i]);
        changed += b->token_out[i] != first[i];
    }
    assert_true(changed > 0);
}

/* ---- log-probabilities ----------------------------------------------------------------------- */

static void check_logprobs(const bench *b, int row, int32_t token, int n)
{
    ranked list[VOCAB];
    double sum = 0;

    for (int i = 0; i < VOCAB; i++)
        list[i] = (ranked){(double)b->logits[row][i], i};
    qsort(list, VOCAB, sizeof *list, compare_ranked);
    for (int i = VOCAB - 1; i >= 0; i--)
        sum += exp(list[i].logit - list[0].logit);
    for (int i = 0; i < VOCAB; i++) {
        double logprob = list[i].logit - list[0].logit - log(sum);
        if (list[i].id == token) {
            assert_int_equal(b->rank[row], i + 1);
            assert_true(fabs((double)b->logprob[row] - logprob) <= 1e-6 * fabs(logprob) + 1e-12);
        }
        if (i >= TR_MAX_LOGPROBS) continue;
        assert_int_equal(b->top_token[row][i], i < n ? list[i].id : -1);
        if (i < n)
            assert_true(fabs((double)b->top_logprob[row][i] - logprob) <=
                        1e-6 * fabs(logprob) + 1e-12);
    }
}

static void log_probabilities(void **state)
{
    bench *b = *state;

    for (int r = 0; r < 12; r++) { /* ties of all kinds */
        for (int i = 0; i < VOCAB; i += 2 + r)
            b->logits[r][i] = b->logits[r][(i + 7) % VOCAB];
        if (r == 10)
            for (int i = 0; i < VOCAB; i++)
                b->logits[r][i] = 1e30f; /* all equal, and large */
    }
    for (int i = 0; i < SLOTS; i++) { /* changes and temperature do not show */
        b->sampling[i].temperature = 0.7f;
        b->sampling[i].n_logprobs = (const int[]){0, 5, 20, -1}[i];
        b->sampling[i].n_prompt_logprobs = (const int[]){20, -1, 1, 3}[i];
    }
    add_change(b, 0, 5, 100, 1, 0);
    for (int i = 4; i < 8; i++)
        b->target[i] = 3 * i;
    for (int r = 0; r < ROWS; r++)
        b->rank[r] = -5;
    assert_int_equal(sample(b, 0, 12), TR_OK);
    assert_int_equal(b->token_out[0], 5);
    logprobs(b, 0, 7);
    logprobs(b, 7, 5);
    static const int n[12] = {0, 5, 20, -1, 20, -1, 1, 3, 0, 5, 20, -1};
    for (int r = 0; r < 12; r++) {
        if (n[r] < 0)
            assert_int_equal(b->rank[r], -5);
        else
            check_logprobs(b, r, r >= 4 && r < 8 ? 3 * r : b->token_out[r], n[r]);
    }
    assert_int_equal(b->rank[12], -5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_known_answers),
        cmocka_unit_test(uniform_numbers),
        cmocka_unit_test_setup_teardown(greedy, setup, teardown),
        cmocka_unit_test_setup_teardown(changes_in_order, setup, teardown),
        cmocka_unit_test_setup_teardown(not_a_number, setup, teardown),
        cmocka_unit_test_setup_teardown(all_of_it, setup, teardown),
        cmocka_unit_test_setup_teardown(filters, setup, teardown),
        cmocka_unit_test_setup_teardown(random_parameters, setup, teardown),
        cmocka_unit_test_setup_teardown(the_number_decides, setup, teardown),
        cmocka_unit_test_setup_teardown(draws_do_not_depend_on_neighbours, setup, teardown),
        cmocka_unit_test_setup_teardown(log_probabilities, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
