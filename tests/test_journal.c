/* OUT and OUT.run: resume from every damage, locks, identity, a disk that is full for a while,
 * files that vanish. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/json.h"
#include "base/stop.h"
#include "batch/journal.h"
#include "batch/record.h"
#include "tests/scratch.h"

#define HASH "0123456789abcdef0123456789abcdef"

enum { N_RECORDS = 6, N_FIELDS = 3 };

static char folder[256], out_path[300], run_path[320], tmp_path[320], lock_path[320],
    saved_path[320];
static char *record[N_RECORDS]; /* with line feeds */
static size_t length[N_RECORDS];
static const tr_run_field fields[N_FIELDS] = {{"input", HASH}, {"model", "m-1"}, {"seed", "0"}};

static tr_journal_options options(void)
{
    return (tr_journal_options){
        .run = {.out_path = out_path, .field = fields, .n_fields = N_FIELDS},
        .input_hash = HASH,
        .retry_ms = 200,
    };
}

static tr_key key_of(int i)
{
    char id[8];
    if (i == 3) return tr_key_line(17); /* an invalid line */
    snprintf(id, sizeof id, "r%d", i);
    return tr_key_id(id, strlen(id));
}

static void make_records(void)
{
    const tr_record_options o = {.input_hash = HASH, .model = "m"};
    for (int i = 0; i < N_RECORDS; i++) {
        tr_buf line = {0};
        char id[8];
        snprintf(id, sizeof id, "r%d", i);
        const tr_record_name name = {id, strlen(id), 0};
        const tr_refusal refusal = {400, "invalid_request_error", "x", "", "Zürich"};
        tr_status st = i == 3 ? tr_record_invalid(&line, &o, 17, 1, "bad", NULL)
                              : tr_record_refusal(&line, &o, &name, &refusal, NULL);
        assert_int_equal(st, TR_OK);
        record[i] = line.s;
        length[i] = line.n;
    }
}

static int setup(void **state)
{
    (void)state;
    /* Thousands of opens, each with syncs: seconds on a disk, nothing in memory. */
    if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    if (!tr_scratch_make(folder, sizeof folder)) return -1;
    snprintf(out_path, sizeof out_path, "%s/out", folder);
    snprintf(run_path, sizeof run_path, "%s.run", out_path);
    snprintf(tmp_path, sizeof tmp_path, "%s.tmp", out_path);
    snprintf(lock_path, sizeof lock_path, "%s.lock", out_path);
    snprintf(saved_path, sizeof saved_path, "%s.saved", out_path);
    make_records();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tr_scratch_clear(folder, 1);
    for (int i = 0; i < N_RECORDS; i++)
        free(record[i]);
    return 0;
}

static int fresh(void **state)
{
    (void)state;
    tr_scratch_clear(folder, 0);
    return 0;
}

static tr_journal *opened(const tr_journal_options *o)
{
    tr_journal *j = NULL;
    tr_err err;
    if (tr_journal_open(&j, o, &err) != TR_OK) fail_msg("%s", err.text);
    return j;
}

static void closed(tr_journal *j)
{
    tr_err err;
    if (tr_journal_close(j, &err) != TR_OK) fail_msg("%s", err.text);
}

static void append(tr_journal *j, int i)
{
    tr_err err;
    if (tr_journal_append(j, record[i], length[i], &err) != TR_OK) fail_msg("%s", err.text);
}

static void put_out(const char *data, size_t n)
{
    assert_int_equal(tr_scratch_write(folder, "out", data, n), 0);
}

static void put_run(const char *data, size_t n)
{
    assert_int_equal(tr_scratch_write(folder, "out.run", data, n), 0);
}

static void assert_run_is(const char *data, size_t n)
{
    char *text = NULL;
    size_t n_text;
    tr_err err;
    if (tr_file_read(run_path, 1 << 20, &text, &n_text, &err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(n_text, n);
    assert_memory_equal(text, data, n);
    free(text);
}

static char *read_out(size_t *n)
{
    char *text = NULL;
    tr_err err;
    if (tr_file_read(out_path, 1 << 20, &text, n, &err) != TR_OK) fail_msg("%s", err.text);
    return text;
}

/* All records, one after the other. */
static char *whole(size_t *n)
{
    char *all = malloc(1 << 16);
    assert_non_null(all);
    *n = 0;
    for (int i = 0; i < N_RECORDS; i++) {
        memcpy(all + *n, record[i], length[i]);
        *n += length[i];
    }
    return all;
}

static void test_append(void **state)
{
    const tr_journal_options o = options();
    tr_err err;
    size_t n, n_all;
    (void)state;
    tr_journal *j = opened(&o);
    assert_int_equal(tr_journal_found(j), 0);
    for (int i = 0; i < N_RECORDS; i++) {
        append(j, i);
        assert_int_equal(tr_journal_tick(j, &err), TR_OK);
    }
    closed(j);
    char *text = read_out(&n), *all = whole(&n_all);
    assert_int_equal(n, n_all);
    assert_memory_equal(text, all, n);
    free(text);
    j = opened(&o);
    assert_int_equal(tr_journal_found(j), N_RECORDS);
    for (int i = 0; i < N_RECORDS; i++)
        assert_true(tr_journal_has(j, key_of(i)));
    assert_false(tr_journal_has(j, tr_key_line(16)));
    assert_false(tr_journal_has(j, tr_key_id("r9", 2)));
    closed(j);
    /* OUT.run is JSON and says who holds the lock. */
    json_t *run = NULL;
    assert_int_equal(tr_json_load(&run, run_path, 1 << 16, &err), TR_OK);
    assert_string_equal(json_string_value(json_object_get(json_object_get(run, "run"), "model")),
                        "m-1");
    assert_int_equal(json_integer_value(json_object_get(json_object_get(run, "lock"), "pid")),
                     getpid());
    json_decref(run);
    free(all);
}

/* What resume makes of `data`: the records in `want` (bits), and a file with exactly these.
 * Twice: the second time nothing changes. */
static void check_resume(const char *data, size_t n, unsigned want)
{
    const tr_journal_options o = options();
    size_t got;
    put_out(data, n);
    for (int again = 0; again < 2; again++) {
        tr_journal *j = opened(&o);
        size_t count = 0, bytes = 0;
        for (int i = 0; i < N_RECORDS; i++) {
            assert_int_equal(tr_journal_has(j, key_of(i)), want >> i & 1);
            count += want >> i & 1;
            if (want >> i & 1) bytes += length[i];
        }
        assert_int_equal(tr_journal_found(j), count);
        closed(j);
        char *text = read_out(&got);
        assert_int_equal(got, bytes);
        for (int i = 0; i < N_RECORDS; i++)
            if (want >> i & 1) assert_non_null(memmem(text, got, record[i], length[i]));
        free(text);
        assert_int_equal(access(tmp_path, F_OK), -1);
    }
}

static void begin_run(void)
{
    const tr_journal_options o = options();
    closed(opened(&o));
}

static void test_every_prefix(void **state)
{
    size_t n, end = 0;
    unsigned want = 0;
    int next = 0;
    (void)state;
    char *all = whole(&n);
    begin_run();
    for (size_t cut = 0; cut <= n; cut++) {
        if (next < N_RECORDS && cut == end + length[next]) {
            want |= 1u << next;
            end += length[next++];
        }
        check_resume(all, cut, want);
    }
    free(all);
}

/* Power loss: zeros in place of any record, and in its middle; a stray line; a record twice. */
static void test_holes(void **state)
{
    size_t n, begin = 0;
    (void)state;
    char *all = whole(&n), *data = malloc(2 * n + 64);
    assert_non_null(data);
    begin_run();
    for (int i = 0; i < N_RECORDS; i++) {
        unsigned want = (1u << N_RECORDS) - 1 - (1u << i);
        memcpy(data, all, n);
        memset(data + begin, 0, length[i] - 1); /* the line feed stays */
        check_resume(data, n, want);
        memset(data + begin, 0, length[i]); /* it goes too: the next line is joined to the zeros */
        check_resume(data, n, i + 1 < N_RECORDS ? want & ~(2u << i) : want);
        memcpy(data, all, n);
        memset(data + begin + 5, 0, 3);
        check_resume(data, n, want);
        memcpy(data, all, begin);
        memcpy(data + begin, "\nnot a record\n{}\n", 17);
        memcpy(data + begin + 17, all + begin, n - begin);
        check_resume(data, n + 17, want | 1u << i);
        memcpy(data, all, n);
        memcpy(data + n, record[i], length[i]);
        check_resume(data, n + length[i], want | 1u << i);
        begin += length[i];
    }
    free(data);
    free(all);
}

/* OUT is a symbolic link: the file behind it is cut or replaced, the link stays. */
static void test_link(void **state)
{
    tr_journal_options o = options();
    char link_path[300];
    struct stat sb;
    size_t n, got;
    (void)state;
    char *all = whole(&n), *data = malloc(n + 8);
    assert_non_null(data);
    snprintf(link_path, sizeof link_path, "%s/link", folder);
    assert_int_equal(symlink("out", link_path), 0);
    o.run.out_path = link_path;
    closed(opened(&o));
    memcpy(data, "broken\n", 7);
    memcpy(data + 7, all, n);
    put_out(data, n + 7);
    tr_journal *j = opened(&o);
    assert_int_equal(tr_journal_found(j), N_RECORDS);
    closed(j);
    assert_int_equal(lstat(link_path, &sb), 0);
    assert_true(S_ISLNK(sb.st_mode));
    char *text = read_out(&got);
    assert_int_equal(got, n);
    assert_memory_equal(text, all, n);
    free(text);
    free(data);
    free(all);
}

/* OUT.run is a link to nowhere: refused, where it was once tried for ever. */
static void test_run_to_nowhere(void **state)
{
    const tr_journal_options o = options();
    tr_journal *j = NULL;
    tr_err err;
    (void)state;
    assert_int_equal(symlink("none/there", run_path), 0);
    alarm(300);
    assert_int_equal(tr_journal_open(&j, &o, &err), TR_E_USAGE);
    alarm(0);
    assert_null(j);
}

/* Records of another input do not count. */
static void test_foreign(void **state)
{
    tr_journal_options o = options();
    size_t n;
    (void)state;
    char *all = whole(&n);
    begin_run();
    put_out(all, n);
    o.input_hash = "ffffffffffffffffffffffffffffffff";
    tr_journal *j = opened(&o);
    assert_int_equal(tr_journal_found(j), 0);
    closed(j);
    free(all);
}

static void refused(const tr_journal_options *o, const char *word)
{
    tr_journal *j = NULL;
    tr_err err;
    assert_int_equal(tr_journal_open(&j, o, &err), TR_E_USAGE);
    assert_null(j);
    if (!strstr(err.text, word)) fail_msg("\"%s\" is not in: %s", word, err.text);
}

static void test_identity(void **state)
{
    tr_journal_options o = options();
    tr_run_field other[N_FIELDS + 1];
    (void)state;
    tr_journal *j = opened(&o);
    append(j, 0);
    closed(j);
    for (int i = 0; i < N_FIELDS; i++) {
        memcpy(other, fields, sizeof fields);
        other[i].value = "something else";
        o.run.field = other;
        refused(&o, fields[i].name);
    }
    other[N_FIELDS - 1] = fields[N_FIELDS - 1];
    memcpy(other, fields, sizeof fields);
    other[N_FIELDS] = (tr_run_field){"new", "1"};
    o.run.n_fields = N_FIELDS + 1;
    refused(&o, "new");
    o = options();
    closed(opened(&o)); /* still good */
    /* A damaged OUT.run beside records. */
    for (int cut = 0; cut < 12; cut++) {
        assert_int_equal(truncate(run_path, cut), 0);
        refused(&o, "damaged");
    }
    /* Somebody's file that happens to have this name stays as it is, while there is no record that it could belong to. What a
     * crash has left of OUT.run does not stand in the way. */
    put_run("my notes\n", 9);
    refused(&o, "damaged");
    assert_int_equal(unlink(out_path), 0);
    refused(&o, "is no file of a job's");
    put_out("", 0);
    refused(&o, "is no file of a job's");
    assert_run_is("my notes\n", 9);
    put_run("{\"ru", 4);
    closed(opened(&o));
    put_run("\0\0\0\0\0\0", 6);
    closed(opened(&o));
    /* An OUT without OUT.run, also an empty one. */
    assert_int_equal(unlink(run_path), 0);
    refused(&o, "exists but");
    put_out("", 0);
    refused(&o, "exists but");
    assert_int_equal(access(run_path, F_OK), -1);
    /* Nothing there: --resume wants something. */
    assert_int_equal(unlink(out_path), 0);
    o.run.must_exist = true;
    refused(&o, "--resume");
    assert_int_equal(access(run_path, F_OK), -1);
    /* No record was written yet: the identity binds nobody. */
    o = options();
    closed(opened(&o));
    memcpy(other, fields, sizeof fields);
    other[1].value = "m-2";
    o.run.field = other;
    closed(opened(&o));
    o.run.must_exist = true;
    closed(opened(&o));
}

static void put_saved(void)
{
    FILE *f = fopen(saved_path, "w");
    assert_non_null(f);
    fputs("tokens", f);
    assert_int_equal(fclose(f), 0);
}

/* Hours of long answers have no record yet, but tokens: no other run takes their place. */
static void test_tokens_bind(void **state)
{
    tr_journal_options o = options();
    tr_run_field other[N_FIELDS];
    (void)state;
    closed(opened(&o));
    put_saved();
    memcpy(other, fields, sizeof fields);
    other[1].value = "m-2";
    o.run.field = other;
    refused(&o, saved_path);
    o = options();
    closed(opened(&o));
    assert_int_equal(access(saved_path, F_OK), 0);
    assert_int_equal(unlink(out_path), 0); /* not there, or empty */
    o.run.field = other;
    refused(&o, saved_path);
    assert_int_equal(access(saved_path, F_OK), 0);
    assert_int_equal(truncate(run_path, 7), 0);
    refused(&o, "damaged");
    /* Who starts afresh has nothing of the old run. */
    assert_int_equal(unlink(run_path), 0);
    closed(opened(&o));
    assert_int_equal(access(saved_path, F_OK), -1);
}

/* What takes OUT's place may be read by nobody else. */
static void test_permissions(void **state)
{
    struct stat sb;
    size_t n;
    (void)state;
    char *all = whole(&n);
    begin_run();
    memset(all, 0, length[0] - 1);
    put_out(all, n);
    assert_int_equal(chmod(out_path, 0640), 0);
    const tr_journal_options o = options();
    closed(opened(&o));
    assert_int_equal(stat(out_path, &sb), 0);
    assert_int_equal(sb.st_mode & 0777, 0640);
    assert_int_equal(sb.st_size, n - length[0]); /* it was replaced */
    free(all);
}

/* A kill at any moment of OUT.run's first writing leaves something a rerun copes with. */
static void test_torn_run(void **state)
{
    const tr_journal_options o = options();
    char *text = NULL;
    size_t n;
    tr_err err;
    (void)state;
    begin_run();
    assert_int_equal(tr_file_read(run_path, 1 << 16, &text, &n, &err), TR_OK);
    char *first = memchr(text, '\n', n);
    assert_non_null(first);
    for (size_t cut = 0; cut <= n; cut++) {
        tr_scratch_clear(folder, 0);
        assert_int_equal(tr_scratch_write(folder, "out.run", text, cut), 0);
        tr_journal *j = opened(&o);
        append(j, 1);
        closed(j);
        if (cut <= (size_t)(first - text)) continue;
        /* Torn in the part about the lock: the identity holds. */
        assert_int_equal(truncate(run_path, (off_t)cut), 0);
        j = opened(&o);
        assert_int_equal(tr_journal_found(j), 1);
        closed(j);
    }
    free(text);
}

static void test_locked(void **state)
{
    int ready[2], quit[2];
    char c = 0;
    (void)state;
    for (int no_ofd = 0; no_ofd < 2; no_ofd++) {
        tr_journal_options o = options();
        o.run.no_ofd = no_ofd;
        tr_scratch_clear(folder, 0);
        assert_int_equal(pipe(ready), 0);
        assert_int_equal(pipe(quit), 0);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            tr_journal *j = NULL;
            tr_err err;
            int bad = tr_journal_open(&j, &o, &err) != TR_OK;
            close(quit[1]); /* our own copy would keep the pipe open */
            if (write(ready[1], &c, 1) != 1 || read(quit[0], &c, 1) < 0) bad = 1;
            if (no_ofd) tr_journal_close(j, NULL);
            _exit(bad); /* else as if killed: the system gives the lock back */
        }
        assert_int_equal(read(ready[0], &c, 1), 1);
        char pid[32];
        snprintf(pid, sizeof pid, "pid %d", (int)child);
        refused(&o, pid);
        refused(&o, no_ofd ? "rm '" : "locked");
        int status;
        close(quit[1]);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        closed(opened(&o));
        assert_int_equal(access(lock_path, F_OK), -1);
        close(quit[0]);
        close(ready[0]);
        close(ready[1]);
    }
    /* Two in one process are two jobs as well. */
    const tr_journal_options o = options();
    tr_journal *j = opened(&o);
    refused(&o, "locked");
    closed(j);
}

static void test_vanished(void **state)
{
    tr_err err;
    (void)state;
    for (int what = 0; what < 5; what++) {
        tr_journal_options o = options();
        o.check_ms = 1;
        tr_scratch_clear(folder, 0);
        tr_journal *j = opened(&o);
        append(j, 0);
        tr_status wanted = TR_E_IO;
        if (what == 0) assert_int_equal(unlink(out_path), 0);
        if (what == 1) assert_int_equal(rename(out_path, tmp_path), 0);
        if (what == 2) {
            assert_int_equal(rename(out_path, tmp_path), 0);
            put_out(record[0], length[0]);
        }
        if (what == 3) assert_int_equal(truncate(out_path, 3), 0);
        if (what == 4) wanted = TR_OK;
        usleep(2000);
        assert_int_equal(tr_journal_tick(j, &err), wanted);
        if (wanted != TR_OK) assert_non_null(strstr(err.text, "out"));
        assert_int_equal(tr_journal_close(j, &err), wanted);
    }
}

static void limit_files(rlim_t bytes)
{
    struct rlimit r;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &r), 0);
    r.rlim_cur = bytes;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &r), 0);
}

static void *lift_limit(void *arg)
{
    (void)arg;
    usleep(60000);
    limit_files(RLIM_INFINITY);
    return NULL;
}

/* The third record does not fit, by any number of bytes; the limit stays, or goes away while it
 * is tried again. */
static void test_full(void **state)
{
    tr_err err;
    size_t n;
    (void)state;
    for (size_t missing = 1; missing <= length[2]; missing += 40) {
        for (int lifted = 0; lifted < 2; lifted++) {
            tr_journal_options o = options();
            o.retry_ms = lifted ? 600000 : 30;
            tr_scratch_clear(folder, 0);
            tr_journal *j = opened(&o);
            append(j, 0);
            append(j, 1);
            limit_files(length[0] + length[1] + length[2] - missing);
            pthread_t thread;
            if (lifted) assert_int_equal(pthread_create(&thread, NULL, lift_limit, NULL), 0);
            tr_status st = tr_journal_append(j, record[2], length[2], &err);
            if (lifted) pthread_join(thread, NULL);
            limit_files(RLIM_INFINITY);
            assert_int_equal(st, lifted ? TR_OK : TR_E_IO);
            assert_int_equal(tr_journal_stalled(j), !lifted);
            if (lifted) append(j, 3);
            tr_journal_close(j, NULL);
            /* No torn line either way. */
            char *text = read_out(&n);
            assert_int_equal(n, length[0] + length[1] + (lifted ? length[2] + length[3] : 0));
            free(text);
            j = opened(&o);
            assert_int_equal(tr_journal_found(j), lifted ? 4 : 2);
            closed(j);
        }
    }
}

/* Nor longer than the job has. */
static void test_full_at_the_end(void **state)
{
    const uint64_t begun = tr_now_ns();
    tr_journal_options o = options();
    tr_err err;
    (void)state;
    o.retry_ms = 600000;
    o.end_ns = begun + UINT64_C(50000000);
    tr_journal *j = opened(&o);
    append(j, 0);
    limit_files(length[0] + 1);
    assert_int_equal(tr_journal_append(j, record[1], length[1], &err), TR_E_IO);
    limit_files(RLIM_INFINITY);
    assert_true(tr_now_ns() - begun < UINT64_C(5000000000));
    tr_journal_close(j, NULL);
}

static void test_stream(void **state)
{
    tr_journal *j = NULL;
    tr_err err;
    int fd[2];
    char buf[4096];
    (void)state;
    assert_int_equal(pipe(fd), 0);
    assert_int_equal(tr_journal_stream(&j, fd[1], "standard output", &err), TR_OK);
    close(fd[1]);
    assert_int_equal(tr_journal_append(j, record[0], length[0], &err), TR_OK);
    assert_int_equal(tr_journal_tick(j, &err), TR_OK);
    assert_int_equal(read(fd[0], buf, sizeof buf), length[0]);
    assert_memory_equal(buf, record[0], length[0]);
    assert_false(tr_journal_has(j, key_of(0)));
    close(fd[0]); /* the reader goes away */
    assert_int_equal(tr_journal_append(j, record[1], length[1], &err), TR_E_IO);
    assert_int_equal(tr_journal_close(j, &err), TR_OK);
}

static void test_no_folder(void **state)
{
    tr_journal_options o = options();
    tr_journal *j = NULL;
    tr_err err;
    char path[400];
    (void)state;
    snprintf(path, sizeof path, "%s/none/out", folder);
    o.run.out_path = path;
    assert_int_equal(tr_journal_open(&j, &o, &err), TR_E_USAGE);
    o.run.out_path = folder; /* a folder is no file */
    assert_int_equal(tr_journal_open(&j, &o, &err), TR_E_USAGE);
}

int main(void)
{
    tr_err err;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_append, fresh),
        cmocka_unit_test_setup(test_every_prefix, fresh),
        cmocka_unit_test_setup(test_holes, fresh),
        cmocka_unit_test_setup(test_link, fresh),
        cmocka_unit_test_setup(test_run_to_nowhere, fresh),
        cmocka_unit_test_setup(test_foreign, fresh),
        cmocka_unit_test_setup(test_identity, fresh),
        cmocka_unit_test_setup(test_tokens_bind, fresh),
        cmocka_unit_test_setup(test_permissions, fresh),
        cmocka_unit_test_setup(test_torn_run, fresh),
        cmocka_unit_test_setup(test_locked, fresh),
        cmocka_unit_test_setup(test_vanished, fresh),
        cmocka_unit_test_setup(test_full, fresh),
        cmocka_unit_test_setup(test_full_at_the_end, fresh),
        cmocka_unit_test_setup(test_stream, fresh),
        cmocka_unit_test_setup(test_no_folder, fresh),
    };
    if (tr_stop_install(&err) != TR_OK) return 1; /* SIGXFSZ and SIGPIPE become errno */
    return cmocka_run_group_tests(tests, setup, teardown);
}
