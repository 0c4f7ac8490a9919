/* Sets of requests by the 128-bit hash of their custom_id, or of their line number where a line
 * has none. Used for duplicates in the input, for what OUT already holds and for merging. 24
 * bytes an entry; open addressing. One thread writes; many may read once nobody writes. */
#ifndef TR_BATCH_IDSET_H
#define TR_BATCH_IDSET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct tr_key {
    uint64_t hi, lo;
} tr_key;

tr_key tr_key_id(const char *custom_id, size_t n);
tr_key tr_key_line(uint64_t line);

typedef struct tr_idset tr_idset;

tr_idset *tr_idset_create(void); /* NULL: out of memory */
void tr_idset_free(tr_idset *set);
/* 1: added; 0: was there, *before (may be NULL) is its value; -1: out of memory. value <
 * UINT64_MAX. */
int tr_idset_add(tr_idset *set, tr_key key, uint64_t value, uint64_t *before);
bool tr_idset_find(const tr_idset *set, tr_key key, uint64_t *value); /* value may be NULL */
size_t tr_idset_count(const tr_idset *set);

#endif
