/* Byte-pair merging (chat.md 1.4) and the two tables it needs: pairs of ids to merges, byte strings
 * to ids. The tables are filled at load and then read by every thread; a tr_bpe is the scratch of
 * one thread. */
#ifndef TR_TEXT_BPE_H
#define TR_TEXT_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct tr_ids { /* a growing list of token ids; zeroed: empty */
    int32_t *id;
    size_t n, cap;
} tr_ids;

/* Room for n more; false: out of memory. */
bool tr_ids_reserve(tr_ids *ids, size_t n);
bool tr_ids_append(tr_ids *ids, const int32_t *id, size_t n);

typedef struct tr_merge {
    int32_t left, right; /* left -1: empty slot */
    int32_t rank, result;
} tr_merge;

typedef struct tr_merges { /* open addressing, at most half full */
    tr_merge *slot;
    size_t n_slots; /* a power of two */
} tr_merges;

/* For at most n pairs; false: out of memory. */
bool tr_merges_create(tr_merges *m, size_t n);
/* Of equal pairs the first one added stays. */
void tr_merges_add(tr_merges *m, tr_merge merge);
const tr_merge *tr_merges_find(const tr_merges *m, int32_t left, int32_t right);
void tr_merges_free(tr_merges *m);

typedef struct tr_bpe tr_bpe;
tr_bpe *tr_bpe_create(void); /* NULL: out of memory */
void tr_bpe_free(tr_bpe *b);

/* Pieces of at most TR_BPE_SHORT bytes are merged by looking for the best pair again and again;
 * longer ones with a heap, n log n. Both give the same ids (tests/test_encode.c). */
enum { TR_BPE_SHORT = 64 };

/* Append the ids of one piece of n bytes, n < 2^31. byte_id: the ids of the single bytes. false:
 * out of memory. */
bool tr_bpe_piece(tr_bpe *b, const tr_merges *merges, const int32_t byte_id[256], const char *piece,
                  size_t n, tr_ids *out);
/* Gives back the memory of an unusually long piece. */
void tr_bpe_trim(tr_bpe *b);

#endif
