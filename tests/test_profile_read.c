/* src/profile/read*.c, summary*.c, show.c, diff.c, export*.c and pack.c on synthetic profiles: numbers that can be worked out,
 * whatever the profile lies in; ranks, groups and datasets that are missing; files that are damaged, foreign or hostile. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/json.h"
#include "profile/diff.h"
#include "profile/export.h"
#include "profile/figures.h"
#include "profile/pack.h"
#include "profile/show.h"
#include "tests/profile_fixture.h"
#include "tests/scratch.h"

static char folder[256];

static const char *in(const char *name)
{
    static char path[8][512];
    static int i;
    i = (i + 1) % 8;
    snprintf(path[i], sizeof path[i], "%s/%s", folder, name);
    return path[i];
}

static int setup(void **state)
{
    (void)state;
    return tr_scratch_make(folder, sizeof folder) ? 0 : -1;
}

static int clear(void **state)
{
    static const char *const folders[] = {"ranks", "j.h5.d/run", "j.h5.d", "out"};
    (void)state;
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
        tr_scratch_clear(in(folders[i]), 1);
    tr_scratch_clear(folder, 0);
    return 0;
}

static int teardown(void **state)
{
    clear(state);
    tr_scratch_clear(folder, 1);
    return 0;
}

static tr_reader *open_it(const char *name)
{
    tr_reader *r = NULL;
    tr_err err = {0};
    if (tr_reader_open(&r, in(name), &err) != TR_OK) fail_msg("%s", err.text);
    return r;
}

/* It is refused with exit code 65 and one line that has the word. */
static void refused(const char *name, const char *word)
{
    tr_reader *r = NULL;
    tr_err err = {0};
    assert_int_equal(tr_reader_open(&r, in(name), &err), TR_E_INPUT);
    assert_null(r);
    if (!strstr(err.text, word)) fail_msg("'%s' does not say '%s'", err.text, word);
    assert_null(strchr(err.text, '\n'));
}

/* Everything that reads a profile, into nothing: it ends, well or with an error that says something. Returns what show said. */
static char *read_all(tr_reader *r)
{
    FILE *null = fopen("/dev/null", "w");
    char *text = NULL;
    size_t n = 0;
    FILE *out = open_memstream(&text, &n);
    tr_summary s;
    tr_err err = {0};
    const tr_diff_options by_path = {.by_path = true};

    assert_int_equal(tr_summary_make(&s, r, &err), TR_OK);
    tr_profile_show(out, r, &s, 0);
    tr_summary_free(&s);
    assert_int_equal(tr_export_chrome(null, r, &err), TR_OK);
    if (tr_reader_about_of(r)->n_regions > 0)
        assert_int_equal(tr_export_hatchet(null, r, -1, &err), TR_OK);
    if (tr_reader_about_of(r)->n_regions > 0 && tr_reader_about_of(r)->n_ranks < 100)
        assert_int_equal(tr_export_tau(in("out"), r, &err), TR_OK);
    assert_int_equal(tr_export_csv(in("out"), r, &err), TR_OK);
    assert_int_equal(tr_profile_diff(null, r, r, &by_path, &err), TR_OK);
    fclose(null);
    fclose(out);
    tr_scratch_clear(in("out"), 1);
    return text;
}

/* Equal but for rounding. */
#define assert_near(a, b) assert_true(fabs((double)(a) - (double)(b)) <= 1e-9 * fabs((double)(b)))

static const tr_synthetic four = {.n_ranks = 4, .n_layers = 3, .n_experts = 8, .n_steps = 6};

/* ---- numbers ------------------------------------------------------------------------------------------------------- */

static double op_of(const tr_summary *s, const char *name)
{
    for (int i = 0; i < s->n_ops; i++)
        if (!strcmp(s->op[i].name, name)) return s->op[i].mean_s;
    return -1;
}

/* The numbers of `four`, whatever it lies in. */
static void check_numbers(tr_reader *r)
{
    const double kernel = TR_SYNTHETIC_KERNEL_NS * 1e-9 * four.n_steps * four.n_layers;
    const double run = (double)tr_synthetic_run_ns(&four) * 1e-9;
    tr_summary s;

    assert_int_equal(tr_reader_about_of(r)->n_ranks, 4);
    assert_int_equal(tr_reader_about_of(r)->n_present, 4);
    assert_null(tr_reader_note(r, 0));
    assert_int_equal(tr_summary_make(&s, r, NULL), TR_OK);
    assert_near(s.run_s, run);
    const tr_reader_cell *c = tr_reader_all_cells(r);
    for (int i = 0; i < 4 * tr_reader_about_of(r)->n_regions; i++)
        assert_true(c[i].gpu_count == c[i].count && c[i].gpu_ns == c[i].excl_ns / 2);
    /* Three ranks take `kernel`, the last one twice that. */
    assert_near(op_of(&s, "mla_decode"), kernel * 5 / 4);
    assert_near(op_of(&s, "exchange"), kernel * 1.5 * 3 / 4);
    for (int i = 0; i < s.n_ops; i++) /* half of what the host saw, of every call in a step */
        if (s.op[i].kind == TR_KIND_KERNEL) {
            assert_near(s.op[i].gpu_s, s.op[i].mean_s * 4 / 2);
            assert_near(s.op[i].gpu_count, s.op[i].count);
            assert_near(s.op[i].gpu_flops, s.op[i].flops);
        }
    assert_true(s.gpu_steps_s > 0);
    assert_near(s.phase[TR_PHASE_PREFILL].mean_s, 0.020);
    assert_near(s.phase[TR_PHASE_DECODE].mean_s, 0.040);
    assert_int_equal(s.phase[TR_PHASE_DECODE].steps, 4);
    assert_int_equal(s.even.rank, 3);
    assert_int_equal(s.rank[0].rank, 3);
    assert_int_equal(s.n_layers, 3);
    assert_near(s.layer[0].mean_s,
                four.n_steps * (3 * 1e-9 * TR_SYNTHETIC_KERNEL_NS + 1e-9 * TR_SYNTHETIC_REDUCE_NS));
    assert_near(s.even.rank_tokens, 2.0); /* 3000 of a mean of 1500 */
    assert_near(s.even.experts, 200 * 8 / 900.0);
    assert_true(s.has_comm);
    assert_int_equal(s.n_comm, 2);
    assert_string_equal(s.comm[0].op, "all_reduce");
    assert_string_equal(s.comm[0].group, "tp");
    assert_near(s.comm[0].bytes, 4.0 * 18 * TR_SYNTHETIC_REDUCE_BYTES);
    assert_near(s.tokens_in, 200);
    assert_near(s.tokens_out, 16);
    assert_int_equal(s.requests, 3);
    assert_near(s.cp_exposed_s / s.cp_gather_s, 0.1);
    tr_summary_free(&s);
}

/* Exclusive times of a stream are its root's time. */
static void check_sums(const tr_reader *r)
{
    int *root = tr_summary_roots(r);
    for (int rank = 0; rank < 4; rank++) {
        const tr_reader_cell *c = tr_reader_cells(r, rank);
        uint64_t sum[2] = {0};
        const int main_root = tr_summary_main_root(r);
        for (int i = 0; i < tr_reader_about_of(r)->n_regions; i++)
            sum[root[i] == main_root] += c[i].excl_ns;
        assert_int_equal(sum[0], tr_synthetic_run_ns(&four));
        assert_int_equal(sum[1], tr_synthetic_run_ns(&four));
    }
    free(root);
}

static void all_forms_are_the_same(void **state)
{
    static const char *const names[] = {"p.h5", "j.h5", "ranks", "j.h5.d", "j.h5.d/run"};
    char *first = NULL;
    (void)state;
    assert_int_equal(tr_synthetic_write(in("p.h5"), &four, 0, 4), 0);
    mkdir(in("ranks"), 0777);
    mkdir(in("j.h5.d"), 0777);
    mkdir(in("j.h5.d/run"), 0777);
    assert_int_equal(tr_synthetic_folder(in("ranks"), &four), 0);
    assert_int_equal(tr_synthetic_folder(in("j.h5.d/run"), &four), 0);
    assert_int_equal(tr_synthetic_join(in("j.h5"), "j.h5.d/run", &four), 0);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        tr_reader *r = open_it(names[i]);
        check_numbers(r);
        check_sums(r);
        char *text = read_all(r), *body = strchr(text, '\n'); /* the first line has the name */
        if (!first) first = strdup(body);
        assert_string_equal(first, body);
        free(text);
        tr_reader_close(r);
    }
    free(first);
}

static void one_rank_s_file_is_a_profile(void **state)
{
    (void)state;
    assert_int_equal(tr_synthetic_write(in("rank00002.h5"), &four, 2, 1), 0);
    tr_reader *r = open_it("rank00002.h5");
    assert_int_equal(tr_reader_about_of(r)->form, TR_READER_RANK);
    assert_int_equal(tr_reader_about_of(r)->n_present, 1);
    assert_true(tr_reader_has(r, 2));
    assert_false(tr_reader_has(r, 0));
    assert_int_equal(tr_reader_cells(r, 0)[0].incl_ns, 0);
    assert_null(tr_reader_note(r, 0));
    free(read_all(r));
    tr_reader_close(r);
}

static void sizes_of_runs(void **state)
{
    static const int sizes[][4] = {/* ranks, layers, experts, steps */
                                   {1, 1, 1, 1},
                                   {1, 4, 16, 0},
                                   {4, 61, 256, 3},
                                   {600, 4, 8, 3}};
    (void)state;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const tr_synthetic s = {.n_ranks = sizes[i][0],
                                .n_layers = sizes[i][1],
                                .n_experts = sizes[i][2],
                                .n_steps = sizes[i][3],
                                .trace = sizes[i][0] < 600};
        assert_int_equal(tr_synthetic_write(in("s.h5"), &s, 0, s.n_ranks), 0);
        tr_reader *r = open_it("s.h5");
        assert_int_equal(tr_reader_about_of(r)->n_present, s.n_ranks);
        char *text = read_all(r);
        int lines = 0;
        for (const char *p = text; (p = strchr(p, '\n')) != NULL; p++)
            lines++;
        assert_in_range(lines, 20, 75); /* one screen; --top 0 here */
        if (s.n_steps == 0) assert_non_null(strstr(text, "(no steps)"));
        free(text);
        tr_reader_close(r);
    }
}

/* ---- what is not there --------------------------------------------------------------------------------------------- */

static void every_dataset_may_be_missing(void **state)
{
    (void)state;
    for (int i = 0; i < TR_N_DATASETS; i++) {
        const tr_synthetic s = {.n_ranks = 2,
                                .n_layers = 1,
                                .n_experts = 2,
                                .n_steps = 2,
                                .trace = true,
                                .absent = (uint64_t)1 << i};
        assert_int_equal(tr_synthetic_write(in("m.h5"), &s, 0, 2), 0);
        tr_reader *r = NULL;
        tr_err err = {0};
        /* Numbers of regions that are not there are damage; all others are only missing. */
        if (i == TR_D_REGIONS) {
            refused("m.h5", "regions");
            continue;
        }
        if (tr_reader_open(&r, in("m.h5"), &err) != TR_OK) fail_msg("%s", err.text);
        assert_int_equal(tr_reader_about_of(r)->n_ranks, 2);
        free(read_all(r));
        assert_int_equal(tr_profile_pack(r, in("m2.h5"), &err), TR_OK);
        tr_reader_close(r);
    }
}

static void nothing_but_ranks(void **state)
{
    tr_synthetic s = four;
    (void)state;
    s.absent = ~((uint64_t)1 << TR_D_RANKS);
    assert_int_equal(tr_synthetic_write(in("n.h5"), &s, 0, 4), 0);
    tr_reader *r = open_it("n.h5");
    free(read_all(r));
    tr_reader_close(r);
    s.absent = ~(uint64_t)0;
    assert_int_equal(tr_synthetic_write(in("n.h5"), &s, 0, 4), 0);
    refused("n.h5", "no ranks in it");
}

static void not_a_number(void **state)
{
    tr_synthetic s = four;
    (void)state;
    s.nan = true;
    assert_int_equal(tr_synthetic_write(in("v.h5"), &s, 0, 4), 0);
    tr_reader *r = open_it("v.h5");
    char *text = read_all(r);
    assert_null(strstr(text, "nan"));
    free(text);
    tr_reader_close(r);
}

static void later_versions_only_add(void **state)
{
    tr_synthetic s = four;
    (void)state;
    s.later = true;
    assert_int_equal(tr_synthetic_write(in("l.h5"), &s, 0, 4), 0);
    tr_reader *r = open_it("l.h5");
    check_numbers(r);
    tr_reader_close(r);
}

static void absent_ranks_are_said(void **state)
{
    tr_summary s;
    (void)state;
    mkdir(in("j.h5.d"), 0777);
    mkdir(in("j.h5.d/run"), 0777);
    assert_int_equal(tr_synthetic_folder(in("j.h5.d/run"), &four), 0);
    assert_int_equal(tr_synthetic_join(in("j.h5"), "j.h5.d/run", &four), 0);
    unlink(in("j.h5.d/run/rank00001.h5"));
    assert_int_equal(tr_scratch_write(in("j.h5.d/run"), "rank00002.h5", "damaged", 7), 0);
    for (int i = 0; i < 2; i++) {
        tr_reader *r = open_it(i ? "j.h5" : "j.h5.d");
        bool said = false;
        for (size_t n = 0; tr_reader_note(r, n); n++)
            said = said || strstr(tr_reader_note(r, n), "ranks 1-2 of 4 are missing");
        assert_true(said);
        assert_int_equal(tr_reader_about_of(r)->n_present, 2);
        assert_int_equal(tr_summary_make(&s, r, NULL), TR_OK);
        assert_near(s.run_s, (double)tr_synthetic_run_ns(&four) * 1e-9);
        tr_summary_free(&s);
        assert_int_equal(tr_profile_pack(r, in("p.h5"), NULL), TR_OK);
        tr_reader_close(r);
        r = open_it("p.h5"); /* packed: still missing */
        assert_int_equal(tr_reader_about_of(r)->n_present, 2);
        assert_false(tr_reader_has(r, 1));
        assert_true(tr_reader_has(r, 3));
        tr_reader_close(r);
    }
}

/* Stages of a pipeline have other layers: the trees are one. */
static void trees_are_merged(void **state)
{
    tr_synthetic s = four;
    (void)state;
    mkdir(in("ranks"), 0777);
    for (int i = 0; i < 3; i++) {
        char name[64];
        snprintf(name, sizeof name, "ranks/rank%05d.h5", i);
        s.n_ranks = 3;
        s.n_layers = 2 + (i == 1) * 3;
        s.trace = true;
        s.absent = (uint64_t)1 << TR_D_EXPERT_TOKENS; /* of all layers, in a real run */
        assert_int_equal(tr_synthetic_write(in(name), &s, i, 1), 0);
    }
    tr_reader *r = open_it("ranks");
    const tr_reader_region *g = tr_reader_regions(r);
    const int n = tr_reader_about_of(r)->n_regions;
    int layers = 0, heads = 0, last_head = -1;
    assert_int_equal(n, 4 + 7 * 5 + 4);
    for (int i = 0; i < n; i++) {
        assert_true(g[i].parent < i);
        layers += g[i].kind == TR_KIND_LAYER;
        if (!strcmp(g[i].name, "head")) last_head = i;
        heads += !strcmp(g[i].name, "head");
    }
    assert_int_equal(layers, 5);
    assert_int_equal(heads, 1);
    for (int rank = 0; rank < 3; rank++) {
        assert_int_equal(tr_reader_cells(r, rank)[last_head].excl_ns, 6000);
        for (int i = 0; i < n; i++)
            if (g[i].layer > 1 && rank != 1) assert_int_equal(tr_reader_cells(r, rank)[i].count, 0);
    }
    /* Rows of a rank's trace point into the merged tree. */
    for (int rank = 0; rank < 3; rank++) {
        tr_h5_data data;
        assert_int_equal(tr_reader_read(r, TR_D_TRACE, "/trace/main", rank, &data, NULL), TR_OK);
        const tr_prof_trace *t = data.at;
        for (size_t i = 0; i < data.n; i++)
            assert_true(i + 1 == data.n ? g[t[i].region].kind == TR_KIND_PHASE
                                        : g[t[i].region].kind == TR_KIND_LAYER ||
                                              g[t[i].region].kind == TR_KIND_STEP);
        free(data.at);
    }
    free(read_all(r));
    tr_reader_close(r);
}

/* ---- damaged and hostile ------------------------------------------------------------------------------------------- */

static void foreign_files(void **state)
{
    (void)state;
    refused("nothing.h5", "No such file");
    mkdir(in("j.h5.d"), 0777);
    refused("j.h5", "name that folder");
    refused("j.h5.d", "no rank files");
    assert_int_equal(tr_scratch_write(folder, "text.h5", "no profile", 10), 0);
    refused("text.h5", "not an HDF5 file");
    hid_t f = H5Fcreate(in("empty.h5"), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    H5Fclose(f);
    refused("empty.h5", "not a profile");
    mkdir(in("ranks"), 0777);
    assert_int_equal(tr_synthetic_folder(in("ranks"), &four), 0);
    assert_int_equal(tr_synthetic_write(in("ranks/rank00009.h5"), &four, 1, 1), 0);
    refused("ranks", "rank 1 is in");
    unlink(in("ranks/rank00009.h5"));
    assert_int_equal(tr_scratch_write(in("ranks"), "rank00001.h5.part", "leftover", 8), 0);
    tr_reader *r = open_it("ranks");
    check_numbers(r);
    tr_reader_close(r);
}

static void files_that_end_early(void **state)
{
    static char data[1 << 20];
    tr_synthetic s = {.n_ranks = 2, .n_layers = 1, .n_experts = 2, .n_steps = 2, .trace = true};
    size_t n_bad = 0;
    (void)state;
    assert_int_equal(tr_synthetic_write(in("whole.h5"), &s, 0, 2), 0);
    FILE *f = fopen(in("whole.h5"), "rb");
    const size_t n = fread(data, 1, sizeof data, f);
    fclose(f);
    for (size_t end = 0; end < n; end += n / 40 + 1) {
        tr_reader *r = NULL;
        tr_err err = {0};
        assert_int_equal(tr_scratch_write(folder, "cut.h5", data, end), 0);
        n_bad += tr_reader_open(&r, in("cut.h5"), &err) == TR_E_INPUT;
        tr_reader_close(r);
    }
    assert_true(n_bad >= 35); /* HDF5 notices all of them: it knows where a file ends */
}

/* Put another dataset in the place of one. */
static void replace(const char *path, hid_t type, int axes, const hsize_t *dims, const void *data)
{
    hid_t f = H5Fopen(in("h.h5"), H5F_ACC_RDWR, H5P_DEFAULT);
    hid_t space = H5Screate_simple(axes, dims, NULL), list = H5Pcreate(H5P_DATASET_CREATE);
    hsize_t chunk[3] = {1, 1, 1};
    chunk[axes - 1] = dims[axes - 1] < 64 ? dims[axes - 1] : 64;
    H5Pset_chunk(list, axes, chunk);
    H5Ldelete(f, path, H5P_DEFAULT);
    hid_t set = H5Dcreate2(f, path, type, space, H5P_DEFAULT, list, H5P_DEFAULT);
    assert_true(set >= 0);
    if (data) assert_true(H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0);
    H5Dclose(set);
    H5Pclose(list);
    H5Sclose(space);
    H5Fclose(f);
}

static void fresh(void)
{
    unlink(in("h.h5"));
    assert_int_equal(tr_synthetic_write(in("h.h5"), &four, 0, 4), 0);
}

static void hostile_sizes(void **state)
{
    const hsize_t far = (hsize_t)1 << 40;
    hid_t step = tr_schema_memory_type(&tr_datasets[TR_D_STEPS]);
    hid_t rank = tr_schema_memory_type(&tr_datasets[TR_D_RANKS]);
    hid_t region = tr_schema_memory_type(&tr_datasets[TR_D_REGIONS]);
    tr_reader *r;
    tr_summary s;
    tr_err err = {0};
    (void)state;

    fresh();
    replace("/steps", step, 2, (hsize_t[]){4, far}, NULL);
    r = open_it("h.h5");
    assert_int_equal(tr_summary_make(&s, r, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "/steps: larger than this program reads"));
    tr_reader_close(r);
    fresh();
    replace("/steps", step, 2, (hsize_t[]){4, 1 << 20}, NULL); /* 100 MB of nothing */
    r = open_it("h.h5");
    assert_int_equal(tr_summary_make(&s, r, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "0 bytes are stored"));
    tr_reader_close(r);
    fresh();
    replace("/steps", H5T_NATIVE_INT, 2, (hsize_t[]){4, 4}, NULL);
    r = open_it("h.h5");
    assert_int_equal(tr_summary_make(&s, r, &err), TR_E_INPUT);
    tr_reader_close(r);
    fresh();
    replace("/steps", step, 1, (hsize_t[]){4}, NULL);
    r = open_it("h.h5");
    assert_int_equal(tr_summary_make(&s, r, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "1 axes, 2 are wanted"));
    tr_reader_close(r);
    fresh();
    replace("/steps", step, 2, (hsize_t[]){2, 3}, NULL); /* rows for two ranks of four */
    r = open_it("h.h5");
    tr_prof_step *rows = NULL;
    size_t n = 0;
    assert_int_equal(tr_reader_steps(r, 3, &rows, &n, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "/steps: row 3 of 2"));
    assert_null(rows);
    tr_reader_close(r);

    fresh();
    replace("/grid/ranks", rank, 1, &far, NULL);
    refused("h.h5", "/grid/ranks");
    fresh();
    replace("/regions", region, 1, &far, NULL);
    refused("h.h5", "/regions");
    fresh();
    replace("/profile/count", H5T_NATIVE_UINT64, 2, (hsize_t[]){4, 5}, NULL);
    refused("h.h5", "4 x 5 numbers for 4 ranks");
    H5Tclose(step);
    H5Tclose(rank);
    H5Tclose(region);
}

static void hostile_numbers(void **state)
{
    enum { N = 4 + 7 * 3 + 4 };
    hid_t region = tr_schema_memory_type(&tr_datasets[TR_D_REGIONS]);
    hid_t step = tr_schema_memory_type(&tr_datasets[TR_D_STEPS]);
    tr_prof_region g[N] = {0};
    tr_prof_step t[4] = {0};
    (void)state;

    for (int i = 0; i < N; i++) { /* parents that come later, or are themselves */
        fresh();
        memset(g, 0, sizeof g);
        for (int k = 0; k < N; k++)
            g[k].parent = k - 1;
        g[i].parent = i % 2 ? i : N;
        replace("/regions", region, 1, (hsize_t[]){N}, g);
        refused("h.h5", "does not come before it");
        i += 6;
    }
    fresh(); /* names that fill their field, control characters; unknown kinds; layers beyond all */
    for (int k = 0; k < N; k++) {
        g[k].parent = k > 3 ? 3 : k - 1;
        g[k].layer = (int16_t)(k % 2 ? INT16_MAX : INT16_MIN);
        g[k].group = (int16_t)-7;
        memset(g[k].name, k % 2 ? '\n' : 'x', sizeof g[k].name);
        g[k].name[5] = (char)0xff;
        g[k].name[6] = (char)k;
    }
    replace("/regions", region, 1, (hsize_t[]){N}, g);
    tr_reader *r = open_it("h.h5");
    free(read_all(r));
    tr_reader_close(r);
    fresh(); /* times that are no times */
    for (int k = 0; k < 4; k++) {
        t[k].t0 = k < 2 ? INT64_MIN : 5;
        t[k].t1 = k % 2 ? INT64_MAX : 7;
        t[k].tok_decode = t[k].pages_used = t[k].queue = UINT32_MAX;
    }
    replace("/steps", step, 2, (hsize_t[]){4, 1}, t);
    r = open_it("h.h5");
    free(read_all(r));
    tr_reader_close(r);
    H5Tclose(region);
    H5Tclose(step);
}

/* ---- one number after another -------------------------------------------------------------------------------------- */

static void figures(void **state)
{
    (void)state;
    assert_string_equal(tr_figure_time(0).s, "0 s");
    assert_string_equal(tr_figure_time(12.34).s, "12.3 s");
    assert_string_equal(tr_figure_time(0.99951).s, "1.00 s");
    assert_string_equal(tr_figure_time(0.0041).s, "4.10 ms");
    assert_string_equal(tr_figure_time(-87e-6).s, "-87.0 us");
    assert_string_equal(tr_figure_time(3723).s, "1:02:03");
    assert_string_equal(tr_figure_time(NAN).s, "-");
    assert_string_equal(tr_figure_bytes(1.21e9).s, "1.21 GB");
    assert_string_equal(tr_figure_bytes(999).s, "999 B");
    assert_string_equal(tr_figure_count(1203).s, "1,203");
    assert_string_equal(tr_figure_count(1234567).s, "1,234,567");
    assert_string_equal(tr_figure_count(12345678).s, "12.3 M");
    assert_string_equal(tr_figure_rate(12345).s, "12.3 k");
    assert_string_equal(tr_figure_rate(INFINITY).s, "-");
}

/* A profile compared with itself: every ratio is one. With another grid: the same work of a step is. */
static void diff_with_itself(void **state)
{
    char *text = NULL, *line, *save = NULL;
    size_t n = 0;
    int rows = 0;
    const tr_diff_options o = {.csv = true, .by_path = true};
    const tr_synthetic eight = {.n_ranks = 8, .n_layers = 3, .n_experts = 8, .n_steps = 12};
    (void)state;
    assert_int_equal(tr_synthetic_write(in("a.h5"), &four, 0, 4), 0);
    assert_int_equal(tr_synthetic_write(in("b.h5"), &eight, 0, 8), 0);
    tr_reader *a = open_it("a.h5"), *b = open_it("b.h5");
    FILE *out = open_memstream(&text, &n);
    assert_int_equal(tr_profile_diff(out, a, a, &o, NULL), TR_OK);
    fclose(out);
    for (line = strtok_r(text, "\n", &save); (line = strtok_r(NULL, "\n", &save)) != NULL; rows++)
        assert_non_null(strstr(line, ",0,1.000,"));
    assert_int_equal(rows, 4 + 7 * 3 + 3); /* but the other stream's root */
    free(text);
    const tr_diff_options per_step = {.csv = true, .per = TR_DIFF_STEP};
    out = open_memstream(&text, &n);
    assert_int_equal(tr_profile_diff(out, a, b, &per_step, NULL), TR_OK);
    fclose(out);
    line = strstr(text, "\"all_reduce\"");
    assert_non_null(line);
    assert_non_null(strstr(line, "\"all_reduce\",3,3,60000,60000,0,1.000,"));
    free(text);
    tr_reader_close(a);
    tr_reader_close(b);
}

/* trireme-profile(5) names every dataset and every field. */
static void the_manual_is_complete(void **state)
{
    char *page = NULL;
    size_t n = 0;
    (void)state;
    assert_int_equal(
        tr_file_read(TR_SOURCE_DIR "/src/trireme-profile.5.in", 1 << 20, &page, &n, NULL), TR_OK);
    for (int i = 0; i < TR_N_DATASETS; i++) {
        const tr_dataset *d = &tr_datasets[i];
        char text[160];
        snprintf(text, sizeof text, ".BI \"%s", d->path);
        const char *at = strstr(page, text);
        if (!at) fail_msg("%s is not in the manual", d->path);
        for (int k = 0; d->record && k < d->record->n_fields; k++) {
            const tr_field *f = &d->record->field[k];
            snprintf(text, sizeof text, "\\fB%s\\fR", f->name);
            if (!strstr(at, text)) fail_msg("%s: %s is not in the manual", d->path, f->name);
        }
    }
    free(page);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(all_forms_are_the_same, clear),
        cmocka_unit_test_teardown(one_rank_s_file_is_a_profile, clear),
        cmocka_unit_test_teardown(sizes_of_runs, clear),
        cmocka_unit_test_teardown(every_dataset_may_be_missing, clear),
        cmocka_unit_test_teardown(nothing_but_ranks, clear),
        cmocka_unit_test_teardown(not_a_number, clear),
        cmocka_unit_test_teardown(later_versions_only_add, clear),
        cmocka_unit_test_teardown(absent_ranks_are_said, clear),
        cmocka_unit_test_teardown(trees_are_merged, clear),
        cmocka_unit_test_teardown(foreign_files, clear),
        cmocka_unit_test_teardown(files_that_end_early, clear),
        cmocka_unit_test_teardown(hostile_sizes, clear),
        cmocka_unit_test_teardown(hostile_numbers, clear),
        cmocka_unit_test(figures),
        cmocka_unit_test(the_manual_is_complete),
        cmocka_unit_test_teardown(diff_with_itself, clear),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
