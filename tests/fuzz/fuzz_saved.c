/* The bytes of OUT.saved. Whatever is taken from it can be read again, is within bounds, and survives being written by the next
 * job; a file that was damaged anywhere gives nothing that was not in it. The first byte says how the input becomes a file: as
 * it is, or behind a head and with hashes that are right, so that what is behind them is reached; and whether the next job saves
 * also where nothing was taken, which is the same every time. */
#include <config.h>

#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"
#include "batch/saved.h"
#include "tests/fuzz/fuzz.h"
#include "tests/scratch.h"

enum { HEAD = 88, ENTRY = 88, LINE_AT = 40, FILE_MAX = 1 << 20, VOCAB = 500, LINES_MAX = 256 };

static char folder[256], out_path[300], saved_path[320]; /* made once */
static const tr_run_field fields[] = {{"input", "x"}};
static char run_hash[33];

static void clean(void)
{
    tr_scratch_clear(folder, 1);
}

static tr_saved *opened(void)
{
    const tr_saved_options o = {.out_path = out_path, .field = fields, .n_fields = 1};
    tr_saved *s = NULL;
    tr_err err = {0};
    FUZZ_CHECK(tr_saved_open(&s, &o, &err) == TR_OK, "%s", err.text);
    return s;
}

static void make_folder(void)
{
    if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    if (!tr_scratch_make(folder, sizeof folder)) abort();
    snprintf(out_path, sizeof out_path, "%s/out", folder);
    snprintf(saved_path, sizeof saved_path, "%s.saved", out_path);
    tr_hasher *h = tr_hasher_create();
    if (!h) abort();
    tr_hasher_add(h, "input", 6);
    tr_hasher_add(h, "x", 2);
    tr_hasher_hex(h, run_hash);
    tr_hasher_free(h);
    atexit(clean);
}

static void put_u64(char *to, uint64_t x)
{
    memcpy(to, &x, sizeof x);
}

/* Hash of [at, at + n) to the 32 bytes at `to`. */
static void put_hash(char *to, const char *at, size_t n)
{
    char hex[33];
    tr_hash128_hex(at, n, 0, hex);
    memcpy(to, hex, 32);
}

/* The input's pieces, each behind a length byte times 4, as entries with a good length and hash. */
static size_t dress(char *file, const uint8_t *data, size_t n)
{
    size_t at = HEAD;
    uint64_t n_entries = 0;

    while (n > 1 && at < FILE_MAX / 2) {
        size_t words = *data++, bytes = 4 * words;
        n--;
        if (bytes > n) bytes = n / 4 * 4;
        char *e = file + at;
        memset(e, 0, ENTRY);
        memcpy(e + LINE_AT, data, bytes < ENTRY - LINE_AT ? bytes : ENTRY - LINE_AT);
        size_t rest = bytes < ENTRY - LINE_AT ? 0 : bytes - (ENTRY - LINE_AT);
        if (rest) memcpy(e + ENTRY, data + bytes - rest, rest);
        put_u64(e, ENTRY + rest);
        put_hash(e + 8, e + LINE_AT, ENTRY - LINE_AT + rest);
        at += ENTRY + rest;
        data += bytes;
        n -= bytes;
        n_entries++;
    }
    put_u64(file, UINT64_C(0x3144455641535254));
    memcpy(file + 40, run_hash, 32);
    put_u64(file + 72, n_entries);
    put_u64(file + 80, at);
    put_hash(file + 8, file + 40, HEAD - 40);
    return at;
}

/* Every number of it is read; the sanitizers see whether it is there. */
static uint64_t touch(const tr_progress *p)
{
    uint64_t sum = 0;
    for (int i = -1; i < p->n_choices; i++) {
        const tr_scores *s = i < 0 ? &p->prompt_scores : &p->choice[i].scores;
        for (int k = 0; k < s->n; k++)
            sum += (uint64_t)s->rank[k] + (s->logprob[k] < 0);
        for (int k = 0; k < s->n * s->n_top; k++)
            sum += (uint64_t)s->top_token[k] + (s->top_logprob[k] < 0);
        for (int k = 0; i >= 0 && k < p->choice[i].n_token; k++)
            sum += (uint64_t)p->choice[i].token[k];
    }
    return sum;
}

/* A request like it may go on with it only when every number is in range. */
static void offer(tr_progress *p)
{
    int32_t prompt[64] = {0};
    tr_request r = {.id = p->id, .prompt = prompt, .n_prompt = (size_t)(uint32_t)p->n_prompt % 64};
    r.params = (tr_params){.n = p->n_choices,
                           .key = p->key,
                           .max_tokens = p->max_tokens,
                           .n_logprobs = p->n_logprobs,
                           .n_prompt_logprobs = p->n_prompt_logprobs};
    p->prompt = tr_progress_prompt_hash(prompt, r.n_prompt);
    if (!tr_progress_fits(p, &r, VOCAB)) return;
    for (int i = 0; i < p->n_choices; i++) {
        FUZZ_CHECK(p->choice[i].n_token <= r.params.max_tokens, "%d tokens", p->choice[i].n_token);
        for (int k = 0; k < p->choice[i].n_token; k++)
            FUZZ_CHECK(p->choice[i].token[k] >= 0 && p->choice[i].token[k] < VOCAB, "token %d",
                       p->choice[i].token[k]);
    }
}

static size_t n_found(tr_saved *s, const uint64_t *line, size_t n, uint64_t *sum)
{
    size_t found = 0;
    *sum = 0;
    for (size_t i = 0; i < n; i++) {
        tr_progress *p = tr_saved_find(s, line[i]);
        if (!p) continue;
        FUZZ_CHECK(p->id == line[i], "line %ju", (uintmax_t)p->id);
        *sum += touch(p);
        offer(p);
        tr_progress_free(p);
        found++;
    }
    return found;
}

static bool is_among(uint64_t x, const uint64_t *line, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (line[i] == x) return true;
    return false;
}

/* The lines that its entries can name, each once: an entry begins where the one before it ends, whatever its hash says. */
static size_t list_lines(const char *file, size_t size, uint64_t line[LINES_MAX])
{
    uint64_t bytes = HEAD, x;
    size_t n = 0;

    for (size_t at = 0; n < LINES_MAX && bytes <= size - at;) {
        at += (size_t)bytes;
        if (size - at < ENTRY) break;
        memcpy(&bytes, file + at, sizeof bytes);
        if (bytes < ENTRY) break;
        memcpy(&x, file + at + LINE_AT, sizeof x);
        if (!is_among(x, line, n)) line[n++] = x;
    }
    return n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static char file[FILE_MAX];
    uint64_t line[LINES_MAX] = {0}, sum, again;
    size_t size = n;
    tr_saved_counts counts;

    if (!folder[0]) make_folder();
    const uint8_t way = fuzz_take_byte(&data, &n);
    const bool as_it_is = way & 1, saves_nothing = !(way & 14);
    if (n > FILE_MAX / 2) return 0;
    if (as_it_is) {
        memcpy(file, data, n);
        size = n;
    } else {
        size = dress(file, data, n);
    }
    if (tr_scratch_write(folder, "out.saved", file, size) != 0) abort();
    const size_t n_lines = list_lines(file, size, line);
    tr_saved *s = opened();
    const size_t found = n_found(s, line, n_lines, &sum);
    uint64_t absent = 0;
    while (is_among(absent, line, n_lines))
        absent++;
    FUZZ_CHECK(n_lines == LINES_MAX || !tr_saved_find(s, absent), "line %ju", (uintmax_t)absent);
    FUZZ_CHECK(found <= tr_saved_count(s), "%zu found, %zu there", found, tr_saved_count(s));
    FUZZ_CHECK(n_lines == LINES_MAX || found == tr_saved_count(s), "%zu found, %zu there", found,
               tr_saved_count(s));
    if (!tr_saved_count(s) && !saves_nothing) {
        tr_saved_close(s);
        return 0;
    }
    FUZZ_CHECK(tr_saved_write(s, NULL, &counts), "the next job could not save");
    FUZZ_CHECK(counts.requests == tr_saved_count(s), "%ju kept", (uintmax_t)counts.requests);
    tr_saved_close(s);
    s = opened();
    FUZZ_CHECK(tr_saved_count(s) == counts.requests, "%zu of %ju", tr_saved_count(s),
               (uintmax_t)counts.requests);
    FUZZ_CHECK(n_found(s, line, n_lines, &again) == found && sum == again, "something else");
    for (size_t i = 0; i < n_lines; i++)
        tr_saved_done(s, line[i]);
    if (found == tr_saved_count(s)) {
        FUZZ_CHECK(tr_saved_write(s, NULL, &counts) && !counts.requests, "something is left");
        FUZZ_CHECK(access(saved_path, F_OK) != 0, "the file is left");
    }
    tr_saved_close(s);
    return 0;
}
