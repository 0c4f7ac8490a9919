/* Two ranks of one model in one process: each thread holds half of the heads and half of the experts (tp = ep = 2), the groups of one
 * are replaced by a loop-back. The model's code is the one every rank runs; the sums are made in another order, nothing else. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "loopback.h"
#include "vectors.h"

enum { N_RANKS = 2, N_TOKENS = 150, CHUNK = 40 };

typedef struct rank_run {
    const char *dir;
    int32_t tokens[N_TOKENS];
    int rank, ranks;
    tr_comm *moe, *attn_tp;
    tr_comm *alone;
    float *final; /* [N_TOKENS, hidden] */
    int32_t argmax[N_TOKENS];
    int n_final, hidden;
    size_t weight_bytes;
    uint64_t calls, bytes; /* of the attention group's all-reduce */
    int failed;
} rank_run;

static void keep(void *ctx, const char *name, int layer, int i_row, int n_rows, int n_cols,
                 size_t ld, void *data)
{
    rank_run *r = ctx;
    (void)layer, (void)i_row, (void)ld;
    if (strcmp(name, "final") != 0) return;
    memcpy(r->final + (size_t)r->n_final * (size_t)n_cols, data,
           (size_t)n_rows * (size_t)n_cols * sizeof *r->final);
    r->n_final += n_rows;
}

static void *run_rank(void *arg)
{
    rank_run *r = arg;
    tr_fixture f;
    const tr_groups groups = {r->attn_tp, r->alone, r->moe, r->alone, 1};
    const tr_fixture_options options = {.dir = r->dir,
                                        .kv_dtype = TR_F32,
                                        .n_threads = 1,
                                        .rank = r->rank,
                                        .grid = {1, 1, 1, r->ranks, 1, r->ranks, 1},
                                        .groups = &groups};
    r->failed = 1;
    if (tr_fixture_open(&f, &options) != 0) return NULL;
    const tr_probe probe = {.ctx = r, .see = keep};
    r->hidden = f.config.hidden_size;
    r->weight_bytes = f.weights->bytes;
    r->final = calloc((size_t)N_TOKENS * (size_t)r->hidden, sizeof *r->final);
    tr_model_set_probe(f.model, &probe);
    int bad = tr_fixture_slot(&f, 0, 0);
    for (int i = 0; i < N_TOKENS && !bad; i += CHUNK) {
        const int n = N_TOKENS - i < CHUNK ? N_TOKENS - i : CHUNK;
        bad =
            tr_fixture_run(&f, 0, r->tokens + i, i, n, n, TR_FORM_AUTO, NULL, r->argmax + i, NULL);
    }
    tr_comm_counts(r->attn_tp, TR_COMM_ALL_REDUCE, &r->calls, &r->bytes);
    tr_fixture_close(&f);
    r->failed = bad;
    return NULL;
}

static void compare(const char *set)
{
    char name[64], path[512];
    rank_run one = {.ranks = 1}, two[N_RANKS];
    tr_loopback *moe = tr_loopback_create(N_RANKS), *attn_tp = tr_loopback_create(N_RANKS);
    pthread_t thread[N_RANKS];

    snprintf(name, sizeof name, "model/%s", set);
    one.dir = tr_vector_path(path, sizeof path, name);
    for (int i = 0; i < N_TOKENS; i++)
        one.tokens[i] = (i * 37 + 11) % 120;
    one.moe = one.attn_tp = one.alone = tr_comm_self();
    assert_non_null(one.alone);
    run_rank(&one);
    assert_int_equal(one.failed, 0);
    assert_int_equal(one.n_final, N_TOKENS);

    assert_true(moe && attn_tp);
    for (int i = 0; i < N_RANKS; i++) {
        two[i] = one;
        two[i].rank = i;
        two[i].ranks = N_RANKS;
        two[i].moe = tr_loopback_comm(moe, i);
        two[i].attn_tp = tr_loopback_comm(attn_tp, i);
        two[i].alone = tr_comm_self();
        two[i].n_final = 0;
        two[i].final = NULL;
        assert_int_equal(pthread_create(&thread[i], NULL, run_rank, &two[i]), 0);
    }
    for (int i = 0; i < N_RANKS; i++)
        pthread_join(thread[i], NULL);
    for (int i = 0; i < N_RANKS; i++) {
        assert_int_equal(two[i].failed, 0);
        assert_int_equal(two[i].n_final, N_TOKENS);
        /* One all-reduce of [n, hidden] per layer and step went over the attention group. */
        assert_true(two[i].calls > 0 &&
                    two[i].bytes % ((uint64_t)one.hidden * N_TOKENS * sizeof(float)) == 0);
        assert_true(two[i].weight_bytes < one.weight_bytes);
        const double e = tr_relative_l2(two[i].final, one.final, N_TOKENS * one.hidden);
        if (e > 1e-5) fail_msg("%s rank %d: hidden states off by %g", set, i, e);
        assert_memory_equal(two[i].argmax, one.argmax, sizeof one.argmax);
        /* The ranks of one run agree to the bit: the sums run over members in rank order. */
        assert_memory_equal(two[i].final, two[0].final,
                            (size_t)(N_TOKENS * one.hidden) * sizeof(float));
    }
    for (int i = 0; i < N_RANKS; i++) {
        tr_comm_free(two[i].alone);
        tr_comm_free(two[i].moe);
        tr_comm_free(two[i].attn_tp);
        free(two[i].final);
    }
    tr_loopback_free(moe);
    tr_loopback_free(attn_tp);
    tr_comm_free(one.alone);
    free(one.final);
}

static void test_tiny(void **state)
{
    (void)state;
    compare("tiny");
}

static void test_realgeom(void **state)
{
    (void)state;
    compare("realgeom");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny),
        cmocka_unit_test(test_realgeom),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
