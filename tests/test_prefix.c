/* The prefix index against a naive model: a list of pages, each with its parent and its tokens. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/prefix.h"
#include "kernels/kernels.h"

enum { N = 40, PAGE = TR_PAGE_TOKENS, DEEP = 6, HOLDERS = 8 };

typedef struct naive {
    struct {
        int there, lost, holders; /* lost: never found again */
        int32_t parent, token[PAGE];
        uint64_t idle_since;
    } page[N];
    uint64_t clock;
} naive;

static int pick(uint32_t *r, int n)
{
    *r = *r * 1664525u + 1013904223u;
    return (int)((*r >> 8) % (uint32_t)n);
}

/* One of three pages' worth of tokens; they differ in one place, the last. */
static void fill(int32_t *token, int kind)
{
    for (int i = 0; i < PAGE; i++)
        token[i] = i;
    token[PAGE - 1] = 1000 + kind;
}

static int32_t naive_find(const naive *m, int32_t parent, const int32_t *token)
{
    for (int32_t i = 0; i < N; i++)
        if (m->page[i].there && !m->page[i].lost && m->page[i].parent == parent &&
            !memcmp(m->page[i].token, token, sizeof m->page[i].token))
            return i;
    return -1;
}

static int naive_n_idle(const naive *m)
{
    int n = 0;
    for (int i = 0; i < N; i++)
        n += m->page[i].there && !m->page[i].holders;
    return n;
}

/* The leaf that has been idle for longest. */
static int32_t naive_evict(naive *m)
{
    int32_t victim = -1;
    for (int32_t i = 0; i < N; i++) {
        int is_leaf = m->page[i].there && !m->page[i].holders;
        for (int j = 0; j < N && is_leaf; j++)
            is_leaf = !m->page[j].there || m->page[j].parent != i;
        if (is_leaf && (victim < 0 || m->page[i].idle_since < m->page[victim].idle_since))
            victim = i;
    }
    if (victim >= 0) m->page[victim].there = 0;
    return victim;
}

static void hold(naive *m, tr_prefix *x, int32_t page)
{
    if (!m->page[page].holders++) tr_prefix_busy(x, page);
}

static void let_go(naive *m, tr_prefix *x, int32_t page)
{
    if (--m->page[page].holders) return;
    m->page[page].idle_since = ++m->clock;
    tr_prefix_idle(x, page);
}

/* A holder begins: matches what there is and enters pages of its own behind it. */
static int begin(naive *m, tr_prefix *x, uint32_t *r, int32_t *path)
{
    const int deep = 1 + pick(r, DEEP);
    int32_t token[PAGE], parent = -1;
    int n = 0;

    for (; n < deep; n++, parent = path[n - 1]) {
        fill(token, pick(r, 3));
        path[n] = tr_prefix_find(x, parent, token);
        assert_int_equal(path[n], naive_find(m, parent, token));
        if (path[n] >= 0) {
            hold(m, x, path[n]);
            continue;
        }
        int32_t page = pick(r, N);
        if (m->page[page].there) break;
        bool entered = tr_prefix_enter(x, parent, token, page);
        assert_int_equal(entered, parent < 0 || !m->page[parent].lost);
        if (!entered) break;
        m->page[page].there = 1;
        m->page[page].lost = 0;
        m->page[page].holders = 1;
        m->page[page].parent = parent;
        memcpy(m->page[page].token, token, sizeof token);
        path[n] = page;
    }
    return n;
}

static void test_against_model(void **state)
{
    static naive m;
    uint32_t r = 7;
    int32_t path[HOLDERS][DEEP];
    int n_path[HOLDERS] = {0}, n_evicted = 0, n_lost = 0;
    tr_prefix *x = tr_prefix_create(N);
    (void)state;

    for (int turn = 0; turn < 200000; turn++) {
        const int h = pick(&r, HOLDERS);
        if (n_path[h]) {
            if (pick(&r, 40) == 0) {
                int32_t page = path[h][pick(&r, n_path[h])];
                tr_prefix_distrust(x, page);
                m.page[page].lost = 1;
                n_lost++;
            }
            while (n_path[h])
                let_go(&m, x, path[h][--n_path[h]]);
        } else {
            n_path[h] = begin(&m, x, &r, path[h]);
        }
        if (pick(&r, 3) == 0) {
            int32_t page = naive_evict(&m);
            assert_int_equal(tr_prefix_evict(x), page);
            n_evicted += page >= 0;
        }
        assert_int_equal(tr_prefix_n_idle(x), naive_n_idle(&m));
        for (int i = 0; i < N; i++)
            assert_int_equal(tr_prefix_has(x, i), m.page[i].there);
    }
    assert_true(n_evicted > 1000 && n_lost > 100);
    for (int h = 0; h < HOLDERS; h++)
        while (n_path[h])
            let_go(&m, x, path[h][--n_path[h]]);
    for (int32_t page; (page = naive_evict(&m)) >= 0;)
        assert_int_equal(tr_prefix_evict(x), page);
    assert_int_equal(tr_prefix_evict(x), -1);
    assert_int_equal(tr_prefix_n_idle(x), 0);
    tr_prefix_free(x);
}

/* The same tokens behind others are another page; one place that differs is enough. */
static void test_position_and_tokens(void **state)
{
    int32_t a[PAGE], b[PAGE];
    tr_prefix *x = tr_prefix_create(3);
    (void)state;

    fill(a, 0);
    assert_true(tr_prefix_enter(x, -1, a, 2));
    assert_int_equal(tr_prefix_find(x, -1, a), 2);
    assert_int_equal(tr_prefix_find(x, 2, a), -1);
    assert_true(tr_prefix_enter(x, 2, a, 0));
    assert_int_equal(tr_prefix_find(x, 2, a), 0);
    assert_false(tr_prefix_enter(x, 2, a, 1)); /* has a page */
    assert_false(tr_prefix_has(x, 1));
    for (int i = 0; i < PAGE; i++) {
        memcpy(b, a, sizeof b);
        b[i]++;
        assert_int_equal(tr_prefix_find(x, -1, b), -1);
    }
    tr_prefix_distrust(x, 2);
    assert_int_equal(tr_prefix_find(x, -1, a), -1);
    fill(b, 1);
    assert_false(tr_prefix_enter(x, 2, b, 1)); /* behind a page that nobody finds */
    assert_true(tr_prefix_enter(x, -1, a, 1));
    assert_int_equal(tr_prefix_find(x, -1, a), 1);
    assert_int_equal(tr_prefix_find(x, 1, a), -1);
    tr_prefix_free(x);
    tr_prefix_free(NULL);
    assert_null(tr_prefix_create(0));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_position_and_tokens),
        cmocka_unit_test(test_against_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
