/* A chat request to a prompt; the first byte chooses the format and the options. With --literal-content nothing of the
 * client's stands outside literal segments: a request whose special characters are exchanged for others gives the same
 * segments and the same text in all that are not literal, and the same special tokens. */
#include <config.h>

#include <strings.h>

#include "tests/fuzz/fuzz.h"
#include "tests/vectors.h"
#include "text/chat.h"
#include "text/utf8.h"

static tr_tokenizer *tokenizer; /* loaded once, then only read */
static tr_encoder *encoder;

static void load(void)
{
    char path[4096];
    tr_err err = {0};
    tr_vector_path(path, sizeof path, "chat/tokenizer_a.json");
    FUZZ_CHECK(tr_tokenizer_open(&tokenizer, path, NULL, NULL, &err) == TR_OK, "%s", err.text);
    encoder = tr_encoder_create(tokenizer);
    FUZZ_CHECK(encoder, "out of memory");
}

/* Exchange < for DEL (not in dsv31, where </think> in an answer means something) and the full-width bar for its neighbour,
 * also where they are escaped: one to one, so that keys that differ still do. JSON needs none of them. */
static void disguise(char *s, size_t n, bool angle)
{
    for (size_t i = 0; i < n; i++) {
        if (angle && (s[i] == '<' || s[i] == 0x7f)) {
            s[i] = s[i] == '<' ? 0x7f : '<';
        } else if (n - i >= 3 &&
                   (!memcmp(s + i, "\xef\xbd\x9c", 3) || !memcmp(s + i, "\xef\xbd\x9d", 3))) {
            s[i + 2] ^= 1;
            i += 2;
        } else if (n - i >= 6 && !strncasecmp(s + i, "\\uff5", 5) && strchr("cCdD", s[i + 5])) {
            s[i + 5] = (char)(s[i + 5] == 'c' || s[i + 5] == 'C' ? s[i + 5] + 1 : s[i + 5] - 1);
            i += 5;
        } else if (angle && n - i >= 6 &&
                   (!strncasecmp(s + i, "\\u003c", 6) || !strncasecmp(s + i, "\\u007f", 6))) {
            memcpy(s + i + 4, s[i + 4] == '3' ? "7f" : "3c", 2);
            i += 5;
        }
    }
}

/* An escaped backslash or letter of an escape would be decoded twice where arguments are a string: not one to one. */
static bool can_disguise(const char *s, size_t n)
{
    for (size_t i = 0; i + 6 <= n; i++)
        if (!strncasecmp(s + i, "\\u00", 4) && strncasecmp(s + i, "\\u003c", 6) &&
            strncasecmp(s + i, "\\u007f", 6))
            return false;
    return true;
}

typedef struct made {
    tr_status st;
    tr_chat_prompt p;
    tr_chat_refusal refusal;
    int32_t *added; /* the added tokens of the prompt, in order */
    size_t n_added;
} made;

/* Is id an added token? Its bytes, where they look like one, are looked up again. */
static bool is_added(int32_t id)
{
    char text[128];
    size_t n;
    const char *bytes = tr_tokenizer_bytes(tokenizer, id, &n);
    if (n >= sizeof text || memchr(bytes, 0, n)) return false;
    memcpy(text, bytes, n);
    text[n] = 0;
    return tr_tokenizer_added(tokenizer, text) == id;
}

static made make(const char *text, size_t n, const tr_chat_options *o)
{
    made m = {0};
    tr_jtext *t = NULL;
    tr_err err = {0};
    bool thinking = false;

    m.st = tr_jtext_parse(&t, text, n, NULL, &err);
    if (m.st != TR_OK) return m;
    const tr_jnode *root = tr_jtext_root(t);
    m.refusal.code = "";
    m.st = tr_chat_thinking(&thinking, t, root, o, &m.refusal, &err);
    if (m.st == TR_OK) m.st = tr_chat_encode(&m.p, t, root, thinking, o, &m.refusal, &err);
    FUZZ_CHECK(m.st == TR_OK || (m.st == TR_E_INPUT && m.refusal.code[0] && !m.p.text.s), "%s",
               err.text);
    tr_jtext_free(t);
    if (m.st != TR_OK) return m;

    size_t at = 0, n_ids;
    int32_t *ids;
    FUZZ_CHECK(tr_utf8_valid(m.p.text.s, m.p.text.n, NULL), "the prompt is no UTF-8");
    for (size_t i = 0; i < m.p.n_segments; i++) {
        const tr_segment *s = &m.p.segments[i];
        FUZZ_CHECK(s->text == m.p.text.s + at && s->n > 0, "segment %zu", i);
        FUZZ_CHECK(!s->literal || o->literal_content, "segment %zu is literal", i);
        FUZZ_CHECK(!i || s->literal != s[-1].literal, "segments %zu and %zu are one", i - 1, i);
        at += s->n;
    }
    FUZZ_CHECK(at == m.p.text.n, "segments have %zu of %zu bytes", at, m.p.text.n);
    FUZZ_CHECK(tr_encode(encoder, m.p.segments, m.p.n_segments, &ids, &n_ids, &err) == TR_OK, "%s",
               err.text);
    for (size_t i = 0; i < n_ids; i++)
        if (is_added(ids[i])) ids[m.n_added++] = ids[i];
    m.added = ids;
    return m;
}

static void compare(const made *a, const made *b)
{
    FUZZ_CHECK(a->st == b->st, "one is refused: %s, %s", a->refusal.code, b->refusal.code);
    if (a->st != TR_OK) return;
    FUZZ_CHECK(a->p.n_segments == b->p.n_segments && a->p.start == b->p.start, "other segments");
    for (size_t i = 0; i < a->p.n_segments; i++) {
        const tr_segment *s = &a->p.segments[i], *t = &b->p.segments[i];
        FUZZ_CHECK(s->literal == t->literal && s->n == t->n, "segment %zu: %zu and %zu bytes", i,
                   s->n, t->n);
        FUZZ_CHECK(s->literal || !memcmp(s->text, t->text, s->n), "segment %zu: the client's: %.*s",
                   i, (int)s->n, s->text);
    }
    FUZZ_CHECK(a->n_added == b->n_added &&
                   !memcmp(a->added, b->added, a->n_added * sizeof *a->added),
               "a client made a special token: %s", a->p.text.s);
}

static void unmake(made *m)
{
    tr_chat_prompt_free(&m->p);
    free(m->added);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (!tokenizer) load();
    uint8_t first = fuzz_take_byte(&data, &n);
    const tr_chat_options o = {
        .format = first & 1 ? TR_CHAT_DSV31 : TR_CHAT_DSV32,
        .literal_content = first & 2,
        .default_thinking = first & 4,
        .thinking_only = first & 8,
        .allow_tools = first & 16,
        .response_format_in_prompt = first & 32,
        .dsv31_assistant_after_tool = first & 64,
    };
    char *text = fuzz_copy(data, n);
    made a = make(text, n, &o);
    if (o.literal_content && can_disguise(text, n)) {
        disguise(text, n, o.format == TR_CHAT_DSV32);
        made b = make(text, n, &o);
        compare(&a, &b);
        unmake(&b);
    }
    unmake(&a);
    free(text);
    return 0;
}
