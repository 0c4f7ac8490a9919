#include <config.h>

#include "engine/prefix.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"
#include "kernels/kernels.h"

enum { PAGE_BYTES = TR_PAGE_TOKENS * sizeof(int32_t) };

typedef enum state { ABSENT, BUSY, IDLE } state;

typedef struct node {
    uint64_t hash;          /* of all tokens up to the page's last */
    int32_t parent;         /* -1: none */
    int32_t n_children;     /* nodes it is the parent of */
    int32_t next_same;      /* of the bucket's chain */
    int32_t older, younger; /* of the idle ones */
    uint8_t state;
    bool found; /* is in its bucket's chain */
} node;

struct tr_prefix {
    int n_pages, n_idle;
    node *node;     /* [n_pages] by page */
    int32_t *token; /* [n_pages, TR_PAGE_TOKENS] */
    int32_t *bucket;
    uint64_t mask;          /* of buckets */
    int32_t oldest, newest; /* idle nodes, -1: none */
};

tr_prefix *tr_prefix_create(int n_pages)
{
    tr_prefix *x = n_pages > 0 ? calloc(1, sizeof *x) : NULL;
    size_t n_buckets = 16, n_tokens;

    if (!x) return NULL;
    while (n_buckets < 2 * (size_t)n_pages)
        n_buckets *= 2;
    x->n_pages = n_pages;
    x->mask = n_buckets - 1;
    x->oldest = x->newest = -1;
    x->node = tr_calloc((size_t)n_pages, sizeof *x->node);
    x->bucket = tr_calloc(n_buckets, sizeof *x->bucket);
    if (tr_mul(&n_tokens, (size_t)n_pages, TR_PAGE_TOKENS))
        x->token = tr_calloc(n_tokens, sizeof *x->token);
    if (!x->node || !x->bucket || !x->token) {
        tr_prefix_free(x);
        return NULL;
    }
    for (size_t i = 0; i < n_buckets; i++)
        x->bucket[i] = -1;
    return x;
}

void tr_prefix_free(tr_prefix *x)
{
    if (!x) return;
    free(x->node);
    free(x->token);
    free(x->bucket);
    free(x);
}

static uint64_t hash_of(const tr_prefix *x, int32_t parent, const int32_t *token)
{
    return tr_hash64(token, PAGE_BYTES, parent < 0 ? 0 : x->node[parent].hash);
}

static int32_t find(const tr_prefix *x, uint64_t hash, int32_t parent, const int32_t *token)
{
    int32_t page = x->bucket[hash & x->mask];

    for (; page >= 0; page = x->node[page].next_same) {
        const node *n = &x->node[page];
        if (n->hash == hash && n->parent == parent &&
            !memcmp(x->token + (size_t)page * TR_PAGE_TOKENS, token, PAGE_BYTES))
            break;
    }
    return page;
}

int32_t tr_prefix_find(const tr_prefix *x, int32_t parent, const int32_t *token)
{
    return find(x, hash_of(x, parent, token), parent, token);
}

bool tr_prefix_enter(tr_prefix *x, int32_t parent, const int32_t *token, int32_t page)
{
    node *n = &x->node[page];

    assert(page >= 0 && page < x->n_pages && n->state == ABSENT && parent != page);
    if (parent >= 0 && !x->node[parent].found) return false;
    uint64_t hash = hash_of(x, parent, token);
    if (find(x, hash, parent, token) >= 0) return false;
    *n = (node){
        .hash = hash,
        .parent = parent,
        .next_same = x->bucket[hash & x->mask],
        .older = -1,
        .younger = -1,
        .state = BUSY,
        .found = true,
    };
    memcpy(x->token + (size_t)page * TR_PAGE_TOKENS, token, PAGE_BYTES);
    x->bucket[hash & x->mask] = page;
    if (parent >= 0) x->node[parent].n_children++;
    return true;
}

bool tr_prefix_has(const tr_prefix *x, int32_t page)
{
    return x->node[page].state != ABSENT;
}

void tr_prefix_distrust(tr_prefix *x, int32_t page)
{
    node *n = &x->node[page];
    int32_t *at = &x->bucket[n->hash & x->mask];

    if (n->state == ABSENT || !n->found) return;
    while (*at != page)
        at = &x->node[*at].next_same;
    *at = n->next_same;
    n->found = false;
}

void tr_prefix_idle(tr_prefix *x, int32_t page)
{
    node *n = &x->node[page];

    assert(n->state == BUSY);
    n->state = IDLE;
    n->younger = -1;
    n->older = x->newest;
    *(x->newest < 0 ? &x->oldest : &x->node[x->newest].younger) = page;
    x->newest = page;
    x->n_idle++;
}

void tr_prefix_busy(tr_prefix *x, int32_t page)
{
    node *n = &x->node[page];

    assert(n->state == IDLE);
    *(n->older < 0 ? &x->oldest : &x->node[n->older].younger) = n->younger;
    *(n->younger < 0 ? &x->newest : &x->node[n->younger].older) = n->older;
    n->state = BUSY;
    x->n_idle--;
}

int32_t tr_prefix_evict(tr_prefix *x)
{
    const int32_t page = x->oldest;

    if (page < 0) return -1;
    node *n = &x->node[page];
    assert(n->n_children == 0);
    tr_prefix_distrust(x, page);
    tr_prefix_busy(x, page); /* out of the list */
    n->state = ABSENT;
    if (n->parent >= 0) x->node[n->parent].n_children--;
    return page;
}

int tr_prefix_n_idle(const tr_prefix *x)
{
    return x->n_idle;
}
