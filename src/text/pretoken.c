#include <config.h>

#include "text/pretoken.h"

#include <stdint.h>
#include <stdlib.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "text/utf8.h"

/* clang-format off */
const char *const tr_split_patterns[TR_N_SPLITS] = {
    "\\p{N}{1,3}",
    "[\xe4\xb8\x80-\xe9\xbe\xa5\xe3\x81\x80-\xe3\x82\x9f\xe3\x82\xa0-\xe3\x83\xbf]+",
    ("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"),
};

/* White_Space, without and with CR and LF; PCRE2's own \s also takes U+180E. */
#define SPACE_NO_BREAK \
    "\\x09\\x0b\\x0c\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}" \
    "\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define SPACE SPACE_NO_BREAK "\\r\\n"

/* The same matches, spelled so that nothing is ever given back one character at a time (possessive):
 * a run of a million spaces costs no stack and no second look. tests/test_encode.c compares with the
 * file's spelling. Alternatives 4 to 6 of the third:
 *   \s*[\r\n]+   up to the last line break of the run: groups of (spaces, breaks)
 *   \s+(?!\S)    a run at the end, whole; else all of it but the last character (the run holds no
 *                line break, since alternative 4 did not match)
 *   \s+          what is left is one character */
static const char *const own_spelling[TR_N_SPLITS] = {
    "\\p{N}{1,3}+",
    "[\\x{4e00}-\\x{9fa5}\\x{3040}-\\x{309f}\\x{30a0}-\\x{30ff}]++",
    ("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]++|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]++"
    "|\\x20?[\\p{P}\\p{S}]++[\\r\\n]*+"
    "|(?:[" SPACE_NO_BREAK "]*+[\\r\\n]++)++"
    "|[" SPACE "]++(?![^" SPACE "])|(?:[" SPACE "](?=[" SPACE "]))++|[" SPACE "]"),
};

/* \w of chat.md 1.5. Alphabetic is L, Nl and Other_Alphabetic, which besides marks holds the
 * circled and squared letters listed here; Join_Control is U+200C and U+200D. */
static const char word_class[] =
    "[\\p{L}\\p{M}\\p{Nl}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}\\x{24b6}-\\x{24e9}"
    "\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}]";
/* clang-format on */

struct tr_pretoken {
    pcre2_code *split[TR_N_SPLITS];
    pcre2_code *word;
};

struct tr_pretoken_scratch {
    pcre2_match_data *match;
    pcre2_match_context *context;
};

static tr_status compile(pcre2_code **out, const char *pattern, tr_err *err)
{
    PCRE2_UCHAR8 text[128] = "";
    PCRE2_SIZE at;
    int code;

    *out = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF, &code, &at, NULL);
    if (!*out) {
        pcre2_get_error_message(code, text, sizeof text);
        return tr_fail(err, code == PCRE2_ERROR_HEAP_FAILED ? TR_E_MEMORY : TR_E_INPUT,
                       "PCRE2 cannot compile the pre-tokenizer: %s", (const char *)text);
    }
    /* Where executable memory is refused this fails, and pcre2_match interprets. */
    (void)pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE);
    return TR_OK;
}

tr_status tr_pretoken_create(tr_pretoken **out, tr_err *err)
{
    tr_status st = TR_OK;

    *out = NULL;
    tr_pretoken *p = calloc(1, sizeof *p);
    if (!p) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < TR_N_SPLITS && st == TR_OK; i++)
        st = compile(&p->split[i], own_spelling[i], err);
    if (st == TR_OK) st = compile(&p->word, word_class, err);
    if (st == TR_OK) {
        *out = p;
        p = NULL;
    }
    tr_pretoken_free(p);
    return st;
}

void tr_pretoken_free(tr_pretoken *p)
{
    if (!p) return;
    for (int i = 0; i < TR_N_SPLITS; i++)
        pcre2_code_free(p->split[i]);
    pcre2_code_free(p->word);
    free(p);
}

tr_pretoken_scratch *tr_pretoken_scratch_create(void)
{
    tr_pretoken_scratch *s = calloc(1, sizeof *s);

    if (!s) return NULL;
    s->match = pcre2_match_data_create(1, NULL);
    s->context = pcre2_match_context_create(NULL);
    if (!s->match || !s->context) {
        tr_pretoken_scratch_free(s);
        return NULL;
    }
    /* The limits guard against patterns from strangers; ours are linear, and a long text must not
     * run into them. */
    pcre2_set_match_limit(s->context, UINT32_MAX);
    pcre2_set_depth_limit(s->context, UINT32_MAX);
    return s;
}

void tr_pretoken_scratch_free(tr_pretoken_scratch *s)
{
    if (!s) return;
    pcre2_match_data_free(s->match);
    pcre2_match_context_free(s->context);
    free(s);
}

/* pcre2_match on text that is known to be well-formed; the interpreter where JIT runs out of its
 * stack. */
static int match(const pcre2_code *code, tr_pretoken_scratch *s, const char *text, size_t n,
                 size_t from, uint32_t options)
{
    PCRE2_SPTR subject = (PCRE2_SPTR)text;

    options |= PCRE2_NO_UTF_CHECK;
    int r = pcre2_match(code, subject, n, from, options, s->match, s->context);
    if (r == PCRE2_ERROR_JIT_STACKLIMIT)
        r = pcre2_match(code, subject, n, from, options | PCRE2_NO_JIT, s->match, s->context);
    return r;
}

typedef struct splitter {
    const tr_pretoken *p;
    tr_pretoken_scratch *s;
    tr_piece_sink *sink;
    void *ctx;
    tr_err *err;
} splitter;

/* Cut text by step i and hand the pieces, gaps and matches alike, to the next step. */
static tr_status split(const splitter *z, int step, const char *text, size_t n)
{
    const PCRE2_SIZE *found = pcre2_get_ovector_pointer(z->s->match);
    size_t done = 0;
    tr_status st = TR_OK;

    if (step == TR_N_SPLITS)
        return z->sink(z->ctx, text, n) ? TR_OK : tr_fail(z->err, TR_E_MEMORY, "out of memory");

    while (done < n && st == TR_OK) {
        int r = match(z->p->split[step], z->s, text, n, done, 0);
        if (r == PCRE2_ERROR_NOMATCH) return split(z, step + 1, text + done, n - done);
        if (r < 0)
            return tr_fail(z->err, r == PCRE2_ERROR_NOMEMORY ? TR_E_MEMORY : TR_E_INPUT,
                           "pre-tokenizer: PCRE2 reports error %d", r);
        size_t begin = found[0], end = found[1]; /* the next step writes over them */
        if (begin > done) st = split(z, step + 1, text + done, begin - done);
        if (st == TR_OK) st = split(z, step + 1, text + begin, end - begin);
        done = end;
    }
    return st;
}

tr_status tr_pretoken_split(const tr_pretoken *p, tr_pretoken_scratch *s, const char *text,
                            size_t n, tr_piece_sink *sink, void *ctx, tr_err *err)
{
    splitter z = {p, s, sink, ctx, err};

    return n ? split(&z, 0, text, n) : TR_OK;
}

/* ---- single characters ----------------------------------------------------------------------- */

/* Where the last character of well-formed text begins; n > 0. */
static size_t last_character(const char *text, size_t n)
{
    size_t at = n - 1;

    while (at > 0 && ((unsigned char)text[at] & 0xc0) == 0x80)
        at--;
    return at;
}

bool tr_word_first(const tr_pretoken *p, tr_pretoken_scratch *s, const char *text, size_t n)
{
    return n > 0 && match(p->word, s, text, n, 0, PCRE2_ANCHORED) >= 0;
}

bool tr_word_last(const tr_pretoken *p, tr_pretoken_scratch *s, const char *text, size_t n)
{
    return n > 0 && match(p->word, s, text, n, last_character(text, n), PCRE2_ANCHORED) >= 0;
}

static bool is_space(uint32_t c)
{
    return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

static bool space_at(const char *text, size_t n, int *len)
{
    const unsigned char *u = (const unsigned char *)text;

    *len = tr_utf8_next(u, n);
    return *len > 0 && is_space(tr_utf8_decode(u, *len));
}

size_t tr_space_first(const char *text, size_t n)
{
    size_t i = 0;

    for (int len; i < n && space_at(text + i, n - i, &len); i += (size_t)len) {
    }
    return i;
}

size_t tr_space_last(const char *text, size_t n)
{
    size_t begin = n;
    int len;

    while (begin > 0) {
        size_t at = last_character(text, begin);
        if (!space_at(text + at, begin - at, &len)) break;
        begin = at;
    }
    return n - begin;
}
