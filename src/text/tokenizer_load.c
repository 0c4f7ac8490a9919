#include <config.h>

#include "text/tokenizer.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "base/hash.h"
#include "base/json.h"
#include "base/size.h"
#include "text/tokenizer_priv.h"
#include "text/utf8.h"

enum {
    FILE_MAX = 256 << 20, /* the published file has 8 MB */
    N_BYTE_CHARS = 0x144, /* the byte characters are code points below this */
    VALUE_SHOWN = 80,     /* bytes of an offending value that go into the message */
};

typedef struct loader {
    tr_tokenizer *t;
    const char *name, *code;
    tr_log *log;
    tr_err *err;
    const json_t *vocab;
    int16_t byte_of[N_BYTE_CHARS]; /* code point to byte, -1: none */
    char *side;                    /* scratch: one side of a merge and both together */
    size_t side_cap;
} loader;

/* ---- refusing -------------------------------------------------------------------------------- */

/* "NAME: CODE: field is value". value NULL: absent. */
__attribute__((format(printf, 4, 5))) static tr_status
refuse(loader *l, const char *code, const json_t *value, const char *fmt, ...)
{
    char field[160];
    va_list args;

    va_start(args, fmt);
    vsnprintf(field, sizeof field, fmt, args);
    va_end(args);

    char *text = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    size_t n = text ? strlen(text) : 0, shown = n < VALUE_SHOWN ? n : VALUE_SHOWN;
    while (shown < n && shown > 0 && ((unsigned char)text[shown] & 0xc0) == 0x80)
        shown--;
    l->code = code;
    tr_status st = tr_fail(l->err, TR_E_INPUT, "%s: %s: %s is %.*s%s", l->name, code, field,
                           text ? (int)shown : 6, text ? text : "absent", shown < n ? "..." : "");
    free(text);
    return st;
}

static tr_status no_memory(loader *l)
{
    return tr_fail(l->err, TR_E_MEMORY, "%s: out of memory", l->name);
}

static bool absent(const json_t *v)
{
    return !v || json_is_null(v);
}

static bool is_string(const json_t *v, const char *text)
{
    size_t n = strlen(text);
    return json_is_string(v) && json_string_length(v) == n &&
           memcmp(json_string_value(v), text, n) == 0;
}

static bool has_type(const json_t *v, const char *type)
{
    return json_is_object(v) && is_string(json_object_get(v, "type"), type);
}

/* ---- everything but the tables (chat.md 1.7) ------------------------------------------------- */

static tr_status check_model(loader *l, const json_t *model)
{
    static const char *const empty[] = {"unk_token", "continuing_subword_prefix",
                                        "end_of_word_suffix"};
    static const char *const off[] = {"byte_fallback", "fuse_unk"};
    const json_t *v;

    if (!json_is_object(model)) return refuse(l, "unsupported_model", model, "model");
    v = json_object_get(model, "type");
    if (v && !is_string(v, "BPE")) return refuse(l, "unsupported_model", v, "model.type");
    v = json_object_get(model, "dropout");
    if (!absent(v) && !(json_is_number(v) && json_number_value(v) == 0.0))
        return refuse(l, "unsupported_option", v, "model.dropout");
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++) {
        v = json_object_get(model, empty[i]);
        if (!absent(v) && !is_string(v, ""))
            return refuse(l, "unsupported_option", v, "model.%s", empty[i]);
    }
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        v = json_object_get(model, off[i]);
        if (v && !json_is_false(v)) return refuse(l, "unsupported_option", v, "model.%s", off[i]);
    }
    v = json_object_get(model, "ignore_merges");
    if (v && !json_is_boolean(v)) return refuse(l, "unsupported_option", v, "model.ignore_merges");
    l->t->ignore_merges = json_is_true(v);
    return TR_OK;
}

static tr_status check_split(loader *l, const json_t *step, int i)
{
    static const char code[] = "unsupported_pre_tokenizer";
    const json_t *v, *regex;

    if (!has_type(step, "Split"))
        return refuse(l, code, step, "pre_tokenizer.pretokenizers[%d]", i);
    v = json_object_get(step, "behavior");
    if (!is_string(v, "Isolated"))
        return refuse(l, code, v, "pre_tokenizer.pretokenizers[%d].behavior", i);
    v = json_object_get(step, "invert");
    if (!json_is_false(v)) return refuse(l, code, v, "pre_tokenizer.pretokenizers[%d].invert", i);
    v = json_object_get(step, "pattern");
    regex = json_object_get(v, "Regex");
    if (!regex || json_object_size(v) != 1 || !is_string(regex, tr_split_patterns[i]))
        return refuse(l, "unsupported_pattern", v, "pre_tokenizer.pretokenizers[%d].pattern", i);
    return TR_OK;
}

static tr_status check_pre_tokenizer(loader *l, const json_t *pre)
{
    static const char code[] = "unsupported_pre_tokenizer";
    static const char *const off[] = {"add_prefix_space", "use_regex"};
    const json_t *steps = json_object_get(pre, "pretokenizers"), *last, *v;
    tr_status st = TR_OK;

    if (!has_type(pre, "Sequence")) return refuse(l, code, pre, "pre_tokenizer");
    if (!json_is_array(steps) || json_array_size(steps) != TR_N_SPLITS + 1)
        return refuse(l, code, steps, "pre_tokenizer.pretokenizers");
    for (int i = 0; i < TR_N_SPLITS && st == TR_OK; i++)
        st = check_split(l, json_array_get(steps, (size_t)i), i);
    if (st != TR_OK) return st;

    last = json_array_get(steps, TR_N_SPLITS);
    if (!has_type(last, "ByteLevel"))
        return refuse(l, code, last, "pre_tokenizer.pretokenizers[%d]", TR_N_SPLITS);
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        v = json_object_get(last, off[i]);
        if (!json_is_false(v))
            return refuse(l, code, v, "pre_tokenizer.pretokenizers[%d].%s", TR_N_SPLITS, off[i]);
    }
    return TR_OK;
}

static tr_status check_frame(loader *l, const json_t *root)
{
    static const char *const off[] = {"truncation", "padding"};
    const json_t *v = json_object_get(root, "normalizer");
    tr_status st;

    if (!absent(v)) {
        const json_t *steps = json_object_get(v, "normalizers");
        if (!has_type(v, "Sequence") || !json_is_array(steps) || json_array_size(steps) != 0)
            return refuse(l, "unsupported_normalizer", v, "normalizer");
    }
    st = check_pre_tokenizer(l, json_object_get(root, "pre_tokenizer"));
    if (st != TR_OK) return st;
    v = json_object_get(root, "post_processor");
    if (!absent(v) && !has_type(v, "ByteLevel"))
        return refuse(l, "unsupported_post_processor", v, "post_processor");
    v = json_object_get(root, "decoder");
    if (!has_type(v, "ByteLevel")) return refuse(l, "unsupported_decoder", v, "decoder");
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        v = json_object_get(root, off[i]);
        if (!absent(v)) return refuse(l, "unsupported_option", v, "%s", off[i]);
    }
    return TR_OK;
}

static void warn_unknown(const loader *l, const json_t *root)
{
    static const char *const known[] = {"version",    "truncation",    "padding",
                                        "normalizer", "pre_tokenizer", "post_processor",
                                        "decoder",    "added_tokens",  "model"};
    const char *key;
    const json_t *v;

    for (void *i = json_object_iter((json_t *)root); i;
         i = json_object_iter_next((json_t *)root, i)) {
        size_t k = 0;
        key = json_object_iter_key(i);
        while (k < sizeof known / sizeof *known && strcmp(known[k], key) != 0)
            k++;
        if (k == sizeof known / sizeof *known)
            tr_log_warn(l->log, "%s: unknown key \"%.60s\" ignored", l->name, key);
    }
    v = json_object_get(root, "version");
    if (v && !is_string(v, "1.0")) tr_log_warn(l->log, "%s: version is not \"1.0\"", l->name);
}

/* ---- byte characters (chat.md 1.4) ----------------------------------------------------------- */

static bool is_plain(int byte)
{
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

/* The 68 bytes that do not stand for themselves take U+0100 and on, in order. */
static void make_byte_chars(loader *l)
{
    int next = 0x100;

    for (int i = 0; i < N_BYTE_CHARS; i++)
        l->byte_of[i] = -1;
    for (int byte = 0; byte < 256; byte++)
        l->byte_of[is_plain(byte) ? byte : next++] = (int16_t)byte;
}

/* The bytes that a token's string stands for, at the end of the arena (chat.md 1.6): those of its
 * byte characters, or its own UTF-8 where some character is none. The arena has room: it is as
 * large as the file. */
static tr_token translate(loader *l, const char *text, size_t n)
{
    tr_tokenizer *t = l->t;
    tr_token token = {.at = t->arena_n, .flags = TR_TOKEN_BYTES};
    char *out = t->arena + t->arena_n;
    size_t o = 0;

    for (size_t i = 0; i < n;) {
        const unsigned char *u = (const unsigned char *)text + i;
        int len = tr_utf8_next(u, n - i);
        uint32_t c = len > 0 ? tr_utf8_decode(u, len) : 0;
        if (c >= N_BYTE_CHARS || l->byte_of[c] < 0) {
            memcpy(out, text, n);
            o = n;
            token.flags = 0;
            break;
        }
        out[o++] = (char)l->byte_of[c];
        i += (size_t)len;
    }
    t->arena_n += o;
    token.n = (uint32_t)o;
    return token;
}

/* ---- tables ---------------------------------------------------------------------------------- */

/* The id of a vocab entry, or -1. Keys hold no NUL (jansson), so a text that does is none. */
static int32_t vocab_id(const loader *l, const char *text, size_t n)
{
    const json_t *v = strlen(text) == n ? json_object_get(l->vocab, text) : NULL;
    return v ? (int32_t)json_integer_value(v) : -1;
}

static bool is_id(const json_t *v)
{
    return json_is_integer(v) && json_integer_value(v) >= 0 &&
           json_integer_value(v) <= TR_TOKEN_ID_MAX;
}

/* Types and ranges of all ids; the largest decides the size of the table. */
static tr_status make_table(loader *l, const json_t *added)
{
    tr_tokenizer *t = l->t;
    int32_t largest = -1;
    void *i;

    if (!json_is_object(l->vocab)) return refuse(l, "bad_vocab", l->vocab, "model.vocab");
    for (i = json_object_iter((json_t *)l->vocab); i;
         i = json_object_iter_next((json_t *)l->vocab, i)) {
        const json_t *v = json_object_iter_value(i);
        if (!is_id(v))
            return refuse(l, "bad_vocab", v, "model.vocab[\"%.60s\"]", json_object_iter_key(i));
        if (json_integer_value(v) > largest) largest = (int32_t)json_integer_value(v);
    }
    if (!absent(added) && !json_is_array(added))
        return refuse(l, "bad_added_tokens", added, "added_tokens");
    for (size_t k = 0; k < json_array_size(added); k++) {
        const json_t *v = json_object_get(json_array_get(added, k), "id");
        if (!is_id(v)) return refuse(l, "bad_added_tokens", v, "added_tokens[%zu].id", k);
        if (json_integer_value(v) > largest) largest = (int32_t)json_integer_value(v);
    }
    t->n_tokens = largest + 1;
    t->tokens = tr_calloc((size_t)t->n_tokens, sizeof *t->tokens);
    return t->tokens ? TR_OK : no_memory(l);
}

static tr_status load_vocab(loader *l)
{
    tr_tokenizer *t = l->t;

    for (void *i = json_object_iter((json_t *)l->vocab); i;
         i = json_object_iter_next((json_t *)l->vocab, i)) {
        const char *key = json_object_iter_key(i);
        const json_t *v = json_object_iter_value(i);
        tr_token *token = &t->tokens[json_integer_value(v)];
        if (token->flags)
            return refuse(l, "bad_vocab", v, "another token too: the id of model.vocab[\"%.60s\"]",
                          key);
        *token = translate(l, key, strlen(key));
        token->flags |= TR_TOKEN_VOCAB;
    }
    for (uint32_t c = 0; c < N_BYTE_CHARS; c++) {
        char text[5] = "";
        int byte = l->byte_of[c];
        if (byte < 0) continue;
        int n = tr_utf8_encode(c, text);
        t->byte_id[byte] = vocab_id(l, text, (size_t)n);
        if (t->byte_id[byte] < 0)
            return refuse(l, "bad_vocab", NULL, "model.vocab[\"%s\"], U+%04X for byte %02X,", text,
                          c, (unsigned)byte);
    }
    return TR_OK;
}

/* Both sides of a merge, whichever way it is spelled; false: it is none. */
static bool merge_sides(const json_t *v, const char **left, size_t *n_left, const char **right,
                        size_t *n_right)
{
    if (json_is_string(v)) {
        size_t n = json_string_length(v);
        *left = json_string_value(v);
        const char *space = memchr(*left, ' ', n);
        if (!space) return false;
        *n_left = (size_t)(space - *left);
        *right = space + 1;
        *n_right = n - *n_left - 1;
        return !memchr(*right, ' ', *n_right);
    }
    const json_t *a = json_array_get(v, 0), *b = json_array_get(v, 1);
    if (json_array_size(v) != 2 || !json_is_string(a) || !json_is_string(b)) return false;
    *left = json_string_value(a);
    *n_left = json_string_length(a);
    *right = json_string_value(b);
    *n_right = json_string_length(b);
    return true;
}

/* The id of left followed by right (n_right may be 0), or -1; -2: out of memory. */
static int32_t joined_id(loader *l, const char *left, size_t n_left, const char *right,
                         size_t n_right)
{
    size_t n = n_left + n_right; /* both are parts of a file of at most FILE_MAX bytes */

    if (n >= l->side_cap) {
        char *p = realloc(l->side, 2 * n + 64);
        if (!p) return -2;
        l->side = p;
        l->side_cap = 2 * n + 64;
    }
    memcpy(l->side, left, n_left);
    memcpy(l->side + n_left, right, n_right);
    l->side[n] = 0;
    return vocab_id(l, l->side, n);
}

static tr_status load_merges(loader *l, const json_t *merges)
{
    tr_tokenizer *t = l->t;
    const char *left, *right;
    size_t n_left, n_right;

    if (!json_is_array(merges)) return refuse(l, "bad_merges", merges, "model.merges");
    if (!tr_merges_create(&t->merges, json_array_size(merges))) return no_memory(l);
    for (size_t i = 0; i < json_array_size(merges); i++) {
        const json_t *v = json_array_get(merges, i);
        if (!merge_sides(v, &left, &n_left, &right, &n_right) || n_left == 0 || n_right == 0)
            return refuse(l, "bad_merges", v, "not a pair: model.merges[%zu]", i);
        tr_merge merge = {.left = joined_id(l, left, n_left, "", 0),
                          .right = joined_id(l, right, n_right, "", 0),
                          .rank = (int32_t)i,
                          .result = joined_id(l, left, n_left, right, n_right)};
        if (merge.left == -2 || merge.right == -2 || merge.result == -2) return no_memory(l);
        if (merge.left < 0 || merge.right < 0 || merge.result < 0)
            return refuse(l, "bad_merges", v, "%s not in vocab: model.merges[%zu]",
                          merge.left < 0    ? "left"
                          : merge.right < 0 ? "right"
                                            : "result",
                          i);
        tr_merges_add(&t->merges, merge);
    }
    return TR_OK;
}

/* Does the vocab entry in_vocab, which is spelled as the added token id, also stand for the same
 * text? The entry "ß" of vocab does not: it is the byte DF. */
static bool is_same_text(const tr_tokenizer *t, int32_t in_vocab, int32_t id, const char *text,
                         size_t n)
{
    size_t n_bytes;
    const char *bytes = tr_tokenizer_bytes(t, in_vocab, &n_bytes);
    return in_vocab >= 0 && in_vocab != id && n_bytes == n && memcmp(bytes, text, n) == 0;
}

static tr_status load_added_one(loader *l, const json_t *entry, size_t i)
{
    static const char code[] = "bad_added_tokens";
    static const char *const names[] = {"single_word", "lstrip", "rstrip", "normalized", "special"};
    const json_t *content = json_object_get(entry, "content");
    int32_t id = (int32_t)json_integer_value(json_object_get(entry, "id"));
    const char *text = json_string_value(content);
    size_t n = json_string_length(content);
    tr_token *token = &l->t->tokens[id];
    bool flag[5];

    if (!text || n == 0) return refuse(l, code, content, "added_tokens[%zu].content", i);
    for (int k = 0; k < 5; k++) {
        const json_t *v = json_object_get(entry, names[k]);
        if (!json_is_boolean(v)) return refuse(l, code, v, "added_tokens[%zu].%s", i, names[k]);
        flag[k] = json_is_true(v);
    }
    int32_t in_vocab = vocab_id(l, text, n);
    if (is_same_text(l->t, in_vocab, id, text, n) || tr_added_get(l->t->added, text, n))
        return refuse(l, code, content, "a second id for one string: added_tokens[%zu].content", i);
    if (token->flags && (in_vocab != id || (token->flags & TR_TOKEN_ADDED)))
        return refuse(l, code, content, "a second string for id %d: added_tokens[%zu].content", id,
                      i);

    tr_added_token added = {id, flag[0], flag[1], flag[2], flag[3], flag[4]};
    if (tr_added_insert(l->t->added, text, n, &added, l->err) != TR_OK)
        return tr_within(l->err, "%s", l->name);
    if (!token->flags) *token = translate(l, text, n);
    token->flags |= TR_TOKEN_ADDED | (added.special ? TR_TOKEN_SPECIAL : 0u);
    return TR_OK;
}

static tr_status load_tables(loader *l, const json_t *root)
{
    const json_t *model = json_object_get(root, "model");
    const json_t *added = json_object_get(root, "added_tokens");

    l->vocab = json_object_get(model, "vocab");
    make_byte_chars(l);
    tr_status st = make_table(l, added);
    if (st == TR_OK) st = load_vocab(l);
    if (st == TR_OK) st = load_merges(l, json_object_get(model, "merges"));
    for (size_t i = 0; st == TR_OK && i < json_array_size(added); i++)
        st = load_added_one(l, json_array_get(added, i), i);
    if (st == TR_OK && l->t->ignore_merges && !tr_tokenizer_index_pieces(l->t)) st = no_memory(l);
    return st;
}

/* ---- the whole file -------------------------------------------------------------------------- */

static tr_status parse_root(loader *l, json_t **root, const char *json, size_t n)
{
    const char *nul = n ? memchr(json, 0, n) : NULL;
    json_error_t e;
    bool no_room;

    if (nul) { /* jansson 2.14 does not see one behind a number */
        l->code = "bad_json";
        return tr_fail(l->err, TR_E_INPUT, "%s: bad_json: byte %zu: a NUL byte", l->name,
                       (size_t)(nul - json));
    }
    *root = tr_json_loadb(json, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e, &no_room);
    if (no_room) return no_memory(l);
    if (!*root) {
        l->code = "bad_json";
        return tr_fail(l->err, TR_E_INPUT, "%s: bad_json: byte %d (line %d): %s", l->name,
                       e.position, e.line, e.text);
    }
    if (!json_is_object(*root)) return refuse(l, "bad_json", *root, "the root");
    return TR_OK;
}

tr_status tr_tokenizer_parse(tr_tokenizer **out, const char *json, size_t n, const char *name,
                             const char **code, tr_log *log, tr_err *err)
{
    loader l = {.name = name, .log = log, .err = err};
    json_t *root = NULL;
    tr_status st;

    *out = NULL;
    l.t = calloc(1, sizeof *l.t);
    if (!l.t || !(l.t->added = tr_added_create()) || !(l.t->arena = tr_calloc(n, 1))) {
        st = no_memory(&l);
        goto done;
    }
    st = parse_root(&l, &root, json, n);
    if (st == TR_OK) st = check_model(&l, json_object_get(root, "model"));
    if (st == TR_OK) st = check_frame(&l, root);
    if (st == TR_OK) st = load_tables(&l, root);
    if (st == TR_OK && (st = tr_pretoken_create(&l.t->pretoken, err)) != TR_OK)
        tr_within(err, "%s", name);
    if (st != TR_OK) goto done;

    warn_unknown(&l, root);
    tr_hash128_hex(json, n, 0, l.t->identity);
    char *tight = realloc(l.t->arena, l.t->arena_n ? l.t->arena_n : 1);
    if (tight) l.t->arena = tight;
    *out = l.t;
    l.t = NULL; /* ownership has moved to the caller */

done:
    if (code) *code = l.code;
    json_decref(root);
    free(l.side);
    tr_tokenizer_free(l.t);
    return st;
}

tr_status tr_tokenizer_open(tr_tokenizer **out, const char *path, const char **code, tr_log *log,
                            tr_err *err)
{
    char *text = NULL;
    size_t n;

    *out = NULL;
    if (code) *code = NULL;
    tr_status st = tr_file_read(path, FILE_MAX, &text, &n, err);
    if (st == TR_OK) st = tr_tokenizer_parse(out, text, n, path, code, log, err);
    free(text);
    return st;
}
