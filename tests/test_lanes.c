/* What a step puts on several lanes at once does not meet: a table in front of the CPU's notes what every operation reads and writes
 * on which lane, and which lane was made to follow which (tr_ops.order). Two operations on the same memory, one of which writes,
 * must come one behind the other whatever the lanes' pace. On a GPU a step that lacks an order is right nearly always. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "fixture.h"
#include "vectors.h"

enum { MEMORIES = 1024, PROMPT = 200 };

typedef struct memory {
    const char *begin;
    size_t bytes;
    bool split; /* caches: each pointer into them is memory of its own */
} memory;

typedef struct access {
    const void *of;
    int writer, written;  /* lane, and its time then; written 0: never */
    int read[TR_N_LANES]; /* when a lane read it last */
} access;

/* Operations are given a device and nothing else. */
static struct {
    const tr_ops *cpu;
    memory memory[MEMORIES];
    access access[MEMORIES];
    int n_memories, n_accesses;
    int known[TR_N_LANES][TR_N_LANES]; /* of lane i: up to what time of lane j it has waited */
    int n_orders, drop;                /* the drop-th order of a step is left out; 0: none */
    int n_conflicts;
    int n_dense_recorded, n_keys_recorded; /* dense_mha in a record, and with a number of keys */
    bool recording;
    bool refuses;          /* records: what is recorded is not run then, and there is memory for */
    int n_room, n_refused; /* so many; how many have been refused */
    char first[160];
} watch;

static access *access_of(const void *p)
{
    const void *of = NULL;
    int i = 0;

    for (int k = 0; k < watch.n_memories && p; k++) {
        const memory *m = &watch.memory[k];
        if ((const char *)p >= m->begin && (const char *)p < m->begin + m->bytes)
            of = m->split ? p : m->begin;
    }
    if (!of) return NULL; /* weights, or nothing */
    while (i < watch.n_accesses && watch.access[i].of != of)
        i++;
    if (i == watch.n_accesses) {
        assert_true(i < MEMORIES);
        watch.access[watch.n_accesses++] = (access){.of = of};
    }
    return &watch.access[i];
}

static void conflict(const char *op, tr_lane lane, const char *what, int other)
{
    if (watch.n_conflicts++ == 0)
        snprintf(watch.first, sizeof watch.first, "%s on lane %d %s lane %d", op, (int)lane, what,
                 other);
}

static void reads(const char *op, tr_lane lane, const void *p)
{
    access *a = access_of(p);

    if (!a) return;
    if (a->written > watch.known[lane][a->writer])
        conflict(op, lane, "reads what is being written on", a->writer);
    a->read[lane] = watch.known[lane][lane];
}

static void writes(const char *op, tr_lane lane, const void *p)
{
    access *a = access_of(p);

    if (!a) return;
    if (a->written > watch.known[lane][a->writer])
        conflict(op, lane, "writes what is being written on", a->writer);
    for (int i = 0; i < TR_N_LANES; i++)
        if (a->read[i] > watch.known[lane][i])
            conflict(op, lane, "writes what is being read on", i);
    a->writer = (int)lane;
    a->written = watch.known[lane][lane];
}

/* The memory that an operation reads, NULL, the memory that it writes, NULL. What it writes it may read. */
static void note(const char *op, tr_lane lane, const void *const *p)
{
    watch.known[lane][lane]++;
    for (; *p; p++)
        reads(op, lane, *p);
    for (p++; *p; p++)
        writes(op, lane, *p);
}

/* What is not there must not end the list: it is none of the memories that are looked at. */
static const void *some(const void *p)
{
    return p ? p : &watch;
}

static bool runs(void)
{
    return !watch.recording || !watch.refuses;
}

#define LIST(...) __VA_ARGS__
#define WATCHED(name, reading, writing)                                                            \
    static tr_status lane_##name(tr_device *d, tr_lane lane, const struct tr_##name##_args *a)     \
    {                                                                                              \
        note(#name, lane, (const void *const[]){reading, NULL, writing, NULL});                    \
        return runs() ? watch.cpu->name(d, lane, a) : TR_OK;                                       \
    }
#define OF(x) some(a->x)

/* A step's rows are one memory: rows.n. */
WATCHED(plan_apply, LIST(OF(plan)), LIST(OF(rows.n), OF(slots.length), OF(slots.page_table)))
WATCHED(pages_copy, LIST(OF(plan)), LIST(OF(kv.latent), OF(kv.index)))
WATCHED(embed, LIST(OF(rows->n)), LIST(OF(out)))
WATCHED(rows_gather, LIST(OF(index), OF(in)), LIST(OF(out), OF(n_out)))
WATCHED(swiglu, LIST(OF(n), OF(gate_up)), LIST(OF(out)))
WATCHED(mla_query, LIST(OF(rows->n)), LIST(OF(q), OF(q_absorbed)))
WATCHED(kv_write, LIST(OF(rows->n), OF(kv_a), OF(index_k)),
        LIST(some(a->kv_a ? a->kv.latent : NULL), some(a->index_k ? a->kv.index : NULL)))
WATCHED(index_query, LIST(OF(rows->n), OF(q)), LIST(OF(w), OF(out)))
WATCHED(index_logits, LIST(OF(rows->n), OF(q), OF(w), OF(kv.index)), LIST(OF(score)))
WATCHED(topk, LIST(OF(rows->n), OF(score), OF(rows->page_table)),
        LIST(OF(position), OF(cache_row), OF(n_selected)))
WATCHED(sparse_mla, LIST(OF(rows->n), OF(q), OF(cache_row), OF(position), OF(kv.latent)),
        LIST(OF(out), OF(workspace)))
static tr_status lane_dense_mha(tr_device *d, tr_lane lane, const struct tr_dense_mha_args *a)
{
    note("dense_mha", lane,
         (const void *const[]){OF(rows->n), OF(q), OF(kv.latent), OF(rows->page_table), NULL,
                               OF(out), OF(workspace), NULL});
    watch.n_dense_recorded += watch.recording;
    watch.n_keys_recorded += watch.recording && a->n_keys;
    return runs() ? watch.cpu->dense_mha(d, lane, a) : TR_OK;
}
WATCHED(mla_value, LIST(OF(rows->n), OF(u)), LIST(OF(out)))
WATCHED(router, LIST(OF(n), OF(logits)), LIST(OF(expert), OF(weight)))
WATCHED(moe_pack, LIST(OF(n), OF(expert)), LIST(OF(start), OF(pair), OF(rows)))
WATCHED(moe_combine, LIST(OF(n), OF(expert), OF(weight), OF(y), OF(shared)), LIST(OF(out)))
WATCHED(rows_zero, LIST(OF(n)), LIST(OF(out)))
WATCHED(sample, LIST(OF(rows->n), OF(logits), OF(plan)), LIST(OF(token_out), OF(workspace)))
WATCHED(logprobs, LIST(OF(rows->n), OF(logits), OF(token_out)), LIST(OF(logprob)))

/* The CPU quantises nothing: what a W8A8 backend would have of it is noted alone. */
static tr_status lane_norm(tr_device *d, tr_lane lane, const struct tr_norm_args *a)
{
    struct tr_norm_args plain = *a;

    note("norm", lane,
         (const void *const[]){OF(n), OF(add), NULL, OF(residual), OF(out), OF(q), NULL});
    plain.q = NULL;
    plain.q_scale = NULL;
    return runs() ? watch.cpu->norm(d, lane, &plain) : TR_OK;
}

static void forget(tr_acts *in)
{
    in->q = NULL;
    in->q_scale = NULL;
    in->quantised = 0;
}

static tr_status lane_linear(tr_device *d, tr_lane lane, const struct tr_linear_args *a)
{
    const bool fills = a->w->format == TR_W_E4M3_B128 && !a->in.quantised;
    struct tr_linear_args plain = *a;

    note("linear", lane,
         (const void *const[]){OF(n), some(a->in.quantised ? (const void *)a->in.q : a->in.x), NULL,
                               OF(out), some(fills ? a->in.q : NULL), NULL});
    forget(&plain.in);
    return runs() ? watch.cpu->linear(d, lane, &plain) : TR_OK;
}

static tr_status lane_moe(tr_device *d, tr_lane lane, const struct tr_moe_args *a)
{
    struct tr_moe_args plain = *a;

    note("moe", lane,
         (const void *const[]){OF(n), some(a->in.quantised ? (const void *)a->in.q : a->in.x),
                               OF(start), OF(pair), NULL, OF(out), OF(workspace), NULL});
    forget(&plain.in);
    return runs() ? watch.cpu->moe(d, lane, &plain) : TR_OK;
}

/* ---- the rest of the table ------------------------------------------------------------------------------------------ */

static tr_status lane_alloc(tr_device *d, size_t bytes, int kind, void **out)
{
    const tr_status st = watch.cpu->alloc(d, bytes, kind, out);

    assert_true(watch.n_memories < MEMORIES);
    if (st == TR_OK)
        watch.memory[watch.n_memories++] = (memory){*out, bytes, kind == TR_MEMORY_SYMMETRIC};
    return st;
}

static tr_status lane_upload(tr_device *d, tr_lane lane, void *dst, const void *src, size_t bytes)
{
    note("upload", lane, (const void *const[]){NULL, some(dst), NULL});
    return watch.cpu->upload(d, lane, dst, src, bytes);
}

static tr_status lane_download(tr_device *d, tr_lane lane, void *dst, const void *src, size_t bytes)
{
    note("download", lane, (const void *const[]){some(src), NULL, NULL});
    return watch.cpu->download(d, lane, dst, src, bytes);
}

static tr_status lane_order(tr_device *d, tr_lane before, tr_lane after)
{
    (void)d;
    if (++watch.n_orders == watch.drop) return TR_OK;
    for (int i = 0; i < TR_N_LANES; i++)
        if (watch.known[before][i] > watch.known[after][i])
            watch.known[after][i] = watch.known[before][i];
    return TR_OK;
}

/* What is recorded is run at once, and its first run is nothing. */
static tr_status lane_graph_begin(tr_device *d, tr_lane lane)
{
    (void)d, (void)lane;
    watch.recording = true;
    return TR_OK;
}

static tr_status lane_graph_end(tr_device *d, tr_lane lane, tr_graph **out)
{
    (void)d, (void)lane;
    watch.recording = false;
    if (out) *out = NULL;
    if (out && watch.refuses && watch.n_room-- <= 0) {
        watch.n_refused++;
        return TR_E_MEMORY;
    }
    if (out) *out = (tr_graph *)(void *)&watch;
    return TR_OK;
}

static tr_status lane_graph_run(tr_device *d, tr_lane lane, tr_graph *graph)
{
    (void)d, (void)lane, (void)graph;
    return TR_OK;
}

static void lane_graph_free(tr_device *d, tr_graph *graph)
{
    (void)d, (void)graph;
}

static tr_ops table_of(const tr_ops *cpu)
{
    tr_ops t = *cpu;

    t.caps = (cpu->caps | TR_CAP_GRAPH | TR_CAP_W8A8) & ~(unsigned)TR_CAP_HOST;
    t.alloc = lane_alloc;
    t.upload = lane_upload;
    t.download = lane_download;
    t.order = lane_order;
    t.graph_begin = lane_graph_begin;
    t.graph_end = lane_graph_end;
    t.graph_run = lane_graph_run;
    t.graph_free = lane_graph_free;
    t.plan_apply = lane_plan_apply;
    t.pages_copy = lane_pages_copy;
    t.embed = lane_embed;
    t.norm = lane_norm;
    t.rows_gather = lane_rows_gather;
    t.linear = lane_linear;
    t.swiglu = lane_swiglu;
    t.mla_query = lane_mla_query;
    t.kv_write = lane_kv_write;
    t.index_query = lane_index_query;
    t.index_logits = lane_index_logits;
    t.topk = lane_topk;
    t.sparse_mla = lane_sparse_mla;
    t.dense_mha = lane_dense_mha;
    t.mla_value = lane_mla_value;
    t.router = lane_router;
    t.moe_pack = lane_moe_pack;
    t.moe = lane_moe;
    t.moe_combine = lane_moe_combine;
    t.rows_zero = lane_rows_zero;
    t.sample = lane_sample;
    t.logprobs = lane_logprobs;
    return t;
}

/* ---- steps ---------------------------------------------------------------------------------------------------------- */

typedef struct world {
    tr_fixture f;
    tr_ops table;
} world;

/* The fixture's model again, with the table that watches. */
static int open_world(void **state)
{
    char path[512];
    world *w = calloc(1, sizeof *w);
    const tr_fixture_options options = {.dir = tr_source_path(path, sizeof path, "models/tiny"),
                                        .kv_dtype = TR_E4M3,
                                        .n_threads = 1};

    if (!w || tr_fixture_open(&w->f, &options)) return -1;
    tr_fixture *f = &w->f;
    tr_step_free(&f->step, f->model);
    tr_model_free(f->model);
    memset(&watch, 0, sizeof watch);
    watch.cpu = f->ops;
    w->table = table_of(f->ops);
    const tr_groups groups = {f->self, f->self, f->self, f->self, 1};
    const tr_model_options model = {.kv_dtype = TR_E4M3,
                                    .max_rows = 256,
                                    .n_slots = 4,
                                    .max_model_len = 1024,
                                    .n_pages = 4 * 1024 / TR_PAGE_TOKENS};
    f->model = NULL;
    if (tr_model_create(&f->model, &f->config, f->weights, f->device, &w->table, &groups, &model,
                        f->has_token, &f->regions, &f->err) != TR_OK ||
        tr_step_create(&f->step, f->model, &f->err) != TR_OK)
        return -1;
    *state = w;
    return 0;
}

static int close_world(void **state)
{
    world *w = *state;

    tr_fixture_close(&w->f);
    free(w);
    return 0;
}

/* n rows of a slot from `position` on. */
static void run(world *w, int slot, int position, int n, int kind)
{
    int32_t token[PROMPT];

    for (int i = 0; i < n; i++)
        token[i] = 5 + (position + i) * 7 % 1900;
    w->f.kind = (int16_t)kind;
    assert_int_equal(
        tr_fixture_run(&w->f, slot, token, position, n, 1, TR_FORM_AUTO, NULL, NULL, NULL), 0);
}

static void nothing_meets(void)
{
    if (watch.n_conflicts) fail_msg("%d conflicts, the first: %s", watch.n_conflicts, watch.first);
}

static void lanes_do_not_meet(void **state)
{
    world *w = *state;

    assert_int_equal(tr_fixture_slot(&w->f, 0, 2), 0);
    assert_int_equal(tr_fixture_slot(&w->f, 1, -1), 0);
    run(w, 0, 0, PROMPT, TR_SPAN_PREFILL); /* dense rows and rows that select */
    assert_true(PROMPT > w->f.config.index_topk);
    run(w, 1, 0, 5, TR_SPAN_PREFILL);
    run(w, 0, PROMPT, 3, TR_SPAN_PREFILL);
    for (int i = 0; i < 3; i++) { /* a record, and runs of it */
        run(w, 0, PROMPT + 3 + i, 1, TR_SPAN_DECODE);
        run(w, 1, 5 + i, 1, TR_SPAN_DECODE);
    }
    nothing_meets();
    assert_true(watch.known[TR_LANE_SIDE][TR_LANE_SIDE] > 0);
    assert_true(watch.known[TR_LANE_COPY][TR_LANE_COPY] > 0);
}

/* This test would see a lack, and none is for nothing: whichever order is left out, something meets. */
static void every_order_counts(void **state)
{
    world *w = *state;
    int position = PROMPT + 20;

    watch.n_orders = 0;
    run(w, 0, position, 3, TR_SPAN_PREFILL);
    const int n = watch.n_orders;
    assert_true(n >= 5 * w->f.config.num_hidden_layers);
    for (int i = 1; i <= n; i++) {
        position += 3;
        watch.n_accesses = watch.n_orders = watch.n_conflicts = 0;
        watch.drop = i;
        run(w, 0, position, 3, TR_SPAN_PREFILL);
        watch.drop = 0;
        if (watch.n_conflicts == 0) fail_msg("order %d of %d is not needed", i, n);
    }
    watch.n_accesses = watch.n_conflicts = 0;
    run(w, 0, position + 3, 3, TR_SPAN_PREFILL);
    nothing_meets();
}

/* A record serves steps with other keys: it must not be given this one's number. */
static void records_know_no_keys(void **state)
{
    world *w = *state;

    assert_int_equal(tr_fixture_slot(&w->f, 2, -1), 0);
    watch.n_dense_recorded = watch.n_keys_recorded = 0;
    run(w, 2, 0, 1,
        TR_SPAN_PREFILL); /* a prompt of one row: as many rows as the record has room for */
    assert_true(watch.n_dense_recorded > 0);
    assert_int_equal(watch.n_keys_recorded, 0);
    nothing_meets();
}

/* A prompt and what follows it. */
static void go_on(world *w, int32_t *token, int n)
{
    static const int32_t prompt[] = {5, 12, 19, 26, 33};

    assert_int_equal(tr_fixture_slot(&w->f, 3, -1), 0);
    w->f.kind = TR_SPAN_PREFILL;
    assert_int_equal(tr_fixture_run(&w->f, 3, prompt, 0, 5, 1, TR_FORM_AUTO, NULL, &token[0], NULL),
                     0);
    w->f.kind = TR_SPAN_DECODE;
    for (int i = 1; i < n; i++)
        assert_int_equal(tr_fixture_run(&w->f, 3, &token[i - 1], 4 + i, 1, 1, TR_FORM_AUTO, NULL,
                                        &token[i], NULL),
                         0);
}

static void new_step(world *w)
{
    tr_step_free(&w->f.step, w->f.model);
    assert_int_equal(tr_step_create(&w->f.step, w->f.model, &w->f.err), TR_OK);
    watch.n_refused = 0;
}

/* Steps go on without records that the device has no memory for, and it is not asked again. */
static void no_memory_for_records(void **state)
{
    world *w = *state;
    tr_step_records sum = {0}, more = {0};
    int32_t expected[6], plain[6];

    w->table.caps &= ~(unsigned)TR_CAP_GRAPH;
    go_on(w, expected, 6);
    w->table.caps |= TR_CAP_GRAPH;
    watch.refuses = true;
    watch.n_room = 0;
    new_step(w);
    go_on(w, plain, 6);
    assert_int_equal(watch.n_refused, 1);
    assert_memory_equal(plain, expected, sizeof plain);

    new_step(w);
    assert_int_equal(tr_step_record(&w->f.step, w->f.model, 4, &sum, &w->f.err), TR_OK);
    assert_int_equal(sum.n, 0);
    assert_true(sum.no_memory);
    memset(plain, 0, sizeof plain);
    go_on(w, plain, 6);
    assert_int_equal(watch.n_refused, 1);
    assert_memory_equal(plain, expected, sizeof plain);

    watch.n_room = 2;
    new_step(w);
    assert_int_equal(tr_step_record(&w->f.step, w->f.model, 4, &more, &w->f.err), TR_OK);
    assert_int_equal(more.n, 2);
    assert_true(more.no_memory);
    watch.refuses = false;
    new_step(w);
    nothing_meets();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(records_know_no_keys),
        cmocka_unit_test(lanes_do_not_meet),
        cmocka_unit_test(every_order_counts),
        cmocka_unit_test(no_memory_for_records),
    };
    return cmocka_run_group_tests(tests, open_world, close_world);
}
