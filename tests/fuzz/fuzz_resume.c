/* The bytes of OUT, resumed. A plain reader of lines says what must count: whole lines that are records of this input, each
 * request's first. The journal finds exactly these, OUT then holds exactly these, and a second resume changes nothing. */
#include <config.h>

#include <sys/stat.h>
#include <unistd.h>

#include "base/json.h"
#include "batch/journal.h"
#include "batch/record.h"
#include "tests/fuzz/fuzz.h"
#include "tests/scratch.h"

#define HASH "0123456789abcdef0123456789abcdef"

enum { FILE_MAX = 16 << 20 };

static char folder[256], out_path[300], tmp_path[320]; /* made once */
static const tr_run_field fields[] = {{"input", HASH}};

static tr_journal_options options(void)
{
    return (tr_journal_options){.run = {.out_path = out_path, .field = fields, .n_fields = 1},
                                .input_hash = HASH,
                                .retry_ms = 1};
}

static tr_journal *opened(void)
{
    const tr_journal_options o = options();
    tr_journal *j = NULL;
    tr_err err = {0};
    FUZZ_CHECK(tr_journal_open(&j, &o, &err) == TR_OK, "%s", err.text);
    return j;
}

static void closed(tr_journal *j)
{
    tr_err err = {0};
    FUZZ_CHECK(tr_journal_close(j, &err) == TR_OK, "%s", err.text);
}

static void clean(void)
{
    tr_scratch_clear(folder, 1);
}

static void make_folder(void)
{
    if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    if (!tr_scratch_make(folder, sizeof folder)) abort();
    snprintf(out_path, sizeof out_path, "%s/out", folder);
    snprintf(tmp_path, sizeof tmp_path, "%s/out.tmp", folder);
    closed(opened()); /* OUT.run: the run has begun */
    atexit(clean);
}

/* What must stay of the n bytes, to `kept`; its keys to `set`. */
static void wanted(const char *text, size_t n, tr_buf *kept, tr_idset *set)
{
    tr_buf id = {0};
    tr_record_name name;

    while (n) {
        const char *nl = memchr(text, '\n', n);
        if (!nl) break;
        size_t line = (size_t)(nl - text);
        int is = tr_record_read(text, line, HASH, &id, &name);
        FUZZ_CHECK(is >= 0, "out of memory");
        if (is) {
            tr_key key =
                name.custom_id ? tr_key_id(name.custom_id, name.n) : tr_key_line(name.line);
            if (tr_idset_add(set, key, 1, NULL) == 1) tr_buf_add(kept, text, line + 1);
        }
        text += line + 1;
        n -= line + 1;
    }
    free(id.s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tr_buf kept = {0}, id = {0};
    tr_record_name name;
    tr_err err = {0};

    if (!folder[0]) make_folder();
    tr_idset *set = tr_idset_create();
    char *text = fuzz_copy(data, n), *now;
    size_t n_now;
    if (!set || tr_scratch_write(folder, "out", text, n) != 0) abort();
    wanted(text, n, &kept, set);
    FUZZ_CHECK(!kept.failed, "out of memory");

    /* The second resume is left out where the first had nothing to change: it would see what the first saw. */
    for (int again = 0; again < 1 + (kept.n != n); again++) {
        tr_journal *j = opened();
        FUZZ_CHECK(tr_journal_found(j) == tr_idset_count(set), "%zu found, not %zu",
                   tr_journal_found(j), tr_idset_count(set));
        for (const char *s = kept.s, *end = s ? s + kept.n : s; s < end;) {
            size_t line = (size_t)((const char *)memchr(s, '\n', (size_t)(end - s)) - s);
            if (tr_record_read(s, line, HASH, &id, &name) != 1) abort();
            FUZZ_CHECK(tr_journal_has(j, name.custom_id ? tr_key_id(name.custom_id, name.n)
                                                        : tr_key_line(name.line)),
                       "not found: %.*s", (int)line, s);
            s += line + 1;
        }
        FUZZ_CHECK(!tr_journal_has(j, tr_key_line(UINT64_MAX)), "a line that nobody has");
        closed(j);
        FUZZ_CHECK(tr_file_read(out_path, FILE_MAX, &now, &n_now, &err) == TR_OK, "%s", err.text);
        FUZZ_CHECK(n_now == kept.n && (!n_now || !memcmp(now, kept.s, n_now)), "OUT is: %s", now);
        FUZZ_CHECK(access(tmp_path, F_OK) != 0, "OUT.tmp was left behind");
        free(now);
    }
    tr_idset_free(set);
    free(text);
    free(kept.s);
    free(id.s);
    return 0;
}
