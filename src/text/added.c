#include <config.h>

#include "text/added.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"

/* A trie per pass. Matching walks from each position that a token's first byte stands at, as far as
 * the longest token at most; an automaton would do no better, since leftmost-longest also has to
 * look as far ahead. */
typedef struct node {
    int32_t child, sibling; /* -1: none */
    int32_t token;          /* the token that ends here, or -1 */
    unsigned char byte;
} node;

typedef struct trie {
    node *nodes;
    int32_t n, cap;
    int32_t first[256]; /* node of a first byte, or -1 */
} trie;

struct tr_added {
    trie pass[2]; /* [0]: normalized false, [1]: normalized true (chat.md 1.5) */
    tr_added_token *tokens;
    int32_t n_tokens, cap_tokens;
};

tr_added *tr_added_create(void)
{
    tr_added *a = calloc(1, sizeof *a);

    if (!a) return NULL;
    for (int i = 0; i < 256; i++)
        a->pass[0].first[i] = a->pass[1].first[i] = -1;
    return a;
}

void tr_added_free(tr_added *a)
{
    if (!a) return;
    free(a->pass[0].nodes);
    free(a->pass[1].nodes);
    free(a->tokens);
    free(a);
}

/* ---- the trie -------------------------------------------------------------------------------- */

/* The node below `at` (-1: the root) for a byte, or -1. */
static int32_t step(const trie *t, int32_t at, unsigned char byte)
{
    if (at < 0) return t->first[byte];
    int32_t i = t->nodes[at].child;
    while (i >= 0 && t->nodes[i].byte != byte)
        i = t->nodes[i].sibling;
    return i;
}

/* Room for n more elements in a list counted by int32_t. */
static bool room(void **list, int32_t n, int32_t *cap, size_t more, size_t element)
{
    size_t need, wanted = *cap < 64 ? 64 : (size_t)*cap, bytes;

    if (!tr_add(&need, (size_t)n, more) || need > INT32_MAX / 2) return false;
    if (need <= (size_t)*cap) return true;
    while (wanted < need)
        wanted *= 2;
    if (!tr_mul(&bytes, wanted, element)) return false;
    void *p = realloc(*list, bytes);
    if (!p) return false;
    *list = p;
    *cap = (int32_t)wanted;
    return true;
}

/* The node at the end of text, made where it is missing; -1: out of memory. */
static int32_t make_path(trie *t, const char *text, size_t n)
{
    void *nodes = t->nodes;
    int32_t at = -1;

    bool ok = room(&nodes, t->n, &t->cap, n, sizeof *t->nodes);
    t->nodes = nodes;
    if (!ok) return -1;
    for (size_t i = 0; i < n; i++) {
        unsigned char byte = (unsigned char)text[i];
        int32_t next = step(t, at, byte);
        if (next < 0) {
            next = t->n++;
            t->nodes[next] = (node){-1, -1, -1, byte};
            if (at < 0) {
                t->first[byte] = next;
            } else {
                t->nodes[next].sibling = t->nodes[at].child;
                t->nodes[at].child = next;
            }
        }
        at = next;
    }
    return at;
}

static int32_t find_path(const trie *t, const char *text, size_t n)
{
    int32_t at = -1;

    for (size_t i = 0; i < n; i++) {
        at = step(t, at, (unsigned char)text[i]);
        if (at < 0) return -1;
    }
    return at < 0 ? -1 : t->nodes[at].token;
}

const tr_added_token *tr_added_get(const tr_added *a, const char *text, size_t n)
{
    for (int i = 0; i < 2; i++) {
        int32_t token = find_path(&a->pass[i], text, n);
        if (token >= 0) return &a->tokens[token];
    }
    return NULL;
}

tr_status tr_added_insert(tr_added *a, const char *text, size_t n, const tr_added_token *token,
                          tr_err *err)
{
    void *tokens = a->tokens;

    if (tr_added_get(a, text, n)) return tr_fail(err, TR_E_INPUT, "a text listed twice");
    bool ok = room(&tokens, a->n_tokens, &a->cap_tokens, 1, sizeof *a->tokens);
    a->tokens = tokens;
    if (!ok) return tr_fail(err, TR_E_MEMORY, "out of memory");

    trie *t = &a->pass[token->normalized];
    int32_t at = make_path(t, text, n);
    if (at < 0) return tr_fail(err, TR_E_MEMORY, "out of memory");
    t->nodes[at].token = a->n_tokens;
    a->tokens[a->n_tokens++] = *token;
    return TR_OK;
}

/* ---- matching -------------------------------------------------------------------------------- */

static bool append_cut(tr_cuts *list, size_t begin, size_t end, int32_t id)
{
    if (list->n == list->cap) {
        size_t cap = list->cap ? list->cap : 32, bytes;
        if (!tr_mul(&cap, cap, 2) || !tr_mul(&bytes, cap, sizeof *list->cut)) return false;
        tr_cut *p = realloc(list->cut, bytes);
        if (!p) return false;
        list->cut = p;
        list->cap = cap;
    }
    list->cut[list->n++] = (tr_cut){begin, end, id};
    return true;
}

/* The leftmost of the longest matches in text[from, end); false: none. */
static bool find(const trie *t, const char *text, size_t from, size_t end, size_t *at, size_t *n,
                 int32_t *token)
{
    for (size_t i = from; i < end; i++) {
        int32_t k = t->first[(unsigned char)text[i]];
        *token = -1;
        for (size_t j = i; k >= 0;) {
            j++;
            if (t->nodes[k].token >= 0) {
                *token = t->nodes[k].token;
                *n = j - i;
            }
            if (j == end) break;
            k = step(t, k, (unsigned char)text[j]);
        }
        if (*token >= 0) {
            *at = i;
            return true;
        }
    }
    return false;
}

typedef struct cutter {
    const tr_added *a;
    const tr_pretoken *p;
    tr_pretoken_scratch *s;
    const char *text;
    tr_cuts *out;
} cutter;

/* Tokens of one trie in text[from, end), which lies inside the gap [begin, gap_end) that the pass
 * before has left: neighbours and White_Space are looked at within the gap. *done: where the last
 * cut ended. */
static bool cut_run(const cutter *c, const trie *t, size_t gap_begin, size_t gap_end, size_t from,
                    size_t end, size_t *done)
{
    size_t at, n;
    int32_t i_token;

    while (from < end && find(t, c->text, from, end, &at, &n, &i_token)) {
        const tr_added_token *token = &c->a->tokens[i_token];
        size_t begin = at, stop = at + n;

        from = stop;
        if (token->single_word &&
            (tr_word_last(c->p, c->s, c->text + gap_begin, begin - gap_begin) ||
             tr_word_first(c->p, c->s, c->text + stop, gap_end - stop)))
            continue; /* dropped, without trying a shorter one */
        if (token->lstrip) begin -= tr_space_last(c->text + *done, begin - *done);
        if (token->rstrip) stop += tr_space_first(c->text + stop, gap_end - stop);
        if (begin > *done && !append_cut(c->out, *done, begin, -1)) return false;
        if (!append_cut(c->out, begin, stop, token->id)) return false;
        *done = stop;
        from = stop;
    }
    return true;
}

/* One pass over one gap, through the stretches that are not literal. */
static bool cut_gap(const cutter *c, const trie *t, tr_cut gap, const tr_stretch *stretches,
                    size_t n_stretches, size_t *i_stretch)
{
    size_t done = gap.begin;

    while (*i_stretch < n_stretches && stretches[*i_stretch].end <= gap.begin)
        (*i_stretch)++;
    for (size_t i = *i_stretch; i < n_stretches; i++) {
        size_t begin = i ? stretches[i - 1].end : 0, end = stretches[i].end;
        if (begin >= gap.end) break;
        if (stretches[i].literal) continue;
        if (begin < done) begin = done;
        if (end > gap.end) end = gap.end;
        if (begin < end && !cut_run(c, t, gap.begin, gap.end, begin, end, &done)) return false;
    }
    return done == gap.end || append_cut(c->out, done, gap.end, -1);
}

tr_status tr_added_cut(const tr_added *a, const tr_pretoken *p, tr_pretoken_scratch *s,
                       const char *text, size_t n, const tr_stretch *stretches, size_t n_stretches,
                       tr_cuts *pass, tr_cuts *out, tr_err *err)
{
    cutter c = {a, p, s, text, pass};
    size_t i_stretch = 0;
    bool ok;

    pass->n = out->n = 0;
    ok = n == 0 || cut_gap(&c, &a->pass[0], (tr_cut){0, n, -1}, stretches, n_stretches, &i_stretch);
    c.out = out;
    i_stretch = 0;
    for (size_t i = 0; ok && i < pass->n; i++) {
        tr_cut cut = pass->cut[i];
        ok = cut.id >= 0 ? append_cut(out, cut.begin, cut.end, cut.id)
                         : cut_gap(&c, &a->pass[1], cut, stretches, n_stretches, &i_stretch);
    }
    return ok ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
}
