/* base/region: flat totals, the tree, and that exclusive times add up whatever happens. */
#include <config.h>

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "base/region.h"

enum { NODES = 64 };

/* By the stream's own clock. */
static void spin(tr_regions *r, uint64_t ns)
{
    for (const uint64_t from = tr_ticks_now(&r->ticks); tr_ticks_now(&r->ticks) - from < ns;)
        ;
}

static uint64_t sum_excl(const tr_region_node *node, int n)
{
    uint64_t sum = 0;
    for (int i = 0; i < n; i++)
        for (int p = 0; p <= TR_N_PHASES; p++)
            sum += node[i].in[p].excl_ns;
    return sum;
}

static const tr_region_node *find(const tr_regions *r, const tr_region_node *node, int n,
                                  const char *name, int layer)
{
    for (int i = 0; i < n; i++)
        if (strcmp(r->total[node[i].id].name, name) == 0 && node[i].layer == layer) return &node[i];
    return NULL;
}

static void totals_without_a_tree(void **state)
{
    tr_regions r = {0};
    tr_region_node node[1];
    const int a = tr_region_id(&r, "a"), b = tr_region_id(&r, "b");

    (void)state;
    assert_int_equal(tr_region_id(&r, "a"), a);
    for (int i = 0; i < 3; i++) {
        tr_region_begin(&r, a);
        tr_region_begin(&r, b);
        spin(&r, 20000);
        tr_region_end(&r, 8, 2);
        tr_region_end(&r, 0, 0);
    }
    assert_int_equal(r.total[a].calls, 3);
    assert_int_equal(r.total[a].inclusive_ns, r.total[a].exclusive_ns + r.total[b].inclusive_ns);
    assert_true(r.total[b].bytes == 24 && r.total[b].flops == 6);
    assert_true(r.total[b].inclusive_ns >= 60000);
    assert_int_equal(tr_regions_look(&r, node, 1), 0);
    tr_regions_reset(&r);
    assert_int_equal(r.total[a].calls, 0);
    assert_string_equal(r.total[a].name, "a");
    /* none of these may do anything */
    tr_region_begin(NULL, a);
    tr_region_end(NULL, 0, 0);
    tr_region_end(&r, 0, 0);
    tr_regions_cut(&r);
    tr_regions_prune(NULL);
}

/* step (decode) { layer 0..2 { op } }, twice, and something outside steps. */
static void a_tree_has_places_layers_and_phases(void **state)
{
    tr_regions r = {0};
    tr_region_node node[NODES];

    (void)state;
    assert_true(tr_regions_grow(&r, "main", NODES));
    assert_false(tr_regions_grow(&r, "main", NODES));
    const int step = tr_region_id_of(&r, "step", TR_KIND_STEP, -1),
              layer = tr_region_id_of(&r, "layer", TR_KIND_LAYER, -1), op = tr_region_id(&r, "op");
    for (int s = 0; s < 4; s++) {
        tr_regions_phase(&r, s == 0 ? TR_PHASE_PREFILL : TR_PHASE_DECODE);
        tr_region_begin(&r, step);
        for (int l = 0; l < 3; l++) {
            tr_region_begin_layer(&r, layer, l);
            tr_region_begin(&r, op);
            tr_region_end(&r, 16, 4);
            tr_region_begin(&r, op); /* the same place */
            tr_region_end(&r, 0, 0);
            tr_region_end(&r, 0, 0);
        }
        tr_region_end(&r, 0, 0);
        tr_regions_phase(&r, TR_PHASE_NONE);
        tr_region_begin(&r, op); /* another place */
        tr_region_end(&r, 0, 0);
    }
    tr_regions_cut(&r);
    const int n = tr_regions_look(&r, node, NODES);
    assert_int_equal(n, 1 + 1 + 3 + 3 + 1);
    for (int i = 0; i < n; i++)
        assert_true(i == 0 ? node[i].parent == -1 : node[i].parent >= 0 && node[i].parent < i);
    for (int l = 0; l < 3; l++) {
        const tr_region_node *o = find(&r, node, n, "op", l);
        assert_non_null(o);
        assert_int_equal(o->in[TR_PHASE_PREFILL].count, 2);
        assert_int_equal(o->in[TR_PHASE_DECODE].count, 6);
        assert_true(o->in[TR_PHASE_DECODE].bytes == 48 && o->in[TR_PHASE_DECODE].flops == 12);
        assert_int_equal(o->depth, 3);
        assert_true(o->in[TR_PHASE_DECODE].min_ns <= o->in[TR_PHASE_DECODE].max_ns);
        assert_int_equal(find(&r, node, n, "layer", l)->in[TR_PHASE_DECODE].count, 3);
    }
    const tr_region_node *outside = find(&r, node, n, "op", -1);
    assert_int_equal(outside->in[TR_PHASE_NONE].count, 4);
    assert_int_equal(outside->parent, 0);
    assert_int_equal(node[0].in[TR_PHASE_NONE].count, 1);
    assert_int_equal(sum_excl(node, n), node[0].in[TR_PHASE_NONE].incl_ns);
    tr_region_begin(&r, op); /* after the cut: totals only */
    tr_region_begin(&r, op);
    tr_region_end(&r, 0, 0);
    tr_region_end(&r, 0, 0);
    assert_int_equal(tr_regions_look(&r, node, NODES), n);
    tr_regions_prune(&r);
}

/* Steps that go other ways each time, longer than what is remembered of one, within a region that never ends. */
static void every_order_finds_its_places(void **state)
{
    enum { STEPS = 30, OPS = 5, CALLS = 1500 };
    tr_regions r = {0};
    tr_region_node node[NODES];
    uint64_t count[TR_N_PHASES][OPS] = {{0}};
    int op[OPS];
    char name[8];
    uint32_t x = 1;

    (void)state;
    assert_true(tr_regions_grow(&r, "main", NODES));
    for (int i = 0; i < OPS; i++) {
        snprintf(name, sizeof name, "op%d", i);
        op[i] = tr_region_id(&r, name);
    }
    tr_region_begin(&r, tr_region_id_of(&r, "steps", TR_KIND_PHASE, -1));
    for (int s = 0; s < STEPS; s++) {
        const tr_phase phase = s % 3 ? TR_PHASE_DECODE : TR_PHASE_PREFILL;
        tr_regions_phase(&r, phase);
        tr_region_begin_layer(&r, tr_region_id(&r, "layer"), s % 2);
        for (int i = 0; i < CALLS; i++) {
            const int k =
                s < STEPS / 2 ? i % OPS : (int)((x = x * 1664525 + 1013904223) >> 16) % OPS;
            tr_region_begin(&r, op[k]);
            tr_region_end(&r, 1, 0);
            count[phase][k]++;
        }
        tr_region_end(&r, 0, 0);
        tr_regions_phase(&r, TR_PHASE_NONE);
    }
    tr_regions_cut(&r);
    const int n = tr_regions_look(&r, node, NODES);
    assert_int_equal(n, 2 + 2 + 2 * OPS);
    for (int p = 0; p < TR_N_PHASES; p++)
        for (int i = 0; i < OPS; i++) {
            snprintf(name, sizeof name, "op%d", i);
            const tr_region_numbers *a = &find(&r, node, n, name, 0)->in[p],
                                    *b = &find(&r, node, n, name, 1)->in[p];
            assert_int_equal(a->count + b->count, count[p][i]);
            assert_true(a->bytes + b->bytes == (double)count[p][i]);
        }
    assert_int_equal(sum_excl(node, n), node[0].in[TR_PHASE_NONE].incl_ns);
    tr_regions_prune(&r);
}

/* What is not kept is time of the root, and costs no other number anything. */
static void less_may_be_kept(void **state)
{
    tr_regions r = {0};
    tr_region_node node[NODES];

    (void)state;
    const int a = tr_region_id(&r, "a");
    assert_true(tr_regions_grow(&r, "main", NODES));
    for (int i = 0; i < 9; i++) {
        tr_regions_keep(&r, (tr_region_keep)(i % 3)); /* ALL, TOTALS, NOTHING */
        tr_region_begin(&r, a);
        tr_region_begin(&r, a);
        if (i % 3) {
            const int n = tr_regions_look(&r, node, NODES);
            assert_int_equal(n, 3);
            assert_int_equal(sum_excl(node, n), node[0].in[TR_PHASE_NONE].incl_ns);
        }
        tr_region_end(&r, 1, 1);
        tr_region_end(&r, 1, 1);
    }
    tr_regions_keep(&r, TR_KEEP_TOTALS);
    tr_regions_cut(&r);
    assert_int_equal(r.total[a].calls, 2 * 6);
    assert_int_equal(tr_regions_look(&r, node, NODES), 3);
    assert_int_equal(node[1].in[TR_PHASE_NONE].count, 3);
    assert_int_equal(node[2].in[TR_PHASE_NONE].count, 3);
    assert_int_equal(node[0].in[TR_PHASE_NONE].count, 1);
    assert_int_equal(sum_excl(node, 3), node[0].in[TR_PHASE_NONE].incl_ns);
    tr_regions_prune(&r);
}

static void open_regions_count_as_far_as_they_have_come(void **state)
{
    tr_regions r = {0};
    tr_region_node node[NODES];

    (void)state;
    assert_true(tr_regions_grow(&r, "main", NODES));
    tr_region_begin(&r, tr_region_id(&r, "a"));
    spin(&r, 50000);
    tr_region_begin(&r, tr_region_id(&r, "b"));
    spin(&r, 50000);
    const int n = tr_regions_look(&r, node, NODES);
    assert_int_equal(n, 3);
    for (int i = 0; i < n; i++)
        assert_int_equal(node[i].in[TR_PHASE_NONE].count, 1);
    assert_true(node[2].in[TR_PHASE_NONE].incl_ns >= 50000);
    assert_true(node[1].in[TR_PHASE_NONE].excl_ns >= 50000);
    assert_int_equal(sum_excl(node, n), node[0].in[TR_PHASE_NONE].incl_ns);
    tr_regions_prune(&r);
}

/* Too many names, too many nodes, too deep: nothing is lost from the sums. */
static void full_tables_keep_the_sums(void **state)
{
    tr_regions r = {0};
    tr_region_node node[8];
    char name[32];
    int id = -1;

    (void)state;
    assert_true(tr_regions_grow(&r, "main", 8));
    for (int i = 0; i < TR_REGIONS_MAX + 10; i++) {
        snprintf(name, sizeof name, "region %d", i);
        id = tr_region_id(&r, name);
        assert_true((id >= 0) == (i < TR_REGIONS_MAX - 1)); /* one is the root */
        tr_region_begin(&r, id);
        tr_region_begin(&r, 1); /* below what has no node: a child of the root */
        spin(&r, 1000);
        tr_region_end(&r, 0, 0);
        tr_region_end(&r, 0, 0);
    }
    for (int i = 0; i < 3 * TR_REGION_DEPTH; i++)
        tr_region_begin(&r, 1);
    spin(&r, 10000);
    int n = tr_regions_look(&r, node, 8);
    assert_int_equal(sum_excl(node, n), node[0].in[TR_PHASE_NONE].incl_ns);
    for (int i = 0; i < 3 * TR_REGION_DEPTH; i++)
        tr_region_end(&r, 0, 0);
    assert_true(r.depth == 1 && r.deeper == 0);
    n = tr_regions_look(&r, node, 8);
    assert_int_equal(n, 8);
    assert_true(tr_regions_lost(&r) > TR_REGIONS_MAX / 2);
    assert_int_equal(sum_excl(node, n), node[0].in[TR_PHASE_NONE].incl_ns);
    tr_regions_prune(&r);
    assert_false(tr_regions_grow(&r, "other", 0));
}

/* Ends and begins that join are one moment, in totals, in the tree and for who hears of them; others are not. */
static void hear(void *ctx, int node, uint64_t begun_ns, uint64_t ended_ns, double bytes)
{
    uint64_t(*heard)[2] = ctx;
    (void)node;
    heard[(int)bytes][0] = begun_ns;
    heard[(int)bytes][1] = ended_ns;
}

static void joined_regions_share_a_moment(void **state)
{
    enum { A, B, OUT, C, N };
    uint64_t heard[N][2] = {{0}};
    tr_regions r = {.sink = {heard, hear}};
    tr_region_node node[NODES];

    (void)state;
    for (int grown = 0; grown < 2; grown++) {
        if (grown) assert_true(tr_regions_grow(&r, "main", NODES));
        const int out = tr_region_id(&r, "out"), in = tr_region_id(&r, "in");
        tr_regions_reset(&r);
        tr_region_begin(&r, out);
        tr_region_joins(&r);
        spin(&r, 20000); /* such callers are wrong by it */
        tr_region_begin(&r, in);
        spin(&r, 20000);
        tr_region_end(&r, A, 0);
        tr_region_joins(&r);
        tr_region_begin(&r, in);
        spin(&r, 20000);
        tr_region_end(&r, B, 0);
        tr_region_joins(&r);
        tr_region_end(&r, OUT, 0);
        spin(&r, 20000);
        tr_region_begin(&r, in);
        tr_region_end(&r, C, 0);
        assert_int_equal(heard[OUT][0], heard[A][0]);
        assert_int_equal(heard[A][1], heard[B][0]);
        assert_int_equal(heard[B][1], heard[OUT][1]);
        assert_true(heard[C][0] >= heard[OUT][1] + 20000);
        assert_true(heard[A][1] >= heard[A][0] + 40000);
        assert_int_equal(r.total[out].exclusive_ns, 0);
        assert_int_equal(r.total[out].inclusive_ns, heard[OUT][1] - heard[OUT][0]);
    }
    const int n = tr_regions_look(&r, node, NODES);
    assert_int_equal(sum_excl(node, n), node[0].in[TR_PHASE_NONE].incl_ns);
    /* What is not kept joins nothing, nor does what is too deep. */
    tr_regions_keep(&r, TR_KEEP_NOTHING);
    tr_region_joins(&r);
    spin(&r, 20000);
    tr_regions_keep(&r, TR_KEEP_TOTALS);
    tr_region_begin(&r, tr_region_id(&r, "in"));
    tr_region_end(&r, A, 0);
    assert_true(heard[A][0] >= heard[C][1] + 20000);
    for (int i = 0; i <= TR_REGION_DEPTH; i++)
        tr_region_begin(&r, 0);
    tr_region_joins(&r);
    tr_region_end(&r, B, 0);
    spin(&r, 20000);
    tr_region_end(&r, B, 0);
    assert_true(heard[B][1] >= heard[B][0] + 20000);
    tr_regions_prune(&r);
    tr_region_joins(NULL);
}

static void *look_often(void *arg)
{
    tr_regions *r = ((void **)arg)[0];
    atomic_bool *stop = ((void **)arg)[1];
    tr_region_node node[NODES];
    uintptr_t bad = 0;

    while (!atomic_load(stop)) {
        const int n = tr_regions_look(r, node, NODES);
        bad += sum_excl(node, n) != node[0].in[TR_PHASE_NONE].incl_ns;
    }
    return (void *)bad;
}

static void another_thread_may_look(void **state)
{
    tr_regions r = {0};
    atomic_bool stop = false;
    void *arg[] = {&r, &stop}, *bad;
    pthread_t thread;

    (void)state;
    assert_true(tr_regions_grow(&r, "main", NODES));
    const int a = tr_region_id(&r, "a");
    assert_int_equal(pthread_create(&thread, NULL, look_often, arg), 0);
    for (int i = 0; i < 20000; i++) {
        tr_region_begin_layer(&r, a, i % 8);
        tr_region_end(&r, 1, 1);
    }
    atomic_store(&stop, true);
    pthread_join(thread, &bad);
    assert_null(bad);
    assert_int_equal(r.total[a].calls, 20000);
    tr_regions_prune(&r);
}

/* Deeper than there is room for, while somebody looks: what others read never changes without the lock (the thread sanitizer's
 * build runs this), and nobody sees more open regions than there are frames. */
static void another_thread_may_look_at_deep_stacks(void **state)
{
    tr_regions r = {0};
    atomic_bool stop = false;
    void *arg[] = {&r, &stop}, *bad;
    pthread_t thread;

    (void)state;
    assert_true(tr_regions_grow(&r, "main", NODES));
    const int a = tr_region_id(&r, "a");
    assert_int_equal(pthread_create(&thread, NULL, look_often, arg), 0);
    for (int i = 0; i < 2000; i++) {
        for (int k = 0; k < TR_REGION_DEPTH + 4; k++) {
            tr_region_begin(&r, a);
            assert_true(r.depth <= TR_REGION_DEPTH);
        }
        for (int k = 0; k < TR_REGION_DEPTH + 4; k++)
            tr_region_end(&r, 0, 0);
        assert_int_equal(r.depth, 1);
    }
    atomic_store(&stop, true);
    pthread_join(thread, &bad);
    assert_null(bad);
    assert_int_equal(r.total[a].calls, 2000 * (TR_REGION_DEPTH - 1)); /* one frame is the root's */
    tr_regions_prune(&r);
}

static void note_end(void *ctx, int node, uint64_t begun_ns, uint64_t ended_ns, double bytes)
{
    double *sum = ctx;
    sum[0] += node >= 0 && ended_ns >= begun_ns;
    sum[1] += bytes;
}

static void a_sink_hears_of_every_end(void **state)
{
    double sum[2] = {0, 0};
    tr_regions r = {.sink = {sum, note_end}};

    (void)state;
    assert_true(tr_regions_grow(&r, "main", NODES));
    for (int i = 0; i < 5; i++) {
        tr_region_begin(&r, tr_region_id(&r, "a"));
        tr_region_end(&r, 3, 0);
    }
    tr_regions_cut(&r);
    assert_true(sum[0] == 6 && sum[1] == 15);
    tr_regions_prune(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(totals_without_a_tree),
        cmocka_unit_test(a_tree_has_places_layers_and_phases),
        cmocka_unit_test(every_order_finds_its_places),
        cmocka_unit_test(less_may_be_kept),
        cmocka_unit_test(open_regions_count_as_far_as_they_have_come),
        cmocka_unit_test(full_tables_keep_the_sums),
        cmocka_unit_test(joined_regions_share_a_moment),
        cmocka_unit_test(another_thread_may_look),
        cmocka_unit_test(another_thread_may_look_at_deep_stacks),
        cmocka_unit_test(a_sink_hears_of_every_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
