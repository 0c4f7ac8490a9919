#include <config.h>

#include "batch/idset.h"

#include <stdlib.h>

#include "base/hash.h"
#include "base/size.h"

/* Seeds of the two kinds of keys: an id "17" is not line 17. */
enum { SEED_ID = 0x6964, SEED_LINE = 0x6c696e65 };

typedef struct entry {
    tr_key key;
    uint64_t mark; /* value + 1; 0: empty */
} entry;

struct tr_idset {
    entry *at;
    size_t n, cap; /* cap is a power of two */
};

static uint64_t from_hex(const char *hex)
{
    uint64_t v = 0;
    for (int i = 0; i < 16; i++) {
        char c = hex[i];
        v = v << 4 | (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    return v;
}

static tr_key key_of(const void *data, size_t n, uint64_t seed)
{
    char hex[33];
    tr_hash128_hex(data, n, seed, hex);
    return (tr_key){from_hex(hex), from_hex(hex + 16)};
}

tr_key tr_key_id(const char *custom_id, size_t n)
{
    return key_of(custom_id, n, SEED_ID);
}

tr_key tr_key_line(uint64_t line)
{
    return key_of(&line, sizeof line, SEED_LINE);
}

tr_idset *tr_idset_create(void)
{
    tr_idset *set = calloc(1, sizeof *set);
    if (!set) return NULL;
    set->cap = 1024;
    set->at = tr_calloc(set->cap, sizeof *set->at);
    if (!set->at) {
        free(set);
        return NULL;
    }
    return set;
}

void tr_idset_free(tr_idset *set)
{
    if (!set) return;
    free(set->at);
    free(set);
}

static entry *slot(const entry *at, size_t cap, tr_key key)
{
    size_t i = (size_t)key.lo & (cap - 1);
    while (at[i].mark && (at[i].key.hi != key.hi || at[i].key.lo != key.lo))
        i = (i + 1) & (cap - 1);
    return (entry *)&at[i];
}

static bool grow(tr_idset *set)
{
    size_t cap;
    if (!tr_mul(&cap, set->cap, 2)) return false;
    entry *at = tr_calloc(cap, sizeof *at);
    if (!at) return false;
    for (size_t i = 0; i < set->cap; i++)
        if (set->at[i].mark) *slot(at, cap, set->at[i].key) = set->at[i];
    free(set->at);
    set->at = at;
    set->cap = cap;
    return true;
}

int tr_idset_add(tr_idset *set, tr_key key, uint64_t value, uint64_t *before)
{
    entry *e = slot(set->at, set->cap, key);
    if (e->mark) {
        if (before) *before = e->mark - 1;
        return 0;
    }
    if (set->n >= set->cap / 3 * 2) {
        if (!grow(set)) return -1;
        e = slot(set->at, set->cap, key);
    }
    e->key = key;
    e->mark = value + 1;
    set->n++;
    return 1;
}

bool tr_idset_find(const tr_idset *set, tr_key key, uint64_t *value)
{
    const entry *e = slot(set->at, set->cap, key);
    if (!e->mark) return false;
    if (value) *value = e->mark - 1;
    return true;
}

size_t tr_idset_count(const tr_idset *set)
{
    return set->n;
}
