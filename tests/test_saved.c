/* OUT.saved: what goes in comes out; what is cut, flipped, of another run or of another request does not; failing writes leave
 * the old file. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/stop.h"
#include "batch/saved.h"
#include "tests/scratch.h"

enum { VOCAB = 1000, FILE_MAX = 1 << 16 };

static char folder[256], out_path[300], saved_path[320], tmp_path[330];
static const tr_run_field fields[] = {{"input", "abc"}, {"seed", "0"}};

/* With a log (NULL: none). */
static tr_saved *opened_with(const char *seed, tr_log *log)
{
    const tr_run_field mine[] = {fields[0], {"seed", seed}};
    const tr_saved_options o = {.out_path = out_path, .field = mine, .n_fields = 2, .log = log};
    tr_saved *s = NULL;
    tr_err err;
    if (tr_saved_open(&s, &o, &err) != TR_OK) fail_msg("%s", err.text);
    return s;
}

static tr_saved *opened(const char *seed)
{
    return opened_with(seed, NULL);
}

static void fill_scores(tr_scores *s, int n, int n_top, int seed)
{
    assert_true(tr_scores_create(s, n, n_top));
    for (int i = 0; i < n; i++) {
        s->logprob[i] = -(float)(i + seed) / 3;
        s->rank[i] = i % 7;
    }
    for (int i = 0; i < n * n_top; i++) {
        s->top_token[i] = i % 5 ? (i * 13 + seed) % VOCAB : -1;
        s->top_logprob[i] = i % 5 ? -(float)i / 7 : -INFINITY;
    }
}

/* Line 1: plain; 2: scores of both kinds and three choices, one of them without a token; 3: nothing but prompt scores. */
static tr_progress *made(uint64_t line, int n_token)
{
    tr_progress *p = tr_progress_create(line == 2 ? 3 : 1);

    assert_non_null(p);
    p->id = line;
    p->n_prompt = 5;
    p->prompt = 77 * line;
    p->key = 99 * line;
    p->max_tokens = 200;
    p->n_logprobs = line == 2 ? 4 : -1;
    p->n_prompt_logprobs = line == 1 ? -1 : (int)line - 2;
    if (line > 1) fill_scores(&p->prompt_scores, 3, p->n_prompt_logprobs, 5);
    for (int c = 0; c < p->n_choices && line < 3; c++) {
        const int n = c == 1 ? 0 : n_token + c;
        p->choice[c].n_token = n;
        p->choice[c].token = n ? calloc((size_t)n, sizeof(int32_t)) : NULL;
        for (int i = 0; i < n; i++)
            p->choice[c].token[i] = (i * 31 + c) % VOCAB;
        if (p->n_logprobs >= 0) fill_scores(&p->choice[c].scores, n, p->n_logprobs, c);
    }
    return p;
}

static void same_scores(const tr_scores *a, const tr_scores *b)
{
    assert_int_equal(a->n, b->n);
    if (!a->n) return;
    assert_int_equal(a->n_top, b->n_top);
    const size_t n = (size_t)a->n * 4, all = n * (size_t)a->n_top;
    assert_memory_equal(a->logprob, b->logprob, n);
    assert_memory_equal(a->rank, b->rank, n);
    if (all) assert_memory_equal(a->top_token, b->top_token, all);
    if (all) assert_memory_equal(a->top_logprob, b->top_logprob, all);
}

/* What is there of a line is what was made of it. */
static void expect(tr_saved *s, uint64_t line, int n_token)
{
    tr_progress *p = tr_saved_find(s, line), *x = made(line, n_token);

    assert_non_null(p);
    assert_true(p->id == x->id && p->prompt == x->prompt && p->key == x->key);
    assert_true(p->n_prompt == x->n_prompt && p->max_tokens == x->max_tokens &&
                p->n_logprobs == x->n_logprobs && p->n_prompt_logprobs == x->n_prompt_logprobs);
    assert_int_equal(p->n_choices, x->n_choices);
    same_scores(&p->prompt_scores, &x->prompt_scores);
    for (int i = 0; i < p->n_choices; i++) {
        assert_int_equal(p->choice[i].n_token, x->choice[i].n_token);
        if (p->choice[i].n_token)
            assert_memory_equal(p->choice[i].token, x->choice[i].token,
                                (size_t)p->choice[i].n_token * 4);
        same_scores(&p->choice[i].scores, &x->choice[i].scores);
    }
    tr_progress_free(p);
    tr_progress_free(x);
}

static void expect_none(tr_saved *s, uint64_t line)
{
    assert_null(tr_saved_find(s, line));
}

static tr_progress *list_of(tr_progress *a, tr_progress *b, tr_progress *c)
{
    a->next = b;
    if (b) b->next = c;
    return a;
}

/* The three lines, by a job that found nothing. */
static void write_three(int n_token)
{
    tr_saved_counts counts;
    tr_progress *list = list_of(made(1, n_token), made(2, n_token), made(3, n_token));
    unlink(saved_path);
    tr_saved *s = opened("0");
    assert_int_equal(tr_saved_count(s), 0);
    assert_true(tr_saved_write(s, list, &counts));
    assert_int_equal(counts.requests, 3);
    assert_int_equal(counts.tokens, n_token + 2 * n_token + 2);
    struct stat sb;
    assert_int_equal(stat(saved_path, &sb), 0);
    assert_int_equal(counts.bytes, sb.st_size);
    assert_int_not_equal(access(tmp_path, F_OK), 0);
    tr_progress_free_list(list);
    tr_saved_close(s);
}

static void test_round(void **state)
{
    (void)state;
    write_three(50);
    tr_saved *s = opened("0");
    assert_int_equal(tr_saved_count(s), 3);
    for (uint64_t line = 1; line <= 3; line++)
        expect(s, line, 50);
    expect_none(s, 4);
    tr_saved_close(s);
    s = opened("1"); /* another run's */
    assert_int_equal(tr_saved_count(s), 0);
    expect_none(s, 1);
    tr_saved_close(s);
}

/* A later saving keeps what nobody has got to yet, and drops what is done. */
static void test_carried(void **state)
{
    tr_saved_counts counts;
    (void)state;
    write_three(50);
    tr_saved *s = opened("0");
    tr_progress *list = made(2, 80);
    tr_saved_done(s, 1);
    tr_saved_done(s, 9);
    assert_true(tr_saved_write(s, list, &counts));
    assert_int_equal(counts.requests, 2);
    assert_int_equal(counts.tokens, 80 + 82);
    tr_progress_free_list(list);
    expect(s, 2, 50); /* what was found stays what it was */
    tr_saved *next = opened("0");
    assert_int_equal(tr_saved_count(next), 2);
    expect_none(next, 1);
    expect(next, 2, 80);
    expect(next, 3, 50);
    tr_saved_close(next);
    /* Line 2 ends, line 3 was never reached: it is carried on again. */
    tr_saved_done(s, 2);
    assert_true(tr_saved_write(s, NULL, &counts));
    assert_int_equal(counts.requests, 1);
    tr_saved_done(s, 3);
    assert_true(tr_saved_write(s, NULL, &counts));
    assert_int_equal(counts.requests, 0);
    assert_int_not_equal(access(saved_path, F_OK), 0);
    tr_saved_close(s);
    write_three(5);
    s = opened("0");
    tr_saved_remove(s);
    assert_int_not_equal(access(saved_path, F_OK), 0);
    tr_saved_remove(s);
    tr_saved_close(s);
}

static size_t contents(unsigned char *to)
{
    FILE *f = fopen(saved_path, "rb");
    assert_non_null(f);
    const size_t n = fread(to, 1, FILE_MAX, f);
    assert_true(n > 0 && n < FILE_MAX);
    fclose(f);
    return n;
}

/* Every line that is still given out is as it was made. How many are. */
static size_t survivors(void)
{
    tr_saved *s = opened("0");
    size_t n = 0;

    for (uint64_t line = 0; line <= 5; line++) {
        tr_progress *p = tr_saved_find(s, line);
        if (!p) continue;
        tr_progress_free(p);
        assert_in_range(line, 1, 3);
        expect(s, line, 9);
        n++;
    }
    assert_int_equal(n, tr_saved_count(s));
    tr_saved_close(s);
    return n;
}

/* Cut at every byte, every bit of every byte flipped, bytes behind the end. */
static void test_damaged(void **state)
{
    static unsigned char whole[FILE_MAX], now[FILE_MAX + 8];
    size_t seen[4] = {0};
    (void)state;
    write_three(9);
    const size_t n = contents(whole);
    for (size_t cut = 0; cut < n; cut++) {
        assert_int_equal(tr_scratch_write(folder, "out.saved", whole, cut), 0);
        seen[survivors()]++;
    }
    assert_true(seen[3] == 0 && seen[0] > 88 && seen[1] > 100 && seen[2] > 50);
    for (size_t i = 0; i < 8 * n; i += i < 8 * 300 ? 1 : 5) {
        memcpy(now, whole, n);
        now[i / 8] ^= (unsigned char)(1 << i % 8);
        assert_int_equal(tr_scratch_write(folder, "out.saved", now, n), 0);
        assert_in_range(survivors(), 0, 2);
    }
    memcpy(now, whole, n);
    memset(now + n, 7, 8);
    assert_int_equal(tr_scratch_write(folder, "out.saved", now, n + 8), 0);
    assert_int_equal(survivors(), 3);
    /* What is no file is left alone. */
    unlink(saved_path);
    assert_int_equal(mkdir(saved_path, 0700), 0);
    tr_saved *s = opened("0");
    assert_int_equal(tr_saved_count(s), 0);
    tr_saved_close(s);
    assert_int_equal(rmdir(saved_path), 0);
    assert_int_equal(symlink("/dev/zero", saved_path), 0);
    s = opened("0");
    assert_int_equal(tr_saved_count(s), 0);
    tr_saved_close(s);
    unlink(saved_path);
}

/* Every descriptor of this process that reads OUT.saved is exchanged for one that cannot be read. How many there were. */
static int break_reading(void)
{
    char path[320], name[512];
    DIR *d = opendir("/proc/self/fd");
    const int bad = open("/dev/null", O_WRONLY | O_CLOEXEC);
    int n = 0;

    if (!d || bad < 0) return 0;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        snprintf(path, sizeof path, "/proc/self/fd/%s", e->d_name);
        const ssize_t got = readlink(path, name, sizeof name - 1);
        if (got <= 0) continue;
        name[got] = 0;
        if (strcmp(name, saved_path) == 0 && dup2(bad, atoi(e->d_name)) >= 0) n++;
    }
    closedir(d);
    close(bad);
    return n;
}

/* A file that cannot be read any more: the reason is said, with the file and the line; what runs is saved all the same. */
static void test_unreadable(void **state)
{
    char *said = NULL, *real = realpath(folder, NULL);
    size_t n_said = 0;
    FILE *to = open_memstream(&said, &n_said);
    tr_log *log = to ? tr_log_create(to, false, false) : NULL;
    tr_saved_counts counts;
    (void)state;

    assert_true(log && real);
    if (strcmp(real, folder) != 0 || access("/proc/self/fd", R_OK) != 0) {
        print_message("skipped: no /proc, or a scratch folder behind a link\n");
        goto done;
    }
    write_three(20);
    tr_saved *s = opened_with("0", log);
    assert_int_equal(tr_saved_count(s), 3);
    assert_int_equal(break_reading(), 1);
    expect_none(s, 2);
    fflush(to);
    assert_non_null(strstr(said, saved_path));
    assert_non_null(strstr(said, "line 2: Bad file descriptor: its request starts over"));
    tr_progress *list = list_of(made(1, 30), NULL, NULL);
    for (int i = 0; i < 2; i++) {
        assert_true(tr_saved_write(s, list, &counts));
        assert_int_equal(counts.requests, 1);
        assert_int_equal(counts.tokens, 30);
    }
    fflush(to);
    const char *first = strstr(said, "line 3: Bad file descriptor: it is saved no longer");
    assert_non_null(first);
    assert_null(strstr(first + 1, "line 3:")); /* once is enough */
    assert_null(strstr(said, "memory"));
    tr_progress_free_list(list);
    tr_saved_close(s);
    s = opened("0");
    assert_int_equal(tr_saved_count(s), 1);
    expect(s, 1, 30);
    tr_saved_close(s);
done:
    tr_log_free(log);
    fclose(to);
    free(said);
    free(real);
}

/* The disk is full at every byte: the old file stays whole, and nothing lies beside it. */
static void test_full_disk(void **state)
{
    static unsigned char before[FILE_MAX], after[FILE_MAX];
    struct rlimit old;
    (void)state;
    write_three(9);
    const size_t n = contents(before);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    for (size_t room = 0; room < n + 400; room += 37) {
        tr_saved *s = opened("0");
        tr_progress *list = list_of(made(1, 20), made(4, 9), NULL);
        tr_saved_counts counts;
        struct rlimit limit = {.rlim_cur = room, .rlim_max = old.rlim_max};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        const bool written = tr_saved_write(s, list, &counts);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        assert_int_equal(written, counts.requests > 0);
        assert_int_not_equal(access(tmp_path, F_OK), 0);
        if (!written) {
            assert_int_equal(contents(after), n);
            assert_memory_equal(before, after, n);
        }
        tr_progress_free_list(list);
        tr_saved_close(s);
        if (written) break;
        assert_true(room < n + 350);
    }
}

/* What is whole and of this run may still be another request's, or hold numbers that no request has. */
static void test_fits(void **state)
{
    tr_request r = {.id = 2, .n_prompt = 5};
    int32_t prompt[5] = {1, 2, 3, 4, 5};
    (void)state;
    r.prompt = prompt;
    r.params = (tr_params){
        .n = 3, .key = 99 * 2, .max_tokens = 200, .n_logprobs = 4, .n_prompt_logprobs = 0};
    for (int wrong = 0; wrong <= 20; wrong++) {
        tr_progress *p = made(2, 50);
        p->prompt = tr_progress_prompt_hash(prompt, 5);
        tr_progress_choice *c = &p->choice[2];
        switch (wrong) {
        case 1:
            p->prompt++;
            break;
        case 2:
            p->key++;
            break;
        case 3:
            p->n_prompt = 4;
            break;
        case 4:
            p->n_prompt = -1;
            break;
        case 5:
            p->max_tokens = 201;
            break;
        case 6:
            p->n_logprobs = 5;
            break;
        case 7:
            p->n_prompt_logprobs = 1;
            break;
        case 8:
            r.params.n = 2;
            break;
        case 9:
            c->token[7] = -1;
            break;
        case 10:
            c->token[7] = VOCAB;
            break;
        case 11:
            c->scores.n--;
            break;
        case 12:
            c->scores.n_top = 3;
            break;
        case 13:
            c->scores.logprob[3] = NAN;
            break;
        case 14:
            c->scores.top_logprob[3] = NAN;
            break;
        case 15:
            c->scores.top_token[3] = VOCAB;
            break;
        case 16:
            c->scores.top_token[3] = -2;
            break;
        case 17:
            c->scores.rank[3] = -1;
            break;
        case 18:
            p->prompt_scores.rank[1] = VOCAB + 1;
            break;
        case 19:
            r.params.max_tokens = p->max_tokens = 51;
            break; /* choice 2 has 52 */
        case 20:
            prompt[2] = 9;
            break;
        default:
            break;
        }
        if (tr_progress_fits(p, &r, VOCAB) != (wrong == 0)) fail_msg("case %d", wrong);
        r.params.n = 3;
        r.params.max_tokens = 200;
        tr_progress_free(p);
    }
}

static int make_folder(void **state)
{
    tr_err err;
    (void)state;
    if (!tr_scratch_make(folder, sizeof folder)) return -1;
    snprintf(out_path, sizeof out_path, "%s/out", folder);
    snprintf(saved_path, sizeof saved_path, "%s.saved", out_path);
    snprintf(tmp_path, sizeof tmp_path, "%s.tmp", saved_path);
    return tr_stop_install(&err) == TR_OK ? 0 : -1; /* SIGXFSZ becomes errno */
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
        cmocka_unit_test(test_round),   cmocka_unit_test(test_carried),
        cmocka_unit_test(test_damaged), cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_fits),    cmocka_unit_test(test_unreadable),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
