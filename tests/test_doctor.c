/* The page of trireme doctor from launches that are not at hand, and what is made of hang reports, good and hostile. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "command/doctor_facts.h"
#include "command/doctor_report.h"
#include "command/hang.h"
#include "scratch.h"

/* ---- the page ---------------------------------------------------------------------------------------------------- */

enum { N = 4 };

/* Two hosts with two ranks, two GPUs and 16 CPUs each: nothing to complain of. */
static void good(tr_facts *f, tr_out_facts *out)
{
    for (int i = 0; i < N; i++) {
        f[i] = (tr_facts){.rank = i,
                          .world = N,
                          .local_rank = i % 2,
                          .local_size = 2,
                          .launcher = "srun",
                          .protocol = "PMIx",
                          .launched = N,
                          .version = "0.1.0",
                          .binary = "0123456789abcdef",
                          .mpi = "Open MPI v4.1.4",
                          .threads = "funneled",
                          .n_threads = 8,
                          .n_online = 16,
                          .cpus = {0xffff},
                          .n_gpus = 2,
                          .memory_bytes = UINT64_C(64) << 30,
                          .shm_bytes = UINT64_C(32) << 30,
                          .seconds_left = 7200,
                          .job = "4711",
                          .network = "mlx5_0",
                          .single_copy = 1,
                          .sees_out = 1};
        snprintf(f[i].host, sizeof f[i].host, "node%02d", i / 2);
        snprintf(f[i].uuid, sizeof f[i].uuid, "GPU-%d", i);
    }
    *out = (tr_out_facts){.path = "/scratch/out.jsonl",
                          .kind = "lustre",
                          .locks = true,
                          .renames = true,
                          .syncs = true,
                          .free_bytes = UINT64_C(1) << 40,
                          .free_files = 1 << 20,
                          .lines = N * TR_PROBE_LINES,
                          .whole_lines = N * TR_PROBE_LINES};
}

static char *page_of(const tr_facts *f, int n, const tr_out_facts *out, bool time_given,
                     int *n_changes)
{
    const tr_link link[] = {{0, 1, 1e-6, 1e10}, {0, 3, 3e-6, 2e10}};
    const tr_doctor d = {.rank = f,
                         .n = n,
                         .out = out,
                         .link = link,
                         .n_links = n == N ? 2 : 0,
                         .time_given = time_given};
    char *text = NULL;
    size_t bytes;
    FILE *m = open_memstream(&text, &bytes);

    assert_non_null(m);
    *n_changes = tr_doctor_report(&d, m);
    fclose(m);
    return text;
}

/* What must be changed: `n` things, one of them says `word`. */
static void expect(const tr_facts *f, const tr_out_facts *out, int n, const char *word)
{
    int found;
    char *page = page_of(f, N, out, false, &found);

    if (found != n || !strstr(page, word))
        fail_msg("%d to be changed, not %d with '%s':\n%s", found, n, word, page);
    if (n == 0) assert_non_null(strstr(page, "Nothing must be changed."));
    free(page);
}

static void test_good(void **state)
{
    tr_facts f[N];
    tr_out_facts out;
    (void)state;
    good(f, &out);
    expect(f, &out, 0, "srun through PMIx, 4 ranks");
    expect(f, &out, 0, "ranks 0 and 3, two hosts: 3.0 us, 20.00 GB/s");
    expect(f, &out, 0, "120 min left of job 4711");
    expect(f, &out, 0, "GPU-3 of 2");
    expect(f, &out, 0, "this build has no NCCL");
}

/* srun without its PMI plug-in: every process a job of its own, the most common mistake. */
static void test_alone(void **state)
{
    tr_facts f[N];
    tr_out_facts out;
    int n;
    (void)state;
    good(f, &out);
    f[0].world = f[0].local_size = 1;
    char *page = page_of(f, 1, &out, false, &n);
    assert_int_equal(n, 1);
    assert_non_null(strstr(page, "srun started 4 processes, but each is a job of 1 rank"));
    free(page);
}

static void test_versions(void **state)
{
    tr_facts f[N];
    tr_out_facts out;
    (void)state;
    good(f, &out);
    strcpy(f[2].version, "0.0.9");
    strcpy(f[2].binary, "ffff");
    expect(f, &out, 1, "rank 2 on node01 runs trireme 0.0.9, rank 0 0.1.0");
    good(f, &out);
    strcpy(f[3].binary, "ffff");
    expect(f, &out, 1, "rank 3 on node01 runs another build of trireme (ffff)");
    strcpy(f[1].mpi, "MPICH");
    expect(f, &out, 2, "rank 1 on node00 has another MPI library: MPICH");
    good(f, &out);
    strcpy(f[1].threads, "single");
    expect(f, &out, 1, "rank 1 on node00: MPI gives no threads");
}

static void test_processors(void **state)
{
    tr_facts f[N];
    tr_out_facts out;
    (void)state;
    good(f, &out);
    f[2].n_threads = f[3].n_threads = 16;
    expect(f, &out, 1,
           "node01 is oversubscribed: 32 threads of 2 ranks on 16 CPUs. Set OMP_NUM_THREADS=8");
    good(f, &out);
    f[0].cpus[0] = f[1].cpus[0] = 1; /* both bound to the same core */
    f[0].n_threads = f[1].n_threads = 1;
    expect(f, &out, 1, "node00 is oversubscribed: 2 ranks on 1 CPUs");
    good(f, &out);
    f[0].cpus[0] = 1, f[1].cpus[0] = 2;
    f[0].n_threads = f[1].n_threads = 1;
    expect(f, &out, 0, "may use 2 of its 16 CPUs");
}

static void test_gpus(void **state)
{
    tr_facts f[N];
    tr_out_facts out;
    (void)state;
    good(f, &out);
    strcpy(f[1].uuid, "GPU-0");
    expect(f, &out, 1, "ranks 0 and 1 on node00 would share the GPU GPU-0");
    good(f, &out);
    strcpy(f[2].uuid, "GPU-0"); /* on another host it is another one, whatever it says */
    expect(f, &out, 0, "GPU-0");
    for (int i = 0; i < N; i++)
        f[i].n_gpus = 0, f[i].uuid[0] = '\0';
    expect(f, &out, 0, "none found: the CPU computes");
}

/* The driver's folder, and the files of its devices, of a host with three GPUs of which one may not be opened. */
static void make_gpus(const char *dir)
{
    static const char *const bus[] = {"0000:1b:00.0", "0000:43:00.0", "0000:9d:00.0"};
    char path[128], text[128];

    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%.64s/%s", dir, bus[i]);
        assert_int_equal(mkdir(path, 0700), 0);
        const int n = snprintf(text, sizeof text,
                               "Model: \t\t NVIDIA\nGPU UUID: \t GPU-%c000\nDevice Minor: \t %d\n",
                               'a' + i, 2 - i);
        assert_int_equal(tr_scratch_write(path, "information", text, (size_t)n), 0);
    }
    snprintf(path, sizeof path, "%.64s/.dev", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(tr_scratch_write(path, "nvidia0", "", 0), 0);
    assert_int_equal(tr_scratch_write(path, "nvidia2", "", 0), 0);
    strcat(path, "/nvidia1"); /* GPU-b000's: a folder cannot be opened for writing, whoever tries */
    assert_int_equal(mkdir(path, 0700), 0);
}

static void remove_gpus(const char *dir)
{
    static const char *const inner[] = {".dev/nvidia1", ".dev", "0000:1b:00.0", "0000:43:00.0",
                                        "0000:9d:00.0"};
    char path[128];

    for (size_t i = 0; i < sizeof inner / sizeof *inner; i++) {
        snprintf(path, sizeof path, "%.64s/%s", dir, inner[i]);
        tr_scratch_clear(path, 1);
    }
    tr_scratch_clear(dir, 1);
}

/* What rank `local` of a host takes; batch systems say so by numbers, by UUIDs, or by what may be opened. */
static void test_gpu_lists(void **state)
{
    static const struct {
        const char *visible;
        int local, n;
        const char *uuid;
    } rows[] = {
        {NULL, 0, 2, "GPU-a000"},
        {NULL, 1, 2, "GPU-c000"},
        {NULL, 2, 2, ""},
        {"0", 0, 1, "GPU-a000"},
        {"1", 1, 1, "GPU-c000"},
        {"1,0", 0, 2, "GPU-c000"},
        {"1,0", 1, 2, "GPU-a000"},
        {"GPU-c000", 0, 1, "GPU-c000"},
        {"GPU-c0", 3, 1, "GPU-c000"},
        {"GPU-c000,GPU-a000", 1, 2, "GPU-a000"},
        {"MIG-7-1,MIG-7-2", 1, 2, "MIG-7-2"},
        {"-1", 0, 0, ""},
        {"", 0, 0, ""},
        {"7", 0, 1, ""},
    };
    char dir[64], dev[80];
    (void)state;
    assert_non_null(tr_scratch_make(dir, sizeof dir));
    make_gpus(dir);
    snprintf(dev, sizeof dev, "%s/.dev", dir);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        tr_facts f = {.local_rank = rows[i].local, .local_size = 4};
        tr_facts_gpus(&f, dir, dev, rows[i].visible);
        assert_int_equal(f.n_gpus, rows[i].n);
        assert_string_equal(f.uuid, rows[i].uuid);
    }
    tr_facts none = {.local_rank = 0};
    tr_facts_gpus(&none, "/nowhere", "/dev", "0");
    assert_int_equal(none.n_gpus, 0);
    remove_gpus(dir);
}

static void test_limits(void **state)
{
    tr_facts f[N];
    tr_out_facts out;
    int n;
    (void)state;
    good(f, &out);
    for (int i = 0; i < N; i++)
        f[i].seconds_left = -1;
    expect(f, &out, 1, "job 4711 ends without a word to trireme: pass --time-budget");
    char *page = page_of(f, N, &out, true, &n);
    assert_int_equal(n, 0);
    free(page);
    good(f, &out);
    f[0].seconds_left = 200; /* batch keeps a twentieth for leaving */
    page = page_of(f, N, &out, false, &n);
    assert_non_null(strstr(page, "200 s are left: a job that starts now stops after 190 s"));
    free(page);
    good(f, &out);
    f[3].memory_bytes = UINT64_C(100) << 20;
    expect(f, &out, 1, "50 MiB of memory for a rank");
    good(f, &out);
    f[2].shm_bytes = 1 << 20;
    expect(f, &out, 1, "node01: 1 MiB free in /dev/shm");
}

static void test_files(void **state)
{
    tr_facts f[N];
    tr_out_facts out;
    (void)state;
    good(f, &out);
    out.taken = true;
    expect(f, &out, 1, "another job is writing /scratch/out.jsonl");
    good(f, &out);
    out.free_bytes = 1 << 20;
    expect(f, &out, 1, "1 MiB and 1048576 files free");
    good(f, &out);
    strcpy(out.fault, "cannot make /scratch/out.jsonl.doctor.1: Permission denied");
    expect(f, &out, 1, "Permission denied");
    good(f, &out);
    out.locks = false;
    out.whole_lines -= 3;
    f[3].sees_out = 0;
    expect(f, &out, 0, "no file locks there");
    expect(f, &out, 0, "(77 of 80 whole)");
    expect(f, &out, 0, "1 rank, the first of them rank 3 on node01, sees another folder");
    good(f, &out);
    out.renames = false;
    expect(f, &out, 1, "does not take the place of another");
    out = (tr_out_facts){0};
    expect(f, &out, 0, "not looked at (-o OUT)");
}

/* ---- hangs ------------------------------------------------------------------------------------------------------- */

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static char *read_back(FILE *f)
{
    static char text[16384];
    rewind(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    return text;
}

/* Reports of ranks 0.. of a world; waits[r]: number of stage's collective it is in, 0: none; op[r]: which one it is there. */
static void report(const char *path, int rank, int world, int number, const char *op, int bytes,
                   bool waits, const char *others)
{
    char text[2048];

    snprintf(text, sizeof text,
             "{\"trireme_hang\": 1, \"rank\": %d, \"world\": %d, \"host\": \"node%02d\", \"pid\": "
             "7, \"silence_s\": 5.5,"
             " \"step\": %d, \"layer\": 4, \"what\": \"experts\", \"waits_for\": %s, \"ranks\": "
             "[%s], \"collectives\": ["
             "{\"id\": 1, \"group\": \"stage\", \"first\": 0, \"members\": %d, \"number\": %d, "
             "\"op\": \"all_gather\", \"bytes\": 8,"
             " \"step\": 5, \"layer\": 3, \"begun_s_ago\": 9, \"done\": true, \"done_s_ago\": 8},"
             "{\"id\": 2, \"group\": \"stage\", \"first\": 0, \"members\": %d, \"number\": %d, "
             "\"op\": \"%s\", \"bytes\": %d,"
             " \"step\": 6, \"layer\": 4, \"begun_s_ago\": 6, \"done\": %s}]}",
             rank, world, rank, number >= 7 ? 6 : 5, waits ? "2" : "null", others, world,
             number - 1, world, number, op, bytes, waits ? "false" : "true");
    write_text(path, text);
}

static char *explained(char *const *path, int n)
{
    tr_hang *h;
    tr_err err = {0};
    FILE *f = tmpfile();

    assert_non_null(f);
    if (tr_hang_read(&h, path, n, &err) != TR_OK) fail_msg("%s", err.text);
    tr_hang_explain(h, f);
    tr_hang_free(h);
    char *text = read_back(f);
    fclose(f);
    return text;
}

static void says(const char *text, const char *word)
{
    if (!strstr(text, word)) fail_msg("nobody says '%s':\n%s", word, text);
}

static void test_missing(void **state)
{
    char dir[256], path[3][320], *list[3];
    (void)state;
    assert_non_null(tr_scratch_make(dir, sizeof dir));
    for (int i = 0; i < 3; i++) {
        snprintf(path[i], sizeof path[i], "%s/hang.%d", dir, i);
        list[i] = path[i];
    }
    /* Rank 2 computes, and has not come to number 7. */
    report(path[0], 0, 3, 7, "all_reduce", 4096, true, "");
    report(path[1], 1, 3, 7, "all_reduce", 4096, true, "");
    report(path[2], 2, 3, 6, "all_reduce", 4096, false, "");
    const char *text = explained(list, 3);
    says(text, "ranks disagree: all_reduce number 7 of stage (3 members from rank 0 on, 4096 "
               "bytes, step 6, layer 4)");
    says(text, "rank 0 on node00 is in it");
    says(text, "missing: rank 2 on node02: step 5, layer 4, experts; waits for nobody");

    /* Rank 2 left nothing, but its neighbour saw it stop. */
    report(path[0], 0, 3, 7, "all_reduce", 4096, true,
           "{\"rank\": 2, \"responds\": false, \"waits\": false, \"state\": \"step 6, layer "
           "9\\u0007\"}");
    text = explained(list, 2);
    says(text, "rank 2: does not respond; last seen by rank 0: step 6, layer 9?");
    says(text, "missing: 1 member of which no report says anything");
    tr_scratch_clear(dir, 1);
}

static void test_mismatch(void **state)
{
    char dir[256], path[3][320], *list[3];
    (void)state;
    assert_non_null(tr_scratch_make(dir, sizeof dir));
    for (int i = 0; i < 3; i++) {
        snprintf(path[i], sizeof path[i], "%s/hang.%d", dir, i);
        list[i] = path[i];
        report(path[i], i, 3, 7, i == 1 ? "all_gather" : "all_reduce", 4096, true, "");
    }
    says(explained(list, 3), "rank 1 on node01 is in another one: all_gather of 4096 bytes");
    report(path[1], 1, 3, 7, "all_reduce", 4000, true, ""); /* another length */
    says(explained(list, 3), "rank 1 on node01 is in another one: all_reduce of 4000 bytes");
    /* All are in the same one: no disagreement. */
    report(path[1], 1, 3, 7, "all_reduce", 4096, true, "");
    says(explained(list, 3), "disagree on no collective: see who waits for nobody");
    /* All of those that have written something have done theirs. */
    report(path[0], 0, 3, 7, "all_reduce", 4096, false, "");
    report(path[1], 1, 3, 7, "all_reduce", 4096, false, "");
    says(explained(list, 2), "disagree on no collective: look at the ranks without one above");
    tr_scratch_clear(dir, 1);
}

static void refused(const char *path, const char *text, const char *word)
{
    char *list[] = {(char *)path};
    tr_hang *h;
    tr_err err = {0};

    write_text(path, text);
    assert_int_equal(tr_hang_read(&h, list, 1, &err), TR_E_INPUT);
    assert_null(h);
    if (!strstr(err.text, word) || !strstr(err.text, path))
        fail_msg("'%s' without '%s' or the file", err.text, word);
}

static void test_hostile(void **state)
{
/* clang-format off */
#define HEAD "{\"trireme_hang\": 1, \"rank\": 0, \"world\": 2, \"host\": \"a\", \"step\": 1, \"layer\": -1, \"what\": \"\", "
#define RECORD(more) HEAD "\"collectives\": [{\"id\": 1, \"group\": \"g\", \"op\": \"all_max\", " more "}]}"
    /* clang-format on */
    char dir[256], path[320], other[320];
    tr_hang *h;
    tr_err err = {0};
    (void)state;
    assert_non_null(tr_scratch_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/hang", dir);
    snprintf(other, sizeof other, "%s/other", dir);
    refused(path, "", "line 1");
    refused(path, "[]", "");
    refused(path, "{}", "not a hang report");
    refused(path, "{\"trireme_hang\": 2}", "not a hang report");
    refused(path, "{\"trireme_hang\": \"1\"}", "not a hang report");
    refused(path, "{\"trireme_hang\": 1, \"rank\": 0}", "\"world\" is missing");
    refused(path, "{\"trireme_hang\": 1, \"rank\": 2, \"world\": 2}", "rank");
    refused(path, "{\"trireme_hang\": 1, \"rank\": -1, \"world\": 2}", "rank");
    refused(path, "{\"trireme_hang\": 1, \"rank\": 0, \"world\": 1e9}", "world");
    refused(path, "{\"trireme_hang\": 1, \"rank\": 0, \"world\": 99999999999}", "world");
    refused(path, HEAD "\"collectives\": 7}", "no list");
    refused(path, HEAD "\"silence_s\": 1}", "no list");
    refused(path, HEAD "\"collectives\": [7]}", "no object");
    refused(path, RECORD("\"first\": -1"), "first");
    refused(path, RECORD("\"first\": 0, \"members\": 0"), "members");
    refused(path, RECORD("\"first\": 0, \"members\": 2, \"number\": 9223372036854775808"), "");
    refused(path, RECORD("\"first\": 0, \"members\": 2, \"number\": 1, \"bytes\": -5"), "bytes");
    refused(path,
            RECORD("\"first\": 0, \"members\": 2, \"number\": 1, \"bytes\": 5, \"step\": 1, "
                   "\"layer\": 1, \"done\": 0"),
            "done");
    char *list[] = {path, other};
    report(path, 0, 2, 7, "all_reduce", 8, true,
           "7, null, {\"rank\": \"1\"}, {\"rank\": 1, \"state\": 5}");
    report(other, 0, 2, 7, "all_reduce", 8, true, "");
    assert_int_equal(tr_hang_read(&h, list, 2, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "are both of rank 0"));
    report(other, 1, 3, 7, "all_reduce", 8, true, "");
    assert_int_equal(tr_hang_read(&h, list, 2, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "of a job of 3 ranks, not 2"));
    says(explained(list, 1),
         "rank 1: left no report; last seen by rank 0: "); /* what others saw may be anything */
    unlink(other);
    assert_int_equal(tr_hang_read(&h, list, 2, &err), TR_E_INPUT);
    tr_scratch_clear(dir, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),      cmocka_unit_test(test_alone),
        cmocka_unit_test(test_versions),  cmocka_unit_test(test_processors),
        cmocka_unit_test(test_gpus),      cmocka_unit_test(test_limits),
        cmocka_unit_test(test_files),     cmocka_unit_test(test_missing),
        cmocka_unit_test(test_mismatch),  cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_gpu_lists),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
