/* base/device_time: pairs of stamps from a device that is made up here: its clock goes on when work is given to it, its tickets
 * pass when the test says so, and a record takes its stamps when it is run. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/device_time.h"

enum { NODES = 64, STAMPS = 64, LAYERS = 3, OP_NS = 100, STEP_NS = 7 };

typedef struct device {
    uint64_t now, passed; /* the largest ticket that has; UINT64_MAX: the device has failed */
    uint64_t own[STAMPS], of_record[4 * LAYERS];
    bool recording;
    int n_recorded;
    int failing; /* this stamp from now cannot be asked for; 0: all can */
    bool cannot_read;
    int n_between;
} device;

typedef struct world {
    device d;
    tr_regions r;
    tr_device_times *t;
    int step, layer, half, op;
    bool halves; /* layers have one, around their operation, and OP_NS behind it */
    uint64_t n_tickets;
} world;

static bool stamp(void *ctx, void *set, int i)
{
    device *d = ctx;

    if (d->failing && --d->failing == 0) return false;
    assert_true(i >= 0 && i < (set ? 4 * LAYERS : STAMPS));
    assert_true(!d->recording || set); /* what is recorded has stamps of its own */
    if (d->recording)
        d->n_recorded++;
    else
        (set ? (uint64_t *)set : d->own)[i] = d->now;
    return true;
}

static bool between(void *ctx, void *set, int from, int to, uint64_t *ns)
{
    device *d = ctx;
    const uint64_t *at = set ? set : d->own;

    d->n_between++;
    *ns = at[to] - at[from];
    return !d->cannot_read;
}

static int passed(void *ctx, uint64_t ticket)
{
    const device *d = ctx;
    return d->passed == UINT64_MAX ? -1 : ticket <= d->passed;
}

static void open_world(world *w, int n_pairs)
{
    *w = (world){0};
    const tr_stamp_source source = {&w->d, stamp, between, passed};
    assert_true(2 * n_pairs <= STAMPS);
    assert_true(tr_regions_grow(&w->r, "main", NODES));
    w->step = tr_region_id_of(&w->r, "step", TR_KIND_STEP, -1);
    w->layer = tr_region_id_of(&w->r, "layer", TR_KIND_LAYER, -1);
    w->half = tr_region_id(&w->r, "half");
    w->op = tr_region_id_of(&w->r, "op", TR_KIND_KERNEL, -1);
    w->t = tr_device_times_create(&w->r, &source, n_pairs);
    assert_non_null(w->t);
}

static void close_world(world *w)
{
    tr_device_times_free(w->t);
    assert_null(w->r.clock.begin);
    tr_regions_prune(&w->r);
}

static void begin_step(world *w, uint64_t step)
{
    tr_device_times_begin(w->t, step);
    tr_regions_phase(&w->r, TR_PHASE_DECODE);
    tr_region_begin(&w->r, w->step);
    w->d.now += STEP_NS;
}

static void end_step(world *w)
{
    tr_region_end(&w->r, 0, 0);
    tr_device_times_end(w->t, ++w->n_tickets);
}

/* Layers with an operation each: layer l takes (l + 1) * OP_NS, where the device runs them. */
static void layers(world *w, bool runs)
{
    for (int l = 0; l < LAYERS; l++) {
        tr_region_begin_layer(&w->r, w->layer, l);
        if (w->halves) tr_region_begin(&w->r, w->half);
        tr_region_begin(&w->r, w->op);
        if (runs) w->d.now += (uint64_t)(l + 1) * OP_NS;
        tr_region_end(&w->r, 0, 0);
        if (w->halves) tr_region_end(&w->r, 0, 0);
        if (w->halves && runs) w->d.now += OP_NS;
        tr_region_end(&w->r, 0, 0);
    }
}

static void plain_step(world *w, uint64_t step)
{
    begin_step(w, step);
    layers(w, true);
    end_step(w);
}

/* Calls and time of a region, as the profile sees them. */
static tr_region_numbers look(world *w, const char *name, int layer)
{
    static tr_region_node node[NODES];
    const int n = tr_regions_look(&w->r, node, NODES);

    for (int i = 0; i < n; i++)
        if (!strcmp(w->r.total[node[i].id].name, name) && node[i].layer == layer)
            return node[i].in[TR_PHASE_DECODE];
    return (tr_region_numbers){0};
}

static void times_come_when_their_step_has_passed(void **state)
{
    world w;
    tr_device_step s;

    (void)state;
    open_world(&w, 24);
    plain_step(&w, 11);
    plain_step(&w, 12);
    tr_device_times_collect(w.t); /* not yet: nothing is read, and nobody waits */
    assert_int_equal(w.d.n_between, 0);
    assert_int_equal(look(&w, "op", 1).gpu_count, 0);
    assert_false(tr_device_times_of(w.t, 11, &s));
    w.d.passed = 1;
    plain_step(&w, 13); /* its begin reads the first */
    assert_int_equal(w.d.n_between, 1 + 2 * LAYERS);
    assert_true(tr_device_times_of(w.t, 11, &s));
    assert_int_equal(s.ns, STEP_NS + 6 * OP_NS);
    assert_false(s.recorded);
    assert_false(tr_device_times_of(w.t, 12, &s));
    w.d.passed = 3;
    tr_device_times_collect(w.t);
    for (int l = 0; l < LAYERS; l++) {
        assert_int_equal(look(&w, "op", l).gpu_count, 3);
        assert_int_equal(look(&w, "op", l).gpu_ns, 3 * (l + 1) * OP_NS);
        assert_int_equal(look(&w, "layer", l).gpu_ns, 3 * (l + 1) * OP_NS);
    }
    assert_int_equal(look(&w, "step", -1).gpu_ns, 3 * (STEP_NS + 6 * OP_NS));
    assert_int_equal(tr_device_times_lost(w.t), 0);
    close_world(&w);
}

/* Pairs run out in a step, which has a part of its times then; later steps have all of theirs again. */
static void what_finds_no_stamps_is_counted(void **state)
{
    world w;
    tr_device_step s;

    (void)state;
    open_world(&w, 10); /* a step wants 7 */
    plain_step(&w, 1);
    plain_step(&w, 2);
    assert_int_equal(tr_device_times_lost(w.t), 4);
    w.d.passed = 2;
    for (uint64_t i = 3; i < 40; i++) { /* around the ring, with only one on its way */
        plain_step(&w, i);
        w.d.passed = i;
    }
    tr_device_times_collect(w.t);
    assert_int_equal(tr_device_times_lost(w.t), 4);
    assert_int_equal(look(&w, "step", -1).gpu_count, 39);
    assert_int_equal(look(&w, "op", 2).gpu_count, 38);
    assert_int_equal(look(&w, "op", 2).gpu_ns, 38 * 3 * OP_NS);
    assert_true(tr_device_times_of(w.t, 39, &s));
    close_world(&w);
}

/* A device that is many steps behind: the newest are not timed, nothing is overwritten. */
static void too_many_steps_on_their_way(void **state)
{
    world w;
    tr_device_step s;

    (void)state;
    open_world(&w, 32);
    for (uint64_t i = 1; i <= 10; i++) {
        begin_step(&w, i);
        end_step(&w);
    }
    assert_int_equal(tr_device_times_lost(w.t), 2);
    w.d.passed = 10;
    tr_device_times_collect(w.t);
    assert_int_equal(look(&w, "step", -1).gpu_count, 8);
    assert_true(tr_device_times_of(w.t, 8, &s) && s.ns == STEP_NS);
    assert_false(tr_device_times_of(w.t, 9, &s));
    plain_step(&w, 11);
    w.d.passed = 11;
    tr_device_times_collect(w.t);
    assert_true(tr_device_times_of(w.t, 11, &s));
    assert_int_equal(tr_device_times_lost(w.t), 2);
    close_world(&w);
}

/* The n-th stamp fails, for every n of a step: one region is lost, at most, and the others are right. */
static void stamps_that_fail_lose_their_region_only(void **state)
{
    (void)state;
    for (int n = 1; n <= 2 * (1 + 2 * LAYERS); n++) {
        world w;
        open_world(&w, 24);
        w.d.failing = n;
        plain_step(&w, 1);
        assert_int_equal(w.d.failing, 0);
        w.d.passed = 1;
        tr_device_times_collect(w.t);
        assert_int_equal(tr_device_times_lost(w.t), 1);
        uint64_t calls = look(&w, "step", -1).gpu_count;
        for (int l = 0; l < LAYERS; l++) {
            const tr_region_numbers op = look(&w, "op", l), layer = look(&w, "layer", l);
            calls += op.gpu_count + layer.gpu_count;
            assert_int_equal(op.gpu_ns, op.gpu_count * (uint64_t)(l + 1) * OP_NS);
            assert_int_equal(layer.gpu_ns, layer.gpu_count * (uint64_t)(l + 1) * OP_NS);
        }
        assert_int_equal(calls, 2 * LAYERS);
        plain_step(&w, 2);
        w.d.passed = 2;
        w.d.cannot_read = true; /* every pair of the second step */
        tr_device_times_collect(w.t);
        assert_int_equal(tr_device_times_lost(w.t), 1 + 1 + 2 * LAYERS);
        close_world(&w);
    }
}

static void a_device_that_failed_is_asked_no_more(void **state)
{
    world w;
    tr_device_step s;

    (void)state;
    open_world(&w, 24);
    plain_step(&w, 1);
    w.d.passed = UINT64_MAX;
    plain_step(&w, 2);
    w.d.passed = 2;
    plain_step(&w, 3);
    assert_int_equal(w.d.n_between, 0);
    assert_false(tr_device_times_of(w.t, 1, &s));
    assert_int_equal(look(&w, "step", -1).gpu_count, 0);
    assert_int_equal(look(&w, "step", -1).count, 3); /* the host's numbers go on */
    close_world(&w);
}

/* A record with stamps is run in some steps: its layers are known from these alone, steps from all. */
static void records_are_sampled(void **state)
{
    world w;
    tr_device_step s;
    uint64_t at[2 * LAYERS];

    (void)state;
    open_world(&w, 24);
    tr_stamp_set *set = tr_stamp_set_create(w.d.of_record, LAYERS);
    assert_non_null(set);
    begin_step(&w, 1);
    tr_device_times_mode(w.t, TR_STAMP_RECORD, set);
    w.d.recording = true;
    layers(&w, false);
    w.d.recording = false;
    tr_device_times_mode(w.t, TR_STAMP_STEP, NULL);
    w.d.now += 6 * OP_NS; /* it is run */
    end_step(&w);
    assert_int_equal(w.d.n_recorded, 2 * LAYERS);
    assert_false(tr_stamp_set_busy(set));
    for (uint64_t i = 2; i <= 9; i++) {
        const bool sampled = i % 4 == 0;
        begin_step(&w, i);
        tr_device_times_mode(w.t, sampled ? TR_STAMP_REPLAY : TR_STAMP_STEP, sampled ? set : NULL);
        layers(&w, false); /* noted, not run */
        for (int l = 0; l < LAYERS; l++) {
            at[2 * l] = w.d.now;
            at[2 * l + 1] = w.d.now += (uint64_t)(l + 1) * OP_NS;
        }
        if (sampled) memcpy(w.d.of_record, at, sizeof at);
        end_step(&w);
        assert_int_equal(tr_stamp_set_busy(set), i % 4 < 1);
        w.d.passed = i - 1;
        tr_device_times_collect(w.t);
        assert_int_equal(tr_stamp_set_busy(set), sampled); /* until its own step has passed */
        w.d.passed = i;
        tr_device_times_collect(w.t);
        assert_false(tr_stamp_set_busy(set));
        assert_true(tr_device_times_of(w.t, i, &s));
        assert_true(s.recorded && s.ns == STEP_NS + 6 * OP_NS);
    }
    for (int l = 0; l < LAYERS; l++) {
        const tr_region_numbers layer = look(&w, "layer", l);
        assert_int_equal(layer.count, 9);
        assert_int_equal(layer.gpu_count, 2);
        assert_int_equal(layer.gpu_ns, 2 * (l + 1) * OP_NS);
        assert_int_equal(look(&w, "op", l).gpu_count, 0);
    }
    assert_int_equal(look(&w, "step", -1).gpu_count, 9);
    assert_int_equal(tr_device_times_lost(w.t), 0);
    tr_stamp_set_free(set);
    close_world(&w);
}

/* Halves are timed like their layers, in a record too. */
static void halves_are_timed(void **state)
{
    world w;
    uint64_t at[4 * LAYERS];

    (void)state;
    open_world(&w, 32);
    w.halves = true;
    tr_stamp_set *set = tr_stamp_set_create(w.d.of_record, 2 * LAYERS);
    assert_non_null(set);
    plain_step(&w, 1);
    begin_step(&w, 2);
    tr_device_times_mode(w.t, TR_STAMP_RECORD, set);
    w.d.recording = true;
    layers(&w, false);
    w.d.recording = false;
    tr_device_times_mode(w.t, TR_STAMP_STEP, NULL);
    end_step(&w);
    assert_int_equal(w.d.n_recorded, 4 * LAYERS);
    begin_step(&w, 3);
    tr_device_times_mode(w.t, TR_STAMP_REPLAY, set);
    layers(&w, false); /* noted; the record is run: a layer's stamps, then its half's */
    for (int l = 0; l < LAYERS; l++) {
        at[4 * l] = at[4 * l + 2] = w.d.now;
        at[4 * l + 3] = w.d.now += (uint64_t)(l + 1) * OP_NS;
        at[4 * l + 1] = w.d.now += OP_NS;
    }
    memcpy(w.d.of_record, at, sizeof at);
    end_step(&w);
    w.d.passed = 3;
    tr_device_times_collect(w.t);
    for (int l = 0; l < LAYERS; l++) {
        const tr_region_numbers layer = look(&w, "layer", l), half = look(&w, "half", l);
        assert_int_equal(layer.gpu_count, 2);
        assert_int_equal(half.gpu_count, 2);
        assert_int_equal(half.gpu_ns, 2 * (l + 1) * OP_NS);
        assert_int_equal(layer.gpu_ns, 2 * (l + 2) * OP_NS);
        assert_int_equal(look(&w, "op", l).gpu_count, 1);
    }
    assert_int_equal(tr_device_times_lost(w.t), 0);
    tr_stamp_set_free(set);
    close_world(&w);
}

static void nothing_is_nothing(void **state)
{
    tr_device_step s;
    tr_regions r = {0};
    const tr_stamp_source source = {0};

    (void)state;
    tr_device_times_begin(NULL, 1);
    tr_device_times_mode(NULL, TR_STAMP_ALL, NULL);
    tr_device_times_end(NULL, 1);
    tr_device_times_collect(NULL);
    assert_false(tr_device_times_of(NULL, 1, &s));
    assert_int_equal(tr_device_times_lost(NULL), 0);
    tr_device_times_free(NULL);
    assert_null(tr_device_times_create(&r, &source, 0));
    assert_null(r.clock.begin);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(times_come_when_their_step_has_passed),
        cmocka_unit_test(what_finds_no_stamps_is_counted),
        cmocka_unit_test(too_many_steps_on_their_way),
        cmocka_unit_test(stamps_that_fail_lose_their_region_only),
        cmocka_unit_test(a_device_that_failed_is_asked_no_more),
        cmocka_unit_test(records_are_sampled),
        cmocka_unit_test(halves_are_timed),
        cmocka_unit_test(nothing_is_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
