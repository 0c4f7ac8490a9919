/* A shard on a file system that does not answer (reliability.md 4, row 9): reads that do not end are told with rank, host and file,
 * again and again, and go on when the file system does. pread of this program is the file system. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "model/patience.h"
#include "vectors.h"

/* Shared with pread, which has no argument of ours: reads wait until a byte comes out of the pipe. */
static atomic_bool stalled;
static int gate[2];

ssize_t pread(int fd, void *buf, size_t n, off_t at)
{
    char byte;
    while (atomic_load(&stalled) && read(gate[0], &byte, 1) == 1) {
    }
    return syscall(SYS_pread64, fd, buf, n, at);
}

typedef struct reading {
    const tr_checkpoint *checkpoint;
    const tr_tensor *tensor;
    tr_status st;
    tr_err err;
} reading;

static void *read_one(void *arg)
{
    reading *r = arg;
    char *to = malloc((size_t)r->tensor->bytes);
    r->st =
        to ? tr_checkpoint_read(r->checkpoint, r->tensor, 0, (size_t)r->tensor->bytes, to, &r->err)
           : TR_E_MEMORY;
    free(to);
    return NULL;
}

static void test_stalled(void **state)
{
    char dir[512], line[1200], wanted[1100];
    tr_checkpoint *c = NULL;
    tr_patience *p = NULL;
    pthread_t thread;
    tr_err err;
    int said[2];
    uint64_t ns;
    (void)state;

    if (tr_checkpoint_open(&c, tr_source_path(dir, sizeof dir, "models/tiny"), &err) != TR_OK)
        fail_msg("%s", err.text);
    assert_int_equal(pipe(gate), 0);
    assert_int_equal(pipe(said), 0);
    FILE *out = fdopen(said[1], "w"), *in = fdopen(said[0], "r");
    assert_true(out && in && setvbuf(out, NULL, _IOLBF, 0) == 0);
    assert_null(tr_checkpoint_waits(c, &ns));
    reading r = {.checkpoint = c, .tensor = tr_checkpoint_tensor(c, tr_checkpoint_count(c) - 1)};
    const tr_patience_options o = {
        .checkpoint = c, .out = out, .rank = 3, .host = "node7", .every_s = 0.02};
    atomic_store(&stalled, true);
    assert_int_equal(pthread_create(&thread, NULL, read_one, &r), 0);
    assert_int_equal(tr_patience_start(&p, &o, &err), TR_OK);
    snprintf(wanted, sizeof wanted, "trireme: rank 3 on node7: waiting for %s: no read of it",
             tr_checkpoint_path(c, r.tensor));
    for (int i = 0; i < 2; i++) { /* until they come, however long that takes */
        assert_non_null(fgets(line, sizeof line, in));
        assert_memory_equal(line, wanted, strlen(wanted));
    }
    assert_string_equal(tr_checkpoint_waits(c, &ns), tr_checkpoint_path(c, r.tensor));
    assert_true(ns >= 20000000);
    atomic_store(&stalled, false);
    assert_int_equal(write(gate[1], "x", 1), 1);
    assert_int_equal(pthread_join(thread, NULL), 0);
    if (r.st != TR_OK) fail_msg("%s", r.err.text);
    assert_null(tr_checkpoint_waits(c, &ns));
    tr_patience_stop(p);
    tr_patience_stop(NULL);
    fclose(out);
    fclose(in);
    close(gate[0]);
    close(gate[1]);
    tr_checkpoint_close(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_stalled)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
