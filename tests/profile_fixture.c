#include <config.h>

#include "tests/profile_fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <hdf5.h>

enum { N_HEAD = 4, N_PER_LAYER = 7, N_TAIL = 4, LOAD_NS = 5000000, SAMPLES = 5 };

typedef struct cell {
    uint64_t count, excl, incl, bytes, exposed;
    double flops;
} cell;

typedef struct writer {
    hid_t file;
    const tr_synthetic *s;
    int first, n; /* ranks */
    int n_regions;
    tr_prof_region *region;
    cell *cell; /* [n, n_regions] */
    bool failed;
} writer;

/* ---- the tree ------------------------------------------------------------------------------------------------------ */

static int add(writer *w, int parent, const char *name, tr_region_kind kind, int layer, int group)
{
    const int i = w->n_regions++;
    tr_prof_region *g = &w->region[i];
    *g = (tr_prof_region){.id = (uint32_t)i,
                          .parent = parent,
                          .kind = (uint8_t)kind,
                          .depth = (uint8_t)(parent < 0 ? 0 : w->region[parent].depth + 1),
                          .layer = (int16_t)layer,
                          .group = (int16_t)group};
    snprintf(g->name, sizeof g->name, "%s", name);
    return i;
}

static void make_tree(writer *w)
{
    w->region = calloc((size_t)(N_HEAD + N_PER_LAYER * w->s->n_layers + N_TAIL), sizeof *w->region);
    add(w, -1, "main", TR_KIND_PHASE, -1, -1);
    add(w, 0, "load", TR_KIND_IO, -1, -1);
    add(w, 0, "engine/plan", TR_KIND_HOST, -1, -1);
    add(w, 0, "step", TR_KIND_STEP, -1, -1);
    for (int l = 0; l < w->s->n_layers; l++) {
        const int layer = add(w, 3, "layer", TR_KIND_LAYER, l, -1);
        const int attention = add(w, layer, "attention", TR_KIND_HOST, l, -1);
        add(w, attention, "mla_decode", TR_KIND_KERNEL, l, -1);
        add(w, attention, "all_reduce", TR_KIND_COMM, l, 0);
        const int experts = add(w, layer, "experts", TR_KIND_HOST, l, -1);
        add(w, experts, "moe_gemm", TR_KIND_KERNEL, l, -1);
        add(w, experts, "exchange", TR_KIND_WAIT, l, 1);
    }
    add(w, 3, "head", TR_KIND_HOST, -1, -1);
    add(w, 0, "engine/no_work", TR_KIND_WAIT, -1, -1);
    const int root = add(w, -1, "writer", TR_KIND_PHASE, -1, -1);
    add(w, root, "journal/write", TR_KIND_IO, -1, -1);
}

uint64_t tr_synthetic_run_ns(const tr_synthetic *s)
{
    return LOAD_NS + (uint64_t)s->n_steps * TR_SYNTHETIC_PERIOD_NS;
}

/* Exclusive times of one rank in n_steps steps; inclusive ones from below. */
static void fill(writer *w, int rank, cell *c, uint64_t n_steps, bool in_steps)
{
    const bool slow = rank == w->s->n_ranks - 1 && rank > 0;
    const uint64_t kernel = TR_SYNTHETIC_KERNEL_NS, half = kernel / 2;
    uint64_t layers = 0;
    for (int i = 0; i < w->n_regions; i++) {
        const char *name = w->region[i].name;
        cell *x = &c[i];
        *x = (cell){.count = n_steps};
        if (!strcmp(name, "mla_decode") || !strcmp(name, "moe_gemm")) {
            x->excl = n_steps * (name[1] == 'l' ? kernel : half) * (slow ? 2 : 1);
            x->bytes = n_steps * 1000000;
            x->flops = (double)n_steps * 2e6;
        } else if (!strcmp(name, "all_reduce")) {
            x->excl = n_steps * TR_SYNTHETIC_REDUCE_NS;
            x->exposed = x->excl;
            x->bytes = n_steps * TR_SYNTHETIC_REDUCE_BYTES;
        } else if (!strcmp(name, "exchange")) {
            x->excl = slow || w->s->n_ranks == 1 ? 0 : n_steps * (kernel + half);
            x->exposed = x->excl;
        }
        if (w->region[i].layer >= 0) layers += x->excl;
    }
    const int n = w->n_regions;
    c[3].excl = n_steps * TR_SYNTHETIC_STEP_NS - layers - n_steps * 1000;
    c[n - 4].excl = n_steps * 1000; /* head */
    c[0].count = c[1].count = c[n - 2].count = 1;
    if (in_steps) {
        c[0].count = c[1].count = c[2].count = c[n - 2].count = c[n - 1].count = c[n - 3].count = 0;
    } else {
        c[1].excl = LOAD_NS;
        c[1].bytes = 1 << 20;
        c[2].excl = n_steps * 500000;
        c[n - 3].excl = n_steps * 1500000;
        c[n - 2].excl = tr_synthetic_run_ns(w->s) - n_steps * 1000;
        c[n - 1].excl = n_steps * 1000;
    }
    for (int i = n - 1; i >= 0; i--) {
        c[i].incl += c[i].excl;
        if (w->region[i].parent >= 0) c[w->region[i].parent].incl += c[i].incl;
    }
}

/* ---- datasets ------------------------------------------------------------------------------------------------------ */

static void put_text(hid_t object, const char *name, const char *value)
{
    hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    H5Tset_size(type, strlen(value) + 1);
    H5Tset_cset(type, H5T_CSET_UTF8);
    hid_t a = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(a, type, value);
    H5Aclose(a);
    H5Sclose(space);
    H5Tclose(type);
}

static hid_t create_dataset(writer *w, tr_dataset_id id, const char *path, const hsize_t *dim,
                            hid_t layout)
{
    const tr_dataset *d = &tr_datasets[id];
    hid_t type = tr_schema_file_type(d), space = H5Screate_simple(tr_dataset_axes(d), dim, NULL);
    hid_t links = H5Pcreate(H5P_LINK_CREATE);
    H5Pset_create_intermediate_group(links, 1);
    hid_t set = H5Dcreate2(w->file, path ? path : d->path, type, space, links,
                           layout >= 0 ? layout : H5P_DEFAULT, H5P_DEFAULT);
    if (set < 0) {
        w->failed = true;
    } else {
        put_text(set, "units", d->units);
        put_text(set, "long_name", d->long_name);
    }
    H5Pclose(links);
    H5Sclose(space);
    H5Tclose(type);
    return set;
}

static void put(writer *w, tr_dataset_id id, const char *path, hsize_t d0, hsize_t d1, hsize_t d2,
                const void *data)
{
    const hsize_t dim[3] = {d0, d1, d2};
    if (w->s->absent >> id & 1) return;
    hid_t set = create_dataset(w, id, path, dim, -1),
          type = tr_schema_memory_type(&tr_datasets[id]);
    if (set >= 0 && d0 * d1 * d2 > 0 &&
        H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0)
        w->failed = true;
    if (set >= 0) H5Dclose(set);
    H5Tclose(type);
}

/* One column of the cells. */
static void put_column(writer *w, tr_dataset_id id, int phase)
{
    const size_t n = (size_t)w->n * (size_t)w->n_regions;
    uint64_t *whole = calloc(n, sizeof *whole);
    double *real = calloc(n, sizeof *real);
    char path[64];
    for (size_t i = 0; i < n; i++) {
        const cell *c = &w->cell[i];
        const double mean = c->count ? (double)c->incl / (double)c->count : 0;
        whole[i] = id == TR_D_COUNT       ? c->count
                   : id == TR_D_TIME_INCL ? c->incl
                   : id == TR_D_TIME_EXCL ? c->excl
                   : id == TR_D_BYTES     ? c->bytes
                   : id == TR_D_EXPOSED   ? c->exposed
                   : id == TR_D_GPU_NS    ? c->excl / 2
                   : id == TR_D_GPU_COUNT ? c->count
                                          : (uint64_t)mean;
        real[i] = w->s->nan ? NAN : id == TR_D_FLOPS ? c->flops : (double)c->count * mean * mean;
    }
    const bool is_real = id == TR_D_FLOPS || id == TR_D_TIME_SUMSQ;
    if (phase >= 0) tr_dataset_phase_path(path, sizeof path, &tr_datasets[id], (tr_phase)phase);
    put(w, id, phase >= 0 ? path : NULL, (hsize_t)w->n, (hsize_t)w->n_regions, 1,
        is_real ? (void *)real : (void *)whole);
    free(whole);
    free(real);
}

static void put_cells(writer *w, int phase)
{
    const uint64_t all = (uint64_t)w->s->n_steps, prefill = (all + 2) / 3;
    const uint64_t n = phase < 0 ? all : phase == TR_PHASE_PREFILL ? prefill : all - prefill;
    for (int i = 0; i < w->n; i++)
        fill(w, w->first + i, w->cell + (size_t)i * (size_t)w->n_regions, n, phase >= 0);
    for (int id = TR_D_COUNT; id <= TR_D_GPU_COUNT; id++)
        put_column(w, (tr_dataset_id)id, phase);
}

static void put_grid(writer *w)
{
    const tr_synthetic *s = w->s;
    tr_prof_rank *k = calloc((size_t)w->n, sizeof *k);
    for (int i = 0; i < w->n; i++) {
        k[i] = (tr_prof_rank){.rank = w->first + i, .tp = (int16_t)(w->first + i), .numa = -1};
        k[i].node = (w->first + i) / 8 * 8; /* its lowest rank */
        k[i].local = (int16_t)((w->first + i) % 8);
        snprintf(k[i].host, sizeof k[i].host, "node%03d", k[i].node);
    }
    put(w, TR_D_RANKS, NULL, (hsize_t)w->n, 1, 1, k);
    free(k);
    if (w->first > 0) return;
    tr_prof_group g[2] = {{0, "tp", s->n_ranks}, {1, "ep", s->n_ranks}};
    int32_t *members = calloc((size_t)s->n_ranks, sizeof *members);
    for (int i = 0; i < s->n_ranks; i++)
        members[i] = i;
    hvl_t lists[2] = {{(size_t)s->n_ranks, members}, {(size_t)s->n_ranks, members}};
    put(w, TR_D_GROUPS, NULL, 2, 1, 1, g);
    put(w, TR_D_MEMBERS, NULL, 2, 1, 1, lists);
    free(members);
}

static void put_steps(writer *w)
{
    const int n = w->s->n_steps;
    tr_prof_step *s = calloc((size_t)(w->n * n), sizeof *s);
    for (int i = 0; i < w->n * n; i++) {
        const int k = i % n;
        const int64_t t0 = LOAD_NS + (int64_t)k * TR_SYNTHETIC_PERIOD_NS;
        s[i] = (tr_prof_step){.step = (uint64_t)k + 1, .t0 = t0, .t1 = t0 + TR_SYNTHETIC_STEP_NS};
        s[i].mode = k % 3 ? TR_PHASE_DECODE : TR_PHASE_PREFILL;
        s[i].nreq = 4;
        s[i].tok_prefill = k % 3 ? 0 : 100;
        s[i].tok_decode = k % 3 ? 4 : 0;
        s[i].pages_used = 10;
        s[i].pages_free = 90;
        s[i].queue = (uint32_t)(n - k);
        s[i].plan_ns = 500000;
    }
    put(w, TR_D_STEPS, NULL, (hsize_t)w->n, (hsize_t)n, 1, s);
    free(s);
}

static void put_requests(writer *w)
{
    tr_prof_request q[3] = {0};
    const int64_t end = (int64_t)tr_synthetic_run_ns(w->s);
    for (int i = 0; i < 3; i++) {
        q[i] = (tr_prof_request){.id = (uint64_t)i, .line = (uint64_t)i + 1, .n_prompt = 100};
        q[i].t_arrive = 1000000 * i;
        q[i].t_first = LOAD_NS + 1000000 * i;
        q[i].t_done = end - 1000000 * i;
        q[i].n_out = 10;
        q[i].chunks = 1;
        q[i].itl_p50_ns = 12000000;
        q[i].itl_p99_ns = 24000000;
    }
    if (w->first == 0) put(w, TR_D_REQUESTS, NULL, w->s->n_steps ? 3 : 0, 1, 1, q);
}

static void put_comm(writer *w)
{
    const int n = w->s->n_ranks;
    const uint64_t calls = (uint64_t)w->s->n_steps * (uint64_t)w->s->n_layers;
    tr_prof_comm *c = calloc((size_t)w->n * 2, sizeof *c);
    uint64_t *sent = calloc((size_t)(w->n * n), sizeof *sent);
    for (int i = 0; i < w->n; i++) {
        c[2 * i] = (tr_prof_comm){.region = 7, .group = 0, .op = 0, .dtype = 1, .calls = calls};
        c[2 * i].bytes = calls * TR_SYNTHETIC_REDUCE_BYTES;
        c[2 * i].time_ns = c[2 * i].exposed_ns = calls * TR_SYNTHETIC_REDUCE_NS;
        c[2 * i].min_ns = c[2 * i].max_ns = TR_SYNTHETIC_REDUCE_NS;
        c[2 * i + 1] = (tr_prof_comm){.region = UINT32_MAX, .group = 1, .op = 3, .calls = calls};
        c[2 * i + 1].bytes = calls * 100;
        c[2 * i + 1].time_ns = calls * 50000;
        c[2 * i + 1].exposed_ns = calls * 5000;
        for (int k = 0; k < n; k++)
            sent[i * n + k] = k == w->first + i ? 0 : calls * TR_SYNTHETIC_REDUCE_BYTES;
    }
    put(w, TR_D_COMM_OPS, NULL, (hsize_t)w->n, 2, 1, c);
    put(w, TR_D_COMM_MATRIX, "/comm/matrix/tp", (hsize_t)w->n, (hsize_t)n, 1, sent);
    free(c);
    free(sent);
}

static void put_experts(writer *w)
{
    const int n_layers = w->s->n_layers, n_experts = w->s->n_experts;
    uint64_t *tokens = calloc((size_t)(n_layers * n_experts) + 1, sizeof *tokens);
    uint64_t *per_rank = calloc((size_t)(w->n * n_layers) + 1, sizeof *per_rank);
    tr_prof_overlap *o = calloc((size_t)(w->n * n_layers) + 1, sizeof *o);
    float balance[64] = {0};
    for (int i = 0; i < n_layers * n_experts; i++) /* expert 0 has twice as much as each other */
        tokens[i] = (uint64_t)w->n * (i % n_experts ? 100 : 200);
    for (int i = 0; i < w->n * n_layers; i++) {
        const int rank = w->first + i / n_layers;
        per_rank[i] = rank == w->s->n_ranks - 1 ? 3000 : 1000;
        o[i] = (tr_prof_overlap){.gatherK_ns = 1000000, .gatherL_ns = 500000, .bytes = 1 << 20};
        o[i].exposedK_ns = 100000;
        o[i].exposedL_ns = 50000;
        o[i].calls = (uint64_t)w->s->n_steps;
    }
    for (int i = 0; i < 64; i++)
        balance[i] = w->s->nan ? NAN : 0.5f;
    put(w, TR_D_EXPERT_TOKENS, NULL, (hsize_t)n_layers, (hsize_t)n_experts, 1, tokens);
    put(w, TR_D_RANK_TOKENS, NULL, (hsize_t)w->n, (hsize_t)n_layers, 1, per_rank);
    put(w, TR_D_OVERLAP_CP, NULL, (hsize_t)w->n, (hsize_t)n_layers, 1, o);
    if (w->first == 0 && n_layers <= 64)
        put(w, TR_D_BALANCE, NULL, 1, (hsize_t)n_layers, 1, balance);
    free(tokens);
    free(per_rank);
    free(o);
}

static void put_samples(writer *w)
{
    const int n = w->n * SAMPLES;
    double *value = calloc((size_t)n, sizeof *value);
    int64_t *t = calloc((size_t)n, sizeof *t);
    tr_prof_kv *kv = calloc((size_t)n, sizeof *kv);
    tr_prof_memory *m = calloc((size_t)n, sizeof *m);
    tr_prof_load *load = calloc((size_t)w->n, sizeof *load);
    for (int i = 0; i < n; i++) {
        const int k = i % SAMPLES;
        t[i] = k * 1000000;
        value[i] = w->s->nan ? NAN : 100.0 * k;
        kv[i] = (tr_prof_kv){.t = t[i], .hits = (uint64_t)k * 10, .misses = (uint64_t)k * 30};
        m[i] = (tr_prof_memory){.t = t[i], .weights = 18 << 20, .kv = 4 << 20, .free = 1 << 30};
    }
    for (int i = 0; i < w->n; i++) {
        load[i].bytes = 1 << 20;
        load[i].ns = 4000000;
        memset(load[i].file, 'f', sizeof load[i].file); /* fills its field */
    }
    put(w, TR_D_COUNTER, "/counters/papi/perf::TASK-CLOCK", (hsize_t)w->n, SAMPLES, 1, value);
    put(w, TR_D_COUNTER_TIME, "/counters/papi/time", (hsize_t)w->n, SAMPLES, 1, t);
    put(w, TR_D_KV, NULL, (hsize_t)w->n, SAMPLES, 1, kv);
    put(w, TR_D_MEMORY, NULL, (hsize_t)w->n, SAMPLES, 1, m);
    put(w, TR_D_LOAD, NULL, (hsize_t)w->n, 1, 1, load);
    free(value);
    free(t);
    free(kv);
    free(m);
    free(load);
}

/* Every step and its layers, in the order of their ends, and the stream's root, which is longer than a duration can say. */
static void put_trace(writer *w)
{
    const int per_step = w->s->n_layers + 1, n = w->s->n_steps * per_step + 1;
    tr_prof_trace *t = calloc((size_t)(w->n * n), sizeof *t);
    for (int i = 0; i < w->n * n; i++) {
        const int step = i % n / per_step, k = i % n % per_step;
        const int64_t t0 = LOAD_NS + (int64_t)step * TR_SYNTHETIC_PERIOD_NS;
        const uint32_t each = TR_SYNTHETIC_STEP_NS / (uint32_t)per_step;
        t[i] = (tr_prof_trace){.step = (uint32_t)step + 1, .bytes = 10};
        t[i].region = k < w->s->n_layers ? (uint32_t)(N_HEAD + N_PER_LAYER * k) : 3;
        t[i].t0 = k < w->s->n_layers ? t0 + k * (int64_t)each : t0;
        t[i].dur = k < w->s->n_layers ? each : TR_SYNTHETIC_STEP_NS;
        if (i % n == n - 1)
            t[i] = (tr_prof_trace){
                .t0 = -2 * (int64_t)UINT32_MAX, .dur = UINT32_MAX, .step = UINT32_MAX};
    }
    put(w, TR_D_TRACE, "/trace/main", (hsize_t)w->n, (hsize_t)n, 1, t);
    free(t);
}

static void put_about(writer *w)
{
    put_text(w->file, "schema", TR_PROFILE_SCHEMA);
    put_text(w->file, "version", w->s->later ? "1.7" : TR_PROFILE_VERSION);
    put_text(w->file, "created", "2026-01-02T03:04:05Z");
    put_text(w->file, "run_id", "20260102T030405-1");
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t a = H5Acreate2(w->file, "complete", H5T_STD_U8LE, space, H5P_DEFAULT, H5P_DEFAULT);
    const int one = 1;
    H5Awrite(a, H5T_NATIVE_INT, &one);
    H5Aclose(a);
    H5Sclose(space);
    hid_t run = H5Gcreate2(w->file, "/run", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    put_text(run, "model", "synthetic");
    put_text(run, "command_line", "trireme batch \"quoted\", comma");
    H5Gclose(run);
    if (!w->s->later) return;
    H5Gclose(H5Gcreate2(w->file, "/weather", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
}

static void put_log(writer *w)
{
    char *log[1] = {"a line\nwith a break, a \"quote\" and a comma"};
    char *env[2] = {"OMP_NUM_THREADS", "1"};
    put(w, TR_D_LOG, NULL, 1, 1, 1, log);
    if (w->first == 0) put(w, TR_D_ENV, NULL, 1, 2, 1, env);
}

int tr_synthetic_write(const char *path, const tr_synthetic *s, int first, int n)
{
    writer w = {.s = s, .first = first, .n = n};
    hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    if (s->killed) H5Pset_libver_bounds(access, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST);
    w.file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access);
    H5Pclose(access);
    if (w.file < 0) return -1;
    make_tree(&w);
    w.cell = calloc((size_t)n * (size_t)w.n_regions, sizeof *w.cell);
    put_about(&w);
    put_grid(&w);
    put(&w, TR_D_REGIONS, NULL, (hsize_t)w.n_regions, 1, 1, w.region);
    put_cells(&w, -1);
    put_cells(&w, TR_PHASE_PREFILL);
    put_cells(&w, TR_PHASE_DECODE);
    put_steps(&w);
    put_requests(&w);
    put_comm(&w);
    put_experts(&w);
    put_samples(&w);
    if (s->trace) put_trace(&w);
    put_log(&w);
    free(w.cell);
    free(w.region);
    if (s->killed) return H5Fflush(w.file, H5F_SCOPE_LOCAL) < 0 || w.failed ? -1 : 0;
    return H5Fclose(w.file) < 0 || w.failed ? -1 : 0;
}

int tr_synthetic_folder(const char *folder, const tr_synthetic *s)
{
    char path[512];
    for (int i = 0; i < s->n_ranks; i++) {
        snprintf(path, sizeof path, "%s/rank%05d.h5%s", folder, i, s->killed ? ".part" : "");
        if (tr_synthetic_write(path, s, i, 1)) return -1;
    }
    return 0;
}

/* ---- the joined file ----------------------------------------------------------------------------------------------- */

typedef struct join {
    writer w;
    hid_t from; /* rank 0's file */
    const char *relative;
} join;

/* A dataset with a rank axis as a virtual one, any other as it is. */
static herr_t join_one(hid_t object, const char *name, const H5O_info_t *info, void *ctx)
{
    join *j = ctx;
    char path[256], source[256];
    hsize_t dim[3] = {0}, at[3] = {0}, one[3];
    (void)object;
    snprintf(path, sizeof path, "/%s", name);
    const tr_dataset *d = tr_dataset_find(path, NULL);
    if (info->type != H5O_TYPE_DATASET || !d) return 0;
    hid_t links = H5Pcreate(H5P_LINK_CREATE);
    H5Pset_create_intermediate_group(links, 1);
    if (d->axis[0] != TR_AXIS_RANK) {
        if (H5Ocopy(j->from, path, j->w.file, path, H5P_DEFAULT, links) < 0) j->w.failed = true;
        H5Pclose(links);
        return 0;
    }
    H5Pclose(links);
    hid_t set = H5Dopen2(j->from, path, H5P_DEFAULT), space = H5Dget_space(set);
    const int axes = H5Sget_simple_extent_dims(space, dim, NULL);
    H5Dclose(set);
    H5Sclose(space);
    memcpy(one, dim, sizeof one);
    hid_t source_space = H5Screate_simple(axes, one, NULL), layout = H5Pcreate(H5P_DATASET_CREATE);
    dim[0] = (hsize_t)j->w.s->n_ranks;
    hid_t all = H5Screate_simple(axes, dim, NULL);
    for (int i = 0; i < j->w.s->n_ranks; i++) {
        at[0] = (hsize_t)i;
        snprintf(source, sizeof source, "%s/rank%05d.h5", j->relative, i);
        H5Sselect_hyperslab(all, H5S_SELECT_SET, at, NULL, one, NULL);
        H5Pset_virtual(layout, all, source, path, source_space);
    }
    set = create_dataset(&j->w, (tr_dataset_id)(d - tr_datasets), path, dim, layout);
    if (set >= 0) H5Dclose(set);
    H5Pclose(layout);
    H5Sclose(all);
    H5Sclose(source_space);
    return 0;
}

int tr_synthetic_join(const char *path, const char *relative, const tr_synthetic *s)
{
    join j = {.w = {.s = s}, .relative = relative};
    char first[512];
    const char *slash = strrchr(path, '/');
    snprintf(first, sizeof first, "%.*s/%s/rank00000.h5", slash ? (int)(slash - path) : 1,
             slash ? path : ".", relative);
    j.from = H5Fopen(first, H5F_ACC_RDONLY, H5P_DEFAULT);
    j.w.file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    if (j.from < 0 || j.w.file < 0) return -1;
    put_about(&j.w);
    H5Ovisit2(j.from, H5_INDEX_NAME, H5_ITER_INC, join_one, &j, H5O_INFO_BASIC);
    H5Fclose(j.from);
    return H5Fclose(j.w.file) < 0 || j.w.failed ? -1 : 0;
}
