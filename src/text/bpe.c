#include <config.h>

#include "text/bpe.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"

enum {
    NO_MERGE = INT32_MAX,   /* rank of a pair that does not merge */
    TRIM_SYMBOLS = 1 << 16, /* scratch kept between texts: 2.5 MiB */
};

typedef struct
    symbol {    /* a doubly linked list in an array; slot i stands for the text from byte i */
    int32_t id; /* -1: swallowed by a symbol on its left */
    int32_t prev, next; /* -1: none */
    int32_t rank;       /* of the merge with next, or NO_MERGE */
} symbol;

/* A pair that may merge: its rank above, its left symbol below, so that the smallest number is the
 * next merge. */
typedef uint64_t candidate;

struct tr_bpe {
    symbol *symbols;
    candidate *heap;
    size_t cap, heap_cap, n_heap;
};

/* ---- growing lists --------------------------------------------------------------------------- */

/* A list of cap elements made to hold `need`: doubles, so appending is linear in total. */
static bool grow(void **list, size_t *cap, size_t need, size_t element)
{
    size_t wanted = *cap < 64 ? 64 : *cap, bytes;

    if (need <= *cap) return true;
    while (wanted < need)
        if (!tr_mul(&wanted, wanted, 2)) return false;
    if (!tr_mul(&bytes, wanted, element)) return false;
    void *p = realloc(*list, bytes);
    if (!p) return false;
    *list = p;
    *cap = wanted;
    return true;
}

bool tr_ids_reserve(tr_ids *ids, size_t n)
{
    void *list = ids->id;
    size_t need;

    if (!tr_add(&need, ids->n, n)) return false;
    bool ok = grow(&list, &ids->cap, need, sizeof *ids->id);
    ids->id = list;
    return ok;
}

bool tr_ids_append(tr_ids *ids, const int32_t *id, size_t n)
{
    if (!tr_ids_reserve(ids, n)) return false;
    if (n) memcpy(ids->id + ids->n, id, n * sizeof *id);
    ids->n += n;
    return true;
}

/* ---- pairs ----------------------------------------------------------------------------------- */

/* The finaliser of splitmix64: every bit of the pair reaches the low bits. */
static size_t pair_hash(int32_t left, int32_t right)
{
    uint64_t x = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;

    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return (size_t)(x ^ x >> 31);
}

bool tr_merges_create(tr_merges *m, size_t n)
{
    size_t n_slots = 16;

    while (n_slots / 2 < n)
        if (!tr_mul(&n_slots, n_slots, 2)) return false;
    m->slot = tr_calloc(n_slots, sizeof *m->slot);
    if (!m->slot) return false;
    m->n_slots = n_slots;
    for (size_t i = 0; i < n_slots; i++)
        m->slot[i].left = -1;
    return true;
}

static tr_merge *merge_slot(const tr_merges *m, int32_t left, int32_t right)
{
    size_t i = pair_hash(left, right) & (m->n_slots - 1);

    while (m->slot[i].left >= 0 && (m->slot[i].left != left || m->slot[i].right != right))
        i = (i + 1) & (m->n_slots - 1);
    return &m->slot[i];
}

void tr_merges_add(tr_merges *m, tr_merge merge)
{
    tr_merge *slot = merge_slot(m, merge.left, merge.right);
    if (slot->left < 0) *slot = merge;
}

const tr_merge *tr_merges_find(const tr_merges *m, int32_t left, int32_t right)
{
    const tr_merge *slot = merge_slot(m, left, right);
    return slot->left < 0 ? NULL : slot;
}

void tr_merges_free(tr_merges *m)
{
    free(m->slot);
    *m = (tr_merges){0};
}

static int32_t pair_rank(const tr_merges *m, int32_t left, int32_t right)
{
    const tr_merge *merge = tr_merges_find(m, left, right);
    return merge ? merge->rank : NO_MERGE;
}

/* ---- short pieces ---------------------------------------------------------------------------- */

static bool merge_short(const tr_merges *m, const int32_t byte_id[256], const char *piece, size_t n,
                        tr_ids *out)
{
    int32_t id[TR_BPE_SHORT], rank[TR_BPE_SHORT]; /* rank[i]: of the pair i, i + 1 */

    for (size_t i = 0; i < n; i++)
        id[i] = byte_id[(unsigned char)piece[i]];
    for (size_t i = 0; i + 1 < n; i++)
        rank[i] = pair_rank(m, id[i], id[i + 1]);

    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i; /* of equal ranks the leftmost stays */
        if (rank[best] == NO_MERGE) break;

        id[best] = tr_merges_find(m, id[best], id[best + 1])->result;
        memmove(id + best + 1, id + best + 2, (n - best - 2) * sizeof *id);
        memmove(rank + best, rank + best + 1, (n - best - 2) * sizeof *rank);
        n--;
        if (best + 1 < n) rank[best] = pair_rank(m, id[best], id[best + 1]);
        if (best > 0) rank[best - 1] = pair_rank(m, id[best - 1], id[best]);
    }
    return tr_ids_append(out, id, n);
}

/* ---- long pieces ----------------------------------------------------------------------------- */

/* The heap has four children per node: half the levels, and the children share a cache line. */
static void sift_down(candidate *heap, size_t n, size_t i)
{
    candidate moved = heap[i];

    for (size_t child; (child = 4 * i + 1) < n; i = child) {
        size_t end = child + 4 < n ? child + 4 : n;
        for (size_t k = child + 1; k < end; k++)
            if (heap[k] < heap[child]) child = k;
        if (heap[child] >= moved) break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static candidate make_candidate(int32_t rank, int32_t at)
{
    return (candidate)(uint32_t)rank << 32 | (uint32_t)at;
}

/* The pair that begins at symbol `at` has changed: note its rank, and where it merges make it a
 * candidate. The heap has room: the first n - 1 candidates plus two for each of at most n - 1
 * merges. */
static void set_rank(tr_bpe *b, const tr_merges *m, int32_t at)
{
    symbol *s = &b->symbols[at];

    s->rank = s->next < 0 ? NO_MERGE : pair_rank(m, s->id, b->symbols[s->next].id);
    if (s->rank == NO_MERGE) return;
    candidate added = make_candidate(s->rank, at);
    size_t i = b->n_heap++;
    for (; i > 0 && added < b->heap[(i - 1) / 4]; i = (i - 1) / 4)
        b->heap[i] = b->heap[(i - 1) / 4];
    b->heap[i] = added;
}

static bool reserve_long(tr_bpe *b, size_t n)
{
    void *symbols = b->symbols, *heap = b->heap;
    bool ok = grow(&symbols, &b->cap, n, sizeof *b->symbols) &&
              grow(&heap, &b->heap_cap, 3 * n, sizeof *b->heap);

    b->symbols = symbols;
    b->heap = heap;
    return ok;
}

static void start_long(tr_bpe *b, const tr_merges *m, const int32_t byte_id[256], const char *piece,
                       size_t n)
{
    for (size_t i = 0; i < n; i++)
        b->symbols[i] = (symbol){byte_id[(unsigned char)piece[i]], (int32_t)i - 1,
                                 i + 1 < n ? (int32_t)i + 1 : -1, NO_MERGE};
    b->n_heap = 0;
    for (size_t i = 0; i + 1 < n; i++) {
        symbol *s = &b->symbols[i];
        s->rank = pair_rank(m, s->id, s[1].id);
        if (s->rank != NO_MERGE) b->heap[b->n_heap++] = make_candidate(s->rank, (int32_t)i);
    }
    for (size_t i = (b->n_heap + 2) / 4; i-- > 0;)
        sift_down(b->heap, b->n_heap, i);
}

static bool merge_long(tr_bpe *b, const tr_merges *m, const int32_t byte_id[256], const char *piece,
                       size_t n, tr_ids *out)
{
    if (!reserve_long(b, n)) return false;
    start_long(b, m, byte_id, piece, n);

    while (b->n_heap > 0) {
        candidate best = b->heap[0];
        b->heap[0] = b->heap[--b->n_heap];
        if (b->n_heap > 0) sift_down(b->heap, b->n_heap, 0);

        int32_t at = (int32_t)(best & UINT32_MAX), rank = (int32_t)(best >> 32);
        symbol *left = &b->symbols[at];
        if (left->id < 0 || left->rank != rank) continue; /* a pair that is no more */
        symbol *right = &b->symbols[left->next];
        left->id = tr_merges_find(m, left->id, right->id)->result;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) b->symbols[left->next].prev = at;
        set_rank(b, m, at);
        if (left->prev >= 0) set_rank(b, m, left->prev);
    }

    size_t n_ids = 0;
    for (int32_t i = 0; i >= 0; i = b->symbols[i].next)
        n_ids++;
    if (!tr_ids_reserve(out, n_ids)) return false;
    for (int32_t i = 0; i >= 0; i = b->symbols[i].next)
        out->id[out->n++] = b->symbols[i].id;
    return true;
}

/* ---- the scratch ----------------------------------------------------------------------------- */

tr_bpe *tr_bpe_create(void)
{
    return calloc(1, sizeof(tr_bpe));
}

void tr_bpe_free(tr_bpe *b)
{
    if (!b) return;
    free(b->symbols);
    free(b->heap);
    free(b);
}

void tr_bpe_trim(tr_bpe *b)
{
    if (b->cap <= TRIM_SYMBOLS) return;
    free(b->symbols);
    free(b->heap);
    *b = (tr_bpe){0};
}

bool tr_bpe_piece(tr_bpe *b, const tr_merges *merges, const int32_t byte_id[256], const char *piece,
                  size_t n, tr_ids *out)
{
    if (n == 0) return true;
    if (n <= TR_BPE_SHORT) return merge_short(merges, byte_id, piece, n, out);
    return merge_long(b, merges, byte_id, piece, n, out);
}
