/* The input: lines, duplicates, hash, and a file that changes under the job. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"
#include "batch/input.h"
#include "tests/scratch.h"

static char folder[256];

static const char *path_of(const char *name)
{
    static _Thread_local char path[600];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void put(const char *name, const char *data, size_t n)
{
    FILE *f = fopen(path_of(name), "w");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static void puts_to(const char *name, const char *text)
{
    put(name, text, strlen(text));
}

static tr_input *opened(const char *name, size_t max_line)
{
    tr_input *in = NULL;
    tr_err err;
    if (tr_input_open(&in, path_of(name), max_line, &err) != TR_OK) fail_msg("%s", err.text);
    return in;
}

static void expect_line(tr_input *in, uint64_t number, const char *text)
{
    tr_line line;
    tr_err err;
    assert_int_equal(tr_input_next(in, &line, &err), 1);
    assert_int_equal(line.number, number);
    assert_int_equal(line.n, strlen(text));
    assert_memory_equal(line.text, text, line.n);
}

static void expect_end(tr_input *in)
{
    tr_line line;
    tr_err err;
    assert_int_equal(tr_input_next(in, &line, &err), 0);
}

static void test_lines(void **state)
{
    tr_err err;
    char hash[33];
    static const char text[] =
        "\xef\xbb\xbf{\"custom_id\":\"a\"}\r\n\r\n  \t\n{\"custom_id\":\"b\"}\n\nx\r\r\nlast";
    (void)state;
    puts_to("in", text);
    tr_input *in = opened("in", 0);
    assert_int_equal(tr_input_about(in)->n_requests, 4);
    assert_int_equal(tr_input_about(in)->bytes, strlen(text));
    tr_hasher *h = tr_hasher_create();
    tr_hasher_add(h, text, strlen(text));
    tr_hasher_hex(h, hash);
    tr_hasher_free(h);
    assert_string_equal(tr_input_about(in)->hash, hash);
    expect_line(in, 1, "{\"custom_id\":\"a\"}");
    expect_line(in, 4, "{\"custom_id\":\"b\"}");
    expect_line(in, 6, "x\r");
    expect_line(in, 7, "last");
    expect_end(in);
    expect_end(in);
    assert_int_equal(tr_input_check(in, &err), TR_OK);
    tr_input_close(in);
}

/* OUT.run and OUT.saved of older jobs hold hashes: XXH3 of 128 bits, high half first, each half with its zeros. */
static void test_hash(void **state)
{
    char hex[33];
    (void)state;
    tr_hash128_hex("", 0, 0, hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
    uint64_t n = 0;
    do
        tr_hash128_hex(&n, sizeof n, 0, hex);
    while (hex[0] != '0' && ++n < 10000); /* one of 16 begins with a zero */
    assert_int_equal(hex[0], '0');
    assert_int_equal(strlen(hex), 32);
    assert_int_equal(strspn(hex, "0123456789abcdef"), 32);
}

static void test_nothing(void **state)
{
    static const char *const t[] = {"", "\n", "\n \n\t\r\n", "\xef\xbb\xbf", "\xef\xbb\xbf\n"};
    tr_err err;
    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        puts_to("in", t[i]);
        tr_input *in = opened("in", 0);
        assert_int_equal(tr_input_about(in)->n_requests, 0);
        expect_end(in);
        assert_int_equal(tr_input_check(in, &err), TR_OK);
        tr_input_close(in);
    }
}

static void test_long_lines(void **state)
{
    enum { MAX = 1000 };
    tr_err err;
    tr_line line;
    (void)state;
    /* lengths around the cap and around the reader's pieces */
    static const size_t lengths[] = {MAX - 1, MAX,           MAX + 1, 5 * MAX,
                                     1 << 18, (1 << 18) + 1, 700000};
    size_t total = 0, n = sizeof lengths / sizeof *lengths;
    char *data = malloc(2000000);
    assert_non_null(data);
    for (size_t i = 0; i < n; i++) {
        memset(data + total, 'x', lengths[i]);
        total += lengths[i];
        data[total++] = '\n';
    }
    memcpy(data + total, "end", 3);
    put("in", data, total + 3);
    tr_input *in = opened("in", MAX);
    assert_int_equal(tr_input_about(in)->n_requests, n + 1);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(tr_input_next(in, &line, &err), 1);
        assert_int_equal(line.number, i + 1);
        assert_int_equal(line.too_long, lengths[i] > MAX);
        assert_int_equal(line.bytes, lengths[i] + 1);
        assert_int_equal(line.n, lengths[i] > MAX ? 0 : lengths[i]);
    }
    expect_line(in, n + 1, "end");
    expect_end(in);
    assert_int_equal(tr_input_check(in, &err), TR_OK);
    tr_input_close(in);
    /* all of them fit */
    in = opened("in", 0);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(tr_input_next(in, &line, &err), 1);
        assert_int_equal(line.n, lengths[i]);
        for (size_t k = 0; k < line.n; k += 997)
            assert_int_equal(line.text[k], 'x');
    }
    tr_input_close(in);
    free(data);
}

static void test_duplicates(void **state)
{
    tr_input *in = NULL;
    tr_err err;
    (void)state;
    puts_to("in", "{\"custom_id\":\"a\"}\n\nnot json\nnot "
                  "json\n{\"custom_id\":\"b\"}\n{\"x\":1,\"custom_id\":\"\\u0061\"}\n");
    assert_int_equal(tr_input_open(&in, path_of("in"), 0, &err), TR_E_INPUT);
    assert_null(in);
    assert_non_null(strstr(err.text, "lines 1 and 6"));
    assert_non_null(strstr(err.text, "\"a\""));
    /* many distinct ones, and one repeated at the far end */
    enum { N = 20000 };
    FILE *f = fopen(path_of("in"), "w");
    assert_non_null(f);
    for (int i = 0; i < N; i++)
        fprintf(f, "{\"custom_id\":\"request-%d\"}\n", i);
    fclose(f);
    in = opened("in", 0);
    assert_int_equal(tr_input_about(in)->n_requests, N);
    tr_input_close(in);
    f = fopen(path_of("in"), "a");
    assert_non_null(f);
    fputs("{\"custom_id\":\"request-3\"}", f);
    fclose(f);
    assert_int_equal(tr_input_open(&in, path_of("in"), 0, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "lines 4 and 20001"));
}

static void test_missing(void **state)
{
    tr_input *in = NULL;
    tr_err err;
    (void)state;
    assert_int_equal(tr_input_open(&in, path_of("none"), 0, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "none"));
    assert_int_equal(tr_input_open(&in, folder, 0, &err), TR_E_INPUT);
}

static void test_pipe(void **state)
{
    tr_err err;
    tr_input *in = NULL;
    int fd[2];
    char path[64];
    (void)state;
    assert_int_equal(pipe(fd), 0);
    assert_int_equal(write(fd[1], "{\"custom_id\":\"a\"}\nb", 19), 19);
    close(fd[1]);
    snprintf(path, sizeof path, "/dev/fd/%d", fd[0]);
    assert_int_equal(tr_input_open(&in, path, 0, &err), TR_OK);
    close(fd[0]);
    assert_int_equal(tr_input_about(in)->n_requests, 2);
    expect_line(in, 1, "{\"custom_id\":\"a\"}");
    expect_line(in, 2, "b");
    expect_end(in);
    assert_int_equal(tr_input_check(in, &err), TR_OK);
    tr_input_close(in);
}

/* Every line belongs to one shard, by its number; a shard alone still sees that the file changed. */
static void test_shards(void **state)
{
    tr_err err;
    tr_line line;
    (void)state;
    puts_to("in", "{\"custom_id\":\"a\"}\n\n{\"custom_id\":\"c\"}\n{\"custom_id\":\"d\"}\ne\n \n");
    for (uint64_t i = 0; i < 3; i++) { /* lines 1 4, 2 5, 3 6; 2 and 6 are blank */
        tr_input *in = opened("in", 0);
        assert_int_equal(tr_input_take_shard(in, (tr_input_shard){i, 3}, &err), TR_OK);
        assert_int_equal(tr_input_about(in)->n_requests, 4);
        assert_int_equal(tr_input_about(in)->n_mine, i ? 1 : 2);
        int got = 0;
        while (tr_input_next(in, &line, &err) > 0) {
            assert_int_equal((line.number - 1) % 3, i);
            got++;
        }
        assert_int_equal(got, tr_input_about(in)->n_mine);
        assert_int_equal(tr_input_check(in, &err), TR_OK);
        tr_input_close(in);
    }
    tr_input *in = opened("in", 0);
    assert_int_equal(tr_input_take_shard(in, (tr_input_shard){7, 8}, &err), TR_OK);
    assert_int_equal(tr_input_about(in)->n_mine, 0);
    expect_end(in);
    assert_int_equal(tr_input_check(in, &err), TR_OK);
    tr_input_close(in);
    in = opened("in", 0);
    assert_int_equal(tr_input_take_shard(in, (tr_input_shard){0, 1}, &err), TR_OK);
    assert_int_equal(tr_input_about(in)->n_mine, 4);
    expect_line(in, 1, "{\"custom_id\":\"a\"}");
    tr_input_close(in);
}

static void test_changes(void **state)
{
    tr_err err;
    (void)state;
    for (int what = 0; what < 7; what++) {
        puts_to("in", "{\"custom_id\":\"a\"}\n{\"custom_id\":\"b\"}\n");
        tr_input *in = opened("in", 0);
        expect_line(in, 1, "{\"custom_id\":\"a\"}");
        tr_status wanted = TR_E_INPUT;
        int fd = open(path_of("in"), O_RDWR);
        struct timespec same[2];
        struct stat sb;
        assert_true(fd >= 0 && fstat(fd, &sb) == 0);
        same[0] = sb.st_atim;
        same[1] = sb.st_mtim;
        if (what == 0) assert_int_equal(write(fd, "{\"custom_id\":\"c\"}\n", 18), 18);
        if (what == 1) assert_int_equal(ftruncate(fd, 18), 0);
        if (what == 2) { /* same size and time, other bytes: only the hash shows it */
            assert_int_equal(pwrite(fd, "{\"custom_id\":\"z\"}", 17, 18), 17);
            assert_int_equal(futimens(fd, same), 0);
        }
        if (what == 3 ||
            what == 5) { /* another file under the name, with other bytes or the same */
            puts_to("other", what == 3 ? "{\"custom_id\":\"a\"}\n{\"custom_id\":\"x\"}\n"
                                       : "{\"custom_id\":\"a\"}\n{\"custom_id\":\"b\"}\n");
            char from[600];
            snprintf(from, sizeof from, "%s/other", folder);
            assert_int_equal(rename(from, path_of("in")), 0);
        }
        if (what == 6) { /* touched */
            same[1].tv_sec += 10;
            assert_int_equal(futimens(fd, same), 0);
        }
        if (what >= 4) wanted = TR_OK; /* 4: nothing at all */
        close(fd);
        tr_line line;
        while (tr_input_next(in, &line, &err) > 0) {
        }
        if (what == 2) {
            /* The reader had the file's bytes in hand before: read it afresh. */
            tr_input_close(in);
            in = opened("in", 0);
            fd = open(path_of("in"), O_RDWR);
            assert_int_equal(pwrite(fd, "{\"custom_id\":\"y\"}", 17, 18), 17);
            assert_int_equal(futimens(fd, same), 0);
            close(fd);
            while (tr_input_next(in, &line, &err) > 0) {
            }
        }
        assert_int_equal(tr_input_check(in, &err), wanted);
        tr_input_close(in);
    }
}

static int make_folder(void **state)
{
    (void)state;
    return tr_scratch_make(folder, sizeof folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    tr_scratch_clear(folder, 1);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hash),       cmocka_unit_test(test_lines),
        cmocka_unit_test(test_nothing),    cmocka_unit_test(test_long_lines),
        cmocka_unit_test(test_duplicates), cmocka_unit_test(test_missing),
        cmocka_unit_test(test_pipe),       cmocka_unit_test(test_shards),
        cmocka_unit_test(test_changes),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
