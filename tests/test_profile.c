/* src/profile: what was put in is what the file says: sleeps, bytes, imbalance, counts; and what happens when it cannot be
 * written. A run of several ranks is made one after the other here: serial HDF5 knows no threads. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <hdf5.h>

#include "base/clock.h"
#include "engine/gaps.h"
#include "mpi/comm.h"
#include "profile/join.h"
#include "profile/node.h"
#include "profile/profile.h"
#include "profile/read.h"
#include "profile/settle.h"
#include "profile/snapshot.h"
#include "scratch.h"

enum { WORLD = 3, LAYERS = 2, EXPERTS = 4, STEPS = 40, MS = 1000000 };

static char dir[128];

#ifdef __SANITIZE_ADDRESS__
/* Whole stacks through HDF5, which has no frame pointers: tests/lsan.supp names one of its functions. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "fast_unwind_on_malloc=0";
}
#endif

static void nap(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * MS}, NULL);
}

/* ---- reading what was written ------------------------------------------------------------------------------------------ */

/* A dataset of the schema with its own memory type; dims[3]. The caller frees. */
static void *get(const char *file, const char *path, hsize_t *dims)
{
    const tr_dataset *d = tr_dataset_find(path, NULL);
    assert_non_null(d);
    hid_t f = H5Fopen(file, H5F_ACC_RDONLY, H5P_DEFAULT);
    assert_true(f >= 0);
    hid_t id = H5Dopen2(f, path, H5P_DEFAULT);
    if (id < 0) fail_msg("%s has no %s", file, path);
    hid_t space = H5Dget_space(id), type = tr_schema_memory_type(d);
    assert_int_equal(H5Sget_simple_extent_ndims(space), tr_dataset_axes(d));
    dims[0] = dims[1] = dims[2] = 1;
    H5Sget_simple_extent_dims(space, dims, NULL);
    void *data = calloc((size_t)(dims[0] * dims[1] * dims[2]) + 1, H5Tget_size(type));
    assert_non_null(data);
    assert_true(H5Dread(id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0);
    H5Tclose(type);
    H5Sclose(space);
    H5Dclose(id);
    H5Fclose(f);
    return data;
}

static int64_t get_number(const char *file, const char *object, const char *name)
{
    int64_t value = -1;
    hid_t f = H5Fopen(file, H5F_ACC_RDONLY, H5P_DEFAULT);
    assert_true(f >= 0);
    hid_t a = H5Aopen_by_name(f, object, name, H5P_DEFAULT, H5P_DEFAULT);
    assert_true(a >= 0 && H5Aread(a, H5T_NATIVE_INT64, &value) >= 0);
    H5Aclose(a);
    H5Fclose(f);
    return value;
}

static int row_named(const tr_prof_region *r, hsize_t n, const char *name, int layer)
{
    for (hsize_t i = 0; i < n; i++)
        if (strcmp(r[i].name, name) == 0 && r[i].layer == layer) return (int)i;
    fail_msg("no region %s of layer %d", name, layer);
    return -1;
}

/* ---- a made-up rank ------------------------------------------------------------------------------------------------------- */

typedef struct made {
    int rank, work_ms;
    uint64_t n_done; /* steps */
    uint64_t took_ns
        [LAYERS]; /* the operation, in prompts: asked for work_ms each, on a busy machine more */
    tr_regions regions;
} made;

static void tables(void *ctx, tr_profile_tables *out)
{
    const made *m = ctx;
    out->comm[0] = (tr_prof_comm){.region = 0, .calls = 7, .bytes = 1000u * (unsigned)m->rank};
    for (int r = 0; r < WORLD; r++)
        out->sent[0][r] = (uint64_t)(10 * m->rank + r);
    for (int l = 0; l < LAYERS; l++) {
        out->overlap[l].bytes = 5;
        out->rank_tokens[l] = m->n_done * (uint64_t)(m->rank + 1);
        out->expert_tokens[l * EXPERTS + m->rank] = out->rank_tokens[l];
    }
}

static void rank_tokens(void *ctx, uint64_t *per_layer)
{
    const made *m = ctx;
    for (int l = 0; l < LAYERS; l++)
        per_layer[l] = m->n_done * (uint64_t)(m->rank + 1);
}

static void sample(void *ctx, tr_prof_kv *kv, tr_prof_memory *memory)
{
    (void)ctx;
    kv->hits = 11;
    memory->weights = 12;
}

static tr_profile_options options_of(made *m, const char *path)
{
    return (tr_profile_options){.path = path,
                                .flush_s = 0.05,
                                .sample_s = 0.01,
                                .origin_ns = (int64_t)tr_now_ns(),
                                .world = WORLD,
                                .n_layers = LAYERS,
                                .n_experts = EXPERTS,
                                .n_comm = 1,
                                .n_matrices = 1,
                                .matrix = {"MOE"},
                                .trace = true,
                                .events_max = 4096,
                                .ctx = m,
                                .sample = sample,
                                .tables = tables,
                                .rank_tokens = rank_tokens};
}

/* STEPS steps of LAYERS layers with one operation of 100 bytes each; every tenth is a prompt's; one sleep a layer. A step is told
 * to be done when the next one has run, as a leader does that plans ahead. */
static void run_steps(tr_profile *p, made *m)
{
    tr_regions *r = &m->regions;
    const int step = tr_region_id_of(r, "step", TR_KIND_STEP, -1),
              layer = tr_region_id_of(r, "layer", TR_KIND_LAYER, -1),
              op = tr_region_id_of(r, "linear", TR_KIND_KERNEL, -1),
              wait = tr_region_id_of(r, "moe/wait", TR_KIND_WAIT, 9);

    tr_prof_step done = {0};
    for (int s = 1; s <= STEPS; s++) {
        const uint64_t begun = tr_now_ns();
        tr_profile_begin_step(p, (uint64_t)s);
        tr_regions_phase(r, s % 10 == 1 ? TR_PHASE_PREFILL : TR_PHASE_DECODE);
        tr_region_begin(r, step);
        for (int l = 0; l < LAYERS; l++) {
            tr_region_begin_layer(r, layer, l);
            const uint64_t op_ns = tr_ticks_now(&r->ticks);
            tr_region_begin(r, op);
            if (s % 10 == 1) nap(m->work_ms);
            tr_region_end(r, 100, 50);
            if (s % 10 == 1) m->took_ns[l] += tr_ticks_now(&r->ticks) - op_ns;
            tr_region_begin(r, wait);
            if (s == 5) nap(2);
            tr_region_end(r, 0, 0);
            tr_region_end(r, 0, 0);
        }
        tr_region_end(r, 0, 0);
        tr_regions_phase(r, TR_PHASE_NONE);
        m->n_done++;
        if (s > 1) tr_profile_step(p, &done);
        done = (tr_prof_step){.step = (uint64_t)s,
                              .t0 = tr_profile_time(p, begun),
                              .t1 = tr_profile_time(p, tr_now_ns()),
                              .tok_decode = 3};
    }
    tr_profile_step(p, &done);
}

/* One rank's whole life; the file's path into `path`. */
static void run_rank(made *m, char *path, size_t n)
{
    tr_profile *p = NULL;
    tr_err err = {0};
    const uint64_t one = 1;
    tr_comm *self = tr_comm_self();

    snprintf(path, n, "%s/rank%05d.h5", dir, m->rank);
    assert_true(tr_regions_grow(&m->regions, "main", 64));
    const tr_profile_options o = options_of(m, path);
    if (tr_profile_create(&p, &o, &err) != TR_OK) fail_msg("%s", err.text);
    tr_profile_text(p, "/run", "model", "made up");
    tr_profile_put(p, TR_D_RANKS, &one, &(tr_prof_rank){.rank = m->rank, .host = "here"});
    tr_profile_stream(p, &m->regions);
    tr_profile_start(p);
    run_steps(p, m);
    tr_profile_request(p, &(tr_prof_request){.line = 3, .n_out = 8});
    tr_profile_warn(p, "rank %d says", m->rank);
    tr_regions_cut(&m->regions);
    tr_profile_stop(p);
    assert_true(tr_profile_well(p));
    const tr_profile_costs costs = tr_profile_costs_get(p);
    assert_true(costs.flushes >= 2 && costs.lost_steps == 0 && costs.lost_events == 0);
    assert_int_equal(tr_profile_settle(p, self, 0, 0, &err), TR_OK);
    tr_profile_close(p, true);
    tr_regions_prune(&m->regions);
    tr_comm_free(self);
}

/* ---- what a rank's file says ------------------------------------------------------------------------------------------------ */

static void sums_and_counts_are_true(void **state)
{
    made m = {.rank = 0, .work_ms = 4};
    char path[256];
    hsize_t dims[3];

    (void)state;
    run_rank(&m, path, sizeof path);
    hsize_t n;
    tr_prof_region *region = get(path, "/regions", dims);
    n = dims[0];
    uint64_t *count = get(path, "/profile/count", dims),
             *excl = get(path, "/profile/time_excl", dims),
             *incl = get(path, "/profile/time_incl", dims),
             *bytes = get(path, "/profile/bytes", dims),
             *exposed = get(path, "/profile/exposed", dims),
             *decode = get(path, "/phase/decode/count", dims),
             *least = get(path, "/profile/time_min", dims),
             *most = get(path, "/profile/time_max", dims),
             *prefill_ns = get(path, "/phase/prefill/time_excl", dims), sum = 0;
    double *flops = get(path, "/profile/flops", dims);
    assert_int_equal(n, 1 + 1 + 3 * LAYERS);
    for (hsize_t i = 0; i < n; i++) {
        sum += excl[i];
        assert_true(region[i].parent < (int)i);
        assert_true(least[i] <= most[i]);
    }
    assert_int_equal(region[0].parent, -1);
    assert_string_equal(region[0].name, "main");
    assert_int_equal(sum, incl[0]);
    assert_int_equal(count[row_named(region, n, "step", -1)], STEPS);
    for (int l = 0; l < LAYERS; l++) {
        const int op = row_named(region, n, "linear", l),
                  wait = row_named(region, n, "moe/wait", l);
        assert_int_equal(count[row_named(region, n, "layer", l)], STEPS);
        assert_int_equal(count[op], STEPS);
        assert_int_equal(decode[op], STEPS - STEPS / 10);
        assert_int_equal(bytes[op], 100 * STEPS);
        assert_true(flops[op] == 50 * STEPS);
        assert_int_equal(exposed[op], 0);
        assert_int_equal(region[op].kind, TR_KIND_KERNEL);
        /* sleeps: never shorter than asked for, and no longer than they were seen to be from outside */
        const uint64_t asked = (uint64_t)m.work_ms * MS * (STEPS / 10);
        assert_in_range(prefill_ns[op], asked, m.took_ns[l]);
        assert_true(exposed[wait] == excl[wait] && exposed[wait] >= 2 * MS);
        assert_int_equal(region[wait].group, 9);
        assert_int_equal(region[region[op].parent].layer, l);
    }
    free(region), free(count), free(excl), free(incl), free(bytes), free(exposed), free(decode);
    free(least), free(most), free(prefill_ns), free(flops);
}

static void rows_are_true(void **state)
{
    made m = {.rank = 0};
    char path[256];
    hsize_t dims[3], n_events[3];

    (void)state;
    run_rank(&m, path, sizeof path);
    tr_prof_step *step = get(path, "/steps", dims);
    assert_int_equal(dims[1], STEPS);
    for (int i = 0; i < STEPS; i++) {
        assert_int_equal(step[i].step, i + 1);
        assert_true(step[i].t0 >= 0 && step[i].t1 >= step[i].t0 && step[i].t1 < 3600000ll * MS);
        assert_int_equal(step[i].tok_decode, 3);
    }
    tr_prof_trace *e = get(path, "/trace/main", n_events);
    /* every region that ended, the root too */
    assert_int_equal(n_events[1], STEPS * (1 + 3 * LAYERS) + 1);
    tr_prof_region *region = get(path, "/regions", dims);
    for (hsize_t i = 0; i + 1 < n_events[1]; i++) {
        assert_true(e[i].region > 0 && e[i].region < dims[0]);
        assert_int_equal(e[i].step, 1 + i / (1 + 3 * LAYERS));
        assert_int_equal(e[i].bytes, strcmp(region[e[i].region].name, "linear") ? 0 : 100);
    }
    assert_int_equal(e[n_events[1] - 1].step, UINT32_MAX);
    assert_int_equal(get_number(path, "/trace/main", "dropped"), 0);
    tr_prof_request *q = get(path, "/requests", dims);
    assert_int_equal(dims[0], 1);
    assert_true(q[0].id == 0 && q[0].line == 3 && q[0].n_out == 8);
    tr_prof_kv *kv = get(path, "/kv", dims);
    assert_true(dims[1] >= 1 && kv[0].hits == 11 && kv[0].t >= 0);
    assert_int_equal(get_number(path, "/", "complete"), 1);
    free(step), free(e), free(region), free(q), free(kv);
}

/* ---- several ranks ------------------------------------------------------------------------------------------------------------- */

static void imbalance_is_found_in_the_joined_file(void **state)
{
    char path[256], file[256], folder[256];
    hsize_t dims[3];

    (void)state;
    uint64_t took_ns[WORLD];
    for (int r = 0; r < WORLD; r++) {
        made m = {.rank = r, .work_ms = 2 + 6 * r};
        run_rank(&m, path, sizeof path);
        took_ns[r] = m.took_ns[0];
    }
    snprintf(file, sizeof file, "%s/joined.h5", dir);
    snprintf(folder, sizeof folder, ".");
    tr_err err = {0};
    if (tr_profile_join(file, folder, WORLD, &err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(get_number(file, "/", "ranks_missing"), 0);
    assert_int_equal(get_number(file, "/", "complete"), 1);
    tr_prof_region *region = get(file, "/regions", dims);
    const int op = row_named(region, dims[0], "linear", 0);
    const hsize_t n = dims[0];
    uint64_t *ns = get(file, "/profile/time_excl", dims);
    assert_int_equal(dims[0], WORLD);
    assert_int_equal(dims[1], n);
    uint64_t *prefill_ns = get(file, "/phase/prefill/time_excl", dims);
    for (int r = 0; r < WORLD; r++) {
        const hsize_t at = (hsize_t)r * n + (hsize_t)op;
        assert_in_range(prefill_ns[at], (uint64_t)(2 + 6 * r) * MS * (STEPS / 10), took_ns[r]);
        assert_true(ns[at] >= prefill_ns[at]);
    }
    free(prefill_ns);
    uint64_t *matrix = get(file, "/comm/matrix/MOE", dims);
    for (int i = 0; i < WORLD * WORLD; i++)
        assert_int_equal(matrix[i], 10 * (i / WORLD) + i % WORLD);
    tr_prof_comm *comm = get(file, "/comm/ops", dims);
    assert_true(comm[2].bytes == 2000 && comm[2].calls == 7 && comm[2].region == 0);
    uint64_t *experts = get(file, "/moe/expert_tokens", dims);
    for (int i = 0; i < LAYERS * EXPERTS; i++)
        assert_int_equal(experts[i], i % EXPERTS < WORLD ? STEPS * (i % EXPERTS + 1) : 0);
    /* 1, 2 and 3 rows a step: the mean over the largest is 2/3 in every window */
    float *balance = get(file, "/moe/balance", dims);
    assert_int_equal(dims[0], (STEPS + 15) / 16);
    for (hsize_t i = 0; i < dims[0] * dims[1]; i++)
        assert_true(fabsf(balance[i] - 2.0f / 3.0f) < 1e-6f);
    tr_prof_rank *rank = get(file, "/grid/ranks", dims);
    assert_true(dims[0] == WORLD && rank[1].rank == 1);
    char **line = get(file, "/log", dims);
    assert_int_equal(dims[0], WORLD);
    assert_string_equal(line[2], "rank 2 says");
    for (hsize_t i = 0; i < dims[0]; i++)
        H5free_memory(line[i]);
    free(region), free(ns), free(matrix), free(comm), free(experts), free(balance), free(rank);
    free(line);
}

/* A rank without a file: its rows are empty, the others' are there. Both may be moved together. */
static void a_missing_rank_is_said(void **state)
{
    char path[256], file[256], moved[256], other[288];
    hsize_t dims[3];
    tr_err err = {0};

    (void)state;
    for (int r = 0; r < WORLD; r += 2) {
        made m = {.rank = r};
        run_rank(&m, path, sizeof path);
    }
    snprintf(path, sizeof path, "%s/rank00001.h5", dir);
    unlink(path);
    snprintf(file, sizeof file, "%s/joined.h5", dir);
    assert_int_equal(tr_profile_join(file, ".", WORLD, &err), TR_OK);
    assert_int_equal(get_number(file, "/", "ranks_missing"), 1);
    /* a run of which something is missing is not complete, and its readers say what */
    assert_int_equal(get_number(file, "/", "complete"), 0);
    tr_reader *r = NULL;
    assert_int_equal(tr_reader_open(&r, file, &err), TR_OK);
    assert_string_equal(tr_reader_attribute(r, "/", "missing"), "1");
    assert_false(tr_reader_about_of(r)->complete);
    assert_non_null(tr_reader_note(r, 0));
    assert_non_null(strstr(tr_reader_note(r, 0), "rank 1 of 3 is missing"));
    tr_reader_close(r);
    snprintf(moved, sizeof moved, "%s-moved", dir);
    assert_int_equal(rename(dir, moved), 0);
    snprintf(other, sizeof other, "%s/joined.h5", moved);
    tr_prof_step *step = get(other, "/steps", dims);
    assert_true(dims[0] == WORLD && dims[1] == STEPS);
    assert_true(step[0].step == 1 && step[STEPS].step == 0 && step[2 * STEPS].step == 1);
    free(step);
    assert_int_equal(rename(moved, dir), 0);
    assert_int_equal(tr_profile_join(file, "nowhere", WORLD, &err), TR_E_IO);
    snprintf(other, sizeof other, "%s.part", file);
    assert_int_not_equal(access(other, F_OK), 0);
}

static void move_file(const char *from_folder, const char *to_folder, const char *name)
{
    char from[512], to[512];
    snprintf(from, sizeof from, "%s/%s", from_folder, name);
    snprintf(to, sizeof to, "%s/%s", to_folder, name);
    assert_int_equal(rename(from, to), 0);
}

/* The same bytes in both files. */
static void same_in(const char *a, const char *b, const char *path, size_t bytes)
{
    hsize_t da[3], db[3];
    void *x = get(a, path, da), *y = get(b, path, db);
    assert_memory_equal(da, db, sizeof da);
    if (memcmp(x, y, bytes * (size_t)(da[0] * da[1] * da[2]))) fail_msg("%s differs", path);
    free(x);
    free(y);
}

/* Files of nodes, ranks spread over them in turn, say through the joined file what the ranks' own files say. */
static void files_of_nodes_hold_what_those_of_ranks_do(void **state)
{
    static const char *const numbers[] = {
        "/profile/count",     "/profile/time_incl", "/profile/time_excl",      "/profile/time_min",
        "/profile/bytes",     "/profile/exposed",   "/phase/decode/count",     "/profile/flops",
        "/moe/expert_tokens", "/moe/rank_tokens",   "/phase/prefill/time_max", "/moe/window_tokens",
        "/comm/matrix/MOE"};
    char path[1024], ranks[256], nodes[256], scratch[2][256], folder[256], from[512], name[32];
    tr_err err = {0};
    hsize_t dims[3];

    (void)state;
    for (int r = 0; r < WORLD; r++) {
        made m = {.rank = r, .work_ms = 1};
        run_rank(&m, path, sizeof path);
    }
    snprintf(folder, sizeof folder, "%s/kept", dir);
    assert_int_equal(mkdir(folder, 0777), 0);
    snprintf(ranks, sizeof ranks, "%s/ranks.h5", dir);
    snprintf(nodes, sizeof nodes, "%s/nodes.h5", dir);
    assert_int_equal(setenv("TMPDIR", dir, 1), 0);
    for (int i = 0; i < 2; i++)
        assert_int_equal(tr_profile_scratch_make(scratch[i], sizeof scratch[i], &err), TR_OK);
    for (int r = 0; r < WORLD; r++) {
        snprintf(name, sizeof name, "rank%05d.h5", r);
        snprintf(from, sizeof from, "%s/%s", dir, name);
        snprintf(path, sizeof path, "%s/%s", folder, name);
        assert_int_equal(tr_profile_snapshot(from, path, false, &err), TR_OK);
        move_file(dir, scratch[r % 2], name);
    }
    if (tr_profile_join(ranks, "kept", WORLD, &err) != TR_OK) fail_msg("%s", err.text);
    snprintf(folder, sizeof folder, "%s/nodes", dir);
    assert_int_equal(mkdir(folder, 0777), 0);
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/node%05d.h5", folder, i);
        if (tr_profile_node_write(scratch[i], path, &err) != TR_OK) fail_msg("%s", err.text);
        tr_prof_rank *rank = get(path, "/grid/ranks", dims);
        assert_int_equal(dims[0], i == 0 ? 2 : 1);
        assert_int_equal(rank[dims[0] - 1].rank, i == 0 ? 2 : 1);
        free(rank);
        tr_profile_scratch_remove(scratch[i]);
        assert_int_not_equal(access(scratch[i], F_OK), 0);
    }
    if (tr_profile_join(nodes, "nodes", WORLD, &err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(get_number(nodes, "/", "ranks_missing"), 0);
    assert_int_equal(get_number(nodes, "/", "complete"), 1);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        same_in(ranks, nodes, numbers[i], 8);
    same_in(ranks, nodes, "/moe/balance", 4);
    same_in(ranks, nodes, "/steps", sizeof(tr_prof_step));
    same_in(ranks, nodes, "/grid/ranks", sizeof(tr_prof_rank));
    same_in(ranks, nodes, "/trace/main", sizeof(tr_prof_trace));
    same_in(ranks, nodes, "/requests", sizeof(tr_prof_request));
    /* a node that is missing takes its ranks with it */
    unlink(path); /* node00001.h5 */
    assert_int_equal(tr_profile_join(nodes, "nodes", WORLD, &err), TR_OK);
    assert_int_equal(get_number(nodes, "/", "ranks_missing"), 1);
    assert_int_equal(get_number(nodes, "/", "complete"), 0);
    /* and one that says nonsense is none */
    assert_int_equal(tr_scratch_write(folder, "node00001.h5", "no HDF5", 7), 0);
    assert_int_equal(tr_profile_join(nodes, "nodes", WORLD, &err), TR_OK);
    assert_int_equal(get_number(nodes, "/", "ranks_missing"), 1);
    unsetenv("TMPDIR");
}

typedef struct copies {
    made made;
    const char *path;
    int n, n_read;
} copies;

static void read_copy(void *ctx)
{
    copies *c = ctx;
    tr_reader *r = NULL;
    tr_err err = {0};

    c->n++;
    if (tr_reader_open(&r, c->path, &err) == TR_OK) c->n_read++;
    tr_reader_close(r);
}

/* What a leader finds while its ranks run: copies that can be opened. */
static void copies_can_be_read_at_once(void **state)
{
    char path[256], part[272];
    copies c = {.made = {.rank = 0}, .path = part};
    tr_profile *p = NULL;
    tr_err err = {0};
    const uint64_t one = 1;

    (void)state;
    snprintf(path, sizeof path, "%s/copied.h5", dir);
    snprintf(part, sizeof part, "%s.part", path);
    assert_true(tr_regions_grow(&c.made.regions, "main", 64));
    tr_profile_options o = options_of(&c.made, path);
    o.clear = true;
    o.copied = read_copy;
    assert_int_equal(tr_profile_create(&p, &o, &err), TR_OK);
    tr_profile_put(p, TR_D_RANKS, &one, &(tr_prof_rank){.rank = 0});
    tr_profile_stream(p, &c.made.regions);
    tr_profile_start(p); /* flushes */
    tr_profile_stop(p);
    tr_profile_close(p, true);
    tr_regions_prune(&c.made.regions);
    assert_true(c.n >= 1);
    assert_int_equal(c.n_read, c.n);
}

/* HDF5 has its own mind about % in the names of sources. */
static void names_may_have_per_cent_signs(void **state)
{
    static const char folder[] = "50%b%%x%d";
    char path[256], file[256], link[256];
    hsize_t dims[3];
    tr_err err = {0};

    (void)state;
    for (int r = 0; r < WORLD; r++) {
        made m = {.rank = r};
        run_rank(&m, path, sizeof path);
    }
    snprintf(link, sizeof link, "%s/%s", dir, folder);
    assert_int_equal(symlink(".", link), 0);
    snprintf(file, sizeof file, "%s/100%%b.h5", dir);
    if (tr_profile_join(file, folder, WORLD, &err) != TR_OK) fail_msg("%s", err.text);
    tr_prof_step *step = get(file, "/steps", dims);
    assert_true(dims[0] == WORLD && dims[1] == STEPS);
    assert_true(step[0].step == 1 && step[2 * STEPS].step == 1);
    free(step);
    unlink(link);
}

/* ---- limits ------------------------------------------------------------------------------------------------------------------------ */

/* Nobody samples for an hour: what does not fit is counted, and windows of the experts grow longer instead of more. */
static void full_buffers_are_counted(void **state)
{
    enum { MANY = 40000 };
    made m = {.rank = 0};
    char path[256];
    hsize_t dims[3];
    tr_profile *p = NULL;
    tr_err err = {0};

    (void)state;
    snprintf(path, sizeof path, "%s/many.h5", dir);
    tr_profile_options o = options_of(&m, path);
    o.flush_s = o.sample_s = 3600;
    o.trace = false;
    assert_int_equal(tr_profile_create(&p, &o, &err), TR_OK);
    tr_profile_start(p);
    for (int s = 1; s <= MANY; s++) {
        m.n_done++;
        tr_profile_step(p, &(tr_prof_step){.step = (uint64_t)s});
    }
    for (int i = 0; i < 5000; i++)
        tr_profile_warn(p, "%d", i);
    tr_profile_stop(p);
    assert_true(tr_profile_well(p));
    const uint64_t lost = tr_profile_costs_get(p).lost_steps;
    tr_profile_close(p, true);
    tr_prof_step *step = get(path, "/steps", dims);
    assert_true(lost > 0 && dims[1] + lost == MANY);
    assert_int_equal(get_number(path, "/", "steps_lost"), lost);
    assert_int_equal(get_number(path, "/", "requests_lost"), 0);
    assert_true(get_number(path, "/", "lines_lost") > 0);
    tr_reader *r = NULL;
    bool steps_said = false, lines_said = false;
    assert_int_equal(tr_reader_open(&r, path, &err), TR_OK);
    for (size_t i = 0; tr_reader_note(r, i); i++) {
        steps_said |= strstr(tr_reader_note(r, i), " steps came faster") != NULL;
        lines_said |= strstr(tr_reader_note(r, i), " lines of /log came faster") != NULL;
        assert_null(strstr(tr_reader_note(r, i), " requests came faster"));
    }
    assert_true(steps_said && lines_said);
    tr_reader_close(r);
    free(step);
    uint64_t *window = get(path, "/moe/window_tokens", dims), sum = 0;
    const int64_t length = get_number(path, "/moe/window_tokens", "window_steps");
    assert_true(dims[1] < 512 && length * (int64_t)dims[1] >= MANY);
    for (hsize_t w = 0; w < dims[1]; w++)
        sum += window[w * LAYERS];
    assert_int_equal(sum, MANY);
    free(window);
}

/* A disk that is full: one warning, and the run goes on. */
static void a_full_disk_ends_the_profile_only(void **state)
{
    made m = {.rank = 0};
    char path[256], text[4096] = "";
    tr_profile *p = NULL;
    tr_err err = {0};
    FILE *out = tmpfile();
    struct rlimit before, small;

    (void)state;
    assert_non_null(out);
    snprintf(path, sizeof path, "%s/full.h5", dir);
    tr_log *log = tr_log_create(out, false, false);
    tr_profile_options o = options_of(&m, path);
    o.log = log;
    o.trace = false;
    assert_int_equal(tr_profile_create(&p, &o, &err), TR_OK);
    assert_true(tr_regions_grow(&m.regions, "main", 64));
    tr_profile_stream(p, &m.regions);
    tr_profile_start(p);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = before;
    small.rlim_cur = 4096;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    for (int i = 0; i < 20000 && tr_profile_well(p); i++) {
        run_steps(p, &m);
        nap(10);
    }
    setrlimit(RLIMIT_FSIZE, &before);
    assert_false(tr_profile_well(p));
    run_steps(p, &m); /* nothing of it is recorded */
    tr_regions_cut(&m.regions);
    tr_comm *self = tr_comm_self();
    assert_int_equal(tr_profile_settle(p, self, 0, 0, &err), TR_OK);
    tr_profile_close(p, true);
    tr_regions_prune(&m.regions);
    tr_comm_free(self);
    tr_log_free(log);
    rewind(out);
    text[fread(text, 1, sizeof text - 1, out)] = '\0';
    fclose(out);
    const char *said = strstr(text, "the profile ends here");
    assert_non_null(said);
    assert_null(strstr(said + 1, "the profile ends here"));
    assert_int_not_equal(access(path, F_OK), 0);
}

static void it_says_why_it_cannot_begin(void **state)
{
    made m = {.rank = 0};
    tr_profile *p = (tr_profile *)&m;
    tr_err err = {0};
    tr_profile_options o = options_of(&m, "/nowhere/at/all.h5");

    (void)state;
    assert_int_equal(tr_profile_create(&p, &o, &err), TR_E_IO);
    assert_null(p);
    assert_non_null(strstr(err.text, "/nowhere/at/all.h5.new"));
    o.n_layers = -1;
    assert_int_equal(tr_profile_create(&p, &o, &err), TR_E_USAGE);
    /* and no profile is none to record into */
    tr_profile_step(NULL, &(tr_prof_step){0});
    tr_profile_request(NULL, &(tr_prof_request){0});
    tr_profile_warn(NULL, "%d", 1);
    tr_profile_start(NULL);
    tr_profile_stop(NULL);
    tr_profile_close(NULL, true);
    assert_false(tr_profile_well(NULL));
}

/* Percentiles of times between tokens are right within an eighth, and ends of the scale are no trap. */
static void gaps_are_right_within_an_eighth(void **state)
{
    tr_gaps g = {{0}};

    (void)state;
    assert_int_equal(tr_gaps_percentile(&g, 0.5), 0);
    for (int i = 1; i <= 1000; i++)
        tr_gaps_add(&g, (uint64_t)i * 100000);
    assert_in_range(tr_gaps_percentile(&g, 0.5), 50000000 / 8 * 7, 50000000 / 8 * 9);
    assert_in_range(tr_gaps_percentile(&g, 0.99), 99000000 / 8 * 7, 99000000 / 8 * 9);
    for (int bit = 10; bit < 32; bit++)
        for (uint64_t quarter = 0; quarter < 4; quarter++) {
            const uint64_t ns = (4 + quarter) << bit >> 2;
            g = (tr_gaps){{0}};
            tr_gaps_add(&g, ns);
            const uint64_t got = tr_gaps_percentile(&g, 1);
            assert_true(got >= ns && got - ns <= ns / 8);
        }
    g = (tr_gaps){{0}};
    tr_gaps_add(&g, 0);
    assert_in_range(tr_gaps_percentile(&g, 0.5), 1, 2048);
    g = (tr_gaps){{0}};
    tr_gaps_add(&g, UINT64_MAX);
    assert_true(tr_gaps_percentile(&g, 0.5) > 3000000000u);
}

/* What a killed run leaves is a whole file or the one before it. */
static void a_copy_is_whole_or_not_there(void **state)
{
    static char data[600000], back[sizeof data + 1];
    char from[256], to[256], tmp[300];
    tr_err err = {0};
    struct stat sb;

    (void)state;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (char)(i * 7 + i / 251);
    assert_int_equal(tr_scratch_write(dir, "from", data, sizeof data), 0);
    snprintf(from, sizeof from, "%s/from", dir);
    snprintf(to, sizeof to, "%s/to", dir);
    snprintf(tmp, sizeof tmp, "%s.tmp", to);
    assert_int_equal(tr_profile_snapshot(from, to, false, &err), TR_OK);
    FILE *f = fopen(to, "rb");
    assert_non_null(f);
    assert_int_equal(fread(back, 1, sizeof back, f), sizeof data);
    fclose(f);
    assert_memory_equal(back, data, sizeof data);
    /* Cut off in the middle: the older copy stays, and nothing beside it. */
    struct rlimit old;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    const struct rlimit less = {.rlim_cur = 300000, .rlim_max = old.rlim_max};
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &less), 0);
    const tr_status st = tr_profile_snapshot(from, to, false, &err);
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, handler);
    assert_int_equal(st, TR_E_IO);
    assert_non_null(strstr(err.text, "to.tmp"));
    assert_int_equal(stat(to, &sb), 0);
    assert_int_equal(sb.st_size, sizeof data);
    assert_int_not_equal(stat(tmp, &sb), 0);
    snprintf(from, sizeof from, "%s/none", dir);
    assert_int_equal(tr_profile_snapshot(from, to, false, &err), TR_E_IO);
    assert_non_null(strstr(err.text, "none"));
}

static int make(void **state)
{
    (void)state;
    return tr_scratch_make(dir, sizeof dir) ? 0 : -1;
}

static int clear(void **state)
{
    (void)state;
    tr_scratch_clear(dir, 1);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_and_counts_are_true),
        cmocka_unit_test(rows_are_true),
        cmocka_unit_test(imbalance_is_found_in_the_joined_file),
        cmocka_unit_test(a_missing_rank_is_said),
        cmocka_unit_test(files_of_nodes_hold_what_those_of_ranks_do),
        cmocka_unit_test(copies_can_be_read_at_once),
        cmocka_unit_test(names_may_have_per_cent_signs),
        cmocka_unit_test(full_buffers_are_counted),
        cmocka_unit_test(a_full_disk_ends_the_profile_only),
        cmocka_unit_test(it_says_why_it_cannot_begin),
        cmocka_unit_test(gaps_are_right_within_an_eighth),
        cmocka_unit_test(a_copy_is_whole_or_not_there),
    };
    return cmocka_run_group_tests(tests, make, clear);
}
