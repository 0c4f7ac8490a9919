#include <config.h>

#include "engine/pages.h"

#include <assert.h>
#include <stdlib.h>

#include "base/size.h"
#include "engine/prefix.h"
#include "kernels/kernels.h"

typedef struct aging { /* a page without references that steps in flight may still read */
    uint64_t step;     /* it was dropped in */
    int32_t page;
} aging;

struct tr_pages {
    int n, ring;
    int n_free, n_aging;
    uint64_t now;        /* the step about to be planned */
    tr_prefix *prefix;   /* NULL: no index */
    uint64_t *idle_from; /* [n] the step an idle page was dropped in */
    int32_t *references; /* [n] */
    uint64_t *free_bits; /* [n_words] bit set: can be taken */
    int n_words;
    int first_word; /* no free bit lies in the words before it */
    aging *aging;   /* [n] a queue, oldest at i_aging; a page is in it once at most */
    int i_aging;
};

static void set_free(tr_pages *p, int32_t page)
{
    p->free_bits[page / 64] |= UINT64_C(1) << (page % 64);
    if (page / 64 < p->first_word) p->first_word = page / 64;
    p->n_free++;
}

tr_pages *tr_pages_create(int n_pages, int ring, bool prefix_cache)
{
    if (n_pages < 1 || ring < 1) return NULL;
    tr_pages *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->n = n_pages;
    p->ring = ring;
    p->n_words = (int)tr_ceil_div((size_t)n_pages, 64);
    p->references = tr_calloc((size_t)n_pages, sizeof *p->references);
    p->free_bits = tr_calloc((size_t)p->n_words, sizeof *p->free_bits);
    p->aging = tr_calloc((size_t)n_pages, sizeof *p->aging);
    bool ok = p->references && p->free_bits && p->aging;
    if (ok && prefix_cache) {
        p->prefix = tr_prefix_create(n_pages);
        p->idle_from = tr_calloc((size_t)n_pages, sizeof *p->idle_from);
        ok = p->prefix && p->idle_from;
    }
    if (!ok) {
        tr_pages_free(p);
        return NULL;
    }
    for (int i = 0; i < n_pages; i++)
        set_free(p, i);
    return p;
}

void tr_pages_free(tr_pages *p)
{
    if (!p) return;
    free(p->references);
    free(p->free_bits);
    free(p->aging);
    free(p->idle_from);
    tr_prefix_free(p->prefix);
    free(p);
}

int tr_pages_take(tr_pages *p, int n, int32_t *page)
{
    int n_taken = 0;

    if (n < 0 || n > p->n_free) return 0;
    for (int w = p->first_word; n_taken < n; w++) {
        assert(w < p->n_words);
        while (p->free_bits[w] && n_taken < n) {
            int32_t id = w * 64 + __builtin_ctzll(p->free_bits[w]);
            p->free_bits[w] &= p->free_bits[w] - 1;
            assert(p->references[id] == 0);
            p->references[id] = 1;
            page[n_taken++] = id;
        }
        p->first_word = w;
    }
    p->n_free -= n;
    return 1;
}

void tr_pages_share(tr_pages *p, const int32_t *page, int n)
{
    for (int i = 0; i < n; i++) {
        assert(page[i] >= 0 && page[i] < p->n);
        if (!p->references[page[i]]) {
            assert(tr_pages_indexed(p, page[i]));
            tr_prefix_busy(p->prefix, page[i]);
        }
        p->references[page[i]]++;
    }
}

/* Without references since `step`. */
static void age(tr_pages *p, int32_t page, uint64_t step)
{
    p->aging[(p->i_aging + p->n_aging) % p->n] = (aging){.step = step, .page = page};
    p->n_aging++;
}

void tr_pages_drop(tr_pages *p, const int32_t *page, int n, uint64_t step)
{
    for (int i = n - 1; i >= 0; i--) {
        assert(page[i] >= 0 && page[i] < p->n && p->references[page[i]] > 0);
        if (--p->references[page[i]]) continue;
        if (tr_pages_indexed(p, page[i])) {
            tr_prefix_idle(p->prefix, page[i]);
            p->idle_from[page[i]] = step;
        } else {
            age(p, page[i], step);
        }
    }
}

static bool is_mature(const tr_pages *p, uint64_t step)
{
    return p->now >= step && p->now - step >= (uint64_t)p->ring;
}

void tr_pages_step(tr_pages *p, uint64_t step)
{
    p->now = step;
    while (p->n_aging) {
        aging oldest = p->aging[p->i_aging];
        if (!is_mature(p, oldest.step)) break;
        set_free(p, oldest.page);
        p->i_aging = (p->i_aging + 1) % p->n;
        p->n_aging--;
    }
}

int tr_pages_match(const tr_pages *p, const int32_t *token, int n_pages, int32_t *page)
{
    int n = 0;

    for (; p->prefix && n < n_pages; n++) {
        page[n] = tr_prefix_find(p->prefix, n ? page[n - 1] : -1, token + n * TR_PAGE_TOKENS);
        if (page[n] < 0) break;
    }
    return n;
}

int tr_pages_known(const tr_pages *p, const int32_t *token, int n_pages)
{
    int32_t page = -1;
    int n = 0;

    for (; p->prefix && n < n_pages; n++) {
        page = tr_prefix_find(p->prefix, page, token + n * TR_PAGE_TOKENS);
        if (page < 0) break;
    }
    return n;
}

bool tr_pages_enter(tr_pages *p, const int32_t *page, int i, const int32_t *token)
{
    assert(p->references[page[i]] > 0);
    if (!p->prefix || (i && !tr_prefix_has(p->prefix, page[i - 1]))) return false;
    return tr_prefix_has(p->prefix, page[i]) ||
           tr_prefix_enter(p->prefix, i ? page[i - 1] : -1, token, page[i]);
}

void tr_pages_distrust(tr_pages *p, const int32_t *page, int n)
{
    for (int i = 0; p->prefix && i < n; i++)
        tr_prefix_distrust(p->prefix, page[i]);
}

void tr_pages_evict(tr_pages *p, int n)
{
    for (; p->prefix && n > 0; n--) {
        int32_t page = tr_prefix_evict(p->prefix);
        if (page < 0) return;
        /* Behind pages dropped later it may age for longer than it must, never for less. */
        if (is_mature(p, p->idle_from[page]))
            set_free(p, page);
        else
            age(p, page, p->idle_from[page]);
    }
}

int tr_pages_available(const tr_pages *p)
{
    return p->n_free;
}

int tr_pages_held(const tr_pages *p)
{
    return p->n - p->n_free - p->n_aging - tr_pages_idle(p);
}

int tr_pages_idle(const tr_pages *p)
{
    return p->prefix ? tr_prefix_n_idle(p->prefix) : 0;
}

int tr_pages_aging(const tr_pages *p)
{
    return p->n_aging;
}

int tr_pages_total(const tr_pages *p)
{
    return p->n;
}

int tr_pages_references(const tr_pages *p, int32_t page)
{
    return p->references[page];
}

bool tr_pages_indexed(const tr_pages *p, int32_t page)
{
    return p->prefix && tr_prefix_has(p->prefix, page);
}
