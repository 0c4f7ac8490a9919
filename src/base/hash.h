/* Hashing by XXH3 (xxhash): identities of files and requests, not cryptography. */
#ifndef TR_BASE_HASH_H
#define TR_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

uint64_t tr_hash64(const void *data, size_t n, uint64_t seed);

/* 32 lower-case hex digits and a NUL of the 128-bit hash. */
void tr_hash128_hex(const void *data, size_t n, uint64_t seed, char hex[33]);

/* Incremental 128-bit hash, for files that are read in pieces. NULL: out of memory. */
typedef struct tr_hasher tr_hasher;
tr_hasher *tr_hasher_create(void);
void tr_hasher_add(tr_hasher *h, const void *data, size_t n);
void tr_hasher_hex(const tr_hasher *h, char hex[33]);
void tr_hasher_free(tr_hasher *h);

#endif
