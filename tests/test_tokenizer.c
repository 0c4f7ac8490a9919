/* Tokenizer files: all vectors, every refusal of chat.md 1.7, damaged and large files, and what
 * may be asked of an open one. (test_encode.c has the parts, random texts, segments, time and
 * memory.) */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#include <jansson.h>

#include "base/json.h"
#include "machine.h"
#include "text/detok.h"
#include "text/tokenizer.h"
#include "vectors.h"

enum { FILE_MAX = 1 << 26 };

/* A file of the published size loads in this (processor) time; sanitizers take their share. */
#ifdef __SANITIZE_ADDRESS__
#define TR_TEST_SECONDS 15.0
#else
#define TR_TEST_SECONDS 2.0
#endif

static char *read_vector(const char *name, size_t *n)
{
    char path[1024];
    char *text;
    tr_err err;

    if (tr_file_read(tr_vector_path(path, sizeof path, name), FILE_MAX, &text, n, &err) != TR_OK)
        fail_msg("%s", err.text);
    return text;
}

static tr_tokenizer *open_vector(const char *name)
{
    char path[1024], file[256];
    tr_tokenizer *t;
    tr_err err;

    snprintf(file, sizeof file, "chat/%s", name);
    if (tr_tokenizer_open(&t, tr_vector_path(path, sizeof path, file), NULL, NULL, &err) != TR_OK)
        fail_msg("%s", err.text);
    return t;
}

static int32_t *encode(tr_encoder *e, const char *text, size_t n, bool literal, size_t *n_ids)
{
    tr_segment whole = {text, n, literal};
    int32_t *ids;
    tr_err err;

    if (tr_encode(e, &whole, 1, &ids, n_ids, &err) != TR_OK) fail_msg("%s", err.text);
    return ids;
}

/* ---- vectors --------------------------------------------------------------------------------- */

typedef struct opened { /* a tokenizer file of the vectors, opened once */
    char name[64];
    tr_tokenizer *t;
    tr_encoder *e;
} opened;

typedef struct vectors {
    opened files[8];
    int n_files, n_encode, n_pieces, n_decode, n_refuse;
} vectors;

static opened *get_file(vectors *v, const char *name)
{
    for (int i = 0; i < v->n_files; i++)
        if (strcmp(v->files[i].name, name) == 0) return &v->files[i];
    assert_true(v->n_files < 8);
    opened *f = &v->files[v->n_files++];
    snprintf(f->name, sizeof f->name, "%s", name);
    f->t = open_vector(name);
    f->e = tr_encoder_create(f->t);
    assert_non_null(f->e);
    return f;
}

static size_t decode_base64(const char *s, char *out)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0;
    size_t n = 0;
    int n_bits = 0;

    for (; *s && *s != '='; s++) {
        bits = bits << 6 | (uint32_t)(strchr(digits, *s) - digits);
        n_bits += 6;
        if (n_bits >= 8) out[n++] = (char)(bits >> (n_bits -= 8));
    }
    return n;
}

static void check_ids(const char *id, const json_t *expected, const int32_t *ids, size_t n)
{
    if (n != json_array_size(expected))
        fail_msg("%s: %zu ids, not %zu", id, n, json_array_size(expected));
    for (size_t i = 0; i < n; i++)
        if (ids[i] != json_integer_value(json_array_get(expected, i)))
            fail_msg("%s: id %zu is %d, not %d", id, i, ids[i],
                     (int)json_integer_value(json_array_get(expected, i)));
}

static void check_pieces(const char *id, tr_encoder *e, const char *text, size_t n,
                         const json_t *expected)
{
    size_t *ends, n_ends, begin = 0;
    tr_err err;

    assert_int_equal(tr_encode_pieces(e, text, n, &ends, &n_ends, &err), TR_OK);
    if (n_ends != json_array_size(expected))
        fail_msg("%s: %zu pieces, not %zu", id, n_ends, json_array_size(expected));
    for (size_t i = 0; i < n_ends; begin = ends[i++]) {
        const json_t *piece = json_array_get(expected, i);
        if (ends[i] - begin != json_string_length(piece) ||
            memcmp(text + begin, json_string_value(piece), ends[i] - begin) != 0)
            fail_msg("%s: piece %zu is %.*s", id, i, (int)(ends[i] - begin), text + begin);
    }
    free(ends);
}

static void run_encode(vectors *v, const char *id, const json_t *c)
{
    opened *f = get_file(v, json_string_value(json_object_get(c, "tokenizer")));
    const json_t *text = json_object_get(c, "text"), *pieces = json_object_get(c, "pieces");
    char *bytes = NULL;
    size_t n, n_ids;

    if (text) {
        n = json_string_length(text);
        bytes = malloc(n + 1);
        assert_non_null(bytes);
        memcpy(bytes, json_string_value(text), n + 1);
    } else {
        const char *b64 = json_string_value(json_object_get(c, "b64"));
        bytes = malloc(strlen(b64) + 1);
        assert_non_null(bytes);
        n = decode_base64(b64, bytes);
    }
    int32_t *ids = encode(f->e, bytes, n, json_is_false(json_object_get(c, "parse_added")), &n_ids);
    check_ids(id, json_object_get(c, "ids"), ids, n_ids);
    if (pieces) {
        check_pieces(id, f->e, bytes, n, pieces);
        v->n_pieces++;
    }
    free(ids);
    free(bytes);
    v->n_encode++;
}

static void run_decode(vectors *v, const char *id, const json_t *c)
{
    opened *f = get_file(v, json_string_value(json_object_get(c, "tokenizer")));
    const json_t *ids = json_object_get(c, "ids"), *text = json_object_get(c, "text");
    const json_t *deltas = json_object_get(c, "deltas");
    bool skip = json_is_true(json_object_get(c, "skip_special"));
    size_t n = json_array_size(ids), n_text, n_bytes;
    int32_t *list = calloc(n + 1, sizeof *list);
    tr_detok d = {{0}, 0};
    char *whole;
    tr_err err;

    assert_non_null(list);
    for (size_t i = 0; i < n; i++)
        list[i] = (int32_t)json_integer_value(json_array_get(ids, i));
    assert_int_equal(tr_decode(f->t, list, n, skip, &whole, &n_text, &err), TR_OK);
    if (n_text != json_string_length(text) || memcmp(whole, json_string_value(text), n_text) != 0)
        fail_msg("%s: decoded to %s", id, whole);

    assert_int_equal(json_array_size(deltas), n + 1);
    for (size_t i = 0; i <= n; i++) {
        const char *bytes = "";
        n_bytes = 0;
        if (i < n && !(skip && tr_tokenizer_special(f->t, list[i])))
            bytes = tr_tokenizer_bytes(f->t, list[i], &n_bytes);
        char *out = malloc(tr_detok_max(n_bytes));
        assert_non_null(out);
        size_t n_out = i < n ? tr_detok_feed(&d, bytes, n_bytes, out) : tr_detok_flush(&d, out);
        const json_t *delta = json_array_get(deltas, i);
        if (n_out != json_string_length(delta) || memcmp(out, json_string_value(delta), n_out) != 0)
            fail_msg("%s: delta %zu is %.*s", id, i, (int)n_out, out);
        free(out);
    }
    free(whole);
    free(list);
    v->n_decode++;
}

/* The value at a path such as a.b[2].c; NULL: none. */
static json_t *at_path(json_t *root, const char *path, size_t n)
{
    for (size_t i = 0, k; i < n && root; i = k) {
        char name[64] = "";
        if (path[i] == '.') i++;
        if (path[i] == '[') {
            char *end;
            root = json_array_get(root, strtoul(path + i + 1, &end, 10));
            k = (size_t)(end - path) + 1;
            continue;
        }
        k = i + strcspn(path + i, ".[=:");
        if (k > n) k = n;
        assert_true(k - i < sizeof name);
        memcpy(name, path + i, k - i);
        root = json_object_get(root, name);
    }
    return root;
}

/* JSON, or else a plain string. */
static json_t *edit_value(const char *text)
{
    json_t *v = json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    return v ? v : json_string(text);
}

static void apply_edit(json_t *root, const char *edit)
{
    size_t n = strcspn(edit, "="), last = n;
    const char *value = edit + n + 1;

    if (n > 7 && memcmp(edit + n - 7, ":remove", 7) == 0) {
        assert_int_equal(json_object_del(at_path(root, edit, n - 7), value), 0);
    } else if (n > 7 && memcmp(edit + n - 7, ":append", 7) == 0) {
        assert_int_equal(json_array_append_new(at_path(root, edit, n - 7), edit_value(value)), 0);
    } else {
        while (last > 0 && edit[last - 1] != '.' && edit[last - 1] != '[')
            last--;
        char name[64] = "";
        assert_true(n - last < sizeof name);
        memcpy(name, edit + last, n - last);
        json_t *parent = at_path(root, edit, last ? last - 1 : 0);
        if (last && edit[last - 1] == '[')
            assert_int_equal(json_array_set_new(parent, strtoul(name, NULL, 10), edit_value(value)),
                             0);
        else
            assert_int_equal(json_object_set_new(parent, name, edit_value(value)), 0);
    }
}

/* Load base with the edit; the code of the refusal, NULL: it loaded. *text gets the message. */
static const char *load_edited(const char *base, const char *edit, tr_err *err)
{
    char file[256];
    size_t n;
    const char *code = "?";
    tr_tokenizer *t;

    snprintf(file, sizeof file, "chat/%s", base);
    char *text = read_vector(file, &n);
    json_t *root = json_loadb(text, n, JSON_ALLOW_NUL, NULL);
    assert_non_null(root);
    apply_edit(root, edit);
    char *edited = json_dumps(root, JSON_COMPACT);
    assert_non_null(edited);
    err->text[0] = 0;
    tr_status st = tr_tokenizer_parse(&t, edited, strlen(edited), "x.json", &code, NULL, err);
    assert_int_equal(st, code ? TR_E_INPUT : TR_OK);
    assert_true((t == NULL) == (st != TR_OK));
    tr_tokenizer_free(t);
    free(edited);
    json_decref(root);
    free(text);
    return code;
}

static void run_refuse(vectors *v, const char *id, const json_t *c)
{
    const char *expected = json_string_value(json_object_get(c, "error"));
    tr_err err;

    const char *code = load_edited(json_string_value(json_object_get(c, "base")),
                                   json_string_value(json_object_get(c, "edit")), &err);
    if (!code || strcmp(code, expected) != 0)
        fail_msg("%s: %s instead of %s: %s", id, code ? code : "loaded", expected, err.text);
    if (!strstr(err.text, expected) || strncmp(err.text, "x.json: ", 8) != 0)
        fail_msg("%s: the message is: %s", id, err.text);
    v->n_refuse++;
}

static void all_vectors(void **state)
{
    size_t n;
    char *text = read_vector("chat/tokenizer.jsonl", &n), *line = text;
    vectors v = {0};

    (void)state;
    while (line < text + n) {
        char *end = memchr(line, '\n', (size_t)(text + n - line));
        if (!end) end = text + n;
        json_t *c = json_loadb(line, (size_t)(end - line), JSON_ALLOW_NUL, NULL);
        assert_non_null(c);
        const char *id = json_string_value(json_object_get(c, "id"));
        const char *kind = json_string_value(json_object_get(c, "kind"));
        if (strcmp(kind, "encode_text") == 0)
            run_encode(&v, id, c);
        else if (strcmp(kind, "decode_ids") == 0)
            run_decode(&v, id, c);
        else if (strcmp(kind, "load_refuse") == 0)
            run_refuse(&v, id, c);
        else
            fail_msg("%s: unknown kind %s", id, kind);
        json_decref(c);
        line = end + 1;
    }
    assert_true(v.n_encode > 0 && v.n_pieces > 0 && v.n_decode > 0 && v.n_refuse > 0);
    for (int i = 0; i < v.n_files; i++) {
        tr_encoder_free(v.files[i].e);
        tr_tokenizer_free(v.files[i].t);
    }
    free(text);
}

/* ---- the rest of chat.md 1.7 ----------------------------------------------------------------- */

#define ADDED(id, content, rest)                                                                   \
    "added_tokens:append={\"id\":" id ",\"content\":\"" content                                    \
    "\",\"single_word\":false,\"lstrip\":false,"                                                   \
    "\"rstrip\":false,\"normalized\":true" rest "}"

static void loader_table(void **state)
{
    /* clang-format off */
    static const struct {
        const char *edit, *code;
    } cases[] = {
        {"model.type=\"BPE\"", NULL},
        {"model:remove=type", NULL},
        {"model={}", "bad_vocab"},
        {"model=7", "unsupported_model"},
        {"model.type=null", "unsupported_model"},
        {"model.dropout=0", NULL},
        {"model.dropout=0.0", NULL},
        {"model.dropout=0.1", "unsupported_option"},
        {"model.dropout=\"0\"", "unsupported_option"},
        {"model.unk_token=\"\"", NULL},
        {"model.end_of_word_suffix=</w>", "unsupported_option"},
        {"model.fuse_unk=true", "unsupported_option"},
        {"model.fuse_unk=0", "unsupported_option"},
        {"model.ignore_merges=false", NULL},
        {"model.ignore_merges=1", "unsupported_option"},
        {"model.vocab=[]", "bad_vocab"},
        {"model.vocab.zz=0", "bad_vocab"},
        {"model.vocab.zz=-1", "bad_vocab"},
        {"model.vocab.zz=1.0", "bad_vocab"},
        {"model.vocab.zz=\"5\"", "bad_vocab"},
        {"model.vocab.zz=4194304", "bad_vocab"},
        {"model.vocab.zz=9223372036854775807", "bad_vocab"},
        {"model.vocab.zz=5000", NULL},
        {"model.vocab:remove=!", "bad_vocab"},
        {"model.merges={}", "bad_merges"},
        {"model.merges:append=5", "bad_merges"},
        {"model.merges:append=\"ab\"", "bad_merges"},
        {"model.merges:append=\"a b c\"", "bad_merges"},
        {"model.merges:append=\"a \"", "bad_merges"},
        {"model.merges:append=\" a\"", "bad_merges"},
        {"model.merges:append=[\"a\"]", "bad_merges"},
        {"model.merges:append=[\"a\",\"b\",\"c\"]", "bad_merges"},
        {"model.merges:append=[\"a\",5]", "bad_merges"},
        {"model.merges:append=\"! xyzzyq\"", "bad_merges"},
        {"model.merges:append=\"xyzzyq !\"", "bad_merges"},
        {"model.merges:append=\"~ ~~~~~~~~\"", "bad_merges"},
        {"model.merges:append=[\"!\",\"!\\u0000\"]", "bad_merges"},
        {"model.merges:append=\"i n\"", NULL},
        {"normalizer=null", NULL},
        {"normalizer={\"type\":\"NFC\"}", "unsupported_normalizer"},
        {"normalizer.normalizers=[{\"type\":\"NFC\"}]", "unsupported_normalizer"},
        {"pre_tokenizer=null", "unsupported_pre_tokenizer"},
        {"pre_tokenizer.pretokenizers=[]", "unsupported_pre_tokenizer"},
        {"pre_tokenizer.pretokenizers[1].invert=true", "unsupported_pre_tokenizer"},
        {"pre_tokenizer.pretokenizers[1].type=Digits", "unsupported_pre_tokenizer"},
        {"pre_tokenizer.pretokenizers[0].pattern={\"String\":\" \"}", "unsupported_pattern"},
        {"pre_tokenizer.pretokenizers[0].pattern=null", "unsupported_pattern"},
        {"pre_tokenizer.pretokenizers[0].pattern.Regex=\\\\p{N}{1,4}", "unsupported_pattern"},
        {"pre_tokenizer.pretokenizers[3].add_prefix_space=true", "unsupported_pre_tokenizer"},
        {"pre_tokenizer.pretokenizers:append={\"type\":\"ByteLevel\"}",
         "unsupported_pre_tokenizer"},
        {"post_processor=null", NULL},
        {"decoder=null", "unsupported_decoder"},
        {"padding={}", "unsupported_option"},
        {"added_tokens=7", "bad_added_tokens"},
        {"added_tokens=null", NULL},
        {"added_tokens:append=7", "bad_added_tokens"},
        {"surprise=7", NULL},
        {ADDED("3000", "<new>", ",\"special\":true"), NULL},
        {ADDED("3000", "", ",\"special\":true"), "bad_added_tokens"},
        {ADDED("3000", "<new>", ""), "bad_added_tokens"},
        {ADDED("3000", "<new>", ",\"special\":1"), "bad_added_tokens"},
        {ADDED("-1", "<new>", ",\"special\":true"), "bad_added_tokens"},
        {ADDED("3000", "<think>", ",\"special\":true"), "bad_added_tokens"},
        {ADDED("2031", "<new>", ",\"special\":true"), "bad_added_tokens"},
        {ADDED("0", "!", ",\"special\":true"), NULL},
        {ADDED("0", "<new>", ",\"special\":true"), "bad_added_tokens"},
        {ADDED("3000", "!", ",\"special\":true"), "bad_added_tokens"},
        {ADDED("3000", "a\\u0000b", ",\"special\":true"), NULL},
    };
    /* clang-format on */
    tr_err err;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *code = load_edited("tokenizer_a.json", cases[i].edit, &err);
        if (code != cases[i].code && (!code || !cases[i].code || strcmp(code, cases[i].code) != 0))
            fail_msg("%s: %s: %s", cases[i].edit, code ? code : "loaded", err.text);
    }
}

static void bad_json(void **state)
{
    static const char *const cases[] = {"",
                                        "{",
                                        "[]",
                                        "7",
                                        "{\"a\":1,\"a\":2}",
                                        "{} {}",
                                        "{\"a\":\"\xff\"}",
                                        "\xef\xbb\xbf{}",
                                        "{\"a\\u0000b\":1}"};
    const char *code;
    tr_tokenizer *t;
    tr_err err;
    size_t n;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        code = NULL;
        assert_int_equal(tr_tokenizer_parse(&t, cases[i], strlen(cases[i]), "x", &code, NULL, &err),
                         TR_E_INPUT);
        assert_null(t);
        if (!code || strcmp(code, "bad_json") != 0) fail_msg("%s: %s", cases[i], err.text);
    }
    assert_int_equal(tr_tokenizer_parse(&t, "{\"a\":\"\xff\"}", 9, "x", &code, NULL, &err),
                     TR_E_INPUT);
    assert_non_null(strstr(err.text, "byte 6"));
    assert_int_equal(tr_tokenizer_open(&t, "/nowhere/tokenizer.json", &code, NULL, &err),
                     TR_E_INPUT);
    assert_null(code);

    /* Cut off anywhere it is refused, never read past its end (an exact copy, so that sanitizers
     * see it). */
    char *text = read_vector("chat/tokenizer_flags.json", &n);
    while (n > 0 && text[n - 1] != '}')
        n--;
    for (size_t cut = 0; cut < n; cut += 7) {
        char *copy = malloc(cut + 1);
        assert_non_null(copy);
        memcpy(copy, text, cut);
        char *exact = realloc(copy, cut ? cut : 1);
        assert_non_null(exact);
        assert_int_equal(tr_tokenizer_parse(&t, exact, cut, "x", &code, NULL, &err), TR_E_INPUT);
        free(exact);
    }
    free(text);
}

static void queries(void **state)
{
    tr_tokenizer *t = open_vector("tokenizer_a.json");
    int32_t size = tr_tokenizer_size(t), n_vocab = size + 40;
    uint32_t *words = malloc(((size_t)n_vocab + 31) / 32 * sizeof *words);
    size_t n;

    (void)state;
    assert_non_null(words);
    memset(words, 0xff, ((size_t)n_vocab + 31) / 32 * sizeof *words);
    tr_tokenizer_mask(t, n_vocab, words);
    for (int32_t i = 0; i < n_vocab; i++)
        assert_int_equal(words[i / 32] >> (i % 32) & 1, tr_tokenizer_has(t, i));
    assert_true(tr_tokenizer_has(t, size - 1) && !tr_tokenizer_has(t, size) &&
                !tr_tokenizer_has(t, -1));
    assert_true(tr_tokenizer_special(t, tr_tokenizer_added(t, "\xef\xbd\x9c"
                                                              "DSML\xef\xbd\x9c")));
    assert_false(tr_tokenizer_special(t, tr_tokenizer_added(t, "<think>")));
    assert_false(tr_tokenizer_special(t, INT32_MIN));
    assert_non_null(tr_tokenizer_bytes(t, INT32_MAX, &n));
    assert_int_equal(n, 0);
    assert_int_equal(strlen(tr_tokenizer_identity(t)), 32);
    tr_tokenizer *other = open_vector("tokenizer_flags.json");
    assert_string_not_equal(tr_tokenizer_identity(t), tr_tokenizer_identity(other));
    tr_tokenizer_free(other);
    tr_tokenizer_free(t);
    free(words);
}

static void tiny_model(void **state)
{
    static const char text[] = "The quick brown fox <think>";
    char path[1024], *back;
    tr_tokenizer *t;
    tr_err err;
    size_t n, n_back;

    (void)state;
    if (tr_tokenizer_open(&t, tr_source_path(path, sizeof path, "models/tiny/tokenizer.json"), NULL,
                          NULL, &err) != TR_OK)
        fail_msg("%s", err.text);
    tr_encoder *e = tr_encoder_create(t);
    assert_non_null(e);
    int32_t *ids = encode(e, text, sizeof text - 1, false, &n);
    assert_int_equal(ids[n - 1], tr_tokenizer_added(t, "<think>"));
    assert_int_equal(tr_decode(t, ids, n, false, &back, &n_back, &err), TR_OK);
    assert_string_equal(back, text);
    free(back);
    free(ids);
    tr_encoder_free(e);
    tr_tokenizer_free(t);
}

/* ---- a file of the published size ------------------------------------------------------------ */

typedef struct text_buffer {
    char *at;
    size_t n, cap;
} text_buffer;

__attribute__((format(printf, 2, 3))) static void put(text_buffer *b, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    int n = vsnprintf(b->at + b->n, b->cap - b->n, fmt, args);
    va_end(args);
    assert_true(n >= 0 && (size_t)n < b->cap - b->n);
    b->n += (size_t)n;
}

/* The code point that stands for a byte (chat.md 1.4), in a second spelling. */
static int byte_char(int byte)
{
    int n = 0;

    if ((byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad)) return byte;
    for (int i = 0; i < byte; i++)
        n += !((i > 0x20 && i < 0x7f) || (i > 0xa0 && i != 0xad));
    return 0x100 + n;
}

/* Both sides of merge i: two bytes, or two and a third. */
static void put_sides(text_buffer *b, const int c[256], int i, const char *before,
                      const char *between)
{
    int k = i < 65536 ? i : i - 65536;

    put(b, "%s\\u%04x", before, c[k / 256]);
    if (i >= 65536)
        put(b, "\\u%04x%s\\u%04x", c[k % 256], between, c[1 + i % 7]);
    else
        put(b, "%s\\u%04x", between, c[k % 256]);
}

/* 256 bytes, all pairs of bytes, and triples up to 127,741 merges. */
static char *make_large(size_t *n)
{
    enum { N_MERGES = 127741 };
    text_buffer b = {malloc(32u << 20), 0, 32u << 20};
    int c[256];

    assert_non_null(b.at);
    for (int i = 0; i < 256; i++)
        c[i] = byte_char(i);
    char *frame = read_vector("chat/tokenizer_flags.json", n);
    json_t *root = json_loadb(frame, *n, 0, NULL);
    assert_non_null(root);
    json_object_del(root, "model");
    json_object_del(root, "added_tokens");
    char *rest = json_dumps(root, JSON_COMPACT);
    assert_non_null(rest);
    put(&b, "%.*s,\"model\":{\"vocab\":{", (int)strlen(rest) - 1, rest);
    for (int i = 0; i < 256; i++)
        put(&b, "%s\"\\u%04x\":%d", i ? "," : "", c[i], i);
    for (int i = 0; i < N_MERGES; i++) {
        put_sides(&b, c, i, ",\"", "");
        put(&b, "\":%d", i + 256);
    }
    put(&b, "},\"merges\":[");
    for (int i = 0; i < N_MERGES; i++) {
        put_sides(&b, c, i, i ? ",\"" : "\"", " ");
        put(&b, "\"");
    }
    put(&b, "]}}");
    json_decref(root);
    free(rest);
    free(frame);
    *n = b.n;
    return b.at;
}

static void large_files_load_quickly(void **state)
{
    size_t n, n_bytes;
    char *text = make_large(&n);
    tr_tokenizer *t;
    tr_err err;

    (void)state;
    clock_t begin = clock();
    if (tr_tokenizer_parse(&t, text, n, "large", NULL, NULL, &err) != TR_OK)
        fail_msg("%s", err.text);
    double taken = (double)(clock() - begin) / CLOCKS_PER_SEC;
    if (taken > tr_machine_seconds(TR_TEST_SECONDS)) fail_msg("%.2f s", taken);
    assert_int_equal(tr_tokenizer_size(t), 256 + 127741);
    tr_encoder *e = tr_encoder_create(t);
    assert_non_null(e);
    int32_t *ids = encode(e, "ab", 2, false, &n);
    assert_int_equal(n, 1);
    assert_int_equal(ids[0], 256 + 'a' * 256 + 'b');
    const char *bytes = tr_tokenizer_bytes(t, ids[0], &n_bytes);
    assert_int_equal(n_bytes, 2);
    assert_memory_equal(bytes, "ab", 2);
    free(ids);
    tr_encoder_free(e);
    tr_tokenizer_free(t);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_vectors), cmocka_unit_test(loader_table),
        cmocka_unit_test(bad_json),    cmocka_unit_test(queries),
        cmocka_unit_test(tiny_model),  cmocka_unit_test(large_files_load_quickly),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
