/* SG#19319: lengths that the tiny models cannot run, at the level of layout and gather: the last and the first of 16 and of 17 bits,
 * and the model's largest. Every token has one owner and comes back into its place, and every member's cache holds every key. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <pthread.h>

#include "loopback.h"
#include "model/layout.h"

static const int32_t lengths[] = {65535, 65536, 131072, 163840};
enum { N_LENGTHS = 4, MEMBERS_MAX = 16 };

/* ---- layout ------------------------------------------------------------------------------------ */

static void check_layout(int32_t n, tr_cp_mode mode, int n_members)
{
    tr_layout_span span = {.n = n};
    tr_layout l;

    tr_layout_make(&l, mode, n_members, &span, 1);
    assert_true(l.split);
    assert_int_equal(l.m, (n + n_members - 1) / n_members);
    int32_t *back = malloc((size_t)n_members * (size_t)l.m * sizeof *back),
            *token = malloc((size_t)l.m * sizeof *token);
    unsigned char *seen = calloc((size_t)n, 1);
    assert_true(back && token && seen);
    tr_layout_put_back(&l, back);
    int32_t n_seen = 0;
    for (int c = 0; c < n_members; c++) {
        int64_t keys = 0;
        tr_layout_tokens(&l, c, token);
        assert_memory_equal(token, back + (int64_t)c * l.m, (size_t)l.m * sizeof *token);
        for (int32_t j = 0; j < l.m; j++) {
            if (token[j] == TR_LAYOUT_PAD) continue;
            if (token[j] < 0 || token[j] >= n || seen[token[j]])
                fail_msg("length %d, member %d, row %d: token %d", n, c, j, token[j]);
            seen[token[j]] = 1;
            n_seen++;
            keys += token[j] + 1;
            if (tr_layout_owner(&l, token[j]) != c || tr_layout_row(&l, token[j]) != j ||
                tr_layout_token(&l, c, j) != token[j])
                fail_msg("length %d, token %d: not where it is", n, token[j]);
        }
        /* The keys its rows see: every member's fair share, but for a row or two. */
        const int64_t share = (int64_t)n * (n + 1) / 2 / n_members;
        assert_in_range(keys, share - 2 * (int64_t)n, share + 2 * (int64_t)n);
    }
    assert_int_equal(n_seen, n);
    free(back);
    free(token);
    free(seen);
}

static void layout_of_long_prompts(void **state)
{
    static const int n_members[] = {2, 3, 8, MEMBERS_MAX};

    (void)state;
    for (int i = 0; i < N_LENGTHS; i++)
        for (int k = 0; k < 4; k++) {
            check_layout(lengths[i], TR_CP_INTERLEAVE, n_members[k]);
            check_layout(lengths[i], TR_CP_ZIGZAG, n_members[k]);
        }
}

/* ---- gather ------------------------------------------------------------------------------------ */

enum { D_INDEX = 128, N_MEMBERS = 3 };

typedef struct member {
    tr_comm *comm;
    int32_t n;
    tr_cp_mode mode;
    int wrong; /* line; CMocka's asserts belong to the main thread */
} member;

/* Keys and scales of a token, told by its number. */
static void write_key(unsigned char *cache, const tr_record *r, int64_t row, int32_t token)
{
    for (int p = 0; p < r->n_pieces; p++) {
        unsigned char *to = cache + (size_t)(row / 64) * r->page_bytes + r->piece[p].at +
                            (size_t)(row % 64) * r->piece[p].bytes;
        for (size_t k = 0; k < r->piece[p].bytes; k++)
            to[k] = (unsigned char)((uint32_t)token * 2654435761u >> (k % 4 * 8)) ^
                    (unsigned char)(k + (size_t)p);
    }
}

/* Pages in a scrambled order: 7919 is prime and no divisor of any number of pages here. */
static int64_t row_of(int32_t token, int32_t n_pages)
{
    return (int64_t)token / 64 * 7919 % n_pages * 64 + token % 64;
}

/* One chunk of a whole prompt, far more than a step would take. */
static void *run_member(void *arg)
{
    member *m = arg;
    const int32_t n_pages = (m->n + 63) / 64;
    const tr_kv_layer kv = {
        .dtype = TR_E4M3, .n_pages = n_pages, .d_latent = 512, .d_rope = 64, .d_index = D_INDEX};
    const tr_record record = tr_record_index(&kv);
    const size_t bytes = (size_t)n_pages * record.page_bytes;
    unsigned char *cache = calloc(1, bytes), *want = calloc(1, bytes);
    int64_t *write = malloc((size_t)m->n * sizeof *write);
    int32_t *token = malloc(((size_t)m->n + 1) * sizeof *token);
    int n_rows[N_MEMBERS];
    tr_layout_span span = {.n = m->n};
    const tr_rows rows = {.n_max = m->n};
    tr_share *share = NULL;
    tr_layout l;
    tr_err err;
    tr_push push;
    tr_await await;
    int64_t at = 0;

    m->wrong = __LINE__;
    if (!cache || !want || !write || !token) goto done;
    tr_layout_make(&l, m->mode, N_MEMBERS, &span, 1);
    for (int c = 0; c < N_MEMBERS; c++) {
        tr_layout_tokens(&l, c, token);
        n_rows[c] = 0;
        for (int32_t j = 0; j < l.m; j++) {
            if (token[j] == TR_LAYOUT_PAD) continue;
            write[at++] = row_of(token[j], n_pages);
            n_rows[c]++;
            write_key(want, &record, row_of(token[j], n_pages), token[j]);
            if (c == tr_comm_rank(m->comm))
                write_key(cache, &record, row_of(token[j], n_pages), token[j]);
        }
    }
    m->wrong = __LINE__;
    if (at != m->n) goto done;
    if (tr_share_open_record(&share, m->comm, &record, m->n, &err) != TR_OK ||
        tr_share_plan(share, n_rows, write, &err) != TR_OK ||
        tr_share_begin(share, &rows, cache, &push, &err) != TR_OK ||
        tr_share_sent(share, TR_LANE_MAIN, &err) != TR_OK ||
        tr_share_ready(share, TR_LANE_MAIN, &await, &err) != TR_OK)
        goto done;
    m->wrong = memcmp(cache, want, bytes) ? __LINE__ : 0;

done:
    tr_share_close(share);
    free(cache);
    free(want);
    free(write);
    free(token);
    return NULL;
}

static void gather_of_long_prompts(void **state)
{
    (void)state;
    for (int i = 0; i < N_LENGTHS; i++) {
        tr_loopback *l = tr_loopback_create(N_MEMBERS);
        pthread_t thread[N_MEMBERS];
        member m[N_MEMBERS];
        assert_non_null(l);
        for (int c = 0; c < N_MEMBERS; c++) {
            m[c] = (member){.comm = tr_loopback_comm(l, c),
                            .n = lengths[i],
                            .mode = i % 2 ? TR_CP_ZIGZAG : TR_CP_INTERLEAVE};
            assert_non_null(m[c].comm);
            assert_int_equal(pthread_create(&thread[c], NULL, run_member, &m[c]), 0);
        }
        for (int c = 0; c < N_MEMBERS; c++) {
            pthread_join(thread[c], NULL);
            tr_comm_free(m[c].comm);
        }
        for (int c = 0; c < N_MEMBERS; c++)
            if (m[c].wrong) fail_msg("length %d, member %d: line %d", lengths[i], c, m[c].wrong);
        tr_loopback_free(l);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layout_of_long_prompts),
        cmocka_unit_test(gather_of_long_prompts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
