/* --merge: input order, lost and doubled requests, damaged parts, parts of different runs, outputs that exist, FIFOs, a stop, an
 * input that changes. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/json.h"
#include "base/stop.h"
#include "batch/input.h"
#include "batch/merge.h"
#include "batch/record.h"
#include "tests/scratch.h"

enum { N = 9 }; /* requests; line 5 of the input is no request, line 3 is blank */

static char folder[256], in_path[300], all_path[300], part_path[3][300];
static char hash[33];
static char *record[N];
static size_t length[N];

static int setup(void **state)
{
    tr_buf text = {0};
    tr_input *in = NULL;
    (void)state;
    if (!tr_scratch_make(folder, sizeof folder)) return -1;
    snprintf(in_path, sizeof in_path, "%s/in", folder);
    snprintf(all_path, sizeof all_path, "%s/all", folder);
    for (int i = 0; i < 3; i++)
        snprintf(part_path[i], sizeof part_path[i], "%s/part%d", folder, i);
    for (int i = 0; i < N; i++) {
        if (i == 2) tr_buf_puts(&text, "\n");
        if (i == 3)
            tr_buf_puts(&text, "no request\n");
        else
            tr_buf_printf(&text, "{\"custom_id\":\"r%d\"}\n", i);
    }
    if (tr_scratch_write(folder, "in", text.s, text.n) ||
        tr_input_open(&in, in_path, 0, NULL) != TR_OK)
        return -1;
    memcpy(hash, tr_input_about(in)->hash, sizeof hash);
    tr_input_close(in);
    free(text.s);
    const tr_record_options o = {.input_hash = hash, .model = "m"};
    for (int i = 0; i < N; i++) {
        tr_buf line = {0};
        char id[8];
        snprintf(id, sizeof id, "r%d", i);
        const tr_record_name name = {id, strlen(id), 0};
        const tr_refusal refusal = {400, "invalid_request_error", "x", "", "m"};
        if (i == 3)
            tr_record_invalid(&line, &o, 5, 1, "bad", NULL);
        else
            tr_record_refusal(&line, &o, &name, &refusal, NULL);
        record[i] = line.s;
        length[i] = line.n;
    }
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tr_scratch_clear(folder, 1);
    for (int i = 0; i < N; i++)
        free(record[i]);
    return 0;
}

/* A part with the records of `which`, a string of digits. */
static void put_part(int part, const char *which, const char *tail)
{
    tr_buf b = {0};
    char name[8];
    for (; *which; which++)
        tr_buf_add(&b, record[*which - '0'], length[*which - '0']);
    tr_buf_puts(&b, tail);
    snprintf(name, sizeof name, "part%d", part);
    assert_int_equal(tr_scratch_write(folder, name, b.s ? b.s : "", b.n), 0);
    free(b.s);
}

static tr_status merge(int n_parts, tr_err *err)
{
    char *parts[3] = {part_path[0], part_path[1], part_path[2]};
    return tr_merge(in_path, all_path, parts, n_parts, NULL, err);
}

static void expect_merged(void)
{
    char *text = NULL;
    size_t n, at = 0;
    assert_int_equal(tr_file_read(all_path, 1 << 20, &text, &n, NULL), TR_OK);
    for (int i = 0; i < N; i++) {
        assert_true(at + length[i] <= n);
        assert_memory_equal(text + at, record[i], length[i]);
        at += length[i];
    }
    assert_int_equal(at, n);
    free(text);
    assert_int_equal(unlink(all_path), 0);
}

static void test_order(void **state)
{
    tr_err err;
    (void)state;
    put_part(0, "8531", "");
    put_part(1, "0276", "{\"id\":\"torn"); /* a torn tail is no record */
    put_part(2, "4", "\n{}\n");
    if (merge(3, &err) != TR_OK) fail_msg("%s", err.text);
    expect_merged();
    put_part(0, "876543210", "");
    if (merge(1, &err) != TR_OK) fail_msg("%s", err.text);
    expect_merged();
}

static void test_lost(void **state)
{
    tr_err err;
    char gone[N + 1];
    (void)state;
    put_part(1, "", "");
    for (int i = 0; i < N; i++) {
        int n = 0;
        for (int k = 0; k < N; k++)
            if (k != i) gone[n++] = (char)('0' + k);
        gone[n] = 0;
        put_part(0, gone, "");
        assert_int_equal(merge(2, &err), TR_E_INPUT);
        char word[16];
        snprintf(word, sizeof word, "line %d", i < 2 ? i + 1 : i + 2);
        assert_non_null(strstr(err.text, "1 of 9"));
        assert_non_null(strstr(err.text, word));
        assert_int_equal(access(all_path, F_OK), -1);
    }
}

static void test_doubled(void **state)
{
    tr_err err;
    (void)state;
    put_part(0, "012345678", "");
    put_part(1, "3", "");
    assert_int_equal(merge(2, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "two records"));
    assert_non_null(strstr(err.text, "part1, line 1"));
    assert_non_null(strstr(err.text, "part0, line 4"));
    put_part(0, "0123456780", "");
    assert_int_equal(merge(1, &err), TR_E_INPUT);
    assert_int_equal(access(all_path, F_OK), -1);
}

static void put_run(int part, const char *text)
{
    char name[16];

    snprintf(name, sizeof name, "part%d.run", part);
    assert_int_equal(tr_scratch_write(folder, name, text, strlen(text)), 0);
}

/* What the parts' runs were started with must be the same, but for their shards. */
static void test_runs(void **state)
{
    char path[320];
    tr_err err = {0};
    (void)state;
    put_part(0, "012345678", "");
    put_part(1, "", "");
    put_part(2, "", "");
    put_run(0, "{\"run\":{\"seed\":\"1\",\"shard\":\"0/3\"},\n\"lock\":null}\n");
    put_run(2, "{\"run\":{\"seed\":\"1\",\"shard\":\"2/3\"},\n");
    assert_int_equal(merge(3, &err), TR_OK);
    expect_merged();
    put_run(2, "{\"run\":{\"seed\":\"2\",\"shard\":\"2/3\"},\n");
    assert_int_equal(merge(3, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "seed 1 and 2"));
    assert_non_null(strstr(err.text, "part0"));
    assert_non_null(strstr(err.text, "part2"));
    assert_int_equal(access(all_path, F_OK), -1);
    put_run(2, "{\"run\":{\"shard\":\"2/3\"},\n");
    assert_int_equal(merge(3, &err), TR_E_USAGE);
    assert_non_null(strstr(err.text, "seed 1 and (none)"));
    put_run(2, "{\"run\":{\"seed\":\"2"); /* a crash's */
    assert_int_equal(merge(3, &err), TR_OK);
    expect_merged();
    for (int i = 0; i < 3; i += 2) {
        snprintf(path, sizeof path, "%s.run", part_path[i]);
        unlink(path);
    }
}

static void test_files(void **state)
{
    tr_err err;
    char *none[1] = {all_path};
    (void)state;
    put_part(0, "012345678", "");
    assert_int_equal(tr_merge(in_path, part_path[1], none, 1, NULL, &err),
                     TR_E_USAGE); /* part1 exists */
    unlink(part_path[1]);
    assert_int_equal(tr_merge(in_path, part_path[1], none, 1, NULL, &err),
                     TR_E_INPUT); /* the part does not */
    none[0] = part_path[0];
    assert_int_equal(tr_merge(all_path, part_path[1], none, 1, NULL, &err),
                     TR_E_INPUT); /* nor does the input */
    assert_int_equal(tr_merge("-", part_path[1], none, 1, NULL, &err), TR_E_USAGE);
    none[0] = folder; /* what the system said is passed on */
    assert_int_equal(tr_merge(in_path, part_path[1], none, 1, NULL, &err), TR_E_IO);
    assert_non_null(strstr(err.text, "Is a directory"));
    if (merge(1, &err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(merge(1, &err), TR_E_USAGE); /* never overwritten */
    expect_merged();
}

/* A FIFO as input is read once and gone through twice; one as a part cannot be, and nobody waits for it. */
static void test_fifos(void **state)
{
    char fifo[320], *parts[1] = {part_path[0]}, *text = NULL;
    size_t n;
    tr_err err;
    int status;
    (void)state;
    snprintf(fifo, sizeof fifo, "%s/fifo", folder);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(tr_file_read(in_path, 1 << 20, &text, &n, NULL), TR_OK);
    put_part(0, "876543210", "");
    const pid_t writer = fork();
    if (writer == 0) {
        const int fd = open(fifo, O_WRONLY);
        _exit(fd >= 0 && write(fd, text, n) == (ssize_t)n ? 0 : 1);
    }
    if (tr_merge(fifo, all_path, parts, 1, NULL, &err) != TR_OK) fail_msg("%s", err.text);
    assert_true(waitpid(writer, &status, 0) == writer && status == 0);
    expect_merged();
    parts[0] = fifo;
    assert_int_equal(tr_merge(in_path, all_path, parts, 1, NULL, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "no file"));
    free(text);
    assert_int_equal(unlink(fifo), 0);
}

/* In a process of its own, since a stop is for good: 0: TR_E_STOP, said so, and nothing is left. */
static int stopped_merge(const char *in, bool before)
{
    char *parts[1] = {part_path[0]}, tmp[320];
    tr_err err = {0};
    if (tr_stop_install(&err) != TR_OK) return 10;
    if (before)
        raise(SIGUSR1);
    else
        tr_stop_alarm(0.05); /* the input is waited for until then, and would be for ever */
    snprintf(tmp, sizeof tmp, "%s.tmp", all_path);
    if (tr_merge(in, all_path, parts, 1, NULL, &err) != TR_E_STOP) return 11;
    if (!strstr(err.text, before ? "stopped by USR1" : "stopped by the time budget")) return 12;
    return access(all_path, F_OK) == 0 || access(tmp, F_OK) == 0 ? 13 : 0;
}

static void test_stopped(void **state)
{
    char fifo[320];
    int status;
    (void)state;
    snprintf(fifo, sizeof fifo, "%s/fifo", folder);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    put_part(0, "876543210", "");
    for (int before = 0; before < 2; before++) {
        const pid_t child = fork();
        if (child == 0) _exit(stopped_merge(before ? in_path : fifo, before));
        assert_true(waitpid(child, &status, 0) == child && WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
    }
    assert_int_equal(unlink(fifo), 0);
}

/* What is done to the input while a merge has it open: its log, which says that a line of the part is left out, does it. */
typedef struct meddler {
    enum {
        GROWN,
        SHRUNK,
        ANOTHER_WORD,
        ANOTHER_FILE,
        A_FIFO,
        N_REFUSED,
        SAME_BYTES = N_REFUSED,
        N_WAYS
    } how;
    const char *text;
    size_t n;
    int done;
} meddler;

static ssize_t meddle(void *cookie, const char *line, size_t n)
{
    meddler *m = cookie;
    char other[320];
    (void)line;
    if (m->done++) return (ssize_t)n;
    char *text = malloc(m->n + 1);
    assert_non_null(text);
    memcpy(text, m->text, m->n);
    text[m->n] = '\n';
    if (m->how == A_FIFO) {
        assert_int_equal(unlink(in_path), 0);
        assert_int_equal(mkfifo(in_path, 0600), 0);
        free(text);
        return (ssize_t)n;
    }
    const bool another = m->how == ANOTHER_FILE || m->how == SAME_BYTES;
    if (m->how == ANOTHER_WORD || m->how == ANOTHER_FILE)
        memcpy(strstr(text, "no request"), "an request", 10);
    snprintf(other, sizeof other, "%s/other", folder);
    assert_int_equal(tr_scratch_write(folder, another ? "other" : "in", text,
                                      m->how == GROWN    ? m->n + 1
                                      : m->how == SHRUNK ? m->n - 1
                                                         : m->n),
                     0);
    if (another) assert_int_equal(rename(other, in_path), 0);
    free(text);
    return (ssize_t)n;
}

/* reliability.md 4, row 24: exit 65, no output, and with the input as it was the same command does
 * it. A copy of the same bytes under the name is the same input. */
static void test_input_changes(void **state)
{
    char *text = NULL, *parts[1] = {part_path[0]}, tmp[320];
    size_t n;
    tr_err err;
    (void)state;
    assert_int_equal(tr_file_read(in_path, 1 << 20, &text, &n, NULL), TR_OK);
    snprintf(tmp, sizeof tmp, "%s.tmp", all_path);
    for (int how = 0; how < N_WAYS; how++) {
        meddler m = {.how = how, .text = text, .n = n};
        FILE *out = fopencookie(&m, "w", (cookie_io_functions_t){.write = meddle});
        assert_non_null(out);
        setvbuf(out, NULL, _IONBF, 0);
        tr_log *log = tr_log_create(out, false, false);
        assert_non_null(log);
        put_part(0, "012345678", "{}\n");
        err = (tr_err){0};
        const tr_status s = tr_merge(in_path, all_path, parts, 1, log, &err);
        if (how < N_REFUSED) {
            if (s != TR_E_INPUT || m.done == 0 || !strstr(err.text, in_path) ||
                !strstr(err.text, "changed"))
                fail_msg("way %d: %d, %s", how, m.done, err.text);
            assert_int_equal(access(all_path, F_OK), -1);
        } else {
            if (s != TR_OK || m.done == 0) fail_msg("way %d: %d, %s", how, m.done, err.text);
            expect_merged();
        }
        assert_int_equal(access(tmp, F_OK), -1);
        tr_log_free(log);
        fclose(out);
        assert_int_equal(unlink(in_path), 0);
        assert_int_equal(tr_scratch_write(folder, "in", text, n), 0);
        if (tr_merge(in_path, all_path, parts, 1, NULL, &err) != TR_OK) fail_msg("%s", err.text);
        expect_merged();
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_input_changes), cmocka_unit_test(test_order),
        cmocka_unit_test(test_lost),          cmocka_unit_test(test_doubled),
        cmocka_unit_test(test_files),         cmocka_unit_test(test_fifos),
        cmocka_unit_test(test_stopped),       cmocka_unit_test(test_runs),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
