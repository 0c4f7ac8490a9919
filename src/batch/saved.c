#include <config.h>

#include "batch/saved.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/size.h"
#include "batch/idset.h"

/* The file: a head, then entries one behind the other. Everything is in words of 4 bytes, in this machine's order (a file of
 * the other order has another magic number). hash: of what lies behind it in the head or entry. */
#define MAGIC UINT64_C(0x3144455641535254) /* "TRSAVED1" */

typedef struct head {
    uint64_t magic;
    char hash[32];
    char run[32];              /* hash of OUT.run's fields */
    uint64_t n_entries, bytes; /* of the whole file */
} head;

typedef struct entry {
    uint64_t bytes; /* of the whole entry */
    char hash[32];
    uint64_t line, prompt, key;
    int32_t n_prompt, max_tokens, n_logprobs, n_prompt_logprobs, n_choices, n_prompt_scores;
    /* the prompt's scores, then of each choice: n_token, tokens, scores where n_logprobs >= 0.
     * Scores of n: logprob [n], rank [n], top_token [n, n_top], top_logprob [n, n_top]. */
} entry;

enum { WORD = 4, PIECE = 1 << 16, TOP_MAX = 64, CHOICES_MAX = 1 << 16 };

typedef struct place { /* of an entry of the file as it was opened */
    uint64_t line, offset, bytes;
    int64_t n_tokens; /* generated */
    atomic_bool done;
    bool left_out; /* the writer's: it could not be read when it was to be carried over */
} place;

struct tr_saved {
    char *path, *tmp_path, *out_path;
    char run[33];
    tr_log *log;
    int fd; /* of the file as it was opened; -1: none */
    place *place;
    size_t n_places;
    tr_idset *by_line;
};

/* ---- reading ------------------------------------------------------------------------------------ */

/* Of what is read: 0 good, an errno, or what no errno is: the file ends there, or it is not what was written. */
enum { DAMAGED = -1 };

static const char *why_text(int why)
{
    return why == DAMAGED ? "it is damaged" : strerror(why);
}

static int read_at(int fd, void *to, size_t n, uint64_t at)
{
    char *p = to;

    while (n) {
        ssize_t got = pread(fd, p, n, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 ? errno : DAMAGED;
        p += got;
        n -= (size_t)got;
        at += (uint64_t)got;
    }
    return 0;
}

/* The hash of bytes [from, from + n), whose first `known` are in memory already. */
static int check_hash(int fd, const char hash[32], const void *first, size_t known, uint64_t from,
                      uint64_t n)
{
    tr_hasher *h = tr_hasher_create();
    char *piece = malloc(PIECE), hex[33];
    int why = h && piece ? 0 : ENOMEM;

    if (!why) tr_hasher_add(h, first, known);
    for (uint64_t done = known; !why && done < n;) {
        size_t some = n - done < PIECE ? (size_t)(n - done) : PIECE;
        why = read_at(fd, piece, some, from + done);
        if (!why) tr_hasher_add(h, piece, some);
        done += some;
    }
    if (!why) {
        tr_hasher_hex(h, hex);
        if (memcmp(hex, hash, 32) != 0) why = DAMAGED;
    }
    free(piece);
    tr_hasher_free(h);
    return why;
}

typedef struct words { /* of an entry, not read yet */
    const char *at;
    size_t n;
    bool no_memory; /* for what they say */
} words;

static bool take(words *w, void *to, size_t n)
{
    if (n > w->n) return false;
    if (n) memcpy(to, w->at, n * WORD);
    w->at += n * WORD;
    w->n -= n;
    return true;
}

/* Room for the scores only when as many words are there. */
static bool take_scores(words *w, tr_scores *s, int n, int n_top)
{
    size_t all;

    if (n < 0 || n_top < 0 || n_top > TOP_MAX || !tr_mul(&all, (size_t)n, (size_t)n_top * 2 + 2))
        return false;
    if (all > w->n) return false;
    w->no_memory = !tr_scores_create(s, n, n_top);
    if (w->no_memory) return false;
    all = (size_t)n * (size_t)n_top;
    return take(w, s->logprob, (size_t)n) && take(w, s->rank, (size_t)n) &&
           take(w, s->top_token, all) && take(w, s->top_logprob, all);
}

static bool take_choice(words *w, tr_progress_choice *c, const entry *e)
{
    int32_t n;

    if (!take(w, &n, 1) || n < 0 || (size_t)n > w->n) return false;
    w->no_memory = n && !(c->token = tr_calloc((size_t)n, sizeof *c->token));
    if (w->no_memory) return false;
    c->n_token = n;
    return take(w, c->token, (size_t)n) &&
           (e->n_logprobs < 0 || take_scores(w, &c->scores, n, e->n_logprobs));
}

/* NULL: *why. A choice has one word at least: no memory is asked for by a number of them that the entry cannot hold. */
static tr_progress *parse(const entry *e, words w, int *why)
{
    tr_progress *p = NULL;

    *why = DAMAGED;
    if (e->n_choices < 1 || e->n_choices > CHOICES_MAX || (size_t)e->n_choices > w.n) return NULL;
    p = tr_progress_create(e->n_choices);
    if (!p) {
        *why = ENOMEM;
        return NULL;
    }
    p->id = e->line;
    p->prompt = e->prompt;
    p->key = e->key;
    p->n_prompt = e->n_prompt;
    p->max_tokens = e->max_tokens;
    p->n_logprobs = e->n_logprobs;
    p->n_prompt_logprobs = e->n_prompt_logprobs;
    bool ok = !e->n_prompt_scores ||
              take_scores(&w, &p->prompt_scores, e->n_prompt_scores, e->n_prompt_logprobs);
    for (int i = 0; i < p->n_choices && ok; i++)
        ok = take_choice(&w, &p->choice[i], e);
    if (ok && !w.n) return p;
    if (w.no_memory) *why = ENOMEM;
    tr_progress_free(p);
    return NULL;
}

/* The bytes of an entry whose length is known to lie in the file, whole: the caller's. NULL: *why. */
static char *read_bytes(const tr_saved *s, uint64_t offset, uint64_t bytes, int *why)
{
    const size_t skip = offsetof(entry, line);
    char *text = bytes <= SIZE_MAX ? malloc((size_t)bytes) : NULL;
    char hex[33];
    entry e;

    *why = text ? read_at(s->fd, text, (size_t)bytes, offset) : ENOMEM;
    if (!*why) {
        memcpy(&e, text, sizeof e);
        tr_hash128_hex(text + skip, (size_t)bytes - skip, 0, hex);
        if (e.bytes != bytes || memcmp(hex, e.hash, 32) != 0) *why = DAMAGED;
    }
    if (!*why) return text;
    free(text);
    return NULL;
}

static tr_progress *read_entry(const tr_saved *s, uint64_t offset, uint64_t bytes, int *why)
{
    char *text = read_bytes(s, offset, bytes, why);
    tr_progress *p = NULL;
    entry e;

    if (!text) return NULL;
    memcpy(&e, text, sizeof e);
    p = parse(&e, (words){.at = text + sizeof e, .n = ((size_t)bytes - sizeof e) / WORD}, why);
    free(text);
    return p;
}

static int64_t count_tokens(const tr_progress *p)
{
    int64_t n = 0;
    for (int i = 0; i < p->n_choices; i++)
        n += p->choice[i].n_token;
    return n;
}

/* One more place, or why there is none. *bytes 0: where the next one begins is not known either. */
static int index_entry(tr_saved *s, uint64_t offset, uint64_t left, uint64_t *bytes)
{
    const size_t skip = offsetof(entry, line);
    entry e;
    int why;

    *bytes = 0;
    if (left < sizeof e) return DAMAGED;
    why = read_at(s->fd, &e, sizeof e, offset);
    if (why) return why;
    if (e.bytes < sizeof e || e.bytes > left || e.bytes % WORD) return DAMAGED;
    *bytes = e.bytes;
    /* First the hash, in pieces: no memory is asked for by a length that nothing vouches for. */
    why = check_hash(s->fd, e.hash, (const char *)&e + skip, sizeof e - skip, offset + skip,
                     e.bytes - skip);
    if (why) return why;
    tr_progress *p = read_entry(s, offset, e.bytes, &why);
    if (!p) return why;
    const int added = tr_idset_add(s->by_line, tr_key_line(e.line), s->n_places, NULL);
    if (added == 1) {
        place *at = &s->place[s->n_places++];
        at->line = e.line;
        at->offset = offset;
        at->bytes = e.bytes;
        at->n_tokens = count_tokens(p);
    }
    tr_progress_free(p);
    return added == 1 ? 0 : added < 0 ? ENOMEM : DAMAGED;
}

/* What is there, can be read, and is whole. */
static void read_file(tr_saved *s, uint64_t size)
{
    const size_t skip = offsetof(head, run);
    uint64_t at = sizeof(head), bytes, n_bad = 0;
    char hex[33];
    head h;
    int why = size < sizeof h ? DAMAGED : read_at(s->fd, &h, sizeof h, 0), first = 0;

    if (why > 0) {
        tr_log_warn(s->log, "%s: cannot be read: %s; the requests in it start over", s->path,
                    strerror(why));
        return;
    }
    if (why || h.magic != MAGIC) {
        tr_log_warn(s->log, "%s is not what a job has saved, and is ignored", s->path);
        return;
    }
    tr_hash128_hex((const char *)&h + skip, sizeof h - skip, 0, hex);
    if (memcmp(hex, h.hash, 32) != 0) {
        tr_log_warn(s->log, "%s is damaged, and is ignored", s->path);
        return;
    }
    if (memcmp(h.run, s->run, 32) != 0) {
        tr_log_warn(s->log, "%s belongs to another run, and is ignored", s->path);
        return;
    }
    /* An entry has its own head at least, so a number that no file of this size holds asks for no memory. */
    if (h.n_entries > (size - sizeof h) / sizeof(entry))
        h.n_entries = (size - sizeof h) / sizeof(entry);
    s->place = tr_calloc((size_t)h.n_entries, sizeof *s->place);
    if (!s->place) {
        tr_log_warn(s->log, "%s: no memory for what it holds; it is ignored", s->path);
        return;
    }
    for (uint64_t i = 0; i < h.n_entries; i++, at += bytes) {
        why = index_entry(s, at, size - at, &bytes);
        if (!why) continue;
        if (first <= 0) first = why; /* what the system says tells more */
        n_bad += bytes ? 1 : h.n_entries - i;
        if (!bytes) break;
    }
    if (first > 0)
        tr_log_warn(
            s->log, "%s: reading it: %s: of %llu requests it gives %zu; the others start over",
            s->path, strerror(first), (unsigned long long)(s->n_places + n_bad), s->n_places);
    else if (n_bad || size != h.bytes)
        tr_log_warn(s->log, "%s is damaged: of %llu requests it has %zu; the others start over",
                    s->path, (unsigned long long)(s->n_places + n_bad), s->n_places);
}

static void hash_fields(const tr_saved_options *o, char hex[33], tr_status *st, tr_err *err)
{
    tr_hasher *h = tr_hasher_create();

    if (!h) {
        *st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", o->out_path);
        return;
    }
    for (int i = 0; i < o->n_fields; i++) {
        tr_hasher_add(h, o->field[i].name, strlen(o->field[i].name) + 1);
        tr_hasher_add(h, o->field[i].value, strlen(o->field[i].value) + 1);
    }
    tr_hasher_hex(h, hex);
    tr_hasher_free(h);
}

tr_status tr_saved_open(tr_saved **out, const tr_saved_options *o, tr_err *err)
{
    tr_status st = TR_OK;
    struct stat sb;
    tr_saved *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", o->out_path);
    s->fd = -1;
    s->log = o->log;
    s->by_line = tr_idset_create();
    if (asprintf(&s->path, "%s.saved", o->out_path) < 0) s->path = NULL;
    if (asprintf(&s->tmp_path, "%s.saved.tmp", o->out_path) < 0) s->tmp_path = NULL;
    hash_fields(o, s->run, &st, err);
    s->out_path = strdup(o->out_path);
    if (!s->by_line || !s->path || !s->tmp_path || !s->out_path)
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", o->out_path);
    if (st != TR_OK) {
        tr_saved_close(s);
        return st;
    }
    unlink(s->tmp_path); /* of a job that was killed while it saved */
    s->fd = open(s->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (s->fd < 0 && errno != ENOENT)
        tr_log_warn(s->log, "%s: cannot be read: %s; the requests in it start over", s->path,
                    strerror(errno));
    if (s->fd >= 0) {
        if (fstat(s->fd, &sb) != 0)
            tr_log_warn(s->log, "%s: cannot be read: %s; the requests in it start over", s->path,
                        strerror(errno));
        else if (S_ISREG(sb.st_mode))
            read_file(s, (uint64_t)sb.st_size);
        else
            tr_log_warn(s->log, "%s is not a file; it is ignored", s->path);
    }
    *out = s;
    return TR_OK;
}

void tr_saved_close(tr_saved *s)
{
    if (!s) return;
    if (s->fd >= 0) close(s->fd);
    tr_idset_free(s->by_line);
    free(s->place);
    free(s->path);
    free(s->tmp_path);
    free(s->out_path);
    free(s);
}

size_t tr_saved_count(const tr_saved *s)
{
    return s->n_places;
}

static place *find_place(tr_saved *s, uint64_t line)
{
    uint64_t i;
    return tr_idset_find(s->by_line, tr_key_line(line), &i) ? &s->place[i] : NULL;
}

tr_progress *tr_saved_find(tr_saved *s, uint64_t line)
{
    const place *at = find_place(s, line);
    int why;

    if (!at) return NULL;
    tr_progress *p = read_entry(s, at->offset, at->bytes, &why);
    if (!p)
        tr_log_warn(s->log, "%s: what it has of line %ju: %s: its request starts over", s->path,
                    (uintmax_t)line, why_text(why));
    return p;
}

void tr_saved_done(tr_saved *s, uint64_t line)
{
    place *at = find_place(s, line);
    if (at) atomic_store(&at->done, true);
}

/* ---- writing ------------------------------------------------------------------------------------ */

typedef struct output {
    int fd;
    char *text; /* [PIECE] not written yet */
    size_t n;
    uint64_t bytes;
    int why; /* errno of the first failure */
} output;

static void flush(output *o)
{
    for (size_t done = 0; done < o->n && !o->why;) {
        ssize_t put = write(o->fd, o->text + done, o->n - done);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) o->why = put < 0 ? errno : ENOSPC;
        if (put > 0) done += (size_t)put;
    }
    o->bytes += o->n;
    o->n = 0;
}

static void put(output *o, const void *from, size_t n)
{
    const char *p = from;

    while (n && !o->why) {
        size_t some = PIECE - o->n < n ? PIECE - o->n : n;
        memcpy(o->text + o->n, p, some);
        o->n += some;
        p += some;
        n -= some;
        if (o->n == PIECE) flush(o);
    }
}

/* The arrays of an entry in order, to whoever wants them: the hash first, then the file. */
typedef struct sink {
    tr_hasher *hasher;
    output *out;
    uint64_t bytes;
} sink;

static void give(sink *to, const void *from, size_t n)
{
    if (to->hasher && n) tr_hasher_add(to->hasher, from, n);
    if (to->out) put(to->out, from, n);
    to->bytes += n;
}

static void give_scores(sink *to, const tr_scores *s)
{
    const size_t n = (size_t)s->n * WORD, all = n * (size_t)s->n_top;

    if (!s->n) return;
    give(to, s->logprob, n);
    give(to, s->rank, n);
    give(to, s->top_token, all);
    give(to, s->top_logprob, all);
}

static void give_progress(sink *to, const entry *e, const tr_progress *p)
{
    const size_t skip = offsetof(entry, line);

    give(to, (const char *)e + skip, sizeof *e - skip);
    give_scores(to, &p->prompt_scores);
    for (int i = 0; i < p->n_choices; i++) {
        const tr_progress_choice *c = &p->choice[i];
        const int32_t n = c->n_token;
        give(to, &n, sizeof n);
        give(to, c->token, (size_t)n * WORD);
        give_scores(to, &c->scores);
    }
}

static bool put_progress(output *o, const tr_progress *p)
{
    const size_t skip = offsetof(entry, line);
    entry e;
    char hex[33];
    sink hash = {.hasher = tr_hasher_create()}, file = {.out = o};

    if (!hash.hasher) return false;
    memset(&e, 0, sizeof e);
    e.line = p->id;
    e.prompt = p->prompt;
    e.key = p->key;
    e.n_prompt = p->n_prompt;
    e.max_tokens = p->max_tokens;
    e.n_logprobs = p->n_logprobs;
    e.n_prompt_logprobs = p->n_prompt_logprobs;
    e.n_choices = p->n_choices;
    e.n_prompt_scores = p->prompt_scores.n;
    give_progress(&hash, &e, p);
    tr_hasher_hex(hash.hasher, hex);
    tr_hasher_free(hash.hasher);
    e.bytes = skip + hash.bytes;
    memcpy(e.hash, hex, sizeof e.hash);
    put(o, &e, skip);
    give_progress(&file, &e, p);
    return true;
}

/* An entry of the old file as it is. What cannot be read is left out, so that the others are saved all the same; this job has
 * the old file open and asks it again when it comes to the request. 1: it was put, 0: left out, -1: out of memory. */
static int copy_entry(const tr_saved *s, output *o, place *at)
{
    int why;
    char *text = read_bytes(s, at->offset, at->bytes, &why);

    if (text) {
        put(o, text, (size_t)at->bytes);
        free(text);
        return 1;
    }
    if (why == ENOMEM) return -1;
    if (!at->left_out)
        tr_log_warn(s->log,
                    "%s: what it has of line %ju: %s: it is saved no longer, and a job to come "
                    "starts its request over",
                    s->path, (uintmax_t)at->line, why_text(why));
    at->left_out = true;
    return 0;
}

static void put_head(const tr_saved *s, output *o, uint64_t n_entries, uint64_t bytes)
{
    const size_t skip = offsetof(head, run);
    char hex[33];
    head h;

    memset(&h, 0, sizeof h);
    h.magic = MAGIC;
    memcpy(h.run, s->run, sizeof h.run);
    h.n_entries = n_entries;
    h.bytes = bytes;
    tr_hash128_hex((const char *)&h + skip, sizeof h - skip, 0, hex);
    memcpy(h.hash, hex, sizeof h.hash);
    put(o, &h, sizeof h);
}

/* Everything to the file that will take the name; the head, which knows how much it is, at last. False: no memory. */
static bool put_all(tr_saved *s, output *o, const tr_progress *list, tr_idset *now,
                    tr_saved_counts *counts)
{
    put_head(s, o, 0, 0);
    for (const tr_progress *p = list; p; p = p->next) {
        if (tr_idset_add(now, tr_key_line(p->id), 0, NULL) < 0 || !put_progress(o, p)) return false;
        counts->requests++;
        counts->tokens += (uint64_t)count_tokens(p);
    }
    for (size_t i = 0; i < s->n_places; i++) {
        place *at = &s->place[i];
        if (atomic_load(&at->done) || tr_idset_find(now, tr_key_line(at->line), NULL)) continue;
        const int copied = copy_entry(s, o, at);
        if (copied < 0) return false;
        if (!copied) continue;
        counts->requests++;
        counts->tokens += (uint64_t)at->n_tokens;
    }
    flush(o);
    counts->bytes = o->bytes;
    if (o->why || lseek(o->fd, 0, SEEK_SET) != 0) return true; /* the caller sees why */
    put_head(s, o, counts->requests, counts->bytes);
    flush(o);
    return true;
}

bool tr_saved_write(tr_saved *s, const tr_progress *list, tr_saved_counts *counts)
{
    output o = {.fd = -1, .text = malloc(PIECE)};
    tr_idset *now = tr_idset_create();
    tr_err err = {0};

    *counts = (tr_saved_counts){0};
    bool ok = o.text && now;
    const char *why = "out of memory";
    if (ok) {
        o.fd = open(s->tmp_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (o.fd < 0) o.why = errno;
        if (o.fd >= 0) tr_alike(o.fd, s->out_path); /* no more than they may read it */
    }
    if (ok && !o.why) ok = put_all(s, &o, list, now, counts);
    if (ok && !o.why && counts->requests && fsync(o.fd) != 0 && errno != EINVAL) o.why = errno;
    if (o.fd >= 0 && close(o.fd) != 0 && !o.why) o.why = errno;
    if (o.why) why = strerror(o.why);
    ok = ok && !o.why;
    if (ok && !counts->requests) {
        tr_saved_remove(s); /* nothing is worth keeping */
    } else if (ok && rename(s->tmp_path, s->path) != 0) {
        why = strerror(errno);
        ok = false;
    } else if (ok && tr_sync_folder(s->path, &err) != TR_OK) {
        why = err.text;
        ok = false;
    }
    if (!ok) {
        tr_log_warn(s->log, "%s: %s: the tokens of running requests are not saved", s->tmp_path,
                    why);
        if (o.fd >= 0) unlink(s->tmp_path);
        *counts = (tr_saved_counts){0};
    }
    free(o.text);
    tr_idset_free(now);
    return ok;
}

void tr_saved_remove(tr_saved *s)
{
    unlink(s->tmp_path);
    if (unlink(s->path) != 0 && errno != ENOENT)
        tr_log_warn(s->log, "%s: cannot be removed: %s", s->path, strerror(errno));
}
