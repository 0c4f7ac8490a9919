/* Text to ids and back. For well-formed UTF-8 decoding gives the text again; there are never more ids than bytes; neither
 * cutting the text into segments nor feeding the decoder by tokens changes anything. */
#include <config.h>

#include "tests/fuzz/fuzz.h"
#include "tests/vectors.h"
#include "text/detok.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

enum { N_FILES = 3 };

typedef struct loaded { /* made once, then only read */
    tr_tokenizer *t;
    tr_encoder *e;
    char *piece; /* [tr_detok_max(longest token)], no byte more */
    /* Some added token swallows white space, or stands for other bytes than its text (chat.md 1.6): the text does not always
     * come back. */
    bool changes;
} loaded;

static loaded file[N_FILES];

static void load_all(void)
{
    static const char *const name[N_FILES] = {
        "chat/tokenizer_a.json", "chat/tokenizer_ignore_merges.json", "chat/tokenizer_flags.json"};
    char path[4096];
    tr_err err = {0};

    for (int i = 0; i < N_FILES; i++) {
        tr_status st = tr_tokenizer_open(&file[i].t, tr_vector_path(path, sizeof path, name[i]),
                                         NULL, NULL, &err);
        FUZZ_CHECK(st == TR_OK, "%s", err.text);
        file[i].e = tr_encoder_create(file[i].t);
        FUZZ_CHECK(file[i].e, "out of memory");
        size_t n, longest = 0;
        for (int32_t id = 0; id < tr_tokenizer_size(file[i].t); id++) {
            tr_tokenizer_bytes(file[i].t, id, &n);
            longest = n > longest ? n : longest;
        }
        file[i].piece = malloc(tr_detok_max(longest));
        if (!file[i].piece) abort();
        file[i].changes = i > 0;
    }
}

static void encode(const loaded *f, const tr_segment *s, size_t n, int32_t **ids, size_t *n_ids)
{
    tr_err err = {0};
    FUZZ_CHECK(tr_encode(f->e, s, n, ids, n_ids, &err) == TR_OK, "%s", err.text);
}

/* ids decode to [text, text + n), at once and token by token. */
static void check_decoded(const loaded *f, const int32_t *ids, size_t n_ids, const char *text,
                          size_t n)
{
    tr_err err = {0};
    tr_detok d = {0};
    char *whole, *out;
    size_t n_whole, at = 0, bytes;

    FUZZ_CHECK(tr_decode(f->t, ids, n_ids, false, &whole, &n_whole, &err) == TR_OK, "%s", err.text);
    FUZZ_CHECK(n_whole == n && memcmp(whole, text, n) == 0, "\"%s\" instead of \"%.*s\"", whole,
               (int)n, text);
    out = malloc(3 * n + 64);
    if (!out) abort();
    for (size_t i = 0; i < n_ids; i++) {
        const char *s = tr_tokenizer_bytes(f->t, ids[i], &bytes);
        size_t got = tr_detok_feed(&d, s, bytes, f->piece);
        FUZZ_CHECK(got <= tr_detok_max(bytes) && at + got <= 3 * n, "%zu bytes of %zu", got, bytes);
        memcpy(out + at, f->piece, got);
        at += got;
    }
    at += tr_detok_flush(&d, out + at);
    FUZZ_CHECK(at == n && memcmp(out, text, n) == 0, "token by token: \"%.*s\"", (int)at, out);
    free(out);
    free(whole);
}

static void check_pieces(const loaded *f, const char *text, size_t n, size_t n_repaired)
{
    tr_err err = {0};
    size_t *end, n_ends;
    FUZZ_CHECK(tr_encode_pieces(f->e, text, n, &end, &n_ends, &err) == TR_OK, "%s", err.text);
    for (size_t i = 0; i < n_ends; i++)
        FUZZ_CHECK(end[i] > (i ? end[i - 1] : 0), "piece %zu is empty", i);
    FUZZ_CHECK((n_ends ? end[n_ends - 1] : 0) == n_repaired, "pieces do not cover the text");
    free(end);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    int32_t *ids, *cut_ids;
    size_t n_ids, n_cut;

    if (!file[0].t) load_all();
    uint8_t first = fuzz_take_byte(&data, &n);
    const loaded *f = &file[first % N_FILES];
    char *text = fuzz_copy(data, n), *repaired = malloc(3 * n + 1);
    if (!repaired) abort();
    size_t n_repaired = tr_utf8_repair(text, n, repaired), cut = n ? first / N_FILES % n : 0;
    FUZZ_CHECK(tr_utf8_valid(repaired, n_repaired, NULL), "repaired text is no UTF-8");
    FUZZ_CHECK(!tr_utf8_valid(text, n, NULL) || n_repaired == n, "well-formed text was repaired");

    const tr_segment plain = {text, n, false}, literal = {text, n, true};
    encode(f, &plain, 1, &ids, &n_ids);
    FUZZ_CHECK(n_ids <= n_repaired, "%zu ids of %zu bytes", n_ids, n_repaired);
    if (!f->changes) check_decoded(f, ids, n_ids, repaired, n_repaired);
    const tr_segment two[] = {{text, cut, false}, {text + cut, n - cut, false}};
    encode(f, two, 2, &cut_ids, &n_cut);
    FUZZ_CHECK(n_cut == n_ids && !memcmp(ids, cut_ids, n_ids * sizeof *ids), "cut at %zu", cut);
    free(cut_ids);
    free(ids);
    encode(f, &literal, 1, &ids, &n_ids);
    check_decoded(f, ids, n_ids, repaired, n_repaired);
    free(ids);
    check_pieces(f, text, n, n_repaired);
    free(repaired);
    free(text);
    return 0;
}
