/* A job's files told apart before it begins: whatever names, links and folders say, nothing that is read is written. */
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

#include "command/apart.h"
#include "tests/scratch.h"

static char folder[256];

static int set_up(void **state)
{
    (void)state;
    return tr_scratch_make(folder, sizeof folder) && chdir(folder) == 0 ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    tr_scratch_clear(folder, 1);
    return 0;
}

static void put(const char *name, const char *text)
{
    assert_int_equal(tr_scratch_write(folder, name, text, strlen(text)), 0);
}

static void fine(const tr_batch_options *o)
{
    tr_err err = {0};
    if (tr_apart_check(o, &err) != TR_OK) fail_msg("%s", err.text);
}

/* Both texts are in the message. */
static void refused(const tr_batch_options *o, const char *one, const char *other)
{
    tr_err err = {0};
    assert_int_equal(tr_apart_check(o, &err), TR_E_USAGE);
    if (!strstr(err.text, one) || !strstr(err.text, other))
        fail_msg("'%s' without '%s' and '%s'", err.text, one, other);
}

static void test_input(void **state)
{
    static const char *const end[] = {"", ".run", ".lock", ".saved", ".saved.tmp", ".tmp"};
    char name[64];
    (void)state;
    for (size_t i = 0; i < sizeof end / sizeof *end; i++) {
        snprintf(name, sizeof name, "out%s", end[i]);
        put(name, "x");
        refused(&(tr_batch_options){.input = name, .output = "out"}, name, "-o");
        refused(&(tr_batch_options){.input = name, .output = "./out"}, name, "-o");
        assert_int_equal(link(name, "hard"), 0);
        refused(&(tr_batch_options){.input = "hard", .output = "out"}, "hard", name);
        assert_int_equal(symlink(name, "soft"), 0);
        refused(&(tr_batch_options){.input = "soft", .output = "out"}, "soft", name);
        fine(&(tr_batch_options){.input = name, .output = "other"});
        assert_int_equal(unlink(name) | unlink("hard") | unlink("soft"), 0);
    }
    /* What OUT points to counts too. */
    put("in", "x");
    assert_int_equal(symlink("in", "away"), 0);
    refused(&(tr_batch_options){.input = "in", .output = "away"}, "-i in", "away");
    assert_int_equal(unlink("away"), 0);
    fine(&(tr_batch_options){.input = "in", .output = "out"});
    fine(&(tr_batch_options){.input = "in", .output = "no/such/folder"});
    fine(&(tr_batch_options){.input = "missing", .output = "out"});
    fine(&(tr_batch_options){.input = "-", .output = "-"});
    fine(&(tr_batch_options){.input = "in", .output = "-"});
    fine(&(tr_batch_options){.prompt = "x"});
    put("-", "x"); /* a file of this name is not what - means */
    fine(&(tr_batch_options){.input = "-", .output = "-"});
    tr_scratch_clear(folder, 0);
}

static void test_merge(void **state)
{
    char one[] = "one", two[] = "all.tmp", *part[] = {one, two};
    (void)state;
    put("in", "x");
    put("one", "x");
    put("all.tmp", "x");
    tr_batch_options o = {
        .merge = true, .input = "in", .output = "all", .part = part, .n_parts = 1};
    fine(&o);
    o.n_parts = 2;
    refused(&o, "all.tmp", "PART");
    o.n_parts = 1;
    o.input = "all.tmp";
    refused(&o, "all.tmp", "-i");
    o.input = "in";
    o.output = "one";
    refused(&o, "PART one", "-o");
    o.output = "one.run"; /* no job's output: nothing else lies beside it */
    put("one.run.run", "x");
    o.input = "one.run.run";
    fine(&o);
    tr_scratch_clear(folder, 0);
}

static void test_profile(void **state)
{
    tr_batch_options o = {.input = "in", .output = "out", .profile = "p.h5"};
    (void)state;
    put("in", "{}\n");
    fine(&o);
    put("p.h5", "\x89HDF\r\n\x1a\nand more");
    fine(&o);
    put("p.h5", ""); /* of mktemp */
    fine(&o);
    put("p.h5", "\x89HDF");
    refused(&o, "p.h5", "no profile");
    o.profile = "in";
    refused(&o, "-i in", "--profile");
    put("in.part", "x");
    o.input = "in.part";
    refused(&o, "in.part", "--profile");
    o.input = "in";
    o.profile = "out"; /* neither is there yet */
    refused(&o, "--profile out", "-o");
    o.profile = "./out.run";
    refused(&o, "--profile ./out.run", "-o");
    o.profile = "."; /* a folder */
    refused(&o, "--profile .", "no profile");
    o = (tr_batch_options){.prompt = "x", .profile = "in"};
    refused(&o, "--profile in", "no profile");
    tr_scratch_clear(folder, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_input),
        cmocka_unit_test(test_merge),
        cmocka_unit_test(test_profile),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
